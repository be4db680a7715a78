"""Every training that MLflow knows of, with what it measured on its hold-out."""
import os
from datetime import UTC, datetime

import polars as pl
import streamlit as st

from app.parts.page import settings
from app.parts.quality import kept
from app.parts.quality.evaluation import number
from app.parts.quality.terms import MEASURES

AT_MOST = 200    # trainings, the latest
KEPT_S = 300     # an answer of MLflow's is good for so long: trainings are rare
COLUMNS: dict[str, pl.DataType|type[pl.DataType]] = {"at": pl.Datetime("ms", "UTC"), "asof": pl.Datetime("ms", "UTC"), "bundle": pl.String, "sha": pl.String,
    **{name: pl.Float64 for name in (*MEASURES, "low", "high", "popularity")}} # when it was told; what it knows; then of the pipeline on all requests

def moment(
    text: object, # ISO 8601
) -> datetime|None:
    "A moment of a tag or a manifest, in UTC; None for anything else."
    try: at = datetime.fromisoformat(str(text))
    except ValueError: return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)

def of_mlflow() -> tuple[pl.DataFrame, str]: # COLUMNS, oldest first; and what went wrong, empty when nothing did
    "The trainings that MLflow has."
    from reco.tracker import model_name, tracking_uri
    return _of_mlflow(tracking_uri(settings()), model_name(settings().project.name))

@st.cache_data(ttl=KEPT_S, show_spinner="Asking MLflow …")
def _of_mlflow(uri: str, name: str) -> tuple[pl.DataFrame, str]:
    from reco.tracker import TrackingError, asked, begun, environment, without_password
    empty = pl.DataFrame(schema=COLUMNS)
    if not begun(settings()): return empty, ""
    for variable, value in environment(settings()).items(): os.environ.setdefault(variable, value)
    try:
        with asked(f"[tracking] {without_password(uri)}"):
            from mlflow import MlflowClient
            client = MlflowClient(uri, uri)
            if (found := client.get_experiment_by_name(name)) is None: return empty, "" # looking makes nothing
            runs = client.search_runs([found.experiment_id], "tags.bundle_id LIKE '%'", order_by=["attributes.start_time DESC"], max_results=AT_MOST)
    except TrackingError as e: return empty, str(e)
    return pl.DataFrame([row(r.info.start_time, r.data.tags, r.data.metrics) for r in runs][::-1], schema=COLUMNS), ""

def row(
    at: int,             # ms
    tags: dict,
    metrics: dict,       # as `reco.tracking.metrics_of` names them
) -> dict:               # COLUMNS
    "One training."
    from reco.tracking import MEASURES as LONGER
    from reco.tracking import plain
    of = lambda system, m: number(metrics.get(plain(f"all/{system}/{LONGER.get(m, m)}")))
    return {"at": datetime.fromtimestamp(at/1000, UTC), "asof": moment(tags.get("asof")), "bundle": tags.get("bundle_id", ""), "sha": tags.get("git_sha", "")[:8],
            "popularity": of("popularity", "NDCG@10")} | {m: of("pipeline", m) for m in (*MEASURES, "low", "high")}

def of_bundles() -> pl.DataFrame: # COLUMNS, oldest first
    "The trainings whose bundles are still there, where MLflow cannot be asked."
    from reco.bundle import BundleError
    rows = []
    for name in kept.bundles()[::-1]:
        try: m = kept.manifest(name)
        except BundleError: continue
        whole = {r["system"]: r for r in m.get("metrics") or [] if isinstance(r, dict) and r.get("slice") == "all" and "system" in r}
        if "pipeline" not in whole: continue
        at = moment(m.get("asof"))
        rows.append({"at": at, "asof": at, "bundle": name, "sha": str(m.get("git_sha") or "")[:8], "popularity": number(whole.get("popularity", {}).get("NDCG@10"))}
                    | {c: number(whole["pipeline"].get(c)) for c in (*MEASURES, "low", "high")})
    return pl.DataFrame(rows, schema=COLUMNS)
