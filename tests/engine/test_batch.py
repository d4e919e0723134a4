"""What a batch's requests ask for, found once while the same sequences run together."""

from __future__ import annotations

from typing import Any

import pytest

from engine.batch import NOTHING, Asked
from engine.types import Request, SamplingParams, Sequence


def sequence(sampling: dict[str, Any] | None = None, **request: Any) -> Sequence:
    made = Request("r", (1, 2), SamplingParams(**{"temperature": 0.0, **(sampling or {})}), **request)
    return Sequence(made, 0, 0, [1, 2], 2, 9, 0)


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        (sequence(), ()),
        (sequence({"temperature": 0.5}), ("more_than_best",)),
        (sequence({"presence_penalty": 0.5}), ("more_than_best",)),
        (sequence(prediction_token_ids=(3, 4, 5)), ("more_than_best",)),
        (sequence({"logprobs": 0}), ("logprobs",)),
        (sequence(trace=True), ("traces",)),
    ],
    ids=["nothing", "sampled", "adjusted", "prediction", "logprobs", "trace"],
)
def test_one_who_asks_is_enough(other: Sequence, wanted: tuple[str, ...]) -> None:
    found = Asked.by([sequence(), other])
    flags = ("traces", "logprobs", "grammars", "more_than_best")
    assert tuple(name for name in flags if getattr(found, name)) == wanted
    assert found.predicted == ({1: 3} if other.request.prediction_token_ids else {})


def test_it_is_asked_again_when_others_run() -> None:
    greedy, sampled = sequence(), sequence({"temperature": 0.5})
    running = [greedy]
    first = NOTHING.again(running)
    assert not first.more_than_best
    assert first.again([greedy]) is first
    running.append(sampled)  # the scheduler's own list goes on
    second = first.again(running)
    assert second.more_than_best
    assert not second.again([greedy]).more_than_best
