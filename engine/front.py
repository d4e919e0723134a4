"""The asyncio side of an engine that runs elsewhere: its streams, the queue's bound, the drain."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.client import TokenStream
from engine.config import EngineConfig
from engine.errors import EngineStoppedError, QueueFullError, RequestError
from engine.stats import EngineStats
from engine.stream import DeltaStream
from engine.types import EngineInfo, FinishReason, Request, TokenDelta

if TYPE_CHECKING:
    from engine.model.weights import GenerationDefaults
    from engine.text import TextProcessor

__all__ = ["EngineFront"]

log = logging.getLogger(__name__)

_STOP_S = 10.0
"""How long a step may take to end once everything in it is aborted; then what runs it is left behind."""


class EngineFront(ABC):
    """What `EngineLoop` and `EngineProcess` share of `EngineClient`.

    Args:
        config: of which the queue's bound is taken.

    Attributes:
        text: the model's tokenizer.
        generation_defaults: the model's own generation settings.
    """

    text: TextProcessor
    generation_defaults: GenerationDefaults

    def __init__(self, config: EngineConfig) -> None:
        self._capacity = config.max_num_seqs + config.max_waiting
        self._streams: dict[str, DeltaStream] = {}
        self._live = 0
        self._accepting = False
        self._failure: str | None = None
        self._idle = asyncio.Event()
        self._event_loop: asyncio.AbstractEventLoop | None = None

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """See `EngineClient.info`."""

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """See `EngineClient.stats`."""

    @abstractmethod
    async def stack(self) -> str:
        """See `EngineClient.stack`."""

    @property
    def ready(self) -> bool:
        return self._accepting and self.healthy

    @property
    def healthy(self) -> bool:
        return self._failure is None

    @property
    def pid(self) -> int | None:
        """See `EngineClient.pid`."""
        return None

    async def start(self) -> None:
        """See `EngineClient.start`."""
        if self._event_loop is not None:
            raise RuntimeError("the engine was started before")
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
            raise QueueFullError(
                f"the server holds {self._live} choices of at most {self._capacity}, and this request has "
                f"{request.sampling.n}; try again shortly"
            )
        stream = DeltaStream(request, lambda request_id: self.abort([request_id]))
        self._streams[request.request_id] = stream
        self._live += request.sampling.n
        self._idle.clear()
        self._add(request)
        return stream

    def abort(self, request_ids: Sequence[str]) -> None:
        """See `EngineClient.abort`."""
        for request_id in request_ids:
            self._abort(request_id, None)

    def abort_choice(self, request_id: str, index: int) -> None:
        """See `EngineClient.abort_choice`."""
        self._abort(request_id, index)

    async def stop(self, drain_s: float = 0.0) -> None:
        """See `EngineClient.stop`."""
        self._accepting = False
        if self._event_loop is not None and not self._idle.is_set():
            try:
                await asyncio.wait_for(self._idle.wait(), timeout=drain_s)
            except TimeoutError:
                why = f"drain deadline of {drain_s:g} s passed" if drain_s > 0 else "not draining"
                log.warning("%s, aborting %d requests", why, len(self._streams))
                await self._abort_all()
        self._end()
        deadline = time.monotonic() + _STOP_S
        while not self._ended() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)  # to wait in an executor would keep the process from ending
        if not self._ended():
            self._leave_behind()
        elif self.healthy:
            self._check()

    @abstractmethod
    def _add(self, request: Request) -> None:
        """Have the engine take a request."""

    @abstractmethod
    def _abort(self, request_id: str, index: int | None) -> None:
        """Have it drop a request or one choice of it."""

    @abstractmethod
    def _end(self) -> None:
        """Have it end, if it has not been told before."""

    @abstractmethod
    def _ended(self) -> bool:
        """Whether what ran it is gone."""

    @abstractmethod
    def _leave_behind(self) -> None:
        """It does not end."""

    @abstractmethod
    def _check(self) -> None:
        """Raise RuntimeError if the engine, which has ended, lost K/V blocks."""

    async def _abort_all(self) -> None:
        self.abort(list(self._streams))
        try:
            await asyncio.wait_for(self._idle.wait(), timeout=_STOP_S)
        except TimeoutError:
            self._die(f"a step did not end within {_STOP_S:.0f} s")

    def _hand_out(self, steps: deque[list[TokenDelta]]) -> float:
        """Empty `steps`. Tokens of several are joined for each choice, and each stream is told once.

        Returns:
            The share of these streams that have not ended.
        """
        streams, filled = self._streams, []
        while steps:
            for delta in steps.popleft():
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
        """What runs the engine is gone: end every stream with the reason and take nothing more."""
        self._failure = reason
        for stream in list(self._streams.values()):
            for index in sorted(stream.unfinished):
                stream.put(TokenDelta(stream.request.request_id, index, [], FinishReason.ERROR, error=reason))
            stream.tell()
        self._streams.clear()
        self._live = 0
        self._idle.set()
