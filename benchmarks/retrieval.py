"""What each candidate source finds, and what the union would lose without it, before any ranking: Recommended for You.

The requests are the product's own (a shopper who comes back, a shopper in the middle of a visit), asked at the cutoffs that the training
uses; the hold-out is not touched. Relevant is what the shopper then touched within the horizon, the part of it that he had never touched
before, or what he bought. Recall@k is the share of it among a source's first k, `Recall@quota` among as many as the settings let it
propose. The union is cut by reciprocal-rank fusion; uncut, it is what the ranker sees. `without it` is the recall of the union when one
source is switched off, `adds` the difference on the same requests, with a 95% interval by bootstrap over shoppers. `share` is the share
of the union's candidates that the source proposed, `alone` that only it proposed, `hits per 1,000` what comes of a thousand of those that
only it proposed (of all, for the union). Sources that are off are measured as extras with 30 places: what they would add to the union.
An item that nobody knew at the cutoff cannot be found: `every known item` is the ceiling. `retrieve_ms` and `score_ms` are medians
of single requests on one thread: finding its own candidates, and scoring all of the union's.

A source that adds no recall may still earn its place by what its scores tell the ranker; this table does not say.
"""

import argparse
import sys
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.base import arguments, quickly, render, write
from benchmarks.q3_baskets import read_events
from benchmarks.slices import part
from reco.candidates.base import Candidates, merge, score_all
from reco.data.histories import TRANSACTION, Histories, epoch_ms, histories
from reco.data.raw_shop import read_shop
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.sources import FILES
from reco.data.split import requests_at, split_in_time, who_and_when
from reco.evaluation.backtest import bootstrap_means
from reco.evaluation.metrics import relevant
from reco.moment import Moment, fit_moment
from reco.ranking.examples import Outcomes, outcomes
from reco.settings import Quota, Settings, load_settings

KS = 20, 50, 100
EXTRA = 30    # places of a source that the settings leave off
TIMED = 200   # single requests
CASES = "touched", "touched for the first time", "bought"


class Found(NamedTuple):
    """Where the relevant items of n requests were found: a row per request and relevant item."""

    request: np.ndarray   # int64 [rows]
    user: np.ndarray      # int32 [n]
    known: np.ndarray     # bool [rows], known at the cutoff
    place: np.ndarray     # float32 [rows, sources] among as many as its quota, NaN where not found
    deep: np.ndarray      # float32 [rows, sources] among the first `KS[-1]`
    union: np.ndarray     # float32 [rows] in the fused union of the sources that are on
    size: np.ndarray      # int64 [sources + 1] candidates of each source, and of the union of those that are on
    alone: np.ndarray     # int64 [sources], of those, candidates that no other source proposed


def with_extras(settings: Settings) -> tuple[Settings, list[str]]:
    """The settings with every built-in source switched on, and the names of those that were off."""
    extras = [n for n, q in settings.candidates.items() if not q.quota]
    return settings.model_copy(update={"candidates": settings.candidates | {n: Quota(quota=EXTRA, cls=settings.candidates[n].cls) for n in extras}}), extras


def looked_up(c: Candidates, values: np.ndarray, truth: Outcomes, n_items: int) -> np.ndarray:
    """The row of `values` of each relevant item, NaN where it is no candidate."""
    key = c.request * np.int64(n_items) + c.item
    wanted = truth.request * np.int64(n_items) + truth.item
    at = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
    there = key[at] == wanted
    return np.where(there[:, None] if values.ndim > 1 else there, values[at], np.nan)


def fused_places(c: Candidates) -> np.ndarray:
    """The place of each candidate by reciprocal-rank fusion (Cormack et al. 2009), 0 is best, ties to the lower index."""
    fused = np.nansum(1 / (60 + c.ranks.astype(np.float64)), axis=1)
    order = np.lexsort((c.item, -fused, c.request))
    place = np.empty(len(order), np.float32)
    place[order] = np.arange(len(order)) - c.indptr[:-1].repeat(np.diff(c.indptr))
    return place


