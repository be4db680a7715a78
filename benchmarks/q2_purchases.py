"""Next purchase in time: who will buy what in the 14 days after a cut, beside tuned peers.

Train strictly before the cut; recommend for every visitor with at least one event before it and at least one new purchase in the
window. A new purchase is read as one that happens in the window, not yet known at the cut: an item bought before counts again when
it is bought again (a repeat is a purchase too, and where nobody buys twice the other reading is the same). Relevant is every item
that the visitor buys in the window, also one that did not exist before the cut and that nobody can recommend.

Peers are tuned by NDCG@10 on a validation cut one window before the first cut, their switch for leaving out what the visitor
touched included, and keep those parameters for all cuts. Ours is the product with its default settings, trained anew before each
cut. Intervals are 95%, by bootstrap over visitors; `reco / this` is the paired ratio of NDCG@10 on the same draws.
"""

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.base import arguments, quickly, render, write
from benchmarks.peers import LIBRARY, PEERS, lists_of, tune
from benchmarks.slices import by_age, by_length, by_popularity, part
from reco.bundle import make_bundle
from reco.data.histories import TRANSACTION, Histories, epoch_ms, histories
from reco.data.quality import check_catalog, check_interactions
from reco.data.retailrocket import read_retailrocket
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.evaluation.metrics import average_precision, coverage, gini, hits, ndcg, recall, relevant, wanted
from reco.pipeline import rank
from reco.ranking.examples import Outcomes, outcomes
from reco.ranking.training import cutoffs_before, train_ranker
from reco.settings import Settings, load_settings

DAY = 86_400_000
DRAWS = 1_000
OF_EVERY_CUT = "all", "never touched before", "cold items", "short histories"  # slices; the others are for all cuts together
PER_LIST = {"NDCG@10": (ndcg, 10), "MAP@10": (average_precision, 10), "Recall@20": (recall, 20)}


def read_events(path: Path) -> ShopData:
    """RetailRocket's events.csv, perhaps gzipped, with the property files of its folder when they are there."""
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        if path.suffix == ".gz":
            with gzip.open(path) as packed, (folder / "events.csv").open("wb") as out: shutil.copyfileobj(packed, out)
        else: (folder / "events.csv").symlink_to(path.resolve())
        for p in path.parent.glob("item_properties_part?.csv"): (folder / p.name).symlink_to(p.resolve())
        batch, now = read_retailrocket(folder), datetime.now(UTC)
        events, catalog = check_interactions(batch.events.collect(), now), check_catalog(batch.catalog.collect(), now)
    print(f"{path.name}: {events.good.height} events used, {events.bad.height} set aside; {catalog.good['item_id'].n_unique()} items")
    return index_shop(events.good, catalog.good)


class Asked(NamedTuple):
    """The visitors of one cut and what they then bought."""

    cut: int           # ms
    user: np.ndarray   # int32 [n]
    truth: Outcomes    # every item bought in the window
    past: Histories    # all their events before the cut
    known: int         # items that were known at the cut


def asked_at(shop: ShopData, cut: int, days: float) -> Asked:
    """Every visitor with an event before the cut and a purchase in the window."""
    log, until = shop.log, cut + round(days * DAY)
    bought = (log.ts >= cut) & (log.ts < until) & (log.event == TRANSACTION) & (log.item >= 0)
    user = np.intersect1d(log.user[log.ts < cut], log.user[bought]).astype(np.int32)
    if not len(user): sys.exit(f"q2_purchases: nobody known before {moment(cut)} buys in the {days:g} days after it")
    asof = np.full(len(user), cut)
    past = histories(log, user, asof, len(log))
    return Asked(cut, user, relevant(outcomes(log, user, asof, until), 3), past, len(np.unique(log.before(cut).item)))


def moment(ms: int) -> datetime:
    """Milliseconds as a moment."""
    return datetime.fromtimestamp(ms / 1000, UTC)


