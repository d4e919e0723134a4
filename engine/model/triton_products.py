"""Matrix products of few rows with what lies around them, as one Triton kernel each. CUDA only.

At one row a product is the reading of its weight, and of a small model's weight not even that: a kernel of
torch's takes three to five microseconds for what memory gives in one, and the norm before it and the addition
behind it are kernels too. Here they are one, and it asks for its weight before the kernel in front of it has
ended (`triton_dependent`).

Sums are in float32. Where a norm comes first, its factor is applied to the sums: a row is read once, and what
the norm gives is not rounded to 16 bits on the way to one row's product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.model.product_shapes import Around, Shape
from engine.model.triton_kernels import finished
from engine.model.triton_streamed import streamed_kernel
from engine.triton_dependent import launched_early, launches_next, prefetches, waits

__all__ = ["product"]


@triton.jit
def row_kernel(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, y_ptr, size, width, eps, residual_scale,
    NORM: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    LOOP: tl.constexpr, AHEAD: tl.constexpr, LINES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row: a program of the grid (outputs / BLOCK_N) takes its weights BLOCK_K channels at a time.

    While the kernel in front ends, memory would have nothing to do but to bring the first programs' weights:
    so each asks for those of the program AHEAD of it too, LINES of 128 bytes or fewer.

    LOOP: there are more channels than BLOCK_K.
    """
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_K)
    there = (output < width)[:, None]
    at = output.to(tl.int64)[:, None] * size + channel[None, :]
    up_ptr = weight_ptr + tl.cast(width, tl.int64) * size
    inside = channel < size
    weighed = there & inside[None, :]
    w = tl.load(weight_ptr + at, mask=weighed, other=0.0, eviction_policy="evict_first")
    u = w
    if GATE:
        u = tl.load(up_ptr + at, mask=weighed, other=0.0, eviction_policy="evict_first")
    g = channel.to(tl.float32)
    if NORM:
        g = tl.load(norm_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if AHEAD:
        line = tl.arange(0, LINES) * 64
        first = (tl.program_id(0).to(tl.int64) + AHEAD) * BLOCK_N * size
        wanted = (line < BLOCK_N * size) & (first + line < tl.cast(width, tl.int64) * size)
        prefetches((weight_ptr + first + line).to(tl.int64, bitcast=True), wanted)
        if GATE:
            prefetches((up_ptr + first + line).to(tl.int64, bitcast=True), wanted)
    if EARLY:
        waits()
        launches_next()
    x = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    squares = x * x
    if NORM:
        x = x * (1.0 + g) if OFFSET else x * g
    if LOOP:
        total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        total_up = total
        for start in range(BLOCK_K, size, BLOCK_K):
            # A chunk is asked for before the one in front of it is used.
            inside = start + channel < size
            weighed = there & inside[None, :]
            next_w = tl.load(weight_ptr + at + start, mask=weighed, other=0.0, eviction_policy="evict_first")
            total += w.to(tl.float32) * x[None, :]
            w = next_w
            if GATE:
                next_u = tl.load(up_ptr + at + start, mask=weighed, other=0.0, eviction_policy="evict_first")
                total_up += u.to(tl.float32) * x[None, :]
                u = next_u
            x = tl.load(x_ptr + start + channel, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                squares += x * x
                g = tl.load(norm_ptr + start + channel, mask=inside, other=0.0).to(tl.float32)
                x = x * (1.0 + g) if OFFSET else x * g
        sums = tl.sum(total + w.to(tl.float32) * x[None, :], 1)
        up = sums
        if GATE:
            up = tl.sum(total_up + u.to(tl.float32) * x[None, :], 1)
    else:
        sums = tl.sum(w.to(tl.float32) * x[None, :], 1)
        up = sums
        if GATE:
            up = tl.sum(u.to(tl.float32) * x[None, :], 1)
    scale = 1.0
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / size + eps)
    finished(
        sums, up, scale, bias_ptr, y_ptr, output, output, output < width, width, residual_scale,
        NORM, GATE, BIAS, ADD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, y_ptr, rows, size, width, eps, residual_scale,
    NORM: tl.constexpr, OFFSET: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    WARPS: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows: each warp of a program multiplies its SHARE of the channels, and their sums are joined.

    The grid is (outputs / BLOCK_N, rows / BLOCK_M). Outputs come first in the product: tensor cores take 16
    of them with as few as 8 rows. All that a program reads it asks for at once: a loop would wait for memory
    at each turn.
    """
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    warp = tl.arange(0, WARPS)
    of_share = tl.arange(0, BLOCK_K)
    channel = warp[:, None] * SHARE + of_share[None, :]
    inside = (of_share < SHARE)[None, :] & (channel < size)
    at = output.to(tl.int64)[None, :, None] * size + channel[:, None, :]
    weighed = inside[:, None, :] & (output < width)[None, :, None]
    w = tl.load(weight_ptr + at, mask=weighed, other=0.0)
    u = w
    if GATE:
        u = tl.load(weight_ptr + tl.cast(width, tl.int64) * size + at, mask=weighed, other=0.0)
    g = channel.to(tl.float32)
    if NORM:
        g = tl.load(norm_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        if OFFSET:
            g += 1.0
    if EARLY:
        waits()
        launches_next()
    x = tl.load(
        x_ptr + row.to(tl.int64)[None, :, None] * size + channel[:, None, :],
        mask=inside[:, None, :] & (row < rows)[None, :, None],
        other=0.0,
    )
    scale = tl.zeros([1, BLOCK_M], tl.float32)
    if NORM:
        value = x.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(tl.sum(value * value, 2), 0) / size + eps)[None, :]
        if x.dtype == tl.float16:  # without its scale it might not fit
            value *= scale[:, :, None]
            scale = tl.full([1, BLOCK_M], 1.0, tl.float32)
        x = (value * g[:, None, :]).to(x.dtype)
    x = tl.trans(x, 0, 2, 1)
    sums = tl.sum(tl.dot(w, x, input_precision="ieee"), 0)
    up = sums
    if GATE:
        up = tl.sum(tl.dot(u, x, input_precision="ieee"), 0)
    place = row.to(tl.int64)[None, :] * width + output[:, None]
    kept = (row < rows)[None, :] & (output < width)[:, None]
    finished(
        sums, up, scale, bias_ptr, y_ptr, place, output[:, None], kept, width, residual_scale,
        NORM, GATE, BIAS, ADD,
    )  # fmt: skip


_GATES = {"": 0, "silu": 1, "gelu_tanh": 2}


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Shape,
    around: Around,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    y: Tensor | None = None,
    residual_scale: float = 1.0,
    counts: Tensor | None = None,
) -> Tensor:
    """x W^T + b, with what is around it.

    Args:
        x: [T, size], contiguous, at most `MOST_ROWS` rows.
        weight: [outputs, size], contiguous, with the gate's outputs before the others where there is one.
        bias: [outputs].
        shape: of the kernel, one of `shapes`; where the weight streams, x comes normed.
        around: what is around it.
        norm: [size], weight of the norm; eps: added to its mean squares.
        y: [T, outputs], contiguous, what is added to (in place).
        residual_scale: factor on what is added to y.
        counts: [MOST_TILES] int32 on the same device, all zeros before and after; where the shape has splits.

    Returns:
        [T, outputs] (half of them with a gate): y where it was given.

    Raises:
        ValueError: a norm before a weight that streams, or no counts for its splits.
    """
    rows, size = x.shape
    width = len(weight) // 2 if around.activation else len(weight)
    if y is None:
        y = x.new_empty(rows, width)
    early, options = launched_early(x.device)
    flags = {
        "GATE": _GATES[around.activation],
        "BIAS": bias is not None,
        "ADD": around.adds,
        "BLOCK_N": shape.outputs,
        "BLOCK_K": shape.channels,
        "EARLY": early,
        "num_warps": shape.warps,
        **options,
    }
    tiles = triton.cdiv(width, shape.height)
    bias_or_any = x if bias is None else bias
    if shape.streams:
        if around.norm or (shape.splits > 1 and counts is None):
            raise ValueError("a weight that streams takes a normed input, and counts where it has splits")
        parts = y
        if shape.splits > 1:
            size_of_tile = shape.outputs * shape.rows * (2 if around.activation else 1)
            parts = y.new_empty(tiles * shape.splits * size_of_tile, dtype=torch.float32)
        streamed_kernel[tiles, shape.splits](
            x, weight, bias_or_any, y, parts, y if counts is None else counts,
            rows, size, width, residual_scale,
            SPLIT=shape.splits > 1, LINES=shape.lines, HEIGHT=shape.height, BLOCK_M=shape.rows,
            num_stages=shape.stages, **flags,
        )  # fmt: skip
        return y
    pointers = (x, x if norm is None else norm, weight, bias_or_any, y)
    flags |= {"NORM": around.norm, "OFFSET": around.offset}
    if rows == 1:
        loop = size > shape.channels
        lines = triton.next_power_of_2(triton.cdiv(shape.outputs * size, 64))
        ways = {"LOOP": loop, "AHEAD": shape.ahead if early else 0, "LINES": lines}
        row_kernel[(tiles,)](*pointers, size, width, eps, residual_scale, **ways, **flags)
        return y
    flags |= {"WARPS": shape.warps, "SHARE": triton.cdiv(triton.cdiv(size, shape.warps), 8) * 8}
    grid = (tiles, triton.cdiv(rows, shape.rows))
    rows_kernel[grid](*pointers, rows, size, width, eps, residual_scale, BLOCK_M=shape.rows, **flags)
    return y
