"""Cold items: how well does a title and a price place what nobody has bought yet?

An item is *cold* when it was first sold at or after the cut. The catalogue at the cut holds every item of the file; of a cold one it
knows the description and the price of its first sale and nothing else: not when, how often or with what it was sold. (Later
descriptions are not used, for warm items neither: which of them came to be the usual one is a count of sales.) No item is left out of
the cold ones for not being sold within the window, so that being in the list says nothing.

The *customers* bought something before the cut and at least one cold item in the `--days` after it. Relevant are the cold items that
they bought in these days. What a customer bought before the cut is no candidate. `Recall@50` ranks all other items, warm and
cold, and asks which share of the relevant ones is among the first 50; `NDCG@10` ranks the cold items among themselves.
Recall@50 alone can be had by putting every cold item before every warm one, so `any Recall@50` stands beside it: the same for
everything, warm or cold, that the customer bought for the first time in these days (of at most 50).

Peers: random; popularity (buyers in the last 30 days; a cold item has the mean of the warm items of its tenth of the prices); TF-IDF
neighbours (scikit-learn's vectoriser as it comes; the mean or the largest cosine to the items bought).

Ours: `content` is the product's source as it proposes, without any training. `reco` is the probability of a purchase, learnt from `--replays`
earlier cuts whose windows end before the cut: for cold items a logistic regression on the source's own order and the
customer's activity, for warm items LightGBM on the source's scores and the item features. Everything was chosen on earlier cuts
(`--until` ends the file there): the test window was looked at as often as `--test-looks` says.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import lightgbm as lgb
import numpy as np
import polars as pl

from benchmarks.base import arguments, render, write
from reco.candidates.content import Content, promises
from reco.data.files import gather
from reco.data.histories import EventLog, Histories, epoch_ms, event_log, histories
from reco.data.online_retail import purchases, scan_invoices
from reco.data.simulator import simulate
from reco.features.items import item_features, item_state
from reco.ids import IdMap
from reco.schemas import CATALOG, INTERACTIONS, conform

K, COLD_K, DAY = 50, 10, 86_400_000
WARM_SHARE = 0.1  # of the pairs of a customer and a warm item that was not bought: enough negatives for LightGBM
Scorer = Callable[[int], np.ndarray]  # customer's place → float [n_items], higher is better


def sales_of(path: Path) -> pl.DataFrame:
    """`user_id`, `item_id`, `ts`, `title`, `price` of all purchases in a file of Online Retail's format."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        lines = gather(purchases(scan_invoices(Path(folder))), "purchases")
    lines = lines.filter(pl.col("reason").is_null() & pl.col("ts").is_not_null())
    return lines.select("event_id", "user_id", "item_id", "ts", title="description", price=pl.col("price").cast(pl.Float64)).sort("ts", "event_id")


def simulated_sales() -> pl.DataFrame:
    """A small shop in the same form."""
    sim = simulate(600, 200, 30_000, days=150, end=datetime(2011, 12, 1, tzinfo=UTC), seed=7)
    title = sim.catalog.group_by("item_id").agg(pl.col("title", "price").first())
    sold = sim.interactions.select("event_id", "user_id", "item_id", "ts")
    return sold.join(title, on="item_id", how="left", validate="m:1").sort("ts", "event_id")


@dataclass
class Cut:
    """The shop at a cut, and what its customers bought afterwards."""

    at: int                # ms
    log: EventLog          # before the cut
    catalog: pl.DataFrame  # CATALOG, one row per item in index order
    cold: np.ndarray       # bool [n_items]
    h: Histories           # one per customer
    before: list           # per customer, item_idx bought before
    after: list            # per customer, item_idx bought for the first time in the window
    all_before: list       # as `before`, without the limit of a history


