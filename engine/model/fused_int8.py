"""The layers of a plain decoder in int8, with everything between two products in one kernel call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend
from engine.cpu_team import Arguments, Team
from engine.model import int8_kernels as kernels
from engine.model.quantize import Int8Weight

__all__ = ["FusedInt8Layer", "FusedInt8Layers"]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What all layers share."""

    eps: float
    heads: int
    kv_heads: int
    head_dim: int


class FusedInt8Layer:
    """The int8 weights of one layer as the kernels take them.

    Args:
        norms: [hidden] float32, before attention and before the MLP.
        weights: qkv, o, gate-up and down, without bias and not large.
    """

    def __init__(self, norms: tuple[Tensor, Tensor], weights: Sequence[Int8Weight]) -> None:
        qkv, o, gate_up, down = weights
        self.qkv, self.o, self.gate_up, self.down = weights
        width = down.in_features
        self.input_norm, self.mlp_norm = norms[0] * qkv.signs(), norms[1] * gate_up.signs()
        self.qkv_scale, self.o_scale, self.down_scale = (w.mixed_scale() for w in (qkv, o, down))
        self.gate_up_scale = gate_up.mixed_scale()
        self.gate_up_scale[width:] *= down.signs()
        self.hidden_block, self.width_block = qkv.block, down.block


class _Pass:
    """Memory of one pass over T rows, and for each layer the kernels' arguments, which point into it."""

    def __init__(self, rows: int, layers: Sequence[FusedInt8Layer], shape: _Shape) -> None:
        first = layers[0]
        hidden, width, heads = len(first.mlp_norm), first.down.in_features, shape.heads + 2 * shape.kv_heads
        self.x = torch.empty(rows, hidden)
        self.cos, self.sin = torch.empty(rows, shape.head_dim), torch.empty(rows, shape.head_dim)
        self.hidden8 = torch.empty(rows, hidden, dtype=torch.int8)
        self.mixed8 = torch.empty(rows, first.o.in_features, dtype=torch.int8)
        self.width8 = torch.empty(rows, width, dtype=torch.int8)
        self.qkv = torch.empty(rows, heads * shape.head_dim, dtype=torch.int32)
        self.out = torch.empty(rows, hidden, dtype=torch.int32)
        self.gate_up = torch.empty(rows, 2 * width, dtype=torch.int32)
        self.heads = torch.empty(rows, heads, shape.head_dim)
        self._scale, self._eps = torch.empty(rows), torch.full((1,), shape.eps)
        self.tasks = min(rows, kernels.MOST_TASKS)
        self.enter = self._arguments(
            X=self.x, OUT=self.hidden8, NORM=first.input_norm, block=first.hidden_block
        )
        # One for all layers: the attention's output is another tensor every time.
        self.mixed = self._arguments(OUT=self.mixed8)
        self.layers = [
            self._layer(layer, following, shape)
            for layer, following in zip(layers, (*layers[1:], None), strict=True)
        ]
        self.products = [self._products(layer) for layer in layers]

    def _products(self, layer: FusedInt8Layer) -> tuple[Callable[[], object], ...]:
        """Those of a layer: qkv, o, gate-up and down."""
        return (
            layer.qkv.sums(self.hidden8, self.qkv),
            layer.o.sums(self.mixed8, self.out),
            layer.gate_up.sums(self.hidden8, self.gate_up),
            layer.down.sums(self.width8, self.out),
        )

    def _layer(
        self, layer: FusedInt8Layer, following: FusedInt8Layer | None, shape: _Shape
    ) -> tuple[Arguments, ...]:
        """Arguments of the four kernels of a layer: before attention, after it, amid the MLP, after it."""
        before = self._arguments(
            ACC=self.qkv, OUT=self.heads, WEIGHT_SCALE=layer.qkv_scale, COS=self.cos, SIN=self.sin
        )
        before[kernels.WIDTH] = self.qkv.shape[1]
        before[kernels.HEADS], before[kernels.HEAD_DIM] = shape.heads + shape.kv_heads, shape.head_dim
        after = self._arguments(
            X=self.x,
            ACC=self.out,
            OUT=self.hidden8,
            WEIGHT_SCALE=layer.o_scale,
            NORM=layer.mlp_norm,
            block=layer.hidden_block,
        )
        amid = self._arguments(
            ACC=self.gate_up, OUT=self.width8, WEIGHT_SCALE=layer.gate_up_scale, block=layer.width_block
        )
        leave = self._arguments(X=self.x, ACC=self.out, OUT=self.hidden8, WEIGHT_SCALE=layer.down_scale)
        if following is not None:
            leave[kernels.NORM] = following.input_norm.data_ptr()
            leave[kernels.BLOCK] = following.hidden_block
        return before, after, amid, leave

    def _arguments(self, block: int = 1, **tensors: Tensor) -> Arguments:
        """With the addresses of these tensors at the places of their names."""
        found = Arguments()
        found[kernels.ROWS], found[kernels.BLOCK] = len(self._scale), block
        found[kernels.WIDTH] = tensors["OUT"].shape[1]
        found[kernels.SCALE], found[kernels.EPS] = self._scale.data_ptr(), self._eps.data_ptr()
        for name, tensor in tensors.items():
            found[getattr(kernels, name)] = tensor.data_ptr()
        return found


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
        self._layers, self._shape = layers, _Shape(eps, heads, kv_heads, head_dim)
        self._team = Team()
        self._passes: dict[int, _Pass] = {}

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionBackend) -> Tensor:
        """x [T, hidden] float32, through all layers.

        Args:
            cos, sin: [T, 1, head_dim], see `RotaryTable`.

        Returns:
            [T, hidden], overwritten by the next call with as many rows.
        """
        run, p = self._team.run, self._pass(len(x))
        heads, rotated, tasks = self._shape.heads, self._shape.heads + self._shape.kv_heads, p.tasks
        p.x.copy_(x)
        p.cos.copy_(cos.squeeze(1))
        p.sin.copy_(sin.squeeze(1))
        q, k, v = p.heads[:, :heads], p.heads[:, heads:rotated], p.heads[:, rotated:]
        run(kernels.norm_quantize, p.enter, tasks)
        for index, (products, arguments) in enumerate(zip(p.products, p.layers, strict=True)):
            qkv, o, gate_up, down = products
            before, after, amid, leave = arguments
            qkv()
            run(kernels.rotary, before, tasks)
            mixed = attention.attend(index, q, k, v)
            p.mixed[kernels.X] = mixed.data_ptr()
            run(kernels.quantize, p.mixed, tasks)
            o()
            run(kernels.residual_norm_quantize, after, tasks)
            gate_up()
            run(kernels.silu_mul_quantize, amid, tasks)
            down()
            last = index == len(self._layers) - 1
            run(kernels.residual if last else kernels.residual_norm_quantize, leave, tasks)
        return p.x

    def _pass(self, rows: int) -> _Pass:
        if rows not in self._passes:
            if len(self._passes) >= _KEPT_SIZES:
                self._passes.pop(next(iter(self._passes)))
            self._passes[rows] = _Pass(rows, self._layers, self._shape)
        return self._passes[rows]


_KEPT_SIZES = 16
"""Numbers of rows whose memory is kept."""
