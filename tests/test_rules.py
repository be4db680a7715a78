"""Rules against inputs of any kind: hard ones hold, soft ones give way, and every candidate is accounted for."""

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reco.data.histories import TRANSACTION, VIEW, EventLog, Histories
from reco.data.lake import Lake
from reco.features.items import ItemState, catalog_asof, item_state
from reco.ids import IdMap
from reco.reranking.diversity import Exposure
from reco.reranking.filters import FilterError, attributes, bind, parse_filter, passes
from reco.reranking.habits import hold_days
from reco.reranking.lists import MOVES, Reranker, Shown, Strengths, make_reranker, rerank, shown_lists
from reco.reranking.rulebook import RuleBook, RuleError, read_rules
from reco.reranking.rules import FATES, STEPS, cap_groups, compile_rules, fill, relevance_loss
from reco.reranking.rules import list_relevance as worth
from reco.schemas import CATALOG, conform
from reco.settings import Explore, Rerank, Rules

DAY = 86_400_000
N, NOW = 60, 1_800_000_000_000


def catalogue(seed: int = 0) -> ItemState:
    """Sixty items; every attribute is unknown for some."""
    rng = np.random.default_rng(seed)
    some = lambda n: rng.integers(-1, n, N).astype(np.int32)
    price = rng.uniform(1, 100, N).astype(np.float32)
    price[rng.random(N) < 0.1] = np.nan
    margin = rng.random(N).astype(np.float32)
    margin[rng.random(N) < 0.2] = np.nan
    created = np.where(rng.random(N) < 0.1, -1, NOW - rng.integers(0, 60, N) * DAY)
    return ItemState(price, np.where(rng.random(N) < 0.3, 0.25, 0).astype(np.float32), some(5), rng.random(N) > 0.15, created, margin, some(4), some(3),
                     np.array(list("abcde")), np.array(["acme", "brisk", "zed, inc", "ñ|ñ"]), np.array(["Home", "Home / Lamps", "Sport"]))


STATE, IDS = catalogue(), IdMap([f"p{i:02}" for i in range(N)])
EXPOSURE = Exposure(np.linspace(1, 0, N).astype(np.float32), np.linspace(50, 0, N).astype(np.float32), np.linspace(0, 99, N).astype(np.float32))
VECTORS = np.zeros((N, 0), np.float32)
FILTERS = "category:a|b", "-brand:acme", "price<50", "-price<50", "path:Home", 'brand:"zed, inc"', "age_days<=20,margin>0.2", "available:true", "item:p01|p30"
BOOK = {"ban": [{"filter": "brand:brisk"}, {"filter": "category:e", "from": "2027-01-01T00:00:00Z", "until": "2027-02-01T00:00:00Z"}],
        "pin": [{"item": "p07", "slot": 2}, {"item": "p59", "slot": 5, "surfaces": ["similar"]}],
        "campaign": [{"name": "sale", "boost": [{"filter": "discount>0", "by": 3}], "pin": [{"item": "p33", "slot": 1}]}]}


def made(rules: Rules, book: dict = BOOK, strengths: Strengths | None = None, method: str = "mmr", explore: Explore | None = None) -> Reranker:
    compiled = compile_rules(rules, RuleBook.model_validate(book), STATE, IDS)
    return make_reranker(compiled, EXPOSURE, VECTORS, strengths or Strengths(), Rerank(method=method), explore or Explore())


def past(bought: list[tuple[int, int]], now: int = NOW) -> Histories:
    """Purchases as (item, days ago), and a view of everything."""
    rows = sorted([(now - d * DAY - 1, i, TRANSACTION) for i, d in bought] + [(now - 99 * DAY, i, VIEW) for i in range(N)])
    ts, item, event = (np.array(x) for x in zip(*rows, strict=True))
    return Histories(np.array([0, len(rows)]), item.astype(np.int32), event.astype(np.int8), ts, np.array([now]))


def requests() -> st.SearchStrategy:
    return st.fixed_dictionaries({
        "items": st.lists(st.integers(0, N - 1), max_size=N, unique=True), "seed": st.integers(0, 99), "k": st.integers(1, 25),
        "bought": st.lists(st.tuples(st.integers(0, N - 1), st.integers(0, 60)), max_size=8), "surface": st.sampled_from(["for_you", "similar"]),
        "filter": st.sampled_from(["", *FILTERS]), "method": st.sampled_from(["mmr", "dpp"]), "epsilon": st.sampled_from([0, 0.9]),
        "strengths": st.builds(Strengths, *[st.sampled_from([0.0, 0.5, 3.0])] * 3, keep_first=st.integers(0, 4)),
        "rules": st.builds(Rules, exclude_out_of_stock=st.booleans(), exclude_bought_days=st.sampled_from([0, 30]), category_cap=st.integers(0, 4),
                           brand_cap=st.integers(0, 4), boost_discount=st.sampled_from([0, 5]), boost_margin=st.sampled_from([0, 2]),
                           max_relevance_loss=st.sampled_from([0, 0.02, 0.5])), "now": st.sampled_from([NOW, 1_799_000_000_000])})


