"""What is on its way: a decode step, and what requests want to see of it; a pass over prompts, and how long
it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.batch import Batch, Verified
from engine.medusa.adaptive import Expected
from engine.runner import Runner
from engine.scheduler import Chunk
from engine.step_results import PromptResults, Results, StepRow
from engine.types import StepTrace, TokenLogprobs

__all__ = ["Flight", "HostTime", "Pace", "PromptFlight"]


@dataclass(frozen=True, slots=True)
class Flight:
    """A decode step that runs on the device, its results not read.

    Args:
        most: the most tokens each of its sequences may emit.
        expected: what `tree: auto` expected of it.
        grammars_s: seconds between its halves, in which grammars were looked at.
    """

    batch: Batch
    verified: Verified
    results: Results
    most: list[int]
    expected: Expected
    grammars_s: float

    @property
    def lingers(self) -> bool:
        """True while more of it is wanted than its results, which the next step may overwrite, or grammars
        go on behind what it gives."""
        asked = self.batch.asked
        return asked.traces or asked.logprobs or asked.grammars

    def tokens(self) -> list[list[int]]:
        """Of each tree's nodes, where a trace is asked for."""
        return self.verified.draft.tokens.tolist() if self.batch.asked.traces else []

    def shown(
        self, i: int, row: StepRow, tokens: list[list[int]], runner: Runner
    ) -> tuple[list[TokenLogprobs] | None, StepTrace | None]:
        """What sequence i's request asks to see of its share.

        Args:
            row: what the step gave it.
            tokens: see `tokens`.
            runner: which ran it.
        """
        request, shape = self.batch.sequences[i].request, self.batch.shapes[i]
        logprobs, trace, num_top = None, None, request.sampling.logprobs
        if num_top is not None:
            path = _path(runner.parents(shape), row)
            logprobs = runner.logprobs(self.verified, i, path, row.tokens, num_top)
        if request.trace:
            trace = self._trace(i, row, tokens[i][: shape.num_nodes], runner.parents(shape))
        return logprobs, trace

    def _trace(self, i: int, row: StepRow, tokens: list[int], parents: list[int]) -> StepTrace:
        """Sequence i's share, whose nodes are `tokens`."""
        sequence, shape = self.batch.sequences[i], self.batch.shapes[i]
        return StepTrace(
            tokens=tuple(tokens),
            parents=(-1, *parents[1:]),
            sources=tuple(sequence.source(node, shape.head_nodes) for node in range(shape.num_nodes)),
            accepted=tuple(_path(parents, row)),
            next_root=row.tokens[-1],
            batch_size=len(self.batch.sequences),
            duration_s=self.results.seconds,
        )


@dataclass(frozen=True, slots=True)
class PromptFlight:
    """A pass over chunks of prompts that runs on the device, its results not read."""

    chunks: list[Chunk]
    results: PromptResults

    @property
    def tokens(self) -> int:
        return sum([chunk.size for chunk in self.chunks])


@dataclass(slots=True)
class Pace:
    """What passes over prompts take at least, by those that were: no less than a decode step, since either
    reads all weights, and no less a token than the quickest."""

    _step_s: float = math.inf
    _token_s: float = math.inf

    def stepped(self, seconds: float) -> None:
        """A decode step took so long."""
        self._step_s = min(self._step_s, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        self._token_s = min(self._token_s, seconds / tokens)

    def least_s(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens; 0 before anything is known."""
        return max([s for s in (self._step_s, tokens * self._token_s) if s < math.inf], default=0.0)


@dataclass(slots=True)
class HostTime:
    """What the host takes from one decode step's end to when it would wait for the next, which the device
    computes meanwhile.

    Args:
        overlaps: the device does.
        clock: tells the seconds.
    """

    overlaps: bool
    clock: Callable[[], float] = time.perf_counter
    _since: float = 0.0

    def wait(self, results: Results) -> float:
        """Wait for a step. Returns the host's seconds before that, since the step in front of it had ended; 0
        if there was none, or something else came between."""
        found = self.clock() - self._since if self._since else 0.0
        results.wait()
        self._since = self.clock() if self.overlaps else 0.0
        return found

    def forget(self) -> None:
        """What comes before the next wait is more than a step's work, or the device does not overlap it."""
        self._since = 0.0


def _path(parents: list[int], row: StepRow) -> list[int]:
    """The accepted nodes, from the root down."""
    path = [row.last]
    while path[0]:
        path.insert(0, parents[path[0]])
    return path
