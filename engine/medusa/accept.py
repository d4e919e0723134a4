"""Acceptance: which of the verified nodes become text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.medusa.tree import Topology

__all__ = ["Accepted", "Targets", "accept"]


@dataclass(frozen=True, slots=True)
class Targets:
    """What the model says of each node of the trees.

    Args:
        tokens: [B, N] int64, the model's own draw at each reached node; -1 where none was drawn.
        matched: [B, N] bool; the node is valid and may follow its parent. The root is.
        log_p: [B, N] float32, log p(node | parent) of the matched nodes of typical rows and 0 elsewhere;
            None where no row is typical. It decides between equally long paths.
    """

    tokens: Tensor
    matched: Tensor
    log_p: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The accepted path of each sequence.

    Args:
        path: [B, D + 1] int64, node indices from the root down, D the topology's depth bound; entries
            past the path's end repeat its last node.
        length: [B] int64, accepted nodes without the root, 0 to D.
        tokens: [B, D + 1] int64, what is emitted: the path's tokens without the root, then the target
            at its end, which is the next root. Entries past `length` repeat the next root.
        nodes: [B] int64 bit masks of every node that matched together with all its ancestors, on the
            path or not; the root is bit 0, and bit 63 the sign.
    """

    path: Tensor
    length: Tensor
    tokens: Tensor
    nodes: Tensor

    @property
    def last(self) -> Tensor:
        """[B] int64: the node at the path's end."""
        return self.path[:, -1]

    @property
    def next_root(self) -> Tensor:
        """[B] int64: the token drawn at the path's end."""
        return self.tokens[:, -1]


def accept(tokens: Tensor, targets: Targets, topology: Topology) -> Accepted:
    """The longest run of nodes from the root that each may follow their parent, and the draw at its end.

    Exact rows: a target is drawn from the model's distribution at its node whatever was drafted, and
    drafts are deterministic, so the emitted text is distributed as the model's own. Where siblings repeat
    a token, the deepest accepted node wins; equally deep ones carry the same text. Typical rows: of
    equally long paths the one of the largest summed log-probability wins.

    Args:
        tokens: [B, N] int64, node tokens.
        targets: what `engine.sampler.verify` made of them.
        topology: the trees.
    """
    if tokens.shape[1] == 1 and topology.max_depth == 0:  # roots alone: what follows is a dozen operators
        root = torch.zeros_like(tokens)
        nodes = torch.ones_like(tokens).squeeze(1)
        return Accepted(path=root, length=root.squeeze(1), tokens=targets.tokens, nodes=nodes)
    nodes = torch.arange(tokens.shape[1], device=tokens.device)
    matched_bits = (targets.matched.long() << nodes).sum(1, keepdim=True)
    accepted = targets.matched & ((topology.ancestors & ~matched_bits) == 0)  # with all its ancestors
    depth = torch.where(accepted, topology.depths, -1)
    best = depth.argmax(1, keepdim=True)
    if targets.log_p is not None:
        summed = (topology.visible() * targets.log_p.unsqueeze(1)).sum(-1)
        deepest = depth == depth.amax(1, keepdim=True)
        best = torch.where(deepest, summed, float("-inf")).argmax(1, keepdim=True)
    length = topology.depths.gather(1, best)

    on_path = ((topology.ancestors.gather(1, best) >> nodes) & 1).bool()
    path = best.repeat(1, topology.max_depth + 2)
    # A node on the path goes to the column of its depth; the others to a column that is cut off.
    column = torch.where(on_path, topology.depths, topology.max_depth + 1)
    path = path.scatter(1, column, nodes.expand_as(column))[:, : topology.max_depth + 1]

    emitted = torch.where(
        torch.arange(topology.max_depth + 1, device=tokens.device) < length,
        tokens.gather(1, path).roll(-1, dims=1),
        targets.tokens.gather(1, best),
    )
    accepted_bits = (accepted.long() << nodes).sum(1)
    return Accepted(path=path, length=length.squeeze(1), tokens=emitted, nodes=accepted_bits)
