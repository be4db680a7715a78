"""The lake on S3, spoken to a real server (moto's): the same promises, several writers, and errors that help.

Set TEST_S3_ENDPOINT to the endpoint of another one (MinIO …), with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
"""

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from uuid import uuid4

import polars as pl
import pytest
from pydantic import SecretStr
from test_lake import ids, log, write

from app.ports import free_port
from reco.data.lake import Lake, open_lake, views
from reco.data.storage import LakeError, opened, parts, storage_options
from reco.data.upkeep import compact, erase, sweep, upkeep
from reco.settings import Lake as LakeSection
from reco.settings import Settings

boto3 = pytest.importorskip("boto3", reason="needs boto3: the train extra")
KEY, SECRET = os.environ.get("AWS_ACCESS_KEY_ID", "AKIATEST"), os.environ.get("AWS_SECRET_ACCESS_KEY", "hush-hush")


def start_moto(**env: str) -> tuple[subprocess.Popen, str]:
    """A server of its own and its endpoint, once it answers."""
    command = Path(sys.executable).with_name("moto_server")
    if not command.exists(): pytest.skip("needs moto_server: the dev extra")
    port = free_port()
    server = subprocess.Popen([command, "-H", "127.0.0.1", "-p", str(port)], env=os.environ | env,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(200):
        try: http.client.HTTPConnection("127.0.0.1", port, timeout=1).connect()
        except OSError: time.sleep(0.05)
        else: return server, f"http://127.0.0.1:{port}"
    server.kill()
    raise AssertionError("moto_server does not start")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    if "TEST_S3_ENDPOINT" in os.environ:
        yield os.environ["TEST_S3_ENDPOINT"]
        return
    server, at = start_moto()
    yield at
    server.terminate()
    server.wait()


def section(endpoint: str, key: str = KEY, secret: str = SECRET, root: str = "data/lake") -> LakeSection:
    return LakeSection(root=root, endpoint=endpoint, access_key=SecretStr(key), secret_key=SecretStr(secret))


def bucket(endpoint: str) -> str:
    """A new bucket's name."""
    name = f"lake-{uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
                 region_name="us-east-1").create_bucket(Bucket=name)
    return name


@pytest.fixture
def lake(endpoint: str) -> Lake:
    return open_lake(Settings(lake=section(endpoint, root=f"s3://{bucket(endpoint)}/shop/lake")))


def test_the_four_verbs(lake):
    assert lake.tables() == []
    with pytest.raises(LakeError, match=r"no table 'interactions' in s3://.*tables: none"):
        lake.read("interactions")
    first = write(lake, log(range(20)))
    assert write(lake, log(range(20))) == first == lake.snapshot("interactions")
    second = lake.write("interactions", log(range(10, 30)).lazy(), key=["event_id"], day_of="ts", around_days=1)
    assert ids(lake) == list(range(30)) and ids(lake, first) == list(range(20)) and lake.tables() == ["interactions"]
    assert lake.read("interactions").sort("ts").collect().equals(log(range(30)))
    fixed = log(range(3)).with_columns(price=pl.lit(70.5))
    third = lake.write("interactions", fixed, key=["event_id"], day_of="ts", replace=True)
    assert lake.read("interactions").filter(price=70.5).collect().height == 3 and len({first, second, third}) == 3


CROWD = """
import sys
sys.path.insert(0, sys.argv[2])
from test_lake_s3 import *
lake, me = Lake(sys.argv[1], storage_options(section(sys.argv[3]))), int(sys.argv[4])
for b in range(4):
    write(lake, log(range(b*20, b*20 + 40)))
"""


def test_several_writers_add_each_key_once(lake, endpoint):
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    crowd = [subprocess.Popen([sys.executable, "-c", CROWD, lake.root, str(here), endpoint, str(n)], env=env) for n in range(3)]
    assert [w.wait(120) for w in crowd] == [0] * 3
    assert ids(lake) == list(range(100))


