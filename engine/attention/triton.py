"""Attention on CUDA: Triton kernels that read the pool in place.

Imported where it is used only: Triton comes with CUDA builds of torch, and machines without a GPU need none
of it. With TRITON_INTERPRET=1 in the environment before Triton is imported, it runs on the CPU, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from engine.attention.base import AttentionInput, Rotary
from engine.attention.triton_join import join_kernel
from engine.attention.triton_kernels import attend_kernel
from engine.attention.triton_tiles import (
    LEAST_ROWS,
    Kind,
    Tile,
    block_channels,
    candidates,
    join_shape,
    joined_at_once,
)
from engine.cache.pool import KVPool
from engine.triton_dependent import launched_early, lines_of

__all__ = ["TritonAttention"]

_MOST_TOGETHER = 2
"""Of a tile's `together`."""

_MOST_PARTS = 64
"""Parts of a query row's keys; the second kernel holds them all in registers."""

_MOST_NODES = 32
"""Nodes of a tree that are taken as keys at once where they are rotated, which passes through registers."""

_ROWS_EACH = 4
"""Rows (of a token and head) for each multiprocessor up to which a program of the second kernel joins one."""


class _Cut(NamedTuple):
    """How the work of a step is cut up.

    Args:
        kind: of its query rows; tile: for these.
        parts: how many parts the keys come in, for each window of a layer.
    """

    kind: Kind
    tile: Tile
    parts: dict[int | None, int]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the layers of a step share.

    Args:
        pool: of all layers.
        batch: of the step.
        tokens: T.
        tile: for its query rows.
        at_once: rows and parts that a program joins at a time, where the tile joins.
        new_keys: of a tile of new rows.
        rotates: the kernel takes q and k as the layer's product gives them.
        row_of: [B, N] int64, the token of each new row or -1; read only where the batch has an index.
        parts: how many parts the keys come in, for each window of a layer.
        mixed: [parts, T, heads, head_dim] float32, the parts' outputs; empty where no layer is split.
        weight: [parts, T, heads] float32, log2 of their weights' sums.
        counts: int32, where programs count those that are done; all zeros between launches.
    """

    pool: KVPool
    batch: AttentionInput
    tokens: int
    tile: Tile
    at_once: tuple[int, int]
    new_keys: int
    rotates: bool
    row_of: Tensor
    parts: dict[int | None, int]
    mixed: Tensor
    weight: Tensor
    counts: Tensor


class TritonAttention:
    """Grouped-query attention for prefill chunks and for trees of at most 64 nodes.

    It reads no value from the device, and no shape depends on one, so a step can be captured in a CUDA
    graph; `AttentionInput.max_length` is then the bound for all replays. Rows of `AttentionInput.rows` that
    stand for invalid nodes may point anywhere that nobody reads, such as block 0.

    What `plan` is given, and what it writes, `attend` reads before the kernel in front of it has ended: there
    lies a layer's product between, or another kernel that parts them (`engine.triton_dependent`).

    Args:
        group: query heads per K/V head.
        scale: factor on q k^T; None is head_dim ** -0.5.
        windows: each layer's window in positions, None for a layer without; None where no layer has one.
        tiles: the tile for each kind of query rows; without any the first of `candidates` is taken.
        processors: multiprocessors to fill; None asks the device.
    """

    ragged = True

    def __init__(
        self,
        group: int,
        *,
        scale: float | None = None,
        windows: Sequence[int | None] | None = None,
        tiles: Mapping[Kind, Tile] | None = None,
        processors: int | None = None,
    ) -> None:
        self._group, self._scale, self._windows = group, scale, windows
        self._tiles, self._processors = tiles or {}, processors
        self._plan: _Plan | None = None
        self._counts: Tensor | None = None

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        kv_heads, head_dim = pool.data.shape[-2:]
        sequences, num_rows = batch.rows.shape
        tokens, row_of = sequences * num_rows, batch.rows
        if batch.index is not None:
            tokens = len(batch.index)
            row_of = torch.full((sequences, num_rows), -1, dtype=torch.int64, device=pool.device)
            row_of.view(-1)[batch.index] = torch.arange(tokens, device=pool.device)
        tree = batch.ancestors is not None
        kind, tile, parts = self._cut(sequences, num_rows, batch.max_length - num_rows, pool, tree=tree)
        most = max(parts.values())
        shape = (most, tokens, kv_heads * self._group) if most > 1 else (0, 0, 0)
        # In a chunk the same key is loaded by many programs.
        rotates = tree and tile.rotates
        joined = num_rows * self._group if tree else kind.rows  # of chunks, the same for all of a kind
        self._plan = _Plan(
            pool=pool,
            batch=batch,
            tokens=tokens,
            tile=tile,
            at_once=joined_at_once(tile, joined, block_channels(head_dim)) if tile.joins else (1, 1),
            new_keys=self._new_keys(kind, tile, rotates) if tree else tile.keys,
            rotates=rotates,
            row_of=row_of,
            parts=parts,
            mixed=torch.empty(*shape, head_dim, dtype=torch.float32, device=pool.device),
            weight=torch.empty(shape, dtype=torch.float32, device=pool.device),
            counts=self._zeros(pool.device),
        )

    @property
    def rotates(self) -> bool:
        return self._plan is not None and self._plan.rotates

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Rotary | None = None,
        ahead: tuple[Tensor | None, int] = (None, 0),
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        plan = self._plan
        if plan is None:
            raise RuntimeError("plan() must be called before attend()")
        batch, pool, tile = plan.batch, plan.pool, plan.tile
        sequences, num_rows = batch.rows.shape
        heads, head_dim = q.shape[1:]
        kv_heads, channels = heads // self._group, block_channels(head_dim)
        scale = head_dim**-0.5 if self._scale is None else self._scale
        window = None if self._windows is None else self._windows[layer]
        parts = plan.parts[window]
        q, k, v = _heads_in_a_row(q), _heads_in_a_row(k), _heads_in_a_row(v)
        k_pool, v_pool = pool.layer_rows(layer)
        ancestors = batch.lengths if batch.ancestors is None else batch.ancestors
        depths = batch.lengths if batch.depths is None else batch.depths
        norm, half = None, 0
        cos = sin = q
        if rotary is not None:
            norm, cos, sin, half = rotary.norm, rotary.cos, rotary.sin, rotary.cos.shape[1] // 2
        out = q.new_empty(plan.tokens, heads * head_dim)
        early, options = launched_early(q.device)
        planes = parts + 1 if parts > 1 else 1
        attend_kernel[triton.cdiv(num_rows * self._group, tile.rows), planes * kv_heads, sequences](
            q,
            k,
            v,
            out,
            plan.mixed,
            plan.weight,
            plan.counts,
            k_pool,
            v_pool,
            batch.block_tables,
            batch.lengths,
            batch.rows,
            plan.row_of,
            ancestors,
            depths,
            q if sinks is None else sinks,
            q if norm is None else norm,
            cos,
            sin,
            q if ahead[0] is None else ahead[0],
            0.0 if rotary is None else rotary.eps,
            scale * math.log2(math.e),
            plan.tokens,
            num_rows,
            tile.least_keys,
            lines_of(*ahead) if early else 0,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            batch.block_tables.stride(0),
            batch.rows.stride(0),
            ancestors.stride(0),
            depths.stride(0),
            TREE=batch.ancestors is not None,
            DEPTHS=batch.depths is not None,
            INDEXED=batch.index is not None,
            SPLIT=parts > 1,
            JOINS=tile.joins,
            SINKS=sinks is not None,
            WINDOW=window or 0,
            GROUP=self._group,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            HALF=half,
            NORM=0 if rotary is None else rotary.kind,
            OFFSET=rotary is not None and rotary.offset,
            BLOCK_SIZE=pool.block_size,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.keys,
            BLOCK_NEW=plan.new_keys,
            BLOCK_D=channels,
            BLOCK_W=triton.next_power_of_2(triton.cdiv(tile.rows, self._group)),
            BLOCK_J=plan.at_once[0],
            BLOCK_P=plan.at_once[1],
            PRECISION="ieee",
            EARLY=early,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **options,
        )
        if parts > 1 and not tile.joins:
            rows = plan.tokens * heads
            block_rows, block_parts = join_shape(channels, one=self._one_each(rows, q.device))
            join_kernel[(triton.cdiv(rows, block_rows),)](
                plan.mixed,
                plan.weight,
                out,
                batch.lengths,
                batch.lengths if batch.index is None else batch.index,
                rows,
                num_rows,
                parts - 1,
                tile.least_keys,
                tile.keys,
                tile.rows if batch.ancestors is None else num_rows * self._group,
                INDEXED=batch.index is not None,
                WINDOW=window or 0,
                GROUP=self._group,
                HEADS=heads,
                HEAD_DIM=head_dim,
                BLOCK_M=block_rows,
                BLOCK_D=channels,
                BLOCK_P=block_parts,
                EARLY=early,
                num_warps=4,
                **options,
            )
        return out

    def forms(self, sizes: Sequence[int], cached: int, pool: KVPool) -> set[Hashable]:
        """What kernels a pass over prompts launches: equal elements are one compilation.

        Args:
            sizes: new rows of each sequence.
            cached: most rows that one of them has in the pool.
        """
        ragged = min(sizes) < max(sizes)
        kind, tile, parts = self._cut(len(sizes), max(sizes), cached, pool, tree=False)
        found: set[Hashable] = {(kind, window, some > 1, ragged) for window, some in parts.items()}
        if max(parts.values()) > 1 and not tile.joins:
            one = self._one_each(sum(sizes) * pool.data.shape[-2] * self._group, pool.device)
            found |= {(window, one, ragged) for window, some in parts.items() if some > 1}
        return found

    def undivided(self, pool: KVPool) -> int:
        """Cached rows of a prompt up to which they are never split."""
        return max(self._tile(kind, pool).least_keys for kind in Kind.of_prompts())

    def _tile(self, kind: Kind, pool: KVPool) -> Tile:
        if kind in self._tiles:
            return self._tiles[kind]
        # Trees are measured up to the largest there may be, and a short chunk may have more rows. What ran
        # for fewer runs for these; a guess might ask for more shared memory than there is.
        measured = [other for other in self._tiles if other.chunk == kind.chunk]
        if measured:
            return self._tiles[max(measured)]
        return candidates(kind, block_channels(pool.data.shape[-1]), pool.dtype.itemsize)[0]

    def _cut(self, sequences: int, num_rows: int, cached: int, pool: KVPool, *, tree: bool) -> _Cut:
        query_rows = num_rows * self._group
        kind = Kind.of(query_rows, tree=tree)
        tile = self._tile(kind, pool)
        programs = triton.cdiv(query_rows, tile.rows) * pool.data.shape[-2] * sequences
        parts = {
            window: self._parts(
                tile, programs, cached if window is None else min(cached, window), pool.device
            )
            for window in (self._windows or (None,))
        }
        return _Cut(kind, tile, parts)

    def _one_each(self, rows: int, device: torch.device) -> bool:
        """Whether programs of the second kernel join one of so many rows each."""
        return rows <= _ROWS_EACH * self._multiprocessors(device)

    def _new_keys(self, kind: Kind, tile: Tile, rotates: bool) -> int:
        """Nodes in a tile of keys: all of them, or few."""
        nodes: int = triton.next_power_of_2(triton.cdiv(kind.rows, self._group))
        return min(tile.keys, max(LEAST_ROWS, min(nodes, _MOST_NODES) if rotates else nodes))

    def _multiprocessors(self, device: torch.device) -> int:
        if self._processors is None:
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        return self._processors

    def _zeros(self, device: torch.device) -> Tensor:
        """Made once, for graphs to find it where it was; keys are split among few programs only."""
        if self._counts is None:
            size = self._multiprocessors(device) * _MOST_TOGETHER
            self._counts = torch.zeros(size, dtype=torch.int32, device=device)
        return self._counts

    def _parts(self, tile: Tile, programs: int, cached: int, device: torch.device) -> int:
        """In how many parts to take keys, `cached` of which are in the pool at most.

        Args:
            programs: those of one part.
        """
        processors = self._multiprocessors(device)
        idle = processors * tile.together // programs
        shares = min(idle, triton.cdiv(cached, tile.least_keys), _MOST_PARTS - 1)
        return 1 if shares < 2 else shares + 1  # the new rows are a part of their own


def _heads_in_a_row(x: Tensor) -> Tensor:
    """x [T, heads, head_dim], copied only where a token's heads do not follow one another."""
    _, heads, head_dim = x.shape
    packed = x.stride(2) == 1 and (heads == 1 or x.stride(1) == head_dim)
    return x if packed else x.contiguous()
