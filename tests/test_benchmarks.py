"""Every benchmark runs, and the committed page is what its committed results say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.base import HERE, RESULTS, render

NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("__init__", "base"))


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_writes_a_table(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    body = json.loads((tmp_path / f"{name}.json").read_text())
    assert body["benchmark"] == name and body["rows"]
    assert all({"system", "case", "metrics"} <= set(r) and all(v >= 0 for v in r["metrics"].values()) for r in body["rows"])


def test_the_page_is_made_of_the_results(tmp_path: Path):
    render(RESULTS, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (HERE / "README.md").read_text()
    assert {p.stem for p in RESULTS.glob("*.json")} == set(NAMES)
