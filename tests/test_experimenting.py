"""Experiments while the endpoint answers: the right shoppers get the right lists, the log says so, and nothing that goes wrong costs an answer."""

import re
import time
from collections import Counter
from dataclasses import replace

import polars as pl
import pytest
from flow_runs import run_flow
from starlette.testclient import TestClient

import app.consumer
from app.contract import create_app
from app.experimenting import Experimenting, Placed, released, together
from app.following import prepared, try_out
from app.serve import Replica, open_intake
from app.shown import Shown, as_list, open_log
from reco.bundle import ModelBundle, load_bundle, make_bundle, save_bundle
from reco.challenger import set_challenger
from reco.data.histories import epoch_ms
from reco.data.lake import open_lake
from reco.experiments.assignment import Assigner, ExperimentError, label, read_experiments
from reco.experiments.interleaving import coins
from reco.features.store import open_store
from reco.pipeline import recommend
from reco.published import publish
from reco.redis_server import disconnect
from reco.request import RecommendationRequest, RecommendationResponse, ScoredItem
from reco.settings import ExperimentSettings, Settings
from reco.variants import family, varied

HEAD = '[[experiment]]\nname = "{0}"\n'
VARIANT = '[[experiment.variant]]\nname = "{0}"\nweight = {1}\n{2}\n'


def experiment(name: str, *variants: tuple[str, float, str], **more: str) -> str:
    return HEAD.format(name) + "".join(f"{k} = {v}\n" for k, v in more.items()) + "".join(VARIANT.format(*v) for v in variants)


VARIETY = experiment("variety", ("as_it_is", 0.5, ""), ("more", 0.5, "rerank = {diversity = 5.0, keep_first = 0}"))
DUEL = experiment("duel", ("as_it_is", 0.5, ""), ("more", 0.5, "rerank = {diversity = 5.0, keep_first = 0}"), interleave="true")
MODEL = experiment("model", ("old", 0.5, ""), ("new", 0.5, 'serve = "challenger"'))


class Place:
    """A replica, and a file of experiments that the test edits."""

    def __init__(self, trained, tmp_path, store, text: str = ""):
        self.trained, self.root, self.file, self.noted = trained, tmp_path / "bundles", tmp_path / "experiments.toml", []
        self.settings = Settings(root=tmp_path, experiments=ExperimentSettings(file="experiments.toml"))
        publish(self.save(0))
        self.replica = Replica()
        self.replica.bundle, self.replica.store = load_bundle(next(self.root.glob("2*"))), store
        self.replica.note = self.noted.append
        self.write(text)
        self.trying = Experimenting(self.settings, lambda: self.replica.bundle, lambda folder: prepared(folder, try_out), self.replica.meter.without_variant.inc)
        self.trying.root, self.replica.experimenting = self.root, self.trying
        self.http = TestClient(create_app(self.replica))
        self.trying.look()

    def save(self, days: int):
        asof = epoch_ms(self.trained.cutoffs.end) - days * 86_400_000
        about = {"git_sha": "test", "metrics": []}
        return save_bundle(make_bundle(self.trained.shop, asof, self.trained.rankers, self.trained.settings, about, choices=self.trained.choices), self.root)

    def write(self, text: str) -> None:
        self.file.with_suffix(".new").write_text(text)
        self.file.with_suffix(".new").replace(self.file)

    def ask(self, user: str):
        answer = self.http.get(f"/recommendations/v1/{user}?k=10")
        assert answer.status_code == 200
        return answer, [x["item_id"] for x in answer.json()["recommendations"]]

    def missing(self) -> float: return self.replica.meter.registry.get_sample_value("reco_lists_without_variant_total")


@pytest.fixture
def place(trained, tmp_path, store):
    return lambda text="": Place(trained, tmp_path, store, text)


def expected(bundle: ModelBundle, store, user: str | None) -> list[str]:
    return [x.item_id for x in recommend(RecommendationRequest(user, 10), bundle, store).items]


