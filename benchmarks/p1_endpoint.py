"""One list for a known shopper, whole pipeline: alone in a process, then over HTTP beside a handler that does nothing in the same Ray Serve.

In-process with the quotas of the settings, and with larger ones for 300 candidates. The endpoint is started as in production (`python -m
app.serve`: HAProxy, both speed switches, an embedded Redis with everybody's past): with each list made anew, the same without the serve log,
and with finished lists kept, for everybody and for a few who come again and again. The serve log, which writes every list down once its answer is sent, is also turned on and off in one process, turn
and turn about, without a pause between two requests: nothing is left over for it and the thread that sends. Load is wrk's, closed loop, turn and
turn about with the handler that does nothing, on the same machine. The shop is simulated. What it leaves out: a network, more replicas than one,
and shoppers who do something between two requests (`p2_freshness`).
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import polars as pl
import psutil
from starlette.testclient import TestClient

from app.contract import create_app
from app.serve import Replica
from app.shown import Shown, open_log
from benchmarks.base import percentiles
from benchmarks.endpoint import (
    NOTHING,
    Made,
    NotServed,
    figures,
    nothing,
    path_of,
    reported,
    running,
    shop_arguments,
    shop_of,
    wrk,
)
from benchmarks.pipeline import measure
from reco.bundle import ModelBundle, load_bundle, save_bundle
from reco.candidates.base import CandidateSource
from reco.data.served import lists_section
from reco.features.store import OnlineStore, Past
from reco.moment import ranker_rows
from reco.pipeline import recommend
from reco.request import RecommendationRequest, UserEvent, request_history
from reco.schemas import EVENTS

CONNECTIONS = 1, 8, 32
ROUNDS = 3   # turns of each system at each number of connections
K = 10
CANDIDATES = 300
FEW = 50     # shoppers whose kept lists outlast the run


def peak_mb() -> float:
    """Of this process since it was started; what it was forked from does not count."""
    try: return next(int(x.split()[1]) / 1024 for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    except FileNotFoundError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rss_mb() -> float:
    """Of this process now."""
    return psutil.Process().memory_info().rss / 2**20


def mapped_mb() -> float:
    """Of that the pages of files: replicas of one machine share them, and the system takes them back where memory is short."""
    return psutil.Process().memory_info().shared / 2**20


def row(system: str, case: str, metrics: dict[str, float]) -> dict:
    """One line of the table."""
    return {"system": system, "case": case, "metrics": metrics}


def candidates_of(bundle: ModelBundle, store: OnlineStore, users: list[str]) -> float:
    """Candidates per request, on average."""
    moment, past = bundle.moment, lambda u: request_history(RecommendationRequest(u, K), bundle, Past.of(store.events(u)))
    return float(np.mean([len(ranker_rows(moment, past(u))[0].item) for u in users]))


def with_more(bundle: ModelBundle, store: OnlineStore, users: list[str]) -> ModelBundle:
    """The bundle with larger quotas, for about `CANDIDATES` a request: in a simulated shop the sources agree more than in a real one."""
    quotas = bundle.moment.quotas
    for factor in np.arange(1, 6, 0.25):
        more = replace(bundle, moment=replace(bundle.moment, quotas={n: round(q * factor) for n, q in quotas.items()}))
        if candidates_of(more, store, users) >= CANDIDATES: break
    return more


def one_by_one(bundle: ModelBundle, store: OnlineStore | None, asked: list[RecommendationRequest]) -> dict[str, float]:
    """Times of single requests, and the CPU that one took in this process: what a busy machine does not change so much."""
    began = time.process_time()
    times = percentiles(measure(lambda r: recommend(r, bundle, store), asked))
    return times | {"cpu_ms": round(1000 * (time.process_time() - began) / len(asked), 3)}


def alone(shop: Made, n: int) -> list[dict]:
    """The pipeline and its memory, in the process that calls."""
    before, files = rss_mb(), mapped_mb()
    bundle, store = load_bundle(shop.bundle_folder()), shop.store()
    asked = [RecommendationRequest(u, K) for u in (shop.users * (n // len(shop.users) + 1))[:n]]
    for r in asked[:20]: recommend(r, bundle, store)
    state, shared, peak, size = max(0.0, rss_mb() - before), max(0.0, mapped_mb() - files), peak_mb(), len(bundle.ids)
    rows, few = [], shop.users[:100]
    for served in (bundle, with_more(bundle, store, few)):
        case = f"in-process, one thread, {size:,} items, {candidates_of(served, store, few):.0f} candidates, {shop.trees} trees"
        rows.append(row("reco", case, one_by_one(served, store, asked)))
    rows += [row("reco", "in-process, strangers, no store", one_by_one(bundle, None, [replace(r, user_id=None) for r in asked])),
             row("reco", f"memory of the loaded bundle, {size:,} items", {"state_mb": round(state, 1), "of_files_mb": round(shared, 1), "state_mb_100k": round(state * 1e5 / size, 1),
                                                                      "peak_mb": round(peak, 1)})]
    if store.breaker.unanswered: raise NotServed(f"the online store left {store.breaker.unanswered} questions without an answer")
    store.close()
    return rows


TURN = 1_000  # requests before the serve log is turned on or off: seconds, in which the thread that sends gets its quarter-second rounds


def noting(shop: Made, n: int) -> list[dict]:
    """What the serve log takes from the answers: a request as the contract handles it, lists written down or not, turn and turn about."""
    bundle, store, settings, lost = load_bundle(shop.bundle_folder()), shop.store(), shop.settings(), []
    log, seconds, cpu_s = open_log(settings, lost.append), {True: [], False: []}, {True: 0.0, False: 0.0}
    topic, asked = lists_section(settings.stream, settings.served).topic, [RecommendationRequest(u, K) for u in (shop.users * (n // len(shop.users) + 1))[:n]]

    def answer(request: RecommendationRequest, on: bool) -> float:
        began = time.perf_counter()
        found = recommend(request, bundle, store)
        took = time.perf_counter() - began
        if on: log.note(Shown(request, found, time.time_ns() // 1_000_000, 1000 * took))  # as the contract does it: when the answer is sent
        return took
    for request in asked[:20]: answer(request, False)
    before, noted = store.client.xlen(topic), 0
    for k in range(0, n, TURN):
        for on in (True, False) if k // TURN % 2 else (False, True):
            some = [replace(r, request_id=f"{k}-{i}") for i, r in enumerate(asked[k:k + TURN])]
            busy = time.process_time()
            seconds[on] += [answer(r, on) for r in some]
            if on: noted += len(some)
            log.flush()  # what a turn leaves over is not the next one's to bear
            cpu_s[on] += time.process_time() - busy  # of all threads: what a busy machine does not change so much
    log.close()
    kept = store.client.xlen(topic) - before
    store.client.xtrim(topic, maxlen=0, approximate=False)
    store.close()
    if lost or kept != noted: raise NotServed(f"{noted} lists were noted, {kept} are on the bus, {sum(lost)} were lost")
    of = {on: percentiles(x) | {"cpu_ms": round(1000 * cpu_s[on] / len(x), 3)} for on, x in seconds.items()}
    ratio = {p.replace("ms", "ratio"): round(of[True][p] / of[False][p], 3) for p in ("p50_ms", "p99_ms", "cpu_ms")}
    return [row("reco", "in-process, lists not written down", of[False]), row("reco", "in-process, lists written down", of[True] | ratio)]


def in_a_process(job: Callable[..., list[dict]], *args: object) -> list[dict]:
    """The same in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool: return pool.apply(job, args)


