"""What the lake holds: tables with rows, size and snapshot; batches that came in; rows that were set aside, with the reason."""
import json
from datetime import UTC, datetime

import altair as alt
import polars as pl
import streamlit as st
from deltalake import DeltaTable

from app.parts.charts import HEIGHT, ORANGE, bars, drawn
from app.parts.page import TTL_S, lake, nothing_yet, read, settings, tables
from reco.data.lake import Lake
from reco.data.quality import given_of
from reco.data.storage import ident, opened, parts
from reco.settings import Quality

ABOUT = { # table → what it holds, what writes it
    "interactions": ("what shoppers did", "`make ingest`, `python -m app.consumer`"), "catalog": ("what the shop says of its items, and since when", "`make ingest`"),
    "exposures": ("every item of every list that was answered", "`python -m app.consumer`"), "batches": ("every batch that came in, with what its gate found", "`make ingest`"),
    "quarantine": ("rows that were set aside, with the reason", "`make ingest`"), "erased": ("digests of shoppers who asked to be forgotten", "`python -m app.erase`"),
    "kpis": ("what the lists earned, by day", "`make kpis`"), "variety": ("how varied lists were, by day", "`make kpis`"), "retention": ("who came back, by day", "`make kpis`"),
    "readouts": ("what experiments say", "`make kpis`"), "drift": ("how far data moved from what the model knows", "`make monitor`"), "verdicts": ("whether to train again, and why", "`make monitor`"),
    "skew": ("whether logged scores can be made again", "`make monitor`"), "skew_excluded": ("lists that were left out of that, and why", "`make monitor`"),
    "retrains": ("trainings that the monitoring asked for", "`make monitor`"), "batch_lists": ("lists of all shoppers, made at once", "`make batch`"),
    "batch_parts": ("how far such a run is", "`make batch`"), "activated": ("which features the online store has", "`make materialize`"), "what_ifs": ("what other explorations would have earned", "`make whatif`")}
MEANS = {name: (field.description or "").partition(";")[0] for name, field in Quality.model_fields.items()} | {"good_rows": "rows that are good, at least"}
PERSONAL_TABLES = {"erased"} # that nobody needs to look into
TIMES = "ts", "at", "valid_from", "made", "day", "cohort" # columns by which a table is old or new, the first that it has

# ---- the tables ----------------------------------------------------------------------------------------------------

def newest(
    at: Lake,
    name: str,
) -> str: # as text: moments and days both; empty for a table without a time
    "The newest moment of a table."
    rows = at.read(name)
    column = next((c for c in TIMES if c in rows.collect_schema()), None)
    found = rows.select(pl.col(column).max()).collect().item() if column else None
    return "" if found is None else f"{found:%Y-%m-%d %H:%M}" if isinstance(found, datetime) else f"{found:%Y-%m-%d}"

def table_of(at: Lake, name: str) -> DeltaTable: # of `tables`
    assert (table := opened(at, name)) is not None, name
    return table

@st.cache_data(ttl=TTL_S, show_spinner="Looking through the lake …")
def inventory(root: str) -> pl.DataFrame: # table, about, by, rows, bytes, files, snapshot, at, newest
    "Every table as it is now."
    here, found = lake(), []
    for name in here.tables():
        now = table_of(here, name)
        files = parts(now)
        found.append({"table": name, "about": ABOUT.get(name, ("", ""))[0], "by": ABOUT.get(name, ("", ""))[1].replace("`", ""), "rows": files["rows"].sum(), "mb": float(files["bytes"].sum())/1e6,
                      "files": files.height, "snapshot": ident(now), "at": datetime.fromtimestamp(now.history(1)[0]["timestamp"]/1000, UTC), "newest": newest(here, name)})
    return pl.DataFrame(found, schema_overrides={"at": pl.Datetime("ms", "UTC")})

@st.cache_data(ttl=TTL_S, show_spinner=False)
def snapshots(root: str, name: str) -> pl.DataFrame: # snapshot, at, did; newest first, the last twenty
    "The states that a table went through."
    now = table_of(lake(), name)
    rows = [{"snapshot": f"{h['version']}-{str(now.metadata().id)[:8]}", "at": datetime.fromtimestamp(h["timestamp"]/1000, UTC), "did": str(h.get("operation", "")).lower()} for h in now.history(20)]
    return pl.DataFrame(rows, schema={"snapshot": pl.String, "at": pl.Datetime("ms", "UTC"), "did": pl.String})

def some(table: pl.LazyFrame, n: int) -> pl.LazyFrame: # rows, those with the newest time first; without columns of bytes
    columns = table.collect_schema()
    shown = table.select(c for c, t in columns.items() if t != pl.Binary)
    column = next((c for c in TIMES if c in columns), None)
    return shown.top_k(n, by=column) if column else shown.head(n)

