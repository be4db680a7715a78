"""The ranker's features by their definitions: meaning, group, unit, and the surfaces whose models see them."""
import re
from collections.abc import Mapping

import polars as pl

from reco.candidates.base import CandidateSource, score_meanings
from reco.features.assemble import ranker_features
from reco.features.items import ITEM_FEATURES
from reco.features.users import PAIR_FEATURES, REQUEST_FEATURES
from reco.moment import make_sources
from reco.ranking.surfaces import CONTEXT_FEATURES, QUOTAS, surface_features
from reco.settings import Settings

GROUPS = {"Item": ITEM_FEATURES, "Request and shopper": REQUEST_FEATURES, "Shopper and item": PAIR_FEATURES, "Context and item": CONTEXT_FEATURES}
SOURCES, PAST = "Sources", "Sources, about the shopper's past"

def of_surfaces(
    settings: Settings,
) -> dict[str, dict[str, str]]: # surface → feature → meaning, in the order of the ranker's columns
    "What the model of each surface sees."
    made = make_sources(settings)
    sources: dict[str, CandidateSource|type] = {name: source for name, (source, _) in made.items()}
    quotas = {name: quota for name, (_, quota) in made.items()}
    home = ranker_features({name: score_meanings(s) for name, s in sources.items()})
    return {"for_you": home} | {surface: surface_features(sources, quotas, surface) for surface in QUOTAS}

def group(
    feature: str,
) -> str:
    "The section of a feature."
    for name, features in GROUPS.items():
        if feature in features: return name
    return PAST if feature.startswith("past_") else SOURCES

# Unit, how a name ends or what it is, what a meaning says: the first that fits. Columns carry unit or window in their names.
NEVER = r"(?!)"
UNITS = [("place, 0 is best", r"_rank$", NEVER), ("logarithm", NEVER, r"\blog2?\b|logarithm|log-lift"),
         ("cosine", r"_cosine$|_to_last$|_together(_last)?$|^content_(last|recent|whole|closest)$", NEVER),
         ("hours", r"_h$", NEVER), ("days", r"_d$", NEVER), ("minutes", r"_minutes$", NEVER), ("hour of the day, UTC", r"^hour$", NEVER), ("0 (Monday) to 6", r"^weekday$", NEVER),
         ("share, 0 to 1", r"_share$|_first_buys$", r"\bshare\b|\bchance\b|probabilit"), ("per view", NEVER, r"per view"), ("currency of the shop", NEVER, r"\bprice\b"),
         ("votes", NEVER, r"\bvotes?\b"), ("likeness", NEVER, r"\blikeness\b"),
         ("strength, larger is more", r"_strength$|_dot$|_ridge$|_lent(_whole)?$|^two_steps_", NEVER), ("count", r"", NEVER)]

def unit(
    feature: str,
    meaning: str,
) -> str:
    "In what a feature is measured."
    return next(u for u, name, says in UNITS if re.search(name, feature) or re.search(says, meaning))

def dictionary(
    by: Mapping[str, Mapping[str, str]], # of `of_surfaces`
) -> pl.DataFrame: # feature, meaning, group, unit, then a column per surface; in the order of the columns
    "Every feature once."
    meanings = {f: m for features in reversed(list(by.values())) for f, m in features.items()}
    names = list(dict.fromkeys(f for features in by.values() for f in features))
    return pl.DataFrame([{"feature": f, "meaning": meanings[f], "group": group(f), "unit": unit(f, meanings[f])} | {s: f in features for s, features in by.items()} for f in names])
