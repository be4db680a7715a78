"""Why an item is on the list: the account adds up, and the sentence is true."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import ClassVar

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
from conftest import END
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.bundle import latest_bundle, load_bundle, make_bundle
from reco.candidates.base import Retrieved
from reco.data.histories import VIEW, Histories, epoch_ms
from reco.data.shop import index_shop
from reco.explain import explain
from reco.pipeline import answer, recommend, response
from reco.ranking.contributions import contributions, walk_of
from reco.reasons import ENGLISH, Facts, Reason, in_words, named, titles_of
from reco.request import RecommendationRequest, UserEvent
from reco.reranking.rulebook import Pin, RuleBook
from reco.schemas import SURFACES
from reco.voices import loudness, one_by_one

ABOUT_THE_ITEM = {"popular", "popular_in", "trend", "trend_in", "new", "new_in", "reduced", "habits", "catalogue"}
EVENTS = ["click", "view", "addtocart", "transaction"]


def asked(bundle, user=None, k=10, events=(), surface="for_you", context=(), store=None, **more):
    """An answer and its explanations."""
    a = answer(RecommendationRequest(user, k, END, events, surface, context, **more), bundle, store)
    return a, explain(a)


def did(*what: tuple[str, str], start=60) -> list[UserEvent]:
    """Events a minute apart, the last one some minutes ago."""
    return [UserEvent(i, e, END - timedelta(minutes=start - n)) for n, (e, i) in enumerate(what)]


def checked(a, why, k=10):
    """What holds of every explanation."""
    bundle, c, ids = a.bundle, a.scoring.c, a.bundle.ids
    assert [e.item_id for e in why] == [i.item_id for i in response(a).items] and len(why) <= k
    theirs = {ids.external([i])[0] for i in a.h.item}, {ids.external([i])[0] for i in a.context}
    for e, shown in zip(why, response(a).items, strict=True):
        row = int(np.flatnonzero(c.item == ids.get(e.item_id))[0])
        assert e.sources == {s: int(c.ranks[row, j]) + 1 for j, s in enumerate(c.sources) if not np.isnan(c.ranks[row, j])}
        assert list(e.sources.values()) == sorted(e.sources.values())
        assert set(e.reason.because) <= theirs[0] | theirs[1] and e.item_id not in theirs[1] & set(e.reason.because)
        assert in_words(e.reason, titles_of(bundle)) and e.reason.template in ENGLISH
        if a.scoring.ranker is None:
            assert e.log_odds is None and e.base is None and not e.contributions and not e.groups
            continue
        assert abs(e.base + sum(x.log_odds for x in e.contributions) + e.rest - e.log_odds) < 1e-6
        assert abs(sum(e.groups.values()) + e.base - e.log_odds) < 1e-6
        assert abs(1/(1 + np.exp(-e.log_odds)) - shown.score) < 2e-6
        sizes = [abs(x.log_odds) for x in e.contributions]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) <= 5


@pytest.fixture(scope="module")
def mine(bundle):
    """LightGBM's own account of rows, in log-odds, by surface."""
    def of(a):
        r = a.scoring.ranker
        return r.slope*r.booster.predict(a.scoring.rows, pred_contrib=True, num_threads=1) + np.append(np.zeros(len(r.features)), r.intercept)
    return of


def test_everything_adds_up_for_known_shoppers(trained, bundle, store, mine):
    for user in [*trained.shop.users.ids.sample(30, seed=4), "nobody", None]:
        a, why = asked(bundle, user, store=store)
        checked(a, why)
        theirs, spread = mine(a), {}
        for e in explain(a, top=1_000):
            row = int(np.flatnonzero(a.scoring.c.item == bundle.ids.get(e.item_id))[0])
            spread[e.item_id] = {x.feature: x.log_odds for x in e.contributions}
            for j, name in enumerate(a.scoring.ranker.features):
                assert abs(spread[e.item_id].get(name, 0) - theirs[row, j]) < 1e-6
            assert e.rest == pytest.approx(0, abs=1e-9) and e.base == pytest.approx(theirs[row, -1], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 30), touched=st.lists(st.tuples(st.integers(0, 299), st.sampled_from(EVENTS), st.integers(1, 10**7)), max_size=20),
       surface=st.sampled_from(SURFACES), there=st.lists(st.integers(0, 299), min_size=1, max_size=4))
