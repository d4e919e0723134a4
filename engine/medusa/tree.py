"""The draft tree: which guesses of which head are verified together.

A tree is an ordered list of paths. A path (r1, r2, …) takes the r1-th best guess of head 0, then the
r2-th best of head 1, and so on. The order is the tree's promise: the first n nodes are themselves a
tree for every n, so one list serves every size (design decision 4).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import MAX_TREE_NODES
from engine.errors import TreeError

__all__ = ["SHAPES", "Topology", "Tree", "TreeShape", "default_tree", "greedy_tree"]


class TreeShape(NamedTuple):
    """One sequence's tree: the root, nodes of the heads' branch, nodes of the lookup chain."""

    head_nodes: int
    lookup_nodes: int

    @property
    def num_nodes(self) -> int:
        """All nodes, root counted; 1 is plain decoding."""
        return 1 + self.head_nodes + self.lookup_nodes


class _Shapes(dict[tuple[int, int], TreeShape]):
    def __missing__(self, key: tuple[int, int]) -> TreeShape:
        shape = self[key] = TreeShape(*key)
        return shape


SHAPES = _Shapes()
"""Each shape once, by its two numbers: a step has one for each of its sequences, and few that differ."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The shape of every sequence's tree in one step; node 0 is the root.

    Args:
        parents: [B, N] int64, index of the parent; 0 for the root.
        depths: [B, N] int64; 0 for the root. A node's position is the sequence's length plus its depth.
        ancestors: [B, N] int64 bit masks; bit j of entry i: node j is i or an ancestor of i.
        valid: [B, N] bool; a node that is not valid is never accepted.
        max_depth: host upper bound of depths.
    """

    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    valid: Tensor
    max_depth: int

    def expand(self, batch: int) -> Topology:
        """A [1, N] topology as [batch, N], without a copy."""
        return Topology(
            parents=self.parents.expand(batch, -1),
            depths=self.depths.expand(batch, -1),
            ancestors=self.ancestors.expand(batch, -1),
            valid=self.valid.expand(batch, -1),
            max_depth=self.max_depth,
        )

    def visible(self) -> Tensor:
        """[B, N, N] bool: query node i sees node j, that is, j is i or an ancestor of i."""
        columns = torch.arange(self.parents.shape[1], device=self.ancestors.device)
        return ((self.ancestors.unsqueeze(-1) >> columns) & 1).bool()


@dataclass(frozen=True)
class Tree:
    """An ordered list of paths in which every prefix is a tree; the root is node 0 and not listed.

    Raises:
        TreeError: too many nodes, a path whose parent does not come before it, a repeated or empty
            path, or a negative rank.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.paths) + 1 > MAX_TREE_NODES:
            raise TreeError(
                f"a tree has at most {MAX_TREE_NODES} nodes with its root, got {len(self.paths) + 1}"
            )
        seen: set[tuple[int, ...]] = {()}
        for index, path in enumerate(self.paths):
            if not path or any(rank < 0 for rank in path):
                raise TreeError(f"path {index} {list(path)} must be a non-empty list of ranks from 0")
            if path in seen:
                raise TreeError(f"path {index} {list(path)} is listed twice")
            if path[:-1] not in seen:
                raise TreeError(f"path {index} {list(path)} comes before its parent {list(path[:-1])}")
            seen.add(path)

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> Tree:
        return cls(tuple(tuple(path) for path in paths))

    @classmethod
    def load(cls, file: Path) -> Tree:
        """Read a JSON list of paths.

        Raises:
            TreeError: unreadable, not a list of lists of integers, or not nested.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TreeError(f"cannot read the tree file {file}: {error}") from error
        well_formed = isinstance(data, list) and all(
            isinstance(path, list) and all(type(rank) is int for rank in path) for path in data
        )
        if not well_formed:
            raise TreeError(f"{file} must hold a JSON list of paths, each a list of integers")
        try:
            return cls.from_paths(data)
        except TreeError as error:
            raise TreeError(f"{file}: {error}") from None

    def prefix(self, size: int) -> Tree:
        """The tree of the first `size` nodes, root counted.

        Raises:
            TreeError: the list holds fewer.
        """
        if not 1 <= size <= self.size:
            raise TreeError(f"a tree of {size} nodes was asked for, and the list holds {self.size}")
        return Tree(self.paths[: size - 1])

    @property
    def size(self) -> int:
        """Nodes, root counted."""
        return len(self.paths) + 1

    @cached_property
    def depth(self) -> int:
        """Depth of the deepest node, which is the number of heads the tree needs."""
        return max((len(path) for path in self.paths), default=0)

    @cached_property
    def width(self) -> int:
        """Guesses needed of each head: the largest rank plus one."""
        return max((max(path) for path in self.paths), default=-1) + 1

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Index of each node's parent; -1 for the root."""
        index = {(): 0} | {path: i for i, path in enumerate(self.paths, start=1)}
        return (-1, *(index[path[:-1]] for path in self.paths))

    def topology(self, device: torch.device, chain: int = 0) -> Topology:
        """As [1, N + chain] tensors on `device`; `Topology.expand` makes it a batch.

        Args:
            device: of the tensors.
            chain: nodes of a second branch, a chain under the root, placed after the tree's own.

        Raises:
            TreeError: more than 64 nodes in all.
        """
        if self.size + chain > MAX_TREE_NODES:
            raise TreeError(
                f"{self.size} nodes and a chain of {chain} exceed the {MAX_TREE_NODES} of one tree"
            )
        parents = [*self.parents, *(0 if i == 0 else self.size + i - 1 for i in range(chain))]
        depths = [0, *(len(path) for path in self.paths), *range(1, chain + 1)]
        ancestors = [1]
        for node, parent in enumerate(parents[1:], start=1):
            ancestors.append(ancestors[parent] | 1 << node)
        # Bit 63 is the sign of an int64; its arithmetic shift still ends in the right low bit.
        signed = [bits - (1 << 64) if bits >> 63 else bits for bits in ancestors]

        def row(values: Iterable[int]) -> Tensor:
            return torch.tensor([list(values)], dtype=torch.int64, device=device)

        return Topology(
            parents=row(max(parent, 0) for parent in parents),
            depths=row(depths),
            ancestors=row(signed),
            valid=torch.ones(1, len(parents), dtype=torch.bool, device=device),
            max_depth=max(depths),
        )

    def choices(self, device: torch.device) -> Tensor:
        """[N - 1] int64: where each node's token stands in a head table [heads, width], flattened."""
        flat = [(len(path) - 1) * self.width + path[-1] for path in self.paths]
        return torch.tensor(flat, dtype=torch.int64, device=device)


