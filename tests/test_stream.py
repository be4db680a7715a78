"""Events as bytes, and the buses that carry them: one interface, held to the same contract on each."""

import copy
import http.server
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
import redis
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import kafka_brokers, redis_server

from reco.data.bus import open_codec, open_consumer, open_producer
from reco.data.consumer import judged
from reco.data.kafka_bus import KafkaConsumer
from reco.data.redis_bus import RedisConsumer, RedisProducer
from reco.data.stream import (
    USER_EVENT,
    BusError,
    Codec,
    Consumer,
    DeadLetter,
    Malformed,
    Message,
    Producer,
    Record,
    events_frame,
    registry_codec,
    single_object_codec,
)
from reco.redis_server import connect, disconnect
from reco.schemas import EVENTS, INTERACTIONS
from reco.settings import Online, Stream

ROOT = Path(__file__).parents[1]
VIEW = {"event_id": "e-1", "ts": 1_777_636_800_000, "user_id": "ada", "item_id": "lamp", "event": "view"}
NOW = datetime(2026, 5, 2, tzinfo=UTC)

# Bytes ---------------------------------------------------------------------------------------------------------------


def next_version() -> dict:
    """What the contract may become: one more optional field, one more kind of event."""
    following = copy.deepcopy(USER_EVENT)
    following["fields"].append({"name": "device", "type": ["null", "string"], "default": None, "doc": "Phone or desk."})
    next(f for f in following["fields"] if f["name"] == "event")["type"]["symbols"].append("wishlist")
    return following


def registry_pair() -> tuple[Codec, Codec]:
    """This version and the next one at one registry."""
    registry = SchemaRegistryClient.new_client({"url": "mock://"})
    return registry_codec(registry, "t"), registry_codec(registry, "t", next_version())


PAIRS = {"single object": lambda: (single_object_codec(others=[next_version()]), single_object_codec(next_version(), [USER_EVENT])),
         "registry": registry_pair}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FULL = st.fixed_dictionaries({
    "event_id": TEXT, "ts": st.integers(-2**63, 2**63 - 1), "user_id": TEXT, "session_id": st.none() | TEXT, "item_id": TEXT,
    "event": st.sampled_from(EVENTS), "order_id": st.none() | TEXT, "quantity": st.none() | st.integers(-2**31, 2**31 - 1),
    "price": st.none() | st.floats(allow_nan=False), "request_id": st.none() | TEXT, "surface": st.none() | TEXT})


def test_the_contract_is_the_file():
    file = json.loads((ROOT / "data/schema/user_event.avsc").read_text("utf-8"))
    assert file == USER_EVENT and list(file) == list(USER_EVENT) and file["namespace"]
    assert [f["name"] for f in file["fields"]] == list(INTERACTIONS.columns) and all(f["doc"] for f in file["fields"])


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=150, deadline=None)
@given(event=FULL)
def test_an_event_comes_back_as_it_went(pair, event):
    ours, theirs = CODECS[pair]
    assert ours.decode(ours.encode(event)) == event
    assert ours.decode(theirs.encode(event | {"device": "phone"})) == event == {
        k: v for k, v in theirs.decode(ours.encode(event)).items() if k != "device"}


CODECS = {name: make() for name, make in PAIRS.items()}


@pytest.mark.parametrize("pair", PAIRS)
def test_versions_read_each_other(pair):
    ours, theirs = CODECS[pair]
    wished = theirs.encode(VIEW | {"event": "wishlist", "device": "phone"})
    assert ours.decode(wished)["event"] == "unknown" and "device" not in ours.decode(wished)
    assert theirs.decode(ours.encode(VIEW))["device"] is None and theirs.decode(wished)["event"] == "wishlist"
    batch = judged([Message("0", wished), Message("1", ours.encode(VIEW))], ours.decode, NOW)
    assert [x.reason for x in batch.letters] == ["unknown event"] and batch.rows.height == 1


