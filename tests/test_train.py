"""`flows/train.py` as an operator runs it: from the lake to a challenger that says where it came from."""

from pathlib import Path

import pytest
from flow_runs import run_flow

from reco.bundle import load_bundle, named_bundle
from reco.challenger import challenger_name
from reco.data.lake import Lake
from reco.moment import make_sources
from reco.pipeline import RecommendationRequest, recommend
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
