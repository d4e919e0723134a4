"""Tools in a conversation: for a template that knows them, and in plain messages for one that does not."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from engine.errors import RequestError
from engine.model.embedded import ensure_converted
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor
from engine.tool_prompt import in_plain_messages, in_some_form
from tests.chat_templates import FUNCTIONARY, GRANITE_3, LLAMA_3, MISTRAL_NEMO

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


@functools.cache
def of(template: str) -> TextProcessor:
    return TextProcessor(load_tokenizer(ensure_converted()), template)


def called(*ids: str) -> list[dict[str, Any]]:
    """A conversation with calls of these ids in one message, and what they returned, the last one first."""
    calls = [{**CALL, "id": id_, "function": {"name": "weather", "arguments": {"n": id_}}} for id_ in ids]
    results = [{"role": "tool", "content": f"of {id_}", "tool_call_id": id_} for id_ in reversed(ids)]
    return [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def test_a_template_of_one_call_a_message_has_each_beside_what_it_returned() -> None:
    messages = [*called("a", "b"), {"role": "assistant", "content": "Done."}, CONVERSATION[0]]
    assert of(LLAMA_3).render_chat(messages, tools=[TOOL]).splitlines()[1:] == [
        "<user>How warm is it?",
        '{"name": "weather", "parameters": {"n": "a"}}',
        "<ipython>of a",
        '{"name": "weather", "parameters": {"n": "b"}}',
        "<ipython>of b",
        "<assistant>Done.",
        "<user>How warm is it?",
    ]
    assert messages[1:4] == called("a", "b")[1:]  # not changed


def test_results_of_no_call_come_last_and_thoughts_first() -> None:
    stray = {"role": "tool", "content": "stray", "tool_call_id": "z"}
    user, assistant, *results = called("a", "b")
    assistant = {**assistant, "content": "So:", "reasoning_content": "Hm."}
    template = LLAMA_3.replace("{{- '\n{", "{{- message.content ~ message.reasoning_content ~ '\n{")
    written = of(template).render_chat([user, assistant, stray, *results], tools=[TOOL])
    assert written.splitlines()[1:] == [
        "<user>How warm is it?So:Hm.",
        '{"name": "weather", "parameters": {"n": "a"}}',
        "<ipython>of a",
        '{"name": "weather", "parameters": {"n": "b"}}',
        "<ipython>of b",
        "<ipython>stray",
    ]


@pytest.mark.parametrize("id_", ["same", None])
def test_calls_of_one_id_and_of_none_have_one_result_each(id_: str | None) -> None:
    own, of_result = ({"id": id_}, {"tool_call_id": id_}) if id_ else ({}, {})
    calls = [{**own, "type": "function", "function": {"name": "f", "arguments": {"n": n}}} for n in (1, 2)]
    results = [{"role": "tool", "content": f"of {n}", **of_result} for n in (1, 2)]
    messages = [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    assert of(LLAMA_3).render_chat(messages, tools=[TOOL]).splitlines()[2:] == [
        '{"name": "f", "parameters": {"n": 1}}',
        "<ipython>of 1",
        '{"name": "f", "parameters": {"n": 2}}',
        "<ipython>of 2",
    ]
    if id_ is None:  # what the template says, not what the rewriting lacked
        with pytest.raises(RequestError, match="should be alphanumeric strings with length 9"):
            of(MISTRAL_NEMO).render_chat(messages, tools=[TOOL])


def test_a_template_of_short_ids_has_the_others_shortened() -> None:
    written = of(MISTRAL_NEMO).render_chat(called("abcDEF123", "call_0123456789"), tools=[TOOL])
    ids = re.findall(r'"(?:call_)?id": "([^"]*)"', written)
    assert ids == ["abcDEF123", ids[1], ids[1], "abcDEF123"]
    assert re.fullmatch("[a-z0-9]{9}", ids[1])
    again = of(MISTRAL_NEMO).render_chat([*called("call_9"), *called("call_0123456789")], tools=[TOOL])
    assert len({*re.findall(r'"(?:call_)?id": "([^"]*)"', again), ids[1]}) == 2  # the same one each time
    odd = of(MISTRAL_NEMO).render_chat([*called("call_1234"), *called("call_9")], tools=[TOOL])
    assert all(re.fullmatch("[a-z0-9]{9}", id_) for id_ in re.findall(r'"(?:call_)?id": "([^"]*)"', odd))
    # A template that takes them has them as they are.
    assert "call_9" in of("{{ tools }}{{ messages }}{# tool_calls #}").render_chat(called("call_9"))


def test_a_template_that_puts_arguments_together_with_text_has_them_as_text() -> None:
    written = of(FUNCTIONARY).render_chat(CONVERSATION, tools=[TOOL])
    assert written.endswith('>>>weather\n{"city": "Zürich"}20')
    # What the model wrote was no object, and is text already.
    function = {"name": "weather", "arguments": '{"city":'}
    broken = [{**CONVERSATION[1], "tool_calls": [{**CALL, "function": function}]}]
    assert of(FUNCTIONARY).render_chat(broken, tools=[TOOL]).endswith('>>>weather\n{"city":')


def test_a_template_that_refuses_in_several_ways_gets_messages_changed_in_all_of_them() -> None:
    template = LLAMA_3.replace("(tool_call.arguments | tojson)", "tool_call.arguments")
    template += (
        "{% for c in messages[1].tool_calls if c.id | length != 9 %}{{ raise_exception('id') }}{% endfor %}"
    )
    assert '"parameters": {"n": "call_1"}}\n<ipython>of call_1\n' in of(template).render_chat(
        called("call_1", "call_2"), tools=[TOOL]
    )


def test_what_is_told_is_what_a_template_refuses_in_every_form() -> None:
    refused = MISTRAL_NEMO + "{{ raise_exception('no ' ~ messages[-1].role) }}"
    with pytest.raises(RequestError, match=r"the messages: no tool$"):
        of(refused).render_chat(called("call_1", "call_2"), tools=[TOOL])
    # That text is no object is no reason that a client could do something about.
    refused = "{{ tools }}{% for c in messages[1].tool_calls %}{% for x in c.function.arguments.items() %}"
    refused += "{{ raise_exception('not these') }}{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match=r"the messages: not these$"):
        of(refused).render_chat(called("abcDEF123"), tools=[TOOL])


def test_each_form_is_tried_once() -> None:
    messages, tried = called("abcDEF123", "abcDEF124"), []

    def refuse(changed: list[dict[str, Any]]) -> str:
        tried.append(changed)
        raise ValueError(str(len(tried)))

    with pytest.raises(ValueError, match="2"):  # the third is of arguments as text
        in_some_form(refuse, messages, (ValueError,))
    assert tried[0] == messages
    assert len(tried) == 3  # ids are as they should be
    assert all(changed != other for i, changed in enumerate(tried) for other in tried[:i])

    def refuse_alike(changed: list[dict[str, Any]]) -> str:
        tried.append(changed)
        raise ValueError("no")

    tried.clear()
    with pytest.raises(ValueError, match="no"):
        in_some_form(refuse_alike, called("a", "b"), (ValueError,))
    assert len(tried) == 4


def test_a_template_that_writes_no_calls_has_them_as_content() -> None:
    """As Granite 3 writes them, or GLM; else as Hermes."""
    listed = '<|tool_call|>[{"name": "weather", "arguments": {"city": "Zürich"}}'
    written = of(GRANITE_3).render_chat(CONVERSATION, tools=[TOOL])
    assert written.endswith(f"<|assistant|>{listed}]<|tool|>20")
    said = {**CONVERSATION[1], "content": "So:", "tool_calls": [CALL, CALL]}
    assert (
        of(GRANITE_3)
        .render_chat([said])
        .endswith(f"<|assistant|>So:\n{listed}, {listed.removeprefix('<|tool_call|>[')}]")
    )
    hermes = GRANITE_3.replace("<|tool_call|>", "calls")
    assert of(hermes).render_chat(CONVERSATION).endswith(f"<|assistant|>{WRITTEN}<|tool|>20")
    arguments = {"city": "Zürich", "days": [1, "ü"]}
    mistaken = {**CALL, "function": {"name": "weather", "arguments": '{"city'}}
    called = [{**CALL, "function": {"name": "weather", "arguments": arguments}}, mistaken]
    for line, shown in (("\n", "</arg_key>\\n<arg_value>"), ("", "</arg_key><arg_value>")):
        said = line.join(
            [
                "<tool_call>weather",
                *("<arg_key>city</arg_key>", "<arg_value>Zürich</arg_value>"),
                *("<arg_key>days</arg_key>", '<arg_value>[1, "ü"]</arg_value>'),
                "</tool_call>\n<tool_call>weather",
                '{"city',
                "</tool_call>",
            ]
        )
        glm = of(GRANITE_3.replace("<|tool_call|>", f"<tool_call><arg_key>{shown}"))
        assert glm.render_chat([{**CONVERSATION[1], "tool_calls": called}]).endswith(f"<|assistant|>{said}")


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
