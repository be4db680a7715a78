"""What the recommendations earn: figures of the chosen days beside those before, by day and by question, loyalty, variety and experiments."""
from datetime import timedelta

import altair as alt
import polars as pl
import streamlit as st

from app.parts.business.earned import (
    Change,
    Span,
    added,
    by_day,
    changed,
    kept,
    last_complete,
    recountable,
    recounted,
    returned,
    weekly,
)
from app.parts.business.readouts import experiments, what_ifs
from app.parts.business.tables import below
from app.parts.business.variety import variety
from app.parts.charts import BLUE, COLOURS, GREY, SKY, Layers, bars, drawn, over_days
from app.parts.page import lead, nothing_yet, settings, shown
from app.parts.wording import ABOUT, FIGURES, QUESTIONS, SHOWN, Figure, answer, answers, count, days, percent, plain
from reco.data.storage import LakeError

RANGES, USUAL = (1, 3, 7, 14, 28), 14 # days that can be chosen at once; of the first look, where there are as many before them
HOW = ("`make kpis` counts the days (daily at 3:00 in production)", "lists come from the endpoint (`make serve`) through `python -m app.consumer`", "`make demo` fills everything with a simulated shop")
QUICK = 100_000 # exposures that are recounted within half a second
TABS = ["Day by day", "Who and where", "Loyalty", "Variety", "Experiments"]

# ---- what is looked at ----------------------------------------------------------------------------------------------

