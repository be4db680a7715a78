"""`python -m app.bootstrap`: what a first start needs, each where it is missing: buckets, a shop's data, a model, pasts of shoppers in the online store.

It may be run again, and killed at any moment: what is there is left alone, so every start of the platform begins with it."""
import contextlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reco.bundle import BundleError
from reco.bundle_store import bundles_root
from reco.data.lake import open_lake
from reco.data.objects import ObjectError, Objects, ensure_bucket
from reco.data.storage import LakeError
from reco.features.store import open_store
from reco.published import champion_name
from reco.redis_server import StoreError, wait_until_ready
from reco.settings import Settings, SettingsError, load_settings

ROOT = Path(__file__).resolve().parents[1]


class NotReady(RuntimeError):
    "A step failed; the message says which."


@dataclass(frozen=True)
class Need:
    "Something that has to be there, and what makes it."
    what: str
    there: Callable[[], bool]
    commands: tuple[tuple[str, ...], ...] # of Python, in order


def places(
    settings: Settings,
) -> list[str]: # s3://bucket/prefix, each once
    "What the settings keep on S3."
    named = settings.lake.root, settings.bundles.root, settings.runs.datastore, settings.tracking.artifacts
    return sorted({place for place in named if place.startswith("s3://")})


def make_buckets(
    settings: Settings,
) -> None:
    "Raises `ObjectError`."
    for place in places(settings):
        objects = Objects(place, settings.lake)
        if ensure_bucket(objects): print(f"made the bucket {objects.bucket}", flush=True)


def needs(
    settings: Settings,
) -> list[Need]: # in order
    "A shop's data, its lake, a model that is served, pasts; data of one's own are never made up."
    raw, run = settings.path(settings.data.path), lambda flow: (f"flows/{flow}.py", "run")
    simulated = [Need("data of a simulated shop", lambda: any(raw.glob("*.parquet")), (("data/generators/generate_shop.py", "--out", str(raw)),))]
    return (simulated if settings.data.source == "simulator" else []) + [
        Need("events in the lake", lambda: "interactions" in open_lake(settings).tables(), (run("ingest"),)),
        Need("a model to serve", lambda: bool(champion_name(bundles_root(settings))), (run("train"), run("promote"))),
        Need("pasts of shoppers in the online store", lambda: has_pasts(settings), (run("materialize"),))]


def has_pasts(
    settings: Settings,
) -> bool: # raises `StoreError`
    "Whether the online store knows a shopper."
    with contextlib.closing(open_store(settings)) as store:
        wait_until_ready(store.client)
        return store.someone() is not None


def meet(
    need: Need,
) -> None:
    "Make it, unless it is there; raises `NotReady`."
    if need.there(): return print(f"there already: {need.what}", flush=True)
    print(f"making {need.what}", flush=True)
    for command in need.commands:
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        if code: raise NotReady(f"{need.what}: python {' '.join(command)} ended with {code}; what it said is above")
    if not need.there(): raise NotReady(f"{need.what}: all of {len(need.commands)} commands succeeded, and it is not there")


def main() -> int: # exit code
    "Everything that is missing, in order."
    try:
        settings = load_settings()
        make_buckets(settings)
        for need in needs(settings): meet(need)
    except (SettingsError, ObjectError, LakeError, BundleError, StoreError, NotReady, OSError) as e:
        print(f"bootstrap: {e}", file=sys.stderr)
        return 1
    print("ready to serve", flush=True)
    return 0


if __name__ == "__main__": sys.exit(main())
