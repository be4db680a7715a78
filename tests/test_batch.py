"""Lists of everybody: the endpoint's own, whole or absent, whatever dies in between; on Ray and off it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from conftest import END
from flow_runs import ROOT, run_flow
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from test_train import fill_lake

import reco.batch
from flows.on_ray import WorkError, each_done, ray_running
from reco.batch import (
    LISTS,
    Batch,
    BatchError,
    drop_older,
    fresh_rows,
    left,
    open_scorer,
    partition_of,
    parts_done,
    plan,
    read_lists,
    runs,
    score_users,
)
from reco.batch_store import fill_lists, forget_lists, lists_in, put_lists, read_list
from reco.bundle import ModelBundle, latest_bundle, load_bundle, make_bundle, save_bundle
from reco.data.histories import epoch_ms
from reco.data.lake import Lake
from reco.data.simulator import Shop
from reco.data.storage import LakeError
from reco.data.upkeep import erase
from reco.features.items import ITEM_FEATURES
from reco.features.store import StoreError, open_store
from reco.materialize import item_rows, materialize_rows, version_of
from reco.pipeline import recommend
from reco.published import publish
from reco.request import RecommendationRequest
from reco.reranking.rulebook import RuleBook
from reco.settings import Settings

COLUMNS = ["user_id", "rank", "item_id", "score", "source"]


@pytest.fixture(scope="module")
def root(trained, bundle, tmp_path_factory) -> Path:
    """A folder with settings, a lake, and a published bundle that is ten days older than the lake."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "settings.ini").write_text("[batch]\npartition_users = 100\nworkers = 1\nto_store = true\n")
    fill_lake(folder, trained.sim)
    then = epoch_ms(END - timedelta(days=10))
    publish(save_bundle(make_bundle(trained.shop, then, trained.rankers, trained.settings, {}), folder / "data" / "bundles"), "tests", "ten days ago")
    return folder


@pytest.fixture(scope="module")
def older(root) -> ModelBundle:
    """That bundle."""
    return load_bundle(folder_of(root))


def folder_of(root: Path) -> Path: return next((root / "data" / "bundles").glob("2*Z-*"))


def snapshots_of(lake: Lake) -> dict[str, str]: return {t: lake.snapshot(t) for t in ("interactions", "catalog")}


@pytest.fixture(scope="module")
def few(trained) -> Shop:
    """The shop with every fifth shopper."""
    users = trained.sim.interactions["user_id"].unique().sort().gather_every(5)
    return replace(trained.sim, interactions=trained.sim.interactions.filter(pl.col("user_id").is_in(users.implode())))


@pytest.fixture
def lake(few, tmp_path) -> Lake: return fill_lake(tmp_path, few)


def planned(lake: Lake, bundle: ModelBundle, k: int = 5, users: int = 80) -> Batch: return plan(lake, snapshots_of(lake), bundle, k, users)


def one_by_one(users: pl.Series, bundle: ModelBundle, store, k: int, asof: int) -> list[tuple]:
    """The rows of the lists that the endpoint gives."""
    answers = [(u, recommend(RecommendationRequest(u, k, datetime.fromtimestamp(asof / 1000, UTC)), bundle, store)) for u in users]
    assert not any(a.degraded for _, a in answers)
    return [(u, n + 1, i.item_id, i.score, i.source) for u, a in answers for n, i in enumerate(a.items)]


def events_of(trained, users: pl.Series, asof: int) -> pl.DataFrame:
    before = pl.col("ts").dt.epoch("ms") < asof
    return trained.sim.interactions.filter(before, pl.col("user_id").is_in(users.implode()))


# The same lists


@pytest.mark.parametrize("k", [1, 20])
def test_everybody_gets_what_the_endpoint_would_say(trained, bundle, store, k):
    users = trained.sim.interactions["user_id"].unique().sort().gather_every(12)
    asof = bundle.moment.asof
    rows = score_users(bundle, events_of(trained, users, asof), asof, k)
    assert rows.columns == COLUMNS and rows.rows() == one_by_one(users, bundle, store, k, asof)
    assert len(users) > 100 and rows["source"].n_unique() > 3 - (k == 1)


