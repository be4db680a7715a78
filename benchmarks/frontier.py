"""What variety and fairness cost: strengths are chosen on validation for at most 1% of NDCG, then reported on the hold-out.

The rows are the ranker's lists as they are, the same at the chosen strengths, and ALS alone under the same rules. Relevant is what the
shopper bought after the request (`--grade 1`: touched). `chosen` says what validation chose and what it cost there.
"""

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.base import arguments, quickly, render, write
from reco.candidates.base import Candidates
from reco.data.histories import epoch_ms, histories
from reco.data.raw_shop import read_shop
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.sources import FILES
from reco.data.split import requests_at, thin, who_and_when
from reco.evaluation.backtest import bootstrap_means, only
from reco.evaluation.frontier import Judged, choose_point, frontier, judge_lists
from reco.evaluation.metrics import hits, ndcg, relevant, wanted
from reco.moment import Moment, fit_moment, ranker_rows
from reco.ranking.examples import outcomes
from reco.ranking.lambdamart import Ranker
from reco.ranking.training import cutoffs_of, train_ranker
from reco.reranking.exposure import exposure_at
from reco.reranking.habits import hold_days
from reco.reranking.lists import Reranker, Strengths, make_reranker, shown_lists
from reco.reranking.rulebook import RuleBook
from reco.reranking.rules import compile_rules
from reco.settings import Settings, load_settings


def judged(shop: ShopData, at: datetime, until: datetime, moment: Moment, ranker: Ranker, settings: Settings,
           grade: int) -> tuple[Judged, Candidates, np.ndarray]:
    """Scored candidates of the requests of one window that have an answer; with their candidates and shoppers."""
    asked = requests_at(shop.events, at, until, settings.project.seed)
    answered = relevant(outcomes(shop.log, *who_and_when(asked), epoch_ms(until)), grade)
    if not len(answered.item): sys.exit(f"nothing to judge by: no request after {at} was followed by an event of grade {grade}")
    user, asof = who_and_when(thin(asked[np.unique(answered.request)], settings.train.max_requests, settings.project.seed))
    truth = relevant(outcomes(shop.log, user, asof, epoch_ms(until)), grade)
    h = histories(shop.log, user, asof, settings.train.max_history, moment.known)
    c, rows = ranker_rows(moment, h, 10)
    exposure = exposure_at(shop.log, moment, settings.train.max_history)
    on = Judged(c.indptr, c.item, ranker.slope * ranker.margin(rows) + ranker.intercept, h, truth, exposure, moment.known, settings.rerank.new_days)
    return on, c, user


def maker(shop: ShopData, moment: Moment, on: Judged, settings: Settings) -> Callable[[Strengths], Reranker]:
    """Strengths → the re-ranker of a moment; what items are alike is their categories."""
    rules = settings.rules
    hold = hold_days(shop.log, moment.state.category, moment.asof, rules.exclude_bought_days, rules.rebuy_share, rules.never_rebought_days)
    compiled = compile_rules(rules, RuleBook(), moment.state, shop.items, hold)
    none = np.zeros((len(shop.items), 0), np.float32)
    return lambda s: make_reranker(compiled, on.exposure, none, s, settings.rerank, settings.explore)


def als_lists(on: Judged, c: Candidates, plain: Reranker) -> np.ndarray:
    """What ALS alone would show, under the same rules."""
    column = c.sources.index("als")
    alone = only(c, column)
    return shown_lists(plain, alone.indptr, alone.item, -alone.ranks[:, column].astype(np.float64), on.h, 10)


def rows_of(on: Judged, lists: dict[str, np.ndarray], user: np.ndarray, case: str) -> list[dict]:
    """The benchmark's rows, with NDCG's interval over shoppers and how often the first is ahead of the others."""
    per = np.stack([ndcg(hits(x[:, :10], on.truth), wanted(on.truth)) for x in lists.values()], axis=1)
    low, high = np.quantile(bootstrap_means(per, user), [0.025, 0.975], axis=0)
    rows = []
    for i, (system, items) in enumerate(lists.items()):
        metrics = {"requests": len(user)} | {m: round(v, 4) for m, v in judge_lists(items, on).items()}
        rows.append({"system": system, "case": case, "metrics": metrics | {"NDCG@10_ci": [round(float(low[i]), 4), round(float(high[i]), 4)]}})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Train, choose on validation, report on the hold-out."""
    parser = arguments(__doc__)
    parser.add_argument("--source", choices=FILES, default="retailrocket", help="the files' format")
    parser.add_argument("--path", type=Path, help="folder of the raw files; without it nothing is measured")
    parser.add_argument("--grade", type=int, choices=(1, 2, 3), default=3, help="relevant is what was at least viewed, carted or bought")
    parser.add_argument("--test-looks", type=int, default=1, help="how often this hold-out has been looked at, this time included")
    args, settings = parser.parse_args(argv), load_settings()
    if args.quick:
        sim = simulate(500, 200, 10_000, days=70, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7)
        shop, args.grade = index_shop(sim.interactions, sim.catalog), 1
        settings = quickly(settings)
    elif args.path: shop = read_shop(args.source, args.path, settings)
    else: return print("frontier: nothing measured; it needs --path with raw files, and --source for their format")
    cuts = cutoffs_of(shop, settings)
    ranker = train_ranker(shop, cuts, settings)
    rows, chosen = [], Strengths()
    for case, at in (("validation", cuts.validation), ("hold-out", cuts.holdout)):
        moment = fit_moment(shop, epoch_ms(at), settings)
        on, c, user = judged(shop, at, cuts.label_end(at), moment, ranker, settings, args.grade)
        make = maker(shop, moment, on, settings)
        if case == "validation": chosen = choose_point(frontier(on, make, {}, settings.rerank.max_loss), settings.rerank.max_loss)
        lists = {name: shown_lists(make(s), on.indptr, on.item, on.log_odds, on.h, 10)
                 for name, s in (("reco", chosen), ("by relevance alone", Strengths()))}
        if "als" in c.sources: lists["als"] = als_lists(on, c, make(Strengths()))
        rows += rows_of(on, lists, user, case)
    point = {"diversity": chosen.diversity, "tail": chosen.tail, "new": chosen.new, "keep_first": chosen.keep_first}
    for r in rows:
        if r["system"] == "reco": r["metrics"] |= point
    write("frontier", rows, args.results, args.test_looks, argv)
    if not args.quick: render()


if __name__ == "__main__": main()
