"""What the gates found of a bundle, beside what is served; what the leak alarms of its training found; who was refused."""
import re

import polars as pl
import streamlit as st

from app.parts.charts import GREEN, RED, SKY, drawn, intervals
from app.parts.page import nothing_yet
from app.parts.quality import kept
from app.parts.quality.evaluation import number
from app.parts.quality.terms import GATES, alarm
from app.parts.quality.trainings import moment

COMPARED = "better than the champion", "ranker no worse", "new users", "cold items", "long tail", "better than popularity"
FOUND = re.compile(r"([\d.]+) beside ([\d.]+), ([+-][\d.,]+)% to ([+-][\d.,]+)%, ([\d,]+) shoppers") # how `reco.evaluation.gates.Difference` is written down
SURELY = {"better": "surely better", "unclear": "may be chance", "worse": "surely worse"}
SHARES = {*COMPARED, "coverage", "offline equals online"} # gates whose value and limit are shares

def figure(
    name: str,       # of a gate
    x: float|None,
) -> str:
    "A value or a limit as one reads it."
    if x is None: return "–"
    if name in SHARES: return f"{x:+.1%}" if name in COMPARED else f"{x:.2%}"
    return f"{x:,.1f} ms" if name.startswith("latency") else f"{x:.4g}"

def gates(
    report: dict, # of `kept.reports`
) -> list[dict]:  # name, value, limit, passed, what; those that failed first
    "The rows of a report that can be read."
    rows = [{"name": str(g.get("name")), "value": number(g.get("value")), "limit": number(g.get("limit")), "passed": bool(g.get("passed")), "what": str(g.get("what") or "")}
            for g in report.get("gates") or [] if isinstance(g, dict)]
    return sorted(rows, key=lambda g: g["passed"])

# ---- champion against challenger ------------------------------------------------------------------------------------

def differences(
    found: list[dict], # of `gates`
) -> pl.DataFrame:     # name, x, low, high, colour, shoppers; in the order of COMPARED
    "How far the challenger is ahead of whom it was compared with, as the gates wrote it down."
    rows = []
    for g in sorted((g for g in found if g["name"] in COMPARED), key=lambda g: COMPARED.index(g["name"])):
        if not (m := FOUND.search(g["what"])): continue
        ours, theirs, low, high = (float(t.replace(",", "")) for t in m.groups()[:4])
        rows.append({"name": g["name"], "x": (ours - theirs)/theirs if theirs else ours, "low": low/100, "high": high/100, "shoppers": int(m[5].replace(",", "")),
                     "colour": "better" if low > 0 else "worse" if high < 0 else "unclear"})
    return pl.DataFrame(rows, schema={"name": pl.String, "x": pl.Float64, "low": pl.Float64, "high": pl.Float64, "shoppers": pl.Int64, "colour": pl.String})

def compared(
    report: dict,
    found: list[dict], # of `gates`
) -> None:
    "Challenger and champion on the same requests."
    frame, champion = differences(found), str(report.get("champion") or "")
    st.subheader("Challenger against champion" if champion else "Against showing everyone what is popular")
    if frame.is_empty():
        st.info("Nobody was compared: there was no champion then, or it could not be asked. The table below says which.", icon=":material/info:")
        return
    confidence = number((report.get("limits") or {}).get("confidence")) or .95
    popular, others = (frame.filter(match) for match in (pl.col("name") == COMPARED[-1], pl.col("name") != COMPARED[-1]))
    beside = [("what is served", r) for r in others.head(1).iter_rows(named=True)] + [("showing everyone what is popular", r) for r in popular.iter_rows(named=True)]
    st.markdown("On the same requests its ranking quality is " + ", and ".join(f"**{r['x']:+.1%}** beside {whom} ({r['low']:+.1%} to {r['high']:+.1%}: {SURELY[r['colour']]})"
                                                                              for whom, r in beside) + ".")
    frame = others if others.height else popular # a lead over popularity is large: beside it nothing else could be told
    st.caption("Each line is the difference of NDCG@10 (how far up the items stand that were then bought) on the same requests, as a share of the other side's, with "
               f"{confidence:.0%} on each side of the interval; shoppers are drawn anew, again and again. The champion is asked with data as old as it is by then.")
    drawn(intervals(frame, "difference in ranking quality", "+.0%", dict(zip(SURELY, (GREEN, SKY, RED), strict=True))),
          "How far the challenger is ahead, with intervals, as a whole and for parts of shoppers and items.")

# ---- the gates -----------------------------------------------------------------------------------------------------

def banner(
    name: str,
    report: dict,
    found: list[dict], # of `gates`
) -> None:
    "Passed or refused, and by what."
    failed, at = [g for g in found if not g["passed"]], moment(report.get("at"))
    day = f" on {at:%d %B %Y}" if at else ""
    if not failed: st.success(f"Passed all {len(found)} gates{day}.", icon=":material/verified:")
    else:
        st.error(f"Refused{day}: {len(failed)} of {len(found)} gates failed, and what was served before went on.", icon=":material/block:")
        for g in failed: st.text(f"{g['name']}: {figure(g['name'], g['value'])}, limit {figure(g['name'], g['limit'])}. {g['what']}")
    if report.get("reason"): st.text(f"Judged without the champion, which could not be asked. Reason given: {report['reason']}")

