"""Which variant of which experiment answers a request. What variants need is got ready beside the requests, and a bad file changes nothing."""
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.following import giving_way
from reco.bundle import BundleError, ModelBundle, UnknownBundle
from reco.bundle_copies import bundle_at
from reco.bundle_store import NotNow, Root
from reco.challenger import challenger_name
from reco.experiments.assignment import (
    NON_PERSONALISED,
    Arm,
    Assigner,
    ExperimentError,
    Experiments,
    arms_of,
    changes_of,
    label,
    other_side,
    read_experiments,
    served_by,
)
from reco.experiments.interleaving import FIRST, NOBODY, SECOND, interleaved
from reco.request import RecommendationRequest, RecommendationResponse
from reco.settings import Settings
from reco.variants import Changes, varied

log = logging.getLogger("reco.serve")
EVERY_S = 5.0  # between two looks at the file and at who is challenger
MADE_AHEAD = 64  # combinations of variants that are made before somebody asks for them


class Placed(NamedTuple):
    "How a request is answered."
    asked: RecommendationRequest
    bundle: ModelBundle
    label: str | None  # for the serve log; None outside of experiments
    other: "Placed | None" = None # how the second list is made, where two are drafted into one
    teams: tuple[str, str] = ("", "") # names of the two variants then


class Means(NamedTuple):
    "What the arms of a shopper come to."
    serve: str  # champion, challenger, non_personalised or a bundle's id
    changes: Changes
    other: "Means | None" = None # of the second list, where two are drafted into one
    teams: tuple[str, str] = ("", "")


def means_of(
    arms: tuple[Arm, ...],
) -> Means:
    "What to serve."
    if not (second := other_side(arms)): return Means(served_by(arms), changes_of(arms))
    [teams] = ((a.variant.name, a.against.name) for a in arms if a.against)
    return Means(served_by(arms), changes_of(arms), means_of(second), teams)


def experiments_of(
    settings: Settings,  # [experiments] file
) -> Experiments:
    "The experiments of the settings; raises `ExperimentError`."
    return read_experiments(settings.path(settings.experiments.file) if settings.experiments.file else None)


def combinations_of(
    book: Experiments,
) -> list[tuple[Arm, ...]]:
    "Arms that a shopper can have together, the first `MADE_AHEAD` of them."
    of_each = [[None, *arms_of(e)] for e in book.experiment]
    return [tuple(a for a in arms if a) for arms in itertools.islice(itertools.product(*of_each), MADE_AHEAD)]


