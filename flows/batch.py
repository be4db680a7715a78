"""Lake and bundle → lists of all shoppers. `python flows/batch.py run`; again after a kill it goes on with the parts that are missing.

The parts are scored by Ray: on this machine, or on the cluster that RAY_ADDRESS names, whose nodes need the package, the same
settings.ini at the same path with its secrets in their own environment, and lake and bundles within reach. One worker needs no Ray.
"""
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import polars as pl
from base import HERE, PROJECT, SETTINGS, TABLES, card_table, run_record
from cluster import on_cluster
from metaflow import FlowSpec, card, current, project, schedule, step, trigger_on_finish
from metaflow.cards import Markdown
from on_ray import each_done, ray_running

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.data.lake import open_lake
from reco.provenance import git_sha
from reco.settings import find_settings, load_settings

DAY_S = 86_400


def scorer(bundle: str, batch, per_item) -> Callable[[int], dict]:
    """A worker's own, from the settings of its machine."""
    from reco.batch import open_scorer
    from reco.bundle_copies import bundle_at
    from reco.bundle_store import bundles_root
    settings = load_settings()
    return open_scorer(settings, bundle_at(bundles_root(settings), bundle), batch, per_item)


def scored(parts: list[int], *args: Any) -> Iterator[dict]:
    """What is noted of each part, as they are done; `args` are those of `scorer`."""
    if SETTINGS.batch.workers == 1 and not os.environ.get("RAY_ADDRESS"):
        yield from map(scorer(*args), parts)
        return
    found = find_settings()
    env = {"RECO_SETTINGS": str(found.absolute())} if found else {}
    with ray_running() as cores:
        for _, done in each_done(scorer, args, parts, min(SETTINGS.batch.workers or cores, cores), env): yield done


@on_cluster
@project(name=PROJECT)
@schedule(cron=SETTINGS.schedule.batch, daily=False, timezone="UTC")
@trigger_on_finish(flow="PromoteFlow")
class BatchFlow(FlowSpec):
    """Score everybody, a part of the shoppers at a time; a second run finds nothing to do."""

    @step
    def start(self):
        """Fix what the run depends on: settings, code, data snapshots."""
        self.git_sha = git_sha(HERE)  # the settings are no artifact: it would hold the store's password
        lake = open_lake(SETTINGS)
        self.snapshots = {t: lake.snapshot(t) for t in TABLES}
        self.next(self.score)

    @step
    def score(self):
        """Make the parts that are missing, drop older runs, and bring the lists online if the settings say so."""
        from reco.batch import (  # brings numba and LightGBM, which take seconds
            drop_older,
            fresh_rows,
            left,
            parts_done,
            plan,
        )
        from reco.bundle import load_bundle
        from reco.bundle_store import bundles_root
        from reco.published import served_at
        lake, folder, section = open_lake(SETTINGS), served_at(bundles_root(SETTINGS)), SETTINGS.batch
        bundle = load_bundle(folder)
        batch = plan(lake, self.snapshots, bundle, section.k, section.partition_users)
        began, self.made, self.batch = time.perf_counter(), left(lake, batch), asdict(batch)
        if self.made: # else the features of items would be made for nothing
            for p in scored(self.made, folder.name, batch, fresh_rows(lake, bundle, batch)): print(part_line(p), flush=True)
        self.seconds, self.done = time.perf_counter() - began, parts_done(lake, batch.run)
        self.dropped, self.stored = drop_older(lake, section.keep_runs), stored(lake, batch)
        self.next(self.end)

    @card(type="blank")
    @step
    def end(self):
        """Record the run and show what was made."""
        b = self.batch
        asof = datetime.fromtimestamp(b["asof"] / 1000, UTC)
        self.record = run_record(SETTINGS, self.git_sha, {"lake": SETTINGS.lake.root, "bundle": b["bundle_id"]}, self.snapshots, asof)
        for part in card_parts(b, self.done, self.seconds, len(self.made)): current.card.append(part)
        if self.dropped: print(f"removed {self.dropped:,} items of older runs")
        if self.stored: print(f"online store: the lists of {self.stored:,} shoppers")
        about = f"run {b['run']} of bundle {b['bundle_id']}, {b['users']:,} shoppers, the lake at {self.snapshots}"
        print(f"complete after {self.seconds:,.1f} s: {about}" if self.made else f"nothing to do: {about}")


def part_line(p: dict) -> str:
    """What is said of a part that is done."""
    return f"part {p['partition']} of {p['partitions']}: {p['users']:,} shoppers, {p['rows']:,} items, {p['seconds']:,.1f} s"


def stored(lake, batch) -> int:
    """Bring the run's lists into the online store, if the settings say so and they are not there; how many shoppers have one now."""
    if not SETTINGS.batch.to_store: return 0
    from reco.batch_store import fill_lists, lists_in
    from reco.features.store import open_store, wait_until_ready
    store = open_store(SETTINGS, timeout_s=30)
    try:
        wait_until_ready(store.client)
        if lists_in(store) == batch.run: return 0
        return fill_lists(store, lake, batch.run, batch.partitions, SETTINGS.batch.store_days * DAY_S)
    finally: store.close()


def card_parts(b: dict, done: pl.DataFrame, seconds: float, made: int) -> list:
    """The card: which run, and what each of its parts took."""
    made_now = f"{made:,} of them were made in {seconds:,.1f} s." if made else "Nothing to do: all of them were there."
    head = Markdown(f"# Lists of all shoppers\nRun {b['run']} of bundle {b['bundle_id']}: {b['k']} items for each of {b['users']:,} shoppers, "
                    f"in {b['partitions']:,} parts. {made_now}")
    return [head, card_table(done.select("partition", "users", "rows", "seconds", "made"))]


if __name__ == "__main__": BatchFlow()
