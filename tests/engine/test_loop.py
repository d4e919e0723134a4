"""The engine thread: hand-over, abort, drain, the queue's bound, and a thread that dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any

import pytest

from engine import loop
from engine.config import EngineConfig
from engine.errors import EngineStoppedError, QueueFullError, RequestError
from engine.loop import EngineLoop
from engine.types import FinishReason, Request, SamplingParams
from tests.engine.conftest import TinyModel
from tests.support import greedy, greedy_reference


def run(model: TinyModel, body: Callable[[EngineLoop], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Run `body` with a started engine on its own event loop, then stop it, which checks the books."""
    values = {"max_num_seqs": 2, "block_size": 4, "device": "cpu", "max_waiting": 2}
    engine = EngineLoop.load(EngineConfig(model=str(model.folder), **(values | settings)), progress=False)

    async def main() -> None:
        await engine.start()
        try:
            await asyncio.wait_for(body(engine), timeout=30)
        finally:
            await engine.stop()

    asyncio.run(main())


async def collect(engine: EngineLoop, request: Request) -> tuple[list[int], FinishReason | None]:
    tokens, reason = [], None
    async for delta in engine.submit(request):
        tokens += delta.token_ids
        reason = delta.finish_reason
    return tokens, reason


def endless(request_id: str, n: int = 1) -> Request:
    return Request(request_id, (1, 2), SamplingParams(max_tokens=500, n=n))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_requests_run_together_and_come_back_apart(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        asked = [[1, 2, 3], [4], [5, 6]]
        answers = await asyncio.gather(
            *(collect(engine, greedy(f"r{i}", prompt, 15)) for i, prompt in enumerate(asked))
        )
        for prompt, (tokens, reason) in zip(asked, answers, strict=True):
            assert tokens == greedy_reference(tiny.reference, prompt, 15)
            assert reason is FinishReason.LENGTH

    run(tiny, body)


def test_closing_a_stream_frees_its_slot_within_two_steps(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        stream = engine.submit(endless("r"))
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 3:
                break
        await stream.aclose()
        steps = engine.stats.num_steps
        await until(lambda: engine.stats.running == 0)
        assert engine.stats.num_steps <= steps + 2
        await stream.aclose()
        assert len((await collect(engine, greedy("r", [1], 3)))[0]) == 3  # the id is free again

    run(tiny, body)


def rest_for(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """After each hand-out."""
    monkeypatch.setattr(loop, "_REST", 1e9)
    monkeypatch.setattr(loop, "_MOST_REST_S", seconds)


def test_an_event_loop_that_was_busy_is_told_of_all_steps_at_once(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        stream = engine.submit(endless("r"))
        told: list[int] = []
        stream.listen(lambda: told.append(engine.stats.num_steps))
        await until(lambda: bool(told))
        while stream.take() is not None:
            pass
        told.clear()
        steps = engine.stats.num_steps
        deadline = time.monotonic() + 10
        while engine.stats.num_steps < steps + 20 and time.monotonic() < deadline:
            time.sleep(0.005)  # the event loop does not turn
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(told) == 1
        joined = stream.take()
        assert joined is not None
        assert len(joined.token_ids) >= 19
        assert stream.merged_steps >= 18
        await stream.aclose()

    run(tiny, body)


def test_the_event_loop_rests_after_it_has_handed_out(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest_for(monkeypatch, 0.1)

    async def body(engine: EngineLoop) -> None:
        stream = engine.submit(endless("r"))
        told: list[float] = []
        stream.listen(lambda: told.append(time.monotonic()))
        tokens = 0
        while len(told) < 4:
            await asyncio.sleep(0.001)
            while (delta := stream.take()) is not None:
                tokens += len(delta.token_ids)
        assert all(b - a > 0.09 for a, b in pairwise(told))
        assert tokens > 4
        await stream.aclose()

    run(tiny, body)


def test_the_event_loop_does_not_rest_after_ends(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rest_for(monkeypatch, 1.0)

    async def body(engine: EngineLoop) -> None:
        await collect(engine, greedy("a", [1], 3))
        asked = time.monotonic()
        stream = engine.submit(endless("b"))
        await anext(aiter(stream))
        assert time.monotonic() - asked < 0.5
        await stream.aclose()

    run(tiny, body)


def test_what_a_thread_gave_before_it_died_is_not_lost(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest_for(monkeypatch, 5.0)

    async def body(engine: EngineLoop) -> None:
        stream = engine.submit(endless("r"))
        await until(lambda: engine.stats.generation_tokens > 10)  # most of them while the event loop rests

        def broken() -> None:
            raise MemoryError("no more")

        monkeypatch.setattr(engine._engine._scheduler, "plan", broken)
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason is FinishReason.ERROR
        assert sum(len(delta.token_ids) for delta in deltas) == engine.stats.generation_tokens
        monkeypatch.setattr(engine._engine, "check", lambda: None)  # its books are those of a broken step

    run(tiny, body)


def test_one_choice_ends_and_the_other_goes_on(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        reasons = {}
        async for delta in engine.submit(Request("r", (1, 2), SamplingParams(max_tokens=30, n=2))):
            if delta.index == 0 and not reasons:
                engine.abort_choice("r", 0)
            if delta.finish_reason is not None:
                reasons[delta.index] = delta.finish_reason
        assert reasons == {0: FinishReason.ABORT, 1: FinishReason.LENGTH}

    run(tiny, body)


def test_the_queue_is_bounded_and_recovers(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        streams = [engine.submit(endless(f"r{i}")) for i in range(4)]
        with pytest.raises(QueueFullError) as caught:
            engine.submit(endless("r4"))
        assert caught.value.retry_after_s >= 1
        with pytest.raises(RequestError, match="in use"):
            engine.submit(endless("r0"))
        with pytest.raises(RequestError, match="at most 4"):
            engine.submit(endless("r5", n=5))
        for stream in streams:
            await stream.aclose()
        await until(lambda: not engine._live)
        assert len((await collect(engine, greedy("after", [1], 3)))[0]) == 3

    run(tiny, body)


def test_drain_lets_the_running_finish_and_refuses_the_new(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        running = asyncio.ensure_future(collect(engine, greedy("r", [1, 2, 3], 40)))
        await until(lambda: engine.stats.running == 1)
        stopping = asyncio.ensure_future(engine.stop(drain_s=20))
        await asyncio.sleep(0)
        assert not engine.ready
        with pytest.raises(EngineStoppedError):
            engine.submit(endless("late"))
        tokens, reason = await running
        assert (len(tokens), reason) == (40, FinishReason.LENGTH)
        await stopping

    run(tiny, body)


def test_a_drain_past_its_deadline_aborts(tiny: TinyModel) -> None:
    async def body(engine: EngineLoop) -> None:
        running = asyncio.ensure_future(collect(engine, endless("r")))
        await until(lambda: engine.stats.running == 1)
        await engine.stop(drain_s=0.01)
        assert (await running)[1] is FinishReason.ABORT

    run(tiny, body)


def test_a_dead_thread_ends_every_stream_with_the_reason(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(engine: EngineLoop) -> None:
        def broken() -> None:
            raise MemoryError("no more")

        monkeypatch.setattr(engine._engine._scheduler, "plan", broken)
        deltas = [delta async for delta in engine.submit(endless("r", n=2))]
        assert [delta.finish_reason for delta in deltas] == [FinishReason.ERROR] * 2
        assert "no more" in (deltas[0].error or "")
        assert not engine.healthy
        with pytest.raises(EngineStoppedError, match="no more"):
            engine.submit(endless("late"))
        monkeypatch.undo()
        for sequence in list(engine._engine._scheduler):
            engine._engine.abort(sequence.request.request_id)

    run(tiny, body)
