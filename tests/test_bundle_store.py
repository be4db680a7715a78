"""Bundles on S3, spoken to a real server: nothing is found half, nobody's decision is lost, and what is away is tried again."""

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from s3 import KEY, SECRET, Gate, make_bucket, moto, section

from app import following
from app.following import Following, to_serve
from reco import bundle_copies
from reco.bundle import BundleError, UnknownBundle, checksums
from reco.bundle_copies import alone_with, bundle_at, drop_unused
from reco.bundle_store import BundlesOnS3, NotNow, add_line, bundles_in, going, ledger, lines_of, put
from reco.challenger import challenger_name, keep_report, kept_report, promote, set_challenger
from reco.data.objects import listed
from reco.published import NothingBefore, champion_name, earlier, history, publish, rollback
from reco.retention import remove_old

pytest.importorskip("boto3", reason="needs boto3: the train extra")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto() as endpoint: yield endpoint


@pytest.fixture
def gate(server) -> Iterator[Gate]:
    made = Gate(server)
    yield made
    made.close()


@pytest.fixture
def at(server, gate, tmp_path):
    """Machines that share a bucket: `at(name)` is one of them, with copies of its own."""
    bucket = f"b{uuid4().hex[:12]}"
    make_bucket(server, bucket)
    return lambda name="here": BundlesOnS3(f"s3://{bucket}/shop/bundles", section(gate.endpoint), tmp_path / name)


def made(root: BundlesOnS3, *names: str) -> None:
    """Bundles of two files."""
    for name in names:
        folder = root.cache / name
        (folder / "state").mkdir(parents=True)
        for file in ("items.txt", "state/price.txt"): (folder / file).write_text(f"{name} {file}")
        (folder / "manifest.json").write_text(json.dumps({"checksums": checksums(folder)}))
        put(root, folder)


def laid(root: BundlesOnS3, *names: str) -> None:
    """Objects that no bundle has."""
    for name in names: root.objects.client.put_object(Bucket=root.objects.bucket, Key=root.objects.key(name), Body=b"x")


def test_a_bundle_is_found_only_when_it_is_whole(at, gate):
    here, there = at(), at("there")
    made(here, "a")
    puts = [path.partition("?")[0] for verb, path, _ in gate.seen if verb == "PUT"]
    assert puts[-1].endswith("/a/manifest.json") and len(puts) == 3
    put(here, here.cache / "a") # again: nothing but the manifest
    assert len([1 for verb, *_ in gate.seen if verb == "PUT"]) == 4
    there.objects.client.put_object(Bucket=there.objects.bucket, Key=there.objects.key("b/items.txt"), Body=b"x")
    assert bundles_in(there) == ["a"] and checksums(bundle_at(there, "a")) == checksums(here.cache / "a")
    for name in ("b", "z", "", "..", "a/../a", "\x00", "x" * 300):
        with pytest.raises(UnknownBundle): bundle_at(there, name)
    assert not list(there.cache.glob(".fetching-*"))


def test_several_who_fetch_at_once_fetch_once(at, gate):
    here, there = at(), at("there")
    made(here, "a")
    gate.seen.clear()
    with ThreadPoolExecutor(8) as pool: assert set(pool.map(lambda _: bundle_at(there, "a"), range(8))) == {there.cache / "a"}
    assert len([1 for _, path, _ in gate.seen if path.partition("?")[0].endswith("items.txt")]) == 1


def test_a_damaged_copy_is_fetched_again_and_a_whole_one_needs_no_s3(at, gate):
    here = at()
    made(here, "a")
    (here.cache / "a" / "items.txt").write_text("damaged")
    assert (bundle_at(here, "a") / "items.txt").read_text() == "a items.txt"
    gate.shut = True
    assert bundle_at(here, "a") == here.cache / "a"
    (here.cache / "a" / "items.txt").write_text("damaged")
    with pytest.raises(NotNow, match="it cannot be reached") as caught: bundle_at(here, "a")
    assert KEY not in str(caught.value) and SECRET not in str(caught.value)


def test_what_is_missing_cut_short_or_too_large_is_named(at, monkeypatch):
    here, there = at(), at("there")
    made(here, "lost", "short", "large")
    s3 = here.objects
    s3.client.delete_object(Bucket=s3.bucket, Key=s3.key("lost/state/price.txt"))
    s3.client.put_object(Bucket=s3.bucket, Key=s3.key("short/items.txt"), Body=b"sho")
    for name, says in (("lost", r"/lost: files are missing: \['state/price.txt'\]"), ("short", r"/short: wrong checksum: \['items.txt'\]")):
        with pytest.raises(BundleError, match=says) as caught: bundle_at(there, name)
        assert not isinstance(caught.value, NotNow)
    monkeypatch.setattr("reco.bundle_copies.shutil.disk_usage", lambda _: type("Disk", (), {"free": 10}))
    with pytest.raises(NotNow, match="bytes do not fit in the folder of .bundles. cache, where 10 are free"): bundle_at(there, "large")
    monkeypatch.undo()
    assert bundle_at(there, "large").is_dir() and [p.name for p in there.cache.glob("[!.]*/")] == ["large"]
    (here.cache / "large" / "manifest.json").write_text(json.dumps({"checksums": {"items.txt": "0"}}))
    with pytest.raises(BundleError, match="another bundle has that name"): put(here, here.cache / "large")


