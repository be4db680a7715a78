"""Basket completion: of every later basket of at least two items, each item in turn is hidden and ranked from the rest.

What counts as a purchase is decided by the product's own reader and row checks. For Online Retail: cancellations (invoices with a C),
bad debts (A), stock corrections (quantity below 1), lines at no price and codes that are no goods (postage, bank charges, manual entries,
samples, gift vouchers) are left out, exact repeats of a line count once. A purchase has a customer or, where that is empty, its
invoice. An invoice is a basket; an item is in it once, in whatever quantity. The invoices of the website (those with a DOT line)
gather the orders of many unknown customers, so they are no baskets, neither for learning nor for asking. In other logs a basket is
an `order_id`, or a visit's carts and purchases where there are none. Baskets of more than 500 items are left out.

Everything of the peers and of ours is fitted on what lies before the cut, once: baskets after it are not learnt from, not even for later
ones. A hidden item that was never sold before the cut counts as a miss for all. What is in the rest of the basket is never
recommended. Lists that come out short are filled with the best sellers of the last 30 days before the cut.

Peers: the sum over the rest of the basket of how often each pair met (count), of its lift, of its cosine; implicit's BM25Recommender,
asked with the rest of the basket. Their parameters (least meetings, neighbours, K1, B) are tuned by Recall@10 on the 30 days before the cut.
Ours: the product's sources and features in front of a basket, and a LambdaMART trained on the baskets of windows before the cut, each with
sources fitted before it; the last window stops the training and decides, as in the product (`reco.ranking.orders`), whether the ranker
answers or the sources in their own order. Intervals are 95%, by bootstrap over baskets; `reco / this` is the ratio of Recall@10 on the
same draws.
"""

import argparse
import gzip
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numba import njit
from scipy.sparse import csr_matrix, diags

from benchmarks.base import arguments, render, write
from reco.candidates.base import top_k
from reco.candidates.pairs import Baskets, baskets
from reco.data.histories import TRANSACTION, EventLog, Histories, epoch_ms, histories
from reco.data.quality import check_catalog, check_interactions
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.sources import FILES, read_source
from reco.evaluation.metrics import hits, reciprocal_rank
from reco.moment import Moment, fit_moment, gap_ms
from reco.ranking.lambdamart import Ranker
from reco.ranking.orders import Order, fit_if_ahead, proposers
from reco.ranking.surfaces import Questions, bought_together, context_rows, surface_examples
from reco.settings import Settings, load_settings

K, DAY, DRAWS, CHUNK = 10, 86_400_000, 1_000, 2_000
SURFACE = "bought_together"
NAMES = {"retailrocket": "events", "files": "interactions", "simulator": "interactions"}  # source → stem that its reader looks for


def read_events(path: Path, source: str) -> ShopData:
    """One file of a known format, perhaps gzipped, with the catalogue of its folder when there is one; rows that fail a check are set aside."""
    stem = NAMES.get(source)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        if stem is None: (folder / path.name).symlink_to(path.resolve())
        elif path.suffix == ".gz":
            with gzip.open(path) as packed, (folder / f"{stem}.csv").open("wb") as out: shutil.copyfileobj(packed, out)
        else: (folder / f"{stem}{path.suffix}").symlink_to(path.resolve())
        if stem:
            for p in path.parent.glob("catalog.*"): (folder / p.name).symlink_to(p.resolve())
        batch, now = read_source(source, folder), datetime.now(UTC)
        events, catalog = check_interactions(batch.events.collect(), now), check_catalog(batch.catalog.collect(), now)
    print(f"{path.name}: {events.good.height} events used, {events.bad.height} set aside; {catalog.good['item_id'].n_unique()} items")
    return index_shop(events.good, catalog.good)


# Peers


@njit(cache=True, nogil=True)
def summed(context_indptr, context_item, indptr, index, value, n_items, k):
    """The `k` items with the largest sum over each context, the context left out; int32 [n, k], -1 where there are fewer."""
    out, total = np.full((len(context_indptr) - 1, k), -1, np.int32), np.zeros(n_items, np.float32)
    touched = np.empty(n_items, np.int32)
    for i in range(len(context_indptr) - 1):
        rest, n = context_item[context_indptr[i] : context_indptr[i + 1]], 0
        for j in rest:
            for p in range(indptr[j], indptr[j + 1]):
                if total[index[p]] == 0:
                    touched[n] = index[p]
                    n += 1
                total[index[p]] += value[p]
        total[rest] = 0
        there = touched[:n][total[touched[:n]] > 0]
        found, _ = top_k(there, total[there], k)
        out[i, : len(found)] = found
        total[touched[:n]] = 0
    return out


