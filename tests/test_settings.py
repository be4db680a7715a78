"""`settings.ini` is complete, explained and true; whatever is misspelt is named."""

import configparser
import pickle
from pathlib import Path

import pytest
from pydantic import SecretStr

from reco.settings import Settings, SettingsError, load_settings

FILE = Path(__file__).parents[1] / "settings.ini"


def refusal(tmp_path: Path, text: str, environ: dict | None = None) -> str:
    path = tmp_path / "settings.ini"
    path.write_text(text)
    with pytest.raises(SettingsError) as e: load_settings(path, environ or {})
    return str(e.value)


def test_the_file_holds_every_key_with_its_default():
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(FILE)
    declared = {s: set(f.annotation.model_fields) if s != "candidates" else set(Settings().candidates)
                for s, f in Settings.model_fields.items() if s != "root"}
    assert {s: set(ini[s]) for s in ini.sections()} == declared
    assert load_settings(FILE, {}).model_dump(exclude={"root"}) == Settings().model_dump(exclude={"root"})


def test_every_key_of_the_file_is_explained():
    lines = FILE.read_text().splitlines()
    for i, line in enumerate(lines):
        if "=" in line and not line.startswith("#"): assert lines[i - 1].startswith("# "), f"line {i + 1}: {line}"


@pytest.mark.parametrize(("text", "says"), [
    ("[lake]\nrot = x", ["[lake]", "'rot'", "did you mean 'root'"]),
    ("[lakes]\nroot = x", ["'lakes'", "did you mean 'lake'"]),
    ("[als]\nfactors = many", ["[als] factors", "'many'", "integer"]),
    ("[als]\nfactors = 1", ["[als] factors", "'1'", "greater than or equal to 2"]),
    ("[data]\nsource = oracle", ["source = 'oracle'", "'simulator', 'retailrocket', 'online_retail', 'files' or 'postgres'"]),
    ("[candidates]\nmine = lab:Trend", ["mine = 'lab:Trend'", "module:Class"]),
    ("no section = 1", ["settings.ini", "no section headers"]),
])
def test_a_bad_setting_is_named(tmp_path, text, says):
    message = refusal(tmp_path, text)
    assert all(s in message for s in says), message


def test_a_misspelt_variable_is_named(tmp_path):
    assert "RECO_LAKE_ROT" in refusal(tmp_path, "", {"RECO_LAKE_ROT": "x"})
    assert "RECO_LAK_ROOT" in refusal(tmp_path, "", {"RECO_LAK_ROOT": "x"})
    assert "RECO_ALS_FACTORS" in refusal(tmp_path, "", {"RECO_ALS_FACTORS": "many"})


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.ini"): load_settings(tmp_path / "nowhere.ini", {})


@pytest.mark.parametrize(("text", "environ", "says"), [
    ("[bundles]\nroot = s3://shop\n[lake]\nroot = s3://shop/lake", {}, ["[lake] root = 's3://shop/lake' lies in [bundles] root = 's3://shop'"]),
    ("[bundles]\nroot = s3://shop/", {"RECO_RUNS_DATASTORE": "s3://shop//metaflow"}, ["RECO_RUNS_DATASTORE: [runs] datastore"]),
    ("[bundles]\nroot = s3://shop/b", {"RECO_TRACKING_ARTIFACTS": "s3://shop/b"}, ["RECO_TRACKING_ARTIFACTS: [tracking] artifacts"]),
    ("[bundles]\nroot = data", {}, ["settings.ini: [lake] root = 'data/lake' lies in [bundles] root = 'data'"]),
    ("", {"RECO_BUNDLES_ROOT": "."}, ["RECO_BUNDLES_ROOT: [lake] root"]),
    ("[bundles]\nroot = data/../data/mlflow", {}, ["[tracking] folder = 'data/mlflow'"]),
])
def test_nothing_else_lies_among_the_bundles(tmp_path, text, environ, says):
    message = refusal(tmp_path, text, environ)
    assert all(s in message for s in says), message


def test_places_beside_each_other_or_above_are_fine(tmp_path):
    (tmp_path / "settings.ini").write_text("[lake]\nroot = s3://shop\n[runs]\ndatastore = s3://shop/bundles-of-runs\n[bundles]\nroot = s3://shop/bundles\n")
    assert load_settings(tmp_path / "settings.ini", {"RECO_TRACKING_ARTIFACTS": "s3://other/bundles/x"}).bundles.root == "s3://shop/bundles"


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "settings.ini").write_text("[lake]\nroot = here")
    settings = load_settings(tmp_path / "settings.ini", {})
    assert settings.path(settings.lake.root) == tmp_path / "here"
    assert settings.path("/elsewhere") == Path("/elsewhere")


def test_no_secret_is_kept_with_a_run():
    """Whatever is declared secret, now or later."""
    secrets = {(s, k): f"hunter-{s}-{k}" for s, f in Settings.model_fields.items() if s not in ("root", "candidates")
               for k, v in f.annotation.model_fields.items() if v.annotation is SecretStr}
    assert len(secrets) >= 7
    settings = load_settings(FILE, {f"RECO_{s}_{k}".upper(): v for (s, k), v in secrets.items()})
    kept = pickle.dumps(settings.without_secrets()) + settings.model_dump_json().encode() + repr(settings).encode()
    assert all(v.encode() in pickle.dumps(settings) and v.encode() not in kept for v in secrets.values())
