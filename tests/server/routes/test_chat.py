"""What a client of /v1/chat/completions sees: shapes, text, usage, several choices, disconnects."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from engine.fake import FakeEngine
from engine.types import Request
from tests.server.conftest import (
    EOS_ID,
    MODEL,
    TEXT,
    Defaults,
    RunningServer,
    Serve,
    chat_body,
    endless,
    ids,
    says,
    steps,
    wait_until,
)

MESSAGES: Any = [{"role": "user", "content": "hi"}]


def texts_of(events: list[Any]) -> dict[int, str]:
    """Each choice's streamed text."""
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"] if event != "[DONE]" else []:
            texts.setdefault(choice["index"], "")
            texts[choice["index"]] += choice["delta"].get("content") or ""
    return texts


def test_whole_answer_has_openais_shape(hello: RunningServer) -> None:
    response = hello.chat(temperature=0)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "system_fingerprint": body["system_fingerprint"],
        "usage": body["usage"],
    }
    assert body["system_fingerprint"].startswith("fp_")
    prompt = len(TEXT.encode_chat(MESSAGES))
    output = len("Hello, world!") + 1  # the EOS token is output, too
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_stream_has_openais_shape(hello: RunningServer) -> None:
    *chunks, done = hello.events()
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == MODEL for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    first, *middle, last = (chunk["choices"][0] for chunk in chunks)
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} and choice["delta"]["content"] for choice in middle)
    assert all(choice["finish_reason"] is None and choice["logprobs"] is None for choice in [first, *middle])
    assert (last["delta"], last["finish_reason"], last["stop_reason"]) == ({}, "stop", None)
    assert all("stop_reason" not in choice for choice in [first, *middle])


def test_one_step_is_one_event(hello: RunningServer) -> None:
    pieces = [e["choices"][0]["delta"].get("content") for e in hello.events()[:-1]]
    assert [piece for piece in pieces if piece] == ["H", "ell", "o, ", "wor", "ld!"]


def test_official_client_reads_the_same_streamed_and_whole(hello: RunningServer) -> None:
    whole = hello.openai.chat.completions.create(model=MODEL, messages=MESSAGES)
    stream = hello.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.content == streamed == "Hello, world!"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_usage_is_null_until_the_last_chunk_when_asked_for(hello: RunningServer) -> None:
    *chunks, last, _ = hello.events(stream_options={"include_usage": True})
    assert all("usage" in chunk and chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len("Hello, world!") + 1


@pytest.mark.parametrize("text", ["naïve 日本語 👩‍👩‍👧 done", "a\nb\r\nc\u2028d\u2029e\x85f\x0bg\x1ch"])
def test_any_text_survives_any_cut(serve: Serve, text: str) -> None:
    """Characters cut between steps, and line breaks that a client's line splitting knows of."""
    for size in (1, 2, 5):
        server = serve(says(text, size))
        assert server.chat().json()["choices"][0]["message"]["content"] == text
        assert texts_of(server.events()) == {0: text}


def test_max_tokens_cuts_inside_a_step(hello: RunningServer) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        body = hello.chat(**{field: 3}).json()
        assert body["choices"][0]["message"]["content"] == "Hel"
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 3


def test_stop_string_across_steps_ends_text_usage_and_generation(serve: Serve) -> None:
    # Steps of three: "a", "bcS", "TOP", "def": the stop string spans two, and the engine would go on.
    engine = FakeEngine(lambda r, i: [*steps("abcSTOPdef"), *endless(r, i)], vocab_size=TEXT.vocab_size)
    server = serve(engine)
    for stop in ("STOP", ["nope", "STOP"]):
        body = server.chat(stop=stop).json()
        assert body["choices"][0]["message"]["content"] == "abc"
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == len("abcSTOP")
        *events, usage, _ = server.events(stop=stop, stream_options={"include_usage": True})
        assert texts_of(events) == {0: "abc"}
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        assert usage["usage"] == body["usage"]
    wait_until(lambda: engine.stats.running == 0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stop": ["absent", 'o, "é']}, 'o, "é'),
        ({"stop_token_ids": ids("e")}, ids("e")[0]),
        ({"stop": ["absent"], "stop_token_ids": ids("z")}, None),
        ({"max_tokens": 2}, None),
        ({"stop_token_ids": [EOS_ID]}, EOS_ID),
    ],
)
def test_what_stopped_a_choice_is_told(
    serve: Serve, fields: dict[str, Any], reason: str | int | None
) -> None:
    server = serve(says('Hello, "é" world!'))
    assert server.chat(**fields).json()["choices"][0]["stop_reason"] == reason
    assert server.events(**fields)[-2]["choices"][0]["stop_reason"] == reason
    body: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 99}
    answer = server.http.post("/v1/completions", json=body | fields).json()
    assert answer["choices"][0]["stop_reason"] == reason
    chunks = list(server.openai.completions.create(**body, stream=True, extra_body=fields))
    assert chunks[-1].choices[0].model_extra == {"stop_reason": reason}
    assert not any(choice.model_extra for chunk in chunks[:-1] for choice in chunk.choices)


