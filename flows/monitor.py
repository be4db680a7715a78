"""The last days beside what the champion was trained on, and whether to train again. `python flows/monitor.py run`; `[monitor]` has the limits.

`--retrain auto` trains and promotes on this machine when the verdict says so, `ask` only tells (on Argo that starts the training), `never` does neither.
A retrain that is no better leaves the champion alone, and this run ends well and says so; one that broke down ends it with exit code 1.
"""
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import polars as pl
from base import HERE, PROJECT, SETTINGS, TABLES, card_table, moment_of, run_record
from cluster import on_cluster
from events import tell
from metaflow import FlowSpec, Parameter, card, current, project, retry, step, trigger_on_finish
from metaflow.cards import Markdown
from metaflow.metaflow_config import ARGO_EVENTS_WEBHOOK_URL

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.bundle import BundleError
from reco.bundle_store import bundle_at, bundles_root
from reco.challenger import challenger_name, kept_report
from reco.data.lake import open_lake
from reco.provenance import git_sha
from reco.published import champion_name

M, ROOT = SETTINGS.monitor, bundles_root(SETTINGS)


@on_cluster
@project(name=PROJECT)
@trigger_on_finish(flow="IngestFlow")
class MonitorFlow(FlowSpec):
    """Hold the last days beside the champion's training, keep what was found, and train again if that is the verdict."""

    asof = Parameter("asof", default="", help="the moment to look back from, ISO 8601 with a time zone; now if not given")
    retrain = Parameter("retrain", default=M.retrain, help="auto, ask or never")

    @step
    def start(self):
        """Fix what the run depends on: settings, code, moment, champion, the state of the lake."""
        self.settings, self.git_sha = SETTINGS.without_secrets(), git_sha(HERE)
        if self.retrain not in ("auto", "ask", "never"): sys.exit(f"--retrain {self.retrain}: auto, ask or never")
        self.now, self.champion, lake = moment_of(self.asof), champion_name(ROOT), open_lake(SETTINGS)
        if not self.champion: sys.exit(f"nothing is published in {ROOT}: run `python flows/train.py run`, then `python flows/promote.py run`")
        self.snapshots = {t: lake.snapshot(t) for t in TABLES}
        print(f"champion {self.champion}, looking back from {self.now:%Y-%m-%d %H:%M}")
        self.next(self.compare)

    @card(type="blank")
    @step
    def compare(self):
        """Compare, decide, and keep numbers and pages."""
        from reco.monitoring.decision import decide  # brings SciPy, numba and LightGBM, which take seconds
        from reco.monitoring.history import keep_numbers, last_asked, remove_pages
        lake = open_lake(SETTINGS)
        self.drift, asked, reasons, self.figures, daily, pages = compared(lake, self.champion, self.now, self.snapshots)
        verdict = decide(reasons, last_asked(lake, self.now), self.now, M.min_days)
        self.verdict, self.why, self.reasons = verdict.retrain, verdict.why, verdict.reasons
        keep_numbers(lake, self.now.date(), self.now, self.champion, self.drift, verdict)
        self.pages = kept_pages(lake, self.now, pages)
        remove_pages(lake, self.now.date() - timedelta(days=M.keep_days))
        show_figures(self.now, self.drift, asked, verdict, self.figures, daily)
        for part in card_parts(self): current.card.append(part)
        print(f"{'retrain' if self.verdict else 'no retrain'}: {self.why}")
        self.next(self.act)

    @retry(times=0) # a retrain is asked for once
    @step
    def act(self):
        """Ask for a retrain, or do it, if that is the verdict and nobody else did."""
        from reco.monitoring.history import claim, settle
        lake, day, self.outcome = open_lake(SETTINGS), self.now.date(), "none"
        if self.verdict and self.retrain != "never" and claim(lake, day, self.now, str(current.run_id), self.champion, self.why):
            tell("retrain_asked", self.why, {"bundle": self.champion, "day": f"{day}"}, f"retrain_asked/{day}")
            self.outcome = "asked"
            if self.retrain == "auto" and not ARGO_EVENTS_WEBHOOK_URL: # there the event has started it already
                self.outcome = retrained(self.champion)
                settle(lake, day, self.outcome)
        self.next(self.end)

    @retry(times=0)
    @step
    def end(self):
        """Record the run and say what came of it."""
        self.record = run_record(self.settings, self.git_sha, {"lake": SETTINGS.lake.root, "champion": self.champion}, self.snapshots, self.now)
        said = {"none": "no retrain was asked for", "asked": "a retrain is asked for", "promoted": f"retrained: {champion_name(ROOT)} is served now",
                "refused": f"retrained, and the gates refused it: {champion_name(ROOT)} goes on"}
        if self.outcome not in said: sys.exit(f"the retrain broke down ({self.outcome}); {champion_name(ROOT)} goes on")
        print(said[self.outcome])


