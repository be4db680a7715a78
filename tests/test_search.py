"""The search: better than a bad start, never the hold-out, and the same after a kill."""

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import optuna
import polars as pl
import pytest
from flow_runs import run_flow
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from mlflow import MlflowClient
from servers import database, postgres

from reco.data.histories import epoch_ms
from reco.data.lake import Lake
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import simulate
from reco.data.split import Cutoffs
from reco.moment import fit_moment
from reco.ranking.examples import Examples
from reco.ranking.search import (
    COUNTS,
    SPACE,
    Knob,
    SpaceError,
    Stage,
    StorageError,
    best_values,
    finished,
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
from reco.ranking.training import cutoffs_of
from reco.ranking.worth import Lists, Moments, RankerWorth, SourceWorth, compared, lists_of
from reco.settings import Quota, Settings, Train, load_settings

END = datetime(2026, 5, 1, tzinfo=UTC)
BASE = Settings(train=Train(cutoffs=3))
STATES = optuna.trial.TrialState


class Small:
    """A shop that is searched in seconds."""

    def __init__(self) -> None:
        self.sim = simulate(users=300, items=100, events=7_000, days=70, end=END, seed=11)
        self.shop: ShopData = index_shop(self.sim.interactions, self.sim.catalog)
        self.cutoffs: Cutoffs = cutoffs_of(self.shop, BASE)
        self.sources = SourceWorth(self.shop, self.cutoffs, 100, 7, trees=10)
        self.ranker = RankerWorth(self.sources.drawn.training(BASE), self.sources.drawn.lists(BASE))

    def before_holdout(self) -> ShopData:
        """The same ids; nothing of the hold-out."""
        log, at = self.shop.log, epoch_ms(self.cutoffs.holdout)
        return replace(self.shop, log=log.where(log.ts < at), catalog=self.shop.catalog.filter(pl.col("valid_from") < self.cutoffs.holdout))


@pytest.fixture(scope="module")
def small() -> Small:
    return Small()


def hill(settings: Settings, tell) -> tuple[float, dict]:
    r = settings.ranking
    value = 1 - (math.log2(r.leaves) - 4) ** 2 / 20 - math.log10(r.learning_rate / 0.05) ** 2
    for step in range(4): tell(step, value)
    return value, {"trees": 7}


def on_the_hill(worth=hill) -> Stage:
    knobs = tuple(k for k in SPACE if k.key in ("ranking.leaves", "ranking.learning_rate"))
    return Stage("ranking", knobs, worth, with_values(BASE, {"ranking.leaves": 63, "ranking.learning_rate": 0.3}))


def study_in(folder: Path, name: str = "t", **options) -> optuna.Study:
    return open_study(f"sqlite:///{folder}/search.db", name, **options)


def tried(study: optuna.Study) -> list[tuple]:
    return [(t.state.name, t.params, t.values) for t in study.trials]


# On a shop --------------------------------------------------------------------------------------------------------


def test_it_finds_better_trees_than_a_bad_start(small, tmp_path):
    bad = with_values(BASE, {"ranking.leaves": 4, "ranking.learning_rate": 0.001, "ranking.trees": 5, "ranking.gain_view": 4, "ranking.min_data_in_leaf": 500})
    stage, study = Stage("ranking", knobs_of("ranking", "ranking"), small.ranker, bad), study_in(tmp_path)
    search(study, stage, 8, seed=1)
    best = with_values(bad, best_values(study, stage.knobs))
    said = compared(small.ranker.by_list(bad)[0], small.ranker.by_list(best)[0])
    assert study.trials[0].params["ranking.learning_rate"] == 0.001
    assert said.after == study.best_value > said.before == study.trials[0].value, said # a hundred lists may be too few for more
    assert replace(said, error=(said.after - said.before)/2.1).ahead and not replace(said, error=(said.after - said.before)/1.9).ahead
    assert study.best_trial.user_attrs["trees"] <= 5


def test_it_finds_better_sources_than_popularity_alone(small, tmp_path):
    bare = with_values(BASE, {f"candidates.{s}": 0 for s in BASE.candidates if s != "popularity"})
    stage, study = Stage("sources", knobs_of("candidates", "sources"), small.sources, bare), study_in(tmp_path)
    search(study, stage, 4, seed=1)
    best = with_values(bare, best_values(study, stage.knobs))
    assert compared(small.sources.by_list(bare), small.sources.by_list(best)).ahead
    assert study.trials[0].value < study.best_value == pytest.approx(small.sources.by_list(best).mean())


def test_the_holdout_is_not_looked_at(small, tmp_path):
    """The log that ends where the hold-out begins gives the same trials, to the last digit."""
    found = []
    for n, shop in enumerate((small.shop, small.before_holdout())):
        worth = SourceWorth(shop, small.cutoffs, 100, 7, trees=10)
        sources = Stage("sources", knobs_of("als popularity covisit", "sources"), worth, BASE)
        study = study_in(tmp_path, f"sources {n}")
        search(study, sources, 2, seed=1)
        settings = with_values(BASE, best_values(study, sources.knobs))
        ranking, second = Stage("ranking", knobs_of("ranking", "ranking"), RankerWorth(worth.drawn.training(settings), worth.drawn.lists(settings)), settings), study_in(tmp_path, f"ranking {n}")
        search(second, ranking, 2, seed=1)
        found.append((tried(study), tried(second)))
    assert found[0] == found[1] and len(small.before_holdout().log) < len(small.shop.log)


def test_what_is_kept_is_what_would_be_fitted(small):
    """Whatever was asked before, the lists are those of `fit_moment`."""
    moments, asof = Moments(small.shop, variants=1), epoch_ms(small.cutoffs.validation)
    for values in ({}, {"als.factors": 16, "covisit.reach": 3}, {"candidates.item_item": 0, "candidates.trending": 20}, {"popularity.half_life_days": 1.0}, {}):
        settings = with_values(BASE, values)
        kept = lists_of(small.shop, moments.at(asof, settings), small.sources.drawn.asked, 200)
        new = lists_of(small.shop, fit_moment(small.shop, asof, settings), small.sources.drawn.asked, 200)
        assert kept.all.features == new.all.features and np.array_equal(kept.all.rows, new.all.rows, equal_nan=True), values
        assert np.array_equal(kept.all.label, new.all.label) and np.array_equal(kept.want, new.want)


def test_only_what_changed_is_fitted_again(small):
    moments, asof = Moments(small.shop), epoch_ms(small.cutoffs.validation)
    moments.at(asof, BASE)
    fits = moments.fits
    for values, more in (({}, 0), ({"candidates.als": 60, "ranking.leaves": 4}, 0), ({"covisit.reach": 3}, 1), ({"covisit.reach": 3, "popularity.half_life_days": 1.0}, 1), ({}, 0)):
        moments.at(asof, with_values(BASE, values))
        fits += more
        assert moments.fits == fits, values


def test_a_pruned_trial_saves_the_earlier_cutoffs(small):
    worth, settings = SourceWorth(small.shop, small.cutoffs, 150, 7, trees=5), with_values(BASE, {"als.factors": 8})

    def too_bad(step: int, value: float) -> None: raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned): worth.by_list(settings, too_bad)
    asked = {asof for asof, _ in worth.drawn.moments.kept}
    assert asked == {epoch_ms(small.cutoffs.validation), epoch_ms(small.cutoffs.train[-1])} and len(small.cutoffs.train) == 2


