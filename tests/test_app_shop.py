"""The Shop page on a real endpoint: what is done there happens, the next list knows it, and the cards say what changed."""

import re
import xml.etree.ElementTree as xml
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
from shop_floor import ODD, few_events, listening, open_shop, sleepy, stocked
from streamlit.testing.v1 import AppTest

import app.parts.page
from app.client import Client, Recommended, Scored, Why
from app.keys import load_keys
from app.parts.shop.pictures import SHAPES, WORDS, picture, shape_of
from app.parts.shop.storefront import acts, foot, marks, top
from app.parts.shop.visit import Look
from app.parts.wording import plain
from app.ports import free_port
from app.serve import Replica
from reco.bundle import ModelBundle
from reco.data.bus import open_codec
from reco.settings import Serving, Settings

APP = Path(__file__).resolve().parent.parent / "app" / "dashboard.py"
PAST = {"event_id": str, "ts": int, "user_id": str, "item_id": str, "event": str}
OPEN = Callable[..., AppTest]


@pytest.fixture(scope="module")
def shop(bundle: ModelBundle, trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Replica]]:
    settings = trained.settings.model_copy(update={"root": tmp_path_factory.mktemp("shop")})
    with open_shop(bundle, settings, trained.sim.interactions) as found:
        found[1].settings = settings
        yield found


@pytest.fixture(scope="module")
def shopper(trained) -> str:
    """Somebody with a past, and not the most active."""
    counts = trained.sim.interactions.group_by("user_id").len().filter(pl.col("len") > 8).sort("user_id")
    return counts["user_id"][0]


@pytest.fixture(scope="module")
def lake(bundle: ModelBundle, shopper: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stocked(tmp_path_factory.mktemp("lake"), bundle, few_events(shopper, bundle.items["item_id"].head(3).to_list()))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, lake: Path, shop: tuple[int, Replica]) -> OPEN:
    """The page with lake and endpoint, or with others."""
    def open_page(root: Path = lake, port: int = shop[0], key: str = "", **query: str) -> AppTest:
        for name, value in {"RECO_LAKE_ROOT": root, "RECO_SERVING_PORT": port, "RECO_APP_KEY": key}.items(): monkeypatch.setenv(name, str(value))
        app.parts.page.settings.clear()
        at = AppTest.from_file(str(APP), default_timeout=60)
        at.query_params.update(query)
        return ran(at.run())
    return open_page


def ran(at: AppTest) -> AppTest:
    assert not at.exception, at.exception
    return at


def press(at: AppTest, key: str) -> AppTest: return ran(at.button(key=key).click().run())


def html(at: AppTest) -> str: return "".join(h.proto.body for h in at.get("html"))


def cards(at: AppTest, surface: str = "for_you") -> list[str]:
    """The labels of a shelf's cards, in order."""
    return [b.label for b in at.button if (b.key or "").startswith(f"open-{surface}-")]


def look(at: AppTest, surface: str = "for_you", about: str = "") -> Look: return at.session_state["visit"].looks[surface, about]


def titles(bundle: ModelBundle, ids: list[str]) -> list[str]:
    """As `stocked` gave them."""
    places = {x: n for n, x in enumerate(bundle.items["item_id"])}
    return [f"Tea cup {places[x]}" if places[x] else ODD for x in ids]


def sent(replica: Replica, user_id: str) -> list[dict]:
    """What is on the bus of a shopper, as a consumer decodes it."""
    client, codec = replica.intake.producer.client, open_codec(replica.settings.stream)
    return [e for _, fields in client.xrange(replica.settings.stream.topic) if (e := codec.decode(fields[b"event"]))["user_id"] == user_id]


# ---- the page as it comes


def test_home_is_the_list_of_the_most_active_shopper_with_reasons(page, shop, shopper, lake):
    at = page()
    assert at.selectbox[0].value == shopper and not at.error and not at.warning
    with Client(f"http://127.0.0.1:{shop[0]}") as client: wanted = client.recommend(shopper, 12, explain=True)
    assert look(at).found.ids == wanted.ids and len(cards(at)) == 12
    for x in wanted.items: assert x.why.reason[1:].replace("'", "&#x27;") in html(at)
    assert html(at).count('class="shop-photo') == 12 and "12 items in" in html(at) and "nothing is known" not in html(at)
    table = at.dataframe[0].value
    assert list(table["Did"]) == ["bought", "viewed", "viewed"] and set(table["When"]) == {"before"}


def test_who_looks_again_is_shown_the_same_list_and_no_new_exposure(page):
    at = page()
    first = look(at).found.request_id
    assert look(ran(at.run())).found.request_id == first


