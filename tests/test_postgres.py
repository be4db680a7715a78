"""The shop's database: a schema that keeps bad rows out and the past in, and a reader that brings all of it, once, in pieces."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import polars as pl
import psycopg
import pytest
from servers import database, postgres

from reco.data.files import PLACE, SourceError, gather
from reco.data.postgres import ORDERS, fetch, snapshot
from reco.data.simulator import simulate, write_shop
from reco.data.sources import read_source
from reco.schemas import CATALOG, INTERACTIONS
from reco.settings import Postgres

ROOT = Path(__file__).parents[1]
SCHEMA = (ROOT / "data" / "schema" / "postgres_schema.sql").read_text()
TABLES = ["categories", "item_history", "items", "order_items", "orders", "users"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url: yield url


@pytest.fixture
def url(server: str) -> Iterator[str]:
    """A database with the schema and nothing in it."""
    with database(server) as address:
        with psycopg.connect(address) as conn: conn.execute(SCHEMA)
        yield address


@pytest.fixture
def db(url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(url, autocommit=True) as conn: yield conn


def read(url: str, scratch: Path, batch_rows: int = 1_000) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and catalogue."""
    batch = read_source("postgres", Path("no folder"), Postgres(url=url, batch_rows=batch_rows), scratch)
    return gather(batch.events, "events"), gather(batch.catalog, "catalog")


def fill(db: psycopg.Connection, orders: int = 3) -> None:
    """A tree of three categories, 50 items, 40 shoppers, orders with 1 to 7 lines; the same ones every time."""
    db.execute("INSERT INTO categories VALUES ('1', NULL, 'Home'), ('2', '1', 'Lamps'), ('3', '2', 'Desk lamps')")
    db.execute("""INSERT INTO items (item_id, category_id, title, price, margin, stock)
                  SELECT 'i' || n, '3', 'Item ' || n, n * 1.25, 0.3, n FROM generate_series(1, 50) n""")
    db.execute("INSERT INTO users SELECT 'u' || n, 'a' || n || '@example.org', 'Name ' || n FROM generate_series(1, 40) n")
    db.execute(f"""INSERT INTO orders (user_id, status, ordered_at)
                  SELECT CASE WHEN n % 5 > 0 THEN 'u' || 1 + n % 40 END, (ARRAY['paid', 'delivered', 'cancelled', 'refunded'])[1 + n % 4],
                         '2026-05-01 00:00+02'::timestamptz + n % 977 * interval '17 minutes 0.123456 s' FROM generate_series(1, {orders}) n""")
    db.execute("""INSERT INTO order_items SELECT order_id, line, 'i' || 1 + (order_id * line) % 50, 1 + order_id % 3, line * 0.99
                  FROM orders, generate_series(1, 7) line WHERE line <= 1 + order_id % 7""")


# The schema ---------------------------------------------------------------------------------------------------------


def test_the_schema_can_be_applied_again_and_keeps_the_rows(db):
    fill(db)
    before = {t: db.execute(f"SELECT count(*) FROM {t}").fetchone() for t in TABLES}
    db.execute(SCHEMA)
    assert before == {t: db.execute(f"SELECT count(*) FROM {t}").fetchone() for t in TABLES} and before["items"] == (50,)


