"""Harmony over HTTP: thought, answer and calls as a client reads them, and what of them goes back in."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from engine.fake import Reply
from engine.grammar import Grammar
from tests.engine.test_harmony import ANALYSIS, FINAL, NEXT, WEATHER, harmony
from tests.server.conftest import EOS_ID, MODEL, RunningServer, Serve
from tests.server.routes.test_reasoning import SCHEMA, whole
from tests.server.routes.test_responses import TOOLS as RESPONSE_TOOLS, events, whole as response_of
from tests.server.routes.test_tools import MESSAGES, NAMED, TOOLS
from tests.server.test_errors import error_of
from tests.server.test_harmony_calls import PARIS, PREAMBLE, TIME

THOUGHT = "They greet. 2 < 3, <|x."
THINKS = f"{ANALYSIS}{THOUGHT}<|end|>"
SAID = f"{THINKS}{NEXT}{FINAL}Hello, <b>!"
CALLS = f"{THINKS}{NEXT}{PREAMBLE}{NEXT}{WEATHER.removesuffix('<|call|>')}"


def says(text: str, size: int = 3) -> Reply:
    """A script in which every choice says this, with marks as the tokens that they are, and then ends."""
    tokens = harmony().encode(text)
    steps = [tokens[:1], *(tokens[i : i + size] for i in range(1, len(tokens), size)), [EOS_ID]]
    return lambda _request, _index: steps


def started(serve: Serve, text: str, size: int = 3, **options: Any) -> RunningServer:
    return serve(says(text, size), text=harmony(), **options)


def prompt_of(server: RunningServer, **body: Any) -> str:
    response = server.chat(**body)
    assert response.status_code == 200, response.text
    return harmony().decode(server.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def grammar_of(server: RunningServer) -> Grammar:
    grammar = server.engine.submitted[-1].grammar
    assert isinstance(grammar, Grammar)
    return grammar


def streamed(server: RunningServer, **body: Any) -> dict[str, Any]:
    """The message that a stream's deltas make, with why it ended."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for event in server.events(**body)[:-1]:
        for choice in event["choices"]:
            delta, message["finish_reason"] = choice["delta"], choice["finish_reason"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


@pytest.mark.parametrize("size", [1, 4, 60])
def test_a_thought_is_no_content(serve: Serve, size: int) -> None:
    server = started(serve, SAID, size)
    assert whole(server) == {
        "role": "assistant",
        "content": "Hello, <b>!",
        "refusal": None,
        "reasoning_content": THOUGHT,
        "reasoning": THOUGHT,
    }
    told = {"content": "Hello, <b>!", "reasoning_content": THOUGHT, "tool_calls": [], "finish_reason": "stop"}
    assert streamed(server) == told
    usage = server.chat(n=2).json()["usage"]
    tokens, thought = len(harmony().encode(SAID)) + 1, len(harmony().encode(THINKS))
    assert usage["completion_tokens"] == 2 * tokens
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 2 * thought
    assert whole(server, include_reasoning=False)["content"] == "Hello, <b>!"
    # Marks are read, and so none is in the text, also where other special tokens would be.
    assert whole(server, skip_special_tokens=False)["content"] == "Hello, <b>!"


@pytest.mark.parametrize("size", [1, 4, 60])
def test_calls_and_what_the_user_may_see_before_them(serve: Serve, size: int) -> None:
    """The token that ends a call is an EOS: no text."""
    server = started(serve, CALLS, size)
    choice = server.chat(tools=TOOLS).json()["choices"][0]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "I look.")
    assert message["reasoning_content"] == THOUGHT
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": PARIS}
    assert streamed(server, tools=TOOLS) == {
        "content": "I look.",
        "reasoning_content": THOUGHT,
        "tool_calls": [{"name": "weather", "arguments": PARIS}],
        "finish_reason": "tool_calls",
    }
    # Where there are no tools, or none may be called, it is content.
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        assert whole(server, **fields)["content"] == f"I look.\n{PARIS}"


def test_several_calls_and_text_behind_them(serve: Serve) -> None:
    server = started(serve, f"{WEATHER}{NEXT}{TIME}{NEXT}{FINAL}So.")
    told = streamed(server, tools=TOOLS)
    assert [call["name"] for call in told["tool_calls"]] == ["weather", "time"]
    assert (told["content"], told["finish_reason"]) == ("So.", "tool_calls")


def test_no_half_of_a_mark_is_told_wherever_an_answer_is_cut(serve: Serve) -> None:
    server = started(serve, CALLS, 60)
    tokens = harmony().encode(CALLS)
    for count in range(1, len(tokens)):
        choice = server.chat(tools=TOOLS, max_tokens=count).json()["choices"][0]
        message = choice["message"]
        assert choice["finish_reason"] == "length"
        assert THOUGHT.startswith(message["reasoning_content"] or "")
        assert "I look.".startswith(message["content"] or "")
        for call in message.get("tool_calls", ()):
            assert PARIS.startswith(call["function"]["arguments"]) or call["function"]["arguments"] == "{}"


