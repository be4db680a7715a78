"""Flows on Argo Workflows: what a cluster would be told is checked against Argo's own types, the package is what the pods need and no more,
and the manifests beside it name the same things. S3 is a real server (moto's); the cluster's API is the stand-in of flows/argo.py.
"""

import ast
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_lake_s3 import boto3, bucket, start_moto

from app.ports import free_port
from reco.settings import load_settings

events_models = pytest.importorskip("hera.events.models", reason="needs hera: the dev extra")
models = pytest.importorskip("hera.workflows.models")
kubernetes = pytest.importorskip("kubernetes.client", reason="needs kubernetes: the train extra")
ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy" / "argo"
KEY, SECRET, HOOK = "AKIATEST", "hush-hush", "https://hooks.example.org/services/T0/B0/hush"
INI = """
[lake]
root = s3://{bucket}/lake
endpoint = {endpoint}
access_key = {KEY}
secret_key = {SECRET}
[quality]
volume_fall = 0.25 error
[candidates]
als = 12
mine = lab.sources:Mine 7
[rules]
file = rules.toml
[search]
space = als
  ranking
[schedule]
search = 0 3  * * 6
[kubernetes]
image = registry.example.org/reco-flows:7
secrets = reco-flows,more
million_events = 2.5
retries = 3
timeout_hours = 6
[alerts]
webhook = {HOOK}
"""


def flow_files() -> dict[str, ast.Module]:
    trees = {p.stem: ast.parse(p.read_text()) for p in sorted((ROOT / "flows").glob("*.py"))}
    return {n: t for n, t in trees.items() if flow_class(t)}


def flow_class(tree: ast.Module) -> ast.ClassDef | None:
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and "FlowSpec" in map(ast.unparse, n.bases)), None)


def steps_of(tree: ast.Module) -> dict[str, list[str]]:
    """Steps of a flow and their decorators, read from its text."""
    found = {f.name: [ast.unparse(d) for d in f.decorator_list] for f in flow_class(tree).body if isinstance(f, ast.FunctionDef)}
    return {name: marks for name, marks in found.items() if "step" in marks}


FLOWS = flow_files()


def environment(settings: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RECO_", "METAFLOW_", "AWS_", "KUBE"))}
    return kept | {"RECO_SETTINGS": str(settings), "OMP_NUM_THREADS": "1"} | more


def argo(settings: Path, *args: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "flows/argo.py", *args], cwd=ROOT, env=environment(settings, **more), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500, check=False)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server, at = start_moto()
    yield at
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def made(endpoint, tmp_path_factory) -> SimpleNamespace:
    """All flows compiled: the objects by flow and kind, the text, the settings."""
    folder = tmp_path_factory.mktemp("argo")
    (folder / "settings.ini").write_text(INI.format(bucket=bucket(endpoint), endpoint=endpoint, KEY=KEY, SECRET=SECRET, HOOK=HOOK))
    (folder / "rules.toml").write_text("[[ban]]\nitems = ['i1']\n")
    done = argo(folder / "settings.ini", "--out", str(folder / "out"))
    assert done.returncode == 0, done.stdout
    lists = {p.stem: json.loads(p.read_text()) for p in (folder / "out").iterdir()}
    return SimpleNamespace(settings=folder / "settings.ini", said=done.stdout, text="".join(p.read_text() for p in (folder / "out").iterdir()),
                           objects={n: {o["kind"]: o for o in found["items"]} for n, found in lists.items()})


def tasks(template: dict) -> dict[str, dict]:
    """The templates of the steps, by name."""
    return {t["name"]: t for t in template["spec"]["templates"] if "container" in t and "hook" not in t["name"]}


def lost(given: object, read: object, at: str = "") -> list[str]:
    """Paths of what a model did not take, or took for something else."""
    if isinstance(given, dict):
        inner = [lost(v, read[k], f"{at}.{k}") if k in read else [f"{at}.{k}"] * (v not in ({}, [])) for k, v in given.items()]
        return sum(inner, [])
    if isinstance(given, list): return sum((lost(a, b, at) for a, b in zip(given, read, strict=True)), [])
    return [] if str(given) == str(read) else [at]


