"""Every gate passes and fails where it should, and the comparison behind it is what a plain computation says."""

import json
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from bundles import HARM, copied, say
from judging import DAY, LOUD, QUIET, made, said, upside_down

import reco.evaluation.champion
from reco.bundle import BundleError, load_bundle
from reco.evaluation.champion import aged, alike, answers, check_unseen, cutoffs_in, labels_end, made_with, source_day
from reco.evaluation.comparison import challengers_answers, champion_gates, own_gates, slices, with_champion
from reco.evaluation.gates import (
    Difference,
    Spread,
    alarms_quiet,
    answers_alone,
    better,
    failures,
    latency,
    no_skew,
    not_comparable,
    not_worse,
    paired,
    variety,
)
from reco.evaluation.skew import drawn_pairs, refitted, skew_of, store_of_its_own, stored_and_sent
from reco.evaluation.trial import Trial, questions_of, tried
from reco.evaluation.verdict import Case, all_gates, compare, record
from reco.settings import Gates, Quota

LAX = Gates(requests=15, buyers=20, p50_ms=5_000, p99_ms=20_000, try_seconds=200)


# ---- the paired bootstrap ------------------------------------------------------------------------------------------


def by_hand(ours: np.ndarray, theirs: np.ndarray, user: np.ndarray, confidence: float, draws: int, seed: int) -> tuple[float, float]:
    """Shoppers drawn one by one, with all their requests, and the mean of what was drawn."""
    shoppers, rng, found = np.unique(user), np.random.default_rng(seed), []
    for times in rng.multinomial(len(shoppers), np.full(len(shoppers), 1 / len(shoppers)), size=draws):
        rows = [r for s, t in zip(shoppers, times, strict=True) for _ in range(t) for r in np.flatnonzero(user == s)]
        found.append((ours[rows].mean() - theirs[rows].mean()) / theirs.mean())
    return tuple(np.quantile(found, [1 - confidence, confidence]))


def test_the_paired_bootstrap_is_the_plain_one():
    rng = np.random.default_rng(3)
    user = np.sort(rng.integers(0, 25, 70))
    theirs, ours = rng.random(70), rng.random(70)
    d = paired(ours, theirs, user, 0.9, draws=300, seed=5)
    assert (d.low, d.high) == pytest.approx(by_hand(ours, theirs, user, 0.9, 300, 5), abs=1e-12)
    assert d.mean == pytest.approx((ours - theirs).mean() / theirs.mean()) and d.shoppers == len(np.unique(user))
    swapped = paired(theirs, ours, user, 0.9, draws=300, seed=5)
    assert swapped.low * ours.mean() == pytest.approx(-d.high * theirs.mean())


def test_requests_without_an_answer_do_not_count():
    rng = np.random.default_rng(0)
    user, ours, theirs = np.arange(50), rng.random(50), rng.random(50)
    more = [np.concatenate([x, [np.nan, 0.5]]) for x in (ours, theirs)]
    assert paired(*more[:1], np.concatenate([theirs, [0.5, np.nan]]), np.arange(52), 0.95) == paired(ours, theirs, user, 0.95)
    with pytest.raises(ValueError, match="none of 2 requests"): paired(np.full(2, np.nan), np.ones(2), np.arange(2), 0.95)


def test_two_alike_are_seldom_called_different():
    """At 95% about one in twenty of those that are no better passes as better."""
    rng, passed = np.random.default_rng(1), 0
    for seed in range(200):
        x, noise = rng.beta(0.5, 2, 150), rng.normal(0, 0.05, 150)
        passed += better("b", "champion", paired(x + noise, x, np.arange(150), 0.95, draws=200, seed=seed), 0, 30)["passed"].item()
    assert 2 <= passed <= 22


def test_shoppers_are_drawn_and_not_requests():
    """A hundred copies of each request do not make the difference surer."""
    rng = np.random.default_rng(2)
    ours, theirs, user = rng.random(40), rng.random(40), np.arange(40)
    once, often = (paired(*(np.repeat(x, n) for x in (ours, theirs, user)), 0.95) for n in (1, 100))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


# ---- gates from numbers --------------------------------------------------------------------------------------------


