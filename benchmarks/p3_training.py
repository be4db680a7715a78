"""`flows/train.py` from start to end on simulated shops, by step, beside the bare libraries on the same matrices, and how both grow with the events.

A shop has a shopper per 20 events and an item per 100. The flow runs as an operator runs it, its processes watched from outside: `seconds` of a step
are from its first process's first moment to its last one's last, `peak_mb` the most that all processes of a step held at once (pages that they share
count for each, which overstates two branches of `fit`). The parts of `rank` are as the step itself says.

The floor is what nobody who trains these models can save: implicit's ALS on the weights of every moment, and LightGBM once per surface, until it
stops early on the same lists; each in a process of its own, what it learns from read before the clock starts.

What it leaves out: reading raw files into the lake, the gates, real shops, and more than one machine.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from benchmarks.base import HERE, arguments, render, write
from reco.data.lake import Lake
from reco.data.scratch import FOLDER, Scratch
from reco.data.simulator import simulate
from reco.schemas import SURFACES
from reco.settings import Lake as LakeSection
from reco.settings import Settings, load_settings

EVERY_S = 0.2 # between two looks at the processes
QUICK = "[train]\nhorizon_days = 7\nholdout_days = 7\ncutoffs = 2\nmax_requests = 60\n[ranking]\ntrees = 10\n[tracking]\nenabled = false\n"
FULL = "[tracking]\nenabled = false\n"

# ---- the floor, each in a process of its own --------------------------------------------------------------------------


def bare_als(kept: Scratch, settings: Settings) -> float:
    """ALS on the weights of every moment, without the rest of a source; seconds of the fits alone."""
    from reco.candidates.als import item_vectors
    from reco.candidates.item_item import user_items
    from reco.data.histories import epoch_ms
    from reco.ranking.training import cutoffs_of
    shop, a, took = kept.get("shop"), settings.als, 0.0
    cutoffs = cutoffs_of(shop, settings)
    for at in (shop.end, cutoffs.holdout, cutoffs.validation, *cutoffs.train):
        weights = user_items(shop.log.before(epoch_ms(at)), epoch_ms(at), 30)
        touched = weights[:, np.flatnonzero(weights.getnnz(axis=0))]
        began = time.perf_counter()
        item_vectors(touched, a.factors, a.iterations, a.regularization, a.alpha, settings.project.seed)
        took += time.perf_counter() - began
    return took


def bare_trees(kept: Scratch, settings: Settings) -> float:
    """One LambdaMART per surface with lists enough to learn from; seconds of sorting into bins and of the trees."""
    from reco.ranking.choosing import binned, boosted
    from reco.ranking.examples import joined
    from reco.ranking.orders import ENOUGH
    took = 0.0
    for surface in SURFACES:
        train, validation = joined([kept.get(f"{surface}-train-{i}") for i in range(settings.train.cutoffs - 1)]), kept.get(f"{surface}-validation")
        if min(len(train.sizes), len(validation.sizes)) < ENOUGH: continue
        began = time.perf_counter()
        data = binned(train)
        boosted(data, binned(validation, data), settings.ranking, settings.project.seed)
        took += time.perf_counter() - began
    return took


BARE = {"ALS": bare_als, "LambdaMART": bare_trees}


def bare(folder: Path, name: str) -> None:
    """One of them, on what a run handed from step to step; prints seconds, CPU seconds and peak as JSON."""
    os.environ["RECO_SETTINGS"] = str(folder / "settings.ini")
    seconds = BARE[name](Scratch(folder / "kept", LakeSection(), "run"), load_settings())
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 1000}))


def alone(folder: Path, name: str, env: dict[str, str]) -> dict[str, float]:
    """The same from outside; ends with its output when it fails."""
    code = f"from benchmarks.p3_training import *; bare(Path({str(folder)!r}), {name!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])

# ---- watching ---------------------------------------------------------------------------------------------------------


def step_of(process: psutil.Process) -> str | None:
    """The step that a process of Metaflow's runs; None for all others, and for those of the step's libraries."""
    try: words = process.cmdline()
    except psutil.Error: return None
    return words[words.index("step") + 1] if "step" in words[:-1] and "--run-id" in words else None


def looked_at(root: psutil.Process, seen: dict[str, dict[int, dict]], whole: list[float]) -> None:
    """Note what every process under a flow holds and has used so far."""
    now, held = time.perf_counter(), defaultdict(float)
    for p in root.children(recursive=True):
        try: step, rss, used = step_of(p), p.memory_info().rss / 1e6, p.cpu_times()
        except psutil.Error: continue
        if step is None: continue
        held[step] += rss
        mine = seen[step].setdefault(p.pid, {"began": now})
        mine |= {"ended": now, "cpu": used.user + used.system}
    for step, mb in held.items(): seen[step].setdefault(0, {"peak": 0.0})["peak"] = max(mb, seen[step].get(0, {"peak": 0.0})["peak"])
    whole.append(sum(held.values()))


def keep(lake: Path, folder: Path) -> None:
    """Second names for what the steps hand on: the run takes the first away when it is over."""
    for path in (lake / FOLDER).glob("*/[!.]*"):
        other = folder / FOLDER / "run" / path.name
        other.parent.mkdir(parents=True, exist_ok=True)
        try: other.hardlink_to(path)
        except (FileExistsError, FileNotFoundError): continue


def watched(command: list[str], env: dict[str, str], folder: Path) -> tuple[float, dict[str, dict[int, dict]], float]:
    """Run a flow; its seconds, what was seen of each step, and the most that all of it held (MB); ends with its output when it fails."""
    began, seen, whole = time.perf_counter(), defaultdict(dict), [0.0]
    with (folder / "flow.log").open("w+") as log:
        flow = subprocess.Popen(command, cwd=HERE.parent, env=env, stdout=log, stderr=subprocess.STDOUT)
        while flow.poll() is None:
            looked_at(psutil.Process(flow.pid), seen, whole)
            keep(folder / "data" / "lake", folder / "kept")
            time.sleep(EVERY_S)
        if flow.returncode: sys.exit((folder / "flow.log").read_text()[-3000:])
    return time.perf_counter() - began, seen, max(whole)


def parts_of(log: str) -> dict[str, float]:
    """Seconds of each part of `rank`, as the step says it; raises `ValueError` when it does not."""
    found = re.findall(r" \[\d+/rank/\d+ \(pid \d+\)\] seconds: (\{.*\})$", log, re.MULTILINE)
    if len(found) != 1: raise ValueError(f"the step rank said {len(found)} times how long its parts took")
    return json.loads(found[0])

# ---- one size ---------------------------------------------------------------------------------------------------------


def measured(events: int, quick: bool) -> list[dict]:
    """Rows of one size: the whole with the floor's share, the steps, the parts of `rank`, and the floor."""
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        (folder / "settings.ini").write_text(QUICK if quick else FULL)
        sim = simulate(events // 20, max(events // 100, 50), events, days=60 if quick else 90, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7)
        lake = Lake(folder / "data" / "lake")
        lake.write("catalog", sim.catalog, key=["item_id", "valid_from"])
        lake.write("interactions", sim.interactions, key=["event_id"], day_of="ts")
        true = sim.interactions.height
        del sim
        env = os.environ | {"RECO_SETTINGS": str(folder / "settings.ini"), "PYTHONPATH": str(HERE.parent)}
        wall, seen, peak = watched([sys.executable, "flows/train.py", "run"], env, folder)
        parts = parts_of((folder / "flow.log").read_text())
        floor = {name: alone(folder, name, env) for name in BARE}
    case = f"{events:,} events"
    rows = [row("whole run", case, wall, sum(p["cpu"] for s in seen.values() for n, p in s.items() if n), peak)]
    for step, found in seen.items():
        own = [p for n, p in found.items() if n]
        rows.append(row(f"step {step}", case, max(p["ended"] for p in own) - min(p["began"] for p in own), sum(p["cpu"] for p in own), found[0]["peak"]))
        if step == "rank": rows += [row(f"rank: {name}", case, seconds) for name, seconds in parts.items()]
    rows += [row(f"bare {name}", case, **found) for name, found in floor.items()]
    judged = next(r["metrics"]["seconds"] for r in rows if r["system"] == "step evaluate")
    rows[0]["metrics"] |= {"events": true, "of_floor": round(wall / (sum(f["seconds"] for f in floor.values()) + judged), 2)}
    return rows


def row(system: str, case: str, seconds: float, cpu: float | None = None, peak: float | None = None) -> dict:
    """A row of the table."""
    more = {"cpu_s": cpu and round(cpu, 1), "peak_mb": peak and round(peak)}
    return {"system": system, "case": case, "metrics": {"seconds": round(max(seconds, 0), 1)} | {k: v for k, v in more.items() if v is not None}}


def exponents(rows: list[dict]) -> list[dict]:
    """How time and memory of the whole run grow from one size to the next, and over all: slopes of logarithms over logarithms."""
    whole = [r["metrics"] for r in rows if r["system"] == "whole run"]
    slope = lambda key, some: round(float(np.polyfit(np.log([m["events"] for m in some]), np.log([m[key] for m in some]), 1)[0]), 2)
    spans = [*zip(whole, whole[1:], strict=False)] + ([whole] if len(whole) > 2 else [])
    return [{"system": "growth exponent", "case": f"{some[0]['events']:,} to {some[-1]['events']:,} events",
             "metrics": {k: slope(k, some) for k in ("seconds", "cpu_s", "peak_mb")}} for some in spans]


def main() -> None:
    """Every size in turn, the smallest first; each is written down before the next begins."""
    parser = arguments(__doc__)
    parser.add_argument("--millions", type=float, nargs="+", default=[0.3, 1, 3, 10], help="sizes, in million events")
    args, rows = parser.parse_args(), []
    if not args.quick: measured(6_000, True) # compiles what a first run on a machine compiles, minutes of it
    for millions in [0.006] if args.quick else sorted(args.millions):
        rows += measured(round(millions * 1e6), args.quick)
        write("p3_training", rows + exponents(rows), args.results)
    if not args.quick: render()


if __name__ == "__main__": main()
