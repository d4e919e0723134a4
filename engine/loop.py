"""The engine thread and its hand-over to asyncio."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Self

from engine.client import TokenStream
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineStoppedError, QueueFullError, RequestError
from engine.loader import Loaded, load
from engine.stats import EngineStats
from engine.stream import DeltaStream
from engine.types import EngineInfo, FinishReason, Request, TokenDelta

__all__ = ["EngineLoop"]

log = logging.getLogger(__name__)

_STOP_S = 10.0
"""How long a step may take to end once everything in it is aborted; then its thread is left behind."""

_REST = 3.0
"""After handing out what steps gave, the event loop lets the engine's thread be for so many times as long as
that took for streams that go on: both need Python's lock. Steps of a small model at many streams, shorter
than it takes to write their events, are joined for that; a client sees that its events hold several tokens.
"""

_MOST_REST_S = 0.02


class EngineLoop:
    """Runs an `Engine` in a thread of its own; implements `EngineClient`.

    Requests and aborts go in through a queue that the thread empties between steps, and in each step before
    it launches a pass over prompts. All deltas of a step, or of several where the event loop cannot
    keep up, come out in one call into it.

    The thread also loads the model, and no other thread may run torch operators of any size: libgomp keeps
    a pool of workers for each thread that did, and with more workers than cores it puts them to sleep after
    every operator. On two cores a second, idle pool made a step 1.2 to 1.4 times as long.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = True) -> None:
        self._capacity = config.max_num_seqs + config.max_waiting
        self._inbox: queue.SimpleQueue[Callable[[], list[TokenDelta]] | None] = queue.SimpleQueue()
        self._outbox: deque[list[TokenDelta]] = deque()  # deltas of steps, from the thread to the event loop
        self._ending = False  # the thread: a None command has come
        self._told = False  # a `_deliver` is on its way that will see what is put into the outbox now
        self._streams: dict[str, DeltaStream] = {}
        self._live = 0
        self._accepting = False
        self._failure: str | None = None
        self._idle = asyncio.Event()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        made: Future[tuple[Loaded, Engine]] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(config, progress, made), name="engine", daemon=True
        )
        self._thread.start()
        loaded, self._engine = made.result()
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

    @property
    def ready(self) -> bool:
        return self._accepting and self.healthy

    @property
    def healthy(self) -> bool:
        return self._failure is None

    async def start(self) -> None:
        """See `EngineClient.start`."""
        if self._event_loop is not None:
            raise RuntimeError("the engine loop was started before")
        self._event_loop = asyncio.get_running_loop()
        self._idle.set()
        self._accepting = True

    def submit(self, request: Request) -> TokenStream:
        """See `EngineClient.submit`."""
        if not self.ready:
            raise EngineStoppedError(self._failure or "the server is shutting down and takes no new requests")
        self.info.check(request)
        if request.request_id in self._streams:
            raise RequestError(f"request id {request.request_id} is in use", param="request_id")
        if request.sampling.n > self._capacity:
            raise RequestError(f"n must be at most {self._capacity} on this server", param="n")
        if self._live + request.sampling.n > self._capacity:
            raise QueueFullError(f"the server already holds {self._live} requests; try again shortly")
        stream = DeltaStream(request, lambda request_id: self.abort([request_id]))
        self._streams[request.request_id] = stream
        self._live += request.sampling.n
        self._idle.clear()
        self._inbox.put(partial(self._add, request))
        return stream

    def abort(self, request_ids: Sequence[str]) -> None:
        """See `EngineClient.abort`."""
        for request_id in request_ids:
            self._inbox.put(partial(self._engine.abort, request_id))

    def abort_choice(self, request_id: str, index: int) -> None:
        """See `EngineClient.abort_choice`."""
        self._inbox.put(partial(self._engine.abort, request_id, index))

    async def stop(self, drain_s: float = 0.0) -> None:
        """See `EngineClient.stop`."""
        self._accepting = False
        if self._event_loop is not None and not self._idle.is_set():
            try:
                await asyncio.wait_for(self._idle.wait(), timeout=drain_s)
            except TimeoutError:
                log.warning(
                    "drain deadline of %.0f s passed, aborting %d requests", drain_s, len(self._streams)
                )
                await self._abort_all()
        self._inbox.put(None)
        deadline = time.monotonic() + _STOP_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)  # a join in an executor would keep the process from ending
        if self._thread.is_alive():
            log.error("the engine thread does not end; it is left behind")
        elif self.healthy:
            self._engine.check()

    async def _abort_all(self) -> None:
        self.abort(list(self._streams))
        try:
            await asyncio.wait_for(self._idle.wait(), timeout=_STOP_S)
        except TimeoutError:
            self._die(f"a step did not end within {_STOP_S:.0f} s")

    def _add(self, request: Request) -> list[TokenDelta]:
        self._engine.add(request)
        return []

    def _run(self, config: EngineConfig, progress: bool, made: Future[tuple[Loaded, Engine]]) -> None:
        """The engine thread: load, then serve until a None command or a failure."""
        try:
            loaded = load(config, progress=progress)
            engine = Engine(loaded)
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result((loaded, engine))
        try:
            self._serve(engine)
        except BaseException as error:
            log.exception("the engine thread died")
            self._in_event_loop(self._die, f"the engine has failed: {type(error).__name__}: {error}")

    def _serve(self, engine: Engine) -> None:
        """Commands, one step, hand-over; and again."""
        while True:
            deltas: list[TokenDelta] = []
            if not engine.has_work:
                deltas += self._command(self._inbox.get())
            deltas += self._arrived()
            if self._ending:
                return
            if engine.has_work:
                engine.stats.step_started = time.monotonic()
                deltas += engine.step(self._arrived)
                engine.stats.step_started = 0.0
            if not engine.has_work and log.isEnabledFor(logging.DEBUG):
                engine.check()
            if deltas:
                self._outbox.append(deltas)
                if not self._told:
                    self._told = True
                    self._in_event_loop(self._deliver)
            time.sleep(engine.patience_s)

    def _arrived(self) -> list[TokenDelta]:
        """Carry out the commands that are there; what the aborts among them gave."""
        deltas: list[TokenDelta] = []
        while not self._ending and not self._inbox.empty():
            deltas += self._command(self._inbox.get())
        return deltas

    def _command(self, command: Callable[[], list[TokenDelta]] | None) -> list[TokenDelta]:
        if command is not None:
            return command()
        self._ending = True
        return []

    def _in_event_loop(self, callback: Callable[..., None], *values: object) -> None:
        if self._event_loop is not None:  # commands, and so results, exist only after start()
            self._event_loop.call_soon_threadsafe(callback, *values)

    def _deliver(self) -> None:
        """Hand out what the steps since the last time gave, then rest."""
        assert self._event_loop is not None
        began = self._event_loop.time()
        going_on = self._hand_out()
        rest = min(_REST * going_on * (self._event_loop.time() - began), _MOST_REST_S)
        if rest >= 0.001:  # a timer's resolution
            self._event_loop.call_later(rest, self._deliver)
            return
        self._told = False
        if self._outbox:  # since the last look; nobody may have told of it
            self._told = True
            self._event_loop.call_soon(self._deliver)

    def _hand_out(self) -> float:
        """Tokens of several steps are joined for each choice, and each stream is told once.

        Returns:
            The share of these streams that have not ended.
        """
        streams, filled = self._streams, []
        while self._outbox:
            for delta in self._outbox.popleft():
                if (stream := streams.get(delta.request_id)) is None:
                    continue
                if stream.put(delta):
                    filled.append(stream)
                if delta.finish_reason is not None:
                    self._live -= 1
                    if not stream.unfinished:
                        del streams[delta.request_id]
        for stream in filled:
            stream.tell()
        if not streams:
            self._idle.set()
        return sum([bool(stream.unfinished) for stream in filled]) / max(1, len(filled))

    def _die(self, reason: str) -> None:
        """The thread is gone: end every stream with the reason and take nothing more."""
        self._failure = reason
        self._hand_out()  # what it still gave
        for stream in list(self._streams.values()):
            for index in sorted(stream.unfinished):
                stream.put(TokenDelta(stream.request.request_id, index, [], FinishReason.ERROR, error=reason))
            stream.tell()
        self._streams.clear()
        self._live = 0
        self._idle.set()
