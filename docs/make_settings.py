"""The reference of the settings, from `reco.settings`: what a key means is its description there."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from reco.moment import BUILT_IN
from reco.sections.candidates import Quota
from reco.sections.data import Limit
from reco.settings import Settings

ABOUT = """# Settings

Every key of `settings.ini`: {keys} in {sections} sections. A key is set in the file, under its section, or by its environment variable (below the key), which counts more. A name
that is not here is an error that offers the nearest one; so is a value that is not allowed. Paths are relative to the file.
[nbs/01_settings](../../nbs/01_settings.ipynb) shows how they are read; `settings.ini` of the repository has each key with its comment.

This page is made from `reco.settings` when the site is built.
"""
CANDIDATES = """Candidate sources and how many items each may propose for a request: a number from 0 (off) to 1000, or `module:Class` and a number for
[a source of your own](../how-to/candidate-source.md), under a name of your own."""


def sections() -> Iterator[tuple[str, dict[str, FieldInfo]]]: # a section and its keys; none for [candidates], whose keys are sources
    "The sections in the order of the settings."
    for name, info in Settings.model_fields.items():
        if name != "root": yield name, getattr(info.annotation, "model_fields", {})


def keys() -> list[tuple[str, str]]: # (section, key)
    "Every key that has a name of the platform's."
    return [(s, k) for s, fields in sections() for k in (fields or Settings().candidates)]


def page() -> str:
    """The whole page."""
    lines = [ABOUT.format(keys=len(keys()), sections=len(list(sections())))]
    for section, fields in sections():
        lines += [f"## [{section}] {{ #{section} }}", ""]
        if not fields: lines += [CANDIDATES, ""]
        lines += ["| key and variable | meaning | type | default | allowed |", "|---|---|---|---|---|"]
        lines += [row(section, key, info) for key, info in fields.items()] or [source(name, q) for name, q in Settings().candidates.items()]
        lines.append("")
    return "\n".join(lines)


def row(section: str, key: str, info: FieldInfo) -> str:
    "A line of the table."
    default = info.get_default(call_default_factory=True)
    said = [f"`{key}`<br>`{variable(section, key)}`", text(info.description or ""), kind(info.annotation), value(default), allowed(info)]
    return f"| {' | '.join(said)} |"


def source(name: str, quota: Quota) -> str:
    return f"| `{name}`<br>`{variable('candidates', name)}` | [{module(name)}](python/{module(name)}.md) | quota | `{quota.quota}` | from 0 to 1000 |"


def module(name: str) -> str: return BUILT_IN[name].split(":")[0] # of a source


def variable(section: str, key: str) -> str: return f"RECO_{section}_{key}".upper()


def kind(annotation: Any) -> str: # as an operator says it
    if annotation is SecretStr: return "secret"
    if annotation is Limit: return "limit"
    if get_origin(annotation) is Literal: return "word"
    if get_origin(annotation) is Annotated: return kind(get_args(annotation)[0])
    if inner := [a for a in get_args(annotation) if a is not type(None)]: return " or ".join(dict.fromkeys(kind(a) for a in inner if not isinstance(a, str)))
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def value(default: Any) -> str:
    "A default as it is written in the file."
    if isinstance(default, SecretStr) or default in ("", None): return "empty"
    if isinstance(default, Limit): return f"`{default.value:g} {default.severity}`"
    if isinstance(default, bool): return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


BOUNDS = (("ge", "from {}"), ("gt", "above {}"), ("le", "to {}"), ("lt", "below {}"))


def allowed(info: FieldInfo) -> str: # words, or limits
    "What the section takes."
    if info.annotation is Limit: return "from 0, then `error` or `warn`"
    words = [w for a in (info.annotation, *get_args(info.annotation)) if get_origin(a) is Literal for w in get_args(a)]
    inner = [x for a in get_args(info.annotation) if get_origin(a) is Annotated for f in get_args(a)[1:] for x in getattr(f, "metadata", [f])]
    limits = {n: getattr(m, n) for m in (*info.metadata, *inner) for n in ("ge", "gt", "le", "lt", "min_length", "pattern") if getattr(m, n, None) is not None}
    said = [f"`{w}`" for w in words] and [" ".join(f"`{w}`" for w in words)]
    said += [" ".join(form.format(f"{limits[n]:,}" if limits[n] >= 10_000 else f"{limits[n]:g}") for n, form in BOUNDS if n in limits)] if limits else []
    if "pattern" in limits: said.append(f"`{limits['pattern']}`")
    if "min_length" in limits: said.append("not empty")
    return ", ".join(s for s in said if s)


def text(about: str) -> str: return about.replace("|", "\\|").replace("<", "&lt;")