def test_every_table_and_column_is_described_and_every_moment_has_a_zone(db):
    columns = db.execute("""SELECT c.table_name, c.column_name, c.data_type, col_description(c.table_name::regclass, c.ordinal_position),
                                   obj_description(c.table_name::regclass) FROM information_schema.columns c WHERE table_schema = 'public'""").fetchall()
    assert sorted({t for t, *_ in columns}) == TABLES and all(about and table for *_, about, table in columns)
    assert {kind for _, name, kind, *_ in columns if name.endswith("_at") or name == "valid_from"} == {"timestamp with time zone"}


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO items (item_id, title, price) VALUES ('x', 'x', -0.01)",
        "INSERT INTO items (item_id, title, price, discount) VALUES ('x', 'x', 1, 1.5)",
        "INSERT INTO items (item_id, title, price, stock) VALUES ('x', 'x', 1, -1)",
        "INSERT INTO items (item_id, title, price, category_id) VALUES ('x', 'x', 1, 'none')",
        "INSERT INTO items (item_id, title, price) VALUES ('i1', 'x', 1)",
        "INSERT INTO items (item_id, title, price) VALUES ('', 'x', 1)",
        "INSERT INTO items (item_id, title) VALUES ('x', 'x')",
        "INSERT INTO categories VALUES ('9', '9', 'x')",
        "INSERT INTO categories VALUES ('9', 'none', 'x')",
        "INSERT INTO users (user_id, email) VALUES ('x', 'a1@example.org')",
        "INSERT INTO users (user_id, email) VALUES ('x', 'nobody')",
        "INSERT INTO orders (user_id, status) VALUES ('u1', 'lost')",
        "INSERT INTO orders (user_id) VALUES ('nobody')",
        "INSERT INTO order_items VALUES (1, 9, 'i1', 0, 1)",
        "INSERT INTO order_items VALUES (1, 9, 'i1', 1, -1)",
        "INSERT INTO order_items VALUES (1, 9, 'none', 1, 1)",
        "INSERT INTO order_items VALUES (99, 1, 'i1', 1, 1)",
        "INSERT INTO order_items VALUES (1, 1, 'i1', 1, 1)",
        "DELETE FROM items WHERE item_id IN (SELECT item_id FROM order_items)",
        "UPDATE items SET updated_at = updated_at - interval '1 day', created_at = created_at - interval '9 days'",
    ],
)
def test_keys_and_checks_refuse_bad_rows(db, statement):
    fill(db)
    with pytest.raises(psycopg.errors.IntegrityError): db.execute(statement)


def test_good_rows_beside_the_bad_ones_are_taken(db):
    fill(db)
    db.execute("INSERT INTO items (item_id, title, price, discount, stock) VALUES ('x', 'x', 0, 1, 0)")
    db.execute("INSERT INTO order_items VALUES (1, 9, 'x', 1, 0)")
    db.execute("UPDATE users SET email = NULL, name = NULL")  # erasure
    db.execute("DELETE FROM users")                           # and more of it: the orders stay, as guests'
    assert db.execute("SELECT count(*), count(user_id) FROM orders").fetchone() == (3, 0)


def test_history_is_written_when_shoppers_see_a_change_and_only_then(db, url, tmp_path):
    db.execute("INSERT INTO items (item_id, title, price, stock) VALUES ('lamp', 'Lamp', 25, 3)")
    changes = ["stock = 2", "stock = 1", "price = 19", "price = 19", "stock = 0", "title = 'A lamp'", "stock = 8, price = 18.5"]
    for change in changes:
        time.sleep(0.002) # each in a millisecond of its own
        db.execute(f"UPDATE items SET {change} WHERE item_id = 'lamp'")
    rows = db.execute("SELECT title, price::float8, available FROM item_history ORDER BY valid_from").fetchall()
    assert rows == [("Lamp", 25, True), ("Lamp", 19, True), ("Lamp", 19, False), ("A lamp", 19, False), ("A lamp", 18.5, True)]
    now = db.execute("SELECT updated_at >= created_at, updated_at > max(valid_from) - interval '1 ms' FROM items, item_history GROUP BY 1, updated_at")
    assert now.fetchall() == [(True, True)]


def test_changes_in_one_transaction_are_one_row_the_last(db):
    with db.transaction():
        db.execute("INSERT INTO items (item_id, title, price) VALUES ('lamp', 'Lamp', 25)")
        for price in (24, 23): db.execute("UPDATE items SET price = %s", (price,))
    assert db.execute("SELECT price::float8 FROM item_history").fetchall() == [(23,)]


def test_old_changes_can_be_replayed(db):
    db.execute("INSERT INTO items (item_id, title, price, created_at, updated_at) VALUES ('lamp', 'Lamp', 25, '2026-01-01Z', '2026-01-01Z')")
    db.execute("UPDATE items SET price = 20, updated_at = '2026-02-01Z'")
    rows = db.execute("SELECT valid_from, price::float8 FROM item_history ORDER BY 1").fetchall()
    assert rows == [(datetime(2026, 1, 1, tzinfo=UTC), 25), (datetime(2026, 2, 1, tzinfo=UTC), 20)]