def gate_table(
    found: list[dict], # of `gates`
) -> None:
    "Every gate with what it asks."
    rows = [{"passed": "✓ passed" if g["passed"] else "✗ failed", "gate": g["name"], "value": figure(g["name"], g["value"]), "limit": figure(g["name"], g["limit"]),
             "asks": GATES.get(g["name"], ""), "what": g["what"]} for g in found]
    st.dataframe(pl.DataFrame(rows), hide_index=True, width="stretch", height="content", alt="Every gate with value, limit and whether it passed", column_config={
        "passed": st.column_config.TextColumn("Result", pinned=True), "gate": "Gate", "value": st.column_config.TextColumn("Found", alignment="right"),
        "limit": st.column_config.TextColumn("Limit", help="What was agreed in [gates] of settings.ini", alignment="right"),
        "asks": st.column_config.TextColumn("Asks", width="large"), "what": st.column_config.TextColumn("In detail", width="large")})

def show_gates(
    name: str,      # of the bundle
    manifest: dict,
) -> None:
    "The tab of the gates."
    st.subheader("The gates")
    st.caption("A model that was trained is only a challenger. It is served after it has passed every gate: better than what is served, no group left behind, no leak, fast enough.")
    if (report := kept.reports().get(name)) is None:
        nothing_yet("The gates have not judged this bundle.", f"`python flows/promote.py run --bundle {name}` holds it to the gates, and publishes it if it passes")
    else:
        found = gates(report)
        banner(name, report, found)
        gate_table(found)
        compared(report, found)
    show_alarms(manifest)
    show_refusals()

# ---- leak alarms and refusals --------------------------------------------------------------------------------------

def show_alarms(
    manifest: dict,
) -> None:
    "What the training looked for before it was believed."
    st.subheader("Leak alarms")
    st.caption("A model that saw the future, or the answers, looks brilliant and is worthless. Every training looks for that and stops when an alarm goes off.")
    rows = [{"result": "✓ quiet" if a.get("passed") else "✗ went off", "alarm": str(a.get("name")), "value": number(a.get("value")), "limit": number(a.get("limit")),
             "asks": alarm(str(a.get("name")))} for a in manifest.get("alarms") or [] if isinstance(a, dict)]
    if not rows:
        nothing_yet("This bundle does not say what the alarms of its training found.", "`make train` asks them every time")
        return
    st.dataframe(pl.DataFrame(rows, schema_overrides={"value": pl.Float64, "limit": pl.Float64}), hide_index=True, width="stretch", placeholder="–",
                 alt="Every leak alarm with value, limit and whether it was quiet", column_config={
        "result": st.column_config.TextColumn("Result", pinned=True), "alarm": st.column_config.TextColumn("Alarm", width="medium"),
        "value": st.column_config.NumberColumn("Found", format="%.4g"), "limit": st.column_config.NumberColumn("Limit", format="%.4g", help="At most"),
        "asks": st.column_config.TextColumn("Asks", width="large")})

REFUSED = {"promotion_refused": "refused by the gates", "training_stopped": "training stopped by a leak alarm"}

def refusals() -> pl.DataFrame: # at, bundle, what, why; newest first
    "Every challenger that was turned down and every training that was stopped, of the reports and of the log of what happened."
    told = [{"at": moment(e.get("at")), "bundle": str(e["about"].get("bundle") or "") if isinstance(e.get("about"), dict) else "", "what": REFUSED[e["what"]], "why": str(e.get("text") or "")}
            for e in kept.happened() if e.get("what") in REFUSED]
    known = {r["bundle"] for r in told}
    for name, report in kept.reports().items():
        failed = [g["name"] for g in gates(report) if not g["passed"]]
        if failed and name not in known: told.append({"at": moment(report.get("at")), "bundle": name, "what": REFUSED["promotion_refused"], "why": ", ".join(failed)})
    frame = pl.DataFrame(told, schema={"at": pl.Datetime("us", "UTC"), "bundle": pl.String, "what": pl.String, "why": pl.String})
    return frame.sort("at", descending=True, nulls_last=True)

def show_refusals() -> None:
    "What was kept out of the shop."
    st.subheader("Kept out of the shop")
    frame = refusals()
    if frame.is_empty():
        st.caption("No challenger was refused and no training was stopped so far. A refusal leaves what is served alone, and is kept here with its reason.")
        return
    st.caption("Each of these changed nothing for shoppers: what was served went on.")
    st.dataframe(frame, hide_index=True, width="stretch", alt="Challengers that were refused and trainings that were stopped", placeholder="–", column_config={
        "at": st.column_config.DatetimeColumn("When (UTC)", format="D MMM YYYY, HH:mm", timezone="UTC"), "what": "What", "bundle": "Bundle",
        "why": st.column_config.TextColumn("Why", width="large")})
