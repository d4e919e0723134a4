"""Reasoning over HTTP: what a client reads of a thought, what the model is told, and every refusal."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from engine.grammar import Grammar
from engine.text import TextProcessor
from tests.chat_templates import DEEPSEEK_R1, GPT_OSS, MAGISTRAL, PLAIN, QWEN3
from tests.server.conftest import EOS_ID, MODEL, TEXT, RunningServer, Serve, ids, says
from tests.server.routes.test_tools import PARIS, TOOLS
from tests.server.test_errors import error_of
from tests.server.test_tool_formats import with_tokens

MESSAGES: Any = [{"role": "user", "content": "hi"}]
THOUGHT = "They greet.\n\nSo do I."
SAID = f"<think>\n{THOUGHT}\n</think>\n\nHello!"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


def of(template: str) -> TextProcessor:
    tokenizer = copy.deepcopy(TEXT.tokenizer)
    tokenizer.chat_template = template
    return TextProcessor(tokenizer)


QWEN, R1 = of(QWEN3), of(DEEPSEEK_R1)


def prompt_of(server: RunningServer, **body: Any) -> str:
    response = server.chat(**body)
    assert response.status_code == 200, response.text
    return TEXT.decode(server.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def lead_of(server: RunningServer) -> str:
    grammar = server.engine.submitted[-1].grammar
    assert isinstance(grammar, Grammar)
    return grammar.spec.lead


def whole(server: RunningServer, **body: Any) -> dict[str, Any]:
    response = server.chat(**body)
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


def streamed(server: RunningServer, field: str, **body: Any) -> str:
    events = [event for event in server.events(**body) if event != "[DONE]"]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    return "".join(delta.get(field) or "" for delta in deltas)


@pytest.mark.parametrize("size", [1, 4, 60])
@pytest.mark.parametrize("text", [QWEN, R1], ids=["qwen3", "r1"])
def test_a_thought_is_no_content(serve: Serve, text: TextProcessor, size: int) -> None:
    """Opened by the model, or by its prompt; by either name, streamed or not."""
    said = SAID if text is QWEN else SAID.removeprefix("<think>\n")
    server = serve(says(said, size), text=text)
    assert whole(server) == {
        "role": "assistant",
        "content": "Hello!",
        "refusal": None,
        "reasoning_content": THOUGHT,
        "reasoning": THOUGHT,
    }
    for name, expected in (("reasoning_content", THOUGHT), ("reasoning", THOUGHT), ("content", "Hello!")):
        assert streamed(server, name) == expected
    usage = server.chat().json()["usage"]
    thought = len(ids(said)) - len("\n\nHello!")
    assert usage["completion_tokens"] == len(ids(said)) + 1
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
        "reasoning_tokens": thought,
        "audio_tokens": 0,
    }
    *_, last, _ = server.events(stream_options={"include_usage": True})
    assert last["usage"] == usage
    assert server.chat(n=2).json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2 * thought


def test_openais_client_reads_it(serve: Serve) -> None:
    server = serve(says(SAID), text=QWEN)
    chat = server.openai.chat.completions
    message: Any = chat.create(model=MODEL, messages=MESSAGES).choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, "Hello!")
    deltas: list[Any] = [c.choices[0].delta for c in chat.create(model=MODEL, messages=MESSAGES, stream=True)]
    thoughts = [delta.reasoning_content for delta in deltas if getattr(delta, "reasoning_content", None)]
    assert len(thoughts) > 3
    assert "".join(thoughts) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == "Hello!"
    with chat.stream(model=MODEL, messages=MESSAGES) as stream:
        final: Any = stream.get_final_completion().choices[0].message
    assert (final.reasoning_content, final.content) == (THOUGHT, "Hello!")
    # And what it made of that may come back.
    for back in (message, message.model_dump(), final):
        prompt = prompt_of(server, messages=[*MESSAGES, _jsonable(back)], add_generation_prompt=False)
        assert f"<think>\n{THOUGHT}\n</think>\n\nHello!" in prompt


def _jsonable(message: Any) -> Any:
    return message if isinstance(message, dict) else message.model_dump()


@pytest.mark.parametrize(
    ("said", "thought", "content", "tokens"),
    [
        ("<think>\nHm, ", "Hm,", None, 12),  # cut
        ("<think>Hm.</think>", "Hm.", None, 18),
        ("<think>\n\n</think>\n\nHello!", None, "Hello!", 17),  # Qwen3's, asked not to think
        ("Hello! <think>a</think>", None, "Hello! <think>a</think>", 0),
        ("", None, "", 0),
    ],
)
def test_half_of_it_and_none_of_it(
    serve: Serve, said: str, thought: str | None, content: str | None, tokens: int
) -> None:
    server = serve(says(said), text=QWEN)
    body = server.chat().json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (thought, content)
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == tokens
    assert streamed(server, "reasoning_content") == (thought or "")
    assert streamed(server, "content") == (content or "")


def test_a_thought_cut_by_length(serve: Serve) -> None:
    server = serve(says(SAID), text=QWEN)
    body = server.chat(max_tokens=15).json()
    (choice,) = body["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", None)
    assert choice["message"]["reasoning_content"] == "They gr"
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 15
    back = [*MESSAGES, choice["message"]]
    assert "<think>\nThey gr\n</think>" in prompt_of(server, messages=back, add_generation_prompt=False)


def test_where_the_prompt_has_closed_it_nothing_is_thought(serve: Serve) -> None:
    server = serve(says(SAID), text=QWEN)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert prompt_of(server, **off).endswith("assistant\n<think>\n\n</think>\n\n")
    message = whole(server, **off)
    assert (message["content"], message["reasoning_content"]) == (SAID, None)
    usage = server.chat(**off).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.mark.parametrize(
    ("begun", "said", "thought", "content"),
    [
        ("<think>\nOkay, ", "so.\n</think>\n\nHello!", "so.", "Hello!"),
        ("Hello, ", "<think>all!", None, "<think>all!"),
    ],
)
def test_an_answer_that_goes_on(serve: Serve, begun: str, said: str, thought: str, content: str) -> None:
    server = serve(says(said), text=of(PLAIN + "<think>"))
    messages = [*MESSAGES, {"role": "assistant", "content": begun}]
    message = whole(server, messages=messages, continue_final_message=True)
    assert (message["reasoning_content"], message["content"]) == (thought, content)


@pytest.mark.parametrize("text", [QWEN, R1], ids=["qwen3", "r1"])
def test_an_answer_that_its_template_takes_apart_cannot_go_on(serve: Serve, text: TextProcessor) -> None:
    """And what cannot be done is told in the request's terms; its thought apart, it can."""
    server = serve(says("all!"), text=text)
    begun = {"role": "assistant", "content": "<think>Hm.</think>Hello, "}
    error = error_of(server.chat(messages=[*MESSAGES, begun], continue_final_message=True), 400)
    assert error["param"] == "continue_final_message"
    assert "reasoning_content" in error["message"]
    assert "TAG" not in error["message"]
    apart = {"role": "assistant", "content": "Hello, ", "reasoning_content": THOUGHT}
    fields: dict[str, Any] = {"messages": [*MESSAGES, apart], "continue_final_message": True}
    assert prompt_of(server, **fields).endswith("Hello, ")
    assert whole(server, **fields)["content"] == "all!"


