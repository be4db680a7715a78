"""A real MLflow, by file and by server: a training is one run and one version however often it is told, and the aliases say what is served."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from flow_runs import run_flow
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from mlflow import MlflowClient
from pydantic import SecretStr

from app.ports import free_port
from app.telling import Teller
from reco.aliases import mirror, told
from reco.bundle import BundleError, checksums, make_bundle, save_bundle, verify
from reco.challenger import set_challenger
from reco.data.histories import epoch_ms
from reco.evaluation.backtest import backtest
from reco.model_card import data_facts, model_card
from reco.plots import ndcg_figure
from reco.published import publish, rollback
from reco.settings import Lake, Project, Settings, Tracking
from reco.tracked_search import log_search, log_trial
from reco.tracker import TrackingError, artifact_root, bundle_uri, connect, environment, tracking_uri, without_password
from reco.tracking import (
    copies_whole,
    cut,
    flat,
    found_run,
    log_training,
    metrics_of,
    plain,
    run_key,
    tags_of,
    version_of,
)

METRICS = [{"slice": s, "system": x, "requests": 90, "NDCG@10": .3, "low": .2, "high": .4, "first_ahead": None if x == "pipeline" else .9, "Gini@10": .8}
           for s in ("all", "home", "visit") for x in ("pipeline", "popularity", "als", "recent")]


def made_bundle(root: Path, name: str, run: str = "1", **more: object) -> Path:
    """A folder like a bundle's, as far as MLflow is concerned."""
    folder = root / name
    (folder / "rankers" / "for_you").mkdir(parents=True)
    (folder / "rankers" / "for_you" / "ranker.txt").write_text("tree")
    (folder / "serving.json").write_text("{}")
    (folder / "known.npy").write_bytes(bytes(1_000))
    manifest = {"id": name, "project": "reco", "flow": "TrainFlow", "run_id": run, "git_sha": "4c1e5", "seed": 7, "asof": "2026-05-01T00:00:00Z",
                "snapshots": {"interactions": 3, "catalog": 2}, "cutoffs": {"validation": "2026-04-01"}, "surfaces": {"similar": {"ranked": True}},
                "settings": Settings().without_secrets().model_dump(mode="json", exclude={"root"}), "metrics": METRICS} | more
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """A database of MLflow's without an experiment of ours: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("empty")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="module", autouse=True)
def starting(tmp_path_factory, empty_database) -> Iterator[tuple[subprocess.Popen, int, Path]]:
    """An `mlflow server` on loopback that keeps artifacts itself; it takes ten seconds to come up, meanwhile the other tests run."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(empty_database, folder)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/kept"]
    env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True)
    try: yield process, port, folder / "log"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(10)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def settings(tmp_path, empty_database) -> Settings:
    """A shop's folder with an empty MLflow."""
    (tmp_path / "data" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_database, tmp_path / "data" / "mlflow")
    (tmp_path / "data" / "bundles").mkdir()
    return Settings(root=tmp_path)


@pytest.fixture
def bundles(settings) -> Path:
    return settings.path(settings.bundles.root)


def at(settings: Settings, **tracking: object) -> Settings:
    return settings.model_copy(update={"tracking": Tracking(**tracking)})


def aliases(settings: Settings) -> dict[str, str]:
    """Alias → bundle, asked of MLflow itself."""
    client = MlflowClient(tracking_uri(settings), tracking_uri(settings))
    model = client.get_registered_model(settings.project.name)
    return {a: client.get_model_version(model.name, v).tags["bundle_id"] for a, v in model.aliases.items()}


def artifacts(settings: Settings, run: str, folder: str | None = None) -> set[str]:
    """Paths of all files of a run."""
    client, out = MlflowClient(tracking_uri(settings)), set()
    for a in client.list_artifacts(run, folder): out |= artifacts(settings, run, a.path) if a.is_dir else {a.path}
    return out


# One training


