"""Raw files → judged → lake. `python flows/ingest.py run --source retailrocket --path DIR`; `[data]` has the defaults."""
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
from base import HERE, PROJECT, SETTINGS, card_lines, card_table, run_record
from metaflow import FlowSpec, Parameter, card, current, project, step
from metaflow.cards import Markdown

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.data.lake import Lake
from reco.data.quality import accept, check_catalog, check_interactions, per_day, reasons, summary
from reco.data.sources import gather, read_source, sessionize
from reco.provenance import git_sha


@project(name=PROJECT)
class IngestFlow(FlowSpec):
    """Read a shop's files, set bad rows aside, and add the rest to the lake; a bad batch changes nothing."""
    source = Parameter("source", help="simulator, retailrocket or files", default=SETTINGS.data.source)
    path = Parameter("path", help="folder of the raw files", default=str(SETTINGS.path(SETTINGS.data.path)))

    @step
    def start(self):
        """Fix what the run depends on: settings, code, moment."""
        self.settings, self.git_sha, self.now = SETTINGS, git_sha(HERE), datetime.now(UTC)
        print(f"source {self.source} in {self.path}, lake {SETTINGS.path(SETTINGS.lake.root)}, code {self.git_sha}")
        self.next(self.ingest)

    @step
    def ingest(self):
        """Read and judge everything, then write: bad rows first, so that no row is ever in neither place."""
        batch, data = read_source(self.source, Path(self.path)), self.settings.data
        events = accept(check_interactions(gather(batch.events, "interactions"), self.now), self.settings.quality.bad_share.value)
        catalog = accept(check_catalog(gather(batch.catalog, "catalog")), self.settings.quality.bad_share.value)
        log, bad = sessionize(events.good, data.session_gap_minutes), pl.concat([events.bad, catalog.bad])
        lake = Lake(self.settings.path(self.settings.lake.root))
        self.snapshots = {
            "quarantine": lake.write("quarantine", bad, key=["table", "file", "row", "reason", "record"]),
            "catalog": lake.write("catalog", catalog.good, key=["item_id", "valid_from"]),
            "interactions": lake.write("interactions", log, key=["event_id"], day_of="ts")}
        self.summary, self.reasons, self.days = summary(log), reasons(bad), per_day(log)
        self.catalog_rows = catalog.good.height
        self.next(self.end)

    @card(type="blank")
    @step
    def end(self):
        """Record the run and show the data."""
        inputs, rows = {"source": self.source, "path": self.path}, self.summary.row(0, named=True)
        self.record = run_record(self.settings, self.git_sha, inputs, self.snapshots, self.now)
        for part in card_parts(self.source, self.summary, self.days, self.reasons, self.snapshots):
            current.card.append(part)
        print(f"{rows['rows']:,} events of {rows['users']:,} shoppers and {rows['items']:,} items, "
              f"{self.catalog_rows:,} catalogue rows, {self.reasons['rows'].sum():,} rows set aside; {self.snapshots}")


def card_parts(source: str, whole: pl.DataFrame, days: pl.DataFrame, why: pl.DataFrame, snapshots: dict[str, str]) -> list:
    """The card: how much, which events, when, what was set aside, and the names of the new states."""
    mix = days.group_by("event").agg(pl.col("rows").sum()).sort("event").with_columns(
        share=pl.col("rows")/pl.col("rows").sum())
    states = pl.DataFrame({"table": list(snapshots), "snapshot": list(snapshots.values())})
    return [Markdown(f"# Ingested from {source}"), card_table(whole),
            Markdown("## Events"), card_table(mix), card_lines(days, "day", "rows", "event", log=True),
            Markdown("## Set aside"), card_table(why.drop("record")) if why.height else Markdown("Nothing."),
            Markdown("## Snapshots"), card_table(states)]


if __name__ == "__main__": IngestFlow()
