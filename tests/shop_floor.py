"""A shop to walk about in: an endpoint that takes events, with a store and a bus of its own, and the lake behind it."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import uvicorn

from app.contract import create_app
from app.keys import Keys
from app.ports import free_port
from app.serve import Replica, open_intake
from reco.bundle import ModelBundle
from reco.data.lake import Lake
from reco.features.store import open_store
from reco.redis_server import disconnect
from reco.schemas import CATALOG, INTERACTIONS, conform
from reco.settings import Settings

ODD = '<b>Pot</b> & *lid* $x$ :red[y] :material/home: [z](javascript:1) `c`'  # a title, a category and an id that are no markup


@contextmanager
def listening(app: object) -> Iterator[int]:
    """A port on which an ASGI app answers."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(0.01)
    try: yield port
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def open_shop(bundle: ModelBundle, settings: Settings, past: pl.DataFrame, keys: Keys | None = None) -> Iterator[tuple[int, Replica]]:
    """A port and the replica behind it; `settings.root` is a folder of its own."""
    replica = Replica()
    replica.bundle, replica.store, replica.intake = bundle, open_store(settings), open_intake(settings)
    replica.store.append(past)
    if keys: replica.keys = keys
    try:
        with listening(create_app(replica)) as port: yield port, replica
    finally:
        disconnect(replica.intake.producer.client)
        replica.store.close()


def stocked(root: Path, bundle: ModelBundle, past: pl.DataFrame) -> Path:
    """A lake with the bundle's items and some events. One item has an odd title, one is reduced, one is sold out."""
    start = datetime(2026, 3, 1, tzinfo=UTC)
    n = pl.int_range(pl.len())
    items = bundle.items.drop("title", "available", "discount", strict=False).with_columns(
        valid_from=pl.lit(start), category_path=pl.lit("Home / Tea"), title=pl.when(n == 0).then(pl.lit(ODD)).otherwise(pl.format("Tea cup {}", n)),
        discount=pl.when(n == 1).then(0.25).otherwise(0.0), price=pl.lit(40.0), available=n != 2)
    Lake(root).write("catalog", conform(items, CATALOG), key=["item_id", "valid_from"])
    Lake(root).write("interactions", conform(past, INTERACTIONS), key=["event_id"], day_of="ts")
    return root


def few_events(user_id: str, items: list[str]) -> pl.DataFrame:
    """Somebody viewed some items and bought the last."""
    start = datetime(2026, 3, 1, tzinfo=UTC)
    return pl.DataFrame([{"event_id": f"e{i}", "ts": start + timedelta(hours=i), "user_id": user_id, "item_id": x, "event": "view" if i < len(items) - 1 else "transaction"} for i, x in enumerate(items)])


def sleepy(seconds: float) -> object:
    """An ASGI app that takes its time for every answer."""
    async def answer(scope: dict, receive: object, send: object) -> None:
        await asyncio.sleep(seconds)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
    return answer
