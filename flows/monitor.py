"""The last days beside what the champion was trained on, and whether to train again. `python flows/monitor.py run`; `[monitor]` has the limits.

`--retrain auto` trains and promotes on this machine when the verdict says so, `ask` only tells (on Argo that starts the training), `never` does neither. In a pod of a run
`--with kubernetes` there is no room for a training: there `auto` is `ask`. A retrain that is no better leaves the champion alone, and this run ends well and says so; one that broke down, or that could not be
asked for, ends it with exit code 1, and the next run, or `python flows/monitor.py resume`, has its turn. Drift and skew are told whatever is made of them.
`--since 2026-11-20` makes good days on which no run happened; `--because "prices were wrong until today"` trains anew whatever is found.
"""
import os
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple

import polars as pl
from base import HERE, PROJECT, SETTINGS, TABLES, card_table, moment_of, run_record
from cluster import on_cluster
from events import receivers, tell
from metaflow import FlowSpec, Parameter, card, current, project, retry, step, trigger_on_finish
from metaflow.cards import Markdown
from metaflow.metaflow_config import ARGO_EVENTS_WEBHOOK_URL

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.bundle import BundleError
from reco.bundle_copies import bundle_at
from reco.bundle_store import bundles_in, bundles_root
from reco.challenger import challenger_name, kept_report
from reco.data.lake import open_lake
from reco.provenance import git_sha
from reco.published import champion_name, history
from reco.settings import find_settings

M, ROOT = SETTINGS.monitor, bundles_root(SETTINGS)
IN_POD = "METAFLOW_KUBERNETES_WORKLOAD" in os.environ # what Metaflow says of a pod
LISTS = 5_000 # of the serve log on either side of its drift: fifty thousand exposures tell chance from drift as well as all
SAID = {"none": "no retrain was asked for", "asked": "a retrain is asked for", "promoted": "retrained: {} is served now", "refused": "retrained, and the gates refused it: {} goes on"}


