"""Whether a surface shows the ranker's order or the sources' is decided on validation, kept in the bundle, and the same everywhere."""

from dataclasses import replace

import numpy as np
import pytest

from reco.bundle import load_bundle, save_bundle
from reco.candidates.base import Candidates
from reco.moment import with_items
from reco.ranking.choosing import fit_chosen, list_ndcg, ndcg_of_lists
from reco.ranking.examples import Examples
from reco.ranking.orders import ENOUGH, FUSED, Order, best_order, fit_if_ahead, places, proposers, said
from reco.settings import Ranking

SOURCES, SHORT = ("a", "b"), Ranking(trees=15, min_data_in_leaf=5)


def lists(n: int, seed: int = 0, signal: float = 0.0) -> Examples:
    """Twenty candidates each; source a places the hit first half of the time, and a third column may know it."""
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(20) for _ in range(2 * n)]).reshape(n, 2, 20).transpose(0, 2, 1).reshape(-1, 2).astype(np.float32)
    hit = np.where(rng.random(n) < 0.5, ranks[:, 0].reshape(n, 20).argmin(axis=1), rng.integers(0, 20, n))
    label = np.zeros(20 * n, np.int8)
    label[np.arange(n) * 20 + hit] = 3
    ranks[:, 1][rng.random(20 * n) < 0.3] = np.nan
    return Examples(np.column_stack([ranks, signal * label + rng.normal(size=20 * n)]).astype(np.float32), label, np.full(n, 20), ("a_rank", "b_rank", "more"))


def candidates(n: int = 7, seed: int = 0) -> Candidates:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 9, n)
    item = np.concatenate([np.sort(rng.choice(50, s, replace=False)) for s in sizes]).astype(np.int32)
    ranks = np.where(rng.random((len(item), 2)) < 0.4, np.nan, rng.integers(0, 30, (len(item), 2))).astype(np.float32)
    return Candidates(np.append(0, np.cumsum(sizes)), item, ranks, ranks, SOURCES)


def test_places_and_gains_are_what_sorting_says():
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 15, 40)
    value, hit = rng.integers(0, 5, sizes.sum()).astype(float), rng.random(sizes.sum()) < 0.2
    start, got, gains = np.append(0, np.cumsum(sizes)), places(value, sizes), []
    for i, n in enumerate(sizes):
        at = slice(start[i], start[i + 1])
        order = sorted(range(n), key=lambda r: (-value[at][r], r))
        assert [int(np.flatnonzero(got[at] == p)[0]) for p in range(n)] == order
        found = [1 / np.log2(p + 2) for p, r in enumerate(order[:10]) if hit[at][r]]
        if hit[at].any(): gains.append(sum(found) / sum(1 / np.log2(np.arange(2, 2 + min(10, hit[at].sum())))))
    np.testing.assert_allclose(ndcg_of_lists(value, hit, sizes), gains)
    assert list_ndcg(value, hit, sizes) == pytest.approx(np.mean(gains)) and list_ndcg(value, hit & False, sizes) == 0


@pytest.mark.parametrize("first", [FUSED, "a", "b"])
def test_an_order_keeps_what_it_is_of(first):
    c = candidates()
    odds, value = Order(first, 0.7, -1.0).log_odds(c), said(c.ranks, SOURCES, first)
    for i in range(len(c)):
        at = slice(c.indptr[i], c.indptr[i + 1])
        assert np.argsort(-odds[at], kind="stable").tolist() == np.argsort(-value[at], kind="stable").tolist()
        if c.indptr[i + 1] > c.indptr[i]: assert odds[at].max() == -1.0 and len(set(odds[at])) == len(odds[at])
        if first == FUSED: continue
        own = ~np.isnan(c.ranks[at, SOURCES.index(first)])
        if own.any() and not own.all(): assert odds[at][own].min() > odds[at][~own].max()
    with pytest.raises(ValueError, match="'c' is to go first"): Order("c").log_odds(c)


def test_a_value_goes_before_all_sources():
    c = candidates(seed=1)
    value = np.where(np.arange(len(c.item)) % 3 == 0, -np.linspace(0, 1, len(c.item)), np.nan)
    odds = Order("a").log_odds(c, value)
    for i in range(len(c)):
        at = slice(c.indptr[i], c.indptr[i + 1])
        known = ~np.isnan(value[at])
        assert (np.diff(odds[at][known]) < 0).all()
        if known.any() and not known.all(): assert odds[at][known].min() > odds[at][~known].max()