def taken(model: type, given: dict) -> list[str]:
    return lost(given, json.loads(model.model_validate(given).model_dump_json(by_alias=True, exclude_none=True)))


# hera's Sensor is made from an OpenAPI that has the spec alone, and a trigger's resource as bytes; the resource is held to its own type below
GAPS = {".apiVersion", ".kind", ".spec.template.container.name"}


def test_what_a_cluster_is_told_is_of_argos_types(made):
    counted = {"WorkflowTemplate": 0, "CronWorkflow": 0, "Sensor": 0}
    for found in made.objects.values():
        for kind, given in found.items():
            counted[kind] += 1
            if kind != "Sensor": assert taken(getattr(models, kind), given) == []
            else:
                inner = given["spec"]["triggers"][0]["template"]["k8s"]["source"]["resource"]
                outside = [p for p in taken(events_models.Sensor, given) if not p.startswith(".spec.triggers.template.k8s.source.resource")]
                assert set(outside) <= GAPS and taken(models.Workflow, inner) == []
    assert counted["WorkflowTemplate"] == len(FLOWS) >= 7 and counted["CronWorkflow"] >= 4 and counted["Sensor"] >= 3
    spoilt = json.loads(json.dumps(made.objects["upkeep"]["WorkflowTemplate"]))
    spoilt["spec"]["templates"][0]["dagg"] = spoilt["spec"]["templates"][0].pop("dag")
    assert taken(models.WorkflowTemplate, spoilt) == [".spec.templates.dagg"], "the check sees a key that Argo does not know"


def test_each_step_is_there_with_what_it_needs(made):
    needs = subprocess.run([sys.executable, "-c", "import json; from resources import need; import sys; "
                            "print(json.dumps({f'{f} {s}': need(f, s).asked(2.5) for f, s in json.loads(sys.argv[1])}))",
                            json.dumps([(flow_class(t).name, s) for t in FLOWS.values() for s in steps_of(t)])],
                           cwd=ROOT / "flows", capture_output=True, text=True, check=True).stdout
    asked = json.loads(needs)
    for name, tree in FLOWS.items():
        found = tasks(made.objects[name]["WorkflowTemplate"])
        assert {n.replace("-", "_") for n in found} == set(steps_of(tree)), name
        for step, marks in steps_of(tree).items():
            task, want = found[step.replace("_", "-")], asked[f"{flow_class(tree).name} {step}"]
            got = task["container"]["resources"]["requests"]
            assert {k: float(v.rstrip("M")) for k, v in got.items()} == {
                "cpu": float(want["cpu"]), "memory": float(want["memory"]), "ephemeral-storage": float(want["disk"])}, (name, step)
            assert task["container"]["image"] == "registry.example.org/reco-flows:7" and task["serviceAccountName"] == "reco-flows"
            assert [s["secretRef"]["name"] for s in task["container"]["envFrom"]] == ["reco-flows", "more"]
            assert task["activeDeadlineSeconds"] == 6 * 3600
            once = any(m.startswith("retry(times=0") for m in marks)
            assert task.get("retryStrategy", {}).get("limit", 0) == (0 if once else 3), (name, step)
    assert {s for n, s in (("promote", "end"), ("ingest", "end")) if "retry(times=0)" in steps_of(FLOWS[n])[s]} == {"end"}


def test_memory_grows_with_the_shop():
    code = "from resources import NEEDS, need; a, b = (need('TrainFlow', 'start').asked(m) for m in (1, 10)); " \
           "assert float(b['memory']) > float(a['memory']) >= 512; assert all(int(n.asked(1)['memory']) >= 512 and n.asked(1)['disk'] for r in " \
           "NEEDS.values() for n in r.values()); assert need('Unknown', 'x').asked(1)['memory'] == '512'; print(','.join(NEEDS))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "flows", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {flow_class(t).name for t in FLOWS.values()} <= set(done.stdout.strip().split(",")), "a flow without a row"


