"""POST /v1/completions through a real server and the official client."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest

from engine.fake import FakeEngine, FakeStep
from engine.text import TokenText
from engine.types import Request, TokenLogprobs
from tests.server.conftest import EOS, EOS_ID, MODEL, TEXT, RunningServer, Serve, ids, says, steps, wait_until


def complete(server: RunningServer, prompt: Any = "hi", **body: Any) -> Any:
    response = server.http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, **body})
    return response.json() if response.status_code == 200 else response


def events(server: RunningServer, prompt: Any = "hi", **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, once its end is checked."""
    with server.http.stream(
        "POST", "/v1/completions", json={"model": MODEL, "prompt": prompt, "stream": True, **body}
    ) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    *chunks, done = [line.removeprefix("data: ") for line in lines]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


def repeats(request: Request, index: int) -> list[Any]:
    """A script that says which prompt and which choice it answers."""
    prompt = TEXT.decode(request.prompt_token_ids, skip_special_tokens=False)
    return [*steps(f"{prompt}-{index}."), [EOS_ID]]


def test_whole_answer_has_openais_shape(hello: RunningServer) -> None:
    body = complete(hello)
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "text": "Hello, world!",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 14,
            "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert hello.engine.submitted[-1].sampling.max_tokens == 16  # OpenAI's default
    assert hello.engine.submitted[-1].prompt_token_ids == tuple(ids("hi"))


def test_official_client(hello: RunningServer) -> None:
    whole = hello.openai.completions.create(model=MODEL, prompt="hi", logprobs=1)
    assert whole.choices[0].text == "Hello, world!"
    streamed = list(
        hello.openai.completions.create(
            model=MODEL, prompt="hi", logprobs=1, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.text for chunk in streamed for c in chunk.choices) == "Hello, world!"
    assert streamed[-1].usage == whole.usage
    logprobs = [c.logprobs for chunk in streamed for c in chunk.choices if c.logprobs]
    assert [token for one in logprobs for token in one.tokens or ()] == [*"Hello, world!", EOS]
    assert [at for one in logprobs for at in one.text_offset or ()] == list(range(14))


@pytest.mark.parametrize("prompt", ["hi", ids("hi"), ["hi"], [ids("hi")]])
def test_the_four_forms_of_a_prompt(serve: Serve, prompt: Any) -> None:
    server = serve(repeats)
    assert complete(server, prompt)["choices"][0]["text"] == "hi-0."


@pytest.mark.parametrize("prompt", [["a", "bc", "d"], [ids("a"), ids("bc"), ids("d")]])
def test_a_batch_answers_every_prompt_n_times(serve: Serve, prompt: Any) -> None:
    server = serve(repeats)
    expected = [f"{text}-{index}." for text in ("a", "bc", "d") for index in range(2)]
    body = complete(server, prompt, n=2)
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate(expected))
    chunks = events(server, prompt, n=2, stream_options={"include_usage": True})
    assert [text_of(chunks, index) for index in range(6)] == expected
    assert chunks[-1]["usage"] == body["usage"]
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == sum(len(text) + 1 for text in expected)
    stops = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"] == "stop"]
    assert sorted(stops) == list(range(6))


def test_a_batch_is_one_line_in_the_log(serve: Serve, log_lines: Any) -> None:
    server = serve(repeats)
    complete(server, ["a", "bc"], n=2)
    (line,) = [line for line in log_lines() if line.get("path") == "/v1/completions"]
    assert (line["prompts"], line["prompt_tokens"], line["completion_tokens"]) == (2, 3, 22)
    assert line["finish_reasons"] == ["stop"] * 4


def test_nothing_of_a_batch_runs_if_one_prompt_is_refused(hello: RunningServer) -> None:
    before = len(hello.engine.submitted)
    response = complete(hello, ["fine", ""])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert response.json()["error"]["message"].startswith("prompt[1]: ")
    response = complete(hello, [ids("x"), [TEXT.vocab_size]])
    assert response.json()["error"]["message"].startswith("prompt[1]: ")
    assert complete(hello, ["x"] * 200, n=2).json()["error"]["param"] == "prompt"
    assert len(hello.engine.submitted) == before


def test_a_full_queue_takes_none_of_a_batch(serve: Serve) -> None:
    engine = FakeEngine(says("x"), vocab_size=TEXT.vocab_size, max_num_seqs=1, max_waiting=2)
    server = serve(engine)
    assert complete(server, ["a", "b", "c", "d"]).status_code == 503
    wait_until(lambda: engine.stats.running == engine.stats.waiting == 0)
    assert len(complete(server, ["a", "b", "c"])["choices"]) == 3


