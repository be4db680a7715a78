"""The serve log of a replica: what was asked and answered, on its way to the bus. `reco.data.serve_log` says what is promised."""
from collections.abc import Callable
from typing import NamedTuple

from reco.data.bus import open_producer
from reco.data.serve_log import ServeLog
from reco.data.served import lists_section
from reco.features.store import open_store
from reco.request import RecommendationRequest, RecommendationResponse
from reco.settings import Settings

CALL_S, ROOM_S = 2, 0.5  # the thread that sends waits so long for an answer of the bus, and for room on it


class Shown(NamedTuple):
    "A list, as it was answered."
    asked: RecommendationRequest
    found: RecommendationResponse
    ts: int              # ms since 1970
    latency_ms: float


def as_list(
    shown: Shown,
) -> dict:        # a ServedList
    "The record of it."
    asked, found = shown.asked, shown.found
    return {"request_id": asked.request_id, "ts": shown.ts, "user_id": asked.user_id, "surface": asked.surface, "bundle": found.bundle_id,
            "variant": found.variant, "fallback": found.fallback, "latency_ms": shown.latency_ms, "items": [i._asdict() for i in found.items]}


def open_log(
    settings: Settings,           # [served], [stream]
    lost: Callable[[int], object],  # told how many lists were lost
) -> ServeLog[Shown] | None:      # None where lists are not written down
    "Where lists go; raises `BusError` for an address that cannot be one."
    if not settings.served.on: return None
    client = open_store(settings, CALL_S).client
    return ServeLog(open_producer(lists_section(settings.stream, settings.served), client, ROOM_S), as_list, lost, settings.served.max_in_memory)
