"""What the lists earned in some days: sums of the table `kpis`, and intervals recounted from the serve log, because those of single days cannot be put together."""
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from statistics import NormalDist
from typing import Any, NamedTuple

import polars as pl
import streamlit as st

from app.parts.page import lake, read, settings, tables
from app.parts.wording import FIGURES, Figure

Z = NormalDist().inv_cdf(0.975) # of the 95% intervals of `kpi_table`
MOST = 1_500_000                # exposures that are recounted while somebody waits: about five seconds
SUMS = ["exposures", "click", "cart", "purchase", "units", "orders", "revenue", "unpriced"] # columns of `kpis` that add up over days
KEEP_S = 3_600                  # a recount is kept for so long; another state of the lake is another recount

class Span(NamedTuple):
    "Days in a row, and as many before them."
    since: date
    until: date # the last one

    @property
    def length(self) -> int: return (self.until - self.since).days + 1

    @property
    def before(self) -> "Span": return Span(self.since - timedelta(days=self.length), self.since - timedelta(days=1))

    def __contains__(self, day: object) -> bool: return isinstance(day, date) and self.since <= day <= self.until

    def of(self, column: str = "day") -> pl.Expr: return pl.col(column).is_between(self.since, self.until)

# ---- sums of the table ----------------------------------------------------------------------------------------------

def values(
    sums: pl.DataFrame, # with SUMS
) -> pl.DataFrame:      # and a column per figure; null where nothing is below the line
    "The figures of sums."
    share = lambda f: pl.when(pl.col(f.under) > 0).then(f.times*pl.col(f.over)/pl.col(f.under))
    return sums.with_columns(share(f).alias(f.name) for f in FIGURES.values() if f.under)

def added(
    kpis: pl.DataFrame, # rows of the table, of one dimension
    *by: str,           # columns; none is one row of all
) -> pl.DataFrame:      # `by`, days, SUMS and figures
    "Days added up."
    total = [pl.col(c).sum() for c in SUMS] + [pl.col("day").n_unique().alias("days")]
    return values(kpis.group_by(*by).agg(total).sort(*by) if by else kpis.select(total))

def last_complete(
    kpis: pl.DataFrame,
) -> date|None: # None when no day is complete
    return max(kpis.filter("complete")["day"], default=None)

def by_day(
    kpis: pl.DataFrame, # rows of one dimension and value
    figure: Figure,
) -> pl.DataFrame:      # day, y, low, high, complete
    "A figure by day, as it was counted."
    return kpis.select("day", y=figure.name, low=f"{figure.name}_low", high=f"{figure.name}_high", complete="complete").filter(pl.col("y").is_not_null()).sort("day")

# ---- the recount ----------------------------------------------------------------------------------------------------

NEEDED = ["ts", "user_id", "request_id", "surface", "source", "variant", "bundle", "rank", "segment", "click", "cart", "purchase", "units", "revenue", "unpriced", "order_ids"]

@st.cache_resource(ttl=KEEP_S, max_entries=4, show_spinner=False)
def _outcomes(
    root: str, snapshots: tuple[str, str], # of exposures and interactions: what the answer depends on
    since: date, until: date, window_h: float,
) -> pl.DataFrame: # exposures with what came of them
    from reco.monitoring.days import day_by_day, days_until, with_segment  # brings SciPy and numba, which take a second
    from reco.schemas import EXPOSURES, INTERACTIONS
    exposures, events = (lake().read(t, s) for t, s in zip(("exposures", "interactions"), snapshots, strict=True))
    window, last = timedelta(hours=window_h), datetime.combine(until, time(), UTC)
    parts = list(day_by_day(exposures, events, days_until(since, last), last + timedelta(days=1) + 2*window, window))
    if not parts:
        from reco.monitoring.credit import outcomes_of
        parts = [outcomes_of(EXPOSURES.empty(), INTERACTIONS.empty(), window)]
    return with_segment(pl.concat(parts), events).select(NEEDED)

def recountable(
    kpis: pl.DataFrame, # of all days, dimension ""
    *spans: Span,
) -> str: # why not; empty when it is
    "Whether intervals of several days can be had while somebody waits."
    if missing := [t for t in ("exposures", "interactions") if t not in tables()]: return f"the lake has no {' and no '.join(missing)}"
    n = kpis.filter(pl.any_horizontal(s.of() for s in spans))["exposures"].sum()
    return f"{n:,} exposures are too many to recount here" if n > MOST else ""

def outcomes(
    span: Span,
) -> pl.DataFrame:
    "The exposures of some days with what came of them; raises `LakeError`."
    there = lake()
    return _outcomes(settings().lake_root, (there.snapshot("exposures"), there.snapshot("interactions")), span.since, span.until, settings().kpis.window_hours)

