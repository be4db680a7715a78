"""Parts of a job for a few workers on Ray: a cluster when RAY_ADDRESS names one, else a Ray of this machine that ends with the run.

A worker is a process that is made once and then takes one part after the other. A part that fails, or whose worker dies, goes to the
end of the queue and is tried again by whoever is free; the third time ends the run.
"""
import os
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

TRIES = 3 # of a part, and of starting a worker
GIVEN_UP = 5 # parts that may fail for good before the rest is not tried any more
STARTS = 4 # of Ray: its raylet gives its agents 15 s; they need 4 on two free cores, 20 where others use both
# A worker computes on one core; thread pools inside it would only fight over the cores.
ONE_THREAD = {v: "1" for v in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
                               "POLARS_MAX_THREADS")}
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"} # nothing is sent anywhere; a warning of Ray's about itself


class WorkError(RuntimeError):
    """Ray or its workers do not start, or a part has failed too often; the message names the part and has its traceback."""


@contextmanager
def ray_running() -> Iterator[int]:
    """Ray, and how many cores it has; raises `WorkError` when it cannot be started or reached."""
    for name, value in QUIET.items(): os.environ.setdefault(name, value) # read when Ray is imported
    import ray
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    try:
        if os.environ.get("RAY_ADDRESS"): ray.init(**quiet)
        else: start_ray(quiet)
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise WorkError(f"no Ray at {os.environ.get('RAY_ADDRESS') or 'this machine'}: {e}") from e
    try: yield max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally: ray.shutdown()


def start_ray(quiet: dict[str, Any]) -> None:
    """Ray on this machine, tried again when it misses its own deadline."""
    import psutil
    import ray
    for n in range(1, STARTS + 1):
        before = {p.pid for p in psutil.Process().children(recursive=True)}
        try:
            ray.init(address="local", include_dashboard=False, object_store_memory=256 * 2**20, **quiet)
            return
        except Exception as e: # Ray has no type of its own for this
            if "timed out during startup" not in str(e): raise
            for child in psutil.Process().children(recursive=True): # what is left of the try
                if child.pid not in before: child.kill()
            if n == STARTS: raise WorkError(f"{STARTS} tries: {e}") from e
            print(f"Ray missed its own deadline for starting (is the machine busy?); try {n + 1} of {STARTS}", flush=True)


class Worker:
    """A process with what `make` has made of its arguments. They come packed: the threads have to be limited before libraries are imported."""

    def __init__(self, env: dict[str, str]) -> None: os.environ.update(env)

    def make(self, packed: bytes) -> None:
        make, args = pickle.loads(packed)
        self.do = make(*args)

    def run(self, part: Any) -> Any: return self.do(part)


def each_done(make: Callable[..., Callable[[Any], Any]], args: Iterable[object], parts: Iterable[Any], workers: int,
              env: dict[str, str]) -> Iterator[tuple[Any, Any]]:
    """Part and result, as they come; `make(*args)` gives each worker its function, `env` are more variables of its process.

    Raises `WorkError` at once when `make` raises or the start of a worker has failed three times, and at the end, when all others are done, where
    a part has; where many have, it is not the parts, and nobody waits for the others.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__]) # a cluster's nodes have the package `reco`, but not this folder
    packed, kind = ray.put(ray.cloudpickle.dumps((make, args))), ray.remote(Worker).options(num_cpus=1)
    queue = deque((p, 1) for p in parts)  # (part, try)
    busy: dict[Any, tuple[Any, Any, int]] = {} # answer that is awaited → (worker, part or None, try)
    lost: list[tuple[str, Exception]] = [] # parts that are given up

    def hire(n: int) -> None: # on a full cluster a worker may have to wait for its place, and no part waits with it
        worker: Any = kind.remote(ONE_THREAD | env)
        busy[worker.make.remote(packed)] = worker, None, n

    def last_words(what: str, e: Exception) -> str:
        return f"{what} failed {TRIES} times; the last time: {e}"

    def again(part: Any, n: int, e: Exception) -> None:
        if n == TRIES: lost.append((f"part {part}", e))
        else: queue.append((part, n + 1))
        print(f"part {part} failed and is {'given up' if n == TRIES else 'tried again'}: {str(e).strip().splitlines()[-1]}", flush=True)

    for _ in range(min(workers, len(queue))): hire(1)
    try:
        while len(lost) < GIVEN_UP and (queue or any(part is not None for _, part, _ in busy.values())):
            [ref], _ = ray.wait(list(busy), num_returns=1)
            worker, part, n = busy.pop(ref)
            try: result = ray.get(ref)
            except RayTaskError as e:
                if part is None: raise WorkError(f"a worker cannot be made: {e}") from e
                again(part, n, e)
            except RayError as e: # its process is gone
                if part is None and n == TRIES: raise WorkError(last_words("a worker", e)) from e
                if part is not None: again(part, n, e)
                hire(1 if part is not None else n + 1)
                continue
            else:
                if part is not None: yield part, result
            if queue: # else this worker ends
                part, n = queue.popleft()
                busy[worker.run.remote(part)] = worker, part, n
        if lost: raise WorkError("; ".join(last_words(*x) for x in lost)) from lost[0][1]
    finally:
        for worker, _, _ in busy.values(): ray.kill(worker)
