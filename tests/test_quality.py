"""Judging: every row in exactly one place, with the right reason, and a bad batch refused by name."""

import json
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from reco.data.quality import (
    BatchRefused,
    accept,
    catalog_rules,
    check_catalog,
    check_interactions,
    interaction_rules,
    per_day,
    reasons,
    summary,
)
from reco.data.sources import gather, read_source
from reco.schemas import CATALOG, INTERACTIONS, SchemaError, conform

NOW = datetime(2026, 5, 2, tzinfo=UTC)


def placed(frame: pl.DataFrame, unread: list[str | None] | None = None) -> pl.DataFrame:
    return frame.with_columns(
        pl.Series("unread", unread or [None] * frame.height, dtype=pl.String), file=pl.lit("f.csv")
    ).with_row_index("row", 2)


def events(n: int = 1, **columns) -> pl.DataFrame:
    good = {
        "event_id": [f"e{i}" for i in range(n)],
        "ts": NOW - timedelta(hours=1),
        "user_id": "u",
        "item_id": "i",
        "event": "view",
    }
    return conform(pl.DataFrame(good | columns), INTERACTIONS)


def catalog(n: int = 1, **columns) -> pl.DataFrame:
    return conform(pl.DataFrame({"item_id": [f"i{i}" for i in range(n)], "valid_from": NOW} | columns), CATALOG)


BAD_EVENTS = [
    ({"user_id": None}, "null user_id"),
    ({"user_id": ""}, "null user_id"),
    ({"item_id": None}, "null item_id"),
    ({"ts": None}, "null ts"),
    ({"event": None}, "null event"),
    ({"event_id": [None]}, "null event_id"),
    ({"ts": NOW + timedelta(milliseconds=1)}, "ts in the future"),
    ({"ts": datetime(1999, 12, 31, 23, 59, tzinfo=UTC)}, "ts before 2000"),
    ({"price": -0.01}, "negative price"),
    ({"price": float("nan")}, "negative price"),
    ({"price": float("inf")}, "negative price"),
    ({"quantity": 0}, "quantity below 1"),
    ({"quantity": -2}, "quantity below 1"),
]
BAD_ITEMS = [
    ({"item_id": [None]}, "null item_id"),
    ({"valid_from": None}, "null valid_from"),
    ({"price": -1.0}, "negative price"),
    ({"discount": 1.2}, "discount outside 0 to 1"),
    ({"margin": -0.1}, "margin outside 0 to 1"),
    ({"valid_from": datetime(1970, 1, 1, tzinfo=UTC)}, "valid_from before 2000"),
]


@pytest.mark.parametrize("columns, reason", BAD_EVENTS)
def test_a_bad_event_has_its_reason_and_its_place(columns, reason):
    checked = check_interactions(placed(events(**columns)), NOW)
    assert (
        checked.bad.select("table", "file", "row", "reason").rows() == [("interactions", "f.csv", 2, reason)]
        and checked.good.is_empty()
    )


@pytest.mark.parametrize("columns, reason", BAD_ITEMS)
def test_a_bad_catalogue_row_has_its_reason(columns, reason):
    checked = check_catalog(placed(catalog(**columns)))
    assert checked.bad.select("table", "reason").rows() == [("catalog", reason)] and checked.good.is_empty()


@pytest.mark.parametrize(
    "columns", [{}, {"ts": NOW}, {"ts": datetime(2000, 1, 1, tzinfo=UTC)}, {"price": 0.0}, {"quantity": 1}]
)
def test_the_edges_of_the_rules_are_good(columns):
    assert check_interactions(placed(events(**columns)), NOW).bad.is_empty()


def test_the_edges_of_the_catalogues_rules_are_good():
    assert check_catalog(
        placed(catalog(3, discount=[0.0, 1.0, None], valid_from=NOW + timedelta(days=9)))
    ).bad.is_empty()


def test_every_rule_has_a_case_above():
    cases = {r for _, r in BAD_EVENTS + BAD_ITEMS} | {"unknown event", "unreadable value"}
    assert set(interaction_rules(NOW)) | set(catalog_rules()) == cases


