"""Every flow as the objects that Argo Workflows and Argo Events take, without a cluster: `python flows/argo.py`, or `make argo`.

Metaflow packs flows/, the package `reco` and the settings without secrets, and uploads that to S3, from where the pods fetch it: so S3 has to be reachable,
at METAFLOW_DATASTORE_SYSROOT_S3 and METAFLOW_S3_ENDPOINT_URL, else at `[runs] datastore`, else beside a lake that is on S3. A cluster is not asked for, and none is changed:
`argo-workflows create --only-json` would print the WorkflowTemplate alone, so `create` talks to a stand-in for a cluster's API here, that writes down what
a cluster would be told: WorkflowTemplate, CronWorkflow and Sensor. deploy/argo/README.md says how they get there.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from reco.data.objects import ObjectError, Objects, reached
from reco.settings import Settings, SettingsError, load_settings

HERE = Path(__file__).resolve().parent
OUT = HERE.parent/"deploy"/"argo"/"compiled"


def flow_files() -> dict[str, Path]:
    """The flows of this folder by name."""
    return {p.stem: p for p in sorted(HERE.glob("*.py")) if re.search(r"^class \w+\(FlowSpec\)", p.read_text("utf-8"), re.MULTILINE)}


# Where the code goes ------------------------------------------------------------------------------------------------


def datastore(settings: Settings) -> dict[str, str]:
    """Metaflow's S3 and its keys, as environment variables: what is set already, else `[runs] datastore`, else the lake's bucket; ends the run without any."""
    lake, given = settings.lake, os.environ.get("METAFLOW_DATASTORE_SYSROOT_S3", "")
    beside = f"s3://{urlsplit(lake.root).netloc}/metaflow" if lake.root.startswith("s3://") else ""
    if not (root := given or settings.runs.datastore or beside):
        sys.exit("argo: flows on a cluster keep their code and artifacts on S3: set [runs] datastore = s3://bucket/metaflow (with the endpoint and keys of "
                 "[lake]), or METAFLOW_DATASTORE_SYSROOT_S3 (with METAFLOW_S3_ENDPOINT_URL, if it is not AWS), or put the lake on S3")
    own = {"METAFLOW_DATASTORE_SYSROOT_S3": root, "METAFLOW_DATATOOLS_S3ROOT": f"{root}/data", "METAFLOW_CARD_S3ROOT": f"{root}/mf.cards",
           "AWS_ACCESS_KEY_ID": lake.access_key.get_secret_value(), "AWS_SECRET_ACCESS_KEY": lake.secret_key.get_secret_value(),
           "AWS_DEFAULT_REGION": lake.region} | ({} if given else {"METAFLOW_S3_ENDPOINT_URL": lake.endpoint})
    return {k: os.environ.get(k) or v for k, v in own.items() if os.environ.get(k) or v}


def check_reachable(env: dict[str, str], settings: Settings) -> None:
    """Ask S3 for the bucket; ends the run with the reason where it does not answer. Metaflow itself would wait for many minutes."""
    at = {"endpoint": env.get("METAFLOW_S3_ENDPOINT_URL", os.environ.get("METAFLOW_S3_ENDPOINT_URL", "")), "region": env.get("AWS_DEFAULT_REGION", "")}
    keys = {k: v for k, v in (("access_key", env.get("AWS_ACCESS_KEY_ID")), ("secret_key", env.get("AWS_SECRET_ACCESS_KEY"))) if v}
    try:
        objects = Objects(env["METAFLOW_DATASTORE_SYSROOT_S3"], type(settings.lake)(**(settings.lake.model_dump() | at | keys)))
        with reached(objects) as s3: s3.head_bucket(Bucket=objects.bucket)
    except ObjectError as e: sys.exit(f"argo: the code of the flows cannot be uploaded: {e}")


# What a cluster would be told ---------------------------------------------------------------------------------------


class Cluster(ThreadingHTTPServer):
    """As much of a Kubernetes API as `create` talks to, on a loopback port: nothing is there, and what comes is kept in `told`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.told: list[dict] = []


class Request(BaseHTTPRequestHandler):
    server: Cluster

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None: self.answer(404, {"kind": "Status", "status": "Failure", "message": "not found", "code": 404})

    do_DELETE = do_GET

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.told.append(without_nulls(body))
        self.answer(201, body)

    def log_message(self, *_: object) -> None: pass


def without_nulls(value: Any) -> Any:
    """JSON without the keys that say nothing, which Metaflow sends by the dozen."""
    if isinstance(value, dict): return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[Cluster, Path]]:
    """A stand-in for a cluster, and the kubeconfig that leads to it."""
    server = Cluster()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    here = {"apiVersion": "v1", "kind": "Config", "current-context": "here", "users": [{"name": "here", "user": {}}],
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "here"}}]}
    try:
        (folder/"kubeconfig").write_text(json.dumps(here))
        yield server, folder/"kubeconfig"
    finally:
        server.shutdown()
        server.server_close()


# One flow -----------------------------------------------------------------------------------------------------------


