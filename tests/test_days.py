"""The books of a day: what counting by hand gives, whenever and however often they are made; and the flow that makes them."""

import math
from collections import Counter
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from flow_runs import run_flow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reco.data.lake import Lake
from reco.experiments.assignment import Assigner, Experiment, Experiments, Variant, label
from reco.monitoring.credit import outcomes_of
from reco.monitoring.days import (
    KEYS,
    SEGMENTS,
    complete,
    day_by_day,
    days_until,
    holdout_of,
    items_before,
    keep_days,
    kpis_by_day,
    missed,
    readout_of,
    retention_by_day,
    rows_of,
    variety,
    variety_by_day,
    with_segment,
)
from reco.monitoring.kpis import kpi_table
from reco.schemas import EXPOSURES, INTERACTIONS, conform
from reco.sections.operations import Kpis

START = datetime(2026, 5, 1, tzinfo=UTC)
DAY = timedelta(days=1)
HALVES = (Variant(name="old", weight=0.5), Variant(name="new", weight=0.5, rerank={"diversity": 1.0}))


def at(hours: float) -> datetime: return START + timedelta(hours=hours)


EVENTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.sampled_from(["impression", "view", "addtocart", "transaction"])), max_size=12)
ASKED = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.integers(0, 20)), min_size=1, max_size=8)


@given(EVENTS, ASKED)
def test_segments_are_what_was_known_at_the_time(events, asked):
    log = pl.DataFrame([(u, at(h), e) for u, h, e in events], schema={"user_id": pl.String, "ts": pl.Datetime("ms", "UTC"), "event": pl.String}, orient="row")
    rows = pl.DataFrame([(u, at(h)) for u, h in asked], schema={"user_id": pl.String, "ts": pl.Datetime("ms", "UTC")}, orient="row")
    found = with_segment(rows, log.lazy())["segment"].to_list()
    for (who, hour), name in zip(asked, found, strict=True):
        before = {e for u, h, e in events if u == who and h < hour and e != "impression"}
        assert name == ("anonymous" if who is None else "buyer" if "transaction" in before else "browser" if before else "new")
    assert set(found) <= set(SEGMENTS)


@given(st.lists(st.tuples(st.sampled_from([f"i{n}" for n in range(12)]), st.integers(0, 9)), max_size=30), st.lists(st.sampled_from([f"i{n}" for n in range(12)]), min_size=1, max_size=20))
def test_variety_is_what_counting_by_hand_gives(touched, shown):
    now = at(24 * 30)
    catalog = pl.DataFrame({"item_id": [f"i{n}" for n in range(10)], "valid_from": [START + timedelta(days=3 * n) for n in range(10)]}).lazy()
    log = pl.DataFrame([(i, START + timedelta(days=d), "view") for i, d in touched], schema={"item_id": pl.String, "ts": pl.Datetime("ms", "UTC"), "event": pl.String}, orient="row").lazy()
    items = items_before(catalog, log, now)
    found = variety(pl.DataFrame({"item_id": shown, "ts": now}, schema_overrides={"ts": pl.Datetime("ms", "UTC")}), items, 14)
    there = {f"i{n}" for n in range(10)} | {i for i, _ in touched}
    touches = Counter(i for i, _ in touched)
    ranked = sorted(there, key=lambda i: (-touches[i], i))
    head, known = set(ranked[: math.ceil(len(there) * 0.2)]), [i for i in shown if i in there]
    since = {i: min([START + timedelta(days=3 * int(i[1:]))] * (int(i[1:]) < 10) + [START + timedelta(days=d) for j, d in touched if j == i]) for i in there}
    assert found["items"] == len(there) and found["shown"] == len(shown) and found["coverage"] == pytest.approx(len(set(known)) / len(there))
    if not known: return
    assert found["tail"] == pytest.approx(np.mean([i not in head for i in known]))
    assert found["new"] == pytest.approx(np.mean([now - since[i] <= 14 * DAY for i in known]))
    total = max(sum(touches.values()), 1)
    assert found["novelty"] == pytest.approx(np.mean([-math.log2(max(touches[i], 1) / total) for i in known]))


