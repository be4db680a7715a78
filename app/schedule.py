"""`python -m app.schedule`: the flows on the cron lines of `[schedule]`, on one machine, until SIGTERM or Ctrl-C. On a cluster Argo does it (deploy/argo).

One flow at a time: they share a machine, and the memory of a training is the largest thing on it. What follows from a flow's end follows here too. A
time that passed while nothing ran is made good once. A flow that fails is said, told ([alerts]), and tried again when its time comes again."""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cronsim import CronSim

from reco.alerts import Event, announce, events, receivers
from reco.bundle_store import BundlesOnS3, bundles_root
from reco.data.objects import ObjectError
from reco.settings import Settings, SettingsError, load_settings

ROOT = Path(__file__).resolve().parents[1]
END_S = 60  # a flow that is told to end has so long
OWN_WORDS = {"promotion_refused", "training_stopped"} # events of flows that end with a no
LOOK_S = 20 # between two looks at the clock: a cron line has minutes


class Ending:
    "Told by a signal handler, which may come at any moment: an `Event` would be waited for with the very lock that the handler then waits for."

    def __init__(self) -> None: self.told = False

    def set(self) -> None: self.told = True

    def is_set(self) -> bool: return self.told

    def wait(self, seconds: float) -> None:
        "Until it is told, or so long."
        until = time.monotonic() + seconds
        while not self.told and (left := until - time.monotonic()) > 0: time.sleep(min(0.2, left))


def followers(
    folder: Path,          # of the flows
) -> dict[str, list[str]]: # flow → flows, by their files
    "What starts when a flow has succeeded: `@trigger_on_finish`, as Argo reads it."
    texts = {path.stem: path.read_text("utf-8") for path in sorted(folder.glob("*.py"))}
    names = {found[1]: stem for stem, text in texts.items() if (found := re.search(r"^class (\w+)\(FlowSpec\)", text, re.MULTILINE))}
    after: dict[str, list[str]] = {}
    for stem, text in texts.items():
        for flow in re.findall(r'^@trigger_on_finish\(flow="(\w+)"\)', text, re.MULTILINE): after.setdefault(names[flow], []).append(stem)
    return after


def next_time(
    line: str,       # cron, of five fields
    after: datetime, # UTC
) -> datetime:
    "The first time of a cron line after a moment."
    return next(CronSim(line, after))


@dataclass
class Plan:
    "What runs when, and when each flow last began; all of it in UTC."
    lines: dict[str, str]          # flow → cron line; those without one only follow
    after: dict[str, list[str]]    # of `followers`
    file: Path                     # where `began` is kept
    began: dict[str, datetime] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list) # to be run, first come first

    def read(self, now: datetime) -> None:
        "Go on from the file; what it does not know is taken to have run now: a first start has just made everything."
        try: kept = {flow: datetime.fromisoformat(at) for flow, at in json.loads(self.file.read_text("utf-8")).items()}
        except FileNotFoundError: kept = {}
        except (ValueError, TypeError, AttributeError) as e:
            print(f"warning: {self.file} is not what this program wrote ({e}); its times are not made good", file=sys.stderr, flush=True)
            kept = {}
        self.began = {flow: min(kept.get(flow, now), now) for flow in self.lines}
        self.write()

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".tmp")
        part.write_text(json.dumps({flow: at.isoformat() for flow, at in sorted(self.began.items())}, indent=1), "utf-8")
        part.replace(self.file)

    def look(self, now: datetime) -> None:
        "Let those wait whose time has come, each once."
        due = [(at, flow) for flow, line in self.lines.items() if (at := next_time(line, self.began[flow])) <= now]
        for _, flow in sorted(due):
            if flow not in self.waiting: self.waiting.append(flow)

    def take(self, now: datetime) -> str | None:
        "The flow whose turn it is."
        if not self.waiting: return None
        flow = self.waiting.pop(0)
        if flow in self.lines:
            self.began[flow] = now
            self.write()
        return flow

    def succeeded(self, flow: str) -> None:
        "What follows comes before what waits: it belongs to what just ended."
        self.waiting[:0] = [f for f in self.after.get(flow, []) if f not in self.waiting]


