"""Arrays at many places in memory: which of a loop's compiled forms runs may hang on where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "placed"]

Array = NDArray[Any]

_LINE = 64
"""Bytes of a cache line, on which torch's tensors begin."""


def placed(arrays: Mapping[str, Array], times: int = 100) -> Iterator[dict[str, Array]]:
    """Copies of the arrays by their names, in random order in one memory, at most two lines between them."""
    random = np.random.default_rng(0)
    lines = {name: -(-array.nbytes // _LINE) for name, array in arrays.items()}
    memory = np.zeros((sum(lines.values()) + 3 * len(lines)) * _LINE, dtype=np.uint8)
    start = -memory.ctypes.data % _LINE
    for _ in range(times):
        found, at = {}, start
        for name in random.permutation(list(arrays)).tolist():
            array = arrays[name]
            found[name] = memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
            found[name][...] = array
            at += (lines[name] + int(random.integers(3))) * _LINE
        yield found
