"""The field's terms in words that need no field: measures, kinds of requests, sources, surfaces, gates."""
from typing import NamedTuple


class Measure(NamedTuple):
    "A column of the evaluation, for people."
    label: str
    means: str   # one sentence
    fmt: str     # of an axis (d3-format)
    column: str  # of a table (Streamlit's number format)

MEASURES = {
    "NDCG@10": Measure("Ranking quality (NDCG@10)", "How far up, in the first ten places, the items stand that the shopper then bought: 1 is all of them at the very top, "
                       "0 is none of them among the ten.", ".3~f", "%.3f"),
    "Recall@20": Measure("Found (Recall@20)", "Share of what the shopper then bought that is among the first twenty places.", ".0%", "percent"),
    "Recall@10": Measure("Found in ten (Recall@10)", "Share of what the shopper then bought that is among the first ten places.", ".0%", "percent"),
    "MAP@10": Measure("Precision (MAP@10)", "Of the places from the top down to each item that was bought, the share that was right, averaged: 1 is perfect.", ".3~f", "%.3f"),
    "coverage@10": Measure("Catalogue shown (coverage@10)", "Share of the catalogue that stands in somebody's first ten places: more means that more items get a chance.",
                           ".0%", "percent"),
    "Gini@10": Measure("Unevenness (Gini@10)", "How unevenly the first ten places are spread over the items: 0 is all alike, near 1 a few items get nearly everything.",
                       ".2~f", "%.3f")}

SLICES = {"all": "All requests", "home": "Arriving", "visit": "During a visit"}
OF_SLICES = ("**Arriving**: the list that a shopper sees when the hold-out begins, before doing anything. **During a visit**: a list asked for between two clicks, "
             "when the visit itself says what is wanted.")

PIPELINE = "The whole pipeline"
SOURCES = { # candidate source → what it proposes
    "pipeline": "all sources together, ordered by the ranker, then rules and variety", "popularity": "what most shoppers touch now, the same for everyone",
    "recent": "what the shopper touched lately", "covisit": "what others looked at in the same visits", "two_steps": "what is two steps away in those visits",
    "session_knn": "what visits like this one went on to", "item_item": "items that share their shoppers with the shopper's items",
    "als": "taste, learned from all shoppers at once (matrix factorisation)", "copurchase": "what is bought together", "content": "items with similar texts, new ones too",
    "buy_again": "what is due to be bought again", "trending": "what rises against its own usual level", "category_popularity": "what is popular in the shopper's categories"}

SURFACES = {"for_you": "Recommended for you", "similar": "Similar items", "bought_together": "Bought together"}

GATES = { # gate → what it asks
    "can be judged": "Whether the gates could ask the bundle at all.",
    "better than the champion": "Is it better, for sure, than what is served now, on the same requests?",
    "ranker no worse": "Is its ordering as good when both start from candidates of the same day? Fresher data must not hide a worse model.",
    "new users": "Does it serve shoppers with a short past no worse?", "cold items": "Does it bring new items to their buyers no worse?",
    "long tail": "Does it bring all but the most popular fifth of the items to their buyers no worse?",
    "better than popularity": "Is it better, for sure, than showing everyone what is popular?",
    "coverage": "Do its lists show enough of the catalogue?", "gini": "Are its lists spread evenly enough over the items?",
    "leak alarm": "Did the training see nothing that it must not see, such as the future?", "leak alarms": "Does the bundle say what the leak alarms of its training found?",
    "offline equals online": "Is what the model is given in the shop what it was judged with?",
    "answers in a fresh process": "Does it load and answer where nothing is left over from its training?",
    "latency p50": "Is half of all lists made fast enough? (milliseconds)", "latency p99": "Are 99 of 100 lists made fast enough? (milliseconds)"}

ALARMS = { # how the name of an alarm begins → what it asks
    "shuffled labels": "Taught with answers dealt at random, the model must find nothing: what it finds then has leaked.",
    "single feature": "No single column may know nearly everything: such a column usually holds the answer.",
    "learned from after the cutoff": "Changing what happens after the cutoff must not change a single byte of what is learned before it.",
    "rows at the cutoff with another future": "The model's input at a moment must be the same whatever happens later."}

def alarm(
    name: str, # of an alarm
) -> str:      # empty for one that is not known here
    "What a leak alarm asks."
    return next((asks for begins, asks in ALARMS.items() if name.startswith(begins)), "")