@pytest.mark.parametrize(("banned", "sources"), [(0, {"pin"}), (230, {"pin", "rest"})])
def test_pins_and_short_lists_too(trained, store, banned, sources):
    """A rule book that pins what hardly anybody is proposed, and leaves little of what is."""
    popular = trained.sim.interactions["item_id"].value_counts().sort("count", "item_id", descending=True)["item_id"]
    rules = {"ban": [{"filter": f"item:{'|'.join(popular[:banned])}"}] if banned else [], "pin": [{"item": popular[260], "slot": 2}]}
    book, asof = RuleBook.model_validate(rules), epoch_ms(END)
    bundle = make_bundle(trained.shop, asof, {"for_you": trained.ranker}, trained.settings, {"id": "strict"}, book)
    users = trained.sim.interactions["user_id"].unique().sort().gather_every(30)
    rows = score_users(bundle, events_of(trained, users, asof), asof, 40)
    assert rows.rows() == one_by_one(users, bundle, store, 40, asof)
    assert sources <= set(rows["source"]) and (banned > 0) == ("rest" in set(rows["source"]))
    assert (rows.filter(rank=2)["item_id"] == popular[260]).all()


def test_features_are_as_fresh_as_the_lake(trained, root, older, tmp_path):
    """The endpoint has them from the online store, the batch makes them from the same snapshots."""
    lake, store = Lake(root / "data" / "lake"), open_store(Settings(root=tmp_path))
    batch, ids = planned(lake, older), older.ids
    assert batch.asof > older.moment.asof
    store.append(trained.sim.interactions)
    rows = item_rows(trained.sim.interactions.lazy(), trained.sim.catalog, ids, batch.asof)
    materialize_rows(store, older, version_of(older.id, snapshots_of(lake), tuple(ITEM_FEATURES)), rows, batch.asof)
    users = trained.sim.interactions["user_id"].unique().sort().gather_every(30)
    events, fresh = events_of(trained, users, batch.asof), fresh_rows(lake, older, batch)
    asked = one_by_one(users, older, store, 10, batch.asof)
    store.close()
    assert score_users(older, events, batch.asof, 10, fresh).rows() == asked != score_users(older, events, batch.asof, 10).rows()


# Who belongs where


@effort(deadline=None) # the first call compiles
@given(st.lists(st.text(), max_size=20), st.integers(1, 1_000))
def test_a_part_follows_from_the_id_alone(ids, partitions):
    """Against the definition of FNV-1a, in Python's integers."""
    def fnv1a(text: str) -> int:
        h = 0xCBF29CE484222325
        for byte in text.encode(): h = (h ^ byte) * 0x100000001B3 % 2**64
        return h
    wanted = [(fnv1a(i) ^ fnv1a(i) >> 32) % partitions for i in ids]
    assert partition_of(pl.Series(ids, dtype=pl.String), partitions).tolist() == wanted
    assert partition_of(pl.Series(["x", *ids], dtype=pl.String)[1:], partitions).tolist() == wanted


def test_every_shopper_is_in_one_part(few, lake, bundle):
    batch = planned(lake, bundle)
    there = [reco.batch.events_of(lake, batch, p)["user_id"] for p in range(batch.partitions)]
    together = pl.concat([u.unique() for u in there])
    assert batch.partitions == 4 and together.n_unique() == len(together) == batch.users == few.interactions["user_id"].n_unique()
    assert sum(map(len, there)) == few.interactions.height


# Whole or absent


