"""The only HTTP client of the endpoint: the Streamlit app, the demo and the tests ask through it."""
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
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

TRIES, FIRST_S, LONGEST_S = 3, 0.1, 2.0 # of what can be asked again; pauses double, and half of each is drawn
AGAIN = 429, 502, 503, 504              # busy, or on its way back

def pause(
    tries: int,      # so far, 1 and more
    said: str = "",  # the answer's Retry-After
) -> float:          # seconds
    "How long to wait: what the endpoint says, or twice as long as before; drawn, so that many clients do not come back at once."
    longest = min(float(said), LONGEST_S) if said.isdigit() else min(FIRST_S*2**(tries - 1), LONGEST_S)
    return longest*random.uniform(0.5, 1)

class Client:
    "Asks one endpoint; keeps its connections, closes them as a context manager; safe to use from many threads."
    def __init__(self,
        address: str="http://127.0.0.1:8000", # scheme, host and port
        timeout_s: float=5,                   # for connecting, and for each answer
        key: str="",                          # X-API-Key; empty where none is needed
    ):
        self.address = address.rstrip("/")
        # proxies of the environment are for the internet, not for a service of the shop's own
        self._http = httpx.Client(base_url=self.address, timeout=timeout_s, trust_env=False, headers={"X-API-Key": key} if key else {})

    def __enter__(self) -> "Client": return self

    def __exit__(self, kind: type[BaseException]|None, error: BaseException|None, trace: TracebackType|None) -> None:
        self.close()

    def close(self) -> None: self._http.close()

    # ---- lists

    def recommend(self,
        user_id: str,                     # the shop's own id, known or not
        k: int = 5,                       # 1 to 100
        surface: str = "for_you",         # or similar, or bought_together
        context_items: Sequence[str] = (), # the item of the page, or what is in the cart; for the latter two
        filter: str = "",                 # category:shoes,price<50
        explain: bool = False,            # with a why per item; needs an admin's key where keys are set
        request_id: str = "",             # names the exposure; empty: the endpoint names it
    ) -> Recommended:
        "What to show this shopper; raises `EndpointDown`, `RequestRefused` or `EndpointError`."
        return self._list(f"/recommendations/v1/{segment(user_id)}", _query(k=k, surface=surface, context_item=list(context_items), filter=filter, explain=explain), request_id)

    def recommendations(self, user_id: str, k: int = 5) -> list[Scored]: # best first
        "The items of `recommend`."
        return self.recommend(user_id, k).items

    def similar(self, item_id: str, k: int = 5, user_id: str = "", filter: str = "", explain: bool = False, request_id: str = "") -> Recommended:
        "What resembles an item; raises as `recommend`."
        return self._list(f"/similar/v1/{segment(item_id)}", _query(k=k, user_id=user_id, filter=filter, explain=explain), request_id)

    def bought_together(self, items: Sequence[str], k: int = 5, user_id: str = "", filter: str = "", explain: bool = False, request_id: str = "") -> Recommended:
        "What goes with a basket; raises as `recommend`."
        # the commas between are commas, one within an id is %2C: httpx would encode them alike
        path = f"/bought-together/v1?items={','.join(quote(i, safe='') for i in items)}"
        return self._list(path + "".join(f"&{n}={quote(str(v), safe='')}" for n, v in _query(k=k, user_id=user_id, filter=filter, explain=explain).items()), None, request_id)

    def session(self,
        events: Sequence[dict],            # item_id, event, perhaps ts; oldest first
        k: int = 5,
        surface: str = "for_you",
        context_items: Sequence[str] = (),
        filter: str = "",
        request_id: str = "",
    ) -> Recommended:
        "What to show a visit without an id; raises as `recommend`."
        body = {"k": k, "surface": surface, "context_items": list(context_items), "filter": filter, "events": list(events)}
        return self._list("/recommendations/v1/session", body, request_id, "POST")

    def why(self,
        user_id: str,
        k: int = 10,
        surface: str = "for_you",
        context_items: Sequence[str] = (),
        filter: str = "",
        request_id: str = "",              # of a list that was shown: exploration is drawn as it was then
    ) -> Anatomy:
        "A list taken apart; raises as `recommend`, and `NotAllowed` without an admin's key where keys are set."
        body, _, _ = self._json("GET", f"/why/v1/{segment(user_id)}", _query(k=k, surface=surface, context_item=list(context_items), filter=filter), request_id)
        with _understood(f"{self.address}/why/v1", body):
            return Anatomy(list(body["candidates"]), [_scored(x) for x in body["recommendations"]],
                           {n: body[n] for n in ("bundle_id", "variant", "fallback", "without", "seconds", "past", "proposed", "dropped", "count")})

    # ---- what happens

    def send(self,
        events: Sequence[dict], # the fields of data/schema/user_event.avsc; event_id makes sending again harmless
    ) -> int:                   # events that are safe now
        "Tell what happened; raises `EndpointDown`, `RequestRefused` or `EndpointError`, and then send all of them again."
        return int(self._json("POST", "/events/v1", list(events))[0].get("accepted", 0))

    # ---- operations

    def bundle_id(self) -> str: # the model bundle that answers
        "What is served, from `/health`; raises `EndpointDown` or `EndpointError`."
        return str(self._json("GET", "/health")[0].get("bundle_id", ""))

    def ready(self) -> dict: # status, bundle_id, store, perhaps refused
        "Whether requests can be answered, and with what."
        return self._json("GET", "/ready")[0]

    def metrics(self) -> str: # Prometheus' text format
        "The endpoint's figures."
        return self._answer("GET", "/metrics").text

    def bundle(self) -> dict: # id, moment, versions, metrics
        "What is served, from its manifest; raises `NotAllowed` without an admin's key, where keys are set."
        return self._json("GET", "/v1/bundle")[0]

    def rollback(self, who: str = "", why: str = "") -> dict: # bundle_id, before, at, who, why, back
        "Serve what was published before; raises `RequestRefused` when there is nothing, `NotAllowed` without an admin's key."
        return self._json("POST", "/v1/bundle/rollback", {"who": who, "why": why}, again=False)[0]

    # ---- asking

    def _list(self, path: str, said: dict|None, request_id: str, method: str = "GET") -> Recommended:
        body, headers, seconds = self._json(method, path, said, request_id)
        with _understood(f"{self.address}{path}", body): items = [_scored(x) for x in body["recommendations"]]
        return Recommended(items, headers.get("X-Request-ID", request_id), headers.get("X-Bundle-ID", ""), headers.get("X-Fallback") == "true",
                           tuple(x for x in headers.get("X-Degraded", "").split(",") if x), headers.get("X-Cache") == "hit", headers.get("X-Variant", ""), seconds)

    def _json(self,
        method: str,
        path: str,                # below the address
        said: Any = None,         # the query of a GET, the body of a POST
        request_id: str = "",
        again: bool = True,       # whether asking twice does no harm
    ) -> tuple[dict, httpx.Headers, float]: # the JSON body, the headers, seconds until they were here
        "One object; raises `EndpointDown`, `RequestRefused` or `EndpointError`."
        began = time.perf_counter()
        response = self._answer(method, path, said, request_id, again)
        try: body = response.json()
        except ValueError: raise EndpointError(f"{self.address}{path} did not answer with JSON: {response.text[:80]!r}") from None
        if not isinstance(body, dict): raise EndpointError(f"{self.address}{path} answered {str(body)[:80]!r}, not an object")
        return body, response.headers, time.perf_counter() - began

    def _answer(self, method: str, path: str, said: Any = None, request_id: str = "", again: bool = True) -> httpx.Response:
        headers = {"X-Request-ID": request_id} if request_id else {}
        for tries in range(1, TRIES + 1 if again else 2):
            last = tries == TRIES or not again
            try: response = self._http.request(method, path, headers=headers, **({"params": said} if method == "GET" else {"json": said}))
            except httpx.TimeoutException:
                raise EndpointDown(f"{self.address} did not answer within {self._http.timeout.read:g} s") from None
            except httpx.ConnectError as e: raise EndpointDown(f"{self.address} cannot be reached: {e}") from None
            except httpx.TransportError as e: # a connection that was kept and is gone by now
                if last: raise EndpointDown(f"{self.address} broke off: {e}") from None
                response = None
            if response is not None and (last or response.status_code not in AGAIN): break
            time.sleep(pause(tries, response.headers.get("Retry-After", "") if response is not None else ""))
        if response.status_code in (401, 403): raise NotAllowed(f"{response.status_code}: {_reason(response)}")
        if response.is_client_error: raise RequestRefused(f"{response.status_code}: {_reason(response)}")
        if not response.is_success: raise EndpointError(f"{self.address}{path} answered {response.status_code}: {_reason(response)}")
        return response

def _query(
    **said: object,
) -> dict: # without what is as the endpoint takes it anyway
    "The query of a GET."
    return {n: str(v).lower() if isinstance(v, bool) else v for n, v in said.items() if v not in ("", False, "for_you", [])}

class _understood:
    "What the block cannot read in a body is an `EndpointError`."
    def __init__(self, where: str, body: dict): self.where, self.body = where, body

    def __enter__(self) -> None: return None

    def __exit__(self, kind: type[BaseException]|None, error: BaseException|None, trace: TracebackType|None) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, AttributeError)):
            raise EndpointError(f"{self.where} is not our endpoint: {type(error).__name__} {error} in {str(self.body)[:80]}") from None
