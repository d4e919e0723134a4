"""Calls of tools in harmony: messages to functions among an answer's others, and grammars of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from uuid import uuid4

from engine.grammar import GrammarSpec
from engine.harmony import HarmonyReader, Marks, Opened
from engine.harmony_format import HarmonyFormat
from server.calls import Functions
from server.json_calls import JsonCall
from server.tool_calls import CallDelta, Parsed
from server.tool_grammars import Function, arguments_schema

if TYPE_CHECKING:
    from engine.text import TextProcessor

__all__ = ["HarmonyCalls", "HarmonyParser"]


class HarmonyParser:
    """Tells content from calls in one answer: what `ToolCallParser` is to models that write no harmony.

    A message to a function that may be called is a call if its text is an object, or empty for a function
    without arguments. Text of any other is content. Arguments are passed on as they come, and end where their
    object does. What is read is the answer that a `HarmonyReader` has left, with calls in it.

    Args:
        functions: that may be called.
    """

    open = False
    """No message that an answer goes on with has begun a call: templates refuse that."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._reader = HarmonyReader(f"assistant{Marks.MESSAGE}", calls=True)
        self._name = ""  # of the function that the message calls, if it does
        self._call: JsonCall | None = None
        self._fresh = False  # nothing of the message is told yet
        self._told = False  # some content is
        self.calls = 0
        """Calls so far."""

    def begin(self, text: str) -> None:
        """See `ToolCallParser.begin`."""
        self._told = bool(text)

    def feed(self, text: str, final: bool = False) -> Parsed:
        """See `ToolCallParser.feed`."""
        order: list[str | CallDelta] = []
        for part in self._reader.read(text, final):
            if isinstance(part, Opened):
                self._fresh = True
                self._name = part.to if part.kind == "call" and part.to in self._functions else ""
            elif part is None:
                self._end(order)
            elif self._name:
                self._argue(part, order)
            else:
                self._say(part, order)
        if final:
            self._end(order)
        calls = [part for part in order if isinstance(part, CallDelta)]
        return Parsed("".join(part for part in order if isinstance(part, str)), calls, _joined(order))

    def _argue(self, text: str, order: list[str | CallDelta]) -> None:
        """More of a message to a function."""
        begins = self._call is None
        if begins:
            text = text.lstrip()
            if not text:
                return
            if not text.startswith("{"):
                self._name = ""
                self._say(text, order)
                return
            self._call = JsonCall(self._functions, self._name)
        assert self._call is not None
        if self._call.ended:
            return
        self._call.feed(text)
        if begins:
            self.calls += 1
        order.append(CallDelta(self.calls - 1, self._name if begins else None, self._call.arguments))

    def _end(self, order: list[str | CallDelta]) -> None:
        """A message is over."""
        if self._name and self._call is None:
            self.calls += 1
            order.append(CallDelta(self.calls - 1, self._name, "{}"))
        self._name, self._call = "", None

    def _say(self, text: str, order: list[str | CallDelta]) -> None:
        """Content; that of several messages has a newline between."""
        order.append(f"\n{text}" if self._fresh and self._told else text)
        self._fresh, self._told = False, True


def _joined(order: Sequence[str | CallDelta]) -> list[str | CallDelta]:
    """With neighbouring texts as one."""
    joined: list[str | CallDelta] = []
    for part in order:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON as templates write it, or as OpenAI's examples have it."""


@dataclass(frozen=True, slots=True)
class HarmonyCalls:
    """How such a model writes calls: what `ToolFormat` is to others.

    Args:
        marks: of its messages.
    """

    marks: HarmonyFormat

    name: ClassVar[Literal["harmony"]] = "harmony"
    like_json: ClassVar[bool] = False

    @classmethod
    def of(cls, text: TextProcessor) -> Self:
        """With the tokens of this vocabulary."""
        return cls(HarmonyFormat.of(text))

    @property
    def shown(self) -> frozenset[int]:
        """See `ToolFormat.shown`."""
        return self.marks.shown

    def new_id(self) -> str:
        """Of a call, as OpenAI's look."""
        return f"call_{uuid4().hex[:24]}"

    def parser(self, functions: Functions) -> HarmonyParser:
        """For one answer that may call these."""
        return HarmonyParser(functions)

    def grammar(
        self,
        functions: Sequence[Function],
        *,
        text: bool,
        schema: Mapping[str, Any] | None,
        several: bool,
        unlike: str = "",  # noqa: ARG002 - a text's beginning opens nothing here
    ) -> GrammarSpec:
        """What the messages of an answer may be: see `ToolFormat.grammar`.

        Raises:
            RecursionError: a schema is nested too deeply to be written.
            RequestError: the vocabulary has no tokens for the marks.
        """
        marks = self.marks
        channel, message = (marks.token(mark) for mark in (Marks.CHANNEL, Marks.MESSAGE))
        constrain = marks.token(Marks.CONSTRAIN)
        calls = "call more" if several else "call"
        start = calls
        if schema is not None:
            start = f"{calls} | {marks.header('final')} body"
        elif text:
            start = f"preamble* ({calls} | {marks.header('final')} said)"
        rules = [
            "%llguidance {}",
            f"start: {start}",
            f"preamble: {marks.header('commentary')} said {marks.following}",
            f"more: ({marks.following} call)*",
            "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
            f'typed: (" "? {constrain} "json" | " json")? {message}',
            *marks.rules(),
        ]
        for i, function in enumerate(functions):
            to = json.dumps(f" to=functions.{function.name}")
            rules.append(
                f'call_{i}: ({channel} "commentary" {to} | {to} {channel} "commentary") typed arguments_{i}'
            )
            rules.append(f"arguments_{i}: %json {arguments_schema(function, _WRITTEN)}")
        if schema is not None:
            rules.append(f"body: %json {json.dumps(schema)}")
        return GrammarSpec("tools", "\n".join(rules))
