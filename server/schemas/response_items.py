"""The items of a response's input, and the chat messages that they come to."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import BeforeValidator, Discriminator, Field, Tag

from engine.errors import RequestError
from server.errors import UNSEEN, UnsupportedFieldError, field_path
from server.schemas.base import without_unsupported
from server.schemas.tools import Part

__all__ = ["InputItem", "as_messages", "encoded_thought", "full_name", "goes_on", "plain_items"]

_Status = Literal["in_progress", "completed", "incomplete"]
_THOUGHT = "medusa-thought."
"""Before what `encrypted_content` holds of ours."""


class _Strict(Part):
    """`UNSUPPORTED` as of a `Body`; `PARTS` is the field of text parts."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    PARTS: ClassVar[str] = ""


class TextInput(_Strict):
    """Text of a message, or of what a call returned; an answer's may come back as it was."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "annotations": ([],),
        "prompt_cache_breakpoint": (),
    }

    type: Literal["input_text", "output_text"]
    text: str
    logprobs: Any = Field(None, description="No effect: it comes from an answer.")
    parsed: Any = Field(None, description="No effect: OpenAI's client puts it there.")


def _text_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be text or a list of parts")
    return value


_Texts = Annotated[list[TextInput], Field(fail_fast=True)]
Texts = Annotated[_Texts, BeforeValidator(_text_parts, json_schema_input_type=str | _Texts)]


class MessageInput(_Strict):
    """One turn of the conversation."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {"phase": ()}
    PARTS = "content"

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Texts, Field(min_length=1)]
    id: str | None = Field(None, description="No effect.")
    status: _Status | None = Field(
        None,
        description="Of the last item, an assistant's message: one that is not completed is gone on with.",
    )


class CallInput(_Strict):
    """A call that an answer made."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "async": (False,),
        "caller": ({"type": "direct"},),
    }

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    namespace: str | None = None
    arguments: str
    id: str | None = Field(None, description="No effect.")
    status: _Status | None = Field(None, description="No effect.")
    parsed_arguments: Any = Field(None, description="No effect: OpenAI's client puts it there.")


class CallOutputInput(_Strict):
    """What a call returned."""

    UNSUPPORTED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "caller": ({"type": "direct"},),
    }
    PARTS = "output"

    type: Literal["function_call_output"]
    call_id: str
    output: Texts
    name: str | None = None
    namespace: str | None = Field(None, description="Goes with the name.")
    id: str | None = Field(None, description="No effect.")
    status: _Status | None = Field(None, description="No effect.")


class _ThoughtText(_Strict):
    type: Literal["reasoning_text"]
    text: str


class _SummaryText(_Strict):
    type: Literal["summary_text"]
    text: str


class ThoughtInput(_Strict):
    """What was thought before the answer that follows."""

    type: Literal["reasoning"]
    id: str | None = Field(None, description="No effect.")
    content: list[_ThoughtText] | None = None
    encrypted_content: str | None = Field(
        None, description="Where there is no content: what an answer of this server had here."
    )
    summary: list[_SummaryText] | None = Field(None, description="Where there is neither.")
    status: _Status | None = Field(None, description="No effect.")

    def text(self, path: str) -> str:
        """What was thought. Raises RequestError if it cannot be read; `path` is the item's."""
        if self.content:
            return "\n".join(part.text for part in self.content)
        if self.encrypted_content:
            return _decoded_thought(self.encrypted_content, f"{path}.encrypted_content")
        return "\n".join(part.text for part in self.summary or ())


_KINDS: dict[str, type[_Strict]] = {
    "message": MessageInput,
    "function_call": CallInput,
    "function_call_output": CallOutputInput,
    "reasoning": ThoughtInput,
}


def _tag(item: Any) -> str:
    return UNSEEN + str(item.get("type") if isinstance(item, dict) else getattr(item, "type", None))


InputItem = Annotated[
    Annotated[MessageInput, Tag(f"{UNSEEN}message")]
    | Annotated[CallInput, Tag(f"{UNSEEN}function_call")]
    | Annotated[CallOutputInput, Tag(f"{UNSEEN}function_call_output")]
    | Annotated[ThoughtInput, Tag(f"{UNSEEN}reasoning")],
    Discriminator(_tag),
]


def plain_items(items: Sequence[Any]) -> list[Any]:
    """Items with a type, without the fields that pass by being empty, each checked by its own path.

    Raises:
        RequestError: one is of no known form.
    """
    return [_plain(item, i) for i, item in enumerate(items)]