def test_a_commit_is_a_conditional_put(endpoint):
    """Seen on the wire, and honoured by the server: a number in the log is given once."""
    seen, target = [], urlsplit(endpoint).netloc

    class Forward(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.command, self.path, self.headers.get("If-None-Match")))
            link = http.client.HTTPConnection(target)
            link.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != "host"} | {"Host": target})
            answer = link.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if self.command != "HEAD" else answer.getheader("Content-Length", 0)))
            self.end_headers()
            if self.command != "HEAD": self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on
        log_message = lambda *_: None

    between = ThreadingHTTPServer(("127.0.0.1", 0), Forward)
    Thread(target=between.serve_forever, daemon=True).start()
    try:
        name = bucket(endpoint)
        lake = Lake(f"s3://{name}/lake", storage_options(section(f"http://127.0.0.1:{between.server_port}")))
        for n in range(2): write(lake, log(range(n + 1)))
    finally:
        between.shutdown()
        between.server_close()
    commits = [(path, condition) for verb, path, condition in seen if verb == "PUT" and path.partition("?")[0].endswith(".json")]
    assert len(commits) == 2 and all(condition == "*" for _, condition in commits)
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")
    with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=name, Key="lake/interactions/_delta_log/00000000000000000001.json", Body=b"{}", IfNoneMatch="*")


def refusal(lake: Lake, act) -> str:
    """The message of a `LakeError` that comes soon and has no key in it."""
    began = time.monotonic()
    with pytest.raises(LakeError) as caught: act(lake)
    assert time.monotonic() - began < 20
    chain = f"{caught.value!r} {caught.value.__cause__!r}"
    assert KEY not in chain and SECRET not in chain and caught.value.__suppress_context__
    return str(caught.value)


ACTS = [lambda lake: lake.tables(), lambda lake: lake.read("interactions"), lambda lake: write(lake, log(range(3)))]


@pytest.mark.parametrize("act", ACTS, ids=["tables", "read", "write"])
def test_what_is_wrong_is_said_soon(endpoint, act):
    nobody = Lake("s3://some-bucket/lake", storage_options(section(f"http://127.0.0.1:{free_port()}")))
    assert "s3://some-bucket/lake at 127.0.0.1:" in (said := refusal(nobody, act)) and "cannot be reached" in said
    nowhere = Lake(f"s3://no-{uuid4().hex}/lake", storage_options(section(endpoint)))
    assert "no such bucket" in refusal(nowhere, act)


def test_wrong_keys_are_refused():
    server, at = start_moto(INITIAL_NO_AUTH_ACTION_COUNT="1")
    try:
        lake = Lake(f"s3://{bucket(at)}/lake", storage_options(section(at)))
        for act in ACTS: assert "the keys are refused" in refusal(lake, act)
    finally:
        server.terminate()
        server.wait()


def test_empty_keys_take_those_of_the_environment(lake, endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    options = storage_options(LakeSection(endpoint=endpoint))
    assert not {"aws_access_key_id", "aws_secret_access_key"} & {*options}
    write(Lake(lake.root, options), log(range(5)))
    assert ids(Lake(lake.root, options)) == list(range(5))


def test_upkeep_and_erasure(lake):
    for n in range(0, 30, 10): write(lake, log(range(n, n + 10)))
    first = f"0-{lake.snapshot('interactions').partition('-')[2]}"
    assert compact(lake, "interactions") > 0 and compact(lake, "interactions") == 0
    assert erase(lake, ["u1"], datetime.now(UTC))["rows"].to_list() == [10]
    assert not lake.read("interactions").filter(user_id="u1").collect().height and len(ids(lake)) == 20
    for name in lake.files.get_file_info(_all()):
        if name.base_name.endswith(".parquet") and "_delta_log" not in name.path:
            with lake.files.open_input_file(name.path) as f:
                frame = pl.read_parquet(f.read())
                assert "user_id" not in frame.columns or "u1" not in frame["user_id"]
    with pytest.raises(LakeError, match="was removed by retention or by an erasure"):
        lake.read("interactions", first)
    assert sweep(lake, "interactions", timedelta(0), datetime.now(UTC) + timedelta(days=9)) > 0
    done = upkeep(lake, LakeSection(), datetime.now(UTC))
    assert set(done["table"]) == {"interactions", "erased"} and len(ids(lake)) == 20
    assert done.filter(table="interactions")["files_after"].item() == parts(opened(lake, "interactions")).height


def _all():
    from pyarrow.fs import FileSelector

    return FileSelector("", recursive=True)


def test_duckdb_reads_it_in_place(lake):
    import duckdb

    write(lake, log(range(30)))
    with duckdb.connect() as db:
        views(lake, db)
        assert db.sql("SELECT count(*) FROM interactions WHERE event = 'view'").fetchall() == [(6,)]
