"""The walkthroughs of `nbs/9x`: what is committed came out of real files, and by its parameters one runs on others (the reports on bundles: test_report)."""

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pytest

from reco.data.raw_shop import NAMES, SMALL
from reco.data.simulator import simulate, write_shop
from reco.data.sources import FILES
from reco.reports import executed, page, read_notebook

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from make_walkthroughs import NOTEBOOKS, WALKTHROUGHS, folder_of, main, parameters, with_outputs  # noqa: E402

ALL = sorted(NOTEBOOKS.glob(WALKTHROUGHS))
LARGEST = 260_000  # bytes: a picture or a table too many is noticed here
QUICK = {"93_what_shoppers_do", "94_one_shopper"}  # to be run once more; nbdev-test runs all without files


def outputs(path: Path) -> list[dict]:
    return [o for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code" for o in c["outputs"]]


def words(path: Path) -> str:
    """What a reader sees of the outputs, pictures left out."""
    return "\n".join("".join(o.get("data", {}).get("text/markdown", o.get("text", ""))) for o in outputs(path))


def test_there_is_a_walkthrough_for_each_question():
    assert [p.stem[:2] for p in ALL] == [str(90 + i) for i in range(len(ALL))] and len(ALL) >= 8


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_what_is_committed_came_from_real_files_and_is_small(path):
    nb, said = nbformat.read(path, 4), words(path)
    values = parameters(nb)
    assert values["source"] in FILES and values["path"] == "", "the cell of parameters names no folder"
    assert NAMES[values["source"]] in said and SMALL not in said, "run `make walkthroughs` with the files that it is about"
    assert all(c.outputs for c in nb.cells if c.cell_type == "code" and re.search(r"^(Markdown|fig$|display)", c.source, re.MULTILINE))
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in nb.cells)
    assert not [o for o in outputs(path) if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < LARGEST


@pytest.fixture(scope="module")
def shop_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_shop(simulate(400, 200, 9_000, days=80, end=datetime(2026, 5, 1, tzinfo=UTC), seed=5), folder)
    return folder


@pytest.mark.parametrize("path", [p for p in ALL if p.stem in QUICK], ids=lambda p: p.stem)
def test_parameters_let_it_run_on_other_files(path, shop_files, tmp_path):
    nb = read_notebook(path.read_text("utf-8"), path.name)
    ran = executed(nb, {"source": "files", "path": str(shop_files)}, tmp_path)
    text = page(ran, path.stem)
    assert "<strong>files" in text and SMALL not in text and text.count("<table") >= 3


def test_outputs_are_kept_by_cell_and_a_machines_folder_is_refused():
    from nbformat.v4 import new_code_cell, new_notebook, new_output
    cell = new_code_cell("1 + 1", id="a")
    told = lambda text: new_notebook(cells=[new_code_cell("path = 3", id="injected"), new_code_cell("1 + 1", id="a", outputs=[
        new_output("stream", name="stderr", text="a warning"), new_output("stream", name="stdout", text=text)])])
    kept = with_outputs(new_notebook(cells=[cell]), told("2"))
    assert [o.text for o in kept.cells[0].outputs] == ["2"] and len(kept.cells) == 1
    with pytest.raises(ValueError, match="folder of this machine"): with_outputs(new_notebook(cells=[cell]), told("/tmp/x/events.csv"))


@pytest.mark.parametrize(("args", "part"), [
    (["nobody=."], "'nobody' is no format"), (["retailrocket=/no/such"], "no folder '/no/such'"), ([], "required"),
])
def test_files_that_cannot_be_meant_are_refused(args, part, capsys):
    with pytest.raises(SystemExit) as ended: main(args)
    assert ended.value.code == 2 and part in capsys.readouterr().err
    assert folder_of(f"files={ROOT}") == ("files", ROOT)


def test_an_unknown_walkthrough_is_named():
    with pytest.raises(SystemExit, match="no walkthrough 99_nothing; there are 90_evaluation_report"): main([f"files={ROOT}", "--only", "99_nothing"])
