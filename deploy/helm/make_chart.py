"""What in the chart is made from elsewhere: `python deploy/helm/make_chart.py`, or `make chart`.

Copies of rules, NGINX's templates and Ray's file, since a chart reads nothing outside itself; the part of the schema that says which settings there are; the
table of values in the README; and, with Helm, the examples as they are rendered. tests/test_helm.py holds all of it to what would be made now.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from pydantic import SecretStr

from reco.settings import Settings

HERE = Path(__file__).resolve().parent
DEPLOY, CHART, RENDERED = HERE.parent, HERE / "reco", HERE / "rendered"
EXAMPLES = {p.stem.removesuffix("-values"): p for p in (*sorted((CHART / "examples").glob("*.yaml")), *sorted((CHART / "ci").glob("*-values.yaml")))}

# What the chart decides itself: addresses, ports and folders inside pods, and what has values of its own.
OWN = {"serving": {"host", "port", "replicas", "max_replicas", "keys_file"}, "app": {"port", "endpoint"}, "stream": {"metrics_host", "metrics_port"},
       "bundles": {"cache"}, "data": {"path", "scratch"}, "online": {"folder"}, "search": {"file", "out"}, "tracking": {"folder"}, "rules": {"file"},
       "experiments": {"file"}, "monitor": {"textfile"}}
APART = {"root", "schedule", "kubernetes"}  # no section, `schedule.cron`, and what flows/argo.py reads where it runs
ON_S3 = {("lake", "root"), ("bundles", "root"), ("runs", "datastore")}  # pods share no folder


# Copies --------------------------------------------------------------------------------------------------------------


def copies() -> dict[Path, Path]:
    """Files of the chart and what they are copies of."""
    rules = {CHART / "files" / f"{n}.yml": DEPLOY / "prometheus" / "rules" / f"{n}.yml" for n in ("recording", "alerts")}
    nginx = {CHART / "files" / "nginx" / p.name: p for p in (DEPLOY / "nginx" / "nginx.conf", *(DEPLOY / "nginx" / "templates").iterdir())}
    return rules | nginx | {CHART / "files" / "serve.yaml": DEPLOY / "ray" / "serve.yaml"}


# The schema of the settings ------------------------------------------------------------------------------------------


def secret_keys() -> set[tuple[str, str]]:
    """Section and key of every setting that may hold a password."""
    sections = ((n, f.annotation) for n, f in Settings.model_fields.items() if n not in ("root", "candidates"))
    return {(name, key) for name, section in sections for key, field in section.model_fields.items() if field.annotation is SecretStr}


def key_schema(section: str, key: str, said: dict) -> dict:
    """One key as a value of the chart: what pydantic says of it, without defaults, which are the image's."""
    about = {"description": said["description"]}
    if said.get("$ref", "").endswith("/Limit"): return about | {"type": "string", "pattern": r"^[0-9.]+( (error|warn))?$"}
    if (section, key) in ON_S3: return about | {"type": "string", "pattern": r"^s3://[^/\s]+(/\S*)?$"}
    if (section, key) == ("tracking", "artifacts"): return about | {"type": "string", "pattern": r"^(s3://[^/\s]+(/\S*)?)?$"}
    return about | {k: v for k, v in said.items() if k not in ("title", "default")}


def settings_schema() -> dict:
    """Every setting that values may name."""
    made, secret = Settings.model_json_schema(), secret_keys()
    sections = {}
    for name, field in Settings.model_fields.items():
        if name in APART: continue
        if name == "candidates":
            quota = {"type": ["integer", "string"], "minimum": 0, "maximum": 1000, "pattern": r"^([\w.]+:\w+ )?[0-9]+$"}
            sections[name] = {"type": "object", "description": "quota of each candidate source, or module:Class and a quota", "additionalProperties": quota}
            continue
        keys = {k: key_schema(name, k, v) for k, v in made["$defs"][field.annotation.__name__]["properties"].items()
                if (name, k) not in secret and k not in OWN.get(name, ())}
        needed = {"required": there} if (there := [k for k in keys if (name, k) in ON_S3]) else {}
        if keys: sections[name] = {"type": "object", "additionalProperties": False, "properties": keys} | needed
    return {"type": "object", "description": "keys of settings.ini by section; no secret, and nothing that the chart decides itself", "additionalProperties": False,
            "required": ["bundles", "data", "lake", "runs"], "properties": dict(sorted(sections.items()))}


