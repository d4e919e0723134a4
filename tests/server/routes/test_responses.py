"""OpenAI's Responses API over HTTP, read by OpenAI's own client and held against its types."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from server.response_objects import ResponseObject
from server.schemas.responses import ResponsesRequest
from tests.server.conftest import (
    MODEL,
    TEXT,
    RunningServer,
    Serve,
    ids,
    says,
)
from tests.server.routes.test_reasoning import QWEN, SAID, THOUGHT
from tests.server.routes.test_tools import PARIS, TIME, WEATHER
from tests.server.test_errors import error_of

TOOLS: Any = [{"type": "function", **WEATHER, "strict": False}, {"type": "function", "name": "time"}]
EVENT: Any = pydantic.TypeAdapter(ResponseStreamEvent)


def post(server: RunningServer, **body: Any) -> Any:
    return server.http.post("/v1/responses", json={"model": MODEL, "input": "hi", **body})


def whole(server: RunningServer, **body: Any) -> dict[str, Any]:
    """The response, which OpenAI's model and ours take as it is."""
    answer = post(server, **body)
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    Response.model_validate(response, strict=True)
    assert set(response) == set(ResponseObject.model_fields)
    ResponseObject.model_validate(response, strict=True)
    return response


def events(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    """A stream's events, each of which OpenAI's models take, named as it says and numbered in order."""
    answer = post(server, stream=True, **body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "\u2028" not in answer.text  # at which some clients would cut an event
    found = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(response: Any) -> Any:
    """To compare answers that differ in what is made anew for each."""
    if isinstance(response, list):
        return [without_ids(one) for one in response]
    if isinstance(response, dict):
        own = ("id", "call_id", "item_id", "created_at", "completed_at")
        return {name: without_ids(value) for name, value in response.items() if name not in own}
    return response


def prompt_of(server: RunningServer) -> str:
    return TEXT.decode(server.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


def test_text_in_text_out(hello: RunningServer) -> None:
    response = whole(
        hello,
        instructions="Be kind.",
        metadata={"a": "b"},
        user="u",
        temperature=0.5,
        client_metadata={"c": "d"},
    )
    assert response["status"] == "completed"
    (message,) = response["output"]
    assert message["content"] == [
        {"type": "output_text", "text": "Hello, world!", "annotations": [], "logprobs": []}
    ]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(hello) == start
    assert response["usage"] == {
        "input_tokens": len(ids(start)),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 14,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(ids(start)) + 14,
    }
    told = {"instructions": "Be kind.", "metadata": {"a": "b"}, "user": "u", "temperature": 0.5, "top_p": 1.0}
    assert told.items() <= response.items()
    assert (response["store"], response["error"], response["incomplete_details"]) == (False, None, None)


def test_openais_client_reads_it_whole_and_streamed(hello: RunningServer) -> None:
    client = hello.openai.responses
    response = client.create(model=MODEL, input=[{"role": "user", "content": "hi"}])
    assert response.output_text == "Hello, world!"
    with client.stream(model=MODEL, input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert len(deltas) > 3
    assert "".join(deltas) == final.output_text == response.output_text
    assert final.usage == response.usage


def test_the_events_of_a_text(serve: Serve) -> None:
    """What each repeats is what the others told."""
    server = serve(says("Hallo \u2028Welt"))
    found = events(server)
    assert [event["type"].removeprefix("response.") for event in found if "delta" not in event] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    created, started, added, part, *deltas, done, part_done, item_done, completed = found
    assert created["response"] == started["response"]
    assert (created["response"]["status"], created["response"]["usage"]) == ("in_progress", None)
    item = item_done["item"]
    assert added["item"] == {**item, "status": "in_progress", "content": []}
    assert part["part"] == {**item["content"][0], "text": ""}
    assert [part_done["part"]] == item["content"] == [{**part_done["part"], "text": done["text"]}]
    assert "".join(event["delta"] for event in deltas) == done["text"] == "Hallo \u2028Welt"
    places = {(event["item_id"], event["output_index"], event["content_index"]) for event in found[3:-2]}
    assert places == {(item["id"], 0, 0)}
    assert completed["response"]["output"] == [item]
    same = {"id", "created_at", "metadata", "tools", "text", "reasoning", "model"}
    assert {k: completed["response"][k] for k in same} == {k: created["response"][k] for k in same}
    assert without_ids(completed["response"]) == without_ids(whole(server))


@pytest.mark.parametrize("size", [1, 3, 60])
def test_thoughts_messages_and_calls_are_items_in_their_order(serve: Serve, size: int) -> None:
    """However the text comes; streamed events and the whole answer say the same."""
    server = serve(says(f"{SAID}\n{PARIS}\nAnd now:\n{TIME}", size), text=QWEN)
    response = whole(server, tools=TOOLS)
    thought, first, call, second, other = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": THOUGHT}]
    assert thought["summary"] == []
    assert "encrypted_content" not in thought
    assert [item["content"][0]["text"] for item in (first, second)] == ["Hello!", "And now:"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Paris"})
    assert (other["name"], other["arguments"], other["status"]) == ("time", "{}", "completed")
    assert len({item["id"] for item in response["output"]}) == 5
    assert call["call_id"] != other["call_id"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > len(ids(THOUGHT))

    found = events(server, tools=TOOLS)
    assert without_ids(found[-1]["response"]) == without_ids(response)
    items = found[-1]["response"]["output"]
    assert [event["item"] for event in found if event["type"] == "response.output_item.done"] == items
    for index, item in enumerate(items):
        mine = [event for event in found if event.get("output_index") == index]
        assert all(event.get("item_id", item["id"]) == item["id"] for event in mine)
        whole_text = item.get("arguments") or item["content"][0]["text"]
        assert "".join(event.get("delta", "") for event in mine) == whole_text
        (done,) = (event for event in mine if event["type"].endswith(("text.done", "arguments.done")))
        assert whole_text in (done.get("text"), done.get("arguments"))
    # One item ends before the next begins.
    order = [event["output_index"] for event in found if "output_index" in event]
    assert order == sorted(order)
    with server.openai.responses.stream(model=MODEL, input="hi", tools=TOOLS) as stream:
        parsed = [item.type for item in stream.get_final_response().output]
    assert parsed == [item["type"] for item in items]


def test_an_answer_may_come_back(serve: Serve) -> None:
    """As the client has it, with what the calls returned; the template has it all in its place."""
    server = serve(says(f"{SAID}\n{PARIS}"), text=QWEN)
    client = server.openai.responses
    response = client.create(model=MODEL, input="hi", tools=TOOLS)
    with client.stream(model=MODEL, input="hi", tools=TOOLS) as stream:
        parsed = stream.get_final_response()
    for answer in (response, parsed):
        call = answer.output[-1]
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        back = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in answer.output), result]
        assert post(server, input=back, tools=TOOLS).status_code == 200
        prompt = prompt_of(server)
        said = f'<think>\n{THOUGHT}\n</think>\n\nHello!\n<tool_call>\n{{"name": "weather", "arguments": '
        assert f"<|im_start|>assistant\n{said}" in prompt
        assert prompt.count("<|im_start|>assistant") == 2
        assert "<tool_response>\nsunny\n</tool_response>" in prompt


def test_a_thought_comes_back_in_either_form(serve: Serve) -> None:
    """Clients that leave contents out send what `include` asks for."""
    server = serve(says(SAID + "é"), text=QWEN)
    thought, message = whole(server, include=["reasoning.encrypted_content"])["output"]
    assert thought["encrypted_content"].isascii()
    found = events(server, include=["reasoning.encrypted_content"])
    (done, _) = (event["item"] for event in found if event["type"] == "response.output_item.done")
    for told in (done, found[-1]["response"]["output"][0]):
        assert told["encrypted_content"] == thought["encrypted_content"]
    hidden = {name: value for name, value in thought.items() if name != "content"}
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": THOUGHT}]}
    for form in (thought, hidden, {**hidden, "content": None}, summary):
        post(server, input=[{"role": "user", "content": "a"}, form, message])
        assert f"<think>\n{THOUGHT}\n</think>\n\nHello!é" in prompt_of(server)
    other = {**thought, "content": [{"type": "reasoning_text", "text": "Other."}]}
    post(server, input=[{"role": "user", "content": "a"}, other, message])
    assert "<think>\nOther.\n</think>\n\nHello!é" in prompt_of(server)
    for wrong in (
        "gAAAA",
        "QUJD",
        "medusa-thought.QU!JD",
        thought["encrypted_content"][:-1] + "!",
        "medusa-thought._w==",
    ):
        bad = post(server, input=[{"role": "user", "content": "a"}, {**hidden, "encrypted_content": wrong}])
        assert error_of(bad, 400)["param"] == "input[1].encrypted_content"
    # One of which nothing is left is none, as a server without such contents has it.
    empty = {"type": "reasoning", "id": "rs_1", "summary": []}
    assert post(server, input=[{"role": "user", "content": "a"}, empty, message]).status_code == 200
    assert "<think>\n\n</think>\n\nHello!é" in prompt_of(server)


@pytest.mark.parametrize(
    ("items", "written"),
    [
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], ["user a", "assistant b", "assistant c"]),
        (["out", "call"], ["tool ok", "assistant  1"]),
        (["call", "nothing"], ["assistant  1", "tool "]),
        (["call", "call", "out", "out"], ["assistant  2", "tool ok", "tool ok"]),
        ([("assistant", "b"), "call", ("assistant", "c"), "out"], ["assistant b\nc 1", "tool ok"]),
        (["call", "think", "call"], ["assistant  1", "assistant(t)  1"]),
        (["think", "think", ("assistant", "b")], ["assistant(t) ", "assistant(t) b"]),
        (["think", ("user", "a")], ["assistant(t) ", "user a"]),
        ([("developer", "d"), ("system", "s")], ["developer d", "system s"]),
    ],
)
def test_items_become_messages(items: list[Any], written: list[str]) -> None:
    forms: dict[str, Any] = {
        "call": {"type": "function_call", "call_id": "1", "name": "time", "arguments": "{}"},
        "out": {
            "type": "function_call_output",
            "call_id": "1",
            "output": [{"type": "input_text", "text": "ok"}],
        },
        "nothing": {"type": "function_call_output", "call_id": "1", "output": []},
        "think": {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]},
    }
    body = [
        forms[item] if isinstance(item, str) else dict(zip(("role", "content"), item, strict=True))
        for item in items
    ]
    chat = ResponsesRequest.model_validate({"input": body}).as_chat()
    told = [
        message.role
        + (f"({message.reasoning_content})" if message.reasoning_content else "")
        + f" {message.text}"
        + (f" {len(message.tool_calls)}" if message.tool_calls else "")
        for message in chat.messages
    ]
    assert told == written


def test_what_was_cut_is_incomplete_and_can_be_continued(serve: Serve) -> None:
    server = serve(says("Hello, world!"))
    response = whole(server, max_output_tokens=5)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    (message,) = response["output"]
    assert (message["status"], message["content"][0]["text"]) == ("incomplete", "Hello")
    *_, done, last = events(server, max_output_tokens=5)
    assert (last["type"], done["item"]["status"]) == ("response.incomplete", "incomplete")
    assert without_ids(last["response"]) == without_ids(response)
    post(server, input=[{"role": "user", "content": "hi"}, message])
    assert prompt_of(server).endswith("<|im_start|>assistant\nHello")
    post(server, input=[{"role": "user", "content": "hi", "status": "in_progress"}])
    assert prompt_of(server).endswith("hi<|im_end|>\n<|im_start|>assistant\n")
    post(server, input=[{"role": "user", "content": "hi"}, {**message, "status": "completed"}])
    assert prompt_of(server).endswith("Hello<|im_end|>\n<|im_start|>assistant\n")


def test_a_call_that_was_begun_comes_whole(serve: Serve) -> None:
    head, rest = PARIS[:40], PARIS[40:]
    begun = {"role": "assistant", "content": head, "status": "incomplete"}
    server = serve(says(rest))
    (call,) = whole(server, input=[{"role": "user", "content": "hi"}, begun], tools=TOOLS)["output"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("said", "options", "kinds", "status"),
    [
        ("", {}, ["message"], "completed"),
        ("<think>a</think>", {}, ["reasoning", "message"], "completed"),
        ("<think>abcdef", {"max_output_tokens": 9}, ["reasoning"], "incomplete"),
        (SAID, {"include_reasoning": False}, ["message"], "completed"),
        (PARIS[:50], {"tools": TOOLS, "max_output_tokens": 50}, ["function_call"], "incomplete"),
        (PARIS, {"tools": TOOLS, "tool_choice": "none"}, ["message"], "completed"),
    ],
)
def test_which_items_there_are(
    serve: Serve, said: str, options: dict[str, Any], kinds: list[str], status: str
) -> None:
    server = serve(says(said), text=QWEN)
    response = whole(server, **options)
    assert [item["type"] for item in response["output"]] == kinds
    assert response["output"][-1]["status"] == response["status"] == status
    assert without_ids(events(server, **options)[-1]["response"]) == without_ids(response)


class Answer(pydantic.BaseModel):
    city: str


def test_structured_answers_and_calls_are_parsed(serve: Serve) -> None:
    client = serve(says('{"city": "Paris"}')).openai.responses
    parsed = client.parse(model=MODEL, input="hi", text_format=Answer)
    assert parsed.output_parsed == Answer(city="Paris")
    with client.stream(model=MODEL, input="hi", text_format=Answer) as stream:
        assert stream.get_final_response().output_parsed == Answer(city="Paris")
    server = serve(says(PARIS))
    tool = openai.pydantic_function_tool(Answer, name="weather")
    (call,) = server.openai.responses.parse(model=MODEL, input="hi", tools=[tool]).output
    assert call.type == "function_call"
    assert call.parsed_arguments == Answer(city="Paris")
    assert server.engine.submitted[-1].grammar is not None  # the client's tools are strict


def test_what_reaches_the_engine(serve: Serve) -> None:
    server = serve(says("x"))
    sampling = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.01,
        "seed": 5,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "ignore_eos": False,
    }
    options = {"priority": 3, "cache_salt": "s", "medusa": {"max_tree_size": 4}, "stop": ["zz"]}
    biased = {"logit_bias": {"5": 1}, "bad_words": ["q"], "stop_token_ids": [7], "max_output_tokens": 9}
    whole(server, **sampling, **options, **biased)
    request = server.engine.submitted[-1]
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling
    assert (request.priority, request.cache_salt, request.medusa.max_tree_size) == (3, "s", 4)
    assert (request.sampling.logit_bias, request.sampling.max_tokens) == (((5, 1.0),), 9)
    assert (request.sampling.stop_token_ids, request.sampling.bad_words) == ((7,), (tuple(ids("q")),))
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}
    response = whole(server, tools=TOOLS, tool_choice=choice)
    assert response["tool_choice"] == choice
    assert response["tools"][1] == {
        "type": "function",
        "name": "time",
        "description": None,
        "parameters": None,
        "strict": False,
    }
    assert "arguments_0" in server.engine.submitted[-1].grammar.spec.text  # type: ignore[union-attr]
    assert whole(server, tools=TOOLS)["parallel_tool_calls"]
    assert server.engine.submitted[-1].grammar is None
    assert not whole(server, tools=TOOLS, parallel_tool_calls=False)["parallel_tool_calls"]
    assert server.engine.submitted[-1].grammar is not None
    for tools in ([], None):  # as Codex asks for a summary
        assert not whole(server, tools=tools, parallel_tool_calls=False)["parallel_tool_calls"]
        assert server.engine.submitted[-1].grammar is None
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    response = whole(server, text={"format": schema, "verbosity": "medium"})
    assert response["text"]["format"] == schema
    assert whole(server, structured_outputs={"regex": "a"})["status"] == "completed"
    assert server.engine.submitted[-1].grammar.spec.kind == "regex"  # type: ignore[union-attr]


