"""The only HTTP client of the endpoint: the Streamlit app, the demo and the tests ask through it. Each call is described once, and made by
`Client`, which waits, or `AsyncClient`, which is awaited."""
import asyncio
import inspect
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, get_args
from urllib.parse import quote

import httpx


class EndpointError(RuntimeError):
    "The endpoint gave no usable answer; the message says why."

class EndpointDown(EndpointError):
    "Nobody answered at the address."

class RequestRefused(EndpointError):
    "The endpoint refused the request (4xx): asking again will not help."

class NotAllowed(RequestRefused):
    "No key was sent, or not one that may do this (401, 403)."

@dataclass(frozen=True)
class Why:
    "Where an item came from, and why it stands where it stands."
    reason: str                # a sentence
    because: tuple[str, ...]   # item_id: on which it rests
    sources: dict[str, int]    # source → the place that it gave the item, 1 is best
    log_odds: float|None       # base + contributions + rest; None where no ranker answered
    base: float|None
    contributions: tuple[dict, ...] # feature, meaning, value, log_odds; the strongest first
    rest: float

@dataclass(frozen=True)
class Scored:
    "One recommended item."
    item_id: str
    score: float # 0 to 1
    why: Why|None = None # where it was asked for

@dataclass(frozen=True)
class Recommended:
    "A list, best first, and how it came about."
    items: list[Scored]
    request_id: str                # of the exposure: events that come of it carry it
    bundle_id: str
    fallback: bool = False         # nothing was known of the shopper, or of the page
    without: tuple[str, ...] = ()  # what failed or was late and was done without
    kept: bool = False             # it was made for an earlier request
    variant: str = ""              # experiment=variant; empty outside of experiments
    seconds: float = 0.0           # until it was here

    @property
    def ids(self) -> list[str]: return [x.item_id for x in self.items]

@dataclass(frozen=True)
class Anatomy:
    "A list taken apart, as `/why/v1` tells it."
    candidates: list[dict] = field(repr=False) # item_id, sources, score, place, fate, slot, moved
    items: list[Scored]                        # the list, each item with its why
    about: dict = field(repr=False)            # bundle_id, variant, fallback, without, seconds, past, proposed, dropped, count

def segment(
    text: str, # any text
) -> str:      # one path segment
    "Percent-encoded, dots too: `..` as a segment would be taken for the folder above."
    return quote(text, safe="").replace(".", "%2E")

def _reason(
    response: httpx.Response, # an answer with an error status
) -> str:                     # the `detail` of a problem+json, else the start of the body
    try: return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError): return response.text.strip()[:200] or response.reason_phrase

def _scored(
    x: dict, # of `recommendations`
) -> Scored: # raises `KeyError`, `TypeError` or `ValueError` for what is none
    w = x.get("why")
    return Scored(str(x["item_id"]), float(x["score"]), w and Why(str(w["reason"]), tuple(w["because"]), dict(w["sources"]), w["log_odds"], w["base"],
                                                                  tuple(w["contributions"]), float(w["rest"])))

# ---- one call, whoever makes it ---------------------------------------------------------------------------------------

P = ParamSpec("P")
T = TypeVar("T")
TRIES, FIRST_S, LONGEST_S = 3, 0.1, 2.0 # of what can be asked again; pauses double, and half of each is drawn
AGAIN = 429, 502, 503, 504              # busy, or on its way back

@dataclass(frozen=True)
class Answer:
    "A good answer of the endpoint."
    response: httpx.Response
    where: str     # address and path, for messages
    seconds: float # until it was here

    def json(self) -> dict:
        "One object; raises `EndpointError` for anything else."
        try: body = self.response.json()
        except ValueError: raise EndpointError(f"{self.where} did not answer with JSON: {self.response.text[:80]!r}") from None
        if not isinstance(body, dict): raise EndpointError(f"{self.where} answered {str(body)[:80]!r}, not an object")
        return body

