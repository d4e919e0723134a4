"""Every request field is supported, documented as without effect, or refused by name."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import completion_create_params as openai_params
from pydantic import ValidationError

from engine.errors import RequestError
from server.errors import UnsupportedFieldError
from server.schemas import NO_EFFECT, UNSUPPORTED, ChatRequest, TokenizeRequest
from tests.server.conftest import Defaults

OPENAI_FIELDS = sorted(
    typing.get_type_hints(openai_params.CompletionCreateParamsStreaming)
    | typing.get_type_hints(openai_params.CompletionCreateParamsNonStreaming)
)
SUPPORTED = sorted(set(ChatRequest.model_fields) - NO_EFFECT)

MEANT: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": -100},
    "logprobs": True,
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -0.1,
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "top_logprobs": 3,
    "verbosity": "low",
    "web_search_options": {},
    "best_of": 2,
    "echo": True,
    "repetition_penalty": 1.1,
    "skip_special_tokens": False,
    "min_tokens": 1,
    "use_beam_search": True,
}
"""A value of each unsupported field that a client would send to get something."""


def parse(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    )


def path_of(error: ValidationError) -> tuple[Any, ...]:
    return error.errors()[0]["loc"]


def test_the_three_kinds_do_not_overlap() -> None:
    assert set(ChatRequest.model_fields) >= NO_EFFECT
    assert not set(UNSUPPORTED) & set(ChatRequest.model_fields)


@pytest.mark.parametrize("field", OPENAI_FIELDS)
def test_every_field_of_openais_client_is_known(field: str) -> None:
    assert (field in ChatRequest.model_fields) != (field in UNSUPPORTED)
    if field in UNSUPPORTED:
        assert field in MEANT  # so that the next test covers it


@pytest.mark.parametrize("field", sorted(MEANT))
def test_unsupported_value_is_refused_by_name(field: str) -> None:
    with pytest.raises(UnsupportedFieldError, match=field) as caught:
        parse(**{field: MEANT[field]})
    assert caught.value.param == field


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_null_and_default_of_an_unsupported_field_pass(field: str) -> None:
    for value in (None, *UNSUPPORTED[field]):
        assert parse(**{field: value}) == parse()


@pytest.mark.parametrize("field", sorted(set(ChatRequest.model_fields) - {"model", "messages"}))
def test_null_of_a_known_field_is_as_if_absent(field: str) -> None:
    assert parse(**{field: None}) == parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "u"),
        ("metadata", {"k": "v"}),
        ("safety_identifier", "s"),
        ("prompt_cache_key", "k"),
        ("service_tier", "auto"),
        ("service_tier", "default"),
        ("store", False),
    ],
)
def test_fields_without_effect_pass(field: str, value: Any) -> None:
    before, after = parse(), parse(**{field: value})
    assert field in NO_EFFECT
    assert after.sampling(Defaults(), 256) == before.sampling(Defaults(), 256)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("service_tier", "flex"),
        ("user", 5),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 1.5),
        ("top_k", -2),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("seed", 1.0),
        ("max_tokens", "5"),
        ("stream", 1),
        ("stream", "true"),
        ("stop", 5),
        ("stop", [str(i) for i in range(17)]),
        ("stop_token_ids", 5),
        ("messages", []),
        ("messages", "hi"),
        ("model", None),
    ],
)
def test_value_of_a_wrong_type_or_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(**{field: value})
    assert path_of(caught.value)[0] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("stop_token_ids", [256]),
    ],
)
def test_value_out_of_the_engines_range_is_refused_by_the_clients_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        parse(**{field: value}).sampling(Defaults(), 256)
    assert caught.value.param == field


@pytest.mark.parametrize("default", [False, True])
def test_numbers_are_not_booleans_in_unsupported_fields(default: bool) -> None:
    field = "skip_special_tokens" if default else "logprobs"
    with pytest.raises(UnsupportedFieldError):
        parse(**{field: int(default)})


def test_unknown_fields_are_refused_at_every_level() -> None:
    for body, param in [
        ({"temprature": 1}, "temprature"),
        ({"temprature": None}, "temprature"),
        ({"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "messages[0].contents"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ]:
        with pytest.raises(UnsupportedFieldError) as caught:
            parse(**body)
        assert caught.value.param == param


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "tool", "content": "x"}, ("messages", 0, "role")),
        ({"role": "developer", "content": "x"}, ("messages", 0, "role")),
        ({"role": "user"}, ("messages", 0, "content")),
        ({"role": "user", "content": None}, ("messages", 0, "content")),
        ({"role": "user", "content": []}, ("messages", 0, "content")),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            ("messages", 0, "content", 0, "type"),
        ),
        ("hi", ("messages", 0)),
    ],
)
def test_message_that_is_not_understood_is_refused(message: Any, path: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(messages=[message])
    assert path_of(caught.value) == path


@pytest.mark.parametrize("field", ["name", "tool_calls", "audio", "refusal", "function_call"])
def test_message_fields_that_would_be_ignored_are_refused(field: str) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        parse(messages=[{"role": "assistant", "content": "x", field: [{"id": "1"}]}])
    assert caught.value.param == f"messages[0].{field}"


def test_combinations() -> None:
    with pytest.raises(RequestError, match="stream_options"):
        parse(stream_options={"include_usage": True})
    with pytest.raises(RequestError, match="max_completion_tokens"):
        parse(max_tokens=1, max_completion_tokens=1)
    with pytest.raises(UnsupportedFieldError, match="include_obfuscation"):
        parse(stream=True, stream_options={"include_obfuscation": True})
    assert parse(stream=True, stream_options={"include_obfuscation": False}).include_usage is False


def test_tokenize_takes_a_prompt_or_messages() -> None:
    messages = [{"role": "user", "content": "x"}]
    for body in ({}, {"prompt": "x", "messages": messages}, {"prompt": "x", "add_generation_prompt": True}):
        with pytest.raises(RequestError):
            TokenizeRequest.model_validate(body)
    with pytest.raises(UnsupportedFieldError, match="add_special_tokens"):
        TokenizeRequest.model_validate({"messages": messages, "add_special_tokens": True})
    assert TokenizeRequest.model_validate({"prompt": "", "messages": None}).prompt == ""


def test_the_documentation_lists_every_field_and_what_has_no_effect() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    chat, _, _ = page.partition("## Other paths")
    table, _, inert = chat.partition("without effect:")
    assert set(re.findall(r"`([a-z_]+)`", inert)) == NO_EFFECT
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`([a-z_]+)", row)
    }
    assert documented == set(ChatRequest.model_fields) - NO_EFFECT
