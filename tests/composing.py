"""docker-compose.yml as an engine would read it: variables put in, and what a service is told."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::([-?])([^}]*))?\})")


def interpolated(text: str, env: dict[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?message}` and `$$`, as the compose specification has them."""
    def value(found: re.Match) -> str:
        name, kind, rest = found.groups()
        if name is None: return "$"
        if env.get(name): return env[name]
        if kind == "?": raise KeyError(f"{name}: {rest}")
        return rest or ""
    return VARIABLE.sub(value, text)


def composed(env: dict[str, str], path: Path = FILE) -> dict:
    """The file with its variables put in; values only, so that a secret cannot change the file's form."""
    def put(part: object) -> object:
        if isinstance(part, dict): return {k: put(v) for k, v in part.items()}
        if isinstance(part, list): return [put(v) for v in part]
        return interpolated(part, env) if isinstance(part, str) else part
    return put(yaml.safe_load(path.read_text()))


def variables(path: Path = FILE) -> dict[str, set[str]]:
    """Names of variables, and how each is asked for: "-", "?" or ""."""
    found: dict[str, set[str]] = {}
    for match in VARIABLE.finditer(path.read_text()):
        if match[1]: found.setdefault(match[1], set()).add(match[2] or "")
    return found


class Mount(NamedTuple):
    source: str  # a path beside the file, or a volume's name
    target: str
    read_only: bool


def mounts(service: dict) -> list[Mount]:
    """Volumes in their short form."""
    return [Mount(source, target, rest == ["ro"]) for source, target, *rest in (v.split(":") for v in service.get("volumes", []))]


def tmpfs(service: dict) -> list[str]:
    """Folders in memory."""
    return [t.split(":")[0] for t in service.get("tmpfs", [])]


def words(command: str | list) -> list[str]:
    """A command as a list."""
    return shlex.split(command) if isinstance(command, str) else [str(w) for w in command]
