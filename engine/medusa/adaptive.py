"""Which tree now: the nodes that make the most tokens per second of this batch on this device; where steps
are captured, those that let its requests end soonest.

Three things are known about a step before it runs: what it will take (`step_times`), how often each node
of the heads' tree has been accepted, and how often a lookup chain of this kind came true, in all sequences
and in this one (`records`). Nodes of the heads that are not verified stay unseen, so in at most 1 % of
steps, and of time, a larger tree is tried. And what steps take that nobody chooses stays as it was measured
at the start, rightly or not: so in at most another 1 %, and only where it could matter, a step is tried that
would be best if it took as little as it plausibly may (optimism in the face of uncertainty, as with bandits).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import MAX_TREE_NODES
from engine.medusa.buckets import Buckets
from engine.medusa.choice_captured import choose_captured
from engine.medusa.choice_kernels import Costs, choose, first_of, foreseen, predict, promise
from engine.medusa.records import HeadRecord, LookupRecord
from engine.medusa.step_times import StepTimes
from engine.medusa.tree import Tree, TreeShape
from engine.types import Sequence

__all__ = [
    "AdaptiveTree",
    "Expected",
    "FixedTree",
    "TreeCaps",
]

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

_EXPLORE = 0.01
"""Share of steps, and of decode time, that may go to other trees than the best known one, to learn what their
nodes bring; and as much again to learn what their steps take."""

_SAVED = 50.0
"""Steps whose time may be spent at once on trying another tree: what 5000 steps have earned."""

_NOTHING_TO_TRY, _TOO_DEAR = 100, 10
"""Steps after which it is asked again which step to try for its time."""

_HYSTERESIS = 1.03
"""Another size of the heads' branch has to promise this much more to be taken."""

_ANY_DEPTH = np.array([MAX_TREE_NODES])
_CHAIN_DEPTHS = np.array([1, 2, 3, 4, 7, 8, 15, MAX_TREE_NODES])
"""Bounds on the depth of lookup chains that are tried where one long chain costs something for all: powers of
two, and what fills a captured step of so many nodes."""

_MARGIN = 1.02
"""Speculation has to promise this much more than plain decoding: the best of many estimates is too good."""

_UNKNOWN_BEYOND = 8.0, 8.0
"""Of chains beside heads where nothing was seen: tokens that came true, and tokens expected."""

_FORGET = 0.0001
"""Share of what is known of these that a step without them forgets."""

_NO_REACH = np.zeros((1, 1))
"""Of no heads."""

_FORESEEN = 256.0
"""Tokens of an answer that are reckoned with: a bound of thousands says little of how long it will be."""


class _Taken(NamedTuple):
    """What `choose_captured` gives, and `choose`, where an option is a size of the heads' branch for all."""

    choice: int
    plain: Array
    seconds: Array
    heads: Counts
    counts: Counts
    added: Array


class _Batch(NamedTuple):
    """What is known of the sequences of a step.

    Args:
        context: tokens of the longest.
        states: see `choice_kernels.survival`.
        own: [B], see `HeadRecord.own`.
        left: [B] tokens that each may still emit, see `choice_captured.worth`.
        others_wait: for their slots.
    """

    context: int
    states: Array
    own: Array
    left: Array
    others_wait: bool


