"""Some days of shoppers who are shown lists: `python -m app.traffic`, once a simulated shop (`generate_shop.py --later DAYS`) has a served model.

Every visit of the days that the model has not seen asks for lists (the home page, pages of items, the cart), and its shopper clicks and buys what appeals
(`reco.data.shoppers`); the shop says what is new, reduced or sold out. All of it goes the way that real traffic goes: variants of `[experiments]`, serve log and events over the bus, consumer, lake. Run again it
goes on where it was. It is for demonstrations; nothing about real shoppers follows from it.
"""
import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl

import app.consumer
from app.experimenting import Experimenting, experiments_of
from app.serve import Replica
from app.shown import Shown
from reco.bundle import BundleError, load_bundle
from reco.bundle_copies import bundle_at
from reco.bundle_store import bundles_root
from reco.data.lake import Lake, LakeError, open_lake
from reco.data.served import lists_section
from reco.data.shoppers import appeal, reactions, requests_of
from reco.data.stream import BusError
from reco.experiments.assignment import ExperimentError
from reco.features.store import StoreError, wait_until_ready
from reco.online import online_of
from reco.published import champion_name
from reco.request import RecommendationRequest
from reco.settings import Settings, SettingsError, load_settings

MARK = "traffic"          # in front of the names of its lists
K = {"for_you": 10, "similar": 8, "bought_together": 5}
HOUR, TAKEN = 3_600_000, 500 # ms; events of one request
CENTS = 100.              # prices that were sent in cents

class TrafficError(RuntimeError):
    "There can be no traffic; the message says why."

@dataclass(frozen=True)
class Days:
    "What is to happen, and what shoppers want."
    events: pl.DataFrame      # INTERACTIONS by ts
    tastes: pl.DataFrame      # of the simulator's `Shop`, like the next two
    trends: pl.DataFrame
    complements: pl.DataFrame
    items: pl.DataFrame       # item_id, category_id, price: as they stand at the end
    changes: pl.DataFrame     # CATALOG rows of these days, by valid_from

    @property
    def begin(self) -> datetime: return cast(datetime, self.events["ts"].min()).replace(minute=0, second=0, microsecond=0)

    @property
    def end(self) -> datetime: return cast(datetime, self.events["ts"].max())

def days_of(
    folder: Path, # of the simulated shop
) -> Days:
    "What `generate_shop.py --later` left; raises `TrafficError` naming the file that is missing."
    names = {"events": "later/interactions", "tastes": "planted/tastes", "trends": "planted/trends", "complements": "planted/complements", "items": "catalog"}
    for name in names.values():
        if not (folder/f"{name}.parquet").is_file():
            raise TrafficError(f"{folder/name}.parquet is missing: `python data/generators/generate_shop.py --later 10` makes a shop with days that are still to happen")
    found = {n: pl.read_parquet(folder/f"{name}.parquet") for n, name in names.items()}
    newest = found["items"].sort("valid_from").unique("item_id", keep="last")
    first = cast(datetime, found["events"]["ts"].min()).replace(hour=0, minute=0, second=0, microsecond=0)
    changes = found["items"].filter(pl.col("valid_from") >= first).sort("valid_from", "item_id")
    found["items"] = newest.select("item_id", "category_id", price=pl.col("price")*(1 - pl.col("discount").fill_null(0)))
    return Days(**found | {"events": found["events"].sort("ts", "event_id"), "changes": changes})

def in_cents(
    events: pl.DataFrame,             # INTERACTIONS
    during: tuple[datetime, datetime]|None, # None: never
) -> pl.DataFrame:
    "The incident: for a while the shop's pages send prices in cents. What was paid comes from the till, and is right."
    if during is None: return events
    wrong = pl.col("ts").is_between(*during, closed="left") & (pl.col("event") != "transaction")
    return events.with_columns(price=pl.when(wrong).then(pl.col("price")*CENTS).otherwise("price"))

# ---- letting it happen --------------------------------------------------------------------------------------------

def replica_of(
    settings: Settings,
) -> Replica:
    "The endpoint's own replica without HTTP, with the published bundle; it waits for everything and keeps no list. Raises `TrafficError`."
    root = bundles_root(settings)
    if not (name := champion_name(root)): raise TrafficError(f"nothing is published in {root}: run `python flows/train.py run`, then `python flows/promote.py run`")
    made = Replica()
    made.open()
    wait_until_ready(made.store.client) # an embedded store that nobody had open reads its data first
    made.deadline_s, made.keep_s = None, 0
    made.bundle = load_bundle(bundle_at(root, name))
    made.experimenting = Experimenting(settings, lambda: made.bundle, load_bundle, made.meter.without_variant.inc)
    made.experimenting.begin(root)
    made.try_out(made.bundle)
    online_of(made.bundle, made.store).background = False # an hour passes in no time here: what the shop said must be known in the next list
    return made

def answered(
    replica: Replica,
    requests: pl.DataFrame, # of `requests_of`
) -> pl.DataFrame:          # a row per exposure: what the request has, rank and item_id
    "Ask for lists as of then, and write them down."
    rows = []
    for r in requests.iter_rows(named=True):
        asked = RecommendationRequest(r["user_id"], K[r["surface"]], r["ts"], (), r["surface"], [r["context"]] if r["context"] else [], "", r["request_id"])
        began = time.perf_counter()
        found = replica.recommend(asked)
        replica.note(Shown(asked, found, round(r["ts"].timestamp()*1000), 1000*(time.perf_counter() - began)))
        rows += [r | {"rank": n, "item_id": x.item_id} for n, x in enumerate(found.items, 1)]
    return pl.DataFrame(rows, schema=requests.schema | {"rank": pl.Int64, "item_id": pl.String})

