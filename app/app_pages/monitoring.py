"""Is all well: what the endpoint does now, whether the shop has drifted from what the model learned, what data came in, what happened, and the two things that a person can do about it."""
from datetime import UTC, datetime

import polars as pl
import streamlit as st

from app.client import EndpointError
from app.parts.business.tables import below
from app.parts.charts import bars, drawn
from app.parts.monitoring.drifting import drift_page
from app.parts.monitoring.live import Counts, Traffic, by, proposed, stages, traffic, watched
from app.parts.monitoring.live_charts import over_time
from app.parts.monitoring.operations import happened, operations
from app.parts.monitoring.validation import validation
from app.parts.page import address, endpoint, endpoint_down, lead, nothing_yet, shown, since
from app.parts.wording import count, ms, percent, plain

EVERY_S, MINUTE = 3.0, 60.0 # between two looks; what is called now
TABS = ["Now", "Drift and retraining", "Incoming data", "What happened", "Operations"]
STAGE = {"store": "shopper's past, from the store", "past": "past, put in order", "candidates": "candidates", "features": "features", "ranking": "ranking", "reranking": "rules and variety", "response": "putting the answer together"}

def standing(
    ready: dict,
    counts: Counts,
) -> None:
    "Which bundle answers, how old it is, and whether anything is missing."
    ok, asof = ready.get("status") == "ready", counts.get(("reco_bundle_asof_timestamp_seconds", ()))
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        if ok: st.badge("Ready", icon=":material/check:", color="green", help="It answers, and the online store with the shoppers' pasts does too.")
        else: st.badge("Degraded: the online store is down", icon=":material/warning:", color="orange", help="Lists are made without the shopper's stored past, and say so.")
        st.markdown(f"Bundle **{plain(ready.get('bundle_id', ''))}**" + (f", which knows what happened until {since(datetime.fromtimestamp(asof, UTC))}" if asof else ""))
    if no := ready.get("refused"):
        st.warning(f"{plain(no.get('bundle_id') or 'What is published')} was published and is not served: {plain(no.get('reason', ''))}. The bundle before goes on.", icon=":material/block:")

def tiles(
    t: Traffic,
) -> None:
    "The figures that say whether shoppers are served well."
    of = lambda n: n/t.requests if t.requests else None
    shown = lambda x: percent(x) if t.lists else "–"
    rows = [("Requests a second", f"{t.rate:.1f}", "Lists, events and changes of items; what operators ask is not counted.") if t.seconds else
            ("Requests", f"{t.requests:,.0f}", "Lists, events and changes of items, since the endpoint started; what operators ask is not counted."),
            ("Half wait up to", ms(t.p50), "Half of the lists were there within this time (p50). Estimated from a histogram, like the next two."),
            ("95% wait up to", ms(t.p95), "95 of 100 lists were there within this time (p95)."), ("99% wait up to", ms(t.p99), "99 of 100 lists were there within this time (p99); the slowest one took longer."),
            ("Errors", percent(of(t.failed)), f"Answers that say the endpoint failed (HTTP 5xx). {t.refused:,.0f} requests were refused as the caller's mistake (4xx)."),
            ("From the cache", shown(t.cached), "Lists that were made for an earlier request: the shopper had done nothing in between."),
            ("Fallbacks", shown(t.fallback), "Lists for somebody, or in front of an item, of whom nothing is known: what is popular."),
            ("Degraded", shown(t.degraded), "Lists that were made without the store, or without a source that failed or was late."),
            ("Short lists", shown(t.short), "Lists with fewer items than were asked for."), ("Lists", f"{t.lists:,.0f}", "Lists that were answered in this time.")]
    with st.container(horizontal=True, gap="small"): # two beside each other on a phone
        for label, value, about in rows: st.metric(label, value, help=about, border=True, width=171)

