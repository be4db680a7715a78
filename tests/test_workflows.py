"""GitHub's files: they are what GitHub reads, they run what the Makefile has, with no more rights and time than they need; releases agree with themselves."""

import re
import runpy
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
FILES = sorted((GITHUB / "workflows").glob("*.yml"))
FLOWS = {p.name: yaml.safe_load(p.read_text()) for p in FILES}
ACTION = yaml.safe_load((GITHUB / "actions/install/action.yml").read_text())
JOBS = {f"{name}:{job}": body for name, flow in FLOWS.items() for job, body in flow["jobs"].items()}
STEPS = {f"{job}:{n}": step for job, body in JOBS.items() for n, step in enumerate(body.get("steps", []))} | {
    f"install:{n}": step for n, step in enumerate(ACTION["runs"]["steps"])}
RUNS = {at: step["run"] for at, step in STEPS.items() if "run" in step}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z]+):.*##", MAKEFILE, re.MULTILINE))
RELEASE = runpy.run_path(str(ROOT / "deploy/release.py"))
EXPRESSION = re.compile(r"\$\{\{.*?\}\}", re.DOTALL)


def schema(name: str, *paths: Path) -> subprocess.CompletedProcess:
    tool = Path(sys.executable).with_name("check-jsonschema")
    return subprocess.run([tool, "--builtin-schema", name, *paths], capture_output=True, text=True)


@pytest.mark.parametrize(("name", "files"), [
    ("vendor.github-workflows", "workflows/*.yml"), ("vendor.github-actions", "actions/*/action.yml"), ("vendor.dependabot", "dependabot.yml"),
    ("vendor.github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"), ("vendor.github-issue-config", "ISSUE_TEMPLATE/config.yml"),
    ("vendor.citation-file-format", "../CITATION.cff")])
def test_files_fit_their_schema_and_broken_ones_do_not(name, files, tmp_path):
    paths = [*GITHUB.glob(files)] if "../" not in files else [ROOT / files.removeprefix("../")]
    done = schema(name, *paths)
    assert paths and done.returncode == 0, done.stdout + done.stderr
    for path in paths:
        (broken := tmp_path / path.name).write_text(path.read_text() + "\nnobody-knows-this: {a: 1}\n")
        assert schema(name, broken).returncode != 0, path


def test_each_workflow_of_the_contract_is_there():
    assert set(FLOWS) == {f"{n}.yml" for n in ("ci", "security", "images", "chart", "compose", "docs", "release")}


def triggers(flow: dict) -> dict | list:
    return flow.get("on", flow.get(True)) # YAML 1.1 takes `on` for a truth


@pytest.mark.parametrize("name", FLOWS)
def test_a_workflow_has_no_right_by_itself_and_one_run_at_a_time(name):
    flow = FLOWS[name]
    assert flow["permissions"] == {}
    assert "github.ref" in flow["concurrency"]["group"] and "cancel-in-progress" in flow["concurrency"]
    assert not {"pull_request_target", "workflow_run", "issue_comment"} & {*triggers(flow)} # with rights of the repository, on somebody else's code


@pytest.mark.parametrize("at", JOBS)
def test_a_job_says_what_it_may_do_and_how_long(at):
    job = JOBS[at]
    assert job["permissions"] and set(job["permissions"].values()) <= {"read", "write"}
    assert "uses" in job or 5 <= job["timeout-minutes"] <= 180 # a job that calls a workflow has that one's
    writes = {k for k, v in job["permissions"].items() if v == "write"}
    allowed = {"security.yml:codeql": {"security-events"}, "docs.yml:deploy": {"pages", "id-token"}, "images.yml:push": {"packages"},
               "release.yml:package": {"id-token", "attestations"}, "release.yml:images": {"packages"}, "release.yml:chart": {"packages"}, "release.yml:release": {"contents"}}
    assert writes == allowed.get(at, set())


def test_nothing_is_pushed_but_for_a_release():
    assert "tags" in triggers(FLOWS["release.yml"])["push"] and set(triggers(FLOWS["release.yml"])) == {"push"}
    assert "inputs.push" in FLOWS["images.yml"]["jobs"]["push"]["if"] and "refs/tags/v" in FLOWS["images.yml"]["jobs"]["push"]["if"]
    assert triggers(FLOWS["images.yml"])["workflow_call"]["inputs"]["push"]["default"] is False
    assert [at for at, s in STEPS.items() if s.get("with", {}).get("push")] == [at for at in STEPS if at.startswith("images.yml:push:")][-1:]


@pytest.mark.parametrize("at", [at for at, s in STEPS.items() if "uses" in s])
def test_actions_are_named_with_a_version_and_a_checkout_leaves_no_token(at):
    step = STEPS[at]
    if step["uses"].startswith("./"): assert (ROOT / step["uses"] / "action.yml").is_file()
    else: assert re.fullmatch(r"[\w-]+/[\w./-]+@(v\d+|[0-9a-f]{40})", step["uses"])
    if step["uses"].startswith("actions/checkout@"): assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("at", RUNS)
