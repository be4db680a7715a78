"""The simulated shop: what every shop must hold, and whether its planted truths are in it."""
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.data import simulator
from reco.data.simulator import Shop, draw_visits, emit, simulate, spread_starts, views_per_user, write_shop
from reco.data.sources import read_files
from reco.schemas import CATALOG, INTERACTIONS, TS

ROOT = Path(__file__).parents[1]
END = datetime(2026, 5, 1, tzinfo=UTC)
DAY = 86_400_000


@cache
def sparse()->Shop: # RetailRocket's density: 1.96 events a visitor
    return simulate(users=20_000, items=1_000, events=39_200, days=60, end=END)


@cache
def dense()->Shop: # enough events per shopper, item and order to see the planted truths
    return simulate(users=3_000, items=600, events=150_000, days=60, end=END)


@cache
def odd()->Shop: # smallest sizes, an end that is no midnight and no UTC
    return simulate(users=10, items=20, events=700, days=7, end=datetime(2026, 5, 1, 13, 17, tzinfo=UTC), seed=3)


SHOPS = pytest.mark.parametrize("shop", [sparse, dense, odd])


def kind(shop, name): # the events of one type
    return shop.interactions.filter(event=name)


def leaf_of(shop): # item_id, category_id
    return shop.catalog.select("item_id", "category_id").unique()


def test_same_arguments_same_frames():
    a, b = (simulate(300, 60, 2_000, 14, END, seed=5) for _ in range(2))
    for name in ("interactions", "catalog", "tastes", "complements", "trends"):
        assert getattr(a, name).equals(getattr(b, name)), name
    other = simulate(300, 60, 2_000, 14, END, seed=6)
    assert not a.tastes.equals(other.tastes)
    assert not set(a.interactions["event_id"]) & set(other.interactions["event_id"])
    assert not set(a.interactions["order_id"].drop_nulls()) & set(other.interactions["order_id"].drop_nulls())


def test_same_frames_whatever_the_threads():
    code = ("from datetime import *; from reco.data.simulator import simulate; s = simulate(3000, 200, 30000, 30, "
            "datetime(2026, 5, 1, tzinfo=UTC)); import hashlib; print(hashlib.sha256("
            "(s.interactions.write_csv() + s.catalog.write_csv()).encode()).hexdigest())")
    seen = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"POLARS_MAX_THREADS": n}, cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout for n in ("1", "4")}
    assert len(seen) == 1


@SHOPS
def test_frames_conform(shop):
    shop = shop()
    assert shop.interactions.schema == pl.Schema(INTERACTIONS.columns)
    assert shop.catalog.schema == pl.Schema(CATALOG.columns)
    assert shop.trends.schema == pl.Schema({"item_id": pl.String, "starts": TS, "ends": TS, "lift": pl.Float64})
    assert shop.tastes.columns == ["user_id", "category_id", "weight"]
    assert shop.complements.columns == ["item_id", "complement_id", "strength"]
    assert shop.interactions.equals(shop.interactions.sort("ts", "event_id"))
    assert shop.interactions["event_id"].is_unique().all()
    always = ["event_id", "ts", "user_id", "session_id", "item_id", "event", "price"]
    assert shop.interactions.select(always).null_count().sum_horizontal().item() == 0
    assert shop.catalog.null_count().sum_horizontal().item() == 0


@SHOPS
def test_sizes_are_met(shop):
    got = shop()
    users, items, events = {sparse: (20_000, 1_000, 39_200), dense: (3_000, 600, 150_000), odd: (10, 20, 700)}[shop]
    assert got.interactions["user_id"].n_unique() == users == got.tastes["user_id"].n_unique()
    assert got.catalog["item_id"].n_unique() == items
    assert abs(got.interactions.height/events - 1) < .02


