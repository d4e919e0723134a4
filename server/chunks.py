"""Answers as bytes: a stream's events, and logprobs in the forms of OpenAI and vLLM.

A stream is one small event per step, and at many streams writing them costs as much as a share of the
model's own step. So what all chunks of a stream have in common is rendered once, from the model that
describes it, and only text and logprobs are put in. The tests hold the result against the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json as dump

from engine.text import TokenText
from engine.types import TokenLogprobs
from server.responses import (
    ChatChunk,
    ChatFinishReasonName,
    ChatLogprobs,
    CompletionChunk,
    CompletionLogprobs,
    FinishReasonName,
    PromptLogprob,
    StopReason,
    ToolCallDelta,
    Usage,
)

__all__ = [
    "DONE",
    "ChatWriter",
    "CompletionWriter",
    "Heading",
    "ReadToken",
    "chat_logprobs",
    "completion_logprobs",
    "event",
    "in_one_line",
    "prompt_logprobs",
    "to_json",
]

LEAST_LOGPROB = -9999.0
"""Stands for anything less likely, as with OpenAI and vLLM: JSON has no infinity."""

_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def event(data: str, name: str = "") -> bytes:
    """A server-sent event of data without line breaks, with a name where it is given one.

    Those that only Unicode counts as such are escaped, so the data must be JSON: clients that split a
    stream by `str.splitlines` (httpx does) would cut an event at them.
    """
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {in_one_line(data)}\n\n".encode()


def in_one_line(json: str) -> str:
    """JSON without what some clients take for the end of a line."""
    return json if json.isascii() else json.translate(_LINE_BREAKS)


DONE = event("[DONE]")
"""A stream's last event."""


def to_json(model: BaseModel) -> str:
    """JSON of the fields that were set."""
    return model.model_dump_json(exclude_unset=True)


ReadToken = Callable[[int], TokenText]
"""A token by itself, as the request wants to see it: `TextProcessor.token_text`."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What all events of a stream, or the whole answer, begin with.

    Args:
        completion_id: the `id`.
        created: seconds since the epoch.
        model: the name the client used.
        fingerprint: `system_fingerprint`.
    """

    completion_id: str
    created: int
    model: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        """As fields of a response model whose `object` is `kind`."""
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class _EventWriter:
    """The events of one stream.

    Args:
        empty: an event without choices.
        usage: of the stream so far, where it ends with an event that tells it; the others then say that
            theirs is null, or with `continuous` what it is.
    """

    def __init__(
        self, empty: ChatChunk | CompletionChunk, usage: Callable[[], Usage] | None, continuous: bool
    ) -> None:
        self._empty = empty
        self._usage = usage
        self._continuous = continuous
        if usage is not None and not continuous:
            empty.usage = None
        self._head, _, self._tail = to_json(empty).rpartition("[]")
        self._around_text: dict[int, tuple[str, ...]] = {}

    def end(self) -> bytes:
        """The last events: the one without choices that has the whole stream's usage, if asked for."""
        if self._usage is None:
            return DONE
        chunk = self._empty.model_copy()
        chunk.usage = self._usage()
        return event(to_json(chunk)) + DONE

    def _around(self, *parts: str) -> tuple[str, ...]:
        """What stands around the text of a choice in an event that tells it, once or twice, and nothing else.

        Most events are such. Empty where all tell more.
        """
        if self._continuous:
            return ()
        first, *others = parts
        whole = [f"data: {self._head}[{first}", *others]
        whole[-1] += f"]{self._tail}\n\n"
        return tuple(map(in_one_line, whole))

    def _event_of(self, text: str, around: tuple[str, ...]) -> bytes:
        """An event of text alone; none where there is no text."""
        return in_one_line(encode_basestring(text)).join(around).encode() if text else b""

    def _event(self, choice: str) -> bytes:
        tail = self._tail
        if self._continuous and self._usage is not None:
            tail = f'{tail[:-1]},"usage":{to_json(self._usage())}}}'
        return event(f"{self._head}[{choice}]{tail}")


class ChatWriter(_EventWriter):
    """The events of a streamed chat completion; for `usage` and `continuous` see `_EventWriter`.

    Args:
        heading: what all events share.
        read: reads token ids for logprobs.
    """

    def __init__(
        self,
        heading: Heading,
        read: ReadToken,
        usage: Callable[[], Usage] | None = None,
        continuous: bool = False,
    ) -> None:
        empty = ChatChunk(**heading.fields("chat.completion.chunk"), choices=[])
        super().__init__(empty, usage, continuous)
        self._read = read
        self._started: set[int] = set()
        self._around_thought: dict[int, tuple[str, ...]] = {}

    def step(
        self,
        index: int,
        content: str,
        logprobs: Sequence[TokenLogprobs] | None,
        finish_reason: ChatFinishReasonName | None,
        stop_reason: StopReason = None,
        tool_calls: Sequence[ToolCallDelta] = (),
        thought: str = "",
    ) -> bytes:
        """The events of what one step gave a choice; may be none.

        The first event of a choice names its role, the last, with an empty delta, why it ended.
        """
        plain = finish_reason is None and logprobs is None and not tool_calls and not (content and thought)
        known = self._around_thought if thought else self._around_text
        if plain and (around := known.get(index)):
            return self._event_of(content or thought, around)
        events = b""
        if index not in self._started:
            self._started.add(index)
            head, tail = f'{{"index":{index},"delta":', '},"logprobs":null,"finish_reason":null}'
            self._around_text[index] = self._around(f'{head}{{"content":', tail)
            self._around_thought[index] = self._around(f'{head}{{"reasoning_content":', ',"reasoning":', tail)
            events = self._chunk(index, '{"role":"assistant","content":""}')
        if content or thought or logprobs:
            entries = "null" if logprobs is None else self._logprobs(logprobs)
            parts = [f'"content":{encode_basestring(content)}'] if content or not thought else []
            if thought:
                told = encode_basestring(thought)
                parts.insert(0, f'"reasoning_content":{told},"reasoning":{told}')
            events += self._chunk(index, f"{{{','.join(parts)}}}", entries)
        if tool_calls:
            calls = ",".join(map(to_json, tool_calls))
            events += self._chunk(index, f'{{"tool_calls":[{calls}]}}')
        if finish_reason is not None:
            events += self._chunk(index, "{}", end=_end(finish_reason, stop_reason))
        return events

    def _chunk(self, index: int, delta: str, logprobs: str = "null", end: str = "null") -> bytes:
        return self._event(f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{end}}}')

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> str:
        return dump({"content": _entries(logprobs, self._read), "refusal": None}).decode()


