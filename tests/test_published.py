"""Which bundle is served: the history, going back, the command, what replicas follow and refuse, and the routes for admins."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import HARM, copied, days_before, flip
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app import following
from app.contract import create_app
from app.keys import Keys
from app.ports import free_port
from app.serve import Replica
from reco.alerts import events
from reco.bundle import BundleError, UnknownBundle, current_name, named_bundle
from reco.published import HISTORY, NothingBefore, earlier, history, publish, rollback

ROOT = Path(__file__).resolve().parent.parent
NAMES = "a", "b", "c"


# The history --------------------------------------------------------------------------------------------------------


def folder_of(root: Path, *names: str) -> Path:
    """Bundles by name only: what is published is a matter of names."""
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").write_text("{}")
    return root


@effort(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*NAMES, "back", "crash", "torn"]), max_size=14))
def test_going_back_is_what_a_stack_of_names_would_do(tmp_path_factory, acts):
    root, stack, n = folder_of(tmp_path_factory.mktemp("h"), *NAMES, "lost"), [], 0
    for act in acts:
        if act == "back":
            below = [x for x in stack if x != (stack or [""])[-1]]
            if not below:
                with pytest.raises(NothingBefore): rollback(root, check=Path)
                continue
            while stack[-1] != below[-1]: stack.pop()
            assert rollback(root, check=Path).bundle_id == stack[-1]
        elif act == "crash": # between the line and the name
            if not stack: continue
            publish(root / "lost")
            (root / "current").write_text(stack[-1])
        elif act == "torn":
            with (root / HISTORY).open("a") as f: f.write('{"at": "20')
            continue
        else:
            publish(root / act, "ann", "why not")
            stack.append(act)
        n += 1
        assert current_name(root) == (stack[-1] if stack else "") and len(history(root)) == n
        assert earlier(root) == list(dict.fromkeys(x for x in reversed(stack) if x != stack[-1]))


def test_what_was_published_before_there_was_a_history_is_known(tmp_path):
    root = folder_of(tmp_path, "old", "new")
    (root / "current").write_text("old\n")
    assert earlier(root) == []
    publish(root / "new", "ann", "better")
    assert rollback(root, "ann", "it was not", Path).bundle_id == "old" and earlier(root) == []
    assert [(p.bundle_id, p.before, p.who, p.why, p.back) for p in history(root)] == [
        ("new", "old", "ann", "better", False), ("old", "new", "ann", "it was not", True)]


def test_what_is_gone_or_refused_is_passed_over_and_named(tmp_path):
    root = folder_of(tmp_path, *NAMES, "d")
    for name in (*NAMES, "d"): publish(root / name)
    (root / "c" / "manifest.json").unlink()

    def no_b(folder: Path) -> None:
        if folder.name == "b": raise BundleError(f"{folder}: wrong checksum: ['x']")

    done = rollback(root, "ann", "slow", no_b)
    assert (done.bundle_id, done.before) == ("a", "d") and done.why.startswith("slow; c is refused: there is no bundle 'c'") and "b is refused: wrong checksum" in done.why
    with pytest.raises(NothingBefore, match="^nothing to go back to$"): rollback(root, check=Path)


def test_many_publishers_leave_a_history_that_fits_what_is_published(tmp_path):
    root = folder_of(tmp_path, *NAMES)
    threads = [threading.Thread(target=lambda n=n: [publish(root / n) for _ in range(20)]) for n in NAMES]
    for t in threads: t.start()
    for t in threads: t.join()
    lines = history(root)
    assert len(lines) == 60 and lines[-1].bundle_id == current_name(root)
    assert [p.before for p in lines] == ["", *(p.bundle_id for p in lines[:-1])]


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/", "/etc", "b\x00", "é", ".saving-x", "x" * 300, "-a", "nope"])
def test_a_name_from_outside_is_a_bundle_here_or_nothing(tmp_path, name):
    root = folder_of(tmp_path / "root", "a", ".saving-x")
    folder_of(tmp_path, "a")
    assert named_bundle(root, "a") == root / "a"
    with pytest.raises(UnknownBundle, match="the newest are: a$"): named_bundle(root, name)


# Real bundles -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(trained, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder with bundles of today, yesterday and the day before, and a bad one of each kind; nothing is published."""
    root = tmp_path_factory.mktemp("three")
    names = [days_before(trained, root, d) for d in (0, 1, 2)]
    assert len(set(names)) == 3
    for kind, (harm, _) in HARM.items(): copied(root / names[0], kind, harm)
    return root, names