def test_what_could_not_be_read_is_kept():
    unread = ["event='wishlist'", "ts='soon'", "price='n/a'", None]
    checked = check_interactions(placed(events(4, event=[None, "view", "view", "view"]), unread), NOW)
    assert checked.bad["reason"].to_list() == ["unknown event", "unreadable value", "unreadable value"]
    assert [json.loads(r)["unread"] for r in checked.bad["record"]] == unread[:3] and checked.good.height == 1


def test_of_rows_with_one_id_the_first_good_one_stays():
    checked = check_interactions(placed(events(4, event_id=["a", "a", "a", "b"], price=[-1.0, 1.0, 2.0, 3.0])), NOW)
    assert checked.good["price"].to_list() == [1.0, 3.0]
    assert checked.bad.select("row", "reason").rows() == [(2, "negative price"), (4, "duplicate event_id")]
    two = check_catalog(placed(catalog(3, item_id=["a", "a", "b"])))
    assert two.bad["reason"].to_list() == ["duplicate item_id, valid_from"] and two.good.height == 2


def test_every_row_is_in_one_place_and_good_rows_are_untouched():
    frame = events(
        60,
        price=[(-1.0 if i % 7 == 0 else i) for i in range(60)],
        user_id=[None if i % 5 == 0 else "u" for i in range(60)],
        event_id=[f"e{i // 2}" if i % 11 == 0 else f"x{i}" for i in range(60)],
    )
    checked = check_interactions(placed(frame), NOW)
    assert checked.good.height + checked.bad.height == 60 and checked.good.schema == pl.Schema(INTERACTIONS.columns)
    kept = frame.with_row_index("row", 2).filter(~pl.col("row").is_in(checked.bad["row"].implode()))
    assert checked.good.equals(kept.drop("row"))


def test_the_limit_is_a_limit():
    checked = check_interactions(placed(events(20, price=[-1.0] + [1.0] * 19)), NOW)
    assert accept(checked, 0.05) is checked
    with pytest.raises(
        BatchRefused,
        match=r"interactions refused: bad_share = 0.05 is over the limit 0.049 \(\[data\] max_bad_share\); 1 of 20 rows",
    ):
        accept(checked, 0.049)
    with pytest.raises(BatchRefused, match=r"negative price: 1 rows, first f.csv row 2: .*price=-1.0"):
        accept(checked, 0)


def test_a_batch_without_a_good_row_is_refused_whatever_the_limit():
    with pytest.raises(BatchRefused, match="good_rows = 0 is under the limit 1"):
        accept(check_interactions(placed(events(price=-1.0)), NOW), 1)


def test_an_unknown_event_type_is_refused_by_file_row_and_value(tmp_path):
    """From the file to the message."""
    rows = "".join(f"{1430623510000 + i},1,{'wishlist' if i == 3 else 'view'},10,\n" for i in range(10))
    (tmp_path / "events.csv").write_text("timestamp,visitorid,event,itemid,transactionid\n" + rows)
    checked = check_interactions(gather(read_source("retailrocket", tmp_path).events, "events"), NOW)
    with pytest.raises(BatchRefused, match=r"unknown event: 1 rows, first events.csv row 5: event='wishlist'"):
        accept(checked, 0.05)


def test_a_frame_that_misses_a_column_is_refused():
    with pytest.raises((SchemaError, pl.exceptions.ColumnNotFoundError), match="user_id"):
        check_interactions(placed(events()).drop("user_id"), NOW)


def test_counts_add_up():
    checked = check_interactions(
        placed(events(30, price=[-1.0] * 3 + [1.0] * 27, quantity=[1] * 3 + [0] * 5 + [1] * 22)), NOW
    )
    assert reasons(checked.bad).select("reason", "rows", "row").rows() == [
        ("quantity below 1", 5, 5),
        ("negative price", 3, 2),
    ]
    assert summary(checked.good)["rows"][0] == per_day(checked.good)["rows"].sum() == 22
