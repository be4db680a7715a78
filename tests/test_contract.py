"""Surfaces, sessions, batches, keys: the routes beside the plain list of a shopper. On the app itself: no Ray, no network."""

import os
import string
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from math import exp
from urllib.parse import quote

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app.contract import MAX_BASKET, MAX_BATCH, MAX_EVENTS, Why, create_app, listed, plain_request
from app.keys import SHORTEST, Keys, KeysError, keys_for, load_keys
from app.meter import FOLDER
from app.serve import Replica
from reco.bundle import ModelBundle
from reco.features.store import OnlineStore, open_store
from reco.pipeline import recommend
from reco.request import RecommendationRequest, UserEvent
from reco.settings import Serving, Settings

CLIENT, ADMIN = "client-" + "c" * SHORTEST, "admin-" + "a" * SHORTEST


@pytest.fixture(scope="module")
def replica(bundle: ModelBundle, store: OnlineStore) -> Replica:
    made = Replica()
    made.bundle, made.store = bundle, store
    return made


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    """For hypothesis, which wants nothing that lasts one test."""
    with pytest.MonkeyPatch.context() as patch: yield patch


@pytest.fixture(scope="module")
def http(replica: Replica) -> TestClient:
    return TestClient(create_app(replica))


@pytest.fixture(scope="module")
def user(store: OnlineStore) -> str:
    return next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)


@pytest.fixture(scope="module")
def items(bundle: ModelBundle) -> list[str]:
    """Well-known items, most viewed first."""
    return bundle.ids.external(bundle.moment.per_item[:, 2].argsort()[::-1][:10])


def shown(answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [x["item_id"] for x in answer.json()["recommendations"]]


def expected(bundle: ModelBundle, store: OnlineStore, **asked) -> list[str]:
    return [x.item_id for x in recommend(RecommendationRequest(**{"user_id": None} | asked), bundle, store).items]


def test_an_item_page_gets_what_the_pipeline_finds_similar(http, bundle, store, items, user):
    answer = http.get(f"/similar/v1/{quote(items[0])}?k=8")
    assert list(answer.json()) == ["item_id", "recommendations"] and answer.json()["item_id"] == items[0]
    assert shown(answer) == expected(bundle, store, k=8, surface="similar", context_items=[items[0]]) and items[0] not in shown(answer)
    personal = http.get(f"/similar/v1/{quote(items[0])}", params={"k": 8, "user_id": user})
    assert shown(personal) == expected(bundle, store, user_id=user, k=8, surface="similar", context_items=[items[0]])


def test_a_basket_gets_what_goes_with_all_of_it(http, bundle, store, items):
    answer = http.get(f"/bought-together/v1?items={','.join(map(quote, items[:3]))}&k=6")
    assert answer.json()["items"] == items[:3]
    assert shown(answer) == expected(bundle, store, k=6, surface="bought_together", context_items=items[:3]) and not set(items[:3]) & set(shown(answer))
    again = http.get("/bought-together/v1", params=[("items", items[0]), ("items", ",".join(items[1:3])), ("k", 6)])
    assert again.json()["items"] == items[:1] + [",".join(items[1:3])]  # httpx sends the comma as %2C: one id


PARTS = ["k=1", "k=7", "k=100", "k=101", "k=0", "k=05", "k=-1", "k=x", "k=", "k", "", "surface=for_you", "surface=similar", "surface=", "context_item=a",
         "filter=price<5", "filter=%zz", "explain=true", "other=1", "%6b=3", "k=3;"]


@effort(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=3).map("&".join), st.sampled_from(["user", "a/b", "", "%0A", "%25", "🛒", "u" * 512, "u" * 513, "session"]),
       st.sampled_from([None, "page-1", "", "no good", "x" * 129]))
def test_the_plain_request_is_answered_as_fastapi_would(replica, monkeypatch_module, user, query, who, name):
    """The short way and the long way: the same status, body and headers for whatever is asked."""
    url, headers = f"/recommendations/v1/{quote(user) if who == 'user' else who}" + f"?{query}" * bool(query), {"X-Request-ID": name} if name is not None else {}
    short = TestClient(create_app(replica)).get(url, headers=headers)
    with monkeypatch_module.context() as m:
        m.setattr("app.contract.plain_request", lambda scope: None)
        long = TestClient(create_app(replica)).get(url, headers=headers)
    same = lambda answer: (answer.status_code, answer.json(), {k: v for k, v in answer.headers.items() if name is not None or k != "x-request-id"})
    assert same(short) == same(long)


