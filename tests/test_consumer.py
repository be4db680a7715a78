"""The consumer: killed at any moment it loses nothing and counts nothing twice, and trouble elsewhere makes it wait."""

import json
import logging
import os
import random
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest
import redis
from prometheus_client import CollectorRegistry
from servers import kafka_brokers

from app.consumer import said, writer
from app.ports import free_port
from reco.data.bus import open_codec, open_consumer, open_producer
from reco.data.consumer import Metrics, Patience, Refused, Stopped, consume, culprits
from reco.data.lake import Lake, LakeError
from reco.data.quality import INTERACTIONS_KEY
from reco.data.stream import BusError, Codec, Consumer, Producer, Record
from reco.features.store import open_store
from reco.redis_server import StoreError, connect, disconnect
from reco.schemas import EVENTS
from reco.settings import Online, Settings, Stream

ROOT = Path(__file__).parents[1]
HOUR = 3_600_000


def now_ms() -> int:
    return int(1000*time.time())


# What is sent --------------------------------------------------------------------------------------------------------


class Traffic:
    """Events with late, repeated and malformed ones among them, and the record of what was sent."""

    def __init__(self, seed: int, codec: Codec):
        self.rng, self.codec, self.good, self.bad, self.records, self.n = random.Random(seed), codec, {}, [], [], 0

    def event(self) -> dict:
        self.n += 1
        late = self.rng.random() < 0.15
        return {"event_id": f"event-{self.n}", "ts": now_ms() - (self.rng.randrange(HOUR, 40*HOUR) if late else 0),
                "user_id": f"user-{self.rng.randrange(12)}", "item_id": f"item-{self.rng.randrange(50)}",
                "event": self.rng.choice(EVENTS), "price": self.rng.randrange(1, 9_999)/100}

    def some(self, n: int) -> list[Record]:
        """The next `n` messages."""
        out = []
        for _ in range(n):
            dice = self.rng.random()
            if self.good and dice < 0.15: out.append(self.rng.choice(self.records[-200:]))
            elif dice < 0.22:
                event = self.event()
                data = self.rng.choice([self.codec.encode(event)[:-2], secrets.token_bytes(9), self.codec.encode(event | {"price": -1.0}),
                                        self.codec.encode(event | {"ts": 2**61}), self.codec.encode(event | {"ts": now_ms() + 5*HOUR})])
                self.bad.append(data)
                out.append(Record(event["user_id"], data))
            else:
                event = self.event()
                self.good[event["event_id"]] = event
                self.records.append(Record(event["user_id"], self.codec.encode(event)))
                out.append(self.records[-1])
        return out


def assert_all_there(traffic: Traffic, settings: Settings) -> None:
    """The lake has each good event once; the store has what shoppers did, in order."""
    rows = open_lake_of(settings).read("interactions").collect()
    assert Counter(rows["event_id"]) == Counter(traffic.good.keys())
    for row in rows.select("event_id", pl.col("ts").dt.epoch("ms"), "user_id", "item_id", pl.col("event").cast(pl.String), "price"
                           ).iter_rows(named=True):
        assert row == traffic.good[row["event_id"]]
    past = defaultdict(list)
    for e in traffic.good.values():
        if e["event"] != "impression": past[e["user_id"]].append((e["ts"], EVENTS.index(e["event"]), e["item_id"]))
    store = open_store(settings)
    for user, events in past.items(): assert [tuple(e) for e in store.events(user)] == sorted(events)
    store.close()


def open_lake_of(settings: Settings) -> Lake:
    return Lake(settings.lake_root)


# Killed --------------------------------------------------------------------------------------------------------------


