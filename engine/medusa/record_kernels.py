"""What a step teaches of drafts, compiled: where lookup chains were right, and which nodes were accepted.

Everything is float64 unless said otherwise. B sequences; the heads' tree has N nodes, the root not counted.
`values` are a step's results as the device packs them, see `Results`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.cpu_team import JIT
from engine.medusa.lookup import FORCED, MOST_MATCHED
from engine.medusa.seats import Seated

__all__ = ["count_accepted", "judge_chains", "reach"]

# They take microseconds; to get the interpreter's lock back may take as long as another thread likes.
_JIT: dict[str, Any] = {**JIT, "nogil": False}

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

_SURE, _MOST_OWN = 0.995, 5.0
"""Nothing is ever certain: bounds on what is known of all chains, and of one sequence's log-odds."""


@njit(**_JIT)
def judge_chains(
    hits: Array,
    trials: Array,
    odds: Array,
    seated: Seated,
    slots: Counts,
    values: Counts,
    depth: int,
    decay: float,
    own_rate: float,
) -> None:
    """Hold each sequence's chain against what was emitted in its place, and note the next one.

    Args:
        hits, trials, odds: [kinds], counted in place: of the next token of chains of each kind.
        slots: [B] int64.
        values: [B, K] int64; depth: of the step's trees.
        decay: what is left of what was known of a kind, a trial later.
        own_rate: of learning what a sequence adds to the log-odds.
    """
    for b in range(len(slots)):
        s = slots[b]
        if values[b, 0] == 0:
            continue
        kind, shift = seated.kinds[s], seated.shifts[s]
        for d in range(min(seated.lengths[s], values[b, 1] + 1)):
            hit = 1.0 if seated.chains[s, d] == values[b, 4 + d] else 0.0
            shift += own_rate * (hit - 1.0 / (1.0 + np.exp(-odds[kind] - shift)))
            shift = min(max(shift, -_MOST_OWN), _MOST_OWN)
            hits[kind], trials[kind] = decay * hits[kind] + hit, decay * trials[kind] + 1.0
            share = min(max(hits[kind] / trials[kind], 1.0 - _SURE), _SURE)
            odds[kind] = np.log(share / (1.0 - share))
            if hit == 0.0:
                break
            if kind != MOST_MATCHED and kind != 2 * MOST_MATCHED and kind != FORCED:  # these grow no longer
                kind += 1
        seated.shifts[s] = shift
        if values.shape[1] > 5 + depth:
            length = min(values[b, 6 + depth], seated.chains.shape[1])
            seated.kinds[s], seated.lengths[s] = values[b, 5 + depth], length
            for d in range(length):
                seated.chains[s, d] = values[b, 7 + depth + d]


@njit(**_JIT)
def reach(hits: Array, trials: Array, parents: Counts, depths: Counts, sizes: Counts, found: Array) -> None:
    """For each size of the heads' branch, the chance that some node of each depth is accepted.

    Args:
        hits, trials: [N] of each node, where its parent was accepted.
        parents: [N] int64; the root is 0, node i is at i - 1 of all of these.
        depths: [N] int64, from 1.
        sizes: [C] int64, nodes.
        found: [C, depth], where they are written.
    """
    chances = np.ones(hits.size + 1)
    found[:] = 0.0
    for i in range(hits.size):
        chances[i + 1] = chances[parents[i]] * (hits[i] / trials[i])
        for c in range(sizes.size):
            if i < sizes[c]:
                found[c, depths[i] - 1] += chances[i + 1]
    for c in range(sizes.size):
        for d in range(found.shape[1]):
            found[c, d] = min(found[c, d], 0.99)


@njit(**_JIT)
def count_accepted(
    hits: Array,
    trials: Array,
    parents: Counts,
    depths: Counts,
    sizes: Counts,
    found: Array,
    seated: Seated,
    slots: Counts,
    nodes: Counts,
    values: Counts,
    decay: float,
    own_decay: float,
) -> int:
    """Count a step's trees in `hits` and `trials` and in what is seated, and see what they `reach` then.

    Args:
        slots: [B] int64, of the trees.
        nodes: [B, 2] int64, how many of the heads' first ones each has, and nodes of a lookup chain.
        values: [B, K] int64; of rows that are not sound nothing is learned.
        decay: what is left of what was known of a node, a trial later.
        own_decay: what is left of what is known of a sequence, a step later.

    Returns:
        By how many tokens chains beside heads went deeper than these.
    """
    most, beyond = 0, 0
    for b in range(len(slots)):
        most = max(most, nodes[b, 0])
        seated.own[slots[b], 0] *= own_decay
        seated.own[slots[b], 1] *= own_decay
    if most == 0:
        return 0
    came, tried, chances, promised = np.zeros(most), np.zeros(most), np.ones(most + 1), np.zeros(most + 1)
    for i in range(most):
        chances[i + 1] = chances[parents[i]] * (hits[i] / trials[i])
        promised[i + 1] = promised[i] + chances[i + 1]
    for b in range(len(slots)):
        if values[b, 0] == 0:
            continue
        heads, chain, deepest, in_chain = nodes[b, 0], nodes[b, 1], 0, 0
        mask = np.uint64(values[b, 3])
        for i in range(heads):
            tried[i] += (mask >> np.uint64(parents[i])) & np.uint64(1)
            if (mask >> np.uint64(i + 1)) & np.uint64(1):
                came[i] += 1.0
                deepest = max(deepest, depths[i])
        seated.own[slots[b], 0] += deepest
        seated.own[slots[b], 1] += promised[heads]
        if heads > 0:
            for i in range(heads + 1, heads + chain + 1):
                if (mask >> np.uint64(i)) & np.uint64(1):
                    in_chain += 1
            beyond += max(0, in_chain - deepest)
    for i in range(most):
        left = decay ** tried[i]
        hits[i], trials[i] = left * hits[i] + came[i], left * trials[i] + tried[i]
    reach(hits, trials, parents, depths, sizes, found)
    return beyond
