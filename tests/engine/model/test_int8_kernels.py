"""Pieces of the int8 kernels that vectors compute, against the plain loop they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.model.int8_kernels import _LANES, _mix, _round_row


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
