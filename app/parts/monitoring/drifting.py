"""Drift by day and column, what it was about, skew between serving and lake, and the retrains that came of it."""
import html
from datetime import date

import altair as alt
import polars as pl
import streamlit as st

from app.parts.business.tables import below
from app.parts.charts import Layers, drawn, over_days
from app.parts.page import lake, nothing_yet, read, settings, tables
from app.parts.wording import count, day, percent, plain
from reco.monitoring.files import read_file

HOW = "`make monitor` compares the last days with what the model learned from (in production it follows each ingestion)"
TABLES = {"events": "what shoppers do", "shoppers": "who the shoppers are", "visits": "how visits go", "catalog": "the catalogue", "rows": "what the ranker is told", "scores": "scores", "lists": "the lists", "served": "what was served"}
MOST_COLUMNS, MOST_DAYS = 18, 30
OUTCOMES = {"asked": "asked for: somebody else trains", "promoted": "trained, and served", "refused": "trained, and refused by the gates", "claimed": "being started", "training": "training now"}
WHY_NOT = {"bundle": "another bundle answered", "variant": "an experiment's variant answered", "visit": "a visit without an id came, and what it sent along is not kept", "context": "the page's item or the cart is not kept",
           "deadline": "a source or the store may have been left out for time", "rows": "feature rows were just being replaced", "kept": "the list was made for an earlier request", "changed": "an item is new or changed since the training"}

def verdicts() -> None:
    "What the last comparison concluded, and what speaks for and against it."
    if "verdicts" not in tables(): return nothing_yet("Nothing has been compared yet.", HOW)
    table = read("verdicts")
    last = table.filter(pl.col("day") == table["day"].max()).sort("asks", "value", "name", descending=[True, True, False], nulls_last=True)
    first = last.row(0, named=True)
    if first["retrain"]: st.warning(f"**{day(first['day'])}: train again.** {plain(first['why'])}", icon=":material/model_training:")
    else: st.success(f"**{day(first['day'])}: no retrain.** {plain(first['why']).capitalize()}", icon=":material/check:")
    rows = last.select(Speaks=pl.when("asks").then(pl.lit("for a retrain")).otherwise(pl.lit("")), What="name", Value="value", Limit="limit", In_words="what").rename({"In_words": "In words"})
    st.dataframe(rows, hide_index=True, width="stretch", column_config={c: st.column_config.NumberColumn(format="%.3g") for c in ("Value", "Limit")}, alt=f"reasons of {first['day']}")
    below(table.sort("day", "name", descending=[True, False]), "verdicts", "All days and CSV")

# ---- drift ----------------------------------------------------------------------------------------------------------

def drift() -> None:
    "Which columns have moved, and when."
    st.markdown("##### Drift: how far each column has moved from what the model learned")
    if "drift" not in tables(): return nothing_yet("No drift has been measured yet.", HOW)
    table = read("drift").with_columns(name=pl.format("{}.{}", "table", "column"))
    shown_days = table["day"].unique().sort().tail(MOST_DAYS)
    recent = table.filter(pl.col("day").is_in(shown_days.implode()), pl.col("excess").is_not_null())
    there = [t for t in TABLES if t in recent["table"].unique().to_list()]
    if not there: return nothing_yet("Nothing could be compared: one of the two sides was empty.", HOW)
    asked = st.pills("Of", ["all", *there], default="all", required=True, format_func=lambda t: "everything" if t == "all" else TABLES[t], key="drift of")
    mine = recent if asked == "all" else recent.filter(pl.col("table") == asked)
    beyond = alarms().filter(pl.col("day").is_in(shown_days.implode()))
    largest = mine.group_by("name").agg(pl.col("excess").max()).with_columns(spoke=pl.col("name").is_in(beyond["name"].unique().implode()))
    most = largest.sort("spoke", "excess", "name", descending=[True, True, False])["name"].head(MOST_COLUMNS).to_list()
    said = count(beyond.select(pl.col("name").n_unique()).item(), "column was", "columns were") + f" beyond limit and chance in {count(len(shown_days), 'day')}"
    st.markdown(f"###### {said}" + (": " + ", ".join(plain(n) for n in beyond["name"].unique().sort().head(3)) if beyond.height else ""))
    drawn(drift_map(mine.filter(pl.col("name").is_in(most)), beyond.filter(pl.col("name").is_in(most)), most), f"Drift of {len(most)} columns on {len(shown_days)} days; {said}")
    st.caption(f"The population stability index (PSI) says how differently values are spread over ten ranges than when the model learned; what chance explains is taken off. 0 is no drift, beyond {settings().monitor.psi:g} "
               "is taken seriously. A white dot: beyond the limit and not by chance, so it spoke for a retrain." + (f" {MOST_COLUMNS} columns are drawn: those that spoke for a retrain first, then those that moved most." if mine["name"].n_unique() > MOST_COLUMNS else ""))
    column(mine, most)
    below(mine.select("day", "table", "column", "psi", "noise", "excess", "chance", "bins", "rows_before", "rows_now", "moved", "bundle").sort("day", "excess", descending=True), f"drift {asked}")

