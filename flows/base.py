"""What every flow shares: settings, the code's version, the run record, and the parts of a card.

Import this before `metaflow`: it decides where the runs are kept.
"""
import os
import re
import sys
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from reco.data.lake import open_lake
from reco.settings import Settings, SettingsError, load_settings
from reco.tracking import told

if TYPE_CHECKING:
    from reco.data.shop import ShopData
    from reco.reranking.rulebook import RuleBook

try: SETTINGS: Settings = load_settings()
except SettingsError as e: sys.exit(f"settings: {e}")

# Else Metaflow keeps runs and cards in whichever parent folder has a `.metaflow`, and wants a user name.
os.environ.setdefault("METAFLOW_DATASTORE_SYSROOT_LOCAL", str(SETTINGS.root.resolve()))
os.environ.setdefault("METAFLOW_CARD_LOCALROOT", str(SETTINGS.root.resolve()/".metaflow"/"mf.cards"))
if not {os.environ.get(v) for v in ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER")} - {None, "", "root"}:
    os.environ["METAFLOW_USER"] = "reco" # Metaflow refuses root, which is who one is in a container

from metaflow import current
from metaflow.cards import Table, VegaChart

HERE = Path(__file__).resolve().parent
PROJECT = re.sub(r"[^a-z0-9_]+", "_", SETTINGS.project.name.lower()) # Metaflow takes no other letters


def run_record(settings: Settings, sha: str, inputs: dict[str, str], snapshots: dict[str, str],
               asof: datetime | None = None) -> dict:
    """What a run has to say to be repeated: code, settings, seed, moment, and what it read and wrote."""
    return {"project": PROJECT, "flow": current.flow_name, "run_id": current.run_id, "git_sha": sha,
            "seed": settings.project.seed, "asof": asof.isoformat() if asof else None, "inputs": inputs,
            "snapshots": snapshots, "settings": settings.model_dump(mode="json", exclude={"root"})}


TABLES = "interactions", "catalog" # of the lake, that a model is made of


def read_shop(snapshots: dict[str, str]) -> "ShopData":
    """The lake's tables at the snapshots that a run began with, whatever has been written since."""
    from reco.data.shop import index_shop  # brings numba, which takes seconds
    lake = open_lake(SETTINGS)
    return index_shop(*(lake.read(t, snapshots[t]).collect() for t in TABLES))


def rule_book() -> "RuleBook":
    """The rules file of the settings; a bad one ends the run with what is wrong in it."""
    from reco.reranking.rulebook import RuleError, read_rules
    try: return read_rules(SETTINGS.path(SETTINGS.rules.file) if SETTINGS.rules.file else None)
    except RuleError as e: sys.exit(f"rules: {e}")


def tell_mlflow(act: Callable[[], object]) -> None:
    """MLflow never decides: what goes wrong there is said, and the run goes on."""
    if trouble := told(SETTINGS, act): print(f"warning: {trouble}", file=sys.stderr)


def _shown(value: object) -> str:
    if isinstance(value, datetime): return f"{value:%Y-%m-%d %H:%M}"
    if value is None: return ""
    if isinstance(value, float): return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def card_table(frame: pl.DataFrame) -> Table:
    """A frame as a card's table."""
    return Table([[_shown(v) for v in row] for row in frame.iter_rows()], headers=frame.columns)


def card_lines(frame: pl.DataFrame, x: str, y: str, color: str, log: bool = False) -> VegaChart:
    """Lines of `y` over `x`, one per `color`."""
    days = isinstance(frame.schema[x], pl.Date | pl.Datetime)
    values = [{k: v.isoformat() if isinstance(v, date) else v for k, v in row.items()}
              for row in frame.iter_rows(named=True)]
    return VegaChart({
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json", "width": 560, "height": 220,
        "data": {"values": values}, "mark": "line", "encoding": {
            "x": {"field": x, "type": "temporal" if days else "quantitative"},
            "y": {"field": y, "type": "quantitative", "scale": {"type": "symlog" if log else "linear"}},
            "color": {"field": color, "type": "nominal"}}})