@on_cluster
@project(name=PROJECT)
@trigger_on_finish(flow="IngestFlow")
class MonitorFlow(FlowSpec):
    """Hold the last days beside the champion's training, keep what was found, and train again if that is the verdict."""

    asof = Parameter("asof", default="", help="the moment to look back from, ISO 8601 with a time zone; now if not given")
    retrain = Parameter("retrain", default=M.retrain, help="auto, ask or never")
    since = Parameter("since", default="", help="look at earlier days too, from this one (YYYY-MM-DD), each as of its end: days on which no run happened. Nothing is asked for on their account")
    because = Parameter("because", default="", help="a retrain is wanted whatever is found, and why")

    @step
    def start(self):
        """Fix what the run depends on: settings, code, moment, champion, the state of the lake."""
        self.settings, self.git_sha = SETTINGS.without_secrets(), git_sha(HERE)
        if self.retrain not in ("auto", "ask", "never"): sys.exit(f"--retrain {self.retrain}: auto, ask or never")
        self.now, self.champion, lake = moment_of(self.asof), champion_name(ROOT), open_lake(SETTINGS)
        self.earlier = ends_of(self.since, self.now)
        if not self.champion: sys.exit(f"nothing is published in {ROOT}: run `python flows/train.py run`, then `python flows/promote.py run`")
        there = lake.tables()
        self.snapshots, self.asker = {t: lake.snapshot(t) for t in (*TABLES, "exposures") if t in TABLES or t in there}, str(current.run_id) # of a run that is resumed its first name
        print(f"champion {self.champion}, looking back from {self.now:%Y-%m-%d %H:%M}")
        if self.retrain == "auto" and IN_POD and not ARGO_EVENTS_WEBHOOK_URL: print("note: this pod has no room for a training; a retrain is only asked for")
        self.next(self.compare)

    @card(type="blank", id="summary")
    @card(type="html", id="pages")
    @step
    def compare(self):
        """Compare, decide, and keep numbers and pages."""
        from reco.monitoring.decision import moved  # brings SciPy, numba and LightGBM, which take seconds
        lake, day = open_lake(SETTINGS), self.now.date()
        for at in self.earlier: looked_at(lake, self.champion, at, self.snapshots)
        found, verdict, self.pages, self.html = looked_at(lake, self.champion, self.now, self.snapshots, self.because)
        self.drift, self.figures, self.skew = found.drift, found.figures, found.skew and found.skew._asdict()
        self.verdict, self.why, self.reasons = verdict.retrain, verdict.why, verdict.reasons
        self.moved = moved(found.asked, M.psi, M.chance).select("table", "column", "excess", "moved").rows()
        self.served = kept_profiles(lake, self.snapshots, self.now)
        removed(lake, day)
        show_figures(self.now, found, verdict)
        for part in card_parts(self): current.card["summary"].append(part)
        print(f"{'retrain' if self.verdict else 'no retrain'}: {self.why}")
        self.next(self.act)

    @retry(times=0) # a retrain is asked for once
    @step
    def act(self):
        """Say what was found; ask for a retrain, or do it, if that is the verdict and nobody else did."""
        from reco.monitoring.retrains import UNDERWAY, claim, settle
        lake, day = open_lake(SETTINGS), self.now.date()
        tell_found(self, day)
        self.outcome = claim(lake, day, self.now, self.asker, self.champion, self.why, bool(self.because)) or "none" if self.verdict and self.retrain != "never" else "none"
        if self.outcome in UNDERWAY:
            self.outcome = asked_for(self, lambda state: settle(lake, day, self.asker, state))
            settle(lake, day, self.asker, self.outcome)
        if self.outcome not in SAID: sys.exit(f"the retrain broke down ({self.outcome}); {champion_name(ROOT)} goes on")
        self.next(self.end)

    @retry(times=0)
    @step
    def end(self):
        """Record the run and say what came of it."""
        self.record = run_record(self.settings, self.git_sha, {"lake": SETTINGS.lake.root, "champion": self.champion}, self.snapshots, self.now)
        print(SAID[self.outcome].format(champion_name(ROOT)))


class Skew(NamedTuple):
    """What came of answering logged requests again."""
    found: dict[str, float]   # of `skew_figures`
    excluded: dict[str, int]  # reason → lists
    first: str                # the first item that differs
    beyond: bool              # whether that is more than [monitor] skew


class Found(NamedTuple):
    """What a day looks like."""
    drift: pl.DataFrame       # DRIFT of all tables
    asked: pl.DataFrame       # of the columns that may ask for a retrain
    reasons: list             # REASONS
    figures: pl.DataFrame     # of both sides
    daily: pl.DataFrame       # conversion by day
    pages: dict               # heading → the two frames of a page
    skew: Skew | None         # None without a serve log


def ends_of(since: str, now: datetime) -> list[datetime]:
    """The ends of the days from one on that are over, but for the last, which is looked at anyway; a bad day ends the run."""
    if not since: return []
    try: first = date.fromisoformat(since)
    except ValueError as e: sys.exit(f"--since {since}: {e}")
    if first > now.date(): sys.exit(f"--since {since}: that day is still to come")
    return [datetime.combine(first + timedelta(days=n), time(), UTC) for n in range(1, (now.date() - first).days)]


def looked_at(lake, champion: str, now: datetime, snapshots: dict[str, str], because: str = "") -> tuple:
    """Hold one day beside the champion's time, decide, and keep numbers and page; what was found, the verdict, where the page is, and the page."""
    from reco.monitoring.decision import by_hand, decide
    from reco.monitoring.history import keep_numbers, keep_skew
    from reco.monitoring.retrains import last_asked
    found, day = compared(lake, champion, now, snapshots), now.date()
    verdict = decide(found.reasons, last_asked(lake, now), now, M.min_days)
    if because: verdict = by_hand(verdict, because)
    keep_numbers(lake, day, now, champion, found.drift, verdict)
    if found.skew: keep_skew(lake, day, now, champion, found.skew.found, found.skew.excluded)
    return found, verdict, *kept_pages(lake, day, found.pages)