def schema_text(now: str) -> str:
    """values.schema.json with the settings of this code; everything else of it is written by hand."""
    schema = json.loads(now)
    schema["properties"]["settings"] = settings_schema()
    return json.dumps(schema, indent=1) + "\n"


# The table of values -------------------------------------------------------------------------------------------------


def values_rows(text: str) -> list[tuple[str, str, str]]:
    """Path, default and comment of each value that has a comment beginning with `# --`, in the file's order."""
    rows, path, about = [], [], ""
    values = yaml.safe_load(text)
    for line in text.splitlines():
        if said := re.match(r"\s*# (-- )?(.*)", line):
            about = said[2] if said[1] else f"{about} {said[2]}" if about else ""
        elif found := re.match(r"( *)([\w-]+):", line):
            path = [*path[:len(found[1])//2], found[2]]
            if about: rows.append((".".join(path), json.dumps(at(values, path)), about))
            about = ""
        else: about = ""
    return rows


def at(values: dict, path: list[str]) -> object:
    """The value there."""
    for key in path: values = values[key]
    return values


def values_table(text: str) -> str:
    """The rows in Markdown."""
    cell = lambda t: t.replace("|", "\\|")
    lines = [f"| `{path}` | {f'`{cell(default)}`' if len(default) <= 60 else 'see values.yaml'} | {cell(about)} |" for path, default, about in values_rows(text)]
    return "\n".join(["| value | default | what |", "|---|---|---|", *lines])


BEGIN, END = "<!-- values: made by make chart -->", "<!-- end of values -->"


def readme_text(now: str) -> str:
    """The README with the table of values.yaml as it is."""
    before, rest = now.split(BEGIN)
    return f"{before}{BEGIN}\n{values_table((CHART / 'values.yaml').read_text())}\n{END}{rest.split(END)[1]}"


# All of it -----------------------------------------------------------------------------------------------------------


def made() -> dict[Path, str]:
    """What the files should say that need no Helm."""
    schema, readme = CHART / "values.schema.json", CHART / "README.md"
    return {to: source.read_text() for to, source in copies().items()} | {schema: schema_text(schema.read_text()), readme: readme_text(readme.read_text())}


def helm() -> str | None:
    """Helm's program: on the path, or beside this Python, where `make helm` puts it."""
    return shutil.which("helm") or shutil.which("helm", path=str(Path(sys.executable).parent))


def rendered(values: Path, *more: str, release: str = "reco") -> str:
    """The chart with these values, as Helm renders it without a cluster; raises `CalledProcessError` with Helm's words."""
    with TemporaryDirectory() as home:  # no plugins and repositories of whoever runs it
        env = {"PATH": "/usr/bin:/bin", "HOME": home}
        command = [helm(), "template", release, str(CHART), "--namespace", "reco", "--kube-version", "1.33.0", "--values", str(values), *more]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Write what is not as it should be."""
    pages = made()
    for path, text in pages.items():
        if path.exists() and path.read_text() == text: continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"{path.relative_to(DEPLOY.parent)}: made anew")
    for old in set((CHART / "files").rglob("*.*")) - {*pages}: old.unlink()
    if not helm(): sys.exit("no Helm here (make helm): the rendered examples are left as they are")
    RENDERED.mkdir(exist_ok=True)
    for name, values in EXAMPLES.items(): (RENDERED / f"{name}.yaml").write_text(rendered(values))


if __name__ == "__main__": main()
