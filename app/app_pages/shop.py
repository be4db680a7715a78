"""One shopper: what they did, and what the endpoint recommends to them."""
import time
from html import escape
from zlib import crc32

import polars as pl
import streamlit as st

from app.client import Client, EndpointDown, EndpointError, Scored
from app.ports import reach
from reco.data.lake import Lake, LakeError, open_lake
from reco.settings import load_settings

SHOWN_USERS, SHOWN_EVENTS = 200, 50 # in the list to pick from; in the history
DOING = {"impression": "saw", "click": "clicked", "view": "viewed", "addtocart": "put in the cart", "transaction": "bought"}

@st.cache_data(ttl=60, show_spinner="Reading the lake …")
def active_users(
    _lake: Lake,
    root: str,  # its address, by which the answer is kept
) -> list[str]: # most events first, then by id
    "Shoppers worth looking at; raises `LakeError` when there are no interactions."
    return (_lake.read("interactions").group_by("user_id").len()
            .sort(["len", "user_id"], descending=[True, False]).head(SHOWN_USERS).collect()["user_id"].to_list())

@st.cache_data(ttl=60, show_spinner=False)
def history(
    _lake: Lake,
    root: str,     # its address, by which the answer is kept
    user_id: str,  # one shopper
) -> pl.DataFrame: # ts, event, item_id, price; newest first
    "All that a shopper did."
    return (_lake.read("interactions").filter(pl.col("user_id") == user_id)
            .select("ts", "event", "item_id", "price").sort(["ts", "item_id"], descending=[True, False]).collect())

@st.cache_data(ttl=60, show_spinner=False)
def describe(
    _lake: Lake,
    root: str,                 # its address, by which the answer is kept
    item_ids: tuple[str, ...], # items to describe
) -> pl.DataFrame:             # item_id, title, category, price: one row each, in the order asked for
    "The newest catalogue entry of each item; nulls where the catalogue has none."
    try: catalog = _lake.read("catalog")
    except LakeError: catalog = pl.LazyFrame(schema={c: pl.String for c in ("item_id", "valid_from", "title", "category_path",
                                                     "category_id")} | {"price": pl.Float64})
    newest = (catalog.filter(pl.col("item_id").is_in(item_ids)).sort("valid_from").unique("item_id", keep="last")
              .select("item_id", "title", pl.coalesce("category_path", "category_id").alias("category"), "price").collect())
    return pl.DataFrame({"item_id": item_ids}, schema={"item_id": pl.String}).join(newest, on="item_id", how="left",
                                                                                  maintain_order="left")

# `currentColor` and translucency: the same sheet in Streamlit's light and dark theme. The grid makes as many columns as
# fit, two on a phone.
STYLE = """<style>
.reco-cards {display:grid; grid-template-columns:repeat(auto-fill,minmax(150px,1fr)); gap:12px; list-style:none;
  margin:0 !important; padding:0 !important}
.reco-cards li {border:1px solid color-mix(in srgb,currentColor 18%,transparent); border-radius:10px; overflow:hidden; margin:0 !important;
  padding:0; display:flex; flex-direction:column}
.reco-tile {height:56px; display:flex; align-items:center; justify-content:space-between; padding:0 12px; color:#fff; font-weight:600}
.reco-tile span:last-child {font-weight:400; font-size:.8rem; opacity:.9}
.reco-text {padding:10px 12px 12px; display:flex; flex-direction:column; gap:4px; flex:1; line-height:1.3}
.reco-title {font-weight:600; overflow-wrap:anywhere}
.reco-dim {opacity:.7; font-size:.82rem; overflow-wrap:anywhere}
.reco-price {display:flex; justify-content:space-between; align-items:baseline; font-size:.92rem; font-weight:600}
.reco-foot {margin-top:auto; padding-top:6px}
.reco-bar {height:4px; border-radius:2px; background:color-mix(in srgb,currentColor 14%,transparent); margin-top:6px}
.reco-bar div {height:100%; border-radius:2px; background:#4a7fd6}
[data-testid="stMainBlockContainer"] {padding-top:3rem}
</style>"""

def card(
    rank: int,     # 1 is the best
    item: dict,    # a row of `describe`
    score: float,  # 0 to 1
) -> str:          # one list item of HTML
    "A product card. Every text of the shop is escaped: a title is data, not markup."
    category = item["category"] or "no category"
    title = item["title"] or f"Item {item['item_id']}"
    price = "" if item["price"] is None else f"{item['price']:,.2f}"
    return (f'<li><div class="reco-tile" style="background:hsl({crc32(category.encode()) % 360} 38% 42%)"><span>{rank}</span>'
            f'<span>{escape(item["item_id"])}</span></div><div class="reco-text">'
            f'<div class="reco-title">{escape(title)}</div>'
            f'<div class="reco-dim">{escape(category)}</div>'
            f'<div class="reco-foot"><div class="reco-price"><span>{price}</span><span class="reco-dim">score {score:.2f}</span></div>'
            f'<div class="reco-bar"><div style="width:{100*score:.0f}%"></div></div></div></div></li>')