def test_a_training_is_kept_whole(settings, bundles):
    drawn = Figure()
    drawn.subplots().plot([1, 2])
    folder = made_bundle(bundles, "monday")
    frontier = pl.DataFrame({"tail": [0., .1], "NDCG@10": [.2, .19]})
    run, version = log_training(settings, folder, "# A card", {"frontier": frontier, "empty": pl.DataFrame()}, {"importance": drawn})
    client = MlflowClient(tracking_uri(settings))
    kept = client.get_run(run)
    assert kept.info.status == "FINISHED" and kept.info.run_name == "monday"
    assert kept.data.metrics == metrics_of(METRICS) and kept.data.metrics["visit/als/NDCG_at_10_low".replace("_low", " low")] == .2
    p, t = kept.data.params, kept.data.tags
    assert (p["ranking.trees"], p["candidates.als.quota"], p["project.seed"], p["quality.bad_share.value"]) == ("300", "30", "7", "0.05")
    assert not [k for k in p if k.endswith(("access_key", "secret_key", "_keys", ".url", ".uri", ".bus"))]
    assert {k: t[k] for k in ("reco.run", "bundle_id", "git_sha", "snapshots.catalog", "cutoffs.validation", "surfaces.similar.ranked")} == {
        "reco.run": "TrainFlow/1", "bundle_id": "monday", "git_sha": "4c1e5", "snapshots.catalog": "2", "cutoffs.validation": "2026-04-01",
        "surfaces.similar.ranked": "true"}
    assert t["mlflow.note.content"] == "# A card"
    assert artifacts(settings, run) == {"model_card.md", "frontier.csv", "importance.png", "bundle/manifest.json", "bundle/serving.json",
                                        "bundle/rankers/for_you/ranker.txt"}
    where = Path(kept.info.artifact_uri.removeprefix("file://"))
    assert where.is_relative_to(settings.root / "data" / "mlflow" / "artifacts") and pl.read_csv(where / "frontier.csv").equals(frontier)
    v = client.get_model_version("reco", version)
    assert v.run_id == run and v.source == folder.as_uri() and v.description == "# A card"
    assert v.tags == {"bundle_id": "monday", "bundle_uri": folder.as_uri(), "git_sha": "4c1e5", "asof": "2026-05-01T00:00:00Z"}


def test_a_step_that_is_tried_again_is_the_same_run(settings, bundles, monkeypatch):
    folder = made_bundle(bundles, "monday")
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "create_model_version", lambda *a, **k: 1/0)
        with pytest.raises(TrackingError, match="ZeroDivisionError"): log_training(settings, folder)
    first = log_training(settings, folder)
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"high": 0.4', '"high": 0.5'))
    assert log_training(settings, folder, "# Now with a card") == log_training(settings, folder) == first
    client = MlflowClient(tracking_uri(settings))
    [experiment] = [e for e in client.search_experiments() if e.name == "reco"]
    [run] = client.search_runs([experiment.experiment_id])
    assert len(client.search_model_versions("name = 'reco'")) == 1 and run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "all/als/requests")) == 1
    assert run.data.metrics["all/als/NDCG_at_10 high"] == .5 and client.get_model_version("reco", first[1]).description == "# Now with a card"
    assert "model_card.md" in artifacts(settings, run.info.run_id)


def test_a_bundle_is_copied_once(settings, bundles):
    """It may be half a gigabyte."""
    run, _ = log_training(settings, made_bundle(bundles, "monday"))
    where = Path(MlflowClient(tracking_uri(settings)).get_run(run).info.artifact_uri.removeprefix("file://"))
    (where / "bundle" / "manifest.json").write_text("as it was")
    log_training(settings, bundles / "monday", "# A card")
    assert (where / "bundle" / "manifest.json").read_text() == "as it was" and (where / "model_card.md").exists()


