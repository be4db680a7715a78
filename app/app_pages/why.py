"""One list taken apart: what the endpoint knew, who proposed what, how the ranker weighed it, and what the rules and re-ranking did."""
from html import escape

import polars as pl
import streamlit as st

from app.client import Anatomy, NotAllowed, Scored, Why
from app.parts.charts import BLUE, bars, drawn
from app.parts.page import address, described, endpoint, lead, nothing_yet, read, shown
from app.parts.shop.storefront import capital, drawing, named
from app.parts.shop.visit import DOING, Visit
from app.parts.why.apart import (
    MOVED,
    NOTES,
    RULES,
    STAGES,
    Asked,
    bump,
    chance,
    ordinal,
    proposed,
    signed,
    slopes,
    source_name,
    verdict,
    waterfall,
)
from app.parts.wording import plain
from reco.data.lake import LakeError

SHOPPERS = 200
GREY = "#8b909a" # beside what matters
LISTS = {"for_you": "Recommended for You", "similar": "Similar Items", "bought_together": "Frequently Bought Together"}
STYLE = """<style>
.st-key-why-figures {display:grid !important; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px} .st-key-why-figures > div {width:auto !important; min-width:0}
.why-item {display:flex; gap:16px; align-items:flex-start; margin-bottom:4px}
.why-item img {width:96px; aspect-ratio:5/4; object-fit:cover; border-radius:10px; flex:none}
.why-by {display:flex; flex-wrap:wrap; gap:6px; margin:6px 0 0; padding:0 !important; list-style:none}
.why-by li {margin:0; padding:1px 10px; border-radius:99px; font-size:.82rem; border:1px solid color-mix(in srgb,currentColor 30%,transparent)}
.why-item b {font-size:1.1rem; overflow-wrap:anywhere} .why-item span {opacity:.85; overflow-wrap:anywhere}
</style>"""

# ---- what is asked ------------------------------------------------------------------------------------------------

def most_active(table: pl.LazyFrame, n: int) -> pl.LazyFrame: # user_id, len
    return table.group_by("user_id").len().sort(["len", "user_id"], descending=[True, False]).head(n)

def touched(table: pl.LazyFrame, user_id: str) -> pl.LazyFrame: # item_id, the latest first
    return table.filter(pl.col("user_id") == user_id).group_by("item_id").agg(pl.col("ts").max()).sort(["ts", "item_id"], descending=[True, False]).head(50).select("item_id")

def shoppers() -> list[str]: # the most active first; none without a lake
    try: return read("interactions", most_active, SHOPPERS)["user_id"].to_list()
    except LakeError: return []

def items_of(user_id: str) -> list[str]: # what the shopper touched, the latest first; none without a lake
    try: return read("interactions", touched, user_id)["item_id"].to_list()
    except LakeError: return []

def titles_of(ids: list[str]) -> dict[str, str]: # item_id → what it is called
    return dict(zip(ids, map(named, described(ids).to_dicts()), strict=True))

def before() -> Asked:
    "What the Shop page wants taken apart, or the list of whoever shops there."
    visit: Visit|None = st.session_state.get("visit")
    asked: Asked|None = st.session_state.get("why")
    if asked is None or (visit and visit.user_id != asked.user_id): st.session_state["why"] = asked = Asked(visit.user_id if visit else "")
    return asked

def pick() -> Asked|None: # None: something is missing, and the page says what
    "Whose list, and which."
    asked = before()
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        known = list(dict.fromkeys(filter(None, [asked.user_id, *shoppers()])))
        user_id = st.selectbox("Shopper", known, 0 if known else None, key=f"who-{asked.name}", accept_new_options=True, width=280, placeholder="Type any id",
                               help="The one of the Shop page first, then the most active; any other id can be typed.")
        surface = st.segmented_control("List", list(LISTS), default=asked.surface, required=True, format_func=LISTS.__getitem__, key=f"surface-{asked.name}", wrap=True)
    if not user_id or not user_id.strip():
        if known: st.info("Choose a shopper, or type any id: a list is taken apart for somebody. A visit without an id has nobody to ask for.", icon=":material/info:")
        else: nothing_yet("The lake has no events yet, so there is no shopper to choose. You can type any id.", "`make demo` simulates a shop and trains on it", "with data of your own: `make ingest`, `make train`, `make serve`")
        return None
    context: list[str] = []
    if surface != "for_you":
        mine = list(asked.context) if surface == asked.surface else []
        names = titles_of(options := list(dict.fromkeys([*mine, *items_of(user_id)])))
        context = st.multiselect("Item of the page" if surface == "similar" else "What is in the cart", options, mine or options[:1], format_func=lambda i: names.get(i, i), key=f"about-{asked.name}-{surface}-{user_id}",
                                 max_selections=1 if surface == "similar" else 20, accept_new_options=True, help="What the shopper touched is listed; any other item's id can be typed.")
        if not context:
            st.info("Choose an item: this list is made around one.", icon=":material/info:")
            return None
    same = (user_id, surface, tuple(context)) == (asked.user_id, asked.surface, asked.context)
    return asked if same else Asked(user_id, surface, tuple(context), name=asked.name)

