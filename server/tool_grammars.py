"""Grammars of calls whose arguments are no JSON: what a schema's properties come to in such a form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.tool_values import kinds_of, resolved
from server.xml_calls import TaggedCall

__all__ = ["FormError", "Function", "arguments_schema", "json_schema", "python_call", "xml_call"]

_AS_TEMPLATES_WRITE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` writes it: what models were shown, and no tokens for white space."""

_KINDS = ("string", "number", "integer", "boolean", "null", "object", "array")
_NOT_OF_FUNCTIONS = (
    *("anyOf", "oneOf", "allOf", "not", "if", "enum", "const", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "dependencies", "dependentRequired", "dependentSchemas"),
)
_NOT_OF_TEXTS = ("allOf", "not", "if")
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$schema", "$id", "$defs", "definitions", "discriminator"),
}
_OF_TEXTS = {"type", "enum", "pattern", "minLength", "maxLength"}
_ANY_TEXT = r"/(.|\n)*/"
_DATE, _TIME = (
    r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]",
)
_ZONE = r"(\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME + _ZONE,
    "date-time": f"{_DATE}T{_TIME}{_ZONE}",
    "uuid": "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
}
_MOST_LEAVES, _MOST_DEEP = 64, 16
_LONGEST = 100_000
_BEGINS = {"number": r"\-+.0-9", "integer": r"\-+.0-9", "array": r"\[", "object": "{"}
_SAID = {"boolean": "true|false|True|False", "null": "null|None"}
"""What is read as a value of these types, where a parameter may have such; before it, how others begin."""
_WORDS: dict[Any, list[Any]] = {"boolean": [True, False], "null": [None]}
_PYTHON_WORDS = {"boolean": ("True", "False"), "null": ("None",)}


def _without(mark: str) -> str:
    """A pattern of texts that do not have the mark in them, of which no other character is like its first.

    To a lexer `~` of those that have it would be simpler to say, and too much where a length is bounded, too:
    what no bounded text can become any more it would have to find out, character by character.
    """
    first, behind = mark[0], ""
    for char in map(_in_pattern, reversed(mark[1:])):
        goes_on = behind and f"|{char}{behind}"
        behind = f"([^{first}{char}][^{first}]*{goes_on})?"
    return f"[^{first}]*({first}{behind})*"