def test_any_request_is_explained(bundle, k, touched, surface, there):
    ids = bundle.items["item_id"]
    events = [UserEvent(ids[i], e, END - timedelta(seconds=s)) for i, e, s in touched]
    context = () if surface == "for_you" else [ids[i] for i in there]
    a, why = asked(bundle, "someone", k, events, surface, context)
    checked(a, why, k)
    assert why == explain(a) == asked(bundle, "someone", k, events, surface, context)[1]


@pytest.mark.parametrize(("leaves", "rounds", "width"), [(2, 5, 5), (15, 40, 5), (60, 20, 5), (60, 20, 30)])
def test_contributions_are_lightgbms(leaves, rounds, width):
    """Narrow tables make paths that ask a column again, wide ones paths of many columns."""
    rng = np.random.default_rng(leaves)
    rows = np.round(rng.normal(size=(600, width)), 1).astype(np.float32)
    rows[:, :2][rng.random((600, 2)) < .3] = np.nan
    label = np.nan_to_num(rows[:, 0])*rows[:, 3] + np.isnan(rows[:, 1]) + rows[:, 4] + np.exp(rows[:, 5:].sum(axis=1)/3)
    booster = lgb.train({"num_leaves": leaves, "min_data_in_leaf": 3, "verbosity": -1, "num_threads": 1}, lgb.Dataset(rows, label), rounds)
    some = np.where(rng.random((40, width)) < .2, np.nan, rows[:40]).astype(np.float32)
    walk, theirs = walk_of(booster), booster.predict(some, pred_contrib=True, num_threads=1)
    assert np.allclose(contributions(walk, some), theirs[:, :-1], atol=1e-9) and walk.base == pytest.approx(theirs[0, -1])


def test_a_reloaded_bundle_explains_the_same(trained, bundle, bundle_root, store):
    again = load_bundle(latest_bundle(bundle_root))
    for user in trained.shop.users.ids.sample(10, seed=2): assert asked(again, user, store=store)[1] == asked(bundle, user, store=store)[1]


def test_the_list_is_the_one_that_is_recommended(trained, bundle, store):
    for user in trained.shop.users.ids.sample(10, seed=7):
        request = RecommendationRequest(user, 10, END)
        assert response(answer(request, bundle, store)) == recommend(request, bundle, store)


def test_a_stranger_hears_of_the_items_alone(bundle):
    for user in (None, "nobody"):
        why = asked(bundle, user, k=20)[1]
        assert all(not e.reason.because and e.reason.template in ABOUT_THE_ITEM for e in why)
        assert "popular" in {e.reason.template for e in why[:3]}


def test_what_is_said_of_an_item_is_so(trained, bundle, store):
    """Every sentence is held against the log and the catalogue, not against what the pipeline computed."""
    at = bundle.items["item_id"].to_list()
    log, said = trained.sim.interactions.filter(pl.col("ts") < END), set()
    best = set(bundle.moment.sources["popularity"].items[:50].tolist())
    last = trained.sim.catalog.filter(pl.col("valid_from") < END).sort("valid_from").group_by("item_id").last()
    row, bought = {r["item_id"]: r for r in last.iter_rows(named=True)}, log.filter(event="transaction")
    for user in trained.shop.users.ids.sample(120, seed=5):
        past = log.filter(user_id=user)
        for e in asked(bundle, user, store=store)[1]:
            r, about = e.reason, row[e.item_id]
            done = set(past.filter(item_id=r.because[0])["event"]) if r.because else set()
            said.add(r.template)
            match r.template:
                case "popular": assert at.index(e.item_id) in best
                case "own_bought" | "again": assert "transaction" in done and r.because == (e.item_id,)
                case "own_viewed": assert done and not done & {"addtocart", "transaction"} and r.because == (e.item_id,)
                case "because_viewed": assert done and not done & {"addtocart", "transaction"} and r.because != (e.item_id,)
                case "because_carted": assert "addtocart" in done and "transaction" not in done and r.because != (e.item_id,)
                case "because_bought": assert "transaction" in done and r.because != (e.item_id,)
                case "bought_with": assert bought.filter(item_id=e.item_id).height and done & {"addtocart", "transaction"}
                case "your_category": assert row[r.because[0]]["category_id"] == about["category_id"] and r.words["category"] == about["category_path"].rpartition(" / ")[2]
                case "reduced": assert round(100*about["discount"]) == int(r.words["percent"]) > 0
                case "new_in" | "popular_in" | "trend_in": assert r.words["category"] == about["category_path"].rpartition(" / ")[2]
    assert {"popular", "own_viewed", "because_viewed"} <= said, said


