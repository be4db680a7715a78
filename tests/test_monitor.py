"""`flows/monitor.py` as an operator runs it: what it finds, keeps and asks for; and a retrain that is no better."""

import polars as pl
from flow_runs import run_flow
from judging import made
from prometheus_client.parser import text_string_to_metric_families
from test_train import SETTINGS as TRAINING
from test_train import fill_lake

from reco.alerts import events
from reco.challenger import challenger_name, kept_report
from reco.published import champion_name, publish

SETTINGS = "[monitor]\nrequests = 30\nmax_age_days = 3\ntextfile = data/figures/reco.prom\n[tracking]\nenabled = false\n"


def test_the_flow_asks_once_for_an_old_champion_and_keeps_what_it_found(trained, tmp_path):
    (tmp_path / "settings.ini").write_text(SETTINGS)
    lake, root = fill_lake(tmp_path, trained.sim), tmp_path / "data" / "bundles"
    name = made(trained, root, older_days=7)
    publish(root / name, "ann")
    asof = f"{trained.cutoffs.end.isoformat()}"
    first = run_flow(tmp_path, "monitor", "run", "--asof", asof, "--retrain", "ask")
    assert first.returncode == 0 and "retrain: " in first.stdout and "a retrain is asked for" in first.stdout, first.stdout
    drift, verdicts = (lake.read(t).collect() for t in ("drift", "verdicts"))
    assert {*drift["table"]} == {"events", "shoppers", "visits", "catalog", "rows", "scores", "lists"} and {*drift["bundle"]} == {name}
    age = verdicts.filter(pl.col("name") == "age of the champion").row(0, named=True)
    assert age["asks"] and abs(age["value"] - 7) < 0.01 and age["limit"] == 3
    assert len([*(tmp_path / "data" / "lake" / "monitor" / "pages").rglob("*.html")]) == 2
    assert lake.read("retrains").collect()["outcome"].to_list() == ["asked"] and champion_name(root) == name
    shown = {f"{s.name}{[*s.labels.values()]}": s.value for f in text_string_to_metric_families((tmp_path / "data" / "figures" / "reco.prom").read_text()) for s in f.samples}
    assert shown["reco_monitor_timestamp_seconds[]"] == trained.cutoffs.end.timestamp() and shown["reco_retrain_reason['age']"] == 1 == shown["reco_retrain_verdict[]"]
    for table, of in drift.filter(pl.col("psi").is_not_null()).group_by("table"): assert abs(shown[f"reco_drift_psi{[*table]}"] - of["psi"].max()) < 1e-9
    assert 0 < shown["reco_kpi_visit_conversion_ratio[]"] < 1 and shown["reco_shop_items['recent']"] == trained.sim.catalog["item_id"].n_unique()
    again = run_flow(tmp_path, "monitor", "run", "--asof", asof, "--retrain", "ask")
    assert again.returncode == 0 and "no retrain was asked for" in again.stdout and "less than 7 days ago" in again.stdout, again.stdout
    assert lake.read("drift").collect().height == drift.height and lake.read("retrains").collect().height == 1


def test_nothing_published_is_said(tmp_path):
    (tmp_path / "settings.ini").write_text(SETTINGS)
    done = run_flow(tmp_path, "monitor")
    assert done.returncode == 1 and "nothing is published" in done.stdout, done.stdout


def test_a_retrain_that_is_no_better_leaves_the_champion_alone(trained, tmp_path):
    hard = "[gates]\nmargin = -1\nbuyers = 50\nrequests = 10\n"  # twice as good as the champion
    (tmp_path / "settings.ini").write_text(SETTINGS + TRAINING + hard)
    lake, root = fill_lake(tmp_path, trained.sim), tmp_path / "data" / "bundles"
    name = made(trained, root, older_days=7)
    publish(root / name, "ann")
    done = run_flow(tmp_path, "monitor", "run", "--asof", trained.cutoffs.end.isoformat(), "--retrain", "auto")
    assert done.returncode == 0 and f"retrained, and the gates refused it: {name} goes on" in done.stdout, done.stdout
    newest = challenger_name(root)
    report = kept_report(root, newest)
    assert newest != name and not report["passed"] and report["champion"] == name and champion_name(root) == name
    assert lake.read("retrains").collect()["outcome"].to_list() == ["refused"]
    assert [e["what"] for e in events(root)] == ["retrain_asked", "promotion_refused"]
