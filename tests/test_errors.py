"""The accounts of what was wanted: every item in exactly one, the same one that a slow and plain count finds."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reco.candidates.base import Candidates, Retrieved, merge
from reco.evaluation.errors import (
    AGES,
    DEPTHS,
    FAME,
    STAGES,
    about,
    age_of,
    by_group,
    by_source,
    by_stage,
    depth_of,
    fame_of,
    losses,
    within,
)
from reco.evaluation.exposed import exposure_by, lorenz, novelty, times_shown
from reco.evaluation.metrics import gini
from reco.evaluation.reliability import calibration_error, reliability
from reco.evaluation.subject import Subject, account_of, answered, of_bundle, past_in_words
from reco.ranking.examples import Outcomes
from reco.reranking.lists import Strengths
from reco.reranking.rules import BEYOND, FATES, SHOWN
from reco.settings import Train

N = 12  # items


@st.composite
def cases(draw):
    """Requests with candidates of two sources, fates, lists, and wishes."""
    seed, n = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 4))
    rng = np.random.default_rng(seed)
    width, k = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    def source() -> Retrieved:
        items = np.stack([rng.permutation(N)[:width] for _ in range(n)]).astype(np.int32)
        items[rng.random(items.shape) < .3] = -1
        return Retrieved(items, np.where(items >= 0, 1., np.nan).astype(np.float32))
    c = merge({"a": source(), "b": source()})
    odds = rng.integers(0, 3, len(c.item)).astype(float)  # with ties
    fate = rng.integers(0, len(FATES), len(c.item)).astype(np.int8)
    lists = lambda: np.stack([np.r_[rng.permutation(N)[:k - 1], [-1]] for _ in range(n)]).astype(np.int32)
    pairs = np.flatnonzero(rng.random(n * N) < draw(st.floats(0, 1)))
    truth = Outcomes(pairs // N, (pairs % N).astype(np.int32), np.ones(len(pairs), np.int8), n)
    return truth, rng.integers(0, 3, n).astype(np.int32), c, odds, rng.random(N) < .8, fate, lists(), lists()


def slow(truth, user, c: Candidates, odds, known, fate, items, plain) -> list[tuple]:
    """The same accounts, one wish at a time."""
    out = []
    for request, item in zip(truth.request.tolist(), truth.item.tolist(), strict=True):
        mine = [r for r in range(len(c.item)) if c.indptr[request] <= r < c.indptr[request + 1]]
        row = next((r for r in mine if c.item[r] == item), None)
        place = None if row is None else 1 + sum(odds[r] > odds[row] or (odds[r] == odds[row] and c.item[r] < item) for r in mine)
        proposed_by = 0 if row is None else sum(not np.isnan(x) for x in c.ranks[row])
        rule = None
        if item in items[request].tolist(): stage = "shown"
        elif not known[item]: stage = "unknown"
        elif row is None: stage = "not proposed"
        elif FATES[fate[row]] not in ("shown", "beyond_k"): stage, rule = "rule", FATES[fate[row]]
        elif item in plain[request].tolist(): stage = "variety"
        else: stage = "ranked low"
        out.append((request, int(user[request]), item, stage, rule, place, proposed_by))
    return out


@given(cases())
def test_accounts_are_those_of_a_slow_count(case):
    account = losses(*case)
    assert account.rows() == slow(*case)
    assert account.schema["stage"] == pl.Enum(STAGES) and account.schema["rule"] == pl.Enum(FATES)


@given(cases())
def test_what_was_shown_and_what_each_stage_lost_is_what_was_wanted(case):
    account = losses(*case)
    balance = by_stage(account)
    assert balance["stage"].to_list() == list(STAGES) and balance["items"].sum() == len(case[0].item)
    if account.height: assert balance["share"].sum() == pytest.approx(1)
    groups = by_group(account, "stage") if account.height else pl.DataFrame({"items": [0]})
    assert groups["items"].sum() == account.height
    for row in groups.iter_rows(named=True):
        if account.height: assert sum(row[s] for s in STAGES[1:]) + row["recall"] == pytest.approx(1)


@given(cases())
def test_sources_and_depths_count_what_a_slow_count_finds(case):
    truth, _, c, *_ = case
    account = losses(*case)
    by = {s: [(r, i) for r, i in zip(truth.request.tolist(), truth.item.tolist(), strict=True)
              if any(c.item[x] == i and not np.isnan(c.ranks[x, j]) for x in range(c.indptr[r], c.indptr[r + 1]))] for j, s in enumerate(c.sources)}
    table = {r["source"]: r for r in by_source(account, c).iter_rows(named=True)}
    for s, other in (("a", "b"), ("b", "a")):
        assert table[s]["found"] == table[s]["top_10"] == len(by[s]) and table[s]["alone"] == len(set(by[s]) - set(by[other]))
    reach = within(account, 12)
    assert np.allclose(reach, [(account["place"].drop_nulls() <= d).sum() / max(account.height, 1) for d in range(1, 13)])


def test_the_interval_is_over_shoppers_and_holds_the_recall():
    stage = ["shown"] * 30 + ["ranked low"] * 30
    account = pl.DataFrame({"user_idx": [0] * 30 + [1] * 30, "stage": pl.Series(stage, dtype=pl.Enum(STAGES)),
                            "one": pl.Series(["x"] * 60, dtype=pl.Enum(["x", "nobody"]))})
    [row] = by_group(account, "one").iter_rows(named=True)
    assert (row["low"], row["recall"], row["high"]) == (0, .5, 1)  # two shoppers: all or nothing
    many = by_group(account.with_columns(user_idx=pl.Series(range(60))), "one").row(0, named=True)
    assert .3 < many["low"] < .5 < many["high"] < .7


# ---- what is said of shopper and item ------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 100), max_size=20), st.lists(st.floats(0, 400) | st.just(float("nan")), max_size=20))
def test_groups_are_cut_where_their_names_say(events, days):
    slow_depth = lambda n: "none" if n == 0 else "1 to 3" if n <= 3 else "4 to 10" if n <= 10 else "11 to 50" if n <= 50 else "more than 50"
    slow_age = lambda d: "no date" if np.isnan(d) else "up to 7 days" if d <= 7 else "8 to 30 days" if d <= 30 else "31 to 180 days" if d <= 180 else "more than 180 days"
    assert [DEPTHS[i] for i in depth_of(np.array(events, int))] == [slow_depth(n) for n in events]
    assert [AGES[i] for i in age_of(np.array(days))] == [slow_age(d) for d in days]


def test_fame_is_a_place_among_the_known():
    touches, known = np.r_[np.arange(1000, 0, -1), 5_000, 0], np.r_[np.ones(1000, bool), False, True]
    fame = fame_of(touches, known)
    sizes = dict(zip(FAME, np.bincount(fame[known], minlength=5), strict=True))
    assert sizes == {"first 1%": 11, "to 5%": 40, "to 20%": 150, "the rest": 799, "never touched": 1}  # of 1,001 known items
    assert (np.diff(fame[:1000]) >= 0).all() and FAME[fame[1000]] == "the rest"


def test_nothing_at_or_after_a_request_is_said_of_its_shopper(trained):
    log, shop = trained.shop.log, trained.shop
    at = round(trained.cutoffs.holdout.timestamp() * 1000)
    rng = np.random.default_rng(0)
    some = rng.choice(np.flatnonzero((log.ts >= at) & (log.item >= 0)), 60, replace=False)
    user, asof = log.user[some], log.ts[some]
    known = np.bincount(log.before(at).item, minlength=len(shop.items)) > 0
    account = pl.DataFrame({"request": np.arange(60), "user_idx": user, "item_idx": log.item[some]})
    age = np.full(len(shop.items), 3., np.float32)
    found = about(account, log, asof, at, known, age)
    for i, row in enumerate(found.iter_rows(named=True)):
        before = (log.user == user[i]) & (log.ts < asof[i]) & (log.item >= 0)
        mine = log.item[before][known[log.item[before]]]
        assert row["depth"] == DEPTHS[depth_of(np.array([len(mine)]))[0]]
        assert row["touched_before"] == ("yes" if row["item_idx"] in mine else "no")
    cut = log.where(log.ts < asof.max())
    assert about(account, cut, asof, at, known, age).equals(found)
    assert set(found["age"]) == {"up to 7 days"} and found["touched_before"].n_unique() == 2


# ---- who is shown ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_the_area_under_the_curve_is_the_gini(times):
    shown = np.repeat(np.arange(len(times)), times)[:, None]
    y = lorenz(np.array(times), len(times) + 1)
    area = ((y[1:] + y[:-1]) / 2).mean()
    assert 1 - 2 * area == pytest.approx(gini(shown, len(times)), abs=1e-9)
    assert times_shown(shown, len(times)).tolist() == times


@given(st.lists(st.tuples(st.sampled_from("xy"), st.booleans(), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_shares_are_of_what_could_be_shown(rows):
    group, known, times, wished = (np.array(x) for x in zip(*rows, strict=True))
    table = exposure_by(pl.Series(group, dtype=pl.Enum(["x", "y"])), known, times, wished)
    for r in table.iter_rows(named=True):
        mine = known & (group == r["group"])
        assert r["items"] == mine.sum() and r["of_slots"] == pytest.approx(times[mine].sum() / max(times[known].sum(), 1))
        assert r["of_demand"] == pytest.approx(wished[mine].sum() / max(wished[known].sum(), 1))
    assert table["items"].sum() == known.sum()


def test_novelty_is_the_mean_of_the_bits():
    items, touches = np.array([[0, 2], [1, -1]]), np.array([6, 1, 0, 1])
    assert novelty(items, touches) == pytest.approx(np.mean([-np.log2(6 / 8), 3, 3]))
    assert np.isnan(novelty(np.full((2, 2), -1), touches))


@given(st.integers(0, 60), st.integers(1, 12))
def test_groups_of_a_promise_are_of_equal_size_and_lose_nobody(n, groups):
    rng = np.random.default_rng(n)
    chance, happened = rng.random(n), rng.random(n) < .5
    table = reliability(chance, happened, groups)
    assert table["candidates"].sum() == n and (not n or table["candidates"].max() - table["candidates"].min() <= 1)
    assert (table["kept"] * table["candidates"]).sum() == pytest.approx(happened.sum())
    assert (table["promised"] * table["candidates"]).sum() == pytest.approx(chance.sum())
    assert np.isnan(calibration_error(table)) if not n else 0 <= calibration_error(table) <= 1


# ---- a model on its hold-out ---------------------------------------------------------------------------------------


def test_a_bundle_and_its_parts_give_the_same_accounts(trained, tmp_path):
    from judging import made, said

    from reco.bundle import load_bundle
    settings = trained.settings.model_copy(update={"train": Train(cutoffs=3, max_requests=60)})
    name = made(trained, tmp_path, about=said(trained), train=settings.train)
    of_files = of_bundle(load_bundle(tmp_path / name), trained.shop)
    parts = Subject("parts", trained.shop, trained.cutoffs, settings, trained.ranker, of_files.book, Strengths())
    a, b = answered(of_files), answered(parts)
    account = account_of(of_files, a)
    assert account.equals(account_of(parts, b)) and (a.items == a.plain).all() and "variety" not in set(account["stage"])
    assert by_stage(account)["items"].sum() == len(a.asked.truth.item) > 100
    assert (a.fate == SHOWN).sum() + (a.items >= 0).sum() - np.isin(a.items[a.items >= 0], a.c.item).sum() == (a.items >= 0).sum()
    varied = answered(replace(parts, strengths=Strengths(tail=2., diversity=2.)))
    assert (varied.plain == a.items).all() and (varied.items != varied.plain).any()
    assert account_of(parts, varied).filter(stage="variety").height > 0
    rules = account.filter(pl.col("rule").is_not_null())
    assert set(rules["stage"]) <= {"rule"} and BEYOND not in [FATES.index(r) for r in rules["rule"]]


def test_a_past_is_told_latest_first_and_the_same_once(trained):
    from reco.data.histories import histories
    h = histories(trained.shop.log, np.arange(30, dtype=np.int32), np.full(30, 2**42), 200)
    titles = [f"<{i}>" for i in range(len(trained.shop.items))]
    for i in range(30):
        one = h.take(i)
        told = past_in_words(one, titles, 1_000)
        assert told == "nothing yet" if not len(one.item) else told.count("<") == len({(a, max(b, 2)) for a, b in zip(one.item, one.event, strict=True)})
        if len(one.item): assert told.startswith(("looked", "put", "bought")) and f"<{one.item[-1]}>" in told.split(";")[0]