def pick(
    known: list[str], # shoppers in the lake
) -> tuple[str, int]: # user_id (may be empty), k
    "The controls."
    kinds = ["Known shopper", "New shopper"] if known else ["New shopper"]
    kind = st.radio("Who", kinds, horizontal=True, label_visibility="collapsed")
    who, how_many = st.columns([3, 1])
    with who:
        if kind == "Known shopper":
            user_id = st.selectbox("Shopper, the most active first", known, accept_new_options=True,
                                   help=f"The {len(known)} most active are listed; any other id can be typed.")
        else: user_id = st.text_input("Any id that the shop has never seen", value="somebody-new", max_chars=200)
    with how_many: k = st.slider("How many", 1, 30, 10)
    return user_id or "", k

def show_recommendations(
    lake: Lake,
    client: Client,
    user_id: str,
    k: int,        # how many
) -> None:
    "Ask the endpoint and draw its answer, or say what to start."
    st.subheader("Recommended")
    began = time.perf_counter()
    try: items: list[Scored] = client.recommendations(user_id, k)
    except EndpointDown as e:
        st.error(f"No recommendations: {e}\n\nStart the endpoint with `make serve` in another terminal, then try again.")
        st.button("Try again", icon=":material/refresh:")
        return
    except EndpointError as e:
        st.error(f"No recommendations: {e}")
        return
    took_ms = 1000 * (time.perf_counter() - began)
    rows = describe(lake, str(lake.root), tuple(x.item_id for x in items)).to_dicts()
    cards = "".join(card(i, row, x.score) for i,(row, x) in enumerate(zip(rows, items, strict=True), 1))
    st.html(f'{STYLE}<ol class="reco-cards">{cards}</ol>')
    st.caption(f"{len(items)} items in {took_ms:.0f} ms from `{client.address}`")

def show_history(
    lake: Lake,
    user_id: str,
) -> None:
    "What the shopper did, newest first."
    st.subheader("History")
    events = history(lake, str(lake.root), user_id)
    if events.is_empty():
        st.caption("Nothing yet: this shopper is new, so the recommendations are what is popular now.")
        return
    bought = events.filter(pl.col("event") == "transaction").height
    st.caption(f"{events.height:,} events since {events['ts'].min():%d %b %Y}, {bought:,} bought"
               + (f"; the latest {SHOWN_EVENTS}" if events.height > SHOWN_EVENTS else ""))
    latest = events.head(SHOWN_EVENTS)
    items = describe(lake, str(lake.root), tuple(latest["item_id"].unique().to_list())).select("item_id", "title", "category")
    table = latest.join(items, on="item_id", how="left", maintain_order="left").select(
        pl.col("title").fill_null("Item " + pl.col("item_id")).alias("Item"),
        pl.col("event").cast(pl.String).replace(DOING).alias("Did"),
        pl.col("ts").alias("When (UTC)"), pl.col("category").alias("Category"), pl.col("price").alias("Price"))
    st.dataframe(table, hide_index=True, width="stretch", column_config={
        "When (UTC)": st.column_config.DatetimeColumn(format="D MMM, HH:mm", timezone="UTC"),
        "Price": st.column_config.NumberColumn(format="%.2f")})

@st.cache_resource
def endpoint(
    address: str, # http://host:port
) -> Client:      # shared by all sessions: it is safe to use from many threads
    return Client(address, timeout_s=3)

def page() -> None:
    "The page, top to bottom."
    settings = load_settings()
    lake = open_lake(settings)
    st.header("Recommendations")
    try: known = active_users(lake, str(lake.root))
    except LakeError:
        known = []
        st.warning("The lake is empty. `make demo` makes a simulated shop and does the rest; with files of your own: "
                   "`make ingest`, `make train`, `make serve`.")
    user_id, k = pick(known)
    if not user_id.strip():
        st.info("Type an id: every shopper gets an answer, known or not.")
        return
    show_recommendations(lake, endpoint(reach(settings.serving.host, settings.serving.port)), user_id, k)
    if known: show_history(lake, user_id)

if __name__ == "__main__": page() # which is how Streamlit runs a page
