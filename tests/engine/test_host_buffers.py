from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.host_buffers import Inputs, Landing, Pinned
from engine.step_results import Results

CPU = torch.device("cpu")


class Event:
    """One of CUDA's, and what happened to it."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def record(self) -> None:
        self._log.append(f"{self._name} recorded")

    def synchronize(self) -> None:
        self._log.append(f"{self._name} waited for")


def with_event(piece: Pinned, log: list[str], name: str) -> None:
    piece.copied = Event(log, name)  # type: ignore[assignment]


def test_inputs_are_what_was_sent_last() -> None:
    inputs = Inputs(4, CPU)
    assert inputs.tensor.tolist() == [0, 0, 0, 0]
    inputs.fill([1, 2, 3])
    assert inputs.tensor.tolist() == [1, 2, 3, 0]
    inputs.writable()[:2] = 7, 8
    assert inputs.tensor.tolist() == [1, 2, 3, 0]
    inputs.send(2)
    assert inputs.tensor.tolist() == [7, 8, 3, 0]
    inputs.fill(torch.arange(4).numpy())
    assert inputs.tensor.tolist() == [0, 1, 2, 3]


def test_memory_of_inputs_is_written_to_when_the_copy_from_it_has_ended() -> None:
    """And not before the next step's inputs have been sent from the other piece."""
    inputs, log = Inputs(1, CPU), list[str]()
    pieces = {id(piece.array): name for piece, name in ((inputs._next, "a"), (inputs._other, "b"))}
    with_event(inputs._next, log, "a")
    with_event(inputs._other, log, "b")
    for value in range(4):
        array = inputs.writable()
        log.append(f"{pieces[id(array)]} written")
        array[0] = value
        inputs.send(1)
    a, b = (["%s waited for", "%s written", "%s recorded"] for _ in "ab")
    assert log == [line % name for name in "abab" for line in (a if name == "a" else b)]


def test_each_result_under_way_has_memory_of_its_own() -> None:
    packed = torch.tensor([[1, 0, 0, 1, 5], [1, 0, 0, 1, 6], [1, 0, 0, 1, 0]])
    landing = Landing(packed)

    def results() -> Results:
        return Results(landing, 0, started=0.0, begun=None, count=2)

    first = results()
    packed[:, 4] += 10  # the next step
    second = results()
    assert [row.tokens for row in first.rows()] == [[5], [6]]
    packed[:, 4] += 10
    third = results()
    assert third._lent is not None
    assert second._lent is not None
    assert third._lent.array is not second._lent.array
    assert [row.tokens for row in second.rows()] == [[15], [16]]
    assert [row.tokens for row in third.rows()] == [[25], [26]]
    with pytest.raises(RuntimeError, match="read once"):
        first.rows()
    assert len(landing._free) == 2
    results()  # that are never read, as those of a pass that failed behind its graph
    packed[:, 4] += 10
    assert [row.tokens for row in results().rows()] == [[35], [36]]
    assert len(landing._free) == 1, "the memory of those is gone with them"


def test_what_a_step_took_is_told_when_its_event_is_another_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    landing = Landing(torch.tensor([[1, 0, 0, 1, 5]]))
    piece = landing.take()
    with_event(piece, log, "end")
    landing.give_back(piece)

    class Begun:
        def elapsed_time(self, end: Any) -> float:
            assert not log[-1].startswith("end recorded"), "it was recorded again, or not waited for"
            return 2.0

    begun: Any = Begun()
    results = Results(landing, 0, started=0.0, begun=begun)
    assert log == ["end recorded"]
    assert len(results.rows()) == 1
    assert log == ["end recorded", "end waited for"]
    Results(landing, 0, started=0.0, begun=begun)
    assert log[-1] == "end recorded"
    assert results.seconds == 0.002


def test_memory_made_in_inference_mode_is_written_to_outside_of_it() -> None:
    with torch.inference_mode():
        inputs, landing = Inputs(2, CPU), Landing(torch.zeros(1, 5, dtype=torch.int64))
        landing.give_back(landing.take())
    landing.take()
    inputs._next.tensor[0] = 1
