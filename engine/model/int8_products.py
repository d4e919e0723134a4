"""int8 products of few rows at the speed of reading the weight: AVX-512 VNNI, on torch's own threads.

torch's `_int_mm` gives the weight to oneDNN as it lies, and from two rows on that is reordered at every call:
SmolLM2's 120 matrices take 2.6 ms at one row, 6.0 at four and 9.4 at sixteen; here 2.3, 2.4 and 4.1 (two
cores). So the weight is reordered once, and each byte of it is read once for up to `_MOST_ROWS` rows.

One instruction adds four products of an unsigned and a signed byte to each of sixteen int32. The unsigned
side is the weight plus 128, which adds 128 times the sum of a row to all of its products; every sum starts
with that subtracted. int32 arithmetic is modulo 2^32, so the sums are exact whatever the order.

This module compiles when it is imported and must not be where `quantize.blocked_runs_here()` is false.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from engine.cpu_team import JIT, Arguments, Team, bytes_, task_kernel, words

__all__ = ["BlockedWeight"]

# Places in the kernels' arguments; addresses unless said otherwise. The two before are the team's.
A, WEIGHT, OUT, ROWS, IN, CHANNELS, PANELS, WEIGHT_SCALE, SCALE = range(2, 11)
"""int8 [ROWS, IN]; see `BlockedWeight`; int32 or float32 [ROWS, CHANNELS]; four numbers, PANELS those of a
task; float32 [CHANNELS] and [ROWS]; 0 for int32 results."""

_LANES = 16
_BYTES = 4 * _LANES
_PANEL = 2 * _LANES
"""Output channels that are summed together."""

_MOST_ROWS = 12
"""Rows that are summed together: with two registers of sums each, they fill most of the 32."""

_HEIGHTS = (1, 2, 4, 6, 8, 10, _MOST_ROWS)
"""Numbers of rows there is code for; others take the next and repeat their last row."""

_AHEAD = 2048
"""Bytes of the weight that are asked for before they are needed. The processor's own prefetching ends at
pages: with it alone these loops take 4.6 ms at sixteen rows, with 1024 bytes 4.0, with this 3.7."""

_TASKS_A_THREAD = 4

_INT, _WORD = ir.IntType(64), ir.IntType(32)
_WORDS = ir.VectorType(_WORD, _LANES)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    """The value in all lanes."""
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, value, _WORD(0))
    return builder.shuffle_vector(first, empty, ir.Constant(_WORDS, [0] * _LANES))


def _prefetch(builder: Any, address: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, _WORD])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    read, keep, data = _WORD(0), _WORD(3), _WORD(1)
    builder.call(function, [builder.inttoptr(address, pointer), read, keep, data])


def _dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """The total plus, in each lane, the products of four bytes; all [16] int32."""
    kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(function, [total, unsigned, signed])


@intrinsic
def _sum_of_bytes(_typing: Any, _address: Any, _count: Any) -> Any:
    """int32: the sum of int8, a multiple of 64 of them."""

    def code(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        address, count = values
        total = cgutils.alloca_once_value(builder, ir.Constant(_WORDS, [0] * _LANES))
        ones = ir.Constant(_WORDS, [0x01010101] * _LANES)
        with cgutils.for_range(builder, builder.udiv(count, _INT(_BYTES))) as loop:
            at = builder.add(address, builder.mul(loop.index, _INT(_BYTES)))
            builder.store(_dot(builder, builder.load(total), ones, _load(builder, at, _WORDS, 1)), total)
        kind = ir.FunctionType(_WORD, [_WORDS])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v16i32")
        return builder.call(function, [builder.load(total)])

    return types.int32(types.int64, types.int64), code


@intrinsic
def _panel_rows(
    _typing: Any,
    _count: Any,
    _a: Any,
    _a_step: Any,
    _weight: Any,
    _groups: Any,
    _ahead: Any,
    _starts: Any,
    _out: Any,
    _out_step: Any,
    _weight_scale: Any,
    _scale: Any,
) -> Any:
    """One panel's products with at most `_MOST_ROWS` rows.

    Args, all int64, addresses and bytes unless said otherwise: number of rows; the rows and from one to the
    next; the panel, its number of groups of four input channels, and how far ahead of a group to fetch; int32
    [rows] what each row's sums start with; the results and from row to row; the scales of the panel and of
    the rows, 0 for int32 results.
    """

    def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        before = 0
        for height in _HEIGHTS:
            more = builder.icmp_signed(">", values[0], _INT(before))
            with builder.if_then(builder.and_(more, builder.icmp_signed("<=", values[0], _INT(height)))):
                _tile(builder, height, *values)
            before = height
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), code


def _tile(
    builder: Any,
    height: int,
    count: Any,
    a: Any,
    a_step: Any,
    weight: Any,
    groups: Any,
    ahead: Any,
    starts: Any,
    out: Any,
    out_step: Any,
    weight_scale: Any,
    scale: Any,
) -> None:
    """The code for up to `height` rows."""
    last = builder.sub(count, _INT(1))
    rows = [
        builder.select(builder.icmp_signed("<", _INT(row), last), _INT(row), last) for row in range(height)
    ]
    addresses = [builder.add(a, builder.mul(row, a_step)) for row in rows]
    sums = []
    for row in rows:
        start = _load(builder, builder.add(starts, builder.mul(row, _INT(4))), _WORD, 4)
        sums.append([cgutils.alloca_once_value(builder, _spread(builder, start, _WORDS)) for _ in range(2)])
    with cgutils.for_range(builder, groups) as loop:
        at = builder.add(weight, builder.mul(loop.index, _INT(4 * _PANEL)))
        halves = []
        for half in range(2):
            place = builder.add(at, _INT(_BYTES * half))
            _prefetch(builder, builder.add(place, ahead))
            halves.append(_load(builder, place, _WORDS, _BYTES))
        offset = builder.mul(loop.index, _INT(4))
        for address, totals in zip(addresses, sums, strict=True):
            four = _spread(builder, _load(builder, builder.add(address, offset), _WORD, 1), _WORDS)
            for half, total in zip(halves, totals, strict=True):
                builder.store(_dot(builder, builder.load(total), half, four), total)
    with builder.if_else(builder.icmp_signed("==", scale, _INT(0))) as (unscaled, scaled):
        with unscaled:
            for row, totals in zip(rows, sums, strict=True):
                for half, total in enumerate(totals):
                    place = builder.add(builder.add(out, builder.mul(row, out_step)), _INT(_BYTES * half))
                    _store(builder, builder.load(total), place)
        with scaled:
            channels = [
                _load(builder, builder.add(weight_scale, _INT(_BYTES * half)), _FLOATS, 4)
                for half in range(2)
            ]
            for row, totals in zip(rows, sums, strict=True):
                own = _load(builder, builder.add(scale, builder.mul(row, _INT(4))), ir.FloatType(), 4)
                for half, total in enumerate(totals):
                    place = builder.add(builder.add(out, builder.mul(row, out_step)), _INT(_BYTES * half))
                    result = builder.fmul(builder.sitofp(builder.load(total), _FLOATS), channels[half])
                    _store(builder, builder.fmul(result, _spread(builder, own, _FLOATS)), place)


@njit(**JIT)
def _products(arguments: Any, number: int) -> None:
    rows, size, channels = arguments[ROWS], arguments[IN], arguments[CHANNELS]
    a, results = bytes_(arguments[A], (rows, size)), words(arguments[OUT], (rows, channels))
    starts = np.empty(rows, dtype=np.int32)
    whole = size // _BYTES * _BYTES
    for row in range(rows):
        total = _sum_of_bytes(arguments[A] + row * size, whole)
        for i in range(whole, size):
            total += np.int32(a[row, i])
        starts[row] = np.int32(-128) * np.int32(total)
    tiles = (rows + _MOST_ROWS - 1) // _MOST_ROWS
    height = (rows + tiles - 1) // tiles
    # A last panel that is not full has its scales and its results here.
    part, part_scale = np.empty((_MOST_ROWS, _PANEL), dtype=np.int32), np.zeros(_PANEL, dtype=np.int32)
    first = number * arguments[PANELS]
    for panel in range(first, min(first + arguments[PANELS], (channels + _PANEL - 1) // _PANEL)):
        channel = panel * _PANEL
        full = channel + _PANEL <= channels
        weight_scale = arguments[WEIGHT_SCALE] + channel * 4
        if arguments[SCALE] and not full:
            there = words(weight_scale, (channels - channel,))
            part_scale[: there.size] = there
            weight_scale = part_scale.ctypes.data
        for row in range(0, rows, height):
            count = min(height, rows - row)
            _panel_rows(
                count,
                arguments[A] + row * size,
                size,
                arguments[WEIGHT] + channel * size,
                size // 4,
                _AHEAD if row == 0 else _PANEL * size,
                starts.ctypes.data + row * 4,
                arguments[OUT] + (row * channels + channel) * 4 if full else part.ctypes.data,
                (channels if full else _PANEL) * 4,
                weight_scale,
                arguments[SCALE] + row * 4 if arguments[SCALE] else 0,
            )
            if not full:
                for r in range(count):
                    for i in range(channels - channel):
                        results[row + r, channel + i] = part[r, i]


_kernel = task_kernel(_products)


class BlockedWeight:
    """An int8 weight in the order its products are summed in: [panel, in / 4, 32 channels, 4], plus 128.

    Args:
        weight: int8 [out_features, in_features], in_features a multiple of 4. Channels that fill up the last
            panel have a weight of 0.
    """

    def __init__(self, weight: Tensor) -> None:
        self.channels, self.size = weight.shape
        panels = -(-self.channels // _PANEL)
        filled = weight.new_zeros(panels * _PANEL, self.size)
        filled[: self.channels] = weight
        unsigned = filled.view(torch.uint8).bitwise_xor_(128)  # adds 128 modulo 256
        blocks = unsigned.view(panels, _PANEL, self.size // 4, 4).permute(0, 2, 1, 3)
        self._weight = blocks.contiguous()
        self._team, self._panels = Team(), panels

    def sums(self, a: Tensor, out: Tensor) -> Callable[[], None]:
        """A call that sets `out` to a W^T as often as it is made, from what `a` then holds.

        Args:
            a: int8 [rows, in_features], contiguous.
            out: int32 [rows, out_features], contiguous.
        """
        return partial(self._run, *self._arguments(a, out))

    def scaled(self, a: Tensor, weight_scale: Tensor, scale: Tensor) -> Tensor:
        """float32 [rows, out_features]: a W^T * weight_scale * scale, in this order.

        Args:
            a: int8 [rows, in_features].
            weight_scale: float32 [out_features].
            scale: float32 [rows] or [rows, 1].
        """
        a, scale = a.contiguous(), scale.contiguous()
        out = torch.empty(len(a), self.channels)
        arguments, tasks = self._arguments(a, out)
        arguments[WEIGHT_SCALE], arguments[SCALE] = weight_scale.data_ptr(), scale.data_ptr()
        self._run(arguments, tasks)
        return out

    def _run(self, arguments: Arguments, tasks: int) -> None:
        self._team.run(_kernel, arguments, tasks)

    def _arguments(self, a: Tensor, out: Tensor) -> tuple[Arguments, int]:
        arguments = Arguments()
        panels = -(-self._panels // (_TASKS_A_THREAD * torch.get_num_threads()))
        arguments[A], arguments[WEIGHT], arguments[OUT] = (
            a.data_ptr(),
            self._weight.data_ptr(),
            out.data_ptr(),
        )
        arguments[ROWS], arguments[IN], arguments[CHANNELS] = len(a), self.size, self.channels
        arguments[PANELS] = panels
        return arguments, -(-self._panels // panels)