NAMESPACE: Any = {
    "type": "namespace",
    "name": "agents",
    "description": "Others who help.",
    "tools": [
        {"type": "function", "name": "weather", "parameters": WEATHER["parameters"], "strict": False},
        {"type": "function", "name": "ask"},
    ],
}


@pytest.mark.parametrize("size", [2, 60])
def test_functions_in_a_namespace_are_called_by_both_names(serve: Serve, size: int) -> None:
    """As Codex has them: the model knows one name, as in vLLM; clients see two, and send two back."""
    server = serve(says(f"{PARIS.replace('weather', 'agents__weather')}\n{TIME}", size))
    tools = [NAMESPACE, *TOOLS]
    response = whole(server, tools=tools)
    first, second = response["output"]
    assert (first["namespace"], first["name"]) == ("agents", "weather")
    assert second["name"] == "time"
    assert "namespace" not in second
    assert response["tools"][0] == {
        **NAMESPACE,
        "tools": [
            {"description": None, "parameters": None, **one, "strict": False} for one in NAMESPACE["tools"]
        ],
    }
    prompt = prompt_of(server)
    assert '"name": "agents__weather"' in prompt
    assert '"name": "weather"' in prompt
    assert without_ids(events(server, tools=tools)[-1]["response"]) == without_ids(response)
    result = {"type": "function_call_output", "call_id": first["call_id"], "output": "ok"}
    named = {**result, "name": "weather", "namespace": "agents"}
    for output in (result, named):
        assert post(server, input=[{"role": "user", "content": "a"}, first, output]).status_code == 200
        assert '"name": "agents__weather", "arguments"' in prompt_of(server)
    body = ResponsesRequest.model_validate({"input": [first, named]})
    assert body.as_chat().messages[-1].name == "agents__weather"
    choice = {"type": "function", "name": "agents__ask"}
    assert whole(server, tools=tools, tool_choice=choice)["tool_choice"] == choice
    assert "agents__ask" in server.engine.submitted[-1].grammar.spec.text  # type: ignore[union-attr]


