"""Which bundle a replica answers with: the published one, as soon as it is published, unless it is refused."""
import errno
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reco.bundle import BundleError, ModelBundle, load_bundle, verify
from reco.bundle_copies import bundle_at
from reco.bundle_store import BundlesOnS3, NotNow, Root, files_of, kept_history, lines_of, newer_ledger
from reco.explain import explain
from reco.features.store import OnlineStore
from reco.pipeline import answer
from reco.published import Publication, champion_name, earlier_of, publications, publish, rollback, standing
from reco.redis_server import StoreError
from reco.request import RecommendationRequest
from reco.schemas import SURFACES

log = logging.getLogger("reco.serve")

# ---- a bundle on trial ----------------------------------------------------------------------------------------------

def prepared(
    folder: Path,                            # of a bundle
    try_out: Callable[[ModelBundle], None],  # whatever it raises speaks against the bundle
) -> ModelBundle:
    "A bundle that has been read, checked and tried; raises `BundleError` with what is wrong, whatever that is."
    try:
        bundle = load_bundle(folder)
        try_out(bundle)
    except BundleError: raise
    except Exception as e: raise BundleError(f"{folder}: {type(e).__name__}: {e}") from e # what was made elsewhere may fail in any way
    return bundle

def try_out(
    bundle: ModelBundle,
    store: OnlineStore|None = None, # for the past of somebody who has one
) -> None:
    "Answer one request of each kind, and explain it."
    for request in trials(bundle, someone(store) if store else None): explain(answer(request, bundle, store))

def trials(
    bundle: ModelBundle,
    user_id: str|None, # a shopper with a past; None when nobody has one
) -> list[RecommendationRequest]:
    "One request of each kind: what compiles, loads or fails does so before the first shopper."
    page = bundle.ids.external(bundle.moment.known.nonzero()[0][:1]) or ["nothing is known yet"]
    return [RecommendationRequest(None, 1), RecommendationRequest(user_id, 1),
            *(RecommendationRequest(user_id, 1, surface=s, context_items=page) for s in SURFACES if s != "for_you")]

def someone(
    store: OnlineStore,
) -> str|None: # a shopper with a past; None when nobody has one or the store is down
    "Whom to ask for on trial."
    try: return store.breaker.ask(store.someone)
    except StoreError: return None

def to_serve(
    root: Root,
) -> list[str]: # names, the published one first
    "What may be served, in the order of preference; raises `BundleError` when nothing was ever published."
    try: lines, now = standing(root)
    except NotNow as e: # a replica that starts must not hang on S3: what was published when it last answered, from the copies
        if not isinstance(root, BundlesOnS3) or not (lines := publications(lines_of(kept_history(root)))): raise
        log.error("%s; beginning with what was published when it last answered", e)
        now = lines[-1].bundle_id
    if not now: raise BundleError(f"nothing is published in {root}: run `python flows/train.py run`, then `python flows/promote.py run`")
    return [now, *earlier_of(lines, now)]

def whole(
    root: Root,
    say: Callable[[str], object] = print, # that one is refused, and why
) -> Path: # on this machine
    "The first of `to_serve` whose files are as they were saved; raises `BundleError` with what is wrong with the published one."
    found: list[BundleError] = []
    for name in to_serve(root):
        try:
            verify(folder := bundle_at(root, name))
            for e in found: say(f"refused: {e}")
            return folder
        except BundleError as e: found.append(e)
    raise found[0]

# ---- following ------------------------------------------------------------------------------------------------------

EVERY_S = 1.0     # between two looks, each of which asks the disk for one date, or S3 whether the history is still the one that was read
TURN_S = 0.0005   # a thread that loads gives way to a request after so long: with Python's own 5 ms, reading a bundle of 100,000 items let
                  # others wait for more than 8 ms seven times, with this twice

@contextmanager
def giving_way() -> Iterator[None]:
    "Requests interrupt what is done here soon."
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try: yield
    finally: sys.setswitchinterval(before)

@contextmanager
def passing() -> Iterator[None]:
    "What may pass is no fault of the bundle: it becomes an `OSError`, which asks to try again."
    try: yield
    except NotNow as e: raise OSError(errno.EAGAIN, str(e)) from e

@dataclass(frozen=True)
class Refusal:
    "A bundle that was published and is not served."
    bundle_id: str
    reason: str