def _in_pattern(char: str) -> str:
    return rf"\{char}" if char == "/" else char


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called.

    Args:
        name: its name.
        parameters: the JSON schema of its arguments, which are an object; None if it has none.
        strict: what llguidance knows nothing of in the schema is an error, and not left to the model.
    """

    name: str
    parameters: Mapping[str, Any] | None
    strict: bool = False


class FormError(Exception):
    """A schema that the form of calls has no room for.

    Args:
        index: of the function.
        path: of the schema within the function's, with a dot before each name; empty for all of it.
        reason: what is wrong.
    """

    def __init__(self, index: int, path: str, reason: str) -> None:
        super().__init__(reason)
        self.index, self.path = index, path


def json_schema(schema: Any, *, strict: bool, written: Mapping[str, Any] = _AS_TEMPLATES_WRITE) -> str:
    """As a rule of a grammar has it; `written` says of what stands between values."""
    told = dict(schema) if isinstance(schema, Mapping) else {} if schema is not False else {"not": {}}
    return json.dumps({**told, "x-guidance": {**written, "lenient": not strict}})


def arguments_schema(function: Function, written: Mapping[str, Any] = _AS_TEMPLATES_WRITE) -> str:
    """`json_schema` of arguments, which are an object whatever else the schema says."""
    parameters = function.parameters
    schema: dict[str, Any] = {"additionalProperties": False} if parameters is None else dict(parameters)
    if "$ref" not in schema or "type" in schema:
        schema["type"] = "object"
    return json_schema(schema, strict=function.strict, written=written)


def xml_call(index: int, function: Function, form: type[TaggedCall], ids: Mapping[str, int]) -> list[str]:
    """The rules of `arguments_{index}`: parameters between tags, in the schema's order.

    Args:
        index: of the function.
        function: that is called.
        form: of the call.
        ids: of tags that are tokens of their own.

    Raises:
        FormError: as it says.
    """
    opened, closed = form.behind_name + form.padding, form.padding + form.value_end + form.line
    end, not_closed = _in_tokens(closed, ids), f"/{_without(form.value_end)}/"
    rules: list[str] = []
    names: list[str] = []

    def rule(at: int, parameter: _Parameter) -> str:
        """Of a value with the tag behind it."""
        text, value = _split(parameter, form.value_end)
        ways = []
        if text:
            text = f"TEXT_{index}_{at}: ({text} & {not_closed})"
            # Text is as long as may be, so that its end is known by what is behind it, or is a token.
            apart = form.value_end in ids
            rules.append(text if apart else f"{text} {end}")
            ways.append(f"TEXT_{index}_{at} {end}" if apart else f"TEXT_{index}_{at}")
        if value is not None:
            rules.append(f"json_{index}_{at}: %json {json_schema(value, strict=function.strict)}")
            words = _PYTHON_WORDS["boolean"] if value == {"type": "boolean"} else ()
            ways.append(f"({' | '.join([f'json_{index}_{at}', *map(json.dumps, words)])}) {end}")
        return f"({' | '.join(ways)})"

    written = ['""']
    for at, parameter in enumerate(_parameters(index, function, re.compile(r"[^<>\n]{1,256}"))):
        if parameter.name is None:
            other = f" & ~({_one_of(names)})" if names else ""
            rules.append(f"KEY_{index}: /[^<>\\n]{{1,64}}/{other}")
            parts = _in_tokens(form.before_name, ids), f"KEY_{index}", _in_tokens(opened, ids)
            written.append(f"({' '.join(parts)} {rule(at, parameter)})*")
            continue
        names.append(parameter.name)
        one = f"{_in_tokens(form.before_name + parameter.name + opened, ids)} {rule(at, parameter)}"
        written.append(one if parameter.required else f"({one})?")
    return [f"arguments_{index}: {' '.join(written)}", *rules]


def _in_tokens(text: str, ids: Mapping[str, int]) -> str:
    """Of a rule, with what is a token of its own in the text as that."""
    parts = re.split(f"({'|'.join(map(re.escape, ids))})", text) if ids else [text]
    return " ".join(f"<[{ids[part]}]>" if part in ids else json.dumps(part) for part in parts if part)


def python_call(index: int, function: Function, words: bool) -> list[str]:
    """The rules of `arguments_{index}`: keywords and values with commas between, in the schema's order.

    Args:
        index: of the function.
        function: that is called.
        words: True, False and None are values; JSON's words are none where nothing else may stand.

    Raises:
        FormError: as it says.
    """
    rules: list[str] = []
    names: list[str] = []
    parameters = list(_parameters(index, function, re.compile(r"[^\W\d]\w{0,255}")))
    for at, parameter in enumerate(parameters):
        kinds = _free_kinds(parameter.schema, parameter.root) if words else frozenset()
        told = [word for kind, some in _PYTHON_WORDS.items() if kind in kinds for word in some]
        if not kinds or kinds - set(_PYTHON_WORDS):
            value = f"json_{index}_{at}"
            rules.append(f"{value}: %json {json_schema(_within(parameter), strict=function.strict)}")
            value = f"({_one_of(told)} | {value})" if told else value
        else:
            value = f"({_one_of(told)})"
        if parameter.name is None:
            other = f" & ~({_one_of(names)})" if names else ""
            rules.append(f"KEY_{index}: /[a-zA-Z_][a-zA-Z0-9_]{{0,63}}/{other}")
            key = f'KEY_{index} "="'
        else:
            names.append(parameter.name)
            key = json.dumps(f"{parameter.name}=")
        rules.append(f"one_{index}_{at}: {key} {value}")
    # By what has been written: nothing, or something that a comma follows.
    first, more = f"first_{index}_", f"more_{index}_"
    for at, parameter in enumerate(parameters):
        one = f"one_{index}_{at}"
        skipped = "" if parameter.required else f" | {first}{at + 1}"
        rules.append(f"{first}{at}: {one} {more}{at if parameter.name is None else at + 1}{skipped}")
        behind = f'", " {one}'
        how = "" if parameter.required else "*" if parameter.name is None else "?"
        rules.append(f"{more}{at}: ({behind}){how} {more}{at + 1}")
    rules += [f'{first}{len(parameters)}: ""', f'{more}{len(parameters)}: ""']
    return [f"arguments_{index}: {first}0", *rules]


def _free_kinds(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """The JSON types of which a schema plainly admits every value; "" for what is not plain beside them."""
    if not isinstance(schema, Mapping):
        return frozenset(_KINDS) if schema is True else frozenset()
    schema = resolved(schema, root)
    said = set(schema) - _ANNOTATIONS
    if not said:
        return frozenset(_KINDS)
    if said == {"anyOf"} and isinstance(parts := schema["anyOf"], list) and depth < 2:
        found = [_free_kinds(part, root, depth + 1) for part in parts[:_MOST_LEAVES]]
        return frozenset().union(*found, () if all(found) else {""})
    kinds = schema.get("type", ())
    named = frozenset(kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind in _KINDS)
    return named if said == {"type"} else frozenset()


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One property of a function's arguments; without a name, all others that it may have."""

    index: int
    name: str | None
    schema: Any
    required: bool
    root: Mapping[str, Any]
    strict: bool

    @property
    def path(self) -> str:
        return ".additionalProperties" if self.name is None else f".properties.{self.name}"


