"""Sampling, logprobs, grammars and prediction: the real engine, the real application, the official client.

The model is a tiny one with the real model's tokenizer and few words, so that drafts come true and numbers of
a step cost nothing; `test_end_to_end` asks the real one, in processes of its own.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
import torch

from benchmarks.common import model_folder
from benchmarks.disconnect import drive, parse as parse_disconnect
from engine.config import EngineConfig
from engine.loop import EngineLoop
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor
from server.logs import configure_logging
from tests.server.conftest import MODEL, RunningServer, logs_as_before
from tests.support import save_random_heads, tiny_llama

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
ESSAY = "The harbour was quiet that morning, and the old boats lay on the sand as if they had been forgotten."
COPY = [{"role": "user", "content": f"Repeat this text exactly, without any change:\n\n{ESSAY}"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says the essay's words in any order, and another word now and then; it can end."""
    real, folder = model_folder("smollm2-135m"), tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(real)
    end, size = tokenizer.eos_token_id, len(tokenizer)
    model = tiny_llama(vocab_size=size, hidden_size=64, max_position_embeddings=1024, eos_token_id=end)
    words = sorted({end, *tokenizer.encode(ESSAY)})
    blanks = [token for piece, token in tokenizer.get_vocab().items() if set(piece) <= set("ĠĊĉč")]
    with torch.no_grad():
        scale = torch.full((size, 1), 0.1)
        scale[words] = 2.0
        head = model.lm_head.weight.mul_(scale)
        # The same in each hidden state, so that what the output layer makes of it is a bias. Without this one
        # JSON would go on with blanks.
        model.model.embed_tokens.weight[:, 0] = 3.0
        head[:, 0] = 0.0
        head[blanks, 0] = -5.0
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(real / file, folder)
    save_random_heads(folder / "heads.safetensors", hidden=64, vocab=size, own_lm_head=False)
    return folder


@contextmanager
def serving(model: Path, **settings: Any) -> Iterator[RunningServer]:
    sizes = {"max_num_seqs": 4, "max_model_len": 1024, "kv_cache_tokens": 4500}
    config = EngineConfig(model=str(model), device="cpu", dtype="float32", **sizes, **settings)
    engine: Any = EngineLoop.load(config, progress=False)
    defaults: Any = engine.generation_defaults
    with logs_as_before(), RunningServer(engine, defaults, {"drain_timeout": 0.0}, engine.text) as server:
        configure_logging("error", "json", io.StringIO())
        yield server


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[RunningServer]:
    with serving(model, tree="off", lookup="off") as server:
        yield server


@pytest.fixture(scope="module")
def drafting(model: Path) -> Iterator[RunningServer]:
    """Trees of heads and of the lookup branch."""
    with serving(model, tree=16, heads=str(model / "heads.safetensors")) as server:
        yield server


@pytest.fixture(scope="module")
def text(plain: RunningServer) -> TextProcessor:
    return plain.context.text


def ask(server: RunningServer, **fields: Any) -> Any:
    """A chat completion, greedy and short unless told."""
    given: dict[str, Any] = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_tokens": 16, **fields}
    answer = server.openai.chat.completions.create(**given)
    return list(answer) if given.get("stream") else answer


def accepted(server: RunningServer) -> int:
    """Steps so far whose drafts came true."""
    return sum(server.engine.stats.acceptance_counts[2:])


