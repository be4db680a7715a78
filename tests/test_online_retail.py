"""Online Retail: every rule on small files in every format, and on the published one."""

import gzip
import os
import random
from datetime import UTC, datetime
from pathlib import Path
from statistics import median_low

import polars as pl
import pytest

from reco.data.files import PLACE, SourceError, gather
from reco.data.online_retail import MEDIAN_OF
from reco.data.sources import read_source
from reco.schemas import CATALOG

SHARED = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
REAL = SHARED / "online-retail" / "online_retail.csv.gz"
COLUMNS = ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"]
SECOND = {"InvoiceNo": "Invoice", "UnitPrice": "Price", "CustomerID": "Customer ID"}
SALE = ("536365", "85123A", "HEART", "6", "2010-12-01 08:26:00", "2.55", "17850.0", "UK")


def sale(**other: str | None) -> tuple:
    """A line that is a purchase, with something else in it."""
    return tuple(other.get(c, v) for c, v in zip(COLUMNS, SALE, strict=True))


def table(lines: list[tuple]) -> pl.DataFrame:
    return pl.DataFrame(lines, schema=COLUMNS, orient="row")


def events(folder: Path, lines: list[tuple] | None = None) -> pl.DataFrame:
    """What becomes of the lines of a csv file."""
    if lines is not None: table(lines).write_csv(folder / "data.csv")
    return gather(read_source("online_retail", folder).events, "events")


@pytest.mark.parametrize(
    "other, reason",
    [
        ({}, None),
        ({"InvoiceNo": "C536379", "Quantity": "-1"}, "cancellation"),
        ({"InvoiceNo": "C536379", "StockCode": "D"}, "cancellation"),
        ({"InvoiceNo": "A563185", "StockCode": "B"}, "bad debt"),
        ({"Quantity": "-30", "UnitPrice": "0.0", "CustomerID": None}, "stock correction"),
        ({"Quantity": "0"}, "stock correction"),
        *[({"StockCode": c}, "not an item") for c in ("POST", "DOT", "C2", "M", "m", "S", "BANK CHARGES", "AMAZONFEE", "CRUK", "PADS",
                                                      "gift_0001_20", "TEST001", "1234", "23444")],
        ({"StockCode": "DCGSSGIRL"}, None),
        ({"StockCode": "022138"}, None),
        ({"UnitPrice": "0.0"}, "zero price"),
        ({"UnitPrice": "0.001"}, None),
        ({"CustomerID": None}, None),
    ],
)
def test_each_rule_sets_aside_its_line_and_no_other(tmp_path, other, reason):
    got = events(tmp_path, [SALE, sale(**other, Description="x")])
    assert got["reason"].to_list() == [None, reason] and got["unread"].null_count() == 2
    assert got["row"].to_list() == [2, 3] and got["file"].unique().to_list() == ["data.csv"]


def test_what_cannot_be_read_is_marked_and_not_judged_by_a_rule(tmp_path):
    got = events(tmp_path, [SALE, sale(Quantity="six"), sale(UnitPrice="n/a"), sale(InvoiceDate="12/1/2010 8:26")])
    assert got["unread"].to_list() == [None, "quantity='six'", "price='n/a'", "ts='12/1/2010 8:26'"]
    assert got["reason"].null_count() == 4
    catalog = gather(read_source("online_retail", tmp_path).catalog, "catalog")
    assert catalog.height == 1 and catalog["row"].to_list() == [2] # only the readable line priced the item


@pytest.mark.parametrize("local, utc", [("2010-12-01 08:26:00", 8), ("2011-07-01 08:26:00", 7), ("2011-03-27 00:59:00", 0),
                                        ("2011-03-27 02:00:00", 1), ("2011-10-30 01:30:00", 0)])
def test_times_are_londons(tmp_path, local, utc):
    got = events(tmp_path, [sale(InvoiceDate=local)])["ts"][0]
    assert got == datetime.fromisoformat(local).replace(hour=utc, tzinfo=UTC)


