"""The engine in a thread, and its hand-over to asyncio."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Self

from engine.config import EngineConfig
from engine.engine import Engine
from engine.front import EngineFront
from engine.loader import Loaded, load
from engine.stats import EngineStats
from engine.types import EngineInfo, Request, TokenDelta
from engine.worker import EngineWorker, stack_of

__all__ = ["EngineLoop"]

log = logging.getLogger(__name__)

_REST = 3.0
"""After handing out what steps gave, the event loop lets the engine's thread be for so many times as long as
that took for streams that go on: both need Python's lock. Steps of a small model at many streams, shorter
than it takes to write their events, are joined for that; a client sees that its events hold several tokens.
"""

_MOST_REST_S = 0.02


class EngineLoop(EngineFront):
    """Runs an `Engine` in a thread of its own; implements `EngineClient`.

    Requests and aborts go in through a queue that the thread empties between steps, and in each step before
    it launches a pass over prompts. All deltas of a step, or of several where the event loop cannot
    keep up, come out in one call into it.

    The thread also loads the model, and no other thread may run torch operators of any size: libgomp keeps
    a pool of workers for each thread that did, and with more workers than cores it puts them to sleep after
    every operator. On two cores a second, idle pool made a step 1.2 to 1.4 times as long.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = True) -> None:
        super().__init__(config)
        self._outbox: deque[list[TokenDelta]] = deque()  # deltas of steps, from the thread to the event loop
        self._told = False  # a `_deliver` is on its way that will see what is put into the outbox now
        made: Future[tuple[Loaded, Engine, EngineWorker]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(config, progress, made), name="engine", daemon=True
        )
        self._thread.start()
        loaded, self._engine, self._worker = made.result()
        self.text, self.generation_defaults = loaded.text, loaded.generation_defaults

    @classmethod
    def load(cls, config: EngineConfig, *, progress: bool = True) -> Self:
        """Load what `config` names; takes seconds and blocks. Raises what `engine.loader.load` raises."""
        return cls(config, progress=progress)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    async def stack(self) -> str:
        """See `EngineClient.stack`."""
        return stack_of(self._thread.ident)

    def _add(self, request: Request) -> None:
        self._worker.add(request)

    def _abort(self, request_id: str, index: int | None) -> None:
        self._worker.abort(request_id, index)

    def _end(self) -> None:
        self._worker.put(None)

    def _ended(self) -> bool:
        return not self._thread.is_alive()

    def _leave_behind(self) -> None:
        log.error("the engine thread does not end; it is left behind")

    def _check(self) -> None:
        self._engine.check()

    def _run(
        self, config: EngineConfig, progress: bool, made: Future[tuple[Loaded, Engine, EngineWorker]]
    ) -> None:
        """The engine thread: load, then serve until a None command or a failure."""
        try:
            loaded = load(config, progress=progress)
            engine = Engine(loaded)
            worker = EngineWorker(engine, self._report)
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result((loaded, engine, worker))
        try:
            worker.serve()
        except BaseException as error:
            log.exception("the engine thread died")
            self._in_event_loop(self._die, f"the engine has failed: {type(error).__name__}: {error}")

    def _report(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self._outbox.append(deltas)
            if not self._told:
                self._told = True
                self._in_event_loop(self._deliver)

    def _in_event_loop(self, callback: Callable[..., None], *values: object) -> None:
        if self._event_loop is not None:  # commands, and so results, exist only after start()
            self._event_loop.call_soon_threadsafe(callback, *values)

    def _deliver(self) -> None:
        """Hand out what the steps since the last time gave, then rest."""
        assert self._event_loop is not None
        began = self._event_loop.time()
        going_on = self._hand_out(self._outbox)
        rest = min(_REST * going_on * (self._event_loop.time() - began), _MOST_REST_S)
        if rest >= 0.001:  # a timer's resolution
            self._event_loop.call_later(rest, self._deliver)
            return
        self._told = False
        if self._outbox:  # since the last look; nobody may have told of it
            self._told = True
            self._event_loop.call_soon(self._deliver)

    def _die(self, reason: str) -> None:
        self._hand_out(self._outbox)  # what it still gave
        super()._die(reason)
