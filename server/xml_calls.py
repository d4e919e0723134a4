"""Calls of which each parameter stands between tags: Qwen3-Coder's, Seed-OSS's, GLM's."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import ClassVar, Self

from engine.thought import overlap
from engine.tool_prompt import CALL_BEGIN, CALL_END, GLM_MARKS
from server.calls import Call, Functions
from server.python_values import PythonValue
from server.tool_values import json_of, json_text, kinds_of_parameter

__all__ = ["GlmCall", "GlmLinesCall", "PaddedXmlCall", "TaggedCall", "XmlCall"]

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_FUNCTION_END = "</function>"
_KEY, _KEY_END, _VALUE, _VALUE_END = GLM_MARKS
_MOST_BEHIND = 64
_MOST_IN_NAME = 256
_MOST_IN_HEAD = _MOST_IN_NAME + _MOST_BEHIND + sum(map(len, GLM_MARKS))
_HEAD = re.compile(rf"([^<>\n]{{1,{_MOST_IN_NAME}}})>")
_GLM_NAME = re.compile(r"([^\s<>]+)(?=[\s<])")
_GLM_HEAD = re.compile(rf"{_KEY}([^<>\n]{{1,{_MOST_IN_NAME}}}){_KEY_END}\s{{,{_MOST_BEHIND}}}{_VALUE}")
_GLM_HEAD_BEGUN = re.compile(rf"{_KEY}[^<>\n]{{,{_MOST_IN_NAME}}}(?P<whole>{_KEY_END}\s{{,{_MOST_BEHIND}}})?")
_NULLS = ("null", "None")


class TaggedCall(Call):
    """A call of parameters, each a name and a value between tags.

    A value is text as it stands where the schema says string, else what `json_of` makes of it. It ends where
    the tag that closes it is followed by another parameter or the call's end, so it may have that tag in it.
    """

    before_name: ClassVar[str]
    """What opens a parameter."""
    behind_name: ClassVar[str]
    """What stands between its name and its value, as templates write it."""
    value_end: ClassVar[str]
    call_end: ClassVar[str]
    behind_values: ClassVar[tuple[str, ...]]
    """What follows where that closes one."""
    padding: ClassVar[str] = ""
    """Around each value."""
    line: ClassVar[str] = "\n"
    """Behind the function's name and each value, as templates write it."""

    def __init__(self, functions: Functions, called: str) -> None:
        super().__init__()
        self._functions = functions
        self._called = called  # the function, before that is certain
        self._parameters = 0
        self._kinds: frozenset[str] = frozenset()
        self._pieces: list[str] = []  # of the value, that are not passed on
        self._literal, self._unread = PythonValue(), ""
        self._within = self._passes_on = self._starts = False

    def feed(self, text: str) -> int:
        at, before, self.arguments = 0, -1, ""
        while at != before and at < len(text) and not (self.ended or self.failed):
            before = at
            at = self._in_value(text, at) if self._within else self._between(text, at)
        return at

    def last(self, text: str) -> str:
        """The rest of a value."""
        self.arguments = ""
        if self._within:
            value, closed, _ = text.rpartition(self.value_end)
            self._take(value.removesuffix(self.padding) if closed else text)
            if closed:
                self._end_value()
        return self.arguments

    @classmethod
    @abstractmethod
    def _head(cls, text: str) -> tuple[str, int] | bool:
        """The parameter that a text begins with, and where its value does.

        True where more text is needed to tell, False where none begins so.
        """

    def _between(self, text: str, at: int) -> int:
        """Read what stands between parameters."""
        start = at
        while at < len(text) and text[at].isspace():
            at += 1
        rest = text[at : at + _MOST_IN_HEAD]
        if rest.startswith(self.call_end):
            self._end()
            return at + len(self.call_end)
        head = self._head(rest)
        if head is True or self.call_end.startswith(rest):
            return at
        if head:
            self._begin_value(head[0])
            return at + head[1]
        if self.name:  # the tag that closes it was forgotten
            self._end()
            return start
        self.failed = True
        return at

    def _begin_value(self, key: str) -> None:
        self.name, self._within = self._called, True
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
        while (end := text.find(self.value_end, at)) >= 0:
            padded = bool(self.padding) and text.endswith(self.padding, at, end)
            value_end = end - len(self.padding) if padded else end
            self._take(text[at:value_end])
            at, behind = value_end, end + len(self.value_end)
            closes = False if self._within_string() else self._closes(text[behind : behind + _MOST_BEHIND])
            if closes is None:
                return at
            if closes:
                self._end_value()
                return behind
            self._take(text[at:behind])
            at = behind
        rest = text[at:]
        held = max(overlap(rest, self.padding + self.value_end), overlap(rest, self.value_end))
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
        self._within = False

    def _end(self) -> None:
        self.name, self.ended = self._called, True
        self.arguments += "}" if self._parameters else "{}"

    def _closes(self, behind: str) -> bool | None:
        """Whether a tag with this behind it closes a value; None where that takes more text."""
        rest = behind.lstrip()
        if rest.startswith(self.behind_values):
            return True
        may = len(behind) < _MOST_BEHIND and any(each.startswith(rest) for each in self.behind_values)
        return None if may else False


