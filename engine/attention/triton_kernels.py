"""Attention over the paged pool as Triton kernels: prefill chunks and trees, one kernel for both.

A program takes one K/V head of one sequence, a tile of its query rows and a part of its keys. The query
heads that share the K/V head are rows of the tile too (row m is head m % GROUP of node m // GROUP), so K/V
are read once for all of them. Keys are the cached rows, read through the block table, and then the new
ones, read from where the layer computed them; whoever attends to a new row need not wait for it to be
written. Cached rows need no mask but in the last tile: every query sees all of them. In a chunk, which is
long at work, a loop of its own takes the other tiles; in a tree one loop is enough, and less code to fetch.

Queries and keys may come as the layer's product gives them. Whoever loads one then norms and rotates it, in
its registers only: what lies in memory stays as it was, so nobody finds it turned already.

Where the tiles alone would leave processors idle, the cached rows are split into parts (Dao et al. 2023,
Flash-Decoding): each part leaves its output and the logarithm of its weights' sum, and a second kernel
joins them, or with JOINS the last program to finish. Where one part would get all cached rows, it takes the
new ones too, and there is nothing to join. How many parts there may be depends on shapes only; how many of
them get keys depends on the lengths, which are read on the device. So all of it can be captured in a CUDA
graph.

Softmax and sums are in float32, and logarithms are to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.attention.triton_join import first_key, join_parts, shared_out
from engine.attention.triton_rotary import turned, write_new
from engine.triton_dependent import asks_in_turns, launches_next, waits

__all__ = ["attend_kernel"]


@triton.jit
def _absorb(q, k, v, seen, best, total, mixed, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax over one more tile of keys.

    Args:
        q: [BLOCK_M, BLOCK_D]; k, v: [BLOCK_N, BLOCK_D].
        seen: [BLOCK_M, BLOCK_N], which keys a row sees; all of them without MASKED.
        best: [BLOCK_M], the largest score of each row so far; total: [BLOCK_M], the sum of its weights
            relative to `best`; mixed: [BLOCK_M, BLOCK_D], the values' sum by these weights.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, 1))
    reference = highest
    if MASKED:  # a row that has seen no key yet
        reference = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(best - reference)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    return highest, total, mixed


@triton.jit
def _places(table_ptr, key, end, ROW: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where cached rows `key` [BLOCK_N] lie in the pool; those from `end` on, anywhere."""
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
    return (block * BLOCK_SIZE + key % BLOCK_SIZE) * ROW