def show_lake() -> None:
    "The tab of the lake."
    st.subheader("Tables of the lake")
    if not tables():
        nothing_yet(f"The lake in `{settings().lake_root}` is empty.", "`make demo` simulates a shop and fills it", "`make ingest` reads your own data")
        return
    st.caption("Every write is whole or absent and makes a new **snapshot**: a state with a name that can be read again later. Every training notes which snapshots it was made from.")
    frame = inventory(settings().lake_root)
    with st.container(horizontal=True):
        for label, value in (("Tables", f"{frame.height}"), ("Rows", f"{frame['rows'].sum():,}"), ("Size", f"{frame['mb'].sum():,.1f} MB")): st.metric(label, value, border=True)
    st.dataframe(frame, hide_index=True, width="stretch", alt="Every table of the lake", placeholder="–", column_order=["table", "rows", "newest", "at", "snapshot", "mb", "files", "about", "by"], column_config={
        "table": st.column_config.TextColumn("Table", pinned=True), "about": st.column_config.TextColumn("Holds", width="medium"), "by": st.column_config.TextColumn("Written by"),
        "rows": st.column_config.NumberColumn("Rows", format="localized"), "mb": st.column_config.NumberColumn("Size, MB", format="%.2f"), "files": st.column_config.NumberColumn(
            "Files", help="Many small files make reading slow: `python flows/upkeep.py run` puts them together"),
        "snapshot": st.column_config.TextColumn("Snapshot", help="Name of the newest state"), "at": st.column_config.DatetimeColumn("Written (UTC)", format="D MMM YYYY, HH:mm", timezone="UTC"),
        "newest": st.column_config.TextColumn("Newest (UTC)", help="The newest moment or day that the table knows of")})
    name = st.selectbox("Table to look into", frame["table"].to_list(), key="table", persist_state="page", index=max(0, frame["table"].index_of("interactions") or 0))
    left, right = st.columns([3, 2])
    with left:
        st.markdown("**Newest rows**")
        if name in PERSONAL_TABLES: st.caption("Nothing to see: only digests are kept, so that what is erased stays erased.")
        else: st.dataframe(read(name, some, 50), hide_index=True, width="stretch", height=320, alt=f"The newest rows of {name}", placeholder="")
    with right:
        st.markdown("**Snapshots**")
        st.dataframe(snapshots(settings().lake_root, name), hide_index=True, width="stretch", height=320, alt=f"Snapshots of {name}", column_config={
            "snapshot": "Snapshot", "at": st.column_config.DatetimeColumn("Made (UTC)", format="D MMM, HH:mm", timezone="UTC"), "did": "By"})
    st.code(f'from reco.data.lake import open_lake\nfrom reco.settings import load_settings\n\nopen_lake(load_settings()).read("{name}", "{snapshots(settings().lake_root, name)["snapshot"][0]}")'
            "  # this state, for as long as it is kept", language="python")

# ---- batches and quarantine ----------------------------------------------------------------------------------------

def by_reason(table: pl.LazyFrame) -> pl.LazyFrame: # table, reason, n, last
    return table.group_by("table", "reason").agg(n=pl.len(), last=pl.col("at").max()).sort("n", "reason", descending=[True, False])

def aside_by_day(table: pl.LazyFrame) -> pl.LazyFrame: # day, n
    return table.group_by(day=pl.col("at").dt.date()).agg(n=pl.len()).sort("day")

def set_aside(table: pl.LazyFrame, reason: str, n: int) -> pl.LazyFrame: # of QUARANTINE, newest first
    return (table.filter(pl.col("reason") == reason) if reason else table).top_k(n, by="at").sort("at", "file", "row", descending=[True, False, False])

def batches(table: pl.LazyFrame) -> pl.LazyFrame: # of BATCHES, newest first
    return table.drop("profile", strict=False).sort("at", descending=True).head(100)

def shown_of(
    record: str, # a row as JSON
) -> str:
    "What a row held, without what names a person; as it stands where it cannot be read."
    try: return given_of(record)
    except (ValueError, KeyError, TypeError, AttributeError): return ""

