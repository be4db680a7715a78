"""Better settings, found on the validation cutoff. `python flows/search.py run`; `[search]` in settings.ini has the knobs.

Sources first, then the ranker on what they propose, then re-ranking. Every worker of a stage takes trials from one study, so a search that was killed goes on when it is started
again: in the file of `[search] file`, or in `[search] storage`, without which there is no search on a cluster. The hold-out is not looked at, and nothing is changed: the proposal is a file for a person.
"""
import os
import sys
from collections.abc import Callable

from base import HERE, PROJECT, SETTINGS, TABLES, card_table, read_shop, rule_book, run_record

# Workers share the cores; trees that wait for each other's threads cost more than they gain. Read when LightGBM is imported, hence here.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1)//SETTINGS.search.workers)))

from cluster import on_cluster  # noqa: E402
from metaflow import FlowSpec, card, current, project, schedule, step  # noqa: E402
from metaflow.cards import Image, Markdown  # noqa: E402
from optuna import Study  # noqa: E402
from optuna.trial import FrozenTrial  # noqa: E402

import reco  # noqa: F401, E402  (Metaflow packs the modules that are imported here)
from reco.challenger import write_whole  # noqa: E402
from reco.data.lake import open_lake  # noqa: E402
from reco.provenance import git_sha  # noqa: E402
from reco.ranking.search import (  # noqa: E402
    STAGES,
    SpaceError,
    StorageError,
    as_start,
    best_values,
    fragment,
    history,
    importance,
    knobs_of,
    open_study,
    search,
    study_figure,
    study_key,
    with_values,
)
from reco.tracked_search import log_search, log_trial  # noqa: E402
from reco.tracker import TrackingError, connect  # noqa: E402

OUT = SETTINGS.path(SETTINGS.search.out)


def check_space() -> None:
    """End the run with what is wrong in the space, before anything is tried."""
    try:
        for stage in STAGES:
            for knob in knobs_of(SETTINGS.search.space, stage): as_start(knob, SETTINGS)
    except SpaceError as e: sys.exit(f"search: {e}")


def check_storage() -> None:
    """End the run where its workers would each have a study of their own."""
    if not os.environ.get("METAFLOW_KUBERNETES_WORKLOAD") or SETTINGS.search.storage.get_secret_value(): return
    sys.exit("search: [search] storage is empty, and pods share no SQLite file: put RECO_SEARCH_STORAGE = postgresql://user:password@host/optuna "
             f"into a Secret that [kubernetes] secrets names (now: {SETTINGS.kubernetes.secrets or 'none'})")


def storage() -> str:
    """Address of the studies; the folder of an SQLite file is made."""
    if url := SETTINGS.search.storage.get_secret_value(): return url
    path = SETTINGS.path(SETTINGS.search.file).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


def told(key: str, stage: str) -> Callable[[FrozenTrial], None] | None:
    """What writes a trial down in MLflow; the search goes on where MLflow does not answer."""
    if not SETTINGS.tracking.enabled: return None
    try:
        tracker = connect(SETTINGS)
        under = log_search(tracker, f"search/{key}/{stage}", {"space": SETTINGS.search.space, "stage": stage})
    except TrackingError as e: return print(f"warning: trials are not in MLflow: {e}")

    def write(trial: FrozenTrial) -> None:
        last = {"last": trial.intermediate_values[max(trial.intermediate_values)]} if trial.intermediate_values else {}
        notes: dict[str, float | None] = {k: v for k, v in trial.user_attrs.items() if isinstance(v, int | float)}
        try: log_trial(tracker, under, trial.number, trial.state.name, trial.params, notes | last | {"value": trial.value})
        except TrackingError as e: print(f"warning: trial {trial.number} is not in MLflow: {e}")
    return write


