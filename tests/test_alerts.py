"""Events are logged and sent once, to a real receiver that fails in every way it can; nothing of that fails a flow."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from pydantic import SecretStr
from test_lake_s3 import KEY, SECRET, bucket, start_moto

from app.ports import free_port
from reco import alerts
from reco.alerts import LOG, Event, Send, Webhook, events, message, send, tell
from reco.data.objects import ObjectError, Objects
from reco.settings import Lake

ROOT = Path(__file__).parents[1]

EVENT = Event("promotion_refused", "PromoteFlow/7", "b2 is no better", "promotion/b2", {"bundle": "b2"})


class Receiver(ThreadingHTTPServer):
    """Answers with `answers` one after the other, then 200; keeps what it was sent. 0 hangs up, -1 takes a second."""

    def __init__(self, *answers: int) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers, self.seen = list(answers), []

    @property
    def url(self) -> str: return f"http://127.0.0.1:{self.server_port}/services/T0/B0/secret"


class Answer(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.headers["Content-Type"], self.headers["Idempotency-Key"], json.loads(body)))
        status = self.server.answers.pop(0) if self.server.answers else 200
        if status == 0: return self.connection.close()
        if status == -1: time.sleep(1)
        self.send_response(200 if status < 0 else status)
        if status == 302: self.send_header("Location", self.server.url)
        self.end_headers()

    def do_GET(self) -> None:
        self.server.seen.append(("GET", None, {}))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_) -> None: pass


@contextmanager
def receiver(*answers: int) -> Iterator[Receiver]:
    server = Receiver(*answers)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def log(tmp_path: Path) -> Path: return tmp_path / "bundles"


def hook(server: Receiver) -> dict[str, Send]: return {"webhook": partial(send, Webhook(server.url, 0.4, pause_seconds=0.001))}


def test_an_event_is_logged_and_sent_once(log):
    with receiver() as server:
        first = tell(log, EVENT, hook(server))
        again = tell(log, replace(EVENT, who="PromoteFlow/8"), hook(server))
        other = tell(log, replace(EVENT, key="promotion/b3"), hook(server))
    assert [(t.new, t.sent, t.trouble) for t in (first, again, other)] == [(n, ("webhook",), {}) for n in (True, False, True)]
    assert [(e["what"], e["who"], e["key"], e["about"]) for e in events(log)] == [
        ("promotion_refused", "PromoteFlow/7", "promotion/b2", {"bundle": "b2"}),
        ("promotion_refused", "PromoteFlow/7", "promotion/b3", {"bundle": "b2"})]
    kind, key, body = server.seen[0]
    assert len(server.seen) == 2 and kind == "application/json" and key == "promotion/b2" and body == message(EVENT)
    assert list(body) == ["text"] and "b2 is no better" in body["text"] and "PromoteFlow/7" in body["text"]


@pytest.mark.parametrize(("answers", "tries", "sent"), [
    ([500], 2, True), ([429, 503], 3, True), ([0], 2, True), ([-1], 2, True), # it answers at last
    ([500] * 4, 4, False), # it never does
    ([404], 1, False), ([400], 1, False), # it has said no
    ([302], 1, False), # and not: it was told to look elsewhere, found a page there, and took that for a yes
])
def test_what_is_tried_again(log, answers, tries, sent):
    with receiver(*answers) as server: told = tell(log, EVENT, hook(server))
    assert len(server.seen) == tries and bool(told.sent) == sent and bool(told.trouble) != sent and len(events(log)) == 1
    assert "secret" not in str(told.trouble)


def test_what_could_not_be_sent_is_sent_when_it_is_told_again(log):
    with receiver(404) as server:
        assert not tell(log, EVENT, hook(server)).sent
        assert tell(log, EVENT, hook(server)).sent
        assert tell(log, EVENT, hook(server)).sent
    assert len(server.seen) == 2 and len(events(log)) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:{free}/x", "http://no.such.host.invalid/secret", "file:///etc/hostname",
                                 "hooks.slack.com/secret", "http://[bad/secret"])
def test_a_dead_receiver_raises_nothing(log, url):
    pauses: list[float] = []
    dead = Webhook(url.format(free=free_port()), 0.4, tries=3, pause_seconds=2)
    told = tell(log, EVENT, {"webhook": partial(send, dead, sleep=pauses.append)})
    assert told.new and not told.sent and told.trouble["webhook"] and "secret" not in str(told.trouble) and len(events(log)) == 1
    assert pauses == ([2, 4] if "free" in url or "invalid" in url else [])


def test_without_a_receiver_there_is_the_log(log):
    assert tell(log, EVENT, {}).new and not tell(log, EVENT, {}).new
    assert [e["text"] for e in events(log)] == ["b2 is no better"]


def test_a_line_that_was_cut_short_spoils_no_other(log):
    tell(log, EVENT, {})
    with (log / LOG).open("ab") as file: file.write(b'{"at": "2026-05-01", "wha\xff')
    tell(log, replace(EVENT, key="promotion/b3"), {})
    assert [e["key"] for e in events(log)] == ["promotion/b2", "promotion/b3"]
    assert len((log / LOG).read_text(errors="replace").splitlines()) == 3


def test_a_receiver_misses_nothing_for_another(log):
    heard: list[str] = []
    both = {"dead": lambda e: "away", "argo": lambda e: heard.append(e.key) or ""}
    for _ in range(2):
        told = tell(log, EVENT, both)
        assert told.sent == ("argo",) and told.trouble == {"dead": "away"}
    assert heard == ["promotion/b2"]
    assert tell(log, EVENT, both | {"dead": lambda e: ""}).sent == ("dead", "argo") and heard == ["promotion/b2"]


def test_slack_finds_no_markup_in_a_name():
    text = message(replace(EVENT, text="<!channel> & <b2>", who="a > b", about={"bundle": "<!here>"}))["text"]
    assert "<" not in text.replace("&lt;", "") and ">" not in text.replace("&gt;", "") and "&lt;!channel&gt; &amp;" in text
    assert len(message(replace(EVENT, text="x" * 99_999))["text"]) <= 3_000


def told_at_once(path: str, url: str) -> bool: return bool(tell(Path(path), EVENT, {"webhook": partial(send, Webhook(url))}).sent)


def test_several_that_see_the_same_send_it_once(log):
    with receiver() as server:
        with ProcessPoolExecutor(4) as pool:
            assert all(pool.map(told_at_once, [str(log)] * 12, [server.url] * 12))
    assert len(server.seen) == 1 and len(events(log)) == 1 and len((log / LOG).read_text().splitlines()) == 2


def test_a_key_of_any_letters_is_a_header(log):
    with receiver() as server: assert tell(log, replace(EVENT, key="drift/größe\n/☃"), hook(server)).sent
    assert server.seen[0][1] == "drift/gr\\xf6\\xdfe /\\u2603"


# In a bucket --------------------------------------------------------------------------------------------------------


def test_the_log_in_a_bucket_loses_no_line(monkeypatch):
    server, at = start_moto()
    try:
        section = Lake(endpoint=at, access_key=SecretStr(KEY), secret_key=SecretStr(SECRET))
        root = f"s3://{bucket(at)}/shop/bundles"
        heard: list[str] = []
        to = {"webhook": lambda e: heard.append(e.key) or ""}
        with ThreadPoolExecutor(3) as pool:
            told = list(pool.map(lambda n: tell(Objects(root, section), replace(EVENT, key=f"k{n}"), to), range(6)))
        assert all(t.new and t.sent == ("webhook",) for t in told)
        again = [tell(Objects(root, section), replace(EVENT, key=f"k{n}"), to) for n in range(6)]
        assert not any(t.new for t in again) and sorted(heard) == [f"k{n}" for n in range(6)]
        assert sorted(e["key"] for e in events(Objects(root, section))) == sorted(heard)
        write, late = alerts.write, ['{"what": "else", "key": "another"}\n']

        def overtaken(objects: Objects, name: str, text: str, over: str) -> None:
            """Somebody adds a line between our reading and our writing."""
            if late: write(objects, name, alerts.text_of(objects, name).text + late.pop())
            write(objects, name, text, over=over)
        monkeypatch.setattr(alerts, "write", overtaken)
        tell(Objects(root, section), replace(EVENT, key="k7"), {})
        assert [e["key"] for e in events(Objects(root, section))][-2:] == ["another", "k7"]
        with pytest.raises(ObjectError, match="s3://nowhere/bundles"): tell(Objects("s3://nowhere/bundles", section), EVENT, to)
    finally:
        server.terminate()
        server.wait()


# From a flow --------------------------------------------------------------------------------------------------------

FLOW = """
from base import PROJECT
from events import tell
from metaflow import FlowSpec, project, step

@project(name=PROJECT)
class SayFlow(FlowSpec):
    @step
    def start(self):
        tell("retrain_asked", "PSI of price is 0.31", {"feature": "price", "psi": 0.31}, key="retrain/2026-05-02")
        self.next(self.end)

    @step
    def end(self):
        tell("retrain_asked", "PSI of price is 0.31", {"feature": "price", "psi": 0.31}, key="retrain/2026-05-02")

if __name__ == "__main__": SayFlow()
"""


def say(folder: Path, settings: str, **more: str) -> str:
    """What a flow prints that tells the same thing in both of its steps."""
    (folder / "settings.ini").write_text(settings)
    (folder / "say.py").write_text(FLOW)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECO_", "METAFLOW_"))}
    env = kept | {"RECO_SETTINGS": str(folder / "settings.ini"), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "flows")])} | more
    done = subprocess.run([sys.executable, "say.py", "run"], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_flow_tells_people_and_argo_once(tmp_path):
    with receiver(500) as people, receiver() as argo:
        said = say(tmp_path, f"[alerts]\nwebhook = {people.url}\n", METAFLOW_ARGO_EVENTS_WEBHOOK_URL=argo.url)
    assert "secret" not in said and "warning" not in said
    assert len(people.seen) == 2 and "*retrain asked*: PSI of price is 0.31\nfeature price, psi 0.31\n_SayFlow/" in people.seen[1][2]["text"]
    ((_, _, event),) = argo.seen
    assert event["name"] == event["payload"]["name"] and event["name"].startswith("mfns.reco.user.") and event["name"].endswith(".retrain_asked")
    assert event["payload"]["psi"] == "0.31" and event["payload"]["key"] == "retrain/2026-05-02"
    (line,) = events(tmp_path / "data" / "bundles")
    assert line["what"] == "retrain_asked" and line["who"].startswith("SayFlow/") and line["about"] == {"feature": "price", "psi": 0.31}


def test_dead_receivers_and_a_log_that_cannot_be_written_fail_no_flow(tmp_path):
    dead = f"http://127.0.0.1:{free_port()}/secret"
    (tmp_path / "file").write_text("not a folder")
    with receiver() as argo:
        said = say(tmp_path, f"[bundles]\nroot = file/bundles\n[alerts]\nwebhook = {dead}\ntries = 1\n", METAFLOW_ARGO_EVENTS_WEBHOOK_URL=argo.url)
    assert said.count("warning: retrain_asked has not reached the log") == 2 and said.count("has not reached webhook: the receiver cannot be reached") == 2
    assert "secret" not in said and len(argo.seen) == 2 # said twice, where nobody can know that it was said
