"""POST /v1/responses, and how many tokens of input one would have."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request as HttpRequest
from starlette.responses import Response

from engine.errors import MedusaError, RequestError
from engine.types import SamplingParams, TokenLogprobs
from server.context import Context, RequestRecord, ServerContext, record_of
from server.errors import ResponseNotFoundError, to_status
from server.reasoning_use import begun_content
from server.response_events import ResponseHeading, ResponseWriter
from server.response_objects import InputTokens, ResponseError, ResponseObject
from server.responses import FinishReasonName, ToolCallDelta
from server.routes.body_route import BodyRoute
from server.routes.generate import ERRORS, chat_generation, chat_prompt, respond, sampling_of
from server.schemas.chat import ChatRequest
from server.schemas.responses import ResponsesRequest
from server.streaming import Generation, TextPiece, take_all
from server.tool_use import CallReader

__all__ = ["echo_of", "router"]

_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "description": "The event's type, as in its data."},
        "data": {"type": "string", "description": "An event of OpenAI's Responses API in JSON."},
    },
}
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}

router = APIRouter()
_bodies = APIRouter(route_class=BodyRoute)


@_bodies.post("/v1/responses", response_model=ResponseObject, responses={**ERRORS, **_STREAMED})
async def create_response(body: ResponsesRequest, http: HttpRequest, context: Context) -> Response:
    """Answer a conversation, whole or as server-sent events. Nothing is kept of it."""
    record = record_of(http)
    record.fields["model"] = model = context.name_of(body.model)
    context.check_model(model)
    try:
        chat = body.as_chat()
        sampling = await sampling_of(chat, context)
        echo = echo_of(body, sampling, model)
        generation = await chat_generation(chat, context, record, sampling)
    except RequestError as error:
        body.in_own_terms(error)
        raise
    answer = partial(_Answer, body, chat, context, record, generation, echo)
    return await respond(http, context, generation, answer, bool(body.stream))


@_bodies.post("/v1/responses/input_tokens", response_model=InputTokens, responses=ERRORS)
async def count_input_tokens(body: ResponsesRequest, http: HttpRequest, context: Context) -> Response:
    """The tokens that a response's input comes to with its chat template, tools and instructions.

    The body is that of the response; whatever is wrong with one is told here too.
    """
    record = record_of(http)
    record.fields["model"] = model = context.name_of(body.model)
    context.check_model(model)
    try:
        chat = body.as_chat()
        await sampling_of(chat, context)
        prompt, _ = await chat_prompt(chat, context, record)
    except RequestError as error:
        body.in_own_terms(error)
        raise
    return Response(InputTokens(input_tokens=len(prompt)).model_dump_json(), media_type="application/json")


router.routes += _bodies.routes


@router.api_route("/v1/responses/{response_id}", methods=["GET", "DELETE"], include_in_schema=False)
@router.get("/v1/responses/{response_id}/input_items", include_in_schema=False)
@router.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
async def no_response(response_id: str) -> None:
    """There is none."""
    raise ResponseNotFoundError(f"Response with id '{response_id}' not found: this server keeps none.")


def echo_of(body: ResponsesRequest, sampling: SamplingParams, model: str) -> str:
    """The fields of a response that repeat its request: see `ResponseHeading`.

    Raises:
        RequestError: there is no JSON of a tool or a schema.
    """
    told_format: dict[str, Any] = {"type": "text"}
    if body.text and body.text.format:
        told_format = body.text.format.as_told()
    effort = body.reasoning and body.reasoning.effort
    fields = {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": told_format, "verbosity": "medium"},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice.as_told(),
        "tools": [tool.as_told() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
    try:
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)[1:-1]
    except (RecursionError, ValueError) as error:
        param = "tools" if body.tools else "text.format"
        reason = "NaN and Infinity are no JSON" if isinstance(error, ValueError) else "nested too deeply"
        raise RequestError(f"{param}: {reason}", param=param) from None


class _Answer:
    """Writes one generation as a response."""

    def __init__(
        self,
        body: ResponsesRequest,
        chat: ChatRequest,
        context: ServerContext,
        record: RequestRecord,
        generation: Generation,
        echo: str,
    ) -> None:
        heading = ResponseHeading(record.engine_id, int(time.time()), echo)
        self.completion_id = heading.response_id
        self._context = context
        self._generation = generation
        read = partial(context.text.token_text, special_is_text=body.skip_special_tokens is False)
        functions = {one.name: (one.namespace, one.tool.name) for one in body.functions if one.namespace}
        self._writer = ResponseWriter(
            heading, lambda: generation.usage, read, functions, body.wants_encrypted
        )
        tools = chat.callable_tools
        begun = "" if chat.calls_follow_grammar else begun_content(chat, context.thought_format)
        self._calls = CallReader(context.tool_format, tools, begun) if tools else None
        self._tells_thoughts = body.include_reasoning is not False
        self._wants_logprobs = body.wants_logprobs
        self._reason: FinishReasonName = "stop"

    def begin(self) -> bytes:
        """See `Answer.begin`."""
        return self._writer.begin()

    def write(self, piece: TextPiece) -> bytes:
        """See `Answer.write`."""
        final = piece.finish_reason is not None
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason
        turns = piece.turns or ((piece.thought, piece.text),)
        events, logprobs = b"", _of_answer(piece)
        for i, (thought, text) in enumerate(turns):
            events += self._step(thought, text, logprobs if not i else (), final and i == len(turns) - 1)
        return events

    def end(self) -> bytes:
        """See `Answer.end`."""
        return self._writer.end(self._reason)

    def failed(self, error: Exception) -> bytes:
        """See `Answer.failed`."""
        told = to_status(error)[1]["error"]
        if not isinstance(error, MedusaError):
            return self._writer.broken(told["code"], told["message"])
        code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
        return self._writer.failed(ResponseError(code=code, message=told["message"]))

    async def whole(self) -> bytes:
        """See `Answer.whole`."""
        pieces: list[TextPiece] = []
        await take_all(self._generation, pieces.append)
        if self._wants_logprobs:
            return await self._context.in_thread(self._render, pieces)
        return self._render(pieces)

    def _render(self, pieces: list[TextPiece]) -> bytes:
        self._reason = pieces[-1].finish_reason or "stop"
        turns: list[tuple[list[str], list[str], list[TokenLogprobs]]] = [([], [], [])]
        for piece in pieces:
            for thought, text in piece.turns or ((piece.thought, piece.text),):
                if thought and turns[-1][1]:
                    turns.append(([], [], []))
                if thought:
                    turns[-1][0].append(thought)
                if text:
                    turns[-1][1].append(text)
            turns[-1][2].extend(_of_answer(piece))
        for turn in turns:
            self._step("".join(turn[0]), "".join(turn[1]), turn[2], final=turn is turns[-1])
        self._writer.end(self._reason)
        return self._writer.response("incomplete" if self._reason == "length" else "completed").encode()

    def _step(self, thought: str, text: str, logprobs: Sequence[TokenLogprobs], final: bool) -> bytes:
        parts: list[str | ToolCallDelta] = [text] if text else []
        if self._calls is not None:
            parts = self._calls.in_order(0, text, final=final)
        return self._writer.step(thought if self._tells_thoughts else "", parts, logprobs)


def _of_answer(piece: TextPiece) -> list[TokenLogprobs]:
    """The log-probabilities of its text alone."""
    known = piece.logprobs or []
    if not piece.answers:
        return known
    return [one for one, is_text in zip(known, piece.answers, strict=True) if is_text]
