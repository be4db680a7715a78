"""irspack's models, run in an environment of their own: `PYTHON benchmarks/peer_library.py IN.npz OUT.npz`.

It imports numpy, scipy and irspack only (`benchmarks/requirements-peers.txt` pins them); `benchmarks.peers` writes what goes in and
reads what comes out. IN: `jobs` (JSON: a list of model, weights, parameters), `users` (rows of the matrix that want a list), `k`, and for
each weighting its matrix of shoppers × items as `WEIGHTS_data`, `_indices`, `_indptr`, `_shape`. OUT: for job 3 `3_all` and `3_new`,
int32 [users, k], best first, -1 where there is nothing more; `_new` leaves out what the shopper touched.
"""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
from scipy.sparse import csr_matrix

CHUNK = 500  # shoppers scored at a time, against all items


def best(score: np.ndarray, k: int) -> np.ndarray:
    """The items of the `k` highest scores of each row, ties to the lower index, -1 where a score is not finite."""
    order = np.argsort(-score, axis=1, kind="stable")[:, :k]
    return np.where(np.isfinite(np.take_along_axis(score, order, axis=1)), order, -1).astype(np.int32)


def lists(model: object, rows: csr_matrix, users: np.ndarray, k: int, neighbours: bool) -> tuple[np.ndarray, np.ndarray]:
    """The lists with and without what was touched; a model of neighbours proposes nothing with a score of 0."""
    both = [], []
    for start in range(0, len(users), CHUNK):
        some = users[start : start + CHUNK]
        score = np.asarray(model.get_score(some), np.float64)
        if neighbours: score[score <= 0] = -np.inf
        both[0].append(best(score, k))
        score[rows[some].nonzero()] = -np.inf
        both[1].append(best(score, k))
    return np.concatenate(both[0]), np.concatenate(both[1])


def main(given: str, made: str) -> None:
    """Fit every job's model and write its lists."""
    import irspack

    with np.load(given, allow_pickle=False) as f: read = dict(f)
    part = lambda w: csr_matrix(tuple(read[f"{w}_{x}"] for x in ("data", "indices", "indptr")), shape=tuple(read[f"{w}_shape"]))
    out, matrices = {}, {}
    for i, job in enumerate(json.loads(str(read["jobs"]))):
        rows = matrices.setdefault(job["weights"], part(job["weights"]))
        model = getattr(irspack, f"{job['model']}Recommender")(rows, **job["parameters"])
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()): model.learn()  # it draws progress bars
        out[f"{i}_all"], out[f"{i}_new"] = lists(model, rows, read["users"], int(read["k"]), job["model"] != "IALS")
    np.savez(made, **out)


if __name__ == "__main__":
    if len(sys.argv) == 3: main(*sys.argv[1:])
    else: print(__doc__)
