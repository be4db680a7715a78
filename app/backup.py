"""`python -m app.backup save FOLDER` and `restore FOLDER`: lake, bundles, runs and artifacts, from wherever the settings keep them.

Nothing has to be stopped. What names other files (Delta's log, the history of what was published) is copied before what it names, and what is named never
changes: so a copy is the state of the moment at which it began. Restoring goes the other way round, into places that are empty. PostgreSQL has pg_dump, and
the online store is made from the lake: docs/operations/backup.md."""
import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from reco.data.objects import NoObject, ObjectError, Objects, download, listed, upload
from reco.settings import Settings, SettingsError, load_settings

STAMP = "backup.json"                                            # written last: a folder without it is no backup
NAMES = re.compile(r"(^|/)_delta_log/|\.jsonl$|(^|/)current$|\.db$") # of files that name others, or change
LEFT = re.compile(r"(^|/)(scratch|\.staging[^/]*|\.conditions)(/|$)|\.tmp$") # of runs that are under way


class BackupError(RuntimeError):
    "It was not made or put back; the message says why, and what is there is as it was."


def places(
    settings: Settings,
) -> dict[str, str]: # name → folder, or s3://bucket/prefix
    "What a shop cannot make again, or not soon."
    s, local = settings, lambda path: str(settings.path(path).absolute())
    found = {"lake": s.lake_root, "bundles": s.bundles.root if "://" in s.bundles.root else local(s.bundles.root)}
    if s.runs.datastore: found["runs"] = s.runs.datastore
    if s.tracking.enabled: found["tracking"] = s.tracking.artifacts if "://" in s.tracking.artifacts else local(s.tracking.artifacts or s.tracking.folder)
    return found


class Place:
    "A folder or a bucket's prefix, by names relative to it."

    def __init__(self, root: str, settings: Settings):
        self.root = root
        self.objects = Objects(root, settings.lake) if "://" in root else None

    def names(self) -> list[str]: # raises `ObjectError`
        if self.objects is not None: return [x for e in listed(self.objects) if (x := e.name.lstrip("/")) and not x.endswith("/")]
        return sorted(str(p.relative_to(self.root)) for p in Path(self.root).rglob("*") if p.is_file())

    def fetch(self, name: str, to: Path) -> bool: # False when it is gone meanwhile
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self.objects is not None: download(self.objects, name, to)
            else: shutil.copyfile(Path(self.root, name), to)
        except (NoObject, FileNotFoundError):
            to.unlink(missing_ok=True)
            return False
        return True

    def put(self, path: Path, name: str) -> None:
        if self.objects is not None: return upload(self.objects, path, name)
        to = Path(self.root, name)
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f".{to.name}.restored")
        shutil.copyfile(path, part)
        part.replace(to)


def in_order(
    names: list[str],
) -> Iterator[str]:
    "What names others first; of Delta's log the pointer to a checkpoint, then an older entry before a newer one: each is there when it is named."
    kept = [n for n in names if not LEFT.search(n)]
    yield from sorted((n for n in kept if NAMES.search(n)), key=lambda n: (not n.endswith("_last_checkpoint"), n))
    yield from sorted(n for n in kept if not NAMES.search(n))


def save(
    settings: Settings,
    folder: Path, # new or empty
) -> dict:        # of STAMP
    "Copy everything; raises `BackupError`, `ObjectError`, `OSError`."
    if folder.exists() and any(folder.iterdir()): raise BackupError(f"{folder} is not empty: a backup is a folder of its own")
    about: dict = {"begun": datetime.now(UTC).isoformat(timespec="seconds"), "places": {}}
    for name, root in places(settings).items():
        place = Place(root, settings)
        for file in in_order(place.names()):
            if NAMES.search(file): place.fetch(file, folder / name / file)
        for file in in_order(place.names()): # listed anew: what the copied log names is there by now, and what came later is more than is needed
            if not NAMES.search(file): place.fetch(file, folder / name / file)
        found = [p for p in (folder / name).rglob("*") if p.is_file()]
        about["places"][name] = {"root": root, "files": len(found), "bytes": sum(p.stat().st_size for p in found)}
    about["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
    (folder / f"{STAMP}.tmp").write_text(json.dumps(about, indent=1), "utf-8")
    (folder / f"{STAMP}.tmp").replace(folder / STAMP)
    return about


def restore(
    settings: Settings,
    folder: Path, # of `save`
) -> dict:        # of STAMP
    "Put everything back where the settings say; raises `BackupError`, `ObjectError`, `OSError`."
    try: about = json.loads((folder / STAMP).read_text("utf-8"))
    except FileNotFoundError: raise BackupError(f"{folder} has no {STAMP}: it is no backup, or one that did not come to its end") from None
    except ValueError as e: raise BackupError(f"{folder / STAMP}: {e}") from None
    wanted = {name: Place(root, settings) for name, root in places(settings).items() if name in about["places"]}
    for name, said in about["places"].items():
        have = sum(p.is_file() for p in (folder / name).rglob("*"))
        if have != said["files"]: raise BackupError(f"{folder / name} has {have} files, {said['files']} were saved")
        if name not in wanted: raise BackupError(f"the backup has {name}, and the settings keep none")
    for place in wanted.values():
        if there := [n for n in place.names() if not LEFT.search(n)]: raise BackupError(f"{place.root} is not empty ({len(there)} files, such as {there[0]}): name another place, or empty it")
    for name, place in wanted.items():
        names = [str(p.relative_to(folder / name)) for p in (folder / name).rglob("*") if p.is_file()]
        for file in [*in_order(names)][::-1]: place.put(folder / name / file, file) # what names others comes last: a half restored place is an empty one
    return about


def main() -> int: # exit code
    cli = argparse.ArgumentParser(prog="python -m app.backup", description="Lake, bundles, runs and artifacts into a folder, and back.")
    cli.add_argument("command", choices=["save", "restore"])
    cli.add_argument("folder", type=Path, help="a new folder, or one that was saved")
    args = cli.parse_args()
    try: about = {"save": save, "restore": restore}[args.command](load_settings(), args.folder)
    except (SettingsError, BackupError, ObjectError, OSError) as e:
        print(f"backup: {e}", file=sys.stderr)
        return 1
    for name, said in about["places"].items(): print(f"{name}: {said['files']:,} files, {said['bytes'] / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__": sys.exit(main())
