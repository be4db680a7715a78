"""The lake: a write is whole or absent, counts once, and comes back in the platform's types."""

import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from deltalake import DeltaTable

from reco.data import lake as lake_module
from reco.data.lake import Lake, LakeError
from reco.schemas import CATALOG, INTERACTIONS, SchemaError, conform

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def log(ids: range) -> pl.DataFrame:
    return conform(
        pl.DataFrame(
            {
                "event_id": [str(i) for i in ids],
                "ts": [NOON + timedelta(hours=7 * i, milliseconds=i) for i in ids],
                "user_id": [f"u{i % 3}" for i in ids],
                "item_id": "café/1",
                "event": [("impression", "click", "view", "addtocart", "transaction")[i % 5] for i in ids],
                "quantity": [i if i % 2 else None for i in ids],
                "price": [i / 3 for i in ids],
            }
        ),
        INTERACTIONS,
    )


def write(lake: Lake, frame: pl.DataFrame) -> str:
    return lake.write("interactions", frame, key=["event_id"], day_of="ts")


def ids(lake: Lake, snapshot: str | None = None) -> list[int]:
    return sorted(lake.read("interactions", snapshot).select(pl.col("event_id").cast(pl.Int64)).collect()["event_id"])


def test_types_and_values_survive(tmp_path):
    lake, events = Lake(tmp_path / "lake"), log(range(40))
    write(lake, events)
    back = lake.read("interactions").collect()
    assert back.schema == pl.Schema(INTERACTIONS.columns) and back.sort("ts").equals(events.sort("ts"))
    catalog = conform(
        pl.DataFrame(
            {"item_id": ["a", "a"], "valid_from": [NOON, NOON + timedelta(milliseconds=1)], "available": [True, None]}
        ),
        CATALOG,
    )
    lake.write("catalog", catalog, key=["item_id", "valid_from"])
    assert lake.read("catalog").sort("valid_from").collect().equals(catalog)
    assert lake.read("interactions").collect_schema() == pl.Schema(INTERACTIONS.columns) and lake.tables() == [
        "catalog",
        "interactions",
    ]


def test_a_table_without_a_schema_keeps_its_own_day_and_gets_millisecond_times(tmp_path):
    lake, frame = Lake(tmp_path), pl.DataFrame({"id": ["a"], "day": ["monday"], "at": [NOON]})
    lake.write("served", frame, key=["id"])
    back = lake.read("served").collect()
    assert back["day"][0] == "monday" and back.schema["at"] == pl.Datetime("ms", "UTC")


def test_the_same_batch_again_adds_nothing_and_is_the_same_snapshot(tmp_path):
    lake = Lake(tmp_path)
    first = write(lake, log(range(20)))
    assert write(lake, log(range(20)).sample(fraction=1, shuffle=True)) == first == write(lake, log(range(5, 9)))
    second = write(lake, pl.concat([log(range(15, 25)), log(range(15, 25))]))
    assert (
        second != first
        and ids(lake) == list(range(25))
        and ids(lake, first) == list(range(20))
        and lake.snapshot("interactions") == second
    )


def test_batches_in_any_order_are_the_same_rows(tmp_path):
    batches = [range(10), range(5, 15), range(12, 30), range(3)]
    got = []
    for n in range(3):
        lake = Lake(tmp_path / str(n))
        for b in random.Random(n).sample(batches, len(batches)):
            write(lake, log(b))
        got.append(lake.read("interactions").collect().sort("event_id"))
    assert got[0].equals(got[1]) and got[1].equals(got[2]) and got[0].height == 30


def test_an_event_whose_time_was_mended_is_still_the_same_event(tmp_path):
    lake = Lake(tmp_path)
    first = write(lake, log(range(5)))
    assert write(lake, log(range(5)).with_columns(pl.col("ts") + timedelta(days=40))) == first


