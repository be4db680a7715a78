"""The slices in which a list's quality is reported: by length of the shopper's history, by age of the item, by its popularity."""

import numpy as np

from reco.data.histories import EventLog
from reco.ranking.examples import Outcomes

DAY = 86_400_000
LENGTHS = {"short histories": (0, 3), "histories of 4 to 20": (4, 20), "histories over 20": (21, np.inf)}  # events before the request
AGES = {"cold items": (0, 7), "items of 8 to 30 days": (7, 30), "items over 30 days": (30, np.inf)}  # days since the item's first event
HEAD = 0.2  # of the items that were touched: the fifth that the product's fairness calls the head


def part(truth: Outcomes, keep: np.ndarray) -> Outcomes:
    """Some of the outcomes, of the same requests."""
    return Outcomes(truth.request[keep], truth.item[keep], truth.grade[keep], truth.n)


def by_length(truth: Outcomes, lengths: np.ndarray) -> dict[str, Outcomes]:
    """What is relevant to shoppers with so many events before their request (`lengths` int64 [n])."""
    own = lengths[truth.request]
    return {name: part(truth, (own >= low) & (own <= high)) for name, (low, high) in LENGTHS.items()}


def by_age(truth: Outcomes, log: EventLog, asof: int) -> dict[str, Outcomes]:
    """Relevant items by the days between their first event and `asof` (ms); those first seen later are in none."""
    past, first = log.before(asof), np.full(log.n_items, np.iinfo(np.int64).max)
    np.minimum.at(first, past.item, past.ts)
    seen, days = first[truth.item] < asof, (asof - first[truth.item].astype(np.float64)) / DAY
    return {name: part(truth, seen & (days <= high) & ((days > low) | (low == 0))) for name, (low, high) in AGES.items()}


def by_popularity(truth: Outcomes, log: EventLog, asof: int, days: float = 30) -> dict[str, Outcomes]:
    """Relevant items by their shoppers in the last days before `asof` (ms): the head is the first fifth, ties to the lower index."""
    past = log.before(asof)
    known = np.bincount(past.item, minlength=log.n_items) > 0
    recent = past.where(past.ts >= asof - days * DAY)
    pair = np.unique(recent.user.astype(np.int64) * log.n_items + recent.item)
    shoppers = np.bincount(pair % log.n_items, minlength=log.n_items)
    head = np.zeros(log.n_items, bool)
    head[np.lexsort((np.arange(log.n_items), -shoppers))[: round(HEAD * known.sum())]] = True
    return {"head items": part(truth, head[truth.item]), "tail items": part(truth, (known & ~head)[truth.item])}
