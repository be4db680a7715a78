"""Small online stores for tests; light to import, for other processes do it too."""

from datetime import UTC, datetime

import numpy as np
import polars as pl

from reco.features.items import ITEM_FEATURES
from reco.features.store import OnlineStore, connect, wait_until_ready
from reco.schemas import INTERACTIONS, conform
from reco.settings import Settings

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
DAY_S = 86_400
ITEMS = [f"item{i}" for i in range(300)]


def named(place: Settings, prefix: str, max_history: int = 200) -> OnlineStore:
    """A store whose keys begin with a prefix, in the Redis of the settings."""
    store = OnlineStore(connect(place.online, place.root), prefix, max_history, DAY_S, DAY_S)
    wait_until_ready(store.client)
    return store


def log(rows: list[tuple[str, str, int, str, str]]) -> pl.DataFrame:
    """INTERACTIONS from (event_id, user_id, ms after noon, item_id, event)."""
    f = pl.DataFrame(rows, schema=["event_id", "user_id", "ms", "item_id", "event"], orient="row")
    f = f.cast({"ms": pl.Int64} | dict.fromkeys(["event_id", "user_id", "item_id", "event"], pl.String))
    return conform(f.with_columns(ts=pl.lit(NOON) + pl.duration(milliseconds="ms")), INTERACTIONS)


def views(user: str, n: int, start: int = 0, name: str = "") -> pl.DataFrame:
    """Views of one shopper, a millisecond apart, some ms after noon."""
    return log([(f"{user}{name}{i}", user, i, f"item{i % 7}", "view") for i in range(start, start + n)])


def put(store: OnlineStore, bundle_id: str, version: str, ids: list[str], value: float, asof: int = 10**15) -> None:
    """A version of rows, all of one value, active."""
    store.put_rows(version, ids, np.full((len(ids), len(ITEM_FEATURES)), value, np.float32))
    store.activate(bundle_id, version, asof)