def test_stop_strings_end_the_content_only(serve: Serve) -> None:
    server = started(serve, SAID)
    choice = server.chat(stop=["greet", "analysis", "final", "<b>"]).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == THOUGHT
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hello, ", "<b>")
    assert streamed(server, stop="<b>")["content"] == "Hello, "


def test_logprobs_are_of_what_was_written_and_in_a_response_of_the_answer(serve: Serve) -> None:
    server = started(serve, SAID)
    entries = server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == SAID
    for size in (3, 60):
        server = started(serve, SAID, size)
        fields = {"include": ["message.output_text.logprobs"]}
        (_, message) = response_of(server, **fields)["output"]
        entries = message["content"][0]["logprobs"]
        assert "".join(entry["token"] for entry in entries) == "Hello, <b>!"
        told = [one for event in events(server, **fields) for one in event.get("logprobs", ())]
        assert len(told) == 2 * len(entries)  # with its text, and with the whole of it
    # Also where one step brings text, a thought and text.
    server = started(serve, f"{FINAL}A<|end|>{NEXT}{ANALYSIS}Hm<|end|>{NEXT}{FINAL}B", 62)
    told = [one["token"] for event in events(server, **fields) for one in event.get("logprobs", ())]
    assert told.count("A") == told.count("B") == 2


@pytest.mark.parametrize("size", [1, 4, 60])
def test_items_come_in_the_order_in_which_they_were_written(serve: Serve, size: int) -> None:
    server = started(serve, f"{CALLS}<|end|>{NEXT}{THINKS}{NEXT}{FINAL}So.", size)
    expected = [
        ("reasoning", THOUGHT),
        ("message", "I look."),
        ("function_call", PARIS),
        ("reasoning", THOUGHT),
        ("message", "So."),
    ]

    def told(items: list[dict[str, Any]]) -> list[tuple[str, str]]:
        texts = [item.get("arguments") or item["content"][0]["text"] for item in items]
        return [(item["type"], text) for item, text in zip(items, texts, strict=True)]

    response = response_of(server, tools=RESPONSE_TOOLS)
    assert told(response["output"]) == expected
    found = events(server, tools=RESPONSE_TOOLS)
    assert told(found[-1]["response"]["output"]) == expected
    deltas = [(event["output_index"], event["delta"]) for event in found if event["type"].endswith(".delta")]
    for index, (_, text) in enumerate(expected):
        assert "".join(delta for at, delta in deltas if at == index) == text
    # And it may come back.
    items = [{"role": "user", "content": "hi"}, *response["output"][:3]]
    result = {"type": "function_call_output", "call_id": response["output"][2]["call_id"], "output": "20"}
    response_of(server, input=[*items, result], tools=RESPONSE_TOOLS)
    prompt = harmony().decode(server.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)
    assert f"{THINKS}{NEXT}{PREAMBLE}{NEXT} to=functions.weather<|channel|>commentary json" in prompt
    assert prompt.endswith(
        f'<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"20"<|end|>{NEXT}'
    )


def test_what_was_answered_comes_back_as_it_was_written(serve: Serve) -> None:
    server = started(serve, CALLS)
    message = whole(server, tools=TOOLS)
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "20"}
    turn: list[Any] = [*MESSAGES, message, result]
    prompt = prompt_of(server, messages=turn, tools=TOOLS)
    assert f"hi<|end|>{NEXT}{THINKS}{NEXT}{PREAMBLE}{NEXT} to=functions.weather" in prompt
    # What was thought goes with a turn that is over.
    later = [*turn, {"role": "assistant", "content": "20.", "reasoning": "Hm."}, *MESSAGES]
    prompt = prompt_of(server, messages=later, tools=TOOLS)
    assert f"{FINAL}20.<|end|><|start|>user" in prompt
    assert THOUGHT not in prompt
    assert "Hm." not in prompt


