"""Upkeep: nothing that counts is lost, nothing that was to go is left, beside writers and after a kill."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from deltalake import write_deltalake
from deltalake.exceptions import CommitFailedError
from flow_runs import run_flow
from test_lake import CROWD, NOON, ids, log, start_writer, write

from app import erase as command
from reco.data import upkeep as upkeep_module
from reco.data import writing
from reco.data.lake import Lake
from reco.data.storage import OLDEST, LakeError, commit, opened, parts, write_part
from reco.data.upkeep import MARGIN, compact, erase, remove, retain_rows, sweep, upkeep
from reco.features.store import StoreError, open_store
from reco.settings import Lake as LakeSection
from reco.settings import load_settings

LATER = NOON + timedelta(days=400)


def filled(root: Path, events: int = 60, step: int = 4) -> Lake:
    """A lake of many small files."""
    lake = Lake(root)
    for n in range(0, events, step): write(lake, log(range(n, n + step)))
    return lake


def quarantine(lake: Lake, n: int) -> None:
    rows = pl.DataFrame({"row": range(n), "user_id": [f"u{i % 3}" if i % 4 else None for i in range(n)],
                         "record": [json.dumps({"user_id": f"u{i % 3}"}) if i % 4 else "{}" for i in range(n)],
                         "at": [NOON + timedelta(days=i) for i in range(n)]})
    lake.write("quarantine", rows, key=["row"], day_of="at")


def on_disk(lake: Lake, table: str) -> set[str]:
    return {str(p.relative_to(lake.root / table)) for p in (lake.root / table).rglob("*.parquet") if "_delta_log" not in p.parts}


def who_holds(lake: Lake, user: str) -> list[str]:
    """Every file under the root that has the id: as bytes, and inside what Parquet compresses, the log's checkpoints included."""
    found = []
    for path in lake.root.rglob("*"):
        if not path.is_file() or path.stat().st_size < 12: continue  # begun by a process that was killed: nothing is in it
        if user.encode() in path.read_bytes() or user in path.name: found.append(path.name)
        elif path.suffix == ".parquet" and user in str(pl.read_parquet(path, hive_partitioning=False).to_dict(as_series=False)):
            found.append(path.name)
    return found


# Compaction

def test_compaction_keeps_every_row_and_every_snapshot(tmp_path):
    lake = filled(tmp_path)
    before = [lake.read("interactions", s).sort("ts").collect() for s in snapshots(lake)]
    small = parts(opened(lake, "interactions")).height
    gone = compact(lake, "interactions")
    files = parts(opened(lake, "interactions"))
    assert gone > 0 and files.height < small and files["day"].n_unique() == files.height
    assert [lake.read("interactions", s).sort("ts").collect().equals(b) for s, b in zip(snapshots(lake), before, strict=False)]
    assert lake.read("interactions").sort("ts").collect().equals(log(range(60)))
    assert compact(lake, "interactions") == 0 and lake.snapshot("interactions") == snapshots(lake)[-1]


def snapshots(lake: Lake) -> list[str]:
    number, _, of = lake.snapshot("interactions").partition("-")
    return [f"{n}-{of}" for n in range(int(number) + 1)]


def test_files_are_filled_and_large_ones_left_alone(tmp_path):
    lake = Lake(tmp_path)
    same_day = lambda n, m: log(range(n, m)).with_columns(ts=NOON)
    write(lake, same_day(0, 30))
    for n in range(30, 60, 3): write(lake, same_day(n, n + 3))
    large = parts(opened(lake, "interactions")).filter(pl.col("rows") == 30)["path"].item()
    compact(lake, "interactions", big=20)
    rows = parts(opened(lake, "interactions"))
    assert large in rows["path"] and rows["rows"].sum() == 60 and 3 <= rows.height <= 5 and ids(lake) == list(range(60))


def test_compaction_beside_writers_loses_and_repeats_nothing(tmp_path):
    args = [sys.executable, "-c", CROWD, str(tmp_path), str(Path(__file__).parent)]
    crowd, lake, runs = [subprocess.Popen([*args, str(n)]) for n in range(2)], Lake(tmp_path), 0
    while any(w.poll() is None for w in crowd):
        if lake.tables():
            compact(lake, "interactions")
            runs += 1
    assert [w.returncode for w in crowd] == [0, 0] and runs >= 2 and ids(lake) == list(range(220))


