"""A retrain by hand, with commands that stand for the flow: one at a time, beside the app, with its reason."""
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.parts.monitoring import retraining
from app.parts.monitoring.retraining import NotBegun, begin, last, log_of, refusal, running, underway
from reco.data.lake import Lake
from reco.monitoring.retrains import claim, settle
from reco.settings import load_settings

SAYS = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get('RECO_SETTINGS'), os.getsid(0) == os.getpid()]), flush=True); "

def command(code: str) -> tuple[str, ...]: return sys.executable, "-c", SAYS + code

@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Settings and lake of a folder of their own."
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n")
    monkeypatch.setenv("RECO_SETTINGS", str(tmp_path/"settings.ini"))
    return load_settings(), Lake(tmp_path/"lake")

def ended(settings, seconds: float = 20) -> retraining.Retrain:
    until = time.monotonic() + seconds
    while (found := last(settings)).running and time.monotonic() < until: time.sleep(0.02)
    return found

def test_it_runs_on_its_own_with_its_reason(place):
    settings, lake = place
    assert last(settings) is None and not running(log_of(settings))
    asked = begin(settings, lake, "ann", "prices  moved\nby a fifth", command("print('the end')"))
    done = ended(settings)
    given, folder, named, own_session = json.loads(done.lines[0])
    assert given == ["--because", "prices moved by a fifth (asked for by ann)"] and folder == str(retraining.ROOT) and own_session
    assert named == str((settings.root/"settings.ini").resolve()) and done.lines[-1] == "the end" and not done.running
    assert (asked.who, asked.why) == ("ann", "prices  moved\nby a fifth") and timedelta(0) <= datetime.now(UTC) - done.at < timedelta(minutes=1)
    assert done.log == settings.root/".demo"/"retrain.log"
    retraining._begun[str(done.log)].wait(10)
    assert last(settings).code == 0

def test_there_is_one_at_a_time(place):
    settings, lake = place
    stop = settings.root/"stop"
    begin(settings, lake, "ann", "first", command(f"import pathlib, time\nwhile not pathlib.Path({str(stop)!r}).exists(): time.sleep(.02)"))
    assert running(log_of(settings)) and "under way" in refusal(settings)
    with pytest.raises(NotBegun, match="under way"): begin(settings, lake, "bob", "second", command("pass"))
    assert last(settings).who == "ann"
    stop.touch()
    assert not ended(settings).running and refusal(settings) == ""
    begin(settings, lake, "bob", "second", command("raise SystemExit(3)"))
    assert ended(settings).who == "bob" and "first" not in log_of(settings).read_text()

def test_it_outlives_the_app_and_is_seen_by_the_next_one(place):
    settings, _ = place
    stop = settings.root/"stop"
    app = f"""
from app.parts.monitoring.retraining import begin
from reco.data.lake import open_lake
from reco.settings import load_settings
s = load_settings()
begin(s, open_lake(s), 'ann', 'because', {command(f"import pathlib, time{chr(10)}while not pathlib.Path({str(stop)!r}).exists(): time.sleep(.02)")!r})
import os
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", app], check=True, cwd=retraining.ROOT, timeout=60)
    assert last(settings).running and last(settings).code is None # nobody here has started it
    stop.touch()
    assert not ended(settings).running

def test_one_that_is_killed_is_over(place):
    settings, lake = place
    begin(settings, lake, "", "because", command("import time; time.sleep(60)"))
    process = retraining._begun[str(log_of(settings))]
    until = time.monotonic() + 20
    while not last(settings).lines and time.monotonic() < until: time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    found = ended(settings)
    assert not found.running and found.code == -signal.SIGKILL and "nobody named" in found.lines[0]

def test_a_run_elsewhere_counts_for_as_long_as_it_may_take(place):
    settings, lake = place
    now = datetime.now(UTC)
    assert underway(lake, now) == ""
    claim(lake, now.date(), now, "77", "b1", "old")
    with pytest.raises(NotBegun, match="run 77 has had one in hand"): begin(settings, lake, "ann", "because", command("pass"))
    assert underway(lake, now + timedelta(hours=13)) == "" # it was killed
    settle(lake, now.date(), "77", "promoted")
    assert underway(lake, now) == "" and begin(settings, lake, "ann", "because", command("pass"))
    ended(settings)

def test_what_cannot_be_begun_says_why(place, monkeypatch):
    settings, lake = place
    with pytest.raises(NotBegun, match="Say why"): begin(settings, lake, "ann", "  ", command("pass"))
    with pytest.raises(NotBegun, match="could not be started"): begin(settings, lake, "ann", "because", ("/nowhere/python",))
    assert not running(log_of(settings))
    never = settings.model_copy(update={"monitor": settings.monitor.model_copy(update={"retrain": "never"})})
    assert "retrain = never" in refusal(never)
    monkeypatch.setattr(retraining, "find_spec", lambda _: None)
    assert "Metaflow is not installed" in refusal(settings)
    monkeypatch.setattr(retraining, "ROOT", settings.root)
    assert "flows are not on this machine" in refusal(settings)

def test_a_log_of_something_else_is_none(place):
    settings, _ = place
    log_of(settings).parent.mkdir()
    for text in (b"", b"\xff not a head\n", b"[1]\n", b'{"at": 1}\n', b"7"):
        log_of(settings).write_bytes(text)
        assert last(settings) is None

def test_the_command_is_the_flow(): # flags and all, as flows/monitor.py takes them
    assert (retraining.ROOT/retraining.COMMAND[1]).is_file() and retraining.COMMAND[2] == "run"
