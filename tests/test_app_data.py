"""The data page beside a lake that was filled through the gate: what is found is what is there, what comes of the shop is data, and a million events are not collected."""
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from app.parts.data import tables
from app.parts.data.catalogue import ANY, facts, matching, through_time
from app.parts.data.definitions import CONTRACT, fields, found
from app.parts.data.dictionary import GROUPS, dictionary, of_surfaces
from app.parts.data.events import chosen, latest
from app.ports import free_port, port_free
from reco.data.files import read_files
from reco.data.ingestion import ingest
from reco.data.lake import Lake
from reco.data.upkeep import erase
from reco.schemas import CATALOG, EVENTS, INTERACTIONS, SURFACES, conform
from reco.settings import Quality, Settings

CHROMIUM = Path("/usr/bin/chromium")
PAGE = Path(__file__).resolve().parent.parent/"app"/"app_pages"/"data.py"
START = datetime(2026, 3, 1, tzinfo=UTC)
ODD = "<b>Pot</b> *x* $y$ [z](javascript:1) `w` | <script>1</script>"
LAX = Quality(**dict.fromkeys(("bad_share", "null_share", "range_share", "future_share", "duplicate_share", "unknown_event_share", "unreadable_share"), "1 warn"))

def day(n: float) -> datetime: return START + timedelta(days=n)

ITEMS = [{"item_id": "pot", "valid_from": day(n), "title": ODD, "category_path": "Home / Tea", "price": price, "discount": discount, "available": there, "created_at": START, "description": ODD}
         for n, price, discount, there in ((0, 10., 0., True), (2, 12., .5, True), (3, 12., .5, False), (4, 8., 0., True))] + [
    {"item_id": "lamp-7", "valid_from": START, "title": "Reading lamp", "category_path": "Lights", "price": 39., "available": False, "created_at": START},
    {"item_id": "<i>n", "valid_from": START, "title": None, "category_path": None, "price": None, "created_at": None}]

def events() -> list[dict]:
    "Six days: everybody views the pot, one shopper buys it; the lamp is viewed once."
    rows = [{"event_id": f"v{d}{u}", "ts": day(d + u/24), "user_id": f"u{u}", "item_id": "pot", "event": "view", "price": 10.} for d in range(6) for u in range(5)]
    return [*rows, {"event_id": "b", "ts": day(5.5), "user_id": ODD, "item_id": "pot", "event": "transaction", "order_id": "o1", "price": 8.},
            {"event_id": "l", "ts": day(1), "user_id": "u1", "item_id": "lamp-7", "event": "view", "price": 39.}]

BAD = [{"event_id": "x1", "ts": day(1), "user_id": "u1", "item_id": "pot", "event": "stolen", "price": 1.}, {"event_id": "x2", "ts": day(1), "user_id": "secret person", "item_id": "pot", "event": "view", "price": -1.},
       {"event_id": "x3", "ts": day(2), "user_id": "u1", "item_id": "pot", "event": "view", "price": -2.}]

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A shop's folder whose lake was filled by a batch with three bad rows."
    root = tmp_path_factory.mktemp("data")
    (root/"settings.ini").write_text("[lake]\nroot = lake\n[serving]\nport = 1\n")
    (root/"raw").mkdir()
    pl.DataFrame(events() + BAD).write_parquet(root/"raw"/"interactions.parquet")
    pl.DataFrame(ITEMS, infer_schema_length=None).write_parquet(root/"raw"/"catalog.parquet")
    done = ingest("files", lambda _: read_files(root/"raw"), Lake(root/"lake"), day(6), LAX, 30, root/"scratch", 1)
    assert not done.refused and done.reasons["rows"].sum() == 3
    return root

