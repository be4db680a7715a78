"""The dictionary of the ranker's features, `docs/features.md`, from their definitions: `python docs/make_features.py`."""

import sys
from pathlib import Path

from reco.candidates.base import CandidateSource, score_meanings
from reco.features.assemble import ranker_features
from reco.features.items import ITEM_FEATURES
from reco.features.users import PAIR_FEATURES, REQUEST_FEATURES
from reco.moment import make_sources
from reco.ranking.surfaces import CONTEXT_FEATURES, QUOTAS, surface_features
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
GROUPS = {"Item": ITEM_FEATURES, "Request and shopper": REQUEST_FEATURES, "Shopper and item": PAIR_FEATURES, "Context and item": CONTEXT_FEATURES}


def of_surfaces(settings: Settings) -> dict[str, dict[str, str]]:
    """Surface → feature → meaning, in the order of the ranker's columns."""
    made = make_sources(settings)
    sources: dict[str, CandidateSource] = {name: source for name, (source, _) in made.items()}
    quotas = {name: quota for name, (_, quota) in made.items()}
    home = ranker_features({name: score_meanings(s) for name, s in sources.items()})
    return {"for_you": home} | {surface: surface_features(sources, quotas, surface) for surface in QUOTAS}


def group(feature: str) -> str:
    """The section of a feature."""
    for name, features in GROUPS.items():
        if feature in features: return name
    return "Sources, about the shopper's past" if feature.startswith("past_") else "Sources"


def page(settings: Settings) -> str:
    """The whole page."""
    by = of_surfaces(settings)
    meanings = {f: m for features in reversed(by.values()) for f, m in features.items()}
    names = list(dict.fromkeys(f for features in by.values() for f in features))
    lines = [ABOUT.format(counts=", ".join(f"{len(features)} for `{surface}`" for surface, features in by.items()))]
    for section in ("Sources", "Sources, about the shopper's past", *GROUPS):
        lines += [f"## {section}", "", f"| feature | meaning | {' | '.join(by)} |", "|---" * (2 + len(by)) + "|"]
        for f in (n for n in names if group(n) == section):
            lines.append(f"| `{f}` | {meanings[f].replace('|', chr(92) + '|')} | {' | '.join('✓' if f in features else '' for features in by.values())} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(Settings()))
    sys.stdout.write(f"{PAGE.name}: written\n")