def test_stop_string_inside_a_step_leaves_its_rest_uncounted(serve: Serve) -> None:
    server = serve(lambda r, i: [ids("a"), ids("b.cd"), *endless(r, i)])
    body = server.chat(stop=".").json()
    assert body["choices"][0]["message"]["content"] == "ab"
    assert body["usage"]["completion_tokens"] == 3


def test_held_back_start_of_a_stop_string_comes_out_at_the_end(serve: Serve) -> None:
    server = serve(says("abcST"))
    assert server.chat(stop="STOP").json()["choices"][0]["message"]["content"] == "abcST"
    assert texts_of(server.events(stop="STOP")) == {0: "abcST"}


def test_stop_token_counts_and_is_no_text(hello: RunningServer) -> None:
    body = hello.chat(stop_token_ids=ids(",")).json()
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("Hello,")


def test_ignore_eos_goes_on(serve: Serve) -> None:
    server = serve(lambda _r, _i: [ids("a"), [EOS_ID], ids("b")])
    assert server.chat().json()["choices"][0]["message"]["content"] == "a"
    assert server.chat(ignore_eos=True).json()["choices"][0]["message"]["content"] == "ab"


def script_per_choice(_request: Request, index: int) -> list[list[int]]:
    return [*steps(["zero is long enough", "one.", "two"][index]), [EOS_ID]]


def test_choices_share_one_request_and_interleave(serve: Serve) -> None:
    server = serve(script_per_choice)
    body = server.chat(n=3).json()
    expected = {0: "zero is long enough", 1: "one.", 2: "two"}
    assert {c["index"]: c["message"]["content"] for c in body["choices"]} == expected
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == sum(len(text) + 1 for text in expected.values())
    assert len(server.engine.submitted) == 1

    events = server.events(n=3)
    assert texts_of(events) == expected
    order = [event["choices"][0]["index"] for event in events[:-1]]
    assert order != sorted(order)  # not one after the other
    for index in range(3):
        own = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert own[0]["delta"].get("role") == "assistant"
        assert [c["finish_reason"] for c in own[-2:]] == [None, "stop"]


def test_stop_string_ends_one_choice_and_frees_its_slot(serve: Serve) -> None:
    def script(_request: Request, index: int) -> list[list[int]]:
        return [ids("a"), ids("b.c" if index == 0 else "bcd"), *[ids("x")] * 500]

    engine = FakeEngine(script, step_s=0.002, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    with server.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, stop=".", stream=True
    ) as stream:
        for chunk in stream:
            if chunk.choices[0].finish_reason:
                assert chunk.choices[0].index == 0
                break
        wait_until(lambda: engine.stats.running == 1, timeout_s=0.5)
        assert next(iter(stream)).choices[0].index == 1  # the other goes on


def test_sampling_fields_reach_the_engine(serve: Serve) -> None:
    server = serve(says("ok"))
    server.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=-3,
        max_tokens=9,
        n=2,
        stop_token_ids=[5],
        ignore_eos=True,
    )
    sampling = server.engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.seed, sampling.max_tokens, sampling.n) == (-3, 9, 2)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((5,), True)


def test_absent_and_null_fields_take_the_models_defaults_then_openais(serve: Serve) -> None:
    server = serve(says("ok"), defaults=Defaults(temperature=0.2, top_k=20))
    for fields in ({}, {"temperature": None, "top_k": None, "top_p": None, "max_tokens": None, "n": None}):
        server.chat(**fields)
        sampling = server.engine.submitted[-1].sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.2, 20, 1.0, 0.0)
        assert (sampling.max_tokens, sampling.n, sampling.seed) == (None, 1, None)
    server.chat(temperature=0, top_k=-1)  # falsy values are values
    assert server.engine.submitted[-1].sampling.temperature == 0
    assert server.engine.submitted[-1].sampling.top_k == 0