def test_a_compaction_that_meets_another_looks_again_and_leaves_no_file(tmp_path, monkeypatch):
    lake, met = filled(tmp_path), []

    def late(now, actions, marks):
        if not met:
            met.append(1)
            monkeypatch.setattr(upkeep_module, "commit", commit)
            compact(Lake(tmp_path), "interactions")
        commit(now, actions, marks)

    monkeypatch.setattr(upkeep_module, "commit", late)
    before = on_disk(lake, "interactions")
    assert compact(lake, "interactions") == 0 and met and ids(lake) == list(range(60))
    assert on_disk(lake, "interactions") - before == set(parts(opened(lake, "interactions"))["path"]) - before


def test_without_the_mark_two_compactions_would_repeat_every_row(tmp_path, monkeypatch):
    """The check above can fail."""
    lake, met = filled(tmp_path), []

    def late(now, actions, marks):
        if not met:
            met.append(1)
            compact(Lake(tmp_path), "interactions")
        commit(now, actions, {})

    monkeypatch.setattr(upkeep_module, "commit", late)
    compact(lake, "interactions")
    assert len(ids(lake)) > 60


def test_a_job_that_always_loses_says_so(tmp_path, monkeypatch):
    lake = filled(tmp_path, 12)

    def lose(*_): raise CommitFailedError("someone was faster")

    monkeypatch.setattr(upkeep_module, "commit", lose)
    with pytest.raises(LakeError, match="interactions: 10 tries"): compact(lake, "interactions")
    assert ids(lake) == list(range(12)) and on_disk(lake, "interactions") == set(parts(opened(lake, "interactions"))["path"])


# Retention

def test_rows_go_by_their_time_and_not_before(tmp_path):
    lake = filled(tmp_path)
    quarantine(lake, 20)
    lake.write("catalog_notes", pl.DataFrame({"item_id": ["a"]}), key=["item_id"])
    now = NOON + timedelta(days=12)
    section = LakeSection(keep_events_days=2, keep_quarantine_days=5)
    events, bad = log(range(60)), lake.read("quarantine").collect()
    left = events.filter(pl.col("ts") >= now - timedelta(days=2))
    assert 0 < left.height < 60
    gone = retain_rows(lake, section, now)
    assert gone == {"interactions": 60 - left.height, "quarantine": 7}
    assert lake.read("interactions").sort("ts").collect().equals(left)
    assert lake.read("quarantine").sort("row").collect().equals(bad.sort("row")[7:])
    assert set(retain_rows(lake, section, now).values()) == {0}
    assert retain_rows(lake, LakeSection(keep_quarantine_days=0), LATER) == {}


def test_old_snapshots_go_and_are_said_to_be_gone(tmp_path):
    lake = filled(tmp_path)
    old = snapshots(lake)
    compact(lake, "interactions")
    today = datetime.now(UTC)
    assert sweep(lake, "interactions", timedelta(days=30), today) == 0 == sweep(lake, "interactions", timedelta(0), today)
    assert ids(lake, old[3]) == list(range(16))
    assert sweep(lake, "interactions", timedelta(days=30), today + timedelta(days=40)) > 0
    newest = lake.snapshot("interactions")
    for snapshot in old:
        with pytest.raises(LakeError, match=r"was removed by retention or by an erasure \(oldest: \d+-"): lake.read("interactions", snapshot)
    assert ids(lake) == ids(lake, newest) == list(range(60))
    assert on_disk(lake, "interactions") == set(parts(opened(lake, "interactions"))["path"])
    oldest = opened(lake, "interactions").transaction_version(OLDEST)
    commits = sorted(int(p.stem) for p in (tmp_path / "interactions" / "_delta_log").glob("*.json") if p.stem.isdigit())
    assert commits[0] == oldest and ids(lake, f"{oldest}-{newest.partition('-')[2]}") == list(range(60))
    with pytest.raises(LakeError, match="no snapshot"): lake.read("interactions", "0-0000beef")
    write(lake, log(range(70)))
    assert ids(lake) == list(range(70)) and sweep(lake, "interactions", timedelta(days=30), today + timedelta(days=40)) == 0


def test_a_snapshot_that_is_kept_stays_readable(tmp_path):
    """Snapshots a day apart: what was newest at the limit is whole, with files that are long not listed any more."""
    lake = filled(tmp_path, 20)
    day = lambda n: datetime.now(UTC) - timedelta(days=n)
    log_folder = tmp_path / "interactions" / "_delta_log"
    for n in range(5): os.utime(log_folder / f"{n:020}.json", (day(60 - n).timestamp(),) * 2)
    for path in on_disk(lake, "interactions"): os.utime(tmp_path / "interactions" / path, (day(60).timestamp(),) * 2)
    remove(lake, "interactions", pl.col("user_id") == "u1")
    sweep(lake, "interactions", timedelta(days=30), datetime.now(UTC))
    kept = snapshots(lake)
    assert ids(lake, kept[4]) == list(range(20)) and ids(lake, kept[5]) == [i for i in range(20) if i % 3 != 1]
    with pytest.raises(LakeError, match=f"oldest: {kept[4]}"): lake.read("interactions", kept[3])