def test_other_settings_under_the_same_run_are_refused(settings, bundles):
    log_training(settings, made_bundle(bundles, "monday"))
    other = made_bundle(bundles, "tuesday", settings={"project": {"seed": 8}})
    with pytest.raises(TrackingError, match=r"\[tracking\] folder .*project\.seed"): log_training(settings, other)
    assert log_training(settings, made_bundle(bundles, "friday", "2", settings={"project": {"seed": 8}}))[1] == "2"


def test_two_trainings_are_two_runs_and_two_versions(settings, bundles):
    got = [log_training(settings, made_bundle(bundles, f"b{i}", str(i))) for i in range(2)]
    assert [v for _, v in got] == ["1", "2"] and got[0][0] != got[1][0]
    t = connect(settings)
    assert [version_of(t, f"b{i}") for i in range(3)] == ["1", "2", None]


def test_projects_do_not_meet(settings, bundles):
    other = settings.model_copy(update={"project": Project(name="Köln's shop: a/b")})
    log_training(settings, made_bundle(bundles, "monday"))
    run, version = log_training(other, made_bundle(bundles, "tuesday", "it's 1", project="Köln's shop: a/b"))
    assert version == "1" and log_training(other, bundles / "tuesday") == (run, version) and aliases(settings) == {}


def test_trainings_at_the_same_time_do_not_disturb_each_other(settings, bundles):
    t = connect(settings)
    folders = [made_bundle(bundles, f"b{i}", str(i)) for i in range(4)]
    log_training(settings, folders[0], t=t)
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda f: log_training(settings, f, t=t), folders))
    assert sorted(v for _, v in got) == ["1", "2", "3", "4"] and len({r for r, _ in got}) == 4


def test_a_real_bundle_is_kept_with_its_card_and_plots(settings, bundles, trained):
    """What the end of a training does."""
    table = backtest(trained.shop, trained.cutoffs, trained.ranker, trained.settings)
    about = {"project": "reco", "flow": "TrainFlow", "run_id": "3", "git_sha": "4c1e5", "metrics": table.to_dicts(), "data": data_facts(trained.shop)}
    made = make_bundle(trained.shop, epoch_ms(trained.cutoffs.end), trained.rankers, trained.settings, about, choices=trained.choices)
    folder = save_bundle(made, bundles)
    before, manifest = checksums(folder), json.loads((folder / "manifest.json").read_text())
    run, version = log_training(settings, folder, model_card(manifest), {"metrics": table}, {"ndcg": ndcg_figure(table)})
    client = MlflowClient(tracking_uri(settings))
    kept = client.get_run(run).data
    [r] = table.filter(slice="all", system="pipeline").to_dicts()
    assert kept.metrics["all/pipeline/NDCG_at_10"] == r["NDCG@10"] and kept.params["ranking.trees"] == "60" and kept.tags["bundle_id"] == folder.name
    there = artifacts(settings, run)
    assert {"model_card.md", "metrics.csv", "ndcg.png", "bundle/manifest.json", "bundle/rankers/for_you/ranker.txt"} <= there
    assert not [p for p in there if p.endswith((".npy", ".parquet"))] and checksums(folder) == before
    described = client.get_model_version("reco", version).description
    assert described.startswith(f"# reco: bundle {folder.name}") and len(described) <= 5_000
    assert verify(Path(client.get_model_version("reco", version).source.removeprefix("file://")))["id"] == folder.name


def test_two_who_make_the_same_run_at_once_end_in_one(settings):
    """Workers of one search; nothing is there yet."""
    connect(settings)
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda n: log_search(connect(settings), "search/ranking", {"space": "als"}), range(4)))
    t = connect(settings)
    assert len(set(got)) == 1 and [r.info.run_id for r in t.client.search_runs([t.experiment])] == got[:1]
    assert t.client.get_run(got[0]).data.tags["space"] == "als"


class Slow(MlflowClient):
    "Begins a run now and has it written down half a second later."
    def create_run(self, *args, **more):
        began = int(1000*time.time())
        time.sleep(.5)
        return super().create_run(*args, start_time=began, **more)


