"""The monitoring page against a real endpoint and tables that reco wrote: figures between two looks, drift, batches, events, and what an admin may do."""
import sys
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from bundles import days_before
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from shop_floor import listening
from streamlit.testing.v1 import AppTest

from app import following
from app.client import Client
from app.contract import create_app
from app.keys import load_keys
from app.parts.monitoring import retraining
from app.parts.monitoring.drifting import framed
from app.parts.monitoring.live import (
    Look,
    Looks,
    between,
    by,
    counts_of,
    looks,
    proposed,
    quantile,
    stages,
    total,
    traffic,
)
from app.parts.monitoring.operations import entry
from app.parts.wording import plain
from app.ports import free_port
from app.serve import Replica
from reco.alerts import Event, tell
from reco.data.ingestion import ingest
from reco.data.lake import Lake
from reco.data.sources import read_source
from reco.monitoring.decision import by_age, by_drift, by_hand, decide, deciding
from reco.monitoring.drift import drift_table
from reco.monitoring.files import keep_file
from reco.monitoring.history import keep_numbers, keep_skew
from reco.monitoring.retrains import claim, settle
from reco.published import current_name, history, publish
from reco.schemas import CATALOG, conform
from reco.settings import Quality, Serving, Settings, load_settings

PAGE = Path(__file__).resolve().parent.parent/"app"/"app_pages"/"monitoring.py"
FIRST, DAYS = date(2026, 5, 1), 6
ODD = "<img src=x onerror=alert(1)> **tea** | $1$ [x](y)"
CLIENT, ADMIN = "c"*32, "a"*32

# ---- two looks ------------------------------------------------------------------------------------------------------

def text_of(registry: CollectorRegistry) -> str: return generate_latest(registry).decode()

def test_a_quantile_is_prometheus_own():
    """histogram_quantile of 10 observations in (0.1, 0.2], 10 in (0.2, 0.4]: the median is the border, p75 the middle of the second, and beyond the last limit it is the limit."""
    registry = CollectorRegistry()
    h = Histogram("reco_x_seconds", "x", ["route"], buckets=(0.1, 0.2, 0.4), registry=registry)
    for x in (0.15,)*10 + (0.3,)*10: h.labels("/a").observe(x)
    for _ in range(5): h.labels("/b").observe(9)
    counts = counts_of(text_of(registry))
    at = lambda q, *routes: quantile(counts, "reco_x_seconds", q, routes)
    assert at(0.5, "/a") == pytest.approx(0.2) and at(0.75, "/a") == pytest.approx(0.3) and at(0.25, "/a") == pytest.approx(0.15) and at(1, "/a") == pytest.approx(0.4)
    assert at(0.99) == pytest.approx(0.4) and at(0.5, "/nowhere") is None and quantile(counts, "reco_other", 0.5) is None

def test_what_lies_between_two_looks():
    registry = CollectorRegistry()
    c = Counter("reco_lists", "x", ["surface", "fallback", "degraded"], registry=registry)
    c.labels("for_you", "false", "false").inc(3)
    a = Look(100, counts_of(text_of(registry)))
    c.labels("for_you", "false", "false").inc(2)
    c.labels("similar", "true", "false").inc(4)
    b = Look(110, counts_of(text_of(registry)))
    made = between(a, b)
    assert total(made, "reco_lists_total") == 6 and total(made, "reco_lists_total", fallback="true") == 4 and by(made, "reco_lists_total", "surface") == {"for_you": 2, "similar": 4}
    assert between(b, a) is None and between(a, Look(120, {})) is None and between(b, Look(120, {k: v - 1 for k, v in b.counts.items()})) is None # started anew
    seen = Looks()
    assert seen.over(60) is None and seen.last() is None
    for look in (a, b, Look(111, b.counts)): seen.add(look)
    assert seen.over(5).lists == 6 and seen.over(1).lists == 0 and seen.over(600).seconds == 11 and seen.over(600).fallback == pytest.approx(4/6)
    assert [at for at, _ in seen.series(5)] == [110]
    seen.add(Look(90, b.counts)) # of a slower thread
    assert seen.last().at == 111
    seen.add(Look(120, a.counts)) # counts fell: another process
    assert seen.over(60) is None and seen.last().at == 120
    seen.add(Look(120 + 10_000, a.counts))
    assert seen.added(60) is None # what is so old tells nothing of now

