"""Both clients make the same calls: each is asked of the real app over HTTP, by one that waits and by one that is awaited."""
import asyncio
import inspect
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread

import pytest
from shop_floor import listening

import app.client
from app.client import AsyncClient, Call, Client, EndpointDown, EndpointError, NotAllowed, RequestRefused
from app.contract import create_app
from app.keys import load_keys
from app.ports import free_port
from app.serve import Replica
from reco.bundle import ModelBundle
from reco.features.store import OnlineStore
from reco.settings import Serving, Settings

CLIENT, ADMIN = "c" * 32, "a" * 32
Ask = Callable[..., object] # Ask("recommend", "u", k=3, address=…)

@pytest.fixture(scope="module")
def endpoint(bundle: ModelBundle, store: OnlineStore) -> Iterator[str]:
    replica = Replica()
    replica.bundle, replica.store = bundle, store
    replica.keys = load_keys(Settings(serving=Serving(client_keys=CLIENT, admin_keys=ADMIN)))
    with listening(create_app(replica)) as port: yield f"http://127.0.0.1:{port}"

@pytest.fixture(scope="module")
def shopper(store: OnlineStore) -> str: return next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)

def waits(address: str, name: str, *args: object, key: str = ADMIN, timeout_s: float = 5, **kwargs: object) -> object:
    with Client(address, timeout_s, key) as client: return getattr(client, name)(*args, **kwargs)

def is_awaited(address: str, name: str, *args: object, key: str = ADMIN, timeout_s: float = 5, **kwargs: object) -> object:
    async def ask() -> object:
        async with AsyncClient(address, timeout_s, key) as client: return await getattr(client, name)(*args, **kwargs)
    return asyncio.run(ask())

both = pytest.mark.parametrize("ask", [waits, is_awaited])

def described() -> set[str]: # the calls of the module
    made = lambda f: getattr(inspect.signature(f).return_annotation, "__origin__", None) is Call
    return {n.removeprefix("_") for n, f in vars(app.client).items() if inspect.isfunction(f) and made(f)} - {"listed"}

def test_each_client_has_every_call_as_it_is_described():
    names = described()
    assert names >= {"recommend", "similar", "bought_together", "session", "why", "send", "rollback"} and len(names) == 12
    for client in (Client, AsyncClient):
        assert {n for n in vars(client) if not n.startswith("_")} - {"close", "make"} == names
        for name in names:
            said, method = inspect.signature(getattr(app.client, f"_{name}")), getattr(client, name)
            mine = inspect.signature(method)
            assert list(mine.parameters)[1:] == list(said.parameters) and Call[mine.return_annotation] == said.return_annotation
            assert method.__doc__ and inspect.iscoroutinefunction(method) == (client is AsyncClient)

def test_both_get_the_same_answers(endpoint, shopper, bundle):
    item = waits(endpoint, "recommend", shopper, 1).ids[0]
    asked = {"recommend": (shopper, 7, "for_you", (), "price<1000", True), "recommendations": (shopper, 4), "similar": (item, 4, shopper), "session": ([{"item_id": item, "event": "view"}], 4),
             "bought_together": ([item, "a,b&c=d", "é/.."], 4), "why": (shopper, 5), "bundle_id": (), "ready": (), "bundle": ()}
    for name, args in asked.items():
        one, other = (f(endpoint, name, *args) for f in (waits, is_awaited))
        if name in ("recommend", "similar", "session", "bought_together"):
            assert one.request_id != other.request_id and len(one.ids) == args[1] and min(one.seconds, other.seconds) > 0
            one, other = (replace(x, request_id="", seconds=0, kept=False) for x in (one, other))
        if name == "why": one, other = (replace(x, about=x.about | {"seconds": 0}) for x in (one, other))
        assert one == other and one, name
    assert "reco_http_requests_total" in is_awaited(endpoint, "metrics") and is_awaited(endpoint, "bundle_id") == bundle.manifest["id"]
    assert is_awaited(endpoint, "recommend", shopper, request_id="r-9").request_id == "r-9"

def test_many_at_once_wait_together(endpoint, shopper):
    async def ask() -> list[list[str]]:
        async with AsyncClient(endpoint, 20, CLIENT) as client: return await asyncio.gather(*(client.recommend(u, 3) for u in [shopper, "nobody"] * 100))
    known, unknown = (waits(endpoint, "recommend", u, 3).ids for u in (shopper, "nobody"))
    assert [x.ids for x in asyncio.run(ask())] == [known, unknown] * 100 and known != unknown

