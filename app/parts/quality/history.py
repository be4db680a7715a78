"""What was published when, by whom and why; every training with what it measured; the model card and the report pages."""
import base64
import re

import polars as pl
import streamlit as st

from app.parts.charts import drawn, over_days
from app.parts.page import nothing_yet
from app.parts.quality import kept, trainings
from app.parts.quality.terms import MEASURES

# ---- publications --------------------------------------------------------------------------------------------------

def show_published() -> None:
    "The tab of what was served."
    st.subheader("What was published")
    now = kept.standing()
    if not now.lines:
        nothing_yet("Nothing was published yet.", "`make train` trains, and publishes what passes the gates", "`make demo` does all of it on a simulated shop")
    else:
        st.caption("Every change of what shoppers get is a line here, and is never rewritten. Endpoints follow within a second.")
        rows = [{"at": trainings.moment(p.at), "how": "rolled back to" if p.back else "published", "bundle": p.bundle_id, "now": p.bundle_id == now.champion and n == 0,
                 "before": p.before, "who": p.who, "why": p.why} for n, p in enumerate(reversed(now.lines))]
        st.dataframe(pl.DataFrame(rows, schema_overrides={"at": pl.Datetime("ms", "UTC")}), hide_index=True, width="stretch", placeholder="–",
                     alt="Everything that was published, newest first", column_config={
            "at": st.column_config.DatetimeColumn("When (UTC)", format="D MMM YYYY, HH:mm", timezone="UTC"), "how": "How", "bundle": "Bundle",
            "now": st.column_config.CheckboxColumn("Served now"), "before": "Instead of", "who": "By", "why": st.column_config.TextColumn("Why", width="large")})
        with st.expander("Taking it back", icon=":material/undo:"):
            if now.back: st.markdown("One command serves what was served before, within seconds, and keeps who did it and why. It would publish:")
            else: st.markdown("There is nothing to go back to yet: a rollback serves what was served before, within seconds.")
            st.code("\n".join([*now.back[:1], 'python -m app.bundle rollback --why "what was wrong"']), language="sh")
    show_trainings()

# ---- trainings -----------------------------------------------------------------------------------------------------

def lines(
    frame: pl.DataFrame, # COLUMNS of trainings
    measure: str,        # of MEASURES
) -> pl.DataFrame:       # `day`, `y`, perhaps `low` and `high`, as `over_days` takes it
    "A measure over trainings, with its interval where one is kept."
    if measure == "NDCG@10": return frame.select(day="at", y=measure, low="low", high="high").drop_nulls("y")
    return frame.select(day="at", y=measure).drop_nulls("y")

def show_trainings() -> None:
    "A measure over all trainings."
    st.subheader("Is it getting better?")
    frame, trouble = trainings.of_mlflow()
    if trouble:
        st.warning(f"MLflow, which keeps every training, cannot be asked. What follows is of the bundles that are still here.\n\n`{trouble.replace('`', ' ')}`",
                   icon=":material/cloud_off:")
    if frame.is_empty(): frame = trainings.of_bundles()
    if frame.is_empty():
        nothing_yet("No training was recorded yet.", "`make train` records every training in MLflow ([tracking] in settings.ini)")
        return
    measure = st.selectbox("Measure over trainings", list(MEASURES), format_func=lambda m: MEASURES[m].label, key="over_trainings", persist_state="page")
    told = MEASURES[measure]
    st.caption(f"{told.means} Each point is one training, on its own last days: days differ, so a small step is no news. "
               + ("The band is the 95% interval." if measure == "NDCG@10" else ""))
    values = frame[measure].drop_nulls()
    if len(values) > 1:
        text = (lambda x: f"{x:.1%}") if told.column == "percent" else (lambda x: f"{x:.3f}")
        st.markdown(f"The latest training: **{text(values[-1])}**; the one before: {text(values[-2])}; the first of {len(values)}: {text(values[0])}.")
        drawn(over_days(lines(frame, measure), told.label, told.fmt), f"{told.label} of every training, by the day on which it was made.")
    else: st.caption("There was one training so far; the second one makes this a line.")
    shown = frame.reverse().select("at", "bundle", *MEASURES, "popularity", "asof", "sha")
    st.dataframe(shown, hide_index=True, width="stretch", alt="Every training with its measures, newest first", placeholder="–", column_config={
        "at": st.column_config.DatetimeColumn("Trained (UTC)", format="D MMM YYYY, HH:mm", timezone="UTC"), "bundle": "Bundle",
        **{m: st.column_config.NumberColumn(m, format=t.column, help=t.means) for m, t in MEASURES.items()},
        "popularity": st.column_config.NumberColumn("popularity's NDCG@10", format="%.3f", help="Of showing everyone what is popular, on the same requests"),
        "asof": st.column_config.DatetimeColumn("Knows up to (UTC)", format="D MMM YYYY", timezone="UTC"), "sha": st.column_config.TextColumn("Code", help="Git commit")})
    st.caption("More of each training, such as its parameters and figures: `mlflow ui --backend-store-uri sqlite:///data/mlflow/mlflow.db`")

# ---- the card and the reports --------------------------------------------------------------------------------------

def lowered(
    card: str, # Markdown
) -> str:
    "Headings two levels further down: the page has its own. Dollars stay dollars: Streamlit would read them as a formula."
    return re.sub(r"^(#+ )", r"##\1", card, flags=re.MULTILINE).replace("$", "\\$")

def show_card(
    name: str,      # of the bundle
    manifest: dict,
) -> None:
    "The tab of the model card and the report pages."
    from reco.model_card import model_card
    show_pages(name)
    st.subheader("Model card")
    report = kept.reports().get(name)
    try: card = model_card(manifest, report.get("gates") if report else None)
    except (KeyError, TypeError, ValueError, AttributeError) as e: # what was made elsewhere may hold anything
        st.error(f"No card can be written of this manifest: {type(e).__name__}: {e}", icon=":material/error:")
        return
    st.caption("What it is for and what not, what it learned from, how good it is, whom it shows, where not to trust it.")
    st.download_button("Download the card", card, f"model_card_{name}.md", "text/markdown", icon=":material/download:", on_click="ignore")
    with st.container(border=True): st.markdown(lowered(card))

# A report may hold what comes of the shop. As a data address it has no origin of its own: it cannot reach the app, and nothing in it runs or loads.
GUARD = ("<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:\">"
         "<style>html{background:#fff}</style>")

def guarded(
    html: str, # a page of `make report`
) -> str:      # an address
    "A report as a frame may show it."
    return "data:text/html;charset=utf-8;base64," + base64.b64encode(html.replace("<head>", f"<head>{GUARD}", 1).encode()).decode()

def show_pages(
    name: str, # of the bundle
) -> None:
    "The notebooks that were run on the bundle."
    st.subheader("Reports")
    if not (pages := kept.pages(name)):
        nothing_yet("No report was written on this bundle.", f"`python flows/report.py run --bundle {name}` runs the notebooks on it: what it is worth, whom it fails and why, "
                    "what variety costs")
        return
    file = st.selectbox("Report", pages, format_func=lambda f: f.removesuffix(".html").lstrip("0123456789_").replace("_", " ").capitalize(), key="report")
    html = kept.page(name, file)
    with st.container(horizontal=True):
        look = st.toggle("Read it here", key="read")
        st.download_button("Download the page", html, f"{name}_{file}", "text/html", icon=":material/download:", on_click="ignore", key="page")
    if look: st.iframe(guarded(html), height=760, alt=f"The report {file.removesuffix('.html').replace('_', ' ')}")
