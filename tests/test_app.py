"""The client and the Streamlit page, against the real app over HTTP: endpoint up, down, and with an empty lake."""
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
import uvicorn
from streamlit.testing.v1 import AppTest

from app.app_pages.shop import card
from app.client import Client, EndpointDown, EndpointError, NotAllowed, RequestRefused, pause
from app.contract import create_app
from app.keys import load_keys
from app.ports import free_port, port_free
from app.serve import Replica
from reco.bundle import ModelBundle
from reco.data.lake import Lake
from reco.features.store import OnlineStore
from reco.schemas import CATALOG, INTERACTIONS, conform
from reco.settings import Serving, Settings

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = Path("/usr/bin/chromium")

@contextmanager
def listening(app: object) -> Iterator[int]: # a port on which an ASGI app answers
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.01)
    try: yield port
    finally:
        server.should_exit = True
        thread.join()

@pytest.fixture(scope="module")
def endpoint(bundle: ModelBundle, store: OnlineStore) -> Iterator[int]:
    replica = Replica()
    replica.bundle, replica.store = bundle, store
    with listening(create_app(replica)) as port: yield port

@pytest.fixture(scope="module")
def shopper(store: OnlineStore) -> str:
    return next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)

@pytest.fixture(scope="module")
def lake(bundle: ModelBundle, shopper: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The bundle's items, and one shopper who viewed the first three and bought the third."
    root, start = tmp_path_factory.mktemp("lake"), datetime(2026, 3, 1, tzinfo=UTC)
    items = bundle.items.with_columns(valid_from=pl.lit(start), category_path=pl.lit("Home / Tea"))
    ids = items["item_id"].to_list()
    seen = pl.DataFrame([{"event_id": f"e{i}", "ts": start + timedelta(hours=i), "user_id": shopper, "item_id": ids[min(i, 2)],
                          "event": "transaction" if i == 3 else "view"} for i in range(4)])
    Lake(root).write("catalog", conform(items, CATALOG), key=["item_id", "valid_from"])
    Lake(root).write("interactions", conform(seen, INTERACTIONS), key=["event_id"], day_of="ts")
    return root

@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, lake: Path, endpoint: int):
    "The page with lake and endpoint, or with others."
    def open_page(root: Path = lake, port: int = endpoint) -> AppTest:
        monkeypatch.setenv("RECO_LAKE_ROOT", str(root))
        monkeypatch.setenv("RECO_SERVING_PORT", str(port))
        at = AppTest.from_file(str(ROOT/"app"/"dashboard.py"), default_timeout=60).run()
        assert not at.exception
        return at
    return open_page

def cards(at: AppTest) -> str: # the HTML of the cards, or nothing
    return "".join(h.proto.body for h in at.get("html"))

# ---- the client

def test_the_client_gets_what_the_endpoint_recommends(endpoint, shopper, bundle):
    with Client(f"http://127.0.0.1:{endpoint}/") as client:
        items = client.recommendations(shopper, 7)
        assert len(items) == 7 and {x.item_id for x in items} <= set(bundle.items["item_id"])
        assert [x.score for x in items] == sorted((x.score for x in items), reverse=True)
        assert client.bundle_id() == bundle.manifest["id"]
        for odd in ("..", ".", "a/../b", "é\n\x00", "%2F", "?k=1#x"): assert len(client.recommendations(odd, 2)) == 2

def test_a_refusal_carries_the_reason(endpoint):
    with Client(f"http://127.0.0.1:{endpoint}") as client, pytest.raises(RequestRefused, match="422: k must be a whole number from 1 to 100"):
        client.recommendations("u", 500)

def test_every_kind_of_list_and_how_it_came_about(endpoint, shopper, bundle):
    with Client(f"http://127.0.0.1:{endpoint}") as client:
        known = client.recommend(shopper, 4, request_id="r-1")
        item = known.ids[0]
        assert (known.request_id, known.bundle_id, known.fallback, known.without) == ("r-1", bundle.manifest["id"], False, ()) and known.seconds > 0
        assert client.recommend("nobody yet").fallback
        for found in (client.similar(item, 3, shopper), client.bought_together([item, "a,b&c=d"], 3), client.recommend(shopper, 3, "similar", [item])):
            assert len(found.ids) == 3 and item not in found.ids and found.request_id
        visit = client.session([{"item_id": item, "event": "view"}], 3)
        assert len(visit.ids) == 3 and not visit.fallback and client.session([], 3).fallback
        said = client.recommend(shopper, 3, explain=True).items[0].why
        assert said.reason and said.base + sum(c["log_odds"] for c in said.contributions) + said.rest == pytest.approx(said.log_odds)
        assert client.ready()["status"] == "ready" and "reco_http_requests_total" in client.metrics()

