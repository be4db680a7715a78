"""What trainings, gates and people left beside the bundles: manifests, what the gates found, what was published, what happened, pages."""
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import streamlit as st

from app.parts.page import TTL_S, settings

if TYPE_CHECKING: # it brings the sources, which take seconds: only who looks at bundles waits for them, once
    from reco.bundle_store import Root
    from reco.published import Publication

@dataclass(frozen=True)
class Standing:
    "What is served, what waits, and how it came to that."
    lines: list["Publication"]  # oldest first
    champion: str               # name of the bundle that is served; empty when nothing was published
    challenger: str             # name of the bundle that the last training made; empty when there never was one
    back: list[str]             # what a rollback may publish, the next one first

def root() -> "Root":
    "Where bundles lie."
    from reco.bundle_store import bundles_root
    return bundles_root(settings())

def _below(
    where: "Root",
    folder: str,    # beside the bundles
    ending: str,    # with its dot
) -> list[str]:     # file names, sorted
    "What a folder beside the bundles holds."
    if isinstance(where, Path): return sorted(p.name for p in (where/folder).glob(f"*{ending}"))
    from reco.bundle_store import asking
    from reco.data.objects import listed
    with asking(): return sorted(PurePosixPath(e.name).name for e in listed(where.objects, f"{folder}/") if e.name.endswith(ending))

# Answers are kept for a minute, by the place that they are of: pages are drawn anew with every click.

def standing() -> Standing: return _standing(str(root()))

@st.cache_data(ttl=TTL_S, show_spinner="Reading the bundles …")
def _standing(where: str) -> Standing:
    from reco.challenger import challenger_name
    from reco.published import earlier_of
    from reco.published import standing as stands
    lines, champion = stands(root())
    return Standing(lines, champion, challenger_name(root()), earlier_of(lines, champion))

def bundles() -> list[str]: return _bundles(str(root())) # names, newest first

@st.cache_data(ttl=TTL_S, show_spinner=False)
def _bundles(where: str) -> list[str]:
    from reco.bundle_store import bundles_in
    return bundles_in(root())[::-1]

def manifest(
    name: str, # of a bundle
) -> dict:     # raises `BundleError`
    "What a bundle says of itself."
    return _manifest(str(root()), name)

@st.cache_data(ttl=TTL_S, show_spinner=False, max_entries=50)
def _manifest(where: str, name: str) -> dict:
    from reco.bundle import BundleError
    from reco.bundle_store import MANIFEST, manifest_text
    place = root()
    try:
        said = json.loads((place/name/MANIFEST).read_text() if isinstance(place, Path) else manifest_text(place, name))
        if not isinstance(said, dict): raise ValueError("it holds no object")
    except (OSError, ValueError) as e: raise BundleError(f"{name}: no readable {MANIFEST}: {e}") from e
    return said

def reports() -> dict[str, dict]: return _reports(str(root())) # bundle → what the gates found of it, the latest verdict first

@st.cache_data(ttl=TTL_S, show_spinner=False)
def _reports(where: str) -> dict[str, dict]:
    from reco.bundle import BundleError
    from reco.challenger import REPORTS, kept_report
    found = {}
    for name in _below(root(), REPORTS, ".json"):
        try: report = kept_report(root(), name.removesuffix(".json"))
        except BundleError: continue # half a report tells nothing
        if isinstance(report, dict): found[name.removesuffix(".json")] = report
    return dict(sorted(found.items(), key=lambda r: str(r[1].get("at", "")), reverse=True))

def happened() -> list[dict]: return _happened(str(root())) # at, what, who, text, about; newest first

@st.cache_data(ttl=TTL_S, show_spinner=False)
def _happened(where: str) -> list[dict]:
    from reco.alerts import events
    from reco.bundle_store import asking
    place = root()
    with asking(): return events(place if isinstance(place, Path) else place.objects)[::-1]

def pages(
    name: str,   # of a bundle
) -> list[str]:  # names of HTML files
    "Reports on a bundle, written by `make report`."
    return _pages(str(root()), name)

@st.cache_data(ttl=TTL_S, show_spinner=False, max_entries=50)
def _pages(where: str, name: str) -> list[str]:
    from reco.challenger import PAGES
    return _below(root(), f"{PAGES}/{name}", ".html")

@st.cache_data(ttl=TTL_S, show_spinner=False, max_entries=4)
def _page(where: str, name: str, file: str) -> str:
    from reco.challenger import PAGES, kept_text
    return kept_text(root(), f"{PAGES}/{name}/{file}")

def page(
    name: str,  # of a bundle
    file: str,  # of `pages`
) -> str:       # HTML
    "One report."
    return _page(str(root()), name, file)