def test_a_run_that_was_settled_stays_when_an_earlier_one_turns_up(settings):
    """On a busy machine what began first may be seen last."""
    quick, uri = connect(settings), tracking_uri(settings)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(found_run, replace(quick, client=Slow(uri, uri)), {"reco.run": "x"}, "x")
        time.sleep(.1)
        first = found_run(quick, {"reco.run": "x"}, "x")
        assert late.result() == first
    assert [r.info.run_id for r in quick.client.search_runs([quick.experiment])] == [first]


# Aliases


def test_the_aliases_follow_and_roll_back(settings, bundles):
    for i, name in enumerate(("monday", "tuesday", "friday")): made_bundle(bundles, name, str(i))
    log_training(settings, bundles / "monday")
    assert mirror(settings) == {}  # nothing was decided
    publish(bundles / "monday", "ann", "the first")
    assert mirror(settings) == {"champion": "monday"} and mirror(settings) == {}
    set_challenger(bundles / "tuesday")
    assert mirror(settings) == {"challenger": "tuesday"}  # MLflow had not heard of it
    publish(bundles / "tuesday", "promote", "all gates passed")
    assert mirror(settings) == {"champion": "tuesday", "challenger": ""} and aliases(settings) == {"champion": "tuesday"}
    set_challenger(bundles / "friday")
    rollback(bundles, "ann", "prices are off", check=Path)
    assert mirror(settings) == {"champion": "monday", "challenger": "friday"} and mirror(settings) == {}
    assert aliases(settings) == {"champion": "monday", "challenger": "friday"}
    tags = MlflowClient(tracking_uri(settings)).get_model_version_by_alias("reco", "champion").tags
    assert (tags["published.who"], tags["published.why"], tags["published.how"]) == ("ann", "prices are off", "rollback")


def test_an_alias_that_somebody_moved_by_hand_is_set_right(settings, bundles):
    for i, name in enumerate(("monday", "tuesday")): log_training(settings, made_bundle(bundles, name, str(i)))
    publish(bundles / "monday")
    mirror(settings)
    MlflowClient(tracking_uri(settings)).set_registered_model_alias("reco", "champion", "2")
    MlflowClient(tracking_uri(settings)).set_registered_model_alias("reco", "mine", "2")
    assert mirror(settings) == {"champion": "monday"} and aliases(settings) == {"champion": "monday", "mine": "tuesday"}


def test_an_emptied_mlflow_is_filled_again(settings, bundles, empty_database):
    for i, name in enumerate(("monday", "tuesday")): made_bundle(bundles, name, str(i))
    publish(bundles / "monday")
    set_challenger(bundles / "tuesday")
    moved = mirror(settings)
    shutil.copy(empty_database, settings.root / "data" / "mlflow")
    assert mirror(settings) == moved == {"champion": "monday", "challenger": "tuesday"} == aliases(settings)


def test_a_bundle_that_is_gone_is_named(settings, bundles):
    publish(made_bundle(bundles, "monday"))
    shutil.rmtree(bundles / "monday")
    with pytest.raises(BundleError, match="monday"): mirror(settings)


# What goes wrong


@pytest.mark.parametrize(("uri", "says"), [
    ("http://127.0.0.1:{closed}", "[tracking] uri = http://127.0.0.1:"),
    ("http://ann:hunter2@127.0.0.1:{closed}", "[tracking] uri = http://…@127.0.0.1:"),
    ("sqlite:////proc/no/such/place.db", "[tracking] uri = sqlite:////proc/no/such/place.db"),
    ("gopher://x", "[tracking] uri = gopher://x")])
def test_what_cannot_be_reached_is_named_by_its_setting(settings, uri, says):
    began = time.monotonic()
    with pytest.raises(TrackingError) as e: connect(at(settings, uri=uri.format(closed=free_port()), timeout_seconds=2))
    assert str(e.value).startswith(says) and "hunter2" not in str(e.value) and len(str(e.value)) < 600 and time.monotonic() - began < 15


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop, held = threading.Event(), []

        def take():
            server.settimeout(.2)
            while not stop.is_set():
                try: held.append(server.accept()[0])
                except TimeoutError: pass

        thread = threading.Thread(target=take)
        thread.start()
        yield server.getsockname()[1]
        stop.set()
        thread.join()
        for s in held: s.close()


