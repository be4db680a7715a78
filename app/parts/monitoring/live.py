"""What the endpoint does now: its `/metrics` looked at again and again, and the difference between two looks."""
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import streamlit as st
from prometheus_client.parser import text_string_to_metric_families

Counts = dict[tuple[str, tuple[tuple[str, str], ...]], float] # name of a sample and its sorted labels → value

LISTS = "/recommendations/", "/similar/", "/bought-together/" # routes that shoppers wait for
SHOP = (*LISTS, "/events/", "/items/")                        # and those by which the shop tells something; what operators ask is not traffic
KEEP_S, MOST = 900, 1_000 # looks are kept so long, and so many at most

@dataclass(frozen=True)
class Look:
    "All of reco's figures at a moment."
    at: float # seconds, of `time.time`
    counts: Counts = field(repr=False)

def counts_of(
    text: str,   # Prometheus' text format
) -> Counts:     # raises `ValueError` for something else
    "The samples of the endpoint."
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in text_string_to_metric_families(text) if family.name.startswith("reco_")
            for s in family.samples if not s.name.endswith("_created")}

def between(
    a: Look, b: Look, # the earlier one first
) -> Counts|None: # None when the endpoint was started anew in between
    "What was added."
    made = {key: b.counts[key] - a.counts.get(key, 0.0) for key in b.counts if not key[0].endswith("_seconds")} # gauges are moments: they are not added up
    return None if any(x < 0 for x in made.values()) or any(key not in b.counts for key in a.counts if key[0].endswith("_total")) else made

def total(
    counts: Counts,
    name: str,                     # of a sample
    routes: tuple[str, ...] = (),  # beginnings of the label `route`; none is all
    **labels: str,
) -> float:
    "The sum over whatever is not named."
    return sum(v for (n, ls), v in counts.items() if n == name and labels.items() <= (d := dict(ls)).items() and (not routes or d.get("route", "").startswith(routes)))

def by(
    counts: Counts,
    name: str,
    label: str,
    **labels: str,
) -> dict[str, float]: # value of the label → sum, those above 0
    "The sum by a label."
    out: dict[str, float] = {}
    for (n, ls), v in counts.items():
        d = dict(ls)
        if n == name and label in d and labels.items() <= d.items(): out[d[label]] = out.get(d[label], 0.0) + v
    return {k: v for k, v in out.items() if v > 0}

def quantile(
    counts: Counts,
    name: str,  # of a histogram
    q: float,   # 0 to 1
    routes: tuple[str, ...] = (),
    **labels: str,
) -> float|None: # None when nothing was observed
    "A quantile as Prometheus' histogram_quantile gives it: straight lines within a bucket, and no more than the last limit."
    at: dict[float, float] = {}
    for (sample, ls), v in counts.items():
        d = dict(ls)
        if sample == f"{name}_bucket" and labels.items() <= d.items() and (not routes or d.get("route", "").startswith(routes)): at[float(d["le"])] = at.get(float(d["le"]), 0.0) + v
    limits = sorted(at)
    if not limits or not (n := at[limits[-1]]): return None
    low, below = 0.0, 0.0
    for limit in limits:
        if at[limit] >= q*n and at[limit] > below: return low if limit == float("inf") else low + (limit - low)*(q*n - below)/(at[limit] - below)
        low, below = limit if limit != float("inf") else low, at[limit]
    return low

# ---- what a page shows ----------------------------------------------------------------------------------------------

class Traffic(NamedTuple):
    "What was answered in some seconds."
    seconds: float           # 0: since the endpoint began, which is not known
    requests: float          # of the shop
    failed: float            # answered with 5xx
    refused: float           # with 4xx
    p50: float|None          # seconds, of lists
    p95: float|None
    p99: float|None
    lists: float
    cached: float            # shares of the lists, 0 to 1
    fallback: float
    degraded: float
    short: float

    @property
    def rate(self) -> float: return self.requests/self.seconds if self.seconds else 0.0