def test_a_list_taken_apart_is_the_list(endpoint, shopper, bundle, store):
    with Client(f"http://127.0.0.1:{endpoint}") as client:
        made, listed = client.why(shopper, 8), client.recommend(shopper, 8)
        assert [x.item_id for x in made.items] == [c["item_id"] for c in made.candidates[:8]] == listed.ids
        assert [x.score for x in made.items] == [c["score"] for c in made.candidates[:8]] == [x.score for x in listed.items]
        places = [c["place"] for c in made.candidates]
        assert sorted(places) == list(range(1, made.about["count"] + 1)) and places[8:] == sorted(places[8:]) and made.about["count"] > 50
        assert [c["slot"] for c in made.candidates[:9]] == [*range(1, 9), None] and all(x.why.sources for x in made.items)
        assert {c["fate"] for c in made.candidates[:8]} == {"shown"} and "shown" not in {c["fate"] for c in made.candidates[8:]}
        for rule, n in made.about["dropped"].items():
            if rule in ("out_of_stock", "recently_bought", "banned"): assert n == sum(c["fate"] == rule for c in made.candidates)
        for source, n in made.about["proposed"].items(): assert n == sum(source in c["sources"] for c in made.candidates)
        newest = sorted(store.events(shopper), key=lambda e: -e.ts)[0]
        assert (made.about["past"][0]["item_id"], made.about["past"][0]["ts"]) == (newest.item_id, newest.ts)
        page = client.why(shopper, 4, "similar", [listed.ids[0]])
        assert len(page.items) == 4 and listed.ids[0] not in {c["item_id"] for c in page.candidates if c["fate"] == "shown"}
        with pytest.raises(RequestRefused, match="for_you takes no context"): client.why(shopper, 4, "for_you", ["x"])

def test_keys_say_who_may_look_behind_a_list(bundle, store):
    replica = Replica()
    replica.bundle, replica.store = bundle, store
    replica.keys = load_keys(Settings(serving=Serving(client_keys="c"*32, admin_keys="a"*32)))
    with listening(create_app(replica)) as port:
        ask = lambda key: Client(f"http://127.0.0.1:{port}", key=key)
        with ask("a"*32) as client: assert client.why("u", 3).items and client.recommend("u", 3, explain=True).items[0].why
        with ask("c"*32) as client:
            assert len(client.recommendations("u", 3)) == 3
            with pytest.raises(NotAllowed, match="403"): client.why("u", 3)
        with ask("") as client, pytest.raises(NotAllowed, match="401"): client.recommend("u")

def test_what_is_busy_is_asked_again_and_what_is_refused_is_not(monkeypatch):
    monkeypatch.setattr("app.client.FIRST_S", 0.01)
    said, asked = [(503, b"{}"), (503, b"{}"), (202, b'{"accepted": 2}')], []
    async def other(scope: dict, receive: object, send: object) -> None:
        asked.append(scope["path"])
        status, body = said.pop(0)
        await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": body})
    with listening(other) as port, Client(f"http://127.0.0.1:{port}") as client:
        assert client.send([{"event_id": "e"}]) == 2 and len(asked) == 3
        said[:] = [(422, b'{"detail": "no"}'), (200, b"{}")]
        with pytest.raises(RequestRefused, match="422: no"): client.send([{"event_id": "e"}])
        said[:] = [(503, b'{"detail": "later"}')]
        with pytest.raises(EndpointError, match="later"): client.rollback("ann", "test") # done twice it would go back twice
        assert len(asked) == 5
        said[:] = [(503, b'{"detail": "later"}')]*3
        with pytest.raises(EndpointError, match="503: later"): client.bundle_id()

def test_pauses_double_differ_and_end():
    drawn = [[pause(n) for _ in range(200)] for n in (1, 2, 10)]
    assert all(0.05 <= x <= 0.1 for x in drawn[0]) and all(0.1 <= x <= 0.2 for x in drawn[1]) and all(1 <= x <= 2 for x in drawn[2])
    assert len({*drawn[0]}) > 100 and 1 <= pause(1, "2") <= 2 and pause(1, "Wed, 21 Oct") <= 0.1