def traffic(days: int = 4, users: int = 60, seed: int = 1, lift: float = 0.0, book: Experiments | None = None, held: tuple[float, float] | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Lists of three on each day, a click on some, a purchase an hour after half of the clicks; with an experiment where one is given. With `held` shoppers come on some days only:
    chances of that and of a click of the holdout from the third day on, as multiples of everybody else's."""
    rng, by, shown, did = np.random.default_rng(seed), Assigner(book or Experiments()), [], []
    for d in range(days):
        for u in range(users):
            name, when = f"r{d}-{u}", at(24 * d + 12) + timedelta(seconds=u)
            worse = held if held and d >= 2 and by.held_out(f"u{u}") else (1, 1)
            if held and rng.random() > 0.3 * worse[0]: continue
            variant = label(by.arms(f"u{u}", round(when.timestamp() * 1000), "for_you")) or None
            for rank in range(3):
                item = f"i{rng.integers(20)}-{rank}"
                shown.append({"request_id": name, "ts": when, "user_id": f"u{u}", "surface": "for_you", "rank": rank + 1, "item_id": item, "bundle": "b",
                              "source": ("als", "recent")[u % 2], "variant": variant})
                if rng.random() > 0.2 * (1 + lift * ("new" in (variant or ""))) * worse[1]: continue
                event = lambda kind, minutes, w=when, i=item, n=name, who=u, **more: did.append(
                    {"event_id": f"{kind} {n} {i}", "ts": w + timedelta(minutes=minutes), "user_id": f"u{who}", "item_id": i, "event": kind} | more)
                event("click", 1, request_id=name)
                if rng.random() < 0.5: event("transaction", 60, order_id=f"o {name}", quantity=1, price=10.0)
    return conform(pl.DataFrame(shown), EXPOSURES), conform(pl.DataFrame(did, infer_schema_length=None), INTERACTIONS)


SHOWS = st.lists(st.tuples(st.integers(0, 95), st.sampled_from("ab"), st.sampled_from("xy"), st.sampled_from(["own", "p", "q"])), min_size=1, max_size=8, unique_by=lambda show: show[:3])
ACTS = st.lists(st.tuples(st.integers(0, 7), st.floats(0.1, 80), st.sampled_from("xy"), st.booleans()), max_size=10)


@settings(max_examples=50, deadline=None)
@given(SHOWS, ACTS, st.sampled_from([1, 5.5, 24, 30]))
@example([(23, "a", "x", "own"), (48, "a", "x", "own")], [(0, 23, "x", False), (0, 44, "x", True)], 24)  # by midnight and a window neither of them has come
@example([(23, "a", "x", "own"), (24, "a", "x", "own")], [(0, 20, "x", False), (1, 23, "x", False), (1, 24, "x", True)], 24)  # the second list takes it
def test_days_alone_add_up_to_all_at_once(shows, acts, hours):
    """Names of requests may be used again, by anybody and on any day."""
    names = [f"r{n}" if name == "own" else name for n, (*_, name) in enumerate(shows)]
    shown = conform(pl.DataFrame([{"request_id": name, "ts": at(h), "user_id": u, "surface": "for_you", "rank": 1, "item_id": i, "bundle": "b", "list_id": f"{h} {u} {i}"}
                                  for name, (h, u, i, _) in zip(names, shows, strict=True)]), EXPOSURES)
    of = lambda k: shows[k % len(shows)]
    done = [{"event_id": f"{n}", "ts": at(of(k)[0] + delay) + timedelta(milliseconds=n), "user_id": of(k)[1], "item_id": i, "event": "transaction" if buys else "click",
             "request_id": None if buys else names[k % len(shows)], "order_id": f"o{n}" if buys else None, "quantity": 1, "price": 2.0} for n, (k, delay, i, buys) in enumerate(acts)]
    did, window = conform(pl.DataFrame(done, infer_schema_length=None) if done else INTERACTIONS.empty(), INTERACTIONS), timedelta(hours=hours)
    parts = list(day_by_day(shown.lazy(), did.lazy(), days_until(date(2026, 5, 1), at(24 * 14)), at(24 * 14), window))
    assert pl.concat(parts).equals(outcomes_of(shown, did, window)) and all(p["ts"].dt.date().n_unique() == 1 for p in parts)


def test_what_comes_a_window_after_a_late_click_belongs_to_the_day_of_the_list():
    shown = conform(pl.DataFrame([{"request_id": "r", "ts": at(23), "user_id": "a", "surface": "for_you", "rank": 1, "item_id": "x", "bundle": "b"}]), EXPOSURES)
    act = lambda hours, event, **more: {"event_id": event, "ts": at(hours), "user_id": "a", "item_id": "x", "event": event} | more
    did = conform(pl.DataFrame([act(23 + 23, "click", request_id="r"), act(23 + 23 + 21, "transaction")], infer_schema_length=None), INTERACTIONS)
    (day,) = day_by_day(shown.lazy(), did.lazy(), [date(2026, 5, 1)], at(24 * 9), DAY)
    assert day.select("click", "purchase").rows() == [(1, 1)]


@pytest.mark.parametrize(("hours", "need"), [(24, 4), (25, 5), (1, 3), (30 * 24, 62)])
def test_a_day_is_counted_until_two_windows_have_passed(hours, need):
    assert Kpis(window_hours=hours, days=need).days == need
    with pytest.raises(ValueError, match=f"two windows of {hours} hours after a day and before today need {need} days"): Kpis(window_hours=hours, days=need - 1)


def test_every_question_divides_the_same_day(tmp_path):
    shown, did = traffic()
    outcomes = with_segment(outcomes_of(shown, did, DAY), did.lazy())
    books = kpis_by_day(outcomes)
    whole = books.filter(pl.col("dimension") == "").sort("day")
    assert whole["day"].to_list() == [date(2026, 5, 1) + timedelta(days=d) for d in range(4)] and whole["exposures"].to_list() == [180] * 4
    varied = variety_by_day(outcomes, pl.LazyFrame(schema={"item_id": pl.String, "valid_from": pl.Datetime("ms", "UTC")}), did.lazy(), 14)
    for by in set(varied["dimension"]) - {""}:
        parts = varied.filter(dimension=by).group_by("day").agg(pl.col("shown").sum()).sort("day")
        assert parts["shown"].to_list() == [180] * 4, by
    assert set(varied["dimension"]) == {"", "surface", "source", "variant", "segment"} and set(varied.filter(dimension="source")["value"]) == {"als", "recent"}
    for by in set(books["dimension"]) - {""}:
        parts = books.filter(pl.col("dimension") == by).group_by("day").agg(pl.col("exposures", "click", "purchase", "revenue").sum()).sort("day")
        assert parts.equals(whole.select(parts.columns)), by
    assert set(books.filter(pl.col("dimension") == "variant")["value"]) == {"none"}


def test_experiments_that_run_side_by_side_are_told_apart():
    shown, did = traffic(2)
    shown = shown.with_columns(variant=pl.col("user_id").replace_strict({f"u{n}": ("a=x b=y", "a=x b=z", "b=z", None)[n % 4] for n in range(60)}))
    books = kpis_by_day(with_segment(outcomes_of(shown, did, DAY), did.lazy())).filter(dimension="variant")
    first = dict(books.filter(day=date(2026, 5, 1)).select("value", "shoppers").rows())
    assert first == {"a=x": 30, "b=y": 15, "b=z": 30, "none": 15}
    alone = kpi_table(outcomes_of(shown.filter(pl.col("variant").str.contains("b=z")), did, DAY), ["day"])
    assert books.filter(value="b=z").select(alone.columns).equals(alone)


SEEN = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 30), st.sampled_from(["view", "transaction", "impression"])), max_size=25)
LISTS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", "e", None]), st.integers(0, 30), st.sampled_from([None, "one=x", "one=y two=x", "two=x"])), max_size=15)


