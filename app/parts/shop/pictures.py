"""A picture for every product, drawn from its id and its words: nothing is downloaded, and the same item always looks the same."""
import re
from base64 import b64encode
from colorsys import hls_to_rgb
from functools import lru_cache
from zlib import crc32

# what is drawn on a field of 100 x 100; {a} is the item's colour, {b} a light one, {c} a dark one
SHAPES = {
    "shoe": '<path d="M12 70c0-12 5-18 5-28l12-4c5 12 13 17 21 19 12 3 25 3 33 6 6 2 7 6 7 11z" fill="{a}"/><rect x="11" y="71" width="80" height="9" rx="4.5" fill="{c}"/>'
            '<path d="M35 50l9-6M43 55l8-7M52 58l6-7" stroke="{b}" stroke-width="3.5" stroke-linecap="round"/>',
    "sock": '<path d="M42 14h26v36c0 5-2 8-5 11L45 78c-6 6-15 6-20 0s-4-13 2-18l12-10c2-2 3-4 3-7z" fill="{a}"/><path d="M42 14h26v11H42zM42 30h26v5H42z" fill="{b}"/>'
            '<path d="M25 78c-5-6-4-13 2-18l16 19c-6 5-13 4-18-1z" fill="{c}"/>',
    "coffee machine": '<rect x="24" y="18" width="52" height="16" rx="4" fill="{c}"/><path d="M24 34h18v42H24z" fill="{a}"/><rect x="22" y="74" width="56" height="8" rx="3" fill="{c}"/>'
                      '<rect x="50" y="34" width="18" height="7" rx="2" fill="{a}"/><path d="M50 58h18v6c0 6-4 9-9 9s-9-3-9-9z" fill="{b}"/><path d="M56 44v10M62 44v10" stroke="{c}" stroke-width="2"/><circle cx="33" cy="26" r="3" fill="{b}"/>',
    "coffee bag": '<path d="M31 26h38l5 52c0 3-2 5-5 5H31c-3 0-5-2-5-5z" fill="{a}"/><rect x="31" y="16" width="38" height="11" rx="2" fill="{c}"/><ellipse cx="50" cy="55" rx="13" ry="17" fill="{b}"/>'
                  '<path d="M50 39c-7 9 7 20 0 32" stroke="{a}" stroke-width="3" fill="none"/>',
    "camera": '<path d="M36 32l5-9h18l5 9z" fill="{c}"/><rect x="13" y="31" width="74" height="48" rx="7" fill="{a}"/><circle cx="50" cy="55" r="19" fill="{c}"/><circle cx="50" cy="55" r="12" fill="{b}"/>'
              '<circle cx="50" cy="55" r="6" fill="{c}"/><circle cx="76" cy="41" r="4" fill="{b}"/>',
    "memory card": '<path d="M30 22c0-3 2-5 5-5h24l13 14v46c0 3-2 5-5 5H35c-3 0-5-2-5-5z" fill="{a}"/><path d="M37 22h5v13h-5zM46 22h5v13h-5zM55 24h5v11h-5z" fill="{b}"/><rect x="37" y="48" width="28" height="24" rx="3" fill="{c}"/>',
    "barbecue": '<path d="M34 72L26 88M66 72l8 16M50 76v12" stroke="{c}" stroke-width="5" stroke-linecap="round"/><path d="M18 50h64c0 18-14 30-32 30S18 68 18 50z" fill="{a}"/>'
                '<path d="M18 46c0-16 14-27 32-27s32 11 32 27z" fill="{c}"/><rect x="42" y="11" width="16" height="6" rx="3" fill="{b}"/>',
    "tongs": '<path d="M36 16c-9 26-6 46 6 66M54 16c9 26 6 46-6 66" stroke="{a}" stroke-width="7" fill="none" stroke-linecap="round"/><circle cx="45" cy="17" r="9" fill="{c}"/>'
             '<path d="M74 14v40" stroke="{c}" stroke-width="5" stroke-linecap="round"/><rect x="65" y="52" width="18" height="28" rx="5" fill="{b}"/>',
    "stroller": '<path d="M26 46h50c0 16-11 25-25 25S26 62 26 46z" fill="{a}"/><path d="M50 44V16c16 0 28 12 28 28z" fill="{b}"/><path d="M26 46L16 26" stroke="{c}" stroke-width="5" stroke-linecap="round"/>'
                '<circle cx="37" cy="79" r="8" fill="{c}"/><circle cx="67" cy="79" r="8" fill="{c}"/>',
    "footmuff": '<rect x="29" y="14" width="42" height="70" rx="20" fill="{a}"/><ellipse cx="50" cy="31" rx="13" ry="10" fill="{c}"/><path d="M50 44v36" stroke="{b}" stroke-width="4" stroke-dasharray="4 3"/>',
    "tent": '<path d="M50 20l42 60H8z" fill="{a}"/><path d="M50 20l16 60H34z" fill="{c}"/><path d="M50 20v60" stroke="{b}" stroke-width="2.5"/><path d="M50 20l-5-8M50 20l5-8" stroke="{c}" stroke-width="3"/>',
    "sleeping bag": '<g transform="rotate(-28 50 50)"><rect x="14" y="33" width="74" height="34" rx="17" fill="{a}"/><path d="M31 33a17 17 0 0 0 0 34z" fill="{b}"/><path d="M48 34v32M60 34v32M72 35v30" stroke="{c}" stroke-width="3"/></g>',
    "knife": '<g transform="rotate(-38 50 50)"><path d="M2 46h58v14C36 60 14 57 2 46z" fill="{b}"/><rect x="59" y="45" width="38" height="12" rx="5" fill="{a}"/><circle cx="70" cy="51" r="2" fill="{c}"/><circle cx="82" cy="51" r="2" fill="{c}"/><rect x="57" y="43" width="5" height="18" fill="{c}"/></g>',
    "cutting board": '<rect x="26" y="14" width="48" height="70" rx="9" fill="{a}"/><rect x="33" y="34" width="34" height="43" rx="5" fill="none" stroke="{c}" stroke-width="2.5"/><circle cx="50" cy="24" r="5" fill="{c}"/>'
                     '<path d="M40 45h20M40 55h20M40 65h14" stroke="{b}" stroke-width="2"/>',
    "turntable": '<rect x="11" y="26" width="78" height="54" rx="6" fill="{a}"/><circle cx="43" cy="53" r="22" fill="{c}"/><circle cx="43" cy="53" r="14" fill="none" stroke="{a}"/><circle cx="43" cy="53" r="7" fill="{b}"/>'
                 '<path d="M78 34v20L60 66" stroke="{b}" stroke-width="4" fill="none" stroke-linecap="round" stroke-linejoin="round"/><circle cx="78" cy="35" r="5" fill="{c}"/>',
    "record": '<circle cx="63" cy="50" r="28" fill="{c}"/><circle cx="63" cy="50" r="20" fill="none" stroke="{b}"/><circle cx="63" cy="50" r="9" fill="{b}"/><rect x="10" y="22" width="54" height="56" rx="2" fill="{a}"/>'
              '<path d="M18 64l14-22 10 14 6-8 10 16z" fill="{b}"/>',
    "raised bed": '<path d="M30 56c-2-14-10-18-16-18 0 10 6 17 16 18zM32 56c0-16 6-24 15-27 3 12-3 23-15 27zM68 56c-2-14-8-22-15-24-2 12 4 20 15 24zM70 56c2-12 8-16 15-17 1 10-5 16-15 17z" fill="{a}"/>'
                  '<rect x="10" y="56" width="80" height="24" rx="3" fill="{c}"/><path d="M10 68h80" stroke="{b}" stroke-width="2"/>',
    "seeds": '<rect x="27" y="14" width="46" height="70" rx="4" fill="{a}"/><rect x="27" y="14" width="46" height="12" rx="4" fill="{c}"/><path d="M50 74V48M50 56c-12 0-15-8-15-14 10 0 15 5 15 14zM50 50c0-9 5-14 15-14 0 8-4 14-15 14z" fill="{b}" stroke="{b}" stroke-width="2.5"/>',
    "blocks": '<rect x="14" y="52" width="30" height="30" rx="3" fill="{a}"/><path d="M48 82V66a19 19 0 0 1 38 0v16H76V68a9 9 0 0 0-18 0v14z" fill="{c}"/><path d="M29 18l19 30H10z" fill="{b}"/><circle cx="66" cy="32" r="12" fill="{a}"/>',
    "book": '<rect x="24" y="15" width="52" height="68" rx="4" fill="{a}"/><rect x="24" y="15" width="10" height="68" rx="4" fill="{c}"/><circle cx="55" cy="42" r="12" fill="{b}"/><path d="M44 64h22M48 71h14" stroke="{b}" stroke-width="3.5" stroke-linecap="round"/>',
    "lamp": '<path d="M36 14h28l14 32H22z" fill="{a}"/><path d="M50 46v32" stroke="{c}" stroke-width="6"/><rect x="32" y="76" width="36" height="7" rx="3" fill="{c}"/><path d="M60 46v14" stroke="{b}" stroke-width="2.5"/><circle cx="60" cy="62" r="3" fill="{b}"/>',
    "chair": '<path d="M30 14h40v38H30z" fill="{a}"/><rect x="24" y="50" width="52" height="11" rx="4" fill="{b}"/><path d="M29 61l-4 23M71 61l4 23M42 61v18M58 61v18" stroke="{c}" stroke-width="5" stroke-linecap="round"/><path d="M43 18v30M57 18v30" stroke="{c}" stroke-width="3"/>',
    "cup": '<path d="M22 34h46v26c0 13-9 21-23 21S22 73 22 60z" fill="{a}"/><path d="M68 42h6c7 0 11 4 11 10s-4 11-11 11h-7" fill="none" stroke="{c}" stroke-width="6"/><ellipse cx="45" cy="34" rx="23" ry="6" fill="{c}"/>'
           '<path d="M36 22c-4-6 4-7 0-13M50 22c-4-6 4-7 0-13" stroke="{b}" stroke-width="3" fill="none" stroke-linecap="round"/>',
    "shirt": '<path d="M34 18l-22 12 8 18 10-5v40h40V43l10 5 8-18-22-12c-4 8-28 8-32 0z" fill="{a}"/><path d="M34 18c4 8 28 8 32 0l-4-2c-4 5-20 5-24 0z" fill="{c}"/><circle cx="50" cy="52" r="9" fill="{b}"/>',
    "phone": '<rect x="31" y="11" width="38" height="74" rx="8" fill="{c}"/><rect x="35" y="19" width="30" height="54" rx="2" fill="{a}"/><circle cx="50" cy="79" r="3" fill="{b}"/><path d="M39 62l9-16 7 9 4-5 6 12z" fill="{b}"/>',
    "watch": '<path d="M38 10h24l3 22H35zM35 66h30l-3 22H38z" fill="{c}"/><circle cx="50" cy="49" r="24" fill="{a}"/><circle cx="50" cy="49" r="17" fill="{b}"/><path d="M50 38v12l8 5" stroke="{c}" stroke-width="3" fill="none" stroke-linecap="round"/>',
    "bottle": '<rect x="42" y="9" width="16" height="9" rx="2" fill="{c}"/><path d="M43 18h14v13c9 5 12 11 12 20v27c0 4-2 6-6 6H37c-4 0-6-2-6-6V51c0-9 3-15 12-20z" fill="{a}"/><rect x="31" y="50" width="38" height="20" fill="{b}"/>',
    "bag": '<path d="M36 38V28c0-18 28-18 28 0v10" fill="none" stroke="{c}" stroke-width="5"/><path d="M23 36h54l6 42c0 4-2 6-6 6H23c-4 0-6-2-6-6z" fill="{a}"/><path d="M22 48h56" stroke="{b}" stroke-width="3"/><circle cx="36" cy="42" r="2.5" fill="{c}"/><circle cx="64" cy="42" r="2.5" fill="{c}"/>',
    "ball": '<circle cx="50" cy="49" r="33" fill="{a}"/><path d="M50 16c-12 20-12 46 0 66M17 49c20 12 46 12 66 0" fill="none" stroke="{c}" stroke-width="4"/><circle cx="50" cy="49" r="33" fill="none" stroke="{b}" stroke-width="3"/>',
    "vase": '<path d="M40 40h20c0 8 12 14 12 26 0 12-8 18-22 18s-22-6-22-18c0-12 12-18 12-26z" fill="{a}"/><path d="M50 40V14M50 30c-9 0-13-6-13-12 9 0 13 4 13 12zM50 24c0-8 5-12 13-12 0 7-4 12-13 12z" fill="{c}" stroke="{c}" stroke-width="2.5"/><path d="M30 62h40" stroke="{b}" stroke-width="4"/>',
    "parcel": '<path d="M50 14l36 16v38L50 86 14 68V30z" fill="{a}"/><path d="M50 46l36-16v38L50 86z" fill="{c}"/><path d="M32 22l36 17v12l-9 4V43L23 26z" fill="{b}"/>',
}
# word of a title or category → what to draw
WORDS = {word: shape for shape, words in {
    "shoe": "shoe sneaker boot sandal footwear", "sock": "sock stocking", "coffee machine": "espresso machine kettle toaster appliance", "coffee bag": "bean roast coffee spice food snack",
    "camera": "camera photo lens", "memory card": "memory card usb disk", "barbecue": "barbecue grill stove cooker", "tongs": "tong cutlery fork spoon tool", "stroller": "stroller pram buggy",
    "footmuff": "footmuff blanket", "tent": "tent camping", "sleeping bag": "sleeping pillow", "knife": "knife knive scissor", "cutting board": "board tray", "turntable": "turntable speaker audio hifi",
    "record": "record vinyl music cd", "raised bed": "bed planter garden plant", "seeds": "seed sapling", "blocks": "block brick puzzle toy game", "book": "book novel notebook magazine",
    "lamp": "lamp light lantern candle", "chair": "chair sofa stool bench furniture table", "cup": "cup mug teacup tea bowl", "shirt": "shirt dress jacket coat clothing fashion apron", "phone": "phone mobile tablet",
    "watch": "watch clock jewellery", "bottle": "bottle wine perfume shampoo beauty oil", "bag": "bag backpack handbag luggage basket", "ball": "ball sport", "vase": "vase pot flower decoration ornament"}.items()
    for word in words.split()}
