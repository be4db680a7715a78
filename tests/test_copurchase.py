"""Co-purchase against brute force, and what it promises."""

import time
from collections import defaultdict
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.candidates.base import load_source, save_source
from reco.candidates.copurchase import SCORES, CoPurchase, add_votes
from reco.candidates.pairs import basket_ids, baskets, borrowed, count_pairs, lift, probability
from reco.candidates.regressions import regressions
from reco.data.histories import ADDTOCART, TRANSACTION, VIEW, EventLog, Histories, epoch_ms

MINUTE, DAY = 60_000, 86_400_000
N = 12  # items


def log_of(rows: list[tuple], n_items: int = N, orders: bool = False) -> EventLog:
    """Rows of user, item, event, ts and perhaps order, in the log's order."""
    rows = sorted(rows, key=lambda r: (r[0], r[3], r[2], r[1]))
    user, item, event, ts = (np.array(c, t) for c, t in zip(list(zip(*rows, strict=True))[:4], (np.int32, np.int32, np.int8, np.int64), strict=True))
    return EventLog(user, item, event, ts, int(user.max()) + 1, n_items, np.array([r[4] for r in rows], np.int32) if orders else None)


def carts(*contents: list[int], asof: int = 10**9, gap: int = 1000, event: int = ADDTOCART) -> Histories:
    """One request per content, everything put in a second before."""
    item = np.array([i for c in contents for i in c], np.int32)
    indptr = np.cumsum([0, *map(len, contents)])
    return Histories(indptr, item, np.full(len(item), event, np.int8), np.full(len(item), asof - gap), np.full(len(contents), asof))


def random_log(seed: int, users: int = 40, orders: bool = False) -> EventLog:
    """Views, carts and purchases of random shoppers over 40 days; some orders."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        for _ in range(rng.integers(1, 4)):
            at, order = int(rng.integers(0, 40) * DAY), int(rng.integers(0, 1_000))
            for item in rng.choice(N, rng.integers(1, 5), replace=False):
                event = int(rng.choice([VIEW, ADDTOCART, TRANSACTION]))
                at += int(rng.integers(0, 5)) * MINUTE
                rows.append((user, int(item), event, at, order if event == TRANSACTION else -1))
    return log_of(rows, orders=orders)


def slow_baskets(log: EventLog, gap: int) -> list[dict[int, int]]:
    """Visit by visit: item → first moment it was put in."""
    out, visit = [], {}
    for r in range(len(log)):
        if r == 0 or log.user[r] != log.user[r - 1] or log.ts[r] - log.ts[r - 1] > gap: visit = {}
        if log.event[r] >= ADDTOCART:
            if not visit: out.append(visit)
            visit.setdefault(int(log.item[r]), int(log.ts[r]))
    return out


def ends(log: EventLog, gap: int) -> list[int]:
    """The last cart or purchase of each of these visits."""
    out, previous = [], None
    for r in range(len(log)):
        new = r == 0 or log.user[r] != log.user[r - 1] or log.ts[r] - log.ts[r - 1] > gap
        if new: previous = None
        if log.event[r] >= ADDTOCART:
            if previous is None: out.append(0)
            previous = out[-1] = int(log.ts[r])
    return out


@pytest.mark.parametrize("seed", range(4))
def test_pairs_equal_a_count_by_hand(seed):
    log, asof, half_life = random_log(seed), 50 * DAY, 20.0
    found = count_pairs(baskets(log, 30 * MINUTE), N, asof, half_life, N)
    met, after, share, voice, size, total = defaultdict(float), defaultdict(float), defaultdict(float), np.zeros(N), np.zeros(N), 0.0
    for basket, end in zip(slow_baskets(log, 30 * MINUTE), ends(log, 30 * MINUTE), strict=True):
        w = 0.5 ** ((asof - end) / DAY / half_life)
        total += w
        for i in basket:
            size[i] += w
            voice[i] += w / len(basket)
        for i, c in permutations(basket, 2):
            met[i, c] += w
            share[i, c] += w / len(basket)
            after[i, c] += w * (basket[c] >= basket[i])
    rows = np.repeat(np.arange(N), np.diff(found.indptr))
    assert len(rows) == len(met) and found.total == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(found.size, size, rtol=1e-5)
    expected_lift = [max(np.log(met[p] * total / (size[p[0]] * size[p[1]])), 0) * met[p] / (met[p] + 3) for p in zip(rows, found.index, strict=True)]
    np.testing.assert_allclose(found.met, [met[p] for p in zip(rows, found.index, strict=True)], rtol=1e-4)
    np.testing.assert_allclose(found.after, [after[p] for p in zip(rows, found.index, strict=True)], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.cosine, [share[p] / np.sqrt(voice[p[0]] * voice[p[1]]) for p in zip(rows, found.index, strict=True)], rtol=1e-4)
    np.testing.assert_allclose(lift(found, 3), expected_lift, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(probability(found, 3), found.after / (size[rows] + 3), rtol=1e-4)
    for i in range(N): assert (np.diff(found.cosine[found.indptr[i] : found.indptr[i + 1]]) <= 0).all()


def test_only_the_best_companions_are_kept():
    log, few = random_log(1), 3
    whole, cut = (count_pairs(baskets(log, 30 * MINUTE), N, 50 * DAY, 20, most) for most in (N, few))
    for i in range(N):
        a, e = whole.indptr[i], min(whole.indptr[i + 1], whole.indptr[i] + few)
        assert whole.index[a:e].tolist() == cut.index[cut.indptr[i] : cut.indptr[i + 1]].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_regressions_solve_their_systems(seed):
    """Every item's weights are those of a ridge regression on its best companions over the baskets."""
    b = baskets(random_log(seed), 30 * MINUTE)
    pairs = count_pairs(b, N, 50 * DAY, 1e9, N)
    x = np.zeros((len(b), N))
    x[np.repeat(np.arange(len(b)), np.diff(b.indptr)), b.item] = 1
    indptr, index, weight = regressions(pairs, 4, 2.0)
    found = np.zeros((N, N))
    found[np.repeat(np.arange(N), np.diff(indptr)), index] = weight
    for c in range(N):
        best = pairs.index[pairs.indptr[c] : pairs.indptr[c + 1]][:4]
        wanted = np.zeros(N)
        wanted[best] = np.linalg.solve(x[:, best].T @ x[:, best] + 2 * np.eye(len(best)), x[:, best].T @ x[:, c])
        np.testing.assert_allclose(found[:, c], wanted, atol=2e-4)


