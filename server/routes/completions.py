"""POST /v1/completions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fastapi import APIRouter, Request as HttpRequest
from starlette.responses import Response

from engine.errors import RequestError
from engine.types import Request, TokenLogprobs
from server.batch import Batch
from server.chunks import CompletionWriter, Heading, completion_logprobs, prompt_logprobs, to_json
from server.context import Context, RequestRecord, ServerContext, record_of
from server.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReasonName,
    StopReason,
    Usage,
)
from server.routes.body_route import BodyRoute
from server.routes.generate import (
    ERRORS,
    STREAMED,
    Chunks,
    engine_request,
    grammar_of,
    respond,
    sampling_of,
    text_options,
)
from server.schemas.completions import CompletionRequest, PromptInput
from server.streaming import TextPiece, take_all

__all__ = ["router"]

router = APIRouter(route_class=BodyRoute)

Entry = tuple[int, int, TokenLogprobs | None]
"""A token's id, the character of the choice's text at which it begins, and what is known of it."""


@router.post("/v1/completions", response_model=Completion, responses={**ERRORS, **STREAMED})
async def completions(body: CompletionRequest, http: HttpRequest, context: Context) -> Response:
    """Continue one or several prompts, as one answer or as server-sent events."""
    record = record_of(http)
    record.fields["model"] = model = context.name_of(body.model)
    context.check_model(model)
    sampling = await sampling_of(body, context)
    capacity = context.settings.max_num_seqs + context.settings.max_waiting
    if len(body.prompts) * sampling.n > capacity:
        raise RequestError(
            f"prompt: {len(body.prompts)} prompts of n {sampling.n} are more than the {capacity} choices "
            "that this server holds",
            param="prompt",
        )
    grammar = await grammar_of(body.constraint_of, context, record)
    requests: list[Request] = []
    echoes: list[_Echo] = []
    for i, prompt in enumerate(body.prompts):
        try:
            tokens = await _encode(body, context, record, prompt)
            name = record.engine_id if i == 0 else f"{record.engine_id}-{i}"
            request = engine_request(body, context, name, tokens, sampling, grammar)
            context.engine.info.check(request)
        except RequestError as error:
            if len(body.prompts) > 1 and error.param == "prompt":
                error.args = (f"prompt[{i}]: {error}",)
            raise
        requests.append(request)
        if body.echo:
            echoes.append(await context.in_thread(_echo, body, context, prompt, request))
    batch = Batch(context, record, requests, text_options(body))
    answer = partial(_Answer, body, context, record, batch, echoes)
    return await respond(http, context, batch, answer, bool(body.stream))


async def _encode(
    body: CompletionRequest, context: ServerContext, record: RequestRecord, prompt: PromptInput
) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    special = body.add_special_tokens is not False
    return await context.tokens_of(record, lambda: prompt, add_special_tokens=special, param="prompt")


@dataclass(slots=True)
class _Echo:
    """A prompt as the answer repeats it: its text, and at which of its characters each token begins."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()


def _echo(body: CompletionRequest, context: ServerContext, prompt: PromptInput, request: Request) -> _Echo:
    tokens = request.prompt_token_ids
    detokenizer = context.text.detokenizer([], skip_special_tokens=False, aligned=True)
    delta = detokenizer.push(tokens, final=True)
    # The client's own text, where all of it is there: not with the BOS that stands before it.
    whole = isinstance(prompt, str) and body.truncate_prompt_tokens is None
    text = prompt if whole and isinstance(prompt, str) else delta.text
    shift = len(delta.text) - len(text)
    starts = tuple(min(max(0, start - shift), len(text)) for start in delta.starts)
    return _Echo(text, tokens, starts)


@dataclass(slots=True)
class _Choice:
    """One choice of an answer that is not streamed, as its pieces come."""

    texts: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    finish_reason: FinishReasonName = "stop"
    stop_reason: StopReason = None