def compared(lake, champion: str, now: datetime, snapshots: dict[str, str]) -> Found:
    """Both sides of everything that is watched, and what speaks for a retrain."""
    from reco.bundle import load_bundle
    from reco.monitoring.decision import by_age, by_drift, by_metric, deciding
    from reco.monitoring.drift import drift_table
    from reco.monitoring.facts import Stretch, daily_conversion, facts, figures, stretches
    events, catalog = (lake.read(t, snapshots[t]) for t in TABLES)
    events, bundle, gap = events.filter(pl.col("ts") < now), load_bundle(bundle_at(ROOT, champion)), SETTINGS.data.session_gap_minutes
    asof = datetime.fromtimestamp(bundle.moment.asof/1000, UTC)
    then, late = stretches(asof, now, M.days, M.reference_days)
    sides = [facts(events, catalog, s, gap) for s in (then, late)]
    tables = [drift_table(t, sides[0][t], sides[1][t], "who", bins=M.bins, most=M.words) for t in sides[0]]
    pages = {t: (sides[0][t], sides[1][t]) for t in ("events", "catalog")}
    strongest = strongest_of(bundle.ranker)
    if answers := both_answers(lake, bundle, events, catalog, late):
        for t in ("rows", "scores", "lists"):
            a, b = pages[t] = tuple(getattr(x, t) for x in answers)
            tables.append(drift_table(t, a, b, "who", "moment", M.bins, M.words))
        pages["rows"] = tuple(x.rows.select(strongest) for x in answers)
    if served := both_shown(lake, snapshots, champion, late):
        tables.append(drift_table("served", *served, "who", bins=M.bins, most=M.words))
        pages["served"] = served
    drift = pl.concat(tables)
    daily = daily_conversion(events, Stretch(then.since, now, then.window), gap)
    asked = deciding(drift, M.columns.split(), strongest)
    reasons = [by_drift(asked, M.psi, M.chance), by_metric("conversion of visits", daily, asof.date(), M.kpi_fall),
               by_age((now - asof)/timedelta(days=1), M.max_age_days)]
    values = [figures(side, s) | ({"coverage of the lists": x.coverage} if x else {}) for side, s, x in zip(sides, (then, late), answers or (None, None), strict=True)]
    rows = [(n, values[0].get(n), values[1].get(n)) for n in dict.fromkeys([*values[0], *values[1]])]
    shown = pl.DataFrame(rows, schema={"figure": pl.String, "before": pl.Float64, "now": pl.Float64}, orient="row")
    return Found(drift, asked, reasons, shown, daily, pages, skew_of(lake, snapshots, bundle, events, catalog, late))


def skew_of(lake, snapshots: dict[str, str], bundle, events: pl.LazyFrame, catalog: pl.LazyFrame, late) -> Skew | None:
    """Logged requests of the last days, answered once more by the same bundle."""
    if "exposures" not in snapshots: return print("note: there is no serve log yet; nothing is answered again")
    from reco.materialize import noted_rows
    from reco.monitoring.skew import beyond, compared_again, first_apart, skew_figures
    made = compared_again(bundle, lake.read("exposures", snapshots["exposures"]), events, catalog, late, M.requests, SETTINGS.project.seed,
                          noted_rows(lake, bundle.id), SETTINGS.serving.deadline_ms, SETTINGS.serving.cache_seconds)
    found = skew_figures(made)
    print(f"answered again: {found['requests']:.0f} logged requests" + (f", {found['different']:.2%} of {found['items']:.0f} items have another score" if found["items"] else ""))
    return Skew(found, made.excluded, first_apart(made.items), beyond(found, M.skew))


