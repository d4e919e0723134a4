"""Chat fields that say how the template is written, the text is cut, and the request is queued."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from engine.chat_template import check_variables, variables
from engine.errors import RequestError
from engine.text import TextProcessor
from engine.types import Request
from tests.chat_templates import GRANITE_3, LLAMA_3, QWEN3
from tests.server.conftest import EOS_ID, TEXT, RunningServer, Serve, ids, says

OPENED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def prompt_of(server: RunningServer, **fields: Any) -> str:
    response = server.chat(**fields)
    assert response.status_code == 200, response.text
    return TEXT.decode(server.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def error_of(server: RunningServer, **fields: Any) -> str:
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["param"])


def test_the_last_message_goes_on(hello: RunningServer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    assert prompt_of(hello, messages=messages, continue_final_message=True) == OPENED + "Well, "
    closed = prompt_of(hello, messages=messages, add_generation_prompt=False)
    assert closed == OPENED + "Well, <|im_end|>\n"
    assert (
        error_of(hello, continue_final_message=True, add_generation_prompt=True) == "continue_final_message"
    )
    assert prompt_of(hello, continue_final_message=False, add_generation_prompt=True) == OPENED
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [*messages[:-1], {"role": "assistant", "content": "Well, ", "tool_calls": [call]}]
    assert error_of(hello, messages=called, continue_final_message=True) == "continue_final_message"


@pytest.mark.parametrize(
    "template", ["{{ messages[0].role }}", "{% if messages[0].role == 'developer' %}D{% endif %}"]
)
def test_a_developer_is_whom_the_template_knows(template: str) -> None:
    text = TextProcessor(TEXT.tokenizer, template)
    written = text.decode(text.encode_chat([{"role": "developer", "content": "x"}]))
    assert written == ("D" if "developer" in template else "system")


def test_a_developer_over_http(hello: RunningServer) -> None:
    messages = [{"role": "developer", "content": "be brief"}]
    assert "<|im_start|>system\nbe brief" in prompt_of(hello, messages=messages)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "video_url"])
def test_parts_that_are_not_text_are_refused_by_their_type(hello: RunningServer, kind: str) -> None:
    content = [{"type": "text", "text": "x"}, {"type": kind, kind: {"url": "x"}}]
    response = hello.chat(messages=[{"role": "user", "content": content}])
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("messages[0].content[1].type", "unsupported_parameter")
    assert kind in error["message"]


def test_the_templates_own_variables() -> None:
    template = (
        "{% set ours = namespace(x=1) %}{{ bos_token }}{% if enable_thinking is defined %}"
        "{{ enable_thinking }}{% endif %}{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    text = TextProcessor(TEXT.tokenizer, template)
    messages = [{"role": "user", "content": "q"}]
    assert text.decode(text.encode_chat(messages)).endswith("q")
    thinking = text.encode_chat(messages, template_kwargs={"enable_thinking": False})
    assert text.decode(thinking).endswith("Falseq")
    for name in ("thinking", "ours", "messages", "bos_token", "tokenize", "chat_template"):
        with pytest.raises(Exception, match=name) as caught:
            text.encode_chat(messages, template_kwargs={name: 1})
        assert getattr(caught.value, "param", None) == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("template", "theirs", "not_theirs"),
    [
        (LLAMA_3, ["custom_tools", "date_string"], ["system_message", "tool_call", "documents"]),
        (QWEN3, ["enable_thinking"], ["content", "reasoning_content", "parts", "message"]),
        (GRANITE_3, ["available_tools", "documents"], ["tools", "message"]),
        ("{% set x = x | default(3) %}{% for a in messages %}{{ a }}{{ b }}{% endfor %}{{ x }}", "xb", "a"),
        ("{% set x = x or 3 %}{% for a in a %}{{ a }}{% endfor %}{{ x }}", "ax", ""),
        ("{% if a %}{% set b = 1 %}{% set c = 1 %}{% endif %}{{ b | default(2) }}{{ c }}", "ab", "c"),
        ("{% macro f(a) %}{% set b %}{{ c }}{% endset %}{{ a + b }}{% endmacro %}{{ f(d) }}", "cd", "abf"),
        ("{% if a %}{% set b = 1 %}{% elif b is undefined %}{% set b = 2 %}{% endif %}{{ b }}", "ab", ""),
        ("{% macro f(a, b) %}{{ a + b }}{% endmacro %}{{ f(1, 2) }}{{ a }}", "a", "bf"),
        ("{% set a = a | d(3) %}{{ a }}{% if c %}{% set b = 1 %}{% endif %}{{ b | d(2) }}", "abc", ""),
    ],
)
def test_a_variable_that_the_template_sets_itself_is_no_ones_to_give(
    template: str, theirs: Iterable[str], not_theirs: Iterable[str]
) -> None:
    assert variables(template) == set(theirs)
    for name in not_theirs:
        with pytest.raises(RequestError, match=f"{name}: this model's chat template has no such variable"):
            check_variables(template, [name])


def test_documents_reach_a_template_that_reads_them() -> None:
    text = TextProcessor(TEXT.tokenizer, GRANITE_3)
    documents = [{"text": "In the beginning."}]
    messages = [{"role": "user", "content": "q"}]
    assert "In the beginning." in text.render_chat(messages, template_kwargs={"documents": documents})
    with pytest.raises(RequestError, match="refuses"):
        text.render_chat(messages, template_kwargs={"documents": [3]})


def test_a_variable_that_the_template_does_not_read_is_refused(hello: RunningServer) -> None:
    refused = error_of(hello, chat_template_kwargs={"enable_thinking": True})
    assert refused == "chat_template_kwargs.enable_thinking"
    assert prompt_of(hello, chat_template_kwargs={}) == OPENED


def test_truncation_and_priority_reach_the_engine(hello: RunningServer) -> None:
    assert prompt_of(hello, truncate_prompt_tokens=3) == TEXT.decode(
        ids(OPENED)[-3:], skip_special_tokens=False
    )
    hello.chat(priority=-7)
    assert hello.engine.submitted[-1].priority == -7


def reply(_request: Request, _index: int) -> list[list[int]]:
    return [ids("a"), ids("b.c"), ids("<|im_start|>"), ids("d"), [EOS_ID]]


@pytest.mark.parametrize(
    ("fields", "text", "tokens"),
    [
        ({}, "ab.cd", 7),
        ({"skip_special_tokens": False}, "ab.c<|im_start|>d", 7),
        ({"stop": ".c"}, "ab", 4),
        ({"stop": ".c", "include_stop_str_in_output": True}, "ab.c", 4),
        ({"stop_token_ids": ids("d")}, "ab.c", 6),
        ({"stop_token_ids": ids("d"), "include_stop_str_in_output": True}, "ab.cd", 6),
        ({"include_stop_str_in_output": True}, "ab.cd", 7),
        (
            {"include_stop_str_in_output": True, "skip_special_tokens": False},
            "ab.c<|im_start|>d<|im_end|>",
            7,
        ),
    ],
)
def test_what_of_the_output_is_text(serve: Serve, fields: Any, text: str, tokens: int) -> None:
    server = serve(reply)
    body = server.chat(logprobs=True, **fields).json()
    (choice,) = body["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert body["usage"]["completion_tokens"] == tokens
    told = b"".join(bytes(entry["bytes"] or ()) for entry in choice["logprobs"]["content"])
    assert told.decode() == text
    streamed = [e["choices"][0]["delta"].get("content", "") for e in server.events(**fields)[:-1]]
    assert "".join(streamed) == text


def test_the_fingerprint_is_that_of_the_engine(serve: Serve) -> None:
    from engine.fake import FakeEngine

    def prints(**options: Any) -> set[str]:
        server = serve(FakeEngine(says("x"), vocab_size=TEXT.vocab_size, eos_token_ids=(EOS_ID,), **options))
        return {server.chat().json()["system_fingerprint"]} | {
            event["system_fingerprint"] for event in server.events()[:-1]
        }

    plain, same, other, adapted = (
        prints(),
        prints(),
        prints(quantization="int8"),
        prints(lora=("a@1 sha256:0",)),
    )
    assert len(plain) == len(other) == len(adapted) == 1
    assert plain == same
    assert len(plain | other | adapted) == 3


def test_usage_while_it_streams(serve: Serve) -> None:
    server = serve(says("Hello"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    usages = [event["usage"] for event in server.events(stream_options=options)[:-1]]
    assert [usage["completion_tokens"] for usage in usages] == sorted(u["completion_tokens"] for u in usages)
    assert usages[-1] == server.chat().json()["usage"]