class CompletionWriter(_EventWriter):
    """The events of a streamed text completion; for `usage` and `continuous` see `_EventWriter`."""

    def __init__(
        self, heading: Heading, usage: Callable[[], Usage] | None = None, continuous: bool = False
    ) -> None:
        super().__init__(CompletionChunk(**heading.fields("text_completion"), choices=[]), usage, continuous)

    def step(
        self,
        index: int,
        text: str,
        logprobs: CompletionLogprobs | None,
        finish_reason: FinishReasonName | None,
        stop_reason: StopReason = None,
    ) -> bytes:
        """The event of what one step gave a choice; none where it gave nothing to tell."""
        if finish_reason is None and logprobs is None:
            if around := self._around_text.get(index):
                return self._event_of(text, around)
            self._around_text[index] = self._around(
                f'{{"index":{index},"text":', ',"logprobs":null,"finish_reason":null}'
            )
        if not text and not (logprobs and logprobs.tokens) and finish_reason is None:
            return b""
        entries = "null" if logprobs is None else to_json(logprobs)
        return self._event(
            f'{{"index":{index},"text":{encode_basestring(text)},"logprobs":{entries},'
            f'"finish_reason":{_end(finish_reason, stop_reason)}}}'
        )


def _end(finish_reason: ChatFinishReasonName | None, stop_reason: StopReason) -> str:
    """A choice's finish reason and, where it has one, what follows: its stop reason."""
    if finish_reason is None:
        return "null"
    told = encode_basestring(stop_reason) if isinstance(stop_reason, str) else dump(stop_reason).decode()
    return f'"{finish_reason}","stop_reason":{told}'


def chat_logprobs(logprobs: Iterable[TokenLogprobs], read: ReadToken) -> ChatLogprobs:
    """Logprobs of output tokens in the form of OpenAI's chat completions."""
    return ChatLogprobs.model_validate({"content": _entries(logprobs, read), "refusal": None})


def completion_logprobs(
    tokens: Iterable[tuple[int, int, TokenLogprobs | None]], count: int, read: ReadToken
) -> CompletionLogprobs:
    """Logprobs in the form of OpenAI's text completions.

    Args:
        tokens: each token's id, the character of the text at which it begins, and what is known of it.
        count: the best ones to tell, after the token itself.
        read: reads token ids.
    """
    told = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, start, one in tokens:
        told.tokens.append(_name(read(token_id)))
        told.text_offset.append(start)
        if one is None:
            told.token_logprobs.append(None)
            told.top_logprobs.append(None)
            continue
        told.token_logprobs.append(max(one.logprob, LEAST_LOGPROB))
        best: dict[str, float] = {}
        for other, logprob in ((token_id, one.logprob), *one.top[:count]):
            best.setdefault(_name(read(other)), max(logprob, LEAST_LOGPROB))
        told.top_logprobs.append(best)
    return told


def _name(token: TokenText) -> str:
    """The token's text, or its bytes, as OpenAI spells them, where they are no text by themselves."""
    if token.data is None:
        return token.text
    try:
        return token.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def prompt_logprobs(
    logprobs: Iterable[TokenLogprobs | None], count: int, read: ReadToken
) -> list[dict[int, PromptLogprob] | None]:
    """Logprobs of prompt tokens in vLLM's form: for each the prompt's own token, then the `count` best."""
    return [None if one is None else _by_token(one, count, read) for one in logprobs]


def _by_token(one: TokenLogprobs, count: int, read: ReadToken) -> dict[int, PromptLogprob]:
    ranked = [(one.token_id, one.logprob, one.rank)]
    ranked += [(token, logprob, rank) for rank, (token, logprob) in enumerate(one.top[:count], 1)]
    found: dict[int, PromptLogprob] = {}
    for token, logprob, rank in ranked:
        if token not in found:
            found[token] = PromptLogprob(
                logprob=max(logprob, LEAST_LOGPROB), rank=rank, decoded_token=read(token).text
            )
    return found


def _entries(logprobs: Iterable[TokenLogprobs], read: ReadToken) -> list[dict[str, Any]]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = read(token_id)
        return {
            "token": token.text,
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": None if token.data is None else list(token.data),
        }

    return [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(token, lp) for token, lp in one.top]}
        for one in logprobs
    ]
