"""Calls as Python writes them: `name(key=value, …)`."""

from __future__ import annotations

import re
from typing import Literal, Self

from server.calls import Call, Functions
from server.python_values import PythonValue
from server.tool_values import json_text

__all__ = ["PythonCall"]

_HEAD = re.compile(r"([\w.-]{1,64})\s{0,9}\(")
_KEY = re.compile(r"([^\W\d][\w.-]{0,255})\s{0,9}=")
_PART_OF_KEY = re.compile(r"[^\W\d][\w.-]{0,255}\s{0,9}")


class PythonCall(Call):
    """A call with keywords only, and literals as their values: what is computed is no call.

    Args:
        called: the function's name.
    """

    def __init__(self, called: str) -> None:
        super().__init__()
        self._called = called
        self._key: str | None = None  # whose value has not begun
        self._value = PythonValue()
        self._values = 0
        self._wants: Literal["key", "value", "comma"] = "key"

    @classmethod
    def begun(cls, text: str, functions: Functions) -> tuple[Self, int] | bool:
        if (head := _HEAD.match(text)) is not None:
            return (cls(head[1]), head.end()) if head[1] in functions else False
        name = text.rstrip()
        if len(text) - len(name) > 9:
            return False
        return any(each == name if name != text else each.startswith(name) for each in functions)

    def feed(self, text: str) -> int:
        at, before, self.arguments = 0, -1, ""
        while at != before and at < len(text) and not (self.ended or self.failed):
            before = at
            if self._wants == "value":
                at = self._in_value(text, at)
            elif text[at].isspace():
                at += 1
            elif text[at] == ")":
                at, self.ended = at + 1, True
                self.name = self._called
                self.arguments += "}" if self._values else "{}"
            elif self._wants == "comma":
                at = self._comma(text, at)
            else:
                at = self._in_key(text, at)
        return at

    def _comma(self, text: str, at: int) -> int:
        self._wants = "key"
        if text[at] == ",":
            return at + 1
        if text[at].isalpha() or text[at] == "_":  # vLLM's template for Gemma 3 forgets the comma
            return self._in_key(text, at)
        self._fail()
        return at

    def _in_key(self, text: str, at: int) -> int:
        if (key := _KEY.match(text, at)) is not None:
            self._key, self._wants, self._value = key[1], "value", PythonValue()
            return key.end()
        if _PART_OF_KEY.fullmatch(text, at) is None:
            self._fail()
        return at

    def _in_value(self, text: str, at: int) -> int:
        at = self._value.feed(text, at)
        if written := self._value.json:
            if self._key is not None:
                self.arguments += f"{', ' if self._values else '{'}{json_text(self._key)}: "
                self.name, self._key, self._values = self._called, None, self._values + 1
            self.arguments += written
        if self._value.failed:
            self._fail()
        elif self._value.ended:
            self._wants = "comma"
        return at

    def _fail(self) -> None:
        """It is no call, or was one so far: then its arguments stay without an end."""
        self.ended, self.failed = bool(self.name), not self.name
