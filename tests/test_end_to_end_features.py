"""Sampling, logprobs and prediction on the real model over HTTP, through the official client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from benchmarks.common import Server, model_folder
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor

MODEL = "smollm2-135m"
SIZES = ["--max-num-seqs", "4", "--max-model-len", "1024", "--kv-cache-tokens", "4500"]
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
ESSAY = "The harbour was quiet that morning, and the old boats lay on the sand as if they had been forgotten."
COPY = [{"role": "user", "content": f"Repeat this text exactly, without any change:\n\n{ESSAY}"}]


@pytest.fixture(scope="module")
def text() -> TextProcessor:
    return TextProcessor(load_tokenizer(model_folder(MODEL)))


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    args = [MODEL, "--dtype", "float32", "--tree", "off", "--lookup", "off", *SIZES]
    with Server(args) as server:
        yield server


@pytest.fixture(scope="module")
def lookup() -> Iterator[Server]:
    # A tree of a set size: to measure steps for `auto` takes a server longer than all that is asked here.
    with Server([MODEL, "--dtype", "float32", "--tree", "16", *SIZES]) as server:
        yield server


@pytest.fixture(scope="module")
def thinking() -> Iterator[Server]:
    # Only where thoughts are wanted: where an answer has to follow a grammar, a thought may come before it.
    parser = ["--reasoning-parser", "think"]  # which the model's template does not show
    with Server([MODEL, "--dtype", "float32", "--tree", "16", *SIZES, *parser]) as server:
        yield server


def ask(server: Server, **fields: Any) -> Any:
    """A chat completion, greedy and short unless told."""
    given: dict[str, Any] = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_tokens": 16, **fields}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(**given)
        return list(answer) if given.get("stream") else answer


def test_logprobs_streamed_and_whole(plain: Server, lookup: Server) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    whole = ask(plain, **fields).choices[0]
    entries = whole.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == whole.message.content
    for entry in entries:
        best = [top.logprob for top in entry.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert (entry.top_logprobs[0].token, best[0]) == (entry.token, entry.logprob)  # greedy
        assert entry.logprob <= 0.0
    streamed = [
        entry
        for chunk in ask(lookup, **fields, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert [entry.logprob for entry in streamed] == pytest.approx([e.logprob for e in entries], abs=1e-4)


def test_prompt_logprobs_are_one_per_prompt_token(plain: Server) -> None:
    answer = ask(plain, extra_body={"prompt_logprobs": 1}, max_tokens=1)
    first, *rest = answer.prompt_logprobs
    assert first is None
    assert len(rest) == answer.usage.prompt_tokens - 1
    assert all(entry["logprob"] <= 0 for position in rest for entry in position.values())


@pytest.mark.parametrize("kind", ["plain", "lookup"])
def test_logit_bias_forces_and_forbids(
    kind: str, text: TextProcessor, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(kind)
    (banana,) = text.encode(" banana")
    forced = ask(server, logit_bias={str(banana): 100}, max_tokens=5)
    assert forced.choices[0].message.content == " banana" * 5
    (paris,) = text.encode(" Paris")
    assert " Paris" in ask(server).choices[0].message.content
    assert " Paris" not in ask(server, logit_bias={str(paris): -100}).choices[0].message.content
    assert "Paris" not in ask(server, extra_body={"bad_words": ["Paris"]}).choices[0].message.content


def test_min_tokens_goes_past_the_end_of_the_answer(plain: Server, lookup: Server) -> None:
    short = ask(plain, max_tokens=60)
    assert short.choices[0].finish_reason == "stop"
    least = short.usage.completion_tokens + 5
    answers = [ask(server, max_tokens=60, extra_body={"min_tokens": least}) for server in (plain, lookup)]
    assert all(answer.usage.completion_tokens >= least for answer in answers)
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"extra_body": {"repetition_penalty": 1.3}},
        {"temperature": 0},
    ],
    ids=["additive", "repetition", "greedy"],
)
def test_a_seed_gives_the_same_text_tree_on_or_off_with_penalties(
    plain: Server, lookup: Server, fields: dict[str, Any]
) -> None:
    given = {"temperature": 0.9, "seed": 11, "max_tokens": 40, "messages": COPY, **fields}
    if given["temperature"] == 0:
        given["frequency_penalty"] = 1.0
    texts = [ask(server, **given).choices[0].message.content for server in (plain, lookup)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20


def test_a_prediction_that_comes_true_is_counted_and_changes_nothing(plain: Server, lookup: Server) -> None:
    expected = ask(plain, max_tokens=48).choices[0].message.content
    prediction = {"type": "content", "content": expected}
    answer = ask(lookup, prediction=prediction, max_tokens=48)
    assert answer.choices[0].message.content == expected
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0
    wrong = ask(lookup, prediction={"type": "content", "content": ESSAY}, max_tokens=48)
    assert wrong.choices[0].message.content == expected
    details = wrong.usage.completion_tokens_details
    assert details.rejected_prediction_tokens > details.accepted_prediction_tokens


def test_a_second_request_reuses_the_first_ones_prefix_within_its_salt(lookup: Server) -> None:
    def cached(salt: str) -> int:
        usage = ask(lookup, messages=COPY, max_tokens=4, extra_body={"cache_salt": salt}).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    assert [cached("a"), cached("b")] == [0, 0]
    assert cached("a") > 0


def test_typical_acceptance_runs_and_is_greedy_at_temperature_zero(plain: Server, lookup: Server) -> None:
    typical = {"medusa": {"acceptance": "typical", "epsilon": 0.3, "delta": 0.6}}
    greedy = ask(plain).choices[0].message.content
    assert ask(lookup, extra_body=typical).choices[0].message.content == greedy
    drawn = ask(lookup, extra_body=typical, temperature=0.8, seed=3, messages=COPY, max_tokens=40)
    assert drawn.usage.completion_tokens > 1


class Ingredient(pydantic.BaseModel):
    name: str = pydantic.Field(pattern="^[a-z ]{1,12}$")
    grams: int = pydantic.Field(ge=0, le=999)


class Recipe(pydantic.BaseModel):
    title: str = pydantic.Field(pattern="^[A-Za-z ]{1,20}$")
    kind: Literal["soup", "cake"]
    ingredients: list[Ingredient] = pydantic.Field(min_length=1, max_length=2)


SOUP: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Write a recipe of a soup as JSON."}],
    "max_tokens": 400,
    "response_format": Recipe,
}


@pytest.mark.parametrize("kind", ["plain", "lookup"])
def test_a_model_of_pydantic_comes_back(kind: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(kind)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        parsed = client.chat.completions.parse(**SOUP, temperature=1.0, seed=3, n=2).choices
        assert [choice.index for choice in parsed] == [0, 1]
        recipes = [choice.message.parsed for choice in parsed]
        assert all(isinstance(recipe, Recipe) for recipe in recipes)
        assert recipes[0] != recipes[1]
        with client.chat.completions.stream(**SOUP, temperature=1.0, seed=3, n=2) as stream:
            streamed = stream.get_final_completion().choices
        assert [choice.message.parsed for choice in streamed] == recipes
        assert [choice.finish_reason for choice in streamed] == ["stop", "stop"]


def test_a_grammar_gives_the_same_text_tree_on_or_off(plain: Server, lookup: Server) -> None:
    fields = {"extra_body": {"guided_regex": "(Paris|London|[A-Z][a-z]{3,9}) (is|was) [a-z ,]{20,60}[.]"}}
    texts = [ask(server, max_tokens=64, **fields).choices[0].message.content for server in (plain, lookup)]
    assert texts[0] == texts[1]
    assert re.fullmatch(fields["extra_body"]["guided_regex"], texts[0])


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["Berlin", "Rome"]}, "Berlin|Rome"),
        ({"grammar": 'root ::= "The answer is " [0-9] [0-9]? "."'}, r"The answer is \d\d?\."),
        ({"grammar": 'start: "é" WORD "\\n"\nWORD: /[a-z]{3,5}/'}, "é[a-z]{3,5}\n"),
        ({"json": '{"items": {"type": "boolean"}, "type": "array", "maxItems": 2}'}, r"(?s)\s*\[.*\]"),
    ],
)
def test_each_kind_of_constraint_on_both_completions(
    lookup: Server, constraint: dict[str, Any], pattern: str
) -> None:
    extra = {"structured_outputs": constraint}
    chat = ask(lookup, max_tokens=64, extra_body={**extra, "ignore_eos": True}).choices[0]
    with openai.OpenAI(base_url=f"{lookup.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model=MODEL, prompt=["One", "Two"], temperature=0, max_tokens=64, echo=True, extra_body=extra
        )
    texts = [chat.message.content, *(choice.text[3:] for choice in answer.choices)]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert [choice.text[:3] for choice in answer.choices] == ["One", "Two"]
    assert {chat.finish_reason, *(choice.finish_reason for choice in answer.choices)} == {"stop"}


def test_an_object_of_json_is_one(lookup: Server) -> None:
    messages = [{"role": "user", "content": 'Answer in JSON, like {"city": "Rome"}: the capital of France?'}]
    choice = ask(lookup, messages=messages, max_tokens=200, response_format={"type": "json_object"}).choices[
        0
    ]
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.message.content), dict)


def test_calls_of_tools_follow_their_schemas_tree_on_or_off(plain: Server, lookup: Server) -> None:
    """The real model is too small to call on its own; where it has to, it cannot be wrong."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    function = {"name": "get_weather", "description": "The weather of a city", "parameters": schema}
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [{"type": "function", "function": function}],
        "max_tokens": 60,
    }
    forced = asked | {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    made = []
    for server in (plain, lookup):
        choice = ask(server, **forced).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), schema)
        streamed = [chunk.choices[0].delta.tool_calls for chunk in ask(server, **forced, stream=True)]
        told = [delta.function for deltas in streamed for delta in deltas or ()]
        assert told[0].name == "get_weather"
        assert "".join(function.arguments for function in told) == call.function.arguments
        made.append(call)
    assert made[0].function == made[1].function

    # Whether calls have to be right does not change what is no call.
    asked["max_tokens"] = 24
    texts = {
        ask(server, **asked, **fields).choices[0].message.content
        for server in (plain, lookup)
        for fields in ({}, {"parallel_tool_calls": False})
    }
    assert len(texts) == 1
    result = {"role": "tool", "tool_call_id": made[0].id, "content": "21 degrees"}
    back = [*asked["messages"], {"role": "assistant", "tool_calls": [made[0].model_dump()]}, result]
    answers = {
        ask(server, **asked | {"messages": back}).choices[0].message.content for server in (plain, lookup)
    }
    assert len(answers) == 1
    assert answers != texts


