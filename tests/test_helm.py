"""The Helm chart: values that are refused and why, and everything that its examples make, held to Kubernetes' schemas, to the settings, to the endpoint's contract, to
[schedule] and the flows, and to what pods need of each other. Helm is the real one (`make helm`); without it the examples as they were rendered last are checked."""

import configparser
import copy
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from gateways import filled, program
from shop_floor import listening

from app.contract import Service, create_app
from app.schedule import followers
from reco.experiments.assignment import read_experiments
from reco.reranking.rulebook import read_rules
from reco.settings import SettingsError, load_settings

ROOT = Path(__file__).parents[1]
CHART, FLOWS = ROOT / "deploy" / "helm" / "reco", ROOT / "flows"
chart = runpy.run_path(str(CHART.parent / "make_chart.py"))
EXAMPLES: dict[str, Path] = chart["EXAMPLES"]
VALUES, SCHEMA = yaml.safe_load((CHART / "values.yaml").read_text()), json.loads((CHART / "values.schema.json").read_text())
KUBERNETES = "1.28", "1.33"  # the oldest that Chart.yaml admits, and one of today
CUSTOM = {"ServiceMonitor", "PrometheusRule", "RayService"}  # of operators, whose schemas no package has


def helm() -> str:
    return chart["helm"]() or pytest.skip("needs Helm: make helm")


def over(values: dict, more: dict) -> dict:
    """Values as Helm puts them over each other; null takes a key away."""
    both = values | {k: over(values[k], v) if isinstance(v, dict) and isinstance(values.get(k), dict) else v for k, v in more.items()}
    return {k: v for k, v in both.items() if v is not None}


def values_of(name: str) -> dict:
    return over(copy.deepcopy(VALUES), yaml.safe_load(EXAMPLES[name].read_text()))


def documents(name: str) -> list[dict]:
    """What an example makes, as committed."""
    return [d for d in yaml.safe_load_all((chart["RENDERED"] / f"{name}.yaml").read_text()) if d]


MADE = {name: documents(name) for name in EXAMPLES}
ALL = [pytest.param(name, d, id=f"{name}-{d['kind']}-{d['metadata']['name']}") for name in EXAMPLES for d in MADE[name]]


def pod_templates(d: dict) -> list[dict]:
    """Every pod that an object makes: metadata and spec."""
    spec = d.get("spec", {})
    if d["kind"] == "Pod": return [d]
    if d["kind"] == "CronJob": return [spec["jobTemplate"]["spec"]["template"]]
    if d["kind"] == "RayService":
        cluster = spec["rayClusterConfig"]
        return [cluster["headGroupSpec"]["template"], *(w["template"] for w in cluster["workerGroupSpecs"])]
    return [spec["template"]] if "template" in spec else []


def containers(pod: dict) -> list[dict]: return pod["spec"].get("initContainers", []) + pod["spec"]["containers"]


def all_containers(name: str) -> Iterator[tuple[dict, dict, dict]]:
    """Object, pod and container of everything that an example runs."""
    for d in MADE[name]:
        for pod in pod_templates(d):
            for c in containers(pod): yield d, pod, c


def component(d: dict) -> str: return d["metadata"]["labels"].get("app.kubernetes.io/component", "")


def chosen(labels: dict, selector: dict) -> bool: return selector["matchLabels"].items() <= labels.items()


# What is made from elsewhere ------------------------------------------------------------------------------------------


