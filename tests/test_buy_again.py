"""What is bought again, and when: planted intervals are found, and nothing is said where nothing repeats."""

import numpy as np
import polars as pl
import pytest

from reco.candidates.base import load_source, save_source
from reco.candidates.buy_again import DAY, BuyAgain, chance, intervals
from reco.data.histories import TRANSACTION, VIEW, EventLog, Histories

NO_CATEGORIES = pl.DataFrame({"category_id": pl.Series([None] * 6, dtype=pl.String)})


def log_of(rows: list[tuple[int, int, float, int]]) -> EventLog:
    """Rows of user, item, day, event."""
    rows = sorted(rows, key=lambda r: (r[0], r[2], r[3], r[1]))
    user, item, day, event = (np.array(x) for x in zip(*rows, strict=True))
    return EventLog(user.astype(np.int32), item.astype(np.int32), event.astype(np.int8), np.round(day * DAY).astype(np.int64), int(user.max()) + 1, 6)


def refills(seed: int = 0) -> EventLog:
    """Item 0 is bought every 7 days or so, item 1 every 30, item 2 once."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(60):
        for item, usual in ((0, 7), (1, 30)):
            for day in rng.uniform(0, usual) + np.cumsum(usual * rng.lognormal(0, 0.15, 180 // usual)):
                if day < 180: rows.append((user, item, day, TRANSACTION))
        rows.append((user, 2, rng.uniform(0, 180), TRANSACTION))
        rows += [(user, 3, d, VIEW) for d in (10.0, 50.0, 90.0)]
    return log_of(rows)


def past_of(events: list[tuple[int, float, int]], asof: float) -> Histories:
    item, day, event = (np.array(x) for x in zip(*events, strict=True))
    return Histories(np.array([0, len(item)]), item.astype(np.int32), event.astype(np.int8), np.round(day * DAY).astype(np.int64),
                     np.array([round(asof * DAY)]))


def test_planted_intervals_are_found():
    source = BuyAgain().fit(refills(), 180 * DAY, NO_CATEGORIES)
    assert np.exp(source.middle[:2]) == pytest.approx([7, 30], rel=0.1)
    assert source.share[0] > 0.8 > 0.2 > source.share[2]


def test_each_item_is_proposed_when_it_is_due():
    source = BuyAgain(horizon_days=3).fit(refills(), 180 * DAY, NO_CATEGORIES)
    bought = [(0, 100.0, TRANSACTION), (1, 100.0, TRANSACTION), (2, 100.0, TRANSACTION), (3, 100.0, VIEW)]
    first = {since: source.retrieve(past_of(bought, 100 + since), 6).items[0] for since in (6, 29)}
    assert first[6].tolist() == [0, 1, -1, -1, -1, -1]  # never the item nobody buys twice, nor the one only viewed
    assert first[29][0] == 1


def test_the_chance_is_the_conditional_probability():
    """Against simulated shoppers: of those who have not come back after t days, the share who do in the next h."""
    rng = np.random.default_rng(1)
    share, middle, spread, horizon = 0.6, np.log(12), 0.5, 4
    took = np.where(rng.random(400_000) < share, rng.lognormal(middle, spread, 400_000), np.inf)
    for since in (0.5, 6, 12, 30):
        waiting = took > since
        assert chance(since, horizon, share, middle, spread) == pytest.approx((took[waiting] <= since + horizon).mean(), abs=0.005)


def test_own_intervals_count():
    source = BuyAgain(horizon_days=3).fit(refills(), 180 * DAY, NO_CATEGORIES)
    regular = source.score(past_of([(1, d, TRANSACTION) for d in (60.0, 70, 80, 90, 100)], 110), np.array([0, 1]), np.array([1], np.int32))[0]
    once = source.score(past_of([(1, 100.0, TRANSACTION)], 110), np.array([0, 1]), np.array([1], np.int32))[0]
    assert regular[0] > 2 * once[0] and regular[1] > once[1] and (regular[2], once[2]) == (5, 1)


def test_one_purchase_in_two_pieces_is_one():
    log = log_of([(0, 0, 1.0, TRANSACTION), (0, 0, 1.1, TRANSACTION), (0, 0, 9.0, TRANSACTION)])
    assert intervals(log)["days"].drop_nulls().to_list() == [8]


def test_a_shop_where_nothing_repeats_gets_no_proposal():
    log = log_of([(u, i, float(u + i), TRANSACTION) for u in range(5) for i in range(4)])
    source = BuyAgain().fit(log, 100 * DAY, NO_CATEGORIES)
    h = past_of([(0, 3.0, TRANSACTION)], 30)
    assert (source.retrieve(h, 4).items == -1).all()
    assert np.isnan(source.score(h, np.array([0, 2]), np.array([0, 1], np.int32))).all()


def test_a_shop_without_purchases_can_be_fitted():
    source = BuyAgain().fit(log_of([(0, 0, 1.0, VIEW), (1, 1, 2.0, VIEW)]), 100 * DAY, NO_CATEGORIES)
    assert (source.retrieve(past_of([(0, 1.0, VIEW)], 30), 4).items == -1).all()


def test_a_category_speaks_for_its_new_items():
    log = refills()
    catalog = pl.DataFrame({"category_id": ["food", "home", "once", None, "food", "once"]})
    source = BuyAgain().fit(log, 180 * DAY, catalog)
    assert source.share[4] > source.share[3] > source.share[5]  # food repeats, unknown is the shop's, one-off goods do not
    assert source.middle[4] < source.middle[3]


def test_alone_as_in_a_batch_and_after_loading(tmp_path):
    log = refills()
    source = BuyAgain().fit(log, 180 * DAY, NO_CATEGORIES)
    save_source(source, tmp_path / "s")
    again = load_source(tmp_path / "s")
    starts = np.searchsorted(log.user, np.arange(11))
    h = Histories(starts.astype(np.int64), log.item[: starts[-1]], log.event[: starts[-1]], log.ts[: starts[-1]], np.full(10, 181 * DAY))
    items, indptr = np.tile(np.arange(6, dtype=np.int32), 10), np.arange(11) * 6
    batch, proposed = source.score(h, indptr, items), source.retrieve(h, 3)
    for i in range(10):
        assert np.array_equal(again.score(h.take(i), np.array([0, 6]), items[:6]), batch[6 * i : 6 * i + 6], equal_nan=True)
        assert np.array_equal(again.retrieve(h.take(i), 3).items[0], proposed.items[i])
