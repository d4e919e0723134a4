"""Tools in a conversation: for a template that knows them, and in plain messages for one that does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import RequestError
from engine.model.embedded import ensure_converted
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor
from engine.tool_prompt import in_plain_messages

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Höhe",
        "parameters": {"type": "object", "properties": {}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "How warm is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "20", "tool_call_id": "c1", "name": "weather"},
]
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


def test_plain_messages_tell_tools_calls_and_results() -> None:
    told, *rest = in_plain_messages(CONVERSATION, [TOOL])
    assert told["role"] == "system"
    assert json.dumps(TOOL, ensure_ascii=False) in told["content"].splitlines()
    assert rest == [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": WRITTEN},
        {"role": "user", "content": "<tool_response>\n20\n</tool_response>"},
    ]


def test_tools_are_told_behind_the_system_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    told, user = in_plain_messages([system, CONVERSATION[0]], [TOOL])
    assert told["content"].startswith("Be brief.\n\n# Tools\n")
    assert user == CONVERSATION[0]
    assert system == {"role": "system", "content": "Be brief."}  # not changed


def test_several_calls_and_their_results_are_one_message_each() -> None:
    results = [{"role": "tool", "content": text, "tool_call_id": "c"} for text in ("20", "30")]
    calls = {"role": "assistant", "content": "Both:", "tool_calls": [CALL, CALL]}
    assert in_plain_messages([calls, *results, CONVERSATION[0], CONVERSATION[0]], []) == [
        {"role": "assistant", "content": f"Both:\n{WRITTEN}\n{WRITTEN}"},
        {
            "role": "user",
            "content": "<tool_response>\n20\n</tool_response>\n<tool_response>\n30\n</tool_response>\n"
            "How warm is it?",
        },
        {"role": "user", "content": "How warm is it?"},
    ]


def test_a_template_without_tools_is_helped_out() -> None:
    """The embedded model's is one."""
    text = TextProcessor(load_tokenizer(ensure_converted()))
    written = text.render_chat(CONVERSATION, tools=[TOOL])
    plain = in_plain_messages(CONVERSATION, [TOOL])
    assert written == text.render_chat(plain)
    assert f"<|im_start|>assistant\n{WRITTEN}<|im_end|>" in written
    # What was called before is told also where nothing can be called now.
    assert WRITTEN in text.render_chat(CONVERSATION)
    assert text.encode_chat(CONVERSATION, tools=[TOOL]) == text.encode(written, add_special_tokens=False)


def test_a_template_with_tools_gets_them_as_they_are() -> None:
    template = """{{ tools | tojson }}{% for m in messages %}{{ "\n" + (m | tojson) }}{% endfor %}"""
    text = TextProcessor(load_tokenizer(ensure_converted()), template)
    first, *rest = text.render_chat(CONVERSATION, tools=[TOOL]).splitlines()
    assert json.loads(first) == [TOOL]
    assert [json.loads(line) for line in rest] == CONVERSATION
    assert text.render_chat(CONVERSATION).startswith("null\n")


def test_a_template_for_tools_is_used_with_tools_only() -> None:
    tokenizer = load_tokenizer(ensure_converted())
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}
    text = TextProcessor(tokenizer)
    assert text.render_chat(CONVERSATION[:1]) == "plain"
    assert text.render_chat(CONVERSATION[:1], tools=[TOOL]) == "weather"


def test_a_template_that_refuses_is_quoted() -> None:
    template = "{% if tools %}{{ raise_exception('no such tools') }}{% endif %}"
    text = TextProcessor(load_tokenizer(ensure_converted()), template)
    with pytest.raises(RequestError, match="no such tools"):
        text.render_chat(CONVERSATION, tools=[TOOL])


def test_what_is_nested_too_deeply_for_a_template_is_refused() -> None:
    function: dict[str, Any] = {"name": "weather", "arguments": {}}
    messages = [CONVERSATION[0], {**CONVERSATION[1], "tool_calls": [{**CALL, "function": function}]}]
    for template in ("{{ tools }}{{ messages | tojson(indent=4) }}", None):
        text = TextProcessor(load_tokenizer(ensure_converted()), template)
        deep: dict[str, Any] = {}
        for _ in range(5000):
            deep = {"a": deep}
        function["arguments"] = deep
        with pytest.raises(RequestError, match="nested too deeply"):
            text.render_chat(messages)
