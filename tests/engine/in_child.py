"""What tests of `EngineProcess` have its child do; few imports, so that it starts soon."""

from __future__ import annotations

import time

from engine import child
from engine.engine import Engine
from engine.grammar import GrammarCompiler
from engine.types import Request, TokenDelta
from engine.worker import Command


def unprepared(_compiler: GrammarCompiler) -> None:
    raise TypeError("not a tokenizer as others")


def strike() -> None:
    """From here on a request called "fatal" ends the engine, and one called "slow…" stands it for 0.4 s.

    The statistics come by no clock, and the tokenizer is first read for a request.
    """
    child._STATS_S = 1e9
    GrammarCompiler.prepare = unprepared  # type: ignore[method-assign]
    add = Engine.add

    def struck(self: Engine, request: Request) -> None:
        if request.request_id == "fatal":
            raise MemoryError("no more")
        add(self, request)
        if request.request_id.startswith("slow"):
            step = self.step

            def slow(arrived: Command) -> list[TokenDelta]:
                self.step = step  # type: ignore[method-assign]
                time.sleep(0.4)
                return step(arrived)

            self.step = slow  # type: ignore[assignment, method-assign]

    Engine.add = struck  # type: ignore[method-assign]
