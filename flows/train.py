"""Lake → candidates → ranker → evaluation → challenger. `python flows/train.py run`; `settings.ini` has the knobs."""
import json
from dataclasses import asdict, replace

import polars as pl
from base import HERE, PROJECT, SETTINGS, TABLES, card_table, read_shop, rule_book, run_record, tell_mlflow
from metaflow import FlowSpec, card, current, project, step
from metaflow.cards import Image, Markdown, VegaChart

import reco  # noqa: F401  (Metaflow packs the modules that are imported here)
from reco.bundle import make_bundle, save_bundle
from reco.challenger import set_challenger
from reco.data.histories import epoch_ms
from reco.data.lake import open_lake
from reco.evaluation.backtest import backtest
from reco.evaluation.strengths import choose_strengths
from reco.model_card import column_facts, data_facts, model_card, variety_facts
from reco.moment import make_sources
from reco.plots import frontier_figure, ndcg_figure
from reco.provenance import git_sha, versions
from reco.ranking.alarms import leak_report, stop_on_leaks
from reco.ranking.shapley import dependence_figure, importance, importance_figure, shapley
from reco.ranking.training import cutoffs_of, fit_rankers, training_examples
from reco.reranking.rulebook import SURFACES
from reco.tracking import log_training, mirror

LIBRARIES = "implicit", "lightgbm", "numba", "numpy", "polars", "scipy"


@project(name=PROJECT)
class TrainFlow(FlowSpec):
    """Learn from past cutoffs, judge on the hold-out, and make a bundle that knows everything up to now: the challenger."""

    @step
    def start(self):
        """Fix what the run depends on: settings, code, data snapshots, cutoffs."""
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
        self.next(self.train)

    @step
    def train(self):
        """Fit sources at every cutoff, the rankers on what they proposed, and choose how much variety is worth."""
        shop = read_shop(self.snapshots)
        examples = training_examples(shop, self.cutoffs, self.settings, SURFACES)
        self.alarms = leak_report(shop, self.cutoffs.validation, *examples["for_you"], self.settings)
        for alarm in self.alarms.iter_rows(named=True): print("leak alarm {name}: {value:.4g}, limit {limit:.4g}".format(**alarm))
        stop_on_leaks(self.alarms)
        self.rankers, self.choices = fit_rankers(examples, self.settings)
        for surface, choice in self.choices.items(): print(f"{surface}: {len(examples[surface][0].sizes):,} training lists, {choice}")
        for surface, ranker in self.rankers.items(): print(f"{surface}: {ranker.booster.num_trees()} trees on {len(ranker.features)} features")
        self.strengths, self.frontier = choose_strengths(shop, self.cutoffs, self.rankers["for_you"], self.settings, self.book)
        print(f"re-ranking: {self.strengths}")
        self.shapley = shapley(self.rankers["for_you"], examples["for_you"][1].rows, seed=self.settings.project.seed)
        self.next(self.evaluate)

    @step
    def evaluate(self):
        """Judge the pipeline and every single source on the hold-out."""
        self.table = backtest(read_shop(self.snapshots), self.cutoffs, self.rankers["for_you"], self.settings,
                              book=self.book, strengths=self.strengths)
        with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160, float_precision=4, tbl_hide_dataframe_shape=True,
                       tbl_hide_column_data_types=True): print(self.table)
        self.next(self.end)

    @card(type="blank")
    @step
    def end(self):
        """Refit the sources on everything, save the bundle as challenger and show the evaluation."""
        shop = read_shop(self.snapshots)
        self.record = run_record(self.settings, self.git_sha, {"lake": self.settings.lake.root}, self.snapshots, self.asof)
        about = self.record | {"versions": versions(LIBRARIES), "metrics": self.table.to_dicts(), "alarms": self.alarms.to_dicts(),
                               "cutoffs": {k: [str(x) for x in v] if isinstance(v, tuple) else str(v) for k, v in vars(self.cutoffs).items()},
                               "data": data_facts(shop), "strengths": asdict(self.strengths), "variety": variety_facts(self.frontier, self.strengths)}
        bundle = make_bundle(shop, epoch_ms(self.asof), self.rankers, self.settings, about, self.book, self.strengths, self.choices)
        if unknown := bundle.reranker.compiled.unknown: print(f"rules name what the catalogue does not have: {', '.join(unknown)}")
        columns = importance(self.shapley, bundle.moment.features)
        bundle = replace(bundle, manifest=bundle.manifest | {"importance": column_facts(columns)})
        folder = save_bundle(bundle, SETTINGS.path(SETTINGS.bundles.root))
        set_challenger(folder)
        self.bundle, self.model_card = folder.name, model_card(json.loads((folder/"manifest.json").read_text()))
        figures = figures_of(self, columns)
        tables = {"metrics": self.table, "frontier": self.frontier, "alarms": self.alarms, "importance": columns}
        tell_mlflow(lambda: (log_training(SETTINGS, folder, self.model_card, tables, figures), mirror(SETTINGS)))
        for part in card_parts(self.table, bundle.ranker, bundle.moment.features, self.bundle, self.snapshots): current.card.append(part)
        for part in (Markdown("## What variety costs, on validation"), card_table(self.frontier), Markdown("## Leak alarms"),
                     card_table(self.alarms), *(Image.from_matplotlib(figures[n]) for n in ("importance", "dependence"))): current.card.append(part)
        print(f"challenger {self.bundle}: `python flows/promote.py run` holds it to the gates and publishes it")


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
