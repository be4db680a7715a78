"""Every feature against a plain reading of its meaning, on random logs."""

import numpy as np
import pytest

from reco.data.histories import ADDTOCART, CLICK, TRANSACTION, VIEW, EventLog, Histories
from reco.features.items import DAY, ITEM_FEATURES, ItemState, item_features
from reco.features.users import PAIR_FEATURES, REQUEST_FEATURES, pair_features, request_features

HOUR, GAP, N = 3_600_000, 1_800_000, 12
PRICE = np.where(np.arange(N) % 4 == 0, np.nan, np.arange(N) + 5).astype(np.float32)
CATEGORY = np.array([-1, 0, 0, 1, 1, 1, 2, 2, 2, 2, -1, 3], np.int32)


def histories_of(seed: int, n: int = 30) -> Histories:
    rng, items, events, times, indptr = np.random.default_rng(seed), [], [], [], [0]
    asof = rng.integers(40, 60, n) * DAY + rng.integers(0, DAY, n)
    for a in asof:
        m = int(rng.choice([0, 1, 3, 40]))
        items.append(rng.integers(0, N, m))
        events.append(rng.choice([CLICK, VIEW, VIEW, ADDTOCART, TRANSACTION], m))
        times.append(np.sort(a - 1 - rng.choice([5, 50, 300, 4000], m) * rng.integers(1, 60_000, m)))
        indptr.append(indptr[-1] + m)
    return Histories(np.array(indptr), np.concatenate(items).astype(np.int32), np.concatenate(events).astype(np.int8),
                     np.concatenate(times).astype(np.int64), asof)


def visits_of(ts: list[int]) -> list[int]:
    """The number of each event's visit."""
    out = []
    for p, t in enumerate(ts): out.append(0 if p == 0 else out[-1] + (t - ts[p - 1] > GAP))
    return out


