"""What shoppers see while something happens to the endpoint: a bundle is published, taken back or no good, Redis ends, a replica ends, the disk is full.

Lists are asked for all the while, a fixed number a second, by clients of their own; events are sent beside them. Each row is one such incident:
answers that were no 200 (`failed`), the slowest one, and the seconds until everything was as before. The endpoint is the one of
production with two replicas and a Redis of its own that forgets nothing (`appendonly`), on a file system of a few MB where this may be
mounted: there the disk is really full. `tests/test_never_down.py` holds the same incidents to what is promised.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import polars as pl
import psutil
import redis
import uvicorn

from app.contract import create_app
from app.meter import FOLDER
from app.ports import free_port
from app.serve import Replica, open_intake
from benchmarks.endpoint import Made, NotServed, figures, path_of, reported, running, shop_arguments, shop_of
from reco.bundle import current_name, latest_bundle
from reco.data.bus import open_codec
from reco.features.store import OnlineStore, open_store
from reco.published import publish
from reco.settings import load_settings

CLIENTS, EACH_S = 4, 0.04    # clients, and how often each of them asks: 100 lists a second
CALM_S, PATIENCE_S = 1.0, 180 # of load before an incident and after it; the longest that one may last
DISK_MB = 24                 # of the file system that is filled up

# ---- a Redis that can be ended ----------------------------------------------------------------------------------------


class Redis:
    """A server of its own on loopback, its data in a folder; ended and started again at will."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.password = folder, free_port(), secrets.token_hex(8)
        self.program, self.process = shutil.which("redis-server"), None
        if not self.program: raise NotServed("there is no redis-server here: make services")

    @property
    def url(self) -> str: return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis: return redis.Redis(port=self.port, password=self.password, socket_timeout=5)

    def start(self) -> None:
        """Until it answers."""
        options = {"port": self.port, "bind": "127.0.0.1", "requirepass": self.password, "dir": self.folder, "save": "", "appendonly": "yes",
                   "logfile": self.folder.parent / "redis.log", "auto-aof-rewrite-percentage": 0}
        self.process = subprocess.Popen([self.program, *(str(x) for k, v in options.items() for x in (f"--{k}", v))])
        wait_until(self.answers, "Redis does not answer")

    def answers(self) -> bool:
        """Whether it has read its data."""
        try: return self.client().ping()
        except redis.RedisError: return False

    def kill(self) -> None:
        """No farewell, nothing written down on the way."""
        self.process.kill()
        self.process.wait()


@contextmanager
def small_disk(folder: Path, mb: int = DISK_MB) -> Iterator[bool]:
    """A file system of a few MB at a folder, where this user may mount one; says whether there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mb}m", "tmpfs", str(folder)], capture_output=True).returncode == 0 if os.geteuid() == 0 else False
    try: yield done
    finally:
        if done: subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no room beside it, not for one byte; whoever removes it makes room again."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as f:
        for size in (2**20, 4096, 1):
            try:
                while True: f.write(b"x" * size)
            except OSError: pass
    return ballast


def wait_until(true: Callable[[], bool], otherwise: str) -> float:
    """Seconds until it is so; raises `NotServed` when it never is."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > PATIENCE_S: raise NotServed(f"{otherwise} (waited {PATIENCE_S} s)")
        time.sleep(0.02)
    return time.monotonic() - began


# ---- load -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One answer."""

    at: float        # monotonic, when it was asked for
    seconds: float
    status: int      # 0: no answer
    bundle_id: str
    degraded: bool   # without the store


