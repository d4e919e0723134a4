"""Faults on purpose, for tests: `MEDUSA_FAULTS="decode=raise@3,encode=raise,disk=full"`.

Each entry is `point=action[:seconds][@count]`: at its count-th visit (the first if not said) the point
fails once. Points are where the code calls `visit`:

    prefill, decode   a pass of the engine's step
    encode            text to token ids
    disk              writing the converted model

and actions are `raise` (a RuntimeError), `full` (an OSError as of a full disk) and `hang:SECONDS`. Without
the variable a visit is one comparison.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engine.errors import ConfigError

__all__ = ["ENVIRONMENT", "POINTS", "injected", "visit"]

ENVIRONMENT = "MEDUSA_FAULTS"

POINTS = ("prefill", "decode", "encode", "disk")

_ENTRY = re.compile(r"(?P<point>\w+)=(?P<action>raise|full|hang:(?P<seconds>[0-9.]+))(?:@(?P<count>[0-9]+))?")


@dataclass(frozen=True, slots=True)
class _Fault:
    point: str
    action: str
    seconds: float
    count: int

    def strike(self) -> None:
        match self.action:
            case "raise":
                raise RuntimeError(f"fault injected: {self.point}")
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case _:
                time.sleep(self.seconds)


class _Faults:
    """The faults of one specification, and how often their points have been visited."""

    def __init__(self, text: str) -> None:
        self._faults = [_parse(entry.strip()) for entry in text.split(",") if entry.strip()]
        self._visits: Counter[str] = Counter()
        self._lock = threading.Lock()

    def visit(self, point: str) -> None:
        with self._lock:
            self._visits[point] += 1
            count = self._visits[point]
        for fault in self._faults:
            if (fault.point, fault.count) == (point, count):
                fault.strike()


def _parse(entry: str) -> _Fault:
    found = _ENTRY.fullmatch(entry)
    if found is None or found["point"] not in POINTS:
        raise ConfigError(
            f"{ENVIRONMENT}: cannot read {entry!r}; write POINT=raise|full|hang:SECONDS[@COUNT] with one of "
            f"{', '.join(POINTS)}"
        )
    return _Fault(
        found["point"],
        found["action"].partition(":")[0],
        float(found["seconds"] or 0),
        int(found["count"] or 1),
    )


_active: _Faults | None = _Faults(text) if (text := os.environ.get(ENVIRONMENT)) else None


def visit(point: str) -> None:
    """Fail here, if that is what was asked for."""
    if _active is not None:
        _active.visit(point)


@contextmanager
def injected(text: str) -> Iterator[None]:
    """Faults of this specification while the body runs, counted from here. Raises ConfigError."""
    global _active
    before, _active = _active, _Faults(text)
    try:
        yield
    finally:
        _active = before
