"""The gateway with real NGINX: who gets through, how fast, how large, how slowly; and what the service behind it hears of."""

import asyncio
import base64
import hashlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from gateways import gateway
from shop_floor import listening

from app.ports import free_port

CLIENT, ADMIN = "c" * 40, "a" * 40
KEYS = {CLIENT: "client", ADMIN: "admin"}
PEOPLE = "ann:{SSHA}" + base64.b64encode(hashlib.sha1(b"secret" + b"salt").digest() + b"salt").decode() + "\n"


class Service:
    """Something behind the gateway that remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[dict] = []

    async def __call__(self, scope: dict, receive, send) -> None:
        if scope["type"] != "http": return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"): break
        self.heard.append({"method": scope["method"], "path": scope["path"], "body": body, "headers": {k.decode(): v.decode() for k, v in scope["headers"]}})
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps({"bytes": len(body)}).encode()})


@contextmanager
def fronted(**values: str) -> Iterator[tuple[httpx.Client, Service, int]]:
    """A client of a gateway with a service behind it."""
    service = Service()
    with listening(service) as port, gateway({"endpoint": port, "app": port, "mlflow": port}, KEYS, PEOPLE, **values) as (front, _), \
            httpx.Client(base_url=f"http://127.0.0.1:{front}", trust_env=False, timeout=20) as http: yield http, service, front


@pytest.fixture(scope="module")
def front() -> Iterator[tuple[httpx.Client, Service, int]]:
    with fronted() as found: yield found


def test_only_who_has_a_key_reaches_the_service(front):
    http, service, _ = front
    service.heard.clear()
    for path in ("/recommendations/v1/u", "/similar/v1/i", "/bought-together/v1?items=i", "/events/v1", "/items/v1/i", "/users/v1/u", "/why/v1/u", "/v1/bundle"):
        for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer wrong"}, {"X-API-Key": CLIENT[:-1]}, {"X-API-Key": CLIENT + "c"}):
            answer = http.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer" and answer.json()["status"] == 401, (path, headers)
            assert answer.headers["Content-Type"] == "application/problem+json"
    assert not service.heard
    for headers in ({"X-API-Key": CLIENT}, {"Authorization": f"Bearer {ADMIN}"}): assert http.get("/recommendations/v1/u", headers=headers).status_code == 200
    assert [h["headers"].get("x-api-key", h["headers"].get("authorization")) for h in service.heard] == [CLIENT, f"Bearer {ADMIN}"] # whose role it is, the endpoint judges
    refused = http.post("/events/v1", content=b"x" * 1_000_000)
    assert refused.status_code == 401 and len(service.heard) == 2


def test_what_is_for_those_inside_stays_inside(front):
    http, service, _ = front
    service.heard.clear()
    for path in ("/metrics", "/ready", "/recommendations", "/.env", "/v2/bundle"): assert http.get(path, headers={"X-API-Key": ADMIN}).status_code == 404, path
    assert not service.heard and http.get("/health").status_code == 200 and http.get("/docs").status_code == 200


def test_every_request_has_a_name_and_odd_ones_get_another(front):
    http, service, _ = front
    service.heard.clear()
    for name in ("shop-1.2:3", "a b", "x" * 200, ""): http.get("/recommendations/v1/u", headers={"X-API-Key": CLIENT, "X-Request-ID": name})
    named = [h["headers"]["x-request-id"] for h in service.heard]
    assert named[0] == "shop-1.2:3" and all(len(n) == 32 for n in named[1:]) and len({*named}) == 4
    http.get("/recommendations/v1/u", headers={"X-API-Key": CLIENT, "X-Forwarded-For": "1.2.3.4"})
    assert service.heard[-1]["headers"]["x-forwarded-for"] == "127.0.0.1"


def test_ids_arrive_as_they_were_sent(front):
    http, service, _ = front
    service.heard.clear()
    for sent, there in (("a%2Fb%20c", "/recommendations/v1/a/b c"), ("%E2%82%AC", "/recommendations/v1/€"), ("%2E%2E%2Fx", "/recommendations/v1/../x")):
        assert http.get(f"/recommendations/v1/{sent}", headers={"X-API-Key": CLIENT}).status_code == 200, sent
        assert service.heard[-1]["path"] == there


def test_headers_that_browsers_heed(front):
    http, _, _ = front
    for answer in (http.get("/recommendations/v1/u", headers={"X-API-Key": CLIENT}), http.get("/health"), http.get("/nothing")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Referrer-Policy"] == "same-origin", answer
        assert "nginx/" not in answer.headers["Server"] and "Strict-Transport-Security" not in answer.headers


def test_bodies_have_a_limit_and_the_service_never_hears_of_larger_ones(front):
    http, service, port = front
    service.heard.clear()
    key = {"X-API-Key": CLIENT}
    assert http.post("/events/v1", content=b"x" * 8_000_000, headers=key).json() == {"bytes": 8_000_000}
    large = http.post("/events/v1", content=b"x" * 9_000_000, headers=key)
    assert large.status_code == 413 and large.json()["status"] == 413 and len(service.heard) == 1
    with socket.create_connection(("127.0.0.1", port)) as s: # in pieces, without saying how much
        s.sendall(f"POST /events/v1 HTTP/1.1\r\nHost: x\r\nX-API-Key: {CLIENT}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with pytest.raises(OSError):
            for _ in range(90): s.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
            if b" 413 " in s.recv(1000): raise OSError("refused")
    assert len(service.heard) == 1
    assert http.get("/recommendations/v1/" + "x" * 40_000, headers=key).status_code == 414


def test_who_sends_a_byte_now_and_then_is_let_go():
    with fronted() as (http, service, port):
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for s in slow: s.sendall(f"GET /recommendations/v1/u HTTP/1.1\r\nHost: x\r\nX-API-Key: {CLIENT}\r\n".encode())
        began, gone = time.monotonic(), set()
        while len(gone) < len(slow) and time.monotonic() - began < 15:
            for n, s in enumerate(slow):
                try: s.sendall(b"X")
                except OSError: gone.add(n)
            time.sleep(0.5)
            assert http.get("/health").status_code == 200 # others go on
        took = time.monotonic() - began
        assert len(gone) == len(slow) and 4 < took < 12 and not [h for h in service.heard if h["path"] != "/health"], took
        for s in slow: s.close()


def flood(url: str, n: int, headers: list[dict]) -> list[httpx.Response]:
    """So many requests at once."""
    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=20), timeout=30) as http:
            return await asyncio.gather(*(http.get(url, headers=headers[i % len(headers)]) for i in range(n)))
    return asyncio.run(all_of_them())


def test_a_key_may_ask_so_often_and_no_more():
    with fronted(NGINX_KEY_RATE="20r/s", NGINX_KEY_BURST="10", NGINX_ADDRESS_RATE="2000r/s", NGINX_ADDRESS_BURST="2000") as (_, service, port):
        began, url = time.monotonic(), f"http://127.0.0.1:{port}/recommendations/v1/u"
        answers = flood(url, 200, [{"X-API-Key": CLIENT}])
        took = time.monotonic() - began
        passed, late = [a for a in answers if a.status_code == 200], [a for a in answers if a.status_code == 429]
        assert 11 <= len(passed) <= 12 + 20 * took and len(passed) + len(late) == 200 and len(service.heard) == len(passed)
        assert all(a.headers["Retry-After"] == "1" and a.json()["status"] == 429 for a in late)
        assert httpx.get(url, headers={"X-API-Key": ADMIN}, trust_env=False).status_code == 200 # another key has its own
        time.sleep(0.6)
        assert httpx.get(url, headers={"X-API-Key": CLIENT}, trust_env=False).status_code == 200


def test_guesses_count_for_the_address():
    with fronted(NGINX_ADDRESS_RATE="20r/s", NGINX_ADDRESS_BURST="10") as (_, service, port):
        answers = flood(f"http://127.0.0.1:{port}/recommendations/v1/u", 200, [{"X-API-Key": f"guess {n}"} for n in range(200)])
        assert {a.status_code for a in answers} == {401, 429} and sum(a.status_code == 401 for a in answers) < 100 and not service.heard


def test_a_read_that_was_refused_is_asked_again_and_a_write_is_not():
    with fronted() as (http, service, _):
        key = {"X-API-Key": CLIENT}
        with listening(broken := Broken()) as port, gateway({"endpoint": port}, KEYS) as (front, _), httpx.Client(base_url=f"http://127.0.0.1:{front}", trust_env=False) as other:
            broken.left = 1
            assert other.get("/recommendations/v1/u", headers=key).status_code == 200 and broken.asked == 2
            broken.left, broken.asked = 1, 0
            answer = other.post("/events/v1", json=[], headers=key)
            assert answer.status_code == 503 and broken.asked == 1
        assert http.get("/recommendations/v1/u", headers=key).status_code == 200 and service.heard


class Broken:
    """Is on its way out for the first requests: 503."""
    left, asked = 0, 0  # refusals to come, requests

    async def __call__(self, scope: dict, receive, send) -> None:
        self.asked += 1
        if self.left:
            self.left -= 1
            await send({"type": "http.response.start", "status": 503, "headers": []})
            return await send({"type": "http.response.body", "body": b""})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def test_pages_for_people_ask_for_a_password_and_keep_it(front):
    http, service, _ = front
    service.heard.clear()
    for path in ("/app/", "/mlflow/"):
        assert http.get(path).status_code == 401 and 'Basic realm="reco"' in http.get(path).headers["WWW-Authenticate"]
        assert http.get(path, auth=("ann", "wrong")).status_code == 401
        assert http.get(path, auth=("ann", "secret")).status_code == 200
        assert "authorization" not in service.heard[-1]["headers"]
    assert [h["path"] for h in service.heard] == ["/app/", "/"] and http.get("/").headers["Location"].endswith("/app/")


def test_a_service_that_is_away_is_said_so():
    with gateway({}, KEYS) as (port, _):
        answer = httpx.get(f"http://127.0.0.1:{port}/recommendations/v1/u", headers={"X-API-Key": CLIENT}, trust_env=False)
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "3" and "does not answer" in answer.json()["detail"]


def test_the_log_names_requests_and_no_keys():
    service = Service()
    with listening(service) as port, gateway({"endpoint": port}, KEYS) as (front, root), httpx.Client(base_url=f"http://127.0.0.1:{front}", trust_env=False) as http:
        http.get("/recommendations/v1/u?k=3", headers={"X-API-Key": CLIENT, "X-Request-ID": "r1"})
        http.get("/recommendations/v1/u", headers={"X-API-Key": "guessed"})
        time.sleep(0.2)
        lines = [json.loads(x) for x in (root / "access.log").read_text().splitlines()]
        assert [(x["request_id"], x["role"], x["status"]) for x in lines if x["request_id"] == "r1"] == [("r1", "client", 200)] and 401 in {x["status"] for x in lines}
        text = (root / "access.log").read_text() + (root / "error.log").read_text()
        assert CLIENT not in text and "guessed" not in text


def test_tls_by_one_setting(tmp_path):
    with_key = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt"]
    subprocess.run(with_key, check=True, capture_output=True)
    service, port, plain = Service(), free_port(), free_port()
    with listening(service) as behind, gateway({"endpoint": behind}, KEYS, files={n: (tmp_path / n).read_text() for n in ("tls.crt", "tls.key")}, NGINX_MODE="tls",
                                               NGINX_LISTEN=f"127.0.0.1:{port} ssl", NGINX_REDIRECT=f"127.0.0.1:{plain}") as (front, _):
        answer = httpx.get(f"https://127.0.0.1:{front}/recommendations/v1/u", headers={"X-API-Key": CLIENT}, verify=False, trust_env=False)
        assert answer.status_code == 200 and answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert service.heard[-1]["headers"]["x-forwarded-proto"] == "https"
        sent_on = httpx.get(f"http://127.0.0.1:{plain}/app/?a=1", trust_env=False)
        assert sent_on.status_code == 301 and sent_on.headers["Location"] == "https://127.0.0.1/app/?a=1"
        old = subprocess.run(["openssl", "s_client", "-connect", f"127.0.0.1:{front}", "-tls1_1"], input=b"", capture_output=True)
        assert b"Cipher is (NONE)" in old.stdout + old.stderr or old.returncode