# The reader ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [1_000, 100_000])
def test_twenty_thousand_lines_are_those_that_postgresql_counts(db, url, tmp_path, batch_rows):
    fill(db, 5_001)
    events, catalog = read(url, tmp_path, batch_rows)
    lines = db.execute("SELECT count(*) FROM order_items").fetchone()[0]
    parts = sorted((tmp_path / "order_items").iterdir())
    sizes = [pl.scan_parquet(p).select(pl.len()).collect().item() for p in parts]
    assert lines > 20_000 and sum(sizes) == lines and max(sizes) <= batch_rows and len(sizes) == -(-lines // batch_rows)
    want = db.execute("""SELECT item_id, count(*), sum(quantity), sum(quantity * price)::float8, count(DISTINCT order_id),
                                floor(extract(epoch FROM min(ordered_at)) * 1000)::bigint, count(*) FILTER (WHERE status = 'cancelled')
                         FROM order_items JOIN orders USING (order_id) GROUP BY 1""").fetchall()
    got = events.group_by("item_id").agg(pl.len(), pl.col("quantity").sum().alias("q"), (pl.col("quantity") * pl.col("price")).sum().round(4),
                                         pl.col("order_id").n_unique(), pl.col("ts").min().dt.epoch("ms"), pl.col("reason").count()).sort("item_id").rows()
    assert got == [(i, n, q, pytest.approx(v), o, ts, c) for i, n, q, v, o, ts, c in sorted(want)]
    assert events["event_id"].n_unique() == lines and events["unread"].null_count() == lines and events["ts"].is_sorted()
    assert events["reason"].drop_nulls().unique().to_list() == ["cancelled order"] and events["row"].to_list() == list(range(1, lines + 1))
    guests = events.filter(pl.col("user_id").str.starts_with("order:"))
    assert guests.height == db.execute("SELECT count(*) FROM order_items JOIN orders USING (order_id) WHERE user_id IS NULL").fetchone()[0]
    assert (guests["user_id"] == "order:" + guests["order_id"]).all()
    assert catalog["category_path"].unique().to_list() == ["Home / Lamps / Desk lamps"] and catalog["available"].all()
    assert catalog.select("item_id", "price").sort("item_id").rows() == sorted((f"i{n}", n * 1.25) for n in range(1, 51))
    for frame, schema in ((events, INTERACTIONS), (catalog, CATALOG)): assert frame.drop(PLACE).schema == pl.Schema(schema.columns)


def test_reading_again_gives_the_same_events(db, url, tmp_path):
    fill(db, 300)
    first, catalog = read(url, tmp_path / "a", 64)
    db.execute("UPDATE items SET stock = stock + 1")
    db.execute("ANALYZE")
    second, again = read(url, tmp_path / "b", 1_000)
    assert first.equals(second) and catalog.equals(again)


def test_an_item_older_than_its_history_is_in_the_catalogue_without_a_price(db, url, tmp_path):
    fill(db)
    db.execute("INSERT INTO items (item_id, title, price, created_at) VALUES ('old', 'Old', 5, '2020-01-01Z')")
    _, catalog = read(url, tmp_path)
    old = catalog.filter(item_id="old")
    assert old["price"].to_list() == [None, 5] and old["valid_from"][0] == datetime(2020, 1, 1, tzinfo=UTC) == old["created_at"][1]
    assert catalog.filter(pl.col("item_id") != "old").height == 50


def test_all_queries_see_one_moment(db, url, tmp_path):
    fill(db)
    with snapshot(url) as conn:
        conn.execute("SELECT 1")
        db.execute("INSERT INTO orders (order_id, user_id) VALUES (99, 'u1')")
        db.execute("INSERT INTO order_items VALUES (99, 1, 'i1', 1, 1)")
        assert conn.execute("SELECT count(*) FROM orders WHERE order_id = 99").fetchone() == (0,)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction): conn.execute("DELETE FROM order_items")
    assert "order:99:1" in read(url, tmp_path)[0]["event_id"].to_list()


def test_a_role_that_cannot_see_people_can_read_everything_else(db, url, tmp_path):
    fill(db)
    db.execute("DROP ROLE IF EXISTS recommender")
    db.execute("CREATE ROLE recommender LOGIN PASSWORD 'reads'")
    db.execute("GRANT SELECT ON orders, order_items, items, item_history, categories TO recommender")
    try:
        parts = urlsplit(url)
        mine = parts._replace(netloc=f"recommender:reads@{parts.hostname}:{parts.port}").geturl()
        assert read(mine, tmp_path)[0].height == db.execute("SELECT count(*) FROM order_items").fetchone()[0]
        db.execute("REVOKE SELECT ON item_history FROM recommender")
        assert "permission denied for table item_history" in refusal(mine, tmp_path / "again")
    finally:
        db.execute("DROP OWNED BY recommender")
        db.execute("DROP ROLE recommender")


