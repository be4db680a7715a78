"""A small shop in which everything is real but the money: each click is an event, and the next list knows it."""
from functools import partial
from html import escape

import polars as pl
import streamlit as st

from app.client import EndpointError
from app.parts.page import described, endpoint_down, lead, nothing_yet, read, shown
from app.parts.shop.storefront import STYLE, category_of, drawing, in_stock, named, paid, price_line, shelf
from app.parts.shop.visit import DOING, KINDS, Came, Visit, enter, present
from app.parts.why.apart import Asked
from app.parts.wording import plain
from reco.data.lake import LakeError

SHOPPERS, PAST = 200, 50 # in the list to pick from; events in the history
HOME, BESIDE = 12, 6     # items of the home page; of a shelf on an item's page
MAX_ID = 512             # characters that the endpoint takes

# ---- what the lake knows ------------------------------------------------------------------------------------------

def most_active(table: pl.LazyFrame, n: int) -> pl.LazyFrame: # user_id, len
    return table.group_by("user_id").len().sort(["len", "user_id"], descending=[True, False]).head(n)

def latest_of(table: pl.LazyFrame, user_id: str) -> pl.LazyFrame:
    return table.filter(pl.col("user_id") == user_id).select("event_id", "ts", "event", "item_id", "price").sort(["ts", "event_id"], descending=True)

def active_shoppers() -> dict[str, int]: # user_id → events, most first; empty without a lake
    try: return dict(read("interactions", most_active, SHOPPERS).iter_rows())
    except LakeError: return {}

# ---- who ----------------------------------------------------------------------------------------------------------

def changed_kind(active: list[str]) -> None:
    kind = st.session_state["kind"]
    enter(kind, active[0] if kind == "known" and active else "")

def changed_shopper(kind: str, key: str) -> None:
    if (st.session_state[key] or "").strip(): enter(kind, st.session_state[key])

def pick(
    visit: Visit,
    active: dict[str, int], # of `active_shoppers`
) -> None:
    "Who shops."
    kinds = [k for k in KINDS if k != "known" or active or visit.kind == "known"]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        st.segmented_control("Who is shopping?", kinds, default=visit.kind, required=True, format_func=KINDS.__getitem__, key="kind", on_change=changed_kind, args=(list(active),),
                             help="Known: somebody with a past. New: an id that the shop has never seen. No id: a visit that belongs to nobody, such as before logging in.")
        if visit.kind == "known":
            known = list(dict.fromkeys([*active, visit.user_id]))
            st.selectbox("Shopper", known, known.index(visit.user_id), format_func=lambda u: f"{u} · {active[u]:,} events" if u in active else u, key=f"known-{visit.session_id}",
                         accept_new_options=True, on_change=changed_shopper, args=("known", f"known-{visit.session_id}"), width=320,
                         help=f"The {len(active):,} most active are listed; any other id can be typed.")
        elif visit.kind == "new":
            st.text_input("Id of the new shopper", visit.user_id, key=f"new-{visit.session_id}", on_change=changed_shopper, args=("new", f"new-{visit.session_id}"), max_chars=200, width=240)
            st.button("Somebody else", icon=":material/casino:", key="somebody-else", on_click=enter, args=("new",))
        cart(visit)
    if visit.kind == "anonymous":
        st.caption("Events belong to a shopper's id, so those of this visit are not stored: they stay in this tab and go along with each request, and the lists follow them all the same.")

# ---- the cart -----------------------------------------------------------------------------------------------------

def take_out(visit: Visit, item: str) -> None:
    visit.cart.pop(item, None)
    visit.looked += 1

def buy_all(visit: Visit) -> None:
    visit.buys(dict(visit.cart), {i["item_id"]: paid(i) for i in described(list(visit.cart)).to_dicts()})