@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, folder: Path):
    "A tab of the page, on this lake or another."
    def open_page(tab: str = "", root: Path = folder) -> AppTest:
        monkeypatch.setenv("RECO_SETTINGS", str(root/"settings.ini"))
        st.cache_data.clear()
        st.cache_resource.clear()
        at = AppTest.from_file(str(PAGE), default_timeout=60)
        if tab: at.query_params["look"] = tab
        at.run()
        assert not at.exception
        return at
    return open_page

def empty(root: Path) -> Path: # a shop without a lake
    (root/"settings.ini").write_text("[lake]\nroot = lake\n")
    return root

def said(at: AppTest) -> str: # all text of the page
    texts = [x.value for kind in (at.markdown, at.caption, at.info, at.error, at.warning, at.text, at.subheader) for x in kind]
    return "\n".join(map(str, texts)) + html(at)

def html(at: AppTest) -> str: return "\n".join(h.proto.body for h in at.get("html"))

def charts(at: AppTest) -> list[dict]: return [json.loads(c.proto.spec) for c in at.get("vega_lite_chart")]

# ---- catalogue -----------------------------------------------------------------------------------------------------

def test_the_catalogue_is_searched_and_an_item_is_seen_through_time(page):
    at = page()
    assert "3 items in 2 categories, 2 of them in stock" in said(at) and len(at.dataframe[0].value) == 3
    at.text_input(key="search").set_value("READING lights").run()
    assert list(at.dataframe[0].value["item_id"]) == ["lamp-7"] and "Price and stock have not changed since 01 Mar 2026" in said(at) and "1 × viewed" in said(at)
    at.text_input(key="search").set_value("").run()
    at.selectbox(key="item").set_value("pot").run()
    assert "Shaded: sold out." in said(at) and "30 × viewed, 1 × bought" in said(at) and len(charts(at)) == 2
    at.segmented_control(key="stock").set_value("sold out").run()
    assert list(at.dataframe[0].value["item_id"]) == ["lamp-7"] and at.selectbox(key="item").value == "lamp-7" # the pot is not among them any more
    at.text_input(key="search").set_value("nothing of that name").run()
    assert not at.exception and "Nothing fits" in said(at)

def test_a_search_is_words_prices_and_stock():
    items = pl.DataFrame(ITEMS, infer_schema_length=None, schema_overrides={"available": pl.Boolean}).sort("valid_from").unique("item_id", keep="last").sort("item_id").with_columns(
        category="category_path", available=pl.col("available").fill_null(True))
    ids = lambda *asked: matching(items, *asked)["item_id"].to_list()
    assert ids("", ANY, None, None, "all") == ["<i>n", "lamp-7", "pot"] and ids("[z](javascript:1)", ANY, None, None, "all") == ["pot"] and ids(".*", ANY, None, None, "all") == []
    assert ids("", ANY, 8., 8., "all") == ["pot"] and ids("", ANY, None, 10., "in stock") == ["pot"] and ids("", "Lights", None, None, "sold out") == ["lamp-7"]

def test_what_an_item_cost_holds_until_the_next_change():
    rows = conform(pl.DataFrame(ITEMS[:4]), CATALOG)
    spec = through_time(rows, day(6)).to_dict()
    data = [r for rs in spec["datasets"].values() for r in rs]
    assert sorted({r["pays"] for r in data}) == [6., 8., 10.]
    out = [r for r in data if r["stock"] is False and "to" in r]
    assert {(r["valid_from"][:10], r["to"][:10]) for r in out} == {("2026-03-04", "2026-03-05")}

def test_a_title_is_data_not_markup(page):
    at = page()
    for item in ("pot", "<i>n"):
        at.selectbox(key="item").set_value(item).run()
        assert not at.exception and not any(tag in html(at).replace("<b>pot", "").replace("<b>&", "") for tag in ("<script>", "<i>", "<b>Pot"))
    assert "Item &lt;i&gt;n" in html(at) and "never said a price" in said(at) and "Nobody has done anything with it" in said(at)
    assert all(ODD not in x.value for kind in (at.markdown, at.caption, at.subheader) for x in kind)
    assert "&lt;script&gt;" in facts(dict.fromkeys(CATALOG.columns) | ITEMS[0])