@pytest.fixture
def root(three, tmp_path) -> Path:
    """The same bundles in a folder of this test's own, yesterday's published."""
    for p in three[0].iterdir(): (tmp_path / p.name).symlink_to(p)
    publish(tmp_path / three[1][1], "test", "to begin with")
    return tmp_path


@pytest.fixture
def replica(root, store, monkeypatch) -> Iterator[Replica]:
    """One that follows the folder, and looks when it is told to."""
    monkeypatch.setattr(following, "EVERY_S", 600)
    made = Replica()
    made.store = store
    made.reconfigure({"bundle": str(root)})
    yield made
    made.following.end()


def counted(replica: Replica, name: str) -> float:
    return sum(s.value for f in text_string_to_metric_families(replica.meter.text().decode()) for s in f.samples if s.name == name)


def test_a_replica_follows_what_is_published(three, root, replica, store):
    today, yesterday, before = three[1]
    http = TestClient(create_app(replica))
    ask = lambda: http.get("/recommendations/v1/u?k=5").headers["x-bundle-id"]
    assert ask() == yesterday
    for name in (today, before): # newer or older: what was published counts
        publish(root / name)
        replica.following.look()
        assert ask() == name == http.get("/health").json()["bundle_id"]
    rollback(root)
    replica.following.look()
    assert ask() == today and "refused" not in http.get("/ready").json() and counted(replica, "reco_bundles_refused_total") == 0


def test_it_looks_by_itself(three, root, store, monkeypatch):
    monkeypatch.setattr(following, "EVERY_S", 0.05)
    made = Replica()
    made.store = store
    made.reconfigure({"bundle": str(root)})
    publish(root / three[1][0])
    until = time.monotonic() + 20
    while made.bundle_id != three[1][0] and time.monotonic() < until: time.sleep(0.02)
    made.following.end()
    assert made.bundle_id == three[1][0]


def test_a_disk_that_is_away_for_a_while_is_told_once_and_does_not_end_it(three, root, store, monkeypatch, caplog):
    monkeypatch.setattr(following, "EVERY_S", 0.02)
    made = Replica()
    made.store = store
    made.reconfigure({"bundle": str(root)})
    with monkeypatch.context() as away:
        def gone(root): raise OSError("stale file handle")
        away.setattr(following, "champion_name", gone)
        publish(root / three[1][0])
        time.sleep(0.3)
        assert made.bundle_id == three[1][1]
    until = time.monotonic() + 20
    while made.bundle_id != three[1][0] and time.monotonic() < until: time.sleep(0.02)
    made.following.end()
    assert made.bundle_id == three[1][0] and len([r for r in caplog.records if "failed; tried again" in r.getMessage()]) == 1


def test_a_request_keeps_the_bundle_that_it_began_with(three, root, replica, monkeypatch):
    """Explaining looks at the bundle twice: a swap in between must not be seen."""
    from app import serve
    real, seen = serve.answer, []

    def swapping(request, bundle, store):
        found = real(request, bundle, store)
        publish(root / three[1][0])
        replica.following.look()
        seen.append(bundle)
        return found

    monkeypatch.setattr(serve, "answer", swapping)
    monkeypatch.setattr(serve, "titles_of", lambda bundle, *_: seen.append(bundle) or (lambda _: "x"))
    answer = TestClient(create_app(replica)).get("/recommendations/v1/u?k=2&explain=true")
    assert answer.headers["x-bundle-id"] == three[1][1] and len(set(map(id, seen))) == 1 and replica.bundle_id == three[1][0]


def test_the_old_bundle_leaves_the_memory_at_once(three, root, replica):
    """Ray freezes what a replica has when it has started: what hangs in a circle then stays for good."""
    old = weakref.ref(replica.bundle)
    gc.disable()
    try:
        assert TestClient(create_app(replica)).get("/recommendations/v1/u?explain=true").status_code == 200
        publish(root / three[1][0])
        replica.following.look()
        assert replica.bundle_id == three[1][0] and old() is None
    finally: gc.enable()


@pytest.mark.parametrize("kind", HARM)
def test_a_bad_bundle_is_refused_and_the_old_one_goes_on(three, root, replica, kind, caplog):
    publish(root / kind)
    for _ in range(3): replica.following.look() # tried and told once
    http = TestClient(create_app(replica))
    ready = http.get("/ready").json()
    assert ready["status"] == "ready" and ready["bundle_id"] == three[1][1] and ready["refused"]["bundle_id"] == kind
    assert HARM[kind][1] in ready["refused"]["reason"] and str(root) not in ready["refused"]["reason"]
    assert len([r for r in caplog.records if "is refused" in r.getMessage()]) == 1 and counted(replica, "reco_bundles_refused_total") == 1
    assert http.get("/recommendations/v1/u").headers["x-bundle-id"] == three[1][1]
    rollback(root)
    replica.following.look()
    assert "refused" not in http.get("/ready").json() and replica.bundle_id == three[1][1]


