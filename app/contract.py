"""The HTTP contract: routes, bodies, errors and who may ask what. FastAPI alone; what answers stands behind `Service`."""
import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import unquote_plus

from fastapi import Depends, FastAPI, Query, Request, Response, Security
from fastapi import HTTPException as TooLarge
from fastapi import Path as PathParam
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import to_json
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import reco
from app.following import Refusal
from app.keys import Keys
from app.meter import Meter, Metered
from app.shown import Shown
from reco.bundle import BundleError, UnknownBundle
from reco.data.histories import epoch_ms
from reco.data.intake import NotTaken
from reco.data.stream import BusError
from reco.features.store import StoreError
from reco.published import NothingBefore, Publication
from reco.request import RecommendationRequest, RecommendationResponse, RequestError, UserEvent

log = logging.getLogger("reco.serve")
MAX_K, MAX_ID = 100, 512       # items in one answer; characters of an id (longer ones are a caller's mistake)
MAX_BASKET, MAX_BATCH = 200, 100 # items in front of which a list may be asked for; requests of one batch
MAX_EVENTS, MAX_FILTER = 1_000, 1_000 # events of one request; characters of a filter
MAX_TEXT = 20_000              # characters of a title or description
MAX_BODY = 8 * 2**20           # bytes; a thousand events are a tenth of it

# ---- bodies -------------------------------------------------------------------------------------------------------

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Surface = Literal["for_you", "similar", "bought_together"]

class Contribution(BaseModel):
    "What one feature added to an item's score."
    feature: str
    meaning: str
    value: float|None = Field(description="null where it is unknown")
    log_odds: float = Field(description="what it added to the log-odds of the score, or took from them")

class Why(BaseModel):
    "Where an item came from, and why it stands where it stands."
    reason: str = Field(examples=["because you viewed Camping stove"])
    because: list[str] = Field(description="items of the shopper's past or of the context that the reason names")
    sources: dict[str, int] = Field(description="candidate source → the place that it gave the item, 1 is best")
    log_odds: float|None = Field(description="the ranker's; null where the sources' order answered")
    base: float|None = Field(description="what an average candidate gets; base, contributions and rest add up to log_odds")
    contributions: list[Contribution] = Field(description="the largest, by size (exact SHAP values)")
    rest: float = Field(description="all other contributions together")

class Recommendation(BaseModel):
    "One recommended item."
    item_id: str = Field(description="the shop's own id of the item", examples=["product_45"])
    score: float = Field(ge=0, le=1, description="the chance that the shopper touches the item within the horizon", examples=[0.98])
    why: Why|None = Field(None, description="with explain=true only")

class Recommendations(BaseModel):
    "The answer for one shopper, best first."
    user_id: str = Field(description="as it was asked for")
    recommendations: list[Recommendation] = Field(description="best first, no item twice")

class SimilarItems(BaseModel):
    "What resembles an item, best first."
    item_id: str = Field(description="as it was asked for")
    recommendations: list[Recommendation] = Field(description="best first, no item twice, never the item itself")

class BoughtTogether(BaseModel):
    "What goes with a basket, best first."
    items: list[str] = Field(description="as they were asked for")
    recommendations: list[Recommendation] = Field(description="best first, no item twice, nothing of the basket")

class ForSession(BaseModel):
    "The answer for an anonymous visit, best first."
    recommendations: list[Recommendation] = Field(description="best first, no item twice")

LAST_MS = 253_402_300_800_000 # the year 10000: what Python calls a time ends there

def to_ms(
    value: object, # of JSON
) -> int:          # ms since 1970
    "A moment; raises `ValueError` for one without a time zone, before 1970, or that is none."
    at: object = value
    if isinstance(value, str):
        try: moment = datetime.fromisoformat(value)
        except ValueError: moment = None
        at = epoch_ms(moment) if moment and moment.tzinfo else None
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < LAST_MS: raise ValueError("ms since 1970, or ISO 8601 with a time zone")
    return at

Moment = Annotated[int, BeforeValidator(to_ms), WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "exclusiveMaximum": LAST_MS},
                                                                           {"type": "string", "format": "date-time"}]})]

class SessionEvent(BaseModel):
    "Something that just happened in the visit."
    model_config = ConfigDict(extra="forbid")
    item_id: Id
    event: Literal["click", "view", "addtocart", "transaction"]
    ts: Moment|None = Field(None, description="ms since 1970, or ISO 8601 with a time zone; without it the events are taken to have happened in this order, until now")

class Ask(BaseModel):
    "What to recommend."
    model_config = ConfigDict(extra="forbid")
    k: int = Field(5, ge=1, le=MAX_K, strict=True, description="how many items at most")
    surface: Surface = Field("for_you", description="where in the shop")
    context_items: list[Id] = Field([], max_length=MAX_BASKET, description="the item of the page, or what is in the cart; not for for_you")
    filter: str = Field("", max_length=MAX_FILTER, description="which items may be shown: category:shoes,price<50", examples=["category:shoes,price<50"])

