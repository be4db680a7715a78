"""docker-compose.yml as it is, on this machine: its programs in the images' sandboxes, the servers that Debian and PyPI have, all told what the file tells them,
at its own ports, in a network of their own in which its names lead to this machine. `test_platform.py` runs this; it is no test by itself.

What stands in: moto's S3 for MinIO, librdkafka's own brokers for Redpanda (at another address, as they choose their port), Debian's NGINX, Prometheus, Alertmanager,
PostgreSQL and Redis for images of later versions. Grafana and node_exporter are missing. The shop is small."""

import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import psycopg
import pytest
from composing import composed, mounts, tmpfs, words
from flow_runs import SMALL
from gateways import configured, program
from images import ROOT, Image, Program, ran, started
from servers import (
    debian_program,
    kafka_brokers,
    postgres_account,
    postgres_program,
    wait_for_postgres,
    wait_until_it_answers,
)

from deploy import make_env
from reco.data.lake import Lake
from reco.data.storage import storage_options
from reco.settings import Lake as LakeSection

SETTINGS = """\
[simulator]
users = 300
items = 100
events = 6000
days = 60
[stream]
batch_seconds = 0.3
""" + SMALL


def images() -> dict[str, Image]:
    """What test_platform.py has built."""
    return {name: Image(Path(x.pop("folder")), **x) for name, x in json.loads(os.environ["PLATFORM_IMAGES"]).items()}


class Platform(NamedTuple):
    root: Path
    env: dict[str, str]           # of .env
    services: dict[str, dict]     # of the file
    images: dict[str, Image]
    bus: str
    running: dict[str, Program]
    gateway: httpx.Client

    def told(self, name: str) -> dict:
        """How a container of ours is started."""
        service = self.services[name]
        volumes = {m.target: self.volume(m.source) for m in mounts(service) if not m.source.startswith("./")}
        volumes["/var/lib/reco/numba"] = self.volume("numba") # each would compile the same for a minute
        env = {k: str(v) for k, v in service["environment"].items()}
        mine = [m.target for m in mounts(service) if m.source == "./settings.ini"] # the other files of this checkout are in the image
        if "RECO_STREAM_BUS" in env: env["RECO_STREAM_BUS"] = self.bus
        return {"env": env, "volumes": volumes, "memory": tuple(tmpfs(service)), "hosts": self.root / "hosts",
                "read_only": {target: self.root / "settings.ini" for target in mine}}

    def volume(self, name: str) -> Path:
        path = self.root / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def image(self, name: str) -> Image: return self.images[self.services[name]["image"].split("/")[1].split(":")[0]]

    def up(self, name: str) -> Program:
        """Start a service and wait for its health check, as `depends_on` does."""
        service = self.services[name]
        self.running[name] = made = started(self.image(name), self.root / f"{name}.log", words(service["command"]) if "command" in service else None, **self.told(name))
        until = time.monotonic() + 150
        while not self.healthy(name):
            assert made.process.poll() is None, f"{name} ended: {made.said()[-3_000:]}"
            assert time.monotonic() < until, f"{name} is not healthy: {made.said()[-3_000:]}"
            time.sleep(0.5)
        return made

    def healthy(self, name: str) -> bool:
        """Its own check, in its own image."""
        test = self.services[name]["healthcheck"]["test"]
        assert test[0] == "CMD"
        code, _ = ran(self.image(name), self.root / f"{name}.health.log", test[1:], 30, **(self.told(name) | {"volumes": {}, "memory": ("/tmp",)}))
        return code == 0

    def once(self, name: str, seconds: float = 900) -> str:
        """Run a service that ends; its words."""
        code, said = ran(self.image(name), self.root / f"{name}.log", words(self.services[name]["command"]), seconds, **self.told(name))
        assert code == 0, said[-4_000:]
        return said

    @property
    def client(self) -> dict[str, str]: return {"X-API-Key": self.env["CLIENT_KEYS"]}

    @property
    def admin(self) -> dict[str, str]: return {"X-API-Key": self.env["ADMIN_KEYS"]}

    @property
    def people(self) -> dict[str, str]: return {"Authorization": "Basic " + b64encode(f"reco:{self.env['PEOPLE_PASSWORD']}".encode()).decode()}

    def lake(self) -> Lake:
        section = {"endpoint": "http://minio:9000", "access_key": self.env["S3_ACCESS_KEY"], "secret_key": self.env["S3_SECRET_KEY"], "root": "s3://reco/lake"}
        return Lake("s3://reco/lake", storage_options(LakeSection(**section)))


