"""Queries and keys as Triton kernels load them: normed and rotated in registers."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["turned"]


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

    A channel's partner in the rotation is loaded beside it. Without HALF rows are taken as they are.

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
        if NORM:
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
    return x
