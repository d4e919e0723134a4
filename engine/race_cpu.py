"""The exponential race of a draw on the CPU: one compiled pass over each row (numba).

torch's operators for `engine.sampler.exponential` and what follows are about thirty, each over the whole
vocabulary: 0.3 to 0.5 ms a row of 49 thousand, where this takes 0.06.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import int64, njit
from torch import Tensor

from engine.cpu_team import JIT, floats, integers

__all__ = ["winners"]

_BLOCK = 512
"""Tokens looked at together: whether any of them may win is told without a logarithm."""

_SIGN, _ONE, _LAST = np.float32(2.0**31), np.float32(1.0), np.float32(1.0 - 2.0**-24)
_HALF, _SCALE, _SMALL = np.float32(0.5), np.float32(2.0**-32), np.float32(2.0**-6)
_FOURTH, _THIRD = np.float32(1 / 4), np.float32(1 / 3)


@njit(inline="always", **JIT)
def _number(token: int, low: Any, high: Any) -> Any:
    """What `exponential` calls u."""
    x = np.uint32(np.uint32(token) * high) ^ low
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B))
    x = np.uint32(x ^ (x >> np.uint32(16)))
    whole = np.float32(np.int32(x & np.uint32(0x7FFFFFFF)))
    if x >> np.uint32(31):
        whole += _SIGN
    return min((whole + _HALF) * _SCALE, _LAST)


@njit(int64(int64, int64, int64, int64, int64), **JIT)
def _winners(p_at: int, keys_at: int, winners_at: int, rows: int, vocab: int) -> int:
    """p [rows, vocab] float32, keys and winners [rows] int64 lie at these addresses."""
    p, keys, found = floats(p_at, (rows, vocab)), integers(keys_at, (rows,)), integers(winners_at, (rows,))
    # The bits of floats that are not below 0 order as these do, and are faster to find the largest of.
    most, bound = np.empty(_BLOCK, dtype=np.float32), np.empty(1, dtype=np.float32)
    bits, bound_bits = most.view(np.int32), bound.view(np.int32)
    for r in range(rows):
        low, high = np.uint32(keys[r]), np.uint32(np.uint32(keys[r] >> 32) | np.uint32(1))
        best, winner = np.float32(-1.0), 0
        for start in range(0, vocab, _BLOCK):
            size = min(_BLOCK, vocab - start)
            # The number itself is above u, so no token of the block comes to more than this.
            for i in range(size):
                most[i] = p[r, start + i] / _number(start + i, low, high)
            bound_bits[0] = 0
            for i in range(size):
                bound_bits[0] = max(bound_bits[0], bits[i])
            if not bound[0] > best:
                continue
            for i in range(size):
                if most[i] > best:
                    u = _number(start + i, low, high)
                    if u < _SMALL:
                        number = (((u * _FOURTH + _THIRD) * u + _HALF) * u + _ONE) * u
                    else:
                        number = -math.log(_ONE - u)
                    value = p[r, start + i] / np.float32(number)
                    if value > best:
                        best, winner = value, start + i
        found[r] = winner
    return 0


def _run(p: Tensor, keys: Tensor) -> Tensor:
    found = keys.new_empty(len(keys))
    _winners(p.data_ptr(), keys.data_ptr(), found.data_ptr(), *p.shape)
    return found


# An operator of torch's, so that a graph that records these holds it.
_library: Any = torch.library.Library  # which has no types
_LIBRARY = _library("medusa_serve", "DEF")
_LIBRARY.define("winners(Tensor p, Tensor keys) -> Tensor")
_LIBRARY.impl("winners", _run, "CPU")


def winners(p: Tensor, keys: Tensor) -> Tensor:
    """[R] int64: the token of each row that wins.

    Args:
        p: [R, vocab] float32, contiguous, on the CPU.
        keys: [R] int64, see `engine.sampler.exponential`.
    """
    found: Tensor = torch.ops.medusa_serve.winners(p, keys)
    return found
