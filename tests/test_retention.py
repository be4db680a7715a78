"""Which bundles go: never what is served, what waits, or what a rollback goes back to, whatever happens at the same moment."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from flow_runs import run_flow
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from reco.bundle import UnknownBundle, current_name, load_bundle, named_bundle
from reco.challenger import challenger_name, promote, set_challenger
from reco.published import earlier, publish, rollback
from reco.retention import GOING, bundles_in, remove_old, to_stay

YOUNGEST = -1  # in these tests everything is old enough


def made(n: int) -> str:
    """A bundle's name, as a training gives it; the larger the number, the newer."""
    return f"2026-05-{n:02}T000000Z-{n:08x}"


A, B, C = map(made, (1, 2, 3))


def make(root: Path, *names: str) -> None:
    """Bundles with nothing in them."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").write_text("{}")


@effort(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["make", "publish", "rollback", "challenge", "remove"]), st.integers(0, 9)), max_size=25), st.integers(1, 3))
def test_what_is_named_is_always_there(tmp_path_factory, steps, last):
    """Any order of making, publishing, taking back, challenging and removing."""
    root = tmp_path_factory.mktemp("bundles")
    count = 0
    for step, n in steps:
        there = bundles_in(root)
        if step == "make" or not there:
            make(root, made(count))
            count += 1
        elif step == "publish": publish(root / there[n % len(there)])
        elif step == "challenge": set_challenger(root / there[n % len(there)])
        elif step == "rollback" and any(name in there for name in earlier(root)): rollback(root, check=lambda folder: None)
        elif step == "remove":
            before = [name for name in earlier(root) if name in there]
            gone = remove_old(root, last, YOUNGEST)
            assert set(gone) == set(there) - set(bundles_in(root)) and set(there[-last:]) | set(before[:last]) <= set(bundles_in(root))
            assert len(bundles_in(root)) <= 2 * last + 2
        for name in (current_name(root), challenger_name(root)): assert not name or named_bundle(root, name).is_dir()


def test_young_ones_and_what_is_being_written_stay(tmp_path):
    make(tmp_path, A, B, C)
    (tmp_path / ".saving-1").mkdir()
    assert remove_old(tmp_path, 1) == [] and (tmp_path / ".saving-1").is_dir()
    for folder in tmp_path.iterdir(): os.utime(folder, (1, 1))
    assert remove_old(tmp_path, 1) == [A, B] and not (tmp_path / ".saving-1").exists() and not list(tmp_path.glob(f"{GOING}*"))
    assert remove_old(tmp_path / "nowhere", 1) == []
    d, e, f = made(7), made(8), made(9)
    make(tmp_path, d, e, f)
    for folder in tmp_path.iterdir(): os.utime(folder, (1, 1))
    assert remove_old(tmp_path, 1, named={d}) == [C, e] and bundles_in(tmp_path) == [d, f]
    with pytest.raises(ValueError, match="at least one bundle"): to_stay(tmp_path, 0)


def test_what_somebody_else_put_there_stays(tmp_path):
    """A lake, its runs, other programs' folders, and a bundle that a person named: no training makes them again."""
    make(tmp_path, A, B, "website", "before-the-sale")
    for name in ("lake/interactions", ".runs/TrainFlow-1", ".metaflow/TrainFlow", ".git"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rows").write_text("x")
    publish(tmp_path / "before-the-sale")
    publish(tmp_path / B)
    there = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
    for folder in tmp_path.rglob("*"): os.utime(folder, (1, 1))
    assert remove_old(tmp_path, 1) == [A]
    assert there - {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} == {Path(A), Path(A) / "manifest.json"}


def test_one_that_was_killed_half_way_is_finished_by_the_next(tmp_path, monkeypatch):
    make(tmp_path, A, B)
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): remove_old(tmp_path, 1, YOUNGEST)
    assert bundles_in(tmp_path) == [B] and (tmp_path / f"{GOING}{A}").is_dir()
    assert remove_old(tmp_path, 1, YOUNGEST) == [] and not (tmp_path / f"{GOING}{A}").exists()


def test_a_promotion_and_a_removal_do_not_meet(tmp_path):
    """Whoever is first: the bundle is published and there, or gone and not published."""
    for turn in range(30):
        root = tmp_path / str(turn)
        make(root, A, B, C)
        publish(root / B)
        said = []

        def promoted(root=root, said=said) -> None:
            try: said.append(promote(root / A, B, "somebody", "better", "1"))
            except UnknownBundle: said.append(None)
        both = [threading.Thread(target=promoted), threading.Thread(target=remove_old, args=(root, 1, YOUNGEST))]
        for t in both if turn % 2 else both[::-1]: t.start()
        for t in both: t.join()
        assert (root / current_name(root)).is_dir() and (current_name(root) == A) == (said[0] is not None)


def test_a_replica_keeps_what_it_has_open(bundle_root, tmp_path):
    root = tmp_path / "bundles"
    shutil.copytree(bundle_root / current_name(bundle_root), root / A)
    loaded = load_bundle(root / A)
    before = {n: s.value.astype(np.float64).sum() for n, s in loaded.moment.sources.items() if hasattr(s, "value")}
    make(root, B)
    assert remove_old(root, 1, YOUNGEST) == [A]
    assert {n: s.value.astype(np.float64).sum() for n, s in loaded.moment.sources.items() if hasattr(s, "value")} == before


def test_the_flow_removes_them(tmp_path):
    (tmp_path / "settings.ini").write_text("[bundles]\nkeep = 1\n")
    root = tmp_path / "data" / "bundles"
    make(root, A, B, C)
    publish(root / B)
    for folder in root.iterdir(): os.utime(folder, (1, 1))
    done = run_flow(tmp_path, "upkeep")
    assert done.returncode == 0 and f"bundles removed: {A}" in done.stdout and bundles_in(root) == [B, C], done.stdout
