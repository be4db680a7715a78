"""Challenger → gates → published, or not. `python flows/promote.py run`; `[gates]` in settings.ini has the limits.

The challenger is what the last training made, or `--bundle ID`. It is judged on its own hold-out and its own snapshot of the lake, beside the bundle that is
served; one gate that fails leaves that one alone, and the run ends with exit code 1 and says which and why. A champion that this code cannot ask any
more is such a failure, unless `--force-reason "…"` says why to go on without it; the reason is kept with the publication.
"""
import json
import sys
from datetime import UTC, datetime
from typing import NoReturn

import polars as pl
from base import HERE, PROJECT, SETTINGS, TABLES, card_table, run_record, tell_mlflow
from cluster import on_cluster
from events import tell
from metaflow import FlowSpec, Parameter, card, current, project, retry, schedule, step, trigger_on_finish
from metaflow.cards import Markdown

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.aliases import mirror
from reco.bundle import BundleError, UnknownBundle
from reco.bundle_copies import bundle_at
from reco.bundle_store import NotNow, bundles_root
from reco.challenger import challenger_name, keep_report, promote
from reco.data.lake import LakeError, open_lake
from reco.model_card import model_card
from reco.provenance import git_sha
from reco.published import champion_name
from reco.tracking import log_training

WHO = "flows/promote.py"
ROOT = bundles_root(SETTINGS)


@on_cluster
@project(name=PROJECT)
@schedule(cron=SETTINGS.schedule.promote, daily=False, timezone="UTC")
@trigger_on_finish(flow="TrainFlow")
class PromoteFlow(FlowSpec):
    """Hold the challenger to the gates beside the champion, and publish it if it passes them all."""

    bundle = Parameter("bundle", default="", help="the bundle to judge; the challenger if not given")
    force_reason = Parameter("force-reason", default="", help="why to go on without a champion that cannot be asked")

    @step
    def start(self):
        """Fix who is judged, against whom, by which limits, with which code."""
        self.settings, self.git_sha, self.champion = SETTINGS.without_secrets(), git_sha(HERE), champion_name(ROOT)
        self.challenger = self.bundle or challenger_name(ROOT)
        if not self.challenger: sys.exit(f"no challenger in {ROOT}: run `python flows/train.py run` first, or name a bundle with --bundle")
        try: bundle_at(ROOT, self.challenger)
        except (UnknownBundle, NotNow) as e: sys.exit(f"challenger: {e}")
        except BundleError as e: refuse(self.challenger, self.champion, [f"files: {e}"])
        print(f"challenger {self.challenger}, champion {self.champion or 'none'}")
        self.next(self.judge)

    @card(type="blank")
    @step
    def judge(self):
        """Ask all gates and keep the report, beside the bundles and on the card."""
        self.report = None
        if self.challenger != self.champion:
            from reco.evaluation.verdict import all_gates, record  # brings numba and LightGBM, which take seconds
            case = case_of(self.challenger, self.champion, self.force_reason)
            self.report = report = all_gates(case)
            self.record = run_record(self.settings, self.git_sha, {"lake": SETTINGS.lake.root, "champion": self.champion}, snapshots_of(self.challenger))
            about = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "run": current.run_id, "git_sha": self.git_sha}
            path = keep_report(ROOT, record(case, self.report, about))
            print(f"{shown(self.report)}\nkept in {path}")
            tell_mlflow(lambda: log_verdict(self.challenger, report))
            for part in card_parts(self.report, self.challenger, self.champion): current.card.append(part)
        self.next(self.end)

    @retry(times=0) # a verdict is not asked for again
    @step
    def end(self):
        """Publish the challenger, or end with what speaks against it; people are told either way."""
        from reco.evaluation.gates import failures
        if self.report is None: return print(f"nothing to do: {self.challenger} is served already")
        if failed := failures(self.report): refuse(self.challenger, self.champion, failed)
        try: done = promote(ROOT/self.challenger, self.champion, WHO, why(self.report), current.origin_run_id or current.run_id)
        except BundleError as e: refuse(self.challenger, self.champion, [f"publication: {e}"])
        tell_mlflow(lambda: mirror(SETTINGS))
        tell("bundle_published", f"{self.challenger} is served now, {self.champion or 'nothing'} was before", {"bundle": self.challenger, "champion": self.champion},
             f"bundle_published/{self.challenger}/{current.origin_run_id or current.run_id}")
        print(f"published {done.bundle_id}; before it was {done.before or 'none'}" if done else f"nothing to do: this run has published {self.challenger} before")


def refuse(challenger: str, champion: str, failed: list[str]) -> NoReturn:
    """Tell what speaks against a challenger, each as `name: reason`, and end the run with it. The same names are told once."""
    refused, names = f"{challenger} is not promoted; {champion or 'nothing'} goes on:", "+".join(f.partition(":")[0] for f in failed)
    about = {"bundle": challenger, "champion": champion, "failed": len(failed)}
    tell("promotion_refused", " ".join([refused, "; ".join(failed)]), about, f"promotion_refused/{challenger}/{champion}/{names}")
    sys.exit("\n  ".join([refused, *failed]))


def log_verdict(challenger: str, report: pl.DataFrame) -> None:
    """The gates on the challenger's run and in its model card, passed or not."""
    folder = bundle_at(ROOT, challenger)
    manifest = json.loads((folder/"manifest.json").read_text())
    log_training(SETTINGS, folder, model_card(manifest, report.to_dicts()), {"gates": report})


def snapshots_of(challenger: str) -> dict[str, str]:
    """The states of the lake that a bundle was made from; empty when it does not say."""
    try: return json.loads((bundle_at(ROOT, challenger)/"manifest.json").read_text()).get("snapshots") or {}
    except (OSError, ValueError, AttributeError): return {}


def case_of(challenger: str, champion: str, reason: str):
    """Challenger, champion, limits, and the lake as the challenger's training saw it; a challenger whose state is gone is refused."""
    from reco.data.shop import index_shop
    from reco.evaluation.verdict import Case
    snapshots, lake = snapshots_of(challenger), open_lake(SETTINGS)
    try:
        tables = [lake.read(t, snapshots.get(t)) for t in TABLES]
        shop = index_shop(*(t.collect() for t in tables))
    except LakeError as e: refuse(challenger, champion, [f"lake: the state that it was made from cannot be read: {e}; train again"])
    return Case(ROOT, challenger, champion, shop, tables[0], SETTINGS.gates, reason)


def why(report: pl.DataFrame) -> str:
    """What the history says: that all gates passed, and what somebody said about a champion that could not be asked."""
    unasked = report.filter(pl.col("what").str.starts_with("the champion cannot be asked"))["what"]
    return "; ".join(["all gates passed", *unasked])


def shown(report: pl.DataFrame) -> str:
    """The report as a log has it."""
    number = pl.col("value", "limit").round(4)
    with pl.Config(tbl_rows=-1, tbl_width_chars=240, fmt_str_lengths=160, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True):
        return str(report.select("name", number, "passed", "what"))


def card_parts(report: pl.DataFrame, challenger: str, champion: str) -> list:
    """The card: the verdict, then every gate."""
    failed = report.filter(~pl.col("passed")).height
    return [Markdown(f"# {challenger}: {f'{failed} gates failed' if failed else 'all gates passed'}\nChampion: {champion or 'none'}."), card_table(report)]


if __name__ == "__main__": PromoteFlow()
