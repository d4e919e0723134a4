"""The engine in a thread and in a process: hand-over, abort, drain, the queue's bound, and what dies."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

from engine import loop
from engine.config import EngineConfig
from engine.errors import EngineStoppedError, QueueFullError, RequestError
from engine.front import EngineFront
from engine.grammar import GrammarCompiler, GrammarSpec
from engine.loop import EngineLoop
from engine.process import EngineProcess
from engine.types import FinishReason, Request, SamplingParams, TokenDelta
from engine.worker import EngineWorker
from tests.engine.conftest import TinyModel
from tests.engine.in_child import strike
from tests.letters import letter_tokenizer
from tests.support import greedy, greedy_reference, make_engine

TOKENIZER = letter_tokenizer("abcd")  # of which grammars can be made
D = TOKENIZER.convert_tokens_to_ids("d")

SETTINGS: dict[str, Any] = {"max_num_seqs": 2, "block_size": 4, "device": "cpu", "max_waiting": 2}


def load(kind: str, model: TinyModel, **settings: Any) -> EngineFront:
    config = EngineConfig(model=str(model.folder), **(SETTINGS | settings))
    if kind == "thread":
        return EngineLoop.load(config, progress=False)
    if kind == "process":
        return EngineProcess.load(config, progress=False, prepare=[strike])
    with ThreadPoolExecutor(1) as loading:  # a thread that ends
        return loading.submit(EngineProcess.load, config, progress=False, prepare=[strike]).result()


class Running:
    """A started engine on an event loop of its own, for several tests."""

    def __init__(self, engine: EngineFront) -> None:
        self.engine = engine
        self._runner = asyncio.Runner()
        self._runner.run(engine.start())

    def __call__(self, body: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        """Run `body` with the engine, which has nothing to do before and after."""

        async def bounded() -> None:
            try:
                await asyncio.wait_for(body(self.engine), timeout=30)
            finally:
                self.engine.abort(list(self.engine._streams))
                await until(lambda: not self.engine._streams)
            assert self.engine.stats.running == self.engine.stats.waiting == 0

        self._runner.run(bounded())

    def close(self) -> None:
        self._runner.run(self.engine.stop())  # which checks the books
        self._runner.close()


@pytest.fixture(scope="module", params=["thread", "process"])
def running(
    request: pytest.FixtureRequest, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    lettered = tmp_path_factory.mktemp("lettered")
    shutil.copytree(tiny.folder, lettered, dirs_exist_ok=True)
    TOKENIZER.save_pretrained(lettered)
    made = Running(load(request.param, TinyModel(tiny.reference, lettered, tiny.heads)))
    yield made
    made.close()


def run(
    model: TinyModel,
    body: Callable[[Any], Coroutine[Any, Any, None]],
    kind: str = "thread",
    **settings: Any,
) -> None:
    """Run `body` with a started engine on its own event loop, then stop it, which checks the books."""
    engine = load(kind, model, **settings)

    async def main() -> None:
        await engine.start()
        try:
            await asyncio.wait_for(body(engine), timeout=30)
        finally:
            await engine.stop()

    asyncio.run(main())


async def collect(engine: EngineFront, request: Request) -> tuple[list[int], FinishReason | None]:
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


def test_requests_run_together_and_come_back_apart(running: Running, tiny: TinyModel) -> None:
    async def body(engine: EngineFront) -> None:
        asked = [[1, 2, 3], [4], [5, 6]]
        answers = await asyncio.gather(
            *(collect(engine, greedy(f"r{i}", prompt, 15)) for i, prompt in enumerate(asked))
        )
        for prompt, (tokens, reason) in zip(asked, answers, strict=True):
            assert tokens == greedy_reference(tiny.reference, prompt, 15)
            assert reason is FinishReason.LENGTH

    running(body)


def test_closing_a_stream_frees_its_slot_within_two_steps(running: Running) -> None:
    async def body(engine: EngineFront) -> None:
        stream = engine.submit(endless("r"))
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 3:
                break
        await stream.aclose()
        steps = engine.stats.num_steps
        await until(lambda: engine.stats.running == 0)
        if isinstance(engine, EngineLoop):  # a copy is not as new
            assert engine.stats.num_steps <= steps + 2
        await stream.aclose()
        assert len((await collect(engine, greedy("r", [1], 3)))[0]) == 3  # the id is free again

    running(body)


def rest_for(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """After each hand-out."""
    monkeypatch.setattr(loop, "_REST", 1e9)
    monkeypatch.setattr(loop, "_MOST_REST_S", seconds)


def test_an_event_loop_that_was_busy_is_told_of_all_steps_at_once(running: Running) -> None:
    async def body(engine: EngineFront) -> None:
        stream = engine.submit(endless("r"))
        told: list[float] = []
        stream.listen(lambda: told.append(time.monotonic()))
        await until(lambda: bool(told))
        while stream.take() is not None:
            pass
        told.clear()
        time.sleep(0.15)  # the event loop does not turn
        await until(lambda: bool(told))
        assert len(told) == 1
        joined = stream.take()
        assert joined is not None
        assert len(joined.token_ids) >= joined.num_steps
        assert stream.merged_steps >= joined.num_steps - 1 > 3
        await stream.aclose()

    running(body)


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


def test_one_choice_ends_and_the_other_goes_on(running: Running) -> None:
    async def body(engine: EngineFront) -> None:
        reasons = {}
        async for delta in engine.submit(Request("r", (1, 2), SamplingParams(max_tokens=30, n=2))):
            if delta.index == 0 and not reasons:
                engine.abort_choice("r", 0)
            if delta.finish_reason is not None:
                reasons[delta.index] = delta.finish_reason
        assert reasons == {0: FinishReason.ABORT, 1: FinishReason.LENGTH}

    running(body)


def test_the_queue_is_bounded_and_recovers(running: Running) -> None:
    async def body(engine: EngineFront) -> None:
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

    running(body)


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


def test_who_is_told_to_end_in_the_last_step_ends(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny.folder, tree="off")
    given: list[TokenDelta] = []
    worker, step = EngineWorker(engine, given.extend), engine.step

    def told(arrived: Callable[[], list[TokenDelta]]) -> list[TokenDelta]:
        worker.put(None)
        return step(arrived)

    monkeypatch.setattr(engine, "step", told)
    worker.add(greedy("r", [1, 2], 1))
    thread = threading.Thread(target=worker.serve, daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert [delta.finish_reason for delta in given] == [FinishReason.LENGTH]


@pytest.mark.parametrize(
    ("kind", "drain_s", "why"),
    [
        ("thread", 0.01, "drain deadline of 0.01 s passed"),
        ("process", 0.01, "drain deadline of 0.01 s passed"),
        ("thread", 0.0, "not draining"),
    ],
)
def test_a_drain_past_its_deadline_aborts(
    tiny: TinyModel, kind: str, drain_s: float, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(engine: EngineFront) -> None:
        running = asyncio.ensure_future(collect(engine, endless("r")))
        await until(lambda: engine.stats.running == 1)
        caplog.set_level(logging.WARNING)  # other tests leave another
        await engine.stop(drain_s)
        assert f"{why}, aborting 1 requests" in caplog.text
        assert engine._ended()
        assert engine.stats.kv_blocks_free + engine.stats.kv_blocks_cached == engine.stats.kv_blocks_total
        with pytest.raises(EngineStoppedError):
            engine.submit(endless("late"))
        assert (await running)[1] is FinishReason.ABORT

    run(tiny, body, kind)


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


def test_all_that_a_delta_can_hold_arrives(running: Running) -> None:
    async def body(engine: EngineFront) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1, n=2, seed=1)
        asked = Request("r", (1, 2, 3), sampling, trace=True, prediction_token_ids=(4, 5, 6), priority=3)
        found: dict[int, list[TokenDelta]] = {0: [], 1: []}
        async for delta in engine.submit(asked):
            found[delta.index].append(delta)
        for deltas in found.values():
            assert sum(len(delta.token_ids) for delta in deltas) == 6
            for delta in deltas:
                assert [each.token_id for each in delta.logprobs or []] == delta.token_ids
                assert (delta.trace is not None) == (delta.num_steps == 1)
                assert 0 <= time.monotonic() - delta.time_s < 30
            assert 0 < deltas[0].queue_s < 30
            assert deltas[-1].finish_reason is FinishReason.LENGTH
        first = found[0][0].prompt_logprobs
        assert first is not None
        assert [None if each is None else each.token_id for each in first] == [None, 2, 3]

    running(body)


def test_counts_are_exact_when_the_last_answer_has_ended(running: Running) -> None:
    async def body(engine: EngineFront) -> None:
        for count in (3, 40):
            before = engine.stats.generation_tokens, engine.stats.prompt_tokens
            await collect(engine, greedy("r", [1, 2, 3], count))
            stats = engine.stats
            assert (stats.generation_tokens, stats.prompt_tokens) == (before[0] + count, before[1] + 3)
            assert stats.kv_blocks_free + stats.kv_blocks_cached == stats.kv_blocks_total
            assert stats.step_age() == 0

    running(body)


def test_a_grammar_is_followed_and_what_concerns_its_request_waits_for_it(running: Running) -> None:
    compiler = GrammarCompiler(TOKENIZER, ())

    def asked(request_id: str, pattern: str, n: int = 1) -> Request:
        grammar = compiler.compile(GrammarSpec("regex", pattern))
        return Request(request_id, (1,), SamplingParams(temperature=0, max_tokens=30, n=n), grammar=grammar)

    async def body(engine: EngineFront) -> None:
        for _ in range(2):  # the second time it is known
            assert await collect(engine, asked("r", "d")) == ([D], FinishReason.STOP)
        both = asked("gone", "[ab]{99}"), asked("half", "[ac]{99}", n=2)
        gone, halved = map(engine.submit, both)
        await gone.aclose()
        engine.abort_choice("half", 1)
        assert [delta.finish_reason async for delta in gone][-1] is FinishReason.ABORT
        ended = {delta.index: delta.finish_reason async for delta in halved}
        assert ended == {0: FinishReason.LENGTH, 1: FinishReason.ABORT}

    running(body)


def test_where_the_engine_is_can_be_told(running: Running) -> None:
    async def body(engine: EngineFront) -> None:
        assert "worker.py" in await engine.stack()

    running(body)
