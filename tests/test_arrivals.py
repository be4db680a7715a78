"""One event at a time: judged without a frame as with one, and on the bus and in the past at once."""

import math
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from reco.data.bus import open_codec
from reco.data.intake import AHEAD, Intake, hold_to_rules, judge_events
from reco.data.quality import OLDEST, catalog_rules, interaction_rules, judge, reason_of
from reco.data.redis_bus import RedisProducer
from reco.data.stream import USER_EVENT, YEARS_1_TO_9999, BusError, Record, events_frame
from reco.features.arrivals import Arrivals, arrivals
from reco.features.pasts import SLACK, PastStore
from reco.redis_server import connect, disconnect
from reco.schemas import CATALOG, EVENTS
from reco.settings import Online, Stream

NOW = datetime(2026, 5, 2, 12, 0, 0, 123_456, tzinfo=UTC)  # between two milliseconds
NOW_MS, OLDEST_MS = math.floor(NOW.timestamp() * 1000), round(OLDEST.timestamp() * 1000)
FIELDS = [f["name"] for f in USER_EVENT["fields"]]


def event(name: str = "e", **fields) -> dict:
    return dict.fromkeys(FIELDS) | {"event_id": name, "ts": NOW_MS - 1_000, "user_id": "u", "item_id": "i", "event": "view"} | fields


# Rules -------------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(st.none(), st.sampled_from(["", " ", "a", "b", "\0", "é", "event='"]))
TIMES = st.sampled_from([n + d for n in (0, OLDEST_MS, NOW_MS, *YEARS_1_TO_9999) for d in (-1, 0, 1)] + [2**62, -(2**62)])
NUMBERS = st.sampled_from([None, -1.0, -0.0, 0.0, 5e-324, 0.5, 1.0, 1.0000001, math.inf, -math.inf, math.nan])
MAYBE_BAD = st.fixed_dictionaries(
    {},
    optional={
        "event_id": TEXTS, "user_id": TEXTS, "item_id": TEXTS, "session_id": TEXTS, "order_id": TEXTS, "ts": TIMES, "price": NUMBERS,
        "event": st.sampled_from([*EVENTS, "unknown", "wishlist", ""]),
        "quantity": st.sampled_from([None, -(2**31), -1, 0, 1, 2**31 - 1]),
    },
)
BAD = {
    "unknown event": {"event": "wishlist"}, "unreadable value": {"ts": 2**62}, "ts before 2000": {"ts": OLDEST_MS - 1},
    "ts in the future": {"ts": NOW_MS + 1}, "quantity below 1": {"quantity": 0}, "negative price": {"price": math.nan},
    **{f"null {c}": {c: v} for c in ("event_id", "user_id", "item_id") for v in ("", None)},
}


def in_a_frame(events: list[dict]) -> tuple[pl.DataFrame, dict[int, str]]:
    good, reasons, _ = hold_to_rules(events, NOW)
    return good, reasons


@effort(max_examples=150, deadline=None)
@given(st.lists(MAYBE_BAD, min_size=1, max_size=6))
def test_an_event_by_itself_is_judged_as_in_a_frame(changes):
    events = [event(f"e{n % 3}") | c for n, c in enumerate(changes)]
    good, reasons = judge_events(events, NOW)
    frame, of_frame = in_a_frame(events)
    assert reasons == of_frame
    assert events_frame(good).drop("unread").equals(frame)


@pytest.mark.parametrize("reason", sorted({*interaction_rules(NOW)} - {"null ts", "null event"}))
def test_every_rule_is_known_to_both(reason):
    """A null time or kind cannot come: the contract of the bus has none, and what is unknown has a reason before that."""
    bad = event("bad") | BAD[reason]
    assert judge_events([event(), bad], NOW)[1] == {1: reason} == in_a_frame([event(), bad])[1]


