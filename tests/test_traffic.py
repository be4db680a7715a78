"""Simulated shoppers who are shown lists, from the visit to the tables that the app shows."""

import polars as pl
from worlds import CENTS_FROM, DAYS, World, traffic

from reco.data.lake import Lake

MORE, LESS = "variety=more_variety", "variety=as_it_is"


def table(world: World, name: str) -> pl.DataFrame: return Lake(world.root / "lake").read(name).collect()


def test_every_visit_is_shown_lists_and_every_event_arrives(world):
    shown, events = table(world, "exposures"), table(world, "interactions")
    later = world.sim.interactions.filter(pl.col("ts") >= world.begin)
    assert set(later["event_id"]) <= set(events["event_id"]) and events["event_id"].is_unique().all()
    home = shown.filter(surface="for_you")
    assert home["request_id"].n_unique() == later["session_id"].n_unique() and set(shown["surface"]) == {"for_you", "similar", "bought_together"}
    assert set(shown["variant"].drop_nulls()) == {MORE, LESS} and 0.2 < home.filter(variant=MORE).height / home.height < 0.4
    assert {*shown["ts"].dt.date()} == {*later["ts"].dt.date()} and shown["list_id"].n_unique() * 4 < shown.height


def test_clicks_name_the_list_that_showed_the_item(world):
    clicks = table(world, "interactions").filter(pl.col("event") == "click")
    shown = table(world, "exposures").select("request_id", "item_id", "user_id", shown="ts")
    matched = clicks.join(shown, on=["request_id", "item_id", "user_id"])
    assert clicks.height > 100 and matched.height == clicks.height and (matched["ts"] > matched["shown"]).all()


def test_what_the_shop_says_is_sold_out_is_not_shown(world):
    """From the hour in which it says so until it says otherwise."""
    stock = world.sim.catalog.select("item_id", "available", since="valid_from").sort("since")
    shown = table(world, "exposures").select("item_id", "ts", "surface").sort("ts").join_asof(stock, left_on="ts", right_on="since", by="item_id", check_sortedness=False)
    said = pl.col("since") >= world.begin # what was so before, the bundle knows by its own catalogue
    assert stock.filter(said, ~pl.col("available")).height > 5 and shown.filter(said, ~pl.col("available")).is_empty(), shown.filter(said, ~pl.col("available"))


def test_it_goes_on_where_it_was_and_ends(world):
    before = table(world, "exposures").height, table(world, "interactions").height
    said = traffic(world.root, "--cents-from", str(CENTS_FROM))
    assert "all of it has happened" in said and (table(world, "exposures").height, table(world, "interactions").height) == before


def test_what_flows_make_of_it(world):
    kpis, readouts = table(world, "kpis"), table(world, "readouts")
    assert kpis.filter(dimension="")["day"].n_unique() == DAYS and kpis.filter(dimension="")["click"].sum() > 100
    assert table(world, "skew").sort("day")["requests"][-1] >= 20 # lists outside of experiments can be made again
    assert {*readouts["experiment"]} == {"variety"} and "CTR" in {*readouts["metric"]}


def test_prices_in_cents_are_found_when_they_come_and_not_before(world):
    events = table(world, "interactions").filter(pl.col("ts") >= world.begin, pl.col("event") == "view")
    wrong = events.group_by(day=(pl.col("ts") - world.begin).dt.total_days()).agg(pl.col("price").median()).sort("day")
    usual = wrong.filter(~pl.col("day").is_in([CENTS_FROM, CENTS_FROM + 1]))["price"].max()
    assert (wrong.filter(pl.col("day").is_in([CENTS_FROM, CENTS_FROM + 1]))["price"] > 20 * usual).all()
    verdicts = table(world, "verdicts").with_columns(n=(pl.col("day") - world.begin.date()).dt.total_days())
    asked = verdicts.filter(pl.col("name") == "drift of events.price")
    # after one bad day of seven the excess is just below the limit, after both it is above
    assert set(range(CENTS_FROM + 2, DAYS + 1)) <= {*asked["n"]} <= set(range(CENTS_FROM + 1, DAYS + 1)), verdicts.filter("asks").sort("n")
    bought = table(world, "interactions").filter(pl.col("ts") >= world.begin, pl.col("event") == "transaction").sort("ts")
    listed = world.sim.catalog.select("item_id", ts="valid_from", listed="price").sort("ts")
    ratio = bought.join_asof(listed, on="ts", by="item_id", check_sortedness=False).select(pl.col("price") / pl.col("listed")).to_series()
    assert ratio.is_between(0.5, 2).all() and len(ratio) > 10, ratio # what was paid comes from the till
