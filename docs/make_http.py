"""The reference of the HTTP API, from the OpenAPI document of `app.contract`: what /docs of a running endpoint shows, to be read without one."""

import json
import re
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from app.contract import OPEN, Problem, create_app

ABOUT = """# HTTP API

Version {version} of the contract. A running endpoint shows the same at `/docs`, and the document itself at `/openapi.json`; this page is made from it when the site is built.
Clients: [Python](../how-to/client.md) and [TypeScript types](../../clients/typescript/README.md).

A key goes into the header `X-API-Key`, or into `Authorization: Bearer`; where no keys are set nobody needs one. `client` and `admin` below are the roles that may ask. Every error is
a [problem](#problem), `application/problem+json`; 500 means a defect of the endpoint, 503 that asking again later will help (`Retry-After` says when).
The examples are of the contract's own values; a test sends each one to a real endpoint.
"""
METHODS = ("get", "put", "post", "delete")


@cache
def openapi() -> dict:
    "The document. Describing the routes needs nothing of what answers behind them."
    return create_app(SimpleNamespace(meter=None)).openapi()


def routes() -> Iterator[tuple[str, str, dict]]: # method, path, what is said of it
    "Every route, by what it is for."
    for path, methods in openapi()["paths"].items():
        for method in METHODS:
            if method in methods: yield method.upper(), path, methods[method]


def page() -> str:
    """The whole page."""
    api = openapi()
    lines = [ABOUT.format(version=api["info"]["version"])]
    for tag in dict.fromkeys(t for _, _, r in routes() for t in r["tags"]):
        lines += [f"## {tag.capitalize()}", ""]
        for method, path, route in routes():
            if tag in route["tags"]: lines += of_route(method, path, route)
    lines += ["## Bodies", ""]
    for name, schema in (api["components"]["schemas"] | {"Problem": Problem.model_json_schema()}).items(): lines += of_schema(name, schema)
    return "\n".join(lines) + "\n"


def of_route(method: str, path: str, route: dict) -> list[str]:
    "One route: what it takes, what it answers, an example."
    lines = [f"### {method} {path} {{ #{anchor(method, path)} }}", "", f"{route['summary']}. Who may ask: {role(path, route)}.", ""]
    if found := route.get("parameters", []):
        lines += ["| parameter | in | type | default | meaning |", "|---|---|---|---|---|"]
        lines += [f"| `{p['name']}` | {p['in']}{', needed' if p.get('required') else ''} | {kind(p['schema'])} | {default(p['schema'])} | {p.get('description', '')} |" for p in found]
        lines.append("")
    if body := schema_of(route.get("requestBody", {})): lines += [f"**Body** {kind(body)}", ""]
    lines += ["| answer | with | meaning |", "|---|---|---|"]
    for status, answer in sorted(route["responses"].items()):
        told = ", ".join(f"`{h}`" for h in answer.get("headers", {}))
        what = "[Problem](#problem)" if status >= "400" else kind(schema_of(answer)) or "text"
        meaning = answer["description"] if answer["description"] != "Successful Response" else "" # FastAPI's words, where the contract has none
        lines.append(f"| {status} | {what} | {meaning}{f'; headers {told}' if told else ''} |")
    request, answer = example(method, path, route)
    return [*lines, "", "```bash", request, "```", "", *([f"```json\n{answer}\n```", ""] if answer else [])]


def anchor(method: str, path: str) -> str: return re.sub(r"[^a-z0-9_]+", "-", f"{method}-{path}".lower()).strip("-")


def role(path: str, route: dict) -> str: # anybody, client or admin; an admin may do what a client may
    "Whose key the route takes."
    if path in OPEN: return "anybody"
    return "admin" if route["responses"].get("403", {}).get("description", "").startswith("not an admin") else "client"


def schema_of(part: dict) -> dict: # of a body or an answer
    return next((c["schema"] for kind, c in part.get("content", {}).items() if kind == "application/json" and "schema" in c), {})


def kind(schema: dict) -> str: # words, with links to bodies
    "A type with its limits."
    if "$ref" in schema: return f"[{(name := schema['$ref'].split('/')[-1])}](#{name.lower()})"
    if options := schema.get("anyOf"): return " or ".join(k for o in options if (k := kind(o)) and k != "null")
    if "enum" in schema: return " ".join(f"`{w}`" for w in schema["enum"])
    if "const" in schema: return f"`{schema['const']}`"
    if schema.get("type") == "array": return f"list of {kind(schema['items'])}{limits(schema)}"
    if "additionalProperties" in schema and schema.get("type") == "object" and schema["additionalProperties"] is not False and isinstance(schema["additionalProperties"], dict):
        return f"object of {kind(schema['additionalProperties'])}"
    names = {"integer": "whole number", "string": "text", "boolean": "true or false"}
    return names.get(schema.get("type", ""), schema.get("type", "")) + limits(schema)


LIMITS = (("minimum", "from {:,}"), ("exclusiveMinimum", "above {:,}"), ("maximum", "to {:,}"), ("exclusiveMaximum", "below {:,}"),
          ("minLength", "from {} characters"), ("maxLength", "to {:,} characters"), ("minItems", "at least {}"), ("maxItems", "at most {:,}"))