def test_from_an_item_to_its_events(page):
    at = page()
    at.selectbox(key="item").set_value("pot").run()
    at.button(key="its_events").click().run()
    assert not at.exception and at.text_input(key="of_item").value == "pot" and "Events" in [s.value for s in at.subheader]
    assert {m.label: m.value for m in at.metric} == {"Events": "31", "Shoppers": "6", "Items": "1", "Items bought": "1"}

# ---- events --------------------------------------------------------------------------------------------------------

def test_events_are_counted_and_listed_as_asked(page):
    at = page("Events")
    assert {m.label: m.value for m in at.metric} == {"Events": "32", "Shoppers": "6", "Items": "2", "Items bought": "1"} and len(charts(at)) == 1
    rows = at.dataframe[0].value
    assert len(rows) == 32 and list(rows["ts"]) == sorted(rows["ts"], reverse=True) and rows["user_id"][0] == ODD and "surface" not in rows and rows["event"][0] == "bought"
    at.text_input(key="shopper").set_value("u1").run()
    assert {m.label: m.value for m in at.metric}["Events"] == "7" and set(at.dataframe[0].value["user_id"]) == {"u1"}
    at.text_input(key="of_item").set_value("lamp-7").run()
    assert {m.label: m.value for m in at.metric}["Events"] == "1"
    at.text_input(key="shopper").set_value(ODD).run()
    assert not at.exception and "No events fit" in said(at) and not charts(at)

def test_kinds_and_days(page):
    at = page("Events")
    at.pills(key="kinds").set_value(["transaction"]).run()
    assert {m.label: m.value for m in at.metric}["Events"] == "1"
    at.pills(key="kinds").set_value([]).run()
    at.date_input(key="days").set_value((day(0).date(), day(1).date())).run()
    assert {m.label: m.value for m in at.metric}["Events"] == "11"
    at.date_input(key="days").set_value((day(0).date(),)).run()
    assert not at.exception and "Pick the last day" in said(at)

@pytest.mark.parametrize("asked", [(None, None, (), "", ""), (day(1).date(), day(2).date(), (), "", ""), (None, None, ("view", "click"), "u3", ""), (day(2).date(), None, (), "u3", "pot")])
def test_what_is_chosen_is_what_a_plain_reading_chooses(asked):
    first, last, kinds, user, item = asked
    frame = conform(pl.DataFrame(events()), INTERACTIONS)
    wanted = [r["event_id"] for r in frame.iter_rows(named=True) if (not first or r["ts"].date() >= first) and (not last or r["ts"].date() <= last) and (not kinds or r["event"] in kinds)
              and (not user or r["user_id"] == user) and (not item or r["item_id"] == item)]
    assert sorted(chosen(frame.lazy(), *asked).collect()["event_id"]) == sorted(wanted) and len(wanted) > 3

def test_half_a_million_events_are_quick(tmp_path, page):
    n, rng = 500_000, np.random.default_rng(0)
    rows = pl.DataFrame({"event_id": pl.Series(range(n)).cast(pl.String), "ts": START + pl.Series(rng.integers(0, 28*86_400, n)).cast(pl.Duration("ms"))*1000, "user_id": pl.Series(rng.integers(0, 9_999, n)).cast(pl.String),
                         "item_id": pl.Series(rng.integers(0, 999, n)).cast(pl.String), "event": pl.Series(rng.choice(EVENTS, n))})
    Lake(empty(tmp_path)/"lake").write("interactions", conform(rows, INTERACTIONS), key=["event_id"], day_of="ts")
    at = page("Events", tmp_path)
    st.cache_data.clear()
    began = time.perf_counter()
    at.run()
    assert time.perf_counter() - began < 3 and {m.label: m.value for m in at.metric}["Events"] == f"{n:,}" and len(at.dataframe[0].value) == 200 # 0.2 s on an idle machine
    table = Lake(tmp_path/"lake").read("interactions")
    assert latest(table, 5, None, None, (), "7", "").collect()["ts"].to_list() == rows.filter(user_id="7")["ts"].sort(descending=True).head(5).to_list()

