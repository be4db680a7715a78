"""`recommend` in process, one request after the other, beside the floor: LightGBM's `predict` on the very same rows.

Pasts come from an embedded online store; once more with them in the request, without a store; once more with newer item features
in the store.

What it leaves out: HTTP, several requests at once, and catalogues beyond the simulated one.
"""

import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.base import arguments, folder_with_store, percentiles, render, write
from reco.bundle import make_bundle
from reco.data.histories import epoch_ms
from reco.data.shop import index_shop
from reco.data.simulator import simulate
from reco.features.store import Past, open_store
from reco.moment import ranker_rows
from reco.pipeline import recommend
from reco.ranking.lambdamart import Ranker
from reco.ranking.training import cutoffs_of, train_ranker
from reco.request import RecommendationRequest, UserEvent, request_history
from reco.schemas import EVENTS
from reco.settings import Settings, load_settings


def measure(call, inputs: list) -> list[float]:
    """Seconds of each call; the first tenth warms up and is not counted."""
    seconds = []
    for x in inputs:
        began = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - began)
    return seconds[len(inputs) // 10 :]


def one_thread(ranker: Ranker):
    """LightGBM's own way to score; its threads would cost more than they bring for a few hundred rows."""
    return lambda rows: ranker.booster.predict(rows, num_threads=1)


def main() -> None:
    """Train on a simulated shop, then time known shoppers and strangers."""
    args = arguments(__doc__).parse_args()
    size = (500, 200, 10_000) if args.quick else (50_000, 20_000, 1_000_000)
    n, settings, end = (50 if args.quick else 2_000), load_settings(), datetime(2026, 5, 1, tzinfo=UTC)
    sim = simulate(*size, days=90, end=end, seed=7)
    shop = index_shop(sim.interactions, sim.catalog)
    ranker = train_ranker(shop, cutoffs_of(shop, settings), settings)
    bundle = make_bundle(shop, epoch_ms(end), {"for_you": ranker}, settings, {"id": "benchmark"})
    known = [RecommendationRequest(u, 10, end) for u in shop.users.ids.sample(n, seed=1, with_replacement=True)]
    strangers = [RecommendationRequest(f"stranger {i}", 10, end) for i in range(n)]
    with folder_with_store() as folder:
        store = open_store(Settings(root=Path(folder), train=settings.train))
        store.append(sim.interactions)
        pasts = store.events_many([r.user_id for r in known])
        carried = [RecommendationRequest(None, 10, end, [UserEvent(e.item_id, EVENTS[e.event], datetime.fromtimestamp(e.ts / 1000, UTC))
                                                         for e in past]) for past in pasts]
        rows = [ranker_rows(bundle.moment, request_history(r, bundle, Past.of(past)))[1] for r, past in zip(known, pasts, strict=True)]
        case = f"{size[1]:,} items, {sum(map(len, rows))/n:.0f} candidates, {ranker.booster.num_trees()} trees"
        results = [("reco", f"known shopper, {case}", measure(lambda r: recommend(r, bundle, store), known)),
                   ("reco", "the past in the request, no store", measure(lambda r: recommend(r, bundle), carried)),
                   ("reco", "stranger", measure(lambda r: recommend(r, bundle, store), strangers)),
                   ("reco", "scoring alone, the same rows", measure(ranker.margin, rows)),
                   ("LightGBM predict alone", f"the same rows, {case}", measure(one_thread(ranker), rows))]
        store.put_rows("newer", bundle.ids.ids.to_list(), bundle.moment.per_item[:len(bundle.items)])
        store.activate(bundle.id, "newer", bundle.moment.asof + 1)
        results.insert(1, ("reco", "known shopper, item features from the store too", measure(lambda r: recommend(r, bundle, store), known)))
        store.close()
    write("pipeline", [{"system": s, "case": c, "metrics": percentiles(t)} for s, c, t in results], args.results)
    if not args.quick: render()


if __name__ == "__main__": main()