def plain(h: Histories, candidate: int | None) -> dict[str, float]:
    """The features of one request by their meaning; with a candidate those of the pair."""
    past, asof, nan = list(zip(h.item.tolist(), h.event.tolist(), h.ts.tolist(), strict=True)), int(h.asof[0]), np.nan
    visit = visits_of([t for _, _, t in past])
    on = bool(past) and asof - past[-1][2] <= GAP
    now = [p for p in range(len(past)) if on and visit[p] == visit[-1]]
    priced = [float(PRICE[i]) for i, _, _ in past if not np.isnan(PRICE[i])]
    usual = np.mean(priced) if priced else nan
    if candidate is None:
        mine = {i: {visit[p] for p in range(len(past)) if past[p][0] == i} for i, _, _ in past}
        bought = {i for i, e, _ in past if e == TRANSACTION}
        return {"user_events": len(past), "user_views": sum(e in (VIEW, CLICK) for _, e, _ in past),
                "user_carts": sum(e == ADDTOCART for _, e, _ in past), "user_purchases": sum(e == TRANSACTION for _, e, _ in past),
                "user_visits": len(set(visit)), "user_idle_h": (asof - past[-1][2]) / HOUR if past else nan,
                "user_age_d": (asof - past[0][2]) / DAY if past else nan, "user_price": usual, "user_items": len(mine),
                "user_return_share": np.mean([len(v) > 1 for v in mine.values()]) if past else nan,
                "user_buy_share": len(bought) / len(mine) if past else nan, "visit_events": len(now),
                "visit_minutes": (asof - past[now[0]][2]) / 60_000 if now else 0, "hour": asof // HOUR % 24, "weekday": (asof // DAY + 3) % 7}
    at = [p for p in range(len(past)) if past[p][0] == candidate]
    c = int(CATEGORY[candidate])
    same = [p for p in range(len(past)) if c >= 0 and CATEGORY[past[p][0]] == c]
    buys = [p for p in range(len(past)) if past[p][1] == TRANSACTION]
    known = c >= 0 and past
    return {"pair_views": sum(past[p][1] in (VIEW, CLICK) for p in at), "pair_carts": sum(past[p][1] == ADDTOCART for p in at),
            "pair_purchases": sum(past[p][1] == TRANSACTION for p in at), "pair_idle_h": (asof - past[at[-1]][2]) / HOUR if at else nan,
            "pair_distance": len(past) - 1 - at[-1] if at else nan, "pair_in_visit": len(set(at) & set(now)),
            "pair_visits": len({visit[p] for p in at}), "pair_first_h": (asof - past[at[0]][2]) / HOUR if at else nan,
            "pair_share": len(at) / len(past) if at else 0, "category_share": len(same) / len(past) if known else nan,
            "category_in_visit": len(set(same) & set(now)) / len(now) if known and now else nan,
            "category_distance": len(past) - 1 - same[-1] if same else nan,
            "category_bought": len(set(same) & set(buys)) / max(len(buys), 1) if known else nan,
            "price_to_usual": np.log((PRICE[candidate] + 1) / (usual + 1))}


@pytest.mark.parametrize("seed", range(3))
def test_request_and_pair_features_mean_what_they_say(seed):
    h = histories_of(seed)
    indptr, candidates = np.arange(len(h) + 1) * N, np.tile(np.arange(N, dtype=np.int32), len(h))
    requests = request_features(h, PRICE, GAP)
    pairs = pair_features(indptr, candidates, h, PRICE, CATEGORY, GAP)
    for i in range(len(h)):
        want = plain(h.take(i), None)
        assert list(want) == list(REQUEST_FEATURES)
        np.testing.assert_allclose(requests[i], list(want.values()), rtol=1e-5, err_msg=f"request {i}")
        for c in range(N):
            want = plain(h.take(i), c)
            assert list(want) == list(PAIR_FEATURES)
            np.testing.assert_allclose(pairs[N * i + c], list(want.values()), rtol=1e-5, atol=1e-6, err_msg=f"request {i}, item {c}")


def random_log(seed: int) -> EventLog:
    rng = np.random.default_rng(seed)
    f = np.stack([rng.integers(0, 9, 600), rng.integers(0, 60 * DAY, 600), rng.choice([CLICK, VIEW, VIEW, ADDTOCART, TRANSACTION], 600),
                  rng.integers(0, N - 1, 600)], axis=1)
    f = f[np.lexsort(f.T[::-1])]
    return EventLog(f[:, 0].astype(np.int32), f[:, 3].astype(np.int32), f[:, 2].astype(np.int8), f[:, 1], 9, N)


STATE = ItemState(PRICE, np.zeros(N, np.float32), CATEGORY, np.ones(N, bool), np.full(N, -1))


@pytest.mark.parametrize("seed", range(3))
def test_habits_of_an_item_mean_what_they_say(seed):
    log, asof = random_log(seed), 50 * DAY
    got = dict(zip(ITEM_FEATURES, item_features(log, STATE, asof).T, strict=True))
    past = [(u, i, e, t // DAY, t) for u, i, e, t in zip(log.user.tolist(), log.item.tolist(), log.event.tolist(), log.ts.tolist(), strict=True)
            if t < asof]
    first = {u: min(t for v, _, e, _, t in past if v == u and e == TRANSACTION) for u in {v for v, _, e, _, _ in past if e == TRANSACTION}}
    met = [{u for u, j, _, _, _ in past if j == i} for i in range(N)]
    buyers = [{u for u, j, e, _, _ in past if j == i and e == TRANSACTION} for i in range(N)]
    two_days = lambda i, who, kinds: sum(len({d for v, j, e, d, _ in past if v == u and j == i and e in kinds}) > 1 for u in who)
    every = (CLICK, VIEW, ADDTOCART, TRANSACTION)
    opened = [len({u for u, j, e, _, t in past if j == i and e == TRANSACTION and t == first[u]}) for i in range(N)]
    hits = {"item_buyer_share": ([len(b) for b in buyers], met), "item_return_share": ([two_days(i, met[i], every) for i in range(N)], met),
            "item_rebuy_share": ([two_days(i, buyers[i], (TRANSACTION,)) for i in range(N)], buyers), "item_first_buys": (opened, buyers)}
    for name, (n, of) in hits.items():
        n, of = np.array(n), np.array([len(x) for x in of])
        np.testing.assert_allclose(got[name], (n + 10 * n.sum() / of.sum()) / (of + 10), rtol=1e-5, err_msg=name)


def test_the_future_and_the_order_of_rows_change_no_item_feature():
    log, asof = random_log(5), 30 * DAY
    whole = item_features(log, STATE, asof)
    assert np.array_equal(whole, item_features(log.before(asof), STATE, asof), equal_nan=True)
    mixed = log.where(np.random.default_rng(0).permutation(len(log)))
    assert np.array_equal(whole, item_features(mixed, STATE, asof), equal_nan=True)


def test_a_log_without_purchases_has_features():
    log = random_log(1)
    f = item_features(log.where(log.event != TRANSACTION), STATE, 50 * DAY)
    assert np.isfinite(f[:, [list(ITEM_FEATURES).index(n) for n in ("item_buyer_share", "item_rebuy_share", "item_first_buys")]]).all()
