"""What changes between two trainings: items that the shop speaks of, lists that are kept, sources that are late. On the app itself, with a real Redis."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import numpy as np
import polars as pl
import pytest
from conftest import Trained
from starlette.testclient import TestClient
from stores import put

from app.contract import create_app
from app.keys import SHORTEST, Keys, load_keys
from app.serve import Replica, open_intake
from reco.bundle import ModelBundle, latest_bundle, load_bundle
from reco.candidates.base import Retrieved
from reco.features.store import OnlineStore, open_store
from reco.newest import PRICE
from reco.online import online_of
from reco.pipeline import recommend
from reco.redis_server import disconnect
from reco.request import RecommendationRequest, UserEvent
from reco.settings import Online, Serving, Settings


@pytest.fixture
def shop(trained: Trained, bundle_root: Path, tmp_path: Path) -> Iterator[Replica]:
    """A replica with a bundle of its own, which the tests change, and an empty store."""
    settings = trained.settings.model_copy(update={"root": tmp_path})
    made = Replica()
    made.bundle, made.store, made.intake = load_bundle(latest_bundle(bundle_root)), open_store(settings), open_intake(settings)
    online_of(made.bundle, made.store, background=True)
    made.keep_s = 60
    yield made
    disconnect(made.intake.producer.client)
    made.store.close()


@pytest.fixture
def http(shop: Replica) -> TestClient:
    return TestClient(create_app(shop))


def another(shop: Replica, bundle_root: Path) -> TestClient:
    """A second replica, which only has the store in common."""
    made = Replica()
    made.bundle, made.store, made.keep_s = load_bundle(latest_bundle(bundle_root)), shop.store, shop.keep_s
    return TestClient(create_app(made))


def ids(answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [r["item_id"] for r in answer.json()["recommendations"]]


def stocked(bundle: ModelBundle, n: int = 1) -> pl.DataFrame:
    """Items with a title that can be bought, the most touched first."""
    state, views = bundle.moment.state, bundle.moment.per_item[: bundle.items.height, 2]
    frame = bundle.items.with_columns(views=pl.Series(views), there=pl.Series(state.available[: bundle.items.height]))
    return frame.filter(pl.col("there") & pl.col("title").is_not_null() & pl.col("category_id").is_not_null()).sort("views", descending=True).head(n)


# ---- items -----------------------------------------------------------------------------------------------------------


def test_what_is_sold_out_is_gone_from_the_next_list_and_comes_back(http):
    shown = ids(http.get("/recommendations/v1/nobody?k=10"))
    said = http.put(f"/items/v1/{shown[0]}", json={"stock": 0})
    assert said.status_code == 200 and said.json() == {"item_id": shown[0], "version": 1, "changed": True, "live": True}
    assert shown[0] not in ids(http.get("/recommendations/v1/nobody?k=100"))
    again = http.put(f"/items/v1/{shown[0]}", json={"stock": 0}).json()
    assert again["changed"] is False and again["version"] == 1
    http.put(f"/items/v1/{shown[0]}", json={"stock": 3})
    assert ids(http.get("/recommendations/v1/nobody?k=10")) == shown


def test_a_price_counts_at_once_in_filters_and_features(shop, http):
    item = ids(http.get("/recommendations/v1/nobody?k=10"))[3]
    assert http.put(f"/items/v1/{item}", json={"price": 0.01}).json()["live"]
    assert item in ids(http.get("/recommendations/v1/nobody?k=100&filter=price<0.02"))
    http.put(f"/items/v1/{item}", json={"price": 80.0, "discount": 0.5})
    assert item in ids(http.get("/recommendations/v1/nobody?k=100&filter=price=40"))
    i = shop.bundle.ids.get(item)
    assert online_of(shop.bundle, shop.store).rows[i, -4] == 80 and shop.bundle.moment.state.discount[i] == 0.5


def test_a_new_item_is_found_by_its_text_within_a_second(shop, http, bundle_root):
    """On the pages of its like, for who looked at them, in filters, in explanations; and its own page knows its like."""
    like = stocked(shop.bundle).row(0, named=True)
    new, began = "new/item ☂", time.monotonic()
    body = {"title": f"{like['title']} Mark II", "category": like["category_id"], "brand": "Newcomer & Sons", "price": like["price"], "stock": 9}
    said = http.put(f"/items/v1/{quote(new, safe='')}", json=body)
    assert said.json() == {"item_id": new, "version": 1, "changed": True, "live": True} and time.monotonic() - began < 1
    page, only = f"/similar/v1/{like['item_id']}?k=20", "&filter=brand:\"Newcomer %26 Sons\"" # beside the most popular of its kind it would meet the category's cap
    assert ids(http.get(page + only)) == [new]
    assert ids(http.get(f"/recommendations/v1/nobody?k=20{only}")) == [new]
    looked = {"events": [{"item_id": like["item_id"], "event": "view"}], "k": 20, "filter": 'brand:"Newcomer & Sons"'}
    assert ids(http.post("/recommendations/v1/session", json=looked)) == [new]
    own = ids(http.get(f"/similar/v1/{quote(new, safe='')}?k=10"))
    kinds = dict(shop.bundle.items.select("item_id", "category_id").iter_rows())
    assert len(own) == 10 and new not in own and sum(kinds[i] == like["category_id"] for i in own) >= 5
    why, = http.get(f"{page}{only}&explain=true").json()["recommendations"]
    assert why["why"]["sources"] == {"content": 1} and "similar to" in why["why"]["reason"] # the nearest in text of all
    assert ids(another(shop, bundle_root).get(page + only)) == [new] # a replica that starts later


def test_who_looks_at_a_new_item_has_looked_at_something(http, shop):
    like = stocked(shop.bundle).row(0, named=True)
    http.put("/items/v1/new", json={"title": like["title"], "category": like["category_id"], "stock": 1})
    before = http.get("/recommendations/v1/eva?k=10")
    assert before.headers["x-fallback"] == "true"
    event = {"event_id": "e", "ts": round(time.time() * 1000) - 1, "user_id": "eva", "item_id": "new", "event": "view"}
    assert http.post("/events/v1", json=event).status_code == 202
    after = http.get("/recommendations/v1/eva?k=10")
    assert "x-fallback" not in after.headers and ids(after) != ids(before)


def test_another_replica_knows_a_change_with_its_next_request(shop, http, bundle_root):
    other = another(shop, bundle_root)
    shown = ids(other.get("/recommendations/v1/nobody?k=10"))
    http.put(f"/items/v1/{shown[0]}", json={"stock": 0})
    assert shown[0] not in ids(other.get("/recommendations/v1/nobody?k=10"))


def test_when_no_row_is_free_an_item_waits_for_the_next_bundle(shop, http):
    free = len(shop.bundle.moment.known) - shop.bundle.items.height
    newest = online_of(shop.bundle, shop.store).newest
    for n in range(free): shop.bundle.ids.add(f"filler {n}")
    said = http.put("/items/v1/one too many", json={"title": "lamp"}).json()
    assert said["live"] is False and said["changed"] and newest.without_row == 1
    assert len(ids(http.get("/similar/v1/one%20too%20many?k=5"))) == 5 # the page is answered like any unknown one's
    assert [i.item_id for i in shop.store.live_items()] == ["one too many"] # nothing is lost


def test_a_store_that_was_lost_counts_anew_and_is_followed(shop, http):
    shown = ids(http.get("/recommendations/v1/nobody?k=5"))
    for n in range(5): http.put(f"/items/v1/{shown[0]}", json={"price": 10 + n})
    shop.store.client.flushall()
    assert http.put(f"/items/v1/{shown[1]}", json={"stock": 0}).json()["version"] == 1
    assert shown[1] not in ids(http.get("/recommendations/v1/nobody?k=5"))


def test_a_long_price_list_holds_nobody_up(shop, http):
    """Six hundred changes at once, of which the next request writes five hundred; the rest follow by themselves, and no list is kept meanwhile."""
    names = shop.bundle.items["item_id"].to_list()
    for n in range(600): shop.store.put_item(names[n] if n < 290 else f"new {n}", {"price": float(n)} | ({} if n < 290 else {"title": "lamp"}))
    began = time.monotonic()
    first = http.get("/recommendations/v1/nobody?k=5")
    assert time.monotonic() - began < 1 and len(ids(first)) == 5
    until, online = time.monotonic() + 60, online_of(shop.bundle, shop.store)
    while (online.newest.version < 600 or online.newest.waiting) and time.monotonic() < until: time.sleep(0.05)
    assert online.newest.version == 600 and not online.newest.waiting and shop.bundle.ids.get("new 599") > 0
    assert shop.bundle.moment.state.price[shop.bundle.ids.get(names[7])] == 7


@pytest.mark.parametrize(("body", "word"), [
    ({}, "nothing is said"), ({"colour": "red"}, "colour"), ({"price": -1}, "price"), ({"price": False}, "price"), ({"stock": 1.5}, "stock"),
    ({"discount": 1.01}, "discount"), ({"title": "x" * 20_001}, "title"), ({"category": ""}, "category"), ({"stock": None}, "nothing is said")])
def test_what_cannot_be_said_of_an_item_is_refused(http, shop, body, word):
    said = http.put("/items/v1/product_1", json=body)
    assert said.status_code == 422 and said.headers["content-type"] == "application/problem+json" and word in said.json()["detail"]
    assert shop.store.live_items() == []


def test_items_are_the_admins(shop, trained):
    client, admin = "c" * SHORTEST, "a" * SHORTEST
    shop.keys = load_keys(Settings(serving=Serving(client_keys=client, admin_keys=admin)))
    http = TestClient(create_app(shop))
    assert [http.put("/items/v1/x", json={"stock": 1}, headers={"X-API-Key": k}).status_code for k in ("", client, admin)] == [401, 403, 200]
    shop.keys = Keys(())


def test_a_change_that_cannot_be_kept_is_told(shop, trained, tmp_path):
    """Without the store nothing is changed here either: the replicas must not differ."""
    shown = ids(TestClient(create_app(shop)).get("/recommendations/v1/nobody"))
    down = trained.settings.model_copy(update={"root": tmp_path, "online": Online(url="redis://127.0.0.1:1")})
    made = Replica()
    made.bundle, made.store = shop.bundle, open_store(down, timeout_s=0.1)
    http = TestClient(create_app(made))
    said = http.put(f"/items/v1/{shown[0]}", json={"stock": 0})
    assert said.status_code == 503 and said.headers["retry-after"] == "3" and shown[0] in ids(http.get("/recommendations/v1/nobody"))


def test_an_item_that_comes_while_rows_are_read_keeps_its_numbers(shop, monkeypatch):
    """No version of the rows knows it, and the copy that they were read on top of was made before it came."""
    online, read, bundle = online_of(shop.bundle, shop.store), shop.store.rows, shop.bundle
    online.background = False

    def meanwhile(bundle_id, names):
        version, _ = shop.store.put_item("new", {"title": "lamp", "price": 12.0})
        assert online.bring(version, "new", 1)
        return read(bundle_id, names)

    monkeypatch.setattr(shop.store, "rows", meanwhile)
    put(shop.store, bundle.id, "noon", bundle.items["item_id"].to_list(), 1.0)
    assert online.follow(shop.store.ask(None, bundle.id)) and online.rows[0, PRICE] == 1
    assert online.rows[bundle.ids.get("new"), PRICE] == 12


def test_an_item_that_comes_just_as_the_thread_ends_is_brought_in(shop):
    """The thread has found nothing that waits and still counts as being at it: whoever waits for the item begins anew."""
    online, live = online_of(shop.bundle, shop.store), []
    version, _ = shop.store.put_item("new", {"title": "lamp"})
    waits = threading.Thread(target=lambda: live.append(online.bring(version, "new", 10)))
    with online.items.at_work:
        waits.start()
        while not online.newest.waiting: time.sleep(0.001)
        time.sleep(0.02)
    waits.join()
    assert live == [True]


# ---- kept lists ------------------------------------------------------------------------------------------------------


def hit(answer) -> bool: return answer.headers.get("x-cache") == "hit"


def seen(http: TestClient, user: str, item: str, name: str) -> None:
    event = {"event_id": name, "ts": round(time.time() * 1000) - 1, "user_id": user, "item_id": item, "event": "view"}
    assert http.post("/events/v1", json=event).status_code == 202


def test_a_list_is_kept_until_something_happens(http, shop):
    item = stocked(shop.bundle).row(0, named=True)["item_id"]
    ask = lambda who="ada", more="": http.get(f"/recommendations/v1/{who}?k=7{more}")
    first, second = ask(), ask()
    assert not hit(first) and hit(second) and first.json() == second.json() and second.headers["x-fallback"] == "true"
    assert not any(map(hit, [ask("bo"), ask(more="&filter=price>0"), http.get("/recommendations/v1/ada?k=8"), http.get(f"/similar/v1/{item}?user_id=ada&k=7")]))
    seen(http, "ada", item, "1")
    third = ask()
    assert not hit(third) and third.json() != first.json() and hit(ask()) and hit(ask("bo"))
    http.put(f"/items/v1/{item}", json={"price": 3})
    assert not hit(ask()) and not hit(ask("bo"))
    metrics = http.get("/metrics").text
    assert 'reco_lists_from_cache_total{surface="for_you"} 3.0' in metrics


def test_what_must_be_made_for_the_request_is_never_kept(http, shop):
    session = lambda: http.post("/recommendations/v1/session", json={"events": [{"item_id": "product_1", "event": "view"}]})
    why = lambda: http.get("/recommendations/v1/ada?explain=true")
    assert not any(map(hit, [session(), session(), why(), why()]))
    shop.bundle = replace(shop.bundle, explore=shop.bundle.explore.model_copy(update={"epsilon": 0.5}))
    ask = lambda: http.get("/recommendations/v1/ada?k=3")
    assert not any(map(hit, [ask(), ask()]))


def test_lists_go_with_their_seconds_and_their_bundle(shop, http):
    shop.keep_s = 1
    ask = lambda: http.get("/recommendations/v1/ada?k=7")
    assert [hit(ask()), hit(ask())] == [False, True]
    time.sleep(1.1)
    assert [hit(ask()), hit(ask())] == [False, True]
    shop.bundle = replace(shop.bundle, manifest=shop.bundle.manifest | {"id": "another"})
    assert not hit(ask())
    shop.keep_s = 0
    assert not any(map(hit, [ask(), ask()]))


def test_a_kept_list_is_never_older_than_an_event_that_was_answered(shop, http):
    """Four shoppers look and read at the same time: after each event that was taken, the list is the one of the past with that event."""
    items = stocked(shop.bundle, 12)["item_id"].to_list()
    wrong: list[str] = []

    def look(user: str) -> None:
        for n, item in enumerate(items):
            seen(http, user, item, f"{user}{n}")
            got = http.get(f"/recommendations/v1/{user}?k=5&filter=-item:{item}")
            plain = http.get(f"/recommendations/v1/{user}?k=5&filter=-item:{item}")
            known = [e.item_id for e in shop.store.events(user)]
            if known != items[: n + 1]: wrong.append(f"{user}: the past is {known}")
            wanted = recommend(RecommendationRequest(user, 5, filter=f"-item:{item}"), shop.bundle, shop.store)
            for answer in (got, plain):
                if ids(answer) != [i.item_id for i in wanted.items]: wrong.append(f"{user} after {item}: {ids(answer)}, not {[i.item_id for i in wanted.items]}")

    threads = [threading.Thread(target=look, args=(f"user{n}",)) for n in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong, wrong[:3]


def test_a_list_that_is_kept_under_a_stale_stamp_is_not_found(store, trained):
    """An event between the question and the answer: the list is of the past before, and nobody reads it."""
    user = trained.sim.interactions["user_id"][0]
    before = store.ask(user, "a bundle", "home")
    store.append(trained.sim.interactions.head(1).with_columns(event_id=pl.lit("late"), ts=pl.lit(datetime.now(UTC) - timedelta(days=1)).cast(pl.Datetime("ms", "UTC"))))
    store.keep(user, "a bundle", "home", before.stamp, b"old", 60)
    assert store.ask(user, "a bundle", "home").kept is None


def test_a_list_that_was_begun_before_newer_rows_came_is_not_kept(shop):
    """It is made from the rows of before, and the new ones are there when it is finished: the next who asks gets a list of these."""
    before, online = shop.bundle.moment.sources["buy_again"], lambda: online_of(shop.bundle, shop.store, background=True)

    @dataclass
    class Late(Slow):
        def retrieve(self, histories, k: int) -> Retrieved:
            if (held := online().held).lock.locked(): held.lock.release() # now that the list is begun the rows may come
            until = time.monotonic() + 5
            while held.version != "noon" and time.monotonic() < until: time.sleep(0.001)
            return before.retrieve(histories, k)

    shop.bundle, shop.deadline_s = with_source(shop.bundle, "buy_again", Late(0)), None
    put(shop.store, shop.bundle.id, "noon", shop.bundle.items["item_id"].to_list(), 1.0)
    online().held.lock.acquire()
    http = TestClient(create_app(shop))
    ask = lambda: http.get("/recommendations/v1/nobody?k=10")
    assert [hit(ask()), hit(ask()), hit(ask())] == [False, False, True]


# ---- deadlines -------------------------------------------------------------------------------------------------------


@dataclass
class Slow:
    "Somebody's own source, that asks a service."
    sleep_s: float
    fitted: ClassVar = ()
    scores: ClassVar = {"score": "what the service says"}

    def retrieve(self, histories, k: int) -> Retrieved:
        if self.sleep_s < 0: raise ConnectionError("no route to host")
        time.sleep(self.sleep_s)
        return Retrieved.blank(len(histories), k)

    def score(self, histories, indptr, items) -> np.ndarray: return np.full((len(items), 1), np.nan, np.float32)


def with_source(bundle: ModelBundle, name: str, source: object) -> ModelBundle:
    """The bundle with one of its sources replaced, and nothing known of it in this process."""
    made = replace(bundle, moment=replace(bundle.moment, sources=bundle.moment.sources | {name: source}))
    source.scores = getattr(bundle.moment.sources[name], "scores", source.scores)
    source.score = lambda h, indptr, items: np.full((len(items), len(source.scores)), np.nan, np.float32)
    return made


@pytest.mark.parametrize("sleep_s", [3, -1])
def test_a_source_that_hangs_or_fails_is_left_out_in_time(shop, sleep_s):
    shop.bundle, shop.deadline_s = with_source(shop.bundle, "buy_again", Slow(sleep_s)), 0.5
    http = TestClient(create_app(shop))
    took = []
    for _ in range(3):
        began = time.monotonic()
        answer = http.get("/recommendations/v1/nobody?k=10")
        took.append(time.monotonic() - began)
        assert len(ids(answer)) == 10 and answer.headers["x-degraded"] == "buy_again" and not hit(answer)
    assert took[0] < 2 and max(took[1:]) < 0.25 # asked once while it hangs
    assert 'reco_done_without_total{what="buy_again"} 3.0' in http.get("/metrics").text


def test_when_the_time_is_over_what_is_popular_answers(bundle, store, trained):
    user = trained.sim.interactions["user_id"].mode()[0]
    late = recommend(RecommendationRequest(user, 10), bundle, store, deadline_s=1e-9)
    assert len(late.items) == 10 and {i.source for i in late.items} <= {"popularity", "rest"}
    assert set(late.without) == set(bundle.moment.sources) - {"popularity"} and late.degraded
    page = recommend(RecommendationRequest(user, 10, surface="similar", context_items=["product_1"]), bundle, store, deadline_s=1e-9)
    assert len(page.items) == 10 and page.degraded


def test_with_time_enough_the_clock_changes_nothing(bundle, store, trained):
    now = datetime.now(UTC)
    for user in trained.sim.interactions["user_id"].unique().sort().head(20):
        for surface, context in (("for_you", []), ("similar", ["product_1"]), ("bought_together", ["product_1", "product_2"])):
            ask = RecommendationRequest(user, 10, now, [UserEvent("product_5", "view", now - timedelta(minutes=1))], surface, context)
            assert recommend(ask, bundle, store, deadline_s=60) == recommend(ask, bundle, store)


def test_the_store_of_another_bundle_does_not_speak(shop, bundle):
    assert isinstance(shop.store, OnlineStore) and online_of(bundle, shop.store) is not online_of(shop.bundle, shop.store)
