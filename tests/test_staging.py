"""Staging: what it does on disk is what a frame in memory would give, in any order, and nothing of it stays behind."""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.data.files import Batch, SourceError
from reco.data.quality import check_interactions, reasons
from reco.data.staging import (
    bad_rows,
    batch_id,
    even_sample,
    good_catalog,
    good_events,
    habits,
    per_day,
    reasons_of,
    rows_of,
    stage_batch,
    staging,
    summary,
)
from reco.schemas import CATALOG, EVENTS, INTERACTIONS

NOW = datetime(2026, 5, 2, tzinfo=UTC)
PLACES = {"file": pl.String, "unread": pl.String, "reason": pl.String}
NONE = pl.Series([], dtype=pl.String)


def placed(rows: list[dict], schema=INTERACTIONS) -> pl.LazyFrame:
    """Rows as a reader gives them."""
    frame = pl.DataFrame([dict.fromkeys([*schema.columns, *PLACES]) | r for r in rows], schema=schema.columns | PLACES)
    return frame.with_columns(file=pl.lit("f.csv")).with_row_index("row", 2).with_columns(pl.col("row").cast(pl.Int64)).lazy()


def catalog(*items: str) -> pl.LazyFrame:
    return placed([{"item_id": i, "valid_from": NOW} for i in items], CATALOG)


def event(i: int, **more) -> dict:
    base = {"event_id": f"e{i}", "ts": NOW - timedelta(hours=1), "user_id": "u", "item_id": "lamp", "event": "view"}
    return base | more


def visits(rows: list[dict], tmp_path: Path, gap: float = 30) -> pl.DataFrame:
    with staging(tmp_path, 0.5) as at:
        stage_batch(at, Batch(placed(rows), catalog("lamp")), NOW)
        return good_events(at, gap).collect()


messy = st.builds(
    event,
    st.integers(0, 12),
    ts=st.integers(-3000, 30).map(lambda m: NOW + timedelta(minutes=m)),
    user_id=st.sampled_from(["u1", "u2", "ü/3", "", None]),
    event=st.sampled_from([*EVENTS, None]),
    price=st.sampled_from([None, -1.0, 0.0, 9.5, float("nan")]),
    session_id=st.sampled_from([None, None, "s1"]),
    reason=st.sampled_from([None, None, None, "cancellation"]),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(messy, max_size=40))
def test_on_disk_and_in_memory_judge_alike(tmp_path_factory, rows):
    frame, folder = placed(rows), tmp_path_factory.mktemp("stage")
    memory = check_interactions(frame.collect(), NOW)
    with staging(folder, 0.5) as at:
        stage_batch(at, Batch(frame, catalog("lamp")), NOW)
        good, bad = good_events(at, 30).collect(), bad_rows(at, NOW).collect()
        why, counts = reasons_of(at), rows_of(at, "interactions")
    assert counts == (len(rows), memory.good.height)
    assert good.drop("session_id").sort("event_id").equals(memory.good.drop("session_id").sort("event_id"))
    assert bad.sort("row").equals(memory.bad.sort("row"))
    assert why.sort("reason").equals(reasons(memory.bad).select(why.columns).sort("reason"))
    assert not any(folder.iterdir())


def by_hand(rows: list[dict], gap: float) -> dict[str, str]:
    """Visits, one event after the other."""
    name, last, out = {}, {}, {}
    for r in sorted(rows, key=lambda r: (r["user_id"], r["ts"])):
        u = r["user_id"]
        if u not in last or r["ts"] - last[u] > timedelta(minutes=gap):
            name[u] = f"{u}@{round(r['ts'].timestamp() * 1000)}"
        last[u] = r["ts"]
        out[r["event_id"]] = name[u]
    return out


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-500, -1)), min_size=1, max_size=60), st.integers(1, 60))
def test_visits_are_those_of_a_loop_over_events(tmp_path_factory, moments, gap):
    rows = [event(i, user_id=u, ts=NOW + timedelta(minutes=m)) for i, (u, m) in enumerate(moments)]
    got = visits(random.Random(1).sample(rows, len(rows)), tmp_path_factory.mktemp("stage"), gap)
    assert dict(got.select("event_id", "session_id").iter_rows()) == by_hand(rows, gap)


