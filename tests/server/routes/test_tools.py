"""Calls of tools over HTTP: what reaches the engine, what a client reads, and every refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import openai
import pydantic
import pytest

from engine.grammar import Grammar
from server.tool_formats import FORMATS, Function
from tests.server.conftest import MODEL, TEXT, RunningServer, Serve, ids, says
from tests.server.test_errors import error_of

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS: Any = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "time"}}]
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "time"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """OpenAI's choice of some of the tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


MESSAGES: Any = [{"role": "user", "content": "hi"}]
FUNCTIONS = [Function("weather", WEATHER["parameters"]), Function("time", None)]
STRICTLY = [replace(FUNCTIONS[0], strict=True), FUNCTIONS[1]]


def grammar_of(server: RunningServer) -> str | None:
    """Of the last request that reached the engine."""
    grammar = server.engine.submitted[-1].grammar
    assert grammar is None or isinstance(grammar, Grammar)
    return None if grammar is None else grammar.spec.text


def prompt_of(server: RunningServer) -> str:
    return TEXT.decode(server.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def test_whole_answer_with_calls(serve: Serve) -> None:
    server = serve(says(f"Let me see.\n{PARIS}\n{TIME}"))
    answer = server.openai.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    first, second = choice.message.tool_calls
    assert first.type == second.type == "function"
    assert (first.function.name, first.function.arguments) == ("weather", '{"city": "Paris"}')
    assert (second.function.name, second.function.arguments) == ("time", "{}")
    assert first.id != second.id
    assert grammar_of(server) is None  # nothing has to be right
    body = serve(says(PARIS)).chat(tools=TOOLS).json()["choices"][0]
    assert body["message"]["content"] is None
    assert set(body["message"]) == {"role", "content", "refusal", "tool_calls"}


def test_text_without_calls_is_as_ever(serve: Serve) -> None:
    text = " I am <tool_call>ed.\n\n"
    choice = serve(says(text)).chat(tools=TOOLS).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert "".join(deltas_of(serve(says(text)), "content")) == text


def deltas_of(server: RunningServer, field: str, **body: Any) -> list[Any]:
    events = server.events(**{"tools": TOOLS, **body})
    return [
        delta[field]
        for event in events
        if event != "[DONE]"
        for delta in (choice["delta"] for choice in event["choices"])
        if field in delta
    ]


@pytest.mark.parametrize("size", [1, 7, 60])
def test_streamed_calls(serve: Serve, size: int) -> None:
    server = serve(says(f"Let me see.\n{PARIS}\n{TIME}", size))
    assert "".join(deltas_of(server, "content")) == "Let me see."
    calls: list[dict[str, Any]] = []
    for delta in (delta for deltas in deltas_of(server, "tool_calls") for delta in deltas):
        if delta["index"] == len(calls):
            assert (delta["type"], set(delta)) == ("function", {"index", "id", "type", "function"})
            calls.append({"id": delta["id"], "arguments": "", "name": delta["function"]["name"]})
        else:
            assert (set(delta), set(delta["function"])) == ({"index", "function"}, {"arguments"})
        calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
    assert [(call["name"], call["arguments"]) for call in calls] == [
        ("weather", '{"city": "Paris"}'),
        ("time", "{}"),
    ]
    assert len({call["id"] for call in calls}) == 2
    last = [event for event in server.events(tools=TOOLS) if event != "[DONE]"][-1]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


def test_arguments_are_streamed_as_they_are_written(serve: Serve) -> None:
    assert len(deltas_of(serve(says(PARIS, 2)), "tool_calls")) > 4


def test_openais_client_puts_a_stream_together(serve: Serve) -> None:
    server = serve(says(PARIS))
    with server.openai.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Paris"}'


@pytest.mark.parametrize("streamed", [False, True])
def test_what_openais_client_made_of_an_answer_may_come_back(serve: Serve, streamed: bool) -> None:
    """It adds fields to what it parsed, and to calls that it put together."""

    class Weather(pydantic.BaseModel):
        city: str

    server = serve(says(PARIS))
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    chat = server.openai.chat.completions
    if streamed:
        with chat.stream(model=MODEL, messages=MESSAGES, tools=tools) as stream:
            message: Any = stream.get_final_completion().choices[0].message
    else:
        message = chat.parse(model=MODEL, messages=MESSAGES, tools=tools).choices[0].message
    (call,) = message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Paris")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "20"}
    chat.create(model=MODEL, messages=[*MESSAGES, message, result], tools=tools)
    assert PARIS in prompt_of(server)


def test_an_answer_that_the_client_parsed_may_come_back(hello: RunningServer) -> None:
    assert hello.chat(**message(parsed={"a": 1})).status_code == 200
    assert error_of(hello.chat(**message(role="user", parsed=1)), 400)["param"] == "messages[1].parsed"


def test_choices_have_calls_of_their_own(serve: Serve) -> None:
    server = serve(lambda _request, index: says(PARIS if index else "No.")(_request, index))
    choices = server.chat(tools=TOOLS, n=2).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop", "tool_calls"]
    reasons = [
        (choice["index"], choice["finish_reason"])
        for event in server.events(tools=TOOLS, n=2)
        if event != "[DONE]"
        for choice in event["choices"]
        if choice["finish_reason"]
    ]
    assert sorted(reasons) == [(0, "stop"), (1, "tool_calls")]


def test_a_call_that_is_cut_says_so(serve: Serve) -> None:
    server = serve(says(PARIS))
    cut = len(ids(PARIS[: PARIS.index("aris")]))
    choice = server.chat(tools=TOOLS, max_tokens=cut).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "P'


def test_logprobs_are_of_the_text_as_it_was_written(serve: Serve) -> None:
    server = serve(says(PARIS))
    choice = server.chat(tools=TOOLS, logprobs=True).json()["choices"][0]
    assert choice["message"]["tool_calls"]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == PARIS
    events = [event for event in server.events(tools=TOOLS, logprobs=True) if event != "[DONE]"]
    told = [choice["logprobs"] for event in events for choice in event["choices"]]
    assert "".join(e["token"] for entries in told if entries for e in entries["content"]) == PARIS


def test_the_model_is_told_of_tools_and_of_what_they_returned(serve: Serve) -> None:
    server = serve(says("20 degrees."))
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    conversation = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "20", "name": "weather"},
    ]
    assert server.chat(messages=conversation, tools=TOOLS).status_code == 200
    prompt = prompt_of(server)
    assert '"description": "of a city"' in prompt
    assert '{"name": "time", "parameters": {"type": "object", "properties": {}}}' in prompt
    assert PARIS in prompt
    assert "<tool_response>\n20\n</tool_response>" in prompt
    tokens = server.http.post("/tokenize", json={"messages": conversation, "tools": TOOLS}).json()["tokens"]
    assert tokens == list(server.engine.submitted[-1].prompt_token_ids)
    assert server.chat(messages=conversation, tools=TOOLS, tool_choice="none").status_code == 200
    assert '"description": "of a city"' not in prompt_of(server)
    assert PARIS in prompt_of(server)


