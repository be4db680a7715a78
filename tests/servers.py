"""Real servers for tests, each on a free loopback port with a folder of its own that is removed afterwards."""

import ctypes
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import confluent_kafka
import httpx
import psycopg
import pytest
import redis
from psycopg import sql

from app.ports import free_port

# PostgreSQL ---------------------------------------------------------------------------------------------------------


def postgres_program(name: str) -> Path:
    """One of the server's programs, the newest version's; skips the test without it. Debian keeps them out of $PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: int(p.parts[-3].split(".")[0]))
    path = found[-1] if found else shutil.which(name)
    if not path: pytest.skip("needs postgresql: make services")
    return Path(path)


def postgres_account() -> dict[str, str | int | list[int]]:
    """The server refuses to run as root: then it runs as the package's own account, else as whoever runs the tests."""
    if os.getuid(): return {}
    try: account = pwd.getpwnam("postgres")
    except KeyError: account = pwd.getpwnam("nobody")
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server for as long as the block runs: `TEST_POSTGRES_URL`, or one that is started here."""
    if url := os.environ.get("TEST_POSTGRES_URL"):
        yield url
        return
    initdb, program, account = postgres_program("initdb"), postgres_program("postgres"), postgres_account()
    folder, password = Path(tempfile.mkdtemp(prefix="postgres")), secrets.token_hex(8) # not tmp_path: root's is closed to others
    server = None
    try:
        (folder / "password").write_text(password)
        if account:
            for p in (folder, folder / "password"): os.chown(p, account["user"], account["group"])
        run = {"cwd": folder, "stdout": (folder / "log").open("wb"), "stderr": subprocess.STDOUT, **account}
        made = subprocess.run([initdb, "-D", folder / "data", "-U", "test", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}",
                               "-E", "UTF8", "--locale=C", "--no-sync"], **run)
        assert made.returncode == 0, (folder / "log").read_text()
        port = free_port()
        server = subprocess.Popen([program, "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"], **run)
        url = f"postgresql://test:{password}@127.0.0.1:{port}/postgres"
        wait_for_postgres(url, server, folder / "log")
        yield url
    finally:
        if server:
            server.send_signal(signal.SIGINT) # a fast shutdown: sessions are cut off
            server.wait(20)
        shutil.rmtree(folder)


def wait_for_postgres(url: str, server: subprocess.Popen, log: Path) -> None:
    """Until it answers; fails with what it printed when it ended instead."""
    for _ in range(300):
        assert server.poll() is None, log.read_text()
        try: return psycopg.connect(url, connect_timeout=5).close()
        except psycopg.OperationalError: time.sleep(0.05)
    raise TimeoutError("PostgreSQL does not answer")


@contextmanager
def database(server: str) -> Iterator[str]:
    """The address of a new, empty database on a server, dropped afterwards."""
    name = f"test_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as conn: conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try: yield urlsplit(server)._replace(path=f"/{name}").geturl()
    finally:
        with psycopg.connect(server, autocommit=True) as conn:
            conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


# Redis --------------------------------------------------------------------------------------------------------------


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The address of a Redis for as long as the block runs: `TEST_REDIS_URL`, or one of Debian's with a password, data in `folder`."""
    if url := os.environ.get("TEST_REDIS_URL"):
        yield url
        return
    program = shutil.which("redis-server")
    if not program: pytest.skip("needs redis-server: make services")
    folder.mkdir(parents=True, exist_ok=True)
    port, password = free_port(), secrets.token_hex(8)
    server = subprocess.Popen([program, "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password, "--dir", str(folder),
                               "--save", "", "--appendonly", "yes"], stdout=(folder / "log").open("wb"), stderr=subprocess.STDOUT)
    try:
        with redis.Redis(port=port, password=password) as client: wait_for_redis(client, server, folder / "log")
        yield f"redis://:{password}@127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(20)


def wait_for_redis(client: redis.Redis, server: subprocess.Popen, log: Path) -> None:
    """Until it answers; fails with what it printed when it ended instead."""
    for _ in range(400):
        assert server.poll() is None, log.read_text()
        try: return client.ping()
        except redis.ConnectionError: time.sleep(0.025)
    raise TimeoutError("Redis does not answer")


# Kafka --------------------------------------------------------------------------------------------------------------


