"""A small shop with a past: eight days of shoppers who were shown lists, an A/B test, two days on which prices came in cents, and what flows made of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
from flow_runs import ROOT, run_flow

from app.demo_steps import EXPERIMENT
from reco.data.lake import Lake
from reco.data.simulator import Shop
from reco.features.store import open_store
from reco.settings import Settings, load_settings

DAYS, CENTS_FROM = 8, 3
SETTINGS = """[data]
path = raw
[lake]
root = lake
[bundles]
root = bundles
[online]
folder = online
[stream]
batch_seconds = 0.2
[experiments]
file = experiments.toml
[monitor]
requests = 30
max_age_days = 60
[tracking]
enabled = false
"""


class World(NamedTuple):
    """A folder with settings.ini, and what is in it."""

    root: Path
    settings: Settings
    sim: Shop
    begin: datetime  # of the traffic
    end: datetime

    @property
    def environment(self) -> dict[str, str]: return os.environ | {"RECO_SETTINGS": str(self.root / "settings.ini"), "PYTHONPATH": str(ROOT)}


def with_days_to_come(root: Path, sim: Shop, begin: datetime, bundles: Path) -> Settings:
    """A shop as it stands on the day from which the traffic comes, and what is still to happen."""
    (root / "settings.ini").write_text(SETTINGS)
    (root / "experiments.toml").write_text(EXPERIMENT.format(since=begin.date()))
    shutil.copytree(bundles, root / "bundles")
    before, later = sim.interactions.filter(pl.col("ts") < begin), sim.interactions.filter(pl.col("ts") >= begin)
    for name, frame in {"catalog": sim.catalog, "planted/tastes": sim.tastes, "planted/trends": sim.trends, "planted/complements": sim.complements,
                        "interactions": before, "later/interactions": later}.items():
        (path := root / "raw" / f"{name}.parquet").parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path)
    settings = load_settings(root / "settings.ini", {})
    lake = Lake(root / "lake")
    lake.write("catalog", sim.catalog, key=["item_id", "valid_from"])
    lake.write("interactions", before, key=["event_id"], day_of="ts")
    filled = open_store(settings)
    filled.append(before)
    filled.close()
    return settings


def traffic(root: Path, *arguments: str) -> str:
    """`python -m app.traffic` there; what it said."""
    env = os.environ | {"RECO_SETTINGS": str(root / "settings.ini"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "app.traffic", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def world(trained, bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root, end = tmp_path_factory.mktemp("world"), trained.cutoffs.end
    begin = end.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=DAYS - 1)
    settings = with_days_to_come(root, trained.sim, begin, bundle_root)
    traffic(root, "--cents-from", str(CENTS_FROM))
    for flow, *arguments in (("kpis", "--days", str(DAYS + 1)), ("monitor", "--since", f"{begin.date()}", "--retrain", "never")):
        done = run_flow(root, flow, "run", "--asof", (end + timedelta(hours=1)).isoformat(), *arguments)
        assert done.returncode == 0, done.stdout
    yield World(root, settings, trained.sim, begin, end)