# ---- a larger catalogue -------------------------------------------------------------------------------------------------

OF_ITEMS = {"content": ("index", "near", "lender", "warm", "new"), "item_item": ("index",), "two_steps": ("index",), "covisit": ("index",),
            "copurchase": ("index", "r_index"), "session_knn": ("item",), "als": ("items",), "popularity": ("items",)}  # hold item_idx
ONCE = {"content": ("basis", "encoded_by", "idf", "mean", "pieces"), "copurchase": ("rule",), "als": ("gram",), "buy_again": ("spread",)}


OTHER = "~{:02d}"  # what the ids of the other shops begin with


def beside(a: np.ndarray, copies: int, by: int = 0) -> np.ndarray:
    """An array behind itself so many times, each time `by` more where it is not -1."""
    return np.concatenate([np.where(a < 0, a, a + c * by) if by else a for c in range(copies)]).astype(a.dtype)


def source_beside(name: str, source: CandidateSource, n: int, copies: int) -> CandidateSource:
    """A source of so many shops like its own of n items: as large as that of one shop with as many items and events."""
    out = copy(source)
    for field in set(source.fitted) - set(ONCE.get(name, ())):
        a = getattr(source, field)
        if field.endswith(("indptr", "start")): made = np.append(beside(a[:-1].astype(np.int64), copies, int(a[-1])), copies * int(a[-1]))
        else: made = beside(a, copies, n if field in OF_ITEMS.get(name, ()) else len(source.end) if field == "by_item" else len(source.items) if field == "row" else 0)
        setattr(out, field, made)
    return out