def spoiled(data: bytes, seed: int) -> bytes:
    """Some bytes changed, perhaps cut off."""
    rng, mutated = random.Random(seed), bytearray(data)
    for _ in range(rng.randrange(1, 4)): mutated[rng.randrange(len(mutated))] = rng.randrange(256)
    return bytes(mutated[:rng.randrange(len(mutated) + 1)] if rng.random() < 0.3 else mutated)


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=80), header=st.booleans(), seed=st.integers(0, 2**32))
def test_bytes_are_an_event_or_malformed_and_nothing_else(pair, data, header, seed):
    codec = CODECS[pair][0]
    for some in (codec.header + data if header else data, spoiled(codec.encode(VIEW), seed)):
        try: codec.decode(some)
        except Malformed as e: assert e.reason in {"truncated", "trailing bytes", "not an event", "unknown schema", "unreadable"}


@pytest.mark.parametrize("pair", PAIRS)
def test_every_spoiled_message_is_a_row_or_a_letter_or_a_copy(pair):
    codec = CODECS[pair][0]
    sent = [Message(str(i), spoiled(codec.encode(VIEW | {"event_id": f"event {i}", "price": i/3, "quantity": 1}), i)) for i in range(5_000)]
    batch = judged(sent, codec.decode, NOW)
    assert batch.rows.height == len(batch.messages) > 100 and len(batch.letters) > 1_000
    assert batch.rows.height + len(batch.letters) + batch.duplicates == len(sent)
    assert not {m.origin for m in batch.messages} & {x.message.origin for x in batch.letters}
    decoded = [codec.decode(m.data)["event_id"] for m in batch.messages] # row by row the right message
    assert decoded == batch.rows["event_id"].to_list()


@pytest.mark.parametrize("pair", PAIRS)
def test_malformed_has_a_reason(pair):
    codec = CODECS[pair][0]
    good = codec.encode(VIEW)
    other = {"single object": good[:9] + b"?" + good[10:], "registry": good[:4] + b"\x63" + good[5:]}[pair]
    for data, reason in ((good[:-1], "truncated"), (good[:3], "truncated"), (good + b"\0", "trailing bytes"), (b"", "not an event"),
                         (b"{}", "not an event"), (other, "unknown schema"), (codec.header + b"\x04\xff\xff", "unreadable")):
        with pytest.raises(Malformed) as e: codec.decode(data)
        assert e.value.reason == reason, data


@pytest.mark.parametrize("bad", [{"ts": "noon"}, {"user_id": None}, {"event": "wishlist"}, {"colour": "red"}, {"item_id": "\ud800"},
                                 {"quantity": 2**40}, {"price": "free"}])
def test_what_is_no_event_is_not_sent(bad):
    with pytest.raises(ValueError, match="not an event"): single_object_codec().encode(VIEW | bad)


def test_times_that_no_calendar_has_do_not_stop_a_batch():
    codec = single_object_codec()
    times = [2**62, -2**62, 253_402_300_799_999, 253_402_300_800_000, -62_135_596_800_001, VIEW["ts"]]
    batch = judged([Message(str(i), codec.encode(VIEW | {"event_id": str(i), "ts": t})) for i, t in enumerate(times)], codec.decode, NOW)
    assert batch.rows["event_id"].to_list() == ["5"]
    assert [x.reason for x in batch.letters] == ["unreadable value"]*2 + ["ts in the future"] + ["unreadable value"]*2
    assert events_frame([]).height == 0


def test_confluents_own_serializer_reads_ours_and_we_read_theirs():
    registry = SchemaRegistryClient.new_client({"url": "mock://"})
    ours, where = registry_codec(registry, "t"), SerializationContext("t", MessageField.VALUE)
    theirs = AvroSerializer(registry, json.dumps(USER_EVENT))
    full = {f["name"]: None for f in USER_EVENT["fields"]} | VIEW
    assert ours.decode(theirs(full, where)) == full
    read = AvroDeserializer(registry)(ours.encode(VIEW), where)
    assert read["ts"] == datetime.fromtimestamp(VIEW["ts"]/1000, UTC) and read["event_id"] == "e-1"