def both_shown(lake, snapshots: dict[str, str], champion: str, late) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """What was served in the champion's first days, or in the days before, and in the last days; None where either is missing."""
    if "exposures" not in snapshots: return None
    from reco.monitoring.shown import shown_sides
    published = [datetime.fromisoformat(p.at) for p in history(ROOT) if p.bundle_id == champion]
    return shown_sides(lake.read("exposures", snapshots["exposures"]), published[-1] if published else None, late, LISTS, SETTINGS.project.seed)


def strongest_of(ranker) -> list[str]:
    """The columns that the ranker gains most by."""
    gain = pl.DataFrame({"column": ranker.features, "gain": ranker.booster.feature_importance("gain")})
    return gain.sort("gain", "column", descending=[True, False]).head(M.features)["column"].to_list()


def both_answers(lake, bundle, events: pl.LazyFrame, catalog: pl.LazyFrame, late) -> tuple | None:
    """What the champion made of requests of its training's time, and of the last days; None where that cannot be had, which is said."""
    from reco.data.shop import index_shop
    from reco.monitoring.references import keep_reference, kept_reference
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


def show_figures(now: datetime, found: Found, verdict) -> None:
    """The file for Prometheus, where the settings name one."""
    if not M.textfile: return
    from textfile import figures_of_day, write_figures
    skew = (found.skew.found, found.skew.excluded, M.skew) if found.skew else None
    made = figures_of_day(now, found.drift, found.asked, (M.psi, M.chance), verdict.reasons, verdict.retrain, found.figures, found.daily, skew)
    if trouble := write_figures(SETTINGS.path(M.textfile), made): print(f"warning: no figures for Prometheus in {M.textfile}: {trouble}")


def kept_pages(lake, day: date, pages: dict) -> tuple[list[str], str]:
    """Evidently's page of the day in the lake's folder and whylogs profiles beside it; where the page is, and the page itself for the card."""
    from reco.monitoring.files import keep_file
    from reco.monitoring.reports import page, profile_of, together
    made = {}
    for name, (before, late) in pages.items():
        if not before.height or not late.height: continue
        made[name] = page(before, late, [c for c in late.columns if c not in ("who", "moment")], M.psi, M.bins, M.words)
        if name in ("events", "rows"): keep_file(lake, f"profiles/{day}/{name}.bin", profile_of(late))
    if not made: return [], "<p>There was nothing to compare.</p>"
    html = together(made)
    return [keep_file(lake, f"pages/{day}/drift.html", html.encode())], html


def kept_profiles(lake, snapshots: dict[str, str], now: datetime) -> pl.DataFrame | None:
    """Profiles of what was served, a file for each of the last days; all of them together. Lists may be late: yesterday is profiled again."""
    if "exposures" not in snapshots: return None
    from reco.data.profile import described, merged
    from reco.monitoring.files import keep_file, read_file
    from reco.monitoring.reports import day_profile
    exposures, found = lake.read("exposures", snapshots["exposures"]), []
    for n in range(M.days, -1, -1):
        day = now.date() - timedelta(days=n)
        profile = read_file(lake, name := f"profiles/{day}/served.bin")
        if profile is None or n < 2:
            if (profile := day_profile(exposures, day, now, SETTINGS.project.seed)) is None: continue
            keep_file(lake, name, profile)
        found.append(profile)
    return described(merged(found)) if found else None


def removed(lake, day: date) -> None:
    """What has been kept for long enough goes."""
    from reco.monitoring.files import remove_days, remove_references
    remove_days(lake, "pages", day - timedelta(days=M.keep_days))
    remove_days(lake, "profiles", day - timedelta(days=M.profile_days))
    remove_references(lake, bundles_in(ROOT))