class TreeCaps:
    """How many nodes a sequence may use: the request's cap, and the tokens it may still emit.

    Args:
        depths: depth of each node of the heads' branch, in order, the root not counted.
    """

    def __init__(self, depths: SequenceOf[int]) -> None:
        # First node deeper than d; a nested tree may be cut there and nowhere else.
        deepest = max(depths, default=0)
        self._first_deeper = [
            next((i for i, depth in enumerate(depths) if depth > bound), len(depths))
            for bound in range(deepest + 1)
        ]

    def apply(
        self, sequences: SequenceOf[Sequence], head_nodes: SequenceOf[int], lookup_nodes: SequenceOf[int]
    ) -> None:
        """Set each sequence's nodes for this step to these, or to fewer."""
        for sequence, heads, lookup in zip(sequences, head_nodes, lookup_nodes, strict=True):
            # The last token is the draw at the path's end.
            useful = sequence.remaining - sequence.in_flight - 1
            cap = sequence.request.medusa.max_tree_size
            if useful < len(self._first_deeper):
                heads = min(heads, self._first_deeper[useful])
            if lookup:
                lookup = min(lookup, useful, MAX_TREE_NODES - 1 - heads, len(sequence.lookup.chain))
            if cap is not None and heads + lookup > cap - 1:
                lookup = min(lookup, cap - 1 if heads == 0 else (cap - 1) // 3)
                heads = min(heads, cap - 1 - lookup)
            sequence.head_nodes, sequence.lookup_nodes = heads, lookup


class FixedTree:
    """`tree: N`: the same number of nodes each step; a third for the lookup chain where there are heads.

    Args:
        size: nodes with the root.
        heads: the heads' tree; None without heads.
        lookup: most nodes of the lookup chain, 0 without.
        max_step_tokens: bound on sequences times nodes.
        buckets: of captured steps, which trees do not outgrow; None without.
    """

    def __init__(
        self,
        size: int,
        heads: Tree | None,
        lookup: int,
        max_step_tokens: int,
        buckets: Buckets | None = None,
    ) -> None:
        self._size, self._lookup, self._max_step_tokens = size, lookup, max_step_tokens
        self._buckets = buckets
        self._most_heads = heads.size - 1 if heads is not None else 0
        self._caps = TreeCaps([len(path) for path in heads.paths] if heads is not None else [])

    def choose(self, sequences: list[Sequence], _others_wait: bool = False, /) -> None:
        """Set each sequence's nodes."""
        nodes = min(self._size, max(1, self._max_step_tokens // len(sequences))) - 1
        if self._buckets is not None:
            nodes = min(nodes, self._buckets.most_nodes(len(sequences)) - 1)
        lookup = min(self._lookup, nodes // 3 if self._most_heads else nodes)
        heads, batch = min(self._most_heads, nodes - lookup), len(sequences)
        self._caps.apply(sequences, [heads] * batch, [lookup] * batch)


@dataclass(slots=True)
class _Explored:
    """The budget of steps that try another tree, for its nodes or for its time.

    It is not saved up without bound: a load that could not use it must not leave the next one hundreds of
    such steps in a row.

    Args:
        steps: how many there were.
        due: steps that may be taken now, at most one.
        seconds: that they may cost.
        most_s: bound on these, what `_SAVED` steps take.
        turn: counts the tries, so that each candidate comes in its turn.
    """

    steps: int = 0
    due: float = 0.0
    seconds: float = 0.0
    most_s: float = 0.0
    turn: int = 0

    def earn(self, seconds: float) -> None:
        """Of a step that took so long."""
        self.due = min(self.due + _EXPLORE, 1.0)
        self.most_s = _SAVED * seconds
        self.seconds = min(self.seconds + _EXPLORE * seconds, self.most_s)

    def affords(self, extra_s: float) -> bool:
        if extra_s > self.most_s:  # it never will: the next one's turn
            self.turn += 1
        return extra_s <= self.seconds

    def spend(self, extra_s: float, steps: int = 1) -> None:
        self.steps += steps
        self.turn += 1
        self.due -= steps
        self.seconds -= extra_s

    def wait(self, steps: int) -> None:
        """Try nothing for so many steps."""
        self.due -= steps * _EXPLORE


@dataclass(frozen=True, slots=True)
class Expected:
    """What was expected of a step when its trees were chosen.

    Args:
        plain_s: seconds that plain decoding would take.
        draft_s: seconds of drafting.
        beyond: tokens that the lookup adds to the heads' where their chances are multiplied.
        slots: [B] int64, of its sequences; None where nothing is chosen.
    """

    plain_s: float = 0.0
    draft_s: float = 0.0
    beyond: float = 0.0
    slots: Counts | None = None


class AdaptiveTree:
    """`tree: auto`.

    Args:
        times: measured step times.
        heads: the heads' tree; None without heads.
        lookup: the chains' record, its size 0 without lookup.
        max_step_tokens: bound on the rows of a step.
        accepted: see `HeadRecord`.

    Raises:
        ValueError: the step times have other sizes of the heads' branch.
    """

    def __init__(
        self,
        times: StepTimes,
        heads: Tree | None,
        lookup: LookupRecord,
        max_step_tokens: int,
        *,
        accepted: SequenceOf[float] | None = None,
    ) -> None:
        self._times, self._lookup, self._max_step_tokens = times, lookup, max_step_tokens
        self._heads = HeadRecord(heads, accepted) if heads is not None and heads.size > 1 else None
        self._caps = TreeCaps([len(path) for path in heads.paths] if heads is not None else [])
        self._sizes = self._heads.sizes if self._heads is not None else np.zeros(1, dtype=np.int64)
        self._size_list: list[int] = self._sizes.tolist()
        times.check_sizes(len(self._sizes))
        self._current = 0
        self._for_nodes, self._for_times = _Explored(), _Explored()
        # Of a step that is to be tried once more for its time: the batch, and the index of the size.
        self._again = 0, 0
        # Lookup nodes accepted deeper than the heads', and how many that should have been: where the heads
        # are right the chain often is too, which multiplying their chances overlooks.
        self._beyond = _UNKNOWN_BEYOND
        self._batch, self._outside = 0, 0.0
        self._where: tuple[list[int], list[Sequence], Counts] = [], [], np.zeros(0, dtype=np.int64)
        self.expected = Expected()
        """Of the step chosen last."""
        # Compile it now, not under the first request.
        one = _Batch(1, np.zeros((1, 3)), np.ones(1), np.ones(1), False)
        self._search(times.costs(1, 1, max_step_tokens), one)
        if self._heads is not None:
            self._heads.prepare()

    @property
    def explored_steps(self) -> int:
        return self._for_nodes.steps + self._for_times.steps

    def choose(self, sequences: list[Sequence], others_wait: bool = False, /) -> None:
        """Set each sequence's nodes; see `TreeChooser.choose`."""
        self._batch, self._outside = len(sequences), 0.0
        context = max([sequence.num_cached for sequence in sequences])
        states = self._lookup.states([sequence.lookup for sequence in sequences])
        slots = self._seated(sequences)
        own = self._heads.own(slots) if self._heads is not None else np.ones(len(sequences))
        remaining = np.array([s.remaining for s in sequences], dtype=np.float64)
        left = foreseen(remaining, _FORESEEN)
        costs = self._times.costs(len(sequences), context, self._max_step_tokens)
        taken = self._search(costs, _Batch(context, states, own, left, others_wait))
        chains = taken.counts.tolist()
        self._caps.apply(sequences, taken.heads.tolist(), chains)
        # From here on by what the caps have left of it.
        nodes, beyond = max([sequence.head_nodes for sequence in sequences]), 0.0
        if nodes and any(chains):
            with_heads = np.array([s.lookup_nodes if s.head_nodes else 0 for s in sequences])
            beyond = first_of(taken.added, with_heads)
        draft_s = float(costs.drafts[bisect_left(self._size_list, nodes)])
        self.expected = Expected(float(taken.seconds[0]), draft_s, beyond, slots)

    def _seated(self, sequences: list[Sequence]) -> Counts:
        """[B] int64: their slots, which the record knows as theirs. Mostly they are the last step's."""
        where = [sequence.slot for sequence in sequences]
        if where != self._where[0] or sequences != self._where[1]:
            self._where = where, sequences, np.array(where)
            if self._heads is not None:
                self._heads.seat(self._where[2], [sequence.arrival for sequence in sequences])
        return self._where[2]

    def _search(self, costs: Costs, batch: _Batch) -> _Taken:
        """What to take."""
        reach = self._heads.reach() if self._heads is not None else _NO_REACH
        beyond = self._beyond[0] / self._beyond[1]
        known = self._sizes, reach, beyond, _MARGIN, _HYSTERESIS, self._current
        count, odds = len(batch.states), self._lookup.odds

        def take(costs: Costs, forced: int = -1) -> _Taken:
            if self._times.captured:
                _, states, *aim = batch
                return _Taken(*choose_captured(costs, odds, states, *aim, *known, forced))
            bounds = _CHAIN_DEPTHS if count > 1 and self._times.widens(count, batch.context) else _ANY_DEPTH
            choice, plain, seconds, *rest = choose(costs, odds, batch.states, *known, forced, bounds)
            return _Taken(choice, plain, seconds, np.full(count, self._sizes[choice]), *rest)

        usual = take(costs)
        self._current = usual.choice
        taken = self._try_for_times(usual, take, costs, batch.context)
        return taken if taken is not usual else self._try_for_nodes(usual, take, costs)

    def promised(self, batch: int, context: int) -> dict[int, float]:
        """Tokens per second that each size of the heads' tree, root counted, promises now, without lookup.

        Args:
            batch: sequences.
            context: tokens of the longest.
        """
        costs = self._times.costs(batch, context, self._max_step_tokens)
        reach = self._heads.reach() if self._heads is not None else _NO_REACH
        rates = promise(costs, batch, self._sizes, reach)
        return dict(zip((1 + self._sizes).tolist(), rates.tolist(), strict=True))

    def observe(
        self,
        shapes: list[TreeShape],
        accepted: list[int],
        seconds: float,
        *,
        context: int,
        expected: Expected,
        host_s: float = 0.0,
    ) -> None:
        """Learn from a step.

        Args:
            shapes: of its trees.
            accepted: for each, the bit mask of nodes accepted with all their ancestors.
            seconds: what the step took.
            context: tokens of its longest sequence.
            expected: `self.expected` when it was chosen.
            host_s: what the host took while the device computed it; 0 where that is not known.
        """
        batch, alike = len(shapes), Counter(shapes)  # mostly many are
        rows = sum([count * (1 + heads + chain) for (heads, chain), count in alike.items()])
        largest = max([1 + heads + chain for heads, chain in alike])
        computed, cells = self._times.rows(batch, rows, largest), batch * largest - rows
        self._times.observe(batch, context, computed, seconds, expected.draft_s, cells)
        if host_s:
            self._times.observe_host(batch, host_s)
        self._for_nodes.earn(seconds)
        self._for_times.earn(seconds)
        if self._heads is None:
            return
        if expected.beyond == 0.0:  # nothing is learned: forget, or no chain beside heads is ever tried again
            came, promised = self._beyond
            self._beyond = (
                came + _FORGET * (_UNKNOWN_BEYOND[0] - came),
                promised + _FORGET * (_UNKNOWN_BEYOND[1] - promised),
            )
        else:
            self._count_beyond(shapes, accepted, expected.beyond)
        if expected.slots is None or len(expected.slots) != batch:
            return  # one was preempted behind the choice: the others have moved up
        if max(alike).head_nodes == 0:
            self._heads.unseen(expected.slots)
        else:
            nodes = np.array([heads for heads, _ in shapes])
            self._heads.observe(nodes, accepted, expected.slots)

    def observe_outside(self, seconds: float, *, last: bool) -> None:
        """Add to what the step chosen last takes besides; with the `last` part of it, learn the sum."""
        self._outside += seconds
        if last:
            self._times.observe_outside(self._batch, self._outside)

    def _count_beyond(self, shapes: list[TreeShape], accepted: list[int], predicted: float) -> None:
        """How much deeper the chains went than the heads, against what was expected of them."""
        assert self._heads is not None
        beyond = 0
        for shape, mask in zip(shapes, accepted, strict=True):
            bits = mask & 0xFFFF_FFFF_FFFF_FFFF
            if not shape.head_nodes or not (in_chain := bits >> 1 + shape.head_nodes):
                continue
            chain, by_heads = in_chain.bit_count(), 0
            heads = (bits & (1 << 1 + shape.head_nodes) - 1) >> 1
            while heads:
                by_heads = max(by_heads, self._heads.depths[(heads & -heads).bit_length() - 1])
                heads &= heads - 1
            beyond += max(0, chain - by_heads)
        came, promised = self._beyond
        self._beyond = 0.98 * came + beyond, 0.98 * promised + predicted

    def _try_for_times(
        self, usual: _Taken, take: Callable[..., _Taken], costs: Costs, context: int
    ) -> _Taken:
        """What is usual, or now and then what would be if other steps took as little as they plausibly may.

        Tried once, it may still not be believed; so a step that is no better than it seems is soon let alone,
        and one that is gets chosen.

        Args:
            take: the choice at given costs.
        """
        budget, batch = self._for_times, len(usual.counts)
        again, self._again = self._again, (0, 0)
        if batch == again[0]:
            return take(self._hoped(usual, costs, context), again[1])
        if budget.due < 1.0 - 1e-9:
            return usual
        hopeful = take(self._hoped(usual, costs, context))
        if self._rows(hopeful) == self._rows(usual):
            budget.wait(_NOTHING_TO_TRY)
            return usual
        # Where a step takes longer after one of another size, the second says what the first does not.
        in_a_row = 1 if self._times.captured else 2
        lost_s = in_a_row * self._lost(costs, hopeful, usual)
        if not budget.affords(lost_s):
            budget.wait(_TOO_DEAR)
            return usual
        budget.spend(lost_s, in_a_row)
        if in_a_row > 1:
            self._again = batch, hopeful.choice
        return hopeful

    def _try_for_nodes(self, usual: _Taken, take: Callable[..., _Taken], costs: Costs) -> _Taken:
        """What is usual, or now and then another size that the budget affords."""
        budget, choice = self._for_nodes, usual.choice
        if budget.due < 1.0 - 1e-9:
            return usual
        fits = np.flatnonzero(usual.plain > 0)
        if self._times.captured:
            fits = fits[fits % 2 == 1]  # in which the heads draft
        larger, smaller = fits[fits > choice], fits[fits < choice]
        # In turn the next size, the largest and the size before: whether to grow, all nodes, and what the
        # first ones bring alone.
        targets = [*larger[:1], *larger[-1:], *smaller[-1:]]
        if not targets:
            return usual
        target = int(targets[budget.turn % len(targets)])
        took = np.maximum(usual.seconds, costs.host)
        extra = abs(float(took[target] - took[choice]))
        if not budget.affords(extra):
            return usual
        budget.spend(extra)
        return take(costs, target)

    def _hoped(self, usual: _Taken, costs: Costs, context: int) -> Costs:
        """The costs if every other step takes as little beside the usual one as it plausibly may."""
        return self._times.optimistic(costs, len(usual.counts), context, self._rows(usual))

    def _rows(self, taken: _Taken) -> float:
        """Rows that are computed."""
        nodes = 1 + taken.heads + taken.counts
        return self._times.rows(len(nodes), int(nodes.sum()), int(nodes.max()))

    def _lost(self, costs: Costs, tried: _Taken, usual: _Taken) -> float:
        """Seconds expected of a step to try, less those in which the usual one makes as many tokens."""
        seconds, tokens = [], []
        for taken in (tried, usual):
            sizes = np.searchsorted(self._sizes, taken.heads)
            heads = float(self._heads.reach()[sizes].sum()) if self._heads is not None else 0.0
            lookup = sum(row[:count].sum() for row, count in zip(taken.added, taken.counts, strict=True))
            tokens.append(len(taken.counts) + heads + lookup)
            body = predict(costs.rows, costs.seconds, self._rows(taken))
            seconds.append(max(body + costs.drafts[sizes.max()] + costs.outside, costs.host))
        return max(0.0, float(seconds[0] - tokens[0] / tokens[1] * seconds[1]))