def span_of(
    kpis: pl.DataFrame, # of dimension ""
) -> Span:
    "The days to look at: the last complete ones, or any."
    last = last_complete(kpis) or max(kpis["day"])
    usual = max(min(USUAL, kpis.filter("complete").height//2), 1)
    names = {count(n, "day"): n for n in sorted({*RANGES, usual})} | {"Choose": 0}
    asked = st.segmented_control("Days", list(names), default=count(usual, "day"), required=True, key="range", bind="query-params", wrap=True,
                                 help="The last days that are complete: nothing can come of their lists any more. They are held beside as many days before.")
    if n := names[asked]: return Span(last - timedelta(days=n - 1), last)
    first = min(kpis["day"])
    chosen = st.date_input("From – until", (max(first, last - timedelta(days=6)), last), first, max(kpis["day"]), key="span", format="YYYY-MM-DD")
    return Span(chosen[0], chosen[-1]) if chosen else Span(last, last) # one alone while the second is still being picked

def whose(
    kpis: pl.DataFrame, # all of the table
) -> tuple[str, str]: # dimension and value; both empty for everything
    "Which part of the lists to look at."
    there = kpis.filter(pl.col("dimension").is_in(["surface", "segment", "source", "variant"])).select("dimension", "value").unique().sort("dimension", "value").rows()
    ordered = sorted(there, key=lambda x: ("surface", "segment", "source", "variant").index(x[0]))
    name = lambda x: f"{QUESTIONS[x[0]]}: {answer(*x)}" if x[0] else "All lists"
    return st.selectbox("Show", [("", ""), *ordered], format_func=name, key="whose", help="All figures and the chart below them are of this part alone.")

def said_of_days(
    kpis: pl.DataFrame, # of dimension ""
    span: Span,
) -> None:
    "Which days these are, which are not there, and which are not complete."
    mine, before = kpis.filter(span.of()), kpis.filter(span.before.of())
    told = [f"**{days(*span)}** (UTC)" + (f", beside {days(*span.before)}" if before.height == span.length else "")]
    if missing := span.length - mine.height: told.append(f"{count(missing, 'day')} of them {'has' if missing == 1 else 'have'} no count: nothing was shown, or `make kpis` did not run")
    if before.height < span.length: told.append(f"There is nothing to compare with: {f'{before.height} of the' if before.height else 'none of the'} {count(span.length, 'day')} before {'is' if before.height < 2 else 'are'} counted")
    if partly := mine.filter(~pl.col("complete")).height: told.append(f":material/hourglass: {count(partly, 'of these days is', 'of these days are')} not complete: purchases may still come in")
    if lacking := int(mine["unpriced"].sum()): told.append(f"{count(lacking, 'purchase has', 'purchases have')} no price and {'is' if lacking == 1 else 'are'} missing in the revenue")
    st.caption(". ".join(told) + ".")

# ---- headline -------------------------------------------------------------------------------------------------------

def figures_of(
    every: pl.DataFrame, # the table, of dimension ""
    mine: pl.DataFrame,  # the table, of what is looked at
    span: Span,
    dimension: str, value: str,
    quickly: bool,       # sums alone will do for now
) -> tuple[dict, dict|None, str]: # a row of these days, of the days before (None: not all there), and why there are no intervals (empty: there are)
    "Figures with intervals where they can be recounted, else sums of the table."
    there = lambda s: every.filter(s.of()).height == s.length and mine.filter(s.of()).height > 0
    spans = [span, *([span.before] if there(span.before) else [])]
    why = "they are being counted" if quickly else recountable(every, *spans)
    if not why and not every.filter(span.of())["complete"].all(): why = "days that are not complete are shown as they were counted last"
    rows = []
    for s in spans:
        sums = added(mine.filter(s.of())).row(0, named=True)
        try: found = pl.DataFrame() if why else recounted(s, dimension, value if dimension else None)
        except LakeError as e: why, found = str(e), pl.DataFrame()
        if found.height and found["exposures"].item() != sums["exposures"]: # events were erased, or the lake keeps only the last ones
            why, found = "the lake does not have all lists of these days any more", pl.DataFrame()
        rows.append(sums | (found.row(0, named=True) if found.height else {}))
    if why: rows = [{k: v for k, v in r.items() if not k.endswith(("_low", "_high"))} for r in rows]
    return rows[0], rows[1] if len(rows) > 1 else None, why

def tile(
    f: Figure,
    c: Change,
    sparkline: list[float],  # of the days before and these
) -> None:
    "One figure: its value, its change, and how sure both are."
    told = "" if c.lift is None else percent(c.lift, sign=True).replace("−", "-") # Streamlit looks for the sign
    sure = "clear change" if c.clear else "may be chance" if c.lift_low is not None else f"before: {f.said(c.before)}"
    with st.container(border=True, height="stretch", gap="xsmall"):
        st.metric(f.label, f.said(c.value), told or None, help=f.about, delta_color="normal" if c.clear else "off", delta_description=sure if told else None,
                  chart_data=sparkline if len(sparkline) > 3 else None, chart_type="line")
        if c.high is not None: st.caption(f"between {f.said(c.low)} and {f.said(c.high)}", help="The 95% interval: what is compatible with what was seen, given how many shoppers there were.")

def ranges_of(
    changes: list[tuple[Figure, Change]],
) -> pl.DataFrame:
    "All headline figures with their intervals, as a table."
    rows = [(f.label, *c) for f, c in changes]
    return pl.DataFrame(rows, schema=["Figure", "Value", "Interval from", "Interval to", "Days before", "Change", "Change from", "Change to"], orient="row", infer_schema_length=None)

def headline(
    every: pl.DataFrame, mine: pl.DataFrame, # as for `figures_of`
    retention: pl.DataFrame|None,
    span: Span,
    dimension: str, value: str,
    quickly: bool = False, # as for `figures_of`
) -> None:
    "The figures that a shop is run by."
    now, before, why = figures_of(every, mine, span, dimension, value, quickly)
    changes = [(f, changed(f.name, now, before)) for f in (*FIGURES.values(), SHOWN)]
    in_time = mine.filter(span.of() | span.before.of()).sort("day")
    lines = {f.name: in_time[f.name].drop_nulls().to_list() for f, _ in changes}
    if retention is not None:
        whom = (dimension, value) if dimension in ("segment", "variant") else ("", "")
        split = retention.filter(pl.col("dimension") == whom[0], pl.col("value") == whom[1])
        if back := returned(split, 7, span):
            about = f"Of the {back['shoppers']:,} shoppers whose seventh day after their first visit lies in these days, the share that was there on it."
            changes.insert(6, (Figure("back", "Back after 7 days" + (", all shoppers" if dimension and not whom[0] else ""), "", "", 1, ".1%", about), changed("back", back, returned(split, 7, span.before) or None)))
    for four in (changes[:4], changes[4:]):
        for place, (f, c) in zip(st.columns(4), four, strict=False):
            with place: tile(f, c, lines.get(f.name, []))
    if quickly:
        st.caption(":material/hourglass: Intervals are being counted …")
        return
    if why: st.caption(f"No intervals here: {why}. The chart below has those of single days.")
    else: st.caption("Grey changes may be chance; coloured ones are beyond it (95% intervals over shoppers; each shopper counts once, however many days they came). The lines are the days before and these days.")
    below(ranges_of(changes), f"headline {span.since} {span.until}", "Intervals and CSV", {c: st.column_config.NumberColumn(format="percent" if c.startswith("Change") else "%.4g") for c in
          ("Value", "Interval from", "Interval to", "Days before", "Change", "Change from", "Change to")})

# ---- day by day -----------------------------------------------------------------------------------------------------

def figure_chosen(key: str) -> str: # a name of FIGURES
    return st.pills("Figure", list(FIGURES), default="CTR", required=True, format_func=lambda n: FIGURES[n].label, key=key, wrap=True)

def with_context(
    frame: pl.DataFrame, # of `by_day`
    span: Span,
    y: str, fmt: str,
) -> Layers:
    "The chosen days with their intervals; those before them in grey, and those that are not complete as hollow points on a dashed line."
    whole = frame.filter("complete", span.of())
    chart: Layers = over_days((whole if whole.height else frame).drop("complete"), y, fmt)
    x, axis, tip = alt.X("day:T", title="day (UTC)"), alt.Y("y:Q", title=y), [alt.Tooltip("day:T"), alt.Tooltip("y:Q", title=y, format=fmt)]
    if (before := frame.filter(span.before.of())).height:
        chart = alt.layer(alt.Chart(pl.concat([before, whole.head(1)])).mark_line(color=GREY, strokeWidth=1.5).encode(x=x, y=axis, tooltip=tip), chart)
    if not whole.height or not (rest := frame.filter(~pl.col("complete"))).height: return chart
    base = alt.Chart(pl.concat([whole.tail(1), rest])).encode(x=x, y=axis)
    tip = [alt.Tooltip("day:T"), alt.Tooltip("y:Q", title=f"{y}, so far", format=fmt)]
    return alt.layer(chart, base.mark_line(strokeDash=[4, 4], color=BLUE, opacity=0.7), base.transform_filter("!datum.complete").mark_point(filled=False, color=BLUE, size=70).encode(tooltip=tip))

def day_by_day(
    mine: pl.DataFrame, # the table, of what is looked at
    span: Span,
) -> None:
    "One figure in time."
    f = FIGURES[figure_chosen("figure")]
    near = mine.filter(pl.col("day") >= span.before.since, (pl.col("day") <= span.until) | ~pl.col("complete"))
    frame = by_day(near, f)
    if not frame.filter(span.of()).height: return nothing_yet(f"There is no {f.label.lower()} on these days: there is nothing to divide by.", "Choose other days, or another figure")
    best, worst = (frame.filter("complete", span.of()).sort("y", descending=d).head(1) for d in (True, False))
    st.markdown(f"##### {f.label} by day" + (f": from {worst['y'].item():{f.format}} to {best['y'].item():{f.format}}" if best.height else ""))
    drawn(with_context(frame, span, f.label, f.axis), f"{f.label} on each day from {min(frame['day'])} to {max(frame['day'])}, with 95% intervals")
    open_days = frame.filter(~pl.col("complete")).height
    st.caption(f"{f.about} The band is the 95% interval of each day, where 30 shoppers or more were there; grey are the days before." +
               (f" Hollow points: {count(open_days, 'day')} not complete yet; clicks and purchases may still come in." if open_days else ""))
    below(near.sort("day"), f"by day {span.since} {span.until}")

# ---- by question ----------------------------------------------------------------------------------------------------

def who_and_where(
    kpis: pl.DataFrame, # all of the table
    span: Span,
) -> None:
    "A figure by surface, source, variant, segment, bundle or place."
    left, _ = st.columns([1, 2])
    with left: by = st.selectbox("By", list(QUESTIONS), format_func=QUESTIONS.__getitem__, key="by")
    f = FIGURES[figure_chosen("figure of parts")]
    mine, every = kpis.filter(pl.col("dimension") == by, span.of()), kpis.filter(pl.col("dimension") == "", span.of())
    if not mine.height: return nothing_yet("Nothing was counted on these days.", *HOW)
    sums, why = added(mine, "value"), recountable(every, span)
    if not why and every["complete"].all():
        try:
            if (found := recounted(span, by, None, "value")).height and found["exposures"].sum() == sums["exposures"].sum(): sums = found
        except LakeError: pass # sums of the table will do
    column = "value" if by != "rank" else pl.col("value").cast(pl.Int64, strict=False)
    frame = sums.sort(column, nulls_last=True).select("value", x=f.name, **({e: f"{f.name}_{e}" for e in ("low", "high")} if f"{f.name}_low" in sums.columns else {})).filter(pl.col("x").is_not_null())
    frame = frame.with_columns(name=answers(by)).drop("value")
    if not frame.height: return nothing_yet(f"There is no {f.label.lower()} on these days: there is nothing to divide by.", "Choose other days, or another figure")
    top = frame.sort("x", descending=True).row(0, named=True)
    st.markdown(f"##### {f.label} by {QUESTIONS[by].lower()}: highest is {plain(top['name'])}, {top['x']:{f.format}}")
    drawn(bars(frame, f.label, f.axis, None if by == "rank" else "-x"), f"{f.label} by {QUESTIONS[by]}; the highest is {top['name']} with {top['x']:{f.format}}")
    st.caption(ABOUT[by] + (" Lines are 95% intervals; where too few shoppers were there, none is drawn." if "low" in frame.columns else ""))
    below(sums, f"by {by} {span.since} {span.until}")
    st.space("small")
    where_revenue(kpis, span)

def where_revenue(
    kpis: pl.DataFrame, span: Span,
) -> None:
    "Revenue by surface, each parted by the source that proposed the item."
    every = kpis.filter(pl.col("dimension") == "", span.of())
    if not every["revenue"].sum(): return nothing_yet("Nothing that was shown on these days has been bought yet.", "Choose other days")
    try: found = pl.DataFrame() if recountable(every, span) else recounted(span, "", None, "surface", "source")
    except LakeError: found = pl.DataFrame()
    if found.height:
        parts = found.select(name=answers("surface", "surface"), part=pl.col("source").cast(pl.String).fill_null("none"), x="revenue")
    else: parts = added(kpis.filter(pl.col("dimension") == "surface", span.of()), "value").select(name=answers("surface"), x="revenue")
    best = parts.group_by("name").agg(pl.col("x").sum()).sort("x", descending=True).row(0, named=True)
    total = parts["x"].sum()
    st.markdown(f"##### Revenue by surface and source: {percent(best['x']/total, 0)} comes from {plain(best['name'])}")
    drawn(stacked(parts, "revenue (shop's currency)"), f"Revenue by surface, parted by candidate source; {best['name']} has {best['x']:,.0f} of {total:,.0f}")
    below(parts.rename({"name": "surface", "x": "revenue"} | ({"part": "source"} if "part" in parts.columns else {})), f"revenue by surface and source {span.since} {span.until}")

def stacked(
    parts: pl.DataFrame, # name, part, x
    x: str,
) -> Layers|alt.Chart:
    "Bars in parts, the largest first; the smallest are put together in grey, because more colours cannot be told apart."
    if "part" not in parts.columns: return bars(parts, x, ",.0f")
    by_size = parts.group_by("part").agg(pl.col("x").sum()).filter(pl.col("x") > 0).sort("x", "part", descending=[True, False])["part"].to_list()
    largest, rest = by_size[:len(COLOURS)], by_size[len(COLOURS):]
    order = [*largest, *(["all others"] if rest else [])]
    few = parts.filter(pl.col("x") > 0).with_columns(pl.when(pl.col("part").is_in(rest)).then(pl.lit("all others")).otherwise("part").alias("part")).group_by("name", "part").agg(pl.col("x").sum())
    few = few.with_columns(place=pl.col("part").replace_strict({p: n for n, p in enumerate(order)}, return_dtype=pl.Int64))
    colour = alt.Color("part:N", title=None, scale=alt.Scale(domain=order, range=[*COLOURS[:len(largest)], *([GREY] if rest else [])]), legend=alt.Legend(orient="bottom", columns=4, labelLimit=160))
    return alt.Chart(few).mark_bar().encode(y=alt.Y("name:N", title=None, sort="-x", axis=alt.Axis(labelLimit=200)), x=alt.X("sum(x):Q", title=x, axis=alt.Axis(format=",.0f", tickCount=6)), color=colour, order="place:O",
                                            tooltip=["name:N", "part:N", alt.Tooltip("x:Q", title=x, format=",.0f")]).properties(height=alt.Step(28))

# ---- loyalty --------------------------------------------------------------------------------------------------------

def loyalty(
    retention: pl.DataFrame|None,
) -> None:
    "Of the shoppers who came for the first time in a week, how many were there a day, a week, a month later."
    if retention is None or not retention.height: return nothing_yet("Nobody's return has been counted yet: the first week of a log tells nothing, there everybody looks new.", *HOW)
    there = retention.select("dimension", "value").unique().sort("dimension", "value").rows()
    name = lambda x: f"{QUESTIONS[x[0]]}: {answer(*x)}" if x[0] else "All shoppers"
    part = st.selectbox("Shoppers", there, format_func=name, key="loyal", help="By what they were shown, or who they were, on the day they were first seen.")
    mine = retention.filter(pl.col("dimension") == part[0], pl.col("value") == part[1])
    weeks = weekly(mine)
    if not weeks.height: return nothing_yet("No shopper of this part has had a day after their first one yet.", "Come back tomorrow")
    whole = weeks.group_by("after").agg(pl.col("back").sum(), pl.col("shoppers").sum()).sort("after")
    said = ", ".join(f"{percent(b/n)} after {count(d, 'day')}" for d, b, n in whole.select("after", "back", "shoppers").rows())
    st.markdown(f"##### Who comes back: {said}")
    drawn(cohort_map(weeks), f"Share of new shoppers who came back, by week of their first visit: {said}")
    st.caption("Each row is the shoppers first seen in a week (a cohort); each column is the share of them that was there again on exactly that day after. "
               "Empty: the day is not over yet. The log's first week is left out, because there everybody looks new.")
    below(mine.sort("cohort"), f"retention {name(part)}")

def cohort_map(
    weeks: pl.DataFrame, # of `weekly`
) -> Layers:
    "Weeks by days after, in colour and in numbers."
    frame = weeks.with_columns(row=pl.col("week").dt.strftime("%-d %b %Y"), column=pl.format("day {}", "after"))
    x = alt.X("column:N", title="days after the first visit", sort=None, axis=alt.Axis(orient="top", labelAngle=0))
    base = alt.Chart(frame.sort("week", "after")).encode(x=x, y=alt.Y("row:N", title="first seen in the week of", sort=None))
    tip = [alt.Tooltip("row:N", title="week of"), "column:N", "shoppers:Q", "back:Q", alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("low:Q", format=".1%"), alt.Tooltip("high:Q", format=".1%")]
    cells = base.mark_rect().encode(color=alt.Color("share:Q", title="came back", scale=alt.Scale(range=["#EEF4FA", SKY], domainMin=0), legend=None), tooltip=tip)
    return alt.layer(cells, base.mark_text().encode(text=alt.Text("share:Q", format=".1%"), color=alt.value("#1a1a1a"), tooltip=tip)).properties(height=alt.Step(28))

# ---- the page -------------------------------------------------------------------------------------------------------

def first_time(
    every: pl.DataFrame, # the table, of dimension ""
    span: Span,
) -> bool:
    "Whether these days are so many exposures that counting them takes a while, and nobody of this session has waited for them yet."
    seen = st.session_state.setdefault("days seen", set())
    many = every.filter(span.of() | span.before.of())["exposures"].sum() > QUICK and span not in seen
    seen.add(span)
    return many

def page() -> None:
    "The page, top to bottom."
    hours = f"{settings().kpis.window_hours:g} hours"
    lead(f"What the recommendations earn the shop, whether that is changing, and what experiments say. Each figure counts what came of lists that were shown: a click within {hours}, "
         f"and what was put in the cart or bought within {hours} of that click.")
    kpis = kept("kpis")
    if kpis is None or not kpis.height:
        nothing_yet("No day has been counted yet.", *HOW)
        return experiments(None) # what is planned can be shown all the same
    every, retention = kpis.filter(pl.col("dimension") == ""), kept("retention")
    left, right = st.columns([3, 2], vertical_alignment="top")
    with left: span = span_of(every)
    with right: dimension, value = whose(kpis)
    said_of_days(every, span)
    mine = kpis.filter(pl.col("dimension") == dimension, pl.col("value") == value)
    place, there = st.empty(), mine.filter(span.of()).height > 0 # the figures come last: what their intervals take, nobody has to wait for
    if there and first_time(every, span):
        with place.container(): headline(every, mine, retention, span, dimension, value, quickly=True)
    def tried() -> None:
        experiments(kept("readouts"))
        what_ifs(kept("what_ifs"))
    parts = [lambda: day_by_day(mine, span), lambda: who_and_where(kpis, span), lambda: loyalty(retention), lambda: variety(kept("variety"), span), tried]
    for tab, part in zip(st.tabs(TABS, key="tab", bind="query-params"), parts, strict=True):
        if tab.open:
            with tab: part()
    with place.container():
        if there: headline(every, mine, retention, span, dimension, value)
        else: nothing_yet("Nothing was counted on these days.", "Choose other days, or another part of the lists", *HOW)

if __name__ == "__main__": shown("Business", page)
