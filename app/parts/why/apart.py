"""A list taken apart, in words and pictures: who proposed what, what the ranker added up, what the rules did."""
import math
import uuid
from dataclasses import dataclass, field

import altair as alt
import polars as pl

from app.client import Why
from app.parts.charts import BLUE, GREEN, ORANGE, PURPLE, RED, Layers


@dataclass(frozen=True)
class Asked:
    "Which list is to be taken apart."
    user_id: str
    surface: str = "for_you"
    context: tuple[str, ...] = ()  # the item of the page, or the cart
    request_id: str = ""           # of a list that was shown: exploration is drawn as it was then
    item: str = ""                 # to begin with
    k: int = 12                    # how long the list may be
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8], compare=False) # of the widgets, which begin anew with it

# ---- words --------------------------------------------------------------------------------------------------------

SOURCES = {"recent": "what they touched lately", "popularity": "popular now", "covisit": "looked at in the same visits", "two_steps": "two steps away in visits",
           "session_knn": "visits like theirs", "item_item": "shoppers of the same items", "als": "learned tastes (ALS)", "copurchase": "bought together", "content": "similar texts",
           "buy_again": "time to buy again", "trending": "trending", "category_popularity": "popular in a category"}
RULES = {"filtered": "the request's filter", "banned": "banned by the shop", "out_of_stock": "sold out", "recently_bought": "bought not long ago",
         "category_cap": "enough of its category", "brand_cap": "enough of its brand"}
NOTES = {"category_cap_raised": "the limit per category was raised so that the list could be filled", "brand_cap_raised": "the limit per brand was raised so that the list could be filled",
         "boosts_held_back": "the shop's boosts were held back: in full they would have cost too much relevance", "pins_not_shown": "an item pinned by the shop could not be shown"}
MOVED = {"": "its score", "pinned": "pinned by the shop", "boosted": "boosted by the shop", "varied": "variety", "explored": "exploration"}
COLOURS = {MOVED[""]: BLUE, MOVED["varied"]: GREEN, MOVED["boosted"]: ORANGE, MOVED["pinned"]: PURPLE, MOVED["explored"]: "#E69F00", "taken out by a rule": RED}
STAGES = {"store": "ask the online store", "past": "read the past", "candidates": "collect candidates", "features": "describe them", "ranking": "rank", "reranking": "rules and re-ranking", "response": "write the answer"}

def source_name(
    source: str,
) -> str:
    "A candidate source as people call it."
    known = source.removeprefix("past_")
    return SOURCES.get(known, known) + (", by their past" if known != source else "")

def ordinal(n: int) -> str: return f"{n}{'th' if 10 <= n % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"

def listing(parts: list[str]) -> str: return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]

def proposers(
    sources: dict[str, int], # source → place, 1 is best; best first
) -> str:
    return listing([f"{source_name(s)} ({ordinal(n)})" for s, n in sources.items()])

def signed(x: float) -> str: return f"{x:+.2f}".replace("-", "−")

def chance(log_odds: float) -> float: return 1/(1 + math.exp(-log_odds))

def verdict(
    item_id: str,
    candidates: list[dict],  # of an anatomy
    about: dict,             # of an anatomy
    context: tuple[str, ...], # of the list
    shown: int,              # items on the list
) -> str:
    "Why an item is on the list, or is not."
    if item_id in context: return "It is what the list is about, so it cannot be on it."
    c = next((c for c in candidates if c["item_id"] == item_id), None)
    if c is None and about["count"] > len(candidates):
        return f"It is not among the {len(candidates)} best of {about['count']:,} candidates: no source proposed it, or the ranker placed it behind all of those."
    if c is None: return f"No source proposed it: it is not among the {about['count']:,} candidates that this list was chosen from."
    by = f"Proposed by {proposers(c['sources'])}." if c["sources"] else "No source proposed it."
    if c["slot"] is not None: return f"It is on the list, in slot {c['slot']}. {by}" + (f" By score alone it is {ordinal(c['place'])} of {about['count']:,}." if c["place"] else "")
    if c["fate"] in RULES: return f"{by} Its score would have given it place {c['place']} of {about['count']:,}, but a rule took it out: {RULES[c['fate']]}."
    return f"{by} The ranker gave it place {c['place']} of {about['count']:,} with a chance of {c['score']:.1%}; the list has {shown} slots, which went to others."

def meaning_of(
    contribution: dict, # of a `Why`
) -> str:
    "What a column says, with its value."
    said, value, name = contribution["meaning"], contribution["value"], contribution["feature"].replace("_", " ")
    if "the same" in said: said = f"{name} ({said})" # as the column before it, which is not shown here
    return f"{said[:1].upper()}{said[1:]}: {'unknown' if value is None else f'{value:,.3g}' if abs(value) < 1_000 else f'{value:,.0f}'}"

# ---- charts -------------------------------------------------------------------------------------------------------

STEP = 42 # px of a row of the waterfall: a line of text and a bar

def steps_of(
    why: Why,
    strongest: int = 8, # contributions with a row of their own
) -> pl.DataFrame: # row, text, low, high, x (in log-odds), kind
    "The rows of a waterfall from an average candidate to this one."
    assert why.base is not None and why.log_odds is not None
    rows, at = [(0, "An average candidate", 0.0, why.base, why.base, "where it begins and ends")], why.base
    own, other = why.contributions[:strongest], why.contributions[strongest:]
    parts = [(meaning_of(c), c["log_odds"]) for c in own] + [("All else together", why.rest + sum(c["log_odds"] for c in other))]
    for n, (text, x) in enumerate(parts, 1):
        rows.append((n, text, at, at + x, x, "raises the chance" if x >= 0 else "lowers the chance"))
        at += x
    rows.append((len(rows), "This item", 0.0, why.log_odds, why.log_odds, "where it begins and ends"))
    return pl.DataFrame(rows, schema=["row", "text", "low", "high", "x", "kind"], orient="row")

