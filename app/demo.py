"""`make demo`: a simulated shop, its model, the endpoint and the page, with one command; Ctrl-C ends all of it.

A step whose inputs are what they were is reused. Logs and the record of what was done are in .demo/.
"""
import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psutil

from app.client import Client, EndpointError
from app.demo_steps import INGESTED, OtherShop, experiments_file, lake_states, set_aside, steps
from app.ports import port_free, reach
from app.reuse import ROOT, Record, Step, stale
from reco.data.lake import LakeError, open_lake
from reco.settings import Settings, SettingsError, find_settings, load_settings

SHOWN_LINES = 25  # of a failed step's log
DEADLINE_S = 300  # for the endpoint and the app to answer; Ray takes a minute on two busy cores
GRACE_S = {signal.SIGINT: 30, signal.SIGTERM: 5, signal.SIGKILL: 5} # the endpoint needs about 5 s to end Ray
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

class DemoError(RuntimeError):
    "The demo cannot go on; the message says why."

# ---- progress -----------------------------------------------------------------------------------------------------

BEGAN = time.monotonic()

class Progress:
    "One line per step: rewritten in place on a terminal, now and then a new line elsewhere."
    def __init__(self, title: str):
        self.title, self.began, self.said = title, time.monotonic(), time.monotonic()
        self.live = sys.stdout.isatty()
        if not self.live: print(f"{title} …", flush=True)

    def tick(self, doing: str) -> None: # what it is at, from the log
        line = f"{self.title}  {time.monotonic() - self.began:3.0f} s  {doing}"
        if self.live: print(f"\r\x1b[2K{line[:os.get_terminal_size().columns - 1]}", end="", flush=True)
        elif time.monotonic() - self.said >= 15:
            self.said = time.monotonic()
            print(line, flush=True)

    def done(self, how: str) -> None:
        start = "\r\x1b[2K" if self.live else ""
        print(f"{start}{self.title}  {time.monotonic() - self.began:3.0f} s  {how}  ({time.monotonic() - BEGAN:.0f} s in all)", flush=True)

def last_lines(
    log: Path,  # a log file
    n: int,     # how many
) -> list[str]: # without colours and blank lines
    with log.open("rb") as f:
        f.seek(max(0, log.stat().st_size - 200_000))
        lines = ANSI.sub("", f.read().decode("utf-8", "replace")).replace("\r", "\n").splitlines()
    return [x for x in lines if x.strip()][-n:]

# ---- processes ----------------------------------------------------------------------------------------------------

MORE: dict[str, str] = {} # variables of processes that are started from now on

def environment() -> dict[str, str]: # of every process that the demo starts
    "Ours, with the settings named by their full path: a child's working directory is the repository."
    found = find_settings()
    return os.environ | {"PYTHONUNBUFFERED": "1"} | ({"RECO_SETTINGS": str(found.absolute())} if found else {}) | MORE

def _in_group(
    process: psutil.Process,
    group: int, # process group
) -> bool:      # a member that still runs; one that ended and was not yet fetched by its parent does not
    try: return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess): return False

@dataclass
class Child:
    "A process in a group of its own, so that a Ctrl-C reaches it through us and in order."
    name: str
    command: list[str]
    folder: Path # of the logs
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True, env=environment())

    @property
    def log(self) -> Path: return self.folder/f"{self.name}.log"

    def doing(self) -> str: # the last line of the log; of Metaflow's stamp only the step's name
        return re.sub(r"^\d{4}-\d\d-\d\d \S+ (?:\[\d+/(\w+)/\S+ \(pid \d+\)\] )?", lambda m: f"{m[1]}: " if m[1] else "",
                      "".join(last_lines(self.log, 1)))

    def alive(self) -> bool: # whether any process of the group is left
        self.process.poll() # else a dead leader stays in the group as a zombie
        return any(_in_group(p, self.process.pid) for p in psutil.process_iter())

    def failure(self) -> DemoError: # its command, exit code and last lines
        code = self.process.returncode
        end = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        lines = "\n".join(f"  | {x}" for x in last_lines(self.log, SHOWN_LINES))
        return DemoError(f"{self.name} failed ({end}): {' '.join(self.command)}\n{lines}\n  the whole log: {self.log}")