def _parameters(index: int, function: Function, names: re.Pattern[str]) -> Iterator[_Parameter]:
    """Of which names have to be of this form."""
    root = function.parameters
    if root is None:
        return
    schema = resolved(root, root)
    for keyword in _NOT_OF_FUNCTIONS:
        if keyword in schema:
            reason = f"has no place in calls of this model's form, which are lists of parameters: {keyword}"
            raise FormError(index, "", reason)
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping):
        raise FormError(index, ".properties", "must be an object")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise FormError(index, ".required", "must be a list of strings")
    others = schema.get("additionalProperties", not properties)
    for name in [*properties, *(name for name in required if name not in properties)]:
        path = f".properties.{name}"
        if not names.fullmatch(name):
            raise FormError(
                index, path, "the name cannot be that of a parameter in calls of this model's form"
            )
        value = properties.get(name, schema.get("additionalProperties", True))
        if value is False:
            if name in required:
                raise FormError(index, path, "admits no value")
            continue
        yield _Parameter(index, name, value, name in required, root, function.strict)
    if others is not False:
        yield _Parameter(index, None, others, False, root, function.strict)


def _error(parameter: _Parameter, reason: str) -> FormError:
    return FormError(parameter.index, parameter.path, reason)


def _within(parameter: _Parameter) -> Any:
    """Its schema with the definitions that it may refer to."""
    schema, root = parameter.schema, parameter.root
    if not isinstance(schema, Mapping):
        return schema
    for reference in _references(schema):
        if not re.match(r"#/(\$defs|definitions)/", reference):
            reason = f"in calls of this model's form $ref must begin with #/$defs/, and is {reference}"
            raise _error(parameter, reason)
    return {**{name: root[name] for name in ("$defs", "definitions") if name in root}, **schema}


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(reference := schema.get("$ref"), str):
            yield reference
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _split(parameter: _Parameter, value_end: str) -> tuple[str, Any]:
    """A parameter as text, a terminal, and as JSON, a schema; either may be empty or None.

    No text has `value_end` in it.
    """
    kinds = kinds_of(parameter.schema, parameter.root)
    if "string" not in kinds:
        schema = parameter.schema
        plain = isinstance(schema, Mapping) and not set(schema) - _ANNOTATIONS - {"type"}
        return "", {"type": schema["type"]} if plain and "type" in schema else _within(parameter)
    texts, words, others = [], [], []
    for count, leaf in enumerate(_leaves(parameter.schema, parameter)):
        if count == _MOST_LEAVES:
            raise _error(parameter, f"has more than {_MOST_LEAVES} alternatives")
        if "string" not in kinds_of(leaf, parameter.root):
            of_leaf, rest = _words(leaf)
            words += of_leaf
            others += rest
        elif "type" in leaf or set(leaf) & {*_OF_TEXTS, *_NOT_OF_TEXTS}:
            texts.append(_text(leaf, parameter, value_end))
        elif set(leaf) - _ANNOTATIONS:
            others.append(leaf)
        else:
            return _ANY_TEXT, None
    if not (texts or words or others):
        raise _error(parameter, "admits no value")
    # Words are alternatives of the same terminal: a lexer takes the longest, and "null" may go on as a text.
    ways = [json.dumps(word) for word in dict.fromkeys(map(json.dumps, words))]
    if texts:
        parts = [f"({' | '.join(texts)})"]
        if begins := "".join(dict.fromkeys(first for kind, first in _BEGINS.items() if kind in kinds)):
            parts.append(rf"/\s*([^\s{begins}](.|\n)*)?/")
        if said := "|".join(pattern for kind, pattern in _SAID.items() if kind in kinds):
            space = "" if kinds == {"string", "null"} else r"\s*"
            parts.append(f"~(/{space}({said}){space}/)")
        ways.append(f"({' & '.join(parts)})")
    written = f"({' | '.join(ways)})" if ways else ""
    if not others:
        return written, None
    return written, _within(replace(parameter, schema=others[0] if len(others) == 1 else {"anyOf": others}))