def cart(visit: Visit) -> None:
    "What was put aside, and the till."
    pieces = sum(visit.cart.values())
    with st.popover(f"Cart · {pieces}" if pieces else "Cart", icon=":material/shopping_cart:", type="primary" if pieces else "secondary"):
        if not pieces:
            st.write("Nothing in it yet.")
            return
        items = described(list(visit.cart)).to_dicts()
        for n, item in enumerate(items):
            times = visit.cart[item["item_id"]]
            price = "" if (each := paid(item)) is None else f"{times*each:,.2f}"
            with st.container(horizontal=True, vertical_alignment="center"):
                st.html(f'<ul class="shop-cart"><li><img src="{drawing(item)}" alt=""><span>{escape(named(item))}{f" × {times}" if times > 1 else ""}</span><b>{price}</b></li></ul>')
                st.button("Remove", key=f"out-{n}", on_click=take_out, args=(visit, item["item_id"]), type="tertiary")
        total = sum(visit.cart[i["item_id"]]*(paid(i) or 0) for i in items)
        st.button(f"Buy all · {total:,.2f}", key="buy-all", type="primary", icon=":material/shopping_bag:", on_click=buy_all, args=(visit,), width="stretch")

# ---- shelves ------------------------------------------------------------------------------------------------------

def open_item(came: Came, item: str) -> None:
    st.session_state["visit"].came[item] = came
    st.query_params["item"] = item

def home() -> None: st.query_params.pop("item", None)

def take_apart(visit: Visit, came: Came, item: str = "") -> None:
    "Go to the page that takes lists apart, with this one."
    st.session_state["why"] = Asked(visit.user_id, came.surface, came.context, came.request_id, item, came.k)
    st.session_state["to_why"] = True

SHELVES = {"for_you": ("Recommended for You", "Chosen for this shopper among everything in the shop, from what they did until now."),
           "similar": ("Similar Items", "What resembles this item, in the order that suits the shopper."),
           "bought_together": ("Frequently Bought Together", "What goes with this item, or with the cart as soon as something is in it.")}

def put_up(visit: Visit, surface: str, context: list[str], k: int) -> None: # raises `EndpointError`
    "One shelf."
    look, (title, about) = visit.look(surface, context, k), SHELVES[surface]
    if surface == "bought_together" and visit.cart: title = "Goes with Your Cart"
    came = Came(look.found.request_id, surface, tuple(context), k)
    shelf(title, about, look, visit, surface, partial(open_item, came), partial(take_apart, visit, came))

def item_page(visit: Visit, item_id: str) -> None: # raises `EndpointError`
    "One item, what resembles it and what goes with it."
    [item] = described([item_id]).to_dicts()
    st.button("Recommended for You", icon=":material/arrow_back:", on_click=home, type="tertiary", key="home")
    photo, text = st.columns([2, 3], gap="large")
    photo.html(f'<div class="shop-big"><img src="{drawing(item)}" alt=""></div>')
    with text:
        st.html(f'<div class="shop-big"><div class="shop-note">{escape(category_of(item))}</div><h2>{escape(named(item))}</h2><div class="shop-note">{escape(item_id)}</div>{price_line(item)}</div>')
        if item["title"] is None and item["category"] is None: st.caption("The catalogue does not know this item.")
        with st.container(horizontal=True):
            st.button("Add to cart", icon=":material/add_shopping_cart:", key="add", disabled=not in_stock(item), on_click=add, args=(visit, item))
            st.button("Buy now", icon=":material/shopping_bag:", key="buy", type="primary", disabled=not in_stock(item), on_click=buy, args=(visit, item))
        if not in_stock(item): st.caption("Sold out, as the newest catalogue in the lake has it. The endpoint goes by what it was told (`PUT /items/v1`) or by its last model, so a list may still show it.")
        came = visit.came.get(item_id)
        st.caption(f"You came here from “{SHELVES[came.surface][0]}”: what you do with it is credited to that list." if came else "You came here by a link, so no list gets the credit.")
        if came and visit.user_id: st.button("Why was it on that list?", icon=":material/psychology_alt:", key="why-item", type="tertiary", on_click=take_apart, args=(visit, came, item_id))
    put_up(visit, "similar", [item_id], BESIDE)
    put_up(visit, "bought_together", list(visit.cart) or [item_id], BESIDE)

def add(visit: Visit, item: dict) -> None:
    visit.cart[item["item_id"]] = visit.cart.get(item["item_id"], 0) + 1
    visit.do("addtocart", {item["item_id"]: 1}, {item["item_id"]: paid(item)})

def buy(visit: Visit, item: dict) -> None: visit.buys({item["item_id"]: 1}, {item["item_id"]: paid(item)})

# ---- the past -----------------------------------------------------------------------------------------------------

def counted(n: int, what: str) -> str: return f"{n:,} {what}{'s' if n != 1 else ''}"

