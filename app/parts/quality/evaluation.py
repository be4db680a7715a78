"""How good a bundle is: the pipeline beside every single source, stage by stage, and what variety costs."""
from math import isfinite

import altair as alt
import polars as pl
import streamlit as st

from app.parts.charts import BLUE, ORANGE, SKY, Layers, drawn
from app.parts.page import nothing_yet
from app.parts.quality.terms import MEASURES, OF_SLICES, PIPELINE, SLICES, SOURCES, SURFACES

OURS, POPULAR, OTHER = PIPELINE, "popularity", "one source alone"
COLOUR = alt.Color("kind:N", scale=alt.Scale(domain=[OURS, OTHER, POPULAR], range=[BLUE, SKY, ORANGE]), legend=None) # the names beside the bars say it
SURE = .975 # of the draws in which the pipeline is ahead: an interval of 95% leaves 2.5% on that side

KINDS = {"pipeline": OURS, "popularity": POPULAR}

def number(
    x: object,
) -> float|None: # None for what is none, or not finite
    return float(x) if isinstance(x, int|float) and not isinstance(x, bool) and isfinite(x) else None

def metrics(
    manifest: dict,
) -> pl.DataFrame: # slice, system, requests, low, high, first_ahead, then MEASURES; empty without an evaluation
    "The hold-out's table."
    columns = ["low", "high", "first_ahead", *MEASURES]
    rows = [{"slice": str(r.get("slice")), "system": str(r.get("system")), "requests": int(number(r.get("requests")) or 0)} | {c: number(r.get(c)) for c in columns}
            for r in manifest.get("metrics") or [] if isinstance(r, dict)]
    return pl.DataFrame(rows, schema={"slice": pl.String, "system": pl.String, "requests": pl.Int64} | dict.fromkeys(columns, pl.Float64))

# ---- the pipeline beside every single source -----------------------------------------------------------------------

def verdict(
    part: pl.DataFrame, # of `metrics`, one slice
) -> str:               # Markdown
    "What the table says, in a sentence."
    by = {r["system"]: r for r in part.iter_rows(named=True) if r["NDCG@10"] is not None}
    code = lambda r: f"`{r['system'].replace('`', ' ')}`"
    rivals = sorted((r for s, r in by.items() if s != "pipeline"), key=lambda r: -r["NDCG@10"])
    if "pipeline" not in by or not rivals: return "There is nothing to compare the pipeline with."
    ours, best, popular = by["pipeline"]["NDCG@10"], rivals[0], by.get("popularity")
    times = f", {ours/popular['NDCG@10']:.1f} times that of showing everyone what is popular" if popular and popular["NDCG@10"] > 0 and ours > popular["NDCG@10"] else ""
    ahead = min((r["first_ahead"] for r in rivals if r["first_ahead"] is not None), default=None)
    if ours <= best["NDCG@10"]: against = f"{code(best)} alone does better here ({best['NDCG@10']:.3f})"
    elif ahead is not None and ahead >= SURE: against = f"it is surely ahead of every single source, the best of which is {code(best)} ({best['NDCG@10']:.3f})"
    else: against = f"its lead over {code(best)} ({best['NDCG@10']:.3f}) may be chance" + ("" if ahead is None else f": it is ahead in {ahead:.0%} of the draws")
    return f"Ranking quality is **{ours:.3f}**{times}; {against}."

def standings(
    part: pl.DataFrame, # of `metrics`, one slice
    measure: str,       # of MEASURES
) -> Layers:
    "Every system by one measure, the best on top, with its interval where there is one."
    told = MEASURES[measure]
    frame = part.filter(pl.col(measure).is_not_null()).select(
        name=pl.col("system").replace("pipeline", PIPELINE), x=measure, kind=pl.col("system").replace_strict(KINDS, default=OTHER), low="low", high="high",
        means=pl.col("system").replace_strict(SOURCES, default="a source of this shop's own"))
    best = frame.sort("x", "name", descending=[measure != "Gini@10", False])["name"].to_list() # in layers Vega does not sort by a value
    y = alt.Y("name:N", title=None, sort=best, axis=alt.Axis(labelLimit=140))
    tip = [alt.Tooltip("name:N", title="system"), alt.Tooltip("means:N", title="proposes"), alt.Tooltip("x:Q", title=told.label, format=told.fmt)]
    with_interval = measure == "NDCG@10" and frame["low"].is_not_null().any()
    if with_interval: tip += [alt.Tooltip("low:Q", title="from", format=told.fmt), alt.Tooltip("high:Q", title="to", format=told.fmt)]
    base = alt.Chart(frame)
    parts = [base.mark_bar().encode(y=y, x=alt.X("x:Q", title=told.label, scale=alt.Scale(zero=True), axis=alt.Axis(format=told.fmt, tickCount=6)), color=COLOUR, tooltip=tip)]
    if with_interval: parts.append(base.mark_rule(strokeWidth=2).encode(y=y, x="low:Q", x2="high:Q", tooltip=tip))
    return alt.layer(*parts).properties(height=alt.Step(24))

