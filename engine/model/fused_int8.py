"""The layers of a plain decoder in int8, with everything between two products in one kernel call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.attention.base import AttentionBackend
from engine.model import int8_kernels as kernels
from engine.model.quantize import Int8Weight

__all__ = ["FusedInt8Layer", "FusedInt8Layers"]


class FusedInt8Layer:
    """The int8 weights of one layer as the kernels take them.

    Args:
        norms: [hidden] float32, before attention and before the MLP.
        weights: qkv, o, gate-up and down, each on torch's plain kernel and without bias.
    """

    def __init__(self, norms: tuple[Tensor, Tensor], weights: Sequence[Int8Weight]) -> None:
        qkv, o, gate_up, down = weights
        self.qkv, self.o, self.gate_up, self.down = (weight.transposed for weight in weights)
        width = self.down.shape[0]
        self.input_norm = (norms[0] * qkv.signs()).numpy()
        self.mlp_norm = (norms[1] * gate_up.signs()).numpy()
        self.qkv_scale, self.o_scale, self.down_scale = (w.mixed_scale().numpy() for w in (qkv, o, down))
        scale = gate_up.mixed_scale()
        scale[width:] *= down.signs()
        self.gate_up_scale = scale.numpy()
        self.hidden_block, self.width_block = qkv.block, down.block


class _Scratch:
    """Memory of one pass over T rows, seen by torch and by numba."""

    def __init__(self, rows: int, layer: FusedInt8Layer, heads: int, head_dim: int) -> None:
        hidden, width = layer.o.shape[1], layer.down.shape[0]

        def pair(dtype: torch.dtype, *shape: int) -> tuple[Tensor, np.ndarray]:
            tensor = torch.empty(shape, dtype=dtype)
            return tensor, tensor.numpy()

        self.hidden8, self.hidden8_np = pair(torch.int8, rows, hidden)
        self.mixed8, self.mixed8_np = pair(torch.int8, rows, layer.o.shape[0])
        self.width8, self.width8_np = pair(torch.int8, rows, width)
        self.qkv, self.qkv_np = pair(torch.int32, rows, layer.qkv.shape[1])
        self.out, self.out_np = pair(torch.int32, rows, hidden)
        self.gate_up, self.gate_up_np = pair(torch.int32, rows, 2 * width)
        self.heads, self.heads_np = pair(torch.float32, rows, heads, head_dim)
        self.scale = np.empty(rows, dtype=np.float32)
        self.row, self.wide = np.empty(hidden, dtype=np.float32), np.empty(width, dtype=np.float32)
        self.row_bits, self.wide_bits = self.row.view(np.int32), self.wide.view(np.int32)
        self.power = np.empty(width, dtype=np.float32)


class FusedInt8Layers:
    """All layers of a decoder of the plain shape: pre-norms, full rotary, SwiGLU, no biases.

    Args:
        layers: from the first to the last.
        eps: of the norms.
        heads, kv_heads, head_dim: of attention.
    """

    def __init__(
        self, layers: list[FusedInt8Layer], *, eps: float, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        self._layers, self._eps = layers, np.float32(eps)
        self._heads, self._kv_heads, self._head_dim = heads, kv_heads, head_dim
        self._scratch: dict[int, _Scratch] = {}

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBackend) -> Tensor:
        """x [T, hidden] float32, through all layers; x is overwritten.

        Args:
            cos, sin: [T, 1, head_dim], see `RotaryTable`.
        """
        heads, rotated = self._heads, self._heads + self._kv_heads
        s, eps = self._scratch_for(len(x)), self._eps
        x_np = x.numpy()
        cos_np, sin_np = cos.squeeze(1).numpy(), sin.squeeze(1).numpy()
        first, last = self._layers[0], self._layers[-1]
        kernels.norm_quantize(
            x_np, first.input_norm, eps, first.hidden_block, s.row, s.row_bits, s.hidden8_np, s.scale
        )
        q, k, v = s.heads[:, :heads], s.heads[:, heads:rotated], s.heads[:, rotated:]
        for index, layer in enumerate(self._layers):
            torch._int_mm(s.hidden8, layer.qkv, out=s.qkv)
            kernels.rotary(s.qkv_np, layer.qkv_scale, s.scale, cos_np, sin_np, rotated, s.heads_np)
            mixed = attention.attend(index, q, k, v).numpy()
            kernels.quantize(mixed, mixed.view(np.int32), s.mixed8_np, s.scale)
            torch._int_mm(s.mixed8, layer.o, out=s.out)
            kernels.residual_norm_quantize(
                s.out_np,
                layer.o_scale,
                x_np,
                layer.mlp_norm,
                eps,
                layer.hidden_block,
                s.row,
                s.row_bits,
                s.hidden8_np,
                s.scale,
            )
            torch._int_mm(s.hidden8, layer.gate_up, out=s.gate_up)
            kernels.silu_mul_quantize(
                s.gate_up_np,
                layer.gate_up_scale,
                layer.width_block,
                s.wide,
                s.wide_bits,
                s.power,
                s.width8_np,
                s.scale,
            )
            torch._int_mm(s.width8, layer.down, out=s.out)
            if layer is last:
                kernels.residual(s.out_np, layer.down_scale, s.scale, x_np)
                return x
            following = self._layers[index + 1]
            kernels.residual_norm_quantize(
                s.out_np,
                layer.down_scale,
                x_np,
                following.input_norm,
                eps,
                following.hidden_block,
                s.row,
                s.row_bits,
                s.hidden8_np,
                s.scale,
            )
        return x

    def _scratch_for(self, rows: int) -> _Scratch:
        if rows not in self._scratch:
            if len(self._scratch) >= _KEPT_SIZES:
                self._scratch.pop(next(iter(self._scratch)))
            all_heads = self._heads + 2 * self._kv_heads
            self._scratch[rows] = _Scratch(rows, self._layers[0], all_heads, self._head_dim)
        return self._scratch[rows]


_KEPT_SIZES = 16
"""Numbers of rows whose scratch memory is kept."""
