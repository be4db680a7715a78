"""What a flow takes along to Kubernetes. On this machine none of it has an effect.

`python flows/train.py run --with kubernetes` and `python flows/argo.py` need no other flow: what steps ask for is in flows/resources.py, image and names
are in `[kubernetes]`, times in `[schedule]`. The code package holds flows/, the package `reco`, and these settings without what is secret.
"""
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from base import HERE, SETTINGS
from metaflow import FlowMutator
from metaflow.packaging_sys import ContentType
from metaflow.user_decorators.mutable_flow import MutableFlow
from pydantic import SecretStr
from resources import need

import reco
from reco.provenance import git_sha
from reco.settings import Limit, Quota, Settings

PACKAGE = Path(reco.__file__).parent


@cache
def folder() -> tempfile.TemporaryDirectory:
    """For what is packed; it lives as long as this process."""
    return tempfile.TemporaryDirectory(prefix="reco-package-")


def _text(value: object) -> str:
    if isinstance(value, Limit): return f"{value.value!r} {value.severity}"
    if isinstance(value, Quota): return f"{value.cls} {value.quota}".strip()
    return str(value).replace("\n", "\n  ")


def as_ini(settings: Settings) -> str:
    """The settings as they are now, environment included, as a file that reads as the same; what is secret is left out."""
    lines = []
    for name in Settings.model_fields:
        if name == "root": continue
        section = getattr(settings, name)
        pairs = section.items() if isinstance(section, dict) else section
        lines += [f"[{name}]", *(f"{k} = {_text(v)}" for k, v in pairs if not isinstance(v, SecretStr)), ""]
    return "\n".join(lines)


def packed() -> dict[str, Path]:
    """Files that go along, by their name beside the flow: the settings, and the rules and experiments that they name."""
    path = Path(folder().name)/"settings.ini"
    path.write_text(as_ini(SETTINGS), "utf-8")
    named = [f for f in (SETTINGS.rules.file, SETTINGS.experiments.file) if f and not Path(f).is_absolute()]
    return {"settings.ini": path} | {f: SETTINGS.path(f) for f in named}


class on_cluster(FlowMutator): # noqa: N801 (a decorator)
    """Resources for each step, and the code package; where the flow is on its way to a cluster, the commit too, which nobody can find there."""

    def pre_mutate(self, mutable_flow: MutableFlow) -> None:
        leaves = any(word.removeprefix("--with=").startswith(("argo-workflows", "kubernetes")) for word in sys.argv)
        known = {"METAFLOW_SKIP_INSTALL_DEPENDENCIES": "1", "GIT_SHA": git_sha(HERE)} if leaves else {} # the image has all packages
        for name, step in mutable_flow.steps:
            step.add_decorator("resources", deco_kwargs=need(self._flow_cls.__name__, name).asked(SETTINGS.kubernetes.million_events))
            if known: step.add_decorator("environment", deco_kwargs={"vars": known})

    def add_to_package(self) -> Iterator[tuple[str, str, ContentType]]:
        for name, path in packed().items(): yield str(path), name, ContentType.USER_CONTENT
        # METAFLOW_PACKAGE_POLICY alone goes by the list of files of an installed package, which a file that was added since is not in
        for path in sorted(PACKAGE.rglob("*.py")): yield str(path), f"reco/{path.relative_to(PACKAGE)}", ContentType.CODE_CONTENT
