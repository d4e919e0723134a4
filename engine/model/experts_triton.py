"""A mixture of experts as Triton kernels: each expert's products are of its own rows. CUDA only.

Which rows are whose is known to the device alone, and a captured step has the same grids whatever it holds.
So there are slots, as many as may be needed (`experts_shapes`): one kernel computes the router's logits, one
chooses each row's experts, one sorts these assignments and fills the slots, and the programs of the two
products look there for an expert and for which rows. A slot that is not needed costs its programs a glance.

Sums are in float32. What a row gives depends on nothing that another one holds: each has its own columns of a
product, and its experts are added up in the order in which it chose them. The router's sums have one order,
however many rows there are: a library's have another for every number, and a row whose best experts are
nearly alike would go to others in another batch. A row whose values are not finite has its first experts and
gives NaN.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.model.experts_shapes import ExpertsShape, Tile, experts_shape
from engine.model.product_shapes import SHARED
from engine.model.triton_kernels import _normed, activated, warps_for

if TYPE_CHECKING:
    from engine.model.experts import Experts

__all__ = [
    "Assignments",
    "assign",
    "choose",
    "expert_products",
    "experts_parts",
    "join_experts",
    "shape_for",
]

_GROUP = 8
"""Slots whose programs take the same outputs one behind the other: those of an expert share its weights."""

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
        x_ptr: [rows, size]; weight_ptr: [experts, size].
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
        sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee")
    at = (row.to(tl.int64) * tl.num_programs(1) + split)[None, :] * experts + expert[:, None]
    tl.store(part_ptr + at, sums, mask=(row < rows)[None, :] & (expert < experts)[:, None])


@triton.jit
def choose_kernel(
    part_ptr, expert_ptr, share_ptr, experts,
    SPLITS: tl.constexpr, CHOSEN: tl.constexpr, RENORMALISED: tl.constexpr, PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The experts of one row, a program of the grid (rows); the lower number first where shares are equal."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    there = expert < experts
    logit = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        logit += tl.load(part_ptr + (row * SPLITS + split) * experts + expert, mask=there, other=0.0)
    logit = tl.where(there, logit, float("-inf"))
    share = tl.exp(logit - tl.max(logit, 0))
    total = tl.sum(share, 0)
    share /= total
    sound = total == total
    # Numbers that are not negative are ordered as their bits are; the rest says whose they are.
    bits = tl.where(sound, share.to(tl.int32, bitcast=True), 0)
    key = tl.where(there, (bits.to(tl.int64) << 32) | (BLOCK - 1 - expert).to(tl.int64), -1)
    place = tl.arange(0, PLACES)
    found = tl.zeros([PLACES], tl.int32)
    shares = tl.zeros([PLACES], tl.float32)
    for nth in tl.static_range(CHOSEN):
        best = tl.max(key, 0)
        key = tl.where(key == best, -1, key)
        found = tl.where(place == nth, BLOCK - 1 - (best & (BLOCK - 1)).to(tl.int32), found)
        its_share = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        shares = tl.where(place == nth, tl.where(sound, its_share, total), shares)
    if RENORMALISED:
        shares /= tl.sum(shares, 0)
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


@triton.jit(do_not_specialize=["slots"])
def experts_kernel(
    x_ptr, order_ptr, slot_ptr, share_ptr, weight_ptr, scale_ptr, y_ptr, slots, size, width,
    GATE: tl.constexpr, SCALED: tl.constexpr, ALONE: tl.constexpr, CHOSEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One of an expert's products, of the rows of a slot; the grid has slots * outputs / BLOCK_N programs.

    Outputs come first in the product: tensor cores take 64 of them with as few as 8 rows.

    Args:
        x_ptr: with GATE [rows, size], the input; else [assignments, size], in the order.
        order_ptr: see `assign_kernel`. ALONE it is not looked at, and `slot_ptr` has just the experts.
        share_ptr: [assignments] float32, factors on what a row's expert gives; not with GATE.
        weight_ptr: [experts, width, size], with GATE [experts, 2, width, size].
        scale_ptr: with SCALED, a factor on each of the weight's outputs, float32.
        y_ptr: [assignments, width], in the order with GATE; else each at its own place.
    """
    kind = y_ptr.dtype.element_ty
    program = tl.program_id(0)
    tiles = tl.cdiv(width, BLOCK_N)
    group = program // (GROUP * tiles)
    height = tl.minimum(slots - group * GROUP, GROUP)
    within = program % (GROUP * tiles)
    slot = group * GROUP + within % height
    expert = tl.load(slot_ptr + slot)
    if expert < 0:
        return
    if ALONE:
        first = slot
        end = slot + 1
    else:
        first = tl.load(slot_ptr + slots + slot)
        end = tl.load(slot_ptr + 2 * slots + slot)
    place = first + tl.arange(0, BLOCK_M)
    inside = place < end
    assignment = place
    if not ALONE:
        assignment = tl.load(order_ptr + place, mask=inside, other=0)
    row = assignment // CHOSEN if GATE else place
    output = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (output < width)[:, None]
    x_at = x_ptr + row.to(tl.int64)[:, None] * size
    outputs = tl.cast(width, tl.int64)
    of_expert = expert * outputs * (2 if GATE else 1)
    weight_at = weight_ptr + (of_expert + output)[:, None] * size
    up_at = weight_at + outputs * size
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = sums
    for start in range(0, size, BLOCK_K):
        channel = start + tl.arange(0, BLOCK_K)
        known = (channel < size)[None, :]
        x = tl.trans(tl.load(x_at + channel[None, :], mask=inside[:, None] & known, other=0.0))
        w = tl.load(weight_at + channel[None, :], mask=there & known, other=0.0)
        sums = tl.dot(w.to(x.dtype), x, sums, input_precision="ieee")
        if GATE:
            u = tl.load(up_at + channel[None, :], mask=there & known, other=0.0)
            up = tl.dot(u.to(x.dtype), x, up, input_precision="ieee")
    if SCALED:
        scale_at = scale_ptr + of_expert + output
        sums *= tl.load(scale_at, mask=output < width, other=0.0)[:, None]
        if GATE:
            up *= tl.load(scale_at + outputs, mask=output < width, other=0.0)[:, None]
    if GATE:
        y = (activated(sums.to(kind), GATE == 2).to(tl.float32) * up.to(kind).to(tl.float32)).to(kind)
        out = place
    else:
        y = (sums * tl.load(share_ptr + assignment, mask=inside, other=0.0)[None, :]).to(kind)
        out = assignment
    tl.store(y_ptr + out.to(tl.int64)[None, :] * width + output[:, None], y, mask=there & inside[None, :])