def copies(here: BundlesOnS3) -> set[str]: return {p.name for p in here.cache.glob("*/")}


def test_copies_that_nobody_used_go(at):
    here = at()
    here.keep = 2
    a, b, c, d = names = [f"2026-05-0{n}T000000Z-{n:08x}" for n in range(1, 5)]
    made(here, *names)
    for n, name in enumerate((b, a, c, d)): os.utime(here.cache / name, (n + 1, n + 1))
    for other in (".fetching-x", "lake"): # begun by a killed process, and somebody else's
        (here.cache / other).mkdir()
        os.utime(here.cache / other, (1, 1))
    os.utime(here.cache / a)
    assert drop_unused(here) == [c, b] and copies(here) == {a, d, "lake"}


def test_a_copy_that_somebody_is_at_is_not_removed(at, monkeypatch):
    here = at()
    made(here, "a", "b", "c")
    for name in "abc": bundle_at(here, name)
    for name in "abc": os.utime(here.cache / name, (1, 1))
    here.keep = 0
    with alone_with(here, "a"):
        before = {p.name: p.stat().st_ino for p in here.cache.glob(".lock-*")}
        real = bundle_copies.alone_with

        def used_meanwhile(root, name, **how):
            """Somebody asks for it between the look and the removal."""
            if name == "b": os.utime(root.cache / name)
            return real(root, name, **how)
        monkeypatch.setattr(bundle_copies, "alone_with", used_meanwhile)
        assert drop_unused(here) == ["c"] and copies(here) == {"a", "b"}
    assert drop_unused(here) == ["a"] and copies(here) == {"b"} and {p.name: p.stat().st_ino for p in here.cache.glob(".lock-*")} == before # whoever waits on one is still alone with it


def test_publishing_and_going_back(at):
    here, there = at(), at("there")
    made(here, "a", "b", "c")
    assert champion_name(here) == "" and history(here) == [] and challenger_name(here) == ""
    with pytest.raises(NothingBefore): rollback(here)
    for name in "abc": publish(there / name, "ann", "better")
    assert champion_name(here) == "c" and earlier(here) == ["b", "a"]
    assert rollback(there, "bob", "worse", check=Path).bundle_id == "b" and champion_name(here) == "b"
    set_challenger(here / "c")
    assert challenger_name(there) == "c"
    keep_report(there, {"bundle": "c", "passed": False})
    assert kept_report(here, "c") == {"bundle": "c", "passed": False} and kept_report(here, "a") is None
    for act in (lambda: publish(here / "z"), lambda: set_challenger(here / "z")):
        with pytest.raises(UnknownBundle, match="the newest are: c, b, a"): act()
    with pytest.raises(BundleError, match="judged against a, but b is served now"): promote(here / "c", "a", "p", "passed", "7")
    assert promote(here / "c", "b", "p", "passed", "8").bundle_id == "c" and promote(there / "c", "b", "p", "passed", "8") is None


def test_publishers_at_once_lose_no_line_and_no_decision(at):
    names = "abcd"
    made(at(), *names)
    machines = [at(f"m{n}") for n in range(len(names))]
    threads = [threading.Thread(target=lambda r=r, n=n: [publish(r / n, n) for _ in range(4)]) for r, n in zip(machines, names, strict=True)]
    for t in threads: t.start()
    for t in threads: t.join()
    lines = history(at())
    assert sorted(p.who for p in lines) == sorted(names * 4)
    assert [p.before for p in lines] == ["", *(p.bundle_id for p in lines[:-1])]
    now = champion_name(at())

    def judged(n: int):
        try: return promote(machines[n] / names[n], now, "p", "passed", str(n))
        except BundleError: return None
    with ThreadPoolExecutor(4) as pool: done = [p for p in pool.map(judged, [i for i, n in enumerate(names) if n != now]) if p]
    assert len(done) == 1 and champion_name(at()) == done[0].bundle_id


def test_an_answer_that_gets_lost_is_no_second_line(at, gate):
    here = at()
    made(here, "a", "b")
    for lost, name in ((1, "a"), (3, "b")): # one: asked again and refused by its own line; three: given up by the client
        gate.lose = lost
        assert publish(here / name, "ann").bundle_id == name
        gate.lose = 0
    assert [p.bundle_id for p in history(here)] == ["a", "b"]