def d(mean: float, low: float, high: float, shoppers: int = 500) -> Difference:
    return Difference(shoppers, 1 + mean, 1, mean, low, high)


@pytest.mark.parametrize(("found", "margin", "passes"), [
    (d(.05, .01, .09), 0, True), (d(.05, -.001, .1), 0, False), (d(0, 0, 0), 0, False), (d(.5, .1, .9, shoppers=29), 0, False),
    (d(-.002, -.009, .005), .01, True), (d(.05, -.02, .1), .01, False), (d(.05, .01, .09), -.02, False), (None, 0, True)])
def test_better_means_the_bound_and_not_the_mean(found, margin, passes):
    row = better("better", "champion", found, margin, 30)
    assert row["passed"].item() is passes and ("there is no champion" in row["what"].item()) is (found is None)


@pytest.mark.parametrize(("found", "passes", "says"), [
    (d(-.05, -.09, -.01), True, ""), (d(-.2, -.3, -.1), False, ""), (d(-.2, -.5, .05), True, "may be chance"),
    (d(-.9, -1, -.8, shoppers=29), True, "too few to judge: 29 shoppers"), (None, True, "there is no champion")])
def test_a_slice_fails_when_it_is_worse_beyond_limit_and_chance(found, passes, says):
    row = not_worse("new users", "champion", found, .1, 30)
    assert row["passed"].item() is passes and says in row["what"].item()


def test_variety_is_held_to_its_own_limits_and_to_the_champions():
    limits = Gates(min_coverage=.05, coverage_loss=.1, max_gini=.95, gini_rise=.02)
    verdict = lambda ours, theirs: variety(ours, theirs, limits)["passed"].to_list()
    assert verdict(Spread(.3, .9), Spread(.33, .89)) == [True, True]
    assert verdict(Spread(.3, .9), Spread(.34, .87)) == [False, False]
    assert verdict(Spread(.06, .94), None) == [True, True] and verdict(Spread(.04, .96), None) == [False, False]
    assert verdict(Spread(.04, .96), Spread(.01, .99)) == [False, False] # a poor champion lowers no limit


def test_what_was_measured_elsewhere_is_judged_here():
    limits = Gates(p50_ms=10, p99_ms=50)
    assert latency([5.] * 200, limits)["passed"].to_list() == [True, True]
    assert latency([5.] * 190 + [60.] * 10, limits)["passed"].to_list() == [True, False]
    assert latency([11.] * 200, limits)["passed"].to_list() == [False, True] and not latency([], limits)["passed"].any()
    assert alarms_quiet(QUIET)["passed"].all() and not alarms_quiet(LOUD)["passed"].any()
    assert not alarms_quiet(None)["passed"].any() and not alarms_quiet([])["passed"].any()
    assert alarms_quiet([*QUIET, *LOUD])["passed"].to_list() == [True, False]
    assert not alarms_quiet([QUIET[0] | {"passed": False}])["passed"].item() # whatever its number is
    assert no_skew(1_000, 2, "", .002)["passed"].item() and not no_skew(1_000, 3, "x", .002)["passed"].item()
    assert not no_skew(0, 0, "", .002)["passed"].item()
    assert answers_alone("")["passed"].item() and not answers_alone("no answer within 1 s")["passed"].item()
    assert not not_comparable("gone")["passed"].item() and not_comparable("gone", "a new disk")["passed"].item()


def test_a_failure_is_told_with_value_and_limit():
    report = pl.concat([latency([5., 200.], Gates(p50_ms=150, p99_ms=100)), answers_alone("killed by signal 9")])
    assert [f.partition(": ")[2] for f in failures(report)] == ["198.1, limit 100: ms per list, of 2 lists in one process", "none, limit none: killed by signal 9"]


# ---- bundles on the hold-out ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(trained, tmp_path_factory):
    """A challenger, a champion of ten days before that is upside down, and their answers."""
    root = tmp_path_factory.mktemp("judged")
    names = made(trained, root), made(trained, root, 10, ranker=upside_down(trained.ranker))
    challenger, champion = (load_bundle(root / n) for n in names)
    a = challengers_answers(challenger, trained.shop, LAX)
    return root, challenger, champion, with_champion(a, challenger, champion, trained.shop, LAX)


