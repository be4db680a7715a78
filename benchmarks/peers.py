"""Other people's recommenders for a next-purchase benchmark, tuned on a validation cut so that they are strong.

Each peer is a function from a training log and parameters to lists; `GRIDS` says which parameters are tried. Lists that come
out shorter than asked for are filled up with what is popular, as a shop would do. irspack's models need an environment of their own
(`uv venv VENV` and `uv pip install --python VENV -r benchmarks/requirements-peers.txt`), whose Python is then given as `--peers-python`.
"""

import json
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path

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
Tried = tuple[dict, bool, np.ndarray]  # parameters, whether what they touched is left out, lists


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


def library(python: Path, log: EventLog, asof: int, model: str, tries: list[dict], users: np.ndarray, k: int) -> Iterator[Tried]:
    """irspack's `model`, run by another environment's Python for all parameters at once; raises `RuntimeError` with what it said."""
    kinds, popular = {t["weights"]: matrix(log, t["weights"]) for t in tries}, most_touched(log, asof, purchases=False)
    jobs = [{"model": model, "weights": t["weights"], "parameters": {n: v for n, v in t.items() if n != "weights"}} for t in tries]
    arrays = {f"{w}_{x}": np.asarray(getattr(m, x)) for w, m in kinds.items() for x in ("data", "indices", "indptr", "shape")}
    with tempfile.TemporaryDirectory() as temp:
        given, made = Path(temp) / "in.npz", Path(temp) / "out.npz"
        np.savez(given, jobs=json.dumps(jobs), users=users, k=k, **arrays)
        done = subprocess.run([python, Path(__file__).with_name("peer_library.py"), given, made], capture_output=True, text=True)
        if done.returncode: raise RuntimeError(f"{python} could not run peer_library.py: {done.stderr.strip()[-2_000:]}")
        with np.load(made, allow_pickle=False) as f: out = dict(f)
    for i, t in enumerate(tries):
        for new in (False, True):
            yield t, new, fill(out[f"{i}_{'new' if new else 'all'}"], popular, kinds[t["weights"]][users] if new else None)


def grid(**values: Iterable) -> list[dict]:
    """Every combination."""
    return [dict(zip(values, v, strict=True)) for v in product(*values.values())]


PEERS: dict[str, Callable[..., Lists]] = {"popularity, 14 days": popularity, "implicit ALS": als, "implicit BM25": bm25,
                                          "implicit cosine": cosine}
LIBRARY = {"irspack iALS": "IALS", "irspack RP3beta": "RP3beta"}  # peers of an environment of their own: iALS (Rendle et al. 2021), RP3beta
GRIDS = {
    "popularity, 14 days": grid(purchases=[False, True]),
    "implicit ALS": grid(weights=["equal", "graded"], factors=[32, 128], alpha=[1, 10, 40], regularization=[0.01, 0.1]),
    "implicit BM25": grid(weights=["equal", "graded"], neighbours=[20, 100, 500], k1=[0.2, 1.2]),
    "implicit cosine": grid(weights=["equal", "graded"], neighbours=[20, 100, 500]),
    "irspack iALS": grid(weights=["equal", "graded"], n_components=[32, 128], alpha0=[0.0003, 0.003, 0.03], reg=[0.0001, 0.001, 0.01]),
    "irspack RP3beta": grid(weights=["equal", "graded"], alpha=[0.6, 1.0], beta=[0.0, 0.3, 0.6], top_k=[100, 500]),
}


def lists_of(name: str, log: EventLog, asof: int, tries: list[dict], users: np.ndarray, k: int, python: Path | None = None) -> Iterator[Tried]:
    """One peer's lists with each of some parameters, as they are and without what the shoppers touched."""
    if name in LIBRARY:
        yield from library(python, log, asof, LIBRARY[name], tries, users, k)
        return
    for parameters in tries:
        lists = PEERS[name](log, asof, **parameters)
        for new in (False, True): yield parameters, new, lists(users, k, new)


def tune(name: str, log: EventLog, asof: int, users: np.ndarray, judge: Callable[[np.ndarray], float], k: int = 20,
         quick: bool = False, python: Path | None = None) -> tuple[dict, bool, float]:
    """Parameters, filter switch and value of the best, ties to the first; `log` ends before `asof`, `judge` values lists for `users`."""
    best = ({}, False, -1.0)
    for parameters, new, lists in lists_of(name, log, asof, GRIDS[name][: 1 if quick else None], users, k, python):
        value = judge(lists)
        if value > best[2]: best = parameters, new, value
    return best
