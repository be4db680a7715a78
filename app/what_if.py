"""What another strength of exploration would have earned: `python -m app.what_if`, from the serve log and what shoppers did; `[experiments]` and `[kpis]` have the settings.

Judged are no exploration, every variant of the experiments file that changes nothing but `explore.epsilon` (whether it runs or waits), and what `--epsilon` names. The answers are printed and
kept in the table `what_ifs` of the lake. Exit codes: 0 answered, 1 not, with the reason, 2 wrong arguments.
"""
import argparse
import sys
from datetime import UTC, datetime, timedelta

import polars as pl

from app.experimenting import experiments_of
from reco.data.lake import Lake, open_lake
from reco.data.storage import LakeError
from reco.experiments.assignment import ExperimentError
from reco.monitoring.days import day_by_day, days_until
from reco.monitoring.what_if import policies_of, what_if
from reco.schemas import SURFACES, SchemaError
from reco.settings import SettingsError, load_settings

KEY = ["day", "surface", "policy", "reward", "method"]
NEEDED = "exposures", "interactions"


def outcomes_between(
    lake: Lake,
    since: datetime,   # UTC
    until: datetime,   # two windows ago: nothing can come of these lists any more
    window: timedelta, # from a list to its clicks, and from a click to what it gets credit for
    surface: str,      # of SURFACES
) -> pl.DataFrame:     # of `outcomes_of`
    "What came of the lists of a surface; raises `LakeError`."
    if missing := [t for t in NEEDED if t not in lake.tables()]: raise LakeError(f"the lake has no {', '.join(missing)}")
    exposures, events = (lake.read(t) for t in NEEDED)
    mine = exposures.filter(pl.col("surface") == surface, pl.col("ts") >= since, pl.col("ts") < until)
    days = list(day_by_day(mine, events, days_until(since.date(), until), until + 2*window, window))
    return pl.concat(days) if days else pl.DataFrame()


def said(
    table: pl.DataFrame, # of `what_if`
) -> list[str]:
    "A line per answer."
    number = lambda x: f"{x:+.4g}"
    return [f"{r['policy']} (epsilon {r['epsilon']:g}), {r['reward']} per list, {r['method']}: " + (
        r["verdict"] if r["value"] is None else f"{r['value']:.4g}, {number(r['gain'])} against what ran ({number(r['gain_low'])} to {number(r['gain_high'])})")
        for r in table.iter_rows(named=True)]


def main(
    args: list[str] | None = None, # the command line's when not given
) -> int:                          # exit code
    "Read, judge, print and keep."
    parser = argparse.ArgumentParser(prog="python -m app.what_if", description="what other strengths of exploration would have earned")
    parser.add_argument("--days", type=int, default=28, help="lists of so many days")
    parser.add_argument("--surface", choices=SURFACES, default=SURFACES[0])
    parser.add_argument("--epsilon", type=float, action="append", default=[], help="another strength to judge, from 0 to below 1; may be given several times")
    asked, now = parser.parse_args(args), datetime.now(UTC)
    if asked.days < 1: parser.error(f"--days {asked.days}: 1 or more")
    if bad := [e for e in asked.epsilon if not 0 <= e < 1]: parser.error(f"--epsilon {bad[0]:g}: from 0 to below 1")
    try:
        settings = load_settings()
        lake, window = open_lake(settings), timedelta(hours=settings.kpis.window_hours)
        policies = policies_of(experiments_of(settings)) | {f"epsilon {e:g}": e for e in asked.epsilon}
        until = now - 2*window
        outcomes = outcomes_between(lake, until - timedelta(days=asked.days), until, window, asked.surface)
        if outcomes.is_empty(): raise LakeError(f"nothing was shown on {asked.surface} in the {asked.days} days before the last {2*window.total_seconds()/3600:g} hours, whose purchases are not complete")
        table, left = what_if(outcomes, policies)
        for why, n in left.items(): print(f"left out: {n:,} lists, {why}")
        if table.is_empty(): raise LakeError("no list is left that was explored: set [explore] epsilon above 0 and come back")
        lake.write("what_ifs", table.with_columns(day=pl.lit(now.date()), surface=pl.lit(asked.surface)), key=KEY, replace=True)
    except (ExperimentError, LakeError, SchemaError, SettingsError, OSError, ValueError) as e:
        print(f"no answer: {e}", file=sys.stderr)
        return 1
    for line in said(table): print(line)
    return 0


if __name__ == "__main__": sys.exit(main())