def case_of(trained, judged, **changes: object) -> Case:
    root, challenger, champion, _ = judged
    return replace(Case(root, challenger.id, champion.id, trained.shop, trained.sim.interactions.lazy(), LAX), **changes)


def test_a_better_challenger_passes_and_a_worse_one_does_not(trained, judged):
    a = judged[3]
    assert champion_gates(a, trained.shop, LAX)["passed"].all() and own_gates(a, LAX)["passed"].all()
    turned = replace(a, challenger=a.same_day, champion=a.challenger, same_day=a.challenger)
    failed = {f.partition(":")[0] for f in failures(pl.concat([champion_gates(turned, trained.shop, LAX), own_gates(turned, LAX)]))}
    assert failed >= {"better than the champion", "ranker no worse", "better than popularity"}


def test_one_that_is_no_better_leaves_the_champion_alone(trained, judged):
    a = judged[3]
    report = champion_gates(replace(a, champion=a.challenger, same_day=a.challenger), trained.shop, LAX)
    assert [f.partition(":")[0] for f in failures(report)] == ["better than the champion"]
    not_worse_will_do = LAX.model_copy(update={"margin": .01})
    assert champion_gates(replace(a, champion=a.challenger, same_day=a.challenger), trained.shop, not_worse_will_do)["passed"].all()


@pytest.mark.parametrize("name", ["new users", "cold items", "long tail"])
def test_a_slice_that_collapses_is_named(trained, judged, name):
    """Nothing that is right for the slice is shown any more; all else stays as it is."""
    a, limits = judged[3], LAX.model_copy(update={"min_shoppers": 5, "new_user_events": 8, "cold_days": 60})
    some = slices(trained.shop, a.moment, a.asked, a.tail, limits)[name]
    lists, hidden = a.challenger.copy(), set(zip(some.request.tolist(), some.item.tolist(), strict=True))
    for i, j in np.argwhere(lists >= 0):
        if (i, lists[i, j]) in hidden: lists[i, j] = -1
    assert (lists != a.challenger).any()
    even = replace(a, champion=a.challenger, same_day=a.challenger)
    rows = [champion_gates(replace(even, challenger=x), trained.shop, limits).filter(pl.col("name") == name) for x in (a.challenger, lists)]
    assert [r["passed"].item() for r in rows] == [True, False] and rows[1]["value"].item() == pytest.approx(-1)


def test_the_champion_is_as_old_as_it_is(trained, judged):
    """Sources of ten days before the hold-out, item features and prices of its day; no event of the hold-out is known to them."""
    _, challenger, champion, a = judged
    holdout = a.moment.asof
    day = source_day(trained.shop, holdout, 10, 30)
    assert day == holdout - 10 * DAY and challenger.moment.asof - champion.moment.asof == 10 * DAY
    old = aged(trained.shop, day, made_with(champion), a.moment)
    np.testing.assert_array_equal(old.per_item, a.moment.per_item)
    np.testing.assert_array_equal(answers(champion, old, trained.shop, a.asked), a.champion)
    assert not np.array_equal(a.champion, a.same_day) and old.known.sum() <= a.moment.known.sum()
    assert source_day(trained.shop, holdout, 10, 0) == holdout == source_day(trained.shop, holdout, -3, 30)
    assert source_day(trained.shop, holdout, 10_000, 10_000) > trained.shop.log.ts.min()


def test_what_comes_after_a_request_changes_no_answer(trained, judged):
    """The champion on a shop that ends in the middle of the hold-out: whoever asked before gets the same list."""
    _, _, champion, a = judged
    end = a.moment.asof + 5 * DAY
    cut = replace(trained.shop, log=trained.shop.log.where(trained.shop.log.ts < end))
    early = np.flatnonzero(a.asked.asof <= end)
    then = answers(champion, reco.evaluation.champion.fit_moment(cut, a.moment.asof, made_with(champion)), cut, a.asked)
    assert 0 < len(early) < len(then) or (a.asked.asof <= end).all()
    np.testing.assert_array_equal(then[early], a.same_day[early])


