"""The business and the monitoring page on what the flows really write: a shop with days of traffic, an A/B test and an incident."""
from pathlib import Path

import polars as pl
import pytest
from streamlit.testing.v1 import AppTest
from worlds import World

from app.parts.wording import count
from app.ports import free_port
from reco.data.lake import Lake

PAGES = Path(__file__).resolve().parent.parent/"app"/"app_pages"

@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, world: World):
    "A page of that shop, without its endpoint."
    def open_page(name: str, **query: str) -> AppTest:
        from app.parts.page import settings
        monkeypatch.setenv("RECO_SETTINGS", str(world.root/"settings.ini"))
        monkeypatch.setenv("RECO_SERVING_PORT", str(free_port()))
        settings.clear()
        test = AppTest.from_file(str(PAGES/f"{name}.py"), default_timeout=60)
        for key, value in query.items(): test.query_params[key] = value
        test.run()
        assert not test.exception, test.exception
        return test
    return open_page

def said(test: AppTest) -> str: return "\n".join(x.value for kind in (test.markdown, test.caption, test.info, test.warning, test.success, test.error) for x in kind)

def test_business_says_what_the_flow_counted(page, world):
    kpis = Lake(world.root/"lake").read("kpis").filter(pl.col("dimension") == "").collect().sort("day")
    whole = kpis.filter("complete").tail(3)
    test = page("business", range="3 days")
    value = {m.label: m.value for m in test.metric}
    assert value["Items shown"] == f"{whole['exposures'].sum():,}" and value["Click rate (CTR)"] == f"{whole['click'].sum()/whole['exposures'].sum():.2%}"
    assert value["Revenue from lists"] == f"{whole['revenue'].sum():,.0f}" and "No intervals here" not in said(test)
    for tab, words in (("Who and where", "by surface: highest is"), ("Variety", "Coverage by day"), ("Experiments", "variety: running")): assert words in said(page("business", tab=tab, range="3 days"))

def test_monitoring_says_what_the_flow_found(page, world):
    verdicts = Lake(world.root/"lake").read("verdicts").collect()
    last = verdicts.filter(pl.col("day") == pl.col("day").max())
    text = said(page("monitoring", watch="Drift and retraining"))
    assert ("train again" if last["retrain"][0] else "no retrain") in text and f"{last['day'][0]:%-d %b}" in text
    assert "events\\.price" in text # prices came in cents
    drift = Lake(world.root/"lake").read("drift").collect()
    spoke = verdicts.filter(pl.col("asks"), pl.col("name").str.starts_with("drift of "))["name"].n_unique()
    assert f"{count(spoke, 'column was', 'columns were')} beyond limit and chance in {drift['day'].n_unique()} days" in text
