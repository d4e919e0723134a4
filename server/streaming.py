"""From an engine's token deltas to text a client can read, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from engine.errors import EngineStoppedError, RequestError, StepError
from engine.thought import Readable
from engine.types import FinishReason, Request, TokenDelta, TokenLogprobs
from server.context import RequestRecord, ServerContext
from server.errors import RequestTimeoutError
from server.metrics import FinishedReason
from server.responses import (
    CompletionTokensDetails,
    FinishReasonName,
    PromptTokensDetails,
    StopReason,
    Usage,
)

__all__ = [
    "Generation",
    "Pieces",
    "TextOptions",
    "TextPiece",
    "take_all",
    "unless_disconnected",
]

T = TypeVar("T")


@dataclass(slots=True)  # a frozen one takes three times as long to make
class TextPiece:
    """New text of one choice from one step.

    Args:
        index: the choice.
        text: may be empty.
        finish_reason: set on the choice's last piece.
        logprobs: of the tokens whose text is complete with this piece; None if the request wants none.
        starts: for each of these, the character of the choice's text at which it begins.
        stop_reason: with `finish_reason`, the request's stop string or stop token id that ended the choice.
        thought: more of what the choice's text does not begin with: see `TextOptions.thought`.
        answers: for each of the logprobs, whether its token is part of the text, not of a thought or a mark;
            empty where all are.
        turns: thought and text by turns, where a thought came behind some of the text.
        ending: what is known of a token that ended the choice and is no text; None if the request wants none.
    """

    index: int
    text: str
    finish_reason: FinishReasonName | None
    logprobs: list[TokenLogprobs] | None = None
    starts: tuple[int, ...] = ()
    stop_reason: StopReason = None
    thought: str = ""
    answers: tuple[bool, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    ending: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a request wants its text.

    Args:
        stop: the output ends before the first of these strings.
        include_stop: it ends after it, and a token that ended it is text too.
        skip_special_tokens: leave special tokens out.
        shown: of these, the ones to leave in.
        thought: which the output may begin with, and which is to be told from its text; None if none is.
    """

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    shown: frozenset[int] = frozenset()
    thought: Readable | None = None


