"""Business metrics beside a truth that was planted: from the answered list over bus, consumer and lake to the flow, and over many shops."""

import time
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
from flow_runs import run_flow
from scipy.stats import binom

import app.consumer
from app.serve import open_intake
from app.shown import Shown, open_log
from reco.data.lake import open_lake
from reco.data.served import lists_section
from reco.features.store import open_store
from reco.monitoring.credit import outcomes_of
from reco.monitoring.kpis import kpi_table
from reco.redis_server import disconnect
from reco.request import RecommendationRequest, RecommendationResponse, ScoredItem
from reco.schemas import EXPOSURES, INTERACTIONS, conform
from reco.settings import load_settings

START, DAY_MS = datetime(2025, 5, 1, tzinfo=UTC), 86_400_000
WINDOW = timedelta(days=1)
PLACES, LISTS, PIECES = 4, 4.0, 1.5  # of a list; lists of a shopper, on average; pieces of a purchase, on average
TASTES = np.array([0.5, 1.5])  # a shopper clicks half as much or half as much again, for good


class Rates(NamedTuple):
    """What is planted on a surface."""

    click: float
    cart: float   # of clicks
    buy: float    # of clicks
    price: float  # on average


PLANTED = {"for_you": Rates(0.2, 0.5, 0.3, 20.0), "similar": Rates(0.1, 0.3, 0.5, 35.0)}
METRICS = "CTR", "cart_rate", "CVR", "AOV", "revenue_per_1000", "revenue"


def truth(surface: str, shoppers: int) -> dict[str, float]:
    """By arithmetic, from the rates. All that is bought of a list is one order."""
    r = PLANTED[surface]
    bought = TASTES * r.click * r.buy  # chance of an exposure to be bought, by taste
    by_exposure = bought.mean() * PIECES * r.price
    orders_by_list = (1 - (1 - bought) ** PLACES).mean()
    return {"CTR": r.click, "cart_rate": r.cart, "CVR": r.buy, "AOV": by_exposure * PLACES / orders_by_list, "revenue_per_1000": 1000 * by_exposure,
            "revenue": by_exposure * PLACES * LISTS * shoppers}