def test_what_killed_writers_left_goes_and_what_a_writer_is_writing_stays(tmp_path):
    lake = filled(tmp_path, 12)
    table = tmp_path / "interactions"
    frame = lake.read("interactions").with_columns(pl.col("ts").cast(pl.Datetime("us", "UTC")), pl.col("event").cast(pl.String)).collect()
    left, working = (table / write_part(lake, "interactions", frame, "2026-05-01").path for _ in range(2))
    half, scrap = table / "day=2026-05-01" / "half.parquet", table / "_delta_log" / "_commit_x.json.tmp"
    half.write_bytes(b"PAR1")
    scrap.write_text("{")
    for path in (left, half, scrap): os.utime(path, ((datetime.now(UTC) - 2*MARGIN - timedelta(hours=1)).timestamp(),) * 2)
    assert sweep(lake, "interactions", timedelta(0), datetime.now(UTC)) == 3
    assert working.exists() and not any(p.exists() for p in (left, half, scrap)) and ids(lake) == list(range(12))


def test_all_of_upkeep_and_its_table(tmp_path):
    lake = filled(tmp_path)
    quarantine(lake, 8)
    done = upkeep(lake, LakeSection(keep_quarantine_days=3), NOON + timedelta(days=5))
    rows = {r["table"]: r for r in done.rows(named=True)}
    assert set(rows) == {"interactions", "quarantine"} and rows["quarantine"]["rows_removed"] == 2
    assert done["bytes_before"].min() > 0 and ids(lake) == list(range(60))
    later = upkeep(lake, LakeSection(keep_quarantine_days=0), datetime.now(UTC) + timedelta(days=99))
    kept = {t: parts(opened(lake, t)).height for t in rows}
    assert {r["table"]: r["files_after"] for r in later.rows(named=True)} == kept
    assert later["files_after"].sum() < later["files_before"].sum() and later["bytes_after"].sum() < later["bytes_before"].sum()
    assert upkeep(Lake(tmp_path / "none"), LakeSection(), LATER).is_empty()


# Erasure

def test_nothing_of_an_erased_user_is_left_anywhere(tmp_path):
    lake = Lake(tmp_path)
    name = "shopper-7f3a"
    mine = lambda n, m: log(range(n, m)).with_columns(user_id=pl.when(pl.col("user_id") == "u1").then(pl.lit(name)).otherwise("user_id"))
    for n in range(0, 60, 4): write(lake, mine(n, n + 4))
    bad = pl.DataFrame({"row": [1, 2], "user_id": [name, "u2"], "record": [json.dumps({"user_id": name}), "{}"], "at": NOON})
    lake.write("quarantine", bad, key=["row"], day_of="at")
    lake.write("catalog_notes", pl.DataFrame({"item_id": ["a"]}), key=["item_id"])
    compact(lake, "interactions")
    write(lake, mine(60, 64))
    write_part(lake, "quarantine", bad.drop("at").with_columns(at=pl.lit(NOON)), "2026-05-01")  # a killed writer's
    first, want = snapshots(lake)[0], lake.read("interactions").filter(pl.col("user_id") != name).sort("ts").collect()
    assert who_holds(lake, name)
    done = erase(lake, [name, name], LATER)
    assert dict(done.rows()) == {"interactions": 64 - want.height, "quarantine": 1}
    assert who_holds(lake, name) == [] and lake.read("interactions").sort("ts").collect().equals(want)
    assert lake.read("quarantine").collect()["row"].to_list() == [2]
    with pytest.raises(LakeError, match="removed by retention or by an erasure"): lake.read("interactions", first)
    assert dict(erase(lake, [name], LATER + timedelta(hours=1)).rows()) == {"interactions": 0, "quarantine": 0}
    hashed = lake.read("erased").collect()
    plain = {hashlib.sha256(name.encode()).hexdigest(), name}
    assert hashed.height == 2 and hashed["digest"].n_unique() == 1 and not plain & {*hashed["digest"]}


