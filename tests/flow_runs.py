"""Running a flow the way an operator does, with settings of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_flow(folder: Path, flow: str, *args: str, **more: str) -> subprocess.CompletedProcess:
    """`python flows/FLOW.py run ARGS` with `folder/settings.ini`, and more environment variables; what it prints is in `stdout`, errors included."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECO_", "METAFLOW_"))}
    env = kept | {"RECO_SETTINGS": str(folder / "settings.ini"), "PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, f"flows/{flow}.py", *(args or ("run",))]
    return subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=540,
                          check=False)