class Mortals(NamedTuple):
    """The process that forks consumers."""

    process: subprocess.Popen
    log: Path

    def start(self, settings: dict, name: str, seed: int = 0, chance: float = 0, kill_after: float | None = None) -> int:
        """Its process id."""
        line = {"settings": settings, "name": name, "seed": seed, "chance": chance, "log": str(self.log), "kill_after": kill_after}
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def ended(self) -> int:
        """Wait for the consumer; its exit status."""
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def mortals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mortals]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RECO_")} | {
        "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "2"}
    with subprocess.Popen([sys.executable, ROOT/"tests/mortal_consumer.py"], cwd=ROOT, env=env, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        yield Mortals(process, tmp_path_factory.mktemp("mortals")/"log")
        process.stdin.close()


def kill_again_and_again(mortals: Mortals, settings: dict, producer: Producer, traffic: Traffic, kills: int, within_s: tuple[float, float],
                         lag: Callable[[], int]) -> None:
    """Half of the kills come from outside at a random time, half from inside at a random step; then one lives to the end."""
    mortals.log.write_text("")
    rng = random.Random(5)
    for n in range(kills):
        producer.send(traffic.some(60))
        producer.flush()
        mortals.start(settings, "ab"[n % 5 == 4], n, 0.2 if n % 2 else 0, rng.uniform(*within_s) + n % 2)
        assert mortals.ended() == -signal.SIGKILL, mortals.log.read_text()[-3_000:]
    pid = mortals.start(settings, "last")
    until = time.monotonic() + 60
    while lag() > 0:
        assert time.monotonic() < until, f"{lag()} left\n{mortals.log.read_text()[-3_000:]}"
        time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    assert mortals.ended() == 0, mortals.log.read_text()[-3_000:]


def platform(folder: Path, **stream: object) -> dict:
    """Settings, JSON-ready, with everything below a folder."""
    return {"lake": {"root": str(folder/"lake")}, "online": {"folder": str(folder/"online")},
            "stream": {"batch_events": 40, "batch_seconds": 0.05, **stream}}


def test_killed_28_times_nothing_is_lost_and_nothing_counts_twice(mortals, tmp_path):
    given = platform(tmp_path)
    settings = Settings(**given)
    client = connect(settings.online, tmp_path)
    traffic = Traffic(1, open_codec(settings.stream))
    kill_again_and_again(mortals, given, open_producer(settings.stream, client), traffic, 28, (0.1, 0.45),
                         lambda: client.xlen(settings.stream.topic))
    steps = {x for x in mortals.log.read_text().splitlines() if x.startswith("killed")}
    assert len(steps) >= 5, steps # before and after lake, store, dead letters, acknowledgement …
    assert_all_there(traffic, settings)
    letters = [x for _, x in client.xrange(settings.stream.dead_letters)]
    assert Counter(x[b"data"] for x in letters) == Counter(traffic.bad)
    assert len({x[b"origin"] for x in letters}) == len(letters) and all(x[b"reason"] for x in letters)
    assert client.xpending(settings.stream.topic, settings.stream.group)["pending"] == 0
    disconnect(client)


def test_killed_on_kafka_nothing_is_lost_and_nothing_counts_twice(mortals, tmp_path):
    with kafka_brokers() as brokers:
        mark = secrets.token_hex(4)
        given = platform(tmp_path, bus=f"kafka://{brokers}", topic=f"events-{mark}", dead_letters=f"dead-{mark}", group=f"lake-{mark}",
                         kafka="session.timeout.ms=800 heartbeat.interval.ms=100")
        settings = Settings(**given)
        traffic = Traffic(2, open_codec(settings.stream))
        watcher = open_consumer(settings.stream)
        watcher.client.unsubscribe()
        kill_again_and_again(mortals, given, open_producer(settings.stream), traffic, 5, (0.8, 1.6), watcher.lag)
        watcher.close()
        assert "killed" in mortals.log.read_text()
        assert_all_there(traffic, settings)
        reader = open_consumer(settings.stream.model_copy(update={"topic": f"dead-{mark}", "group": f"reader-{mark}"}))
        letters, until = {}, time.monotonic() + 15
        while len(letters) < len(traffic.bad) and time.monotonic() < until:
            letters |= {m.key(): m.value() for m in reader.client.consume(100, 0.5)} # once each, by where they came from
        reader.close()
        assert Counter(letters.values()) == Counter(traffic.bad)


# Trouble elsewhere ---------------------------------------------------------------------------------------------------


class Platform(NamedTuple):
    """Everything a consumer needs, in this process."""

    section: Stream
    client: redis.Redis
    bus: Consumer
    codec: Codec
    lake: Lake
    registry: CollectorRegistry

    def send(self, *events: dict) -> None:
        open_producer(self.section, self.client).send([Record(e["user_id"], self.codec.encode(e)) for e in events])

    def consume(self, write_lake: Callable, write_store: Callable, stopped: Callable[[], bool] | None = None) -> None:
        until = time.monotonic() + 20
        done = stopped or (lambda: self.bus.lag() == 0)
        consume(self.bus, self.codec.decode, {"lake": write_lake, "store": write_store}, self.section, Metrics(self.registry),
                lambda: done() or time.monotonic() > until)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"reco_stream_{name}", labels) or 0


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Platform]:
    section, client = Stream(batch_events=10, batch_seconds=0.1), connect(Online(folder="online"), tmp_path)
    yield Platform(section, client, open_consumer(section, client), open_codec(section), Lake(tmp_path/"lake"), CollectorRegistry())
    disconnect(client)


def views(n: int, **more: object) -> list[dict]:
    return [{"event_id": f"e{i}", "ts": now_ms() - 1000 + i, "user_id": "ada", "item_id": f"item {i}", "event": "view"} | more for i in range(n)]


