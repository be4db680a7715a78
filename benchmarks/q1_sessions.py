"""Q1: the next item of a session. Train on sessions, rank all items given the beginning of a later one.

`--train` is a table (csv, csv.gz or parquet) with `session` and `item`, in the order in which it happened, and `ts` (unix seconds) where
there are times; without them the sessions are spread evenly over 90 days. `--test` has `prefix` (items with blanks between) and `target`.
Items of the prefix may be recommended, as in the session-based literature. Both stages are the product's with its default settings;
the ranker learns from the beginnings of the last sessions of train, from sources fitted on what came before them, and the number of trees is
chosen on the very last ones. Peers: implicit's models, popularity, sequential rules (Ludewig and Jannach 2018) and STAN (Garg et al. 2019)
as their papers describe them, STAN's parameters chosen on the same last sessions of train.
"""

import sys
import time
from collections import defaultdict
from math import exp
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.base import arguments, percentiles, quickly, render, write
from reco.data.histories import VIEW, EventLog, Histories, histories
from reco.data.shop import ShopData
from reco.data.split import REQUESTS
from reco.ids import IdMap
from reco.moment import Moment, fit_moment, ranker_rows
from reco.ranking.choosing import fit_chosen
from reco.ranking.examples import make_examples, next_touches
from reco.ranking.lambdamart import Ranker
from reco.schemas import CATALOG, TS
from reco.settings import Settings, load_settings

DAY, SPAN_DAYS, MISSED = 86_400_000, 90, 10**9
PARTS = "session kNN alone", "retrieval and features", "scoring", "scoring by LightGBM's predict"


def read_table(path: Path) -> pl.DataFrame:
    """A table from csv, csv.gz or parquet."""
    return pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema_length=10_000)


def sessions_of(table: pl.DataFrame, name: str) -> pl.DataFrame:
    """`session` (numbered in order), `item` (text) and `ts` (ms), in order; raises `SystemExit` for missing columns."""
    if missing := sorted({"session", "item"} - set(table.columns)): sys.exit(f"{name}: missing columns {missing}, found {table.columns}")
    first = table["session"].unique(maintain_order=True)
    number = pl.DataFrame({"session": first, "n": np.arange(len(first), dtype=np.int64)})
    table = table.join(number, on="session", how="left", maintain_order="left")
    if "ts" in table.columns: ts = pl.col("ts")*1_000
    else: ts = pl.col("n")*(SPAN_DAYS*DAY//len(first)) + pl.int_range(pl.len()).over("n")*60_000
    return table.select(session="n", item=pl.col("item").cast(pl.String), ts=ts.cast(pl.Int64)).sort("session", maintain_order=True)


def shop_of(sessions: pl.DataFrame) -> ShopData:
    """Each session is a shopper who is never seen again."""
    items = IdMap(sessions["item"])
    users = IdMap(sessions["session"].unique(maintain_order=True).cast(pl.String).str.zfill(12))
    log = EventLog(sessions["session"].to_numpy().astype(np.int32), items.index(sessions["item"]), np.full(sessions.height, VIEW, np.int8),
                   sessions["ts"].to_numpy(), len(users), len(items))
    return ShopData(log, CATALOG.empty(), users, items)


def prefixes_of(test: pl.DataFrame, items: IdMap, begin: int, until: int) -> tuple[Histories, np.ndarray]:
    """The test's prefixes as pasts that end one after the other in [begin, until) (ms), and the targets (-1 for unknown items)."""
    parts = test["prefix"].cast(pl.String).str.split(" ")
    length = parts.list.len().to_numpy().astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(length)])
    item = items.index(parts.explode(empty_as_null=True))
    ago = np.repeat(indptr[1:], length) - np.arange(len(item))  # events before the request
    keep = item >= 0
    known = np.concatenate([[0], np.cumsum(np.bincount(np.repeat(np.arange(len(length)), length)[keep], minlength=len(length)))])
    asof = begin + (until - begin)*np.arange(len(length), dtype=np.int64)//max(len(length), 1)
    h = Histories(known, item[keep], np.full(keep.sum(), VIEW, np.int8), (np.repeat(asof, length) - 60_000*ago)[keep], asof)
    return h, items.index(test["target"].cast(pl.String))


