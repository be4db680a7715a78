"""The online store, on the embedded Redis and on Debian's: what is kept, in which order, for how long, and what a crash leaves."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from pydantic import SecretStr
from servers import redis_server
from stores import DAY_S, ITEMS, NOON, log, named, put, views

from app.ports import free_port
from reco.data.histories import event_log, histories
from reco.features.items import ITEM_FEATURES
from reco.features.pasts import SLACK, PastEvent
from reco.features.rows import GRACE_S
from reco.features.store import OnlineStore, Past, StoreDown, StoreError, history_of_request, open_store
from reco.ids import IdMap
from reco.pipeline import recommend
from reco.redis_server import listens, socket_path
from reco.request import RecommendationRequest
from reco.schemas import EVENTS
from reco.settings import Online, Settings, Train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["embedded", "redis-server"])
def place(request, tmp_path_factory) -> Iterator[Settings]:
    """Settings that name a Redis."""
    folder = tmp_path_factory.mktemp("redis")
    if request.param == "embedded": yield Settings(root=folder)
    else:
        with redis_server(folder) as url: yield Settings(root=folder, online=Online(url=SecretStr(url)))


@pytest.fixture
def kept(place) -> Iterator[OnlineStore]:
    """A store with keys of its own."""
    store = named(place, f"test{time.monotonic_ns()}")
    yield store
    store.close()


def past_of(frame: pl.DataFrame, user: str, cap: int) -> list[PastEvent]:
    """What the store should hold, computed the plain way: each event once, in order, the latest."""
    rows = {r["event_id"]: r for r in frame.filter(user_id=user).iter_rows(named=True) if r["event"] != "impression"}
    return sorted(PastEvent(round(r["ts"].timestamp() * 1000), EVENTS.index(r["event"]), r["item_id"]) for r in rows.values())[-cap:]


# ---- pasts -------------------------------------------------------------------------------------------------------

ITEM = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4)
ROWS = st.lists(st.tuples(st.sampled_from(["ada", "bo", "é\n*"]), st.integers(-3, 3), ITEM, st.sampled_from(EVENTS)), max_size=40)


@effort(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, cuts=st.lists(st.integers(0, 40), max_size=3), again=st.booleans(), seed=st.integers(0, 99))
def test_a_past_is_what_a_plain_list_would_be(place, rows, cuts, again, seed):
    """Whatever order and parts events come in, and however often: each once, in order, the latest of them."""
    store = named(place, f"test{time.monotonic_ns()}", max_history=5)
    frame = log([(str(i), *r) for i, r in enumerate(rows)])
    mixed = frame.sample(fraction=1, shuffle=True, seed=seed)
    for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 99], strict=True): store.append(mixed[a:b])
    if again: store.append(frame)
    for user in ("ada", "bo", "é\n*"): assert store.events(user) == past_of(frame, user, 5 + SLACK)
    assert set(store.user_ids()) == set(frame.filter(pl.col("event") != "impression")["user_id"])
    store.close()


def test_the_cap_cuts_ties_as_training_does(kept):
    """400 events in 20 milliseconds: the stored past, cut to what the model sees, is the one that `histories` cuts from the log."""
    rng = np.random.default_rng(3)
    frame = log([(str(i), "ada", int(rng.integers(20)), f"item{rng.integers(40)}", EVENTS[rng.integers(1, 5)]) for i in range(400)])
    users, items, asof = IdMap(["ada"]), IdMap(frame["item_id"]), round(NOON.timestamp() * 1000) + 15
    for part in frame.sample(fraction=1, shuffle=True, seed=1).iter_slices(90): kept.append(part)
    frame = frame.filter(pl.col("ts") < NOON + timedelta(milliseconds=16)) # else more lie ahead than the slack holds
    small = named_like(kept)
    small.append(frame)
    wanted = histories(event_log(frame, users, items), np.array([0]), np.array([asof]), 200, np.ones(len(items), bool))
    got = history_of_request(Past.of(small.events("ada")), [], asof, 200, items, np.ones(len(items), bool))
    for a, b in zip(vars(wanted).values(), vars(got).values(), strict=True): np.testing.assert_array_equal(a, b)
    assert len(kept.events("ada")) == 256 and len(got.item) == 200


def named_like(store: OnlineStore) -> OnlineStore:
    """Another store in the same Redis."""
    return OnlineStore(store.client, f"{store.keys.prefix}-other", 200, DAY_S, DAY_S)


def test_a_past_lives_as_long_as_something_new_comes(kept):
    ttl = lambda: kept.client.ttl(kept.keys.past("ada"))
    kept.append(views("ada", 3))
    assert ttl() == DAY_S
    kept.client.expire(kept.keys.past("ada"), 100)
    kept.append(views("ada", 3)) # a redelivery is nothing new
    assert ttl() <= 100
    kept.append(views("ada", 1, start=9))
    assert ttl() == DAY_S
    kept.append(views("ada", 400, start=1_000))
    kept.client.expire(kept.keys.past("ada"), 100)
    kept.append(views("ada", 12)) # older than the whole list: not kept, so nothing new either
    assert ttl() <= 100


def test_more_of_one_shopper_than_a_script_can_take_at_once(place):
    store = named(place, f"test{time.monotonic_ns()}", max_history=6_000)
    frame = pl.concat([views("robot", 6_056), views("ada", 3), views("bo", 1_500)])
    assert store.append(frame) == frame.height and store.append(frame) == 0
    assert store.events("robot") == past_of(frame, "robot", 6_056) and len(store.events("bo")) == 1_500
    store.close()


def test_nulls_are_refused_and_nothing_is_stored(kept):
    bad = views("ada", 2).with_columns(event_id=pl.Series(["a", None]))
    with pytest.raises(StoreError, match="events without event_id"): kept.append(bad)
    assert kept.events("ada") == [] and kept.someone() is None


WRITER = """
import sys, time
sys.path[:0] = ["tests"]
from stores import ITEMS, named, put, views
from reco.settings import Settings, Online
from pathlib import Path
url, root, prefix, name = sys.argv[1:]
store = named(Settings(root=Path(root), online=Online(url=url)), prefix)
print("ready", flush=True)
"""


def writer(place: Settings, prefix: str, name: str, script: str) -> subprocess.Popen:
    """Another process with the same store open; says `ready`, waits for a line, then runs the script."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RECO_")}
    code = WRITER + "sys.stdin.readline()\n" + script
    process = subprocess.Popen([sys.executable, "-c", code, place.online.url.get_secret_value(), str(place.root), prefix, name], cwd=ROOT,
                               env=env, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_write_the_same_shoppers(place, kept):
    """Nothing is lost between two that add to the same lists at the same time, some of it the same events."""
    script = """
for i in range(0, 120, 3):
    for user in ("ada", "bo"): store.append(views(user, 3, start=i, name=name if i % 2 else "both"))
"""
    both = [writer(place, kept.keys.prefix, name, script) for name in ("first", "second")]
    for p in both: p.stdin.close()
    assert [p.wait(60) for p in both] == [0, 0]
    for user in ("ada", "bo"):
        parts = [views(user, 3, i, n if i % 2 else "both") for n in ("first", "second") for i in range(0, 120, 3)]
        assert kept.events(user) == past_of(pl.concat(parts), user, 256) and len(kept.events(user)) == 180


# ---- erasure -----------------------------------------------------------------------------------------------------


def keys_of(store: OnlineStore) -> set[bytes]:
    return set(store.client.scan_iter(f"{store.keys.prefix}*"))


def test_an_erased_shopper_does_not_come_back(kept):
    now = round(time.time() * 1000) - round(NOON.timestamp() * 1000)
    old, ahead = views("ada", 5), views("ada", 1, start=now + 60_000, name="ahead") # a clock that runs a minute ahead
    kept.append(pl.concat([old, ahead, views("bo", 2)]))
    assert kept.erase("ada") and not kept.erase("ada")
    assert kept.append(old) == kept.append(ahead) == 0 # the stream delivers again
    assert kept.events("ada") == [] and len(kept.events("bo")) == 2 and list(kept.user_ids()).count("ada") == 0
    assert not [k for k in keys_of(kept) if b"ada" in k] and kept.client.ttl(kept.keys.erased("ada")) == DAY_S
    later = views("ada", 1, start=now + 120_000, name="later")
    assert kept.append(later) == 1 and kept.events("ada") == past_of(later, "ada", 9)


def test_a_shopper_who_is_not_known_can_be_erased(kept):
    assert not kept.erase("nobody")
    assert kept.append(views("nobody", 3)) == 0 # the stream was late, not the shopper


def test_clearing_takes_all_pasts_and_leaves_the_marks(kept):
    kept.erase("ada")
    kept.append(pl.concat([views("ada", 1), *(views(f"user{i}", 1) for i in range(30))]))
    other = OnlineStore(kept.client, kept.keys.prefix + "x", 200, DAY_S, DAY_S)
    other.append(views("bo", 1))
    kept.clear()
    assert kept.someone() is None and other.someone() == "bo" and kept.append(views("ada", 1)) == 0


# ---- what cannot be understood ------------------------------------------------------------------------------------


def test_a_foreign_value_is_an_error_that_names_the_shopper(kept, bundle):
    kept.append(views("bo", 2))
    kept.client.zadd(kept.keys.past("ada"), {b"what is this": 1})
    with pytest.raises(StoreError, match="the past of 'ada': not an event"): kept.events("ada")
    kept.client.set(kept.keys.past("eve"), "text")
    with pytest.raises(StoreError, match="WRONGTYPE"): kept.events("eve")
    assert recommend(RecommendationRequest("ada"), bundle, kept).degraded
    assert not recommend(RecommendationRequest("bo"), bundle, kept).degraded # one shopper's trouble is nobody else's
    kept.client.set(kept.row_keys.pointer(bundle.id), "not json")
    with pytest.raises(StoreError, match=f"active:{bundle.id} is not a pointer"): kept.rows(bundle.id, ["a"])
    assert recommend(RecommendationRequest("bo"), bundle, kept).degraded


def test_a_row_that_is_missing_or_of_another_length_is_never_mixed_in(kept, bundle):
    """The rows of before go on for all candidates then, and the answer says so; once the version is whole, it is taken."""
    ids, ask = bundle.ids.ids.to_list(), RecommendationRequest("nobody", 20)
    plain = recommend(ask, bundle, kept)
    put(kept, bundle.id, "v1", ids, 5)
    before = recommend(ask, bundle, kept)
    assert before.items != plain.items and not before.degraded
    for version, value in (("v2", None), ("v3", b"\0" * 3)):
        put(kept, bundle.id, version, ids, 7)
        for i in ids[::2]:
            name = kept.row_keys.row(version, i)
            kept.client.delete(name) if value is None else kept.client.set(name, value)
        got = recommend(ask, bundle, kept)
        assert got.without == ("store",) and got.items == before.items
    with pytest.raises(StoreError, match=rf"row:v3:{ids[0]} has not {len(ITEM_FEATURES)} features"): kept.rows(bundle.id, ids)
    for version, value in (("v4", 9), ("v5", 90), ("v6", 0), ("v7", -9)):  # which numbers the trees tell apart is another matter
        put(kept, bundle.id, version, ids, value)
        last = recommend(ask, bundle, kept)
        if last.items != before.items: break
    assert not last.degraded and last.items != before.items


# ---- versions ----------------------------------------------------------------------------------------------------

FLIP = """
for n in range(1, 10**9):
    put(store, "bundle", f"v{n}", ITEMS, n)
    time.sleep(.002)  # a reader tries a few times, and versions do not follow each other faster than it reads
    print(n, flush=True)
"""


def watch(place: Settings, store: OnlineStore, read: Callable[[], np.ndarray], seconds: float = 2) -> int:
    """Read while another process brings version after version; every answer is one version, and not one that was replaced before."""
    put(store, "bundle", "v0", ITEMS, 0)
    process, seen = writer(place, store.keys.prefix, "1", FLIP), set()
    try:
        process.stdin.close()
        until, heard = time.monotonic() + seconds, b""
        while time.monotonic() < until:
            if select.select([process.stdout], [], [], 0)[0]: heard += os.read(process.stdout.fileno(), 65_536)
            said = int((heard.rpartition(b"\n")[0].rpartition(b"\n")[2]) or 0) # active before the question is asked
            values = np.unique(read())
            assert len(values) == 1, f"a mix: {values}"
            assert values[0] >= said, f"version {values[0]} when {said} was active"
            seen.add(values[0])
    finally:
        process.kill()
        process.wait()
    return len(seen)


def test_readers_see_one_version_and_the_newest(place, kept):
    assert watch(place, kept, lambda: kept.rows("bundle", ITEMS)[1]) > 20


def test_a_reader_that_does_not_look_at_the_pointer_would_be_noticed(place, kept):
    def careless() -> np.ndarray: # what it saw first, for ever
        version = kept._seen.setdefault("bundle", kept.active("bundle")).version
        return np.frombuffer(b"".join(kept.client.mget([kept.row_keys.row(version, i) for i in ITEMS])), "<f4")
    with pytest.raises(AssertionError, match="was active"): watch(place, kept, careless)


def test_rows_written_over_in_place_would_be_noticed(place, kept, monkeypatch):
    """Without the version in the key a reader gets a mix."""
    def careless() -> np.ndarray: # asks in two parts, as a cluster or a pipeline would
        active = kept.active("bundle").version
        halves = [kept.client.mget([kept.row_keys.row(v, i) for i in ITEMS]) for v in (active, kept.active("bundle").version)]
        return np.frombuffer(b"".join(halves[0][:150] + halves[1][150:]), "<f4")
    with pytest.raises(AssertionError, match="a mix"): watch(place, kept, careless, seconds=20)


def test_an_old_version_goes_after_a_minute_and_the_pointer_before_its_rows(kept):
    put(kept, "bundle", "v1", ITEMS, 1)
    put(kept, "bundle", "v2", ITEMS, 2)
    ttl = lambda key: kept.client.ttl(key)
    assert all(0 < ttl(kept.row_keys.row("v1", i)) <= GRACE_S for i in ITEMS) and ttl(kept.row_keys.items("v1")) <= GRACE_S
    assert DAY_S - 5 < ttl(kept.row_keys.pointer("bundle")) <= DAY_S < ttl(kept.row_keys.row("v2", "item0"))
    put(kept, "bundle", "v2", ITEMS, 2) # the same again is not its own predecessor
    assert ttl(kept.row_keys.row("v2", "item0")) > DAY_S


def test_two_bundles_have_their_own(kept):
    put(kept, "one", "v1", ITEMS, 1)
    put(kept, "two", "v2", ITEMS, 2)
    assert kept.rows("one", ITEMS)[1].max() == 1 and kept.rows("two", ITEMS)[1].max() == 2 and kept.rows("three", ITEMS)[0] is None


# ---- the embedded server ------------------------------------------------------------------------------------------


def pid_of(store: OnlineStore) -> int: return store.client.info("server")["process_id"]


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE: return True
        time.sleep(0.02)
    return False


HAMMER = """
for i in range(10**9):
    store.append(views("ada", 1, start=i))
    print(i, flush=True)
"""


def test_what_was_acknowledged_survives_the_death_of_every_process(tmp_path):
    """Server, keeper and writer are killed while events come in; all that was acknowledged is there, and not much more."""
    place = Settings(root=tmp_path)
    for round_ in range(5):
        store = named(place, "reco")
        before = len(store.events("ada"))
        process = writer(place, "reco", "", HAMMER.replace("start=i", f"start=i + {1_000 * round_}"))
        process.stdin.close()
        for _ in range(20 + 7 * round_): acknowledged = int(process.stdout.readline())
        server = psutil.Process(pid_of(store))
        for p in (server.parent(), server, process): p.kill()
        rest = process.stdout.read().split()
        acknowledged = max([acknowledged, *map(int, rest)])
        process.wait()
        store.close()
        store = named(place, "reco")
        kept = len(store.events("ada")) - before
        store.close()
        assert acknowledged + 1 <= kept <= acknowledged + 2 # one may be written and not yet said


def test_many_that_start_at_once_start_one_server(tmp_path):
    place = Settings(root=tmp_path)
    script = "print(store.client.info('server')['process_id'], flush=True); sys.stdin.readline()"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RECO_")}
    code = WRITER.replace('print("ready", flush=True)', script)
    four = [subprocess.Popen([sys.executable, "-c", code, "", str(tmp_path), "reco", ""], cwd=ROOT, env=env, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    [server] = {int(p.stdout.readline()) for p in four}
    four[0].stdin.close()
    assert four[0].wait(20) == 0
    four[1].kill()
    four[1].wait()
    assert listens(socket_path(place.root / "data" / "online")) and not gone(server, 0.5) # two still use it
    for p in four[2:]: p.kill()
    for p in four[2:]: p.wait()
    assert gone(server)
    assert all(gone(p.pid) for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])) # the keeper


def test_the_server_goes_with_its_keeper_and_comes_back_with_the_next_command(tmp_path):
    store = named(Settings(root=tmp_path), "reco")
    store.append(views("ada", 3))
    server = psutil.Process(pid_of(store))
    server.parent().kill()
    assert sys.platform != "linux" or gone(server.pid)
    assert len(store.events("ada")) == 3 and pid_of(store) != server.pid
    store.close()


def test_its_environment_and_folder_are_closed_to_others(tmp_path, monkeypatch):
    monkeypatch.setenv("RECO_POSTGRES_URL", "postgresql://u:hunter2@h/d")
    store = named(Settings(root=tmp_path), "reco")
    server = psutil.Process(pid_of(store))
    assert all("hunter2" not in str(p.environ()) for p in (server, server.parent()))
    assert not [c for c in server.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert (tmp_path / "data" / "online").stat().st_mode & 0o077 == 0
    store.close()


def test_a_folder_deeper_than_a_sockets_name_may_be(tmp_path):
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    store = named(Settings(root=deep), "reco")
    store.append(views("ada", 1))
    assert len(store.events("ada")) == 1 and not (deep / "data" / "online" / "redis.sock").exists()
    store.close()


def test_a_log_that_was_cut_off_loses_only_its_end(tmp_path):
    """The disk was full, or the power failed: what Redis can read it reads."""
    place = Settings(root=tmp_path)
    store = named(place, "reco")
    for i in range(20): store.append(views("ada", 1, start=i))
    server = pid_of(store)
    store.close()
    assert gone(server)
    aof = tmp_path / "data" / "online" / "appendonly.aof"
    aof.write_bytes(aof.read_bytes()[:-7])
    store = named(place, "reco")
    assert len(store.events("ada")) == 19
    store.close()


@pytest.mark.parametrize("damage", ["no folder", "no log"])
def test_a_server_that_cannot_start_says_why_at_once(tmp_path, damage):
    if damage == "no folder": (tmp_path / "data").write_text("a file")
    else: (tmp_path / "data" / "online" / "appendonly.aof").mkdir(parents=True)
    began = time.monotonic()
    with pytest.raises(StoreError) as e: named(Settings(root=tmp_path), "reco")
    assert time.monotonic() - began < 5 and ("File exists" in str(e.value) or "Not a directory" in str(e.value) or "append" in str(e.value))


# ---- a server that is given ---------------------------------------------------------------------------------------


def test_a_wrong_password_is_refused_and_not_shown(tmp_path):
    with redis_server(tmp_path) as url:
        wrong = url.replace("@", "wrong@") if "@" in url else url.replace("redis://", "redis://:wrong@")
        store = open_store(Settings(online=Online(url=SecretStr(wrong))))
        with pytest.raises(StoreDown) as e: store.events("ada")
    assert wrong.split(":")[2].split("@")[0] not in str(e.value) and "read pasts" in str(e.value)


def test_an_address_where_nobody_is_costs_one_short_try(bundle):
    store = open_store(Settings(online=Online(url=SecretStr(f"redis://:hunter2@127.0.0.1:{free_port()}/0"))), timeout_s=0.2)
    began = time.monotonic()
    answers = [recommend(RecommendationRequest(f"u{i}", now=NOON), bundle, store) for i in range(20)]
    assert time.monotonic() - began < 2 and all(a.degraded and a.fallback and len(a.items) == 10 for a in answers)
    assert store.breaker.unanswered == 20
    with pytest.raises(StoreDown) as e: store.events("ada")
    assert "hunter2" not in str(e.value)


def test_a_server_that_hangs_is_not_waited_for(tmp_path, bundle):
    """It accepts and never answers: stopped in the middle."""
    if os.environ.get("TEST_REDIS_URL"): pytest.skip("a server of one's own can be stopped, not that of TEST_REDIS_URL")
    with redis_server(tmp_path) as url:
        store = open_store(Settings(online=Online(url=SecretStr(url))), timeout_s=0.2)
        store.append(views("ada", 2))
        os.kill(pid_of(store), signal.SIGSTOP)
        try:
            began = time.monotonic()
            answers = [recommend(RecommendationRequest("ada", now=NOON + timedelta(days=1)), bundle, store) for _ in range(20)]
            took = time.monotonic() - began
        finally: os.kill(next(p.pid for p in psutil.Process().children() if str(urlport(url)) in " ".join(p.cmdline())), signal.SIGCONT)
        assert took < 2 and all(a.degraded for a in answers)
        store.close()


def urlport(url: str) -> int: return int(url.rsplit(":", 1)[1].split("/")[0])


def test_training_and_store_agree_on_how_long_a_past_is():
    with contextlib.closing(open_store(Settings(train=Train(max_history=30), online=Online(url=SecretStr("redis://nowhere:1"))))) as store:
        assert store.cap == 30 + SLACK and store.history_s == 180 * DAY_S and store.feature_s == 14 * DAY_S
