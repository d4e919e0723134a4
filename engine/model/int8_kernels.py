"""What lies between two int8 matrix products, one pass over each row (numba, on torch's own threads).

With torch's operators this takes about fifty calls a layer and as many passes over memory. Each row is
computed by itself and in one order, so its neighbours change no bit of it. All arrays are C-contiguous;
`acc` is a product's int32 sums [T, out] and `weight_scale` [out] float32 what its channels are multiplied
by. A row's `scale` is its largest magnitude, so that 127 levels stand for it; a row that is not finite has
a scale that is not, and stays so. Kernels take their arguments as `engine.cpu_team.Team.run` does, ROWS rows
in at most MOST_TASKS tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu_team import JIT, SUMS, bytes_, exp2, floats, multiply_add, task_kernel, words

__all__ = ["norm_quantize", "quantize", "residual", "residual_norm_quantize", "rotary", "silu_mul_quantize"]

# Places in a kernel's arguments; addresses unless said otherwise. The two before are the team's.
ROWS, WIDTH, BLOCK, HEADS, HEAD_DIM = range(2, 7)
"""Numbers: T, a row of the result, channels mixed together, heads that are rotated and their size."""
X, ACC, OUT = range(7, 10)
"""float32 [T, WIDTH]; a product's int32 [T, WIDTH or twice that]; int8 or float32 [T, WIDTH]."""
WEIGHT_SCALE, SCALE, NORM, EPS, COS, SIN = range(10, 16)
"""float32: [WIDTH], [T], [WIDTH] the norm's weight times the signs of the mixing, [1], [T, head_dim] twice,
the sign of rotate_half folded into sin."""

MOST_TASKS = 64

_LANES = 16
_PASS = 4
"""Levels of the mixing in one pass over a row: sixteen vectors."""
_INT = ir.IntType(64)
_VECTOR = ir.VectorType(ir.FloatType(), _LANES)

_F = np.float32
_LEVELS = _F(127.0)
_LOG2_E = _F(1.4426950408889634)


@intrinsic
def _float_of(_typing: Any, _bits: Any) -> Any:
    """The float32 of these 32 bits."""

    def code(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.int32), code


@njit(**JIT)
def _round_row(row: Any, bits: Any, out: Any) -> Any:
    """`row` [n] float32 to int8 `out` [n]; `bits` is the row's memory as int32. Returns the scale."""
    # Magnitudes of floats order as integers, where a maximum is one instruction; NaN is above infinity.
    largest = np.int32(0)
    for i in range(row.size):
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    if largest == 0 or largest >= 0x7F800000:
        out[:] = 0
        return _F(0.0) if largest == 0 else _F(np.nan)
    scale = _float_of(largest)
    level = _LEVELS / scale
    for i in range(row.size):
        out[i] = np.int8(np.int32(np.rint(row[i] * level)))
    return scale


@intrinsic
def _mix_levels(_typing: Any, _row: Any, _size: Any, _step: Any, _levels: Any) -> Any:
    """1 .. `_PASS` levels of `_mix` in one pass over the row; address, numbers.

    Where vectors do not fill a run of `step`, the last one's other lanes are written back as they were: up to
    `_LANES` numbers behind the row are read and written.
    """

    def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        for levels in range(1, _PASS + 1):
            with builder.if_then(builder.icmp_signed("==", values[3], _INT(levels))):
                _levels_of(builder, levels, *values[:3])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


def _levels_of(builder: Any, levels: int, row: Any, size: Any, step: Any) -> None:
    lanes = ir.Constant(ir.VectorType(_INT, _LANES), list(range(_LANES)))
    none = ir.Constant(lanes.type, ir.Undefined)
    first = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
    radix = 1 << levels
    runs = cgutils.for_range_slice(builder, _INT(0), size, builder.mul(step, _INT(radix)))
    vectors = cgutils.for_range_slice(builder, _INT(0), step, _INT(_LANES))
    with runs as (start, _), vectors as (at, _):
        places = []
        for part in range(radix):
            index = builder.add(builder.add(start, at), builder.mul(step, _INT(part)))
            address = builder.add(row, builder.mul(index, _INT(4)))
            places.append(builder.inttoptr(address, _VECTOR.as_pointer()))
        before = [builder.load(place, align=4) for place in places]
        parts = before
        for level in range(levels):
            distance = 1 << level
            parts = [
                builder.fsub(parts[part - distance], value)
                if part & distance
                else builder.fadd(value, parts[part + distance])
                for part, value in enumerate(parts)
            ]
        left = builder.insert_element(none, builder.sub(step, at), ir.IntType(32)(0))
        inside = builder.icmp_signed("<", lanes, builder.shuffle_vector(left, none, first))
        for place, old, new in zip(places, before, parts, strict=True):
            builder.store(builder.select(inside, new, old), place, align=4)


