"""What every flow shares: settings, the code's version, the run record, and the parts of a card.

Import this before `metaflow`: it decides where the runs are kept.
"""
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from reco.aliases import told
from reco.data.lake import open_lake
from reco.data.scratch import Scratch
from reco.settings import Settings, SettingsError, load_settings

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
if SETTINGS.runs.datastore: # what runs keep goes to the S3 of [lake]; a variable that is set already counts more
    for name, value in ({"METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_DATASTORE_SYSROOT_S3": SETTINGS.runs.datastore.rstrip("/")}
                        | {"METAFLOW_S3_ENDPOINT_URL": SETTINGS.lake.endpoint, "AWS_DEFAULT_REGION": SETTINGS.lake.region}
                        | {"AWS_ACCESS_KEY_ID": SETTINGS.lake.access_key.get_secret_value(), "AWS_SECRET_ACCESS_KEY": SETTINGS.lake.secret_key.get_secret_value()}
                        | {"METAFLOW_S3_RETRY_COUNT": "2", "METAFLOW_S3_TRANSIENT_RETRY_COUNT": "4"}).items(): # an S3 that is away is said within a minute
        if value: os.environ.setdefault(name, value)
# Where `--with kubernetes` and `argo-workflows create` let the steps run.
os.environ.setdefault("METAFLOW_KUBERNETES_CONTAINER_IMAGE", SETTINGS.kubernetes.image)
os.environ.setdefault("METAFLOW_KUBERNETES_NAMESPACE", SETTINGS.kubernetes.namespace)
os.environ.setdefault("METAFLOW_KUBERNETES_SERVICE_ACCOUNT", SETTINGS.kubernetes.service_account)
os.environ.setdefault("METAFLOW_KUBERNETES_SECRETS", SETTINGS.kubernetes.secrets)
# Of these and of what a step asks for (flows/resources.py) the larger counts, and Metaflow's own are four gigabytes and more.
os.environ.setdefault("METAFLOW_KUBERNETES_CPU", "0.1")
os.environ.setdefault("METAFLOW_KUBERNETES_MEMORY", "256")
os.environ.setdefault("METAFLOW_KUBERNETES_DISK", "1024")

from metaflow import current
from metaflow.cards import Table, VegaChart

HERE = Path(__file__).resolve().parent
AT_ONCE = SETTINGS.train.workers or min(os.cpu_count() or 1, 3) # steps on one machine: Metaflow's own sixteen would want sixteen times the memory
os.environ.setdefault("METAFLOW_RUN_MAX_WORKERS", str(max(AT_ONCE, SETTINGS.search.workers)))
os.environ.setdefault("METAFLOW_RESUME_MAX_WORKERS", os.environ["METAFLOW_RUN_MAX_WORKERS"])
PROJECT = re.sub(r"[^a-z0-9_]+", "_", SETTINGS.project.name.lower()) # Metaflow takes no other letters


def run_record(settings: Settings, sha: str, inputs: dict[str, str], snapshots: dict[str, str],
               asof: datetime | None = None) -> dict:
    """What a run has to say to be repeated: code, settings, seed, moment, and what it read and wrote."""
    return {"project": PROJECT, "flow": current.flow_name, "run_id": current.run_id, "git_sha": sha,
            "seed": settings.project.seed, "asof": asof.isoformat() if asof else None, "inputs": inputs,
            "snapshots": snapshots, "settings": settings.model_dump(mode="json", exclude={"root"})}


def moment_of(text: str) -> datetime:
    """A moment from the command line; ends the run when it is none."""
    if not text: return datetime.now(UTC)
    try: at = datetime.fromisoformat(text)
    except ValueError as e: sys.exit(f"--asof {text}: {e}")
    if at.tzinfo is None: sys.exit(f"--asof {text}: a time zone is needed, such as +00:00")
    return at.astimezone(UTC)


class Watch:
    """Seconds of the parts of a step, in their order."""
    def __init__(self) -> None:
        self.at = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def done(self, part: str) -> None:
        """What passed since the last part ended belongs to this one."""
        now = time.perf_counter()
        self.seconds[part], self.at = round(now - self.at, 2), now


TABLES = "interactions", "catalog" # of the lake, that a model is made of


def read_shop(snapshots: dict[str, str]) -> "ShopData":
    """The lake's tables at the snapshots that a run began with, whatever has been written since."""
    from reco.data.shop import index_shop  # brings numba, which takes seconds
    lake = open_lake(SETTINGS)
    return index_shop(*(lake.read(t, snapshots[t]).collect() for t in TABLES))


def scratch(run: str) -> Scratch:
    """Where the steps of a run hand each other what is too large to be kept."""
    return Scratch(SETTINGS.lake_root, SETTINGS.lake, run)


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