def as_matrix(b: Baskets, n_items: int) -> csr_matrix:
    """Baskets × items, ones."""
    return csr_matrix((np.ones(len(b.item), np.float32), b.item, b.indptr), shape=(len(b), n_items))


def nearest(pairs: csr_matrix, neighbours: int) -> csr_matrix:
    """Each row's largest entries, ties to the lower index."""
    rows = np.repeat(np.arange(pairs.shape[0]), np.diff(pairs.indptr))
    order = np.lexsort((pairs.indices, -pairs.data, rows))
    place = np.arange(len(order)) - pairs.indptr[rows[order]]
    keep = np.sort(order[place < neighbours])
    return csr_matrix((pairs.data[keep], (rows[keep], pairs.indices[keep])), shape=pairs.shape)


def met(b: Baskets, n_items: int) -> tuple[csr_matrix, np.ndarray]:
    """How often each pair of items met, without the diagonal, and how often each item was in a basket."""
    x = as_matrix(b, n_items)
    pairs, size = (x.T @ x).tocsr(), np.maximum(np.asarray(x.sum(axis=0)).ravel(), 1)
    pairs.setdiag(0)
    pairs.eliminate_zeros()
    return pairs, size


Lists = Callable[[Histories], np.ndarray]  # contexts → int32 [n, K]


def from_pairs(pairs: csr_matrix) -> Lists:
    """Lists by sums over a table of pairs."""
    table = pairs.indptr.astype(np.int64), pairs.indices.astype(np.int32), pairs.data.astype(np.float32)
    return lambda context: summed(context.indptr, context.item, *table, pairs.shape[0], K)


def count(b: Baskets, n_items: int) -> Lists:
    """How often the pair met."""
    return from_pairs(met(b, n_items)[0])


def lift(b: Baskets, n_items: int, least: int) -> Lists:
    """Meetings over those expected by chance, for pairs that met often enough."""
    pairs, size = met(b, n_items)
    pairs.data[pairs.data < least] = 0
    pairs.eliminate_zeros()
    return from_pairs((diags(1 / size) @ pairs @ diags(1 / size)).tocsr() * np.float32(len(b)))


def cosine(b: Baskets, n_items: int, neighbours: int) -> Lists:
    """Cosine of the two items' baskets."""
    pairs, size = met(b, n_items)
    return from_pairs(nearest((diags(size**-0.5) @ pairs @ diags(size**-0.5)).tocsr(), neighbours))