class Registry(http.server.BaseHTTPRequestHandler):
    """Two calls of the Schema Registry's HTTP interface, enough for a producer and a consumer."""

    schemas: list[str] = []

    def answer(self, code: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        schema = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["schema"]
        if schema not in self.schemas: self.schemas.append(schema)
        self.answer(200, {"id": self.schemas.index(schema) + 1})

    def do_GET(self) -> None:
        number = int(self.path.split("?")[0].rsplit("/", 1)[-1])
        if number > len(self.schemas): self.answer(404, {"error_code": 40403, "message": "Schema not found"})
        else: self.answer(200, {"schema": self.schemas[number - 1], "schemaType": "AVRO"})

    def log_message(self, *_: object) -> None:
        return None


@pytest.mark.filterwarnings("ignore")
def test_a_registry_over_http():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Fresh", (Registry,), {"schemas": []}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    section = Stream(bus="kafka://nowhere:9", registry=f"http://127.0.0.1:{server.server_port}")
    try:
        codec = open_codec(section)
        newer = registry_codec(SchemaRegistryClient({"url": section.registry.get_secret_value()}), section.topic, next_version())
        data = newer.encode(VIEW | {"device": "phone"})
        assert data[:5] == b"\0\0\0\0\2" and codec.decode(data)["event_id"] == "e-1"
        with pytest.raises(Malformed, match="number 9 is not in the registry"): codec.decode(b"\0\0\0\0\x09" + data[5:])
    finally:
        server.shutdown()
        server.server_close()


def test_a_registry_that_is_gone_is_no_fault_of_the_event():
    class Gone:
        def register_schema(self, *_: object) -> int: return 1
        def get_schema(self, _: int) -> object: raise ConnectionError("no route")
    with pytest.raises(BusError, match="schema registry"): registry_codec(Gone(), "t").decode(b"\0\0\0\0\2abc")


# Buses ---------------------------------------------------------------------------------------------------------------


class Bus(NamedTuple):
    """One bus with a topic of its own."""

    kind: str
    producer: Producer
    consumer: Callable[..., Consumer]       # opens one, by its name
    letters: Callable[[], list[dict]]       # origin, reason, detail, data
    closed: list[Consumer]                  # consumers to close at the end


def random_section(**more: object) -> Stream:
    """A topic that nobody else has, on a real broker too."""
    mark = secrets.token_hex(4)
    return Stream(topic=f"events-{mark}", dead_letters=f"dead-{mark}", group=f"lake-{mark}", **more)


def redis_bus(kind: str, section: Stream, client: redis.Redis) -> Bus:
    opened: list[Consumer] = []

    def consumer(name: str = "a", idle_s: float = 60) -> Consumer:
        opened.append(open_consumer(section, client, name, idle_s))
        return opened[-1]

    def letters() -> list[dict]:
        return [{k.decode(): v if k == b"data" else v.decode() for k, v in x.items()} for _, x in client.xrange(section.dead_letters)]
    return Bus(kind, open_producer(section, client), consumer, letters, opened)


def kafka_bus(brokers: str) -> Bus:
    quick = "session.timeout.ms=1500 heartbeat.interval.ms=200"
    section, opened = random_section(bus=f"kafka://{brokers}", kafka=quick), []

    def consumer(name: str = "a", idle_s: float = 60) -> Consumer:
        opened.append(open_consumer(section))
        return opened[-1]

    def letters() -> list[dict]:
        reader = open_consumer(section.model_copy(update={"topic": section.dead_letters, "group": "reader", "dead_letters": "none"}))
        found, until = [], time.monotonic() + 10
        while not found and time.monotonic() < until: found = reader.client.consume(100, 1)
        reader.close()
        return [{k: v.decode() for k, v in m.headers()} | {"data": m.value()} for m in found]
    return Bus("kafka", open_producer(section), consumer, letters, opened)


@pytest.fixture(scope="module")
def brokers() -> Iterator[str]:
    with kafka_brokers() as address: yield address


@pytest.fixture(scope="module")
def debian_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url: yield url


@contextmanager
def embedded(folder: Path) -> Iterator[redis.Redis]:
    """The platform's own Redis."""
    client = connect(Online(folder="online"), folder)
    try: yield client
    finally: disconnect(client)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[redis.Redis]:
    with embedded(tmp_path) as client: yield client


@pytest.fixture(params=["embedded", "redis-server", "kafka"])
def bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bus]:
    if request.param == "embedded": made = redis_bus("redis", random_section(), request.getfixturevalue("own_redis"))
    elif request.param == "kafka": made = kafka_bus(request.getfixturevalue("brokers"))
    else:
        section = random_section(bus=request.getfixturevalue("debian_redis"))
        made = redis_bus("redis", section, redis.Redis.from_url(section.bus.get_secret_value(), protocol=2))
    yield made
    for consumer in made.closed: consumer.close()