def waterfall(
    why: Why, # with log-odds
) -> Layers:
    "From an average candidate to this one, column by column. The text stands above each bar, so that a phone has room for it."
    steps = steps_of(why)
    y = alt.Y("row:O", axis=None, scale=alt.Scale(paddingInner=0, paddingOuter=0))
    colour = alt.Color("kind:N", title=None, legend=alt.Legend(orient="bottom", columns=1), scale=alt.Scale(domain=["raises the chance", "lowers the chance", "where it begins and ends"], range=[GREEN, ORANGE, BLUE]))
    tip = [alt.Tooltip("text:N", title="what"), alt.Tooltip("x:Q", title="log-odds", format="+.3f")]
    base = alt.Chart(steps).transform_calculate(far="max(datum.low, datum.high)", label="(datum.x < 0 ? '−' : '+') + format(abs(datum.x), '.2f')")
    ends = [*steps["low"], *steps["high"], 0.0]
    low, high = min(ends), max(ends)
    x = alt.X("low:Q", title="log-odds (0 is fifty-fifty)", scale=alt.Scale(domain=[low - 0.02*(high - low), high + 0.16*(high - low)], nice=False), axis=alt.Axis(tickCount=8))
    bar = base.mark_bar(size=13, yOffset=9, cornerRadius=2).encode(y=y, x=x, x2="high:Q", color=colour, tooltip=tip)
    text = base.mark_text(align="left", baseline="middle", dy=-8, fontSize=12, limit=alt.ExprRef("width")).encode(y=y, x=alt.value(0), text="text:N", tooltip=tip)
    value = base.mark_text(align="left", baseline="middle", dx=5, dy=9, fontSize=12, fontWeight="bold").encode(y=y, x="far:Q", text="label:N")
    zero = alt.Chart(pl.DataFrame({"x": [0.0]})).mark_rule(strokeDash=[4, 4], opacity=0.6).encode(x="x:Q")
    return alt.layer(zero, bar, text, value).properties(height=alt.Step(STEP))

def proposed(
    candidates: list[dict],
    told: dict[str, int], # source → candidates, of all
) -> pl.DataFrame: # name, part, x: as `charts.bars` takes it; sources that proposed nothing are left out
    "How many candidates came of each source, and how many of those are shown."
    shown = {s: sum(s in c["sources"] for c in candidates if c["slot"] is not None) for s in told}
    rows = [(source_name(s), part, x) for s, n in told.items() if n for part, x in (("on the list", shown[s]), ("proposed only", n - shown[s]))]
    return pl.DataFrame(rows, schema={"name": pl.String, "part": pl.String, "x": pl.Int64}, orient="row")

def slopes(
    candidates: list[dict],
) -> pl.DataFrame: # item_id, side (by score, on the list), at, what; two rows per item, one for what a rule took out
    "Places by score beside slots."
    listed = [c for c in candidates if c["slot"] is not None and c["place"]]
    last = max((c["place"] for c in listed), default=0)
    out = [c for c in candidates if c["fate"] in RULES and c["place"] and c["place"] < last]
    rows = [(c["item_id"], side, at, MOVED[c["moved"]]) for c in listed for side, at in (("place by score", c["place"]), ("slot on the list", c["slot"]))]
    rows += [(c["item_id"], "place by score", c["place"], "taken out by a rule") for c in out]
    return pl.DataFrame(rows, schema={"item_id": pl.String, "side": pl.String, "at": pl.Int64, "what": pl.String}, orient="row")

def bump(
    frame: pl.DataFrame, # of `slopes`, with `title`
) -> Layers:
    "Lines from the place by score to the slot."
    known = [w for w in COLOURS if w in set(frame["what"])]
    most = max(frame["at"])
    far = most > 30 # then the first places would lie on each other, were the scale not a logarithm
    scale = alt.Scale(type="log" if far else "linear", domain=[most*1.15, 0.87] if far else [most + 0.5, 0.5], nice=False, zero=False)
    ticks = [t for t in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if t <= most] if far else sorted({1, *frame["at"]})
    base = alt.Chart(frame).encode(
        x=alt.X("side:N", title=None, sort=["place by score", "slot on the list"], axis=alt.Axis(orient="top", labelAngle=0), scale=alt.Scale(padding=0.3)),
        y=alt.Y("at:Q", title="place (1 is best)", scale=scale, axis=alt.Axis(format="d", grid=False, values=ticks)),
        color=alt.Color("what:N", title="owes its slot to", scale=alt.Scale(domain=known, range=[COLOURS[w] for w in known]), legend=alt.Legend(orient="bottom", columns=2)),
        detail="item_id:N", tooltip=[alt.Tooltip("title:N", title="item"), alt.Tooltip("at:Q", title="place"), alt.Tooltip("what:N", title="owes its slot to")])
    return alt.layer(base.mark_line(strokeWidth=2), base.mark_point(filled=True, size=70, opacity=1)).properties(height=480 if far else max(200, 22*most))
