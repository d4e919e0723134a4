"""How often drafts have come true: nodes of the heads' tree where they were verified, lookup chains always.

Chains need no verification to be judged: what is emitted anyway shows whether they were right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.medusa.choice_kernels import survival
from engine.medusa.lookup import NUM_KINDS
from engine.medusa.tree import Tree
from engine.types import LookupState

__all__ = ["HeadRecord", "LookupRecord", "considered_sizes"]

Array = NDArray[np.float64]

_HEAD_NODES = (0, 1, 2, 3, 5, 7, 9, 11, 15, 19, 23, 31, 39, 47, 63)
"""Sizes of the heads' branch that are considered."""


def considered_sizes(heads: Tree | None) -> list[int]:
    """Sizes of the heads' branch that are considered, rising from 0, the root not counted."""
    most = heads.size - 1 if heads is not None else 0
    return [*(size for size in _HEAD_NODES if size < most), most]


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

    @property
    def odds(self) -> Array:
        """[kinds, D], see `choice_kernels.survival`."""
        return self._odds

    def states(self, states: Sequence[LookupState]) -> Array:
        """[B, 4], see `choice_kernels.survival`."""
        # A sequence that copies does better than the average, one that invents does worse.
        return np.array([(s.kind, len(s.chain), s.first, s.deeper) for s in states], dtype=np.float64)

    def survival(self, states: Sequence[LookupState]) -> Array:
        """[B, D]: the chance that each sequence's chain is right down to each of its tokens."""
        found: Array = survival(self._odds, self.states(states))
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
        inside = np.arange(len(depths)) < self.sizes[:, None]
        self._levels = [np.flatnonzero(depths == depth) for depth in range(1, depths.max() + 1)]
        at_depth = np.stack([depths == depth for depth in range(1, depths.max() + 1)])
        self._prefix = (inside[:, None, :] & at_depth[None]).astype(float)
        self._reach: Array | None = None

    def reach(self) -> Array:
        """[C, depth]: for each considered size, the chance that some node of each depth is accepted."""
        if self._reach is None:
            share = np.append(1.0, self._hits / self._trials)
            for level in self._levels[1:]:
                share[1 + level] *= share[self._parents[level]]
            self._reach = np.minimum(self._prefix @ share[1:], 0.99)
        return self._reach

    def observe(self, nodes: int, accepted: Sequence[int]) -> None:
        """Count one step's trees, each of the first `nodes` nodes: bit masks of accepted ones, root bit 0."""
        bits = np.array([mask & 0xFFFF_FFFF_FFFF_FFFF for mask in accepted], dtype=np.uint64)
        found = ((bits[:, None] >> np.arange(nodes + 1, dtype=np.uint64)) & np.uint64(1)).astype(float).sum(0)
        trials = found[self._parents[:nodes]]
        decay = self._DECAY**trials
        self._hits[:nodes] = decay * self._hits[:nodes] + found[1:]
        self._trials[:nodes] = decay * self._trials[:nodes] + trials
        self._reach = None
