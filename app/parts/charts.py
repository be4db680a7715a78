"""Charts of the pages: one message each, units on the axes, and a zero line where bars begin at zero.

Colours are Okabe and Ito's (2008), which people who see few colours can tell apart; text and lines take the theme's own, light or dark."""
import altair as alt
import polars as pl
import streamlit as st

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#CC3311", "#AA4499", "#56B4E9", "#E69F00"
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, RED]
GREY = "#808080" # of a line that has to be seen on white and on black
HEIGHT = 260 # of a chart, px

Layers = alt.LayerChart|alt.FacetChart # what Altair says of a layered chart with properties

def drawn(
    chart: alt.Chart|Layers,
    about: str,      # one sentence for those who hear the page instead of seeing it
) -> None:
    "Put a chart on the page. Lines and texts that have no colour of their own are black in Vega, which is nothing to see in the dark theme."
    ink = "#fafafa" if st.context.theme.type == "dark" else "#31333f"
    st.altair_chart(chart.configure_text(color=ink).configure_rule(color=ink).properties(description=about, usermeta={"embedOptions": {"actions": False}}), width="stretch")

def titled(
    name: str,
    unit: str = "", # in brackets behind it
) -> str:
    return f"{name} ({unit})" if unit else name

def over_days(
    frame: pl.DataFrame,   # `day`, `y`; perhaps `low` and `high` of an interval, and `name` of several lines
    y: str,                # what the axis says
    fmt: str = ".3~g",     # of the axis' numbers (d3-format)
    zero: bool = True,     # whether the axis begins at 0
    rule: float|None = None, # a limit, drawn as a line
) -> Layers:
    "A value by day, with its interval where there is one."
    scale, several = alt.Scale(zero=zero), "name" in frame.columns
    colour = alt.Color("name:N", title=None, scale=alt.Scale(range=COLOURS), legend=alt.Legend(orient="bottom")) if several else alt.value(BLUE)
    base = alt.Chart(frame).encode(x=alt.X("day:T", title="day (UTC)", axis=alt.Axis(format="%-d %b", labelOverlap=True, tickCount="day")))
    tip = ["day:T", *(["name:N"] if several else []), alt.Tooltip("y:Q", title=y, format=fmt),
           *([alt.Tooltip("low:Q", format=fmt), alt.Tooltip("high:Q", format=fmt)] if "low" in frame.columns else [])]
    parts = [base.mark_line(point=True).encode(y=alt.Y("y:Q", title=y, scale=scale, axis=alt.Axis(format=fmt)), color=colour, tooltip=tip)]
    if "low" in frame.columns: parts.insert(0, base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", title=y), y2="high:Q", color=colour))
    if rule is not None: parts.append(alt.Chart(pl.DataFrame({"y": [rule]})).mark_rule(strokeDash=[5, 4], color=RED).encode(y="y:Q"))
    return alt.layer(*parts).properties(height=HEIGHT)

def bars(
    frame: pl.DataFrame,  # `name`, `x`; perhaps `low` and `high`, and `part` of stacked bars
    x: str,               # what the axis says
    fmt: str = ".3~g",
    order: str|list[str]|None = "-x",  # of the names; None: as they come
    colours: list[str] = COLOURS,      # of the parts
) -> Layers:
    "A value by name, from zero."
    part = "part" in frame.columns
    if order == "-x": order = frame.group_by("name", maintain_order=True).agg(pl.col("x").sum()).sort("x", descending=True, maintain_order=True)["name"].to_list() # Vega sorts no layers
    y = alt.Y("name:N", title=None, sort=order, axis=alt.Axis(labelLimit=260))
    tip = ["name:N", *(["part:N"] if part else []), alt.Tooltip("x:Q", title=x, format=fmt)]
    colour = alt.Color("part:N", title=None, scale=alt.Scale(range=colours), legend=alt.Legend(orient="bottom")) if part else alt.value(BLUE)
    bar = alt.Chart(frame).mark_bar().encode(y=y, x=alt.X("x:Q", title=x, scale=alt.Scale(zero=True), axis=alt.Axis(format=fmt, tickCount=6)), color=colour, tooltip=tip)
    if "low" not in frame.columns: return alt.layer(bar).properties(height=alt.Step(24))
    whisker = alt.Chart(frame).mark_rule(strokeWidth=2.5, color=ORANGE).encode(y=y, x="low:Q", x2="high:Q")
    return alt.layer(bar, whisker).properties(height=alt.Step(24))

def intervals(
    frame: pl.DataFrame,   # `name`, `x`, `low`, `high`; perhaps `colour`, a word of `meaning`
    x: str,                # what the axis says
    fmt: str = "+.1~%",
    meaning: dict[str, str]|None = None, # word → colour
) -> Layers:
    "Differences with their intervals, beside the line of no difference."
    y = alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=260))
    colour = alt.Color("colour:N", title=None, scale=alt.Scale(domain=list(meaning), range=list(meaning.values())), legend=alt.Legend(orient="bottom")) if meaning else alt.value(BLUE)
    base, axis = alt.Chart(frame), alt.Axis(format=fmt, tickCount=7)
    tip = ["name:N", *(alt.Tooltip(f"{c}:Q", format=fmt) for c in ("x", "low", "high"))]
    zero = alt.Chart(pl.DataFrame({"x": [0.0]})).mark_rule(strokeDash=[5, 4], color=GREY).encode(x="x:Q")
    return alt.layer(zero, base.mark_rule(strokeWidth=3).encode(y=y, x=alt.X("low:Q", title=x, axis=axis), x2="high:Q", color=colour, tooltip=tip),
                     base.mark_point(filled=True, size=90).encode(y=y, x=alt.X("x:Q", title=x, axis=axis), color=colour, tooltip=tip)).properties(height=alt.Step(30))

def heat(
    frame: pl.DataFrame,  # `row`, `column`, `value`; perhaps `note` for the tooltip
    row: str, column: str, value: str, # what they are
    fmt: str = ".0%",
) -> alt.Chart:
    "A table in colours."
    tip = [alt.Tooltip("row:N", title=row), alt.Tooltip("column:N", title=column), alt.Tooltip("value:Q", title=value, format=fmt),
           *(["note:N"] if "note" in frame.columns else [])]
    return alt.Chart(frame).mark_rect().encode(
        x=alt.X("column:N", title=column, sort=None, axis=alt.Axis(orient="top", labelAngle=0)), y=alt.Y("row:N", title=row, sort=None),
        color=alt.Color("value:Q", title=value, scale=alt.Scale(scheme="blues", domainMin=0), legend=alt.Legend(format=fmt)), tooltip=tip).properties(height=alt.Step(22))
