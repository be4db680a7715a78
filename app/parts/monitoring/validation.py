"""What came in: batches of the last ingestions, the constraints that they were held to, and rows that were set aside."""
import json

import polars as pl
import streamlit as st

from app.parts.business.tables import below
from app.parts.charts import bars, drawn
from app.parts.page import nothing_yet, read, settings, since, tables
from app.parts.wording import count, percent, plain

HOW = "`make ingest` takes a batch into the lake, or refuses it"
LAST, SHOWN = 30, 12 # batches in the table; in the chart
GATE = {"table": pl.String, "constraint": pl.String, "value": pl.Float64, "limit": pl.Float64, "severity": pl.String, "passed": pl.Boolean}

def newest(table: pl.LazyFrame, n: int) -> pl.LazyFrame: return table.drop("profile", strict=False).sort("at", "batch_id", descending=True).head(n)

def by_reason(table: pl.LazyFrame) -> pl.LazyFrame: # reason, table, rows, last; of all that is kept
    return table.group_by("table", "reason").agg(rows=pl.len().cast(pl.Int64), last=pl.col("at").max(), file=pl.col("file").first(), row=pl.col("row").first()).sort("rows", "table", "reason", descending=[True, False, False])

def gate_of(
    text: str, # JSON, as the batch's line has it
) -> pl.DataFrame: # GATE; empty for what cannot be read
    try: return pl.DataFrame(json.loads(text), schema=GATE)
    except (ValueError, TypeError, pl.exceptions.PolarsError): return pl.DataFrame(schema=GATE)

def meaning(constraint: str) -> str:
    "What the settings say of it."
    field = type(settings().quality).model_fields.get(constraint)
    return (field.description or "").partition(";")[0] if field else "rows that are good, at least" if constraint == "good_rows" else ""

def batches() -> None:
    "The last batches: how much, and how much of it was good."
    st.markdown("##### The last batches")
    if "batches" not in tables(): return nothing_yet("No batch was taken in yet.", HOW)
    rows = read("batches", newest, LAST)
    last = rows.row(0, named=True)
    aside, held = last["rows"] - last["good"], gate_of(last["gate"])
    broken = held.filter(~pl.col("passed"))
    said = f"The newest came {since(last['at'])}: {count(last['rows'], 'event')}, {percent(aside/last['rows'] if last['rows'] else 0, 2)} set aside"
    if broken.height: st.warning(f"{said}. {count(broken.height, 'constraint')} did not hold: {plain(', '.join(broken['constraint']))}.", icon=":material/rule:")
    else: st.success(f"{said}; all {held.height} constraints held.", icon=":material/check:")
    drawable = rows.head(SHOWN).sort("at").with_columns(name=pl.col("at").dt.strftime("%-d %b %H:%M"), aside=pl.col("rows") - pl.col("good"))
    parts = drawable.select("name", "good", "aside").unpivot(index="name", variable_name="part", value_name="x").with_columns(pl.col("part").replace({"good": "in the lake", "aside": "set aside"}))
    st.markdown(f"###### {drawable['good'].sum():,} of {drawable['rows'].sum():,} events of {'the last ' if drawable.height > 1 else ''}{count(drawable.height, 'batch', 'batches')} are in the lake")
    drawn(bars(parts, "events", ",.0f", None), f"Events of the last {drawable.height} batches, in the lake and set aside")
    below(rows, "batches")
    constraints(held)

def constraints(
    held: pl.DataFrame, # GATE
) -> None:
    "The newest batch at the gate."
    with st.expander("What the newest batch was held to", icon=":material/rule:", expanded=held.filter(~pl.col("passed")).height > 0):
        table = held.select(Held=pl.when("passed").then(pl.lit("yes")).when(pl.col("severity") == "error").then(pl.lit("no: refused")).otherwise(pl.lit("no: warning")), Table="table", Constraint="constraint",
                            Found="value", Limit="limit", About=pl.col("constraint").replace_strict({c: meaning(c) for c in held["constraint"].unique()}, default="", return_dtype=pl.String))
        st.dataframe(table, hide_index=True, width="stretch", column_config={c: st.column_config.NumberColumn(format="%.4g") for c in ("Found", "Limit")}, alt="constraints of the newest batch")
        st.caption("A constraint of the kind error refuses the whole batch, and the lake stays as it was; a warning is only said. The limits are [quality] in settings.ini.")

def quarantine() -> None:
    "What was set aside, and why."
    st.markdown("##### Quarantine: rows that were set aside")
    if "quarantine" not in tables(): return nothing_yet("Nothing was ever set aside.", HOW)
    rows = read("quarantine", by_reason)
    if not rows.height:
        st.success("Nothing is in quarantine: every row that came was good.", icon=":material/check:")
        return
    first = rows.row(0, named=True)
    st.markdown(f"###### {count(int(rows['rows'].sum()), 'row')}, most for “{plain(first['reason'])}”")
    named = rows.select(name=pl.format("{} ({})", "reason", "table"), x="rows").head(SHOWN)
    drawn(bars(named, "rows", ",.0f"), f"Rows in quarantine by reason; most for {first['reason']}")
    st.caption(f"Bad rows of an accepted batch are kept for {settings().lake.keep_quarantine_days or 'ever'} days with their file and line, so that they can be put right. The Data page shows them one by one."
               if settings().lake.keep_quarantine_days else "Bad rows of an accepted batch are kept with their file and line, so that they can be put right.")
    below(rows, "quarantine")

def validation() -> None:
    "The tab, top to bottom."
    batches()
    st.divider()
    quarantine()
