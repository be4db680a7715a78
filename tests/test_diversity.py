"""MMR and the determinantal process against their definitions; fairness moves what it should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.reranking.diversity import DAMP, Exposure, dpp, fair_odds, mmr, proposed_share

CASES = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 14), st.sampled_from([0, 3, 8]), st.floats(0, 5))


def case(seed: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, unit vectors of which some are missing, and categories of which some are unknown."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(m, d)).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    vectors[rng.random(m) < 0.2] = 0
    return rng.normal(size=m), vectors, rng.integers(-1, 3, m).astype(np.int32)


def likeness(vectors: np.ndarray, category: np.ndarray) -> np.ndarray:
    """The definition, pair by pair."""
    m = len(category)
    out = np.zeros((m, m))
    for i in range(m):
        for j in range(m):
            if vectors[i].any() and vectors[j].any(): out[i, j] = float(vectors[i] @ vectors[j])
            else: out[i, j] = float(category[i] == category[j] >= 0)
    return out


@settings(max_examples=80, deadline=None)
@given(CASES)
def test_mmr_is_its_definition(c):
    seed, m, d, strength = c
    value, vectors, category = case(seed, m, d)
    alike, shown = likeness(vectors, category), []
    for _ in range(min(6, m)):
        left = [i for i in range(m) if i not in shown]
        worth = {i: value[i] - strength * max([0, *(alike[i, j] for j in shown)]) for i in left}
        shown.append(max(left, key=worth.get))
    got = mmr(value, vectors, category, strength, 6)
    worths = [value[i] - strength * max([0, *(alike[i, j] for j in got[:t])]) for t, i in enumerate(got)]
    wanted = [value[i] - strength * max([0, *(alike[i, j] for j in shown[:t])]) for t, i in enumerate(shown)]
    assert len(set(got)) == min(6, m) and np.allclose(worths, wanted, atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(CASES.filter(lambda c: c[2] > 0))
def test_the_greedy_process_takes_the_largest_determinant(c):
    seed, m, d, strength = c
    value, vectors, category = case(seed, m, d)
    vectors[~vectors.any(axis=1)] = np.eye(d, dtype=np.float32)[0]  # a kernel must be positive: no mixing with categories
    kernel = DAMP * likeness(vectors, category)
    np.fill_diagonal(kernel, 1)
    worth = lambda picked: value[picked].sum() + strength * np.linalg.slogdet(kernel[np.ix_(picked, picked)])[1]
    shown: list[int] = []
    for got in dpp(value, vectors, category, strength, 5):
        best = max(worth([*shown, i]) for i in range(m) if i not in shown)
        assert worth([*shown, int(got)]) == pytest.approx(best, abs=1e-4)
        shown.append(int(got))
    assert len(set(shown)) == min(5, m)


@pytest.mark.parametrize("pick", [mmr, dpp])
def test_without_strength_the_order_is_by_value_and_ties_go_to_the_earlier(pick):
    value, vectors, category = case(3, 40, 8)
    assert pick(value, vectors, category, 0.0, 40).tolist() == np.argsort(-value, kind="stable").tolist()
    assert pick(np.zeros(5), np.zeros((5, 0), np.float32), np.full(5, -1, np.int32), 1.0, 5).tolist() == list(range(5))


@pytest.mark.parametrize("pick", [mmr, dpp])
def test_more_strength_makes_a_list_less_alike(pick):
    value, vectors, category = case(5, 200, 16)
    alike = likeness(vectors, category)
    crowd = [alike[np.ix_(p, p)][np.triu_indices(10, 1)].mean() for p in (pick(value, vectors, category, s, 10) for s in (0.0, 1.0, 5.0))]
    assert crowd[0] > crowd[1] > crowd[2]


def test_fairness_holds_back_what_everyone_gets_and_lifts_the_new():
    exposure = Exposure(np.array([1, 0.1, 0, 0], np.float32), np.array([5, 1, 0, 0], np.float32), np.array([99, 99, np.nan, 3], np.float32))
    odds = fair_odds(exposure, tail=1.0, new=0.5, new_days=14)
    assert odds[0] < odds[1] < odds[2] == 0 < odds[3] == 0.5
    assert not fair_odds(exposure, 0.0, 0.0, 14).any()
    assert exposure.in_tail(0.25).tolist() == [False, True, True, True] and exposure.is_new(14).tolist() == [False, False, False, True]


def test_proposals_are_counted_per_request():
    assert proposed_share(np.array([0, 1, 1, 3]), 2, 4).tolist() == [0.5, 1, 0, 0.5]
