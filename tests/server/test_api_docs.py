"""docs/api.md is the API: each endpoint, field, refusal and error code, held against the code and against
the `openai` package's own types."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params as text_params, responses, shared_params
from openai.types.chat import (
    chat_completion_assistant_message_param as assistant,
    chat_completion_developer_message_param as developer,
    chat_completion_function_message_param as function,
    chat_completion_stream_options_param as stream_options,
    chat_completion_system_message_param as system,
    chat_completion_tool_message_param as tool,
    chat_completion_user_message_param as user,
    completion_create_params as chat_params,
)
from openai.types.responses import response_create_params as response_params

from engine.fake import FakeEngine
from server.app import create_app
from server.routes.generate import ERRORS
from server.schemas.base import UNSUPPORTED_EVERYWHERE, Body, GenerationBody, SamplingBody, StreamOptions
from server.schemas.chat import ChatMessage, ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.response_items import CallInput, CallOutputInput, MessageInput, TextInput, ThoughtInput
from server.schemas.responses import FunctionTool, Reasoning, ResponsesRequest, TextConfig, TextFormat
from server.schemas.structured import StructuredOutputs
from server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from server.settings import Settings
from tests.server.conftest import TEXT, Defaults, RunningServer, says

SO = "structured_outputs"
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
COMMON = SECTIONS["Fields of both completions"]
BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def fields_in(section: str) -> list[str]:
    """The fields of the section's table, in order."""
    return [
        name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)
    ]


def refused_in(text: str) -> dict[str, str]:
    """Each refused field and the values that pass, as written."""
    return {name: values or "" for name, values in re.findall(r"`(\w+)`(?:\s+\(([^)]*)\))?", text)}


def after(section: str, words: str) -> str:
    """The paragraph that begins with these words."""
    found = re.search(rf"^{words}(.*?)\n\n", section + "\n\n", re.M | re.S)
    return found[1] if found else ""


def written(values: tuple[object, ...]) -> str:
    return ", ".join(v if isinstance(v, str) and v else json.dumps(v) for v in values)


@pytest.mark.parametrize("path", BODIES)
def test_every_field_is_documented_once(path: str) -> None:
    body, section = BODIES[path], SECTIONS[f"POST {path}"]
    shared = fields_in(COMMON) if issubclass(body, GenerationBody) else []
    shared += re.findall(r"`(\w+)`", after(section, "As in both completions:"))
    documented = shared + fields_in(section)
    assert len(documented) == len(set(documented))
    assert set(documented) == set(body.model_fields) - body.NO_EFFECT
    inert = after(section, "Without effect, and checked:")
    assert set(re.findall(r"`(\w+)`", inert)) == body.NO_EFFECT


@pytest.mark.parametrize("path", BODIES)
def test_every_refusal_is_documented_with_what_passes(path: str) -> None:
    body, section = BODIES[path], SECTIONS[f"POST {path}"]
    told = refused_in(after(section, "Refused:"))
    unsupported = dict(body.UNSUPPORTED)
    if issubclass(body, SamplingBody):
        both = refused_in(after(SECTIONS["POST /v1/completions"], "Both refuse:").partition(" Of ")[0])
        assert both == {name: written(values) for name, values in UNSUPPORTED_EVERYWHERE.items()}
        unsupported = {name: unsupported[name] for name in unsupported if name not in UNSUPPORTED_EVERYWHERE}
    assert told == {name: written(values) for name, values in unsupported.items()}


@pytest.mark.parametrize(("field", "body"), [("stream_options", StreamOptions), (SO, StructuredOutputs)])
def test_every_refusal_within_a_field_is_documented(field: str, body: type[Body]) -> None:
    (told,) = re.findall(rf"Of\s+`{field}`: (.*?)\.(?:\s|$)", SECTIONS["POST /v1/completions"], re.S)
    assert refused_in(told) == {name: written(values) for name, values in body.UNSUPPORTED.items()}


def test_every_endpoint_is_documented() -> None:
    app = create_app(FakeEngine(says("x")), TEXT, Settings(), Defaults())
    described = {
        f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods
    }
    table = PAGE.partition("## ")[0]
    assert (
        set(re.findall(r"`((?:GET|POST) /[^`]*)`", table)) - {"GET /openapi.json", "GET /docs"} == described
    )


