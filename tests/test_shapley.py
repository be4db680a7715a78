"""What the ranker goes by: three libraries say the same, it adds up, and what was planted is found."""

import io

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
import shap
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.data.histories import epoch_ms, histories
from reco.moment import fit_moment, ranker_rows
from reco.ranking.lambdamart import Ranker
from reco.ranking.shapley import (
    UP,
    Shapley,
    dependence,
    dependence_figure,
    direction,
    importance,
    importance_figure,
    shapley,
    way,
)


@pytest.fixture(scope="module")
def candidates(trained) -> np.ndarray:
    """Rows of some shoppers at the hold-out's start."""
    at = epoch_ms(trained.cutoffs.holdout)
    moment = fit_moment(trained.shop, at, trained.settings)
    user = np.arange(60, dtype=np.int32)
    return ranker_rows(moment, histories(trained.shop.log, user, np.full(60, at), 200, moment.known))[1]


def test_three_libraries_say_the_same(trained, candidates):
    r = trained.ranker
    s = shapley(r, candidates, 200)
    theirs = r.booster.predict(s.rows, pred_contrib=True, num_threads=1)
    assert np.allclose(s.added, r.slope*theirs[:, :-1], atol=1e-8) and s.base == pytest.approx(r.slope*theirs[0, -1] + r.intercept)
    explainer = shap.TreeExplainer(r.booster)
    assert np.allclose(s.added, r.slope*explainer.shap_values(s.rows.astype(np.float64)), atol=1e-8)
    assert s.base == pytest.approx(r.slope*float(np.ravel(explainer.expected_value)[0]) + r.intercept)
    assert np.abs(s.added).max() > .1


def test_it_adds_up_to_the_score(trained, candidates):
    s = shapley(trained.ranker, candidates)
    assert np.allclose(s.added.sum(axis=1) + s.base, trained.ranker.log_odds(s.rows), atol=1e-8)


