"""The choice of a step's trees from what is known, compiled: one call for all that is reckoned before a step.

B sequences, chains of up to D nodes, C sizes of the heads' branch, of which the first is none. Everything is
float64 unless said otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.config import MAX_TREE_NODES
from engine.cpu_team import JIT
from engine.medusa.choice_captured import choose_captured
from engine.medusa.choice_kernels import Costs, choose, computed, foreseen, shares, survival
from engine.medusa.seats import Seated

__all__ = ["Taken", "capped", "captured_trees", "trees"]

_JIT: dict[str, Any] = {**JIT, "nogil": False}

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


class Taken(NamedTuple):
    """What a step is to be, and what is expected of it.

    Args:
        choice: the option: a size of the heads' branch, or what `choose_captured` says.
        rates, seconds: of each option: what it is worth a second, 0 where there is none, and its seconds.
        nodes: [B, 2] int64, of the heads and of the lookup chain in each tree.
        tokens: expected of all.
        rows: that are computed.
        cells: of the grid, that hold no node.
        draft_s: seconds of drafting among them.
        beyond: tokens that chains beside heads add to these, chances multiplied.
    """

    choice: int
    rates: Array
    seconds: Array
    nodes: Counts
    tokens: float
    rows: float
    cells: int
    draft_s: float
    beyond: float


@njit(**_JIT)
def capped(
    first_deeper: Counts, useful: int, cap: int, chain: int, heads: int, lookup: int
) -> tuple[int, int]:
    """Nodes of the heads and of the chain, or the fewer that a sequence may have and has use for.

    Args:
        first_deeper: [depths] int64, how many of the heads' nodes come before the first that is deeper.
        useful: tokens that it may still emit. The last is the draw at the path's end.
        cap: most nodes, root counted.
        chain: tokens of its chain.
    """
    useful -= 1
    if useful < first_deeper.size:
        heads = min(heads, first_deeper[useful])
    if lookup:
        lookup = min(lookup, useful, MAX_TREE_NODES - 1 - heads, chain)
    if heads + lookup > cap - 1:
        lookup = min(lookup, cap - 1 if heads == 0 else (cap - 1) // 3)
        heads = min(heads, cap - 1 - lookup)
    return heads, lookup


@njit(**_JIT)
def _taken(
    costs: Costs,
    seated: Seated,
    slots: Counts,
    useful: Counts,
    chains: Array,
    own: Array,
    first_deeper: Counts,
    sizes: Counts,
    reach: Array,
    choice: int,
    rates: Array,
    seconds: Array,
    nodes: Counts,
) -> Taken:
    """`nodes`, cut to what each sequence may have, and what is expected of them."""
    B, depth = len(slots), reach.shape[1]
    tokens, beyond, total, largest, most = float(B), 0.0, 0, 0, 0
    for b in range(B):
        s = slots[b]
        heads, chain = capped(
            first_deeper, useful[b], seated.caps[s], seated.lengths[s], nodes[b, 0], nodes[b, 1]
        )
        nodes[b, 0], nodes[b, 1] = heads, chain
        total, largest, most = total + 1 + heads + chain, max(largest, 1 + heads + chain), max(most, heads)
        c = np.searchsorted(sizes, heads, side="right") - 1
        added, least = 0.0, 1.0
        for d in range(max(depth, chain)):
            chance = min(own[b] * reach[c, d], 0.99) if heads and d < depth else 0.0
            tokens += chance
            if d < chain:  # see `beside`
                least = min(least, chains[b, d] * (1.0 - chance))
                added += least
        tokens += added
        beyond += added if heads else 0.0
    rows, draft_s = computed(costs, float(total), float(largest)), costs.drafts[np.searchsorted(sizes, most)]
    return Taken(choice, rates, seconds, nodes, tokens, rows, B * largest - total, draft_s, beyond)


@njit(**_JIT)
def captured_trees(
    costs: Costs,
    seated: Seated,
    slots: Counts,
    useful: Counts,
    odds: Array,
    grown: Counts,
    first_deeper: Counts,
    sizes: Counts,
    reach: Array,
    beyond: float,
    margin: float,
    hysteresis: float,
    current: int,
    forced: int,
    remaining: Counts,
    others_wait: bool,
) -> Taken:
    """The trees of a captured step.

    Args:
        costs: of this batch.
        slots: [B] int64; useful: [B] int64 tokens that each may still emit behind what is under way.
        odds, grown: see `survival`.
        first_deeper: see `capped`.
        sizes, reach, beyond, margin, hysteresis, current, forced, others_wait: see `choose_captured`.
        remaining: [B] int64 tokens that each may still emit. (What a step under way may emit at most is not
            what it will: a sequence with a large tree in it is not nearer to its end.)
    """
    chains, own = survival(odds, grown, seated, slots), shares(seated.own, slots)
    found = choose_captured(
        costs,
        chains,
        own,
        foreseen(remaining),
        others_wait,
        sizes,
        reach,
        beyond,
        margin,
        hysteresis,
        current,
        forced,
    )
    return _taken(costs, seated, slots, useful, chains, own, first_deeper, sizes, reach, *found)


@njit(**_JIT)
def trees(
    costs: Costs,
    seated: Seated,
    slots: Counts,
    useful: Counts,
    odds: Array,
    grown: Counts,
    first_deeper: Counts,
    sizes: Counts,
    reach: Array,
    beyond: float,
    margin: float,
    hysteresis: float,
    current: int,
    forced: int,
    bounds: Counts,
) -> Taken:
    """The trees of a step that is not captured.

    Args:
        costs, slots, useful, odds, grown, first_deeper: see `captured_trees`.
        sizes, reach, beyond, margin, hysteresis, current, forced, bounds: see `choose`.
    """
    chains, own, B = survival(odds, grown, seated, slots), np.ones(len(slots)), len(slots)
    choice, rates, seconds, counts = choose(
        costs, chains, sizes, reach, beyond, margin, hysteresis, current, forced, bounds
    )
    nodes = np.empty((B, 2), dtype=np.int64)
    nodes[:, 0], nodes[:, 1] = sizes[choice], counts
    return _taken(
        costs,
        seated,
        slots,
        useful,
        chains,
        own,
        first_deeper,
        sizes,
        reach,
        choice,
        rates,
        seconds,
        nodes,
    )
