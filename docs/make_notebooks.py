"""Notebooks as pages: prose, code, and the outputs that are committed. Nothing is run."""

import base64
import json
import re
from hashlib import sha256
from pathlib import Path

GROUPS = (("0", "03", "Schemas, settings, ids"), ("04", "19", "Data"), ("20", "29", "Features"), ("30", "39", "Candidates"), ("40", "46", "Ranking"),
          ("47", "55", "Re-ranking"), ("56", "64", "Bundles and answers"), ("70", "79", "Evaluation"), ("80", "85", "Tracking and monitoring"),
          ("86", "89", "Experiments and what is earned"), ("90", "99", "Walkthroughs"))


def nav(
    pages: list[str], # nbs/31_candidates.popularity.md …
) -> list[dict]:
    "Notebooks in groups by their numbers."
    number = lambda page: page.split("/")[-1][:2]
    return [{title: found} for first, last, title in GROUPS if (found := [p for p in sorted(pages) if first <= number(p) <= last])]


def page(
    path: Path,
) -> tuple[str, dict[str, bytes]]: # Markdown; name → PNG
    "One notebook."
    cells, pictures = json.loads(path.read_text("utf-8"))["cells"], {}
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(source)
        elif cell["cell_type"] == "code": parts += [*code(source), *(o for output in cell["outputs"] for o in shown(output, pictures))]
    return "\n\n".join(parts) + "\n", pictures


def code(
    source: str,
) -> list[str]: # nothing of a cell that only tells nbdev something
    "A cell of code; what goes into `reco` has a line beside it."
    plain = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")
    if not plain: return []
    classes = "python .exported" if re.search(r"^#\|\s*export", source, re.MULTILINE) else "python"
    return [fenced(plain, classes)]


def fenced(text: str, classes: str) -> str: # a block that holds blocks has a longer fence
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{fence} {{ .{classes} }}\n{text}\n{fence}"


def shown(
    output: dict,
    pictures: dict[str, bytes], # grows
) -> list[str]:
    "An output in the best form that it has."
    data = output.get("data", {})
    text = lambda kind: "".join(data[kind])
    if "image/png" in data:
        raw = base64.b64decode(text("image/png"))
        name = f"{sha256(raw).hexdigest()[:12]}.png"
        pictures[name] = raw
        about = re.sub(r"[\[\]<>]|\s+", " ", "".join(data.get("text/plain", "a plot"))).strip()
        return [f"![{about}](pictures/{name}){{ .plot }}"]
    if "text/markdown" in data: return [text("text/markdown")]
    if "text/html" in data: return [f'<div class="output">{table(text("text/html"))}</div>']
    plain = "".join(output.get("text", "")) or (text("text/plain") if "text/plain" in data else "\n".join(output.get("traceback", [])))
    return [f'<div class="output" markdown>\n\n{fenced(plain.rstrip(), "text")}\n\n</div>'] if plain.strip() else []


def table(html: str) -> str: # without the styles that each frame brings along
    return re.sub(r"\n\s*\n", "\n", re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)).strip()