def some(c: Candidates, on: np.ndarray) -> Candidates:
    """The candidates of some sources (`on`: bool, one per source)."""
    keep = ~np.isnan(c.ranks[:, on]).all(axis=1)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(c.request[keep], minlength=len(c)))])
    return Candidates(indptr, c.item[keep], c.ranks[keep][:, on], c.scores[keep][:, on], tuple(np.array(c.sources)[on]))


def asked_for(shop: ShopData, at: datetime, until: datetime, case: str, most: int, seed: int) -> tuple[np.ndarray, np.ndarray, Outcomes]:
    """Shoppers, moments (ms) and what is relevant: at most so many requests that have an answer."""
    requests = requests_at(shop.events, at, until, seed)
    user, asof = who_and_when(requests)
    truth = relevant(outcomes(shop.log, user, asof, epoch_ms(until)), 3 if case == "bought" else 1)
    if case == CASES[1]:
        past, n_items = histories(shop.log, user, asof, len(shop.log)), np.int64(len(shop.items))
        touched = np.repeat(np.arange(len(user)), past.lengths) * n_items + past.item
        truth = part(truth, ~np.isin(truth.request * n_items + truth.item, touched))
    answered = np.unique(truth.request)
    kept = answered[np.random.default_rng(seed).permutation(len(answered)) < most]
    inside = np.isin(truth.request, kept)
    return user[kept], asof[kept], Outcomes(np.searchsorted(kept, truth.request[inside]), truth.item[inside], truth.grade[inside], len(kept))


def found_at(moment: Moment, user: np.ndarray, h: Histories, truth: Outcomes, on: np.ndarray) -> Found:
    """Ask every source and look up what was relevant."""
    n_items = len(moment.known)
    c = merge({n: s.retrieve(h, moment.quotas[n]) for n, s in moment.sources.items()})
    deep = merge({n: s.retrieve(h, KS[-1]) for n, s in moment.sources.items()})
    union, proposed = some(c, on), ~np.isnan(c.ranks)
    others = (proposed & on).sum(axis=1)[:, None] - (proposed & on)  # sources of the union that proposed it too
    size = np.append(proposed.sum(axis=0), len(union.item))
    return Found(truth.request, user, moment.known[truth.item], looked_up(c, c.ranks, truth, n_items), looked_up(deep, deep.ranks, truth, n_items),
                 looked_up(union, fused_places(union), truth, n_items), size, (proposed & (others == 0)).sum(axis=0))


def together(parts: list[Found]) -> Found:
    """Several cutoffs laid end to end; a shopper of two is one shopper."""
    start = np.cumsum([0] + [len(f.user) for f in parts])
    request = np.concatenate([f.request + s for f, s in zip(parts, start, strict=False)])
    cat = lambda name: np.concatenate([getattr(f, name) for f in parts])
    return Found(request, cat("user"), cat("known"), cat("place"), cat("deep"), cat("union"), sum(f.size for f in parts), sum(f.alone for f in parts))


def recalls(f: Found, found: np.ndarray) -> np.ndarray:
    """Share of each request's relevant items that are found (`found`: bool [rows, columns]), float64 [n, columns]."""
    total = np.stack([np.bincount(f.request, column, len(f.user)) for column in found.T.astype(np.float64)], axis=1)
    return total / np.bincount(f.request, minlength=len(f.user))[:, None]


def interval(draws: np.ndarray) -> list[float]:
    """The middle 95%; a difference of nothing has no sign."""
    return [max(round(float(v), 4), 0.0) for v in np.quantile(draws, [0.025, 0.975])]