def events_env(settings: Settings) -> dict[str, str]:
    """Names of deploy/argo/events.yaml as Metaflow reads them, and the spelling of schedules since Argo Workflows 3.6: 4 knows no other."""
    space = settings.kubernetes.namespace
    return {"METAFLOW_ARGO_WORKFLOWS_USE_SCHEDULES": "true", "METAFLOW_ARGO_EVENTS_EVENT": "metaflow", "METAFLOW_ARGO_EVENTS_EVENT_SOURCE": "metaflow", "METAFLOW_ARGO_EVENTS_EVENT_BUS": "default",
            "METAFLOW_ARGO_EVENTS_SERVICE_ACCOUNT": "reco-events", "METAFLOW_ARGO_EVENTS_SENSOR_NAMESPACE": space,
            "METAFLOW_ARGO_EVENTS_WEBHOOK_URL": f"http://metaflow-eventsource-svc.{space}:12000/metaflow"}


def command(path: Path, settings: Settings) -> list[str]:
    """`create` of a flow, whose steps are tried again and do not run for ever."""
    k = settings.kubernetes
    return [sys.executable, str(path), "--no-pylint", "--datastore=s3", "--production",
            f"--with=retry:times={k.retries},minutes_between_retries={k.retry_minutes}", f"--with=timeout:hours={k.timeout_hours}", "argo-workflows", "create"]


def compiled(path: Path, settings: Settings, env: dict[str, str], timeout_s: float) -> list[dict]:
    """What a cluster would be told of a flow; raises `RuntimeError` with Metaflow's own words."""
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as (server, config):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("KUBERNETES_") and k != "METAFLOW_KUBERNETES_CONTEXT"}
        own = {"KUBECONFIG": str(config), "METAFLOW_TOKEN_HOME": folder, "METAFLOW_USER": "reco", "USER": "reco", "NO_PROXY": "127.0.0.1"}
        try: done = subprocess.run(command(path, settings), env=events_env(settings) | kept | env | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired: raise RuntimeError(f"{path.name}: not compiled within {timeout_s:g} s ([--timeout]); is S3 slow?") from None
        if done.returncode: raise RuntimeError(f"{path.name}: {done.stdout.strip()}")
        return server.told


# All of them --------------------------------------------------------------------------------------------------------


def forgetful(settings: Settings) -> list[str]:
    """Settings that name a folder, which ends with its pod: a sentence each."""
    s, secret = settings, "unless a Secret of [kubernetes] secrets has"
    empty = lambda section, key: not getattr(getattr(s, section), key).get_secret_value()
    here = {"[lake] root": s.lake.root, "[bundles] root": s.bundles.root} | ({"[tracking] artifacts": s.tracking.artifacts} if s.tracking.enabled else {})
    said = [f"{key} is {value}, which a pod cannot share with the next" for key, value in here.items() if value and not value.startswith("s3://")]
    if empty("online", "url"): said.append(f"[online] url is empty: an embedded Redis ends with its pod, {secret} RECO_ONLINE_URL")
    if empty("search", "storage"): said.append(f"[search] storage is empty: flows/search.py ends at once, for its workers share no file, {secret} RECO_SEARCH_STORAGE")
    if s.tracking.enabled and empty("tracking", "uri"):
        said.append(f"[tracking] uri is empty: what is logged to the SQLite file in {s.tracking.folder} ends with its pod, {secret} RECO_TRACKING_URI")
    if s.data.source != "postgres": said.append(f"[data] path is {s.data.path}: flows/ingest.py finds there what the image has, or a volume")
    if s.monitor.textfile: said.append(f"[monitor] textfile is {s.monitor.textfile}, which no collector of the node sees")
    named = {"[rules] file": s.rules.file, "[experiments] file": s.experiments.file}
    return said + [f"{key} is {value}: what is not beside settings.ini does not go along" for key, value in named.items() if Path(value).is_absolute()]


def write(out: Path, name: str, objects: list[dict]) -> Path:
    """One file per flow, as `kubectl apply -f` takes it."""
    out.mkdir(parents=True, exist_ok=True)
    path = out/f"{name}.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=1, sort_keys=True) + "\n")
    return path


def main() -> None:
    """Compile the flows that are named, or all."""
    flows = flow_files()
    parse = argparse.ArgumentParser(prog="python flows/argo.py", description="Flows as objects of Argo Workflows and Argo Events, as files.")
    parse.add_argument("flow", nargs="*", choices=[[], *flows], help="all, if none is named")
    parse.add_argument("--out", type=Path, default=OUT, help="folder of the files")
    parse.add_argument("--timeout", type=float, default=300, help="seconds for each flow")
    asked = parse.parse_args()
    try: settings = load_settings()
    except SettingsError as e: sys.exit(f"settings: {e}")
    env = datastore(settings)
    check_reachable(env, settings)
    for line in forgetful(settings): print(f"warning: {line}", file=sys.stderr)
    names = asked.flow or list(flows)
    with ThreadPoolExecutor(2) as pool: done = [pool.submit(compiled, flows[n], settings, env, asked.timeout) for n in names]
    failed = [str(error) for job in done if (error := job.exception())]
    for name, job in zip(names, done, strict=True):
        if job.exception(): continue
        objects = job.result()
        print(f"{write(asked.out, name, objects)}: {', '.join(o['kind'] for o in objects)}")
    if failed: sys.exit("\n".join(["argo: not compiled:", *failed]))


if __name__ == "__main__": main()