@dataclass(frozen=True)
class Call(Generic[T]):
    "What is asked, and how the answer is read."
    method: str
    path: str                    # below the address
    read: Callable[[Answer], T]  # raises `EndpointError` for an answer that is not our endpoint's
    said: Any = None             # the query of a GET, the body of a POST
    request_id: str = ""
    again: bool = True           # whether asking twice does no harm

    def request(self) -> dict: # of httpx's `request`
        "The call as HTTP."
        headers = {"X-Request-ID": self.request_id} if self.request_id else {}
        return {"method": self.method, "url": self.path, "headers": headers} | ({"params": self.said} if self.method == "GET" else {"json": self.said})

    def wait(self,
        tries: int,                                  # so far, this one included
        got: httpx.Response|httpx.TransportError,    # of this try
        address: str, timeout_s: float,              # for messages
    ) -> float|None: # seconds until the next try; None: this is the answer, good or bad
        "Whether to ask again; raises `EndpointDown` where nobody answered."
        last = not self.again or tries >= TRIES
        if isinstance(got, httpx.TimeoutException): raise EndpointDown(f"{address} did not answer within {timeout_s:g} s") from None
        if isinstance(got, httpx.ConnectError): raise EndpointDown(f"{address} cannot be reached: {got}") from None
        if isinstance(got, httpx.TransportError): # a connection that was kept and is gone by now
            if last: raise EndpointDown(f"{address} broke off: {got}") from None
            return pause(tries)
        return None if last or got.status_code not in AGAIN else pause(tries, got.headers.get("Retry-After", ""))

    def result(self, response: httpx.Response, address: str, seconds: float) -> T:
        "What the answer says; raises `NotAllowed`, `RequestRefused` or `EndpointError`."
        where, status = f"{address}{self.path}", response.status_code
        if status in (401, 403): raise NotAllowed(f"{status}: {_reason(response)}")
        if response.is_client_error: raise RequestRefused(f"{status}: {_reason(response)}")
        if not response.is_success: raise EndpointError(f"{where} answered {status}: {_reason(response)}")
        return self.read(Answer(response, where, seconds))

def pause(
    tries: int,      # so far, 1 and more
    said: str = "",  # the answer's Retry-After
) -> float:          # seconds
    "How long to wait: what the endpoint says, or twice as long as before; drawn, so that many clients do not come back at once."
    longest = min(float(said), LONGEST_S) if said.isdigit() else min(FIRST_S*2**(tries - 1), LONGEST_S)
    return longest*random.uniform(0.5, 1)

def _query(
    **said: object,
) -> dict: # without what is as the endpoint takes it anyway
    "The query of a GET."
    return {n: str(v).lower() if isinstance(v, bool) else v for n, v in said.items() if v not in ("", False, "for_you", [])}

# ---- lists ------------------------------------------------------------------------------------------------------------

def _listed(path: str, said: dict|None, request_id: str, method: str = "GET") -> Call[Recommended]:
    def read(a: Answer) -> Recommended:
        body, headers = a.json(), a.response.headers
        with _understood(a.where, body): items = [_scored(x) for x in body["recommendations"]]
        return Recommended(items, headers.get("X-Request-ID", request_id), headers.get("X-Bundle-ID", ""), headers.get("X-Fallback") == "true",
                           tuple(x for x in headers.get("X-Degraded", "").split(",") if x), headers.get("X-Cache") == "hit", headers.get("X-Variant", ""), a.seconds)
    return Call(method, path, read, said, request_id)

def _recommend(
    user_id: str,                     # the shop's own id, known or not
    k: int = 5,                       # 1 to 100
    surface: str = "for_you",         # or similar, or bought_together
    context_items: Sequence[str] = (), # the item of the page, or what is in the cart; for the latter two
    filter: str = "",                 # category:shoes,price<50
    explain: bool = False,            # with a why per item; needs an admin's key where keys are set
    request_id: str = "",             # names the exposure; empty: the endpoint names it
) -> Call[Recommended]:
    "What to show this shopper; raises `EndpointDown`, `RequestRefused` or `EndpointError`."
    said = _query(k=k, surface=surface, context_item=list(context_items), filter=filter, explain=explain)
    return _listed(f"/recommendations/v1/{segment(user_id)}", said, request_id)

def _recommendations(
    user_id: str,
    k: int = 5,
) -> Call[list[Scored]]: # best first
    "The items of `recommend`."
    whole = _recommend(user_id, k)
    return Call(whole.method, whole.path, lambda a: whole.read(a).items, whole.said, whole.request_id, whole.again)

def _similar(
    item_id: str,          # of the page
    k: int = 5,
    user_id: str = "",     # the shopper, if known: the past counts too
    filter: str = "",
    explain: bool = False,
    request_id: str = "",
) -> Call[Recommended]:
    "What resembles an item; raises as `recommend`."
    return _listed(f"/similar/v1/{segment(item_id)}", _query(k=k, user_id=user_id, filter=filter, explain=explain), request_id)

