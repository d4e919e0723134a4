"""Rows in the pool: written, cleared and moved where they should be, and nowhere else."""

from __future__ import annotations

import torch

from engine.cache.pool import KVPool

LAYERS, BLOCKS, BLOCK, KV_HEADS, HEAD_DIM = 3, 5, 4, 2, 8


def numbered_pool() -> KVPool:
    """A pool in which every row of every layer differs from all others."""
    pool = KVPool(
        num_layers=LAYERS,
        num_blocks=BLOCKS,
        block_size=BLOCK,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert not pool.data.any(), "fresh memory must hold no NaN"
    pool.data.copy_(torch.arange(pool.data.numel(), dtype=torch.float32).view_as(pool.data))
    return pool


def test_write_touches_the_rows_of_one_layer_only() -> None:
    pool = numbered_pool()
    wanted = pool.data.clone()
    rows = torch.tensor([7, 18])
    k, v = torch.randn(2, 2, KV_HEADS, HEAD_DIM)
    wanted[1, 0].view(-1, KV_HEADS, HEAD_DIM)[rows] = k
    wanted[1, 1].view(-1, KV_HEADS, HEAD_DIM)[rows] = v
    pool.write(1, rows, k, v)
    assert torch.equal(pool.data, wanted)


def test_move_reads_all_sources_before_it_writes_any_target() -> None:
    pool = numbered_pool()
    before = pool.data.clone().flatten(2, 3)
    source, target = torch.tensor([9, 11, 12]), torch.tensor([8, 9, 11])
    wanted = before.clone()
    wanted[:, :, target] = before[:, :, source]
    pool.move(source, target)
    assert torch.equal(pool.data.flatten(2, 3), wanted)


def test_clear_zeroes_whole_blocks_in_every_layer() -> None:
    pool = numbered_pool()
    wanted = pool.data.clone()
    wanted[:, :, [2, 4]] = 0.0
    pool.clear(torch.tensor([2, 4]))
    assert torch.equal(pool.data, wanted)
