"""What runs an engine, in a thread or a process of its own: commands in, lists of deltas out."""

from __future__ import annotations

import logging
import queue
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.types import Request, TokenDelta

if TYPE_CHECKING:
    from engine.engine import Engine

__all__ = ["Command", "EngineWorker", "stack_of"]

log = logging.getLogger(__name__)

Command = Callable[[], list[TokenDelta]]
"""What is to be done between two steps or in one, and the deltas that come of it."""


class EngineWorker:
    """Runs an engine in the thread that calls `serve`; commands may come from any thread.

    Args:
        engine: of which nobody else calls a method.
        report: called in `serve`'s thread after each step or round of commands with what it gave, which may
            be nothing, and when there is work after there was none.
    """

    def __init__(self, engine: Engine, report: Callable[[list[TokenDelta]], None]) -> None:
        self._engine, self._report = engine, report
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._ending = False  # a None command has come

    def add(self, request: Request) -> None:
        """Queue a request, behind the commands that were put before."""
        self.put(lambda: self._add(request))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request or one choice of it as soon as that can be."""
        self.put(lambda: self._engine.abort(request_id, index))

    def put(self, command: Command | None) -> None:
        """Have a command carried out; None ends `serve`."""
        self._inbox.put(command)

    def serve(self) -> None:
        """Commands, one step, hand-over; and again, until a None command. Raises what a step lets through."""
        engine = self._engine
        while True:
            deltas: list[TokenDelta] = []
            idle = not engine.has_work
            if idle and not self._ending:  # that may have come in the last step
                deltas += self._carry_out(self._inbox.get())
            deltas += self._arrived()
            if self._ending:
                return
            if engine.has_work:
                if idle:
                    self._report([])
                engine.stats.step_started = time.monotonic()
                deltas += engine.step(self._arrived)
                engine.stats.step_started = 0.0
            if not engine.has_work and log.isEnabledFor(logging.DEBUG):
                engine.check()
            self._report(deltas)
            if (patience_s := engine.patience_s) > 0:  # to sleep for none gives Python's lock away
                time.sleep(patience_s)

    def _arrived(self) -> list[TokenDelta]:
        """Carry out the commands that are there; what the aborts among them gave."""
        deltas: list[TokenDelta] = []
        while not self._ending and not self._inbox.empty():
            deltas += self._carry_out(self._inbox.get())
        return deltas

    def _carry_out(self, command: Command | None) -> list[TokenDelta]:
        if command is not None:
            return command()
        self._ending = True
        return []

    def _add(self, request: Request) -> list[TokenDelta]:
        self._engine.add(request)
        return []


def stack_of(thread: int | None) -> str:
    """Where a thread of this process, named by its `ident`, is now; empty if there is none."""
    frame = sys._current_frames().get(thread or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
