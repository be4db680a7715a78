"""Experiments: what is tried on whom, whether the split is as planned, what may be said so far, and what another strength of exploration would have earned."""
import time
from pathlib import Path
from typing import cast

import polars as pl
import streamlit as st

from app.parts.business.tables import below
from app.parts.charts import BLUE, GREEN, RED, drawn, intervals, over_days
from app.parts.page import nothing_yet, settings
from app.parts.wording import day, percent, plain
from reco.experiments.assignment import HOLDOUT, Experiment, ExperimentError, Experiments, Variant, read_experiments

METRICS = {"CTR": "Click rate (CTR)", "CVR": "Conversion (CVR)", "AOV": "Order value (AOV)", "revenue_per_shopper": "Revenue per shopper", "retention_7d": "Back within a week", "preference": "Preferred in drafted lists"}
CALLED = {"ahead": "ahead, beyond chance", "behind": "behind, beyond chance"} # any other verdict: not decided
MEANING = {"ahead, beyond chance": GREEN, "behind, beyond chance": RED, "not decided": BLUE}
SERVED = {"champion": "", "challenger": "lists of the challenger, the model that waits at the gates", "non_personalised": "the list of somebody of whom nothing is known"}
RULES = {"from": "`[experiments] file` in settings.ini names a TOML file; docs/experiments.md shows one", "kpis": "`make kpis` reads every experiment that has begun"}

@st.cache_data(ttl=60, show_spinner=False)
def _book(path: str) -> Experiments: return read_experiments(Path(path) if path else None)

def book() -> tuple[Experiments, str]: # what is written in the file, and what is wrong with it
    "The experiments of the settings."
    named = settings().experiments.file
    try: return _book(str(settings().path(named).resolve()) if named else ""), ""
    except ExperimentError as e: return Experiments(), str(e)

# ---- in words -------------------------------------------------------------------------------------------------------

def differs(
    v: Variant,
) -> str: # empty when nothing does
    "What a variant changes."
    served = SERVED.get(v.serve, f"lists of the model {v.serve}")
    changed = [f"[{section}] {k} = {x}" for section in ("rerank", "explore", "rules") for k, x in getattr(v, section).items()]
    return "; ".join([*([served] if served else []), *changed])

def state(
    e: Experiment,
    now_ms: float,
) -> str:
    "Whether it runs."
    since, until = e.window
    return "has not begun" if now_ms < since else "over" if now_ms >= until else "running"

def when(e: Experiment) -> str: return " ".join([*([f"from {e.start:%-d %b %Y}"] if e.start else []), *([f"until {e.until:%-d %b %Y}"] if e.until else [])]) or "without an end"

def verdict_of(
    r: dict,       # of `readouts`
    control: str,
) -> str: # Markdown
    "One row as a sentence."
    what, v = METRICS.get(r["metric"], plain(r["metric"])), f"**{plain(r['variant'])}**"
    range_ = f" (between {percent(r['low'], sign=True)} and {percent(r['high'], sign=True)})" if r["low"] is not None and r["high"] is not None else ""
    match r["verdict"]:
        case "ahead" | "behind": return f"{what}: {v} is {r['verdict']} of {plain(control)}".replace("behind of", "behind") + f" by {percent(abs(r['lift']))}{range_}."
        case "not decided": return f"{what}: not decided; {v} is at {percent(r['lift'], sign=True)}{range_}."
        case "too few shoppers": return f"{what}: too few shoppers yet to say anything."
        case other: return f"{what}: {plain(other)}."

def beyond(n: int, of: int) -> str: return f"{n} of {of} differences" if n else "No difference" # the sentence goes on

def split_said(
    split_p: float|None, limit: float,
) -> None:
    "Whether shoppers are where they were planned to be."
    if split_p is None: return
    if split_p >= limit: st.badge(f"Split as planned (p = {split_p:.2g})", icon=":material/check:", color="green", help="The sample-ratio check: the chance of a split at least this far from the planned shares.")
    else: st.error(f"The shares of shoppers are not as planned (chance of that: {split_p:.1e}, limit {limit:g}). Nothing is said of this experiment: whatever keeps shoppers out of a variant would bias it. "
                   "Look for redirects, caches, bots, or an edited file.", icon=":material/balance:")