def test_baskets_strangers_and_the_website(tmp_path):
    got = events(tmp_path, [SALE, sale(StockCode="22752"), sale(InvoiceNo="2", CustomerID=None), sale(InvoiceNo="2", CustomerID=None, StockCode="22752"),
                            sale(InvoiceNo="3", CustomerID=None), sale(InvoiceNo="3", CustomerID=None, StockCode="22752"),
                            sale(InvoiceNo="3", StockCode="DOT", CustomerID=None)])
    assert got["user_id"].to_list()[:4] == ["17850", "17850", "invoice:2", "invoice:2"]
    assert got["user_id"][4:6].n_unique() == 2 and got["user_id"][4:6].str.starts_with("line:3:").all()
    assert got["order_id"].to_list() == ["536365"] * 2 + ["2"] * 2 + [None] * 3


def test_a_file_of_any_format_or_order_gives_the_same_events(tmp_path):
    rnd = random.Random(3)
    lines = [sale(InvoiceNo=str(rnd.randint(1, 9)), StockCode=rnd.choice(["85123A", "85123a", "22752", "POST", "022138"]), Quantity=str(rnd.randint(-1, 9)),
                  UnitPrice=rnd.choice(["2.55", "0.001", "1000000.0", "3.0"]), CustomerID=rnd.choice(["17850.0", None])) for _ in range(200)]
    made = {}
    for name in ("csv", "csv.gz", "xlsx", "order", "second"):
        folder = tmp_path / name
        folder.mkdir()
        frame = table(lines)
        if name == "csv": frame.write_csv(folder / "a.csv")
        if name == "csv.gz": (folder / "a.csv.gz").write_bytes(gzip.compress(frame.write_csv().encode()))
        if name == "order": table(lines[::-1]).write_csv(folder / "a.csv")
        typed = frame.with_columns(pl.col("Quantity").cast(pl.Int64), pl.col("UnitPrice", "CustomerID").cast(pl.Float64),
                                   pl.col("InvoiceDate").str.to_datetime())
        if name == "xlsx": typed.write_excel(folder / "a.xlsx")
        if name == "second": (typed.rename(SECOND).with_columns(pl.col("Customer ID").cast(pl.Int64))).write_csv(folder / "b.csv", datetime_format="%Y-%m-%dT%H:%M:%S")
        batch = read_source("online_retail", folder)
        by = ["event_id", "user_id", "order_id"]
        made[name] = (gather(batch.events, name).drop("file", "row").sort(by), gather(batch.catalog, name).drop("file", "row"))
    assert made["csv"][0].height == 200 and 20 < made["csv"][0]["reason"].null_count() < 180
    for name, (log, catalog) in made.items():
        assert log.equals(made["csv"][0]) and catalog.equals(made["csv"][1]), name


def test_lines_that_differ_have_different_ids(tmp_path):
    others = [{"InvoiceNo": "536366"}, {"StockCode": "85123B"}, {"Quantity": "7"}, {"UnitPrice": "2.551"}, {"UnitPrice": "2.549"},
              {"InvoiceDate": "2010-12-01 08:27:00"}]
    got = events(tmp_path, [SALE, *(sale(**o) for o in others), sale(StockCode="85123a", Description="x")])
    assert got["event_id"].n_unique() == 7 and got["event_id"][0] == got["event_id"][7]


def test_both_sheets_of_the_second_edition_are_read(tmp_path):
    import xlsxwriter
    with xlsxwriter.Workbook(tmp_path / "online_retail_II.xlsx") as book:
        for name, invoice in (("Year 2009-2010", "1"), ("Year 2010-2011", "2")):
            table([sale(InvoiceNo=invoice)]).rename(SECOND).write_excel(book, worksheet=name)
    got = events(tmp_path)
    assert got["file"].to_list() == ["online_retail_II.xlsx[Year 2009-2010]", "online_retail_II.xlsx[Year 2010-2011]"]
    assert got["order_id"].to_list() == ["1", "2"] and got["row"].to_list() == [2, 2]


