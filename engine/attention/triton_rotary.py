"""Queries and keys as Triton kernels load them: normed and rotated in registers; and into the pool so."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.triton_dependent import launches_next, waits

__all__ = ["turned", "write_new"]


@triton.jit
def turned(
    ptr,
    at,
    inside,
    position,
    norm_ptr,
    norm_at,
    cos_ptr,
    sin_ptr,
    eps,
    channel,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Rows of queries or keys as they enter the products, [R, BLOCK_D]: normed, rotated and rounded.

    They are normed before or after they are rotated, or not at all (NORM: `Rotary.kind`). A channel's partner
    in the rotation is loaded beside it. Without HALF rows are taken as they are.

    Args:
        at: [R], where a row lies; inside: [R], whether it is there at all; position: [R], of its token.
        norm_at: [R], where the weight of its head lies.
    """
    there = inside[:, None] & (channel < HEAD_DIM)[None, :]
    x = tl.load(ptr + at[:, None] + channel[None, :], mask=there, other=0.0)
    if HALF:
        kind = x.dtype
        partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
        if HALF % 8 == 0:  # said to the compiler, so that it loads eight at a time
            partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
        turning = inside[:, None] & (channel < 2 * HALF)[None, :]
        y = tl.load(ptr + at[:, None] + partner[None, :], mask=turning, other=0.0).to(tl.float32)
        x = x.to(tl.float32)
        if NORM == 1:
            shrink = (1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps))[:, None]
            weight = tl.load(norm_ptr + norm_at[:, None] + channel[None, :], mask=there, other=0.0)
            other = tl.load(norm_ptr + norm_at[:, None] + partner[None, :], mask=turning, other=0.0)
            weight, other = weight.to(tl.float32), other.to(tl.float32)
            if OFFSET:
                weight += 1.0
                other += 1.0
            x = (x * shrink * weight).to(kind).to(tl.float32)
            y = (y * shrink * other).to(kind).to(tl.float32)
        angle = position[:, None] * (2 * HALF) + channel[None, :]
        cos = tl.load(cos_ptr + angle, mask=turning, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=turning, other=0.0).to(tl.float32)
        x = (x * cos + y * sin).to(kind)
        if NORM == 2:
            x = x.to(tl.float32)
            shrink = (1.0 / tl.sqrt(tl.sum(x * x, 1) / HEAD_DIM + eps))[:, None]
            weight = tl.load(norm_ptr + norm_at[:, None] + channel[None, :], mask=there, other=0.0)
            weight = weight.to(tl.float32)
            if OFFSET:
                weight += 1.0
            x = (x * shrink * weight).to(kind)
    return x


@triton.jit
def write_new(
    tile,
    num_rows,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    k_pool_ptr,
    v_pool_ptr,
    first_token,
    row_of_ptr,
    rows_ptr,
    depth_ptr,
    length,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    channel,
    DEPTHS: tl.constexpr,
    INDEXED: tl.constexpr,
    GROUP: tl.constexpr,
    ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EARLY: tl.constexpr,
):
    """K/V of the nodes whose first query row is in this tile, into the pool.

    Args:
        EARLY: nobody has waited yet for the kernel that computed them.
    """
    node = tl.cdiv(tile * BLOCK_M, GROUP) + tl.arange(0, BLOCK_W)
    keep = (node < tl.cdiv((tile + 1) * BLOCK_M, GROUP)) & (node < num_rows)
    if INDEXED:
        token = tl.load(row_of_ptr + node, mask=keep, other=-1)
        keep = keep & (token >= 0)
    else:
        token = first_token + node
    row = tl.load(rows_ptr + node, mask=keep, other=0).to(tl.int64)
    at = row[:, None] * ROW + channel[None, :]
    inside = keep[:, None] & (channel < HEAD_DIM)[None, :]
    depth = node
    if DEPTHS and HALF:
        depth = tl.load(depth_ptr + node, mask=keep, other=0).to(tl.int32)
    if EARLY:
        waits()
        launches_next()
    k = turned(
        k_ptr, token * k_stride, keep, length + depth, norm_ptr, tl.zeros_like(node), cos_ptr, sin_ptr, eps,
        channel, HEAD_DIM, HALF, NORM, OFFSET,
    )  # fmt: skip
    v = tl.load(v_ptr + token[:, None] * v_stride + channel[None, :], mask=inside, other=0.0)
    tl.store(k_pool_ptr + at, k, mask=inside)
    tl.store(v_pool_ptr + at, v, mask=inside)