def stop(
    children: list[Child], # what was started
) -> None:
    "Ask the leaders to end, then the groups, then kill: nothing that was started stays."
    for number,grace_s in GRACE_S.items():
        left = [c for c in children if c.alive()]
        for c in left:
            with contextlib.suppress(ProcessLookupError):
                (os.kill if number == signal.SIGINT and c.process.returncode is None else os.killpg)(c.process.pid, number)
        until = time.monotonic() + (grace_s if left else 0)
        while time.monotonic() < until and any(c.alive() for c in left): time.sleep(0.1)

@contextlib.contextmanager
def started() -> Iterator[list[Child]]: # put what you start here; it ends with the block, however that ends
    children: list[Child] = []
    try: yield children
    finally:
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(s, signal.SIG_IGN) # stopping is not interrupted
        if any(c.alive() for c in children):
            print("stopping " + " and ".join(c.name for c in children if c.alive()), flush=True)
            stop(children)

# ---- steps and processes ------------------------------------------------------------------------------------------

def run(
    step: Step,
    title: str,            # for the progress line
    record: Record,
    children: list[Child], # where it puts itself, to be stopped
    folder: Path,          # of the logs
) -> bool:                 # whether it ran
    "Run a step unless nothing that it depends on has changed; raises `DemoError` when it fails."
    progress = Progress(title)
    why = stale(step, record.steps.get(step.name))
    if not why:
        progress.done("reused: nothing it depends on has changed")
        return False
    record.keep(step.name, None)
    began = time.time()
    child = Child(step.name, step.command, folder)
    children.append(child)
    while child.process.poll() is None:
        progress.tick(child.doing())
        time.sleep(0.2)
    if child.process.returncode and (said := step.there() and step.declined(began)):
        record.keep(step.name, step.inputs())
        progress.done(said)
        return True
    if child.process.returncode:
        progress.done("failed")
        raise child.failure()
    if not step.there():
        progress.done("failed")
        raise DemoError(f"{step.name} ended well but left no result; its log: {child.log}")
    record.keep(step.name, step.inputs())
    progress.done(f"done ({why})")
    return True

def check_ports(
    settings: Settings,
) -> None:
    "Before anything starts; raises `DemoError`."
    for what,host,port,key in (("the endpoint", settings.serving.host, settings.serving.port, "RECO_SERVING_PORT"),
                               ("the app", "127.0.0.1", settings.app.port, "RECO_APP_PORT")):
        if not port_free(host, port):
            raise DemoError(f"port {port} of {what} is taken on {host}. Stop what listens there (an earlier demo?), "
                            f"or choose another: {key}={port + 10} make demo")

def page_answers(
    address: str, # of the Streamlit app
) -> bool:
    "Whether Streamlit is up."
    import httpx
    try: return httpx.get(f"{address}/_stcore/health", timeout=2, trust_env=False).is_success
    except httpx.TransportError: return False

def endpoint_answers(
    client: Client,
    user_id: str,
) -> bool:
    "Whether it gives this shopper a recommendation."
    try: return bool(client.recommendations(user_id, 5))
    except EndpointError: return False

def someone(
    settings: Settings,
) -> str: # the shopper with most events, ties by id
    import polars as pl
    users = open_lake(settings).read("interactions").group_by("user_id").len()
    return users.sort(["len", "user_id"], descending=[True, False]).head(1).select(pl.col("user_id")).collect().item()

