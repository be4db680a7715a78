"""What the shop sells: found by title, id or category, price and stock; one item through time."""
from datetime import datetime
from functools import partial
from html import escape

import altair as alt
import polars as pl
import streamlit as st

from app.parts.charts import BLUE, HEIGHT, RED, Layers, drawn
from app.parts.data.events import DID, by_day, counted, span
from app.parts.page import catalog, nothing_yet, read, tables

LISTED = 200 # items in the table
ANY = "all categories"

def matching(
    items: pl.DataFrame, # of `catalog`
    text: str,           # words, each of which has to be in title, id or category
    category: str,       # or ANY
    low: float|None, high: float|None, # price, after the discount
    stock: str,          # all, in stock or sold out
) -> pl.DataFrame:       # of `catalog`, with `pays`
    "The items that are asked for."
    said = pl.concat_str("title", "item_id", "category", separator=" ", ignore_nulls=True).str.to_lowercase()
    items = items.with_columns(pays=pl.col("price")*(1 - pl.col("discount").fill_null(0)))
    for word in text.lower().split(): items = items.filter(said.str.contains(word, literal=True))
    if category != ANY: items = items.filter(pl.col("category") == category)
    if low is not None: items = items.filter(pl.col("pays") >= low)
    if high is not None: items = items.filter(pl.col("pays") <= high)
    return items if stock == "all" else items.filter(pl.col("available") == (stock == "in stock"))

def asked_for(
    items: pl.DataFrame, # of `catalog`
) -> tuple[str, str, float|None, float|None, str]:
    "The controls."
    first, second = st.columns([3, 2])
    with first: text = st.text_input("Search", key="search", persist_state="page", placeholder="title, id or category", max_chars=200, icon=":material/search:")
    with second: category = st.selectbox("Category", [ANY, *items["category"].drop_nulls().unique().sort()], key="category", persist_state="page")
    one, two, three = st.columns([1, 1, 2])
    with one: low = st.number_input("Price from", min_value=0.0, value=None, key="low", persist_state="page", placeholder="any")
    with two: high = st.number_input("to", min_value=0.0, value=None, key="high", persist_state="page", placeholder="any")
    with three: stock = st.segmented_control("Stock", ["all", "in stock", "sold out"], default="all", required=True, key="stock", persist_state="page")
    return text, category, low, high, stock

def picked(
    item_ids: list[str], # of the table's rows
) -> None:
    "A row that was clicked becomes the item that is looked at."
    if rows := st.session_state["found"]["selection"]["rows"]: st.session_state["item"] = item_ids[rows[0]]

def asked_events(
    item_id: str,
) -> None:
    "The events of an item, in their own tab."
    st.session_state["of_item"], st.session_state["look"] = item_id, "Events"

def show_catalogue() -> None:
    "The tab of the catalogue."
    items = catalog()
    st.subheader("Catalogue")
    if items.is_empty():
        nothing_yet("The lake has no catalogue yet.", "`make demo` simulates a shop", "`make ingest` reads your own", "`PUT /items/v1/ID` tells the endpoint of an item, and the next "
                    "ingestion brings it here")
        return
    st.caption(f"{items.height:,} items in {items['category'].drop_nulls().n_unique():,} categories, {items['available'].sum():,} of them in stock; what is shown is the newest that is known.")
    found = matching(items, *asked_for(items))
    if found.is_empty():
        st.info("Nothing fits. Fewer words or a wider price may help.", icon=":material/search_off:")
        return
    shown = found.head(LISTED)
    st.caption(f"{found.height:,} found" + (f", the first {LISTED} are listed" if found.height > LISTED else "") + ". Click a row to see the item through time.")
    st.dataframe(shown.select("title", "item_id", "category", "price", "discount", "available"), hide_index=True, width="stretch", height=320, key="found", on_select=partial(picked, shown["item_id"].to_list()),
                 selection_mode="single-row", alt="Items that were found", placeholder="–", column_config={
        "title": st.column_config.TextColumn("Title", width="medium"), "item_id": "Id", "category": "Category", "price": st.column_config.NumberColumn("Price", format="%.2f"),
        "discount": st.column_config.NumberColumn("Discount", format="percent", help="Share of the price taken off"), "available": st.column_config.CheckboxColumn("In stock")})
    titles = dict(shown.select("item_id", pl.col("title").fill_null("item")).iter_rows())
    show_item(st.selectbox("Item to look at", list(titles), format_func=lambda i: f"{titles[i]} ({i})", key="item", persist_state="page"))

