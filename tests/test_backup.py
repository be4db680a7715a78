"""A backup is the state of one moment, whatever is written meanwhile, and comes back whole or not at all."""

import json
import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from s3 import KEY, SECRET, make_bucket, moto

from app.backup import STAMP, BackupError, in_order, places, restore, save
from app.following import whole
from reco.bundle_store import bundles_root
from reco.data.lake import Lake, open_lake
from reco.data.objects import ObjectError
from reco.published import champion_name
from reco.settings import Settings, load_settings

AT = datetime(2026, 5, 1, tzinfo=UTC)


def settings(folder: Path, **more: str) -> Settings:
    folder.mkdir(exist_ok=True)
    (folder / "settings.ini").write_text("[lake]\nroot = lake\n[bundles]\nroot = bundles\n[tracking]\nfolder = mlflow\n")
    return load_settings(folder / "settings.ini", more)


def rows(n: int, day: int = 0) -> pl.DataFrame:
    return pl.DataFrame({"event_id": [f"{day}-{i}" for i in range(n)], "ts": [AT + timedelta(days=day, seconds=i) for i in range(n)], "user_id": ["u"] * n, "item_id": ["i"] * n,
                         "event": ["view"] * n})


@pytest.fixture(scope="module")
def bucket():
    with moto() as endpoint:
        make_bucket(endpoint, "shop")
        yield {"RECO_LAKE_ENDPOINT": endpoint, "RECO_LAKE_ACCESS_KEY": KEY, "RECO_LAKE_SECRET_KEY": SECRET}


def on_s3(bucket: dict[str, str], prefix: str) -> dict[str, str]:
    at = f"s3://shop/{prefix}"
    return bucket | {"RECO_LAKE_ROOT": f"{at}/lake", "RECO_BUNDLES_ROOT": f"{at}/bundles", "RECO_TRACKING_ARTIFACTS": f"{at}/mlflow", "RECO_RUNS_DATASTORE": f"{at}/runs"}


def filled(s: Settings, bundles: Path) -> None:
    for day in range(3): open_lake(s).write("interactions", rows(50, day), key=["event_id"], day_of="ts")
    shutil.copytree(bundles, s.path(s.bundles.root))
    for name in ("mlflow/mlflow.db", "mlflow/artifacts/1/x/model.txt", "lake/scratch/7/half"):
        (path := s.path(name)).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_what_was_saved_comes_back_elsewhere_and_serves(tmp_path, bundle_root):
    one, two = settings(tmp_path / "one"), settings(tmp_path / "two")
    filled(one, bundle_root)
    about = save(one, tmp_path / "backup")
    assert set(about["places"]) == {"lake", "bundles", "tracking"} and not list((tmp_path / "backup").rglob("half"))
    assert restore(two, tmp_path / "backup") == about
    assert open_lake(two).read("interactions").collect().sort("event_id").equals(open_lake(one).read("interactions").collect().sort("event_id"))
    assert open_lake(two).snapshot("interactions") == open_lake(one).snapshot("interactions")
    assert whole(bundles_root(two)).name == champion_name(bundles_root(one)) and (tmp_path / "two" / "mlflow" / "mlflow.db").read_text() == "mlflow/mlflow.db"


