"""Published chat templates, each with a tokenizer of its kind: what is found in them, and what they write."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any, Literal

import pytest
from tokenizers import AddedToken

from engine.chat_template import reads_tools, variables
from engine.errors import RequestError
from engine.grammar import GrammarCompiler
from engine.model.weights import load_tokenizer
from engine.reasoning import thought_format_of
from engine.text import TextProcessor
from engine.thought import Thought
from server.responses import ToolCallDelta
from server.schemas.chat import ChatMessage
from server.schemas.tools import Tool
from server.tool_formats import Function, format_of
from server.tool_use import CallReader
from tests.published.expected import (
    EXPECTED,
    INDENTED,
    MESSAGES,
    ONE_CALL,
    ONLY_WITH_TOOLS,
    OTHERS,
    SERVED,
    TOKENS,
    UNLIKE_ITSELF,
)
from tests.published.sources import templates, tokenizer_dir

USER = {"role": "user", "content": "Hello there"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Hi, you."}
FUNCTIONS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "which"},
                "days": {"type": "integer", "description": "how many"},
            },
            "required": ["city"],
        },
    },
    {"name": "get_time", "description": "now", "parameters": {"type": "object", "properties": {}}},
]
TOOLS = [Tool.model_validate({"type": "function", "function": function}) for function in FUNCTIONS]
TOLD = [tool.as_template_input() for tool in TOOLS]
CALLS = [("weather", {"city": 'Paris é "x"', "days": 3}), ("get_time", {})]


def conversation(*ids: str) -> list[dict[str, Any]]:
    """What an OpenAI client sends: calls of these ids, in a message without content, and their results."""
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for id_, (name, arguments) in zip(ids, CALLS, strict=False)
    ]
    sent = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": id_, "content": f"result {i}"} for i, id_ in enumerate(ids)),
    ]
    return [ChatMessage.model_validate(message).as_template_input() for message in sent]


ONE = conversation("abc123XYZ")
TWO = conversation("call_0123456789abcdefghijklmn", "call_9876543210abcdefghijklmn")


@functools.cache
def loaded(base: str, tokens: tuple[str, ...] = ()) -> Any:
    tokenizer = load_tokenizer(tokenizer_dir(base))
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    return tokenizer


@functools.cache
def text_of(name: str) -> TextProcessor:
    return TextProcessor(loaded(*TOKENS[EXPECTED[name].tokenizer]), source(name))


@functools.cache
def compiler_of(name: str) -> GrammarCompiler:
    """For the tokenizer of this name."""
    tokenizer = loaded(*TOKENS[name])
    return GrammarCompiler(tokenizer, [tokenizer.eos_token_id])


def source(name: str) -> str:
    return templates()[name].read_text()


def written(text: TextProcessor, name: str) -> str:
    """The calls of a message, as the template writes them behind the prompt."""
    calls = ONE if name in ONE_CALL else TWO
    message = {**calls[1], "tool_calls": [*calls[1]["tool_calls"]]}
    options: dict[str, Any] = {"tools": TOLD, "add_generation_prompt": False}
    whole = text.render_chat([USER, message], **options)
    prompt = text.render_chat([USER], tools=TOLD)
    if not whole.startswith(prompt):  # which opens a thought
        prompt = text.render_chat([USER], **options)
    if not whole.startswith(prompt):
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, prompt, strict=False))
        prompt = whole[: sum(1 for _ in same)]
    return whole.removeprefix(prompt)


def read(text: TextProcessor, answer: str, thought: Thought | None = None) -> tuple[str, str, list[Any]]:
    """Thought, content and calls of an answer, alike whether its tokens come one by one or at once."""
    form, marks = format_of(text), thought_format_of(text)
    shown = form.shown | (marks.shown if marks is not None else frozenset())
    tokens = text.encode(answer, add_special_tokens=False)
    found = []
    for pieces in ([[token] for token in tokens], [tokens]):
        detokenizer = text.detokenizer([1], shown=shown, thought=thought)
        reader = CallReader(form, TOOLS)
        said = content = ""
        deltas: list[ToolCallDelta] = []
        for i, piece in enumerate(pieces):
            new = detokenizer.push(piece, final=i == len(pieces) - 1)
            said += new.thought
            more, calls = reader.read(0, new.text, final=i == len(pieces) - 1)
            content += more
            deltas += calls
        names = [delta.function.name for delta in deltas if delta.function.name is not None]
        arguments = [""] * len(names)
        for delta in deltas:
            arguments[delta.index] += delta.function.arguments
        found.append((said, content, list(zip(names, map(as_json, arguments), strict=True))))
    assert found[0] == found[1]
    return found[0]


def as_json(arguments: str) -> Any:
    """Their value, or, of a call that was none in the end, themselves."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def test_every_published_template_is_here() -> None:
    assert set(templates()) == set(SERVED) | set(OTHERS)
    assert not set(SERVED) & set(OTHERS)


