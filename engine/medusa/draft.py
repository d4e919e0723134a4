"""One tree of candidates per sequence, put together from its branches: root, heads, lookup chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.medusa.heads import HeadDrafter
from engine.medusa.tree import Topology, Tree

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
    """

    tokens: Tensor
    topology: Topology
    index: Tensor | None
    row_of: Tensor

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
        self._topologies: dict[tuple[int, int, torch.device], Topology] = {}

    def draft(
        self,
        root: Tensor,
        hidden: Tensor,
        chain: Tensor | None,
        head_nodes: Sequence[int],
        lookup_nodes: Sequence[int],
    ) -> Draft:
        """Trees for B sequences.

        Args:
            root: [B] int64.
            hidden: [B, hidden], the states the roots were drawn from.
            chain: [B, D] int64, what the lookup proposes; may be None where no lookup_nodes are wanted.
            head_nodes: nodes of the heads' branch for each sequence.
            lookup_nodes: nodes of the lookup chain for each sequence, at most D.
        """
        most_heads, most_lookup = max(head_nodes), max(lookup_nodes)
        parts = [root.unsqueeze(1)]
        if most_heads:
            if self._heads is None:
                raise ValueError("nodes of the heads' branch were asked for and there are no heads")
            parts.append(self._heads.guess(hidden, most_heads))
        if most_lookup:
            if chain is None:
                raise ValueError("a lookup branch was asked for and there is no lookup")
            parts.append(chain[:, :most_lookup])
        offered = torch.cat(parts, dim=1)
        if min(head_nodes) == most_heads and min(lookup_nodes) == most_lookup:
            row_of = torch.arange(offered.numel(), device=self._device).view_as(offered)
            topology = self._topology(most_heads, most_lookup, self._device)
            return Draft(offered, topology.expand(len(root)), None, row_of)
        return self._ragged(offered, most_heads, list(zip(head_nodes, lookup_nodes, strict=True)))

    def _ragged(self, offered: Tensor, most_heads: int, shapes: list[tuple[int, int]]) -> Draft:
        """Trees of different sizes. The host knows them, so no shape depends on a value on the device."""
        size = 1 + max(heads + chain for heads, chain in shapes)
        grid = len(shapes), size
        column = np.arange(size)
        pick, valid = np.zeros(grid, dtype=np.int64), np.zeros(grid, dtype=bool)
        parents, depths = np.zeros(grid, dtype=np.int64), np.zeros(grid, dtype=np.int64)
        # What is not valid has itself for an ancestor, so it is never accepted.
        ancestors = np.broadcast_to(np.int64(1) << column, grid).copy()
        for row, (heads, chain) in enumerate(shapes):
            nodes = 1 + heads + chain
            pick[row, :nodes] = np.where(
                column[:nodes] > heads, column[:nodes] + most_heads - heads, column[:nodes]
            )
            valid[row, :nodes] = True
            shape = self._topology(heads, chain, _HOST)
            parents[row, :nodes] = shape.parents[0]
            depths[row, :nodes] = shape.depths[0]
            ancestors[row, :nodes] = shape.ancestors[0]

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(self._device)

        return Draft(
            tokens=offered.gather(1, tensor(pick)),
            topology=Topology(
                parents=tensor(parents),
                depths=tensor(depths),
                ancestors=tensor(ancestors),
                valid=tensor(valid),
                max_depth=int(depths.max()),
            ),
            index=tensor(valid.ravel().nonzero()[0]),
            row_of=tensor(valid.ravel().cumsum().reshape(grid) - 1),
        )

    def _topology(self, heads: int, chain: int, device: torch.device) -> Topology:
        key = heads, chain, device
        if key not in self._topologies:
            tree = self._heads.tree.prefix(heads + 1) if self._heads is not None else Tree(())
            self._topologies[key] = tree.topology(device, chain)
        return self._topologies[key]
