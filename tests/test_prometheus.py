"""What `deploy/prometheus` and `deploy/grafana` ask for is there, their rules do what they say, and Debian's programs run them."""

import importlib.util
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import polars as pl
import pytest
import uvicorn
import yaml
from conftest import END
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from servers import DEPLOYED, alertmanager, debian_program, prometheus

from app.contract import create_app
from app.keys import Keys, load_keys
from app.meter import Meter
from app.ports import free_port
from app.serve import Replica
from reco.data.consumer import Metrics
from reco.monitoring.decision import by_age, by_drift, by_metric, decide
from reco.monitoring.drift import DRIFT
from reco.monitoring.facts import Stretch, facts, figures
from reco.monitoring.kpis import KPIS
from reco.monitoring.skew import AGAIN, WHY_NOT, Compared, skew_figures
from reco.pipeline import answer, response
from reco.request import RecommendationRequest
from reco.reranking.rulebook import SURFACES
from reco.reranking.rules import FATES
from reco.settings import Serving, Settings
from reco.stages import STAGES

ROOT = DEPLOYED.parents[1]
README = (DEPLOYED / "README.md").read_text()
BOARDS = {p.stem: json.loads(p.read_text()) for p in sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))}
RULES = {p.stem: [r for g in yaml.safe_load(p.read_text())["groups"] for r in g["rules"]] for p in (DEPLOYED / "rules").glob("*.yml")}
ALERTS = {r["alert"]: r for r in RULES["alerts"]}
CASES = {p.stem: yaml.safe_load(p.read_text())["tests"] for p in (DEPLOYED / "tests").glob("*.yml")}
NOW, CLIENT = datetime(2026, 5, 1, 6, tzinfo=UTC), "client-key-of-forty-characters-or-so"


# what is counted