@pytest.mark.parametrize("arguments", ["[]", "{", "3", '{"a":' * 200])
def test_a_call_that_was_a_mistake_may_come_back(serve: Serve, arguments: str) -> None:
    """With auto nothing keeps a model from it; clients send it back with what went wrong."""
    server = serve(says("x"))
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    answered = {"role": "tool", "tool_call_id": "c", "content": "no JSON"}
    conversation = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, answered]
    assert server.chat(messages=conversation, tools=TOOLS).status_code == 200
    assert f'"arguments": {json.dumps(arguments)}' in prompt_of(server)


def test_a_call_without_arguments_may_come_back(serve: Serve) -> None:
    server = serve(says("x"))
    call = {"id": "c", "type": "function", "function": {"name": "time", "arguments": ""}}
    assert server.chat(messages=[*MESSAGES, {"role": "assistant", "tool_calls": [call]}]).status_code == 200
    assert TIME in prompt_of(server)


def test_a_special_token_that_opens_calls_is_read_and_never_told(serve: Serve) -> None:
    (begin_id,) = ids("<|im_start|>")
    server = serve(says('<|im_start|>[{"name": "time", "arguments": {}}]'))
    server.context.tool_format = replace(FORMATS["mistral"], begin="<|im_start|>", begin_id=begin_id)
    message = server.chat(tools=TOOLS).json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "time", "arguments": "{}"}
    without = server.chat(tools=TOOLS, tool_choice="none").json()["choices"][0]["message"]
    assert without["content"] == '[{"name": "time", "arguments": {}}]'


def test_without_a_choice_of_tools_text_is_text(serve: Serve) -> None:
    server = serve(says(PARIS))
    choice = server.chat(tools=TOOLS, tool_choice="none").json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": PARIS, "refusal": None}