def shops_beside(bundle: ModelBundle, copies: int) -> ModelBundle:
    """One bundle of so many shops: what a larger catalogue takes of memory, without simulating and fitting it for hours."""
    n, m = len(bundle.moment.known), bundle.moment
    tiled = lambda x: replace(x, **{f.name: beside(a, copies) for f in fields(x) if isinstance(a := getattr(x, f.name), np.ndarray) and len(a) == n})
    free = pl.DataFrame({"item_id": [f"}}{i:07d}" for i in range(n - bundle.items.height)]}, schema={"item_id": pl.String})
    one = pl.concat([bundle.items, free], how="diagonal")  # the ids stay in order
    items = pl.concat([one] + [one.with_columns(item_id=pl.lit(OTHER.format(c)) + pl.col("item_id")) for c in range(1, copies)])
    sources = {name: source_beside(name, s, n, copies) for name, s in m.sources.items()}
    moment = replace(tiled(m), sources=sources, state=tiled(m.state))
    kept = replace(bundle.kept, exposure=tiled(bundle.kept.exposure), hold=beside(bundle.kept.hold, copies))
    return replace(bundle, items=items, moment=moment, kept=kept, manifest=bundle.manifest | {"items": copies * n, "free_rows": 0})


def save_large(shop: Made, copies: int, folder: Path) -> list[dict]:
    """Write such a bundle."""
    save_bundle(shops_beside(load_bundle(shop.bundle_folder()), copies), folder)
    return []


def ask_large(shop: Made, copies: int, folder: Path, n: int) -> list[dict]:
    """Its memory when shoppers of all the shops have asked; their pasts come with the requests."""
    store, before, files, rng = shop.store(), rss_mb(), mapped_mb(), np.random.default_rng(0)
    bundle = load_bundle(next(folder.glob("[!.]*/manifest.json")).parent)
    recommend(RecommendationRequest(None, K), bundle, None)
    loaded = rss_mb() - before
    names = ["", *map(OTHER.format, range(1, copies))]
    for u in rng.choice(shop.users, n):
        name, past = names[rng.integers(copies)], store.events(u)
        told = [UserEvent(name + e.item_id, EVENTS[e.event], datetime.fromtimestamp(e.ts / 1000, UTC)) for e in past]
        recommend(RecommendationRequest(None, K, events=told), bundle, None)
    state, shared, size = rss_mb() - before, mapped_mb() - files, len(bundle.ids)
    store.close()
    about = {"loaded_mb": round(loaded, 1), "state_mb": round(state, 1), "of_files_mb": round(shared, 1), "peak_mb": round(peak_mb(), 1)}
    return [row("reco", f"memory, {size:,} items ({copies} such shops side by side), after {n:,} requests", about)]


def large(shop: Made, copies: int, n: int) -> list[dict]:
    """Write it in one process, measure it in another."""
    with TemporaryDirectory(dir=shop.folder) as folder:
        return in_a_process(save_large, shop, copies, Path(folder)) + in_a_process(ask_large, shop, copies, Path(folder), n)