class _Answer(Chunks):
    """Writes a batch in OpenAI's form."""

    def __init__(
        self,
        body: CompletionRequest,
        context: ServerContext,
        record: RequestRecord,
        batch: Batch,
        echoes: list[_Echo],
    ) -> None:
        self.completion_id = f"cmpl-{record.engine_id}"
        self._body = body
        self._context = context
        self._batch = batch
        self._echoes = echoes
        self._n = body.n or 1
        self._begun: set[int] = set()
        self._lengths: Counter[int] = Counter()  # characters of each choice's text, echo left out
        special_is_text = body.skip_special_tokens is False
        self._read = partial(context.text.token_text, special_is_text=special_is_text)
        model = context.name_of(body.model)
        self._heading = Heading(self.completion_id, int(time.time()), model, context.fingerprint)
        usage = (lambda: self._usage) if body.include_usage else None
        self._writer = CompletionWriter(self._heading, usage, body.continuous_usage)

    def write(self, piece: TextPiece) -> bytes | Awaitable[bytes]:
        """See `Answer.write`."""
        echoes = bool(self._echoes) and piece.index not in self._begun
        text, entries = self._take(piece)
        if self._body.logprobs is not None and echoes:  # of a whole prompt
            return self._context.in_thread(self._events, piece, text, entries)
        return self._events(piece, text, entries)

    def _events(self, piece: TextPiece, text: str, entries: list[Entry]) -> bytes:
        logprobs = None if self._body.logprobs is None else self._logprobs(entries)
        reason, by = piece.finish_reason, piece.stop_reason
        if self._body.echo_only and reason is not None:  # whatever the one token that the engine drew was
            reason, by = "length", None
        return self._writer.step(piece.index, text, logprobs, reason, by)

    def end(self) -> bytes:
        """See `Answer.end`."""
        return self._writer.end()

    async def whole(self) -> bytes:
        """See `Answer.whole`."""
        choices: dict[int, _Choice] = {}

        def take(piece: TextPiece) -> None:
            choice = choices.setdefault(piece.index, _Choice())
            text, entries = self._take(piece)
            choice.texts.append(text)
            choice.entries += entries
            if piece.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason

        await take_all(self._batch, take)
        if self._body.logprobs is not None or self._body.prompt_logprobs is not None:
            return await self._context.in_thread(self._render, choices)
        return self._render(choices)

    @property
    def _usage(self) -> Usage:
        usage = self._batch.usage
        if self._body.echo_only:  # the one token that the engine drew is no part of the answer
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _take(self, piece: TextPiece) -> tuple[str, list[Entry]]:
        """A piece's text and tokens, after the prompt's where it is the first of its choice."""
        entries: list[Entry] = []
        text, base = piece.text, 0
        if self._body.echo_only:
            text = ""
        if self._echoes:
            echo = self._echoes[piece.index // self._n]
            base = len(echo.text)
            if piece.index not in self._begun:
                self._begun.add(piece.index)
                text = echo.text + text
                known = self._batch.generations[piece.index // self._n].prompt_logprobs
                if self._body.logprobs is not None and known is not None:
                    entries += zip(echo.token_ids, echo.starts, known, strict=True)
        if not self._body.echo_only:
            for start, one in zip(piece.starts, piece.logprobs or (), strict=True):
                entries.append((one.token_id, base + start, one))
            self._lengths[piece.index] += len(piece.text)
            if (ending := piece.ending) is not None:
                entries.append((ending.token_id, base + self._lengths[piece.index], ending))
        return text, entries

    def _logprobs(self, entries: list[Entry]) -> CompletionLogprobs:
        return completion_logprobs(entries, self._body.logprobs or 0, self._read)

    def _render(self, choices: dict[int, _Choice]) -> bytes:
        completion = Completion(
            **self._heading.fields("text_completion"),
            choices=[self._choice(index, choices[index]) for index in sorted(choices)],
            usage=self._usage,
        )
        return to_json(completion).encode()

    def _choice(self, index: int, found: _Choice) -> CompletionChoice:
        choice = CompletionChoice(
            index=index,
            text="".join(found.texts),
            logprobs=None if self._body.logprobs is None else self._logprobs(found.entries),
            finish_reason="length" if self._body.echo_only else found.finish_reason,
            stop_reason=None if self._body.echo_only else found.stop_reason,
        )
        count, known = self._body.prompt_logprobs, self._batch.generations[index // self._n].prompt_logprobs
        if count is not None and known is not None:
            choice.prompt_logprobs = prompt_logprobs(known, count, self._context.text.token_text)
        return choice
