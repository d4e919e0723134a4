"""Which tree now: the nodes that make the most tokens per second of this batch on this device.

Three things are known about a step before it runs: what it will take (measured at start-up, corrected
while serving), how often each node of the heads' tree has been accepted, and how often a lookup chain of
this kind came true, in all sequences and in this one. Chains need no verification to be judged: what is
emitted anyway shows whether they were right. Nodes of the heads that are not verified stay unseen, so in
at most 1 % of steps, and of time, a larger tree is tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.config import MAX_TREE_NODES
from engine.medusa.buckets import Buckets
from engine.medusa.lookup import NUM_KINDS
from engine.medusa.tree import Tree, TreeShape
from engine.types import LookupState, Sequence

__all__ = [
    "AdaptiveTree",
    "Expected",
    "FixedTree",
    "HeadRecord",
    "LookupRecord",
    "StepTimes",
    "TreeCaps",
    "considered_sizes",
]

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

_HEAD_NODES = (0, 1, 2, 3, 5, 7, 9, 11, 15, 19, 23, 31, 39, 47, 63)
"""Sizes of the heads' branch that are considered."""

_EXPLORE = 0.01
"""Share of steps, and of decode time, that may go to trees larger than the best known one."""

_HYSTERESIS = 1.03
"""Another size of the heads' branch has to promise this much more to be taken."""

_CHAIN_DEPTHS = (1, 2, 4, 8)
"""Bounds on the depth of lookup chains that are tried where padding costs."""

_MARGIN = 1.02
"""Speculation has to promise this much more than plain decoding: the best of many estimates is too good."""