def test_reasoning_effort_goes_to_the_template(serve: Serve) -> None:
    server = serve(says("x"), text=QWEN)
    response = whole(server, reasoning={"effort": "none", "summary": "auto"})
    assert prompt_of(server).endswith("<think>\n\n</think>\n\n")
    assert response["reasoning"] == {"effort": "none", "summary": None}
    assert whole(server)["reasoning"]["effort"] is None
    assert not prompt_of(server).endswith("<think>\n\n</think>\n\n")
    assert whole(server, chat_template_kwargs={"enable_thinking": False})["reasoning"]["effort"] is None
    assert prompt_of(server).endswith("<think>\n\n</think>\n\n")


def test_logprobs_are_the_answers(serve: Serve) -> None:
    """Those of the thought before it are nobody's; each delta has its own text's."""
    server = serve(says("<think>\nHm, é\n</think>\n\nHello é!<|im_start|>", 1), text=QWEN)
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = whole(server, **options)
    assert response["top_logprobs"] == 2
    told = response["output"][1]["content"][0]["logprobs"]
    text = b"".join(bytes(entry["bytes"]) for entry in told).decode()
    assert text == "\n\nHello é!"  # with what the model wrote between thought and answer
    assert {len(entry["top_logprobs"]) for entry in told} == {2}
    assert (told[-1]["token"], told[-1]["bytes"]) == ("<|im_start|>", [])  # which is no text
    found = events(server, **options)
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == told
    assert all(
        b"".join(bytes(e["bytes"]) for e in event["logprobs"]).decode().lstrip("\n") == event["delta"]
        for event in deltas
    )
    (done,) = (event for event in found if event["type"] == "response.output_text.done")
    assert done["logprobs"] == told
    assert whole(server)["output"][1]["content"][0]["logprobs"] == []
    # With tools that may not be called, too.
    assert whole(server, **options, tools=TOOLS, tool_choice="none")["output"][1]["content"][0]["logprobs"]
