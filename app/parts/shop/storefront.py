"""How the shop looks: product cards with what changed on them, shelves of cards, the sign of an item's page."""
from collections.abc import Callable
from html import escape

import streamlit as st

from app.client import Recommended, Scored
from app.parts.page import described
from app.parts.shop.pictures import picture
from app.parts.shop.visit import Look, Visit
from app.parts.wording import plain

TITLE_SHOWN = 90 # characters of a title on a card

# `currentColor` and translucency: one sheet for the light and the dark theme. The grid makes as many columns as fit, two on a phone. The title is a
# button, and what lies over the card is that button's: mouse, keyboard and screen reader have one thing to press.
STYLE = """<style>
[class*="st-key-shelf-"] {display:grid !important; grid-template-columns:repeat(auto-fill,minmax(min(172px,calc(50% - 6px)),1fr)); gap:12px; align-items:stretch}
[class*="st-key-shelf-"] > div {width:auto !important; min-width:0; height:100%}
[class*="st-key-card-"] {position:relative; height:100%; gap:2px !important; padding-bottom:12px; border-radius:12px; overflow:hidden;
  border:1px solid color-mix(in srgb,currentColor 18%,transparent); transition:border-color .15s, box-shadow .15s}
[class*="st-key-card-"]:hover {border-color:color-mix(in srgb,currentColor 45%,transparent); box-shadow:0 2px 14px color-mix(in srgb,currentColor 14%,transparent)}
[class*="st-key-card-"]:focus-within:has(:focus-visible) {outline:3px solid #2a7de1; outline-offset:2px}
[class*="st-key-card-"] > div {width:100% !important}
[class*="st-key-card-"] > div:last-child {margin-top:auto}
[class*="st-key-open-"] {position:static !important} [class*="st-key-card-"] .stButton {padding:0 12px}
[class*="st-key-card-"] button {position:static; text-align:left; justify-content:flex-start; padding:0; min-height:0; width:100%; outline:none; box-shadow:none !important}
[class*="st-key-card-"] button > div, [class*="st-key-card-"] button > div > span {width:100%; justify-content:flex-start; text-align:left}
[class*="st-key-card-"] button::after {content:""; position:absolute; inset:0}
[class*="st-key-card-"] button p {font-weight:600; line-height:1.3; overflow-wrap:anywhere; white-space:normal; text-wrap:pretty; text-align:left}
.shop-photo {position:relative; line-height:0}
.shop-photo img {width:100%; aspect-ratio:5/4; object-fit:cover; display:block}
.shop-photo.out img {filter:grayscale(1); opacity:.55}
.shop-marks {position:absolute; top:8px; left:8px; display:flex; gap:6px; line-height:1.2}
.shop-mark {padding:2px 9px; border-radius:99px; font-size:.78rem; font-weight:700; color:#fff; background:#1d6f42}
.shop-mark.up {background:#0b5cad} .shop-mark.off {background:#b3261e} .shop-mark.gone {background:#444}
.shop-category {padding:8px 12px 0; font-size:.78rem; opacity:.8; overflow-wrap:anywhere; line-height:1.25}
.shop-foot {padding:4px 12px 0; line-height:1.35}
.shop-price {display:flex; flex-wrap:wrap; gap:2px 8px; align-items:baseline; font-weight:700}
.shop-price s {font-weight:400; opacity:.75; font-size:.85rem}
.shop-stock {font-size:.78rem; font-weight:400; opacity:.8; margin-left:auto}
.shop-reason {font-size:.8rem; opacity:.85; margin-top:5px; padding-top:5px; border-top:1px dashed color-mix(in srgb,currentColor 22%,transparent); overflow-wrap:anywhere}
.shop-note {font-size:.82rem; opacity:.8; overflow-wrap:anywhere}
.shop-changes {margin:-4px 0 0; overflow-wrap:anywhere}
.shop-big img {width:100%; max-width:440px; aspect-ratio:5/4; object-fit:cover; border-radius:14px; display:block}
.shop-big h2 {margin:0 0 6px; padding:0; font-size:1.75rem; overflow-wrap:anywhere}
.shop-big .shop-price {font-size:1.35rem; margin:8px 0} .shop-big .shop-stock {margin-left:4px; font-size:.9rem}
.shop-cart {list-style:none; margin:0; padding:0 !important}
.shop-cart li {display:flex; gap:10px; align-items:center; margin:0 0 8px; line-height:1.25}
.shop-cart img {width:52px; aspect-ratio:5/4; object-fit:cover; border-radius:6px; flex:none}
.shop-cart span {flex:1; overflow-wrap:anywhere}
</style>"""

def named(
    item: dict, # a row of `described`
) -> str:
    "What an item is called."
    return item["title"] or f"Item {item['item_id']}"

def paid(
    item: dict, # a row of `described`
) -> float|None:
    "The price after its discount."
    return None if item["price"] is None else round(item["price"]*(1 - (item["discount"] or 0)), 2)

def in_stock(item: dict) -> bool: return item["available"] is not False

def drawing(item: dict) -> str: # for `src`
    return picture(item["item_id"], item["title"] or "", item["category"] or "")

def price_line(
    item: dict,
) -> str: # HTML
    "What it costs, and whether there is any."
    price, off = paid(item), item["discount"] or 0
    before = f'<s aria-label="before, {item["price"]:,.2f}">{item["price"]:,.2f}</s>' if off and item["price"] is not None else ""
    stock = "" if item["title"] is None and item["price"] is None else "in stock" if in_stock(item) else "sold out"
    return f'<div class="shop-price"><span>{"" if price is None else f"{price:,.2f}"}</span>{before}<span class="shop-stock">{stock}</span></div>'

