"""Sequences, steps and their results, by hand: what the tests of the tree's choice are made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.medusa.adaptive import AdaptiveTree
from engine.medusa.choice_kernels import survival
from engine.medusa.records import LookupRecord, considered_sizes
from engine.medusa.seats import Seats
from engine.medusa.step_times import StepTimes
from engine.medusa.tree import Tree, TreeShape, default_tree
from engine.types import MedusaParams, Request, Sequence

HEADS = default_tree(4)


def sequence(slot: int = 0, *, cached: int = 50, room: int = 1000, cap: int | None = None) -> Sequence:
    request = Request(f"r{slot}", (0,) * cached, medusa=MedusaParams(max_tree_size=cap))
    made = Sequence(request, 0, 0, [0] * (cached + 1), cached, cached + 1 + room, slot, slot=slot)
    made.num_cached = cached
    return made


def cpu_like(batch: int, rows: int) -> float:
    """Flat up to eight rows, then a second per 70."""
    return 0.03 + 0.001 * batch + max(0, rows - 8) / 70 * 0.07


def step_times(
    true: Callable[[int, int], float], heads: Tree | None = HEADS, drafting: float = 0.004
) -> StepTimes:
    points = {
        b: [(b * n, true(b, b * n)) for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or b * n <= 128]
        for b in (1, 2, 4, 8, 16)
    }
    drafts = {b: [0.0] + [drafting] * (len(considered_sizes(heads)) - 1) for b in points}
    return StepTimes(points, drafts)


Proposed = tuple[list[int], int]
"""A chain and the kind of its match."""


def packed(
    masks: list[int], emitted: list[list[int]] | None = None, chains: list[Proposed] | None = None
) -> tuple[NDArray[np.int64], int]:
    """A step's results as the device packs them, and their depth.

    Args:
        masks: of the nodes accepted, for each sequence.
        emitted: the tokens; None: it does not matter which.
        chains: proposed for the next step; None: there is no lookup.
    """
    if emitted is None and not chains:  # as whole worlds have it, again and again
        lengths = [mask.bit_count() for mask in masks]
        found = np.zeros((len(masks), 5 + max(lengths)), dtype=np.int64)
        found[:, 0], found[:, 1], found[:, 3] = 1, lengths, masks
        return found, max(lengths)
    rows = emitted or [[0] * (1 + mask.bit_count()) for mask in masks]
    depth = max(map(len, rows)) - 1
    most = max(len(chain) for chain, _ in chains) if chains else 0
    found = np.zeros((len(rows), 5 + depth + (2 + most if chains else 0)), dtype=np.int64)
    for i, (mask, row) in enumerate(zip(masks, rows, strict=True)):
        found[i, :4] = 1, len(row) - 1, 0, mask
        found[i, 4 : 4 + len(row)] = row
        if chains:
            chain, kind = chains[i]
            found[i, 5 + depth : 7 + depth + len(chain)] = kind, len(chain), *chain
    return found, depth


def observe(
    chooser: AdaptiveTree,
    sequences: list[Sequence],
    accepted: list[int],
    seconds: float,
    host_s: float = 0.0,
    emitted: list[list[int]] | None = None,
) -> None:
    """The step that was chosen last. What chains come next, the sequences say."""
    proposed = [(made.lookup.chain, made.lookup.kind) for made in sequences]
    chooser.observe(
        sequences,
        [TreeShape(made.head_nodes, made.lookup_nodes) for made in sequences],
        *packed(accepted, emitted, proposed if chooser._lookup.size else None),
        seconds,
        context=max(made.num_cached for made in sequences),
        expected=chooser.expected,
        host_s=host_s,
    )


def propose(chooser: AdaptiveTree, made: Sequence, chain: list[int], kind: int) -> None:
    """For the sequence's next step."""
    made.lookup.chain, made.lookup.kind = chain, kind
    chooser.propose(made)


def chances(record: LookupRecord, seats: Seats) -> NDArray[np.float64]:
    """[slots, D] that each slot's chain is right down to each of its tokens."""
    slots = np.arange(len(seats.known.lengths))
    found: NDArray[np.float64] = survival(record.odds, record.grown, seats.known, slots)
    return found


class Judged:
    """A record of chains, and sequences in the first slots."""

    def __init__(self, size: int, sequences: int = 1) -> None:
        self.record, self.seats = LookupRecord(size), Seats(size)
        self.sequences = [sequence(slot) for slot in range(sequences)]

    def see(self, slot: int, proposed: Proposed, emitted: list[int]) -> None:
        """A chain was proposed, and this came."""
        made = self.sequences[slot]
        made.lookup.chain, made.lookup.kind = proposed
        self.seats.propose(made)
        values, depth = packed([1], [emitted])
        self.record.observe(self.seats.known, np.array([slot]), values, depth)

    def chances(self, proposed: Proposed) -> NDArray[np.float64]:
        """[sequences, D] of each, if this is proposed to it."""
        for made in self.sequences:
            made.lookup.chain, made.lookup.kind = proposed
            self.seats.propose(made)
        return chances(self.record, self.seats)


def adaptive(
    lookup: int = 0, heads: Tree | None = HEADS, step: Callable[[int, int], float] = cpu_like
) -> AdaptiveTree:
    return AdaptiveTree(step_times(step, heads), heads, LookupRecord(lookup), 512)


def chances_of_chains(rng: np.random.Generator, batch: int, longest: int) -> NDArray[np.float64]:
    """[batch, longest], falling; each chain has a token less than that before."""
    found = np.cumprod(rng.uniform(0.1, 0.95, (batch, longest)), axis=1)
    return np.where(np.arange(longest) < longest - np.arange(batch)[:, None], found, 0.0)
