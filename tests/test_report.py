"""`flows/report.py` as an operator runs it, and the notebooks it runs: pages beside the bundles, or the cell that failed."""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from flow_runs import ROOT, run_flow
from judging import made, said
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_train import fill_lake

from reco.challenger import set_challenger
from reco.reports import ReportError, executed, kernel_environment, page, read_notebook, taken
from reco.settings import Train

SHIPPED = ("90_evaluation_report", "91_error_analysis", "92_fairness_frontier")


def notebook(path: Path, *cells: str, parameters: str = "bundle = ''") -> Path:
    """A notebook with a cell of parameters and some code."""
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A question"), first, *map(new_code_cell, cells)]), path)
    return path


class Addresses(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "data") and not (v or "").startswith(("data:", "#"))]


def test_reports_of_the_challenger_lie_beside_it_and_a_failing_cell_is_named(trained, tmp_path):
    names = ["91_error_analysis", "own.ipynb"]
    (tmp_path / "settings.ini").write_text(f"[reports]\nnotebooks = {' '.join(names)}\n")
    notebook(tmp_path / "own.ipynb", "import reco\nfrom IPython.display import Markdown\nMarkdown(f'bundle: {bundle}')", "import sys; sys.executable")
    lake, root = fill_lake(tmp_path, trained.sim), tmp_path / "data" / "bundles"
    about = said(trained, snapshots={t: lake.snapshot(t) for t in ("interactions", "catalog")})
    name = made(trained, root, about=about, train=Train(cutoffs=3, max_requests=60))
    set_challenger(root / name)
    done = run_flow(tmp_path, "report")
    assert done.returncode == 0, done.stdout
    folder = root / "reports" / name
    pages = {p.stem: p.read_text() for p in folder.glob("*.html")}
    assert set(pages) == {"91_error_analysis", "own"} and {p.stem for p in folder.glob("*.ipynb")} == set(pages)
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    for text in pages.values(): assert not Addresses(text).found and name in text
    assert pages["91_error_analysis"].count("<img") == 5 and "small simulated shop" not in pages["91_error_analysis"]
    ran = nbformat.read(folder / "own.ipynb", 4)
    assert ran.cells[-1].outputs[0].data["text/plain"] == repr(sys.executable)
    cards = [p.read_text() for p in (tmp_path / ".metaflow").rglob("html-*.html")]
    assert sorted(cards) == sorted(pages.values())

    notebook(tmp_path / "broken.ipynb", "rows = 3", "def share(n):\n    return 1/n\n\nshare(rows - 3)")
    (tmp_path / "settings.ini").write_text("[reports]\nnotebooks = broken.ipynb\n")
    failed = run_flow(tmp_path, "report", "run", "--bundle", name)
    assert failed.returncode == 1, failed.stdout
    assert "broken.ipynb, code cell 3, line 4: ZeroDivisionError: division by zero" in failed.stdout, failed.stdout
    assert "share(rows - 3)" in failed.stdout and "return 1/n" in failed.stdout
    half = nbformat.read(folder / "broken.failed.ipynb", 4)
    assert any(o.output_type == "error" for c in half.cells for o in c.get("outputs", [])) and not (folder / "broken.html").exists()


@pytest.mark.parametrize(("settings", "args", "says"), [
    ("", ("run",), "no challenger in"),
    ("[reports]\nnotebooks = 90_evaluation_report mine.ipynb\n", ("run",), "mine.ipynb"),
])
def test_what_is_not_there_is_said_before_anything_runs(tmp_path, settings, args, says):
    (tmp_path / "settings.ini").write_text(settings)
    done = run_flow(tmp_path, "report", *args)
    assert done.returncode != 0 and says in done.stdout, done.stdout
    assert not (tmp_path / "data").exists()


# ---- one notebook ----------------------------------------------------------------------------------------------------


