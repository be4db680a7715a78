"""The HTTP contract, on the app itself: no Ray, no network."""
import json
import os
import signal
import string
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app.contract import MAX_ID, create_app
from app.keys import Keys
from app.meter import Meter
from app.serve import Replica
from app.shown import Shown
from reco.bundle import BundleError, ModelBundle, latest_bundle
from reco.features.store import OnlineStore, open_store
from reco.pipeline import recommend
from reco.request import RecommendationRequest, RecommendationResponse, ScoredItem


@pytest.fixture(scope="module")
def http(bundle: ModelBundle, store: OnlineStore) -> TestClient:
    replica = Replica()
    replica.bundle, replica.store = bundle, store
    return TestClient(create_app(replica))

def ask(http: TestClient, user_id: str, query: str = ""):
    return http.get(f"/recommendations/v1/{quote(user_id, safe='').replace('.', '%2E')}{query}")

@pytest.fixture(scope="module")
def user(store: OnlineStore) -> str: # with a past
    return next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)

def test_the_body_is_what_the_contract_says_and_nothing_more(http, bundle, user):
    answer = ask(http, user, "?k=5")
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["user_id", "recommendations"] and body["user_id"] == user
    assert len(body["recommendations"]) == 5
    assert all(list(x) == ["item_id", "score"] for x in body["recommendations"])
    scores, items = ([x[key] for x in body["recommendations"]] for key in ("score", "item_id"))
    assert all(0 <= s <= 1 for s in scores) and scores == sorted(scores, reverse=True)
    assert len(set(items)) == 5 and set(items) <= set(bundle.items["item_id"])

def test_it_answers_with_what_the_pipeline_recommends(http, bundle, store, user):
    wanted = recommend(RecommendationRequest(user_id=user, k=7), bundle, store).items
    assert wanted != recommend(RecommendationRequest(user_id=user, k=7), bundle).items # the store counts
    assert [x["item_id"] for x in ask(http, user, "?k=7").json()["recommendations"]] == [x.item_id for x in wanted]

def test_five_items_unless_asked_for_more_or_fewer(http, user):
    assert [len(ask(http, user, q).json()["recommendations"]) for q in ("", "?k=1", "?k=12")] == [5, 1, 12]

def test_an_unknown_shopper_gets_what_any_unknown_shopper_gets(http):
    one, other = (ask(http, u, "?k=10").json()["recommendations"] for u in ("nobody-knows-me", "nor-me"))
    assert one == other and len(one) == 10

@pytest.mark.parametrize("k", ["0", "101", "-1", "2.5", "abc", "", "1e3", "9" * 5000, "5 6", "NaN"])
def test_a_bad_k_is_told_what_is_allowed(http, k):
    answer = http.get("/recommendations/v1/u", params={"k": k})
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 422
    assert answer.json()["detail"].startswith("k must be a whole number from 1 to 100, not ")
    assert len(answer.content) < 300 # a long value is not sent back

@pytest.mark.parametrize("user_id", ["a/b", "/", "..", ".", "a/../b", "josé", "🛒", "a\nb", "\n", "\x00", "a\x1b[0m", "a b", "?k=3",
                                     "#x", "'; --", "<b>", "\ufeff", "\u202e", "x" * MAX_ID])
def test_any_id_comes_back_as_it_was_sent(http, user_id):
    answer = ask(http, user_id, "?k=2")
    assert answer.status_code == 200 and answer.json()["user_id"] == user_id and len(answer.json()["recommendations"]) == 2

@pytest.mark.parametrize("user_id", ["", "x" * (MAX_ID + 1), "x" * 10_000])
def test_an_id_of_no_or_too_many_characters_is_refused(http, user_id):
    answer = ask(http, user_id)
    assert answer.status_code == 422 and answer.json()["detail"].startswith(f"user_id must be 1 to {MAX_ID} characters, not ")
    assert len(answer.content) < 300

# without %: the test client decodes a path twice, so that "%2F" arrives as "/"; tests/test_serve.py asks a real server
@effort(max_examples=150, deadline=None)
@given(user_id=st.text(st.characters(codec="utf-8", exclude_characters="%"), min_size=1, max_size=40), k=st.text(string.printable, max_size=6) | st.integers().map(str))
def test_no_input_makes_it_fail(http, user_id, k):
    answer = ask(http, user_id, f"?k={quote(k, safe='')}")
    assert answer.status_code in (200, 422)
    if answer.status_code == 200: assert answer.json()["user_id"] == user_id

def test_raw_bytes_that_are_no_text_are_answered(http):
    assert http.get("/recommendations/v1/%FF%FE?k=1").status_code == 200

@pytest.mark.parametrize(("method", "path", "status"), [("get", "/", 404), ("get", "/recommendations/v1", 404), ("get", "/recommendations", 404),
                                                        ("post", "/recommendations/v1/u", 405), ("delete", "/health", 405)])
def test_errors_are_problems_with_a_reason(http, method, path, status):
    answer = getattr(http, method)(path)
    assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json"
    assert set(answer.json()) == {"title", "status", "detail"} and answer.json()["detail"]

def test_health_names_the_bundle(http, bundle):
    assert http.get("/health").json() == {"status": "ok", "bundle_id": bundle.manifest["id"]}

