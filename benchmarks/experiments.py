"""Whether experiments can be believed: false alarms, power, what CUPED saves, split checks, interleaving, off-policy estimates.

Everything is measured where the truth is known. A/A tests deal the shoppers of a shop (simulated, or `--path`: a real log) into two variants again and
again by the platform's own assignment; nothing differs, so every verdict is false. For power the carts of the control are thinned. Interleaving and
off-policy estimates are held to shoppers whose wants were planted. An interval behind a rate is exact, 95%, over the repetitions.
"""

import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import binomtest, norm

from benchmarks.base import arguments, render, write
from reco.data.histories import ADDTOCART, VIEW
from reco.data.raw_shop import read_shop
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.sources import FILES
from reco.evaluation.counterfactual import ips, snips
from reco.experiments.assignment import Assigner, Experiment, Experiments, Variant
from reco.experiments.interleaving import credit, interleaved, preference
from reco.experiments.off_policy import at_epsilon, off_policy, slates
from reco.experiments.readout import METRICS as BUSINESS
from reco.experiments.readout import Measured, measured, readout, sequential_bound, srm_p
from reco.reranking.exploration import explore, softmax
from reco.settings import load_settings

ALPHA, END, LEAST = 0.05, datetime(2026, 5, 1, tzinfo=UTC), 20
DAY_MS = 86_400_000


def row(system: str, case: str, **metrics: float | list) -> dict:
    """A row of the results."""
    return {"system": system, "case": case, "metrics": metrics}


def rate(hits: np.ndarray) -> dict[str, object]:
    """A share with its exact interval."""
    ends = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, "exact")
    return {"rate": round(float(hits.mean()), 4), "rate_ci": [round(float(ends.low), 4), round(float(ends.high), 4)], "repetitions": len(hits)}


# What shoppers did, day by day


@dataclass(frozen=True)
class Days:
    """Sums of shoppers so far, at the end of each day."""

    user: list[str]
    views: np.ndarray   # float64 [days, shoppers]
    carts: np.ndarray
    visits: np.ndarray  # days on which the shopper was there
    before: np.ndarray  # float64 [shoppers, 3]: views and carts of as many days before, and whether there were any

    def thinned(self, keep: float, rng: np.random.Generator) -> np.ndarray:
        """The carts if each had come about with this chance only."""
        daily = np.diff(self.carts, axis=0, prepend=0).astype(np.int64)
        return rng.binomial(daily, keep).cumsum(axis=0).astype(float)


def days_of(shop: ShopData, days: int, shoppers: int, seed: int) -> Days:
    """The last days of a shop, for so many of the shoppers who came then."""
    log = shop.log
    last = log.ts.max() // DAY_MS
    age = last - log.ts // DAY_MS  # 0 is the last day
    came = np.unique(log.user[age < days])
    chosen = np.sort(np.random.default_rng(seed).permutation(came)[:shoppers])
    place = np.full(log.n_users, -1)
    place[chosen] = np.arange(len(chosen))
    mine = (place[log.user] >= 0) & (age < 2 * days)
    daily = np.zeros((2, 2 * days, len(chosen)))
    for i, event in enumerate((VIEW, ADDTOCART)):
        of = mine & (log.event == event)
        np.add.at(daily[i], (2 * days - 1 - age[of], place[log.user[of]]), 1)
    earlier = daily[:, :days].sum(axis=1)
    views, carts = daily[:, days:].cumsum(axis=1)
    there = (daily[:, days:].sum(axis=0) > 0).cumsum(axis=0)
    return Days([str(u) for u in chosen], views, carts, there.astype(float), np.stack([*earlier, earlier[0] > 0], axis=1).astype(float))


METRICS = {"carts by views": ("carts", "views"), "carts by shoppers": ("carts", None), "views by shoppers": ("views", None)}


