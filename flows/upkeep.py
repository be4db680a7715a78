"""Keep the lake small and fast, and the bundles few: `python flows/upkeep.py run`. `[lake]` and `[bundles]` say what is kept; can be run again at any time."""
from datetime import UTC, datetime, timedelta

import polars as pl
from base import HERE, PROJECT, SETTINGS, card_table, run_record, tell_mlflow
from cluster import on_cluster
from metaflow import FlowSpec, card, current, project, schedule, step
from metaflow.cards import Markdown

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.aliases import mirror
from reco.bundle_store import bundles_root
from reco.data.lake import open_lake
from reco.data.scratch import remove_left
from reco.data.upkeep import upkeep
from reco.provenance import git_sha
from reco.retention import remove_old

RESUME_DAYS = 7 # a run that failed can be resumed for so long


@on_cluster
@project(name=PROJECT)
@schedule(cron=SETTINGS.schedule.upkeep, daily=False, timezone="UTC")
class UpkeepFlow(FlowSpec):
    """Drop what is too old, put small files together, remove what no snapshot needs; beside writers and readers."""

    @step
    def start(self):
        """Fix what the run depends on: settings, code, moment."""
        self.git_sha, self.now = git_sha(HERE), datetime.now(UTC) # not the settings: S3 keys would be kept with the run
        print(f"lake {SETTINGS.lake_root}, code {self.git_sha}")
        self.next(self.upkeep)

    @step
    def upkeep(self):
        """Every table, one after the other, then the bundles, and what runs left behind that nobody resumed."""
        lake = open_lake(SETTINGS)
        self.done = upkeep(lake, SETTINGS.lake, self.now)
        self.snapshots = {table: lake.snapshot(table) for table in self.done["table"]}
        named, self.warning = in_experiments()
        self.bundles = [] if self.warning else remove_old(bundles_root(SETTINGS), SETTINGS.bundles.keep, named=named)
        tell_mlflow(lambda: mirror(SETTINGS)) # what was published while MLflow was away
        self.left = remove_left(SETTINGS.lake_root, SETTINGS.lake, self.now - timedelta(days=RESUME_DAYS))
        self.next(self.end)

    @card(type="blank")
    @step
    def end(self):
        """Record the run and show what was done."""
        self.record = run_record(SETTINGS, self.git_sha, {"lake": SETTINGS.lake_root}, self.snapshots, self.now)
        for part in card_parts(self.done, self.snapshots, self.bundles): current.card.append(part)
        sums = self.done.select(pl.exclude("table").sum()).row(0, named=True)
        print(f"{sums['files_before']:,} files became {sums['files_after']:,}, {sums['bytes_before']/1e6:,.1f} MB became "
              f"{sums['bytes_after']/1e6:,.1f} MB, {sums['rows_removed']:,} rows were too old")
        if self.warning: print(f"warning: no bundle was removed: {self.warning}")
        print(f"bundles removed: {', '.join(self.bundles) or 'none'}; what runs had left behind: {', '.join(self.left) or 'nothing'}")


def in_experiments() -> tuple[frozenset[str], str]:
    """The bundles that the experiments file names, and why that is not known: one that is still shown must not go."""
    from reco.experiments.assignment import ExperimentError, read_experiments
    try: return read_experiments(SETTINGS.path(SETTINGS.experiments.file) if SETTINGS.experiments.file else None).bundles, ""
    except ExperimentError as e: return frozenset(), str(e)


def card_parts(done: pl.DataFrame, snapshots: dict[str, str], bundles: list[str]) -> list:
    """The card: what each table was and is, and which bundles are gone."""
    states = pl.DataFrame({"table": list(snapshots), "snapshot": list(snapshots.values())},
                          schema={"table": pl.String, "snapshot": pl.String})
    return [Markdown("# Upkeep of the lake"), card_table(done) if done.height else Markdown("No tables."),
            Markdown("## Snapshots"), card_table(states), Markdown(f"## Bundles removed\n{', '.join(bundles) or 'none'}")]


if __name__ == "__main__": UpkeepFlow()