def test_each_of_several_calls_is_before_what_it_returned(serve: Serve) -> None:
    """The template knows one call a message, and would leave out the others."""
    server = started(serve, SAID)
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("weather", PARIS), ("time", "{}"))
    ]
    results = [
        {"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("time", "weather")
    ]
    called = {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "Both."}
    prompt = prompt_of(server, messages=[*MESSAGES, called, *results], tools=TOOLS)
    expected = f"{ANALYSIS}Both.<|end|>"
    for name, arguments in (("weather", PARIS), ("time", "{}")):
        expected += f"{NEXT} to=functions.{name}<|channel|>commentary json<|message|>{arguments}<|call|>"
        expected += (
            f'<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>"of {name}"<|end|>'
        )
    assert prompt.endswith(f"{expected}{NEXT}".replace(ANALYSIS, f"{NEXT}{ANALYSIS}"))


def test_all_system_messages_are_told_and_tools_without_a_description(serve: Serve) -> None:
    server = started(serve, SAID)
    system = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}]
    late = {"role": "system", "content": "In French."}
    prompt = prompt_of(server, messages=[*system, *MESSAGES, late, *MESSAGES], tools=TOOLS)
    assert "<|start|>developer<|message|>Be brief.\n\nBe kind.\n\nIn French." in prompt
    assert "// \ntype time" in prompt
    assert "// of a city\ntype weather" in prompt


def test_effort_goes_to_the_template(serve: Serve) -> None:
    server = started(serve, SAID)
    for effort in ("none", "low", "high"):
        assert f"Reasoning: {effort}<|end|>" in prompt_of(server, reasoning_effort=effort)
    assert "Reasoning: medium" in prompt_of(server)
    response_of(server, reasoning={"effort": "low"})
    tokens = server.engine.submitted[-1].prompt_token_ids
    assert "Reasoning: low" in harmony().decode(tokens, skip_special_tokens=False)


def test_an_answer_that_goes_on(serve: Serve) -> None:
    server = started(serve, f"all.<|end|>{NEXT}{WEATHER}")
    begun = {"role": "assistant", "content": "Hello, ", "reasoning_content": "Hm."}
    fields: dict[str, Any] = {"messages": [*MESSAGES, begun], "continue_final_message": True}
    assert prompt_of(server, **fields).endswith(f"{ANALYSIS}Hm.<|end|>{NEXT}{FINAL}Hello, ")
    message = whole(server, **fields, tools=TOOLS)
    assert (message["content"], message["reasoning_content"]) == ("all.", None)
    assert message["tool_calls"][0]["function"]["arguments"] == PARIS
    assert server.chat(**fields, response_format=SCHEMA).status_code == 200
    assert grammar_of(server).spec.lead == ""
    error = error_of(server.chat(**fields, tools=TOOLS, tool_choice="required"), 400)
    assert error["param"] == "continue_final_message"


@pytest.mark.parametrize(
    ("fields", "is_call"),
    [
        ({"response_format": SCHEMA}, False),
        ({"structured_outputs": {"regex": "a"}}, False),
        ({"guided_choice": ["a"]}, False),
        ({"tools": TOOLS, "tool_choice": "required"}, True),
        ({"tools": TOOLS, "tool_choice": NAMED}, True),
        ({"tools": TOOLS, "parallel_tool_calls": False}, True),
    ],
)
def test_grammars_begin_in_the_message_that_follows_them(
    serve: Serve, fields: dict[str, Any], is_call: bool
) -> None:
    server = started(serve, SAID)
    for effort in (None, "none"):
        assert server.chat(**fields, reasoning_effort=effort).status_code == 200
        (start,) = re.findall("^start: (.*)", grammar_of(server).spec.lead, re.MULTILINE)
        assert start.endswith("@answer")
        assert ("analysis*" in start) == (effort is None)
        assert ('"final"' in start) != is_call


def test_a_wrong_schema_is_refused_by_its_place(serve: Serve) -> None:
    server = started(serve, SAID)
    wrong = {"properties": {"a": {"type": "nothing"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": wrong}}
    error = error_of(server.chat(tools=[*TOOLS, tool], tool_choice="required"), 400)
    assert error["param"] == "tools[2].function.parameters"


def test_other_parsers_and_none(serve: Serve) -> None:
    server = started(serve, CALLS, reasoning_parser="none")
    assert whole(server) == {
        "role": "assistant",
        "content": f"analysis{THOUGHT}assistantcommentaryI look."
        f"assistantcommentary to=functions.weather json{PARIS}",
        "refusal": None,
    }
    message = whole(server, tools=TOOLS)
    assert message["content"] == f"{THOUGHT}\nI look."
    assert message["tool_calls"][0]["function"]["arguments"] == PARIS
    server = started(serve, CALLS, tool_call_parser="hermes")
    message = whole(server, tools=TOOLS)
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, f"I look.\n{PARIS}")


def test_openais_client_reads_it(serve: Serve) -> None:
    server = started(serve, CALLS)
    with server.openai.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS) as stream:
        final: Any = stream.get_final_completion().choices[0].message
    assert (final.reasoning_content, final.content) == (THOUGHT, "I look.")
    assert json.loads(final.tool_calls[0].function.arguments) == json.loads(PARIS)