def alarms() -> pl.DataFrame: # day, name (table.column)
    "Columns that spoke for a retrain."
    rows = read("verdicts").filter(pl.col("asks"), pl.col("name").str.starts_with("drift of ")) if "verdicts" in tables() else pl.DataFrame(schema={"day": pl.Date, "name": pl.String})
    return rows.select("day", name=pl.col("name").str.strip_prefix("drift of "))

def drift_map(
    rows: pl.DataFrame,    # day, name, excess, moved
    beyond: pl.DataFrame,  # day, name
    order: list[str],      # of the columns
) -> Layers:
    "Columns by days, in colour; each cell is 0 where chance explains it."
    limit = settings().monitor.psi
    frame = rows.select("day", "name", "excess", "moved").with_columns(shade=pl.col("excess").clip(0, 3*limit), on=pl.col("day").dt.strftime("%-d %b"), moved=pl.col("moved").fill_null("")).sort("day")
    days = frame["on"].unique(maintain_order=True).to_list()
    x, y = alt.X("on:N", title="day", sort=days, axis=alt.Axis(orient="top", labelAngle=0, labelOverlap=True)), alt.Y("name:N", title=None, sort=order, axis=alt.Axis(labelLimit=170))
    tip = [alt.Tooltip("on:N", title="day"), alt.Tooltip("name:N", title="column"), alt.Tooltip("excess:Q", title="PSI beyond chance", format=".2f"), alt.Tooltip("moved:N", title="what moved most")]
    cells = alt.Chart(frame).mark_rect().encode(x=x, y=y, color=alt.Color("shade:Q", title="PSI beyond chance", scale=alt.Scale(range=["#E8EEF4", "#56B4E9", "#0072B2", "#7A1F6B"], domain=[0, limit/2, limit, 3*limit]),
                                                                         legend=alt.Legend(orient="bottom", format=".1f", gradientLength=180)), tooltip=tip)
    dots = alt.Chart(beyond.with_columns(on=pl.col("day").dt.strftime("%-d %b")).select("on", "name")).mark_point(filled=True, color="white", stroke="#333333", strokeWidth=1, size=45, opacity=1).encode(x=x, y=y)
    return alt.layer(cells, *([dots] if beyond.height else [])).properties(height=alt.Step(22))

def column(
    rows: pl.DataFrame, # of `drift`, with `name`
    most: list[str],
) -> None:
    "One column in time."
    name = st.selectbox("Column", most, key="drift column")
    mine = rows.filter(pl.col("name") == name).sort("day")
    last = mine.row(-1, named=True)
    st.markdown(f"###### {plain(name)}: {last['excess']:.2f} on {day(last['day'])}, the limit is {settings().monitor.psi:g}")
    drawn(over_days(mine.select("day", y="excess"), "PSI beyond chance", ".2~f", rule=settings().monitor.psi), f"Drift of {name} by day, with its limit")
    if last["moved"]: st.caption(f"What moved most on {day(last['day'])}: {plain(last['moved'])}, from {last['rows_before']:,} to {last['rows_now']:,} rows.")

# ---- Evidently's page -----------------------------------------------------------------------------------------------

