"""The client of the endpoint, against the real app over HTTP: endpoint up, down, busy and silent."""
import socket
import time
from collections.abc import Iterator

import pytest
from shop_floor import listening

from app.client import Client, EndpointDown, EndpointError, NotAllowed, RequestRefused, pause
from app.contract import create_app
from app.keys import load_keys
from app.ports import free_port, port_free
from app.serve import Replica
from reco.bundle import ModelBundle
from reco.features.store import OnlineStore
from reco.settings import Serving, Settings


@pytest.fixture(scope="module")
def endpoint(bundle: ModelBundle, store: OnlineStore) -> Iterator[int]:
    replica = Replica()
    replica.bundle, replica.store = bundle, store
    with listening(create_app(replica)) as port: yield port

@pytest.fixture(scope="module")
def shopper(store: OnlineStore) -> str:
    return next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)

# ---- the client

def test_the_client_gets_what_the_endpoint_recommends(endpoint, shopper, bundle):
    with Client(f"http://127.0.0.1:{endpoint}/") as client:
        items = client.recommendations(shopper, 7)
        assert len(items) == 7 and {x.item_id for x in items} <= set(bundle.items["item_id"])
        assert [x.score for x in items] == sorted((x.score for x in items), reverse=True)
        assert client.bundle_id() == bundle.manifest["id"]
        for odd in ("..", ".", "a/../b", "é\n\x00", "%2F", "?k=1#x"): assert len(client.recommendations(odd, 2)) == 2

def test_a_refusal_carries_the_reason(endpoint):
    with Client(f"http://127.0.0.1:{endpoint}") as client, pytest.raises(RequestRefused, match="422: k must be a whole number from 1 to 100"):
        client.recommendations("u", 500)

def test_every_kind_of_list_and_how_it_came_about(endpoint, shopper, bundle):
    with Client(f"http://127.0.0.1:{endpoint}") as client:
        known = client.recommend(shopper, 4, request_id="r-1")
        item = known.ids[0]
        assert (known.request_id, known.bundle_id, known.fallback, known.without) == ("r-1", bundle.manifest["id"], False, ()) and known.seconds > 0
        assert client.recommend("nobody yet").fallback
        for found in (client.similar(item, 3, shopper), client.bought_together([item, "a,b&c=d"], 3), client.recommend(shopper, 3, "similar", [item])):
            assert len(found.ids) == 3 and item not in found.ids and found.request_id
        visit = client.session([{"item_id": item, "event": "view"}], 3)
        assert len(visit.ids) == 3 and not visit.fallback and client.session([], 3).fallback
        said = client.recommend(shopper, 3, explain=True).items[0].why
        assert said.reason and said.base + sum(c["log_odds"] for c in said.contributions) + said.rest == pytest.approx(said.log_odds)
        assert client.ready()["status"] == "ready" and "reco_http_requests_total" in client.metrics()

def test_a_list_taken_apart_is_the_list(endpoint, shopper, bundle, store):
    with Client(f"http://127.0.0.1:{endpoint}") as client:
        made, listed = client.why(shopper, 8), client.recommend(shopper, 8)
        assert [x.item_id for x in made.items] == [c["item_id"] for c in made.candidates[:8]] == listed.ids
        assert [x.score for x in made.items] == [c["score"] for c in made.candidates[:8]] == [x.score for x in listed.items]
        places = [c["place"] for c in made.candidates]
        assert sorted(places) == list(range(1, made.about["count"] + 1)) and places[8:] == sorted(places[8:]) and made.about["count"] > 50
        assert [c["slot"] for c in made.candidates[:9]] == [*range(1, 9), None] and all(x.why.sources for x in made.items)
        assert {c["fate"] for c in made.candidates[:8]} == {"shown"} and "shown" not in {c["fate"] for c in made.candidates[8:]}
        for rule, n in made.about["dropped"].items():
            if rule in ("out_of_stock", "recently_bought", "banned"): assert n == sum(c["fate"] == rule for c in made.candidates)
        for source, n in made.about["proposed"].items(): assert n == sum(source in c["sources"] for c in made.candidates)
        newest = sorted(store.events(shopper), key=lambda e: -e.ts)[0]
        assert (made.about["past"][0]["item_id"], made.about["past"][0]["ts"]) == (newest.item_id, newest.ts)
        page = client.why(shopper, 4, "similar", [listed.ids[0]])
        assert len(page.items) == 4 and listed.ids[0] not in {c["item_id"] for c in page.candidates if c["fate"] == "shown"}
        with pytest.raises(RequestRefused, match="for_you takes no context"): client.why(shopper, 4, "for_you", ["x"])

