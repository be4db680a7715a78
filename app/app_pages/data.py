"""What the platform knows: catalogue, events, tables of the lake, what was set aside, what the model sees, what the shop sends."""
import streamlit as st

from app.parts.data.catalogue import show_catalogue
from app.parts.data.definitions import show_contract, show_features
from app.parts.data.events import show_events
from app.parts.data.tables import show_lake, show_quarantine
from app.parts.page import lead, shown

TABS = {"Catalogue": show_catalogue, "Events": show_events, "Lake": show_lake, "Quarantine": show_quarantine, "Features": show_features, "Event contract": show_contract}

def page() -> None:
    "The page, top to bottom."
    lead("What the platform knows of the shop: every item, every event, every table, and what was kept out.")
    for tab, show in zip(st.tabs(list(TABS), key="look", bind="query-params"), TABS.values(), strict=True):
        with tab:
            if tab.open: show()

if __name__ == "__main__": shown("Data", page)