@effort(max_examples=100, deadline=None)
@given(st.fixed_dictionaries({
    "item_id": TEXTS, "price": NUMBERS, "discount": NUMBERS, "margin": NUMBERS, "unread": TEXTS,
    "valid_from": st.sampled_from([None, OLDEST, OLDEST - timedelta(milliseconds=1), NOW.replace(microsecond=0)])}))
def test_a_row_of_the_catalogue_too(row):
    types = {c: CATALOG.columns.get(c, pl.String) for c in row}
    frame = pl.LazyFrame({c: [v] for c, v in row.items()}, schema=types).with_columns(reason=pl.lit(None, pl.String))
    assert judge(frame, catalog_rules()).collect()["reason"].to_list() == [reason_of(row, catalog_rules())]


# Bus and past ------------------------------------------------------------------------------------------------------


class Place:
    """A Redis that is bus and store, in a folder."""

    def __init__(self, folder: Path, max_waiting: int = 10_000):
        self.folder, self.codec = folder, open_codec(Stream())
        self.client = connect(Online(), folder)
        self.pasts = PastStore(self.client, "t", 200, 3_600)
        self.bus = RedisProducer(self.client, "events", max_waiting, wait_s=0.1)
        self.intake = Intake(self.codec.encode, self.bus, arrivals(self.bus, self.pasts).keep)

    def on_the_bus(self) -> list[str]:
        return [self.codec.decode(f[b"event"])["event_id"] for _, f in self.client.xrange("events")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "here")
    yield made
    disconnect(made.client)


def test_one_command_writes_both(place):
    place.intake.take([event("warm")], NOW)
    before = {c: v["calls"] for c, v in place.client.info("commandstats").items()}
    place.intake.take([event("a"), event("b", user_id="v")], NOW)
    calls = {c: v["calls"] - before.get(c, 0) for c, v in place.client.info("commandstats").items()}
    assert {c: n for c, n in calls.items() if n and c != "cmdstat_info"} == {
        "cmdstat_evalsha": 1, "cmdstat_xlen": 1, "cmdstat_xadd": 2, "cmdstat_mget": 1, "cmdstat_zadd": 2,
        "cmdstat_zremrangebyrank": 2, "cmdstat_expire": 2}


