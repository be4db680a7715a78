"""What happened, newest first, and what a person can do: go back to the bundle before, or train anew. Both want to know who and why, and an admin's key where the endpoint has keys."""
from datetime import datetime
from html import escape
from pathlib import Path

import polars as pl
import streamlit as st

from app.client import Client, EndpointError, NotAllowed
from app.parts.business.tables import below
from app.parts.monitoring.retraining import NotBegun, begin, last, refusal
from app.parts.page import TIMEOUT_S, address, endpoint_down, lake, nothing_yet, settings, since
from app.parts.wording import count, plain
from reco.alerts import events
from reco.data.objects import ObjectError, Objects

# ---- what happened --------------------------------------------------------------------------------------------------

KINDS = {"bundle_published": ("A bundle went into service", "#009E73"), "bundle_rolled_back": ("A bundle was taken back", "#D55E00"), "promotion_refused": ("The gates refused a bundle", "#D55E00"),
         "training_stopped": ("A training was stopped", "#CC3311"), "drift_found": ("The shop has drifted", "#E69F00"), "skew_found": ("Serving and lake differ", "#E69F00"), "retrain_asked": ("A retrain was asked for", "#0072B2"),
         "flow_failed": ("A flow failed", "#CC3311")}
MOST = 60
SHEET = """<style>
.reco-log {list-style:none; margin:0 !important; padding:0 !important}
.reco-log li {display:grid; grid-template-columns:10px minmax(0,1fr); gap:0 12px; padding:10px 0; margin:0 !important; border-bottom:1px solid color-mix(in srgb,currentColor 15%,transparent)}
.reco-log i {width:10px; height:10px; border-radius:50%; margin-top:7px}
.reco-log b {font-weight:600}
.reco-log p {margin:2px 0 0 !important; overflow-wrap:anywhere}
.reco-log small {opacity:.8; font-size:.85rem; overflow-wrap:anywhere}
</style>"""

def place() -> Path|Objects: # where events.jsonl is
    s = settings()
    return Objects(s.bundles.root, s.lake) if "://" in s.bundles.root else s.path(s.bundles.root)

def root() -> str: # by which what is read of there is kept
    r = settings().bundles.root
    return r if "://" in r else str(settings().path(r).resolve())

@st.cache_data(ttl=10, show_spinner=False)
def _events(root: str) -> list[dict]: return events(place())

def moment(text: object) -> datetime|None: # None for what is none
    try: return datetime.fromisoformat(str(text))
    except ValueError: return None

def entry(
    e: dict, # of the log
) -> str:    # one list item of HTML
    "One event. Everything in it is escaped: reasons are typed by people."
    name, colour = KINDS.get(str(e.get("what")), (str(e.get("what", "")).replace("_", " ").capitalize(), "#777777"))
    at = moment(e.get("at"))
    when = f"{since(at)} · {at:%-d %b %Y, %H:%M} UTC" if at and at.tzinfo else str(e.get("at", ""))
    return (f'<li><i style="background:{colour}" aria-hidden="true"></i><div><b>{escape(name)}</b><p>{escape(str(e.get("text", "")))}</p>'
            f'<small>{escape(when)} · {escape(str(e.get("who", "")))}</small></div></li>')

def happened() -> None:
    "The log of the platform, newest first."
    st.markdown("##### What happened, newest first")
    try: log = _events(root())[::-1]
    except ObjectError as e:
        st.error(f"The log cannot be read now: {plain(e)}", icon=":material/cloud_off:")
        return
    if not log: return nothing_yet("Nothing has happened yet: no bundle was published, refused or taken back, no drift was found.", "`make train` trains and publishes", "`make monitor` looks for drift")
    there = [k for k in dict.fromkeys(str(e.get("what")) for e in log)]
    wanted = st.pills("Only", there, selection_mode="multi", format_func=lambda k: KINDS.get(k, (k.replace("_", " "),))[0], key="kinds")
    mine = [e for e in log if not wanted or str(e.get("what")) in wanted]
    st.html(f'{SHEET}<ul class="reco-log">{"".join(entry(e) for e in mine[:MOST])}</ul>')
    st.caption(f"{count(len(mine), 'event')}" + (f", the newest {MOST} shown" if len(mine) > MOST else "") + ". They are lines of events.jsonl beside the bundles; `[alerts] webhook` sends them as messages too.")
    below(pl.DataFrame([{k: str(e.get(k, "")) for k in ("at", "what", "who", "text", "key", "about")} for e in mine]), "what happened", "CSV")

# ---- who may --------------------------------------------------------------------------------------------------------

def may(
    key: str, # empty: without one
) -> bool:    # raises `EndpointError` when nobody answers
    "Whether a key is an admin's: a route that changes nothing is asked. The client is not kept, and neither is the key."
    with Client(address(), TIMEOUT_S, key) as client:
        try: client.bundle()
        except NotAllowed: return False
        return True

def admin_key() -> str|None: # None: not an admin, which is said; empty where the endpoint asks nobody for a key
    "Whose hand is on the switch."
    if may(""):
        st.caption(":material/lock_open: The endpoint has no keys and answers on this machine alone, so whoever sees this page may use what is below.")
        return ""
    typed = st.text_input("An admin's key", type="password", key="admin key", max_chars=200, help="One of [serving] admin_keys. It is kept in this browser's session only, until you leave the page.", autocomplete="off").strip()
    if not typed:
        st.caption(":material/lock: What is below asks for an admin's key.")
        return None
    if may(typed): return typed
    st.error("This is not an admin's key.", icon=":material/key_off:")
    return None

