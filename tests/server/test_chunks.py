"""Chunks written by hand are what the models would write, byte for byte."""

from __future__ import annotations

import json
import math

from hypothesis import given, strategies as st

from engine.types import TokenLogprobs
from server.chunks import (
    DONE,
    ChatWriter,
    CompletionWriter,
    Heading,
    chat_logprobs,
    completion_logprobs,
    event,
    prompt_logprobs,
    to_json,
)
from server.responses import (
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChunkChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    FinishReasonName,
    PromptTokensDetails,
    StopReason,
    Usage,
)
from tests.server.conftest import EOS_ID, TEXT, ids

MODEL = 'a "model" with [] in its näme'
HEADING = Heading("chatcmpl-1", 17, MODEL, "fp_0")
READ = TEXT.token_text
USAGE = Usage(
    prompt_tokens=2,
    completion_tokens=3,
    total_tokens=5,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=1),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
STOP_REASONS = st.none() | TEXTS | st.integers(0, 2**31)
LOGPROBS = st.builds(
    TokenLogprobs,
    st.integers(0, TEXT.vocab_size - 1),
    st.floats(max_value=0.0, allow_nan=False),
    st.integers(1, 9),
    st.lists(
        st.tuples(st.integers(0, TEXT.vocab_size - 1), st.floats(max_value=0.0, allow_nan=False)), max_size=3
    ).map(tuple),
)


def model_event(
    usage: bool,
    index: int,
    delta: ChatDelta,
    logprobs: ChatLogprobs | None,
    reason: FinishReasonName | None,
    stop: StopReason = None,
) -> bytes:
    """What the models make of a chunk."""
    choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
    if reason is not None:
        choice.stop_reason = stop
    chunk = ChatChunk(**HEADING.fields("chat.completion.chunk"), choices=[choice])
    if usage:
        chunk.usage = None
    return event(to_json(chunk))


@given(
    st.booleans(),
    st.integers(0, 127),
    TEXTS.filter(bool),
    st.none() | st.lists(LOGPROBS, max_size=3),
    st.sampled_from([None, "stop", "length"]),
    STOP_REASONS,
    TEXTS,
)
def test_chunks_are_what_the_models_would_write(
    usage: bool,
    index: int,
    text: str,
    logprobs: list[TokenLogprobs] | None,
    reason: FinishReasonName | None,
    stop: StopReason,
    thought: str,
) -> None:
    writer = ChatWriter(HEADING, READ, (lambda: USAGE) if usage else None)
    whole = None if logprobs is None else chat_logprobs(logprobs, READ)
    first = model_event(usage, index, ChatDelta(role="assistant", content=""), None, None)
    middle = model_event(usage, index, ChatDelta(content=text), whole, None)
    last = model_event(usage, index, ChatDelta(), None, reason, stop) if reason else b""
    assert writer.step(index, text, logprobs, reason, stop) == first + middle + last
    assert writer.step(index, text, logprobs, reason, stop) == middle + last  # the role is told once
    if logprobs:  # of what is no text, or is left out of it
        told = model_event(usage, index, ChatDelta(content=""), whole, None)
        assert writer.step(index, "", logprobs, None) == told
    if thought:
        only = ChatDelta(reasoning_content=thought, reasoning=thought)
        alone = model_event(usage, index, only, whole, None)
        assert writer.step(index, "", logprobs, None, thought=thought) == alone
        both = model_event(usage, index, only.model_copy(update={"content": text}), whole, None)
        assert writer.step(index, text, logprobs, reason, stop, thought=thought) == both + last
    for data in (first + middle + last).decode().splitlines():
        if data:
            ChatChunk.model_validate_json(data.removeprefix("data: "))


def test_a_step_without_text_is_no_event() -> None:
    writer = ChatWriter(HEADING, READ)
    assert writer.step(0, "", None, None).count(b"data: ") == 1  # the role
    assert writer.step(0, "", None, None) == writer.step(0, "", [], None) == b""
    assert writer.step(0, "", None, "stop").count(b"data: ") == 1


