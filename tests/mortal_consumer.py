"""A process that starts consumers to be killed: `python tests/mortal_consumer.py`.

Imports take seconds and a consumer is killed dozens of times, so this process imports once and runs nothing, and each consumer
is a fork of it. A line of JSON on stdin starts one and says after how many seconds it is killed; its process id is answered, and
when it has ended, its exit status.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import confluent_kafka  # noqa: F401  what a consumer imports later is imported here once

import app.consumer
import reco.data.kafka_bus  # noqa: F401
from reco.data.bus import open_consumer
from reco.data.lake import Lake
from reco.data.stream import Consumer
from reco.features.store import OnlineStore
from reco.settings import Settings

# Threads that exist after the imports alone. jemalloc locks and starts its own anew around a fork; polars' waits for spilled
# files to delete. Any other might hold a lock at the moment of a fork, which nobody in the child would ever release.
HARMLESS = {"jemalloc_bg_thd", "polars-ooc-clea"}


def mortal(act: Callable, name: str, die: Callable[[str], None]) -> Callable:
    """The same, with a chance to die before it and after it."""

    def wrapped(*args: object, **named: object) -> object:
        if name != "poll": die(f"before {name}")
        answer = act(*args, **named)
        if answer or name != "poll": die(f"after {name}") # looking in vain is not a step
        return answer
    return wrapped


def consumer(settings: dict, name: str, seed: int, chance: float, log: str) -> None:
    """The real consumer; at each of its steps it kills itself with a chance."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2): os.dup2(out, stream)
    rng, ended = random.Random(seed), []

    def die(where: str) -> None:
        if rng.random() < chance:
            print(f"killed {where}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def open_bus(*args: object) -> Consumer:
        bus = open_consumer(*args, idle_s=0.3)
        for step in ("poll", "ack", "dead_letter"): setattr(bus, step, mortal(getattr(bus, step), step, die))
        return bus
    Lake.write, OnlineStore.append = mortal(Lake.write, "lake", die), mortal(OnlineStore.append, "store", die)
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    app.consumer.run(Settings(**settings, root=Path(settings["lake"]["root"]).parent), name, lambda: bool(ended), open_bus)


def main() -> None:
    threads = [(p/"comm").read_text().strip() for p in Path("/proc/self/task").iterdir() if p.name != str(os.getpid())]
    assert set(threads) <= HARMLESS, f"{threads}: a fork of this process would not be sound"
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        kill_after = order.pop("kill_after")
        pid = os.fork()
        if pid == 0:
            try: consumer(**order)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        ended, status = os.waitpid(pid, os.WNOHANG)
        until = time.monotonic() + (1e9 if kill_after is None else kill_after)
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL) # not waited for yet, so the number is still its own
            status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__": main()