def who_and_why(
    do: str, # what the button says
) -> tuple[str, str]|None: # None until both are there and the button was pressed
    "Asked before anything is done; both are kept with it."
    with st.form("who and why", border=False):
        who = st.text_input("Who are you?", key="who", max_chars=200, placeholder="ann").strip()
        why = st.text_area("Why?", key="why", max_chars=1_000, placeholder="prices are off since this morning", height=90).strip()
        pressed = st.form_submit_button(do, type="primary", key="do it")
    if pressed and not (who and why): st.error("Say who and why first: both are kept with what is done.", icon=":material/edit:")
    return (who, why) if pressed and who and why else None

# ---- going back -----------------------------------------------------------------------------------------------------

@st.cache_data(ttl=10, show_spinner="Looking what was served before …")
def _before(root: str) -> tuple[str, list[str]]: # what is published, and what was before, newest first
    from reco.bundle_store import bundles_root
    from reco.published import earlier_of, standing  # brings LightGBM, which takes seconds
    lines, now = standing(bundles_root(settings()))
    return now, earlier_of(lines, now)

def going_back(
    key: str|None, # an admin's, or none where none is asked for
) -> None:
    "Asks, does it, and says what came of it."
    try: now, before = _before(root())
    except (OSError, ValueError, RuntimeError) as e: now, before = "", [f"what the endpoint finds (this machine cannot say: {type(e).__name__})"]
    if now and not before:
        st.info(f"There is nothing to go back to: {plain(now)} is the only bundle that was ever published.")
        return
    st.markdown(f"Now: **{plain(now or 'unknown')}**\n\nThen: **{plain(before[0])}**, or the nearest before it that passes its trial. Every replica follows within seconds; it can be undone by publishing again.")
    if not (said := who_and_why("Go back now")): return None
    try:
        with Client(address(), 60.0, key or "") as client: done = client.rollback(*said) # a bundle is loaded and tried
    except EndpointError as e:
        st.error(f"Nothing was changed: {plain(e)}", icon=":material/error:")
        return
    st.session_state["done"] = f"{plain(done.get('bundle_id', ''))} is served again; {plain(done.get('before', ''))} was before."
    _before.clear()
    _events.clear()
    st.rerun()

# ---- training -------------------------------------------------------------------------------------------------------

def training_anew() -> None:
    "Asks, and starts it."
    st.markdown("It trains on all that the lake has, judges what comes of it at every gate, and serves it only if it passes. That takes minutes and a few GB of memory **on this machine**; what is served goes on meanwhile.")
    if not (said := who_and_why("Train now")): return None
    with st.spinner("Starting …"):
        try: begin(settings(), lake(), *said)
        except NotBegun as e:
            st.error(plain(e), icon=":material/block:")
            return
    st.session_state["done"] = "The retrain has begun; it goes on when you leave this page."
    st.rerun()

@st.fragment(run_every=5.0)
def progress() -> None:
    "The last retrain that was begun on this machine."
    found = last(settings())
    if found is None:
        st.caption("No retrain was begun from here yet. Those that monitoring asked for are under Drift and retraining.")
        return
    if was := st.session_state.get("retraining") and not found.running: st.session_state.pop("retraining", None)
    if found.running: st.session_state["retraining"] = True
    ended = "" if found.code is None else " (it ended well)" if found.code == 0 else f" (it ended with exit code {found.code}; the champion goes on)"
    label = f"{'Training' if found.running else 'The last retrain'}: begun {since(found.at)} by {plain(found.who or 'nobody named')}{ended}"
    box = st.status(label, state="running" if found.running else "error" if found.code else "complete", expanded=found.running) # as a context it would call itself complete
    box.markdown(f"Why: {plain(found.why)}")
    if found.lines: box.code("\n".join(found.lines), language=None, wrap_lines=True)
    box.caption(f"Its whole log: {plain(found.log)}")
    if was: st.rerun(scope="app") # the button may be used again
    return None

def operations() -> None:
    "The tab, top to bottom."
    if done := st.session_state.pop("done", None): st.success(done, icon=":material/check:")
    st.markdown("##### Operations")
    try: key = admin_key()
    except EndpointError as e:
        st.caption("Who may do what is asked of the endpoint.")
        endpoint_down(e)
        key = None
    left, right = (c.container(border=True, height="stretch") for c in st.columns(2))
    with left:
        st.markdown("###### Something is wrong with what is served")
        st.caption("Serves what was published before, after a trial. The history keeps who did it and why.")
        if st.button("Go back to the bundle before …", icon=":material/undo:", disabled=key is None, key="rollback"): st.dialog("Go back to the bundle before", icon=":material/undo:")(going_back)(key)
    with right:
        st.markdown("###### The model should learn what is new")
        no = refusal(settings())
        st.caption("Trains, judges and, if it passes every gate, serves. `[monitor]` asks for it by itself when the shop drifts.")
        if st.button("Train anew …", icon=":material/model_training:", disabled=key is None or bool(no), key="retrain"): st.dialog("Train anew", icon=":material/model_training:")(training_anew)()
        if no: st.caption(f":material/info: {no}")
    progress()
