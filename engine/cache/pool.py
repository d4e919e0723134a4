"""The K/V memory of the whole engine: one tensor, allocated once, never resized."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVPool"]


class KVPool:
    """K/V rows of every layer in blocks of `block_size` tokens.

    One tensor [layers, 2, blocks, block_size, kv_heads, head_dim]; a flat row is
    block * block_size + offset. Freed rows keep their old values: what is not masked in was written first.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros, not empty: a masked-out NaN of fresh memory would still poison 0 * NaN in P @ V.
        shape = (num_layers, 2, num_blocks, block_size, kv_heads, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.dtype, self.device = dtype, device
        self._rows = self.data.view(num_layers, 2, num_blocks * block_size, kv_heads, head_dim)
        self._layer_rows = [(rows[0], rows[1]) for rows in self._rows]
        # K and V of a layer in one table of blocks: a single index_select over rows is the fastest copy.
        self._layer_blocks = [layer.flatten(2).flatten(0, 1) for layer in self.data]

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [tokens, kv_heads, head_dim] at flat `rows` [tokens] (int64) of one layer."""
        k_rows, v_rows = self._layer_rows[layer]
        k_rows.index_copy_(0, rows, k)
        v_rows.index_copy_(0, rows, v)

    def layer_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer in place, [pool rows, kv_heads, head_dim]."""
        return self._layer_rows[layer]

    def clear(self, blocks: Tensor) -> None:
        """Zero `blocks` [n] (int64) in every layer."""
        self.data.index_fill_(2, blocks, 0.0)

    def rows(self, layer: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        """K and V of `size` flat rows of one layer in place, [kv_heads, size, head_dim]."""
        k, v = self._layer_rows[layer]
        return k.narrow(0, start, size).transpose(0, 1), v.narrow(0, start, size).transpose(0, 1)

    def collect(self, layer: int, blocks: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
        """K and V of `size` rows of `blocks` ([n] int64) from `start`, copied, [kv_heads, size, head_dim]."""
        k, v = self.gather(layer, self.gather_index(blocks), 1)
        return k[0, start : start + size].transpose(0, 1), v[0, start : start + size].transpose(0, 1)

    def gather_index(self, blocks: Tensor) -> Tensor:
        """For `gather`, computed once for all layers: from blocks [batch, n] to int64 [2 * batch * n]."""
        flat = blocks.flatten()
        return torch.cat((flat, flat + self.num_blocks))

    def gather(self, layer: int, index: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, copied to [batch, n * block_size, kv_heads, head_dim]."""
        both = self._layer_blocks[layer].index_select(0, index)
        k, v = both.view(2, batch, -1, *self.data.shape[-2:]).unbind()
        return k, v

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` onto `target` ([n] int64, flat) in every layer.

        All sources are read before any target is written, so the two may overlap.
        """
        rows = self._rows.index_select(2, source)
        self._rows.index_copy_(2, target, rows)
