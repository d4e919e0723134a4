"""The real model behind a real server process, asked over HTTP: the short form of what benchmarks/ measures.

Greedy text equals transformers' whatever the tree; seeded text does not depend on tree or batch; the
official client works. What does not need this model is in `test_end_to_end_features`, on a tiny one.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from benchmarks.common import Server, chat, model_folder, new_client
from benchmarks.disconnect import page
from benchmarks.equality import ask_all
from benchmarks.reference import Reference, load_reference

MODEL = "smollm2-135m"
MAX_TOKENS = 16
SIZES = ["--max-num-seqs", "8", "--max-model-len", "1024", "--kv-cache-tokens", "9000"]
"""Without the last a pool of gigabytes is made, and cleared, for each server."""

PROMPTS = [
    "What is the capital of France?",
    "Write a Python function that adds 12 and   34.",
    "Name three colours of the rainbow, one per line.",
    "Repeat after me: the cat sat on the mat, the cat sat on the mat, the cat sat on the mat.",
    "¿Cuántos días tiene una semana? 😀",
]
PARIS = [{"role": "user", "content": PROMPTS[0]}]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """transformers' greedy answers."""
    cache = tmp_path_factory.mktemp("reference") / "reference.json"
    return load_reference(model_folder(MODEL), PROMPTS, MAX_TOKENS, cache)


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with Server([MODEL, "--dtype", "float32", "--tree", "off", *SIZES]) as server:
        yield server


@pytest.fixture(scope="module")
def shipped() -> Iterator[Server]:
    """The heads that come with the model, as nobody asked for others, and the lookup branch.

    Thoughts are told from answers, which the model's template does not ask for.
    """
    options = ["--dtype", "float32", "--tree", "12", "--reasoning-parser", "think"]
    with Server([MODEL, *options, *SIZES]) as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(verify=False)  # to read certificates takes 30 ms
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http)


def acceptance_length(server: Server) -> float:
    """Tokens per sequence and step so far, from the server's own histogram."""
    found = asyncio.run(page(server.url))
    return found["medusa_acceptance_length_sum"] / found["medusa_acceptance_length_count"]