@dataclass(slots=True)
class _Choice:
    """What is counted about one choice, and the logprobs of tokens whose text is still held."""

    logprobs: deque[TokenLogprobs] = field(default_factory=deque)
    accepted_prediction_tokens: int = 0
    tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    queue_s: float = 0.0
    finish_reason: FinishedReason | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """Mean over the tokens after the first; None if there are none."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else None


class Generation:
    """One request in the engine, from submission to its last token or its abort.

    Whoever makes one must call `close`, which frees what the engine still holds of it.

    Args:
        context: the server.
        record: of the HTTP request.
        request: for the engine.
        options: how the text is to be.
        offset: index of its first choice in the answer.

    Raises:
        RequestError, QueueFullError, EngineStoppedError: as `EngineClient.submit`.
    """

    def __init__(
        self,
        context: ServerContext,
        record: RequestRecord,
        request: Request,
        options: TextOptions,
        offset: int = 0,
    ) -> None:
        self._context = context
        self._record = record
        self._request = request
        self._options = options
        self._offset = offset
        self._choices = [_Choice() for _ in range(request.sampling.n)]
        self._open = set(range(request.sampling.n))
        self._closed = False
        self._finished = False
        self._cached_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        """One per prompt token, the first None, once the first piece is there and if asked for."""
        self._wants_logprobs = request.sampling.logprobs is not None
        self._detokenizers = [
            context.text.detokenizer(
                request.prompt_token_ids,
                stop=options.stop,
                min_tokens=request.sampling.min_tokens,
                skip_special_tokens=options.skip_special_tokens,
                shown=options.shown,
                include_stop=options.include_stop,
                aligned=self._wants_logprobs,
                thought=options.thought,
            )
            for _ in self._choices
        ]
        self._late = False
        self._timer: TimerHandle | None = None
        self._listener: Callable[[], None] = _nothing
        self._stream = context.engine.submit(request)
        if limit := context.settings.request_timeout:
            left = record.started + limit - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(left, self._on_late)

    @property
    def usage(self) -> Usage:
        """Tokens so far; output is counted up to where a stop token or string ended it."""
        prompt = len(self._request.prompt_token_ids)
        completion = sum(choice.tokens for choice in self._choices)
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens),
        )
        predicted = len(self._request.prediction_token_ids)
        if predicted or self._options.thought is not None:
            accepted = sum(choice.accepted_prediction_tokens for choice in self._choices)
            usage.completion_tokens_details = CompletionTokensDetails(
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=max(0, predicted - accepted),
                reasoning_tokens=sum(one.thought_tokens for one in self._detokenizers),
                audio_tokens=0,
            )
        return usage

    @property
    def complete(self) -> bool:
        """True once each choice's last piece was taken."""
        return not self._open

    def waiting(self) -> Iterator[TextPiece]:
        """The text that is there, of all choices, interleaved as the engine made it.

        Raises, after what was there before:
            StepError: a step failed under the request.
            RequestError: it asks for what there is not, such as a token where its fields leave none.
            EngineStoppedError: the engine stopped before the request was done.
            RequestTimeoutError: it took longer than a request may.
        """
        while self._open and (delta := self._stream.take()) is not None:
            if delta.index not in self._open:
                continue  # a step that was under way when the choice's stop string ended it
            if delta.finish_reason is FinishReason.ERROR:
                self._end(self._choices[delta.index], "error")
                told = delta.error or "a step failed"
                raise RequestError(told, param=delta.fault_param) if delta.own_fault else StepError(told)
            if delta.finish_reason is FinishReason.ABORT:
                raise EngineStoppedError("the server is shutting down")
            yield self._take(delta)
        if self._open and self._late:
            for index in self._open:
                self._end(self._choices[index], "timeout")
            limit = self._context.settings.request_timeout
            raise RequestTimeoutError(f"the request was not done within {limit:g} s")

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called when there is more for `waiting`, also an error. It must not raise."""
        self._listener = listener
        self._stream.listen(listener)

    def _on_late(self) -> None:
        self._late = True
        self._listener()

    def close(self) -> None:
        """Abort what still runs and complete the request's record. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.listen(_nothing)
        if self._timer is not None:
            self._timer.cancel()
        if self._open:
            self._context.engine.abort([self._request.request_id])
        for choice in self._choices:
            if choice.finish_reason is None:
                self._end(choice, "abort")
        if self._stream.merged_steps:
            self._context.metrics.stream_steps_merged.inc(self._stream.merged_steps)
        self._record.fields.update(self._summary())

    def _take(self, delta: TokenDelta) -> TextPiece:
        choice = self._choices[delta.index]
        if delta.index == 0 and not choice.tokens:
            self._cached_tokens = delta.cached_tokens
            self.prompt_logprobs = delta.prompt_logprobs
        # A stop token counts as output and, unless it is asked for, is no text.
        unseen = delta.stop_token_id is not None and not self._options.include_stop
        token_ids = delta.token_ids[:-1] if unseen else delta.token_ids
        ended = delta.finish_reason is not None
        text = self._detokenizers[delta.index].push(token_ids, final=ended)
        finish_reason = _NAMES[delta.finish_reason] if delta.finish_reason else None
        choice.tokens += text.num_tokens
        # Tokens after a stop string are no part of the answer.
        choice.accepted_prediction_tokens += min(delta.accepted_prediction_tokens, text.num_tokens)
        if text.stop is not None:
            finish_reason = "stop"
            if not ended:
                self._context.engine.abort_choice(self._request.request_id, delta.index)
        elif unseen:
            choice.tokens += 1
        if finish_reason is not None:
            self._open.remove(delta.index)
        self._time(choice, delta)
        if finish_reason is not None:
            self._end(choice, finish_reason)
        logprobs = ending = None
        if self._wants_logprobs:
            known = delta.logprobs or []
            choice.logprobs.extend(known[: len(token_ids)])
            logprobs = [choice.logprobs.popleft() for _ in text.starts]
            if unseen and text.stop is None:
                ending = known[len(token_ids)]
        stop_reason: StopReason = text.stop
        if stop_reason is None and delta.stop_token_id in self._request.sampling.stop_token_ids:
            stop_reason = delta.stop_token_id  # the model's own end of text is none, as in vLLM
        index = self._offset + delta.index
        return TextPiece(
            index,
            text.text,
            finish_reason,
            logprobs,
            text.starts,
            stop_reason,
            text.thought,
            text.answers,
            text.turns,
            ending,
        )

    def _time(self, choice: _Choice, delta: TokenDelta) -> None:
        now, metrics = time.monotonic(), self._context.metrics
        if delta.num_steps:
            choice.decode_steps += delta.num_steps
            choice.decode_tokens += len(delta.token_ids)
        if not delta.token_ids:
            return
        if choice.first_s:
            metrics.inter_token_latency.observe(now - choice.last_s)
        else:
            if not any(other.first_s for other in self._choices):
                metrics.time_to_first_token.observe(now - self._record.started)
            choice.queue_s = self._request.arrived_s - self._record.started + delta.queue_s
            metrics.queue_time.observe(choice.queue_s)
            choice.first_s = now
        choice.last_s = now

    def _end(self, choice: _Choice, reason: FinishedReason) -> None:
        metrics, arrived = self._context.metrics, self._record.started
        if reason in ("stop", "length") and not self._finished:
            self._finished = True
            metrics.prompt(len(self._request.prompt_token_ids))
        choice.finish_reason = reason
        metrics.finished(
            reason,
            tokens=choice.tokens,
            e2e_s=time.monotonic() - arrived,
            ttft_s=choice.first_s - arrived,
            queue_s=choice.queue_s,
            decode_s=choice.last_s - choice.first_s,
        )

    def _summary(self) -> dict[str, Any]:
        """The request's part of its log line. Seconds; None where there is nothing to measure."""
        steps = sum(choice.decode_steps for choice in self._choices)
        accepted = sum(choice.decode_tokens for choice in self._choices)
        first = min((choice.first_s for choice in self._choices if choice.first_s), default=None)
        rates = [rate for choice in self._choices if (rate := choice.seconds_per_token) is not None]
        usage = self.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reasons": [choice.finish_reason for choice in self._choices],
            "queue_s": None if first is None else round(self._choices[0].queue_s, 4),
            "ttft_s": None if first is None else round(first - self._record.started, 4),
            "tpot_s": round(sum(rates) / len(rates), 5) if rates else None,
            "acceptance_length": round(accepted / steps, 3) if steps else None,
        }


def _nothing() -> None:
    """Whom nobody listens to."""


_NAMES: dict[FinishReason, FinishReasonName] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Pieces(Protocol):
    """What an answer is written from: a `Generation`, or a `Batch` of them."""

    @property
    def usage(self) -> Usage: ...

    @property
    def complete(self) -> bool: ...

    def waiting(self) -> Iterator[TextPiece]: ...

    def listen(self, listener: Callable[[], None]) -> None: ...

    def close(self) -> None: ...


async def take_all(generation: Pieces, take: Callable[[TextPiece], None]) -> None:
    """Call `take` with each piece as it comes, without a task that is woken for it.

    Raises:
        What `Pieces.waiting` and `take` raise.
    """
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def read() -> None:
        if done.done():
            return
        try:
            for piece in generation.waiting():
                take(piece)
        except Exception as error:
            done.set_exception(error)
        else:
            if generation.complete:
                done.set_result(None)

    generation.listen(read)
    read()
    await done


async def unless_disconnected(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away.

    Raises:
        ClientDisconnect: the client went away first.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