def test_what_is_pressed_happens_and_the_next_list_knows_it(page, shop):
    at = page(kind="new", shopper="walker")
    assert "nothing is known yet" in html(at) and not at.dataframe
    before, request = look(at).found.ids, look(at).found.request_id
    press(at, "open-for_you-3")
    item = before[3]
    assert at.query_params["item"] == item and cards(at, "similar") and cards(at, "bought_together") and not cards(at)
    clicked, viewed = sent(shop[1], "walker")
    assert (clicked["event"], viewed["event"]) == ("click", "view") and clicked["event_id"] != viewed["event_id"]
    for e in (clicked, viewed): assert (e["item_id"], e["request_id"], e["surface"]) == (item, request, "for_you") and e["session_id"] and e["price"] in (40.0, 30.0)
    press(at, "add")
    assert [e["event"] for e in sent(shop[1], "walker")] == ["click", "view", "addtocart"]
    press(at, "home")
    assert "item" not in at.query_params and look(at).found.ids != before
    assert "What changed since you put <b>" in html(at) and re.search(r"<b>\d+ new</b>|<b>\d+ moved up</b>", html(at)) and 'class="shop-mark' in html(at)
    assert cards(at, "bought_together"), "what goes with the cart is on the home page too"


def test_a_cart_is_one_order_and_every_piece_is_owed_to_its_list(page, shop, bundle):
    at, ids = page(kind="new", shopper="buyer"), bundle.items["item_id"].to_list()
    requests = {}
    for place in (0, 1):
        item = look(at).found.ids[place]
        press(at, f"open-for_you-{place}")
        requests[item] = at.session_state["visit"].came[item].request_id
        press(at, "add")
        if not place: press(at, "add")
        press(at, "home")
    visit = at.session_state["visit"]
    first, second = visit.cart
    assert visit.cart == {first: 2, second: 1}
    price = {i: 30.0 if i == ids[1] else 40.0 for i in ids} # one is reduced by a quarter
    assert at.button(key="buy-all").label == f"Buy all · {2*price[first] + price[second]:.2f}"
    press(at, "buy-all")
    bought = [e for e in sent(shop[1], "buyer") if e["event"] == "transaction"]
    assert {e["item_id"]: (e["quantity"], e["price"], e["request_id"]) for e in bought} == {first: (2, price[first], requests[first]), second: (1, price[second], requests[second])}
    assert len({e["order_id"] for e in bought}) == 1 and bought[0]["order_id"] and not at.session_state["visit"].cart
    assert "3 items bought" in at.success[0].value and not ran(at.run()).success
    assert {"bought", "put in the cart", "viewed", "clicked"} == set(at.dataframe[0].value["Did"])


def test_the_cart_can_be_emptied_and_bought_at_once(page, shop):
    at = page(kind="new", shopper="undecided")
    press(at, "open-for_you-0")
    press(press(at, "add"), "out-0")
    assert not at.session_state["visit"].cart
    press(at, "buy")
    [bought] = [e for e in sent(shop[1], "undecided") if e["event"] == "transaction"]
    assert bought["quantity"] == 1 and bought["order_id"]


def test_a_visit_without_an_id_leaves_no_event_and_is_followed_all_the_same(page, shop):
    at = page()
    ran(at.segmented_control(key="kind").set_value("anonymous").run())
    assert at.query_params["kind"] == "anonymous" and "shopper" not in at.query_params and "are not stored" in at.caption[0].value
    before, stored = look(at).found, shop[1].intake.producer.client.xlen(shop[1].settings.stream.topic)
    assert before.fallback and not [b for b in at.button if b.label == "Why these?"]
    press(press(at, "open-for_you-5"), "home")
    assert not look(at).found.fallback and look(at).found.ids != before.ids and "What changed since you viewed <b>" in html(at)
    assert shop[1].intake.producer.client.xlen(shop[1].settings.stream.topic) == stored
    assert list(at.dataframe[0].value["Did"]) == ["viewed", "clicked"]


def test_another_shopper_begins_anew(page, shopper):
    at = page()
    press(at, "open-for_you-0")
    press(at, "add")
    ran(at.segmented_control(key="kind").set_value("new").run())
    visit = at.session_state["visit"]
    assert visit.user_id.startswith("guest-") and not visit.cart and not visit.done and at.query_params.get("item") is None
    ran(at.text_input[0].set_value("somebody else").run())
    assert at.session_state["visit"].user_id == at.query_params["shopper"] == "somebody else"
    ran(at.segmented_control(key="kind").set_value("known").run())
    assert at.session_state["visit"].user_id == shopper


