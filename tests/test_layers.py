"""The arrows of the design: notebooks import downwards, the package knows neither flows nor HTTP."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def code(notebook: Path) -> list[str]:
    """The sources of the code cells."""
    return ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


def module(notebook: Path) -> str | None:
    found = re.search(r"#\|\s*default_exp\s+(\S+)", "\n".join(code(notebook)))
    return found and found[1]


def imported(source: str) -> set[str]:
    """Modules that a piece of code imports."""
    out = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): out |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.module: out.add(node.module)
    return out


NUMBER = {f"reco.{module(n)}": n.name.split("_")[0] for n in NOTEBOOKS if module(n)}


def test_notebooks_import_only_from_lower_numbers():
    assert len(NUMBER) >= 20
    for notebook in NOTEBOOKS:
        mine = notebook.name.split("_")[0]
        used = {m for cell in code(notebook) if not cell.lstrip().startswith(("%", "!")) for m in imported(cell) if m in NUMBER}
        above = {m for m in used if NUMBER[m] >= mine}
        assert not above, f"{notebook.name} imports {sorted(above)}"


def test_the_package_knows_neither_flows_nor_http():
    for path in (ROOT / "reco").rglob("*.py"):
        roots = {m.split(".")[0] for m in imported(path.read_text())}
        assert not roots & {"metaflow", "ray", "fastapi", "streamlit", "app", "flows", "httpx"}, path


def test_no_star_imports_patches_or_bare_excepts():
    for path in (ROOT / "reco").rglob("*.py"):
        text = path.read_text()
        assert "import *" not in text and "@patch" not in text and not re.search(r"except\s*:", text), path


def test_every_number_is_given_once():
    numbers = [n.name.split("_")[0] for n in NOTEBOOKS]
    assert len(numbers) == len(set(numbers))
