"""`flows/materialize.py` as an operator runs it, and what a run that breaks off leaves."""

import gzip
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import END
from flow_runs import run_flow
from stores import log, named, put, views
from test_train import fill_lake

from reco.bundle import latest_bundle, load_bundle
from reco.data.histories import epoch_ms
from reco.features.store import StoreDown, open_store
from reco.materialize import fill_pasts, item_rows, materialize_pasts, materialized, version_of
from reco.pipeline import recommend
from reco.request import RecommendationRequest
from reco.settings import Settings


@pytest.fixture(scope="module")
def shop(trained, bundle_root, tmp_path_factory) -> Path:
    """A folder with settings, a lake and a published bundle."""
    root = tmp_path_factory.mktemp("shop")
    (root / "settings.ini").write_text("")
    fill_lake(root, trained.sim)
    shutil.copytree(bundle_root, root / "data" / "bundles")
    return root


def test_a_run_fills_the_store_and_the_next_finds_nothing_to_do(trained, shop):
    done = run_flow(shop, "materialize")
    assert done.returncode == 0, done.stdout
    n, users = trained.sim.interactions.height, trained.sim.interactions["user_id"].n_unique()
    assert f"pasts: {users:,} shoppers, {n:,} events" in done.stdout and "features: 300 items" in done.stdout
    bundle, store = load_bundle(latest_bundle(shop / "data" / "bundles")), open_store(Settings(root=shop))
    ids = bundle.ids.ids.to_list()
    active, rows, there = store.rows(bundle.id, ids)
    assert there.all() and active.version in done.stdout
    lake_end = trained.sim.interactions["ts"].max() + timedelta(milliseconds=1)
    wanted = item_rows(trained.sim.interactions.lazy(), trained.sim.catalog, bundle.ids, epoch_ms(lake_end))
    assert rows.tobytes() == wanted.tobytes() and active.asof == epoch_ms(lake_end)
    user = trained.sim.interactions["user_id"].mode()[0]
    answer = recommend(RecommendationRequest(user, 10, END), bundle, store)
    assert not answer.degraded and not answer.fallback

    again = run_flow(shop, "materialize")
    assert again.returncode == 0 and "nothing to do" in again.stdout and active.version in again.stdout
    assert store.active(bundle.id) == active
    store.close()
    assert len(list((shop / ".metaflow").rglob("blank-*.html"))) == 2


def test_without_a_bundle_it_says_what_to_run(trained, tmp_path):
    (tmp_path / "settings.ini").write_text("")
    fill_lake(tmp_path, trained.sim)
    done = run_flow(tmp_path, "materialize")
    assert done.returncode != 0 and "flows/train.py run" in done.stdout and not (tmp_path / "data" / "online").exists()


def test_a_store_that_is_down_fails_the_run_without_its_password(shop, tmp_path):
    copy = shutil.copytree(shop, tmp_path / "shop", ignore=shutil.ignore_patterns(".metaflow", "online"))
    (copy / "settings.ini").write_text("[online]\nurl = redis://:hunter2@127.0.0.1:1/0\n")
    done = run_flow(copy, "materialize")
    assert done.returncode != 0 and "StoreDown" in done.stdout and "hunter2" not in done.stdout
    kept = [p.read_bytes() for p in (copy / ".metaflow").rglob("*") if p.is_file()]
    assert len(kept) > 10 and not any(b"hunter2" in (gzip.decompress(b) if b[:2] == b"\x1f\x8b" else b) for b in kept)


def test_a_run_that_breaks_off_is_not_taken_for_a_whole_one(trained, tmp_path, monkeypatch):
    store, frame = open_store(Settings(root=tmp_path)), trained.sim.interactions
    version = version_of("b", {"interactions": "3-a"}, ("x",))
    def broken(store, interactions, end):
        fill_pasts(store, interactions.head(5_000), end)
        raise StoreDown("the cable")
    with monkeypatch.context() as m:
        m.setattr("reco.materialize.fill_pasts", broken)
        with pytest.raises(StoreDown): materialize_pasts(store, frame.lazy(), "3-a", END)
    assert materialized(store, "b", version, "3-a") == (False, False) and store.someone()
    materialize_pasts(store, frame.lazy(), "3-a", END)
    assert materialized(store, "b", version, "3-a") == (True, False)
    put(store, "b", version, ["lamp"], 1)
    assert materialized(store, "b", version, "3-a") == (True, True)
    store.client.delete(store.row_keys.pointer("b")) # the rows were forgotten in the meantime
    assert materialized(store, "b", version, "3-a") == (True, False)
    assert materialized(store, "b", version, "4-a") == (False, False)
    wanted = frame.group_by("user_id").len()
    lengths = {u: len(p) for u, p in zip(wanted["user_id"], store.events_many(wanted["user_id"].to_list()), strict=True)}
    assert lengths == {u: min(n, store.cap) for u, n in wanted.iter_rows()}
    store.close()


def test_who_was_forgotten_is_not_brought_back(tmp_path):
    """Not who has been away for longer than a past is kept, and not who was erased; nor what is at or after the end."""
    store = named(Settings(root=tmp_path), "reco") # keeps a day
    day = 86_400_000
    frame = pl.concat([views("ada", 3), views("bo", 2, start=day - 5), views("eve", 4, start=day), log([("x", "cy", day + 9, "rug", "view")])])
    store.erase("eve")
    end = frame["ts"].max() # cy's only event is at the end
    done = fill_pasts(store, frame.lazy(), end)
    assert set(store.user_ids()) == {"bo"} and done == {"shoppers": 2, "events": 6, "new": 2}
    store.close()


def test_the_name_of_a_version_changes_with_everything_that_it_is_made_of():
    snapshots, columns = {"interactions": "1-a", "catalog": "2-b"}, ("x", "y")
    names = [version_of("b", snapshots, columns), version_of("c", snapshots, columns), version_of("b", snapshots | {"catalog": "3-b"}, columns),
             version_of("b", snapshots, ("y", "x"))]
    assert len(set(names)) == 4 and version_of("b", dict(reversed(snapshots.items())), columns) == names[0]


def test_items_that_the_bundle_does_not_know_change_nothing(trained, bundle):
    asof, frame = epoch_ms(END), trained.sim.interactions
    strange = frame.with_columns(event_id=pl.col("event_id") + "x", item_id=pl.lit("an item of tomorrow"))
    one, two = (item_rows(f.lazy(), trained.sim.catalog, bundle.ids, asof) for f in (frame, pl.concat([frame, strange])))
    np.testing.assert_array_equal(one, two)