def test_paris_through_the_official_client_streamed_and_not(plain: Server) -> None:
    with client(plain) as openai_client:
        whole = openai_client.chat.completions.create(model=MODEL, messages=PARIS, temperature=0)
        assert "Paris" in (whole.choices[0].message.content or "")
        assert whole.choices[0].finish_reason == "stop"
        chunks = list(
            openai_client.chat.completions.create(
                model=MODEL,
                messages=PARIS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(usage, count) == getattr(whole.usage, count)
    # The second finds what the first has left in the cache.
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("concurrency", [1, 8], ids=["alone", "together"])
@pytest.mark.parametrize("kind", ["plain", "shipped"])
def test_greedy_text_is_transformers_greedy_text(
    kind: str, concurrency: int, reference: Reference, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(kind)
    if concurrency == 1:  # which takes longest: the first, and two of which much is accepted
        reference = replace(reference, answers=[reference.answers[i] for i in (0, 2, 3)])
    verdicts = asyncio.run(ask_all(server.url, reference, MAX_TOKENS, concurrency, seed=1))
    assert [verdict.kind for verdict in verdicts] == ["exact"] * len(reference.answers), verdicts
    if kind == "shipped":
        found = asyncio.run(page(server.url))
        for source in ("head", "lookup"):
            assert found[f'medusa_spec_decode_num_accepted_tokens_total{{source="{source}"}}'] > 0
        assert acceptance_length(server) > 1.5, "long acceptances are to happen"


def test_a_seed_gives_the_same_text_tree_on_or_off_alone_or_batched(plain: Server, shipped: Server) -> None:
    async def seeded(server: Server, neighbours: int) -> str:
        async with new_client(server.url) as http:
            others = [
                asyncio.ensure_future(
                    chat(http, MODEL, PROMPTS[i % 5], stream=False, temperature=1.0, seed=i, max_tokens=12)
                )
                for i in range(neighbours)
            ]
            await asyncio.sleep(random.Random(neighbours).uniform(0, 0.2))
            mine = await chat(
                http, MODEL, "Tell me a story.", stream=True, temperature=0.8, seed=5, max_tokens=24
            )
            await asyncio.gather(*others)
            return mine.text

    asked = ((plain, 4), (shipped, 0), (shipped, 4))
    texts = [asyncio.run(seeded(server, neighbours)) for server, neighbours in asked]
    assert len(set(texts)) == 1
    assert len(texts[0]) > 40


def test_four_choices_are_four_texts_and_the_same_four_with_a_tree(plain: Server, shipped: Server) -> None:
    """At temperature 1 over 160 tokens. Drawn by one number put through the distribution function, the second
    ended otherwise with the tree."""

    def four(server: Server) -> list[str | None]:
        with client(server) as openai_client:
            answer = openai_client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Tell me a story."}],
                temperature=1.0,
                seed=9,
                n=4,
                max_tokens=40,
                extra_body={"medusa": {"max_tree_size": 8}},  # fewer rows to compute
            )
        return [choice.message.content for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    first = four(plain)
    assert len(set(first)) == 4
    assert first == four(shipped)


def test_extreme_values_harm_nobody(shipped: Server) -> None:
    """What passes validation must run: the fake engine of the server's own tests cannot show this."""

    async def ask() -> list[str]:
        extremes = [
            {"temperature": 1e-38},
            {"top_k": 2**64},
            {"min_p": 1.0},
            {"top_p": 1e-30},
            {"seed": -(2**63)},
        ]
        async with new_client(shipped.url) as http:
            answers = await asyncio.gather(
                chat(http, MODEL, PROMPTS[0], stream=False, temperature=0, max_tokens=8),
                *(
                    chat(http, MODEL, PROMPTS[0], stream=False, max_tokens=8, **extreme)
                    for extreme in extremes
                ),
            )
        return [answer.text for answer in answers]

    greedy, tiny_temperature, _, certain, nucleus_of_one, _ = asyncio.run(ask())
    assert "Paris" in greedy
    assert greedy == tiny_temperature == certain == nucleus_of_one


def test_an_object_of_json_is_one(shipped: Server) -> None:
    messages: Any = [
        {"role": "user", "content": 'Answer in JSON, like {"city": "Rome"}: the capital of France?'}
    ]
    with client(shipped) as openai_client:
        choice = openai_client.chat.completions.create(
            model=MODEL,
            messages=messages,
            temperature=0,
            max_tokens=100,
            response_format={"type": "json_object"},
        ).choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.message.content or ""), dict)


def ask(server: Server, **fields: Any) -> Any:
    """A chat completion, greedy."""
    with client(server) as openai_client:
        answer = openai_client.chat.completions.create(model=MODEL, temperature=0, **fields)
        return list(answer) if fields.get("stream") else answer


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


def test_a_thought_is_told_from_the_answer_tree_on_or_off(plain: Server, shipped: Server) -> None:
    asked: dict[str, Any] = {
        "messages": asked_with_thoughts("What is the capital of France?"),
        "max_tokens": 60,
    }
    answer = ask(shipped, **asked)
    message, usage = answer.choices[0].message, answer.usage
    assert "Paris" in message.reasoning_content
    assert message.content == "Paris."
    whole = ask(plain, **asked).choices[0].message.content
    assert whole == f"<think>\n{message.reasoning_content}\n</think>\n\n{message.content}"
    assert 0 < usage.completion_tokens - usage.completion_tokens_details.reasoning_tokens < 6
    *chunks, last = ask(shipped, **asked, stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought == message.reasoning_content
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert last.usage.completion_tokens_details == usage.completion_tokens_details
    # A grammar begins behind it, and changes nothing in it; nor do stop strings, and that it has begun.
    begun = [*asked["messages"], {"role": "assistant", "content": f"<think>\n{thought[:9]}"}]
    regex = {"guided_regex": "The city of [A-Z][a-z]+!", "continue_final_message": True}
    led = ask(shipped, **asked | {"messages": begun}, stop=["capital"], extra_body=regex).choices[0].message
    assert led.reasoning_content == thought[9:].strip()
    assert led.content == "The city of Paris!"