def cut_at(sales: pl.DataFrame, at: datetime, days: int, customers: int, cold_only: bool = True) -> Cut:
    """What is known at a cut; `sales` may hold later ones, which make the cold items and what is relevant."""
    first = sales.group_by("item_id", maintain_order=True).agg(pl.col("title").drop_nulls().first(), pl.col("price").first(), pl.col("ts").min())
    entered = pl.min_horizontal(pl.col("ts"), pl.lit(at).cast(sales["ts"].dtype))  # the catalogue does not know when a cold item will sell
    catalog = conform(first.select("item_id", "title", "price", valid_from=entered, created_at=entered).sort("item_id"), CATALOG)
    items, users = IdMap(catalog["item_id"]), IdMap(sales["user_id"])
    log = event_log(conform(sales.with_columns(event=pl.lit("transaction")), INTERACTIONS), users, items)
    ms, past = epoch_ms(at), log.before(epoch_ms(at))
    later = log.where((log.ts >= ms) & (log.ts < ms + days * DAY))
    cold = np.bincount(past.item, minlength=len(items)) == 0
    seen = np.unique(past.user.astype(np.int64) * len(items) + past.item)
    new = np.setdiff1d(np.unique(later.user.astype(np.int64) * len(items) + later.item), seen)
    user, item = new // len(items), new % len(items)
    known = np.intersect1d(user[cold[item]] if cold_only else user, past.user)
    if len(known) > customers: known = np.sort(np.random.default_rng(0).choice(known, customers, replace=False))
    bought = [seen[np.searchsorted(seen, u * len(items)):np.searchsorted(seen, (u + 1) * len(items))] % len(items) for u in known.astype(np.int64)]
    return Cut(ms, past, catalog, cold, histories(past, known.astype(np.int32), np.full(len(known), ms), 200), bought,
               [item[user == u] for u in known], bought)


def judged(cut: Cut, score: Scorer) -> dict[str, np.ndarray]:
    """Each metric for each customer; ties to the lower index."""
    out = {"Recall@50": [], "NDCG@10": [], "any Recall@50": []}
    cold, gain = np.flatnonzero(cut.cold), 1 / np.log2(np.arange(COLD_K) + 2)
    for u, bought in enumerate(cut.after):
        s = np.array(score(u), float)
        s[cut.before[u]] = -np.inf
        top, wanted = np.argsort(-s, kind="stable")[:K], bought[cut.cold[bought]]
        best = cold[np.argsort(-s[cold], kind="stable")[:COLD_K]]
        out["Recall@50"].append(np.isin(wanted, top).mean())
        out["any Recall@50"].append(np.isin(bought, top).sum() / min(K, len(bought)))
        out["NDCG@10"].append(gain[:len(best)][np.isin(best, wanted)].sum() / gain[:min(COLD_K, len(wanted))].sum())
    return {k: np.array(v) for k, v in out.items()}


def summary(values: dict[str, np.ndarray], peer: dict[str, np.ndarray]) -> dict:
    """Means and 95% intervals over customers; how many times the TF-IDF neighbours', with its interval."""
    out, n = {"customers": len(values["NDCG@10"])}, len(values["NDCG@10"])
    draw = np.random.default_rng(0).integers(0, n, (1000, n))
    for m, v in values.items():
        out[m] = round(float(v.mean()), 4)
        out[f"{m}_ci"] = [round(float(q), 4) for q in np.quantile(v[draw].mean(axis=1), [0.025, 0.975])]
        if m in ("Recall@50", "NDCG@10"):
            ratio = v[draw].mean(axis=1) / np.maximum(peer[m][draw].mean(axis=1), 1e-9)
            out[f"{m} / TF-IDF"] = round(float(v.mean() / max(peer[m].mean(), 1e-9)), 2)
            out[f"{m} / TF-IDF_ci"] = [round(float(q), 2) for q in np.quantile(ratio, [0.025, 0.975])]
    return out


