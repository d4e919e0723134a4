"""Plain numbers the engine counts while it runs; the server turns them into Prometheus metrics."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

from engine.config import MAX_TREE_NODES

__all__ = ["DRAFT_SOURCES", "PHASES", "EngineStats", "Tally"]

DRAFT_SOURCES = ("head", "lookup", "prediction", "grammar")
"""What can draft a node: the `DraftSource` values but the root's."""

PHASES = ("schedule", "prefill", "decode", "emit")
"""Parts of a step: planning it, each prefill pass, the decode pass up to its results on the host, and
handing those to their sequences."""

_PHASE_SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    2.5,
    10.0,
)

_RATE_SECONDS = 10


@dataclass(slots=True)
class Tally:
    """A histogram: `counts[i]` values were at most `bounds[i]`, above the bound before; the last, above all.

    Args:
        bounds: rising.
        counts: one more than bounds.
        total: the values' sum.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> Tally:
        return cls(bounds, [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class EngineStats:
    """Totals since start-up, written by the engine's thread only; readers may see them mid-step.

    Args:
        prompt_tokens: tokens of the prompts that were prefilled, once a request.
        generation_tokens: tokens emitted to requests.
        num_steps: engine steps.
        step_started: `time.monotonic()` at which the step under way began; 0 between steps.
        step_seconds: how long each of `PHASES` took; one value a pass for prefill, else one a step.
        plain_decode_seconds: what plain decoding would have taken for the tokens that decode steps gave, by
            the measured step times; 0 where nothing is measured (any tree but `auto`).
        device_idle_seconds: in which the device had computed its decode step and the next one had not been
            launched, where steps are launched ahead and follow one another.
        num_drafts: trees verified (one per sequence and step, plain decoding not counted).
        drafted_by_source: tree nodes verified, root not counted, by what had drafted them.
        accepted_at: of these, the accepted ones, by source and then by depth from 1; index 0 is unused.
        acceptance_counts: decode steps of a sequence by acceptance length (root counted, so plain
            decoding is 1); index 0 is unused.
        tree_size: nodes of the largest tree in the last decode step, root counted; 1 is plain decoding.
        head_nodes: nodes of the heads' branch in the last decode step.
        explored_steps: decode steps that tried another tree than the best known one.
        prefix_query_tokens: prompt tokens looked up for reuse.
        prefix_hit_tokens: of these, tokens whose K/V was reused.
        preemptions: sequences put back to waiting for want of K/V blocks.
        running: sequences that hold a slot now.
        waiting: sequences without one.
        kv_blocks_total: blocks in the pool.
        kv_blocks_free: blocks nobody owns.
        kv_blocks_cached: blocks kept only for prefix reuse.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    step_started: float = 0.0
    step_seconds: dict[str, Tally] = field(
        default_factory=lambda: {phase: Tally.of(_PHASE_SECONDS) for phase in PHASES}
    )
    plain_decode_seconds: float = 0.0
    device_idle_seconds: float = 0.0
    num_drafts: int = 0
    drafted_by_source: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DRAFT_SOURCES, 0))
    accepted_at: dict[str, list[int]] = field(
        default_factory=lambda: {source: [0] * MAX_TREE_NODES for source in DRAFT_SOURCES}
    )
    acceptance_counts: list[int] = field(default_factory=lambda: [0] * (MAX_TREE_NODES + 1))
    tree_size: int = 1
    head_nodes: int = 0
    explored_steps: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    _recent: deque[list[int]] = field(default_factory=lambda: deque(maxlen=_RATE_SECONDS + 1))

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted per sequence and decode step; 1.0 for plain decoding, 0.0 before any."""
        steps = sum(self.acceptance_counts)
        return sum(n * c for n, c in enumerate(self.acceptance_counts)) / steps if steps else 0.0

    @property
    def draft_tokens(self) -> int:
        """Tree nodes verified, root not counted."""
        return sum(self.drafted_by_source.values())

    @property
    def accepted_by_source(self) -> dict[str, int]:
        """Tree nodes accepted, root not counted, by what had drafted them."""
        return {source: sum(counts) for source, counts in self.accepted_at.items()}

    @property
    def accepted_tokens(self) -> int:
        """Tree nodes accepted, root not counted."""
        return sum(self.accepted_by_source.values())

    @property
    def kv_usage(self) -> float:
        """Share of the pool that running sequences own; what is kept for reuse can be taken at any time."""
        free = self.kv_blocks_free + self.kv_blocks_cached
        return 1.0 - free / self.kv_blocks_total if self.kv_blocks_total else 0.0

    def decoded(self, seconds: float, host_s: float) -> None:
        """Count a decode step.

        Args:
            seconds: what it took.
            host_s: see `flight.HostTime`; the next step was launched when they had passed.
        """
        self.step_seconds["decode"].observe(seconds)
        self.device_idle_seconds += max(0.0, host_s - seconds)

    def emitted(self, tokens: int) -> None:
        """Count emitted tokens."""
        self.generation_tokens += tokens
        second = int(time.monotonic())
        if self._recent and self._recent[-1][0] == second:
            self._recent[-1][1] += tokens
        else:
            self._recent.append([second, tokens])

    def drafted(self, trees: int, head_nodes: int, paths: list[int]) -> None:
        """Count a step's trees of more than the root, what their branches of the heads hold, and the accepted
        paths in these: `paths[n]` of n nodes."""
        self.num_drafts += trees
        self.drafted_by_source["head"] += head_nodes
        for length, times in enumerate(paths):
            if times:
                self.accepted("head", length, times=times)

    def accepted(self, source: str, count: int, *, above: int = 0, times: int = 1) -> None:
        """Count the accepted nodes of so many equal paths, those at the depths above+1 .. above+count."""
        counts = self.accepted_at[source]
        for depth in range(above + 1, above + count + 1):
            counts[depth] += times

    def tokens_per_second(self) -> float:
        """Tokens emitted per second over the last ten whole seconds."""
        now = int(time.monotonic())
        recent = sum(tokens for second, tokens in list(self._recent) if now - _RATE_SECONDS <= second < now)
        return recent / _RATE_SECONDS

    def step_age(self) -> float:
        """Seconds since the step under way began; 0 between steps."""
        started = self.step_started
        return max(0.0, time.monotonic() - started) if started else 0.0
