"""Experiments: who is in which, what may be said, interleaving and off-policy estimates, held to brute force and to known truths."""

import re
import time
import uuid
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import settings as how
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, chi2, multinomial, norm, ttest_ind

from benchmarks.experiments import HALVES, said, shopper_days, split
from reco.data.histories import epoch_ms
from reco.evaluation.counterfactual import ips
from reco.experiments.assignment import (
    Assigner,
    Experiment,
    ExperimentError,
    Experiments,
    Variant,
    changes_of,
    crowded,
    label,
    other_side,
    read_experiments,
    served_by,
    variant_in,
)
from reco.experiments.interleaving import (
    FIRST,
    NOBODY,
    SECOND,
    credit,
    drafted,
    interleaved,
    preference,
    preference_row,
)
from reco.experiments.off_policy import Target, at_epsilon, half_widths, off_policy, slates, slot_guesses
from reco.experiments.readout import (
    METRICS,
    Metric,
    e_value,
    lift_interval,
    measured,
    readout,
    sequential_bound,
    shopper_totals,
    srm_p,
)
from reco.reranking.exploration import explore

quick = how(max_examples=50, deadline=None, derandomize=True)


def between(hits: int, n: int, rate: float) -> bool:
    """Whether so many hits are what a rate would give, but for one case in ten thousand."""
    low, high = binom.ppf([5e-5, 1 - 5e-5], n, rate)
    return low <= hits <= high


def at_most(hits: int, n: int, rate: float) -> bool:
    return hits <= binom.ppf(1 - 1e-4, n, rate)


# Assignment


def pair(name: str = "e", weight: float = 0.5, **changes) -> Experiment:
    return Experiment(name=name, variant=(Variant(name="a", weight=1 - weight), Variant(name="b", weight=weight)), **changes)


def arms(book: Experiments | Experiment, users: list[str], now: int = 0) -> list[str]:
    by = Assigner(book if isinstance(book, Experiments) else Experiments(experiment=(book,)))
    return [label(by.arms(u, now, "for_you")) for u in users]


USERS = [f"user_{i}" for i in range(4_000)]
IDS = {"numbers": [str(i) for i in range(20_000)], "e-mails": [f"shopper.{i}@example.com" for i in range(20_000)],
       "zero-padded": [f"{i:012d}" for i in range(20_000)], "UUIDs": [str(uuid.UUID(int=(i << 64) | 0x4000_8000_0000_0000_0000)) for i in range(20_000)]}


@pytest.mark.parametrize("family", IDS)
def test_ids_of_every_kind_are_spread_evenly(family):
    seen = arms(Experiment(name="x", share=0.5, variant=[Variant(name=n, weight=0.25) for n in "abcd"]), IDS[family])
    counts = np.array([seen.count(x) for x in ("", "x=a", "x=b", "x=c", "x=d")])
    wanted = len(seen) * np.array([0.5, 0.125, 0.125, 0.125, 0.125])
    assert counts.sum() == len(seen) and ((counts - wanted) ** 2 / wanted).sum() < chi2.ppf(1 - 1e-4, 4)


@pytest.mark.parametrize("family", IDS)
def test_two_experiments_are_independent(family):
    seen = arms(Experiments(experiment=(pair("one"), pair("two"))), IDS[family])
    table = np.array([[seen.count(f"one={a} two={b}") for b in "ab"] for a in "ab"])
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    assert table.sum() == len(seen) and ((table - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, 1)


def test_the_places_are_these_for_ever():
    """Stable over restarts, replicas and versions: whoever changes the hash moves every shopper of every running experiment."""
    assert "".join(x[-1] for x in arms(pair("pinned"), [f"user_{i}" for i in range(24)])) == "baaaaaabaaaabbababbaaaba"
    assert arms(pair("pinned"), USERS) == arms(pair("pinned"), USERS)
    assert arms(pair("renamed", salt="pinned"), USERS) == [x.replace("pinned", "renamed") for x in arms(pair("pinned"), USERS)]


weights = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda x: [n / 120 for n in x])


@quick
@given(before=weights, grown=st.integers(0, 3), by=st.integers(1, 60), share=st.floats(0.1, 0.9))
def test_growing_a_variant_moves_only_the_control(before, grown, by, share):
    grown %= len(before)
    after = [w + (by / 120 if i == grown else 0) for i, w in enumerate(before)]
    assume(sum(after) <= 1)
    of = lambda w: tuple(Variant(name=n, weight=x) for n, x in zip("cdefg", [1 - sum(w), *w], strict=False))
    assume(not crowded(of(after)) and not crowded(of(before)))
    users = USERS[:400]
    old, new = (arms(Experiment(name="x", share=s, variant=of(w)), users) for s, w in ((share, before), (min(share + 0.1, 1), after)))
    for was, now in zip(old, new, strict=True):
        assert was in (now, "") or (was == "x=c" and now == f"x={'defg'[grown]}")


def test_appending_a_variant_moves_only_the_control():
    small = [Variant(name="c", weight=0.7), Variant(name="d", weight=0.2), Variant(name="e", weight=0.1)]
    more = [small[0].model_copy(update={"weight": 0.55}), *small[1:], Variant(name="f", weight=0.15)]
    moved = {(a, b) for a, b in zip(*(arms(Experiment(name="x", variant=v), USERS) for v in (small, more)), strict=True) if a != b}
    assert moved == {("x=c", "x=f")}


def test_the_holdout_is_in_nothing_and_the_same_for_all():
    book = Experiments(holdout=0.1, experiment=(pair("one"), pair("two", share=0.5), pair("deaf", heeds_holdout=False)))
    by, seen = Assigner(book), arms(book, USERS)
    held = [by.held_out(u) for u in USERS]
    assert between(sum(held), len(held), 0.1)
    assert all(("one=" in x) != h and "deaf=" in x for x, h in zip(seen, held, strict=True))
    wider = Assigner(book.model_copy(update={"holdout": 0.2}))
    assert all(wider.held_out(u) for u, h in zip(USERS, held, strict=True) if h)


