"""Bundle → reports. `python flows/report.py run`; `[reports] notebooks` in settings.ini says which.

Notebooks run on the challenger, or on `--bundle NAME`, beside the state of the lake that it was made from. The executed notebook and its page are
artifacts, the page is the step's card, and both lie in `reports/BUNDLE/` beside the bundles. A cell that fails ends the run with its number, its line and
its traceback; what was executed until then is kept as `NAME.failed.ipynb`.
"""
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from base import HERE, PROJECT, SETTINGS, run_record
from cluster import on_cluster
from metaflow import FlowMutator, FlowSpec, Parameter, card, project, step, trigger_on_finish
from metaflow.packaging_sys import ContentType

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.bundle import BundleError
from reco.bundle_copies import bundle_at
from reco.bundle_store import bundles_root
from reco.challenger import PAGES, challenger_name, keep_text
from reco.provenance import git_sha

NOTEBOOKS = SETTINGS.reports.notebooks.split()
PACKED = "notebooks" # where the code package has them


def place_of(notebook: str) -> Path:
    """The file of a notebook: in the code package, beside settings.ini, or in nbs/."""
    name = notebook if notebook.endswith(".ipynb") else f"{notebook}.ipynb"
    if (packed := HERE/PACKED/Path(name).name).is_file(): return packed
    return SETTINGS.path(name) if notebook.endswith(".ipynb") else HERE.parent/"nbs"/name


class with_notebooks(FlowMutator):  # noqa: N801 (a decorator)
    """Take the notebooks along to where the steps run."""

    def add_to_package(self) -> Iterator[tuple[str, str, ContentType]]:
        for place in map(place_of, NOTEBOOKS): yield str(place), f"{PACKED}/{place.name}", ContentType.USER_CONTENT


@on_cluster
@with_notebooks
@trigger_on_finish(flow="TrainFlow")
@project(name=PROJECT)
class ReportFlow(FlowSpec):
    """Run the reports on a bundle, a branch for each."""

    bundle = Parameter("bundle", default="", help="the bundle to report on; the challenger if not given")

    @step
    def start(self):
        """Fix what is reported on, and refuse what is not there before anything runs."""
        self.settings, self.git_sha, root = SETTINGS.without_secrets(), git_sha(HERE), bundles_root(SETTINGS)
        if lost := [str(p) for p in map(place_of, NOTEBOOKS) if not p.is_file()]: sys.exit(f"[reports] notebooks: there is no {', '.join(lost)}")
        try:
            self.reported = self.bundle or challenger_name(root)
            if not self.reported: sys.exit(f"no challenger in {root}: run `python flows/train.py run` first, or name a bundle with --bundle")
            self.snapshots = json.loads((bundle_at(root, self.reported)/"manifest.json").read_text()).get("snapshots") or {}
        except BundleError as e: sys.exit(f"bundle: {e}")
        self.notebooks = NOTEBOOKS
        print(f"{len(self.notebooks)} reports on {self.reported}")
        self.next(self.write, foreach="notebooks")

    @card(type="html")
    @step
    def write(self):
        """Run one notebook, and keep it and its page."""
        from reco.reports import (  # papermill and nbconvert, which take seconds
            ReportError,
            executed,
            page,
            read_notebook,
        )
        place = place_of(self.input)
        self.report, asked = place.stem, {"bundles": str(bundles_root(SETTINGS)), "bundle": self.reported, "lake": SETTINGS.lake_root, "snapshots": self.snapshots}
        try: done = executed(read_notebook(place.read_text("utf-8"), place.name), asked, Path.cwd())
        except ReportError as e:
            kept = f"\nas far as it came: {keep(self.reported, f'{self.report}.failed.ipynb', nbformat.writes(e.notebook))}" if e.notebook else ""
            sys.exit(f"{place.name}, {e}{kept}")
        self.notebook, self.html = nbformat.writes(done), page(done, f"{self.report.replace('_', ' ')}: {self.reported}")
        keep(self.reported, f"{self.report}.ipynb", self.notebook)
        self.kept = keep(self.reported, f"{self.report}.html", self.html)
        print(f"kept in {self.kept}")
        self.next(self.gather)

    @step
    def gather(self, inputs):
        """The list of pages."""
        self.pages = {i.report: i.kept for i in inputs}
        self.merge_artifacts(inputs, include=["settings", "git_sha", "reported", "snapshots"])
        self.next(self.end)

    @step
    def end(self):
        """Record the run and say where the pages are."""
        self.record = run_record(self.settings, self.git_sha, {"lake": SETTINGS.lake.root, "bundle": self.reported}, self.snapshots)
        print("\n".join(self.pages.values()))


def keep(bundle: str, name: str, text: str) -> str:
    """Put a report beside the bundles; where it lies."""
    root, below = bundles_root(SETTINGS), f"{PAGES}/{bundle}/{name}"
    keep_text(root, below, text)
    return f"{root}/{below}"


if __name__ == "__main__": ReportFlow()