@st.cache_data(ttl=60, max_entries=50, show_spinner="Taking the list apart …")
def taken_apart(address: str, user_id: str, surface: str, context: tuple[str, ...], request_id: str, k: int, moment: int) -> Anatomy: # raises `EndpointError`
    return endpoint().why(user_id, k, surface, context, request_id=request_id)

# ---- the list and one item of it ----------------------------------------------------------------------------------

def figures(a: Anatomy) -> None:
    "The funnel in four numbers."
    out, ms = sum(a.about["dropped"].get(r, 0) for r in RULES), 1000*sum(a.about["seconds"].values())
    with st.container(key="why-figures"):
        for label, value, about in (("Candidates", f"{a.about['count']:,}", "Items that any source proposed, each once"), ("Taken out by rules", f"{out:,}", "Sold out, banned, bought not long ago, or too much of the same"),
                                    ("Shown", f"{len(a.items)}", "Items of the list"), ("Time", f"{ms:,.0f} ms", "All stages together; working out the reasons is not counted")):
            st.metric(label, value, help=about, border=True)
    notes = [f"experiment {a.about['variant'].replace('=', ': ')}" if a.about["variant"] else "", "nothing is known of this shopper or page, so it is what is popular" if a.about["fallback"] else "",
             f"made without {', '.join(a.about['without'])}, which did not answer in time" if a.about["without"] else "", f"model {a.about['bundle_id']}"]
    st.html(f'<div style="font-size:.85rem; opacity:.8">{escape(capital(" · ".join(n for n in notes if n)))}</div>')

def why_of(x: Scored) -> Why: # a list that was taken apart has one for each item
    assert x.why is not None, x.item_id
    return x.why

def the_list(a: Anatomy, titles: dict[str, str]) -> None:
    "Every item with its score, its place by score, and what brought it up."
    st.subheader("The list", anchor=False)
    by = {c["item_id"]: c for c in a.candidates}
    table = pl.DataFrame([{"Slot": n, "Item": titles[x.item_id], "Chance": x.score, "Place by score": by[x.item_id]["place"], "Owes its slot to": MOVED.get(by[x.item_id]["moved"], by[x.item_id]["moved"]),
                           "Because": capital(why_of(x).reason)} for n, x in enumerate(a.items, 1)], infer_schema_length=None)
    st.dataframe(table, hide_index=True, width="stretch", height="content", alt="The list with scores, places and reasons", column_config={
        "Slot": st.column_config.NumberColumn(width="small", help="Place on the list, 1 is the top"),
        "Chance": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=max([x.score for x in a.items], default=1) or 1, help="That the shopper touches the item soon, as the ranker puts it"),
        "Place by score": st.column_config.NumberColumn(help="Where the item would stand if only its score counted"),
        "Owes its slot to": st.column_config.TextColumn(help="Pins and boosts are the shop's wishes; variety keeps a list from being all the same; exploration tries out new items")})

