"""The TypeScript types are those of the contract, and their README's example runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shop_floor import listening

from app.contract import create_app
from app.serve import Replica

HERE = Path(__file__).resolve().parents[1] / "clients" / "typescript"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with its packages, elsewhere."""
    if not shutil.which("npm"): pytest.skip("needs Node and npm (apt-get install nodejs npm)")
    root = tmp_path_factory.mktemp("typescript") / "typescript"
    shutil.copytree(HERE, root, ignore=shutil.ignore_patterns("node_modules", "openapi.json"))
    done = subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=root, capture_output=True, text=True, timeout=300)
    if done.returncode: pytest.skip(f"npm ci cannot fetch the packages of {HERE.name}/package-lock.json: {(done.stderr or done.stdout).strip()[-200:]}")
    return root


def test_the_types_are_those_of_the_contract(folder):
    made = subprocess.run([sys.executable, str(HERE / "openapi.py")], capture_output=True, text=True, check=True).stdout
    (folder / "openapi.json").write_text(made)
    subprocess.run(["npx", "--no-install", "openapi-typescript", "openapi.json", "--output", "now.d.ts"], cwd=folder, check=True, capture_output=True)
    assert (folder / "now.d.ts").read_text() == (HERE / "reco.d.ts").read_text(), "run `make client`"
    assert all(f'"{path}"' in (HERE / "reco.d.ts").read_text() for path in json.loads(made)["paths"])


def test_the_example_of_the_readme_runs(folder, bundle, store):
    block = re.search(r"```ts\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    replica = Replica()
    replica.bundle, replica.store = bundle, store
    with listening(create_app(replica)) as port:
        (folder / "example.mts").write_text(block.replace(":8000", f":{port}").replace('"./reco"', '"./reco.d.ts"'))
        tsc = ["npx", "--no-install", "tsc", "--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom", "example.mts"]
        checked = subprocess.run(tsc, cwd=folder, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
        done = subprocess.run(["node", "example.mjs"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert len(lines) >= 3 and all(line.split()[0] in set(bundle.items["item_id"]) for line in lines[:-2]) and re.match(r"exposure \w{8,}", lines[-2])


def test_a_wrong_question_does_not_compile(folder):
    (folder / "wrong.mts").write_text("""import type { paths } from "./reco.d.ts";
const query: NonNullable<paths["/recommendations/v1/{user_id}"]["get"]["parameters"]["query"]> = { surface: "home" };\n""")
    tsc = ["npx", "--no-install", "tsc", "--noEmit", "--strict", "--module", "nodenext", "wrong.mts"]
    done = subprocess.run(tsc, cwd=folder, capture_output=True, text=True)
    assert done.returncode and '"home"' in done.stdout


def test_the_lock_names_no_host():
    assert '"resolved"' not in (HERE / "package-lock.json").read_text()
