"""What the endpoints that generate text share: from a body to the engine, and to an answer or a stream."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

import structlog
from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from engine.errors import MedusaError, RequestError
from engine.grammar import Grammar
from engine.thought import Readable
from engine.types import MedusaParams, Request, SamplingParams
from server.chunks import event
from server.context import RequestRecord, ServerContext
from server.errors import CLIENT_CLOSED_REQUEST, to_status
from server.events import EventStream
from server.reasoning_use import AnyThought, begun_content, template_variables, thought_of, with_thought
from server.responses import ErrorBody
from server.schemas.base import GenerationBody
from server.schemas.chat import ChatRequest
from server.schemas.structured import Constraint
from server.streaming import Generation, Pieces, TextOptions, TextPiece, unless_disconnected
from server.tool_use import calls_constraint, with_place

__all__ = [
    "ERRORS",
    "STREAMED",
    "Answer",
    "Chunks",
    "chat_generation",
    "chat_prompt",
    "engine_request",
    "grammar_of",
    "respond",
    "sampling_of",
    "text_options",
]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in (
        (400, "A field is wrong, unknown or not supported; `param` names it."),
        (404, "The model is not served here."),
        (413, "The body is larger than the server takes."),
        (415, "The body is not JSON by its Content-Type."),
        ("4XX", "The request cannot be taken as it is."),
        (500, "A step failed under the request."),
        (503, "The queue is full or the server is shutting down; `Retry-After` says when to come back."),
        (504, "The answer took longer than the server lets one take."),
    )
}
"""Answers of every endpoint with a body, for its OpenAPI description."""

_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk in JSON, an error, or [DONE]."}},
}

STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}
"""The other form of a completion."""

log = structlog.stdlib.get_logger("server.generate")


class Answer(Protocol):
    """Writes one generation, as events or whole."""

    @property
    def completion_id(self) -> str: ...

    def begin(self) -> bytes:
        """The events before any piece; may be none."""

    def write(self, piece: TextPiece) -> bytes | Awaitable[bytes]:
        """The events of one piece; may be none. Awaitable where writing them takes long."""

    def end(self) -> bytes:
        """The stream's last events."""

    def failed(self, error: Exception) -> bytes:
        """The stream's last events where it ends with an error."""

    def whole(self) -> Coroutine[Any, Any, bytes]:
        """The answer in JSON when it is complete. Raises what `Pieces.waiting` raises."""


class Chunks:
    """An `Answer` whose stream is of chunks alone; an error is one of them."""

    def begin(self) -> bytes:
        """See `Answer.begin`."""
        return b""

    def failed(self, error: Exception) -> bytes:
        """See `Answer.failed`."""
        return event(json.dumps(to_status(error)[1]))


async def sampling_of(body: GenerationBody, context: ServerContext) -> SamplingParams:
    """How the tokens of a request are drawn. Raises RequestError."""
    bad_words: list[tuple[int, ...]] = []
    if body.bad_words:
        bad_words = await context.in_thread(context.text.encode_bad_words, body.bad_words)
    return body.sampling(context.defaults, context.engine.info.vocab_size, bad_words)


async def grammar_of(
    constraint_of: Callable[[], Constraint] | None, context: ServerContext, record: RequestRecord
) -> Grammar | None:
    """What each answer of a request has to follow.

    Args:
        constraint_of: writes the grammar; None where there is none.

    Raises:
        RequestError: it cannot be compiled; the message says where it stands and why.
    """
    if constraint_of is None:
        return None
    constraint = await context.encoded(record, constraint_of)
    try:
        return await context.grammars.compiled(constraint.spec)
    except RequestError as error:
        raise RequestError(f"{constraint.place}: {error}", param=constraint.param) from error


def text_options(
    body: GenerationBody, shown: frozenset[int] = frozenset(), thought: Readable | None = None
) -> TextOptions:
    """How a request wants its text, with the special tokens in it that are to be read here."""
    return TextOptions(
        stop=tuple(body.stop or ()),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        shown=shown,
        thought=thought,
    )


def engine_request(
    body: GenerationBody,
    context: ServerContext,
    request_id: str,
    prompt: Sequence[int],
    sampling: SamplingParams,
    grammar: Grammar | None,
    prediction: Sequence[int] = (),
) -> Request:
    """One prompt as the engine takes it, cut to its last tokens where the client allows that.

    Raises:
        RequestError: a value out of range.
    """
    if (keep := body.truncate_prompt_tokens) is not None:
        if keep == -1:
            keep = max(1, context.engine.info.max_model_len - (sampling.max_tokens or 1))
        prompt = prompt[-keep:]
    return Request(
        request_id,
        tuple(prompt),
        sampling,
        medusa=MedusaParams() if body.medusa is None else body.medusa.params(),
        prediction_token_ids=tuple(prediction),
        cache_salt=body.cache_salt,
        grammar=grammar,
        priority=body.priority or 0,
    )


