"""The arithmetic behind the choice of the trees of captured steps, compiled.

A captured step takes what its bucket takes, so every node that its bucket holds comes for nothing: each
sequence fills its own with its chain and with nodes of the heads, as promises it the most. What is left to
choose is the bucket, and whether the heads draft. B sequences, chains of up to D nodes, C sizes of the heads'
branch, G numbers of nodes that buckets hold; float64 unless said otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.cpu_team import JIT
from engine.medusa.choice_kernels import Costs, predict

__all__ = ["choose_captured", "fill", "worth"]

_JIT: dict[str, Any] = {**JIT, "nogil": False}

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


@njit(**_JIT)
def worth(tokens: Array, left: Array, others_wait: bool) -> float:
    """What a step that brings each sequence so many tokens is worth, to be divided by its seconds.

    Every sequence has all its tokens before it, the hard ones too, so it is the steps they take that add
    up, not tokens per step: while others wait for slots, the harmonic mean counts. Where nobody waits, what
    each request has of a step is that its own answer ends sooner, and the longer that takes the more it
    counts: the mean is that of the eighth powers of the steps each still takes. It lies between their sum, in
    which one that is slowed for all others hardly counts, and the longest, for which all others stand still.

    Args:
        tokens: [B] of the step; left: [B] of the sequences.
        others_wait: for slots.
    """
    total = 0.0
    for b in range(tokens.size):
        if others_wait:
            total += 1.0 / tokens[b]
        else:
            squared = (left[b] / tokens[b]) ** 2
            total += squared**4
    return tokens.size / total if others_wait else (total / tokens.size) ** -0.125


@njit(**_JIT)
def fill(
    cells: int,
    heads: int,
    chains: Array,
    own: Array,
    sizes: Counts,
    reach: Array,
    beyond: float,
    tokens: Array,
    nodes: Counts,
) -> None:
    """What each sequence best fills so many nodes with.

    Args:
        cells: nodes, the root not counted.
        heads: whether their nodes may be among them, 0 or 1.
        chains: [B, D], see `survival`.
        own, sizes, reach, beyond: see `choose_captured`.
        tokens: [B], where is written how many it then expects.
        nodes: [B, 2] int64, where they are written: of the heads, and of the chain.
    """
    B, D = chains.shape
    depth = reach.shape[1]
    chances, most = np.zeros(depth), 0
    if heads:
        while most + 1 < sizes.size and sizes[most + 1] <= cells:
            most += 1
    for b in range(B):
        tokens[b], nodes[b, 0], nodes[b, 1] = 1.0, 0, 0
        whole, both, by_heads, c, of = 0.0, 0.0, 0.0, most, -1
        for length in range(min(cells, D) + 1):
            if length:
                if chains[b, length - 1] <= 0.0:
                    break
                whole += chains[b, length - 1]
            while sizes[c] > cells - length:
                c -= 1
            if c != of:  # another size of the heads' branch
                of, by_heads, both = c, 0.0, 0.0
                if sizes[c]:
                    for d in range(depth):
                        chances[d] = min(own[b] * reach[c, d], 0.99)
                        by_heads += chances[d]
                        if d < length:
                            both += chances[d] * chains[b, d]
            elif sizes[c] and length <= depth:
                both += chances[length - 1] * chains[b, length - 1]
            found = 1.0 + by_heads + (beyond if sizes[c] else 1.0) * (whole - both)
            if found > tokens[b]:
                tokens[b], nodes[b, 0], nodes[b, 1] = found, sizes[c], length


@njit(**_JIT)
def choose_captured(
    costs: Costs,
    chains: Array,
    own: Array,
    left: Array,
    others_wait: bool,
    sizes: Counts,
    reach: Array,
    beyond: float,
    margin: float,
    hysteresis: float,
    current: int,
    forced: int,
) -> tuple[int, Array, Array, Counts]:
    """The bucket that is worth most a second, and the trees in it.

    Options come by two for each number of nodes that buckets hold: without drafting by the heads, and with.

    Args:
        costs: of this batch.
        chains: [B, D], see `survival`.
        own: [B], the share of the chances in `reach` that each sequence has.
        left: [B], see `worth`.
        others_wait: see `worth`.
        sizes: [C] int64, nodes.
        reach: [C, depth], the chance that some node of each depth is accepted.
        beyond: the share of the gain of chains beyond the heads that is real.
        margin: what speculation has to promise more than plain decoding.
        hysteresis: what another option than the current one has to promise more.
        current: the option that was chosen last.
        forced: the option to take, whatever it promises; -1 for the best.

    Returns:
        The option; [2G] what each is worth a second, 0 where there is none; [2G] its seconds on the device;
        and of the one that was taken, [B, 2] int64 nodes of the heads and of the chain.
    """
    B, G = len(chains), costs.grid_nodes.size
    rates, seconds = np.zeros(2 * G), np.zeros(2 * G)
    tokens, nodes = np.empty(B), np.empty((B, 2), dtype=np.int64)
    choice, best = max(forced, 0), 0.0
    for option in range(2 * G):
        cells, heads = int(costs.grid_nodes[option // 2]) - 1, option % 2
        rows = costs.grid_batch * (cells + 1.0)
        if rows == 0.0 or rows > costs.most_rows or (heads == 1 and (cells == 0 or sizes.size == 1)):
            continue
        draft_s = 0.0
        if heads:
            draft_s = costs.drafts[np.searchsorted(sizes, cells, side="right") - 1]
        seconds[option] = predict(costs.rows, costs.seconds, rows) + draft_s
        fill(cells, heads, chains, own, sizes, reach, beyond, tokens, nodes)
        took = max(seconds[option] + costs.outside, costs.host)
        rates[option] = worth(tokens, left, others_wait) / took
        if cells == 0:
            rates[option] *= margin
        if forced < 0 and rates[option] > best:
            choice, best = option, rates[option]
    if forced < 0 and rates[current] > 0.0 and best < hysteresis * rates[current]:
        choice = current
    cells = int(costs.grid_nodes[choice // 2]) - 1
    fill(cells, choice % 2, chains, own, sizes, reach, beyond, tokens, nodes)
    return choice, rates, seconds, nodes
