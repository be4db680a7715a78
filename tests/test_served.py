"""The serve log: every list reaches the bus once, in order, whatever the bus does, and what is lost is counted."""

import itertools
import tempfile
import threading
import time
from datetime import UTC, datetime

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.data.lake import Lake
from reco.data.serve_log import CHANCES, ServeLog
from reco.data.served import EXPOSURES_KEY, SERVED, exposures_of, hold_lists, list_id, lists_frame
from reco.data.stream import BusError
from reco.monitoring.credit import shown_once
from reco.schemas import EXPOSURES, conform

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
ITEM = st.fixed_dictionaries({"item_id": TEXT, "score": st.floats(0, 1, width=32), "source": TEXT, "propensity": st.floats(2**-20, 1, width=32),
                              "team": st.none() | TEXT})
LIST = st.fixed_dictionaries({"request_id": TEXT, "ts": st.integers(0, 4_000_000_000_000), "user_id": st.none() | TEXT, "surface": TEXT, "bundle": TEXT,
                              "variant": st.none() | TEXT, "fallback": st.booleans(), "latency_ms": st.floats(0, 1e4, width=32), "items": st.lists(ITEM, max_size=4)})


def a_list(name: str, items: int = 2) -> dict:
    return {"request_id": name, "ts": 1_777_600_000_000, "user_id": "ann", "surface": "for_you", "bundle": "b", "variant": None, "fallback": False,
            "latency_ms": 2.5, "items": [{"item_id": f"i{n}", "score": 0.5, "source": "als", "propensity": 1.0, "team": None} for n in range(items)]}


class Bus:
    """Takes records while `up`."""

    def __init__(self) -> None: self.up, self.taken, self.blocked = True, [], threading.Event()

    def send(self, records: list) -> None:
        if not self.up: raise BusError("the bus does not answer")
        self.taken += [SERVED.decode(r.data)["request_id"] for r in records]

    def flush(self) -> None: pass

    def close(self) -> None: pass


