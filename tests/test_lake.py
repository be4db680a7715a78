"""The lake: a write is whole or absent, counts once, and comes back in the platform's types."""

import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from deltalake.exceptions import CommitFailedError

from reco.data import fresh, writing
from reco.data.lake import Lake, LakeError, views
from reco.data.storage import ROWS, commit, opened, parts, write_part
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
        [sys.executable, "-c", WRITER, str(root), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
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
        while (line := w.stdout.readline().strip()) != "9":
            assert line, "a writer stopped early"
    for w in writers:
        w.kill()
        w.wait()
        w.stdout.close()
    have = ids(Lake(tmp_path))
    assert have == list(range(len(have))) and len(have) >= 10 * 50


def refuse(*_):
    raise CommitFailedError("someone was faster")


def test_a_writer_that_always_loses_says_so(tmp_path, monkeypatch):
    lake = Lake(tmp_path)
    before = write(lake, log(range(5)))
    tried = []

    def lose(now, actions, marks):
        tried.append(now.version())
        commit(opened(lake, "interactions"), [], {ROWS: 1}) # somebody else is faster, each time
        refuse()

    monkeypatch.setattr(writing, "commit", lose)
    with pytest.raises(LakeError, match="50 tries"):
        write(lake, log(range(9)))
    assert len(tried) == writing.TRIES == len(set(tried)) and ids(lake) == ids(lake, before) == list(range(5))


def test_an_error_that_is_no_race_is_not_tried_again(tmp_path, monkeypatch):
    lake = Lake(tmp_path)
    write(lake, log(range(5)))
    monkeypatch.setattr(writing, "commit", refuse)
    with pytest.raises(CommitFailedError):
        write(lake, log(range(9)))
    assert ids(lake) == list(range(5))


def between(monkeypatch, act) -> list[int]:
    """Let `act` happen once, after a writer has looked and before it commits."""
    once = []

    def late(now, actions, marks):
        if not once:
            once.append(1)
            act()
        commit(now, actions, marks)

    monkeypatch.setattr(writing, "commit", late)
    return once


def test_a_key_that_came_while_a_writer_was_writing_is_there_once(tmp_path, monkeypatch):
    lake, other = Lake(tmp_path), Lake(tmp_path)
    write(lake, log(range(5)))
    theirs = log(range(8, 12)).with_columns(item_id=pl.lit("theirs"))
    happened = between(monkeypatch, lambda: write(other, theirs))
    write(lake, log(range(10)))
    assert happened and ids(lake) == list(range(12))
    first = lake.read("interactions").filter(pl.col("event_id").is_in(["8", "9"])).collect()
    assert first["item_id"].to_list() == ["theirs"] * 2  # the first commit of a key wins


def test_without_the_mark_the_key_would_be_there_twice(tmp_path, monkeypatch):
    """The check above can fail: this is Delta's own rule for two appends."""
    lake, other = Lake(tmp_path), Lake(tmp_path)
    write(lake, log(range(5)))
    happened = between(monkeypatch, lambda: write(other, log(range(8, 12))))
    careful = writing.commit
    monkeypatch.setattr(writing, "commit", lambda now, actions, marks: careful(now, actions, {}))
    write(lake, log(range(10)))
    assert happened and ids(lake) == sorted([*range(12), 8, 9])


def test_appends_that_share_no_key_keep_the_files_that_were_written(tmp_path, monkeypatch):
    lake, other, written = Lake(tmp_path), Lake(tmp_path), []
    write(lake, log(range(5)))
    between(monkeypatch, lambda: write(other, log(range(20, 22))))
    monkeypatch.setattr(writing, "write_part", lambda *a: written.append(1) or write_part(*a))
    write(lake, log(range(5, 10)))
    listed = parts(opened(lake, "interactions"))
    on_disk = {str(p.relative_to(tmp_path / "interactions")) for p in tmp_path.glob("interactions/*/*.parquet")}
    assert ids(lake) == [*range(10), 20, 21] and set(listed["path"]) == on_disk and len(written) == listed.height - 2


def test_two_first_writes_make_one_table(tmp_path, monkeypatch):
    lake, create = Lake(tmp_path), writing.create
    once = []

    def late(*args):
        if not once:
            once.append(1)
            write(Lake(tmp_path), log(range(5, 12)))
        create(*args)

    monkeypatch.setattr(writing, "create", late)
    write(lake, log(range(8)))
    assert ids(lake) == list(range(12))


RACE = """
import sys
sys.path.insert(0, sys.argv[2])
from test_lake import *
start = float(sys.argv[3])
for n in range(10):
    lake = Lake(f"{sys.argv[1]}/{n}")
    while time.time() < start + n/5: pass
    lake.write("notes", pl.DataFrame({"id": ["a", "b"]}), key=["id"])
"""


def test_first_writes_that_race_make_one_table(tmp_path):
    """Fails when the first commit may be retried: Delta then takes both."""
    args = [sys.executable, "-c", RACE, str(tmp_path), str(Path(__file__).parent), str(time.time() + 4)]
    racers = [subprocess.Popen(args) for _ in range(2)]
    assert [r.wait(60) for r in racers] == [0, 0]
    assert [Lake(tmp_path / str(n)).read("notes").collect().height for n in range(10)] == [2] * 10


CROWD = """
import sys
sys.path.insert(0, sys.argv[2])
from test_lake import *
lake, me = Lake(sys.argv[1]), int(sys.argv[3])
for b in random.Random(me).sample(range(10), 10): # all keys, in an order of its own, each batch half of the next
    write(lake, log(range(b*20, b*20 + 40)))
"""


def test_several_writers_of_overlapping_batches_add_each_key_once(tmp_path):
    """Nothing is shared but the folder: no lock that other machines would not see."""
    args = [sys.executable, "-c", CROWD, str(tmp_path), str(Path(__file__).parent)]
    crowd = [subprocess.Popen([*args, str(n)]) for n in range(3)]
    assert [w.wait(120) for w in crowd] == [0] * 3
    assert ids(Lake(tmp_path)) == list(range(220))
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("slices", [1, 7])
def test_a_lazy_batch_is_written_like_a_frame(tmp_path, monkeypatch, slices):
    batch = log(range(60))
    monkeypatch.setattr(fresh, "KEYS_AT_A_TIME", -(-60 // slices))
    monkeypatch.setattr(writing, "HELD_ROWS", 7)
    batch.write_parquet(tmp_path / "batch.parquet")
    lake = Lake(tmp_path / "lake")
    write(lake, log(range(20, 30)))
    second = lake.write("interactions", pl.scan_parquet(tmp_path / "batch.parquet"), key=["event_id"], day_of="ts")
    assert lake.read("interactions").sort("ts").collect().equals(batch)
    assert lake.write("interactions", pl.scan_parquet(tmp_path / "batch.parquet"), key=["event_id"], day_of="ts") == second
    assert second.startswith("1-")  # one commit


def test_a_lazy_batch_with_a_key_twice_or_a_wrong_value_changes_nothing(tmp_path):
    lake = Lake(tmp_path)
    before = write(lake, log(range(3)))
    with pytest.raises(LakeError, match=r"4 rows of one batch share their \['event_id'\]"):
        lake.write("interactions", pl.concat([log(range(9)), log(range(2))]).lazy(), key=["event_id"], day_of="ts")
    with pytest.raises(LakeError, match=r"nulls in key \['event_id'\]"):
        nulls = log(range(9)).with_columns(event_id=pl.lit(None, pl.String))
        lake.write("interactions", nulls.lazy(), key=["event_id"], day_of="ts")
    with pytest.raises(SchemaError, match=r"missing columns: \['ts'\]"):
        lake.write("interactions", log(range(9)).drop("ts").lazy(), key=["event_id"])
    with pytest.raises(SchemaError, match="event"):
        wrong = log(range(9)).with_columns(event=pl.lit("stare"))
        lake.write("interactions", wrong.lazy(), key=["event_id"], day_of="ts")
    assert lake.snapshot("interactions") == before and ids(lake) == list(range(3))
    assert len(list(tmp_path.glob("interactions/*/*.parquet"))) == parts(opened(lake, "interactions")).height


def test_around_days_looks_only_there(tmp_path):
    lake = Lake(tmp_path)
    first = write(lake, log(range(5)))
    moved = log(range(5)).with_columns(pl.col("ts") + timedelta(days=4))
    near = lambda n: lake.write("interactions", moved, key=["event_id"], day_of="ts", around_days=n)
    assert near(5) == first and near(None) == first
    far = log(range(5)).with_columns(pl.col("ts") + timedelta(days=40))
    lake.write("interactions", far, key=["event_id"], day_of="ts", around_days=1)
    assert ids(lake) == sorted([*range(5), *range(5)])  # the caller's promise was wrong: what he did not look for, he did not find


def test_replace_changes_what_differs_and_nothing_else(tmp_path, monkeypatch):
    lake, key = Lake(tmp_path), ["item_id", "valid_from"]
    catalog = conform(pl.DataFrame({"item_id": [f"i{n}" for n in range(6)], "valid_from": NOON, "price": 1.0}), CATALOG)
    put = lambda rows: lake.write("catalog", rows, key=key, replace=True)
    first = put(catalog)
    assert put(catalog) == first == lake.write("catalog", catalog.with_columns(price=pl.lit(9.0)), key=key)
    fixed = catalog.with_columns(price=pl.when(item_id="i2").then(None).otherwise("price"))
    more = pl.concat([fixed[2:4], fixed.head(1).with_columns(item_id=pl.lit("i9"))])
    between(monkeypatch, lambda: Lake(tmp_path).write("catalog", catalog.head(1).with_columns(item_id=pl.lit("i7")), key=key))
    second = put(more)
    want = pl.concat([fixed, more.tail(1), catalog.head(1).with_columns(item_id=pl.lit("i7"))]).sort("item_id")
    assert lake.read("catalog").sort("item_id").collect().equals(want) and put(more) == second
    assert lake.read("catalog", first).sort("item_id").collect().equals(catalog)


def test_a_table_gets_new_columns_and_refuses_other_types(tmp_path):
    lake = Lake(tmp_path)
    old = pl.DataFrame({"id": ["a"], "n": pl.Series([1], dtype=pl.UInt32)})
    lake.write("served", old, key=["id"])
    lake.write("served", old.with_columns(id=pl.lit("b"), at=pl.lit(NOON)), key=["id"], day_of="at")
    lake.write("served", old.with_columns(id=pl.lit("c")), key=["id"])
    back = lake.read("served").sort("id").collect()
    assert back["n"].to_list() == [1, 1, 1] and back["at"].to_list() == [None, NOON, None]
    with pytest.raises(LakeError, match="n is String, not Int64"):
        lake.write("served", pl.DataFrame({"id": ["d"], "n": ["x"]}), key=["id"])
    lake.write("interactions", log(range(3)), key=["event_id"], day_of="ts")
    with pytest.raises(LakeError, match="parted by.*day"):
        lake.write("interactions", log(range(9)), key=["event_id"])


def test_the_log_has_the_ranges_of_times_and_of_nothing_else(tmp_path):
    lake = Lake(tmp_path)
    events = log(range(60))
    write(lake, events)
    write(lake, log(range(60, 64)))
    text = "".join(p.read_text() for p in tmp_path.glob("interactions/_delta_log/*.json"))
    assert "minValues" in text and "u1" not in text
    adds = pl.DataFrame(opened(lake, "interactions").get_add_actions(flatten=True))
    assert [c for c in adds.columns if c.startswith("min.")] == ["min.ts"]
    assert adds["min.ts"].min() == events["ts"].min() and adds["num_records"].sum() == 64


def test_duckdb_sees_the_snapshot_and_not_the_folder(tmp_path):
    import duckdb

    lake = Lake(tmp_path)
    write(lake, log(range(30)))
    stray = next(tmp_path.glob("interactions/*/*.parquet"))
    stray.with_name("stray.parquet").write_bytes(stray.read_bytes())
    with duckdb.connect() as db:
        assert views(lake, db) == ["interactions"]
        query = "SELECT count(*), count(DISTINCT user_id) FROM interactions WHERE event = 'view'"
        count = lambda: db.sql(query).fetchall()[0]
        assert count() == (6, 3)
        write(lake, log(range(40)))
        assert count() == (6, 3)
        views(lake, db)
        assert count() == (8, 3)
        plan = db.sql("EXPLAIN SELECT item_id FROM interactions WHERE event = 'view'").fetchall()[0][1]
        assert "Filters" in plan or "filters" in plan