def looked_at(d: Days, metric: str, arm: np.ndarray, looks: np.ndarray, with_before: bool, carts: np.ndarray | None = None) -> tuple[list[Measured], np.ndarray]:
    """What was measured at each look, and the shopper-days behind it."""
    over, under = METRICS[metric]
    out, t = [], []
    for day in looks:
        seen = d.visits[day] > 0
        y = (d.carts if carts is None else carts)[day] if over == "carts" else d.views[day]
        x = d.views[day] if under else np.ones(len(seen))
        out.append(measured(y[seen], x[seen], arm[seen], 2, d.before[seen] if with_before else None))
        t.append(d.visits[day].sum())
    return out, np.array(t)


def z_of(m: Measured) -> float:
    """How many standard errors lie between the variants; 0 while too few shoppers have something to count."""
    error = np.sqrt(m.variance.sum())
    return float((m.value[1] - m.value[0]) / error) if m.counted.min() >= LEAST and error > 0 else 0.0


def dealt(users: list[str], salt: str) -> np.ndarray:
    """The variant of each shopper, as the endpoint would deal them."""
    pair = Variant(name="control", weight=0.5), Variant(name="variant", weight=0.5)
    assigner = Assigner(Experiments(experiment=(Experiment(name="aa", salt=salt, variant=pair),)))
    return np.array([not assigner.arms(u, 0, "for_you")[0].control for u in users]).astype(np.int64)


def alarms(d: Days, tests: int, metrics: list[str]) -> list[dict]:
    """A/A: how often something is found that is not there; and what CUPED saves."""
    looks, rows = np.arange(len(d.views)), []
    arms = [dealt(d.user, f"aa {i}") for i in range(tests)]
    for metric in metrics:
        plain: list[Measured] = []
        for with_before in (False, True):
            runs = [looked_at(d, metric, arm, looks, with_before) for arm in arms]
            z, t = np.array([[z_of(m) for m in ms] for ms, _ in runs]), runs[0][1]
            bound, case = sequential_bound(t, ALPHA, t[-1]), f"A/A, {metric}" + ", CUPED" * with_before
            for system, wrong in (("t-test, one look", np.abs(z[:, -1]) > norm.ppf(1 - ALPHA / 2)),
                                  ("t-test, every day", (np.abs(z) > norm.ppf(1 - ALPHA / 2)).any(axis=1)), ("reco", (np.abs(z) > bound).any(axis=1))):
                rows.append(row(system, case, **rate(wrong)))
            last = [ms[-1] for ms, _ in runs]
            if with_before: rows.append(saving(d, metric, last, plain))
            plain = last
    return rows


def saving(d: Days, metric: str, adjusted: list[Measured], plain: list[Measured]) -> dict:
    """Variance saved: said by the readout, seen between repetitions, and ρ² of the same regression by ordinary means."""
    over, under = METRICS[metric]
    y, x = getattr(d, over)[-1], d.views[-1] if under else np.ones(len(d.user))
    term = y - y.sum() / x.sum() * x
    design = np.column_stack([np.ones(len(y)), d.before])
    left = term - design @ np.linalg.lstsq(design, term, rcond=None)[0]
    seen = 1 - np.var([np.diff(m.value) for m in adjusted]) / np.var([np.diff(m.value) for m in plain])
    return row("CUPED", metric, rho2=round(float(1 - left.var() / term.var()), 4), saved=round(float(np.mean([m.saved for m in adjusted])), 4),
               seen=round(max(float(seen), 0), 4), repetitions=len(plain))


# The business metrics, through the whole readout


HALVES = {"control": 0.5, "variant": 0.5}


