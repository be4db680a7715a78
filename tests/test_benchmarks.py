"""Every benchmark runs, what it counts is right, and the committed page is what its committed results say."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers, quality, retrieval
from benchmarks.base import HERE, RESULTS, render
from benchmarks.slices import AGES, DAY, LENGTHS, by_age, by_length, by_popularity
from reco.data.histories import VIEW, EventLog, epoch_ms, histories
from reco.data.shop import index_shop
from reco.data.simulator import simulate
from reco.moment import fit_moment
from reco.ranking.examples import Outcomes
from reco.settings import Settings

APART = "__init__", "base", "endpoint", "peers", "peer_library", "slices", "quality", "serving"
NAMES = sorted(p.stem for p in HERE.glob("*.py") if p.stem not in APART)


def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # smoke runs are too small for more
    return subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, env=alone)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The results of all tables of quality, made in one run."""
    folder = tmp_path_factory.mktemp("quality")
    done = run("quality", "--quick", "--results", folder)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_writes_a_table(name, tmp_path, request):
    if name in quality.MAINS: folder = request.getfixturevalue("quick")
    else:
        folder, done = tmp_path, run(name, "--quick", "--results", tmp_path)
        assert done.returncode == 0, done.stderr
    body = json.loads((folder / f"{name}.json").read_text())
    assert body["benchmark"] == name and body["rows"]
    assert body["command"] == f"python -m benchmarks.{name} --quick --results {folder}"
    for r in body["rows"]:
        assert {"system", "case", "metrics"} <= set(r)
        assert all(v >= 0 for x in r["metrics"].values() for v in (x if isinstance(x, list) else [x]))