def test_the_second_hop_is_the_best_path():
    pairs = count_pairs(baskets(random_log(2, users=8), 30 * MINUTE), N, 50 * DAY, 1e9, N)
    cosine = np.zeros((N, N))
    cosine[np.repeat(np.arange(N), np.diff(pairs.indptr)), pairs.index] = pairs.cosine
    paths = (cosine[:, :, None] * cosine[None]).max(axis=1)
    item, other, value = borrowed(pairs.indptr, pairs.index, pairs.cosine, N)
    assert len(item) > 10 and (cosine[item, other] == 0).all() and (item != other).all()
    np.testing.assert_allclose(value, paths[item, other], rtol=1e-5)
    unseen = (cosine == 0) & (paths > 0) & ~np.eye(N, dtype=bool)
    assert unseen.sum() == len(item)


def test_votes_are_the_sums_they_say():
    """Noisy or, maximum, mean and sums over the basket, item by item."""
    source = CoPurchase(neighbours=N, predictors=5).fit(random_log(5), 50 * DAY)
    table = np.zeros((4, N, N))  # cosine, chance, lift, ridge
    rows = np.repeat(np.arange(N), np.diff(source.indptr))
    for t, name in enumerate(("cosine", "chance", "lift")): table[t, rows, source.index] = getattr(source, name)
    table[3, np.repeat(np.arange(N), np.diff(source.r_indptr)), source.r_index] = source.ridge
    basket, weight = np.array([1, 4, 7], np.int32), np.array([1, 0.5, 0.25], np.float32)
    total = np.zeros((N, len(SCORES)), np.float32)
    there = add_votes(basket, weight, *source.tables, total, np.empty(N, np.int32))
    assert len(there) == len(set(there)) >= 8
    cosine, chance, lifted, ridge = (table[t, basket] for t in range(4))
    w = weight[:, None].astype(float)
    wanted = {"ridge": (w * ridge).sum(0), "cosine": (w * cosine).sum(0), "chance": 1 - np.prod(1 - w * chance, axis=0),
              "best": (w * chance).max(0), "lift": (w * lifted).sum(0) / w.sum(), "known": (w * ((chance > 0) | (lifted > 0))).sum(0) / w.sum()}
    for j, name in enumerate(SCORES): np.testing.assert_allclose(total[:, j], wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_orders_beat_visits_and_carts_of_the_same_visit():
    rows = [(0, 0, ADDTOCART, 1, -1), (0, 1, ADDTOCART, 2, -1), (0, 0, TRANSACTION, 9, 5), (0, 2, TRANSACTION, 10, 6), (0, 3, TRANSACTION, 10, 6),
            (1, 4, ADDTOCART, 1, -1), (1, 5, ADDTOCART, 2, -1), (2, 6, TRANSACTION, 1, -1), (2, 7, TRANSACTION, 1, -1)]
    with_orders, without = log_of(rows, orders=True), log_of(rows)
    contents = lambda log: {tuple(x.tolist()) for x in np.split(*(lambda b: (b.item, b.indptr[1:-1]))(baskets(log, 30 * MINUTE)))}
    assert contents(with_orders) == {(0,), (2, 3), (4, 5)}  # a cart without an order stays a basket; a purchase without one has no known basket
    assert contents(without) == {(0, 1, 2, 3), (4, 5), (6, 7)}
    assert (basket_ids(with_orders, 30 * MINUTE) == -1).sum() == 4


def test_a_basket_that_is_too_large_is_left_out_and_large_ones_say_less():
    many = [(0, i, TRANSACTION, 1) for i in range(N)] + [(1, 0, TRANSACTION, 1), (1, 1, TRANSACTION, 1)]
    assert len(baskets(log_of(many), MINUTE, largest=5)) == 1 and len(baskets(log_of(many), MINUTE)) == 2
    pairs = count_pairs(baskets(log_of(many), MINUTE), N, 2, 1e9, N)
    assert pairs.index[0] == 1 and pairs.cosine[0] > 1.5 * pairs.cosine[1]


def test_direction_follows_the_order_in_the_cart():
    """A stroller, then the footmuff: the stroller brings the footmuff along and not the reverse."""
    rows = [(u, i, ADDTOCART, p) for u in range(30) for p, i in enumerate((0, 1))]
    rows += [(u, 2, ADDTOCART, 5) for u in range(30, 60)]
    source = CoPurchase().fit(log_of(rows), 100)
    chance = list(SCORES).index("chance")
    forth, back = source.score(carts([0], [1]), np.array([0, 1, 2]), np.array([1, 0], np.int32))[:, chance]
    assert forth > 0.8 and back == 0


def test_old_baskets_fade():
    rows = [(u, i, TRANSACTION, 0) for u in range(10) for i in (0, 1)] + [(u, i, TRANSACTION, 300 * DAY) for u in range(10, 16) for i in (0, 2)]
    pick = lambda half_life: CoPurchase(half_life_days=half_life).fit(log_of(rows), 301 * DAY).retrieve(carts([0]), 1).items[0, 0]
    assert pick(30) == 2 and pick(1e6) == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, N - 1), max_size=6), min_size=1, max_size=6), st.integers(1, N))
