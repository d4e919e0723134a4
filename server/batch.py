"""Several prompts of one HTTP request, answered together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain
from typing import Any

from engine.types import Request
from server.context import RequestRecord, ServerContext
from server.responses import PromptTokensDetails, Usage
from server.streaming import Generation, TextOptions, TextPiece

__all__ = ["Batch"]


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

    @property
    def complete(self) -> bool:
        """See `Generation.complete`."""
        return all(generation.complete for generation in self.generations)

    def waiting(self) -> Iterator[TextPiece]:
        """See `Generation.waiting`; the first failure of any prompt ends them all."""
        return chain.from_iterable(generation.waiting() for generation in self.generations)

    def listen(self, listener: Callable[[], None]) -> None:
        """See `Generation.listen`."""
        for generation in self.generations:
            generation.listen(listener)

    def close(self) -> None:
        """Abort what still runs and complete the request's record. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for generation in self.generations:
            generation.close()
        self._record.fields.update(_together([record.fields for record in self._records]))


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
