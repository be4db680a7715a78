"""The rows that training would build offline are the rows that `recommend` builds online."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

import reco.scoring
from reco.bundle import load_bundle, make_bundle, save_bundle
from reco.data.histories import epoch_ms, histories
from reco.data.shop import index_shop
from reco.data.split import requests_at, thin, who_and_when
from reco.features.store import Past, open_store
from reco.materialize import item_rows
from reco.moment import fit_moment, ranker_rows
from reco.pipeline import recommend
from reco.request import RecommendationRequest, UserEvent, request_history

PAIRS = 200


def asked(trained) -> pl.DataFrame:
    """Sampled (shopper, moment) pairs of the hold-out."""
    until = trained.cutoffs.label_end(trained.cutoffs.holdout)
    return thin(requests_at(trained.shop.events, trained.cutoffs.holdout, until, seed=5), PAIRS, seed=5)


def fresh(trained, user: str, asof: datetime) -> list[UserEvent]:
    """What the shopper did between the hold-out's start and the request, as a front end would send it."""
    rows = trained.sim.interactions.filter(
        (pl.col("user_id") == user) & (pl.col("ts") >= trained.cutoffs.holdout) & (pl.col("ts") < asof)
    )
    return [UserEvent(r["item_id"], r["event"], r["ts"]) for r in rows.iter_rows(named=True)]


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    """A bundle made at the start of the hold-out, saved and loaded as the endpoint does."""
    at = make_bundle(trained.shop, epoch_ms(trained.cutoffs.holdout), {"for_you": trained.ranker}, trained.settings, {})
    return load_bundle(save_bundle(at, tmp_path_factory.mktemp("parity")))


@pytest.fixture(scope="module")
def filled(trained, tmp_path_factory):
    """An online store as it was at the start of the hold-out, in a Redis of its own."""
    store = open_store(trained.settings.model_copy(update={"root": tmp_path_factory.mktemp("filled")}))
    store.append(trained.sim.interactions.filter(pl.col("ts") < trained.cutoffs.holdout))
    yield store
    store.close()


def test_offline_rows_equal_online_rows(trained, served, filled, monkeypatch):
    pairs = asked(trained)
    assert pairs.height == PAIRS and set(pairs["kind"]) == {"home", "visit"}
    user, asof = who_and_when(pairs)
    moment = fit_moment(trained.shop, epoch_ms(trained.cutoffs.holdout), trained.settings)
    h = histories(trained.shop.log, user, asof, trained.settings.train.max_history, moment.known)
    c, rows = ranker_rows(moment, h)
    seen, compared = [], 0
    monkeypatch.setattr(reco.scoring, "ranker_rows", lambda *a: seen.append(ranker_rows(*a)) or seen[-1])
    for i in range(PAIRS):
        who = trained.shop.users.external(user[i : i + 1])[0]
        now = datetime.fromtimestamp(asof[i] / 1000, UTC)
        recommend(RecommendationRequest(who, 10, now, fresh(trained, who, now)), served, filled)
        online, part = seen[-1], slice(c.indptr[i], c.indptr[i + 1])
        np.testing.assert_array_equal(online[0].item, c.item[part])
        np.testing.assert_array_equal(online[1], rows[part])
        compared += len(online[0].item)
    assert compared > PAIRS * 50


def test_it_makes_no_difference_where_an_event_comes_from(trained, served, filled, store):
    """Sent along with the request, in the store already, or both: the answer is the same."""
    pairs, several, known = asked(trained).filter(kind="visit").head(40), 0, 0
    length = dict(trained.sim.interactions.group_by("user_id").len().iter_rows())
    for user, asof, _ in pairs.iter_rows():
        who = trained.shop.users.external(np.array([user]))[0]
        if length[who] > store.cap: continue # of those, the full store has forgotten what was before the request
        events = fresh(trained, who, asof)
        several += len(events) > 1
        sent = recommend(RecommendationRequest(who, 10, asof, events), served, filled)
        assert sent == recommend(RecommendationRequest(who, 10, asof), served, store) # it holds the future too, unseen
        assert sent == recommend(RecommendationRequest(who, 10, asof, events), served, store)
        assert not sent.degraded
        known += not sent.fallback
    assert several > 10 and known > 25