def test_a_batch_answers_as_each_alone(contents, k):
    source = fitted()
    h, candidates = carts(*contents), np.tile(np.arange(N, dtype=np.int32), len(contents))
    got, scored = source.retrieve(h, k), source.score(h, np.arange(len(contents) + 1) * N, candidates)
    for i, basket in enumerate(contents):
        alone = source.retrieve(h.take(i), k)
        np.testing.assert_array_equal(got.items[i], alone.items[0])
        np.testing.assert_array_equal(got.scores[i], alone.scores[0])
        np.testing.assert_array_equal(scored[i * N : (i + 1) * N], source.score(h.take(i), np.array([0, N]), candidates[:N]))
        proposed = alone.items[0][alone.items[0] >= 0]
        assert not set(proposed) & set(basket) and len(set(proposed)) == len(proposed)
        assert (np.diff(alone.scores[0][: len(proposed)]) <= 0).all()
        if not basket: assert not len(proposed) and np.isnan(scored[i * N : (i + 1) * N]).all()


def fitted(_made: list = []) -> CoPurchase:  # noqa: B006  one for all examples
    """A source fitted once."""
    if not _made: _made.append(CoPurchase().fit(random_log(9), 50 * DAY))
    return _made[0]


def test_views_alone_get_nothing():
    h = carts([1], [2, 3], event=VIEW)
    assert (fitted().retrieve(h, 5).items == -1).all()
    assert np.isnan(fitted().score(h, np.array([0, 1, 2]), np.array([4, 4], np.int32))).all()


def test_last_months_basket_hardly_counts():
    """With 0 put in now, what was bought a month ago changes nothing; with it alone, it is the basket."""
    source, asof = fitted(), 60 * DAY
    h = Histories(np.array([0, 2, 3, 4]), np.array([1, 0, 0, 1], np.int32), np.full(4, TRANSACTION, np.int8),
                  np.array([30 * DAY, asof - 1, asof - 1, 30 * DAY]), np.full(3, asof))
    scored = source.score(h, np.arange(4) * N, np.tile(np.arange(N, dtype=np.int32), 3)).reshape(3, N, -1)
    np.testing.assert_array_equal(scored[0], scored[1])
    assert not np.array_equal(scored[0], scored[2]) and (scored[2] > 0).any()