@pytest.mark.parametrize("where", ["lake", "store"])
def test_while_a_sink_is_gone_the_consumer_holds_one_batch_and_waits(shop, where, caplog):
    caplog.set_level(logging.WARNING)
    shop.send(*views(35))
    polled, failures, write, stored = [], [0], writer(shop.lake, "interactions", INTERACTIONS_KEY, 3), []
    poll = shop.bus.poll
    shop.bus.poll = lambda *a: (got := poll(*a), polled.extend(got))[0]

    def gone(frame: pl.DataFrame) -> None:
        failures[0] += 1
        if failures[0] <= 5:
            assert len(polled) == 10 and shop.bus.lag() == 35 # nothing more is taken, nothing is acknowledged
            raise {"lake": LakeError, "store": StoreError}[where]("gone")
        write(frame) if where == "lake" else stored.extend(frame["event_id"])
    sinks = {"lake": write, "store": lambda f: stored.extend(f["event_id"])} | {where: gone}
    shop.consume(sinks["lake"], sinks["store"])
    assert sorted(shop.lake.read("interactions").collect()["event_id"]) == sorted(stored) == sorted(e["event_id"] for e in views(35))
    assert shop.value("failed_tries_total", what=f"the {where}") == 5 and shop.bus.lag() == 0
    said = [r.message for r in caplog.records if f"the {where}" in r.message]
    assert len(said) == 2 and "gone" in said[0] and "answers again after 5 tries" in said[1] # not one line per try


def test_told_to_end_while_the_lake_is_gone_it_ends_and_acknowledges_nothing(shop):
    shop.send(*views(5))
    tries = []

    def gone(_: pl.DataFrame) -> None:
        tries.append(1)
        raise OSError("no route")
    shop.consume(gone, lambda f: None, lambda: len(tries) >= 2)
    assert len(tries) == 2 and shop.bus.lag() == 5
    again = open_consumer(shop.section, shop.client)
    assert len(again.poll(10, 0.1)) == 5


def test_told_to_end_it_finishes_the_batch_in_hand(shop):
    shop.send(*views(5))
    told = []
    shop.consume(lambda f: told.append(1), lambda f: None, lambda: bool(told))
    assert shop.bus.lag() == 0


def test_a_bus_that_fails_for_a_moment_costs_nothing(shop):
    shop.send(*views(25))
    poll, ack, dice, stored = shop.bus.poll, shop.bus.ack, random.Random(3), []

    def shaky(act: Callable) -> Callable:
        def wrapped(*args: object) -> object:
            if dice.random() < 0.4: raise BusError("connection reset")
            return act(*args)
        return wrapped
    shop.bus.poll, shop.bus.ack = shaky(poll), shaky(ack)
    shop.consume(lambda f: None, lambda f: stored.extend(f["event_id"]))
    assert sorted(stored) == sorted(e["event_id"] for e in views(25)) and shop.value("failed_tries_total", what="the bus") > 0


def test_one_poisoned_row_goes_aside_and_the_rest_goes_on(shop):
    shop.send(*views(10, price=1.0)[:7], *views(1, event_id="poison"), *views(10)[8:])
    write = writer(shop.lake, "interactions", INTERACTIONS_KEY, 3)

    def picky(frame: pl.DataFrame) -> None:
        if "poison" in frame["event_id"]: raise ValueError("this row is poisoned")
        write(frame)
    shop.consume(picky, lambda f: None)
    assert shop.lake.read("interactions").collect().height == 9
    [(_, letter)] = shop.client.xrange(shop.section.dead_letters)
    assert letter[b"reason"] == b"refused by the lake" and b"this row is poisoned" in letter[b"detail"]
    assert shop.codec.decode(letter[b"data"])["event_id"] == "poison" # as it came: it can be sent again
    assert shop.value("dead_letters_total", reason="refused by the lake") == 1


def test_a_poisoned_row_alone_does_not_block_for_ever(shop):
    shop.send(*views(2, user_id="poison"))

    def picky(frame: pl.DataFrame) -> None:
        if "poison" in frame["user_id"]: raise ValueError("no")
    shop.consume(picky, lambda f: None)
    assert shop.bus.lag() == 0 and shop.client.xlen(shop.section.dead_letters) == 2
    assert shop.value("failed_tries_total", what="the lake") == 5


def test_a_lake_that_takes_nothing_at_all_is_not_the_events_fault():
    writes = []

    def broken(frame: pl.DataFrame) -> None:
        writes.append(frame.height)
        raise pl.exceptions.SchemaError("no such column")
    rows = pl.DataFrame({"event_id": [str(i) for i in range(5_000)]})
    for tries in (0, 5, 500):
        with pytest.raises(Refused, match="nothing of 5000 rows is taken"): culprits(broken, rows, tries)
    assert len(writes) < 200 # it does not try every row


