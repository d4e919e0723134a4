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
from engine.medusa.choice_kernels import Costs, beside, predict, survival

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
    cells: int, heads: int, chains: Array, own: Array, sizes: Counts, reach: Array, beyond: float
) -> tuple[Array, Counts, Counts]:
    """What each sequence best fills so many nodes with.

    Args:
        cells: nodes, the root not counted.
        heads: whether their nodes may be among them, 0 or 1.
        chains: [B, D], see `survival`.
        own, sizes, reach, beyond: see `choose_captured`.

    Returns:
        [B] tokens that it then expects, [B] int64 nodes of the heads, [B] int64 of the chain.
    """
    B, D = chains.shape
    tokens, of_heads, of_chain = np.empty(B), np.zeros(B, dtype=np.int64), np.zeros(B, dtype=np.int64)
    most = 0
    if heads:
        while most + 1 < sizes.size and sizes[most + 1] <= cells:
            most += 1
    for b in range(B):
        tokens[b], whole, c = 1.0, 0.0, most
        for length in range(min(cells, D) + 1):
            if length:
                if chains[b, length - 1] <= 0.0:
                    break
                whole += chains[b, length - 1]
            while sizes[c] > cells - length:
                c -= 1
            by_heads, both = 0.0, 0.0
            if sizes[c]:
                for d in range(reach.shape[1]):
                    chance = min(own[b] * reach[c, d], 0.99)
                    by_heads += chance
                    if d < length:
                        both += chance * chains[b, d]
            found = 1.0 + by_heads + (beyond if sizes[c] else 1.0) * (whole - both)
            if found > tokens[b]:
                tokens[b], of_heads[b], of_chain[b] = found, sizes[c], length
    return tokens, of_heads, of_chain


@njit(**_JIT)
def choose_captured(
    costs: Costs,
    odds: Array,
    states: Array,
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
) -> tuple[int, Array, Array, Counts, Counts, Array]:
    """The bucket that is worth most a second, and the trees in it.

    Options come by two for each number of nodes that buckets hold: without drafting by the heads, and with.

    Args:
        costs: of this batch.
        odds, states: see `survival`.
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
        and of the one that was taken, [B] int64 nodes of the heads, [B] int64 of the chain, and [B, D] what
        those are worth beside the heads, see `choice_kernels.beside`; 0 where there are none.
    """
    chains = survival(odds, states)
    B, G = len(chains), costs.grid_nodes.size
    rates, seconds = np.zeros(2 * G), np.zeros(2 * G)
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
        tokens, _, _ = fill(cells, heads, chains, own, sizes, reach, beyond)
        took = max(seconds[option] + costs.outside, costs.host)
        rates[option] = worth(tokens, left, others_wait) / took
        if cells == 0:
            rates[option] *= margin
        if forced < 0 and rates[option] > best:
            choice, best = option, rates[option]
    if forced < 0 and rates[current] > 0.0 and best < hysteresis * rates[current]:
        choice = current
    cells = int(costs.grid_nodes[choice // 2]) - 1
    _, of_heads, of_chain = fill(cells, choice % 2, chains, own, sizes, reach, beyond)
    added = np.zeros(chains.shape)
    for b in range(B):
        if of_chain[b]:
            chances = np.minimum(own[b] * reach[np.searchsorted(sizes, of_heads[b])], 0.99)
            added[b] = beside(chains[b : b + 1], chances)[0]
    return choice, rates, seconds, of_heads, of_chain, added