def test_the_holdout_may_keep_what_it_has_and_has_a_first_day():
    book = Experiments(holdout=0.3, holdout_from="2026-01-01T00:00:00Z", holdout_serve="a-bundle", experiment=(pair("one"), pair("deaf", heeds_holdout=False)))
    by, day = Assigner(book), epoch_ms(book.holdout_from)
    before, after = (arms(book, USERS, t) for t in (day - 1, day))
    for u, b, a in zip(USERS, before, after, strict=True):
        assert b.startswith("one=") and (a == f"holdout=held_out {b.split()[1]}" if by.held_out(u) else a == b)
    held = next(u for u in USERS if by.held_out(u))
    assert served_by(by.arms(held, day, "for_you")) == "a-bundle" and not changes_of(by.arms(held, day, "for_you"))
    for bad, says in (({"holdout_serve": "challenger"}, "a challenger changes too"), ({"experiment": (pair("holdout"),)}, "no experiment can be called 'holdout'")):
        with pytest.raises(ValueError, match=says): Experiments(**bad)


def test_nobody_is_in_two_experiments_of_a_group():
    one, two = (pair(n, group="g", begin=b, share=s, weight=0.5) for n, b, s in (("one", 0, 0.3), ("two", 0.3, 0.7)))
    seen = arms(Experiments(experiment=(one, two)), USERS)
    assert all(x.count("=") == 1 for x in seen) and between(sum(x.startswith("one") for x in seen), len(seen), 0.3)
    inside = [x for x in seen if x.startswith("two")]
    assert between(inside.count("two=b"), len(inside), 0.5)  # the variant does not depend on the place in the group


def test_dates_surfaces_and_anonymous_shoppers():
    e = Experiment.model_validate({"name": "x", "from": "2026-11-02T00:00:00Z", "until": "2026-11-03T00:00:00Z", "surfaces": ["similar"],
                                   "variant": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]})
    by, start, end = Assigner(Experiments(experiment=(e,))), epoch_ms(e.start), epoch_ms(e.until)
    assert [len(by.arms("u", t, "similar")) for t in (start - 1, start, end - 1, end)] == [0, 1, 1, 0]
    assert not by.arms("u", start, "for_you") and not by.arms(None, start, "similar") and by.arms("", start, "similar") and by.arms("\ud800", start, "similar")


def test_what_serving_is_told():
    book = Experiments(experiment=(
        Experiment(name="m", variant=(Variant(name="a", weight=0), Variant(name="b", weight=1, serve="challenger"))),
        Experiment(name="r", variant=(Variant(name="a", weight=0), Variant(name="b", weight=1, rerank={"diversity": 2}, explore={"epsilon": 0.1})))))
    found = Assigner(book).arms("u", 0, "for_you")
    assert changes_of(found) == {"rerank": {"diversity": 2}, "explore": {"epsilon": 0.1}} and not changes_of(())
    assert served_by(found) == "challenger" and served_by(()) == "champion"
    frame = pl.DataFrame({"variant": [label(found), "", "mm=x"]})
    assert frame.select(variant_in(pl.col("variant"), "m"))["variant"].to_list() == ["b", None, None]


GOOD = """holdout = 0.1
[[experiment]]
name = "one"
[[experiment.variant]]
name = "a"
weight = 0.5
[[experiment.variant]]
name = "b"
weight = 0.5
serve = "challenger"
"""


@pytest.mark.parametrize(("old", "new", "says"), [
    ("weight = 0.5", "weight = 0.6", ["line 2", "experiment 1", "add up to 1.1"]),
    ("weight = 0.5", 'weight = "half"', ["line 6", "weight = 'half'", "from 0 to 1"]),
    ("weight = 0.5", "weight = nan", ["line 6", "weight"]),
    ('serve = "challenger"', 'server = "challenger"', ["line 10", "variant 2 server", "known: name, weight, serve"]),
    ('serve = "challenger"', "rerank = {divers = 1}", ["line 10", "[rerank] divers = 1"]),
    ('serve = "challenger"', 'rules = {file = "x"}', ["line 10", "rules file of its own"]),
    ('name = "b"', 'name = "a"', ["two variants are called 'a'"]),
    ('name = "one"', 'name = "o n e"', ["line 3", "name = 'o n e'", "letters, digits"]),
    ('name = "one"', 'name = "one"\nshare = 0.7\nbegin = 0.5', ["begin 0.5 and share 0.7"]),
    ('name = "one"', 'name = "one"\nfrom = 2026-11-02T00:00:00', ["line 4", "from", "timezone"]),
    ("holdout = 0.1", "holdout = 0.9", ["line 1", "holdout = 0.9"]),
    ("holdout = 0.1", "hold_out = 0.1", ["line 1", "hold_out", "known: holdout"]),
    ("holdout = 0.1", "holdout == 0.1", ["line 1", "column"]),
])
def test_a_bad_file_is_refused_with_its_line(tmp_path, old, new, says):
    path = tmp_path / "experiments.toml"
    path.write_text(GOOD)
    assert len(read_experiments(path).experiment) == 1
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ExperimentError) as e: read_experiments(path)
    assert all(s in str(e.value) for s in [str(path), *says]), e.value


def test_what_the_manual_shows_can_be_written(tmp_path):
    """Its files as they stand, and each row of its table of variants."""
    text = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text()
    (path := tmp_path / "experiments.toml").write_text("\n".join(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)))
    book = read_experiments(path)
    assert [e.name for e in book.experiment] == ["variety", "duel"] and book.experiment[1].interleave and book.bundles == {book.holdout_serve}
    keys = re.findall(r"^\| `(\w+ = [^`]+)` \|", text, re.MULTILINE)
    assert len(keys) == 6
    for key in keys:
        path.write_text(GOOD.replace('serve = "challenger"', key))
        assert read_experiments(path).experiment[0].variant[1].changes