def test_wrong_files_are_named(tmp_path):
    def said() -> str:
        with pytest.raises(SourceError) as e: events(tmp_path)
        return str(e.value)

    assert "missing file" in said()
    table([SALE]).drop("UnitPrice").write_csv(tmp_path / "a.csv")
    assert "missing columns: ['UnitPrice or Price'] in a.csv (found 7 columns" in said()
    table([SALE]).write_csv(tmp_path / "b.csv")
    assert "a.csv, b.csv: keep one" in said()
    for p in tmp_path.iterdir(): p.unlink()
    table([SALE]).write_excel(tmp_path / "a.xlsx")
    whole = (tmp_path / "a.xlsx").read_bytes()
    (tmp_path / "a.xlsx").write_bytes(whole[: len(whole) // 2])
    assert "a.xlsx cannot be read" in said()
    table([SALE]).drop("InvoiceNo").write_excel(tmp_path / "a.xlsx")
    assert "missing columns: ['InvoiceNo or Invoice'] in a.xlsx[Sheet1]" in said()


@pytest.mark.parametrize("seed", range(3))
def test_the_price_is_the_median_of_the_lines_so_far(tmp_path, seed):
    """Against a plain loop, at every moment; so nothing that comes later can matter."""
    rnd = random.Random(seed)
    lines = [sale(InvoiceNo=str(n), StockCode=rnd.choice(["22752", "22753"]), UnitPrice=rnd.choice(["1.0", "2.0", "3.5"]),
                  InvoiceDate=f"2011-01-{1 + n // 5:02d} {10 + n % 5}:00:00") for n in range(120)]
    table(lines).write_csv(tmp_path / "data.csv")
    catalog = gather(read_source("online_retail", tmp_path).catalog, "catalog")
    assert catalog.drop(PLACE).schema == pl.Schema(CATALOG.columns)
    for code in ("22752", "22753"):
        mine, want = [x for x in lines if x[1] == code], []
        for n, line in enumerate(mine):
            price = median_low([float(x[5]) for x in mine[max(0, n + 1 - MEDIAN_OF) : n + 1]])
            if not want or want[-1][1] != price: want.append((line[4], price))
        got = catalog.filter(item_id=code)
        assert got.select(pl.col("valid_from").dt.strftime("%Y-%m-%d %H:%M:%S"), "price").rows() == want
        assert got["created_at"].unique().to_list() == [got["valid_from"].min()]


def test_a_title_is_what_was_printed_on_paid_lines(tmp_path):
    notes = [sale(Description="damaged", UnitPrice="0.0"), sale(Description="?", Quantity="-3")] * 9
    table([*notes, sale(Description="RED  HEART "), sale(Description="HEART", Quantity="1"), sale(Description=None, Quantity="2")]).write_csv(tmp_path / "a.csv")
    assert gather(read_source("online_retail", tmp_path).catalog, "c")["title"].to_list() == ["HEART"] # of two, the first in the alphabet


@pytest.mark.skipif(not REAL.is_file(), reason=f"no {REAL} (set SHARED_DATA)")
def test_the_published_file(tmp_path):
    """The counts that the notebook states, and that every line is somewhere."""
    (tmp_path / REAL.name).symlink_to(REAL)
    batch = read_source("online_retail", tmp_path)
    log, catalog = gather(batch.events, "e"), gather(batch.catalog, "c")
    assert (log.height, log["row"].n_unique(), log["unread"].null_count()) == (541_909, 541_909, 541_909)
    assert dict(log["reason"].value_counts().iter_rows()) == {
        None: 527_675, "cancellation": 9_288, "not an item": 2_448, "stock correction": 1_336, "zero price": 1_159, "bad debt": 3}
    sold = log.filter(pl.col("reason").is_null())
    assert sold["event_id"].n_unique() == 522_452 and sold.height - 522_452 == 5_223
    stranger, website = (sold.filter(pl.col("user_id").str.starts_with(p)) for p in ("invoice:", "line:"))
    assert (stranger.height, stranger["user_id"].n_unique()) == (12_045, 680)
    assert (website.height, website["order_id"].null_count()) == (124_456, 124_456)
    hour = sold["ts"].dt.convert_time_zone("Europe/London").dt.hour()
    assert (hour.min(), hour.max()) == (6, 20)
    assert (catalog.height, catalog["item_id"].n_unique()) == (18_027, 3_795) and set(sold["item_id"]) == set(catalog["item_id"])
    assert catalog["title"].null_count() == 0 and not catalog["title"].str.contains(r"\?|(?i)damage|thrown|wrong").any()