def traffic(
    counts: Counts, # of `between`, or of a look
    seconds: float,
) -> Traffic:
    "The figures that say whether shoppers are served well."
    statuses = [(dict(ls), v) for (n, ls), v in counts.items() if n == "reco_http_requests_total"]
    of = lambda first: sum(v for d, v in statuses if d["route"].startswith(SHOP) and d["status"].startswith(first))
    lists = total(counts, "reco_lists_total")
    share = lambda name, **labels: total(counts, name, **labels)/lists if lists else 0.0
    p50, p95, p99 = (quantile(counts, "reco_http_request_seconds", q, LISTS) for q in (0.5, 0.95, 0.99))
    return Traffic(seconds, of(""), of("5"), of("4"), p50, p95, p99, lists,
                   share("reco_lists_from_cache_total"), share("reco_lists_total", fallback="true"), share("reco_lists_total", degraded="true"), share("reco_short_lists_total"))

def proposed(counts: Counts) -> dict[str, float]: # source → candidates per list that was made anew
    made = total(counts, "reco_lists_total") - total(counts, "reco_lists_from_cache_total")
    return {s: n/made for s, n in by(counts, "reco_candidates_total", "source").items()} if made > 0 else {}

def stages(counts: Counts) -> dict[str, tuple[float, float|None]]: # stage → mean seconds and p95, in the order of the work
    order = ("store", "past", "candidates", "features", "ranking", "reranking", "response")
    n, sums = by(counts, "reco_stage_seconds_count", "stage"), by(counts, "reco_stage_seconds_sum", "stage")
    return {s: (sums.get(s, 0.0)/n[s], quantile(counts, "reco_stage_seconds", 0.95, stage=s)) for s in order if n.get(s)}

class Looks:
    "The last looks at one endpoint, shared by everybody who watches."
    def __init__(self) -> None: self._looks, self._turn = deque[Look](maxlen=MOST), threading.Lock()

    def add(self,
        look: Look,
    ) -> None:
        "Keep a look; what was before a restart of the endpoint is forgotten, and so is what is old."
        with self._turn:
            if self._looks and look.at <= self._looks[-1].at: return
            if self._looks and between(self._looks[-1], look) is None: self._looks.clear()
            self._looks.append(look)
            while look.at - self._looks[0].at > KEEP_S: self._looks.popleft()

    def age(self, now: float) -> float: # seconds since the last look
        with self._turn: return now - self._looks[-1].at if self._looks else float("inf")

    def last(self) -> Look|None:
        with self._turn: return self._looks[-1] if self._looks else None

    def over(self,
        seconds: float,
    ) -> Traffic|None: # None before the second look
        "What happened in the last seconds, or since the first look."
        found = self.added(seconds)
        return traffic(*found) if found else None

    def added(self, seconds: float) -> tuple[Counts, float]|None: # and in how many seconds
        with self._turn: looks = list(self._looks)
        if len(looks) < 2: return None
        first = next((k for k in reversed(looks[:-1]) if looks[-1].at - k.at >= seconds), looks[0])
        return between(first, looks[-1]) or {}, looks[-1].at - first.at

    def series(self,
        step_s: float,
    ) -> list[tuple[float, Traffic]]: # when it ended; oldest first
        "Traffic of one stretch after the other."
        with self._turn: looks = list(self._looks)
        if not looks: return []
        out, first = [], looks[0]
        for look in looks[1:]:
            if look.at - first.at >= step_s:
                out.append((look.at, traffic(between(first, look) or {}, look.at - first.at)))
                first = look
        return out

@st.cache_resource(show_spinner=False)
def looks(address: str) -> Looks: return Looks() # noqa: ARG001 (one for each endpoint)

def watched(
    address: str,
    metrics: Callable[[], str], # asks for the figures
    least_s: float = 1.0, # between two looks
) -> Looks:
    "Look once more, unless somebody just did; raises as the client does."
    seen, now = looks(address), time.time()
    if seen.age(now) >= least_s:
        text = metrics()
        seen.add(Look(now, counts_of(text)))
    return seen