def slices(shop: ShopData, a: Asked) -> dict[str, Outcomes]:
    """What is relevant in each slice; the first four are those of every cut, the rest is for all cuts together."""
    n_items = np.int64(len(shop.items))
    touched = np.repeat(np.arange(len(a.user)), a.past.lengths) * n_items + a.past.item
    new = ~np.isin(a.truth.request * n_items + a.truth.item, touched)
    parts = by_length(a.truth, a.past.lengths) | by_age(a.truth, shop.log, a.cut) | by_popularity(a.truth, shop.log, a.cut)
    return {"all": a.truth, "never touched before": part(a.truth, new)} | {n: parts[n] for n in sorted(parts, key=lambda n: n not in OF_EVERY_CUT)}


def ours(shop: ShopData, a: Asked, days: float, settings: Settings, quick: bool = False) -> np.ndarray:
    """The product's lists: trained on cutoffs before the cut, asked at it."""
    known = ShopData(shop.log.where(shop.log.ts < a.cut), shop.catalog, shop.users, shop.items)
    laid = cutoffs_before(known, moment(a.cut), days, settings, **({"most": 2} if quick else {}))
    bundle = make_bundle(known, a.cut, {"for_you": train_ranker(known, laid, settings)}, settings, {})
    h = histories(known.log, a.user, np.full(len(a.user), a.cut), bundle.max_history, bundle.moment.known)
    return rank(bundle.moment, bundle.ranker, bundle.reranker, h, 20).items


def drawn(user: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """How often each row is drawn, float32 [draws, rows]: visitors are resampled, with all their rows."""
    _, who = np.unique(user, return_inverse=True)
    n = who.max() + 1
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)[:, who].astype(np.float32)


def interval(values: np.ndarray) -> list[float]:
    """The middle 95% of the draws that have a value."""
    values = values[np.isfinite(values)]
    return [round(float(v), 4) for v in np.quantile(values, [0.025, 0.975])] if len(values) else []


def spread(items: np.ndarray, n_items: int, times: np.ndarray) -> dict:
    """Coverage and Gini of the first ten, with intervals (resampling repeats lists, so their middle lies a little below)."""
    first = items[:, :10]
    draws = [np.repeat(first, w.astype(int), axis=0) for w in times[:100]]
    out = {}
    for name, metric in (("coverage@10", coverage), ("gini@10", gini)):
        out[name], out[f"{name}_ci"] = round(metric(first, n_items), 4), interval(np.array([metric(d, n_items) for d in draws]))
    return out


def judged(lists: dict[str, np.ndarray], truth: Outcomes, user: np.ndarray, n_items: int, case: str, spreads: bool) -> list[dict]:
    """A row per system; the first system is compared with each of the others on the same draws."""
    want = wanted(truth)
    asked = want > 0
    if not asked.any(): return [{"system": "reco", "case": case, "metrics": {"visitors": 0}}]
    times, rows, first = drawn(user[asked]), [], None
    for system, items in lists.items():
        hit, metrics = hits(items, truth)[asked], {"visitors": int(asked.sum()), "purchases": len(truth.item)}
        for name, (metric, k) in PER_LIST.items():
            value = metric(hit[:, :k], want[asked])
            means = times @ value / times.sum(axis=1)
            metrics[name], metrics[f"{name}_ci"] = round(float(value.mean()), 4), interval(means)
            if name == "NDCG@10":
                first = first if rows else (value.mean(), means)
                if rows: metrics |= against(first, (value.mean(), means))
        rows.append({"system": system, "case": case, "metrics": metrics | (spread(items[asked], n_items, times) if spreads else {})})
    return rows


def against(first: tuple[float, np.ndarray], other: tuple[float, np.ndarray]) -> dict:
    """The paired ratio with its interval, and how often the first is ahead; no ratio to a peer that found nothing."""
    out = {"reco ahead": round(float((first[1] > other[1]).mean()), 3)}
    if other[0] > 0:
        with np.errstate(divide="ignore", invalid="ignore"): out["reco / this_ci"] = interval(first[1] / other[1])
        out["reco / this"] = round(first[0] / other[0], 3)
    return out


def tuned(shop: ShopData, cut: int, days: float, quick: bool, python: Path | None) -> dict[str, tuple[dict, bool]]:
    """Each peer's parameters and filter switch, chosen on the validation cut."""
    a = asked_at(shop, cut, days)
    judge = lambda lists: float(ndcg(hits(lists[:, :10], a.truth), wanted(a.truth)).mean())
    out = {}
    for name in [*PEERS, *(LIBRARY if python else ())]:
        parameters, new, value = tune(name, shop.log.before(cut), cut, a.user, judge, quick=quick, python=python)
        print(f"{name}: {parameters}{', without what they touched' if new else ''}; NDCG@10 {value:.4f} on validation, {moment(cut):%Y-%m-%d}")
        out[name] = parameters, new
    return out


