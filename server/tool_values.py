"""Arguments of calls that are no JSON in the model's text: their types by the schema, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from server.python_values import PythonValue

__all__ = ["json_of", "json_text", "kinds_of", "kinds_of_parameter", "resolved"]

_ALL_KINDS = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_MOST_REFERENCES = 16


def kinds_of_parameter(schema: Mapping[str, Any] | None, name: str) -> frozenset[str]:
    """The JSON types that a function's schema admits for one of its parameters; all where it does not say."""
    root: Mapping[str, Any] = schema or {}
    top = resolved(root, root)
    properties = top.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return kinds_of(properties[name], root)
    return kinds_of(top.get("additionalProperties", True), root)


def kinds_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema admits, as far as it tells; it may refer to definitions of `root`."""
    return _kinds(schema, root, {}) or _ALL_KINDS


def _kinds(schema: Any, root: Mapping[str, Any], known: dict[int, frozenset[str]]) -> frozenset[str]:
    """What is `known` is so by the schema's place in memory; one within itself adds nothing."""
    if not isinstance(schema, Mapping):
        return _ALL_KINDS
    if (place := id(schema)) in known:
        return known[place]
    known[place] = frozenset()
    schema, kinds = resolved(schema, root), _ALL_KINDS
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        kinds = _with_integers(kind for kind in named if isinstance(kind, str)) & _ALL_KINDS or _ALL_KINDS
    if isinstance(schema.get("enum"), list):
        kinds &= _with_integers(map(_kind_of, schema["enum"]))
    if "const" in schema:
        kinds &= {_kind_of(schema["const"])}
    for keyword in ("anyOf", "oneOf"):
        if isinstance(alternatives := schema.get(keyword), list) and alternatives:
            kinds &= frozenset().union(*(_kinds(each, root, known) for each in alternatives))
    if isinstance(parts := schema.get("allOf"), list):
        for part in parts:
            kinds &= _kinds(part, root, known)
    known[place] = kinds
    return kinds


def _with_integers(kinds: Iterable[str]) -> frozenset[str]:
    """Types of JSON values; a number may be an integer."""
    found = frozenset(kinds)
    return found | {"integer"} if "number" in found else found


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema with what it refers to in `root` in place of the reference; as it is if that is not there."""
    for _ in range(_MOST_REFERENCES):
        if not isinstance(reference := schema.get("$ref"), str) or not reference.startswith("#"):
            break
        found: Any = root
        for part in reference[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            found = found.get(part) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping):
            break
        schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
    return schema


def json_of(text: str, kinds: frozenset[str]) -> str:
    """A parameter's text as a JSON value of one of these types; as a string where it is none of them.

    Where it may be no string, whatever it says in JSON, or as Python writes the same, is its value.
    """
    written = text.strip()
    try:
        value = json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        written = PythonValue.whole(written) or ""
        try:
            value = json.loads(written, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return json_text(text)
    if "string" in kinds and (isinstance(value, str) or not _admits(kinds, value)):
        return json_text(text)
    return written


def _admits(kinds: frozenset[str], value: Any) -> bool:
    """Whether a JSON value is of one of these types."""
    kind = _kind_of(value)
    return kind in kinds or (kind == "number" and "integer" in kinds and value.is_integer())


def json_text(text: str) -> str:
    """A JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _kind_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
