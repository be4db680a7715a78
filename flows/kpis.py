"""What the shop earned from its lists, day by day, and what experiments say so far: `python flows/kpis.py run`; `[kpis]` and `[experiments]` have the settings.

The last days are counted again until their purchases are complete; a day that was counted is replaced. Can be run at any time, and again.
"""
import sys
from datetime import UTC, datetime, time, timedelta

import polars as pl
from base import HERE, PROJECT, SETTINGS, card_lines, card_table, moment_of, run_record
from cluster import on_cluster
from metaflow import FlowSpec, Parameter, card, current, project, schedule, step
from metaflow.cards import Markdown

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.data.lake import open_lake
from reco.provenance import git_sha

TABLES = "exposures", "interactions", "catalog"
K = SETTINGS.kpis


@on_cluster
@project(name=PROJECT)
@schedule(cron=SETTINGS.schedule.kpis, daily=False, timezone="UTC")
class KpisFlow(FlowSpec):
    """Business metrics, variety, retention and experiments, from the serve log and what shoppers did, into the lake."""

    asof = Parameter("asof", default="", help="the moment to look back from, ISO 8601 with a time zone; now if not given")
    days = Parameter("days", default=K.days, type=int, help="days to count again, today included")

    @step
    def start(self):
        """Fix what the run depends on: settings, code, moment, experiments, the state of the lake."""
        self.settings, self.git_sha, self.now, lake = SETTINGS.without_secrets(), git_sha(HERE), moment_of(self.asof), open_lake(SETTINGS)
        if self.days < 1: sys.exit(f"--days {self.days}: 1 or more")
        if missing := [t for t in TABLES if t not in lake.tables()]:
            sys.exit(f"the lake has no {', '.join(missing)}: exposures come from the endpoint through `python -m app.consumer`, the others from `python flows/ingest.py run`")
        self.book = experiments()
        self.snapshots = {t: lake.snapshot(t) for t in TABLES}
        self.next(self.count)

    @card(type="blank")
    @step
    def count(self):
        """Count, read the experiments, and keep both."""
        from reco.monitoring.days import keep_days  # brings SciPy, which takes a second
        lake = open_lake(SETTINGS)
        self.tables, self.unread = counted(lake, self.snapshots, self.now, self.days, self.book)
        self.kept = keep_days(lake, self.tables)
        show_figures(self.now, self.tables["kpis"], self.tables["variety"])
        for part in card_parts(self): current.card.append(part)
        self.next(self.end)

    @step
    def end(self):
        """Record the run and say what was found."""
        self.record = run_record(self.settings, self.git_sha, {"lake": SETTINGS.lake.root}, self.snapshots, self.now)
        for line in said(self.tables): print(line)
        for name, why in self.unread.items(): print(f"warning: experiment {name} is not read: {why}")
        print("kept: " + ", ".join(f"{n:,} rows of {t}" for t, n in self.kept.items()))


def experiments():
    """The experiments of the settings; a bad file ends the run with what is wrong in it."""
    from reco.experiments.assignment import ExperimentError, read_experiments
    try: return read_experiments(SETTINGS.path(SETTINGS.experiments.file) if SETTINGS.experiments.file else None)
    except ExperimentError as e: sys.exit(f"experiments: {e}")


def counted(lake, snapshots: dict[str, str], now: datetime, days: int, book) -> tuple[dict[str, pl.DataFrame], dict[str, str]]:
    """The tables of the last days, and why an experiment could not be read."""
    from reco.data.histories import epoch_ms
    from reco.monitoring.days import (
        BEFORE,
        day_by_day,
        kpis_by_day,
        retention_by_day,
        rows_of,
        variety_by_day,
        with_segment,
    )
    exposures, events, catalog = (lake.read(t, snapshots[t]) for t in TABLES)
    events = events.filter(pl.col("ts") < now)
    midnight = datetime.combine(now.date(), time(), UTC)
    since = midnight - timedelta(days=days - 1)
    running = [e for e in book.experiment if e.window[0] < epoch_ms(now)]
    oldest = epoch_ms(midnight - timedelta(days=K.experiment_days)) # an experiment without a first day began long ago
    first = min([since, *(datetime.fromtimestamp(max(e.window[0], oldest)/1000, UTC) - BEFORE for e in running)])
    kpis, varied, read = [], [], {e.name: [] for e in running}
    for day in day_by_day(exposures, events, first.date(), now, timedelta(hours=K.window_hours)):
        for e in running: read[e.name].append(rows_of(e, day))
        if day["ts"][0] < since: continue
        kpis.append(kpis_by_day(with_segment(day, events)))
        varied.append(variety_by_day(day, catalog, events, SETTINGS.rerank.new_days))
    readouts, unread = read_out(running, read, now)
    retention = retention_by_day(events, now.date(), K.retention_days)
    joined = lambda parts: pl.concat(parts) if parts else pl.DataFrame()
    return {"kpis": joined(kpis), "variety": joined(varied), "retention": retention, "readouts": joined(readouts)}, unread