def limits(schema: dict) -> str: # ", from 1 to 100"
    said = " ".join(form.format(schema[name]) for name, form in LIMITS if name in schema)
    if said.count("characters") == 2: said = said.replace(" characters", "", 1)
    return f", {said.replace(' at most', ', at most')}" if said else ""


def default(schema: dict) -> str: return f"`{json.dumps(schema['default'])}`" if schema.get("default") not in (None, "", [], ()) else ""


def of_schema(name: str, schema: dict) -> list[str]:
    "One body."
    lines = [f"### {name} {{ #{name.lower()} }}", "", schema.get("description", ""), "", "| field | type | default | meaning |", "|---|---|---|---|"]
    needed = schema.get("required", [])
    for field, about in schema.get("properties", {}).items():
        lines.append(f"| `{field}`{', needed' if field in needed else ''} | {kind(about)} | {default(about)} | {about.get('description', '')} |")
    return [*lines, ""]


# ---- examples -----------------------------------------------------------------------------------------------------

# what the schemas have no example of: values of one small shop
WORDS = {"user_id": "user_123", "item_id": "product_45", "items": "product_45,product_7", "event_id": "e-1", "event": "view", "ts": "2026-11-01T12:00:00Z", "session_id": "s-1",
         "order_id": "o-1", "quantity": 1, "price": 39.0, "request_id": "r-1", "surface": "for_you", "title": "Reading lamp", "description": "Warm light, 40 cm", "category": "lights",
         "category_path": "home / lights", "brand": "lumen", "discount": 0.1, "stock": 12, "k": 5, "who": "ann", "bundle_id": "2026-11-01T000000Z-1a2b3c4d", "reason": "because you viewed Camping stove",
         "variant": "variety=more_variety", "without": ["als"], "seconds": {"retrieve": 0.001, "score": 0.0004}, "sources": {"als": 3}, "proposed": {"als": 30, "covisit": 60},
         "dropped": {"out_of_stock": 1}, "count": 84, "moved": "varied", "place": 4, "slot": 1, "rows": {"interactions": 12, "exposures": 40}, "before": "2026-10-25T000000Z-5e6f7a8b",
         "at": "2026-11-02T08:15:00+00:00", "version": 7, "accepted": 1}
TYPES = {"string": str, "integer": int, "number": (int, float), "array": list, "object": dict, "boolean": bool}
WHOLE = {"Recommendation": {"item_id": "product_7", "score": 0.71}, "RefusedBundle": None} # answers' parts that are not spelled out
SPARE = {"Event": ("event_id", "ts", "user_id", "item_id", "event", "request_id"), "SessionEvent": ("item_id", "event"), "Session": ("k", "events"), "BatchAsk": ("user_id", "k"),
         "Change": ("title", "category", "price", "stock")} # fields of an example that is sent


def example(method: str, path: str, route: dict) -> tuple[str, str]: # a curl, and the JSON that comes back (empty where it is something else)
    "A request with its answer."
    for p in route.get("parameters", []):
        if p["in"] == "path": path = path.replace(f"{{{p['name']}}}", quote(str(WORDS[p["name"]])))
    needed = [p for p in route.get("parameters", []) if p["in"] == "query" and p.get("required")]
    query = "&".join(f"{p['name']}={quote(str(WORDS[p['name']]), safe=',')}" for p in needed)
    body = schema_of(route.get("requestBody", {}))
    words = ["curl", *([] if method == "GET" else ["-X", method])]
    if body: words += ["-H", "'Content-Type: application/json'", f"'http://127.0.0.1:8000{path}' \\\n    -d '{json.dumps(made(body, sent=True), ensure_ascii=False)}'"]
    else: words.append(f"'http://127.0.0.1:8000{path}{'?' + query if query else ''}'")
    return " ".join(words), answer(route)


def answer(route: dict) -> str: # JSON, indented
    good = next(a for status, a in sorted(route["responses"].items()) if status < "300")
    said = good.get("content", {}).get("application/json", {}).get("example")
    schema = schema_of(good)
    return json.dumps(said or made(schema), indent=1, ensure_ascii=False) if said or schema.get("$ref") else ""


def made(
    schema: dict,
    name: str = "",    # of the field
    sent: bool = False, # as a caller would send it, not all that there can be
) -> Any:
    "A value that fits."
    if "$ref" in schema:
        of = schema["$ref"].split("/")[-1]
        fields = openapi()["components"]["schemas"][of].get("properties", {})
        if of in WHOLE and not sent: return WHOLE[of]
        found = {n: made(f, n, sent) for n, f in fields.items() if not sent or n in SPARE.get(of, fields)}
        return {n: v for n, v in found.items() if v is not None}
    if options := schema.get("anyOf"): return made(options[1 if name == "ts" and sent else 0], name, sent)
    if name in WORDS and isinstance(WORDS[name], TYPES[schema["type"]]): return WORDS[name]
    if schema.get("examples"): return schema["examples"][0]
    if "enum" in schema: return schema["enum"][0]
    if schema.get("type") == "array": return [made(schema["items"], "item_id", sent)]
    if schema.get("type") == "object": return {}
    return {"integer": 1_793_534_400_000 if name == "ts" else 1, "number": 0.5, "boolean": False, "string": "…"}.get(schema.get("type", ""), None)