def bm25(b: Baskets, n_items: int, neighbours: int, k1: float, lengths: float) -> Lists:
    """implicit's BM25Recommender with baskets in the place of users, asked with the rest of each basket."""
    from implicit.nearest_neighbours import BM25Recommender

    model = BM25Recommender(K=neighbours, K1=k1, B=lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about matrix formats, from inside implicit
        model.fit(as_matrix(b, n_items), show_progress=False)

    def lists(context: Histories) -> np.ndarray:
        rows = csr_matrix((np.ones(len(context.item), np.float32), context.item, context.indptr), shape=(len(context), n_items))
        items, scores = model.recommend(np.arange(len(context)), rows, N=K, filter_already_liked_items=True)
        return np.where(scores > 0, items, -1).astype(np.int32)

    return lists


PEERS: dict[str, tuple[Callable[..., Lists], list[dict]]] = {
    "co-occurrence count": (count, [{}]),
    "lift": (lift, [{"least": m} for m in (1, 3, 10, 30, 100)]),
    "cosine": (cosine, [{"neighbours": n} for n in (20, 50, 100, 300, 1_000_000)]),
    "implicit BM25": (bm25, [{"neighbours": n, "k1": k, "lengths": b} for n in (50, 100, 300, 1_000) for k in (0.2, 1.2, 5) for b in (0.25, 0.75)]),
}


# Ours


def by_source(q: Questions, moment: Moment) -> np.ndarray:
    """What the co-purchase source proposes, in its own order."""
    return np.concatenate([moment.sources["copurchase"].retrieve(q.part(a, a + CHUNK).context, K).items for a in range(0, len(q), CHUNK)])


def ranked(q: Questions, log: EventLog, moment: Moment, ranker: Ranker | None, order: Order, max_history: int) -> np.ndarray:
    """The product's lists, in chunks that fit in memory."""
    out = np.full((len(q), K), -1, np.int32)
    for a in range(0, len(q), CHUNK):
        some = q.part(a, a + CHUNK)
        h = histories(log, some.user, some.asof, max_history, moment.known)
        c, rows, _ = context_rows(moment, h, some.context, SURFACE)
        best = np.lexsort((c.item, -(ranker.margin(rows) if ranker else order.log_odds(c)), c.request))
        place = np.arange(len(best)) - c.indptr[c.request[best]]
        top = best[place < K]
        out[a + c.request[top], place[place < K]] = c.item[top]
    return out


def train(shop: ShopData, cut: int, settings: Settings) -> tuple[Ranker | None, Order]:
    """LambdaMART on the baskets of the windows before the cut, where the last window says that it is ahead, and the sources' own order."""
    t, parts = settings.train, []
    window = round(t.horizon_days * DAY)
    for i in range(1, t.cutoffs + 1):
        start = cut - i * window
        if start <= shop.log.ts.min() + window: break
        moment = fit_moment(shop, start, settings)
        q = bought_together(shop.log, start, start + window, moment.gap_ms, at_most=t.max_requests, seed=settings.project.seed)
        parts.append(surface_examples(shop.log, moment, q, SURFACE, t.max_history))
    parts = [p for p in parts if len(p.sizes)]
    if len(parts) < 2: return None, Order()
    validation, first, *more = parts
    for part in more: first = first + part
    quotas = {name: q.quota for name, q in settings.candidates.items() if q.quota}
    ranker, choice = fit_if_ahead(first, validation, proposers(quotas, SURFACE), settings.ranking, settings.project.seed)
    print(f"{len(first.sizes)} training lists: {choice}")
    return ranker, choice.order


# The table


def filled(items: np.ndarray, context: Histories, popular: np.ndarray) -> np.ndarray:
    """Best sellers in the empty places, none twice and none of the context."""
    out = items.copy()
    for i in np.flatnonzero((out < 0).any(axis=1)):
        own, rest = out[i][out[i] >= 0], context.item[context.indptr[i] : context.indptr[i + 1]]
        more = popular[: len(rest) + 2 * K]
        both = np.concatenate([own, more[~np.isin(more, np.concatenate([own, rest]))]])[:K]
        out[i, : len(both)] = both
    return out


def best_sellers(log: EventLog, cut: int) -> np.ndarray:
    """Items by purchases in the 30 days before the cut, ties to the lower index."""
    recent = log.where((log.ts >= cut - 30 * DAY) & (log.ts < cut) & (log.item >= 0) & (log.event == TRANSACTION))
    sold = np.bincount(recent.item, minlength=log.n_items)
    return np.lexsort((np.arange(log.n_items), -sold))[: (sold > 0).sum()].astype(np.int32)


def found(items: np.ndarray, q: Questions) -> dict[str, np.ndarray]:
    """Both metrics of each question."""
    hit = hits(items, q.truth) > 0
    return {"Recall@10": hit.any(axis=1).astype(float), "MRR@10": reciprocal_rank(hit, np.ones(len(q)))}


def rows_of(lists: dict[str, np.ndarray], q: Questions, keep: np.ndarray, case: str) -> list[dict]:
    """A row per system over some of the questions; intervals by bootstrap over baskets."""
    if not keep.any(): return []
    _, group = np.unique(q.group[keep], return_inverse=True)
    n = group.max() + 1
    times, size = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float32), np.bincount(group)
    rows, ours = [], None
    for system, items in lists.items():
        metrics = {"baskets": int(n), "instances": int(keep.sum())}
        for name, value in found(items, q).items():
            draws = (times @ np.bincount(group, value[keep], n)) / (times @ size)
            metrics[name] = round(float(value[keep].mean()), 4)
            metrics[f"{name}_ci"] = [round(float(v), 4) for v in np.quantile(draws, [0.025, 0.975])]
            if name != "Recall@10": continue
            if ours is None: ours = draws
            elif draws.min() > 0:
                metrics["reco / this"] = round(float(np.mean(ours) / np.mean(draws)), 3)
                metrics["reco / this_ci"] = [round(float(v), 3) for v in np.quantile(ours / draws, [0.025, 0.975])]
        rows.append({"system": system, "case": case, "metrics": metrics})
    return rows


