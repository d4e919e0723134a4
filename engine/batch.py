"""The sequences of a decode step, what their requests ask for, and what the forward pass gave of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from engine.medusa.draft import Draft
from engine.medusa.tree import TreeShape
from engine.types import Sequence

__all__ = ["NOTHING", "Asked", "Batch", "Verified"]


@dataclass(frozen=True, slots=True)
class Asked:
    """Of the sequences of a batch, what some ask for beyond their tokens; found once while they run together.

    Args:
        sequences: the batch, in its order.
        traces: a `StepTrace` of each step.
        logprobs: log-probabilities of what is emitted.
        grammars: text that follows a grammar.
        more_than_best: more than the argmax of the raw logits: a draw, adjusted logits, or a prediction that
            the lookup searches.
        predicted: for each row with a prediction, how many tokens that has.
    """

    sequences: list[Sequence]
    traces: bool
    logprobs: bool
    grammars: bool
    more_than_best: bool
    predicted: Mapping[int, int]

    @classmethod
    def by(cls, sequences: list[Sequence]) -> Self:
        requests = [sequence.request for sequence in sequences]
        predicted = {row: len(r.prediction_token_ids) for row, r in enumerate(requests)}
        predicted = {row: length for row, length in predicted.items() if length}
        return cls(
            sequences=list(sequences),
            traces=any(request.trace for request in requests),
            logprobs=any(request.sampling.logprobs is not None for request in requests),
            grammars=any(sequence.grammar is not None for sequence in sequences),
            more_than_best=bool(predicted)
            or any(not r.sampling.greedy or r.sampling.adjusts for r in requests),
            predicted=predicted,
        )

    def again(self, sequences: list[Sequence]) -> Self:
        """Of these sequences, which mostly are the same."""
        return self if self.sequences == sequences else self.by(sequences)


NOTHING = Asked.by([])
"""Of a batch of nobody."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one decode step.

    Args:
        sequences: B of them.
        shapes: of their trees.
        slots, lengths: [B] int64; empty where the step is captured, as graphs have their own.
        max_length: host upper bound of `lengths`.
        adjusted: whether some of them use adjustments; None: whether any slot in use does decides.
        started: `time.perf_counter()` when it was put together.
        begun: on CUDA, an event of the step's beginning, see `begin`.
        asked: what the requests ask for.
        different: the shapes, each once.
        nodes: of the largest tree, root counted.
        head_nodes: of the largest branch of the heads.
        size: the bucket of its captured step; None where there is none.
    """

    sequences: list[Sequence]
    shapes: list[TreeShape]
    slots: Tensor
    lengths: Tensor
    max_length: int
    adjusted: bool | None = None
    started: float = 0.0
    begun: torch.cuda.Event | None = None
    asked: Asked = NOTHING
    different: frozenset[TreeShape] = frozenset()
    nodes: int = 1
    head_nodes: int = 0
    size: tuple[int, int] | None = None

    def begin(self) -> None:
        """Here the device's part begins. What the host did for it before is not the step's time: a device
        that had nothing else to do would count it."""
        if self.begun is not None:
            self.begun.record()


@dataclass(frozen=True, slots=True)
class Verified:
    """What the forward pass over the trees gave.

    Args:
        draft: the trees.
        hidden: [T, hidden], after the final norm, of the T valid nodes.
        logits: [T, vocab] float32, or of a dtype that holds them as exactly.
        rows: [B, N] int64, flat pool rows of the nodes.
    """

    draft: Draft
    hidden: Tensor
    logits: Tensor
    rows: Tensor
