"""The whole pipeline beside each of its sources on a temporal hold-out, as `flows/train.py` judges it, from raw files.

Relevant is what the shopper bought between the request and the end of the hold-out; the rules are the same for every row.
What it leaves out: parameters of the sources chosen for this data set (the settings' defaults are used), and other cuts.
"""

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
from reco.data.ingestion import ingest

from benchmarks.base import arguments, render, write
from reco.data.lake import Lake
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.sources import FILES, read_source
from reco.evaluation.backtest import backtest
from reco.ranking.training import cutoffs_of, train_ranker
from reco.settings import Settings, load_settings

METRICS = "NDCG@10", "MAP@10", "Recall@10", "Recall@20", "coverage@10"


def shop_from(source: str, folder: Path, settings: Settings) -> ShopData:
    """What `flows/ingest.py` would put into an empty lake."""
    with tempfile.TemporaryDirectory() as out:
        lake = Lake(f"{out}/lake")
        done = ingest(source, lambda _: read_source(source, folder), lake, datetime.now(UTC), settings.quality,
                      settings.data.session_gap_minutes, Path(out) / "scratch", settings.data.memory_gb)
        if done.refused: sys.exit(done.refused)
        return index_shop(lake.read("interactions").collect(), lake.read("catalog").collect())


def results(table: pl.DataFrame) -> list[dict]:
    """The evaluation's rows in the benchmarks' form; the pipeline is called reco."""
    rows = []
    for r in table.iter_rows(named=True):
        metrics = {"requests": r["requests"]} | {m: round(r[m], 4) for m in METRICS}
        metrics["NDCG@10_ci"] = [round(r["low"], 4), round(r["high"], 4)]
        if r["first_ahead"] is not None: metrics["reco ahead"] = round(r["first_ahead"], 3)
        rows.append({"system": "reco" if r["system"] == "pipeline" else r["system"], "case": r["slice"], "metrics": metrics})
    return rows


def main() -> None:
    """Read, train, judge."""
    parser = arguments(__doc__)
    parser.add_argument("--source", choices=FILES, default="retailrocket", help="the files' format")
    parser.add_argument("--path", type=Path, help="folder of the raw files; without it nothing is measured")
    parser.add_argument("--test-looks", type=int, default=1, help="how often this hold-out has been looked at, this time included")
    args, settings = parser.parse_args(), load_settings()
    if args.quick:
        sim = simulate(500, 200, 10_000, days=90, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7)
        shop = index_shop(sim.interactions, sim.catalog)
    elif args.path: shop = shop_from(args.source, args.path, settings)
    else: return print("holdout: nothing measured; it needs --path with raw files, and --source for their format")
    cutoffs = cutoffs_of(shop, settings)
    table = backtest(shop, cutoffs, train_ranker(shop, cutoffs, settings), settings)
    write("holdout", results(table), args.results, args.test_looks)
    if not args.quick: render()


if __name__ == "__main__": main()
