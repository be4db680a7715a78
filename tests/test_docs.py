"""Pages that are made from the code are what it makes now, and code that stands in pages does what it says."""

import contextlib
import io
import json
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import polars as pl
import pytest
import yaml
from pages import HOST, Block, blocks, blocks_of, commands, curl, faults, pages
from shop_floor import open_shop
from worlds import with_days_to_come

from reco.bundle import load_bundle
from reco.candidates.base import load_source, save_source
from reco.data.histories import epoch_ms, histories
from reco.experiments.assignment import read_experiments
from reco.features.items import catalog_asof
from reco.moment import fit_moment
from reco.published import champion_name
from reco.sections.candidates import Quota
from reco.settings import Settings, load_settings

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS)) # its scripts are no package

import make_http  # noqa: E402


def test_the_dictionary_of_features_is_current():
    made = runpy.run_path(str(DOCS / "make_features.py"))
    assert made["page"](Settings()) == (DOCS / "features.md").read_text(), "run `python docs/make_features.py`"


def test_every_feature_of_every_surface_is_in_it_once():
    made, lines = runpy.run_path(str(DOCS / "make_features.py")), (DOCS / "features.md").read_text().splitlines()
    by = made["of_surfaces"](Settings())
    rows = {line.split("|")[1].strip().strip("`"): line for line in lines if line.startswith("| `")}
    assert len(rows) == sum(line.startswith("| `") for line in lines)
    assert set(rows) == {f for features in by.values() for f in features}
    for feature, line in rows.items():
        assert [c.strip() == "✓" for c in line.split("|")[-4:-1]] == [feature in features for features in by.values()]


# ---- code in pages --------------------------------------------------------------------------------------------------


class Small(NamedTuple):
    root: Path  # a folder with settings.ini, a lake, a bundle and an online store
    port: int   # where an endpoint answers from them