def until(what, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end: time.sleep(0.01)
    return what()


@given(st.lists(LIST, max_size=4))
def test_lists_come_back_as_rows(lists):
    table = exposures_of(lists_frame([SERVED.decode(SERVED.encode(x)) for x in lists]))
    assert conform(table, EXPOSURES).equals(table)
    rows = [(x["request_id"], n + 1, i["item_id"], i["propensity"], i["team"], x["user_id"], x["ts"]) for x in lists for n, i in enumerate(x["items"])]
    assert table.select("request_id", "rank", "item_id", "propensity", "team", "user_id").rows() == [r[:6] for r in rows]
    assert table["ts"].dt.epoch("ms").to_list() == [r[6] for r in rows]


OLD = "c301cf0b97c2f89852bb027280c0bb93bc670206616e6e0e666f725f796f75026200000000204002086c616d700000003f06616c730000803f00"


def test_a_message_and_a_table_from_before_there_were_teams_are_read(tmp_path):
    """The message as it was written then; a table that was begun then, and goes on."""
    old = exposures_of(lists_frame([SERVED.decode(bytes.fromhex(OLD))]))
    assert old.select("request_id", "item_id", "source", "team").rows() == [("r", "lamp", "als", None)]
    lake = Lake(tmp_path / "lake")
    lake.write("exposures", old.drop("team"), key=EXPOSURES_KEY, day_of="ts")
    assert conform(lake.read("exposures").collect(), EXPOSURES).equals(old)
    new = a_list("s", 1)
    lake.write("exposures", exposures_of(lists_frame([new | {"items": [new["items"][0] | {"team": "more"}]}])), key=EXPOSURES_KEY, day_of="ts")
    assert lake.read("exposures").sort("request_id").collect()["team"].to_list() == [None, "more"]

def test_what_cannot_be_counted_is_said_with_its_reason():
    latest = datetime(2026, 6, 1, tzinfo=UTC)
    ok, item = a_list("a"), a_list("a")["items"][0]
    bad = {"empty request_id": {"request_id": " "}, "unknown surface": {"surface": "footer"}, "ts before 1970 or in the future": {"ts": 2**42},
           "an item twice": {"items": [item, item]}, "propensity not above 0 and at most 1": {"items": [item | {"propensity": 0.0}]},
           "score not finite": {"items": [item | {"score": float("nan")}]}}
    lists = [ok, ok | {"ts": ok["ts"] + 1}, a_list("a") | {"surface": "similar"}, *(a_list(f"bad {n}") | b for n, b in enumerate(bad.values()))]
    good, reasons, copies = hold_lists(lists, latest)
    assert good.select("request_id", "surface").rows() == [("a", "for_you"), ("a", "similar")] and copies == {1}
    assert list(reasons.values()) == list(bad) and list(reasons) == list(range(3, len(lists)))
    assert conform(exposures_of(good), EXPOSURES).height == 4


def test_a_list_is_what_stood_in_it_for_whom():
    first = a_list("a")
    others = [first | {"user_id": "bob"}, first | {"user_id": None}, first | {"surface": "similar"}, first | {"ts": first["ts"] + 86_400_000}, a_list("b"), a_list("a", 3),
              first | {"items": first["items"][::-1]}]
    again = first | {"ts": first["ts"] + 60_000, "latency_ms": 9.0, "bundle": "newer"}
    assert len({list_id(x) for x in (first, *others)}) == 1 + len(others) and list_id(again) == list_id(first)
    good, reasons, copies = hold_lists([first, *others, again, *others], datetime(2026, 6, 1, tzinfo=UTC))
    assert good.height == 1 + len(others) and not reasons and len(copies) == 1 + len(others)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["ann", "bob", None]), st.sampled_from([0, 1]), st.permutations(["x", "y", "z"]), st.integers(0, 3)), min_size=1, max_size=6),
       st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_lists_come_into_the_lake_whole_and_once_under_whatever_name(answered, bites):
    """Names may be used again, answers repeated, and the bus may bring anything twice, in any cut."""
    day, item = 86_400_000, a_list("a")["items"][0]
    lists = [a_list(name) | {"user_id": who, "ts": 1_777_600_000_000 + late * day + n, "items": [item | {"item_id": i} for i in items[:k]]}
             for n, (name, who, late, items, k) in enumerate(answered)]
    with tempfile.TemporaryDirectory() as folder:
        lake, todo = Lake(folder), lists + lists
        for cut in itertools.cycle(bites):
            good, reasons, _ = hold_lists(todo[:cut], datetime(2026, 6, 1, tzinfo=UTC))
            assert not reasons
            lake.write("exposures", exposures_of(good), key=EXPOSURES_KEY, day_of="ts", around_days=0)
            if not (todo := todo[cut:]): break
        rows = lake.read("exposures").collect()
    wanted = {(x["request_id"], x["user_id"], x["ts"] // day, tuple(i["item_id"] for i in x["items"])) for x in lists if x["items"]}
    found = rows.sort("rank").group_by("list_id", maintain_order=True).agg("item_id", "rank", pl.col("request_id", "user_id", "ts").first())
    assert sorted(wanted, key=str) == sorted(((r["request_id"], r["user_id"], round(r["ts"].timestamp() * 1000) // day, tuple(r["item_id"])) for r in found.iter_rows(named=True)), key=str)
    assert all(r == list(range(1, len(r) + 1)) for r in found["rank"].to_list())


def test_a_table_from_before_lists_had_an_id_goes_on(tmp_path):
    lake, good = Lake(tmp_path / "lake"), exposures_of(lists_frame([a_list("a"), a_list("b")]))
    lake.write("exposures", good.filter(request_id="a").drop("list_id"), key=["request_id", "surface", "rank"], day_of="ts")
    for _ in range(2): lake.write("exposures", good.filter(request_id="b"), key=EXPOSURES_KEY, day_of="ts", around_days=0)
    rows = lake.read("exposures").collect()
    assert rows.height == 4 and shown_once(pl.concat([rows, rows])).height == 4


def test_what_is_noted_is_on_the_bus_soon_and_in_order():
    bus = Bus()
    log = ServeLog(bus, dict)
    for n in range(500): log.note(a_list(str(n)))
    assert until(lambda: len(bus.taken) == 500) and bus.taken == [str(n) for n in range(500)]
    log.close()


def test_a_bus_that_is_away_for_a_while_loses_nothing():
    bus, lost = Bus(), []
    log = ServeLog(bus, dict, lost.append)
    bus.up = False
    for n in range(120): log.note(a_list(str(n)))
    with pytest.raises(BusError): log.flush()
    log.note(a_list("120"))
    bus.up = True
    assert until(lambda: len(bus.taken) == 121) and bus.taken == [str(n) for n in range(121)] and not lost
    log.close()


def test_what_does_not_fit_or_cannot_be_sent_at_the_end_is_counted():
    bus, lost = Bus(), []
    bus.up = False
    log = ServeLog(bus, dict, lost.append, most=10)
    for n in range(15): log.note(a_list(str(n)))
    log.close()
    assert sum(lost) == 15 and not bus.taken


def test_one_that_cannot_be_written_down_does_not_hold_up_the_others():
    bus, lost = Bus(), []
    log = ServeLog(bus, dict, lost.append)
    log.note(a_list("a"))
    log.note(a_list("b") | {"latency_ms": "soon"})
    log.note({"no": "list"})
    log.note(a_list("c"))
    log.close()
    assert bus.taken == ["a", "c"] and sum(lost) == 2


def test_what_cannot_be_encoded_is_counted_once_however_often_the_rest_is_tried():
    bus, lost = Bus(), []
    bus.up = False
    log = ServeLog(bus, dict, lost.append)
    log.note(a_list("a"))
    log.note({"no": "list"})
    for _ in range(4):
        with pytest.raises(BusError): log.flush()
    bus.up = True
    log.close()
    assert bus.taken == ["a"] and lost == [1]


class Odd(Bus):
    """Raises what a bus does not, so many times, and always for some lists."""

    def __init__(self, times: int, never: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.times, self.never = times, never

    def send(self, records: list) -> None:
        if self.times:
            self.times -= 1
            raise RuntimeError("can't start new thread")
        if any(SERVED.decode(r.data)["request_id"] in self.never for r in records): raise ValueError("too large")
        super().send(records)


def test_the_thread_lives_on_whatever_is_raised(monkeypatch, caplog):
    monkeypatch.setattr("reco.data.serve_log.PAUSE_S", 0.01)
    bus, lost = Odd(CHANCES - 1), []
    log = ServeLog(bus, dict, lost.append)
    for n in range(50): log.note(a_list(str(n)))
    assert until(lambda: len(bus.taken) == 50) and bus.taken == [str(n) for n in range(50)] and not lost and not log.left
    assert "RuntimeError: can't start new thread; lists wait in memory" in caplog.text
    log.note(a_list("50"))
    assert until(lambda: len(bus.taken) == 51)
    log.close()


def test_a_list_that_no_bus_takes_holds_up_the_others_for_a_while_only(monkeypatch, caplog):
    monkeypatch.setattr("reco.data.serve_log.PAUSE_S", 0.01)
    bus, lost = Odd(0, ("7", "31")), []
    log = ServeLog(bus, dict, lost.append)
    for n in range(50): log.note(a_list(str(n)))
    assert until(lambda: len(bus.taken) == 48) and set(map(str, range(50))) - {*bus.taken} == {"7", "31"} and sum(lost) == 2
    assert caplog.text.count("a list cannot be sent: ValueError: too large") == 2
    log.close()
    assert sum(lost) == 2


def test_what_an_odd_error_leaves_behind_at_the_end_is_counted():
    bus, lost = Odd(99), []
    log = ServeLog(bus, dict, lost.append)
    log.ended.set()
    for n in range(5): log.note(a_list(str(n)))
    log.close()
    assert sum(lost) == 5 and not bus.taken


def test_many_threads_note_at_once():
    bus = Bus()
    log = ServeLog(bus, dict)
    def work(t: int) -> None:
        for n in range(200): log.note(a_list(f"{t}-{n}"))
    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    log.close()
    assert sorted(bus.taken) == sorted(f"{t}-{n}" for t in range(4) for n in range(200))
    for t in range(4): assert [x for x in bus.taken if x.startswith(f"{t}-")] == [f"{t}-{n}" for n in range(200)]