def test_a_link_opens_an_item_for_a_shopper_and_no_list_gets_the_credit(page, shop, bundle):
    item = bundle.items["item_id"][4]
    at = page(kind="known", shopper="linked", item=item)
    [viewed] = sent(shop[1], "linked")
    assert (viewed["event"], viewed["item_id"], viewed["request_id"]) == ("view", item, None)
    assert "Tea cup 4" in html(at) and item not in look(at, "similar", item).found.ids and "no list gets the credit" in at.caption[0].value
    ran(at.run())
    assert len(sent(shop[1], "linked")) == 1, "looking at a page twice is one view"


def test_what_is_reduced_or_sold_out_is_seen(page, bundle):
    reduced = page(kind="new", shopper="a", item=bundle.items["item_id"][1])
    assert "30.00" in html(reduced) and "40.00</s>" in html(reduced) and not reduced.button(key="buy").disabled
    gone = page(kind="new", shopper="a", item=bundle.items["item_id"][2])
    assert "sold out" in html(gone) and gone.button(key="buy").disabled and gone.button(key="add").disabled


def test_a_list_is_taken_apart_on_the_page_of_that(page, shopper):
    at = page()
    press(at, "apart-for_you")
    asked = at.session_state["why"]
    assert (asked.user_id, asked.surface, asked.request_id) == (shopper, "for_you", look(at).found.request_id)
    assert at.title[0].value == "Why this list?" and len(at.dataframe[0].value) == 12


def test_a_shelf_is_taken_apart_as_it_was_and_who_shops_now_is_who_is_asked_about(page, bundle):
    at, item = page(kind="new", shopper="first", item=bundle.items["item_id"][4]), bundle.items["item_id"][4]
    shown = look(at, "similar", item).found.ids
    press(at, "apart-similar")
    assert at.multiselect[0].value == [item] and at.dataframe[0].value["Item"].to_list() == titles(bundle, shown)
    ran(at.switch_page("app_pages/shop.py").run())
    press(at, "somebody-else")
    ran(at.switch_page("app_pages/why.py").run())
    assert at.selectbox[0].value == at.session_state["visit"].user_id != "first"


# ---- what is not there


def test_without_the_endpoint_the_page_says_what_to_start_and_keeps_the_past(page):
    at = page(port=free_port())
    assert "make serve" in at.error[0].value and not cards(at) and len(at.dataframe[0].value) == 3
    assert at.button(key="again").label == "Try again"


def test_a_slow_endpoint_is_given_up_on(page, monkeypatch):
    monkeypatch.setattr("app.parts.page.TIMEOUT_S", 0.3)
    with listening(sleepy(2)) as port: at = page(port=port)
    assert "did not answer within 0.3 s" in at.error[0].value and len(at.dataframe[0].value) == 3


def test_with_an_empty_lake_somebody_new_can_shop(page, tmp_path):
    at = page(root=tmp_path)
    assert "make demo" in at.info[0].value and len(cards(at)) == 12 and at.segmented_control(key="kind").options == ["New shopper", "No id"]
    press(at, "open-for_you-0")
    assert "The catalogue does not know this item." in [c.value for c in at.caption]


def test_what_the_endpoint_did_not_take_waits_and_is_sent_later(page, shop, monkeypatch):
    monkeypatch.setattr("app.client.LONGEST_S", 0.01)
    at, intake = page(kind="new", shopper="patient"), shop[1].intake
    monkeypatch.setattr(shop[1], "intake", None)
    press(at, "open-for_you-0")
    assert "2 events wait" in at.warning[0].value
    monkeypatch.setattr(shop[1], "intake", intake)
    press(at, "add")
    assert not at.warning and [e["event"] for e in sent(shop[1], "patient")] == ["click", "view", "addtocart"]


def test_a_clients_key_gives_lists_without_reasons_and_says_so_once(page, bundle, trained, tmp_path):
    keys = load_keys(Settings(serving=Serving(client_keys="c" * 32, admin_keys="a" * 32)))
    with open_shop(bundle, trained.settings.model_copy(update={"root": tmp_path}), trained.sim.interactions.head(10), keys) as (port, _):
        at = page(port=port, key="c" * 32)
        assert len(cards(at)) == 12 and 'class="shop-reason"' not in html(at) and "admin's key" in at.info[0].value
        assert not press(at, "open-for_you-0").info
        assert "RECO_APP_KEY" in page(port=port).error[0].value  # no key at all: nothing is shown, and the page says what to set
        assert 'class="shop-reason"' in html(page(port=port, key="a" * 32))


