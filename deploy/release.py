"""`python deploy/release.py v0.1.0`: prints what CHANGELOG.md says of a release; fails where a version somewhere is another. Needs nothing but Python."""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = {"reco/__init__.py": r'^__version__ = "(.*)"$', "CITATION.cff": r"^version: (.*)$",
            "deploy/helm/reco/Chart.yaml": r"^(?:version|appVersion): (.*)$"} # file → where it names the version, each time


class ReleaseError(ValueError):
    "Not to be released; the message says why."


def versions_of(
    root: Path,
) -> dict[str, set[str]]: # file that is there → versions that it names
    "What each file says."
    return {name: {v.strip("\"' ") for v in re.findall(pattern, (root / name).read_text("utf-8"), re.MULTILINE)}
            for name, pattern in VERSIONS.items() if (root / name).exists()}


def part_of(
    changelog: str, # in the form of Keep a Changelog
    version: str,
) -> str:           # text between this heading and the next
    "What is new; raises `ReleaseError`."
    found = re.search(rf"^## \[{re.escape(version)}\] - (\S+)\n(.*?)(?=^## \[|^\[[^\]]+\]: |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if not found: raise ReleaseError(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'")
    day, text = found[1], found[2].strip()
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", day): raise ReleaseError(f"CHANGELOG.md: {version} has no day, but {day!r}")
    if not text: raise ReleaseError(f"CHANGELOG.md says nothing of {version}")
    return text


def notes(
    root: Path,
    tag: str,   # vX.Y.Z
) -> str:
    "The text of a release; raises `ReleaseError`."
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag): raise ReleaseError(f"{tag!r} is not of the form vX.Y.Z")
    version = tag.removeprefix("v")
    for name, said in versions_of(root).items():
        if said != {version}: raise ReleaseError(f"{name} says {', '.join(sorted(said)) or 'nothing'}, the tag {tag}")
    return part_of((root / "CHANGELOG.md").read_text("utf-8"), version)


def main() -> int: # exit code
    try: print(notes(ROOT, *sys.argv[1:]))
    except (ReleaseError, OSError, TypeError) as e:
        print(f"release: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