class Following:
    "Keeps one replica on what is published. What is refused is not tried again before something is published again; what cannot be had now is."
    def __init__(self,
        root: Root,
        prepare: Callable[[Path], ModelBundle],  # raises `BundleError`
        take: Callable[[ModelBundle], object],   # into service
        refuse: Callable[[], object],            # counts
    ):
        self.root, self.prepare, self.take, self.refuse = root, prepare, take, refuse
        self.name = ""                           # of the bundle in service
        self.seen: tuple[int, int]|str|None = None # of `current`, or the history's tag, when it was last acted upon
        self.refusal: Refusal|None = None        # of what is published, where that is not in service
        self.blind: Refusal|None = None          # while it cannot be seen or had what is published
        self.turn, self.ended = threading.Lock(), threading.Event()

    def begin(self) -> None:
        "Serve what is published, or the last before it that is not refused, and follow from there; raises `BundleError` when there is none."
        with self.turn:
            try: self.seen = self._mark()
            except NotNow: self.seen = None      # the first look that succeeds acts
            refused = []
            for name in to_serve(self.root):
                try: no = self._serve(name)
                except NotNow as e: no, self.seen = Refusal(name, str(e)), None
                if not no: break
                refused.append(no)
            else: raise BundleError(f"{self.root/refused[0].bundle_id}: {refused[0].reason}")
            self.refusal = refused[0] if refused else None
        threading.Thread(target=self._follow, name="following", daemon=True).start()

    def end(self) -> None: self.ended.set()

    def look(self) -> None:
        "Act on what was published since the last look."
        with self.turn:
            if (mark := self._mark()) != self.seen: self.refusal, self.seen = self._serve(champion_name(self.root)), mark
            self.blind = None

    def publish(self,
        name: str, # of a bundle
        who: str,
        why: str,
    ) -> Publication:
        "Try a bundle, publish it, and be the first to serve it; raises `UnknownBundle`, or `BundleError` with what is wrong."
        with self.turn:
            with passing():
                bundle = self._gently(bundle_at(self.root, name))
                done = publish(self.root/name, who, why)
            self._take(name, bundle)
        return done

    def rollback(self,
        who: str,
        why: str,
    ) -> Publication:
        "Publish what was published before and passes the trial, and be the first to serve it; raises `NothingBefore`."
        tried: dict[str, ModelBundle] = {}
        with self.turn:
            with passing(): done = rollback(self.root, who, why, lambda folder: tried.update({folder.name: self._gently(folder)}))
            self._take(done.bundle_id, tried[done.bundle_id])
        return done

    def _follow(self) -> None:
        complaint = ""
        while not self.ended.wait(EVERY_S):
            try: self.look()
            except Exception as e: # a disk that is away for a while must not end it
                if str(e) != complaint: log.exception("following %s failed; tried again every %g s", self.root, EVERY_S)
                if self.blind is None: self.refuse()
                complaint, self.blind = str(e), Refusal("", f"what is published cannot be seen or had now: {e}" if isinstance(e, NotNow) else "what is published cannot be read now")
            else: complaint = ""

    def _mark(self) -> tuple[int, int]|str|None: # another one after each publication, be it of the same bundle; raises `NotNow`
        if isinstance(self.root, BundlesOnS3):
            known = self.seen if isinstance(self.seen, str) else ""
            now = newer_ledger(self.root, known)
            return known if now is None else now.tag
        try: there = (self.root/"current").stat()
        except OSError: return None
        return there.st_ino, there.st_mtime_ns

    def _gently(self, folder: Path) -> ModelBundle: # raises `BundleError` without the machine's paths
        try:
            with giving_way(): return self.prepare(folder)
        except BundleError as e: raise BundleError(str(e).replace(f"{files_of(self.root)}/", "").replace(f"{self.root}/", "")) from e

    def _serve(self, name: str) -> Refusal|None: # None when it is in service now
        if name == self.name: return None
        try: bundle = self._gently(bundle_at(self.root, name))
        except NotNow: raise
        except BundleError as e:
            refused = Refusal(name, str(e).replace(f"{self.root}/", "").removeprefix(f"{name}: "))
            log.error("bundle %s is refused; %s: %s", name or "(none)", f"{self.name} goes on" if self.name else "an earlier one is looked for", refused.reason)
            self.refuse()
            return refused
        self._take(name, bundle)
        return None

    def _take(self, name: str, bundle: ModelBundle) -> None: # one assignment: a request keeps the bundle that it began with
        self.take(bundle)
        self.name, self.refusal = name, None
        log.info("serving bundle %s", name)
