"""What follows from a publication by hand or over HTTP: a line in events.jsonl, a message, and MLflow's aliases. None of it can undo or hold up what was done."""
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

from reco.alerts import Event, announce, receivers
from reco.bundle_store import BundlesOnS3, Root, bundles_root
from reco.published import Publication
from reco.settings import Settings
from reco.tracker import begun

log = logging.getLogger("reco.serve")
MIRROR_S = 300 # MLflow has so long; the daily upkeep makes good what was missed
MIRROR = "import os; os.nice(10); import sys; sys.argv = ['app.bundle', 'mirror']; from app.bundle import main; sys.exit(main())" # requests come first

def event_of(
    done: Publication,
    program: str, # by which it was done
) -> Event:
    "A publication as people hear of it; publishing the same bundle again is another event."
    what, verb = ("bundle_rolled_back", "is served again") if done.back else ("bundle_published", "is served now")
    text = f"{done.bundle_id} {verb}, {done.before or 'nothing'} was before" + (f": {done.why}" if done.why else "")
    return Event(what, f"{program}, {done.who or 'nobody named'}", text, f"{what}/{done.bundle_id}/{done.at}", {"bundle": done.bundle_id, "champion": done.before})

def tell_people(
    settings: Settings, # [alerts]
    root: Root,         # where the bundles are, and the log beside them
    done: Publication,
    program: str,
) -> dict[str, str]: # receiver → why it has not heard of it
    "Log and send a publication."
    return announce(root.objects if isinstance(root, BundlesOnS3) else root, event_of(done, program), receivers(settings.alerts))

def mirror_apart() -> str: # what went wrong; empty when all went well
    "Let a process of its own move MLflow's aliases: importing MLflow takes seconds in which a replica would answer nobody."
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if p)}
    try: ended = subprocess.run([sys.executable, "-c", MIRROR], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MIRROR_S)
    except (OSError, subprocess.TimeoutExpired) as e: return f"MLflow was not told: {type(e).__name__}"
    return "" if ended.returncode == 0 else (ended.stderr.strip().splitlines() or ["MLflow was not told"])[-1].removeprefix("warning: ")

class Teller:
    "Tells of publications one after the other, behind the answers."
    def __init__(self, settings: Settings, root: Root):
        self.settings, self.root, self.turn = settings, root, threading.Lock()

    def tell(self, done: Publication) -> threading.Thread:
        thread = threading.Thread(target=self._tell, args=(done,), name="telling", daemon=True)
        thread.start()
        return thread

    def _tell(self, done: Publication) -> None:
        with self.turn: # two at once would leave MLflow with whichever was slower
            try:
                for name, said in tell_people(self.settings, self.root, done, "endpoint").items(): log.warning("a publication has not reached %s: %s", name, said)
                s, ours = self.settings, str(self.root) == str(bundles_root(self.settings)) # MLflow mirrors the settings' bundles and no others
                if ours and s.tracking.enabled and begun(s) and (trouble := mirror_apart()): log.warning("%s", trouble)
            except Exception: log.exception("a publication was not told") # it is done all the same
