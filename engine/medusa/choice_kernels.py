"""The arithmetic behind the choice of the trees of steps that are not captured, compiled.

It runs before every step, when a step has just streamed the weights through the caches: as sixty operators
on small arrays it takes five times as long as when measured by itself, and plain decoding pays for it.
Everything is float64 unless said otherwise. B sequences, chains of up to D nodes, C sizes of the heads'
branch, of which the first is none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.cpu_team import JIT
from engine.medusa.seats import Seated

__all__ = [
    "Costs",
    "beside",
    "choose",
    "computed",
    "foreseen",
    "predict",
    "promise",
    "shares",
    "survival",
]

# They take microseconds; to get the interpreter's lock back may take as long as another thread likes.
_JIT: dict[str, Any] = {**JIT, "nogil": False}

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

_COMMON_TOKENS = 24.0
"""Expected of a sequence's drafts until what came of them weighs as much as what is known of all. (What comes
has a variance of 1.8 to a token expected, and SmolLM2's answers differ by one of 0.1.)"""

_FORESEEN = 256.0
"""Tokens of an answer that are reckoned with: a bound of thousands says little of how long it will be."""


class Costs(NamedTuple):
    """What a step of a given number of sequences costs.

    Args:
        rows: [K] knots, rising.
        seconds: [K] of the forward pass and all that follows, at the knots.
        drafts: [C] seconds of drafting.
        padding: seconds of a cell of the grid that holds no node.
        uneven: seconds more where not all trees are of one size.
        outside: seconds of a step besides all that.
        host: seconds of the host for a step, in which the device computes the one before; steps follow one
            another no sooner. 0 where it waits for each.
        grid_batch: B of the captured steps' bucket; 0 without.
        grid_nodes: [G] N of these buckets, rising.
        most_rows: bound on the rows of a step.
    """

    rows: Array
    seconds: Array
    drafts: Array
    padding: float
    uneven: float
    outside: float
    host: float
    grid_batch: float
    grid_nodes: Array
    most_rows: float


@njit(**_JIT)
def predict(knots: Array, values: Array, rows: float) -> float:
    """Seconds at so many rows: linear between the knots, and beyond them as steep as beside them."""
    last = knots.size - 1
    if rows >= knots[last]:
        slope = (values[last] - values[last - 1]) / (knots[last] - knots[last - 1])
        return values[last] + (rows - knots[last]) * slope
    if rows <= knots[0]:  # a batch smaller than its bucket
        slope = (values[1] - values[0]) / (knots[1] - knots[0])
        return max(values[0] - (knots[0] - rows) * slope, 0.1 * values[0])
    i = 0
    while knots[i + 1] < rows:
        i += 1
    return values[i] + (rows - knots[i]) / (knots[i + 1] - knots[i]) * (values[i + 1] - values[i])


@njit(**_JIT)
def shares(own: Array, slots: Counts) -> Array:
    """[B]: the share of the common chances that the drafts of these slots' sequences have.

    Args:
        own: see `Seated`.
        slots: [B] int64.
    """
    found = np.empty(len(slots))
    for b in range(len(slots)):
        found[b] = (own[slots[b], 0] + _COMMON_TOKENS) / (own[slots[b], 1] + _COMMON_TOKENS)
    return found


@njit(**_JIT)
def foreseen(remaining: Counts) -> Array:
    """[B] tokens that are reckoned with of those that each sequence may still emit."""
    found = np.empty(len(remaining))
    for b in range(len(remaining)):
        found[b] = -_FORESEEN * np.expm1(-remaining[b] / _FORESEEN)
    return found


@njit(**_JIT)
def survival(odds: Array, grown: Counts, seated: Seated, slots: Counts) -> Array:
    """[B, D]: the chance that each sequence's chain is right down to each of its tokens.

    Args:
        odds: [kinds] log-odds of the next token of a chain of each kind.
        grown: [kinds, D] int64, what kind a chain is of after so many tokens.
        slots: [B] int64.
    """
    found = np.zeros((len(slots), grown.shape[1]))
    for b in range(len(slots)):
        kind, shift, chance = seated.kinds[slots[b]], seated.shifts[slots[b]], 1.0
        for d in range(seated.lengths[slots[b]]):
            chance *= min(1.0 / (1.0 + np.exp(-odds[grown[kind, d]] - shift)), 0.99)
            found[b, d] = chance
    return found


