"""Lake → candidates → ranker → evaluation → challenger. `python flows/train.py run`; `settings.ini` has the knobs."""
import json
from dataclasses import asdict, replace
from datetime import datetime

import polars as pl
from base import (
    AT_ONCE,
    HERE,
    PROJECT,
    SETTINGS,
    TABLES,
    Watch,
    card_table,
    read_shop,
    rule_book,
    run_record,
    scratch,
    tell_mlflow,
)
from cluster import on_cluster
from events import tell
from metaflow import FlowSpec, card, current, namespaced_event_name, project, schedule, step, trigger
from metaflow.cards import Image, Markdown, VegaChart

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.aliases import mirror
from reco.bundle import make_bundle, with_free_rows
from reco.bundle_store import bundles_root, save_in
from reco.challenger import set_challenger
from reco.data.histories import epoch_ms
from reco.data.lake import open_lake
from reco.data.split import Cutoffs
from reco.evaluation.backtest import backtest
from reco.evaluation.strengths import choose_strengths
from reco.model_card import column_facts, data_facts, model_card, variety_facts
from reco.moment import fit_moment, make_sources
from reco.plots import frontier_figure, ndcg_figure
from reco.provenance import git_sha, versions
from reco.ranking.alarms import LeakError, leak_report, stop_on_leaks
from reco.ranking.examples import joined
from reco.ranking.shapley import dependence_figure, importance, importance_figure, shapley
from reco.ranking.training import cutoffs_of, examples_at, fit_surface
from reco.schemas import SURFACES
from reco.tracking import log_training

DECIDED = "settings", "git_sha", "book", "snapshots", "cutoffs", "asof", "run_name"  # at the start, for all steps
LIBRARIES = "implicit", "lightgbm", "numba", "numpy", "polars", "scipy"