def table(
    part: pl.DataFrame, # of `metrics`, one slice
) -> None:
    "All measures of all systems."
    shown = part.sort("NDCG@10", descending=True, nulls_last=True).select(
        system=pl.col("system").replace("pipeline", PIPELINE), proposes=pl.col("system").replace_strict(SOURCES, default="a source of this shop's own"),
        **{m: pl.col(m) for m in MEASURES}, low="low", high="high", first_ahead="first_ahead")
    st.dataframe(shown, hide_index=True, width="stretch", alt="All measures of the pipeline and of every source", placeholder="–",
                 column_order=["system", "NDCG@10", "low", "high", "first_ahead", *list(MEASURES)[1:], "proposes"], column_config={
        "system": st.column_config.TextColumn("System", pinned=True), "proposes": st.column_config.TextColumn("Proposes"),
        **{m: st.column_config.NumberColumn(m, format=told.column, help=told.means) for m, told in MEASURES.items()},
        "low": st.column_config.NumberColumn("from", format="%.3f", help="Lower end of the 95% interval of NDCG@10"),
        "high": st.column_config.NumberColumn("to", format="%.3f", help="Upper end of the 95% interval of NDCG@10"),
        "first_ahead": st.column_config.NumberColumn("pipeline ahead", format="percent", help="Share of the draws (shoppers drawn anew, again and again) in which the pipeline "
                                                                                              "has the better NDCG@10; 50% is a tie")})

def by_slice(
    whole: pl.DataFrame, # of `metrics`
) -> Layers:
    "The pipeline, the best single source and popularity, by kind of request."
    rows = []
    for name, label in SLICES.items():
        part = whole.filter(pl.col("slice") == name, pl.col("NDCG@10").is_not_null())
        best = part.filter(~pl.col("system").is_in(["pipeline", "popularity"])).top_k(1, by="NDCG@10")
        for r in (*part.filter(pl.col("system").is_in(["pipeline", "popularity"])).iter_rows(named=True), *best.iter_rows(named=True)):
            rows.append({"slice": label, "kind": KINDS.get(r["system"], "best single source"), "system": r["system"],
                         "x": r["NDCG@10"], "low": r["low"], "high": r["high"], "requests": r["requests"]})
    frame, kinds = pl.DataFrame(rows), [OURS, "best single source", POPULAR]
    y = alt.Y("slice:N", title=None, sort=list(SLICES.values()), axis=alt.Axis(labelLimit=140))
    beside = alt.YOffset("kind:N", sort=kinds)
    tip = ["slice:N", "system:N", alt.Tooltip("x:Q", title="NDCG@10", format=".3f"), alt.Tooltip("low:Q", title="from", format=".3f"),
           alt.Tooltip("high:Q", title="to", format=".3f"), alt.Tooltip("requests:Q", format=",")]
    base = alt.Chart(frame)
    bar = base.mark_bar().encode(y=y, yOffset=beside, x=alt.X("x:Q", title=MEASURES["NDCG@10"].label, axis=alt.Axis(tickCount=6)), tooltip=tip,
                                 color=alt.Color("kind:N", title=None, scale=alt.Scale(domain=kinds, range=[BLUE, SKY, ORANGE]), legend=alt.Legend(orient="bottom", columns=2)))
    whisker = base.mark_rule(strokeWidth=2).encode(y=y, yOffset=beside, x="low:Q", x2="high:Q", tooltip=tip)
    return alt.layer(bar, whisker).properties(height=60 + 90*frame["slice"].n_unique()) # axis and legend are within

