"""The parts in which `attend_kernel` took keys, joined: by its last program, or by a kernel of their own."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.triton_dependent import launches_next, waits

__all__ = ["join_kernel", "join_parts"]


@triton.jit
def join_parts(
    part_ptr,
    weight_ptr,
    out_ptr,
    at_row,
    valid,
    filled,
    parts,
    num_tokens,
    channel,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The parts of a tile of query rows weighted together, always in the same order.

    Args:
        at_row: [BLOCK_M], rows of [T, HEADS]; valid: [BLOCK_M].
        filled: parts 0 .. filled - 1 have keys, and the last of all `parts`.
    """
    stride = num_tokens.to(tl.int64) * HEADS
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, filled + 1, BLOCK_P):
        turn = start + tl.arange(0, BLOCK_P)
        part = tl.where(turn == filled, parts - 1, turn).to(tl.int64)
        at = part[:, None] * stride + at_row[None, :]
        there = (turn <= filled)[:, None] & valid[None, :]
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
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    inside = valid[:, None] & (channel < HEAD_DIM)[None, :]
    out_at = at_row[:, None] * HEAD_DIM + channel[None, :]
    tl.store(out_ptr + out_at, mixed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "parts"])
def join_kernel(
    part_ptr,
    weight_ptr,
    out_ptr,
    num_tokens,
    parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The parts of `attend_kernel` weighted together, grid (T, HEADS); BLOCK_P is at least the parts."""
    if EARLY:
        waits()
        launches_next()
    at_row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    channel = tl.arange(0, BLOCK_D)
    part = tl.arange(0, BLOCK_P)
    at = part.to(tl.int64) * num_tokens * HEADS + at_row
    logarithm = tl.load(weight_ptr + at, mask=part < parts, other=float("-inf"))
    # The new rows' part has keys, or the node is not valid.
    highest = tl.max(logarithm, 0)
    weight = tl.exp2(logarithm - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight, 0)
    # Parts without keys left nothing to read.
    inside = (weight > 0.0)[:, None] & (channel < HEAD_DIM)[None, :]
    mixed = tl.load(part_ptr + at[:, None] * HEAD_DIM + channel[None, :], mask=inside, other=0.0)
    mixed = tl.sum(mixed * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + at_row * HEAD_DIM + channel, mixed.to(out_ptr.dtype.element_ty), mask=channel < HEAD_DIM
    )