@on_cluster
@project(name=PROJECT)
@schedule(cron=SETTINGS.schedule.train, daily=False, timezone="UTC")
@trigger(event=namespaced_event_name("retrain_asked")) # Argo takes one kind of trigger: not the end of an ingestion, of which most give no reason to train
class TrainFlow(FlowSpec):
    """Learn from past cutoffs, judge on the hold-out, and make a bundle that knows everything up to now: the challenger."""

    @step
    def start(self):
        """Fix what the run depends on: settings, code, data snapshots, cutoffs; and lay the shop out for the steps that follow."""
        self.settings, self.git_sha = SETTINGS.without_secrets(), git_sha(HERE)
        make_sources(SETTINGS)  # a misspelt source stops here, not after the first fit
        self.book = rule_book()  # and so does a bad rules file
        lake = open_lake(SETTINGS)
        self.snapshots = {t: lake.snapshot(t) for t in TABLES}
        shop = read_shop(self.snapshots)
        self.cutoffs, self.asof = cutoffs_of(shop, self.settings), shop.end
        print(f"{len(shop.log):,} events of {len(shop.users):,} shoppers and {len(shop.items):,} items, {self.snapshots}")
        print(f"cutoffs: train {[f'{c:%Y-%m-%d}' for c in self.cutoffs.train]}, "
              f"validation {self.cutoffs.validation:%Y-%m-%d}, hold-out {self.cutoffs.holdout:%Y-%m-%d} to {self.asof:%Y-%m-%d}")
        self.run_name = f"{current.flow_name}-{current.run_id}"
        scratch(self.run_name).put("shop", shop)
        names = list(moments_of(self.cutoffs, self.asof))
        self.branches = [names[i::AT_ONCE] for i in range(min(AT_ONCE, len(names)))]
        self.next(self.fit, foreach="branches")

    @step
    def fit(self):
        """Fit all sources as of some moments, one after the other; where labels follow a moment, make the lists that the rankers learn from."""
        kept, moments = scratch(self.run_name), moments_of(self.cutoffs, self.asof)
        shop = kept.get("shop")
        for name in self.input:
            known = with_free_rows(shop, self.settings.bundles.new_items) if name == "now" else shop
            moment = fit_moment(known, epoch_ms(moments[name]), self.settings)
            if name in ("now", "holdout", "validation"): kept.put(name, moment)
            if name in ("now", "holdout"): continue
            for surface, examples in examples_at(shop, at := moments[name], self.cutoffs.label_end(at), self.settings, SURFACES, moment).items():
                kept.put(f"{surface}-{name}", examples)
                print(f"{name}, {at:%Y-%m-%d}, {surface}: {len(examples.sizes):,} lists of {len(examples.label):,} rows")
        self.next(self.rank)

    @step
    def rank(self, inputs):
        """Look for leaks, fit the surfaces' rankers where they are ahead of the sources' own order, and choose how much variety is worth."""
        for name in DECIDED: setattr(self, name, getattr(inputs[0], name))
        kept, train = scratch(self.run_name), [f"train-{i}" for i in range(len(self.cutoffs.train))]
        shop, fitted, watch = kept.get("shop"), {}, Watch()
        for surface in SURFACES:
            learnt, validation = joined([kept.get(f"{surface}-{name}") for name in train]), kept.get(f"{surface}-validation")
            if surface == "for_you":
                self.alarms = leak_report(shop, self.cutoffs.validation, learnt, validation, self.settings)
                for alarm in self.alarms.iter_rows(named=True): print("leak alarm {name}: {value:.4g}, limit {limit:.4g}".format(**alarm))
                stop_and_tell(self.alarms)
                watch.done("leak alarms")
            ranker, choice = fitted[surface] = fit_surface(surface, learnt, validation, self.settings)
            watch.done(f"ranker of {surface}")
            print(f"{surface}: {len(learnt.sizes):,} training lists, {choice}")
            if ranker: print(f"{surface}: {ranker.booster.num_trees()} trees on {len(ranker.features)} features")
        self.rankers, self.choices = {s: r for s, (r, _) in fitted.items() if r}, {s: c for s, (_, c) in fitted.items()}
        self.shapley = shapley(self.rankers["for_you"], kept.get("for_you-validation").rows, seed=self.settings.project.seed)
        watch.done("SHAP values")
        self.strengths, self.frontier = choose_strengths(shop, self.cutoffs, self.rankers["for_you"], self.settings, self.book, kept.get("validation"))
        watch.done("strengths of variety")
        self.seconds = watch.seconds
        print(f"re-ranking: {self.strengths}\nseconds: {json.dumps(self.seconds)}")
        self.next(self.evaluate)

    @step
    def evaluate(self):
        """Judge the pipeline and every single source on the hold-out."""
        kept = scratch(self.run_name)
        self.table = backtest(kept.get("shop"), self.cutoffs, self.rankers["for_you"], self.settings, book=self.book, strengths=self.strengths,
                              moment=kept.get("holdout"))
        with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160, float_precision=4, tbl_hide_dataframe_shape=True,
                       tbl_hide_column_data_types=True): print(self.table)
        self.next(self.end)

    @card(type="blank")
    @step
    def end(self):
        """Put the sources that know everything and the rankers into a bundle, the challenger, and show the evaluation."""
        kept = scratch(self.run_name)
        shop = kept.get("shop")
        self.record = run_record(self.settings, self.git_sha, {"lake": self.settings.lake.root}, self.snapshots, self.asof)
        about = self.record | {"versions": versions(LIBRARIES), "metrics": self.table.to_dicts(), "alarms": self.alarms.to_dicts(),
                               "cutoffs": {k: [str(x) for x in v] if isinstance(v, tuple) else str(v) for k, v in vars(self.cutoffs).items()},
                               "data": data_facts(shop), "strengths": asdict(self.strengths), "variety": variety_facts(self.frontier, self.strengths),
                               "frontier": self.frontier.to_dicts()}
        bundle = make_bundle(shop, epoch_ms(self.asof), self.rankers, self.settings, about, self.book, self.strengths, self.choices,
                             kept.get("now"))
        if unknown := bundle.reranker.compiled.unknown: print(f"rules name what the catalogue does not have: {', '.join(unknown)}")
        columns = importance(self.shapley, bundle.moment.features)
        bundle = replace(bundle, manifest=bundle.manifest | {"importance": column_facts(columns)})
        folder = save_in(bundle, root := bundles_root(SETTINGS))
        set_challenger(root/folder.name)
        self.bundle, self.model_card = folder.name, model_card(json.loads((folder/"manifest.json").read_text()))
        figures = figures_of(self, columns)
        tables = {"metrics": self.table, "frontier": self.frontier, "alarms": self.alarms, "importance": columns}
        tell_mlflow(lambda: (log_training(SETTINGS, folder, self.model_card, tables, figures), mirror(SETTINGS)))
        for part in card_parts(self.table, bundle.ranker, bundle.moment.features, self.bundle, self.snapshots): current.card.append(part)
        for part in (Markdown("## What variety costs, on validation"), card_table(self.frontier), Markdown("## Leak alarms"),
                     card_table(self.alarms), *(Image.from_matplotlib(figures[n]) for n in ("importance", "dependence"))): current.card.append(part)
        kept.remove()
        print(f"challenger {self.bundle}: `python flows/promote.py run` holds it to the gates and publishes it")


