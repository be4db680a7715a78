"""docker-compose.yml and the Dockerfiles against the code: each path, port, variable, secret, module and health check that they name is there, and what must not be is not."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from composing import FILE, composed, interpolated, mounts, tmpfs, variables, words
from images import FOLDER, assigned, context, instructions
from starlette.routing import Route

from app.contract import create_app
from app.serve import Replica
from deploy import make_env
from reco.settings import load_settings

ROOT = Path(__file__).parents[1]
OURS = {"reco/endpoint:0.1.0", "reco/app:0.1.0", "reco/flows:0.1.0", "reco/lab:0.1.0"}
ONCE = {"volumes", "bootstrap", "flows"}
PORTS = {"minio": 9000, "redis": 6379, "postgres": 5432, "redpanda": 9092, "mlflow": 5000, "endpoint": 8000, "consumer": 9201, "app": 8501, "gateway": 8080,
         "prometheus": 9090, "alertmanager": 9093, "node-exporter": 9100, "grafana": 3000}


def env() -> dict[str, str]: return make_env.lines_of(make_env.filled((ROOT / ".env.example").read_text(), {}))


@pytest.fixture(scope="module")
def compose() -> dict: return composed(env())


@pytest.fixture(scope="module")
def services(compose) -> dict[str, dict]: return compose["services"]


def each() -> list[str]: return list(yaml.safe_load(FILE.read_text())["services"])


def test_two_programs_that_read_such_files_find_nothing_wrong(tmp_path):
    check = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    if not shutil.which("docker-compose"): pytest.skip("needs docker-compose: make services")
    for name in ("docker-compose.yml", ".env.example", "settings.ini"): shutil.copy(ROOT / name, tmp_path)
    refused = subprocess.run(["docker-compose", "config", "--quiet"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert refused.returncode and "run make env" in refused.stderr, refused.stderr
    assert make_env.main(tmp_path) == 0
    done = subprocess.run(["docker-compose", "config"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    theirs = yaml.safe_load(done.stdout)["services"] # what it makes of variables and anchors is what our reading of the file makes of them
    ours = composed(make_env.lines_of((tmp_path / ".env").read_text()))["services"]
    assert {n: {k: str(v) for k, v in s.get("environment", {}).items()} for n, s in theirs.items()} == \
           {n: {k: str(v) for k, v in s.get("environment", {}).items()} for n, s in ours.items() if n in theirs}
    assert set(ours) - set(theirs) <= {"flows", "lab"}


def test_variables_are_in_the_example_and_nothing_there_is_a_secret_that_all_would_share():
    asked, example = variables(), make_env.lines_of((ROOT / ".env.example").read_text())
    secrets = {name for name, value in example.items() if value == "secret"}
    assert {n for n, kinds in asked.items() if "?" in kinds} == secrets - {"PEOPLE_PASSWORD"} # which goes into a file alone
    assert not [n for n, kinds in asked.items() if "" in kinds and n in secrets]
    optional = {"GATEWAY_LISTEN", "GATEWAY_MODE", "GATEWAY_REDIRECT", "LAB_USER"} # of TLS and of the lab
    assert set(asked) - set(example) == optional and set(example) - set(asked) == {"PEOPLE_PASSWORD"}
    text = FILE.read_text()
    assert not re.search(r"(?i)(password|secret|token|key)\w*:\s*[\"']?[A-Za-z0-9]{4,}[\"']?\s*$", text, re.MULTILINE)


@pytest.mark.parametrize("name", each())
def test_a_service_is_whole(services, compose, name):
    service = services[name]
    image, _, tag = service["image"].partition(":")
    assert re.search(r"\d", tag) and "latest" not in tag and (image.startswith("reco/") == (service["image"] in OURS))
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"]) and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("read_only") is (name != "redpanda") and any(t.startswith("/tmp:") for t in service["tmpfs"])
    assert set(service["networks"]) <= set(compose["networks"]) and "inside" in service["networks"]
    assert service["restart"] == {"volumes": "no", "flows": "no", "bootstrap": "on-failure:3"}.get(name, "unless-stopped")
    assert bool(service.get("healthcheck")) == (name not in ONCE | {"scheduler", "lab"})
    for other, how in service.get("depends_on", {}).items():
        wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert other in services and how == {"condition": wanted} and (other in ONCE or services[other].get("healthcheck"))
    for mount in mounts(service):
        if mount.source.startswith("."): assert (ROOT / mount.source).exists() and (mount.read_only or name == "lab"), mount
        else: assert mount.source in compose["volumes"], mount


def test_nothing_is_published_but_the_gateway_and_what_a_person_at_this_machine_opens(services):
    assert {name: s["ports"] for name, s in services.items() if "ports" in s} == {"gateway": ["127.0.0.1:8080:8080"], "lab": ["127.0.0.1:8888:8888"]}
    assert services["lab"]["profiles"] == ["lab"] and all("network_mode" not in s and not s.get("privileged") for s in services.values())


def test_who_reaches_the_internet_is_who_sends_messages(services, compose):
    assert compose["networks"]["inside"] == {"internal": True}
    assert {n for n, s in services.items() if "outside" in s["networks"]} == {"endpoint", "scheduler", "gateway", "alertmanager", "flows", "lab"}


def test_order_has_no_circle(services):
    done: set[str] = set()
    while left := {n for n in services if n not in done}:
        ready = {n for n in left if set(services[n].get("depends_on", {})) <= done}
        assert ready, f"each of {left} waits for another"
        done |= ready


@pytest.mark.parametrize("name", [n for n in each()])
def test_what_our_programs_are_told_is_understood(services, name):
    service = services[name]
    if service["image"] not in OURS or name in ("mlflow",): return
    told = {k: str(v) for k, v in service["environment"].items()}
    settings = load_settings(ROOT / "settings.ini", {k: v for k, v in told.items() if k.startswith("RECO_")}) # raises for a name or value that it does not know
    assert settings.lake.root == "s3://reco/lake" and settings.bundles.root == "s3://reco/bundles"
    others = {k for k in told if not k.startswith("RECO_")}
    assert others <= {"STREAMLIT_SERVER_ADDRESS", "STREAMLIT_SERVER_BASE_URL_PATH", "JUPYTER_TOKEN"}
    dockerfile = {"reco/endpoint:0.1.0": "endpoint", "reco/app:0.1.0": "app"}.get(service["image"], "flows")
    run = words(service["command"]) if "command" in service else [w.strip('"') for w in re.findall(r'"[^"]*"', dict(instructions((FOLDER / f"{dockerfile}.Dockerfile").read_text()))["CMD"])]
    if run[:2] == ["python", "-m"]: assert (ROOT / f"{run[2].replace('.', '/')}.py").is_file()


def test_every_address_that_is_named_is_a_service_at_its_port(services):
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, PORTS))}):(\d{{4,5}})\b")
    files = [FILE, *(ROOT / "deploy" / "compose").rglob("*.yml")]
    found = [(m[1], int(m[2])) for f in files for m in pattern.finditer(f.read_text()) if not m[2] == "9"]
    assert len(found) > 20 and not [(n, p) for n, p in found if PORTS[n] != p and (n, p) != ("redpanda", 33145)]
    assert {n for n, _ in found} >= {"minio", "redis", "postgres", "redpanda", "mlflow", "endpoint", "app", "grafana", "prometheus", "alertmanager"}
    for name in ("endpoint", "app", "flows"):
        exposed = {int(p) for p in dict(instructions((FOLDER / f"{name}.Dockerfile").read_text()))["EXPOSE"].split()}
        mine = {PORTS[n] for n, s in services.items() if n in PORTS and s["image"] == f"reco/{name}:0.1.0"}
        assert mine <= exposed


def test_health_checks_ask_what_the_programs_answer(services):
    routes = {r.path for r in create_app(Replica()).routes if isinstance(r, Route)}
    asked = {n: [w for w in s["healthcheck"]["test"] if "http" in w] for n, s in services.items() if s.get("healthcheck")}
    for name, urls in asked.items():
        for url in urls: assert re.fullmatch(rf"http://127\.0\.0\.1:{PORTS[name]}/.*", url), (name, url)
    assert asked["endpoint"] == ["http://127.0.0.1:8000/health"] and "/health" in routes
    assert asked["app"] == ["http://127.0.0.1:8501/app/_stcore/health"] and services["app"]["environment"]["STREAMLIT_SERVER_BASE_URL_PATH"] == "app"
    assert services["endpoint"]["environment"].get("RECO_SERVING_PORT", "8000") == "8000"
    for name in ("endpoint", "app"): # the images say the same
        own = dict(instructions((FOLDER / f"{name}.Dockerfile").read_text()))["HEALTHCHECK"]
        assert asked[name][0] in own


def test_the_gateway_is_told_all_that_its_files_ask_for_and_no_more(services):
    text = "".join(p.read_text() for p in (ROOT / "deploy" / "nginx" / "templates").iterdir())
    asked, told = set(re.findall(r"\$\{(\w+)\}", text)), set(services["gateway"]["environment"])
    assert told - asked == {"NGINX_ENVSUBST_FILTER"} and asked <= told
    filtered = re.compile(services["gateway"]["environment"]["NGINX_ENVSUBST_FILTER"])
    assert all(filtered.match(name) for name in asked)
    assert interpolated("${A:-b} ${A:?c} $$x", {"A": "1"}) == "1 1 $x" and interpolated("${A:-b}", {}) == "b"


def test_prometheus_finds_its_targets_and_grafana_its_boards(services):
    there, mine = ROOT / "deploy" / "prometheus" / "targets", ROOT / "deploy" / "compose" / "targets"
    assert {p.name for p in there.iterdir()} == {p.name for p in mine.iterdir()}
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    named = set(re.findall(r"targets/(\w+\.yml)", str(config)))
    assert named == {p.name for p in mine.iterdir()}
    boards = yaml.safe_load((ROOT / "deploy" / "grafana" / "provisioning" / "dashboards" / "reco.yml").read_text())["providers"][0]["options"]["path"]
    assert boards in {m.target for m in mounts(services["grafana"])}
    ours, theirs = (yaml.safe_load((ROOT / "deploy" / p / "datasources" / "prometheus.yml").read_text()) for p in ("compose", "grafana/provisioning"))
    assert ours["datasources"][0] | {"url": ""} == theirs["datasources"][0] | {"url": ""}
    figures = Path(services["scheduler"]["environment"]["RECO_MONITOR_TEXTFILE"]).parent
    assert {m.target for m in mounts(services["scheduler"]) if m.source == "figures"} == {str(figures)}


def test_secrets_are_files_that_make_env_writes(compose, services, tmp_path):
    shutil.copy(ROOT / ".env.example", tmp_path)
    assert make_env.main(tmp_path) == 0
    assert {Path(s["file"]).name for s in compose["secrets"].values()} == {p.name for p in (tmp_path / "deploy" / "secrets").iterdir()}
    used = {s if isinstance(s, str) else s["source"] for service in services.values() for s in service.get("secrets", [])}
    assert used == set(compose["secrets"])
    ignored = subprocess.run(["git", "check-ignore", ".env", *(s["file"] for s in compose["secrets"].values())], cwd=ROOT, capture_output=True, text=True)
    assert len(ignored.stdout.splitlines()) == 1 + len(compose["secrets"])


# ---- make env -------------------------------------------------------------------------------------------------------


def made(root: Path, **have: str) -> tuple[int, dict[str, str]]:
    shutil.copy(ROOT / ".env.example", root)
    if have: (root / ".env").write_text("".join(f"{k}={v}\n" for k, v in have.items()))
    code = make_env.main(root)
    return code, make_env.lines_of((root / ".env").read_text()) if (root / ".env").exists() else {}


def test_make_env_writes_strong_secrets_once_and_keeps_what_is_there(tmp_path, capsys):
    code, first = made(tmp_path)
    secret = {v for k, v in first.items() if re.search("KEY|PASSWORD|TOKEN", k)}
    assert code == 0 and len(secret) == sum(bool(re.search("KEY|PASSWORD|TOKEN", k)) for k in first) and all(len(v) == 40 for v in secret)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600 and stat.S_IMODE((tmp_path / "deploy" / "secrets").stat().st_mode) == 0o700
    assert not secret & set(capsys.readouterr().out.split())
    people = (tmp_path / "deploy" / "secrets" / "people").read_text()
    (tmp_path / ".env").write_text((tmp_path / ".env").read_text().replace("RECO_PORT=8080", "RECO_PORT=9") + "MINE=1\n")
    assert make_env.main(tmp_path) == 0
    second = make_env.lines_of((tmp_path / ".env").read_text())
    assert second == first | {"RECO_PORT": "9", "MINE": "1"} and first["PEOPLE_PASSWORD"] not in people and people != (tmp_path / "deploy" / "secrets" / "people").read_text()


def test_keys_of_the_gateway_are_the_keys_of_the_endpoint(tmp_path):
    _, found = made(tmp_path, CLIENT_KEYS="a" * 20 + " " + "b" * 20)
    lines = (tmp_path / "deploy" / "secrets" / "keys.map").read_text().splitlines()
    told = composed(found)["services"]["endpoint"]["environment"]
    wanted = {(k, role) for role in ("client", "admin") for k in told[f"RECO_SERVING_{role.upper()}_KEYS"].split()}
    assert {re.fullmatch(r'"(.+)" (client|admin);', line).groups() for line in lines} == wanted and len(wanted) == 5


@pytest.mark.parametrize(("have", "why"), [
    ({"CLIENT_KEYS": "short"}, "5 characters"), ({"ADMIN_KEYS": 'x" admin; "' + "y" * 20}, "letters, digits"), ({"REDIS_PASSWORD": "p@ss:word/with#all"}, "REDIS_PASSWORD"),
    ({"CLIENT_KEYS": "k" * 30, "ADMIN_KEYS": "k" * 30}, "1 keys are a client's and an admin's"), ({"lower": "x"}, "line 1")])
def test_what_a_program_would_stumble_over_is_said_here_and_nothing_is_written(tmp_path, capsys, have, why):
    shutil.copy(ROOT / ".env.example", tmp_path)
    (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in have.items()))
    assert make_env.main(tmp_path) == 1
    said = capsys.readouterr().err
    assert why in said and not any(len(v) > 8 and v in said for v in have.values()) and not (tmp_path / "deploy").exists()


def test_make_env_needs_nothing_but_python():
    tree = ast.parse((ROOT / "deploy" / "make_env.py").read_text())
    names = {(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)


# ---- Dockerfiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [p.stem for p in sorted(FOLDER.glob("*.Dockerfile"))])
def test_a_dockerfile_is_written_with_care(name):
    lines = instructions((FOLDER / f"{name}.Dockerfile").read_text())
    words_of = [w for w, _ in lines]
    froms = [rest for word, rest in lines if word == "FROM"]
    last = lines[len(lines) - 1 - words_of[::-1].index("FROM"):]
    assert len(froms) == 2 and all("${PYTHON}" in f for f in froms) and re.search(r"^ARG PYTHON=3\.11\.\d+-slim-bookworm$", (FOLDER / f"{name}.Dockerfile").read_text(), re.MULTILINE)
    assert "ADD" not in words_of and not any(re.search(r"curl|wget|sudo|\.git\b", rest) for word, rest in lines if word == "RUN")
    for word, rest in lines:
        if word == "RUN" and "apt-get install" in rest: assert "--no-install-recommends" in rest and rest.endswith("rm -rf /var/lib/apt/lists/*") and "tini" in rest
        if word == "ENV": assert not [k for k in assigned(rest) if re.search("PASSWORD|TOKEN|SECRET|_KEYS?$", k)]
    user = [n for n, (word, _) in enumerate(last) if word == "USER"]
    assert len(user) == 1 and last[user[0]][1] == "10001:10001" and not any(word in ("RUN", "COPY") for word, _ in last[user[0]:])
    assert ("ENTRYPOINT", '["tini", "--"]') in last and words_of.count("CMD") == 1
    uv = re.search(r"uv==([\d.]+)", (ROOT / "Makefile").read_text())[1]
    assert any(f"uv=={uv}" in rest for word, rest in lines if word == "RUN")
    assert any("--constraint requirements.lock" in rest for word, rest in lines if word == "RUN")
    named, known = [r.split()[:-1] for word, r in last if word == "COPY" and not r.startswith("--from")], {str(f) for f in context()}
    for source in [s for part in named for s in part]: assert any(k == source or k.startswith(f"{source}/") for k in known), source


def test_what_is_sent_to_be_built_is_code_and_nothing_else():
    files = [str(f) for f in context()]
    assert {f.split("/")[0] for f in files} == {"pyproject.toml", "requirements.lock", "settings.ini", "LICENSE", "reco", "app", "flows", "nbs", "data"}
    assert not [f for f in files if re.search(r"\.env|secret|/raw/|/lake/|\.parquet$|\.ipynb$", f) and not re.fullmatch(r"nbs/9[012]_\w+\.ipynb", f)]
    assert sum((ROOT / f).stat().st_size for f in files) < 20e6


def test_folders_of_volumes_belong_to_the_images_user(services):
    for name, service in services.items():
        if service["image"] not in OURS - {"reco/lab:0.1.0"}: continue
        dockerfile = (FOLDER / f"{service['image'].split('/')[1].split(':')[0]}.Dockerfile").read_text()
        owned = set(re.search(r"install -d -o reco -g reco ([^\n&]+)", dockerfile)[1].split())
        wanted = {m.target for m in mounts(service) if not m.source.startswith(".")}
        assert wanted <= owned, (name, wanted, owned)
        assert wanted | set(tmpfs(service)) >= {"/var/lib/reco"} or name == "mlflow", name
