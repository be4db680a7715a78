"""The index against a count by hand, and what must hold of it whatever the column."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from reco.monitoring.drift import binned, by_chance, covariance, cuts_of, drift_table, psi

NUMBERS = st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.5, -3.0, math.inf, -math.inf, math.nan]) | st.floats(width=32), min_size=1, max_size=60)


def by_hand(before: list[int], now: list[int]) -> float:
    bins = [(a, b) for a, b in zip(before, now, strict=True) if a + b]
    n, m = (sum(x) + len(bins) / 2 for x in (before, now))
    return sum(((b + 0.5) / m - (a + 0.5) / n) * math.log(((b + 0.5) / m) / ((a + 0.5) / n)) for a, b in bins)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=12).filter(lambda x: all(map(sum, zip(*x, strict=True)))))
def test_the_index_is_that_of_a_count_by_hand(counts):
    a, b = map(list, zip(*counts, strict=True))
    found = psi(np.array(a), np.array(b))
    assert found == pytest.approx(by_hand(a, b), abs=1e-12) and found >= 0
    assert found == pytest.approx(psi(np.array(b), np.array(a)))


@given(NUMBERS, NUMBERS)
def test_every_value_has_one_bin_and_equal_sides_do_not_drift(before, now):
    a, b = np.array(before), np.array(now)
    cuts = cuts_of(a)
    assert (np.diff(cuts) > 0).all() and ((binned(b, cuts) == len(cuts) + 1) == np.isnan(b)).all()
    frames = [pl.DataFrame({"x": x}) for x in (a, b)]
    assert drift_table("t", frames[0], frames[0])["psi"].item() == 0
    row = drift_table("t", *frames).row(0, named=True)
    assert row["psi"] >= 0 and 0 <= row["chance"] <= 1 and row["excess"] == row["psi"] - row["noise"]


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_order_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    a, b = (pl.DataFrame({"who": rng.integers(0, 20, 100), "x": rng.lognormal(size=100), "w": rng.choice(list("abc"), 100)}) for _ in range(2))
    mixed = drift_table("t", a.sample(fraction=1, shuffle=True, seed=seed), b.sample(fraction=1, shuffle=True, seed=seed + 1), "who")
    assert_frame_equal(mixed, drift_table("t", a, b, "who"), rel_tol=1e-9, abs_tol=1e-12)


def test_rows_of_their_own_have_the_noise_of_the_paper():
    code = np.repeat(np.arange(10), 40)
    spread = covariance(code, 10, np.arange(400))
    noise, _ = by_chance(0.05, np.full(10, 0.1), 2 * spread, 400)
    assert noise == pytest.approx(9 * 2 / 400, rel=0.01)


def test_chance_is_told_truly_and_a_planted_shift_is_found():
    rng, rare = np.random.default_rng(0), 0
    for _ in range(300):
        a, b = (pl.DataFrame({"x": rng.lognormal(size=120)}) for _ in range(2))
        rare += drift_table("t", a, b)["chance"].item() < 0.05
    assert 2 <= rare <= 32
    moved = drift_table("t", a, pl.DataFrame({"x": rng.lognormal(0.9, 1, 3_000)})).row(0, named=True)
    assert moved["excess"] > 0.4 and moved["chance"] < 1e-4


@pytest.mark.parametrize(("before", "now", "drifts"), [
    ([3.0] * 90, [3.0] * 80, False), ([3.0] * 90, [4.0] * 80, True), ([None] * 90, [None] * 80, False), ([None] * 90, [1.0] * 80, True),
    (["a"] * 90, ["never seen"] * 80, True), ([0.0] * 80 + [1.0] * 10, [0.0] * 40 + [1.0] * 40, True), ([True] * 90, [True] * 70, False),
])
def test_odd_columns(before, now, drifts):
    row = drift_table("t", *(pl.DataFrame({"x": x}, strict=False).with_columns(pl.col("x").cast(pl.Float64) if isinstance(y, float) else pl.col("x"))
                             for x, y in ((before, now[0]), (now, before[0])))).row(0, named=True)
    assert (row["chance"] < 1e-6 and row["excess"] > 0.2) == drifts


def test_sides_with_other_columns_or_without_rows():
    a = pl.DataFrame({"x": [1.0], "y": ["a"]})
    with pytest.raises(ValueError, match=r"t: columns that only one side has: \['y'\]"): drift_table("t", a, a.drop("y"))
    assert drift_table("t", a, a.clear())["psi"].null_count() == 2