STRICT: Any = [{"type": "function", "function": {**WEATHER, "strict": True}}, TOOLS[1]]
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
HERMES = FORMATS["hermes"]


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, None),
        ({"tool_choice": "none", "tools": STRICT}, None),
        ({"tools": STRICT}, HERMES.grammar(STRICTLY, text=True, schema=None, several=True)),
        ({"parallel_tool_calls": False}, HERMES.grammar(FUNCTIONS, text=True, schema=None, several=False)),
        ({"tool_choice": "required"}, HERMES.grammar(FUNCTIONS, text=False, schema=None, several=True)),
        (
            {"tool_choice": "required", "parallel_tool_calls": False, "response_format": FORMAT},
            HERMES.grammar(FUNCTIONS, text=False, schema=None, several=False),
        ),
        ({"tool_choice": NAMED}, HERMES.grammar(FUNCTIONS[1:], text=False, schema=None, several=False)),
        ({"tool_choice": allowed("auto", "time", "weather")}, None),
        (
            {"tool_choice": allowed("auto", "time")},
            HERMES.grammar(FUNCTIONS[1:], text=True, schema=None, several=True),
        ),
        (
            {"tool_choice": allowed("required", "time")},
            HERMES.grammar(FUNCTIONS[1:], text=False, schema=None, several=True),
        ),
        (
            {"tool_choice": allowed("required", "time", "weather"), "parallel_tool_calls": False},
            HERMES.grammar(FUNCTIONS, text=False, schema=None, several=False),
        ),
        (
            {"response_format": FORMAT},
            HERMES.grammar(FUNCTIONS, text=True, schema={"type": "object"}, several=True),
        ),
    ],
)
def test_what_must_be_right_follows_a_grammar(serve: Serve, fields: dict[str, Any], grammar: Any) -> None:
    server = serve(says("x"))
    assert server.chat(**{"tools": TOOLS, **fields}).status_code == 200
    assert grammar_of(server) == (grammar and grammar.text)


def test_the_model_is_told_of_all_tools_and_may_call_the_allowed_ones(serve: Serve) -> None:
    server = serve(says(f"{TIME}\n{PARIS}"))
    whole = server.chat(tools=TOOLS, tool_choice=allowed("auto", "time", "weather")).json()["choices"][0]
    assert len(whole["message"]["tool_calls"]) == 2
    told = prompt_of(server)
    some = server.chat(tools=TOOLS, tool_choice=allowed("auto", "time")).json()["choices"][0]
    assert prompt_of(server) == told
    assert [call["function"]["name"] for call in some["message"]["tool_calls"]] == ["time"]


def test_the_setting_names_the_format(serve: Serve) -> None:
    call = '{"name": "time", "parameters": {}}'
    server = serve(says(call), tool_call_parser="llama3_json")
    choice = server.chat(tools=TOOLS).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "time", "arguments": "{}"}
    error = error_of(server.chat(tools=TOOLS, response_format=FORMAT), 400)
    assert error["param"] == "response_format"


def continued(text: str) -> dict[str, Any]:
    messages = [*MESSAGES, {"role": "assistant", "content": text}]
    return {"messages": messages, "continue_final_message": True, "tools": TOOLS}


def test_a_call_that_the_continued_message_has_begun_is_read(serve: Serve) -> None:
    at = PARIS.index("aris")
    server = serve(says(PARIS[at:]))
    begun = f"Well.\n{TIME}\n{PARIS[:at]}"
    for choice in server.chat(**continued(begun), n=2).json()["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert prompt_of(server).endswith(PARIS[:at])
    deltas = [d for ds in deltas_of(server, "tool_calls", **continued(begun)) for d in ds]
    assert [delta["index"] for delta in deltas] == [0] * len(deltas)
    assert deltas[0]["id"]
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"city": "Paris"}'


def test_other_text_that_is_continued_is_not_told_again(serve: Serve) -> None:
    for begun, said in (("Well, <tool", "box."), (f"{PARIS}\n", "So."), ("Well,", " yes.")):
        choice = serve(says(said)).chat(**continued(begun)).json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": said, "refusal": None}
        assert choice["finish_reason"] == "stop"
    # What a user has begun is no call of the model's.
    user = {**continued(""), "messages": [{"role": "user", "content": PARIS[:-20]}]}
    choice = serve(says(PARIS[-20:])).chat(**user).json()["choices"][0]
    assert choice["message"]["content"] == PARIS[-20:]


def test_a_grammar_begins_where_the_answer_does(serve: Serve) -> None:
    server = serve(says(TIME), tool_call_parser="llama3_json")
    call = '{"name": "time", "parameters": {}}'
    fields = {"tool_choice": "required"}
    error = error_of(server.chat(**continued(call[:9]), **fields), 400)
    assert error["param"] == "continue_final_message"
    server = serve(says(call), tool_call_parser="llama3_json")
    choice = server.chat(**continued("Well, "), **fields).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "time"
    assert server.chat(**continued("Well, ")).json()["choices"][0]["message"]["content"] == call