def test_a_server_that_does_not_answer_is_given_up(settings, silent, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    began = time.monotonic()
    with pytest.raises(TrackingError, match="tracking"): connect(at(settings, uri=f"http://127.0.0.1:{silent}"))
    assert time.monotonic() - began < 12


def test_a_file_that_is_no_database_is_named(settings):
    (settings.root / "data" / "mlflow" / "mlflow.db").write_text("not a database at all, " * 100)
    with pytest.raises(TrackingError, match=r"\[tracking\] folder = sqlite.*mlflow\.db"): connect(settings)


def test_a_missing_library_is_named(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackingError, match=r"pip install 'reco\[train\]'"): connect(settings)


def test_a_deleted_experiment_is_named(settings):
    t = connect(settings)
    t.client.delete_experiment(t.experiment)
    with pytest.raises(TrackingError, match=r"'reco' was deleted there.*\[project\] name"): connect(settings)


def test_what_is_told_never_stands_in_the_way(settings, bundles):
    off = at(settings, enabled=False, uri="http://127.0.0.1:1")
    assert told(off, lambda: 1/0) == "" == told(settings, lambda: None)
    for trouble in (TrackingError("down"), BundleError("gone"), OSError("full")):
        def fails(e=trouble): raise e
        assert told(settings, fails) == f"MLflow was not told: {trouble}"
    publish(made_bundle(bundles, "monday"))
    nowhere = at(settings, uri=f"http://127.0.0.1:{free_port()}", timeout_seconds=1)
    assert "[tracking] uri" in told(nowhere, lambda: mirror(nowhere)) and (bundles / "current").read_text().strip() == "monday"
    with pytest.raises(ZeroDivisionError): told(settings, lambda: 1/0)  # a mistake of ours is not MLflow's


def test_a_rollback_makes_no_database(settings, bundles, empty_database, monkeypatch):
    """It would take seconds; the next training makes one, and the aliases are set then."""
    publish(made_bundle(bundles, "monday"))
    (settings.root / "data" / "mlflow" / "mlflow.db").unlink()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "mlflow", None)
        assert mirror(settings) == {} and not list((settings.root / "data" / "mlflow").iterdir())
    shutil.copy(empty_database, settings.root / "data" / "mlflow")  # as if a training had begun one
    log_training(settings, made_bundle(bundles, "tuesday", "2"))
    assert mirror(settings) == {"champion": "monday"} == aliases(settings)


# A search


def test_trials_lie_under_their_search_once(settings):
    t = connect(settings)
    under = log_search(t, "search/ranking", {"seed": 7})
    runs = [log_trial(t, under, n, state, {"als.factors": 64}, {"value": value, "NDCG@10": .1})
            for n, state, value in ((0, "COMPLETE", .2), (1, "pruned", None), (2, "FAIL", None), (0, "COMPLETE", .2))]
    assert runs[0] == runs[3] and len(set(runs)) == 3
    other = log_search(t, "search/sources", {})
    assert log_trial(t, other, 0, "complete", {}, {}) not in runs
    plots = {"history": pl.DataFrame({"number": [0, 1, 2]})}
    assert log_search(t, "search/ranking", {"seed": 7}, {"best NDCG@10": .2}, plots, {"importance": Figure()}, over=True) == under
    found = t.client.search_runs([t.experiment], f"tags.`mlflow.parentRunId` = '{under}'", order_by=["attributes.start_time ASC"])
    assert [(r.info.run_name, r.info.status, r.data.metrics.get("value")) for r in found] == [
        ("trial 0", "FINISHED", .2), ("trial 1", "KILLED", None), ("trial 2", "FAILED", None)]
    whole = t.client.get_run(under)
    assert whole.data.metrics == {"best NDCG_at_10": .2} and whole.info.status == "FINISHED" and whole.data.tags["seed"] == "7"
    assert artifacts(settings, under) == {"history.csv", "importance.png"}
    assert found[0].data.params == {"als.factors": "64"} and found[0].data.metrics["NDCG_at_10"] == .1


