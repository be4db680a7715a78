"""Write a simulated shop for the `files` reader: `python data/generators/generate_shop.py --help`.

Run again with the same arguments it does nothing: `shop.json` beside the data says what was made. Without `--end` a
shop that was made without `--end` is kept too, whatever day it was made on; `--force` makes it anew, up to today.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

import reco.data.assortment
import reco.data.shoppers
import reco.data.simulator
from reco.data.shoppers import appeal, bestsellers, reactions, requests_of
from reco.data.simulator import Shop, simulate, write_shop
from reco.settings import Settings, SettingsError, load_settings

SIZES = ("users", "items", "events", "days")
FILES = ("interactions.parquet", "catalog.parquet", "planted/tastes.parquet", "planted/complements.parquet",
         "planted/trends.parquet")
LATER = "later/interactions.parquet"
OTHERS = ("interactions.csv", "catalog.csv")  # the reader takes these too, so they must not lie beside a shop


def moment(
    text: str,   # "2026-05-01" or "2026-05-01T12:00+02:00"
) -> datetime:   # UTC where no zone is given
    "A moment from the command line; raises `argparse.ArgumentTypeError`."
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2026-05-01") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)


def parser(
    settings: Settings,        # the defaults
) -> argparse.ArgumentParser:
    "The command line."
    cli = argparse.ArgumentParser(description="Write a simulated shop: interactions, catalogue and planted truths.")
    for name in SIZES:
        default = getattr(settings.simulator, name)
        cli.add_argument(f"--{name}", type=int, default=default, help=f"default {default}, from [simulator]")
    cli.add_argument("--seed", type=int, default=settings.project.seed, help=f"default {settings.project.seed}")
    cli.add_argument("--end", type=moment, help="the moment after the last event; default today's midnight UTC")
    cli.add_argument("--later", type=int, default=0, metavar="DAYS", help="the last days go to later/ and are not read as raw files: `python -m app.traffic` lets them happen; the days before get lists of bestsellers, and what came of them")
    cli.add_argument("--out", type=Path, default=settings.path(settings.data.path), help="folder; default [data] path")
    cli.add_argument("--force", action="store_true", help="make it anew, over the Parquet files that are there")
    return cli


def wanted_shop(
    args: argparse.Namespace,  # from `parser`
) -> dict:                     # what decides the content of the files, JSON-ready
    "The arguments, and a digest of the simulator's code: other code makes another shop."
    modules = (reco.data.assortment, reco.data.simulator, *([reco.data.shoppers] if args.later else []))
    code = b"".join(Path(m.__file__).read_bytes() for m in modules)
    return {name: getattr(args, name) for name in (*SIZES, "seed")} | ({"later": args.later} if args.later else {}) | {
        "end": args.end.isoformat() if args.end else None, "simulator": hashlib.sha256(code).hexdigest()[:12]}


def read_stamp(
    out: Path,     # folder of the shop
) -> dict | None:  # what `write_stamp` wrote; None where there is nothing readable
    "What was made here before."
    try:
        stamp = json.loads((out/"shop.json").read_text("utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return stamp if isinstance(stamp, dict) else None


def write_stamp(
    out: Path,    # folder of the shop
    stamp: dict,  # JSON-ready
) -> None:
    "Write `shop.json` in one step."
    part = out/f"shop.json.{os.getpid()}.tmp"
    try:
        part.write_text(json.dumps(stamp, indent=1) + "\n", "utf-8")
        os.replace(part, out/"shop.json")
    finally:
        part.unlink(missing_ok=True)


def with_bestsellers(
    shop: Shop,
    seed: int,
) -> Shop:
    "The shop with what came of the lists of bestsellers that it shows until it has a recommender."
    newest = shop.catalog.sort("valid_from").unique("item_id", keep="last", maintain_order=True)
    categories = newest.select("item_id", "category_id")
    shown = bestsellers(requests_of(shop.interactions, "before", seed), shop.interactions, categories)
    chance = appeal(shown, categories, shop.tastes, shop.trends, shop.complements)
    prices = newest.select("item_id", price=pl.col("price")*(1 - pl.col("discount").fill_null(0)))
    did = reactions(shown, chance, prices, "before", np.random.default_rng(seed)).filter(pl.col("ts") < shop.interactions["ts"].max())
    return replace(shop, interactions=pl.concat([shop.interactions, did]).sort("ts", "event_id"))


def split(
    shop: Shop,
    at: datetime,
    seed: int,
) -> tuple[Shop, pl.DataFrame]: # the shop with the events before a moment, and the others
    "A shop at a moment, and what is still to happen."
    late = pl.col("ts") >= at
    return with_bestsellers(replace(shop, interactions=shop.interactions.filter(~late)), seed), shop.interactions.filter(late)


def write_later(
    events: pl.DataFrame,  # INTERACTIONS; empty removes the file
    out: Path,             # folder of the shop
) -> None:
    "Write `LATER` in one step."
    path = out/LATER
    if events.is_empty(): return path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        events.write_parquet(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def foreign_files(
    out: Path,   # folder of the shop
    ours: bool,  # the Parquet files may be written over
) -> list[str]:  # data that this command did not write
    "Files that a new shop would overwrite or stand beside."
    return [f for f in (*OTHERS, *(() if ours else FILES)) if (out/f).exists()]


def summary(
    shop: Shop,
) -> str:  # one line
    "Users, items, events and their mix."
    mix = shop.interactions["event"].value_counts(normalize=True).sort("event")
    return (f"{shop.interactions['user_id'].n_unique():,} users, {shop.catalog['item_id'].n_unique():,} items, "
            f"{shop.interactions.height:,} events: " + ", ".join(f"{100*share:.1f}% {e}" for e,share in mix.rows()))


def make_shop(
    args: argparse.Namespace,  # from `parser`
) -> str:                      # what was done, one line
    "Make the shop unless it is there; raises `ValueError` for bad sizes or foreign data, `OSError` when writing fails."
    if not 0 <= args.later < args.days: raise ValueError(f"--later {args.later}: 0 to {args.days - 1} of {args.days} days can happen later")
    want, have = wanted_shop(args), read_stamp(args.out)
    files = [*FILES, *([LATER] if args.later else [])]
    whole = have and have.get("shop") == want and have.get("done") and all((args.out/f).is_file() for f in files)
    if whole and not args.force:
        return f"{args.out}: already there, up to {have['end']} ({have['summary']}); --force makes it anew"
    if found := foreign_files(args.out, bool(have) or args.force):
        raise ValueError(f"{args.out}: holds {found}, which this command did not write; choose another --out "
                         "(--force writes over Parquet, never over CSV)")
    end = args.end or datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    print(f"simulating {args.events:,} events of {args.users:,} users, {args.days} days up to {end:%Y-%m-%d %H:%M} UTC",
          flush=True)
    began = time.monotonic()
    shop, later = simulate(args.users, args.items, args.events, args.days, end, args.seed), pl.DataFrame()
    if args.later: shop, later = split(shop, end - timedelta(days=args.later), args.seed)
    print(f"simulated in {time.monotonic() - began:.1f} s; writing to {args.out}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stamp = {"shop": want, "end": (end - timedelta(days=args.later)).isoformat(), "summary": summary(shop)}
    write_stamp(args.out, stamp | {"done": False})  # killed from here on, the next run starts over
    write_shop(shop, args.out)
    write_later(later, args.out)
    write_stamp(args.out, stamp | {"done": True})
    return f"{args.out}: {stamp['summary']}"


def main(
    argv: list[str] | None = None,  # the command line; the process's own when not given
) -> int:                           # exit code
    "Run the command; errors go to stderr with exit code 1."
    try:
        print(make_shop(parser(load_settings()).parse_args(argv)), flush=True)
    except (SettingsError, ValueError, OSError) as e:
        print(f"generate_shop: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