@pytest.mark.parametrize("text", [QWEN, of(PLAIN)], ids=["none", "unknown"])
def test_without_a_parser_all_is_content(serve: Serve, text: TextProcessor) -> None:
    server = serve(says(SAID), text=text, reasoning_parser="none" if text is QWEN else "auto")
    assert whole(server) == {"role": "assistant", "content": SAID, "refusal": None}
    assert streamed(server, "content") == SAID
    assert "completion_tokens_details" not in server.chat().json()["usage"]
    error = error_of(server.chat(include_reasoning=False), 400)
    assert (error["param"], error["code"]) == ("include_reasoning", "unsupported_parameter")
    assert whole(server, include_reasoning=True)["content"] == SAID
    assert server.chat(response_format=SCHEMA).status_code == 200
    assert lead_of(server) == ""


def test_the_setting_names_the_marks(serve: Serve) -> None:
    server = serve(says("[THINK]Hm.[/THINK]Hello!"), reasoning_parser="mistral")
    message = whole(server)
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Hello!")


def test_special_tokens_mark_a_thought_and_are_never_told(serve: Serve) -> None:
    text = with_tokens("[THINK]", "[/THINK]")
    text.tokenizer.chat_template = MAGISTRAL
    tokens = text.encode("[THINK]Hm.[/THINK]Hello!")
    assert len(tokens) == len("Hm.Hello!") + 2
    server = serve(lambda _request, _index: [[token] for token in [*tokens, EOS_ID]], text=text)
    for fields in ({}, {"skip_special_tokens": False}):
        message = whole(server, **fields)
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Hello!")
    usage = server.chat().json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len("Hm.") + 2


