"""What the server needs of an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from engine.stats import EngineStats
from engine.types import EngineInfo, Request, TokenDelta

__all__ = ["EngineClient", "TokenStream"]


class TokenStream(Protocol):
    """The deltas of one request, all choices interleaved. Ends after each choice's last delta."""

    @property
    def merged_steps(self) -> int:
        """Steps that joined a delta which was still waiting to be taken."""

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...

    def take(self) -> TokenDelta | None:
        """The next delta, where one waits."""

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have `listener` called, in the event loop and without a task in between, when deltas wait to be
        taken and none did before, never within an abort; it must not raise. None: the stream is iterated, as
        it is at first."""

    async def aclose(self) -> None:
        """Stop caring: aborts whatever of the request still runs. Safe to call twice."""


class EngineClient(Protocol):
    """What the server needs of an engine. `EngineLoop` runs one in a thread, `EngineProcess` in a process;
    `FakeEngine` is the test one.

    All methods are called from the asyncio event loop.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def ready(self) -> bool:
        """True while new requests are taken."""

    @property
    def healthy(self) -> bool:
        """False once the engine has died."""

    @property
    def pid(self) -> int | None:
        """Of the engine's process, where it has one of its own that runs."""

    async def start(self) -> None:
        """Take requests from here on."""

    def submit(self, request: Request) -> TokenStream:
        """Queue a request.

        Raises:
            RequestError: the request can never run (its field is named).
            QueueFullError: the waiting queue is at its bound.
            EngineStoppedError: the engine drains or has stopped.
        """

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown or finished ones are ignored. Slots free at the next step boundary."""

    def abort_choice(self, request_id: str, index: int) -> None:
        """End one choice of a request, its text being complete; the others go on.

        Unknown or finished choices are ignored. The slot frees at the next step boundary; whether a
        last delta of the choice still arrives is not specified.
        """

    async def stack(self) -> str:
        """Where in the code the engine is now, for the log; empty if that cannot be told."""

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new work, let running requests finish for up to `drain_s` seconds, abort the rest.

        May be called again, also while an earlier call waits.
        """