def hours(
    begin: datetime, end: datetime,
) -> Iterator[tuple[datetime, datetime]]: # from, until just before
    "Hours that cover a time."
    while begin <= end:
        yield begin, (begin := begin + timedelta(hours=1))

def sent(
    replica: Replica,
    events: pl.DataFrame, # INTERACTIONS
) -> int:
    "Hand events over as `POST /events/v1` would; raises `NotTaken`, `BusError`."
    rows = events.with_columns(pl.col("ts").dt.epoch("ms"), pl.col("event").cast(pl.String))
    return sum(replica.take(part.to_dicts()) for part in rows.iter_slices(TAKEN))

class Drain:
    "The real consumer, until nothing waits."
    def __init__(self, settings: Settings, replica: Replica):
        self.settings, self.replica, self.topics = settings, replica, (settings.stream.topic, lists_section(settings.stream, settings.served).topic)
        self.full = min(settings.stream.max_waiting, settings.served.max_waiting)//2

    @property
    def waiting(self) -> int: return max(self.replica.store.client.xlen(t) for t in self.topics) # on the fuller of the two

    def __call__(self) -> None:
        if self.replica.log: self.replica.log.flush()
        app.consumer.run(self.settings, MARK, lambda: not self.waiting)

SPOKEN = "title", "description", "category_id", "category_path", "brand", "price", "discount", "available" # of an item, as `PUT /items/v1` has them

def said(
    replica: Replica,
    changes: pl.DataFrame, # CATALOG
) -> None:
    "The shop speaks of its items, as over `PUT /items/v1`: what is sold out goes from the lists, what is new comes."
    for row in changes.iter_rows(named=True): replica.put_item(row["item_id"], {n: row[n] for n in SPOKEN if row[n] is not None})

def happen(
    replica: Replica,
    days: Days,
    since: datetime,                        # earlier hours have happened
    cents: tuple[datetime, datetime]|None,  # of `in_cents`
    seed: int,
    drain: Drain,                           # called when half of the bus is full
) -> tuple[int, int]:                       # lists, events
    "Hour by hour: lists for who comes, then what everybody did."
    asked, later, lists, events = requests_of(days.events, MARK, seed), days.events.clear(), 0, 0
    for begin, until in hours(since, days.end + timedelta(hours=1)):
        now = pl.col("ts").is_between(begin, until, closed="left")
        said(replica, days.changes.filter(pl.col("valid_from").is_between(begin, until, closed="left")))
        shown = answered(replica, asked.filter(now))
        chance = appeal(shown, days.items.select("item_id", "category_id"), days.tastes, days.trends, days.complements)
        did = reactions(shown, chance, days.items.select("item_id", "price"), MARK, np.random.default_rng([seed, int(begin.timestamp())]))
        due = pl.concat([later, in_cents(pl.concat([days.events.filter(now), did]), cents)]).sort("ts", "event_id")
        lists, events = lists + shown["request_id"].n_unique(), events + sent(replica, due.filter(pl.col("ts") < until))
        later = due.filter(pl.col("ts") >= until)
        if begin.hour == 23:
            print(f"{begin:%Y-%m-%d}: {lists:,} lists and {events:,} events so far", flush=True)
            if drain.waiting > drain.full: drain()
    return lists, events + sent(replica, later)

def went_on_until(
    lake: Lake,
) -> datetime|None: # None when there was none
    "The last list of earlier traffic."
    if "exposures" not in lake.tables(): return None
    return lake.read("exposures").filter(pl.col("request_id").str.starts_with(f"{MARK}-")).select(pl.col("ts").max()).collect().item()

def traffic(
    settings: Settings,
    cents_from: int|None, # the day, counted from the first, on which prices begin to come in cents for two days; None: never
) -> str:                 # what happened
    "Let the days happen; raises `TrafficError`, `BundleError`, `LakeError`, `StoreError`, `BusError`."
    if settings.stream.bus.get_secret_value().startswith("kafka"): raise TrafficError("[stream] bus is Kafka: traffic is for the embedded store, or for a Redis")
    days, replica = days_of(settings.path(settings.data.path)), replica_of(settings)
    drain = Drain(settings, replica)
    assert replica.log and replica.experimenting
    with contextlib.closing(replica.log), contextlib.closing(replica.store):
        drain() # of a run that was killed
        done = went_on_until(open_lake(settings))
        since = done.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1) if done else days.begin
        first = days.begin.replace(hour=0)
        cents = None if cents_from is None else (first + timedelta(days=cents_from), first + timedelta(days=cents_from + 2))
        lists, events = happen(replica, days, since, cents, settings.project.seed, drain) if since <= days.end else (0, 0)
        drain()
        replica.experimenting.end()
    return f"{lists:,} lists and {events:,} events, {since:%Y-%m-%d} to {days.end:%Y-%m-%d}" if lists else f"all of it has happened, until {days.end:%Y-%m-%d}"

def main() -> int: # exit code
    "Run the command; errors go to stderr with exit code 1."
    cli = argparse.ArgumentParser(prog="python -m app.traffic", description="Some days of simulated shoppers who are shown lists.")
    cli.add_argument("--cents-from", type=int, metavar="DAY", help="from this day on, counted from 0, the pages send prices in cents for two days: an incident for `flows/monitor.py` to find")
    args = cli.parse_args()
    try:
        settings = load_settings()
        experiments_of(settings)
        print(traffic(settings, args.cents_from), flush=True)
    except (SettingsError, TrafficError, BundleError, LakeError, StoreError, BusError, ExperimentError, OSError) as e:
        print(f"traffic: {e}", file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__": sys.exit(main())
