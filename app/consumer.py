"""`python -m app.consumer`: events from the bus into the lake and the online store, and the lists that the endpoint answered into the lake,
until Ctrl-C or SIGTERM.

It may be killed at any moment and started again, and several may run at once: see nbs/28_data.consumer.ipynb.
"""
import argparse
import contextlib
import itertools
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import polars as pl
from prometheus_client import CollectorRegistry, start_http_server

from app.ports import port_free, reach
from reco.data.bus import open_codec, open_consumer
from reco.data.consumer import Metrics, consume
from reco.data.lake import Lake, LakeError, open_lake
from reco.data.quality import INTERACTIONS_KEY
from reco.data.served import EXPOSURES_KEY, SERVED, exposures_of, hold_lists, lists_section
from reco.data.stream import BusError, Consumer
from reco.data.upkeep import compact
from reco.features.store import open_store
from reco.redis_server import StoreError, wait_until_ready
from reco.settings import Settings, SettingsError, Stream, load_settings

SAY_EVERY_S = 30
COMPACT_EVERY = 200  # writes: looking for duplicates took 0.04 s among few files of a day, 0.14 s among 200


def said(
    registry: CollectorRegistry,  # of `Metrics`
) -> str:                         # one line
    "Events and lists, duplicates, dead letters and lag so far."
    value = {s.name: 0.0 for m in registry.collect() for s in m.samples}
    for m in registry.collect():
        for s in m.samples: value[s.name] += s.value  # dead letters add up over their reasons
    get = lambda name: sum(int(value.get(f"reco_{of}_{name}", 0)) for of in ("stream", "served"))
    lists = int(value.get("reco_served_written_events_total", 0))
    return (f"{get('written_events_total') - lists:,} events and {lists:,} lists written, {get('duplicate_events_total'):,} came twice, "
            f"{get('dead_letters_total'):,} dead letters, {get('lag_events'):,} waiting")


@contextlib.contextmanager
def saying(
    registry: CollectorRegistry,
    every_s: float,   # seconds
) -> Iterator[None]:
    "Print a line now and then, also while the lake does not answer, and one at the end."
    over = threading.Event()

    def run() -> None:
        while not over.wait(every_s): print(said(registry), flush=True)
    teller = threading.Thread(target=run, daemon=True)
    teller.start()
    try: yield
    finally:
        over.set()
        teller.join()
        print(f"ended: {said(registry)}", flush=True)


def writer(
    lake: Lake,
    table: str,
    key: list[str],                    # what a row is known by
    duplicate_days: int,               # a row is looked for on its own day and so many around it
) -> Callable[[pl.DataFrame], object]: # gets the table's rows
    "How a micro-batch gets into the lake. Each leaves small files behind, which are put together now and then."
    writes = itertools.count(1)

    def write(rows: pl.DataFrame) -> None:
        lake.write(table, rows, key=key, day_of="ts", around_days=duplicate_days)
        if next(writes) % COMPACT_EVERY == 0: compact(lake, table)
    return write


def show_metrics(
    registry: CollectorRegistry,
    section: Stream,              # metrics_port, 0 is none, and metrics_host
) -> str:                         # where they are, for the first line
    "Serve the figures to Prometheus; raises `OSError` when somebody listens there already."
    host, port = section.metrics_host, section.metrics_port
    if not port: return ""
    if not port_free(host, port): raise OSError(f"[stream] metrics_port: {host}:{port} is in use, or not an address of this machine")
    start_http_server(port, addr=host, registry=registry)
    return f", metrics at {reach(host, port)}/metrics"


def together(
    jobs: Sequence[Callable[[], None]],
    ended: threading.Event,             # tells all of them to end
) -> None:
    "Run them side by side until all have ended; when one fails, the others are told to end, and its error is raised."
    def run_one(job: Callable[[], None]) -> None:
        try: job()
        finally: ended.set()
    with ThreadPoolExecutor(len(jobs)) as pool: running = [pool.submit(run_one, job) for job in jobs]
    for done in running: done.result()


def run(
    settings: Settings,
    name: str,                      # of this consumer, the same after a restart
    stopped: Callable[[], bool],
    open_bus: Callable[..., Consumer] = open_consumer,
) -> None:
    "Everything from opening to closing; raises `BusError`, `LakeError`, `StoreError`, `OSError`."
    section, lists, registry, ended = settings.stream, lists_section(settings.stream, settings.served), CollectorRegistry(), threading.Event()
    over = lambda: stopped() or ended.is_set()
    with contextlib.closing(open_store(settings)) as store, contextlib.ExitStack() as buses:
        wait_until_ready(store.client)
        of = lambda its: buses.enter_context(contextlib.closing(open_bus(its, store.client, name)))
        write = writer(open_lake(settings), "interactions", INTERACTIONS_KEY, section.duplicate_days)
        jobs = [partial(consume, of(section), open_codec(section).decode, {"lake": write, "store": store.append}, section, Metrics(registry), over)]
        if settings.served.on:
            note = writer(open_lake(settings), "exposures", EXPOSURES_KEY, 0)
            jobs.append(partial(consume, of(lists), SERVED.decode, {"lake": lambda shown: note(exposures_of(shown))}, lists,
                                Metrics(registry, of="served"), over, hold_lists))
        topics = section.topic + (f" and {lists.topic}" if settings.served.on else "")
        print(f"from {topics} as {section.group} into {settings.lake.root}{show_metrics(registry, section)}", flush=True)
        with saying(registry, SAY_EVERY_S): together(jobs, ended)


def main(
    argv: list[str] | None = None,  # the command line; the process's own when not given
) -> int:                           # exit code
    "Run the command; errors go to stderr with exit code 1."
    cli = argparse.ArgumentParser(prog="python -m app.consumer", description="Events from the bus into the lake and the online store.")
    cli.add_argument("--name", default="", help="of this consumer, the same after a restart; default the machine's. "
                     "Two at once on one machine need two names")
    args, ending = cli.parse_args(argv), threading.Event()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda *_: ending.set())
    try: run(load_settings(), args.name, ending.is_set)
    except (SettingsError, BusError, LakeError, StoreError, OSError, RuntimeError) as e:
        print(f"consumer: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
