"""What POST /v1/responses refuses, and by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import RequestError
from engine.types import SamplingParams
from server.routes.responses import echo_of
from server.schemas.responses import ResponsesRequest
from tests.server.conftest import MODEL, RunningServer
from tests.server.routes.test_responses import NAMESPACE, TOOLS, post
from tests.server.test_errors import error_of

WRONG: dict[str, Any] = {"parameters": {"type": 3}, "strict": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"input": []}, "input"),
    ({"input": 1}, "input"),
    ({"input": [1]}, "input[0]"),
    ({"input": [{"id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"content": "x"}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": "x", "phase": "commentary"}]}, "input[0].phase"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    (
        {
            "input": [
                {"role": "assistant", "content": [{"type": "output_text", "text": "", "annotations": [1]}]}
            ]
        },
        "input[0].content[0].annotations",
    ),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}] * 129}, "input"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [*TOOLS, {"type": "function", "name": "time"}]}, "tools[2].name"),
    ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
    (
        {"tools": [{"type": "function", "name": "f", **WRONG}]},
        "tools[0].parameters.type",
    ),
    ({"tools": [1]}, "tools[0]"),
    ({"tools": [{"name": "f"}]}, "tools[0].type"),
    ({"tools": [NAMESPACE | {"x": 1}]}, "tools[0].x"),
    ({"tools": [NAMESPACE | {"tools": [NAMESPACE]}]}, "tools[0].tools[0].type"),
    ({"tools": [NAMESPACE | {"tools": [{"type": "custom", "name": "f"}]}]}, "tools[0].tools[0].type"),
    ({"tools": [NAMESPACE | {"name": "n" * 60}]}, "tools[0].tools[0].name"),
    ({"tools": [NAMESPACE, *TOOLS, NAMESPACE]}, "tools[3].tools[0].name"),
    (
        {"tools": [*TOOLS, NAMESPACE | {"tools": [{"type": "function", "name": "f", **WRONG}]}]},
        "tools[2].tools[0].parameters.type",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "text", "name": "x"}}}, "text.format.name"),
    (
        {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
    ),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"include": ["message.output_text.logprobs"], "tools": TOOLS}, "include"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"response_format": {"type": "text"}}, "response_format"),
    ({"instructions": "\ud800"}, "input"),
]


@pytest.mark.parametrize(
    ("body", "param"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_refusals_name_the_field(hello: RunningServer, body: dict[str, Any], param: str) -> None:
    content = json.dumps({"model": MODEL, "input": "hi", **body})
    answer = hello.http.post("/v1/responses", content=content, headers={"Content-Type": "application/json"})
    error = error_of(answer, 400)
    assert error["param"] == param
    assert error["message"].isprintable()


def test_errors_by_the_names_of_this_api(hello: RunningServer) -> None:
    long = error_of(post(hello, max_output_tokens=10**6), 400)
    assert (long["code"], long["param"]) == ("context_length_exceeded", "input")
    assert "max_output_tokens 1000000" in long["message"]
    many = error_of(post(hello, input=[{"role": "user", "content": "x"}] * 2049), 400)
    assert (many["param"], many["message"]) == ("input", "input: must have at most 2048 messages, not 2049")
    none = error_of(post(hello, input=[{"type": "reasoning", "summary": []}]), 400)
    assert none["message"] == "input: must have at least 1 message, not 0"
    assert error_of(post(hello, model="other"), 404)["code"] == "model_not_found"
    choice = {"type": "function", "name": "max_tokens"}
    unknown = error_of(post(hello, tools=TOOLS, tool_choice=choice), 400)
    assert unknown["message"] == "tool_choice.name: none of the tools is called 'max_tokens'"
    missing = error_of(hello.http.post("/v1/responses", json={"model": MODEL}), 400)
    assert (missing["code"], missing["param"]) == ("missing_required_parameter", "input")


@pytest.mark.parametrize("place", ["tools", "text.format"])
def test_what_cannot_be_repeated_is_refused(hello: RunningServer, place: str) -> None:
    """A client's number that is no JSON, and what is nested so deeply that it can hardly be read."""
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"a": deep}
    for schema, reason in (({"a": float("nan")}, "NaN"), (deep, "nested too deeply")):
        tool = {"type": "function", "name": "f", "parameters": schema}
        form = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
        body = {"tools": [tool]} if place == "tools" else {"text": form}
        request = ResponsesRequest.model_validate({"input": "x", **body})
        with pytest.raises(RequestError, match=f"^{place}: {reason}") as caught:
            echo_of(request, SamplingParams(), "m")
        assert caught.value.param == place
    nan = '{"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"a": NaN}}]}'
    headers = {"Content-Type": "application/json"}
    assert error_of(hello.http.post("/v1/responses", content=nan, headers=headers), 400)["param"] == "tools"


def test_a_name_that_the_model_would_have_to_know_is_told(hello: RunningServer) -> None:
    long = {"tools": [NAMESPACE | {"name": "n" * 60}]}
    assert f"{'n' * 60}__weather" in error_of(post(hello, **long), 400)["message"]