@triton.jit
def join_experts_kernel(
    x_ptr, part_ptr, after_ptr, before_ptr, y_ptr, size, residual_scale, eps,
    CHOSEN: tl.constexpr, AFTER: tl.constexpr, BEFORE: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`triton_kernels.add_norm` of the sum of what a row's experts gave; a program of the grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    at = row * size + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for nth in tl.static_range(CHOSEN):
        total += tl.load(part_ptr + (row * CHOSEN + nth) * size + column, mask=inside, other=0.0).to(
            tl.float32
        )
    total = total.to(x.dtype).to(tl.float32)
    if AFTER:
        total = _normed(total, after_ptr, column, inside, size, eps, OFFSET).to(x.dtype).to(tl.float32)
    x = (x.to(tl.float32) + total * residual_scale).to(x.dtype)
    tl.store(x_ptr + at, x, mask=inside)
    if BEFORE:
        y = _normed(x.to(tl.float32), before_ptr, column, inside, size, eps, OFFSET)
        tl.store(y_ptr + at, y.to(x.dtype), mask=inside)


_GATES = {"silu": 1, "gelu_tanh": 2}


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


def choose(x: Tensor, router: Tensor, chosen: int, *, renormalised: bool) -> tuple[Tensor, Tensor]:
    """The experts of each row and their shares: see `experts.route`.

    Args:
        x: [T, hidden], contiguous, T at least 1.
        router: [experts, hidden], contiguous.

    Returns:
        [T, chosen] int32 and [T, chosen] float32, the largest share first. A row of which a logit is NaN or
        infinite has its first experts, and NaN for shares.
    """
    (rows, size), experts = x.shape, len(router)
    share = max(_LEAST_SHARE, triton.cdiv(triton.cdiv(size, _MOST_SPLITS), 64) * 64)
    splits, block = triton.cdiv(size, share), triton.next_power_of_2(experts)
    parts = x.new_empty(rows, splits, experts, dtype=torch.float32)
    of_program = min(64, max(16, block))
    router_kernel[(triton.cdiv(rows, 16), splits, triton.cdiv(experts, of_program))](
        x, router, parts, rows, size, experts,
        SHARE=share, BLOCK_M=16, BLOCK_E=of_program, BLOCK_K=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    found = x.new_empty(rows, chosen, dtype=torch.int32)
    shares = x.new_empty(rows, chosen, dtype=torch.float32)
    choose_kernel[(rows,)](
        parts, found, shares, experts,
        SPLITS=splits, CHOSEN=chosen, RENORMALISED=renormalised, PLACES=triton.next_power_of_2(chosen),
        BLOCK=block, num_warps=1 if block <= 256 else 4,
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


def expert_products(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    found: Assignments,
    shape: ExpertsShape,
    *,
    chosen: int,
    activation: str,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What each row's experts give, times their shares.

    Args:
        x: [T, hidden], contiguous.
        gate_up: [experts * 2 * width, hidden], contiguous, each expert's gate and then its up projection.
        down: [experts * hidden, width], contiguous.
        found: who chose whom; shape: of the pass.
        activation: "silu" or "gelu_tanh".
        scales: of weights in 8 bits, a factor on each output of both, float32.

    Returns:
        [T * chosen, hidden], by row and then from its best expert on.
    """
    hidden, width = x.shape[1], down.shape[1]
    assignments = found.shares.numel()
    inner, parts = x.new_empty(assignments, width), x.new_empty(assignments, hidden)
    gate_scale, down_scale = (found.shares, found.shares) if scales is None else scales

    def launch(rows: Tensor, weight: Tensor, scale: Tensor, y: Tensor, tile: Tile, gate: int) -> None:
        outputs = y.shape[1]
        experts_kernel[(found.num_slots * triton.cdiv(outputs, tile.outputs),)](
            rows, found.order, found.slots, found.shares, weight, scale, y,
            found.num_slots, rows.shape[1], outputs,
            GATE=gate, SCALED=scales is not None, ALONE=shape.alone, CHOSEN=chosen, GROUP=_GROUP,
            BLOCK_M=shape.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.channels,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    launch(x, gate_up, gate_scale, inner, shape.gate_up, _GATES[activation])
    launch(inner, down, down_scale, parts, shape.down, 0)
    return parts


def join_experts(
    x: Tensor,
    parts: Tensor,
    chosen: int,
    *,
    after: Tensor | None,
    before: Tensor | None,
    eps: float,
    offset: bool = False,
    residual_scale: float = 1.0,
    y: Tensor | None = None,
) -> Tensor:
    """`triton_kernels.add_norm` of the sums of `parts` [T * chosen, hidden], contiguous."""
    rows, size = x.shape
    if before is None:
        y = x
    elif y is None:
        y = torch.empty_like(x)
    if rows == 0:
        return y
    block = triton.next_power_of_2(size)
    join_experts_kernel[(rows,)](
        x, parts, x if after is None else after, x if before is None else before, y,
        size, residual_scale, eps,
        CHOSEN=chosen, AFTER=after is not None, BEFORE=before is not None, OFFSET=offset, BLOCK=block,
        num_warps=warps_for(block),
    )  # fmt: skip
    return y


def experts_parts(x: Tensor, experts: Experts, activation: str) -> Tensor:
    """What each row's experts give, times their shares.

    Args:
        x: [T, hidden], contiguous.
        experts: their weights, on the device of x.
        activation: of their gates, "silu" or "gelu_tanh".

    Returns:
        [T * chosen, hidden], see `join_experts`.
    """
    if not len(x):
        return x
    shape, chosen = shape_for(experts, len(x)), experts.chosen
    chose = choose(x, experts.router, chosen, renormalised=experts.renormalised)
    found = assign(*chose, experts.count, shape)
    return expert_products(
        x,
        experts.gate_up,
        experts.down,
        found,
        shape,
        chosen=chosen,
        activation=activation,
        scales=experts.scales,
    )


def shape_for(experts: Experts, rows: int) -> ExpertsShape:
    """The shape of a pass of so many rows through these experts on their device."""
    weight = experts.gate_up
    return _shape(
        rows,
        experts.count,
        experts.chosen,
        experts.hidden,
        experts.width,
        experts.router.element_size(),
        weight.element_size(),
        *_device(weight.device.index if weight.device.type == "cuda" else None),
    )


@functools.lru_cache(maxsize=4096)
def _shape(
    rows: int,
    experts: int,
    chosen: int,
    hidden: int,
    width: int,
    itemsize: int,
    weight_itemsize: int,
    processors: int,
    shared: int,
) -> ExpertsShape:
    return experts_shape(
        rows,
        experts=experts,
        chosen=chosen,
        hidden=hidden,
        width=width,
        itemsize=itemsize,
        weight_itemsize=weight_itemsize,
        processors=processors,
        shared=shared,
    )


@functools.cache
def _device(index: int | None) -> tuple[int, int]:
    """Multiprocessors of a CUDA device, and bytes of shared memory of each; of an H100 without one."""
    if index is None:
        return 132, SHARED
    properties = torch.cuda.get_device_properties(index)
    # The latter is not in every torch.
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_multiprocessor", SHARED)
