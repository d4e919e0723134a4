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

from collections.abc import Callable, Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import MAX_TREE_NODES
from engine.medusa.buckets import Buckets
from engine.medusa.choice import Taken, capped, captured_trees, trees
from engine.medusa.choice_kernels import Costs, predict, promise
from engine.medusa.records import HeadRecord, LookupRecord
from engine.medusa.seats import Seats
from engine.medusa.step_times import StepTimes
from engine.medusa.tree import SHAPES, Tree, TreeShape
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

_NOBODY = np.zeros(0, dtype=np.int64)

_NO_REACH = np.zeros((1, 1))
"""Of no heads."""


class TreeCaps:
    """How many nodes a sequence may use: the request's cap, and the tokens it may still emit.

    Args:
        depths: depth of each node of the heads' branch, in order, the root not counted.
    """

    def __init__(self, depths: SequenceOf[int]) -> None:
        # First node deeper than d; a nested tree may be cut there and nowhere else.
        deepest = max(depths, default=0)
        self.first_deeper: Counts = np.array(
            [
                next((i for i, depth in enumerate(depths) if depth > bound), len(depths))
                for bound in range(deepest + 1)
            ]
        )
        """[depths] int64, see `capped`."""
        capped(self.first_deeper, 1, 1, 0, 0, 0)  # compile it now, not under the first request

    def apply(self, sequences: SequenceOf[Sequence], heads: int, lookup: int) -> None:
        """Set each sequence's nodes for this step to these, or to fewer."""
        for sequence in sequences:
            most = sequence.request.medusa.max_tree_size
            useful = sequence.remaining - sequence.in_flight
            cap, chain = MAX_TREE_NODES if most is None else most, len(sequence.lookup.chain)
            sequence.head_nodes, sequence.lookup_nodes = capped(
                self.first_deeper, useful, cap, chain, heads, lookup
            )


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
        self._caps.apply(sequences, min(self._most_heads, nodes - lookup), lookup)


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