def test_experiments_that_contradict_each_other_are_refused():
    serve = lambda name, **more: Experiment(name=name, variant=(Variant(name="a", weight=0.5), Variant(name="b", weight=0.5, serve="challenger")), **more)
    for one, two, says in ((serve("x"), serve("y"), "both change serve"), (pair("x"), pair("x"), "two experiments are called"), (pair("x"), pair("y", salt="x"), "one salt"),
                           (serve("x", group="g", share=0.6), serve("y", group="g", begin=0.5, share=0.5), "share 0.1 of the line")):
        with pytest.raises(ValueError, match=says): Experiments(experiment=(one, two))
    assert Experiments(experiment=(serve("x", group="g", share=0.5), serve("y", group="g", begin=0.5, share=0.5)))
    assert Experiments(experiment=(serve("x", surfaces=("similar",)), serve("y", surfaces=("for_you",))))
    with pytest.raises(ExperimentError, match="nowhere"): read_experiments("nowhere.toml")
    with pytest.raises(ValueError, match="grown into each other"): Experiment(name="x", variant=[Variant(name=n, weight=w) for n, w in zip("abcd", (0, 0.6, 0.1, 0.3), strict=True)])


def test_the_hot_path_is_fast():
    by = Assigner(Experiments(experiment=(pair(),)))
    took = []
    for _ in range(20):
        began = time.process_time()
        for u in USERS: by.arms(u, 0, "for_you")
        took.append((time.process_time() - began) / len(USERS))
    assert min(took) < 6e-6  # 1.2 µs on a quiet machine; the benchmark says how much


# The split


@quick
@given(st.integers(0, 40), st.integers(0, 40), st.floats(0.05, 0.95))
def test_two_variants_are_a_binomial_test(a, b, share):
    assume(a + b)
    assert srm_p({"a": a, "b": b}, {"a": share, "b": 1 - share}) == pytest.approx(binomtest(a, a + b, share).pvalue, rel=1e-6)


def test_three_variants_are_counted_one_by_one():
    share, seen = [0.2, 0.3, 0.5], (5, 1, 6)
    every = [x for x in product(range(13), repeat=3) if sum(x) == 12]
    p = np.array([multinomial.pmf(x, 12, share) for x in every])
    assert srm_p(dict(zip("abc", seen, strict=True)), dict(zip("abc", share, strict=True))) == pytest.approx(p[p <= multinomial.pmf(seen, 12, share) + 1e-12].sum())


def test_many_shoppers_are_a_chi_square():
    assert srm_p({"a": 50_300, "b": 49_700}, {"a": 1, "b": 1}) == pytest.approx(chi2.sf(2 * 300**2 / 50_000, 1))
    assert srm_p({"a": 1_000, "c": 3}, {"a": 1, "b": 0, "c": 0}) == 0 and srm_p({"a": 9}, {"a": 1}) == 1 and srm_p({}, {"a": 1, "b": 1}) == 1
    with pytest.raises(ValueError, match="without a planned share: \\['x'\\]"): srm_p({"x": 1}, {"a": 1})
    with pytest.raises(ValueError, match="not all 0"): srm_p({"a": 1}, {"a": 0})


def test_false_alarms_of_the_split_are_as_stated():
    rng = np.random.default_rng(1)
    for n in (200, 100_000):
        hits = sum(srm_p({"a": a, "b": n - a}, {"a": 0.5, "b": 0.5}) < 0.05 for a in rng.binomial(n, 0.5, 1_000).tolist())
        assert at_most(hits, 1_000, 0.05) and (n == 200 or between(hits, 1_000, 0.05))  # exact tests of small counts are below their level


# The statistics


def test_a_mean_is_welchs_t_test():
    rng = np.random.default_rng(2)
    y, arm = rng.lognormal(0, 1, 500), rng.integers(0, 2, 500)
    m = measured(y, np.ones(500), arm, 2)
    z = (m.value[1] - m.value[0]) / np.sqrt(m.variance.sum())
    assert z == pytest.approx(ttest_ind(y[arm == 1], y[arm == 0], equal_var=False).statistic)


def test_cuped_is_a_regression_and_takes_nothing_from_the_truth():
    rng, n = np.random.default_rng(3), 40_000
    before = rng.standard_normal(n)
    arm, rho = rng.integers(0, 2, n), 0.8
    y = 10 + rho * before + np.sqrt(1 - rho**2) * rng.standard_normal(n) + 0.05 * arm
    plain, less = (measured(y, np.ones(n), arm, 2, c) for c in (None, before[:, None]))
    assert less.saved == pytest.approx(rho**2, abs=0.01) and less.variance.sum() == pytest.approx(plain.variance.sum() * (1 - less.saved), rel=1e-9)
    assert abs(np.diff(less.value)[0] - 0.05) < 4 * np.sqrt(less.variance.sum())
    design = np.column_stack([arm == 0, arm == 1, before]).astype(float)
    assert np.diff(less.value)[0] == pytest.approx(np.diff(np.linalg.lstsq(design, y, rcond=None)[0][:2])[0])
    useless = measured(y, np.ones(n), arm, 2, np.column_stack([before, before, np.ones(n)]))  # collinear and constant columns
    assert np.allclose(useless.value, less.value) and np.allclose(useless.variance, less.variance)