def test_each_shopper_gets_the_list_of_the_variant_that_the_hash_says(place, store):
    shop = place(VARIETY)
    by, plain = Assigner(read_experiments(shop.file)), shop.replica.bundle
    other, seen, differ = varied(plain, {"rerank": {"diversity": 5.0, "keep_first": 0}}), Counter(), 0
    for user in sorted(store.user_ids())[:60]:
        answer, items = shop.ask(user)
        [arm] = by.arms(user, 0, "for_you")
        assert answer.headers["x-variant"] == label((arm,)) == shop.noted[-1].found.variant
        assert items == expected(plain if arm.control else other, store, user)
        assert as_list(shop.noted[-1])["variant"] == answer.headers["x-variant"] and as_list(shop.noted[-1])["user_id"] == user
        seen[arm.variant.name] += 1
        differ += items != expected(other if arm.control else plain, store, user)
    assert min(seen.values()) > 15 and differ > 30


def drawn(first: list[str], second: list[str], seed: str, k: int = 10) -> tuple[list[str], list[str | None]]:
    """A team draft by the rules of the paper, word for word: items, and whose each is."""
    items, team = [a if a == b else None for a, b in zip(first, second, strict=True)], [None] * k
    turns = iter([who for flip in coins(seed, k) for who in (flip, 1 - flip)])
    for place in range(k):
        if items[place] is not None: continue
        who = next(turns)
        items[place], team[place] = next(i for i in (first, second)[who] if i not in items), ("as_it_is", "more")[who]
    return items, team


def test_a_list_of_two_variants_is_drafted_and_says_whose_each_item_is(place, store):
    shop, changes, teams = place(DUEL), {"rerank": {"diversity": 5.0, "keep_first": 0}}, Counter()
    other = varied(shop.replica.bundle, changes)
    assert len(family(shop.replica.bundle)) == 1  # made ahead
    for user in sorted(store.user_ids())[:60]:
        answer, items = shop.ask(user)
        shown = as_list(shop.noted[-1])
        wanted = drawn(expected(shop.replica.bundle, store, user), expected(other, store, user), answer.headers["x-request-id"])
        assert (items, [i["team"] for i in shown["items"]]) == wanted and [i["item_id"] for i in shown["items"]] == items
        assert answer.headers["x-variant"] == shown["variant"] == "duel=interleaved" and shown["user_id"] == user
        teams.update(i["team"] for i in shown["items"])
    assert min(teams["as_it_is"], teams["more"]) > 100 and abs(teams["as_it_is"] - teams["more"]) < 60


def test_the_same_request_is_drafted_alike_by_every_replica_from_kept_lists_or_new_ones(bundle, trained, tmp_path):
    settings = trained.settings.model_copy(update={"root": tmp_path, "experiments": ExperimentSettings(file="experiments.toml")})
    (tmp_path / "experiments.toml").write_text(DUEL)
    store, replicas = open_store(settings), []
    try:
        for keep in (60, 60, 0):
            made = Replica()
            made.bundle, made.store, made.keep_s = bundle, store, keep
            made.experimenting = Experimenting(settings, lambda: bundle, load_bundle)
            made.experimenting.book = read_experiments(tmp_path / "experiments.toml")
            made.experimenting.plan = Assigner(made.experimenting.book), {}
            replicas.append(made)
        ask = lambda replica, name: replica.recommend(RecommendationRequest("nobody", 10, request_id=name))
        first, again, anew = (ask(r, "one") for r in replicas)
        assert [x.kept for x in (first, again, anew)] == [False, True, False] and first.items == again.items == anew.items
        assert first.variant == again.variant == "duel=interleaved" and {x.team for x in first.items} >= {"as_it_is", "more"}
        drafts = {tuple(x.item_id for x in ask(replicas[0], f"r{n}").items) for n in range(20)}
        assert len(drafts) > 5  # two kept lists, and another draft of them for each request
        alone = recommend(RecommendationRequest("nobody", 10), bundle, store, keep_s=60)
        assert alone.kept and alone.items == recommend(RecommendationRequest("nobody", 10), bundle, store).items  # no draft was kept in its place
    finally: store.close()


def test_a_draft_explains_each_item_by_the_variant_that_brought_it(place, store):
    shop = place(DUEL)
    user = next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)
    answer = shop.http.get(f"/recommendations/v1/{user}?k=10&explain=true")
    items = answer.json()["recommendations"]
    plain = shop.http.get(f"/recommendations/v1/{user}?k=10", headers={"X-Request-ID": answer.headers["x-request-id"]})
    assert [x["item_id"] for x in items] == [x["item_id"] for x in plain.json()["recommendations"]] and all(x["why"]["reason"] for x in items)
    assert {i["team"] for i in as_list(shop.noted[0])["items"]} >= {"as_it_is", "more"}