def on_surface(rng: np.random.Generator, surface: str, taste: np.ndarray) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Exposures and events of a day. Clicks and purchases take up to a window each; some clicks come again, some too late, and some buy without a list."""
    r, users = PLANTED[surface], len(taste)
    per_list = np.repeat(np.arange(users), 1 + rng.poisson(LISTS - 1, users))
    lists = len(per_list)
    n = lists * PLACES
    of, rank = np.repeat(np.arange(lists), PLACES), np.tile(np.arange(PLACES), lists)
    who, shown = per_list[of], rng.integers(0, DAY_MS, lists)[of]
    clicked = rng.random(n) < r.click * taste[who]
    first = shown + rng.integers(1, DAY_MS, n)
    again = clicked & (rng.random(n) < 0.3)
    last = np.where(again, first + ((shown + DAY_MS - first) * rng.random(n)).astype(np.int64), first)
    cart, buy = clicked & (rng.random(n) < r.cart), clicked & (rng.random(n) < r.buy)
    late, alone = ~clicked & (rng.random(n) < 0.05), ~clicked & (rng.random(n) < 0.05)
    name, user, item = (np.char.add(prefix, x.astype(str)) for prefix, x in ((f"{surface}-", of), ("u", who), (f"{surface}-", np.arange(n) % 997)))
    exposures = pl.DataFrame({"request_id": name, "ts": shown, "user_id": user, "surface": surface, "rank": rank + 1, "item_id": item, "bundle": "b", "source": "als"})
    price = rng.gamma(4, r.price / 4, n)

    def events(kind: str, rows: np.ndarray, at: np.ndarray, named: bool) -> pl.DataFrame:
        """Those rows, `at` ms since the start."""
        sold, m = kind == "transaction", int(rows.sum())
        return pl.DataFrame({"ts": at[rows], "user_id": user[rows], "item_id": item[rows], "event": kind, "request_id": name[rows] if named else [None] * m,
                             "order_id": name[rows] if sold else [None] * m, "quantity": rng.integers(1, 3, m) if sold else [None] * m, "price": price[rows] if sold else [None] * m},
                            schema_overrides={"request_id": pl.String, "order_id": pl.String, "quantity": pl.Int32, "price": pl.Float64})
    after = lambda at: at + rng.integers(1, DAY_MS, n)
    did = pl.concat([events("click", clicked, first, True), events("click", again, last, True), events("addtocart", cart, after(last), False),
                     events("transaction", buy, after(last), False), events("click", late, shown + DAY_MS + 60_000, True),
                     events("transaction", late, shown + DAY_MS + 120_000, False), events("transaction", alone, after(shown), False)])
    return exposures, did


def a_shop(rng: np.random.Generator, shoppers: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """One day of lists, and what came of them: EXPOSURES, INTERACTIONS."""
    taste = rng.choice(TASTES, shoppers)
    shown, did = (pl.concat(parts) for parts in zip(*(on_surface(rng, s, taste) for s in PLANTED), strict=True))
    moment = pl.lit(START) + pl.duration(milliseconds="ts")
    events = did.with_columns(ts=moment, event_id=pl.concat_str(pl.lit("e"), pl.int_range(pl.len())))
    return conform(shown.with_columns(ts=moment), EXPOSURES), conform(events, INTERACTIONS)


def test_intervals_hold_what_was_planted_as_often_as_they_say():
    """By surface, over shops that differ by chance alone. 19 of 20 intervals are to hold the truth."""
    rng, shops, shoppers = np.random.default_rng(17), 150, 200
    inside = dict.fromkeys([(s, m) for s in PLANTED for m in METRICS], 0)
    for _ in range(shops):
        for row in kpi_table(outcomes_of(*a_shop(rng, shoppers), WINDOW), ["surface"]).iter_rows(named=True):
            for metric, value in truth(row["surface"], shoppers).items(): inside[row["surface"], metric] += row[f"{metric}_low"] <= value <= row[f"{metric}_high"]
    for key, n in inside.items():  # an interval that holds it 93 to 97 times of 100 fails here less than once in ten thousand times
        assert binom.ppf(1e-4, shops, 0.93) <= n <= binom.ppf(1 - 1e-4, shops, 0.97), (key, n)
    assert 0.93 <= sum(inside.values()) / shops / len(inside) <= 0.97, inside


def event_of(row: dict) -> dict:
    """As a client sends it."""
    return row | {"ts": round(row["ts"].timestamp() * 1000)}


def list_of(part: pl.DataFrame) -> Shown:
    """As the endpoint notes it."""
    rows = part.sort("rank").to_dicts()
    asked = RecommendationRequest(rows[0]["user_id"], PLACES, surface=rows[0]["surface"], request_id=rows[0]["request_id"])
    return Shown(asked, RecommendationResponse([ScoredItem(r["item_id"], 0.5, r["source"], 1.0) for r in rows], "b", False), round(rows[0]["ts"].timestamp() * 1000), 2.0)


def test_what_was_planted_comes_out_of_the_flow(tmp_path):
    """Every list through the serve log and every event through the intake, over the bus, through the consumer into the lake, and counted by the flow."""
    (tmp_path / "settings.ini").write_text("[lake]\nroot = lake\n[online]\nfolder = online\n[stream]\nbatch_seconds = 0.2\n")
    settings, shoppers = load_settings(tmp_path / "settings.ini", {}), 300
    shown, did = a_shop(np.random.default_rng(2), shoppers)
    store, lost = open_store(settings), []
    log, intake = open_log(settings, lost.append), open_intake(settings)
    for part in shown.partition_by("request_id", "surface"): log.note(list_of(part))
    for some in did.iter_slices(500): intake.take([event_of(e) for e in some.to_dicts()], datetime.now(UTC))
    log.close()
    topics, until = (settings.stream.topic, lists_section(settings.stream, settings.served).topic), time.monotonic() + 120
    app.consumer.run(settings, "t", lambda: not any(store.client.xlen(t) for t in topics) or time.monotonic() > until)
    disconnect(intake.producer.client)
    store.close()
    lake = open_lake(settings)
    kept = lake.read("exposures").collect()
    assert not lost and kept.height == shown.height and lake.read("interactions").collect().height == did.height
    lake.write("catalog", pl.DataFrame({"item_id": shown["item_id"].unique().sort(), "valid_from": START}), key=["item_id", "valid_from"])
    done = run_flow(tmp_path, "kpis", "run", "--asof", (START + timedelta(days=3)).isoformat())
    assert done.returncode == 0, done.stdout
    table = lake.read("kpis").collect().filter(day=START.date(), dimension="surface")
    assert table["value"].to_list() == sorted(PLANTED) and table["complete"].all()
    for row in table.iter_rows(named=True):
        for metric, value in truth(row["value"], shoppers).items():
            assert row[f"{metric}_low"] <= value <= row[f"{metric}_high"], (row["value"], metric, value, row)
    first = lambda frame: frame.sort("value").select("shoppers", "exposures", "click", "cart", "purchase", "units").rows()
    alone = kpi_table(outcomes_of(shown, did, WINDOW), ["surface"]).rename({"surface": "value"})
    assert first(table) == first(alone) and table["revenue"].to_list() == pytest.approx(alone["revenue"].to_list())