def test_traffic_is_what_the_endpoint_counted(endpoint):
    with Client(f"http://127.0.0.1:{endpoint}") as client:
        before = Look(0, counts_of(client.metrics()))
        for n in range(20): client.recommend(f"stranger {n}", 5)
        with pytest.raises(Exception, match="422"): client.recommend("u", 500)
        client.ready()
        made = between(before, Look(10, counts_of(client.metrics())))
    t = traffic(made, 10)
    assert (t.requests, t.refused, t.failed, t.lists, t.fallback, t.rate) == (21, 1, 0, 20, 1.0, 2.1) and 0 < t.p50 <= t.p95 <= t.p99
    assert sum(proposed(made).values()) > 5 and list(stages(made))[-1] == "response" and all(mean >= 0 for mean, _ in stages(made).values())

# ---- the shop -------------------------------------------------------------------------------------------------------

def drifted(lake: Lake) -> None:
    "Six days of the same prices, then two of prices in cents; the last asks for a retrain."
    rng = np.random.default_rng(1)
    frame = lambda factor, n: pl.DataFrame({"price": factor*rng.gamma(2, 10, n), "category": rng.choice([ODD, "pots", "cups"], n), "who": np.arange(n) % 200})
    before = frame(1, 4_000)
    for n in range(DAYS):
        day, at = FIRST + timedelta(days=n), datetime(2026, 5, 1 + n, 4, tzinfo=UTC)
        drift = pl.concat([drift_table(t, before, frame(100 if n >= 4 and t == "events" else 1, 2_000), "who") for t in ("events", "catalog")])
        reasons = [by_drift(deciding(drift, ["events.*", "catalog.*"], []), 0.2, 0.001), by_age(3.0 + n, 30)]
        verdict = decide(reasons, None, at, 7)
        keep_numbers(lake, day, at, "bundle-1", drift, by_hand(verdict, f"because {ODD}") if n == 5 else verdict)
        keep_skew(lake, day, at, "bundle-1", {"requests": 40.0, "items": 400.0, "different": 0.01 if n < 5 else 0.2, "absent": 0.0, "same_lists": 0.9}, {"kept": 7, "changed": 3})
    keep_file(lake, f"pages/{FIRST + timedelta(days=5)}/drift.html", b"<h1>Evidently's</h1><script>let a = \"<\"</script>")
    for n, outcome in ((0, "promoted"), (3, "train: exit code 7"), (5, "asked")):
        claim(lake, FIRST + timedelta(days=n), datetime(2026, 5, 1 + n, 4, tzinfo=UTC), f"run {n}", "bundle-1", f"because {ODD}")
        settle(lake, FIRST + timedelta(days=n), f"run {n}", outcome)

def batch(folder: Path, lake: Lake, n: int, bad: int) -> None:
    "Events through the real gate, some of them without an item or from nobody."
    raw = folder/f"raw{n}"
    raw.mkdir()
    rows = [{"event_id": f"{n}-{i}", "ts": datetime(2026, 5, 1 + n, 1, tzinfo=UTC) + timedelta(seconds=i), "user_id": "" if i < bad else f"u{i % 30}", "item_id": f"i{i % 9}", "event": "view"} for i in range(300)]
    pl.DataFrame(rows).write_csv(raw/"interactions.csv")
    conform(pl.DataFrame({"item_id": [f"i{i}" for i in range(9)], "valid_from": datetime(2026, 1, 1, tzinfo=UTC), "price": 2.0}), CATALOG).write_parquet(raw/"catalog.parquet")
    loose = Quality(bad_share="1 error", null_share="0.02 warn")
    assert not ingest("files", lambda _: read_source("files", raw), lake, datetime(2026, 5, 1 + n, 3, tzinfo=UTC), loose, 30, folder/"scratch", 0.5).refused

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A shop's folder with all that the page can show; the last batch is a bad one."
    root = tmp_path_factory.mktemp("watched")
    (root/"settings.ini").write_text("[lake]\nroot = lake\n[bundles]\nroot = bundles\n")
    lake = Lake(root/"lake")
    drifted(lake)
    for n, bad in ((0, 0), (1, 3), (2, 30)): batch(root, lake, n, bad)
    for n, what in enumerate(("bundle_published", "drift_found", "something_else")): tell(root/"bundles", Event(what, f"ann {ODD}", f"number {n} {ODD}", f"k{n}", {"day": "x"}), {})
    return root