@pytest.mark.parametrize(("query", "short"), [("", True), ("k=20", True), ("k=20&surface=for_you", True), ("surface=for_you", True), ("k=101", False),
                                              ("k=5&k=6", False), ("explain=true", False), ("surface=similar", False), ("filter=price<5", False)])
def test_what_is_plain_goes_the_short_way_and_nothing_else(query, short):
    scope = {"type": "http", "method": "GET", "path": "/recommendations/v1/ann", "query_string": query.encode(), "headers": [], "reco.role": "client"}
    found = plain_request(scope)
    assert (found is not None) == short and (not short or (found.user_id, found.k) == ("ann", 20 if "k=20" in query else 5))
    for other in ({"method": "POST"}, {"reco.role": "nobody"}, {"root_path": "/shop"}, {"path": "/recommendations/v1/"}):
        assert plain_request(scope | other) is None


@pytest.mark.parametrize(("query", "ids"), [("items=a,b", ["a", "b"]), ("items=a%2Cb,c", ["a,b", "c"]), ("items=a&items=b", ["a", "b"]),
                                            ("k=2&items=%F0%9F%9B%92", ["🛒"]), ("items=a+b,%2B", ["a b", "+"]), ("items=a=b", ["a=b"])])
def test_commas_part_ids_unless_they_are_encoded(query, ids):
    assert listed(query, "items") == ids


@pytest.mark.parametrize("query", ["", "?items=", "?items=a,,b", "?items=,", "?items=" + "x" * 513, "?items=" + ",".join("a" * (MAX_BASKET + 1))])
def test_a_basket_that_is_none_is_refused(http, query):
    answer = http.get(f"/bought-together/v1{query}")
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json" and "1 to 200 ids with commas between" in answer.json()["detail"]
    assert len(answer.content) < 300


def test_the_surface_of_a_shopper_may_be_named(http, bundle, store, items, user):
    answer = http.get(f"/recommendations/v1/{user}", params={"surface": "bought_together", "context_item": items[:2], "k": 4})
    assert shown(answer) == expected(bundle, store, user_id=user, k=4, surface="bought_together", context_items=items[:2])


@pytest.mark.parametrize(("params", "says"), [
    ({"surface": "nowhere"}, "surface must be for_you, similar or bought_together"), ({"context_item": "a"}, "for_you takes no context items"),
    ({"surface": "similar"}, "similar needs at least one context item"), ({"filter": "colour:red"}, "colour"), ({"filter": "x" * 1_001}, "filter must be"),
    ({"filter": "price<"}, "price")])
def test_what_cannot_be_meant_is_refused_with_the_reason(http, params, says):
    answer = http.get("/recommendations/v1/u", params=params)
    assert answer.status_code == 422 and says in answer.json()["detail"] and len(answer.content) < 600


def test_why_is_told_to_who_asks(http, user, items):
    paths = f"/recommendations/v1/{user}?k=4", f"/similar/v1/{items[0]}?k=4", f"/bought-together/v1?items={items[0]}&k=4"
    for path in paths:
        plain, told = http.get(path).json()["recommendations"], http.get(f"{path}&explain=true").json()["recommendations"]
        assert [{"item_id": x["item_id"], "score": x["score"]} for x in told] == plain and len(told) == 4
        for x in told:
            why = Why.model_validate(x["why"])
            assert why.reason and why.sources and (why.base is None) == (why.log_odds is None)
            if why.log_odds is not None:
                assert abs(why.base + sum(c.log_odds for c in why.contributions) + why.rest - why.log_odds) < 1e-6 and why.contributions
                assert abs(1 / (1 + exp(-why.log_odds)) - x["score"]) < 1e-5
    assert http.get(f"{paths[0]}&explain=perhaps").json()["detail"].startswith("explain must be true or false")


def test_a_filter_leaves_only_what_it_names(http, bundle):
    category = bundle.moment.state.categories[0]
    codes = bundle.moment.state.category[bundle.ids.index(pl.Series(shown(http.get("/recommendations/v1/u", params={"k": 5, "filter": f"category:{category}"}))))]
    assert len(codes) and (codes == 0).all()


