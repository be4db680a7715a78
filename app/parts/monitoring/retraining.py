"""A retrain asked for by hand: `flows/monitor.py` beside the app, one at a time. Its log is its lock: whoever holds the log open for writing is at work, whatever became of the app."""
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from reco.data.lake import Lake
from reco.monitoring.retrains import UNDERWAY, counting, retrains
from reco.settings import Settings, find_settings

ROOT = Path(__file__).resolve().parents[3] # of the repository
COMMAND = sys.executable, "flows/monitor.py", "run"
LOG = Path(".demo")/"retrain.log" # beside settings.ini
SHOWN_LINES, TAIL_BYTES = 12, 20_000

class NotBegun(RuntimeError):
    "A retrain was not begun; the message says why."

@dataclass(frozen=True)
class Retrain:
    "The last one that was begun here."
    at: datetime
    who: str
    why: str
    running: bool
    lines: tuple[str, ...] # the end of what it said
    log: Path
    code: int|None = None  # exit code, where it ended under this app

def log_of(settings: Settings) -> Path: return settings.path(str(LOG))

_begun: dict[str, subprocess.Popen] = {} # log → process, so that its exit code is known and it does not stay as a zombie

def running(
    log: Path,
) -> bool:
    "Whether somebody is at it: a process keeps the log locked until it ends, and no other can have taken its number."
    if not log.is_file(): return False
    with log.open() as file:
        try: fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB) # shared: others may look at the same time
        except BlockingIOError: return True
    return False

def locked(
    file: BinaryIO,
) -> bool: # whether it is ours now
    "Take the log. Somebody who only looks holds it for a moment."
    for _ in range(5):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError: time.sleep(0.02)
    return False

def last(
    settings: Settings,
) -> Retrain|None: # None when there was none
    "How it stands with the last retrain."
    log = log_of(settings)
    if not log.is_file(): return None
    with log.open("rb") as file:
        try: at, who, why = (str(head[k]) for head in [json.loads(file.readline())] for k in ("at", "who", "why"))
        except (ValueError, KeyError, TypeError): return None
        file.seek(max(log.stat().st_size - TAIL_BYTES, file.tell()))
        lines = file.read().decode("utf-8", "replace").splitlines()
    at_work, process = running(log), _begun.get(str(log))
    return Retrain(datetime.fromisoformat(at), who, why, at_work, tuple(x for x in lines if x.strip())[-SHOWN_LINES:], log, process.poll() if process else None)

def underway(
    lake: Lake,
    now: datetime,
) -> str: # empty when there is none
    "Whether a run of flows/monitor.py, wherever it runs, has a retrain in hand."
    there = retrains(lake)
    rows = there.filter(there["outcome"].is_in(UNDERWAY), counting(now))
    return "" if rows.is_empty() else f"run {rows['run'][0]} has had one in hand since {rows['at'][0]:%Y-%m-%d %H:%M} UTC"

def refusal(
    settings: Settings,
) -> str: # empty when one may be begun
    "Why no retrain can be begun on this machine, whoever asks; quick."
    if not (ROOT/COMMAND[1]).is_file(): return "The flows are not on this machine. Where they are: `python flows/monitor.py run --because \"…\"`."
    if find_spec("metaflow") is None: return "Metaflow is not installed here: `pip install -e '.[train]'`, or run `python flows/monitor.py run --because \"…\"` where it is."
    if settings.monitor.retrain == "never": return "The settings say that nothing is retrained: `[monitor] retrain = never`."
    if running(log_of(settings)): return "A retrain is under way."
    return ""

def begin(
    settings: Settings,
    lake: Lake,
    who: str,
    why: str,
    command: Sequence[str] = COMMAND,
) -> Retrain:
    "Start a retrain that goes on without the app; raises `NotBegun`."
    if no := refusal(settings): raise NotBegun(no)
    if not why.strip(): raise NotBegun("Say why: it is written down with the retrain.")
    if there := underway(lake, now := datetime.now(UTC)): raise NotBegun(f"A retrain is under way: {there}.")
    said = " ".join(f"{why} (asked for by {who or 'nobody named'})".split())
    log, found = log_of(settings), find_settings()
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | ({"RECO_SETTINGS": str(found.resolve())} if found else {}) | {"PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)}
    with log.open("a+b") as file:
        if not locked(file): raise NotBegun("A retrain is under way.")
        file.truncate(0)
        file.write(json.dumps({"at": now.isoformat(timespec="seconds"), "who": who, "why": why}).encode() + b"\n")
        file.flush()
        try: process = subprocess.Popen([*command, "--because", said], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as e: raise NotBegun(f"It could not be started: {e}") from None
    _begun[str(log)] = process # the lock is the child's now: it came with its standard output
    assert (begun := last(settings)) is not None # its log is there
    return begun