def test_the_page_is_made_of_the_results(tmp_path: Path):
    render(RESULTS, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (HERE / "README.md").read_text()
    assert {p.stem for p in RESULTS.glob("*.json")} == set(NAMES)


def test_the_page_of_results_says_what_was_measured():
    """Every figure of its table is the benchmark's."""
    rows = json.loads((RESULTS / "holdout.json").read_text())["rows"]
    by = {(r["system"], r["case"]): r["metrics"] for r in rows}
    page = (HERE.parent / "docs" / "results.md").read_text()
    for system in {r["system"] for r in rows}:
        name = "**pipeline**" if system == "reco" else system
        [line] = [x for x in page.splitlines() if x.startswith(f"| {name} |")]
        whole, home, visit = (by[system, case] for case in ("all", "home", "visit"))
        ahead = f"{whole['reco ahead']:.1%}" if "reco ahead" in whole else ""
        interval = "[{:.3f}, {:.3f}]".format(*whole["NDCG@10_ci"])
        cells = [f"{whole['NDCG@10']:.3f} {interval}", ahead, f"{home['NDCG@10']:.3f}", f"{visit['NDCG@10']:.3f}",
                 f"{whole['Recall@20']:.3f}", f"{whole['coverage@10']:.3f}"]
        assert [c.strip() for c in line.replace("**", "").split("|")[2:-1]] == cells


# Retrieval


@pytest.fixture(scope="module")
def asked():
    """A small shop's sources, some requests, and what is relevant."""
    sim = simulate(200, 100, 4_000, days=60, end=datetime(2026, 5, 1, tzinfo=UTC), seed=7)
    shop, at = index_shop(sim.interactions, sim.catalog), datetime(2026, 4, 17, tzinfo=UTC)
    settings, extras = retrieval.with_extras(Settings())
    assert extras == ["trending", "category_popularity"]
    moment = fit_moment(shop, epoch_ms(at), settings)
    on = np.array([n not in extras for n in moment.sources])
    user, asof, truth = retrieval.asked_for(shop, at, shop.end, "touched", 60, 7)
    h = histories(shop.log, user, asof, 200, moment.known)
    return shop, moment, on, user, h, truth, retrieval.found_at(moment, user, h, truth, on)


def test_recall_is_what_sets_say(asked):
    _, moment, on, user, h, truth, found = asked
    names = list(moment.sources)
    lists = {n: s.retrieve(h, moment.quotas[n]).items for n, s in moment.sources.items()}
    deep = {n: s.retrieve(h, 100).items for n, s in moment.sources.items()}
    wanted = [set(truth.item[truth.request == i]) for i in range(len(user))]
    mean = lambda proposed: float(np.mean([len(w & p) / len(w) for w, p in zip(wanted, proposed, strict=True)]))
    of = lambda some: [set().union(*(set(lists[n][i]) - {-1} for n in some)) for i in range(len(user))]
    switched_on = [n for n, used in zip(names, on, strict=True) if used]
    rows = {r["system"].partition(" (")[0]: r["metrics"] for r in retrieval.rows_of(found, names, on, moment.quotas, "x")}
    union = mean(of(switched_on))
    assert rows["union"]["Recall@quota"] == pytest.approx(union, abs=1e-4)
    assert rows["union"]["candidates"] == pytest.approx(np.mean([len(p) for p in of(switched_on)]), abs=0.1)
    for n in names:
        assert rows[n]["Recall@quota"] == pytest.approx(mean(of([n])), abs=1e-4)
        assert rows[n]["Recall@20"] == pytest.approx(mean([set(x[:20]) - {-1} for x in deep[n]]), abs=1e-4)
        with_it, without = (switched_on, [m for m in switched_on if m != n]) if n in switched_on else ([*switched_on, n], switched_on)
        assert rows[n]["without it"] == pytest.approx(mean(of(without)), abs=1e-4)
        assert rows[n]["adds"] == pytest.approx(mean(of(with_it)) - mean(of(without)), abs=1e-4)
        size = sum(map(len, of(with_it)))
        assert rows[n]["alone"] == pytest.approx((size - sum(map(len, of(without)))) / size, abs=1e-3)
        assert rows[n]["share"] == pytest.approx(sum(map(len, of([n]))) / size, abs=1e-3)


def test_a_first_touch_was_never_touched_before(asked):
    shop, *_ = asked
    user, asof, truth = retrieval.asked_for(shop, datetime(2026, 4, 17, tzinfo=UTC), shop.end, retrieval.CASES[1], 60, 7)
    assert len(truth.item)
    for r, item in zip(truth.request, truth.item, strict=True):
        before = (shop.log.user == user[r]) & (shop.log.item == item) & (shop.log.ts < asof[r])
        after = (shop.log.user == user[r]) & (shop.log.item == item) & (shop.log.ts >= asof[r])
        assert not before.any() and after.any()


def test_nothing_of_the_test_days_is_read(tmp_path):
    lines = [f"{epoch_ms(datetime(2026, 1, d, tzinfo=UTC))},{d % 3},view,{d % 5}," for d in range(1, 21)]
    (tmp_path / "events.csv").write_text("\n".join(["timestamp,visitorid,event,itemid,transactionid", *lines]) + "\n")
    shop = retrieval.read("retailrocket", tmp_path, "2026-01-11", Settings())
    assert len(shop.log) == 10 and shop.end <= datetime(2026, 1, 11, tzinfo=UTC)
    assert len(retrieval.read("retailrocket", tmp_path, None, Settings()).log) == 20


# Slices


def test_slices_divide_what_they_divide():
    rng, asof = np.random.default_rng(1), 100 * DAY
    user, ts, item = np.sort(rng.integers(0, 40, 300)).astype(np.int32), rng.integers(60 * DAY, 120 * DAY, 300), rng.integers(0, 200, 300)
    ts = np.maximum(ts, (60 + item // 4) * DAY)  # a higher item comes later
    log = EventLog(user, item.astype(np.int32), np.full(300, VIEW, np.int8), ts, 40, 200)
    truth = Outcomes(np.repeat(np.arange(40), 5), rng.integers(0, 200, 200).astype(np.int32), np.ones(200, np.int8), 40)
    lengths = rng.integers(0, 40, 40)
    past, every = log.before(asof), set(zip(truth.request, truth.item, strict=True))
    known = {x for x in every if x[1] in set(past.item)}
    for parts, whole in ((by_length(truth, lengths), every), (by_age(truth, log, asof), known), (by_popularity(truth, log, asof), known)):
        pairs = [set(zip(p.request, p.item, strict=True)) for p in parts.values()]
        assert set().union(*pairs) == whole and sum(map(len, pairs)) == len(whole) and all(pairs)
    for name, part in by_length(truth, lengths).items():
        assert all(LENGTHS[name][0] <= lengths[r] <= LENGTHS[name][1] for r in part.request)
    for name, part in by_age(truth, log, asof).items():
        assert all(AGES[name][0] <= (asof - past.ts[past.item == i].min()) / DAY <= AGES[name][1] for i in part.item)
    head, tail = (set(p.item) for p in by_popularity(truth, log, asof).values())
    recent = past.where(past.ts >= asof - 30 * DAY)
    shoppers = lambda i: len(set(recent.user[recent.item == i]))
    assert min(map(shoppers, head)) >= max(map(shoppers, tail))
    assert len(head) <= round(0.2 * len(set(past.item)))


# All tables in one run


def test_what_has_no_data_is_named(tmp_path):
    done = run("quality", "--results", tmp_path)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == set(quality.MAINS)


def test_data_given_once_reaches_every_benchmark(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(quality, "MAINS", {n: lambda words, n=n: seen.update({n: words}) for n in quality.MAINS})
    (tmp_path / "q2_purchases.json").write_text('{"test_looks": 4}')
    quality.main(["--retailrocket-sessions", "S", "--retailrocket", "R", "--online-retail", "O.csv.gz", "--peers-python", "P", "--results", str(tmp_path)])
    there = ["--results", str(tmp_path)]
    assert seen == {
        "q1_sessions": ["--train", "S/train_sessions.csv.gz", "--test", "S/test_instances.csv.gz", "--test-looks", "1", *there],
        "q2_purchases": ["--events", "R/events.csv", "--peers-python", "P", "--test-looks", "5", *there],
        "q3_baskets": ["--events", "O.csv.gz", "--test-looks", "1", *there], "q4_cold_items": ["--events", "O.csv.gz", "--test-looks", "1", *there],
        "holdout": ["--source", "retailrocket", "--path", "R", "--test-looks", "1", *there],
        "frontier": ["--source", "retailrocket", "--path", "R", "--test-looks", "1", *there],
        "retrieval": ["--source", "retailrocket", "online_retail", "--path", "R", "O.csv.gz", "--until", "2015-08-15", "2011-10-01", *there]}


def test_one_failure_does_not_keep_the_others_from_running(tmp_path, monkeypatch, capsys):
    ran = []

    def fails(words):
        raise SystemExit("no good")

    monkeypatch.setattr(quality, "MAINS", {"q3_baskets": fails, "q4_cold_items": ran.append})
    with pytest.raises(SystemExit, match="failed: q3_baskets"): quality.main(["--online-retail", "O", "--results", str(tmp_path)])
    assert len(ran) == 1 and "no good" in capsys.readouterr().err


# Peers in another environment

STUB = """
import numpy as np
class IALSRecommender:
    def __init__(self, rows, shift=0): self.rows, self.shift = rows, shift
    def learn(self): print("a progress bar")
    def get_score(self, users): return -np.abs(np.arange(self.rows.shape[1]) - users[:, None] - self.shift).astype(float)
class RP3betaRecommender(IALSRecommender):
    def get_score(self, users): return np.maximum(super().get_score(users) + 2, 0) + 0 * self.rows[users].sum()
"""


def test_a_library_of_another_environment_answers(tmp_path, monkeypatch):
    (tmp_path / "irspack.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    user, item = np.repeat(np.arange(5, dtype=np.int32), 2), np.array([0, 9, 1, 9, 2, 9, 3, 8, 4, 7], np.int32)
    log = EventLog(user, item, np.full(10, VIEW, np.int8), np.arange(10, dtype=np.int64), 5, 12)
    ask = lambda name, tries: list(peers.lists_of(name, log, 100, tries, np.array([4, 1], np.int32), 3, Path(sys.executable)))
    got = ask("irspack iALS", [{"weights": "equal", "shift": 0}, {"weights": "graded", "shift": 2}])
    assert [(t["shift"], new) for t, new, _ in got] == [(0, False), (0, True), (2, False), (2, True)]
    assert got[0][2].tolist() == [[4, 3, 5], [1, 0, 2]]  # ties to the lower index
    assert got[1][2].tolist() == [[3, 5, 2], [0, 2, 3]]  # 4 and 1 were touched
    assert got[3][2].tolist() == [[6, 5, 8], [3, 2, 4]]  # 4 touched 7 too
    [(_, _, found), (_, _, new)] = ask("irspack RP3beta", [{"weights": "equal"}])
    assert found.tolist() == [[4, 3, 5], [1, 0, 2]] and new.tolist() == [[3, 5, 9], [0, 2, 3]]  # too short: filled with what is popular


def test_a_library_that_cannot_run_says_why(tmp_path, monkeypatch):
    (tmp_path / "irspack.py").write_text("raise ImportError('built for another numpy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = EventLog(*(np.zeros(1, t) for t in (np.int32, np.int32, np.int8, np.int64)), 1, 1)
    with pytest.raises(RuntimeError, match="built for another numpy"):
        list(peers.lists_of("irspack iALS", log, 1, [{"weights": "equal"}], np.zeros(1, np.int32), 3, Path(sys.executable)))