# ---- one experiment -------------------------------------------------------------------------------------------------

def tried(
    e: Experiment,
) -> None:
    "Variants, shares, differences."
    about = [f"{percent(e.share, 0)} of the shoppers take part", when(e)]
    if e.surfaces: about.append("on " + ", ".join(e.surfaces))
    if e.interleave: about.append("each list is drafted from both variants, and clicks say whose items are preferred")
    st.caption(plain("; ".join(about)) + "\\.")
    rows = [{"Variant": v.name, "Share": v.weight, "What is different": differs(v) or ("nothing: the control" if not n else "nothing")} for n, v in enumerate(e.variant)]
    st.dataframe(pl.DataFrame(rows), hide_index=True, width="stretch", column_config={"Share": st.column_config.NumberColumn(format="percent", width="small")}, alt=f"variants of {e.name}")

def said(
    rows: pl.DataFrame, # `readouts` of one experiment
    name: str, control: str,
) -> None:
    "What may be said so far, and how that came about."
    order = pl.col("metric").replace_strict({m: n for n, m in enumerate(METRICS)}, default=len(METRICS), return_dtype=pl.Int64)
    last = rows.filter(pl.col("day") == pl.col("day").max()).sort("variant", order, "metric")
    split_said(cast("float|None", last["split_p"].min()), settings().experiments.srm_alpha)
    told = [verdict_of(r, control) for r in last.iter_rows(named=True)]
    st.markdown("\n".join(f"- {t}" for t in told))
    several = last["variant"].n_unique() > 1
    label = pl.col("metric").replace(METRICS)
    drawable = last.filter(pl.col("low").is_not_null(), pl.col("high").is_not_null()).select(
        name=pl.format("{}: {}", "variant", label) if several else label, x="lift", low="low", high="high", colour=pl.col("verdict").replace_strict(CALLED, default="not decided"))
    if drawable.height:
        decided = drawable.filter(pl.col("colour") != "not decided").height
        st.markdown(f"###### {beyond(decided, drawable.height)} to {plain(control)} {'are' if decided > 1 else 'is'} beyond chance")
        drawn(intervals(drawable, f"change against {control}", "+.0%", MEANING), f"Experiment {name}: " + "; ".join(t.replace("\\", "").replace("*", "") for t in told))
        st.caption(f"As of {day(max(last['day']))}, {last['shoppers'].sum():,} shoppers in the variants. Intervals hold however often one looks (they are sequentially valid), and are wider than usual ones for that: "
                   "deciding the first time one is off zero is allowed.")
    history(rows, name)
    below(rows.sort("day", "variant", "metric"), f"readouts {name}")

def history(
    rows: pl.DataFrame, # `readouts` of one experiment
    name: str,
) -> None:
    "How the intervals have narrowed."
    if rows["day"].n_unique() < 2: return
    there = rows.filter(pl.col("low").is_not_null(), pl.col("high").is_not_null())
    metrics = [m for m in METRICS if m in there["metric"].unique().to_list()]
    if not metrics: return
    with st.expander("How it came about, day by day", icon=":material/timeline:"):
        metric = st.selectbox("Metric", metrics, format_func=METRICS.__getitem__, key=f"metric of {name}")
        frame = there.filter(pl.col("metric") == metric).select("day", y="lift", low="low", high="high", **({"name": "variant"} if rows["variant"].n_unique() > 1 else {})).sort("day")
        drawn(over_days(frame, f"change of {METRICS[metric]}", "+.0%", zero=True, rule=0.0), f"Change of {METRICS[metric]} by day with its interval, experiment {name}")

def one(
    name: str,
    e: Experiment|None,        # of the file; None when it is not there any more, or for the holdout
    rows: pl.DataFrame,        # `readouts` of it
    share: float = 0.0,        # of the holdout
) -> None:
    "An experiment, whole."
    with st.container(border=True):
        if e is not None: st.markdown(f"##### {plain(name)}: {state(e, 1_000*time.time())}")
        elif name == HOLDOUT: st.markdown("##### Holdout: what all changes together are worth")
        else: st.markdown(f"##### {plain(name)} is not in the experiments file any more")
        if e is not None: tried(e)
        elif name == HOLDOUT: st.caption(f"{percent(share)} of the shoppers are in no experiment; everybody else is held beside them." if share else "Shoppers who are in no experiment; everybody else is held beside them.")
        if rows.height: said(rows, name, e.variant[0].name if e is not None else "the holdout" if name == HOLDOUT else "the control")
        else: nothing_yet("It has not been read yet: nothing was shown in its time, or it has not begun.", RULES["kpis"])

