"""Other people's recommenders for a next-purchase benchmark, tuned on a validation cut so that they are strong.

Each peer is a function from a training log and parameters to lists; `GRIDS` says which parameters are tried. Lists that come
out shorter than asked for are filled up with what is popular, as a shop would do.
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from itertools import product

import numpy as np
from scipy.sparse import csr_matrix

from reco.data.histories import TRANSACTION, EventLog
from reco.schemas import EVENTS

DAY = 86_400_000
WEIGHTS = {"equal": dict.fromkeys(EVENTS, 1), "graded": {"click": 1, "view": 1, "addtocart": 3, "transaction": 5}}


def matrix(log: EventLog, weights: str) -> csr_matrix:
    """Shoppers × items, the strongest event of each pair (`weights` is a key of `WEIGHTS`)."""
    weight = np.array([WEIGHTS[weights].get(e, 0) for e in EVENTS], np.float32)[log.event]
    pair, at = np.unique(log.user.astype(np.int64) * log.n_items + log.item, return_inverse=True)
    strongest = np.zeros(len(pair), np.float32)
    np.maximum.at(strongest, at, weight)
    return csr_matrix((strongest, (pair // log.n_items, pair % log.n_items)), shape=(log.n_users, log.n_items))


def most_touched(log: EventLog, asof: int, purchases: bool, days: float = 14) -> np.ndarray:
    """Items by the number of shoppers who touched (or bought) them in the last days, ties to the lower index."""
    recent = log.where((log.ts >= asof - days * DAY) & ((log.event == TRANSACTION) | (not purchases)))
    pair = np.unique(recent.user.astype(np.int64) * log.n_items + recent.item)
    shoppers = np.bincount(pair % log.n_items, minlength=log.n_items)
    order = np.lexsort((np.arange(log.n_items), -shoppers))
    return order[: (shoppers > 0).sum()].astype(np.int32)


def fill(items: np.ndarray, popular: np.ndarray, seen: csr_matrix | None) -> np.ndarray:
    """Put popular items where a list has -1, none twice, and none of `seen` when that is given."""
    out = items.astype(np.int32)
    for i in np.flatnonzero((out < 0).any(axis=1)):
        own = out[i][out[i] >= 0]
        taken = own if seen is None else np.concatenate([own, seen[i].indices])
        more = popular[: len(taken) + out.shape[1]]
        both = np.concatenate([own, more[~np.isin(more, taken)]])[: out.shape[1]]
        out[i] = -1
        out[i, : len(both)] = both
    return out


Lists = Callable[[np.ndarray, int, bool], np.ndarray]  # shoppers, list length, whether to leave out what they touched → items


def popularity(log: EventLog, asof: int, purchases: bool) -> Lists:
    """Most touched or most bought in the last 14 days."""
    popular, seen = most_touched(log, asof, purchases), matrix(log, "equal")
    return lambda users, k, new: fill(np.full((len(users), k), -1), popular, seen[users] if new else None)


def _implicit(model: object, log: EventLog, asof: int, weights: str, drop_zeros: bool) -> Lists:
    """Fit one of implicit's models and answer with its own `recommend`."""
    rows, popular = matrix(log, weights), most_touched(log, asof, purchases=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about matrix formats, from inside implicit
        model.fit(rows, show_progress=False)

    def lists(users: np.ndarray, k: int, new: bool) -> np.ndarray:
        items, scores = model.recommend(users, rows[users], N=k, filter_already_liked_items=new)
        if drop_zeros: items = np.where(scores > 0, items, -1)  # neighbours that share nothing with the shopper are padding
        return fill(np.where(scores <= -1e30, -1, items), popular, rows[users] if new else None)

    return lists


def als(log: EventLog, asof: int, weights: str, factors: int, alpha: float, regularization: float, iterations: int = 15) -> Lists:
    """implicit's AlternatingLeastSquares."""
    from implicit.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(factors, regularization, alpha, iterations=iterations, random_state=7, use_gpu=False)
        return _implicit(model, log, asof, weights, drop_zeros=False)


def bm25(log: EventLog, asof: int, weights: str, neighbours: int, k1: float) -> Lists:
    """implicit's BM25Recommender."""
    from implicit.nearest_neighbours import BM25Recommender

    return _implicit(BM25Recommender(neighbours, K1=k1, B=0.75), log, asof, weights, drop_zeros=True)


def cosine(log: EventLog, asof: int, weights: str, neighbours: int) -> Lists:
    """implicit's CosineRecommender."""
    from implicit.nearest_neighbours import CosineRecommender

    return _implicit(CosineRecommender(neighbours), log, asof, weights, drop_zeros=True)


def irspack_ials(log: EventLog, asof: int, weights: str, n_components: int, alpha0: float, reg: float) -> Lists:
    """irspack's IALSRecommender (iALS++, Rendle et al. 2021), an optional package."""
    from irspack import IALSRecommender

    rows, popular = matrix(log, weights), most_touched(log, asof, purchases=False)
    model = IALSRecommender(rows, n_components=n_components, alpha0=alpha0, reg=reg, random_seed=7, n_threads=1)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()): model.learn()  # it draws a progress bar

    def lists(users: np.ndarray, k: int, new: bool) -> np.ndarray:
        score = model.get_score(users)
        if new: score[rows[users].nonzero()] = -np.inf
        items = np.argsort(-score, axis=1, kind="stable")[:, :k]
        return fill(items, popular, None)

    return lists


def grid(**values: Iterable) -> list[dict]:
    """Every combination."""
    return [dict(zip(values, v, strict=True)) for v in product(*values.values())]


PEERS: dict[str, Callable[..., Lists]] = {"popularity, 14 days": popularity, "implicit ALS": als, "implicit BM25": bm25,
                                          "implicit cosine": cosine, "irspack iALS": irspack_ials}
OPTIONAL = {"irspack iALS": "irspack"}  # peer → package that this environment may lack
GRIDS = {
    "popularity, 14 days": grid(purchases=[False, True]),
    "implicit ALS": grid(weights=["equal", "graded"], factors=[32, 128], alpha=[1, 10, 40], regularization=[0.01, 0.1]),
    "implicit BM25": grid(weights=["equal", "graded"], neighbours=[20, 100, 500], k1=[0.2, 1.2]),
    "implicit cosine": grid(weights=["equal", "graded"], neighbours=[20, 100, 500]),
    "irspack iALS": grid(weights=["equal", "graded"], n_components=[32, 128], alpha0=[0.003, 0.03, 0.3], reg=[0.001, 0.01]),
}


def absent(name: str) -> str | None:
    """The package that a peer lacks here, if any."""
    package = OPTIONAL.get(name)
    return package if package and find_spec(package) is None else None


def tune(name: str, log: EventLog, asof: int, users: np.ndarray, judge: Callable[[np.ndarray], float], k: int = 20,
         quick: bool = False) -> tuple[dict, bool, float]:
    """Parameters, filter switch and value of the best; `log` ends before `asof`, `judge` values lists for `users`."""
    best = ({}, False, -1.0)
    for parameters in GRIDS[name][: 1 if quick else None]:
        lists = PEERS[name](log, asof, **parameters)
        for new in (False, True):
            value = judge(lists(users, k, new))
            if value > best[2]: best = parameters, new, value
    return best