def test_copies_schema_and_table_are_as_they_would_be_made_now():
    made = chart["made"]()
    assert {p.relative_to(ROOT) for p, text in made.items() if p.read_text() != text} == set(), "run make chart"
    assert {p for p in (CHART / "files").rglob("*") if p.is_file()} == set(made) - {CHART / "values.schema.json", CHART / "README.md"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_helm_renders(name):
    helm()
    assert chart["rendered"](EXAMPLES[name]) == (chart["RENDERED"] / f"{name}.yaml").read_text(), "run make chart"


@pytest.mark.parametrize("name", [None, *EXAMPLES])
def test_helm_finds_no_fault(name, tmp_path):
    more = ["--values", str(EXAMPLES[name])] if name else []
    done = subprocess.run([helm(), "lint", "--strict", str(CHART), *more], env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_any_release_stay_short_enough():
    helm()
    for release in ("shop", "a" * 53):
        made = [d for d in yaml.safe_load_all(chart["rendered"](EXAMPLES["kind"], "--set", "app.enabled=true", release=release)) if d]
        assert {d["metadata"]["labels"]["app.kubernetes.io/instance"] for d in made} == {release}
        for d in made: assert len(d["metadata"]["name"]) <= (52 if d["kind"] in ("CronJob", "StatefulSet") else 63), d["metadata"]["name"]
        assert len({(d["kind"], d["metadata"]["name"]) for d in made}) == len(made)


# Values ---------------------------------------------------------------------------------------------------------------


def faults(values: dict) -> list[str]:
    """Place and words of everything that the schema has against values."""
    found = jsonschema.Draft7Validator(SCHEMA).iter_errors(values)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in found]


@pytest.mark.parametrize("name", [None, *EXAMPLES])
def test_values_hold_to_the_schema(name):
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert faults(values_of(name) if name else VALUES) == []


BAD = [ # what is said on top of the defaults, and what the refusal names
    ({"endpont": {}}, "endpont"), ({"endpoint": {"replica": 2}}, "replica"), ({"endpoint": {"replicas": 0}}, "endpoint.replicas"),
    ({"endpoint": {"kind": "DaemonSet"}}, "endpoint.kind"), ({"endpoint": {"replicas": "2"}}, "endpoint.replicas"),
    ({"settings": {"serving": {"deadline_sm": 100}}}, "deadline_sm"), ({"settings": {"serving": {"deadline_ms": -1}}}, "settings.serving.deadline_ms"),
    ({"settings": {"online": {"url": "redis://:secret@redis:6379/0"}}}, "url"), ({"settings": {"serving": {"client_keys": "k"}}}, "client_keys"),
    ({"settings": {"lake": {"secret_key": "s"}}}, "secret_key"), ({"settings": {"app": {"key": "k"}}}, "settings"), ({"settings": {"servin": {}}}, "servin"),
    ({"settings": {"serving": {"port": 9000}}}, "port"), ({"settings": {"lake": {"root": "data/lake"}}}, "settings.lake.root"),
    ({"settings": {"bundles": {"root": None}}}, "root"), ({"settings": {"data": {"source": "mysql"}}}, "settings.data.source"),
    ({"secrets": {"keys": {"RECO_ONLINE_URL": ""}}}, "secrets.keys.RECO_ONLINE_URL"), ({"secrets": {"keys": {"RECO_REDIS_URL": "x"}}}, "RECO_REDIS_URL"),
    ({"secrets": {"keys": {"RECO_ONLINE_URL": "redis://:secret@redis:6379/0"}}}, "secrets.keys.RECO_ONLINE_URL"),
    ({"secrets": {"keys": {"RECO_APP_KEY": ""}}}, "secrets.keys.RECO_APP_KEY"), ({"secrets": {"keys": {"RECO_POSTGRES_URL": ""}}}, "secrets.keys.RECO_POSTGRES_URL"),
    ({"secrets": {"existingSecret": ""}}, "secrets.keys."), ({"secrets": {"password": "x"}}, "password"), ({"gateway": {"enabled": True}}, "gateway.existingSecret"),
    ({"ingress": {"enabled": True}}, "ingress.hosts"), ({"ingress": {"hosts": ["https://shop"]}}, "ingress.hosts.0"),
    ({"endpoint": {"kind": "RayService", "autoscaling": {"enabled": True}}}, "endpoint.autoscaling.enabled"),
    ({"settings": {"data": {"source": "files"}}}, "flows.dataClaim"), ({"schedule": {"mode": "cron"}}, "schedule.mode"),
    ({"schedule": {"cron": {"ingest": "daily"}}}, "schedule.cron.ingest"), ({"schedule": {"cron": {"trian": "0 4 * * 0"}}}, "trian"),
    ({"endpoint": {"resources": {"limits": {"memory": None}}}}, "memory"), ({"endpoint": {"resources": {"requests": {"memory": "2 GB"}}}}, "endpoint.resources.requests.memory"),
    ({"endpoint": {"disruption": {"maxUnavailable": "most"}}}, "endpoint.disruption.maxUnavailable"),
    ({"endpoint": {"pod": {"extraEnv": [{"name": "RECO_SERVING_PORT", "value": "1"}]}}}, "endpoint.pod.extraEnv.0"), # settings has that
    ({"networkPolicy": {"ingressFrom": [{"podSelectr": {}}]}}, "podSelectr"), ({"networkPolicy": {"to": {"s3": {"ports": [0]}}}}, "networkPolicy.to.s3.ports.0"),
    ({"images": {"endpoint": {"digest": "latest"}}}, "images.endpoint.digest"), ({"gateway": {"keyRate": "fast"}}, "gateway.keyRate"),
]


@pytest.mark.parametrize(("said", "named"), BAD, ids=[json.dumps(said)[:70] for said, _ in BAD])
def test_bad_values_are_refused_with_the_name_of_the_key(said, named, tmp_path):
    found = faults(over(copy.deepcopy(VALUES), said))
    assert found and any(named in f for f in found), found
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(said))
    if chart["helm"]():
        with pytest.raises(subprocess.CalledProcessError) as refused: chart["rendered"](tmp_path / "bad.yaml")
        assert named.rstrip(".") in refused.value.stderr.replace("/", "."), refused.value.stderr


@pytest.mark.parametrize("said", [{"endpoint": {"autoscaling": {"enabled": True, "minReplicas": 9}}}, {"endpoint": {"kind": "RayService", "ray": {"minReplicas": 9}}}])
def test_at_least_is_not_above_at_most(said, tmp_path):
    helm()
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(subprocess.CalledProcessError) as refused: chart["rendered"](tmp_path / "bad.yaml")
    assert "minReplicas 9 is more than maxReplicas 8" in refused.value.stderr


def test_every_value_is_explained():
    rows = {path for path, _, _ in chart["values_rows"]((CHART / "values.yaml").read_text())}
    plain = lambda tree, at=(): [p for k, v in tree.items() if (key := ".".join((*at, k))) not in rows for p in (plain(v, (*at, k)) if isinstance(v, dict) and v else [key])]
    assert plain(VALUES) == [] and plain(VALUES | {"new": {"key": 1}}) == ["new.key"]


def test_no_secret_has_a_place_among_the_settings():
    secret = chart["secret_keys"]()
    known = {(s, k) for s, section in SCHEMA["properties"]["settings"]["properties"].items() for k in section.get("properties", {})}
    assert len(secret) >= 12 and len(known) > 150 and not secret & known
    variables = {f"RECO_{s}_{k}".upper() for s, k in secret}
    assert set(SCHEMA["properties"]["secrets"]["properties"]["keys"]["properties"]) == set(VALUES["secrets"]["keys"]) == variables
    for name in EXAMPLES:
        for d in MADE[name]:
            assert d["kind"] != "Secret", "the chart makes none"
            if d["kind"] == "ConfigMap": assert not variables & set(d["data"]) and "://:" not in json.dumps(d["data"])


