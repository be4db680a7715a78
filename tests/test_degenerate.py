"""Shops, stores and requests at their worst, each through the app: an answer that is right, or a refusal with the reason."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import polars as pl
import pytest
from conftest import END
from starlette.testclient import TestClient

from app.contract import MAX_EVENTS, MAX_ID, create_app
from app.keys import Keys, load_keys
from app.serve import Replica, open_intake
from reco.bundle import ModelBundle, make_bundle, save_bundle
from reco.candidates.base import Retrieved
from reco.data.histories import epoch_ms
from reco.data.shop import index_shop
from reco.features.store import open_store
from reco.redis_server import disconnect
from reco.settings import Serving, Settings

NO_KEYS = Keys(())
SURFACES = "/recommendations/v1/{user}?k={k}", "/similar/v1/{item}?k={k}", "/bought-together/v1?items={item}&k={k}"


@pytest.fixture(scope="module")
def serving(bundle: ModelBundle, trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[ModelBundle], TestClient]]:
    """The app on a bundle, with a store and a bus that know nothing yet."""
    settings = trained.settings.model_copy(update={"root": tmp_path_factory.mktemp("worst")})
    store, intake = open_store(settings), open_intake(settings)

    def make(served: ModelBundle = bundle, keys: Keys = NO_KEYS) -> TestClient:
        replica = Replica()
        replica.bundle, replica.store, replica.intake, replica.keys = served, store, intake, keys
        app = TestClient(create_app(replica))
        app.replica = replica
        return app
    yield make
    disconnect(intake.producer.client)
    store.close()


def lists(app: TestClient, item: str = "product_1", user: str = "user_1", k: int = 10, more: str = "") -> list[list[str]]:
    """What each surface shows."""
    answers = [app.get(path.format(user=user, item=quote(item, safe=""), k=k) + more) for path in SURFACES]
    assert [a.status_code for a in answers] == [200] * 3, [a.text for a in answers]
    return [[x["item_id"] for x in a.json()["recommendations"]] for a in answers]


def of_shop(trained, interactions: pl.DataFrame, catalog: pl.DataFrame) -> ModelBundle:
    """A bundle as training would make it of this log and catalogue."""
    about = {"git_sha": "test", "metrics": [], "id": "worst"}
    return make_bundle(index_shop(interactions, catalog), epoch_ms(END), trained.rankers, trained.settings, about, choices=trained.choices)


@pytest.fixture(scope="module")
def few(trained) -> pl.DataFrame:
    """The last events, of a few shoppers."""
    return trained.sim.interactions.tail(3_000)


def test_without_a_catalogue_what_happened_is_enough(trained, few, serving, tmp_path):
    made = of_shop(trained, few, trained.sim.catalog.clear())
    app, touched = serving(made), set(few["item_id"])
    for explain in ("", "&explain=true"):
        for shown in lists(app, more=explain): assert len(shown) == 10 and set(shown) <= touched
    assert app.get("/recommendations/v1/u", params={"filter": "category:shoes"}).status_code in (200, 422)
    app.replica.reconfigure({"bundle": str(save_bundle(made, tmp_path / "bundles"))})
    assert len(lists(app)[0]) == 10


def test_with_everything_sold_out_lists_are_empty(trained, few, serving, tmp_path):
    made = of_shop(trained, few, trained.sim.catalog.with_columns(available=pl.lit(False)))
    app = serving(made)
    assert lists(app) == lists(app, more="&explain=true") == [[], [], []]
    assert app.post("/recommendations/v1/session", json={"events": [{"item_id": "product_1", "event": "view"}]}).json() == {"recommendations": []}
    assert 'reco_short_lists_total{surface="similar"} 2.0' in app.get("/metrics").text
    app.replica.reconfigure({"bundle": str(save_bundle(made, tmp_path / "bundles"))})  # a shop may be sold out when a bundle is loaded


def test_one_item_is_all_there_is(trained, few, serving):
    [item] = few["item_id"].mode().head(1)
    app = serving(of_shop(trained, few.filter(item_id=item), trained.sim.catalog.filter(item_id=item)))
    assert lists(app, item) == [[item], [], []] and lists(app, "gone") == [[item]] * 3


def test_nothing_is_known_yet_at_the_bundles_moment(bundle, serving, tmp_path):
    made = replace(bundle, moment=replace(bundle.moment, known=np.zeros_like(bundle.moment.known)))
    app = serving(made)
    for shown in lists(app): assert len(set(shown)) == len(shown)
    app.replica.reconfigure({"bundle": str(save_bundle(made, tmp_path / "bundles"))})


class Short:
    """A source that proposes less than it is asked for."""
    def __init__(self, source, most: int): self.source, self.most = source, most

    def __getattr__(self, name: str): return getattr(self.source, name)

    def retrieve(self, histories, k: int) -> Retrieved:
        found = self.source.retrieve(histories, k)
        found.items[:, self.most:], found.scores[:, self.most:] = -1, np.nan
        return found


@pytest.mark.parametrize("most", [0, 1])
def test_sources_that_return_fewer_are_filled_up(bundle, serving, most):
    short = {n: Short(s, most) for n, s in bundle.moment.sources.items()}
    app = serving(replace(bundle, moment=replace(bundle.moment, sources=short)))
    for shown in lists(app, more="&explain=true"): assert len(shown) == 10 == len(set(shown))


def test_more_than_the_filters_leave_is_what_they_leave(bundle, serving):
    app, item = serving(), bundle.items.filter(pl.col("available"))["item_id"][0]
    assert lists(app, "product_2", k=100, more=f"&filter=item:{item}") == [[item]] * 3
    assert lists(app, k=100, more="&filter=price<0") == [[], [], []]
    for shown in lists(app, k=100): assert len(shown) == 100


def test_without_newer_features_the_bundles_own_answer(bundle, serving):
    """The store names a version of which rows are gone, then one of which no number is known."""
    app, ids = serving(replace(bundle, manifest=bundle.manifest | {"id": "newer"})), bundle.ids.ids.to_list()
    store, asof, ask = app.replica.store, bundle.moment.asof, lambda: app.get("/recommendations/v1/nobody?k=20")
    plain = ask()
    store.put_rows("gone", ids[:1], bundle.moment.per_item[:1])
    store.activate("newer", "gone", asof + 1)
    answer = ask()
    assert answer.json() == plain.json() and answer.headers["x-degraded"] == "store" and "x-degraded" not in plain.headers
    store.put_rows("blank", ids, np.full_like(bundle.moment.per_item[:len(ids)], np.nan))
    store.activate("newer", "blank", asof + 2)
    blank = ask()
    assert len(blank.json()["recommendations"]) == 20 and blank.json() != plain.json() and "x-degraded" not in blank.headers


def test_a_shopper_with_ten_thousand_events_in_the_store(bundle, serving):
    app, ids, now = serving(), bundle.ids.ids, round(time.time() * 1000)
    sent = [{"event_id": f"e{n}", "user_id": "robot", "item_id": ids[n * n % len(ids)], "event": "view", "ts": now - 60_000 + n} for n in range(10_000)]
    for at in range(0, len(sent), MAX_EVENTS): assert app.post("/events/v1", json=sent[at:at + MAX_EVENTS]).status_code == 202
    for shown in lists(app, user="robot"): assert len(shown) == 10
    latest = [{"item_id": e["item_id"], "event": "view"} for e in sent[-bundle.max_history:]]
    assert app.post("/recommendations/v1/session", json={"events": latest, "k": 10}).status_code == 200
    kept = [e.item_id for e in app.replica.store.events("robot")]
    assert len(kept) == app.replica.store.cap and kept == [e["item_id"] for e in sent[-len(kept):]]  # the latest: no list takes longer for it


ODD = ["a/b", "/", "//", "..", "a/../b", "josé", "🛒", "a\nb", "\r\n", "\x00", "\x1b[0m", "\u202e", "a,b", "a b", "?k=3#x", "<b>", "'; --", "\ufeff", "x" * MAX_ID]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_an_odd_id_is_an_id_on_every_route(serving, odd, monkeypatch, tmp_path):
    monkeypatch.setenv("RECO_LAKE_ROOT", str(tmp_path / "lake"))
    app, path, now = serving(), quote(odd, safe="").replace(".", "%2E"), round(time.time() * 1000)
    event = {"event_id": odd, "user_id": odd, "item_id": odd, "event": "view", "ts": now, "session_id": odd, "request_id": odd, "surface": odd, "order_id": odd}
    assert app.post("/events/v1", json=event).json() == {"accepted": 1}
    assert [e.item_id for e in app.replica.store.events(odd)] == [odd]
    assert app.get(f"/similar/v1/{path}", params={"user_id": odd}).json()["item_id"] == odd
    assert app.get(f"/bought-together/v1?items={quote(odd, safe='')}").json()["items"] == [odd]
    asked = {"requests": [{"user_id": odd, "surface": "similar", "context_items": [odd]}]}
    assert app.post("/recommendations/v1/batch", json=asked).json()["answers"][0]["user_id"] == odd
    assert app.post("/recommendations/v1/session", json={"events": [{"item_id": odd, "event": "view"}]}).status_code == 200
    assert app.delete(f"/users/v1/{path}").json()["online"] is True and app.replica.store.events(odd) == []


@pytest.mark.parametrize("long", ["x" * (MAX_ID + 1), "x" * 10_240, "🛒" * 2_560], ids=["513", "10 kB", "10 kB of signs"])
def test_a_long_id_is_refused_on_every_route(serving, long):
    app, path = serving(), quote(long, safe="")
    event = {"event_id": "e", "user_id": "u", "item_id": "i", "event": "view", "ts": 1_700_000_000_000}
    answers = [app.get(f"/recommendations/v1/{path}"), app.get(f"/similar/v1/{path}"), app.get("/similar/v1/i", params={"user_id": long}),
               app.get(f"/bought-together/v1?items={path}"), app.delete(f"/users/v1/{path}"),
               app.get("/recommendations/v1/u", params={"surface": "similar", "context_item": long}),
               app.post("/recommendations/v1/session", json={"events": [{"item_id": long, "event": "view"}]}),
               app.post("/recommendations/v1/batch", json={"requests": [{"user_id": long}]}),
               *(app.post("/events/v1", json=event | {name: long}) for name in ("event_id", "user_id", "item_id", "session_id", "request_id"))]
    for a in answers: assert a.status_code == 422 and a.headers["content-type"] == "application/problem+json" and len(a.content) < 700, a.text


RAW = {"half a surrogate": b'"\\ud800"', "many digits": b"9" * 5_000, "too large": b"1e400", "not a number": b"NaN", "deep": b"[" * 50_000 + b"]" * 50_000,
       "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "not text": b'"\xff"', "zeros": b'"\\u0000"', "nothing": b""}
BODIES = {"/recommendations/v1/session": b'{"k": %b}', "/recommendations/v1/batch": b'{"requests": [{"user_id": %b}]}',
          "/events/v1": b'{"event_id": "e", "user_id": %b, "item_id": %b, "event": "view", "ts": %b, "price": %b}'}


@pytest.mark.parametrize("value", list(RAW))
@pytest.mark.parametrize("path", list(BODIES))
def test_json_that_hardly_is_one_is_refused_or_answered(serving, path, value):
    body = BODIES[path].replace(b"%b", RAW[value])
    for raw in (body, RAW[value]):
        answer = serving().post(path, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 422) and len(answer.content) < 2_000, answer.text
        if answer.status_code == 422: assert answer.headers["content-type"] == "application/problem+json" and answer.json()["detail"]


@pytest.mark.parametrize("ts", [0, -1, 253_402_300_799_999, 253_402_300_800_000, 2**53 - 1, 2**63, "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00",
                                "1970-01-01T00:00:00Z", "2026-02-30T00:00:00Z", "0", "now", "", True, 1.5, [], {}], ids=json.dumps)
def test_a_time_that_cannot_be_is_refused_or_answered(serving, ts):
    app = serving()
    visit = app.post("/recommendations/v1/session", json={"events": [{"item_id": "product_1", "event": "view", "ts": ts}]})
    event = app.post("/events/v1", json={"event_id": "e", "user_id": "u", "item_id": "product_1", "event": "view", "ts": ts})
    assert visit.status_code in (200, 422) and event.status_code == 422, (visit.text, event.text)


@pytest.mark.parametrize("odd", [b"\xff", b"\x80" * 30, "🛒".encode(), b"k" * 10_240, b"a, b"], ids=["byte", "bytes", "sign", "10 kB", "two"])
def test_odd_headers_are_refused(serving, odd):
    open_, guarded = serving(), serving(keys=load_keys(Settings(serving=Serving(client_keys="c" * 20))))
    assert open_.get("/recommendations/v1/u", headers={b"X-Request-ID": odd}).status_code == 422
    for name, value in ((b"X-API-Key", odd), (b"Authorization", b"Bearer " + odd), (b"Authorization", odd)):
        answer = guarded.get("/recommendations/v1/u", headers={name: value})
        assert answer.status_code == 401 and answer.headers["content-type"] == "application/problem+json"
