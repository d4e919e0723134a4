"""Attention on the CPU: trees by a kernel of our own, prompts by torch's.

In float32 the trees of a step, and short chunks, are attended to where their K/V lie (cpu_kernels.py).

Long chunks and other dtypes go through torch: short contexts as one padded batch, a long one by itself. A
padded batch has to be copied together layer by layer. At long contexts that costs more than the model's
weights, so such a sequence is attended to alone, without a copy if its blocks follow one another in the
pool. A short one is not worth a kernel of its own. Which way a sequence goes depends on nothing but its own
length, and its padding changes no bit of its result, so neither do its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.attention import cpu_kernels as kernels
from engine.attention.base import AttentionInput
from engine.attention.sdpa import SdpaAttention
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES
from engine.cpu_team import Arguments, Team

__all__ = ["CpuAttention"]

_SHORT = 256
"""Most cached rows of a sequence that joins the padded batch. Alone costs 24 µs a layer and 0.23 µs a
row, together 0.36 µs a row. And up to about 384 keys MKL sums P V in one order whatever the padding."""

_CHUNK = 64
"""More new rows than a tree has nodes are a chunk of a prompt, which comes without neighbours."""


_NO_WINDOW = 1 << 40


@dataclass(frozen=True, slots=True)
class _Alone:
    """A sequence that is attended to by itself.

    Args:
        first: its first query row.
        queries: its query rows.
        keys: its cached rows and new ones, from the first that a query sees up to the last computed.
        start: pool row of the first key, if its blocks follow one another; else its place in `blocks`.
        blocks: else its blocks, [n] int64.
        mask: [queries, keys], additive; None where every query sees every key.
    """

    first: int
    queries: int
    keys: int
    start: int
    blocks: Tensor | None
    mask: Tensor | None


class _TreeAttention:
    """The kernel and its arguments."""

    def __init__(self, scale: float | None, windows: Sequence[int | None] | None) -> None:
        self._scale, self._windows = scale, windows
        self._team = Team()
        self._arguments = Arguments()
        self._kept: list[Tensor] = []
        self._factor = np.ones(1, dtype=np.float32)
        self._layers: list[tuple[int, int]] = []
        self._pool: KVPool | None = None
        self._most = 0  # new rows of one sequence

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        num_sequences, num_rows = batch.rows.shape
        kv_heads, head_dim = pool.data.shape[-2:]
        index = batch.index
        if index is None:
            index = torch.arange(num_sequences * num_rows)
        columns = index % num_rows
        first = torch.searchsorted(index, torch.arange(num_sequences + 1) * num_rows)
        ancestors = (
            (2 << columns) - 1  # all up to itself; 63 wraps to -1, all bits
            if batch.ancestors is None
            else batch.ancestors.flatten()[index]
        )
        depths = columns if batch.depths is None else batch.depths.flatten()[index]
        rows = batch.rows.flatten()[index]
        tables, lengths = batch.block_tables.contiguous(), batch.lengths.contiguous()
        self._kept = [first, lengths, tables, ancestors, columns, depths, rows]
        if pool is not self._pool:
            self._pool = pool
            self._layers = [(keys.data_ptr(), values.data_ptr()) for keys, values in pool.data]
        self._factor[0] = (head_dim**-0.5 if self._scale is None else self._scale) * math.log2(math.e)
        a = self._arguments
        a[kernels.POOL_ROWS] = pool.num_blocks * pool.block_size
        a[kernels.KV_HEADS], a[kernels.HEAD_DIM], a[kernels.BLOCK] = kv_heads, head_dim, pool.block_size
        a[kernels.SCALE] = self._factor.ctypes.data
        a[kernels.FIRST], a[kernels.LENGTHS] = first.data_ptr(), lengths.data_ptr()
        a[kernels.TABLES], a[kernels.WIDTH] = tables.data_ptr(), tables.shape[1]
        a[kernels.ANCESTORS], a[kernels.COLUMNS] = ancestors.data_ptr(), columns.data_ptr()
        a[kernels.DEPTHS], a[kernels.ROWS_TO] = depths.data_ptr(), rows.data_ptr()
        a[kernels.T], a[kernels.B], a[kernels.WINDOW] = len(index), num_sequences, _NO_WINDOW
        self._most = int(first.diff().max())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        a = self._arguments
        tokens, heads, head_dim = q.shape
        q, k, v = _rows_of_heads(q), _rows_of_heads(k), _rows_of_heads(v)
        out = torch.empty(tokens, heads * head_dim)
        parts = -(-self._most * heads // int(a[kernels.KV_HEADS]) // kernels.ROWS)
        a[kernels.Q], a[kernels.Q_STEP] = q.data_ptr(), q.stride(0)
        a[kernels.K], a[kernels.K_STEP] = k.data_ptr(), k.stride(0)
        a[kernels.V], a[kernels.V_STEP] = v.data_ptr(), v.stride(0)
        a[kernels.OUT], a[kernels.HEADS], a[kernels.PARTS] = out.data_ptr(), heads, parts
        a[kernels.KEYS], a[kernels.VALUES] = self._layers[layer]
        if self._windows is not None:
            window = self._windows[layer]
            a[kernels.WINDOW] = _NO_WINDOW if window is None else window
        sinks = None if sinks is None else sinks.float()
        a[kernels.SINKS] = 0 if sinks is None else sinks.data_ptr()
        self._team.run(kernels.attend, a, int(a[kernels.B] * a[kernels.KV_HEADS]) * parts)
        return out


class CpuAttention:
    """Grouped-query attention on the CPU, by the ways that the module's docstring tells.

    Args:
        group: query heads per K/V head.
        scale: factor on q k^T; None is head_dim ** -0.5.
        windows: each layer's window in positions, None for a layer without; None where no layer has one.
    """

    def __init__(
        self, group: int, *, scale: float | None = None, windows: Sequence[int | None] | None = None
    ) -> None:
        self._group, self._scale, self._windows = group, scale, windows
        self._together = SdpaAttention(group, scale=scale, windows=windows)
        self._pool: KVPool | None = None
        self._rows = torch.empty(0, dtype=torch.int64)
        self._alone: list[_Alone] = []
        self._windowed: dict[int | None, list[_Alone]] = {}
        self._short: Tensor | None = None
        self._trees = _TreeAttention(scale, windows)
        self._in_kernel = False

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        self._in_kernel = pool.dtype is torch.float32 and batch.rows.shape[1] <= MAX_TREE_NODES
        if self._in_kernel:
            self._trees.plan(batch, pool)
            return
        self._pool = pool
        self._rows = batch.rows.flatten() if batch.index is None else batch.rows.flatten()[batch.index]
        num_sequences, num_rows = batch.rows.shape
        short = [length <= _SHORT and num_rows <= _CHUNK for length in batch.lengths.tolist()]
        if all(short):
            self._alone, self._short = [], None
            self._together.plan(batch, pool)
            return
        index = torch.arange(num_sequences * num_rows) if batch.index is None else batch.index
        owners = index // num_rows
        bounds = [0, *owners.bincount(minlength=num_sequences).cumsum(0).tolist()]
        nodes = {
            b: index[bounds[b] : bounds[b + 1]] - b * num_rows
            for b in range(num_sequences)
            if not short[b] and bounds[b] < bounds[b + 1]
        }
        visible = batch.visible()
        self._alone = [_alone(batch, pool, b, nodes[b], visible[b], bounds[b]) for b in nodes]
        if self._windows is not None:
            positions = batch.positions()
            self._windowed = {None: self._alone}
            for window in {window for window in self._windows if window is not None}:
                self._windowed[window] = [
                    _alone_in_window(batch, pool, b, nodes[b], part, positions[b], window)
                    for b, part in zip(nodes, self._alone, strict=True)
                ]
        self._short = torch.tensor(short)[owners].nonzero().flatten()
        if len(self._short):
            self._together.plan(_subset(batch, short, index[self._short]), pool)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        if self._in_kernel:
            return self._trees.attend(layer, q, k, v, sinks)
        pool = self._pool
        if pool is None:
            raise RuntimeError("plan() must be called before attend()")
        pool.write(layer, self._rows, k, v)
        if self._short is None:
            return self._together.read(layer, q, sinks)
        alone = self._alone if self._windows is None else self._windowed[self._windows[layer]]
        outputs = [self._attend_alone(pool, layer, part, q, sinks) for part in alone]
        if len(outputs) == 1 and not len(self._short):
            return outputs[0]
        joined = q.new_empty(len(q), q.shape[1] * q.shape[2])
        for part, out in zip(self._alone, outputs, strict=True):
            joined[part.first : part.first + part.queries] = out
        if len(self._short):
            joined.index_copy_(0, self._short, self._together.read(layer, q[self._short], sinks))
        return joined

    def _attend_alone(
        self, pool: KVPool, layer: int, part: _Alone, q: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """[queries, heads * head_dim] of one sequence."""
        if part.blocks is None:
            keys, values = pool.rows(layer, part.start, part.keys)
        else:
            keys, values = pool.collect(layer, part.blocks, part.start, part.keys)
        # The kernel takes any strides: K/V heads stand as its batch, and the heads of a group share them.
        kv_heads, _, head_dim = keys.shape
        shape = (kv_heads, self._group, part.keys, head_dim)
        query = q.narrow(0, part.first, part.queries)
        query = query.view(part.queries, kv_heads, self._group, head_dim).permute(1, 2, 0, 3)
        out, logarithms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            query,
            keys.unsqueeze(1).expand(shape),
            values.unsqueeze(1).expand(shape),
            attn_mask=part.mask,
            scale=self._scale,
        )
        if sinks is not None:  # of all weights' sum, keys have so much less
            share = torch.sigmoid(logarithms - sinks.float().view(kv_heads, self._group, 1))
            out = (out * share.unsqueeze(-1)).to(q.dtype)
        mixed: Tensor = out.permute(2, 0, 1, 3).reshape(part.queries, -1)
        return mixed


def _rows_of_heads(x: Tensor) -> Tensor:
    """[T, heads, head_dim], copied unless only its rows may lie apart, by whole heads."""
    dim = x.shape[2]
    return x if x.stride()[1:] == (dim, 1) and x.stride(0) % dim == 0 else x.contiguous()


def _alone(batch: AttentionInput, pool: KVPool, b: int, nodes: Tensor, visible: Tensor, first: int) -> _Alone:
    """Sequence b, of whose new rows `nodes` ([n] int64, ascending) are computed; visible is its [N, N]."""
    length, new = int(batch.lengths[b]), int(nodes[-1]) + 1
    keys, mask = length + new, None
    if new > 1:
        mask = torch.zeros(len(nodes), keys, dtype=pool.dtype)
        mask[:, length:].masked_fill_(~visible[nodes, :new], float("-inf"))
    blocks = batch.block_tables[b, : -(-keys // pool.block_size)]
    scattered = bool((blocks.diff() != 1).any())
    return _Alone(
        first=first,
        queries=len(nodes),
        keys=keys,
        start=0 if scattered else int(blocks[0]) * pool.block_size,
        blocks=blocks if scattered else None,
        mask=mask,
    )


def _alone_in_window(
    batch: AttentionInput, pool: KVPool, b: int, nodes: Tensor, whole: _Alone, positions: Tensor, window: int
) -> _Alone:
    """The same for a layer with a window: keys that no query reaches are not read at all.

    Args:
        whole: the sequence in a layer without a window.
        positions: [N] int64, of all its new rows.
    """
    length, queries = int(batch.lengths[b]), positions[nodes]
    first = max(0, min(length, int(queries.min()) - window + 1))
    keys = torch.cat((torch.arange(first, length), positions[: whole.keys - length]))
    seen = keys[None, :] > queries[:, None] - window
    if whole.mask is not None:
        mask = whole.mask[:, first:].masked_fill(~seen, float("-inf"))
    else:
        mask = torch.zeros(seen.shape, dtype=pool.dtype).masked_fill_(~seen, float("-inf"))
    skipped = first // pool.block_size if whole.blocks is not None else 0
    return replace(
        whole,
        keys=whole.keys - first,
        start=whole.start + first - skipped * pool.block_size,
        blocks=None if whole.blocks is None else whole.blocks[skipped:],
        mask=mask,
    )


def _subset(batch: AttentionInput, chosen: list[bool], positions: Tensor) -> AttentionInput:
    """The chosen sequences of a batch; `positions` are those of their computed rows in the whole grid."""
    num_rows = batch.rows.shape[1]
    keep = torch.tensor(chosen)
    place = keep.cumsum(0) - 1
    lengths = batch.lengths[keep]
    return AttentionInput(
        block_tables=batch.block_tables[keep],
        lengths=lengths,
        rows=batch.rows[keep],
        max_length=min(batch.max_length, int(lengths.max()) + num_rows),
        ancestors=None if batch.ancestors is None else batch.ancestors[keep],
        index=place[positions // num_rows] * num_rows + positions % num_rows,
        depths=None if batch.depths is None else batch.depths[keep],
    )