def _plain(item: Any, index: int) -> Any:
    if not isinstance(item, dict):
        param = f"input[{index}]"
        raise RequestError(f"{param}: must be an object", param=param)
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference" if "id" in item else None
    known = _KINDS.get(kind) if isinstance(kind, str) else None
    if known is None:
        _refuse_kind(kind, index)
    plain = without_unsupported(known, {**item, "type": kind}, known.UNSUPPORTED, "input", index)
    if isinstance(parts := plain.get(known.PARTS), list):
        plain[known.PARTS] = [_plain_part(part, index, known.PARTS, j) for j, part in enumerate(parts)]
    return plain


def _refuse_kind(kind: object, index: int) -> NoReturn:
    param = f"input[{index}].type"
    if kind == "item_reference":
        raise UnsupportedFieldError(
            f"{param}: this server keeps no items that could be referred to: send the items themselves, as "
            "clients do that are told `store` false",
            param=param,
        )
    if not isinstance(kind, str):
        raise RequestError(f"{param}: must be one of {', '.join(_KINDS)}", param=param)
    raise UnsupportedFieldError(
        f"{param}: items of type {kind!r} are not supported, only {', '.join(_KINDS)}", param=param
    )


def _plain_part(part: Any, *location: int | str) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if isinstance(kind, str) and kind not in ("input_text", "output_text"):
        param = field_path(["input", *location, "type"])
        raise UnsupportedFieldError(
            f"{param}: parts of type {kind!r} are not supported, only 'input_text' and 'output_text'",
            param=param,
        )
    return without_unsupported(TextInput, part, TextInput.UNSUPPORTED, "input", *location)


def goes_on(items: Sequence[Any]) -> bool:
    """Whether the answer goes on with the last item, as in vLLM: an assistant's message that was cut."""
    last = items[-1] if items else None
    cut = ("in_progress", "incomplete")
    return isinstance(last, MessageInput) and last.role == "assistant" and last.status in cut


def full_name(namespace: str | None, name: str) -> str:
    """By which the model knows a function in a namespace, as in vLLM."""
    return f"{namespace}__{name}" if namespace else name


def as_messages(items: Sequence[Any]) -> list[dict[str, Any]]:
    """The items as messages of a chat completion.

    One answer's thought, message and calls are one message there: a thought begins another, a message does if
    one without calls stands before it, and calls belong to what is before them.

    Raises:
        RequestError: a thought cannot be read.
    """
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None  # the last of the messages, where that is an assistant's
    for i, item in enumerate(items):
        match item:
            case MessageInput(role="assistant"):
                if answer is None or (answer["content"] and "tool_calls" not in answer):
                    messages.append(answer := _answer())
                answer["content"] += _chat_parts(item.content)
            case MessageInput():
                messages.append({"role": item.role, "content": _chat_parts(item.content)})
                answer = None
            case CallInput():
                if answer is None:
                    messages.append(answer := _answer())
                function = {"name": full_name(item.namespace, item.name), "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                answer.setdefault("tool_calls", []).append(call)
            case CallOutputInput():
                told = {"role": "tool", "content": _chat_parts(item.output), "tool_call_id": item.call_id}
                name = item.name and full_name(item.namespace, item.name)
                messages.append({**told, "name": name} if name else told)
                answer = None
            case ThoughtInput():
                if thought := item.text(f"input[{i}]"):
                    messages.append(answer := _answer())
                    answer["reasoning_content"] = thought
    return [{**one, "content": one["content"] or ""} for one in messages]


def _answer() -> dict[str, Any]:
    return {"role": "assistant", "content": []}


def _chat_parts(texts: Sequence[TextInput]) -> list[dict[str, str]]:
    return [{"type": "text", "text": part.text} for part in texts]


def encoded_thought(thought: str) -> str:
    """A thought as `encrypted_content`: clients that leave the content out send that back as it is.

    It is no secret, and the content beside it says the same; the server has no key and keeps nothing.
    """
    return _THOUGHT + base64.urlsafe_b64encode(thought.encode()).decode()


def _decoded_thought(text: str, param: str) -> str:
    try:
        if not text.startswith(_THOUGHT):
            raise ValueError
        return base64.b64decode(text.removeprefix(_THOUGHT), altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        message = f"{param}: this server did not write it and cannot read it; send `content`, or no such item"
        raise RequestError(message, param=param) from None
