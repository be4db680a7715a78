"""What is made once for the same inputs, and the record of what it was made of: the demo's steps."""
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def listing(
    *paths: Path, # files and folders
) -> str:         # a digest of names, sizes and times of all files in them
    "Changes when a file comes, goes or is written again."
    files = sorted(f for p in paths for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
    return digest((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)

def digest(
    values: Iterable[object], # anything with a repr that tells it
) -> str:                     # 16 hex digits
    return hashlib.sha256("\n".join(map(repr, values)).encode()).hexdigest()[:16]

def code(
    *paths: Path, # files and folders
) -> str:         # a digest of the Python code in them
    files = sorted(f for p in paths for f in ([p] if p.is_file() else p.rglob("*.py")))
    return digest((f.relative_to(ROOT), f.read_bytes()) for f in files)

@dataclass(frozen=True)
class Step:
    "Something that is made once for the same inputs."
    name: str
    command: list[str]                # makes it
    inputs: Callable[[], dict]        # what decides the result, by the name that a reader knows it under
    there: Callable[[], bool]         # whether the result exists
    declined: Callable[[float], str] = lambda _: "" # why it ended since then (s) without a new result, where that is no defect

def stale(
    step: Step,
    before: dict|None, # the inputs of the last time it came to its end
) -> str:              # why it must run; empty when it need not
    "Compare with the last time."
    if before is None: return "first time"
    if not step.there(): return "its result is gone"
    changed = [k for k,v in step.inputs().items() if before.get(k) != v]
    return f"{', '.join(changed)} changed" if changed else ""

class Record:
    "Which inputs each step was last run on, in .demo/state.json."
    def __init__(self, path: Path):
        self.path = path
        try: self.steps = dict(json.loads(path.read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError): self.steps = {} # unreadable is as good as none: steps run again

    def keep(self, name: str, inputs: dict|None) -> None: # none: it is about to run, and until it ends it does not count
        if inputs is None: self.steps.pop(name, None)
        else: self.steps[name] = inputs
        part = self.path.with_suffix(".tmp")
        part.write_text(json.dumps(self.steps, indent=1), "utf-8")
        part.replace(self.path)