@given(st.integers(10, 60), st.integers(20, 60), st.floats(1.06, 9), st.integers(7, 20), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_any_shop_holds_together(users, items, density, days, seed):
    events = max(100, int(users*density))
    shop = simulate(users, items, min(events, 10*days*users), days, END, seed)
    e = shop.interactions.join(shop.catalog.group_by("item_id").agg(pl.col("created_at").first()), on="item_id", how="left")
    assert abs(e.height/min(events, 10*days*users) - 1) < .1
    assert (e["ts"] >= e["created_at"]).all()
    assert e["ts"].is_between(END - timedelta(days=days), END, closed="left").all()


@SHOPS
def test_time_stays_in_the_period(shop):
    name, shop = shop.__name__, shop()
    end, days = (datetime(2026, 5, 1, 13, 17, tzinfo=UTC), 7) if name == "odd" else (END, 60)
    ts = shop.interactions["ts"]
    assert ts.min() >= end - timedelta(days=days) and ts.max() < end
    assert shop.catalog["valid_from"].max() < end
    if name != "odd": assert ts.dt.date().n_unique() == days


@SHOPS
def test_no_event_before_the_item_exists(shop):
    shop = shop()
    born = shop.catalog.group_by("item_id").agg(pl.col("created_at").unique(), first=pl.col("valid_from").min())
    assert (born["created_at"].list.len() == 1).all()
    born = born.explode("created_at")
    assert (born["first"] == born["created_at"]).all()
    seen = shop.interactions.join(born, on="item_id", how="left", validate="m:1")
    assert seen["created_at"].null_count() == 0 and (seen["ts"] >= seen["created_at"]).all()


def test_new_items_every_day_and_they_are_seen():
    shop = sparse()
    born = shop.catalog.select("item_id", "created_at").unique()
    start = END - timedelta(days=60)
    new = born.filter(pl.col("created_at") > start)
    assert new["created_at"].n_unique() == 59 and .25 < new.height/born.height < .35
    assert new.join(shop.interactions, on="item_id", how="semi").height > .9*new.height


def test_mix_is_retailrockets():
    mix = dict(sparse().interactions["event"].value_counts(normalize=True).rows())
    assert mix == pytest.approx({"view": .967, "addtocart": .025, "transaction": .008}, abs=.0025)


def test_most_visitors_come_once():
    count = sparse().interactions["user_id"].value_counts()["count"]
    assert .68 < (count == 1).mean() < .74 and abs(count.mean() - 1.96) < .03
    assert count.max() > 20  # the heavy tail


def test_popularity_has_a_long_tail():
    # A uniform draw of as many events gives the first tenth of 1,000 items about 12%.
    count = sparse().interactions["item_id"].value_counts(sort=True)["count"]
    assert .3 < count.head(100).sum()/count.sum() < .6


def test_rhythm_of_day_and_week():
    late = simulate(5_000, 200, 50_000, 56, datetime(2026, 5, 1, 13, 17, tzinfo=UTC))  # ends at another hour
    for shop in (sparse(), late):
        ts = shop.interactions["ts"].dt
        hour, day = (np.bincount(x, minlength=24)[lo:hi] for x,lo,hi in ((ts.hour(), 0, 24), (ts.weekday(), 1, 8)))
        assert np.corrcoef(hour, simulator.HOURS)[0, 1] > .95
        assert day[:4].min() > day[5:].max()  # Monday to Thursday above the week-end


@SHOPS
def test_carts_follow_views_and_purchases_follow_carts(shop):
    shop = shop()
    key = ["user_id", "session_id", "item_id"]
    firsts = {n: kind(shop, n).group_by(key).agg(pl.col("ts").min()) for n in ("view", "addtocart", "transaction")}
    for later, earlier in (("addtocart", "view"), ("transaction", "addtocart")):
        both = firsts[later].join(firsts[earlier], on=key, how="left", suffix="_before")
        assert both["ts_before"].null_count() == 0 and (both["ts"] > both["ts_before"]).all(), later
        assert both.height == kind(shop, later).height  # once per visit


@SHOPS
def test_visits_belong_to_one_user_and_are_half_an_hour_apart(shop):
    e = shop().interactions.sort("user_id", "ts", "event_id")
    assert e.group_by("session_id").agg(pl.col("user_id").n_unique())["user_id"].max() == 1
    gap = e.select(new=(pl.col("session_id") != pl.col("session_id").shift()).over("user_id"),
                   m=pl.col("ts").diff().over("user_id").dt.total_seconds()/60).drop_nulls()
    assert gap.filter("new")["m"].min() > 30 and gap.filter(~pl.col("new"))["m"].max() < 30


@SHOPS
def test_orders(shop):
    shop = shop()
    sold = kind(shop, "transaction")
    assert sold.height and sold.select("order_id", "quantity").null_count().sum_horizontal().item() == 0
    assert shop.interactions.filter(pl.col("event") != "transaction")["order_id"].is_null().all()
    orders = sold.group_by("order_id").agg(pl.col("user_id", "session_id", "ts").n_unique(), pl.col("item_id").is_unique().all())
    assert orders["user_id"].max() == orders["session_id"].max() == orders["ts"].max() == 1 and orders["item_id"].all()
    assert sold["quantity"].min() >= 1


def test_repeat_visits_and_repeat_views():
    views = kind(sparse(), "view")
    back = views.group_by("user_id", "item_id").agg(n=pl.col("session_id").n_unique())
    assert (back["n"] > 1).sum() > .02*back.height  # the same item in several visits
    # RetailRocket's sample: 43% of the views after a visitor's first were repeats.
    per = views.group_by("user_id").agg(n=pl.len(), d=pl.col("item_id").n_unique())
    assert .3 < (per["n"] - per["d"]).sum()/(per["n"] - 1).sum() < .5


@SHOPS
def test_event_prices_and_stock_are_those_of_the_moment(shop):
    shop = shop()
    rows = shop.catalog.sort("valid_from").select("item_id", "valid_from", "available",
                                                  shown=(pl.col("price")*(1 - pl.col("discount"))).round(2))
    seen = shop.interactions.join_asof(rows, left_on="ts", right_on="valid_from", by="item_id", check_sortedness=False)
    assert (seen["price"] == seen["shown"]).all()
    assert seen.filter(event="view")["available"].mean() < 1 or shop.interactions.height < 1_000
    # a cart is opened in stock, on the day of its view; midnight may pass before the click
    assert seen.filter(event="addtocart")["available"].mean() > .99


def test_catalog_changes_slowly():
    shop = dense()
    assert 1.5 < shop.catalog.height/600 < 10
    for column in ("price", "discount", "available"):
        assert (shop.catalog.group_by("item_id").agg(pl.col(column).n_unique())[column] > 1).sum() > 30, column
    assert shop.catalog.is_unique().all() and not shop.catalog.select("item_id", "valid_from").is_duplicated().any()
    still = shop.catalog.sort("item_id", "valid_from").select(
        (pl.struct("price", "discount", "available") == pl.struct("price", "discount", "available").shift()).over("item_id"))
    assert not still.to_series().any()  # each row is a change
    assert shop.catalog["discount"].is_between(0, .5).all() and shop.catalog["margin"].is_between(0, 1).all()
    assert shop.catalog["price"].min() > 0 and .02 < 1 - shop.catalog.group_by("item_id").last()["available"].mean() < .15


def test_titles_speak_of_their_category():
    items = dense().catalog.unique("item_id").with_columns(words=pl.col("title").str.split(" "))
    assert items["title"].is_unique().all() and (items["category_path"].str.count_matches(" / ") == 2).all()
    nouns = items.group_by("category_path").agg(pl.col("words").list.slice(1).list.head(2).list.join(" ").n_unique())
    assert (nouns["words"] <= 20).all()
    # nearest title by shared words of the description: the same leaf nearly always
    sets = [frozenset(t.lower().split()) for t in items["description"]]
    leaf = items["category_id"].to_list()
    hits = [leaf[max((j for j in range(len(sets)) if j != i), key=lambda j: len(sets[i] & sets[j]))] == leaf[i]
            for i in range(0, len(sets), 10)]
    assert np.mean(hits) > .95


def test_tastes_are_recovered():
    shop = dense()
    sums = shop.tastes.group_by("user_id").agg(pl.col("weight").sum(), n=pl.len(), own=pl.col("category_id").n_unique())
    assert sums["weight"].is_close(1.).all() and sums["n"].is_between(1, 3).all() and (sums["n"] == sums["own"]).all()
    looks = kind(shop, "view").join(leaf_of(shop), on="item_id", how="left", validate="m:1")
    top = (looks.group_by("user_id", "category_id").len().filter(pl.col("len").sum().over("user_id") >= 10)
           .sort("len", "category_id", descending=[True, False]).unique("user_id", keep="first", maintain_order=True))
    shuffled = top.with_columns(pl.col("user_id").shuffle(1))  # chance: the same tops, dealt to other shoppers
    hit, chance = (t.join(shop.tastes, on=["user_id", "category_id"], how="semi").height/top.height for t in (top, shuffled))
    assert top.height > 1_000 and hit > .85 and chance < .3


def test_heavier_tastes_draw_more_views():
    shop = dense()
    looks = kind(shop, "view").join(leaf_of(shop), on="item_id", how="left").group_by("user_id", "category_id").len()
    share = looks.with_columns(share=pl.col("len")/pl.col("len").sum().over("user_id"))
    seen = shop.tastes.join(share, on=["user_id", "category_id"], how="left").with_columns(pl.col("share").fill_null(0))
    assert seen.select(pl.corr("weight", "share")).item() > .6


def test_complements_join_the_order_as_often_as_planted():
    shop = dense()
    leaf = dict(leaf_of(shop).rows())
    assert all(leaf[a] != leaf[b] for a,b,_ in shop.complements.rows())
    assert not shop.complements.select("item_id", "complement_id").is_duplicated().any()
    sold = kind(shop, "transaction").select("order_id", "item_id")
    held = shop.complements.join(sold, on="item_id", how="inner")
    hit = held.join(sold.rename({"item_id": "complement_id"}), on=["order_id", "complement_id"], how="semi")
    base = dict(sold["item_id"].value_counts().rows())
    chance = np.mean([base.get(c, 0) for c in held["complement_id"]])/sold["order_id"].n_unique()
    assert held.height > 300 and hit.height/held.height > 10*chance
    assert abs(hit.height/held.height - held["strength"].mean()) < .1
    strong, weak = (held.filter(side) for side in (pl.col("strength") > .4, pl.col("strength") < .3))
    rate = [s.join(hit, on=["order_id", "item_id", "complement_id"], how="semi").height/s.height for s in (strong, weak)]
    assert rate[0] > rate[1]


def rises(shop, when=timedelta(0)): # share of all views inside the window by the share outside, over the planted lift
    views, out = kind(shop, "view"), []
    for item, starts, ends, lift in shop.trends.rows():
        inside, mine = pl.col("ts").is_between(starts + when, ends + when, closed="left"), pl.col("item_id") == item
        out.append(views.select(mine.filter(inside).mean()/mine.filter(~inside).mean()).item()/lift)
    return np.array(out)


def test_trends_lift_demand():
    # sparse: few repeats, which go on as before; a trending item is also its own rival within its category
    shop = simulate(users=100_000, items=1_000, events=200_000, days=60, end=END)
    assert shop.trends.height >= 20 and shop.trends["lift"].is_between(3, 6).all()
    assert .7 < np.median(rises(shop)) < 1.15
    assert np.median(rises(shop, when=timedelta(days=11))) < .4  # another window: no lift, 1/4.5 of it by ratio


def test_trends_are_of_old_items_within_the_period():
    shop = dense()
    born = shop.catalog.select("item_id", "created_at").unique()
    seen = shop.trends.join(born, on="item_id", how="left", validate="1:1")
    assert (seen["created_at"] <= END - timedelta(days=60)).all() and (seen["starts"] > END - timedelta(days=60)).all()
    assert (seen["ends"] > seen["starts"]).all() and (seen["ends"] <= END).all()


@pytest.mark.parametrize(("change", "said"), [
    ({"users": 9}, "users = 9"), ({"items": 19}, "items = 19"), ({"events": 524}, "events = 524.*at least 525"),
    ({"events": 140_001}, "at most 140000"), ({"days": 6}, "days = 6"), ({"days": 4_000}, "days = 4000"),
    ({"seed": -1}, "seed = -1"), ({"users": 500.}, "users = 500.0"), ({"days": True}, "days = True"),
    ({"end": datetime(2026, 5, 1)}, "time zone"), ({"end": "2026-05-01"}, "time zone")])
def test_nonsense_is_refused_with_numbers(change, said):
    with pytest.raises(ValueError, match=said):
        simulate(**{"users": 500, "items": 50, "events": 2_000, "days": 28, "end": END} | change)


def test_extremes_that_are_allowed():
    assert abs(simulate(500, 50, 525, 28, END).interactions.height - 525) < 12
    full = simulate(10, 20, 10*7*10, 7, END).interactions
    assert abs(full.height - 700) < 20 and full["ts"].max() < END


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 999), st.integers(1, 100)), min_size=1, max_size=30))
def test_spread_starts_keeps_visits_apart(rows):
    owner, wanted, length = map(np.array, zip(*sorted(rows), strict=True))
    span = max(1_000, int(np.bincount(owner, weights=length).max()))
    got = spread_starts(wanted, length, owner, span)
    assert (got >= 0).all() and (got + length <= span).all()
    same = owner[1:] == owner[:-1]
    assert (got[1:] >= got[:-1] + length[:-1])[same].all()
    fits = (wanted[1:] >= wanted[:-1] + length[:-1])[same].all() and (wanted + length <= span).all()
    if fits: assert got.tolist() == wanted.tolist()  # what fits is not moved