def test_from_folders_to_s3_and_back(tmp_path, bundle_root, bucket):
    one, there, back = settings(tmp_path / "one"), settings(tmp_path / "two", **on_s3(bucket, "a")), settings(tmp_path / "three")
    filled(one, bundle_root)
    save(one, tmp_path / "first")
    restore(there, tmp_path / "first")
    assert champion_name(bundles_root(there)) and open_lake(there).read("interactions").collect().height == 150
    assert set(save(there, tmp_path / "second")["places"]) == {"lake", "bundles", "runs", "tracking"}
    with pytest.raises(BackupError, match="the backup has runs, and the settings keep none"): restore(back, tmp_path / "second")
    again = settings(tmp_path / "four", **on_s3(bucket, "b"))
    restore(again, tmp_path / "second")
    assert open_lake(again).read("interactions").collect().sort("event_id").equals(open_lake(one).read("interactions").collect().sort("event_id"))


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_lake_that_is_written_all_the_time_is_saved_as_it_was_at_some_moment(tmp_path, bucket, where):
    s = settings(tmp_path / "one", **(on_s3(bucket, "busy") if where == "s3" else {}))
    lake, over, written = open_lake(s), threading.Event(), []
    lake.write("interactions", rows(10), key=["event_id"], day_of="ts")

    def keep_writing() -> None:
        while not over.is_set():
            lake.write("interactions", rows(10, len(written) + 1), key=["event_id"], day_of="ts")
            written.append(lake.snapshot("interactions"))

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        while len(written) < 3: over.wait(0.01)
        before = len(written)
        save(s, tmp_path / "backup")
        while len(written) < before + 3: over.wait(0.01)
    finally:
        over.set()
        writer.join()
    other = settings(tmp_path / "two", RECO_TRACKING_ENABLED="false")
    about = json.loads((tmp_path / "backup" / STAMP).read_text())
    (tmp_path / "backup" / STAMP).write_text(json.dumps(about | {"places": {"lake": about["places"]["lake"]}}))
    restore(other, tmp_path / "backup")
    found = open_lake(other).read("interactions").collect()
    days = sorted({int(e.split("-")[0]) for e in found["event_id"]})
    assert found.height == 10 * len(days) and days == list(range(len(days))) and before + 1 <= len(days) # whole writes, none left out, none of those that were there
    lake.write("interactions", rows(1, 999), key=["event_id"], day_of="ts")


def test_a_backup_that_is_not_whole_is_refused_and_nothing_is_written_over(tmp_path, bundle_root):
    one, two = settings(tmp_path / "one"), settings(tmp_path / "two")
    filled(one, bundle_root)
    save(one, tmp_path / "backup")
    with pytest.raises(BackupError, match="not empty: a backup is a folder of its own"): save(one, tmp_path / "backup")
    with pytest.raises(BackupError, match="lake is not empty"): restore(one, tmp_path / "backup")
    next((tmp_path / "backup" / "lake").rglob("*.parquet")).unlink()
    with pytest.raises(BackupError, match="were saved"): restore(two, tmp_path / "backup")
    (tmp_path / "backup" / STAMP).write_text("{")
    with pytest.raises(BackupError, match=STAMP): restore(two, tmp_path / "backup")
    (tmp_path / "backup" / STAMP).unlink()
    with pytest.raises(BackupError, match="did not come to its end"): restore(two, tmp_path / "backup")
    assert not (tmp_path / "two" / "lake").exists()


def test_a_restore_that_was_cut_short_leaves_an_empty_lake(tmp_path, bundle_root, monkeypatch):
    one, two = settings(tmp_path / "one"), settings(tmp_path / "two")
    filled(one, bundle_root)
    save(one, tmp_path / "backup")
    put = __import__("app.backup", fromlist=["Place"]).Place.put

    def until_the_log(self: object, path: Path, name: str) -> None:
        if "_delta_log" in name: raise OSError("the disk is full")
        put(self, path, name)

    monkeypatch.setattr("app.backup.Place.put", until_the_log)
    with pytest.raises(OSError): restore(two, tmp_path / "backup")
    assert Lake(tmp_path / "two" / "lake").tables() == []


def test_s3_that_is_away_is_said(tmp_path):
    with pytest.raises(ObjectError): save(settings(tmp_path / "one", **on_s3({"RECO_LAKE_ENDPOINT": "http://127.0.0.1:9", "RECO_LAKE_ACCESS_KEY": "k", "RECO_LAKE_SECRET_KEY": "s"}, "x")), tmp_path / "backup")
    assert not (tmp_path / "backup" / STAMP).exists()


def test_places_and_order(tmp_path):
    assert places(settings(tmp_path / "one", RECO_TRACKING_ENABLED="false")) == {"lake": str(tmp_path / "one" / "lake"), "bundles": str(tmp_path / "one" / "bundles")}
    names = ["t/x.parquet", "t/_delta_log/01.json", "t/_delta_log/_last_checkpoint", "t/_delta_log/00.json", "published.jsonl", "a/manifest.json"]
    assert [*in_order(names)] == ["t/_delta_log/_last_checkpoint", "published.jsonl", "t/_delta_log/00.json", "t/_delta_log/01.json", "a/manifest.json", "t/x.parquet"]
