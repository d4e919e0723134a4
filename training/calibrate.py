"""Which guesses come true: from ranks on held-out answers to a tree of any size, and the table behind it.

The paper grows its tree from marginal counts: head i's r-th guess is right with probability a[i][r], whatever
the guesses before it (section 2.3.3). They are not independent: where the first guess was right the text is
easy, and the second is right more often. Here a path's chance is counted as such; where a path was seen too
rarely to count, it falls back on the share of head i's r-th guess among positions where the path before it
came true at all, and that on the marginal one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import MAX_TREE_NODES
from engine.errors import ConfigError
from engine.medusa.calibrated import CALIBRATION_FILE, TREE_FILE
from engine.medusa.tree import Tree, greedy_tree
from training.evaluate import NONE, Ranks, visits

__all__ = ["WIDTH", "Calibration", "calibrate", "conditional_table", "marginal_table", "marginal_tree"]

WIDTH = 16
"""Guesses per head that may enter a tree."""

_TRUST = 24.0
"""Positions that the fallback weighs as much as."""

Weights = NDArray[np.float64]
"""[N]: how much each position counts."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A nested tree and how often each of its nodes comes true.

    Args:
        tree: up to 64 nodes, best first.
        accepted: for each node below the root, the chance that it comes true with all its ancestors.
        conditional: [heads][WIDTH], given that some path before it came true.
        marginal: [heads][WIDTH], whatever came before.
        positions: that were counted.
    """

    tree: Tree
    accepted: tuple[float, ...]
    conditional: tuple[tuple[float, ...], ...]
    marginal: tuple[tuple[float, ...], ...]
    positions: int

    def expected_length(self, size: int) -> float:
        """Acceptance length, root counted, of the first `size` nodes, at a position like those counted."""
        return 1.0 + sum(self.accepted[: size - 1])

    def save(self, folder: Path) -> None:
        """Write the tree (a file for `--tree-file`) and the table; beside the heads, `serve` finds both."""
        paths = [list(path) for path in self.tree.paths]
        (folder / TREE_FILE).write_text(json.dumps(paths) + "\n", encoding="utf-8")
        table: dict[str, Any] = {
            "paths": paths,
            "accepted": [round(value, 6) for value in self.accepted],
            "conditional": [[round(value, 6) for value in row] for row in self.conditional],
            "marginal": [[round(value, 6) for value in row] for row in self.marginal],
            "positions": self.positions,
        }
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items())
        (folder / CALIBRATION_FILE).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def calibrate(ranks: Ranks, size: int = MAX_TREE_NODES) -> Calibration:
    """Grow the tree greedily: add the path most likely to come true, repeat.

    Twice: the second time each position counts as often as decoding with the first tree stands there.

    Args:
        ranks: of held-out answers.
        size: nodes, root counted; fewer where the heads offer fewer.

    Raises:
        ConfigError: no positions.
    """
    if len(ranks) == 0:
        raise ConfigError("there are no held-out answers to calibrate on; distill more, or raise --held-out")
    everywhere = _grow(ranks, np.ones(len(ranks)), size)
    weights = visits(ranks, everywhere.tree).astype(np.float64)
    if not weights.any():  # answers of a single token
        return everywhere
    return _grow(ranks, weights * (len(ranks) / weights.sum()), size)


def _grow(ranks: Ranks, weights: Weights, size: int) -> Calibration:
    """The greedy tree where position n counts as weights[n]; they sum to the number of positions."""
    marginal, conditional = marginal_table(ranks, weights), conditional_table(ranks, weights)
    # Positions where each path came true; a path's own share, shrunk towards the table's.
    members: dict[tuple[int, ...], NDArray[np.int64]] = {(): np.arange(len(ranks))}
    chance: dict[tuple[int, ...], float] = {(): 1.0}
    frontier: dict[tuple[int, ...], float] = {}

    def offer(parent: tuple[int, ...]) -> None:
        depth = len(parent)
        if depth == ranks.num_heads:
            return
        inside = members[parent]
        counts, total = _counts(ranks.ranks[inside, depth], weights[inside])
        share = (counts + _TRUST * conditional[depth]) / (total + _TRUST)
        for rank in range(WIDTH):
            frontier[(*parent, rank)] = chance[parent] * float(share[rank])

    offer(())
    paths: list[tuple[int, ...]] = []
    while len(paths) + 1 < min(size, MAX_TREE_NODES) and frontier:
        best = max(frontier, key=lambda path: (frontier[path], -len(path), [-rank for rank in path]))
        chance[best] = frontier.pop(best)
        inside = members[best[:-1]]
        members[best] = inside[ranks.ranks[inside, len(best) - 1] == best[-1]]
        paths.append(best)
        offer(best)
    return Calibration(
        Tree.from_paths(paths),
        tuple(chance[path] for path in paths),
        tuple(tuple(row) for row in conditional.tolist()),
        tuple(tuple(row) for row in marginal.tolist()),
        len(ranks),
    )


def marginal_table(ranks: Ranks, weights: Weights) -> NDArray[np.float64]:
    """[heads, WIDTH]: how often head i's r-th guess is right, the paper's accuracies."""
    found = []
    for head in range(ranks.num_heads):
        counts, total = _counts(ranks.ranks[:, head], weights)
        found.append(counts / max(1.0, total))
    return np.stack(found)


def conditional_table(ranks: Ranks, weights: Weights) -> NDArray[np.float64]:
    """[heads, WIDTH]: the same, given that each head before was right with one of its WIDTH best guesses."""
    found = []
    so_far = np.ones(len(ranks), dtype=bool)
    marginal = marginal_table(ranks, weights)
    for head in range(ranks.num_heads):
        counts, total = _counts(ranks.ranks[so_far, head], weights[so_far])
        found.append((counts + _TRUST * marginal[head]) / (total + _TRUST))
        so_far = so_far & (ranks.ranks[:, head] >= 0) & (ranks.ranks[:, head] < WIDTH)
    return np.stack(found)


def _counts(ranks: NDArray[np.int16], weights: Weights) -> tuple[NDArray[np.float64], float]:
    """[WIDTH] weight of each rank, and of all; an answer's end counts as wrong: nothing is accepted there."""
    inside = (ranks != NONE) & (ranks < WIDTH)
    counts = np.bincount(ranks[inside], weights=weights[inside], minlength=WIDTH).astype(np.float64)
    return counts, float(weights.sum())


def marginal_tree(calibration: Calibration, size: int = MAX_TREE_NODES) -> Tree:
    """The paper's own construction from the marginal counts, for comparison."""
    return greedy_tree(calibration.marginal, size)
