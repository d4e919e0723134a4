"""Which shapes the kernels of a mixture of experts have: by how many rows an expert is likely to get."""

from __future__ import annotations

from typing import NamedTuple

import triton

from engine.model.product_shapes import SHARED

__all__ = ["ExpertsShape", "Tile", "experts_shape"]

_MOST_ROWS = 128
"""Of a program: with more, sums would not fit its registers."""

_FEWER_ROWS = 32
"""The same in float32, which tensor cores do not multiply, or of odd sizes, not loaded 16 bytes at a time."""

_STAGES = 4
"""Tiles of weights that are under way at most."""

_WIDE = 200 << 10
"""Bytes of shared memory of those multiprocessors whose tensor cores read weights from there: Hopper's."""

_FEW_OUTPUTS = 32
"""With no more, a thread of four warps lifts so few weights of 4 bits in a tile that most of what it does is
to find them: with 16 outputs 17 instructions a weight, where two warps take 12 (compiled for Hopper)."""

_PROGRAMS = 3
"""For each multiprocessor there shall be so many, where outputs can be divided among them."""

_PIECE = 1024
"""Assignments that a program that sorts them looks at together; of many, four times as many."""


class Tile(NamedTuple):
    """Of a product: outputs and channels that a program takes at a time, its warps, tiles under way. Two
    channels of weights in 4 bits count as one: they are a byte."""

    outputs: int
    channels: int
    warps: int
    stages: int


class ExpertsShape(NamedTuple):
    """How a pass goes through its experts: equal ones are the same compilations of all kernels.

    An assignment is one of a row's chosen experts. A slot is what programs look into for an expert and up to
    `rows` of its assignments; there are as many as may be needed, since nobody knows who chooses whom.

    Args:
        rows: of a slot, a power of two.
        alone: one row, which has each expert once: a slot is an assignment, and nothing is sorted.
        led: a slot for each assignment, used if it is its expert's first, or the first of its next `rows`.
            Else an expert's slots lie behind those that all experts before it might need.
        piece: assignments that a program that sorts them looks at together.
    """

    rows: int
    alone: bool
    led: bool
    piece: int
    gate_up: Tile
    down: Tile

    def slots(self, assignments: int, experts: int) -> int:
        """How many there are."""
        if self.alone or self.led:
            return assignments
        return experts + assignments // self.rows


def experts_shape(
    rows: int,
    *,
    experts: int,
    chosen: int,
    hidden: int,
    width: int,
    itemsize: int,
    weight_itemsize: int,
    processors: int,
    shared: int = SHARED,
) -> ExpertsShape:
    """The shape for a pass of so many rows.

    Args:
        experts: of a layer; chosen: of those for each row.
        hidden: channels of a row; width: channels between an expert's two products.
        itemsize: bytes of an activation; weight_itemsize: of a weight, 0 where it has 4 bits.
        processors: multiprocessors of the device.
        shared: bytes of shared memory of each.
    """
    assignments = rows * chosen
    # Most experts shall have all of their rows in one slot, so that their weights are read once.
    likely = triton.next_power_of_2(triton.cdiv(3 * assignments, 2 * experts))
    quick = itemsize == 2 and hidden % 16 == width % 16 == 0
    most = _MOST_ROWS if quick else _FEWER_ROWS
    if weight_itemsize == 0 and not (quick and shared >= _WIDE):
        most = 64 if quick else 16  # lifted weights take registers too
    of_slot = min(max(likely, 16), most)
    led = assignments <= experts + assignments // of_slot
    slots = assignments if led else experts + assignments // of_slot

    def tile(outputs: int, size: int, gated: bool) -> Tile:
        found, channels, warps = _tile(outputs, of_slot, slots, gated, processors) if quick else (32, 32, 4)
        if gated and warps == 8 and shared < _WIDE:
            found = 64  # twice as many sums would not fit the registers beside weights
        both = (2 if gated else 1) * found * weight_itemsize + of_slot * itemsize
        if weight_itemsize == 0:
            channels, size = 64, 128  # bytes that have a word of scales
            found, warps = (found, warps) if quick else (16, 8)
            if quick and found <= _FEW_OUTPUTS:
                warps = 2
            both = (2 if gated else 1) * found + 2 * of_slot * itemsize
        elif weight_itemsize == 1 and quick and warps == 4:
            channels = 128  # which memory reads in one run
        channels = min(channels, max(16, triton.next_power_of_2(size)))
        # A program may not have all of a multiprocessor's memory.
        return Tile(found, channels, warps, max(1, min(_STAGES, (shared - 1024) // (both * channels))))

    return ExpertsShape(
        of_slot,
        rows == 1,
        led,
        _PIECE if assignments <= 4 * _PIECE else 4 * _PIECE,
        tile(width, hidden, True),
        tile(hidden, width, False),
    )


def _tile(outputs: int, rows: int, slots: int, gated: bool, processors: int) -> tuple[int, int, int]:
    if rows >= 64:
        return 128, 64, 8
    for found in (64, 32) if gated else (128, 64, 32):
        if slots * triton.cdiv(outputs, found) >= _PROGRAMS * processors:
            return found, 64 if found >= 64 else 128, 4
    return 16, 128, 4
