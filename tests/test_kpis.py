"""What the shop's lists sell: credit counted against brute force, and intervals that hold what they promise."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reco.experiments.readout import readout
from reco.monitoring.credit import outcomes_of
from reco.monitoring.kpis import KPIS, kpi_table
from reco.monitoring.returning import DAYS, cohorts
from reco.schemas import EXPOSURES, INTERACTIONS, SchemaError, conform

START = datetime(2026, 5, 1, tzinfo=UTC)
WINDOW = timedelta(minutes=30)
USERS, ITEMS, REQUESTS = ["ann", "bob", None], ["a", "b", "c"], ["r1", "r2", "r3", "r4"]


def at(minute: int) -> datetime: return START + timedelta(minutes=minute)


def shown_frame(rows: list[dict]) -> pl.DataFrame:
    return conform(pl.DataFrame(rows, schema_overrides={"user_id": pl.String}) if rows else EXPOSURES.empty(), EXPOSURES)


def event_frame(rows: list[dict]) -> pl.DataFrame:
    return conform(pl.DataFrame(rows, infer_schema_length=None) if rows else INTERACTIONS.empty(), INTERACTIONS)


REQUEST = st.fixed_dictionaries({"minute": st.integers(0, 60), "user": st.sampled_from(USERS), "items": st.lists(st.sampled_from(ITEMS), min_size=1, max_size=3, unique=True)})
EVENT = st.fixed_dictionaries({"minute": st.integers(0, 120), "user": st.sampled_from(["ann", "bob"]), "item": st.sampled_from(ITEMS),
                               "event": st.sampled_from(["impression", "click", "view", "addtocart", "transaction"]), "request": st.sampled_from([*REQUESTS, None, "other"]),
                               "order": st.sampled_from(["o1", "o2", None]), "quantity": st.sampled_from([None, 1, 3]), "price": st.sampled_from([None, 2.5, 10.0])})


def frames(requests: list[dict], events: list[dict]) -> tuple[pl.DataFrame, pl.DataFrame]:
    shown = [{"request_id": REQUESTS[n], "ts": at(r["minute"]), "user_id": r["user"], "surface": "for_you", "rank": i + 1, "item_id": item, "bundle": "b"}
             for n, r in enumerate(requests) for i, item in enumerate(r["items"])]
    # no two moments are alike: which of two simultaneous clicks is the last is not what is tested here
    done = [{"event_id": str(n), "ts": at(e["minute"]) + timedelta(milliseconds=n), "user_id": e["user"], "item_id": e["item"], "event": e["event"],
             "request_id": e["request"], "order_id": e["order"], "quantity": e["quantity"], "price": e["price"]} for n, e in enumerate(events)]
    return shown_frame(shown), event_frame(done)


def by_hand(shown: pl.DataFrame, done: pl.DataFrame) -> dict[tuple[str, str], dict]:
    """From each cart and purchase back through the log to the last click, as one would explain it to somebody."""
    when = {(e["request_id"], e["item_id"]): e["ts"] for e in shown.iter_rows(named=True)}
    whose = {(e["request_id"], e["item_id"]): e["user_id"] for e in shown.iter_rows(named=True)}
    out = {key: {"click": 0, "cart": 0, "purchase": 0, "units": 0, "revenue": 0.0, "unpriced": 0, "orders": set()} for key in when}
    events = sorted(done.iter_rows(named=True), key=lambda e: e["ts"])

    def list_of(e: dict) -> tuple[str, str] | None:
        key = e["request_id"], e["item_id"]
        return key if e["event"] in ("click", "view") and key in when and when[key] <= e["ts"] <= when[key] + WINDOW and whose[key] in (None, e["user_id"]) else None
    for n, e in enumerate(events):
        if key := list_of(e): out[key]["click"] = 1
        if e["event"] not in ("addtocart", "transaction"): continue
        for earlier in reversed(events[:n]):
            if (earlier["user_id"], earlier["item_id"]) == (e["user_id"], e["item_id"]) and (key := list_of(earlier)): break
        else: continue
        if e["ts"] - earlier["ts"] > WINDOW: continue
        mine = out[key]
        if e["event"] == "addtocart":
            mine["cart"] = 1
            continue
        pieces = 1 if e["quantity"] is None else e["quantity"]
        mine["purchase"], mine["units"], mine["revenue"] = 1, mine["units"] + pieces, mine["revenue"] + pieces * (e["price"] or 0)
        mine["unpriced"] += e["price"] is None
        mine["orders"].add(e["order_id"] or (e["user_id"], e["ts"]))
    return out


@given(st.lists(REQUEST, max_size=4), st.lists(EVENT, max_size=12))
def test_credit_is_what_counting_by_hand_gives(requests, events):
    shown, done = frames(requests, events)
    table, hand = outcomes_of(shown, done, WINDOW), by_hand(shown, done)
    assert table.height == len(hand)
    for row in table.iter_rows(named=True):
        mine = hand[row["request_id"], row["item_id"]]
        assert all(row[c] == mine[c] for c in ("click", "cart", "purchase", "units", "unpriced")), (row, mine)
        assert row["revenue"] == pytest.approx(mine["revenue"]) and len(row["order_ids"] or ()) == len(mine["orders"])
    if not table.height: return
    total = kpi_table(table).row(0, named=True)
    assert all(total[c] == sum(m[c] for m in hand.values()) for c in ("click", "unpriced")) and total["exposures"] == len(hand)
    buyers = {}  # orders are counted once per shopper
    for row in table.iter_rows(named=True): buyers.setdefault(row["user_id"] or row["request_id"], set()).update(hand[row["request_id"], row["item_id"]]["orders"])
    assert total["orders"] == sum(map(len, buyers.values()))


def one_shopper(lists: dict[str, int], *did: tuple[int, str, str | None]) -> dict[str, tuple[int, int]]:
    """Lists of one item at their minutes, what was done with it → (click, purchase) of each list, with a window of a day."""
    shown = shown_frame([{"request_id": name, "ts": at(m), "user_id": "ann", "surface": "for_you", "rank": 1, "item_id": "a", "bundle": "b"} for name, m in lists.items()])
    done = event_frame([{"event_id": str(n), "ts": at(m), "user_id": "ann", "item_id": "a", "event": event, "request_id": of} for n, (m, event, of) in enumerate(did)])
    return {r["request_id"]: (r["click"], r["purchase"]) for r in outcomes_of(shown, done, timedelta(days=1)).iter_rows(named=True)}


def test_the_last_click_is_the_last_of_all_clicks():
    back = one_shopper({"A": 0, "B": 1}, (5, "click", "A"), (10, "click", "B"), (15, "click", "A"), (20, "transaction", None))
    assert back == {"A": (1, 1), "B": (1, 0)}
    assert one_shopper({"A": 0}, (30, "click", "A"), (24 * 60, "click", "A"), (25 * 60, "transaction", None)) == {"A": (1, 1)}
    assert one_shopper({"A": 0}, (30, "click", "A"), (25 * 60, "transaction", None)) == {"A": (1, 0)}


def test_a_click_counts_within_the_window_after_its_list():
    assert one_shopper({"A": 0}, (24 * 60, "click", "A"), (48 * 60, "transaction", None)) == {"A": (1, 1)}
    assert one_shopper({"A": 0}, (24 * 60 + 1, "click", "A"), (24 * 60 + 2, "transaction", None)) == {"A": (0, 0)}
    late = one_shopper({"A": 0, "B": 60}, (90, "click", "B"), (24 * 60 + 1, "click", "A"), (24 * 60 + 2, "transaction", None))
    assert late == {"A": (0, 0), "B": (1, 1)}  # what does not count as a click takes no credit from one that does


def test_a_name_that_shoppers_share_gives_each_their_own():
    """A client that sends one X-Request-ID for everybody, or for a whole visit."""
    show = lambda minute, user, *items, surface="for_you": [{"request_id": "same", "ts": at(minute), "user_id": user, "surface": surface, "rank": n + 1, "item_id": i, "bundle": "b",
                                                             "list_id": f"{minute}-{user}-{surface}"} for n, i in enumerate(items)]
    did = lambda n, minute, user, item, event, of="same", **more: {"event_id": str(n), "ts": at(minute), "user_id": user, "item_id": item, "event": event, "request_id": of} | more
    shown = shown_frame(show(0, "ann", "a", "b") + show(0, "bob", "a") + show(9, "ann", "a") + show(9, "ann", "a", surface="similar") + show(9, None, "b"))
    done = event_frame([did(1, 5, "ann", "a", "click"), did(2, 6, "ann", "a", "transaction", None, order_id="o1", price=2.0), did(3, 6, "cy", "a", "click"),
                        did(4, 12, "ann", "a", "click", surface="for_you"), did(5, 13, "ann", "a", "addtocart", None), did(6, 14, "ann", "b", "click"), did(7, 15, "dan", "b", "click")])
    found = outcomes_of(shown, done, WINDOW).select("list_id", "item_id", "click", "cart", "purchase").rows()
    assert sorted(found) == [("0-ann-for_you", "a", 1, 0, 1), ("0-ann-for_you", "b", 1, 0, 0), ("0-bob-for_you", "a", 0, 0, 0),
                             ("9-None-for_you", "b", 1, 0, 0), ("9-ann-for_you", "a", 1, 1, 0), ("9-ann-similar", "a", 0, 0, 0)]


@given(st.lists(REQUEST, min_size=1, max_size=4), st.lists(EVENT, max_size=12), st.randoms())
def test_order_and_repeats_of_rows_change_nothing(requests, events, random):
    shown, done = frames(requests, events)
    mixed = [pl.concat([f, f])[random.sample(range(2 * f.height), 2 * f.height)] for f in (shown, done)]
    assert outcomes_of(*mixed, WINDOW).equals(outcomes_of(shown, done, WINDOW))


def traffic(rng: np.random.Generator, shoppers: int, click: float, buy: float) -> pl.DataFrame:
    """Exposures with outcomes of shoppers who differ: what an interval over exposures would take for certainty."""
    taste = rng.beta(2, 2 * (1 - click) / click, shoppers)
    who = np.repeat(np.arange(shoppers), rng.geometric(0.05, shoppers))
    clicked = rng.random(len(who)) < taste[who]
    bought = clicked & (rng.random(len(who)) < buy)
    return pl.DataFrame({"request_id": [f"r{i}" for i in range(len(who))], "item_id": "i", "ts": [START] * len(who), "user_id": [f"u{u}" for u in who],
                         "surface": "for_you", "click": clicked.astype(int), "cart": 0, "purchase": bought.astype(int), "units": bought.astype(int),
                         "revenue": bought * 20.0, "unpriced": 0, "order_ids": [[f"o{i}"] if b else None for i, b in enumerate(bought)]},
                        schema_overrides={"order_ids": pl.List(pl.String)})


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, inside, naive = np.random.default_rng(3), 0, 0
    for _ in range(200):
        table = traffic(rng, 150, 0.2, 0.3)
        row = kpi_table(table).row(0, named=True)
        inside += row["CTR_low"] <= 0.2 <= row["CTR_high"]
        half = 1.96 * np.sqrt(row["CTR"] * (1 - row["CTR"]) / row["exposures"])
        naive += abs(row["CTR"] - 0.2) <= half
    assert inside >= 178, inside  # 190 expected; below 178 once in ten thousand times with a 94% interval
    assert naive < 150, naive  # an interval over exposures is what this is not


def test_groups_are_what_a_filter_gives():
    rng = np.random.default_rng(5)
    table = traffic(rng, 200, 0.2, 0.3).with_columns(variant=pl.when(pl.col("user_id").hash(1) % 3 == 0).then(None).otherwise(pl.when(pl.col("user_id").hash(2) % 2 == 0).then(pl.lit("a")).otherwise(pl.lit("b"))))
    by = kpi_table(table, ["variant"])
    assert by["variant"].to_list() == ["a", "b", None]
    for row in by.iter_rows(named=True):
        alone = kpi_table(table.filter(pl.col("variant").eq_missing(row["variant"]))).row(0, named=True)
        assert {k: row[k] for k in alone} == pytest.approx(alone, nan_ok=True)


def test_an_experiment_means_the_same_by_the_same_name():
    rng = np.random.default_rng(8)
    table = traffic(rng, 300, 0.2, 0.3).with_columns(variant=pl.when(pl.col("user_id").hash(2) % 2 == 0).then(pl.lit("a")).otherwise(pl.lit("b")))
    table = table.with_columns(order_ids=pl.when(pl.col("purchase") == 1).then(pl.concat_list("user_id")))  # all of a shopper's items in one order
    rows = table.group_by("user_id", "variant", pl.col("ts").dt.date().alias("day")).agg(
        exposures=pl.len(), clicks=pl.col("click").sum(), purchases=pl.col("purchase").sum(),
        orders=pl.col("order_ids").explode().drop_nulls().n_unique(), revenue=pl.col("revenue").sum())
    a, b = kpi_table(table, ["variant"]).iter_rows(named=True)
    found = {r["metric"]: r for r in readout(rows, {"a": 0.5, "b": 0.5}).iter_rows(named=True)}
    shared = {m.name for m in KPIS} & found.keys()
    assert shared == {"CTR", "CVR", "AOV"} and a["orders"] < a["purchase"]
    for name in shared: assert (found[name]["control"], found[name]["value"]) == pytest.approx((a[name], b[name])), name


def test_visits_without_an_id_are_shoppers_of_their_own():
    table = traffic(np.random.default_rng(1), 50, 0.3, 0.3).with_columns(user_id=pl.lit(None, pl.String))
    assert kpi_table(table)["shoppers"].item() == table.height


def test_nothing_below_the_line_is_no_number():
    table = traffic(np.random.default_rng(1), 50, 0.3, 0.3).with_columns(click=0, purchase=0, revenue=0.0, order_ids=pl.lit(None, pl.List(pl.String)))
    row = kpi_table(table).row(0, named=True)
    assert row["CTR"] == 0 and row["CVR"] is None and row["AOV"] is None and row["CVR_low"] is None and row["orders"] == 0


def test_what_is_wrong_is_named():
    shown, done = frames([{"minute": 0, "user": "ann", "items": ["a"]}], [])
    with pytest.raises(ValueError, match="window of 0:00:00 gives credit to nothing"): outcomes_of(shown, done, timedelta(0))
    with pytest.raises(SchemaError, match="exposures: missing columns: \\['surface'\\]"): outcomes_of(shown.drop("surface"), done, WINDOW)
    with pytest.raises(ValueError, match="no column \\['weather'\\] to compare by"): kpi_table(outcomes_of(shown, done, WINDOW), ["weather"])
    assert kpi_table(outcomes_of(shown.clear(), done, WINDOW), ["day"]).columns == ["day", *kpi_table(outcomes_of(shown, done, WINDOW)).columns]
    assert [m.name for m in KPIS] == ["CTR", "cart_rate", "CVR", "AOV", "revenue_per_1000"]


LOG = st.lists(st.tuples(st.sampled_from(["ann", "bob", "cy", "di"]), st.integers(0, 40)), max_size=20)


@given(LOG, st.integers(0, 45))
def test_cohorts_are_what_counting_by_hand_gives(seen, over):
    log = pl.DataFrame({"user_id": [u for u, _ in seen], "ts": [START + timedelta(days=d, hours=5) for _, d in seen]},
                       schema={"user_id": pl.String, "ts": pl.Datetime("ms", "UTC")})
    table, until = cohorts(log, (START + timedelta(days=over)).date()), over
    days = {u: {d for w, d in seen if w == u and d < until} for u, _ in seen}
    days = {u: d for u, d in days.items() if d}
    assert table["shoppers"].sum() == len(days)
    for row in table.iter_rows(named=True):
        cohort = (row["cohort"] - START.date()).days
        mine = [d for d in days.values() if min(d) == cohort]
        assert row["shoppers"] == len(mine)
        for n in DAYS:
            if cohort + n >= until: assert row[f"day_{n}"] is None and row[f"share_{n}"] is None
            else:
                assert row[f"day_{n}"] == sum(cohort + n in d for d in mine)
                assert row[f"low_{n}"] <= row[f"share_{n}"] <= row[f"high_{n}"]


def test_cohorts_of_variants():
    log = pl.DataFrame({"user_id": ["a", "a", "b", "c"], "ts": [START, START + timedelta(days=1), START, START]})
    by = cohorts(log, (START + timedelta(days=9)).date(), days=[1], by=pl.DataFrame({"user_id": ["a", "b"], "variant": ["x", "y"]}))
    assert by.select("variant", "shoppers", "day_1").rows() == [("x", 1, 1), ("y", 1, 0)]  # c was in no variant
    with pytest.raises(ValueError, match="1 and more, not \\[0\\]"): cohorts(log, START.date(), days=[0])