@njit(**JIT)
def _mix(row: Any, block: int) -> None:
    """Sylvester's matrix of ±1 over the leading axis of `row` seen as [block, n / block], in place.

    `row` is of `_row_scratch`.
    """
    step = row.size // block
    while step < row.size:
        levels = 1
        while levels < _PASS and step << levels < row.size:
            levels += 1
        _mix_levels(row.ctypes.data, row.size, step, levels)
        step <<= levels


@njit(**SUMS)
def _sum_of_squares(x: Any) -> Any:
    total = _F(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@njit(**JIT)
def _norm_row(x: Any, weight: Any, eps: Any, block: int, row: Any, bits: Any, out: Any) -> Any:
    inverse = _F(1.0) / np.sqrt(_sum_of_squares(x) / _F(x.size) + eps)
    for i in range(x.size):
        row[i] = x[i] * inverse * weight[i]
    _mix(row, block)
    return _round_row(row, bits, out)


@njit(**JIT)
def _range(arguments: Any, number: int) -> tuple[int, int]:
    """The rows of a task."""
    rows, tasks = arguments[ROWS], min(arguments[ROWS], MOST_TASKS)
    return number * rows // tasks, (number + 1) * rows // tasks


@njit(**JIT)
def _row_scratch(size: int) -> Any:
    """[size] float32, and the same memory as int32, with room for a vector behind it."""
    row = np.empty(size + _LANES, dtype=np.float32)[:size]
    return row, row.view(np.int32)


@njit(**JIT)
def _norm_quantize(arguments: Any, number: int) -> None:
    rows, size = arguments[ROWS], arguments[WIDTH]
    x = floats(arguments[X], (rows, size))
    weight, eps = floats(arguments[NORM], (size,)), floats(arguments[EPS], (1,))[0]
    out, scale = bytes_(arguments[OUT], (rows, size)), floats(arguments[SCALE], (rows,))
    row, bits = _row_scratch(size)
    first, last = _range(arguments, number)
    for t in range(first, last):
        scale[t] = _norm_row(x[t], weight, eps, arguments[BLOCK], row, bits, out[t])


@njit(**JIT)
def _add_product(acc: Any, weight_scale: Any, scale: Any, x: Any) -> None:
    for i in range(x.size):
        x[i] = multiply_add(_F(acc[i]) * weight_scale[i], scale, x[i])


@njit(**JIT)
def _residual(arguments: Any, number: int) -> None:
    rows, size = arguments[ROWS], arguments[WIDTH]
    x, acc = floats(arguments[X], (rows, size)), words(arguments[ACC], (rows, size))
    weight_scale, scale = floats(arguments[WEIGHT_SCALE], (size,)), floats(arguments[SCALE], (rows,))
    first, last = _range(arguments, number)
    for t in range(first, last):
        _add_product(acc[t], weight_scale, scale[t], x[t])


@njit(**JIT)
def _residual_norm_quantize(arguments: Any, number: int) -> None:
    rows, size = arguments[ROWS], arguments[WIDTH]
    x, acc = floats(arguments[X], (rows, size)), words(arguments[ACC], (rows, size))
    weight_scale, scale = floats(arguments[WEIGHT_SCALE], (size,)), floats(arguments[SCALE], (rows,))
    weight, eps = floats(arguments[NORM], (size,)), floats(arguments[EPS], (1,))[0]
    out = bytes_(arguments[OUT], (rows, size))
    row, bits = _row_scratch(size)
    first, last = _range(arguments, number)
    for t in range(first, last):
        _add_product(acc[t], weight_scale, scale[t], x[t])
        scale[t] = _norm_row(x[t], weight, eps, arguments[BLOCK], row, bits, out[t])


@njit(**JIT)
def _rotate_head(acc: Any, weight_scale: Any, scale: Any, cos: Any, sin: Any, out: Any) -> None:
    half = out.size // 2
    for i in range(half):
        a = _F(acc[i]) * weight_scale[i] * scale
        b = _F(acc[half + i]) * weight_scale[half + i] * scale
        out[i] = multiply_add(a, cos[i], b * sin[i])
        out[half + i] = multiply_add(b, cos[half + i], a * sin[half + i])


@njit(**JIT)
def _rotary(arguments: Any, number: int) -> None:
    rows, heads, dim, width = arguments[ROWS], arguments[HEADS], arguments[HEAD_DIM], arguments[WIDTH]
    acc, weight_scale = words(arguments[ACC], (rows, width)), floats(arguments[WEIGHT_SCALE], (width,))
    scale, out = floats(arguments[SCALE], (rows,)), floats(arguments[OUT], (rows, width))
    cos, sin = floats(arguments[COS], (rows, dim)), floats(arguments[SIN], (rows, dim))
    first, last = _range(arguments, number)
    for t in range(first, last):
        for head in range(heads):
            own = slice(head * dim, (head + 1) * dim)
            _rotate_head(acc[t, own], weight_scale[own], scale[t], cos[t], sin[t], out[t, own])
        for i in range(heads * dim, width):
            out[t, i] = _F(acc[t, i]) * weight_scale[i] * scale[t]


@njit(**JIT)
def _quantize(arguments: Any, number: int) -> None:
    rows, size = arguments[ROWS], arguments[WIDTH]
    x, bits = floats(arguments[X], (rows, size)), words(arguments[X], (rows, size))
    out, scale = bytes_(arguments[OUT], (rows, size)), floats(arguments[SCALE], (rows,))
    first, last = _range(arguments, number)
    for t in range(first, last):
        scale[t] = _round_row(x[t], bits[t], out[t])


@njit(**JIT)
def _silu_mul_row(
    acc: Any, weight_scale: Any, own: Any, block: int, row: Any, bits: Any, power: Any, out: Any
) -> Any:
    width = row.size
    # exp(-gate) = 2^f 2^n: 2^f into `power`, 2^n by its bits into `row`.
    factor = own * -_LOG2_E
    for i in range(width):
        y = _F(acc[i]) * weight_scale[i] * factor
        y = min(max(y, _F(-126.0)), _F(126.0))
        n = np.rint(y)
        power[i] = exp2(y - n)
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for i in range(width):
        gate = _F(acc[i]) * weight_scale[i] * own
        up = _F(acc[width + i]) * weight_scale[width + i] * own
        row[i] = gate * up / (_F(1.0) + power[i] * row[i])
    _mix(row, block)
    return _round_row(row, bits, out)


@njit(**JIT)
def _silu_mul_quantize(arguments: Any, number: int) -> None:
    rows, size = arguments[ROWS], arguments[WIDTH]
    acc = words(arguments[ACC], (rows, 2 * size))
    weight_scale, scale = floats(arguments[WEIGHT_SCALE], (2 * size,)), floats(arguments[SCALE], (rows,))
    out = bytes_(arguments[OUT], (rows, size))
    row, bits = _row_scratch(size)
    power = np.empty(size, dtype=np.float32)
    first, last = _range(arguments, number)
    for t in range(first, last):
        scale[t] = _silu_mul_row(acc[t], weight_scale, scale[t], arguments[BLOCK], row, bits, power, out[t])


norm_quantize = task_kernel(_norm_quantize)
"""RMSNorm, mixing and rounding of X to OUT and SCALE."""
residual = task_kernel(_residual)
"""X += the product, in place."""
residual_norm_quantize = task_kernel(_residual_norm_quantize)
"""`residual`, then `norm_quantize`; SCALE is the product's before and that of OUT after."""
rotary = task_kernel(_rotary)
"""The product to OUT float32 [T, heads * head_dim], its first HEADS heads rotated."""
quantize = task_kernel(_quantize)
"""X rounded to OUT and SCALE."""
silu_mul_quantize = task_kernel(_silu_mul_quantize)
"""silu(gate) * up of the product [T, 2 * WIDTH], mixed and rounded to OUT; SCALE as above."""
