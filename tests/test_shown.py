"""The serve log end to end: what is answered over HTTP is in the lake once, whoever asked and however, and goes when a shopper goes."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

import app.consumer
from app.contract import create_app
from app.erase import erase_lake, erase_letters
from app.serve import Replica, open_intake
from app.shown import Shown, as_list, open_log
from reco.data.bus import open_consumer
from reco.data.lake import open_lake
from reco.data.letters import forget_letters
from reco.data.serve_log import EVERY_S
from reco.data.served import SERVED, lists_section
from reco.data.stream import BusError, Malformed, single_object_codec
from reco.features.store import open_store
from reco.monitoring.credit import outcomes_of
from reco.redis_server import connect, disconnect, wait_until_ready
from reco.request import RecommendationRequest, RecommendationResponse, ScoredItem
from reco.schemas import EXPOSURES, conform
from reco.settings import Online, Served, Settings


@pytest.fixture
def replica(bundle, trained, tmp_path) -> Iterator[Replica]:
    """A replica with an online store, a bus and a lake of its own, all empty."""
    settings = trained.settings.model_copy(update={"root": tmp_path, "stream": trained.settings.stream.model_copy(update={"batch_seconds": 0.2})})
    made = Replica()
    made.bundle, made.store, made.intake = bundle, open_store(settings), open_intake(settings)
    made.log, made.settings = open_log(settings, made.meter.lost.inc), settings
    yield made
    made.log.close()
    disconnect(made.intake.producer.client)
    made.store.close()


@pytest.fixture
def http(replica: Replica) -> TestClient:
    return TestClient(create_app(replica))


def taken_from_the_bus(replica: Replica) -> None:
    """Let the real consumer write down everything that waits."""
    replica.log.flush()
    section, client = lists_section(replica.settings.stream, replica.settings.served), replica.store.client
    until = time.monotonic() + 30
    app.consumer.run(replica.settings, "t", lambda: not client.xlen(section.topic) and not client.xlen(replica.settings.stream.topic) or time.monotonic() > until)


def in_the_lake(replica: Replica) -> pl.DataFrame:
    """The table of exposures then."""
    taken_from_the_bus(replica)
    return open_lake(replica.settings).read("exposures").collect()


def test_every_way_to_ask_leaves_a_row_per_item(http, replica, bundle):
    items = bundle.ids.external(bundle.moment.per_item[:, 2].argsort()[::-1][:3])
    get = lambda name, path: http.get(path, headers={"X-Request-ID": name}).json()["recommendations"]
    told = {("one", "for_you"): get("one", "/recommendations/v1/ann?k=4"), ("two", "similar"): get("two", f"/similar/v1/{items[0]}?k=3&user_id=ann"),
            ("two", "bought_together"): get("two", f"/bought-together/v1?items={items[1]}&k=2"), ("why", "for_you"): get("why", "/recommendations/v1/bob?k=2&explain=true")}
    visit = http.post("/recommendations/v1/session", json={"k": 2, "events": [{"item_id": items[0], "event": "view"}]}, headers={"X-Request-ID": "visit"})
    told["visit", "for_you"] = visit.json()["recommendations"]
    many = http.post("/recommendations/v1/batch", json={"requests": [{"user_id": "ann", "k": 2}, {"user_id": "cy", "k": 3}]}, headers={"X-Request-ID": "many"})
    told |= {(f"many.{n}", "for_you"): a["recommendations"] for n, a in enumerate(many.json()["answers"])}
    assert get("one", "/recommendations/v1/ann?k=4") == told["one", "for_you"]  # sent again by a client that had no answer
    rows = in_the_lake(replica)
    assert conform(rows, EXPOSURES, "exposures").height == rows.height == sum(map(len, told.values()))
    by_list = {key: part.sort("rank") for key, part in rows.partition_by("request_id", "surface", as_dict=True).items()}
    assert set(by_list) == set(told)
    for key, answer in told.items():
        mine = by_list[key]
        assert mine["rank"].to_list() == list(range(1, len(answer) + 1)) and mine["item_id"].to_list() == [x["item_id"] for x in answer]
        assert mine["score"].to_list() == pytest.approx([x["score"] for x in answer], rel=1e-6)
        assert (mine["latency_ms"] > 0).all() and mine["bundle"].unique().to_list() == [bundle.id] and mine["variant"].is_null().all()
    who = {key: part["user_id"][0] for key, part in by_list.items()}
    assert who == {("one", "for_you"): "ann", ("two", "similar"): "ann", ("two", "bought_together"): None, ("why", "for_you"): "bob",
                   ("visit", "for_you"): None, ("many.0", "for_you"): "ann", ("many.1", "for_you"): "cy"}


def test_one_name_for_everybody_loses_no_list(http, replica):
    """A client that sends one X-Request-ID again and again: contract and attribution hold."""
    ask = lambda path: http.get(path, headers={"X-Request-ID": "constant"}).json()["recommendations"]
    told = {who: [x["item_id"] for x in ask(f"/recommendations/v1/{who}?k={k}")] for who, k in (("ann", 2), ("bob", 4), ("cy", 3))}
    longer = [x["item_id"] for x in ask("/recommendations/v1/ann?k=5")]
    rows = in_the_lake(replica).sort("rank")
    lists = rows.group_by("list_id", maintain_order=True).agg(pl.col("user_id").first(), "item_id")
    assert sorted(lists.select("user_id", "item_id").rows()) == sorted([*told.items(), ("ann", longer)]) and set(rows["request_id"]) == {"constant"}


def test_a_refused_request_shows_nothing(http, replica):
    assert http.get("/recommendations/v1/ann?k=0").status_code == 422 and http.get("/recommendations/v1/ann?filter=x!!").status_code == 422
    assert not replica.log.waiting


def test_a_click_and_a_purchase_find_their_list(http, replica):
    asked = http.get("/recommendations/v1/dan?k=5", headers={"X-Request-ID": "home"})
    second = asked.json()["recommendations"][1]["item_id"]
    event = lambda kind, **more: {"event_id": kind, "ts": round(time.time() * 1000), "user_id": "dan", "item_id": second, "event": kind} | more
    time.sleep(0.01)
    sent = [event("click", request_id="home", surface="for_you"), event("transaction", order_id="o", quantity=2, price=4.5)]
    sent[1]["ts"] += 1
    assert http.post("/events/v1", json=sent).status_code == 202
    exposures, lake = in_the_lake(replica), open_lake(replica.settings)
    found = outcomes_of(exposures, lake.read("interactions").collect(), timedelta(days=1))
    assert found.filter(click=1).select("rank", "purchase", "revenue").rows() == [(2, 1, 9.0)] and found["click"].sum() == 1 == found["purchase"].sum()


def test_who_is_erased_is_in_no_list(http, replica):
    for who in ("eve", "fay"): http.get(f"/recommendations/v1/{who}?k=3")
    in_the_lake(replica)
    http.get("/recommendations/v1/eve?k=3")  # on its way when eve is forgotten
    replica.log.flush()
    time.sleep(0.01)
    assert erase_lake(replica.settings, ["eve"])["exposures"] == 3
    left = in_the_lake(replica)
    assert left["user_id"].unique().to_list() == ["fay"] and left.height == 3


def test_a_bus_that_is_gone_costs_no_answer_and_what_is_lost_is_counted(bundle, trained, tmp_path):
    away = trained.settings.model_copy(update={"root": tmp_path, "served": Served(max_in_memory=3),
                                               "stream": trained.settings.stream.model_validate({"bus": "redis://127.0.0.1:9/0"})})
    made = Replica()
    made.bundle, made.log = bundle, open_log(away, made.meter.lost.inc)
    made.store = open_store(away)
    client = TestClient(create_app(made))
    assert all(client.get(f"/recommendations/v1/u{n}?k=2").status_code == 200 for n in range(8))
    lost = lambda: made.meter.registry.get_sample_value("reco_lists_not_written_down_total")
    assert lost() >= 2  # three wait, some may be in the thread's hand
    with pytest.raises(BusError): made.log.flush()
    made.log.close()
    assert lost() == 8
    made.store.close()


NOTING = """
import itertools, sys, time
from pathlib import Path
from app.shown import Shown, open_log
from reco.request import RecommendationRequest, RecommendationResponse, ScoredItem
from reco.settings import Settings
log = open_log(Settings(root=Path(sys.argv[1])), lambda n: None)
for n in itertools.count():
    log.note(Shown(RecommendationRequest("ann", 1, request_id=str(n)), RecommendationResponse([ScoredItem("x", 0.5, "als", 1.0)], "b", False), round(time.time() * 1000), 1.0))
    print(time.monotonic(), flush=True)
    time.sleep(0.002)
