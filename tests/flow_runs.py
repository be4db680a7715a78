"""Running a flow the way an operator does, with settings of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Settings of a quick training, with gates that a small shop passes by far, whatever trees this processor grows; they have tests of their own.
SMALL = """[train]
max_requests = 100
cutoffs = 2
[ranking]
trees = 10
[als]
iterations = 2
[rerank]
diversity = 0
tail = 0
new = 0
keep_first = 0
[gates]
requests = 10
buyers = 10
min_shoppers = 5
confidence = 0.5
min_coverage = 0
max_gini = 1
p50_ms = 5000
p99_ms = 20000
try_seconds = 200
"""


def run_flow(folder: Path, flow: str, *args: str, **more: str) -> subprocess.CompletedProcess:
    """`python flows/FLOW.py run ARGS` with `folder/settings.ini`, and more environment variables; what it prints is in `stdout`, errors included."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECO_", "METAFLOW_"))}
    env = kept | {"RECO_SETTINGS": str(folder / "settings.ini"), "PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, f"flows/{flow}.py", *(args or ("run",))]
    return subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=540,
                          check=False)
