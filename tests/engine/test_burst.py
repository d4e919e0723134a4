"""Requests that come at once: few passes over their prompts, and no decode step of few between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.simulated_device import SimulatedDevice, SimulatedEngine
from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig
from engine.engine import Engine
from engine.flight import Pace
from engine.loop import EngineLoop
from engine.types import FinishReason, SequenceState, TokenDelta
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.test_prompts_ahead import rest
from tests.engine.test_scheduler import advance, make, sequence
from tests.support import greedy, greedy_reference, make_engine


@pytest.fixture(autouse=True)
def _mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.MODE, "ahead", True)
    monkeypatch.setitem(support.MODE, "captured", True)
    monkeypatch.setattr(SdpaAttention, "ragged", True, raising=False)


def under_way(engine: Engine) -> tuple[list[str], list[list[str]]]:
    """Who is in the decode step, and in each pass over prompts."""
    flight = engine._flight
    stepping = [] if flight is None else [s.request.request_id for s in flight.batch.sequences]
    return stepping, [[c.sequence.request.request_id for c in each.chunks] for each in engine._prompts]


def decoding(model: TinyModel, count: int, **options: Any) -> Engine:
    """An engine with a decode step of so many under way."""
    engine = make_engine(model.folder, tree="off", **options)
    for i in range(count):
        engine.add(greedy(f"r{i}", [1, 2, i], 30))
    engine.step()
    engine.step()
    assert under_way(engine) == ([f"r{i}" for i in range(count)], [])
    return engine


def adding(engine: Engine, *names: str) -> Callable[[], list[TokenDelta]]:
    def add() -> list[TokenDelta]:
        for name in names:
            engine.add(greedy(name, [3, 4, 5], 9))
        return []

    return add


# -- who is in the next pass -----------------------------------------------------------------------


def test_who_comes_while_a_step_is_waited_for_is_in_the_pass_behind_it(narrow: TinyModel) -> None:
    engine = decoding(narrow, 3)
    adding(engine, "early")()
    deltas = engine.step(adding(engine, "late"))
    assert under_way(engine) == (["r0", "r1", "r2"], [["early", "late"]])
    found = rest(engine, deltas)
    assert found["late"] == greedy_reference(narrow.reference, [3, 4, 5], 9)


def test_a_step_of_few_waits_for_the_prompts_of_half_as_many(narrow: TinyModel) -> None:
    engine = decoding(narrow, 4)
    adding(engine, "a", "b")()
    deltas = engine.step()
    assert under_way(engine) == ([], [["a", "b"]])
    assert {delta.request_id for delta in deltas} == {"r0", "r1", "r2", "r3"}, "what was under way is read"
    deltas += engine.step()
    assert under_way(engine) == (["r0", "r1", "r2", "r3", "a", "b"], [])
    found = rest(engine, deltas)
    assert found["a"] == found["b"] == greedy_reference(narrow.reference, [3, 4, 5], 9)


def test_a_step_of_many_waits_for_no_prompt(narrow: TinyModel) -> None:
    engine = decoding(narrow, 3)
    adding(engine, "a")()
    deltas = engine.step()
    assert under_way(engine) == (["r0", "r1", "r2"], [["a"]])
    rest(engine, deltas)


def test_a_pass_is_launched_behind_the_one_under_way(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree="off")
    adding(engine, "a")()
    engine.step()
    adding(engine, "b", "c")()
    deltas = engine.step()
    assert [delta.request_id for delta in deltas] == ["a"]
    assert under_way(engine) == ([], [["b", "c"]])
    rest(engine, deltas)


def test_the_tokens_of_a_step_do_not_wait_for_the_pass_behind_it(narrow: TinyModel) -> None:
    engine = decoding(narrow, 3)
    adding(engine, "a")()
    deltas = engine.step()
    assert under_way(engine)[0]
    assert engine.patience_s == 0, "they wait to be read"
    deltas = engine.step()
    assert {delta.request_id for delta in deltas} == {"r0", "r1", "r2"}
    assert under_way(engine) == ([], [["a"]])
    found = rest(engine, deltas)
    assert found["a"] == greedy_reference(narrow.reference, [3, 4, 5], 9)


def test_nobody_is_left_in_a_pass_behind_a_step_that_ends_all(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree="off")
    for i in range(3):
        engine.add(greedy(f"r{i}", [1, 2, i], 3))
    engine.step()
    engine.step()
    adding(engine, "a")()
    engine.step()
    assert under_way(engine) == (["r0", "r1", "r2"], [["a"]])
    engine.abort("a")
    engine.check()
    deltas = engine.step()
    assert [delta.finish_reason for delta in deltas] == [FinishReason.LENGTH] * 3
    assert not engine.has_work
    assert under_way(engine) == ([], [])
    engine.check()


def test_aborts_that_come_in_a_step_leave_nothing_behind(narrow: TinyModel) -> None:
    engine = decoding(narrow, 3)
    adding(engine, "a")()
    gone: list[TokenDelta] = []

    def leave() -> list[TokenDelta]:
        gone.extend(delta for name in ("r0", "r1", "r2", "a") for delta in engine.abort(name))
        return gone

    deltas = engine.step(leave)
    assert [d.finish_reason for d in gone] == [FinishReason.ABORT] * 4
    assert deltas[-4:] == gone, "the last of each request"
    assert under_way(engine) == ([], [])
    engine.check()


# -- bounds ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), max_size=4), min_size=1, max_size=12),
    st.integers(1, 8),
    st.integers(16, 64),
)
def test_between_two_steps_of_a_sequence_is_no_more_than_a_pass_may_hold(
    waves: list[list[int]], slots: int, most: int
) -> None:
    scheduler = make(300, max_num_seqs=slots, max_prefill_tokens=most)
    arrivals, since = 0, 0
    pending = list(waves)
    while pending or scheduler.has_work:
        for length in pending.pop(0) if pending else ():
            scheduler.add(sequence(arrivals, length, 6))
            arrivals += 1
        waited = bool(scheduler._ready())
        plan = advance(scheduler)
        if plan.decode or not waited:
            since = 0
        since += sum(chunk.size for chunk in plan.prefill)
        assert since <= most


def test_a_step_waits_for_no_further_chunk_of_a_prompt() -> None:
    scheduler = make(max_prefill_tokens=64)
    for arrival in range(2):
        scheduler.add(sequence(arrival, 4, 50))
    advance(scheduler)
    long = sequence(2, 200, 5)
    scheduler.add(long)
    plans = [advance(scheduler) for _ in range(4)]
    assert [len(plan.decode) for plan in plans] == [0, 2, 2, 2]
    assert [plan.prefill[0].size for plan in plans] == [56, 64, 64, 16]
    assert long.state is SequenceState.DECODE


def test_a_step_does_not_wait_where_little_is_left_of_the_bound() -> None:
    scheduler = make(max_prefill_tokens=64, max_num_seqs=8)

    def of(count: int) -> tuple[int, int]:
        for _ in range(count):
            scheduler.add(sequence(len(scheduler._chains), 17, 50))
        plan = advance(scheduler)
        return len(plan.decode), len(plan.prefill)

    assert [of(1), of(1), of(1), of(2)] == [(0, 1), (0, 1), (0, 1), (3, 2)]


def test_a_step_does_not_wait_for_ever_shorter_passes() -> None:
    """Answers of one token leave the batch as small as it was, and their prompts little of the bound used."""
    scheduler = make(max_prefill_tokens=8192)
    for arrival in range(2):
        scheduler.add(sequence(arrival, 4, 50))
    advance(scheduler)
    steps = []
    for arrival in range(2, 18):
        scheduler.add(sequence(arrival, 4, 1))
        plan = advance(scheduler)
        assert plan.prefill
        steps.append(len(plan.decode))
    assert steps == [0, 0, 0, 2] * 4


def test_who_waits_keeps_what_its_next_step_needs() -> None:
    scheduler = make(3)
    old = sequence(0, 4, 9)
    scheduler.add(old)
    for _ in range(5):
        advance(scheduler)
    assert (old.num_cached, len(old.blocks)) == (8, 2), "its next row needs another block"
    scheduler.add(sequence(1, 1, 3))
    plan = advance(scheduler)
    assert (plan.decode, plan.prefill) == ([old], [])
    assert not scheduler.preemptions


# -- how long others are waited for ----------------------------------------------------------------


def test_what_a_pass_takes_at_least() -> None:
    pace = Pace()
    assert pace.least_s(100) == 0
    pace.stepped(0.006)
    pace.stepped(0.005)
    pace.stepped(0.009)
    assert pace.least_s(1) == pace.least_s(1000) == 0.005
    pace.prefilled(100, 0.005)
    pace.prefilled(1000, 0.018)
    assert pace.least_s(100) == 0.005
    assert pace.least_s(1000) == pytest.approx(0.018)


def test_others_are_waited_for_while_a_pass_runs_and_no_step(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree="off")
    assert engine.patience_s == 0
    rest(engine, adding(engine, "first")())
    assert engine.patience_s == 0
    adding(engine, "a")()
    engine.step()
    assert under_way(engine) == ([], [["a"]])
    assert engine.patience_s == engine._pace.least_s(3) / 2 > 0
    engine.step()
    assert under_way(engine) == (["a"], [])
    assert engine.patience_s == 0
    adding(engine, "b", "c")()
    engine.step()
    assert under_way(engine) == ([], [["b", "c"]])
    assert engine.patience_s > 0
    rest(engine, [])


class Simulated:
    """An engine loop on a simulated device of so long steps, and what it launches."""

    def __init__(self, model: TinyModel, step_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[tuple[str, int]] = []
        launched = self.launched

        class Noting(SimulatedEngine):
            def _launch(self, batch: Any, *rest: Any) -> Any:
                launched.append(("step", len(batch.sequences)))
                return super()._launch(batch, *rest)

            def _launch_prompts(self, chunks: Any, *rest: Any) -> Any:
                launched.extend([("prompts", len(chunks))] * bool(chunks))
                return super()._launch_prompts(chunks, *rest)

        made = partial(Noting, device=SimulatedDevice(step_s=step_s))
        monkeypatch.setattr("engine.loop.Engine", made)
        values = {"max_num_seqs": 8, "block_size": 4, "device": "cpu", "tree": "off", "attention": "sdpa"}
        self.loop = EngineLoop.load(EngineConfig(model=str(model.folder), **values), progress=False)

    async def answer(self, name: str, count: int) -> None:
        """Ask for so many tokens, and wait for the last."""
        stream, done = self.loop.submit(greedy(name, [3, 4, 5], count)), asyncio.Event()

        def look() -> None:
            while (delta := stream.take()) is not None:
                if delta.finish_reason is not None:
                    done.set()

        stream.listen(look)
        look()
        await done.wait()


def test_a_burst_takes_two_passes_and_no_step_between_them(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a request, and six that come while the device computes its prompt."""
    simulated = Simulated(narrow, 0.2, monkeypatch)

    async def main() -> None:
        await simulated.loop.start()
        await simulated.answer("before", 2)  # what a step takes is known then
        simulated.launched.clear()
        first = asyncio.create_task(simulated.answer("first", 3))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, *(simulated.answer(f"{i}", 3) for i in range(6)))
        await simulated.loop.stop()

    asyncio.run(main())
    assert simulated.launched == [("prompts", 1), ("prompts", 6), ("step", 7), ("step", 7)]


def test_who_comes_while_a_step_runs_is_launched_when_it_has_ended(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = Simulated(narrow, 0.2, monkeypatch)

    async def main() -> int:
        await simulated.loop.start()
        others = asyncio.gather(*(simulated.answer(f"{i}", 5) for i in range(3)))
        while simulated.launched[-2:] != [("step", 3)] * 2:
            await asyncio.sleep(0.01)
        before = len(simulated.launched)
        await simulated.answer("late", 1)
        await others
        await simulated.loop.stop()
        return before

    before = asyncio.run(main())
    assert simulated.launched[before] == ("prompts", 1)