@quick
@given(st.floats(-5, 5), st.floats(1, 1e6), st.floats(0.001, 0.3), st.floats(1, 1e6))
def test_the_e_value_and_the_bound_say_the_same(z, t, alpha, plan):
    bound = float(sequential_bound(t, alpha, plan))
    assume(abs(abs(z) - bound) > 1e-6)
    assert (float(e_value(z, t, alpha, plan)) >= 1 / alpha) == (abs(z) >= bound)
    assert float(e_value(bound, t, alpha, plan)) == pytest.approx(1 / alpha)
    assert bound >= float(sequential_bound(plan, alpha, plan)) - 1e-9 and bound > norm.ppf(1 - alpha / 2)


@pytest.mark.parametrize("t", [1, 100, 3_000])
def test_a_bet_on_nothing_is_fair(t):
    """E[e] = 1 without a difference, for which 1/e is a p-value."""
    z, step = np.linspace(-35, 35, 70_001, retstep=True)
    assert np.exp(np.log(e_value(z, t, 0.05, 1_000)) + norm.logpdf(z)).sum() * step == pytest.approx(1, rel=1e-3)


@quick
@given(st.floats(0.01, 10), st.floats(1e-6, 1), st.floats(0.01, 10), st.floats(1e-6, 1), st.floats(1, 4))
def test_fiellers_ends_are_where_z_is_the_bound(a, va, b, vb, bound):
    low, high = lift_interval(a, va, b, vb, bound)
    if np.isnan(low): return  # not decided where the control may be 0
    for lift in (low, high): assert abs(a - (1 + lift) * b) / np.sqrt(va + (1 + lift) ** 2 * vb) == pytest.approx(bound, rel=1e-5)
    assert low <= a / b - 1 <= high and (low > 0 or high < 0) == (abs(a - b) > bound * np.sqrt(va + vb))


# Calibration: shoppers who return, with tastes of their own


def shop(n: int, days: int, seed: int) -> dict[str, np.ndarray]:
    """What n shoppers did so far, by the end of each day: days there, exposures, clicks, revenue. float64 [days, n]."""
    rng = np.random.default_rng(seed)
    first, often, rate = rng.integers(0, days, n), rng.lognormal(0, 1, n).clip(0, 6), rng.beta(0.8, 9, n)
    there = (rng.random((days, n)) < 1 - np.exp(-0.2 * often)) & (np.arange(days)[:, None] >= first)
    there[first, np.arange(n)] = True
    exposures = there * (1 + rng.poisson(4 * often, (days, n)))
    clicks = rng.binomial(exposures, rate)
    revenue = rng.binomial(clicks, 0.2) * rng.lognormal(3, 0.8, (days, n))
    return {k: x.cumsum(axis=0).astype(float) for k, x in {"days": there, "exposures": exposures, "clicks": clicks, "revenue": revenue}.items()}


def walks(world: dict[str, np.ndarray], over: str, under: str | None, tests: int, seed: int) -> np.ndarray:
    """z of A/A tests at the end of each day: float64 [tests, days]."""
    rng, (days, n), out = np.random.default_rng(seed), world["days"].shape, []
    for _ in range(tests):
        arm, z = rng.integers(0, 2, n), []
        for d in range(days):
            seen = world["days"][d] > 0
            m = measured(world[over][d][seen], world[under][d][seen] if under else np.ones(seen.sum()), arm[seen], 2)
            z.append((m.value[1] - m.value[0]) / np.sqrt(m.variance.sum()) if m.counted.min() >= 20 else 0)
        out.append(z)
    return np.array(out)


@pytest.fixture(scope="module")
def world() -> dict[str, np.ndarray]:
    return shop(600, 14, 4)


@pytest.mark.parametrize(("over", "under"), [("clicks", "exposures"), ("revenue", None)])
def test_a_thousand_comparisons_of_the_same(world, over, under):
    z, t = walks(world, over, under, 1_000, 5), world["days"].sum(axis=1)
    once, daily = np.abs(z[:, -1]) > norm.ppf(0.975), np.abs(z) > norm.ppf(0.975)
    assert between(once.sum(), 1_000, 0.05)
    assert daily.any(axis=1).sum() > 2 * once.sum()  # what peeking does
    for plan in (t[-1], t[-1] / 20): assert at_most((np.abs(z) > sequential_bound(t, 0.05, plan)).any(axis=1).sum(), 1_000, 0.05)


@pytest.mark.parametrize("with_before", [False, True])
def test_business_metrics_of_the_same_are_called_different_as_seldom_as_promised(with_before):
    """Every test with shoppers of its own, through the whole readout; the benchmark does a thousand."""
    tables = [said(shopper_days(900, 28, i), "aa", [9, 18, 28], with_before) for i in range(120)]
    wrong = lambda t, metric: t.filter(metric=metric)["verdict"].is_in(["ahead", "behind"]).item()
    for metric in METRICS:
        *looks, once = zip(*([wrong(t, metric.name) for t in runs] for runs in tables), strict=True)
        assert between(sum(once), len(tables), 0.05) and at_most(sum(map(any, zip(*looks, strict=True))), len(tables), 0.05), metric.name
        assert (np.mean([t[-1].filter(metric=metric.name)["saved"].item() for t in tables]) > 0.1) == with_before


