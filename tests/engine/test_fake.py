"""The fake keeps the engine's promises, else the server's tests prove nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from engine.client import EngineClient
from engine.errors import ContextLengthError, EngineStoppedError, QueueFullError, RequestError
from engine.fake import FakeEngine, FakeStep, Step
from engine.types import (
    DraftSource,
    FinishReason,
    Request,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
)

SCRIPT: list[list[int]] = [[1], [2, 3, 4], [5, 6]]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


def request(request_id: str = "r", *, trace: bool = False, prompt: int = 2, **sampling: Any) -> Request:
    return Request(request_id, tuple(range(prompt)), SamplingParams(**sampling), trace=trace)


async def collect(engine: FakeEngine, wanted: Request) -> list[TokenDelta]:
    return [delta async for delta in engine.submit(wanted)]


def outcome(deltas: list[TokenDelta]) -> tuple[list[int], FinishReason | None]:
    return [token for delta in deltas for token in delta.token_ids], deltas[-1].finish_reason


def test_is_an_engine_client() -> None:
    client: EngineClient = FakeEngine(lambda _r, _i: SCRIPT)  # checked by mypy where it runs on tests
    assert not client.ready
    assert client.healthy


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason", "stop_token_id"),
    [
        ({}, [1, 2, 3, 4, 5, 6], FinishReason.STOP, None),
        ({"max_tokens": 3}, [1, 2, 3], FinishReason.LENGTH, None),
        ({"stop_token_ids": (3,)}, [1, 2, 3], FinishReason.STOP, 3),
        ({"stop_token_ids": (3,), "max_tokens": 3}, [1, 2, 3], FinishReason.STOP, 3),
        ({"max_tokens": 1}, [1], FinishReason.LENGTH, None),
    ],
)
def test_script_is_cut_where_the_request_says(
    sampling: dict[str, Any], tokens: list[int], reason: FinishReason, stop_token_id: int | None
) -> None:
    async def work() -> None:
        engine = FakeEngine(lambda _r, _i: SCRIPT)
        await engine.start()
        deltas = await collect(engine, request(**sampling))
        assert outcome(deltas) == (tokens, reason)
        assert deltas[-1].stop_token_id == stop_token_id
        assert [delta.num_steps for delta in deltas] == [0, *[1] * (len(deltas) - 1)]
        assert engine.stats.generation_tokens == len(tokens)
        await engine.stop()

    run(work())


def test_eos_ends_unless_ignored() -> None:
    async def work() -> None:
        engine = FakeEngine(lambda _r, _i: SCRIPT, eos_token_ids=(5,))
        await engine.start()
        assert outcome(await collect(engine, request())) == ([1, 2, 3, 4, 5], FinishReason.STOP)
        assert outcome(await collect(engine, request(ignore_eos=True)))[0] == [1, 2, 3, 4, 5, 6]
        await engine.stop()

    run(work())


def test_refusals() -> None:
    async def work() -> None:
        engine = FakeEngine(lambda _r, _i: SCRIPT, max_num_seqs=1, max_waiting=1, max_model_len=8)
        with pytest.raises(EngineStoppedError):
            engine.submit(request())
        await engine.start()
        with pytest.raises(RequestError):
            engine.submit(request(prompt=0))
        with pytest.raises(ContextLengthError):
            engine.submit(request(prompt=8))
        with pytest.raises(ContextLengthError):
            engine.submit(request(max_tokens=7))
        engine.submit(request("a", n=2))
        with pytest.raises(QueueFullError):
            engine.submit(request("b"))
        await engine.stop()
        with pytest.raises(EngineStoppedError):
            engine.submit(request())
        await engine.stop()  # twice is fine

    run(work())


def test_abort_frees_at_once_and_ends_the_stream() -> None:
    async def work() -> None:
        engine = FakeEngine(lambda _r, _i: [[1]] * 1000, max_num_seqs=2)
        await engine.start()
        first, second = engine.submit(request("a", n=2)), engine.submit(request("b"))
        assert (await anext(aiter(first))).token_ids == [1]
        assert (engine.stats.running, engine.stats.waiting) == (2, 1)
        engine.abort_choice("a", 0)
        assert engine.stats.running == 1
        engine.abort(["a", "unknown"])
        rest = [delta async for delta in first]
        assert {d.index for d in rest if d.finish_reason is FinishReason.ABORT} == {0, 1}
        await second.aclose()
        await second.aclose()
        assert (engine.stats.running, engine.stats.waiting) == (0, 0)
        assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_total
        await engine.stop()

    run(work())


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (ValueError("broken"), "broken"),
        ([2] * 65, "a step of the script has 65 tokens, and no tree more than 64"),
    ],
)
def test_failed_step_ends_its_choice_only(broken: Step, error: str) -> None:
    async def work() -> None:
        engine = FakeEngine(lambda r, _i: [[1], broken] if r.request_id == "bad" else SCRIPT)
        await engine.start()
        bad, good = await asyncio.gather(collect(engine, request("bad")), collect(engine, request("good")))
        assert (bad[-1].finish_reason, bad[-1].error) == (FinishReason.ERROR, error)
        assert outcome(good) == ([1, 2, 3, 4, 5, 6], FinishReason.STOP)
        await engine.stop()

    run(work())


def test_death_fails_everything() -> None:
    async def work() -> None:
        engine = FakeEngine(lambda _r, _i: [[1]] * 1000)
        await engine.start()
        stream = engine.submit(request())
        engine.die()
        assert [delta.finish_reason async for delta in stream] == [FinishReason.ERROR]
        assert not engine.healthy
        assert not engine.ready
        await engine.stop()

    run(work())


@pytest.mark.parametrize(("drain_s", "reason"), [(5.0, FinishReason.STOP), (0.0, FinishReason.ABORT)])
def test_stop_drains(drain_s: float, reason: FinishReason) -> None:
    async def work() -> None:
        engine = FakeEngine(lambda _r, _i: SCRIPT, step_s=0.01)
        await engine.start()
        stream = engine.submit(request())
        await engine.stop(drain_s)
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason is reason

    run(work())


def test_statistics_and_traces_of_a_tree() -> None:
    async def work() -> None:
        engine = FakeEngine(lambda _r, _i: SCRIPT, draft_tokens=7)
        await engine.start()
        deltas = await collect(engine, request(trace=True))
        stats = engine.stats
        assert (stats.prompt_tokens, stats.generation_tokens) == (2, 6)
        assert (stats.num_drafts, stats.draft_tokens, stats.accepted_tokens) == (2, 14, 3)
        assert stats.acceptance_length == 2.5
        assert deltas[0].trace is None
        trace = deltas[1].trace
        assert trace is not None
        assert (trace.tokens, trace.parents, trace.accepted) == ((1, 2, 3), (-1, 0, 1), (0, 1, 2))
        assert (trace.next_root, trace.sources[0]) == (4, DraftSource.ROOT)
        assert (await collect(engine, request()))[1].trace is None
        await engine.stop()

    run(work())


def test_a_step_may_say_more_than_its_tokens() -> None:
    given = [TokenLogprobs(token, -1.0, 2, ((9, -0.5),)) for token in (2, 3, 4)]
    script = [
        FakeStep([1], cached_tokens=2),
        FakeStep([2, 3, 4], logprobs=given, accepted_prediction_tokens=3),
    ]

    async def work() -> None:
        engine = FakeEngine(lambda _r, _i: script, draft_tokens=7)
        await engine.start()
        first, second = await collect(engine, request(logprobs=2, prompt_logprobs=1, prompt=3, max_tokens=3))
        assert first.logprobs is not None
        assert [one.token_id for one in first.logprobs] == [1]
        assert len(first.logprobs[0].top) == 2
        assert first.prompt_logprobs is not None
        assert [one and one.token_id for one in first.prompt_logprobs] == [None, 1, 2]
        assert (first.cached_tokens, second.cached_tokens) == (2, 0)
        assert second.token_ids == [2, 3]  # cut by max_tokens, and so is what belongs to them
        assert second.logprobs == given[:2]
        assert (second.prompt_logprobs, second.accepted_prediction_tokens) == (None, 2)
        assert engine.stats.accepted_by_source == {"head": 0, "lookup": 0, "prediction": 2, "grammar": 0}
        assert (engine.stats.prefix_query_tokens, engine.stats.prefix_hit_tokens) == (3, 2)
        (plain, *_) = await collect(engine, request())
        assert (plain.logprobs, plain.prompt_logprobs) == (None, None)
        await engine.stop()

    run(work())
