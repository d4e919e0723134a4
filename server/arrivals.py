"""Requests that come at once: each reaches the engine early, and before any response begins."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

__all__ = ["Arrivals", "FewAtATime", "Intake"]

_CALM_S = 0.002
"""A burst has ended when so long no stream was added to it."""

_MOST_S = 0.05

_TOGETHER = 8
"""Requests or responses begun or ended between two looks at what else the event loop has to do."""

_WAY = 4
"""Turns of the event loop for a request that waits for nothing: its task begins, its prompt is encoded, it
goes on to the engine; and then the next may come."""


class FewAtATime:
    """Makes calls that can wait, a few in each turn of the event loop, so that what cannot comes between."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()

    def add(self, call: Callable[[], None]) -> None:
        """Call it soon, behind those that were added before."""
        if not self._calls:
            asyncio.get_running_loop().call_soon(self._next)
        self._calls.append(call)

    def _next(self) -> None:
        for _ in range(min(_TOGETHER, len(self._calls))):
            self._calls.popleft()()
        if self._calls:
            asyncio.get_running_loop().call_soon(self._next)


class Intake:
    """Lets a few requests begin at a time.

    The event loop takes all that can go on in turns. Of a hundred requests that have come at once, each would
    be at the same place of its way, and the first reach the engine when the last nearly do.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._begun = 0

    @property
    def busy(self) -> bool:
        """Whether requests wait for their turn."""
        return bool(self._waiting)

    def take(self, begin: Callable[[], None]) -> None:
        """Have a request begin when those before it, where they wait for nothing, are in the engine."""
        if self._begun < _TOGETHER and not self._waiting:
            self._begin(begin)
        else:
            self._waiting.append(begin)

    async def turn(self) -> None:
        """Return when this request may begin."""
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.take(partial(_end, begun))
        await begun

    def _begin(self, begin: Callable[[], None]) -> None:
        if not self._begun:
            _later(_WAY, self._next)
        self._begun += 1
        begin()

    def _next(self) -> None:
        self._begun = 0
        while self._waiting and self._begun < _TOGETHER:
            self._begin(self._waiting.popleft())


def _later(turns: int, call: Callable[[], None]) -> None:
    """Call it so many turns of the event loop later."""
    if turns > 1:
        call = partial(_later, turns - 1, call)
    asyncio.get_running_loop().call_soon(call)


class Arrivals:
    """Streams whose requests are in the engine and whose responses have not begun.

    To begin a response takes almost as long as to bring a request to the engine. Done at once, it keeps those
    behind it from the engine, which would have work to do by then; done a little later, it costs the engine
    nothing. A stream that has something to tell does not wait.
    """

    def __init__(self) -> None:
        self.intake = Intake()
        self.few = FewAtATime()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._grown = False
        self._since = 0.0

    async def over(self, listen: Callable[[Callable[[], None]], None]) -> None:
        """Return when no more streams come, after `_MOST_S` at the latest, or when the stream has events.

        Args:
            listen: takes what is to be called when there are; not called for what was there before.
        """
        loop = asyncio.get_running_loop()
        begin: asyncio.Future[None] = loop.create_future()
        listen(lambda: _end(begin))
        self._grown = bool(self._waiting)
        if not self._waiting:
            self._since = loop.time()
            loop.call_later(_CALM_S, self._look)
        self._waiting.append(begin)
        await begin

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        if (self._grown or self.intake.busy) and loop.time() - self._since < _MOST_S:
            self._grown = False
            loop.call_later(_CALM_S, self._look)
        else:
            self._begin()

    def _begin(self) -> None:
        while self._waiting:
            self.few.add(partial(_end, self._waiting.popleft()))


def _end(begin: asyncio.Future[None]) -> None:
    if not begin.done():
        begin.set_result(None)