def where_from(
    counts: Counts,
) -> None:
    "Candidates by source, and where the time goes."
    left, right = st.columns(2, gap="large")
    with left:
        if found := proposed(counts):
            frame = pl.DataFrame({"name": list(found), "x": list(found.values())})
            top = max(found, key=found.__getitem__)
            st.markdown(f"##### Most candidates come from {plain(top)}: {found[top]:.0f} per list")
            drawn(bars(frame, "candidates per list that was made"), f"Candidates per list by source; most come from {top}")
            below(frame.rename({"name": "source", "x": "candidates per list"}), "candidates by source")
        else: st.caption("No list was made in this time, so no source proposed anything.")
    with right:
        if timed := stages(counts):
            frame = pl.DataFrame({"name": [STAGE.get(s, s) for s in timed], "x": [1_000*m for m, _ in timed.values()]})
            slow = max(timed, key=lambda s: timed[s][0])
            st.markdown(f"##### Most of the time goes into {STAGE.get(slow, slow)}: {ms(timed[slow][0])} on average")
            drawn(bars(frame, "mean time (ms)", order=None), f"Mean time of each stage of making a list; most goes into {STAGE.get(slow, slow)}")
            below(pl.DataFrame([(s, 1_000*m, 1_000*p if p is not None else None) for s, (m, p) in timed.items()], schema=["stage", "mean ms", "p95 ms"], orient="row"), "stages")
        else: st.caption("No list was made in this time, so no stage took any.")
    if lacking := by(counts, "reco_done_without_total", "what"): st.caption(plain("Lists were made without: " + ", ".join(f"{w} ({n:,.0f})" for w, n in sorted(lacking.items(), key=lambda x: -x[1]))))
    if lost := sum(v for (n, _), v in counts.items() if n == "reco_lists_not_written_down_total"): st.warning(f"{count(int(lost), 'list was', 'lists were')} answered and not written down: the figures of the business page lack them.")

@st.fragment(run_every=EVERY_S)
def now() -> None:
    "Looked at anew every few seconds, without the rest of the page."
    try:
        client = endpoint()
        seen, ready = watched(address(), client.metrics), client.ready()
    except EndpointError as e: return endpoint_down(e)
    except ValueError:
        st.error(f"What answers at {address()} is not the endpoint: its figures cannot be read.", icon=":material/error:")
        return
    last = seen.last()
    assert last is not None # `watched` has looked
    standing(ready, last.counts)
    asked = st.segmented_control("Over", ["The last minute", "Since it started"], default="The last minute", required=True, key="over", help="Since the endpoint started: all that it has counted, so a quiet shop shows something too.")
    found = seen.added(MINUTE)
    if asked == "Since it started": counts, t = last.counts, traffic(last.counts, 0.0)
    elif found: counts, t = found[0], traffic(*found)
    else:
        st.caption(f":material/hourglass: The first look was just now; figures come with the second, in {EVERY_S:.0f} seconds.")
        return
    tiles(t)
    if t.seconds: st.caption(f"Of the last {t.seconds:.0f} seconds, looked at every {EVERY_S:.0f}; the replicas of one machine add up. Last look: {datetime.fromtimestamp(last.at, UTC):%H:%M:%S} UTC.")
    if asked == "The last minute": over_time(seen.series(2*EVERY_S - 0.5))
    if t.lists: return where_from(counts)
    whole = traffic(last.counts, 0.0)
    if not whole.lists: return nothing_yet("No list was asked for since the endpoint started.", "open the Shop page: its lists come from there", f"`curl '{address()}/recommendations/v1/anybody?k=5'` asks for one")
    st.markdown("##### It is quiet now. Since the endpoint started:")
    tiles(whole)
    where_from(last.counts)

def page() -> None:
    "The page, top to bottom."
    lead("Whether the endpoint answers well now, whether the shop has drifted away from what the model learned, what data came in, and what happened. An admin can go back to the bundle before, or train anew.")
    for tab, part in zip(st.tabs(TABS, key="watch", bind="query-params"), (now, drift_page, validation, happened, operations), strict=True):
        if tab.open:
            with tab: part()

if __name__ == "__main__": shown("Monitoring", page)