def peers(cut: Cut) -> dict[str, Scorer]:
    """What anyone would try first."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    rng, n = np.random.default_rng(0), len(cut.cold)
    price = cut.catalog["price"].to_numpy()
    late = cut.log.where(cut.log.ts >= cut.at - 30 * DAY)
    buyers = np.bincount(np.unique(late.user.astype(np.int64) * n + late.item) % n, minlength=n).astype(float)
    band = np.digitize(price, np.quantile(price[~cut.cold], np.linspace(0.1, 0.9, 9)))
    usual = np.bincount(band[~cut.cold], buyers[~cut.cold], 10) / np.maximum(np.bincount(band[~cut.cold], minlength=10), 1)
    popular = np.where(cut.cold, usual[band], buyers)
    text = TfidfVectorizer().fit_transform(cut.catalog["title"].fill_null("").to_list())
    return {"random": lambda u: rng.random(n), "popularity, cold by price band": lambda u: popular,
            "TF-IDF neighbours (mean)": lambda u: np.asarray(text @ text[cut.all_before[u]].mean(axis=0).T).ravel(),
            "TF-IDF neighbours (max)": lambda u: (text @ text[cut.all_before[u]].T).max(axis=1).toarray().ravel()}


@dataclass
class Fitted:
    """The product's source at a cut, and what it says of a customer."""

    cut: Cut
    source: Content
    per_item: np.ndarray  # float32 [n_items, item features]

    def rows(self, u: int, items: np.ndarray) -> np.ndarray:
        """float32 [items, features]: the source's scores, co-visitation, the items' features, the customer's activity."""
        scores = self.source.score(self.cut.h.take(u), np.array([0, len(items)]), items.astype(np.int32))
        return np.column_stack([scores, self.own(u)[items], self.per_item[items], np.tile(self.activity(u), (len(items), 1))]).astype(np.float32)

    def read(self, u: int) -> tuple[np.ndarray, ...]:
        """What `Content.read_past` says of the customer's past, and the room it was written to."""
        room = np.zeros((len(self.cut.cold), 2), np.float32)
        return *self.source.read_past(self.cut.h, u, room), room

    def own(self, u: int) -> np.ndarray:
        """float32 [n_items]: how much shoppers of the customer's items touch an item itself."""
        return self.read(u)[-1][:, 1]

    def activity(self, u: int) -> list[float]:
        """How much the customer buys: items ever, lines in the last 30 days."""
        h = self.cut.h.take(u)
        return [np.log(len(self.cut.before[u])), np.log1p((h.ts >= self.cut.at - 30 * DAY).sum())]

    def order(self, u: int) -> np.ndarray:
        """float [n_items]: the source's own order of the cold items, NaN for the rest."""
        out, s = np.full(len(self.cut.cold), np.nan), self.source
        _, _, company, queries, room = self.read(u)
        out[s.new] = promises(company, room, s.loans, queries[2], s.new_rows)
        return out

    def proposes(self, u: int) -> np.ndarray:
        """float [n_items]: the source's list of 50, without what was bought; the rest of the cold items in its order below."""
        found = self.source.retrieve(self.cut.h.take(u), K + len(self.cut.before[u])).items[0]
        rest, place = self.order(u), found[found >= 0]
        out = np.nan_to_num(rest, nan=-1e6) - 1e5
        out[place] = -np.arange(len(place))
        return out


def fitted(cut: Cut, encoder: str) -> Fitted:
    """Fit the source as training does."""
    source = Content(encoder=encoder).fit(cut.log, cut.at, cut.catalog)
    features = item_features(cut.log, item_state(cut.catalog), cut.at)
    return Fitted(cut, source, features)