def test_usage_chunk_has_no_choices() -> None:
    writer = ChatWriter(HEADING, READ, lambda: USAGE)
    last = writer.end()
    assert last.endswith(DONE)
    chunk = json.loads(last.removesuffix(DONE).removeprefix(b"data: "))
    assert chunk["choices"] == []
    assert chunk["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert b'"usage":null' in writer.step(0, "x", None, None)  # the template is as it was
    assert ChatWriter(HEADING, READ).end() == DONE


def test_continuous_usage_is_in_every_chunk() -> None:
    writer = ChatWriter(HEADING, READ, lambda: USAGE, continuous=True)
    for data in (writer.step(0, "x", None, "stop") + writer.end().removesuffix(DONE)).decode().splitlines():
        if data:
            assert ChatChunk.model_validate_json(data.removeprefix("data: ")).usage == USAGE


@given(
    TEXTS,
    st.none() | st.lists(st.tuples(st.integers(0, 99), LOGPROBS), min_size=1, max_size=3),
    st.sampled_from([None, "stop", "length"]),
    STOP_REASONS,
    st.booleans(),
)
def test_completion_chunks_are_what_the_models_would_write(
    text: str,
    known: list[tuple[int, TokenLogprobs]] | None,
    reason: FinishReasonName | None,
    stop: StopReason,
    usage: bool,
) -> None:
    logprobs = None
    if known is not None:
        logprobs = completion_logprobs([(one.token_id, start, one) for start, one in known], 2, READ)
    choice = CompletionChunkChoice(index=3, text=text, logprobs=logprobs, finish_reason=reason)
    if reason is not None:
        choice.stop_reason = stop
    chunk = CompletionChunk(**HEADING.fields("text_completion"), choices=[choice])
    if usage:
        chunk.usage = None
    writer = CompletionWriter(HEADING, (lambda: USAGE) if usage else None)
    written = writer.step(3, text, logprobs, reason, stop)
    assert written == (event(to_json(chunk)) if text or logprobs or reason else b"")


def test_completion_logprobs_name_tokens_that_are_no_text_by_their_bytes() -> None:
    first, second = ids("é")
    top = ((first, -0.25), (second, -1.0), (EOS_ID, -math.inf))
    found = completion_logprobs(
        [
            (EOS_ID, 0, None),
            (first, 0, TokenLogprobs(first, -0.25, 1, top)),
            (second, 0, TokenLogprobs(second, -1.0, 2, top)),
        ],
        2,
        READ,
    )
    assert found == CompletionLogprobs(
        text_offset=[0, 0, 0],
        token_logprobs=[None, -0.25, -1.0],
        tokens=["<|im_end|>", "bytes:\\xc3", "bytes:\\xa9"],
        top_logprobs=[None, *[{"bytes:\\xc3": -0.25, "bytes:\\xa9": -1.0}] * 2],
    )
    assert completion_logprobs([(first, 0, TokenLogprobs(first, -0.25, 1, top))], 0, READ).top_logprobs == [
        {"bytes:\\xc3": -0.25}
    ]


@given(TEXTS)
def test_an_event_is_one_line_to_any_client(text: str) -> None:
    writer = ChatWriter(HEADING, READ)
    _, middle, rest = (writer.step(0, text + ".", None, None)).split(b"\n\n")
    assert rest == b""
    (line,) = middle.decode().splitlines()
    assert json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"] == text + "."


def test_entries_have_text_bytes_and_a_bounded_logprob() -> None:
    first, second = ids("é")
    found = chat_logprobs(
        [
            TokenLogprobs(first, -0.25, 1, ((first, -0.25), (EOS_ID, -math.inf))),
            TokenLogprobs(second, -math.inf, 5, ()),
        ],
        READ,
    ).model_dump()["content"]
    assert found[0]["token"] == "\ufffd"
    assert bytes(found[0]["bytes"] + found[1]["bytes"]).decode() == "é"
    assert found[0]["top_logprobs"] == [
        {"token": "\ufffd", "logprob": -0.25, "bytes": found[0]["bytes"]},
        {"token": "<|im_end|>", "logprob": -9999.0, "bytes": None},
    ]
    assert (found[1]["logprob"], found[1]["top_logprobs"]) == (-9999.0, [])


def test_prompt_logprobs_have_the_prompts_own_token_first_and_once() -> None:
    a, b, c = ids("abc")
    in_top = TokenLogprobs(b, -1.0, 2, ((a, -0.5), (b, -1.0)))
    beyond = TokenLogprobs(c, -math.inf, 40, ((a, -0.5),))
    found = [one and {key: value.model_dump() for key, value in one.items()} for one in
             prompt_logprobs([None, in_top, beyond], 2, READ)]  # fmt: skip
    assert found == [
        None,
        {
            b: {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
            a: {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        },
        {
            c: {"logprob": -9999.0, "rank": 40, "decoded_token": "c"},
            a: {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        },
    ]
    assert [list(one) for one in found if one] == [[b, a], [c, a]]
