"""`python -m app.serve` as it runs in production: Ray, HAProxy, signals. One Ray for all of it: a start takes up to a minute."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import END
from servers import prometheus

from app.client import Client, EndpointDown
from app.ports import free_port, port_free
from reco.bundle import latest_bundle
from reco.data.bus import open_consumer
from reco.data.served import SERVED, lists_section
from reco.features.store import open_store
from reco.settings import Settings

ROOT = Path(__file__).resolve().parent.parent

EXPERIMENT = """[[experiment]]
name = "strangers"
surfaces = ["similar"]
[[experiment.variant]]
name = "known"
weight = 0
[[experiment.variant]]
name = "unknown"
weight = 1
serve = "non_personalised"
"""

def run_serve(bundles: Path, port: int, store: Path|None = None, **more: str) -> subprocess.Popen: # its store is in the bundles' folder if not given
    env = os.environ | {"RECO_BUNDLES_ROOT": str(bundles), "RECO_SERVING_PORT": str(port), "RECO_SERVING_MAX_REPLICAS": "2",
                        "RECO_ONLINE_FOLDER": str((store or bundles)/"data"/"online")} | more
    return subprocess.Popen([sys.executable, "-m", "app.serve"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)

@dataclass
class Running:
    process: subprocess.Popen
    port: int

@pytest.fixture(scope="module")
def served(bundle_root: Path, store_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port, experiments = free_port(), tmp_path_factory.mktemp("experiments")/"experiments.toml"
    experiments.write_text(EXPERIMENT)
    process = run_serve(bundle_root, port, store_root, RECO_EXPERIMENTS_FILE=str(experiments))
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("ready"): break
    else: pytest.fail("it ended before it was ready:\n" + "".join(said[-30:]))
    yield Running(process, port)
    if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)

@pytest.fixture
def client(served: Running) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{served.port}", timeout_s=20) as c: yield c

def test_it_recommends_over_http(client, bundle, store):
    known = next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)
    items = client.recommendations(known, 8)
    assert items != client.recommendations("nobody", 8) # the replica, a worker of Ray's, found the store of the settings
    assert len(items) == 8 and {x.item_id for x in items} <= set(bundle.items["item_id"])
    assert client.bundle_id() == bundle.manifest["id"]

def test_odd_ids_pass_through_the_proxy(client):
    for user_id in ("nobody", "a/b", "..", "é🛒", "a\nb", "\x00", "%2F", "?k=1#x"): assert len(client.recommendations(user_id, 2)) == 2

def test_many_at_once_all_get_their_answer(client):
    with ThreadPoolExecutor(8) as pool: answers = list(pool.map(lambda i: client.recommendations(f"u{i}", 3), range(100)))
    assert all(len(a) == 3 for a in answers)

def test_every_surface_passes_through_the_proxy(served, bundle):
    items = bundle.ids.external(bundle.moment.per_item[:, 2].argsort()[::-1][:3])
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=20, trust_env=False) as http:
        similar, basket = http.get(f"/similar/v1/{items[0]}?k=3"), http.get(f"/bought-together/v1?items={items[0]},{items[1]}&k=3&filter=price>0.01")
        visit = http.post("/recommendations/v1/session", json={"k": 3, "events": [{"item_id": items[0], "event": "view"}]}, headers={"X-Request-ID": "page-1"})
        for answer in (similar, basket, visit): assert answer.status_code == 200 and len(answer.json()["recommendations"]) == 3
        assert visit.headers["x-request-id"] == "page-1" and basket.json()["items"] == items[:2]
        assert http.get("/ready").json()["status"] == "ready"

def test_an_experiment_reaches_its_shoppers_and_the_answer_says_so(served, bundle, store):
    item, user = bundle.ids.external(bundle.moment.per_item[:, 2].argsort()[::-1][:1])[0], next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=20, trust_env=False) as http:
        mine, nobodys = http.get(f"/similar/v1/{item}?k=8&user_id={user}"), http.get(f"/similar/v1/{item}?k=8")
        assert mine.headers["x-variant"] == "strangers=unknown" and "x-variant" not in nobodys.headers and mine.json() == nobodys.json()
        assert "x-variant" not in http.get(f"/recommendations/v1/{user}").headers

def test_a_bad_experiments_file_is_an_error_before_ray_starts(bundle_root, tmp_path):
    (tmp_path/"bad.toml").write_text(EXPERIMENT.replace("weight = 1", "weight = 2"))
    ended = run_serve(bundle_root, free_port(), tmp_path, RECO_EXPERIMENTS_FILE=str(tmp_path/"bad.toml"))
    said, _ = ended.communicate(timeout=60)
    assert ended.returncode == 1 and "bad.toml" in said and "weight" in said and "Traceback" not in said

def test_an_event_is_in_the_next_list_and_in_the_figures(served, bundle):
    items = bundle.ids.external(bundle.moment.per_item[:, 2].argsort()[::-1][3:6])
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=20, trust_env=False) as http:
        ask = lambda: http.get("/recommendations/v1/a-new-face?k=5")
        before = ask()
        sent = [{"event_id": f"serve {i}", "ts": round(time.time()*1000) - 100, "user_id": "a-new-face", "item_id": i, "event": "view"} for i in items]
        assert http.post("/events/v1", json=sent).json() == {"accepted": 3}
        after = ask()
        assert before.headers["x-fallback"] == "true" and "x-fallback" not in after.headers and before.json() != after.json()
        assert "reco_events_accepted_total 3.0" in http.get("/metrics").text

def test_prometheus_reads_it_and_its_rules_work_out_traffic_latency_and_errors(served, client, tmp_path):
    def more(wanted):
        def asked(found: list) -> bool: # visits until there is an answer, and one mistake of a caller in five
            for n in range(8): client.recommendations(f"u{n}", 3)
            with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", trust_env=False) as http:
                assert [http.get("/recommendations/v1/u?k=0").status_code for _ in range(2)] == [422]*2
            return wanted(found)
        return asked
    with prometheus(tmp_path, endpoint=served.port) as p:
        route = '{route="/recommendations/v1/{user_id:text}"}'
        [(_, rps)] = p.until(f"route:reco_http_requests:rate5m{route}", more(lambda found: found and found[0][1] > .05))
        [(_, p99)] = p.until(f"route:reco_http_request_seconds:p99_5m{route}", more(bool))
        assert rps < 1_000 and 0 < p99 < 2.5
        stages = p.until("stage:reco_stage_seconds:p50_5m", more(lambda found: len(found) == 7)) # of replicas that are other processes
        assert 0 < sum(v for _, v in stages) < 1
        assert p.until("job:reco_http_errors:ratio_rate5m", more(bool))[0][1] == 0 # a caller's mistake is none of ours
        assert p.query('sum(reco_http_requests_total{status="422"})')[0][1] >= 2
        [(_, age)] = p.until("job:reco_bundle:age_seconds", bool)
        assert abs(time.time() - age - END.timestamp()) < 60
        assert not p.query('ALERTS{alertstate="firing"}') and p.query("max(up)") == [({}, 1)]

def http_listeners(served: Running) -> list[tuple[str, str]]: # process name, address
    tree = [served.process.pid, *(p.pid for p in psutil.Process(served.process.pid).children(recursive=True))]
    return [(psutil.Process(c.pid).name(), c.laddr.ip) for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.pid in tree]

@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with ray[serve] on Linux only")
def test_haproxy_is_in_front_and_listens_on_loopback_only(served):
    proxy = [ip for name,ip in http_listeners(served) if name == "haproxy"]
    assert len(proxy) == 3 and set(proxy) == {"127.0.0.1"} # the endpoint, and HAProxy's statistics and metrics

def test_a_taken_port_is_an_error_before_ray_starts(served, bundle_root):
    began = time.monotonic()
    second = run_serve(bundle_root, served.port)
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 1 and f"127.0.0.1:{served.port} is taken" in said and "Traceback" not in said
    assert "RECO_SERVING_PORT" in said and time.monotonic() - began < 30

def test_without_a_bundle_it_says_what_to_run(tmp_path):
    ended = run_serve(tmp_path, free_port())
    said, _ = ended.communicate(timeout=60)
    assert ended.returncode == 1 and "flows/train.py" in said and "Traceback" not in said

def test_a_damaged_bundle_is_refused_with_the_file_that_is_wrong(bundle_root, tmp_path):
    shutil.copytree(bundle_root, tmp_path/"bundles")
    with (latest_bundle(tmp_path/"bundles")/"items.parquet").open("ab") as f: f.write(b"x")
    ended = run_serve(tmp_path/"bundles", free_port())
    said, _ = ended.communicate(timeout=60)
    assert ended.returncode == 1 and "items.parquet" in said and "Traceback" not in said

def test_sigterm_ends_it_and_everything_it_started(served): # nothing is served after it
    mine = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=20, trust_env=False) as http:
        for i in range(40): assert http.get(f"/recommendations/v1/u{i}?k=3", headers={"X-Request-ID": f"last-{i}"}).status_code == 200
    names = " ".join(p.name() for p in mine)
    assert len(mine) > 5 and "raylet" in names and "gcs_server" in names # the check sees what it is to see gone
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    _, left = psutil.wait_procs(mine, timeout=10)
    assert not left, f"still running: {[p.cmdline() for p in left]}"
    assert port_free("127.0.0.1", served.port)
    with Client(f"http://127.0.0.1:{served.port}") as c, pytest.raises(EndpointDown): c.recommendations("u")

def test_every_list_that_was_answered_is_written_down(served, store_root, bundle): # the one before ended the endpoint in the middle of it
    assert served.process.poll() == 0
    settings = Settings(root=store_root)
    with contextlib.closing(open_store(settings)) as store:
        reader, found = open_consumer(lists_section(settings.stream, settings.served), store.client, "test"), []
        while some := reader.poll(1_000, .5): found += [SERVED.decode(m.data) for m in some]
    by_name = {x["request_id"]: x for x in found}
    assert len(by_name) == len(found) and {f"last-{i}" for i in range(40)} | {"page-1"} <= set(by_name)
    assert {x["bundle"] for x in found} == {bundle.id} and {x["surface"] for x in found} == {"for_you", "similar", "bought_together"}
    assert {(x["surface"], x["variant"]) for x in found if x["user_id"]} == {("for_you", None), ("similar", "strangers=unknown")}
    last = by_name["last-7"]
    assert last["user_id"] == "u7" and len(last["items"]) == 3 and 0 < last["latency_ms"] < 60_000 and abs(time.time()*1000 - last["ts"]) < 600_000
