"""The business page against the books as flows/kpis.py writes them: every figure is the one that counting at once gives, and nothing of a shop is markup."""
import os
import subprocess
import sys
import time
from datetime import date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from streamlit.testing.v1 import AppTest
from test_days import START, at, traffic

from app.parts.business.earned import SUMS, Span, added, changed, returned, weekly
from app.parts.business.tables import csv
from app.parts.wording import FIGURES, QUESTIONS, answer, plain
from app.ports import free_port, port_free
from reco.data.lake import Lake
from reco.experiments.assignment import Experiment as Trial
from reco.experiments.assignment import Experiments, Variant
from reco.monitoring.credit import outcomes_of
from reco.monitoring.days import (
    complete,
    day_by_day,
    days_until,
    keep_days,
    kpis_by_day,
    readout_of,
    retention_by_day,
    rows_of,
    variety_by_day,
    with_segment,
)
from reco.monitoring.kpis import KPIS, kpi_table
from reco.monitoring.what_if import WHAT_IF
from reco.schemas import EXPOSURES, INTERACTIONS, conform

PAGE = Path(__file__).resolve().parent.parent/"app"/"app_pages"/"business.py"
CHROMIUM = Path("/usr/bin/chromium")
DAYS, WINDOW = 20, timedelta(days=1)
NOW = at(24*DAYS - 4) # the evening of the last day; of the last three days nothing is complete
ODD = "<b>*als*</b> | `x` $y$ [z](javascript:1)"
BOOK = Experiments(holdout=0.1, experiment=(Trial(name="lists", variant=(Variant(name="old", weight=0.5), Variant(name="new", weight=0.5, rerank={"diversity": 1.0}))),))
TOML = """holdout = 0.1
[[experiment]]
name = "lists"
[[experiment.variant]]
name = "old"
weight = 0.5
[[experiment.variant]]
name = "new"
weight = 0.5
rerank = {diversity = 1.0}
[[experiment]]
name = "planned_for_later"
from = 2999-01-01T00:00:00Z
[[experiment.variant]]
name = "a"
weight = 0.5
[[experiment.variant]]
name = "b"
weight = 0.5
serve = "challenger"
"""

def shop() -> tuple[pl.DataFrame, pl.DataFrame]:
    "Three weeks of lists on two surfaces and what came of them, a source with a name full of markup among them."
    shown, did = traffic(DAYS, 120, 3, 1.5, BOOK, (0.9, 0.8))
    surface = pl.when(pl.col("user_id").str.ends_with("1")).then(pl.lit("similar")).otherwise(pl.lit("for_you"))
    shown = conform(shown.with_columns(surface=surface, source=pl.col("source").replace({"als": ODD})), EXPOSURES)
    old = did.head(1).with_columns(event_id=pl.lit("old"), ts=pl.col("ts") - timedelta(days=9), user_id=pl.lit("an early bird")) # else all is the log's first week
    return shown, conform(pl.concat([did, old]), INTERACTIONS)

def books(shown: pl.DataFrame, did: pl.DataFrame, now: datetime = NOW) -> dict[str, pl.DataFrame]:
    "What flows/kpis.py writes, had it run daily; an experiment that cannot be read is not there."
    catalog = pl.DataFrame({"item_id": shown["item_id"].unique().sort(), "valid_from": START}).lazy()
    known = shown.filter(pl.col("ts") < now).lazy(), did.filter(pl.col("ts") < now).lazy()
    kpis, varied, rows = [], [], []
    for outcomes in day_by_day(*known, days_until(START.date(), now), now, WINDOW):
        asked = with_segment(outcomes, known[1])
        kpis.append(kpis_by_day(asked).with_columns(complete=complete(pl.col("day"), now, WINDOW)))
        varied.append(variety_by_day(asked, catalog, known[1], 14))
        rows.append(rows_of(BOOK.experiment[0], outcomes))
    readouts = []
    for n in (DAYS - 8, DAYS - 1, DAYS):
        during, before = (pl.concat(part) for part in zip(*rows[:n], strict=True))
        table, why = readout_of(BOOK.experiment[0], during, before, alpha=0.05, plan=10_000, srm_alpha=0.001, least=20)
        if not why: readouts.append(table.select(pl.lit(START.date() + timedelta(days=n - 1)).alias("day"), pl.lit("lists").alias("experiment"), pl.all()))
    return {"kpis": pl.concat(kpis), "variety": pl.concat(varied), "retention": retention_by_day(known[1], known[0], now.date(), 60), "readouts": pl.concat(readouts)}

