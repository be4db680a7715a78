"""Pictures of the app's pages for the docs, from a running demo: `make demo`, then `python docs/make_images.py`."""
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # for `app`, which is no installed package

from app.dashboard import PAGES
from app.ports import reach
from reco.settings import load_settings

IMAGES, CHROMIUM = Path(__file__).parent/"images", "/usr/bin/chromium"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SETTLED_MS = 2_500 # charts are drawn after the page says that it is ready
TABS = {"monitoring": "Drift and retraining"} # what says most of a page, where it is not what one sees first


def open_page(tab: Page, address: str, name: str, first: bool) -> None:
    "Go there and wait until nothing runs any more; raises `RuntimeError` for a page that shows an error."
    tab.goto(address if first else f"{address}/{name}")
    tab.wait_for_selector("h1", timeout=60_000)
    tab.wait_for_function("!document.querySelector('[data-testid=stStatusWidget]')", timeout=60_000)
    if name in TABS: tab.get_by_role("tab", name=TABS[name]).click()
    tab.wait_for_timeout(SETTLED_MS)
    if tab.query_selector("[data-testid=stException]"): raise RuntimeError(f"{name}: {tab.inner_text('[data-testid=stException]')[:500]}")


def buy_something(tab: Page) -> None:
    "The second item of the first shelf, and back: the shelf says what that changed."
    tab.locator("[class*=st-key-open-for_you-] button").nth(1).click()
    tab.get_by_role("button", name="Buy now").click()
    tab.wait_for_selector("text=bought.")
    tab.get_by_role("button", name="Recommended for You").first.click()
    tab.wait_for_selector("[class*=st-key-open-for_you-]")
    tab.mouse.move(0, 0)
    tab.wait_for_timeout(SETTLED_MS)


def main() -> int: # exit code
    "One picture of each page, and of the first on a phone and in the dark."
    address = reach("127.0.0.1", load_settings().app.port)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"])
        for suffix, size, scheme, pages in (("", WIDE, "light", PAGES), ("_phone", PHONE, "light", PAGES[:1]), ("_dark", WIDE, "dark", PAGES[:1])):
            tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            for name, title, _ in pages:
                open_page(tab, address, name, name == PAGES[0][0])
                if name == "shop" and not suffix: buy_something(tab)
                tab.screenshot(path=IMAGES/f"{name}{suffix}.png")
                print(f"{title}: {IMAGES/f'{name}{suffix}.png'}")
        browser.close()
    return 0


if __name__ == "__main__": sys.exit(main())