def test_a_replica_that_starts_takes_the_last_one_that_loads(three, root, store, caplog):
    publish(root / three[1][2])
    for kind in ("flipped", "half"): publish(root / kind)
    made = Replica()
    made.store = store
    made.reconfigure({"bundle": str(root)})
    made.following.end()
    assert made.bundle_id == three[1][2] and made.refused.bundle_id == "half" and current_name(root) == "half"
    assert following.whole(root, say=lambda _: None).name == "half" # its files are what was saved: only a trial finds it out


def test_a_replica_without_any_bundle_that_loads_does_not_start(three, root, store):
    only = root / "elsewhere"
    only.mkdir()
    (only / "flipped").symlink_to(three[0] / "flipped")
    for start in (lambda: Replica().reconfigure({"bundle": str(only)}), lambda: following.whole(only)):
        with pytest.raises(BundleError, match="then `python flows/promote.py run`"): start()
    publish(only / "flipped")
    made = Replica()
    made.store = store
    for start in (lambda: made.reconfigure({"bundle": str(only)}), lambda: following.whole(only)):
        with pytest.raises(BundleError, match="flipped: wrong checksum"): start()
    assert made.following is None and made.bundle is None


def test_the_name_that_goes_away_changes_nothing(three, root, replica):
    (root / "current").unlink()
    replica.following.look()
    assert replica.bundle_id == three[1][1] and replica.refused.bundle_id == ""


def test_a_repaired_bundle_is_taken_when_it_is_published_again(three, root, replica):
    copied(three[0] / three[1][0], "repaired", flip)
    (root / "repaired").symlink_to(three[0] / "repaired")
    publish(root / "repaired")
    replica.following.look()
    assert replica.refused.bundle_id == "repaired"
    flip(root / "repaired")
    replica.following.look()
    assert replica.refused # nothing was published since
    publish(root / "repaired")
    replica.following.look()
    assert not replica.refused and replica.bundle_id == three[1][0]


def test_the_same_bundle_loaded_twice_answers_the_same(three, root, store, trained):
    from reco.bundle import load_bundle
    from reco.pipeline import recommend
    from reco.request import RecommendationRequest
    one, two = (load_bundle(root / three[1][0]) for _ in range(2))
    for user in [*trained.shop.users.ids.sample(40, seed=2), None]:
        request = RecommendationRequest(user, 20)
        assert recommend(request, one, store).items == recommend(request, two, store).items


# Over HTTP ----------------------------------------------------------------------------------------------------------


def test_an_admin_publishes_and_goes_back_over_http(three, root, replica):
    http, (today, yesterday, _) = TestClient(create_app(replica)), three[1]
    done = http.put("/v1/bundle", json={"bundle_id": today, "who": "ann", "why": "better on validation"})
    assert done.status_code == 200, done.text
    assert {k: v for k, v in done.json().items() if k != "at"} == {"bundle_id": today, "before": yesterday, "who": "ann", "why": "better on validation", "back": False}
    assert current_name(root) == today == replica.bundle_id == http.get("/v1/bundle").json()["id"] # the answering replica serves it already
    back = http.post("/v1/bundle/rollback", json={"who": "ann", "why": "prices are off"})
    assert back.status_code == 200 and back.json()["bundle_id"] == yesterday and back.json()["back"] is True and replica.bundle_id == yesterday
    assert [p.who for p in history(root)] == ["test", "ann", "ann"]
    nothing = http.post("/v1/bundle/rollback")
    assert nothing.status_code == 409 and nothing.json()["detail"] == "nothing to go back to" and current_name(root) == yesterday


@pytest.mark.parametrize("kind", HARM)
def test_a_bad_bundle_is_not_published_over_http(three, root, replica, kind):
    refused = TestClient(create_app(replica)).put("/v1/bundle", json={"bundle_id": kind})
    assert refused.status_code == 422 and refused.headers["content-type"] == "application/problem+json"
    assert HARM[kind][1] in refused.json()["detail"] and str(root) not in refused.text
    assert current_name(root) == three[1][1] == replica.bundle_id and len(history(root)) == 1 and not replica.refused


