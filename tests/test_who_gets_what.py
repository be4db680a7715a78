"""Three surfaces, every user, every item: one test for each row of `docs/who_gets_what.md`, named by the row's id."""

import re
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import polars as pl
import pytest
from conftest import END

from reco.bundle import ModelBundle, make_bundle
from reco.data.histories import epoch_ms
from reco.data.shop import index_shop
from reco.pipeline import recommend
from reco.request import RecommendationRequest, RecommendationResponse, UserEvent
from reco.reranking.rulebook import RuleBook
from reco.schemas import SURFACES

TABLE = (Path(__file__).parents[1] / "docs" / "who_gets_what.md").read_text()
TEXT, BARE = "zz_text", "zz_bare"  # items that join the shop on its last day; the first is a bestseller's twin in words
TOMORROW = "zz_tomorrow"  # in the catalogue's files, but from a later day on


@pytest.fixture(scope="module")
def twin(trained) -> str:
    """The item in stock that most shoppers touched."""
    sold = trained.sim.catalog.sort("valid_from").group_by("item_id").last().filter("available")
    return trained.sim.interactions.join(sold, on="item_id", how="semi")["item_id"].mode().sort()[0]


@pytest.fixture(scope="module")
def bundle(trained, twin) -> ModelBundle:
    """The trained shop with two new items: one with a text and nothing else, one with nothing at all."""
    one, began = trained.sim.catalog.filter(item_id=twin).sort("valid_from").tail(1), END - timedelta(days=1)
    empty = one.with_columns(pl.lit(None, t).alias(c) for c, t in one.schema.items() if c not in ("item_id", "valid_from", "available"))
    new = empty.with_columns(valid_from=pl.lit(began), created_at=pl.lit(began), available=pl.lit(True)).cast(one.schema)
    text = new.with_columns(item_id=pl.lit(TEXT), title=pl.lit(one["title"][0]), description=pl.lit(one["description"][0], pl.String))
    later = text.with_columns(item_id=pl.lit(TOMORROW), valid_from=pl.lit(END + timedelta(days=1)))
    shop = index_shop(trained.sim.interactions, pl.concat([trained.sim.catalog, text, new.with_columns(item_id=pl.lit(BARE)), later.cast(one.schema)]))
    return make_bundle(shop, epoch_ms(END), trained.rankers, trained.settings, {"id": "cases"}, choices=trained.choices)


@pytest.fixture(scope="module")
def stock(bundle) -> list[str]:
    """Old items that can be bought."""
    return [i for i in bundle.items.filter(pl.col("available").fill_null(True))["item_id"] if i not in (TEXT, BARE, TOMORROW)]


def ask(bundle, surface="for_you", context=(), user=None, k=10, events=(), store=None, **more) -> RecommendationResponse:
    """One answer; nothing of the page or cart is ever in it, nothing twice, and scores are chances."""
    asked = RecommendationRequest(user, k, END, events, surface, () if surface == "for_you" else context, **more)
    got = recommend(asked, bundle, store)
    ids = ids_of(got)
    assert len(ids) == len(set(ids)) <= k and not set(ids) & set(asked.context_items) and all(0 < i.score < 1 for i in got.items)
    return got


def ids_of(answer) -> list[str]: return [i.item_id for i in answer.items]
def sources_of(answer) -> set[str]: return {i.source for i in answer.items}
def views(*ids, event="view") -> list[UserEvent]: return [UserEvent(i, event, END - timedelta(minutes=len(ids) - n)) for n, i in enumerate(ids)]
def everywhere(bundle, context, **asked) -> dict[str, RecommendationResponse]: return {s: ask(bundle, s, context, **asked) for s in SURFACES}


def test_every_row_has_a_test_and_every_test_a_row():
    rows = re.findall(r"^\| `([a-z-]+)` \|", TABLE, re.MULTILINE)
    tests = [name.removeprefix("test_row_").replace("_", "-") for name in globals() if name.startswith("test_row_")]
    assert len(rows) > 10 and len(rows) == len(set(rows)) and rows == tests


def test_row_known_shopper(trained, bundle, twin, store):
    alone = everywhere(bundle, [twin])
    for user in trained.shop.users.ids.sample(5, seed=3):
        got = everywhere(bundle, [twin], user=user, store=store)
        assert all(len(a.items) == 10 and not a.fallback and not a.degraded for a in got.values())
        assert ids_of(got["for_you"]) != ids_of(alone["for_you"])
        assert sources_of(got["for_you"]) - {"popularity"}
        assert any(ids_of(got[s]) != ids_of(alone[s]) for s in SURFACES[1:])  # the past counts in front of a page or cart, too


