"""What another exploration would have earned: lists that were drawn by the real exploration, brought through message, lake and credit, against a truth that is known."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from app.what_if import main
from benchmarks.experiments import World, world
from reco.data.lake import Lake
from reco.data.served import EXPOSURES_KEY, SERVED, exposures_of, hold_lists
from reco.experiments.assignment import Experiment, Experiments, Variant
from reco.monitoring.what_if import NONE, policies_of, readable, what_if
from reco.schemas import INTERACTIONS, conform

EPSILON, BOUGHT, PRICE = 0.33, 0.5, 10.0
FILE = """[[experiment]]
name = "new_items"
from = 2099-01-01T00:00:00Z
[[experiment.variant]]
name = "as_it_is"
weight = 0.5
[[experiment.variant]]
name = "twice"
weight = 0.5
explore = {epsilon = 0.66}
"""


@pytest.fixture(scope="module")
def shop() -> World: return world(300, 5)


def fill(lake: Lake, shop: World, n: int, seed: int = 1) -> None:
    """The log of n requests, three days ago, as the endpoint writes it down and the shop answers: half of what is clicked is bought."""
    rng, began = np.random.default_rng(seed), datetime.now(UTC) - timedelta(days=3)
    user, items, p, clicks = shop.log(n, EPSILON, 1.0, seed)
    when = [round((began + timedelta(seconds=i)).timestamp() * 1000) for i in range(n)]
    lists = [{"request_id": f"r{i}", "ts": when[i], "user_id": f"u{user[i]}", "surface": "for_you", "bundle": "b", "variant": None, "fallback": False, "latency_ms": 1.0,
              "items": [{"item_id": f"i{x}", "score": 0.5, "source": "als", "propensity": q, "team": None} for x, q in zip(items[i], p[i].round(9), strict=True)]} for i in range(n)]
    good, bad, _ = hold_lists([SERVED.decode(SERVED.encode(x)) for x in lists], datetime.now(UTC))
    assert not bad
    lake.write("exposures", exposures_of(good), key=EXPOSURES_KEY, day_of="ts")
    row, slot = clicks.nonzero()
    clicked = pl.DataFrame({"request_id": [f"r{i}" for i in row], "user_id": [f"u{user[i]}" for i in row], "item_id": [f"i{items[i, s]}" for i, s in zip(row, slot, strict=True)],
                            "ts": [when[i] + 1 + s for i, s in zip(row, slot, strict=True)]}).with_columns(pl.col("ts").cast(pl.Datetime("ms", "UTC")), event_id=pl.format("c{}", pl.int_range(pl.len())), event=pl.lit("click"))
    bought = clicked.filter(pl.Series(rng.random(len(row)) < BOUGHT)).with_columns(
        pl.col("ts") + pl.duration(milliseconds=500), event_id=pl.format("p{}", "event_id"), event=pl.lit("transaction"), request_id=pl.lit(None, pl.String), price=pl.lit(PRICE), quantity=pl.lit(1))
    lake.write("interactions", conform(pl.concat([clicked, bought], how="diagonal"), INTERACTIONS), key=["event_id"], day_of="ts")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[lake]\nroot = lake\n[experiments]\nfile = experiments.toml\n")
    (tmp_path / "experiments.toml").write_text(FILE)
    monkeypatch.setenv("RECO_SETTINGS", str(tmp_path / "settings.ini"))
    return tmp_path


def test_the_command_finds_what_other_explorations_earn(folder, shop, capsys):
    lake = Lake(folder / "lake")
    assert main([]) == 1 and "the lake has no exposures, interactions" in capsys.readouterr().err
    fill(lake, shop, 6_000)
    assert main(["--epsilon", "0.1"]) == 0
    printed, table = capsys.readouterr().out, lake.read("what_ifs").collect()
    truth = {name: shop.earns(shop.shown(e, 1.0)) for name, e in ((NONE, 0.0), ("new_items=twice", 0.66), ("epsilon 0.1", 0.1), ("ran", EPSILON))}
    assert set(table["policy"]) == set(truth) - {"ran"} and (table["verdict"] == "estimated").all() and table.height == 3 * 3 * 3
    for r in table.filter(pl.col("reward") == "clicks").iter_rows(named=True):
        assert abs(r["value"] - truth[r["policy"]]) < r["high"] - r["low"] and r["requests"] == 6_000
        assert r["gain_low"] < truth[r["policy"]] - truth["ran"] < r["gain_high"] and r["gain_high"] - r["gain_low"] < 0.8 * (r["high"] - r["low"])
    of = lambda policy, reward: table.filter(policy=policy, reward=reward, method="dr").row(0, named=True)
    assert abs(truth[NONE] - truth["ran"]) > of(NONE, "clicks")["gain_high"] - of(NONE, "clicks")["gain"]  # the average of the log would be wrong
    for policy in (NONE, "new_items=twice"):
        earned = of(policy, "revenue")
        assert earned["low"] < truth[policy] * BOUGHT * PRICE < earned["high"]
    assert f"{NONE} (epsilon 0), clicks per list, snips: " in printed and printed.count("\n") == 27
    assert main(["--epsilon", "0.1"]) == 0 and lake.read("what_ifs").collect().height == table.height  # once more replaces
    assert main(["--surface", "similar"]) == 1 and "nothing was shown on similar" in capsys.readouterr().err


def outcomes(n: int, **more: object) -> pl.DataFrame:
    """Lists of four, of which the last two are open, as 10% exploration draws them; one in ten of the requests has something drawn."""
    slot, request = np.tile(np.arange(4), n), np.repeat(np.arange(n), 4)
    drawn = (slot == 3) & (request % 10 == 0)
    p = np.where(slot < 2, 1.0, np.where(drawn, 0.025, 0.95))
    return pl.DataFrame({"request_id": [f"r{i}" for i in request], "user_id": [f"u{i % 50}" for i in request], "list_id": [f"l{i}" for i in request], "rank": slot + 1, "bundle": "b", "variant": None, "propensity": p.astype(np.float32),
                         "click": (slot == 0).astype(int), "purchase": 0, "revenue": 0.0}, schema_overrides={"variant": pl.String, "list_id": pl.String}).with_columns(**more)


def test_what_cannot_be_read_is_left_out_and_counted():
    first = lambda n: pl.col("request_id").is_in([f"r{i}" for i in range(n)])
    put = lambda value, where, column: pl.when(where).then(pl.lit(value)).otherwise(column).alias(column)
    log = outcomes(400).with_columns(put(None, first(10), "user_id"), put("a=b duel=interleaved", first(30), "variant"))
    idle = outcomes(20).with_columns(request_id=pl.format("i{}", "request_id"), bundle=pl.lit("idle"), propensity=pl.lit(1.0, pl.Float32))
    narrow = outcomes(20).with_columns(request_id=pl.format("n{}", "request_id"), propensity=pl.when(pl.col("rank") == 4).then(0.9).otherwise(1.0).cast(pl.Float32))
    table, left = what_if(pl.concat([log, idle, narrow]), {NONE: 0.0}, ("clicks",))
    assert left == {"drafted": 20, "not explored": 20, "with one open slot": 20, "without an id": 10} and set(table["requests"]) == {370}
    assert table["value"].to_list() == pytest.approx([1] * 3)
    nothing, left = what_if(idle, {NONE: 0.0})
    assert nothing.is_empty() and nothing.columns == table.columns and left == {"not explored": 20}
    assert readable(log, "clicks")[0].height == 370 * 4


def test_requests_of_several_shoppers_under_one_name_are_lists_of_their_own():
    rows = outcomes(200)
    apart, _ = what_if(rows, {NONE: 0.0}, ("clicks",))
    alike, _ = what_if(rows.with_columns(request_id=pl.lit("always the same")), {NONE: 0.0}, ("clicks",))
    assert alike["requests"].to_list() == apart["requests"].to_list() and alike["requests"][0] == 200


def test_lists_of_different_strengths_are_read_as_one(shop):
    """Half of the lists of another bundle explored twice as much: each is weighed by its own ε."""
    parts = []
    for bundle, epsilon, seed in (("b", 0.33, 1), ("c", 0.66, 2)):
        user, _, p, clicks = shop.log(4_000, epsilon, 1.0, seed)
        parts.append(pl.DataFrame({"request_id": np.repeat([f"{bundle}{i}" for i in range(4_000)], shop.slots), "user_id": np.repeat(user, shop.slots).astype(str), "bundle": bundle, "list_id": None,
                                   "variant": None, "rank": np.tile(np.arange(shop.slots) + 1, 4_000), "propensity": p.ravel().astype(np.float32), "click": clicks.ravel().astype(int)},
                                  schema_overrides={"variant": pl.String, "list_id": pl.String}))
    table, _ = what_if(pl.concat(parts), {NONE: 0.0, "half": 0.5}, ("clicks",))
    for r in table.iter_rows(named=True): assert r["low"] < shop.earns(shop.shown({NONE: 0.0, "half": 0.5}[r["policy"]], 1.0)) < r["high"], r


def test_only_variants_of_exploration_are_judged():
    of = lambda name, **more: Variant(name=name, weight=0.5, **more)
    one = Experiment(name="x", variant=(of("a", explore={"epsilon": 0.1}), of("b", explore={"epsilon": 0.2, "temperature": 2.0})), group="g", share=0.5)
    two = Experiment(name="y", variant=(of("a"), of("b", explore={"epsilon": 0.3}, rules={"category_cap": 1})), group="g", begin=0.5, share=0.5)
    assert policies_of(Experiments(experiment=(one, two))) == {NONE: 0, "x=a": 0.1}


@pytest.mark.parametrize(("args", "says"), [(["--days", "0"], "--days 0: 1 or more"), (["--epsilon", "1"], "--epsilon 1: from 0 to below 1"), (["--epsilon", "nan"], "--epsilon nan")])
def test_bad_arguments_are_named(args, says, capsys):
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2 and says in capsys.readouterr().err
