"""Medusa heads as they are trained: the same function that `engine.medusa.heads` serves.

A new kind of head needs a module with `forward` and `tensors`, a place in `Trainer` that makes it, and a
reader in the engine (`engine.medusa.head_files`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import HeadsError

__all__ = ["PlainHeads", "num_parameters"]


class PlainHeads(nn.Module):
    """Head i (from 0) at position t guesses token t+i+2: lm_head(R_L(… R_1(x))), R(x) = x + SiLU(W x + b).

    W starts at zero, so that a head starts as the base model's own lm_head (Medusa, section 2.1.1).

    Args:
        num_heads: heads.
        num_layers: residual layers per head.
        hidden_size: of the base model.
    """

    def __init__(self, num_heads: int, num_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.num_heads, self.num_layers, self.hidden_size = num_heads, num_layers, hidden_size
        # Transposed, [in, out], so that all heads of a layer are one batched product.
        shape = (num_heads, hidden_size, hidden_size)
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in range(num_layers))
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(num_heads, 1, hidden_size)) for _ in range(num_layers)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, hidden] after the final norm to [heads, T, hidden], what the shared lm_head is applied to."""
        x = hidden.expand(self.num_heads, -1, -1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x + F.silu(torch.baddbmm(bias.to(x.dtype), x, weight.to(x.dtype)))
        return x

    def tensors(self) -> dict[str, Tensor]:
        """Names and tensors of the official format, float32, on the CPU."""
        found: dict[str, Tensor] = {}
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            for head in range(self.num_heads):
                name = f"{head}.{layer}.linear"
                found[f"{name}.weight"] = weight[head].detach().T.float().cpu().contiguous()
                found[f"{name}.bias"] = bias[head, 0].detach().float().cpu().clone()
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PlainHeads:
        """Heads from the names of the official format; other tensors (`token_map`) are left alone.

        Raises:
            HeadsError: not a regular set of heads, or heads with an lm_head of their own.
        """
        names = [name.split(".") for name in tensors if name.endswith(".linear.weight")]
        if not names or any(not (name[0] + name[1]).isdigit() for name in names):
            raise HeadsError("no tensor of the form '0.0.linear.weight'")
        num_heads = 1 + max(int(name[0]) for name in names)
        num_layers = 1 + max(int(name[1]) for name in names)
        if any(name.endswith(f".{num_layers}.weight") for name in tensors):
            raise HeadsError(
                "heads with an lm_head of their own cannot be trained on: ours share the model's"
            )
        heads = cls(num_heads, num_layers, tensors["0.0.linear.weight"].shape[0])
        try:
            with torch.no_grad():
                for layer in range(num_layers):
                    for head in range(num_heads):
                        heads.weights[layer][head] = tensors[f"{head}.{layer}.linear.weight"].T
                        heads.biases[layer][head, 0] = tensors[f"{head}.{layer}.linear.bias"]
        except KeyError as error:
            raise HeadsError(f"tensor {error.args[0]} is missing") from error
        return heads


def num_parameters(heads: nn.Module) -> int:
    return sum(parameter.numel() for parameter in heads.parameters())