def rows_of(f: Found, names: list[str], on: np.ndarray, quotas: dict[str, int], case: str) -> list[dict]:
    """The union, every source, and the ceiling."""
    n, here = len(f.user), ~np.isnan(f.place)
    union = ~np.isnan(f.union)
    without = np.stack([(here & on)[:, np.arange(len(names)) != j].any(axis=1) for j in range(len(names))], axis=1)
    with_it = here | union[:, None]  # the union and an extra
    recall = recalls(f, np.column_stack([union, here, without, with_it]))
    draws, mean, m = bootstrap_means(recall, f.user), recall.mean(axis=0), len(names)
    at_k = lambda place: {f"Recall@{k}": round(float(recalls(f, (place < k)[:, None]).mean()), 4) for k in KS}
    rows = [{"system": "union", "case": case, "metrics": {
        "requests": n, **at_k(f.union), "Recall@quota": round(mean[0], 4), "Recall@quota_ci": interval(draws[:, 0]),
        "quota": sum(q for name, q in quotas.items() if on[names.index(name)]), "candidates": round(f.size[-1] / n, 1), "hits per 1,000": per_mille(union.sum(), f.size[-1])}}]
    for j, name in enumerate(names):
        less, more = (1 + m + j, 0) if on[j] else (0, 1 + 2 * m + j)
        alone = here[:, j] & ~(here & on)[:, np.arange(m) != j].any(axis=1)
        whole = f.size[-1] + (0 if on[j] else f.alone[j])
        rows.append({"system": name if on[j] else f"{name} (off, as an extra)", "case": case, "metrics": {
            "requests": n, **at_k(f.deep[:, j]), "Recall@quota": round(mean[1 + j], 4), "Recall@quota_ci": interval(draws[:, 1 + j]),
            "quota": quotas[name], "candidates": round(f.size[j] / n, 1), "hits per 1,000": per_mille(alone.sum(), f.alone[j]),
            "without it": round(mean[less], 4), "adds": max(round(mean[more] - mean[less], 4), 0.0),
            "adds_ci": interval(draws[:, more] - draws[:, less]), "share": round(f.size[j] / whole, 3), "alone": round(f.alone[j] / whole, 3)}})
    known = float(recalls(f, f.known[:, None]).mean())
    return rows + [{"system": "every known item", "case": case, "metrics": {"requests": n, "Recall@quota": round(known, 4)}}]


def per_mille(hits: int, candidates: int) -> float:
    """Relevant items in a thousand candidates."""
    return round(1_000 * float(hits) / max(int(candidates), 1), 2)


def milliseconds(moment: Moment, h: Histories, on: np.ndarray) -> dict[str, dict[str, float]]:
    """Medians of single requests by source; the union's is what the sources that are on take together, with the merge."""
    names, spent = np.array(list(moment.sources)), []
    for i in range(-5, min(TIMED, len(h))):  # five to warm up
        one, found, row = h.take(max(i, 0)), {}, []
        for name, source in moment.sources.items():
            start = perf_counter()
            found[name] = source.retrieve(one, moment.quotas[name])
            row.append(perf_counter() - start)
        start = perf_counter()
        c = merge({n: found[n] for n in names[on]})
        row.append(sum(t for t, used in zip(row, on, strict=True) if used) + perf_counter() - start)
        for source in moment.sources.values():
            start = perf_counter()
            if getattr(source, "scores", {}): source.score(one, c.indptr, c.item)
            row.append(perf_counter() - start)
        start = perf_counter()
        score_all({n: moment.sources[n] for n in names[on]}, one, c)
        row.append(perf_counter() - start)
        if i >= 0: spent.append(row)
    ms = 1_000 * np.median(spent, axis=0).reshape(2, -1)
    return {n: {"retrieve_ms": round(float(a), 3), "score_ms": round(float(b), 3)} for n, a, b in zip([*names, "union"], *ms, strict=True)}