def receive(consumer: Consumer, wanted: int, seconds: float = 15) -> list[Message]:
    """So many messages, or an error."""
    found, until = [], time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < until: found += consumer.poll(wanted - len(found), 0.3)
    assert len(found) == wanted, found
    return found


def numbered(n: int, start: int = 0) -> list[Record]:
    return [Record(f"user {i % 5}", f"{i % 5} {i}".encode()) for i in range(start, start + n)]


def test_the_contract_of_a_bus(bus):
    """Order per key, again what was not acknowledged, never what was, dead letters aside, lag."""
    bus.producer.send(numbered(50))
    bus.producer.flush()
    first = bus.consumer()
    got = receive(first, 50)
    assert {m.data for m in got} == {r.data for r in numbered(50)} and len({m.origin for m in got}) == 50
    for user in "01234":
        mine = [int(m.data.split()[1]) for m in got if m.data.startswith(user.encode())]
        assert mine == sorted(mine)
    assert first.lag() == 50
    done = [m for m in got if m.data.startswith((b"0", b"1", b"2"))]
    if bus.kind == "kafka": # an offset stands for everything before it: acknowledge whole partitions
        kept = {m.origin.split("/")[1] for m in got if m.data.startswith(b"0")}
        done = [m for m in got if m.origin.split("/")[1] in kept]
    dead = done[:3]
    first.hold(got)
    first.dead_letter([DeadLetter(m, "no event", f"byte {m.data[0]}") for m in dead])
    first.ack(done)
    left = {m.data for m in got} - {m.data for m in done}
    assert first.lag() == len(left)
    first.close()
    bus.closed.clear()

    bus.producer.send(numbered(5, 50))
    bus.producer.flush()
    again = bus.consumer()
    more = receive(again, len(left) + 5)
    assert {m.data for m in more} == left | {r.data for r in numbered(5, 50)}
    again.ack(more)
    assert again.lag() == 0 and again.poll(10, 0.3) == []
    letters = bus.letters()
    assert sorted((x["data"], x["detail"]) for x in letters) == sorted((m.data, f"byte {m.data[0]}") for m in dead)
    assert all(x["reason"] == "no event" and any(x["origin"].endswith(m.origin) for m in dead) for x in letters)


def test_nobody_gets_what_another_works_on(bus):
    bus.producer.send(numbered(40))
    bus.producer.flush()
    one = bus.consumer("one")
    mine = receive(one, 20) if bus.kind == "redis" else []
    two, both = bus.consumer("two"), [m.data for m in mine]
    one.ack(mine)
    until = time.monotonic() + 15
    while len(set(both)) < 40 and time.monotonic() < until:
        for c in (one, two):
            some = c.poll(10, 0.2)
            both += [m.data for m in some]
            c.ack(some)
    assert set(both) == {r.data for r in numbered(40)} and len(both) <= 40 + (20 if bus.kind == "kafka" else 0)
    assert two.lag() == 0


def test_a_consumer_that_holds_its_messages_stays_in_the_group(brokers):
    """Longer than the group's patience without a poll: held, the messages stay its own."""
    bus = kafka_bus(brokers)
    bus.producer.send(numbered(10))
    bus.producer.flush()
    holder = bus.consumer()
    assert isinstance(holder, KafkaConsumer)
    got = receive(holder, 10)
    bus.producer.send(numbered(3, 10))
    bus.producer.flush()
    for _ in range(12):
        holder.hold(got)
        time.sleep(0.2)
    assert len(holder.held.early) <= 12 # what came while held is handed out later, not lost
    holder.ack(got)
    assert holder.lag() == 3 and len(receive(holder, 3)) == 3
    holder.close()


# Redis ---------------------------------------------------------------------------------------------------------------


def test_what_a_dead_consumer_had_goes_to_another(own_redis):
    bus = redis_bus("redis", random_section(), own_redis)
    bus.producer.send(numbered(6))
    lost = receive(bus.consumer("dead"), 6)
    heir = bus.consumer("heir", idle_s=0.2)
    assert heir.poll(10, 0.05) == [] # it may still be at work
    for _ in range(5): # whoever holds keeps
        bus.closed[0].hold(lost)
        time.sleep(0.06)
        assert heir.poll(10, 0.01) == []
    time.sleep(0.3)
    assert receive(heir, 6, 2) == lost
    own_redis.xdel(heir.stream, lost[0].origin) # somebody trims the stream
    assert receive(bus.consumer("heir"), 5) == lost[1:] and own_redis.xpending(heir.stream, heir.group)["pending"] == 5


