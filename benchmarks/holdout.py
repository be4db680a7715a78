"""The whole pipeline beside each of its sources on a temporal hold-out, as `flows/train.py` judges it, from raw files.

Relevant is what the shopper bought between the request and the end of the hold-out; the rules are the same for every row.
What it leaves out: parameters of the sources chosen for this data set (the settings' defaults are used), and other cuts.
"""

from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from benchmarks.base import arguments, render, write
from reco.data.quality import accept, check_catalog, check_interactions
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.sources import SOURCES, gather, read_source
from reco.evaluation.backtest import backtest
from reco.ranking.training import cutoffs_of, train_ranker
from reco.settings import load_settings

METRICS = "NDCG@10", "MAP@10", "Recall@10", "Recall@20", "coverage@10"


def shop_from(source: str, folder: Path, max_bad_share: float) -> ShopData:
    """A source's good rows."""
    batch = read_source(source, folder)
    events = check_interactions(gather(batch.events, "interactions"), datetime.now(UTC))
    catalog = check_catalog(gather(batch.catalog, "catalog"))
    return index_shop(*(accept(x, max_bad_share).good for x in (events, catalog)))


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
    parser.add_argument("--source", choices=SOURCES, default="retailrocket", help="the files' format")
    parser.add_argument("--path", type=Path, help="folder of the raw files; without it nothing is measured")
    parser.add_argument("--test-looks", type=int, default=1, help="how often this hold-out has been looked at, this time included")
    args, settings = parser.parse_args(), load_settings()
    if args.quick:
        sim = simulate(500, 200, 10_000, days=90, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7)
        shop = index_shop(sim.interactions, sim.catalog)
    elif args.path: shop = shop_from(args.source, args.path, settings.quality.bad_share.value)
    else: return print("holdout: nothing measured; it needs --path with raw files, and --source for their format")
    cutoffs = cutoffs_of(shop, settings)
    table = backtest(shop, cutoffs, train_ranker(shop, cutoffs, settings), settings)
    write("holdout", results(table), args.results, args.test_looks)
    if not args.quick: render()


if __name__ == "__main__": main()
