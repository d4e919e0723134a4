"""The engine offline: requests in, outputs out, in the caller's own thread; no asyncio, no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RequestError
from engine.loader import load
from engine.stats import EngineStats
from engine.types import EngineInfo, FinishReason, Request, TokenDelta

__all__ = ["LLM", "Output"]


@dataclass(slots=True)
class Output:
    """One choice of one request, as its deltas came.

    Args:
        request_id: the request.
        index: the choice, from 0.
        started_s: `time.monotonic()` when its request was queued.
        deltas: everything the engine said about it, in order.
    """

    request_id: str
    index: int
    started_s: float
    deltas: list[TokenDelta] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it runs."""
        return self.deltas[-1].finish_reason if self.deltas else None

    @property
    def error(self) -> str | None:
        """What went wrong, with `FinishReason.ERROR`."""
        return self.deltas[-1].error if self.deltas else None

    @property
    def num_steps(self) -> int:
        """Decode steps it took part in; the token drawn by prefill took none."""
        return sum(delta.num_steps for delta in self.deltas)

    @property
    def num_decoded(self) -> int:
        """Tokens that those steps emitted; over `num_steps` this is its acceptance length."""
        return sum(len(delta.token_ids) for delta in self.deltas if delta.num_steps)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from queueing to the end of the step that emitted the first token; None without one."""
        return next((delta.time_s - self.started_s for delta in self.deltas if delta.token_ids), None)

    @property
    def seconds(self) -> float:
        """Seconds from queueing to the last delta."""
        return self.deltas[-1].time_s - self.started_s if self.deltas else 0.0

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        count, first = len(self.token_ids), self.ttft_s
        return (self.seconds - first) / (count - 1) if count > 1 and first is not None else None


class LLM:
    """A loaded engine that runs lists of requests to their end.

    Use it in the thread that made it: each thread that runs torch keeps a pool of workers of its own, and
    two pools slow each other down (see `engine.loop`).

    Args:
        config: what to load.
        progress: show a bar while weights load.

    Raises:
        ConfigError: settings that contradict each other or do not fit this machine.
        ModelError: the model, the heads or the tree cannot be used.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False) -> None:
        loaded = load(config, progress=progress)
        self.text, self.generation_defaults = loaded.text, loaded.generation_defaults
        self._engine = Engine(loaded)

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def stats(self) -> EngineStats:
        """Totals since loading; differences of two readings describe what ran between them."""
        return self._engine.stats

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Run requests together until all have ended.

        More of them than `max_num_seqs` wait for a slot, as they would in the server. A request that
        fails on its way ends with `FinishReason.ERROR`; the others go on.

        Returns:
            One output per request and choice, in the order asked.

        Raises:
            RequestError, ContextLengthError: a request that can never run; nothing has run then.
        """
        started_s = time.monotonic()
        outputs = {
            (request.request_id, index): Output(request.request_id, index, started_s)
            for request in requests
            for index in range(request.sampling.n)
        }
        for deltas in self.steps(requests):
            for delta in deltas:
                outputs[delta.request_id, delta.index].deltas.append(delta)
        return list(outputs.values())

    def steps(self, requests: Sequence[Request]) -> Iterator[list[TokenDelta]]:
        """The same step by step: yields each step's deltas. Closed early, it aborts what still runs.

        Raises:
            RequestError, ContextLengthError: a request that can never run; nothing has run then.
            RuntimeError: another generation is under way.
        """
        if self._working():
            raise RuntimeError("this LLM is generating already; one call at a time")
        if len({request.request_id for request in requests}) < len(requests):
            raise RequestError("request ids must differ", param="request_id")
        for request in requests:
            self.info.check(request)
        try:
            for request in requests:
                self._engine.add(request)
            while self._working():
                yield self._engine.step()
        finally:
            if self._working():
                for request in requests:
                    self._engine.abort(request.request_id)

    def stream(self, take: Callable[[], Request | None]) -> Iterator[list[TokenDelta]]:
        """Steps over requests that are not all known at once, with every slot busy as long as there are any.

        Closed early, it aborts what still runs.

        Args:
            take: asked before each step for another request while a slot is free; None where there is
                none right now. It ends when there is none and nothing runs.

        Raises:
            RequestError, ContextLengthError: a request that can never run; the others are aborted.
            RuntimeError: another generation is under way.
        """
        if self._working():
            raise RuntimeError("this LLM is generating already; one call at a time")
        live: dict[str, int] = {}  # choices still running
        try:
            while True:
                while self.stats.running + self.stats.waiting < self.info.max_num_seqs:
                    if (request := take()) is None:
                        break
                    self.info.check(request)
                    if request.request_id in live:
                        raise RequestError("request ids must differ", param="request_id")
                    self._engine.add(request)
                    live[request.request_id] = request.sampling.n
                if not self._working():
                    return
                deltas = self._engine.step()
                for delta in deltas:
                    if delta.finish_reason is not None:
                        live[delta.request_id] -= 1
                        if not live[delta.request_id]:
                            del live[delta.request_id]
                yield deltas
        finally:
            for request_id in live:
                self._engine.abort(request_id)

    def check(self) -> None:
        """Raise RuntimeError if K/V blocks are lost, or owned while nothing runs."""
        self._engine.check()

    def _working(self) -> bool:  # a call, since mypy takes a property for unchanged between two looks
        return self._engine.has_work
