"""A batch through the gate into the lake. `python flows/ingest.py run --source retailrocket --path DIR`; `[data]` has the defaults."""
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
from base import HERE, PROJECT, SETTINGS, card_lines, card_table, run_record
from cluster import on_cluster
from metaflow import FlowSpec, Parameter, card, current, project, retry, schedule, step
from metaflow.cards import Markdown

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.data.lake import open_lake
from reco.data.quality import BatchRefused
from reco.data.sources import SOURCES, read_source
from reco.provenance import git_sha


@on_cluster
@project(name=PROJECT)
@schedule(cron=SETTINGS.schedule.ingest, daily=False, timezone="UTC")
class IngestFlow(FlowSpec):
    """Read a shop's data, set bad rows aside, and add the rest to the lake; a bad batch fails and changes nothing."""
    source = Parameter("source", help=", ".join(SOURCES), default=SETTINGS.data.source)
    path = Parameter("path", help="folder of the raw files, [data] path if not given; postgres needs none", default="")

    @step
    def start(self):
        """Fix what the run depends on: settings, code, moment."""
        self.settings, self.git_sha, self.now = SETTINGS.without_secrets(), git_sha(HERE), datetime.now(UTC)
        self.folder = self.path or str(SETTINGS.path(SETTINGS.data.path))
        where = "the database of [postgres]" if self.source == "postgres" else self.folder
        print(f"source {self.source} in {where}, lake {SETTINGS.lake_root}, code {self.git_sha}")
        self.next(self.ingest)

    @card(type="blank")
    @step
    def ingest(self):
        """Judge the batch; if it passes the gate, write it. The card shows either way what was found."""
        from reco.data.ingestion import ingest  # brings whylogs, which takes seconds that only this step needs
        from reco.data.profile import described
        s = self.settings
        done = ingest(self.source, lambda scratch: read_source(self.source, Path(self.folder), SETTINGS.postgres, scratch), open_lake(SETTINGS), self.now,
                      s.quality, s.data.session_gap_minutes, s.path(s.data.scratch), s.data.memory_gb)
        self.refused, self.verdict, self.reasons = done.refused, done.verdict, done.reasons
        self.summary, self.days, self.snapshots, self.profile = done.summary, done.days, done.snapshots, described(done.profile)
        self.said = 0 if self.refused else said_online()
        for part in card_parts(self): current.card.append(part)
        self.next(self.end)

    @retry(times=0) # a batch that is refused stays refused
    @step
    def end(self):
        """Record the run, or fail with the reason."""
        if self.refused: raise BatchRefused(self.refused)
        inputs, found = {"source": self.source, "path": self.folder}, self.summary
        self.record = run_record(self.settings, self.git_sha, inputs, self.snapshots, self.now)
        for r in self.verdict.filter(~pl.col("passed")).iter_rows(named=True):
            print(f"warning: {r['table']}: {r['constraint']} = {r['value']:.4g} is over the limit {r['limit']:g}")
        if self.said: print(f"{self.said:,} rows of the catalogue from what the shop said online")
        print(f"{found['rows']:,} events of {found['users']:,} shoppers and {found['items']:,} items, "
              f"{found['catalog']:,} catalogue rows, {self.reasons['rows'].sum():,} rows set aside; {self.snapshots}")


def said_online() -> int:
    """What the shop said of its items to the endpoint since, as rows of the lake's catalogue; how many were new."""
    from reco.features.store import StoreError, open_store, wait_until_ready
    from reco.materialize import keep_live
    try:
        store = open_store(SETTINGS, timeout_s=30)
        wait_until_ready(store.client)
        try: return keep_live(store, open_lake(SETTINGS))
        finally: store.close()
    except StoreError as e:
        print(f"warning: {e}; what the shop said online comes into the lake next time")
        return 0


def card_parts(run: IngestFlow) -> list:
    """The card: the verdict, how much, which events, when, what was set aside, and the names of the new states."""
    mix = run.days.group_by("event").agg(pl.col("rows").sum()).sort("event").with_columns(share=pl.col("rows")/pl.col("rows").sum())
    verdict = f"**Refused; the lake is as it was.** {run.refused}" if run.refused else "Passed the gate; it is in the lake."
    states = pl.DataFrame({"table": list(run.snapshots), "snapshot": list(run.snapshots.values())})
    return [Markdown(f"# A batch from {run.source}\n{verdict}"), card_table(pl.DataFrame([run.summary])),
            Markdown("## The gate"), card_table(run.verdict),
            Markdown("## Events"), card_table(mix), card_lines(run.days, "day", "rows", "event", log=True),
            Markdown("## Columns of the good rows (whylogs, an even sample)"), card_table(run.profile),
            Markdown("## Set aside"), card_table(run.reasons.drop("given")) if run.reasons.height else Markdown("Nothing."),
            *([Markdown("## Snapshots"), card_table(states)] if states.height else [])]


if __name__ == "__main__": IngestFlow()