@pytest.fixture(scope="module")
def made() -> tuple[pl.DataFrame, pl.DataFrame, dict[str, pl.DataFrame]]:
    shown, did = shop()
    return shown, did, books(shown, did)

@pytest.fixture(scope="module")
def folder(made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A shop's folder with settings, experiments and books."
    root = tmp_path_factory.mktemp("books")
    (root/"settings.ini").write_text("[lake]\nroot = lake\n[experiments]\nfile = experiments.toml\n")
    (root/"experiments.toml").write_text(TOML)
    lake, (shown, did, tables) = Lake(root/"lake"), made
    lake.write("exposures", shown, key=["request_id", "surface", "rank"], day_of="ts")
    lake.write("interactions", did, key=["event_id"], day_of="ts")
    keep_days(lake, tables)
    judged = [{"policy": p, "epsilon": e, "reward": "clicks", "method": m, "value": 0.5, "low": 0.4, "high": 0.6, "gain": g, "gain_low": g - 0.05, "gain_high": g + 0.05,
               "requests": 900, "effective": 300.0, "support": 1.0, "clipped": 0.0, "verdict": "estimated"} for p, e, g in (("no exploration", 0.0, 0.02), ("epsilon 0.2", 0.2, 0.1)) for m in ("dr", "ips")]
    lake.write("what_ifs", pl.DataFrame(judged, schema=WHAT_IF).with_columns(day=pl.lit(NOW.date()), surface=pl.lit("for_you")), key=["day", "surface", "policy", "reward", "method"])
    return root

@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, folder: Path):
    "The page on the books, or on others."
    def open_page(root: Path = folder, tab: str = "", **query: str) -> AppTest:
        monkeypatch.setenv("RECO_SETTINGS", str(root/"settings.ini"))
        from app.parts.page import settings
        settings.clear()
        test = AppTest.from_file(str(PAGE), default_timeout=60)
        for name, value in (query | ({"tab": tab} if tab else {})).items(): test.query_params[name] = value
        test.run()
        assert not test.exception, test.exception
        return test
    yield open_page

def said(test: AppTest) -> str: # all text of the page
    return "\n".join(x.value for kind in (test.markdown, test.caption, test.info, test.error, test.subheader) for x in kind)

def metric(test: AppTest, label: str) -> object: return next(m for m in test.metric if m.label == label)

# ---- sums and recounts ----------------------------------------------------------------------------------------------

def test_figures_are_those_of_the_definitions(made):
    one = made[2]["kpis"].filter(pl.col("dimension") == "").sort("day").head(1)
    mine = added(one).row(0, named=True)
    for m in KPIS: assert mine[m.name] == pytest.approx(one[m.name].item()), m.name
    assert {f.name for f in FIGURES.values()} == {m.name for m in KPIS} | {"revenue"}

def test_days_add_up_to_counting_them_at_once(made):
    shown, did, tables = made
    span = Span(date(2026, 5, 4), date(2026, 5, 10))
    mine = added(tables["kpis"].filter(pl.col("dimension") == "surface", span.of()), "value")
    whole = kpi_table(outcomes_of(shown, did, WINDOW).filter(pl.col("ts").dt.date().is_between(*span)), ["surface"])
    assert mine["value"].to_list() == whole["surface"].cast(pl.String).to_list() == ["for_you", "similar"]
    for c in [*SUMS, "CTR", "CVR", "AOV", "revenue_per_1000"]: assert mine[c].to_list() == pytest.approx(whole[c].to_list()), c
    assert span.before == Span(date(2026, 4, 27), date(2026, 5, 3)) and span.length == 7 and date(2026, 5, 4) in span and date(2026, 5, 11) not in span

