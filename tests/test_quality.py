"""Judging: every row in exactly one place, with the right reason, and a bad batch refused by name."""

import json
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest

from reco.data.quality import (
    CATALOG_KEY,
    CONSTRAINT_OF,
    INTERACTIONS_KEY,
    catalog_rules,
    check_catalog,
    check_interactions,
    duplicate,
    gate,
    interaction_rules,
    mix_psi,
    reasons,
    refusal,
    shares,
    volume_fall,
)
from reco.data.sources import gather, read_source
from reco.schemas import CATALOG, INTERACTIONS, SchemaError, conform
from reco.settings import Limit, Quality

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
    checked = check_catalog(placed(catalog(**columns)), NOW)
    assert checked.bad.select("table", "reason").rows() == [("catalog", reason)] and checked.good.is_empty()


@pytest.mark.parametrize(
    "columns", [{}, {"ts": NOW}, {"ts": datetime(2000, 1, 1, tzinfo=UTC)}, {"price": 0.0}, {"quantity": 1}]
)
def test_the_edges_of_the_rules_are_good(columns):
    assert check_interactions(placed(events(**columns)), NOW).bad.is_empty()


def test_the_edges_of_the_catalogues_rules_are_good():
    assert check_catalog(
        placed(catalog(3, discount=[0.0, 1.0, None], valid_from=NOW + timedelta(days=9))), NOW
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
    two = check_catalog(placed(catalog(3, item_id=["a", "a", "b"])), NOW)
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


def judged(checked, quality: Quality) -> str:
    """The refusal of a batch of interactions; empty when it passes."""
    why, rows = reasons(checked.bad), checked.good.height + checked.bad.height
    return refusal(gate("interactions", shares(why, rows), checked.good.height, quality), why)


def limit(value: float, severity: str = "error") -> Limit:
    return Limit(value=value, severity=severity)


def test_the_limit_is_a_limit():
    checked = check_interactions(placed(events(20, price=[-1.0] + [1.0] * 19)), NOW)
    loose = Quality(range_share=limit(1))
    assert judged(checked, loose.model_copy(update={"bad_share": limit(0.05)})) == ""
    message = judged(checked, loose.model_copy(update={"bad_share": limit(0.049)}))
    assert message.startswith("interactions refused: bad_share = 0.05 is over the limit 0.049 ([quality] bad_share)")
    assert "negative price: 1 rows, first f.csv row 2: " in message and "price=-1.0" in message


def test_a_warning_does_not_refuse():
    checked = check_interactions(placed(events(2, price=[-1.0, 1.0])), NOW)
    quality = Quality(bad_share=limit(0.05, "warn"), range_share=limit(0.05, "warn"))
    assert judged(checked, quality) == ""
    assert "bad_share = 0.5" in judged(checked, quality.model_copy(update={"bad_share": limit(0.05)}))


def test_a_batch_without_a_good_row_is_refused_whatever_the_limit():
    message = judged(check_interactions(placed(events(price=-1.0)), NOW), Quality(bad_share=limit(1), range_share=limit(1)))
    assert "good_rows = 0 is under the limit 1" in message


def test_every_rule_belongs_to_a_constraint_with_a_limit():
    rules = {*interaction_rules(NOW), *catalog_rules(), duplicate(INTERACTIONS_KEY), duplicate(CATALOG_KEY)}
    assert set(CONSTRAINT_OF) == rules and set(CONSTRAINT_OF.values()) <= set(Quality.model_fields)


def test_each_kind_counts_for_its_constraint_and_for_the_whole():
    why = pl.DataFrame({"reason": ["null ts", "null user_id", "negative price", "cancellation"], "rows": [1, 2, 3, 50]})
    found = shares(why, 100)
    assert found["null_share"] == pytest.approx(0.03) and found["range_share"] == 0.03 and found["future_share"] == 0
    assert found["bad_share"] == pytest.approx(0.06), "what a source sets aside by its own rules is not bad"


def test_a_reason_of_the_source_stands_before_the_rules():
    frame = placed(events(2, price=[-1.0, 1.0])).with_columns(pl.Series("reason", ["cancellation", None], dtype=pl.String))
    checked = check_interactions(frame, NOW)
    assert checked.bad["reason"].to_list() == ["cancellation"] and checked.good.height == 1


def test_a_message_names_no_shopper():
    checked = check_interactions(placed(events(price=-1.0, user_id="ann@example.org", order_id="o-77", item_id="lamp")), NOW)
    message = judged(checked, Quality())
    assert "lamp" in message and "ann" not in message and "o-77" not in message
    assert checked.bad["user_id"].to_list() == ["ann@example.org"], "but the quarantine knows whose row it is"


def test_the_same_bad_row_has_the_same_id_at_any_time():
    frame = placed(events(3, price=[-1.0, -1.0, -2.0]))
    one, two = check_interactions(frame, NOW).bad, check_interactions(frame, NOW + timedelta(days=1)).bad
    assert one["quarantine_id"].equals(two["quarantine_id"]) and one["quarantine_id"].n_unique() == 3


@pytest.mark.parametrize("scale", [1, 1000])
def test_the_stability_index_knows_the_same_mix_and_a_new_type(scale):
    usual = {"view": 90 * scale, "addtocart": 10 * scale}
    assert mix_psi(usual, usual) == 0 == mix_psi(usual, {}) == mix_psi({}, usual)
    assert mix_psi({"view": 80 * scale, "addtocart": 20 * scale}, usual) == pytest.approx(0.1 * 0.811, rel=0.25)
    assert mix_psi({"impression": 100 * scale}, usual) > 1
    assert mix_psi(usual, {"view": 50, "addtocart": 50}) == pytest.approx(mix_psi({"view": 50, "addtocart": 50}, usual))


def test_volume_is_measured_against_the_median():
    assert volume_fall(50, [100, 100, 1_000]) == 0.5 and volume_fall(200, [100]) == 0 == volume_fall(0, [])


def test_an_unknown_event_type_is_refused_by_file_row_and_value(tmp_path):
    """From the file to the message."""
    rows = "".join(f"{1430623510000 + i},1,{'wishlist' if i == 3 else 'view'},10,\n" for i in range(10))
    (tmp_path / "events.csv").write_text("timestamp,visitorid,event,itemid,transactionid\n" + rows)
    checked = check_interactions(gather(read_source("retailrocket", tmp_path).events, "events"), NOW)
    assert "unknown event: 1 rows, first events.csv row 5: event='wishlist'" in judged(checked, Quality())


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