def test_row_one_event(bundle, twin, stock):
    one = views(stock[7])
    got, stranger = everywhere(bundle, [twin], events=one, user="newcomer"), everywhere(bundle, [twin])
    assert all(len(a.items) == 10 and not a.fallback for a in got.values())
    assert ids_of(got["for_you"]) != ids_of(stranger["for_you"]) and sources_of(got["for_you"]) - {"popularity"}


def test_row_ten_thousand_events(bundle, twin, stock):
    many = [UserEvent(stock[n * n % len(stock)], "view", END - timedelta(seconds=10_001 - n)) for n in range(10_000)]
    latest = many[-bundle.max_history :]
    for surface in SURFACES:
        answer, took = ask(bundle, surface, [twin], events=many), []
        assert len(answer.items) == 10 and answer == ask(bundle, surface, [twin], events=latest)
        for _ in range(5):
            began = time.perf_counter()
            ask(bundle, surface, [twin], events=many)
            took.append(time.perf_counter() - began)
        assert median(took) < 0.5, f"{surface}: {took}"


def test_row_anonymous_with_events(bundle, twin, stock):
    looked = views(*stock[20:24])
    got, named = everywhere(bundle, [twin], events=looked), everywhere(bundle, [twin], events=looked, user="somebody")
    assert got == named and not got["for_you"].fallback and ids_of(got["for_you"]) != ids_of(ask(bundle))


def test_row_anonymous(bundle, twin):
    got = everywhere(bundle, [twin])
    assert [len(a.items) for a in got.values()] == [10] * 3
    assert got["for_you"].fallback and sources_of(got["for_you"]) == {"popularity"}
    assert not got["similar"].fallback and not got["bought_together"].fallback
    assert sources_of(got["similar"]) - {"popularity"} and sources_of(got["bought_together"]) - {"popularity"}


def test_row_unknown_user(bundle, twin, store):
    got = everywhere(bundle, [twin], user="nobody has this id", store=store)
    assert got == everywhere(bundle, [twin]) and not any(a.degraded for a in got.values())


def test_row_old_item(bundle, twin, stock):
    got = everywhere(bundle, [twin], events=views(stock[3]))
    assert twin in ids_of(ask(bundle, k=100))
    assert sources_of(got["similar"]) & {"covisit", "two_steps", "session_knn", "item_item"}
    assert sources_of(got["bought_together"]) & {"copurchase", "session_knn", "item_item"}


def test_row_sold_out_item(trained, bundle):
    gone = bundle.items.filter(~pl.col("available"))["item_id"].to_list()
    seen = trained.sim.interactions.filter(pl.col("item_id").is_in(gone))["item_id"].mode().sort()[0]
    got = everywhere(bundle, [seen], events=views(seen), k=50)
    assert gone and all(not set(ids_of(a)) & set(gone) for a in got.values())
    assert not got["similar"].fallback and sources_of(got["similar"]) & {"covisit", "two_steps", "session_knn", "item_item"}


def test_row_text_only_item(bundle, twin, stock):
    got = everywhere(bundle, [TEXT])
    assert all(len(a.items) == 10 for a in got.values()) and not got["similar"].fallback and not got["bought_together"].fallback
    assert twin in ids_of(got["similar"])[:3] and ids_of(got["similar"]) != ids_of(ask(bundle, "similar", [BARE]))
    assert twin in ids_of(ask(bundle, "similar", [TEXT], events=views(*stock[:20])))[:3]  # whoever looks
    shown = {i.item_id: i.source for i in ask(bundle, events=views(stock[3], twin), k=100).items}
    beside = {i.item_id: i.source for i in ask(bundle, "similar", [twin], k=100).items}
    assert shown[TEXT] == beside[TEXT] == "content"  # nobody ever touched it
    assert len(ask(bundle, events=views(TEXT)).items) == 10 and not ask(bundle, events=views(TEXT)).fallback


def test_row_bare_item(bundle, twin):
    got = everywhere(bundle, [BARE])
    assert all(len(a.items) == 10 for a in got.values()) and not got["similar"].fallback
    assert "popularity" in sources_of(got["similar"]) and {*sources_of(got["similar"]), *sources_of(got["bought_together"])} <= {"popularity", "content"}
    assert BARE not in ids_of(ask(bundle, k=100)) and len(ask(bundle, events=views(BARE)).items) == 10
    only = everywhere(bundle, [twin], filter=f"item:{BARE}")
    assert [(i.item_id, i.source) for a in only.values() for i in a.items] == [(BARE, "rest")] * 3  # where it is asked for, it is there


def test_row_unknown_item(bundle, twin):
    home = ask(bundle)
    for surface in SURFACES[1:]:
        for strange in ("an item of nobody", TOMORROW):
            got = ask(bundle, surface, [strange])
            assert got.fallback and got.items == home.items
    assert ask(bundle, events=views("an item of nobody", TOMORROW)) == home and TOMORROW not in ids_of(ask(bundle, k=100))


