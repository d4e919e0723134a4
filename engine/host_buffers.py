"""Memory of the host's that steps send from and read into, kept from step to step.

For CUDA it is pinned. Its copies are made when the device comes to them, while the host is at the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Inputs", "Landing", "Pinned"]


def _firsts(tensor: Tensor) -> Callable[[int], Tensor]:
    """Its first so many numbers: there are few sizes, and a slice takes the host as long as a copy."""
    return cache(lambda count: tensor[:count])


class Pinned:
    """Memory of the host, as a tensor and as an array, and on CUDA an event behind the latest copy.

    Args:
        shape: of int64 numbers, 0 at first.
        device: with which it exchanges them.
        timed: the event tells the time.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, *, timed: bool = False) -> None:
        on_cuda = device.type == "cuda"
        with torch.inference_mode(False):  # or it could be written to in that mode alone
            self.tensor = torch.zeros(shape, dtype=torch.int64, pin_memory=on_cuda)
        self.array: NDArray[np.int64] = self.tensor.numpy()
        self.first = _firsts(self.tensor)
        self.copied: torch.cuda.Event | None = None
        if on_cuda:
            self.copied = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


class Inputs:
    """A tensor on the device that the host writes anew before some of the steps.

    Two pieces of the host's memory take turns, since the copy from one may still wait on the device for the
    step before when the next is put together. Each is written to only when the copy from it has ended.

    Args:
        size: int64 numbers; all 0 at first.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=torch.int64, device=device)
        self._first = _firsts(self.tensor)
        self._next, self._other = Pinned((size,), device), Pinned((size,), device)

    def writable(self) -> NDArray[np.int64]:
        """[size], what `send` sends next; not what was sent before."""
        if self._next.copied is not None:
            self._next.copied.synchronize()  # one that nobody has recorded has ended
        return self._next.array

    def send(self, count: int) -> None:
        """Copy the first `count` numbers of `writable` to the device, behind what it does now."""
        self._first(count).copy_(self._next.first(count), non_blocking=True)
        if self._next.copied is not None:
            self._next.copied.record()
        self._next, self._other = self._other, self._next

    def fill(self, values: Sequence[int] | NDArray[np.int64]) -> None:
        """Send these."""
        self.writable()[: len(values)] = values
        self.send(len(values))


class Landing:
    """Where what a step gives is copied to: a piece of memory for each step whose results are not read.

    Results that are never read, after an error, take their piece with them.

    Args:
        packed: where a step leaves its results, and the next one its own.
    """

    def __init__(self, packed: Tensor) -> None:
        self._packed, self._free = packed, list[Pinned]()

    def take(self) -> Pinned:
        """The results of the step launched last, on their way: nobody else's until they are given back."""
        packed = self._packed
        piece = self._free.pop() if self._free else Pinned(tuple(packed.shape), packed.device, timed=True)
        piece.tensor.copy_(packed, non_blocking=True)
        if piece.copied is not None:
            piece.copied.record()
        return piece

    def give_back(self, piece: Pinned) -> None:
        """Its copy has ended, and nobody will look at it any more."""
        self._free.append(piece)