@settings(max_examples=60, deadline=None)
@given(SEEN, LISTS)
def test_who_came_back_by_what_the_first_day_showed(seen, lists):
    """Days of 10 h here; by hand, shopper by shopper."""
    moment = lambda k: START + DAY * (k // 3) + timedelta(hours=1 + 10 * (k % 3) / 2)
    did = conform(pl.DataFrame([{"event_id": f"{n}", "ts": moment(k), "user_id": u, "item_id": "i", "event": e} for n, (u, k, e) in enumerate([*seen, ("z", -24, "view")])]), INTERACTIONS)
    shown = [{"request_id": f"r{n}", "ts": moment(k) + timedelta(minutes=n), "user_id": u, "surface": "for_you", "rank": 1, "item_id": "i", "bundle": "b", "variant": v} for n, (u, k, v) in enumerate(lists)]
    shown = conform(pl.DataFrame(shown, schema_overrides={"user_id": pl.String, "variant": pl.String}) if shown else EXPOSURES.empty(), EXPOSURES)
    table = retention_by_day(did.lazy(), shown.lazy(), date(2026, 5, 9), 60)
    days = {u: sorted({moment(k).date() for w, k, e in seen if w == u and e != "impression" and moment(k).date() < date(2026, 5, 9)}) for u in "abcde"}
    wanted = Counter()
    for u, d in days.items():
        if not d: continue
        mine = sorted((r["ts"], r["variant"] or "") for r in shown.iter_rows(named=True) if r["user_id"] == u and r["ts"].date() == d[0])
        answers, told = {("", "")}, {}
        before = {e for w, k, e in seen if w == u and e != "impression" and mine and moment(k) < mine[0][0]}
        answers.add(("segment", "none" if not mine else "buyer" if "transaction" in before else "browser" if before else "new"))
        for _, label_of in mine:
            for one in label_of.split(): told.setdefault(one.split("=")[0], one)
        answers |= {("variant", v) for v in told.values()}
        for dimension, value in answers: wanted[dimension, value, d[0], (d[0] + DAY in d)] += 1
    found = Counter()
    for r in table.iter_rows(named=True):
        back = r["day_1"] if r["day_1"] is not None else 0  # of the last cohort day 1 is not over
        found[r["dimension"], r["value"], r["cohort"], True], found[r["dimension"], r["value"], r["cohort"], False] = back, r["shoppers"] - back
    assert +found == +wanted and table.select(KEYS["retention"]).n_unique() == table.height


@given(st.sets(st.integers(0, 20)), st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.sampled_from(["", "surface"])), max_size=20), st.integers(0, 20), st.integers(0, 20))
def test_what_was_missed_is_what_was_shown_and_never_finished(shown, counted, oldest, since):
    day = lambda n: date(2026, 5, 1) + timedelta(days=n)
    exposures = pl.LazyFrame({"ts": [at(24 * d + 23.9) for d in sorted(shown)]}, schema={"ts": pl.Datetime("ms", "UTC")})
    kept = pl.LazyFrame([(day(d), of, whole) for d, whole, of in counted], schema={"day": pl.Date, "dimension": pl.String, "complete": pl.Boolean}, orient="row")
    finished = {d for d, whole, of in counted if whole and of == ""}
    assert missed(exposures, kept, day(oldest), day(since)) == [day(d) for d in sorted(shown - finished) if oldest <= d < since]
    assert missed(exposures, None, day(oldest), day(since)) == missed(exposures, kept.drop("complete"), day(oldest), day(since)) == [day(d) for d in sorted(shown) if oldest <= d < since]