def textfile():
    """`flows/textfile.py`, which needs no Metaflow."""
    spec = importlib.util.spec_from_file_location("textfile", ROOT / "flows" / "textfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_a_day(columns: int = 1, age: float = 40, coverage: float | None = None) -> CollectorRegistry:
    """What a run leaves that found two columns of events, of which as many moved, and a champion of that age."""
    made, days = textfile(), [(NOW - timedelta(days=d)).date() for d in range(30, -1, -1)]
    rows = [("events", "price", .9 if columns else .1, 1e-9), ("events", "hour", .2, .5), ("visits", "length", .1, .9), ("scores", "score", None, None)]
    drift = pl.DataFrame([{"table": t, "column": c, "psi": x, "noise": 0., "excess": x and x - .05, "chance": p, "moved": ""} for t, c, x, p in rows], schema=DRIFT)
    daily = pl.DataFrame({"day": days, "value": [.03] * 29 + [.01, .5], "n": [900] * 30 + [2]})
    asked = drift.filter(pl.col("psi").is_not_null())
    reasons = [by_drift(asked, .2, .001), by_metric("conversion of visits", daily, days[20], .1), by_age(age, 30)]
    shop = pl.DataFrame([(n, 1., coverage if n == "coverage of the lists" else 2.) for n in made.FIGURES], schema=["figure", "before", "now"], orient="row")
    verdict = decide(reasons, None, NOW, 7)
    skew = {"requests": 30., "items": 300., "different": .02, "absent": .1, "same_lists": .7, "agreement": .9}
    return made.figures_of_day(NOW, drift, asked, (.2, .001), verdict.reasons, verdict.retrain, shop, daily, (skew, {"context": 7}, .05))


def of_lists() -> CollectorRegistry:
    """What a run leaves that counted two days, of which one is complete; on one surface nothing was clicked."""
    day, later = NOW.date() - timedelta(days=3), NOW.date() - timedelta(days=1)
    rows = [(d, by, v, ctr, .1, cvr, 20., 9., 500) for d in (day, later)
            for by, v, ctr, cvr in (("", "", .05, .2), ("surface", "for_you", .1, .3), ("surface", "similar", 0., None), ("rank", "1", .9, .9))]
    kpis = pl.DataFrame(rows, schema=["day", "dimension", "value", "CTR", "cart_rate", "CVR", "AOV", "revenue_per_1000", "exposures"], orient="row")
    varied = pl.DataFrame([(d, by, s, .1 + (d == later) + (by == "source"), .6, .05, 7.5) for d in (day, later) for by, s in (("", ""), ("surface", "for_you"), ("source", "als"))],
                          schema=["day", "dimension", "value", "coverage", "tail", "new", "novelty"], orient="row")
    return textfile().figures_of_lists(NOW, kpis, varied, timedelta(hours=24))


def consumers(lag: int = 0) -> CollectorRegistry:
    """The figures of `python -m app.consumer`."""
    registry = CollectorRegistry()
    for of in ("stream", "served"): Metrics(registry, of=of).lag.set(lag)
    return registry


@pytest.fixture(scope="module")
def families() -> dict[str, tuple[str, set[str]]]:
    """Family as it is asked for → type and labels."""
    made = [c for r in (Meter().registry, consumers(), of_a_day(), of_lists()) for c in r._collector_to_names]
    return {c._name + "_total" * (c._type == "counter"): (c._type, set(c._labelnames)) for c in made}


@pytest.fixture(scope="module")
def labels_of(families) -> dict[str, set[str]]:
    """Series that can be asked for → labels, what is recorded among them."""
    given = {"job", "instance"}
    plain = {n: labels | given for n, (_, labels) in families.items()} | {"up": given}
    of_histograms = {f"{n}_{part}": labels | given | ({"le"} if part == "bucket" else set())
                     for n, (kind, labels) in families.items() if kind == "histogram" for part in ("bucket", "sum", "count")}
    recorded = {r["record"]: {r["record"].split(":")[0]} - {"job"} for r in RULES["recording"]}
    return {n: x for n, x in plain.items() if families.get(n, ("",))[0] != "histogram"} | of_histograms | recorded


def drawn() -> list[tuple[str, str, str]]:
    """Board and panel, the expression, and what is made of its labels."""
    return [(f"{name}: {p['title']}", t["expr"], t["legendFormat"]) for name, board in BOARDS.items() for p in board["panels"] for t in p.get("targets", [])]


def expressions() -> list[tuple[str, str, str]]:
    """Where, the expression, and what is made of its labels: of rules and dashboards."""
    rules = [(r.get("record") or r["alert"], r["expr"], r.get("annotations", {}).get("summary", "")) for of in RULES.values() for r in of]
    return rules + drawn()


WORDS = {"sum", "by", "rate", "increase", "max", "min", "avg_over_time", "last_over_time", "offset", "on", "and", "or", "time", "histogram_quantile", "group_left", "d", "h", "m"}
SELECTOR = re.compile(r'([a-z_:][\w:]*)\{((?:[^}"]|"[^"]*")*)\}')


def read(expr: str) -> tuple[set[str], set[str], list[tuple[str, str]]]:
    """Names of series; labels that are grouped by; series and label of each selector."""
    grouped = {x for part in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", expr) for x in part.replace(" ", "").split(",") if x}
    asked = [(name, label) for name, inside in SELECTOR.findall(expr) for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', inside))]
    bare = re.sub(r"\b(?:by|on|group_left) \([^)]*\)", " ", SELECTOR.sub(r"\1", expr))
    return set(re.findall(r"(?<![\w:.])[a-z_][\w:]*", bare)) - WORDS, grouped, asked


def test_every_series_and_label_that_is_asked_for_is_counted(labels_of):
    seen = set()
    for where, expr, text in expressions():
        names, grouped, asked = read(expr)
        assert names and names <= set(labels_of), (where, names - set(labels_of))
        there = set.union(*(labels_of[n] for n in names))
        assert grouped <= there, (where, grouped)
        for name, label in asked: assert label in labels_of[name], (where, name, label)
        assert set(re.findall(r"\{\{\s*\$?(?:labels\.)?(\w+)", text)) - {"value"} <= (grouped or there), (where, text)
        seen |= names
    assert len(seen) > 40


def test_a_name_that_is_not_counted_would_be_seen(labels_of):
    names, grouped, asked = read('sum by (rute, le) (rate(reco_http_request_seconds_bucket{staus=~"a,b=}"}[5m])) / on () reco_nothing > 0.1 * 8e3')
    assert (grouped, asked) == ({"rute", "le"}, [("reco_http_request_seconds_bucket", "staus")])
    assert "reco_nothing" in names - set(labels_of) and not {"rute", "staus"} & labels_of["reco_http_request_seconds_bucket"]


def test_the_page_defines_every_metric_with_its_type_and_labels(families):
    said = {}
    for names, kind, labels in re.findall(r"^\| (`reco_[^|]+) \| (\w+) \| ([^|]*)\|", README, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names): said[name] = kind, {x for x in labels.replace(" ", "").split(",") if x}
    assert said == families
    elsewhere = set(re.findall(r"\breco_\w+", README)) - {"reco_key", "reco_kpis"}  # two files
    assert elsewhere <= set(families), elsewhere - set(families)


def test_the_page_lists_the_values_of_every_label(families):
    rows = dict(re.findall(r"^\| ([a-z, ()]+) \| (.+) \|$", README.split("| label | values |")[1].split("## Alerts")[0], re.MULTILINE))
    values = {re.sub(r" \(.*", "", one): set(re.findall(r"`([^`]+)`", text)) for name, text in rows.items() for one in name.split(", ")}
    assert set.union(*(labels for _, labels in families.values())) == set(values)
    own = Replica()
    routes = {r.path for r in create_app(own).routes if getattr(r, "operation_id", None) or getattr(r, "tags", None)}
    assert values["route"] == routes | {"none"} and len(routes) > 10
    assert values["stage"] == set(STAGES) == set(own.meter.stages) and values["surface"] == {*SURFACES, "all"}
    assert values["rule"] >= set(FATES[2:])
    reasons = set(re.findall(r"`([^`]+)`", rows["reason (retrain)"]))
    assert reasons == set(textfile().REASONS)
    assert set(re.findall(r"`([^`]+)`", rows["reason (skew)"])) == set(WHY_NOT)


def test_every_alert_is_explained_with_its_severity():
    said = dict(re.findall(r"^### (\w+)\n(\w+)\.", README, re.MULTILINE))
    assert said == {name: a["labels"]["severity"] for name, a in ALERTS.items()}


# stages and candidates


def test_candidates_are_counted_as_the_sources_proposed_them(bundle, store, trained):
    user = next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)
    a = answer(RecommendationRequest(user, 10, END), bundle, store)
    quotas = bundle.moment.quotas | {"popularity": max(bundle.moment.quotas["popularity"], 20)}
    by_hand = {name: int((source.retrieve(a.h, quotas[name]).items >= 0).sum()) for name, source in bundle.moment.sources.items()}
    assert response(a).proposed == by_hand and len({*by_hand.values()}) > 3
    page = answer(RecommendationRequest(user, 10, END, surface="similar", context_items=[bundle.ids.external([5])[0]]), bundle, store)
    assert {"covisit", "past_als"} <= set(response(page).proposed)


def test_the_stages_are_most_of_a_request_and_a_kept_list_has_one(bundle, store):
    user, own = next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5), Replica()
    own.bundle, own.store, own.keep_s, own.deadline_s = bundle, store, 30, 5
    count = lambda stage: own.meter.registry.get_sample_value("reco_stage_seconds_count", {"stage": stage})
    proposed = lambda: own.meter.registry.get_sample_value("reco_candidates_total", {"source": "popularity"})
    shares = []
    for k in range(7, 17):
        began = time.perf_counter()
        made = own.recommend(RecommendationRequest(user, k))
        shares.append(sum(made.seconds.values()) / (time.perf_counter() - began))
        assert not made.kept and tuple(made.seconds) == STAGES
    assert max(shares) < 1 and sorted(shares)[5] > 0.5  # a busy machine may stop any of them between two stages
    own.meter.shown("for_you", 16, made)
    first = proposed()
    own.meter.shown("for_you", 16, found := own.recommend(RecommendationRequest(user, 16)))
    assert found.kept and tuple(found.seconds) == ("store",) and proposed() == first > 0
    assert [count(s) for s in STAGES] == [2] + [1] * 6


# the rules


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_quiet():
    for name, alert in ALERTS.items():
        checks = [[c["exp_alerts"] for c in case.get("alert_rule_test", []) if c["alertname"] == name] for of in CASES.values() for case in of]
        fired = [a for of in checks for found in of for a in found]
        assert fired and all(a["exp_labels"]["severity"] == alert["labels"]["severity"] for a in fired), name
        assert any(of and not any(of) for of in checks), f"no quiet case of {name}"


def test_every_recorded_rule_is_tested():
    asked = "\n".join(c["expr"] for case in CASES["recording"] for c in case["promql_expr_test"])
    assert [r["record"] for r in RULES["recording"] if r["record"] not in asked] == []


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_rules_do_what_they_say(name):
    done = subprocess.run([debian_program("promtool", "prometheus"), "test", "rules", f"{name}.yml"], cwd=DEPLOYED / "tests", capture_output=True, text=True)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_a_rule_that_never_fires_would_be_seen(tmp_path):
    for folder in ("rules", "tests"): (tmp_path / folder).mkdir()
    for p in DEPLOYED.glob("rules/*.yml"): (tmp_path / "rules" / p.name).write_text(p.read_text().replace("reco_drift_columns_moved) > 0", "reco_drift_columns_moved) > 9"))
    (tmp_path / "tests" / "model.yml").write_text((DEPLOYED / "tests" / "model.yml").read_text())
    done = subprocess.run([debian_program("promtool", "prometheus"), "test", "rules", "model.yml"], cwd=tmp_path / "tests", capture_output=True, text=True)
    assert done.returncode != 0 and "RecoDrift" in done.stdout + done.stderr


def test_configuration_and_expressions_are_valid(tmp_path):
    tool = debian_program("promtool", "prometheus")
    for p in DEPLOYED.rglob("*.yml"):
        (tmp_path / p.relative_to(DEPLOYED)).parent.mkdir(exist_ok=True)
        (tmp_path / p.relative_to(DEPLOYED)).write_text(p.read_text())
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "reco_key").touch()
    panels = [{"record": f"panel:{n}", "expr": expr} for n, (_, expr, _) in enumerate(drawn())]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    for command in (["config", "prometheus.yml"], ["rules", "rules/alerts.yml", "rules/recording.yml", "panels.yml"]):
        done = subprocess.run([tool, "check", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_names_and_units_are_as_prometheus_wants_them():
    tool = debian_program("promtool", "prometheus")
    for text in (Meter().text(), generate_latest(consumers()), generate_latest(of_a_day()), generate_latest(of_lists())):
        done = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()


# Alertmanager


def test_every_severity_has_a_route_of_its_own():
    tool, config = debian_program("amtool", "prometheus-alertmanager"), str(DEPLOYED / "alertmanager.yml")
    assert subprocess.run([tool, "check-config", config], capture_output=True).returncode == 0
    to = {}
    for severity in {a["labels"]["severity"] for a in ALERTS.values()}:
        done = subprocess.run([tool, "config", "routes", "test", f"--config.file={config}", f"severity={severity}"], capture_output=True, text=True, check=True)
        to[severity] = done.stdout.strip()
    assert to == {"critical": "page", "warning": "tell"}
    routed = {m for r in yaml.safe_load(Path(config).read_text())["route"]["routes"] for m in r["matchers"]}
    assert routed == {f'severity="{s}"' for s in to}


def test_only_alerts_that_exist_hold_back_others():
    config = yaml.safe_load((DEPLOYED / "alertmanager.yml").read_text())
    named = {n for r in config["inhibit_rules"] for m in r["source_matchers"] + r["target_matchers"] for n in re.findall(r"Reco\w+", m)}
    assert named and named <= set(ALERTS)


@pytest.fixture
def hook() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """An address, and what was posted there: path and body."""
    got = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()


def test_what_is_told_to_whom_and_what_is_held_back(hook, tmp_path):
    url, got = hook
    alert = lambda name, **more: {"labels": {"alertname": name, "severity": ALERTS[name]["labels"]["severity"]} | more, "annotations": {"summary": f"about {name}"}}
    with alertmanager(tmp_path, url) as http:
        assert http.post("/api/v2/alerts", json=[alert("RecoEndpointDown"), alert("RecoDrift")]).status_code == 200
        for _ in range(200):
            if len(got) > 1: break
            threading.Event().wait(0.05)
        assert http.post("/api/v2/alerts", json=[alert("RecoSlow", route="/a"), alert("RecoEventLag")]).status_code == 200
        for _ in range(200):
            if len(got) > 2: break
            threading.Event().wait(0.05)
        state = {a["labels"]["alertname"]: a["status"]["state"] for a in http.get("/api/v2/alerts").json()}
    assert state == {"RecoEndpointDown": "active", "RecoDrift": "active", "RecoSlow": "suppressed", "RecoEventLag": "active"}
    told = {re.search(r"about (\w+)", body)[1]: path for path, body in got}
    assert told == {"RecoEndpointDown": "/page", "RecoDrift": "/tell", "RecoEventLag": "/tell"}


# the daily file


def test_what_a_run_found_is_in_the_file(tmp_path):
    registry = of_a_day(columns=1, age=40)
    value = registry.get_sample_value
    assert value("reco_monitor_timestamp_seconds") == NOW.timestamp() and value("reco_drift_limit_psi") == .2
    assert value("reco_drift_psi", {"table": "events"}) == .9 and abs(value("reco_drift_excess_psi", {"table": "events"}) - .85) < 1e-9
    assert value("reco_drift_columns_moved", {"table": "events"}) == 1 and value("reco_drift_columns_moved", {"table": "visits"}) == 0
    assert value("reco_drift_psi", {"table": "scores"}) is None  # nothing could be said of it
    assert value("reco_retrain_verdict") == 1 and [value("reco_retrain_reason", {"reason": r}) for r in ("drift", "age")] == [1, 1]
    assert value("reco_kpi_visit_conversion_ratio") == .01 and value("reco_kpi_visit_conversion_visits") == 900  # today is not over
    assert value("reco_kpi_visit_conversion_timestamp_seconds") == datetime(2026, 5, 1, tzinfo=UTC).timestamp()
    assert value("reco_shop_items", {"period": "recent"}) == 2 and value("reco_shop_list_coverage_ratio", {"period": "recent"}) is None
    assert value("reco_skew_score_ratio") == .02 and value("reco_skew_limit_ratio") == .05 and value("reco_skew_excluded_lists", {"reason": "context"}) == 7
    path = tmp_path / "new" / "reco.prom"
    assert textfile().write_figures(path, registry) == "" and path.read_bytes() == generate_latest(registry)
    assert [p.name for p in path.parent.iterdir()] == ["reco.prom"] and path.stat().st_mode & 0o777 == 0o644
    assert "Error" in textfile().write_figures(path / "below" / "reco.prom", registry)
    calm = of_a_day(columns=0, age=3).get_sample_value
    assert [calm("reco_retrain_reason", {"reason": r}) for r in ("drift", "age")] == [0, 0] and calm("reco_drift_columns_moved", {"table": "events"}) == 0


def test_what_the_lists_earned_is_that_of_the_last_complete_day():
    value = of_lists().get_sample_value
    assert value("reco_kpi_lists_timestamp_seconds") == NOW.timestamp()
    assert value("reco_kpi_lists_day_timestamp_seconds") == (NOW.replace(hour=0) - timedelta(days=2)).timestamp()
    assert [value("reco_kpi_ctr_ratio", {"surface": s}) for s in ("all", "for_you", "similar", "1")] == [.05, .1, 0, None]
    assert value("reco_kpi_cvr_ratio", {"surface": "similar"}) is None and value("reco_kpi_exposures", {"surface": "all"}) == 500
    assert set(textfile().KPIS) == {m.name for m in KPIS} | {"exposures"}
    assert [value(f"reco_kpi_{n}", {"surface": s}) for n in ("coverage_ratio", "tail_ratio", "new_ratio", "novelty") for s in ("all", "for_you", "similar")] == [
        .1, .1, None, .6, .6, None, .05, .05, None, 7.5, 7.5, None]
    empty = [pl.DataFrame(schema={"day": pl.Date, "dimension": pl.String, "value": pl.String} | dict.fromkeys(numbers, pl.Float64)) for numbers in (textfile().KPIS, textfile().VARIETY)]
    none = textfile().figures_of_lists(NOW, *empty, timedelta(0))
    assert none.get_sample_value("reco_kpi_lists_timestamp_seconds") and none.get_sample_value("reco_kpi_lists_day_timestamp_seconds") is None


def test_every_figure_that_the_run_works_out_has_a_name(trained):
    last = Stretch(END - timedelta(days=7), END, timedelta(days=7))
    found = facts(trained.sim.interactions.lazy(), trained.sim.catalog.lazy(), last, 30)
    assert {*figures(found, last), "coverage of the lists"} == set(textfile().FIGURES)


def test_every_figure_of_the_skew_has_a_name():
    rows = [("r", NOW, n, f"i{n}", .5, .5, n) for n in (1, 2)]
    assert {*skew_figures(Compared(pl.DataFrame(rows, schema=AGAIN, orient="row"), {}))} - {"items"} == set(textfile().SKEW)


# Prometheus, running


@pytest.fixture
def guarded(bundle, store) -> Iterator[tuple[int, Replica]]:
    """The port of an endpoint that wants keys, and its replica; without Ray."""
    own = Replica()
    own.bundle, own.store, own.keys = bundle, store, load_keys(Settings(serving=Serving(client_keys=CLIENT)))
    own.meter.asof.set(bundle.moment.asof / 1000)
    assert isinstance(own.keys, Keys) and own.keys
    server = uvicorn.Server(uvicorn.Config(create_app(own), host="127.0.0.1", port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: threading.Event().wait(0.02)
    yield server.config.port, own
    server.should_exit = True
    thread.join(10)


class Together:
    """What several files of figures show, as node_exporter does."""

    def __init__(self, *registries: CollectorRegistry): self.registries = registries

    def collect(self) -> Iterator: return (family for r in self.registries for family in r.collect())


def busy_consumers() -> CollectorRegistry:
    """Those of a consumer to whom everything has happened once."""
    registry = CollectorRegistry()
    for of in ("stream", "served"):
        m = Metrics(registry, of=of)
        m.lag.set(20_000)
        m.dead.labels("unreadable").inc()
        m.failed.labels("the lake").inc()
        m.newest.set(NOW.timestamp())
    return registry


@pytest.fixture
def others() -> Iterator[dict[str, int]]:
    """Ports of a consumer, and of somebody who shows the daily files as node_exporter does."""
    ports = {name: free_port() for name in ("consumer", "node")}
    servers = [start_http_server(ports[name], "127.0.0.1", registry)[0] for name, registry in (("consumer", busy_consumers()), ("node", Together(of_a_day(coverage=.4), of_lists())))]
    yield ports
    for s in servers: s.shutdown()


def test_prometheus_shows_its_key_and_every_panel_is_drawn(guarded, others, store, tmp_path):
    user, (port, own) = next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5), guarded
    with prometheus(tmp_path, CLIENT, endpoint=port, **others) as p, httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": CLIENT}) as http:
        p.until("up", lambda found: sorted((labels["job"], v) for labels, v in found) == [("node", 1), ("reco-consumer", 1), ("reco-endpoint", 1)])
        deadline, own.deadline_s = own.deadline_s, 1e-6  # what does not come at once is left out
        late = http.get(f"/recommendations/v1/{user}?filter=price<1")
        own.deadline_s = deadline
        assert late.headers["X-Degraded"]
        def asked(found: list) -> bool:  # more visits until it is wanted
            for k in range(5): assert http.get(f"/recommendations/v1/{user}?k={k + 1}").status_code == 200
            return bool(found) and found[0][1] > 0
        p.until('stage:reco_stage_seconds:p99_5m{stage="ranking"}', asked)
        p.until('source:reco_candidates:per_list_5m{source="covisit"}', asked)
        assert sorted(v for _, v in p.until("reco_drift_columns_moved", bool)) == [0, 1]
        p.until('ALERTS{alertstate="pending", alertname=~"RecoDrift|RecoEventLag"}', lambda found: len(found) == 2)  # they wait to be sure
        for _, expr, _ in expressions(): p.query(expr)
        empty = {where: expr for where, expr, _ in drawn() if not p.query(expr)}
        for expr in empty.values(): p.until(expr, bool, 15)
    with prometheus(tmp_path / "wrong", "another-key-of-some-length", endpoint=port) as p:
        p.until('up{job="reco-endpoint"}', lambda found: [v for _, v in found] == [0])
        assert "401" in p.asked("targets")["activeTargets"][0]["lastError"]


# Grafana


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_have_their_form(name):
    board = BOARDS[name]
    panels = [p for p in board["panels"] if p["type"] != "row"]
    assert [v["type"] for v in board["templating"]["list"]] == ["datasource"] and len({p["id"] for p in board["panels"]}) == len(board["panels"])
    for p in panels:
        assert p["fieldConfig"]["defaults"]["unit"] and p["title"] and p["targets"], p["title"]
        assert {t["datasource"]["uid"] for t in p["targets"]} | {p["datasource"]["uid"]} == {"${datasource}"}
    taken = {}
    for p in board["panels"]:
        g = p["gridPos"]
        for cell in ((x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])):
            assert cell[0] < 24 and taken.setdefault(cell, p["id"]) == p["id"], p["title"]


def test_the_four_boards_have_names_of_their_own_and_are_provisioned():
    assert set(BOARDS) == {"service", "quality", "business", "data"}
    assert len({b["uid"] for b in BOARDS.values()}) == len({b["title"] for b in BOARDS.values()}) == 4
    for path in (ROOT / "deploy" / "grafana" / "provisioning").rglob("*.yml"): assert yaml.safe_load(path.read_text())["apiVersion"] == 1
