"""`flows/monitor.py` as an operator runs it: what it finds, keeps, tells and asks for; a retrain that fails, one that is no better and one that is."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
from flow_runs import ROOT, run_flow
from judging import made, upside_down
from prometheus_client.parser import text_string_to_metric_families
from test_alerts import receiver
from test_train import SETTINGS as TRAINING
from test_train import fill_lake

from app.ports import free_port
from reco.alerts import events
from reco.bundle import load_bundle
from reco.challenger import challenger_name, kept_report
from reco.data.lake import Lake
from reco.data.profile import described
from reco.monitoring.files import keep_file, read_file
from reco.monitoring.retrains import claim, last_asked, retrains, settle
from reco.monitoring.skew import pasts_of
from reco.pipeline import recommend
from reco.published import champion_name, publish
from reco.request import RecommendationRequest, UserEvent
from reco.schemas import EXPOSURES, conform

SOFT = "[gates]\nrequests = 10\nbuyers = 20\np50_ms = 5000\np99_ms = 20000\ntry_seconds = 200\n" + "".join(
    f"{k} = 1\n" for k in ("ranker_loss", "new_users_loss", "cold_items_loss", "long_tail_loss", "coverage_loss", "gini_rise", "max_gini", "margin"))
SETTINGS = "[monitor]\nrequests = 30\nmax_age_days = 3\ntextfile = data/figures/reco.prom\n[tracking]\nenabled = false\n"


def serve_log(folder: Path, trained, forgotten: float) -> pl.DataFrame:
    """EXPOSURES of fifty shoppers on each of the last two days, of an endpoint that has no past of a share of them."""
    bundle, end, rows = load_bundle(folder), trained.cutoffs.end, []
    for days in (2, 1):
        at = end - timedelta(days=days) + timedelta(hours=3)
        users = trained.sim.interactions.filter(pl.col("ts").is_between(at - timedelta(days=9), at))["user_id"].unique().sort().head(50)
        asked = pl.DataFrame({"user_id": users}).with_columns(asked=pl.lit(at).cast(pl.Datetime("ms", "UTC")))
        for n, (user, past) in enumerate(zip(users, pasts_of(trained.sim.interactions.lazy(), asked, bundle.max_history), strict=True)):
            known: list[UserEvent] = [] if n < forgotten * len(users) else past
            found = recommend(RecommendationRequest(user, 5, at, known, request_id=f"{days}.{n}"), bundle)
            rows += [(f"{days}.{n}", at, user, rank, *x, found.fallback) for rank, x in enumerate(found.items, 1)]
    f = pl.DataFrame(rows, schema=["request_id", "ts", "user_id", "rank", "item_id", "score", "source", "propensity", "team", "fallback"], orient="row", infer_schema_length=None)
    return conform(f.with_columns(bundle=pl.lit(bundle.id), surface=pl.lit("for_you"), latency_ms=pl.lit(0.0)), EXPOSURES)


def test_the_flow_asks_once_for_an_old_champion_and_keeps_what_it_found(trained, tmp_path):
    (tmp_path / "settings.ini").write_text(SETTINGS)
    lake, root = fill_lake(tmp_path, trained.sim), tmp_path / "data" / "bundles"
    name, asof = made(trained, root, older_days=7), trained.cutoffs.end
    publish(root / name, "ann")
    exposures = serve_log(root / name, trained, 0.6)
    older = exposures.with_columns(pl.col("ts") - timedelta(days=7), pl.format("old {}", "request_id").alias("request_id"), fallback=pl.lit(False))
    lake.write("exposures", pl.concat([exposures, older]), key=["request_id", "surface", "rank"])
    for file in ("pages/2020-01-01/events.html", "profiles/2020-01-01/events.bin", "references/gone/rows.parquet"): keep_file(lake, file, b"old")
    dead = {"METAFLOW_ARGO_EVENTS_WEBHOOK_URL": f"http://127.0.0.1:{free_port()}/"}
    lost = run_flow(tmp_path, "monitor", "run", "--asof", asof.isoformat(), "--retrain", "ask", **dead)
    assert lost.returncode != 0 and "retrain: " in lost.stdout and "the retrain broke down (not asked for: argo: " in lost.stdout, lost.stdout
    assert lake.read("retrains").collect()["outcome"].str.starts_with("not asked for: argo").to_list() == [True]
    with receiver() as argo: first = run_flow(tmp_path, "monitor", "resume", METAFLOW_ARGO_EVENTS_WEBHOOK_URL=argo.url)
    assert first.returncode == 0 and "a retrain is asked for" in first.stdout, first.stdout
    assert {e[2]["name"].rpartition(".")[2] for e in argo.seen} - {"drift_found"} == {"retrain_asked", "skew_found"}
    drift, verdicts = (lake.read(t).collect() for t in ("drift", "verdicts"))
    assert {*drift["table"]} == {"events", "shoppers", "visits", "catalog", "rows", "scores", "lists", "served"} and {*drift["bundle"]} == {name}
    assert drift.filter(pl.col("table") == "served", pl.col("column") == "fallback")["excess"].item() > 0.2 and not verdicts["name"].str.contains("served").any()
    age = verdicts.filter(pl.col("name") == "age of the champion").row(0, named=True)
    assert age["asks"] and abs(age["value"] - 7) < 0.01 and age["limit"] == 3
    assert lake.read("retrains").collect().sort("turn")["outcome"][1] == "asked" and champion_name(root) == name
    skew, excluded = (lake.read(t).collect() for t in ("skew", "skew_excluded"))
    assert 20 < skew["requests"].item() <= 30 and skew["different"].item() > 0.3 and {*excluded["reason"]} == {"changed"}
    kept = tmp_path / "data" / "lake" / "monitor"
    assert [p.name for p in (kept / "pages").rglob("*.html")] == ["drift.html"] and not [*kept.rglob("*2020-01-01*"), *kept.rglob("gone")]
    html = (kept / "pages" / f"{asof.date()}" / "drift.html").read_text()
    assert all(f'<h1 id="{t}">' in html for t in ("events", "catalog", "rows", "scores", "lists", "served")) and len(html) < 6_000_000
    [card] = [p for p in (tmp_path / ".metaflow").rglob("html-*.html") if "pages" in str(p)]
    assert card.read_text() == html
    days = {p.parent.name: described(p.read_bytes()) for p in (kept / "profiles").rglob("served.bin")}
    assert {*days} == {f"{exposures['ts'].max().date() - timedelta(days=d)}" for d in (0, 1, 7)} and all(b"user_" not in p.read_bytes() for p in kept.rglob("served.bin"))
    assert days[f"{exposures['ts'].max().date()}"].filter(pl.col("column") == "score")["rows"].item() == 250
    shown = {f"{s.name}{[*s.labels.values()]}": s.value for f in text_string_to_metric_families((tmp_path / "data" / "figures" / "reco.prom").read_text()) for s in f.samples}
    assert shown["reco_monitor_timestamp_seconds[]"] == asof.timestamp() and shown["reco_retrain_reason['age']"] == 1 == shown["reco_retrain_verdict[]"]
    for table, of in drift.filter(pl.col("psi").is_not_null()).group_by("table"): assert abs(shown[f"reco_drift_psi{[*table]}"] - of["psi"].max()) < 1e-9
    assert 0 < shown["reco_kpi_visit_conversion_ratio[]"] < 1 and shown["reco_shop_items['recent']"] == trained.sim.catalog["item_id"].n_unique()
    assert shown["reco_skew_score_ratio[]"] == skew["different"].item() and shown["reco_skew_requests[]"] == skew["requests"].item()
    again = run_flow(tmp_path, "monitor", "run", "--asof", asof.isoformat(), "--retrain", "ask")
    assert again.returncode == 0 and "no retrain was asked for" in again.stdout and "less than 7 days ago" in again.stdout, again.stdout
    assert lake.read("drift").collect().height == drift.height and lake.read("retrains").collect().height == 2
    whats = [e["what"] for e in events(root)]
    assert whats.count("skew_found") == 1 == whats.count("retrain_asked") and len(whats) == len({*whats})
    assert read_file(lake, f"profiles/{asof.date()}/events.bin")
    wanted = run_flow(tmp_path, "monitor", "run", "--asof", asof.isoformat(), "--retrain", "ask", "--because", "prices are right again")
    assert wanted.returncode == 0 and "retrain: prices are right again" in wanted.stdout and "a retrain is asked for" in wanted.stdout, wanted.stdout
    assert lake.read("retrains").collect().sort("turn").select("outcome", "why").row(-1) == ("asked", "prices are right again")
    assert [e["what"] for e in events(root)].count("retrain_asked") == 2


def test_what_failed_before_there_were_turns_does_not_count_either(tmp_path):
    lake, now = Lake(tmp_path), datetime(2026, 5, 1, 6, tzinfo=UTC)
    row = {"day": now.date(), "at": now, "run": "1", "bundle": "b", "why": "old", "outcome": "train: exit code 1"}
    lake.write("retrains", pl.DataFrame([row]).cast({"at": pl.Datetime("ms", "UTC")}), key=["day"])
    assert last_asked(lake, now) is None and claim(lake, now.date(), now, "2", "b", "old") == "claimed"
    settle(lake, now.date(), "2", "asked")
    assert retrains(lake).select("run", "turn", "outcome").rows() == [("2", 1, "asked"), ("1", 0, "train: exit code 1")] and last_asked(lake, now) == now


def test_nothing_published_is_said(tmp_path):
    (tmp_path / "settings.ini").write_text(SETTINGS)
    done = run_flow(tmp_path, "monitor")
    assert done.returncode == 1 and "nothing is published" in done.stdout, done.stdout


def test_planted_drift_and_a_planted_fall_ask_each_by_itself_and_drift_is_told_whatever_is_made_of_it(trained, tmp_path):
    end, sim = trained.cutoffs.end, trained.sim
    since = lambda days: pl.col("ts") >= end - timedelta(days=days)
    cents = pl.when(since(7)).then(pl.col("price") * 100).otherwise("price").alias("price")
    events_now = sim.interactions.filter(~(since(14) & (pl.col("event") == "transaction"))).with_columns(cents)
    lake, root = fill_lake(tmp_path, replace(sim, interactions=events_now)), tmp_path / "data" / "bundles"
    publish(root / made(trained, root, older_days=14), "ann")
    asking = lambda day: lake.read("verdicts").filter("asks", pl.col("day") == day.date()).collect()["name"].to_list()
    monitor = SETTINGS.replace("max_age_days = 3", "max_age_days = 60")
    (tmp_path / "settings.ini").write_text(monitor.replace("requests = 30", "requests = 30\nkpi_fall = 1\ncolumns = events.price"))
    done = run_flow(tmp_path, "monitor", "run", "--asof", end.isoformat(), "--retrain", "never")
    assert done.returncode == 0 and "no retrain was asked for" in done.stdout and "there is no serve log yet" in done.stdout, done.stdout
    assert asking(end) == ["drift of events.price"] and [e["what"] for e in events(root)] == ["drift_found"] and "events.price has moved by" in events(root)[0]["text"]
    (tmp_path / "settings.ini").write_text(monitor.replace("requests = 30", "requests = 30\ncolumns = catalog.in_stock"))
    later = end + timedelta(hours=25)
    done = run_flow(tmp_path, "monitor", "run", "--asof", later.isoformat(), "--retrain", "ask")
    assert done.returncode == 0 and "a retrain is asked for" in done.stdout and asking(later) == ["fall of conversion of visits"], done.stdout
    assert [e["what"] for e in events(root)] == ["drift_found", "retrain_asked"] and lake.read("retrains").collect()["outcome"].to_list() == ["asked"]


def test_a_retrain_that_fails_is_asked_for_again_one_that_is_no_better_leaves_the_champion_alone_and_a_better_one_is_served(trained, tmp_path):
    lake, root = fill_lake(tmp_path, trained.sim), tmp_path / "data" / "bundles"
    name = made(trained, root, older_days=7)
    publish(root / name, "ann")
    (tmp_path / "settings.ini").write_text(SETTINGS + "[train]\nholdout_days = 60\n")  # more than there is
    retrain = lambda day=0: run_flow(tmp_path, "monitor", "run", "--asof", (trained.cutoffs.end + timedelta(days=day)).isoformat(), "--retrain", "auto")
    failed = retrain()
    assert failed.returncode != 0 and f"the retrain broke down (train: exit code 1); {name} goes on" in failed.stdout and "cutoffs need more than" in failed.stdout, failed.stdout
    hard = "[gates]\nmargin = -1\nbuyers = 50\nrequests = 10\n"  # twice as good as the champion
    (tmp_path / "settings.ini").write_text(SETTINGS + TRAINING + hard)
    done = retrain()
    assert done.returncode == 0 and f"retrained, and the gates refused it: {name} goes on" in done.stdout, done.stdout
    newest = challenger_name(root)
    report = kept_report(root, newest)
    assert newest != name and not report["passed"] and report["champion"] == name and champion_name(root) == name
    assert lake.read("retrains").collect().sort("turn").select("turn", "outcome").rows() == [(0, "train: exit code 1"), (1, "refused")]
    assert {e["what"] for e in events(root)} - {"drift_found"} == {"retrain_asked", "promotion_refused"}

    worse = made(trained, root, older_days=6, ranker=upside_down(trained.ranker))
    publish(root / worse, "bob", "a mistake")
    (tmp_path / "settings.ini").write_text(SETTINGS.replace("requests = 30", "requests = 30\nmin_days = 0") + TRAINING + SOFT)
    done = retrain(day=1)
    assert done.returncode == 0 and f"retrained: {challenger_name(root)} is served now" in done.stdout, done.stdout
    assert champion_name(root) == challenger_name(root) not in (name, worse)
    assert lake.read("retrains").collect().sort("day", "turn")["outcome"].to_list() == ["train: exit code 1", "refused", "promoted"]


def test_a_flow_that_is_started_has_the_settings_of_the_run_and_a_pod_does_not_train(tmp_path):
    (tmp_path / "settings.ini").write_text("[bundles]\nroot = here\n[tracking]\nenabled = false\n")
    (tmp_path / "below").mkdir()
    code = "import monitor\nprint(monitor.trains_here('auto'), monitor.trains_here('ask'), monitor.run_of('promote'))"
    for cwd, more in ((tmp_path / "below", {}), (tmp_path.parent, {"RECO_SETTINGS": f"{tmp_path.name}/settings.ini", "METAFLOW_KUBERNETES_WORKLOAD": "1"})):
        env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'flows'}"} | more  # found above, and by a relative name
        done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
        assert "no challenger in " in done.stdout and "here: run `python flows/train.py run` first" in done.stdout, done.stdout
        assert f"{not more} False 1" in done.stdout, done.stdout