def test_a_change_is_clear_when_chance_is_ruled_out():
    row = lambda x, half: {"CTR": x, "CTR_low": x - half, "CTR_high": x + half}
    assert changed("CTR", row(0.2, 0.01), row(0.1, 0.01)).clear and not changed("CTR", row(0.11, 0.02), row(0.1, 0.02)).clear
    alone, unknown = changed("CTR", row(0.2, 0.01), None), changed("CTR", {"CTR": 0.2}, {"CTR": 0.1})
    assert (alone.lift, alone.clear) == (None, False) and unknown.lift == pytest.approx(1) and not unknown.clear
    assert changed("CTR", {"CTR": None}, row(0.1, 0.01)).lift is None and changed("CTR", row(0.1, 0.01), row(0.0, 0.0)).lift is None

def test_who_came_back_is_added_up_over_cohorts(made):
    back = made[2]["retention"].filter(pl.col("dimension") == "")
    span = Span(date(2026, 5, 9), date(2026, 5, 12))
    mine = back.filter(pl.col("cohort").is_between(date(2026, 5, 2), date(2026, 5, 5)))
    found = returned(back, 7, span)
    assert found["shoppers"] == mine["shoppers"].sum() and found["back"] == pytest.approx(mine["day_7"].sum()/mine["shoppers"].sum()) and found["back_low"] < found["back"] < found["back_high"]
    assert returned(back, 30, span) == {}
    weeks = weekly(back)
    assert weeks["shoppers"].max() <= back["shoppers"].sum() and weeks.filter(pl.col("after") == 1)["back"].sum() == back["day_1"].sum() and set(weeks["after"]) == {1, 7}

# ---- the page -------------------------------------------------------------------------------------------------------

def test_headline_figures_are_recounted_and_held_beside_the_days_before(page, made):
    test = page(range="7 days")
    shown, did, tables = made
    whole = tables["kpis"].filter(pl.col("dimension") == "", pl.col("complete"))
    span = Span(whole["day"].max() - timedelta(days=6), whole["day"].max())
    rows = outcomes_of(shown, did, WINDOW).with_columns(day=pl.col("ts").dt.date())
    now, before = (kpi_table(rows.filter(s.of()).drop("day")).row(0, named=True) for s in (span, span.before))
    assert metric(test, "Click rate (CTR)").value == f"{now['CTR']:.2%}" and metric(test, "Revenue from lists").value == f"{now['revenue']:,.0f}"
    assert metric(test, "Order value (AOV)").value == f"{now['AOV']:,.2f}" and metric(test, "Click rate (CTR)").delta == f"{now['CTR']/before['CTR'] - 1:+.1%}"
    table = next(d.value for d in test.dataframe if "Interval from" in d.value.columns)
    ctr = table[table["Figure"] == "Click rate (CTR)"].iloc[0]
    assert ctr["Interval from"] == pytest.approx(now["CTR_low"]) and ctr["Interval to"] == pytest.approx(now["CTR_high"]) and ctr["Change from"] < ctr["Change"] < ctr["Change to"]
    assert "8 – 14 May" not in said(test) and f"{span.since:%-d} – {span.until:%-d %b}" in said(test) and metric(test, "Back after 7 days").value.endswith("%")

def test_many_exposures_are_shown_before_they_are_recounted(page):
    "Figures stand there at once, without intervals; those come when the rest is drawn, and nobody waits for them twice."
    page() # so that the settings are those of the books
    source = PAGE.read_text()
    noted = "def headline(*a, quickly=False):\n    st.session_state.setdefault('order', []).append(quickly)\n    _headline(*a, quickly=quickly)\n\ndef _headline("
    for old, new in (("QUICK = 100_000", "QUICK = 10"), ("def headline(", noted), ('if __name__ == "__main__": ', "")):
        assert source.count(old) == 1
        source = source.replace(old, new)
    test = AppTest.from_string(source, default_timeout=60)
    test.query_params["range"] = "7 days"
    test.run()
    assert not test.exception and test.session_state["order"] == [True, False] and len(test.metric) == 8 and "being counted" not in said(test)
    test.run()
    assert test.session_state["order"] == [True, False, False]