@contextmanager
def process(command: list[str], log: Path, **more: object) -> Iterator[subprocess.Popen]:
    """A server of this machine, ended afterwards."""
    with log.open("wb") as out: server = subprocess.Popen([str(c) for c in command], stdout=out, stderr=subprocess.STDOUT, **more)
    try: yield server
    finally:
        server.terminate()
        server.wait(30)


def answers(url: str, server: subprocess.Popen, log: Path) -> None:
    with httpx.Client(trust_env=False) as http: wait_until_it_answers(http, url, server, log)


@contextmanager
def redis_of(service: dict, root: Path) -> Iterator[None]:
    """The very command of the file."""
    (root / "redis").mkdir()
    command = [w.replace("$$", "$") for w in words(service["command"])]
    with process(command, root / "redis.log", cwd=root / "redis", env=os.environ | service["environment"]) as server:
        import redis
        with redis.Redis(password=service["environment"]["REDIS_PASSWORD"]) as client:
            for _ in range(400):
                assert server.poll() is None, (root / "redis.log").read_text()
                try:
                    client.ping()
                    break
                except redis.ConnectionError: time.sleep(0.025)
        yield


@contextmanager
def postgres_of(service: dict, root: Path) -> Iterator[None]:
    """Debian's server with the file's password; then the init scripts, as the image runs them, and a second time it is left alone."""
    folder, account, env = root / "postgres", postgres_account(), {k: str(v) for k, v in service["environment"].items()}
    folder.mkdir()
    (folder / "password").write_text(env["POSTGRES_PASSWORD"])
    if account:
        for p in (folder, folder / "password"): os.chown(p, account["user"], account["group"])
    made = subprocess.run([postgres_program("initdb"), "-D", folder / "data", "-U", "postgres", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "-E", "UTF8", "--locale=C",
                           *env["POSTGRES_INITDB_ARGS"].split()], capture_output=True, text=True, cwd=folder, **account)
    assert made.returncode == 0, made.stderr
    with process([postgres_program("postgres"), "-D", folder / "data", "-h", "127.0.0.1", "-k", folder, "-F"], root / "postgres.log", cwd=folder, **account) as server:
        wait_for_postgres(f"postgresql://postgres:{env['POSTGRES_PASSWORD']}@127.0.0.1:5432/postgres", server, root / "postgres.log")
        for mount in mounts(service):
            if not mount.target.startswith("/docker-entrypoint-initdb.d/"): continue
            text = (ROOT / mount.source).read_text()
            for other in mounts(service): text = text.replace(other.target, str(ROOT / other.source)) if other.source.startswith("./data") else text
            done = subprocess.run(["sh"], input=text, capture_output=True, text=True, env=os.environ | env | {"POSTGRES_USER": "postgres", "PGHOST": "127.0.0.1", "PGPASSWORD": env["POSTGRES_PASSWORD"]})
            assert done.returncode == 0, done.stderr
        yield


@contextmanager
def gateway_of(service: dict, root: Path) -> Iterator[None]:
    """Debian's NGINX with the file's variables and `make env`'s secrets."""
    (root / "gateway").mkdir()
    (root / "gateway").chmod(0o755)
    values = {k: str(v) for k, v in service["environment"].items() if k not in ("NGINX_CONFIG", "NGINX_SECRETS", "NGINX_ENVSUBST_FILTER")}
    main = configured(root / "gateway", values, {})
    for name in service["secrets"]: shutil.copy(root / "deploy" / "secrets" / name, root / "gateway" / "secrets" / name)
    command = [program(), "-e", root / "gateway" / "error.log", "-c", main, "-g", "daemon off;" + (" user root;" if not os.getuid() else "")]
    with process(command, root / "gateway.log") as server:
        answers("http://gateway:8080/openapi.json", server, root / "gateway" / "error.log")
        yield


