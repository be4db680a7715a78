"""From something that a shopper does to a list that knows it: POST /events/v1, then GET /recommendations/v1 until the list reflects the event.

A list reflects an event when its items are those of the pipeline in this process with the event in the shopper's past, in the same order, and
the list is not the one that was shown before. Items are chosen so that the two differ; what decides that is not timed. The clock runs from
before the event is sent until the first such list is there. The endpoint is started as in production, finished lists kept as its settings
say; one shopper after the other. What it leaves out: a network, and the way into the lake (`stream`).
"""

import argparse
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
import numpy as np
from starlette.testclient import TestClient

from app.contract import create_app
from app.serve import Replica, open_intake
from benchmarks.base import percentiles
from benchmarks.endpoint import Made, NotServed, path_of, reported, running, shop_arguments, shop_of
from reco.bundle import ModelBundle, load_bundle
from reco.features.items import ITEM_FEATURES
from reco.features.store import OnlineStore
from reco.pipeline import recommend
from reco.request import RecommendationRequest, UserEvent

K, TRIES = 10, 20  # lists asked for after an event, at most


@dataclass
class Seen:
    """Seconds, one of each per event."""

    taken: list[float]      # POST
    asked: list[float]      # the first GET after it
    reflected: list[float]  # from the event to the list that knows it
    later: int = 0          # events that the first list did not know yet


def listed(http: httpx.Client, user: str) -> list[tuple[str, float]]:
    """What is shown; raises `NotServed`."""
    answer = http.get(path_of(user, K))
    if answer.status_code != 200: raise NotServed(f"{answer.status_code}: {answer.text[:200]}")
    return [(x["item_id"], x["score"]) for x in answer.json()["recommendations"]]


def expected(bundle: ModelBundle, store: OnlineStore, user: str, event: UserEvent | None) -> list[tuple[str, float]]:
    """The pipeline's own list, here, with the event in the past whether the store has it or not."""
    events = [event] if event else []
    return [(x.item_id, x.score) for x in recommend(RecommendationRequest(user, K, None, events), bundle, store).items]


def ids(shown: list[tuple[str, float]]) -> list[str]:
    """Without scores, which move with the time of day."""
    return [item for item, _ in shown]


def telling(bundle: ModelBundle, store: OnlineStore, user: str, items: list[str]) -> UserEvent:
    """A view of now that changes the shopper's list; raises `NotServed` when none of the items does."""
    before = expected(bundle, store, user, None)
    for item in items:
        event = UserEvent(item, "view", datetime.now(UTC))
        time.sleep(0.002)  # what happens in the millisecond of the request is not before it
        if ids(expected(bundle, store, user, event)) != ids(before): return event
    raise NotServed(f"no view of {len(items)} items changes the list of {user}")


def one(http: httpx.Client, bundle: ModelBundle, store: OnlineStore, user: str, items: list[str], name: str, seen: Seen) -> None:
    """One event; raises `NotServed` when no list comes to know it."""
    before, event = listed(http, user), telling(bundle, store, user, items)
    event = UserEvent(event.item_id, event.event, datetime.now(UTC))
    body = {"event_id": name, "ts": round(event.ts.timestamp() * 1000), "user_id": user, "item_id": event.item_id, "event": event.event}
    began = time.perf_counter()
    answer = http.post("/events/v1", json=body)
    taken = time.perf_counter()
    if answer.status_code != 202: raise NotServed(f"{answer.status_code}: {answer.text[:200]}")
    for tries in range(TRIES):
        after = listed(http, user)
        now = time.perf_counter()
        if not tries: first = now
        if ids(after) != ids(before) and ids(after) == ids(expected(bundle, store, user, event)): break
    else: raise NotServed(f"{TRIES} lists of {user} did not know a view of {event.item_id}")
    seen.taken.append(taken - began)
    seen.asked.append(first - taken)
    seen.reflected.append(now - began)
    seen.later += tries > 0


def rows_of(http: httpx.Client, shop: Made, events: int, case: str) -> list[dict]:
    """Events of one shopper after the other; the first tenth warms up and is not counted."""
    bundle, store, seen = load_bundle(shop.bundle_folder()), shop.store(), Seen([], [], [])
    rng = np.random.default_rng(1)
    popular = np.argsort(-bundle.moment.per_item[: len(bundle.ids), list(ITEM_FEATURES).index("item_users_30d")], kind="stable")[:500]
    names, run = bundle.ids.external(popular), time.time_ns()
    for n in range(events): one(http, bundle, store, shop.users[n % len(shop.users)], rng.choice(names, 20).tolist(), f"fresh {run} {n}", seen)
    store.close()
    warm = events // 10
    whole = percentiles(seen.reflected[warm:]) | {"first_list_knew_it": round(1 - seen.later / events, 4)}
    parts = {"POST /events/v1: durable, 202": seen.taken, "the list after it": seen.asked}
    return [{"system": "reco", "case": f"event to list, {case}", "metrics": whole},
            *({"system": "reco", "case": f"{part}, {case}", "metrics": percentiles(t[warm:])} for part, t in parts.items())]


def through_the_app(shop: Made, events: int) -> list[dict]:
    """Without Ray and network, for the smoke run."""
    replica = Replica()
    replica.bundle, replica.store, replica.intake = load_bundle(shop.bundle_folder()), shop.store(), open_intake(shop.settings())
    rows = rows_of(TestClient(create_app(replica)), shop, events, "app, no network")
    replica.store.close()
    return rows


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = shop_arguments(__doc__)
    parser.add_argument("--asking", type=int, default=1_000, help="events that are sent, each by another shopper")
    return parser


def measured(args: argparse.Namespace) -> list[dict]:
    """Make the shop, start the endpoint, send events."""
    with shop_of(args, args.asking) as shop:
        if args.quick: return through_the_app(shop, 20)
        with running(shop) as endpoint, httpx.Client(base_url=endpoint.url, timeout=10, trust_env=False) as http:
            return rows_of(http, shop, args.asking, f"HTTP, {args.items:,} items")


if __name__ == "__main__": sys.exit(reported("p2_freshness", parser().parse_args(), measured))
