"""What variety and fairness cost in ranking quality, and which point was chosen for that price."""
import altair as alt
import polars as pl
import streamlit as st

from app.parts.charts import COLOURS, HEIGHT, RED, Layers, drawn
from app.parts.page import nothing_yet
from app.parts.quality.evaluation import number

MEASURED = {"NDCG@10": "ndcg", "coverage@10": "coverage", "tail@10": "tail_share", "new@10": "new_share", "gini@10": "gini", "lost": "lost"} # as kept → column here
STRENGTHS = {"diversity": "how much the items of one list differ", "tail": "how much items that everyone would get are held back", "new": "how much new items are lifted",
             "keep_first": "places at the top that all three leave alone"}
SHARES = {"coverage": ("Catalogue shown", "Share of the catalogue that stands in somebody's first ten places"),
          "tail_share": ("Places for the long tail", "Share of the first ten places that go to all but the most popular fifth of the items"),
          "new_share": ("Places for new items", "Share of the first ten places that go to items that entered the shop lately")}
PRICE = .01 # [rerank] max_loss, where a bundle does not say
RELEVANCE, ENDS = "by relevance alone", "from relevance alone to what was chosen"

def points(
    manifest: dict,
) -> pl.DataFrame: # walked, the columns of MEASURED, STRENGTHS, chosen; the first is without re-ranking; empty where nothing was kept
    "What validation showed at each strength that was tried; the two ends where the bundle kept no more."
    v, strengths = manifest.get("variety") or {}, manifest.get("strengths") or {}
    rows = [r for r in manifest.get("frontier") or [] if isinstance(r, dict)] or [v[k] | {"walked": ENDS} for k in ("without", "chosen") if v.get(k)]
    frame = pl.DataFrame([{"walked": str(r.get("walked") or RELEVANCE)} | {c: number(r.get(kept)) for kept, c in MEASURED.items()} | {c: number(r.get(c)) for c in STRENGTHS}
                          for r in rows], schema={"walked": pl.String} | dict.fromkeys([*MEASURED.values(), *STRENGTHS], pl.Float64))
    same = pl.all_horizontal(pl.col(c) == number(strengths.get(c)) for c in STRENGTHS) if strengths else pl.lit(False)
    return frame.filter(pl.col("ndcg").is_not_null()).with_columns(chosen=same.fill_null(False)).with_columns(chosen=pl.col("chosen") & (pl.col("chosen").cum_sum() == 1))

def price_of(
    manifest: dict,
) -> float: # share of NDCG@10
    "What variety was allowed to cost."
    return number(((manifest.get("settings") or {}).get("rerank") or {}).get("max_loss")) or PRICE

def frontier(
    frame: pl.DataFrame, # of `points`
    price: float,        # share of NDCG@10 that may be lost
) -> Layers:
    "Ranking quality that was lost against the share of the catalogue that is shown."
    x = alt.X("lost:Q", title="ranking quality lost, share of NDCG@10", axis=alt.Axis(format=".1%", tickCount=6))
    y = alt.Y("coverage:Q", title="catalogue shown", axis=alt.Axis(format=".0%", tickCount=6), scale=alt.Scale(zero=False))
    tip = [alt.Tooltip("walked:N", title="walked"), alt.Tooltip("ndcg:Q", title="NDCG@10", format=".3f"), alt.Tooltip("lost:Q", format=".2%"),
           *(alt.Tooltip(f"{c}:Q", title=label, format=".1%") for c, (label, _) in SHARES.items()), *(f"{c}:Q" for c in STRENGTHS)]
    colour = alt.Color("walked:N", title=None, scale=alt.Scale(range=COLOURS), legend=alt.Legend(orient="bottom", columns=2, labelLimit=260))
    limit = alt.Chart(pl.DataFrame({"lost": [price]})).mark_rule(strokeDash=[5, 4], color=RED).encode(x="lost:Q")
    walks = alt.Chart(frame).mark_line(point=True).encode(x=x, y=y, order="lost:Q", color=colour, tooltip=tip)
    star = alt.Chart(frame.filter("chosen")).mark_point(shape="diamond", size=260, filled=False, strokeWidth=3, color=RED).encode(x=x, y=y, tooltip=tip)
    return alt.layer(limit, walks, star).properties(height=HEIGHT + 160) # axis and legend are within

