"""The quality page beside bundles, verdicts and trainings as the flows leave them: what it says is what they hold, and what is not there is said."""
import base64
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pytest
import streamlit as st
from bundles import days_before
from shop_floor import listening
from streamlit.testing.v1 import AppTest

from app.contract import create_app
from app.parts.quality import kept, trainings
from app.parts.quality.evaluation import metrics, stages, verdict
from app.parts.quality.history import guarded, lowered
from app.parts.quality.terms import GATES, MEASURES, alarm
from app.parts.quality.variety import points
from app.parts.quality.verdicts import differences, gates, refusals
from app.ports import free_port
from app.serve import Replica
from reco.alerts import Event, tell
from reco.bundle import load_bundle, make_bundle, save_bundle
from reco.challenger import keep_report, keep_text, set_challenger
from reco.data.histories import epoch_ms
from reco.evaluation.backtest import backtest
from reco.evaluation.gates import (
    Difference,
    Spread,
    alarms_quiet,
    answers_alone,
    better,
    latency,
    no_skew,
    not_worse,
    slices_not_worse,
    variety,
)
from reco.model_card import data_facts, variety_facts
from reco.published import publish
from reco.ranking.alarms import line
from reco.reranking.lists import Strengths
from reco.settings import Gates, Settings
from reco.tracking import log_training

PAGE = Path(__file__).resolve().parent.parent/"app"/"app_pages"/"quality.py"
ODD = "<b>ann</b> *x* $y$ [z](javascript:1) `w`"
CHOSEN = Strengths(tail=.3)
POINT = {"NDCG@10": .2, "coverage@10": .21, "gini@10": .91, "tail@10": .11, "new@10": .021, "lost": 0.}
FRONTIER = pl.DataFrame([{"walked": "", **asdict(Strengths()), **POINT}, {"walked": "tail", **asdict(Strengths(tail=.1)), **POINT, "coverage@10": .4, "lost": .002},
                         {"walked": "tail", **asdict(CHOSEN), **POINT, "NDCG@10": .199, "coverage@10": .52, "lost": .005},
                         {"walked": "tail", **asdict(Strengths(tail=.9)), **POINT, "NDCG@10": .19, "coverage@10": .6, "lost": .05}])
ALARMS = [*line("shuffled labels: NDCG@10 of what noise teaches", .06, .18).to_dicts(), *line("single feature recent_age: NDCG@10 by itself", .31, .67).to_dicts()]

def judged(ahead: float) -> pl.DataFrame:
    "A report as the gates write it, of a challenger that is so far ahead."
    d = lambda x, n=900: Difference(n, .3*(1 + x), .3, x, x - .02, x + .02)
    return pl.concat([better("better than the champion", "champion", d(ahead), 0, 30), not_worse("ranker no worse", "champion on sources of the same day", d(ahead), .02, 30),
                      slices_not_worse("champion", {"new users": d(.1), "cold items": None, "long tail": d(-.01)}, Gates()),
                      better("better than popularity", "list of what is popular", d(12.5), 0, 30), variety(Spread(.07, .9), Spread(.07, .9), Gates()),
                      alarms_quiet(ALARMS), no_skew(1_000, 0, "", .002), answers_alone(""), latency([3., 4.], Gates())])

def report(name: str, champion: str, rows: pl.DataFrame, at: str) -> dict:
    return {"bundle": name, "champion": champion, "passed": bool(rows["passed"].all()), "reason": "", "limits": Gates().model_dump(), "gates": rows.to_dicts(), "at": at, "run": "1"}

class Names(NamedTuple):
    "A shop's folder, and its bundles."
    root: Path
    first: str
    champion: str
    refused: str

