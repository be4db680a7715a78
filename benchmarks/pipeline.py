"""`recommend` in process, one request after the other, beside the floor: LightGBM's `predict` on the very same rows.

What it leaves out: HTTP, several requests at once, and catalogues beyond the simulated one.
"""

import time
from datetime import UTC, datetime

from benchmarks.base import arguments, percentiles, render, write
from reco.bundle import make_bundle
from reco.data.histories import epoch_ms
from reco.data.shop import index_shop
from reco.data.simulator import simulate
from reco.moment import ranker_rows
from reco.pipeline import RecommendationRequest, recommend, request_history
from reco.ranking.training import cutoffs_of, train_ranker
from reco.settings import load_settings


def measure(call, inputs: list) -> list[float]:
    """Seconds of each call; the first tenth warms up and is not counted."""
    seconds = []
    for x in inputs:
        began = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - began)
    return seconds[len(inputs) // 10 :]


def main() -> None:
    """Train on a simulated shop, then time known shoppers and strangers."""
    args = arguments(__doc__).parse_args()
    size = (500, 200, 10_000) if args.quick else (50_000, 20_000, 1_000_000)
    n, settings, end = (50 if args.quick else 2_000), load_settings(), datetime(2026, 5, 1, tzinfo=UTC)
    sim = simulate(*size, days=90, end=end, seed=7)
    shop = index_shop(sim.interactions, sim.catalog)
    ranker = train_ranker(shop, cutoffs_of(shop, settings), settings)
    bundle = make_bundle(shop, epoch_ms(end), ranker, settings, {"id": "benchmark"})
    known = [RecommendationRequest(u, 10, end) for u in shop.users.ids.sample(n, seed=1, with_replacement=True)]
    strangers = [RecommendationRequest(f"stranger {i}", 10, end) for i in range(n)]
    rows = [ranker_rows(bundle.moment, request_history(r, bundle))[1] for r in known]
    case = f"{size[1]:,} items, {sum(map(len, rows))/n:.0f} candidates, {ranker.booster.num_trees()} trees"
    results = [("reco", f"known shopper, {case}", measure(lambda r: recommend(r, bundle), known)),
               ("reco", "stranger", measure(lambda r: recommend(r, bundle), strangers)),
               ("LightGBM predict alone", f"the same rows, {case}", measure(ranker.margin, rows))]
    write("pipeline", [{"system": s, "case": c, "metrics": percentiles(t)} for s, c, t in results], args.results)
    if not args.quick: render()


if __name__ == "__main__": main()