def answer(q: dict, **changes: object) -> tuple[Shown, np.ndarray, np.ndarray, Reranker]:
    q = q | changes
    items = np.array(q["items"], np.int32)
    odds = np.random.default_rng(q["seed"]).normal(-2, 1.5, len(items)).round(1)  # ties are likely
    r = made(q["rules"], q.get("book", BOOK), q["strengths"], q["method"], Explore(epsilon=q["epsilon"], keep_first=0))
    wanted = bind(parse_filter(q["filter"]), r.compiled.at)
    return rerank(r, items, odds, past(q["bought"], q["now"]), q["k"], q["surface"], wanted, "request 1", True), items, odds, r


def forbidden(q: dict) -> np.ndarray:
    """The hard rules once more, item by item, as a reader of the rules would apply them."""
    paid, age = STATE.price * (1 - STATE.discount), np.where(STATE.created >= 0, (q["now"] - STATE.created) / DAY, np.nan)
    name = lambda codes, names: np.array([names[c] if c >= 0 else "" for c in codes])
    cat, brand, path = name(STATE.category, STATE.categories), name(STATE.brand, STATE.brands), name(STATE.path, STATE.paths)
    wanted = {"": np.ones(N, bool), "category:a|b": np.isin(cat, ["a", "b"]), "-brand:acme": brand != "acme", "price<50": paid < 50, "-price<50": ~(paid < 50),
              "path:Home": np.isin(path, ["Home", "Home / Lamps"]), 'brand:"zed, inc"': brand == "zed, inc", "available:true": STATE.available,
              "age_days<=20,margin>0.2": (age <= 20) & (STATE.margin > np.float32(0.2)), "item:p01|p30": np.isin(np.arange(N), [1, 30])}[q["filter"]]
    out = ~wanted | (brand == "brisk")
    if datetime(2027, 1, 1, tzinfo=UTC) <= datetime.fromtimestamp(q["now"] / 1000, UTC) < datetime(2027, 2, 1, tzinfo=UTC): out |= cat == "e"
    if q["rules"].exclude_out_of_stock: out |= ~STATE.available
    for item, days in q["bought"]: out[item] |= bool(q["rules"].exclude_bought_days) and days < 30
    return out


@settings(max_examples=150, deadline=None)
@given(requests())
def test_hard_rules_hold_and_everything_is_accounted_for(q):
    shown, items, _, r = answer(q)
    bad, pins = forbidden(q), {7: 1, 33: 0} | ({59: 4} if q["surface"] == "similar" else {})
    assert not bad[shown.items].any() and len(set(shown.items.tolist())) == len(shown.items)
    live = {i: s for i, s in pins.items() if s < q["k"] and not bad[i]}
    assert len(shown.items) == min(q["k"], len({*items[~bad[items]].tolist(), *live}))  # soft rules never shorten a list
    inside = shown.places >= 0
    assert np.array_equal(items[shown.places[inside]], shown.items[inside]) and set(shown.items[~inside].tolist()) <= set(live) - set(items.tolist())
    counts = dict(zip(*np.unique(shown.fate, return_counts=True), strict=True))
    assert len(shown.fate) == len(items) and counts.get(0, 0) == inside.sum()
    for code, rule in enumerate(FATES):
        if code > 1: assert shown.dropped[rule] == counts.get(code, 0)
    assert np.array_equal(np.isin(shown.fate, [2, 3, 4, 5]), bad[items])  # dropped by a hard rule if and only if it forbids
    assert shown.dropped["pins_not_shown"] == sum(s < q["k"] and bad[i] for i, s in pins.items())
    for i, slot in live.items():
        if slot < len(shown.items): assert shown.items[slot] == i and MOVES[shown.moved[slot]] == "pinned"
    assert (shown.propensity > 0).all() and (shown.propensity <= 1).all() and (q["epsilon"] or (shown.propensity == 1).all())


