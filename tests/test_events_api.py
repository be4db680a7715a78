"""POST /events/v1: durable before 202, known to the very next list, all of a request or nothing. On the app itself, with a real Redis."""

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app.contract import MAX_EVENTS, Event, create_app
from app.erase import forget
from app.serve import Replica, open_intake
from reco.batch_store import put_lists, read_list
from reco.bundle import ModelBundle
from reco.data.bus import open_codec, open_consumer
from reco.data.intake import hold_to_rules
from reco.data.lake import open_lake
from reco.data.quality import INTERACTIONS_KEY
from reco.data.stream import USER_EVENT, BusError
from reco.features.store import open_store
from reco.redis_server import disconnect
from reco.settings import load_settings


@pytest.fixture(scope="module")
def replica(bundle: ModelBundle, trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A replica with an online store and a bus of its own, both empty."""
    settings = trained.settings.model_copy(update={"root": tmp_path_factory.mktemp("events")})
    made = Replica()
    made.bundle, made.store, made.intake = bundle, open_store(settings), open_intake(settings)
    made.settings = settings
    yield made
    disconnect(made.intake.producer.client)
    made.store.close()


@pytest.fixture(scope="module")
def http(replica: Replica) -> TestClient:
    return TestClient(create_app(replica))


def now_ms() -> int: return round(time.time() * 1000)


def event(name: str, **fields) -> dict:
    return {"event_id": name, "ts": now_ms() - 1_000, "user_id": "eva", "item_id": "product_1", "event": "view"} | fields


def on_the_bus(replica: Replica) -> list[dict]:
    """Everything that was ever sent, as a consumer decodes it."""
    client, codec = replica.intake.producer.client, open_codec(replica.settings.stream)
    return [codec.decode(fields[b"event"]) for _, fields in client.xrange(replica.settings.stream.topic)]


def test_the_body_has_the_fields_of_the_avro_record(http):
    assert set(Event.model_fields) == {f["name"] for f in USER_EVENT["fields"]}
    required = {f["name"] for f in USER_EVENT["fields"] if "default" not in f}
    assert {n for n, f in Event.model_fields.items() if f.is_required()} == required


def test_what_was_accepted_is_on_the_bus_and_in_the_next_list(http, replica, bundle):
    items = bundle.ids.external(bundle.moment.per_item[:, 2].argsort()[::-1][5:8])
    ask = lambda: http.get("/recommendations/v1/newcomer?k=10")
    before = ask()
    assert before.headers["x-fallback"] == "true"
    sent = [event(f"n{i}", user_id="newcomer", item_id=x) for i, x in enumerate(items)]
    answer = http.post("/events/v1", json=sent)
    assert answer.status_code == 202 and answer.json() == {"accepted": 3}
    after = ask()
    assert "x-fallback" not in after.headers and after.json() != before.json()
    assert [e["item_id"] for e in on_the_bus(replica) if e["user_id"] == "newcomer"] == items


def test_one_event_or_several_and_both_ways_to_write_a_time(http, replica):
    at = datetime.now(UTC).replace(microsecond=5_000)
    one = event("iso", ts=at.isoformat(), order_id="o1", quantity=2, price=9.5, event="transaction", request_id="r", surface="cart", session_id="s")
    assert http.post("/events/v1", json=one).json() == {"accepted": 1}
    [found] = [e for e in on_the_bus(replica) if e["event_id"] == "iso"]
    assert found == one | {"ts": round(at.timestamp() * 1000)}


def test_sending_again_changes_nothing(http, replica):
    sent = [event("twice", user_id="tia"), event("once", user_id="tia")]
    assert http.post("/events/v1", json=[*sent, sent[0]]).json() == {"accepted": 2}
    first = replica.store.events("tia")
    assert http.post("/events/v1", json=sent).status_code == 202 and replica.store.events("tia") == first and len(first) == 2


@pytest.mark.parametrize(("bad", "says"), [
    ({"ts": now_ms() + 3_600_000}, "events[1]: "), ({"quantity": 0, "event": "transaction"}, "events[1]: "), ({"price": -1.0}, "events[1]: "),
    ({"event": "bought"}, "[1].event must be 'impression'"), ({"item_id": ""}, "[1].item_id must be"), ({"ts": "yesterday"}, "[1].ts must be ms since 1970"),
    ({"ts": 1.5}, "[1].ts must be ms"), ({"ts": True}, "[1].ts must be ms"), ({"ts": -1}, "[1].ts must be ms"), ({"ts": "0001-01-01T00:00:00+14:00"}, "[1].ts must be ms"),
    ({"ts": "2026-01-01T00:00:00"}, "[1].ts must be ms"), ({"colour": "red"}, "[1].colour is not known here"),
    ({"user_id": "x" * 513}, "[1].user_id must be"), ({"quantity": "2"}, "[1].quantity must be")])
def test_one_bad_event_and_nothing_is_taken(http, replica, bad, says):
    before = len(on_the_bus(replica))
    answer = http.post("/events/v1", json=[event("good", user_id="ben"), event("bad", user_id="ben") | bad])
    assert answer.status_code == 422 and says in answer.json()["detail"] and answer.headers["content-type"] == "application/problem+json"
    assert len(on_the_bus(replica)) == before and replica.store.events("ben") == []


@pytest.mark.parametrize("body", [[], {}, None, "x", 5, [[]], [event("a")] * (MAX_EVENTS + 1)])
def test_what_is_no_event_is_refused(http, body):
    answer = http.post("/events/v1", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422 and answer.json()["detail"] and len(answer.content) < 3_000


def test_without_a_bus_nothing_is_promised_and_lists_go_on(replica, bundle, caplog):
    class Gone:
        def send(self, records): raise BusError("redis://:password@host does not answer")

    class Without(Replica):
        pass

    without = Without()
    without.bundle, without.store = bundle, replica.store
    without.intake = type(replica.intake)(replica.intake.encode, Gone())
    app = TestClient(create_app(without))
    answer = app.post("/events/v1", json=event("lost", user_id="lou"))
    assert answer.status_code == 503 and answer.headers["retry-after"] and "password" not in answer.text
    assert replica.store.events("lou") == [] and app.get("/recommendations/v1/lou").status_code == 200


def test_without_its_store_events_are_taken_all_the_same(replica, bundle, trained, tmp_path):
    alone = Replica()
    url = type(trained.settings.online.url)(f"unix://{tmp_path}/nobody.sock")
    gone = trained.settings.model_copy(update={"online": trained.settings.online.model_copy(update={"url": url})})
    alone.bundle, alone.store, alone.intake = bundle, open_store(gone, timeout_s=0.2), replica.intake
    assert TestClient(create_app(alone)).post("/events/v1", json=event("kept", user_id="kim")).status_code == 202
    assert [e["event_id"] for e in on_the_bus(replica) if e["user_id"] == "kim"] == ["kept"]


def test_many_at_once_all_are_taken_once(http, replica):
    def send(n: int) -> None:
        for i in range(5): assert http.post("/events/v1", json=event(f"many {n} {i}", user_id="mia", ts=now_ms() - 10 * n - i)).status_code == 202
    threads = [threading.Thread(target=send, args=(n,)) for n in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len({e["event_id"] for e in on_the_bus(replica) if e["user_id"] == "mia"}) == len(replica.store.events("mia")) == 30


def test_a_consumer_finds_them(http, replica):
    http.post("/events/v1", json=event("for the lake", user_id="cat"))
    consumer, codec = open_consumer(replica.settings.stream, replica.intake.producer.client, "t"), open_codec(replica.settings.stream)
    assert "for the lake" in {codec.decode(m.data)["event_id"] for m in consumer.poll(1_000, 1)}


def test_a_shopper_is_forgotten_everywhere(http, replica, tmp_path, monkeypatch):
    monkeypatch.setenv("RECO_LAKE_ROOT", str(tmp_path / "lake"))
    lake = open_lake(load_settings())
    sent = [event(f"zoe {n}", user_id=u) for n, u in enumerate(("zoe/1", "zoe/1", "yan"))]
    assert http.post("/events/v1", json=sent).status_code == 202
    lake.write("interactions", hold_to_rules([dict.fromkeys(Event.model_fields) | e for e in sent], datetime.now(UTC))[0], key=INTERACTIONS_KEY, day_of="ts")
    answer = http.delete("/users/v1/zoe%2F1")
    assert answer.status_code == 200 and answer.json() == {"rows": {"interactions": 2}, "online": True}
    assert lake.read("interactions").collect()["user_id"].to_list() == ["yan"] and replica.store.events("zoe/1") == []
    assert "x-fallback" in http.get("/recommendations/v1/zoe%2F1").headers
    assert http.delete("/users/v1/zoe%2F1").json() == {"rows": {"interactions": 0}, "online": False}  # again: nothing is there
    http.post("/events/v1", json=sent[0])
    assert replica.store.events("zoe/1") == []  # what happened before does not come back


def test_what_was_not_erased_is_said(replica, bundle, monkeypatch, tmp_path):
    (tmp_path / "lake").write_text("a file where the lake should be")
    monkeypatch.setenv("RECO_LAKE_ROOT", str(tmp_path / "lake"))
    answer = TestClient(create_app(replica)).delete("/users/v1/ben")
    assert answer.status_code == 503 and answer.headers["retry-after"] and str(tmp_path) not in answer.text


@effort(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(list(Event.model_fields)), x, max_size=6), max_leaves=12))
def test_no_body_makes_it_fail(http, body):
    answer = http.post("/events/v1", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code in (202, 422), answer.text


def test_the_list_of_last_night_is_forgotten_too(replica):
    """Of an erased shopper no byte stays online, not even a list."""
    frame = pl.DataFrame({"user_id": ["ada", "bo"], "rank": [0, 0], "item_id": ["x", "y"], "score": [.5, .4], "source": ["als", "als"],
                          "bundle_id": ["b", "b"], "ts": [datetime.now(UTC)] * 2})
    keys = lambda: set(replica.store.client.keys())
    before = keys()
    assert put_lists(replica.store, frame, 600) == 2 and len(keys() - before) == 2
    forget(replica.store, ["ada"])
    left, = {k for k in keys() - before if b"erased" not in k}
    assert read_list(replica.store, "ada") is None and b"bo" in left
