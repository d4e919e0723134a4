"""What tests of `EngineProcess` have its child do; few imports, so that it starts soon."""

from __future__ import annotations

import time

from engine.engine import Engine
from engine.types import Request, TokenDelta
from engine.worker import Command


def strike() -> None:
    """From here on a request called "fatal" ends the engine, and one called "slow" stands it for 0.4 s."""
    add = Engine.add

    def struck(self: Engine, request: Request) -> None:
        if request.request_id == "fatal":
            raise MemoryError("no more")
        add(self, request)
        if request.request_id == "slow":
            step = self.step

            def slow(arrived: Command) -> list[TokenDelta]:
                self.step = step  # type: ignore[method-assign]
                time.sleep(0.4)
                return step(arrived)

            self.step = slow  # type: ignore[assignment, method-assign]

    Engine.add = struck  # type: ignore[method-assign]