def test_what_died_in_between_is_made_again_and_nothing_twice(root, bundle_root, bundle, lake, tmp_path, monkeypatch):
    settings, folder = Settings(root=tmp_path), latest_bundle(bundle_root)
    batch, whole = planned(lake, bundle), score_users(bundle, pl.concat(
        reco.batch.events_of(lake, planned(lake, bundle), p) for p in range(4)), bundle.moment.asof, 5)
    score = open_scorer(settings, folder, batch, None)
    assert score(2)["users"] > 50 and left(lake, batch) == [0, 1, 3]
    with monkeypatch.context() as dies: # after its lists, before the note
        dies.setattr(reco.batch, "note", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): score(0)
    listed = next((tmp_path / "data" / "lake" / LISTS).glob("day=*/*.parquet"))
    listed.with_name("half.parquet").write_bytes(listed.read_bytes()[:1_000]) # and in the middle of its lists
    assert left(lake, batch) == [0, 1, 3] and lake.read(LISTS).collect()["partition"].unique().sort().to_list() == [0, 2]
    with pytest.raises(BatchError, match=rf"{batch.run}: 1 of 4 parts"): read_lists(lake)
    for p in left(lake, batch): score(p)
    assert left(lake, batch) == [] and read_lists(lake, batch.run).select(COLUMNS).sort("user_id", "rank").collect().equals(whole)
    score(1)
    assert read_lists(lake).collect().height == whole.height and parts_done(lake, batch.run)["rows"].sum() == whole.height


def test_another_bundle_snapshot_or_length_is_another_run(few, lake, bundle, older):
    runs_of = [planned(lake, bundle).run, planned(lake, bundle, k=6).run, planned(lake, older).run, planned(lake, bundle, users=79).run]
    assert len(set(runs_of)) == 3 and runs_of[0] == runs_of[3]
    named = replace(bundle, manifest=bundle.manifest | {"id": "of the same moment"})
    assert planned(lake, named).run not in runs_of
    snapshots = snapshots_of(lake)
    lake.write("interactions", few.interactions.head(1).with_columns(event_id=pl.lit("new")), key=["event_id"], day_of="ts")
    assert planned(lake, bundle).run not in runs_of and plan(lake, snapshots, bundle, 5, 80).run == runs_of[0]


def test_older_runs_go_and_one_that_is_under_way_stays(lake, bundle, tmp_path, bundle_root):
    settings, folder = Settings(root=tmp_path), latest_bundle(bundle_root)
    batches = [planned(lake, bundle, k, 300) for k in (1, 2, 3)]
    unfinished = planned(lake, bundle, 4)
    for b in batches[:2]: open_scorer(settings, folder, b, None)(0)
    open_scorer(settings, folder, planned(lake, bundle, 1, 80), None)(3)
    open_scorer(settings, folder, batches[2], None)(0)
    open_scorer(settings, folder, unfinished, None)(1)
    assert drop_older(lake, keep=2) > 300
    assert runs(lake)["run"].to_list() == [unfinished.run, batches[2].run, batches[1].run]
    rows = dict(lake.read(LISTS).group_by("run").len().collect().rows())
    assert rows == {unfinished.run: 4 * parts_done(lake, unfinished.run)["users"][0], batches[2].run: 900, batches[1].run: 600}
    assert read_lists(lake).collect()["rank"].max() == 3
    with pytest.raises(BatchError, match=f"no run {batches[0].run}"): read_lists(lake, batches[0].run)


def test_a_run_that_is_being_removed_is_not_read_and_can_be_made_again(lake, bundle, tmp_path, bundle_root, monkeypatch):
    settings, folder = Settings(root=tmp_path), latest_bundle(bundle_root)
    old, new = planned(lake, bundle, 1, 300), planned(lake, bundle, 2, 300)
    for b in (old, new): open_scorer(settings, folder, b, None)(0)
    real = reco.batch.remove
    with monkeypatch.context() as dies: # with the lists gone and the notes still there
        dies.setattr(reco.batch, "remove", lambda at, table, drop: real(at, table, drop) if table == LISTS else 1 / 0)
        with pytest.raises(ZeroDivisionError): drop_older(lake, keep=1)
    with pytest.raises(BatchError, match="not complete"): read_lists(lake, old.run)
    assert left(lake, old) == [0]
    open_scorer(settings, folder, old, None)(0)
    assert read_lists(lake, old.run).collect().height == 300 and read_lists(lake).collect()["run"].unique().to_list() == [old.run]


def test_who_is_erased_has_no_lists(lake, bundle, tmp_path, bundle_root):
    batch = planned(lake, bundle, 2, 300)
    score = open_scorer(Settings(root=tmp_path), latest_bundle(bundle_root), batch, None)
    score(0)
    users = read_lists(lake).collect()["user_id"].unique().sort()
    erased = dict(erase(lake, [users[0]], datetime.now(UTC)).rows())
    assert erased[LISTS] == 2 and read_lists(lake).collect()["user_id"].n_unique() == 299
    assert not [f for f in (tmp_path / "data" / "lake" / LISTS).rglob("*.parquet") if users[0] in pl.read_parquet(f, columns=["user_id"])["user_id"]]
    with pytest.raises(LakeError, match="erasure"): score(0) # the snapshot is gone: the next run has a new one