def test_a_visit_counts_without_an_id(http, bundle, store, items):
    answer = http.post("/recommendations/v1/session", json={"k": 7, "events": [{"item_id": i, "event": "view"} for i in items[:3]]})
    assert list(answer.json()) == ["recommendations"] and shown(answer) != shown(http.post("/recommendations/v1/session", json={"k": 7}))
    dated = http.post("/recommendations/v1/session", json={"k": 7, "events": [{"item_id": items[0], "event": "addtocart", "ts": "2026-04-30T10:00:00Z"}]})
    assert len(shown(dated)) == 7  # an old event is an old event, not an error
    cart = http.post("/recommendations/v1/session", json={"surface": "bought_together", "context_items": items[:2]})
    assert shown(cart) == expected(bundle, store, k=5, surface="bought_together", context_items=items[:2])


def test_events_without_times_happened_in_their_order(http, bundle):
    seen = []

    class Listening(Replica):
        def recommend(self, request):
            seen.append(request)
            return super().recommend(request)

    listening = Listening()
    listening.bundle = bundle
    TestClient(create_app(listening)).post("/recommendations/v1/session", json={"events": [{"item_id": x, "event": "view"} for x in "abc"]})
    [request] = seen
    assert [e.item_id for e in request.events] == list("abc") and all(isinstance(e, UserEvent) for e in request.events)
    assert all(a.ts < b.ts for a, b in pairwise(request.events)) and request.events[-1].ts < request.now


@pytest.mark.parametrize(("body", "says"), [
    ({"k": 0}, "k must be"), ({"k": "5"}, "k must be"), ({"events": [{"item_id": "a", "event": "impression"}]}, "events[0].event must be"),
    ({"events": [{"item_id": "", "event": "view"}]}, "events[0].item_id must be"), ({"events": [{"event": "view"}]}, "events[0].item_id is missing"),
    ({"events": [{"item_id": "a", "event": "view", "ts": "2026-01-01T00:00:00"}]}, "events[0].ts must be"), ({"colour": "red"}, "colour is not known here"),
    ({"events": [{"item_id": "a", "event": "view"}] * (MAX_EVENTS + 1)}, "events must be"), ([], "the body must be"), ("x", "the body must be")])