class Expected(NamedTuple):
    """What was expected of a step when its trees were chosen.

    Args:
        plain_s: seconds that plain decoding would take.
        draft_s: seconds of drafting.
        beyond: tokens that the lookup adds to the heads' where their chances are multiplied.
        rows: that are computed; cells: of the grid, that hold no node.
        slots: [B] int64, of its sequences.
        shapes: of their trees.
        nodes: [B, 2] int64, the same as numbers.
    """

    plain_s: float = 0.0
    draft_s: float = 0.0
    beyond: float = 0.0
    rows: float = 0.0
    cells: int = 0
    slots: Counts = _NOBODY
    shapes: SequenceOf[TreeShape] = ()
    nodes: Counts = _NOBODY


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
        self._reach = self._heads.reach() if self._heads is not None else _NO_REACH
        times.check_sizes(len(self._sizes))
        self._seats = Seats(lookup.size)
        self._current = 0
        self._for_nodes, self._for_times = _Explored(), _Explored()
        # Of a step that is to be tried once more for its time: the batch, and the index of the size.
        self._again = 0, 0
        # Lookup nodes accepted deeper than the heads', and how many that should have been: where the heads
        # are right the chain often is too, which multiplying their chances overlooks.
        self._beyond = _UNKNOWN_BEYOND
        self._batch, self._outside = 0, 0.0
        self.expected = Expected()
        """Of the step chosen last."""
        # Compile it now, not under the first request.
        one = np.zeros(1, dtype=np.int64)
        costs = times.costs(1, 1, max_step_tokens)
        taken = self._search(costs, 1, one, one + 1, one + 1, False)
        _lost(costs, taken, taken)
        self._count(one, np.zeros((1, 2), dtype=np.int64), np.zeros((1, 5), dtype=np.int64), 0)

    @property
    def explored_steps(self) -> int:
        return self._for_nodes.steps + self._for_times.steps

    def choose(self, sequences: list[Sequence], others_wait: bool = False, /) -> None:
        """Set each sequence's nodes; see `TreeChooser.choose`."""
        self._batch, self._outside = len(sequences), 0.0
        context = max([sequence.num_cached for sequence in sequences])
        remaining = np.array([s.max_total - len(s.token_ids) for s in sequences])
        useful = remaining - np.array([s.in_flight for s in sequences])
        slots = self._seats.seat(sequences)
        costs = self._times.costs(len(sequences), context, self._max_step_tokens)
        taken = self._search(costs, context, slots, useful, remaining, others_wait)
        shapes = [SHAPES[heads, chain] for heads, chain in taken.nodes.tolist()]
        for sequence, shape in zip(sequences, shapes, strict=True):
            sequence.head_nodes, sequence.lookup_nodes = shape
        _, _, seconds, nodes, _, rows, cells, draft_s, beyond = taken
        self.expected = Expected(float(seconds[0]), draft_s, beyond, rows, cells, slots, shapes, nodes)

    def propose(self, sequence: Sequence) -> None:
        """Its lookup chain is another than the last step proposed, or it is the first."""
        self._seats.propose(sequence)

    def _search(
        self,
        costs: Costs,
        context: int,
        slots: Counts,
        useful: Counts,
        remaining: Counts,
        others_wait: bool,
    ) -> Taken:
        """What to take.

        Args:
            costs: of the batch.
            context: tokens of the longest sequence.
            slots: [B] int64; useful, remaining: [B] int64, see `captured_trees`.
            others_wait: for slots.
        """
        times, count = self._times, len(slots)
        known = self._seats.known, slots, useful, self._lookup.odds, self._lookup.grown
        beyond = self._beyond[0] / self._beyond[1]
        by = self._caps.first_deeper, self._sizes, self._reach, beyond, _MARGIN, _HYSTERESIS, self._current

        def take(costs: Costs, forced: int = -1) -> Taken:
            found: Taken
            if times.captured:
                found = captured_trees(costs, *known, *by, forced, remaining, others_wait)
            else:
                bounds = _CHAIN_DEPTHS if count > 1 and times.widens(count, context) else _ANY_DEPTH
                found = trees(costs, *known, *by, forced, bounds)
            return found

        usual = take(costs)
        self._current = usual.choice
        taken = self._try_for_times(usual, take, costs, context)
        return taken if taken is not usual else self._try_for_nodes(usual, take, costs)

    def promised(self, batch: int, context: int) -> dict[int, float]:
        """Tokens per second that each size of the heads' tree, root counted, promises now, without lookup.

        Args:
            batch: sequences.
            context: tokens of the longest.
        """
        costs = self._times.costs(batch, context, self._max_step_tokens)
        rates = promise(costs, batch, self._sizes, self._reach)
        return dict(zip((1 + self._sizes).tolist(), rates.tolist(), strict=True))

    def observe(
        self,
        sequences: list[Sequence],
        shapes: list[TreeShape],
        values: Counts,
        depth: int,
        seconds: float,
        *,
        context: int,
        expected: Expected,
        host_s: float = 0.0,
    ) -> None:
        """Learn from a step.

        Args:
            sequences: B of them.
            shapes: of their trees.
            values: [B, K] int64, its results; depth: of its trees, see `Results`.
            seconds: what the step took.
            context: tokens of its longest sequence.
            expected: `self.expected` when it was chosen.
            host_s: what the host took while the device computed it; 0 where that is not known.
        """
        batch, slots, nodes = len(shapes), expected.slots, expected.nodes
        rows, cells = expected.rows, expected.cells
        if shapes != expected.shapes:  # somebody got less, or was preempted, behind the choice
            slots, nodes = self._seats.seat(sequences), np.array(shapes)
            sizes = 1 + nodes.sum(1)
            rows = self._times.rows(batch, int(sizes.sum()), int(sizes.max()))
            cells = int((sizes.max() - sizes).sum())
        self._times.observe(batch, context, rows, seconds, expected.draft_s, cells)
        if host_s:
            self._times.observe_host(batch, host_s)
        self._for_nodes.earn(seconds)
        self._for_times.earn(seconds)
        beyond, (came, promised) = self._count(slots, nodes, values, depth), self._beyond
        if expected.beyond == 0.0:  # nothing is learned: forget, or no chain beside heads is ever tried again
            self._beyond = (
                came + _FORGET * (_UNKNOWN_BEYOND[0] - came),
                promised + _FORGET * (_UNKNOWN_BEYOND[1] - promised),
            )
        else:
            self._beyond = 0.98 * came + beyond, 0.98 * promised + expected.beyond

    def _count(self, slots: Counts, nodes: Counts, values: Counts, depth: int) -> int:
        """Learn what came of the drafts. By how many tokens chains went deeper than heads."""
        seated = self._seats.known
        if self._lookup.size:
            self._lookup.observe(seated, slots, values, depth)
        return self._heads.observe(seated, slots, nodes, values) if self._heads is not None else 0

    def observe_outside(self, seconds: float, *, last: bool) -> None:
        """Add to what the step chosen last takes besides; with the `last` part of it, learn the sum."""
        self._outside += seconds
        if last:
            self._times.observe_outside(self._batch, self._outside)

    def _try_for_times(self, usual: Taken, take: Callable[..., Taken], costs: Costs, context: int) -> Taken:
        """What is usual, or now and then what would be if other steps took as little as they plausibly may.

        Tried once, it may still not be believed; so a step that is no better than it seems is soon let alone,
        and one that is gets chosen.

        Args:
            take: the choice at given costs.
        """
        budget, batch = self._for_times, len(usual.nodes)
        again, self._again = self._again, (0, 0)
        if batch == again[0]:
            return take(self._hoped(usual, costs, context), again[1])
        if budget.due < 1.0 - 1e-9:
            return usual
        hopeful = take(self._hoped(usual, costs, context))
        if hopeful.rows == usual.rows:
            budget.wait(_NOTHING_TO_TRY)
            return usual
        # Where a step takes longer after one of another size, the second says what the first does not.
        in_a_row = 1 if self._times.captured else 2
        lost_s = in_a_row * _lost(costs, hopeful, usual)
        if not budget.affords(lost_s):
            budget.wait(_TOO_DEAR)
            return usual
        budget.spend(lost_s, in_a_row)
        if in_a_row > 1:
            self._again = batch, hopeful.choice
        return hopeful

    def _try_for_nodes(self, usual: Taken, take: Callable[..., Taken], costs: Costs) -> Taken:
        """What is usual, or now and then another size that the budget affords."""
        budget, choice = self._for_nodes, usual.choice
        if budget.due < 1.0 - 1e-9:
            return usual
        fits = np.flatnonzero(usual.rates > 0)
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

    def _hoped(self, usual: Taken, costs: Costs, context: int) -> Costs:
        """The costs if every other step takes as little beside the usual one as it plausibly may."""
        return self._times.optimistic(costs, len(usual.nodes), context, usual.rows)


def _lost(costs: Costs, tried: Taken, usual: Taken) -> float:
    """Seconds expected of a step to try, less those in which the usual one makes as many tokens."""
    by_device = [
        predict(costs.rows, costs.seconds, step.rows) + step.draft_s + costs.outside
        for step in (tried, usual)
    ]
    took, takes = (max(seconds, costs.host) for seconds in by_device)
    return float(max(0.0, took - tried.tokens / usual.tokens * takes))
