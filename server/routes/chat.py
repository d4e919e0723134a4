"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import structlog
from fastapi import APIRouter, Request as HttpRequest
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from engine.errors import MedusaError, RequestError
from engine.types import Request
from server.context import Context, RequestRecord, ServerContext, record_of
from server.errors import to_status
from server.schemas import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatRequest,
    ChunkChoice,
    FinishReasonName,
    ResponseMessage,
    Usage,
)
from server.streaming import DONE, EventStream, Generation, to_json, unless_disconnected

__all__ = ["router"]

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for the log, where nobody is left to answer."""

router = APIRouter()
log = structlog.stdlib.get_logger("server.chat")


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat_completions(body: ChatRequest, http: HttpRequest, context: Context) -> Response:
    """Continue a conversation, as one answer or as server-sent events."""
    record = record_of(http)
    record.fields["model"] = body.model
    context.check_model(body.model)
    generation = await _submit(body, context, record)
    writer = _Writer(f"chatcmpl-{record.engine_id}", body)
    if body.stream:
        return EventStream(writer.events(generation), generation)
    try:
        completion = await unless_disconnected(http, writer.whole(generation))
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        generation.close()
    return Response(completion.model_dump_json(), media_type="application/json")


async def _submit(body: ChatRequest, context: ServerContext, record: RequestRecord) -> Generation:
    """Everything that can be refused is refused here, before a status is sent."""
    sampling = body.sampling(context.defaults, context.engine.info.vocab_size)
    messages = [message.as_template_input() for message in body.messages]
    prompt = await context.encode(context.text.encode_chat, messages)
    request = Request(record.engine_id, tuple(prompt), sampling)
    try:
        return Generation(context, record, request, stop=tuple(body.stop or ()))
    except RequestError as error:
        if error.param == "prompt":
            error.param = "messages"  # the client gave no tokens, only these
        raise


class _Writer:
    """Writes one generation in OpenAI's form."""

    def __init__(self, completion_id: str, body: ChatRequest) -> None:
        self._id = completion_id
        self._created = int(time.time())
        self._model = body.model
        self._include_usage = body.include_usage

    async def whole(self, generation: Generation) -> ChatCompletion:
        """The answer when it is complete. Raises what `Generation.pieces` raises."""
        texts: dict[int, list[str]] = {}
        reasons: dict[int, FinishReasonName] = {}
        async for piece in generation.pieces():
            texts.setdefault(piece.index, []).append(piece.text)
            if piece.finish_reason is not None:
                reasons[piece.index] = piece.finish_reason
        choices = [
            ChatChoice(
                index=index,
                message=ResponseMessage(content="".join(texts[index])),
                finish_reason=reasons[index],
            )
            for index in sorted(texts)
        ]
        return ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=generation.usage
        )

    async def events(self, generation: Generation) -> AsyncIterator[str]:
        """The data of each event. An error after the start can only be told in the stream itself."""
        started: set[int] = set()
        try:
            async for piece in generation.pieces():
                if piece.index not in started:
                    started.add(piece.index)
                    yield self._chunk(piece.index, ChatDelta(role="assistant", content=""))
                if piece.text:
                    yield self._chunk(piece.index, ChatDelta(content=piece.text))
                if piece.finish_reason is not None:
                    yield self._chunk(piece.index, ChatDelta(), piece.finish_reason)
            if self._include_usage:
                yield self._usage(generation.usage)
            yield DONE
        except Exception as error:
            status, body, _ = to_status(error)
            log.error(
                "stream_failed", id=self._id, status=status, exc_info=not isinstance(error, MedusaError)
            )
            yield json.dumps(body)

    def _chunk(self, index: int, delta: ChatDelta, finish_reason: FinishReasonName | None = None) -> str:
        choice = ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=finish_reason)
        chunk = self._envelope([choice])
        if self._include_usage:
            chunk.usage = None  # sent as null: OpenAI's way to say that the last chunk will have it
        return to_json(chunk)

    def _usage(self, usage: Usage) -> str:
        chunk = self._envelope([])
        chunk.usage = usage
        return to_json(chunk)

    def _envelope(self, choices: list[ChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
        )
