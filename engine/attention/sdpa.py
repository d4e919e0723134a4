"""Reference attention for any device: gather the prefix from the pool, then torch's SDPA with a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import AttentionInput
from engine.cache.pool import KVPool

__all__ = ["SdpaAttention"]


class SdpaAttention:
    """Grouped-query attention; the group is folded into the query rows, so K/V are never repeated.

    Args:
        group: query heads per K/V head.
        scale: factor on q k^T; None is head_dim ** -0.5.
        windows: each layer's window in positions, None for a layer without; None where no layer has one.
    """

    def __init__(
        self, group: int, *, scale: float | None = None, windows: Sequence[int | None] | None = None
    ) -> None:
        self._group, self._scale, self._windows = group, scale, windows
        self._batch: AttentionInput | None = None
        self._pool: KVPool | None = None
        self._index = torch.empty(0, dtype=torch.int64)
        self._mask = torch.empty(0)
        self._windowed: dict[int | None, Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.int64)

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        self._batch, self._pool = batch, pool
        num_blocks = -(-batch.max_length // pool.block_size)
        self._index = pool.gather_index(batch.block_tables[:, :num_blocks])
        mask = additive_mask(batch, num_blocks * pool.block_size, pool.dtype)
        self._mask = mask.repeat(1, 1, self._group, 1)
        if self._windows is not None:
            self._windowed = {None: self._mask}
            for window in {window for window in self._windows if window is not None}:
                narrowed = mask.masked_fill(~within_window(batch, mask.shape[-1], window), float("-inf"))
                self._windowed[window] = narrowed.repeat(1, 1, self._group, 1)
        self._rows = batch.rows.flatten() if batch.index is None else batch.rows.flatten()[batch.index]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        if self._batch is None or self._pool is None:
            raise RuntimeError("plan() must be called before attend()")
        self._pool.write(layer, self._rows, k, v)
        return self.read(layer, q, sinks)

    def read(self, layer: int, q: Tensor, sinks: Tensor | None = None) -> Tensor:
        """`attend` for rows whose K/V are in the pool already."""
        if self._batch is None or self._pool is None:
            raise RuntimeError("plan() must be called before read()")
        pool, (batch, num_rows), index = self._pool, self._batch.rows.shape, self._batch.index
        group, (kv_heads, head_dim) = self._group, pool.data.shape[-2:]
        keys, values = pool.gather(layer, self._index, batch)  # [B, context, kv_heads, head_dim]
        if index is not None:
            q = q.new_zeros(batch * num_rows, *q.shape[1:]).index_copy_(0, index, q)
        q = q.view(batch, num_rows, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(batch, kv_heads, group * num_rows, head_dim)
        mask = self._mask if self._windows is None else self._windowed[self._windows[layer]]
        if sinks is not None:
            # A key of zeros in front, whose score the mask makes the sink.
            keys, values = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (keys, values))
            sink = sinks.to(mask.dtype).view(1, kv_heads, group, 1).expand(batch, -1, -1, num_rows)
            mask = torch.cat((sink.reshape(batch, kv_heads, -1, 1), mask.expand(-1, kv_heads, -1, -1)), -1)
        out = F.scaled_dot_product_attention(
            q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=self._scale
        )
        out = out.view(batch, kv_heads, group, num_rows, head_dim).permute(0, 3, 1, 2, 4)
        out = out.reshape(batch * num_rows, -1)
        return out if index is None else out[index]


def additive_mask(batch: AttentionInput, context: int, dtype: torch.dtype) -> Tensor:
    """0 where a query may look and -inf elsewhere, [B, 1, N, context] of `dtype`."""
    num_rows = batch.rows.shape[1]
    column = torch.arange(context, device=batch.lengths.device)
    offset = column[None, :] - batch.lengths[:, None]  # [B, context]: negative in the prefix
    new_row = offset.clamp(0, num_rows - 1)[:, None, :].expand(-1, num_rows, -1)
    sees_new = batch.visible().gather(2, new_row) & (offset < num_rows)[:, None, :]
    allowed = (offset < 0)[:, None, :] | ((offset >= 0)[:, None, :] & sees_new)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf")).unsqueeze(1)


def within_window(batch: AttentionInput, context: int, window: int) -> Tensor:
    """Which of `context` rows lie less than `window` positions before each query, [B, 1, N, context] bool."""
    num_rows = batch.rows.shape[1]
    queries = batch.positions()
    column = torch.arange(context, device=batch.lengths.device)
    new_row = (column[None, :] - batch.lengths[:, None]).clamp(0, num_rows - 1)
    cached = column[None, :] < batch.lengths[:, None]
    keys = torch.where(cached, column[None, :], queries.gather(1, new_row))  # [B, context]
    return (keys[:, None, :] > queries[:, :, None] - window).unsqueeze(1)