def test_a_draft_of_what_was_late_has_no_teams_and_says_so():
    item = lambda n, score=0.5: ScoredItem(f"i{n}", score, "als", 0.9)
    a = RecommendationResponse([item(0), item(1), item(2)], "a", False, seconds={"store": 1.0}, proposed={"als": 2}, dropped={"cap": 1})
    b = RecommendationResponse([item(3), item(1), item(4)], "b", True, seconds={"store": 2.0}, proposed={"als": 3, "recent": 1}, kept=True)
    both = together(a, b, ("x", "y"), 3, "r")
    assert [x.item_id for x in both.items if x.team is None] == ["i1"] and {x.team for x in both.items} == {"x", "y", None}
    assert (both.bundle_id, both.fallback, both.kept, both.without) == ("a", False, False, ()) and all(x.propensity == 0.9 for x in both.items)
    assert both.seconds == {"store": 3.0} and both.proposed == {"als": 5, "recent": 1} and both.dropped == {"cap": 1}
    late = together(a, replace(b, without=("als",)), ("x", "y"), 3, "r")
    assert [x.item_id for x in late.items] == [x.item_id for x in both.items] and {x.team for x in late.items} == {None} and late.without == ("als",)
    replica, waits, asked = Replica(), [], RecommendationRequest("u", 3, request_id="r")
    replica.deadline_s = 0.25
    placed = Placed(asked, None, "duel=interleaved", Placed(asked, None, "duel=interleaved"), ("x", "y"))
    found = replica.drafted(asked, placed, lambda one, wait: waits.append(wait) or (a if one is placed else b))
    assert found == replace(both, variant="duel=interleaved") and waits == [0.125, 0.125]  # each list has half of the time
    short = together(a, replace(b, items=[]), ("x", "y"), 3, "r")
    assert [x.item_id for x in short.items] == ["i0", "i1", "i2"] and {x.team for x in short.items} == {None}


def test_clicks_on_drafted_lists_come_to_a_verdict(trained, tmp_path, bundle):
    """The whole way: answered over HTTP, written down, brought into the lake by the consumer, clicked, and read by the flow."""
    settings = trained.settings.model_copy(update={"root": tmp_path, "experiments": ExperimentSettings(file="experiments.toml")})
    (tmp_path / "experiments.toml").write_text(DUEL)
    (tmp_path / "settings.ini").write_text("[experiments]\nfile = experiments.toml\n")
    replica, lake = Replica(), open_lake(settings)
    replica.bundle, replica.store, replica.intake = bundle, open_store(settings), open_intake(settings)
    replica.log, replica.experimenting = open_log(settings, replica.meter.lost.inc), Experimenting(settings, lambda: bundle, load_bundle)
    replica.experimenting.begin(None)
    http, client = TestClient(create_app(replica)), replica.store.client

    def in_the_lake():
        replica.log.flush()
        until, topics = time.monotonic() + 30, (settings.stream.topic, settings.served.topic)
        app.consumer.run(settings, "t", lambda: not any(map(client.xlen, topics)) or time.monotonic() > until)
        return lake.read("exposures").collect()

    try:
        for n in range(40): assert http.get(f"/recommendations/v1/s{n}?k=6", headers={"X-Request-ID": f"r{n}"}).headers["x-variant"] == "duel=interleaved"
        exposures = in_the_lake()
        assert set(exposures["team"]) == {"as_it_is", "more", None}
        time.sleep(0.01)
        clicked = exposures.filter(pl.col("team") == "more").group_by("request_id").first().select("request_id", "user_id", "item_id", "surface").to_dicts()
        sent = [x | {"event_id": f"click {x['request_id']}", "ts": round(time.time() * 1000), "event": "click"} for x in clicked]
        assert len(sent) > 30 and http.post("/events/v1", json=sent).status_code == 202
        in_the_lake()
        lake.write("catalog", trained.sim.catalog, key=["item_id", "valid_from"])
    finally:
        replica.experimenting.end()
        replica.log.close()
        disconnect(replica.intake.producer.client)
        replica.store.close()
    done = run_flow(tmp_path, "kpis", "run")
    assert done.returncode == 0 and "experiment duel: more, preference: ahead" in done.stdout, done.stdout
    row = lake.read("readouts").collect().row(0, named=True)
    assert (row["experiment"], row["metric"], row["variant"], row["verdict"], row["shoppers"]) == ("duel", "preference", "more", "ahead", len(sent))
    assert row["value"] == 1 and row["control"] == 0 and row["split_p"] is None
    assert not [u for u in exposures["user_id"].unique() if re.search(rf"\b{u}\b", done.stdout)]