@njit(**_JIT)
def beside(chains: Array, reach: Array) -> Array:
    """[B, D]: tokens that each node of a chain adds to the heads', chances multiplied, never rising.

    Args:
        chains: `survival`.
        reach: [depth], the chance that some node of the heads' is accepted at each depth.
    """
    added = np.empty_like(chains)
    for b in range(len(chains)):
        least = 1.0
        for d in range(chains.shape[1]):
            least = min(least, chains[b, d] * (1.0 - reach[d] if d < reach.size else 1.0))
            added[b, d] = least
    return added


@njit(**_JIT)
def _gains(chains: Array, reach: Array, beyond: float, least: float, limit: int) -> tuple[Array, Counts]:
    """Tokens that each further lookup node adds to a size of the heads' branch, the best first.

    Args:
        chains: `survival`.
        reach: see `beside`.
        beyond: what is left of what the chances, multiplied, say.
        least: tokens that a node has to add.
        limit: most nodes.

    Returns:
        [K] gains, falling; [K] the node's sequence * D + its depth - 1. Nodes that add nothing are left out.
    """
    B, D = chains.shape
    added = beside(chains, reach)
    gains, nodes, count = np.empty(B * D), np.empty(B * D, dtype=np.int64), 0
    for b in range(B):
        for d in range(D):
            gain = beyond * added[b, d]
            if gain <= 0.0 or gain < least:
                break
            gains[count], nodes[count] = gain, b * D + d
            count += 1
    order = np.argsort(-gains[:count], kind="mergesort")[:limit]  # stable: no node before its parent
    return gains[order], nodes[order]


@njit(**_JIT)
def computed(costs: Costs, rows: float, largest: float) -> float:
    """Rows that are computed for so many nodes in all, and so many of the largest tree."""
    if costs.grid_nodes.size == 0:
        return rows
    if costs.grid_batch == 0:
        return 1e9
    for nodes in costs.grid_nodes:
        if nodes >= largest:
            return costs.grid_batch * nodes
    return 1e9


@njit(**_JIT)
def _seconds(costs: Costs, batch: int, choice: int, rows: float, largest: float) -> float:
    """Of a step, up to the accepted tokens."""
    seconds = predict(costs.rows, costs.seconds, computed(costs, rows, largest)) + costs.drafts[choice]
    cells = batch * largest - rows  # of the grid that hold no node
    return seconds + (costs.padding * cells + costs.uneven if cells > 0.0 else 0.0)


@njit(**_JIT)
def _rate(costs: Costs, batch: int, choice: int, tokens: float, rows: float, largest: float) -> float:
    """Tokens per second; 0 where a step has more rows than it may."""
    if computed(costs, rows, largest) > costs.most_rows:
        return 0.0
    return tokens / (_seconds(costs, batch, choice, rows, largest) + costs.outside)


@njit(**_JIT)
def _least_slope(costs: Costs) -> float:
    """Seconds that each further row takes at least."""
    least = np.inf
    for i in range(1, costs.rows.size):
        if i > 1 and costs.rows[i - 1] >= costs.most_rows:
            break
        slope = (costs.seconds[i] - costs.seconds[i - 1]) / (costs.rows[i] - costs.rows[i - 1])
        least = min(least, slope)
    return least


@njit(**_JIT)
def _best(
    costs: Costs,
    chains: Array,
    heads: int,
    choice: int,
    reach: Array,
    beyond: float,
    margin: float,
    bounds: Counts,
) -> tuple[float, int, int, Array, Counts]:
    """The best rate; how many of the `_gains` are gone through, and to what depth, to have it; the gains.

    One long chain widens the grid for every sequence, though each of its nodes is a good one. So a few
    bounds on the depth are tried, and within each of them every number of nodes.
    """
    B, D = chains.shape
    first_tokens, first_rows = B * (1.0 + reach.sum()), float(B * (1 + heads))
    best, count, within = _rate(costs, B, choice, first_tokens, first_rows, 1.0 + heads), 0, 0
    left = beyond if heads else 1.0
    least = best * _least_slope(costs)  # a node that adds less makes any rate that is better than this worse
    gains, nodes = _gains(chains, reach, left, least, int(costs.most_rows))
    if heads == 0:
        best *= margin
    for bound in bounds:
        tokens, rows, deepest = first_tokens, first_rows, 0
        for k in range(gains.size):
            depth = nodes[k] % D + 1
            if depth > bound:
                continue
            tokens, rows, deepest = tokens + gains[k], rows + 1.0, max(deepest, depth)
            rate = _rate(costs, B, choice, tokens, rows, 1.0 + heads + deepest)
            if rate > best:
                best, count, within = rate, k + 1, bound
        if bound >= D:
            break
    return best, count, within, gains, nodes


