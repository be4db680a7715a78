"""The endpoint under steady load for minutes: memory and times minute by minute, and the same counts on both sides.

Open loop: requests come at fixed moments whether the ones before are answered or not, and are timed from those moments. Lists of known
shoppers, events of theirs, and now and then a list with its reasons. Finished lists are kept as the settings say. At the end every answer that was
counted here must be in `/metrics`, and none may be a 5xx.
"""

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
from starlette.testclient import TestClient

from app.contract import create_app
from app.serve import Replica, open_intake
from benchmarks.base import percentiles
from benchmarks.endpoint import Made, NotServed, figures, path_of, reported, running, shop_arguments, shop_of
from reco.bundle import load_bundle

LISTS, EVENTS = "/recommendations/v1/{user_id:text}", "/events/v1"
AT_ONCE, CUT_OFF = 16, 599  # connections; the status of a request without an answer
Client = Callable[[], httpx.Client]  # makes one; every thread has its own


class Load:
    """Asks at fixed moments; what was answered, when and how late."""

    def __init__(self, client: Client, shop: Made, items: list[str], rates: dict[str, float]):
        self.client, self.shop, self.items, self.rates = client, shop, items, rates
        self.mine, self.turn, self.rng = threading.local(), threading.Lock(), np.random.default_rng(1)
        self.counts: Counter[tuple[str, int]] = Counter()  # route and status
        self.lists: list[tuple[float, float]] = []         # moment of a list, seconds until it was there

    def http(self) -> httpx.Client:
        """This thread's own."""
        if not hasattr(self.mine, "http"): self.mine.http = self.client()
        return self.mine.http

    def ask(self, kind: str, due: float, user: str, item: str, name: str) -> None:
        """One request."""
        body = {"event_id": name, "ts": round(time.time() * 1000), "user_id": user, "item_id": item, "event": "view"}
        try: answer = self.http().post(EVENTS, json=body) if kind == "event" else self.http().get(path_of(user) + "&explain=true" * (kind == "explained"))
        except httpx.TransportError: status = CUT_OFF
        else: status = answer.status_code
        took = time.perf_counter() - due
        with self.turn:
            self.counts[EVENTS if kind == "event" else LISTS, status] += 1
            if kind == "list": self.lists.append((due, took))

    def moments(self, seconds: float) -> list[tuple[float, str]]:
        """When something is to be asked, and what: each kind evenly."""
        return sorted((n / rate, kind) for kind, rate in self.rates.items() for n in range(int(seconds * rate)))

    def run(self, began: float, seconds: float) -> None:
        """Ask until the time is over; raises what a request raised."""
        run = time.time_ns()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asked = []
            for n, (at, kind) in enumerate(self.moments(seconds)):
                time.sleep(max(0, began + at - time.perf_counter()))
                user, item = self.shop.users[self.rng.integers(len(self.shop.users))], self.items[self.rng.integers(len(self.items))]
                asked.append(pool.submit(self.ask, kind, began + at, user, item, f"soak {run} {n}"))
        for one in asked: one.result()


class Memory:
    """The processes' resident memory, sampled until it is told to end."""

    def __init__(self, processes: list[psutil.Process], every_s: float):
        self.processes, self.every_s, self.samples, self.ended = processes, every_s, [], threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        """Samples of moment and MB."""
        while not self.ended.wait(self.every_s):
            self.samples.append((time.perf_counter(), sum(p.memory_info().rss for p in self.processes) / 2**20))

    def __enter__(self) -> "Memory":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def counted(http: httpx.Client) -> Counter[tuple[str, int]]:
    """Route and status → answers, by the endpoint's own figures."""
    found = figures(http.get("/metrics").text)
    split = {k: dict(x.split("=", 1) for x in k.split()[1:]) for k in found if k.startswith("reco_http_requests_total ")}
    return Counter({(x["route"], int(x["status"])): int(found[k]) for k, x in split.items() if x["route"] in (LISTS, EVENTS)})


def slices(load: Load, memory: Memory, began: float, each_s: float, n: int) -> list[dict]:
    """A row per minute (or whatever a slice is)."""
    rows = []
    for i in range(n):
        within = lambda at, i=i: began + i * each_s <= at < began + (i + 1) * each_s
        took, rss = [s for at, s in load.lists if within(at)], [mb for at, mb in memory.samples if within(at)]
        metrics = percentiles(took) | {"rps": round(len(took) / each_s, 1), "rss_mb": round(max(rss), 1)}
        rows.append({"system": "reco", "case": f"minute {i + 1}" if each_s == 60 else f"slice {i + 1}", "metrics": metrics})
    return rows


def soak(client: Client, shop: Made, processes: list[psutil.Process], rates: dict[str, float], each_s: float, n: int) -> list[dict]:
    """The whole soak; raises `NotServed` when the two sides do not agree or something failed."""
    bundle, http = load_bundle(shop.bundle_folder()), client()
    load = Load(client, shop, bundle.ids.ids.sample(500, seed=1, with_replacement=True).to_list(), rates)
    for u in shop.users[:20]: http.get(path_of(u))
    before = counted(http)
    with Memory(processes, each_s / 12) as memory:
        began = time.perf_counter()
        load.run(began, n * each_s)
    theirs, failed = counted(http) - before, sum(v for (_, status), v in load.counts.items() if status >= 500)
    if failed: raise NotServed(f"{failed} requests failed: {dict(load.counts)}")
    if theirs != load.counts: raise NotServed(f"the endpoint counted {dict(theirs)}, here it was {dict(load.counts)}")
    rows = slices(load, memory, began, each_s, n)
    of = lambda key: [r["metrics"][key] for r in rows]
    total = {"requests": load.counts.total(), "counted_by_metrics": theirs.total(), "events": load.counts[EVENTS, 202], "failed": failed,
             "rss_last_to_second": round(of("rss_mb")[-1] / of("rss_mb")[min(1, n - 1)], 3),
             "p99_last_to_median": round(of("p99_ms")[-1] / float(np.median(of("p99_ms"))), 2)}
    return [*rows, {"system": "reco", "case": f"all {n}", "metrics": total}]


def through_the_app(shop: Made) -> list[dict]:
    """Without Ray and network, for the smoke run."""
    replica = Replica()
    replica.bundle, replica.store, replica.intake = load_bundle(shop.bundle_folder()), shop.store(), open_intake(shop.settings())
    app = create_app(replica)
    rows = soak(lambda: TestClient(app), shop, [psutil.Process()], {"list": 20, "event": 5, "explained": 2}, 1, 3)
    replica.store.close()
    return rows


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = shop_arguments(__doc__)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--rate", type=float, default=50, help="lists per second")
    parser.add_argument("--event-rate", type=float, default=5, help="events per second")
    parser.add_argument("--explain-rate", type=float, default=1, help="lists with reasons per second")
    return parser


def measured(args: argparse.Namespace) -> list[dict]:
    """Make the shop, start the endpoint, keep it busy."""
    with shop_of(args, 2_000) as shop:
        if args.quick: return through_the_app(shop)
        rates = {"list": args.rate, "event": args.event_rate, "explained": args.explain_rate}
        with running(shop) as endpoint:
            client = lambda: httpx.Client(base_url=endpoint.url, timeout=30, trust_env=False)
            return soak(client, shop, endpoint.replicas(), rates, 60, args.minutes)


if __name__ == "__main__": sys.exit(reported("soak", parser().parse_args(), measured))