@pytest.mark.parametrize("name", EXPECTED)
def test_formats(name: str) -> None:
    text, expected = text_of(name), EXPECTED[name]
    assert expected.calls in (None, format_of(text).name)
    thoughts = thought_format_of(text)
    assert (thoughts and thoughts.name) == expected.thoughts


@pytest.mark.parametrize("name", EXPECTED)
def test_conversations_are_written_as_transformers_writes_them(name: str) -> None:
    text = text_of(name)
    turns = [USER, ANSWER, {"role": "user", "content": "And now?"}]
    for messages in (
        turns[:1],
        [SYSTEM, *turns],
        turns,
        [SYSTEM, *turns[:1]],
        [SYSTEM, SYSTEM, USER],
        turns[:2],
    ):
        if name in MESSAGES and messages[:2] == [SYSTEM, SYSTEM]:
            continue  # of which the template leaves the second out
        for begins in (True, False):
            ours = outcome(text.render_chat, messages, add_generation_prompt=begins)
            theirs = outcome(
                text.tokenizer.apply_chat_template,
                messages,
                chat_template=source(name),
                add_generation_prompt=begins,
                tokenize=False,
            )
            assert ours == theirs
            if name in SERVED and name not in ONLY_WITH_TOOLS and messages == turns:
                assert isinstance(ours, str)
                assert all(message["content"] in ours for message in turns)