def test_the_time_before_takes_noise_from_business_metrics_and_nothing_else():
    """A planted difference: CUPED finds the same on average, misses it as seldom as the interval says, and varies less by the share that it says."""
    found, lifts = [], (0.1, 0.1, 0.1)
    for i in range(200):
        days = shopper_days(900, 28, 1_000 + i, lifts)
        rows, before = split(days, "cuped")
        sums = days.filter(pl.col("day") >= 0).select(pl.exclude("user_id", "day").sum(), shoppers=pl.col("user_id").n_unique()).row(0, named=True)
        sums |= {"exposures_if": sums["exposures"], "shoppers_if": sums["shoppers"]}
        for metric, plain, less in zip(METRICS, *(readout(rows, HALVES, b, plan=None, least=2).iter_rows(named=True) for b in (None, before)), strict=True):
            old, new = (sums[metric.over + x] / sums[metric.under + x] for x in ("", "_if"))
            found.append({"metric": metric.name, "saved": less["saved"], "truth": new - old} | {f"{n}_{k}": v for n, r in (("plain", plain), ("less", less)) for k, v in (
                ("error", r["value"] - r["control"] - (new - old)), ("missed", not r["low"] <= new / old - 1 <= r["high"]))})
    for (name,), f in pl.DataFrame(found).partition_by("metric", as_dict=True).items():
        n, sd = f.height, {k: f[f"{k}_error"].std() for k in ("plain", "less")}
        for k in ("plain", "less"): assert abs(f[f"{k}_error"].mean()) < 4 * sd[k] / np.sqrt(n) and between(f[f"{k}_missed"].sum(), n, 0.05), (name, k)
        saved, left = f["saved"].mean(), (sd["less"] / sd["plain"]) ** 2
        assert saved > 0.05 and abs(left - (1 - saved)) < 4 * (1 - saved) * np.sqrt(4 * saved / n), (name, left, saved)
        assert f["truth"].mean() > 4 * sd["less"] / np.sqrt(n)  # a bias of the size of the difference would be seen


def test_the_sequence_holds_where_nothing_helps_it():
    """Independent steps, many looks: as near to the bound's own conditions as it gets; and it is not idle."""
    rng = np.random.default_rng(6)
    z = rng.standard_normal((4_000, 500)).cumsum(axis=1) / np.sqrt(np.arange(1, 501))
    t = 20.0 * np.arange(1, 501)
    hits = (np.abs(z) > sequential_bound(t, 0.05, 500)).any(axis=1).sum()
    assert at_most(hits, 4_000, 0.05) and hits > 4_000 * 0.01


def test_power_beside_one_look():
    """A lift is found by the sequence too, in more time."""
    rng, n = np.random.default_rng(7), 300
    z = (rng.standard_normal((n, 50)) + 0.5).cumsum(axis=1) / np.sqrt(np.arange(1, 51))
    once = (z[:, -1] > norm.ppf(0.975)).mean()
    ever = (z > sequential_bound(100.0 * np.arange(1, 51), 0.05, 5_000)).any(axis=1).mean()
    assert once > 0.9 and 0.6 < ever <= 1


# The table


def rows_of(n: int, seed: int, lift: float = 1, variants: str = "ab") -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    arm = rng.integers(0, len(variants), n)
    exposures = 1 + rng.poisson(10, n)
    clicks = rng.binomial(exposures, np.where(arm > 0, 0.1 * lift, 0.1))
    purchases = rng.binomial(clicks, 0.2)
    orders = (purchases + 1) // 2
    return pl.DataFrame({"user_id": [f"u{i}" for i in range(n)], "variant": [variants[a] for a in arm], "exposures": exposures, "clicks": clicks,
                         "purchases": purchases, "orders": orders, "revenue": orders * 10.0})


HALF = {"a": 0.5, "b": 0.5}


def test_the_table_is_what_a_count_by_hand_says():
    rows = rows_of(500, 8)
    days = pl.concat([rows.with_columns(revenue=pl.lit(0.0), orders=pl.lit(0), purchases=pl.lit(0)), rows.with_columns(exposures=pl.lit(0), clicks=pl.lit(0))], how="vertical_relaxed")
    table = {r["metric"]: r for r in readout(days, HALF, plan=None).iter_rows(named=True)}
    for name, over, under in (("CTR", "clicks", "exposures"), ("CVR", "purchases", "clicks"), ("AOV", "revenue", "orders")):
        for side, v in (("control", "a"), ("value", "b")):
            of = rows.filter(variant=v)
            assert table[name][side] == pytest.approx(of[over].sum() / of[under].sum())
    of = rows.filter(variant="b")
    assert table["revenue_per_shopper"]["value"] == pytest.approx(of["revenue"].sum() / of.height) and table["CTR"]["shoppers"] == of.height
    assert table["AOV"]["lift"] == pytest.approx(0) and table["CTR"]["e"] is None and 0 < table["CTR"]["p"] <= 1


@quick
@given(st.permutations(range(60)), st.integers(1, 5))
def test_order_and_units_change_nothing(order, scale):
    rows, metric = rows_of(60, 9), (Metric("rps", "revenue", "shoppers"),)
    one, other = readout(rows, HALF, metrics=metric), readout(rows[list(order)].with_columns(pl.col("revenue") * scale), HALF, metrics=metric)
    same = one.drop("value", "control", "verdict").row(0), other.drop("value", "control", "verdict").row(0)
    assert same[0][3:] == pytest.approx(same[1][3:], nan_ok=True) and other["value"][0] == pytest.approx(scale * one["value"][0])


def test_verdicts():
    said = lambda rows, **more: readout(rows, HALF, metrics=(Metric("CTR", "clicks", "exposures"),), **more)["verdict"][0]
    assert said(rows_of(4_000, 10, 1.5)) == "ahead" and said(rows_of(4_000, 10, 0.6)) == "behind" and said(rows_of(4_000, 10)) == "not decided"
    assert said(rows_of(30, 10, 1.5)) == "too few shoppers"
    lossy = rows_of(4_000, 10, 1.5).filter((pl.col("variant") == "a") | (pl.int_range(pl.len()) % 5 > 0))
    assert said(lossy) == "no verdict: split differs from plan"
    single = pl.DataFrame({"user_id": ["x", "y", *map(str, range(200))], "variant": ["a", "b"] + ["a", "b"] * 100, "exposures": 1, "clicks": 1,
                           "purchases": [1, 1] + [0] * 200, "orders": [1, 1] + [0] * 200, "revenue": [10.0, 30.0] + [0.0] * 200})
    assert readout(single, HALF).filter(metric="AOV")["verdict"][0] == "too few shoppers"  # one buyer each has no variance