def measured(shop: ShopData, settings: Settings, name: str, most: int, empty_holdout: bool) -> list[dict]:
    """All rows of one data set, over all cutoffs before its hold-out."""
    wide, extras = with_extras(settings)
    t, seed = settings.train, settings.project.seed
    cuts = split_in_time(shop.start, shop.end, t.horizon_days, 0 if empty_holdout else t.holdout_days, t.cutoffs, t.cutoff_step_days)
    cases = CASES if (shop.log.event != TRANSACTION).any() else CASES[:2]  # in a log of purchases, touched is bought
    found, ms = {c: [] for c in cases}, {}
    for at in (*cuts.train, cuts.validation):
        moment = fit_moment(shop, epoch_ms(at), wide)
        names = list(moment.sources)
        on = np.array([n not in extras for n in names])
        for case in cases:
            user, asof, truth = asked_for(shop, at, cuts.label_end(at), case, most, seed)
            if not len(user): continue
            h = histories(shop.log, user, asof, t.max_history, moment.known)
            found[case].append(found_at(moment, user, h, truth, on))
            if at == cuts.validation and case == cases[0]:
                with threadpool_limits(1): ms = milliseconds(moment, h, on)
    rows = [r for case in cases if found[case] for r in rows_of(together(found[case]), names, on, moment.quotas, f"{name}, {case}")]
    for r in rows:
        if r["case"] == f"{name}, {cases[0]}": r["metrics"] |= ms.get(r["system"].partition(" (")[0], {})
    print(f"{name}: {len(cuts.train) + 1} cutoffs, {cuts.train[0]:%Y-%m-%d} to {cuts.validation:%Y-%m-%d}, each with {t.horizon_days} days after it")
    return rows


def read(source: str, path: Path, until: str | None, settings: Settings) -> ShopData:
    """A folder or a single file of a known format, nothing of it at or after a day."""
    shop = read_shop(source, path, settings) if path.is_dir() else read_events(path, source)
    if until is None: return shop
    end = datetime.fromisoformat(until).replace(tzinfo=UTC)
    events = shop.events.filter(shop.events["ts"] < end)
    if not events.height: sys.exit(f"retrieval: {path} has no events before {until}")
    return ShopData(shop.log.where(shop.log.ts < epoch_ms(end)), shop.catalog, shop.users, shop.items)


def main(argv: list[str] | None = None) -> None:
    """Read each data set, ask the sources at its cutoffs."""
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", choices=FILES, nargs="+", default=["retailrocket"], help="the format of each path")
    parser.add_argument("--path", type=Path, nargs="*", default=[], help="folders of raw files, or single files; one or several data sets")
    parser.add_argument("--until", nargs="*", default=[],
                        help="for each path, a day (UTC) from which on nothing is read, or -: then the last days are kept as hold-out. "
                             "With a day there is no hold-out, the last window ends on that day")
    parser.add_argument("--simulator", action="store_true", help="the simulator's default shop too")
    parser.add_argument("--requests", type=int, default=1_500, help="requests per cutoff and case, at most")
    args, settings = parser.parse_args(argv), load_settings()
    rows = []
    if args.quick:
        sim, settings = simulate(500, 200, 10_000, days=90, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7), quickly(settings)
        rows = measured(index_shop(sim.interactions, sim.catalog), settings, "simulator, small", 100, False)
    elif not args.path and not args.simulator: return print("retrieval: nothing measured; it needs --path with raw files and --source for their format, or --simulator")
    elif args.path and len(args.source) != len(args.path): parser.error(f"{len(args.path)} paths and {len(args.source)} sources")
    elif len(args.until) > len(args.path): parser.error(f"{len(args.until)} days in --until and {len(args.path)} paths")
    for source, path, until in zip_longest(args.source[: len(args.path)], args.path, args.until) if not args.quick else ():
        day = None if until in (None, "-") else until
        rows += measured(read(source, path, day, settings), settings, path.name.partition(".")[0], args.requests, day is not None)
    if args.simulator and not args.quick:
        s = settings.simulator
        sim = simulate(s.users, s.items, s.events, days=s.days, end=datetime(2026, 5, 1, tzinfo=UTC), seed=settings.project.seed)
        rows += measured(index_shop(sim.interactions, sim.catalog), settings, "simulator", args.requests, False)
    write("retrieval", rows, args.results, argv=argv)
    if not args.quick: render()


if __name__ == "__main__": main()
