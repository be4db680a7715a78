"""What `make docs` adds to the pages of `docs/`: notebooks, READMEs and generated references; links from file to file become links from page to page."""

import os
import re
import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (ROOT, HERE):
    if str(folder) not in sys.path: sys.path.insert(0, str(folder)) # `app` is no installed package

import make_http  # noqa: E402
import make_notebooks  # noqa: E402
import make_python  # noqa: E402
import make_schemas  # noqa: E402
import make_settings  # noqa: E402
import mmdr  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402
from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402

REPOSITORY = "https://github.com/reco-platform/reco"
READMES = ("README.md", "README.id.md", "benchmarks/README.md", "data/README.md", "deploy/**/README.md", "clients/**/README.md")
GENERATED: dict[str, Callable[[], str]] = {
    "reference/http.md": make_http.page, "reference/settings.md": make_settings.page, "reference/schemas.md": make_schemas.page,
    **{f"reference/python/{name}.md": lambda name=name: make_python.page(name) for name in make_python.modules()}}


def page_of(
    path: str, # a file of the repository
) -> str:      # its page, whether there is one or not
    "Where a file is found in the site."
    if path in ("README.md", "README.id.md"): return path.replace("README", "overview")
    if path.startswith("docs/"): return path.removeprefix("docs/")
    if path.endswith(".ipynb"): return path.removesuffix(".ipynb") + ".md"
    return path.replace("README.md", "index.md")


@cache
def brought() -> dict[str, str]: # page → the file of the repository that it is made of
    "Pages that are made of files beyond `docs/`, in the order of their names."
    files = [p for pattern in READMES for p in ROOT.glob(pattern) if "node_modules" not in p.parts] + sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    return {page_of(p.relative_to(ROOT).as_posix()): p.relative_to(ROOT).as_posix() for p in files}


# ---- navigation ---------------------------------------------------------------------------------------------------


def below(
    folder: str, # of the navigation, with / at its end
) -> list:       # of the navigation
    "Every page below a folder: notebooks and modules in their groups."
    if folder == "nbs/": return make_notebooks.nav([p for p in brought() if p.startswith(folder)])
    if folder == "reference/python/": return make_python.nav()
    own = sorted(p.relative_to(HERE).as_posix() for p in (HERE / folder).rglob("*.md")) if (HERE / folder).is_dir() else []
    return sorted(own, key=lambda p: (not p.endswith(("index.md", "README.md")), p)) + sorted(p for p in brought() if p.startswith(folder))


def filled(
    nav: list, # of mkdocs.yml
) -> list:     # without folders, and without sections that nothing is in
    "The navigation with its folders filled in."
    out: list[Any] = []
    for entry in nav:
        title, what = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        if isinstance(what, list): what = filled(what)
        elif what.endswith("/"): what = below(what)
        if what: out.append({title: what} if title else what)
    return out


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    "Fill the navigation."
    config.nav = filled(config.nav or [])
    return config


# ---- pages --------------------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    "Bring in what is not in `docs/`."
    for page, path in brought().items():
        if path.endswith(".ipynb"):
            text, pictures = make_notebooks.page(ROOT / path)
            for name, raw in pictures.items(): files.append(File.generated(config, f"nbs/pictures/{name}", content=raw))
        else: text = (ROOT / path).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    for page, make in GENERATED.items(): files.append(File.generated(config, page, content=make()))
    for file in list(files.documentation_pages()):
        for source in diagrams(file.content_string): files.append(File.generated(config, picture(source), content=drawn(source)))
    return files


FENCE = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)


def diagrams(markdown: str) -> list[str]: # the Mermaid sources of a page
    return [m[4] for m in FENCE.finditer(markdown) if m[3].strip() == "mermaid"]


def picture(source: str) -> str: # the page's address of a diagram
    return f"diagrams/{sha256(source.encode()).hexdigest()[:12]}.svg"


@cache
def drawn(source: str) -> str:
    "A diagram as SVG, of its natural size: Mermaid's own script would be fetched by the reader's browser from elsewhere."
    svg = mmdr.render(source).svg()
    wide, high = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg).groups()
    return svg.replace('width="100%"', f'width="{wide}" height="{high}"', 1)


def target(
    link: str,   # as it was written: relative to the file, perhaps with an anchor
    origin: str, # the file of the repository that says it
    page: str,   # the page that it is on
) -> str:
    "The same link from page to page; to a file that has no page: into the repository. One that leads nowhere stays, and the build fails."
    if re.match(r"[a-z][a-z0-9+.-]*:|#|/", link): return link
    path, _, anchor = link.partition("#")
    path = os.path.normpath(os.path.join(os.path.dirname(origin), path)).replace(os.sep, "/")
    for name in (path, f"{path}/README.md"):
        found = page_of(name)
        if found in brought() or name.startswith("docs/"):
            if found in brought() or found in GENERATED or (HERE / found).is_file():
                return os.path.relpath(found, os.path.dirname(page) or ".").replace(os.sep, "/") + (f"#{anchor}" if anchor else "")
    if (ROOT / path).exists(): return f"{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
    return link


LINK = re.compile(r"(`+)(?:.|\n)*?\1(?!`)|(\]\()([^)\s]+)(\))") # code is passed over


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    "Links and diagrams of a page."
    here = page.file.src_uri
    origin = brought().get(here, f"docs/{here}")
    link = lambda m: m[0] if m[1] else m[2] + target(m[3], origin, here) + m[4]
    out, end = [], 0
    for m in FENCE.finditer(markdown):
        out.append(LINK.sub(link, markdown[end:m.start()]))
        shown = os.path.relpath(picture(m[4]), os.path.dirname(here) or ".")
        out.append(f"{m[1]}![Diagram: {words(m[4])}]({shown}){{ .diagram }}\n" if m[3].strip() == "mermaid" else m[0])
        end = m.end()
    return "".join(out) + LINK.sub(link, markdown[end:])


def words(source: str) -> str: # of a diagram, for who does not see it
    "What stands in the nodes of a diagram."
    found = re.findall(r"[\[({>|]+\"?([^\[\](){}|\"]+)", source) or re.findall(r"(?:as|:) +(.+)", source)
    return ", ".join(dict.fromkeys(re.sub(r"<br ?/?>", " ", w).strip() for w in found))[:300]


MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    "Formulas as MathML, which browsers draw themselves."
    plain = lambda text: text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return MATH.sub(lambda m: convert(plain(m[2]), display="block" if m[1] == "div" else "inline"), html)