# ---- the lake, the quarantine ---------------------------------------------------------------------------------------

def test_the_lake_is_listed_as_it_is(page, folder):
    at, lake = page("Lake"), Lake(folder/"lake")
    rows = at.dataframe[0].value.set_index("table")
    assert list(rows.index) == lake.tables() and {t: lake.snapshot(t) for t in lake.tables()} == rows["snapshot"].to_dict()
    assert {t: lake.read(t).collect().height for t in lake.tables()} == rows["rows"].to_dict() and rows.loc["interactions", "newest"] == "2026-03-06 12:00"
    assert rows["about"].ne("").all() and rows["mb"].gt(0).all()
    for table in lake.tables():
        at.selectbox(key="table").set_value(table).run()
        assert not at.exception and lake.snapshot(table) in at.code[0].value and at.dataframe[2].value["snapshot"][0] == lake.snapshot(table)

def test_every_table_that_code_writes_is_explained(folder):
    root = PAGE.parents[2]
    written = {m for p in (*root.glob("reco/**/*.py"), *root.glob("flows/*.py"), *root.glob("app/*.py")) for m in re.findall(r'lake\.write\("(\w+)"', p.read_text())}
    assert len(written) > 8 and written <= set(tables.ABOUT)

def test_who_was_erased_is_not_shown(tmp_path, page):
    lake = Lake(empty(tmp_path)/"lake")
    lake.write("interactions", conform(pl.DataFrame(events()), INTERACTIONS), key=["event_id"], day_of="ts")
    erase(lake, ["u1"], day(9))
    at = page("Lake", tmp_path)
    at.selectbox(key="table").set_value("erased").run()
    assert not at.exception and "only digests are kept" in said(at) and len(at.dataframe) == 2

def test_rows_that_were_set_aside_have_their_reason(page):
    at = page("Quarantine")
    assert "**3 rows** were set aside for 2 reasons; most often: negative price (2)" in said(at) and len(charts(at)) == 2
    rows = at.dataframe[0].value
    assert sorted(rows["reason"]) == ["negative price", "negative price", "unknown event"] and "secret person" not in rows.to_string() and "stolen" in rows.to_string()
    at.selectbox(key="reason").set_value("unknown event").run()
    assert list(at.dataframe[0].value["reason"]) == ["unknown event"]
    batch = at.dataframe[1].value
    assert list(batch["rows"]) == [35] and list(batch["aside"]) == [3] and batch["warned"][0] == (at.dataframe[2].value["result"] == "✗ did not hold").sum()

def test_a_record_that_cannot_be_read_shows_nothing():
    assert tables.shown_of("{") == tables.shown_of("[]") == tables.shown_of("{}") == "" and "user_id" not in tables.shown_of('{"unread": null, "user_id": "ann", "price": -1}')

# ---- features, contract ---------------------------------------------------------------------------------------------