def test_after_a_crash_an_event_is_in_both_or_in_neither(place, tmp_path):
    """The log of a Redis that ended in the middle of a write: cut at every few bytes of what the last request wrote."""
    log = place.folder / Online().folder / "appendonly.aof"
    place.intake.take([event("first")], NOW)
    start = log.stat().st_size
    place.intake.take([event("second", ts=NOW_MS), event("third", user_id="v")], NOW)
    written = log.read_bytes()
    found = set()
    for n, size in enumerate([*range(start, len(written), max(1, (len(written) - start) // 6)), len(written)]):
        folder = tmp_path / f"cut{n}" / Online().folder
        folder.mkdir(parents=True)
        (folder / "appendonly.aof").write_bytes(written[:size])
        again = Place(tmp_path / f"cut{n}")
        bus, past = again.on_the_bus(), [len(again.pasts.events(u)) for u in "uv"]
        assert (bus, past) in ((["first"], [1, 0]), (["first", "second", "third"], [2, 1])), size
        found.add(len(bus))
        disconnect(again.client)
        shutil.rmtree(tmp_path / f"cut{n}", ignore_errors=True)
    assert found == {1, 3}


def test_the_order_of_a_request_stays_on_the_bus_and_time_orders_the_past(place):
    sent = [event("late", ts=NOW_MS, item_id="l"), event("shown", event="impression"), event("early", ts=NOW_MS - 9, item_id="e"), event("late", ts=NOW_MS)]
    assert [e["event_id"] for e in place.intake.take(sent, NOW)] == ["late", "shown", "early"] == place.on_the_bus()
    assert [e.item_id for e in place.pasts.events("u")] == ["e", "l"]
    place.intake.take(sent, NOW)
    assert len(place.pasts.events("u")) == 2 and place.on_the_bus() == ["late", "shown", "early"] * 2  # the consumer knows them by id


def test_what_is_only_shown_is_on_the_bus_alone(place):
    place.intake.take([event("shown", event="impression")], NOW)
    assert place.on_the_bus() == ["shown"] and place.pasts.events("u") == []


def test_the_largest_request_of_one_shopper_fits(place):
    sent = [event(f"e{n}", ts=NOW_MS - n, item_id=f"i{n}") for n in range(1_000)]
    place.intake.take(sent, NOW)
    assert place.on_the_bus() == [e["event_id"] for e in sent]
    assert [e.item_id for e in place.pasts.events("u")] == [f"i{n}" for n in reversed(range(200 + SLACK))]
    place.intake.take([event(f"x{n}", user_id=f"u{n}") for n in range(1_000)], NOW)
    assert len(place.on_the_bus()) == 2_000 and len(place.pasts.events("u999")) == 1


def test_an_erased_shopper_stays_erased(place):
    place.intake.take([event("a")], NOW)
    place.pasts.erase("u")
    place.intake.take([event("a")], NOW)
    assert place.pasts.events("u") == [] and place.on_the_bus() == ["a", "a"]


def test_a_full_bus_takes_nothing_and_one_that_empties_does(tmp_path):
    place = Place(tmp_path / "full", max_waiting=1)
    place.intake.take([event("a")], NOW)
    with pytest.raises(BusError, match="is full: 1 events wait"): place.intake.take([event("b", item_id="j")], NOW)
    assert place.on_the_bus() == ["a"] and [e.item_id for e in place.pasts.events("u")] == ["i"]
    place.client.xtrim("events", maxlen=0)
    place.intake.take([event("b", item_id="j")], NOW)
    assert place.on_the_bus() == ["b"] and len(place.pasts.events("u")) == 2
    disconnect(place.client)


def test_a_damaged_past_loses_no_event(place):
    place.client.set(place.pasts.keys.past("u"), "not a past")
    with pytest.raises(BusError) as said: place.intake.take([event("kept", price=77.5)], NOW)
    assert place.on_the_bus() == ["kept"] and "77.5" not in str(said.value)


def test_a_bus_elsewhere_comes_first(place, tmp_path):
    """Kafka, or a Redis of its own: there is nothing to write at once."""
    other = Place(tmp_path / "other")

    class Kafka:
        def send(self, records: list[Record]) -> None: ...
        def flush(self) -> None: ...

    assert arrivals(place.bus, other.pasts) is None and arrivals(Kafka(), place.pasts) is None
    assert isinstance(arrivals(place.bus, place.pasts), Arrivals)
    taken = Intake(place.codec.encode, Kafka()).take([event("a"), event("a"), event("b", event="impression")], NOW)
    assert len(taken) == 2 and place.pasts.append_few(taken) == 1 and place.pasts.append_few(taken) == 0
    disconnect(other.client)


@effort(max_examples=25, deadline=None)
@given(events=st.lists(st.tuples(st.sampled_from("uv"), st.integers(0, 5), st.sampled_from("ij\0"), st.sampled_from(EVENTS), st.integers(0, 8)), max_size=30))
def test_a_few_events_make_the_same_past_as_a_frame_of_them(shared, events):
    rows = [event(f"e{i}", user_id=u, ts=NOW_MS + t, item_id=item, event=kind) for u, t, item, kind, i in events]
    few, frame = (PastStore(shared, name, 3, 3_600) for name in ("few", "frame"))
    for p in (few, frame): p.clear()
    good = judge_events(rows, NOW + AHEAD)[0]
    assert few.append_few(good) == frame.append(events_frame(good).drop("unread"))
    assert few.events_many(["u", "v"]) == frame.events_many(["u", "v"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    client = connect(Online(), tmp_path_factory.mktemp("shared"))
    yield client
    disconnect(client)