class Session(Ask):
    "An anonymous visit."
    events: list[SessionEvent] = Field([], max_length=MAX_EVENTS, description="what just happened, oldest first")

class BatchAsk(Ask):
    "One request of a batch."
    user_id: Id = Field(description="the shop's own id of the shopper, known or not")

class Batch(BaseModel):
    "Several requests at once."
    model_config = ConfigDict(extra="forbid")
    requests: list[BatchAsk] = Field(min_length=1, max_length=MAX_BATCH)

class Answers(BaseModel):
    "The answers of a batch, in the order of its requests."
    answers: list[Recommendations]

class Event(BaseModel):
    "Something that a shopper did, or was shown: the fields of data/schema/user_event.avsc."
    model_config = ConfigDict(extra="forbid")
    event_id: Id = Field(description="unique, made by the sender, kept when it sends again: the same id twice is the same event")
    ts: Moment = Field(description="when it happened: ms since 1970, or ISO 8601 with a time zone")
    user_id: Id
    item_id: Id
    event: Literal["impression", "click", "view", "addtocart", "transaction"]
    session_id: Annotated[str, Field(max_length=MAX_ID)]|None = None
    order_id: Annotated[str, Field(max_length=MAX_ID)]|None = Field(None, description="transactions only: items with one order_id were one basket")
    quantity: Annotated[int, Field(strict=True, ge=-2**31, lt=2**31)]|None = Field(None, description="pieces, from 1")
    price: float|None = Field(None, allow_inf_nan=False, strict=True, description="paid or shown, per piece")
    request_id: Annotated[str, Field(max_length=MAX_ID)]|None = Field(None, description="the X-Request-ID of the list that showed the item")
    surface: Annotated[str, Field(max_length=MAX_ID)]|None = None

Events = Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS, description="one event alone may be sent without the list"),
                   BeforeValidator(lambda x: [x] if isinstance(x, dict) else x)]

class Change(BaseModel):
    "What the shop says of an item; what is not named stays as it is."
    model_config = ConfigDict(extra="forbid")
    title: Annotated[str, Field(max_length=MAX_TEXT)]|None = None
    description: Annotated[str, Field(max_length=MAX_TEXT)]|None = None
    category: Id|None = Field(None, description="the shop's own id of the category")
    category_path: Annotated[str, Field(max_length=MAX_TEXT)]|None = Field(None, description="root / … / leaf")
    brand: Id|None = None
    price: float|None = Field(None, ge=0, le=1e12, allow_inf_nan=False, strict=True, description="before the discount")
    discount: float|None = Field(None, ge=0, le=1, allow_inf_nan=False, strict=True, description="share of the price taken off")
    stock: int|None = Field(None, ge=0, le=2**53, strict=True, description="0 is sold out")

class CandidateOfList(BaseModel):
    "An item that was proposed, and what became of it."
    item_id: str
    sources: dict[str, int] = Field(description="candidate source → the place that it gave the item, 1 is best; empty where none proposed it")
    score: float|None = Field(description="the chance that the shopper touches it within the horizon; null for a pin that nobody proposed")
    place: int|None = Field(description="by score alone, 1 is best; null for a pin that nobody proposed")
    fate: str = Field(description="shown, beyond_k (good enough for no slot), or the rule that took it out", examples=["shown", "out_of_stock"])
    slot: int|None = Field(description="in the list, 1 is first; null when it is not shown")
    moved: str = Field(description="what brought it up to its slot: pinned, boosted, varied or explored; empty for nothing but its score")

class PastEventOf(BaseModel):
    "Something that the endpoint knows of a shopper."
    item_id: str
    event: str
    ts: int = Field(description="ms since 1970")

class TakenApart(BaseModel):
    "A list and everything that it was chosen from."
    user_id: str = Field(description="as it was asked for")
    bundle_id: str
    variant: str|None = Field(description="experiment=variant; null outside of experiments. Where two lists are drafted into one, the first of them is taken apart")
    fallback: bool
    without: list[str] = Field(description="what failed or was late and was done without")
    seconds: dict[str, float] = Field(description="stage → seconds it took")
    past: list[PastEventOf] = Field(description="the latest that is known of the shopper, newest first")
    proposed: dict[str, int] = Field(description="candidate source → candidates")
    dropped: dict[str, int] = Field(description="rule → candidates that it took out")
    count: int = Field(description="candidates in all")
    candidates: list[CandidateOfList] = Field(description="those of the list first, in its order, then the others by place")
    recommendations: list[Recommendation] = Field(description="the list, each item with its why")

class Changed(BaseModel):
    "What became of a change."
    item_id: str
    version: int = Field(description="number of the item's last change")
    changed: bool = Field(description="false when all of it had been said before")
    live: bool = Field(description="the item can be recommended now, as far as rules let it; false: from the next bundle on")

class Accepted(BaseModel):
    "Events that are safe now."
    accepted: int = Field(description="events, each counted once however often it came in this request")