def cut_at(sessions: pl.DataFrame, last: int) -> list[int]:
    """Moments (ms) before which to fit, newest first: each is followed by as many sessions as the test has."""
    start = sessions.group_by("session", maintain_order=True).first()["ts"].to_numpy()
    return [int(start[len(start) - last*(j + 1)]) for j in range(4) if len(start) - last*(j + 1) > len(start)//2]


def requests_in(shop: ShopData, begin: int, until: int, shortest: int, at_most: int, seed: int) -> pl.DataFrame:
    """Moments inside the sessions that began in [begin, until), after at least `shortest` items, `at_most` drawn evenly; REQUESTS."""
    log = shop.log
    first = np.flatnonzero(np.diff(log.user, prepend=-1))
    place = np.arange(len(log)) - np.repeat(first, np.diff(np.append(first, len(log))))
    began = np.repeat(log.ts[first], np.diff(np.append(first, len(log))))
    at = np.flatnonzero((began >= begin) & (began < until) & (place >= shortest))
    at = np.sort(np.random.default_rng(seed).permutation(at)[:at_most])
    return pl.DataFrame({"user_idx": log.user[at], "asof": pl.Series(log.ts[at]).cast(TS), "kind": ["visit"]*len(at)}).cast(REQUESTS)


def train(shop: ShopData, cuts: list[int], shortest: int, at_most: int, settings: Settings) -> Ranker:
    """Learn from the sessions after the older cuts, stop by those after the newest."""
    ends, parts = [int(shop.log.ts.max()) + 1, *cuts[:-1]], []
    for cut, end in zip(cuts, ends, strict=True):
        asked = requests_in(shop, cut, end, shortest, at_most, settings.project.seed)
        parts.append(make_examples(shop.log, fit_moment(shop, cut, settings), asked, end, settings.train.max_history, only_next=True))
    validation, first, *more = parts
    for part in more: first = first + part
    return fit_chosen(first, validation, settings.ranking, settings.project.seed)


def place_of(items: np.ndarray, scores: np.ndarray, target: int) -> int:
    """How many items come before the target; ties to the lower index; far away when it is not among them."""
    mine = scores[items == target]
    return int(((scores > mine[0]) | ((scores == mine[0]) & (items < target))).sum()) if len(mine) else MISSED


def two_stage(moment: Moment, ranker: Ranker, h: Histories, target: np.ndarray, block: int = 1_000) -> np.ndarray:
    """The product's place of each target."""
    places = []
    for a in range(0, len(h), block):
        part = take(h, a, min(a + block, len(h)))
        c, rows = ranker_rows(moment, part)
        margin = ranker.margin(rows)
        places += [place_of(c.item[s:e], margin[s:e], t) for s, e, t in zip(c.indptr, c.indptr[1:], target[a:a + block], strict=False)]
    return np.array(places)


def take(h: Histories, a: int, b: int) -> Histories:
    """Requests a to b of a batch."""
    at = slice(h.indptr[a], h.indptr[b])
    return Histories(h.indptr[a:b + 1] - h.indptr[a], h.item[at], h.event[at], h.ts[at], h.asof[a:b])


class SequentialRules:
    """What came after the last item, nearer counting more."""

    def __init__(self, log: EventLog, reach: int = 10):
        self.after = defaultdict(lambda: defaultdict(float))
        for p in range(len(log)):
            for d in range(1, reach + 1):
                if p - d < 0 or log.user[p - d] != log.user[p]: break
                self.after[log.item[p - d]][log.item[p]] += 1/d

    def scores(self, prefix: np.ndarray) -> dict[int, float]: return self.after.get(prefix[-1], {})


class Stan:
    """Sequence and time aware neighbourhood, as its paper has it, over sessions in order."""

    def __init__(self, log: EventLog, neighbours: int = 500, sample: int = 2_500, position: float = 3.62, distance: float = 1.0):
        self.neighbours, self.sample, self.position, self.distance = neighbours, sample, position, distance
        first = np.flatnonzero(np.diff(log.user, prepend=-1))
        self.sessions = [x.tolist() for x in np.split(log.item, first[1:])]
        self.having = defaultdict(list)
        for n, items in enumerate(self.sessions):
            for i in set(items): self.having[i].append(n)

    def scores(self, prefix: np.ndarray) -> dict[int, float]:
        weight, alike, out = {}, defaultdict(float), defaultdict(float)
        for p, i in enumerate(prefix): weight[i] = exp((p + 1 - len(prefix))/self.position)
        recent = sorted({n for i in weight for n in self.having.get(i, [])[-self.sample:]})[-self.sample:]
        for n in recent:
            items = set(self.sessions[n])
            alike[n] = sum(w for i, w in weight.items() if i in items)/(len(items)*len(weight))**.5
        place = {i: p for p, i in enumerate(prefix)}
        for n in sorted(alike, key=alike.get, reverse=True)[:self.neighbours]:
            items = self.sessions[n]
            shared = max((p for p, i in enumerate(items) if i in place), key=lambda p: place[items[p]])
            best = {}
            for p, i in enumerate(items): best[i] = max(best.get(i, 0), exp(-abs(p - shared)/self.distance))
            for i, b in best.items(): out[i] += alike[n]*b
        return out


class Popular:
    """What most sessions of the last quarter of the log have."""

    def __init__(self, log: EventLog):
        late = log.ts >= np.quantile(log.ts, .75)
        self.counts = dict(enumerate(np.bincount(log.item[late], minlength=log.n_items).tolist()))

    def scores(self, prefix: np.ndarray) -> dict[int, float]: return self.counts


class Implicit:
    """One of implicit's models on the session-item matrix; the prefix is a new user."""

    def __init__(self, log: EventLog, model):
        from scipy.sparse import csr_matrix

        self.n, self.model = log.n_items, model
        model.fit(csr_matrix((np.ones(len(log), np.float32), (log.user, log.item)), shape=(log.n_users, log.n_items)), show_progress=False)

    def scores(self, prefix: np.ndarray) -> dict[int, float]:
        from scipy.sparse import csr_matrix

        row = csr_matrix((np.ones(len(prefix), np.float32), (np.zeros(len(prefix), int), prefix)), shape=(1, self.n))
        items, scores = self.model.recommend(0, row, N=20, filter_already_liked_items=False, recalculate_user=True)
        return dict(zip(items.tolist(), scores.tolist(), strict=True))


def peer(model, h: Histories, target: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Places of the targets, and seconds of each answer."""
    places, seconds = [], []
    for i in range(len(h)):
        began = time.perf_counter()
        found = model.scores(h.item[h.indptr[i]:h.indptr[i + 1]]) if h.lengths[i] else {}
        seconds.append(time.perf_counter() - began)
        items, scores = np.fromiter(found, np.int64, len(found)), np.fromiter(found.values(), np.float64, len(found))
        places.append(place_of(items, scores, target[i]) if target[i] >= 0 else MISSED)
    return np.array(places), seconds


def metrics(places: np.ndarray, session: np.ndarray, seed: int = 0) -> dict:
    """P@20 and MRR@20 with 95% intervals over resampled sessions."""
    per = np.stack([places < 20, np.where(places < 20, 1/(places + 1.0), 0)], axis=1)
    _, who = np.unique(session, return_inverse=True)
    total = np.stack([np.bincount(who, v) for v in per.T], axis=1)
    times = np.random.default_rng(seed).multinomial(len(total), np.full(len(total), 1/len(total)), 1_000)
    low, high = np.quantile((times @ total)/(times @ np.bincount(who))[:, None], [.025, .975], axis=0).round(4).tolist()
    p, mrr = per.mean(axis=0).round(4).tolist()
    return {"P@20": p, "P@20_ci": [low[0], high[0]], "MRR@20": mrr, "MRR@20_ci": [low[1], high[1]], "instances": len(places)}


def timed(moment: Moment, ranker: Ranker, h: Histories, most: int) -> dict[str, list[float]]:
    """Seconds of single requests by part, the first tenth left out; the scores go through the product's trees and through LightGBM's own `predict`."""
    knn, seconds = moment.sources["session_knn"], defaultdict(list)

    def clocked(part: str, call, *args):
        began = time.perf_counter()
        value = call(*args)
        seconds[part].append(time.perf_counter() - began)
        return value

    for i in range(min(most, len(h))):
        clocked(PARTS[0], knn.retrieve, h.take(i), moment.quotas["session_knn"])
        _, rows = clocked(PARTS[1], ranker_rows, moment, h.take(i))
        clocked(PARTS[2], ranker.margin, rows)
        clocked(PARTS[3], ranker.booster.predict, rows)
    seconds["whole"] = [a + b for a, b in zip(seconds[PARTS[1]], seconds[PARTS[2]], strict=True)]
    return {part: values[len(values)//10:] for part, values in seconds.items()}


def simulated(seed: int = 7) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Small sessions with topics, for a quick run."""
    rng = np.random.default_rng(seed)
    topic, rows = rng.integers(0, 20, 1_500), []
    for s in range(1_500):
        rows += [(s, f"i{int(topic[s]*10 + x)}") for x in rng.integers(0, 10, rng.integers(3, 8))]
    table = pl.DataFrame(rows, schema=["session", "item"], orient="row")
    late = table.filter(pl.col("session") >= 1_300).group_by("session", maintain_order=True).agg("item")
    asked = [(" ".join(x[:p]), x[p]) for x in late["item"].to_list() for p in range(2, len(x))]
    return table.filter(pl.col("session") < 1_300), pl.DataFrame(asked, schema=["prefix", "target"], orient="row")


def main(argv: list[str] | None = None) -> None:
    """Read, train, rank, compare."""
    parser = arguments(__doc__)
    parser.add_argument("--train", type=Path, help="sessions to learn from; without it nothing is measured")
    parser.add_argument("--test", type=Path, help="prefixes and targets")
    parser.add_argument("--instances", type=int, default=15_000, help="beginnings of sessions to learn from, per cutoff")
    parser.add_argument("--test-looks", type=int, default=1, help="how often this test part has been looked at, this time included")
    args, settings = parser.parse_args(argv), load_settings()
    if args.quick: (table, test), settings = simulated(), quickly(settings)
    elif args.train and args.test: table, test = read_table(args.train), read_table(args.test)
    else: return print("q1_sessions: nothing measured; it needs --train and --test")
    sessions = sessions_of(table, str(args.train))
    shop, end = shop_of(sessions), int(sessions["ts"].max()) + 1
    session = test["session_id"].to_numpy() if "session_id" in test.columns else np.arange(test.height)
    shortest = max(int(test["prefix"].str.split(" ").list.len().min()), 1)
    cuts = cut_at(sessions, max(len(np.unique(session)) if "session_id" in test.columns else test.height//3, 100))
    h, target = prefixes_of(test, shop.items, end, 2*end - cuts[0])  # as long as the last slice of train
    ranker = train(shop, cuts, shortest, args.instances, settings)
    moment = fit_moment(shop, end, settings)
    places = two_stage(moment, ranker, h, target)
    again = np.array([t in h.item[a:b] for a, b, t in zip(h.indptr, h.indptr[1:], target, strict=False)])
    speed = timed(moment, ranker, h, 1_000)
    whole = percentiles(speed.pop("whole"))
    rows = [{"system": "reco", "case": "all", "metrics": metrics(places, session) | {k: whole[k] for k in ("p50_ms", "p99_ms")}}]
    for case, part in (("target in the prefix", again), ("new target", ~again)):
        if part.any(): rows.append({"system": "reco", "case": case, "metrics": metrics(places[part], session[part])})
    for part, seconds in speed.items(): rows.append({"system": "reco", "case": f"one request: {part}", "metrics": percentiles(seconds)})
    for name, model in peers(shop, cuts[0], shortest, settings):
        found, seconds = peer(model, h, target)
        speed = percentiles(seconds)
        rows.append({"system": name, "case": "all", "metrics": metrics(found, session) | {k: speed[k] for k in ("p50_ms", "p99_ms")}})
    write("q1_sessions", rows, args.results, args.test_looks, argv)
    if not args.quick: render()


def peers(shop: ShopData, cut: int, shortest: int, settings: Settings):
    """Each peer with its parameters, fitted on all of train."""
    from implicit.als import AlternatingLeastSquares
    from implicit.nearest_neighbours import BM25Recommender, CosineRecommender

    log, past = shop.log, shop.log.before(cut)
    asked = requests_in(shop, cut, int(log.ts.max()) + 1, shortest, 1_000, settings.project.seed)
    user, asof = asked["user_idx"].to_numpy(), asked["asof"].dt.epoch("ms").to_numpy()
    h, truth = histories(log, user, asof, 200), next_touches(log, user, asof).item
    grid = [{"neighbours": n, "position": p, "distance": d} for n in (100, 500) for p in (0.9, 3.6) for d in (0.5, 1.0, 4.0)]
    best = max(grid, key=lambda g: metrics(peer(Stan(past, **g), h, truth)[0], user)["P@20"])
    yield f"STAN {best}".replace("'", ""), Stan(log, **best)
    yield "sequential rules", SequentialRules(log)
    yield "implicit BM25", Implicit(log, BM25Recommender(K=500, num_threads=1))
    yield "implicit cosine", Implicit(log, CosineRecommender(K=500, num_threads=1))
    yield "implicit ALS", Implicit(log, AlternatingLeastSquares(64, random_state=settings.project.seed, num_threads=2, use_gpu=False))
    yield "popularity", Popular(log)


if __name__ == "__main__": main()