def test_a_failed_step_of_one_prompt_ends_the_answer(serve: Serve) -> None:
    def reply(request: Request, index: int) -> list[Any]:
        bad = request.prompt_token_ids == tuple(ids("bad"))
        return [ids("x"), ValueError("broken")] if bad else [ids("x")] * 1000

    server = serve(FakeEngine(reply, vocab_size=TEXT.vocab_size, step_s=0.002))
    assert complete(server, ["good", "bad"], max_tokens=None).status_code == 500
    with server.http.stream(
        "POST", "/v1/completions", json={"model": MODEL, "prompt": ["good", "bad"], "stream": True}
    ) as response:
        assert '"broken"' in [line for line in response.iter_lines() if line][-1]
    wait_until(lambda: server.engine.stats.running == 0)


def test_a_client_that_leaves_frees_every_prompt(serve: Serve) -> None:
    engine = FakeEngine(lambda _r, _i: [ids("x")] * 100_000, vocab_size=TEXT.vocab_size, step_s=0.002)
    server = serve(engine)
    body = {"model": MODEL, "prompt": ["a", "b"], "stream": True, "max_tokens": 4000}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: its end would close the response
        next(lines)
        assert engine.stats.running == 2
    wait_until(lambda: engine.stats.running == 0)
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_total


