"""What a daily run found, as a file of figures for Prometheus: node_exporter's textfile collector reads it."""
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import cast

import polars as pl
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from reco.monitoring.decision import moved

REASONS = "drift", "conversion", "age"  # what may ask for a retrain, as a label
FIGURES = {  # of `figures` in reco.monitoring.facts → name and meaning here
    "events a day": ("events_per_day", "Events per day"), "shoppers a window": ("shoppers_per_window", "Shoppers in a window of [monitor] days"),
    "items": ("items", "Items of the catalogue"), "share of events of unknown items": ("unknown_item_events_ratio", "Share of events whose item is not in the catalogue"),
    "share of items in stock": ("items_in_stock_ratio", "Share of items that can be bought"), "share of new items": ("new_items_ratio", "Share of items that came within the window"),
    "coverage of the lists": ("list_coverage_ratio", "Share of the catalogue that the champion's lists show")}

SKEW = {  # of `skew_figures` in reco.monitoring.skew → name and meaning here
    "requests": ("requests", "Logged requests that were answered again"), "different": ("score_ratio", "Share of their items whose score is another one, or that are no candidates"),
    "absent": ("absent_items_ratio", "Share of their items that are not on the list now"), "same_lists": ("same_lists_ratio", "Share of the lists that are the same, item by item"),
    "agreement": ("order_ratio", "Share of the pairs of items on both lists that stand in the same order")}

KPIS = {  # column of `kpi_table` in reco.monitoring.kpis → name and meaning here
    "CTR": ("ctr_ratio", "Exposures that were clicked, of all"), "cart_rate": ("cart_ratio", "Clicked exposures whose item was then put in the cart"),
    "CVR": ("cvr_ratio", "Clicked exposures whose item was then bought"), "AOV": ("order_value", "What the lists' items brought in an order, in the shop's currency"),
    "revenue_per_1000": ("revenue_per_1000_exposures", "Revenue by a thousand exposures, in the shop's currency"), "exposures": ("exposures", "Exposures")}

VARIETY = {  # column of `variety_by_day` in reco.monitoring.days → name and meaning here
    "coverage": ("coverage_ratio", "Share of the catalogue that was shown"), "tail": ("tail_ratio", "Exposures of items outside the most popular fifth, of all"),
    "new": ("new_ratio", "Exposures of new items, of all"), "novelty": ("novelty", "Mean of what a shown item tells of itself, in bits: one for an item that half of the shoppers touched")}


def reason_of(name: str) -> str:
    """The label of a reason's name: drift of events.price is drift."""
    return "conversion" if name.startswith("fall of ") else "age" if name.startswith("age ") else "drift"


def figures_of_day(now: datetime, drift: pl.DataFrame, deciding: pl.DataFrame, limits: tuple[float, float], reasons: pl.DataFrame, retrain: bool,
                   figures: pl.DataFrame, daily: pl.DataFrame, skew: tuple[dict[str, float], dict[str, int], float] | None = None) -> CollectorRegistry:
    """Drift by table, the verdict, the shop's figures and the skew; what has no value is not there. `limits` are [monitor] psi and chance, `skew` what was found, what was excluded, and [monitor] skew."""
    registry = CollectorRegistry()
    gauge = lambda name, about, labels=(): Gauge(f"reco_{name}", about, labels, registry=registry)
    gauge("monitor_timestamp_seconds", "The moment from which the run looked back").set(now.timestamp())
    psi, excess = (gauge(f"drift_{n}", f"{about}, the largest of a table's columns", ["table"]) for n, about in
                   (("psi", "Population stability index"), ("excess_psi", "Population stability index beyond what chance explains")))
    beyond, surely = gauge("drift_columns_moved", "Columns beyond the limit and beyond chance, of those that may ask for a retrain", ["table"]), moved(deciding, *limits)
    for table, of in drift.filter(pl.col("psi").is_not_null()).group_by("table", maintain_order=True):
        psi.labels(*table).set(cast(float, of["psi"].max()))
        excess.labels(*table).set(cast(float, of["excess"].max()))
        beyond.labels(*table).set(surely.filter(pl.col("table") == table[0]).height)
    gauge("drift_limit_psi", "The limit of the excess, [monitor] psi").set(limits[0])
    gauge("retrain_verdict", "Whether the run found that the champion should be trained anew").set(retrain)
    speaks = gauge("retrain_reason", "Whether this speaks for it", ["reason"])
    asking = {reason_of(n) for n in reasons.filter("asks")["name"]}
    for r in REASONS: speaks.labels(r).set(r in asking)
    shop_figures(gauge, figures, daily.filter(pl.col("day") < now.date()))
    if skew: skew_gauges(gauge, *skew)
    return registry