# Kubernetes' own schemas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_kubernetes_knows_every_field(name, version):
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: the dev extra").validate
    for d in MADE[name]:
        if d["kind"] not in CUSTOM: validate(d, version, strict=True)
        elif d["kind"] == "RayService": # its pods, at least, are Kubernetes' own
            for pod in pod_templates(d):
                validate({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"},
                          "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": pod}}, version, strict=True)
    spoilt = copy.deepcopy(next(d for d in MADE[name] if d["kind"] == "StatefulSet"))
    spoilt["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(Exception, match="resource"): validate(spoilt, version, strict=True)


def test_the_install_test_has_what_its_values_name():
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: the dev extra").validate
    script, servers = (CHART / "ci" / "kind.sh").read_text(), list(yaml.safe_load_all((CHART / "ci" / "servers.yaml").read_text()))
    for d in servers: validate(d, KUBERNETES[-1], strict=True)
    assert subprocess.run(["bash", "-n", CHART / "ci" / "kind.sh"]).returncode == 0 and os.access(CHART / "ci" / "kind.sh", os.X_OK)
    made = {name: set(re.findall(r"--from-literal=([\w.]+)=", words)) for name, words in re.findall(r"create secret generic (\S+) ((?:.*\\\n)*.*)", script)}
    values = values_of("kind")
    assert {k for k in values["secrets"]["keys"].values() if k} == made[values["secrets"]["existingSecret"]]
    assert made[values["gateway"]["existingSecret"]] == {"people", "keys.map"}
    assert made["reco-servers"] == set(re.findall(r"\$(REDIS_\w+)", str(servers))) | {"MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"}
    services = {(d["metadata"]["name"], p["port"]) for d in servers if d["kind"] == "Service" for p in d["spec"]["ports"]}
    assert services == {("redis", 6379), ("minio", 9000)} and values["settings"]["lake"]["endpoint"] == "http://minio:9000" and "@redis:6379/0" in script


# fields of operators' objects that are used, by hand: from the references of the Prometheus operator 0.80 and of KubeRay 1.4
FIELDS = {"ServiceMonitor": {"namespaceSelector.matchNames", "selector.matchLabels", "endpoints.port", "endpoints.path", "endpoints.interval", "endpoints.authorization.type",
                             "endpoints.authorization.credentials.name", "endpoints.authorization.credentials.key", "endpoints.relabelings.action",
                             "endpoints.relabelings.targetLabel", "endpoints.relabelings.replacement"},
          "PrometheusRule": {"groups.name", "groups.rules.record", "groups.rules.alert", "groups.rules.expr", "groups.rules.for", "groups.rules.labels", "groups.rules.annotations"},
          "RayService": {"serveConfigV2", "serveService.metadata", "serveService.spec", "rayClusterConfig.rayVersion", "rayClusterConfig.headGroupSpec.rayStartParams",
                         "rayClusterConfig.headGroupSpec.template", "rayClusterConfig.workerGroupSpecs.groupName", "rayClusterConfig.workerGroupSpecs.replicas",
                         "rayClusterConfig.workerGroupSpecs.minReplicas", "rayClusterConfig.workerGroupSpecs.maxReplicas", "rayClusterConfig.workerGroupSpecs.rayStartParams",
                         "rayClusterConfig.workerGroupSpecs.template"}}
VERSIONS = {"ServiceMonitor": "monitoring.coreos.com/v1", "PrometheusRule": "monitoring.coreos.com/v1", "RayService": "ray.io/v1"}


def unknown(value: object, known: set[str], at: str = "") -> list[str]:
    """Paths below which nothing of `known` is."""
    if at in known: return []
    if isinstance(value, list): return sum((unknown(v, known, at) for v in value), [])
    if isinstance(value, dict) and (not at or any(k.startswith(f"{at}.") for k in known)): return sum((unknown(v, known, f"{at}.{k}".strip(".")) for k, v in value.items()), [])
    return [at]


def test_fields_of_operators_are_those_that_they_have():
    found = [d for name in EXAMPLES for d in MADE[name] if d["kind"] in CUSTOM]
    assert {d["kind"] for d in found} == CUSTOM
    for d in found: assert d["apiVersion"] == VERSIONS[d["kind"]] and unknown(d["spec"], FIELDS[d["kind"]]) == []
    assert unknown({"endpoints": [{"bearerTokenSecrt": {}}]}, FIELDS["ServiceMonitor"]) == ["endpoints.bearerTokenSecrt"], "the check sees a wrong name"


def test_ray_takes_what_is_served_and_scales_as_values_say():
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema
    (service,) = (d for d in MADE["ray"] if d["kind"] == "RayService")
    said, file = yaml.safe_load(service["spec"]["serveConfigV2"]), yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(said).applications
    scaled = AutoscalingConfig(**application.deployments[0].autoscaling_config)
    assert (scaled.min_replicas, scaled.max_replicas, application.args) == (4, 12, {"replicas": 4, "max_replicas": 12})
    for tree in (said, file):
        tree["applications"][0].pop("args")
        for key in ("min_replicas", "initial_replicas", "max_replicas"): tree["applications"][0]["deployments"][0]["autoscaling_config"].pop(key)
    assert said == file, "everything else is deploy/ray/serve.yaml"
    lock = re.search(r"^ray==(.*)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == VALUES["endpoint"]["ray"]["version"] == lock


# What belongs together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_selectors_choose_pods_and_ports_are_theirs(name):
    pods = [(d, pod) for d in MADE[name] for pod in pod_templates(d)]
    for d in MADE[name]:
        spec = d.get("spec", {})
        if d["kind"] in ("Deployment", "StatefulSet"):
            assert chosen(spec["template"]["metadata"]["labels"], spec["selector"])
            assert set(spec["selector"]["matchLabels"]) == {f"app.kubernetes.io/{k}" for k in ("name", "instance", "component")}, "a selector cannot be changed later"
        if d["kind"] in ("PodDisruptionBudget", "Service"):
            selector = spec["selector"] if d["kind"] == "PodDisruptionBudget" else {"matchLabels": spec["selector"]}
            of = [(o, p) for o, p in pods if chosen(p["metadata"]["labels"], selector)]
            assert {o["metadata"]["name"] for o, _ in of} == {f"reco-{component(d)}"}, d["metadata"]["name"]
            named = {p["name"]: p["containerPort"] for _, pod in of for c in containers(pod) for p in c.get("ports", [])}
            for port in spec.get("ports", []): assert named[port["targetPort"]] == port["port"]
        if d["kind"] == "ServiceMonitor":
            (service,) = (s for s in MADE[name] if s["kind"] == "Service" and chosen(s["metadata"]["labels"], spec["selector"]))
            assert {e["port"] for e in spec["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
            (job,) = (r["replacement"] for e in spec["endpoints"] for r in e["relabelings"])
            assert f'job="{job}"' in (ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml").read_text()
        if d["kind"] == "HorizontalPodAutoscaler":
            (target,) = (o for o in MADE[name] if (o["kind"], o["metadata"]["name"]) == (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]))
            assert "replicas" not in target["spec"], "or each upgrade would undo what was scaled"
        if d["kind"] == "StatefulSet": assert spec["serviceName"] in {s["metadata"]["name"] for s in MADE[name] if s["kind"] == "Service"}
        if d["kind"] == "Ingress":
            backends = {(p["backend"]["service"]["name"], p["backend"]["service"]["port"]["number"]) for r in spec["rules"] for p in r["http"]["paths"]}
            assert backends <= {(s["metadata"]["name"], p["port"]) for s in MADE[name] if s["kind"] == "Service" for p in s["spec"]["ports"]}
    accounts = {d["metadata"]["name"] for d in MADE[name] if d["kind"] == "ServiceAccount"}
    given = {pod["spec"]["serviceAccountName"] for _, pod in pods} - {"default"}
    assert accounts == given - ({"reco-flows"} if not values_of(name)["serviceAccounts"]["flows"]["create"] else set())


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_service_gives_pods_a_setting(name):
    """Kubernetes makes variables of Services: RECO_ENDPOINT_PORT would be an unknown setting in every pod of the namespace."""
    services = [d["metadata"]["name"] for d in MADE[name] if d["kind"] == "Service"] + [
        d["spec"]["serveService"]["metadata"]["name"] for d in MADE[name] if d["kind"] == "RayService"]
    assert services and not [s for s in services if s.upper().startswith("RECO")]
    assert all(pod["spec"]["enableServiceLinks"] is False for d in MADE[name] for pod in pod_templates(d))
    with pytest.raises(SettingsError, match="RECO_ENDPOINT_PORT"): load_settings(ROOT / "settings.ini", {"RECO_ENDPOINT_PORT": "tcp://10.0.0.1:8000"})


def environment(name: str, d: dict, c: dict) -> dict[str, str]:
    """A container's variables, a word for each secret."""
    maps = {m["metadata"]["name"]: m["data"] for m in MADE[name] if m["kind"] == "ConfigMap"}
    words = {"URL": "redis://:x@redis:6379/0", "BUS": "kafka://kafka:9092", "URI": "postgresql://x:x@postgres/mlflow", "STORAGE": "postgresql://x:x@postgres/optuna",
             "WEBHOOK": "https://hooks.example.org/x", "KEYS": "k" * 40, "KEY": "k" * 40, "KAFKA": "security.protocol=SSL", "REGISTRY": "https://registry"}
    found = {k: v for source in c.get("envFrom", []) for k, v in maps[source["configMapRef"]["name"]].items()}
    for e in c.get("env", []): found[e["name"]] = e["value"] if "value" in e else words.get(e["name"].rpartition("_")[2], "x")
    assert len(c.get("env", [])) == len({e["name"] for e in c.get("env", [])}), (d["metadata"]["name"], "a variable twice")
    assert all(isinstance(v, str) for v in found.values())
    return found


def ours(c: dict) -> bool: return "/reco/" in f"/{c['image']}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_variable_is_a_setting_that_the_platform_takes(name):
    values = values_of(name)
    for d, _, c in all_containers(name):
        env = environment(name, d, c)
        if not ours(c): continue
        read = load_settings(ROOT / "settings.ini", {k: v for k, v in env.items() if k.startswith("RECO_")}) # raises for what is unknown or bad
        if "envFrom" not in c: continue # helm's test
        for section, keys in values["settings"].items():
            for key, value in keys.items():
                got = read.candidates[key].quota if section == "candidates" else getattr(getattr(read, section), key)
                if section == "tracking" and key == "enabled": continue # said of the endpoint
                assert got == value, (section, key)
        assert read.lake.root.startswith("s3://") and read.bundles.root.startswith("s3://") and read.runs.datastore.startswith("s3://")


@pytest.mark.parametrize("name", EXAMPLES)
def test_folders_are_where_a_pod_can_write(name, tmp_path):
    seen = set()
    folders = {"RECO_BUNDLES_CACHE", "RECO_DATA_PATH", "RECO_DATA_SCRATCH", "RECO_ONLINE_FOLDER", "RECO_SEARCH_FILE", "RECO_SEARCH_OUT", "RECO_TRACKING_FOLDER",
               "METAFLOW_DATASTORE_SYSROOT_LOCAL", "METAFLOW_CARD_LOCALROOT", "METAFLOW_TEMPDIR", "METAFLOW_ARTIFACT_LOCALROOT"}
    for d, pod, c in all_containers(name):
        mounts = {m["mountPath"]: m for m in c.get("volumeMounts", [])}
        volumes = {v["name"]: v for v in pod["spec"].get("volumes", [])}
        assert {m["name"] for m in mounts.values()} <= set(volumes), (d["metadata"]["name"], c["name"])
        if not ours(c) or "envFrom" not in c: continue
        env = environment(name, d, c)
        for variable in folders:
            at = next((m for path, m in mounts.items() if Path(env[variable]).is_relative_to(path)), None)
            assert at and not at.get("readOnly") and {"emptyDir", "persistentVolumeClaim"} & set(volumes[at["name"]]), variable
        if component(d) != "consumer": assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "256Mi"}, "Ray's objects"
        for variable, read in (("RECO_RULES_FILE", read_rules), ("RECO_EXPERIMENTS_FILE", read_experiments)):
            if file := env.get(variable):
                files = next(m["data"] for m in MADE[name] if m["kind"] == "ConfigMap" and m["metadata"]["name"] == volumes[mounts["/etc/reco"]["name"]]["configMap"]["name"])
                assert Path(file).parent == Path("/etc/reco") and mounts["/etc/reco"]["readOnly"]
                (tmp_path / "file.toml").write_text(files[Path(file).name])
                assert read(tmp_path / "file.toml") != read(None)
                seen.add(variable)
    assert seen == {"small": {"RECO_RULES_FILE"}, "ray": {"RECO_EXPERIMENTS_FILE"}}.get(name, set())


NEEDS = {  # components and the secrets that they read; nobody else has them
    "endpoint": {"RECO_LAKE_ACCESS_KEY", "RECO_LAKE_SECRET_KEY", "RECO_ONLINE_URL", "RECO_STREAM_BUS", "RECO_STREAM_KAFKA", "RECO_STREAM_REGISTRY",
                 "RECO_SERVING_CLIENT_KEYS", "RECO_SERVING_ADMIN_KEYS", "RECO_ALERTS_WEBHOOK"},
    "consumer": {"RECO_LAKE_ACCESS_KEY", "RECO_LAKE_SECRET_KEY", "RECO_ONLINE_URL", "RECO_STREAM_BUS", "RECO_STREAM_KAFKA", "RECO_STREAM_REGISTRY"},
    "app": {"RECO_LAKE_ACCESS_KEY", "RECO_LAKE_SECRET_KEY", "RECO_APP_KEY", "RECO_TRACKING_URI"},
    "flows": {"RECO_LAKE_ACCESS_KEY", "RECO_LAKE_SECRET_KEY", "RECO_ONLINE_URL", "RECO_POSTGRES_URL", "RECO_TRACKING_URI", "RECO_SEARCH_STORAGE", "RECO_ALERTS_WEBHOOK"},
    "gateway": set(), "test": {"RECO_SERVING_CLIENT_KEYS"}}


@pytest.mark.parametrize("name", EXAMPLES)
def test_secrets_are_those_that_values_name_and_only_who_needs_one_has_it(name):
    said = values_of(name)["secrets"]
    where = {v: (k.rpartition("/")[0] or said["existingSecret"], k.rpartition("/")[2]) for v, k in said["keys"].items() if k}
    for d, _, c in all_containers(name):
        refs = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in c.get("env", []) if "secretKeyRef" in e.get("valueFrom", {})}
        assert set(refs) == NEEDS[component(d)] & set(where), (d["metadata"]["name"], c["name"])
        for variable, ref in refs.items(): assert (ref["name"], ref["key"]) == where[variable] and "optional" not in ref
        assert not [s for s in c.get("envFrom", []) if "secretRef" in s]
    for d in MADE[name]:
        if d["kind"] == "ServiceMonitor" and component(d) == "endpoint":
            key = values_of(name)["monitoring"]["serviceMonitor"]["key"]
            assert "/".join(d["spec"]["endpoints"][0]["authorization"]["credentials"][k] for k in ("name", "key")).endswith(key)


# Probes, ends, rights, room -------------------------------------------------------------------------------------------


class Nothing:
    """As much of a service as the contract asks for while its routes are made."""
    def __getattr__(self, name: str) -> object: return None


def test_probes_ask_for_routes_that_there_are():
    routes = {r.path for r in create_app(Nothing(), echo=False).routes} # type: ignore[arg-type]
    assert Service and {"/ready", "/health", "/metrics"} <= routes
    seen = set()
    for name in EXAMPLES:
        for d, _, c in all_containers(name):
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                if not (probe := c.get(kind)): continue
                seen.add((component(d), kind))
                ports = {p["name"]: p["containerPort"] for p in c["ports"]}
                way = probe.get("httpGet") or probe["tcpSocket"]
                assert way["port"] in ports
                if d["kind"] == "Deployment" and component(d) == "endpoint":
                    assert way["path"] in routes and way["path"] in ("/ready", "/health"), "open to who has no key"
                    assert (way["path"] == "/health") == (kind == "livenessProbe"), "a Redis that is away is no reason to be killed"
                if component(d) == "consumer": assert (way["path"], ports[way["port"]]) == ("/metrics", 9201)
                if component(d) == "app": assert way["path"] == f"/{environment(name, d, c)['STREAMLIT_SERVER_BASE_URL_PATH']}/_stcore/health"
    assert {(c, k) for c in ("endpoint", "app") for k in ("startupProbe", "readinessProbe", "livenessProbe")} <= seen and ("consumer", "livenessProbe") in seen


def test_an_ingress_without_a_gateway_leads_to_public_paths_alone(tmp_path):
    helm()
    (tmp_path / "values.yaml").write_text("ingress: {enabled: true, hosts: [shop.example.org], app: true}\nflows: {dataClaim: raw}\n")
    (found,) = (d for d in yaml.safe_load_all(chart["rendered"](tmp_path / "values.yaml")) if d and d["kind"] == "Ingress")
    to = {p["path"]: p["backend"]["service"]["name"] for p in found["spec"]["rules"][0]["http"]["paths"]}
    routes = {"/" + r.path.split("/")[1] for r in create_app(Nothing(), echo=False).routes} - {"/metrics", "/ready"} # type: ignore[arg-type]
    assert {p for p, s in to.items() if s == "endpoint-reco"} == routes and to["/app"] == "app-reco"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_pod_has_time_to_end(name):
    from app.serve import application
    grace = application({})._bound_deployment._deployment_config.graceful_shutdown_timeout_s
    for d, pod, c in all_containers(name):
        if component(d) != "endpoint" or c["name"] == "wait": continue
        drain = int(c["lifecycle"]["preStop"]["exec"]["command"][1])
        assert drain == values_of(name)["endpoint"]["drainSeconds"] >= 5 and pod["spec"]["terminationGracePeriodSeconds"] >= drain + grace + 20
        if d["kind"] == "RayService": assert pod["spec"]["terminationGracePeriodSeconds"] >= drain + 30 + 10 # `ray start` drains for 30 s: 38 s were measured


def test_a_container_may_do_nothing_but_its_work():
    for name in EXAMPLES:
        for d, pod, c in all_containers(name):
            spec, own, at = pod["spec"], c["securityContext"], (name, d["metadata"]["name"], c["name"])
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001, at
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"} and spec["automountServiceAccountToken"] is False, at
            assert own == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}, at
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec) and not [v for v in spec.get("volumes", []) if "hostPath" in v], at
            assert {"memory", "ephemeral-storage"} <= set(c["resources"]["limits"]) and {"cpu", "memory", "ephemeral-storage"} <= set(c["resources"]["requests"]), at
            for what in ("memory", "ephemeral-storage"): assert mb(c["resources"]["requests"][what]) <= mb(c["resources"]["limits"][what]), at


