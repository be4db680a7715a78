"""Co-visitation in one and two steps against counting by hand, and the scores of every source against its own proposals."""

import numpy as np
import pytest

from reco.candidates.als import ALS
from reco.candidates.base import load_source, save_source
from reco.candidates.covisit import SCORES as VOTES
from reco.candidates.covisit import CoVisitation
from reco.candidates.item_item import ItemItem
from reco.candidates.popularity import decay
from reco.candidates.recent import Recent
from reco.candidates.session import SessionKNN
from reco.candidates.two_steps import TwoSteps
from reco.data.histories import ADDTOCART, TRANSACTION, VIEW, EventLog, Histories, histories, visit_ids

MINUTE, GAP, ITEMS = 60_000, 1_800_000, 12


def random_log(seed: int, users: int = 15, events: int = 200) -> EventLog:
    rng = np.random.default_rng(seed)
    user = np.sort(rng.integers(0, users, events)).astype(np.int32)
    ts = np.concatenate([np.sort(rng.integers(0, 600, (user == u).sum())) for u in range(users)]) * MINUTE
    kind = rng.choice([VIEW, VIEW, VIEW, ADDTOCART, TRANSACTION], events).astype(np.int8)
    return EventLog(user, rng.integers(0, ITEMS, events).astype(np.int32), kind, ts, users, ITEMS)


def by_hand(log: EventLog, asof: int, source: CoVisitation) -> dict[str, np.ndarray]:
    """The four tables, pair by pair."""
    visit, weight = visit_ids(log, source.gap_ms), decay(asof - log.ts, source.half_life_days)
    after, before, together, wanted = np.zeros((4, ITEMS, ITEMS))
    met = {}
    for p in range(len(log)):
        for q in range(len(log)):
            a, b = log.item[p], log.item[q]
            if a == b or visit[p] != visit[q] or abs(p - q) > source.reach: continue
            (after if q > p else before)[a, b] += weight[q] / abs(p - q)
            if q > p and log.event[q] >= ADDTOCART: wanted[a, b] += weight[q] / abs(p - q)
            met.setdefault((a, b, visit[p]), weight[q])
    for (a, b, _), w in met.items(): together[a, b] += w
    first = {}
    for p in range(len(log)): first.setdefault((visit[p], log.item[p]), weight[p])
    size = np.zeros(ITEMS)
    for (_, i), w in first.items(): size[i] += w
    s = source.shrinkage
    total_after, total_before = after.sum(1, keepdims=True) + s, before.sum(1, keepdims=True) + s
    return {"after": after / total_after, "before": before / total_before, "wanted": wanted / total_after,
            "together": together / np.sqrt((size[:, None] + s) * (size[None] + s))}


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_what_counting_by_hand_gives(seed):
    log, asof = random_log(seed), 700 * MINUTE
    source = CoVisitation(neighbours=ITEMS, reach=3).fit(log, asof)
    truth = by_hand(log, asof, source)
    one = histories(log, np.arange(15, dtype=np.int32), np.full(15, asof), 1)
    got = source.score(one, np.arange(16) * ITEMS, np.tile(np.arange(ITEMS, dtype=np.int32), 15)).reshape(15, ITEMS, len(VOTES))
    for i in np.flatnonzero(one.lengths):
        last = one.item[one.indptr[i]]
        for name in ("after", "before", "together"):
            assert np.allclose(got[i, :, list(VOTES).index(f"{name}_last")], truth[name][last], rtol=1e-3, atol=1e-6), name
        assert np.allclose(got[i, :, list(VOTES).index("wanted")], truth["wanted"][last], rtol=1e-3, atol=1e-6)


def test_two_steps_are_the_product_of_one_step_with_itself():
    log, asof = random_log(5), 700 * MINUTE
    one = CoVisitation(neighbours=ITEMS, reach=10).fit(log, asof)
    step = np.zeros((ITEMS, ITEMS))
    for a in range(ITEMS):
        at = slice(one.indptr[a], one.indptr[a + 1])
        step[a, one.index[at]] = one.value[at, :2].astype(np.float32).mean(axis=1)
    shrunk = TwoSteps(width=ITEMS, neighbours=ITEMS).fit(log, asof)
    for a in range(ITEMS):
        at, want = slice(shrunk.indptr[a], shrunk.indptr[a + 1]), step[a] @ step
        assert a not in shrunk.index[at]
        assert np.allclose(shrunk.value[at], want[shrunk.index[at]], rtol=1e-3)


SOURCES = {"covisit": CoVisitation(), "two_steps": TwoSteps(), "session_knn": SessionKNN(), "item_item": ItemItem(),
           "als": ALS(factors=4, iterations=3), "recent": Recent()}


@pytest.mark.parametrize("name", SOURCES)
def test_scores_agree_with_proposals_alone_in_a_batch_and_after_saving(name, tmp_path):
    log, asof = random_log(9), 700 * MINUTE
    source = SOURCES[name].fit(log.before(asof), asof)
    h = histories(log, np.arange(15, dtype=np.int32), np.linspace(0, asof, 15).astype(np.int64), 20)
    indptr, items = np.arange(16) * ITEMS, np.tile(np.arange(ITEMS, dtype=np.int32), 15)
    scores = source.score(h, indptr, items)
    assert scores.shape == (len(items), len(source.scores)) and scores.dtype == np.float32
    for i in range(15):
        alone = source.score(h.take(i), np.array([0, ITEMS]), items[:ITEMS])
        assert np.array_equal(alone, scores[indptr[i]:indptr[i + 1]], equal_nan=True)
    save_source(source, tmp_path / name)
    again = load_source(tmp_path / name)
    assert np.array_equal(again.score(h, indptr, items), scores, equal_nan=True)
    assert np.array_equal(again.retrieve(h, 5).items, source.retrieve(h, 5).items)
    column = {"session_knn": "votes", "item_item": "votes", "als": "dot", "two_steps": "latest"}.get(name)
    if column is None: return
    found = source.retrieve(h, 5)
    for i in np.flatnonzero(h.lengths):  # the number that it proposes by is the number that it scores by
        got = found.items[i][found.items[i] >= 0]
        assert np.allclose(scores[indptr[i] + got, list(source.scores).index(column)], found.scores[i][:len(got)], rtol=1e-5)


def test_nothing_is_said_of_an_empty_past():
    log = random_log(1)
    h = Histories(np.array([0, 0]), np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int64), np.array([700 * MINUTE]))
    for source in SOURCES.values():
        source.fit(log, 700 * MINUTE)
        assert (source.retrieve(h, 5).items == -1).all()
        assert not np.nan_to_num(source.score(h, np.array([0, 2]), np.array([0, 3], np.int32)))[:, :6].any()
