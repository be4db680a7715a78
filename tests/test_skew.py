"""What an endpoint answered is what the same bundle makes of the lake; what is not is found, and nothing is compared that cannot be."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from starlette.testclient import TestClient
from test_shown import in_the_lake

from app.contract import create_app
from app.serve import Replica, open_intake
from app.shown import open_log
from reco.data.histories import epoch_ms
from reco.data.lake import Lake, open_lake
from reco.features.store import open_store
from reco.materialize import item_rows, materialize_rows, note_rows, noted_rows
from reco.monitoring.facts import Stretch
from reco.monitoring.skew import (
    Compared,
    beyond,
    changed_since,
    compared_again,
    first_apart,
    skew_figures,
)
from reco.redis_server import disconnect

SHOPPERS = 24


@pytest.fixture
def replica(bundle, trained, tmp_path) -> Iterator[Replica]:
    """A replica with an online store, a bus and a lake of its own; the lake knows the shop's log and catalogue."""
    settings = trained.settings.model_copy(update={"root": tmp_path, "stream": trained.settings.stream.model_copy(update={"batch_seconds": 0.2})})
    made = Replica()
    made.bundle, made.store, made.intake, made.keep_s = bundle, open_store(settings), open_intake(settings), 30
    made.log, made.settings = open_log(settings, made.meter.lost.inc), settings
    lake = open_lake(settings)
    lake.write("catalog", trained.sim.catalog, key=["item_id", "valid_from"])
    lake.write("interactions", trained.sim.interactions, key=["event_id"], day_of="ts")
    yield made
    vars(bundle).pop("_online", None)
    made.log.close()
    disconnect(made.intake.producer.client)
    made.store.close()


def visited(replica: Replica, began_ms: int) -> TestClient:
    """An endpoint at which two dozen shoppers looked at four items each, in the minute before."""
    http, ids = TestClient(create_app(replica)), replica.bundle.ids
    seen = [{"event_id": f"{began_ms}-{n}-{j}", "ts": began_ms - 60_000 + 1_000 * n + j, "user_id": f"shopper{n}", "item_id": ids.external([(7 * n + 31 * j) % 250])[0], "event": kind}
            for n in range(SHOPPERS) for j, kind in enumerate(("view", "view", "addtocart", "view"))]
    assert http.post("/events/v1", json=seen).status_code == 202
    return http


def again(replica: Replica, exposures: pl.DataFrame, late: tuple[dict, ...] = (), n: int = 100) -> Compared:
    """The lists of the last hour beside what the bundle makes of the lake, and of events that reached it too late for the endpoint."""
    lake, now = open_lake(replica.settings), datetime.now(UTC) + timedelta(seconds=1)
    events = lake.read("interactions")
    if late: events = pl.concat([events, pl.LazyFrame(late).select(pl.col(c).cast(t) if c in late[0] else pl.lit(None, t).alias(c) for c, t in events.collect_schema().items())])
    hour = Stretch(now - timedelta(hours=1), now, timedelta(hours=1))
    return compared_again(replica.bundle, exposures.lazy(), events, lake.read("catalog"), hour, n, 1, noted_rows(lake, replica.bundle.id), 1e9, replica.keep_s)


def home(http: TestClient, n: int, k: int = 6) -> list[dict]: return http.get(f"/recommendations/v1/shopper{n}?k={k}").json()["recommendations"]