@settings(max_examples=80, deadline=None)
@given(requests())
def test_caps_hold_unless_they_were_raised(q):
    shown, items, *_ = answer(q, epsilon=0, book={})
    for codes, cap, raised in ((STATE.category, q["rules"].category_cap, "category_cap_raised"), (STATE.brand, q["rules"].brand_cap, "brand_cap_raised")):
        there = codes[shown.items]
        if cap and (there >= 0).any(): assert np.bincount(there[there >= 0]).max() <= cap + shown.dropped[raised]
        if not cap: assert shown.dropped[raised] == 0
    if q["rules"].category_cap and shown.dropped["category_cap_raised"]:  # only because one less would have been too short
        cap, there = q["rules"].category_cap + shown.dropped["category_cap_raised"] - 1, STATE.category[items[np.isin(shown.fate, [0, 1, 6, 7])]]
        room = np.minimum(np.bincount(there[there >= 0]), cap).sum() + (there < 0).sum()
        assert room < min(q["k"], len(there)) or q["rules"].brand_cap


@settings(max_examples=80, deadline=None)
@given(requests())
def test_boosts_never_cost_more_than_agreed(q):
    (shown, items, odds, _), plain = answer(q, epsilon=0), answer(q, epsilon=0, rules=q["rules"].model_copy(update={"boost_discount": 0, "boost_margin": 0}),
                                                                  book=BOOK | {"campaign": [{"name": "sale", "pin": BOOK["campaign"][0]["pin"]}]})[0]
    chance = dict(zip(items.tolist(), 1 / (1 + np.exp(-odds)), strict=True))
    free = lambda s: np.array([chance[i] for i, p in zip(s.items.tolist(), s.places, strict=True) if p >= 0 and i not in (7, 33, 59)])
    if len(free(plain)): assert relevance_loss(worth(free(shown)), worth(free(plain))) <= q["rules"].max_relevance_loss + 1e-9


@settings(max_examples=50, deadline=None)
@given(requests())
def test_the_order_of_the_candidates_does_not_matter(q):
    items = np.array(q["items"], np.int32)
    r = made(q["rules"], strengths=q["strengths"], method=q["method"])
    odds, turn = np.random.default_rng(q["seed"]).normal(size=len(items)).round(1), np.random.default_rng(1).permutation(len(items))
    a, b = (rerank(r, items[t], odds[t], past(q["bought"]), q["k"]) for t in (np.arange(len(items)), turn))
    assert np.array_equal(a.items, b.items) and a.dropped == b.dropped
    both = shown_lists(r, np.array([0, len(items), 2 * len(items)]), np.tile(items, 2), np.tile(odds, 2), two(past(q["bought"])), q["k"])
    assert np.array_equal(both[1][: len(a.items)], a.items) and np.array_equal(both[0], both[1])  # a batch is requests


def two(h: Histories) -> Histories:
    return Histories(np.array([0, len(h.item), 2 * len(h.item)]), np.tile(h.item, 2), np.tile(h.event, 2), np.tile(h.ts, 2), np.tile(h.asof, 2))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 999), st.integers(0, 30), st.integers(1, 12), st.integers(0, 4))
def test_one_cap_is_the_naive_one(seed, m, k, cap):
    """With one cap, raising it by one until the list is long enough is the definition."""
    rng = np.random.default_rng(seed)
    category, order = rng.integers(-1, 4, m).astype(np.int32), rng.permutation(m)
    got, _, raised = fill(order, np.full(k, -1), cap_groups(category, np.full(m, -1, np.int32)), cap, 0)
    for c in range(cap, cap + 99):
        count, naive = {}, []
        for i in order:
            count[category[i]] = count.get(category[i], 0) + 1
            if not cap or category[i] < 0 or count[category[i]] <= c: naive.append(i)
        if len(naive) >= min(k, m): break
    assert got.tolist() == naive[:k] and raised[0] == c - cap


def test_a_ceiling_weakens_boosts_before_it_drops_them():
    items, odds = np.arange(20, dtype=np.int32), np.linspace(0, -1, 20)
    book = {"boost": [{"filter": "item:" + "|".join(f"p{i}" for i in range(10, 20)), "by": 50}]}
    lists = {x: rerank(made(Rules(category_cap=0, max_relevance_loss=x, exclude_out_of_stock=False), book), items, odds, past([]), 10) for x in (1, 0.1, 0)}
    moved = {x: int((s.items >= 10).sum()) for x, s in lists.items()}
    assert moved[1] == 10 > moved[0.1] > moved[0] == 0 and [s.dropped["boosts_held_back"] for s in lists.values()] == [0, 1, 1] and STEPS[0] == 1


