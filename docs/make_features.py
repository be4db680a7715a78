"""The dictionary of the ranker's features, `docs/features.md`, from their definitions: `python docs/make_features.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # for `app`, which is no installed package

from app.parts.data.dictionary import GROUPS, PAST, SOURCES, dictionary, of_surfaces
from reco.settings import Settings

PAGE = Path(__file__).resolve().with_name("features.md")
ABOUT = """# Features of the ranker

What the model of each surface sees of every candidate, with the default settings: {counts}. Each is defined once in the code, with the
meaning that stands here. A source that is switched on brings its place and its scores along. In front of a context (`similar`: an item
page, `bought_together`: a basket) a source is asked with the context: what its meaning says of the shopper's items is then about the items
of the context. Some are asked with the shopper's past as well; those columns begin with `past_`.

Unknown values stay unknown (NaN): the trees have a branch for them. Everything is measured before the request's moment.

This page is made by `python docs/make_features.py`.
"""


def page(settings: Settings) -> str:
    """The whole page."""
    by = of_surfaces(settings)
    rows = dictionary(by).rows(named=True)
    lines = [ABOUT.format(counts=", ".join(f"{len(features)} for `{surface}`" for surface, features in by.items()))]
    for section in (SOURCES, PAST, *GROUPS):
        lines += [f"## {section}", "", f"| feature | meaning | {' | '.join(by)} |", "|---" * (2 + len(by)) + "|"]
        for r in (r for r in rows if r["group"] == section):
            lines.append(f"| `{r['feature']}` | {r['meaning'].replace('|', chr(92) + '|')} | {' | '.join('✓' if r[s] else '' for s in by)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(Settings()))
    sys.stdout.write(f"{PAGE.name}: written\n")
