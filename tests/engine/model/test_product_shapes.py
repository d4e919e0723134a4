"""The shapes that products may have, whatever a model's sizes and a device's multiprocessors are."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings, strategies as st

pytest.importorskip("triton")

from engine.model.product_shapes import MOST_ROWS, MOST_TILES, Shape, shapes

SHARED = 227 << 10
"""Bytes that a program may have on Hopper."""


@given(
    rows=st.integers(1, MOST_ROWS),
    size=st.one_of(st.integers(1, 128), st.integers(129, 1900)).map(lambda n: 16 * n),
    width=st.one_of(st.integers(1, 600), st.integers(1, 40_000)),
    gated=st.booleans(),
    processors=st.integers(1, 200),
)
@settings(max_examples=400, deadline=None)
@example(64, 4096, 12288, False, 132)
@example(64, 4096, 256 * 132, False, 132)
@example(64, 4096, 128 * 132, True, 132)
@example(2, 4096, 59, True, 3)
@example(33, 16, 5000, True, 132)
@example(33, 2048, 8, False, 132)
def test_each_shape_is_one_that_the_kernels_take(
    rows: int, size: int, width: int, gated: bool, processors: int
) -> None:
    found = shapes(rows, size, width, gated, processors)
    assert found
    assert len(set(found)) == len(found)
    streaming = [shape for shape in found if shape.streams]
    assert bool(streaming) == (rows > 1 and (size > 2048 or rows > 32))
    for shape in found:
        numbers = (shape.rows, shape.outputs, shape.channels, shape.warps)
        assert all(number > 0 and number & (number - 1) == 0 for number in numbers)
        tiles = -(-width // shape.height)
        assert (tiles - 1) * shape.height < width <= tiles * shape.height
    for shape in streaming:
        check_stream(shape, rows, size, width, gated, processors)


def check_stream(shape: Shape, rows: int, size: int, width: int, gated: bool, processors: int) -> None:
    height = shape.outputs * (2 if gated else 1)
    assert shape.rows >= max(16, rows)
    assert height in (
        64,
        128,
        256,
    )  # what the tensor cores take of a weight at a time, or twice or four times
    assert 0 < shape.height <= shape.outputs
    # No more of a tile is another program's than has to be: half a tile would do for fewer.
    assert shape.height > shape.outputs // 2 or shape.outputs == 64
    tiles, steps = -(-width // shape.height), -(-size // shape.channels)
    assert shape.splits == 1 or tiles <= MOST_TILES  # for each there is a count
    assert shape.splits <= 8
    stage = (height + shape.rows) * shape.channels * 2
    assert 2 <= shape.stages <= 8
    assert shape.stages * stage <= SHARED
    assert shape.splits <= max(1, steps)
    if size <= 2048:
        return
    # Where there are outputs enough, nobody shares; with fewer each, programs would come in one more turn.
    if width >= 40 * processors:
        assert shape.splits == 1
        turns = -(-tiles // processors)
        assert (shape.height - 4) * processors * turns < width
    elif width <= 36 * processors:  # between, 40 each are a few too many
        assert shape.splits > 1