PLAIN = "parcel", "bag", "bottle", "cup", "vase", "lamp", "book", "ball", "shirt", "watch" # for what no word is known of

def shape_of(
    title: str,
    category: str, # its name or path
) -> str:          # of SHAPES
    "What an item looks like: by the last word of its title that is known, then of its category, else one shape per category."
    for text in (title, category.rpartition("/")[2], category):
        words = re.findall(r"[a-z]+", text.lower())
        for before, word in reversed(list(zip(["", *words], words, strict=False))):
            for known in (word, word.removesuffix("s"), word.removesuffix("es")):
                if f"{before} {known}" in SHAPES: return f"{before} {known}" # a sleeping bag is no bag
                if known in WORDS: return WORDS[known]
    return PLAIN[crc32(category.encode()) % len(PLAIN)]

def _colour(hue: float, light: float, full: float) -> str: # hue in turns
    return "#" + "".join(f"{round(255*x):02x}" for x in hls_to_rgb(hue % 1, light, full))

@lru_cache(maxsize=4096)
def picture(
    item_id: str,
    title: str,
    category: str,
) -> str: # address of an SVG, for `src` of an image
    "The picture of a product. No text of the shop gets into it."
    n, place = crc32(item_id.encode()), crc32(category.encode())
    hue, turn = (place % 360)/360, (n % 97)/97
    ground = (_colour(hue, 0.93, 0.45), _colour(hue + 0.06, 0.84, 0.45))
    paint = {"a": _colour(hue + 0.5 + 0.45*(turn - 0.5), 0.46, 0.5), "b": _colour(turn, 0.8, 0.6), "c": _colour(hue + 0.55, 0.24, 0.3)}
    x, y, r = 12 + n // 97 % 76, 14 + n // 7_372 % 50, 20 + n // 368_600 % 22 # a soft disc behind it
    body = SHAPES[shape_of(title, category)].format(**paint)
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-20 -6 140 112"><defs><linearGradient id="g" x2="1" y2="1"><stop stop-color="{ground[0]}"/><stop offset="1" stop-color="{ground[1]}"/></linearGradient></defs>'
           f'<path d="M-20-6h140v112H-20z" fill="url(#g)"/><circle cx="{x}" cy="{y}" r="{r}" fill="#fff" opacity=".45"/><ellipse cx="50" cy="88" rx="40" ry="5" fill="#000" opacity=".12"/>{body}</svg>')
    return "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()
