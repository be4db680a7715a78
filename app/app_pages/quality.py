"""How good the recommendations are, how that was measured, what was let into the shop and what was kept out."""
from html import escape

import streamlit as st

from app.client import EndpointError
from app.parts.page import endpoint, lead, nothing_yet, shown, since
from app.parts.quality import kept
from app.parts.quality.evaluation import metrics, show_evaluation
from app.parts.quality.history import show_card, show_published
from app.parts.quality.trainings import moment
from app.parts.quality.variety import show_variety
from app.parts.quality.verdicts import gates, show_gates

TABS = ["How good", "Variety", "Gates", "History", "Model card"]

def state(
    name: str,            # of a bundle
    now: kept.Standing,
) -> str:
    "What became of a bundle, in a word or two."
    if name == now.champion: return "served now"
    if any(p.bundle_id == name for p in now.lines): return "served before"
    if (report := kept.reports().get(name)) and not report.get("passed"): return "refused"
    return "waits to be judged" if name == now.challenger else "never served"

def day_of(
    name: str, # of a bundle: it begins with the moment that it knows
) -> str:
    "A bundle's name as people say it."
    at = moment(f"{name[:10]}T{name[11:13]}:{name[13:15]}")
    return f"{at:%d %b %Y, %H:%M}" if at else name

def coded(name: str) -> str: return f'<code style="font-size:.9em">{escape(name)}</code>'

@st.cache_data(ttl=15, show_spinner=False)
def answering(address: str) -> tuple[str, str]: # the bundle that the endpoint answers with, and what went wrong
    "What the endpoint says of itself."
    try: return endpoint().bundle_id(), ""
    except EndpointError as e: return "", str(e)

def answers_with(
    champion: str, # name; empty for none
) -> str:          # HTML
    "Whether the endpoint does what was published."
    name, trouble = answering(endpoint().address)
    if trouble: return "The endpoint does not answer: start it with <code>make serve</code>."
    if name == champion: return "The endpoint answers with it."
    return f"The endpoint answers with {coded(name or 'no bundle')}; it follows within seconds, or refuses what is published and goes on."

def show_standing(
    now: kept.Standing,
) -> None:
    "What is served and what waits."
    last = now.lines[-1] if now.lines else None
    if not now.champion: served = f"Nothing is served yet. {answers_with('')}"
    else:
        at = last and moment(last.at)
        how = f", {'taken back' if last.back else 'published'} {since(at)} by {escape(last.who or 'somebody')}" if last and at else ""
        served = f"<b>Served now:</b> {coded(now.champion)}{how}. {answers_with(now.champion)}"
    waits = ""
    if now.challenger and now.challenger != now.champion:
        waits = f"<br><b>Last trained:</b> {coded(now.challenger)}, {state(now.challenger, now)}."
    st.html(f'<p style="margin:0; line-height:1.6; overflow-wrap:anywhere">{served}{waits}</p>')

def picked(
    now: kept.Standing,
    names: list[str], # of bundles, newest first
) -> str:
    "The bundle that is looked at."
    first = next((n for n in (now.champion, now.challenger) if n in names), names[0])
    return st.selectbox("Bundle", names, index=names.index(first), format_func=lambda n: f"{day_of(n)} · {state(n, now)} · {n[-8:]}", key="bundle",
                        help="A bundle is everything that answers a request: sources, models, rules. It is named after the moment up to which it knows the shop.")

def figures(
    name: str,
    manifest: dict,
) -> None:
    "The few numbers that everybody asks for."
    whole = {r["system"]: r for r in metrics(manifest).filter(slice="all").iter_rows(named=True)}
    ours, popular = whole.get("pipeline", {}), whole.get("popularity", {})
    report = kept.reports().get(name)
    with st.container(horizontal=True):
        if ours.get("NDCG@10") is not None:
            st.metric("Ranking quality", f"{ours['NDCG@10']:.3f}", f"{ours['NDCG@10'] - popular['NDCG@10']:+.3f} beside popularity" if popular.get("NDCG@10") is not None else None,
                      border=True, height="stretch", help="NDCG@10 on the hold-out: how far up, in the first ten places, the items stand that the shopper then bought. 1 is best.")
        if ours.get("Recall@20") is not None:
            st.metric("Found", f"{ours['Recall@20']:.0%}", border=True, height="stretch", help="Recall@20: share of what the shopper then bought that is among the first twenty places")
        if ours.get("coverage@10") is not None:
            st.metric("Catalogue shown", f"{ours['coverage@10']:.0%}", border=True, height="stretch", help="Share of the catalogue that stands in somebody's first ten places")
        if report:
            rows = gates(report)
            st.metric("Gates passed", f"{sum(g['passed'] for g in rows)} of {len(rows)}", border=True, height="stretch", help="What a bundle has to show before it is served; see the tab Gates")

def page() -> None:
    "The page, top to bottom."
    from reco.bundle import BundleError
    lead("How good the recommendations are, how that was measured, and what was let into the shop.")
    try:
        now, names = kept.standing(), kept.bundles()
        show_standing(now)
        if not names:
            nothing_yet("There is no bundle yet, so there is nothing to judge.", "`make train` makes one from the lake, and publishes it if it passes the gates",
                        "`make demo` does all of it on a simulated shop")
            return
        name = picked(now, names)
        manifest = kept.manifest(name)
        figures(name, manifest)
        shows = lambda: show_evaluation(manifest), lambda: show_variety(manifest), lambda: show_gates(name, manifest), show_published, lambda: show_card(name, manifest)
        for tab, show in zip(st.tabs(TABS, key="part", bind="query-params"), shows, strict=True):
            with tab:
                if tab.open: show()
    except BundleError as e: st.error(f"The bundles cannot be read: {e}", icon=":material/error:")

if __name__ == "__main__": shown("Quality", page)