def one_item(a: Anatomy, titles: dict[str, str], first: str, name: str) -> None:
    "The waterfall of an item, and who proposed it."
    st.subheader("One item in full", anchor=False)
    ids = [x.item_id for x in a.items]
    number = {i: n for n, i in enumerate(ids, 1)}
    chosen = st.selectbox("Item of the list", ids, ids.index(first) if first in ids else 0, format_func=lambda i: f"{number[i]} · {titles[i]}", key=f"item-{name}-{'-'.join(ids)[:80]}")
    if first and first not in ids:
        st.caption(f"The list is made anew each time, and {plain(titles.get(first) or titles_of([first])[first])} is not on it now. “Why is an item not on the list?” below says what became of it.")
    x: Scored = a.items[number[chosen] - 1]
    [item], why = described([chosen]).to_dicts(), why_of(x)
    by = "".join(f"<li>{escape(source_name(s))} · <b style='font-size:inherit'>{ordinal(n)}</b></li>" for s, n in why.sources.items())
    st.html(f'<div class="why-item"><img src="{drawing(item)}" alt=""><div><b>{escape(named(item))}</b><br><span>{escape(capital(why.reason))}.</span></div></div>'
            + (f'Proposed by, with the place that each gave it:<ul class="why-by">{by}</ul>' if by else "No source proposed it: the shop pinned it, or it fills the list up."))
    if why.log_odds is None or why.base is None:
        st.info("No ranker answered here: the sources' own order made the list, so there is nothing to add up.", icon=":material/info:")
        return
    top = why.contributions[0] if why.contributions else None
    st.markdown(f"**The ranker gives it a chance of {x.score:.1%}, {x.score/chance(why.base):,.1f} times that of an average candidate ({chance(why.base):.1%}).**")
    st.caption("Log-odds are a chance on a scale on which influences add up: 0 is fifty-fifty, +0.7 doubles the odds, −0.7 halves them. "
               f"This item ends at {signed(why.log_odds)}, which is a chance of {chance(why.log_odds):.1%}. The parts are SHAP values: each column's fair share of the difference.")
    drawn(waterfall(why), f"Waterfall of log-odds from {why.base:.2f} for an average candidate to {why.log_odds:.2f} for this item"
          + (f"; the strongest part is {top['log_odds']:+.2f}: {top['meaning']}" if top else ""))

# ---- how it came about --------------------------------------------------------------------------------------------

def knew(a: Anatomy, user_id: str) -> None:
    "The past that the endpoint had."
    st.subheader("What the endpoint knew", anchor=False)
    if not a.about["past"]:
        st.write("Nothing: this shopper has no past, so what is popular had to do.")
        return
    past = pl.DataFrame(a.about["past"], schema={"item_id": pl.String, "event": pl.String, "ts": pl.Int64})
    st.caption(f"The latest {past.height} events, newest first.")
    table = past.join(described(past["item_id"].unique().to_list()).select("item_id", "title"), on="item_id", how="left", maintain_order="left").select(
        pl.coalesce("title", "Item " + pl.col("item_id")).alias("Item"), pl.col("event").replace(DOING).alias("Did"), pl.col("ts").cast(pl.Datetime("ms", "UTC")).alias("Time (UTC)"))
    st.dataframe(table, hide_index=True, height=320 if table.height > 8 else "auto", width="stretch", alt="Past events of the shopper", column_config={"Time (UTC)": st.column_config.DatetimeColumn(format="D MMM, HH:mm", timezone="UTC")})

def sources(a: Anatomy) -> None:
    "Who proposed how much, and how much of it is shown."
    st.subheader("Who proposed what", help="Sources look for candidates, each in its own way; several may propose the same item.", anchor=False)
    frame = proposed(a.candidates, a.about["proposed"])
    if frame.is_empty():
        st.write("No source proposed anything: the list was filled up with what is in the shop.")
        return
    there = frame.filter(pl.col("part") == "on the list").sort(["x", "name"], descending=[True, False])
    best, most = there.row(0, named=True), max(a.about["proposed"], key=lambda s: a.about["proposed"][s])
    st.markdown(f"**“{capital(best['name'])}” knew {best['x']} of the {len(a.items)} items shown; “{source_name(most)}” proposed most, {a.about['proposed'][most]}.**")
    order = frame.group_by("name").agg(pl.col("x").sum()).sort(["x", "name"], descending=[True, False])["name"].to_list()
    drawn(bars(frame, "candidates", "d", order, [BLUE, GREY]), "Candidates by source, those on the list beside those that were only proposed: " + "; ".join(f"{r['name']} {r['x']} on the list" for r in there.to_dicts()))
    silent = [source_name(s) for s, n in a.about["proposed"].items() if not n]
    if silent: st.caption(f"Had nothing to propose: {', '.join(silent)}.")

def rules(a: Anatomy, titles: dict[str, str]) -> None:
    "What was taken out, and where it would have stood."
    st.subheader("What the rules took out", anchor=False)
    out = [c for c in a.candidates if c["fate"] in RULES]
    for note in (NOTES[n] for n, times in a.about["dropped"].items() if times and n in NOTES): st.caption(f"Also: {note}.")
    if not out:
        st.write("Nothing: every candidate may be shown.")
        return
    slots = len(a.items)
    lost = sum(c["place"] is not None and c["place"] <= slots for c in out)
    st.markdown(f"**{len(out)} candidates may not be shown; {lost} of them would have been among the first {slots}.**")
    table = pl.DataFrame([{"Would be at": c["place"], "Item": titles[c["item_id"]], "Rule": RULES[c["fate"]], "Chance": c["score"]} for c in out], infer_schema_length=None).sort("Would be at")
    st.dataframe(table, hide_index=True, height=320 if table.height > 8 else "auto", width="stretch", alt="Candidates that rules took out", column_config={
        "Would be at": st.column_config.NumberColumn(width="small", help="Place by score"), "Chance": st.column_config.NumberColumn(format="percent")})