@pytest.fixture(scope="module")
def pairs(trained):
    """The trained shop, where lately everybody who looked at one quiet item went on to another, and where two others are bought in one order."""
    log = trained.sim.interactions
    sold = trained.sim.catalog.sort("valid_from").group_by("item_id").last().filter("available")
    quiet = log.join(sold, on="item_id", how="semi").group_by("item_id").len().sort("len", "item_id")["item_id"].to_list()
    a, b, c, d = quiet[:4]
    rows = [(f"new_{n}", i, e, END - timedelta(days=1 + n % 9, minutes=9 - m)) for n in range(80)
            for m, (i, e) in enumerate(((a, "view"), (b, "view")) if n < 50 else ((c, "transaction"), (d, "transaction")))]
    new = log.head(len(rows)).with_columns(
        user_id=pl.Series([r[0] for r in rows]), item_id=pl.Series([r[1] for r in rows]), event=pl.Series([r[2] for r in rows]).cast(log["event"].dtype),
        ts=pl.Series([r[3] for r in rows]).cast(log["ts"].dtype), order_id=pl.Series([f"{r[0]}" if r[2] == "transaction" else None for r in rows]),
        event_id=pl.Series([f"planted{n}" for n in range(len(rows))]))
    shop = index_shop(pl.concat([log, new]), trained.sim.catalog)
    made = make_bundle(shop, epoch_ms(END), trained.rankers, trained.settings, {"id": "pairs"}, choices=trained.choices)
    return made, a, b, c, d


def reason_of(why, item): return next((e.reason for e in why if e.item_id == item), None)


def only(a, item):
    """The same answer with one item on the list, wherever it stood among the candidates, and what the sources make of it."""
    at = np.flatnonzero(a.scoring.c.item == a.bundle.ids.get(item))
    alone = replace(a, lists=replace(a.lists, items=a.scoring.c.item[at][None], log_odds=a.scoring.log_odds[at][None]))
    return Facts(alone), dict.fromkeys(a.scoring.c.sources, 1.)


def test_the_planted_item_is_named_and_no_other(pairs):
    bundle, a, b, *_ = pairs
    others = [i for i in bundle.items["item_id"] if i not in (a, b)][:40:10]
    past = did(*(("view", i) for i in others[:2]), ("view", a), *(("view", i) for i in others[2:]))
    f, all_alike = only(asked(bundle, events=past)[0], b)
    assert named(f, 0, "together", all_alike) == Reason("because_viewed", (a,))
    assert named(f, 0, "bought_with", all_alike) is None and named(f, 0, "together", dict.fromkeys(all_alike, -1.)) is None
    f, _ = only(asked(bundle, events=did(("view", others[0]), ("addtocart", a)))[0], b)
    assert named(f, 0, "together", all_alike) == Reason("because_carted", (a,))
    f, _ = only(asked(bundle, events=did(*(("view", i) for i in others)))[0], b)
    said = named(f, 0, "together", all_alike | dict.fromkeys(["als", "two_steps"], 0.))
    assert said is None  # nobody who looked at the others went on to it


def test_the_page_and_the_cart_are_named(pairs):
    bundle, a, b, c, d = pairs
    plain, other = replace(bundle, rankers={"for_you": bundle.ranker}, orders={}), bundle.items["item_id"][20]
    for made in (bundle, plain):
        got = asked(made, events=did(("view", d)), surface="similar", context=[a], k=20)[0]
        f, all_alike = only(got, b)
        assert named(f, 0, "together", all_alike) == Reason("also_viewed", (a,))
        assert all(set(e.reason.because) <= {a, d} for e in explain(got))
    cart = reason_of(asked(plain, surface="bought_together", context=[c, other], k=20)[1], d)
    assert cart == Reason("bought_with", (c,))
    assert in_words(cart, titles_of(bundle)) == f"often bought together with {titles_of(bundle)(c)}"