def learnt(replays: list[Fitted]) -> Callable[[Fitted], Scorer]:
    """The probability of a purchase, from earlier cuts."""
    from sklearn.linear_model import LogisticRegression

    rng, warm, cold = np.random.default_rng(0), [], []
    for f in replays:
        for u, bought in enumerate(f.cut.after):
            y = np.isin(np.arange(len(f.cut.cold)), bought)
            order, may = f.order(u), ~np.isin(np.arange(len(y)), f.cut.before[u])
            new = np.flatnonzero(f.cut.cold & ~np.isnan(order))
            cold.append(np.column_stack([y[new], order[new], np.tile(f.activity(u), (len(new), 1))]))
            some = np.flatnonzero(~f.cut.cold & may & (y | (rng.random(len(y)) < WARM_SHARE)))
            warm.append(np.column_stack([y[some], np.where(y[some], 1, 1 / WARM_SHARE), f.rows(u, some)]))
    cold, warm = np.concatenate(cold), np.concatenate(warm)
    place = LogisticRegression(max_iter=500).fit(cold[:, 1:], cold[:, 0])
    trees = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 15, "min_data_in_leaf": 200, "num_threads": 1, "seed": 7, "verbose": -1}
    sell = lgb.train(trees, lgb.Dataset(warm[:, 2:], warm[:, 0], weight=warm[:, 1]), 150)

    def scorer(f: Fitted) -> Scorer:
        def score(u: int) -> np.ndarray:
            order, warm = f.order(u), np.flatnonzero(~f.cut.cold)
            there, out = np.flatnonzero(f.cut.cold & ~np.isnan(order)), np.full(len(order), -1.0)
            out[warm] = sell.predict(f.rows(u, warm), num_threads=1)
            if len(there): out[there] = place.predict_proba(np.column_stack([order[there], np.tile(f.activity(u), (len(there), 1))]))[:, 1]
            return out
        return score
    return scorer


def main(argv: list[str] | None = None) -> None:
    """Read, replay, judge."""
    parser = arguments(__doc__)
    parser.add_argument("--events", type=Path, help="file in Online Retail's format (.csv, .csv.gz, .xlsx); without it nothing is measured")
    parser.add_argument("--cut", default="2011-10-01", help="items first sold from this day on are cold")
    parser.add_argument("--until", help="leave out what was sold from this day on; for choosing on earlier cuts")
    parser.add_argument("--days", type=int, default=30, help="length of the window after the cut")
    parser.add_argument("--replays", type=int, default=4, help="earlier cuts to learn from, a window apart")
    parser.add_argument("--customers", type=int, default=2_000, help="customers per cut, at most")
    parser.add_argument("--encoder", action="append", help="tfidf or a sentence-transformers model; may be given more than once")
    parser.add_argument("--test-looks", type=int, default=1, help="how often this window has been looked at, this time included")
    args = parser.parse_args(argv)
    if args.quick: sales, args.replays, args.customers = simulated_sales(), 2, 60
    elif args.events: sales = sales_of(args.events)
    else: return print("q4_cold_items: nothing measured; it needs --events with a file in Online Retail's format")
    at = datetime.fromisoformat(args.cut).replace(tzinfo=UTC)
    if args.until: sales = sales.filter(pl.col("ts") < datetime.fromisoformat(args.until).replace(tzinfo=UTC))
    cut = cut_at(sales, at, args.days, args.customers)
    if not len(cut.h): sys.exit(f"nobody who bought before {args.cut} bought a cold item in the {args.days} days after it")
    values = {name: judged(cut, score) for name, score in peers(cut).items()}
    past = sales.filter(pl.col("ts") < at)
    replays = [cut_at(past, at - timedelta(days=args.days * (r + 1)), args.days, args.customers) for r in range(args.replays)]
    for encoder in args.encoder or ["tfidf"]:
        f = fitted(cut, encoder)
        name = str(f.source.encoded_by)
        name = "" if name == "tfidf" else f", {Path(name).name}"
        values[f"content{name}"] = judged(cut, f.proposes)
        values[f"reco{name}"] = judged(cut, learnt([fitted(r, encoder) for r in replays if len(r.h)])(f))
    case = f"{args.cut}, {int(cut.cold.sum())} cold of {len(cut.cold)} items"
    rows = [{"system": n, "case": case, "metrics": summary(v, values["TF-IDF neighbours (mean)"])} for n, v in values.items()]
    write("q4_cold_items", rows, args.results, args.test_looks, argv)
    if not args.quick and not args.until: render()


if __name__ == "__main__": main()