def test_a_part_of_the_lists_is_shown_alone(page, made):
    test = page(range="7 days")
    test.selectbox(key="whose").set_value(("surface", "for_you")).run()
    assert not test.exception
    mine = made[2]["kpis"].filter(pl.col("dimension") == "surface", pl.col("value") == "for_you", pl.col("complete")).sort("day").tail(7)
    assert metric(test, "Click rate (CTR)").value == f"{mine['click'].sum()/mine['exposures'].sum():.2%}"
    there = outcomes_of(*made[:2], WINDOW).filter(pl.col("ts").dt.date().is_in(mine["day"].implode()), pl.col("surface").cast(pl.String) == "for_you")
    whole, table = kpi_table(there).row(0, named=True), next(d.value for d in test.dataframe if "Interval from" in d.value.columns)
    assert table["Interval to"][0] == pytest.approx(whole["CTR_high"]) # recounted for the part alone

def test_days_that_are_not_complete_are_marked_and_left_out(page, made):
    test = page(range="7 days")
    open_days = made[2]["kpis"].filter(pl.col("dimension") == "", ~pl.col("complete")).height
    assert open_days == 3 and f"Hollow points: {open_days} days not complete yet" in said(test)
    whole = made[2]["kpis"].filter(pl.col("dimension") == "", "complete").height
    assert f"There is nothing to compare with: {whole - 14} of the 14 days before are counted" in said(page(range="14 days")) and "nothing to compare" not in said(test)
    assert f"{whole//2} days" in page().segmented_control(key="range").value
    chosen = page(range="Choose")
    chosen.date_input(key="span").set_value((date(2026, 5, 15), date(2026, 5, 20))).run()
    assert not chosen.exception and "of these days are not complete" in said(chosen) and "No intervals here" in said(chosen)

@pytest.mark.parametrize(("tab", "words"), [("Day by day", "by day: from"), ("Who and where", "Revenue by surface and source"), ("Loyalty", "Who comes back"), ("Variety", "Coverage by day"), ("Experiments", "What if exploration")])
def test_every_tab_draws_and_can_be_taken_along(page, tab, words):
    test = page(tab=tab)
    assert words in said(test) and test.get("vega_lite_chart") + test.get("arrow_vega_lite_chart") and len(test.download_button) >= 2

def test_parts_are_held_beside_each_other(page, made):
    test = page(tab="Who and where", range="7 days")
    for by, name in QUESTIONS.items():
        test.selectbox(key="by").set_value(by).run()
        mine = added(made[2]["kpis"].filter(pl.col("dimension") == by, pl.col("day").is_between(date(2026, 5, 11), date(2026, 5, 17))), "value")
        top = mine.sort("CTR", descending=True).row(0, named=True)
        assert not test.exception and f"Click rate (CTR) by {name.lower()}: highest is {plain(answer(by, top['value']))}, {top['CTR']:.2%}" in said(test)

def test_experiments_say_what_is_tried_and_what_may_be_said(page, made):
    test = page(tab="Experiments")
    text, last = said(test), made[2]["readouts"].filter(pl.col("day") == pl.col("day").max(), pl.col("metric") == "CTR").row(0, named=True)
    assert last["verdict"] == "ahead" and f"**new** is ahead of old by {last['lift']:.1%}" in text and "Split as planned" in text
    assert "lists: running" in text and plain("planned_for_later") + ": has not begun" in text and "Holdout: what all changes together are worth" in text
    assert "epsilon 0" in text and "would have earned most" in text and "As of 20 May, from 900 lists" in text
    variants = next(d.value for d in test.dataframe if "What is different" in d.value.columns)
    assert list(variants["What is different"]) == ["nothing: the control", "[rerank] diversity = 1.0"]

def test_a_split_that_differs_says_nothing(page, made, folder, tmp_path):
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n")
    bad = made[2]["readouts"].with_columns(split_p=pl.lit(1e-9), verdict=pl.lit("no verdict: split differs from plan"))
    keep_days(Lake(tmp_path/"lake"), {"readouts": bad, "kpis": made[2]["kpis"]})
    test = page(tmp_path, "Experiments")
    assert "not as planned" in test.error[0].value and "ahead" not in said(test) and "not in the experiments file any more" in said(test)

