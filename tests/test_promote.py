"""`flows/promote.py` as an operator runs it, and what it leaves behind: a publication, or a report that says why not."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import HARM, copied
from flow_runs import run_flow
from judging import made, said
from test_train import fill_lake

from reco.alerts import events
from reco.bundle import BundleError, UnknownBundle, current_name
from reco.challenger import challenger_name, kept_report, promote, set_challenger
from reco.published import HISTORY, history, publish, rollback

ROOT = Path(__file__).parents[1]
SETTINGS = "[gates]\nrequests = 10\nbuyers = 20\np50_ms = 5000\np99_ms = 20000\ntry_seconds = 200\n"


def test_a_good_challenger_is_published_once_and_a_damaged_one_never(trained, tmp_path):
    (tmp_path / "settings.ini").write_text(SETTINGS)
    lake, root = fill_lake(tmp_path, trained.sim), tmp_path / "data" / "bundles"
    about = said(trained, snapshots={t: lake.snapshot(t) for t in ("interactions", "catalog")})
    first = made(trained, root, about=about)
    set_challenger(root / first)
    done = run_flow(tmp_path, "promote")
    assert done.returncode == 0 and f"published {first}; before it was none" in done.stdout, done.stdout
    [line] = history(root)
    assert current_name(root) == first and line.who == "flows/promote.py" and line.why.startswith("all gates passed (run ")
    report = kept_report(root, first)
    assert report["passed"] and report["champion"] == "" and report["limits"]["requests"] == 10 and report["run"] in line.why
    assert len(report["gates"]) == 13 and sum("there is no champion" in g["what"] for g in report["gates"]) == 5
    assert next(g["value"] for g in report["gates"] if g["name"] == "offline equals online") == 0
    [card] = (tmp_path / ".metaflow").rglob("blank-*.html")
    assert card.stat().st_size > 10_000

    damaged = copied(root / first, "damaged", HARM["flipped"][0])
    publish(root / damaged, "ann", "by hand, in place of the first") # and then the run is resumed
    resumed = run_flow(tmp_path, "promote", "resume", "end")
    assert resumed.returncode == 0 and f"this run has published {first} before" in resumed.stdout, resumed.stdout
    assert current_name(root) == damaged and len(history(root)) == 2

    publish(root / first, "ann", "the other one was damaged")
    refused = run_flow(tmp_path, "promote", "run", "--bundle", damaged)
    assert refused.returncode == 1 and f"{damaged} is not promoted; {first} goes on:" in refused.stdout, refused.stdout
    assert f"can be judged: none, limit none: {damaged}: wrong checksum: ['known.npy']" in refused.stdout
    assert not kept_report(root, damaged)["passed"] and current_name(root) == first and len(history(root)) == 3
    assert [(e["what"], e["key"]) for e in events(root)] == [("bundle_published", f"bundle_published/{first}/{report['run']}"),
                                                             ("promotion_refused", f"promotion_refused/{damaged}/{first}/can be judged")]


# ---- what is told of a refusal --------------------------------------------------------------------------------------


def in_flows(folder: Path, code: str) -> None:
    """Run code beside the flows, with the settings of a folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECO_", "METAFLOW_"))}
    env = kept | {"RECO_SETTINGS": str(folder / "settings.ini"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "flows", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


REFUSALS = """
from types import SimpleNamespace
import polars as pl
from promote import PromoteFlow, refuse
from reco.evaluation.gates import gate

def ended(act, *args):
    try: act(*args)
    except SystemExit as e: return str(e)

coverage, gini = "coverage: 0.1, limit 0.2: few items", "gini: 0.9, limit 0.8: always the same"
for failed in ([coverage], [coverage.replace("0.1", "0.11")], [coverage, gini]): assert ended(refuse, "b", "a", failed).startswith("b is not promoted; a goes on:\\n  coverage: ")
passed = SimpleNamespace(report=gate("better", True, "it is"), challenger="b", champion="c")
assert "publication: b was judged against c, but a is served now" in ended(PromoteFlow._flow_cls.end, passed)
"""


def test_a_refusal_for_other_reasons_is_told(root):
    (root / "settings.ini").write_text("[bundles]\nroot = bundles\n[tracking]\nenabled = false\n")
    (root / "bundles").mkdir()
    for p in [p for p in root.iterdir() if p.name not in ("settings.ini", "bundles")]: p.rename(root / "bundles" / p.name)
    in_flows(root, REFUSALS)
    assert [(e["what"], e["key"]) for e in events(root / "bundles")] == [("promotion_refused", f"promotion_refused/{k}") for k in ("b/a/coverage", "b/a/coverage+gini", "b/c/publication")]
    assert "b was judged against c" in events(root / "bundles")[-1]["text"] and current_name(root / "bundles") == "a"


def test_a_challenger_whose_lake_is_gone_is_refused_and_that_is_told(tmp_path):
    (tmp_path / "settings.ini").write_text("")
    root = tmp_path / "data" / "bundles"
    (root / "b").mkdir(parents=True)
    (root / "b" / "manifest.json").write_text(json.dumps({"snapshots": {"interactions": "7", "catalog": "7"}}))
    set_challenger(root / "b")
    for _ in range(2):
        done = run_flow(tmp_path, "promote")
        assert done.returncode == 1 and "b is not promoted; nothing goes on:" in done.stdout and "cannot be read: no table 'interactions'" in done.stdout, done.stdout
    [event] = events(root)
    assert (event["what"], event["key"]) == ("promotion_refused", "promotion_refused/b//lake") and "train again" in event["text"]


LEAKS = """
import polars as pl
from train import stop_and_tell
from reco.ranking.alarms import LeakError, line
quiet, loud = line("shuffled labels", 0.1, 0.3), line("single feature planted", 0.99, 0.8)
stop_and_tell(quiet)
for _ in range(2):
    try: stop_and_tell(pl.concat([quiet, loud]))
    except LeakError: continue
    raise AssertionError("it went on")
"""


def test_a_training_that_a_leak_alarm_stopped_is_told(tmp_path):
    (tmp_path / "settings.ini").write_text("")
    in_flows(tmp_path, LEAKS)
    [event] = events(tmp_path / "data" / "bundles")
    assert event["what"] == "training_stopped" and "single feature planted: 0.99 is above 0.8" in event["text"] and event["about"] == {"alarms": 1}


# ---- the challenger and its publication ----------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three folders that pass for bundles; the first is served."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    publish(tmp_path / "a", "ann")
    return tmp_path


def test_the_challenger_is_a_bundle_that_is_there(root):
    assert challenger_name(root) == ""
    set_challenger(root / "b")
    with pytest.raises(UnknownBundle, match="no bundle 'z'"): set_challenger(root / "z")
    assert challenger_name(root) == "b" and current_name(root) == "a"
    assert not [p for p in root.iterdir() if p.name.startswith(".challenger")]


def test_a_resumed_run_publishes_nothing_twice(root):
    assert promote(root / "b", "a", "p", "passed", "7").before == "a"
    assert promote(root / "b", "a", "p", "passed", "7") is None and len(history(root)) == 2
    rollback(root, "ann", "no good", check=Path)
    assert promote(root / "b", "a", "p", "passed", "7") is None and current_name(root) == "a"
    assert promote(root / "b", "a", "p", "passed", "17").bundle_id == "b" # another run, not taken for 7
    publish(root / "c", "ann")
    assert promote(root / "b", "a", "p", "passed", "7") is None and current_name(root) == "c"


def test_a_stop_between_the_line_and_the_name_is_made_good(root):
    promote(root / "b", "a", "p", "passed", "7")
    (root / "current").write_text("a\n")
    assert promote(root / "b", "a", "p", "passed", "7").bundle_id == "b" and current_name(root) == "b"


def test_what_was_judged_against_another_champion_is_not_published(root):
    publish(root / "c", "ann")
    with pytest.raises(BundleError, match="b was judged against a, but c is served now"): promote(root / "b", "a", "p", "passed", "7")
    assert current_name(root) == "c" and promote(root / "c", "a", "p", "passed", "8") is None


def test_two_at_once_publish_one(root):
    with ThreadPoolExecutor(8) as pool: done = list(pool.map(lambda _: promote(root / "b", "a", "p", "passed", "7"), range(8)))
    assert sum(x is not None for x in done) == 1 and len((root / HISTORY).read_text().splitlines()) == 2


def test_a_report_that_cannot_be_read_is_named(root):
    assert kept_report(root, "a") is None
    (root / "gates").mkdir()
    (root / "gates" / "a.json").write_text('{"bundle": ')
    with pytest.raises(BundleError, match=r"a\.json: no readable report"): kept_report(root, "a")
    assert json.loads((root / "b" / "manifest.json").read_text()) == {}