def test_logprobs_streamed_and_whole(plain: RunningServer, drafting: RunningServer) -> None:
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
        for chunk in ask(drafting, **fields, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert [entry.logprob for entry in streamed] == pytest.approx([e.logprob for e in entries], abs=1e-4)


def test_prompt_logprobs_are_one_per_prompt_token(plain: RunningServer) -> None:
    answer = ask(plain, extra_body={"prompt_logprobs": 1}, max_tokens=1)
    first, *rest = answer.prompt_logprobs
    assert first is None
    assert len(rest) == answer.usage.prompt_tokens - 1
    assert all(entry["logprob"] <= 0 for position in rest for entry in position.values())


@pytest.mark.parametrize("kind", ["plain", "drafting"])
def test_logit_bias_forces_and_forbids(
    kind: str, text: TextProcessor, request: pytest.FixtureRequest
) -> None:
    server: RunningServer = request.getfixturevalue(kind)
    (banana,) = text.encode(" banana")
    forced = ask(server, logit_bias={str(banana): 100}, max_tokens=5)
    assert forced.choices[0].message.content == " banana" * 5
    said = ask(server).choices[0].message.content
    word = said.split()[-1]
    (token,) = text.encode(f" {word}")
    assert word not in ask(server, logit_bias={str(token): -100}).choices[0].message.content
    assert word not in ask(server, extra_body={"bad_words": [word]}).choices[0].message.content


def test_min_tokens_goes_past_the_end_of_the_answer(plain: RunningServer, drafting: RunningServer) -> None:
    short = ask(plain, max_tokens=60)
    assert short.choices[0].finish_reason == "stop"
    least = short.usage.completion_tokens + 5
    answers = [ask(server, max_tokens=60, extra_body={"min_tokens": least}) for server in (plain, drafting)]
    assert all(answer.usage.completion_tokens >= least for answer in answers)
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 1.3}},
        {"temperature": 0},
    ],
    ids=["additive", "repetition", "greedy"],
)
def test_a_seed_gives_the_same_text_tree_on_or_off_with_penalties(
    plain: RunningServer, drafting: RunningServer, text: TextProcessor, fields: dict[str, Any]
) -> None:
    given = {"temperature": 0.9, "seed": 11, "max_tokens": 40, "messages": COPY, **fields}
    given["extra_body"] = {"ignore_eos": True, **given.get("extra_body", {})}
    # Of few words, so that they stand in a node's own path again and again.
    given["logit_bias"] = {str(token): 8 for token in text.encode(" boats harbour sand")}
    if given["temperature"] == 0:
        given["frequency_penalty"] = 2.0
    before = accepted(drafting)
    texts = [ask(server, **given).choices[0].message.content for server in (plain, drafting)]
    assert texts[0] == texts[1]
    assert len(texts[0]) > 100
    assert accepted(drafting) > before, "drafts are to come true"


def test_a_prediction_that_comes_true_is_counted_and_changes_nothing(
    plain: RunningServer, drafting: RunningServer
) -> None:
    expected = ask(plain, max_tokens=48).choices[0].message.content
    prediction = {"type": "content", "content": expected}
    answer = ask(drafting, prediction=prediction, max_tokens=48)
    assert answer.choices[0].message.content == expected
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0
    wrong = ask(drafting, prediction={"type": "content", "content": ESSAY}, max_tokens=48)
    assert wrong.choices[0].message.content == expected
    details = wrong.usage.completion_tokens_details
    assert details.rejected_prediction_tokens > details.accepted_prediction_tokens


def test_a_second_request_reuses_the_first_ones_prefix_within_its_salt(drafting: RunningServer) -> None:
    def cached(salt: str) -> int:
        usage = ask(drafting, messages=COPY, max_tokens=4, extra_body={"cache_salt": salt}).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    assert [cached("a"), cached("b")] == [0, 0]
    assert cached("a") > 0


def test_typical_acceptance_runs_and_is_greedy_at_temperature_zero(
    plain: RunningServer, drafting: RunningServer
) -> None:
    typical = {"medusa": {"acceptance": "typical", "epsilon": 0.3, "delta": 0.6}}
    greedy = ask(plain).choices[0].message.content
    assert ask(drafting, extra_body=typical).choices[0].message.content == greedy
    drawn = ask(drafting, extra_body=typical, temperature=0.8, seed=3, messages=COPY, max_tokens=40)
    assert drawn.usage.completion_tokens > 1


class Ingredient(pydantic.BaseModel):
    name: str = pydantic.Field(pattern="^[a-z ]{1,6}$")
    grams: int = pydantic.Field(ge=0, le=999)


class Recipe(pydantic.BaseModel):
    title: str = pydantic.Field(pattern="^[A-Za-z ]{1,9}$")
    kind: Literal["soup", "cake"]
    ingredients: list[Ingredient] = pydantic.Field(min_length=1, max_length=2)


