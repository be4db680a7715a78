"""Whether the daily drift check can be believed: alarms in a year in which nothing happens, and how soon a drift of known size is found.

The shops are drawn here, so that the truth is known: twelve columns, shoppers who come back and resemble themselves, busier hours on weekends. Nothing else
differs between days. As in the platform, the last 7 days are held beside the 28 before the champion's moment, every day, and the champion is replaced
every 30. A drift begins on a day and stays; its size is the index of the whole population in ten bins. `reco` asks for an excess over .2 that chance does not
explain (.001 for all columns of a day), the rule of thumb for an index over .2. An interval behind a rate is exact, 95%, over the repetitions.

What it leaves out: drifts that creep, several at once, and columns whose values only change with the moment of a fit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.optimize import brentq
from scipy.stats import norm

from benchmarks.base import arguments, render, write
from benchmarks.experiments import rate, row
from reco.monitoring.decision import moved
from reco.monitoring.drift import drift_table

LAST, BEFORE, LIFE, MIN_DAYS = 7, 28, 30, 7  # days: compared, of the reference, of a champion, between two retrains
PSI, CHANCE = 0.2, 0.001                     # [monitor], as it comes
EDGES, SIZES = norm.ppf(np.arange(1, 10) / 10), (0.1, 0.2, 0.3, 0.4)
CATEGORIES = 1 / np.arange(1, 21) ** 0.8
CATEGORIES /= CATEGORIES.sum()


def index(p: np.ndarray, q: np.ndarray) -> float:
    """Population stability index of two populations."""
    return float(((q - p) * np.log(q / p)).sum())


def shift_of(size: float) -> float:
    """By how many standard deviations a normal column moves so that its index in the reference's tenths is that."""
    tenths = np.full(10, 0.1)
    of = lambda d: index(tenths, np.diff(norm.cdf(EDGES - d), prepend=0, append=1))
    return brentq(lambda d: of(d) - size, 0, 3)


def tilt_of(size: float) -> float:
    """How strongly the rarer categories are wanted more so that the index of the categories is that."""
    return brentq(lambda t: index(CATEGORIES, tilted(t)) - size, 0, 3)


def tilted(t: float) -> np.ndarray:
    """The shares of the categories, each in its logarithm moved by up to t."""
    q = CATEGORIES * np.exp(t * np.linspace(-1, 1, len(CATEGORIES)))
    return q / q.sum()


@dataclass(frozen=True)
class Shop:
    """A population of shoppers with tastes of their own."""

    visitors: int      # of a day
    taste: np.ndarray  # float64 [shoppers, 8], what a shopper adds to each number: half of its variance
    own: np.ndarray    # float64 [shoppers], place of the favourite category among all, from 0 to 1
    rng: np.random.Generator

    @classmethod
    def drawn(cls, visitors: int, seed: list[int]) -> "Shop":
        """A new one."""
        rng = np.random.default_rng(seed)
        return cls(visitors, rng.standard_normal((20 * visitors, 8)), rng.random(20 * visitors), rng)

    def day(self, n: int, shift: float = 0, tilt: float = 0) -> pl.DataFrame:
        """The events of the n-th day."""
        r = self.rng
        came = r.choice(len(self.own), self.visitors, replace=False)
        who = np.repeat(came, 1 + r.poisson(2, self.visitors))
        m, weekend = len(who), n % 7 > 4
        z = np.sqrt(0.5) * (self.taste[who] + r.standard_normal((m, 8)))
        z[:, 0] += shift
        place = np.where(r.random(m) < 0.5, self.own[who], r.random(m))
        words = np.searchsorted(tilted(tilt).cumsum(), place).clip(0, len(CATEGORIES) - 1)
        return pl.DataFrame({"day": np.full(m, n), "who": who, "price": np.exp(3 + z[:, 0]), "category": words.astype(str),
            "event": r.choice(["view", "addtocart", "transaction"], m, p=[0.9, 0.07, 0.03]), "hour": (r.normal(14 if weekend else 18, 4, m) % 24).astype(int),
            "brand": (8 * norm.cdf(z[:, 1])).astype(int).astype(str), "sold": np.floor(np.exp(z[:, 2])), "stock": np.where(z[:, 3] < 0.6, 0, np.ceil(5 * z[:, 3])),
            "discount": norm.cdf(z[:, 4]).round(1), "age": 100 * z[:, 5] ** 2, "margin": z[:, 6], "views": np.floor(z[:, 7] ** 4), "rating": 5 - r.poisson(1, m).clip(0, 4)})


