"""A response as it comes: its output items, and the events that tell of them in OpenAI's order.

Most events are a piece of text; what is the same in all of an item's is written once, as in `server.chunks`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Literal

from engine.types import TokenLogprobs
from server.chunks import ReadToken, chat_logprobs, event, in_one_line, to_json
from server.response_objects import (
    CallItem,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    LogprobEntry,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseUsage,
    TopLogprobEntry,
)
from server.responses import FinishReasonName, ToolCallDelta, Usage
from server.schemas.response_items import encoded_thought

__all__ = ["ResponseHeading", "ResponseWriter", "response_usage"]


@dataclass(frozen=True, slots=True)
class ResponseHeading:
    """What a response has from its beginning.

    Args:
        engine_id: of the request, for the ids of the response and its items.
        created: seconds since the epoch.
        echo: the other fields that do not change, as JSON without the braces around it.
    """

    engine_id: str
    created: int
    echo: str

    @property
    def response_id(self) -> str:
        return f"resp_{self.engine_id}"


_ItemKind = Literal["reasoning", "message", "function_call"]
_PREFIX: dict[_ItemKind, str] = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_DELTA: dict[_ItemKind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}
"""An item's events of text begin with it."""


@dataclass(slots=True)
class _Item:
    """An output item as far as it has come.

    Args:
        kind: its type.
        id: its id.
        index: its place in the output.
        call_id, name, namespace: of a call.
        call: of a call, its number in the answer.
        texts: of the thought, the message or the arguments.
        logprobs: of the message.
        status: of the whole.
    """

    kind: _ItemKind
    id: str
    index: int
    call_id: str = ""
    name: str = ""
    namespace: str | None = None
    call: int = -1
    texts: list[str] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    status: ItemStatus = "in_progress"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self) -> OutputText | ReasoningText:
        """The content of a thought or a message."""
        if self.kind == "reasoning":
            return ReasoningText(type="reasoning_text", text=self.text)
        return OutputText(type="output_text", text=self.text, annotations=[], logprobs=self.logprobs)

    def model(self, *, parts: bool = True, encrypted: bool = False) -> OutputItem:
        """The item; without its content before that is begun."""
        if self.kind == "function_call":
            call = CallItem(
                id=self.id,
                type="function_call",
                status=self.status,
                call_id=self.call_id,
                name=self.name,
                arguments=self.text,
            )
            if self.namespace is not None:
                call.namespace = self.namespace
            return call
        content: Any = [self.part()] if parts else []
        if self.kind == "message":
            return MessageItem(
                id=self.id, type="message", role="assistant", status=self.status, content=content
            )
        thought = ReasoningItem(id=self.id, type="reasoning", status=self.status, summary=[], content=content)
        if encrypted:
            thought.encrypted_content = encoded_thought(self.text)
        return thought