class Experimenting:
    "Keeps one replica's experiments as the file has them."
    def __init__(self,
        settings: Settings,
        champion: Callable[[], ModelBundle | None],
        prepare: Callable[[Path], ModelBundle],   # raises `BundleError`
        missing: Callable[[], object] = lambda: None, # told of each answer for which a variant's bundle was not there
    ):
        self.settings, self.champion, self.prepare, self.missing = settings, champion, prepare, missing
        self.root: Root | None = None             # where bundles are; None when one is served whatever there is
        self.plan: tuple[Assigner, dict[str, Means]] | None = None # who is where, and what each label means; None: nothing is tried
        self.book = Experiments()
        self.refused: dict[str, tuple[str, BundleError]] = {} # what a variant serves → id that is not tried again, and why
        self.others: dict[str, tuple[str, ModelBundle]] = {} # what a variant serves → id and bundle
        self.seen: tuple[int, int] | None = None  # of the file that was read last
        self.trouble, self.ended = "", threading.Event()

    def begin(self, root: Root | None) -> None:
        "Read the file, raise `ExperimentError` if it is bad, and follow it from here."
        self.root = root
        if not self.settings.experiments.file: return
        self._read(self._mark())
        threading.Thread(target=self._follow, name="experiments", daemon=True).start()

    def end(self) -> None: self.ended.set()

    def place(self,
        asked: RecommendationRequest,
        bundle: ModelBundle,  # the champion
    ) -> Placed:
        "Who answers, and with which settings."
        if self.plan is None: return Placed(asked, bundle, None)
        assigner, known = self.plan # one look: the file may be read anew meanwhile
        now = time.time_ns() // 1_000_000 if asked.now is None else round(asked.now.timestamp() * 1000)
        arms = assigner.arms(asked.user_id, now, asked.surface)
        if not arms: return Placed(asked, bundle, None)
        name = label(arms)
        means = known.get(name) or known.setdefault(name, means_of(arms))
        first = self._placed(asked, bundle, means, name)
        return first._replace(other=self._placed(asked, bundle, means.other, name), teams=means.teams) if means.other else first

    def _placed(self, asked: RecommendationRequest, bundle: ModelBundle, means: Means, name: str) -> Placed:
        if means.serve == NON_PERSONALISED: asked = replace(asked, user_id=None)
        return Placed(asked, varied(self._serving(means.serve, bundle), means.changes), name)

    def look(self) -> None:
        "Read the file if it is another, load what variants serve, and make what can be asked for; raises whatever goes wrong."
        if (mark := self._mark()) != self.seen: self._read(mark)
        wanted = {self.book.holdout_serve, *(v.serve for e in self.book.experiment for v in e.variant)} - {"champion", NON_PERSONALISED}
        for serve in set(self.others) - wanted: self._let_go(serve)
        lacking = [e for serve in sorted(wanted) if (e := self._have(serve))]
        if bundle := self.champion():
            for side in (side for arms in combinations_of(self.book) for side in (arms, other_side(arms)) if side):
                with giving_way(): varied(self._serving(served_by(side), bundle, quiet=True), changes_of(side))
        if lacking: raise lacking[0]

    def _serving(self, serve: str, bundle: ModelBundle, quiet: bool = False) -> ModelBundle: # the champion where the other is not there
        if serve in ("champion", NON_PERSONALISED): return bundle
        found = self.others.get(serve)
        if found is None:
            if not quiet: self.missing()
            return bundle
        return bundle if found[0] == bundle.id else found[1]

    def _mark(self) -> tuple[int, int]:
        try: there = self.settings.path(self.settings.experiments.file).stat()
        except OSError as e: raise ExperimentError(f"{self.settings.experiments.file}: {e.strerror}") from None
        return there.st_ino, there.st_mtime_ns

    def _read(self, mark: tuple[int, int]) -> None:
        self.seen = mark # a bad file is read again when it changes
        self.book = experiments_of(self.settings)
        self.plan = (Assigner(self.book), {}) if self.book.experiment or self.book.holdout else None

    def _have(self, serve: str) -> Exception | None: # why it is not there, or not the newest
        try: self._load(serve)
        except (BundleError, NotNow, OSError) as e: return e
        return None

    def _load(self, serve: str) -> None:
        if self.root is None: raise BundleError(f"serve = {serve!r}: one bundle is served whatever there is beside it")
        name = challenger_name(self.root) if serve == "challenger" else serve
        if not name: raise BundleError("serve = 'challenger': there is no challenger")
        if (before := self.others.get(serve)) and before[0] == name: return
        if (no := self.refused.get(serve)) and no[0] == name: raise no[1]
        champion = self.champion()
        try:
            with giving_way(): bundle = champion if champion and champion.id == name else self.prepare(bundle_at(self.root, name))
        except NotNow: raise
        except BundleError as e:
            if not isinstance(e, UnknownBundle): self.refused[serve] = name, e # reading it again would change nothing
            raise
        self.others[serve] = name, bundle
        if before: released(before[1], champion)

    def _let_go(self, serve: str) -> None: released(self.others.pop(serve)[1], self.champion())

    def _follow(self) -> None:
        while True:
            try: self.look()
            except (ExperimentError, BundleError, NotNow, OSError) as e: self._complain(str(e))
            except Exception as e: self._complain(f"{type(e).__name__}: {e}") # the thread must live
            else: self.trouble = ""
            if self.ended.wait(EVERY_S): return

    def _complain(self, trouble: str) -> None:
        if trouble != self.trouble: log.error("experiments: %s; what was there before goes on", trouble)
        self.trouble = trouble


def released(
    bundle: ModelBundle,
    unless: ModelBundle | None = None, # that is still served
) -> None:
    "Break the circles of a bundle that goes: it knows its variants and its online state, these know it, and Ray has told Python not to look for circles."
    if bundle is unless: return
    for name in ("_online", "_family"): vars(bundle).pop(name, None)


def together(
    a: RecommendationResponse,  # the first variant's list
    b: RecommendationResponse,  # the second's, of the same length asked for
    teams: tuple[str, str],     # names of the two
    k: int,                     # items wanted
    seed: str,                  # of the draft
) -> RecommendationResponse:    # with a team for each item that is somebody's; with none when either list lacks something
    "Two lists drafted into one, and the work of both; the same for the same lists and seed on every replica."
    whole = not a.without and not b.without # a source that was late is no preference
    number: dict[str, int] = {}
    first, second = (np.array([number.setdefault(x.item_id, len(number)) for x in one.items], np.int32) for one in (a, b))
    by_id = {FIRST: {x.item_id: x for x in a.items}, SECOND: {x.item_id: x for x in b.items}}
    by_id[NOBODY], names = by_id[SECOND] | by_id[FIRST], list(number)
    draft, name = interleaved(first, second, k, seed), {FIRST: teams[0], SECOND: teams[1], NOBODY: None}
    items = [by_id[who][names[i]]._replace(team=name[who] if whole else None) for i, who in zip(draft.items.tolist(), draft.team.tolist(), strict=True)]
    total: Callable[[str], dict[str, Any]] = lambda what: dict(Counter(getattr(a, what)) + Counter(getattr(b, what)))
    return replace(a, items=items, fallback=a.fallback and b.fallback, kept=a.kept and b.kept, without=tuple(dict.fromkeys(a.without + b.without)),
                   dropped=total("dropped"), seconds=total("seconds"), proposed=total("proposed"))


def seed_of(
    asked: RecommendationRequest,
) -> str:
    "What a draft depends on: the request, or the shopper where a request has no name."
    return asked.request_id or f"{asked.user_id} {asked.surface}"