def test_the_kernel_is_this_interpreter_whatever_is_installed(tmp_path, monkeypatch):
    wrong = tmp_path / "elsewhere" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text('{"argv": ["/nowhere/python", "{connection_file}"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before = dict(os.environ)
    nb = read_notebook(notebook(tmp_path / "a.ipynb", "import sys, os, reco\n(sys.executable, os.getcwd())").read_text(), "a.ipynb")
    ran = executed(nb, {"bundle": "b", "nobody": 1}, tmp_path)
    assert eval(ran.cells[-1].outputs[0].data["text/plain"]) == (sys.executable, str(tmp_path))
    assert dict(os.environ) == before and str(tmp_path) not in str(ran.metadata)


def test_kernels_that_start_at_once_share_neither_ports_nor_sockets(tmp_path):
    cell = "import json, os\nfrom ipykernel.connect import get_connection_info\ninfo = json.loads(get_connection_info())\n(info['transport'], info['ip'], os.listdir())"
    nb = read_notebook(notebook(tmp_path / "a.ipynb", cell).read_text(), "a.ipynb")
    found = [eval(executed(nb, {}, tmp_path).cells[-1].outputs[0].data["text/plain"]) for _ in range(2)]
    assert all(transport == "ipc" and Path(ip).is_absolute() and files == ["a.ipynb"] for transport, ip, files in found)
    assert found[0][1] != found[1][1] and not Path(found[0][1]).parent.exists()


def test_a_kernel_that_dies_is_told_with_the_cell_it_was_at(tmp_path):
    """As one does that asks for more memory than there is: it leaves no traceback."""
    before = dict(os.environ)
    path = notebook(tmp_path / "a.ipynb", "print('before')", "import os, time\nprint('now', flush=True)\ntime.sleep(0.5)\nos._exit(9)", "print('never')")
    with pytest.raises(ReportError, match=r"^code cell 3: Kernel died \(killed, perhaps.*\n    import os, time$") as caught:
        executed(read_notebook(path.read_text(), "a.ipynb"), {"bundle": "b"}, tmp_path)
    half = caught.value.notebook
    assert [o.text for c in half.cells for o in c.get("outputs", [])][0] == "before\n" and not half.cells[-1].outputs
    assert dict(os.environ) == before and nbformat.validate(half) is None


@pytest.mark.parametrize(("begins", "seconds", "says"), [("raise SystemExit(3)", 120, "died before"), ("import time; time.sleep(60)", 1, "didn't respond in 1 seconds")])
def test_a_kernel_that_does_not_start_is_told(tmp_path, monkeypatch, begins, seconds, says):
    (tmp_path / "ipykernel_launcher.py").write_text(begins)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    nb = read_notebook(notebook(tmp_path / "a.ipynb", "1").read_text(), "a.ipynb")
    with pytest.raises(ReportError, match=f"^the kernel did not start: Kernel {says}") as caught: executed(nb, {}, tmp_path, seconds)
    assert len(caught.value.notebook.cells) == len(nb.cells)


def test_settings_of_the_kernel_come_first(tmp_path):
    found = kernel_environment(tmp_path, {"JUPYTER_PATH": "/a", "PYTHONPATH": "/b"})
    assert found["JUPYTER_PATH"].split(os.pathsep) == [str(tmp_path), "/a"]
    assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/b"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}', '{"nbformat": 4}', "\x00"])
def test_what_is_no_notebook_is_named(text):
    with pytest.raises(ReportError, match=r"mine\.ipynb is no notebook"): read_notebook(text, "mine.ipynb")


def test_only_what_the_cell_of_parameters_names_is_handed_over(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "lake = 3", parameters="bundle = ''\nsnapshots: dict = {}\n# lake = 1\nx = lakes = 2")
    nb = read_notebook(path.read_text(), "a")
    assert taken(nb, {"bundle": 1, "snapshots": {}, "lake": 2, "lakes": 3}) == {"bundle": 1, "snapshots": {}}
    assert taken(new_notebook(cells=nb.cells[2:]), {"lake": 2}) == {}


def test_a_page_shows_no_code_no_errors_of_libraries_and_all_pictures():
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    shown = [nbformat.v4.new_output("display_data", {"image/png": png}), nbformat.v4.new_output("stream", name="stderr", text="a warning"),
             nbformat.v4.new_output("stream", name="stdout", text="<b>a number</b>")]
    html = page(new_notebook(cells=[new_markdown_cell("# Title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"), new_code_cell("secret = 1", outputs=shown)]), "A & <B>")
    assert f"data:image/png;base64,{png}" in html and "<td" in html and "&lt;b&gt;a number" in html
    assert "secret" not in html and "a warning" not in html and "<title>A &amp; &lt;B&gt;</title>" in html


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory) -> tuple[Path, str]:
    """A folder with settings, lake and one bundle, and the bundle's name."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "settings.ini").write_text("")
    lake = fill_lake(folder, trained.sim)
    about = said(trained, snapshots={t: lake.snapshot(t) for t in ("interactions", "catalog")})
    return folder, made(trained, folder / "data" / "bundles", about=about, train=Train(cutoffs=3, max_requests=60))


@pytest.mark.parametrize("name", [n for n in SHIPPED if n != "91_error_analysis"]) # which a flow runs above
def test_shipped_reports_run_on_a_bundle(name, reported, monkeypatch):
    folder, bundle = reported
    monkeypatch.setenv("RECO_SETTINGS", str(folder / "settings.ini"))
    nb = read_notebook((ROOT / "nbs" / f"{name}.ipynb").read_text(), name)
    nb.cells.append(new_code_cell("(subject.name, len(a.asked.user))"))
    ran = executed(nb, {"bundle": bundle, "bundles": str(folder / "data" / "bundles"), "lake": str(folder / "data" / "lake")}, folder)
    of, requests = eval(ran.cells[-1].outputs[0].data["text/plain"])
    assert of == bundle and 0 < requests <= 60
    assert "<img" in (html := page(ran, name)) and not Addresses(html).found


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_reports_can_be_run_on_a_bundle_and_without_one(name):
    nb = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    own = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(own) == 1
    values: dict = {}
    exec(own[0].source, values)
    assert values["bundle"] == values["bundles"] == values["lake"] == "" and values["snapshots"] == {}
    assert not re.search(r"^#\| *(default_exp|export)", "\n".join(c.source for c in nb.cells), re.MULTILINE)