def serve(
    settings: Settings,
    title: str,
    children: list[Child], # where the two are put
    folder: Path,          # of the logs
) -> str:                  # what to print when all is up
    "Start endpoint, app and consumer side by side and wait until the first two answer; raises `DemoError`."
    progress = Progress(title)
    started = [Child("endpoint", [sys.executable, "-m", "app.serve"], folder), Child("app", [sys.executable, "-m", "app.dashboard"], folder),
               Child("consumer", [sys.executable, "-m", "app.consumer"], folder)]
    children.extend(started)
    address, page = reach(settings.serving.host, settings.serving.port), reach("127.0.0.1", settings.app.port)
    user_id, until, waiting = someone(settings), time.monotonic() + DEADLINE_S, {"endpoint", "app"}
    with Client(address, timeout_s=5) as client:
        while True:
            for c in started:
                if c.process.poll() is not None: raise c.failure()
            if time.monotonic() > until: raise DemoError(f"no answer within {DEADLINE_S} s from {', '.join(sorted(waiting))}; logs in {folder}")
            if "app" in waiting and page_answers(page): waiting.discard("app")
            if "endpoint" in waiting and endpoint_answers(client, user_id): waiting.discard("endpoint")
            if not waiting: break
            progress.tick(f"waiting for {' and '.join(sorted(waiting))}")
            time.sleep(0.3)
    progress.done("both answer")
    return summary(address, page, user_id)

def summary(
    address: str, # of the endpoint
    page: str,    # of the app
    user_id: str, # a shopper to ask for
) -> str:
    "The addresses, and one command with the answer that it gives."
    import httpx
    url = f"{address}/recommendations/v1/{quote(user_id, safe='')}?k=5"
    answer = httpx.get(url, timeout=5, trust_env=False).raise_for_status().text
    return (f"\nready after {time.monotonic() - BEGAN:.0f} s\n\n  page      {page}\n  endpoint  {address}/docs\n\n"
            f"  curl -s '{url}'\n  {answer}\n")

def watch(
    children: list[Child], # endpoint, app and consumer
) -> None:
    "Wait for Ctrl-C; raises `DemoError` when one of them ends by itself."
    while True:
        for c in children:
            if c.process.poll() is not None: raise c.failure()
        time.sleep(1)

def demo(
    settings: Settings,
    once: bool, # whether to end after the answer
) -> None:
    "All steps; raises `DemoError`."
    check_ports(settings)
    folder = settings.root.absolute()/".demo"
    folder.mkdir(exist_ok=True)
    record = Record(folder/"state.json")
    last = len(steps(settings, record)) + 1
    with started() as children:
        for i in range(1, last):
            step = steps(settings, record)[i - 1] # anew: what one step makes names arguments of later ones
            if step.name == "ingest":
                try: set_aside(settings, record, step)
                except OtherShop as e: raise DemoError(str(e)) from None
                if found := experiments_file(settings, folder): MORE["RECO_EXPERIMENTS_FILE"] = str(found)
            ran = run(step, f"[{i}/{last}] {step.name:11}", record, children, folder)
            if step.name == "ingest" and (ran or INGESTED not in record.steps): record.keep(INGESTED, lake_states(settings))
        children.clear() # they have ended
        print(serve(settings, f"[{last}/{last}] {'serve':11}", children, folder), flush=True)
        if once: return
        print("Ctrl-C stops all of it.", flush=True)
        watch(children)

def _interrupt(_signum: int, _frame: object) -> None: # SIGTERM and a closed terminal end the demo the way Ctrl-C does
    raise KeyboardInterrupt

def main() -> int: # exit code
    "`python -m app.demo`."
    cli = argparse.ArgumentParser(prog="python -m app.demo", description="A simulated shop, its model, endpoint and page.")
    cli.add_argument("--once", action="store_true", help="end after the first answer")
    once = cli.parse_args().once
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(s, _interrupt) # SIGINT too: a shell may have it ignored
    try: demo(load_settings(), once)
    except (SettingsError, DemoError, LakeError) as e:
        print(f"\nerror: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0

if __name__ == "__main__": sys.exit(main())
