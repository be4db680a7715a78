"""Whatever happens to the endpoint, shoppers get their lists: two replicas of Ray Serve under load, one start for all of it."""

import shutil
import time
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from app.contract import create_app
from app.serve import Replica, open_intake
from benchmarks import never_down
from benchmarks.never_down import CLIENTS, Stage, fill, in_production, redis_with, small_disk, wait_until
from reco.bundle import current_name
from reco.data.bus import open_codec
from reco.features.store import open_store
from reco.published import history
from reco.redis_server import disconnect


@pytest.fixture(scope="module")
def stage(bundle_root, store, tmp_path_factory) -> Iterator[Stage]:
    if not shutil.which("redis-server"): pytest.skip("needs redis-server: make services")
    bundles = tmp_path_factory.mktemp("never_down") / "bundles"
    shutil.copytree(bundle_root, bundles)
    users = sorted(store.user_ids())[:200]
    with redis_with(store, users) as (server, disk), in_production(bundles, users, server, disk) as running: yield running


def went_well(found: dict[str, float]) -> bool:
    return found["failed"] == 0 and found["requests"] > 50


def test_a_bundle_is_swapped_without_one_failed_request(stage):
    found = never_down.swap(stage)
    assert went_well(found) and found["seconds"] < 30, found


def test_a_rollback_is_one_request_and_takes_seconds(stage):
    found = never_down.roll_back(stage)
    assert went_well(found) and found["seconds"] < 30, found
    last = history(stage.bundles)[-1]
    assert last.back and last.bundle_id == current_name(stage.bundles) and (last.who, last.why) == ("never_down", "a drill")


def test_a_corrupt_bundle_is_refused_by_all_replicas_and_the_old_one_goes_on(stage):
    found = never_down.corrupt(stage)
    assert went_well(found) and found["refused_by"] == 2, found


def test_without_redis_answers_are_degraded_and_counted_and_it_recovers(stage):
    found = never_down.redis_gone(stage)
    assert went_well(found) and found["degraded"] > 50 and found["seconds"] < 20, found


def test_without_room_events_are_refused_whole_and_lists_go_on(stage):
    found = never_down.disk_full(stage)
    assert went_well(found) and found["events_refused"] > 0 and found["seconds"] < 10, found


def test_a_killed_replica_costs_no_more_than_its_requests_in_flight(stage):
    found = never_down.replica_killed(stage)
    assert found["failed"] <= CLIENTS and found["requests"] > 50, found


@pytest.mark.parametrize("incident", [never_down.swap, never_down.corrupt])
def test_an_incident_that_does_not_come_to_its_end_is_told(stage, incident, monkeypatch):
    """The checks above can fail: what is published here nobody follows."""
    monkeypatch.setattr(never_down, "publish", lambda *_: None)
    monkeypatch.setattr(never_down, "PATIENCE_S", 1)
    with pytest.raises(never_down.NotServed, match="is not served|was not refused"): incident(stage)


# The embedded Redis ------------------------------------------------------------------------------------------------


def test_an_embedded_redis_on_a_full_disk_promises_nothing_and_lists_go_on(bundle, trained, tmp_path):
    """It writes each event down before it answers, and ends when it cannot: started again, it knows what it had promised."""
    with small_disk(tmp_path / "disk") as there:
        if not there: pytest.skip("needs a file system that this user may mount")
        settings = trained.settings.model_copy(update={"root": tmp_path / "disk"})
        replica = Replica()
        replica.bundle, replica.store, replica.intake = bundle, open_store(settings, timeout_s=1), open_intake(settings)
        http = TestClient(create_app(replica))
        sent: dict[str, int] = {}

        def send(name: str) -> int:
            events = [{"event_id": f"{name} {i}", "ts": round(time.time() * 1000) - 100, "user_id": "eva", "item_id": bundle.items["item_id"][i], "event": "view"}
                      for i in range(3)]
            sent[name] = http.post("/events/v1", json=events).status_code
            return sent[name]

        assert [send(f"room {n}") for n in range(3)] == [202] * 3
        ballast = fill(tmp_path / "disk")
        for n in range(20): # what was set aside for the file may take a few more
            assert send(f"full {n}") in (202, 503) and http.get("/recommendations/v1/eva").status_code == 200
        assert [send(f"fuller {n}") for n in range(3)] == [503] * 3
        ballast.unlink()
        wait_until(lambda: send(f"after {time.monotonic_ns()}") == 202, "events are refused although there is room")
        wait_until(lambda: "x-degraded" not in http.get("/recommendations/v1/eva").headers, "answers stay degraded")
        stream, codec = settings.stream, open_codec(settings.stream)
        bus = [codec.decode(f[b"event"])["event_id"].rsplit(" ", 1)[0] for _, f in replica.intake.producer.client.xrange(stream.topic)]
        assert {name: bus.count(name) for name in sent} == {name: 3 if status == 202 else 0 for name, status in sent.items()}
        disconnect(replica.intake.producer.client)
        replica.store.close()