def test_an_s3_without_conditions_is_refused(at, monkeypatch):
    here = at()
    made(here, "a")
    monkeypatch.setattr("reco.bundle_store.honours_conditions", lambda _: False)
    with pytest.raises(BundleError, match="passes over If-Match"): publish(here / "a")
    assert history(here) == []


def test_retention_leaves_what_is_needed_and_ends_what_was_cut_short(at, monkeypatch):
    here = at()
    a, b, c, d, e, f, half = (f"2026-05-0{n}T000000Z-{n:08x}" for n in range(1, 8))
    made(here, a, b, c, d, e, f)
    for name in (a, b, c): publish(here / name)
    rollback(here, check=Path)
    set_challenger(here / e)
    laid(here, f"{half}/items.txt")
    keep_report(here, {"bundle": c})
    assert remove_old(here, 1) == remove_old(here, 1, -60, named={c, d}) == []
    with monkeypatch.context() as killed:
        killed.setattr("reco.retention.finish_removal", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): remove_old(here, 1, -60)
    assert going(lines_of(ledger(here).text)) == {c, d}
    with pytest.raises(UnknownBundle, match=f"'{d}': it is being removed"): publish(here / d) # its files are still there
    assert remove_old(here, 1, -60) == [] and bundles_in(here) == [a, b, e, f] and kept_report(here, c)
    assert not [x for x in listed(here.objects) if x.name.startswith((half, d))]
    put(here, here.cache / d) # the name is free again
    assert publish(here / d).bundle_id == d


def test_retention_leaves_what_is_not_ours(at):
    """Bundles right in a bucket that others use too."""
    here = at()
    old, new = "2026-05-01T000000Z-00000001", "2026-05-02T000000Z-00000002"
    made(here, old, new, "before-the-sale")
    publish(here / new)
    others = ["lake/interactions/_delta_log/0.json", "lake/.runs/TrainFlow-1/shop", "metaflow/data/1", "mlflow/1/model_card.md", "website/manifest.json", "2026-05-01/x"]
    laid(here, *others, "gates/x.json", "reports/x.html", "monitor/x.html")
    before = {x.name for x in listed(here.objects)}
    assert remove_old(here, 1, -60) == [old]
    assert {x for x in before - {y.name for y in listed(here.objects)} if not x.startswith(f"{old}/")} == set()
    assert not [x for x in listed(here.objects) if x.name.startswith(old)]


def test_a_publication_between_the_look_and_the_removal_counts(at):
    here = at()
    made(here, "a", "b", "c")
    publish(here / "b")
    seen = []

    def slow(lines):
        if not seen: publish(at("other") / "a")
        seen.append(len(lines))
        return {"removing": ["c"]} if len(lines) == 1 else None
    assert add_line(here, slow) is None and seen == [1, 2]


# Following ----------------------------------------------------------------------------------------------------------


class Bundle:
    def __init__(self, folder: Path): self.name = folder.name


def test_a_replica_follows_within_seconds_and_outlives_s3(at, gate, monkeypatch, caplog):
    monkeypatch.setattr(following, "EVERY_S", 0.1)
    here, there, served, refused = at(), at("there"), [], []
    made(here, "a", "b")
    with pytest.raises(BundleError, match="nothing is published in s3://"): to_serve(there)
    publish(here / "a")
    f = Following(there, Bundle, lambda b: served.append(b.name), lambda: refused.append(1))
    f.begin()
    try:
        def until(what) -> None:
            end = time.monotonic() + 30
            while not what() and time.monotonic() < end: time.sleep(0.02)
            assert what()
        publish(here / "b")
        until(lambda: served == ["a", "b"])
        rollback(here, check=Path)
        until(lambda: served == ["a", "b", "a"])
        asked = [c for verb, path, c in gate.seen if verb == "GET" and path.endswith("published.jsonl")]
        assert any(asked) # questions with a condition
        gate.shut = True
        until(lambda: f.blind)
        assert "it cannot be reached" in f.blind.reason and f.name == "a" and refused == [1]
        again = Following(there, Bundle, lambda b: served.append(b.name), lambda: None) # a replica that starts now
        again.begin()
        again.end()
        assert served[-1] == "a" and "beginning with what was published when it last answered" in caplog.text
        gate.shut = False
        until(lambda: f.blind is None)
        publish(here / "b")
        until(lambda: f.name == "b")
    finally: f.end()


def test_a_bundle_that_cannot_be_had_now_is_tried_again(at, gate, monkeypatch):
    here, there, served = at(), at("there"), []
    made(here, "a", "b")
    publish(here / "a")
    monkeypatch.setattr(following, "EVERY_S", 600)
    f = Following(there, Bundle, lambda b: served.append(b.name), lambda: None)
    f.begin()
    publish(here / "b")
    with monkeypatch.context() as full:
        full.setattr("reco.bundle_copies.shutil.disk_usage", lambda _: type("Disk", (), {"free": 1}))
        with pytest.raises(NotNow): f.look()
    f.look()
    f.end()
    assert served == ["a", "b"] and f.refusal is None
