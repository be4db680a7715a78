"""`flows/train.py` as an operator runs it: from the lake to a challenger that says where it came from."""

from pathlib import Path

import pytest
from flow_runs import run_flow

from reco.bundle import ModelBundle, load_bundle, named_bundle
from reco.challenger import challenger_name
from reco.data.lake import Lake
from reco.moment import make_sources
from reco.pipeline import recommend
from reco.request import RecommendationRequest
from reco.settings import Quota, Settings

SETTINGS = "[train]\nhorizon_days = 7\nholdout_days = 7\ncutoffs = 2\nmax_requests = 200\n[ranking]\ntrees = 10\n"


def fill_lake(folder: Path, sim) -> Lake:
    """The simulated shop's tables, as the ingest flow writes them."""
    lake = Lake(folder / "data" / "lake")
    lake.write("catalog", sim.catalog, key=["item_id", "valid_from"])
    lake.write("interactions", sim.interactions, key=["event_id"], day_of="ts")
    return lake


def test_the_flow_saves_what_it_evaluated(trained, tmp_path):
    (tmp_path / "settings.ini").write_text(SETTINGS)
    lake = fill_lake(tmp_path, trained.sim)
    done = run_flow(tmp_path, "train")
    assert done.returncode == 0, done.stdout
    assert "NDCG@10" in done.stdout and "pipeline" in done.stdout and "popularity" in done.stdout
    root = tmp_path / "data" / "bundles"
    bundle = load_bundle(named_bundle(root, challenger_name(root)))
    assert not (root / "current").exists()  # the gates publish
    assert not list((tmp_path / "data" / "lake" / ".runs").glob("*"))  # what the steps handed on is gone
    about = bundle.manifest
    assert about["snapshots"] == {t: lake.snapshot(t) for t in ("interactions", "catalog")}
    assert about["settings"]["ranking"]["trees"] == 10 and about["seed"] == 7 and about["git_sha"]
    assert {r["system"] for r in about["metrics"]} == {"pipeline", *bundle.moment.sources}
    assert len(about["alarms"]) == 4 and all(a["passed"] for a in about["alarms"])
    assert about["cutoffs"]["holdout"] < about["asof"] and about["versions"]["lightgbm"]
    user = trained.sim.interactions["user_id"].mode()[0]
    assert len(recommend(RecommendationRequest(user), bundle).items) == 10
    [card] = (tmp_path / ".metaflow").rglob("blank-*.html")
    assert card.stat().st_size > 10_000
    assert "MLflow was not told" not in done.stdout, done.stdout
    in_mlflow(tmp_path, bundle)


def in_mlflow(folder: Path, bundle: ModelBundle) -> None:
    """One run with what people look at, and the bundle as a version that waits to be judged."""
    from mlflow import MlflowClient  # seconds, which those who only want `fill_lake` need not wait
    client = MlflowClient(f"sqlite:///{folder}/data/mlflow/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("reco").experiment_id])
    assert run.info.status == "FINISHED" and run.data.tags["bundle_id"] == bundle.id and run.data.params["ranking.trees"] == "10"
    [row] = [r for r in bundle.manifest["metrics"] if (r["slice"], r["system"]) == ("all", "pipeline")]
    assert run.data.metrics["all/pipeline/NDCG_at_10"] == row["NDCG@10"]
    kept = {f.path: f.file_size for f in client.list_artifacts(run.info.run_id)}
    assert {"model_card.md", "metrics.csv", "frontier.csv", "alarms.csv", "importance.csv", "bundle"} <= set(kept)
    assert all(kept[f"{figure}.png"] > 5_000 for figure in ("ndcg", "frontier", "importance", "dependence"))
    model = client.get_registered_model("reco")
    assert {a: client.get_model_version("reco", v).tags["bundle_id"] for a, v in model.aliases.items()} == {"challenger": bundle.id}


def test_what_cannot_be_trained_says_why_and_publishes_nothing(trained, tmp_path):
    (tmp_path / "settings.ini").write_text("[train]\nholdout_days = 60\n")
    for says in ("no table 'interactions'", "cutoffs need more than"):
        done = run_flow(tmp_path, "train")
        assert done.returncode != 0 and says in done.stdout, done.stdout
        assert not (tmp_path / "data" / "bundles").exists()
        fill_lake(tmp_path, trained.sim)


@pytest.mark.parametrize(("sources", "says"), [
    ({"popularity": 0}, "popularity must have a quota"),
    ({"als": 5}, "popularity must have a quota"),
    ({"popularity": 5, "lightfm": 5}, "lightfm: not a built-in source .* lightfm = package.module:Class 5"),
    ({"popularity": 5, "mine": "no_such_module:Mine 5"}, "candidate source 'no_such_module:Mine': No module named"),
    ({"popularity": 5, "mine": "reco.ids:Mine 5"}, "has no attribute 'Mine'"),
])
def test_a_bad_source_is_named(sources, says):
    with pytest.raises(ValueError, match=says):
        make_sources(Settings(candidates={n: Quota.parse(q) for n, q in sources.items()}))


def test_the_flow_describes_itself(tmp_path):
    (tmp_path / "settings.ini").write_text("")
    done = run_flow(tmp_path, "train", "show")
    assert done.returncode == 0 and "Fit all sources as of some moments" in done.stdout