SOUP: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Write a recipe of a soup as JSON."}],
    "max_tokens": 200,
    "response_format": Recipe,
}


@pytest.mark.parametrize("kind", ["plain", "drafting"])
def test_a_model_of_pydantic_comes_back(kind: str, request: pytest.FixtureRequest) -> None:
    server: RunningServer = request.getfixturevalue(kind)
    parsed = server.openai.chat.completions.parse(**SOUP, temperature=1.0, seed=3, n=2).choices
    assert [choice.index for choice in parsed] == [0, 1]
    recipes = [choice.message.parsed for choice in parsed]
    assert all(isinstance(recipe, Recipe) for recipe in recipes)
    assert recipes[0] != recipes[1]
    with server.openai.chat.completions.stream(**SOUP, temperature=1.0, seed=3, n=2) as stream:
        streamed = stream.get_final_completion().choices
    assert [choice.message.parsed for choice in streamed] == recipes
    assert [choice.finish_reason for choice in streamed] == ["stop", "stop"]


def test_a_grammar_gives_the_same_text_tree_on_or_off(plain: RunningServer, drafting: RunningServer) -> None:
    fields = {"extra_body": {"guided_regex": "(Paris|London|[A-Z][a-z]{3,9}) (is|was) [a-z ,]{20,60}[.]"}}
    texts = [ask(server, max_tokens=64, **fields).choices[0].message.content for server in (plain, drafting)]
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
    drafting: RunningServer, constraint: dict[str, Any], pattern: str
) -> None:
    extra = {"structured_outputs": constraint}
    chat = ask(drafting, max_tokens=64, extra_body={**extra, "ignore_eos": True}).choices[0]
    answer = drafting.openai.completions.create(
        model=MODEL, prompt=["One", "Two"], temperature=0, max_tokens=64, echo=True, extra_body=extra
    )
    texts = [chat.message.content, *(choice.text[3:] for choice in answer.choices)]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert [choice.text[:3] for choice in answer.choices] == ["One", "Two"]
    assert {chat.finish_reason, *(choice.finish_reason for choice in answer.choices)} == {"stop"}


def test_calls_of_tools_follow_their_schemas_tree_on_or_off(
    plain: RunningServer, drafting: RunningServer
) -> None:
    """The model does not call on its own; where it has to, it cannot be wrong."""
    schema = {
        "type": "object",
        "properties": {"city": {"pattern": "^[A-Z][a-z]{2,9}$"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
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
    for server in (plain, drafting):
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
        for server in (plain, drafting)
        for fields in ({}, {"parallel_tool_calls": False})
    }
    assert len(texts) == 1
    result = {"role": "tool", "tool_call_id": made[0].id, "content": "21 degrees"}
    back = [*asked["messages"], {"role": "assistant", "tool_calls": [made[0].model_dump()]}, result]
    answers = {
        ask(server, **asked | {"messages": back}).choices[0].message.content for server in (plain, drafting)
    }
    assert len(answers) == 1
    assert answers != texts


def test_a_response_is_the_chat_completion_that_it_stands_for(drafting: RunningServer) -> None:
    place = {"type": "object", "properties": {"to": {"enum": ["Paris"]}}, "required": ["to"]}
    tool: Any = {"type": "function", "name": "go", "parameters": {**place, "additionalProperties": False}}
    asked: dict[str, Any] = {"model": MODEL, "input": PARIS, "temperature": 0, "max_output_tokens": 16}
    with drafting.openai.responses.stream(**asked) as stream:
        deltas = [one.delta for one in stream if one.type == "response.output_text.delta"]
    forced: dict[str, Any] = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    called = drafting.openai.responses.create(**{**asked, "max_output_tokens": 40}, **forced)
    (call,) = called.output
    assert "".join(deltas) == ask(drafting).choices[0].message.content
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("go", {"to": "Paris"})


def test_hanging_up_loses_nothing(drafting: RunningServer) -> None:
    args = parse_disconnect(["--requests", "16", "--concurrency", "8", "--max-tokens", "40"])
    result = asyncio.run(drive(args, drafting.url))
    assert result["passed"], result
