"""One tree of candidates per sequence, put together from its branches: root, heads, lookup chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import MAX_TREE_NODES
from engine.medusa.heads import HeadDrafter
from engine.medusa.tree import Topology, Tree, TreeShape

__all__ = ["Draft", "Drafter"]

_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree of candidates for each sequence of a batch.

    A sequence's nodes fill its first columns: root, heads' nodes, lookup chain. Trees of one batch differ
    in size, and only valid nodes are computed: they are the rows of the forward pass, in order of
    sequence and node.

    Args:
        tokens: [B, N] int64; any token where a node is not valid.
        topology: the shapes.
        index: [T] int64, the valid nodes in the flattened grid; None where all B * N are.
        row_of: [B, N] int64, the row of each valid node; any row for the others.
        padded: all B * N nodes are computed, also those that are not valid; they repeat their root.
    """

    tokens: Tensor
    topology: Topology
    index: Tensor | None
    row_of: Tensor
    padded: bool = False

    def rows(self, grid: Tensor) -> Tensor:
        """From [B, N, ...] to [T, ...]: what belongs to the computed nodes."""
        flat = grid.flatten(0, 1)
        return flat if self.index is None else flat[self.index]


class Drafter:
    """Puts the trees of a step together.

    Args:
        heads: the heads' branch; None without heads.
        device: of all tensors.
    """

    def __init__(self, heads: HeadDrafter | None, device: torch.device) -> None:
        self._heads, self._device = heads, device
        self._topologies: dict[tuple[TreeShape, torch.device], Topology] = {}
        self._depths: dict[TreeShape, int] = {}
        self._columns = np.empty((5, 1, MAX_TREE_NODES), dtype=np.int64)
        self._column_of: dict[int, dict[TreeShape, int]] = {}  # by the nodes of the heads on offer

    def draft(self, root: Tensor, hidden: Tensor, chain: Tensor | None, shapes: Sequence[TreeShape]) -> Draft:
        """Trees for B sequences.

        Args:
            root: [B] int64.
            hidden: [B, hidden], the states the roots were drawn from.
            chain: [B, D] int64, what the lookup proposes; may be None where no lookup_nodes are wanted.
            shapes: of each sequence's tree, with at most D lookup_nodes.
        """
        most = TreeShape(max(s.head_nodes for s in shapes), max(s.lookup_nodes for s in shapes))
        offered = self._offered(root, hidden, chain, most)
        if all(shape == most for shape in shapes):
            row_of = torch.arange(offered.numel(), device=self._device).view_as(offered)
            topology = self._topology(most, self._device)
            return Draft(offered, topology.expand(len(root)), None, row_of)
        # Trees of different sizes. The host knows them, so no shape depends on a value on the device.
        grid = self.grid(shapes, most.head_nodes, max(shape.num_nodes for shape in shapes))
        valid = grid[-1].astype(bool)
        pick, parents, depths, ancestors = (torch.from_numpy(row).to(self._device) for row in grid[:-1])
        return Draft(
            tokens=offered.gather(1, pick),
            topology=Topology(
                parents=parents,
                depths=depths,
                ancestors=ancestors,
                valid=torch.from_numpy(valid).to(self._device),
                max_depth=int(grid[2].max()),
            ),
            index=torch.from_numpy(valid.ravel().nonzero()[0]).to(self._device),
            row_of=torch.from_numpy(valid.ravel().cumsum().reshape(valid.shape) - 1).to(self._device),
        )

    def grid(
        self,
        shapes: Sequence[TreeShape],
        most_heads: int,
        size: int,
        out: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """The shapes as [5, B, size]: pick, parents, depths, ancestors, valid; in `out`, where that is given.

        `pick` says which of the tokens on offer (root, `most_heads` nodes of the heads, chain) stands at a
        node. A node that is not valid repeats the root.
        """
        known = self._column_of.setdefault(most_heads, {})
        for shape in set(shapes).difference(known):
            known[shape] = self._add_column(shape, most_heads)
        columns = [known[shape] for shape in shapes]
        # Whatever the mode, none is outside; this one writes to `out` at once.
        return np.take(self._columns[:, :, :size], columns, axis=1, out=out, mode="clip")

    def fixed(
        self,
        root: Tensor,
        hidden: Tensor,
        chain: Tensor | None,
        most: TreeShape,
        grid: Tensor,
        max_depth: int,
    ) -> Draft:
        """`draft` where the shapes are a tensor and all B * N nodes are computed, for a captured step.

        Args:
            most: what is on offer to every sequence.
            grid: [5, B, N] int64, see `grid`.
            max_depth: bound of the depths in it.
        """
        pick, parents, depths, ancestors, valid = grid.unbind()
        tokens = self._offered(root, hidden, chain, most).gather(1, pick)
        row_of = torch.arange(tokens.numel(), device=self._device).view_as(tokens)
        topology = Topology(parents, depths, ancestors, valid.bool(), max_depth)
        return Draft(tokens, topology, None, row_of, padded=True)

    def guess(self, root: Tensor | None, hidden: Tensor, nodes: int) -> Tensor:
        """[B, nodes] int64: the first nodes of the heads' branch, see `HeadDrafter.guess`."""
        if self._heads is None:
            raise ValueError("nodes of the heads' branch were asked for and there are no heads")
        return self._heads.guess(root, hidden, nodes)

    @property
    def needs_root(self) -> bool:
        """Whether the heads' branch depends on the root, and not on the hidden state alone."""
        return self._heads is not None and self._heads.needs_root

    @property
    def most_heads(self) -> int:
        """Nodes of the heads' branch there are; 0 without heads."""
        return self._heads.tree.size - 1 if self._heads is not None else 0

    def parents(self, shape: TreeShape) -> list[int]:
        """The parent of each node of such a tree; 0 for the root."""
        parents: list[int] = self._topology(shape, _HOST).parents[0].tolist()
        return parents

    def depth(self, shape: TreeShape) -> int:
        """The depth of its deepest node."""
        if shape not in self._depths:
            self._depths[shape] = self._topology(shape, _HOST).max_depth
        return self._depths[shape]

    def _offered(self, root: Tensor, hidden: Tensor, chain: Tensor | None, most: TreeShape) -> Tensor:
        """[B, 1 + heads + lookup] int64: root, nodes of the heads' branch, chain."""
        parts = [root.unsqueeze(1)]
        if most.head_nodes:
            parts.append(self.guess(root, hidden, most.head_nodes))
        if most.lookup_nodes:
            if chain is None:
                raise ValueError("a lookup branch was asked for and there is no lookup")
            parts.append(chain[:, : most.lookup_nodes])
        return torch.cat(parts, dim=1)

    def _add_column(self, shape: TreeShape, most_heads: int) -> int:
        """Where in `_columns` [5, C, 64] is now one sequence's share of `grid`."""
        count = sum(map(len, self._column_of.values()))
        if count == self._columns.shape[1]:
            self._columns = np.concatenate((self._columns, np.empty_like(self._columns)), axis=1)
        found, nodes = self._columns[:, count], np.arange(shape.num_nodes)
        found[:] = 0
        found[3] = 1  # of a node that is not valid: the root
        topology = self._topology(shape, _HOST)
        found[0, nodes], found[4, nodes] = nodes, 1
        found[0, 1 + shape.head_nodes : shape.num_nodes] += most_heads - shape.head_nodes
        for row, values in enumerate((topology.parents, topology.depths, topology.ancestors), start=1):
            found[row, nodes] = values[0].numpy()
        return count

    def _topology(self, shape: TreeShape, device: torch.device) -> Topology:
        key = shape, device
        if key not in self._topologies:
            tree = self._heads.tree.prefix(shape.head_nodes + 1) if self._heads is not None else Tree(())
            self._topologies[key] = tree.topology(device, shape.lookup_nodes)
        return self._topologies[key]