@pytest.fixture(scope="module")
def endpoint(bundle, store) -> Iterator[int]:
    replica = Replica()
    replica.store = store
    following.try_out(bundle, store) # the first list is slow, and not what is tested
    replica.use(bundle)
    with listening(create_app(replica)) as port: yield port

@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, folder: Path, request: pytest.FixtureRequest):
    "The page on that shop and the endpoint, or on others; tabs that ask no endpoint need none."
    def open_page(tab: str = "Now", root: Path = folder, port: int|None = None) -> AppTest:
        from app.parts.page import settings
        if port is None: port = request.getfixturevalue("endpoint") if tab in ("Now", "Operations") else free_port()
        monkeypatch.setenv("RECO_SETTINGS", str(root/"settings.ini"))
        monkeypatch.setenv("RECO_SERVING_PORT", str(port))
        settings.clear()
        test = AppTest.from_file(str(PAGE), default_timeout=60)
        if tab != "Now": test.query_params["watch"] = tab
        test.run()
        assert not test.exception, test.exception
        return test
    return open_page

def said(test: AppTest) -> str: # all text of the page
    return "\n".join(x.value for kind in (test.markdown, test.caption, test.info, test.error, test.warning, test.success) for x in kind)

def metric(test: AppTest, label: str) -> str: return next(m.value for m in test.metric if m.label == label)

# ---- now ------------------------------------------------------------------------------------------------------------

def test_the_live_figures_are_those_between_looks(page, endpoint, bundle):
    looks.clear()
    test = page()
    assert "The first look was just now" in said(test) and not test.metric
    with Client(f"http://127.0.0.1:{endpoint}") as client:
        for n in range(30): client.recommend(f"s{n}", 5)
    looks(f"http://127.0.0.1:{endpoint}")._looks[0] = Look(looks(f"http://127.0.0.1:{endpoint}").last().at - 10, looks(f"http://127.0.0.1:{endpoint}").last().counts)
    test.run()
    assert not test.exception and 1.5 < float(metric(test, "Requests a second")) <= 3.0 and metric(test, "Errors") == "0.0%" and metric(test, "Fallbacks") == "100.0%"
    assert metric(test, "95% wait up to").endswith("s") and "Most candidates come from" in said(test) and "Most of the time goes into" in said(test)
    assert bundle.manifest["id"].replace("-", "\\-") in said(test) and "which knows what happened until" in said(test)
    test.segmented_control(key="over").set_value("Since it started").run()
    assert not test.exception and float(metric(test, "Requests").replace(",", "")) >= 30

def test_an_endpoint_that_is_down_is_said_and_the_rest_is_there(page):
    port = free_port()
    assert "make serve" in page(port=port).error[0].value
    for tab, words in (("Drift and retraining", "Drift: how far"), ("Incoming data", "The last batches"), ("What happened", "newest first")): assert words in said(page(tab, port=port))
    test = page("Operations", port=port)
    assert "make serve" in test.error[0].value and test.button(key="rollback").disabled and test.button(key="retrain").disabled

def test_what_is_no_endpoint_is_said(page):
    async def other(scope: dict, receive: object, send: object) -> None:
        body = b"{}" if scope["path"] == "/ready" else b"not { figures"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})
    with listening(other) as port: assert "is not the endpoint" in page(port=port).error[0].value

def test_a_bundle_that_was_refused_and_a_store_that_is_down(page, bundle, store):
    replica = Replica()
    replica.use(bundle)
    replica.following = following.Following.__new__(following.Following)
    replica.following.blind, replica.following.refusal = None, following.Refusal("b-2", f"wrong checksum {ODD}")
    replica.store_answers = lambda: False
    replica.store = store
    with listening(create_app(replica)) as port: test = page(port=port)
    assert "was published and is not served" in test.warning[0].value and "<img" not in test.warning[0].value.replace("\\<img", "") and "Degraded: the online store is down" in said(test)

# ---- drift, data, events --------------------------------------------------------------------------------------------