# What can go wrong --------------------------------------------------------------------------------------------------


def refusal(url: str, scratch: Path) -> str:
    """The message, which comes within seconds and never holds the password."""
    began = time.monotonic()
    with pytest.raises(SourceError) as e: read(url, scratch)
    assert time.monotonic() - began < 8 and (urlsplit(url).password or "-") not in str(e.value)
    return str(e.value)


def test_a_server_that_is_not_there_or_a_password_that_is_wrong(url, tmp_path):
    parts = urlsplit(url)
    for netloc, said in ((f"test:seCret@{parts.hostname}:1", ":1/"), (f"{parts.username}:seCret@{parts.hostname}:{parts.port}", "password"),
                         (f"test:se@Cret@{parts.hostname}:{parts.port}", "%40"), (f"test:12/Cret@{parts.hostname}:{parts.port}", "%2F")):
        message = refusal(parts._replace(netloc=netloc).geturl(), tmp_path / "x")
        assert said in message and "Cret" not in message, message
    assert 'database "nowhere" does not exist' in refusal(parts._replace(path="/nowhere").geturl(), tmp_path / "x")


@pytest.mark.parametrize("statement, said", [
    ("DROP TABLE item_history", 'relation "item_history" does not exist; data/schema/postgres_schema.sql'),
    ("ALTER TABLE order_items RENAME price TO cost", "column l.price does not exist; data/schema/postgres_schema.sql"),
    ("DELETE FROM order_items", "table order_items has no rows"),
    ("UPDATE categories SET parent_id = '3' WHERE category_id = '1'", "table categories: a cycle: 1 → 3 → 2 → 1"),
])
def test_a_database_that_is_not_as_it_should_be(db, url, tmp_path, statement, said):
    fill(db)
    db.execute(statement)
    assert said in refusal(url, tmp_path)


def test_a_locked_table_is_an_error_and_not_a_night_of_waiting(db, url, tmp_path):
    fill(db)
    with db.transaction():
        db.execute("LOCK TABLE orders")
        assert "lock" in refusal(url, tmp_path)


def test_a_server_that_stops_in_the_middle_is_an_error(db, url, tmp_path):
    fill(db, 2_000)
    with pytest.raises(SourceError, match="cannot be read"), snapshot(url) as conn:
        kill = threading.Timer(0.05, lambda: db.execute("SELECT pg_terminate_backend(%s)", (conn.info.backend_pid,)))
        kill.start()
        fetch(conn, ORDERS.replace("FROM orders", ", pg_sleep(0.01) FROM orders"), dict.fromkeys("abcdefghi", pl.String), tmp_path / "t", 10)
    kill.join()


# The loader ---------------------------------------------------------------------------------------------------------


def test_a_loaded_shop_comes_back_as_its_files_say(server, tmp_path):
    sim = simulate(60, 40, 4_000, days=30, end=datetime(2026, 5, 1, tzinfo=UTC), seed=1)
    write_shop(sim, tmp_path / "shop")
    with database(server) as url:
        run = [sys.executable, ROOT / "data" / "generators" / "load_postgres.py", "--path", tmp_path / "shop"]
        done = [subprocess.run(run, cwd=ROOT, env=os.environ | {"RECO_POSTGRES_URL": url}, capture_output=True, text=True) for _ in range(2)]
        assert [d.returncode for d in done] == [0, 0], done
        assert "40 items, 60 shoppers" in done[0].stdout and "nothing was changed" in done[1].stdout
        events, catalog = read(url, tmp_path / "scratch")
    bought = sim.interactions.filter(pl.col("event") == "transaction")
    by = ["ts", "user_id", "item_id", "quantity", "price"]
    assert bought.height > 20 and events.select(by).sort(by).equals(bought.select(by).sort(by))
    baskets = [sorted(f.group_by("order_id").agg(pl.col("item_id").sort())["item_id"].to_list()) for f in (events, bought)]
    assert baskets[0] == baskets[1]
    shown = ["item_id", "valid_from", "title", "category_id", "category_path", "price", "discount", "margin", "available", "created_at"]
    whole = [f.select(shown).sort("item_id", "valid_from").with_columns(pl.col("price").round(2), pl.col("discount", "margin").round(4))
             for f in (catalog, sim.catalog)]
    assert whole[0].equals(whole[1])