@on_cluster
@project(name=PROJECT)
@schedule(cron=SETTINGS.schedule.search, daily=False, timezone="UTC")
class SearchFlow(FlowSpec):
    """Try settings on the validation cutoff, stage by stage, and propose the best."""

    @step
    def start(self):
        """Fix what the search depends on, and refuse a space that does not fit before anything is tried."""
        from reco.ranking.training import cutoffs_of
        self.settings, self.git_sha = SETTINGS.without_secrets(), git_sha(HERE)
        check_storage()
        check_space()
        book = rule_book()
        lake = open_lake(SETTINGS)
        self.snapshots = {t: lake.snapshot(t) for t in TABLES}
        self.cutoffs = cutoffs_of(read_shop(self.snapshots), self.settings)
        self.key = study_key(self.settings, {"snapshots": self.snapshots, "cutoffs": vars(self.cutoffs), "rules": book.model_dump(mode="json")})
        try: [self.study(stage) for stage in STAGES]  # made here, before several want to
        except StorageError as e: sys.exit(f"search: {e}")
        for stage in STAGES:
            if knobs_of(SETTINGS.search.space, stage): told(self.key, stage)  # and MLflow's tables too
        self.values, self.workers = {}, list(range(SETTINGS.search.workers))
        print(f"search {self.key}: validation {self.cutoffs.validation:%Y-%m-%d} to {self.cutoffs.label_end(self.cutoffs.validation):%Y-%m-%d}, "
              f"{SETTINGS.search.trials} trials a stage, {len(self.workers)} workers")
        self.next(self.sources, foreach="workers")

    def study(self, stage: str, warm_up: int = 0) -> Study:
        return open_study(storage(), f"{PROJECT}/{self.key}/{stage}", warm_up)

    def work(self, name: str, worker: int) -> None:
        """Take trials of a stage until there are enough."""
        from reco.evaluation.rerank_worth import make_stage
        if not knobs_of(SETTINGS.search.space, name): return
        s, stage = SETTINGS.search, make_stage(name, read_shop(self.snapshots), self.cutoffs, with_values(self.settings, self.values), rule_book())
        search(self.study(name, stage.warm_up), stage, s.trials, SETTINGS.project.seed, s.timeout_s, worker, told(self.key, name))

    def take(self, name: str) -> None:
        """What the workers of a stage found together."""
        if not (knobs := knobs_of(SETTINGS.search.space, name)): return
        study = self.study(name)
        self.values = self.values | best_values(study, knobs)
        print(f"{name}: {history(study).height} trials, best {study.best_value:.4f}")

    @step
    def sources(self):
        """Candidate sources: how many each may propose, and how each learns."""
        self.work("sources", self.input)
        self.next(self.join_sources)

    @step
    def join_sources(self, inputs):
        """The workers are done."""
        self.settings = inputs[0].settings  # the same in all, but not to Metaflow
        self.merge_artifacts(inputs)
        self.next(self.best_sources)

    @step
    def best_sources(self):
        """The ranker learns from what the best sources propose."""
        self.take("sources")
        self.next(self.ranking, foreach="workers")

    @step
    def ranking(self):
        """The ranker, on lists that stay the same."""
        self.work("ranking", self.input)
        self.next(self.join_ranking)

    @step
    def join_ranking(self, inputs):
        """The workers are done."""
        self.settings = inputs[0].settings  # the same in all, but not to Metaflow
        self.merge_artifacts(inputs)
        self.take("ranking")
        self.next(self.reranking)

    @step
    def reranking(self):
        """Variety and fairness on the lists of the best ranker, for the agreed price: a trial takes a second, so one worker does."""
        self.work("reranking", 0)
        self.take("reranking")
        self.next(self.end)

    @card(type="blank")
    @step
    def end(self):
        """Hold the proposal beside the settings on the same lists, write it down, and show how it was found."""
        from reco.ranking.worth import SourceWorth, compared
        self.record = run_record(self.settings, self.git_sha, {"lake": self.settings.lake.root}, self.snapshots)
        worth = SourceWorth(read_shop(self.snapshots), self.cutoffs, SETTINGS.search.requests, SETTINGS.project.seed, trees=10_000)
        self.comparison = compared(worth.by_list(self.settings), worth.by_list(with_values(self.settings, self.values)))
        about = [f"Found by flows/search.py (search {self.key}) on the validation cutoff {self.cutoffs.validation:%Y-%m-%d}; the hold-out was not looked at.",
                 f"Without re-ranking: {self.comparison}."]
        self.proposal = fragment(self.settings, self.values, about)
        write_whole(OUT, self.proposal)
        current.card.append(Markdown(f"# Search {self.key}\n{about[1]}\n\n```\n{self.proposal}```"))
        for name in STAGES:
            frame, shares = history(self.study(name)), importance(self.study(name), SETTINGS.project.seed)
            if frame.is_empty(): continue
            figure = study_figure(frame, shares, name)
            for part in (Markdown(f"## {name}"), Image.from_matplotlib(figure), card_table(shares), card_table(frame)): current.card.append(part)
            self.kept_in_mlflow(name, {"history": frame, "importance": shares}, figure)
        print(f"{self.comparison}\nkept in {OUT}:\n{self.proposal}")

    def kept_in_mlflow(self, name: str, tables: dict, figure) -> None:
        if not SETTINGS.tracking.enabled: return
        try: log_search(connect(SETTINGS), f"search/{self.key}/{name}", {"git_sha": self.git_sha}, {"best": self.study(name).best_value}, tables, {"study": figure}, over=True)
        except TrackingError as e: print(f"warning: the search is not in MLflow: {e}")


if __name__ == "__main__": SearchFlow()