@triton.jit
def _cached(
    q,
    best,
    total,
    mixed,
    place,
    begin,
    end,
    limit,
    position,
    k_ptr,
    v_ptr,
    table_ptr,
    channel,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Cached rows begin .. end - 1 of a sequence; without MASKED these are whole tiles that all rows see.

    Args:
        place: [BLOCK_N], where the first tile lies. The next tile's is looked up while this one is
            computed: were it looked up in the same turn, the loop's pipeline would spend its stages on it.
        limit: end of the rows that are looked up.
    """
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        at = place[:, None] + channel[None, :]
        # What lies behind the end may be anything, and 0 * NaN is NaN: it must not be loaded.
        if MASKED:
            inside = (key < end)[:, None] & (channel < HEAD_DIM)[None, :]
            k = tl.load(k_ptr + at, mask=inside, other=0.0)
            v = tl.load(v_ptr + at, mask=inside, other=0.0)
        elif channel.shape[0] != HEAD_DIM:
            k = tl.load(k_ptr + at, mask=(channel < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(v_ptr + at, mask=(channel < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_ptr + at)
            v = tl.load(v_ptr + at)
        place = _places(table_ptr, key + BLOCK_N, limit, ROW, BLOCK_SIZE)
        seen = (key < end)[None, :]
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        best, total, mixed = _absorb(q, k, v, seen, best, total, mixed, scale, MASKED, PRECISION)
    return best, total, mixed, place


@triton.jit
def _new(
    q,
    best,
    total,
    mixed,
    begin,
    end,
    node,
    depth,
    ancestors,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    first_token,
    row_of_ptr,
    depth_ptr,
    length,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    channel,
    scale,
    MASKED: tl.constexpr,
    TREE: tl.constexpr,
    DEPTHS: tl.constexpr,
    INDEXED: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """New rows begin .. end - 1 of a sequence; without MASKED these are whole tiles that all rows see.

    Args:
        norm_ptr: the weight of the keys' head.
    """
    # A tree's nodes are a tile or two: a pipeline would only be more code.
    for start in tl.range(begin, end, BLOCK_N, num_stages=1 if TREE else None):
        key = start + tl.arange(0, BLOCK_N)
        token = tl.load(row_of_ptr + key, mask=key < end, other=-1) if INDEXED else first_token + key
        there = (key < end) & (token >= 0)
        key_depth = key
        if DEPTHS and (WINDOW or HALF):
            key_depth = tl.load(depth_ptr + key, mask=key < end, other=0).to(tl.int32)
        k = turned(
            k_ptr, token * k_stride, there, length + key_depth, norm_ptr, tl.zeros_like(key), cos_ptr,
            sin_ptr, eps, channel, HEAD_DIM, HALF, NORM, OFFSET,
        )  # fmt: skip
        inside = there[:, None] & (channel < HEAD_DIM)[None, :]
        v = tl.load(v_ptr + token[:, None] * v_stride + channel[None, :], mask=inside, other=0.0)
        if TREE:
            # A tile may be longer than a mask.
            seen = ((ancestors[:, None] >> tl.minimum(key, 63)[None, :]) & 1) != 0
            seen = seen & (key < end)[None, :]
        else:
            seen = (key[None, :] <= node[:, None]) & (key < end)[None, :]
        if WINDOW:
            seen = seen & (key_depth[None, :] > depth[:, None] - WINDOW)
        best, total, mixed = _absorb(q, k, v, seen, best, total, mixed, scale, MASKED, PRECISION)
    return best, total, mixed


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_rows",
        "least_keys",
        "ahead_lines",
        "table_stride",
        "rows_stride",
        "ancestors_stride",
        "depths_stride",
    ],
    # Those of a captured step lie at places that depend on its bucket; each would be another compilation.
    do_not_specialize_on_alignment=["ancestors_ptr", "depths_ptr", "ahead_ptr"],
)
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    part_ptr,
    weight_ptr,
    count_ptr,
    k_pool_ptr,
    v_pool_ptr,
    table_ptr,
    length_ptr,
    rows_ptr,
    row_of_ptr,
    ancestors_ptr,
    depths_ptr,
    sink_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    ahead_ptr,
    eps,
    scale,
    num_tokens,
    num_rows,
    least_keys,
    ahead_lines,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    rows_stride,
    ancestors_stride,
    depths_stride,
    TREE: tl.constexpr,
    DEPTHS: tl.constexpr,
    INDEXED: tl.constexpr,
    SPLIT: tl.constexpr,
    JOINS: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_NEW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention of a grid (tiles of num_rows * GROUP query rows, parts * KV_HEADS, sequences).

    Without SPLIT there is one part for all, whose programs also write their share of the new rows into the
    pool. With SPLIT the grid has one part more, the first, which does nothing but that, beside the others;
    part 0 takes the new rows, and the others share the cached ones. Programs begin in about this order, so
    that those without keys, the last, are in nobody's way.

    Args:
        q_ptr: [T, KV_HEADS * GROUP, HEAD_DIM]; k_ptr, v_ptr: [T, KV_HEADS, HEAD_DIM]; a token's heads follow
            one another. out_ptr: [T, KV_HEADS * GROUP * HEAD_DIM], where there is one part.
        part_ptr: [parts, T, KV_HEADS * GROUP, HEAD_DIM] float32 and weight_ptr: [parts, T, KV_HEADS * GROUP]
            float32: each part's output and log2 of its weights' sum; nothing of parts without keys.
        count_ptr: int32, with JOINS as many zeros as the grid has programs of one part; zeros when it ends.
        k_pool_ptr, v_pool_ptr: [pool rows, KV_HEADS, HEAD_DIM] of this layer.
        table_ptr, length_ptr, rows_ptr, ancestors_ptr, depths_ptr: see `AttentionInput`.
        row_of_ptr: [B, N] int64, the token of each new row, -1 where it is not computed.
        sink_ptr: [KV_HEADS * GROUP], with SINKS: each head's logit of which there is no value; part 0 has it.
        norm_ptr: [(KV_HEADS * GROUP + KV_HEADS) * HEAD_DIM], weights of the norm of each query and key head,
            where there is one (NORM; OFFSET: they are less by 1); eps is added to its mean squares.
        cos_ptr, sin_ptr: [positions, 2 * HALF], see `RotaryTable`.
        ahead_ptr: of 16 bits; ahead_lines: so many lines of 128 bytes of it shall lie in L2 when this ends.
        scale: factor on q k^T times log2(e).
        num_tokens: T. num_rows: N.
        HALF: frequencies of the rotation; 0: q and k come as they enter the products.
        WINDOW: in positions; 0 without.
        least_keys: a part gets at least so many cached rows, so that short contexts come in few parts.
        BLOCK_M, BLOCK_N, BLOCK_NEW: query rows, cached keys and new keys of a tile.
        BLOCK_W: at least the nodes that begin in a tile of BLOCK_M rows.
        BLOCK_J, BLOCK_P: rows and parts that JOINS joins at once.
        EARLY: it is launched early (`triton_dependent`). What the step says of its rows and sequences is read
            before what the layer computed is waited for.
    """
    if EARLY:
        asks_in_turns(ahead_ptr, ahead_lines, 256)
    tile = tl.program_id(0)
    if not TREE:
        tile = tl.num_programs(0) - 1 - tile  # the last rows of a chunk take longest: first
    head = tl.program_id(1) % KV_HEADS
    part = tl.program_id(1) // KV_HEADS
    sequence = tl.program_id(2)
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    HEADS: tl.constexpr = KV_HEADS * GROUP

    first_token = sequence.to(tl.int64) * num_rows
    row_of_ptr += first_token
    rows_ptr += sequence.to(tl.int64) * rows_stride
    ancestors_ptr += sequence.to(tl.int64) * ancestors_stride
    depths_ptr += sequence.to(tl.int64) * depths_stride
    table_ptr += sequence.to(tl.int64) * table_stride
    k_ptr += head * HEAD_DIM
    v_ptr += head * HEAD_DIM
    k_pool_ptr += head * HEAD_DIM
    v_pool_ptr += head * HEAD_DIM

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    node = row // GROUP
    valid = row < num_rows * GROUP
    if INDEXED:
        token = tl.load(row_of_ptr + node, mask=valid, other=-1)
        valid = token >= 0
        if tl.max(valid.to(tl.int32), 0) == 0:
            return
    else:
        token = first_token + node
    query_head = head * GROUP + row % GROUP
    at_row = token * HEADS + query_head  # of [T, HEADS]
    length = tl.load(length_ptr + sequence).to(tl.int32)
    depth = tl.load(depths_ptr + node, mask=valid, other=0).to(tl.int32) if DEPTHS else node
    position = length + depth
    channel = tl.arange(0, BLOCK_D)
    key_norm_ptr = norm_ptr + (HEADS + head) * HEAD_DIM
    ancestors = tl.zeros([BLOCK_M], tl.int64)
    if TREE:
        ancestors = tl.load(ancestors_ptr + node, mask=valid, other=0)

    if SPLIT:
        part -= 1
        if part < 0:
            write_new(
                tile, num_rows, k_ptr, v_ptr, k_stride, v_stride, k_pool_ptr, v_pool_ptr, first_token,
                row_of_ptr, rows_ptr, depths_ptr, length, key_norm_ptr, cos_ptr, sin_ptr, eps, channel,
                DEPTHS, INDEXED, GROUP, ROW, HEAD_DIM, HALF, NORM, OFFSET, BLOCK_M, BLOCK_W, EARLY,
            )  # fmt: skip
            return

    begin = first_key(length, 0 if TREE else tile * BLOCK_M // GROUP, WINDOW, BLOCK_N)
    end = length
    filled = 0
    if SPLIT:
        shares = tl.num_programs(1) // KV_HEADS - 2
        share, filled = shared_out(end - begin, shares, least_keys, BLOCK_N)
        if part > filled:
            return
        if part > 0:
            begin += (part - 1) * share
            end = tl.minimum(begin + share, end)
        elif filled > 0:
            begin = end

    # Looked up before the queries are turned, so that nobody waits for one after the other.
    place = _places(table_ptr, begin + tl.arange(0, BLOCK_N), end, ROW, BLOCK_SIZE)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # as if a key had been seen whose value is 0
        mine = valid & (part == 0)
        best = tl.load(sink_ptr + query_head, mask=mine, other=float("-inf")).to(tl.float32)
        best *= 1.4426950408889634  # log2(e)
        total = mine.to(tl.float32)
    # What was read up to here was written before this pass. Programs that have left need not wait: those of
    # part 0 do, and each grid has some.
    if EARLY:
        waits()
        launches_next()
    inside = valid[:, None] & (channel < HEAD_DIM)[None, :]
    norm_at = query_head * HEAD_DIM
    q = turned(
        q_ptr, token * q_stride + norm_at, valid, position, norm_ptr, norm_at, cos_ptr, sin_ptr, eps, channel,
        HEAD_DIM, HALF, NORM, OFFSET,
    )  # fmt: skip
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    whole = begin
    if not (WINDOW or TREE):
        whole = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N
        best, total, mixed, place = _cached(
            q, best, total, mixed, place, begin, whole, end, position, k_pool_ptr, v_pool_ptr, table_ptr,
            channel, scale, False, WINDOW, ROW, HEAD_DIM, BLOCK_SIZE, BLOCK_N, PRECISION,
        )  # fmt: skip
    best, total, mixed, place = _cached(
        q, best, total, mixed, place, whole, end, end, position, k_pool_ptr, v_pool_ptr, table_ptr,
        channel, scale, True, WINDOW, ROW, HEAD_DIM, BLOCK_SIZE, BLOCK_N, PRECISION,
    )  # fmt: skip

    new_begin = 0
    new_end = num_rows
    if not TREE:
        new_end = tl.minimum(num_rows, (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    if SPLIT:
        new_end = tl.where(part == 0, new_end, 0)
    if not TREE:
        first_node = tile * BLOCK_M // GROUP
        if WINDOW:
            new_begin = tl.maximum(first_node - WINDOW + 1, 0) // BLOCK_NEW * BLOCK_NEW
        else:
            # Of the chunk itself, only the tiles that reach its diagonal need the mask.
            new_begin = tl.minimum((first_node + 1) // BLOCK_NEW * BLOCK_NEW, new_end)
            best, total, mixed = _new(
                q, best, total, mixed, 0, new_begin, node, depth, 0, k_ptr, v_ptr, k_stride, v_stride,
                first_token, row_of_ptr, depths_ptr, length, key_norm_ptr, cos_ptr, sin_ptr, eps, channel,
                scale, False, TREE, DEPTHS, INDEXED, WINDOW, HEAD_DIM, HALF, NORM, OFFSET, BLOCK_NEW,
                PRECISION,
            )  # fmt: skip
    best, total, mixed = _new(
        q, best, total, mixed, new_begin, new_end, node, depth, ancestors, k_ptr, v_ptr, k_stride, v_stride,
        first_token, row_of_ptr, depths_ptr, length, key_norm_ptr, cos_ptr, sin_ptr, eps, channel,
        scale, True, TREE, DEPTHS, INDEXED, WINDOW, HEAD_DIM, HALF, NORM, OFFSET, BLOCK_NEW, PRECISION,
    )  # fmt: skip

    # A node that is not valid may have no key at all.
    total = tl.where(total == 0.0, 1.0, total)
    mixed = mixed * (1.0 / total)[:, None]
    if SPLIT:
        if filled > 0:
            at_part = at_row + part.to(tl.int64) * num_tokens * HEADS
            tl.store(weight_ptr + at_part, best + tl.log2(total), mask=valid)
            tl.store(part_ptr + at_part[:, None] * HEAD_DIM + channel[None, :], mixed, mask=inside)
            if JOINS:
                # The barrier orders all threads' stores before one thread's addition, which releases them to
                # the device. The addition that comes last acquires what all the others released, and Triton
                # hands its result to the other threads behind a barrier, so all of them see every part. In
                # whatever order programs run, one of them is last; nobody waits for another.
                tl.debug_barrier()
                count_ptr += (sequence * tl.num_programs(0) + tile) * KV_HEADS + head
                if tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == filled:
                    tl.store(count_ptr, 0)  # the next launch begins when this one has ended
                    for first in range(0, tl.minimum(BLOCK_M, num_rows * GROUP - tile * BLOCK_M), BLOCK_J):
                        join_row = tile * BLOCK_M + first + tl.arange(0, BLOCK_J)
                        join_valid = join_row < num_rows * GROUP
                        if INDEXED:
                            join_token = tl.load(row_of_ptr + join_row // GROUP, mask=join_valid, other=-1)
                            join_valid = join_token >= 0
                        else:
                            join_token = first_token + join_row // GROUP
                        join_at = join_token * HEADS + head * GROUP + join_row % GROUP
                        join_parts(
                            part_ptr, weight_ptr, out_ptr, join_at, join_valid,
                            filled + tl.zeros_like(join_row), filled, num_tokens * HEADS, channel,
                            HEAD_DIM, BLOCK_J, BLOCK_D, BLOCK_P,
                        )  # fmt: skip
        else:
            at_out = at_row[:, None] * HEAD_DIM + channel[None, :]
            tl.store(out_ptr + at_out, mixed.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        at_out = at_row[:, None] * HEAD_DIM + channel[None, :]
        tl.store(out_ptr + at_out, mixed.to(out_ptr.dtype.element_ty), mask=inside)
        write_new(
            tile, num_rows, k_ptr, v_ptr, k_stride, v_stride, k_pool_ptr, v_pool_ptr, first_token, row_of_ptr,
            rows_ptr, depths_ptr, length, key_norm_ptr, cos_ptr, sin_ptr, eps, channel,
            DEPTHS, INDEXED, GROUP, ROW, HEAD_DIM, HALF, NORM, OFFSET, BLOCK_M, BLOCK_W, False,
        )  # fmt: skip
