"""How often drafts have come true: nodes of the heads' tree where they were verified, lookup chains always.

Chains need no verification to be judged: what is emitted anyway shows whether they were right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from engine.medusa.choice_kernels import count_accepted, reach, shares, survival
from engine.medusa.lookup import FORCED, MOST_MATCHED, NUM_KINDS
from engine.medusa.tree import Tree
from engine.types import LookupState

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
        self._grown = np.minimum(kinds[:, None] + np.arange(max(1, size)), longest[:, None])
        matched = np.where(kinds > MOST_MATCHED, kinds - MOST_MATCHED, kinds)
        share = np.interp(matched, *_USUAL)
        self._trials = [4.0] * NUM_KINDS
        self._hits = [4.0 * chance for chance in share.tolist()]
        self._odds = np.log(share / (1.0 - share)).tolist()

    @property
    def odds(self) -> Array:
        """[kinds, D], see `choice_kernels.survival`."""
        found: Array = np.array(self._odds).take(self._grown)
        return found

    def states(self, states: Sequence[LookupState]) -> Array:
        """[B, 3], see `choice_kernels.survival`."""
        if not any(s.chain for s in states):
            return np.zeros((len(states), 3))
        return np.array([(s.kind, len(s.chain), s.own) for s in states], dtype=np.float64)

    def survival(self, states: Sequence[LookupState]) -> Array:
        """[B, D]: the chance that each sequence's chain is right down to each of its tokens."""
        found: Array = survival(self.odds, self.states(states))
        return found

    def observe(self, state: LookupState, emitted: Iterable[int]) -> None:
        """Hold the chain against what was emitted in its place; call before the next one is set."""
        kind, own, all_odds = state.kind, state.own, self._odds
        for proposed, token in zip(state.chain, emitted, strict=False):
            hit = 1.0 if proposed == token else 0.0
            own += self._OWN_RATE * (hit - 1.0 / (1.0 + exp(-all_odds[kind] - own)))
            # By comparisons: min and max take as long as all the rest, and this runs for most sequences.
            own = 5.0 if own > 5.0 else -5.0 if own < -5.0 else own
            self._hits[kind] = hits = self._DECAY * self._hits[kind] + hit
            self._trials[kind] = trials = self._DECAY * self._trials[kind] + 1.0
            share = hits / trials
            share = 0.995 if share > 0.995 else 0.005 if share < 0.005 else share
            all_odds[kind] = log(share / (1.0 - share))
            if not hit:
                break
            if kind not in _LONGEST:
                kind += 1
        state.own = own

    def propose(self, state: LookupState, chain: list[int], kind: int) -> None:
        """Set the chain of the next step."""
        state.chain, state.kind = chain, kind


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
    _COMMON_TOKENS = 24.0
    """Expected of a sequence's drafts until what came of them weighs as much as what is known of all. (What
    comes has a variance of 1.8 to a token expected, and SmolLM2's answers differ by one of 0.1.)"""
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
        self._reach: Array | None = None
        # Of each slot: tokens of its sequence's drafts that came true, and that should have; and whose it is.
        self._own, self._whose = np.zeros((0, 2)), np.zeros(0, dtype=np.int64)

    def prepare(self) -> None:
        """Compile `observe`, which takes half a second: nothing is learned."""
        nobody = np.zeros(1, dtype=np.int64)
        self.seat(nobody, [-1])
        self.observe(nobody, [1], nobody)

    def reach(self) -> Array:
        """[C, depth]: for each considered size, the chance that some node of each depth is accepted."""
        if self._reach is None:
            self._reach = reach(self._hits, self._trials, self._parents, self._depths, self.sizes)
        return self._reach

    def seat(self, slots: Counts, arrivals: Sequence[int]) -> None:
        """Say whose these slots are; of one that is new, nothing is known.

        Args:
            slots: [B] int64, where each sequence is; arrivals: its number, which no other has.
        """
        if (missing := slots.max() + 1 - len(self._whose)) > 0:
            self._own = np.concatenate((self._own, np.zeros((missing, 2))))
            self._whose = np.concatenate((self._whose, np.full(missing, -1)))
        new = slots[self._whose[slots] != arrivals]
        if new.size:
            self._own[new], self._whose[slots] = 0.0, arrivals

    def own(self, slots: Counts) -> Array:
        """[B]: the share of the common chances that the drafts of these slots' sequences have."""
        found: Array = shares(self._own, slots, self._COMMON_TOKENS)
        return found

    def unseen(self, slots: Counts) -> None:
        """A step went by in which these slots' sequences drafted nothing: what is known of them grows old."""
        self._own[slots] *= self._OWN_DECAY

    def observe(self, nodes: Counts, accepted: Sequence[int], slots: Counts) -> None:
        """Count one step's trees.

        Args:
            nodes: [B] int64, how many each has.
            accepted: for each a bit mask of those that were, root bit 0.
            slots: [B] int64, of the sequences, see `seat`.
        """
        masks = np.array([mask & 0xFFFF_FFFF_FFFF_FFFF for mask in accepted], dtype=np.uint64)
        known = self._hits, self._trials, self._parents, self._depths
        own = self._own, slots, self._OWN_DECAY
        count_accepted(*known, nodes, masks, self._DECAY, *own)
        self._reach = None
