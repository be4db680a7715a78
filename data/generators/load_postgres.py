"""Load a shop's files into PostgreSQL, to try `--source postgres`: `python data/generators/load_postgres.py --help`.

Reads the simulated shop, or any files of that kind, and fills an empty database with its shoppers, catalogue and orders;
changes of items are replayed, so that the database writes their history itself. Views and carts have no place there.
It all happens in one transaction; a database that already holds orders is left alone.
"""
import argparse
import sys
from pathlib import Path

import polars as pl
import psycopg

from reco.data.files import SourceError, gather, read_files
from reco.data.postgres import server_of
from reco.settings import SettingsError, load_settings

SCHEMA = Path(__file__).parents[1]/"schema"/"postgres_schema.sql"
SHOWN = ["category_id", "title", "description", "brand", "price", "discount", "margin", "stock"]  # what an item's change may change


def category_rows(
    catalog: pl.DataFrame,  # CATALOG
) -> list[tuple]:           # category_id, parent_id, name; parents first
    "The tree that the paths tell of; a category above a leaf gets its path as its id."
    rows = {}
    for leaf, path in catalog.select("category_id", "category_path").drop_nulls().unique().sort("category_path").iter_rows():
        names = path.split(" / ")
        ids = [" / ".join(names[:n]) for n in range(1, len(names))] + [leaf]
        rows |= {c: (c, up, name) for c, up, name in zip(ids, [None, *ids], names, strict=False) if c not in rows}
    return list(rows.values())


def copy(
    conn: psycopg.Connection,
    table: str,          # with its columns
    rows: pl.DataFrame,  # the same columns
) -> None:
    "Add rows the fast way."
    with conn.cursor().copy(f"COPY {table} FROM STDIN") as to:
        for row in rows.iter_rows(): to.write_row(row)


def load_catalog(
    conn: psycopg.Connection,
    catalog: pl.DataFrame,  # CATALOG
) -> None:
    "Categories, then items as they were first, then what changed, oldest first."
    with conn.cursor() as cursor: cursor.executemany("INSERT INTO categories VALUES (%s, %s, %s)", category_rows(catalog))
    stock = pl.when(pl.col("available").fill_null(True)).then(100).otherwise(0)
    rows = catalog.sort("valid_from", "item_id").with_columns(
        pl.col("title").fill_null(pl.col("item_id")), pl.col("price", "discount").fill_null(0), stock=stock)
    is_first = rows["item_id"].is_first_distinct()
    first, later = rows.filter(is_first), rows.filter(~is_first)
    created = pl.min_horizontal("created_at", "valid_from")
    copy(conn, f"items (item_id, created_at, updated_at, {', '.join(SHOWN)})", first.select("item_id", created, "valid_from", *SHOWN))
    with conn.cursor() as cursor:
        cursor.executemany(f"UPDATE items SET updated_at = %s, {', '.join(f'{c} = %s' for c in SHOWN)} WHERE item_id = %s",
                           list(later.select("valid_from", *SHOWN, "item_id").iter_rows()))


def load_orders(
    conn: psycopg.Connection,
    events: pl.DataFrame,  # INTERACTIONS
) -> int:                  # orders
    "Shoppers and their orders, numbered in the order of time; a purchase without an order is one of its own."
    copy(conn, "users (user_id, created_at)", events.group_by("user_id").agg(pl.col("ts").min()).sort("ts", "user_id"))
    bought = events.filter(pl.col("event") == "transaction").with_columns(basket=pl.coalesce("order_id", "event_id")).sort("ts", "basket", "event_id")
    number, line = pl.col("basket").rle_id() + 1, pl.int_range(1, pl.len() + 1).over("basket")
    lines = bought.with_columns(number=number, line=line, quantity=pl.col("quantity").fill_null(1), price=pl.col("price").fill_null(0))
    copy(conn, "orders (order_id, user_id, status, ordered_at)", lines.filter(line=1).select("number", "user_id", pl.lit("delivered"), "ts"))
    copy(conn, "order_items (order_id, line, item_id, quantity, price)", lines.select("number", "line", "item_id", "quantity", "price"))
    conn.execute("SELECT setval(pg_get_serial_sequence('orders', 'order_id'), coalesce(max(order_id), 1)) FROM orders")
    return lines["number"].n_unique()


def load(
    url: str,      # postgresql://user:password@host:port/database
    folder: Path,  # of the files
) -> str:          # what was done, one line
    "Fill the database unless it holds orders; raises `SourceError` for wrong files, `psycopg.Error` for what the database refuses."
    batch, where = read_files(folder), server_of(url)
    events, catalog = gather(batch.events, "interactions"), gather(batch.catalog, "catalog")
    with psycopg.connect(url, connect_timeout=5) as conn:
        conn.execute(SCHEMA.read_text("utf-8").replace("BEGIN;", "").replace("COMMIT;", ""))
        if conn.execute("SELECT EXISTS (SELECT FROM orders)").fetchone()[0]: return f"{where}: holds orders already, nothing was changed"
        load_catalog(conn, catalog)
        orders = load_orders(conn, events)
    return f"{where}: {catalog['item_id'].n_unique():,} items, {events['user_id'].n_unique():,} shoppers, {orders:,} orders"


def main(
    argv: list[str] | None = None,  # the command line; the process's own when not given
) -> int:                           # exit code
    "Run the command; errors go to stderr with exit code 1."
    try:
        settings = load_settings()
        cli = argparse.ArgumentParser(description="Load a shop's files into PostgreSQL. The address is RECO_POSTGRES_URL or [postgres] url.")
        cli.add_argument("--path", type=Path, default=settings.path(settings.data.path), help="folder of the files; default [data] path")
        args, url = cli.parse_args(argv), settings.postgres.url.get_secret_value()
        if not url: raise SourceError("no address: set RECO_POSTGRES_URL or [postgres] url")
        print(load(url, args.path), flush=True)
    except (SettingsError, SourceError, psycopg.Error, OSError) as e:
        print(f"load_postgres: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