# ---- what comes of shops is data


@pytest.mark.parametrize("item", ["<script>alert(1)</script>", "..", "a/b?c=d&e", "é😀", "x" * 600, "' OR 1=1", ODD])
def test_an_odd_id_in_a_link_is_an_item_that_nobody_knows(page, item):
    at = page(kind="known", shopper=item, item=item)
    assert "does not know this item" in " ".join(c.value for c in at.caption) and "<script>" not in html(at)
    assert len(item) > 512 or cards(at, "similar")


def test_odd_titles_are_shown_as_they_are(page, bundle):
    item = bundle.items["item_id"][0]
    at = page(kind="new", shopper="odd", item=item)
    assert "&lt;b&gt;Pot&lt;/b&gt;" in html(at) and "<b>Pot" not in html(at)
    press(at, "add")
    press(at, "home")
    assert "&lt;b&gt;Pot" in html(at) and at.button(key="out-0")


def test_markdown_shows_a_title_as_it_is():
    assert plain("a*b_c  d") == "a\\*b\\_c d"
    for mark in ("*", "_", "`", "$", "[", "<", "~", "#"): assert f"\\{mark}" in plain(f"x{mark}y{mark}")
    assert ":material/home:" not in plain(":material/home:") and ":red[" not in plain(":red[x]") and plain("9:30 am") == "9\\:\u206030 am"


def test_cards_escape_every_text_of_the_shop():
    item = {"item_id": "<i>1</i>", "title": ODD, "category": '"><script>', "price": 3.5, "discount": 0.1, "available": True}
    said = top(item, {}) + foot(item, Scored("1", 0.5, Why("because you viewed <b>x</b>", (), {}, None, None, (), 0.0)))
    assert not any(tag in said for tag in ("<b>", "<i>", "<script>")) and "Because you viewed &lt;b&gt;x" in said and "3.15" in said


# ---- what changed


def test_marks_are_what_moved():
    made = lambda ids: Recommended([Scored(i, 0.5) for i in ids], "r", "b")
    now = Look(made("cabx"), 2, tuple("abcd"))
    assert now.moves == {"c": 2, "a": -1, "b": -1, "x": None} and now.gone == 1
    assert Look(made("ab"), 0).moves == {} and Look(made("ab"), 0).gone == 0
    item = {"item_id": "c", "discount": None, "available": None}
    assert "▲ 2" in marks(item, now.moves) and "up 2 places" in marks(item, now.moves)
    assert ">new<" in marks(item | {"item_id": "x"}, now.moves) and marks(item | {"item_id": "a"}, now.moves) == ""


def test_of_each_item_the_strongest_act_is_told(page):
    page()
    e = lambda item, event: {"item_id": item, "event": event}
    assert acts([]) == acts([e("1", "click")]) == ""
    assert acts([e("1", "click"), e("1", "view")]) == "you viewed <b>Item 1</b>"
    assert acts([e("1", "view"), e("1", "transaction"), e("2", "view"), e("3", "view"), e("1", "view")]) == "you viewed 2 items and bought <b>Item 1</b>"


# ---- pictures


def drawn_of(address: str) -> str: return b64decode(address.removeprefix("data:image/svg+xml;base64,")).decode()


def test_a_picture_is_the_items_own_and_holds_no_text_of_the_shop():
    assert picture("a", "Lamp", "light") == picture("a", "Lamp", "light") != picture("b", "Lamp", "light")
    assert len({picture(f"p{n}", "Lamp", "light") for n in range(200)}) == 200
    assert drawn_of(picture(ODD, ODD, ODD)).isascii() and "Pot" not in drawn_of(picture(ODD, ODD, ODD))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_can_be_drawn(shape):
    word = next((w for w, s in WORDS.items() if s == shape), "")
    root = xml.fromstring(drawn_of(picture("1", word, "")))
    assert root.tag.endswith("svg") and len(root.findall(".//*")) > 5


def test_things_look_like_what_they_are_called():
    assert shape_of("Tarn Running Sock Delta 2", "Sport / Running / Socks") == "sock"
    assert shape_of("Juniper Memory Card Summit 6", "") == "memory card"
    assert shape_of("Solis Sleeping Bag Ember 3", "") == "sleeping bag" and shape_of("Tote Bag", "") == "bag"
    assert shape_of("X 9", "Home / Knives") == "knife" and shape_of("X 9", "category_7") == shape_of("Y", "category_7")
    assert len({shape_of("", f"category_{n}") for n in range(60)}) > 5
