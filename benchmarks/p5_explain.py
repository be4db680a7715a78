"""What explanations cost (`explain=true`): the account of the shown items, beside LightGBM's and shap's on the very same rows.

All in one process, one thread, one request after the other, with pasts from an embedded online store. `shap.TreeExplainer` hands LightGBM's
trees over to LightGBM's own account; what it adds is its checks. A ranker that learned from few requests has few trees, so the accounts are
measured once more with as many as the settings allow, grown on the same rows. The sample is what the card of a training explains. The shop
is simulated. What it leaves out: HTTP.
"""

import sys
import time

import lightgbm as lgb
import numpy as np
import shap
from threadpoolctl import threadpool_limits

from benchmarks.base import percentiles, render, write
from benchmarks.endpoint import NotServed, shop_arguments, shop_of
from benchmarks.pipeline import measure
from reco.bundle import ModelBundle, load_bundle
from reco.explain import explain
from reco.features.store import OnlineStore
from reco.pipeline import Answer, answer
from reco.ranking.contributions import contributions, walk_of
from reco.ranking.lambdamart import Ranker
from reco.ranking.shapley import shapley
from reco.request import RecommendationRequest
from reco.settings import Ranking, load_settings

K = 10


def shown_rows(a: Answer) -> np.ndarray:
    """The ranker's input of the items on the list (float32 [items, features])."""
    return a.scoring.rows[np.searchsorted(a.scoring.c.item, a.lists.items[0][a.lists.items[0] >= 0])]


def largest(ranker: Ranker, rows: np.ndarray, settings: Ranking) -> Ranker:
    """A ranker with all the trees that the settings allow, taught the other one's margins with noise."""
    noise = np.random.default_rng(0).normal(size=len(rows))
    parameters = {"num_leaves": settings.leaves, "min_data_in_leaf": 5, "verbosity": -1, "num_threads": 1, "seed": 0}
    return Ranker(lgb.train(parameters, lgb.Dataset(rows, ranker.margin(rows) + noise), settings.trees), ranker.features, 1.0, 0.0)


def accounts(ranker: Ranker) -> dict:
    """System → rows → what every column added to the margin (float64 [rows, features])."""
    walk, booster = walk_of(ranker.booster), ranker.booster
    return {"reco": lambda rows: contributions(walk, rows),
            "LightGBM pred_contrib": lambda rows: booster.predict(rows, pred_contrib=True, num_threads=1)[:, :-1],
            "shap TreeExplainer": shap.TreeExplainer(booster).shap_values}


def of_items(ranker: Ranker, rows: list[np.ndarray]) -> list[dict]:
    """The accounts of the items of each list; how far they are off the margins that they explain."""
    case = f"account of a list's {K} items, {ranker.booster.num_trees()} trees, {len(ranker.features)} columns"
    some, base, out, of = np.concatenate(rows)[:500], walk_of(ranker.booster).base, [], accounts(ranker)
    times = {name: [] for name in of}
    for x in rows:  # turn and turn about: a busy machine is busy for all of them
        for name, account in of.items():
            began = time.perf_counter()
            account(x)
            times[name].append(time.perf_counter() - began)
    warm = len(rows) // 10
    for name, account in of.items():
        off, seconds = np.abs(account(some).sum(axis=1) + base - ranker.margin(some)).max(), times[name][warm:]
        per_item = 1000 * float(np.median(np.array(seconds) / [len(x) for x in rows[warm:]]))
        metrics = percentiles(seconds) | {"ms_per_item": round(per_item, 4), "largest_error": float(f"{off:.1e}")}
        out.append({"system": name, "case": case, "metrics": metrics})
    return out


def of_requests(bundle: ModelBundle, store: OnlineStore, requests: list[RecommendationRequest]) -> tuple[list[Answer], list[dict]]:
    """The lists, and what they take without and with explanations."""
    asked = [answer(r, bundle, store) for r in requests]
    timed = {"a list": measure(lambda r: answer(r, bundle, store), requests), "its explanations": measure(explain, asked)}
    return asked, [{"system": "reco", "case": case, "metrics": percentiles(seconds)} for case, seconds in timed.items()]


def of_a_sample(ranker: Ranker, rows: np.ndarray) -> list[dict]:
    """The account of many rows, as the card of a training shows it, with what it takes to prepare."""
    case, out = f"a sample of {len(rows):,} candidates, {ranker.booster.num_trees()} trees", []
    ways = {"reco": lambda x: shapley(ranker, x, len(x))} | {n: lambda x, n=n: accounts(ranker)[n](x) for n in list(accounts(ranker))[1:]}
    for name, way in ways.items():
        began = time.perf_counter()
        way(rows)
        out.append({"system": name, "case": case, "metrics": {"seconds": round(time.perf_counter() - began, 3)}})
    return out


def main() -> int:
    """Make the shop, ask for lists, explain them three ways."""
    parser = shop_arguments(__doc__)
    parser.add_argument("--asking", type=int, default=1_000, help="shoppers who ask, one after the other")
    args = parser.parse_args()
    with threadpool_limits(1):
        try:
            with shop_of(args, 30 if args.quick else args.asking) as shop:
                bundle, store = load_bundle(shop.bundle_folder()), shop.store()
                asked, rows = of_requests(bundle, store, [RecommendationRequest(u, K) for u in shop.users])
                store.close()
        except NotServed as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
        sample = np.concatenate([a.scoring.rows for a in asked])[: 300 if args.quick else 2_000]
        for ranker in (bundle.ranker, largest(bundle.ranker, sample, load_settings().ranking)):
            rows += of_items(ranker, [shown_rows(a) for a in asked]) + of_a_sample(ranker, sample)
    write("p5_explain", rows, args.results)
    if not args.quick: render()
    return 0


if __name__ == "__main__": sys.exit(main())
