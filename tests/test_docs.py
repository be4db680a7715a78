"""Pages that are made from the code are what it makes now."""

import runpy
from pathlib import Path

from reco.settings import Settings

DOCS = Path(__file__).parents[1] / "docs"


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