def mb(quantity: str) -> float: return float(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


def test_flows_have_the_room_that_their_steps_ask_for():
    needs = runpy.run_path(str(FLOWS / "resources.py"))["NEEDS"]
    seen = set()
    for name in ("small", "ray"):
        for d, _, c in all_containers(name):
            if component(d) != "flows" or c["name"] == "bootstrap": continue
            seen.add(c["name"])
            largest = max(float(n.asked(1)["memory"]) for n in needs[f"{c['name'].title()}Flow"].values())
            assert mb(c["resources"]["requests"]["memory"]) >= largest, (c["name"], largest)
    assert seen == {"ingest", "materialize", "monitor", "kpis", "train", "promote", "batch", "upkeep", "report"}


def test_an_endpoint_has_the_room_that_was_measured():
    rows = json.loads((ROOT / "benchmarks" / "results" / "p1_endpoint.json").read_text())["rows"]
    rss = max(r["metrics"]["rss_mb"] for r in rows if "rss_mb" in r["metrics"])
    (peak,) = (r["metrics"]["peak_mb"] for r in rows if r["case"] == "memory of the loaded bundle, 100,000 items")
    own = VALUES["endpoint"]["resources"]
    assert mb(own["requests"]["memory"]) >= 1200 + rss and mb(own["limits"]["memory"]) >= 1200 + rss + peak # Ray's 1.2 GB beside it: p4_batch


# Images, commands, schedules ------------------------------------------------------------------------------------------


IMAGES = {"endpoint": "reco/endpoint", "consumer": "reco/endpoint", "test": "reco/endpoint", "app": "reco/app", "flows": "reco/flows"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_images_run_programs_that_there_are(name):
    import reco
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert version["appVersion"] == version["version"] == reco.__version__
    for d, _, c in all_containers(name):
        if not ours(c): continue
        assert c["image"].removeprefix("registry.example.org/") == f"{IMAGES[component(d)]}:{reco.__version__}" and "command" not in c, "tini is the image's entrypoint"
        if d["kind"] == "RayService" and c["name"] != "wait":
            assert "args" not in c, "KubeRay makes it"
            continue
        words = " ".join(c["args"])
        for module in re.findall(r"python -m ([\w.]+)", words): assert importlib.util.find_spec(module), module
        for file in re.findall(r"python (flows/\w+\.py)", words): assert (ROOT / file).is_file(), file
        assert re.search(r"python (-m app\.|flows/)", words) or c["name"] == "ask"


def test_images_are_what_the_dockerfiles_make_and_those_of_compose():
    copied = {"reco/endpoint": {"app", "reco"}, "reco/app": {"app", "reco"}, "reco/flows": {"app", "data", "flows", "nbs", "reco"}}
    for image, folders in copied.items():
        text = (ROOT / "deploy" / "docker" / f"{image.partition('/')[2]}.Dockerfile").read_text()
        assert "USER 10001:10001" in text and 'ENTRYPOINT ["tini", "--"]' in text and "WORKDIR /srv/reco" in text
        assert folders <= set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE)), image
    compose = {s["image"] for s in yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()}
    servers = {c["image"] for d in yaml.safe_load_all((CHART / "ci" / "servers.yaml").read_text()) for pod in pod_templates(d) for c in containers(pod)}
    assert {":".join(VALUES["images"]["gateway"][k] for k in ("repository", "tag"))} | servers | {f"{i}:0.1.0" for i in copied} <= compose


