"""What tests of `EngineProcess` have its child do; few imports, so that it starts soon."""

from __future__ import annotations

import ctypes
import subprocess
import time

from engine import child
from engine.engine import Engine
from engine.grammar import GrammarCompiler
from engine.types import Request, TokenDelta
from engine.worker import Command


def unprepared(_compiler: GrammarCompiler) -> None:
    raise TypeError("not a tokenizer as others")


def held(_arrived: Command) -> list[TokenDelta]:
    ctypes.PyDLL(None).sleep(60)
    return []


def strike() -> None:
    """From here on a request called "fatal" ends the engine, one called "slow…" stands it for 0.4 s, and one
    called "held" for a minute, with Python's lock; one called "compiled" has it start a process.

    The statistics come by no clock, and the tokenizer is first read for a request.
    """
    child._STATS_S = 1e9
    GrammarCompiler.prepare = unprepared  # type: ignore[method-assign]
    add = Engine.add

    def struck(self: Engine, request: Request) -> None:
        if request.request_id == "fatal":
            raise MemoryError("no more")
        if request.request_id == "compiled":
            subprocess.Popen(["sleep", "60"], close_fds=False)  # a driver's compiler closes nothing either
        add(self, request)
        if request.request_id == "held":
            self.step = held  # type: ignore[method-assign]
        if request.request_id.startswith("slow"):
            step = self.step

            def slow(arrived: Command) -> list[TokenDelta]:
                self.step = step  # type: ignore[method-assign]
                time.sleep(0.4)
                return step(arrived)

            self.step = slow  # type: ignore[assignment, method-assign]

    Engine.add = struck  # type: ignore[method-assign]