def asked_with_thoughts(question: str) -> list[dict[str, str]]:
    """The small model thinks where it has seen how."""
    shown = [("Italy", "Rome"), ("Spain", "Madrid")]
    return [
        *(
            {"role": role, "content": content}
            for country, city in shown
            for role, content in (
                ("user", f"What is the capital of {country}?"),
                (
                    "assistant",
                    f"<think>\nThey ask for a capital. {country}'s is {city}.\n</think>\n\n{city}.",
                ),
            )
        ),
        {"role": "user", "content": question},
    ]


def test_a_thought_is_told_from_the_answer_tree_on_or_off(plain: Server, thinking: Server) -> None:
    asked: dict[str, Any] = {
        "messages": asked_with_thoughts("What is the capital of France?"),
        "max_tokens": 60,
    }
    answer = ask(thinking, **asked)
    message, usage = answer.choices[0].message, answer.usage
    assert "Paris" in message.reasoning_content
    assert message.content == "Paris."
    whole = ask(plain, **asked).choices[0].message.content
    assert whole == f"<think>\n{message.reasoning_content}\n</think>\n\n{message.content}"
    assert 0 < usage.completion_tokens - usage.completion_tokens_details.reasoning_tokens < 6
    *chunks, last = ask(thinking, **asked, stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert last.usage.completion_tokens_details == usage.completion_tokens_details
    # A grammar begins behind it, and changes nothing in it; nor do stop strings, and that it has begun.
    begun = [*asked["messages"], {"role": "assistant", "content": f"<think>\n{thought[:9]}"}]
    regex = {"guided_regex": "The city of [A-Z][a-z]+!", "continue_final_message": True}
    led = ask(thinking, **asked | {"messages": begun}, stop=["capital"], extra_body=regex).choices[0].message
    assert led.reasoning_content == thought[9:].strip()
    assert led.content == "The city of Paris!"


def test_a_response_is_the_chat_completion_that_it_stands_for(lookup: Server) -> None:
    place = {"type": "object", "properties": {"to": {"enum": ["Paris"]}}, "required": ["to"]}
    tool: Any = {"type": "function", "name": "go", "parameters": {**place, "additionalProperties": False}}
    asked: dict[str, Any] = {"model": MODEL, "input": PARIS, "temperature": 0, "max_output_tokens": 16}
    with openai.OpenAI(base_url=f"{lookup.url}/v1", api_key="none", max_retries=0) as client:
        with client.responses.stream(**asked) as stream:
            deltas = [one.delta for one in stream if one.type == "response.output_text.delta"]
        forced: dict[str, Any] = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        called = client.responses.create(**{**asked, "max_output_tokens": 40}, **forced)
        (call,) = called.output
    assert "".join(deltas) == ask(lookup).choices[0].message.content
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("go", {"to": "Paris"})