def test_the_ranker_is_used_only_where_it_is_ahead():
    ranker, choice = fit_if_ahead(lists(200, 1, signal=2), lists(150, 2, signal=2), SOURCES, SHORT, 7)
    assert choice.ranked and ranker and choice.by_ranker > choice.by_sources + 2 * choice.error and choice.lists == 150
    none, behind = fit_if_ahead(lists(200, 1), lists(150, 2), SOURCES, SHORT, 7)
    assert none is None and not behind.ranked and behind.by_ranker < behind.by_sources + 2 * behind.error and behind.order.first == "a"
    kept, same = fit_if_ahead(lists(200, 1), lists(150, 2), SOURCES, SHORT, 7, always=True)
    assert kept and same.ranked and same.by_ranker == behind.by_ranker
    assert kept.booster.model_to_string() == fit_chosen(lists(200, 1), lists(150, 2), SHORT, 7).booster.model_to_string()
    assert "by a" in str(behind) and "the sources' order" in str(behind) and "the ranker's order" in str(choice)


def test_both_sides_are_measured_on_lists_that_neither_has_seen():
    """The honest ranker knows nothing of the validation labels, and which source goes first is a matter of the training lists."""
    train, validation = lists(100, 1), lists(400, 2)
    other = replace(validation, rows=validation.rows[:, [1, 0, 2]])  # now b's column is the good one, on validation only
    assert best_order(train, train + other, SOURCES).first == best_order(train, train + validation, SOURCES).first == "a"
    hit = validation.label > 0
    choice = fit_if_ahead(train, validation, SOURCES, SHORT, 7)[1]
    assert choice.by_sources == pytest.approx(list_ndcg(-validation.rows[:, 0], hit, validation.sizes))


def test_too_few_lists_are_not_tried():
    none = Examples(np.zeros((0, 3), np.float32), np.zeros(0, np.int8), np.zeros(0, np.int64), ("a_rank", "b_rank", "more"))
    for n, m in ((ENOUGH - 1, 200), (200, ENOUGH - 1), (0, 0)):
        ranker, choice = fit_if_ahead(lists(n, 1, 2) if n else none, lists(m, 2, 2) if m else none, SOURCES, SHORT, 7)
        assert ranker is None and choice.by_ranker is None and "too little" in str(choice)
    assert fit_if_ahead(lists(ENOUGH, 1, 2), lists(ENOUGH, 2, 2), SOURCES, SHORT, 7)[1].by_ranker is not None
    with pytest.raises(ValueError, match=r"begin with the columns \('a_rank', 'b_rank'\)"): best_order(lists(9), lists(9), ("b", "a"))


def test_what_the_past_proposes_never_goes_first():
    with_past = replace(lists(200), features=("a_rank", "past_b_rank", "more"))
    swapped = replace(with_past, rows=with_past.rows[:, [1, 0, 2]])
    assert best_order(swapped, swapped, ("a", "past_b")).first != "past_b"
    assert proposers({"popularity": 5, "als": 9}, "similar") == ("als", "popularity", "past_als") and proposers({"x": 1}, "for_you") == ("x",)


def test_the_trained_shop_knows_why(trained, bundle, tmp_path):
    """Similar Items: the ranker is ahead of the sources on validation, and the bundle says by how much, before and after it was saved."""
    found = trained.choices["similar"]
    assert found.ranked and found.by_ranker > 1.1 * found.by_sources > 0 and set(trained.rankers) == {s for s, c in trained.choices.items() if c.ranked}
    assert bundle.manifest["surfaces"] == {s: c.about() for s, c in trained.choices.items()}
    assert bundle.orders == {s: c.order for s, c in trained.choices.items()}
    assert load_bundle(save_bundle(replace(bundle, orders={"similar": Order("covisit", 2.0, -3.0)}), tmp_path)).orders == {"similar": Order("covisit", 2.0, -3.0)}


def test_items_from_elsewhere_change_nothing_else():
    c, extra = candidates(9, seed=4), np.array([3, 60, 17], np.int32)
    more = with_items(c, extra)
    assert (np.diff(more.indptr) >= 3).all() and more.item.dtype == c.item.dtype and more.sources == c.sources
    for i in range(len(c)):
        a, b = slice(*c.indptr[i : i + 2]), slice(*more.indptr[i : i + 2])
        assert more.item[b].tolist() == sorted({*c.item[a].tolist(), *extra.tolist()})
        there = np.isin(more.item[b], c.item[a])
        np.testing.assert_array_equal(more.ranks[b][there], c.ranks[a])
        np.testing.assert_array_equal(more.scores[b][there], c.scores[a])
        assert np.isnan(more.ranks[b][~there]).all() and np.isnan(more.scores[b][~there]).all()