def test_schedules_and_triggers_make_the_chain(made):
    crons = {n: o["CronWorkflow"]["spec"] for n, o in made.objects.items() if "CronWorkflow" in o}
    settings = load_settings(made.settings, {})
    assert {n: c["schedules"] for n, c in crons.items()} == {
        n: [line] for n in FLOWS if (line := getattr(settings.schedule, n, ""))} # each schedule of the settings is there
    assert crons["search"]["schedules"] == ["0 3 * * 6"] and all(c["timezone"] == "UTC" and not c["suspend"] for c in crons.values())
    heard = {}
    for name, found in made.objects.items():
        if "Sensor" not in found: continue
        (dependency,) = found["Sensor"]["spec"]["dependencies"]
        filters = {f["fields"][0]["path"]: f["expr"] for f in dependency["filters"]["exprs"]}
        heard[name] = re.search(r"'(.*)'", filters["body.payload.name"])[1]
        started = found["Sensor"]["spec"]["triggers"][0]["template"]["k8s"]["source"]["resource"]["spec"]["workflowTemplateRef"]["name"]
        assert started == found["WorkflowTemplate"]["metadata"]["name"] == f"reco.prod.{flow_class(FLOWS[name]).name.lower()}"
    assert {n: heard[n] for n in ("materialize", "promote", "batch")} == {
        "materialize": "metaflow.reco.prod.IngestFlow.end", "promote": "metaflow.reco.prod.TrainFlow.end", "batch": "metaflow.reco.prod.PromoteFlow.end"}
    assert heard["train"] == "mfns.reco.prod.retrain_asked"
    assert all(heard[n] in (f"metaflow.reco.prod.{flow_class(t).name}.end" for t in FLOWS.values()) for n in heard if n != "train")


def test_no_secret_and_no_name_of_this_machine_is_in_it(made):
    for word in (KEY, SECRET, HOOK, str(ROOT), str(Path.home()), str(made.settings.parent)): assert word not in made.text, word
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", made.text)
    for found in made.objects.values():
        for task in tasks(found["WorkflowTemplate"]).values():
            names = {e["name"] for e in task["container"]["env"]}
            assert {"METAFLOW_DATASTORE_SYSROOT_S3", "METAFLOW_S3_ENDPOINT_URL", "GIT_SHA", "METAFLOW_SKIP_INSTALL_DEPENDENCIES"} <= names
            assert not [n for n in names if re.search("SECRET_|PASSWORD|ACCESS_KEY|SESSION_TOKEN", n)]


# The code package ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(made, endpoint) -> dict[str, bytes]:
    """The files that a pod of upkeep fetches, by path."""
    (start,) = (t for t in made.objects["upkeep"]["WorkflowTemplate"]["spec"]["templates"] if t["name"] == "start")
    url = next(e["value"] for e in start["container"]["env"] if e["name"] == "METAFLOW_CODE_URL")
    where, _, key = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")
    with tarfile.open(fileobj=io.BytesIO(client.get_object(Bucket=where, Key=key)["Body"].read())) as tar:
        files = [m for m in tar.getmembers() if m.isfile()]
        found = [(m.name, tar.extractfile(m).read()) for m in files]
    assert len(dict(found)) == len(set(found)), "one name, one text"
    return dict(found)


def test_the_package_is_flows_reco_and_settings(package):
    own = {n for n in package if not n.startswith((".mf_code/metaflow/", ".mf_code/metaflow_extensions/", ".mf_meta/")) and Path(n).name[:4] != ".mf_"}
    flows = {str(p.relative_to(ROOT / "flows")) for p in (ROOT / "flows").glob("*.py")}
    reco = {f".mf_code/{p.relative_to(ROOT)}" for p in (ROOT / "reco").rglob("*.py")}
    assert flows | reco | {"settings.ini", "rules.toml"} <= own
    assert {n for n in own - flows - reco if not re.fullmatch(r"\.mf_code/\w+\.py", n)} == {"settings.ini", "rules.toml"}
    assert sum(map(len, package.values())) < 20e6
    assert package["train.py"] == (ROOT / "flows" / "train.py").read_bytes() and package["rules.toml"].startswith(b"[[ban]]")


