"""Calls in forms other than JSON, over HTTP: typed by the schemas, and where a schema has no room."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import RunningServer, Serve, says
from tests.server.routes.test_tools import TOOLS, deltas_of, grammar_of, tool_of
from tests.server.test_errors import error_of

TYPED: Any = [tool_of({"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "integer"}}})]
XML = (
    "So.\n<tool_call>\n<function=f>\n<parameter=n>\n12\n</parameter>\n<parameter=s>\n12\n</parameter>\n"
    "</function>\n</tool_call>"
)


GLM = (
    "So.\n<tool_call>f\n<arg_key>n</arg_key>\n<arg_value>12</arg_value>\n<arg_key>s</arg_key>\n"
    "<arg_value>12</arg_value>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("form", "text", "size", "tag"),
    [
        *(("qwen3_coder", XML, size, "<parameter=n>") for size in (1, 9, 60)),
        ("glm45", GLM, 9, "<arg_key>n</arg_key>"),
    ],
)
def test_arguments_come_as_json_of_their_types(
    serve: Serve, form: str, text: str, size: int, tag: str
) -> None:
    server = serve(says(text, size), tool_call_parser=form)
    choice = server.chat(tools=TYPED).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("So.", "tool_calls")
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"n": 12, "s": "12"}'}
    deltas = [delta for some in deltas_of(server, "tool_calls", tools=TYPED) for delta in some]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"n": 12, "s": "12"}'
    assert [delta["function"]["name"] for delta in deltas if "name" in delta["function"]] == ["f"]
    assert server.chat(tools=TYPED, tool_choice="required").status_code == 200
    assert tag in (grammar_of(server) or "")


NO_ROOM: list[tuple[Any, bool, str, str]] = [
    ({"anyOf": [{"type": "object"}]}, False, "", "anyOf"),
    ({"properties": {"a<": {}}}, False, ".properties.a<", "the name"),
    ({"properties": {"a": {"type": "string", "not": {}}}}, False, ".properties.a", "not"),
    ({"properties": {"a": {"allOf": [{"minLength": 3}, {"type": "string"}]}}}, False, ".properties.a", "all"),
    ({"properties": {"a": {"type": "string", "format": "email"}}}, True, ".properties.a", "email"),
    ({"properties": {"a": {"type": "string", "pattern": "(?=a)"}}}, False, "", "regex"),
    ({"properties": {"a": {"type": "string", "pattern": "a$b"}}}, False, ".properties.a", "^ and $"),
    ({"properties": {"a": {"type": "string", "pattern": 3}}}, False, ".properties.a", "pattern"),
    ({"properties": {"a": {"type": "string", "minLength": -1}}}, False, ".properties.a", "minLength"),
    ({"properties": {"a": {"type": "string", "maxLength": "x"}}}, False, ".properties.a", "maxLength"),
    ({"properties": {"a": {"type": "string", "contentEncoding": "x"}}}, True, ".properties.a", "contentEnc"),
    ({"properties": {"a": {"enum": ["</parameter>"]}}}, False, ".properties.a", "</parameter>"),
    ({"properties": {"a": {"enum": [], "type": "string"}}}, False, ".properties.a", "no value"),
    ({"properties": {"a": {"type": "nothing"}}}, False, ".properties.a", "nothing"),
    (
        {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "array"}}},
        False,
        ".properties.a",
        "$ref",
    ),
    ({"properties": 3}, False, ".properties", "object"),
    ({"required": ["a"], "additionalProperties": False}, False, ".properties.a", "no value"),
    ({"required": 3}, False, ".required", "list"),
    ({"required": [[]]}, False, ".required", "strings"),
    ({"properties": {"a": {"type": "string", "format": []}}}, True, ".properties.a", "format"),
    (
        {"properties": {"a": {"oneOf": [{"type": "string"}, {"pattern": "a"}]}}},
        False,
        ".properties.a",
        "oneOf",
    ),
    (
        {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 9}}},
        False,
        ".properties.a",
        "deeply",
    ),
]


@pytest.mark.parametrize(("schema", "strict", "path", "reason"), NO_ROOM)
def test_a_schema_without_room_is_refused_where_it_would_be_followed(
    serve: Serve, schema: Any, strict: bool, path: str, reason: str
) -> None:
    server: RunningServer = serve(says("x"), tool_call_parser="qwen3_coder")
    tools = [*TOOLS, tool_of(schema, strict=strict)]
    error = error_of(server.chat(tools=tools, tool_choice="required"), 400)
    assert error["param"] == f"tools[2].function.parameters{path}"
    assert error["message"].startswith(f"{error['param']}: ")
    assert reason in error["message"]
    assert "\n" not in error["message"]
    if not strict:
        assert server.chat(tools=tools).status_code == 200


def test_python_beside_a_response_format(serve: Serve) -> None:
    """Its calls are no JSON, so that one can be told from the other."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}}
    server = serve(says("[f(s='é', n=2)]"), tool_call_parser="pythonic")
    (call,) = server.chat(tools=TYPED, response_format=form).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"s": "é", "n": 2}'
    server = serve(says('[["f("]]'), tool_call_parser="pythonic")
    message = server.chat(tools=TYPED, response_format=form).json()["choices"][0]["message"]
    assert (message["content"], "tool_calls" in message) == ('[["f("]]', False)


def test_a_name_that_python_has_no_room_for_is_refused(serve: Serve) -> None:
    server = serve(says("x"), tool_call_parser="olmo3")
    tools = [tool_of({"properties": {"a-b": {}}})]
    assert server.chat(tools=tools).status_code == 200
    error = error_of(server.chat(tools=tools, tool_choice="required"), 400)
    assert error["param"] == "tools[0].function.parameters.properties.a-b"
