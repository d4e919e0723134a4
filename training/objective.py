"""The heads' loss, computed together with its gradient, a few rows of logits at a time.

The `lm_head` is frozen and, for a small model, most of the cost. Autograd would keep the logits of every
head and token (5 heads × 4096 tokens × 32k tokens of vocabulary are 2.6 GB in float32); here a chunk of
logits becomes loss and gradient at once and is overwritten by the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["CHUNK_BYTES", "Targets", "loss_weights", "soft_cross_entropy"]

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Of float32 logits at a time: what a core's share of the cache takes, and enough rows for a good product; a
GPU wants few launches."""


class Targets:
    """What the rows should guess: `m` tokens each with a weight.

    Args:
        ids: [R, m] int64, rows of the (reduced) lm_head; -1 where a token is not in it.
        weights: [R, m] float32; 1 for the token that came, or the model's probabilities of its best ones.
    """

    __slots__ = ("ids", "weights")

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        self.ids = ids.clamp(min=0)
        self.weights = torch.where(ids >= 0, weights, 0.0)


def soft_cross_entropy(x: Tensor, lm_head: Tensor, targets: Targets, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_r scale_r Σ_m w_rm (logsumexp(z_r) - z_r[id_rm]) with z = x lm_head^T.

    With one target of weight 1 it is the cross-entropy; with the model's probabilities it is the KL
    divergence to them plus their entropy, which is constant. Only `x` gets a gradient.

    Args:
        x: [R, hidden], the heads' outputs.
        lm_head: [V, hidden], frozen, of x's dtype.
        targets: for each row.
        scale: [R] float32.

    Returns:
        The loss, and [R] float32 unscaled losses without gradient.
    """
    total: tuple[Tensor, Tensor] = _SoftCrossEntropy.apply(x, lm_head, targets, scale)  # type: ignore[no-untyped-call]
    return total


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lm_head: Tensor, targets: Targets, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = max(16, CHUNK_BYTES[x.device.type] // (4 * len(lm_head)))
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            ids, weights = targets.ids[part], targets.weights[part]
            logits = (x[part] @ lm_head.T).float()
            chosen = logits.gather(1, ids)
            top = logits.amax(1, keepdim=True)
            exp = logits.sub_(top).exp_()
            total = exp.sum(1, keepdim=True)
            mass = weights.sum(1, keepdim=True)
            losses[part] = (mass * (total.log() + top)).squeeze(1) - (weights * chosen).sum(1)
            if gradient is not None:
                exp.mul_(mass / total).scatter_add_(1, ids, -weights).mul_(scale[part].unsqueeze(1))
                torch.matmul(exp.to(x.dtype), lm_head, out=gradient[part])
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        ctx.mark_non_differentiable(losses)
        return (losses * scale).sum(), losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


def loss_weights(num_heads: int, decay: float) -> list[float]:
    """decay^k of head k, 0.8 in the paper (section 2.2.1): later heads are less certain and count less."""
    return [decay**head for head in range(num_heads)]
