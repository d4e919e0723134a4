"""Calls in JSON: an object of a function's name and its arguments, or arguments behind a name."""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any, Literal, Self

from server.calls import Call, Functions

__all__ = ["DEEPSEEK_MARKS", "DeepSeekCall", "JsonCall", "NamedCall", "loaded"]

_ARGUMENTS = ("arguments", "parameters")
_HEAD = re.compile(r"(?P<name>[\w-]{1,64})(?:\[CALL_ID]\w{0,64})?(?:\[ARGS])?\s{0,9}")
_IN_HEAD = ("[CALL_ID]", "[ARGS]")
DEEPSEEK_MARKS = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
"""What opens a call of DeepSeek's, stands before its name or arguments, and closes it."""

_OPENS, _PARTS, _CLOSES = DEEPSEEK_MARKS
_MOST_IN_HEAD = 256
_DEEPSEEK_HEAD = re.compile(
    rf"{_OPENS}\s*(?:function{_PARTS})?\s*(?P<name>[\w-]{{1,64}})\s*(?:{_PARTS})?\s*(?:```(?:json)?)?\s*"
)
_DEEPSEEK_TAIL = re.compile(rf"\s*(?:```)?\s*({_CLOSES})?")
_END_OF_STRING = re.compile(r'["\\]')
_END_OF_SCALAR = re.compile(r"[^\w.+-]")
_OF_NESTED = re.compile(r'["{}\[\]]')


class JsonCall(Call):
    """A call's JSON object.

    Args:
        names: of the functions that may be called.
        name: of this one, where what arrives are its arguments alone.
    """

    def __init__(self, names: Container[str], name: str = "") -> None:
        super().__init__()
        self._names = names
        self._values: dict[str, str] = {}  # JSON of each
        self._key = ""
        self._value: _Value | None = None
        self._state: Literal["brace", "key", "colon", "value"] = "brace"
        self.alone = self._named = bool(name)
        if name:
            self._values["name"], self._key, self._state = json.dumps(name), _ARGUMENTS[0], "value"

    @classmethod
    def begun(cls, text: str, functions: Functions) -> tuple[Self, int] | bool:
        return (cls(functions), 0) if text.startswith("{") else False

    def feed(self, text: str) -> int:
        at, self.arguments = 0, ""
        while at < len(text) and not (self.ended or self.failed):
            if self._value is None and text[at].isspace():
                at += 1
            elif self._state in ("key", "value") and (self._value or text[at] not in ",}"):
                at = self._in_value(text, at)
            else:
                at += self._punctuation(text[at])
        return at

    def _in_value(self, text: str, start: int) -> int:
        """Read on in a key or a value; returns where that stopped."""
        if self._value is None:
            self._value = _Value()
            if self._state == "value" and self._key in _ARGUMENTS and text[start] == "{" and not self.name:
                self.name = self._called()
                self._value.passed_on = bool(self.name)
        value = self._value
        end = value.feed(text, start)
        if value.passed_on:
            self.arguments += text[start:end]
        if value.ended:
            self._value = None
            if self._state == "value":
                self._values[self._key], self._state = value.text, "key"
                self.ended = self._named
            elif isinstance(key := loaded(value.text), str):
                self._key, self._state = key, "colon"
            else:
                self._fail()
        return end

    def _punctuation(self, char: str) -> int:
        """Read what stands between keys and values; returns how many characters of it: one or none."""
        match self._state, char:
            case "brace", "{":
                self._state = "key"
            case "key", ",":
                pass
            case "key", "}":
                self._end()
            case "colon", ":":
                self._state = "value"
            case _:
                self._fail()
                return 0
        return 1

    def _fail(self) -> None:
        # With a name the arguments are whole: a brace was forgotten.
        self.ended, self.failed = bool(self.name), not self.name

    def _end(self) -> None:
        """The object is whole; arguments that stood before the name, or in a string, are known now."""
        self.ended = True
        if self.name:
            return
        raw = next((self._values[key] for key in _ARGUMENTS if key in self._values), "null")
        value = loaded(raw)
        if isinstance(value, str):
            raw, value = value, loaded(value)
        if raw in ("null", ""):  # of a function without any
            raw, value = "{}", {}
        if isinstance(value, dict) and (name := self._called()):
            self.name, self.arguments = name, raw
        else:
            self.ended, self.failed = False, True

    def _called(self) -> str:
        """The function's name; empty if it is not known, or none that may be called."""
        name = loaded(self._values.get("name", ""))
        return name if isinstance(name, str) and name in self._names else ""