@st.cache_resource(ttl=KEEP_S, max_entries=200, show_spinner=False)
def _recounted(root: str, snapshots: tuple[str, str], since: date, until: date, window_h: float, dimension: str, value: str|None, by: tuple[str, ...]) -> pl.DataFrame:
    from reco.monitoring.days import asked_by
    from reco.monitoring.kpis import kpi_table
    rows = asked_by(_outcomes(root, snapshots, since, until, window_h), dimension)
    if value is not None: rows = rows.filter(pl.col("value") == value)
    return kpi_table(rows, by) if rows.height else pl.DataFrame()

def recounted(
    span: Span,
    dimension: str = "",     # a question of `kpis_by_day`; empty: everything
    value: str|None = None,  # the answer; None: all answers
    *by: str,                # columns to compare by; `value` is the answer
) -> pl.DataFrame: # of `kpi_table`: one row, or one per `by`; empty when nothing was shown
    "Figures of several days with their intervals: shoppers are counted once, however many days they came. Raises `LakeError`."
    there = lake()
    snapshots = there.snapshot("exposures"), there.snapshot("interactions")
    return _recounted(settings().lake_root, snapshots, span.since, span.until, settings().kpis.window_hours, dimension, value, by)

# ---- changes --------------------------------------------------------------------------------------------------------

class Change(NamedTuple):
    "A figure of some days beside that of the days before."
    value: float|None
    low: float|None   # of the value, where an interval is known
    high: float|None
    before: float|None
    lift: float|None  # value/before - 1
    lift_low: float|None
    lift_high: float|None

    @property
    def clear(self) -> bool: # whether chance is ruled out
        return self.lift_low is not None and self.lift_high is not None and (self.lift_low > 0 or self.lift_high < 0)

def changed(
    name: str,          # of a figure
    now: dict,          # a row of `kpi_table`, or of `added`: then without intervals
    before: dict|None,  # the same of the days before; None where they are not all there
) -> Change:
    "The lift by reco's interval of a ratio. Shoppers of both times count as if they were others, which can only widen it."
    at: Callable[..., Any] = lambda row, end="": row.get(f"{name}{end}") if row else None
    a, b, lift_low, lift_high = at(now), at(before), None, None
    if a is not None and b is not None and at(now, "_high") is not None and at(before, "_high") is not None:
        from reco.experiments.readout import lift_interval  # brings SciPy
        variance = lambda row: ((at(row, "_high") - at(row))/Z)**2
        ends = lift_interval(a, variance(now), b, variance(before), Z)
        lift_low, lift_high = (None if e != e else e for e in ends) # NaN: it has no end
    return Change(a, at(now, "_low"), at(now, "_high"), b, a/b - 1 if a is not None and b else None, lift_low, lift_high)

# ---- who came back --------------------------------------------------------------------------------------------------

def returned(
    retention: pl.DataFrame, # rows of the table, of one split
    days: int,               # 1, 7 or 30 after the first
    span: Span,              # in which that day lies
) -> dict:                   # back, and its ends; the names that `changed` reads, empty when nobody's day was then
    "Of the shoppers whose N-th day lies in these days, the share that was there: cohorts are different shoppers, so they add up."
    rows = retention.filter((pl.col("cohort") + pl.duration(days=days)).is_between(span.since, span.until), pl.col(f"day_{days}").is_not_null())
    hits, of = int(rows[f"day_{days}"].sum()), int(rows["shoppers"].sum())
    if not of: return {}
    import numpy as np

    from reco.monitoring.returning import wilson  # brings SciPy
    low, high = (float(e[0]) for e in wilson(np.array([hits]), np.array([of])))
    return {"back": hits/of, "back_low": low, "back_high": high, "shoppers": of}

def weekly(
    retention: pl.DataFrame, # rows of the table, of one split
    days: tuple[int, ...] = (1, 7, 30),
) -> pl.DataFrame:           # week (its Monday), after, shoppers, back, share, low, high; those whose day is over
    "Cohorts by week of first sight."
    import numpy as np

    from reco.monitoring.returning import wilson
    parts = [retention.filter(pl.col(f"day_{d}").is_not_null()).group_by(week=pl.col("cohort").dt.truncate("1w"))
             .agg(after=pl.lit(d), shoppers=pl.col("shoppers").sum(), back=pl.col(f"day_{d}").sum()) for d in days]
    found = pl.concat(p.select("week", pl.col("after").cast(pl.Int32), pl.col("shoppers").cast(pl.Int64), pl.col("back").cast(pl.Int64)) for p in parts).sort("week", "after")
    low, high = wilson(found["back"].to_numpy().astype(np.int64), found["shoppers"].to_numpy().astype(np.int64))
    return found.with_columns(share=pl.col("back")/pl.col("shoppers"), low=pl.Series(low, dtype=pl.Float64), high=pl.Series(high, dtype=pl.Float64))

def kept(
    name: str, # kpis, variety, retention, readouts or what_ifs
) -> pl.DataFrame|None: # None when there is no such table yet
    "A whole table of the books: a year is a few thousand rows."
    return read(name) if name in tables() else None
