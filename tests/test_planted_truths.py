"""What the simulator planted, the pipeline finds."""

from datetime import timedelta

import numpy as np
import polars as pl
from conftest import END

from reco.features.store import NOTHING
from reco.pipeline import recommend
from reco.request import RecommendationRequest, UserEvent, request_history


def test_a_planted_taste_gets_its_categories(trained, bundle, store):
    """Shoppers with a real past get the categories that were planted for them far more often than chance."""
    active = trained.sim.interactions.group_by("user_id").len().filter(pl.col("len") >= 30).sort("user_id")["user_id"].to_list()[:100]
    assert len(active) == 100
    wanted = dict(trained.sim.tastes.group_by("user_id").agg("category_id").iter_rows())
    category = dict(bundle.items.select("item_id", "category_id").iter_rows())
    share = chance = 0.0
    for user in active:
        got = [category[i.item_id] for i in recommend(RecommendationRequest(user, 10, END), bundle, store).items]
        share += np.mean([c in wanted[user] for c in got]) / len(active)
        chance += np.mean([c in wanted[user] for c in category.values()]) / len(active)
    assert share > 2.5 * chance, f"{share:.2f} of the recommendations are to taste, {chance:.2f} of the catalogue"


def test_planted_complements_come_up(trained, bundle):
    """With an item in the cart, the source `copurchase` proposes its planted complement, and the list shows it."""
    bought = trained.sim.interactions.filter(event="transaction")
    pairs = bought.join(bought, on="order_id").select("item_id", complement_id="item_id_right").unique()
    planted = trained.sim.complements.join(pairs, on=["item_id", "complement_id"]).sort("item_id", "complement_id")
    stock = set(bundle.items.filter(pl.col("available"))["item_id"])
    planted = [p for p in planted.select("item_id", "complement_id").iter_rows() if p[1] in stock]
    assert len(planted) >= 20
    proposed = shown = 0
    for item, complement in planted:
        request = RecommendationRequest("nobody yet", 20, END, [UserEvent(item, "addtocart", END - timedelta(minutes=1))])
        beside = bundle.moment.sources["copurchase"].retrieve(request_history(request, bundle, NOTHING), 5).items[0]
        proposed += bundle.ids.get(complement) in beside
        shown += complement in {i.item_id for i in recommend(request, bundle).items}
    n, chance = len(planted), 1 / len(stock)
    assert proposed / n > 30 * 5 * chance, f"{proposed} of {n} complements among 5 proposals"
    assert shown / n > 3 * 20 * chance, f"{shown} of {n} complements among 20 recommendations"


def test_a_stranger_is_served_by_what_sells_and_then_by_what_they_see(trained, bundle):
    """Without a past the popular items; after one view of a category the list turns to it."""
    category = dict(bundle.items.select("item_id", "category_id").iter_rows())
    stranger = recommend(RecommendationRequest("nobody yet", 10, END), bundle)
    assert stranger.fallback and {i.source for i in stranger.items} == {"popularity"}
    before = [category[i.item_id] for i in stranger.items]
    turned = 0
    some = bundle.items.filter(pl.col("available")).group_by("category_id", maintain_order=True).first().head(10)
    for item, own in some.select("item_id", "category_id").iter_rows():
        seen = [UserEvent(item, "view", END - timedelta(minutes=m)) for m in (3, 2)]
        after = [category[i.item_id] for i in recommend(RecommendationRequest("nobody yet", 10, END, seen), bundle).items]
        turned += after.count(own) > before.count(own)
    assert turned >= 7, f"only {turned} of {some.height} lists turned to the category that was looked at"