def test_nobody_there_is_said_at_once():
    with Client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(EndpointDown, match="cannot be reached"):
        client.recommendations("u")

def test_a_silent_endpoint_is_given_up_on():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3) as client, \
                pytest.raises(EndpointDown, match="did not answer within 0.3 s"):
            client.recommendations("u")
        assert time.monotonic() - began < 3

@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"recommendations": [{"item_id": "i"}]}', b'{"recommendations": null}'])
def test_an_answer_of_something_else_is_an_error(body):
    async def other(scope: dict, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})
    with listening(other) as port, Client(f"http://127.0.0.1:{port}") as client, pytest.raises(EndpointError): client.recommendations("u")

def test_a_busy_port_is_seen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_free("127.0.0.1", port)
    assert port_free("127.0.0.1", port)

# ---- the page

def test_the_page_shows_history_and_recommendations(page, shopper, endpoint):
    at = page()
    assert not at.error and not at.warning
    assert at.selectbox[0].value == shopper
    with Client(f"http://127.0.0.1:{endpoint}") as client: wanted = client.recommendations(shopper, 10)
    assert cards(at).count("<li>") == 10 and all(f">{x.item_id}<" in cards(at) for x in wanted)
    table = at.dataframe[0].value
    assert list(table["Did"]) == ["bought", "viewed", "viewed", "viewed"] # newest first
    assert "4 events since 01 Mar 2026, 1 bought" in at.caption[1].value

def test_a_title_is_data_not_markup():
    html = card(1, {"item_id": "<i>1</i>", "title": "<b>Pot</b> & lid", "category": '"><script>', "price": 3.5}, 0.5)
    assert "&lt;b&gt;Pot&lt;/b&gt; &amp; lid" in html and "&lt;i&gt;1" in html
    assert not any(tag in html for tag in ("<b>", "<i>", "<script>"))
    assert "Item 7" in card(1, {"item_id": "7", "title": None, "category": None, "price": None}, 0.5)

def test_a_new_shopper_gets_cards_and_no_history(page):
    at = page()
    at.radio[0].set_value("New shopper").run()
    at.text_input[0].set_value("never-seen").run()
    assert not at.exception and cards(at).count("<li>") == 10
    assert any("this shopper is new" in c.value for c in at.caption)
    at.text_input[0].set_value("  ").run()
    assert not at.exception and "Type an id" in at.info[0].value

def test_more_items_when_asked_for(page):
    at = page()
    at.slider[0].set_value(3).run()
    assert cards(at).count("<li>") == 3

def test_without_the_endpoint_the_page_says_what_to_start(page):
    at = page(port=free_port())
    assert "make serve" in at.error[0].value and not cards(at)
    assert len(at.dataframe[0].value) == 4 # the history needs no endpoint

def test_with_an_empty_lake_the_page_says_what_to_run(page, tmp_path):
    at = page(root=tmp_path)
    assert "make demo" in at.warning[0].value
    assert cards(at).count("<li>") == 10 # the endpoint answers a new shopper all the same

@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: make services")
def test_the_page_in_a_browser(lake, endpoint, tmp_path):
    "Wide and on a phone: cards are there, nothing overflows, nothing fails."
    import os

    from playwright.sync_api import sync_playwright
    port = free_port()
    env = os.environ | {"RECO_LAKE_ROOT": str(lake), "RECO_SERVING_PORT": str(endpoint), "RECO_APP_PORT": str(port)}
    server = subprocess.Popen([sys.executable, "-m", "app.dashboard"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 60
        while port_free("127.0.0.1", port) and time.monotonic() < until: time.sleep(0.2)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-background-networking"])
            for name, width, columns in (("wide", 1280, 6), ("phone", 390, 2)):
                tab = browser.new_page(viewport={"width": width, "height": 850})
                errors: list[Exception] = []
                tab.on("pageerror", lambda e, errors=errors: errors.append(e))
                tab.goto(f"http://127.0.0.1:{port}")
                tab.wait_for_selector(".reco-cards li", timeout=60_000)
                tab.wait_for_selector("[data-testid=stDataFrame]", timeout=60_000)
                boxes = [b.bounding_box() for b in tab.query_selector_all(".reco-cards li")]
                assert len(boxes) == 10 and len({round(b["x"]) for b in boxes}) == columns
                assert all(b["x"] >= 0 and b["x"] + b["width"] <= width for b in boxes)
                picture = tab.screenshot(path=tmp_path/f"{name}.png")
                assert len(picture) > 10_000 and not errors # an empty page is smaller
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