@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory: pytest.TempPathFactory) -> Names:
    "A shop with one bundle that was served before, one that is served, and one that was refused."
    root = tmp_path_factory.mktemp("quality")
    (root/"settings.ini").write_text("[lake]\nroot = lake\n[bundles]\nroot = bundles\n[tracking]\nfolder = mlflow\ntimeout_seconds = 1\n")
    bundles = root/"bundles"
    table = backtest(trained.shop, trained.cutoffs, trained.ranker, trained.settings)
    about = {"project": ODD, "flow": "TrainFlow", "run_id": "12", "git_sha": "4c1e5aa0", "seed": 7, "snapshots": {"interactions": "3-aa"}, "metrics": table.to_dicts(), "alarms": ALARMS,
             "data": data_facts(trained.shop), "strengths": asdict(CHOSEN), "variety": variety_facts(FRONTIER, CHOSEN), "frontier": FRONTIER.to_dicts()}
    first, refused = days_before(trained, bundles, 14), days_before(trained, bundles, 7)
    champion = save_bundle(make_bundle(trained.shop, epoch_ms(trained.cutoffs.end), trained.rankers, trained.settings, about, choices=trained.choices), bundles).name
    publish(bundles/first, ODD, ODD)
    publish(bundles/champion, "flows/promote.py", "all gates passed (run 7)")
    set_challenger(bundles/refused)
    keep_report(bundles, report(champion, first, judged(.05), "2026-05-01T06:00:00+00:00"))
    keep_report(bundles, report(refused, first, judged(-.05), "2026-04-24T06:00:00+00:00"))
    tell(bundles, Event("training_stopped", "flows/train.py", ODD, "k", {"alarms": 1}), {})
    keep_text(bundles, f"reports/{champion}/90_evaluation_report.html", "<!doctype html><html lang='en'><head><title>x</title></head><body><script>top.x=1</script>é</body></html>")
    return Names(root, first, champion, refused)

@pytest.fixture(scope="module")
def endpoint(folder: Names, store) -> Iterator[int]:
    "An endpoint on the bundle that is served."
    replica = Replica()
    replica.bundle, replica.store = load_bundle(folder.root/"bundles"/folder.champion), store
    with listening(create_app(replica)) as port: yield port

@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, folder: Names, endpoint: int):
    "A tab of the page, on this shop or another, with the endpoint or without."
    def open_page(tab: str = "", root: Path = folder.root, port: int = endpoint) -> AppTest:
        monkeypatch.setenv("RECO_SETTINGS", str(root/"settings.ini"))
        monkeypatch.setenv("RECO_SERVING_PORT", str(port))
        st.cache_data.clear()
        st.cache_resource.clear()
        at = AppTest.from_file(str(PAGE), default_timeout=60)
        if tab: at.query_params["part"] = tab
        at.run()
        assert not at.exception
        return at
    return open_page

def said(at: AppTest) -> str: # all text of the page
    texts = [x.value for kind in (at.markdown, at.caption, at.info, at.error, at.warning, at.success, at.text, at.subheader) for x in kind]
    return "\n".join(map(str, texts)) + "\n".join(h.proto.body for h in at.get("html"))

def table(at: AppTest, column: str): # the first that has such a column
    return next(d.value for d in at.dataframe if column in d.value.columns)

def charts(at: AppTest) -> list[dict]: # what Vega is told, and the `rows` that come with it
    return [json.loads(c.proto.spec) | {"rows": [r for d in c.proto.datasets for r in pa.ipc.open_stream(d.data.data).read_all().to_pylist()]} for c in at.get("vega_lite_chart")]

# ---- how good ------------------------------------------------------------------------------------------------------

def test_the_page_begins_with_what_is_served_and_how_good_it_is(page, folder, trained):
    at = page()
    assert f">{folder.champion}</code>" in said(at) and "published just now by flows/promote.py. The endpoint answers with it." in said(at)
    assert f">{folder.refused}</code>, refused" in said(at)
    whole = {r["system"]: r for r in kept.manifest(folder.champion)["metrics"] if r["slice"] == "all"}
    ours = whole["pipeline"]
    by = {m.label: m.value for m in at.metric}
    assert by["Ranking quality"] == f"{ours['NDCG@10']:.3f}" and by["Found"] == f"{ours['Recall@20']:.0%}" and by["Gates passed"] == f"{judged(0).height} of {judged(0).height}"
    shown = table(at, "first_ahead").set_index("system")
    assert len(shown) == len(whole) and list(shown["NDCG@10"]) == sorted(shown["NDCG@10"], reverse=True)
    assert shown.loc["The whole pipeline", "low"] == ours["low"] and shown.loc["popularity", "coverage@10"] == whole["popularity"]["coverage@10"]
    first, second = charts(at)
    assert {"The whole pipeline", "popularity"} <= {r["name"] for r in first["rows"]} and {r["slice"] for r in second["rows"]} == {"All requests", "Arriving", "During a visit"}
    assert first["description"] and second["description"] and not at.error

def test_another_slice_and_another_measure_are_that_slice_and_measure(page, folder):
    at = page()
    at.segmented_control(key="slice").set_value("visit").run()
    at.selectbox(key="measure").set_value("Recall@20").run()
    visit = {r["system"]: r for r in kept.manifest(folder.champion)["metrics"] if r["slice"] == "visit"}
    assert table(at, "first_ahead").set_index("system").loc["The whole pipeline", "NDCG@10"] == visit["pipeline"]["NDCG@10"]
    assert f"Measured on {visit['pipeline']['requests']:,} requests" in said(at) and MEASURES["Recall@20"].means in said(at)

def test_the_sentence_says_no_more_than_the_table():
    row = lambda system, x, ahead=None: {"slice": "all", "system": system, "requests": 9, "NDCG@10": x, "low": x, "high": x, "first_ahead": ahead}
    told = lambda *rows: verdict(metrics({"metrics": list(rows)}))
    assert "surely ahead of every single source" in told(row("pipeline", .3), row("recent", .2, .99), row("popularity", .1, 1.)) and "3.0 times" in told(row("pipeline", .3), row("popularity", .1, 1.))
    assert "may be chance: it is ahead in 70% of the draws" in told(row("pipeline", .3), row("recent", .29, .7))
    assert "`recent` alone does better here (0.400)" in told(row("pipeline", .3), row("recent", .4, .1)) and "times" not in told(row("pipeline", .3), row("popularity", .4, 0.))
    assert "nothing to compare" in told(row("pipeline", .3)) and "`a  b`" in told(row("pipeline", .3), row("a``b", .1, 1.))
    assert metrics({"metrics": [row("pipeline", float("nan")), "x", {}]})["NDCG@10"].to_list() == [None, None]

def test_each_stage_has_its_before_and_after(trained):
    found = stages({"surfaces": {s: c.about() for s, c in trained.choices.items()}, "variety": variety_facts(FRONTIER, CHOSEN)})
    ours = trained.choices["for_you"]
    assert found.row(0)[:1] == ("Ordering: Recommended for you",) and found.row(0)[2:] == (ours.by_sources, ours.by_ranker, ours.error)
    assert found.row(-1)[1:4] == ("catalogue shown 21.0% → 52.0%", .2, .199) and stages({}).is_empty()

def test_a_bundle_without_an_evaluation_says_so(page, folder):
    at = page()
    at.selectbox(key="bundle").set_value(folder.first).run()
    assert not at.exception and "carries no evaluation" in said(at) and "make train" in said(at) and not charts(at)
    at.session_state["part"] = "Variety"
    at.run()
    assert "No frontier was kept" in said(at) and not charts(at)

# ---- variety -------------------------------------------------------------------------------------------------------

def test_the_frontier_marks_what_was_chosen(page, folder):
    at = page("Variety")
    by = {m.label: (m.value, m.delta) for m in at.metric}
    assert by["Catalogue shown"] == ("52.0%", "+31.0 points") and ("0.199", "-0.5%") in [(m.value, m.delta) for m in at.metric]
    rows = charts(at)[0]["rows"]
    assert sum(r.get("chosen") is True for r in rows) >= 1 and {r["tail"] for r in rows if r.get("chosen")} == {.3}
    assert len(table(at, "walked")) == 4

def test_without_the_whole_frontier_the_two_ends_are_shown():
    v = {"variety": variety_facts(FRONTIER, CHOSEN), "strengths": asdict(CHOSEN)}
    assert points(v)["chosen"].to_list() == [False, True] and points(v)["coverage"].to_list() == [.21, .52] and points({}).is_empty()
    assert points(v | {"frontier": FRONTIER.to_dicts(), "strengths": {}})["chosen"].to_list() == [False]*4

# ---- gates ---------------------------------------------------------------------------------------------------------

def test_gates_of_what_passed_and_of_what_was_refused(page, folder):
    at = page("Gates")
    assert f"Passed all {judged(0).height} gates on 01 May 2026" in said(at) and "+5.0%" in said(at) and "surely better" in said(at)
    assert len(table(at, "gate")) == judged(0).height and list(table(at, "alarm")["result"]) == ["✓ quiet"]*2
    at.selectbox(key="bundle").set_value(folder.refused).run()
    failed = judged(-.05).filter(~pl.col("passed"))
    assert f"Refused on 24 April 2026: {failed.height} of {judged(0).height} gates failed" in said(at) and all(f"{n}: " in said(at) for n in failed["name"])
    assert list(table(at, "gate")["passed"][:failed.height]) == ["✗ failed"]*failed.height
    at.selectbox(key="bundle").set_value(folder.first).run()
    assert "have not judged this bundle" in said(at) and f"--bundle {folder.first}" in said(at)

def test_what_the_gates_wrote_is_read_as_it_was_meant():
    found = differences(gates({"gates": judged(.05).to_dicts()}))
    assert found["name"].to_list() == ["better than the champion", "ranker no worse", "new users", "long tail", "better than popularity"] # nobody asked for cold items
    assert found.row(0)[1:5] == pytest.approx((.05, .03, .07, 900)) and found.row(-1)[1:4] == pytest.approx((12.5, 12.48, 12.52))
    assert found["colour"].to_list() == ["better"]*3 + ["unclear", "better"] and differences([]).is_empty()

def test_every_gate_and_alarm_is_explained():
    assert set(judged(0)["name"]) <= set(GATES) and all(alarm(a["name"]) for a in ALARMS) and not alarm("another")

def test_refusals_come_from_reports_and_from_what_happened(page, folder):
    page()
    found = refusals()
    assert found["what"].to_list() == ["training stopped by a leak alarm", "refused by the gates"] and found["bundle"].to_list() == ["", folder.refused]
    assert found["why"].to_list() == [ODD, "better than the champion, ranker no worse"]

# ---- history, card, reports ----------------------------------------------------------------------------------------

def test_what_was_published_is_listed_newest_first(page, folder):
    at = page("History")
    rows = table(at, "how")
    assert list(rows["bundle"]) == [folder.champion, folder.first] and list(rows["now"]) == [True, False] and list(rows["who"]) == ["flows/promote.py", ODD]
    assert "rollback" in at.code[0].value and folder.first in at.code[0].value
    assert list(table(at, "sha")["bundle"]) == [folder.champion] and "one training so far" in said(at) # MLflow has none: those of the bundles that are there

def test_trainings_come_from_mlflow(page, folder, tmp_path):
    (tmp_path/"settings.ini").write_text("[bundles]\nroot = bundles\n[tracking]\nfolder = mlflow\n")
    settings, manifest = Settings(root=tmp_path, **{"bundles": {"root": "bundles"}, "tracking": {"folder": "mlflow"}}), kept_manifest(folder)
    for n, ndcg in (("1", .2), ("2", .3)):
        rows = [r | ({"NDCG@10": ndcg} if r["system"] == "pipeline" and r["slice"] == "all" else {}) for r in manifest["metrics"]]
        (made := tmp_path/"bundles"/f"2026-05-0{n}T000000Z-0000000{n}").mkdir(parents=True)
        (made/"manifest.json").write_text(json.dumps(manifest | {"id": made.name, "run_id": n, "metrics": rows}))
        log_training(settings, made)
    at = page("History", tmp_path)
    found = table(at, "sha")
    assert list(found["NDCG@10"]) == [.3, .2] and list(found["bundle"]) == ["2026-05-02T000000Z-00000002", "2026-05-01T000000Z-00000001"]
    popular = next(r["NDCG@10"] for r in manifest["metrics"] if r["system"] == "popularity" and r["slice"] == "all")
    assert list(found["popularity"]) == pytest.approx([popular]*2) and list(found["sha"]) == ["4c1e5aa0"]*2
    assert len(charts(at)) == 1 and "Nothing was published yet" in said(at)

def kept_manifest(folder: Names) -> dict:
    return json.loads((folder.root/"bundles"/folder.champion/"manifest.json").read_text())

def test_an_mlflow_that_is_away_is_said_and_done_without(page, folder, monkeypatch):
    monkeypatch.setenv("RECO_TRACKING_URI", f"http://ann:secret@127.0.0.1:{free_port()}")
    at = page("History")
    assert "cannot be asked" in at.warning[0].value and "secret" not in said(at) and list(table(at, "sha")["bundle"]) == [folder.champion]

def test_the_card_and_the_reports(page, folder):
    at = page("Model card")
    assert "#### How good it is" in said(at) and folder.champion in said(at) and "Not judged" not in said(at)
    assert ODD.replace("$", "\\$") in said(at) and "\n# " not in said(at)
    at.toggle(key="read").set_value(True).run()
    assert not at.exception
    address = guarded("<html><head><title>x</title></head><body><script>1</script>é</body></html>")
    assert address.startswith("data:text/html") and "default-src 'none'" in base64.b64decode(address.split(",", 1)[1]).decode().split("<title>")[0]
    assert lowered("# a\n\n## b $c\n#x") == "### a\n\n#### b \\$c\n#x"
    at.selectbox(key="bundle").set_value(folder.refused).run()
    assert "No report was written" in said(at) and f"flows/report.py run --bundle {folder.refused}" in said(at)

# ---- what is not there ---------------------------------------------------------------------------------------------

def test_without_bundles_the_page_says_what_makes_one(page, tmp_path):
    (tmp_path/"settings.ini").write_text("[bundles]\nroot = nowhere\n")
    at = page(root=tmp_path)
    assert "There is no bundle yet" in said(at) and "make train" in said(at) and "Nothing is served yet" in said(at) and not at.tabs

def test_without_the_endpoint_the_rest_is_there(page, folder):
    at = page(port=free_port())
    assert "The endpoint does not answer" in said(at) and "make serve" in said(at) and len(charts(at)) == 2

@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_manifest_that_cannot_be_read_is_said(page, tmp_path, text):
    (tmp_path/"settings.ini").write_text("[bundles]\nroot = bundles\n")
    (tmp_path/"bundles"/"broken").mkdir(parents=True)
    (tmp_path/"bundles"/"broken"/"manifest.json").write_text(text)
    at = page(root=tmp_path)
    assert "The bundles cannot be read: broken: no readable manifest.json" in at.error[0].value

def test_what_is_odd_in_a_manifest_breaks_no_tab(page, folder, tmp_path):
    "A bundle made elsewhere: names that are markup, lists that hold anything."
    (tmp_path/"settings.ini").write_text("[bundles]\nroot = bundles\n[tracking]\nfolder = mlflow\n")
    odd = tmp_path/"bundles"/"2026-05-01T000000Z-00000001"
    odd.mkdir(parents=True)
    rows = [r | {"system": r["system"] if r["system"] == "pipeline" else f"{ODD}{r['system']}"} for r in kept_manifest(folder)["metrics"]]
    (odd/"manifest.json").write_text(json.dumps(kept_manifest(folder) | {"id": odd.name, "metrics": [*rows, None, {"slice": 3}], "alarms": [None, {"name": ODD}], "frontier": [None],
                                                                         "asof": 5, "surfaces": {ODD: {}}}))
    publish(odd, ODD, ODD)
    (tmp_path/"bundles"/"2026-05-02T000000Z-<i>").mkdir()
    (tmp_path/"bundles"/"2026-05-02T000000Z-<i>"/"manifest.json").write_text("{}")
    (tmp_path/"bundles"/"challenger").write_text("2026-05-02T000000Z-<i>\n")
    keep_report(tmp_path/"bundles", {"bundle": odd.name, "gates": [None, {"name": ODD, "what": ODD, "value": "x"}], "at": 3})
    for tab in ("", "Variety", "Gates", "History", "Model card"):
        at = page(tab, tmp_path)
        html = "".join(h.proto.body for h in at.get("html"))
        assert "&lt;b&gt;ann&lt;/b&gt;" in html and "Z-&lt;i&gt;" in html and not any(x in html for x in ("<i>", "<b>ann")) and not at.error[1:], tab

def test_moments_of_any_writing():
    assert trainings.moment("2026-05-01T00:00:00.000Z").year == 2026 and trainings.moment("2026-05-01").tzinfo and trainings.moment(None) is None