def _bought_together(
    items: Sequence[str],  # of the cart
    k: int = 5,
    user_id: str = "",
    filter: str = "",
    explain: bool = False,
    request_id: str = "",
) -> Call[Recommended]:
    "What goes with a basket; raises as `recommend`."
    # the commas between are commas, one within an id is %2C: httpx would encode them alike
    path = f"/bought-together/v1?items={','.join(quote(i, safe='') for i in items)}"
    return _listed(path + "".join(f"&{n}={quote(str(v), safe='')}" for n, v in _query(k=k, user_id=user_id, filter=filter, explain=explain).items()), None, request_id)

def _session(
    events: Sequence[dict],            # item_id, event, perhaps ts; oldest first
    k: int = 5,
    surface: str = "for_you",
    context_items: Sequence[str] = (),
    filter: str = "",
    request_id: str = "",
) -> Call[Recommended]:
    "What to show a visit without an id; raises as `recommend`."
    body = {"k": k, "surface": surface, "context_items": list(context_items), "filter": filter, "events": list(events)}
    return _listed("/recommendations/v1/session", body, request_id, "POST")

ABOUT = "bundle_id", "variant", "fallback", "without", "seconds", "past", "proposed", "dropped", "count" # of an `Anatomy`

def _why(
    user_id: str,
    k: int = 10,
    surface: str = "for_you",
    context_items: Sequence[str] = (),
    filter: str = "",
    request_id: str = "",              # of a list that was shown: exploration is drawn as it was then
) -> Call[Anatomy]:
    "A list taken apart; raises as `recommend`, and `NotAllowed` without an admin's key where keys are set."
    def read(a: Answer) -> Anatomy:
        body = a.json()
        with _understood(a.where, body):
            return Anatomy(list(body["candidates"]), [_scored(x) for x in body["recommendations"]], {n: body[n] for n in ABOUT})
    return Call("GET", f"/why/v1/{segment(user_id)}", read, _query(k=k, surface=surface, context_item=list(context_items), filter=filter), request_id)

# ---- what happens -----------------------------------------------------------------------------------------------------

def _send(
    events: Sequence[dict], # the fields of data/schema/user_event.avsc; event_id makes sending again harmless
) -> Call[int]:             # events that are safe now
    "Tell what happened; raises `EndpointDown`, `RequestRefused` or `EndpointError`, and then send all of them again."
    return Call("POST", "/events/v1", lambda a: int(a.json().get("accepted", 0)), list(events))

# ---- operations -------------------------------------------------------------------------------------------------------

def _bundle_id() -> Call[str]: # the model bundle that answers
    "What is served, from `/health`; raises `EndpointDown` or `EndpointError`."
    return Call("GET", "/health", lambda a: str(a.json().get("bundle_id", "")))

def _ready() -> Call[dict]: # status, bundle_id, store, perhaps refused
    "Whether requests can be answered, and with what."
    return Call("GET", "/ready", Answer.json)

def _metrics() -> Call[str]: # Prometheus' text format
    "The endpoint's figures."
    return Call("GET", "/metrics", lambda a: a.response.text)

def _bundle() -> Call[dict]: # id, moment, versions, metrics
    "What is served, from its manifest; raises `NotAllowed` without an admin's key, where keys are set."
    return Call("GET", "/v1/bundle", Answer.json)

def _rollback(
    who: str = "",
    why: str = "",
) -> Call[dict]: # bundle_id, before, at, who, why, back
    "Serve what was published before; raises `RequestRefused` when there is nothing, `NotAllowed` without an admin's key."
    return Call("POST", "/v1/bundle/rollback", Answer.json, {"who": who, "why": why}, again=False) # done twice it would go back twice

# ---- who makes the calls ----------------------------------------------------------------------------------------------

def _shown(method: Any, described: Callable) -> Callable: # the same method, for `help` and editors
    "A method that reads as what it was made of."
    wraps(described, updated=())(method)
    del method.__wrapped__
    method.__name__ = described.__name__.removeprefix("_")
    found = inspect.signature(described)
    method.__signature__ = found.replace(return_annotation=get_args(found.return_annotation)[0], parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *(
        p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in found.parameters.values())])
    return method

def blocking(described: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]: # a method of `Client`
    "A call that waits for its answer."
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T: return self.make(described(*args, **kwargs))
    return _shown(method, described)