def test_mistrals_newer_form(serve: Serve) -> None:
    server = serve(says("So. [TOOL_CALLS]weather[CALL_ID]abc123XYZ[ARGS]{}[TOOL_CALLS]time[ARGS]{}"))
    server.context.tool_format = replace(FORMATS["mistral"], marks=(("[ARGS]", None),))
    message = server.chat(tools=TOOLS, tool_choice="required").json()["choices"][0]["message"]
    assert message["content"] == "So."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "time"]
    assert all(call["id"] != "abc123XYZ" for call in message["tool_calls"])
    assert 'call_1: "time" "[ARGS]" arguments_1' in (grammar_of(server) or "")


CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [*MESSAGES, {"role": "assistant", "content": "x", **fields}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].function.name"),
    ({"tools": [TOOLS[1]] * 129}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "returns": 1}}]}, "tools[0].function.returns"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
        "tools[0].function.parameters",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {**NAMED, "function": {"name": "f"}}}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    ({"tools": TOOLS, "tool_choice": {**NAMED, **allowed("auto", "time")}}, "tool_choice.function"),
    ({"tools": TOOLS, "tool_choice": allowed("none", "time")}, "tool_choice.allowed_tools.mode"),
    ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
    (
        {"tools": TOOLS, "tool_choice": allowed("auto", "time", "f")},
        "tool_choice.allowed_tools.tools[1].function.name",
    ),
    ({"tool_choice": allowed("required", "time")}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": allowed("auto", "time"), "min_tokens": 3}, "min_tokens"),
    ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tools": TOOLS, "guided_json": {}}, "guided_json"),
    ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 3}, "min_tokens"),
    ({"tools": STRICT, "min_tokens": 3}, "min_tokens"),
    (message(role="user", tool_calls=[CALL]), "messages[1].tool_calls"),
    (message(role="user", tool_call_id="c"), "messages[1].tool_call_id"),
    (message(role="tool"), "messages[1].tool_call_id"),
    (message(content=None), "messages[1].content"),
    (message(content=None, tool_calls=[]), "messages[1].content"),
    (message(tool_calls=[{**CALL, "type": "custom"}]), "messages[1].tool_calls[0].type"),
    (message(tool_calls=[{"id": "c", "type": "function"}]), "messages[1].tool_calls[0].function"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_name_their_field(hello: RunningServer, fields: dict[str, Any], param: str) -> None:
    error = error_of(hello.chat(**fields), 400)
    assert error["param"] == param
    assert param.split("[")[0].split(".")[0] in error["message"]


def tool_of(parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}


UNKNOWN = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
PLACE = "tools[2].function.parameters"


@pytest.mark.parametrize(
    ("tool", "place", "reason"),
    [
        (tool_of({"properties": {"a": {"type": "nothing"}}}), PLACE, "nothing"),
        (tool_of(UNKNOWN, strict=True), PLACE, "uniqueItems"),
        *(
            (tool_of({"type": kind}), f"{PLACE}.type", "must be 'object'")
            for kind in ("string", None, ["array", "null"])
        ),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_where_it_would_be(
    hello: RunningServer, tool: dict[str, Any], place: str, reason: str
) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        error = error_of(hello.chat(tools=[*TOOLS, tool], tool_choice=choice), 400)
        assert error["param"] == place
        assert error["message"].startswith(f"{place}: ")
        assert reason in error["message"]
        assert "\n" not in error["message"]
    if "strict" not in tool["function"]:
        assert hello.chat(tools=[*TOOLS, tool]).status_code == 200  # nobody reads it but the model


def test_what_cannot_be_enforced_is_left_to_the_model_unless_its_tool_is_strict(hello: RunningServer) -> None:
    for tools in (
        [tool_of(UNKNOWN)],
        [tool_of(UNKNOWN), {"type": "function", "function": {**WEATHER, "strict": True}}],
    ):
        assert hello.chat(tools=tools, tool_choice="required").status_code == 200


def test_a_response_format_that_is_wrong_beside_tools_is_named(hello: RunningServer) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": UNKNOWN}}
    error = error_of(hello.chat(tools=TOOLS, response_format=wrong), 400)
    assert error["param"] == "response_format"
    assert "uniqueItems" in error["message"]


def test_empty_tools_are_none(hello: RunningServer) -> None:
    for fields in (
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        message(tool_calls=[], tool_call_id=None),
    ):
        answer = hello.chat(**fields)
        assert answer.status_code == 200, answer.text
    assert grammar_of(hello) is None