def moves(a: Anatomy, titles: dict[str, str]) -> None:
    "Place by score beside slot."
    st.subheader("From the ranker's order to the list", help="Behind the ranker, rules take items out, the list is made more varied, and the shop's pins and boosts are applied.", anchor=False)
    frame = slopes(a.candidates)
    raised = frame.filter(~pl.col("what").is_in([MOVED[""], "taken out by a rule"]))["item_id"].n_unique()
    gone = frame.filter(pl.col("what") == "taken out by a rule").height
    last = max(frame.filter((pl.col("what") == MOVED[""]) & (pl.col("side") == "place by score"))["at"], default=0)
    if not raised and not gone:
        st.write("Nothing was moved: the list is in the ranker's own order.")
        return
    said = f"{raised} of {len(a.items)} items owe their slot to something else than their score." if raised else "Every item owes its slot to its score."
    room = f" What rules took out made room for items down to place {last}." if gone and not raised and last and last > len(a.items) else ""
    st.markdown(f"**{said}{room}**")
    drawn(bump(frame.with_columns(title=pl.col("item_id").replace_strict(titles, return_dtype=pl.String))), "Lines from each item's place by score to its slot on the list")

def timing(a: Anatomy) -> None:
    "Where the time went."
    st.subheader("Where the time went", anchor=False)
    frame = pl.DataFrame([(STAGES.get(s, s), 1000*t) for s, t in a.about["seconds"].items()], schema={"name": pl.String, "x": pl.Float64}, orient="row")
    if frame.is_empty():
        st.write("The endpoint did not say.")
        return
    slowest = frame.sort("x").row(-1, named=True)
    st.markdown(f"**Most of it, {slowest['x']:.1f} of {frame['x'].sum():.1f} ms, went to “{slowest['name']}”.**")
    drawn(bars(frame, "time (ms)", ".3~g", None), "Time by stage in ms: " + "; ".join(f"{r['name']} {r['x']:.1f}" for r in frame.to_dicts()))

def not_there(a: Anatomy, asked: Asked) -> None:
    "Why an item is not on the list."
    st.subheader("Why is an item not on the list?", anchor=False)
    ids = [c["item_id"] for c in a.candidates if c["slot"] is None]
    options = list(dict.fromkeys([*([asked.item] if asked.item in ids else []), *ids]))
    names = titles_of(options)
    item = st.selectbox("Item", options, 0 if options else None, format_func=lambda i: f"{names.get(i, i)} ({i})", key=f"absent-{asked}", accept_new_options=True, placeholder="Choose a candidate, or type any item's id")
    if not item: return
    item = item.strip()
    unknown = item not in names and described([item])["title"][0] is None
    st.markdown(verdict(item, a.candidates, a.about, asked.context, len(a.items)) + (" The catalogue has no such id." if unknown else ""))

# ---- the page -----------------------------------------------------------------------------------------------------

def page() -> None:
    "The page, top to bottom."
    lead("Every list can be taken apart: what was known of the shopper, who proposed each item, how the ranker weighed it, and what the rules did.")
    st.html(STYLE)
    asked = pick()
    if asked is None: return
    visit: Visit|None = st.session_state.get("visit")
    try: a = taken_apart(address(), asked.user_id, asked.surface, asked.context, asked.request_id, asked.k, visit.moment if visit else 0)
    except NotAllowed:
        st.error("Looking behind a list needs an admin's key of the endpoint. Set `RECO_APP_KEY` to one and start the app again.", icon=":material/key:")
        return
    titles = titles_of(list(dict.fromkeys([c["item_id"] for c in a.candidates] + [x.item_id for x in a.items])))
    figures(a)
    if not a.items:
        st.info("The endpoint had nothing to show for this.", icon=":material/info:")
        return
    the_list(a, titles)
    one_item(a, titles, asked.item, asked.name)
    for left, right in ((lambda: knew(a, asked.user_id), lambda: sources(a)), (lambda: rules(a, titles), lambda: moves(a, titles)), (lambda: not_there(a, asked), lambda: timing(a))):
        one, other = st.columns(2, gap="large")
        with one: left()
        with other: right()

if __name__ == "__main__": shown("Why this list?", page)
