"""What the host reads of a pass over prompts and of a decode step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.host_buffers import Landing
from engine.types import TokenLogprobs

__all__ = ["NOT_FINITE", "Prefilled", "PromptResults", "Results", "StepRow", "device_event"]

NOT_FINITE = "the model computed values that are not finite; a wider dtype may help"


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a chunk of a prompt gave.

    Args:
        error: why there is nothing; the rest then means nothing.
        first: the first token, after the last chunk of a sequence that has none from before a preemption.
        logprobs: of that token, where they were asked for.
        chain: what the lookup proposes for the first decode step, and the kind of its match; None where it
            was not asked.
    """

    error: str | None = None
    first: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    chain: tuple[list[int], int] | None = None


class StepRow(NamedTuple):
    """One sequence's share of a step, on the host.

    Args:
        sound: the carried hidden state has no NaN or infinity. One that is not finite spreads to all
            later rows of its sequence, this one included.
        length: accepted nodes without the root.
        last: node at the accepted path's end.
        nodes: bit mask of the nodes that matched together with all their ancestors, root bit 0.
        tokens: what is emitted, length + 1 of them.
        chain: what the lookup proposes for the next step.
        kind: of the match that it follows.
    """

    sound: bool
    length: int
    last: int
    nodes: int
    tokens: list[int]
    chain: list[int]
    kind: int


class Results:
    """What the host reads of a step, on its way from the device from the moment this is made.

    Args:
        packed: [B, K] int64: finite, length, last, nodes, then D + 1 tokens, then kind, count and chain where
            there is a lookup. What steps leave in one place is read once, by way of a `Landing`; on the CPU
            nobody may write to others.
        depth: D.
        begun: an event of the step's beginning on CUDA.
        started: `time.perf_counter()` of it.
        count: rows that are read, the first; None: all.
    """

    def __init__(
        self,
        packed: Tensor | Landing,
        depth: int,
        *,
        started: float,
        begun: torch.cuda.Event | None,
        count: int | None = None,
    ) -> None:
        self.depth, self._begun, self._count = depth, begun, count
        if isinstance(packed, Tensor) and packed.device.type == "cuda":
            packed = Landing(packed)
        self._packed = packed
        self._lent = packed.take() if isinstance(packed, Landing) else None
        self._ended = self._lent.copied if self._lent is not None else None
        self._seconds = time.perf_counter() - started

    @property
    def seconds(self) -> float:
        """What the step took; on CUDA, on the device. Waits for its end."""
        self.wait()
        return self._seconds

    def wait(self) -> None:
        """Until the device has made them."""
        if self._ended is None:
            return
        self._ended.synchronize()
        if self._begun is not None:  # to be told before the event is another step's
            self._seconds = float(self._begun.elapsed_time(self._ended)) / 1000
        self._ended = None

    def values(self) -> NDArray[np.int64]:
        """[B, K], see `packed`: to be looked at before the `rows` are read. Waits for the step's end.

        Raises:
            RuntimeError: they were read.
        """
        if isinstance(self._packed, Tensor):
            return self._packed.numpy()[: self._count]
        if self._lent is None:
            raise RuntimeError("the results of a step are read once")
        self.wait()
        return self._lent.array[: self._count]

    def rows(self) -> list[StepRow]:
        """One for each sequence. Waits for the step's end.

        Raises:
            RuntimeError: they were read before, and the memory may be another step's.
        """
        rows = self._read(self.values())
        if self._lent is not None and isinstance(self._packed, Landing):
            self._packed.give_back(self._lent)
            self._lent = None
        return rows

    def _read(self, values: NDArray[np.int64]) -> list[StepRow]:
        return self._few(values) if len(values) <= _FEW else self._many(values)

    def _few(self, values: NDArray[np.int64]) -> list[StepRow]:
        first, found = 5 + self.depth, []
        for row in values.tolist():
            sound, length, last, nodes = row[:4]
            kind, count = row[first : first + 2] or (0, 0)
            chain = row[first + 2 : first + 2 + count]
            found.append(StepRow(bool(sound), length, last, nodes, row[4 : 5 + length], chain, kind))
        return found

    def _many(self, values: NDArray[np.int64]) -> list[StepRow]:
        first = 5 + self.depth
        sound, lengths, lasts, nodes = values[:, :4].T.tolist()
        # A row is wide, and most of it is seldom there: only what some row uses becomes Python's numbers.
        longest = max(lengths)
        tokens = values[:, 4 : 5 + longest].tolist()
        if longest:
            tokens = [
                row if length == longest else row[: length + 1]
                for row, length in zip(tokens, lengths, strict=True)
            ]
        none: list[int] = []
        kinds, chains = [0] * len(lengths), [none] * len(lengths)
        if values.shape[1] > first:
            kinds, counts = values[:, first : first + 2].T.tolist()
            if most := max(counts):
                wide = values[:, first + 2 : first + 2 + most].tolist()
                chains = [
                    row if count == most else row[:count] for row, count in zip(wide, counts, strict=True)
                ]
        # As StepRow(...) of each, which takes more than twice as long: it makes a tuple of its own.
        columns = zip(map(bool, sound), lengths, lasts, nodes, tokens, chains, kinds, strict=True)
        return list(map(_as_row, columns))


_FEW = 8
"""Rows that are read one by one: column by column takes longer for them."""

_as_row: Callable[[tuple[Any, ...]], StepRow] = partial(tuple.__new__, StepRow)


@dataclass(frozen=True, slots=True)
class PromptResults:
    """What the host reads of a captured pass over prompts, on its way from the device.

    Args:
        results: of the step's second half that ends it; draws: for each chunk, whether it drew a token.
        lookup: there are proposals.
    """

    results: Results
    draws: list[bool]
    lookup: bool

    @property
    def seconds(self) -> float:
        """What the pass took; on CUDA, on the device. Waits for its end."""
        return self.results.seconds

    def read(self) -> list[Prefilled]:
        """One for each chunk, but for log-probabilities. Waits for the pass."""
        return [self._of(*each) for each in zip(self.results.rows(), self.draws, strict=True)]

    def _of(self, row: StepRow, draws: bool) -> Prefilled:
        if not row.sound:
            return Prefilled(error=NOT_FINITE)
        if not draws:
            return Prefilled()
        return Prefilled(first=row.tokens[0], chain=(row.chain, row.kind) if self.lookup else None)


def device_event() -> torch.cuda.Event:
    """An event that tells the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