def test_what_cannot_be_is_said(lake, bundle, tmp_path, bundle_root):
    with pytest.raises(BatchError, match=r"no complete run .*none was begun.*flows/batch\.py run"): read_lists(lake)
    with pytest.raises(BatchError, match="no run abc"): read_lists(lake, "abc")
    with pytest.raises(LakeError, match="no snapshot '9-x'"): plan(lake, snapshots_of(lake) | {"interactions": "9-x"}, bundle, 5, 400)
    other = replace(planned(lake, bundle), bundle_id="another")
    with pytest.raises(BatchError, match="the run is one of another"): open_scorer(Settings(root=tmp_path), latest_bundle(bundle_root), other, None)
    empty = Lake(tmp_path / "empty")
    shown = pl.DataFrame({"event_id": ["a"], "ts": [END], "user_id": ["u"], "item_id": ["i"], "event": ["impression"]})
    empty.write("interactions", shown, key=["event_id"], day_of="ts")
    with pytest.raises(BatchError, match="nobody to recommend to"):
        plan(empty, {"interactions": empty.snapshot("interactions"), "catalog": "0-x"}, bundle, 5, 400)


# In the online store


def test_lists_come_back_from_the_store_as_they_are_in_the_lake(lake, bundle, tmp_path, bundle_root):
    batch, store = planned(lake, bundle, 3, 150), open_store(Settings(root=tmp_path))
    score = open_scorer(Settings(root=tmp_path), latest_bundle(bundle_root), batch, None)
    score(0)
    with pytest.raises(BatchError, match="1 of 2 parts"): fill_lists(store, lake, batch.run, 2, 60)
    score(1)
    users = lake.read(LISTS).collect()["user_id"].unique().sort()
    store.erase(users[0]) # later than the lists' moment
    assert lists_in(store) is None and fill_lists(store, lake, batch.run, 2, 60) == len(users) - 1 == 299 and lists_in(store) == batch.run
    wanted = read_lists(lake).sort("user_id", "rank").filter(pl.col("user_id") != users[0]).select(COLUMNS).collect()
    found = {u: read_list(store, u) for u in users}
    assert found.pop(users[0]) is None and read_list(store, "nobody") is None
    assert [(u, n + 1, i.item_id, i.score, i.source) for u, f in found.items() for n, i in enumerate(f.items)] == wanted.rows()
    assert {(f.bundle_id, f.asof) for f in found.values()} == {(batch.bundle_id, batch.asof)}
    keys = [f"reco:list:{users[1]}", "reco:lists-from"]
    assert all(50 < store.client.ttl(k) <= 60 for k in keys) and store.client.exists(f"reco:list:{users[0]}") == 0
    store.erase(users[1])
    assert read_list(store, users[1]) is None and forget_lists(store, users[:3]) == 2 and read_list(store, users[2]) is None
    store.close()


@pytest.mark.parametrize("value", [b"", b"no json", b"[1]", b'["b", 7, [["item", "x", "als"]]]', b"\xff"])
def test_a_list_that_cannot_be_read_names_its_owner(value, tmp_path_factory, store):
    store.client.set("reco:list:ada", value)
    with pytest.raises(StoreError, match="the list of 'ada'"): read_list(store, "ada")
    assert forget_lists(store, ["ada"]) == 1 and forget_lists(store, []) == 0


def test_odd_ids_have_lists_too(store):
    odd = ["a/b", "é🛒", "a\nb", "\x00", " "]
    rows = pl.DataFrame({"user_id": odd, "rank": 1, "item_id": odd[::-1], "score": 0.5, "source": "als", "bundle_id": "b", "ts": END})
    assert put_lists(store, rows, 60) == 5
    assert [read_list(store, u).items[0].item_id for u in odd] == odd[::-1] and forget_lists(store, odd) == 5


