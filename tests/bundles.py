"""Folders of bundles for tests, and ways in which a bundle can be bad."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from reco.bundle import checksums, make_bundle, save_bundle
from reco.data.histories import epoch_ms

DAY = 86_400_000


def days_before(trained, root: Path, days: int) -> str:
    """The name of a bundle that knows the shop's log but for the last days."""
    asof = epoch_ms(trained.cutoffs.end) - days * DAY
    about = {"git_sha": "test", "metrics": []}
    return save_bundle(make_bundle(trained.shop, asof, trained.rankers, trained.settings, about, choices=trained.choices), root).name


def copied(folder: Path, name: str, harm: Callable[[Path], object]) -> str:
    """The name of a copy beside a bundle, to which something was done."""
    shutil.copytree(folder, folder.parent / name)
    harm(folder.parent / name)
    return name


def resealed(folder: Path) -> None:
    """Make checksums fit whatever the files are now: a bundle that was made so, not one that was damaged later."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksums": checksums(folder)}))


def flip(folder: Path) -> None:
    raw = bytearray((folder / "known.npy").read_bytes())
    raw[-1] ^= 1
    (folder / "known.npy").write_bytes(raw)


def truncate(folder: Path) -> None:
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as f: f.truncate(largest.stat().st_size // 2)


def say(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | fields
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def without_price(folder: Path) -> None:
    pl.read_parquet(folder / "items.parquet").drop("price").write_parquet(folder / "items.parquet")
    resealed(folder)


def half_the_items(folder: Path) -> None:
    features = np.load(folder / "item_features.npy")
    np.save(folder / "item_features.npy", features[: len(features) // 2])
    resealed(folder)


def no_quotas(folder: Path) -> None:
    serving = json.loads((folder / "serving.json").read_text())
    (folder / "serving.json").write_text(json.dumps({k: v for k, v in serving.items() if k != "quotas"}))
    resealed(folder)


def no_trees(folder: Path) -> None:
    for p in (folder / "rankers" / "for_you").iterdir(): p.write_bytes(b"")
    resealed(folder)


# what was done to it → words of the reason
HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "wrong checksum: ['known.npy']"),
    "truncated": (truncate, "wrong checksum"),
    "incomplete": (lambda f: (f / "serving.json").unlink(), "files are missing: ['serving.json']"),
    "stranger": (lambda f: (f / "extra.npy").write_bytes(b"x"), "extra.npy"),
    "no-json": (lambda f: (f / "manifest.json").write_text("{"), "no readable manifest.json"),
    "no-checksums": (lambda f: say(f, checksums=None), "manifest.json lists no checksums"),
    "a-list": (lambda f: (f / "manifest.json").write_text("[]"), "holds no object"),
    "other-features": (lambda f: say(f, features_hash="0" * 12), "made for other features"),
    "no-price": (without_price, "items.parquet has the columns"),
    "half": (half_the_items, "item_features.npy has the shape"),
    "no-quotas": (no_quotas, "quotas"),
    "no-trees": (no_trees, ""),
}