def test_windows_open_and_close():
    r = made(Rules(category_cap=0), {"campaign": [{"name": "c", "from": "2027-01-15T08:00:00Z", "until": "2027-01-15T09:00:00Z",
                                                   "pin": [{"item": IDS.ids[int(np.flatnonzero(STATE.available)[0])], "slot": 3}]}]})
    pinned, odds = int(np.flatnonzero(STATE.available)[0]), np.zeros(10)
    others = np.flatnonzero(STATE.available)[1:11].astype(np.int32)
    shown = {t: rerank(r, others, odds, past([], t), 5).items.tolist() for t in (1_800_000_000_000, 1_799_999_999_999, 1_800_003_599_999, 1_800_003_600_000)}
    assert [x[2] == pinned for x in shown.values()] == [True, False, True, False]


def test_a_pin_for_another_surface_or_a_slot_beyond_the_list_is_not_shown():
    r, items = made(Rules(), {"pin": [{"item": "p59", "slot": 5, "surfaces": ["similar"]}]}), np.arange(20, dtype=np.int32)
    assert STATE.available[59] and STATE.brand[59] != 1
    show = lambda k, surface: 59 in rerank(r, items, np.zeros(20), past([]), k, surface).items
    assert show(6, "similar") and not show(6, "for_you") and not show(4, "similar")


def test_rules_whose_words_are_gone_are_reported_and_requests_are_refused():
    compiled = compile_rules(Rules(), RuleBook.model_validate({"ban": [{"filter": "brand:gone"}], "pin": [{"item": "p99", "slot": 1}]}), STATE, IDS)
    assert compiled.unknown == ("brand:gone", "item:p99") and not compiled.banned.any()
    with pytest.raises(FilterError, match="no item has brand 'acne'; did you mean 'acme'"): bind(parse_filter("-brand:acne"), compiled.at)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='abcegioprty:<>=|-," 0123456789.', max_size=40))
def test_any_text_is_a_filter_or_a_clear_error(text):
    try: terms = parse_filter(text)
    except FilterError as e: assert str(e).startswith("filter: ")
    else: assert all(t.values for t in terms) and bool(terms) == bool(text.strip())


@pytest.mark.parametrize("text", FILTERS)
def test_a_term_turned_round_is_the_complement(text):
    for term in text.split(",") if '"' not in text else [text]:
        every, at = np.arange(N, dtype=np.int32), attributes(STATE, IDS)
        turned = term[1:] if term.startswith("-") else f"-{term}"
        assert np.array_equal(passes(bind(parse_filter(term), at), every, NOW), ~passes(bind(parse_filter(turned), at), every, NOW))


@pytest.mark.parametrize(("text", "says"), [
    ("[[pin]]\nitem = 'a'\nslot = 101", ["line 3: pin 1 slot = 101", "100 the last"]), ("[[pin]]\nitem = 'a'", ["line 1: pin 1 slot", "required"]),
    ("[[pni]]\nitem = 'a'", ["line 1: pni", "known: ban, pin, boost, campaign"]), ("[[boost]]\nfilter = 'price<x'\nby = 2", ["line 2: boost 1 filter", "needs one number"]),
    ("[[boost]]\nfilter = 'price<5'\nby = 0", ["line 3: boost 1 by = 0", "at most 100"]), ("[[ban]]\nfilter = 5", ["line 2: ban 1 filter = 5", "string"]),
    ("[[pin]\n", ["line 1"]), ("# none yet\n\n[[pni]]\nitem = 'a'", ["line 3: pni"]),
    ("[[campaign]]\nname='c'\n[[campaign]]\nname='d'\npin=[{item='a', slot=0}]", ["line 5: campaign 2 pin 1 slot = 0"]), ("[[pin]]\nitem='a'\nslot=1\nfrom=2027-01-02T00:00:00Z\nuntil=2027-01-01T00:00:00Z", ["is not before"]),
    ("[[pin]]\nitem='a'\nslot=1\n[[campaign]]\nname='c'\npin=[{item='a', slot=2}]", ["rules.toml: the file: two pins at one time", "'a' in slot 2"])])
def test_a_bad_rules_file_is_named(tmp_path, text, says):
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(RuleError) as e: read_rules(tmp_path / "rules.toml")
    assert all(s in str(e.value) for s in ["rules.toml", *says]), str(e.value)


def test_no_file_is_no_rules_and_a_missing_one_is_an_error(tmp_path):
    assert read_rules(None) == RuleBook()
    with pytest.raises(RuleError, match=r"nowhere\.toml"): read_rules(tmp_path / "nowhere.toml")