def test_an_old_file_does_not_bring_the_user_back_and_new_events_come(tmp_path):
    lake = Lake(tmp_path)
    write(lake, log(range(30)))
    at = NOON + timedelta(hours=7*20)  # between events 19 and 21
    erase(lake, ["u1"], at)
    for form in (log(range(30)), log(range(30)).lazy()):
        lake.write("interactions", form, key=["event_id"], day_of="ts")
        assert ids(lake) == [i for i in range(30) if i % 3 != 1 or i > 20]
    quarantine(lake, 6)
    assert "u1" not in lake.read("quarantine").collect()["user_id"]
    unknown = log(range(40, 44)).with_columns(user_id=pl.lit(None, pl.String))
    write(lake, unknown)
    assert set(ids(lake)) >= {40, 43}


def erase_before_the_next_commit(root, monkeypatch, met: list) -> None:
    """Between a writer's look at the lake and its commit, u1 is erased, once."""

    def late(now, actions, marks):
        if not met:
            met.append(1)
            erase(Lake(root), ["u1"], LATER)
        commit(now, actions, marks)

    monkeypatch.setattr(writing, "commit", late)


def test_a_writer_that_had_looked_before_the_erasure_cannot_bring_the_user_back(tmp_path, monkeypatch):
    lake, met = Lake(tmp_path), []
    write(lake, log(range(6)))
    erase_before_the_next_commit(tmp_path, monkeypatch, met)
    write(lake, log(range(30)))
    assert met and ids(lake) == [i for i in range(30) if i % 3 != 1] and who_holds(lake, "u1") == []


def test_without_the_fence_such_a_writer_would(tmp_path, monkeypatch):
    """The check above can fail."""
    monkeypatch.setattr(upkeep_module, "_note", lambda *_: None)
    monkeypatch.setattr(upkeep_module, "_delete_old", lambda *_: None)
    lake, met = Lake(tmp_path), []
    write(lake, log(range(0, 6, 3)))  # nobody to erase yet: no commit would be in the way
    erase_before_the_next_commit(tmp_path, monkeypatch, met)
    write(lake, log(range(6)))
    assert met and "u1" in lake.read("interactions").collect()["user_id"]


def test_erasure_beside_writers(tmp_path):
    """Two writers go on while a user is erased: the rest is complete, the user is gone for good."""
    writers, lake = [start_writer(tmp_path) for _ in range(2)], Lake(tmp_path)
    for w in writers: w.stdout.readline()
    erase(lake, ["u1"], LATER)
    reported = [int(w.stdout.readline()) for w in writers for _ in range(3)][-1]
    for w in writers: w.kill()
    rest = [[int(x) for x in w.stdout.read().split()] for w in writers]
    for w in writers:
        w.wait()
        w.stdout.close()
    last = max([reported, *(x for r in rest for x in r)])
    have = ids(lake)
    assert len(set(have)) == len(have) and set(have) >= {i for i in range(50*last + 50) if i % 3 != 1}
    erase(lake, [], LATER)
    assert not {i for i in have if i % 3 == 1} and "u1" not in lake.read("interactions").collect()["user_id"]


