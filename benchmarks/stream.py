"""Events per second from the bus through the consumer into lake and store, beside what no consumer can beat.

The floors of the same run: the same events appended to Parquet files of the same size, without a bus; decoding and judging
alone; and the bus read and acknowledged alone. Kafka is librdkafka's own cluster in this process: no network, no disk.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
from confluent_kafka import Producer as KafkaSender
from prometheus_client import CollectorRegistry

from app.consumer import writer
from benchmarks.base import arguments, folder_with_store, render, write
from reco.data.bus import open_codec, open_consumer, open_producer
from reco.data.consumer import Metrics, consume, judged
from reco.data.lake import Lake
from reco.data.quality import INTERACTIONS_KEY
from reco.data.simulator import simulate
from reco.data.stream import Codec, Consumer, Message, Record
from reco.features.store import open_store
from reco.settings import Online, Settings, Stream

BATCH = 5_000


def records(users: int, events: int, codec: Codec) -> tuple[pl.DataFrame, list[Record]]:
    """The newest events of a simulated shop, and the same as they travel."""
    now = datetime.now(UTC)
    log = simulate(users, 500, 2*events, 14, now - timedelta(minutes=5), seed=7).interactions.tail(events)
    plain = log.with_columns(pl.col("ts").dt.epoch("ms"), pl.col("event").cast(pl.String))
    return log, [Record(r["user_id"], codec.encode(r)) for r in plain.iter_rows(named=True)]


@contextmanager
def bus_of(kind: str, folder: Path) -> Iterator[Settings]:
    """Settings with a bus that is there for as long as the block runs."""
    stream = {"batch_events": BATCH, "batch_seconds": 2}
    online = Online(folder=str(folder / "online"))
    if kind == "redis": yield Settings(online=online, stream=Stream(**stream))
    else:
        cluster = KafkaSender({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
        address = ",".join(f"{b.host}:{b.port}" for b in cluster.list_topics(timeout=10).brokers.values())
        yield Settings(online=online, stream=Stream(bus=f"kafka://{address}", **stream))
        cluster.flush(1)


def first(bus: Consumer) -> list[Message]:
    """The first messages: joining a group takes seconds, which are not the consumer's speed."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if some := bus.poll(1, 1): return some
    raise TimeoutError("nothing came")


def timed(act: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def read_alone(bus: Consumer, n: int) -> None:
    """Every message, acknowledged and otherwise ignored."""
    got = 0
    while got < n:
        some = bus.poll(BATCH, 1)
        bus.ack(some)
        got += len(some)


def measure(kind: str, log: pl.DataFrame, sent: list[Record], codec: Codec) -> list[dict]:
    """One bus: sending, reading alone, and the whole consumer."""
    rows = []

    def row(case: str, seconds: float) -> None:
        rows.append({"system": kind, "case": case, "metrics": {"events_s": round(len(sent)/seconds), "events": len(sent)}})
    with folder_with_store() as made, bus_of(kind, Path(made)) as settings:
        store, section = open_store(settings), settings.stream
        lake = Lake(Path(made) / "lake")
        producer = open_producer(section, store.client)
        row("sent", timed(lambda: (producer.send(sent), producer.flush())))
        bus = open_consumer(section, store.client)
        bus.ack(first(bus))
        row("read and acknowledged, nothing else", timed(lambda: read_alone(bus, len(sent) - 1)))
        producer.send(sent)
        producer.flush()
        written, at_work = [], writer(lake, "interactions", INTERACTIONS_KEY, section.duplicate_days)

        def write_lake(frame: pl.DataFrame) -> None:
            at_work(frame)
            written.append(frame.height)
        metrics = Metrics(CollectorRegistry())
        row(f"consumer: lake and store, batches of {BATCH:,}", timed(lambda: consume(
            bus, codec.decode, {"lake": write_lake, "store": store.append}, section, metrics, lambda: sum(written) >= len(sent))))
        assert lake.read("interactions").select(pl.len()).collect().item() == log.height
        bus.close()
        store.close()
    return rows


def floors(log: pl.DataFrame, sent: list[Record], codec: Codec) -> list[dict]:
    """The parts of the work that need no bus."""
    messages, now = [Message(str(i), r.data) for i, r in enumerate(sent)], datetime.now(UTC)
    starts = range(0, len(sent), BATCH)
    with folder_with_store() as made:
        parquet = timed(lambda: [log[i:i + BATCH].write_parquet(Path(made) / f"{i}.parquet", compression="zstd") for i in starts])
    decode = timed(lambda: [judged(messages[i:i + BATCH], codec.decode, now) for i in starts])
    return [{"system": "none", "case": case, "metrics": {"events_s": round(len(sent)/s), "events": len(sent)}}
            for case, s in (("appended to Parquet, no bus", parquet), ("decoded and judged, no bus", decode))]


def main() -> None:
    """Both buses, then the floors."""
    args = arguments(__doc__).parse_args()
    codec = open_codec(Stream())
    log, sent = records(*((500, 10_000) if args.quick else (20_000, 300_000)), codec)
    rows = [r for kind in ("redis", "kafka") for r in measure(kind, log, sent, codec)] + floors(log, sent, codec)
    write("stream", rows, args.results)
    if not args.quick: render()


if __name__ == "__main__": main()