class Erased(BaseModel):
    "What was removed of a shopper."
    rows: dict[str, int] = Field(description="table of the lake → rows")
    online: bool = Field(description="whether the online store knew the shopper")

class Health(BaseModel):
    "The endpoint is alive and has a bundle."
    status: str = Field(examples=["ok"])
    bundle_id: str = Field(description="the model bundle that answers", examples=["2026-11-01T000000Z-1a2b3c4d"])

class RefusedBundle(BaseModel):
    "A bundle that was published and is not served."
    bundle_id: str
    reason: str

class Ready(BaseModel):
    "Whether requests can be answered, and with what."
    status: Literal["ready", "degraded"] = Field(description="degraded: answered, but without the online store")
    bundle_id: str
    store: Literal["ok", "down"] = Field(description="the online store")
    refused: RefusedBundle|None = Field(None, description="only while another bundle is published that was refused; the one before goes on")

class Reason(BaseModel):
    "For the history."
    model_config = ConfigDict(extra="forbid")
    who: str = Field("", max_length=200, description="who wants it", examples=["ann"])
    why: str = Field("", max_length=1_000, examples=["prices are off since this morning"])

class Publish(Reason):
    "Which bundle to serve."
    bundle_id: Id = Field(description="of a bundle that was saved", examples=["2026-11-01T000000Z-1a2b3c4d"])

class Published(BaseModel):
    "What is published now."
    bundle_id: str
    before: str = Field(description="what was published until now")
    at: str = Field(description="UTC, ISO 8601")
    who: str
    why: str
    back: bool = Field(description="whether it was a rollback")

class Problem(BaseModel):
    "What was wrong with a request (RFC 9457, application/problem+json)."
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(description="the reason, for a person to read",
                        examples=["k must be a whole number from 1 to 100, not '101'"])

EXAMPLE = {"user_id": "user_123", "recommendations": [{"item_id": "product_45", "score": 0.98},
                                                      {"item_id": "product_7", "score": 0.71}]}

# ---- errors -------------------------------------------------------------------------------------------------------

PROBLEM = "application/problem+json"
# what a bad value of each parameter is told; FastAPI's own words speak of pydantic's types
ALLOWED = {"explain": "true or false", "k": f"a whole number from 1 to {MAX_K}", "user_id": f"1 to {MAX_ID} characters", "item_id": f"1 to {MAX_ID} characters",
           "surface": "for_you, similar or bought_together", "context_item": f"at most {MAX_BASKET} ids of 1 to {MAX_ID} characters",
           "filter": f"at most {MAX_FILTER} characters", "items": f"1 to {MAX_BASKET} ids with commas between, each of 1 to {MAX_ID} characters"}

class Refused(Exception):
    "An answer that is a problem."
    def __init__(self, status: int, title: str, detail: str, headers: dict[str, str]|None = None):
        super().__init__(detail)
        self.status, self.title, self.detail, self.headers = status, title, detail, headers or {}

Responses = dict[int|str, dict[str, Any]] # status → what /docs says of it

def _problem_docs(reason: str) -> dict[str, Any]: # one entry of a route's `responses`
    return {"description": reason, "content": {PROBLEM: {"schema": Problem.model_json_schema()}}}

def _problem(status: int, title: str, detail: str, headers: dict[str, str]|None = None) -> Response: # an error answer
    return Response(to_json(Problem(title=title, status=status, detail=detail)), status, headers, PROBLEM)

def unprocessable(detail: str) -> Refused: return Refused(422, "Unprocessable Content", detail)

async def _refused(_: Request, error: Refused) -> Response: return _problem(error.status, error.title, error.detail, error.headers)

def _where(loc: tuple[int|str, ...]) -> str: # of pydantic: ("body", "requests", 3, "k") → requests[3].k
    return "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in loc[1:]).removeprefix(".") or "the body"

async def _invalid(_: Request, error: RequestValidationError) -> Response: # 422 that says what is allowed
    "One sentence for each parameter that is wrong, the first ten."
    found = {_where(e["loc"]): e for e in error.errors()}
    return _problem(422, "Unprocessable Content", "; ".join(_words(name, e) for name, e in list(found.items())[:10]))

def _words(name: str, error: dict) -> str: # one of pydantic's errors
    if error["type"] == "missing": return f"{name} is missing" + (f": it must be {ALLOWED[name]}" if name in ALLOWED else "")
    if error["type"] == "extra_forbidden": return f"{name} is not known here"
    if error["type"] == "json_invalid": return f"the body must be JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    what = ALLOWED.get(name) or error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{name} must be {what[:1].lower()}{what[1:]}, not {str(error.get('input'))[:40]!r}"

async def _http(_: Request, error: HTTPException) -> Response: # 404, 405 and the like
    if error.status_code == 400: return _problem(422, "Unprocessable Content", "the body must be JSON, in UTF-8") # FastAPI's, for bytes that are no text
    text = {404: "there is nothing here; /docs lists what there is", 413: f"a body may have {MAX_BODY:,} bytes"}.get(error.status_code, str(error.detail))
    return _problem(error.status_code, str(error.detail), text, dict(error.headers or {}))