ERASER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_upkeep import *
print("go", flush=True)
erase(Lake(sys.argv[1]), ["u1"], LATER)
"""


@pytest.mark.parametrize("step", ["_mark", "remove", "delete_file"])
def test_an_erasure_killed_at_any_step_is_finished_by_the_next(tmp_path, step):
    """Killed (SIGKILL, by itself, so that the moment is exact) right after each step's first call."""
    lake = filled(tmp_path, 40)
    quarantine(lake, 9)
    kill = "import os, signal\n" + (
        f"real = upkeep_module.{step}\n"
        f"def {step}(*a):\n    real(*a)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"upkeep_module.{step} = {step}\n" if step != "delete_file" else
        "from pyarrow.fs import SubTreeFileSystem\n"
        "class Deadly(SubTreeFileSystem):\n"
        "    def delete_file(self, path):\n        super().delete_file(path)\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "from reco.data import storage\nstorage.SubTreeFileSystem = Deadly\n")
    code = ERASER.replace('print("go"', kill + 'print("go"')
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and "go" in done.stdout, done.stderr
    write(lake, log(range(40)))
    erase(lake, ["u1"], LATER)
    assert who_holds(lake, "u1") == [] and ids(lake) == [i for i in range(40) if i % 3 != 1]


def test_an_erasure_killed_at_a_random_moment(tmp_path):
    lake = filled(tmp_path, 40)
    for wait in (0.02, 0.1):
        eraser = subprocess.Popen([sys.executable, "-c", ERASER, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE)
        eraser.stdout.readline()
        time.sleep(wait)
        eraser.kill()
        eraser.wait()
        eraser.stdout.close()
        assert set(ids(lake)) >= {i for i in range(40) if i % 3 != 1}
    erase(lake, ["u1"], LATER)
    assert who_holds(lake, "u1") == [] and ids(lake) == [i for i in range(40) if i % 3 != 1]


def test_a_log_that_another_tool_wrote_ids_into_is_cut(tmp_path):
    """Statistics of a table from before, or from another tool, name users; the erased one's entries go."""
    rows = log(range(12)).with_columns(pl.col("ts").cast(pl.Datetime("us", "UTC")), pl.col("event").cast(pl.String), day=pl.col("ts").dt.date())
    name = 'u"1é'
    rows = rows.with_columns(user_id=pl.when(pl.col("user_id") == "u1").then(pl.lit(name)).otherwise("user_id"))
    write_deltalake(str(tmp_path / "interactions"), rows.to_arrow(), partition_by=["day"])
    lake = Lake(tmp_path)
    assert ids(lake) == list(range(12)) and write(lake, log(range(3))) == lake.snapshot("interactions")
    text = lambda: "".join(p.read_text() for p in tmp_path.glob("interactions/_delta_log/*.json"))
    assert "u\\" in text()
    assert dict(erase(lake, [name], LATER).rows()) == {"interactions": 4}
    assert "u\\" not in text() and who_holds(lake, name) == [] and len(ids(lake)) == 8
    write(lake, log(range(30)).filter(pl.col("user_id") != "u1"))
    assert len(ids(lake)) == 20


# The command

@pytest.fixture
def shop(tmp_path, monkeypatch) -> Lake:
    (tmp_path / "settings.ini").write_text("[lake]\nroot = lake\n")
    monkeypatch.chdir(tmp_path)
    lake = Lake(tmp_path / "lake")
    write(lake, log(range(12)))
    return lake


def test_the_command_says_what_it_removed(shop, capsys):
    """With the embedded Redis, as it comes."""
    store = open_store(load_settings())
    try:
        store.client.set("warm", 1)
        assert command.main(["u1", "nobody"]) == 0
        said = capsys.readouterr().out
        assert "lake: 4 rows of interactions" in said and "online store: 0 of 2 users" in said and who_holds(shop, "u1") == []
        assert command.main(["u1"]) == 0 and "lake: 0 rows of interactions" in capsys.readouterr().out
    finally:
        store.client.shutdown(nosave=True)


def test_the_command_refuses_what_is_no_id_and_says_when_it_failed(shop, capsys, monkeypatch):
    for wrong in ([], ["u1", " "]):
        with pytest.raises(SystemExit) as left: command.main(wrong)
        assert left.value.code == 2
    assert len(ids(shop)) == 12

    def down(*_): raise StoreError("the online store is down")

    monkeypatch.setattr(command, "erase_online", down)
    assert command.main(["u1"]) == 1
    assert "run it again: the online store is down" in capsys.readouterr().err and who_holds(shop, "u1") == []


def test_the_flow_does_it_all_and_keeps_no_key(tmp_path):
    secret = "hush-hush-key"
    (tmp_path / "settings.ini").write_text(f"[lake]\nroot = lake\nsecret_key = {secret}\nkeep_quarantine_days = 30\n[bundles]\nroot = bundles\nkeep = 1\n[experiments]\nfile = e.toml\n")
    names = a, b, c = [f"2026-05-0{n}T000000Z-{n:08x}" for n in (1, 2, 3)]
    (tmp_path / "e.toml").write_text(f'holdout = 0.1\nholdout_serve = "{a}"\n')
    for name in names:
        (tmp_path / "bundles" / name).mkdir(parents=True)
        (tmp_path / "bundles" / name / "manifest.json").write_text("{}")
        os.utime(tmp_path / "bundles" / name, (1, 1))
    lake = filled(tmp_path / "lake", 24)
    quarantine(lake, 3)
    done = run_flow(tmp_path, "upkeep")
    assert done.returncode == 0, done.stdout
    assert "3 rows were too old" in done.stdout and ids(lake) == list(range(24)) and lake.read("quarantine").collect().is_empty()
    assert sorted(p.name for p in (tmp_path / "bundles").iterdir() if p.is_dir()) == [a, c] and f"bundles removed: {b};" in done.stdout # a is in an experiment
    assert len(list((tmp_path / ".metaflow").rglob("*.html"))) == 1
    kept = [p for p in (tmp_path / ".metaflow").rglob("*") if p.is_file()]
    read = lambda p: gzip.decompress(p.read_bytes()) if p.read_bytes()[:2] == b"\x1f\x8b" else p.read_bytes()
    assert not [p for p in kept if secret.encode() in read(p)]
    (tmp_path / "e.toml").write_text("holdout = 2\n")
    assert "no bundle was removed: " in (again := run_flow(tmp_path, "upkeep")).stdout and again.returncode == 0
