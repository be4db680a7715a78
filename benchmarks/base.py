"""What every benchmark shares: how it is written down, and the page that is made of all of them."""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from reco.provenance import git_sha, versions
from reco.settings import Settings

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LIBRARIES = "reco", "implicit", "lightgbm", "numba", "numpy", "polars", "ray"


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds, for the tests; its figures mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    return parser


def quickly(settings: Settings) -> Settings:
    """The settings of a smoke run: few cutoffs, requests and trees."""
    train = settings.train.model_copy(update={"cutoffs": 2, "max_requests": 60})
    return settings.model_copy(update={"train": train, "ranking": settings.ranking.model_copy(update={"trees": 20})})


def write(name: str, rows: list[dict], folder: Path, test_looks: int = 0, argv: Sequence[str] | None = None,
          others: Mapping[str, str] | None = None) -> Path:
    """Write one benchmark's rows (`system`, `case`, `metrics`), whole or not at all, and print them.

    `argv` are its arguments when they are not the process's; `others` are versions of libraries of another environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = f"{os.cpu_count()} cores, {os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30:.0f} GiB, {platform.machine()}"
    command = f"python -m benchmarks.{name} {shlex.join(sys.argv[1:] if argv is None else argv)}".strip()
    body = {"benchmark": name, "command": command, "git_sha": git_sha(HERE), "machine": machine,
            "versions": versions(LIBRARIES) | {"python": platform.python_version()} | dict(others or {}),
            "test_looks": test_looks, "rows": rows}
    temp, path = folder / f".{name}.json", folder / f"{name}.json"
    temp.write_text(json.dumps(body, indent=1) + "\n")
    temp.replace(path)
    print(table(body))
    return path


def folder_with_store() -> tempfile.TemporaryDirectory:
    """A temporary folder that may hold an embedded Redis, which ends a moment after its last user and then still writes there."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile in ms, and how many were measured."""
    ms = 1000 * np.array(seconds)
    return {"p50_ms": round(float(np.median(ms)), 3), "p99_ms": round(float(np.quantile(ms, 0.99)), 3), "requests": len(ms)}


def table(body: dict) -> str:
    """One benchmark as Markdown."""
    sha = body["git_sha"]
    columns = list(dict.fromkeys(k for r in body["rows"] for k in r["metrics"]))
    lines = [f"| system | case | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {r['system']} | {r['case']} | {' | '.join(str(r['metrics'].get(c, '')) for c in columns)} |" for r in body["rows"]]
    about = f"`{body['command']}` · {sha[:12]}{sha[40:]} · {body['machine']}"
    if body["test_looks"]: about += f" · test part looked at {body['test_looks']} times"
    return "\n".join([f"## {body['benchmark']}", "", about, "", *lines, ""])


def render(folder: Path = RESULTS, page: Path = HERE / "README.md") -> None:
    """Make the page anew from all results."""
    about = ("# Benchmarks\n\nEach is one command; `--quick` is a smoke run. Machines are noisy: ratios within one run count, "
             "absolute times do not. Made by `python -m benchmarks.base` from `results/`.\n\n")
    page.write_text(about + "\n".join(table(json.loads(p.read_text())) for p in sorted(folder.glob("*.json"))))


if __name__ == "__main__": render()