# On Ray


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """One Ray for all that need one: a start takes up to half a minute."""
    with ray_running() as cores:
        import ray
        assert cores >= 1
        yield ray.get_runtime_context().gcs_address


def test_a_dead_worker_is_replaced_and_a_part_that_fails_is_named(ray_address, tmp_path, capsys):
    def make(folder: Path, factor: int):
        def do(part: int) -> int:
            with (folder / f"{part}").open("a") as tries: tries.write("x")
            if part == 2 and (folder / "2").stat().st_size == 1: os.kill(os.getpid(), signal.SIGKILL)
            if part == 7: raise ValueError("nothing good in seven")
            return part * factor, os.environ["POLARS_MAX_THREADS"], os.environ["MINE"]
        return do
    done, began = {}, time.monotonic()
    with pytest.raises(WorkError, match=r"part 7 failed 3 times") as failed:
        for part, result in each_done(make, [tmp_path, 10], [7, 2, *range(2), *range(3, 7)], 2, {"MINE": "yes"}): done[part] = result
    assert done == {p: (10 * p, "1", "yes") for p in range(7)}
    assert "nothing good in seven" in str(failed.value) and "line" in str(failed.value)
    assert {f.name: f.stat().st_size for f in tmp_path.iterdir()} == {"2": 2, "7": 3} | {str(p): 1 for p in range(7) if p != 2}
    assert "part 2 failed and is tried again" in capsys.readouterr().out and time.monotonic() - began < 120


def test_where_everything_fails_the_rest_is_left(ray_address, tmp_path):
    def make(folder: Path):
        def do(part: int) -> None:
            with (folder / f"{part}").open("a") as tries: tries.write("x")
            raise OSError("no room left")
        return do
    with pytest.raises(WorkError, match=r"(?s)part \d+ failed 3 times.*no room left") as failed: list(each_done(make, [tmp_path], range(20), 2, {}))
    assert str(failed.value).count("failed 3 times") == 5 and sum(f.stat().st_size for f in tmp_path.iterdir()) < 3 * 20


def test_a_worker_that_cannot_be_made_ends_the_run(ray_address):
    def make(): raise OSError("no bundle on this node")
    with pytest.raises(WorkError, match=r"(?s)a worker cannot be made.*no bundle on this node"): list(each_done(make, [], range(3), 1, {}))


def test_a_run_that_was_killed_goes_on_where_it_was(trained, root, older, ray_address, monkeypatch):
    """Begun in one process, killed, finished on a Ray that was there already; and then there is nothing to do."""
    lake, command = Lake(root / "data" / "lake"), [sys.executable, "flows/batch.py", "run"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RECO_", "METAFLOW_", "RAY_"))} | {
        "RECO_SETTINGS": str(root / "settings.ini"), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        said = next((line for line in first.stdout if " of 15: " in line), "")
        os.killpg(first.pid, signal.SIGKILL)
    batch = planned(lake, older, 20, 100)
    done = parts_done(lake, batch.run).height
    assert "part 0 of 15" in said and 1 <= done < 15
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    second = run_flow(root, "batch")
    assert second.returncode == 0, second.stdout
    assert second.stdout.count(" of 15: ") == 15 - done and "complete after" in second.stdout and "the lists of 1,500 shoppers" in second.stdout
    rows = read_lists(lake).select(COLUMNS).sort("user_id", "rank").collect()
    users = rows["user_id"].unique()
    whole = score_users(older, events_of(trained, users, batch.asof), batch.asof, 20, fresh_rows(lake, older, batch))
    assert len(users) == batch.users and rows.equals(whole)
    monkeypatch.delenv("RAY_ADDRESS")
    third = run_flow(root, "batch")
    assert third.returncode == 0 and f"nothing to do: run {batch.run}" in third.stdout and " of 15: " not in third.stdout, third.stdout
    assert len(list((root / ".metaflow").rglob("blank-*.html"))) == 2
    with_store = open_store(Settings(root=root))
    assert lists_in(with_store) == batch.run and [i.item_id for i in read_list(with_store, users[0]).items] == rows.filter(user_id=users[0])["item_id"].to_list()
    with_store.close()