def show_quarantine() -> None:
    "The tab of what was refused."
    st.subheader("Set aside")
    st.caption("Every row that comes in is held to named rules. A bad row never reaches the tables: it is set aside here with the rule that it broke. A batch with too many bad rows is "
               "refused as a whole, and the lake stays as it was.")
    reasons = read("quarantine", by_reason) if "quarantine" in tables() else None
    if reasons is None: nothing_yet("Nothing was set aside: no batch was ingested yet.", "`make ingest` judges every row of a batch")
    elif reasons.is_empty(): st.success("Nothing was set aside: every row so far was good.", icon=":material/check_circle:")
    else:
        st.markdown(f"**{reasons['n'].sum():,} rows** were set aside for {reasons.height} reasons; most often: {reasons['reason'][0]} ({reasons['n'][0]:,}).")
        left, right = st.columns(2)
        with left: drawn(bars(reasons.head(12).select(name=pl.col("reason") + " (" + pl.col("table") + ")", x="n"), "rows set aside", "~s"), "Rows that were set aside, by reason.")
        with right: drawn(alt.Chart(read("quarantine", aside_by_day)).mark_bar(color=ORANGE).encode(
            x=alt.X("day:T", timeUnit="yearmonthdate", title="day of the ingestion (UTC)", axis=alt.Axis(format="%-d %b", labelOverlap=True)), y=alt.Y("n:Q", title="rows set aside"),
            tooltip=["day:T", alt.Tooltip("n:Q", title="rows", format=",")]).properties(height=HEIGHT), "Rows that were set aside, by day.")
        reason = st.selectbox("Reason", ["", *reasons["reason"].unique(maintain_order=True)], format_func=lambda r: r or "all reasons", key="reason")
        rows = read("quarantine", set_aside, reason, 200)
        st.dataframe(rows.select("at", "reason", "table", "file", "row", given=pl.Series([shown_of(r) for r in rows["record"]], dtype=pl.String)), hide_index=True, width="stretch",
                     alt="Rows that were set aside, newest first", column_config={
            "at": st.column_config.DatetimeColumn("Set aside (UTC)", format="D MMM YYYY, HH:mm", timezone="UTC"), "reason": "Rule", "table": "Meant for", "file": "File",
            "row": st.column_config.NumberColumn("Row", help="As an editor shows it: 2 is the first row of a CSV file"),
            "given": st.column_config.TextColumn("Given", width="large", help="What could not be read, or the row without what names a person")})
    stream = settings().stream
    st.caption(f"Events that the stream could not use wait in its dead letters, `{stream.dead_letters}`, for {stream.dead_letter_days:g} days.")
    show_batches()

def show_batches() -> None:
    "Every batch, and the gate of one of them."
    st.subheader("Batches")
    frame = read("batches", batches) if "batches" in tables() else pl.DataFrame()
    if frame.is_empty():
        nothing_yet("No batch has come in yet.", "`make ingest` reads one, judges it, and writes its line here")
        return
    frame = frame.with_columns(aside=pl.col("rows") - pl.col("good"), warned=pl.Series([sum(not g["passed"] for g in json.loads(t)) for t in frame["gate"]], dtype=pl.Int64))
    st.dataframe(frame, hide_index=True, width="stretch", alt="Batches that came in, newest first", placeholder="–",
                 column_order=["at", "source", "rows", "aside", "warned", "users", "items", "catalog", "first", "last"], column_config={
        "at": st.column_config.DatetimeColumn("Came in (UTC)", format="D MMM YYYY, HH:mm", timezone="UTC"), "source": "Source", "rows": st.column_config.NumberColumn("Events", format="localized"),
        "aside": st.column_config.NumberColumn("Set aside", format="localized"), "warned": st.column_config.NumberColumn("Warnings", help="Constraints that did not hold without refusing the batch"),
        "users": st.column_config.NumberColumn("Shoppers", format="localized"), "items": st.column_config.NumberColumn("Items", format="localized"),
        "catalog": st.column_config.NumberColumn("Catalogue rows", format="localized"),
        "first": st.column_config.DatetimeColumn("First event", format="D MMM YYYY", timezone="UTC"), "last": st.column_config.DatetimeColumn("Last event", format="D MMM YYYY", timezone="UTC")})
    one = st.selectbox("What the gate found in the batch of", range(frame.height), format_func=lambda n: f"{frame['at'][n]:%d %b %Y, %H:%M} · {frame['source'][n]}", key="batch")
    found = pl.DataFrame(json.loads(frame["gate"][one]))
    st.dataframe(found.select(result=pl.when("passed").then(pl.lit("✓ held")).otherwise(pl.lit("✗ did not hold")), constraint="constraint", means=pl.col("constraint").replace_strict(MEANS, default=""), table="table", value="value", limit="limit", severity="severity"),
                 hide_index=True, width="stretch", height="content", alt="What the gate found in the batch", column_config={
        "result": st.column_config.TextColumn("Result", pinned=True), "constraint": st.column_config.TextColumn("Constraint", help="Limits are in [quality] of settings.ini"), "table": "Of", "means": st.column_config.TextColumn("Means", width="medium"),
        "value": st.column_config.NumberColumn("Found", format="%.4g"), "limit": st.column_config.NumberColumn("Limit", format="%.4g"),
        "severity": st.column_config.TextColumn("Otherwise", help="error refuses the batch, warn reports it")})
