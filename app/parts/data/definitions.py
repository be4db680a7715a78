"""What the model sees and what the shop sends: the dictionary of features and the contract of events."""
import json
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import streamlit as st

from app.parts.data.dictionary import dictionary, of_surfaces
from app.parts.page import address, nothing_yet, settings
from app.parts.quality.terms import SURFACES as NAMES
from reco.data.quality import interaction_rules
from reco.schemas import SURFACES

CONTRACT = Path(__file__).resolve().parents[3]/"data"/"schema"/"user_event.avsc"

# ---- features ------------------------------------------------------------------------------------------------------

@st.cache_data(show_spinner="Reading the definitions …")
def features(sources: str) -> pl.DataFrame: # of `dictionary`
    "Every feature that the models see with the sources of the settings."
    return dictionary(of_surfaces(settings()))

def found(
    frame: pl.DataFrame, # of `dictionary`
    text: str,           # words, each of which has to be in name, meaning or unit
    groups: list[str],   # empty: all
    surface: str,        # empty: all
) -> pl.DataFrame:
    "The features that are asked for."
    said = pl.concat_str("feature", "meaning", "unit", separator=" ").str.to_lowercase()
    for word in text.lower().split(): frame = frame.filter(said.str.contains(word, literal=True))
    if groups: frame = frame.filter(pl.col("group").is_in(groups))
    return frame.filter(surface) if surface else frame

def show_features() -> None:
    "The tab of the features."
    st.subheader("What the model sees")
    frame = features(str(sorted(settings().candidates.items())))
    st.caption("A **feature** is one number that the model is given about a candidate: of the item, of the shopper, of both, or of the source that proposed it. Each is defined once, "
               "computed by the same code in training and in the shop, and knows only what lies before the request. What is unknown stays unknown.")
    left, right = st.columns([3, 2])
    with left: text = st.text_input("Search the features", key="feature", persist_state="page", placeholder="price, hours, session_knn …", max_chars=200, icon=":material/search:")
    with right: surface = st.selectbox("Surface", ["", *SURFACES], format_func=lambda s: NAMES.get(s, s) if s else "all surfaces", key="surface", persist_state="page", help="Which list of the shop the model orders")
    groups = st.pills("Group", frame["group"].unique(maintain_order=True).to_list(), selection_mode="multi", key="group", persist_state="page")
    shown = found(frame, text, groups, surface)
    if shown.is_empty():
        st.info("No feature fits.", icon=":material/search_off:")
        return
    st.caption(f"{shown.height} of {frame.height} features; " + ", ".join(f"{frame[s].sum()} for {NAMES[s].lower()}" for s in SURFACES) + ".")
    st.dataframe(shown, hide_index=True, width="stretch", height=520, alt="The dictionary of features", column_order=["feature", "meaning", "unit", "group", *SURFACES], column_config={
        "feature": st.column_config.TextColumn("Feature", pinned=True), "meaning": st.column_config.TextColumn("Meaning", width="large"),
        "unit": "Unit", "group": "About", **{s: st.column_config.CheckboxColumn(NAMES[s]) for s in SURFACES}})

# ---- the contract --------------------------------------------------------------------------------------------------

def type_of(
    said: object, # an Avro type
) -> tuple[str, bool]: # in words, and whether it may be missing
    "What a field holds."
    if isinstance(said, list): return type_of(next(t for t in said if t != "null"))[0], "null" in said
    if isinstance(said, dict):
        if said.get("type") == "enum": return " | ".join(s for s in said["symbols"] if s != said.get("default")), False
        return ("moment, ms since 1970" if said.get("logicalType") == "timestamp-millis" else type_of(said["type"])[0]), False
    return {"string": "text", "long": "whole number", "int": "whole number", "double": "number"}.get(str(said), str(said)), False

def fields(
    schema: dict, # an Avro record
) -> pl.DataFrame: # field, type, needed, doc
    "The record's fields in words."
    return pl.DataFrame([{"field": f["name"], "type": type_of(f["type"])[0], "needed": not type_of(f["type"])[1], "doc": f.get("doc", "")} for f in schema["fields"]])

EXAMPLE = {"event_id": "5f0c…", "ts": 1_780_000_000_000, "user_id": "shopper-7", "item_id": "lamp-7", "event": "addtocart", "price": 39.0, "request_id": "X-Request-ID of the list", "surface": "for_you"}

def show_contract() -> None:
    "The tab of the contract."
    st.subheader("What an event is")
    try: schema = json.loads(CONTRACT.read_text())
    except (OSError, ValueError):
        nothing_yet(f"The contract, {CONTRACT.name}, is not on this machine.", "it lies in `data/schema` of the repository")
        return
    st.caption(f"{schema['doc']} Endpoint, consumer and lake hold every event to this record ([Avro](https://avro.apache.org/docs/), `data/schema/{CONTRACT.name}`).")
    st.dataframe(fields(schema), hide_index=True, width="stretch", height="content", alt="The fields of an event", column_config={
        "field": st.column_config.TextColumn("Field", pinned=True), "type": "Type", "needed": st.column_config.CheckboxColumn("Needed"),
        "doc": st.column_config.TextColumn("Meaning", width="large")})
    st.markdown("**Sending one.** The very next list knows it; sending it again changes nothing.")
    st.code(f"curl -H 'Content-Type: application/json' {address()}/events/v1 \\\n     -d '{json.dumps(EXAMPLE, ensure_ascii=False)}'", language="sh", wrap_lines=True)
    st.download_button("Download the schema", CONTRACT.read_text(), CONTRACT.name, "application/json", icon=":material/download:", on_click="ignore")
    with st.expander("Rows of a batch that are set aside"):
        st.markdown("\n".join(f"- {reason}" for reason in interaction_rules(datetime.now(UTC))))