def test_rows_of_the_store_are_used_when_they_are_newer_and_are_the_bundles_when_they_are_not(trained, served, filled):
    """The same features through Redis give the same answer to the bit; tomorrow's give another one."""
    log, ids, now = trained.sim.interactions.lazy(), served.ids, trained.cutoffs.holdout + timedelta(days=3)
    at = {"then": served.moment.asof, "later": epoch_ms(now)}
    users = [trained.shop.users.external(np.array([u]))[0] for u in asked(trained)["user_idx"].head(20)]
    answers = [[recommend(RecommendationRequest(u, 10, now), served, filled) for u in users]]
    for version, asof in at.items():
        filled.put_rows(version, ids.ids.to_list(), item_rows(log, trained.sim.catalog, ids, asof))
        filled.activate(served.id, version, served.moment.asof + 1) # newer, it says: so the store is asked
        answers.append([recommend(RecommendationRequest(u, 10, now), served, filled) for u in users])
    filled.client.delete(filled.row_keys.pointer(served.id))
    assert answers[0] == answers[1] and answers[1] != answers[2]
    assert not any(a.degraded for some in answers for a in some)


def test_a_lost_event_would_be_noticed(trained, served, filled):
    """The comparison above is sharp: without one of the fresh events the rows differ."""
    pairs = asked(trained).filter(kind="visit")
    for user, asof, _ in pairs.iter_rows():
        who = trained.shop.users.external(np.array([user]))[0]
        events = fresh(trained, who, asof)
        if len(events) < 2: continue
        h = [request_history(RecommendationRequest(who, 10, asof, e), served, Past.of(filled.events(who))) for e in (events, events[:-1])]
        rows = [ranker_rows(served.moment, x)[1] for x in h]
        assert rows[0].shape != rows[1].shape or not np.array_equal(*rows, equal_nan=True)
        return
    raise AssertionError("no visit request had two fresh events")


def test_the_future_changes_nothing(trained, served, filled):
    """Events at or after `now`, sent along by mistake, are not used."""
    user = trained.sim.interactions["user_id"].mode()[0]
    now = trained.cutoffs.holdout + timedelta(days=1)
    item = trained.shop.items.ids[0]
    late = [UserEvent(item, "transaction", now), UserEvent(item, "view", now + timedelta(hours=1))]
    assert recommend(RecommendationRequest(user, 10, now, late), served, filled) == recommend(RecommendationRequest(user, 10, now), served, filled)


def test_the_order_of_the_log_changes_nothing(trained):
    shuffled = trained.sim.interactions.sample(fraction=1, shuffle=True, seed=1)
    again = index_shop(shuffled, trained.sim.catalog.sample(fraction=1, shuffle=True, seed=2))
    asof = epoch_ms(trained.cutoffs.holdout)
    one, two = (fit_moment(s, asof, trained.settings) for s in (trained.shop, again))
    np.testing.assert_array_equal(one.per_item, two.per_item)
    user = np.arange(50, dtype=np.int32)
    (c, rows), (d, same) = (ranker_rows(m, histories(s.log, user, np.full(50, asof), 200, m.known))
                            for m, s in ((one, trained.shop), (two, again)))
    np.testing.assert_array_equal(c.item, d.item)
    np.testing.assert_array_equal(rows, same)


def test_k_is_a_prefix(trained, served, filled):
    """Asking for fewer gives the beginning of the longer list, as long as the same candidates are looked at."""
    now, user = trained.cutoffs.holdout, trained.sim.interactions["user_id"].mode()[0]
    no_cap = replace(served, rules=served.rules.model_copy(update={"category_cap": 0}))
    ten, five = (recommend(RecommendationRequest(user, k, now), no_cap, filled).items for k in (10, 5))
    assert ten[:5] == five