class XmlCall(TaggedCall):
    """`<function=name><parameter=key>value</parameter>…</function>`."""

    opening = _FUNCTION
    before_name, behind_name, value_end = _PARAMETER, ">", "</parameter>"
    call_end, behind_values = _FUNCTION_END, (_PARAMETER, _FUNCTION_END, CALL_END, "</seed:tool_call>")

    @classmethod
    def begun(cls, text: str, functions: Functions) -> tuple[Self, int] | bool:
        begun = _between_angles(_FUNCTION, text)
        if isinstance(begun, bool):
            return begun
        name, size = begun
        return (cls(functions, name), size) if name in functions else False

    @classmethod
    def _head(cls, text: str) -> tuple[str, int] | bool:
        return _between_angles(_PARAMETER, text)


class PaddedXmlCall(XmlCall):
    """One whose values have lines of their own."""

    padding = "\n"


class GlmCall(TaggedCall):
    """`name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`, perhaps with spaces between.

    It is one once its first value begins, or what closes it follows the name.
    """

    before_name, behind_name, value_end, line = _KEY, f"{_KEY_END}{_VALUE}", _VALUE_END, ""
    call_end, behind_values = CALL_END, (_KEY, CALL_END, CALL_BEGIN)

    def __init__(self, functions: Functions, called: str) -> None:
        super().__init__(functions, called)
        self.alone = True

    @classmethod
    def begun(cls, text: str, functions: Functions) -> tuple[Self, int] | bool:
        if (head := _GLM_NAME.match(text)) is not None:
            return (cls(functions, head[1]), head.end()) if head[1] in functions else False
        return any(name.startswith(text) for name in functions)

    @classmethod
    def _head(cls, text: str) -> tuple[str, int] | bool:
        if (head := _GLM_HEAD.match(text)) is not None:
            return head[1], head.end()
        if (begun := _GLM_HEAD_BEGUN.match(text)) is None:
            return _KEY.startswith(text)
        return (_VALUE if begun["whole"] else _KEY_END).startswith(text[begun.end() :])


class GlmLinesCall(GlmCall):
    """One whose template writes names and values on lines of their own."""

    behind_name, line = f"{_KEY_END}\n{_VALUE}", "\n"


def _between_angles(opening: str, text: str) -> tuple[str, int] | bool:
    """What stands between this, with which a text begins, and `>`, and how long that is; see `_head`."""
    if not text.startswith(opening):
        return opening.startswith(text)
    if (head := _HEAD.match(text, len(opening))) is not None:
        return head[1], head.end()
    rest = text[len(opening) :]
    return len(rest) <= _MOST_IN_NAME and not re.search(r"[<>\n]", rest)