async def _crash(request: Request, error: Exception) -> Response: # 500: a defect of ours; the log has the traceback
    log.error("%s %r failed", request.method, request.url.path, exc_info=error)
    return _problem(500, "Internal Server Error", "the endpoint failed; its log has the reason")

# ---- reading requests -----------------------------------------------------------------------------------------------

class _AnyText(Convertor[str]):
    "The rest of a path, whatever it holds: Starlette's own `path` stops at a line break."
    regex = r"[\s\S]*"
    def convert(self, value: str) -> str: return value
    def to_string(self, value: str) -> str: return value

register_url_convertor("text", _AnyText())

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

def request_id(request: Request) -> str: # the caller's, or a new one; raises `Refused` for one that cannot name anything
    "The name of this exposure: events that come of it carry it. Ray Serve has given one already where the caller did not."
    given = request.headers.get("x-request-id")
    if given is None: return uuid.uuid4().hex
    if REQUEST_ID.fullmatch(given): return given
    raise unprocessable("the header X-Request-ID must be 1 to 128 letters, digits or . : _ -")

def listed(
    query: str,  # of the URL, as it was sent
    name: str,   # of the parameter
) -> list[str]:  # ids in their order; raises `Refused`
    "Ids with commas between. A comma within an id is sent as %2C, so the commas are looked for before that is read."
    values = [v for part in query.split("&") for n, _, v in [part.partition("=")] if unquote_plus(n) == name]
    ids = [unquote_plus(i) for v in values for i in v.split(",")]
    if not 1 <= len(ids) <= MAX_BASKET or not all(1 <= len(i) <= MAX_ID for i in ids): raise unprocessable(f"{name} must be {ALLOWED[name]}")
    return ids

def happened(
    events: list[SessionEvent],
    now: datetime,
) -> list[UserEvent]: # those without a time a millisecond after the one before, the last of them just now
    "The events of a visit with their times."
    return [UserEvent(e.item_id, e.event, now - timedelta(milliseconds=len(events) - n) if e.ts is None else datetime.fromtimestamp(e.ts/1000, UTC)) for n, e in enumerate(events)]

# ---- the app --------------------------------------------------------------------------------------------------------

class NotErased(Exception):
    "Not everything of a shopper was removed; the message says what failed."

class NotFollowing(BundleError):
    "One bundle is served, whatever is published."
    def __init__(self) -> None: super().__init__("this endpoint was started with one bundle and follows no other")

class Service(Protocol):
    "What the contract needs behind it."
    keys: Keys
    meter: Meter

    @property
    def bundle_id(self) -> str: ...
    @property
    def about(self) -> dict: ...           # the bundle's manifest, for `/v1/bundle`
    @property
    def refused(self) -> Refusal|None: ... # what is published, where it is not what is served

    def recommend(self, request: RecommendationRequest) -> RecommendationResponse:
        "Raises `RequestError` for a request that cannot be meant."

    def explained(self, request: RecommendationRequest) -> tuple[RecommendationResponse, list[dict]]:
        "The same, and a `Why` for each item."

    def taken_apart(self, request: RecommendationRequest) -> dict:
        "The same list as the contract's `TakenApart`; raises `RequestError`."

    def note(self, shown: Shown) -> None:
        "Write a list down; returns at once."

    def store_answers(self) -> bool:
        "Whether the online store can be reached."

    def take(self, events: list[dict]) -> int:
        "How many events are safe now; raises `NotTaken`, or `BusError` when the bus does not take them."

    def put_item(self, item_id: str, change: dict) -> tuple[int, bool, bool]:
        "The change's number, whether it changed anything, and whether the item can be recommended; raises `StoreError`."

    def erase(self, user_id: str) -> tuple[dict[str, int], bool]:
        "Rows removed of each table of the lake, and whether the online store knew the shopper; raises `NotErased`."

    def publish(self, bundle_id: str, who: str, why: str) -> Publication:
        "Serve another bundle; raises `UnknownBundle`, `NotFollowing`, or `BundleError` with what is wrong with it."

    def rollback(self, who: str, why: str) -> Publication:
        "Serve what was published before; raises `NothingBefore`, `NotFollowing`."

KEY = APIKeyHeader(name="X-API-Key", auto_error=False, description="a key of the role client or admin; not needed where no keys are set")

def allowing(
    service: Service,
    roles: tuple[str, ...],
) -> Callable[..., Awaitable[str]]:
    "A dependency that lets only these roles pass, and says which one it was."
    async def check(request: Request, _: Annotated[str|None, Security(KEY)] = None) -> str: # the header is named for /docs; `KeyFirst` has read it
        role = request.scope["reco.role"]
        if role not in roles: raise Refused(403, "Forbidden", f"this needs a key of the role {' or '.join(roles)}")
        return role
    return check

OPEN = "/health", "/ready", "/docs", "/redoc", "/openapi.json" # for load balancers and readers: no key

def given_key(
    headers: Headers,
) -> str: # empty when there is none
    "Prometheus, for one, sends no header of our own."
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key") or (token if scheme.lower() == "bearer" else "")