def test_echo(hello: RunningServer) -> None:
    assert complete(hello, "héy ", echo=True)["choices"][0]["text"] == "héy Hello, world!"
    assert complete(hello, ids("a<|im_end|>"), echo=True)["choices"][0]["text"] == "a<|im_end|>Hello, world!"
    assert [c["text"] for c in complete(hello, ["a", "b"], echo=True)["choices"]] == [
        "aHello, world!",
        "bHello, world!",
    ]
    assert text_of(events(hello, "hey ", echo=True, n=2), 1) == "hey Hello, world!"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(hello: RunningServer, stream: bool) -> None:
    """The first token has none; offsets are those of the characters in the whole text."""
    if stream:
        parts = [c["logprobs"] for chunk in events(hello, "a é", echo=True, logprobs=1)
                 for c in chunk["choices"] if c["logprobs"]]  # fmt: skip
        found = {key: [item for part in parts for item in part[key]] for key in parts[0]}
    else:
        (choice,) = complete(hello, "a é", echo=True, logprobs=1)["choices"]
        assert choice["text"] == "a éHello, world!"
        found = choice["logprobs"]
    assert found["tokens"] == ["a", " ", "bytes:\\xc3", "bytes:\\xa9", *"Hello, world!", EOS]
    assert found["text_offset"] == [0, 1, 2, 2, *range(3, 17)]
    assert found["token_logprobs"] == [None, *[-0.5] * 17]
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][1] == {" ": -0.5}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "a prompt", "echo": True, "logprobs": 1, "stream": True}),
        ("completions", {"prompt": "a prompt", "echo": True, "logprobs": 1}),
        ("completions", {"prompt": "a prompt", "prompt_logprobs": 1}),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 1}),
    ],
    ids=str,
)
def test_logprobs_of_a_prompt_are_written_beside_the_event_loop(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """Of a long prompt that takes seconds, in which no other stream would get anything."""
    threads: list[str] = []
    read = TEXT.token_text

    def spy(token: int, **options: Any) -> TokenText:
        threads.append(threading.current_thread().name)
        return read(token, **options)

    monkeypatch.setattr(TEXT, "token_text", spy)
    response = hello.http.post(f"/v1/{path}", json={"model": MODEL, **body})
    assert response.status_code == 200
    # A stream's own tokens, few at a time, are written where they are sent.
    prompts = threads[: len("a prompt") - 1]  # nothing is known of the first token
    assert len(prompts) == 7
    assert all(name.startswith("text") for name in prompts)


def test_echo_alone_scores_a_prompt(hello: RunningServer) -> None:
    body = complete(hello, ["ab", "c"], echo=True, max_tokens=0, logprobs=0)
    assert [c["text"] for c in body["choices"]] == ["ab", "c"]
    assert [c["logprobs"]["tokens"] for c in body["choices"]] == [["a", "b"], ["c"]]
    assert [c["finish_reason"] for c in body["choices"]] == ["length", "length"]
    assert body["usage"]["completion_tokens"] == 0
    assert text_of(events(hello, "ab", echo=True, max_tokens=0)) == "ab"
    assert complete(hello, "ab", max_tokens=0).json()["error"]["param"] == "max_tokens"


def test_what_the_engine_drew_behind_an_echo_alone_stopped_nothing(hello: RunningServer) -> None:
    """It draws one token all the same, which may be a stop token."""
    body = {"echo": True, "max_tokens": 0, "stop_token_ids": ids("H")}
    whole, streamed = complete(hello, "ab", **body), events(hello, "ab", **body)[-1]
    for choice in (*whole["choices"], *streamed["choices"]):
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


def test_prompt_logprobs_and_logprobs_ask_for_their_own_number(hello: RunningServer) -> None:
    (choice,) = complete(hello, "ab", echo=True, logprobs=0, prompt_logprobs=2)["choices"]
    assert hello.engine.submitted[-1].sampling.prompt_logprobs == 2
    assert choice["logprobs"]["top_logprobs"][1] == {"b": -0.5}
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert len(second) == 2  # the token itself is the best one
    assert "prompt_logprobs" not in complete(hello, "ab", echo=True, logprobs=0)["choices"][0]


def test_logprobs_of_tokens_held_for_a_character_or_a_stop_string(serve: Serve) -> None:
    first, second = ids("é")
    top = ((first, -0.1), (second, -2.0))

    def reply(_request: Request, _index: int) -> list[Any]:
        one = FakeStep([*ids("a"), first], [TokenLogprobs(t, -0.1, 1, top) for t in (*ids("a"), first)])
        return [one, [second, *ids("b.")], ids("cd"), [EOS_ID]]

    server = serve(reply)
    chunks = [c for chunk in events(server, logprobs=2, stop=".c") for c in chunk["choices"]]
    assert "".join(c["text"] for c in chunks) == "aéb"
    found = [c["logprobs"] for c in chunks]
    tokens = [at for one in found for at in zip(one["tokens"], one["text_offset"], strict=True)]
    assert tokens == [("a", 0), ("bytes:\\xc3", 1), ("bytes:\\xa9", 1), ("b", 2)]
    body = complete(server, logprobs=2, stop=".c")["choices"][0]
    assert body["logprobs"]["text_offset"] == [0, 1, 1, 2]
    included = complete(server, logprobs=2, stop=".c", include_stop_str_in_output=True)["choices"][0]
    assert included["text"] == "aéb.c"
    assert included["logprobs"]["tokens"][-2:] == [".", "c"]


def test_continuous_usage(hello: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(hello, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 14)
    response = complete(hello, stream=True, stream_options={"continuous_usage_stats": True})
    assert response.json()["error"]["param"] == "stream_options.continuous_usage_stats"


def test_special_tokens_in_the_text(serve: Serve) -> None:
    server = serve(lambda _r, _i: [ids("a"), ids("<|im_start|>"), ids("b"), [EOS_ID]])
    assert complete(server)["choices"][0]["text"] == "ab"
    assert complete(server, skip_special_tokens=False)["choices"][0]["text"] == "a<|im_start|>b"
    ended = complete(server, skip_special_tokens=False, include_stop_str_in_output=True, logprobs=0)
    assert ended["choices"][0]["text"] == "a<|im_start|>b<|im_end|>"
    assert ended["choices"][0]["logprobs"]["text_offset"] == [0, 1, 13, 14]
    assert ended["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("keep", "kept"), [(3, "fgh"), (100, "abcdefgh"), (-1, "efgh"), (8, "abcdefgh"), (1, "h")]
)
def test_truncate_prompt_tokens_keeps_the_last(serve: Serve, keep: int, kept: str) -> None:
    engine = FakeEngine(says("x"), vocab_size=TEXT.vocab_size, max_model_len=20)
    server = serve(engine)
    tokens = 16 if keep == -1 else 4
    body = complete(server, "abcdefgh", truncate_prompt_tokens=keep, max_tokens=tokens, echo=True)
    assert body["choices"][0]["text"] == kept + "x"
    assert engine.submitted[-1].prompt_token_ids == tuple(ids(kept))
    assert (
        complete(server, "a", truncate_prompt_tokens=0).json()["error"]["param"] == "truncate_prompt_tokens"
    )


def test_refusals(hello: RunningServer) -> None:
    for fields, param in [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"priority": 2**63}, "priority"),
    ]:
        response = hello.http.post(
            "/v1/completions",
            content=json.dumps({"model": MODEL, "prompt": "x", **fields}),
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 400, fields
        assert response.json()["error"]["param"] == param, response.text
    with pytest.raises(openai.NotFoundError):
        hello.openai.completions.create(model="other", prompt="x")
    assert complete(hello, suffix="", best_of=1)["choices"]


def test_priority_is_admitted_first(serve: Serve) -> None:
    """With one slot, taken: of those that wait, the lowest number goes first, equals by arrival."""
    engine = FakeEngine(
        lambda _r, _i: [ids("x")] * 20, vocab_size=TEXT.vocab_size, max_num_seqs=1, step_s=0.005
    )
    server = serve(engine)
    order: list[str] = []

    def ask(name: str, priority: int | None) -> None:
        complete(server, name, priority=priority)
        order.append(name)

    asked = [("first", None), ("late", 5), ("none", None), ("zero", 0), ("early", -3)]
    threads = [threading.Thread(target=ask, args=one) for one in asked]
    for number, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda number=number: len(engine.submitted) == number)
    for thread in threads:
        thread.join(10)
    assert order == ["first", "early", "none", "zero", "late"]