def test_the_sample_is_drawn_without_repeats(trained, candidates):
    ordinal = candidates[:500].copy()
    ordinal[:, 0] = np.arange(500)
    drawn = [shapley(trained.ranker, ordinal, 100, seed).rows[:, 0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] == sorted(set(drawn[0])) and len(drawn[0]) == 100
    assert shapley(trained.ranker, ordinal, 1_000).rows[:, 0].tolist() == list(range(500))


def test_a_bad_sample_is_refused(trained, candidates):
    with pytest.raises(ValueError, match="no row"): shapley(trained.ranker, candidates[:0])
    with pytest.raises(ValueError, match=f"{candidates.shape[1]} features and was given 3"): shapley(trained.ranker, candidates[:, :3])


@pytest.fixture(scope="module")
def planted() -> tuple[Ranker, np.ndarray]:
    """Up with the first column, down with the second, up and down with the third, nothing with the fourth; some of the first unknown."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(4_000, 4)).astype(np.float32)
    rows[rng.random(4_000) < .2, 0] = np.nan
    label = 3*np.nan_to_num(rows[:, 0]) - 2*rows[:, 1] + 2*np.abs(rows[:, 2])
    booster = lgb.train({"num_leaves": 15, "verbosity": -1, "num_threads": 1, "seed": 0}, lgb.Dataset(rows, label), 60)
    return Ranker(booster, ("up", "down", "both", "none"), .5, -2.), rows


MEANING = {"up": "more is better", "down": "less is better", "both": "far from zero", "none": "noise | with a mark"}


def test_what_was_planted_is_found(planted):
    table = importance(shapley(*planted), MEANING)
    by = {r["feature"]: r for r in table.iter_rows(named=True)}
    assert table["feature"].to_list()[-1] == "none" and by["none"]["share"] < .05
    assert by["up"]["direction"] > .9 and by["down"]["direction"] < -.9 and abs(by["both"]["direction"]) < .3
    assert table["log_odds"].is_sorted(descending=True) and table["share"].sum() == pytest.approx(1)
    assert [way(by[f]["direction"])[2] for f in ("up", "down", "both")] == ["more of it: likelier", "more of it: less likely", "depends on the rest"]


def test_importance_does_not_depend_on_the_order_of_rows(planted):
    ranker, rows = planted
    a, b = (importance(shapley(ranker, x, len(x)), MEANING) for x in (rows[:500], rows[:500][::-1]))
    assert a["feature"].equals(b["feature"]) and np.allclose(a["log_odds"], b["log_odds"])
    assert np.allclose(a["direction"].to_numpy(), b["direction"].to_numpy(), equal_nan=True)


def test_a_column_without_a_meaning_is_named(planted):
    with pytest.raises(KeyError, match="both"): importance(shapley(*planted), {k: v for k, v in MEANING.items() if k != "both"})


def test_dependence_follows_the_shape(planted):
    s = shapley(*planted)
    both, up = dependence(s, "both", 11), dependence(s, "up", 11)
    middle = both["log_odds"][5]
    assert both["log_odds"][0] > middle + .5 and both["log_odds"][-1] > middle + .5
    assert up["value"][-1] is None and up["rows"][-1] == np.isnan(s.rows[:, 0]).sum() and up["log_odds"][:-1].is_sorted()
    with pytest.raises(ValueError): dependence(s, "other")


@settings(max_examples=60, deadline=None)
@given(x=st.lists(st.one_of(st.just(float("nan")), st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=60),
       parts=st.integers(1, 30), seed=st.integers(0, 9))
def test_every_row_is_in_one_part(x, parts, seed):
    added = np.random.default_rng(seed).normal(size=(len(x), 1))
    s = Shapley(("x",), np.array(x, np.float32)[:, None], added, 0.)
    bins = dependence(s, "x", parts)
    unknown = int(np.isnan(s.rows).sum())
    assert bins["rows"].sum() == len(x) and bins.height <= parts + 1
    assert bins.filter(pl.col("value").is_null())["rows"].sum() == unknown
    assert bins["value"].drop_nulls().is_sorted() and bins["value"].drop_nulls().n_unique() == bins.height - (unknown > 0)
    assert (bins["low"] <= bins["log_odds"]).all() and (bins["log_odds"] <= bins["high"]).all()
    d = direction(s.rows[:, 0], added[:, 0])
    assert d is None or -1.000001 <= d <= 1.000001
    assert importance(s, {"x": "x"})["direction"].dtype == pl.Float64


def drawn(figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def test_figures_are_drawn_in_words(planted):
    s = shapley(*planted)
    table = importance(s, MEANING)
    bars = importance_figure(table, "What it goes by", top=3)
    [ax] = bars.axes
    words = [f"{r['meaning']} ({r['feature']})" for r in table.iter_rows(named=True)]
    assert [t.get_text() for t in ax.get_yticklabels()] == words[:3] and ax.get_title() == "What it goes by"
    assert len({p.get_facecolor() for p in ax.patches}) == 3 and {p.get_hatch() for p in ax.patches} >= {"///"}
    assert ax.patches[0].get_facecolor()[:3] == tuple(int(UP[i:i + 2], 16)/255 for i in (1, 3, 5))
    plots = dependence_figure(s, table, "How", top=4, across=3)
    shown = [ax for ax in plots.axes if ax.axison]
    assert [ax.get_title() for ax in shown] == words and len(plots.axes) == 6
    assert drawn(bars).startswith(b"\x89PNG") and len(drawn(plots)) > 10_000


def test_figures_of_columns_that_say_nothing_are_drawn():
    """All unknown, all the same, huge: a shop of one kind of item has such columns."""
    rows = np.array([[np.nan, 1, 1e9], [np.nan, 1, -5]], np.float32)
    s = Shapley(("a", "b", "c"), rows, np.zeros((2, 3)), 0.)
    table = importance(s, dict.fromkeys("abc", "meaning"))
    assert table["share"].to_list() == [0, 0, 0] and table["direction"].to_list() == [None]*3
    for figure in (importance_figure(table, "t"), dependence_figure(s, table, "t")): assert drawn(figure).startswith(b"\x89PNG")
    assert drawn(dependence_figure(s, table.clear(), "t")).startswith(b"\x89PNG")