def outcome(write: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What it returns, or None where the template refuses that; nothing else is raised by what is ours."""
    refusals = RequestError if write.__name__ == "render_chat" else Exception
    try:
        return write(*args, **options)
    except refusals:
        return None


@pytest.mark.parametrize("name", EXPECTED)
def test_a_clients_calls_and_results_reach_the_prompt(name: str) -> None:
    text = text_of(name)
    for messages, tools in itertools.product((ONE, TWO), (TOLD, [])):
        prompt = outcome(text.render_chat, messages, tools=tools)
        if name in OTHERS or (not tools and name in ONLY_WITH_TOOLS):
            continue
        assert prompt is not None
        for call in messages[1]["tool_calls"]:
            assert call["function"]["name"] in prompt
        assert all(value in prompt for value in ("Paris", "result 0", messages[-1]["content"]))
        assert not tools or "of a city" in prompt
        # And so does what comes then.
        assert text.encode_chat([*messages, ANSWER, USER], tools=tools)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in MESSAGES])
def test_calls_are_read_as_the_template_writes_them(name: str) -> None:
    text, expected = text_of(name), EXPECTED[name]
    try:
        answer = written(text, name)
    except RequestError:
        assert name in OTHERS
        return
    _, content, calls = read(text, answer)
    if name in UNLIKE_ITSELF:
        assert calls != CALLS
        return
    if expected.calls is None:
        assert calls == []
        assert "weather" in content
        return
    assert calls == CALLS[: 1 if name in ONE_CALL else 2]
    assert "weather" not in content
    marks = thought_format_of(text)
    if marks is None:
        return
    behind = answer.rpartition(marks.end)[2].lstrip()
    places: list[tuple[str, Literal["within", "before"]]] = [("", "within"), (marks.begin, "before")]
    for begun, place in places:
        thinking = f"{begun}\nIs weather a call?\n{marks.end}\n\n{behind}"
        thought, content, calls = read(text, thinking, Thought(marks.begin, marks.end, place))
        assert thought == "Is weather a call?"
        assert "weather" not in content
        assert calls == CALLS[: 1 if name in ONE_CALL else 2]


@pytest.mark.parametrize(
    "name", [n for n, found in SERVED.items() if found.calls and n not in UNLIKE_ITSELF | INDENTED | MESSAGES]
)
def test_a_call_that_follows_its_grammar_is_what_the_template_writes(name: str) -> None:
    text = text_of(name)
    form = format_of(text)
    answer = written(text, name)
    marks = thought_format_of(text)
    if marks is not None and marks.end in answer:
        answer = answer.rpartition(marks.end)[2]
    answer = answer.strip()
    for end in (
        str(text.tokenizer.eos_token),
        "<|eot_id|>",
        "<|im_end|>",
        "<|end_of_text|>",
        "<|end|>",
        "<｜end▁of▁sentence｜>",
        "<seed:eos>",
    ):
        answer = answer.removesuffix(end).strip()
    start = min(at for mark in (form.begin, form.bare) if mark and (at := answer.find(mark)) >= 0)
    answer = answer[start:]
    functions = [Function(each["name"], each["parameters"]) for each in FUNCTIONS]
    for free in (False, True):
        spec = form.grammar(functions, text=free, schema=None, several=True)
        state = compiler_of(EXPECTED[name].tokenizer).compile(spec).start()
        tokens = text.encode(answer, add_special_tokens=False)
        taken = sum(1 for _ in itertools.takewhile(state.advance, tokens))
        assert taken == len(tokens), text.decode(tokens[:taken], skip_special_tokens=False)
        assert state.ended or state.advance(text.tokenizer.eos_token_id)


THINKS = {
    # What the prompt's end says of thoughts by default, and with thinking on and off.
    "Bielik-11B-v3.0-Instruct": ("before", "within", "before"),
    "ByteDance-Seed-OSS": ("before", None, None),
    "HuggingFaceTB-SmolLM3-3B": ("before", "before", "behind"),
    "Qwen-QwQ-32B": ("behind", "within", "behind"),  # as llama.cpp changed it
    "Qwen-Qwen3-0.6B": ("before", "before", "behind"),
    "Qwen3.5-4B": ("within", "within", "behind"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("within", None, None),
    "deepseek-ai-DeepSeek-V3.1": ("behind", "within", "behind"),
    "ibm-granite-granite-3.3-2B-Instruct": ("before", "before", "before"),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("before", None, None),
    "openbmb-MiniCPM5-1B": ("before", "within", "behind"),
}


@pytest.mark.parametrize(("name", "places"), THINKS.items())
def test_the_prompts_end_says_where_the_answer_begins(name: str, places: tuple[str | None, ...]) -> None:
    text = text_of(name)
    marks = thought_format_of(text)
    assert marks is not None
    switches = variables(source(name)) & {"enable_thinking", "thinking"}
    for value, place in zip((None, True, False), places, strict=True):
        options = {} if value is None else dict.fromkeys(switches, value)
        if place is None:
            assert not switches
        else:
            assert marks.thought(text, text.encode_chat([USER], template_kwargs=options)).place == place


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("Bielik-11B-v3.0-Instruct", "<think>\nHm.\n</think>\nHi, you."),
        ("Qwen-Qwen3-0.6B", "<think>\nHm.\n</think>\n\nHi, you."),
        ("ByteDance-Seed-OSS", "<seed:think>Hm.</seed:think>\nHi, you."),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "[THINK]Hm.[/THINK]Hi, you."),
        ("openai-gpt-oss-120b", "<|channel|>analysis<|message|>Hm.<|end|>"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "<｜Assistant｜>Hi, you."),
    ],
)
def test_thoughts_of_earlier_answers(name: str, kept: str) -> None:
    answer = {**ANSWER, "reasoning_content": "Hm."}
    assert kept in text_of(name).render_chat([USER, answer], add_generation_prompt=False)


@pytest.mark.parametrize("name", SERVED)
def test_an_answer_goes_on_with_the_last_message(name: str) -> None:
    text = text_of(name)
    if name in ONLY_WITH_TOOLS:
        return
    begun = {"role": "assistant", "content": "Once upon a"}
    prompt = text.render_chat([USER, begun], add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith("Once upon a")
    closed = text.render_chat([USER, begun], add_generation_prompt=False)
    assert closed.startswith(prompt)


VARIABLES = {
    "HuggingFaceTB-SmolLM3-3B": {"enable_thinking"},
    "Mistral-Small-3.2-24B-Instruct-2506": set(),
    "Qwen-Qwen3-0.6B": {"enable_thinking"},
    "deepseek-ai-DeepSeek-V3.1": {"enable_thinking", "thinking"},
    "ibm-granite-granite-3.3-2B-Instruct": {"available_tools", "controls", "documents", "thinking"},
    "inclusionai-ling-3.0-flash": {"enable_thinking", "thinking_option"},
    "meta-llama-Llama-3.1-8B-Instruct": {
        "builtin_tools",
        "custom_tools",
        "date_string",
        "tools_in_user_message",
    },
    "openai-gpt-oss-120b": {"builtin_tools", "model_identity", "reasoning_effort"},
    "google-gemma-4-31B-it": {"enable_thinking"},
}


@pytest.mark.parametrize(("name", "theirs"), VARIABLES.items())
def test_variables_that_a_request_may_set(name: str, theirs: set[str]) -> None:
    assert variables(source(name)) == theirs


def test_templates_that_write_tools() -> None:
    without = {name for name in SERVED if not reads_tools(source(name))}
    assert without == {
        "HuggingFaceTB-SmolLM3-3B",
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
        "microsoft-Phi-3.5-mini-instruct",
        "template_chatml",
    }


@pytest.mark.parametrize(
    ("tokenizer", "calls", "thoughts"),
    [
        ("gemma3", "hermes", None),
        ("llama3.2", "llama3_json", None),
        ("mistral-nemo", "mistral", None),
        ("qwen2.5", "hermes", None),
        ("qwen3", "hermes", "think"),
        ("deepseek-v3", "hermes", None),
    ],
)
def test_a_tokenizers_own_template(tokenizer: str, calls: str, thoughts: str | None) -> None:
    text = TextProcessor(loaded(tokenizer))
    assert format_of(text).name == calls
    found = thought_format_of(text)
    assert (found and found.name) == thoughts
    for messages in (ONE, TWO):
        prompt = text.render_chat([*messages, ANSWER, USER], tools=TOLD)
        assert all(said in prompt for said in ("of a city", "Paris", "result 0", messages[-1]["content"]))
