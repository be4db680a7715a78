"""What shoppers did: how much of it by day and kind, and the latest of it, of anybody, of one shopper, of one item."""
from datetime import date, timedelta
from typing import Any

import altair as alt
import polars as pl
import streamlit as st

from app.parts.charts import BLUE, GREEN, HEIGHT, ORANGE, PURPLE, SKY, drawn
from app.parts.page import described, nothing_yet, read, tables
from reco.schemas import EVENTS

DID = {"impression": "shown", "click": "clicked", "view": "viewed", "addtocart": "put in the cart", "transaction": "bought"}
HUES = dict(zip(DID.values(), (SKY, PURPLE, BLUE, ORANGE, GREEN), strict=True))
DAYS, LATEST = 28, 200 # that are looked at first; rows that are listed

# ---- what is read of the lake: the table is never collected as a whole ---------------------------------------------

def chosen(
    table: pl.LazyFrame, # INTERACTIONS
    first: date|None, last: date|None, # days, both included; None: from the beginning, to the end
    events: tuple[str, ...],           # kinds; empty: all
    user_id: str, item_id: str,        # empty: anybody, anything
) -> pl.LazyFrame:
    "The events that are asked for."
    if first: table = table.filter(pl.col("ts") >= pl.lit(first).cast(pl.Datetime("ms", "UTC")))
    if last: table = table.filter(pl.col("ts") < pl.lit(last + timedelta(days=1)).cast(pl.Datetime("ms", "UTC")))
    if events: table = table.filter(pl.col("event").cast(pl.String).is_in(events))
    if user_id: table = table.filter(pl.col("user_id") == user_id)
    return table.filter(pl.col("item_id") == item_id) if item_id else table

def span(table: pl.LazyFrame) -> pl.LazyFrame: return table.select(first=pl.col("ts").min(), last=pl.col("ts").max())

def counted(table: pl.LazyFrame, *asked: Any) -> pl.LazyFrame: # day, event, n
    return chosen(table, *asked).group_by(day=pl.col("ts").dt.date(), event=pl.col("event").cast(pl.String)).agg(n=pl.len()).sort("day", "event")

def distinct(table: pl.LazyFrame, *asked: Any) -> pl.LazyFrame: # shoppers, items
    return chosen(table, *asked).select(shoppers=pl.col("user_id").n_unique(), items=pl.col("item_id").n_unique())

def latest(table: pl.LazyFrame, n: int, *asked: Any) -> pl.LazyFrame: # of INTERACTIONS, newest first
    return chosen(table, *asked).top_k(n, by="ts").sort("ts", "event_id", descending=True)

# ---- what is drawn -------------------------------------------------------------------------------------------------

def by_day(
    frame: pl.DataFrame, # of `counted`
) -> alt.Chart:
    "Events by day, stacked by kind."
    frame = frame.with_columns(did=pl.col("event").replace(DID), place=pl.col("event").replace_strict({e: n for n, e in enumerate(EVENTS)}, default=0))
    known = [d for d in HUES if d in frame["did"]]
    colour = alt.Color("did:N", title=None, scale=alt.Scale(domain=known, range=[HUES[d] for d in known]), legend=alt.Legend(orient="bottom", columns=3))
    return alt.Chart(frame).mark_bar().encode(
        x=alt.X("day:T", timeUnit="yearmonthdate", title="day (UTC)", axis=alt.Axis(format="%-d %b", labelOverlap=True)), y=alt.Y("n:Q", title="events per day", axis=alt.Axis(format=",d", tickMinStep=1)),
        color=colour, order="place:Q", tooltip=[alt.Tooltip("day:T", format="%a %-d %b %Y"), alt.Tooltip("did:N", title="kind"), alt.Tooltip("n:Q", title="events", format=",")]).properties(height=HEIGHT + 70) # axis and legend are within

