"""The page that takes lists apart: what it says is what the endpoint did, in words and in sums."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import polars as pl
import pytest
from shop_floor import ODD, few_events, listening, stocked
from streamlit.testing.v1 import AppTest

import app.parts.page
from app.client import Anatomy, Client, Why
from app.contract import create_app
from app.keys import load_keys
from app.parts.why.apart import (
    MOVED,
    RULES,
    SOURCES,
    Asked,
    bump,
    meaning_of,
    ordinal,
    proposed,
    slopes,
    source_name,
    steps_of,
    verdict,
    waterfall,
)
from app.ports import free_port
from app.serve import Replica
from reco.bundle import ModelBundle
from reco.features.store import OnlineStore
from reco.moment import BUILT_IN
from reco.reranking.lists import MOVES
from reco.reranking.rules import FATES
from reco.settings import Serving, Settings

PAGE = Path(__file__).resolve().parent.parent / "app" / "app_pages" / "why.py"
OPEN = Callable[..., AppTest]


@pytest.fixture(scope="module")
def replica(bundle: ModelBundle, store: OnlineStore) -> Replica:
    made = Replica()
    made.bundle, made.store = bundle, store
    return made


@pytest.fixture(scope="module")
def endpoint(replica: Replica) -> Iterator[int]:
    with listening(create_app(replica)) as port: yield port


@pytest.fixture(scope="module")
def shopper(trained) -> str:
    counts = trained.sim.interactions.group_by("user_id").len().filter(pl.col("len") > 20).sort("user_id")
    return counts["user_id"][0]


@pytest.fixture(scope="module")
def lake(bundle: ModelBundle, shopper: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stocked(tmp_path_factory.mktemp("lake"), bundle, few_events(shopper, bundle.items["item_id"].head(3).to_list()))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, lake: Path, endpoint: int) -> OPEN:
    """The page with lake and endpoint, or with others."""
    def open_page(asked: Asked | None = None, root: Path = lake, port: int = endpoint, key: str = "") -> AppTest:
        for name, value in {"RECO_LAKE_ROOT": root, "RECO_SERVING_PORT": port, "RECO_APP_KEY": key}.items(): monkeypatch.setenv(name, str(value))
        app.parts.page.settings.clear()
        at = AppTest.from_file(str(PAGE), default_timeout=60)
        if asked: at.session_state["why"] = asked
        return ran(at.run())
    return open_page


@pytest.fixture(scope="module")
def told(endpoint: int, shopper: str) -> Anatomy:
    with Client(f"http://127.0.0.1:{endpoint}") as client: return client.why(shopper, 12)


def ran(at: AppTest) -> AppTest:
    assert not at.exception, at.exception
    return at


def said(at: AppTest) -> str: return "\n".join([*(m.value for m in at.markdown), *(c.value for c in at.caption), *(h.proto.body for h in at.get("html"))])


def box(at: AppTest, label: str) -> object: return next(s for s in at.selectbox if s.label == label)


def charts(at: AppTest) -> list[str]: return [json.loads(c.proto.spec)["description"] for c in at.get("vega_lite_chart")]


# ---- the page


def test_the_page_tells_what_the_endpoint_did(page, shopper, told):
    at = page()
    assert box(at, "Shopper").value == shopper and not at.error
    assert {m.label: m.value for m in at.metric} == {"Candidates": str(told.about["count"]), "Taken out by rules": str(sum(told.about["dropped"].get(r, 0) for r in RULES)),
                                                     "Shown": "12", "Time": next(m.value for m in at.metric if m.label == "Time")}
    the_list = at.dataframe[0].value
    assert the_list["Chance"].to_list() == [x.score for x in told.items] and the_list["Slot"].to_list() == list(range(1, 13))
    assert the_list["Place by score"].to_list() == [c["place"] for c in told.candidates[:12]]
    first = told.items[0]
    assert f"a chance of {first.score:.1%}" in said(at) and all(f"{source_name(s)} · <b" in said(at) for s in first.why.sources)
    assert at.dataframe[1].value.shape[0] == min(50, len(told.about["past"]))
    assert told.about["bundle_id"] in said(at) and any("Waterfall of log-odds" in c for c in charts(at)) and any("Time by stage" in c for c in charts(at))


def test_another_item_another_waterfall(page, told):
    at = page()
    ran(box(at, "Item of the list").set_value(told.items[3].item_id).run())
    assert f"a chance of {told.items[3].score:.1%}" in said(at) and f"{told.items[3].why.log_odds:.2f} for this item" in " ".join(charts(at))


def test_the_shop_page_says_which_list_and_which_item(page, told, shopper):
    asked = Asked(shopper, "similar", (told.items[0].item_id,), "", "")
    at = page(asked)
    assert at.segmented_control[0].value == "similar" and at.multiselect[0].value == [told.items[0].item_id] and told.items[0].item_id not in at.dataframe[0].value["Item"].to_list()
    at = page(Asked(shopper, item=told.items[5].item_id))
    assert box(at, "Item of the list").value == told.items[5].item_id
    lost = told.candidates[-1]["item_id"]
    at = page(Asked(shopper, item=lost))
    assert "is not on it now" in said(at) and box(at, "Item").value == lost and "The ranker gave it place" in said(at)


def test_each_list_can_be_asked_for(page):
    at = page()
    for surface in ("similar", "bought_together"):
        ran(at.segmented_control[0].set_value(surface).run())
        assert len(at.multiselect[0].value) == 1 and not at.error and at.dataframe
    ran(at.multiselect[0].set_value([]).run())
    assert "Choose an item" in at.info[0].value and not at.dataframe


def test_why_an_item_is_not_there_is_answered_for_any_id(page, told):
    at = page()
    behind = next(c for c in told.candidates if c["fate"] == "beyond_k")
    ran(box(at, "Item").set_value(behind["item_id"]).run())
    assert f"The ranker gave it place {behind['place']} of {told.about['count']}" in said(at)
    out = next((c for c in told.candidates if c["fate"] in RULES), None)
    assert out is not None, "no rule took anything out: choose another shopper"
    ran(box(at, "Item").set_value(out["item_id"]).run())
    assert f"would have given it place {out['place']}" in said(at) and RULES[out["fate"]] in said(at)


def test_somebody_new_has_no_past_and_a_list(page):
    at = page(Asked("nobody yet"))
    assert "Nothing: this shopper has no past" in said(at) and "so it is what is popular" in said(at).lower() and len(at.dataframe[0].value) == 12


# ---- what is not there


def test_without_the_endpoint_the_page_says_what_to_start(page):
    at = page(port=free_port())
    assert "make serve" in at.error[0].value and not at.metric


def test_without_an_admins_key_the_page_says_which_it_needs(page, bundle, store):
    closed = Replica()
    closed.bundle, closed.store, closed.keys = bundle, store, load_keys(Settings(serving=Serving(client_keys="c" * 32, admin_keys="a" * 32)))
    with listening(create_app(closed)) as port:
        assert "admin's key" in page(Asked("eve"), port=port, key="c" * 32).error[0].value
        assert page(Asked("eve"), port=port, key="a" * 32).metric


def test_with_an_empty_lake_somebody_can_be_typed(page, tmp_path):
    at = page(root=tmp_path)
    assert "type any id" in at.info[0].value and "make demo" in at.info[0].value and not at.error
    at = page(Asked("typed"), root=tmp_path)
    assert len(at.dataframe[0].value) == 12 and at.dataframe[0].value["Item"][0].startswith("Item ")
    ran(at.segmented_control[0].set_value("similar").run())
    assert "Choose an item" in at.info[0].value


@pytest.mark.parametrize("odd", ["<script>alert(1)</script>", "..", "a/b?c=d", ODD])
def test_odd_ids_are_data(page, odd, shopper):
    at = page(Asked(odd, "similar", (odd,), item=odd))
    assert "<script>" not in said(at) and not at.error
    at = page(Asked(shopper, item=odd))
    assert "<b>Pot</b>" not in said(at) and not at.error


def test_odd_titles_are_data(page, bundle, trained, shopper):
    at = page(Asked(shopper, "bought_together", (bundle.items["item_id"][0],)))
    assert "<b>Pot</b>" not in said(at) and not at.error


# ---- words and sums


def test_there_are_words_for_all_that_the_platform_has():
    assert set(RULES) == set(FATES[2:]) and set(MOVED) == set(MOVES) and set(SOURCES) == set(BUILT_IN)
    assert source_name("past_als") == "learned tastes (ALS), by their past" and source_name("mine") == "mine"
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th"]


def test_the_waterfall_adds_up(told):
    for x in told.items:
        steps = steps_of(x.why)
        parts = steps.slice(1, steps.height - 2)
        assert steps["x"][0] == x.why.base and math.isclose(steps["x"][-1], x.why.log_odds) and math.isclose(1 / (1 + math.exp(-x.why.log_odds)), x.score, abs_tol=1e-6)
        assert math.isclose(x.why.base + parts["x"].sum(), x.why.log_odds, abs_tol=1e-9)
        assert parts["low"].to_list()[0] == x.why.base and all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(parts["high"], [*parts["low"][1:], x.why.log_odds], strict=True))
        assert (parts["kind"].eq("raises the chance") == (parts["x"] >= 0)).all()
    waterfall(told.items[0].why).to_dict()


def test_proposals_and_places_are_the_endpoints(told):
    frame = proposed(told.candidates, told.about["proposed"])
    assert dict(frame.group_by("name").agg(pl.col("x").sum()).iter_rows()) == {source_name(s): n for s, n in told.about["proposed"].items() if n}
    lines = slopes(told.candidates)
    slots = lines.filter(pl.col("side") == "slot on the list")
    assert sorted(slots["at"]) == list(range(1, 13)) and lines.filter(pl.col("what") == "taken out by a rule").height == sum(
        c["fate"] in RULES and c["place"] < max(d["place"] for d in told.candidates[:12]) for c in told.candidates)
    bump(lines.with_columns(title=pl.col("item_id"))).to_dict()


def test_verdicts():
    c = lambda item, fate, **more: {"item_id": item, "fate": fate, "sources": {"als": 2, "content": 11}, "place": 7, "slot": None, "score": 0.25, "moved": ""} | more
    candidates = [c("on", "shown", slot=3), c("pin", "shown", slot=1, sources={}, place=None), c("far", "beyond_k"), c("out", "out_of_stock")]
    told = lambda item, count=4, context=(): verdict(item, candidates, {"count": count}, context, 5)
    assert told("on").startswith("It is on the list, in slot 3. Proposed by learned tastes (ALS) (2nd) and similar texts (11th).") and "it is 7th of 4" in told("on")
    assert told("pin") == "It is on the list, in slot 1. No source proposed it."
    assert "place 7 of 4 with a chance of 25.0%; the list has 5 slots" in told("far")
    assert told("out").endswith("place 7 of 4, but a rule took it out: sold out.")
    assert told("x").startswith("No source proposed it: it is not among the 4") and told("x", 900).startswith("It is not among the 4 best of 900")
    assert "what the list is about" in told("on", context=("on",))


def test_a_column_says_its_value():
    of = lambda meaning, value: meaning_of({"feature": "item_views_7d", "meaning": meaning, "value": value, "log_odds": 1.0})
    assert of("views of it", 12.0) == "Views of it: 12" and of("views of it", None) == "Views of it: unknown" and of("views of it", 12345.6) == "Views of it: 12,346"
    assert of("the same in a week", 0.12345) == "Item views 7d (the same in a week): 0.123"
    assert steps_of(Why("", (), {}, -1.0, -2.0, (), 1.0)).height == 3
