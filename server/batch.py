"""Several prompts of one HTTP request, answered together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import reduce
from typing import Any, Protocol

from engine.types import Request
from server.context import RequestRecord, ServerContext
from server.responses import PromptTokensDetails, Usage
from server.streaming import Generation, TextOptions, TextPiece

__all__ = ["Batch", "Pieces"]


class Pieces(Protocol):
    """What an answer is written from: a `Generation` or a `Batch` of them."""

    @property
    def usage(self) -> Usage: ...

    def pieces(self) -> AsyncIterator[TextPiece]: ...

    def close(self) -> None: ...


class Batch:
    """One generation per prompt; the choices of prompt i are numbered from i times `n` on.

    Whoever makes one must call `close`.

    Args:
        context: the server.
        record: of the HTTP request; gets the sums of all.
        requests: one per prompt, with equal `n`.
        options: how the text is to be.

    Raises:
        RequestError, QueueFullError, EngineStoppedError: as `EngineClient.submit`; nothing runs then.
    """

    def __init__(
        self,
        context: ServerContext,
        record: RequestRecord,
        requests: Sequence[Request],
        options: TextOptions,
    ) -> None:
        self._record = record
        self._records: list[RequestRecord] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._closed = False
        self.generations: list[Generation] = []
        try:
            for request in requests:
                own = replace(record, fields={})
                offset = len(self.generations) * request.sampling.n
                self.generations.append(Generation(context, own, request, options, offset))
                self._records.append(own)
        except BaseException:
            self.close()
            raise

    @property
    def usage(self) -> Usage:
        """Tokens of all prompts and their choices so far."""
        return reduce(_sum, (generation.usage for generation in self.generations))

    async def pieces(self) -> AsyncIterator[TextPiece]:
        """See `Generation.pieces`; the first failure of any prompt ends them all."""
        if len(self.generations) == 1:
            async for piece in self.generations[0].pieces():
                yield piece
            return
        # A queue of one: what a slow reader does not take stays with the engine, where it is merged.
        ready: asyncio.Queue[TextPiece | Exception | None] = asyncio.Queue(1)
        self._pumps = [asyncio.create_task(_pump(generation, ready)) for generation in self.generations]
        running = len(self._pumps)
        while running:
            item = await ready.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item

    def close(self) -> None:
        """Abort what still runs and complete the request's record. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for pump in self._pumps:
            pump.cancel()
        for generation in self.generations:
            generation.close()
        self._record.fields.update(_together([record.fields for record in self._records]))


async def _pump(generation: Generation, ready: asyncio.Queue[TextPiece | Exception | None]) -> None:
    try:
        async with aclosing(generation.pieces()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                await ready.put(piece)
    except Exception as error:
        await ready.put(error)
    else:
        await ready.put(None)


def _sum(one: Usage, other: Usage) -> Usage:
    cached = one.prompt_tokens_details.cached_tokens + other.prompt_tokens_details.cached_tokens
    return Usage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        total_tokens=one.total_tokens + other.total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def _together(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One log line for several prompts: counts add up, lists are joined, times are the prompts' mean."""
    joined: dict[str, Any] = {}
    for name in lines[0] if lines else ():
        values = [line[name] for line in lines if line.get(name) is not None]
        if not values:
            joined[name] = None
        elif isinstance(values[0], list):
            joined[name] = [item for value in values for item in value]
        elif isinstance(values[0], int):
            joined[name] = sum(values)
        elif isinstance(values[0], float):
            joined[name] = round(sum(values) / len(values), 5)
        else:
            joined[name] = values[0]
    if len(lines) > 1:
        joined["prompts"] = len(lines)
    return joined
