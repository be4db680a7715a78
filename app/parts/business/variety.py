"""How much of the shop the lists show: coverage, novelty, the long tail and new items, by day and by question."""
from typing import NamedTuple

import polars as pl
import streamlit as st

from app.parts.business.earned import Span
from app.parts.business.tables import below
from app.parts.charts import bars, drawn, over_days
from app.parts.page import nothing_yet
from app.parts.wording import QUESTIONS, answers, days, plain


class Measure(NamedTuple):
    "A number of the table `variety`."
    label: str
    format: str
    mean: bool  # whether it is a mean over what was shown: then days add up
    about: str

MEASURES = {
    "coverage": Measure("Coverage", ".1%", False, "Of all items of the shop, the share that was shown to anybody on the day."),
    "tail": Measure("Long tail", ".1%", True, "Of all that was shown, the share that is not among the most popular fifth of the items."),
    "new": Measure("New items", ".1%", True, "Of all that was shown, the share of items that the shop has had for [rerank] new_days at most."),
    "novelty": Measure("Novelty", ".2f", True, "How surprising what was shown is: bits of information, 1 more for an item with half the events. A list of bestsellers is low."),
    "gini": Measure("Concentration (Gini)", ".2f", False, "How unevenly items are shown: 0 is all alike, 1 is one item alone.")}

def in_time(
    rows: pl.DataFrame, # of the table, of one dimension
    name: str,          # of MEASURES
    *by: str,
) -> pl.DataFrame: # `by`, x, days
    "A measure of several days: a mean over what was shown, or of a usual day where days do not add up."
    there = rows.filter(pl.col(name).is_not_null())
    x = (pl.col(name)*pl.col("shown")).sum()/pl.col("shown").sum() if MEASURES[name].mean else pl.col(name).median()
    made = [x.alias("x"), pl.len().alias("days")]
    return there.group_by(*by).agg(made).sort(*by) if by else there.select(made)

def tiles(
    rows: pl.DataFrame, # of the table, of dimension ""
    span: Span,
) -> None:
    "All measures of the days beside those before."
    for place, (name, m) in zip(st.columns(len(MEASURES)), MEASURES.items(), strict=True):
        now, before = (in_time(rows.filter(s.of()), name) for s in (span, span.before))
        if not now["days"].item(): continue
        was = before["x"].item() if before["days"].item() else None
        with place: st.metric(m.label, f"{now['x'].item():{m.format}}", f"before: {was:{m.format}}" if was is not None else None, delta_color="off", delta_arrow="off", border=True, height="stretch",
                              help=m.about + ("" if m.mean else " The figure is that of a usual day (the median)."))

def variety(
    table: pl.DataFrame|None, # `variety`
    span: Span,
) -> None:
    "How varied the lists were."
    every = table.filter(pl.col("dimension") == "") if table is not None else pl.DataFrame()
    if table is None or not every.height or not every.filter(span.of()).height:
        return nothing_yet("How varied the lists were has not been counted on these days.", "`make kpis` counts it with everything else")
    tiles(every, span)
    left, right = st.columns([2, 1])
    with left: name = st.pills("Measure", list(MEASURES), default="coverage", required=True, format_func=lambda n: MEASURES[n].label, key="measure", wrap=True)
    m, mine = MEASURES[name], table.filter(span.of(), pl.col(name).is_not_null())
    with right: by = st.selectbox("By", ["surface", "source", "segment", "variant"], format_func=QUESTIONS.__getitem__, key="varied by")
    line = mine.filter(pl.col("dimension") == "").select("day", y=name).sort("day")
    if not line.height: return nothing_yet(f"There is no {m.label.lower()} on these days: nothing of the catalogue was shown.", "Choose other days")
    st.markdown(f"##### {m.label} by day: {line['y'][-1]:{m.format}} on the last one")
    drawn(over_days(line, m.label, m.format.replace(".1", ".1~")), f"{m.label} on each day, {days(*span)}")
    st.caption(m.about)
    parts = in_time(mine.filter(pl.col("dimension") == by), name, "value").select(name=answers(by), x="x")
    if parts.height:
        top = parts.sort("x", descending=True).row(0, named=True)
        st.markdown(f"##### {m.label} by {QUESTIONS[by].lower()}: highest is {plain(top['name'])}, {top['x']:{m.format}}")
        drawn(bars(parts, m.label if m.mean else f"{m.label}, usual day", m.format.replace(".1", ".1~")), f"{m.label} by {QUESTIONS[by]}; the highest is {top['name']}")
    below(table.filter(span.of()).sort("day", "dimension", "value"), f"variety {span.since} {span.until}")
