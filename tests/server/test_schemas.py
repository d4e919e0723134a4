"""Every request field is supported, documented as without effect, or refused by name."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from openai.types.chat import completion_create_params as openai_params
from pydantic import ValidationError

from engine.errors import RequestError
from engine.text import ROLES
from engine.types import Acceptance, MedusaParams
from server.errors import UnsupportedFieldError
from server.schemas.base import Body
from server.schemas.chat import ChatMessage, ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from tests.server.conftest import Defaults

NO_EFFECT, UNSUPPORTED = ChatRequest.NO_EFFECT, ChatRequest.UNSUPPORTED
OPENAI_FIELDS = sorted(
    typing.get_type_hints(openai_params.CompletionCreateParamsStreaming)
    | typing.get_type_hints(openai_params.CompletionCreateParamsNonStreaming)
)
SUPPORTED = sorted(set(ChatRequest.model_fields) - NO_EFFECT)

MEANT: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "verbosity": "low",
    "web_search_options": {},
    "best_of": 2,
    "echo": True,
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
        ("model", 5),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("prompt_logprobs", True),
        ("prompt_logprobs", -1),
        ("presence_penalty", "1"),
        ("frequency_penalty", float("nan")),
        ("repetition_penalty", float("inf")),
        ("min_tokens", 1.5),
        ("logit_bias", [5]),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"05": 1}),
        ("logit_bias", {"٥": 1}),
        ("logit_bias", {"5": "1"}),
        ("logit_bias", {"5": True}),
        ("logit_bias", {"5": 100.5}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("messages", [{"role": "user", "content": "x"}] * 2049),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", ["x"] * 65),
        ("cache_salt", ""),
        ("cache_salt", "\ud800"),
        ("prediction", "text"),
        ("prediction", {"type": "content"}),
        ("prediction", {"type": "text", "content": "x"}),
        ("prediction", {"type": "content", "content": [{"type": "image_url"}]}),
        ("medusa", "typical"),
        ("medusa", {"acceptance": "Typical"}),
        ("medusa", {"epsilon": "0.1"}),
        ("medusa", {"max_tree_size": 2.0}),
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
        ("logit_bias", {"256": 1}),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("min_tokens", -1),
    ],
)
def test_value_out_of_the_engines_range_is_refused_by_the_clients_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        parse(**{field: value}).sampling(Defaults(), 256)
    assert caught.value.param == field


@pytest.mark.parametrize("default", [False, True])
def test_numbers_are_not_booleans_in_unsupported_fields(default: bool) -> None:
    field = "spaces_between_special_tokens" if default else "echo"
    with pytest.raises(UnsupportedFieldError):
        parse(**{field: int(default)})


def test_unknown_fields_are_refused_at_every_level() -> None:
    for body, param in [
        ({"temprature": 1}, "temprature"),
        ({"temprature": None}, "temprature"),
        ({"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "messages[0].contents"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"medusa": {"acceptence": "typical"}}, "medusa.acceptence"),
        ({"prediction": {"type": "content", "content": "x", "id": 1}}, "prediction.id"),
    ]:
        with pytest.raises(UnsupportedFieldError) as caught:
            parse(**body)
        assert caught.value.param == param


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "function", "content": "x"}, ("messages", 0, "role")),
        ({"role": "user"}, ("messages", 0, "content")),
        ({"role": "user", "content": None}, ("messages", 0, "content")),
        ({"role": "user", "content": []}, ("messages", 0, "content")),
        ({"role": "user", "content": [{"type": 5}]}, ("messages", 0, "content", 0, "type")),
        ("hi", ("messages", 0)),
    ],
)
def test_message_that_is_not_understood_is_refused(message: Any, path: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(messages=[message])
    assert path_of(caught.value) == path


@pytest.mark.parametrize("field", ["audio", "refusal", "function_call"])
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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    ],
)
def test_fields_that_need_or_exclude_another(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=param) as caught:
        parse(**body)
    assert caught.value.param == param


def test_logprobs_reach_the_engine_as_a_count() -> None:
    def count(**fields: Any) -> int | None:
        return parse(**fields).sampling(Defaults(), 256).logprobs

    assert count() is count(logprobs=False) is count(logprobs=False, top_logprobs=0) is None
    assert count(logprobs=True) == count(logprobs=True, top_logprobs=0) == 0
    assert count(logprobs=True, top_logprobs=20) == 20


def test_min_tokens_beyond_the_output_names_the_field_the_client_used() -> None:
    for bound in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(RequestError, match=f"at most {bound}") as caught:
            parse(min_tokens=5, **{bound: 4}).sampling(Defaults(), 256)
        assert caught.value.param == "min_tokens"


def test_logit_bias_keys_are_token_ids() -> None:
    biased = parse(logit_bias={"5": -100, "17": 2.5}).sampling(Defaults(), 256)
    assert biased.logit_bias == ((5, -100.0), (17, 2.5))
    assert parse(logit_bias={}).sampling(Defaults(), 256) == parse().sampling(Defaults(), 256)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"epsilon": 1.5, "acceptance": "typical"}, "medusa.epsilon"),
        ({"delta": -0.1, "acceptance": "typical"}, "medusa.delta"),
        ({"max_tree_size": 0}, "medusa.max_tree_size"),
        ({"max_tree_size": 65}, "medusa.max_tree_size"),
        ({"epsilon": 0.5}, "medusa.epsilon"),
        ({"delta": 0.5, "acceptance": "exact"}, "medusa.delta"),
    ],
)
def test_medusa_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    body = parse(medusa=fields)
    assert body.medusa is not None
    with pytest.raises(RequestError, match=param) as caught:
        body.medusa.params()
    assert caught.value.param == param


def test_medusa_values_that_pass() -> None:
    def params(**fields: Any) -> MedusaParams:
        body = parse(medusa=fields)
        assert body.medusa is not None
        return body.medusa.params()

    null = dict.fromkeys(["acceptance", "epsilon", "delta", "max_tree_size"])
    assert params() == params(**null) == params(acceptance="exact", epsilon=0.09, delta=0.3) == MedusaParams()
    typical = params(acceptance="typical", epsilon=0, delta=1.5, max_tree_size=1)
    assert typical == MedusaParams(Acceptance.TYPICAL, 0.0, 1.5, 1)


def test_prediction_is_text_or_parts() -> None:
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]
    assert parse(prediction={"type": "content", "content": parts}).prediction_text == "a\nb"
    assert parse(prediction={"type": "content", "content": "ab"}).prediction_text == "ab"
    for empty in (None, {"type": "content", "content": ""}, {"type": "content", "content": []}):
        assert parse(prediction=empty).prediction_text == ""


def test_tokenize_takes_a_prompt_or_messages() -> None:
    messages = [{"role": "user", "content": "x"}]
    for body in ({}, {"prompt": "x", "messages": messages}, {"prompt": "x", "add_generation_prompt": True}):
        with pytest.raises(RequestError):
            TokenizeRequest.model_validate(body)
    assert TokenizeRequest.model_validate({"prompt": "", "messages": None}).prompt == ""


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (ChatRequest, {"messages": [5] * 3000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [5] * 3000}]}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}] * 3000}]}),
        (ChatRequest, {"stop": [5] * 3000}),
        (ChatRequest, {"stop_token_ids": ["x"] * 3000}),
        (ChatRequest, {"bad_words": [5] * 3000}),
        (ChatRequest, {"logit_bias": {str(token): "x" for token in range(3000)}}),
        (ChatRequest, {"logit_bias": {str(token): 1 for token in range(3000)}}),
        (ChatRequest, {"metadata": {str(number): 5 for number in range(3000)}}),
        (ChatRequest, {"prediction": {"type": "content", "content": [5] * 3000}}),
        (CompletionRequest, {"prompt": [["x"]] * 3000}),
        (DetokenizeRequest, {"tokens": ["x"] * 3000}),
        (TokenizeRequest, {"messages": [{"role": "user", "content": [5] * 3000}]}),
    ],
)
def test_a_million_wrong_elements_are_one_error(body: type[Body], fields: dict[str, Any]) -> None:
    """The event loop checks them; to note each would take seconds, in which nobody gets a token."""
    required = {"model": "m", "messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    known = {name: value for name, value in required.items() if name in body.model_fields}
    if body is TokenizeRequest:
        known = {}
    with pytest.raises(ValidationError) as caught:
        body.model_validate(known | fields)
    assert caught.value.error_count() == 1


def test_roles_are_those_of_the_engine_offline() -> None:
    """Which takes a tool's too, as it gives a template the messages as they are."""
    assert set(typing.get_args(ChatMessage.model_fields["role"].annotation)) <= set(ROLES)