def compared(lake, champion: str, now: datetime, snapshots: dict[str, str]) -> tuple:
    """Drift of all tables, of the columns that may ask, the reasons, figures of both sides, daily conversion, and the frames worth a page."""
    from reco.bundle import load_bundle
    from reco.monitoring.decision import by_age, by_drift, by_metric, deciding
    from reco.monitoring.drift import drift_table
    from reco.monitoring.facts import Stretch, daily_conversion, facts, figures, stretches
    events, catalog = (lake.read(t, snapshots[t]) for t in TABLES)
    events, bundle, gap = events.filter(pl.col("ts") < now), load_bundle(bundle_at(ROOT, champion)), SETTINGS.data.session_gap_minutes
    asof = datetime.fromtimestamp(bundle.moment.asof/1000, UTC)
    then, late = stretches(asof, now, M.days, M.reference_days)
    sides = [facts(events, catalog, s, gap) for s in (then, late)]
    found = [drift_table(t, sides[0][t], sides[1][t], "who", bins=M.bins, most=M.words) for t in sides[0]]
    pages = {"events": (sides[0]["events"], sides[1]["events"])}
    strongest = strongest_of(bundle.ranker)
    if answers := both_answers(lake, bundle, events, catalog, late):
        for t in ("rows", "scores", "lists"):
            a, b = (getattr(x, t) for x in answers)
            found.append(drift_table(t, a, b, "who", "moment", M.bins, M.words))
        pages["rows"] = tuple(x.rows.select(strongest) for x in answers)
    drift = pl.concat(found)
    daily = daily_conversion(events, Stretch(then.since, now, then.window), gap)
    asked = deciding(drift, M.columns.split(), strongest)
    reasons = [by_drift(asked, M.psi, M.chance), by_metric("conversion of visits", daily, asof.date(), M.kpi_fall),
               by_age((now - asof)/timedelta(days=1), M.max_age_days)]
    values = [figures(side, s) | ({"coverage of the lists": x.coverage} if x else {}) for side, s, x in zip(sides, (then, late), answers or (None, None), strict=True)]
    rows = [(n, values[0].get(n), values[1].get(n)) for n in dict.fromkeys([*values[0], *values[1]])]
    shown = pl.DataFrame(rows, schema={"figure": pl.String, "before": pl.Float64, "now": pl.Float64}, orient="row")
    return drift, asked, reasons, shown, daily, pages


def strongest_of(ranker) -> list[str]:
    """The columns that the ranker gains most by."""
    gain = pl.DataFrame({"column": ranker.features, "gain": ranker.booster.feature_importance("gain")})
    return gain.sort("gain", "column", descending=[True, False]).head(M.features)["column"].to_list()


def both_answers(lake, bundle, events: pl.LazyFrame, catalog: pl.LazyFrame, late) -> tuple | None:
    """What the champion made of requests of its training's time, and of the last days; None where that cannot be had, which is said."""
    from reco.data.shop import index_shop
    from reco.monitoring.history import keep_reference, kept_reference
    from reco.monitoring.served import answers_now, answers_then
    now, then = answers_now(bundle, events, late, M.requests, SETTINGS.project.seed), kept_reference(lake, bundle.id)
    if now is None: return print("warning: nobody was there in the last days; rows, scores and lists are not compared")
    if then is None:
        early = events.filter(pl.col("ts").dt.epoch("ms") < bundle.moment.asof)
        try: then = answers_then(bundle, index_shop(early.collect(), catalog.collect()), early, late.window, M.requests, SETTINGS.project.seed)
        except (BundleError, ValueError) as e: return print(f"warning: rows, scores and lists are not compared: {e}")
        keep_reference(lake, bundle.id, then)
        then = kept_reference(lake, bundle.id)
    return then, now


def show_figures(now: datetime, drift: pl.DataFrame, asked: pl.DataFrame, verdict, figures: pl.DataFrame, daily: pl.DataFrame) -> None:
    """The file for Prometheus, where the settings name one."""
    if not M.textfile: return
    from textfile import figures_of_day, write_figures
    found = figures_of_day(now, drift, asked, (M.psi, M.chance), verdict.reasons, verdict.retrain, figures, daily)
    if trouble := write_figures(SETTINGS.path(M.textfile), found): print(f"warning: no figures for Prometheus in {M.textfile}: {trouble}")


def kept_pages(lake, now: datetime, pages: dict) -> list[str]:
    """Evidently's pages and whylogs profiles of the day, in the lake's folder."""
    from reco.monitoring.history import keep_file
    from reco.monitoring.reports import page, profile_of
    done = []
    for name, (before, late) in pages.items():
        if not before.height or not late.height: continue
        columns = [c for c in late.columns if c not in ("who", "moment")]
        done.append(keep_file(lake, f"pages/{now.date()}/{name}.html", page(before, late, columns, M.psi, M.bins, M.words).encode()))
        keep_file(lake, f"profiles/{now.date()}/{name}.bin", profile_of(late))
    return done


def run_of(flow: str) -> int:
    """Exit code of `python flows/FLOW.py run`."""
    return subprocess.run([sys.executable, str(HERE/f"{flow}.py"), "run"], cwd=HERE.parent, check=False).returncode


def retrained(champion: str) -> str:
    """Train and judge: promoted, refused, or where it broke down."""
    if code := run_of("train"): return f"train: exit code {code}"
    before = kept_report(ROOT, challenger_name(ROOT))
    code = run_of("promote")
    if champion_name(ROOT) != champion: return "promoted"
    report = kept_report(ROOT, challenger_name(ROOT))
    return "refused" if code == 1 and report and report != before and not report["passed"] else f"promote: exit code {code}"


def card_parts(run: MonitorFlow) -> list:
    """The card: the verdict, its reasons, figures, drift, and where the pages are."""
    drift = run.drift.sort("excess", descending=True, nulls_last=True)
    return [Markdown(f"# {'Train again' if run.verdict else 'No retrain'}\n{run.why}\n\nChampion {run.champion}."), card_table(run.reasons),
            Markdown("## How much"), card_table(run.figures), Markdown("## Drift"), card_table(drift.head(60)),
            Markdown(f"## Pages in the lake\n{', '.join(run.pages) or 'none'}")]


if __name__ == "__main__": MonitorFlow()
