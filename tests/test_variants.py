"""Variants of a bundle: the lists of a bundle made with those settings, in the memory of the one they came from, and up to date with the shop."""

import numpy as np
import pytest

from reco.bundle import load_bundle, make_bundle, save_bundle
from reco.data.histories import epoch_ms
from reco.features.live import LiveItem
from reco.newest import Newest
from reco.pipeline import question_of, recommend
from reco.request import RecommendationRequest
from reco.reranking.lists import Strengths
from reco.settings import Bundles, Explore, Rerank
from reco.variants import family, members, strengths_with, varied

FOUND = Strengths(diversity=0.5, tail=0.3, new=0.2, keep_first=1)


def bundle_with(trained, tmp_path, strengths: Strengths = FOUND, rerank: Rerank | None = None, **rules: object):
    settings = trained.settings.model_copy(update={"rerank": rerank or Rerank(), "rules": trained.settings.rules.model_copy(update=rules),
                                                   "bundles": Bundles(new_items=5)})
    about = {"git_sha": "test", "metrics": []}
    made = make_bundle(trained.shop, epoch_ms(trained.cutoffs.end), trained.rankers, settings, about, strengths=strengths, choices=trained.choices)
    return load_bundle(save_bundle(made, tmp_path / "bundles"))


def lists(bundle, store, trained, **more: object) -> list[list[str]]:
    users = sorted(store.user_ids())[:40]
    return [[x.item_id for x in recommend(RecommendationRequest(u, 12, trained.cutoffs.end, **more), bundle, store).items] for u in users]


@pytest.fixture
def bundle(trained, tmp_path): return bundle_with(trained, tmp_path)


@pytest.mark.parametrize("changes", [
    {"rerank": {"diversity": 3.0}}, {"rerank": {"tail": 4.0, "new": 2.0, "new_days": 30.0}}, {"rules": {"exclude_out_of_stock": False, "category_cap": 1}},
    {"rules": {"boost_discount": 5.0}, "rerank": {"diversity": 0.0, "method": "dpp"}}])
def test_a_variant_answers_as_a_bundle_made_with_its_settings(trained, bundle, store, tmp_path, changes):
    found = lists(varied(bundle, changes), store, trained)
    strengths = strengths_with(FOUND, changes.get("rerank", {}))
    alone = bundle_with(trained, tmp_path / "alone", strengths, Rerank(**changes.get("rerank", {})), **changes.get("rules", {}))
    assert found == lists(alone, store, trained)
    assert found != lists(bundle, store, trained)


def test_what_a_variant_does_not_name_stays_as_it_was_found():
    assert strengths_with(FOUND, {"diversity": 2.0, "method": "dpp", "tail": "auto"}) == Strengths(2.0, 0.3, 0.2, 1)
    assert strengths_with(FOUND, {}) == FOUND


def test_the_same_changes_are_the_same_variant_and_none_is_the_bundle(bundle):
    assert varied(bundle, {}) is bundle and varied(bundle, {"rules": {}}) is bundle and not family(bundle)
    a = varied(bundle, {"rerank": {"tail": 1.0, "diversity": 2.0}})
    assert a is varied(bundle, {"rerank": {"diversity": 2.0, "tail": 1.0}, "explore": {}}) and members(bundle) == [bundle, a]
    assert a.id == bundle.id and a.variant and not bundle.variant


def test_memory_is_shared(bundle):
    a = varied(bundle, {"rerank": {"diversity": 2.0}, "rules": {"category_cap": 1}})
    assert a.moment is bundle.moment and a.ids is bundle.ids and a.rankers is bundle.rankers and a.reranker.vectors is bundle.reranker.vectors
    assert a.reranker.compiled.at is bundle.reranker.compiled.at and not np.shares_memory(a.reranker.fair, bundle.reranker.fair)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_the_shop_says_reaches_every_variant(trained, bundle, store, when):
    changes = {"rules": {"boost_discount": 5.0}, "rerank": {"new": 8.0, "keep_first": 0}}
    ready = varied(bundle, changes) if when == "before" else None
    now, newest, like = epoch_ms(trained.cutoffs.end), Newest(bundle), bundle.items.row(int(np.flatnonzero(bundle.moment.known)[0]), named=True)
    gone, cheap = bundle.ids.external(np.flatnonzero(bundle.moment.known & bundle.moment.state.available)[:2])
    newest.take([LiveItem(gone, 1, now, available=False), LiveItem(cheap, 2, now, price=1.0, discount=0.9),
                 LiveItem("late", 3, now, now, title="late", category_id=like["category_id"], brand="A new brand", price=2.0, available=True)])
    while newest.waiting: newest.bring_in_one()
    variant = ready or varied(bundle, changes)
    i, known = bundle.ids.get("late"), bundle.reranker.compiled.at
    assert variant.reranker.is_new[i] and variant.reranker.fair[i] == pytest.approx(8) and bundle.reranker.fair[i] == pytest.approx(0.2)
    assert variant.reranker.compiled.odds[bundle.ids.get(cheap)] == pytest.approx(np.log1p(5 * 0.9))
    assert not variant.reranker.compiled.available[bundle.ids.get(gone)] and known.names["brand"][-1] == "A new brand"
    shown = {x for one in lists(variant, store, trained, filter="brand:A new brand") for x in one}
    assert shown == {"late"} and gone not in {x for one in lists(variant, store, trained) for x in one}


def test_kept_lists_of_variants_are_apart(bundle):
    asked = RecommendationRequest("u", 5)
    a, b = varied(bundle, {"rerank": {"diversity": 2.0}}), varied(bundle, {"rerank": {"diversity": 3.0}})
    assert len({question_of(asked, x) for x in (bundle, a, b)}) == 3
    exploring = varied(bundle, {"explore": Explore(epsilon=0.5).model_dump()})
    assert question_of(RecommendationRequest("u", 5, request_id="r"), exploring) == "" != question_of(RecommendationRequest("u", 5, request_id="r"), bundle)