def test_reasoning_may_be_left_out(serve: Serve) -> None:
    server = serve(says(SAID), text=QWEN)
    message = whole(server, include_reasoning=False)
    assert message == {"role": "assistant", "content": "Hello!", "refusal": None}
    assert streamed(server, "reasoning_content", include_reasoning=False) == ""
    assert streamed(server, "content", include_reasoning=False) == "Hello!"
    # Where nothing else is there the message is empty, and may come back all the same.
    cut = whole(server, include_reasoning=False, max_tokens=15)
    assert cut == {"role": "assistant", "content": "", "refusal": None}
    assert prompt_of(server, messages=[*MESSAGES, cut, *MESSAGES])
    usage = server.chat(include_reasoning=False).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0


def test_logprobs_are_of_the_text_as_it_was_written(serve: Serve) -> None:
    server = serve(says(SAID), text=QWEN)
    for fields in ({}, {"include_reasoning": False}):
        choice = server.chat(logprobs=True, **fields).json()["choices"][0]
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == SAID
        events = [event for event in server.events(logprobs=True, **fields) if event != "[DONE]"]
        told = [choice["logprobs"] for event in events for choice in event["choices"]]
        assert "".join(e["token"] for entries in told if entries for e in entries["content"]) == SAID


def test_stop_strings_end_the_content_only(serve: Serve) -> None:
    server = serve(says(SAID), text=QWEN)
    body = server.chat(stop=["greet", "\n\n", "lo"]).json()
    (choice,) = body["choices"]
    assert choice["message"]["reasoning_content"] == THOUGHT
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hel", "lo")
    assert body["usage"]["completion_tokens"] == len(SAID) - 1
    # A token ends it anywhere.
    (choice,) = server.chat(stop_token_ids=ids("g")).json()["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("They", None)
    # Where nothing is thought the whole answer is content.
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert whole(server, stop="greet", **off)["content"] == "<think>\nThey "


@pytest.mark.parametrize("size", [1, 9, 60])
def test_calls_come_behind_the_thought_and_none_are_in_it(serve: Serve, size: int) -> None:
    server = serve(says(f"<think>\nPerhaps\n{PARIS}\n</think>\n\nLet me see.\n{PARIS}", size), text=QWEN)
    choice = server.chat(tools=TOOLS).json()["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["reasoning_content"] == f"Perhaps\n{PARIS}"
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert streamed(server, "reasoning_content", tools=TOOLS) == message["reasoning_content"]
    assert streamed(server, "content", tools=TOOLS) == message["content"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "20"}
    prompt = prompt_of(server, messages=[*MESSAGES, message, result], tools=TOOLS)
    assert f"<think>\nPerhaps\n{PARIS}\n</think>\n\nLet me see.\n{PARIS}" in prompt


@pytest.mark.parametrize(
    ("begun", "said", "thought", "calls"),
    [
        (f"<think>a</think>\n{PARIS[:40]}", PARIS[40:], None, 1),
        (f"<think>\n{PARIS[:40]}", f"{PARIS[40:]}\n</think>\n{PARIS}", PARIS[40:], 1),
        (f"<think>\n{PARIS[:40]}", f"{PARIS[40:]}\n</think>\nNo.", PARIS[40:], 0),
    ],
)
def test_a_message_that_has_begun_a_call_or_thinks_of_one(
    serve: Serve, begun: str, said: str, thought: str, calls: int
) -> None:
    server = serve(says(said), text=of(PLAIN + "<think>"))
    messages = [*MESSAGES, {"role": "assistant", "content": begun}]
    fields: dict[str, Any] = {"messages": messages, "continue_final_message": True, "tools": TOOLS}
    message = whole(server, **fields)
    assert message["reasoning_content"] == thought
    assert [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", [])] == [
        {"city": "Paris"}
    ] * calls
    # A grammar begins behind the thought, and cannot in the middle of a call.
    refused = thought is None
    response = server.chat(**fields, tool_choice="required")
    assert response.status_code == (400 if refused else 200)


def test_only_a_thought_before_calls(serve: Serve) -> None:
    message = whole(serve(says(f"Hm.</think>{PARIS}"), text=R1), tools=TOOLS)
    assert (message["reasoning_content"], message["content"]) == ("Hm.", None)
    assert len(message["tool_calls"]) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": SCHEMA},
        {"structured_outputs": {"regex": "a"}},
        {"guided_choice": ["a"]},
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "parallel_tool_calls": False},
    ],
)
def test_grammars_begin_behind_thoughts(serve: Serve, fields: dict[str, Any]) -> None:
    server = serve(says("x"), text=QWEN)
    assert server.chat(**fields).status_code == 200
    assert "start: (" in lead_of(server)
    assert server.chat(chat_template_kwargs={"enable_thinking": False}, **fields).status_code == 200
    assert lead_of(server) == ""
    marked = serve(says("x"), reasoning_parser="think")  # by a template that thoughts cannot be turned off in
    assert marked.chat(**fields).status_code == 200
    assert "start: (" in lead_of(marked)
    assert marked.chat(reasoning_effort="none", **fields).status_code == 200
    assert lead_of(marked) == ""
    opened = serve(says("x"), text=R1)
    assert opened.chat(**fields).status_code == 200
    assert "start: thought" in lead_of(opened)