def test_what_was_served_is_what_the_lake_says_and_a_wrong_score_or_a_late_event_is_seen(replica):
    http = visited(replica, time.time_ns() // 1_000_000)
    time.sleep(0.01)
    for n in range(SHOPPERS): assert len(home(http, n)) == 6
    item = replica.bundle.ids.external([3])[0]
    assert home(http, 0) == home(http, 0)  # kept, both
    http.get(f"/similar/v1/{item}?user_id=shopper1")
    http.post("/recommendations/v1/session", json={"events": [{"item_id": item, "event": "view"}]})
    exposures = in_the_lake(replica)
    found = again(replica, exposures)
    figures = skew_figures(found)
    assert figures["requests"] == SHOPPERS and figures["different"] == 0 and figures["same_lists"] == 1 == figures["agreement"], figures
    assert found.excluded == {"kept": 2, "context": 1, "visit": 1} and first_apart(found.items) == ""
    one = pl.col("user_id") == "shopper5"  # not one of whom a list was kept: that would not equal the wrong one
    wrong = skew_figures(bad := again(replica, exposures.with_columns(pl.when(one & (pl.col("rank") == 2)).then(pl.col("score") * 1.1 + 0.01).otherwise("score").alias("score"))))
    assert wrong["different"] == pytest.approx(1 / (6 * SHOPPERS)) and wrong["same_lists"] == 1 and " was answered, " in first_apart(bad.items)
    before = exposures["ts"].min() - timedelta(seconds=2)
    late = tuple({"event_id": f"late{n}", "ts": before, "user_id": f"shopper{n}", "item_id": replica.bundle.ids.external([200 + n])[0], "event": "addtocart"} for n in range(SHOPPERS))
    behind = skew_figures(again(replica, exposures, late))
    assert beyond(behind, 0.05) and behind["different"] > 0.3 and behind["requests"] == SHOPPERS
    assert skew_figures(again(replica, exposures, tuple(x | {"ts": datetime.now(UTC)} for x in late)))["different"] == 0  # strictly before


def test_newer_feature_rows_are_made_again_and_not_taken_for_skew(replica):
    now_ms = time.time_ns() // 1_000_000
    http, lake, bundle = visited(replica, now_ms), open_lake(replica.settings), replica.bundle
    in_the_lake_first = http.get("/recommendations/v1/nobody?k=1") and in_the_lake(replica)
    assert in_the_lake_first.height == 1
    rows = item_rows(lake.read("interactions"), lake.read("catalog").collect(), bundle.ids, now_ms)
    materialize_rows(replica.store, bundle, "v1", rows, now_ms)
    for n in range(SHOPPERS): home(http, n)
    exposures = in_the_lake(replica).filter(pl.col("user_id") != "nobody")
    without = skew_figures(again(replica, exposures))
    assert without["requests"] == SHOPPERS and beyond(without, 0.05)
    note_rows(lake, bundle.id, "v1", exposures["ts"].min() - timedelta(minutes=2), now_ms)
    assert skew_figures(found := again(replica, exposures)) | {"agreement": 1} == {"requests": SHOPPERS, "items": 6.0 * SHOPPERS, "different": 0, "absent": 0, "same_lists": 1, "agreement": 1}
    assert found.excluded == {}
    note_rows(lake, bundle.id, "v2", exposures["ts"].min(), now_ms + 1)  # on their way to the replicas
    assert again(replica, exposures).excluded == {"rows": SHOPPERS}


def test_an_endpoint_that_has_forgotten_everyone_is_skew(replica):
    http = visited(replica, time.time_ns() // 1_000_000)
    replica.store.clear()
    for n in range(SHOPPERS): home(http, n)
    found = skew_figures(again(replica, exposures := in_the_lake(replica)))
    assert exposures["fallback"].all() and beyond(found, 0.05) and found["same_lists"] < 0.5


def test_a_list_with_a_changed_item_is_left_out(replica, trained):
    http = visited(replica, time.time_ns() // 1_000_000)
    lists = [[x["item_id"] for x in home(http, n)] for n in range(SHOPPERS)]
    lake, asof = open_lake(replica.settings), datetime.fromtimestamp(replica.bundle.moment.asof / 1000, UTC)
    was = trained.sim.catalog.filter(pl.col("item_id") == lists[0][0]).sort("valid_from").tail(1)
    lake.write("catalog", was.with_columns(valid_from=pl.lit(asof).cast(pl.Datetime("ms", "UTC")), title=pl.lit("another title"), available=pl.lit(False)), key=["item_id", "valid_from"])
    assert changed_since(replica.bundle, lake.read("catalog"), datetime.now(UTC)) == set()  # no score depends on either
    lake.write("catalog", was.with_columns(valid_from=pl.lit(asof + timedelta(days=1)).cast(pl.Datetime("ms", "UTC")), price=pl.col("price") * 2), key=["item_id", "valid_from"])
    exposures = in_the_lake(replica)
    found = again(replica, exposures)
    having = {n for n in range(SHOPPERS) if lists[0][0] in lists[n]} | {int(u.removeprefix("shopper")) for u in lake.read("interactions").filter(
        pl.col("item_id") == lists[0][0], pl.col("user_id").str.starts_with("shopper")).collect()["user_id"]}
    assert found.excluded == {"changed": len(having)} and skew_figures(found)["different"] == 0
    assert skew_figures(found)["requests"] == SHOPPERS - len(having) > 0


def test_no_more_is_read_than_the_requests_that_are_drawn(replica):
    http = visited(replica, time.time_ns() // 1_000_000)
    for n in range(SHOPPERS): home(http, n)
    exposures = in_the_lake(replica)
    few = again(replica, exposures, n=3)
    assert skew_figures(few)["requests"] == 3 and not beyond(skew_figures(few) | {"different": 1.0}, 0.05)  # too few to say
    assert again(replica, exposures.clear()).items.is_empty() and skew_figures(again(replica, exposures.clear())) == {"requests": 0, "items": 0}


def test_the_moment_of_rows_is_noted_once(tmp_path):
    lake, at = Lake(tmp_path), datetime(2026, 5, 1, tzinfo=UTC)
    for later in (0, 1): note_rows(lake, "b", "v", at + timedelta(hours=later), epoch_ms(at))
    assert noted_rows(lake, "b").rows() == [(at, epoch_ms(at))] and noted_rows(lake, "c").is_empty()
