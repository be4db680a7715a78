"""IPS, SNIPS and DR where the truth is known: a small world with exact policies."""

import numpy as np
import pytest

from reco.evaluation.counterfactual import SupportError, doubly_robust, effective_size, ips, snips, support, weights

K, SLOTS = 4, 2
RATE = np.array([[0.1, 0.4, 0.7, 0.9], [0.05, 0.2, 0.3, 0.5]])  # slot, item: chance of a click
LOGGING = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
TARGET = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
TRUTH = float((TARGET * RATE).sum())
SLOT = np.arange(SLOTS)


def log(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items shown under the logging policy, and whether they were clicked."""
    rng = np.random.default_rng(seed)
    items = np.stack([rng.choice(K, n, p=p) for p in LOGGING], axis=1)
    return items, (rng.random((n, SLOTS)) < RATE[SLOT, items]).astype(float)


def guesses(model: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return model[SLOT, items], np.broadcast_to((TARGET * model).sum(axis=1), items.shape)


@pytest.fixture(scope="module")
def many() -> dict[str, np.ndarray]:
    """Estimates from 250 logs of 400 requests."""
    out: dict[str, list] = {}
    for seed in range(250):
        items, r = log(400, seed)
        t, p = TARGET[SLOT, items], LOGGING[SLOT, items]
        wrong_p, silly = np.clip(p * 0.7, 0, 1), np.full_like(RATE, 0.5)
        for name, e in {"ips": ips(r, t, p), "snips": snips(r, t, p), "dr": doubly_robust(r, t, p, *guesses(RATE, items)),
                        "dr wrong model": doubly_robust(r, t, p, *guesses(silly, items)),
                        "dr wrong p": doubly_robust(r, t, wrong_p, *guesses(RATE, items)),
                        "dr both wrong": doubly_robust(r, t, wrong_p, *guesses(silly, items)),
                        "ips wrong p": ips(r, t, wrong_p), "ips clipped": ips(r, t, p, clip=1.5)}.items():
            out.setdefault(name, []).append((e.value, e.low, e.high))
    return {name: np.array(x) for name, x in out.items()}


@pytest.mark.parametrize("name", ["ips", "dr", "dr wrong model", "dr wrong p"])
def test_unbiased(many, name):
    x = many[name][:, 0]
    assert abs(x.mean() - TRUTH) < 4 * x.std() / np.sqrt(len(x))


@pytest.mark.parametrize("name", ["ips wrong p", "dr both wrong", "ips clipped"])
def test_and_biased_where_it_must_be(many, name):
    x = many[name][:, 0]
    assert abs(x.mean() - TRUTH) > 4 * x.std() / np.sqrt(len(x))


def test_the_order_of_the_noise(many):
    noise = {name: x[:, 0].std() for name, x in many.items()}
    assert noise["dr"] < noise["snips"] < noise["ips"] and noise["ips clipped"] < noise["ips"]


@pytest.mark.parametrize("name", ["ips", "snips", "dr", "dr wrong model"])
def test_intervals_cover(many, name):
    x = many[name]
    assert 0.91 < ((x[:, 1] < TRUTH) & (TRUTH < x[:, 2])).mean() <= 0.99


def test_judging_the_logging_policy_is_its_mean():
    items, r = log(200, 1)
    p = LOGGING[SLOT, items]
    for e in (ips(r, p, p), snips(r, p, p), doubly_robust(r, p, p, np.zeros_like(r), np.zeros_like(r))):
        assert e.value == pytest.approx(r.sum(axis=1).mean()) and e.effective == pytest.approx(200) and e.support == pytest.approx(1)
        assert e.supported and e.clipped == 0


def test_a_target_outside_the_log_is_flagged():
    items, r = log(3_000, 2)
    blind = LOGGING.copy()
    blind[0] = [0.8, 0.2, 0, 0]  # the log never showed 2 and 3 in the first slot
    rng = np.random.default_rng(3)
    items[:, 0] = rng.choice(K, 3_000, p=blind[0])
    e = ips(r, TARGET[SLOT, items], blind[SLOT, items])
    assert not e.supported and e.support == pytest.approx((0.3 + 1) / 2, abs=0.03)
    flags = []
    for seed in range(200):
        shown, rewards = log(300, 1_000 + seed)
        flags.append(ips(rewards, TARGET[SLOT, shown], LOGGING[SLOT, shown]).supported)
    assert all(flags)  # no false alarm in two hundred logs


def test_nothing_in_common_is_an_error():
    with pytest.raises(SupportError, match="none of 6 logged slots"): ips(np.ones((3, 2)), np.zeros((3, 2)), np.ones((3, 2)))


@pytest.mark.parametrize(("target", "logged", "says"), [
    ([[0.5]], [[0.0]], "1 of 1 logged probabilities are not above 0"), ([[0.5]], [[np.nan]], "logged"), ([[1.5]], [[0.5]], "target"),
    ([[-0.1]], [[0.5]], "first: -0.1 in request 0, slot 0"), ([[0.5, 0.5]], [[0.5]], "shape"), (np.zeros((0, 2)), np.zeros((0, 2)), "no requests")])
def test_bad_probabilities_are_named(target, logged, says):
    with pytest.raises(ValueError, match=says): weights(np.array(target), np.array(logged))


def test_clipping_is_reported():
    e = ips(np.ones((4, 1)), np.full((4, 1), 0.5), np.array([[0.5], [0.5], [0.5], [0.05]]), clip=2)
    assert e.clipped == 0.25 and e.value == pytest.approx((1 + 1 + 1 + 2) / 4)
    with pytest.raises(ValueError, match="clip must be above 0"): weights(np.ones((1, 1)), np.ones((1, 1)), 0)


def test_sizes_and_support_by_hand():
    assert effective_size(np.array([[1.0], [1], [2]])) == pytest.approx(16 / 6) and support(np.full((9, 1), 0.5)) == (0.5, False)