def test_every_error_code_is_documented() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", SECTIONS["Errors"], re.M)
    documented = {code for _, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    source = (ROOT / "server" / "errors.py").read_text(encoding="utf-8")
    used = set(re.findall(r'code ?= ?"(\w+)"', source)) | set(
        re.findall(r'status, code = \d+, "(\w+)"', source)
    )
    used |= set(re.findall(r'message, code = .*, "(\w+)"$', source, re.M))
    used.add("missing_required_parameter")
    assert used <= documented


def test_the_api_describes_the_statuses_of_the_page() -> None:
    """4XX stands for those that are about how a request comes."""
    told = set(re.findall(r"^\| (\d+) \|", SECTIONS["Errors"], re.M))
    described = {str(status) for status in ERRORS} - {"4XX"}
    assert described <= told
    assert all(status.startswith("4") for status in told - described)


OPENAI: list[tuple[type[Body], Any]] = [
    (ChatRequest, chat_params.CompletionCreateParamsStreaming),
    (ChatRequest, chat_params.CompletionCreateParamsNonStreaming),
    (CompletionRequest, text_params.CompletionCreateParamsStreaming),
    (CompletionRequest, text_params.CompletionCreateParamsNonStreaming),
    (ResponsesRequest, response_params.ResponseCreateParamsStreaming),
    (ResponsesRequest, response_params.ResponseCreateParamsNonStreaming),
    (TextConfig, responses.ResponseTextConfigParam),
    (TextFormat, responses.ResponseFormatTextJSONSchemaConfigParam),
    (Reasoning, shared_params.Reasoning),
    (FunctionTool, responses.FunctionToolParam),
    (FunctionTool, responses.namespace_tool_param.ToolFunction),
    (MessageInput, responses.EasyInputMessageParam),
    (MessageInput, responses.ResponseOutputMessageParam),
    (TextInput, responses.ResponseInputTextParam),
    (TextInput, responses.ResponseOutputTextParam),
    (CallInput, responses.ResponseFunctionToolCallParam),
    (CallOutputInput, responses.response_input_item_param.FunctionCallOutput),
    (ThoughtInput, responses.ResponseReasoningItemParam),
    (StreamOptions, stream_options.ChatCompletionStreamOptionsParam),
    *(
        (ChatMessage, one)
        for one in (
            developer.ChatCompletionDeveloperMessageParam,
            system.ChatCompletionSystemMessageParam,
            user.ChatCompletionUserMessageParam,
            assistant.ChatCompletionAssistantMessageParam,
            tool.ChatCompletionToolMessageParam,
            function.ChatCompletionFunctionMessageParam,
        )
    ),
]


@pytest.mark.parametrize(
    ("body", "field"),
    sorted(
        {(body, name) for body, params in OPENAI for name in typing.get_type_hints(params)},
        key=lambda pair: (pair[0].__name__, pair[1]),
    ),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_field_of_openais_types_is_supported_refused_by_name_or_without_effect(
    body: type[Body], field: str
) -> None:
    fields = {one.alias or name for name, one in body.model_fields.items()}
    assert (field in fields) != (field in body.UNSUPPORTED)


@pytest.mark.parametrize(
    "field", sorted(set(typing.get_type_hints(text_params.CompletionCreateParamsStreaming)) - {"stream"})
)
def test_fields_of_openais_text_completion_on_the_wire(hello: RunningServer, field: str) -> None:
    """Each with a value that asks for something: taken, or refused by its name."""
    values: dict[str, Any] = {
        "model": "fake-model",
        "prompt": ["a", "b"],
        "echo": True,
        "logit_bias": {"5": 1},
        "stop": ["x"],
        "stream_options": {"include_usage": True},
        "user": "u",
        "suffix": "x",
    }
    numbers = {
        "best_of": 2,
        "temperature": 0.5,
        "top_p": 0.5,
        "logprobs": 2,
        "max_tokens": 3,
        "n": 2,
        "seed": 1,
    }
    value = values.get(field, numbers.get(field, 1))
    body = {"model": "fake-model", "prompt": "x", "stream": field == "stream_options", field: value}
    response = hello.http.post("/v1/completions", json=body)
    if field in CompletionRequest.model_fields:
        assert response.status_code == 200, response.text
    else:
        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