def framed(
    page: str, # HTML
) -> str: # HTML that shows it as a stranger's: it may run its own scripts, and reach nothing of the app
    "Evidently's page draws with scripts, and has words of the shop in it."
    return f'<iframe sandbox="allow-scripts" title="Drift, by Evidently" style="width:100%;height:880px;border:0;background:#fff" srcdoc="{html.escape(page, quote=True)}"></iframe>'

def evidently() -> None:
    "The page of a day, fetched when somebody wants it."
    st.markdown("##### The whole comparison of a day")
    if "drift" not in tables(): return nothing_yet("There is no page yet.", HOW)
    days = read("drift")["day"].unique().sort(descending=True).to_list()
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    with left: chosen: date = st.selectbox("Day", days, format_func=lambda d: f"{d:%-d %b %Y}", key="page of day")
    with right: wanted = st.toggle("Open Evidently's page", key=f"open {chosen}", help="Every column before and now, side by side; some megabytes.")
    if not wanted: return None
    with st.spinner("Fetching the page …"): body = read_file(lake(), f"pages/{chosen}/drift.html")
    if body is None: return nothing_yet(f"The page of {day(chosen)} is not kept: pages stay {settings().monitor.keep_days} days, the numbers above stay for good.", HOW)
    st.download_button("Download the page", body, f"drift_{chosen}.html", "text/html", icon=":material/download:", on_click="ignore")
    st.iframe(framed(body.decode("utf-8", "replace")), height=900, alt=f"Drift of {chosen}, by Evidently")

# ---- skew and retrains ----------------------------------------------------------------------------------------------

def not_again(
    of: date,
) -> None:
    "Which lists of a day could not be made again, and why."
    if "skew_excluded" not in tables(): return
    left = read("skew_excluded").filter(pl.col("day") == of).sort("lists", "reason", descending=[True, False])
    if left.height: st.caption(plain("Lists that were not made again: " + "; ".join(f"{n:,} because {WHY_NOT.get(r, r)}" for r, n in left.select("reason", "lists").rows())))

def skew() -> None:
    "Whether logged lists come out the same from the lake."
    st.markdown("##### Skew: are lists that were answered the same when they are made again?")
    if "skew" not in tables(): return nothing_yet("No logged request has been answered again yet.", HOW, "it needs a serve log: the endpoint, and `python -m app.consumer`")
    rows, limit = read("skew").sort("day"), settings().monitor.skew
    asked = rows.filter(pl.col("different").is_not_null())
    if not asked.height:
        nothing_yet("No logged request could be answered again yet: nothing can be said of skew.", HOW)
        return not_again(max(rows["day"]))
    last = asked.row(-1, named=True)
    st.markdown(f"###### On {day(last['day'])}, {percent(last['different'])} of {last['items']:,.0f} items had another score, the limit is {percent(limit)}")
    drawn(over_days(asked.select("day", y="different"), "items with another score", ".1%", rule=limit), f"Share of items with another score by day; {percent(last['different'])} on the last one")
    st.caption("Some logged requests are answered once more by the same bundle from what the lake knows. Another score is an event that came late, or a store that forgot: the model is then asked something else than it was trained for.")
    not_again(last["day"])
    below(rows.sort("day", descending=True), "skew")

def retrains() -> None:
    "What was asked for, and what came of it."
    st.markdown("##### Retrains")
    if "retrains" not in tables(): return nothing_yet("No retrain was asked for yet.", HOW, "an admin can ask for one under Operations")
    rows = read("retrains").sort("at", descending=True)
    words = pl.col("outcome").replace_strict(OUTCOMES, default=pl.format("failed: {}", "outcome"))
    table = rows.select(Day="day", Asked="at", Outcome=words, Why="why", Champion="bundle", Run="run")
    first = rows.row(0, named=True)
    st.markdown(f"###### The last one, on {day(first['day'])}: {plain(table['Outcome'][0])}")
    st.dataframe(table.head(20), hide_index=True, width="stretch", column_config={"Asked": st.column_config.DatetimeColumn("Asked (UTC)", format="D MMM, HH:mm", timezone="UTC")}, alt="retrains, newest first")
    below(rows, "retrains")

def drift_page() -> None:
    "The tab, top to bottom."
    for n, part in enumerate((verdicts, drift, evidently, skew, retrains)):
        if n: st.divider()
        part()