@dataclass
class Load:
    """Clients that ask for lists, each at fixed moments, until the block ends."""

    url: str
    users: list[str]
    seen: list[Seen] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def ask(self, http: httpx.Client, user: str) -> Seen:
        """One list."""
        at = time.monotonic()
        try: answer = http.get(path_of(user))
        except httpx.TransportError: return Seen(at, time.monotonic() - at, 0, "", False)
        took, said = time.monotonic() - at, answer.headers
        return Seen(at, took, answer.status_code, said.get("x-bundle-id", ""), "store" in said.get("x-degraded", ""))

    def client(self, n: int) -> None:
        """One of them."""
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as http:
            due = time.monotonic() + n * EACH_S / CLIENTS
            for user in self.users[n::CLIENTS] * 10_000:
                if self.ended.wait(max(0, due - time.monotonic())): return
                self.seen.append(self.ask(http, user))
                due = max(due + EACH_S, time.monotonic())

    def __enter__(self) -> "Load":
        self.threads = [threading.Thread(target=self.client, args=(n,), daemon=True) for n in range(CLIENTS)]
        for t in self.threads: t.start()
        time.sleep(CALM_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for t in self.threads: t.join()

    def since(self, at: float) -> list[Seen]:
        """Answers to what was asked from a moment on."""
        return [s for s in self.seen if s.at >= at]

    def metrics(self) -> dict[str, float]:
        """Of all that was asked."""
        ms = 1000 * np.array([s.seconds for s in self.seen])
        return {"requests": len(ms), "failed": sum(s.status != 200 for s in self.seen), "p50_ms": round(float(np.median(ms)), 2),
                "p99_ms": round(float(np.quantile(ms, 0.99)), 2), "longest_ms": round(float(ms.max()), 1)}


# ---- what it happens to -----------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A running endpoint and what can be done to it."""

    url: str
    bundles: Path                # folder that it follows
    users: list[str]             # with a past
    items: list[str]
    redis: Redis
    disk: Path|None              # a small file system with Redis's data, where there is one
    replicas: Callable[[], list[psutil.Process]]

    def http(self) -> httpx.Client:
        """A client of its own."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def figure(self, name: str) -> float:
        """The sum of one of `/metrics`, over labels and replicas."""
        with self.http() as http: return sum(v for k, v in figures(http.get("/metrics").text).items() if k.split()[0] == name)

    def bundle_ids(self, n: int = 12) -> set[str]:
        """Of some answers, each through a new connection: replicas take turns."""
        return {self.http().get(path_of(self.users[i % len(self.users)])).headers["x-bundle-id"] for i in range(n)}

    def follow(self, name: str) -> float:
        """Seconds until every replica answers with a bundle."""
        return wait_until(lambda: self.bundle_ids() == {name}, f"{name} is not served")

    def events(self, name: str, n: int = 3) -> list[dict]:
        """Views of one shopper, just now."""
        return [{"event_id": f"{name} {i}", "ts": round(time.time() * 1000), "user_id": f"shopper {name}", "item_id": self.items[i], "event": "view"} for i in range(n)]

    def on_the_bus(self) -> list[str]:
        """Names of the events that Redis has, in their order; each is whole, or it could not be decoded."""
        stream = load_settings().stream
        codec = open_codec(stream)
        return [codec.decode(fields[b"event"])["event_id"] for _, fields in self.redis.client().xrange(stream.topic)]


def twin(bundles: Path, name: str, of: str = "") -> str:
    """The name of a bundle that differs from another by nothing but its name."""
    source = bundles / (of or current_name(bundles))
    shutil.copytree(source, bundles / name, dirs_exist_ok=True)
    manifest = json.loads((source / "manifest.json").read_text()) | {"id": name}
    (bundles / name / "manifest.json").write_text(json.dumps(manifest))
    return name


# ---- incidents: each returns its figures; raises `NotServed` when what is to come does not -----------------------------


def calm(stage: Stage) -> dict[str, float]:
    """Nothing: what the machine makes of the load alone."""
    with Load(stage.url, stage.users) as load: time.sleep(4 * CALM_S)
    return load.metrics() | {"seconds": 0}


def swap(stage: Stage) -> dict[str, float]:
    """Another bundle is published."""
    name = twin(stage.bundles, f"next-{time.monotonic_ns()}")
    with Load(stage.url, stage.users) as load:
        at = time.monotonic()
        publish(stage.bundles / name, "never_down")
        stage.follow(name)
        time.sleep(CALM_S)
    last = max(s.at + s.seconds for s in load.seen if s.bundle_id != name)
    return load.metrics() | {"seconds": round(max(0, last - at), 2)}


def roll_back(stage: Stage) -> dict[str, float]:
    """What is served is taken back over HTTP, by an admin."""
    before = current_name(stage.bundles)
    publish(stage.bundles / twin(stage.bundles, f"worse-{time.monotonic_ns()}"), "never_down")
    stage.follow(current_name(stage.bundles))
    with Load(stage.url, stage.users) as load, stage.http() as http:
        at = time.monotonic()
        answer = http.post("/v1/bundle/rollback", json={"who": "never_down", "why": "a drill"})
        if answer.status_code != 200 or answer.json()["bundle_id"] != before: raise NotServed(f"not rolled back to {before}: {answer.text}")
        stage.follow(before)
        time.sleep(CALM_S)
    last = max(s.at + s.seconds for s in load.seen if s.bundle_id != before)
    return load.metrics() | {"seconds": round(max(0, last - at), 2)}


def corrupt(stage: Stage) -> dict[str, float]:
    """A bundle is published in which one byte is wrong; in the end it is taken back."""
    before, name, refused = current_name(stage.bundles), twin(stage.bundles, f"corrupt-{time.monotonic_ns()}"), stage.figure("reco_bundles_refused_total")
    with (stage.bundles / name / "known.npy").open("r+b") as f:
        f.seek(-1, 2)
        byte = f.read(1)
        f.seek(-1, 2)
        f.write(bytes([byte[0] ^ 1]))
    with Load(stage.url, stage.users) as load, stage.http() as http:
        at = time.monotonic()
        publish(stage.bundles / name, "never_down")
        everyone = max(1, len(stage.replicas()))
        wait_until(lambda: stage.figure("reco_bundles_refused_total") == refused + everyone, f"{name} was not refused by {everyone}")
        seconds, ready = time.monotonic() - at, http.get("/ready").json()
        time.sleep(CALM_S)
        if {s.bundle_id for s in load.seen if s.status == 200} != {before}: raise NotServed(f"answers came from other bundles than {before}")
        if ready.get("refused", {}).get("bundle_id") != name or "known.npy" not in ready["refused"]["reason"]: raise NotServed(f"/ready does not say what is wrong: {ready}")
        http.post("/v1/bundle/rollback")
        wait_until(lambda: all("refused" not in stage.http().get("/ready").json() for _ in range(8)), "the refusal was not taken back")
    return load.metrics() | {"seconds": round(seconds, 2), "refused_by": everyone}


def redis_gone(stage: Stage, down_s: float = 2) -> dict[str, float]:
    """Redis is killed, and comes back later."""
    counted = lambda: sum(v for k, v in figures(stage.http().get("/metrics").text).items() if k.startswith("reco_lists_total ") and "degraded=true" in k)
    before = counted()
    with Load(stage.url, stage.users) as load, stage.http() as http:
        gone = time.monotonic()
        stage.redis.kill()
        time.sleep(down_s)
        event = http.post("/events/v1", json=stage.events("while it is gone")).status_code
        ready = http.get("/ready").json()
        stage.redis.start()
        back = time.monotonic()
        wait_until(lambda: len(since := load.since(max(back, time.monotonic() - 1))) > 20 and not any(s.degraded for s in since), "answers stay degraded")
    degraded = [s for s in load.seen if s.degraded]
    if event != 503 or ready["store"] != "down": raise NotServed(f"without Redis POST /events was answered with {event}, /ready with {ready}")
    if counted() - before != len(degraded): raise NotServed(f"{len(degraded)} answers were degraded, /metrics counted {counted() - before:g}")
    again = stage.http().post("/events/v1", json=stage.events(f"back {time.monotonic_ns()}")).status_code
    if again != 202: raise NotServed(f"with Redis back POST /events was answered with {again}")
    undegraded = [s for s in load.seen if gone + 0.5 < s.at < back - 0.5 and not s.degraded and s.status == 200]
    if undegraded: raise NotServed(f"{len(undegraded)} answers without Redis do not say so")
    return load.metrics() | {"degraded": len(degraded), "seconds": round(max(0, max(s.at + s.seconds for s in degraded) - back), 2)}


def answers_lists(replica: psutil.Process) -> bool:
    """Whether it has answered one, by the file of its figures."""
    try: return b"/recommendations/" in (Path(replica.environ()[FOLDER]) / f"counter_{replica.pid}.db").read_bytes()
    except (psutil.Error, OSError): return False


def whole_list(stage: Stage, user_id: str) -> list[str]:
    """Its items; one that was made without a source, which was late on a busy machine, is asked for again."""
    answers: list[httpx.Response] = []

    def whole() -> bool:
        answers[:] = [stage.http().get(path_of(user_id))]
        return "x-degraded" not in answers[0].headers

    wait_until(whole, f"every list of {user_id} is degraded")
    return [x["item_id"] for x in answers[0].json()["recommendations"]]


def replica_killed(stage: Stage) -> dict[str, float]:
    """One of the replicas is killed; another one takes its place."""
    lists = lambda: {u: whole_list(stage, u) for u in stage.users[:30]}
    before, there = lists(), {p.pid for p in stage.replicas()}
    with Load(stage.url, stage.users) as load:
        at = time.monotonic()
        os.kill(min(there), signal.SIGKILL)
        wait_until(lambda: any(answers_lists(p) for p in stage.replicas() if p.pid not in there), "no replica came in its place")
        seconds = time.monotonic() - at
        time.sleep(CALM_S)
    if (after := lists()) != before: raise NotServed(f"{sum(after[u] != before[u] for u in before)} of {len(before)} lists changed")
    return load.metrics() | {"in_flight_at_most": CLIENTS, "seconds": round(seconds, 2)}


def disk_full(stage: Stage) -> dict[str, float]:
    """There is no room for events: the disk is full, or, without one that may be filled, Redis's memory is."""
    full_s, client = 2.0, stage.redis.client()
    if stage.disk is None: client.config_set("maxmemory-policy", "noeviction")
    sent: dict[str, int] = {}  # name of a request → its status

    def send(http: httpx.Client, name: str) -> int:
        sent[name] = http.post("/events/v1", json=stage.events(name)).status_code
        return sent[name]

    run = time.monotonic_ns()
    with Load(stage.url, stage.users) as load, stage.http() as http:
        send(http, f"room {run}")
        ballast = fill(stage.disk) if stage.disk else client.config_set("maxmemory", 1)
        until, n = time.monotonic() + full_s, 0
        while time.monotonic() < until:
            n += 1
            send(http, f"full {run} {n}")
        if stage.disk: ballast.unlink()
        else: client.config_set("maxmemory", 0)
        back = time.monotonic()
        wait_until(lambda: send(http, f"after {run} {time.monotonic_ns()}") == 202, "events are refused although there is room")
        seconds = time.monotonic() - back
    bus, of = stage.on_the_bus(), {x: s for x, s in sent.items() if x.startswith("full")}
    for name, status in sent.items():
        there = sum(x.rsplit(" ", 1)[0] == name for x in bus)
        if there != (3 if status == 202 else 0): raise NotServed(f"{name!r} was answered with {status}, and {there} of its 3 events are on the bus")
    if set(of.values()) - {202, 503} or not list(of.values()).count(503): raise NotServed(f"without room events were answered with {sorted(set(of.values()))}")
    return load.metrics() | {"events_refused": list(of.values()).count(503), "seconds": round(seconds, 2)}


INCIDENTS = {"nothing happens": calm, "another bundle is published": swap, "rollback over HTTP": roll_back, "a corrupt bundle is published": corrupt,
             "Redis is killed, 2 s": redis_gone, "no room for events": disk_full, "a replica is killed": replica_killed}
QUICK = swap, corrupt, disk_full

# ---- stages -----------------------------------------------------------------------------------------------------------


@contextmanager
def redis_with(source: OnlineStore, users: list[str]) -> Iterator[tuple[Redis, Path|None]]:
    """A Redis with the pasts of some shoppers, and its folder where that is a small file system."""
    with TemporaryDirectory(prefix="never-down-") as name, small_disk(Path(name) / "data") as small:
        server = Redis(Path(name) / "data")
        server.start()
        try:
            with server.client() as client:
                for key in map(source.keys.past, users): client.restore(key, 0, source.client.dump(key), replace=True)
            yield server, server.folder if small else None
        finally: server.kill()


def living(pid: int) -> list[psutil.Process]:
    """The replicas below a process, without those that have just ended."""
    found = []
    for p in psutil.Process(pid).children(recursive=True):
        try: found += [p] * any("ServeReplica:default" in x for x in p.cmdline())
        except psutil.Error: continue
    return found


@contextmanager
def in_production(bundles: Path, users: list[str], server: Redis, disk: Path|None) -> Iterator[Stage]:
    """Ray Serve with two replicas. Lists are not kept, so that each answer is made."""
    shop = Made(bundles.parent, users, 0)
    with running(shop, ONLINE_URL=server.url, SERVING_REPLICAS=2, SERVING_CACHE_SECONDS=0) as endpoint:
        yield Stage(endpoint.url, bundles, users, some_items(bundles), server, disk, lambda: living(endpoint.process.pid))


@contextmanager
def in_a_thread(bundles: Path, users: list[str], server: Redis, disk: Path|None) -> Iterator[Stage]:
    """The same app under uvicorn in this process, for the smoke run."""
    base = load_settings()
    settings = base.model_copy(update={"online": base.online.model_copy(update={"url": type(base.online.url)(server.url)})})
    replica, port = Replica(), free_port()
    replica.store, replica.intake = open_store(settings, timeout_s=0.2), open_intake(settings)
    replica.reconfigure({"bundle": str(bundles)})
    web = uvicorn.Server(uvicorn.Config(create_app(replica), port=port, log_level="error"))
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    wait_until(lambda: web.started, "uvicorn does not start")
    try: yield Stage(f"http://127.0.0.1:{port}", bundles, users, some_items(bundles), server, disk, lambda: [])
    finally:
        replica.following.end()
        web.should_exit = True
        thread.join()
        replica.store.close()


def some_items(bundles: Path) -> list[str]:
    """Three of the published catalogue."""
    return pl.read_parquet(latest_bundle(bundles) / "items.parquet")["item_id"].head(3).to_list()


def measured(args: argparse.Namespace) -> list[dict]:
    """Make the shop, start everything, let it happen."""
    rows, start = [], in_a_thread if args.quick else in_production
    with shop_of(args, 200) as shop, TemporaryDirectory(prefix="never-down-") as name:
        source, bundles = shop.store(), Path(name) / "bundles"
        publish(shutil.copytree(shop.bundle_folder(), bundles / shop.bundle_folder().name), "never_down")
        with redis_with(source, shop.users) as (server, disk), start(bundles, shop.users, server, disk) as stage:
            how = "one replica, no Ray" if args.quick else f"two replicas, {args.items:,} items"
            for case, happen in INCIDENTS.items():
                if args.quick and happen not in QUICK: continue
                print(case, flush=True)
                rows.append({"system": "reco", "case": f"{case}; {how}", "metrics": happen(stage)})
        source.close()
    return rows


if __name__ == "__main__": sys.exit(reported("never_down", shop_arguments(__doc__).parse_args(), measured))
