"""One visit to the shop: who is there, what they did, what is in the cart, and the lists that they were shown with what changed in them."""
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import streamlit as st

from app.client import EndpointError, NotAllowed, Recommended, RequestRefused
from app.parts.page import endpoint

KINDS = {"known": "Known shopper", "new": "New shopper", "anonymous": "No id"}
DOING = {"impression": "saw", "click": "clicked", "view": "viewed", "addtocart": "put in the cart", "transaction": "bought"}

@dataclass(frozen=True)
class Came:
    "The list that led to an item."
    request_id: str
    surface: str
    context: tuple[str, ...] = () # what that list was about
    k: int = 12                   # how long it might be

@dataclass(frozen=True)
class Look:
    "A list as it was shown, beside the list that was shown in its place before."
    found: Recommended
    at: int                             # moment of the visit
    before: tuple[str, ...]|None = None # None: there was none
    since: int = 0                      # events of the visit until the list before
    acts: int = 0                       # and until this one

    @property
    def moves(self) -> dict[str, int|None]: # item → places that it went up, below 0 is down; None: it is new on the list
        old = {item: n for n, item in enumerate(self.before or ())}
        return {item: old[item] - n if item in old else None for n, item in enumerate(self.found.ids)} if self.before is not None else {}

    @property
    def gone(self) -> int: # items that are no longer on it
        return len(set(self.before or ()) - set(self.found.ids))

@dataclass
class Visit:
    "What is remembered of a visit, by this browser tab alone."
    kind: str                # of KINDS
    user_id: str             # empty for a visit without an id
    session_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    done: list[dict] = field(default_factory=list)  # events, the oldest first
    unsent: list[dict] = field(default_factory=list) # those of them that the endpoint has not taken
    trouble: str = ""        # why not
    cart: dict[str, int] = field(default_factory=dict) # item → pieces
    came: dict[str, Came] = field(default_factory=dict) # item → the list from which it was opened last
    open: str = ""           # the item whose page is shown
    looked: int = 0          # times that the lists were asked for anew without anything done
    looks: dict[tuple[str, str], Look] = field(default_factory=dict) # surface and what it is about → the list shown last
    bought: str = ""         # what was just bought, said once

    @property
    def moment(self) -> int: return len(self.done) + self.looked # a list holds until something is done

    # ---- what is done

    def do(self,
        event: str,              # of EVENTS
        items: dict[str, int],   # item → pieces
        prices: dict[str, float|None],
        order_id: str|None = None,
    ) -> None:
        "Something happens with some items: told to the endpoint, with the list that led there."
        now, made = round(1000*time.time()), []
        for item, pieces in items.items():
            came = self.came.get(item)
            made.append({"event_id": uuid.uuid4().hex, "ts": now, "user_id": self.user_id, "session_id": self.session_id, "item_id": item, "event": event,
                         "price": prices.get(item), "request_id": came and came.request_id, "surface": came and came.surface,
                         "order_id": order_id, "quantity": pieces if event == "transaction" else None})
        self.done += made
        if self.user_id: # without one there is nobody to whom an event could belong: the visit goes along with each request
            self.unsent += made
            self.send()

    def send(self) -> None:
        "Tell the endpoint what it has not taken yet; sending twice does no harm."
        try: endpoint().send([{n: v for n, v in e.items() if v is not None} for e in self.unsent])
        except RequestRefused as e: self.unsent, self.trouble = [], str(e) # asking again would not help
        except EndpointError as e: self.trouble = str(e)
        else: self.unsent, self.trouble = [], ""

    def opens(self, item: str, price: float|None) -> None:
        "An item's page is looked at: a click where a list led there, and a view."
        self.open = item
        if item in self.came and self.came[item].request_id not in {e["request_id"] for e in self.done if e["item_id"] == item}:
            self.do("click", {item: 1}, {item: price})
        self.do("view", {item: 1}, {item: price})

    def buys(self, items: dict[str, int], prices: dict[str, float|None]) -> None:
        "One order."
        order = uuid.uuid4().hex
        self.do("transaction", items, prices, order)
        self.bought = f"Order {order[:8]}: {(n := sum(items.values()))} item{'s' if n != 1 else ''} bought."
        for item in items: self.cart.pop(item, None)

    # ---- what is shown

    def look(self,
        surface: str,           # of SURFACES
        context: Sequence[str], # the item of the page, or the cart
        k: int,
    ) -> Look:                  # raises `EndpointError`
        "A list, asked for once until something is done: who moves about the page is not shown it again."
        place = surface, "" if not context or list(context) == list(self.cart) else context[0] # the cart changes and stays the cart
        last = self.looks.get(place)
        if last and last.at == self.moment: return last
        found = ask(self, surface, context, k)
        self.looks[place] = Look(found, self.moment, tuple(last.found.ids) if last else None, last.acts if last else 0, len(self.done))
        return self.looks[place]

    @property
    def said(self) -> list[dict]: # the visit as `POST session` takes it
        return [{"item_id": e["item_id"], "event": e["event"], "ts": e["ts"]} for e in self.done[-1_000:]]

def ask(
    visit: Visit,
    surface: str,
    context: Sequence[str],
    k: int,
) -> Recommended: # raises `EndpointError`
    "A list for whoever is there, with reasons where the app's key may have them."
    client, who = endpoint(), visit.user_id
    if not who: return client.session(visit.said, k, surface, context)
    def asked(explain: bool) -> Recommended:
        if surface == "similar": return client.similar(context[0], k, who, explain=explain)
        if surface == "bought_together": return client.bought_together(context, k, who, explain=explain)
        return client.recommend(who, k, explain=explain)
    if st.session_state.get("no_reasons"): return asked(False)
    try: return asked(True)
    except NotAllowed:
        found = asked(False) # or it is the key itself that is wrong
        st.session_state["no_reasons"] = True
        return found

# ---- whose visit --------------------------------------------------------------------------------------------------

def begin(
    kind: str,         # of KINDS
    user_id: str = "", # empty: somebody new
) -> Visit:
    "Another shopper comes in."
    st.session_state["visit"] = visit = Visit(kind, "" if kind == "anonymous" else user_id or f"guest-{uuid.uuid4().hex[:6]}")
    return visit

def enter(
    kind: str,
    user_id: str = "",
) -> None:
    "As `begin`, and the address bar says who, so that the page can be linked."
    visit = begin(kind, user_id)
    st.query_params.from_dict({"kind": kind, **({"shopper": visit.user_id} if visit.user_id else {})})

def present(
    active: Sequence[str], # known shoppers, the most active first
) -> Visit:
    "The visit of this tab: the one that goes on, the one that a link names, or the most active shopper's."
    visit, kind, user_id = st.session_state.get("visit"), st.query_params.get("kind", ""), st.query_params.get("shopper", "")
    if visit and (kind, user_id) in (("", ""), (visit.kind, visit.user_id)): return visit
    if kind not in KINDS: kind = "known" if user_id or active else "new"
    return begin(kind, user_id or (active[0] if active and kind == "known" else ""))