def tuned(make: Callable[..., Lists], grid: list[dict], shop: ShopData, cut: int, gap: int) -> dict:
    """The parameters with the best Recall@10 on the 30 days before the cut."""
    if len(grid) == 1: return grid[0]
    start = cut - 30 * DAY
    b, popular = baskets(shop.log.before(start), gap), best_sellers(shop.log, start)
    q = bought_together(shop.log, start, cut, gap, at_most=5_000)
    return max(grid, key=lambda p: found(filled(make(b, shop.log.n_items, **p)(q.context), q.context, popular), q)["Recall@10"].mean())


def compare(shop: ShopData, cut: int, until: int, settings: Settings, quick: bool) -> list[dict]:
    """All systems on all baskets between the two moments."""
    gap = gap_ms(settings)
    q = bought_together(shop.log, cut, until, gap, per_basket=None)
    if not len(q): sys.exit(f"q3_baskets: no basket of two items from {np.datetime64(cut, 'ms')} on")
    known = ShopData(shop.log.where(shop.log.ts < cut), shop.catalog, shop.users, shop.items)
    learned, moment, popular = train(known, cut, settings), fit_moment(known, cut, settings), best_sellers(known.log, cut)
    lists = {"reco": ranked(q, known.log, moment, *learned, settings.train.max_history), "reco, co-purchase alone": by_source(q, moment)}
    b = baskets(known.log.before(cut), gap)
    for name, (make, grid) in PEERS.items():
        parameters = tuned(make, grid[:1] if quick else grid, known, cut, gap)
        label = ", ".join(f"{k} {v}" for k, v in parameters.items() if v < 1_000_000)
        lists[f"{name} ({label})" if label else name] = make(b, known.log.n_items, **parameters)(q.context)
    lists = {name: filled(items, q.context, popular) for name, items in lists.items()}
    past = histories(known.log, q.user, q.asof, 1, moment.known).lengths > 0
    size = q.context.lengths + 1
    cases = {"all": size > 0, "up to 5 items": size <= 5, "more than 30 items": size > 30, "known shopper": past, "shopper without a past": ~past}
    return [row for case, keep in cases.items() for row in rows_of(lists, q, keep, case)]


def moment_of(text: str) -> int:
    """A day or moment (UTC without a zone) in ms."""
    try: parsed = datetime.fromisoformat(text)
    except ValueError as e: raise argparse.ArgumentTypeError(f"{text!r} is no date: {e}") from None
    return epoch_ms(parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC))


def main(argv: list[str] | None = None) -> None:
    """Read, train, judge."""
    parser = arguments(__doc__.partition("\n\n")[0])
    parser.add_argument("--events", type=Path, help="file of purchases; without it nothing is measured")
    parser.add_argument("--source", choices=FILES, default="online_retail", help="the file's format")
    parser.add_argument("--cut", type=moment_of, help="baskets from here on are the test; default: 39 days before the end")
    parser.add_argument("--until", type=moment_of, help="and before here; default: the end")
    parser.add_argument("--test-looks", type=int, default=1, help="how often this test part has been looked at, this time included")
    args, settings = parser.parse_args(argv), load_settings()
    if args.quick:
        sim = simulate(1_000, 120, 40_000, days=90, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7)
        shop = index_shop(sim.interactions, sim.catalog)
    elif args.events: shop = read_events(args.events, args.source)
    else: return print("q3_baskets: nothing measured; it needs --events with a file of purchases, and --source for its format")
    end = int(shop.log.ts.max()) + 1
    cut, until = args.cut or end - 39 * DAY, args.until or end
    write("q3_baskets", compare(shop, cut, until, settings, args.quick), args.results, args.test_looks, argv)
    if not args.quick: render()


if __name__ == "__main__": main()