def test_its_settings_are_ours_without_what_is_secret(package, made, tmp_path):
    assert not [n for n, b in package.items() if any(w.encode() in b for w in (SECRET, KEY, HOOK))]
    (tmp_path / "settings.ini").write_bytes(package["settings.ini"])
    there, here = load_settings(tmp_path / "settings.ini", {}), load_settings(made.settings, {})
    assert there.model_dump(exclude={"root"}) == here.without_secrets().model_dump(exclude={"root"})
    assert there.candidates["mine"].cls == "lab.sources:Mine" and there.quality.volume_fall.severity == "error" # it was read


def test_a_pod_runs_its_step_from_the_package(made, tmp_path):
    """The container's own command, with Argo's words filled in; only what says to Argo which task it was is left out: it writes below /mnt."""
    (start,) = (t for t in made.objects["upkeep"]["WorkflowTemplate"]["spec"]["templates"] if t["name"] == "start")
    words = start["container"]["command"][2].replace("--with=argo_workflows_internal:auto-emit-argo-events=1", "")
    words = re.sub(r"\{\{(.*?)\}\}", lambda m: {"retries": "0"}.get(m[1], "w1"), words).replace("/tmp/", f"{tmp_path}/")
    given = {e["name"]: e.get("value", "x") for e in start["container"]["env"] if "{{" not in e.get("value", "")}
    secret = {"RECO_LAKE_ACCESS_KEY": KEY, "RECO_LAKE_SECRET_KEY": SECRET, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    env = {k: v for k, v in environment(made.settings).items() if k != "RECO_SETTINGS"} | given | secret | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "AWS_DEFAULT_REGION": "us-east-1"}
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert done.returncode == 0, done.stdout
    bucket_of = load_settings(made.settings, {}).lake.root
    assert f"lake {bucket_of}, code {given['GIT_SHA']}" in done.stdout and not done.stdout.count("Collecting ")
    code = "import reco, metaflow; print(reco.__file__, metaflow.__file__)"
    used = subprocess.run([sys.executable, "-c", code], env=env | {"PYTHONPATH": str(tmp_path / "metaflow" / ".mf_code")}, cwd=tmp_path,
                          capture_output=True, text=True, check=True).stdout
    assert used.count(str(tmp_path)) == 2, "the package's own reco and metaflow are found first"


# Without S3 ---------------------------------------------------------------------------------------------------------


