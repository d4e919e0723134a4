"""Logprobs, prediction, penalties and the rest of the fields that change how tokens are drawn or reported."""

from __future__ import annotations

from typing import Any

import pytest

from engine.fake import FakeEngine, FakeStep, Step
from engine.types import Acceptance, MedusaParams, Request
from tests.server.conftest import EOS_ID, MODEL, TEXT, RunningServer, Serve, endless, ids, says, steps

MESSAGES: Any = [{"role": "user", "content": "hi"}]


def streamed_logprobs(events: list[Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Of choice 0: each chunk's text and its entries, where it has either."""
    choices = [event["choices"][0] for event in events if event != "[DONE]" and event["choices"]]
    found = [
        (c["delta"].get("content") or "", (c["logprobs"] or {"content": []})["content"]) for c in choices
    ]
    return [(text, entries) for text, entries in found if text or entries]


def bytes_of(entries: list[dict[str, Any]]) -> bytes:
    return bytes(byte for entry in entries for byte in entry["bytes"] or ())


def test_fields_reach_the_engine(serve: Serve) -> None:
    server = serve(says("ok"))
    response = server.chat(
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"7": -100, "9": 1},
        min_tokens=2,
        max_tokens=9,
        bad_words=["a", "bc"],
        logprobs=True,
        top_logprobs=3,
        prompt_logprobs=1,
        cache_salt="tenant",
        prediction={"type": "content", "content": "maybe <|im_end|>"},
        medusa={"acceptance": "typical", "epsilon": 0.2, "delta": 0.4, "max_tree_size": 5},
    )
    assert response.status_code == 200, response.text
    request = server.engine.submitted[-1]
    sampling = request.sampling
    penalties = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty)
    assert penalties == (0.5, -0.5, 1.5)
    assert (sampling.logit_bias, sampling.min_tokens) == (((7, -100.0), (9, 1.0)), 2)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, 1)
    # One token per byte: a space before a word makes it longer, so that form is not another single start.
    assert sampling.bad_words == (tuple(ids("a")), tuple(ids("bc")))
    assert request.prediction_token_ids == tuple(ids("maybe <|im_end|>"))
    assert request.cache_salt == "tenant"
    assert request.medusa == MedusaParams(Acceptance.TYPICAL, 0.2, 0.4, 5)


def test_absent_and_default_fields_ask_for_nothing(serve: Serve) -> None:
    server = serve(says("ok"))
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "repetition_penalty": 1,
        "logit_bias": {},
        "min_tokens": 0,
        "bad_words": [],
        "logprobs": False,
        "top_logprobs": 0,
        "prediction": {"type": "content", "content": ""},
        "medusa": {},
    }
    for fields in ({}, dict.fromkeys(neutral), neutral):
        assert server.chat(**fields).status_code == 200
    first, *others = [
        (r.sampling, r.medusa, r.prediction_token_ids, r.cache_salt) for r in server.engine.submitted
    ]
    assert others == [first, first]
    assert not server.engine.submitted[0].sampling.adjusts


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"logit_bias": {str(TEXT.vocab_size): 1}}, "logit_bias", "not a token of this model"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"bad_words": ["x" * 17]}, "bad_words", "17 tokens"),
        ({"bad_words": ["   "]}, "bad_words", "0 tokens"),
        ({"bad_words": ["\ud83d"]}, "bad_words[0]", "unicode"),
        ({"prediction": {"type": "content", "content": "\ud83d"}}, "prediction", "surrogate"),
        ({"medusa": {"epsilon": 2, "acceptance": "typical"}}, "medusa.epsilon", "in [0, 1]"),
        ({"medusa": {"size": 2}}, "medusa.size", "Unrecognized"),
        ({"medusa": {"max_tree_size": "2"}}, "medusa.max_tree_size", "integer"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "at most max_tokens"),
        ({"min_tokens": 10**30}, "min_tokens", "the context holds"),
        ({"repetition_penalty": 1e39}, "repetition_penalty", "3e+38"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty", "1e-44"),
        ({"medusa": {"acceptance": "typical", "delta": 1e39}}, "medusa.delta", "3e+38"),
    ],
)
def test_refusals_name_the_field(
    hello: RunningServer, fields: dict[str, Any], param: str, reason: str
) -> None:
    response = hello.chat(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert reason in error["message"]


def test_logprobs_of_a_whole_answer(hello: RunningServer) -> None:
    (choice,) = hello.chat(logprobs=True, top_logprobs=2).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    assert "".join(entry["token"] for entry in entries) == "Hello, world!"  # and none for the EOS token
    assert bytes_of(entries).decode() == "Hello, world!"
    assert all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in entries)
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)
    assert entries[0]["logprob"] == entries[0]["top_logprobs"][0]["logprob"] == -0.5
    (choice,) = hello.chat(logprobs=True).json()["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[]] * len(entries)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_each_chunk_has_the_logprobs_of_its_own_text(serve: Serve, size: int) -> None:
    text = "naïve 日本 👩‍👩‍👧 done"
    chunks = streamed_logprobs(serve(says(text, size)).events(logprobs=True))
    assert "".join(chunk for chunk, _ in chunks) == text
    for chunk, entries in chunks:
        assert bytes_of(entries).decode() == chunk  # also where a character's bytes came in several steps


def test_streamed_and_whole_logprobs_agree_with_a_stop_string(serve: Serve) -> None:
    script: list[Step] = [*steps("abSTx STOPdef"), *endless(None, 0)]  # type: ignore[arg-type]
    server = serve(FakeEngine(lambda _r, _i: script, vocab_size=TEXT.vocab_size))
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "stop": "STOP"}
    whole = server.chat(**fields).json()["choices"][0]
    assert whole["message"]["content"] == "abSTx "
    assert bytes_of(whole["logprobs"]["content"]).decode() == "abSTx "
    chunks = streamed_logprobs(server.events(**fields))
    assert [entry for _, entries in chunks for entry in entries] == whole["logprobs"]["content"]
    assert all(bytes_of(entries).decode() == text for text, entries in chunks)