"""


def test_a_killed_replica_loses_a_quarter_of_a_second_at_most(tmp_path):
    settings = Settings(root=tmp_path)
    store = open_store(settings)
    wait_until_ready(store.client)
    with subprocess.Popen([sys.executable, "-c", NOTING, str(tmp_path)], text=True, stdout=subprocess.PIPE) as replica:
        noted = [float(replica.stdout.readline()) for _ in range(1_500)]  # a line is a list; some seconds of them
        killed = time.monotonic()
        replica.kill()  # SIGKILL: nothing in it can act any more
        noted += [float(line) for line in replica.stdout if line.endswith("\n")]
    kept = [int(SERVED.decode(fields[b"event"])["request_id"]) for _, fields in store.client.xrange(settings.served.topic)]
    assert kept == list(range(len(kept))) and 0 < len(kept) <= len(noted) + 1  # what is lost is the last
    busy = 0.75  # seconds that a thread may have to wait on a machine with other work
    assert noted[0] < killed - 2 and len(kept) >= sum(t < killed - EVERY_S - busy for t in noted)
    store.close()


def test_it_can_be_turned_off(trained, tmp_path):
    off = trained.settings.model_copy(update={"root": tmp_path, "served": Served(on=False)})
    assert open_log(off, lambda n: None) is None


def test_a_list_that_waits_for_a_killed_consumer_comes_again_and_counts_once(http, replica):
    http.get("/recommendations/v1/gus?k=2", headers={"X-Request-ID": "g"})
    replica.log.flush()
    section = lists_section(replica.settings.stream, replica.settings.served)
    dead = open_consumer(section, replica.store.client, "t")
    assert [SERVED.decode(m.data)["request_id"] for m in dead.poll(10, 1)] == ["g"]  # in hand, never acknowledged
    assert in_the_lake(replica).height == 2


def test_a_forged_list_goes_aside(http, replica):
    http.get("/recommendations/v1/hal?k=2")
    replica.log.flush()
    shown = Shown(RecommendationRequest("hal", 1, request_id="forged"), RecommendationResponse([ScoredItem("x", 0.5, "als", 0.0)], "b", False),
                  round(datetime.now(UTC).timestamp() * 1000), 1.0)
    section, client = lists_section(replica.settings.stream, replica.settings.served), replica.store.client
    client.xadd(section.topic, {"event": SERVED.encode(as_list(shown))})
    client.xadd(section.topic, {"event": b"nothing of ours"})
    assert set(in_the_lake(replica)["user_id"]) == {"hal"}
    letters = [f[b"reason"].decode() for _, f in client.xrange(section.dead_letters)]
    assert len(letters) == 2 and "propensity not above 0 and at most 1" in letters


def test_who_is_erased_is_in_no_dead_letter(http, replica, monkeypatch):
    """What could not be used, of lists and of events, readable and not: over the real bus and consumer, then the command and the route."""
    settings, client = replica.settings, replica.store.client
    section, lists, codec = settings.stream, lists_section(settings.stream, settings.served), single_object_codec()
    shown = lambda who: Shown(RecommendationRequest(who, 1, request_id=f"list for {who}"), RecommendationResponse([ScoredItem("x", 0.5, "als", 0.0)], "b", False),
                              round(time.time() * 1000), 1.0)
    for who in ("joan-of-arc", "joan", "kim"):
        client.xadd(lists.topic, {"event": SERVED.encode(as_list(shown(who)))})
        client.xadd(section.topic, {"event": codec.encode({"event_id": f"e {who}", "ts": 2**42, "user_id": who, "item_id": "i", "event": "view"})})  # of the future
        for topic in (lists.topic, section.topic): client.xadd(topic, {"event": f"no Avro, from {who}".encode()})
    taken_from_the_bus(replica)
    dead = section.dead_letters, lists.dead_letters
    left = lambda: [fields[b"data"] for stream in dead for _, fields in client.xrange(stream)]
    assert len(left()) == 12 and all(b"kim" in client.dump(stream) for stream in dead)
    assert erase_letters(settings, ["kim", "nobody"]) == dict.fromkeys(dead, 2)
    assert len(left()) == 8 and not any(b"kim" in client.dump(stream) for stream in dead)
    monkeypatch.setattr("app.serve.load_settings", lambda: settings)
    assert http.delete("/users/v1/joan-of-arc").status_code == 200
    assert len(left()) == 4 and not any(b"joan-of-arc" in client.dump(stream) for stream in dead) and sum(b"joan" in x for x in left()) == 4
    assert erase_letters(settings, ["joan"]) == dict.fromkeys(dead, 2) and not left()
    client.xadd(section.topic, {"event": b"a later one"})
    taken_from_the_bus(replica)
    assert left() == [b"a later one"]
    kafka = settings.model_copy(update={"stream": section.model_copy(update={"bus": SecretStr("kafka://nowhere:9092")})})
    assert erase_letters(kafka, ["kim"]) is None


def test_letters_that_come_while_some_are_removed_stay(tmp_path):
    """And an end in the middle leaves all of them."""
    client, after = connect(Online(), tmp_path), []
    put = lambda who, n: [client.xadd("dead", {"data": f"no Avro {who} {k}".encode()}) for k in range(n)]
    for _ in range(3): put("ann", 400), put("bob", 400)
    before = [f[b"data"] for _, f in client.xrange("dead") if b"bob" in f[b"data"]]

    def slow(data: bytes) -> dict:
        if len(after) < 30 and b"ann 399" in data:  # the first look, and then while it is copied
            after.append(put("bob", 1))
            after.append(put("ann", 1))
        raise Malformed("not an event", "")
    assert forget_letters(client, "dead", {"ann"}, slow) >= 1_200
    data = [f[b"data"] for _, f in client.xrange("dead")]
    assert after and data[: len(before)] == before and len(data) == len(before) + len(after) // 2 and not [d for d in data if b"ann" in d]
    assert not client.exists("dead:kept") and b"ann" not in client.dump("dead") and client.ttl("dead") == -1
    put("ann", 700)

    def broken(data: bytes) -> dict:
        if data.endswith(b"ann 650"): raise RuntimeError("killed")
        raise Malformed("not an event", "")
    with pytest.raises(RuntimeError): forget_letters(client, "dead", {"an"}, lambda d: broken(d) if client.exists("dead:kept") else slow(d))
    assert client.xlen("dead") == len(data) + 700 and 0 < client.ttl("dead:kept") <= 3600
    assert forget_letters(client, "dead", {"ann"}, SERVED.decode) == 700 and [f[b"data"] for _, f in client.xrange("dead")] == data
    disconnect(client)


def test_consumers_end_together(replica, monkeypatch):
    def broken(*_: object, **__: object) -> None: raise ValueError("a defect")
    monkeypatch.setattr(app.consumer, "hold_lists", broken)
    replica.note(Shown(RecommendationRequest("ian", 1, request_id="i"), RecommendationResponse([], "b", False), 1, 1.0))
    replica.log.flush()
    ended = threading.Event()
    threading.Timer(30, ended.set).start()
    with pytest.raises(ValueError, match="a defect"): app.consumer.run(replica.settings, "t", ended.is_set)
    assert not ended.is_set()
