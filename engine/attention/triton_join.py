"""The parts in which `attend_kernel` took keys, joined: by its last program, or by a kernel of their own."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.triton_dependent import launches_next, waits

__all__ = ["first_key", "join_kernel", "join_parts", "shared_out"]


@triton.jit
def first_key(length, depth, WINDOW: tl.constexpr, tile_keys):
    """The first cached row that is read for query rows of which none is before `depth`, of a tile of keys."""
    first = length * 0
    if WINDOW:  # nobody looks at what lies before
        first = tl.maximum(length + depth - WINDOW + 1, 0) // tile_keys * tile_keys
    return tl.minimum(first, length)


@triton.jit
def shared_out(keys, shares, least_keys, tile_keys):
    """How cached rows are shared out among parts.

    Args:
        keys: so many rows; shares: among so many parts at most; least_keys: of a part.

    Returns:
        Keys of a part, of which the last may get fewer; how many parts get some, 0: one takes all keys.
    """
    share = tl.cdiv(tl.maximum(tl.cdiv(keys, shares), least_keys), tile_keys) * tile_keys
    filled = tl.cdiv(keys, share)
    return share, tl.where(filled > 1, filled, 0)


@triton.jit
def join_parts(
    part_ptr,
    weight_ptr,
    out_ptr,
    row,
    valid,
    filled,
    most,
    num_rows,
    channel,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The parts of a tile of query rows weighted together, always in the same order.

    Args:
        row: [BLOCK_M], of all `num_rows` rows of a part; valid: [BLOCK_M].
        filled: [BLOCK_M], a row has parts 0 .. filled; most: the largest of these.
    """
    stride = num_rows.to(tl.int64)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, most + 1, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = part.to(tl.int64)[:, None] * stride + row[None, :]
        there = (part[:, None] <= filled[None, :]) & valid[None, :]
        # From where the multiprocessors meet, not from this one's own cache.
        logarithm = tl.load(weight_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        inside = there[:, :, None] & (channel < HEAD_DIM)[None, None, :]
        output_at = at[:, :, None] * HEAD_DIM + channel[None, None, :]
        output = tl.load(part_ptr + output_at, mask=inside, other=0.0, cache_modifier=".cg")
        highest = tl.maximum(best, tl.max(logarithm, 0))
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(logarithm - reference[None, :])
        shrink = tl.exp2(best - reference)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink[:, None] + tl.sum(output * weight[:, :, None], 0)
        best = highest
    mixed = mixed * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    inside = valid[:, None] & (channel < HEAD_DIM)[None, :]
    out_at = row[:, None] * HEAD_DIM + channel[None, :]
    tl.store(out_ptr + out_at, mixed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_rows", "num_nodes", "shares", "least_keys", "tile_keys", "alike"],
    do_not_specialize_on_alignment=["length_ptr", "index_ptr"],
)
def join_kernel(
    part_ptr,
    weight_ptr,
    out_ptr,
    length_ptr,
    index_ptr,
    num_rows,
    num_nodes,
    shares,
    least_keys,
    tile_keys,
    alike,
    INDEXED: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The parts of `attend_kernel` weighted together, BLOCK_M of num_rows = T * HEADS rows a program.

    Rows whose keys came in one part are left as they are. How many parts a row has follows from its
    sequence's length, as in `attend_kernel`, so that it is known before that one has ended.

    Args:
        length_ptr, index_ptr: see `AttentionInput`; num_nodes: N.
        shares, least_keys, tile_keys: see `shared_out`.
        alike: so many query rows of a sequence have the same parts: those of a chunk's tile, all of a tree.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // HEADS
    if INDEXED:
        token = tl.load(index_ptr + token, mask=row < num_rows, other=0).to(tl.int32)
    length = tl.load(length_ptr + token // num_nodes, mask=row < num_rows, other=0).to(tl.int32)
    query_row = token % num_nodes * GROUP + row % GROUP
    begin = first_key(length, query_row // alike * alike // GROUP, WINDOW, tile_keys)
    _, filled = shared_out(length - begin, shares, least_keys, tile_keys)
    most = tl.max(filled, 0)
    channel = tl.arange(0, BLOCK_D)
    if EARLY:  # even if there is nothing to join
        waits()
        launches_next()
    if most > 0:
        join_parts(
            part_ptr, weight_ptr, out_ptr, row.to(tl.int64), filled > 0, filled, most, num_rows, channel,
            HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_P,
        )  # fmt: skip