@pytest.mark.parametrize("hours", [1, 24, 30])
def test_after_a_day_is_complete_nothing_changes_it(hours):
    """The latest purchase that can count comes a moment before."""
    window, tick = timedelta(hours=hours), timedelta(milliseconds=1)
    shown = conform(pl.DataFrame([{"request_id": "r", "ts": at(24) - tick, "user_id": "a", "surface": "for_you", "rank": 1, "item_id": "x", "bundle": "b"}]), EXPOSURES)
    act = lambda when, event, **more: {"event_id": event, "ts": when, "user_id": "a", "item_id": "x", "event": event} | more
    did = conform(pl.DataFrame([act(at(24) - tick + window, "click", request_id="r"), act(at(24) - tick + 2 * window, "transaction")], infer_schema_length=None), INTERACTIONS)
    whole = lambda until: pl.select(complete(pl.lit(date(2026, 5, 1)), until, window)).item()
    count = lambda until: next(day_by_day(shown.lazy(), did.lazy(), [date(2026, 5, 1)], until, window))["purchase"].item()
    over = at(24) + 2 * window
    assert whole(over) and count(over) == 1 and not whole(over - tick) and count(over - tick) == 0


def test_a_day_counted_before_its_purchases_came_is_put_right(tmp_path):
    lake, (shown, did) = Lake(tmp_path / "lake"), traffic()
    early = kpis_by_day(with_segment(outcomes_of(shown, did.filter(pl.col("event") == "click"), DAY), did.lazy()))
    late = kpis_by_day(with_segment(outcomes_of(shown, did, DAY), did.lazy()))
    keep_days(lake, {"kpis": early})
    assert lake.read("kpis").collect()["purchase"].sum() == 0
    for _ in range(2): keep_days(lake, {"kpis": late, "retention": retention_by_day(did.lazy(), shown.lazy(), date(2026, 5, 5), 60)})
    kept = lake.read("kpis").collect()
    assert kept.height == late.height == kept.select(KEYS["kpis"]).n_unique() and kept["purchase"].sum() == late["purchase"].sum() > 0