def test_grammars_that_let_nothing_follow_are_refused_before_a_thought(serve: Serve) -> None:
    server = serve(says("x"), text=R1)
    error = error_of(server.chat(guided_json={"$ref": "#"}), 400)
    assert (error["param"], server.engine.submitted) == ("guided_json", [])
    error = error_of(server.chat(guided_choice=["a"], bad_words=["a"]), 400)
    assert (error["param"], server.engine.submitted) == ("bad_words", [])


def test_text_beside_calls_does_not_begin_as_a_thought_does(serve: Serve) -> None:
    for text, unlike in ((QWEN, True), (R1, False)):
        server = serve(says("x"), text=text)
        server.chat(tools=TOOLS, parallel_tool_calls=False)
        grammar = server.engine.submitted[-1].grammar
        assert isinstance(grammar, Grammar)
        assert ('~(/\\s*/ "<think>"' in grammar.spec.text) == unlike


def test_a_schema_behind_a_thought_is_refused_by_its_place(serve: Serve) -> None:
    server = serve(says("x"), text=R1)
    wrong = {"properties": {"a": {"type": "nothing"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": wrong}}
    error = error_of(server.chat(tools=[*TOOLS, tool], tool_choice="required"), 400)
    assert error["param"] == "tools[2].function.parameters"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": wrong}}
    assert error_of(server.chat(response_format=schema), 400)["param"] == "response_format"


EFFORT = "{{ reasoning_effort }}|{{ enable_thinking }}|" + PLAIN


@pytest.mark.parametrize(
    ("template", "effort", "prompt"),
    [
        (GPT_OSS, "high", "Reasoning: high|hi"),
        (GPT_OSS, "none", "Reasoning: none|hi"),
        (QWEN3, "none", "<think>\n\n</think>\n\n"),
        (QWEN3, "low", "assistant\n"),
        (EFFORT, "low", "^low|True|"),
        (EFFORT, "none", "^|False|"),  # for which a level may have no name
        ("{{ thinking }}|" + PLAIN, "max", "True|"),
        (PLAIN, "none", "user: hi\n"),
    ],
)
def test_an_effort_goes_to_the_template(serve: Serve, template: str, effort: str, prompt: str) -> None:
    server = serve(says("x"), text=of(template))
    assert prompt in "^" + prompt_of(server, reasoning_effort=effort)
    counted = server.http.post("/tokenize", json={"messages": MESSAGES, "reasoning_effort": effort}).json()
    assert tuple(counted["tokens"]) == server.engine.submitted[-1].prompt_token_ids
    assert prompt_of(server, reasoning_effort=None) == prompt_of(server)


@pytest.mark.parametrize(
    ("template", "fields", "reason"),
    [
        (PLAIN, {"reasoning_effort": "high"}, "enable_thinking or thinking"),
        (DEEPSEEK_R1, {"reasoning_effort": "none"}, "opens a thought"),
        (DEEPSEEK_R1, {"reasoning_effort": "low"}, "neither that variable"),
        (
            QWEN3,
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            "enable_thinking say",
        ),
        (
            EFFORT,
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "reasoning_effort say",
        ),
    ],
)
def test_an_effort_that_cannot_be_told_is_refused(
    serve: Serve, template: str, fields: dict[str, Any], reason: str
) -> None:
    server = serve(says("x"), text=of(template))
    error = error_of(server.chat(**fields), 400)
    assert (error["param"], error["code"]) == ("reasoning_effort", "unsupported_parameter")
    assert reason in error["message"]
    assert error_of(server.http.post("/tokenize", json={"messages": MESSAGES, **fields}), 400) == error


def test_an_effort_and_variables_agree(serve: Serve) -> None:
    server = serve(says("x"), text=of("{{ other }}" + EFFORT))
    fields = {"reasoning_effort": "low", "chat_template_kwargs": {"other": 5, "enable_thinking": True}}
    assert prompt_of(server, **fields).startswith("5low|True|")
    server = serve(says("x"), text=QWEN)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert prompt_of(server, reasoning_effort="none", **off) == prompt_of(server, **off)


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [*MESSAGES, {"role": "assistant", "content": "x", **fields}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (message(role="user", reasoning="a"), "messages[1].reasoning"),
        (message(role="system", reasoning_content="a"), "messages[1].reasoning_content"),
        (message(reasoning="a", reasoning_content="b"), "messages[1].reasoning"),
        (message(reasoning_content=["a"]), "messages[1].reasoning_content"),
        (message(content=None, reasoning=""), "messages[1].content"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"include_reasoning": 0}, "include_reasoning"),
    ],
)
def test_refusals_name_their_field(hello: RunningServer, fields: dict[str, Any], param: str) -> None:
    assert error_of(hello.chat(**fields), 400)["param"] == param


def test_thoughts_of_earlier_answers_go_to_the_template(serve: Serve) -> None:
    server = serve(says("x"), text=QWEN)
    one, other = {"reasoning": "Hm."}, {"reasoning_content": "Hm."}
    for fields in (one, other, one | other):
        assert "<think>\nHm.\n</think>\n\nx<|im_end|>" in prompt_of(server, **message(**fields))
        body = {"messages": message(**fields)["messages"]}
        tokens = server.http.post("/tokenize", json=body).json()["tokens"]
        assert tokens == list(server.engine.submitted[-1].prompt_token_ids)
    for fields in ({"reasoning": ""}, {"reasoning_content": None}, {}):
        assert "x<|im_end|>" in prompt_of(server, **message(**fields), add_generation_prompt=False)
        assert prompt_of(server, **message(role="user", **fields))