def test_the_dictionary_has_every_feature_once_with_unit_and_group(page):
    by = of_surfaces(Settings())
    frame = dictionary(by)
    assert frame["feature"].is_unique().all() and set(frame["feature"]) == {f for features in by.values() for f in features} and not frame["unit"].is_in([""]).any()
    assert {s: set(frame.filter(s)["feature"]) for s in SURFACES} == {s: set(by[s]) for s in SURFACES} and set(GROUPS) <= set(frame["group"])
    units = dict(frame.select("feature", "unit").iter_rows())
    wanted = {"item_views_7d": "count", "item_idle_h": "hours", "item_age_d": "days", "als_rank": "place, 0 is best", "als_cosine": "cosine", "item_price": "currency of the shop", "visit_minutes": "minutes",
              "item_discount": "share, 0 to 1", "price_to_usual": "logarithm", "recent_return_rate": "share, 0 to 1", "item_cart_rate": "per view", "weekday": "0 (Monday) to 6"}
    assert {f: units[f] for f in wanted} == wanted
    assert found(frame, "PRICE usual", [], "")["feature"].to_list() == ["price_to_usual"] and set(found(frame, "", ["Context and item"], "similar")["group"]) == {"Context and item"}
    at = page("Features")
    at.text_input(key="feature").set_value("hours").run()
    assert not at.exception and 2 < len(at.dataframe[0].value) < 20
    at.text_input(key="feature").set_value("[no such").run()
    assert not at.exception and "No feature fits" in said(at)

def test_a_source_that_is_switched_on_brings_its_features():
    settings = Settings(candidates={"popularity": {"quota": 10}, "trending": {"quota": 5}})
    names = dictionary(of_surfaces(settings))["feature"].to_list()
    assert "trending_rank" in names and "als_rank" not in names

def test_the_contract_in_words(page):
    schema = json.loads(CONTRACT.read_text())
    frame = fields(schema)
    assert frame["field"].to_list() == [f["name"] for f in schema["fields"]] == list(INTERACTIONS.columns)
    assert frame.filter("needed")["field"].to_list() == INTERACTIONS.required and dict(frame.select("field", "type").iter_rows())["event"] == " | ".join(EVENTS)
    at = page("Event contract")
    assert len(at.dataframe[0].value) == len(frame) and "http://127.0.0.1:1/events/v1" in at.code[0].value and "negative price" in said(at)

# ---- what is not there ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("tab", "text"), [("Catalogue", "no catalogue yet"), ("Events", "no events yet"), ("Lake", "is empty"), ("Quarantine", "no batch was ingested")])
def test_an_empty_lake_says_what_fills_it(page, tmp_path, tab, text):
    at = page(tab, empty(tmp_path))
    assert text in said(at) and "make ingest" in said(at) and not charts(at) and not at.dataframe

def test_a_table_without_rows_is_no_traceback(page, tmp_path):
    lake = Lake(empty(tmp_path)/"lake")
    lake.write("interactions", INTERACTIONS.empty(), key=["event_id"], day_of="ts")
    lake.write("catalog", CATALOG.empty(), key=["item_id", "valid_from"])
    for tab in ("Catalogue", "Events", "Lake", "Quarantine"): assert said(page(tab, tmp_path))

# ---- in a browser --------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: make services")
def test_in_a_browser_a_row_that_is_clicked_is_looked_at(folder):
    "Wide and on a phone, light and dark: nothing overflows, nothing fails."
    from playwright.sync_api import sync_playwright
    port, root = free_port(), PAGE.parents[2]
    env = os.environ | {"RECO_SETTINGS": str(folder/"settings.ini"), "RECO_APP_PORT": str(port)}
    server = subprocess.Popen([sys.executable, "-m", "app.dashboard"], cwd=root, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 60
        while port_free("127.0.0.1", port) and time.monotonic() < until: time.sleep(0.2)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-background-networking"])
            for width, scheme in ((1280, "light"), (390, "dark")):
                tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                errors: list[Exception] = []
                tab.on("pageerror", lambda e, errors=errors: errors.append(e))
                tab.goto(f"http://127.0.0.1:{port}/data")
                tab.wait_for_selector("text=Nobody has done anything with it yet", timeout=60_000) # the first item
                grid = tab.locator("[data-testid=stDataFrame]").first
                for row, wanted in ((1, "text=Price and stock have not changed"), (2, "[data-testid=stVegaLiteChart] svg")): # below the head: the lamp, the pot
                    grid.click(position={"x": 20, "y": 35*(row + 1.5)})
                    tab.wait_for_selector(wanted, timeout=60_000)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width and not errors
                tab.close()
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