def test_alpha_is_divided_among_variants():
    rows, metric = rows_of(3_000, 11, variants="abcd"), (Metric("CTR", "clicks", "exposures"),)
    table = {r["variant"]: r for r in readout(rows, dict.fromkeys("abcd", 1), metrics=metric).iter_rows(named=True)}
    alone, usual = (readout(rows.filter(pl.col("variant").is_in(["a", "b"])), HALF, metrics=metric, alpha=x).row(0, named=True) for x in (0.05 / 3, 0.05))
    assert list(table) == ["b", "c", "d"] and table["b"]["low"] == pytest.approx(alone["low"]) and table["b"]["e"] == pytest.approx(alone["e"])
    assert alone["high"] - alone["low"] > usual["high"] - usual["low"]


@pytest.mark.parametrize(("change", "says"), [
    (lambda f: f.drop("orders"), "missing columns: \\['orders'\\]"),
    (lambda f: f.with_columns(clicks=pl.lit(-1)), "60 of 60 clicks"), (lambda f: f.with_columns(revenue=pl.lit(None, pl.Float64)), "60 of 60 revenue"),
    (lambda f: f.with_columns(revenue=pl.lit(float("inf"))), "60 of 60 revenue"),
    (lambda f: f.with_columns(user_id=pl.lit("x")), "1 of 1 shoppers are in two variants"),
    (lambda f: f.with_columns(variant=pl.lit("z")), "without a planned share: \\['z'\\]")])
def test_bad_rows_are_named(change, says):
    with pytest.raises(ValueError, match=says): readout(change(rows_of(60, 12)), HALF)


def test_a_shopper_in_two_variants_is_left_out_and_counted_but_never_named():
    rows = rows_of(400, 12)
    moved = pl.concat([rows, rows.head(4).with_columns(variant=pl.col("variant").replace({"a": "b", "b": "a"}), clicks=pl.col("exposures"))])
    assert (table := readout(moved, HALF)).drop("moved").equals(readout(rows.slice(4), HALF).drop("moved")) and table["moved"].to_list() == [4] * 4
    many = pl.concat([moved, rows.slice(4, 1).with_columns(variant=pl.col("variant").replace({"a": "b", "b": "a"}))])
    with pytest.raises(ValueError, match=r"^5 of 400 shoppers are in two variants, more than 1%") as e: readout(many, HALF)
    assert not [u for u in rows["user_id"] if re.search(rf"\b{u}\b", str(e.value))]


def test_nothing_is_no_verdict():
    empty = rows_of(60, 12).clear()
    table = readout(empty, HALF)
    assert table.height == 4 and (table["verdict"] == "too few shoppers").all() and shopper_totals(empty).is_empty()
    with pytest.raises(ValueError, match="two variants or more"): readout(rows_of(60, 12), {"a": 1})
    with pytest.raises(ValueError, match="the time before: missing columns"): readout(rows_of(60, 12), HALF, pl.DataFrame({"user_id": ["u1"]}))


# Interleaving


lists = st.lists(st.integers(0, 9), min_size=0, max_size=8, unique=True).map(lambda x: np.array(x, np.int32))


