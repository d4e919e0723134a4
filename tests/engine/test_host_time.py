"""What the host takes while the device computes, and what of that is held against nobody's step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks.simulated_device import SimulatedDevice, SimulatedEngine
from engine.config import EngineConfig
from engine.flight import HostTime
from engine.graphs import CapturedRunner
from engine.loader import load
from engine.medusa.adaptive import AdaptiveTree
from engine.scheduler import Chunk
from engine.stats import EngineStats
from engine.step_results import Prefilled, PromptResults, Results
from engine.types import Request, SamplingParams, TokenDelta
from tests.engine.conftest import TinyModel


class _Clock:
    """Goes on where it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class _Made(Results):
    """The device takes until then."""

    def __init__(self, clock: _Clock, until: float) -> None:
        super().__init__(torch.zeros(1, 1), 0, started=0.0, begun=None)
        self.clock, self.until = clock, until

    def wait(self) -> None:
        self.clock.now = max(self.clock.now, self.until)


def test_it_is_the_time_between_two_waits() -> None:
    clock = _Clock()
    host = HostTime(overlaps=True, clock=clock)
    assert host.wait(_Made(clock, 101.0)) == 0.0  # nothing in front of it
    clock.now += 0.25
    assert host.wait(_Made(clock, 102.0)) == 0.25
    clock.now += 3.0  # the device has long been done
    assert host.wait(_Made(clock, 103.0)) == 3.0
    clock.now += 1.0
    host.forget()
    assert host.wait(_Made(clock, 200.0)) == 0.0
    alone = HostTime(overlaps=False, clock=clock)
    for until in (300.0, 400.0):
        assert alone.wait(_Made(clock, until)) == 0.0
        clock.now += 1.0


@pytest.fixture
def simulated(narrow: TinyModel) -> SimulatedEngine:
    settings: dict[str, Any] = {"heads": str(narrow.heads), "tree": "auto", "lookup": "off"}
    settings |= {"max_num_seqs": 2, "kv_cache_tokens": 2048, "device": "cpu", "prefix_caching": False}
    made = load(EngineConfig(model=str(narrow.folder), **settings), progress=False)
    return SimulatedEngine(made, device=SimulatedDevice(0.001))


def request(name: str, tokens: int) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))


def test_steps_that_follow_one_another_tell_it(
    simulated: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the first, for which the device waited, nor those between which prompts were computed."""
    chooser, seen = simulated._chooser, []
    assert isinstance(chooser, AdaptiveTree)
    observe = chooser.observe

    def noted(*args: Any, host_s: float = 0.0, **options: Any) -> None:
        seen.append(host_s)
        observe(*args, host_s=host_s, **options)

    monkeypatch.setattr(chooser, "observe", noted)
    # Looked at when a wait begins and when it ends: from one to the next it is a second.
    seconds = itertools.count(1.0)
    assert simulated._host.overlaps
    simulated._host.clock = lambda: next(seconds)
    simulated.add(request("a", 12))
    while len(seen) < 4:
        simulated.step()
    assert seen == [0.0, 1.0, 1.0, 1.0]
    assert chooser._times.costs(1, 10, 64).host > 0.0
    simulated.add(request("b", 8))
    while simulated.has_work:
        simulated.step()
    both = seen[4:]
    assert 0.0 in both[:4]
    assert 1.0 in both[4:]
    # When all is idle for a while, that is no step's either.
    seen.clear()
    simulated.add(request("c", 4))
    while simulated.has_work:
        simulated.step()
    assert seen[0] == 0.0
    assert simulated.stats.device_idle_seconds > 0.0  # a second is longer than a step
    # Steps whose log-probabilities are wanted are read before the next is launched: the device waits for it.
    seen.clear()
    shown = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    simulated.add(Request("d", (1, 2, 3), shown))
    while simulated.has_work:
        simulated.step()
    assert len(seen) > 3
    assert not any(seen)


def test_a_pass_over_prompts_that_is_waited_for_is_no_steps_time(
    simulated: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has a grammar is: the step that was under way has long ended then."""
    seen: list[float] = []
    runner, wait, launch, clock = simulated._runner, HostTime.wait, simulated._runner.launch, _Clock()
    simulated._host.clock = clock

    def waited(host: HostTime, results: Results) -> float:
        clock.now += 1.0
        seen.append(wait(host, results))
        return seen[-1]

    def prefill(chunks: list[Chunk]) -> list[Prefilled]:
        clock.now += 100.0
        made = launch(chunks)
        assert isinstance(made, PromptResults)
        return made.read()

    monkeypatch.setattr(HostTime, "wait", waited)
    simulated.add(request("a", 12))
    while len(seen) < 4:
        simulated.step()
    monkeypatch.setattr(runner, "launches", lambda _: False)
    monkeypatch.setattr(runner, "launch", prefill)

    def arrived() -> list[TokenDelta]:
        simulated.add(request("b", 8))
        return []

    simulated.step(arrived)
    while simulated.has_work:
        simulated.step()
    assert clock.now > 200.0
    assert set(seen) == {0.0, 1.0}


def test_what_the_host_takes_longer_the_device_is_idle() -> None:
    stats = EngineStats()
    for host_s in (0.0, 0.003, 0.007):
        stats.decoded(0.004, host_s)
    assert stats.device_idle_seconds == pytest.approx(0.003)
    assert stats.step_seconds["decode"].total == pytest.approx(0.012)


def test_a_captured_step_begins_when_its_inputs_are_there(
    simulated: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a device that waits for the host would seem to take as long as the host does."""
    runner, order = simulated._runner, []
    assert isinstance(runner, CapturedRunner)
    fill, first_half = runner._fill, runner._first_half

    class FirstHalf:
        def replay(self) -> None:
            order.append("replay")

    monkeypatch.setattr(runner, "_fill", lambda *args: (order.append("fill"), fill(*args)))
    monkeypatch.setattr(runner, "_first_half", lambda *args: (first_half(*args), FirstHalf())[1])

    class Event:
        def record(self) -> None:
            order.append("begin")

    batches = runner.batch

    def batch(*args: Any) -> Any:
        made = batches(*args)
        object.__setattr__(made, "begun", Event())
        return made

    monkeypatch.setattr(runner, "batch", batch)
    simulated.add(request("a", 3))
    while simulated.has_work:
        simulated.step()
    assert order[-3:] == ["fill", "begin", "replay"]
    assert order.count("begin") == order.count("replay") >= 2
