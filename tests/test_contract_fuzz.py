"""The whole contract under made-up requests, good and bad: schemathesis reads OpenAPI and asks the app of production."""

import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from conftest import END
from hypothesis import HealthCheck
from hypothesis import settings as effort

from app.contract import MAX_ID, Problem, create_app
from app.keys import SHORTEST, keys_for
from app.serve import Replica, open_intake
from reco.bundle import latest_bundle, load_bundle
from reco.data.histories import epoch_ms
from reco.data.stream import BusError
from reco.features.store import OnlineStore, open_store
from reco.redis_server import disconnect
from reco.settings import Serving, Settings

OPEN, GUARDED, CUT_OFF = Replica(), Replica(), Replica()  # filled by a fixture: OpenAPI is made before there is a bundle
KEYS = {"client": "client-" + "c" * SHORTEST, "admin": "admin-" + "a" * SHORTEST}
REAL: dict[str, list] = {"ts": [epoch_ms(END) - 1_000], "quantity": [1, 2], "price": [9.5]}  # a parameter → values that mean something here
ANSWERED: Counter[tuple[str, str, int]] = Counter()  # operation, kind of data, status
SAME = effort(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def contract(replica: Replica, *off: str, accepted: tuple[object, ...] = ("2xx", 401, 403, 404, 409, 422)) -> schemathesis.BaseSchema:
    """What the app says of itself, without some checks.

    Rules that no schema can express (a filter's grammar, for_you with context items, a moment that lies ahead) are a 422 too.
    A shopper may be called `session` or `batch`: then a GET finds something where OpenAPI has a POST only. Keys are asked for below.
    """
    off = ("allow_header_conformance", "unsupported_method", "ignored_auth", "missing_required_header", *off)
    config = {"seed": 7, "generation": {"deterministic": True, "with-security-parameters": False},
              "checks": {name: {"enabled": False} for name in off} | {"positive_data_acceptance": {"expected-statuses": list(accepted)}}}
    made = schemathesis.openapi.from_asgi("/openapi.json", create_app(replica), config=schemathesis.Config.from_dict(config))
    for part in ("path_parameters", "query", "body"): made.hook(f"map_{part}")(lambda _, given: sensible(given))
    return made


def sensible(given: object, name: str = "") -> object:
    """Every other allowed value becomes one that the shop knows: made-up ids are never met, made-up times are never right."""
    if isinstance(given, dict): return {k: sensible(v, k) for k, v in given.items()}
    if isinstance(given, list): return [sensible(v, name) for v in given]
    known, bits = REAL.get(name), zlib.crc32(repr(given).encode("utf-8", "replace"))
    if not known or type(given) is not type(known[0]) or bits % 2: return given
    allowed = 1 <= len(given) <= MAX_ID if isinstance(given, str) else 0 <= given < 2**31
    return known[bits // 2 % len(known)] if allowed else given


AS_IT_IS, WITH_KEYS = contract(OPEN), contract(GUARDED)
WITHOUT_REDIS = contract(CUT_OFF, "not_a_server_error", accepted=("2xx", 404, 409, 422, 503))


class Gone:
    """A bus that takes nothing."""
    def send(self, records: list) -> None: raise BusError("redis://:password@host does not answer")


def nowhere(settings: Settings, socket: str) -> OnlineStore:
    """An online store that cannot be reached."""
    online = settings.online.model_copy(update={"url": type(settings.online.url)(f"unix://{socket}")})
    return open_store(settings.model_copy(update={"online": online}), timeout_s=0.2)


@pytest.fixture(scope="module", autouse=True)
def shop(bundle_root: Path, trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What answers: a real bundle, a real Redis with everybody's past, a bus, a lake; once with keys, once with all but the bundle gone."""
    root = tmp_path_factory.mktemp("fuzz")
    settings = trained.settings.model_copy(update={"root": root})
    store, intake = open_store(settings), open_intake(settings)
    store.append(trained.sim.interactions)
    bundle = load_bundle(latest_bundle(bundle_root)) # of their own: what is said of items changes it
    for made in (OPEN, GUARDED): made.bundle, made.store, made.intake = bundle, store, intake
    GUARDED.keys = keys_for(Settings(serving=Serving(client_keys=KEYS["client"], admin_keys=KEYS["admin"])))
    CUT_OFF.bundle, CUT_OFF.store, CUT_OFF.intake = bundle, nowhere(settings, f"{root}/nobody.sock"), type(intake)(intake.encode, Gone())
    items, users = bundle.ids.ids.to_list(), sorted(store.user_ids())[:50]
    REAL.update(user_id=users, item_id=items, items=items, context_item=items, context_items=items)
    with pytest.MonkeyPatch.context() as env:
        env.setenv("RECO_LAKE_ROOT", str(root / "lake"))
        yield
    disconnect(intake.producer.client)
    store.close()


def by_turns(*these: object) -> object:
    """One after the other, from request to request."""
    return these[ANSWERED.total() % len(these)]


def asked(case: schemathesis.Case, **more) -> int:
    """The status of the answer, which is held to all that the contract says."""
    answer = case.call(**more)
    ANSWERED[case.operation.label, case.meta.generation.mode.value, answer.status_code] += 1
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == ["application/problem+json"], answer.text
        problem = Problem.model_validate_json(answer.content, strict=True)
        assert problem.status == answer.status_code and problem.detail and len(answer.content) < 4_000
        assert KEYS["client"] not in answer.text and "password" not in answer.text
    case.validate_response(answer, transport_kwargs=more)
    return answer.status_code


@AS_IT_IS.parametrize()
@SAME
def test_no_request_makes_it_fail_and_every_answer_is_the_documented_one(case):
    asked(case)


@WITH_KEYS.parametrize()
@effort(SAME, max_examples=5)
def test_with_keys_nobody_comes_in_without_one(case):
    status = asked(case, headers=by_turns({}, {"X-API-Key": KEYS["client"] + "x"}))
    assert status in (401, 404, 405) or case.path in ("/health", "/ready")


@WITH_KEYS.parametrize()
@effort(SAME, max_examples=5)
def test_with_a_key_one_may_do_what_the_role_may(case):
    role = by_turns(*KEYS)
    status = asked(case, headers={"X-API-Key": KEYS[role]})
    assert status != 401 and (role == "client" or status != 403)


@WITHOUT_REDIS.parametrize()
@effort(SAME, max_examples=5)
def test_without_redis_only_what_must_be_kept_is_refused(case):
    status = asked(case)
    assert status < 500 or status == 503 and case.method != "GET" and "recommendations" not in case.path


def test_the_requests_were_worth_asking():
    """Last: every operation was answered, but for publishing, since these replicas follow no folder of bundles."""
    taken = {label for label, _, status in ANSWERED if status < 300}
    refused = {label for label, _, status in ANSWERED if status == 422}
    assert {o.ok().label for o in AS_IT_IS.get_all_operations()} - taken <= {"PUT /v1/bundle", "POST /v1/bundle/rollback"} and len(refused) > 6
