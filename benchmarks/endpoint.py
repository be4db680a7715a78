"""What the benchmarks of the endpoint share: a shop to serve, the endpoint as it runs in production, and load on it.

`python -m benchmarks.endpoint` is `python -m app.serve` with one more application in the same Ray Serve: a handler that does nothing.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import psutil
from prometheus_client.parser import text_string_to_metric_families

from app.ports import free_port
from benchmarks.base import arguments, folder_with_store, quickly, render, write
from reco.bundle import latest_bundle, make_bundle, save_bundle
from reco.data.histories import epoch_ms
from reco.data.shop import index_shop
from reco.data.simulator import simulate
from reco.features.store import OnlineStore, open_store, wait_until_ready
from reco.materialize import fill_pasts
from reco.provenance import git_sha
from reco.published import publish
from reco.ranking.training import cutoffs_of, train_ranker
from reco.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "/noop"
READY_S = 300  # a start takes half a minute on two free cores


class NotServed(RuntimeError):
    """The endpoint did not do what is measured; the message says what it did."""


# ---- a shop -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A published bundle, and a store that knows everybody's past."""

    folder: Path
    users: list[str]   # with a past, in the order in which they ask
    trees: int

    def environment(self, **more: object) -> dict[str, str]:
        """What makes the endpoint serve this shop: settings, by their variables."""
        mine = {"BUNDLES_ROOT": self.folder / "bundles", "ONLINE_FOLDER": self.folder / "online", "LAKE_ROOT": self.folder / "lake"}
        return {f"RECO_{k}": str(v) for k, v in (mine | more).items()}

    def settings(self) -> Settings:
        """The same for this process."""
        base = load_settings()
        return base.model_copy(update={"online": base.online.model_copy(update={"folder": str(self.folder / "online"), "url": type(base.online.url)("")})})

    def store(self) -> OnlineStore:
        """Open, and done with reading its data: until then every list would be made without it."""
        opened = open_store(self.settings())
        wait_until_ready(opened.client)
        return opened

    def bundle_folder(self) -> Path: return latest_bundle(self.folder / "bundles")


def made(folder: Path, items: int, users: int, events: int, asking: int, quick: bool = False) -> Made:
    """Simulate a shop until now, train on a few requests with the platform's own functions, publish, fill the pasts."""
    now, base = datetime.now(UTC), load_settings()
    settings = quickly(base) if quick else base.model_copy(update={"train": base.train.model_copy(update={"cutoffs": 2, "max_requests": 500})})
    sim = simulate(users, items, events, days=60, end=now, seed=7)
    shop = index_shop(sim.interactions, sim.catalog)
    ranker = train_ranker(shop, cutoffs_of(shop, settings), settings)
    bundle = make_bundle(shop, epoch_ms(now), {"for_you": ranker}, settings, {"git_sha": git_sha(ROOT), "metrics": []})
    publish(save_bundle(bundle, folder / "bundles"), "benchmark")
    done = Made(folder, shop.users.ids.sample(min(asking, len(shop.users)), seed=1).to_list(), ranker.booster.num_trees())
    store = done.store()
    fill_pasts(store, sim.interactions.lazy(), now)
    store.close()
    return done


def shop_arguments(about: str | None) -> argparse.ArgumentParser:
    """What all benchmarks of the endpoint take."""
    parser = arguments(about)
    parser.add_argument("--items", type=int, default=100_000, help="of the simulated shop")
    parser.add_argument("--users", type=int, default=50_000, help="of the simulated shop")
    parser.add_argument("--events", type=int, default=1_000_000, help="of the simulated past")
    parser.add_argument("--shop", type=Path, help="folder to keep the shop in, or to find the one that was made before: a large one takes minutes")
    return parser


def reported(name: str, args: argparse.Namespace, measured: Callable[[argparse.Namespace], list[dict]]) -> int:
    """Measure and write the table; the exit code."""
    try: rows = measured(args)
    except NotServed as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    write(name, rows, args.results)
    if not args.quick: render()
    return 0


@contextmanager
def shop_of(args: argparse.Namespace, asking: int) -> Iterator[Made]:
    """The shop that was asked for, in a folder that is gone afterwards if none was named; raises `NotServed` for one of another size."""
    wanted = [200, 500, 10_000] if args.quick else [args.items, args.users, args.events]
    with nullcontext(args.shop.absolute()) if args.shop else folder_with_store() as named:
        folder, note = Path(named), Path(named) / "shop.json"
        if note.is_file():
            kept = json.loads(note.read_text())
            if kept["size"] != wanted: raise NotServed(f"{folder} has {kept['size']} items, users and events, not {wanted}")
            shop = Made(folder, kept["users"], kept["trees"])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shop = made(folder, *wanted, max(asking, 2_000), args.quick)
            note.write_text(json.dumps({"size": wanted, "users": shop.users, "trees": shop.trees}))
        yield Made(folder, shop.users[:asking], shop.trees)