def test_what_is_not_there_is_named(tmp_path):
    lake = Lake(tmp_path / "lake")
    with pytest.raises(LakeError, match=r"no table 'interactions' in .*tables: none"):
        lake.read("interactions")
    first = write(lake, log(range(5)))
    for wrong in ("7-" + first.split("-")[1], "0-0000beef", "0", "newest", "-1-x"):
        with pytest.raises(LakeError, match="no snapshot"):
            lake.read("interactions", wrong)
    with pytest.raises(LakeError, match="not a table name"):
        lake.write("../x", log(range(2)), key=["event_id"])
    with pytest.raises(LakeError, match=r"nulls in key \['order_id'\]"):
        lake.write("orders", log(range(2)), key=["order_id"])
    with pytest.raises(SchemaError, match=r"missing columns: \['ts'\]"):
        write(lake, log(range(2)).drop("ts"))
    assert lake.tables() == ["interactions"] and lake.snapshot("interactions") == first
    assert [p.name for p in tmp_path.iterdir()] == ["lake"]


@pytest.mark.parametrize("first_write", [True, False])
def test_an_interrupted_write_leaves_the_former_snapshot(tmp_path, monkeypatch, first_write):
    """Stopped after the data files and before the commit: what was readable is readable, and writing again works."""
    lake = Lake(tmp_path)
    if not first_write:
        before = write(lake, log(range(10)))
    folder = tmp_path / "interactions" / "_delta_log"
    folder.mkdir(parents=True, exist_ok=True)
    blocked = folder / f"{0 if first_write else 1:020}.json"
    (folder.parent / "day=2026-05-01").mkdir(exist_ok=True)
    (folder.parent / "day=2026-05-01" / "half.parquet").write_bytes(b"PAR1")
    (folder / f"_commit_{blocked.name}.tmp").write_text('{"add":')
    if first_write:
        assert lake.tables() == []
        with pytest.raises(LakeError):
            lake.snapshot("interactions")
    else:
        assert lake.snapshot("interactions") == before and ids(lake) == list(range(10))
    write(lake, log(range(15)))
    assert ids(lake) == list(range(15))


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_lake import *
lake = Lake(sys.argv[1])
for b in range(200):
    write(lake, log(range(b*50, b*50 + 50)))
    print(b, flush=True)
"""


def start_writer(root) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(lake_module.Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_writer_killed_at_any_moment_leaves_whole_batches(tmp_path):
    """Killed three times in the middle of its work: every batch is there whole or not at all, and none that was reported is missing."""
    rnd, lake = random.Random(3), Lake(tmp_path)
    for _ in range(3):
        writer = start_writer(tmp_path)
        reported = int(writer.stdout.readline())
        time.sleep(rnd.uniform(0.05, 0.5))
        writer.send_signal(signal.SIGKILL)
        reported = max([reported, *(int(x) for x in writer.stdout.read().split())])
        writer.wait()
        writer.stdout.close()
        have = ids(lake)
        assert len(have) % 50 == 0 and have == list(range(len(have))) and len(have) >= 50 * (reported + 1)


def test_two_writers_with_the_same_batches_add_each_once(tmp_path):
    writers = [start_writer(tmp_path) for _ in range(2)]
    for w in writers:
        while (line := w.stdout.readline().strip()) != "15":
            assert line, "a writer stopped early"
    for w in writers:
        w.kill()
        w.wait()
        w.stdout.close()
    have = ids(Lake(tmp_path))
    assert have == list(range(len(have))) and len(have) >= 16 * 50


def test_a_writer_that_always_loses_says_so(tmp_path, monkeypatch):
    lake, lost = Lake(tmp_path), []
    before = write(lake, log(range(5)))

    def lose(*_):
        lost.append(1)
        raise lake_module.CommitFailedError("someone was faster")

    monkeypatch.setattr(DeltaTable, "merge", lambda *a, **k: lose())
    with pytest.raises(LakeError, match="5 tries"):
        write(lake, log(range(9)))
    assert len(lost) == lake_module.TRIES and lake.snapshot("interactions") == before
