"""The whole pipeline beside each of its sources on a temporal hold-out, as `flows/train.py` judges it, from raw files.

Relevant is what the shopper bought between the request and the end of the hold-out; the rules are the same for every row. Slices are by
kind of request, by length of the shopper's history, and by age and popularity of the items bought, as of the start of the hold-out.
What it leaves out: parameters of the sources chosen for this data set (the settings' defaults are used), and other cuts.
"""

from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from benchmarks.base import arguments, quickly, render, write
from benchmarks.slices import by_age, by_length, by_popularity
from reco.data.histories import epoch_ms, histories
from reco.data.raw_shop import read_shop
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.sources import FILES
from reco.data.split import Cutoffs, who_and_when
from reco.evaluation.backtest import backtest, judged_requests, lists_of_all, score_table
from reco.evaluation.metrics import relevant
from reco.moment import fit_moment
from reco.ranking.examples import outcomes
from reco.ranking.lambdamart import Ranker
from reco.ranking.training import cutoffs_of, train_ranker
from reco.reranking.kept import keep_at, reranker_of
from reco.settings import Settings, load_settings

METRICS = "NDCG@10", "MAP@10", "Recall@10", "Recall@20", "coverage@10"


def results(table: pl.DataFrame) -> list[dict]:
    """The evaluation's rows in the benchmarks' form; the pipeline is called reco."""
    rows = []
    for r in table.iter_rows(named=True):
        metrics = {"requests": r["requests"]} | {m: round(r[m], 4) for m in METRICS if r[m] is not None}
        metrics["NDCG@10_ci"] = [round(r["low"], 4), round(r["high"], 4)]
        if r["first_ahead"] is not None: metrics["reco ahead"] = round(r["first_ahead"], 3)
        rows.append({"system": "reco" if r["system"] == "pipeline" else r["system"], "case": r["slice"], "metrics": metrics})
    return rows


def slices(shop: ShopData, cutoffs: Cutoffs, ranker: Ranker, settings: Settings) -> pl.DataFrame:
    """The same requests and lists once more, judged by what of the purchases lies in each slice; no coverage, the lists are everybody's."""
    at, until = epoch_ms(cutoffs.holdout), epoch_ms(cutoffs.label_end(cutoffs.holdout))
    user, asof = who_and_when(judged_requests(shop, cutoffs, settings, 3))
    moment = fit_moment(shop, at, settings)
    h = histories(shop.log, user, asof, settings.train.max_history, moment.known)
    kept = keep_at(shop.log, moment, settings.rules, settings.train.max_history)
    reranker = reranker_of(kept, moment, shop.items, settings.rules, settings.rerank, settings.explore)
    lists = lists_of_all(moment, ranker, reranker, h, 20)
    truth = relevant(outcomes(shop.log, user, asof, until), 3)
    parts = by_length(truth, h.lengths) | by_age(truth, shop.log, at) | by_popularity(truth, shop.log, at)
    tables = {name: score_table(lists, some, user, int(moment.known.sum())) for name, some in parts.items() if len(some.item)}
    return pl.concat([t.select(pl.lit(name).alias("slice"), pl.all().exclude("coverage@10"), pl.lit(None, pl.Float64).alias("coverage@10"))
                      for name, t in tables.items()])


def main(argv: list[str] | None = None) -> None:
    """Read, train, judge."""
    parser = arguments(__doc__)
    parser.add_argument("--source", choices=FILES, default="retailrocket", help="the files' format")
    parser.add_argument("--path", type=Path, help="folder of the raw files; without it nothing is measured")
    parser.add_argument("--test-looks", type=int, default=1, help="how often this hold-out has been looked at, this time included")
    args, settings = parser.parse_args(argv), load_settings()
    if args.quick:
        sim = simulate(500, 200, 10_000, days=90, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7)
        shop, settings = index_shop(sim.interactions, sim.catalog), quickly(settings)
    elif args.path: shop = read_shop(args.source, args.path, settings)
    else: return print("holdout: nothing measured; it needs --path with raw files, and --source for their format")
    cutoffs = cutoffs_of(shop, settings)
    ranker = train_ranker(shop, cutoffs, settings)
    rows = results(backtest(shop, cutoffs, ranker, settings)) + results(slices(shop, cutoffs, ranker, settings))
    write("holdout", rows, args.results, args.test_looks, argv)
    if not args.quick: render()


if __name__ == "__main__": main()