def test_a_defect_is_a_500_that_tells_nothing(caplog):
    class Broken:
        bundle_id = "b"
        keys, meter = Keys(()), Meter()
        def recommend(self, request: RecommendationRequest) -> RecommendationResponse: raise RuntimeError("secret")
    answer = TestClient(create_app(Broken()), raise_server_exceptions=False).get("/recommendations/v1/u")
    assert answer.status_code == 500 and "secret" not in answer.text and answer.json()["detail"]
    assert "secret" in caplog.text

def test_the_contract_describes_itself(http):
    api = http.get("/openapi.json").json()
    get = api["paths"]["/recommendations/v1/{user_id}"]["get"]
    user_id, k, surface, context_item, wanted, explain = get["parameters"]
    assert [p["name"] for p in (surface, context_item, wanted, explain)] == ["surface", "context_item", "filter", "explain"]
    assert (user_id["in"], user_id["required"], k["schema"]["minimum"], k["schema"]["maximum"], k["schema"]["default"]) == ("path", True, 1, 100, 5)
    assert get["responses"]["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Recommendations"}
    assert list(get["responses"]["422"]["content"]) == ["application/problem+json"]
    assert "HTTPValidationError" not in json.dumps(api) # FastAPI's own shape of an error, which is not ours
    assert all(p.get("description") for p in get["parameters"])
    example = get["responses"]["200"]["content"]["application/json"]["example"]
    assert list(example) == ["user_id", "recommendations"] and list(example["recommendations"][0]) == ["item_id", "score"]
    for page in ("/docs", "/redoc"): assert http.get(page).status_code == 200

def test_answers_fit_the_documented_schema(http, user):
    import jsonschema
    api = http.get("/openapi.json").json()
    for path, schema in (("/health", "Health"), (f"/recommendations/v1/{user}?k=20", "Recommendations")):
        jsonschema.validate(http.get(path).json(), {"$ref": f"#/components/schemas/{schema}", "components": api["components"]})
    with pytest.raises(jsonschema.ValidationError): # the schema can fail
        jsonschema.validate({"user_id": "u", "recommendations": [{"item_id": "i", "score": 2}]},
                            {"$ref": "#/components/schemas/Recommendations", "components": api["components"]})
    assert http.get("/nothing").json().keys() == api["paths"]["/recommendations/v1/{user_id}"]["get"]["responses"]["422"]["content"][
        "application/problem+json"]["schema"]["properties"].keys()

def test_a_store_that_is_gone_leaves_answers_and_two_lines_in_the_log(bundle, user, trained, caplog, tmp_path):
    """Killed and not to be started again; then it is back."""
    store = open_store(trained.settings.model_copy(update={"root": tmp_path}), timeout_s=0.2)
    store.append(trained.sim.interactions.filter(user_id=user))
    store.breaker.pause_s = 0.2
    replica = Replica()
    replica.bundle, replica.store = bundle, store
    http, folder = TestClient(create_app(replica)), tmp_path/"data"/"online"
    known, unknown = (ask(http, u).json()["recommendations"] for u in (user, "nobody"))
    assert known != unknown
    (folder/"appendonly.aof").rename(tmp_path/"kept.aof")
    (folder/"appendonly.aof").mkdir() # a server cannot start on this
    os.kill(store.client.info("server")["process_id"], signal.SIGKILL)
    began = time.monotonic()
    for _ in range(50): assert ask(http, user).json()["recommendations"] == unknown
    assert time.monotonic() - began < 5 and store.breaker.unanswered == 50
    (folder/"appendonly.aof").rmdir()
    (tmp_path/"kept.aof").rename(folder/"appendonly.aof")
    time.sleep(0.3)
    assert ask(http, user).json()["recommendations"] == known
    store.close()
    said = [r.getMessage() for r in caplog.records if r.name == "reco.store"]
    assert len(said) == 2 and "answered without it" in said[0] and "answers again" in said[1]

def test_a_bundle_that_is_refused_leaves_the_old_one_in_service(bundle, tmp_path):
    replica = Replica()
    replica.bundle = bundle
    with pytest.raises(BundleError): replica.reconfigure({"bundle": str(tmp_path/"nothing-here")})
    assert replica.bundle is bundle

def test_the_first_shopper_waits_for_nothing(bundle_root, store_root, monkeypatch):
    """Items are found through an index that the first look-up makes, and Redis through a connection: both are there before a shopper is."""
    monkeypatch.setenv("RECO_ONLINE_FOLDER", str(store_root/"data"/"online"))
    replica = Replica()
    replica.reconfigure({"bundle": str(latest_bundle(bundle_root))})
    assert "_index" in vars(replica.bundle.ids) and replica.store.client.info("clients")["connected_clients"] >= 1
    assert replica.store.breaker.unanswered == 0 and replica.store.events(next(replica.store.user_ids()))
    replica.store.close()

def test_more_digits_than_json_needs_are_not_lost():
    class Fixed:
        bundle_id, keys, meter = "b", Keys(()), Meter()
        def recommend(self, request: RecommendationRequest) -> RecommendationResponse:
            return RecommendationResponse([ScoredItem("i", 1/3, "popularity")], "b", False)
        def note(self, shown: Shown) -> None: assert shown.found.items[0].score == 1/3
    answer = TestClient(create_app(Fixed())).get("/recommendations/v1/u").json()
    assert answer["recommendations"] == [{"item_id": "i", "score": 1/3}]