def shopper_days(shoppers: int, days: int, seed: int, lifts: tuple[float, float, float] = (0, 0, 0)) -> pl.DataFrame:
    """What shoppers with habits of their own did on each day from `-days` on: the rows of a readout, and the same columns with the ending `_if` had each been shown lists
    whose clicks, purchases of a click and prices are higher by the lifts."""
    rng, span = np.random.default_rng(seed), 2 * days
    first, often = rng.integers(-days, days, shoppers).clip(-days // 2), rng.gamma(0.7, 1, shoppers)
    rate, buys, purse = rng.beta(2, 14, shoppers), rng.beta(2, 8, shoppers), rng.lognormal(3, 0.7, shoppers)
    day, who = (rng.random((span, shoppers)) < 1 - np.exp(-0.15 * often)).nonzero()
    day, who = day[day - days >= first[who]], who[day - days >= first[who]]
    more = lambda n, lift: n + rng.binomial(n, lift)  # a count whose mean is higher by the lift
    exposures = 1 + rng.poisson(8 * (0.5 + often[who]))
    clicks = rng.binomial(exposures, rate[who])
    purchases = rng.binomial(clicks, buys[who])
    paid = purse[who] * rng.gamma(3, 1 / 3, len(who))
    clicks_if = more(clicks, lifts[0])
    purchases_if = more(purchases, (1 + lifts[0]) * (1 + lifts[1]) - 1)
    return pl.DataFrame({"user_id": pl.Series(who).cast(pl.String) + f"-{seed}", "day": day - days, "exposures": exposures, "clicks": clicks, "purchases": purchases,
                         "orders": purchases > 0, "revenue": purchases * paid, "clicks_if": clicks_if, "purchases_if": purchases_if, "orders_if": purchases_if > 0,
                         "revenue_if": purchases_if * paid * (1 + lifts[2])}).with_columns(pl.col("orders", "orders_if").cast(pl.Int64))


def split(days: pl.DataFrame, salt: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows of an experiment whose shoppers are dealt as the endpoint would, and those of the time before."""
    users = days["user_id"].unique().sort()
    arms = pl.DataFrame({"user_id": users, "variant": np.array(list(HALVES))[dealt(users.to_list(), salt)]})
    both = days.join(arms, on="user_id", how="left", validate="m:1", maintain_order="left")
    told = [c for c in days.columns if f"{c}_if" in days.columns]
    shown = both.with_columns(pl.when(pl.col("variant") == "variant").then(f"{c}_if").otherwise(c).alias(c) for c in told)
    of = lambda frame: frame.drop(f"{c}_if" for c in told)
    return of(shown.filter(pl.col("day") >= 0)), of(days.filter(pl.col("day") < 0))


def said(days: pl.DataFrame, salt: str, looks: list[int], with_before: bool) -> list[pl.DataFrame]:
    """The readout of one test at the end of each of so many days, and last at one look that was fixed before."""
    rows, before = split(days, salt)
    known = before if with_before else None
    last = len(rows.filter(pl.col("day") < looks[-1]))
    return [*(readout(rows.filter(pl.col("day") < day), HALVES, known, plan=last) for day in looks), readout(rows.filter(pl.col("day") < looks[-1]), HALVES, known, plan=None)]


def business(tests: int, shoppers: int, looks: list[int], seed: int) -> list[dict]:
    """A/A through the readout: false alarms of CTR, CVR, AOV and revenue, at one look and at any of many; and what CUPED saves of each."""
    rows, decided = [], pl.col("verdict").is_in(["ahead", "behind"])
    runs = {b: [said(shopper_days(shoppers, looks[-1], 10_000 * seed + i), "aa", looks, b) for i in range(tests)] for b in (False, True)}
    for metric in (m.name for m in BUSINESS):
        of = {b: [[t.filter(metric=metric).with_columns(wrong=decided).row(0, named=True) for t in tables] for tables in runs[b]] for b in runs}
        for b, name in ((False, ""), (True, ", CUPED")):
            rows.append(row("readout, one look", f"A/A, {metric}{name}", **rate(np.array([x[-1]["wrong"] for x in of[b]]))))
            rows.append(row("readout", f"A/A, {metric}{name}, {len(looks)} looks", **rate(np.array([any(y["wrong"] for y in x[:-1]) for x in of[b]]))))
        apart = {b: np.array([x[-1]["value"] - x[-1]["control"] for x in of[b]]) for b in of}
        rows.append(row("CUPED", metric, saved=round(float(np.mean([x[-1]["saved"] for x in of[True]])), 4),
                        seen=round(max(float(1 - apart[True].var() / apart[False].var()), 0), 4), repetitions=tests))
    return rows


def power(d: Days, tests: int, lifts: list[float], seed: int) -> list[dict]:
    """How often, and how soon, a true lift of carts by views is found."""
    looks, rows = np.arange(len(d.views)), []
    for lift in lifts:
        for with_before in (False, True):
            z = []
            for i in range(tests):
                arm, rng = dealt(d.user, f"power {lift} {i}"), np.random.default_rng([seed, i])
                carts = np.where(arm == 1, d.thinned(1 / 1.3, rng), d.thinned(1 / 1.3 / (1 + lift), rng))
                ms, t = looked_at(d, "carts by views", arm, looks, with_before, carts)
                z.append([z_of(m) for m in ms])
            found = np.array(z) > sequential_bound(t, ALPHA, t[-1])
            case = f"lift {lift:.0%}" + ", CUPED" * with_before
            rows.append(row("t-test, one look", case, **rate(np.array(z)[:, -1] > norm.ppf(1 - ALPHA / 2)), day=len(looks)))
            rows.append(row("reco", case, **rate(found.any(axis=1)), day=float(np.median(np.where(found.any(axis=1), found.argmax(axis=1) + 1, len(looks))))))
    return rows


def splits(tests: int, shoppers: int, seed: int) -> list[dict]:
    """Sample-ratio mismatch: alarms without a fault, and with some shoppers of one variant lost."""
    rng, half, rows = np.random.default_rng(seed), {"a": 0.5, "b": 0.5}, []
    p_of = lambda a, b: srm_p({"a": int(a), "b": int(b)}, half)
    for n, lost in ((shoppers, 0), (shoppers, 0.05), (shoppers, 0.1), (10 * shoppers, 0.02)):
        a = rng.binomial(n, 0.5, tests)
        found = [p_of(x, y) for x, y in zip(a, rng.binomial(n - a, 1 - lost), strict=True)]
        rows.append(row("reco", f"split of {n:,}, {lost:.0%} of one variant lost", **rate(np.array(found) < 0.001)))
    so_far = shoppers // 28 * np.arange(1, 29)
    daily = [min(p_of(x, n - x) for x, n in zip(rng.binomial(shoppers // 28, 0.5, 28).cumsum(), so_far, strict=True)) for _ in range(tests)]
    rows.append(row("reco", f"split of {shoppers:,}, nothing lost, looked at on 28 days", **rate(np.array(daily) < 0.001)))
    return rows


# Interleaving


LOOKED = 1 / np.log2(np.arange(8) + 2)


def duel(shoppers: int, noise: tuple[float, float], together: bool, rng: np.random.Generator) -> tuple[bool, bool]:
    """Whether the better ranker was found, and whether the worse one: interleaved, or one ranker per shopper."""
    keen, n = rng.gamma(1, 1, shoppers).clip(0, 3), rng.poisson(2, shoppers) + 1
    user, worth = np.repeat(np.arange(shoppers), n), rng.gamma(1, 0.06, 60).clip(0, 0.3)
    seen = lambda x: np.argsort(-(np.log(worth) + x * rng.standard_normal((len(user), 60))), axis=1)[:, :8].astype(np.int32)
    a, b, arm = seen(noise[0]), seen(noise[1]), rng.integers(0, 2, shoppers)
    drafts = [interleaved(x, y, 8, f"{i} {rng.integers(2**60)}") for i, (x, y) in enumerate(zip(a, b, strict=True))] if together else []
    items = np.stack([x.items for x in drafts]) if together else np.where(arm[user][:, None], b, a)
    clicks = rng.random(items.shape) < worth[items] * LOOKED * keen[user][:, None]
    if together:
        shown = pl.DataFrame({"user_id": np.repeat(user, 8).astype(str), "team": np.stack([x.team for x in drafts]).ravel(), "clicks": clicks.ravel()})
        found = preference(credit(shown))
        return found.p < ALPHA and found.second > found.first, found.p < ALPHA and found.second < found.first
    m = measured(np.bincount(user, clicks.sum(axis=1)), n * 8.0, arm, 2)
    z = float((m.value[1] - m.value[0]) / np.sqrt(m.variance.sum()))
    return z > norm.ppf(1 - ALPHA / 2), z < -norm.ppf(1 - ALPHA / 2)


def duels(tests: int, sizes: list[int], seed: int) -> list[dict]:
    """Interleaving beside an A/B test of the same traffic, each with one look at 5%."""
    rows = []
    for noise, name in (((1.0, 1.0), "rankers alike"), ((1.0, 0.6), "one ranker better")):
        for shoppers in sizes:
            for together in (True, False):
                rng = np.random.default_rng([seed, shoppers, together])
                found = np.array([duel(shoppers, noise, together, rng) for _ in range(tests)])
                hits = found.any(axis=1) if noise[0] == noise[1] else found[:, 0]
                rows.append(row("interleaving" if together else "A/B test", f"{name}, {shoppers:,} shoppers", **rate(hits)))
    return rows


# Off-policy


@dataclass(frozen=True)
class World:
    """A shop whose chances of a click are known, with a popular list and an explored slot."""

    click: np.ndarray  # float64 [shoppers, items]
    keep: int = 2
    slots: int = 6

    @property
    def order(self) -> np.ndarray: return np.argsort(-self.click.mean(axis=0), kind="stable").astype(np.int32)

    def shown(self, epsilon: float, temperature: float) -> np.ndarray:
        """Probability of every item in every slot: float64 [shoppers, slots, items]."""
        listed, others = self.order[: self.slots], self.order[self.slots :]
        share = np.where(np.arange(self.slots) < self.keep, 0, epsilon / (self.slots - self.keep))
        p = np.zeros((len(self.click), self.slots, len(self.order)))
        p[:, np.arange(self.slots), listed] = 1 - share
        p[:, :, others] = share[:, None] * np.stack([softmax(np.log(c[others]), temperature) for c in self.click])[:, None, :]
        return p

    def earns(self, p: np.ndarray) -> float:
        """Clicks per request of a policy, all shoppers alike."""
        return float(np.einsum("usi,ui,s->u", p, self.click, LOOKED[: self.slots]).mean())

    def log(self, n: int, epsilon: float, temperature: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Shoppers, items, propensities and clicks of n requests."""
        rng, order = np.random.default_rng(seed), self.order
        user = rng.integers(0, len(self.click), n)
        lists = [explore(order[: self.slots], order[self.slots :], np.log(self.click[u, order[self.slots :]]), epsilon, temperature, self.keep, f"{seed}-{i}")
                 for i, u in enumerate(user)]
        items = np.stack([x.items for x in lists])
        return user, items, np.stack([x.propensity for x in lists]), rng.random(items.shape) < self.click[user[:, None], items] * LOOKED[: self.slots]


def world(shoppers: int, seed: int) -> World:
    """Clicks from the tastes that the simulator planted."""
    sim = simulate(shoppers, 60, 10 * shoppers, days=14, end=END, seed=seed)
    leaf = sim.catalog.unique("item_id", keep="first").sort("item_id")["category_id"].to_numpy()
    likes = sim.tastes.pivot("category_id", index="user_id", values="weight").sort("user_id").fill_null(0)
    found = np.stack([likes[c].to_numpy() if c in likes.columns else np.zeros(likes.height) for c in leaf], axis=1)
    return World(np.random.default_rng(seed).gamma(2, 0.5, (shoppers, 1)).clip(0.05, 2) * (0.02 + 0.4 * found))


def policies(tests: int, requests: int, seed: int) -> list[dict]:
    """The error of each estimate of what another policy earns, over many logs; the naive one is the log's own average."""
    w, rows = world(600, seed), []
    for case, epsilon, temperature in (("more exploration, by taste", 0.66, 1.0), ("no exploration", 0.0, 1.0)):
        target = w.shown(epsilon, temperature)
        truth, found = w.earns(target), []
        logging = 1.0 if not epsilon else 1e6  # the log drew evenly where the target draws by taste
        for i in range(tests):
            user, items, p, clicks = w.log(requests, 0.33, logging, 1_000 * seed + i)
            n = np.arange(requests)
            frame = pl.DataFrame({"request_id": np.repeat(n, w.slots), "user_id": np.repeat(user, w.slots), "rank": np.tile(np.arange(w.slots), requests),
                                  "propensity": p.ravel(), "reward": clicks.ravel().astype(float)})
            log = slates(frame)
            t = at_epsilon(log, 0.33, epsilon)
            if epsilon: t = type(t)(target[user[:, None], np.arange(w.slots), items], t.kind, t.drawn)
            answers = off_policy(log, t)
            naive = clicks.sum(axis=1).mean()
            crude = [e.value for e in (ips(clicks, t.probability, p, 2.0), snips(clicks, t.probability, p, 2.0))]
            found.append([naive, *crude, *answers["value"], *((answers["low"] < truth) & (truth < answers["high"]))])
        x = np.array(found, float)
        for j, name in enumerate(("naive average", "ips, clipped at 2", "snips, clipped at 2", "ips", "snips", "dr")):
            error = x[:, j] - truth
            more = rate(x[:, j + 3] > 0) if j >= 3 else {"repetitions": tests}
            cover = {"covered" + k.removeprefix("rate"): v for k, v in more.items() if k.startswith("rate")}
            rows.append(row(name, f"off-policy: {case}", truth=round(truth, 4), bias=round(abs(float(error.mean())), 5), rmse=round(float(np.sqrt((error**2).mean())), 5),
                            **cover, repetitions=tests))
    return rows


def speed(times: int) -> list[dict]:
    """Microseconds per request of the assignment, in CPU time."""
    rows, pair = [], (Variant(name="a", weight=0.5), Variant(name="b", weight=0.5))
    users = [f"user_{i}" for i in range(1_000)]
    for many, holdout in ((1, 0.0), (1, 0.02), (5, 0.02)):
        assigner, took = Assigner(Experiments(holdout=holdout, experiment=tuple(Experiment(name=f"e{i}", variant=pair) for i in range(many)))), []
        for _ in range(times):
            began = time.process_time()
            for u in users: assigner.arms(u, 0, "for_you")
            took.append(1e3 * (time.process_time() - began))
        rows.append(row("reco", f"assignment, {many} experiment{'s' * (many > 1)}" + ", global holdout" * (holdout > 0), us_per_request=round(min(took), 2)))
    return rows


def main(argv: list[str] | None = None) -> None:
    """All of it."""
    parser = arguments(__doc__)
    parser.add_argument("--source", choices=FILES, default="retailrocket", help="the files' format")
    parser.add_argument("--path", type=Path, help="folder of raw files whose shoppers are dealt into A/A tests; without it, a simulated shop's")
    parser.add_argument("--shoppers", type=int, default=3_000, help="of these at most")
    parser.add_argument("--tests", type=int, default=1_000, help="A/A tests")
    args, settings = parser.parse_args(argv), load_settings()
    seed = settings.project.seed
    if args.path: shop = read_shop(args.source, args.path, settings)
    else:
        users = 400 if args.quick else args.shoppers
        sim = simulate(users, 500, 30 * users, days=56, end=END, seed=seed)
        shop = index_shop(sim.interactions, sim.catalog)
    d = days_of(shop, 28, args.shoppers, seed)
    if len(d.user) < 100: sys.exit(f"{len(d.user)} shoppers came in the last 28 days; 100 are needed")
    few = args.quick
    rows = alarms(d, 20 if few else args.tests, ["carts by views"] if few else list(METRICS))
    rows += business(10 if few else args.tests, 300 if few else 1_500, [14, 28] if few else [7, 14, 21, 28], seed)
    rows += power(d, 10 if few else 300, [0.3] if few else [0.3, 0.6], seed) + splits(20 if few else 5_000, 2_000 if few else 10_000, seed)
    rows += duels(3 if few else 200, [40] if few else [100, 400], seed) + policies(2 if few else 100, 300 if few else 2_000, seed) + speed(2 if few else 30)
    write("experiments", rows, args.results, argv=argv)
    if not args.quick: render()


if __name__ == "__main__": main()