def _words(leaf: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """Truth values and null that a leaf without texts admits, and what there is of a schema of the others."""
    if isinstance(values := leaf.get("enum"), list):
        words = [value for value in values if value is None or isinstance(value, bool)]
        rest = [value for value in values if not (value is None or isinstance(value, bool))]
        return words, [{"enum": rest}] if rest else []
    words = [] if set(leaf) & set(_NOT_OF_TEXTS) else _WORDS.get(leaf.get("type"), [])
    return words, [] if words else [leaf]


def _leaves(schema: Any, parameter: _Parameter, depth: int = 0) -> Iterator[Any]:
    """Schemas of which a value follows one, each of strings, of other types or of all."""
    if not isinstance(schema, Mapping):
        yield {}
        return
    if depth > _MOST_DEEP:
        raise _error(parameter, "alternatives are nested too deeply")
    schema = resolved(schema, parameter.root)
    for keyword in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(keyword)
        if not isinstance(parts, list) or (keyword == "allOf" and len(parts) != 1):
            continue
        beside = {name: value for name, value in schema.items() if name != keyword}
        if keyword == "oneOf" and sum(_may_be_text(part, parameter) for part in parts) > 1:
            raise _error(
                parameter, "oneOf has no room for several kinds of text in calls of this model's form"
            )
        for part in parts:
            part = resolved(part, parameter.root) if isinstance(part, Mapping) else {}
            if both := sorted(set(beside) & set(part) - _ANNOTATIONS):
                raise _error(
                    parameter,
                    f"in calls of this model's form {both[0]} cannot stand beside {keyword}",
                )
            yield from _leaves({**beside, **part}, parameter, depth + 1)
        return
    if "const" in schema:
        schema = {**{k: v for k, v in schema.items() if k != "const"}, "enum": [schema["const"]]}
    if isinstance(schema.get("enum"), list):
        values = [
            value
            for value in schema["enum"]
            if kinds_of({"const": value}, {})
            <= kinds_of({name: value for name, value in schema.items() if name != "enum"}, parameter.root)
        ]
        texts = [value for value in values if isinstance(value, str)]
        if texts:
            yield {**schema, "type": "string", "enum": texts}
        if others := [value for value in values if not isinstance(value, str)]:
            yield {"enum": others}
    elif "type" in schema:
        for kind in schema["type"] if isinstance(schema["type"], list) else [schema["type"]]:
            if kind not in _KINDS:
                raise _error(parameter, f"type: unknown: {kind}")
            yield {**schema, "type": kind}
    else:
        yield schema


def _may_be_text(schema: Any, parameter: _Parameter) -> bool:
    """Whether strings follow it that are not told one by one."""
    told = isinstance(schema, Mapping) and ("const" in schema or "enum" in schema)
    return not told and "string" in kinds_of(schema, parameter.root)


def _text(schema: Mapping[str, Any], parameter: _Parameter, value_end: str) -> str:
    """A terminal of the strings that a schema admits."""
    for keyword in _NOT_OF_TEXTS:
        if keyword in schema:
            raise _error(
                parameter,
                f"of text {keyword} has no place in calls of this model's form",
            )
    unknown = sorted(set(schema) - _ANNOTATIONS - _OF_TEXTS - {"format"})
    if parameter.strict and unknown:
        raise _error(parameter, f"of text in calls of this model's form unknown: {unknown[0]}")
    for keyword in ("minLength", "maxLength"):
        if type(value := schema.get(keyword, 0)) is not int or not 0 <= value <= _LONGEST:
            raise _error(parameter, f"{keyword} must be an integer from 0 to {_LONGEST}")
    if not isinstance(schema.get("pattern", ""), str):
        raise _error(parameter, "pattern must be a string")
    parts = []
    if "enum" in schema:
        if any(value_end in value for value in schema["enum"]):
            raise _error(
                parameter,
                f"in calls of this model's form no text has {value_end} in it",
            )
        parts.append(f"({_one_of(schema['enum'])})")
    if "minLength" in schema or "maxLength" in schema:
        parts.append(rf"/(.|\n){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}/")
    if isinstance(pattern := schema.get("pattern"), str):
        parts.append(_searched(pattern, parameter))
    if (known := _FORMATS.get(str(schema.get("format")))) is not None:
        parts.append(f"/{known}/")
    elif "format" in schema and parameter.strict:
        reason = f"of text in calls of this model's form unknown format: {schema['format']}"
        raise _error(parameter, reason)
    return f"({' & '.join(parts or [_ANY_TEXT])})"


def _searched(pattern: str, parameter: _Parameter) -> str:
    """A terminal of the texts in which a pattern is found."""
    begins = pattern.startswith("^")
    ends = re.search(r"(?<!\\)(\\\\)*\$\Z", pattern) is not None
    inner = pattern[begins : len(pattern) - ends]
    if re.search(r"(?<![\\\[])[\^$]", inner):
        raise _error(
            parameter,
            "of text in calls of this model's form a pattern has ^ and $ at its ends only",
        )
    inner = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", inner).replace("\n", "\\n")
    any_ = r"(.|\n)*"
    return f"/{'' if begins else any_}({inner}){'' if ends else any_}/"


def _one_of(texts: Any) -> str:
    return " | ".join(map(json.dumps, texts))
