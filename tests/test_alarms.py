"""The leak alarms go off on planted leaks, and are quiet without."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from reco.candidates.popularity import Popularity
from reco.data.histories import epoch_ms, histories
from reco.features.items import item_features
from reco.moment import fit_moment, ranker_rows
from reco.ranking.alarms import (
    LeakError,
    canary,
    cut_off,
    future_changes_nothing,
    leak_report,
    some_shoppers,
    stop_on_leaks,
    too_good,
    with_future,
)
from reco.ranking.choosing import list_ndcg
from reco.ranking.examples import Examples
from reco.ranking.training import training_examples


@pytest.fixture(scope="module")
def learned(trained):
    """Some of the shop's training and validation lists, as the ranker got them."""
    settings = trained.settings.model_copy(update={"train": trained.settings.train.model_copy(update={"max_requests": 250})})
    return training_examples(trained.shop, trained.cutoffs, settings)["for_you"]


@pytest.fixture(scope="module")
def small(trained):
    """A few shoppers at the validation cutoff."""
    asof = epoch_ms(trained.cutoffs.validation)
    return some_shoppers(trained.shop, asof, 1_500, seed=1), asof


def with_column(e: Examples, values: np.ndarray) -> Examples:
    return replace(e, rows=np.column_stack([e.rows, values]).astype(np.float32), features=(*e.features, "planted"))


def test_an_honest_training_passes(trained, learned):
    report = leak_report(trained.shop, trained.cutoffs.validation, *learned, trained.settings, lists=300)
    assert report.height == 4 and report["passed"].all(), report.rows()
    stop_on_leaks(report)


def test_the_label_as_a_feature_stops_the_run(learned):
    report = too_good(*(with_column(e, e.label) for e in learned))
    with pytest.raises(LeakError, match="single feature planted"): stop_on_leaks(report)


def test_a_noisy_copy_of_the_label_stops_the_run_too(learned):
    """Nine hits in ten are given away, among one false sign in a hundred."""
    rng = np.random.default_rng(0)
    leak = lambda e: np.where(e.label > 0, rng.random(len(e.label)) < 0.9, rng.random(len(e.label)) < 0.01)
    assert not too_good(*(with_column(e, leak(e)) for e in learned))["passed"].item()
    useless = lambda e: rng.random(len(e.label))
    assert too_good(*(with_column(e, useless(e)) for e in learned))["passed"].item()


def test_lists_that_begin_with_the_hits_kill_no_canary(learned):
    """An evaluation that is given away by the order of the rows: what noise teaches leaves most of them tied."""
    def hits_first(e: Examples) -> Examples:
        order = np.lexsort((-e.label, np.repeat(np.arange(len(e.sizes)), e.sizes)))
        return replace(e, rows=np.zeros_like(e.rows), label=e.label[order])

    report = canary(*(hits_first(e) for e in learned), seed=1)
    with pytest.raises(LeakError, match="shuffled labels"): stop_on_leaks(report)


def test_a_source_fitted_on_the_whole_log_is_named(trained, small):
    def leaky(shop, asof, settings):
        m = fit_moment(shop, asof, settings)
        return replace(m, sources=m.sources | {"popularity": Popularity().fit(shop.log.where(shop.log.item >= 0), asof)})

    report = future_changes_nothing(*small, trained.settings, fit=leaky)
    with pytest.raises(LeakError, match="source popularity"): stop_on_leaks(report)


def test_item_features_that_ignore_the_moment_are_named(trained, small):
    def leaky(shop, asof, settings):
        m = fit_moment(shop, asof, settings)
        return replace(m, per_item=item_features(shop.log, m.state, asof + 7 * 86_400_000))

    report = future_changes_nothing(*small, trained.settings, fit=leaky)
    with pytest.raises(LeakError, match="item features"): stop_on_leaks(report)


def test_a_past_that_reaches_past_the_moment_changes_rows(trained, small):
    """What was learned is honest; only the histories ignore `asof`."""
    def leaky(shop, m, user, max_history):
        h = histories(shop.log, user, np.full(len(user), m.asof + 7 * 86_400_000), max_history, m.known)
        return ranker_rows(m, replace(h, asof=np.full(len(user), m.asof)))[1]

    report = future_changes_nothing(*small, trained.settings, rows=leaky)
    assert report["passed"].to_list() == [True, False]
    with pytest.raises(LeakError, match="rows at the cutoff"): stop_on_leaks(report)


def test_shops_with_another_future_have_the_same_past(small):
    shop, asof = small
    more, less = with_future(shop, asof, 400, seed=2), cut_off(shop, asof)
    for c in ("user", "item", "event", "ts"):
        assert np.array_equal(getattr(more.log.before(asof), c), getattr(shop.log.before(asof), c))
        assert np.array_equal(getattr(less.log.before(asof), c), getattr(shop.log.before(asof), c))
    assert len(more.log) == len(shop.log) + 400 and (more.log.ts[np.argsort(more.log.ts)][-400:] >= asof).all()
    key = np.stack([more.log.user, more.log.ts, more.log.event, more.log.item])
    assert (np.lexsort(key[::-1]) == np.arange(len(more.log))).all()


def test_ndcg_against_a_plain_reading():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 30, 50)
    score, hit = rng.integers(0, 5, sizes.sum()).astype(float), rng.random(sizes.sum()) < 0.1
    score[rng.random(len(score)) < 0.2] = np.nan
    values, at = [], 0
    for n in sizes:
        rows = sorted(range(at, at + n), key=lambda r: (np.isnan(score[r]), -score[r] if not np.isnan(score[r]) else 0, r))
        gain = sum(1 / np.log2(p + 2) for p, r in enumerate(rows[:10]) if hit[r])
        best = sum(1 / np.log2(p + 2) for p in range(min(10, hit[at : at + n].sum())))
        if best: values.append(gain / best)
        at += n
    assert list_ndcg(score, hit, sizes) == pytest.approx(np.mean(values))


def test_a_report_says_what_went_off():
    report = pl.DataFrame({"name": ["a", "b", "c"], "value": [1.0, 3.0, 5.0], "limit": [2.0, 2.0, 2.0], "passed": [True, False, False]})
    with pytest.raises(LeakError, match=r"^b: 3 is above 2; c: 5 is above 2$"): stop_on_leaks(report)
