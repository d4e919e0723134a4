"""Pieces of the int8 kernels that vectors compute, against the plain loop they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.cpu_team import Arguments, Team
from engine.model import int8_kernels as kernels
from engine.model.int8_kernels import _LANES, _mix, _round_row
from tests.engine.placed import Array, placed


def mixed(row: Any, block: int) -> Any:
    """Sylvester's matrix, level by level, in float32."""
    row = row.copy()
    step = row.size // block
    while step < row.size:
        halves = row.reshape(-1, 2, step)
        row = np.stack((halves[:, 0] + halves[:, 1], halves[:, 0] - halves[:, 1]), 1).reshape(-1)
        step *= 2
    return row


@pytest.mark.parametrize(
    ("size", "block"),
    [(576, 64), (1536, 128), (2048, 128), (960, 32), (24, 8), (12, 2), (6, 2), (8, 4), (80, 16), (33, 1)],
)
def test_mixing_has_the_bits_of_the_plain_loop(size: int, block: int) -> None:
    memory = np.random.default_rng(size).standard_normal(size + _LANES).astype(np.float32)
    wanted = np.concatenate((mixed(memory[:size], block), memory[size:]))  # nothing behind the row changes
    _mix(memory[:size], block)
    assert np.array_equal(memory, wanted)


@pytest.mark.parametrize("size", [4, 33, 576])
def test_rounding_takes_the_largest_magnitude_for_127(size: int) -> None:
    row = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    row[size // 2] = -9.0
    out = np.empty(size, dtype=np.int8)
    assert _round_row(row, row.view(np.int32), out) == 9.0
    assert np.array_equal(out, np.rint(row * (np.float32(127) / np.float32(9))).astype(np.int8))
    for special, scale in ((0.0, 0.0), (float("inf"), float("nan")), (float("nan"), float("nan"))):
        row[:] = 0.0
        row[-1] = special
        np.testing.assert_equal(float(_round_row(row, row.view(np.int32), out)), scale)
        assert not out.any()


HEADS, ROTATED = 8, 6


def arrays_of(kernel: str, rows: int, width: int, dim: int) -> dict[str, Array]:
    """What a kernel reads and writes, by its place in the arguments, for rows of `width` (rotary: heads)."""
    random = np.random.default_rng(5)

    def floats(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    width = HEADS * dim if kernel == "rotary" else width
    sums = 2 * width if kernel == "silu_mul_quantize" else width
    named = {
        "X": floats(rows, width),
        "ACC": random.integers(-(1 << 18), 1 << 18, (rows, sums), dtype=np.int32),
        "OUT": np.zeros((rows, width), np.float32 if kernel == "rotary" else np.int8),
        "WEIGHT_SCALE": abs(floats(sums)) * np.float32(1e-5),
        "SCALE": abs(floats(rows)),
        "NORM": floats(width),
        "EPS": np.full(1, 1e-5, dtype=np.float32),
        "COS": floats(rows, dim),
        "SIN": floats(rows, dim),
    }
    return {name: named[name] for name in READ_OR_WRITTEN[kernel].split()}


READ_OR_WRITTEN = {
    "norm_quantize": "X OUT SCALE NORM EPS",
    "residual": "X ACC WEIGHT_SCALE SCALE",
    "residual_norm_quantize": "X ACC OUT WEIGHT_SCALE SCALE NORM EPS",
    "rotary": "ACC OUT WEIGHT_SCALE SCALE COS SIN",
    "quantize": "X OUT SCALE",
    "silu_mul_quantize": "ACC OUT WEIGHT_SCALE SCALE",
}


@pytest.mark.parametrize("kernel", READ_OR_WRITTEN)
@pytest.mark.parametrize(("rows", "width", "dim"), [(1, 48, 16), (3, 64, 8), (2, 576, 64), (1, 80, 24)])
def test_no_bit_depends_on_where_the_arrays_lie(kernel: str, rows: int, width: int, dim: int) -> None:
    team, found = Team(), set()
    for arrays in placed(arrays_of(kernel, rows, width, dim)):
        arguments = Arguments()
        for name, array in arrays.items():
            arguments[getattr(kernels, name)] = array.ctypes.data
        arguments[kernels.ROWS], arguments[kernels.BLOCK] = rows, 16
        arguments[kernels.WIDTH] = HEADS * dim if kernel == "rotary" else width
        arguments[kernels.HEADS], arguments[kernels.HEAD_DIM] = ROTATED, dim
        team.run(getattr(kernels, kernel), arguments, rows)
        found.add(b"".join(arrays[name].tobytes() for name in ("X", "OUT", "SCALE") if name in arrays))
    assert len(found) == 1
