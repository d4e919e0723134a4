"""Which sequences run in the next step, and with which K/V blocks. Plain Python: no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.cache.blocks import BlockManager
from engine.types import Sequence, SequenceState

__all__ = ["Chunk", "Plan", "Scheduler"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. end-1 of a sequence to prefill; `last` where these complete it."""

    sequence: Sequence
    start: int
    end: int
    last: bool


@dataclass(slots=True)
class Plan:
    """One step: prefill chunks, each its own pass, then one decode pass over `tree_size` nodes a sequence."""

    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    tree_size: int = 1


class Scheduler:
    """First come, first served, with preemption by recompute when the pool runs dry.

    A sequence holds a slot and blocks from admission to its end. When a running sequence needs a
    block and none is free, the latest arrival gives up all of its own and waits at the head of the
    queue; it keeps its emitted tokens and its drawn root, so its text does not change. The earliest
    arrival is never the victim of another and always fits alone, so something always advances.

    Args:
        blocks: the pool's books.
        max_num_seqs: slots.
        max_step_tokens: bound on prefill tokens a step, and on sequences times nodes.
        tree_size: nodes a sequence, root counted; 1 is plain decoding.
    """

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_step_tokens: int, tree_size: int
    ) -> None:
        self._blocks = blocks
        self._max_step_tokens = max_step_tokens
        self._tree_size = tree_size
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished, aborted or failed sequence out and free what it held."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def plan(self) -> Plan:
        """Choose the next step's work and reserve its blocks."""
        plan = Plan()
        self._plan_decode(plan)
        self._plan_prefill(plan)
        return plan

    def _plan_decode(self, plan: Plan) -> None:
        ready = [sequence for sequence in self.running if sequence.state is SequenceState.DECODE]
        if not ready:
            return
        plan.tree_size = max(1, min(self._tree_size, self._max_step_tokens // len(ready)))
        for sequence in ready:  # admission order: the earliest reserves first
            if sequence.slot < 0:
                continue  # given up for an earlier one a moment ago
            while not self._blocks.grow(sequence.blocks, sequence.num_cached + plan.tree_size):
                victim = max(self.running, key=lambda candidate: candidate.arrival)
                self._preempt(victim)
                if victim is sequence:
                    break
        plan.decode = [sequence for sequence in ready if sequence.slot >= 0]

    def _plan_prefill(self, plan: Plan) -> None:
        budget = self._max_step_tokens
        for sequence in self.running:
            if budget > 0 and sequence.state is SequenceState.PREFILL:
                budget -= self._chunk(plan, sequence, budget)
        while budget > 0 and self.waiting and self._free_slots:
            sequence = self.waiting[0]
            # Blocks for the whole prefill and the first tree, so that admission does not end in preemption.
            if not self._blocks.grow(sequence.blocks, sequence.prefill_target + self._tree_size):
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.state = SequenceState.PREFILL
            self.running.append(sequence)
            budget -= self._chunk(plan, sequence, budget)

    def _chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        start = sequence.num_cached
        end = min(sequence.prefill_target, start + budget)
        plan.prefill.append(Chunk(sequence, start, end, last=end == sequence.prefill_target))
        return end - start

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.state = SequenceState.WAITING
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.num_cached = 0
