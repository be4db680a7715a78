"""Traffic and waiting times of the last minutes."""
from datetime import UTC, datetime

import altair as alt
import polars as pl
import streamlit as st

from app.parts.charts import BLUE, HEIGHT, ORANGE, drawn
from app.parts.monitoring.live import Traffic
from app.parts.wording import ms


def over_time(
    series: list[tuple[float, Traffic]], # of `Looks.series`
) -> None:
    "Two charts beside each other, once there are three stretches to draw."
    if len(series) < 3:
        st.caption(":material/hourglass: Charts of the last minutes come once there have been a few looks.")
        return
    frame = pl.DataFrame([(datetime.fromtimestamp(at, UTC), t.rate, t.p50, t.p95) for at, t in series], schema={"at": pl.Datetime("ms", "UTC"), "rate": pl.Float64, "p50": pl.Float64, "p95": pl.Float64}, orient="row")
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown(f"##### {frame['rate'][-1]:.1f} requests a second now, {max(frame['rate']):.1f} at most")
        drawn(_line(frame.select("at", y="rate"), "requests a second"), f"Requests per second in the last minutes: {frame['rate'][-1]:.1f} now")
    with right:
        waits = frame.select("at", "p50", "p95").unpivot(index="at", variable_name="name", value_name="y").with_columns(pl.col("name").replace({"p50": "half (p50)", "p95": "95% (p95)"})).filter(pl.col("y").is_not_null()).with_columns(pl.col("y")*1_000)
        if waits.is_empty():
            st.caption("No list was asked for in these minutes, so nobody waited.")
            return
        st.markdown(f"##### 95 of 100 lists are there within {ms(frame['p95'].drop_nulls()[-1])}")
        drawn(_line(waits, "wait for the list (ms)"), f"Waiting times of the last minutes: p95 is {ms(frame['p95'].drop_nulls()[-1])}")

def _line(
    frame: pl.DataFrame, # at, y, perhaps name
    y: str,
) -> alt.Chart:
    several = "name" in frame.columns
    colour = alt.Color("name:N", title=None, scale=alt.Scale(domain=["half (p50)", "95% (p95)"], range=[BLUE, ORANGE]), legend=alt.Legend(orient="bottom")) if several else alt.value(BLUE)
    return alt.Chart(frame).mark_line(point=True).encode(x=alt.X("at:T", title="time (UTC)", axis=alt.Axis(format="%H:%M:%S", labelOverlap=True, tickCount=4), scale=alt.Scale(type="utc")), y=alt.Y("y:Q", title=y, scale=alt.Scale(zero=True)),
                                                         color=colour, tooltip=[alt.Tooltip("at:T", format="%H:%M:%S"), alt.Tooltip("y:Q", title=y, format=".3~g"), *(["name:N"] if several else [])]).properties(height=HEIGHT)
