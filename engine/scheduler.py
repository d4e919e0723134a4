"""Which sequences run in the next step, and with which K/V blocks. Plain Python: no torch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from engine.cache.blocks import BlockManager
from engine.cache.prefix import PrefixCache, PrivateRoot
from engine.stats import EngineStats
from engine.types import Request, Sequence, SequenceState

__all__ = ["Chunk", "Plan", "Scheduler", "TreeChooser"]

_LEAST_PASS = 0.25
"""Share of `max_prefill_tokens` that has to be left for a decode step to wait for one more pass."""

_MOST_PASSES = 4
"""Over prompts between two decode steps. Short prompts whose answers end with their first token, so that the
batch does not grow, could otherwise come before it by the hundred within `max_prefill_tokens`."""


class TreeChooser(Protocol):
    """Decides how many nodes each sequence of a decode step verifies."""

    def choose(self, sequences: list[Sequence], others_wait: bool, /) -> None:
        """Set `head_nodes` and `lookup_nodes` of every sequence.

        The nodes of all, roots counted, stay within the scheduler's `max_step_tokens`, those of one
        within its `max_tree_nodes`.

        Args:
            others_wait: more of them than there are free slots.
        """


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. end-1 of a sequence to prefill.

    Args:
        first: the sequence begins with this chunk, anew or again after preemption; `start` is above 0
            where the K/V of an equal prefix is reused.
        last: this chunk completes the prefill.
    """

    sequence: Sequence
    start: int
    end: int
    last: bool
    first: bool

    @property
    def size(self) -> int:
        """Tokens of it."""
        return self.end - self.start

    @property
    def draws(self) -> bool:
        """Whether its sequence's first token is drawn behind it; one that was preempted has its root."""
        return self.last and self.sequence.num_output == 0


@dataclass(slots=True)
class Plan:
    """One step: one decode pass over `num_nodes` each, and prefill chunks of different sequences."""

    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class _Chain:
    """How far a sequence's blocks are published.

    Args:
        root: where its chain begins; sequences share blocks within equal roots only.
        before: what the next block stands after.
        blocks: leading blocks that are published, or whose content another sequence has published.
        fresh: not admitted yet.
    """

    root: Hashable
    before: Hashable
    blocks: int = 0
    fresh: bool = True