def test_sources_are_fitted_once_where_they_are_the_same(trained, judged, monkeypatch):
    _, challenger, champion, a = judged
    days, fit = [], reco.evaluation.champion.fit_moment
    count = lambda shop, asof, settings: days.append(asof) or fit(shop, asof, settings)
    monkeypatch.setattr(reco.evaluation.champion, "fit_moment", count)
    with_champion(a, challenger, challenger, trained.shop, LAX)
    assert not days
    with_champion(a, challenger, champion, trained.shop, LAX)
    assert days == [a.moment.asof - 10 * DAY]
    settings = trained.settings
    others = [settings.model_copy(update={"candidates": settings.candidates | {"recent": Quota(quota=29)}}),
              settings.model_copy(update={"als": settings.als.model_copy(update={"factors": 8})}),
              settings.model_copy(update={"data": settings.data.model_copy(update={"session_gap_minutes": 20})})]
    assert alike(settings, made_with(challenger)) and not any(alike(settings, o) for o in others)


def test_a_champion_that_has_seen_the_holdout_is_refused(trained, judged):
    _, challenger, champion, _ = judged
    holdout = cutoffs_in(challenger).holdout
    assert labels_end(champion) <= holdout
    check_unseen(champion, holdout)
    with pytest.raises(BundleError, match=r"learned from what happened until 2026-.* and the hold-out begins at 2026-"):
        check_unseen(champion, holdout - timedelta(minutes=1))


def a_day_newer(folder: Path) -> None:
    cutoffs = json.loads((folder / "manifest.json").read_text())["cutoffs"]
    later = {n: str(datetime.fromisoformat(cutoffs[n]) + timedelta(days=1)) for n in ("validation", "holdout", "end")}
    say(folder, cutoffs=cutoffs | later)


def without_cutoffs(folder: Path) -> None: say(folder, cutoffs=None)


def with_an_unknown_source(folder: Path) -> None:
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    say(folder, settings=settings | {"candidates": settings["candidates"] | {"mine": {"cls": "no_such_module:Mine", "quota": 5}}})


@dataclass
class OfAnotherTime:
    """A source that was written for another version of the package."""

    def fit(self, *_: object) -> None: raise KeyError("views_7d")


def with_a_source_that_fails(folder: Path) -> None:
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    say(folder, settings=settings | {"candidates": settings["candidates"] | {"mine": {"cls": "test_gates:OfAnotherTime", "quota": 5}}})


def with_a_bad_setting(folder: Path) -> None:
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    say(folder, settings=settings | {"als": settings["als"] | {"dropout": 0.5}})


@pytest.mark.parametrize(("harm", "says"), [
    (HARM["flipped"][0], "wrong checksum: ['known.npy']"), (HARM["other-features"][0], "made for other features"), HARM["a-list"],
    (a_day_newer, "learned from what happened until"), (without_cutoffs, "does not say at which cutoffs"), (with_an_unknown_source, "no_such_module"), (with_a_bad_setting, "als.dropout"),
    (with_a_source_that_fails, "KeyError: 'views_7d'")])
def test_a_champion_that_cannot_be_asked_is_told_and_needs_a_reason(trained, judged, monkeypatch, caplog, harm, says):
    root, challenger, champion, a = judged
    monkeypatch.setattr("reco.evaluation.verdict.challengers_answers", lambda *_: replace(a, champion=None, same_day=None))
    name = copied(root / champion.id, f"harmed-{says.split()[0].strip('[]')}", harm)
    case = case_of(trained, judged, champion=name)
    report, forced = compare(case, challenger), compare(replace(case, reason="we know"), challenger)
    [failed] = failures(report)
    assert failed.startswith("better than the champion: none") and says in failed and str(root) not in failed
    assert ("Traceback" in caplog.text) == (harm is with_a_source_that_fails) # the others say all that there is
    assert forced["passed"].all() and "gone on without it: we know" in forced["what"][0]


