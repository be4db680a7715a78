"""What the README promises is there, and what is committed is clean."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_names_only_targets_and_files_that_exist():
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z]+)", README))
    assert named >= {"demo", "test"} and named <= targets, named - targets
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    files = re.findall(r"python ((?:flows|data)/\S+\.py)", README) + links
    assert len(files) >= 4 and not [f for f in files if not (ROOT / f).exists()]
    folders = re.findall(r"^\| `(\w+)/`", README, re.MULTILINE)
    assert {"nbs", "reco", "flows", "app", "data", "docs", "clients", "tests", "benchmarks", "deploy"} == set(folders)


def test_the_translation_says_the_same():
    """Numbers, links, code and tables; decimal commas and Indonesian thousands are numbers too. The sentence on the no-op is in English alone."""
    other = (ROOT / "README.id.md").read_text()
    blocks = lambda text: [re.sub(r"#.*", "", b) for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    assert [b.split() for b in blocks(README)] == [b.split() for b in blocks(other)]
    links = lambda text: {x for x in re.findall(r"\]\(([^)]+)\)", text)} - {"README.md", "README.id.md"}
    assert links(other) <= links(README) and links(README) - links(other) == {"docs/explanation/latency.md"}
    rows = lambda text: [re.findall(r"\d+", line.replace(",", "").replace(".", "")) for line in text.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert rows(README) == rows(other) and len(rows(README)) > 10


@pytest.mark.parametrize("pattern", [r"/work/", r"/root/", r"/opt/wheels"])
def test_no_path_of_a_machine_is_committed(pattern):
    me = Path(__file__).resolve()
    files = [p for d in ("nbs", "reco", "flows", "app", "data/generators", "docs", "clients", "tests", "benchmarks") for p in (ROOT / d).rglob("*")]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    text = {".py", ".ipynb", ".md", ".ini", ".toml", ".lock", ".yml", ".sh", ".json", ""}
    found = [p for p in files if p.is_file() and p.suffix in text and p.resolve() != me
             and "__pycache__" not in p.parts and re.search(pattern, p.read_text(errors="ignore"))]
    assert not found


@pytest.mark.parametrize(("given", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
def test_threads_of_libraries_sleep_while_they_wait_unless_told_otherwise(given, found):
    code = "import sys, reco, os; assert not {'lightgbm', 'implicit', 'sklearn'} & {*sys.modules}; import lightgbm; print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept | given, capture_output=True, text=True)
    assert done.stdout.strip() == found, done.stderr
