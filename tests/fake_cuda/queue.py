"""What the device has been told, what of it the host knows to have ended, and copies that are under way."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["QUEUE", "Event", "Pinned", "Stream", "garbage_"]


def garbage_(memory: Tensor) -> None:
    """What nobody has written yet, or what somebody else has written over."""
    if memory.dtype.is_floating_point:
        memory.fill_(float("nan"))
    else:
        memory.fill_(True if memory.dtype is torch.bool else _GARBAGE % (1 << 8 * memory.element_size() - 1))


_GARBAGE = 0x2BAD2BAD2BAD2BAD


class Queue:
    """Numbers what the device is told. The host knows of its end when it has waited, and never before.

    So whatever may not have happened on a device that is slow has not happened here: a copy to the host's
    memory leaves garbage there until it is waited for, and memory that a copy comes from has to stay as it
    is until then. What the device computes is there at once, since only the device may look at it.
    """

    def __init__(self) -> None:
        self.told = self.ended = 0
        self.waits: list[str] | None = None
        """Where the host has waited for all of it, without an event; None: nobody asks."""
        self._ends: deque[tuple[int, Callable[[], None]]] = deque()
        self._lock = threading.RLock()

    def tell(self, end: Callable[[], None] | None = None) -> int:
        """The number of something new; `end` is called when the host learns of its end."""
        with self._lock:
            self.told += 1
            if end is not None:
                self._ends.append((self.told, end))
            return self.told

    def wait(self, number: int | None = None) -> None:
        """For this one and all before it; None: for all."""
        with self._lock:
            self.ended = max(self.ended, self.told if number is None else number)
            while self._ends and self._ends[0][0] <= self.ended:
                self._ends.popleft()[1]()

    def waits_at(self, where: Callable[[], str]) -> None:
        """The host waits for all of it."""
        if self.waits is not None:
            self.waits.append(where())
        self.wait()

    def copy_to_host(self, target: Tensor, source: Tensor) -> None:
        """From the device's memory into pinned memory."""
        values = source.detach().clone()
        garbage_(target)
        self.tell(lambda: target.copy_(values))

    def copy_to_device(self, target: Tensor, source: Tensor, where: str) -> None:
        """From pinned memory into the device's, which comes to it later: what it finds then must be this."""
        target.copy_(source)
        values = source.detach().clone()

        def check() -> None:
            if not torch.equal(source, values):
                raise RuntimeError(f"the host wrote to memory before a copy from it had ended{where}")

        self.tell(check)


QUEUE = Queue()


class Pinned:
    """Which memory of the host's is pinned."""

    _known: dict[int, StorageWeakRef] = {}  # noqa: RUF012

    @classmethod
    def add(cls, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        cls._known[storage.data_ptr()] = StorageWeakRef(storage)
        return tensor

    @classmethod
    def holds(cls, tensor: Tensor) -> bool:
        found = cls._known.get(tensor.untyped_storage().data_ptr())
        return found is not None and not found.expired()


class Event:
    """The end of what the device was told before. Its time is the CPU's, since nothing runs beside it."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self._timing, self._at, self._number = enable_timing, 0.0, 0

    def record(self, stream: object = None) -> None:
        self._at, self._number = time.perf_counter(), QUEUE.tell()

    def wait(self, stream: object = None) -> None:
        """There is one stream."""

    def query(self) -> bool:
        return self._number <= QUEUE.ended

    def synchronize(self) -> None:
        """One that nobody has recorded has ended."""
        QUEUE.wait(self._number)

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (self._number and end._number):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not (self.query() and end.query()):
            raise ValueError("Both events must be completed before calculating elapsed time.")
        return 1000 * (end._at - self._at)


class Stream:
    """The one there is."""

    def __init__(self, device: object = None, **_: Any) -> None:
        """Of any device."""

    def wait_stream(self, other: Stream) -> None:
        """Whatever ran on the other has ended."""

    def wait_event(self, event: Event) -> None:
        """There is one stream."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        QUEUE.wait()