@pytest.fixture(scope="module")
def small(trained, bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    root, begin = tmp_path_factory.mktemp("small"), trained.cutoffs.end - timedelta(days=1)
    settings = with_days_to_come(root, trained.sim, begin, bundle_root)
    bundle = load_bundle(root / "bundles" / champion_name(root / "bundles"))
    with open_shop(bundle, settings, trained.sim.interactions.head(1)) as (port, replica):
        replica.settings = settings
        yield Small(root, port)


@pytest.mark.parametrize("page", sorted({b.page for b in blocks_of("python")}))
def test_python_runs(page, small, monkeypatch):
    """The blocks of a page in their order, in one namespace; one that begins with a file's name is that file, too."""
    monkeypatch.chdir(small.root)
    monkeypatch.syspath_prepend(str(small.root))
    for name in ("RECO_SETTINGS", "RECO_CANDIDATES_DEAREST"): monkeypatch.delenv(name, raising=False)
    namespace: dict = {"__name__": "__page__"}
    for block in blocks_of("python"):
        if block.page != page: continue
        text = block.text.replace(HOST, f"http://127.0.0.1:{small.port}")
        if (first := text.splitlines()[0]).startswith("# ") and first.endswith(".py"):
            (path := small.root / first[2:]).parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        code = compile("\n" * block.line + text, block.where, "exec")
        with contextlib.redirect_stdout(io.StringIO()): exec(code, namespace)


def test_a_source_of_ones_own_takes_part(trained, tmp_path, monkeypatch):
    """The class of the how-to beside the others: it proposes, its score is a feature, it is saved and read, and cutting the future off changes nothing of it."""
    [block] = [b for b in blocks_of("python") if b.text.startswith("# my_shop/dearest.py")]
    (tmp_path / "our_shop.py").write_text(block.text)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = trained.settings.model_copy(update={"candidates": {"popularity": Quota.parse("5"), "dearest": Quota.parse("our_shop:Dearest 20")}})
    asof = epoch_ms(trained.cutoffs.validation)
    moment = fit_moment(trained.shop, asof, settings)
    assert any(name.startswith("dearest") and "dearest" in meaning for name, meaning in moment.features.items())
    source, past = moment.sources["dearest"], trained.shop.log.before(asof)
    save_source(source, tmp_path / "saved")
    again = load_source(tmp_path / "saved")
    source_of_past = type(source)().fit(past, asof, catalog_asof(trained.shop.catalog.filter(pl.col("valid_from") < trained.cutoffs.validation), trained.shop.items, asof))
    for name in source.fitted:
        assert np.array_equal(getattr(source, name), getattr(again, name), equal_nan=name == "place")
        assert np.array_equal(getattr(source, name), getattr(source_of_past, name), equal_nan=name == "place")
    asked = histories(trained.shop.log, np.arange(40, dtype=np.int32), np.full(40, asof), 200)
    found = again.retrieve(asked, 20)
    assert (found.items >= 0).sum() > 200
    for row in found.items: assert len({*(shown := row[row >= 0])}) == len(shown) and len({*source.category[shown]}) <= 1


@pytest.mark.parametrize("block", blocks_of("bash", "sh", "shell", "console"), ids=lambda b: b.where)
def test_shell_names_what_there_is(block):
    keys = set(environment())
    found = [f"{' '.join(words)[:80]}: {fault}" for words in commands(block.text) for fault in faults(words, keys)]
    assert not found, "\n".join(found)


def environment() -> Iterator[str]: # RECO_SECTION_KEY of every setting
    for section, info in Settings.model_fields.items():
        for key in getattr(info.annotation, "model_fields", Settings().candidates if section == "candidates" else ()): yield f"RECO_{section}_{key}".upper()
    yield "RECO_SETTINGS"
    for path in (DOCS.parent / "docker-compose.yml", *(DOCS.parent / "deploy").rglob("*.yml")): # and what a compose file asks for
        yield from re.findall(r"\$\{(RECO_\w+)", path.read_text())


REQUESTS = [(b.where, c) for b in blocks_of("bash", "sh") for words in commands(b.text) if words[0] == "curl" and (c := curl(words))]


@pytest.mark.parametrize(("where", "asked"), REQUESTS, ids=lambda x: x if isinstance(x, str) else x.url.removeprefix(HOST)[:40])
def test_requests_are_answered(where, asked, small):
    """Every curl to the endpoint, sent to one. It follows nothing that is published, so it may say that there is nothing to go back to."""
    answer = httpx.request(asked.method, asked.url.replace(HOST, f"http://127.0.0.1:{small.port}"), headers=asked.headers, content=asked.body or None, trust_env=False, timeout=20)
    assert answer.is_success or (asked.url.endswith("/rollback") and answer.status_code == 409), f"{where}: {answer.status_code} {answer.text[:300]}"


EXAMPLES = [(f"{method} {path}", *make_http.example(method, path, route)) for method, path, route in make_http.routes()]


@pytest.mark.parametrize(("route", "request_", "answer"), EXAMPLES, ids=lambda x: x[:40])
def test_examples_of_the_reference_are_answered_in_the_shape_that_it_shows(route, request_, answer, small):
    [words] = commands(request_)
    asked = curl(words)
    found = httpx.request(asked.method, asked.url.replace(HOST, f"http://127.0.0.1:{small.port}"), headers=asked.headers, content=asked.body or None, trust_env=False, timeout=60)
    if "/v1/bundle" in route and asked.method != "GET":
        assert found.status_code in (404, 409) # that bundle is not there, and this endpoint follows none
        return
    assert found.is_success, found.text
    if answer: assert shape(json.loads(answer)) <= shape(found.json()) | OPTIONAL, shape(json.loads(answer)) - shape(found.json())


OPTIONAL = {"refused", "without[]", "candidates[].score", "past[].item_id", "past[].event", "past[].ts", "past[]"} # where there is nothing to tell


def shape(value: object, at: str = "") -> set[str]: # the names of its fields; those of a mapping by names of the shop's own are none
    """What an answer is made of."""
    if isinstance(value, list): return {f"{at}[]"}.union(*(shape(v, f"{at}[]") for v in value)) if value else set()
    if not isinstance(value, dict): return set()
    free = at.split(".")[-1] in ("seconds", "proposed", "dropped", "sources", "rows")
    return set() if free else {f"{at}.{n}".lstrip(".") for n in value}.union(*(shape(v, f"{at}.{n}".lstrip(".")) for n, v in value.items()))


@pytest.mark.parametrize("block", blocks_of("ini"), ids=lambda b: b.where)
def test_settings_are_settings(block, tmp_path):
    (tmp_path / "settings.ini").write_text(block.text)
    load_settings(tmp_path / "settings.ini", {})


@pytest.mark.parametrize("block", blocks_of("toml", "json", "yaml", "yml"), ids=lambda b: b.where)
def test_files_can_be_read(block, tmp_path):
    if block.kind == "json": json.loads(block.text)
    elif block.kind == "toml":
        if "experiment" in tomllib.loads(block.text):
            (tmp_path / "experiments.toml").write_text(block.text)
            assert read_experiments(tmp_path / "experiments.toml").experiment
    else: assert list(yaml.safe_load_all(block.text))


def test_blocks_are_found_and_what_is_not_run_says_why():
    """Half of the check: a page whose blocks are not seen would pass."""
    assert {"README.md", "docs/how-to/client.md", "docs/tutorial/first-shop.md"} <= set(pages())
    for page in pages():
        text = (DOCS.parent / page).read_text()
        found = blocks(page)
        assert sum(line.startswith("```") for line in text.splitlines()) == 2 * len(found), f"{page}: a fence that is not closed, or indented"
        assert all(len(b.reason) > 10 for b in found if b.reason) and text.count("<!-- not run") == sum(bool(b.reason) for b in found), page
    assert len(blocks_of("python")) >= 8 and len(REQUESTS) >= 8


@pytest.mark.parametrize(("shell", "says"), [
    ("make nonsense", "no target"), ("python flows/nonsense.py run", "there is no"), ("python -m app.bundle rollback --nonsense x", "knows no --nonsense"),
    ("python -m app.bundle nonsense", "knows no nonsense"), ("python flows/monitor.py run --nonsense 3", "knows no --nonsense"), ("RECO_SERVING_NONSENSE=1 make serve", "no setting"),
    ("export RECO_NONSENSE=1", "no setting"), ("nonsense --help", "not known"), ("make demo && make nonsense", "no target")])
def test_a_wrong_command_is_noticed(shell, says):
    assert says in "\n".join(f for words in commands(shell) for f in faults(words, set(environment())))


def test_a_block_is_read_as_a_shell_reads_it():
    text = "curl -H 'A: b' http://127.0.0.1:8000/x \\\n  -d '{\"a\":\n 1}' # why\nA=1 make demo & python x.py | tee y\n"
    assert list(commands(text)) == [["curl", "-H", "A: b", "http://127.0.0.1:8000/x", "-d", '{"a":\n 1}'], ["A=1", "make", "demo"], ["python", "x.py"], ["tee", "y"]]
    assert curl(next(commands(text))) == ("POST", "http://127.0.0.1:8000/x", {"A": "b"}, '{"a":\n 1}')
    looped = "KEY=$(sed -n 's/a/b/p' .env | cut -d' ' -f1)\nfor x in a b; do make demo > $x; done\n"
    assert [words[0] for words in commands(looped)] == ["sed", "cut", "KEY=SUBSTITUTED", "make"]
    assert Block("p", 1, "python", "", "").where == "p:1"
