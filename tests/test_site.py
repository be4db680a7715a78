"""The documentation site: it builds without a network, everything that there is has its place in it, every link leads somewhere, and no page asks another host."""

import functools
import http.server
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from mkdocs.config import load_config
from playwright.sync_api import sync_playwright

from reco.schemas import CATALOG
from reco.settings import Settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs")) # its scripts are no package

import make_http  # noqa: E402
import make_python  # noqa: E402
import make_schemas  # noqa: E402
import make_settings  # noqa: E402
import make_site  # noqa: E402

from app.parts.data.dictionary import of_surfaces  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
LONGEST_S = 60 # CPU of a build
# what `mkdocs build` runs, in a process that cannot reach anybody
ALONE = """
import socket, sys
def refuse(*_): raise OSError("the site is built without a network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--site-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, before = tmp_path_factory.mktemp("site") / "site", resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"built in {seconds:.1f} s of CPU")
    assert done.returncode == 0, done.stderr
    assert seconds < LONGEST_S, f"{seconds:.0f} s of CPU; {LONGEST_S} are allowed"
    return folder


@pytest.fixture(scope="module")
def html(site: Path) -> dict[str, str]: # folder of a page → what it holds
    return {p.parent.relative_to(site).as_posix(): p.read_text() for p in site.rglob("index.html")}


def ids(page: str) -> set[str]: return {unescape(i) for i in re.findall(r'\sid="([^"]*)"', page)}


# ---- everything is there --------------------------------------------------------------------------------------------


def test_every_route_has_its_place(html):
    page = html["reference/http"]
    routes = list(make_http.routes())
    assert len(routes) >= 14
    for method, path, route in routes:
        assert make_http.anchor(method, path) in ids(page) and unescape(page).count(f"{method} {path}") >= 1
        for p in route.get("parameters", []): assert f"<code>{p['name']}</code>" in page
        for status in route["responses"]: assert f"<td>{status}</td>" in page
    assert {n.lower() for n in make_http.openapi()["components"]["schemas"]} | {"problem"} <= ids(page)


def test_every_setting_is_there_with_its_variable(html):
    page = html["reference/settings"]
    assert len(make_settings.keys()) > 200
    for section, key in make_settings.keys():
        assert page.count(f"<code>{make_settings.variable(section, key)}</code>") == 1, (section, key)
    assert {s for s, _ in make_settings.sections()} <= ids(page)
    assert not re.search(r"<td>[^<]*(annotation|typing|NoneType|PydanticUndefined)", page)


def test_a_limit_and_a_default_are_those_of_the_section():
    by = {(s, k): make_settings.row(s, k, info) for s, fields in make_settings.sections() for k, info in fields.items()}
    assert by["serving", "port"] == "| `port`<br>`RECO_SERVING_PORT` | port of the endpoint | whole number | `8000` | from 1 to 65,535 |"
    assert "| secret | empty |  |" in by["lake", "secret_key"] and "| `mmr` | `mmr` `dpp` |" in by["rerank", "method"]
    assert "| limit | `0.05 error` | from 0, then `error` or `warn` |" in by["quality", "bad_share"]
    assert "| number or word | `auto` | `auto`, from 0 to 10 |" in by["rerank", "diversity"]


def test_every_feature_and_schema_is_there(html):
    for feature in {f for features in of_surfaces(Settings()).values() for f in features}: assert f"<code>{feature}</code>" in html["features"]
    frames = {name: columns for name, _, columns in make_schemas.frames()}
    assert set(frames) >= {"INTERACTIONS", "CATALOG", "EXPOSURES", "CANDIDATES", "QUARANTINE", "BATCHES"} and "<code>event_id</code>" in html["reference/schemas"]
    assert {n.lower() for n in frames} <= ids(html["reference/schemas"])
    assert [c[0] for c in frames["CATALOG"]] == list(CATALOG.columns) and {c[0] for c in frames["CATALOG"] if c[2]} == set(CATALOG.required)


def test_every_module_and_what_it_exports_is_there(html):
    generated = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in (ROOT / "reco").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")]
    assert set(generated) < set(make_python.modules()) and len(generated) > 100
    for name, path in make_python.modules().items():
        page, source = html[f"reference/python/{name}"], make_python.read(path)
        defined = [n for n in source.exported if f"def {n}(" in path.read_text() or re.search(rf"^class {n}\b", path.read_text(), re.MULTILINE)]
        assert set(defined) <= ids(page), (name, set(defined) - ids(page))
        assert all(f"<code>{n}</code>" in page for n in source.exported if n not in defined), name
        assert not source.notebook or f'/{source.notebook.removesuffix(".ipynb")}/"' in page


def test_docments_are_read():
    page = make_python.page("reco.candidates.popularity")
    assert "| `age_ms` | `np.ndarray` |  | int64, age of each event |" in page and "**Returns** `np.ndarray`: float64 in (0, 1]" in page
    assert "| `half_life_days` | `float` | `7` |" in page and "### Popularity.retrieve { #Popularity.retrieve }" in page
    assert "**Raises** `SettingsError` naming file or variable" in make_python.page("reco.settings")
    client = make_python.page("app.client")
    assert "### AsyncClient.recommend " in client and "| `user_id` | `str` |  | the shop's own id, known or not |" in client


def test_every_notebook_is_there_with_its_outputs(html):
    notebooks = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    for path in notebooks:
        article = html[f"nbs/{path.stem}"].split("<article", 1)[1].split("</article>")[0]
        outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
        plots = [o for o in outputs if "image/png" in o.get("data", {})]
        prose = [o for o in outputs if "text/markdown" in o.get("data", {})]
        assert article.count('class="plot"') == len(plots), path.name
        assert article.count('class="output"') == len(outputs) - len(plots) - len(prose), path.name
    assert sum("<math" in html[f"nbs/{p.stem}"] for p in notebooks) >= 3


# ---- links ----------------------------------------------------------------------------------------------------------


def test_every_link_leads_to_a_page_and_to_a_place_on_it(site, html):
    places, broken = {page: ids(text) for page, text in html.items()}, []
    for page, text in html.items():
        for link in {unescape(x) for x in re.findall(r'\s(?:href|src)="([^"]*)"', text)}:
            if re.match(r"[a-z][a-z+.-]*:", link): continue
            path, _, anchor = link.partition("#")
            where = os.path.normpath(os.path.join(page, unquote(path))) if path else page
            if not (site / where).exists(): broken.append((page, link))
            elif anchor and where in places and unquote(anchor) not in places[where] and not anchor.startswith("__"): broken.append((page, link))
    assert len(html) > 250 and not broken, broken[:20]


@pytest.mark.parametrize(("link", "found"), [
    ("deploy/argo/README.md", "../deploy/argo/index.md"), ("../nbs/31_candidates.popularity.ipynb#places-instead-of-counts", "../nbs/31_candidates.popularity.md#places-instead-of-counts"),
    ("../README.md", "../overview.md"), ("experiments.md", "../experiments.md"), ("images/shop.png", "../images/shop.png"), ("https://a.example/x", "https://a.example/x"), ("#here", "#here"),
    ("../settings.ini", f"{make_site.REPOSITORY}/blob/main/settings.ini"), ("../nbs", f"{make_site.REPOSITORY}/tree/main/nbs"), ("../nothing.md", "../nothing.md")])
def test_links_between_files_become_links_between_pages(link, found):
    origin = "docs/any.md" if not link.startswith("deploy") else "any.md"
    assert make_site.target(link, origin, "somewhere/page.md") == found


def test_code_is_no_link():
    assert make_site.LINK.sub(lambda m: m[0] if m[1] else "X", "`[a](b.md)` ``[a](`b.md)`` [a](b.md)") == "`[a](b.md)` ``[a](`b.md)`` [aX"


def test_a_link_that_leads_nowhere_fails_the_build():
    config = load_config(str(ROOT / "mkdocs.yml"))
    kinds = config.validation
    assert config.strict and {kinds.links.not_found, kinds.links.anchors, kinds.links.unrecognized_links, kinds.nav.not_found} == {30} # logging.WARNING, which strict counts


def test_the_navigation_takes_what_is_in_a_folder_and_passes_over_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(make_site, "HERE", tmp_path)
    assert make_site.filled([{"Operations": "operations/"}, "index.md"]) == ["index.md"]
    (tmp_path / "operations").mkdir()
    for name in ("b.md", "index.md", "a.md"): (tmp_path / "operations" / name).touch()
    assert make_site.filled([{"Operations": "operations/"}]) == [{"Operations": ["operations/index.md", "operations/a.md", "operations/b.md"]}]


# ---- nobody else is asked -------------------------------------------------------------------------------------------


def test_no_page_loads_anything_from_elsewhere(site, html):
    loads = re.compile(r'<(?:script|img|iframe|source|video|audio|embed)[^>]*\ssrc="(?:https?:)?//|<link(?![^>]*rel="canonical")[^>]*\shref="(?:https?:)?//|<object[^>]*\sdata="(?:https?:)?//')
    assert not [page for page, text in html.items() if loads.search(text)]
    for path in site.rglob("*.css"): assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text()), path
    for path in site.rglob("*.svg"): assert not re.search(r"(?:href|src)=\"https?://|@import|<script", path.read_text()), path
    # the theme's script would fetch Mermaid, a maths library or emoji for pages that have them, and stars for a repository
    assert not [page for page, text in html.items() if re.search(r'class="mermaid|class="arithmatex|class="md-source"|twemoji"', text)]


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_browser_asks_nobody_else_and_finds_what_is_searched_for(address):
    if not CHROMIUM.exists(): pytest.skip(f"no {CHROMIUM}: make services")
    asked, wrong = [], []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda r: asked.append(r.url))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        for path in ("", "overview/", "nbs/87_experiments.readout/", "reference/http/", "explanation/data-flow/", "reference/python/reco.pipeline/"):
            page.goto(f"{address}/{path}", wait_until="networkidle")
        page.goto(f"{address}/explanation/data-flow/", wait_until="networkidle")
        pictures = page.locator("img.diagram")
        assert pictures.count() == 3 and all(pictures.nth(n).evaluate("x => x.complete && x.naturalWidth > 300 && x.clientWidth > 200") for n in range(3))
        page.locator('input[name="query"]').fill("propensity")
        page.wait_for_selector(".md-search-result__item", timeout=15_000)
        browser.close()
    assert len(asked) > 20 and not [url for url in asked if not url.startswith(address) and not url.startswith("data:")] and not wrong