def test_activity_is_met_at_every_density():
    for mean in (1.1, 2, 10, 50):
        count = views_per_user(2_000, round(mean*2_000), 1_000, np.random.default_rng(1))
        assert count.min() >= 1 and count.max() <= 1_000 and abs(count.mean() - mean) < .02


def test_visits_of_the_busiest_fit_into_the_period():
    visits = draw_visits(np.array([1, 140, 140]), 0, 7, np.random.default_rng(2))  # 20 views a day, the most allowed
    assert visits["ts"].min() >= 0 and visits["ts"].max() < 7*DAY - 8*60_000  # time to pay is left


def test_emit_keeps_its_pace():
    now, slept = [100.], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    events = odd().interactions.head(300)
    stream = emit(events, rate=50, clock=lambda: now[0], sleep=sleep)
    for i in range(10):
        event = next(stream)
        assert now[0] == pytest.approx(100 + i/50)
    now[0] += 1  # a slow consumer: 50 events are overdue and come at once, then the pace is the old one
    slept.clear()
    rest = list(stream)
    assert len(rest) == 290 and now[0] == pytest.approx(100 + 299/50) and len(slept) < 245
    assert event["event_id"] == events["event_id"][9]


def test_emitted_events_survive_json():
    events = sparse().interactions.head(2_000)
    now = [0.]
    lines = [json.dumps(e) for e in emit(events, 1e6, clock=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))]
    back = pl.DataFrame([json.loads(x) for x in lines], schema_overrides=dict(INTERACTIONS.columns) | {"ts": pl.Int64})
    assert back.with_columns(pl.col("ts").cast(TS)).select(events.columns).equals(events)
    assert type(json.loads(lines[0])["ts"]) is int


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_emit_refuses_a_bad_rate_at_once(rate):
    with pytest.raises(ValueError, match="rate"):
        emit(odd().interactions, rate)


