"""The layers of a decoder on CUDA, with what lies between two products in Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from engine.attention.base import AttentionBackend, Rotary, RotatingAttention
from engine.model import triton_kernels as kernels
from engine.model.layers import HeadNorm, RMSNorm, RotaryTable

if TYPE_CHECKING:
    from engine.model.decoder import DecoderLayer

__all__ = ["FusedLayers"]


class FusedLayers:
    """Embedding, all layers and the final norm; the same function as the plain path, for every family.

    The norm that opens a block is computed by the kernel that closes the one before, across layers too.

    Args:
        layers: from the first to the last; they keep their weights.
        final_norm: after the last.
        embedding: [vocab, hidden]; embedding_scale: its factor.
        table: of the layers without a window; local: of those with one, None where it is the same.
        offset: norms multiply by 1 + weight.
        activation: of the MLP's gate.
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
        self._layers, self._offset, self._activation = list(layers), offset, activation
        self._eps = final_norm.eps
        self._embedding, self._scale = embedding, embedding_scale
        self._table, self._local = table, table if local is None else local
        self._opening = [_weight(layer.input_norm) for layer in self._layers]
        self._opening.append(final_norm.weight)

    def __call__(
        self, tokens: Tensor, positions: Tensor, attention: AttentionBackend, out: Tensor | None = None
    ) -> Tensor:
        """See `Decoder.forward`."""
        opening = self._opening
        x, y = kernels.embed(tokens, self._embedding, self._scale, opening[0], self._eps, offset=self._offset)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv_proj(y).view(len(x), -1, layer.head_dim)
            mixed = self._attended(layer, qkv, positions, attention)
            y = self._add(layer, x, layer.o_proj(mixed), layer.attention_output_norm, _weight(layer.mlp_norm))
            gated = kernels.gated_activation(layer.gate_up_proj(y), self._activation)
            last = out if index + 1 == len(self._layers) else None
            y = self._add(layer, x, layer.down_proj(gated), layer.mlp_output_norm, opening[index + 1], last)
        return y

    def _attended(
        self, layer: DecoderLayer, qkv: Tensor, positions: Tensor, attention: AttentionBackend
    ) -> Tensor:
        """Attention over qkv [T, heads + 2 * kv_heads, head_dim], which may be overwritten."""
        heads, rotated = layer.num_heads, layer.num_heads + layer.num_kv_heads
        table, norm = self._local if layer.local else self._table, layer.qk_norm
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        rotary = Rotary(table.cos, table.sin)
        if isinstance(norm, HeadNorm) and table.cos.shape[1] == layer.head_dim:
            rotary = Rotary(table.cos, table.sin, norm.weight, norm.eps, norm.offset)
        elif norm is not None:
            qk = norm(qk)
        if isinstance(attention, RotatingAttention) and attention.rotates:
            return attention.attend(layer.index, qk[:, :heads], qk[:, heads:], v, rotary)
        kernels.rotate(qk, positions, rotary)
        return attention.attend(layer.index, qk[:, :heads], qk[:, heads:], v)

    def _add(
        self,
        layer: DecoderLayer,
        x: Tensor,
        out: Tensor,
        norm: RMSNorm | None,
        following: Tensor | None,
        y: Tensor | None = None,
    ) -> Tensor:
        return kernels.add_norm(
            x,
            out,
            after=_weight(norm),
            before=following,
            eps=self._eps,
            offset=self._offset,
            residual_scale=layer.residual_scale,
            y=y,
        )


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight
