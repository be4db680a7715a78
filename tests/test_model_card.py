"""The card says what the manifest says, in every place of it, and says so where nothing was measured."""

import json
import math
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reco.bundle import make_bundle, save_bundle
from reco.data.histories import epoch_ms
from reco.evaluation.backtest import backtest
from reco.model_card import (
    MISSING,
    SIMULATED,
    UNKNOWN,
    column_facts,
    data_facts,
    model_card,
    rivals,
    shown,
    table,
    variety_facts,
)
from reco.ranking.alarms import line
from reco.ranking.shapley import Shapley, importance
from reco.reranking.lists import Strengths

SECTIONS = ["Model details", "Intended use", "Data and training", "How good it is", "Who is shown", "What the ranker goes by", "Leak alarms",
            "Gates", "Limits", "Taking it back"]


def sections(card: str) -> dict[str, str]:
    """Title → what stands under it."""
    _, *parts = re.split(r"^## ", card, flags=re.MULTILINE)
    return {p.split("\n", 1)[0]: p.split("\n", 1)[1] for p in parts}


@pytest.fixture(scope="module")
def frontier() -> pl.DataFrame:
    return pl.DataFrame([asdict(Strengths()) | {"NDCG@10": .2, "coverage@10": .21, "gini@10": .91, "tail@10": .11, "new@10": .021, "lost": 0.},
                         asdict(Strengths(tail=.3)) | {"NDCG@10": .199, "coverage@10": .52, "gini@10": .71, "tail@10": .33, "new@10": .054, "lost": .005}])


@pytest.fixture(scope="module")
def manifest(trained, frontier, tmp_path_factory) -> dict:
    """What lies in a saved bundle, from a training that notes all that the card knows."""
    strengths = Strengths(tail=.3)
    columns = Shapley(("a", "b"), np.array([[1., 1], [2, 1]], np.float32), np.array([[1., 0], [3, 0]]), 0.)
    metrics = backtest(trained.shop, trained.cutoffs, trained.ranker, trained.settings)
    about = {"project": "corner shop", "flow": "TrainFlow", "run_id": "12", "git_sha": "4c1e5", "seed": 7, "snapshots": {"interactions": 3, "catalog": 2},
             "versions": {"lightgbm": "4.7.0"}, "metrics": metrics.to_dicts(), "cutoffs": {k: [str(x) for x in v] if isinstance(v, tuple) else str(v) for k, v in vars(trained.cutoffs).items()},
             "data": data_facts(trained.shop), "strengths": asdict(strengths), "variety": variety_facts(frontier, strengths),
             "importance": column_facts(importance(columns, {"a": "places", "b": "same"})), "alarms": line("what noise teaches", .123, .456).to_dicts()}
    made = make_bundle(trained.shop, epoch_ms(trained.cutoffs.end), trained.rankers, trained.settings, about, choices=trained.choices)
    return json.loads((save_bundle(made, tmp_path_factory.mktemp("cards")) / "manifest.json").read_text())


def test_a_bundle_of_a_training_has_a_whole_card(manifest, trained):
    card = model_card(manifest, [{"name": "better than the champion", "value": .0123, "limit": 0., "passed": True, "what": "x"}])
    by = sections(card)
    assert list(by) == SECTIONS and card.startswith(f"# corner shop: bundle {manifest['id']}\n")
    assert MISSING not in "".join(by[s] for s in SECTIONS if s not in ("Who is shown", "Limits", "Model details")) and UNKNOWN not in card
    details = by["Model details"]
    assert "TrainFlow, run 12" in details and "4c1e5" in details and "lightgbm 4.7.0" in details and "als 30" in details
    for surface, c in trained.choices.items(): assert f"| {surface} | {'trees' if c.ranked else 'sources'}" in details
    data = by["Data and training"]
    assert f"{len(trained.shop.log):,}" in data and "interactions 3, catalog 2" in data and str(trained.cutoffs.holdout)[:16] in data
    assert all(f"{c:%Y-%m-%d %H:%M}" in data for c in trained.cutoffs.train) and "datetime" not in card
    assert "| what noise teaches | 0.123 | 0.456 | yes |" in by["Leak alarms"] and "| better than the champion | 0.0123 | 0 | yes | x |" in by["Gates"]
    assert "| a | places | 2 | 100.0% | 1 |" in by["What the ranker goes by"] and "| b | same | 0 | 0.0% | none |" in card
    assert "python -m app.bundle rollback" in by["Taking it back"] and SIMULATED in by["Limits"]


def test_every_figure_of_quality_is_the_tables(manifest):
    by = {(r["slice"], r["system"]): r for r in manifest["metrics"]}
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in sections(model_card(manifest))["How good it is"].splitlines() if x.startswith("|")][2:]
    assert {x[0] for x in lines} == {s for s, _ in by} and len(lines) == 3*len({s for s, _ in by})
    for name, system, requests, ndcg, ahead, average, recall in lines:
        r = by[name, system]
        assert (requests, average, recall) == (f"{r['requests']:,}", shown(r["MAP@10"]), shown(r["Recall@20"]))
        assert ndcg == f"{r['NDCG@10']:.4g} [{r['low']:.4g}, {r['high']:.4g}]"
        assert ahead == ("" if system == "pipeline" else f"{r['first_ahead']:.1%}")
    for name in {s for s, _ in by}:
        best = max((r for (s, x), r in by.items() if s == name and x not in ("pipeline", "popularity")), key=lambda r: r["NDCG@10"])
        assert [x[1] for x in lines if x[0] == name] == ["pipeline", "popularity", best["system"]]