def test_a_dead_letter_is_moved_once_and_whole(own_redis):
    bus = redis_bus("redis", random_section(), own_redis)
    bus.producer.send(numbered(1))
    a, b = bus.consumer("a"), bus.consumer("b", idle_s=0)
    [message] = receive(a, 1)
    assert receive(b, 1) == [message] # b takes it over while a is at it
    for c in (a, b, a): c.dead_letter([DeadLetter(message, "no event", "x")])
    assert len(bus.letters()) == 1 and a.lag() == 0 and own_redis.xpending(a.stream, a.group)["pending"] == 0


def test_a_full_stream_makes_producers_wait(own_redis):
    producer = RedisProducer(own_redis, "s", max_waiting=1_200, wait_s=0.2)
    with pytest.raises(BusError, match="is full: 1200 events wait"): producer.send(numbered(2_000))
    consumer = RedisConsumer(own_redis, "s", "g", "dead", "a")
    assert consumer.lag() == 1_200
    slow = threading.Thread(target=lambda: [consumer.ack(consumer.poll(100, 0.1)) for _ in range(30)])
    waiting = RedisProducer(own_redis, "s", max_waiting=1_200, wait_s=5)
    slow.start()
    waiting.send(numbered(500))
    slow.join()
    assert consumer.lag() == 0


def test_a_stream_has_one_group(own_redis):
    RedisConsumer(own_redis, "s", "lake", "dead", "a")
    with pytest.raises(BusError, match="already read by group"): RedisConsumer(own_redis, "s", "other", "dead", "a")


def test_a_group_that_somebody_deleted_is_made_anew(own_redis):
    consumer = RedisConsumer(own_redis, "s", "lake", "dead", "a")
    own_redis.delete("s")
    RedisProducer(own_redis, "s", 100).send(numbered(2))
    assert len(receive(consumer, 2)) == 2


def test_dead_letters_do_not_stay_for_ever(own_redis):
    """Each new one takes those with it that are older than the days that they are kept."""
    now = int(own_redis.time()[0]) * 1000
    for age_days in (40, 31, 29): own_redis.xadd("dead", {"reason": f"{age_days} days ago"}, id=f"{now - age_days * 86_400_000}-0")
    consumer = RedisConsumer(own_redis, "s", "lake", "dead", "a", dead_days=30)
    RedisProducer(own_redis, "s", 100).send(numbered(1))
    consumer.dead_letter([DeadLetter(m, "malformed", "bytes") for m in receive(consumer, 1)])
    assert [f[b"reason"] for _, f in own_redis.xrange("dead")] == [b"29 days ago", b"malformed"]


def test_entries_of_somebody_else_are_malformed_not_an_error(own_redis):
    own_redis.xadd("s", {"colour": "red"})
    [message] = receive(RedisConsumer(own_redis, "s", "lake", "dead", "a"), 1)
    with pytest.raises(Malformed, match="not an event"): single_object_codec().decode(message.data)


def test_a_bus_that_is_not_there_is_named_without_its_password():
    section = Stream(bus="redis://me:hush@127.0.0.1:9/0", kafka="sasl.password=hush")
    for act in (lambda: open_producer(section).send(numbered(1)), lambda: open_consumer(section)):
        with pytest.raises(BusError) as e: act()
        assert "hush" not in str(e.value) and "127.0.0.1:9" in str(e.value)
    gone = open_producer(Stream(bus="kafka://127.0.0.1:9"), wait_s=1)
    gone.send(numbered(3))
    with pytest.raises(BusError, match="3 events were not taken"): gone.flush()


def test_a_refused_event_is_not_repeated_in_the_error():
    """redis-py puts the whole command into the message of a pipeline, shopper and all."""
    from redis.exceptions import ResponseError

    from reco.data.redis_bus import _redis_error
    error = ResponseError("Command # 1 (XADD events * event b'ada bought\n a lamp caused error: x') of pipeline caused error: MISCONF Errors writing to the AOF")
    assert str(_redis_error(error, "0 of 1 events were sent")) == "Redis: ResponseError: MISCONF Errors writing to the AOF (0 of 1 events were sent)"