def test_without_s3_it_says_so_and_soon(tmp_path, endpoint):
    (tmp_path / "settings.ini").write_text("[lake]\nroot = data/lake\n")
    began = time.monotonic()
    done = argo(tmp_path / "settings.ini", "upkeep")
    assert done.returncode == 1 and "set [runs] datastore = s3://bucket/metaflow" in done.stdout
    at = f"http://127.0.0.1:{free_port()}"
    done = argo(tmp_path / "settings.ini", "upkeep", METAFLOW_DATASTORE_SYSROOT_S3="s3://there/metaflow", METAFLOW_S3_ENDPOINT_URL=at,
                AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
    assert done.returncode == 1 and f"s3://there/metaflow at {at[7:]}: it cannot be reached" in done.stdout and SECRET not in done.stdout
    done = argo(tmp_path / "settings.ini", "upkeep", METAFLOW_DATASTORE_SYSROOT_S3="s3://nowhere/metaflow", METAFLOW_S3_ENDPOINT_URL=endpoint,
                AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
    assert done.returncode == 1 and "s3://nowhere/metaflow" in done.stdout and "argo: the code of the flows cannot be uploaded" in done.stdout
    assert time.monotonic() - began < 60


def test_metaflows_own_only_json_says_the_same(made, tmp_path):
    """The stand-in for a cluster changes nothing in what Metaflow compiles; and a deadline that is over is told."""
    done = argo(made.settings, "upkeep", "--out", str(tmp_path), "--timeout", "0.2")
    assert done.returncode == 1 and "upkeep.py: not compiled within 0.2 s" in done.stdout and not list(tmp_path.iterdir())
    code = "import sys; sys.argv = ['argo']; import argo, os; from reco.settings import load_settings; from pathlib import Path; s = load_settings(); " \
           "os.environ.update(argo.events_env(s) | argo.datastore(s) | {'METAFLOW_USER': 'reco', 'USER': 'reco'}); c = argo.command(Path('upkeep.py').absolute(), s); " \
           "os.execv(c[0], [*c, '--only-json'])"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "flows", env=environment(made.settings), capture_output=True, text=True, check=True)

    def plain(value: object) -> object:
        if isinstance(value, dict): return {k: plain(v) for k, v in value.items() if v is not None and k != "metaflow/deployment_timestamp"}
        if isinstance(value, list): return [plain(v) for v in value]
        given = r"mfprj-\w+-0-\w{4}|__PLACEHOLDER_PRODUCTION_TOKEN__|\b[0-9a-f]{2}/[0-9a-f]{40}\b|^[0-9a-f]{40}$|\b[a-z]{10}\b"
        # the token; the package, which has the moment in it; and ten letters that Metaflow draws for a file of parameters
        return re.sub(given, "GIVEN", value) if isinstance(value, str) else value
    alone, here = plain(json.loads(told.stdout)), plain(made.objects["upkeep"]["WorkflowTemplate"])
    assert lost(alone, here) == [] == lost(here, alone)


# What would end with a pod ------------------------------------------------------------------------------------------


def warned(folder: Path, text: str, **env: str) -> list[str]:
    (folder / "settings.ini").write_text(text)
    code = "import argo, json; from reco.settings import load_settings; print(json.dumps(argo.forgetful(load_settings())))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "flows", env=environment(folder / "settings.ini", PYTHONPATH=str(ROOT), **env), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


SHARED = """
[lake]
root = s3://shop/lake
[bundles]
root = s3://shop/bundles
[tracking]
artifacts = s3://shop/mlflow
[data]
source = postgres
[rules]
file = rules.toml
"""
GIVEN = {"RECO_ONLINE_URL": "redis://h:1", "RECO_SEARCH_STORAGE": "postgresql://h/optuna", "RECO_TRACKING_URI": "http://h:5000"}


def test_each_setting_that_ends_with_its_pod_is_named(tmp_path):
    assert warned(tmp_path, SHARED, **GIVEN) == []
    changes = {"RECO_LAKE_ROOT": "data/lake", "RECO_BUNDLES_ROOT": "b", "RECO_ONLINE_URL": "", "RECO_SEARCH_STORAGE": "", "RECO_TRACKING_URI": "",
               "RECO_TRACKING_ARTIFACTS": "mlflow", "RECO_DATA_SOURCE": "files", "RECO_MONITOR_TEXTFILE": "/srv/reco.prom", "RECO_RULES_FILE": "/etc/rules.toml",
               "RECO_EXPERIMENTS_FILE": "/etc/experiments.toml"}
    names = ["[lake] root is data/lake", "[bundles] root is b", "[tracking] artifacts is mlflow", "[online] url is empty", "[search] storage is empty",
             "[tracking] uri is empty", "[data] path is data/raw", "[monitor] textfile is /srv/reco.prom", "[rules] file is /etc/rules.toml",
             "[experiments] file is /etc/experiments.toml"]
    said = warned(tmp_path, SHARED, **GIVEN | changes)
    assert len(said) == len(names) == len(changes) and all(line.startswith(name) for line, name in zip(said, names, strict=True)), said
    assert not any("RECO_TRACKING" in line or "[tracking]" in line for line in warned(tmp_path, SHARED, **GIVEN | {"RECO_TRACKING_URI": "", "RECO_TRACKING_ENABLED": "false"}))


def test_a_search_whose_workers_share_nothing_ends_at_once(tmp_path):
    """As in a pod: the variable is what Metaflow sets there."""
    (tmp_path / "settings.ini").write_text("[search]\nspace = als\n")
    done = subprocess.run([sys.executable, "flows/search.py", "run"], cwd=ROOT, env=environment(tmp_path / "settings.ini", METAFLOW_KUBERNETES_WORKLOAD="1"),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode != 0 and "search: [search] storage is empty, and pods share no SQLite file" in done.stdout and "Traceback" not in done.stdout, done.stdout
    assert not (tmp_path / "data").exists()


# Manifests ----------------------------------------------------------------------------------------------------------


def documents() -> list[dict]:
    return [d for p in sorted(DEPLOY.glob("*.yaml")) for d in yaml.safe_load_all(p.read_text())]


def test_manifests_are_of_their_kinds():
    api, kinds = kubernetes.ApiClient(), []
    for given in documents():
        kinds.append(given["kind"])
        if given["apiVersion"].startswith("argoproj.io/"): continue
        read = api.deserialize(json.dumps(given), f"V1{given['kind']}", "application/json")
        assert lost(given, api.sanitize_for_serialization(read)) == [], given["kind"]
    assert set(kinds) == {"Namespace", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "EventBus", "EventSource"}
    (source,) = (d for d in documents() if d["kind"] == "EventSource")
    inline = source["spec"]["webhook"]["metaflow"] # in the real type, and a field of its own in hera's
    assert set(taken(events_models.EventSource, source)) <= GAPS | {f".spec.webhook.metaflow.{k}" for k in inline}
    assert taken(events_models.WebhookContext, inline) == []


def test_manifests_name_what_the_flows_name(made):
    found = {(d["kind"], d["metadata"]["name"]): d for d in documents()}
    assert {d["metadata"].get("namespace") for k, d in found.items() if k[0] != "Namespace"} == {"reco"} == {
        o["metadata"]["namespace"] for f in made.objects.values() for o in f.values() if o["kind"] != "CronWorkflow"}
    source = found["EventSource", "metaflow"]["spec"]
    for kinds in made.objects.values():
        if "Sensor" in kinds:
            spec = kinds["Sensor"]["spec"]
            (dependency,) = spec["dependencies"]
            assert ("EventBus", spec["eventBusName"]) in found and ("EventSource", dependency["eventSourceName"]) in found
            assert dependency["eventName"] in source["webhook"] and ("ServiceAccount", spec["template"]["serviceAccountName"]) in found
        for task in tasks(kinds["WorkflowTemplate"]).values():
            assert ("ServiceAccount", task["serviceAccountName"]) in found
            hook = next(e["value"] for e in task["container"]["env"] if e["name"] == "METAFLOW_ARGO_EVENTS_WEBHOOK_URL")
            web = source["webhook"]["metaflow"]
            assert hook == f"http://metaflow-eventsource-svc.reco:{web['port']}{web['endpoint']}" and web["method"] == "POST"
    assert source["service"]["ports"] == [{"port": 12000, "targetPort": 12000}] and source["eventBusName"] == "default"


def test_rights_are_few():
    roles = {d["metadata"]["name"]: d["rules"] for d in documents() if d["kind"] == "Role"}
    for rules in roles.values():
        for rule in rules:
            assert not {"*", "secrets", "pods/exec"} & {*rule["resources"], *rule["verbs"], *rule["apiGroups"]}
    assert [(r["resources"], r["verbs"]) for r in roles["reco-events"]] == [(["workflows"], ["create"])]
    assert [(r["resources"], r["verbs"]) for r in roles["reco-flows"]] == [(["workflowtaskresults"], ["create", "patch"])]
    bound = {d["metadata"]["name"]: (d["roleRef"]["name"], d["subjects"][0]["name"]) for d in documents() if d["kind"] == "RoleBinding"}
    assert bound == {n: (n, n) for n in ("reco-flows", "reco-events")}