# By itself


def test_mlflow_is_not_loaded_by_import():
    say = "import sys; import reco.tracking, reco.aliases, reco.explain; print([m for m in ('mlflow', 'matplotlib', 'shap', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_where_things_lie(tmp_path):
    s = Settings(root=tmp_path)
    assert tracking_uri(s) == f"sqlite:///{tmp_path}/data/mlflow/mlflow.db" and artifact_root(s) == f"file://{tmp_path}/data/mlflow/artifacts"
    assert bundle_uri(s, "x") == f"file://{tmp_path}/data/bundles/x"
    s = at(s, uri=SecretStr("http://h:5000")).model_copy(update={"bundles": s.bundles.model_copy(update={"root": "s3://b/bundles/"})})
    assert tracking_uri(s) == "http://h:5000" and artifact_root(s) is None and bundle_uri(s, "x") == "s3://b/bundles/x"
    assert artifact_root(at(s, artifacts="kept", uri="http://h")) == f"file://{tmp_path}/kept"


@pytest.mark.parametrize(("how", "by_path", "uri", "whole"), [
    ("auto", True, "file:///b/x", False), ("auto", False, "file:///b/x", True), ("auto", False, "s3://b/x", False),
    ("whole", True, "file:///b/x", True), ("outline", False, "file:///b/x", False)])
def test_how_much_is_copied(how, by_path, uri, whole): assert copies_whole(how, by_path, uri) is whole


def test_keys_of_s3_are_those_of_the_lake(tmp_path):
    keys = {"access_key": SecretStr("ann"), "secret_key": SecretStr("hunter2"), "endpoint": "http://minio:9000"}
    s = Settings(root=tmp_path, lake=Lake(**keys), tracking=Tracking(artifacts="s3://b/mlflow"))
    assert environment(s) | {"AWS_SECRET_ACCESS_KEY": "hunter2", "MLFLOW_S3_ENDPOINT_URL": "http://minio:9000", "AWS_ACCESS_KEY_ID": "ann"} == environment(s)
    assert not [k for k in environment(s.model_copy(update={"tracking": Tracking()})) if k.startswith("AWS")]


def test_a_run_is_found_by_its_flow_or_its_bundle():
    assert run_key({"id": "b", "flow": "F", "run_id": 3}) == "F/3" and run_key({"id": "b"}) == "bundle/b"
    assert tags_of({"id": "b", "strengths": {"tail": .1, "new": None}}) == {"reco.run": "bundle/b", "bundle_id": "b", "strengths.tail": "0.1"}


nested = st.recursive(st.one_of(st.none(), st.integers(), st.text(max_size=5), st.booleans()),
                      lambda x: st.dictionaries(st.text("ab.", min_size=1, max_size=3), x, max_size=3), max_leaves=8)


@given(st.dictionaries(st.text("xy", min_size=1, max_size=2), nested, max_size=4))
def test_flat_loses_nothing_but_what_is_empty(values):
    def leaves(v: object) -> int: return sum(map(leaves, v.values())) if isinstance(v, dict) else v not in ("", None)

    out = flat(values)
    assert len(out) <= leaves(values) and all(isinstance(v, str) and v for v in out.values())
    if not any("." in str(k) for k in json.dumps(values)): assert len(out) == leaves(values)


@given(st.text(max_size=300))
def test_any_name_is_made_one_that_mlflow_takes(name):
    from mlflow.utils.validation import _validate_metric_name
    _validate_metric_name("all/" + plain(name) + "x") if ".." not in name and "/" not in name else plain(name)


