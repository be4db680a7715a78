"""Every benchmark runs, and the committed page is what its committed results say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.base import HERE, RESULTS, render

NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("__init__", "base", "peers"))


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_writes_a_table(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    body = json.loads((tmp_path / f"{name}.json").read_text())
    assert body["benchmark"] == name and body["rows"]
    for r in body["rows"]:
        assert {"system", "case", "metrics"} <= set(r)
        assert all(v >= 0 for x in r["metrics"].values() for v in (x if isinstance(x, list) else [x]))


def test_the_page_is_made_of_the_results(tmp_path: Path):
    render(RESULTS, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (HERE / "README.md").read_text()
    assert {p.stem for p in RESULTS.glob("*.json")} == set(NAMES)


def test_the_readme_says_what_was_measured():
    """Every figure of the README's table is the benchmark's."""
    rows = json.loads((RESULTS / "holdout.json").read_text())["rows"]
    by = {(r["system"], r["case"]): r["metrics"] for r in rows}
    readme = (HERE.parent / "README.md").read_text()
    for system in {r["system"] for r in rows}:
        name = "**pipeline**" if system == "reco" else system
        [line] = [x for x in readme.splitlines() if x.startswith(f"| {name} |")]
        whole, home, visit = (by[system, case] for case in ("all", "home", "visit"))
        ahead = f"{whole['reco ahead']:.1%}" if "reco ahead" in whole else ""
        interval = "[{:.3f}, {:.3f}]".format(*whole["NDCG@10_ci"])
        cells = [f"{whole['NDCG@10']:.3f} {interval}", ahead, f"{home['NDCG@10']:.3f}", f"{visit['NDCG@10']:.3f}",
                 f"{whole['Recall@20']:.3f}", f"{whole['coverage@10']:.3f}"]
        assert [c.strip() for c in line.replace("**", "").split("|")[2:-1]] == cells