def awaited(described: Callable[P, Call[T]]) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]: # a method of `AsyncClient`
    "A call that is awaited."
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T: return await self.make(described(*args, **kwargs))
    return _shown(method, described)

def _http(
    address: str, timeout_s: float, key: str,
) -> dict: # of httpx's clients
    "Proxies of the environment are for the internet, not for a service of the shop's own."
    return {"base_url": address, "timeout": timeout_s, "trust_env": False, "headers": {"X-API-Key": key} if key else {}}

class Client:
    "Asks one endpoint; keeps its connections, closes them as a context manager; safe to use from many threads."
    def __init__(self,
        address: str="http://127.0.0.1:8000", # scheme, host and port
        timeout_s: float=5,                   # for connecting, and for each answer
        key: str="",                          # X-API-Key; empty where none is needed
    ):
        self.address, self.timeout_s = address.rstrip("/"), timeout_s
        self._http = httpx.Client(**_http(self.address, timeout_s, key))

    def __enter__(self) -> "Client": return self

    def __exit__(self, kind: type[BaseException]|None, error: BaseException|None, trace: TracebackType|None) -> None:
        self.close()

    def close(self) -> None: self._http.close()

    def make(self,
        call: Call[T],
    ) -> T: # what the call reads
        "Ask, again where that does no harm; raises `EndpointDown`, `RequestRefused` or `EndpointError`."
        began, tries = time.perf_counter(), 0
        while True:
            tries += 1
            got: httpx.Response|httpx.TransportError
            try: got = self._http.request(**call.request())
            except httpx.TransportError as e: got = e
            wait = call.wait(tries, got, self.address, self.timeout_s)
            if wait is None:
                assert isinstance(got, httpx.Response) # of anything else `wait` makes an error
                return call.result(got, self.address, time.perf_counter() - began)
            time.sleep(wait)

    recommend, recommendations, similar = blocking(_recommend), blocking(_recommendations), blocking(_similar)
    bought_together, session, why = blocking(_bought_together), blocking(_session), blocking(_why)
    send = blocking(_send)
    bundle_id, ready, metrics = blocking(_bundle_id), blocking(_ready), blocking(_metrics)
    bundle, rollback = blocking(_bundle), blocking(_rollback)

class AsyncClient:
    "`Client` for one event loop: the same calls, awaited; as many at the same time as are begun, 100 connections at most."
    def __init__(self,
        address: str="http://127.0.0.1:8000", # scheme, host and port
        timeout_s: float=5,                   # for connecting, and for each answer
        key: str="",                          # X-API-Key; empty where none is needed
    ):
        self.address, self.timeout_s = address.rstrip("/"), timeout_s
        self._http = httpx.AsyncClient(**_http(self.address, timeout_s, key))

    async def __aenter__(self) -> "AsyncClient": return self

    async def __aexit__(self, kind: type[BaseException]|None, error: BaseException|None, trace: TracebackType|None) -> None:
        await self.close()

    async def close(self) -> None: await self._http.aclose()

    async def make(self,
        call: Call[T],
    ) -> T: # what the call reads
        "As `Client.make`; a task that is cancelled asks no more."
        began, tries = time.perf_counter(), 0
        while True:
            tries += 1
            got: httpx.Response|httpx.TransportError
            try: got = await self._http.request(**call.request())
            except httpx.TransportError as e: got = e
            wait = call.wait(tries, got, self.address, self.timeout_s)
            if wait is None:
                assert isinstance(got, httpx.Response) # of anything else `wait` makes an error
                return call.result(got, self.address, time.perf_counter() - began)
            await asyncio.sleep(wait)

    recommend, recommendations, similar = awaited(_recommend), awaited(_recommendations), awaited(_similar)
    bought_together, session, why = awaited(_bought_together), awaited(_session), awaited(_why)
    send = awaited(_send)
    bundle_id, ready, metrics = awaited(_bundle_id), awaited(_ready), awaited(_metrics)
    bundle, rollback = awaited(_bundle), awaited(_rollback)

class _understood:
    "What the block cannot read in a body is an `EndpointError`."
    def __init__(self, where: str, body: dict): self.where, self.body = where, body

    def __enter__(self) -> None: return None

    def __exit__(self, kind: type[BaseException]|None, error: BaseException|None, trace: TracebackType|None) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, AttributeError)):
            raise EndpointError(f"{self.where} is not our endpoint: {type(error).__name__} {error} in {str(self.body)[:80]}") from None