def test_an_empty_day_has_no_rows():
    shown, did = traffic(1)
    none = with_segment(outcomes_of(shown.clear(), did, DAY), did.lazy())
    assert kpis_by_day(none).is_empty() and kpis_by_day(none).schema == kpis_by_day(with_segment(outcomes_of(shown, did, DAY), did.lazy())).schema
    assert variety_by_day(none, pl.LazyFrame(schema={"item_id": pl.String, "valid_from": pl.Datetime("ms", "UTC")}), did.lazy(), 14).is_empty()
    assert retention_by_day(did.clear().lazy(), shown.lazy(), date(2026, 5, 5), 60).is_empty()


def read(e: Experiment, outcomes: pl.DataFrame, **how: float): return readout_of(e, *rows_of(e, outcomes), **how)


def running(**more: object) -> Experiment: return Experiment(name="lists", variant=HALVES, **more)


def test_an_experiment_with_a_difference_is_found_and_one_without_is_not():
    for lift, wanted in ((1.0, "ahead"), (0.0, "not decided")):
        book = Experiments(experiment=(running(),))
        shown, did = traffic(8, 400, 3, lift, book)
        says, why = read(running(), outcomes_of(shown, did, DAY))
        assert not why and dict(says.select("metric", "verdict").rows())["CTR"] == wanted
        assert says["shoppers"].max() + says.filter(metric="CTR")["shoppers"][0] > 300


def test_the_holdout_is_held_beside_everybody_else():
    """Planted: everybody else comes and clicks more often than the holdout; and in another shop no more than the holdout does."""
    book = Experiments(holdout=0.3, holdout_from=at(24 * 2), experiment=(running(),))
    [held], by = holdout_of(book), Assigner(book)
    for worse, wanted in (((0.6, 0.5), "ahead"), ((1.0, 1.0), "not decided")):
        shown, did = traffic(16, 500, 4, 0.0, book, worse)
        outcomes = outcomes_of(shown, did, DAY)
        parts = [rows_of(held, day) for day in (outcomes.filter(pl.col("ts").dt.date() == d) for d in outcomes["ts"].dt.date().unique().sort())]
        table, why = readout_of(held, *map(pl.concat, zip(*parts, strict=True)))
        assert not why and table["variant"].unique().to_list() == ["everybody_else"]
        says = dict(table.select("metric", "verdict").rows())
        assert set(says) == {"CTR", "CVR", "AOV", "revenue_per_shopper", "retention_7d"}
        assert [says[m] for m in ("CTR", "revenue_per_shopper", "retention_7d")] == [wanted] * 3 and says["AOV"] == says["CVR"] == "not decided"
        plain = {r["metric"]: r for r in readout_of(held, *(pl.concat(p) for p in ([p[0] for p in parts], [p[1].clear() for p in parts])))[0].iter_rows(named=True)}
        since = outcomes.filter(pl.col("ts") >= at(48))
        sides = {name: since.filter([by.held_out(u) == (name == "control") for u in since["user_id"]]) for name in ("control", "value")}
        for name, side in sides.items(): assert plain["CTR"][name] == pytest.approx(side["click"].mean()) and plain["revenue_per_shopper"][name] == pytest.approx(side["revenue"].sum() / side["user_id"].n_unique())
        for name, side in sides.items():  # by hand: who came back within a week, of those whose week is over
            days = {u: sorted(set(d)) for u, d in side.group_by("user_id").agg(pl.col("ts").dt.date()).rows()}
            over = [d for d in days.values() if d[0] + 7 * DAY <= since["ts"].max().date()]
            assert plain["retention_7d"][name] == pytest.approx(np.mean([any(d[0] < x <= d[0] + 7 * DAY for x in d) for d in over])) and 100 < len(over) < 500


