"""The only HTTP client of the endpoint: the Streamlit app, the demo and the tests ask through it."""
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import quote

import httpx


class EndpointError(RuntimeError):
    "The endpoint gave no usable answer; the message says why."

class EndpointDown(EndpointError):
    "Nobody answered at the address."

class RequestRefused(EndpointError):
    "The endpoint refused the request (4xx): asking again will not help."

@dataclass(frozen=True)
class Scored:
    "One recommended item."
    item_id: str
    score: float # 0 to 1

def _path(
    user_id: str, # any text
) -> str:         # one path segment
    "Percent-encoded, dots too: `..` as a segment would be taken for the folder above."
    return quote(user_id, safe="").replace(".", "%2E")

def _reason(
    response: httpx.Response, # an answer with an error status
) -> str:                     # the `detail` of a problem+json, else the start of the body
    try: return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError): return response.text.strip()[:200] or response.reason_phrase

class Client:
    "Asks one endpoint; keeps its connections, closes them as a context manager."
    def __init__(self,
        address: str="http://127.0.0.1:8000", # scheme, host and port
        timeout_s: float=5,                   # for connecting, and for each answer
    ):
        self.address = address.rstrip("/")
        # proxies of the environment are for the internet, not for a service of the shop's own
        self._http = httpx.Client(base_url=self.address, timeout=timeout_s, trust_env=False)

    def __enter__(self) -> "Client": return self

    def __exit__(self, kind: type[BaseException]|None, error: BaseException|None, trace: TracebackType|None) -> None:
        self.close()

    def close(self) -> None: self._http.close()

    def _get(self,
        path: str,                           # path below the address
        params: dict[str, int]|None = None,  # query
    ) -> dict:                               # the JSON body
        "One GET; raises `EndpointDown`, `RequestRefused` or `EndpointError`."
        try: response = self._http.get(path, params=params)
        except httpx.TimeoutException:
            raise EndpointDown(f"{self.address} did not answer within {self._http.timeout.read:g} s") from None
        except httpx.TransportError as e: raise EndpointDown(f"{self.address} cannot be reached: {e}") from None
        if response.is_client_error: raise RequestRefused(f"{response.status_code}: {_reason(response)}")
        if not response.is_success: raise EndpointError(f"{self.address}{path} answered {response.status_code}: {_reason(response)}")
        try: body = response.json()
        except ValueError: raise EndpointError(f"{self.address}{path} did not answer with JSON: {response.text[:80]!r}") from None
        if not isinstance(body, dict): raise EndpointError(f"{self.address}{path} answered {str(body)[:80]!r}, not an object")
        return body

    def recommendations(self,
        user_id: str, # the shop's own id, known or not
        k: int = 5,   # 1 to 100
    ) -> list[Scored]: # best first
        "What to show this shopper; raises `EndpointDown`, `RequestRefused` (bad `k`) or `EndpointError`."
        path = f"/recommendations/v1/{_path(user_id)}"
        body = self._get(path, {"k": k})
        try: return [Scored(str(x["item_id"]), float(x["score"])) for x in body["recommendations"]]
        except (KeyError, TypeError, ValueError) as e:
            raise EndpointError(f"{self.address}{path} is not our endpoint: {type(e).__name__} {e} in {str(body)[:80]}") from None

    def bundle_id(self) -> str: # the model bundle that answers
        "What is served, from `/health`; raises `EndpointDown` or `EndpointError`."
        return str(self._get("/health").get("bundle_id", ""))