def test_drift_says_what_moved_and_when(page):
    test = page("Drift and retraining")
    text = said(test)
    assert "6 May: train again" in text and "1 column was beyond limit and chance in 6 days: events\\.price" in text
    assert "Retrains" in text and "The last one, on 6 May: asked for" in text and "20.0% of 400 items had another score, the limit is 5.0%" in text and "7 because the list was made for an earlier request" in text
    assert len(test.get("vega_lite_chart") + test.get("arrow_vega_lite_chart")) == 3
    test.selectbox(key="drift column").set_value("events.price").run()
    price = next(m.value for m in test.markdown if m.value.startswith("###### events\\.price"))
    assert not test.exception and "on 6 May, the limit is 0.2" in price and float(price.split(": ")[1].split(" on")[0]) > 1
    outcomes = next(d.value for d in test.dataframe if "Outcome" in d.value.columns)
    assert list(outcomes["Outcome"]) == ["asked for: somebody else trains", "failed: train: exit code 7", "trained, and served"]

def test_evidently_page_comes_when_it_is_wanted_and_cannot_reach_the_app(page):
    test = page("Drift and retraining")
    day = FIRST + timedelta(days=5)
    assert not test.get("iframe")
    test.toggle(key=f"open {day}").set_value(True).run()
    assert not test.exception and len(test.get("iframe")) == 1 and any("Download the page" in b.label for b in test.download_button)
    made = framed('<p title="a">it\'s</p>')
    assert 'sandbox="allow-scripts"' in made and "allow-same-origin" not in made and "<p" not in made and "&lt;p title=&quot;a&quot;&gt;" in made
    next(s for s in test.selectbox if s.label == "Day").set_value(FIRST).run()
    test.toggle(key=f"open {FIRST}").set_value(True).run()
    assert "is not kept: pages stay 30 days" in said(test) and not test.get("iframe")

def test_batches_and_what_was_set_aside(page):
    test = page("Incoming data")
    text = said(test)
    assert "300 events, 10.00% set aside" in text and "null\\_share" in test.warning[0].value and "33 rows, most for “null user\\_id”" in text
    held = next(d.value for d in test.dataframe if "Constraint" in d.value.columns)
    row = held[held["Constraint"] == "null_share"].iloc[0]
    assert row["Held"] == "no: warning" and row["Found"] == pytest.approx(0.1) and row["About"] == "share of rows without a value that every row needs"

def test_events_are_newest_first_and_no_markup(page):
    test = page("What happened")
    html = "".join(h.proto.body for h in test.get("html"))
    assert html.index("number 2") < html.index("number 1") < html.index("number 0") and html.count("<li>") == 3 and "Something else" in html and "<img" not in html
    test.button_group(key="kinds").set_value(["drift_found"]).run()
    assert "".join(h.proto.body for h in test.get("html")).count("<li>") == 1
    odd = entry({"at": "yesterday <b>", "what": "<i>x</i>", "who": None, "text": ODD})
    assert "<b>x" not in odd and "<img" not in odd and "yesterday &lt;b&gt;" in odd

@pytest.mark.parametrize(("tab", "words"), [("Drift and retraining", "make monitor"), ("Incoming data", "make ingest"), ("What happened", "make train"), ("Operations", "No retrain was begun from here yet")])
def test_nothing_there_says_what_makes_it(page, tmp_path, tab, words):
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n[bundles]\nroot = bundles\n")
    test = page(tab, tmp_path)
    assert words in said(test) and not test.get("arrow_vega_lite_chart")

# ---- what an admin may do -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("two")
    return root, [days_before(trained, root, d) for d in (1, 0)]

@pytest.fixture
def served(two, store, tmp_path, monkeypatch) -> Iterator[tuple[Path, Replica, list[str]]]:
    "A shop's folder with two bundles that were published one after the other, and a replica that follows it; with keys."
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n[bundles]\nroot = bundles\n")
    (tmp_path/"bundles").mkdir()
    for p in two[0].iterdir(): (tmp_path/"bundles"/p.name).symlink_to(p)
    for name in two[1]: publish(tmp_path/"bundles"/name, "test", "to begin with")
    monkeypatch.setattr(following, "EVERY_S", 600)
    replica = Replica()
    replica.store = store
    replica.reconfigure({"bundle": str(tmp_path/"bundles")})
    replica.keys = load_keys(Settings(serving=Serving(client_keys=CLIENT, admin_keys=ADMIN)))
    yield tmp_path, replica, two[1]
    replica.following.end()