def test_without_a_file_nothing_is_said_and_nobody_is_assigned(place):
    shop = place()
    assert shop.trying.plan is None and "x-variant" not in shop.ask("u1")[0].headers and not family(shop.replica.bundle)
    idle = Experimenting(Settings(), lambda: None, lambda folder: pytest.fail("nothing is to be loaded"))
    idle.begin(shop.root)
    assert idle.place(RecommendationRequest("u"), shop.replica.bundle).label is None


def test_the_holdout_keeps_the_bundle_of_its_first_day(place, store):
    shop = place()
    old = shop.save(3).name
    held = f'holdout = 0.5\nholdout_from = 2026-01-01T00:00:00Z\nholdout_serve = "{old}"\n'
    shop.write(held + VARIETY)
    shop.trying.look()
    by, seen = Assigner(read_experiments(shop.file)), Counter()
    for user in sorted(store.user_ids())[:40]:
        answer, items = shop.ask(user)
        kept = by.held_out(user)
        assert (answer.headers["x-variant"] == "holdout=held_out") == kept and answer.headers["x-bundle-id"] == (old if kept else shop.replica.bundle_id)
        if kept: assert items == expected(load_bundle(shop.root / old), store, user)
        seen[kept] += 1
    assert min(seen.values()) > 10
    shop.write(held.replace("2026-01-01", "2099-01-01"))
    shop.trying.look()
    assert not any("x-variant" in shop.ask(u)[0].headers for u in sorted(store.user_ids())[:10])


def test_anonymous_visits_are_in_no_experiment(place):
    shop = place(VARIETY)
    visit = shop.http.post("/recommendations/v1/session", json={"k": 3})
    assert visit.status_code == 200 and "x-variant" not in visit.headers and shop.noted[-1].found.variant is None


def test_two_models_side_by_side_and_a_new_challenger_is_taken_up(place, store):
    shop = place()
    first = shop.save(3)
    set_challenger(first)
    shop.write(MODEL)
    shop.trying.look()
    ids = {user: shop.ask(user)[0].headers for user in sorted(store.user_ids())[:40]}
    assert {(h["x-variant"], h["x-bundle-id"]) for h in ids.values()} == {("model=old", shop.replica.bundle_id), ("model=new", first.name)}
    second = shop.save(5)
    set_challenger(second)
    shop.trying.look()
    for user, before in ids.items():
        now = shop.ask(user)[0].headers
        assert now["x-variant"] == before["x-variant"] and now["x-bundle-id"] == (second.name if before["x-variant"] == "model=new" else shop.replica.bundle_id)
    assert not shop.missing()


def test_a_challenger_that_is_not_there_is_counted_and_the_champion_answers(place, store):
    shop = place()
    shop.write(MODEL)
    with pytest.raises(Exception, match="there is no challenger"): shop.trying.look()
    users = sorted(store.user_ids())[:20]
    heads = [shop.ask(u)[0].headers for u in users]
    new = [h for h in heads if h["x-variant"] == "model=new"]
    assert 0 < len(new) < len(users) and {h["x-bundle-id"] for h in heads} == {shop.replica.bundle_id} and shop.missing() == len(new)


def test_a_damaged_challenger_is_refused_and_the_one_before_goes_on(place, store):
    shop = place()
    first, second = shop.save(3), shop.save(5)
    set_challenger(first)
    shop.write(MODEL)
    shop.trying.look()
    with (second / "items.parquet").open("ab") as f: f.write(b"x")
    set_challenger(second)
    with pytest.raises(Exception, match="items.parquet"): shop.trying.look()
    shop.trying.prepare = lambda folder: pytest.fail("it is read again")
    with pytest.raises(Exception, match="items.parquet"): shop.trying.look()
    heads = [shop.ask(u)[0].headers for u in sorted(store.user_ids())[:20]]
    assert {h["x-bundle-id"] for h in heads if h["x-variant"] == "model=new"} == {first.name}


