"""Lake and bundle → online store. `python flows/materialize.py run`, after training and whenever the lake has grown."""
import time
from datetime import UTC, datetime, timedelta

import polars as pl
from base import HERE, PROJECT, SETTINGS, TABLES, card_table, run_record
from cluster import on_cluster
from metaflow import FlowSpec, card, current, project, schedule, step, trigger_on_finish
from metaflow.cards import Markdown

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.data.histories import epoch_ms
from reco.data.lake import open_lake
from reco.features.items import ITEM_FEATURES
from reco.features.store import open_store, wait_until_ready
from reco.provenance import git_sha


@on_cluster
@project(name=PROJECT)
@schedule(cron=SETTINGS.schedule.materialize, daily=False, timezone="UTC")
@trigger_on_finish(flow="IngestFlow") # after a promotion nothing is missing: a bundle brings its own rows until newer ones are there
class MaterializeFlow(FlowSpec):
    """Bring the pasts of all shoppers and the newest features of the bundle's items online; a second run finds nothing to do."""

    @step
    def start(self):
        """Fix what the run depends on: settings, code, data snapshots and their end."""
        self.git_sha = git_sha(HERE)  # the settings are no artifact: it would hold the store's password
        lake = open_lake(SETTINGS)
        self.snapshots = {t: lake.snapshot(t) for t in TABLES}
        last = lake.read("interactions", self.snapshots["interactions"]).filter(pl.col("event") != "impression").select(pl.col("ts").max())
        self.asof = last.collect().item() + timedelta(milliseconds=1)
        self.next(self.materialize)

    @step
    def materialize(self):
        """Fill the pasts, then put the features of the published bundle's items and make them the active ones."""
        from reco.bundle import (  # brings LightGBM, which takes seconds that only this step needs
            load_bundle,
        )
        from reco.bundle_store import bundles_root
        from reco.materialize import (
            forget_live,
            item_rows,
            materialize_pasts,
            materialize_rows,
            materialized,
            note_rows,
            version_of,
        )
        from reco.published import served_at
        lake, bundle = open_lake(SETTINGS), load_bundle(served_at(bundles_root(SETTINGS)))
        store = open_store(SETTINGS, timeout_s=30)
        wait_until_ready(store.client)
        self.bundle, self.version = bundle.id, version_of(bundle.id, self.snapshots, tuple(ITEM_FEATURES))
        log, self.parts = lake.read("interactions", self.snapshots["interactions"]), []
        pasts_there, rows_there = materialized(store, bundle.id, self.version, self.snapshots["interactions"])
        if not pasts_there:
            began = time.perf_counter()
            done = materialize_pasts(store, log, self.snapshots["interactions"], self.asof)
            self.parts += [{"part": "pasts", **done, "items": None, "seconds": time.perf_counter() - began}]
        if not rows_there:
            began = time.perf_counter()
            catalog = lake.read("catalog", self.snapshots["catalog"]).collect()
            rows = item_rows(log, catalog, bundle.ids, epoch_ms(self.asof))
            materialize_rows(store, bundle, self.version, rows, epoch_ms(self.asof))
            self.parts += [{"part": "features", "shoppers": None, "events": None, "new": None, "items": len(rows),
                            "seconds": time.perf_counter() - began}]
        note_rows(lake, bundle.id, self.version, datetime.now(UTC), epoch_ms(self.asof)) # also what a run activated that was killed just then
        self.forgotten = forget_live(store, bundle)
        store.close()
        self.next(self.end)

    @card(type="blank")
    @step
    def end(self):
        """Record the run and show what was moved."""
        inputs = {"lake": SETTINGS.lake.root, "bundle": self.bundle}
        self.record = run_record(SETTINGS, self.git_sha, inputs, self.snapshots, self.asof) | {"version": self.version}
        for part in card_parts(self.bundle, self.version, self.snapshots, self.parts): current.card.append(part)
        for p in self.parts: print(f"{p['part']}: " + ", ".join(f"{v:,.1f} s" if k == "seconds" else f"{v:,} {k}"
                                                                 for k, v in p.items() if k != "part" and v is not None))
        if self.forgotten: print(f"{self.forgotten:,} items that the shop changed online are in the bundle now")
        about = f"version {self.version} of bundle {self.bundle}, the lake at {self.snapshots}"
        print(f"materialized {about}" if self.parts else f"nothing to do: the store holds {about}")


def card_parts(bundle: str, version: str, snapshots: dict[str, str], parts: list[dict]) -> list:
    """The card: which version, from what, and how much of it was moved in how many seconds."""
    head = Markdown(f"# Online store\nVersion {version} of bundle {bundle}, from {snapshots}.")
    if not parts: return [head, Markdown("Nothing to do: all of it was there.")]
    return [head, card_table(pl.DataFrame(parts).with_columns(pl.col("shoppers", "events", "new", "items").cast(pl.String).fill_null("")))]


if __name__ == "__main__": MaterializeFlow()
