"""A request's deltas on their way from the engine to one consumer, which may be slower than the engine."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable

from engine.types import FinishReason, Request, TokenDelta

__all__ = ["DeltaStream", "joined"]

log = logging.getLogger(__name__)

_MERGEABLE = (None, FinishReason.STOP, FinishReason.LENGTH)


class DeltaStream:
    """Implements `TokenStream`; put and read on one event loop.

    Whoever puts deltas tells the reader with `tell`, once for all that it has put.

    What the consumer has not taken yet stays one delta for each choice: a further step's tokens join it. So
    a client that reads slowly gets fewer, larger events, and what waits for it is bounded by its answer's
    length. Steps with a trace are kept apart.

    Args:
        request: what the deltas belong to.
        abort: called with the request's id if the consumer stops caring.
    """

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.request = request
        self.unfinished = set(range(request.sampling.n))
        """Choices whose last delta has not been put yet."""
        self.merged_steps = 0
        self._abort = abort
        self._waiting: deque[TokenDelta] = deque()
        self._newest: dict[int, TokenDelta] = {}  # of each choice, while it waits
        self._filled = asyncio.Event()
        self._listener: Callable[[], None] = self._filled.set
        self._undelivered = request.sampling.n

    def put(self, delta: TokenDelta) -> bool:
        """Add a delta; ignored for a choice that has ended. True where nothing waited before: `tell` then."""
        index, reason = delta.index, delta.finish_reason
        if index not in self.unfinished:
            return False
        if reason is not None:
            self.unfinished.discard(index)
        if delta.num_steps > 1:  # joined on the way here
            self.merged_steps += delta.num_steps - 1
        waiting = self._waiting
        if waiting and (newest := self._newest.get(index)) is not None and joined(newest, delta):
            self.merged_steps += 1
            return False
        waiting.append(delta)
        self._newest[index] = delta
        return len(waiting) == 1

    def tell(self) -> None:
        """Let the reader know that deltas wait. One that fails does so alone: others are still to be told."""
        try:
            self._listener()
        except Exception:
            log.exception("the reader of request %s failed", self.request.request_id)

    def listen(self, listener: Callable[[], None] | None) -> None:
        """See `TokenStream.listen`."""
        self._listener = self._filled.set if listener is None else listener

    def take(self) -> TokenDelta | None:
        """See `TokenStream.take`."""
        if not self._waiting:
            return None
        delta = self._waiting.popleft()
        if self._newest.get(delta.index) is delta:
            del self._newest[delta.index]
        if delta.finish_reason is not None:
            self._undelivered -= 1
        return delta

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self

    async def __anext__(self) -> TokenDelta:
        if self._undelivered == 0:
            raise StopAsyncIteration
        while (delta := self.take()) is None:
            self._filled.clear()
            await self._filled.wait()
        return delta

    async def aclose(self) -> None:
        """Abort what of the request still runs."""
        if self.unfinished:
            self._abort(self.request.request_id)


def joined(first: TokenDelta, second: TokenDelta) -> bool:
    """Join the next delta of a choice to one before it, in place, where they may be one.

    Both have to be from decode steps, without traces; and a failure is told at once.
    """
    if (
        first.num_steps == 0
        or second.num_steps == 0
        or first.trace is not None
        or second.trace is not None
        or second.finish_reason not in _MERGEABLE
    ):
        return False
    first.token_ids = [*first.token_ids, *second.token_ids]
    first.finish_reason, first.stop_token_id = second.finish_reason, second.stop_token_id
    first.num_steps += second.num_steps
    first.time_s = second.time_s
    first.accepted_prediction_tokens += second.accepted_prediction_tokens
    if first.logprobs is not None and second.logprobs is not None:
        first.logprobs = [*first.logprobs, *second.logprobs]
    return True
