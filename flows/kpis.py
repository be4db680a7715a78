"""What the shop earned from its lists, day by day, and what experiments say so far: `python flows/kpis.py run`; `[kpis]` and `[experiments]` have the settings.

The last days are counted again until their purchases are complete, and so are earlier days that never were: a run that did not happen is caught up.
A day that was counted is replaced. Can be run at any time, and again.
"""
import sys
from datetime import UTC, date, datetime, time, timedelta
from itertools import chain

import polars as pl
from base import HERE, PROJECT, SETTINGS, card_lines, card_table, moment_of, run_record
from cluster import on_cluster
from metaflow import FlowSpec, Parameter, card, current, project, schedule, step
from metaflow.cards import Markdown
from pydantic import ValidationError

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.data.lake import open_lake
from reco.provenance import git_sha
from reco.schemas import EXPOSURES, INTERACTIONS
from reco.settings import Kpis

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
        try: Kpis(**(K.model_dump() | {"days": self.days}))
        except ValidationError as e: sys.exit(f"--days {self.days}: {e.errors()[0]['msg']}")
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
        self.late = days_missed(lake, self.snapshots["exposures"], self.now, self.days)
        self.tables, self.unread = counted(lake, self.snapshots, self.now, self.days, self.late, self.book)
        self.kept = keep_days(lake, self.tables)
        show_figures(self.now, self.tables["kpis"], self.tables["variety"])
        for part in card_parts(self): current.card.append(part)
        self.next(self.end)

    @step
    def end(self):
        """Record the run and say what was found."""
        self.record = run_record(self.settings, self.git_sha, {"lake": SETTINGS.lake.root}, self.snapshots, self.now)
        for line in said(self.tables, self.late): print(line)
        for name, why in self.unread.items(): print(f"warning: experiment {name} is not read: {why}")
        print("kept: " + ", ".join(f"{n:,} rows of {t}" for t, n in self.kept.items()))


def experiments():
    """The experiments of the settings; a bad file ends the run with what is wrong in it."""
    from reco.experiments.assignment import ExperimentError, read_experiments
    try: return read_experiments(SETTINGS.path(SETTINGS.experiments.file) if SETTINGS.experiments.file else None)
    except ExperimentError as e: sys.exit(f"experiments: {e}")


def whole_since(now: datetime) -> date:
    """From this day on the lake has everything; of the day before, some rows are gone already."""
    keep = SETTINGS.lake.keep_events_days
    return now.date() - timedelta(days=keep - 1) if keep else date.min


def first_day(now: datetime, days: int) -> date:
    """The first of the days that every run counts."""
    return max(now.date() - timedelta(days=days - 1), whole_since(now))


def days_missed(lake, snapshot: str, now: datetime, days: int) -> list[date]:
    """Earlier days that no run has counted when they were complete, as far back as the lake keeps what was shown."""
    from reco.monitoring.days import missed
    return missed(lake.read("exposures", snapshot), lake.read("kpis") if "kpis" in lake.tables() else None, whole_since(now), first_day(now, days))


def counted(lake, snapshots: dict[str, str], now: datetime, days: int, late: list[date], book) -> tuple[dict[str, pl.DataFrame], dict[str, str]]:
    """The tables of the last days and of those that were missed, and why an experiment could not be read."""
    from reco.data.histories import epoch_ms
    from reco.monitoring.credit import outcomes_of
    from reco.monitoring.days import (
        BEFORE,
        complete,
        day_by_day,
        days_until,
        holdout_of,
        kpis_by_day,
        retention_by_day,
        rows_of,
        variety_by_day,
        with_segment,
    )
    exposures, events, catalog = (lake.read(t, snapshots[t]).filter(pl.col("ts") < now) if t != "catalog" else lake.read(t, snapshots[t]) for t in TABLES)
    midnight, window = datetime.combine(now.date(), time(), UTC), timedelta(hours=K.window_hours)
    wanted = {*late, *days_until(first_day(now, days), now)}
    running = [e for e in (*book.experiment, *holdout_of(book)) if e.window[0] < epoch_ms(now)]
    oldest = epoch_ms(midnight - timedelta(days=K.experiment_days)) # an experiment without a first day began long ago
    read_from = [(datetime.fromtimestamp(max(e.window[0], oldest)/1000, UTC) - BEFORE).date() for e in running]
    nothing = outcomes_of(EXPOSURES.empty(), INTERACTIONS.empty(), window)
    kpis, varied = [], []
    read: dict[str, list] = {e.name: [] for e in running}
    to_read = sorted(wanted.union(*(days_until(d, now) for d in read_from)))
    for outcomes in chain([nothing], day_by_day(exposures, events, to_read, now, window)): # so that the tables have their columns when nothing was shown
        if outcomes.height:
            for e in running: read[e.name].append(rows_of(e, outcomes))
            if outcomes["ts"][0].date() not in wanted: continue
        asked = with_segment(outcomes, events)
        kpis.append(kpis_by_day(asked).with_columns(complete=complete(pl.col("day"), now, window)))
        varied.append(variety_by_day(asked, catalog, events, SETTINGS.rerank.new_days))
    readouts, unread = read_out(running, read, now)
    retention = retention_by_day(events, exposures, now.date(), K.retention_days)
    return {"kpis": pl.concat(kpis), "variety": pl.concat(varied), "retention": retention, "readouts": pl.concat(readouts) if readouts else pl.DataFrame()}, unread


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


def said(tables: dict[str, pl.DataFrame], late: list[date]) -> list[str]:
    """A line per day, what was caught up, what was sold without a price, and a line per verdict."""
    percent = lambda x: "–" if x is None else f"{100*x:.2f}%"
    if not tables["kpis"].height: return ["nothing was shown in these days"]
    days = tables["kpis"].filter(pl.col("dimension") == "").sort("day")
    lines = [f"caught up: {len(late)} days that were not counted when they were complete, from {late[0]} to {late[-1]}"] if late else []
    lines += [f"{r['day']}: {r['exposures']:,} exposures to {r['shoppers']:,} shoppers, CTR {percent(r['CTR'])}, CVR {percent(r['CVR'])}, "
              f"revenue {r['revenue']:,.2f}" + ("" if r["complete"] else ", so far") for r in days.iter_rows(named=True)]
    if lacking := days["unpriced"].sum(): lines.append(f"warning: {lacking:,} purchases have no price and are missing in the revenue")
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
    shown = ["day", "dimension", "value", "shoppers", "exposures", "CTR", "CTR_low", "CTR_high", "CVR", "AOV", "revenue", "revenue_low", "revenue_high", "revenue_per_1000", "unpriced", "complete"]
    lines = days.select("day", "CTR", "CTR_low", "CTR_high").unpivot(index="day").filter(pl.col("value").is_not_null())
    parts = [Markdown(f"# What the lists earned, as of {run.now:%Y-%m-%d %H:%M}"), card_table(days.select(c for c in shown if c not in ("dimension", "value")))]
    if lines.height: parts.append(card_lines(lines, "day", "value", "variable"))
    parts += [Markdown("## By surface, source, variant, segment, bundle and rank"), card_table(rest.select(shown).sort("day", "dimension", "value", descending=[True, False, False]).head(200)),
              Markdown("## Variety"), card_table(run.tables["variety"]), Markdown("## Retention"), card_table(run.tables["retention"].tail(30))]
    if run.tables["readouts"].height: parts += [Markdown("## Experiments"), card_table(run.tables["readouts"])]
    return parts + [Markdown(f"Experiment {name} is not read: {why}") for name, why in run.unread.items()]


if __name__ == "__main__": KpisFlow()