def test_row_basket_of_one(bundle, stock):
    got = everywhere(bundle, [stock[11]], k=20)
    assert all(len(a.items) == 20 for a in got.values()) and ids_of(got["bought_together"]) != ids_of(ask(bundle, "bought_together", [stock[12]], k=20))


def test_row_basket_of_several(bundle, stock):
    some, together = stock[11:15], ask(bundle, "bought_together", stock[11:15])
    assert len(together.items) == 10 and not together.fallback
    alone = [ids_of(ask(bundle, "bought_together", [i])) for i in some]
    assert ids_of(together) not in alone and together == ask(bundle, "bought_together", [*some, *some])
    assert len(ask(bundle, "similar", some).items) == 10 and len(ask(bundle, "bought_together", stock[:200], k=50).items) == 50


def test_row_basket_partly_unknown(bundle, stock):
    known, mixed = ask(bundle, "bought_together", stock[11:13]), ask(bundle, "bought_together", ["gone", *stock[11:13], "never there"])
    assert mixed == known and not known.fallback
    lost = ask(bundle, "bought_together", ["gone", "never there"])
    assert lost.fallback and lost.items == ask(bundle).items


def test_row_filtered_narrowly(bundle, twin, stock):
    """A category that few touch: all of it is there to be had, whatever was proposed."""
    sizes = bundle.items.filter(pl.col("available") & pl.col("item_id").is_in(stock)).group_by("category_id").len().sort("len", "category_id")
    for category, n in sizes.filter(pl.col("category_id").is_not_null()).head(3).rows():
        for surface, answer in everywhere(bundle, [twin], filter=f"category:{category}", k=100).items():
            there = set(bundle.items.filter(category_id=category)["item_id"]) & set(stock) - ({twin} if surface != "for_you" else set())
            assert set(ids_of(answer)) == there and n - 1 <= len(there) <= n


def test_row_everything_filtered(bundle, twin, store):
    for answer in everywhere(bundle, [twin], user="user_1", store=store, filter="price<0").values():
        assert answer.items == [] and answer.dropped["filtered"] > 0 and not answer.degraded
    with pytest.raises(ValueError, match="no item has category 'unheard of'"): ask(bundle, filter="category:unheard of")


def test_row_more_than_there_is(bundle, twin, stock):
    assert [len(a.items) for a in everywhere(bundle, [twin], k=100).values()] == [100] * 3
    three = [i for i in stock if i != twin][40:43]
    for answer in everywhere(bundle, [twin], k=100, filter=f"item:{'|'.join([*three, twin])}").values():
        assert set(three) <= set(ids_of(answer)) <= {*three, twin}


def test_row_bought_everything(bundle, twin, stock):
    held = {i for i, days in zip(bundle.items["item_id"], bundle.kept.hold[:bundle.items.height], strict=True) if days > 0 and i in stock}
    bought = sorted(held - {twin})[: bundle.max_history]
    done = views(*bought, event="transaction")
    for answer in everywhere(bundle, [twin], events=done, k=20).values():
        assert len(answer.items) == 20 and not set(ids_of(answer)) & set(bought)  # what is left fills the list
    for answer in everywhere(bundle, [twin], events=done, filter=f"item:{'|'.join(bought[:100])}").values():
        assert answer.items == [] and answer.dropped["recently_bought"] > 0


def test_row_pinned_item(bundle, twin, stock):
    at = {"similar": BARE, "for_you": BARE, "bought_together": TEXT}
    pins = [{"item": i, "slot": 2, "surfaces": [s]} for s, i in at.items()] + [{"item": "nobody knows it", "slot": 3}, {"item": twin, "slot": 4},
                                                                                            {"item": TOMORROW, "slot": 5}]
    later = [{"item": stock[30], "slot": 1, "from": END + timedelta(days=1)}]
    pinned = replace(bundle, kept=replace(bundle.kept, book=RuleBook.model_validate({"pin": pins + later})))
    assert pinned.reranker.compiled.unknown == ("item:nobody knows it", f"item:{TOMORROW}")
    plain = everywhere(bundle, [twin])
    for surface, answer in everywhere(pinned, [twin]).items():
        second = answer.items[1]
        assert second.item_id == at[surface] and 0 < second.score < 1 and len(answer.items) == 10
        assert second.source == ("pin" if at[surface] == BARE else "content")  # its own source, if one proposed it
        if surface == "for_you": assert answer.items[3].item_id == twin
        others = {i.item_id: i.score for i in plain[surface].items}
        assert all(i.score == pytest.approx(others[i.item_id], abs=0.02) for i in answer.items if i.item_id in others)
        assert answer.dropped["pins_not_shown"] == (surface != "for_you")  # what is on the page is not pinned to its list
        assert answer.dropped["filtered"] == 0
    assert ids_of(ask(pinned, k=1)) == ids_of(ask(bundle, k=1))  # there is no second slot