def test_programming_errors_are_not_waited_for():
    with pytest.raises(ZeroDivisionError): Patience(lambda: False).ask("x", lambda n: 1/0, lambda: None)
    with pytest.raises(Stopped): Patience(lambda: True).ask("x", lambda n: open("/nowhere/x"), lambda: None)


def test_copies_count_once_within_a_batch_and_across_batches(shop):
    shop.send(*views(8), *views(8), *views(8))
    write = writer(shop.lake, "interactions", INTERACTIONS_KEY, 3)
    shop.consume(write, lambda f: None)
    assert shop.lake.read("interactions").collect().height == 8
    assert shop.value("written_events_total") + shop.value("duplicate_events_total") == 24
    assert shop.value("newest_event_age_seconds") < 60 and "24" not in said(shop.registry).split(",")[0]
    assert shop.value("batch_seconds_count") >= 3


def test_lag_is_a_metric(shop):
    shop.send(*views(7))
    seen = []
    shop.consume(lambda f: seen.append(shop.value("lag_events")), lambda f: None)
    assert seen == [7]


# The commands --------------------------------------------------------------------------------------------------------


def command(folder: Path, *args: str, **more: str) -> subprocess.Popen:
    """One of our programs with the settings of a folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RECO_")} | {
        "RECO_SETTINGS": str(folder/"settings.ini"), "PYTHONPATH": str(ROOT), **more}
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_generator_and_consumer_as_an_operator_runs_them(tmp_path):
    port = free_port()
    (tmp_path/"settings.ini").write_text("[simulator]\nusers = 100\nitems = 60\nevents = 1000\n[lake]\nroot = lake\n"
                                         f"[online]\nfolder = online\n[stream]\nbatch_seconds = 0.3\nmetrics_port = {port}\n")
    running = command(tmp_path, "-m", "app.consumer")
    try:
        sender = command(tmp_path, "data/generators/generate_events.py", "--rate", "400", "--events", "600", "--late", "0.1",
                         "--duplicate", "0.1", "--malformed", "0.05")
        out, err = sender.communicate(timeout=60)
        assert sender.returncode == 0, err
        sent = {w: int(n) for n, w in (x.strip().split(" ", 1) for x in out.splitlines()[-1].split(": ")[1].split(", "))}
        assert sum(sent.values()) == 600 and min(sent.values()) > 5
        url, until, figures = f"http://127.0.0.1:{port}/metrics", time.monotonic() + 30, {}
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(url) as answer: lines = answer.read().decode().splitlines()
            except urllib.error.URLError:  # it is still starting
                time.sleep(0.2)
                continue
            figures = {x.rsplit(" ", 1)[0]: float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("reco_")}
            dead = sum(v for k, v in figures.items() if "dead_letters_total" in k)
            if figures["reco_stream_written_events_total"] + figures["reco_stream_duplicate_events_total"] + dead == 600: break
            time.sleep(0.2)
        assert dead == sent["malformed"]
        assert figures["reco_stream_newest_event_age_seconds"] < 60
    finally: running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=20)
    assert running.returncode == 0 and "ended: " in out and "dead letters, " in out, err
    rows = Lake(tmp_path/"lake").read("interactions").collect()
    assert rows.height == sent["on time"] + sent["late"] == rows["event_id"].n_unique()
    late = (pl.lit(datetime.now(UTC)) - pl.col("ts")).dt.total_minutes() >= 59
    assert rows.filter(late).height == sent["late"]


@pytest.mark.parametrize(("program", "bus", "why"), [
    ("app.consumer", "redis://:hush@127.0.0.1:9/0", "127.0.0.1:9"), ("app.consumer", "ftp://hush@x", "[stream] bus"),
    ("generate", "redis://:hush@127.0.0.1:9/0", "127.0.0.1:9")])
def test_errors_are_one_clear_line(tmp_path, program, bus, why):
    (tmp_path/"settings.ini").write_text("[simulator]\nusers = 100\nitems = 60\nevents = 1000\n[lake]\nroot = lake\n[online]\nfolder = online\n")
    args = ["-m", program] if program == "app.consumer" else ["data/generators/generate_events.py", "--rate", "100"]
    done = command(tmp_path, *args, RECO_STREAM_BUS=bus)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 1 and why in err and "hush" not in err and len(err.strip().splitlines()) == 1, err


def test_ctrl_c_ends_the_generator_and_says_what_was_sent(tmp_path):
    (tmp_path/"settings.ini").write_text("[simulator]\nusers = 100\nitems = 60\nevents = 1000\n[online]\nfolder = online\n")
    running = command(tmp_path, "data/generators/generate_events.py", "--rate", "50", PYTHONUNBUFFERED="1")
    assert "Ctrl-C ends it" in running.stdout.readline()
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=20)
    assert running.returncode == 0 and " sent: " in out and not err, err
