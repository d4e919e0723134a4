"""A mixture of experts as Triton kernels: each expert's products are of its own rows. CUDA only.

Which rows are whose is known to the device alone, and a captured step has the same grids whatever it holds.
So there are slots, as many as may be needed (`experts_shapes`): when rows have chosen and slots are filled
(`experts_choice_triton`), the programs of the two products look there for an expert and for which rows. A
slot that is not needed costs its programs a glance.

Sums are in float32. What a row gives depends on nothing that another one holds: each has its own columns of
a product, and its experts are added up in the order in which it chose them. Weights in 8 or 4 bits are lifted
to the activations' dtype as they come from memory.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.model.experts_choice_triton import Assignments, assign, choose
from engine.model.experts_shapes import ExpertsShape, Tile, experts_shape
from engine.model.product_shapes import SHARED
from engine.model.triton_kernels import _normed, activated, gated_activation, warps_for

if TYPE_CHECKING:
    from engine.model.experts import Experts, SharedExpert
    from engine.model.experts_config import Clamp

__all__ = ["Beside", "expert_products", "experts_parts", "join_experts", "shape_for", "shared_expert"]

_GROUP = 8
"""Slots whose programs take the same outputs one behind the other: those of an expert share its weights."""


@triton.jit
def lifted(codes, scales, kind: tl.constexpr, HIGH: tl.constexpr):
    """What the codes in the low or the HIGH bits of bytes [N, 64] stand for, by words of scales [N].

    The bits of a code, put where a float32 has its own, are those of 2 ** -126 of its value, also where that
    is subnormal. The factor on it makes up for that.
    """
    rows: tl.constexpr = codes.shape[0]
    code = codes.to(tl.uint32)
    if HIGH:
        code = code >> 4
        scales = scales >> 16
    else:
        code = code & 15
    # 22 bits further up, and 28 for the sign.
    value = ((code * 0x10400000) & 0x81C00000).to(tl.float32, bitcast=True)
    exponent = (scales[:, None] >> (8 * tl.arange(0, 2))[None, :]) & 255
    factor = ((exponent + 126) << 23).to(tl.float32, bitcast=True)
    value = tl.reshape(value, [rows, 2, 32]) * factor[:, :, None]
    return tl.reshape(value, [rows, 64]).to(kind)


@triton.jit
def _sums_of_4_bits(
    sums, up, x_at, weight_ptr, scale_ptr, of_expert, output, inside, size, width, GATE: tl.constexpr
):
    """As `experts_kernel` has sums, of weights as in `engine.model.mxfp4`, 64 bytes of a row at a time."""
    kind: tl.constexpr = x_at.dtype.element_ty
    half = size // 2
    words = tl.cdiv(size, 128)
    outputs = tl.cast(width, tl.int64)
    there = output < width
    weight_at = weight_ptr + (of_expert + output)[:, None] * half
    up_at = weight_at + outputs * half
    scale_at = scale_ptr + of_expert * words + output
    up_scale_at = scale_at + outputs * words
    for word in range(words):
        byte = word * 64 + tl.arange(0, 64)
        known = (byte < half)[None, :]
        x_low = tl.trans(tl.load(x_at + byte[None, :], mask=inside & known, other=0.0))
        x_high = tl.trans(tl.load(x_at + (half + byte)[None, :], mask=inside & known, other=0.0))
        w = tl.load(weight_at + byte[None, :], mask=there[:, None] & known, other=0)
        scales = tl.load(scale_at + word * outputs, mask=there, other=0)
        sums = tl.dot(lifted(w, scales, kind, False), x_low, sums, input_precision="ieee")
        sums = tl.dot(lifted(w, scales, kind, True), x_high, sums, input_precision="ieee")
        if GATE:
            u = tl.load(up_at + byte[None, :], mask=there[:, None] & known, other=0)
            scales = tl.load(up_scale_at + word * outputs, mask=there, other=0)
            up = tl.dot(lifted(u, scales, kind, False), x_low, up, input_precision="ieee")
            up = tl.dot(lifted(u, scales, kind, True), x_high, up, input_precision="ieee")
    return sums, up


@triton.jit
def _clamped(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """`families.Clamp` of gate and up, in float32. What is not a number stays so."""
    gate = tl.where(gate > LIMIT, LIMIT, gate)
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    # Beyond -80 the gate is shut, and exp would overflow.
    shut = tl.exp(-tl.where(gate * ALPHA < -80.0, -80.0, gate * ALPHA))
    return (up + 1.0) * (gate / (1.0 + shut))


@triton.jit(do_not_specialize=["slots"])
def experts_kernel(
    x_ptr, order_ptr, slot_ptr, share_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, slots, size, width,
    GATE: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    ALONE: tl.constexpr, CHOSEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One of an expert's products, of the rows of a slot; the grid has slots * outputs / BLOCK_N programs.

    Outputs come first in the product: tensor cores take 64 of them with as few as 8 rows.

    Args:
        x_ptr: with GATE [rows, size], the input; else [assignments, size], in the order.
        order_ptr: see `assign_kernel`. ALONE it is not looked at, and `slot_ptr` has just the experts.
        share_ptr: [assignments] float32, factors on what a row's expert gives; not with GATE.
        weight_ptr: [experts, width, size], with GATE [experts, 2, width, size]; in 4 bits bytes, see
            `engine.model.mxfp4`.
        scale_ptr: SCALED by 8 a factor on each of the weight's outputs, float32; by 4 words of scales,
            [experts, (2,) size / 128, width]; by 0 none.
        bias_ptr: with BIAS as the weight without its last dimension.
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
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = sums
    if SCALED == 4:
        sums, up = _sums_of_4_bits(
            sums, up, x_at, weight_ptr, scale_ptr, of_expert, output, inside[:, None], size, width, GATE
        )
    else:
        weight_at = weight_ptr + (of_expert + output)[:, None] * size
        up_at = weight_at + outputs * size
        for start in range(0, size, BLOCK_K):
            channel = start + tl.arange(0, BLOCK_K)
            known = (channel < size)[None, :]
            x = tl.trans(tl.load(x_at + channel[None, :], mask=inside[:, None] & known, other=0.0))
            w = tl.load(weight_at + channel[None, :], mask=there & known, other=0.0)
            sums = tl.dot(w.to(x.dtype), x, sums, input_precision="ieee")
            if GATE:
                u = tl.load(up_at + channel[None, :], mask=there & known, other=0.0)
                up = tl.dot(u.to(x.dtype), x, up, input_precision="ieee")
    own = of_expert + output
    if SCALED == 8:
        sums *= tl.load(scale_ptr + own, mask=output < width, other=0.0)[:, None]
        if GATE:
            up *= tl.load(scale_ptr + own + outputs, mask=output < width, other=0.0)[:, None]
    if BIAS:
        sums += tl.load(bias_ptr + own, mask=output < width, other=0.0).to(tl.float32)[:, None]
        if GATE:
            up += tl.load(bias_ptr + own + outputs, mask=output < width, other=0.0).to(tl.float32)[:, None]
    if GATE == 3:
        y = _clamped(sums.to(kind).to(tl.float32), up.to(kind).to(tl.float32), LIMIT, ALPHA).to(kind)
        out = place
    elif GATE:
        y = (activated(sums.to(kind), GATE == 2).to(tl.float32) * up.to(kind).to(tl.float32)).to(kind)
        out = place
    else:
        y = (sums * tl.load(share_ptr + assignment, mask=inside, other=0.0)[None, :]).to(kind)
        out = assignment
    tl.store(y_ptr + out.to(tl.int64)[None, :] * width + output[:, None], y, mask=there & inside[None, :])


@triton.jit
def join_experts_kernel(
    x_ptr, part_ptr, shared_ptr, of_ptr, gate_ptr, after_ptr, before_ptr, y_ptr, size, residual_scale, eps,
    CHOSEN: tl.constexpr, SHARED: tl.constexpr, GATED: tl.constexpr, AFTER: tl.constexpr,
    BEFORE: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`triton_kernels.add_norm` of the sum of what a row's experts gave; a program of the grid (rows).

    With SHARED `shared_ptr` [rows, size] is added to it; GATED times the sigmoid of a product of `of_ptr`
    [rows, size] with `gate_ptr` [size].
    """
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
    if SHARED:
        beside = tl.load(shared_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            of = tl.load(of_ptr + at, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
            beside *= 1.0 / (1.0 + tl.exp(-tl.sum(of * gate, 0)))
        total += beside
    total = total.to(x.dtype).to(tl.float32)
    if AFTER:
        total = _normed(total, after_ptr, column, inside, size, eps, OFFSET).to(x.dtype).to(tl.float32)
    x = (x.to(tl.float32) + total * residual_scale).to(x.dtype)
    tl.store(x_ptr + at, x, mask=inside)
    if BEFORE:
        y = _normed(x.to(tl.float32), before_ptr, column, inside, size, eps, OFFSET)
        tl.store(y_ptr + at, y.to(x.dtype), mask=inside)


_GATES = {"silu": 1, "gelu_tanh": 2}
_CLAMPED = 3


def expert_products(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    found: Assignments,
    shape: ExpertsShape,
    *,
    chosen: int,
    activation: str,
    clamp: Clamp | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What each row's experts give, times their shares.

    Args:
        x: [T, hidden], contiguous.
        gate_up: [experts * 2 * width, hidden], contiguous, each expert's gate and then its up projection;
            in 4 bits uint8, see `Experts`.
        down: [experts * hidden, width], contiguous; likewise.
        found: who chose whom; shape: of the pass.
        activation: "silu" or "gelu_tanh".
        clamp: in its place.
        scales: of weights in 8 bits, a factor on each output of both, float32; in 4 bits, words of them.
        biases: on the outputs of both.

    Returns:
        [T * chosen, hidden], by row and then from its best expert on.
    """
    hidden = x.shape[1]
    width = len(gate_up) * hidden // (2 * len(down))  # whatever their bits
    assignments = found.shares.numel()
    inner, parts = x.new_empty(assignments, width), x.new_empty(assignments, hidden)
    bits = 0 if scales is None else 4 if gate_up.dtype == torch.uint8 else 8
    limit, alpha = (0.0, 0.0) if clamp is None else clamp
    nothing = found.shares, found.shares

    def launch(which: int, rows: Tensor, weight: Tensor, y: Tensor, tile: Tile, gate: int) -> None:
        outputs = y.shape[1]
        experts_kernel[(found.num_slots * triton.cdiv(outputs, tile.outputs),)](
            rows, found.order, found.slots, found.shares, weight,
            (scales or nothing)[which], (biases or nothing)[which], y,
            found.num_slots, rows.shape[1], outputs,
            GATE=gate, LIMIT=limit, ALPHA=alpha, SCALED=bits, BIAS=biases is not None,
            ALONE=shape.alone, CHOSEN=chosen, GROUP=_GROUP,
            BLOCK_M=shape.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.channels,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    launch(0, x, gate_up, inner, shape.gate_up, _GATES[activation] if clamp is None else _CLAMPED)
    launch(1, inner, down, parts, shape.down, 0)
    return parts


class Beside(NamedTuple):
    """What an MLP beside the experts gave, [T, hidden], of its input [T, hidden], both contiguous.

    Args:
        gate: see `SharedExpert`.
    """

    given: Tensor
    of: Tensor
    gate: Tensor | None


def shared_expert(x: Tensor, shared: SharedExpert, activation: str) -> Beside:
    """Of x [T, hidden], contiguous; its two products are torch's."""
    inner = gated_activation(shared.gate_up_proj(x), activation)
    return Beside(shared.down_proj(inner), x, shared.gate)


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
    beside: Beside | None = None,
) -> Tensor:
    """`triton_kernels.add_norm` of the sums of `parts` [T * chosen, hidden], contiguous, with what is
    `beside`."""
    rows, size = x.shape
    if before is None:
        y = x
    elif y is None:
        y = torch.empty_like(x)
    if rows == 0:
        return y
    block = triton.next_power_of_2(size)
    shared, of, gate = beside or (x, x, None)
    join_experts_kernel[(rows,)](
        x, parts, shared, of, x if gate is None else gate,
        x if after is None else after, x if before is None else before, y, size, residual_scale, eps,
        CHOSEN=chosen, SHARED=beside is not None, GATED=gate is not None, AFTER=after is not None,
        BEFORE=before is not None, OFFSET=offset, BLOCK=block,
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
    chose = choose(
        x,
        experts.router,
        chosen,
        renormalised=experts.renormalised,
        bias=experts.router_bias,
        gate=experts.gate,
        correction=experts.correction,
    )
    return expert_products(
        x,
        experts.gate_up,
        experts.down,
        assign(*chose, experts.count, shape),
        shape,
        chosen=chosen,
        activation=activation,
        clamp=experts.clamp,
        scales=_pair(experts.gate_up_scales, experts.down_scales) or experts.scales,
        biases=_pair(experts.gate_up_bias, experts.down_bias),
    )


def _pair(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if first is None or second is None else (first, second)


def shape_for(experts: Experts, rows: int) -> ExpertsShape:
    """The shape of a pass of so many rows through these experts on their device."""
    weight = experts.gate_up
    return _shape(
        rows,
        experts.count,
        experts.chosen,
        experts.hidden,
        experts.width,
        experts.dtype.itemsize,
        0 if experts.gate_up_scales is not None else weight.element_size(),
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
