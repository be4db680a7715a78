"""The app in Chromium: somebody shops and the list follows, a list is taken apart, on a screen and on a phone, light and dark, with and without an endpoint."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shop_floor import few_events, listening, open_shop, sleepy, stocked

from app.ports import free_port, port_free
from reco.bundle import ModelBundle

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: make services")
CARDS = "[class*=st-key-card-for_you-]"


@contextmanager
def running(lake: Path, endpoint: int) -> Iterator[str]:
    """The app's address."""
    port = free_port()
    env = os.environ | {"RECO_LAKE_ROOT": str(lake), "RECO_SERVING_PORT": str(endpoint), "RECO_APP_PORT": str(port)}
    server = subprocess.Popen([sys.executable, "-m", "app.dashboard"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while port_free("127.0.0.1", port) and time.monotonic() < until: time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def lake(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stocked(tmp_path_factory.mktemp("lake"), bundle, few_events("user_1", bundle.items["item_id"].head(3).to_list()))


@pytest.fixture(scope="module")
def app(bundle: ModelBundle, trained, lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = trained.settings.model_copy(update={"root": tmp_path_factory.mktemp("shop")})
    with open_shop(bundle, settings, trained.sim.interactions) as (port, _), running(lake, port) as address: yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-background-networking"])
        yield browser
        browser.close()


class Tab:
    """A page of the browser, and what went wrong on it."""

    def __init__(self, browser: object, width: int = 1280, scheme: str = "light"):
        self.page = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
        self.width, self.wrong = width, []
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("requestfailed", lambda r: self.wrong.append(r.url))
        self.page.on("request", lambda r: None if r.url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")) else self.wrong.append(f"left the machine: {r.url}"))
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)

    def at(self, address: str, wait: str) -> "Tab":
        self.page.goto(address)
        return self.see(wait)

    def see(self, what: str) -> "Tab":
        """Wait for it, and until nothing runs any more."""
        self.page.wait_for_selector(what, timeout=60_000)
        self.page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
        self.page.wait_for_function("!document.querySelector('[data-stale=true]')", timeout=60_000)
        self.page.wait_for_timeout(200)  # what came last is laid out
        return self

    def press(self, what: str, wait: str) -> "Tab":
        self.page.locator(what).locator("visible=true").last.click()
        return self.see(wait)

    def texts(self, what: str) -> list[str]: return [x.strip() for x in self.page.locator(what).all_inner_texts()]

    def fits(self) -> bool:
        """Nothing sticks out to the right."""
        out = "[...document.querySelectorAll('[data-testid=stMain] *')].filter(e => e.getBoundingClientRect().width && e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('[data-testid=stDataFrame]')).length"
        return self.page.evaluate(out) == 0 and self.page.evaluate("document.documentElement.scrollWidth") <= self.width

    def close(self) -> None:
        self.page.close()
        assert not self.wrong


def test_somebody_shops_and_the_list_follows(app, chromium):
    tab = Tab(chromium).at(f"{app}/?kind=new&shopper=nina", CARDS)
    before, title = tab.texts(f"{CARDS} button"), tab.texts(".st-key-open-for_you-2 button")[0]
    assert len(before) == 12 and "st-key-shelf-for_you" in tab.page.content()
    photo = tab.page.locator(".st-key-card-for_you-2 img").bounding_box()
    tab.page.mouse.click(photo["x"] + photo["width"] / 2, photo["y"] + photo["height"] / 2)  # the picture is the button's too
    tab.see(".st-key-buy button")
    assert tab.texts(".shop-big h2") == [title] and "item=" in tab.page.url
    tab.press(".st-key-add button", "text=Cart · 1")
    tab.press(".st-key-buy button", "text=1 item bought")
    tab.page.go_back()
    tab.see(CARDS)
    assert "item=" not in tab.page.url and tab.texts(f"{CARDS} button") != before and tab.page.locator(".shop-mark").count()
    assert f"What changed since you bought {title}" in tab.texts(".shop-changes")[0]
    tab.close()


def test_the_keyboard_is_enough(app, chromium):
    tab = Tab(chromium).at(f"{app}/?kind=new&shopper=keys", CARDS)
    title = tab.texts(".st-key-open-for_you-0 button")[0]
    tab.page.locator(".st-key-apart-for_you button").last.focus()
    for _ in range(20):
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate("document.activeElement.innerText") == title: break
    assert tab.page.evaluate("getComputedStyle(document.activeElement.closest('[class*=st-key-card-]')).outlineStyle") == "solid", "where the focus is can be seen"
    tab.page.keyboard.press("Enter")
    tab.see(".st-key-buy button")
    assert tab.texts(".shop-big h2") == [title]
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "columns"), [(1280, 6), (390, 2)])
def test_cards_stand_in_rows_of_one_height(app, chromium, width, columns, scheme, tmp_path):
    tab = Tab(chromium, width, scheme).at(app, CARDS)
    boxes = [b.bounding_box() for b in tab.page.query_selector_all(CARDS)]
    assert len({round(b["x"]) for b in boxes}) == columns and len({round(b["height"]) for b in boxes[:columns]}) == 1 and tab.fits()
    assert len(tab.page.screenshot(path=tmp_path / "home.png")) > 20_000
    tab.press(".st-key-open-for_you-1 button", ".st-key-buy button")
    assert tab.fits()
    tab.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_list_is_taken_apart(app, chromium, width):
    tab = Tab(chromium, width, "dark").at(f"{app}/?kind=known&shopper=user_1", CARDS)
    tab.press(".st-key-apart-for_you button", "text=Where the time went")
    tab.page.wait_for_selector("[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg")
    assert "/why" in tab.page.url and tab.fits()
    tab.close()


def test_an_answer_that_does_not_come_is_said(lake, chromium):
    with listening(sleepy(7)) as slow, running(lake, slow) as address:
        tab = Tab(chromium, 390).at(f"{address}/?kind=known&shopper=user_1", "text=did not answer within 5 s")
        assert "make serve" in tab.texts("[data-testid=stAlert]")[0] and tab.page.get_by_role("button", name="Try again").count() == 1 and tab.fits()
        tab.page.wait_for_selector("text=What this shopper did")
        tab.close()