def test_a_bad_session_is_told_where(http, body, says):
    answer = http.post("/recommendations/v1/session", json=body)
    assert answer.status_code == 422 and says in answer.json()["detail"] and len(answer.content) < 1_000


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"null", b'{"k": 1e400}', b"[" * 100_000])
def test_a_body_that_is_no_json_is_a_problem(http, raw):
    answer = http.post("/recommendations/v1/session", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.headers["content-type"] == "application/problem+json" and answer.json()["detail"]


def test_a_batch_is_its_requests_one_by_one(http, bundle, store, items, user):
    asked = [{"user_id": user, "k": 3}, {"user_id": "nobody"}, {"user_id": user, "surface": "similar", "context_items": [items[1]]}]
    answers = http.post("/recommendations/v1/batch", json={"requests": asked}).json()["answers"]
    assert [a["user_id"] for a in answers] == [user, "nobody", user]
    for r, a in zip(asked, answers, strict=True):
        assert [x["item_id"] for x in a["recommendations"]] == expected(bundle, store, **{"k": 5} | r)


def test_a_batch_is_answered_whole_or_not_at_all(http):
    bad = http.post("/recommendations/v1/batch", json={"requests": [{"user_id": "a"}, {"user_id": "b", "surface": "similar"}]})
    assert bad.status_code == 422 and bad.json()["detail"].startswith("requests[1]: similar needs")
    for requests in ([], [{"user_id": "a"}] * (MAX_BATCH + 1), [{"k": 3}]):
        assert http.post("/recommendations/v1/batch", json={"requests": requests}).status_code == 422


def test_an_exposure_has_a_name(http, user):
    given = http.get(f"/recommendations/v1/{user}", headers={"X-Request-ID": "order-page:1"})
    assert given.headers["x-request-id"] == "order-page:1"
    made = [http.get(f"/recommendations/v1/{user}").headers["x-request-id"] for _ in range(3)]
    assert len(set(made)) == 3 and all(len(m) == 32 for m in made)
    for bad in ("", "a b", "x" * 129, "<script>"):
        refused = http.get(f"/recommendations/v1/{user}", headers={"X-Request-ID": bad})
        assert refused.status_code == 422 and "X-Request-ID must be" in refused.json()["detail"] and "script" not in refused.text


def test_headers_say_how_the_answer_came_about(http, bundle, user):
    known, stranger = http.get(f"/recommendations/v1/{user}").headers, http.get("/recommendations/v1/nobody").headers
    assert known["x-bundle-id"] == bundle.id and "x-fallback" not in known and stranger["x-fallback"] == "true"
    assert "x-degraded" not in known


def test_without_its_store_it_is_ready_but_degraded(http, bundle, trained, tmp_path, user):
    assert http.get("/ready").json() == {"status": "ready", "bundle_id": bundle.id, "store": "ok"}
    alone = Replica()
    alone.bundle = bundle
    alone.store = open_store(trained.settings.model_copy(update={"online": trained.settings.online.model_copy(
        update={"url": type(trained.settings.online.url)(f"unix://{tmp_path}/nobody.sock")})}), timeout_s=0.2)
    gone = TestClient(create_app(alone))
    assert gone.get("/ready").json() == {"status": "degraded", "bundle_id": bundle.id, "store": "down"}
    answer = gone.get(f"/recommendations/v1/{user}")
    assert len(shown(answer)) == 5 and answer.headers["x-degraded"] == "store"


# ---- keys -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def guarded(replica: Replica, tmp_path) -> TestClient:
    file = tmp_path / "keys"
    file.write_text(f"# shop's pages\nclient {CLIENT}\n\nadmin {ADMIN}\n")
    own = Replica()
    own.bundle, own.store = replica.bundle, replica.store
    own.keys = keys_for(Settings(serving=Serving(host="0.0.0.0", keys_file=str(file))))
    return TestClient(create_app(own))


def asked(role: str) -> dict: return {"X-API-Key": {"client": CLIENT, "admin": ADMIN}[role]}


ROUTES = [("get", "/recommendations/v1/u", None), ("get", "/similar/v1/i", None), ("get", "/bought-together/v1?items=a", None),
          ("post", "/recommendations/v1/session", {}), ("post", "/recommendations/v1/batch", {"requests": [{"user_id": "u"}]})]


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
def test_no_key_no_answer(guarded, method, path, body):
    assert guarded.request(method, path, json=body, headers={"Authorization": f"Bearer {CLIENT}"}).status_code == 200
    for headers in ({}, {"Authorization": f"Bearer {CLIENT}x"}, {"Authorization": f"Basic {CLIENT}"}, {"X-API-Key": ""}, {"X-API-Key": CLIENT[:-1]}, {"X-API-Key": CLIENT + "x"}, {"Authorization": CLIENT}):
        answer = guarded.request(method, path, json=body, headers=headers)
        assert answer.status_code == 401 and answer.headers["content-type"] == "application/problem+json" and "www-authenticate" in answer.headers
        assert CLIENT[:-1] not in answer.text
    for role in ("client", "admin"): assert guarded.request(method, path, json=body, headers=asked(role)).status_code == 200


def test_a_key_is_looked_at_before_the_request(guarded):
    assert guarded.get("/recommendations/v1/u?k=0").status_code == 401  # a stranger learns nothing of what is allowed
    assert guarded.post("/recommendations/v1/session", content=b"{").status_code == 401


def test_only_an_admin_sees_the_bundle(guarded, bundle):
    assert guarded.get("/v1/bundle", headers=asked("client")).status_code == 403
    assert guarded.delete("/users/v1/u", headers=asked("client")).status_code == 403
    path = "/recommendations/v1/u?explain=true"
    assert [guarded.get(path, headers=asked(role)).status_code for role in ("client", "admin")] == [403, 200]
    assert guarded.get("/v1/bundle", headers=asked("admin")).json()["id"] == bundle.id
    for path in ("/health", "/ready"): assert guarded.get(path).status_code == 200  # load balancers have no key


def test_every_route_but_the_probes_wants_a_key(guarded):
    paths = guarded.get("/openapi.json").json()["paths"]
    open_ = {p for p, methods in paths.items() for m in methods.values() if "security" not in m}
    assert open_ == {"/health", "/ready"}


@pytest.mark.parametrize(("serving", "says"), [
    ({"host": "0.0.0.0"}, "there is no key"), ({"host": "::"}, "there is no key"), ({"host": "shop.example"}, "there is no key"),
    ({"client_keys": "short"}, "5 characters; at least 20"), ({"client_keys": CLIENT, "admin_keys": CLIENT}, "1 keys belong to a client and to an admin"),
    ({"keys_file": "nowhere"}, "FileNotFoundError")])
def test_it_does_not_start_with_keys_that_protect_nothing(serving, says):
    with pytest.raises(KeysError, match=says) as e: keys_for(Settings(serving=Serving(**serving)))
    assert CLIENT not in str(e.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_on_loopback_no_key_is_needed(host):
    assert not keys_for(Settings(serving=Serving(host=host)))


@pytest.mark.parametrize("line", ["owner " + CLIENT, CLIENT, f"client {CLIENT} more"])
def test_a_line_that_is_no_key_is_named(tmp_path, line):
    (tmp_path / "keys").write_text(f"admin {ADMIN}\n{line}\n")
    with pytest.raises(KeysError, match="line 2") as e: load_keys(Settings(serving=Serving(keys_file=str(tmp_path / "keys"))))
    assert CLIENT not in str(e.value)


@given(st.text(max_size=60))
@effort(max_examples=60, deadline=None)
def test_only_the_key_itself_opens(text):
    keys = load_keys(Settings(serving=Serving(client_keys=CLIENT, admin_keys=ADMIN)))
    assert keys.role(text) is None and (keys.role(CLIENT), keys.role(ADMIN)) == ("client", "admin") and Keys(()).role(text) is None


# ---- figures ----------------------------------------------------------------------------------------------------------

def figures(app: TestClient) -> dict[str, float]:
    """Sample with labels → value, without the times of creation."""
    text = app.get("/metrics")
    assert text.status_code == 200 and text.headers["content-type"].startswith("text/plain")
    return {f"{s.name}{sorted(s.labels.items())}": s.value for m in text_string_to_metric_families(text.text) for s in m.samples if not s.name.endswith("_created")}


def test_what_was_answered_is_counted_by_route(bundle, store, user, items):
    own = Replica()
    own.bundle, own.store = bundle, store
    app = TestClient(create_app(own))
    for path in (f"/recommendations/v1/{user}", "/recommendations/v1/nobody", f"/similar/v1/{items[0]}", "/recommendations/v1/u?k=0", "/nowhere/at/all", "/no/where"): app.get(path)
    found = figures(app)
    route = "('route', '/recommendations/v1/{user_id:text}')"
    assert found[f"reco_http_requests_total[{route}, ('status', '200')]"] == 2 and found[f"reco_http_requests_total[{route}, ('status', '422')]"] == 1
    assert found["reco_http_requests_total[('route', 'none'), ('status', '404')]"] == 2  # whatever path was made up
    assert found[f"reco_http_request_seconds_count[{route}]"] == 3 and 0 < found[f"reco_http_request_seconds_sum[{route}]"] < 3
    lists = {(f, s): found.get(f"reco_lists_total[('degraded', 'false'), ('fallback', '{f}'), ('surface', '{s}')]") for f in ("true", "false") for s in ("for_you", "similar")}
    assert lists == {("false", "for_you"): 1, ("true", "for_you"): 1, ("false", "similar"): 1, ("true", "similar"): None}


def test_replicas_of_a_machine_are_added_up(tmp_path):
    code = "from app.meter import Meter; import sys; m = Meter(); m.events.inc(int(sys.argv[1])); m.asof.set(5); print(m.text().decode())"
    run = lambda n: subprocess.run([sys.executable, "-c", code, str(n)], env=os.environ | {FOLDER: str(tmp_path)}, capture_output=True, text=True, check=True).stdout
    run(2)
    assert "reco_events_accepted_total 5.0" in run(3)


# ---- anything ---------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="%"), min_size=1, max_size=20)


@effort(max_examples=80, deadline=None)
@given(item=TEXT, basket=st.lists(TEXT, min_size=1, max_size=4), wanted=st.text(string.printable, max_size=12), k=st.integers(1, 100))
def test_no_item_makes_it_fail(http, item, basket, wanted, k):
    for path in (f"/similar/v1/{quote(item, safe='').replace('.', '%2E')}", f"/bought-together/v1?items={','.join(quote(i, safe='') for i in basket)}"):
        answer = http.get(path, params=None if "?" in path else {"k": k, "filter": wanted})
        assert answer.status_code in (200, 422), answer.text
