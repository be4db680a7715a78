"""What is popular, what is rising, and what is popular where the shopper looks."""

import numpy as np
import polars as pl
import pytest

from reco.candidates.base import EVENT_WEIGHTS, load_source, save_source
from reco.candidates.category_popularity import CategoryPopularity
from reco.candidates.popularity import Popularity, log_place, popularity
from reco.candidates.trending import Trending, rise
from reco.data.histories import ADDTOCART, TRANSACTION, VIEW, EventLog, Histories

DAY, N = 86_400_000, 30
CATALOG = pl.DataFrame({"category_id": [None if i % 7 == 0 else f"c{i % 4}" for i in range(N)]})


def random_log(seed: int, days: int = 40, rows: int = 3_000) -> EventLog:
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.geometric(0.15, rows) - 1, N - 2)  # the last item is never touched
    f = np.stack([rng.integers(0, 100, rows), rng.integers(0, days * DAY, rows), rng.choice([VIEW, VIEW, ADDTOCART, TRANSACTION], rows), item], axis=1)
    f = f[np.lexsort(f.T[::-1])]
    return EventLog(f[:, 0].astype(np.int32), f[:, 3].astype(np.int32), f[:, 2].astype(np.int8), f[:, 1], 100, N)


def some_histories(seed: int, n: int = 12) -> Histories:
    rng, lengths = np.random.default_rng(seed), [0, 1, 25] * (n // 3)
    total = sum(lengths)
    return Histories(np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, N, total).astype(np.int32),
                     rng.choice([VIEW, ADDTOCART], total).astype(np.int8), np.full(total, 39 * DAY), np.full(n, 40 * DAY))


def test_places_against_sorting():
    log = random_log(0)
    source = Popularity().fit(log, 40 * DAY)
    strength = popularity(log, 40 * DAY, 7)
    for i in range(N):
        better = sum(s > strength[i] for s in strength)
        assert source.places[i, 0] == pytest.approx(np.log2(better + 1)) if strength[i] > 0 else np.isnan(source.places[i, 0])
    assert np.isnan(log_place(np.zeros(3, np.float32))).all()


def test_what_is_bought_has_its_own_places():
    rows = [(u, 0, VIEW) for u in range(9)] + [(0, 1, TRANSACTION)]
    user, item, event = (np.array(x) for x in zip(*sorted(rows), strict=True))
    log = EventLog(user.astype(np.int32), item.astype(np.int32), event.astype(np.int8), np.zeros(10, np.int64), 9, 3)
    assert Popularity().fit(log, DAY).places[:, 1].tolist()[1] == 0 and np.isnan(Popularity().fit(log, DAY).places[[0, 2], 1]).all()


@pytest.mark.parametrize("make", [Popularity, Trending, CategoryPopularity])
def test_alone_as_in_a_batch_and_after_loading(make, tmp_path):
    source = make().fit(random_log(1), 40 * DAY, CATALOG)
    save_source(source, tmp_path / "s")
    again, h = load_source(tmp_path / "s"), some_histories(2)
    items, indptr = np.tile(np.arange(N, dtype=np.int32), len(h)), np.arange(len(h) + 1) * N
    said, proposed = source.score(h, indptr, items), source.retrieve(h, 8)
    assert said.shape == (len(items), len(source.scores)) and said.dtype == np.float32
    for i in range(len(h)):
        alone = again.score(h.take(i), indptr[:2], items[:N])
        assert np.array_equal(alone, said[indptr[i] : indptr[i + 1]], equal_nan=True)
        assert np.array_equal(again.retrieve(h.take(i), 8).items[0], proposed.items[i])
        found = proposed.items[i][proposed.items[i] >= 0]
        if make is CategoryPopularity: assert np.allclose(alone[found, 0], proposed.scores[i][: len(found)], rtol=1e-6)


@pytest.mark.parametrize("make", [Popularity, Trending, CategoryPopularity])
def test_the_future_changes_nothing(make):
    log, asof = random_log(3), 30 * DAY
    past = make().fit(log.before(asof), asof, CATALOG)
    more = random_log(4).where(random_log(4).ts >= asof)
    both = [np.concatenate([getattr(log.before(asof), c), getattr(more, c)]) for c in ("user", "item", "event", "ts")]
    again = make().fit(EventLog(*both, 100, N).before(asof), asof, CATALOG)
    assert all(np.array_equal(getattr(past, a), getattr(again, a), equal_nan=True) for a in make.fitted)


def test_a_planted_rise_is_found_and_a_busy_shop_is_not_one():
    log = random_log(5)
    asof = 40 * DAY
    extra = 15  # item 20 gets fifteen shoppers in the last two days
    added = EventLog(np.concatenate([log.user, np.arange(extra, dtype=np.int32)]), np.concatenate([log.item, np.full(extra, 20, np.int32)]),
                     np.concatenate([log.event, np.full(extra, VIEW, np.int8)]), np.concatenate([log.ts, np.full(extra, 39 * DAY)]), 100, N)
    nobody = Histories(np.array([0, 0]), np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int64), np.array([asof]))
    assert Trending().fit(added, asof, CATALOG).retrieve(nobody, 3).items[0, 0] == 20
    usual = np.random.default_rng(0).gamma(1, 40, 500).round()
    sigmas, _ = rise(3 * usual, usual)  # everything has trebled
    assert np.abs(sigmas).max() < 0.5


def test_categories_against_a_plain_reading():
    log, h = random_log(6), some_histories(7)
    source = CategoryPopularity(half_life_days=14, half_events=20, length=20).fit(log, 40 * DAY, CATALOG)
    strength, category = popularity(log, 40 * DAY, 14), CATALOG["category_id"].to_list()
    for i in range(len(h)):
        one = h.take(i)
        votes = {}
        for p, (item, event) in enumerate(zip(one.item.tolist(), one.event.tolist(), strict=True)):
            c = category[item]
            if c is not None: votes[c] = votes.get(c, 0) + float(EVENT_WEIGHTS[event]) * 0.5 ** ((len(one.item) - 1 - p) / 20)
        want = {}
        for j in range(N):
            if category[j] is None or strength[j] == 0: continue
            best = max(strength[m] for m in range(N) if category[m] == category[j])
            want[j] = votes.get(category[j], 0) / (sum(votes.values()) or 1) * strength[j] / best
        said = source.score(one, np.array([0, N]), np.arange(N, dtype=np.int32))
        for j in range(N):
            assert said[j, 0] == pytest.approx(want[j], abs=1e-5) if j in want else np.isnan(said[j, 0])
        found = source.retrieve(one, 5).items[0]
        assert {j for j in found.tolist() if j >= 0} <= {j for j, v in want.items() if v > 0}
        best = sorted((v for v in want.values() if v > 0), reverse=True)[:5]
        np.testing.assert_allclose([want[j] for j in found.tolist() if j >= 0], best, rtol=1e-4)


def test_no_categories_no_proposals():
    source = CategoryPopularity().fit(random_log(8), 40 * DAY, pl.DataFrame({"category_id": pl.Series([None] * N, dtype=pl.String)}))
    assert (source.retrieve(some_histories(9), 5).items == -1).all()
    assert np.isnan(source.score(some_histories(9), np.arange(13), np.arange(12, dtype=np.int32))).all()