def skew_gauges(gauge, found: dict[str, float], excluded: dict[str, int], limit: float) -> None:
    """What came of answering logged requests again, and how many lists could not be."""
    for name, (short, about) in SKEW.items():
        if (value := found.get(name)) is not None: gauge(f"skew_{short}", about).set(value)
    gauge("skew_limit_ratio", "The limit of the share of items with another score, [monitor] skew").set(limit)
    left = gauge("skew_excluded_lists", "Lists that cannot be made again", ["reason"])
    for reason, n in excluded.items(): left.labels(reason).set(n)


def shop_figures(gauge, figures: pl.DataFrame, daily: pl.DataFrame) -> None:
    """How much there was, in the champion's time and lately; the share of visits with a purchase, of the last day that had visits."""
    for name, before, now in figures.iter_rows():
        short, about = FIGURES[name]
        one = gauge(f"shop_{short}", about, ["period"])
        for period, value in (("reference", before), ("recent", now)):
            if value is not None: one.labels(period).set(value)
    last = daily.filter(pl.col("n") > 0, pl.col("value").is_finite()).sort("day").tail(1)
    for day, value, n in last.select("day", "value", "n").iter_rows():
        gauge("kpi_visit_conversion_ratio", "Share of a day's visits in which something was bought").set(value)
        gauge("kpi_visit_conversion_visits", "Visits of that day").set(n)
        gauge("kpi_visit_conversion_timestamp_seconds", "The end of that day").set(midnight_after(day))


def figures_of_lists(now: datetime, kpis: pl.DataFrame, varied: pl.DataFrame, wait: timedelta) -> CollectorRegistry:
    """What the lists of a day earned and how varied they were, by surface and in all: of the last day whose purchases are complete, `wait` after its end."""
    registry = CollectorRegistry()
    gauge = lambda name, about, labels=(): Gauge(f"reco_kpi_{name}", about, labels, registry=registry)
    gauge("lists_timestamp_seconds", "The moment from which the run looked back").set(now.timestamp())
    over = pl.col("day") < (now - wait).date()
    by_surface = pl.col("dimension").is_in(("", "surface"))
    last = kpis.filter(over, by_surface, pl.col("day") == pl.col("day").filter(over).max())
    if last.height: gauge("lists_day_timestamp_seconds", "The end of the day that was counted").set(midnight_after(last["day"][0]))
    shown = varied.filter(by_surface, pl.col("day").is_in(last["day"].unique().implode()))
    for of, names in ((last, KPIS), (shown, VARIETY)):
        for column, (name, about) in names.items():
            one = gauge(name, about, ["surface"])
            for surface, value in of.select("value", column).iter_rows():
                if value is not None: one.labels(surface or "all").set(value)
    return registry


def midnight_after(day: date) -> float:
    """The end of a day, in seconds since 1970."""
    return datetime.combine(day + timedelta(days=1), time(), UTC).timestamp()


def write_figures(path: Path, registry: CollectorRegistry) -> str:
    """Write the file whole or not at all; what went wrong, or nothing: figures are no reason to end a run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to_textfile(str(path), registry)
        path.chmod(0o644)  # node_exporter is another account
    except OSError as e: return f"{type(e).__name__}: {e}"
    return ""
