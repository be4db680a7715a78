"""Readers: the original formats, point-in-time catalogues, and files that must not be accepted."""

import gzip
import os
import random
import typing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from reco.data.files import PLACE, SourceError, gather, scan_csv
from reco.data.retailrocket import PROPERTY_FILES
from reco.data.sources import SOURCES, read_source
from reco.schemas import CATALOG, INTERACTIONS, TS, conform
from reco.settings import Data, Postgres

SHARED = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
HEADER = "timestamp,visitorid,event,itemid,transactionid\n"
T0, DAY = 1430623510000, 86_400_000
ROW = f"{T0},1,view,10,\n"


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*")}


def refusal(name: str, folder: Path) -> str:
    """The message of the refusal; the folder is as it was."""
    before = listing(folder)
    with pytest.raises(SourceError) as e:
        batch = read_source(name, folder)
        gather(batch.events, "events.csv")
        gather(batch.catalog, "catalog")
    assert listing(folder) == before
    return str(e.value)


def write_properties(folder: Path, rows: list[tuple]) -> None:
    """The rows in the two original files, the first half in the first."""
    half = len(rows) // 2
    for name, part in zip(PROPERTY_FILES, (rows[:half], rows[half:]), strict=True):
        (folder / name).write_text(
            "timestamp,itemid,property,value\n" + "".join(",".join(map(str, r)) + "\n" for r in part)
        )