@contextmanager
def watched_by(services: dict, root: Path) -> Iterator[None]:
    """Prometheus and Alertmanager with the files that are mounted, at their places."""
    folder = root / "watch"
    for mount in mounts(services["prometheus"]) + mounts(services["alertmanager"]):
        if not mount.source.startswith("./"): continue
        to = folder / mount.target.lstrip("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / mount.source).is_dir() else shutil.copy)(ROOT / mount.source, to)
    secrets = folder / "etc/prometheus/secrets"
    secrets.mkdir()
    for service in ("prometheus", "alertmanager"):
        for secret in services[service]["secrets"]: shutil.copy(root / "deploy" / "secrets" / secret["source"], secrets / Path(secret["target"]).name)
    config, alerting = folder / "etc/prometheus/prometheus.yml", folder / "etc/alertmanager/alertmanager.yml"
    config.write_text(re.sub(r"(_interval): 15s", r"\1: 1s", config.read_text()))
    alerting.write_text(alerting.read_text().replace("/etc/prometheus/secrets", str(secrets)))
    with ExitStack() as stack:
        one = stack.enter_context(process([debian_program("prometheus-alertmanager", "prometheus-alertmanager"), f"--config.file={alerting}", f"--storage.path={folder / 'a'}",
                                           "--cluster.listen-address="], root / "alertmanager.log"))
        answers("http://alertmanager:9093/-/ready", one, root / "alertmanager.log")
        two = stack.enter_context(process([debian_program("prometheus", "prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'p'}"], root / "prometheus.log"))
        answers("http://prometheus:9090/-/ready", two, root / "prometheus.log")
        yield


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    root = Path(os.environ["PLATFORM_ROOT"])
    (root / "deploy").mkdir()
    shutil.copy(ROOT / ".env.example", root)
    (root / "settings.ini").write_text(SETTINGS)
    assert make_env.main(root) == 0
    env = make_env.lines_of((root / ".env").read_text())
    services = composed(env)["services"]
    with ExitStack() as stack:
        stack.enter_context(redis_of(services["redis"], root))
        stack.enter_context(postgres_of(services["postgres"], root))
        moto = Path(os.sys.executable).with_name("moto_server")
        s3 = stack.enter_context(process([moto, "-H", "127.0.0.1", "-p", "9000"], root / "s3.log"))
        answers("http://minio:9000/moto-api/", s3, root / "s3.log")
        bus = f"kafka://{stack.enter_context(kafka_brokers())}"
        http = stack.enter_context(httpx.Client(base_url=f"http://{env['RECO_HOST']}:8080", trust_env=False, timeout=30))
        made = Platform(root, env, services, images(), bus, {}, http)
        try:
            assert not made.healthy("endpoint"), "a check that nothing can fail"
            made.up("mlflow")
            said = made.once("bootstrap")
            assert "made the bucket reco" in said and said.rstrip().endswith("ready to serve")
            for name in ("endpoint", "consumer", "app"): made.up(name)
            stack.enter_context(watched_by(services, root))
            stack.enter_context(gateway_of(services["gateway"], root))
            yield made
        finally:
            for running in made.running.values(): running.stop()


def a_shopper(platform: Platform) -> str: return platform.lake().read("interactions").collect()["user_id"][0]


def test_a_key_is_needed_and_a_list_comes(platform):
    assert platform.gateway.get("/recommendations/v1/u1").status_code == 401
    found = platform.gateway.get(f"/recommendations/v1/{a_shopper(platform)}?k=5", headers=platform.client)
    assert found.status_code == 200 and len(found.json()["recommendations"]) == 5, found.text
    assert platform.gateway.get("/v1/bundle", headers=platform.client).status_code == 403
    assert platform.gateway.get("/v1/bundle", headers=platform.admin).status_code == 200
    assert platform.gateway.get("/metrics", headers=platform.client).status_code == 404 # for those inside


def test_an_event_changes_the_next_list_and_reaches_the_lake_and_so_does_the_list(platform):
    item = platform.gateway.get(f"/recommendations/v1/{a_shopper(platform)}?k=1", headers=platform.client).json()["recommendations"][0]["item_id"]
    request, event = "platform-test-request", "platform-test-event"
    sent = {"event_id": event, "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "user_id": "somebody new", "session_id": "s1", "item_id": item, "event": "view"}
    before = platform.gateway.get("/recommendations/v1/somebody%20new?k=5", headers=platform.client).json()
    taken = platform.gateway.post("/events/v1", json=sent, headers=platform.client)
    assert taken.status_code == 202, taken.text
    after = platform.gateway.get("/recommendations/v1/somebody%20new?k=5", headers=platform.client | {"X-Request-ID": request}).json()
    assert [r["item_id"] for r in before["recommendations"]] != [r["item_id"] for r in after["recommendations"]]
    until, lake = time.monotonic() + 60, platform.lake()
    while time.monotonic() < until:
        events = lake.read("interactions").collect()
        shown = lake.read("exposures").collect() if "exposures" in lake.tables() else None
        if event in events["event_id"] and shown is not None and request in shown["request_id"]: return
        time.sleep(1)
    pytest.fail(f"not in the lake after a minute: {platform.running['consumer'].said()[-2_000:]}")


def test_people_need_a_password_and_see_app_and_mlflow(platform):
    for path in ("/app/", "/mlflow/", "/grafana/"): assert platform.gateway.get(path).status_code == 401
    page = platform.gateway.get("/app/", headers=platform.people)
    assert page.status_code == 200 and "<title>" in page.text and platform.gateway.get("/app/_stcore/health", headers=platform.people).text == "ok"
    assert platform.gateway.get("/app/" + re.search(r'src="\./([^"]+\.js)"', page.text)[1], headers=platform.people).status_code == 200
    assert "MLflow" in platform.gateway.get("/mlflow/", headers=platform.people).text
    told = platform.gateway.post("/mlflow/api/2.0/mlflow/experiments/search", json={"max_results": 10}, headers=platform.people)
    assert "reco" in {e["name"] for e in told.json()["experiments"]}, told.text
    assert platform.gateway.get("/grafana/", headers=platform.people).status_code == 503 # there is none here


def test_a_person_shops_through_the_gateway_and_looks_at_trainings(platform):
    """In Chromium: the app's pages live on a connection that stays open, below /app/; MLflow's own page asks for everything below /mlflow/."""
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists(): pytest.skip("needs chromium: make services")
    from playwright.sync_api import sync_playwright
    wrong = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(chromium), args=["--no-sandbox", "--disable-background-networking"])
        page = browser.new_page(http_credentials={"username": "reco", "password": platform.env["PEOPLE_PASSWORD"]})
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.goto(f"{platform.gateway.base_url}/app/")
        page.wait_for_selector("[class*=st-key-card-for_you-]", timeout=60_000)
        page.screenshot(path=str(platform.root / "app.png"))
        page.goto(f"{platform.gateway.base_url}/mlflow/")
        page.get_by_text("reco", exact=True).first.wait_for(timeout=60_000)
        page.screenshot(path=str(platform.root / "mlflow.png"))
        browser.close()
    print("answers that a browser did not like:", wrong)
    assert not [w for w in wrong if "/app/" in w]


def test_mlflow_keeps_runs_in_postgresql_and_artifacts_on_s3(platform):
    model = platform.gateway.get("/mlflow/api/2.0/mlflow/registered-models/get?name=reco", headers=platform.people).json()["registered_model"]
    assert [a["alias"] for a in model["aliases"]] == ["champion"]
    with psycopg.connect(f"postgresql://mlflow:{platform.env['MLFLOW_DB_PASSWORD']}@postgres:5432/mlflow") as db:
        uris = [row[0] for row in db.execute("SELECT artifact_uri FROM runs")]
    assert uris and all(uri.startswith("s3://reco/mlflow/") for uri in uris)
    import boto3
    s3 = boto3.client("s3", endpoint_url="http://minio:9000", region_name="us-east-1", aws_access_key_id=platform.env["S3_ACCESS_KEY"], aws_secret_access_key=platform.env["S3_SECRET_KEY"])
    for place in ("lake", "bundles", "metaflow", "mlflow"): assert s3.list_objects_v2(Bucket="reco", Prefix=f"{place}/")["KeyCount"], place


def test_each_role_has_its_database_and_no_other(platform):
    address = lambda role, database: f"postgresql://{role}:{platform.env[f'{role.upper()}_DB_PASSWORD']}@postgres:5432/{database}"
    with psycopg.connect(address("shop", "shop")) as db:
        found = {row[0] for row in db.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tableowner = 'shop'")}
        assert {"orders", "order_items", "items", "users"} <= found
    for role, other in (("shop", "mlflow"), ("optuna", "shop"), ("mlflow", "optuna")):
        with pytest.raises(psycopg.OperationalError, match="permission denied"): psycopg.connect(address(role, other))


def test_prometheus_reads_endpoint_and_consumer_with_its_key_and_knows_whom_to_tell(platform):
    with httpx.Client(base_url="http://prometheus:9090", trust_env=False) as http:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            up = {t["labels"]["job"]: t["health"] for t in http.get("/api/v1/targets").json()["data"]["activeTargets"]}
            if up.get("reco-endpoint") == up.get("reco-consumer") == "up": break
            time.sleep(0.5)
        assert up.pop("node") in ("down", "unknown") and up == {"reco-endpoint": "up", "reco-consumer": "up"}, up # node_exporter is not here
        told = http.get("/api/v1/alertmanagers").json()["data"]["activeAlertmanagers"]
        assert [t["url"] for t in told] == ["http://alertmanager:9093/api/v2/alerts"]
        lists = http.get("/api/v1/query", params={"query": "sum(reco_lists_total)"}).json()["data"]["result"]
        assert float(lists[0]["value"][1]) > 0


def test_a_second_start_finds_everything_there(platform):
    said = platform.once("bootstrap", 120)
    assert said.count("there already: ") == 4 and "making" not in said and "made the bucket" not in said, said


def test_what_is_not_a_volume_cannot_be_written(platform):
    write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'x').write_text('x')"
    for path, code in (("/srv/reco", 1), ("/opt/venv", 1), ("/etc", 1), ("/tmp", 0), ("/var/lib/reco", 0)):
        assert ran(platform.image("endpoint"), platform.root / "write.log", ["python", "-c", write, path], **platform.told("endpoint"))[0] == code, path


def test_the_scheduler_says_what_comes_and_ends_at_once(platform):
    running = started(platform.image("scheduler"), platform.root / "scheduler.log", words(platform.services["scheduler"]["command"]), **platform.told("scheduler"))
    until = time.monotonic() + 60
    while running.said().count("UTC: flows/") < 5 and time.monotonic() < until: time.sleep(0.2)
    assert "flows/train.py, then promote, then report" in running.said()
    began = time.monotonic()
    assert running.stop() == 0 and time.monotonic() - began < 5


def test_memory_is_told(platform):
    """For the handbook's table; nothing is asserted of a machine."""
    print("memory in MB:", {name: round(p.memory_mb()) for name, p in platform.running.items() if p.process.poll() is None})
    with urllib.request.urlopen("http://mlflow:5000/health") as answer: assert answer.status == 200


def test_sigterm_lets_every_request_end_that_was_taken(platform):
    """What waits for a connection when the door is shut is reset, at most one for each who asks, and a gateway asks again; what was taken is answered."""
    shopper, running = a_shopper(platform), platform.running["endpoint"]
    answered, cut, reset, over = [], [], [], threading.Event()

    def ask(turn: int) -> None:
        while not over.is_set():
            try:
                with httpx.Client(base_url="http://endpoint:8000", trust_env=False, timeout=20) as http:
                    answered.append(http.get(f"/recommendations/v1/{shopper}?k={turn + 5}", headers=platform.client).status_code)
            except httpx.ConnectError: over.wait(0.05)
            except (httpx.ReadError, httpx.WriteError) as e: reset.append(repr(e))
            except httpx.HTTPError as e: cut.append(repr(e))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for t in threads: t.start()
    time.sleep(2)
    began, limit = time.monotonic(), int(platform.services["endpoint"]["stop_grace_period"].removesuffix("s"))
    code = running.stop(limit)
    took = time.monotonic() - began
    over.set()
    for t in threads: t.join()
    assert code == 0 and took < limit and len(answered) > 20
    assert not cut and len(reset) <= len(threads) and set(answered) == {200}, (cut, reset, {s: answered.count(s) for s in {*answered}})
    print(f"{len(answered)} requests answered, {len(reset)} reset before they were taken, ended {took:.1f} s after SIGTERM")


def test_what_was_backed_up_comes_back(platform):
    """The handbook's commands; then everything is lost, put back, and the same bundle answers."""
    flows, password = platform.images["flows"], {"PGPASSWORD": platform.env["POSTGRES_PASSWORD"], "PGHOST": "127.0.0.1", "PGUSER": "postgres"}
    folder, told = platform.volume("backups"), platform.told("flows")
    told["volumes"] = told["volumes"] | {"/backups": folder}
    code, said = ran(flows, platform.root / "backup.log", ["python", "-m", "app.backup", "save", "/backups/one"], 120, **told)
    assert code == 0 and re.search(r"lake: \d+ files", said), said
    databases, model = ("shop", "mlflow", "optuna"), platform.gateway.get("/mlflow/api/2.0/mlflow/registered-models/get?name=reco", headers=platform.people).json()
    bundle = json.loads((folder / "one" / "backup.json").read_text())["places"]["bundles"]
    events = platform.lake().read("interactions").collect().height
    published = lambda: ran(flows, platform.root / "list.log", ["python", "-m", "app.bundle", "list"], 60, **told)[1]
    before = published()

    def ask(program: str, *args: str, **more: object) -> None:
        done = subprocess.run([postgres_program(program), *args], env=os.environ | password, capture_output=True, **more)
        assert done.returncode == 0, done.stderr

    for name in databases: ask("pg_dump", "-Fc", "-f", str(folder / f"{name}.dump"), name)
    import boto3
    import redis
    s3 = boto3.resource("s3", endpoint_url="http://minio:9000", region_name="us-east-1", aws_access_key_id=platform.env["S3_ACCESS_KEY"], aws_secret_access_key=platform.env["S3_SECRET_KEY"])
    s3.Bucket("reco").objects.delete()
    for name in databases:
        with psycopg.connect(f"postgresql://postgres:{password['PGPASSWORD']}@postgres:5432/postgres", autocommit=True) as db: # as databases.sh makes them on a new server
            for statement in (f"DROP DATABASE {name} WITH (FORCE)", f"CREATE DATABASE {name} OWNER {name}", f"REVOKE ALL ON DATABASE {name} FROM PUBLIC"): db.execute(statement)
    with redis.Redis(host="redis", password=platform.env["REDIS_PASSWORD"]) as store: store.flushall()

    code, said = ran(flows, platform.root / "backup.log", ["python", "-m", "app.backup", "restore", "/backups/one"], 120, **told)
    assert code == 0 and f"bundles: {bundle['files']}" in said, said
    for name in databases: ask("pg_restore", "--clean", "--if-exists", "-d", name, str(folder / f"{name}.dump"))
    said = platform.once("bootstrap", 300)
    assert said.count("there already: ") == 3 and "making pasts" in said, said
    assert platform.gateway.get("/mlflow/api/2.0/mlflow/registered-models/get?name=reco", headers=platform.people).json() == model
    platform.up("endpoint")
    found = platform.gateway.get(f"/recommendations/v1/{a_shopper(platform)}?k=5", headers=platform.client)
    assert found.status_code == 200 and len(found.json()["recommendations"]) == 5
    assert published() == before and f"current: {platform.gateway.get('/v1/bundle', headers=platform.admin).json()['id']}" in before
    assert platform.lake().read("interactions").collect().height >= events