async def chat_prompt(
    body: ChatRequest, context: ServerContext, record: RequestRecord
) -> tuple[Sequence[int], AnyThought | None]:
    """A conversation's token ids, and the thought that its answer may begin with. Raises RequestError."""
    text = context.text
    options = body.template_options()
    special = options.pop("add_special_tokens")
    known = text.template_variables(tools=bool(options["tools"]))
    options["template_kwargs"] = template_variables(body, known)
    write = partial(text.render_chat, body.template_input(), **options)
    prompt = await context.tokens_of(record, write, add_special_tokens=special, param="messages")
    return prompt, thought_of(body, context.thought_format, text, prompt, calls=context.tool_format)


async def chat_generation(
    body: ChatRequest, context: ServerContext, record: RequestRecord, sampling: SamplingParams
) -> Generation:
    """The answers to a conversation. Everything that can be refused is refused here, before a status is sent.

    Raises:
        RequestError, QueueFullError, EngineStoppedError: as `Generation`.
    """
    text = context.text
    prediction: list[int] = []
    if body.prediction_text:
        prediction = await context.encoded(
            record, text.encode, body.prediction_text, add_special_tokens=False, param="prediction"
        )
    prompt, thought = await chat_prompt(body, context, record)
    try:
        grammar = await grammar_of(_constraint_of(body, context, thought), context, record)
    except RequestError as error:
        raise with_place(error, body) from error
    request = engine_request(body, context, record.engine_id, prompt, sampling, grammar, prediction)
    shown = context.tool_format.shown if body.callable_tools else frozenset()
    if context.thought_format is not None:
        shown |= context.thought_format.shown
    try:
        return Generation(context, record, request, text_options(body, shown, thought))
    except RequestError as error:
        if error.param == "prompt":
            error.param = "messages"  # the client gave no tokens, only these
        raise


def _constraint_of(
    body: ChatRequest, context: ServerContext, thought: AnyThought | None
) -> Callable[[], Constraint] | None:
    """What writes the grammar of an answer that has to follow one."""
    constraint_of = body.constraint_of
    if body.calls_follow_grammar:
        opening = thought.begin if thought is not None and thought.place == "before" else ""
        begun = begun_content(body, context.thought_format)
        constraint_of = partial(calls_constraint, body, context.tool_format, begun, opening)
    calls, effort = body.calls_follow_grammar, body.reasoning_effort
    return with_thought(constraint_of, context.thought_format, thought, effort, calls=calls)


async def respond(
    http: HttpRequest, context: ServerContext, generation: Pieces, answer: Callable[[], Answer], stream: bool
) -> Response:
    """A stream's events, or the whole answer, written by what `answer` makes.

    The generation is closed with it. A client that leaves ends the work either way.
    """
    if stream:
        return EventStream(generation, lambda: _Events(generation, answer()), context.arrivals)
    try:
        content = await unless_disconnected(http, answer().whole())
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        generation.close()
    return Response(content, media_type="application/json")


class _Events:
    """See `server.events.Events`. An error after the start can only be told in the stream itself."""

    def __init__(self, generation: Pieces, answer: Answer) -> None:
        self._generation = generation
        self._answer = answer
        self._begun = answer.begin()
        self._writing: Awaitable[bytes] | None = None
        self.ended = False

    @property
    def slow(self) -> bool:
        return self._writing is not None

    def take(self) -> bytes:
        if self._writing is not None or self.ended:
            return b""
        events, self._begun = self._begun, b""
        try:
            for piece in self._generation.waiting():
                written = self._answer.write(piece)
                if not isinstance(written, bytes):
                    self._writing = written
                    return events
                events += written
            if self._generation.complete:
                self.ended = True
                events += self._answer.end()
        except Exception as error:
            events += self._failed(error)
        return events

    async def take_slow(self) -> bytes:
        assert self._writing is not None
        try:
            return await self._writing
        except Exception as error:
            return self._failed(error)
        finally:
            self._writing = None

    def _failed(self, error: Exception) -> bytes:
        self.ended = True
        status, _, _ = to_status(error)
        unexpected = not isinstance(error, MedusaError)
        log.error("stream_failed", id=self._answer.completion_id, status=status, exc_info=unexpected)
        return self._answer.failed(error)