@both
def test_what_is_refused_says_why_and_is_not_asked_again(ask, endpoint):
    with pytest.raises(RequestRefused, match="422: k must be a whole number from 1 to 100"): ask(endpoint, "recommend", "u", 500)
    with pytest.raises(NotAllowed, match="403"): ask(endpoint, "why", "u", key=CLIENT)
    with pytest.raises(NotAllowed, match="401"): ask(endpoint, "recommend", "u", key="")

@contextmanager
def saying(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[str]]]: # an address, and what was asked there
    "A server that gives these answers, one after the other."
    left, asked = list(answers), []
    async def other(scope: dict, receive: object, send: object) -> None:
        asked.append(scope["path"])
        status, body = left.pop(0)
        await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": body})
    with listening(other) as port: yield f"http://127.0.0.1:{port}", asked

@both
def test_what_is_busy_is_asked_again_and_what_goes_back_twice_is_not(ask, monkeypatch):
    monkeypatch.setattr("app.client.FIRST_S", 0.01)
    with saying((503, b"{}"), (429, b"{}"), (202, b'{"accepted": 2}')) as (address, asked):
        assert ask(address, "send", [{"event_id": "e"}]) == 2 and len(asked) == 3
    with saying((503, b'{"detail": "later"}')) as (address, asked), pytest.raises(EndpointError, match="503: later"): ask(address, "rollback", "ann", "test")
    assert len(asked) == 1
    with saying(*[(502, b'{"detail": "gone"}')] * 3) as (address, asked), pytest.raises(EndpointError, match="502: gone"): ask(address, "bundle_id")
    assert len(asked) == 3

@both
@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"recommendations": [{"item_id": "i"}]}', b'{"recommendations": null}'])
def test_an_answer_of_something_else_is_an_error(ask, body):
    with saying((200, body)) as (address, _), pytest.raises(EndpointError): ask(address, "recommend", "u")

@both
def test_nobody_and_silence_are_the_endpoint_being_down(ask):
    with pytest.raises(EndpointDown, match="cannot be reached"): ask(f"http://127.0.0.1:{free_port()}", "recommend", "u")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(EndpointDown, match=r"did not answer within 0\.3 s"): ask(f"http://127.0.0.1:{silent.getsockname()[1]}", "recommend", "u", timeout_s=0.3)
        assert time.monotonic() - began < 3

@both
def test_a_connection_that_breaks_is_tried_anew_and_then_given_up(ask, monkeypatch):
    monkeypatch.setattr("app.client.FIRST_S", 0.01)
    with breaking() as (address, count):
        with pytest.raises(EndpointDown, match="broke off"): ask(address, "bundle_id")
        assert count() == 3
        with pytest.raises(EndpointDown, match="broke off"): ask(address, "rollback")
        assert count() == 4

@contextmanager
def breaking() -> Iterator[tuple[str, Callable[[], int]]]:
    "A server that reads a request and closes the connection."
    taken, server = [], socket.create_server(("127.0.0.1", 0))
    def serve() -> None:
        while True:
            try: connection, _ = server.accept()
            except OSError: return
            with connection:
                taken.append(connection.recv(65_536))
    Thread(target=serve, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.getsockname()[1]}", lambda: len(taken)
    finally: server.close()

def test_a_pause_holds_up_nobody_else(monkeypatch):
    "While one call of the loop waits between two tries, another is made and answered."
    began = []
    monkeypatch.setattr("app.client.pause", lambda tries, said="": began.append(time.monotonic()) or 2.0)
    async def ask(busy: str, good: str) -> float: # seconds from the beginning of the pause to the other's answer
        async with AsyncClient(busy) as one, AsyncClient(good) as other:
            waiting = asyncio.create_task(one.bundle_id())
            while not began: await asyncio.sleep(0.005)
            await other.bundle_id()
            took = time.monotonic() - began[0]
            assert await waiting == "b" and time.monotonic() - began[0] >= 2
            return took
    with saying((503, b"{}"), (200, b'{"bundle_id": "b"}')) as (busy, _), saying((200, b'{"bundle_id": "b"}')) as (good, _): assert asyncio.run(ask(busy, good)) < 1.5