def test_pins_that_never_meet_may_share_a_slot():
    times = ("2027-01-01T00:00:00Z", "2027-01-02T00:00:00Z", "2027-01-03T00:00:00Z")
    pins = [{"item": i, "slot": 1, "from": a, "until": b} for i, a, b in zip("ab", times, times[1:], strict=False)]
    assert len(RuleBook.model_validate({"pin": pins}).pins) == 2
    assert RuleBook.model_validate({"pin": [{"item": "a", "slot": 1, "surfaces": ["for_you"]}, {"item": "b", "slot": 1, "surfaces": ["similar"]}]})


def shop_log(rows: list[tuple[int, int, float]]) -> EventLog:
    user, item, day = (np.array(x) for x in zip(*sorted(rows, key=lambda r: (r[0], r[2])), strict=True))
    return EventLog(user.astype(np.int32), item.astype(np.int32), np.full(len(user), TRANSACTION, np.int8), (day * DAY).astype(np.int64), 500, 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), st.floats(0, 100)), min_size=1, max_size=60), st.sampled_from([0.05, 0.3, 1.0]))
def test_holding_back_is_its_definition(rows, share):
    """Per category: the day by which the share of purchases, one imaginary among them, had been repeated."""
    category, held = np.array([0, 0, -1], np.int32), hold_days(log := shop_log(rows), np.array([0, 0, -1], np.int32), 100 * DAY, 30, share, 180)
    for group in (0, -1):
        waits = [30.0]
        for user in range(13):
            for item in np.flatnonzero(category == group):
                times = [*sorted(log.ts[(log.user == user) & (log.item == item) & (log.ts < 100 * DAY)].tolist()), np.inf]
                last = [*(t for t, after in pairwise(times) if after - t >= DAY), np.inf]
                waits += [(after - t) / DAY for t, after in pairwise(last) if t <= 70 * DAY]
        want = min(sorted(waits)[int(np.ceil(share * len(waits))) - 1], 180)
        assert held[category == group] == pytest.approx(want, rel=1e-5)


def test_the_future_changes_no_habit():
    rows = [(u, 0, float(u % 50)) for u in range(200)] + [(u, 0, u % 50 + 9.0) for u in range(100)]
    later = [(u, 0, 101.0 + u) for u in range(50)]
    a, b = (hold_days(shop_log(r), np.zeros(3, np.int32), 100 * DAY, 30, 0.05, 180) for r in (rows, rows + later))
    assert np.array_equal(a, b) and a[0] == 9


def test_a_catalogue_from_before_brands_is_read_and_written(tmp_path, monkeypatch):
    """Tables that were made by an earlier version lack the column."""
    old = {c: t for c, t in CATALOG.columns.items() if c != "brand"}
    row = {"item_id": "a", "valid_from": datetime(2026, 5, 1, tzinfo=UTC), "title": "Lamp"}
    key, lake = ["item_id", "valid_from"], Lake(str(tmp_path / "lake"))
    monkeypatch.setattr("reco.data.stored.SCHEMAS", {})
    lake.write("catalog", conform(pl.DataFrame([row]), CATALOG).select(*old), key=key)
    monkeypatch.undo()
    assert lake.read("catalog").collect().equals(conform(pl.DataFrame([row]), CATALOG))
    lake.write("catalog", conform(pl.DataFrame([row | {"item_id": "b", "brand": "acme"}]), CATALOG), key=key)
    assert lake.read("catalog").sort("item_id").collect()["brand"].to_list() == [None, "acme"]


def test_attributes_survive_the_way_from_catalogue_to_filter(tmp_path: Path):
    rows = [{"item_id": i, "valid_from": datetime(2026, 5, 1, tzinfo=UTC), "brand": b, "category_path": p, "margin": m}
            for i, b, p, m in (("a", "zed", "Home / Lamps", 0.5), ("b", None, "Home", None), ("c", "acme", None, 0.1))]
    ids = IdMap(["a", "b", "c", "d"])
    state = item_state(catalog_asof(conform(pl.DataFrame(rows), CATALOG), ids, NOW))
    for name in ("brand", "brands", "path", "paths", "margin", "categories"):  # as a bundle keeps them
        np.save(tmp_path / f"{name}.npy", getattr(state, name), allow_pickle=False)
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), getattr(state, name), equal_nan=name == "margin")
    ask = lambda text: IDS and np.flatnonzero(passes(bind(parse_filter(text), attributes(state, ids)), np.arange(4), NOW)).tolist()
    assert ask("brand:zed") == [0] and ask("-brand:zed") == [1, 2, 3] and ask("path:Home") == [0, 1] and ask("margin>=0.5") == [0] and ask("item:d") == [3]