def test_who_is_shown_comes_from_validation_and_hold_out(manifest):
    said = sections(model_card(manifest))["Who is shown"]
    assert "| by relevance alone | 0.2 | 21.0% | 0.91 | 89.0% | 11.0% | 2.1% |" in said
    assert "| as it is served | 0.199 | 52.0% | 0.71 | 67.0% | 33.0% | 5.4% |" in said and "0.5%" in said
    [r] = [r for r in manifest["metrics"] if r["slice"] == "all" and r["system"] == "pipeline"]
    assert f"| pipeline | {r['coverage@10']:.1%} | {r['Gini@10']:.4g} |" in said and "tail 0.3" in said


def test_an_empty_manifest_has_a_card_that_claims_nothing():
    by = sections(model_card({}))
    assert list(by) == SECTIONS
    for s in ("How good it is", "Who is shown", "What the ranker goes by", "Leak alarms"): assert "Not measured." in by[s], s
    assert "Not judged" in by["Gates"] and SIMULATED not in by["Limits"]
    digits = re.sub(r"NDCG@10|MAP@10|Recall@20|coverage@10|Gini@10|95%|0 is even|towards 1|near 0|is 1 where|-1 where", "", model_card({}))
    assert not re.findall(r"\d", digits)


@pytest.mark.parametrize("gone", ["project", "settings", "metrics", "cutoffs", "surfaces", "data", "variety", "strengths", "alarms", "importance", "snapshots", "versions",
                                  "flow", "asof", "free_rows", "seed"])
def test_what_is_missing_is_said_and_nothing_breaks(manifest, gone):
    without = model_card({k: v for k, v in manifest.items() if k != gone})
    whole = model_card(manifest)
    assert list(sections(without)) == SECTIONS and without != whole
    count = lambda card: len(re.findall(f"{MISSING}|{UNKNOWN}", card, re.IGNORECASE))
    assert count(without) > count(whole) or gone in ("project", "surfaces"), gone  # without a table of surfaces there are fewer empty cells


def test_the_card_is_a_function_of_its_inputs(manifest):
    before = json.dumps(manifest)
    assert model_card(manifest) == model_card(json.loads(before)) and json.dumps(manifest) == before


def test_a_failed_gate_and_a_missing_value_are_seen():
    rows = [{"name": "latency | p99", "value": 120.5, "limit": 100., "passed": False}, {"name": "skew", "value": float("nan"), "limit": None, "passed": False}]
    said = sections(model_card({}, rows))["Gates"]
    assert "| latency \\| p99 | 120.5 | 100 | no |" in said and f"| skew | {MISSING} | {MISSING} | no |" in said


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)), st.lists, max_leaves=3))
def test_any_value_stays_in_its_cell(value: Any):
    text = shown(value)
    assert text is not None and "\n" not in text and not re.search(r"(?<!\\)\|", text.replace("\\\\", ""))
    assert (text == MISSING) == (value is None or value == "" or (isinstance(value, float) and math.isnan(value)) or text == MISSING)
    lines = table(["a", "b"], [[text, "x"]]).splitlines()
    assert len(lines) == 3 and lines[2].endswith("| x |")


@given(st.lists(st.tuples(st.sampled_from(["als", "recent", "content", "popularity"]), st.one_of(st.none(), st.floats(0, 1), st.just(float("nan")))),
                unique_by=lambda x: x[0]))
def test_the_best_other_source_is_a_measured_one(figures):
    rows = [{"slice": "all", "system": "pipeline", "NDCG@10": .1}, *({"slice": "all", "system": s, "NDCG@10": v} for s, v in figures)]
    found = rivals(rows)
    others = [(s, v) for s, v in figures if s != "popularity"]
    assert found[0]["system"] == "pipeline" and len(found) == 1 + ("popularity" in dict(figures)) + bool(others)
    measured = [v for _, v in others if v is not None and not math.isnan(v)]
    if measured: assert found[-1]["NDCG@10"] == max(measured)


def test_the_point_that_was_chosen_is_found(frontier):
    assert variety_facts(frontier, Strengths(tail=.3))["chosen"]["coverage@10"] == .52
    assert variety_facts(frontier, Strengths(tail=.2)) == {"without": frontier.row(0, named=True), "chosen": {}}
    assert variety_facts(pl.DataFrame(), Strengths()) == {}


def test_data_facts_count_the_log(trained):
    d, log = data_facts(trained.shop), trained.sim.interactions
    wanted = {str(r["event"]): r["len"] for r in log.group_by("event").len().iter_rows(named=True)}
    assert d["by_event"] == wanted and d["events"] == log.height == sum(wanted.values())
    assert d["shoppers"] == log["user_id"].n_unique() and json.loads(json.dumps(d)) == d
