"""Matrix products of several rows whose weight streams through shared memory, as a Triton kernel. CUDA only.

With more channels than a program can ask for at once (`triton_products`), a loop has the next tiles of the
weight under way while tensor cores take this one. What a library's kernel for as many rows loses against
reading the weight is at its ends: it begins when the kernel in front of it has ended, tiles of outputs do
not divide among the multiprocessors, and activation and addition are kernels of their own. Here the first
tiles are asked for before that kernel has ended (`triton_dependent`), several programs may share the channels
of a tile of outputs, so that all multiprocessors end at about the same time, and the last of these programs
adds up what they have and does what is around the product. The order of that sum is always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.model.triton_kernels import finished
from engine.triton_dependent import launches_next, prefetches, waits

__all__ = ["streamed_kernel"]


@triton.jit(do_not_specialize=["rows"])
def streamed_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, rows, size, width, residual_scale,
    GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr, LINES: tl.constexpr,
    HEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """All rows, at most BLOCK_M, by a grid (outputs / HEIGHT, splits): a program takes a share of channels.

    Outputs come first in the product: tensor cores take 64 of them with as few as 8 rows.

    Args:
        x_ptr: [rows, size]; weight_ptr: [width, size], twice as many with GATE; bias_ptr: as many.
        y_ptr: [rows, width].
        part_ptr: [outputs / HEIGHT, splits, 1 + (GATE > 0), BLOCK_N, BLOCK_M] float32, with SPLIT.
        count_ptr: int32, with SPLIT as many zeros as there are tiles of outputs; zeros when it ends.
        LINES: of 128 bytes of each of its outputs' weights that a program asks for before it waits.
        HEIGHT: outputs of a program, at most BLOCK_N, of which the tensor cores take as many anyway.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    of_program = tl.arange(0, BLOCK_N)
    output = tile * HEIGHT + of_program
    row = tl.arange(0, BLOCK_M)
    there = (of_program < tl.minimum(HEIGHT, width - tile * HEIGHT))[:, None]
    share = tl.cdiv(tl.cdiv(size, BLOCK_K), splits) * BLOCK_K
    first = split * share
    last = tl.minimum(first + share, size)
    weight_at = weight_ptr + output.to(tl.int64)[:, None] * size
    up_at = weight_at + tl.cast(width, tl.int64) * size
    if EARLY:
        line = first + tl.arange(0, LINES) * 64
        sought = there & (line < last)[None, :]
        prefetches((weight_at + line[None, :]).to(tl.int64, bitcast=True), sought)
        if GATE:
            prefetches((up_at + line[None, :]).to(tl.int64, bitcast=True), sought)
        waits()
        launches_next()
    x_at = x_ptr + row.to(tl.int64)[:, None] * size
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = sums
    for start in range(first, last, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        inside = (channel < last)[None, :]
        w = tl.load(weight_at + channel[None, :], mask=there & inside, other=0.0)
        x = tl.load(x_at + channel[None, :], mask=(row < rows)[:, None] & inside, other=0.0)
        sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee")
        if GATE:
            u = tl.load(up_at + channel[None, :], mask=there & inside, other=0.0)
            up = tl.dot(u, tl.trans(x), up, input_precision="ieee")
    ends = True
    if SPLIT:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        PARTS: tl.constexpr = 2 if GATE else 1
        of_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + row[None, :]
        part_ptr += tile.to(tl.int64) * splits * PARTS * SIZE
        at = part_ptr + split * PARTS * SIZE + of_tile
        tl.store(at, sums)
        if GATE:
            tl.store(at + SIZE, up)
        # The barrier orders all threads' stores before one thread's addition, which releases them to the
        # device; the addition that comes last acquires what the others released (see `attend_kernel`).
        tl.debug_barrier()
        ends = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
        if ends:
            tl.store(count_ptr + tile, 0)  # the next launch begins when this one has ended
            sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            up = sums
            for other in range(splits):
                at = part_ptr + other * PARTS * SIZE + of_tile
                # From where the multiprocessors meet, not from this one's own cache.
                sums += tl.load(at, cache_modifier=".cg")
                if GATE:
                    up += tl.load(at + SIZE, cache_modifier=".cg")
    if ends:
        place = row.to(tl.int64)[None, :] * width + output[:, None]
        finished(
            sums, up, 1.0, bias_ptr, y_ptr, place, output[:, None], there & (row < rows)[None, :], width,
            residual_scale, False, GATE, BIAS, ADD,
        )  # fmt: skip