def asking(what: str) -> AppTest: # the inside of a dialog: a dialog's own reruns are no runs of the page, which is all that AppTest can do
    return AppTest.from_string(f"from app.parts.monitoring.operations import going_back, training_anew\n{what}", default_timeout=60).run()

def answered(test: AppTest, who: str, why: str) -> AppTest:
    test.text_input(key="who").set_value(who)
    test.text_area(key="why").set_value(why)
    test.button(key="do it").click().run()
    assert not test.exception, test.exception
    return test

def test_only_an_admin_may_and_says_who_and_why(page, served):
    root, replica, (old, new) = served
    with listening(create_app(replica)) as port:
        test = page("Operations", root, port)
        assert test.button(key="rollback").disabled and "asks for an admin's key" in said(test)
        test.text_input(key="admin key").set_value(CLIENT).run()
        assert "not an admin's key" in test.error[0].value and test.button(key="rollback").disabled
        test.text_input(key="admin key").set_value(ADMIN).run()
        assert not test.error and not test.button(key="rollback").disabled
        test.button(key="rollback").click().run()
        assert plain(old) in said(test) and plain(new) in said(test) and test.text_input(key="who") and current_name(root/"bundles") == new
        assert "Say who and why first" in answered(asking(f"going_back({ADMIN!r})"), "ann", "  ").error[0].value and current_name(root/"bundles") == new
        assert "Nothing was changed" in answered(asking(f"going_back({CLIENT!r})"), "ann", "why not").error[0].value and current_name(root/"bundles") == new
        done = answered(asking(f"going_back({ADMIN!r})"), "ann", f"prices are off {ODD}")
        assert "is served again" in done.session_state["done"] and current_name(root/"bundles") == old == replica.bundle_id
        last = history(root/"bundles")[-1]
        assert (last.who, last.back, last.why) == ("ann", True, f"prices are off {ODD}")
        assert "There is nothing to go back to" in said(done) and "There is nothing to go back to" in said(asking(f"going_back({ADMIN!r})"))

def test_a_rollback_that_fails_changes_nothing_and_says_so(page, served, monkeypatch):
    root, replica, (_, new) = served
    replica.keys = load_keys(Settings())
    with listening(create_app(replica)) as port:
        test = page("Operations", root, port)
        assert "has no keys" in said(test) and not test.button(key="rollback").disabled
        ended = replica.following
        monkeypatch.setattr(replica, "following", None) # this one follows nothing
        assert "Nothing was changed" in answered(asking("going_back('')"), "ann", "x").error[0].value and current_name(root/"bundles") == new
        replica.following = ended

def test_a_retrain_is_begun_once_and_its_log_is_shown(page, tmp_path, monkeypatch):
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n[bundles]\nroot = bundles\n")
    waits = f"import pathlib, sys, time\nprint('step 1', sys.argv, flush=True)\nwhile not pathlib.Path({str(tmp_path/'stop')!r}).exists(): time.sleep(.02)"
    monkeypatch.setattr(retraining.begin, "__defaults__", ((sys.executable, "-c", waits),))
    test = page("Operations", tmp_path)
    assert not test.button(key="retrain").disabled
    test.button(key="retrain").click().run()
    assert "on this machine" in said(test) and test.text_area(key="why")
    assert "The retrain has begun" in answered(asking("training_anew()"), "ann", "prices changed").session_state["done"]
    until = time.monotonic() + 20
    while not retraining.last(load_settings()).lines and time.monotonic() < until: time.sleep(0.02)
    test = page("Operations", tmp_path)
    assert test.status[0].state == "running" and test.status[0].label == "Training: begun just now by ann"
    assert "step 1" in test.code[0].value and "prices changed (asked for by ann)" in test.code[0].value and test.button(key="retrain").disabled and "A retrain is under way" in said(test)
    assert "under way" in answered(asking("training_anew()"), "bob", "me too").error[0].value
    (tmp_path/"stop").touch()
    retraining._begun[str(tmp_path/".demo"/"retrain.log")].wait(20)
    test.run()
    assert "it ended well" in test.status[0].label and test.status[0].state == "complete" and not test.button(key="retrain").disabled

def test_where_nothing_is_retrained_the_button_says_why(page, tmp_path):
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n[bundles]\nroot = bundles\n[monitor]\nretrain = never\n")
    test = page("Operations", tmp_path)
    assert test.button(key="retrain").disabled and "[monitor] retrain = never" in said(test) and not test.button(key="rollback").disabled
