"""Lists of 20 for all shoppers, users a second: the whole pipeline on one worker and on two, beside implicit's own batch `recommend`.

`reco` is what `flows/batch.py` runs: parts of the shoppers are read from a lake, scored by workers of Ray that hold a saved bundle, and written
back. The time runs from the beginning of the first part to the note of the last one; the start of Ray and of the workers is not in it.
implicit's models are fitted on the matrix of the same log and asked for all shoppers in one call: one stage of the pipeline, without features,
ranker and rules, and written nowhere. Both have kernels compiled and libraries loaded before the clock starts.

What it leaves out: S3, several machines, the online store, and a good ranker: it learns from 1,000 requests of two cutoffs, and its trees take
about a twentieth of the time of a list.
"""

import os
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from benchmarks.base import arguments, quickly, render, write
from benchmarks.peers import matrix
from flows.on_ray import each_done, ray_running
from reco.batch import LISTS, PARTS, Batch, open_scorer, parts_done, plan, score_users
from reco.bundle import load_bundle, make_bundle, save_bundle
from reco.data.histories import EventLog, epoch_ms
from reco.data.lake import Lake, open_lake
from reco.data.quality import check_catalog, check_interactions
from reco.data.retailrocket import read_retailrocket
from reco.data.shop import index_shop
from reco.data.simulator import simulate
from reco.ranking.training import cutoffs_of, train_ranker
from reco.settings import Settings, load_settings

K, FACTORS, NEIGHBOURS = 20, 64, 100  # length of the lists; implicit's ALS and BM25, as the pipeline's own sources have them
END = datetime(2026, 5, 1, tzinfo=UTC)