def test_a_bad_experiments_file_is_said(page, made, tmp_path):
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n[experiments]\nfile = e.toml\n")
    (tmp_path/"e.toml").write_text("holdout = 7\n")
    keep_days(Lake(tmp_path/"lake"), {"kpis": made[2]["kpis"]})
    test = page(tmp_path, "Experiments")
    assert "cannot be read" in test.error[0].value and "holdout" in test.error[0].value

# ---- what is not there ----------------------------------------------------------------------------------------------

def test_an_empty_lake_says_what_to_run(page, tmp_path):
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n")
    test = page(tmp_path)
    assert "make kpis" in said(test) and not test.metric and "No experiment is planned" in said(test)

@pytest.mark.parametrize("tab", ["Who and where", "Loyalty", "Variety", "Experiments"])
def test_books_with_nothing_but_kpis(page, made, tmp_path, tab):
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n")
    keep_days(Lake(tmp_path/"lake"), {"kpis": made[2]["kpis"]})
    test = page(tmp_path, tab)
    assert "No intervals here: the lake has no exposures" in said(test) and metric(test, "Click rate (CTR)").value.endswith("%")
    if tab != "Who and where": assert "make " in "\n".join(i.value for i in test.info)

def test_a_shop_where_nothing_was_clicked(page, made, tmp_path):
    (tmp_path/"settings.ini").write_text("[lake]\nroot = lake\n")
    keep_days(Lake(tmp_path/"lake"), {"kpis": books(made[0], made[1].filter(pl.col("event_id") == "old"))["kpis"]})
    for tab in ("Day by day", "Who and where"):
        test = page(tmp_path, tab)
        assert metric(test, "Conversion (CVR)").value == "–" and metric(test, "Click rate (CTR)").value == "0.00%"
    assert "Nothing that was shown on these days has been bought yet" in said(test)

def test_names_of_a_shop_are_no_markup(page, made):
    assert plain("a_b*c*[x](y)<i>$1$`") == r"a\_b\*c\*\[x\]\(y\)\<i\>\$1\$\`"
    test = page(tab="Who and where", range="7 days")
    test.selectbox(key="by").set_value("source").run()
    heading = next(m.value for m in test.markdown if m.value.startswith("##### Click rate (CTR) by candidate source"))
    assert not test.exception and ("<b>" not in heading and "](" not in heading)
    assert csv(pl.DataFrame({"a": ["=1+1", "x", "-2", None], "n": [-1, 2, 3, 4]})) == b"a,n\n'=1+1,-1\nx,2\n'-2,3\n,4\n"

# ---- in a browser ---------------------------------------------------------------------------------------------------

WIDER = "() => [...document.querySelectorAll('[data-testid=stMain] *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('[data-testid=stDataFrame], [role=tablist], svg, canvas')).length"

@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}: make services")
def test_business_and_monitoring_in_a_browser(folder):
    "Wide and light, narrow and dark: charts are drawn, nothing sticks out, nothing fails; without an endpoint too."
    from playwright.sync_api import sync_playwright
    port = free_port()
    env = os.environ | {"RECO_SETTINGS": str(folder/"settings.ini"), "RECO_SERVING_PORT": str(free_port()), "RECO_APP_PORT": str(port)}
    server = subprocess.Popen([sys.executable, "-m", "app.dashboard"], cwd=PAGE.parent.parent.parent, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while port_free("127.0.0.1", port) and time.monotonic() < until: time.sleep(0.2)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-background-networking"])
            for width, scheme in ((1280, "light"), (390, "dark")):
                tab, errors = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
                tab.on("pageerror", lambda e, errors=errors: errors.append(e))
                for path, there in (("business?range=7+days&tab=Experiments", "text=is ahead of"), ("business?range=7+days", "text=by day: from"), ("monitoring", "text=make serve")):
                    tab.goto(f"http://127.0.0.1:{port}/{path}")
                    tab.wait_for_selector(there, timeout=60_000)
                    if path.startswith("business"): tab.wait_for_selector("[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg", timeout=60_000)
                    tab.wait_for_timeout(500)
                    assert tab.evaluate("document.documentElement.scrollWidth") <= width and not tab.evaluate(WIDER) and not errors, (path, width)
            browser.close()
    finally:
        server.terminate()
        server.wait(20)