def checks(days: list[pl.DataFrame], asof: int, until: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """Day and drift, for each day that a champion of the moment `asof` is watched."""
    reference = pl.concat(days[asof - BEFORE : asof]).drop("day")
    for now in range(asof + 1, until + 1):
        yield now, drift_table("events", reference, pl.concat(days[now - LAST : now]).drop("day"), "who")


SYSTEMS: dict[str, Callable[[pl.DataFrame], set[str]]] = {
    "reco": lambda drift: set(moved(drift, PSI, CHANCE)["column"]),
    "PSI over .2": lambda drift: set(drift.filter(pl.col("psi") > PSI)["column"])}


def asked(days: list[int]) -> int:
    """Retrains that alarms on these days ask for, none within a week of the last."""
    n, last = 0, -MIN_DAYS
    for d in days:
        if d - last >= MIN_DAYS: n, last = n + 1, d
    return n


def calm(visitors: int, years: int, champions: int) -> list[dict]:
    """Alarms of shops in which nothing happens."""
    found: dict[str, list[list[int]]] = {s: [] for s in SYSTEMS}
    for year in range(years):
        shop = Shop.drawn(visitors, [visitors, year])
        days = [shop.day(n) for n in range(BEFORE + champions * LIFE)]
        told: dict[str, list[int]] = {s: [] for s in SYSTEMS}
        for c in range(champions):
            for now, drift in checks(days, BEFORE + c * LIFE, BEFORE + (c + 1) * LIFE):
                for s, alarm in SYSTEMS.items():
                    if alarm(drift): told[s].append(now)
        for s in SYSTEMS: found[s].append(told[s])
    per_year = 365 / (champions * LIFE) / years
    return [row(s, f"{visitors:,} visitors a day, nothing happens", alarm_days_a_year=round(per_year * sum(map(len, of)), 2),
                retrains_a_year=round(per_year * sum(map(asked, of)), 2), days=years * champions * LIFE) for s, of in found.items()]


def caught(visitors: int, column: str, size: float, repetitions: int, watched: int) -> list[dict]:
    """How often, and after how many days, a drift of a column is found; each repetition is a shop of its own, the drift begins three days after training."""
    after: dict[str, list[float]] = {s: [] for s in SYSTEMS}
    change = {"shift": shift_of(size)} if column == "price" else {"tilt": tilt_of(size)}
    for i in range(repetitions):
        shop, begins = Shop.drawn(visitors, [visitors, i, round(1000 * size), len(column)]), BEFORE + 3
        days = [shop.day(n, **(change if n >= begins else {})) for n in range(begins + watched)]
        first = dict.fromkeys(SYSTEMS, np.inf)
        for now, drift in checks(days, BEFORE, begins + watched):
            for s, alarm in SYSTEMS.items():
                if now > begins and np.isinf(first[s]) and column in alarm(drift): first[s] = now - begins
            if np.isfinite([*first.values()]).all(): break
        for s in SYSTEMS: after[s].append(first[s])
    out = []
    for s, found in after.items():
        hit = np.isfinite(found)
        days_to = {"day": float(np.median(np.array(found)[hit]))} if hit.any() else {}
        out.append(row(s, f"{visitors:,} visitors a day, {column} drifts by {size}, watched for {watched} days", **rate(hit), **days_to))
    return out


def main() -> None:
    """Calm years, then drifts."""
    args = arguments(__doc__).parse_args()
    sizes, years, champions, repetitions, watched = ((30,), 1, 1, 2, 8) if args.quick else ((10, 30, 100, 400), 4, 12, 30, 14)
    rows = [r for v in sizes for r in calm(v, years, champions)]
    rows += [r for v in sizes for column in ("price", "category") for size in SIZES for r in caught(v, column, size, repetitions, watched)]
    write("drift", rows, args.results)
    if not args.quick: render()


if __name__ == "__main__": main()
