"""Who chooses whom in a mixture of experts, as Triton kernels, before their products. CUDA only.

One kernel computes the router's logits, one chooses each row's experts, one sorts these assignments and fills
the slots. The router's sums have one order, however many rows there are: a library's have another for every
number, and a row whose best experts are nearly alike would go to others in another batch. A row whose values
are not finite has its first experts and gives NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.model.experts_config import PLAIN, Gate
from engine.model.experts_shapes import ExpertsShape

__all__ = ["Assignments", "assign", "choose"]

_LEAST_SHARE = 256
"""Channels of which a program adds up a router's logits; more where `_MOST_SPLITS` would not do."""

_MOST_SPLITS = 16
"""Of a row's channels."""


@triton.jit(do_not_specialize=["rows"])
def router_kernel(
    x_ptr, weight_ptr, part_ptr, rows, size, experts,
    SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What SHARE channels add to logits; the grid is (rows / BLOCK_M, size / SHARE, experts / BLOCK_E).

    Args:
        x_ptr: [rows, size]; weight_ptr: [experts, size], of the same dtype or wider.
        part_ptr: [rows, size / SHARE, experts] float32.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    expert = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    last = tl.minimum((split + 1) * SHARE, size)
    x_at = x_ptr + row.to(tl.int64)[:, None] * size
    weight_at = weight_ptr + expert[:, None] * size
    sums = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    for start in range(split * SHARE, last, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        known = (channel < last)[None, :]
        x = tl.load(x_at + channel[None, :], mask=(row < rows)[:, None] & known, other=0.0)
        w = tl.load(weight_at + channel[None, :], mask=(expert < experts)[:, None] & known, other=0.0)
        sums = tl.dot(w, tl.trans(x.to(w.dtype)), sums, input_precision="ieee")
    at = (row.to(tl.int64) * tl.num_programs(1) + split)[None, :] * experts + expert[:, None]
    tl.store(part_ptr + at, sums, mask=(row < rows)[None, :] & (expert < experts)[:, None])


@triton.jit
def _keys(values, number, BLOCK: tl.constexpr):
    """[BLOCK] int64 in the order of float32 values that are numbers, the lower `number` first where equal."""
    bits = values.to(tl.int32, bitcast=True)
    # Below zero more bits are less: there they are turned around.
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (BLOCK - 1 - number).to(tl.int64)


@triton.jit
def _opened(scores, expert, experts, lowest, GROUPS: tl.constexpr, OPEN: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] int1: whether an expert's group is among the OPEN whose best two sum to most."""
    group = expert // (experts // GROUPS)
    both = scores
    for number in tl.static_range(GROUPS):
        own = tl.where(group == number, scores, float("-inf"))
        second = tl.max(tl.where(expert == tl.argmax(own, 0), float("-inf"), own), 0)
        both = tl.where(group == number, tl.max(own, 0) + second, both)
    key = tl.where(expert < experts, _keys(both, group, BLOCK), lowest)
    opened = expert < 0
    for _ in tl.static_range(OPEN):
        best = tl.max(key, 0)
        opened = opened | (key == best)
        key = tl.where(key == best, lowest, key)
    return opened


@triton.jit
def choose_kernel(
    part_ptr, bias_ptr, correction_ptr, expert_ptr, share_ptr, experts, scale, least,
    BIAS: tl.constexpr, SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, GROUPS: tl.constexpr,
    OPEN: tl.constexpr, SCALED: tl.constexpr, SPLITS: tl.constexpr, CHOSEN: tl.constexpr,
    RENORMALISED: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The experts of one row, a program of the grid (rows); the lower number first where two are equal."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    there = expert < experts
    logit = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        logit += tl.load(part_ptr + (row * SPLITS + split) * experts + expert, mask=there, other=0.0)
    if BIAS:
        logit += tl.load(bias_ptr + expert, mask=there, other=0.0).to(tl.float32)
    if SIGMOID:
        share = tl.where(there, 1.0 / (1.0 + tl.exp(-logit)), 0.0)
        total = tl.sum(share, 0)
    else:
        logit = tl.where(there, logit, float("-inf"))
        share = tl.exp(logit - tl.max(logit, 0))
        total = tl.sum(share, 0)
        share /= total
    sound = total == total
    score = share
    if CORRECTED:
        score += tl.load(correction_ptr + expert, mask=there, other=0.0)
    score = tl.where(sound, score, 0.0)
    lowest = tl.full([1], -1, tl.int64) << 63
    key = tl.where(there, _keys(score, expert, BLOCK), lowest)
    if GROUPS > 1:
        key = tl.where(_opened(score, expert, experts, lowest, GROUPS, OPEN, BLOCK), key, lowest)
    place = tl.arange(0, PLACES)
    found = tl.zeros([PLACES], tl.int32)
    shares = tl.zeros([PLACES], tl.float32)
    for nth in tl.static_range(CHOSEN):
        best = tl.max(key, 0)
        key = tl.where(key == best, lowest, key)
        its = BLOCK - 1 - (best & (BLOCK - 1)).to(tl.int32)
        found = tl.where(place == nth, its, found)
        if CORRECTED:
            its_share = tl.sum(tl.where(expert == its, share, 0.0), 0)
        else:
            its_share = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        shares = tl.where(place == nth, tl.where(sound, its_share, total), shares)
    if RENORMALISED:
        chosen = tl.sum(shares, 0)
        shares /= tl.where(chosen < least, least, chosen)  # what is not a number stays so
    if SCALED:
        shares *= scale
    at = row * CHOSEN + place
    tl.store(expert_ptr + at, found, mask=place < CHOSEN)
    tl.store(share_ptr + at, shares, mask=place < CHOSEN)


@triton.jit(do_not_specialize=["assignments", "slots"])
def assign_kernel(
    expert_ptr, order_ptr, slot_ptr, assignments, slots,
    ROWS: tl.constexpr, LED: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The assignments to one expert in their order, and its slots; a program of the grid (experts).

    Each looks through all of them, twice: there are few, and nobody waits for another.

    Args:
        expert_ptr: [assignments] int32.
        order_ptr: [assignments] int32, sorted by expert.
        slot_ptr: [3, slots] int32: expert, -1 for none; first place in the order; the one behind its last.
    """
    expert = tl.program_id(0)
    before = 0
    own = 0
    for start in range(0, assignments, PIECE):
        at = start + tl.arange(0, PIECE)
        other = tl.load(expert_ptr + at, mask=at < assignments, other=2147483647)
        before += tl.sum((other < expert).to(tl.int32), 0)
        own += tl.sum((other == expert).to(tl.int32), 0)
    end = before + own
    seen = before
    for start in range(0, assignments, PIECE):
        at = start + tl.arange(0, PIECE)
        mine = tl.load(expert_ptr + at, mask=at < assignments, other=-1) == expert
        place = seen + tl.cumsum(mine.to(tl.int32), 0) - 1
        seen += tl.sum(mine.to(tl.int32), 0)
        tl.store(order_ptr + place, at, mask=mine)
        if LED:
            leads = (place - before) % ROWS == 0
            tl.store(slot_ptr + at, tl.where(leads, expert, -1), mask=mine)
            tl.store(slot_ptr + slots + at, place, mask=mine)
            tl.store(slot_ptr + 2 * slots + at, end, mask=mine)
    if not LED:
        # However few rows each has, n experts with m assignments have at most n + m / ROWS slots.
        first = expert + before // ROWS
        behind = expert + 1 + end // ROWS
        for start in range(first, behind, 64):
            slot = start + tl.arange(0, 64)
            place = before + (slot - first) * ROWS
            tl.store(slot_ptr + slot, tl.where(place < end, expert, -1), mask=slot < behind)
            tl.store(slot_ptr + slots + slot, place, mask=slot < behind)
            tl.store(slot_ptr + 2 * slots + slot, end, mask=slot < behind)


class Assignments(NamedTuple):
    """Which rows are whose, in one pass.

    Args:
        shares: [rows * chosen] float32, by row and then from its best expert on.
        order: [rows * chosen] int32, assignments sorted by expert; whatever it is where the shape is `alone`.
        slots: [3, slots] int32, see `assign_kernel`; `alone` the experts, [rows * chosen] int32.
        num_slots: how many there are.
    """

    shares: Tensor
    order: Tensor
    slots: Tensor
    num_slots: int


def choose(
    x: Tensor,
    router: Tensor,
    chosen: int,
    *,
    renormalised: bool,
    bias: Tensor | None = None,
    gate: Gate = PLAIN,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts of each row and their shares: see `experts.route`.

    Args:
        x: [T, hidden], contiguous, T at least 1.
        router: [experts, hidden], contiguous, of x's dtype or float32; bias: [experts], or None.
        correction: [experts] float32 if `gate.corrected`, else None.

    Returns:
        [T, chosen] int32 and [T, chosen] float32, the best expert first. A row of which a logit is NaN, or
        with a softmax infinite, has its first experts, and NaN for shares.
    """
    (rows, size), experts = x.shape, len(router)
    share = max(_LEAST_SHARE, triton.cdiv(triton.cdiv(size, _MOST_SPLITS), 64) * 64)
    splits, block = triton.cdiv(size, share), triton.next_power_of_2(experts)
    parts = x.new_empty(rows, splits, experts, dtype=torch.float32)
    # What is lifted to a router's float32 takes registers: with larger tiles they would not do.
    most, channels = (64, 64) if router.dtype == x.dtype else (32, 32)
    of_program = min(most, max(16, block))
    router_kernel[(triton.cdiv(rows, 16), splits, triton.cdiv(experts, of_program))](
        x, router, parts, rows, size, experts,
        SHARE=share, BLOCK_M=16, BLOCK_E=of_program, BLOCK_K=channels, num_warps=4, num_stages=3,
    )  # fmt: skip
    found = x.new_empty(rows, chosen, dtype=torch.int32)
    shares = x.new_empty(rows, chosen, dtype=torch.float32)
    choose_kernel[(rows,)](
        parts, parts if bias is None else bias, parts if correction is None else correction, found, shares,
        experts, gate.scale, gate.least,
        BIAS=bias is not None, SIGMOID=gate.sigmoid, CORRECTED=correction is not None, GROUPS=gate.groups,
        OPEN=gate.open_groups, SCALED=gate.scale != 1.0, SPLITS=splits, CHOSEN=chosen,
        RENORMALISED=renormalised, PLACES=triton.next_power_of_2(chosen), BLOCK=block,
        num_warps=1 if block <= 256 else 4,
    )  # fmt: skip
    return found, shares


def assign(experts: Tensor, shares: Tensor, count: int, shape: ExpertsShape) -> Assignments:
    """Sort assignments by their expert.

    Args:
        experts: [T, chosen] int32, each less than `count`; shares: [T, chosen] float32.
        shape: of the pass.
    """
    assignments = experts.numel()
    slots = shape.slots(assignments, count)
    if shape.alone:
        return Assignments(shares, experts, experts, slots)
    order = torch.empty_like(experts)
    filled = experts.new_empty(3, slots)
    assign_kernel[(count,)](
        experts, order, filled, assignments, slots,
        ROWS=shape.rows, LED=shape.led, PIECE=shape.piece, num_warps=4 if shape.piece <= 1024 else 8,
    )  # fmt: skip
    return Assignments(shares, order, filled, slots)