def chains(name: str) -> dict[str, list[str]]:
    """Flows of each CronJob in their order."""
    jobs = {d["metadata"]["name"]: pod_templates(d)[0]["spec"] for d in MADE[name] if d["kind"] == "CronJob"}
    for spec in jobs.values(): assert len(spec["containers"]) == 1 and spec["restartPolicy"] == "Never"
    return {n.removeprefix("reco-"): [c["args"][1].removeprefix("flows/").removesuffix(".py") for c in spec.get("initContainers", []) + spec["containers"]] for n, spec in jobs.items()}


def test_schedules_are_those_of_the_settings():
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini")
    lines = dict(ini["schedule"])
    assert {k: v for k, v in VALUES["schedule"]["cron"].items() if k in lines} == lines and set(VALUES["schedule"]["cron"]) - set(lines) == {"report"}
    for name in ("small", "ray"):
        jobs = {d["metadata"]["name"].removeprefix("reco-"): d["spec"] for d in MADE[name] if d["kind"] == "CronJob"}
        assert {n: j["schedule"] for n, j in jobs.items()} == {n: line for n, line in VALUES["schedule"]["cron"].items() if line}
        assert all(j["timeZone"] == "Etc/UTC" and j["concurrencyPolicy"] == "Forbid" and not j["suspend"] for j in jobs.values())
    assert not chains("large"), "Argo does it"


