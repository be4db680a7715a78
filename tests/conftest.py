"""One small simulated shop, trained once for the whole session."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from worlds import world  # noqa: F401 (a fixture of many files)

from reco.bundle import ModelBundle, load_bundle, make_bundle, save_bundle
from reco.data.histories import epoch_ms
from reco.data.shop import ShopData, index_shop
from reco.data.simulator import Shop, simulate
from reco.data.split import Cutoffs
from reco.features.store import OnlineStore, open_store
from reco.published import publish
from reco.ranking.lambdamart import Ranker
from reco.ranking.orders import Choice
from reco.ranking.training import cutoffs_of, fit_rankers, training_examples
from reco.schemas import SURFACES
from reco.settings import Ranking, Settings, Train

END = datetime(2026, 5, 1, tzinfo=UTC)


class Trained(NamedTuple):
    """A shop and what was learned from it; the ranker has not seen the hold-out."""

    sim: Shop
    shop: ShopData
    settings: Settings
    cutoffs: Cutoffs
    rankers: dict[str, Ranker]
    choices: dict[str, Choice]

    @property
    def ranker(self) -> Ranker: return self.rankers["for_you"]


@pytest.fixture(scope="session")
def trained() -> Trained:
    settings = Settings(ranking=Ranking(trees=60), train=Train(cutoffs=3))
    sim = simulate(users=1_500, items=300, events=30_000, days=70, end=END, seed=11)
    shop = index_shop(sim.interactions, sim.catalog)
    cutoffs = cutoffs_of(shop, settings)
    return Trained(sim, shop, settings, cutoffs, *fit_rankers(training_examples(shop, cutoffs, settings, SURFACES), settings))


@pytest.fixture(scope="session")
def bundle_root(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one published bundle that knows the shop's whole log."""
    root = tmp_path_factory.mktemp("bundles")
    about = {"git_sha": "test", "metrics": []}
    publish(save_bundle(make_bundle(trained.shop, epoch_ms(END), trained.rankers, trained.settings, about, choices=trained.choices), root))
    return root


@pytest.fixture(scope="session")
def bundle(bundle_root: Path) -> ModelBundle:
    """The published bundle, as an endpoint would load it."""
    return load_bundle(bundle_root / (bundle_root / "current").read_text().strip())


@pytest.fixture(scope="session")
def store_root(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an embedded online store that knows the shop's whole log."""
    root = tmp_path_factory.mktemp("store")
    filled = open_store(trained.settings.model_copy(update={"root": root}))
    filled.append(trained.sim.interactions)
    filled.close()
    return root


@pytest.fixture(scope="session")
def store(trained: Trained, store_root: Path) -> Iterator[OnlineStore]:
    """That store, as an endpoint would open it."""
    opened = open_store(trained.settings.model_copy(update={"root": store_root}))
    yield opened
    opened.close()
