"""What the endpoint counts, for Prometheus. The replicas of one machine write into one folder, and any of them answers for all."""
import functools
import os
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reco.request import RecommendationResponse
from reco.stages import STAGES

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # of prometheus_client: where several processes write their figures
SECONDS = (.0005, .001, .002, .003, .005, .0075, .01, .02, .05, .1, .25, .5, 1, 2.5)
STAGE_SECONDS = (.00005, .0001, .00025, .0005, .001, .002, .003, .005, .01, .02, .05, .1, .25, .5)


class Meter:
    "The figures of a replica. No label takes a value that a caller can choose."
    def __init__(self) -> None:
        if folder := os.environ.get(FOLDER): os.makedirs(folder, exist_ok=True) # on a cluster nobody has made it yet
        self.registry = CollectorRegistry()
        make = lambda kind, name, about, labels=(), **more: kind(f"reco_{name}", about, labels, registry=self.registry, **more)
        self.requests = make(Counter, "http_requests", "Requests answered", ["route", "status"])
        self.seconds = make(Histogram, "http_request_seconds", "From the request to the end of its answer", ["route"], buckets=SECONDS)
        self.lists = make(Counter, "lists", "Lists of recommendations", ["surface", "fallback", "degraded"])
        stages = make(Histogram, "stage_seconds", "A stage of making a list; store alone for a list that was made for an earlier request", ["stage"], buckets=STAGE_SECONDS)
        self.stages = {s: stages.labels(s) for s in STAGES} # looking a label up takes as long as counting
        self.candidates = make(Counter, "candidates", "Items that a candidate source proposed for a list", ["source"])
        self.source = functools.cache(self.candidates.labels)
        self.kept = make(Counter, "lists_from_cache", "Lists that were made for an earlier request; the others were made anew", ["surface"])
        self.without = make(Counter, "done_without", "Lists that were made without something that failed or was late", ["what"])
        self.short = make(Counter, "short_lists", "Lists with fewer items than were asked for", ["surface"])
        self.without_variant = make(Counter, "lists_without_variant", "Lists of an experiment that the champion made because the variant's bundle was not there")
        self.lost = make(Counter, "lists_not_written_down", "Lists that were answered and are missing in the serve log")
        self.dropped = make(Counter, "dropped_items", "Candidates that a rule left out", ["rule"])
        self.events = make(Counter, "events_accepted", "Events that were made durable")
        self.items = make(Counter, "items_changed", "Changes of items that the shop sent and that changed something")
        self.refused = make(Counter, "bundles_refused", "Published bundles that were not taken into service")
        self.asof = make(Gauge, "bundle_asof_timestamp_seconds", "The moment before which the model learned", multiprocess_mode="mostrecent")

    def shown(self,
        surface: str,
        k: int,                        # that were asked for
        found: RecommendationResponse,
    ) -> None:
        "Count a list."
        self.lists.labels(surface, str(found.fallback).lower(), str(found.degraded).lower()).inc()
        if found.kept: self.kept.labels(surface).inc()
        for what in found.without: self.without.labels(what).inc()
        if len(found.items) < k: self.short.labels(surface).inc()
        for rule, n in found.dropped.items(): self.dropped.labels(rule).inc(n)
        for stage, seconds in found.seconds.items(): self.stages[stage].observe(seconds)
        for source, n in found.proposed.items(): self.source(source).inc(n)

    def text(self) -> bytes: # in Prometheus' format
        "All figures, of all replicas of this machine where they share a folder."
        if not os.environ.get(FOLDER): return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)


class Metered:
    "An ASGI app whose requests are counted and timed by the route that answered, not by their path."
    def __init__(self, app: ASGIApp, meter: Meter):
        self.app, self.meter = app, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http": return await self.app(scope, receive, send)
        began, ended, status = time.perf_counter(), 0.0, 500

        async def noting(message: Message) -> None: # what is done once the answer is sent, nobody waits for
            nonlocal status, ended
            if message["type"] == "http.response.start": status = message["status"]
            await send(message)
            ended = time.perf_counter()
        try: await self.app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.meter.requests.labels(route, str(status)).inc()
            self.meter.seconds.labels(route).observe((ended or time.perf_counter()) - began)