def tell_found(run: MonitorFlow, day: date) -> None:
    """Drift and skew of the day, each told once, whether or not a retrain is asked for."""
    about = {"bundle": run.champion, "day": f"{day}"}
    if run.moved:
        named = "; ".join(f"{t}.{c} has moved by {x:.3g} ({what})" for t, c, x, what in run.moved[:3])
        more = f" and {len(run.moved) - 3} more columns" if len(run.moved) > 3 else ""
        tell("drift_found", named + more, about | {"columns": len(run.moved), "largest": round(run.moved[0][2], 3)}, f"drift_found/{day}")
    if run.skew and run.skew["beyond"]:
        f = run.skew["found"]
        tell("skew_found", f"{f['different']:.1%} of the items of {f['requests']:.0f} logged requests get another score from the lake; {run.skew['first']}",
             about | {"different": round(f["different"], 4), "limit": M.skew}, f"skew_found/{day}")


def trains_here(retrain: str) -> bool:
    """Whether this run trains by itself: not where an event starts the training, and not in a pod that asked for the memory of a comparison."""
    return retrain == "auto" and not ARGO_EVENTS_WEBHOOK_URL and not IN_POD


def asked_for(run: MonitorFlow, now_is) -> str:
    """Tell who should train, or train; what came of it. `now_is` writes down that it has begun."""
    once = f"retrain_asked/{run.now.date()}" + (f"/{run.asker}" if run.because else "")  # a person's is another one than the day's own
    trouble = tell("retrain_asked", run.why, {"bundle": run.champion, "day": f"{run.now.date()}"}, once)
    if trains_here(run.retrain):
        now_is("training")
        return retrained(run.champion)
    to = receivers()
    deaf = [n for n in to if n in trouble]
    if "argo" in deaf or to and len(deaf) == len(to): return "not asked for: " + "; ".join(f"{n}: {trouble[n]}" for n in deaf)
    return "asked"


def run_of(flow: str) -> int:
    """Exit code of `python flows/FLOW.py run` with the settings that this run has, wherever it was started."""
    found = find_settings()
    named = {"RECO_SETTINGS": str(found.resolve())} if found else {}
    return subprocess.run([sys.executable, str(HERE/f"{flow}.py"), "run"], env=os.environ | named, check=False).returncode


def retrained(champion: str) -> str:
    """Train and judge: promoted, refused, or where it broke down."""
    if code := run_of("train"): return f"train: exit code {code}"
    before = kept_report(ROOT, challenger_name(ROOT))
    code = run_of("promote")
    if champion_name(ROOT) != champion: return "promoted"
    report = kept_report(ROOT, challenger_name(ROOT))
    return "refused" if code == 1 and report and report != before and not report["passed"] else f"promote: exit code {code}"


def card_parts(run: MonitorFlow) -> list:
    """The card: the verdict, its reasons, figures, drift, skew, what was served, and where the page is."""
    drift = run.drift.sort("excess", descending=True, nulls_last=True)
    parts = [Markdown(f"# {'Train again' if run.verdict else 'No retrain'}\n{run.why}\n\nChampion {run.champion}."), card_table(run.reasons),
             Markdown("## How much"), card_table(run.figures), Markdown("## Drift"), card_table(drift.head(60))]
    if run.skew: parts += skew_parts(Skew(**run.skew))
    if run.served is not None: parts += [Markdown(f"## What was served in {M.days} days, all bundles"), card_table(run.served)]
    return [*parts, Markdown(f"## Page in the lake\n{', '.join(run.pages) or 'none'}")]


def skew_parts(skew: Skew) -> list:
    """Logged requests that were answered again, and those that could not be."""
    from reco.monitoring.skew import WHY_NOT
    found = pl.DataFrame([*skew.found.items()], schema={"figure": pl.String, "value": pl.Float64}, orient="row")
    left = pl.DataFrame([(n, WHY_NOT[r]) for r, n in skew.excluded.items()], schema={"lists": pl.Int64, "not answered again because": pl.String}, orient="row")
    return [Markdown(f"## Logged requests, answered again\n{skew.first or 'No score differs.'}"), card_table(found), card_table(left)]


if __name__ == "__main__": MonitorFlow()
