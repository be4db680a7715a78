"""What `make demo` promises beside its steps: reuse, clear failures, and nothing left running."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import psutil
import pytest

from app import demo, demo_steps, reuse
from app.ports import free_port
from reco.challenger import keep_report, set_challenger
from reco.data.lake import open_lake
from reco.experiments.assignment import read_experiments
from reco.features.store import open_store
from reco.redis_server import listens, socket_path
from reco.schemas import INTERACTIONS, conform
from reco.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent

def a_step(folder: Path, source: Path, script: str = "") -> reuse.Step: # counts its runs in made.txt
    made = folder/"made.txt"
    return reuse.Step("make", [sys.executable, "-c", script or f"open({str(made)!r}, 'a').write('x')"],
                     lambda: {"the source": reuse.listing(source)}, made.is_file)

def run(step: reuse.Step, folder: Path) -> None:
    children: list[demo.Child] = []
    try: demo.run(step, step.name, reuse.Record(folder/"state.json"), children, folder)
    finally: demo.stop(children)

def test_a_step_runs_again_only_when_something_changed(tmp_path, capsys):
    source = tmp_path/"source.txt"
    source.write_text("a")
    step, made = a_step(tmp_path, source), tmp_path/"made.txt"
    for _ in range(3): run(step, tmp_path)
    said = capsys.readouterr().out
    assert made.read_text() == "x" and said.count("reused") == 2 and "done (first time)" in said
    source.write_text("ab")
    run(step, tmp_path)
    assert made.read_text() == "xx" and "the source changed" in capsys.readouterr().out
    made.unlink()
    run(step, tmp_path)
    assert made.read_text() == "x" and "its result is gone" in capsys.readouterr().out

def test_a_failed_step_shows_its_log_and_runs_again(tmp_path, capsys):
    source = tmp_path/"source.txt"
    source.write_text("a")
    run(a_step(tmp_path, source), tmp_path)
    source.write_text("ab")
    with pytest.raises(demo.DemoError) as failed:
        run(a_step(tmp_path, source, "print('line', 'of the log'); raise SystemExit('no coffee')"), tmp_path)
    for part in ("exit code 1", "line of the log", "no coffee", "raise SystemExit", str(tmp_path/"make.log")): assert part in str(failed.value)
    source.write_text("a") # as it was when it last went well: but it failed since, so what is there is not to be trusted
    capsys.readouterr()
    run(a_step(tmp_path, source), tmp_path)
    assert "done (first time)" in capsys.readouterr().out

def test_a_step_without_a_result_fails(tmp_path):
    with pytest.raises(demo.DemoError, match="left no result"): run(a_step(tmp_path, tmp_path, "pass"), tmp_path)

def test_a_damaged_record_means_running_again(tmp_path):
    (tmp_path/"state.json").write_text('{"make": ')
    assert reuse.Record(tmp_path/"state.json").steps == {}

STUBBORN = """
import signal, subprocess, sys, time
for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True) # inherits the ignoring
time.sleep(600)
"""

def test_stopping_leaves_nothing_however_stubborn(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "GRACE_S", dict.fromkeys(demo.GRACE_S, 0.5))
    child = demo.Child("stubborn", [sys.executable, "-c", STUBBORN], tmp_path)
    while not child.log.read_text().strip(): time.sleep(0.05)
    grandchild = int(child.log.read_text())
    assert child.alive() and psutil.pid_exists(grandchild)
    demo.stop([child])
    assert not child.alive()
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE

def test_a_leader_that_ended_takes_its_group_along(tmp_path):
    script = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)"
    child = demo.Child("leader", [sys.executable, "-c", script], tmp_path)
    child.process.wait(20)
    assert child.alive() # the one it left behind
    demo.stop([child])
    assert not child.alive()

def demo_process(folder: Path, *args: str, **env: object) -> subprocess.Popen:
    (folder/"settings.ini").write_text((ROOT/"settings.ini").read_text())
    return subprocess.Popen([sys.executable, "-m", "app.demo", *args], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"RECO_SETTINGS": str(folder/"settings.ini")} | {k: str(v) for k,v in env.items()})

def test_a_busy_port_is_an_error_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for variable in ("RECO_SERVING_PORT", "RECO_APP_PORT"):
            ports = {"RECO_SERVING_PORT": free_port(), "RECO_APP_PORT": free_port()} | {variable: port}
            process = demo_process(tmp_path, "--once", **ports)
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 1 and f"port {port}" in said and variable in said and "Traceback" not in said
    assert not (tmp_path/"data").exists() and not (tmp_path/".demo").exists()

def test_ctrl_c_during_a_step_ends_the_step(tmp_path):
    process = demo_process(tmp_path, RECO_SIMULATOR_EVENTS=18_000_000, RECO_SERVING_PORT=free_port(), RECO_APP_PORT=free_port())
    log = tmp_path/".demo"/"simulate.log"
    until = time.monotonic() + 60
    while not (log.exists() and "simulating" in log.read_text()) and time.monotonic() < until: time.sleep(0.05)
    assert len(mine(tmp_path)) == 2 # the demo and its step
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopping simulate" in said and "Traceback" not in said
    assert not mine(tmp_path)

def mine(folder: Path) -> list[int]: # processes that were started for a test
    return [p.pid for p in psutil.process_iter(["environ"]) if str(folder) in (p.info["environ"] or {}).get("RECO_SETTINGS", "")]

def test_another_simulated_shop_does_not_mix_with_the_one_in_the_lake(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECO_SETTINGS", str(tmp_path/"settings.ini"))
    (tmp_path/"settings.ini").write_text("[project]\nname = test\n")
    settings: Settings = load_settings()
    raw, lake = tmp_path/"data"/"raw", tmp_path/"data"/"lake"
    for folder in (raw, lake): folder.mkdir(parents=True)
    (raw/"interactions.parquet").write_text("first shop")
    (lake/"rows").write_text("first shop")
    ingest, record = demo_steps.steps(settings, reuse.Record(tmp_path/"state.json"))[1], reuse.Record(tmp_path/"state.json")
    demo_steps.set_aside(settings, record, ingest) # a lake we know nothing of is left alone
    demo_steps.set_aside(settings, record, ingest) # the same shop again
    assert (lake/"rows").exists()
    (raw/"interactions.parquet").write_text("the second shop")
    demo_steps.set_aside(settings, reuse.Record(tmp_path/"state.json"), ingest)
    kept = list((tmp_path/"data").glob("lake.until-*/rows"))
    assert not lake.exists() and [p.read_text() for p in kept] == ["first shop"]
    assert str(kept[0].parent) in capsys.readouterr().out

def test_a_step_that_declines_ends_well_where_something_is_there_already(tmp_path, capsys):
    source = tmp_path/"source.txt"
    source.write_text("a")
    step = replace(a_step(tmp_path, source, "raise SystemExit('no better')"), declined=lambda _: "not promoted")
    with pytest.raises(demo.DemoError, match="no better"): run(step, tmp_path) # there is nothing that could go on
    (tmp_path/"made.txt").write_text("x")
    for said in ("not promoted", "reused"):
        run(step, tmp_path)
        assert said in capsys.readouterr().out
    with pytest.raises(demo.DemoError, match="no better"): run(replace(step, name="other", declined=lambda _: ""), tmp_path)

def test_only_a_verdict_of_now_is_one(tmp_path):
    (tmp_path/"b1").mkdir()
    (tmp_path/"b1"/"manifest.json").write_text("{}")
    set_challenger(tmp_path/"b1")
    report = {"bundle": "b1", "gates": [{"name": "latency p99", "passed": False}, {"name": "better than popularity", "passed": True}]}
    assert demo_steps.declined(tmp_path, time.time()) == ""
    path = keep_report(tmp_path, report)
    assert demo_steps.declined(tmp_path, time.time()) == "not promoted, the bundle before goes on: latency p99"
    os.utime(path, (1, 1))
    assert demo_steps.declined(tmp_path, time.time()) == ""

def test_real_files_are_not_simulated_over(tmp_path, monkeypatch):
    (tmp_path/"settings.ini").write_text("[data]\nsource = retailrocket\n")
    assert [s.name for s in demo_steps.steps(load_settings(tmp_path/"settings.ini"), reuse.Record(tmp_path/"state.json"))] == ["ingest", "train", "promote", "materialize"]

def test_a_change_of_settings_or_code_counts(tmp_path):
    (tmp_path/"settings.ini").write_text("")
    def inputs(**env: str) -> list[dict]: return [s.inputs() for s in demo_steps.steps(load_settings(tmp_path/"settings.ini", env), reuse.Record(tmp_path/"state.json"))]
    plain = inputs()
    assert inputs() == plain
    changed = [a != b for a,b in zip(plain, inputs(RECO_SIMULATOR_EVENTS="300"), strict=True)]
    only = lambda *names: [s.name in names for s in demo_steps.steps(load_settings(tmp_path/"settings.ini", {}), reuse.Record(tmp_path/"state.json"))]
    assert changed == only("simulate") # the rest follows from the files that the first writes
    assert [a != b for a,b in zip(plain, inputs(RECO_ALS_FACTORS="8"), strict=True)] == only("train")
    assert [a != b for a,b in zip(plain, inputs(RECO_GATES_MARGIN="0.01"), strict=True)] == only("promote")
    assert [a != b for a,b in zip(plain, inputs(RECO_ONLINE_HISTORY_DAYS="8"), strict=True)] == only("materialize")
    assert [a != b for a,b in zip(plain, inputs(RECO_SERVING_PORT="1234"), strict=True)] == only()

def test_traffic_that_came_on_top_of_the_raw_files_trains_nothing_anew(tmp_path):
    (tmp_path/"settings.ini").write_text("")
    settings, record = load_settings(tmp_path/"settings.ini", {}), reuse.Record(tmp_path/"state.json")
    lake, rows = open_lake(settings), pl.DataFrame({"event_id": ["a"], "ts": datetime(2026, 5, 1, tzinfo=UTC), "user_id": "u", "item_id": "i", "event": "view"})
    lake.write("interactions", conform(rows, INTERACTIONS), key=["event_id"], day_of="ts")
    inputs = lambda: {s.name: s.inputs() for s in demo_steps.steps(settings, record)}
    record.keep(demo_steps.INGESTED, demo_steps.lake_states(settings))
    before = inputs()
    lake.write("interactions", conform(rows.with_columns(event_id=pl.lit("b")), INTERACTIONS), key=["event_id"], day_of="ts")
    assert inputs() == before
    record.keep(demo_steps.INGESTED, demo_steps.lake_states(settings)) # but what comes of raw files does
    assert [n for n, i in inputs().items() if i != before[n]] == ["train", "materialize"]

def test_an_experiment_begins_with_the_traffic_and_a_file_of_ones_own_goes_first(tmp_path):
    (tmp_path/"settings.ini").write_text("")
    settings = load_settings(tmp_path/"settings.ini", {})
    assert demo_steps.experiments_file(settings, tmp_path) is None
    (tmp_path/"data"/"raw").mkdir(parents=True)
    (tmp_path/"data"/"raw"/"shop.json").write_text('{"end": "2026-05-01T00:00:00+00:00"}')
    [experiment] = read_experiments(demo_steps.experiments_file(settings, tmp_path)).experiment
    assert experiment.name == "variety" and experiment.window[0] == datetime(2026, 5, 1, tzinfo=UTC).timestamp()*1000
    assert demo_steps.experiments_file(load_settings(tmp_path/"settings.ini", {"RECO_EXPERIMENTS_FILE": "mine.toml"}), tmp_path) is None

def test_a_store_that_still_reads_its_log_is_waited_for(tmp_path):
    "The embedded server ends with its last user; the next question starts it, and it has all of it to read."
    settings = Settings(root=tmp_path)
    assert not demo_steps.knows_someone(settings)
    n = 60_000
    rows = pl.DataFrame({"event_id": pl.int_range(n, eager=True).cast(pl.String), "ts": datetime(2026, 5, 1, tzinfo=UTC),
                         "user_id": pl.int_range(n, eager=True).cast(pl.String), "item_id": "lamp", "event": "view"})
    with contextlib.closing(open_store(settings)) as store: store.append(conform(rows, INTERACTIONS))
    server, until = socket_path((tmp_path/"data"/"online").absolute()), time.monotonic() + 10
    while listens(server) and time.monotonic() < until: time.sleep(0.02)
    assert not listens(server) and demo_steps.knows_someone(settings)