def marks(
    item: dict,
    moved: dict[str, int|None], # of `Look.moves`
) -> str: # HTML
    "What is to be seen at a glance: new on the list, moved up, reduced, sold out."
    out, name = [], item["item_id"]
    if name in moved and moved[name] is None: out.append('<span class="shop-mark">new</span>')
    elif (up := moved.get(name)) and up > 0: out.append(f'<span class="shop-mark up" role="img" aria-label="up {up} places">▲ {up}</span>')
    if item["discount"]: out.append(f'<span class="shop-mark off">−{item["discount"]:.0%}</span>')
    if not in_stock(item): out.append('<span class="shop-mark gone">sold out</span>')
    return f'<div class="shop-marks">{"".join(out)}</div>' if out else ""

def category_of(item: dict) -> str: return (item["category"] or "no category").replace(" / ", " › ")

def capital(text: str) -> str: return text[:1].upper() + text[1:]

def top(
    item: dict,
    moved: dict[str, int|None],
) -> str: # HTML
    "What stands above a card's title. Every text of the shop is escaped."
    leaf = (item["category"] or "no category").rpartition(" / ")[2]
    return (f'<div class="shop-photo{"" if in_stock(item) else " out"}"><img src="{drawing(item)}" alt="">{marks(item, moved)}</div>'
            f'<div class="shop-category">{escape(leaf)}</div>')

def foot(
    item: dict,
    scored: Scored,
) -> str: # HTML
    "What stands below it: price, stock, and why it is here."
    return f'<div class="shop-foot">{price_line(item)}' + (f'<div class="shop-reason">{escape(capital(scored.why.reason))}</div>' if scored.why else "") + "</div>"

# ---- shelves ------------------------------------------------------------------------------------------------------

def shelf(
    title: str,
    about: str,          # what kind of list it is, in a sentence
    look: Look,
    visit: Visit,
    name: str,           # of the surface: part of keys
    opened: Callable[[str], None], # told an item
    apart: Callable[[], None], # takes the list apart
) -> None:
    "A list as cards."
    items = described(look.found.ids).to_dicts()
    with st.container(horizontal=True, vertical_alignment="bottom", horizontal_alignment="distribute", gap="small"):
        st.subheader(title, help=about, anchor=False, width="content")
        if visit.user_id: st.button("Why these?", key=f"apart-{name}", icon=":material/psychology_alt:", type="tertiary", on_click=apart, help="How this list was made, step by step")
    if not items:
        st.info("The endpoint has nothing to show here.", icon=":material/info:")
        return
    st.html(f'<p class="shop-changes" role="status">{changes(look, visit)}</p>')
    moved = look.moves
    with st.container(key=f"shelf-{name}"):
        for n, (item, x) in enumerate(zip(items, look.found.items, strict=True)):
            with st.container(key=f"card-{name}-{n}"):
                st.html(top(item, moved))
                st.button(plain(shortened(named(item))), key=f"open-{name}-{n}", type="tertiary", wrap=True, on_click=opened, args=(item["item_id"],))
                st.html(foot(item, x))
    st.html(f'<div class="shop-note">{how_made(look.found)}</div>')

def shortened(text: str) -> str: return text if len(text) <= TITLE_SHOWN else text[:TITLE_SHOWN - 1].rstrip() + "…"

SAID = {"view": "viewed {}", "addtocart": "put {} in the cart", "transaction": "bought {}"}

def acts(
    done: list[dict], # events
) -> str: # HTML: "you viewed 2 items and bought <b>Dome Tent</b>"
    "What was done in between: of each item the strongest, in the order of strength."
    strength = list(SAID)
    most: dict[str, str] = {} # item → its event
    for e in done:
        if e["event"] in SAID and strength.index(e["event"]) >= strength.index(most.get(e["item_id"], strength[0])): most[e["item_id"]] = e["event"]
    def said(ids: list[str]) -> str: return f"<b>{escape(shortened(named(described(ids).to_dicts()[0])))}</b>" if len(ids) == 1 else f"{len(ids)} items"
    parts = [text.format(said(ids)) for event, text in SAID.items() if (ids := [i for i, e in most.items() if e == event])]
    return "you " + ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + parts[-1] if parts else ""

def changes(
    look: Look,
    visit: Visit,
) -> str: # HTML
    "What is new on a list since it was shown last, and what was done in between."
    if look.before is None: return "<span class='shop-note'>Open an item, put it in the cart or buy it: when you come back, the marks say what that changed here.</span>" if not visit.done else ""
    moved, why = look.moves, acts(visit.done[look.since:look.acts])
    new, up = sum(m is None for m in moved.values()), sum(bool(m and m > 0) for m in moved.values())
    parts = [f"<b>{new} new</b>" if new else "", f"<b>{up} moved up</b>" if up else "", f"{look.gone} gone" if look.gone else ""]
    what = ", ".join(p for p in parts if p) or "nothing, it is the same list"
    return f"What changed{f' since {why}' if why else ' since your last look'}: {what}."

def how_made(
    found: Recommended,
) -> str: # HTML
    "How an answer came about, in one line."
    n = len(found.items)
    parts = [f"{n} item{'s' if n != 1 else ''} in {1000*found.seconds:.0f} ms", "reasons worked out" if n and found.items[0].why else "",
             "the list of a moment ago, nothing happened since" if found.kept else "", "nothing is known yet, so it is what is popular" if found.fallback else "",
             f"made without {escape(', '.join(found.without))}, which did not answer in time" if found.without else "",
             f"experiment {escape(found.variant.replace('=', ': '))}" if found.variant else ""]
    return " · ".join(p for p in parts if p)
