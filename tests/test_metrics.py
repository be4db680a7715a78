"""The metrics against the slow and obvious way to compute them."""

import math
from collections import Counter

import numpy as np

from reco.evaluation.metrics import average_precision, coverage, gini, hits, ndcg, recall, reciprocal_rank, wanted
from reco.ranking.examples import Outcomes


def problem(seed: int, n: int = 60, k: int = 10, items: int = 40):
    """Random lists without repeats, some short, and random truths, some empty."""
    rng = np.random.default_rng(seed)
    lists = np.array([rng.permutation(items)[:k] for _ in range(n)], np.int32)
    for row in lists[::5]: row[rng.integers(1, k):] = -1
    truth = [sorted(rng.permutation(items)[: rng.integers(0, 15)].tolist()) for _ in range(n)]
    request = np.repeat(np.arange(n), [len(t) for t in truth])
    item = np.array([i for t in truth for i in t], np.int32)
    return lists, truth, Outcomes(request, item, np.ones(len(item), np.int8), n)


def brute(row: list[int], good: set[int]) -> tuple[float, float, float, float]:
    found = [i in good and i >= 0 for i in row]
    dcg = sum(f / math.log2(p + 2) for p, f in enumerate(found))
    best = sum(1 / math.log2(p + 2) for p in range(min(len(good), len(row))))
    precision = sum(sum(found[: p + 1]) / (p + 1) for p in range(len(row)) if found[p]) / min(len(good), len(row))
    first = next((1 / (p + 1) for p, f in enumerate(found) if f), 0.0)
    return dcg / best, precision, sum(found) / len(good), first


def test_per_request_metrics_equal_brute_force():
    for seed in range(5):
        lists, truth, outcome = problem(seed)
        hit, want = hits(lists, outcome), wanted(outcome)
        fast = np.stack([m(hit, want) for m in (ndcg, average_precision, recall, reciprocal_rank)], axis=1)
        for i, good in enumerate(truth):
            if not good: assert np.isnan(fast[i]).all()
            else: np.testing.assert_allclose(fast[i], brute(lists[i].tolist(), set(good)), rtol=1e-12)


def test_catalogue_metrics_equal_brute_force():
    for seed in range(5):
        lists, _, _ = problem(seed)
        shown = Counter(lists[lists >= 0].tolist())
        count = [shown[i] for i in range(40)]
        assert coverage(lists, 40) == sum(c > 0 for c in count) / 40
        pairs = sum(abs(a - b) for a in count for b in count) / (2 * len(count) * sum(count))
        np.testing.assert_allclose(gini(lists, 40), pairs, rtol=1e-12)


def test_a_perfect_list_scores_one():
    outcome = Outcomes(np.zeros(3, int), np.array([2, 5, 7], np.int32), np.ones(3, np.int8), 1)
    hit = hits(np.array([[7, 2, 5, 1]], np.int32), outcome)
    assert [m(hit, wanted(outcome))[0] for m in (ndcg, average_precision, recall, reciprocal_rank)] == [1, 1, 1, 1]