def test_keys_say_who_may_look_behind_a_list(bundle, store):
    replica = Replica()
    replica.bundle, replica.store = bundle, store
    replica.keys = load_keys(Settings(serving=Serving(client_keys="c"*32, admin_keys="a"*32)))
    with listening(create_app(replica)) as port:
        ask = lambda key: Client(f"http://127.0.0.1:{port}", key=key)
        with ask("a"*32) as client: assert client.why("u", 3).items and client.recommend("u", 3, explain=True).items[0].why
        with ask("c"*32) as client:
            assert len(client.recommendations("u", 3)) == 3
            with pytest.raises(NotAllowed, match="403"): client.why("u", 3)
        with ask("") as client, pytest.raises(NotAllowed, match="401"): client.recommend("u")

def test_what_is_busy_is_asked_again_and_what_is_refused_is_not(monkeypatch):
    monkeypatch.setattr("app.client.FIRST_S", 0.01)
    said, asked = [(503, b"{}"), (503, b"{}"), (202, b'{"accepted": 2}')], []
    async def other(scope: dict, receive: object, send: object) -> None:
        asked.append(scope["path"])
        status, body = said.pop(0)
        await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": body})
    with listening(other) as port, Client(f"http://127.0.0.1:{port}") as client:
        assert client.send([{"event_id": "e"}]) == 2 and len(asked) == 3
        said[:] = [(422, b'{"detail": "no"}'), (200, b"{}")]
        with pytest.raises(RequestRefused, match="422: no"): client.send([{"event_id": "e"}])
        said[:] = [(503, b'{"detail": "later"}')]
        with pytest.raises(EndpointError, match="later"): client.rollback("ann", "test") # done twice it would go back twice
        assert len(asked) == 5
        said[:] = [(503, b'{"detail": "later"}')]*3
        with pytest.raises(EndpointError, match="503: later"): client.bundle_id()

def test_pauses_double_differ_and_end():
    drawn = [[pause(n) for _ in range(200)] for n in (1, 2, 10)]
    assert all(0.05 <= x <= 0.1 for x in drawn[0]) and all(0.1 <= x <= 0.2 for x in drawn[1]) and all(1 <= x <= 2 for x in drawn[2])
    assert len({*drawn[0]}) > 100 and 1 <= pause(1, "2") <= 2 and pause(1, "Wed, 21 Oct") <= 0.1

def test_nobody_there_is_said_at_once():
    with Client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(EndpointDown, match="cannot be reached"):
        client.recommendations("u")

def test_a_silent_endpoint_is_given_up_on():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3) as client, \
                pytest.raises(EndpointDown, match="did not answer within 0.3 s"):
            client.recommendations("u")
        assert time.monotonic() - began < 3

@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"recommendations": [{"item_id": "i"}]}', b'{"recommendations": null}'])
def test_an_answer_of_something_else_is_an_error(body):
    async def other(scope: dict, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})
    with listening(other) as port, Client(f"http://127.0.0.1:{port}") as client, pytest.raises(EndpointError): client.recommendations("u")

def test_a_busy_port_is_seen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_free("127.0.0.1", port)
    assert port_free("127.0.0.1", port)
