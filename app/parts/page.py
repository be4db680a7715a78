"""What the pages of the Streamlit app share: the lake, the endpoint, and what a page says when one of them is not there."""
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import polars as pl
import streamlit as st

from app.client import Client, EndpointDown, EndpointError, NotAllowed
from app.ports import reach
from reco.data.lake import Lake, LakeError, open_lake
from reco.settings import Settings, load_settings

TTL_S = 60 # what was read of the lake is read anew after so long
TIMEOUT_S = 5.0 # an answer that takes longer is none: the shopper would be gone

@st.cache_resource(ttl=TTL_S, show_spinner=False)
def settings() -> Settings: # raises `SettingsError`
    "The settings, read anew now and then."
    return load_settings()

def lake() -> Lake: return open_lake(settings())

def address() -> str: # http://host:port
    "Where the endpoint is."
    s = settings()
    return s.app.endpoint or reach(s.serving.host, s.serving.port)

@st.cache_resource(show_spinner=False)
def _client(address: str, key: str, timeout_s: float) -> Client: return Client(address, timeout_s, key)

def endpoint(
    key: str = "",  # of somebody who may more than the app; empty: the app's own
) -> Client:        # shared by all sessions
    "The endpoint, kept connected."
    return _client(address(), key or settings().app.key.get_secret_value(), TIMEOUT_S)

# ---- reading the lake ---------------------------------------------------------------------------------------------

@st.cache_data(ttl=TTL_S, show_spinner=False, max_entries=200)
def _read(root: str, name: str, _make: Callable[..., pl.LazyFrame], who: str, asked: tuple) -> pl.DataFrame:
    return _make(lake().read(name), *asked).collect()

def read(
    name: str,                           # a table of the lake
    make: Callable[..., pl.LazyFrame] = lambda table: table, # told the table and `asked`: what is wanted of it
    *asked: object,                      # what can be hashed
) -> pl.DataFrame:
    "Some rows of a table, kept for a minute; raises `LakeError` when there is no such table."
    if make.__closure__: raise TypeError(f"{make.__qualname__} captures a value that the kept answer would not depend on; hand it over as an argument")
    return _read(settings().lake_root, name, make, f"{make.__module__}.{make.__qualname__}:{make.__code__.co_firstlineno}", asked)

@st.cache_data(ttl=TTL_S, show_spinner=False)
def _tables(root: str) -> list[str]: return list(lake().tables())

def tables() -> list[str]: return _tables(settings().lake_root) # what the lake has; none where there is no lake

@st.cache_data(ttl=TTL_S, show_spinner=False)
def _titles(root: str) -> pl.DataFrame:
    there = lake().read("catalog")
    newest = there.sort("valid_from").unique("item_id", keep="last")
    return newest.select("item_id", "title", category=pl.coalesce("category_path", "category_id"), price="price", discount="discount",
                         available=pl.col("available").fill_null(True)).sort("item_id").collect()

def catalog() -> pl.DataFrame: # item_id, title, category, price, discount, available; by item_id; empty without a catalogue
    "The newest that is known of every item."
    if "catalog" not in tables():
        return pl.DataFrame(schema={"item_id": pl.String, "title": pl.String, "category": pl.String, "price": pl.Float64, "discount": pl.Float64, "available": pl.Boolean})
    return _titles(settings().lake_root)

def described(
    item_ids: Sequence[str],
) -> pl.DataFrame: # of `catalog`: one row each, in the order asked for; nulls where the catalogue has none
    "What the shop says of items."
    wanted = pl.DataFrame({"item_id": item_ids}, schema={"item_id": pl.String})
    return wanted.join(catalog(), on="item_id", how="left", maintain_order="left")

# ---- what a page says ---------------------------------------------------------------------------------------------

def lead(
    text: str, # Markdown
) -> None:
    "The sentence below a page's title that says what it answers."
    st.markdown(text)

def nothing_yet(
    what: str,    # is missing
    *how: str,    # commands that make it, each with what it does
) -> None:
    "An empty place that says how it fills."
    st.info("\n".join([what, "", *(f"- {h}" for h in how)]), icon=":material/info:")

def endpoint_down(
    error: EndpointError,
) -> None:
    "What to start, and a button to try again."
    if isinstance(error, NotAllowed):
        st.error(f"The endpoint wants another key: {error}\n\nSet `RECO_APP_KEY` to one of its keys and start the app again.", icon=":material/key:")
    elif isinstance(error, EndpointDown):
        st.error(f"The endpoint does not answer: {error}\n\nStart it with `make serve` in another terminal (half a minute), then try again. "
                 "Another address is one setting: `RECO_APP_ENDPOINT`.", icon=":material/cloud_off:")
        st.button("Try again", icon=":material/refresh:", key="again")
    else: st.error(f"The endpoint could not answer: {error}", icon=":material/error:")

def shown(
    title: str,
    page: Callable[[], None], # draws what is below the title
) -> None:
    "A page with its title. What is not there is said, with what to do about it: a traceback helps nobody."
    st.title(title)
    try: page()
    except EndpointError as e: endpoint_down(e)
    except LakeError as e:
        nothing_yet(f"The lake has nothing for this page yet ({e}).", "`make demo` simulates a shop and fills every page",
                    "with data of your own: `make ingest`, `make train`, `make serve`")

def since(
    at: datetime, # with a time zone
) -> str:         # "3 hours ago"
    "How long ago, in the unit that a person would use."
    seconds = max((datetime.now(UTC) - at).total_seconds(), 0)
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size: return f"{(n := int(seconds//size)):,} {unit}{'s' if n != 1 else ''} ago"
    return "just now"
