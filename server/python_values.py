"""Python's literals in a model's text, as they arrive, and the JSON that says the same."""

from __future__ import annotations

import json
import re

__all__ = ["PythonValue"]

_PREFIX = re.compile(r"[rRuU]?(?:'''|\"\"\"|['\"])")
_MOST_IN_SCALAR = 4400
_SCALAR = re.compile(r"[\w.+-]+")
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(
    r"[+-]?(?:0(?:_?0)*|[1-9](?:_?[0-9])*|0[xX](?:_?[0-9a-fA-F])+|0[oO](?:_?[0-7])+|0[bB](?:_?[01])+)"
)
_FLOAT = re.compile(
    r"[+-]?(?:[0-9](?:_?[0-9])*\.?|(?:[0-9](?:_?[0-9])*)?\.[0-9](?:_?[0-9])*)(?:[eE][+-]?[0-9](?:_?[0-9])*)?"
)
_SPECIAL = {quote: re.compile(rf"[{quote}\\]") for quote in "'\""}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "\\": "\\",
    "'": "'",
    '"': '"',
    "/": "/",  # JSON's, which is Python otherwise
    "\n": "",
}
_DIGITS = {"x": 2, "u": 4, "U": 8}
_OCTAL = re.compile(r"[0-7]{1,3}")


class PythonValue:
    """A literal: a string, a number, True, False, None, or lists and dicts of these; JSON's words will do.

    Attributes:
        ended: it is whole.
        failed: it is no literal, or one that JSON cannot say: bytes, tuples, keys that are no strings.
        json: what the last `feed` brought of it.
    """

    def __init__(self) -> None:
        self.ended = self.failed = False
        self.json = ""
        self._pieces: list[str] = []
        self._open: list[str] = []  # what closes the lists and dicts around
        self._wants: str = "value"  # or key, colon, comma
        self._empty = True  # the list or dict, so far
        self._quote = ""  # of the string around
        self._raw = False  # which is one of r""

    @property
    def within_string(self) -> bool:
        """Whether what comes next belongs to a string in a list or dict."""
        return bool(self._quote and self._open) and not self.failed

    @classmethod
    def whole(cls, text: str) -> str | None:
        """The JSON of a text that is one literal, else None."""
        value = cls()
        end = value.feed(f"{text} ")
        return value.json if value.ended and not text[end:].strip() else None

    def feed(self, text: str, start: int = 0) -> int:
        """Read what belongs to the value from `start` on; returns where that stopped.

        What is left comes again, with more text behind it, unless the value has ended or failed.
        """
        self._pieces = []
        at, before = start, -1
        while at != before and at < len(text) and not (self.ended or self.failed):
            before = at
            if self._quote:
                at = self._in_string(text, at)
            elif text[at].isspace():
                at += 1
            elif self._wants in ("value", "key"):
                at = self._element(text, at)
            else:
                at = self._punctuation(text, at)
        self.json = "".join(self._pieces)
        return at

    def _element(self, text: str, at: int) -> int:
        """Read what begins a value, a key, or ends the list or dict."""
        char = text[at]
        if self._open and char == self._open[-1] and (self._wants == "key") == (char == "}"):
            return self._close(at)  # perhaps behind a comma
        opening = _PREFIX.match(text, at)
        if opening is not None:
            quote = opening[0].lstrip("rRuU")
            if len(quote) == 1 and len(text) < opening.end() + 2 and set(text[opening.end() :]) <= {quote}:
                return at  # it may have three of them
            self._raw, self._quote = opening[0][0] in "rR", quote
            self._begin('"')
            return opening.end()
        if char in "rRuU" and at + 1 == len(text):
            return at
        if self._wants == "key":
            self.failed = True
        elif char in "[{":
            self._begin(char)
            self._open.append("]" if char == "[" else "}")
            self._wants, self._empty = "value" if char == "[" else "key", True
            at += 1
        elif (scalar := _SCALAR.match(text, at)) is None or len(scalar[0]) > _MOST_IN_SCALAR:
            self.failed = True
        elif scalar.end() < len(text):
            if (written := _scalar(scalar[0])) is None:
                self.failed = True
                return at
            self._begin(written)
            self._end()
            at = scalar.end()
        return at

    def _begin(self, written: str) -> None:
        """Of a key or value, with the comma before it."""
        if self._open and not self._empty and (self._wants == "key" or self._open[-1] == "]"):
            self._pieces.append(", ")
        self._pieces.append(written)

    def _end(self) -> None:
        """Of a key or value."""
        if self._wants == "key":
            self._wants = "colon"
        elif self._open:
            self._wants, self._empty = "comma", False
        else:
            self.ended = True

    def _close(self, at: int) -> int:
        self._pieces.append(self._open.pop())
        self._wants = "value"
        self._end()
        return at + 1

    def _punctuation(self, text: str, at: int) -> int:
        char = text[at]
        if self._wants == "colon" and char == ":":
            self._pieces.append(": ")
            self._wants = "value"
        elif self._wants == "comma" and char == ",":
            self._wants = "value" if self._open[-1] == "]" else "key"
        elif self._wants == "comma" and char == self._open[-1]:
            return self._close(at)
        else:
            self.failed = True
            return at
        return at + 1

    def _in_string(self, text: str, at: int) -> int:
        """Read on in a string, as far as it is certain."""
        found = _SPECIAL[self._quote[0]].search(text, at)
        end = found.start() if found is not None else len(text)
        if end > at:
            self._say(text[at:end])
        elif text[at] == "\\":
            return self._escape(text, at)
        elif text.startswith(self._quote, at):
            end, self._quote = at + len(self._quote), ""
            self._pieces.append('"')
            self._end()
        elif at + 3 <= len(text):
            self._say(text[at])
            return at + 1
        return end

    def _say(self, text: str) -> None:
        self._pieces.append(json.dumps(text, ensure_ascii=False)[1:-1])

    def _escape(self, text: str, at: int) -> int:
        """Read what a backslash begins; nothing where it goes on behind the text."""
        if at + 1 == len(text):
            return at
        char = text[at + 1]
        if self._raw:
            self._say("\\" + char)
            return at + 2
        if char in _ESCAPES:
            self._say(_ESCAPES[char])
            return at + 2
        if char in _DIGITS:
            digits = text[at + 2 : at + 2 + _DIGITS[char]]
            if not re.fullmatch("[0-9a-fA-F]*", digits):
                self.failed = True
            elif len(digits) < _DIGITS[char]:
                return at
            elif 0xD800 <= (code := int(digits, 16)) < 0xE000:
                self._pieces.append(f"\\u{code:04x}")  # half of a character, as JSON writes it
            elif code > 0x10FFFF:
                self.failed = True
            else:
                self._say(chr(code))
            return at + 2 + len(digits)
        if (octal := _OCTAL.match(text, at + 1)) is not None:
            if octal.end() == len(text) and len(octal[0]) < 3:
                return at
            self._say(chr(int(octal[0], 8)))
            return octal.end()
        self._say("\\" + char)  # as Python has it
        return at + 2


def _scalar(text: str) -> str | None:
    """The JSON of a word or number, or None."""
    if text in _WORDS:
        return _WORDS[text]
    if _JSON_NUMBER.fullmatch(text):
        return text
    try:
        if _INTEGER.fullmatch(text):
            return str(int(text, 0))
        if _FLOAT.fullmatch(text) and not text.lstrip("+-").replace("_", "").isdigit():
            return json.dumps(float(text), allow_nan=False)
    except ValueError:  # too long, or too large
        pass
    return None
