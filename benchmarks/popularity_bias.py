"""Popularity bias in the ranker's training: what labels weighted by inverse popularity buy and cost, on the validation cutoff only.

What many touch is touched again because it is shown and linked everywhere, so a ranker that learns from touches learns to repeat it. A list is
weighted by the mean of (1 + shoppers of the last 30 days)^-power over the items that were touched; power 0 is the product. The trees are
trained on the cutoffs before and stopped by the latest of them; nothing is chosen on what is judged here. There is no position bias to
correct: examples are candidates with what was then done, not lists that were shown.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.base import arguments, quickly, render, write
from benchmarks.frontier import judged, maker, rows_of
from reco.data.histories import epoch_ms
from reco.data.raw_shop import read_shop
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.sources import FILES
from reco.data.split import Cutoffs
from reco.moment import fit_moment
from reco.ranking.choosing import binned, boosted
from reco.ranking.examples import Examples
from reco.ranking.lambdamart import Ranker
from reco.ranking.training import cutoffs_of, examples_at
from reco.reranking.lists import Strengths, shown_lists
from reco.settings import Settings, load_settings

POWERS = 0.0, 0.25, 0.5, 1.0


def weights(examples: Examples, power: float) -> np.ndarray:
    """One weight per row (float64), the same within a list, 1 on average over the lists."""
    request = np.repeat(np.arange(len(examples.sizes)), examples.sizes)
    hit = examples.label > 0
    rarity = (1 + np.nan_to_num(examples.rows[:, examples.features.index("item_users_30d")])) ** -power
    of_list = np.bincount(request[hit], rarity[hit], len(examples.sizes)) / np.bincount(request[hit], minlength=len(examples.sizes))
    return np.repeat(of_list / of_list.mean(), examples.sizes)


def rankers(shop: ShopData, cutoffs: Cutoffs, settings: Settings) -> dict[float, Ranker]:
    """Power → ranker, all from the same examples."""
    if len(cutoffs.train) < 2: sys.exit(f"two training cutoffs are needed, there are {len(cutoffs.train)}: more days of events")
    *parts, last = (examples_at(shop, c, cutoffs.label_end(c), settings, ("for_you",))["for_you"] for c in cutoffs.train)
    train = parts[0]
    for p in parts[1:]: train = train + p
    out = {}
    for power in POWERS:
        data = binned(train).set_weight(weights(train, power))
        booster = boosted(data, binned(last, data), settings.ranking, settings.project.seed)
        out[power] = Ranker(booster, train.features, 1.0, 0.0)
    return out


def main(argv: list[str] | None = None) -> None:
    """Train with each power, judge all on the validation cutoff."""
    parser = arguments(__doc__)
    parser.add_argument("--source", choices=FILES, default="retailrocket", help="the files' format")
    parser.add_argument("--path", type=Path, help="folder of the raw files; without it nothing is measured")
    parser.add_argument("--grade", type=int, choices=(1, 2, 3), default=1, help="relevant is what was at least viewed, carted or bought")
    args, settings = parser.parse_args(argv), load_settings()
    if args.quick:
        sim = simulate(500, 200, 10_000, days=70, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7)
        shop, settings = index_shop(sim.interactions, sim.catalog), quickly(settings)
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"cutoffs": 3})})
    elif args.path: shop = read_shop(args.source, args.path, settings)
    else: return print("popularity_bias: nothing measured; it needs --path with raw files, and --source for their format")
    cutoffs = cutoffs_of(shop, settings)
    learned, at = rankers(shop, cutoffs, settings), cutoffs.validation
    moment, lists = fit_moment(shop, epoch_ms(at), settings), {}
    for power, ranker in learned.items():
        on, _, user = judged(shop, at, cutoffs.label_end(at), moment, ranker, settings, args.grade)
        plain = maker(shop, moment, on, settings)(Strengths())
        lists["reco" if power == 0 else f"weighted by popularity^-{power:g}"] = shown_lists(plain, on.indptr, on.item, on.log_odds, on.h, 10)
    write("popularity_bias", rows_of(on, lists, user, "validation"), args.results, argv=argv)
    if not args.quick: render()


if __name__ == "__main__": main()