@given(st.text("ab\n", min_size=0, max_size=400), st.integers(100, 300))
def test_a_text_that_is_cut_fits(text, most):
    out = cut(text, most)
    assert len(out) <= most and (out == text) == (len(text) <= most)
    if out != text: assert text.startswith(out.partition("\n\n…")[0]) and out.endswith("artifacts)")


def test_a_publication_over_http_moves_the_aliases(settings, bundles, monkeypatch):
    """Behind the answer, by a process of its own; what another folder serves is no business of this MLflow."""
    (settings.root / "settings.ini").write_text("")
    for variable in [v for v in os.environ if v.startswith("RECO_")]: monkeypatch.delenv(variable)
    monkeypatch.setenv("RECO_SETTINGS", str(settings.root / "settings.ini"))
    for name in ("monday", "tuesday"): made_bundle(bundles, name, name)
    publish(bundles / "monday", "ann")
    Teller(settings, bundles).tell(publish(bundles / "tuesday", "ann")).join(200)
    assert aliases(settings) == {"champion": "tuesday"}
    back = rollback(bundles, "bob", check=Path)
    Teller(settings, settings.root / "elsewhere").tell(back).join(200)
    assert aliases(settings) == {"champion": "tuesday"}
    Teller(settings, bundles).tell(back).join(200)
    assert aliases(settings) == {"champion": "monday"}


def test_the_daily_upkeep_makes_good_what_mlflow_missed(settings, bundles):
    (settings.root / "settings.ini").write_text("")
    made_bundle(bundles, "monday")
    publish(bundles / "monday", "ann")
    done = run_flow(settings.root, "upkeep")
    assert done.returncode == 0 and "warning" not in done.stdout and aliases(settings) == {"champion": "monday"}, done.stdout


@pytest.mark.parametrize(("uri", "shown"), [("postgresql://ann:pw@h/db", "postgresql://…@h/db"), ("http://h:5000/a", "http://h:5000/a"),
                                            ("http://u:p/w@h", "http://…@h"), ("sqlite:///x@y.db", "sqlite:///x@y.db"),
                                            ("no: http://u:p@h refused", "no: http://…@h refused")])
def test_a_password_is_not_shown(uri, shown): assert without_password(uri) == shown


# A server


@pytest.fixture(scope="module")
def server(starting: tuple[subprocess.Popen, int, Path]) -> str:
    """The address of the server, once it answers."""
    process, port, log = starting
    for _ in range(300):
        try: socket.create_connection(("127.0.0.1", port), .2).close()
        except OSError: time.sleep(.2)
        else: return f"http://127.0.0.1:{port}"
        assert process.poll() is None, log.read_text()[-2_000:]
    pytest.fail("the server did not come up: " + log.read_text()[-2_000:])


def test_a_server_gets_the_whole_bundle_and_says_the_same(settings, bundles, server):
    there = at(settings, uri=server)
    for i, name in enumerate(("monday", "tuesday")): made_bundle(bundles, name, str(i))
    first = log_training(there, bundles / "monday", "# A card", {"alarms": pl.DataFrame({"a": [1]})})
    assert log_training(there, bundles / "monday", "# A card") == first
    client = MlflowClient(server, server)
    v = client.get_model_version("reco", first[1])
    assert v.source == f"{client.get_run(first[0]).info.artifact_uri}/bundle" and v.source.startswith("mlflow-artifacts:")
    assert v.tags["bundle_uri"] == (bundles / "monday").as_uri()
    files = {f"bundle/{p.relative_to(bundles / 'monday').as_posix()}" for p in (bundles / "monday").rglob("*") if p.is_file()}
    assert artifacts(there, first[0]) == files | {"model_card.md", "alarms.csv"}
    assert client.get_run(first[0]).data.metrics == metrics_of(METRICS)
    publish(bundles / "monday")
    publish(bundles / "tuesday")
    assert mirror(there) == {"champion": "tuesday"} and mirror(there) == {}
    rollback(bundles, "ann", "no good", check=Path)
    assert mirror(there) == {"champion": "monday"} and aliases(there) == {"champion": "monday"}