def test_only_its_own_time_and_surfaces_count():
    e = running(**{"from": at(48).isoformat(), "until": at(96).isoformat(), "surfaces": ["for_you"]})
    shown, did = traffic(6, 100, 3, 0.0, Experiments(experiment=(running(),)))
    outcomes = outcomes_of(shown, did, DAY)
    says, why = read(e, outcomes.filter(pl.col("ts") >= at(48)), least=1)
    only = shown.filter(pl.col("ts") >= at(48), pl.col("ts") < at(96))
    clicks = did.filter(pl.col("event") == "click").join(only.select("request_id", "item_id", "variant"), on=["request_id", "item_id"])
    of = lambda frame, name: frame.filter(pl.col("variant") == f"lists={name}").height
    row = says.filter(metric="CTR").row(0, named=True)
    assert not why and row["value"] == pytest.approx(of(clicks, "new") / of(only, "new")) and row["control"] == pytest.approx(of(clicks, "old") / of(only, "old"))
    adjusted = read(e, outcomes)[0].filter(metric="CTR").row(0, named=True) # by what the first two days tell
    assert row["saved"] == 0 != adjusted["saved"] and adjusted["shoppers"] == row["shoppers"] and adjusted["value"] == pytest.approx(row["value"], rel=0.05)
    assert read(e.model_copy(update={"surfaces": ("similar",)}), outcomes)[0]["shoppers"].sum() == 0


def test_what_cannot_be_read_is_said():
    shown, did = traffic(3, 60, 3, 0.0, Experiments(experiment=(running(),)))
    outcomes = outcomes_of(shown, did, DAY)
    renamed = Experiment(name="lists", variant=(HALVES[0], Variant(name="newer", weight=0.5, rerank={"diversity": 1.0})))
    table, why = read(renamed, outcomes)
    assert table.is_empty() and "does not have any more: new" in why
    moved = outcomes.with_columns(variant=pl.when((pl.col("user_id") == "u1") & (pl.col("ts") > at(24))).then(pl.lit("lists=old")).when(pl.col("user_id") == "u1").then(pl.lit("lists=new")).otherwise("variant"))
    table, why = read(running(), moved)
    assert table.is_empty() and why.startswith("1 of 60 shoppers are in two variants") and "u1" not in why  # it is kept where erasure does not reach
    assert "two variants or more" not in read(running(), outcomes.clear())[1]


EXPERIMENT = '[[experiment]]\nname = "lists"\n[[experiment.variant]]\nname = "old"\nweight = 0.5\n[[experiment.variant]]\nname = "new"\nweight = 0.5\nrerank = {diversity = 1.0}\n'