def test_trees_tell_on_their_way(small):
    """Each report is the NDCG of the trees so far; what is not worth going on ends there."""
    told: dict[int, float] = {}
    settings = with_values(BASE, {"ranking.trees": 45, "ranking.patience": 45})
    each, trees = small.ranker.by_list(settings, told.__setitem__)
    assert list(told) == [20, 40] and 1 <= trees <= 45
    short, kept = small.ranker.by_list(with_values(settings, {"ranking.trees": trees}))
    assert kept == trees and np.allclose(short, each)

    def stop(step: int, value: float) -> None: raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned): small.ranker.by_list(settings, stop)


@effort(max_examples=60, deadline=None)
@given(st.data())
def test_the_measure_is_ndcg_over_all_that_was_wanted(data):
    sizes = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=5))
    n = sum(sizes)
    score = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=n, max_size=n)))
    label = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.int8)
    least, extra = data.draw(st.sampled_from([1, 3])), data.draw(st.lists(st.integers(1, 12), min_size=len(sizes), max_size=len(sizes)))
    starts = np.cumsum([0, *sizes])
    want = np.array([int((label[a:b] >= least).sum()) + e for a, b, e in zip(starts[:-1], starts[1:], extra, strict=True)])
    expected = []
    for a, b, w in zip(starts[:-1], starts[1:], want, strict=True):
        best = sorted(range(a, b), key=lambda i: (-score[i], i))[:10]
        expected.append(sum((label[i] >= least) / math.log2(p + 2) for p, i in enumerate(best)) / sum(1 / math.log2(p + 2) for p in range(min(w, 10))))
    lists = Lists(Examples(np.zeros((n, 1), np.float32), label, np.array(sizes), ("x",)), want, least)
    assert np.allclose(lists.ndcg(score), expected)