def considered_sizes(heads: Tree | None) -> list[int]:
    """Sizes of the heads' branch that are considered, rising from 0, the root not counted."""
    most = heads.size - 1 if heads is not None else 0
    return [*(size for size in _HEAD_NODES if size < most), most]


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

    def apply(self, sequence: Sequence, head_nodes: int, lookup_nodes: int) -> None:
        """Set the sequence's nodes for this step to these, or to fewer."""
        # The last token is the draw at the path's end.
        useful = sequence.remaining - sequence.in_flight - 1
        if useful < len(self._first_deeper):
            head_nodes = min(head_nodes, self._first_deeper[useful])
        room = MAX_TREE_NODES - 1 - head_nodes
        lookup_nodes = min(lookup_nodes, useful, room, len(sequence.lookup.chain))
        cap = sequence.request.medusa.max_tree_size
        if cap is not None and head_nodes + lookup_nodes > cap - 1:
            lookup_nodes = min(lookup_nodes, cap - 1 if head_nodes == 0 else (cap - 1) // 3)
            head_nodes = min(head_nodes, cap - 1 - lookup_nodes)
        sequence.head_nodes, sequence.lookup_nodes = head_nodes, lookup_nodes


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

    def choose(self, sequences: list[Sequence]) -> None:
        """Set each sequence's nodes."""
        nodes = min(self._size, max(1, self._max_step_tokens // len(sequences))) - 1
        if self._buckets is not None:
            nodes = min(nodes, self._buckets.most_nodes(len(sequences)) - 1)
        lookup = min(self._lookup, nodes // 3 if self._most_heads else nodes)
        for sequence in sequences:
            self._caps.apply(sequence, min(self._most_heads, nodes - lookup), lookup)


class LookupRecord:
    """How often lookup chains come true: by kind of match and depth, given that the tokens before did.

    What a sequence does better or worse than the average is a shift of these log-odds, learned online
    (logistic regression with one weight for the first token and one for the others). Each sequence watches
    one chain at a time, verified or not, from its root to its first miss.
    """

    _DECAY = 0.998
    _OWN_RATE = 0.4

    def __init__(self, size: int) -> None:
        self.size = size
        kind = np.arange(NUM_KINDS) % 8
        kind = np.where((np.arange(NUM_KINDS) > 0) & (kind == 0), 8, kind)
        first = np.interp(kind, (0, 1, 2, 3, 6), (0.0, 0.2, 0.4, 0.55, 0.7))
        self._trials = np.full((NUM_KINDS, max(1, size)), 4.0)
        share = np.clip(first[:, None] + 0.15 * (np.arange(max(1, size)) > 0), 0.02, 0.9)
        self._hits, self._odds = self._trials * share, np.log(share / (1.0 - share))

    def survival(self, states: Iterable[LookupState]) -> Array:
        """[B, D]: the chance that each sequence's chain is right down to each of its tokens."""
        rows = list(states)
        kinds = np.array([state.kind for state in rows])
        lengths = np.array([len(state.chain) for state in rows])
        # A sequence that copies does better than the average, one that invents does worse.
        odds = self._odds[kinds]
        odds[:, 0] += [state.first for state in rows]
        odds[:, 1:] += np.array([state.deeper for state in rows])[:, None]
        hazard = np.minimum(1.0 / (1.0 + np.exp(-odds)), 0.99)
        hazard[np.arange(hazard.shape[1]) >= lengths[:, None]] = 0.0
        found: Array = np.cumprod(hazard, axis=1)
        return found

    def observe(self, state: LookupState, emitted: Iterable[int]) -> None:
        """Hold the watched chain against emitted tokens; call before the next chain is set."""
        for token in emitted:
            depth = state.watched_depth
            if depth >= len(state.watched):
                break
            cell = state.watched_kind, depth
            hit = float(state.watched[depth] == token)
            own = state.deeper if depth else state.first
            error = hit - 1.0 / (1.0 + math.exp(-(self._odds[cell] + own)))
            own = min(max(own + self._OWN_RATE * error, -5.0), 5.0)
            if depth:
                state.deeper = own
            else:
                state.first = own
            self._hits[cell] = self._DECAY * self._hits[cell] + hit
            self._trials[cell] = self._DECAY * self._trials[cell] + 1.0
            share = min(max(self._hits[cell] / self._trials[cell], 0.005), 0.995)
            self._odds[cell] = math.log(share / (1.0 - share))
            state.watched_depth += 1
            if not hit:
                state.watched = []
                break

    def propose(self, state: LookupState, chain: list[int], kind: int) -> None:
        """Set the chain of the next step, and watch it if none is being watched."""
        state.chain, state.kind = chain, kind
        if state.watched_depth >= len(state.watched):
            state.watched, state.watched_kind, state.watched_depth = chain, kind, 0


class HeadRecord:
    """How often each node of the heads' tree was accepted where it was verified.

    Args:
        tree: the heads' tree.
        accepted: how often each of its nodes came true when the heads were calibrated; None: a guess.
    """

    _DECAY = 0.997
    _CALIBRATED_TRIALS = 64.0
    """What a calibration counts as: it saw thousands of positions, but of other text than is served."""

    def __init__(self, tree: Tree, accepted: SequenceOf[float] | None = None) -> None:
        depths = np.array([len(path) for path in tree.paths])
        self.depths = [len(path) for path in tree.paths]
        # Before anything is known: 0.5 for the first head's best guess, as `default_tree` has it.
        ranks = [math.prod((rank + 1) ** -1.4 for rank in path) for path in tree.paths]
        prior = np.array(ranks) * 0.5**depths * 0.85 ** (depths * (depths - 1) / 2)
        if accepted is not None:
            prior = np.array(accepted)
        self._trials = np.full(len(depths), 8.0 if accepted is None else self._CALIBRATED_TRIALS)
        self._hits = self._trials * prior
        self.sizes = np.array(considered_sizes(tree))
        inside = np.arange(len(depths)) < self.sizes[:, None]
        at_depth = depths[None, :] == np.arange(1, depths.max() + 1)[:, None]
        self._prefix = (inside[:, None, :] & at_depth[None]).astype(float)

    def reach(self) -> Array:
        """[C, depth]: for each considered size, the chance that some node of each depth is accepted."""
        found: Array = np.minimum(self._prefix @ (self._hits / self._trials), 0.99)
        return found

    def observe(self, nodes: int, accepted: SequenceOf[int]) -> None:
        """Count one step's trees, each of the first `nodes` nodes: bit masks of accepted ones, root bit 0."""
        bits = np.array([mask & 0xFFFF_FFFF_FFFF_FFFF for mask in accepted], dtype=np.uint64)
        columns = np.arange(1, nodes + 1, dtype=np.uint64)
        hits = ((bits[:, None] >> columns) & np.uint64(1)).astype(float).sum(0)
        decay = self._DECAY ** len(accepted)
        self._hits[:nodes] = decay * self._hits[:nodes] + hits
        self._trials[:nodes] = decay * self._trials[:nodes] + len(accepted)


class StepTimes:
    """Seconds of a decode step by batch size, rows (nodes of all its sequences) and longest context.

    Measured points hold for an idle machine and a short context; what serving takes corrects them, by
    context bucket, as a whole and point by point. What a step takes besides (planning it, handing out its
    tokens) is learned while serving: it is the same for any tree, so the larger it is the larger a tree pays.

    Args:
        measured: for each batch bucket, (rows, seconds) points, rows rising.
        draft: for each batch bucket, seconds the heads take for each considered size; empty without.
        padding: for each batch bucket, seconds a cell of the grid takes that holds no node: where trees
            differ in size, attention works on as many nodes for each sequence as the largest tree has.
        context: of the measured sequences, in tokens; padding costs in proportion to it.
        buckets: of captured steps, which take what their bucket takes; None without.
    """

    _RATE = 0.05

    def __init__(
        self,
        measured: dict[int, list[tuple[int, float]]],
        draft: dict[int, list[float]],
        padding: dict[int, float] | None = None,
        context: int = 128,
        buckets: Buckets | None = None,
    ) -> None:
        self._grid = buckets
        self._padding, self._context = padding or {}, context
        self._buckets = sorted(measured)
        measured = {b: _with_a_slope(b, measured) for b in self._buckets}
        self._rows = {b: np.array([row for row, _ in measured[b]], dtype=float) for b in self._buckets}
        self._base = {b: np.log(np.maximum.accumulate([t for _, t in measured[b]])) for b in self._buckets}
        self._draft = {b: np.asarray(draft.get(b, [0.0])) for b in self._buckets}
        self._corrections: dict[tuple[int, int], tuple[float, Array]] = {}
        self._outside: dict[int, float] = {}

    def predict(self, batch: int, context: int, rows: Array) -> Array:
        """Seconds of the forward pass and all that follows, for each number of rows; without drafting."""
        bucket = self._bucket(batch)
        shift, local = self._correction(bucket, context)
        knots, values = self._rows[bucket], np.exp(self._base[bucket] + shift + local)
        values = np.maximum.accumulate(values)
        found: Array = np.interp(rows, knots, values)
        # Beyond the points as steep as beside them; below them lies a batch smaller than its bucket.
        first = (values[1] - values[0]) / (knots[1] - knots[0])
        last = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
        found += np.maximum(0.0, rows - knots[-1]) * last - np.maximum(0.0, knots[0] - rows) * first
        np.maximum(found, 0.1 * values[0], out=found)
        return found

    def rows(self, batch: int, rows: Array, largest: Array) -> Array:
        """Rows that are computed for so many nodes in all, and so many of the largest tree."""
        return rows if self._grid is None else self._grid.rows(batch, largest)

    def padding(self, batch: int, context: int) -> float:
        """Seconds for each cell of the grid that holds no node."""
        return self._padding.get(self._bucket(batch), 0.0) * max(1.0, context / self._context)

    def widens(self, batch: int, context: int) -> bool:
        """Whether one large tree costs something for every sequence of its batch."""
        return self._grid is not None or self.padding(batch, context) > 0.0

    def outside(self, batch: int) -> float:
        """Seconds of a step besides what is timed: drafting, forward pass, and all to the accepted tokens."""
        return self._outside.get(self._bucket(batch), 0.0)

    def draft(self, batch: int) -> Array:
        """[C] seconds of drafting for each considered size of the heads' branch."""
        return self._draft[self._bucket(batch)]

    def observe(self, batch: int, context: int, rows: int, seconds: float, other_s: float) -> None:
        """Learn from a step of `seconds`, of which drafting and padding are thought to be `other_s`."""
        bucket = self._bucket(batch)
        shift, local = self._correction(bucket, context)
        predicted = float(self.predict(batch, context, np.array([rows], dtype=float))[0])
        error = math.log(max(seconds - other_s, 0.1 * seconds) / predicted)
        error = min(max(error, -0.3), 0.3)  # a hiccup of the machine is not the step's time
        knots = self._rows[bucket]
        position = float(np.interp(rows, knots, np.arange(len(knots))))
        weight = np.maximum(0.0, 1.0 - np.abs(np.arange(len(knots)) - position))
        local = 0.999 * local + self._RATE * error * weight
        self._corrections[bucket, _context_bucket(context)] = (shift + self._RATE * error, local)

    def observe_outside(self, batch: int, seconds: float) -> None:
        """Learn what a step of so many sequences took besides."""
        known = self._outside.get(self._bucket(batch), 0.0)
        usual = min(seconds, 2 * known + 0.001)  # a hiccup of the machine is not
        self._outside[self._bucket(batch)] = known + self._RATE * (usual - known)

    def _bucket(self, batch: int) -> int:
        return next((b for b in self._buckets if b >= batch), self._buckets[-1])

    def _correction(self, bucket: int, context: int) -> tuple[float, Array]:
        found = self._corrections.get((bucket, _context_bucket(context)))
        if found is None:  # a new context starts from what the nearest shorter one has learned
            shorter = [c for b, c in self._corrections if b == bucket and c < _context_bucket(context)]
            found = (
                self._corrections[bucket, max(shorter)]
                if shorter
                else (0.0, np.zeros(len(self._rows[bucket])))
            )
        return found


def _with_a_slope(bucket: int, measured: dict[int, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """A bucket's points; of a single one, a second as far up as the next smaller bucket's slope says.

    Where nothing else was measured, twice the rows are thought to take twice as long.
    """
    points = measured[bucket]
    if len(points) > 1:
        return points
    (rows, seconds), slope = points[0], points[0][1] / points[0][0]
    smaller = [measured[b] for b in sorted(measured) if b < bucket and len(measured[b]) > 1]
    if smaller:
        (first, fast), (second, slow) = smaller[-1][-2:]
        slope = max(0.0, (slow - fast) / (second - first))
    return [*points, (2 * rows, seconds + slope * rows)]


def _context_bucket(context: int) -> int:
    """Powers of two: 7 is up to 128 tokens, 8 up to 256, …"""
    return max(7, (context - 1).bit_length())


@dataclass(slots=True)
class _Explored:
    """The budget of steps that try a larger tree."""

    steps: int = 0
    seconds: float = 0.0
    all_steps: int = 0
    all_seconds: float = 0.0
    turn: int = field(default=0)

    def affords(self, extra_s: float) -> bool:
        return (
            self.steps + 1 <= _EXPLORE * self.all_steps
            and self.seconds + extra_s <= _EXPLORE * self.all_seconds
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """What was expected of a step when its trees were chosen.

    Args:
        plain_s: seconds that plain decoding would take.
        draft_s: seconds of drafting.
        beyond: tokens that the lookup adds to the heads'.
    """

    plain_s: float = 0.0
    draft_s: float = 0.0
    beyond: float = 0.0


class AdaptiveTree:
    """`tree: auto`.

    Args:
        times: measured step times.
        heads: the heads' tree; None without heads.
        lookup: the chains' record, its size 0 without lookup.
        max_step_tokens: bound on the rows of a step.
        accepted: see `HeadRecord`.
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
        self._current = 0
        self._explored = _Explored()
        # Lookup nodes accepted deeper than the heads', and how many that should have been: where the heads
        # are right the chain often is too, which multiplying their chances overlooks.
        self._beyond = np.array([8.0, 8.0])
        self._batch, self._outside = 0, 0.0
        self.expected = Expected()
        """Of the step chosen last."""

    @property
    def explored_steps(self) -> int:
        return self._explored.steps

    def choose(self, sequences: list[Sequence]) -> None:
        """Set each sequence's nodes for the most expected tokens per second of this batch."""
        batch = len(sequences)
        self._batch, self._outside = batch, 0.0
        context = max(sequence.num_cached for sequence in sequences)
        reach = self._heads.reach() if self._heads is not None else np.zeros((1, 1))
        gains, owner, depth = self._gains(sequences, reach)
        from_heads = batch * (1.0 + reach.sum(1))
        tokens = from_heads[:, None] + _from_none(gains.cumsum(1))
        sizes, drafts = self._sizes[:, None], self._times.draft(batch)[:, None]
        count = np.arange(gains.shape[1] + 1)
        deepest = _from_none(np.maximum.accumulate(depth, axis=1))
        rows, seconds = self._seconds(batch, context, sizes, drafts, count, deepest)
        rate = self._rate(batch, rows, tokens, seconds)
        rate[0, 0] *= _MARGIN

        best = rate.max(1)
        choice = int(best.argmax())
        if best[choice] < _HYSTERESIS * best[self._current]:
            choice = self._current
        self._current = choice
        choice = self._explore(choice, rate, seconds)
        if batch > 1 and self._times.widens(batch, context):
            chains = self._bounded(batch, context, choice, from_heads[choice], gains[choice], depth[choice])
        else:
            chains = count[:-1] < int(rate[choice].argmax())
        counts = np.bincount(owner[choice, chains], minlength=batch)
        for sequence, count in zip(sequences, counts, strict=True):
            self._caps.apply(sequence, int(self._sizes[choice]), int(count))
        self.expected = Expected(
            plain_s=float(seconds[0, 0]),
            draft_s=float(self._times.draft(batch)[choice]),
            beyond=float(gains[choice, chains].sum()),
        )

    def observe(
        self,
        shapes: list[TreeShape],
        accepted: list[int],
        seconds: float,
        *,
        context: int,
        expected: Expected,
    ) -> None:
        """Learn from a step.

        Args:
            shapes: of its trees.
            accepted: for each, the bit mask of nodes accepted with all their ancestors.
            seconds: what the step took.
            context: tokens of its longest sequence.
            expected: `self.expected` when it was chosen.
        """
        batch = len(shapes)
        rows, largest = sum(s.num_nodes for s in shapes), max(s.num_nodes for s in shapes)
        other_s = expected.draft_s + (batch * largest - rows) * self._times.padding(batch, context)
        computed = self._times.rows(batch, np.array([float(rows)]), np.array([float(largest)]))
        self._times.observe(batch, context, int(computed[0]), seconds, other_s)
        self._explored.all_steps += 1
        self._explored.all_seconds += seconds
        nodes = max(shape.head_nodes for shape in shapes)
        if self._heads is None or nodes == 0:
            return
        self._count_beyond(shapes, accepted, expected.beyond)
        whole = [mask for shape, mask in zip(shapes, accepted, strict=True) if shape.head_nodes == nodes]
        self._heads.observe(nodes, whole)

    def observe_outside(self, seconds: float, *, last: bool) -> None:
        """Add to what the step chosen last takes besides; with the `last` part of it, learn the sum."""
        self._outside += seconds
        if last:
            self._times.observe_outside(self._batch, self._outside)

    def _seconds(
        self,
        batch: int,
        context: int,
        heads: Array | Counts,
        drafts: Array | float,
        chains: Array | Counts,
        deepest: Array | Counts,
    ) -> tuple[Array, Array]:
        """Computed rows and seconds of steps, up to the accepted tokens; arguments are broadcast.

        Args:
            heads: nodes of the heads' branch, of each sequence.
            drafts: seconds they take.
            chains: lookup nodes of all sequences together.
            deepest: of these, those of the longest chain.
        """
        rows: Array = np.asarray(batch * (1.0 + heads) + chains, dtype=np.float64)
        largest: Array = np.asarray(1.0 + heads + deepest, dtype=np.float64)
        padding = self._times.padding(batch, context) * (batch * largest - rows)
        computed = self._times.rows(batch, rows, largest)
        return computed, self._times.predict(batch, context, computed) + drafts + padding

    def _rate(self, batch: int, rows: Array, tokens: Array, seconds: Array) -> Array:
        """Tokens per second; 0 where a step has more rows than it may."""
        whole = seconds + self._times.outside(batch)
        found: Array = np.where(rows <= self._max_step_tokens, tokens / whole, 0.0)
        return found

    def _bounded(
        self,
        batch: int,
        context: int,
        choice: int,
        from_heads: float,
        gains: Array,
        depth: Counts,
    ) -> NDArray[np.bool_]:
        """[K] bool: which of the lookup nodes to take, which come best first.

        One long chain widens the grid for every sequence, though each of its nodes is a good one. So a few
        bounds on the depth are tried, and within each of them every number of nodes.
        """
        bounds = np.array([*(bound for bound in _CHAIN_DEPTHS if bound < depth.max()), depth.max()])
        within = depth <= bounds[:, None]
        tokens = from_heads + _from_none((gains * within).cumsum(1))
        deepest = _from_none(np.maximum.accumulate(depth * within, axis=1))
        heads, draft = self._sizes[choice : choice + 1], float(self._times.draft(batch)[choice])
        rows, seconds = self._seconds(batch, context, heads, draft, _from_none(within.cumsum(1)), deepest)
        rate = self._rate(batch, rows, tokens, seconds)
        if heads[0] == 0:
            rate[:, 0] *= _MARGIN
        bound, count = np.unravel_index(rate.argmax(), rate.shape)
        found: NDArray[np.bool_] = within[bound] & (np.arange(len(depth)) < count)
        return found

    def _gains(self, sequences: list[Sequence], reach: Array) -> tuple[Array, Counts, Counts]:
        """Tokens that each further lookup node adds to each size of the heads' branch, best first.

        Returns:
            [C, K] gains, falling along K; [C, K] the sequence and [C, K] the depth of each.
        """
        survival = self._lookup.survival(sequence.lookup for sequence in sequences)  # [B, D]
        missed = np.ones((len(reach), survival.shape[1]))
        both = min(reach.shape[1], survival.shape[1])
        missed[:, :both] -= reach[:, :both]
        missed[1:] *= self._beyond[0] / self._beyond[1]
        gains = np.minimum.accumulate(missed[:, None, :] * survival[None], axis=2).reshape(len(reach), -1)
        order = np.argsort(-gains, axis=1, kind="stable")[:, : self._max_step_tokens]
        owner, depth = order // survival.shape[1], order % survival.shape[1] + 1
        return np.take_along_axis(gains, order, axis=1), owner, depth

    def _count_beyond(self, shapes: list[TreeShape], accepted: list[int], predicted: float) -> None:
        """How much deeper the chains went than the heads, against what was expected of them."""
        assert self._heads is not None
        beyond = 0
        for shape, mask in zip(shapes, accepted, strict=True):
            bits = mask & 0xFFFF_FFFF_FFFF_FFFF
            first_chain = 1 + shape.head_nodes
            chain = (bits >> first_chain).bit_count()
            by_heads = max(
                (self._heads.depths[i - 1] for i in range(1, first_chain) if bits >> i & 1), default=0
            )
            beyond += max(0, chain - by_heads)
        self._beyond = 0.98 * self._beyond + (beyond, predicted)

    def _explore(self, choice: int, rate: Array, seconds: Array) -> int:
        """The choice, or now and then a larger one that the budget affords."""
        fits = np.flatnonzero(rate[:, 0] > 0)
        larger = fits[fits > choice]
        if not len(larger):
            return choice
        # In turn the next size and the largest: one shows whether to grow, the other all nodes.
        target = int(larger[0] if self._explored.turn % 2 == 0 else larger[-1])
        extra = float(seconds[target, 0] - seconds[choice, 0])
        if not self._explored.affords(extra):
            return choice
        self._explored.steps += 1
        self._explored.seconds += extra
        self._explored.turn += 1
        return target


def _from_none(sums: Array) -> Array:
    """Running sums or maxima along the last axis, preceded by the 0 of nothing taken."""
    found: Array = np.pad(sums, ((0, 0), (1, 0)))
    return found