def test_the_list_of_a_stranger_for_those_who_are_to_get_it(place, store):
    shop = place(experiment("worth", ("known", 0.0, ""), ("stranger", 1.0, 'serve = "non_personalised"')))
    user = next(u for u in sorted(store.user_ids()) if len(store.events(u)) > 5)
    answer, items = shop.ask(user)
    assert items == expected(shop.replica.bundle, store, None) != expected(shop.replica.bundle, store, user)
    assert answer.json()["user_id"] == user and as_list(shop.noted[-1])["user_id"] == user and answer.headers["x-variant"] == "worth=stranger"


def test_two_experiments_at_once_add_up(place, store):
    shop = place(VARIETY + experiment("caps", ("off", 0.5, ""), ("one", 0.5, "rules = {category_cap = 1}")))
    seen = {shop.ask(u)[0].headers["x-variant"] for u in sorted(store.user_ids())[:60]}
    assert seen == {f"variety={a} caps={b}" for a in ("as_it_is", "more") for b in ("off", "one")}
    assert len(family(shop.replica.bundle)) == 3 # made ahead, and no more of them by asking


def test_an_edited_file_holds_at_once_and_a_bad_one_changes_nothing(place):
    shop = place(VARIETY)
    assert shop.ask("u1")[0].headers["x-variant"].startswith("variety=")
    shop.write(VARIETY.replace("0.5", "0.7"))
    with pytest.raises(ExperimentError, match="add up to 1.4"): shop.trying.look()
    assert shop.ask("u1")[0].headers["x-variant"].startswith("variety=")
    shop.trying.look() # the same bad file is not read again
    shop.write("holdout = 0.1\n")
    shop.trying.look()
    assert "x-variant" not in shop.ask("u1")[0].headers
    shop.file.unlink()
    with pytest.raises(ExperimentError, match="experiments.toml"): shop.trying.look()


def test_an_edited_variant_holds_under_its_old_name(place, store):
    shop, changes = place(VARIETY), {"rerank": {"diversity": 9.0, "keep_first": 0}}
    users = [u for u in sorted(store.user_ids())[:60] if shop.ask(u)[0].headers["x-variant"] == "variety=more"]
    before = [shop.ask(u)[1] for u in users]
    shop.write(VARIETY.replace("5.0", "9.0"))
    shop.trying.look()
    after = [shop.ask(u)[1] for u in users]
    assert after == [expected(varied(shop.replica.bundle, changes), store, u) for u in users] != before


def test_a_bad_file_at_the_start_is_an_error(place, tmp_path):
    shop = place()
    shop.write("experiment = 3")
    with pytest.raises(ExperimentError, match="experiments.toml"): Experimenting(shop.settings, lambda: None, load_bundle).begin(shop.root)


def test_it_follows_by_itself_and_ends(place, monkeypatch):
    monkeypatch.setattr("app.experimenting.EVERY_S", 0.05)
    shop = place()
    shop.trying.begin(shop.root)
    shop.write(VARIETY)
    until = time.monotonic() + 10
    while "x-variant" not in shop.ask("u1")[0].headers and time.monotonic() < until: time.sleep(0.05)
    assert "x-variant" in shop.ask("u1")[0].headers
    shop.trying.end()


def test_a_bundle_that_goes_leaves_no_circle(place, store):
    import gc
    import weakref
    shop = place(VARIETY)
    shop.ask("u1")
    old, shop.replica.bundle = shop.replica.bundle, load_bundle(next(shop.root.glob("2*")))
    gone = weakref.ref(old)
    gc.disable()
    try:
        released(old)
        shop.noted.clear()
        del old
        assert gone() is None
    finally: gc.enable()


def test_explaining_and_kept_lists_know_their_variant(bundle, trained, tmp_path):
    settings = trained.settings.model_copy(update={"root": tmp_path})
    store = open_store(settings)
    try:
        other, asked = varied(bundle, {"rerank": {"diversity": 5.0, "keep_first": 0}}), RecommendationRequest("nobody", 10)
        plain = [recommend(asked, bundle, store, keep_s=60) for _ in range(2)]
        mine = [recommend(asked, other, store, keep_s=60) for _ in range(2)]
        assert [x.kept for x in plain] == [x.kept for x in mine] == [False, True]
        assert plain[0].items == plain[1].items and mine[0].items == mine[1].items and mine[0].items != plain[0].items
        assert as_list(Shown(replace(asked, request_id="r"), replace(mine[1], variant="a=b"), 1, 1.0))["variant"] == "a=b"
    finally: store.close()