def greedy_tree(accuracies: Sequence[Sequence[float]], size: int) -> Tree:
    """The paper's construction (Medusa, section 2.3.3): add the node most likely to be accepted, repeat.

    Args:
        accuracies: accuracies[i][r], how often head i's r-th guess is right given that its path is.
        size: nodes, root counted.

    Raises:
        TreeError: the heads do not offer that many nodes.
    """
    chosen: list[tuple[int, ...]] = []
    frontier: dict[tuple[int, ...], float] = {}

    def offer(path: tuple[int, ...], parent_probability: float) -> None:
        head, rank = len(path) - 1, path[-1]
        if head < len(accuracies) and rank < len(accuracies[head]):
            frontier[path] = parent_probability * accuracies[head][rank]

    # The next sibling is offered when a node is taken: guesses of one head come in falling order.
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    offer((0,), 1.0)
    while len(chosen) + 1 < size:
        if not frontier:
            raise TreeError(f"{len(accuracies)} heads offer {len(chosen) + 1} nodes, {size} were asked for")
        best = max(frontier, key=lambda path: (frontier[path], [-rank for rank in path]))
        probability[best] = frontier.pop(best)
        chosen.append(best)
        offer((*best, 0), probability[best])
        offer((*best[:-1], best[-1] + 1), probability[best[:-1]])
    return Tree.from_paths(chosen)


def default_tree(num_heads: int) -> Tree:
    """A 64-node tree for heads that nobody calibrated yet.

    Grown from an assumed accuracy of 0.5 for head 0's first guess, 0.85 of that for each head after
    it, and rank^-1.4 down the ranks. A calibrated tree replaces it.
    """
    table = [[0.5 * 0.85**head * (rank + 1) ** -1.4 for rank in range(10)] for head in range(num_heads)]
    available = sum(10**depth for depth in range(min(num_heads, 2) + 1))
    return greedy_tree(table, min(MAX_TREE_NODES, available))
