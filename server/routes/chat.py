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
from engine.types import MedusaParams, Request, TokenLogprobs
from server.chunks import DONE, ChunkWriter, chat_logprobs, event, prompt_logprobs, to_json
from server.context import Context, RequestRecord, ServerContext, record_of
from server.errors import CLIENT_CLOSED_REQUEST, to_status
from server.responses import ChatChoice, ChatCompletion, FinishReasonName, ResponseMessage
from server.schemas import ChatRequest
from server.streaming import EventStream, Generation, unless_disconnected

__all__ = ["router"]

router = APIRouter()
log = structlog.stdlib.get_logger("server.chat")


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat_completions(body: ChatRequest, http: HttpRequest, context: Context) -> Response:
    """Continue a conversation, as one answer or as server-sent events."""
    record = record_of(http)
    record.fields["model"] = body.model
    context.check_model(body.model)
    generation = await _submit(body, context, record)
    answer = _Answer(f"chatcmpl-{record.engine_id}", body, context)
    if body.stream:
        return EventStream(answer.events(generation), generation)
    try:
        completion = await unless_disconnected(http, answer.whole(generation))
    except ClientDisconnect:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        generation.close()
    return Response(to_json(completion), media_type="application/json")


async def _submit(body: ChatRequest, context: ServerContext, record: RequestRecord) -> Generation:
    """Everything that can be refused is refused here, before a status is sent."""
    text = context.text
    medusa = MedusaParams() if body.medusa is None else body.medusa.params()
    bad_words: list[tuple[int, ...]] = []
    if body.bad_words:
        bad_words = await context.encode(text.encode_bad_words, body.bad_words)
    sampling = body.sampling(context.defaults, context.engine.info.vocab_size, bad_words)
    prediction: list[int] = []
    if body.prediction_text:
        prediction = await context.encode(
            text.encode, body.prediction_text, add_special_tokens=False, param="prediction"
        )
    messages = [message.as_template_input() for message in body.messages]
    prompt = await context.encode(text.encode_chat, messages)
    request = Request(
        record.engine_id,
        tuple(prompt),
        sampling,
        medusa=medusa,
        prediction_token_ids=tuple(prediction),
        cache_salt=body.cache_salt,
    )
    try:
        return Generation(context, record, request, stop=tuple(body.stop or ()))
    except RequestError as error:
        if error.param == "prompt":
            error.param = "messages"  # the client gave no tokens, only these
        raise


class _Answer:
    """Writes one generation in OpenAI's form."""

    def __init__(self, completion_id: str, body: ChatRequest, context: ServerContext) -> None:
        self._id = completion_id
        self._created = int(time.time())
        self._body = body
        self._text = context.text

    async def whole(self, generation: Generation) -> ChatCompletion:
        """The answer when it is complete. Raises what `Generation.pieces` raises."""
        texts: dict[int, list[str]] = {}
        logprobs: dict[int, list[TokenLogprobs]] = {}
        reasons: dict[int, FinishReasonName] = {}
        async for piece in generation.pieces():
            texts.setdefault(piece.index, []).append(piece.text)
            logprobs.setdefault(piece.index, []).extend(piece.logprobs or ())
            if piece.finish_reason is not None:
                reasons[piece.index] = piece.finish_reason
        choices = [
            ChatChoice(
                index=index,
                message=ResponseMessage(role="assistant", content="".join(texts[index]), refusal=None),
                logprobs=chat_logprobs(logprobs[index], self._text) if self._body.logprobs else None,
                finish_reason=reasons[index],
            )
            for index in sorted(texts)
        ]
        completion = ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=choices,
            usage=generation.usage,
        )
        if generation.prompt_logprobs is not None:
            completion.prompt_logprobs = prompt_logprobs(generation.prompt_logprobs, self._text)
        return completion

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The stream's events. An error after the start can only be told in the stream itself."""
        include_usage = self._body.include_usage
        writer = ChunkWriter(self._id, self._created, self._body.model, include_usage, self._text)
        try:
            async for piece in generation.pieces():
                if events := writer.step(piece.index, piece.text, piece.logprobs, piece.finish_reason):
                    yield events
            yield (writer.usage(generation.usage) if include_usage else b"") + DONE
        except Exception as error:
            status, body, _ = to_status(error)
            log.error(
                "stream_failed", id=self._id, status=status, exc_info=not isinstance(error, MedusaError)
            )
            yield event(json.dumps(body))