# The study ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys, time
from test_search import hill, on_the_hill, study_in
from reco.ranking.search import search
from pathlib import Path
folder = Path(sys.argv[1])
def slow(settings, tell):
    value, notes = hill(settings, tell)
    if (folder/"trials").exists() and len((folder/"trials").read_text()) >= 4:
        (folder/"stuck").touch()
        time.sleep(60)
    with (folder/"trials").open("a") as f: f.write("x")
    return value, notes
search(study_in(folder, grace_s=2), on_the_hill(slow), 10, seed=1)
"""


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}, start_new_session=True) as worker:
        until = time.monotonic() + 60
        while not (tmp_path / "stuck").exists():
            assert worker.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        os.kill(worker.pid, signal.SIGKILL)
    study = study_in(tmp_path, grace_s=2)
    hanging, = [t for t in study.trials if t.state == STATES.RUNNING]
    before = tried(study)[: hanging.number]
    time.sleep(4)  # the clock of the database counts whole seconds
    search(study, on_the_hill(), 10, seed=1)
    states = Counter(t.state for t in study.trials)
    assert study.trials[hanging.number].state == STATES.FAIL and states[STATES.RUNNING] == 0 and len(finished(study)) == 10
    again, = [t for t in study.trials if t.system_attrs.get("failed_trial") == hanging.number]
    assert again.params == hanging.params and again.state in (STATES.COMPLETE, STATES.PRUNED)
    assert tried(study)[: hanging.number] == before and history(study)["again"].drop_nulls().to_list() == [hanging.number]
    search(study, on_the_hill(), 10, seed=1)
    assert len(study.trials) == 11  # there is nothing left to do


def test_an_interrupted_search_tries_the_same(tmp_path):
    parts, whole = study_in(tmp_path, "parts"), study_in(tmp_path, "whole")
    for trials in (1, 4, 10): search(study_in(tmp_path, "parts"), on_the_hill(), trials, seed=3)
    search(whole, on_the_hill(), 10, seed=3)
    assert tried(parts) == tried(whole)
    other = study_in(tmp_path, "other")
    search(other, on_the_hill(), 3, seed=4)
    assert tried(other)[1:] != tried(whole)[1:3] and tried(other)[0] == tried(whole)[0]


def test_what_is_behind_ends_early_and_everyone_is_told(tmp_path):
    study, told, steps = study_in(tmp_path), [], []

    def counted(settings: Settings, tell) -> tuple[float, dict]:
        def count(step: int, value: float) -> None:
            steps.append(step)
            tell(step, value)
        return hill(settings, count)

    search(study, on_the_hill(counted), 20, seed=1, on_trial=told.append)
    pruned = [t for t in study.trials if t.state == STATES.PRUNED]
    assert pruned and len(steps) < 4 * 20 and [t.number for t in told] == list(range(20))
    assert {t.state for t in told} == {STATES.COMPLETE, STATES.PRUNED}
    assert max(t.value for t in study.trials if t.state == STATES.COMPLETE) == study.best_value
    late = study_in(tmp_path, "late", warm_up=9)
    search(late, on_the_hill(), 20, seed=1)
    assert all(t.state == STATES.COMPLETE for t in late.trials)


def share(studies: list[optuna.Study]) -> None:
    """Workers at once, each with a connection of its own."""
    def slowly(settings: Settings, tell) -> tuple[float, dict]:
        time.sleep(0.02)
        return hill(settings, tell)

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(search, s, on_the_hill(slowly), 12, 1, worker=n) for n, s in enumerate(studies)]
        for w in working: w.result()
    assert 12 <= len(finished(studies[0])) <= 13 and len({t.number for t in studies[0].trials}) == len(studies[0].trials)
    drawn = [tuple(t.params.values()) for t in studies[0].trials]
    assert len(set(drawn)) >= len(drawn) - 1  # they do not draw the same


def test_workers_share_one_study(tmp_path): share([study_in(tmp_path) for _ in range(2)])


def test_workers_on_several_machines_share_a_server():
    """`[search] storage`, as pods need it."""
    with postgres() as server, database(server) as url: share([open_study(url, "reco/1/ranking", 0) for _ in range(2)])


def test_it_ends_in_time(tmp_path):
    study, began = study_in(tmp_path), time.monotonic()

    def slowly(settings: Settings, tell) -> tuple[float, dict]:
        time.sleep(0.2)
        return 1.0, {}

    search(study, on_the_hill(slowly), 1_000, seed=1, timeout_s=0.5)
    assert 1 <= len(finished(study)) < 10 and time.monotonic() - began < 20


def test_a_trial_that_fails_stops_the_search(tmp_path):
    def broken(settings: Settings, tell) -> tuple[float, dict]: raise KeyError("no such thing")

    with pytest.raises(KeyError): search(study_in(tmp_path), on_the_hill(broken), 3, seed=1)
    search(study_in(tmp_path), on_the_hill(), 3, seed=1)
    assert len(finished(study_in(tmp_path))) == 3


@pytest.mark.parametrize("url", ["postgresql://ann:secret@127.0.0.1:1/optuna", "nothing://ann:secret@host/x", "ann:secret", "sqlite:////nowhere/secret.db"])
def test_a_storage_that_cannot_be_opened_is_told_without_its_password(url):
    with pytest.raises(StorageError) as said: open_study(url, "t")
    assert "[search] storage cannot be opened" in str(said.value) and "secret" not in str(said.value)


# The space ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("knob", "says"), [
    (Knob("ranking.leafs", "whole", 4, 8), "unknown key in the search space: 'ranking.leafs'; did you mean 'ranking.leaves'"),
    (Knob("rankings.leaves", "whole", 4, 8), "did you mean 'ranking.leaves'"),
    (Knob("candidates.nobody", "one of", among=(0, 1)), "unknown key in the search space: 'candidates.nobody'"),
    (Knob("root", "number", 0, 1), "unknown key"), (Knob("ranking.leaves", "wholes", 4, 8), "kind 'wholes' is not one of"),
    (Knob("ranking.leaves", "whole", 1, 8), "ranking.leaves = 1"), (Knob("ranking.leaves", "whole", 8, 8), "no range from 8 to 8"),
    (Knob("ranking.gain_view", "number by factors", 0, 4), "no range from 0 to 4"), (Knob("candidates.als", "one of", among=(0, 2_000)), "candidates.als = 2000")])
def test_a_space_that_does_not_fit_is_refused_before_anything_is_tried(tmp_path, knob, says):
    study = study_in(tmp_path)
    with pytest.raises(SpaceError) as said: search(study, Stage("s", (knob,), hill, BASE), 3, seed=1)
    assert says in str(said.value) and study.trials == []


def test_a_section_that_is_not_searched_is_named():
    with pytest.raises(SpaceError, match=r"\[search\] space: 'serving' has nothing to search; known: als, buy_again"): knobs_of("als serving", "sources")


def test_a_stage_without_knobs_does_nothing(tmp_path):
    study = study_in(tmp_path)
    search(study, Stage("s", (), hill, BASE), 3, seed=1)
    assert study.trials == [] and best_values(study, ()) == {} and history(study).is_empty() and importance(study).is_empty()
    assert study_figure(history(study), importance(study), "nothing")


def test_the_default_space_is_of_the_default_settings():
    space = Settings().search.space
    assert all(knobs_of(space, stage) for stage in ("sources", "ranking", "reranking")) and len({k.key for k in SPACE}) == len(SPACE)


# What a study hangs on ------------------------------------------------------------------------------------------------

NOTHING_TO_DO = {"root", "lake", "bundles", "runs", "quality", "postgres", "online", "stream", "served", "simulator", "explore", "serving", "batch", "tracking",
                 "gates", "experiments", "schedule", "kubernetes", "alerts", "monitor", "kpis", "reports", "app"}


def edited(settings: Settings, section: str, key: str) -> Settings:
    """The same settings with something else in one place."""
    part = getattr(settings, section)
    now = getattr(part, key)
    other = not now if isinstance(now, bool) else now + 1 if isinstance(now, int | float) else {"auto": 3, "mmr": "dpp"}.get(now, "something else")
    return settings.model_copy(update={section: part.model_copy(update={key: other})})


def test_every_section_counts_for_a_trial_or_does_not():
    """A new section belongs in one of the two sets: `COUNTS`, or the one above."""
    assert set(COUNTS) | NOTHING_TO_DO == set(Settings.model_fields) and not set(COUNTS) & NOTHING_TO_DO


@pytest.mark.filterwarnings("ignore:Pydantic serializer") # what is put in is not of each field's type
@pytest.mark.parametrize("section", sorted(set(Settings.model_fields) - {"root", "candidates"}))
def test_a_study_goes_on_after_edits_that_do_not_count(section):
    of = COUNTS.get(section, set())
    for key in type(getattr(BASE, section)).model_fields:
        counts = (of is True or key in of) and (section, key) != ("train", "workers")
        assert (study_key(edited(BASE, section, key), {}) != study_key(BASE, {})) == counts, key


def test_another_quota_or_source_is_another_study():
    for more in ({"als": Quota(quota=7)}, {"mine": Quota(cls="my.shop:Source", quota=5)}):
        assert study_key(BASE.model_copy(update={"candidates": BASE.candidates | more}), {}) != study_key(BASE, {})


# The proposal -------------------------------------------------------------------------------------------------------


def test_the_proposal_is_a_part_of_settings_ini(tmp_path):
    own = BASE.model_copy(update={"candidates": BASE.candidates | {"mine": Quota(cls="my.shop:Source", quota=5)}})
    values = {"candidates.mine": 30, "ranking.learning_rate": 0.0475, "candidates.als": 0, "als.factors": 64, "rerank.method": "dpp"}
    (tmp_path / "best.ini").write_text(fragment(own, values, ["found somewhere"]))
    read = load_settings(tmp_path / "best.ini", {})
    assert read.candidates == {"mine": Quota(cls="my.shop:Source", quota=30), "als": Quota(quota=0)}
    assert read.ranking.learning_rate == 0.0475 and read.rerank.method == "dpp" and "factors" not in (tmp_path / "best.ini").read_text()
    assert fragment(own, {"als.factors": 64}, ["nothing"]) == "# nothing\n"


def test_importance_knows_what_matters(tmp_path):
    study = study_in(tmp_path, warm_up=9)
    only_leaves = lambda settings, tell: (-abs(settings.ranking.leaves - 20.0), {})
    search(study, on_the_hill(only_leaves), 15, seed=1)
    assert importance(study)["key"][0] == "ranking.leaves" and importance(study)["share"][0] > 0.8
    assert history(study)["best"].is_sorted()


# The flow -------------------------------------------------------------------------------------------------------------

FLOW = """
[train]
horizon_days = 7
holdout_days = 7
cutoffs = 2
[ranking]
trees = 10
leaves = 2
[search]
trials = 2
requests = 60
workers = 2
space = popularity ranking
[candidates]
popularity = 50
recent = 30
covisit = 30
"""


def test_the_flow_proposes(small, tmp_path):
    """As an operator runs it: two workers share a study."""
    (tmp_path / "settings.ini").write_text(FLOW)
    lake = Lake(tmp_path / "data" / "lake")
    lake.write("catalog", small.sim.catalog, key=["item_id", "valid_from"])
    lake.write("interactions", small.sim.interactions, key=["event_id"], day_of="ts")
    done = run_flow(tmp_path, "search")
    assert done.returncode == 0, done.stdout
    proposal = tmp_path / "data" / "search" / "best.ini"
    read = load_settings(proposal, {})
    assert "the hold-out was not looked at" in proposal.read_text() and "NDCG@10" in proposal.read_text() and read.root == proposal.parent
    names = optuna.get_all_study_names(url := f"sqlite:///{tmp_path}/data/search/search.db")
    assert sorted(n.rpartition("/")[2] for n in names) == ["ranking", "reranking", "sources"]
    counts = [len(finished(open_study(url, n))) for n in sorted(names)]
    assert 2 <= counts[0] <= 3 and counts[1] == 0 and 2 <= counts[2] <= 3
    [card] = (tmp_path / ".metaflow").rglob("blank-*.html")
    assert card.stat().st_size > 20_000
    assert "MLflow" not in done.stdout, done.stdout # only warnings name it
    in_mlflow(tmp_path, {n.rpartition("/")[2]: c for n, c in zip(sorted(names), counts, strict=True) if c})


def in_mlflow(folder: Path, trials: dict[str, int]) -> None:
    """A run per stage with what came of it and how, and every trial as a run below it."""
    client = MlflowClient(f"sqlite:///{folder}/data/mlflow/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("reco").experiment_id])
    above = {r.data.tags["reco.run"].rpartition("/")[2]: r for r in runs if "mlflow.parentRunId" not in r.data.tags}
    assert set(above) == set(trials) and len(runs) == len(above) + sum(trials.values())
    for stage, run in above.items():
        below = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == run.info.run_id]
        assert run.info.status == "FINISHED" and sorted(r.data.tags["reco.trial"] for r in below) == [str(n) for n in range(trials[stage])]
        assert all(r.data.params and r.info.status in ("FINISHED", "KILLED") for r in below)
        assert run.data.metrics["best"] == max(r.data.metrics["value"] for r in below if r.info.status == "FINISHED")
        kept = {f.path: f.file_size for f in client.list_artifacts(run.info.run_id)}
        assert {"history.csv", "importance.csv"} <= set(kept) and kept["study.png"] > 5_000


def test_the_flow_refuses_a_space_that_does_not_fit(tmp_path):
    (tmp_path / "settings.ini").write_text("[search]\nspace = rankings\n")
    done = run_flow(tmp_path, "search")
    assert done.returncode != 0 and "[search] space: 'rankings' has nothing to search; known:" in done.stdout and "Traceback" not in done.stdout, done.stdout
