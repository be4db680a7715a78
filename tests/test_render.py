"""render.yaml: a blueprint whose files, variables, ports and references are ours; Render's own schema is not to be had here, so the fields used are held to its reference by hand."""

import re
from pathlib import Path

import yaml
from images import FOLDER, instructions

from reco.settings import load_settings

ROOT = Path(__file__).parents[1]
BLUEPRINT = yaml.safe_load((ROOT / "render.yaml").read_text())
FIELDS = {"web": {"type", "name", "runtime", "dockerfilePath", "dockerContext", "plan", "numInstances", "healthCheckPath", "maxShutdownDelaySeconds", "envVars"},
          "worker": {"type", "name", "runtime", "dockerfilePath", "dockerContext", "dockerCommand", "plan", "numInstances", "maxShutdownDelaySeconds", "envVars"},
          "keyvalue": {"type", "name", "plan", "maxmemoryPolicy", "ipAllowList"}}
SERVICES = {s["name"]: s for s in BLUEPRINT["services"]}


def variables(service: dict) -> dict[str, dict]: return {v["key"]: v for v in service.get("envVars", [])}


def test_fields_are_those_of_the_reference_and_each_variable_has_one_source():
    assert set(BLUEPRINT) == {"services", "databases"}
    for service in SERVICES.values():
        assert set(service) <= FIELDS[service["type"]]
        for variable in service.get("envVars", []):
            assert len(set(variable) & {"value", "sync", "generateValue", "fromService", "fromDatabase"}) == 1 and len(variable) == 2, variable
            assert not isinstance(variable.get("value", ""), bool) and not re.search("SECRET|KEYS?$|PASSWORD", variable["key"]) or "value" not in variable, variable


def test_what_is_taken_of_another_service_is_there():
    for service in SERVICES.values():
        for variable in service.get("envVars", []):
            if not (source := variable.get("fromService")): continue
            other = SERVICES[source["name"]]
            assert other["type"] == source["type"]
            if "envVarKey" in source: assert source["envVarKey"] in variables(other) or source["envVarKey"].startswith("RENDER_")
            else: assert source["property"] == "connectionString" and other["type"] == "keyvalue"


def test_programs_understand_what_they_are_told():
    sample = {"RECO_LAKE_ROOT": "s3://b/lake", "RECO_BUNDLES_ROOT": "s3://b/bundles", "RECO_LAKE_REGION": "us-east-1", "RECO_ONLINE_URL": "redis://red-1:6379",
              "RECO_APP_ENDPOINT": "https://reco-endpoint.onrender.com"}
    for service in SERVICES.values():
        told = {k: str(v.get("value", sample.get(k, "x" * 30))) for k, v in variables(service).items() if k.startswith("RECO_")}
        settings = load_settings(ROOT / "settings.ini", told | {k: "" for k in told if k == "RECO_LAKE_ENDPOINT"})
        if service["name"] == "reco-endpoint": assert settings.serving.host == "0.0.0.0" and settings.serving.admin_keys.get_secret_value()


def test_images_ports_and_health_checks_are_those_of_the_dockerfiles():
    for service in SERVICES.values():
        if service["type"] == "keyvalue": continue
        path = ROOT / service["dockerfilePath"]
        said = dict(instructions(path.read_text()))
        assert path.parent == FOLDER and service["dockerContext"] == "."
        if service["type"] == "web":
            assert variables(service)["PORT"]["value"] in said["EXPOSE"].split()
            assert f":{variables(service)['PORT']['value']}{service['healthCheckPath']}\"" in said["HEALTHCHECK"]
        else: assert service["dockerCommand"].startswith("tini -- python -m app.consumer")


def test_the_page_names_the_plans_that_the_blueprint_has():
    page = (ROOT / "docs" / "operations" / "render.md").read_text()
    for plan in {s["plan"] for s in SERVICES.values()} | {d["plan"] for d in BLUEPRINT["databases"]}: assert f"| {plan} |" in page
