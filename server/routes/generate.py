"""What chat and text completions have in common: from a body to the engine, and to an answer or a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol

import structlog
from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from engine.errors import MedusaError, RequestError
from engine.grammar import Grammar
from engine.types import MedusaParams, Request, SamplingParams
from server.batch import Pieces
from server.chunks import event
from server.context import RequestRecord, ServerContext
from server.errors import CLIENT_CLOSED_REQUEST, to_status
from server.responses import ErrorBody
from server.schemas.base import GenerationBody
from server.schemas.structured import ConstrainedBody
from server.streaming import EventStream, TextOptions, TextPiece, unless_disconnected

__all__ = [
    "ERRORS",
    "STREAMED",
    "Answer",
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

    async def write(self, piece: TextPiece) -> bytes:
        """The events of one piece; may be none."""

    def end(self) -> bytes:
        """The stream's last events."""

    def whole(self) -> Coroutine[Any, Any, bytes]:
        """The answer in JSON when it is complete. Raises what `Generation.pieces` raises."""


async def sampling_of(body: GenerationBody, context: ServerContext) -> SamplingParams:
    """How the tokens of a request are drawn. Raises RequestError."""
    bad_words: list[tuple[int, ...]] = []
    if body.bad_words:
        bad_words = await context.in_thread(context.text.encode_bad_words, body.bad_words)
    return body.sampling(context.defaults, context.engine.info.vocab_size, bad_words)


async def grammar_of(body: ConstrainedBody, context: ServerContext, record: RequestRecord) -> Grammar | None:
    """What each answer of a request has to follow.

    Raises:
        RequestError: it cannot be compiled; the message says where it stands and why.
    """
    if not body.constrained_by:
        return None
    constraint = await context.encoded(record, body.constraint)
    try:
        return await context.grammars.compiled(constraint.spec)
    except RequestError as error:
        raise RequestError(f"{constraint.place}: {error}", param=constraint.param) from error


def text_options(body: GenerationBody) -> TextOptions:
    """How a request wants its text."""
    return TextOptions(
        stop=tuple(body.stop or ()),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
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


async def respond(http: HttpRequest, generation: Pieces, answer: Answer, stream: bool) -> Response:
    """A stream's events, or the whole answer; the generation is closed with it.

    A client that leaves ends the work either way.
    """
    if stream:
        return EventStream(_events(generation, answer), generation)
    try:
        content = await unless_disconnected(http, answer.whole())
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        generation.close()
    return Response(content, media_type="application/json")


async def _events(generation: Pieces, answer: Answer) -> AsyncIterator[bytes]:
    """The stream's events. An error after the start can only be told in the stream itself."""
    try:
        async for piece in generation.pieces():
            if events := await answer.write(piece):
                yield events
        yield answer.end()
    except Exception as error:
        status, body, _ = to_status(error)
        unexpected = not isinstance(error, MedusaError)
        log.error("stream_failed", id=answer.completion_id, status=status, exc_info=unexpected)
        yield event(json.dumps(body))