def test_a_pause_must_be_longer_than_the_gap(tmp_path):
    rows = [event(i, ts=NOW - timedelta(hours=9) + timedelta(minutes=m)) for i, m in enumerate((0, 30, 61))]
    assert visits(rows, tmp_path).sort("event_id")["session_id"].rle_id().to_list() == [0, 0, 1]


def test_a_session_of_the_shop_is_kept_and_bridges_no_pause(tmp_path):
    rows = [
        event(i, session_id=s, ts=NOW - timedelta(hours=9) + timedelta(minutes=20 * i))
        for i, s in enumerate((None, "web-7", None))
    ]
    names = visits(rows, tmp_path).sort("event_id")["session_id"].to_list()
    assert names[1] == "web-7" and names[0] != names[2], "40 minutes lie between the two events without a session"


def staged(tmp_path: Path, rows: list[dict], items: pl.LazyFrame, known: pl.Series = NONE, bots: int = 300):
    with staging(tmp_path, 0.5) as at:
        stage_batch(at, Batch(placed(rows), items), NOW)
        good_events(at, 30), good_catalog(at)
        return habits(at, known, bots), summary(at).row(0, named=True), per_day(at), batch_id(at), even_sample(at, 10)


def test_habits_are_counted(tmp_path):
    rows = [event(i, item_id=("lamp", "bulb", "ghost", "ghost")[i % 4], user_id="bot" if i < 30 else f"u{i}") for i in range(40)]
    rows = [r | {"ts": NOW - timedelta(hours=3) + timedelta(seconds=10 * i if i != 20 else 0)} for i, r in enumerate(rows)]
    found, whole, days, _, sample = staged(tmp_path, rows, catalog("lamp"), pl.Series(["bulb"]), bots=29)
    assert found == {"unordered_share": 1 / 40, "unknown_item_share": 0.5, "bot_share": 0.75}
    assert (whole["rows"], whole["users"], whole["items"], whole["orders"]) == (40, 11, 3, 0)
    assert days["rows"].sum() == 40 and sample.height == 10 and sample.schema == pl.Schema(INTERACTIONS.columns)
    assert staged(tmp_path, rows, catalog("lamp"), pl.Series(["bulb"]), bots=30)[0]["bot_share"] == 0


def test_the_id_of_a_batch_is_its_content(tmp_path):
    rows = [event(i, price=float(i)) for i in range(20)]
    name = staged(tmp_path, rows, catalog("lamp", "bulb"))[3]
    assert staged(tmp_path, rows[::-1], catalog("bulb", "lamp"))[3] == name
    assert staged(tmp_path, rows, catalog("lamp"))[3] != name
    assert staged(tmp_path, [*rows[:-1], rows[-1] | {"price": 1.0}], catalog("lamp", "bulb"))[3] != name


def test_what_breaks_while_reading_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "f.csv").write_text("event_id\na\nb,c,d\n")
    broken = pl.scan_csv(tmp_path / "f.csv", infer_schema=False).select(
        *[pl.lit(None).cast(t).alias(c) for c, t in INTERACTIONS.columns.items() if c != "event_id"],
        *[pl.lit(None, pl.String).alias(c) for c in PLACES], "event_id", row=pl.lit(2))
    with pytest.raises(SourceError, match="interactions cannot be read"), staging(tmp_path / "scratch", 0.5) as at:
        stage_batch(at, Batch(broken, catalog("lamp")), NOW)
    assert not any((tmp_path / "scratch").iterdir())


def test_an_empty_batch_has_no_rows_and_no_shares(tmp_path):
    found, whole, days, _, sample = staged(tmp_path, [], catalog())
    assert set(found.values()) == {0.0} and whole["rows"] == 0 and days.is_empty() and sample.is_empty()