# ---- the endpoint -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """The endpoint in a process of its own."""

    process: subprocess.Popen
    url: str

    def replicas(self) -> list[psutil.Process]:
        """The processes that answer; the one that does nothing is not among them."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in tree if any("ServeReplica:default" in x for x in p.cmdline())]


def _lines(process: subprocess.Popen) -> queue.Queue:
    """What it prints; None at its end. Read on, or it would wait for a reader."""
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout: said.put(line)
        said.put(None)
    threading.Thread(target=read, daemon=True).start()
    return said


def _until_ready(process: subprocess.Popen) -> None:
    """Raises `NotServed` with what it printed."""
    lines, said, until = _lines(process), [], time.monotonic() + READY_S
    while True:
        try: line = lines.get(timeout=max(0.1, until - time.monotonic()))
        except queue.Empty: line = None
        if line is None: raise NotServed("the endpoint did not start:\n" + "".join(said[-20:]))
        if line.startswith("ready"): return
        said.append(line)


@contextmanager
def running(shop: Made, beside: bool = False, **settings: object) -> Iterator[Running]:
    """`python -m app.serve` on a shop for as long as the block runs; `beside`: with the application that does nothing."""
    port = free_port()
    env = os.environ | shop.environment(SERVING_PORT=port, **settings)
    command = [sys.executable, "-m", "benchmarks.endpoint" if beside else "app.serve"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    tree = psutil.Process(process.pid)
    try:
        _until_ready(process)
        yield Running(process, f"http://127.0.0.1:{port}")
    finally:
        mine = [tree, *tree.children(recursive=True)] if tree.is_running() else []
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try: process.wait(60)
            except subprocess.TimeoutExpired: process.kill()
        for p in psutil.wait_procs(mine, timeout=10)[1]: p.kill()


def path_of(user_id: str, k: int = 10, route: str = "/recommendations/v1") -> str:
    """Where a shopper's list is asked for."""
    return f"{route}/{quote(user_id, safe='').replace('.', '%2E')}?k={k}"


def figures(text: str) -> dict[str, float]:
    """`/metrics`: name and labels → value."""
    found = (s for m in text_string_to_metric_families(text) for s in m.samples)
    return {s.name + "".join(f" {k}={v}" for k, v in sorted(s.labels.items())): s.value for s in found}


# ---- load -------------------------------------------------------------------------------------------------------------

# Closed loop: each connection asks again when it is answered. Requests are written once, before the clock runs.
SCRIPT = """
local asked, at = {}, 0
function init(args) for path in io.lines(os.getenv("PATHS")) do asked[#asked + 1] = wrk.format("GET", path) end end
function request() at = at % #asked + 1; return asked[at] end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\nRESULT {"requests": %d, "seconds": %.6f, "p50_ms": %.4f, "p99_ms": %.4f, "failed": %d}\\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def wrk(url: str, paths: list[str], connections: int, seconds: int, folder: Path) -> dict[str, float]:
    """One run of wrk over the paths, one after the other; raises `NotServed` when any answer was no 200."""
    program = shutil.which("wrk")
    if not program: raise NotServed("there is no wrk here: make services")
    (folder / "load.lua").write_text(SCRIPT)
    (folder / "paths").write_text("\n".join(paths) + "\n")
    command = [program, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(folder / "load.lua"), url]
    done = subprocess.run(command, env=os.environ | {"PATHS": str(folder / "paths")}, capture_output=True, text=True, timeout=seconds + 60)
    found = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not found: raise NotServed(f"wrk: {done.stderr or done.stdout}")
    got = json.loads(found[-1].removeprefix("RESULT "))
    if got["failed"] or not got["requests"]: raise NotServed(f"{got['failed']} of {got['requests']} answers were errors")
    return got


# ---- beside nothing ---------------------------------------------------------------------------------------------------


class Nothing:
    """Answers every request with the same bytes."""

    def __serve_build_asgi_app__(self):
        """The app, made in the replica."""
        return nothing()


def nothing():
    """A FastAPI app with one route that does nothing."""
    from fastapi import FastAPI, Response
    app = FastAPI()

    @app.get("/{user_id}")
    async def answer(user_id: str, k: int = 5) -> Response: return Response(b'{"status":"ok"}', media_type="application/json")
    return app


def main() -> int:
    """The endpoint, and beside it what does nothing."""
    from app import serve as endpoint
    began = endpoint.start

    def both(*given) -> None:
        began(*given)
        from ray import serve

        from benchmarks import endpoint as here  # by its name, so that Ray's workers import it rather than unpickle it
        app = serve.deployment(serve.ingress()(here.Nothing), name="nothing").options(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5})
        serve.run(app.bind(), name="nothing", route_prefix=NOTHING, logging_config={"log_level": "WARNING", "enable_access_log": False})
    endpoint.start = both
    return endpoint.main()


if __name__ == "__main__": sys.exit(main())