def test_a_seed_of_minus_one_is_none(hello: RunningServer) -> None:
    """As in vLLM and llama.cpp, whose clients send it for a random one."""
    hello.chat(seed=-1)
    hello.http.post("/v1/completions", json={"model": MODEL, "prompt": "hi", "seed": -1})
    assert [request.sampling.seed for request in hello.engine.submitted[-2:]] == [None, None]


def test_messages_go_through_the_chat_template(serve: Serve) -> None:
    server = serve(says("ok"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": ""},
    ]
    assert server.chat(messages=messages).status_code == 200
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(server.engine.submitted[-1].prompt_token_ids) == ids(expected)


def test_mid_stream_failure_is_told_in_the_stream(serve: Serve) -> None:
    server = serve(lambda _r, _i: [ids("a"), ids("bc"), RuntimeError("the step broke")])
    *chunks, last = server.events()
    assert texts_of(chunks) == {0: "abc"}
    assert last["error"] == {
        "message": "the step broke",
        "type": "server_error",
        "param": None,
        "code": "step_failed",
    }
    stream = server.openai.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(3)] == ["", "a", "bc"]
    with pytest.raises(openai.APIError, match="the step broke"):
        next(stream)


def test_failed_step_is_a_500_when_not_streaming(serve: Serve) -> None:
    server = serve(lambda _r, _i: [ids("a"), RuntimeError("the step broke")])
    with pytest.raises(openai.InternalServerError, match="the step broke"):
        server.openai.chat.completions.create(model=MODEL, messages=MESSAGES)


def test_failure_of_one_choice_ends_the_request_and_frees_the_others(serve: Serve) -> None:
    def script(request: Request, index: int) -> Any:
        return [ids("a"), RuntimeError("broken")] if index else endless(request, index)

    engine = FakeEngine(script, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    assert server.chat(n=2).status_code == 500
    wait_until(lambda: engine.stats.running == 0)
    assert "error" in server.events(n=2)[-1]
    wait_until(lambda: engine.stats.running == 0)


async def die(engine: FakeEngine) -> None:
    engine.die()


def test_dead_engine_fails_its_streams_and_its_health(serve: Serve) -> None:
    engine = FakeEngine(endless, step_s=0.005, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    stream = server.openai.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    next(iter(stream))
    server.in_loop(die(engine))
    with pytest.raises(openai.APIError, match="died"):
        list(stream)
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/ready").status_code == 503
    assert server.chat().status_code == 503


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_slot_within_two_steps(serve: Serve, stream: bool) -> None:
    engine = FakeEngine(endless, step_s=0.05, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    with httpx.Client(base_url=server.url) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, n=2)):
                wait_until(lambda: engine.stats.running == 2)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=chat_body(n=2), timeout=0.3)
    before = engine.stats.num_steps
    wait_until(lambda: engine.stats.running == 0)
    assert engine.stats.num_steps - before <= 2
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_total


def test_disconnect_while_waiting_leaves_the_queue(serve: Serve) -> None:
    engine = FakeEngine(endless, step_s=0.01, max_num_seqs=1, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)):
        wait_until(lambda: engine.stats.running == 1)
        url = server.url + "/v1/chat/completions"
        with httpx.stream("POST", url, json=chat_body(stream=True)):
            assert engine.stats.waiting == 1
        wait_until(lambda: engine.stats.waiting == 0)
        assert engine.stats.running == 1


def test_stream_cut_off_by_shutdown_is_told_so(serve: Serve) -> None:
    engine = FakeEngine(endless, step_s=0.01, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    stream = server.openai.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    next(iter(stream))
    server.in_loop(engine.stop())
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    response = server.chat()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "shutting_down"
    assert response.headers["retry-after"] == "1"


def test_queue_full_is_503_with_retry_after_streamed_or_not(serve: Serve) -> None:
    engine = FakeEngine(endless, step_s=0.01, max_num_seqs=1, max_waiting=1, vocab_size=TEXT.vocab_size)
    server = serve(engine)
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, n=2)):
        wait_until(lambda: engine.stats.running == 1)
        for stream in (True, False):
            response = server.chat(stream=stream)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
