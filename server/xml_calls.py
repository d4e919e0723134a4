"""Calls of which each parameter stands between tags: Qwen3-Coder's, Seed-OSS's."""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from engine.thought import overlap
from server.calls import Call, Functions
from server.python_values import PythonValue
from server.tool_values import json_of, json_text, kinds_of_parameter

__all__ = ["PARAMETER_END", "PaddedXmlCall", "XmlCall"]

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_FUNCTION_END, PARAMETER_END = "</function>", "</parameter>"
_BEHIND_VALUES = (_PARAMETER, _FUNCTION_END, "</tool_call>", "</seed:tool_call>")
_MOST_BEHIND = 64
_MOST_IN_NAME = 256
_HEAD = re.compile(rf"([^<>\n]{{1,{_MOST_IN_NAME}}})>")
_NULLS = ("null", "None")


class XmlCall(Call):
    """`<function=name><parameter=key>value</parameter>…</function>`.

    A value is text as it stands where the schema says string, else what `json_of` makes of it. It ends where
    the tag that closes it is followed by another parameter or the call's end, so it may have that tag in it.
    """

    opening = _FUNCTION
    padding: ClassVar[str] = ""
    """Around each value."""

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self._functions = functions
        self._called = ""  # the function, before that is certain
        self._parameters = 0
        self._kinds: frozenset[str] = frozenset()
        self._pieces: list[str] = []  # of the value, that are not passed on
        self._literal, self._unread = PythonValue(), ""
        self._passes_on = self._starts = False
        self._state: Literal["head", "parameter", "value"] = "head"

    @classmethod
    def begun(cls, text: str, functions: Functions) -> tuple[Self, int] | bool:
        return (cls(functions), 0) if text.startswith(_FUNCTION) else _FUNCTION.startswith(text)

    def feed(self, text: str) -> int:
        at, before, self.arguments = 0, -1, ""
        while at != before and at < len(text) and not (self.ended or self.failed):
            before = at
            match self._state:
                case "head":
                    at = self._in_head(text)
                case "parameter":
                    at = self._between(text, at)
                case _:
                    at = self._in_value(text, at)
        return at

    def last(self, text: str) -> str:
        """The rest of a value."""
        self.arguments = ""
        if self._state == "value":
            value, closed, _ = text.rpartition(PARAMETER_END)
            self._take(value.removesuffix(self.padding) if closed else text)
            if closed:
                self._end_value()
        return self.arguments

    def _in_head(self, text: str) -> int:
        head = _HEAD.match(text, len(_FUNCTION))
        if head is not None and head[1] in self._functions:
            self._called, self._state = head[1], "parameter"
            return head.end()
        if head is None and _may_be_head(text[len(_FUNCTION) :]):
            return 0
        self.failed = True
        return len(_FUNCTION)

    def _between(self, text: str, at: int) -> int:
        """Read what stands between parameters."""
        start = at
        while at < len(text) and text[at].isspace():
            at += 1
        rest = text[at : at + len(_PARAMETER) + _MOST_IN_NAME + 1]
        if rest.startswith(_FUNCTION_END):
            self._end()
            return at + len(_FUNCTION_END)
        if rest.startswith(_PARAMETER):
            if (head := _HEAD.match(rest, len(_PARAMETER))) is not None:
                self._begin_value(head[1])
                return at + head.end()
            if _may_be_head(rest[len(_PARAMETER) :]):
                return at
        elif _FUNCTION_END.startswith(rest) or _PARAMETER.startswith(rest):
            return at
        if self.name:  # the tag that closes it was forgotten
            self._end()
            return start
        self.failed = True
        return at

    def _begin_value(self, key: str) -> None:
        self.name, self._state = self._called, "value"
        self._kinds = kinds_of_parameter(self._functions[self.name], key)
        self.arguments += f"{', ' if self._parameters else '{'}{json_text(key)}: "
        self._parameters += 1
        self._pieces, self._literal, self._unread = [], PythonValue(), ""
        self._passes_on, self._starts = False, bool(self.padding)
        if self._kinds == {"string"}:
            self._pass_on()

    def _in_value(self, text: str, at: int) -> int:
        """Read on in a value, as far as it is certain."""
        if self._starts:
            self._starts = False
            if text.startswith(self.padding, at):
                at += len(self.padding)
        while (end := text.find(PARAMETER_END, at)) >= 0:
            padded = bool(self.padding) and text.endswith(self.padding, at, end)
            value_end = end - len(self.padding) if padded else end
            self._take(text[at:value_end])
            at, behind = value_end, end + len(PARAMETER_END)
            closes = False if self._within_string() else _closes(text[behind : behind + _MOST_BEHIND])
            if closes is None:
                return at
            if closes:
                self._end_value()
                return behind
            self._take(text[at:behind])
            at = behind
        rest = text[at:]
        held = max(overlap(rest, self.padding + PARAMETER_END), overlap(rest, PARAMETER_END))
        self._take(rest[: len(rest) - held])
        return len(text) - held

    def _take(self, text: str) -> None:
        """More of the value."""
        if self._passes_on:
            self.arguments += json_text(text)[1:-1]
            return
        self._pieces.append(text)
        if "string" not in self._kinds:
            self._look_into(text)
        elif self._kinds == {"string", "null"}:
            so_far = "".join(self._pieces)
            if not any(null.startswith(so_far) for null in _NULLS):
                self._pass_on()

    def _look_into(self, text: str) -> None:
        if self._literal.ended or self._literal.failed:
            return
        self._unread += text
        self._unread = self._unread[self._literal.feed(self._unread) :]

    def _within_string(self) -> bool:
        """Whether a tag here is in a string of JSON."""
        if self._passes_on:
            return False
        self._look_into("<")  # what may be an empty string, or one in three quotes, is none then
        return self._literal.within_string

    def _pass_on(self) -> None:
        """The value is a string."""
        self._passes_on = True
        self.arguments += '"'
        for piece in self._pieces:
            self.arguments += json_text(piece)[1:-1]

    def _end_value(self) -> None:
        self.arguments += '"' if self._passes_on else json_of("".join(self._pieces), self._kinds)
        self._state = "parameter"

    def _end(self) -> None:
        self.name, self.ended = self._called, True
        self.arguments += "}" if self._parameters else "{}"


class PaddedXmlCall(XmlCall):
    """One whose values have lines of their own."""

    padding = "\n"


def _may_be_head(text: str) -> bool:
    """Whether more of it may make it a name between `=` and `>`."""
    return len(text) <= _MOST_IN_NAME and not re.search(r"[<>\n]", text)


def _closes(behind: str) -> bool | None:
    """Whether a tag with this behind it closes a value; None where that takes more text."""
    rest = behind.lstrip()
    if rest.startswith(_BEHIND_VALUES):
        return True
    may = len(behind) < _MOST_BEHIND and any(each.startswith(rest) for each in _BEHIND_VALUES)
    return None if may else False
