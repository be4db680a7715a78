"""Challengers and champions for tests, as a training would leave them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reco.bundle import make_bundle, save_bundle
from reco.data.histories import epoch_ms
from reco.ranking.lambdamart import Ranker

DAY = 86_400_000
QUIET = ({"name": "shuffled labels", "value": 0.1, "limit": 0.3, "passed": True},)
LOUD = ({"name": "single feature planted: NDCG@10 by itself", "value": 0.99, "limit": 0.8, "passed": False},)


def said(trained, alarms: Sequence[dict] = QUIET, **more: object) -> dict:
    """What a training writes into the manifest."""
    cutoffs = {k: str(v) for k, v in vars(trained.cutoffs).items()}
    return {"git_sha": "test", "metrics": [], "cutoffs": cutoffs, "alarms": list(alarms)} | more


def upside_down(ranker: Ranker) -> Ranker:
    """A ranker that likes best what this one likes least."""
    return replace(ranker, slope=-ranker.slope)


def made(trained, root: Path, older_days: float = 0, about: dict | None = None, ranker: Ranker | None = None, **settings: object) -> str:
    """The name of a bundle in `root` that was made so many days before the end of the shop's log."""
    asof = round(epoch_ms(trained.cutoffs.end) - older_days * DAY)
    with_settings = trained.settings.model_copy(update=settings)
    return save_bundle(make_bundle(trained.shop, asof, {"for_you": ranker or trained.ranker}, with_settings, about or said(trained)), root).name