@pytest.mark.parametrize(
    "text, said",
    [
        ("", ["events.csv", "empty"]),
        ("\n\n", ["events.csv", "empty"]),
        (HEADER, ["events.csv", "no rows"]),
        (
            "visitorid,event,itemid,transactionid\n1,view,10,\n",
            ["missing columns: ['timestamp'] in events.csv (found 4 columns"],
        ),
        (HEADER + ROW + ROW[:18], ["events.csv", "half-written", "of 5 fields"]),
        (HEADER + ROW + f"{T0},1,view,10\n", ["events.csv", "half-written", "4 of 5 fields"]),
        (HEADER + ROW + f"{T0},1,transaction,10,12", ["events.csv", "no line end", "transaction,10,12"]),
        (HEADER + ROW + f'{T0},1,view,"10,\n', ["events.csv", "half-written"]),
        (
            HEADER + f"{T0 // 1000},1,view,10,\n" + ROW.replace(str(T0), str(T0 // 1000 + 60)),
            ["events.csv row 2", "timestamp", str(T0 // 1000), "looks like seconds"],
        ),
        (HEADER + f"{T0 * 1000},1,view,10,\n", ["events.csv row 2", "looks like microseconds"]),
        (HEADER + ROW + f"{T0},1,view,10,,x,y,z\n" + ROW, ["events.csv", "more fields"]),
    ],
)
def test_a_wrong_events_file_is_named(tmp_path, text, said):
    (tmp_path / "events.csv").write_text(text)
    message = refusal("retailrocket", tmp_path)
    assert all(s in message for s in said), message


def test_a_missing_file_folder_or_source_is_named(tmp_path):
    assert "missing file" in refusal("retailrocket", tmp_path) and "events.csv" in refusal("retailrocket", tmp_path)
    assert "interactions.parquet" in refusal("files", tmp_path)
    assert "missing folder" in refusal("files", tmp_path / "nowhere")
    assert "unknown source: 'magento'; known: retailrocket" in refusal("magento", tmp_path)


def test_the_settings_know_the_same_sources():
    assert set(typing.get_args(Data.model_fields["source"].annotation)) == set(SOURCES)


def test_postgres_without_an_address_or_a_scratch_folder_is_an_error(tmp_path):
    for section in (None, Postgres()):
        with pytest.raises(SourceError, match="RECO_POSTGRES_URL"):
            read_source("postgres", tmp_path, section, tmp_path)
    with pytest.raises(SourceError, match="scratch") as e:
        read_source("postgres", tmp_path, Postgres(url="postgresql://u:secret@127.0.0.1:1/shop"))
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_packed_file_reads_as_the_plain_one_and_a_cut_one_is_refused(tmp_path, kept):
    text = (HEADER + ROW * 5000).encode()
    whole = gzip.compress(text)
    (tmp_path / "plain.csv").write_bytes(text)
    (tmp_path / "a.csv.gz").write_bytes(whole)
    packed, plain = (gather(scan_csv(tmp_path / f, ["event"]), f) for f in ("a.csv.gz", "plain.csv"))
    assert packed.drop("file").equals(plain.drop("file")) and packed.height == 5000
    (tmp_path / "a.csv.gz").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(SourceError, match="a.csv.gz: cut off or damaged"):
        scan_csv(tmp_path / "a.csv.gz", [])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text[: int(len(text) * kept)]))
    with pytest.raises(SourceError, match="a.csv.gz: (half-written|the last row has no line end)"):
        scan_csv(tmp_path / "a.csv.gz", [])


def test_bytes_that_are_not_text_are_an_error_with_the_file_name(tmp_path):
    (tmp_path / "events.csv").write_bytes(HEADER.encode() + f"{T0},caf\xe9,view,10,\n".encode("latin-1"))
    assert "events.csv" in refusal("retailrocket", tmp_path)


def test_a_cut_anywhere_before_the_last_line_end_is_noticed(tmp_path):
    """Every way to cut the last row of a file in the middle is refused."""
    whole = HEADER + ROW + f"{T0},1,transaction,10,1234\n"
    for end in range(len(HEADER + ROW) + 1, len(whole)):
        (tmp_path / "events.csv").write_text(whole[:end])
        assert "events.csv" in refusal("retailrocket", tmp_path), end
    (tmp_path / "events.csv").write_text(whole)
    assert gather(read_source("retailrocket", tmp_path).events, "events").height == 2


def test_the_last_row_may_hold_line_ends_and_odd_separators_in_quotes(tmp_path):
    text = 'item_id,valid_from,title\n7,2026-05-01,lamp\n8,2026-05-01,"two\nlines, and\u2028more ""quotes"""\n\n'
    (tmp_path / "catalog.csv").write_text(text, "utf-8")
    (tmp_path / "interactions.csv").write_text(
        "event_id,ts,user_id,item_id,event\r\na,2026-05-01T10:00:00Z,u,7,view\r\n"
    )
    batch = read_source("files", tmp_path)
    assert gather(batch.catalog, "catalog")["title"].to_list()[:2] == ["lamp", 'two\nlines, and\u2028more "quotes"']
    assert gather(batch.events, "events")["event"].to_list() == ["view"]


def test_bad_rows_are_marked_and_kept_with_their_place(tmp_path):
    (tmp_path / "events.csv").write_text(HEADER + ROW + f"{T0},1,wishlist,10,\nsoon,1,view,10,\n" + ROW)
    events = gather(read_source("retailrocket", tmp_path).events, "events")
    assert events.filter(pl.col("unread").is_not_null()).select("file", "row", "unread").rows() == [
        ("events.csv", 3, "event='wishlist'"),
        ("events.csv", 4, "ts='soon'"),
    ]
    assert events.height == 4


def test_one_odd_time_among_good_ones_is_a_bad_row_not_a_bad_file(tmp_path):
    (tmp_path / "events.csv").write_text(HEADER + f"{T0 // 1000},1,view,10,\n" + ROW)
    assert gather(read_source("retailrocket", tmp_path).events, "events").height == 2


def test_ids_come_from_the_row_alone(tmp_path):
    rows = [f"{T0 + t},{u},view,{i},\n" for t in (0, 1) for u in (1, 11) for i in (1, 11)]
    ids = []
    for order in (rows, rows[::-1]):
        (tmp_path / "events.csv").write_text(HEADER + "".join(order) + rows[0])
        ids.append(gather(read_source("retailrocket", tmp_path).events, "events")["event_id"])
    assert set(ids[0]) == set(ids[1]) and ids[0].n_unique() == len(rows) and ids[0].len() == len(rows) + 1


def test_without_property_files_the_catalogue_is_what_was_seen(tmp_path):
    (tmp_path / "events.csv").write_text(HEADER + f"{T0 + 5},1,view,10,\n" + ROW + f"{T0 + 9},2,view,20,\n")
    catalog = gather(read_source("retailrocket", tmp_path).catalog, "catalog")
    seen = dict(catalog.select("item_id", pl.col("valid_from").dt.epoch("ms")).iter_rows())
    assert seen == {"10": T0, "20": T0 + 9} and catalog["created_at"].equals(catalog["valid_from"], check_names=False)
    assert (
        catalog.drop(PLACE).schema == pl.Schema(CATALOG.columns)
        and catalog["price"].null_count() == 2
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_catalogue_at_any_moment_is_the_last_value_said_before(tmp_path, seed):
    """Against a walk through the properties, one by one, at every moment and for every item."""
    rnd = random.Random(seed)
    (tmp_path / "events.csv").write_text(
        HEADER + "".join(f"{T0 + d * DAY},1,view,{i},\n" for d, i in ((0, 1), (6, 2), (3, 5)))
    )
    made = {
        "790": lambda: f"n{rnd.randint(1, 3)}00.000",
        "available": lambda: str(rnd.randint(0, 1)),
        "categoryid": lambda: str(rnd.randint(1, 3)),
        "888": lambda: "n1 99",
    }
    keys = {(T0 + rnd.randint(0, 9) * DAY, rnd.randint(1, 4), p) for _ in range(80) for p in made}
    rows = [(*k, made[k[2]]()) for k in sorted(keys, key=lambda k: rnd.random())]
    write_properties(tmp_path, rows)
    catalog = gather(read_source("retailrocket", tmp_path).catalog, "catalog")
    for item in range(1, 6):
        for t in range(T0 - DAY, T0 + 11 * DAY, DAY):
            said = {p: v for ts, i, p, v in sorted(rows) if i == item and ts <= t}
            want = (
                float(said["790"][1:]) if "790" in said else None,
                said.get("available", "") == "1" if "available" in said else None,
                said.get("categoryid"),
            )
            now = catalog.filter((pl.col("item_id") == str(item)) & (pl.col("valid_from").dt.epoch("ms") <= t)).sort(
                "valid_from"
            )
            got = now.select("price", "available", "category_id").row(-1) if now.height else (None, None, None)
            assert got == want, (item, t)
    assert catalog.filter(pl.col("item_id") == "5").height == 1
    assert catalog.filter(pl.col("created_at") != pl.col("valid_from").min().over("item_id")).is_empty()
    steps = catalog.sort("item_id", "valid_from").select("item_id", "price", "available", "category_id")
    assert steps.height == steps.select(pl.struct(pl.all()).rle_id()).max().item() + 1  # no row repeats the one before


def test_the_order_of_property_rows_changes_nothing(tmp_path):
    (tmp_path / "events.csv").write_text(HEADER + ROW)
    rows = [(T0 + d * DAY, 10, "790", f"n{v}.000") for d, v in ((1, 5), (1, 7), (2, 6), (3, 6))]
    got = []
    for order in (rows, rows[::-1]):
        write_properties(tmp_path, order)
        got.append(gather(read_source("retailrocket", tmp_path).catalog, "c").drop("file", "row"))
    assert got[0].equals(got[1]) and got[0]["price"].to_list() == [None, 7.0, 6.0]


def test_an_unreadable_property_is_marked_with_its_own_row(tmp_path):
    (tmp_path / "events.csv").write_text(HEADER + ROW)
    write_properties(
        tmp_path,
        [
            (T0 + DAY, 10, "available", "1"),
            (T0 + DAY, 10, "888", "x"),
            (T0 + DAY, 10, "categoryid", "3"),
            (T0 + DAY, 10, "790", "cheap"),
        ],
    )
    bad = gather(read_source("retailrocket", tmp_path).catalog, "c").filter(pl.col("unread").is_not_null())
    assert bad.select("file", "row", "unread").rows() == [(PROPERTY_FILES[1], 3, "price='cheap'")]


def test_category_paths_and_what_breaks_them(tmp_path):
    (tmp_path / "events.csv").write_text(HEADER + ROW)
    write_properties(tmp_path, [(T0, 10, "categoryid", "7"), (T0, 10, "790", "n1.000")])
    for tree, want in (("7,3\n3,1\n1,\n", "1 / 3 / 7"), ("8,1\n1,\n", "7")):
        (tmp_path / "category_tree.csv").write_text("categoryid,parentid\n" + tree)
        assert gather(read_source("retailrocket", tmp_path).catalog, "c")["category_path"].to_list() == [want]
    (tmp_path / "category_tree.csv").write_text("categoryid,parentid\n7,3\n3,7\n")
    assert "category_tree.csv: a cycle: 7 → 3 → 7" in refusal("retailrocket", tmp_path)
    (tmp_path / "category_tree.csv").write_text("categoryid,parentid\n7,3\n7,4\n")
    assert "category 7 has two parents" in refusal("retailrocket", tmp_path)
    (tmp_path / "category_tree.csv").unlink()
    (tmp_path / PROPERTY_FILES[1]).unlink()
    assert PROPERTY_FILES[1] in refusal("retailrocket", tmp_path)


def log(n: int, seed: int) -> pl.DataFrame:
    rnd = random.Random(seed)
    return conform(
        pl.DataFrame(
            {
                "event_id": [str(i) for i in range(n)],
                "user_id": [f"u{rnd.randint(0, 4)}" for _ in range(n)],
                "item_id": "x",
                "event": "view",
                "ts": [
                    datetime(2026, 5, 1, tzinfo=UTC)
                    + timedelta(minutes=rnd.randint(0, 600), seconds=rnd.choice([0, 1]))
                    for _ in range(n)
                ],
                "session_id": [rnd.choice([None, None, None, "given"]) for _ in range(n)],
            }
        ),
        INTERACTIONS,
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_platforms_own_files_come_back_as_they_were(tmp_path, suffix):
    events = log(50, 1)
    write = {"csv": pl.DataFrame.write_csv, "parquet": pl.DataFrame.write_parquet}[suffix]
    write(events, tmp_path / f"interactions.{suffix}")
    catalog = conform(
        pl.DataFrame({"item_id": ["x"], "valid_from": events["ts"][:1], "price": [9.5], "available": [True]}), CATALOG
    )
    write(catalog, tmp_path / f"catalog.{suffix}")
    batch = read_source("simulator", tmp_path)
    assert gather(batch.events, "e").drop(PLACE).equals(events)
    assert gather(batch.catalog, "c").drop(PLACE).equals(catalog)
    assert gather(batch.events, "e")["unread"].null_count() == 50


def test_wrong_files_of_the_platforms_own_kind_are_named(tmp_path):
    events = log(5, 1)
    events.drop("ts").write_parquet(tmp_path / "interactions.parquet")
    assert "missing columns: ['ts'] in interactions.parquet (found 10 columns" in refusal("files", tmp_path)
    events.head(0).write_parquet(tmp_path / "interactions.parquet")
    assert "no rows" in refusal("files", tmp_path)
    events.write_parquet(tmp_path / "interactions.parquet")
    whole = (tmp_path / "interactions.parquet").read_bytes()
    (tmp_path / "interactions.parquet").write_bytes(whole[: len(whole) // 2])
    assert "interactions.parquet cannot be read" in refusal("files", tmp_path)
    events.with_columns(pl.col("ts").dt.epoch("s")).write_parquet(tmp_path / "interactions.parquet")
    assert "interactions.parquet row 1: ts =" in refusal("files", tmp_path)
    events.write_csv(tmp_path / "interactions.csv")
    assert "both interactions.parquet and interactions.csv" in refusal("files", tmp_path)


@pytest.mark.parametrize("dtype", [pl.Datetime("us"), pl.Datetime("ns", "UTC"), pl.Datetime("ms", "Europe/Berlin")])
def test_times_of_any_unit_and_zone_are_the_same_moment(tmp_path, dtype):
    events = log(5, 2)
    ts = pl.col("ts").dt.convert_time_zone(dtype.time_zone or "UTC")
    events.with_columns((ts if dtype.time_zone else ts.dt.replace_time_zone(None)).cast(dtype)).write_parquet(
        tmp_path / "interactions.parquet"
    )
    read = gather(read_source("files", tmp_path).events, "e")
    assert read["ts"].equals(events["ts"]) and read.schema["ts"] == TS


@pytest.mark.skipif(
    not (SHARED / "retailrocket" / "events.csv").is_file(), reason=f"no {SHARED}/retailrocket (set SHARED_DATA)"
)
def test_real_events():
    batch = read_source("retailrocket", SHARED / "retailrocket")
    events, catalog = gather(batch.events, "events"), gather(batch.catalog, "catalog")
    assert (events.height, events["event_id"].n_unique(), events["user_id"].n_unique()) == (97_381, 97_381, 2_174)
    assert events["unread"].null_count() == events.height and events["order_id"].drop_nulls().n_unique() == 7_060
    assert dict(events.group_by("event").len().iter_rows()) == {
        "view": 75_374,
        "addtocart": 12_456,
        "transaction": 9_551,
    }
    assert catalog.height == 29_905


@pytest.mark.skipif(
    not (SHARED / "retailrocket" / "raw_id_sample_events.csv").is_file(),
    reason=f"no {SHARED}/retailrocket (set SHARED_DATA)",
)
def test_real_events_with_an_extra_column_and_order_ids_like_12_0(tmp_path):
    for name, source in (("events.csv", "raw_id_sample_events.csv"), ("category_tree.csv", "category_tree.csv")):
        (tmp_path / name).write_bytes((SHARED / "retailrocket" / source).read_bytes())
    events = gather(read_source("retailrocket", tmp_path).events, "events")
    assert (events.height, events["event_id"].n_unique(), events["item_id"].n_unique()) == (9_385, 9_382, 6_610)
    assert "8693" in events["order_id"].to_list() and not events["order_id"].str.contains(r"\.").any()
