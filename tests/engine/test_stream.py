"""A stream of deltas with a reader that is slower than the engine."""

from __future__ import annotations

import asyncio
import gc

import pytest

from engine.stream import DeltaStream
from engine.types import FinishReason, Request, SamplingParams, StepTrace, TokenDelta, TokenLogprobs

TRACE = StepTrace((1,), (-1,), (), (0,), 2, 1, 0.1)


def make(n: int = 1) -> tuple[DeltaStream, list[str]]:
    aborted: list[str] = []
    return DeltaStream(Request("r", (1,), SamplingParams(n=n)), aborted.append), aborted


def delta(*tokens: int, index: int = 0, steps: int = 1, reason: FinishReason | None = None) -> TokenDelta:
    return TokenDelta("r", index, list(tokens), reason, num_steps=steps, accepted_prediction_tokens=1)


def read(stream: DeltaStream, count: int | None = None) -> list[TokenDelta]:
    async def main() -> list[TokenDelta]:
        found: list[TokenDelta] = []
        async for one in stream:
            found.append(one)
            if len(found) == count:
                break
        return found

    return asyncio.run(asyncio.wait_for(main(), 5))


def test_steps_that_nobody_took_become_one() -> None:
    stream, _ = make()
    stream.put(delta(1, steps=0))
    for token in range(2, 1000):
        stream.put(delta(token))
    last = delta(1000, 1001, reason=FinishReason.STOP)
    last.stop_token_id = 1001
    stream.put(last)
    prefill, rest = read(stream)
    assert (prefill.token_ids, prefill.num_steps) == ([1], 0)  # apart: it is no decode step
    assert rest.token_ids == list(range(2, 1002))
    assert (rest.num_steps, rest.finish_reason, rest.stop_token_id) == (999, FinishReason.STOP, 1001)
    assert rest.accepted_prediction_tokens == 999
    assert stream.merged_steps == 998


def test_a_reader_in_time_gets_every_step() -> None:
    stream, _ = make()
    for token in (1, 2, 3):
        stream.put(delta(token, reason=FinishReason.LENGTH if token == 3 else None))
        [got] = read(stream, 1)
        assert got.token_ids == [token]
    assert stream.merged_steps == 0
    assert read(stream) == []


def test_a_listener_is_told_once_for_what_waits() -> None:
    stream, _ = make(n=2)
    told: list[int] = []
    stream.listen(lambda: told.append(1))
    puts = [stream.put(delta(token, index=token % 2)) for token in range(6)]
    assert puts == [True] + [False] * 5
    stream.tell()
    assert told == [1]
    taken = []
    while (one := stream.take()) is not None:
        taken.append(one.token_ids)
    assert taken == [[0, 2, 4], [1, 3, 5]]
    assert stream.put(delta(6))


def test_a_reader_that_fails_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    stream, _ = make()
    stream.listen(lambda: [][0])
    stream.put(delta(1))
    stream.tell()
    assert "the reader of request r failed" in caplog.text


def test_choices_are_kept_apart_and_what_waits_is_bounded() -> None:
    stream, _ = make(n=3)
    gc.collect()
    for step in range(500):
        for index in range(3):
            stream.put(delta(step, index=index))
    assert len(stream._waiting) == 3
    for index in range(3):
        stream.put(delta(index=index, reason=FinishReason.LENGTH))
    got = read(stream)
    assert [one.index for one in got] == [0, 1, 2]
    assert all(one.token_ids == list(range(500)) for one in got)


def test_logprobs_and_traces_survive() -> None:
    stream, _ = make()
    for token in (5, 6):
        one = delta(token)
        one.logprobs = [TokenLogprobs(token, -1.0, 1, ())]
        stream.put(one)
    traced = delta(7, reason=FinishReason.LENGTH)
    traced.trace = TRACE
    stream.put(traced)
    both, last = read(stream)
    assert [entry.token_id for entry in both.logprobs or ()] == both.token_ids == [5, 6]
    assert (last.trace, last.token_ids) == (TRACE, [7])


def test_a_failure_is_not_hidden_in_the_text_before_it() -> None:
    for reason in (FinishReason.ERROR, FinishReason.ABORT):
        stream, _ = make()
        stream.put(delta(1))
        stream.put(delta(reason=reason))
        stream.put(delta(9))  # late
        first, last = read(stream)
        assert (first.token_ids, first.finish_reason, last.finish_reason) == ([1], None, reason)


def test_closing_aborts_what_runs() -> None:
    stream, aborted = make(n=2)
    asyncio.run(stream.aclose())
    assert aborted == ["r"]
    for index in range(2):
        stream.put(delta(index=index, reason=FinishReason.STOP))
    asyncio.run(stream.aclose())
    assert aborted == ["r"]