def show_evaluation(
    manifest: dict,
) -> None:
    "The tab that says how good the bundle is."
    whole = metrics(manifest)
    if whole.is_empty():
        nothing_yet("This bundle carries no evaluation: it was not made by a training.", "`make train` trains, judges on the hold-out, and promotes what passes the gates")
        return
    slices = [s for s in SLICES if s in whole["slice"]] or whole["slice"].unique(maintain_order=True).to_list()
    left, right = st.columns(2)
    with left:
        name = st.segmented_control("Requests", slices, format_func=lambda s: SLICES.get(s, s), default=slices[0], required=True, key="slice", persist_state="page", help=OF_SLICES)
    with right:
        measure = st.selectbox("Measure", list(MEASURES), format_func=lambda m: MEASURES[m].label, key="measure", persist_state="page")
    part = whole.filter(pl.col("slice") == name)
    st.subheader("The pipeline beside every single source")
    st.markdown(verdict(part))
    st.caption(f"{MEASURES[measure].means} Measured on {max(part['requests']):,} requests of the hold-out, the last days, which no training saw; every system works under the "
               "same rules." + (" The lines are 95% intervals over shoppers." if measure == "NDCG@10" else ""))
    drawn(standings(part, measure), f"{MEASURES[measure].label} of the pipeline and of every single source, on {SLICES.get(name, name).lower()}.")
    with st.expander("All measures as a table"): table(part)
    if len(slices) > 1 and set(slices) <= set(SLICES):
        st.subheader("By kind of request")
        st.markdown(" · ".join(f"{SLICES[r['slice']]} **{r['NDCG@10']:.3f}**" for r in whole.filter(system="pipeline").drop_nulls("NDCG@10").iter_rows(named=True)))
        st.caption("Lists during a visit are easier: the visit says what is wanted. Whoever has just arrived is the harder case. The lines are 95% intervals.")
        drawn(by_slice(whole), "Ranking quality of the pipeline, the best single source and popularity, for all requests, on arriving and during a visit.")
    show_stages(manifest)

# ---- stage by stage ------------------------------------------------------------------------------------------------

def stages(
    manifest: dict,
) -> pl.DataFrame: # stage, what, before, after, error; where nothing was measured a null
    "What each step adds, as the training measured it on validation."
    rows = []
    for surface, c in (manifest.get("surfaces") or {}).items():
        by = "model orders" if c.get("ranked") else f"sources order ({c.get('order') or 'all together'} first)"
        rows.append({"stage": f"Ordering: {SURFACES.get(surface, surface)}", "what": by, "before": number(c.get("by_sources")), "after": number(c.get("by_ranker")),
                     "error": number(c.get("error"))})
    v = manifest.get("variety") or {}
    if v.get("without") and v.get("chosen"):
        rows.append({"stage": "Re-ranking: variety and fairness", "what": f"catalogue shown {v['without']['coverage@10']:.1%} → {v['chosen']['coverage@10']:.1%}",
                     "before": number(v["without"].get("NDCG@10")), "after": number(v["chosen"].get("NDCG@10")), "error": None})
    return pl.DataFrame(rows, schema={"stage": pl.String, "what": pl.String, "before": pl.Float64, "after": pl.Float64, "error": pl.Float64})

def show_stages(
    manifest: dict,
) -> None:
    "The table of the stages."
    st.subheader("What each stage adds")
    st.caption("A list is made in three stages: sources propose candidates, a model orders them, re-ranking applies rules and adds variety. Each is measured on the validation "
               "days, before and after; a model orders a surface only where it is clearly ahead of the sources.")
    frame = stages(manifest)
    if frame.is_empty():
        nothing_yet("This bundle does not say what its stages added.", "`make train` measures it")
        return
    st.dataframe(frame, hide_index=True, width="stretch", alt="NDCG@10 before and after each stage", placeholder="–", column_config={
        "stage": st.column_config.TextColumn("Stage", pinned=True), "what": st.column_config.TextColumn("What is done"),
        "before": st.column_config.NumberColumn("NDCG@10 before", format="%.3f", help="Of the order by the sources alone, or of the list by relevance alone"),
        "after": st.column_config.NumberColumn("after", format="%.3f", help="With this stage"),
        "error": st.column_config.NumberColumn("± of the difference", format="%.3f", help="Standard error: a difference of less than twice this may be chance")})