@pytest.mark.parametrize(("name", "status"), [("nope", 404), ("../" * 5, 404), ("\x00", 404), ("", 422), ("x" * 513, 422), (5, 422)])
def test_a_bundle_that_is_not_there_is_a_404(root, replica, name, status):
    answer = TestClient(create_app(replica)).put("/v1/bundle", json={"bundle_id": name})
    assert answer.status_code == status and answer.json()["detail"] and str(root) not in answer.text


def test_what_cannot_be_written_down_is_a_503_and_changes_nothing(three, root, replica, monkeypatch):
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("reco.published.os.fsync", full)
    answer = TestClient(create_app(replica)).put("/v1/bundle", json={"bundle_id": three[1][0]})
    assert answer.status_code == 503 and answer.headers["retry-after"] and "No space left" in answer.json()["detail"]
    monkeypatch.undo()
    replica.following.look()
    assert current_name(root) == replica.bundle_id == three[1][1] and earlier(root) == []


def test_an_endpoint_with_one_bundle_publishes_none(three, root, store):
    made = Replica()
    made.store = store
    made.reconfigure({"bundle": str(root / three[1][0])})
    http = TestClient(create_app(made))
    for answer in (http.put("/v1/bundle", json={"bundle_id": three[1][1]}), http.post("/v1/bundle/rollback")):
        assert answer.status_code == 409 and "follows no other" in answer.json()["detail"]


def test_only_an_admin_changes_what_is_served(root, replica):
    import hashlib
    replica.keys = Keys(tuple((hashlib.sha256(k).digest(), k.decode()) for k in (b"client", b"admin")))
    http = TestClient(create_app(replica))
    for send in (lambda h: http.put("/v1/bundle", json={"bundle_id": "nope"}, headers=h), lambda h: http.post("/v1/bundle/rollback", headers=h)):
        assert send({}).status_code == 401 and send({"X-API-Key": "client"}).status_code == 403 and send({"X-API-Key": "admin"}).status_code in (404, 409)


# The command --------------------------------------------------------------------------------------------------------


def command(root: Path, *args: str, **more: str) -> subprocess.CompletedProcess:
    env = os.environ | {"RECO_BUNDLES_ROOT": str(root), "RECO_TRACKING_ENABLED": "false"} | more
    return subprocess.run([sys.executable, "-m", "app.bundle", *args], cwd=ROOT, env=env, capture_output=True, text=True)


def test_one_command_goes_back(three, root):
    today, yesterday, _ = three[1]
    done = command(root, "publish", today, "--who", "ann", "--why", "try it")
    assert done.returncode == 0 and done.stdout == f"published {today}; before it was {yesterday}\n" and current_name(root) == today
    began = time.monotonic()
    done = command(root, "rollback", "--who", "bob", "--why", "worse", RECO_ALERTS_WEBHOOK=f"http://127.0.0.1:{free_port()}/secret", RECO_ALERTS_TRIES="1")
    assert done.stderr == "warning: it has not reached webhook: the receiver cannot be reached: URLError\n" # it is done all the same
    assert done.returncode == 0 and done.stdout == f"published {yesterday}; before it was {today}\n" and time.monotonic() - began < 30
    lines = command(root, "list").stdout.splitlines()
    assert len(lines) == 5 and f"{today}  published by ann: try it" in lines[1] and lines[2].endswith(": worse") and "rollback" in lines[2]
    assert lines[3:] == [f"current: {yesterday}", "rollback would publish: nothing"]
    assert [(e["what"], e["who"], e["about"]) for e in events(root)] == [
        ("bundle_published", "app.bundle, ann", {"bundle": today, "champion": yesterday}), ("bundle_rolled_back", "app.bundle, bob", {"bundle": yesterday, "champion": today})]
    nothing = command(root, "rollback")
    assert (nothing.returncode, nothing.stderr) == (1, "error: nothing to go back to\n") and current_name(root) == yesterday


@pytest.mark.parametrize(("name", "says"), [("nope", "there is no bundle 'nope'"), ("flipped", "wrong checksum"), ("half", "")])
def test_a_bad_bundle_is_not_published_by_the_command(three, root, name, says):
    done = command(root, "publish", name)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and says in done.stderr and "Traceback" not in done.stderr
    assert current_name(root) == three[1][1] and len(history(root)) == 1


def test_lines_of_the_history_are_json(root):
    assert [json.loads(x)["who"] for x in (root / HISTORY).read_text().splitlines()] == ["test"]
