"""A batch of the platform's own files through `ingest` (rules, duplicates, visits, gate, profile, lake) on a folder, beside the floor:
polars reading the same Parquet file and writing it again, as a frame and as a stream. Each in a process of its own, whose peak
memory is the figure.

Ingested once more, nothing is new: "again" is what that costs. What it leaves out: S3 (the network decides), CSV (parsing it
comes on top), and more than one batch in the lake.
"""

import importlib
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import polars as pl

from benchmarks.base import arguments, render, write

END = datetime(2026, 5, 1, tzinfo=UTC)
SIZES = 300_000, 1_000_000, 3_000_000, 10_000_000


def make(folder: Path, events: int) -> int:
    """A simulated shop with visits unnamed, so that they have to be found; how many events it has."""
    from reco.data.simulator import simulate, write_shop
    write_shop(simulate(events // 10, min(20_000, events // 10), events, days=90, end=END, seed=7), folder)
    path = folder / "interactions.parquet"
    rows = pl.read_parquet(path).with_columns(session_id=pl.lit(None, pl.String))
    rows.write_parquet(path)
    return rows.height


def ingest_into(raw: Path, out: Path) -> None:
    """What `flows/ingest.py` does with `source = files`."""
    from reco.data.ingestion import ingest
    from reco.data.lake import Lake
    from reco.data.sources import read_source
    from reco.settings import Settings
    s = Settings()
    done = ingest("files", lambda _: read_source("files", raw), Lake(out / "lake"), END, s.quality, s.data.session_gap_minutes,
                  out / "scratch", s.data.memory_gb)
    if done.refused: sys.exit(done.refused)


def as_frame(raw: Path, out: Path) -> None:
    """Polars: read all, write all."""
    pl.read_parquet(raw / "interactions.parquet").write_parquet(out / "frame.parquet")


def as_stream(raw: Path, out: Path) -> None:
    """Polars: never all of it in memory."""
    pl.scan_parquet(raw / "interactions.parquet").sink_parquet(out / "stream.parquet")


WORK = {"make": make, "ingest": ingest_into, "again": ingest_into, "frame": as_frame, "stream": as_stream}


def child(work: str, raw: str, out: str) -> None:
    """One measurement, printed as JSON: seconds without imports of our own, and the process's peak memory."""
    if work == "make": return print(json.dumps({"rows": make(Path(raw), int(out))}))
    if work in ("ingest", "again"): importlib.import_module("reco.data.ingestion")  # whylogs alone takes seconds
    began = time.perf_counter()
    WORK[work](Path(raw), Path(out))
    print(json.dumps({"s": time.perf_counter() - began, "peak_gb": getrusage(RUSAGE_SELF).ru_maxrss / 2**20}))


def run(*args: object) -> dict:
    """A child's figures."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--child", *map(str, args)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Four sizes, four ways."""
    if "--child" in sys.argv: return child(*sys.argv[sys.argv.index("--child") + 1:])
    args, rows = arguments(__doc__).parse_args(), []
    names = {"ingest": "reco ingest", "again": "reco ingest, again", "frame": "polars, as a frame", "stream": "polars, as a stream"}
    for events in (20_000,) if args.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            raw, out = Path(folder) / "raw", Path(folder) / "out"
            out.mkdir()
            n = run("make", raw, events)["rows"]
            found = {work: run(work, raw, out) for work in names}
        for work, name in names.items():
            rows.append({"system": name, "case": f"{n:,} events", "metrics": {
                "rows_per_s": round(n / found[work]["s"]), "seconds": round(found[work]["s"], 2), "peak_gb": round(found[work]["peak_gb"], 2),
                "times_the_frame": round(found[work]["s"] / found["frame"]["s"], 1)}})
    write("ingest", rows, args.results)
    if not args.quick: render()


if __name__ == "__main__": main()
