"""The layers of a decoder on CUDA: what lies between two products, and products of few rows, in Triton."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, Rotary, RotatingAttention
from engine.model import triton_kernels as kernels
from engine.model.experts_triton import experts_parts, join_experts, shape_for, shared_expert
from engine.model.layers import HeadNorm, Linear, RMSNorm, RotaryTable
from engine.model.product_shapes import MOST_TILES, Around, Shape
from engine.model.triton_products import product
from engine.triton_dependent import ahead_of, launched_early

if TYPE_CHECKING:
    from engine.model.decoder import DecoderLayer

__all__ = ["FusedLayers", "Ways"]


class Ways(NamedTuple):
    """How a layer's products are made in steps of so many rows: a kernel's shape, or None for torch's.

    A layer with experts has the first two.

    Args:
        ahead: bytes of the weight behind it that a kernel in front of a product of torch's asks for into L2.
        during: bytes of `o`'s weight that attention asks for, which leaves most of the memory's rate idle.
    """

    qkv: Shape | None = None
    o: Shape | None = None
    gate_up: Shape | None = None
    down: Shape | None = None
    ahead: int = 0
    during: int = 0


class FusedLayers:
    """Embedding, all layers and the final norm; the same function as the plain path, for every family.

    A product of few rows may take in the norm before it, or the addition behind it (`ways`).
    Where it does not, a norm is computed by the kernel that closes the block before, across layers too.

    Args:
        layers: from the first to the last; they keep their weights.
        final_norm: after the last.
        embedding: [vocab, hidden]; embedding_scale: its factor.
        table: of the layers that are not local; local: of those that are, None where it is the same.
        offset: norms multiply by 1 + weight.
        activation: of the MLP's gate.

    Attributes:
        ways: by the largest number of rows that they are for; more rows than any are torch's.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        final_norm: RMSNorm,
        *,
        embedding: Tensor,
        embedding_scale: float,
        table: RotaryTable,
        local: RotaryTable | None,
        offset: bool,
        activation: Literal["silu", "gelu_tanh"],
    ) -> None:
        self.layers, self._offset, self._activation = list(layers), offset, activation
        self._eps = final_norm.eps
        self._embedding, self._scale = embedding, embedding_scale
        self._table, self._local = table, table if local is None else local
        self._opening = [_weight(layer.input_norm) for layer in self.layers]
        self._opening.append(final_norm.weight)
        self._counts = torch.zeros(MOST_TILES, dtype=torch.int32, device=embedding.device)
        self.ways: dict[int, Ways] = {}

    @property
    def joinable(self) -> bool:
        """Whether products may take in what is around them: norms come before, and weights are plain."""
        before = all(x is not None for layer in self.layers for x in (layer.input_norm, layer.mlp_norm))
        after = (x for layer in self.layers for x in (layer.attention_output_norm, layer.mlp_output_norm))
        linears = (linear for layer in self.layers for linear in layer.linears)
        plain = all(linear.quantized is None and linear.packed is None for linear in linears)
        return before and plain and all(norm is None for norm in after)

    @property
    def common(self) -> tuple[Linear, ...]:
        """Linears that all layers have, in the order in which they run: of a layer that has the fewest."""
        return min((layer.linears for layer in self.layers), key=len)

    @property
    def positions(self) -> int:
        """That the tables of the rotation hold."""
        return len(self._table.cos)

    def some(self, count: int) -> FusedLayers:
        """The first `count` layers, and the final norm."""
        found = copy(self)
        found.layers, found._opening = self.layers[:count], [*self._opening[:count], self._opening[-1]]
        return found

    def __call__(
        self, tokens: Tensor, positions: Tensor, attention: AttentionBackend, out: Tensor | None = None
    ) -> Tensor:
        """See `Decoder.forward`."""
        opening, rows = self._opening, len(tokens)
        ways = self._ways_of(rows)
        first = None if _norms(ways.qkv) else opening[0]
        x, y = kernels.embed(tokens, self._embedding, self._scale, first, self._eps, offset=self._offset)
        for index, layer in enumerate(self.layers):
            last, experts = index + 1 == len(self.layers), layer.experts
            behind = None if last else self.layers[index + 1].qkv_proj
            following = opening[index + 1] if last or not _norms(ways.qkv) else None
            qkv = self._open(layer.qkv_proj, x, y, opening[index], ways.qkv).view(rows, -1, layer.head_dim)
            mixed = self.attended(layer, qkv, positions, attention, ways.during)
            norm, after = _weight(layer.mlp_norm), layer.attention_output_norm
            y = self._close(
                layer,
                layer.o_proj,
                x,
                mixed,
                after,
                None if experts is None and _norms(ways.gate_up) else norm,
                ways.o,
                ahead=_ahead(None if experts is not None else layer.gate_up_proj, ways.gate_up, ways),
            )
            if experts is not None:
                shared = layer.shared
                y = join_experts(
                    x,
                    experts_parts(y, experts, self._activation),
                    experts.chosen,
                    after=_weight(layer.mlp_output_norm),
                    before=following,
                    eps=self._eps,
                    offset=self._offset,
                    residual_scale=layer.residual_scale,
                    y=out if last else None,
                    beside=None if shared is None else shared_expert(y, shared, self._activation),
                )
                continue
            gated = self._open(
                layer.gate_up_proj,
                x,
                y,
                norm,
                ways.gate_up,
                self._activation,
                _ahead(layer.down_proj, ways.down, ways),
            )
            y = self._close(
                layer,
                layer.down_proj,
                x,
                gated,
                layer.mlp_output_norm,
                following,
                ways.down,
                out if last else None,
                _ahead(behind, ways.qkv, ways),
            )
        return y

    def forms(self, rows: int) -> set[Hashable]:
        """What kernels a pass of so many rows launches: equal elements are the same compilations."""
        ways = self._ways_of(rows)
        found: set[Hashable] = {ways}
        early = launched_early(self._embedding.device)[0]
        # Layers of a kind are alike, and so is the kind of the one behind, whose first product is asked for.
        for layer in {layer.experts is None: layer for layer in self.layers}.values():
            asked = []
            if layer.experts is not None:
                found.add(shape_for(layer.experts, rows))
            elif early:
                gates = rows * kernels.programs_a_gate(layer.down_proj.in_features)
                asked = [
                    ("norm", _ahead(layer.gate_up_proj, ways.gate_up, ways), rows),
                    ("gate", _ahead(layer.down_proj, ways.down, ways), gates),
                    ("norm", _ahead(layer.qkv_proj, ways.qkv, ways), rows),
                ]
            found |= {(name, ahead_of(*ahead, programs)[1]) for name, ahead, programs in asked}
        return found

    def _ways_of(self, rows: int) -> Ways:
        return next((self.ways[most] for most in sorted(self.ways) if rows <= most), Ways())

    def _open(
        self,
        linear: Linear,
        x: Tensor,
        y: Tensor,
        norm: Tensor | None,
        shape: Shape | None,
        activation: str = "",
        ahead: tuple[Tensor | None, int] = (None, 0),
    ) -> Tensor:
        """A block's first product, of x, whose norm is y unless the product norms x itself."""
        if shape is None:
            out = linear(y)
            return kernels.gated_activation(out, activation, ahead) if activation else out
        if not _norms(shape):
            x, norm = y, None
        around = Around(norm=norm is not None, offset=self._offset, activation=activation)
        return product(
            x, linear.weight, linear.bias, shape, around, norm=norm, eps=self._eps, counts=self._counts
        )

    def _close(
        self,
        layer: DecoderLayer,
        linear: Linear,
        x: Tensor,
        inner: Tensor,
        after: RMSNorm | None,
        before: Tensor | None,
        shape: Shape | None,
        y: Tensor | None = None,
        ahead: tuple[Tensor | None, int] = (None, 0),
    ) -> Tensor:
        """A block's last product, of `inner`, added to x in place; then x's norm, or x without `before`."""
        scale = layer.residual_scale
        if shape is None:
            return kernels.add_norm(
                x,
                linear(inner),
                after=_weight(after),
                before=before,
                eps=self._eps,
                offset=self._offset,
                residual_scale=scale,
                y=y,
                ahead=ahead,
            )
        product(
            inner,
            linear.weight,
            linear.bias,
            shape,
            Around(adds=True),
            y=x,
            residual_scale=scale,
            counts=self._counts,
        )
        return x if before is None else kernels.rms_norm(x, before, self._eps, offset=self._offset, y=y)

    def attended(
        self,
        layer: DecoderLayer,
        qkv: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        during: int = 0,
    ) -> Tensor:
        """Attention of a layer, and what queries and keys pass through before.

        Args:
            qkv: [T, heads + 2 * kv_heads, head_dim], which may be overwritten.
            positions: [T] int64.
            attention: a backend whose `plan` was called for these rows.
            during: see `Ways`.

        Returns:
            [T, heads * head_dim].
        """
        heads, rotated = layer.num_heads, layer.num_heads + layer.num_kv_heads
        table, norm = self._local if layer.local else self._table, layer.qk_norm
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        rotary = Rotary(table.cos, table.sin)
        if isinstance(norm, HeadNorm) and table.cos.shape[1] == layer.head_dim:
            rotary = Rotary(table.cos, table.sin, norm.weight, norm.eps, norm.offset, layer.qk_norm_last)
        elif norm is not None:
            qk = norm(qk)
        q, k = qk[:, :heads], qk[:, heads:]
        if not isinstance(attention, RotatingAttention):
            kernels.rotate(qk, positions, rotary)
            return attention.attend(layer.index, q, k, v, sinks=layer.sinks)
        if not attention.rotates:
            kernels.rotate(qk, positions, rotary)
        later = rotary if attention.rotates else None
        ahead = (layer.o_proj.weight if during else None, during)
        return attention.attend(layer.index, q, k, v, later, ahead, sinks=layer.sinks)


def _norms(shape: Shape | None) -> bool:
    """Whether a block's first product norms its input itself."""
    return shape is not None and not shape.streams


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _ahead(linear: Linear | None, shape: Shape | None, ways: Ways) -> tuple[Tensor | None, int]:
    """What to ask for in front of a product: its weight, if it is torch's."""
    if linear is None or shape is not None or linear.quantized is not None:
        return None, 0
    return linear.weight, ways.ahead
