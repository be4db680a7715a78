"""The online store, embedded: a shopper's past, the rows of a request's candidates, and events going in.

The floors: a round trip that does nothing, and the rows as one hash per item, read in one pipeline.
What it leaves out: a network, several clients at once, and a store of millions of shoppers.
"""

import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.base import arguments, folder_with_store, percentiles, render, write
from benchmarks.pipeline import measure
from reco.data.simulator import simulate
from reco.features.items import ITEM_FEATURES
from reco.features.store import OnlineStore, open_store
from reco.settings import Settings

CANDIDATES = 300


def put_hashes(store: OnlineStore, ids: list[str], rows: np.ndarray) -> None:
    """The same rows as one hash per item."""
    pipe = store.client.pipeline(transaction=False)
    for i, row in zip(ids, rows.tolist(), strict=True): pipe.hset(f"hash:{i}", mapping=dict(zip(ITEM_FEATURES, row, strict=True)))
    pipe.execute()


def read_hashes(store: OnlineStore, ids: list[str]) -> np.ndarray:
    """Their values as an array."""
    pipe = store.client.pipeline(transaction=False)
    for i in ids: pipe.hgetall(f"hash:{i}")
    return np.array([[float(v) for v in found.values()] for found in pipe.execute()], np.float32)


def added(store: OnlineStore, frame: pl.DataFrame, at_once: int) -> dict[str, float]:
    """Events per second, so many to an `append`."""
    began = time.perf_counter()
    n = sum(store.append(part) for part in frame.iter_slices(at_once))
    seconds = time.perf_counter() - began
    return {"events_per_s": round(n / seconds), "us_per_event": round(1e6 * seconds / n, 1)}


def main() -> None:
    """Fill a store with a simulated shop, then read it the way requests do."""
    args = arguments(__doc__).parse_args()
    n, size = (50, (500, 400, 10_000)) if args.quick else (2_000, (20_000, 2_000, 300_000))
    log = simulate(*size, days=90, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7).interactions.sample(fraction=1, shuffle=True, seed=1)
    with folder_with_store() as folder:
        store = open_store(Settings(root=Path(folder)))
        store.client.ping()
        few, many = log.head(n), log[n:]
        results = [("append", "one event at a time", added(store, few, 1)),
                   ("append", f"{many.height:,} events, 5,000 at a time", added(store, many, 5_000))]
        users = store.events_many(log["user_id"].unique(maintain_order=True).to_list())
        full = log.group_by("user_id", maintain_order=True).len().filter(pl.col("len") >= 100)["user_id"].to_list() or ["nobody"]
        ids, rng = [f"item{i}" for i in range(size[1])], np.random.default_rng(1)
        rows = rng.random((len(ids), len(ITEM_FEATURES)), np.float32)
        store.put_rows("v1", ids, rows)
        store.activate("bundle", "v1", 1)
        put_hashes(store, ids, rows)
        asked = [rng.choice(ids, min(CANDIDATES, len(ids)), replace=False).tolist() for _ in range(n)]
        assert np.array_equal(store.rows("bundle", asked[0])[1], read_hashes(store, asked[0]))
        case = f"{len(asked[0])} × {len(ITEM_FEATURES)} features"
        some = log["user_id"].sample(n, seed=1, with_replacement=True).to_list()
        busy = [full[i % len(full)] for i in range(n)]
        results += [
            ("round trip", "PING", percentiles(measure(lambda _: store.client.ping(), some))),
            ("past and pointer", f"{np.mean([len(u) for u in users]):.0f} events on average", percentiles(measure(lambda u: store.ask(u, "bundle"), some))),
            ("past and pointer", "shoppers with 100 events or more", percentiles(measure(lambda u: store.ask(u, "bundle"), busy))),
            ("rows", case, percentiles(measure(lambda x: store.rows("bundle", x), asked))),
            ("pipelined HGETALL", case, percentiles(measure(lambda x: read_hashes(store, x), asked)))]
        store.close()
    write("store", [{"system": s, "case": c, "metrics": m} for s, c, m in results], args.results)
    if not args.quick: render()


if __name__ == "__main__": main()