@contextmanager
def kafka_brokers() -> Iterator[str]:
    """`host:port,…` of Kafka for as long as the block runs: `TEST_KAFKA`, or librdkafka's own cluster in this process's memory.

    The cluster speaks Kafka's protocol on a loopback port, to other processes too. It is made through librdkafka itself and
    not by `test.mock.num.brokers`, because only so a group's first member can be spared a wait of three seconds.
    """
    if given := os.environ.get("TEST_KAFKA"):
        yield given
        return
    folder = Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs"
    found = sorted(folder.glob("librdkafka*.so*"))
    if not found: pytest.skip("needs confluent-kafka's wheel for Linux, or brokers in TEST_KAFKA")
    lib, pointer = ctypes.CDLL(str(found[0])), ctypes.c_void_p
    for name, result, takes in (("rd_kafka_conf_new", pointer, []), ("rd_kafka_mock_cluster_new", pointer, [pointer, ctypes.c_int]),
                                ("rd_kafka_new", pointer, [ctypes.c_int, pointer, ctypes.c_char_p, ctypes.c_size_t]),
                                ("rd_kafka_mock_cluster_bootstraps", ctypes.c_char_p, [pointer]), ("rd_kafka_destroy", None, [pointer]),
                                ("rd_kafka_mock_group_initial_rebalance_delay_ms", None, [pointer, ctypes.c_int32]),
                                ("rd_kafka_conf_set_log_cb", None, [pointer, pointer]),
                                ("rd_kafka_mock_cluster_destroy", None, [pointer])):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, takes
    conf = lib.rd_kafka_conf_new()
    lib.rd_kafka_conf_set_log_cb(conf, None)
    owner = lib.rd_kafka_new(0, conf, None, 0)
    cluster = lib.rd_kafka_mock_cluster_new(owner, 1)
    try:
        lib.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, 0)
        yield lib.rd_kafka_mock_cluster_bootstraps(cluster).decode()
    finally:
        lib.rd_kafka_mock_cluster_destroy(cluster)
        lib.rd_kafka_destroy(owner)


# Prometheus ---------------------------------------------------------------------------------------------------------

DEPLOYED = Path(__file__).parents[1] / "deploy" / "prometheus"


def debian_program(name: str, package: str) -> str:
    """A program's path; skips the test without it."""
    return shutil.which(name) or pytest.skip(f"needs {package}: make services")


class Prometheus:
    """A running one, over HTTP."""

    def __init__(self, http: httpx.Client): self.http = http

    def asked(self, path: str, **what: str) -> dict:
        """What its API says; raises for a query that it does not understand."""
        answer = self.http.get(f"/api/v1/{path}", params=what).json()
        assert answer["status"] == "success", (what, answer)
        return answer["data"]

    def query(self, expr: str) -> list[tuple[dict, float]]:
        """Labels and value of what an expression gives now, NaN left out."""
        found = [(r["metric"], float(r["value"][1])) for r in self.asked("query", query=expr)["result"]]
        return [(labels, value) for labels, value in found if value == value]

    def until(self, expr: str, wanted, seconds: float = 30) -> list[tuple[dict, float]]:
        """The first answer that is wanted; fails with the last one."""
        end, found = time.monotonic() + seconds, []
        while time.monotonic() < end:
            if wanted(found := self.query(expr)): return found
            time.sleep(0.3)
        pytest.fail(f"{expr} is {found} after {seconds} s; targets: {self.asked('targets')['activeTargets']}")


@contextmanager
def prometheus(folder: Path, key: str = "", **ports: int) -> Iterator[Prometheus]:
    """Debian's Prometheus with the configuration of `deploy/` and other targets (endpoint, consumer, node), looking every second."""
    program, port = debian_program("prometheus", "prometheus"), free_port()
    shutil.copytree(DEPLOYED, folder / "prometheus")
    config = folder / "prometheus" / "prometheus.yml"
    config.write_text(re.sub(r"(_interval): 15s", r"\1: 1s", config.read_text()))
    for target in (folder / "prometheus" / "targets").iterdir():
        target.write_text(f'- targets: ["127.0.0.1:{ports[target.stem]}"]' if target.stem in ports else "[]")
    (folder / "prometheus" / "secrets" / "reco_key").write_text(key and f"{key}\n")  # as an editor leaves it
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"],
                                  stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            wait_until_it_answers(http, "/-/ready", server, folder / "log")
            yield Prometheus(http)
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def alertmanager(folder: Path, url: str) -> Iterator[httpx.Client]:
    """Debian's Alertmanager with the configuration of `deploy/`; tells `url` + /page and /tell, at once."""
    program, port = debian_program("prometheus-alertmanager", "prometheus-alertmanager"), free_port()
    config = re.sub(r"group_wait: \d+s", "group_wait: 0s", (DEPLOYED / "alertmanager.yml").read_text()).replace("/etc/prometheus/secrets", str(folder))
    (folder / "alertmanager.yml").write_text(config)
    for name in ("page", "tell"): (folder / f"{name}_url").write_text(f"{url}/{name}\n")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([program, f"--config.file={folder / 'alertmanager.yml'}", f"--storage.path={folder / 'data'}",
                                   f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="], stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            wait_until_it_answers(http, "/-/ready", server, folder / "log")
            yield http
    finally:
        server.terminate()
        server.wait(20)


def wait_until_it_answers(http: httpx.Client, path: str, server: subprocess.Popen, log: Path) -> None:
    """Until a page is there; fails with what the server printed when it ended instead."""
    for _ in range(400):
        assert server.poll() is None, log.read_text()
        try: answer = http.get(path)
        except httpx.TransportError: answer = None
        if answer is not None and answer.status_code == 200: return
        time.sleep(0.05)
    raise TimeoutError(f"{path} does not answer: {log.read_text()[-2_000:]}")
