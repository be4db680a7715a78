"""The notebooks are the source: `reco/` is exactly what they export, and they are clean. Needs no git."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

def nbdev(command: str, folder: Path, *args: str) -> None:
    "Run one of nbdev's commands in a folder; fails with what it printed."
    done = subprocess.run([Path(sys.executable).with_name(f"nbdev-{command}"), *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The notebooks alone, in a folder of their own."
    folder = tmp_path_factory.mktemp("notebooks")
    for name in ("pyproject.toml", "README.md"): shutil.copy(ROOT/name, folder)
    (folder/"reco").mkdir()
    shutil.copy(ROOT/"reco"/"__init__.py", folder/"reco") # the version is kept there, no notebook exports it
    for nb in NOTEBOOKS:
        to = folder/nb.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(nb, to)
    return folder

def modules(folder: Path) -> dict[str, str]: # path below reco/ → text
    return {p.relative_to(folder/"reco").as_posix(): p.read_text("utf-8") for p in (folder/"reco").rglob("*.py")}

def test_reco_is_exactly_what_the_notebooks_export(fresh):
    nbdev("export", fresh)
    ours, theirs = modules(ROOT), modules(fresh)
    assert sorted(ours) == sorted(theirs), "a module without its notebook, or a notebook never exported: run make prepare"
    assert not [m for m in ours if ours[m] != theirs[m]], "edited by hand, or not exported since: run make prepare"

def test_notebooks_are_clean(fresh):
    before = {p: (fresh/p.relative_to(ROOT)).read_bytes() for p in NOTEBOOKS}
    nbdev("clean", fresh)
    dirty = [p.name for p in NOTEBOOKS if (fresh/p.relative_to(ROOT)).read_bytes() != before[p]]
    assert not dirty, "run make prepare"

@pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_hold_no_path_of_a_machine(nb):
    text = nb.read_text("utf-8")
    assert str(ROOT) not in text and os.path.expanduser("~") + os.sep not in text
