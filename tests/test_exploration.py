"""Exploration: the propensities that are logged are the frequencies with which things happen, and a draw can be repeated."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.reranking.exploration import explore, softmax, uniforms

LISTED, NEW = np.arange(6, dtype=np.int32), np.array([90, 91, 92], np.int32)
ODDS = np.array([0.0, 1.0, -1.0])


@pytest.mark.parametrize(("epsilon", "temperature", "keep"), [(0.2, 1, 3), (0.9, 5, 0), (0.5, 0.3, 5)])
def test_frequencies_are_the_logged_propensities(epsilon, temperature, keep):
    n, seen, said = 6_000, {}, {}
    for i in range(n):
        a = explore(LISTED, NEW, ODDS, epsilon, temperature, keep, f"request {i}")
        for slot, (item, p) in enumerate(zip(a.items.tolist(), a.propensity.tolist(), strict=True)):
            seen[slot, item] = seen.get((slot, item), 0) + 1
            assert said.setdefault((slot, item), p) == p  # the same thing is never logged with two probabilities
    for key, p in said.items(): assert abs(seen[key] / n - p) < 4.5 * np.sqrt(p * (1 - p) / n) + 1e-9, (key, seen[key] / n, p)
    for slot in range(6): assert sum(p for (s, _), p in said.items() if s == slot) == pytest.approx(1, abs=0.01)
    assert all(said[slot, slot] == 1 for slot in range(keep))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.floats(0, 0.999), st.integers(0, 8), st.integers(0, 8), st.integers(0, 5), st.floats(1e-3, 1e6))
def test_any_draw_is_a_list_with_probabilities(request_id, epsilon, keep, length, fresh, temperature):
    listed, new = np.arange(length, dtype=np.int32), np.arange(50, 50 + fresh, dtype=np.int32)
    value = np.random.default_rng(fresh).normal(size=fresh) * 50
    a, b = (explore(listed, new, value, epsilon, temperature, keep, request_id) for _ in range(2))
    assert np.array_equal(a.items, b.items) and np.array_equal(a.propensity, b.propensity)
    assert len(a.items) == length == len(set(a.items.tolist())) and (a.propensity > 0).all() and (a.propensity <= 1).all()
    assert np.array_equal(a.items[:keep], listed[:keep]) and (a.items != listed).sum() == (a.slot >= 0)
    assert listed.tolist() == list(range(length))  # what came in is left alone


def test_off_is_off():
    a = explore(LISTED, NEW, ODDS, 0, 1, 0, "r")
    assert a.items is LISTED and (a.propensity == 1).all() and a.slot == -1


@pytest.mark.parametrize("epsilon", [-0.1, 1, float("nan")])
def test_an_epsilon_outside_its_range_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon must be"): explore(LISTED, NEW, ODDS, epsilon, 1, 0, "r")


def test_lone_surrogates_and_salts_are_taken():
    assert uniforms("\ud800", 2).shape == (2,) and not np.array_equal(uniforms("a", 4), uniforms("a", 4, "other"))
    with pytest.raises(ValueError, match="8 numbers, not 9"): uniforms("a", 9)


def test_softmax_survives_extremes():
    assert softmax(np.array([1e9, 0.0, -1e9]), 1e-3).tolist() == [1, 0, 0] and softmax(np.array([5.0]), 1).tolist() == [1]
