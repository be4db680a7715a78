"""Flows by the clock of one machine: what is due, what follows, what is made good, and who hears of a failure."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.schedule import Ending, Plan, followers, keep_time, next_time, run_flow, tell
from reco.alerts import events
from reco.settings import load_settings

ROOT = Path(__file__).parents[1]
MONDAY = datetime(2026, 6, 1, tzinfo=UTC)


def plan(folder: Path, began: dict[str, str] | None = None, **lines: str) -> Plan:
    file = folder / "schedule.json"
    if began is not None: file.write_text(json.dumps(began))
    return Plan(lines, {"ingest": ["materialize", "monitor"], "train": ["promote"], "promote": ["batch"]}, file)


class Clock:
    """Moves only when somebody waits or a flow runs; ends the loop at a moment."""

    def __init__(self, now: datetime, until: datetime):
        self.now, self.until, self.over = now, until, False

    def __call__(self) -> datetime: return self.now

    def is_set(self) -> bool: return self.over or self.now >= self.until

    def wait(self, _seconds: float) -> None: self.now += timedelta(minutes=1)


def ran(made: Plan, now: datetime, until: datetime, minutes: int = 5, failing: tuple[str, ...] = ()) -> list[tuple[datetime, str]]:
    """What ran and when it began; each takes some minutes."""
    clock, seen = Clock(now, until), []

    def run(flow: str, _hours: float, _ending: object) -> str:
        seen.append((clock.now, flow))
        clock.now += timedelta(minutes=minutes)
        return "exit code 1" if flow in failing else ""

    made.read(now)
    keep_time(load_settings(environ={}), made, clock, run, clock)
    return seen


def test_the_chain_is_that_of_argo():
    assert followers(ROOT / "flows") == {"ingest": ["materialize", "monitor"], "train": ["promote", "report"], "promote": ["batch"]}


def test_a_day_of_the_shop(tmp_path):
    seen = ran(plan(tmp_path, ingest="0 2 * * *", kpis="3 2 * * *", batch="0 5 * * *"), MONDAY, MONDAY + timedelta(days=1))
    assert [flow for _, flow in seen] == ["ingest", "materialize", "monitor", "kpis", "batch"]  # what follows comes before what waits
    assert seen[0][0] == MONDAY + timedelta(hours=2) and seen[-1][0] == MONDAY + timedelta(hours=5)


def test_what_failed_has_no_followers_and_comes_again(tmp_path, monkeypatch):
    monkeypatch.setattr("app.schedule.tell", lambda *_: None)
    seen = ran(plan(tmp_path, train="0 4 * * *"), MONDAY, MONDAY + timedelta(days=2), failing=("train",))
    assert [flow for _, flow in seen] == ["train", "train"]
    assert [flow for _, flow in ran(plan(tmp_path / "b", train="0 4 * * *"), MONDAY, MONDAY + timedelta(days=1))] == ["train", "promote", "batch"]


def test_a_time_that_passed_while_nothing_ran_is_made_good_once(tmp_path):
    long_ago = {"train": "2026-05-01T04:00:00+00:00"}
    seen = ran(plan(tmp_path, long_ago, train="0 4 * * 0"), MONDAY, MONDAY + timedelta(hours=3))
    assert [flow for _, flow in seen] == ["train", "promote", "batch"]
    assert ran(plan(tmp_path, train="0 4 * * 0"), MONDAY + timedelta(hours=3), MONDAY + timedelta(hours=6)) == []  # and it is known to have been


def test_a_first_start_owes_nothing(tmp_path):
    assert ran(plan(tmp_path, train="0 4 * * 0", ingest="0 2 * * *"), MONDAY, MONDAY + timedelta(hours=1)) == []


@pytest.mark.parametrize("text", ["", "[]", '{"train": 5}', '{"train": "yesterday"}', '{"train": "2026-05-01'])
def test_a_file_that_is_not_ours_owes_nothing_either(tmp_path, text, capsys):
    made = plan(tmp_path, train="0 4 * * 0")
    made.file.write_text(text)
    assert ran(made, MONDAY, MONDAY + timedelta(hours=1)) == [] and "is not what this program wrote" in capsys.readouterr().err


def test_a_clock_that_was_ahead_does_not_stop_a_flow_for_ever(tmp_path):
    ahead = {"ingest": "2031-01-01T00:00:00+00:00"}
    assert [flow for _, flow in ran(plan(tmp_path, ahead, ingest="0 2 * * *"), MONDAY, MONDAY + timedelta(hours=3))][0] == "ingest"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 180), min_size=1, max_size=6))
def test_a_flow_runs_once_for_each_of_its_times_however_long_others_take(tmp_path_factory, minutes):
    made = plan(tmp_path_factory.mktemp("plan"), ingest="0 */6 * * *", kpis="0 3 * * *", upkeep="30 1 * * *")
    made.after = {}
    clock, seen, takes = Clock(MONDAY, MONDAY + timedelta(days=3)), [], iter(minutes * 100)

    def run(flow: str, *_: object) -> str:
        seen.append(flow)
        clock.now += timedelta(minutes=next(takes))
        return ""

    made.read(MONDAY)
    keep_time(load_settings(environ={}), made, clock, run, clock)
    assert seen.count("kpis") == 3 and seen.count("upkeep") == 3 and seen.count("ingest") in (11, 12)  # the last one begins when the three days end


def test_lines_of_the_settings_are_understood():
    for line in load_settings(environ={}).schedule.model_dump().values():
        if line: assert MONDAY < next_time(line, MONDAY) <= MONDAY + timedelta(days=7)


def test_a_failure_is_told_once_and_not_where_the_flow_has_spoken(tmp_path, capsys):
    (tmp_path / "settings.ini").write_text("[bundles]\nroot = bundles\n")
    s, began = load_settings(tmp_path / "settings.ini", {}), datetime.now(UTC) - timedelta(seconds=1)
    for _ in range(2): tell(s, "ingest", began, "exit code 1")
    assert [(e["what"], e["about"]) for e in events(tmp_path / "bundles")] == [("flow_failed", {"flow": "ingest"})]
    log = tmp_path / "bundles" / "events.jsonl"
    log.write_text(json.dumps({"at": datetime.now(UTC).isoformat(), "what": "promotion_refused", "who": "promote", "text": "no", "key": "k", "about": {}}) + "\n")
    tell(s, "promote", began, "exit code 1")
    assert [e["what"] for e in events(tmp_path / "bundles")] == ["promotion_refused"]
    assert "flows/promote.py failed: exit code 1" in capsys.readouterr().err


def test_a_flow_that_does_not_end_is_ended(tmp_path, monkeypatch):
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "sleepy.py").write_text("import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\ntime.sleep(600)\n")
    (tmp_path / "flows" / "broken.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr("app.schedule.ROOT", tmp_path)
    assert run_flow("broken", 1, Ending()) == "exit code 3"
    began = time.monotonic()
    assert "ended after 0.0002" in run_flow("sleepy", 0.0002, Ending()) and time.monotonic() - began < 30
    ending = Ending()
    threading.Timer(1, ending.set).start()
    assert run_flow("sleepy", 1, ending) == "" and time.monotonic() - began < 30


def test_a_signal_ends_a_wait_at_whatever_moment_it_comes():
    """Some thousand signals, most of them while it begins or ends to wait; an Event hangs here within a second."""
    code = ("import os, signal, threading, time\nfrom app.schedule import Ending\nending = [Ending()]\nsignal.signal(signal.SIGUSR1, lambda *_: ending[0].set())\n"
            "threading.Thread(target=lambda: [(os.kill(os.getpid(), signal.SIGUSR1), time.sleep(0.0003)) for _ in range(4000)], daemon=True).start()\n"
            "until = time.monotonic() + 1.5\nturns = 0\nwhile time.monotonic() < until:\n    ending[0] = Ending()\n    ending[0].wait(0)\n    turns += 1\nassert turns > 100")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


def test_it_says_what_comes_and_ends_when_it_is_told(tmp_path):
    (tmp_path / "settings.ini").write_text("[lake]\nroot = lake\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RECO_")} | {"RECO_SETTINGS": str(tmp_path / "settings.ini"), "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path)}
    program = subprocess.Popen([sys.executable, "-m", "app.schedule"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = [program.stdout.readline() for _ in range(5)]
    program.send_signal(signal.SIGTERM)
    _, err = program.communicate(timeout=20)
    assert program.returncode == 0 and not err and any("flows/train.py, then promote, then report" in line for line in said)
    assert set(json.loads((tmp_path / ".metaflow" / "schedule.json").read_text())) == {"ingest", "kpis", "train", "batch", "upkeep"}
