"""A publication over HTTP is a line in the log and a message to people, and its answer waits for neither."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from test_alerts import Answer, Receiver

from app import following
from app.contract import create_app
from app.following import Following
from app.serve import Replica
from app.telling import Teller
from reco.alerts import LOG, events
from reco.published import history, publish
from reco.settings import Settings, load_settings


class Held(Receiver):
    """Answers nobody before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass, self.may = WaitsFirst, threading.Event()


class WaitsFirst(Answer):
    def do_POST(self) -> None:
        assert self.server.may.wait(60)
        super().do_POST()


@pytest.fixture
def people() -> Iterator[Held]:
    server = Held()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.may.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def shop(tmp_path, people) -> Settings:
    """A shop's settings, and three folders that pass for bundles; the first is served."""
    (tmp_path / "settings.ini").write_text(f"[alerts]\nwebhook = {people.url}\n")
    for name in "abc":
        (tmp_path / "data" / "bundles" / name).mkdir(parents=True)
        (tmp_path / "data" / "bundles" / name / "manifest.json").write_text("{}")
    publish(tmp_path / "data" / "bundles" / "a", "test")
    return load_settings(tmp_path / "settings.ini", {})


@pytest.fixture
def http(shop, monkeypatch) -> Iterator[TestClient]:
    """An endpoint that loads nothing: what is published is a matter of names."""
    monkeypatch.setattr(following, "EVERY_S", 600)
    root, replica = shop.path(shop.bundles.root), Replica()
    replica.following, replica.teller = Following(root, Path, lambda _: None, lambda: None), Teller(shop, root)
    replica.following.begin()
    yield TestClient(create_app(replica))
    replica.following.end()


def told() -> None:
    """Wait until all that began to be told is told."""
    for thread in [t for t in threading.enumerate() if t.name == "telling"]: thread.join(60)


def test_people_hear_of_it_and_nobody_waits_for_them(shop, http, people):
    root = shop.path(shop.bundles.root)
    assert http.put("/v1/bundle", json={"bundle_id": "b", "who": "ann", "why": "better"}).status_code == 200
    assert http.post("/v1/bundle/rollback", json={"why": "prices are off"}).json()["bundle_id"] == "a"
    assert not people.seen and len(history(root)) == 3 # both are answered, and nobody has taken a message yet
    people.may.set()
    told()
    assert [(e["what"], e["who"], e["about"]) for e in events(root)] == [
        ("bundle_published", "endpoint, ann", {"bundle": "b", "champion": "a"}), ("bundle_rolled_back", "endpoint, nobody named", {"bundle": "a", "champion": "b"})]
    texts = [body["text"] for *_, body in people.seen]
    assert len(texts) == 2 and "b is served now, a was before: better" in texts[0] and "a is served again, b was before: prices are off" in texts[1]


def test_the_same_bundle_again_is_another_event(shop, http, people):
    people.may.set()
    for name in "bcb": assert http.put("/v1/bundle", json={"bundle_id": name}).status_code == 200
    told()
    assert [e["about"]["bundle"] for e in events(shop.path(shop.bundles.root))] == ["b", "c", "b"] and len(people.seen) == 3


def test_what_cannot_be_told_fails_nothing(shop, http, people, caplog):
    root = shop.path(shop.bundles.root)
    (root / LOG).mkdir() # as good as a full disk
    people.may.set()
    people.answers = [404]
    assert http.put("/v1/bundle", json={"bundle_id": "b"}).status_code == 200
    told()
    assert "has not reached the log" in caplog.text and "has not reached webhook: the receiver answered 404" in caplog.text and "secret" not in caplog.text


def test_nothing_published_is_nothing_told(shop, http):
    assert http.put("/v1/bundle", json={"bundle_id": "nope"}).status_code == 404
    told()
    assert events(shop.path(shop.bundles.root)) == []
