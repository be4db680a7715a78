"""Send the simulator's events to the bus as they happen: `python data/generators/generate_events.py --rate 200`.

The shop is the one of [simulator], so its items and shoppers are those of `generate_shop.py`. Events happen now, except
the late ones; ids are new in every run. Ctrl-C ends it and says what was sent.
"""
import argparse
import itertools
import random
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from pydantic import SecretStr

from reco.data.bus import open_codec, open_producer
from reco.data.simulator import emit, simulate
from reco.data.stream import BusError, Producer, Record
from reco.redis_server import StoreError, connect, disconnect
from reco.settings import Settings, SettingsError, load_settings

SAY_EVERY_S, SEND_EVERY_S = 5, 0.05  # a line of progress; a round trip to the bus
RECENT = 1_000                       # a duplicate repeats one of so many events before it
HOUR = 3_600_000                     # ms


def share(
    text: str,  # "0.02"
) -> float:
    "A share from the command line; raises `argparse.ArgumentTypeError`."
    try: value = float(text)
    except ValueError: value = -1
    if not 0 <= value <= 1: raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def parser(
    settings: Settings,  # the defaults
) -> argparse.ArgumentParser:
    "The command line."
    cli = argparse.ArgumentParser(description="Send the simulator's events to the bus as they happen.")
    cli.add_argument("--rate", type=float, default=200, help="events per second; default 200")
    cli.add_argument("--bus", default="", help="kafka://host:port or redis://…; default [stream] bus")
    cli.add_argument("--events", type=int, default=0, help="end after so many; default 0, go on until Ctrl-C")
    cli.add_argument("--late", type=share, default=0.02, help="share that happened an hour to two days ago; default 0.02")
    cli.add_argument("--duplicate", type=share, default=0.01, help="share that is sent again; default 0.01")
    cli.add_argument("--malformed", type=share, default=0.005, help="share that is no event, or breaks a rule; default 0.005")
    cli.add_argument("--seed", type=int, default=settings.project.seed, help=f"default {settings.project.seed}")
    return cli


def shop_rows(
    settings: Settings,  # [simulator] and the seed of the shop
    rate: float,         # per second
) -> Iterator[dict]:     # INTERACTIONS rows, JSON-ready, without end
    "The shop's events in time, one period after the other; raises `ValueError` for a rate or sizes that make no sense."
    s, today = settings.simulator, datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    log = simulate(s.users, s.items, s.events, s.days, today, settings.project.seed).interactions
    for period in itertools.count():
        for row in emit(log, rate):
            yield row | {k: f"{row[k]}-{period}" for k in ("event_id", "session_id", "order_id") if row[k]}


def broken(
    row: dict,                       # a good event
    encode: Callable[[dict], bytes],
    rng: random.Random,
) -> bytes:
    "An event that cannot be used: cut off, not Avro, or against a rule."
    return rng.choice([lambda: encode(row)[:-3], lambda: b'{"event": "view"}', lambda: encode(row | {"price": -1.0})])()


def live(
    rows: Iterator[dict],             # from `shop_rows`
    run: str,                         # in front of every id
    args: argparse.Namespace,         # from `parser`: late, duplicate, malformed
    encode: Callable[[dict], bytes],
    rng: random.Random,
    now: Callable[[], float] = time.time,  # seconds since 1970
) -> Iterator[tuple[str, Record]]:    # kind: on time, late, duplicate or malformed; what to send
    "Events as they would really come."
    recent: deque[Record] = deque(maxlen=RECENT)
    for row in rows:
        dice, ids = rng.random(), {k: f"{run}-{row[k]}" for k in ("event_id", "session_id", "order_id") if row[k]}
        row = row | ids | {"ts": int(1000*now())}
        if dice < args.malformed: kind, record = "malformed", Record(row["user_id"], broken(row, encode, rng))
        elif recent and dice < args.malformed + args.duplicate: kind, record = "duplicate", rng.choice(recent)
        else:
            late = rng.random() < args.late/max(1 - args.malformed - args.duplicate, 1e-9)
            if late: row["ts"] -= rng.randrange(HOUR, 48*HOUR)
            kind, record = "late" if late else "on time", Record(row["user_id"], encode(row))
            recent.append(record)
        yield kind, record


def send_all(
    events: Iterator[tuple[str, Record]],  # from `live`
    producer: Producer,
    sent: Counter,                         # kind → how many the bus has; grows
    ending: Callable[[], bool],
) -> None:
    "Send until there are no more or it is told to end; raises `BusError`."
    some, kinds, at, say = [], Counter(), time.monotonic(), time.monotonic() + SAY_EVERY_S

    def hand_over() -> None:
        producer.send(some)
        sent.update(kinds)
        some.clear(), kinds.clear()

    for kind, record in events:
        some.append(record)
        kinds[kind] += 1
        if time.monotonic() - at >= SEND_EVERY_S:
            hand_over()
            at = time.monotonic()
        if time.monotonic() > say:
            print(summary(sent), flush=True)
            say += SAY_EVERY_S
        if ending(): break
    hand_over()
    producer.flush()


def summary(
    sent: Counter,  # kind → how many
) -> str:           # one line
    "What was sent, by kind."
    return f"{sent.total():,} sent: " + ", ".join(f"{sent[k]:,} {k}" for k in ("on time", "late", "duplicate", "malformed"))


def run(
    settings: Settings,
    args: argparse.Namespace,    # from `parser`
    ending: Callable[[], bool],
) -> str:                        # what was sent, one line
    "Open the bus, send, close it; raises `BusError`, `StoreError`, and `ValueError` for a rate or sizes that make no sense."
    section = settings.stream.model_copy(update={"bus": SecretStr(args.bus)} if args.bus else {})
    redis = None if section.bus.get_secret_value() else connect(settings.online, settings.root)
    sent = Counter()
    try:
        codec, producer = open_codec(section), open_producer(section, redis)
        rows = itertools.islice(shop_rows(settings, args.rate), args.events or None)
        print(f"{args.rate:g} events a second to {section.topic}; Ctrl-C ends it", flush=True)
        events = live(rows, f"{int(1000*time.time()):x}", args, codec.encode, random.Random(args.seed))
        send_all(events, producer, sent, ending)
    finally:
        if redis: disconnect(redis)
    return summary(sent)


def main(
    argv: list[str] | None = None,  # the command line; the process's own when not given
) -> int:                           # exit code
    "Run the command; errors go to stderr with exit code 1."
    told: list[int] = []
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda number, _: told.append(number))
    try:
        settings = load_settings()
        print(run(settings, parser(settings).parse_args(argv), lambda: bool(told)), flush=True)
    except (SettingsError, BusError, StoreError, ValueError) as e:
        print(f"generate_events: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
