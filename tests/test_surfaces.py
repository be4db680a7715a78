"""Questions of item pages and carts never hold their own answers."""

import numpy as np
import pytest

from reco.data.histories import ADDTOCART, TRANSACTION, VIEW, EventLog, epoch_ms, histories
from reco.moment import fit_moment
from reco.ranking.surfaces import QUOTAS, bought_together, context_rows, drawn, surface_examples, viewed_then

GAP = 1_800_000


@pytest.fixture(scope="module")
def window(trained) -> tuple[EventLog, int, int]:
    """The log, and its last 45 days."""
    end = epoch_ms(trained.cutoffs.end)
    return trained.shop.log, end - 45 * 86_400_000, end


def same(a, b) -> bool:
    """Equal questions."""
    flat = lambda q: [q.user, q.asof, q.group, *vars(q.context).values(), q.truth.request, q.truth.item, q.truth.grade]
    return all(np.array_equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_the_hidden_item_is_never_in_its_own_cart(window):
    q = bought_together(*window, GAP)
    owner = np.repeat(np.arange(len(q)), q.context.lengths)
    assert len(q) > 50 and (q.context.lengths > 0).all() and len(q.truth.item) == len(q)
    assert not np.isin(q.truth.request * 10_000 + q.truth.item, owner * 10_000 + q.context.item).any()
    assert (q.context.event == ADDTOCART).all() and (q.context.ts == q.asof[owner] - 1).all() and set(q.truth.grade) == {2, 3}


def test_the_past_knows_nothing_of_the_basket(window):
    """Between the visit's first event and the question, nothing of the basket was put in (something else may have been, and left behind)."""
    log, start, until = window
    q = bought_together(*window, GAP)
    past = histories(log, q.user, q.asof, 200)
    assert (past.ts < q.asof[np.repeat(np.arange(len(q)), past.lengths)]).all() and (q.asof >= start).all() and (q.asof < until).all()
    looked = 0
    for n in range(len(q)):
        mine, later, basket = past.take(n), q.asof[n], {*q.context.take(n).item.tolist(), int(q.truth.item[n])}
        for item, event, ts in zip(mine.item[::-1], mine.event[::-1], mine.ts[::-1], strict=True):
            if later - ts > GAP: break
            assert event < ADDTOCART or item not in basket, f"question {n}: item {item} was put in {later - ts} ms before it"
            later, looked = ts, looked + 1
    assert looked > len(q)  # most carts begin after some views


def test_every_item_is_hidden_once_when_all_are_asked_for(window):
    q = bought_together(*window, GAP, per_basket=None)
    for g in np.unique(q.group):
        mine = np.flatnonzero(q.group == g)
        contents = {tuple(sorted([*q.context.take(n).item.tolist(), int(q.truth.item[n])])) for n in mine}
        assert len(contents) == 1 and sorted(q.truth.item[mine]) == list(contents.pop())


def test_what_follows_a_view(window):
    log, start, until = window
    q = viewed_then(*window, GAP, per_visit=None)
    owner, page = q.truth.request, q.context.item
    assert len(q) > 100 and (q.context.lengths == 1).all() and (q.context.event == VIEW).all()
    assert (q.truth.item != page[owner]).all() and set(owner) == set(range(len(q)))
    for n in range(0, len(q), 37):  # by hand
        at = np.flatnonzero((log.user == q.user[n]) & (log.ts >= q.asof[n]) & (log.ts < until))
        at = at[np.flatnonzero((log.item[at] == page[n]) & (log.event[at] == VIEW) & (log.ts[at] == q.asof[n]))[0] :]
        stop = np.flatnonzero(np.diff(log.ts[at]) > GAP)
        nearby = at[1 : stop[0] + 1 if len(stop) else None][:10]
        wanted, known = {}, set(log.item[: at[0] + 1][log.user[: at[0] + 1] == q.user[n]].tolist())
        for r in nearby:
            if int(log.item[r]) not in known: wanted[int(log.item[r])] = max(wanted.get(int(log.item[r]), 0), {1: 1, 2: 1, 3: 2, 4: 3}[int(log.event[r])])
        assert wanted == dict(zip(q.truth.item[owner == n].tolist(), q.truth.grade[owner == n].tolist(), strict=True))


@pytest.mark.parametrize("make", [bought_together, viewed_then])
def test_the_future_changes_nothing(window, make):
    log, start, until = window
    shorter = log.where(log.ts < start + 20 * 86_400_000)
    assert same(make(log, start, start + 20 * 86_400_000, GAP), make(shorter, start, until, GAP))


@pytest.mark.parametrize("make", [bought_together, viewed_then])
def test_a_thinner_draw_is_part_of_a_thicker_one(window, make):
    q, fewer, other = make(*window, GAP), make(*window, GAP, at_most=30), make(*window, GAP, at_most=30, seed=1)
    assert len(fewer) == 30 < len(q) and same(fewer, make(*window, GAP, at_most=30)) and not same(fewer, other)
    keys = lambda x: set(zip(x.user.tolist(), x.asof.tolist(), x.truth.item[np.unique(x.truth.request, return_index=True)[1]].tolist(), strict=True))
    assert keys(fewer) <= keys(q)


def test_no_basket_and_no_view_ask_nothing():
    log = EventLog(np.zeros(2, np.int32), np.array([1, 2], np.int32), np.array([VIEW, TRANSACTION], np.int8), np.array([5, 9]), 1, 3)
    for make in (bought_together, viewed_then): assert len(make(log, 50, 100, GAP)) == 0
    with pytest.raises(ValueError, match="0 per group"): drawn(np.arange(3), 0, None, 0)


def test_a_part_is_what_the_whole_says(window):
    q = viewed_then(*window, GAP)
    half = q.part(10, 25)
    assert len(half) == 15 and half.context.take(3).item == q.context.take(13).item
    assert half.truth.item[half.truth.request == 3].tolist() == q.truth.item[q.truth.request == 13].tolist()


@pytest.mark.parametrize("surface", QUOTAS)
def test_rows_in_front_of_a_context(window, trained, surface):
    """Context items are no candidates, alone is as in a batch, and labels are the truth's."""
    log, start, until = window
    moment = fit_moment(trained.shop, start, trained.settings)
    q = (bought_together if surface == "bought_together" else viewed_then)(*window, GAP, at_most=40)
    h = histories(log, q.user, q.asof, 200, moment.known)
    c, rows, names = context_rows(moment, h, q.context, surface)
    assert rows.shape == (len(c.item), len(names)) and len(set(names)) == len(names)
    owner = np.repeat(np.arange(len(q)), q.context.lengths)
    assert not np.isin(c.request * 10_000 + c.item, owner * 10_000 + q.context.item).any()
    for n in (0, 7, 39):
        one, row, _ = context_rows(moment, h.take(n), q.context.take(n), surface)
        assert one.item.tolist() == c.item[c.indptr[n] : c.indptr[n + 1]].tolist()
        np.testing.assert_array_equal(row, rows[c.indptr[n] : c.indptr[n + 1]])
    examples = surface_examples(log, moment, q, surface, 200)
    assert examples.features == names and (examples.label > 0).sum() >= len(examples.sizes) > 0