def test_a_saved_source_answers_as_before(tmp_path):
    save_source(fitted(), tmp_path / "source")
    back = load_source(tmp_path / "source")
    assert back == fitted() and {p.suffix for p in (tmp_path / "source").iterdir()} == {".json", ".npy"}
    for a, b in zip(back.tables, fitted().tables, strict=True): np.testing.assert_array_equal(a, b)
    h = carts([1, 4], [0])
    np.testing.assert_array_equal(back.retrieve(h, 5).items, fitted().retrieve(h, 5).items)


def test_the_order_of_rows_and_a_future_change_nothing():
    log, asof = random_log(4, orders=True), 30 * DAY
    future = [(0, 1, TRANSACTION, 45 * DAY, 5_000), (0, 2, TRANSACTION, 45 * DAY, 5_000)]
    rows = list(zip(*(a.tolist() for a in (log.user, log.item, log.event, log.ts, log.order)), strict=True))
    a, b = (CoPurchase().fit(log_of(x, orders=True).before(asof), asof) for x in (rows, rows[::-1] + future))
    for x, y in zip(a.tables, b.tables, strict=True): np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("rows", [[(0, 1, VIEW, 5)], [(0, 1, TRANSACTION, 5)], [(0, 1, TRANSACTION, 5), (0, 2, TRANSACTION, 5)]])
def test_next_to_no_baskets_is_no_error(rows):
    source = CoPurchase().fit(log_of(rows), 10)
    found = source.retrieve(carts([1]), 3).items[0]
    assert found.tolist() == [2 if len(rows) > 1 else -1, -1, -1]


def test_the_rule_follows_the_data():
    """Where groups are sold together, the rest of the group comes up; where the bestsellers join every basket, they do."""
    rng, n_items = np.random.default_rng(0), 60
    groups, bestsellers = [], []
    for u in range(600):
        start, common = 10 + 5 * int(rng.integers(10)), rng.choice(10, 6, replace=False).tolist()
        groups += [(u, i, TRANSACTION, u * DAY // 10) for i in {*common[:3], *range(start, start + 5)}]
        joins = {i for i in (0, 1) if rng.random() < 0.9}
        bestsellers += [(u, i, TRANSACTION, u * DAY // 10) for i in {*joins, *rng.choice(np.arange(10, n_items), 3, replace=False).tolist()}]
    asked = carts([2, 3, 10, 11, 12])
    for rows, wanted in ((groups, {13, 14}), (bestsellers, {0, 1})):
        source = CoPurchase().fit(log_of(rows, n_items), 61 * DAY)
        assert set(source.retrieve(asked, 2).items[0]) == wanted


def test_planted_complements_are_found_and_directed(trained):
    source, asof = CoPurchase().fit(trained.shop.log, epoch_ms(trained.shop.end)), epoch_ms(trained.shop.end)
    item, other = (trained.shop.items.index(trained.sim.complements[c]).astype(np.int32) for c in ("item_id", "complement_id"))
    n, n_items = len(item), len(trained.shop.items)
    proposed = source.retrieve(carts(*[[i] for i in item], asof=asof), 5).items
    found = (proposed == other[:, None]).any(axis=1).mean()
    assert found > 10 * 5 / n_items, f"{found:.2f} of {n} planted complements among 5 proposals"
    best = list(SCORES).index("best")
    forth, back = (source.score(carts(*[[i] for i in a], asof=asof), np.arange(n + 1), b)[:, best] for a, b in ((item, other), (other, item)))
    seen = (forth > 0) | (back > 0)
    assert seen.sum() >= 20 and forth[seen].sum() > 1.5 * back[seen].sum()


def test_ten_items_take_less_than_a_millisecond():
    rng = np.random.default_rng(0)
    rows = [(u, int(i), TRANSACTION, u) for u in range(3_000) for i in np.unique((rng.random(15) ** 2 * 2_000).astype(int))]
    source = CoPurchase().fit(log_of(rows, 2_000), 5_000)
    h = carts(list(range(0, 100, 10)))
    source.retrieve(h, 50)
    best = []
    for _ in range(20):
        began = time.perf_counter()
        source.retrieve(h, 50)
        best.append(time.perf_counter() - began)
    assert min(best) < 0.001, f"{1000*min(best):.2f} ms"