def read_out(running: list, read: dict[str, list], now: datetime) -> tuple[list[pl.DataFrame], dict[str, str]]:
    """What each experiment says, and why one says nothing."""
    from reco.monitoring.days import readout_of
    E, tables, unread = SETTINGS.experiments, [], {}
    for e in running:
        if not read[e.name]:
            unread[e.name] = "nothing was shown in its time"
            continue
        during, before = (pl.concat(part) for part in zip(*read[e.name], strict=True))
        table, why = readout_of(e, during, before, alpha=E.alpha, plan=E.plan, srm_alpha=E.srm_alpha, least=E.min_shoppers)
        if why: unread[e.name] = why
        else: tables.append(table.select(pl.lit(now.date()).alias("day"), pl.lit(e.name).alias("experiment"), pl.all()))
    return tables, unread


def said(tables: dict[str, pl.DataFrame]) -> list[str]:
    """A line per day, and one per verdict."""
    percent = lambda x: "–" if x is None else f"{100*x:.2f}%"
    if not tables["kpis"].height: return ["nothing was shown in these days"]
    days = tables["kpis"].filter(pl.col("dimension") == "").sort("day")
    lines = [f"{r['day']}: {r['exposures']:,} exposures to {r['shoppers']:,} shoppers, CTR {percent(r['CTR'])}, CVR {percent(r['CVR'])}, "
             f"revenue {r['revenue']:,.2f}" for r in days.iter_rows(named=True)]
    return lines + [f"experiment {r['experiment']}: {r['variant']}, {r['metric']}: {r['verdict']}" for r in tables["readouts"].iter_rows(named=True)]


def show_figures(now: datetime, kpis: pl.DataFrame, varied: pl.DataFrame) -> None:
    """A file for Prometheus beside that of flows/monitor.py, where the settings name one."""
    if not SETTINGS.monitor.textfile: return
    from textfile import figures_of_lists, write_figures
    path = SETTINGS.path(SETTINGS.monitor.textfile)
    path = path.with_name(f"{path.stem}_kpis.prom")
    if trouble := write_figures(path, figures_of_lists(now, kpis, varied, 2 * timedelta(hours=K.window_hours))): print(f"warning: no figures for Prometheus in {path}: {trouble}")


def card_parts(run: KpisFlow) -> list:
    """The card: the days, the questions, variety, retention and experiments."""
    if not run.tables["kpis"].height: return [Markdown(f"# Nothing was shown in the {run.days} days before {run.now:%Y-%m-%d %H:%M}")]
    days, rest = run.tables["kpis"].filter(pl.col("dimension") == ""), run.tables["kpis"].filter(pl.col("dimension") != "")
    shown = ["day", "dimension", "value", "shoppers", "exposures", "CTR", "CTR_low", "CTR_high", "CVR", "AOV", "revenue_per_1000"]
    lines = days.select("day", "CTR", "CTR_low", "CTR_high").unpivot(index="day").filter(pl.col("value").is_not_null())
    parts = [Markdown(f"# What the lists earned, as of {run.now:%Y-%m-%d %H:%M}"), card_table(days.select(c for c in shown if c not in ("dimension", "value")))]
    if lines.height: parts.append(card_lines(lines, "day", "value", "variable"))
    parts += [Markdown("## By surface, source, variant, segment, bundle and rank"), card_table(rest.select(shown).sort("day", "dimension", "value", descending=[True, False, False]).head(200)),
              Markdown("## Variety"), card_table(run.tables["variety"]), Markdown("## Retention"), card_table(run.tables["retention"].tail(30))]
    if run.tables["readouts"].height: parts += [Markdown("## Experiments"), card_table(run.tables["readouts"])]
    return parts + [Markdown(f"Experiment {name} is not read: {why}") for name, why in run.unread.items()]


if __name__ == "__main__": KpisFlow()