class ResponseWriter:
    """The events of one response, and the response itself.

    Args:
        heading: what it has from its beginning.
        usage: of the response so far.
        read: reads token ids for logprobs.
        functions: namespace and name of those that the model knows by other names.
        encrypted: thoughts come in the form that is to be sent back, too.
    """

    def __init__(
        self,
        heading: ResponseHeading,
        usage: Callable[[], Usage],
        read: ReadToken,
        functions: Mapping[str, tuple[str, str]],
        encrypted: bool,
    ) -> None:
        self._functions = functions
        self._heading = heading
        self._usage = usage
        self._read = read
        self._encrypted = encrypted
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._before_text = ""  # in an event that tells more of what is open
        self._logprobs: list[LogprobEntry] = []  # of tokens whose text is still to come
        self._events: list[bytes] = []  # that were written, and nobody has yet
        self._number = 0

    def begin(self) -> bytes:
        """The events before any output."""
        response = self.response("in_progress")
        self._event("response.created", f'"response":{response}')
        self._event("response.in_progress", f'"response":{response}')
        return self._written()

    def step(
        self, thought: str, parts: Iterable[str | ToolCallDelta], logprobs: Sequence[TokenLogprobs] = ()
    ) -> bytes:
        """The events of what one step gave; may be none.

        Args:
            thought: more of the thought before the answer.
            parts: text of the answer and calls in their order; no text is empty.
            logprobs: of the tokens of the answer's text.
        """
        self._add("reasoning", thought)
        if logprobs:
            self._logprobs += _entries(logprobs, self._read)
        for part in parts:
            if isinstance(part, str):
                self._add("message", part)
            else:
                self._call(part)
        return self._written()

    def end(self, reason: FinishReasonName) -> bytes:
        """The last events. An answer that ended by itself has a message or a call."""
        cut = reason == "length"
        if not cut and all(item.kind == "reasoning" for item in self._items):
            self._start("message")
        self._close("incomplete" if cut else "completed")
        status: Literal["incomplete", "completed"] = "incomplete" if cut else "completed"
        self._event(f"response.{status}", f'"response":{self.response(status)}')
        return self._written()

    def failed(self, error: ResponseError) -> bytes:
        """The last event where an error ends the response."""
        if self._open is not None:
            self._open.status = "incomplete"
        self._event("response.failed", f'"response":{self.response("failed", error)}')
        return self._written()

    def broken(self, code: str, message: str) -> bytes:
        """The last event where the server is at fault, so that there may be no response to tell."""
        self._event("error", f'"code":"{code}","message":{json.dumps(message)},"param":null')
        return self._written()

    def response(
        self,
        status: Literal["in_progress", "completed", "incomplete", "failed"],
        error: ResponseError | None = None,
    ) -> str:
        """The response as far as it has come, in JSON."""
        output = ",".join(to_json(item.model(encrypted=self._encrypted)) for item in self._items)
        details = to_json(IncompleteDetails(reason="max_output_tokens")) if status == "incomplete" else "null"
        completed = int(time.time()) if status == "completed" else "null"
        usage = "null" if status == "in_progress" else to_json(response_usage(self._usage()))
        return (
            f'{{"id":{json.dumps(self._heading.response_id)},"object":"response",'
            f'"created_at":{self._heading.created},"completed_at":{completed},"status":"{status}",'
            f'"error":{"null" if error is None else to_json(error)},"incomplete_details":{details},'
            f'"output":[{output}],"usage":{usage},{self._heading.echo}}}'
        )

    def _is_open(self, kind: _ItemKind) -> bool:
        return self._open is not None and self._open.kind == kind

    def _add(self, kind: Literal["reasoning", "message"], text: str) -> None:
        """More of a thought or of a message, which may have others of their kind before them."""
        if not self._is_open(kind):
            if any(item.kind == kind for item in self._items):
                text = text.removeprefix("\n")  # between the two, where they are one text
            if text:
                self._start(kind)
        if text:
            self._tell(text, self._open)

    def _call(self, delta: ToolCallDelta) -> None:
        item = self._open
        if item is None or item.call != delta.index:
            item = self._start("function_call", delta)
        if delta.function.arguments:
            self._tell(delta.function.arguments, item)

    def _start(self, kind: _ItemKind, call: ToolCallDelta | None = None) -> _Item:
        """Open another item behind the one that is open now, which ends."""
        self._close("completed")
        index = len(self._items)
        item = _Item(kind, f"{_PREFIX[kind]}_{self._heading.engine_id}_{index}", index)
        if call is not None:
            name = call.function.name or ""
            item.call, item.call_id = call.index, call.id or ""
            item.namespace, item.name = self._functions.get(name, (None, name))
        self._items.append(item)
        self._open = item
        added = to_json(item.model(parts=False))
        self._event("response.output_item.added", f'"output_index":{index},"item":{added}')
        if kind != "function_call":
            self._event("response.content_part.added", f'{_place(item)},"part":{to_json(item.part())}')
        name = f"{_DELTA[kind]}.delta"
        self._before_text = f'event: {name}\ndata: {{"type":"{name}",{_place(item)},"delta":'
        return item

    def _tell(self, text: str, item: _Item | None) -> None:
        """An event of more text of what is open."""
        assert item is not None
        item.texts.append(text)
        behind = ""
        if item.kind == "message":
            behind = f',"logprobs":{_as_list(self._logprobs)}'
            item.logprobs += self._logprobs
            self._logprobs = []
        told = in_one_line(encode_basestring(text) + behind)
        self._events.append(f'{self._before_text}{told},"sequence_number":{self._number}}}\n\n'.encode())
        self._number += 1

    def _close(self, status: ItemStatus) -> None:
        """The events that end what is open, if anything is."""
        item = self._open
        if item is None:
            return
        if item.kind == "message" and self._logprobs:  # of tokens that are no text
            self._tell("", item)
        self._open, item.status = None, status
        whole, name = json.dumps(item.text, ensure_ascii=False), f"{_DELTA[item.kind]}.done"
        if item.kind == "function_call":
            self._event(name, f'{_place(item)},"arguments":{whole}')
        else:
            logprobs = f',"logprobs":{_as_list(item.logprobs)}' if item.kind == "message" else ""
            self._event(name, f'{_place(item)},"text":{whole}{logprobs}')
            self._event("response.content_part.done", f'{_place(item)},"part":{to_json(item.part())}')
        done = to_json(item.model(encrypted=self._encrypted))
        self._event("response.output_item.done", f'"output_index":{item.index},"item":{done}')

    def _event(self, name: str, fields: str) -> None:
        self._events.append(event(f'{{"type":"{name}",{fields},"sequence_number":{self._number}}}', name))
        self._number += 1

    def _written(self) -> bytes:
        written = b"".join(self._events)
        self._events.clear()
        return written


def _place(item: _Item) -> str:
    """Where an event belongs."""
    place = f'"item_id":{json.dumps(item.id)},"output_index":{item.index}'
    return place if item.kind == "function_call" else f'{place},"content_index":0'


def _entries(logprobs: Sequence[TokenLogprobs], read: ReadToken) -> list[LogprobEntry]:
    return [
        LogprobEntry(
            token=one.token,
            logprob=one.logprob,
            bytes=one.bytes or [],
            top_logprobs=[
                TopLogprobEntry(token=top.token, logprob=top.logprob, bytes=top.bytes or [])
                for top in one.top_logprobs
            ],
        )
        for one in chat_logprobs(logprobs, read).content
    ]


def _as_list(entries: Iterable[LogprobEntry]) -> str:
    return f"[{','.join(map(to_json, entries))}]"


def response_usage(usage: Usage) -> ResponseUsage:
    """The usage of a chat completion by this API's names."""
    details = usage.completion_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens, cache_write_tokens=0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=0 if details is None else details.reasoning_tokens
        ),
        total_tokens=usage.total_tokens,
    )