@pytest.mark.parametrize(("name", "planted"), [("covisit", "ab"), ("session_knn", "ab"), ("item_item", "ab"), ("copurchase", "cd")])
def test_a_source_speaks_loudest_for_the_planted_item(pairs, name, planted):
    bundle, *abcd = pairs
    x, y = (bundle.ids.get(abcd["abcd".index(p)]) for p in planted)
    loose = [i for i in range(0, 60, 7) if i not in (x, y)]
    past = one_by_one(Histories(np.array([0, 6]), np.array([*loose[:3], x, *loose[3:5]], np.int32), np.full(6, 4 if planted == "cd" else VIEW, np.int8),
                                np.arange(6) + epoch_ms(END) - 9_999, np.array([epoch_ms(END)])))
    loud = loudness(name, bundle.moment.sources[name], past, np.array([y, x], np.int32), 30)
    assert past.item[loud[:, 0].argmax()] == x and loud[:, 0].max() > 0 and not loud[past.item == x, 1].any()


@dataclass
class Always:
    """A source of one's own: one item to everybody, another to whoever touched the item before it."""

    fitted: ClassVar = ()

    def fit(self, log, asof, catalog): return self

    def retrieve(self, histories, k):
        out = Retrieved.blank(len(histories), k)
        for i in range(len(histories)):
            found = [5, *(histories.take(i).item[-1:] + 1)][:k]
            out.items[i, :len(found)], out.scores[i, :len(found)] = found, 1/np.arange(1, len(found) + 1)
        return out


def test_a_source_of_ones_own_names_only_what_it_needs():
    past = Histories(np.array([0, 1, 2]), np.array([9, 20], np.int32), np.array([VIEW]*2, np.int8), np.array([1, 2]), np.array([9, 9]))
    loud = loudness("always", Always(), past, np.array([5, 10, 21, 20], np.int32), 4)
    assert (loud > 0).tolist() == [[False, True, False, False], [False, False, True, False]]
    assert (loudness("covisit", Always(), past, np.array([10], np.int32), 4) > 0).tolist() == [[True], [False]]  # another's under a known name


def test_a_pin_is_the_shops(trained, bundle):
    other = [i for i in bundle.items.filter("available")["item_id"] if i not in {x.item_id for x in asked(bundle)[1]}][0]
    book = RuleBook(pin=[Pin(item=other, slot=2)])
    pinned = make_bundle(trained.shop, epoch_ms(END), trained.rankers, trained.settings, {"id": "pin"}, book, choices=trained.choices)
    a, why = asked(pinned)
    assert why[1].item_id == other and why[1].reason == Reason("pinned") and {e.reason.template for e in why if e is not why[1]} <= ABOUT_THE_ITEM
    assert abs(why[1].base + sum(c.log_odds for c in why[1].contributions) + why[1].rest - why[1].log_odds) < 1e-6


def test_where_the_sources_order_answers_the_sources_explain(bundle, pairs):
    made, a, b, *_ = pairs
    plain = replace(made, rankers={"for_you": made.rankers["for_you"]}, orders={})
    got, why = asked(plain, surface="similar", context=[a])
    checked(got, why)
    assert got.scoring.ranker is None and reason_of(why, b) == Reason("also_viewed", (a,))


def test_nothing_is_claimed_for_an_item_that_nothing_lifted(bundle):
    """The last of the candidates; and one of which nothing is known and that nobody proposed."""
    a, _ = asked(bundle, k=20)
    ranker = bundle.ranker
    low = int(a.scoring.log_odds.argmin())
    worst = replace(a, lists=replace(a.lists, items=a.scoring.c.item[[low]][None], log_odds=a.scoring.log_odds[[low]][None]))
    [e] = explain(worst)
    assert e.log_odds == pytest.approx(float(ranker.log_odds(a.scoring.rows[[low]])[0]), abs=1e-9)
    unknown = replace(a.scoring, rows=np.full_like(a.scoring.rows, np.nan), c=replace(a.scoring.c, ranks=np.full_like(a.scoring.c.ranks, np.nan)))
    blank = replace(a, scoring=unknown)
    for e in explain(blank): assert e.reason == Reason("catalogue") and e.sources == {}


def test_another_language_and_a_missing_title(bundle):
    german = dict.fromkeys(ENGLISH, "x") | {"alike": "ähnelt {item}"}
    one = bundle.items["item_id"][3]
    assert in_words(Reason("alike", (one,)), titles_of(bundle), german) == f"ähnelt {bundle.items['title'][3]}"
    assert titles_of(bundle)("{odd} unknown") == "{odd} unknown" == in_words(Reason("alike", ("{odd} unknown",)), titles_of(bundle), {"alike": "{item}"})
    with pytest.raises(KeyError): in_words(Reason("alike", (one,)), titles_of(bundle), {})