def plan_of(
    settings: Settings,
    file: Path,
) -> Plan:
    "The plan of the settings."
    lines = {flow: line for flow, line in settings.schedule.model_dump().items() if line}
    return Plan(lines, followers(ROOT / "flows"), file)


def run_flow(
    flow: str,
    hours: float,                  # it is ended after so long
    ending: Ending,
) -> str:                          # what went wrong; empty when all went well
    "`python flows/FLOW.py run`, with its words on ours."
    child = subprocess.Popen([sys.executable, f"flows/{flow}.py", "run"], cwd=ROOT, start_new_session=True)
    until, late = time.monotonic() + hours * 3600, False
    while child.poll() is None and not ending.is_set() and not (late := time.monotonic() > until): ending.wait(0.2)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        try: child.wait(END_S)
        except subprocess.TimeoutExpired: os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if late: return f"it was ended after {hours:g} hours ([kubernetes] timeout_hours)"
    if ending.is_set(): return "" # it goes on at its next time; whoever ended us knows
    return f"exit code {child.returncode}" if child.returncode else ""


def tell(
    settings: Settings,
    flow: str,
    began: datetime,
    said: str,       # what went wrong
) -> None:
    "A line on stderr, in the log beside the bundles, and a message; a flow that has said itself why it stopped is not told twice."
    print(f"schedule: flows/{flow}.py failed: {said}", file=sys.stderr, flush=True)
    event = Event("flow_failed", "app.schedule", f"flows/{flow}.py failed: {said}", f"flow_failed/{flow}/{began.isoformat()}", {"flow": flow})
    try:
        root = bundles_root(settings)
        place = root.objects if isinstance(root, BundlesOnS3) else root
        if any(line["what"] in OWN_WORDS and datetime.fromisoformat(line["at"]) >= began for line in events(place)): return
        trouble = announce(place, event, receivers(settings.alerts))
    except (ObjectError, OSError) as e: trouble = {"events.jsonl": str(e)}
    for name, why in trouble.items(): print(f"warning: it has not reached {name}: {why}", file=sys.stderr, flush=True)


def keep_time(
    settings: Settings,
    plan: Plan,
    ending: Ending,
    run: Callable[[str, float, Ending], str] = run_flow,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> None:
    "Until it is told to end."
    while not ending.is_set():
        plan.look(clock())
        if (flow := plan.take(now := clock())) is None:
            ending.wait(LOOK_S)
            continue
        print(f"{now:%Y-%m-%d %H:%M} UTC: flows/{flow}.py", flush=True)
        if said := run(flow, settings.kubernetes.timeout_hours, ending): tell(settings, flow, now, said)
        elif not ending.is_set(): plan.succeeded(flow)


def state_file(
    settings: Settings,
) -> Path:
    "Beside what Metaflow keeps of runs."
    return Path(os.environ.get("METAFLOW_DATASTORE_SYSROOT_LOCAL") or settings.root) / ".metaflow" / "schedule.json"


def main() -> int: # exit code
    cli = argparse.ArgumentParser(prog="python -m app.schedule", description="The flows on the cron lines of [schedule], on one machine.")
    cli.add_argument("--next", action="store_true", help="say when each would run next, and end")
    args, ending = cli.parse_args(), Ending()
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda *_: ending.set())
    try:
        settings = load_settings()
        plan, now = plan_of(settings, state_file(settings)), datetime.now(UTC)
        if not args.next: plan.read(now)
        times = sorted((next_time(line, plan.began.get(flow, now)), flow) for flow, line in plan.lines.items())
        for at, flow in times: print(f"{at:%Y-%m-%d %H:%M} UTC: flows/{flow}.py" + "".join(f", then {f}" for f in plan.after.get(flow, [])), flush=True)
        if not args.next: keep_time(settings, plan, ending)
    except (SettingsError, OSError) as e:
        print(f"schedule: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