def together(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Several runs of wrk: all requests by all seconds, the medians of the percentiles."""
    middle = {p: round(float(np.median([r[p] for r in rounds])), 2) for p in ("p50_ms", "p99_ms")}
    requests = sum(r["requests"] for r in rounds)
    return {"rps": round(requests / sum(r["seconds"] for r in rounds))} | middle | {"requests": int(requests)}


def over_http(shop: Made, seconds: int, folder: Path, keep_s: int, log: bool = True, few: int = 0) -> list[dict]:
    """The endpoint and the no-op by turns, at each number of connections; `few`: so many shoppers alone ask, again and again, so that nearly every list was kept."""
    kept = {"SERVING_CACHE_SECONDS": keep_s, "SERVED_ON": str(log).lower()}
    users = shop.users[:few] if few else shop.users
    systems = {"no-op": [path_of(u, K, NOTHING) for u in users], "reco": [path_of(u, K) for u in users]}
    name, rows = (f"lists kept for {keep_s} s" if keep_s else "each list made anew") + ("" if log else ", none written down") + (f", {few} shoppers" if few else ""), []
    with running(shop, beside=True, **kept) as endpoint:
        for paths in systems.values(): wrk(endpoint.url, paths, 4, seconds, folder)
        for c in CONNECTIONS:
            runs = {system: [] for system in systems}
            for _ in range(ROUNDS):
                for system, paths in systems.items(): runs[system].append(wrk(endpoint.url, paths, c, seconds, folder))
            none, ours = together(runs["no-op"]), together(runs["reco"])
            shares = {"rps_of_noop": round(ours["rps"] / none["rps"], 3), "p99_of_noop": round(ours["p99_ms"] / none["p99_ms"], 2)}
            rows += [row("no-op", f"HTTP, c={c}, beside: {name}", none), row("reco", f"HTTP, c={c}, {name}", ours | shares)]
        found = figures(httpx.get(f"{endpoint.url}/metrics", trust_env=False).text)
        rss = sum(p.memory_info().rss for p in endpoint.replicas()) / 2**20
    lists, hits = (sum(v for k, v in found.items() if k.split()[0] == f"reco_{x}_total") for x in ("lists", "lists_from_cache"))
    return rows + [row("reco", f"replica after it, {name}", {"rss_mb": round(rss, 1), "hit_rate": round(hits / max(lists, 1), 4)})]


def through_the_app(shop: Made, n: int) -> list[dict]:
    """The HTTP contract without Ray and network, for the smoke run."""
    replica = Replica()
    replica.bundle, replica.store = load_bundle(shop.bundle_folder()), shop.store()
    rows = []
    for system, app, route in (("no-op", nothing(), ""), ("reco", create_app(replica), "/recommendations/v1")):
        http = TestClient(app)
        answers, began = [], time.perf_counter()
        times = measure(lambda path, http=http, answers=answers: answers.append(http.get(path)), [path_of(u, K, route) for u in (shop.users * n)[:n]])
        seconds = time.perf_counter() - began
        if bad := [a for a in answers if a.status_code != 200]: raise NotServed(f"{len(bad)} answers were no 200")
        rows.append(row(system, "app, no network, c=1", {"rps": round(n / seconds)} | percentiles(times)))
    replica.store.close()
    return rows


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = shop_arguments(__doc__)
    parser.add_argument("--asking", type=int, default=2_000, help="shoppers who ask, one after the other")
    parser.add_argument("--seconds", type=int, default=5, help="of each run of wrk")
    parser.add_argument("--keep", type=int, default=30, help="[serving] cache_seconds of the second start; 0: no second start")
    parser.add_argument("--copies", type=int, default=10, help="memory also of so many such shops side by side, as of one large one; 1: no")
    parser.add_argument("--alone", action="store_true", help="in-process and memory only")
    return parser


def measured(args: argparse.Namespace) -> list[dict]:
    """Make the shop, measure alone, then over HTTP."""
    with shop_of(args, args.asking) as shop, TemporaryDirectory() as scripts:
        if args.quick: return alone(shop, 50) + noting(shop, 100) + through_the_app(shop, 30) + large(shop, 2, 20)
        rows = in_a_process(alone, shop, 2_000) + in_a_process(noting, shop, 8_000) + (large(shop, args.copies, 2_000) if args.copies > 1 else [])
        if args.alone: return rows
        kept = [(args.keep, True), (args.keep, True, FEW)] if args.keep else []
        for case in [(0, True), (0, False), *kept]: rows += over_http(shop, args.seconds, Path(scripts), *case)
    return rows


if __name__ == "__main__": sys.exit(reported("p1_endpoint", parser().parse_args(), measured))