def bargain(
    before: dict, after: dict, # rows of `points`
) -> str:                      # Markdown
    "What was given for what."
    lost, shown = 1 - after["ndcg"]/before["ndcg"] if before["ndcg"] else 0., (before["coverage"], after["coverage"])
    if after["ndcg"] >= before["ndcg"]: paid = "At no cost in ranking quality"
    else: paid = f"For **{lost:.1%}** of ranking quality"
    return f"{paid}, **{shown[1]:.1%}** of the catalogue is shown instead of {shown[0]:.1%}." if None not in shown else f"{paid}, lists are more varied."

def gains(
    before: dict, after: dict, # rows of `points`
) -> None:
    "What the chosen point gives and takes, number by number."
    with st.container(horizontal=True):
        st.metric("Ranking quality", f"{after['ndcg']:.3f}", f"{after['ndcg']/before['ndcg'] - 1:+.1%}" if before["ndcg"] else None, border=True, height="stretch",
                  help="NDCG@10 on validation: how far up in the first ten places the items stand that the shopper then touched or bought; 1 is best")
        for c, (label, means) in SHARES.items():
            if after[c] is None: continue
            st.metric(label, f"{after[c]:.1%}", None if before[c] is None else f"{100*(after[c] - before[c]):+.1f} points", border=True, height="stretch", help=means)

def show_variety(
    manifest: dict,
) -> None:
    "The tab that says what variety costs."
    frame, price = points(manifest), price_of(manifest)
    st.subheader("What variety costs, and what it buys")
    st.caption("A list of the likeliest items alone shows everyone nearly the same. Re-ranking makes lists differ, gives rarer and new items a chance, and costs a little ranking "
               f"quality. Which point is worth it is chosen on the validation days: the most of the catalogue for at most {price:.1%} of ranking quality (`[rerank] max_loss`).")
    if frame.is_empty():
        nothing_yet("No frontier was kept with this bundle: all strengths were fixed in `[rerank]`, or it was not made by a training.",
                    "`make train` with `auto` strengths walks the frontier and keeps it")
        return
    chosen = frame.filter("chosen")
    if chosen.height:
        st.markdown(bargain(frame.row(0, named=True), chosen.row(0, named=True)))
        gains(frame.row(0, named=True), chosen.row(0, named=True))
    if frame.height < 2 or frame["lost"].null_count() == frame.height: st.caption("The bundle kept only this one point.")
    else:
        drawn(frontier(frame, price), "Share of the catalogue that is shown against ranking quality that is lost, a line per strength that was tried; "
              "the chosen point is marked and the price limit is a dashed line.")
        st.caption("Each point is a strength that was tried, each line a walk up one strength; further up is more variety, further right is dearer. The dashed line is the price "
                   "that may be paid, the diamond what was chosen." + ("" if frame.height > 2 else " This bundle kept the two ends only."))
    with st.expander("All points as a table"):
        shares = {c: st.column_config.NumberColumn(label, format="percent", help=means) for c, (label, means) in SHARES.items()}
        st.dataframe(frame, hide_index=True, width="stretch", alt="Every point of the frontier", placeholder="–", column_config=shares | {
            "walked": st.column_config.TextColumn("Walked", pinned=True), "ndcg": st.column_config.NumberColumn("NDCG@10", format="%.4f"),
            "gini": st.column_config.NumberColumn("Gini@10", format="%.3f", help="Unevenness of the places over items: 0 is even"),
            "lost": st.column_config.NumberColumn("lost", format="percent", help="Share of ranking quality that this point costs"), "chosen": "chosen",
            **{c: st.column_config.NumberColumn(c, format="%.2f", help=means.capitalize()) for c, means in STRENGTHS.items()}})
    st.caption("Fairness between groups of shoppers is not measured: the shop's log says nothing of age, sex or origin. What is measured is fairness between items.")
