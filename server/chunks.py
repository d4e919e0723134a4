"""Answers as bytes: a stream's events, and logprobs in the forms of OpenAI and vLLM.

A stream is one small event per step, and at many streams writing them costs as much as a share of the
model's own step. So what all chunks of a stream have in common is rendered once, from the model that
describes it, and only text and logprobs are put in. The tests hold the result against the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_json as dump

from engine.types import TokenLogprobs
from server.responses import ChatChunk, ChatLogprobs, FinishReasonName, PromptLogprob, Usage

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["DONE", "ChunkWriter", "chat_logprobs", "event", "prompt_logprobs", "to_json"]

LEAST_LOGPROB = -9999.0
"""Stands for anything less likely, as with OpenAI and vLLM: JSON has no infinity."""

_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def event(data: str) -> bytes:
    """A server-sent event of data without line breaks.

    Those that only Unicode counts as such are escaped, so the data must be JSON: clients that split a
    stream by `str.splitlines` (httpx does) would cut an event at them.
    """
    if not data.isascii():
        data = data.translate(_LINE_BREAKS)
    return b"data: %b\n\n" % data.encode()


DONE = event("[DONE]")
"""A stream's last event."""


def to_json(model: BaseModel) -> str:
    """JSON of the fields that were set."""
    return model.model_dump_json(exclude_unset=True)


class ChunkWriter:
    """The events of one stream, in OpenAI's form.

    Args:
        completion_id: the `id` of every chunk.
        created: seconds since the epoch.
        model: the name the client used.
        include_usage: whether a last chunk has the usage; the others then say that theirs is null.
        text: reads token ids for logprobs.
    """

    def __init__(
        self, completion_id: str, created: int, model: str, include_usage: bool, text: TextProcessor
    ) -> None:
        self._empty = ChatChunk(
            id=completion_id, object="chat.completion.chunk", created=created, model=model, choices=[]
        )
        if include_usage:
            self._empty.usage = None
        self._head, _, self._tail = to_json(self._empty).rpartition("[]")
        self._text = text
        self._started: set[int] = set()

    def step(
        self,
        index: int,
        content: str,
        logprobs: Sequence[TokenLogprobs] | None,
        finish_reason: FinishReasonName | None,
    ) -> bytes:
        """The events of what one step gave a choice; may be none.

        The first event of a choice names its role, the last, with an empty delta, its finish reason.
        """
        events = b""
        if index not in self._started:
            self._started.add(index)
            events = self._chunk(index, '{"role":"assistant","content":""}')
        if content or logprobs:
            entries = "null" if logprobs is None else self._logprobs(logprobs)
            events += self._chunk(index, f'{{"content":{encode_basestring(content)}}}', entries)
        if finish_reason is not None:
            events += self._chunk(index, "{}", finish_reason=f'"{finish_reason}"')
        return events

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that has the whole stream's usage."""
        chunk = self._empty.model_copy()
        chunk.usage = usage
        return event(to_json(chunk))

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish_reason: str = "null") -> bytes:
        return event(
            f'{self._head}[{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish_reason}}}]{self._tail}'
        )

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> str:
        return dump({"content": _entries(logprobs, self._text), "refusal": None}).decode()


def chat_logprobs(logprobs: Iterable[TokenLogprobs], text: TextProcessor) -> ChatLogprobs:
    """Logprobs of output tokens in OpenAI's form."""
    return ChatLogprobs.model_validate({"content": _entries(logprobs, text), "refusal": None})


def prompt_logprobs(
    logprobs: Iterable[TokenLogprobs | None], text: TextProcessor
) -> list[dict[int, PromptLogprob] | None]:
    """Logprobs of prompt tokens in vLLM's form: for each the prompt's own token, then the best ones."""
    return [None if one is None else _by_token(one, text) for one in logprobs]


def _by_token(one: TokenLogprobs, text: TextProcessor) -> dict[int, PromptLogprob]:
    ranked = [(one.token_id, one.logprob, one.rank)]
    ranked += [(token, logprob, rank) for rank, (token, logprob) in enumerate(one.top, 1)]
    found: dict[int, PromptLogprob] = {}
    for token, logprob, rank in ranked:
        if token not in found:
            found[token] = PromptLogprob(
                logprob=max(logprob, LEAST_LOGPROB), rank=rank, decoded_token=text.token_text(token).text
            )
    return found


def _entries(logprobs: Iterable[TokenLogprobs], text: TextProcessor) -> list[dict[str, Any]]:
    entry = _entry_of(text)
    return [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(token, lp) for token, lp in one.top]}
        for one in logprobs
    ]


def _entry_of(text: TextProcessor) -> Callable[[int, float], dict[str, Any]]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = text.token_text(token_id)
        return {
            "token": token.text,
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": None if token.data is None else list(token.data),
        }

    return entry