def test_written_shop_is_read_back_by_the_platform(tmp_path):
    write_shop(odd(), tmp_path/"raw")
    batch = read_files(tmp_path/"raw")
    assert batch.events.select(*INTERACTIONS.columns).collect().equals(odd().interactions)
    assert batch.catalog.select(*CATALOG.columns).collect().equals(odd().catalog)
    for name in ("tastes", "complements", "trends"):
        assert pl.read_parquet(tmp_path/"raw"/"planted"/f"{name}.parquet").equals(getattr(odd(), name))


def test_failed_write_leaves_the_old_shop(tmp_path, monkeypatch):
    write_shop(odd(), tmp_path)
    old = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    real, calls = pl.DataFrame.write_parquet, []

    def full_disk(self, path, *rest):
        calls.append(path)
        if len(calls) == 5:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(self, path, *rest)

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_shop(simulate(50, 20, 200, 7, END), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == old


def command(*args, **env): # the generator as a user runs it
    return subprocess.run([sys.executable, ROOT/"data"/"generators"/"generate_shop.py", *map(str, args)], cwd=ROOT,
                          env=os.environ | env, capture_output=True, text=True, check=False)


def test_command_is_idempotent(tmp_path):
    small = ("--users", 50, "--items", 30, "--events", 300, "--days", 7, "--end", "2026-05-01", "--out", tmp_path/"raw")
    first = command(*small)
    assert first.returncode == 0 and "50 users, 30 items, 298 events: 97.0% view" in first.stdout
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/"raw").rglob("*.parquet")}
    again = command(*small)
    assert again.returncode == 0 and "already there" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/"raw").rglob("*.parquet")} == stamps
    (tmp_path/"raw"/"catalog.parquet").unlink()  # incomplete: made again
    assert "already" not in command(*small).stdout and (tmp_path/"raw"/"catalog.parquet").exists()
    assert "already" not in command(*small, "--seed", 8).stdout
    assert "already" not in command(*small, "--seed", 8, "--force").stdout
    assert pl.read_parquet(tmp_path/"raw"/"interactions.parquet")["ts"].max() < END