def test_what_follows_on_a_flow_is_what_the_flows_say():
    after = followers(FLOWS)
    assert after["ingest"] == ["materialize", "monitor"] and "promote" in after["train"] and after["promote"] == ["batch"]
    for name in ("small", "ray"):
        found = chains(name)
        assert found["ingest"] == ["ingest", "materialize", "monitor"] and found["train"] == ["train", "promote", "batch"]
        for flow, chain in found.items():
            assert chain[0] == flow
            for n, one in enumerate(chain[1:], 1): assert any(one in after.get(before, []) for before in chain[:n]), (one, "follows on nothing before it")
            missing = {f for one in chain for f in after.get(one, [])} - set(chain)
            assert missing <= {"report"}, "which has a line of its own"
    retried = next(d for d in MADE["small"] if d["kind"] == "CronJob")["spec"]["jobTemplate"]["spec"]
    assert retried["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [1, 2] and retried["backoffLimit"] == 2


def test_each_flow_that_values_name_is_there():
    flows = set(followers(FLOWS)) | {p.stem for p in FLOWS.glob("*.py") if "(FlowSpec)" in p.read_text()}
    assert set(VALUES["schedule"]["cron"]) == flows
    assert get_args(load_settings(ROOT / "settings.ini", {}).data.model_fields["source"].annotation) == tuple(
        SCHEMA["properties"]["settings"]["properties"]["data"]["properties"]["source"]["enum"])


# Connections ----------------------------------------------------------------------------------------------------------


REACHES = {"RECO_LAKE_ROOT": "s3", "RECO_ONLINE_URL": "redis", "RECO_STREAM_BUS": "bus", "RECO_STREAM_REGISTRY": "registry", "RECO_POSTGRES_URL": "postgres",
           "RECO_SEARCH_STORAGE": "postgres", "RECO_TRACKING_URI": "tracking", "RECO_ALERTS_WEBHOOK": "webhook", "NGINX_MLFLOW": "tracking", "NGINX_GRAFANA": "grafana",
           "RECO_APP_ENDPOINT": "endpoint", "NGINX_ENDPOINT": "endpoint", "NGINX_APP": "app"}  # variables that hold an address, and whose


def arrows(name: str) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Who may reach whom, and who may be reached by whom, by the policies; what stands outside under its key of `networkPolicy.to` or as `outside`."""
    to = values_of(name)["networkPolicy"]["to"]
    out, into = set(), set()
    inner = lambda peer: peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component") if "namespaceSelector" not in peer else None
    for d in MADE[name]:
        if d["kind"] != "NetworkPolicy" or not (mine := d["spec"]["podSelector"]["matchLabels"].get("app.kubernetes.io/component")): continue
        for rule in d["spec"]["egress"]:
            ports = [p["port"] for p in rule.get("ports", []) if p["protocol"] == "TCP"]
            if own := [inner(p) for p in rule.get("to", []) if inner(p)]: out |= {(mine, o) for o in own}
            else: out |= {(mine, next(k for k, v in to.items() if (v["ports"], v.get("peers") or None) == (ports, rule.get("to")) and (mine, k) not in out))}
        for rule in d["spec"]["ingress"]: into |= {(inner(p) or "outside", mine) for p in rule["from"]}
    return out, into


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_connection_is_open_if_a_setting_needs_it_and_only_then(name):
    out, into = arrows(name)
    needed = {(c, "dns") for c in {component(d) for d in MADE[name] if pod_templates(d)} | {"flows", "test"}} | {("test", "endpoint")}
    for d, _, c in all_containers(name):
        env = environment(name, d, c)
        needed |= {(component(d), to) for variable, to in REACHES.items() if env.get(variable) and env[variable] != "127.0.0.1:9" and (variable != "RECO_LAKE_ROOT" or component(d) != "test")}
    if values_of(name)["schedule"]["mode"] == "argo" and not values_of(name)["bootstrap"]["enabled"]: needed -= {n for n in needed if n[0] == "flows"}
    if name == "ray": needed.add(("endpoint", "endpoint"))
    assert out == needed
    between = {(a, b) for a, b in needed if b in IMAGES}
    assert {a for a in into if a[0] != "outside"} == between, "both ends of an arrow, or it does not hold"
    said = values_of(name)["networkPolicy"]
    front = "gateway" if values_of(name)["gateway"]["enabled"] else "endpoint"
    outside = {(front, "ingressFrom"), ("endpoint", "clientsFrom"), ("endpoint", "metricsFrom"), ("consumer", "metricsFrom")} | ({("endpoint", "operatorFrom")} if name == "ray" else set())
    assert {to for by, to in into if by == "outside"} == {to for to, key in outside if said[key]}
    (nothing,) = (d["spec"] for d in MADE[name] if d["kind"] == "NetworkPolicy" and "app.kubernetes.io/component" not in d["spec"]["podSelector"]["matchLabels"])
    assert nothing["policyTypes"] == ["Ingress", "Egress"] and not {"ingress", "egress"} & set(nothing)
    assert all(chosen(pod["metadata"]["labels"], nothing["podSelector"]) for d in MADE[name] for pod in pod_templates(d))


def test_the_gateway_starts_with_what_the_chart_gives_it(tmp_path):
    """NGINX itself reads the ConfigMap's files, filled in as the image does it."""
    (config,) = (d["data"] for d in MADE["large"] if d["kind"] == "ConfigMap" and component(d) == "gateway")
    d, pod, c = next(found for found in all_containers("large") if component(found[0]) == "gateway")
    env = environment("large", d, c)
    assert re.search(env["NGINX_ENVSUBST_FILTER"], "NGINX_MODE") and {m["mountPath"] for m in c["volumeMounts"]} >= {"/tmp", env["NGINX_CONFIG"], env["NGINX_SECRETS"]}
    own = env | {"NGINX_CONFIG": str(tmp_path / "conf.d"), "NGINX_SECRETS": str(tmp_path), "NGINX_LISTEN": "127.0.0.1:8080"}
    own |= {k: f"127.0.0.1:{v.rpartition(':')[2]}" for k, v in env.items() if k in ("NGINX_ENDPOINT", "NGINX_APP", "NGINX_MLFLOW", "NGINX_GRAFANA")} # names of a cluster
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "keys.map").write_text(f'"{"k" * 40}" client;\n')
    (tmp_path / "people").write_text("ann:{PLAIN}x\n")
    for file, text in config.items():
        if file.endswith(".template"): (tmp_path / "conf.d" / file.removesuffix(".template")).write_text(filled(text, own))
    (tmp_path / "nginx.conf").write_text(config["nginx.conf"].replace("/etc/nginx/conf.d", str(tmp_path / "conf.d")).replace("/tmp/nginx", f"{tmp_path}/nginx"))
    done = subprocess.run([program(), "-e", str(tmp_path / "error.log"), "-c", str(tmp_path / "nginx.conf"), "-T"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "set_real_ip_from 10.0.0.0/8;" in done.stdout and "rate=2000r/s" in done.stdout and "${" not in done.stdout


# A pod, as far as one can be without a cluster ------------------------------------------------------------------------


def as_its_pod(pod: dict, c: dict, env: dict[str, str], volumes: dict[str, Path]) -> list[str]:
    """A command line that runs a container in a sandbox: its user, a root that cannot be written, what is mounted, its variables and no others. The image is this checkout."""
    sandbox = shutil.which("bwrap") or pytest.skip("needs bubblewrap: make services")
    if subprocess.run([sandbox, "--ro-bind", "/", "/", "--unshare-user", "--unshare-pid", "true"], capture_output=True).returncode: pytest.skip("bubblewrap may not make a sandbox here")
    told, base = [sandbox, "--unshare-user", "--uid", "10001", "--gid", "10001", "--unshare-pid", "--die-with-parent", "--tmpfs", "/"], sys.base_prefix
    for name in ("usr", "lib", "lib64", "bin", "sbin", "etc/ssl", "etc/passwd", "etc/hosts", "etc/nsswitch.conf", "etc/ld.so.cache"):
        path = Path("/", name)
        if path.is_symlink(): told += ["--symlink", os.readlink(path), str(path)]
        elif path.exists(): told += ["--ro-bind", str(path), str(path)]
    for source, target in ((base, base), (sys.prefix, "/opt/venv"), *((ROOT / n, f"/srv/reco/{n}") for n in ("app", "data", "flows", "nbs", "reco", "settings.ini"))):
        told += ["--ro-bind", str(Path(source).resolve()), target]
    told += ["--dev", "/dev", "--proc", "/proc"]
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001 and c["securityContext"]["readOnlyRootFilesystem"]
    for mount in c["volumeMounts"]:
        own = volumes.get(mount["name"])
        told += ["--ro-bind" if mount.get("readOnly") else "--bind", str(own), mount["mountPath"]] if own else ["--tmpfs", mount["mountPath"]]
    image = {"PATH": "/opt/venv/bin:/usr/bin:/bin", "PYTHONPATH": "/srv/reco", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp", "RECO_SETTINGS": "/srv/reco/settings.ini",
             "NUMBA_CACHE_DIR": "/var/lib/reco/numba"}
    return [*told, "--remount-ro", "/", "--chdir", "/srv/reco", "--clearenv", *[x for k, v in (image | env).items() for x in ("--setenv", k, v)], *c["args"]]


def test_a_flow_runs_as_its_pod_would(tmp_path):
    """Metaflow, the lake and ingestion write to what is mounted, and nowhere else."""
    import boto3
    from s3 import KEY, SECRET, moto
    raw, files = tmp_path / "raw", tmp_path / "files"
    files.mkdir()
    for m in MADE["small"]:
        if m["kind"] == "ConfigMap" and component(m) == "files": (files / "rules.toml").write_text(m["data"]["rules.toml"])
    subprocess.run([sys.executable, "data/generators/generate_shop.py", "--out", str(raw)], cwd=ROOT, check=True, capture_output=True,
                   env=os.environ | {"RECO_SIMULATOR_USERS": "500", "RECO_SIMULATOR_ITEMS": "100", "RECO_SIMULATOR_EVENTS": "5000"})
    d, pod, c = next(found for found in all_containers("small") if found[2]["name"] == "ingest")
    with moto() as s3:
        client = boto3.client("s3", endpoint_url=s3, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")
        client.create_bucket(Bucket="reco")
        env = environment("small", d, c) | {"RECO_LAKE_ENDPOINT": s3, "RECO_LAKE_ACCESS_KEY": KEY, "RECO_LAKE_SECRET_KEY": SECRET, "RECO_DATA_SOURCE": "simulator",
                                            "RECO_ONLINE_URL": "", "RECO_TRACKING_ENABLED": "false"}
        mounted = copy.deepcopy(c) | {"volumeMounts": [*c["volumeMounts"], {"name": "raw", "mountPath": "/var/lib/reco/raw"}]} # flows.dataClaim
        done = subprocess.run(as_its_pod(pod, mounted, env, {"raw": raw, "files": files}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3_000:]
        kept = {o["Key"].split("/")[0] for o in client.list_objects_v2(Bucket="reco")["Contents"]}
    assert {"lake", "metaflow"} <= kept, "what the next pod needs is on S3"


# What the chart's own few lines of program do -------------------------------------------------------------------------


class Lists:
    """Answers as the endpoint does, with some items or none."""
    def __init__(self, items: int) -> None: self.items, self.asked = items, []

    async def __call__(self, scope: dict, receive, send) -> None:
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        self.asked.append((scope["path"], headers.get("x-api-key")))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps({"recommendations": [{"item_id": f"i{n}"} for n in range(self.items)]}).encode()})


@pytest.mark.parametrize(("items", "code"), [(5, 0), (0, 1)])
def test_helms_test_asks_for_a_list(items, code):
    (pod,) = (d for d in MADE["small"] if d["kind"] == "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    args = pod["spec"]["containers"][0]["args"]
    service = Lists(items)
    with listening(service) as port:
        done = subprocess.run([sys.executable, *args[1:3], f"http://127.0.0.1:{port}"], env={"RECO_SERVING_CLIENT_KEYS": f"{'a' * 40} {'b' * 40}"}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert service.asked == [("/recommendations/v1/somebody", "a" * 40)] and args[3] == "http://endpoint-reco:8000"


def test_a_pod_waits_until_something_is_published(tmp_path):
    wait = next(c for d, _, c in all_containers("small") if c["name"] == "wait")
    words = wait["args"][2].replace("sleep 10", "sleep 0.2")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RECO_BUNDLES_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    waiting = subprocess.Popen([*wait["args"][:2], words], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert waiting.stdout.readline() == "no bundle is published yet\n" and waiting.poll() is None
        (tmp_path / "current").write_text("2026-05-01T000000Z-1a2b3c4d\n")
        assert waiting.wait(120) == 0
    finally: waiting.kill()


def test_the_adapters_rule_gives_each_pod_its_p95(tmp_path):
    promtool = shutil.which("promtool") or pytest.skip("needs promtool: make services")
    (rule,) = yaml.safe_load((CHART / "adapter.yaml").read_text())
    assert rule["name"]["as"] == VALUES["endpoint"]["autoscaling"]["latency"]["metric"] and rule["seriesQuery"].startswith("reco_http_request_seconds_bucket{")
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.Series>>", "reco_http_request_seconds_bucket").replace("<<.LabelMatchers>>", 'namespace="reco"')
    series = lambda pod, route, le, step: {"series": f'reco_http_request_seconds_bucket{{namespace="reco",pod="{pod}",route="{route}",le="{le}"}}', "values": f"0+{step}x20"}
    route = "/recommendations/v1/{user_id:text}"
    inputs = [series("a", route, "0.05", 90), series("a", route, "0.1", 100), series("a", route, "+Inf", 100), # 90 of 100 within 50 ms: p95 is half of the way to 100
              series("a", "/events/v1", "0.05", 0), series("a", "/events/v1", "0.1", 0), series("a", "/events/v1", "+Inf", 9000), # no list, however slow
              series("b", route, "0.05", 0), series("b", route, "0.1", 0), series("b", route, "+Inf", 0)] # nobody asks it
    tests = {"rule_files": [], "evaluation_interval": "1m", "tests": [{"interval": "1m", "input_series": inputs,
             "promql_expr_test": [{"expr": f"round({query}, 0.001)", "eval_time": "10m", "exp_samples": [{"labels": '{pod="a"}', "value": 0.075}]}]}]}
    (tmp_path / "adapter.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run([promtool, "test", "rules", str(tmp_path / "adapter.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_of_a_machine_is_in_it():
    for path in CHART.parent.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts: assert not re.search(r"/(work|root|tmp/wt)/", path.read_text()), path