# ---- one item ------------------------------------------------------------------------------------------------------

def rows_of(table: pl.LazyFrame, item_id: str) -> pl.LazyFrame: return table.filter(pl.col("item_id") == item_id).sort("valid_from") # of CATALOG, oldest first

def facts(
    now: dict, # a row of CATALOG
) -> str:      # HTML
    "What the shop says of an item. It comes from the shop: a title is data, not markup."
    own = {"id": now["item_id"], "category": now["category_path"] or now["category_id"], "brand": now["brand"], "price": now["price"] and f"{now['price']:,.2f}",
           "discount": now["discount"] and f"{now['discount']:.0%}", "in stock": "no" if now["available"] is False else "yes",
           "in the shop since": now["created_at"] and f"{now['created_at']:%d %b %Y}"}
    told = " · ".join(f"{escape(name)} <b>{escape(str(value))}</b>" for name, value in own.items() if value)
    about = f'<p style="margin:.4rem 0 0; opacity:.8; overflow-wrap:anywhere">{escape(now["description"][:600])}</p>' if now["description"] else ""
    return f'<h3 style="padding:0; overflow-wrap:anywhere">{escape(now["title"] or "Item " + now["item_id"])}</h3><p style="margin:0; overflow-wrap:anywhere">{told}</p>{about}'

def through_time(
    rows: pl.DataFrame, # CATALOG of one item, oldest first
    until: datetime,    # the newest that the lake knows
) -> Layers:
    "Price after the discount, with the days on which it was sold out."
    frame = rows.select("valid_from", pays=pl.col("price")*(1 - pl.col("discount").fill_null(0)), list="price", stock=pl.col("available").fill_null(True))
    frame = frame.with_columns(to=pl.col("valid_from").shift(-1).fill_null(max(until, *frame["valid_from"])))
    ends = pl.concat([frame, frame.tail(1).with_columns(valid_from="to")])
    x = alt.X("valid_from:T", title="day (UTC)", axis=alt.Axis(format="%-d %b", labelOverlap=True))
    out = alt.Chart(frame.filter(~pl.col("stock"))).mark_rect(color=RED, opacity=.18).encode(x=x, x2="to:T", tooltip=[alt.Tooltip("valid_from:T", title="sold out from"), alt.Tooltip("to:T")])
    line = alt.Chart(ends).mark_line(interpolate="step-after", color=BLUE).encode(x=x, y=alt.Y("pays:Q", title="price after the discount", scale=alt.Scale(zero=True)))
    dots = alt.Chart(frame).mark_point(filled=True, size=50, color=BLUE).encode(x=x, y="pays:Q", tooltip=[
        alt.Tooltip("valid_from:T", title="from"), alt.Tooltip("pays:Q", title="price", format=",.2f"), alt.Tooltip("list:Q", title="before the discount", format=",.2f"), "stock:N"])
    return alt.layer(out, line, dots).properties(height=HEIGHT + 20)

def changed(
    rows: pl.DataFrame, # CATALOG of one item, oldest first
) -> bool:
    "Whether price or stock ever did."
    return rows.select("price", "discount", "available").unique().height > 1

def show_item(
    item_id: str,
) -> None:
    "One item through time."
    rows = read("catalog", rows_of, item_id)
    ends = read("interactions", span).row(0) if "interactions" in tables() else (None, None)
    st.html(facts(rows.row(-1, named=True)))
    if rows["price"].null_count() == rows.height: st.caption("The shop never said a price.")
    elif not changed(rows): st.caption(f"Price and stock have not changed since {rows['valid_from'][0]:%d %b %Y}.")
    else:
        st.markdown("**Price and stock.** " + ("Shaded: sold out." if rows["available"].eq(False).any() else "It was never sold out."))
        drawn(through_time(rows, ends[1] or rows["valid_from"][-1]), "Price of the item after its discount through time, with the days on which it was sold out.")
    counts = read("interactions", counted, None, None, (), "", item_id) if ends[1] else pl.DataFrame()
    if counts.is_empty():
        st.caption("Nobody has done anything with it yet: its text and its category are what recommends it.")
        return
    total = dict(counts.group_by("event").agg(pl.col("n").sum()).iter_rows())
    st.markdown("**What shoppers did with it:** " + ", ".join(f"{total[e]:,} × {did}" for e, did in DID.items() if e in total) + ".")
    drawn(by_day(counts), "Events of the item per day, stacked by what was done.")
    st.button("See these events one by one", icon=":material/list:", on_click=asked_events, args=(item_id,), key="its_events")
