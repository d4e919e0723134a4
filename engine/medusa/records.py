"""How often drafts have come true: nodes of the heads' tree where they were verified, lookup chains always.

Chains need no verification to be judged: what is emitted anyway shows whether they were right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.medusa.lookup import FORCED, MOST_MATCHED, NUM_KINDS
from engine.medusa.record_kernels import count_accepted, judge_chains, reach
from engine.medusa.seats import Seated
from engine.medusa.tree import Tree

__all__ = ["HeadRecord", "LookupRecord", "considered_sizes"]

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

_HEAD_NODES = (0, 1, 2, 3, 5, 7, 9, 11, 15, 19, 23, 31, 39, 47, 63)
"""Sizes of the heads' branch that are considered."""

_USUAL = (0, 1, 2, 3, 5, 8), (0.02, 0.2, 0.45, 0.6, 0.75, 0.9)
"""Tokens matched, and how often the next one then came true in SmolLM2-135M's answers to MT-bench."""

_LONGEST = MOST_MATCHED, 2 * MOST_MATCHED, FORCED
"""Kinds that grow no longer: matches in the history and in the prediction, and what a grammar forces."""


def considered_sizes(heads: Tree | None) -> list[int]:
    """Sizes of the heads' branch that are considered, rising from 0, the root not counted."""
    most = heads.size - 1 if heads is not None else 0
    return [*(size for size in _HEAD_NODES if size < most), most]


class LookupRecord:
    """How often the token that a lookup chain proposes next comes true, by kind of match.

    Each token of a chain that comes true makes the match one longer, so deeper tokens are as likely as the
    next one of a longer match. What is counted is what is decided on: the chain of every step, verified or
    not. (Following a few chains to their ends would count the beginnings and the ends of what repeats more
    seldom than its middle, and promise too much.)

    What a sequence does better or worse than the average is a shift of the log-odds, learned online (logistic
    regression with one weight), slowly: nodes go where the most is promised, so every error of the shifts
    that promises too much is acted upon.

    Args:
        size: D, most tokens of a chain.
    """

    _DECAY = 0.998
    _OWN_RATE = 0.1

    def __init__(self, size: int) -> None:
        self.size = size
        kinds = np.arange(NUM_KINDS)
        longest = np.array(_LONGEST)[np.searchsorted(_LONGEST, kinds)]
        self.grown: Counts = np.minimum(kinds[:, None] + np.arange(size), longest[:, None])
        """[kinds, D], what kind a chain is of after so many tokens that came true."""
        matched = np.where(kinds > MOST_MATCHED, kinds - MOST_MATCHED, kinds)
        share = np.interp(matched, *_USUAL)
        self._trials = np.full(NUM_KINDS, 4.0)
        self._hits = 4.0 * share
        self.odds: Array = np.log(share / (1.0 - share))
        """[kinds], log-odds of the next token."""

    def observe(self, seated: Seated, slots: Counts, values: Counts, depth: int) -> None:
        """Learn from a step.

        Args:
            slots: [B] int64, of its sequences. Their chains become those that it proposed.
            values: [B, K] int64, its results; depth: of its trees, see `Results`.
        """
        known = self._hits, self._trials, self.odds, seated
        judge_chains(*known, slots, values, depth, self._DECAY, self._OWN_RATE)


class HeadRecord:
    """How often each node of the heads' tree was accepted where its parent was and it was verified itself.

    So nodes that nobody verifies gain from what is learned of those above them. And heads of which nothing
    is known are thought to be better than most: what is not true of that shows in a few steps, since what is
    promising is verified; that a node is better than thought would show only where it is tried.

    Args:
        tree: the heads' tree.
        accepted: how often each of its nodes came true when the heads were calibrated; None: nobody knows.
    """

    _DECAY = 0.997
    _CALIBRATED_TRIALS = 64.0
    """What a calibration counts as: it saw thousands of positions, but of other text than is served."""
    _HOPED_TRIALS = 2.0
    """What hope counts as."""
    _OWN_DECAY = 0.99
    """Of what is known of a sequence, a step later: a text changes, too."""

    def __init__(self, tree: Tree, accepted: Sequence[float] | None = None) -> None:
        self.depths = [len(path) for path in tree.paths]
        self._parents = np.array(tree.parents[1:])  # the root is 0, node i is at i - 1 of all the rest
        depths, last = np.array(self.depths), np.array([path[-1] + 1.0 for path in tree.paths])
        share = 0.8 * 0.95 ** (depths - 1) / last**2
        if accepted is not None:
            found = np.array([1.0, *accepted])
            share = np.minimum(found[1:] / np.maximum(found[self._parents], 1e-3), 1.0)
        self._trials = np.full(
            len(depths), self._HOPED_TRIALS if accepted is None else self._CALIBRATED_TRIALS
        )
        self._hits = self._trials * share
        self.sizes = np.array(considered_sizes(tree))
        self._depths = depths
        self._reach = np.zeros((len(self.sizes), depths.max()))
        reach(*self._known())

    def reach(self) -> Array:
        """[C, depth]: for each considered size, the chance that some node of each depth is accepted. It
        changes with each step that is observed."""
        return self._reach

    def observe(self, seated: Seated, slots: Counts, nodes: Counts, values: Counts) -> int:
        """Learn from a step. Where none of its trees has nodes of the heads, what is known of its sequences
        grows old.

        Args:
            slots: [B] int64, of its sequences.
            nodes: [B, 2] int64, of the heads and of a lookup chain in each tree.
            values: [B, K] int64, its results, see `Results`.

        Returns:
            By how many tokens chains beside heads went deeper than these.
        """
        rates = self._DECAY, self._OWN_DECAY
        return int(count_accepted(*self._known(), seated, slots, nodes, values, *rates))

    def _known(self) -> tuple[Array, Array, Counts, Counts, Counts, Array]:
        return self._hits, self._trials, self._parents, self._depths, self.sizes, self._reach