def test_the_flow_as_an_operator_runs_it(tmp_path):
    (tmp_path / "settings.ini").write_text("[lake]\nroot = lake\n[monitor]\ntextfile = figures/reco.prom\n[experiments]\nfile = experiments.toml\n")
    (tmp_path / "experiments.toml").write_text("holdout = 0.1\n" + EXPERIMENT)
    lake = Lake(tmp_path / "lake")
    refused = run_flow(tmp_path, "kpis")
    assert refused.returncode == 1 and "no exposures, interactions, catalog" in refused.stdout
    shown, did = traffic(6, 200, 5, 1.5, Experiments(experiment=(running(),)))
    turned = (pl.col("user_id") == "u7") & (pl.col("ts") > at(24 * 3))  # one shopper is seen in both variants
    shown = shown.with_columns(variant=pl.when(turned).then(pl.col("variant").replace({"lists=old": "lists=new", "lists=new": "lists=old"})).otherwise("variant"))
    lake.write("exposures", shown, key=["request_id", "surface", "rank"], day_of="ts")
    old = did.head(1).with_columns(event_id=pl.lit("old"), ts=pl.col("ts") - timedelta(days=9), user_id=pl.lit("an early bird")) # else all is the log's first week
    lake.write("interactions", pl.concat([did, old]), key=["event_id"], day_of="ts")
    lake.write("catalog", pl.DataFrame({"item_id": shown["item_id"].unique().sort(), "valid_from": START}), key=["item_id", "valid_from"])
    (tmp_path / "settings.ini").write_text("[lake]\nroot = lake\nkeep_events_days = 9\n[monitor]\ntextfile = figures/reco.prom\n[experiments]\nfile = experiments.toml\n")
    refused = run_flow(tmp_path, "kpis", "run", "--days", "3")
    assert refused.returncode == 1 and "--days 3: Value error, two windows of 24 hours after a day and before today need 4 days" in refused.stdout
    early = run_flow(tmp_path, "kpis", "run", "--asof", at(18).isoformat()) # the run of the first day, and then none until the sixth
    assert early.returncode == 0 and "2026-05-01: 600 exposures to 200 shoppers" in early.stdout and ", so far" in early.stdout and "caught up" not in early.stdout
    done = run_flow(tmp_path, "kpis", "run", "--asof", at(24 * 5 + 18).isoformat())
    assert done.returncode == 0, done.stdout
    assert "caught up: 2 days that were not counted when they were complete, from 2026-05-01 to 2026-05-02" in done.stdout
    whole = lake.read("kpis").collect().filter(pl.col("dimension") == "").sort("day")
    assert whole["day"].to_list() == [date(2026, 5, 1) + timedelta(days=d) for d in range(6)] and whole["exposures"].to_list() == [600] * 6
    assert whole["complete"].to_list() == [True] * 3 + [False] * 3
    hand = outcomes_of(shown, did, DAY).group_by(pl.col("ts").dt.date()).agg(pl.col("click").sum()).sort("ts")
    assert whole["click"].to_list() == hand["click"].to_list() and "2026-05-06: 600 exposures to 200 shoppers" in done.stdout
    figures = (tmp_path / "figures" / "reco_kpis.prom").read_text() # of the last day whose purchases are complete
    of_may_3 = whole.filter(day=date(2026, 5, 3))["CTR"].item()
    assert f'reco_kpi_ctr_ratio{{surface="all"}} {of_may_3}' in figures and f'reco_kpi_ctr_ratio{{surface="for_you"}} {of_may_3}' in figures
    held = lake.read("readouts").collect().filter(experiment="holdout")
    assert set(held["metric"]) == {"CTR", "CVR", "AOV", "revenue_per_shopper", "retention_7d"} and "experiment holdout: everybody_else, CTR: " in done.stdout
    says = lake.read("readouts").collect().filter(metric="CTR", experiment="lists").row(0, named=True)
    assert says["moved"] == 1 and says["verdict"] == "ahead" and says["day"] == date(2026, 5, 6) and "experiment lists: new, CTR: ahead" in done.stdout
    varied, back = lake.read("variety").collect(), lake.read("retention").collect()
    assert set(varied.filter(dimension="surface")["value"]) == {"for_you"} and set(varied.filter(dimension="variant")["value"]) == {"lists=new", "lists=old"}
    assert back.filter(dimension="")["cohort"].sort().to_list() == [date(2026, 5, 1) + timedelta(days=d) for d in range(5)]
    assert set(back.filter(dimension="variant")["value"]) == {"lists=new", "lists=old"} and back.filter(dimension="segment")["shoppers"].sum() == back.filter(dimension="")["shoppers"].sum()
    assert len(list((tmp_path / ".metaflow").rglob("*.html"))) == 2
    idle = run_flow(tmp_path, "kpis", "run", "--asof", at(24 * 90).isoformat()) # nothing was shown for months, and figures are wanted
    assert idle.returncode == 0 and "nothing was shown in these days" in idle.stdout, idle.stdout
    assert "reco_kpi_lists_timestamp_seconds" in (tmp_path / "figures" / "reco_kpis.prom").read_text()
    again = run_flow(tmp_path, "kpis", "run", "--asof", "2026-05-07")
    assert again.returncode == 1 and "a time zone is needed" in again.stdout