class Scheduler:
    """First come, first served within a priority, with prefix reuse, and preemption by recompute when the
    pool runs dry.

    A sequence holds a slot and blocks from admission to its end. It begins with the blocks that others
    have published for the same first tokens, and prefills the rest. A choice waits, and others may pass
    it, while another choice of its request still prefills what it can reuse.

    When a running sequence needs a block and none is free or cached, it gives up its tree for this
    step. If that is not enough the last in line (by `Sequence.rank`) gives up all of its blocks and waits,
    keeping its emitted tokens and its drawn root, so its text does not change. The first in line is never
    the victim of another and always fits alone, so something always advances. A priority admits earlier;
    it takes no slot from what runs.

    Args:
        blocks: the pool's books.
        max_num_seqs: slots; no more than `max_step_tokens` are used.
        max_step_tokens: bound on the nodes of a decode step.
        max_prefill_tokens: bound on the tokens of prompts in a step; None: the same.
        chooser: sets the trees; None is plain decoding.
        prefix_caching: reuse across requests; without it only the choices of one request share, and a
            preempted sequence finds what is left of its own.
        max_tree_nodes: most nodes of one sequence, root counted.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        max_prefill_tokens: int | None = None,
        chooser: TreeChooser | None = None,
        prefix_caching: bool = True,
        max_tree_nodes: int = 1,
    ) -> None:
        self._blocks = blocks
        self._cache = PrefixCache(blocks)
        self._max_step_tokens = max_step_tokens
        self._max_prefill_tokens = max_prefill_tokens or max_step_tokens
        self._chooser = chooser
        self._prefix_caching = prefix_caching
        self._max_tree_nodes = max_tree_nodes
        self._free_slots = list(range(min(max_num_seqs, max_step_tokens) - 1, -1, -1))
        self._chains: dict[Sequence, _Chain] = {}
        self._ended: list[Sequence] = []  # taken out while a step that holds them is under way
        self._passed = self._passes = 0  # tokens of prompts since the last decode step was planned, and plans
        self.waiting: deque[Sequence] = deque()  # by rank
        self.running: list[Sequence] = []  # by admission
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        root = self._root(sequence.request)
        self._chains[sequence] = _Chain(root, root)
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished, aborted or failed sequence out and free what it held.

        What a step under way may still write to is freed by `release_ended`.
        """
        if sequence.in_flight:
            self.running.remove(sequence)
            self._ended.append(sequence)
        elif sequence.slot >= 0:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)
        del self._chains[sequence]
        sequence.state = SequenceState.FINISHED

    def release_ended(self) -> None:
        """Free what removed sequences held, as far as no step under way holds them."""
        for sequence in [sequence for sequence in self._ended if not sequence.in_flight]:
            self._ended.remove(sequence)
            self._give_back(sequence)

    def plan(self) -> Plan:
        """Choose the next step's work and reserve its blocks; no step is under way.

        It is either a decode step, to which `add_prompts` adds, or prompts that come before it.

        Raises:
            RuntimeError: the chooser broke its promise.
        """
        plan, ready = Plan(), self._ready()
        if self._prompts_first(plan, ready):
            return plan
        nodes = self._choose(ready)
        for sequence, own in zip(ready, nodes, strict=True):  # as admitted: the earliest reserves first
            if sequence.slot < 0:
                continue  # given up for an earlier one a moment ago
            if self._blocks.grow(sequence.blocks, sequence.num_cached + own):
                continue
            sequence.head_nodes = sequence.lookup_nodes = 0
            while not self._blocks.grow(sequence.blocks, sequence.num_cached + 1):
                victim = max(self.running, key=lambda candidate: candidate.rank)
                self._preempt(victim)
                if victim is sequence:
                    break
        plan.decode = [sequence for sequence in ready if sequence.slot >= 0]
        self._passed = self._passes = 0
        return plan

    def plan_ahead(self) -> Plan | None:
        """`plan` while a step is under way whose outcome is not known.

        Each of its sequences gets blocks as if it emitted the most it can, and waits for the outcome if that
        might end it.

        Returns:
            None where blocks are too few: somebody may have to give some up, which nobody under way can.

        Raises:
            RuntimeError: the chooser broke its promise.
        """
        plan, ready = Plan(), self._ready()
        if self._prompts_first(plan, ready):
            return plan
        if not self._reserve(ready, self._choose(ready)):
            return None
        plan.decode = ready
        self._passed = self._passes = 0
        return plan

    def add_prompts(self, plan: Plan) -> None:
        """Add chunks of prompts to a plan without any.

        Call it when the decode step has been launched and what was under way before has ended: whoever has
        come by then need not wait for another pass.
        """
        self._plan_prefill(plan)
        self._passes += bool(plan.prefill)

    def publish(self, sequence: Sequence) -> None:
        """Let others reuse the blocks that `sequence` has filled with emitted tokens.

        Call after `num_cached` and `token_ids` have grown and before `remove`. Rows below both are never
        written again; behind them lie trees.
        """
        chain, size = self._chains[sequence], self._blocks.block_size
        full = min(sequence.num_cached, len(sequence.token_ids)) // size
        for index in range(chain.blocks, full):
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            chain.before = self._cache.publish(chain.before, tokens, sequence.blocks[index])
            chain.blocks = index + 1

    def forget(self, sequence: Sequence) -> list[int]:
        """Let nobody reuse the blocks of a sequence whose K/V may be unsound.

        Call while it holds them, and do not `publish` it again.

        Returns:
            Blocks that nobody else owns but who has ended, for the caller to zero.
        """
        for block in sequence.blocks:
            self._cache.forget(block)
        ended = Counter(block for other in self._ended if other is not sequence for block in other.blocks)
        return [block for block in sequence.blocks if self._blocks.owners(block) - ended[block] == 1]

    def check(self) -> None:
        """Raises RuntimeError if a block is lost, or owned by other than the running sequences."""
        self._blocks.check()
        self._cache.check()
        holders = (*self.running, *self._ended)
        owners = Counter(block for sequence in holders for block in sequence.blocks)
        if len(owners) != self._blocks.used or any(self._blocks.owners(b) != n for b, n in owners.items()):
            raise RuntimeError(
                f"{self._blocks.used} K/V blocks are owned, {len(owners)} by running sequences"
            )

    def count(self, stats: EngineStats) -> None:
        """Note what runs, waits and is held now."""
        stats.running, stats.waiting = len(self.running), len(self.waiting)
        stats.preemptions = self.preemptions
        stats.prefix_query_tokens, stats.prefix_hit_tokens = self.prefix_query_tokens, self.prefix_hit_tokens
        stats.kv_blocks_free, stats.kv_blocks_cached = self._blocks.free, self._blocks.cached

    def _ready(self) -> list[Sequence]:
        """The sequences to decode, in order of admission."""
        decode = SequenceState.DECODE  # to look it up for each of many takes as long as all the rest
        return [
            sequence
            for sequence in self.running
            if sequence.state is decode
            and sequence.max_total > len(sequence.token_ids) + sequence.in_flight  # some may remain
        ]

    def _prompts_first(self, plan: Plan, ready: list[Sequence]) -> bool:
        """Plan prompts in the place of a decode step of `ready`, where half as many or more wait for theirs.

        A step of few takes as long as one of many. Those who were there first are one step behind for it and
        catch up in the next, which comes as early as it would have; the others are a step ahead. Between two
        decode steps are at most `max_prefill_tokens` of prompts, as without this, in at most `_MOST_PASSES`,
        and who waits keeps the blocks that its next step needs.
        """
        coming, most = min(len(self.waiting), len(self._free_slots)), self._max_prefill_tokens
        if not ready or 2 * coming < len(ready) or self._passes >= _MOST_PASSES:
            return False
        if most - self._passed < most * _LEAST_PASS:
            return False
        if not self._reserve(ready, [1] * len(ready)):
            return False
        self.add_prompts(plan)
        return bool(plan.prefill)

    def _reserve(self, sequences: list[Sequence], nodes: list[int]) -> bool:
        """Blocks for a step of so many nodes each behind the one under way; False where they are too few."""
        size = self._blocks.block_size
        for sequence, own in zip(sequences, nodes, strict=True):
            most = sequence.num_cached + sequence.in_flight + own
            if most > len(sequence.blocks) * size and not self._blocks.grow(sequence.blocks, most):
                return False
        return True

    def _choose(self, ready: list[Sequence]) -> list[int]:
        """Choose their trees; the nodes of each."""
        if self._chooser is None or not ready:
            for sequence in ready:
                sequence.head_nodes = sequence.lookup_nodes = 0
            return [1] * len(ready)
        self._chooser.choose(ready, len(self.waiting) > len(self._free_slots))
        nodes = [1 + sequence.head_nodes + sequence.lookup_nodes for sequence in ready]
        rows, largest = sum(nodes), max(nodes)
        if rows > self._max_step_tokens or largest > self._max_tree_nodes:
            raise RuntimeError(
                f"trees of {rows} nodes in all and {largest} at most exceed the bounds of "
                f"{self._max_step_tokens} and {self._max_tree_nodes}"
            )
        return nodes

    def _plan_prefill(self, plan: Plan) -> None:
        budget, prefill = self._max_prefill_tokens - self._passed, SequenceState.PREFILL
        for sequence in self.running:
            if sequence.state is prefill and budget > 0:
                budget -= self._chunk(plan, sequence, budget, first=False)
        if not self.waiting or not self._free_slots:
            return
        progress: dict[int, int] = {}  # of each request with choices: tokens its furthest one has cached
        for sequence in self.running:
            self._note_progress(progress, sequence)
        passed = 0
        while budget > 0 and self._free_slots and passed < len(self.waiting):
            sequence = self.waiting[passed]
            if self._waits_for_sibling(progress, sequence):
                passed += 1
                continue
            if not self._admit(sequence):
                break
            del self.waiting[passed]
            self._note_progress(progress, sequence)
            budget -= self._chunk(plan, sequence, budget, first=True)

    @staticmethod
    def _note_progress(progress: dict[int, int], sequence: Sequence) -> None:
        if sequence.request.sampling.n > 1:
            key = id(sequence.request)
            progress[key] = max(progress.get(key, 0), sequence.num_cached)

    def _waits_for_sibling(self, progress: dict[int, int], sequence: Sequence) -> bool:
        """True while a running choice of the same request prefills blocks that `sequence` can reuse."""
        furthest = progress.get(id(sequence.request))
        if furthest is None:
            return False
        common = min(sequence.num_prompt // self._blocks.block_size, self._reusable(sequence))
        return furthest < common * self._blocks.block_size

    def _reusable(self, sequence: Sequence) -> int:
        """Most blocks it may begin with: at least one token is computed, for its logits and hidden state."""
        if _wants_prompt_logits(sequence):
            return 0
        return (sequence.prefill_target - 1) // self._blocks.block_size

    def _admit(self, sequence: Sequence) -> bool:
        """Give `sequence` a slot and blocks for its prefill and first tree; False where they are too few.

        Reserving all of them now, admission does not end in preemption.
        """
        chain, limit = self._chains[sequence], self._reusable(sequence)
        blocks, before = self._cache.find(chain.root, sequence.token_ids, limit)
        reused = len(blocks)
        self._blocks.share(blocks)
        # Room for a small tree will do: a larger one gives way before anyone is preempted.
        first_tree = min(self._max_tree_nodes, self._blocks.block_size)
        if not self._blocks.grow(blocks, sequence.prefill_target + first_tree):
            self._blocks.release(blocks)  # now the latest used, and rightly so: they are wanted next
            return False
        sequence.blocks = blocks
        sequence.num_cached = reused * self._blocks.block_size
        sequence.slot = self._free_slots.pop()
        sequence.state = SequenceState.PREFILL
        self.running.append(sequence)
        chain.before, chain.blocks = before, reused
        if chain.fresh:
            chain.fresh = False
            sequence.num_reused = sequence.num_cached
            if not _wants_prompt_logits(sequence):
                self.prefix_query_tokens += sequence.num_prompt
            self.prefix_hit_tokens += sequence.num_reused
        return True

    def _chunk(self, plan: Plan, sequence: Sequence, budget: int, *, first: bool) -> int:
        start = sequence.num_cached
        end = min(sequence.prefill_target, start + budget)
        plan.prefill.append(Chunk(sequence, start, end, last=end == sequence.prefill_target, first=first))
        self._passed += end - start
        return end - start

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.state = SequenceState.WAITING
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        """Into line. Most belong at its end, so that is where the search begins."""
        place = len(self.waiting)
        while place and self.waiting[place - 1].rank > sequence.rank:
            place -= 1
        self.waiting.insert(place, sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.num_cached = 0

    def _root(self, request: Request) -> Hashable:
        return request.cache_salt if self._prefix_caching else PrivateRoot(request)


def _wants_prompt_logits(sequence: Sequence) -> bool:
    """True while a prefill has to give the logits of every prompt token, reused K/V having none."""
    wanted = sequence.request.sampling.prompt_logprobs is not None
    return wanted and sequence.index == 0 and sequence.num_output == 0
