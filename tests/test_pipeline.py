"""`recommend` on every kind of request, and the bundle that it stands on."""

import json
import shutil
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from conftest import END
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.bundle import BundleError, latest_bundle, load_bundle, save_bundle
from reco.evaluation.backtest import backtest, judged_requests
from reco.pipeline import recommend
from reco.published import publish
from reco.request import RecommendationRequest, UserEvent


def ask(bundle, user="user_1", k=10, events=(), now=END, store=None):
    return recommend(RecommendationRequest(user, k, now, events), bundle, store)


def test_everyone_gets_a_list_with_falling_scores(trained, bundle, store):
    for user in [*trained.shop.users.ids.sample(50, seed=1), "nobody", "", None, "ü/../\x00", "\ud800", "x" * 10_000]:
        answer = ask(bundle, user, store=store)
        got = answer.items
        assert not answer.degraded and answer.fallback == (user not in trained.shop.users.ids)
        scores = [i.score for i in got]
        assert len(got) == 10 == len({i.item_id for i in got})
        assert scores == sorted(scores, reverse=True) and 0 <= scores[-1] <= scores[0] <= 1


@pytest.mark.parametrize("k", [0, -1, 101])
def test_k_outside_its_range_is_refused(bundle, k):
    with pytest.raises(ValueError, match=f"from 1 to 100, not {k}"): ask(bundle, k=k)


def test_a_long_list_is_as_long_as_asked(bundle):
    assert len(ask(bundle, "nobody", k=100).items) == 100


def test_rules_hold_in_every_list(trained, bundle, store):
    sold_out = set(bundle.items.filter(~pl.col("available"))["item_id"])
    category = dict(bundle.items.select("item_id", "category_id").iter_rows())
    held = pl.DataFrame({"item_id": bundle.items["item_id"], "days": bundle.kept.hold[:bundle.items.height]})
    bought = dict(trained.sim.interactions.filter(pl.col("event") == "transaction").join(held, on="item_id", how="left").filter(
        pl.col("ts") >= END - pl.duration(seconds=(pl.col("days") * 86_400).cast(pl.Int64))).group_by("user_id").agg("item_id").iter_rows())
    assert sold_out and bought
    dropped = 0
    for user in list(bought)[:40]:
        answer = ask(bundle, user, store=store)
        got = [i.item_id for i in answer.items]
        assert not sold_out & set(got) and not set(bought[user]) & set(got)
        assert max(map([category[i] for i in got].count, {category[i] for i in got})) <= bundle.rules.category_cap + answer.dropped["category_cap_raised"]
        dropped += answer.dropped["recently_bought"]
    assert dropped > 0


def test_an_unknown_item_in_the_history_is_ignored(bundle):
    odd = [UserEvent("an item of tomorrow", "view", END - timedelta(minutes=1))]
    assert ask(bundle, "nobody", events=odd) == ask(bundle, "nobody")


def test_an_unknown_event_type_is_refused(bundle):
    with pytest.raises(ValueError, match="not 'wishlist'"):
        ask(bundle, events=[UserEvent("product_1", "wishlist", END - timedelta(minutes=1))])


def test_a_heavy_shopper_is_served(bundle):
    ids = bundle.items["item_id"]
    events = [UserEvent(ids[i % len(ids)], "view", END - timedelta(seconds=10_001 - i)) for i in range(10_000)]
    assert len(ask(bundle, "robot", events=events).items) == 10


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 100), touched=st.lists(st.tuples(st.integers(0, 299), st.sampled_from(["click", "view", "addtocart", "transaction"]),
                                                         st.integers(-3600, 10**7)), max_size=30))
def test_any_history_gets_a_valid_list(bundle, k, touched):
    ids = bundle.items["item_id"]
    events = [UserEvent(ids[i % len(ids)], e, END - timedelta(seconds=s)) for i, e, s in touched]
    got = ask(bundle, "someone", k, events).items
    assert 0 < len(got) <= k and len({i.item_id for i in got}) == len(got)
    assert all(a.score >= b.score for a, b in zip(got, got[1:], strict=False))


def test_a_reloaded_bundle_answers_the_same(trained, bundle, bundle_root, store):
    again = load_bundle(latest_bundle(bundle_root))
    for user in trained.shop.users.ids.sample(20, seed=2): assert ask(again, user, store=store) == ask(bundle, user, store=store)


@pytest.fixture
def copy(bundle_root, tmp_path):
    """A bundle of one's own to damage."""
    return shutil.copytree(latest_bundle(bundle_root), tmp_path / "bundle")


def truncate(folder): (folder / "rankers/for_you/ranker.txt").write_bytes((folder / "rankers/for_you/ranker.txt").read_bytes()[:-100])
def remove(folder): (folder / "state" / "price.npy").unlink()
def add(folder): (folder / "notes.txt").write_text("hello")
def no_manifest(folder): (folder / "manifest.json").write_text("{")


def other_features(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["features_hash"] = "0" * 12
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("damage", "says"), [(truncate, "wrong checksum: ['rankers/for_you/ranker.txt']"), (remove, "missing: ['state/price.npy']"),
                                              (add, "does not know: ['notes.txt']"), (no_manifest, "no readable manifest"),
                                              (other_features, "other features")])
def test_a_damaged_bundle_is_refused(copy, damage, says):
    load_bundle(copy)
    damage(copy)
    with pytest.raises(BundleError) as e: load_bundle(copy)
    assert says in str(e.value)


def test_a_failed_save_leaves_nothing(bundle, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError("disk full")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="disk full"): save_bundle(bundle, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_publishing_moves_what_is_served(bundle_root, tmp_path):
    with pytest.raises(BundleError, match=r"flows/promote\.py run"): latest_bundle(tmp_path)
    for name in ("one", "two"): shutil.copytree(latest_bundle(bundle_root), tmp_path / name)
    publish(tmp_path / "one")
    publish(tmp_path / "two")
    assert latest_bundle(tmp_path).name == "two" and {p.name for p in tmp_path.iterdir()} == {"one", "two", "current", "published.jsonl"}


def test_the_pipeline_beats_every_single_source(trained):
    """On the hold-out of the simulated shop, counting everything touched; purchases are too few here to tell."""
    table = backtest(trained.shop, trained.cutoffs, trained.ranker, trained.settings, grade=1).filter(slice="all")
    score = dict(table.select("system", "NDCG@10").iter_rows())
    assert score["pipeline"] > max(v for s, v in score.items() if s != "pipeline"), score


def test_the_evaluation_samples_only_what_can_be_judged(trained):
    """Buyers are few: a sample of all requests would leave next to none of them."""
    few = trained.settings.model_copy(update={"train": trained.settings.train.model_copy(update={"max_requests": 20})})
    every, some = (judged_requests(trained.shop, trained.cutoffs, s, grade=3) for s in (trained.settings, few))
    assert every.height > 40 and some.height == 20 and some.join(every, on=every.columns, how="anti").is_empty()
    bought = trained.sim.interactions.filter((pl.col("event") == "transaction") & (pl.col("ts") >= trained.cutoffs.holdout))
    last = dict(bought.group_by("user_id").agg(pl.col("ts").max()).iter_rows())
    who = trained.shop.users.external(every["user_idx"].to_numpy())
    assert all(last[user] >= asof for user, asof in zip(who, every["asof"], strict=True))