def listed(
    rows: pl.DataFrame, # of `latest`
) -> None:
    "Events as a table."
    titles = described(rows["item_id"].unique(maintain_order=True).to_list()).select("item_id", "title")
    shown = rows.join(titles, on="item_id", how="left", maintain_order="left").select(
        "ts", pl.col("event").cast(pl.String).replace(DID), "user_id", "title", "item_id", "price", "quantity", "order_id", "surface", "request_id", "session_id", "event_id")
    shown = shown.select(c for c in shown.columns if c in ("ts", "event", "user_id", "item_id") or shown[c].null_count() < shown.height) # no empty columns
    st.dataframe(shown, hide_index=True, width="stretch", alt="The latest events", placeholder="", column_config={
        "ts": st.column_config.DatetimeColumn("When (UTC)", format="D MMM YYYY, HH:mm:ss", timezone="UTC", pinned=True), "event": "Did", "user_id": "Shopper",
        "title": st.column_config.TextColumn("Item", width="medium"), "item_id": "Item id", "price": st.column_config.NumberColumn("Price", format="%.2f"),
        "quantity": "Pieces", "order_id": st.column_config.TextColumn("Order", help="Items with one order id were one basket"),
        "surface": st.column_config.TextColumn("Surface", help="Which list of the shop showed it"),
        "request_id": st.column_config.TextColumn("List", help="The recommendation that showed the item: what comes of it is credited to that list"),
        "session_id": st.column_config.TextColumn("Visit", help="Events without a pause of half an hour"), "event_id": "Event id"})

def asked_for(
    first: date, last: date, # of the whole log
) -> tuple[date, date, tuple[str, ...], str, str]|None: # days, kinds, shopper, item; None while only one day is picked
    "The controls."
    left, middle, right = st.columns([2, 1.5, 1.5])
    with left: days = st.date_input("Days (UTC)", (max(first, last - timedelta(days=DAYS - 1)), last), first, last, key="days", persist_state="page", format="YYYY-MM-DD")
    with middle: user_id = st.text_input("Shopper", key="shopper", persist_state="page", placeholder="anybody", max_chars=200, help="The shop's own id, exactly").strip()
    with right: item_id = st.text_input("Item", key="of_item", persist_state="page", placeholder="anything", max_chars=200, help="The shop's own id, exactly; the catalogue finds it by title").strip()
    kinds = st.pills("Kinds", EVENTS, selection_mode="multi", format_func=DID.__getitem__, key="kinds", persist_state="page", help="None picked is all of them")
    if not isinstance(days, tuple) or len(days) != 2: return None
    return days[0], days[1], tuple(kinds or ()), user_id, item_id

def show_events() -> None:
    "The tab of the events."
    st.subheader("Events")
    if "interactions" not in tables():
        nothing_yet("The lake has no events yet.", "`make demo` simulates a shop", "`make ingest` reads your own", "`python -m app.consumer` writes down what the endpoint is told")
        return
    first, last = read("interactions", span).row(0)
    if first is None:
        nothing_yet("The lake's table of events is empty.", "`make ingest` reads your own")
        return
    if (asked := asked_for(first.date(), last.date())) is None:
        st.caption("Pick the last day too.")
        return
    counts = read("interactions", counted, *asked)
    if counts.is_empty():
        st.info("No events fit. Ids have to be exact; more days may help.", icon=":material/search_off:")
        return
    who = read("interactions", distinct, *asked).row(0, named=True)
    bought = counts.filter(event="transaction")["n"].sum()
    with st.container(horizontal=True):
        for label, n in (("Events", counts["n"].sum()), ("Shoppers", who["shoppers"]), ("Items", who["items"]), ("Items bought", bought)): st.metric(label, f"{n:,}", border=True)
    days = counts.group_by("day").agg(pl.col("n").sum()).sort("n", "day", descending=[True, False])
    st.markdown(f"**{days['n'].sum()/days.height:,.0f} events a day**, the most on {days['day'][0]:%d %B %Y} ({days['n'][0]:,})." if days.height > 1 else f"**All on {days['day'][0]:%d %B %Y}.**")
    drawn(by_day(counts), "Events per day, stacked by what was done.")
    rows = read("interactions", latest, LATEST, *asked)
    st.markdown(f"**The latest {rows.height:,}**" if counts["n"].sum() > rows.height else "**All of them, newest first**")
    listed(rows)