def run(shop: ShopData, cuts: list[int], days: float, settings: Settings, quick: bool = False, python: Path | None = None) -> list[dict]:
    """All rows: per cut and slice, and all cuts together."""
    peers = tuned(shop, min(cuts) - round(days * DAY), days, quick, python)
    rows, together = [], []
    for cut in cuts:
        a, name = asked_at(shop, cut, days), f"{moment(cut):%Y-%m-%d}"
        lists = {"reco": ours(shop, a, days, settings, quick)}
        for peer, (parameters, new) in peers.items():
            [lists[peer]] = [x for _, left_out, x in lists_of(peer, shop.log.before(cut), cut, [parameters], a.user, 20, python) if left_out == new]
        parts = slices(shop, a)
        for which, truth in parts.items():
            if len(cuts) == 1 or which in OF_EVERY_CUT: rows += judged(lists, truth, a.user, a.known, f"{name} {which}", which == "all")
        together.append((a, lists, parts))
    if len(cuts) > 1: rows += pooled(together)
    return rows + [{"system": p, "case": "not measured: no --peers-python given", "metrics": {}} for p in LIBRARY if p not in peers]


def pooled(together: list[tuple[Asked, dict, dict]]) -> list[dict]:
    """The cuts laid end to end; a visitor of two cuts is drawn with both."""
    start = np.concatenate([[0], np.cumsum([len(a.user) for a, _, _ in together])])
    user = np.concatenate([a.user for a, _, _ in together])
    lists = {s: np.concatenate([x[s] for _, x, _ in together]) for s in together[0][1]}
    rows = []
    for which in together[0][2]:
        truths = [p[which] for _, _, p in together]
        truth = Outcomes(np.concatenate([t.request + s for t, s in zip(truths, start[:-1], strict=True)]), np.concatenate([t.item for t in truths]),
                         np.concatenate([t.grade for t in truths]), int(start[-1]))
        rows += judged(lists, truth, user, 0, f"all cuts {which}", False)
    return rows


def version_of(python: Path) -> str:
    """irspack's version in another environment."""
    ask = [python, "-c", "from importlib.metadata import version; print(version('irspack'))"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def main(argv: list[str] | None = None) -> None:
    """Read, tune the peers, train, judge."""
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--events", type=Path, help="a file in the format of RetailRocket's events.csv, perhaps gzipped")
    parser.add_argument("--cuts", "--cut", nargs="+", default=["2015-08-15", "2015-08-25", "2015-09-05"], help="days, UTC")
    parser.add_argument("--days", type=float, default=14, help="length of the window")
    parser.add_argument("--test-looks", type=int, default=1, help="how often these windows have been looked at, this time included")
    parser.add_argument("--peers-python", type=Path, help="Python of an environment with benchmarks/requirements-peers.txt, for irspack's models")
    args, settings = parser.parse_args(argv), load_settings()
    warnings.filterwarnings("ignore", category=UserWarning)  # the peers' own, about matrix formats
    if args.quick:
        end = datetime(2026, 5, 1, tzinfo=UTC)
        sim = simulate(500, 200, 10_000, days=90, end=end, seed=7)
        shop, cuts = index_shop(sim.interactions, sim.catalog), [epoch_ms(end - timedelta(days=d)) for d in (20, 14)]
        settings = quickly(settings)
    elif args.events:
        shop, cuts = read_events(args.events), sorted(epoch_ms(datetime.fromisoformat(c).replace(tzinfo=UTC)) for c in args.cuts)
    else: return print("q2_purchases: nothing measured; it needs --events with a file in the format of RetailRocket's events.csv")
    rows = run(shop, cuts, args.days, settings, args.quick, args.peers_python)
    others = {"irspack": version_of(args.peers_python)} if args.peers_python else {}
    write("q2_purchases", rows, args.results, args.test_looks, argv, others)
    if not args.quick: render()


if __name__ == "__main__": main()