def test_a_possible_stop_string_is_held_with_its_logprobs_and_let_go_with_them(serve: Serve) -> None:
    chunks = streamed_logprobs(serve(says("abcST", 1)).events(stop="STOP", logprobs=True))
    assert [text for text, _ in chunks] == ["a", "b", "c", "ST"]
    assert [len(entries) for _, entries in chunks] == [1, 1, 1, 2]


def test_a_special_token_in_the_text_has_an_entry_without_bytes(serve: Serve) -> None:
    server = serve(lambda _r, _i: [ids("a"), [EOS_ID], ids("b")])
    (choice,) = server.chat(ignore_eos=True, logprobs=True).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in entries] == [
        ("a", [97]),
        ("<|im_end|>", None),
        ("b", [98]),
    ]
    chunks = streamed_logprobs(server.events(ignore_eos=True, logprobs=True))
    assert [entry for _, found in chunks for entry in found] == entries


def test_logprobs_of_each_choice_are_its_own(serve: Serve) -> None:
    words = ["zero", "one", "two"]
    server = serve(lambda _r, index: [*steps(words[index]), [EOS_ID]])
    for choice in server.chat(n=3, logprobs=True).json()["choices"]:
        assert bytes_of(choice["logprobs"]["content"]).decode() == words[choice["index"]]


def test_official_client_reads_logprobs(hello: RunningServer) -> None:
    whole = hello.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1
    )
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == list("Hello, world!")
    stream = hello.openai.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1, stream=True
    )
    streamed = [
        entry
        for chunk in stream
        if (found := chunk.choices[0].logprobs) is not None
        for entry in found.content or ()
    ]
    assert streamed == logprobs.content


def test_prompt_logprobs(hello: RunningServer) -> None:
    body = hello.chat(prompt_logprobs=2, n=2).json()
    prompt = TEXT.encode_chat(MESSAGES)
    first, *rest = body["prompt_logprobs"]
    assert first is None
    assert len(rest) == len(prompt) - 1
    for token, entry in zip(prompt[1:], rest, strict=True):
        assert next(iter(entry)) == str(token)
        assert entry[str(token)] == {
            "logprob": -0.5,
            "rank": 1,
            "decoded_token": TEXT.decode([token], skip_special_tokens=False),
        }
    assert "prompt_logprobs" not in hello.chat().json()
    assert hello.chat().json()["choices"][0]["logprobs"] is None


def test_min_tokens_lets_an_early_stop_string_pass(serve: Serve) -> None:
    server = serve(says("a.b.c"))
    body = server.chat(stop=".", min_tokens=2).json()
    assert body["choices"][0]["message"]["content"] == "a.b"
    assert body["usage"]["completion_tokens"] == len("a.b.")


def predicted(_request: Request, index: int) -> list[Step]:
    return [
        FakeStep(ids("a"), cached_tokens=0 if index else 16),
        FakeStep(ids("bcd"), accepted_prediction_tokens=2),
        FakeStep(ids("e.fg"), accepted_prediction_tokens=3),
        *[ids("x")] * 500,
    ]


def test_usage_tells_what_was_reused_and_what_of_the_prediction_came_true(serve: Serve) -> None:
    server = serve(predicted)
    prediction = {"type": "content", "content": "0123456789"}
    # The last step is cut after two of its tokens, so no more than those can have been accepted.
    usage = server.chat(prediction=prediction, stop=".").json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": 4,
        "rejected_prediction_tokens": 6,
        "reasoning_tokens": 0,
        "audio_tokens": 0,
    }
    *_, last, _ = server.events(prediction=prediction, stop=".", stream_options={"include_usage": True})
    assert last["usage"] == usage
    both = server.chat(prediction={"type": "content", "content": "0123"}, stop=".", n=2).json()["usage"]
    details = both["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (8, 0)
    assert both["prompt_tokens_details"] == {"cached_tokens": 16}
    for nothing in (None, {"type": "content", "content": ""}):
        assert "completion_tokens_details" not in server.chat(prediction=nothing, stop=".").json()["usage"]