def test_the_first_bundle_has_nobody_to_be_compared_with(trained, judged, monkeypatch):
    a = replace(judged[3], champion=None, same_day=None)
    monkeypatch.setattr("reco.evaluation.verdict.challengers_answers", lambda *_: a)
    report = compare(case_of(trained, judged, champion=""), judged[1])
    assert report["passed"].all() and report["what"].str.contains("there is no champion").sum() == 5


# ---- the bundle by itself ------------------------------------------------------------------------------------------


def test_offline_rows_equal_online_rows_and_planted_skew_does_not_pass(trained, judged):
    _, challenger, _, _ = judged
    pairs, log = drawn_pairs(trained.shop, trained.cutoffs.holdout, 12, 1), trained.sim.interactions.lazy()
    offline = refitted(challenger, trained.shop, made_with(challenger))

    def gate(serving) -> dict:
        with store_of_its_own(200) as store: s = skew_of(serving, offline, trained.shop, log, pairs, 200, store)
        return no_skew(s.rows, s.different, s.example, LAX.skew).row(0, named=True)

    assert gate(challenger)["passed"] and gate(challenger)["value"] == 0
    m = challenger.moment
    one_column = m.per_item.copy()
    one_column[:, 0] += 1
    for moment in (replace(m, per_item=one_column), replace(m, gap_ms=m.gap_ms // 10), replace(m, sources=m.sources | {"als": mangled(m.sources["als"])})):
        assert not gate(replace(challenger, moment=moment))["passed"]
    assert "item_views_1d" in gate(replace(challenger, moment=replace(m, per_item=one_column)))["what"]


def mangled(als):
    """The source as it would be had its vectors come back in another order."""
    other = copy(als)
    other.vectors = als.vectors[::-1].copy()
    return other


def test_an_event_that_the_lake_has_twice_is_no_skew(trained):
    pairs, log = drawn_pairs(trained.shop, trained.cutoffs.holdout, 12, 1), trained.sim.interactions
    stored, sent = stored_and_sent(log.lazy(), trained.shop, pairs)
    again, both = stored_and_sent(pl.concat([log, log.with_columns(event_id=pl.col("event_id") + "-again")]).lazy(), trained.shop, pairs)
    assert sent and not both and again.height == 2 * (stored.height + len(sent))
    assert all(e.ts >= stored.filter(pl.col("user_id") == u)["ts"].max() for u, e in sent.items() if u in set(stored["user_id"]))


def test_a_fresh_process_that_cannot_load_says_why(trained, judged):
    """That a good bundle answers there is seen where a flow publishes it."""
    root, challenger, _, _ = judged
    name = copied(root / challenger.id, "flipped-alone", HARM["flipped"][0])
    some = trained.sim.interactions.filter(pl.col("user_id").is_in(trained.shop.users.ids[:3].to_list()))
    found = tried(root / name, questions_of(some, challenger.moment.asof, trained.shop.items.ids[0], 200), 200)
    assert found == Trial(f"reco.bundle.BundleError: {name}: wrong checksum: ['known.npy']")


def test_the_whole_verdict_of_a_bad_challenger(trained, judged):
    """Upside down and trained on a leak: each is found, and what has nothing to do with it is not."""
    root, challenger = judged[0], judged[1]
    bad = made(trained, root, about=said(trained, LOUD), ranker=upside_down(trained.ranker))
    case = case_of(trained, judged, challenger=bad, champion=challenger.id)
    report = all_gates(case)
    failed = {f.partition(":")[0] for f in failures(report)}
    assert failed >= {"better than the champion", "ranker no worse", "better than popularity", "leak alarm"}
    assert not failed & {"offline equals online", "answers in a fresh process"}
    kept = json.loads(json.dumps(record(case, report, {"run": "7"}), allow_nan=False))
    assert kept["bundle"] == bad and kept["run"] == "7" and kept["passed"] is False and len(kept["gates"]) == report.height == 13


def test_a_challenger_that_is_damaged_gets_a_report_too(trained, judged):
    root, challenger, _, _ = judged
    name = copied(root / challenger.id, "damaged-challenger", HARM["flipped"][0])
    report = all_gates(case_of(trained, judged, challenger=name))
    assert failures(report) == [f"can be judged: none, limit none: {name}: wrong checksum: ['known.npy']"]