def read_events(path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """INTERACTIONS and CATALOG from RetailRocket's events.csv and what else of it lies in the folder."""
    batch, now = read_retailrocket(path.parent), datetime.now(UTC)
    return check_interactions(batch.events.collect(), now).good, check_catalog(batch.catalog.collect(), now).good


def prepared(interactions: pl.DataFrame, catalog: pl.DataFrame, settings: Settings) -> tuple[Lake, Path, dict[str, str], EventLog]:
    """A lake with the tables and a bundle that knows all of it, in the settings' folder; and the log in arrays."""
    lake, shop = open_lake(settings), index_shop(interactions, catalog)
    snapshots = {"interactions": lake.write("interactions", interactions, key=["event_id"], day_of="ts"),
                 "catalog": lake.write("catalog", catalog, key=["item_id", "valid_from"])}
    rankers = {"for_you": train_ranker(shop, cutoffs_of(shop, settings), settings)}
    bundle = make_bundle(shop, epoch_ms(shop.end), rankers, settings, {"snapshots": snapshots})
    return lake, save_bundle(bundle, settings.root), snapshots, shop.log


def warmed(settings: Settings, folder: Path, batch: Batch, events: pl.DataFrame) -> Callable[[int], float]:
    """A worker's function, after some lists that nobody wants; it gives the peak memory of its process in MB."""
    score = open_scorer(settings, folder, batch, None)
    score_users(load_bundle(folder), events, batch.asof, batch.k)

    def timed(part: int) -> float:
        score(part)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return timed


def run(lake: Lake, batch: Batch, workers: int, *args: object) -> dict[str, float]:
    """All parts, on Ray's workers or, with none, in this process: users a second, seconds, and MB of the largest worker."""
    parts = range(batch.partitions)
    peak = [mb for _, mb in each_done(warmed, args, parts, workers, {})] if workers else list(map(warmed(*args), parts))
    done = parts_done(lake, batch.run)
    began = (done["made"] - pl.Series(timedelta(seconds=s) for s in done["seconds"])).min()
    seconds = (done["made"].max() - began).total_seconds()
    users = int(done["users"].sum())
    assert done.height == batch.partitions and users == batch.users
    return {"users_per_s": round(users / seconds, 1), "seconds": round(seconds, 2), "users": users, "peak_mb": round(max(peak))}


def alone(folder: Path, batch: Batch, interactions: pl.DataFrame) -> dict[str, float]:
    """The lists in this process without a lake, on one thread."""
    bundle, few = load_bundle(folder), interactions["user_id"].unique().sort().head(64)
    with threadpool_limits(1):
        score_users(bundle, interactions.filter(pl.col("user_id").is_in(few.implode())), batch.asof, batch.k)
        began = time.perf_counter()
        score_users(bundle, interactions, batch.asof, batch.k)
    return rate(batch.users, time.perf_counter() - began)


def rate(users: int, seconds: float) -> dict[str, float]: return {"users_per_s": round(users / seconds, 1), "seconds": round(seconds, 2), "users": users}


def implicit_models(rows, quick: bool) -> Iterator[tuple[str, object]]:
    """implicit's ALS and BM25, fitted."""
    from implicit.als import AlternatingLeastSquares
    from implicit.nearest_neighbours import BM25Recommender
    for name, model in (("implicit ALS", AlternatingLeastSquares(8 if quick else FACTORS, iterations=5, random_state=7, use_gpu=False)),
                        ("implicit BM25", BM25Recommender(NEIGHBOURS))):
        with warnings.catch_warnings(), threadpool_limits(1, "blas"):
            warnings.simplefilter("ignore")  # about matrix formats, from inside implicit
            model.fit(rows, show_progress=False)
        yield name, model


def peers(log: EventLog, case: str, threads: tuple[int, ...], quick: bool) -> list[dict]:
    """implicit's rows of the table."""
    rows, out = matrix(log, "graded"), []
    everybody = np.flatnonzero(np.diff(rows.indptr))
    for name, model in implicit_models(rows, quick):
        for n in threads:
            model.num_threads = n
            with threadpool_limits(1, "blas"):
                model.recommend(everybody[:64], rows[everybody[:64]], N=K)
                began = time.perf_counter()
                model.recommend(everybody, rows[everybody], N=K)
            metrics = rate(len(everybody), time.perf_counter() - began)
            out.append({"system": name, "case": f"{case}, {n} thread{'s' if n > 1 else ''}", "metrics": metrics})
    return out


def measured(interactions: pl.DataFrame, catalog: pl.DataFrame, case: str, settings: Settings, workers: tuple[int, ...], quick: bool) -> list[dict]:
    """The rows of one data set."""
    rows = []
    with tempfile.TemporaryDirectory() as temp:
        settings = settings.model_copy(update={"root": Path(temp)})
        lake, folder, snapshots, log = prepared(interactions, catalog, settings)
        bundle, some = load_bundle(folder), interactions.filter(pl.col("user_id").is_in(interactions["user_id"].unique().sort().head(64).implode()))
        batch = plan(lake, snapshots, bundle, K, min(1_000, -(-interactions["user_id"].n_unique() // 4)))
        rows.append({"system": "reco", "case": f"{case}, scoring only, 1 thread", "metrics": alone(folder, batch, interactions)})
        for n in workers:
            metrics = run(lake, batch, 0 if quick else n, settings, folder, batch, some)
            rows.append({"system": "reco", "case": f"{case}, {n} worker{'s' if n > 1 else ''}", "metrics": metrics})
            for table in (PARTS, LISTS): shutil.rmtree(f"{lake.root}/{table}") # the next one begins anew
    rows += peers(log, case, workers, quick)
    best = {n: max(r["metrics"]["users_per_s"] for r in rows if r["system"] != "reco" and f", {n} thread" in r["case"]) for n in workers}
    for r in rows:
        for n in workers:
            if r["system"] == "reco" and f", {n} worker" in r["case"]: r["metrics"]["of implicit's best"] = round(r["metrics"]["users_per_s"] / best[n], 4)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Fill a lake, train, score everybody."""
    parser = arguments(__doc__)
    parser.add_argument("--events", type=Path, help="RetailRocket's events.csv (other files of it in the folder are read too)")
    parser.add_argument("--simulated", type=int, default=10_000, help="shoppers of a second, simulated shop; 0 is none")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="how many workers, and threads of implicit")
    args, settings = parser.parse_args(argv), load_settings()
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"cutoffs": 2, "max_requests": 1_000})})
    # Ray's workers give way to others otherwise, which implicit in this process does not
    for name, value in {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAY_worker_niceness": "0"}.items(): os.environ.setdefault(name, value)
    if args.quick:
        sim = simulate(300, 150, 6_000, days=60, end=END, seed=7)
        rows = measured(sim.interactions, sim.catalog, "simulated", quickly(settings), (1,), True)
    elif args.events:
        cases = [(args.events.parent.name, *read_events(args.events))]
        if args.simulated:
            sim = simulate(args.simulated, args.simulated // 2, args.simulated * 15, days=90, end=END, seed=7)
            cases.append((f"simulated, {args.simulated:,} shoppers", sim.interactions, sim.catalog))
        with ray_running(): rows = [r for case, *tables in cases for r in measured(*tables, case, settings, tuple(args.workers), False)]
    else: return print("p4_batch: nothing measured; it needs --events with a file in the format of RetailRocket's events.csv")
    write("p4_batch", rows, args.results, argv=argv)
    if not args.quick: render()


if __name__ == "__main__": main()
