"""The images of deploy/docker, installed and started from what their files say; and all of docker-compose.yml that runs here, in a network of its own (platform_checks.py)."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from composing import composed
from images import Image, built, ran, sandbox_program

from deploy import make_env

ROOT = Path(__file__).parents[1]
NAMES = "endpoint", "app", "flows"


@pytest.fixture(scope="module")
def images() -> Iterator[dict[str, Image]]:
    sandbox_program()
    with tempfile.TemporaryDirectory(prefix="images") as folder: # six gigabytes: not kept, as pytest keeps its folders
        yield {name: built(name, Path(folder, name)) for name in NAMES}


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder that other users of this machine can enter, such as the server's of PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="platform") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def installed(image: Image) -> dict[str, str]:
    """Name → version."""
    site = next((image.folder / "opt/venv/lib").glob("python*/site-packages"))
    return {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in distributions(path=[str(site)])}


def locked() -> dict[str, set[str]]:
    """Name → versions; some have one for each Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE): found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_what_the_lock_says_and_no_more_than_it_needs(images, name):
    have, lock = installed(images[name]), locked()
    off = {n: v for n, v in have.items() if v.partition("+")[0] not in lock.get(n, set())}
    assert not off and len(have) > 50
    never = {"endpoint": {"torch", "mlflow", "streamlit", "metaflow", "duckdb", "jupyterlab", "pytest"}, "app": {"torch", "mlflow", "metaflow", "jupyterlab", "pytest"},
             "flows": {"streamlit", "jupyterlab", "pytest"}}[name]
    needed = {"endpoint": {"ray", "confluent-kafka", "lightgbm"}, "app": {"streamlit", "mlflow-skinny"}, "flows": {"metaflow", "torch", "mlflow", "cronsim", "psycopg"}}[name]
    assert not never & set(have) and needed <= set(have)


@pytest.mark.parametrize(("name", "modules"), [("endpoint", "app.serve app.consumer app.alive app.bundle app.erase"), ("app", "app.dashboard app.alive"),
                                               ("flows", "app.bootstrap app.schedule app.bundle app.what_if app.alive mlflow.cli")])
def test_its_programs_can_be_imported_as_its_user(images, tmp_path, name, modules):
    code = f"import importlib, os; [importlib.import_module(m) for m in {modules.split()!r}]; assert os.getuid() == os.getgid() == 10001"
    ended, said = ran(images[name], tmp_path / "log", ["python", "-c", code], 120, memory=("/tmp", "/var/lib/reco"))
    assert ended == 0, said


def test_every_flow_and_notebook_is_in_the_image_of_flows(images, tmp_path):
    flows = sorted(p.stem for p in (ROOT / "flows").glob("*.py") if re.search(r"\(FlowSpec\)", p.read_text()))
    code = "import pathlib, runpy, sys; sys.path.insert(0, 'flows'); [runpy.run_path(f'flows/{f}.py', run_name='flow') for f in sys.argv[1:]]; assert all(" \
           "pathlib.Path('nbs', f'{n}.ipynb').is_file() for n in __import__('base').SETTINGS.reports.notebooks.split())"
    ended, said = ran(images["flows"], tmp_path / "log", ["python", "-c", code, *flows], 180, memory=("/tmp", "/var/lib/reco"))
    assert ended == 0, said


def test_a_setting_that_is_wrong_ends_a_container_with_one_line(images, tmp_path):
    for env, why in (({}, "there is no key"), ({"RECO_SERVING_CLIENT_KEYS": "short"}, "5 characters"), ({"RECO_SERVNG_PORT": "1"}, "RECO_SERVNG_PORT")):
        ended, said = ran(images["endpoint"], tmp_path / "log", ["python", "-m", "app.serve"], 60, env=env, memory=("/tmp", "/var/lib/reco"))
        assert ended == 1 and "Traceback" not in said, said
        assert why in said or "nothing is published" in said, said


def test_the_platform(images, root):
    hosts, names = root / "hosts", composed(make_env.lines_of(make_env.filled((ROOT / ".env.example").read_text(), {})))["services"]
    hosts.write_text("127.0.0.1 localhost " + " ".join(names) + "\n")
    told = os.environ | {"PLATFORM_ROOT": str(root), "PLATFORM_IMAGES": json.dumps({n: dataclasses.asdict(i) | {"folder": str(i.folder)} for n, i in images.items()})}
    for name in [n for n in told if n.startswith("RECO_") or n.lower().endswith("_proxy")]: del told[name]
    inside = [sandbox_program(), "--dev-bind", "/", "/", "--ro-bind", str(hosts), "/etc/hosts", "--unshare-net", "--die-with-parent"]
    done = subprocess.run([*inside, sys.executable, "-m", "pytest", "-q", "-s", "-rs", "-p", "no:cacheprovider", "tests/platform_checks.py"], cwd=ROOT, env=told, capture_output=True, text=True, timeout=1_100)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]
    if missing := re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE): pytest.skip("; ".join(missing))
    assert re.search(r"\d+ passed", done.stdout)
