"""The reference of the frames that cross stage borders, of the event record and of the database, from where they are defined."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

from make_python import cell, modules, read

ROOT = Path(__file__).resolve().parents[1]
ABOUT = """# Schemas

A frame that crosses a border between two stages has one of these schemas, and `reco.schemas.conform` holds it to it: a column that is missing or of another type
is an error that names it. [nbs/00_schemas](../../nbs/00_schemas.ipynb) has the reasons. This page is made from the definitions when the site is built.

The lake's tables `interactions`, `exposures`, `catalog`, `quarantine` and `batches` have the schemas of their names.
"""


def frames() -> Iterator[tuple[str, str, list[tuple[str, str, bool, str]]]]: # name; module; column, type, required, meaning
    "Every `FrameSchema` of the package, as it is written."
    for module, path in modules().items():
        source = read(path)
        for node in source.tree.body:
            call = node.value if isinstance(node, ast.Assign) else None
            if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "FrameSchema" and isinstance(call.args[1], ast.Dict)): continue
            given = next((k.value for k in call.keywords if k.arg == "optional"), None)
            optional = {c.value for c in ast.walk(given) if isinstance(c, ast.Constant)} if given else set()
            columns = [(k.value, ast.unparse(v).removeprefix("pl."), k.value not in optional, source.comments.get(v.end_lineno, ""))
                       for k, v in zip(call.args[1].keys, call.args[1].values, strict=True) if isinstance(k, ast.Constant)]
            yield call.args[0].value, module, columns


def page() -> str:
    """The whole page."""
    lines = [ABOUT]
    for name, module, columns in frames():
        lines += [f"## {name}", "", f"In [{module}](python/{module}.md).", "", "| column | type | needed | meaning |", "|---|---|---|---|"]
        lines += [f"| `{c}` | `{kind}` | {'yes' if needed else ''} | {cell(about)} |" for c, kind, needed, about in columns]
        lines.append("")
    record = json.loads((ROOT / "data/schema/user_event.avsc").read_text())
    lines += ["## The event on the bus", "", f"[data/schema/user_event.avsc](../../data/schema/user_event.avsc): {record.get('doc', 'the Avro record of one event')}", "",
              "| field | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{f['name']}` | `{avro(f['type'])}` | {'`' + json.dumps(f['default']) + '`' if 'default' in f else ''} | {cell(f.get('doc', ''))} |" for f in record["fields"]]
    sql = (ROOT / "data/schema/postgres_schema.sql").read_text().strip()
    return "\n".join([*lines, "", "## Orders and catalogue in PostgreSQL", "", "What `[data] source = postgres` reads.", "", "```sql", sql, "```", ""])


def avro(kind: object) -> str: # of the record
    if isinstance(kind, list): return " or ".join(avro(k) for k in kind)
    if isinstance(kind, dict): return " ".join(kind["symbols"]) if kind["type"] == "enum" else kind.get("logicalType", str(kind["type"]))
    return str(kind)