def test_what_is_run_is_shell_with_nothing_written_into_it_and_make_where_there_is_a_target(at):
    text = RUNS[at]
    done = subprocess.run(["bash", "-n"], input=EXPRESSION.sub("x", text), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {e.strip("${} ") for e in EXPRESSION.findall(text)}
    assert written <= {"matrix.image"}, "a value from outside belongs into env"
    made = set(re.findall(r"\bmake (?:-s )?([a-z]+)", text))
    assert made <= TARGETS, made - TARGETS
    plain = "docker compose down", "kubectl", "helm", "gh release"
    assert made or text.startswith(plain), "no target of the Makefile: a laptop cannot do the same"


def test_the_pythons_are_those_of_the_package():
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    low, high = (int(n) for n in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", allowed).groups())
    every = [f"3.{n}" for n in range(low, high)]
    assert FLOWS["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"] == every
    named = [s["with"]["python-version"] for s in STEPS.values() if s.get("uses", "").startswith("actions/setup-python@")]
    assert {v for v in named if "{{" not in v} <= set(every) and ACTION["inputs"]["python-version"]["default"] in every


def test_what_make_test_needs_comes_before_it():
    for name, job in (("ci.yml", "test"), ("release.yml", "test")):
        assert [s["run"] for s in FLOWS[name]["jobs"][job]["steps"] if "run" in s][-2:] == ["make services", "make test"]
    assert re.search(r"^test: .*\blint types\b", MAKEFILE, re.MULTILINE)


def test_folders_that_dependabot_and_paths_name_are_there():
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    folders = chain.from_iterable(u.get("directories", [u.get("directory")]) for u in updates)
    assert not [f for f in folders if not (ROOT / f.strip("/")).is_dir()]
    for name, flow in FLOWS.items():
        for path in (triggers(flow).get("pull_request") or {}).get("paths", []):
            assert (ROOT / path.split("/**")[0]).exists(), (name, path)


@pytest.mark.parametrize("script", sorted([*ROOT.glob("deploy/**/*.sh"), *ROOT.glob("app/*.sh"), ROOT / ".ci/run"]), ids=lambda p: p.name)
def test_scripts_are_shell(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0 and script.read_text().startswith("#!"), done.stderr


def test_links_of_the_pages_for_contributors_lead_somewhere():
    pages = [ROOT / n for n in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")] + [*(ROOT / "docs/adr").glob("*.md")]
    for page in pages:
        text = page.read_text()
        assert not [t for t in re.findall(r"\]\((?!http)([^)#]+)", text) if not (page.parent / t).exists()], page
        made = set(chain.from_iterable(re.findall(r"[a-z]+", m) for m in re.findall(r"`make ((?:[a-z]+ ?)+)", text))) | set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE))
        assert made <= TARGETS, (page, made - TARGETS)
        files = re.findall(r"`((?:tests|app|flows|docs|deploy|benchmarks)/[\w./-]+\.\w+)`", text)
        assert not [f for f in files if not (ROOT / f).exists() and "NAME" not in f and "Chart.yaml" not in f], page


def test_every_decision_is_listed_and_has_all_its_parts():
    pages = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (ROOT / "docs/adr/index.md").read_text())
    assert listed == [p.name for p in pages] and len(pages) >= 10
    assert [int(p.name[:4]) for p in pages] == [*range(1, len(pages) + 1)]
    for page in pages:
        assert re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE) == ["Context", "Choice", "What was measured", "What it costs", "When to look again"], page


# ---- releases ---------------------------------------------------------------------------------------------------------

CHANGES = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n\n### Added\n\n- All of it.\n\n## [1.1.0] - 2026-11-01\n\n- Old.\n\n[1.2.0]: https://example.org\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "reco").mkdir()
    (tmp_path / "deploy/helm/reco").mkdir(parents=True)
    for name, text in {"reco/__init__.py": '__version__ = "1.2.0"\n', "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.0\n", "CHANGELOG.md": CHANGES,
                       "deploy/helm/reco/Chart.yaml": 'version: 1.2.0\nappVersion: "1.2.0"\n'}.items(): (tmp_path / name).write_text(text)
    return tmp_path


def test_the_notes_of_a_release_are_its_part_of_the_changelog(tree):
    assert RELEASE["notes"](tree, "v1.2.0") == "### Added\n\n- All of it."


@pytest.mark.parametrize(("tag", "name", "old", "new", "says"), [
    ("1.2.0", None, "", "", "not of the form"), ("v1.2", None, "", "", "not of the form"), ("v1.1.0", None, "", "", "reco/__init__.py says 1.2.0, the tag v1.1.0"),
    ("v1.2.0", "CITATION.cff", "\nversion: 1.2.0", "\nversion: 1.1.0", "CITATION.cff says 1.1.0"),
    ("v1.2.0", "deploy/helm/reco/Chart.yaml", '"1.2.0"', '"1.1.0"', "Chart.yaml says 1.1.0, 1.2.0"),
    ("v1.2.0", "CHANGELOG.md", "[1.2.0] - 2026-12-01", "[1.2.0] - unreleased", "has no day, but 'unreleased'"),
    ("v1.2.0", "CHANGELOG.md", "## [1.2.0] - 2026-12-01\n", "", "no heading"), ("v1.2.0", "CHANGELOG.md", "### Added\n\n- All of it.\n", "", "says nothing")])
def test_a_release_that_disagrees_with_itself_is_refused(tree, tag, name, old, new, says):
    if name: (tree / name).write_text((tree / name).read_text().replace(old, new))
    with pytest.raises(RELEASE["ReleaseError"], match=re.escape(says)): RELEASE["notes"](tree, tag)


def test_the_versions_of_the_tree_agree_and_the_changelog_knows_them():
    said = set(chain.from_iterable(RELEASE["versions_of"](ROOT).values()))
    assert len(said) == 1, said
    assert f"## [{said.pop()}] - " in (ROOT / "CHANGELOG.md").read_text()
