"""A model's whole life on one S3, by settings alone: ingest, train, promote, materialize, serve, take back. And a run that is resumed."""

import gzip
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from flow_runs import ROOT, SMALL, run_flow
from mlflow import MlflowClient
from s3 import KEY, SECRET, make_bucket, moto
from starlette.testclient import TestClient

from app.contract import create_app
from app.serve import Replica
from reco.alerts import events
from reco.bundle_store import bundles_in, bundles_root, put
from reco.challenger import challenger_name
from reco.data.simulator import simulate, write_shop
from reco.published import champion_name, publish
from reco.settings import load_settings

SETTINGS = """
[lake]
root = s3://shop/lake
endpoint = {endpoint}
access_key = {key}
secret_key = {secret}
[bundles]
root = s3://models/bundles
[runs]
datastore = s3://shop/metaflow
[tracking]
artifacts = s3://shop/mlflow
[data]
path = raw
""" + SMALL


@pytest.mark.timeout(900)
def test_a_model_lives_on_s3(tmp_path, monkeypatch):
    pytest.importorskip("boto3", reason="needs boto3: the train extra")
    for name in [n for n in os.environ if n.startswith(("AWS_", "METAFLOW_", "MLFLOW_", "RECO_"))]: monkeypatch.delenv(name)
    with moto() as endpoint:
        s3 = make_bucket(endpoint, "shop") # and nobody has made the bucket of the models
        (tmp_path / "settings.ini").write_text(SETTINGS.format(endpoint=endpoint, key=KEY, secret=SECRET))
        write_shop(simulate(users=300, items=100, events=6_000, days=60, end=datetime(2026, 5, 1, tzinfo=UTC), seed=3), tmp_path / "raw")
        done = run_flow(tmp_path, "ingest")
        assert done.returncode == 0, done.stdout

        failed = run_flow(tmp_path, "train")
        assert failed.returncode != 0 and "there is no such bucket" in failed.stdout and SECRET not in failed.stdout, failed.stdout
        make_bucket(endpoint, "models")
        resumed = run_flow(tmp_path, "train", "resume")
        assert resumed.returncode == 0, resumed.stdout
        again = {line.rpartition("[")[2].split("/")[1] for line in resumed.stdout.splitlines() if "Task is starting" in line and "/" in line.rpartition("[")[2]}
        assert again == {"end"}, resumed.stdout # the others were taken from the run that failed

        settings = load_settings(tmp_path / "settings.ini")
        root = bundles_root(settings)
        first = challenger_name(root)
        assert bundles_in(root) == [first] and champion_name(root) == ""
        promoted = run_flow(tmp_path, "promote")
        assert promoted.returncode == 0 and f"published {first}; before it was none" in promoted.stdout, promoted.stdout
        assert champion_name(root) == first and champion_in_mlflow(tmp_path) == first and "warning" not in promoted.stdout, promoted.stdout

        filled = run_flow(tmp_path, "materialize")
        assert filled.returncode == 0, filled.stdout
        for printed in (done, resumed, promoted, filled): assert SECRET not in printed.stdout

        written = objects_in(s3, "shop")
        assert {name.split("/")[0] for name in written} == {"lake", "metaflow", "mlflow"}
        written |= objects_in(s3, "models") | {str(p): p.read_bytes() for p in (tmp_path / ".metaflow").rglob("*") if p.is_file()}
        unpacked = {name: gzip.decompress(b) if b[:2] == b"\x1f\x8b" else b for name, b in written.items()}
        assert any(b"reco.settings" in b for b in unpacked.values()), "the settings are among the artifacts"
        assert [name for name, b in unpacked.items() if SECRET.encode() in b] == []
        assert not (tmp_path / "data" / "bundles").exists() and not (tmp_path / "data" / "lake").exists()

        monkeypatch.setenv("RECO_SETTINGS", str(tmp_path / "settings.ini"))
        made = Replica()
        made.reconfigure({"bundle": ""})
        try:
            http = TestClient(create_app(made))
            ask = lambda: http.get("/recommendations/v1/somebody?k=5").headers["x-bundle-id"]
            assert ask() == first
            second = twin(root, first)
            publish(root / second, "ann", "a copy")
            made.following.look()
            assert made.following.name == second
            back = subprocess.run([sys.executable, "-m", "app.bundle", "rollback", "--why", "worse"], cwd=ROOT, env=os.environ, capture_output=True, text=True)
            assert back.returncode == 0 and f"published {first}; before it was {second}" in back.stdout, back.stderr
            assert [e["what"] for e in events(root.objects)] == ["bundle_published", "bundle_rolled_back"] and champion_in_mlflow(tmp_path) == first
            made.following.look()
            assert made.following.name == first and ask() == first and "refused" not in http.get("/ready").json()
        finally:
            made.following.end()
            made.store.close()


def objects_in(s3, bucket: str) -> dict[str, bytes]:
    """Everything in a bucket."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {o["Key"]: s3.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for page in pages for o in page.get("Contents", [])}


def champion_in_mlflow(folder: Path) -> str:
    """The bundle that MLflow says is served."""
    client = MlflowClient(f"sqlite:///{folder}/data/mlflow/mlflow.db")
    return client.get_model_version_by_alias("reco", "champion").tags["bundle_id"]


def twin(root, name: str) -> str:
    """The name of another bundle that answers alike."""
    folder = shutil.copytree(root.cache / name, root.cache / f"{name[:-1]}x")
    put(root, Path(folder))
    return Path(folder).name
