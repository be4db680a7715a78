"""How pages put into words what tables and figures hold: names of the field in plain English, numbers as people read them, and text of shops without its markup."""
import re
from datetime import date
from typing import NamedTuple

import polars as pl

SURFACES = {"for_you": "Home page (for you)", "similar": "Item page (similar items)", "bought_together": "Cart (bought together)"}
SEGMENTS = {"anonymous": "Visits without an id", "new": "New shoppers", "browser": "Browsers: have looked, never bought", "buyer": "Buyers: have bought before"}
QUESTIONS = {"surface": "Surface", "source": "Candidate source", "variant": "Experiment variant", "segment": "Shopper segment", "bundle": "Model bundle", "rank": "Place in the list"}
ABOUT = {"surface": "Where in the shop the list stood.", "source": "Which part of the platform proposed the item first: what sells, what goes together, what similar shoppers like …",
         "variant": "What the shopper was shown as part of an experiment; “none” took part in no experiment.",
         "segment": "What was known of the shopper at that moment.", "bundle": "The trained model that made the list.", "rank": "1 is the first item of the list."}

MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>$~^&=@])")

def plain(
    text: object,
) -> str: # that Markdown shows as it is
    "Text of a shop, a file or a person, on one line: no markup, no icon and no colour comes of it."
    line = MARKUP.sub(r"\\\1", " ".join(str(text).split()))
    return re.sub(r":(?=\w)", "\\:\u2060", line) # a word joiner, of no width, ends :names: of icons

WORDS = {"surface": SURFACES, "segment": SEGMENTS}

def answer(
    question: str, # of QUESTIONS
    value: str,    # of the table
) -> str:
    "The value of a question as people say it."
    return WORDS.get(question, {}).get(value, value)

def answers(
    question: str,          # of QUESTIONS
    column: str = "value",  # that holds values of it
) -> pl.Expr:
    "The same of a whole column; what nobody answered is `none`."
    return pl.col(column).cast(pl.String).replace(WORDS.get(question, {})).fill_null("none")

def day(d: date) -> str: return f"{d:%-d %b}"

def days(
    since: date,
    until: date, # the last one
) -> str:        # "3 – 9 Nov"
    if since == until: return day(since)
    return f"{since:%-d} – {day(until)}" if (since.year, since.month) == (until.year, until.month) else f"{day(since)} – {day(until)}"

def count(n: int, one: str, many: str = "") -> str: return f"{n:,} {one if n == 1 else many or one + 's'}" # "1 day", "3 days"

class Figure(NamedTuple):
    "A business figure: a sum by a sum of the columns of `kpis`."
    name: str     # its column there
    label: str
    over: str
    under: str    # empty: the sum alone
    times: float  # per so many
    format: str   # for Python
    about: str    # one sentence

    @property
    def axis(self) -> str: return self.format.replace(".2", ".2~") # for d3: without zeros at the end

    def said(self, x: float|None) -> str: return "–" if x is None else f"{x:{self.format}}"

FIGURES = {f.name: f for f in (
    Figure("CTR", "Click rate (CTR)", "click", "exposures", 1, ".2%", "Of all items that were shown in lists, the share that was clicked."),
    Figure("CVR", "Conversion (CVR)", "purchase", "click", 1, ".2%", "Of all clicked items, the share that was then bought."),
    Figure("cart_rate", "Add-to-cart rate", "cart", "click", 1, ".2%", "Of all clicked items, the share that was then put in the cart."),
    Figure("AOV", "Order value (AOV)", "revenue", "orders", 1, ",.2f", "Revenue from lists by order that has something from a list in it, in the shop's currency."),
    Figure("revenue", "Revenue from lists", "revenue", "", 1, ",.0f", "What was paid for items that were bought after a click in a list, in the shop's currency. The time that counts is [kpis] window_hours."),
    Figure("revenue_per_1000", "Revenue per 1,000 shown", "revenue", "exposures", 1_000, ",.2f", "Revenue from lists by thousand items shown: comparable between busy and quiet days."))}

SHOWN = Figure("exposures", "Items shown", "exposures", "", 1, ",.0f", "Items that stood in a list that was answered: what all other figures are counted over.")

def percent(
    x: float|None,
    places: int = 1,
    sign: bool = False,
) -> str:
    "A share; a dash where there is none."
    return "–" if x is None else f"{x:{'+' if sign else ''}.{places}%}".replace("-", "−")

def ms(
    seconds: float|None,
) -> str: # "12 ms"
    "A short time, to three digits."
    if seconds is None: return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1_000*seconds:.3g} ms"