def experiments(
    readouts: pl.DataFrame|None, # the table
) -> None:
    "All experiments: of the file, and those that were read before."
    st.markdown("##### Experiments")
    st.caption("An experiment shows some shoppers something else and compares. Who is in which variant is drawn by a hash of the shopper's id, so chance alone decides, and the difference is the variant's.")
    planned, trouble = book()
    if trouble: st.error("The experiments file cannot be read; endpoints go on with what they had:\n\n" + plain(trouble), icon=":material/error:")
    table = readouts if readouts is not None else pl.DataFrame(schema={"experiment": pl.String, "day": pl.Date})
    mine = lambda name: table.filter(pl.col("experiment") == name)
    for e in planned.experiment: one(e.name, e, mine(e.name))
    if planned.holdout or mine(HOLDOUT).height: one(HOLDOUT, None, mine(HOLDOUT), planned.holdout)
    gone = sorted({*table["experiment"].unique()} - {e.name for e in planned.experiment} - {HOLDOUT})
    for name in gone: one(name, None, mine(name))
    if not planned.experiment and not planned.holdout and not table.height and not trouble: nothing_yet("No experiment is planned, and none was read.", RULES["from"], RULES["kpis"])

# ---- what if --------------------------------------------------------------------------------------------------------

REWARDS = {"clicks": "Clicks per list", "purchases": "Purchases per list", "revenue": "Revenue per list"}
BEST = "dr" # doubly robust: the estimate that is right if either the propensities or the guesses are

def what_ifs(
    table: pl.DataFrame|None, # `what_ifs`
) -> None:
    "What another strength of exploration would have earned, from what was drawn."
    st.markdown("##### What if exploration were stronger, or off?")
    st.caption("Some lists give one place to a new item, and write down with which chance (`[explore] epsilon`). From those chances one can tell, without showing it to anybody, what another strength would have earned.")
    if table is None or not table.height:
        return nothing_yet("Nobody has asked yet.", "`make whatif` judges other strengths on the last 28 days; it needs lists with `[explore] epsilon` above 0")
    left, right = st.columns(2)
    rewards = sorted(table["reward"].unique(), key=lambda r: [*REWARDS, r].index(r))
    with left: reward = st.pills("Counted", rewards, required=True, default=rewards[0], format_func=lambda r: REWARDS.get(r, r), key="reward")
    with right: surface = st.selectbox("Surface", table["surface"].unique().sort().to_list(), key="what-if surface")
    mine = table.filter(pl.col("surface") == surface).filter(pl.col("day") == pl.col("day").max(), pl.col("reward") == reward, pl.col("method") == BEST)
    judged, refused = mine.filter(pl.col("gain").is_not_null()), mine.filter(pl.col("gain").is_null())
    if judged.height:
        best = judged.sort("gain", descending=True).row(0, named=True)
        clear = judged.filter((pl.col("gain_low") > 0) | (pl.col("gain_high") < 0)).height
        st.markdown(f"###### {plain(best['policy'])} would have earned most; {beyond(clear, judged.height).lower()} to what ran {'are' if clear > 1 else 'is'} beyond chance")
        frame = judged.select(name=pl.col("policy"), x="gain", low="gain_low", high="gain_high")
        drawn(intervals(frame, f"{REWARDS.get(reward, reward)} against what ran", "+.3~g"), f"Estimated gain in {REWARDS.get(reward, reward)} of each policy with its 95% interval")
        st.caption(f"As of {day(judged['day'][0])}, from {judged['requests'][0]:,} lists; 95% intervals, doubly robust estimate (right if either the written chances or the guesses of rewards are).")
    for r in refused.iter_rows(named=True): st.caption(plain(f"{r['policy']}: {r['verdict']}"))
    below(table.sort("day", "surface", "policy", "reward", "method"), "what ifs")

