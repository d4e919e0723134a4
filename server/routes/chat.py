"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

from fastapi import APIRouter, Request as HttpRequest
from starlette.responses import Response

from engine.types import TokenLogprobs
from server.chunks import ChatWriter, Heading, chat_logprobs, prompt_logprobs, to_json
from server.context import Context, RequestRecord, ServerContext, record_of
from server.reasoning_use import begun_content
from server.responses import (
    ChatChoice,
    ChatCompletion,
    ChatFinishReasonName,
    FinishReasonName,
    ResponseMessage,
    StopReason,
)
from server.routes.body_route import BodyRoute
from server.routes.generate import ERRORS, STREAMED, Chunks, chat_generation, respond, sampling_of
from server.schemas.chat import ChatRequest
from server.streaming import Generation, TextPiece, take_all
from server.tool_use import CallReader

__all__ = ["router"]

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, **STREAMED})
async def chat_completions(body: ChatRequest, http: HttpRequest, context: Context) -> Response:
    """Continue a conversation, as one answer or as server-sent events."""
    record = record_of(http)
    record.fields["model"] = model = context.name_of(body.model)
    context.check_model(model)
    sampling = await sampling_of(body, context)
    generation = await chat_generation(body, context, record, sampling)
    answer = partial(_Answer, body, context, record, generation)
    return await respond(http, context, generation, answer, bool(body.stream))


@dataclass(slots=True)
class _Choice:
    """What has come of one choice."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReasonName = "stop"
    stop_reason: StopReason = None


class _Answer(Chunks):
    """Writes one generation in OpenAI's form."""

    def __init__(
        self, body: ChatRequest, context: ServerContext, record: RequestRecord, generation: Generation
    ) -> None:
        self.completion_id = f"chatcmpl-{record.engine_id}"
        self._body = body
        self._context = context
        self._generation = generation
        special_is_text = body.skip_special_tokens is False
        self._read = partial(context.text.token_text, special_is_text=special_is_text)
        model = context.name_of(body.model)
        self._heading = Heading(self.completion_id, int(time.time()), model, context.fingerprint)
        usage = (lambda: generation.usage) if body.include_usage else None
        self._writer = ChatWriter(self._heading, self._read, usage, body.continuous_usage)
        tools = body.callable_tools
        begun = "" if body.calls_follow_grammar else begun_content(body, context.thought_format)
        self._calls = CallReader(context.tool_format, tools, begun) if tools else None
        self._tells_thoughts = body.include_reasoning is not False

    def write(self, piece: TextPiece) -> bytes:
        """See `Answer.write`."""
        content, reason = piece.text, piece.finish_reason
        thought = piece.thought if self._tells_thoughts else ""
        if self._calls is None:
            return self._writer.step(
                piece.index, content, piece.logprobs, reason, piece.stop_reason, thought=thought
            )
        content, calls = self._calls.read(piece.index, content, final=reason is not None)
        told = None if reason is None else self._why(piece.index, reason)
        return self._writer.step(
            piece.index, content, piece.logprobs, told, piece.stop_reason, calls, thought
        )

    def end(self) -> bytes:
        """See `Answer.end`."""
        return self._writer.end()

    async def whole(self) -> bytes:
        """See `Answer.whole`."""
        found: dict[int, _Choice] = {}

        def take(piece: TextPiece) -> None:
            choice = found.setdefault(piece.index, _Choice())
            choice.texts.append(piece.text)
            choice.thoughts.append(piece.thought)
            choice.logprobs += piece.logprobs or ()
            if piece.finish_reason is not None:
                choice.reason, choice.stop_reason = piece.finish_reason, piece.stop_reason

        await take_all(self._generation, take)
        if self._body.logprobs or self._generation.prompt_logprobs is not None:
            return await self._context.in_thread(self._render, found)
        return self._render(found)

    def _why(self, index: int, reason: FinishReasonName) -> ChatFinishReasonName:
        return reason if self._calls is None else self._calls.finish_reason(index, reason)

    def _message(self, index: int, choice: _Choice) -> ResponseMessage:
        text, thought = "".join(choice.texts), "".join(choice.thoughts)
        if self._calls is not None:
            message = self._calls.message(index, text)
        else:
            message = ResponseMessage(role="assistant", content=text, refusal=None)
        if self._tells_thoughts and self._context.thought_format is not None:
            message.reasoning_content = message.reasoning = thought or None
            if thought:
                message.content = message.content or None
        return message

    def _render(self, found: dict[int, _Choice]) -> bytes:
        choices = [
            ChatChoice(
                index=index,
                message=self._message(index, choice),
                logprobs=chat_logprobs(choice.logprobs, self._read) if self._body.logprobs else None,
                finish_reason=self._why(index, choice.reason),
                stop_reason=choice.stop_reason,
            )
            for index, choice in sorted(found.items())
        ]
        completion = ChatCompletion(
            **self._heading.fields("chat.completion"), choices=choices, usage=self._generation.usage
        )
        if (known := self._generation.prompt_logprobs) is not None:
            count = self._body.prompt_logprobs or 0
            completion.prompt_logprobs = prompt_logprobs(known, count, self._context.text.token_text)
        return to_json(completion).encode()