def moments_of(cutoffs: Cutoffs, asof: datetime) -> dict[str, datetime]:
    """Every moment at which the sources are fitted, by its name in the run; most events first."""
    return {"now": asof, "holdout": cutoffs.holdout, "validation": cutoffs.validation} | {f"train-{i}": c for i, c in reversed([*enumerate(cutoffs.train)])}


def stop_and_tell(alarms: pl.DataFrame) -> None:
    """End the run when a leak alarm went off, and tell people: a schedule that trains in vain has no other voice."""
    try: stop_on_leaks(alarms)
    except LeakError as e:
        fired = alarms.filter(~pl.col("passed"))["name"].to_list()
        tell("training_stopped", f"the training saw what it must not see, and made no challenger: {e}", {"alarms": len(fired)},
             f"training_stopped/{current.origin_run_id or current.run_id}/{'+'.join(fired)}")
        raise


def figures_of(flow: TrainFlow, columns: pl.DataFrame) -> dict:
    """What a run looks like, for MLflow and the card; `columns` of `importance`."""
    return {"ndcg": ndcg_figure(flow.table), "frontier": frontier_figure(flow.frontier, flow.strengths, flow.settings.rerank.max_loss),
            "importance": importance_figure(columns, "What the ranker goes by"),
            "dependence": dependence_figure(flow.shapley, columns, "How the strongest columns move a score")}


def ndcg_chart(table: pl.DataFrame) -> VegaChart:
    """NDCG@10 of each system with its 95% interval, a panel per kind of request."""
    values = table.select("slice", "system", "low", "high", ndcg="NDCG@10").to_dicts()
    order = {"field": "system", "type": "nominal", "sort": table["system"].unique(maintain_order=True).to_list(), "title": None}
    bars = {"mark": "bar", "encoding": {"y": order, "x": {"field": "ndcg", "type": "quantitative", "title": "NDCG@10"}}}
    whiskers = {"mark": "rule", "encoding": {"y": order, "x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}}}
    return VegaChart({"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "data": {"values": values},
                      "facet": {"column": {"field": "slice", "title": None}}, "spec": {"width": 180, "layer": [bars, whiskers]}})


def card_parts(table: pl.DataFrame, ranker, meaning: dict[str, str], bundle: str, snapshots: dict[str, str]) -> list:
    """The card: how good, by what, from what."""
    gain = pl.DataFrame({"feature": ranker.features, "gain": ranker.booster.feature_importance("gain")})
    gain = gain.select("feature", share=pl.col("gain")/pl.col("gain").sum(), meaning=pl.col("feature").replace_strict(meaning))
    return [Markdown(f"# Bundle {bundle}\nFrom {snapshots}. Relevant is what was bought within the horizon; "
                     "the same rules were applied to every system."),
            ndcg_chart(table), card_table(table), Markdown("## What the ranker looks at"),
            card_table(gain.sort("share", descending=True).head(15))]


if __name__ == "__main__": TrainFlow()