class KeyFirst:
    "An ASGI app that asks for a key before anything of a request is read: a stranger's body is not parsed."
    def __init__(self, app: ASGIApp, service: "Service"):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            keys, key = self.service.keys, given_key(Headers(scope=scope))
            scope["reco.role"] = ("admin" if not keys else keys.role(key)) if key or not keys else None
            if scope["reco.role"] is None:
                return await _problem(401, "Unauthorized", "a valid key is needed in the header X-API-Key, or as Authorization: Bearer",
                                      {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        await self.app(scope, receive, send)

class Bounded:
    "An ASGI app whose requests have bodies of at most `MAX_BODY` bytes, whether they say so or not."
    def __init__(self, app: ASGIApp): self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "DELETE"): return await self.app(scope, receive, send)
        said, seen = Headers(scope=scope).get("content-length", "0"), 0

        async def counting() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > MAX_BODY: raise TooLarge(413) # of FastAPI's own type: it takes any other for a body that cannot be read
            return message
        if not said.isdigit() or int(said) > MAX_BODY: return await (await _http(Request(scope), TooLarge(413)))(scope, receive, send)
        await self.app(scope, counting, send)

PLAIN = re.compile(rf"/recommendations/v1/([\s\S]{{1,{MAX_ID}}})")
FEW = re.compile(rb"(?:k=([1-9][0-9]{0,2}))?(?:^|&|$)(?:surface=for_you)?")

def plain_request(
    scope: Scope,  # of a request that `KeyFirst` let through
) -> RecommendationRequest|None: # None: FastAPI has to look at it
    "What nearly every request asks, and nothing else: a list for a shopper, perhaps its length. Raises `Refused` for a bad X-Request-ID."
    if scope["method"] != "GET" or scope.get("root_path") or scope["reco.role"] not in ("client", "admin"): return None
    path, query = PLAIN.fullmatch(scope["path"]), FEW.fullmatch(scope["query_string"])
    if not path or not query: return None
    k = int(query[1] or 5)
    return RecommendationRequest(path[1], k, request_id=request_id(Request(scope))) if k <= MAX_K else None

class PlainFirst:
    """An ASGI app that answers the plainest and most frequent request itself. FastAPI reads twelve parameters for it, which takes as long as
    finding a kept list; everything else, and every mistake, goes on to FastAPI, whose route says the same at greater length."""
    def __init__(self, app: ASGIApp, reply: Callable[[RecommendationRequest], Response], route: BaseRoute):
        self.app, self.reply, self.route = app, reply, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = None
        if scope["type"] == "http" and scope["path"].startswith("/recommendations/v1/"):
            try:
                asked = plain_request(scope)
                response = self.reply(asked) if asked else None
            except Refused as e: response = await _refused(Request(scope), e)
        if response is None: return await self.app(scope, receive, send)
        scope["route"] = self.route # for the figures
        await response(scope, receive, send)

def create_app(
    service: Service, # answers requests; read anew for each, so that it may swap its bundle
    echo: bool=True,  # whether answers are to carry X-Request-ID; Ray Serve adds it itself
) -> FastAPI:         # the whole HTTP contract
    "The FastAPI app, without Ray: Ray Serve runs it in production, a test client in tests."
    app = FastAPI(title="reco", version=reco.__version__, redirect_slashes=False, description=
                  "Recommendations for a shop. Every shopper gets an answer: an unknown one gets what is popular.")
    for error, handler in ((RequestValidationError, _invalid), (HTTPException, _http), (Refused, _refused), (Exception, _crash)):
        app.add_exception_handler(error, handler) # type: ignore[arg-type] # Starlette knows of no handler of one kind of error
    plain = _add_recommendations(app, service, echo)
    app.add_middleware(PlainFirst, reply=plain, route=next(r for r in app.routes if getattr(r, "operation_id", "") == "recommendations"))
    app.add_middleware(Bounded)
    app.add_middleware(KeyFirst, service=service)
    app.add_middleware(Metered, meter=service.meter) # outermost: what is refused counts too
    _add_events(app, service)
    _add_items(app, service)
    _add_operations(app, service)
    return app

def answered(
    service: Service,
    asked: RecommendationRequest,
    explain: bool=False,
) -> tuple[list[dict], dict[str, str], Shown]: # the items, headers that say how the answer came about, and what is to be noted of it
    "One answer; raises `Refused` for what cannot be meant."
    began = time.perf_counter()
    try: found, why = service.explained(asked) if explain else (service.recommend(asked), [])
    except RequestError as e: raise unprocessable(str(e)) from None
    shown = Shown(asked, found, time.time_ns()//1_000_000, 1000*(time.perf_counter() - began))
    headers = {"X-Bundle-ID": found.bundle_id}
    if found.fallback: headers["X-Fallback"] = "true"
    if found.without: headers["X-Degraded"] = ",".join(found.without)
    if found.kept: headers["X-Cache"] = "hit"
    if found.variant: headers["X-Variant"] = found.variant
    items = [{"item_id": x.item_id, "score": x.score} for x in found.items]
    return ([i | {"why": w} for i, w in zip(items, why, strict=True)] if explain else items), headers, shown

def noting(
    service: Service,
    lists: Sequence[Shown],
) -> BackgroundTask:
    "Write lists down and count them when their answer is sent: nobody waits for it, and what was refused was shown to nobody."
    async def note() -> None: # not in a thread: it takes less than to start one
        for n, x in enumerate(lists):
            if n: await asyncio.sleep(0) # a hundred lists of a batch are not to hold up the others
            service.note(x)
            service.meter.shown(x.asked.surface, x.asked.k, x.found)
    return BackgroundTask(note)

TOLD = {name: {"description": about, "schema": {"type": "string"}} for name, about in (
    ("X-Request-ID", "names the exposure: the one that was sent, or a new one"), ("X-Bundle-ID", "the model that answered"),
    ("X-Fallback", "true when nothing was known of the shopper, or of the page"),
    ("X-Degraded", "what failed or was late and was done without: store, names of candidate sources"), ("X-Cache", "hit when the list was made for an earlier request"),
    ("X-Variant", "experiment=variant, several with blanks between; missing outside of experiments"))}

def _add_recommendations(app: FastAPI, service: Service, echo: bool) -> Callable[[RecommendationRequest], Response]:
    "The routes that shoppers' pages ask; returns how a shopper's list is answered."
    # `async` and on purpose without awaiting: a request is a few ms of computing under the interpreter's lock, a
    # thread per request would only add hand-overs. The answer is written directly: a response model would check each
    # item again; `response_model` stays as the documentation, and tests hold the answers to it.
    client = [Depends(allowing(service, ("client", "admin")))]
    Role = Annotated[str, Depends(allowing(service, ("client", "admin")))]
    Explain = Annotated[bool, Query(description="say why, per item: sources, SHAP values and a sentence; for admins")]
    wrong: Responses = {401: _problem_docs("no valid key, where keys are set"), 422: _problem_docs("a parameter is out of range; the detail says what is allowed")}
    long = wrong | {413: _problem_docs("the body is too large")}
    told = wrong | {403: _problem_docs("explain needs a key of the role admin")}
    found: Callable[..., Responses] = lambda example=None: {200: {"description": "best first", "headers": TOLD, "content": {"application/json": {"example": example} if example else {}}}}
    K = Annotated[int, Query(ge=1, le=MAX_K, description="how many items at most")]
    Wanted = Annotated[str, Query(max_length=MAX_FILTER, description="which items may be shown: category:shoes,price<50")]
    Who = Annotated[str, Query(max_length=MAX_ID, description="the shopper, if known: the past counts too")]

    named = lambda name: {"X-Request-ID": name} if echo else {}

    def reply(head: dict, asked: RecommendationRequest, role: str = "admin", explain: bool = False) -> Response:
        if explain and role != "admin": raise Refused(403, "Forbidden", "explain needs a key of the role admin")
        items, headers, shown = answered(service, asked, explain)
        return Response(to_json(head | {"recommendations": items}), headers=headers | named(asked.request_id), media_type="application/json",
                        background=noting(service, [shown]))

    @app.get("/recommendations/v1/{user_id:text}", response_model=Recommendations, tags=["recommendations"],
             summary="Items for one shopper, best first", operation_id="recommendations",
             responses=told | found(EXAMPLE))
    async def recommendations(
        request: Request, role: Role,
        user_id: Annotated[str, PathParam(min_length=1, max_length=MAX_ID, examples=["user_123"],
                                          description="the shop's own id of the shopper, known or not; percent-encoded")],
        k: K = 5,
        surface: Annotated[Surface, Query(description="where in the shop")] = "for_you",
        context_item: Annotated[Sequence[Id], Query(max_length=MAX_BASKET, description="the item of the page, or each item of the cart")] = (),
        filter: Wanted = "",
        explain: Explain = False,
    ) -> Response:
        return reply({"user_id": user_id}, RecommendationRequest(user_id, k, None, (), surface, context_item, filter, request_id(request)), role, explain)

    @app.get("/similar/v1/{item_id:text}", response_model=SimilarItems, tags=["recommendations"],
             summary="Items like one item, best first", operation_id="similar", responses=told | found())
    async def similar(
        request: Request, role: Role,
        item_id: Annotated[str, PathParam(min_length=1, max_length=MAX_ID, examples=["product_45"],
                                          description="the item of the page, known or not; percent-encoded")],
        k: K = 5, user_id: Who = "", filter: Wanted = "", explain: Explain = False,
    ) -> Response:
        return reply({"item_id": item_id},
                     RecommendationRequest(user_id or None, k, None, (), "similar", [item_id], filter, request_id(request)), role, explain)

    @app.get("/bought-together/v1", response_model=BoughtTogether, tags=["recommendations"],
             summary="Items that go with a basket, best first", operation_id="bought_together", responses=told | found())
    async def bought_together(
        request: Request, role: Role,
        items: Annotated[str, Query(description="ids with commas between; a comma within an id is sent as %2C", examples=["product_45,product_7"])],  # noqa: ARG001
        k: K = 5, user_id: Who = "", filter: Wanted = "", explain: Explain = False,
    ) -> Response:
        basket = listed(request.scope["query_string"].decode("latin-1"), "items")
        return reply({"items": basket},
                     RecommendationRequest(user_id or None, k, None, (), "bought_together", basket, filter, request_id(request)), role, explain)

    @app.post("/recommendations/v1/session", response_model=ForSession, tags=["recommendations"], dependencies=client,
              summary="Items for an anonymous visit, best first", operation_id="session", responses=long | found())
    async def session(request: Request, body: Session) -> Response:
        now = datetime.now(UTC)
        return reply({}, RecommendationRequest(None, body.k, now, happened(body.events, now), body.surface, body.context_items,
                                                        body.filter, request_id(request)))

    @app.post("/recommendations/v1/batch", response_model=Answers, tags=["recommendations"], dependencies=client,
              summary="Several requests at once", operation_id="batch", responses=long)
    async def batch(request: Request, body: Batch) -> Response:
        name, answers, lists = request_id(request), [], []
        for n, r in enumerate(body.requests): # in a thread, one after the other: single requests go on in between
            asked = RecommendationRequest(r.user_id, r.k, None, (), r.surface, r.context_items, r.filter, f"{name}.{n}")
            try: items, _, shown = await run_in_threadpool(answered, service, asked)
            except Refused as e: raise Refused(e.status, e.title, f"requests[{n}]: {e.detail}") from None
            answers.append({"user_id": r.user_id, "recommendations": items})
            lists.append(shown)
        return Response(to_json({"answers": answers}), headers=named(name), media_type="application/json", background=noting(service, lists))

    @app.get("/why/v1/{user_id:text}", response_model=TakenApart, tags=["operations"], operation_id="why", dependencies=[Depends(allowing(service, ("admin",)))],
             summary="A list taken apart: every candidate, who proposed it, and what became of it", responses=wrong | {403: _problem_docs("not an admin's key")})
    async def why(
        request: Request,
        user_id: Annotated[str, PathParam(min_length=1, max_length=MAX_ID, description="the shop's own id of the shopper, known or not; percent-encoded")],
        k: K = 10,
        surface: Annotated[Surface, Query(description="where in the shop")] = "for_you",
        context_item: Annotated[Sequence[Id], Query(max_length=MAX_BASKET, description="the item of the page, or each item of the cart")] = (),
        filter: Wanted = "",
    ) -> Response: # it is shown to no shopper, so it is not written down
        asked = RecommendationRequest(user_id, k, None, (), surface, context_item, filter, request_id(request))
        try: found = await run_in_threadpool(service.taken_apart, asked)
        except RequestError as e: raise unprocessable(str(e)) from None
        return Response(to_json(found | {"user_id": user_id}), headers=named(asked.request_id), media_type="application/json")

    return lambda asked: reply({"user_id": asked.user_id}, asked)

def _add_events(app: FastAPI, service: Service) -> None:
    "The routes by which the shop says what happens, and what is to be forgotten."
    @app.post("/events/v1", response_model=Accepted, status_code=202, tags=["events"], operation_id="events",
              summary="Something happened: durable when this is answered, and the next list knows it",
              dependencies=[Depends(allowing(service, ("client", "admin")))],
              responses={401: _problem_docs("no valid key, where keys are set"), 413: _problem_docs("the body is too large"), 422: _problem_docs("an event breaks a rule; nothing of the request was taken"),
                         503: _problem_docs("the events could not be made durable: send all of them again")})
    async def events(body: Events) -> Response:
        try: n = await run_in_threadpool(service.take, [dict(e) for e in body])
        except NotTaken as e: raise unprocessable(str(e)) from None
        except BusError as e:
            log.error("events were not taken: %s", e)
            raise Refused(503, "Service Unavailable", "the events could not be made durable; send all of them again", {"Retry-After": "3"}) from None
        service.meter.events.inc(n)
        return Response(to_json({"accepted": n}), 202, media_type="application/json")

    @app.delete("/users/v1/{user_id:text}", response_model=Erased, tags=["events"], operation_id="erase",
                summary="Forget a shopper: everything until now, in the lake and online, for good",
                dependencies=[Depends(allowing(service, ("admin",)))],
                responses={401: _problem_docs("no valid key, where keys are set"), 403: _problem_docs("not an admin's key"),
                           422: _problem_docs("user_id is out of range"), 503: _problem_docs("not everything was removed: ask again")})
    async def erase(user_id: Annotated[str, PathParam(min_length=1, max_length=MAX_ID, description="the shop's own id of the shopper; percent-encoded")]) -> Response:
        try: rows, online = await run_in_threadpool(service.erase, user_id)
        except NotErased as e:
            log.error("a shopper was not erased everywhere: %s", e)
            raise Refused(503, "Service Unavailable", "not everything was removed; ask again", {"Retry-After": "3"}) from None
        return Response(to_json({"rows": rows, "online": online}), media_type="application/json")

def _add_items(app: FastAPI, service: Service) -> None:
    "The route by which the shop speaks of its items."
    @app.put("/items/v1/{item_id:text}", response_model=Changed, tags=["items"], operation_id="put_item",
             summary="An item is new, or its price, stock or words change: the next list knows it",
             dependencies=[Depends(allowing(service, ("admin",)))],
             responses={401: _problem_docs("no valid key, where keys are set"), 403: _problem_docs("not an admin's key"), 413: _problem_docs("the body is too large"),
                        422: _problem_docs("a field is out of range, or nothing is said"), 503: _problem_docs("it could not be written down: ask again")})
    async def put_item(item_id: Annotated[str, PathParam(min_length=1, max_length=MAX_ID, description="the shop's own id, known or not; percent-encoded")],
                       body: Change) -> Response:
        change = body.model_dump(exclude_none=True)
        if not change: raise unprocessable(f"nothing is said of the item: {', '.join(Change.model_fields)} can be")
        if "stock" in change: change["available"] = change.pop("stock") > 0
        if "category" in change: change["category_id"] = change.pop("category")
        try: version, changed, live = await run_in_threadpool(service.put_item, item_id, change)
        except StoreError as e:
            log.error("an item was not changed: %s", e)
            raise Refused(503, "Service Unavailable", "the change could not be written down; send it again", {"Retry-After": "3"}) from None
        service.meter.items.inc(changed)
        return Response(to_json({"item_id": item_id, "version": version, "changed": changed, "live": live}), media_type="application/json")

def _add_operations(app: FastAPI, service: Service) -> None:
    "The routes that operators and load balancers ask."
    @app.get("/health", response_model=Health, tags=["operations"], summary="Is it alive, and with which bundle")
    async def health() -> Response:
        return Response(to_json({"status": "ok", "bundle_id": service.bundle_id}), media_type="application/json")

    @app.get("/ready", response_model=Ready, tags=["operations"], summary="Can it answer, and with what")
    async def ready() -> Response:
        there, no = await run_in_threadpool(service.store_answers), service.refused
        found = {"status": "ready" if there else "degraded", "bundle_id": service.bundle_id, "store": "ok" if there else "down"}
        return Response(to_json(found | ({"refused": asdict(no)} if no else {})), media_type="application/json")

    @app.get("/metrics", tags=["operations"], summary="Figures for Prometheus", operation_id="metrics",
             dependencies=[Depends(allowing(service, ("client", "admin")))],
             responses={200: {"description": "Prometheus' text format", "content": {"text/plain": {}}}, 401: _problem_docs("no valid key, where keys are set")})
    async def metrics() -> Response:
        return Response(await run_in_threadpool(service.meter.text), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/bundle", tags=["operations"], summary="What is served: id, moment, versions, metrics", operation_id="bundle",
             dependencies=[Depends(allowing(service, ("admin",)))], responses={401: _problem_docs("no valid key"), 403: _problem_docs("not an admin's key")})
    async def bundle() -> Response:
        return Response(to_json(service.about), media_type="application/json")

    admin = [Depends(allowing(service, ("admin",)))]
    moved: Responses = {401: _problem_docs("no valid key"), 403: _problem_docs("not an admin's key"), 409: _problem_docs("there is nothing to go back to, or one bundle is served whatever is published"),
             413: _problem_docs("the body is too large"), 422: _problem_docs("the bundle was refused; the detail says why"), 503: _problem_docs("it could not be written down: ask again")}

    @app.put("/v1/bundle", response_model=Published, tags=["operations"], operation_id="publish", dependencies=admin,
             summary="Serve another bundle, after a trial; every replica does within seconds", responses=moved | {404: _problem_docs("there is no such bundle")})
    async def publish(body: Publish) -> Response: return await change(service.publish, body.bundle_id, body.who, body.why)

    @app.post("/v1/bundle/rollback", response_model=Published, tags=["operations"], operation_id="rollback", dependencies=admin,
              summary="Serve what was published before", responses=moved)
    async def rollback(body: Reason|None = None) -> Response:
        said = body or Reason()
        return await change(service.rollback, said.who, said.why)

async def change(act: Callable[..., Publication], *args: str) -> Response:
    "Publish or go back; what is wrong as a problem."
    try: done = await run_in_threadpool(act, *args)
    except UnknownBundle as e: raise Refused(404, "Not Found", str(e)) from None
    except (NothingBefore, NotFollowing) as e: raise Refused(409, "Conflict", str(e)) from None
    except BundleError as e: raise unprocessable(f"the bundle is refused: {str(e)[:1_000]}") from None
    except OSError as e:
        log.error("nothing was published: %s", e)
        raise Refused(503, "Service Unavailable", f"nothing was published: {e.strerror}", {"Retry-After": "3"}) from None
    return Response(to_json(asdict(done)), media_type="application/json")