def past(visit: Visit) -> None:
    "What was done in this visit, and what the lake has of the shopper."
    mine = pl.DataFrame(visit.done, schema={"event_id": pl.String, "ts": pl.Int64, "event": pl.String, "item_id": pl.String, "price": pl.Float64})
    mine = mine.reverse().with_columns(pl.col("ts").cast(pl.Datetime("ms", "UTC")), where=pl.lit("now"))
    try: stored = read("interactions", latest_of, visit.user_id) if visit.user_id else mine.drop("where").clear()
    except LakeError: stored = mine.drop("where").clear()
    stored = stored.with_columns(pl.col("event").cast(pl.String), where=pl.lit("before")).join(mine.select("event_id"), on="event_id", how="anti", maintain_order="left")
    with st.expander(f"What this shopper did ({counted(mine.height + stored.height, 'event')})" if visit.user_id else f"What was done in this visit ({counted(mine.height, 'event')})", icon=":material/history:"):
        if mine.is_empty() and stored.is_empty():
            st.write("Nothing yet.")
            return
        bought = stored.filter(pl.col("event") == "transaction").height
        if stored.height:
            st.caption(f"Before this visit: {counted(stored.height, 'event')} since {min(stored['ts']):%d %b %Y}, {counted(bought, 'purchase')}" + (f"; the newest {PAST} are shown. " if stored.height > PAST else ". ")
                       + "Events of this visit come into the lake through `python -m app.consumer`; the endpoint knows them at once.")
        both = pl.concat([mine, stored.head(PAST).cast({"ts": pl.Datetime("ms", "UTC")})], how="diagonal_relaxed")
        items = described(both["item_id"].unique().to_list()).select("item_id", "title", "category")
        table = both.join(items, on="item_id", how="left", maintain_order="left").select(
            pl.coalesce("title", "Item " + pl.col("item_id")).alias("Item"), pl.col("event").replace(DOING).alias("Did"), pl.col("where").replace({"now": "this visit", "before": "before"}).alias("When"),
            pl.col("ts").alias("Time (UTC)"), pl.col("category").alias("Category"), pl.col("price").alias("Price"))
        st.dataframe(table, hide_index=True, width="stretch", alt="What the shopper did, newest first", column_config={
            "Time (UTC)": st.column_config.DatetimeColumn(format="D MMM, HH:mm:ss", timezone="UTC"), "Price": st.column_config.NumberColumn(format="%.2f")})

# ---- the page -----------------------------------------------------------------------------------------------------

def notices(visit: Visit) -> None:
    "What has to be said before anything else."
    if visit.bought:
        st.success(visit.bought, icon=":material/check_circle:")
        visit.bought = ""
    if visit.trouble:
        waits = f"{counted(len(visit.unsent), 'event')} wait to be sent with the next one." if visit.unsent else "It was not kept."
        st.warning(f"The endpoint did not take what you did: {plain(visit.trouble)} {waits}", icon=":material/sync_problem:")

def keyless() -> None:
    "Why there are no reasons, said once."
    if st.session_state.get("no_reasons") and not st.session_state.get("no_reasons_said"):
        st.session_state["no_reasons_said"] = True
        st.info("Reasons under the items need an admin's key of the endpoint: `RECO_APP_KEY`.", icon=":material/key:")

def page() -> None:
    "The page, top to bottom."
    if st.session_state.pop("to_why", False): st.switch_page("app_pages/why.py")
    lead("Be any shopper. What you click, put in the cart and buy here are real events, and the very next list knows them.")
    st.html(STYLE)
    active = active_shoppers()
    visit = present(list(active))
    if not active:
        nothing_yet("The lake has no events yet, so there are no known shoppers to be. Somebody new gets what is popular.",
                    "`make demo` simulates a shop and trains on it", "with data of your own: `make ingest`, `make train`, `make serve`")
    pick(visit, active)
    item = st.query_params.get("item", "")[:MAX_ID]
    try:
        if item != visit.open:
            visit.open = item
            if item: visit.opens(item, paid(described([item]).to_dicts()[0]))
        notices(visit)
        if item: item_page(visit, item)
        else:
            put_up(visit, "for_you", [], HOME)
            if visit.cart: put_up(visit, "bought_together", list(visit.cart), BESIDE)
        keyless()
    except EndpointError as e: endpoint_down(e)
    past(visit)

if __name__ == "__main__": shown("Shop", page)