class NamedCall(JsonCall):
    """Arguments behind a name and perhaps an id, `name[CALL_ID]id[ARGS]{…}`, or a `JsonCall`."""

    behind = JsonCall

    @classmethod
    def begun(cls, text: str, functions: Functions) -> tuple[Self, int] | bool:
        if text.startswith("{") or (head := _HEAD.match(text)) is None:
            return super().begun(text, functions)
        rest = text[head.end() :]
        if rest.startswith("{") and head["name"] in functions:
            return cls(functions, head["name"]), head.end()
        return any(mark[:-1].startswith(rest) for mark in _IN_HEAD)


class DeepSeekCall(JsonCall):
    """Arguments between marks, perhaps as a block of code, behind a name: DeepSeek's."""

    opening = _OPENS

    def __init__(self, names: Container[str], name: str) -> None:
        super().__init__(names, name)
        self.alone = self._whole = False

    @classmethod
    def begun(cls, text: str, functions: Functions) -> tuple[Self, int] | bool:
        if not text.startswith(_OPENS):
            return _OPENS.startswith(text)
        if (start := text.find("{", 0, _MOST_IN_HEAD)) < 0:
            return len(text) < _MOST_IN_HEAD
        head = _DEEPSEEK_HEAD.fullmatch(text, 0, start)
        known = head is not None and head["name"] in functions
        return (cls(functions, head["name"]), start) if head is not None and known else False

    def feed(self, text: str) -> int:
        at, self.arguments = 0, ""
        if not self._whole:
            at = super().feed(text)
            if not self.ended:
                return at
            self.ended, self._whole = False, True
        tail = _DEEPSEEK_TAIL.match(text, at)
        assert tail is not None  # it may be empty
        rest = text[tail.end() :]
        self.ended = bool(tail[1]) or not any(mark.startswith(rest) for mark in ("```", _CLOSES))
        return tail.end()


class _Value:
    """A JSON value, as it arrives.

    Attributes:
        ended: it is whole.
        passed_on: its text is not kept.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = self._scalar = False
        self.ended = self.passed_on = False

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def feed(self, text: str, start: int) -> int:
        """Read what belongs to the value from `start` on; returns where that stopped."""
        at = start
        while at < len(text) and not self.ended:
            if self._escaped:
                self._escaped = False
                at += 1
            elif self._in_string:
                at = self._to(_END_OF_STRING, text, at)
            elif self._depth or (text[at] in '"{[' and not self._scalar):
                at = self._to(_OF_NESTED, text, at)
            elif (end := _END_OF_SCALAR.search(text, at)) is not None:
                at, self.ended = end.start(), True
            else:
                at, self._scalar = len(text), True
        if not self.passed_on:
            self._pieces.append(text[start:at])
        return at

    def _to(self, marks: re.Pattern[str], text: str, at: int) -> int:
        """Read behind the next character that changes what the following ones are."""
        found = marks.search(text, at)
        if found is None:
            return len(text)
        match found[0]:
            case "\\":
                self._escaped = True
            case '"':
                self._in_string = not self._in_string
            case "{" | "[":
                self._depth += 1
            case _:
                self._depth -= 1
        self.ended = self._depth == 0 and not self._in_string
        return found.end()


def loaded(text: str) -> Any:
    """The value of JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