def test_command_takes_its_defaults_from_the_settings(tmp_path):
    done = command(RECO_DATA_PATH=str(tmp_path/"shop"), RECO_SIMULATOR_USERS="40", RECO_SIMULATOR_ITEMS="25",
                   RECO_SIMULATOR_EVENTS="200", RECO_SIMULATOR_DAYS="9", RECO_PROJECT_SEED="11")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path/"shop"/"shop.json").read_text())["shop"]
    assert (made["users"], made["items"], made["events"], made["days"], made["seed"]) == (40, 25, 200, 9, 11)
    ts = pl.read_parquet(tmp_path/"shop"/"interactions.parquet")["ts"]
    assert ts.max() < datetime.now(UTC) and ts.max() > datetime.now(UTC) - timedelta(days=3)


def test_command_spares_data_of_others(tmp_path):
    small = ("--users", 50, "--items", 30, "--events", 300, "--days", 7, "--out", tmp_path)
    (tmp_path/"interactions.parquet").write_bytes(b"mine")
    refused = command(*small)
    assert refused.returncode == 1 and "interactions.parquet" in refused.stderr and "Traceback" not in refused.stderr
    assert (tmp_path/"interactions.parquet").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1
    assert command(*small, "--force").returncode == 0
    (tmp_path/"catalog.csv").write_text("mine")
    assert command(*small, "--force").returncode == 1 and (tmp_path/"catalog.csv").read_text() == "mine"


def test_command_refuses_nonsense(tmp_path):
    bad = command("--events", 5, "--out", tmp_path/"raw")
    assert bad.returncode == 1 and "events = 5" in bad.stderr and not (tmp_path/"raw").exists()
    assert command("--end", "yesterday").returncode == 2
