"""Acceptance: which of the verified nodes become text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.medusa.tree import Topology

__all__ = ["Accepted", "accept_exact"]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The accepted path of each sequence.

    Args:
        path: [B, D + 1] int64, node indices from the root down, D the topology's depth bound; entries
            past the path's end repeat its last node.
        length: [B] int64, accepted nodes without the root, 0 to D.
        tokens: [B, D + 1] int64, what is emitted: the path's tokens without the root, then the target
            at its end, which is the next root. Entries past `length` repeat the next root.
    """

    path: Tensor
    length: Tensor
    tokens: Tensor

    @property
    def last(self) -> Tensor:
        """[B] int64: the node at the path's end."""
        return self.path[:, -1]

    @property
    def next_root(self) -> Tensor:
        """[B] int64: the token drawn at the path's end."""
        return self.tokens[:, -1]


def accept_exact(tokens: Tensor, targets: Tensor, topology: Topology) -> Accepted:
    """Descend from the root while the model's own draw at a node is one of its children.

    A target is drawn from the model's distribution at its node whatever was drafted, and drafts are
    deterministic, so the emitted text is distributed as the model's own. Where siblings repeat a
    token, the deepest accepted node wins; equally deep ones carry the same text.

    Args:
        tokens: [B, N] int64, node tokens.
        targets: [B, N] int64, the draw at each node.
        topology: the trees.
    """
    match = topology.valid & (tokens == targets.gather(1, topology.parents))
    match[:, 0] = True
    nodes = torch.arange(tokens.shape[1], device=tokens.device)
    matched_bits = (match.long() << nodes).sum(1, keepdim=True)
    accepted = (topology.ancestors & ~matched_bits) == 0  # the node and all its ancestors matched
    best = torch.where(accepted, topology.depths, -1).argmax(1, keepdim=True)
    length = topology.depths.gather(1, best)

    on_path = ((topology.ancestors.gather(1, best) >> nodes) & 1).bool()
    path = best.repeat(1, topology.max_depth + 2)
    # A node on the path goes to the column of its depth; the others to a column that is cut off.
    column = torch.where(on_path, topology.depths, topology.max_depth + 1)
    path = path.scatter(1, column, nodes.expand_as(column))[:, : topology.max_depth + 1]

    emitted = torch.where(
        torch.arange(topology.max_depth + 1, device=tokens.device) < length,
        tokens.gather(1, path).roll(-1, dims=1),
        targets.gather(1, best),
    )
    return Accepted(path=path, length=length.squeeze(1), tokens=emitted)
