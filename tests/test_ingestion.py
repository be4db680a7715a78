"""A batch is in the lake whole, once, and only if it passed the gate; whatever interrupts it, running it again completes it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from reco.data.ingestion import Ingested, ingest, last_batches
from reco.data.lake import Lake, LakeError
from reco.data.profile import described, merged
from reco.data.sources import read_source
from reco.schemas import CATALOG, INTERACTIONS, conform
from reco.settings import Limit, Quality

NOW = datetime(2026, 5, 2, tzinfo=UTC)
LOOSE = Quality(bad_share=Limit(value=0.2), range_share=Limit(value=0.2))


def events(n: int, start: int = 0, **columns) -> pl.DataFrame:
    ids = range(start, start + n)
    base = {"event_id": [f"e{i}" for i in ids], "ts": [NOW - timedelta(minutes=10 * (2_000 - i)) for i in ids],
            "user_id": [f"shopper-{i % 7}" for i in ids], "item_id": [f"i{i % 5}" for i in ids],
            "event": ["transaction" if i % 10 == 0 else "view" for i in ids], "price": 2.5}
    return conform(pl.DataFrame(base | columns), INTERACTIONS)


def items(price: float = 2.5) -> pl.DataFrame:
    rows = {"item_id": [f"i{i}" for i in range(5)], "valid_from": NOW - timedelta(days=90), "price": price}
    return conform(pl.DataFrame(rows), CATALOG)


def take(folder: Path, lake: Lake, log: pl.DataFrame, catalog: pl.DataFrame | None = None, quality: Quality = LOOSE) -> Ingested:
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    log.write_parquet(raw / "interactions.parquet")
    (items() if catalog is None else catalog).write_parquet(raw / "catalog.parquet")
    done = ingest("files", lambda _: read_source("files", raw), lake, NOW, quality, 30, folder / "scratch", 0.5)
    assert not any((folder / "scratch").iterdir())
    return done


def states(lake: Lake) -> dict[str, str]:
    return {t: lake.snapshot(t) for t in lake.tables()}


def test_good_rows_bad_rows_and_the_line(tmp_path):
    lake = Lake(tmp_path / "lake")
    done = take(tmp_path, lake, events(50, price=[-1.0 if i < 5 else 2.5 for i in range(50)]))
    assert done.refused == "" and lake.read("interactions").collect().height == 45
    bad = lake.read("quarantine").collect()
    assert bad["reason"].to_list() == ["negative price"] * 5 and set(bad["at"]) == {NOW}
    assert set(bad["user_id"]) <= {f"shopper-{i}" for i in range(7)} and json.loads(bad["record"][0])["price"] == -1.0
    [line] = last_batches(lake, "files", 9).rows(named=True)
    assert (line["rows"], line["good"], line["catalog"], line["users"]) == (50, 45, 5, 7)
    assert json.loads(line["mix"]) == {"transaction": 4, "view": 41}
    for table, snapshot in json.loads(line["snapshots"]).items(): assert lake.snapshot(table) == snapshot
    assert {r["constraint"] for r in json.loads(line["gate"])} >= {"bad_share", "duplicate_share", "bot_share", "event_mix", "good_rows"}


def test_the_profile_is_kept_adds_up_and_knows_no_shopper(tmp_path):
    lake = Lake(tmp_path / "lake")
    take(tmp_path, lake, events(30)), take(tmp_path, lake, events(20, start=30))
    profiles = last_batches(lake, "files", 9)["profile"].to_list()
    assert not any(b"shopper-" in p for p in profiles)
    both = described(merged(profiles)).filter(pl.col("column") == "user_id").row(0, named=True)
    assert (both["rows"], both["distinct"]) == (50, 7)


def test_a_refused_batch_changes_nothing_and_says_what_and_where(tmp_path):
    lake = Lake(tmp_path / "lake")
    done = take(tmp_path, lake, events(10, price=-1.0))
    assert "interactions refused" in done.refused and "range_share = 1 is over the limit 0.2" in done.refused
    assert "first interactions.parquet row 1" in done.refused and lake.tables() == [] and done.snapshots == {}
    take(tmp_path, lake, events(40))
    before = states(lake)
    assert take(tmp_path, lake, events(40, start=40), items(price=-1.0)).refused.startswith("catalog refused")
    assert states(lake) == before


def test_the_same_batch_again_in_another_order_is_no_new_state(tmp_path):
    lake = Lake(tmp_path / "lake")
    take(tmp_path, lake, events(40, price=[-1.0 if i == 3 else 2.5 for i in range(40)]))
    before = states(lake)
    assert take(tmp_path, lake, events(40, price=[-1.0 if i == 3 else 2.5 for i in range(40)])).refused == ""
    assert states(lake) == before
    take(tmp_path, lake, events(40, price=[-1.0 if i == 3 else 2.5 for i in range(40)]).reverse())
    after = states(lake)
    assert {t for t in after if after[t] != before[t]} <= {"quarantine"}, "a bad row has its place in the file in its id"


@pytest.mark.parametrize("stops_at", ["catalog", "interactions", "batches"])
def test_an_interrupted_batch_is_completed_by_the_next_run(tmp_path, monkeypatch, stops_at):
    lake, write = Lake(tmp_path / "lake"), Lake.write

    def stop(self, table, *args, **kwargs):
        if table == stops_at: raise LakeError("the disk is full")
        return write(self, table, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Lake, "write", stop)
        with pytest.raises(LakeError): take(tmp_path, lake, events(40))
    assert last_batches(lake, "files", 9).is_empty(), "a batch counts when its line is there"
    take(tmp_path, lake, events(40))
    assert lake.read("interactions").collect().height == 40 and last_batches(lake, "files", 9).height == 1


def test_a_corrected_price_replaces_the_wrong_one(tmp_path):
    lake = Lake(tmp_path / "lake")
    take(tmp_path, lake, events(40)), take(tmp_path, lake, events(40), items(price=3.0))
    assert lake.read("catalog").collect()["price"].to_list() == [3.0] * 5


def warned(done: Ingested) -> set[str]:
    return set(done.verdict.filter(~pl.col("passed"))["constraint"])


def test_a_batch_is_compared_with_those_before_it(tmp_path):
    lake = Lake(tmp_path / "lake")
    for day in range(3):
        done = take(tmp_path, lake, events(140, start=140 * day))
        assert warned(done) == set() and done.refused == ""
    quiet = events(140, start=500).filter(pl.int_range(pl.len()) % 5 == 0).with_columns(event=pl.lit("view", INTERACTIONS.columns["event"]))
    assert warned(take(tmp_path, lake, quiet)) == {"volume_fall"}
    sale = events(140, start=700, event=["transaction"] * 140)
    assert warned(take(tmp_path, lake, sale)) == {"event_mix"}
    strict = LOOSE.model_copy(update={"event_mix": Limit(value=0.2, severity="error")})
    assert "event_mix" in take(tmp_path, lake, events(140, start=900, event=["transaction"] * 140), quality=strict).refused


def test_strangers_bots_and_disorder_are_seen(tmp_path):
    lake, n = Lake(tmp_path / "lake"), 400
    log = events(n, item_id="ghost", user_id="robot", ts=[NOW - timedelta(minutes=30, seconds=i % 2) for i in range(n)])
    assert warned(take(tmp_path, lake, log)) == {"unknown_item_share", "bot_share"}
    log = events(n, ts=[NOW - timedelta(days=40, hours=3 * i) for i in range(n)])
    assert warned(take(tmp_path, lake, log)) == {"unordered_share", "volume_fall"}