@njit(**_JIT)
def _promise(costs: Costs, batch: int, sizes: Counts, reach: Array, margin: float) -> tuple[Array, Array]:
    """[C] tokens per second of each size of the heads' branch without lookup; [C] seconds of its step."""
    plain, seconds = np.empty(sizes.size), np.empty(sizes.size)
    for c in range(sizes.size):
        rows, largest = float(batch * (1 + sizes[c])), 1.0 + sizes[c]
        seconds[c] = _seconds(costs, batch, c, rows, largest)
        plain[c] = _rate(costs, batch, c, batch * (1.0 + reach[c].sum()), rows, largest)
        if sizes[c] == 0:
            plain[c] *= margin
    return plain, seconds


@njit(**_JIT)
def promise(costs: Costs, batch: int, sizes: Counts, reach: Array) -> Array:
    """[C] tokens per second of each size of the heads' branch, see `choose`, without lookup."""
    return _promise(costs, batch, sizes, reach, 1.0)[0]


@njit(**_JIT)
def choose(
    costs: Costs,
    chains: Array,
    sizes: Counts,
    reach: Array,
    beyond: float,
    margin: float,
    hysteresis: float,
    current: int,
    forced: int,
    bounds: Counts,
) -> tuple[int, Array, Array, Counts]:
    """The size of the heads' branch, and the lookup nodes beside it, of the most tokens per second.

    Args:
        costs: of this batch, of steps that are not captured.
        chains: `survival`.
        sizes: [C] int64, nodes.
        reach: [C, depth], the chance that some node of each depth is accepted.
        beyond: the share of the gain of chains beyond the heads that is real.
        margin: what speculation has to promise more than plain decoding.
        hysteresis: what another size than the current one has to promise more.
        current: index of the size that was chosen last.
        forced: index of the size to take, whatever it promises; -1 for the best.
        bounds: [n] int64, rising, on the depth of chains.

    Returns:
        The index of the size; [C] tokens per second and [C] seconds of each without lookup; and of the size
        that was taken, [B] int64 the lookup nodes of each sequence.
    """
    plain, seconds = _promise(costs, len(chains), sizes, reach, margin)
    choice = max(forced, 0)
    found = _best(costs, chains, sizes[choice], choice, reach[choice], beyond, margin, bounds)
    if forced < 0:
        kept, kept_rate = found, found[0] if current == 0 else 0.0
        none, more = found[0], max(beyond - 1.0, 0.0) * chains.sum()
        for c in range(1, sizes.size):
            # Whatever chains are beside them, nodes of the heads bring no more than this, for their drafting
            # at least: where that is less than the best rate without them, no chains can make it more. So
            # useless heads do not cost the time of looking for the best chains beside them.
            hopeless = len(chains) * reach[c].sum() + more <= none * costs.drafts[c]
            if plain[c] > 0.0 and (c == current or not hopeless):
                scored = _best(costs, chains, sizes[c], c, reach[c], beyond, margin, bounds)
                if c == current:
                    kept, kept_rate = scored, scored[0]
                if scored[0] > found[0]:
                    found, choice = scored, c
        if kept_rate > 0.0 and found[0] < hysteresis * kept_rate:
            found, choice = kept, current
    _, count, within, _, nodes = found
    B, D = chains.shape
    taken = np.zeros(B, dtype=np.int64)
    for k in range(count):
        if nodes[k] % D + 1 <= within:
            taken[nodes[k] // D] += 1
    return choice, plain, seconds, taken
