"""The response of a stream: server-sent events of a generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.arrivals import Arrivals, FewAtATime
from server.protocol import DIRECT, Direct
from server.streaming import Pieces

__all__ = ["EventStream", "Events"]

PING_S = 15.0
"""Between two comments in a stream, since proxies close what is silent for a minute."""

_PING = b": ping\n\n"

_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"connection", b"keep-alive"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
)
"""Of `EventSourceResponse`."""


class Events(Protocol):
    """A stream's events, made of what waits in its generation."""

    @property
    def ended(self) -> bool:
        """True once the last events were taken."""

    @property
    def slow(self) -> bool:
        """True where events come next that take long to write: `take_slow` has to be awaited for them."""

    def take(self) -> bytes:
        """What can be told at once; may be nothing. Errors are told too, none is raised."""

    async def take_slow(self) -> bytes: ...


class EventStream(Response):
    """Server-sent events of a generation, closed with the response however that ends.

    Args:
        generation: what the events tell of.
        events: called when the response begins; what it returns writes the events.
        arrivals: of the server; the response begins when the burst of requests that its own is part of ends.
    """

    def __init__(self, generation: Pieces, events: Callable[[], Events], arrivals: Arrivals) -> None:
        super().__init__()
        self._generation = generation
        self._events = events
        self._arrivals = arrivals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._arrivals.over(self._generation.listen)
            events = self._events()
            if (direct := scope.get("extensions", {}).get(DIRECT)) is not None:
                await _Begun(self._generation, events, direct, self._arrivals.few)(send)
            else:
                parts = _parts(self._generation, events)
                response = EventSourceResponse(parts, ping=PING_S, ping_message_factory=_ping_event)
                await response(scope, receive, send)
        finally:
            # A generator's own is not enough: if the client leaves before the first event is asked for, it
            # never starts.
            self._generation.close()


async def _parts(generation: Pieces, events: Events) -> AsyncIterator[bytes]:
    """The events, where each has to be sent."""
    filled = asyncio.Event()
    generation.listen(filled.set)
    while True:
        filled.clear()
        if data := events.take():
            yield data
        if events.slow:
            yield await events.take_slow()
        elif events.ended:
            return
        else:
            await filled.wait()


def _ping_event() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


class _Begun:
    """The response of an `EventStream` where the server has a `Direct`, without sse-starlette's four tasks.

    Events are written in the call that brings what they tell. The request's task sends what is left: those
    that take long to write, and those of a client that reads slowly. When the last are written it has to
    clear up, which takes longer than to write them: `few` of many that end together at a time.
    """

    def __init__(self, generation: Pieces, events: Events, direct: Direct, few: FewAtATime) -> None:
        self._generation = generation
        self._events = events
        self._direct = direct
        self._few = few
        self._left: asyncio.Future[bytes] | None = None  # what the task waits for
        self._whole = False  # the client has all of it

    async def __call__(self, send: Send) -> None:
        direct, loop = self._direct, asyncio.get_running_loop()
        if direct.gone:
            return
        direct.on_lost(self._wake)
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        self._pinger = loop.call_later(PING_S, self._ping)
        try:
            await self._tell(send)
        finally:
            self._pinger.cancel()
            direct.on_lost(None)
        if not direct.gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, send: Send) -> None:
        """Return when the client has all events, or has left."""
        events = self._events
        while not self._direct.gone:
            data = events.take()
            if data and self._written(data):
                data = b""
            elif not (data or events.slow or events.ended):
                data = await self._unwritten()
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            if events.slow:
                data = await events.take_slow()
                await send({"type": "http.response.body", "body": data, "more_body": True})
            elif events.ended:
                return

    async def _unwritten(self) -> bytes:
        """Write what comes as long as that can be done at once; the events that were taken and cannot."""
        left: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._left = left
        events = self._events

        def push() -> None:
            if left.done() or self._whole:
                return  # the task is on its way
            data = events.take()
            if data and self._written(data):
                if events.ended:
                    self._few.add(self._wake)
                    return
                data = b""
            if events.ended or events.slow or data:
                left.set_result(data)

        self._generation.listen(push)
        return await left

    def _written(self, data: bytes) -> bool:
        ended = self._events.ended
        written = self._direct.write(data, ended)
        self._whole = written and ended
        return written

    def _wake(self) -> None:
        if self._left is not None and not self._left.done():
            self._left.set_result(b"")

    def _ping(self) -> None:
        """Tell proxies that the stream is alive. A client that has still to read needs none."""
        if not self._whole:
            self._direct.write(_PING, False)
        self._pinger = asyncio.get_running_loop().call_later(PING_S, self._ping)