@quick
@given(lists, lists, st.integers(1, 8))
def test_a_draft_takes_no_side(a, b, k):
    flips = list(product((0, 1), repeat=(k + 1) // 2))
    drafts = [drafted(a, b, k, list(f)) for f in flips]
    teams = np.stack([d.team for d in drafts])
    assert np.array_equal((teams == FIRST).mean(axis=0), (teams == SECOND).mean(axis=0))
    for d in drafts:
        assert len(d.items) == min(k, len(set(a) | set(b))) == len(set(d.items.tolist())) and set(d.items.tolist()) <= set(a.tolist()) | set(b.tolist())
        for who, mine in ((FIRST, a), (SECOND, b)):  # a team's items stand in its ranker's order
            places = [mine.tolist().index(i) for i in d.items[d.team == who]]
            assert places == sorted(places)
    turned = [drafted(b, a, k, [1 - x for x in f]) for f in flips]
    for d, t in zip(drafts, turned, strict=True):
        n = min(k, len(a), len(b))
        assert np.array_equal(d.items[:n], t.items[:n]) and np.array_equal(d.team[:n], np.where(t.team[:n] >= 0, 1 - t.team[:n], NOBODY))


@quick
@given(lists, lists, st.integers(1, 8), st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_what_both_have_in_one_place_keeps_it(a, b, k, flips):
    d, n = drafted(a, b, k, flips), min(k, len(a), len(b))
    same = a[:n] == b[:n]
    assert np.array_equal(d.items[:n][same], a[:n][same]) and np.array_equal(d.team[:n] == NOBODY, same)


def test_the_same_request_is_drafted_alike():
    a, b = np.arange(10, dtype=np.int32), np.arange(10, dtype=np.int32)[::-1].copy()
    one = interleaved(a, b, 7, "r1")
    assert np.array_equal(one.items, interleaved(a, b, 7, "r1").items)
    assert len({interleaved(a, b, 7, f"r{i}").items.tobytes() for i in range(200)}) == 16
    with pytest.raises(ValueError, match="twice"): interleaved(np.array([1, 1], np.int32), b, 3, "r")


def test_indifferent_shoppers_prefer_nobody():
    rng, a, b = np.random.default_rng(13), np.arange(6, dtype=np.int32), np.array([3, 1, 5, 0, 7, 8], np.int32)
    wrong, late = 0, 0
    for run in range(150):
        user = np.repeat(np.arange(40), 2)
        teams = np.stack([interleaved(a, b, 6, f"{run} {i}").team for i in range(len(user))])
        keen = rng.beta(0.5, 2, 40)[user][:, None] / np.log2(np.arange(6) + 2)
        votes = credit(pl.DataFrame({"user_id": np.repeat(user, 6).astype(str), "team": teams.ravel(), "clicks": (rng.random(teams.shape) < keen).ravel()}))
        found = preference(votes)
        wrong, late = wrong + (found.p < 0.05), late + (found.verdict != "not decided")
    assert at_most(wrong, 150, 0.05) and at_most(late, 150, 0.05)


def test_votes_by_hand():
    shown = pl.DataFrame({"user_id": list("aaabbc"), "team": [0, 1, -1, 1, 1, 0], "clicks": [2, 1, 9, 1, 1, 0]})
    votes = credit(shown)
    assert votes.rows() == [("a", 2, 1), ("b", 0, 2), ("c", 0, 0)]
    found = preference(votes)
    assert (found.shoppers, found.first, found.second, found.share, found.p, found.verdict) == (2, 1, 1, 0.5, 1, "not decided")
    many = pl.DataFrame({"user_id": [str(i) for i in range(200)], "first": [0.0] * 200, "second": [1.0] * 200})
    assert preference(many).verdict == "second" and preference(many.rename({"first": "second", "second": "first"})).verdict == "first"
    with pytest.raises(ValueError, match="one each"): preference(pl.concat([votes, votes]))
    with pytest.raises(ValueError, match="teams are"): credit(shown.with_columns(team=pl.lit(5)))
    with pytest.raises(ValueError, match="missing columns: \\['team'\\]"): credit(shown.drop("team"))


def test_a_row_of_interleaving_says_what_the_votes_say():
    rng = np.random.default_rng(21)
    for better in (1.0, 1.6):
        first, second = rng.poisson(0.5, 3_000), rng.poisson(0.5 * better, 3_000)
        votes = pl.DataFrame({"user_id": [str(i) for i in range(3_000)], "first": first.astype(float), "second": second.astype(float)})
        row, found = preference_row(votes, "new").row(0, named=True), preference(votes)
        assert row["lift"] == pytest.approx(second.sum() / first.sum() - 1) and row["shoppers"] == found.shoppers == ((first + second) > 0).sum()
        assert row["value"] == pytest.approx(second.sum() / found.shoppers) and row["e"] == found.e and row["p"] == min(1, 1 / found.e)
        assert (row["low"] > 0) == (found.e >= 20) == (row["verdict"] == "ahead") == (better > 1) and row["low"] < better - 1 < row["high"]
    turned = preference_row(votes.rename({"first": "second", "second": "first"}), "new").row(0, named=True)
    assert turned["verdict"] == "behind" and 1 + turned["high"] == pytest.approx(1 / (1 + row["low"]))
    assert preference_row(votes.head(10), "new")["verdict"][0] == preference_row(votes.clear(), "new")["verdict"][0] == "too few shoppers"


def test_the_ends_of_a_paired_lift_are_where_z_is_the_bound():
    a, va, b, vb, cov, bound = 1.2, 0.01, 1.0, 0.008, 0.004, 2.0
    for lift in lift_interval(a, va, b, vb, bound, cov):
        r = 1 + lift
        assert abs(a - r * b) / np.sqrt(va - 2 * r * cov + r * r * vb) == pytest.approx(bound)


def test_drafts_in_the_file():
    pair_of = lambda name, **more: Experiment(name=name, interleave=True, variant=(Variant(name="a", weight=0.5), Variant(name="b", weight=0.5, rerank={"diversity": 2})), **more)
    seen = arms(pair_of("duel", share=0.5), USERS)
    assert set(seen) == {"", "duel=interleaved"} and between(sum(map(bool, seen)), len(seen), 0.5)
    [arm] = Assigner(Experiments(experiment=(pair_of("duel"),))).arms("u", 0, "for_you")
    assert not changes_of((arm,)) and changes_of(other_side((arm,))) == {"rerank": {"diversity": 2}} and not other_side(())
    caps = Experiment(name="caps", variant=(Variant(name="off", weight=0), Variant(name="on", weight=1, rules={"category_cap": 1})))
    both = Assigner(Experiments(experiment=(caps, pair_of("duel")))).arms("u", 0, "for_you")
    assert label(both) == "caps=on duel=interleaved" and changes_of(both) == {"rules": {"category_cap": 1}}
    assert changes_of(other_side(both)) == {"rules": {"category_cap": 1}, "rerank": {"diversity": 2}}
    with pytest.raises(ValueError, match="two, each of weight 0.5"): Experiment(name="x", interleave=True, variant=[Variant(name=n, weight=w) for n, w in (("a", 0.6), ("b", 0.4))])
    other = Experiment(name="other", interleave=True, variant=(Variant(name="a", weight=0.5), Variant(name="b", weight=0.5, rules={"category_cap": 1})))
    with pytest.raises(ValueError, match="both draft lists at one time"): Experiments(experiment=(pair_of("duel"), other))
    with pytest.raises(ValueError, match="both change rerank"): Experiments(experiment=(pair_of("duel"), pair("split").model_copy(update={"variant": pair_of("x").variant})))
    assert Experiments(experiment=(pair_of("one", group="g", share=0.5), pair_of("two", group="g", begin=0.5, share=0.5)))


# Off-policy


LISTED, NEW, RATE = np.arange(4, dtype=np.int32), np.array([8, 9], np.int32), np.array([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0, 0.5, 0.05])
ODDS, KEEP, EPSILON = np.log([1.0, 3.0]), 1, 0.4


def served(n: int, seed: int, shoppers: int = 150) -> pl.DataFrame:
    """A log whose shoppers click more and less than others."""
    rng = np.random.default_rng(seed)
    user, keen = rng.integers(0, shoppers, n), rng.gamma(1, 1, shoppers).clip(0, 2)
    lists = [explore(LISTED, NEW, ODDS, EPSILON, 1, KEEP, f"{seed} {i}") for i in range(n)]
    items = np.stack([x.items for x in lists])
    return pl.DataFrame({"request_id": np.repeat(np.arange(n), 4), "user_id": np.repeat(user, 4), "rank": np.tile(np.arange(4), n), "item": items.ravel(),
                         "propensity": np.concatenate([x.propensity for x in lists]), "reward": (rng.random(items.shape) < RATE[items] * keen[user][:, None]).ravel().astype(float)})


def earned(epsilon: float) -> float:
    """Clicks per request, with shoppers of mean keenness."""
    drawn = (np.array([0.25, 0.75]) * RATE[NEW]).sum()
    keen = 1 - np.exp(-2)  # mean of an exponential cut at 2
    return keen * (RATE[0] + sum((1 - epsilon / 3) * RATE[i] + epsilon / 3 * drawn for i in (1, 2, 3)))


def test_targets_are_read_from_the_propensities():
    log = served(300, 14)
    s = slates(log)
    item = log["item"].to_numpy().reshape(-1, 4)
    for new in (0, 0.1, EPSILON, 0.9):
        t = at_epsilon(s, EPSILON, new)
        q = np.where(item == 8, 0.25, 0.75) * new / 3
        assert np.array_equal(t.kind, (item >= 8).astype(int))
        assert np.allclose(t.probability, np.where(item >= 8, q, np.where(np.arange(4) < KEEP, 1, 1 - new / 3)))
    with pytest.raises(ValueError, match="cannot come from epsilon = 0.1"): at_epsilon(s, 0.1, 0.2)
    with pytest.raises(ValueError, match="epsilon must be"): at_epsilon(s, 0, 0.2)


def test_a_guess_has_not_seen_its_own_shoppers():
    s = slates(served(300, 19))
    t = at_epsilon(s, EPSILON, 0.5)
    even = s.user % 2 == 0
    other = replace(s, reward=np.where(even[:, None], 1 - s.reward, s.reward))
    for before, after in zip(slot_guesses(s, t), slot_guesses(other, t), strict=True):
        assert np.array_equal(before[even], after[even]) and not np.isclose(before[~even], after[~even]).any()


@pytest.mark.parametrize("new", [0, 0.9])
def test_estimates_find_the_truth(new):
    found = []
    for seed in range(24):
        s = slates(served(400, 1_000 + seed))
        found.append(off_policy(s, at_epsilon(s, EPSILON, new)).select("value", "low", "high", "gain", "gain_low", "gain_high").to_numpy())
    x, truth, gain = np.array(found), earned(new), earned(new) - earned(EPSILON)  # [logs, methods, numbers]
    for j in range(3):
        assert abs(x[:, j, 0].mean() - truth) < 4 * x[:, j, 0].std() / np.sqrt(len(x))
        for low, high, true in ((1, 2, truth), (4, 5, gain)):
            assert at_most(int(((x[:, j, low] > true) | (x[:, j, high] < true)).sum()), len(x), 0.06)
    assert (x[:, :, 5] - x[:, :, 4]).mean() < 0.7 * (x[:, :, 2] - x[:, :, 1]).mean()  # the difference is known better than either side


def test_shoppers_make_the_interval_wider():
    s = slates(served(3_000, 15, shoppers=60))
    t = at_epsilon(s, EPSILON, EPSILON)
    wide, narrow = off_policy(s, t).row(0, named=True), ips(s.reward, t.probability, s.propensity)
    assert wide["value"] == pytest.approx(narrow.value) and wide["high"] - wide["low"] > 1.3 * (narrow.high - narrow.low)
    one_each = Target(t.probability, t.kind, t.drawn)
    alone = half_widths(lambda m: [ips(s.reward[m], one_each.probability[m], s.propensity[m]).value], np.arange(3_000))
    assert alone[0] == pytest.approx((narrow.high - narrow.low) / 2, rel=0.35)


def test_it_refuses_what_the_log_cannot_know():
    s = slates(served(500, 16))
    t = at_epsilon(s, EPSILON, 0.5)
    blind = t.probability.copy()
    blind[:, 0] = 0
    for p, says in ((blind, r"shown 7\d\.\d% of what"), (np.zeros_like(blind), r"shown 0\.0% of what")):
        table = off_policy(s, Target(p, t.kind, t.drawn))
        assert all(re.search(says, v) for v in table["verdict"]) and table["value"].null_count() == table["gain"].null_count() == 3
    few = off_policy(s, t, least=501)
    assert all("equal requests, not 501" in v for v in few["verdict"]) and (off_policy(s, t)["verdict"] == "estimated").all()
    cut = off_policy(s, t, clip=0.5)
    assert (cut["clipped"] > 0).all() and cut["value"][0] < off_policy(s, t)["value"][0]


@pytest.mark.parametrize(("change", "says"), [
    (lambda f: f.drop("rank"), "missing columns: \\['rank'\\]"), (lambda f: f.clear(), "no rows"),
    (lambda f: f.with_columns(propensity=pl.lit(None, pl.Float64)), "40 of 40 propensity"), (lambda f: f.with_columns(reward=pl.lit(float("nan"))), "40 of 40 reward"),
    (lambda f: f.with_columns(rank=pl.lit(1)), "30 rows stand in a place that is taken"),
    (lambda f: f.with_columns(user_id=pl.int_range(pl.len())), "10 of 10 requests belong to two shoppers")])
def test_a_bad_log_is_named(change, says):
    with pytest.raises(ValueError, match=says): slates(change(served(10, 17)))


def test_short_lists_end_in_empty_slots():
    log = served(50, 18).filter((pl.col("rank") < 3) | (pl.col("request_id") % 2 == 0))
    s = slates(log.sample(fraction=1, shuffle=True, seed=1))
    assert s.shown.sum() == log.height and (s.propensity[~s.shown] == 1).all() and (s.reward[~s.shown] == 0).all()
    assert s.reward.sum() == log["reward"].sum()
