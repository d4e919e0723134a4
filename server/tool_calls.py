"""Calls of tools in a model's text, as it arrives.

However the text is cut into pieces, content and calls are the same; what turns out to be no call is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from engine.thought import overlap

__all__ = ["CallDelta", "Parsed", "ToolCallParser"]

_ARGUMENTS = ("arguments", "parameters")
_AT_ONCE = 4096  # characters of a text that comes in one: each call copies what is left of them
_BETWEEN_CALLS = re.compile(r"[\s\[\],;]*")
_HEAD = re.compile(r"(?P<name>[\w-]{1,64})(?:\[CALL_ID\]\w{0,64})?(?:\[ARGS\])?\s{0,9}")
_IN_HEAD = ("[CALL_ID]", "[ARGS]")
_END_OF_STRING = re.compile(r'["\\]')
_END_OF_SCALAR = re.compile(r"[^\w.+-]")
_OF_NESTED = re.compile(r'["{}\[\]]')


@dataclass(frozen=True, slots=True)
class CallDelta:
    """New text of one call.

    Args:
        index: of the call in the answer.
        name: the function's, with the call's first delta; None after it.
        arguments: more of the JSON text.
    """

    index: int
    name: str | None
    arguments: str


@dataclass(slots=True)
class Parsed:
    """What a piece of text came to: content, calls, and both in the order in which they came."""

    content: str
    calls: list[CallDelta]
    order: list[str | CallDelta] = field(default_factory=list, compare=False)


class ToolCallParser:
    """Tells content from calls in one answer.

    A call is a JSON object with the function's `name` and its `arguments`, or `parameters`. Calls stand
    between `begin` and `end`, one or a list of them, or are what an answer that begins with `bare` consists
    of, with semicolons between them where that is no list. Where `named`, `begin` may also stand before
    each call's name, perhaps an id, and arguments, which alone are JSON then: `name[CALL_ID]id[ARGS]{…}`.

    One whose name is none of `names`, or whose arguments are no object, is content. White space around calls
    is not.

    Once the name is known, arguments are passed on as they come: they are JSON only if the model wrote JSON.

    Args:
        begin: what opens calls; may be empty.
        end: what closes them; may be empty.
        bare: what calls without either begin with: a brace, a bracket, or empty for none of them.
        names: of the functions that may be called.
        named: calls may come without an object around them.
    """

    def __init__(self, begin: str, end: str, bare: str, names: Set[str], named: bool = False) -> None:
        self._begin, self._end, self._bare, self._names = begin, end, bare, names
        self._named = named
        self._text = ""  # that came and is not read yet
        self._raw = ""  # that was read, and is content if it is no call
        self._spaces = ""  # that were read, and are content if more of it follows
        self._behind = False  # a call, without content since
        self._inside = False  # where calls stand
        self._called = False  # there
        self._call: _Call | None = None
        self._content: list[str] = []  # and calls, of one `feed`
        self._deltas: list[CallDelta] = []
        self._places: list[int] = []  # how many of the content's parts came before each of these
        self._begun: list[CallDelta] = []  # for the next one
        self._given = ""  # at the beginning of what is held: text that is not the answer's
        self.calls = 0
        """Calls so far."""

    @property
    def open(self) -> bool:
        """Whether a call, or what opens calls, may go on."""
        return self._inside or bool(self._text.strip())

    def begin(self, text: str) -> None:
        """Take the text that the answer goes on with, before any of the answer.

        Calls that are whole in it are not the answer's, nor is its content. A call that it leaves open is,
        and with all of its arguments.
        """
        deltas = self.feed(text).calls
        held = self._spaces + self._raw + self._text
        self.calls, self._given = 0, held.lstrip() if self._behind else held
        if self._call is not None and (name := self._call.name):
            arguments = "".join(delta.arguments for delta in deltas if delta.index == deltas[-1].index)
            self.calls, self._begun = 1, [CallDelta(0, name, arguments)]

    def feed(self, text: str, final: bool = False) -> Parsed:
        """Take more of the answer and return what is certain now.

        Args:
            text: the next piece; may be empty.
            final: nothing follows: text held back is let go.
        """
        self._content, self._deltas, self._begun = [], self._begun, []
        self._places = [0] * len(self._deltas)
        for start in range(0, len(text), _AT_ONCE):
            self._text += text[start : start + _AT_ONCE]
            more = bool(self._text)
            while more:
                more = self._step() and bool(self._text)
                self._leave_out_given()
        if final:
            if not self._called or (self._call is not None and not self._call.name):
                self._say(self._raw + self._text)
            if not self.calls:
                self._content.append(self._spaces)
            self._text = self._raw = self._spaces = ""
            self._leave_out_given()
        return Parsed("".join(self._content), self._deltas, self._in_order())

    def _in_order(self) -> list[str | CallDelta]:
        """What one `feed` came to: content, of which there is some, and calls."""
        order: list[str | CallDelta] = []
        places = [0, *self._places, len(self._content)]
        for (start, end), call in zip(pairwise(places), [*self._deltas, None], strict=True):
            if content := "".join(self._content[start:end]):
                order.append(content)
            if call is not None:
                order.append(call)
        return order

    def _leave_out_given(self) -> None:
        """After a step, which gives content or a call: what was held before the answer was one of these."""
        if self._deltas:
            self._given = ""
        elif self._given and (content := "".join(self._content)):
            if self._given.startswith(content):
                self._content, self._given = [], self._given[len(content) :]
            else:
                self._content, self._given = [content.removeprefix(self._given)], ""

    def _step(self) -> bool:
        """Read some of the text; False where more of it is needed."""
        if self._call is not None:
            return self._in_call(self._call)
        return self._between_calls() if self._inside else self._in_content()

    def _in_content(self) -> bool:
        if self._bare:
            start = self._text.lstrip()
            if not start:
                return False
            bare, self._bare = self._bare, ""
            if start.startswith(bare):
                self._enter(self._text[: -len(start)], start)
                return True
        if not self._begin:
            self._say(self._text)
            self._text = ""
            return False
        before, begin, after = self._text.partition(self._begin)
        if begin:
            self._say(before)
            self._enter(begin, after)
            return True
        certain = len(before) - overlap(before, self._begin)
        self._say(before[:certain])
        self._text = before[certain:]
        return False

    def _between_calls(self) -> bool:
        between = _BETWEEN_CALLS.match(self._text)
        assert between is not None  # it may be empty
        self._raw += between[0]
        text = self._text = self._text[between.end() :]
        if not text:
            return False
        ends = self._called and bool(self._end)
        if text.startswith("{"):
            self._call = _Call(self._names)
        elif self._named and not self._called and (head := _HEAD.match(text)) is not None:
            return self._in_head(head["name"], head[0])
        elif ends and text.startswith(self._end):
            self._text = text.removeprefix(self._end)
            self._leave(failed=False)
        elif ends and self._end.startswith(text):
            return False
        else:
            self._leave(failed=not self._called)
        return True

    def _in_head(self, name: str, head: str) -> bool:
        """Read what stands before arguments that are JSON by themselves."""
        rest = self._text.removeprefix(head)
        if rest.startswith("{") and name in self._names:
            self._raw, self._text = self._raw + head, rest
            self._call = _Call(self._names, name)
        elif any(mark[:-1].startswith(rest) for mark in _IN_HEAD):
            return False
        else:
            self._leave(failed=True)
        return True

    def _in_call(self, call: _Call) -> bool:
        known = call.name
        size = call.feed(self._text)
        self._raw += self._text[:size]
        self._text = self._text[size:]
        if call.state == "failed":
            self._leave(failed=True)
            return True
        if call.name and call.arguments:
            if not known:
                self._called = self._behind = True
                self.calls += 1
            self._raw = ""
            self._places.append(len(self._content))
            self._deltas.append(CallDelta(self.calls - 1, None if known else call.name, call.arguments))
        if call.state == "ended":
            self._call, self._raw = None, ""
            if call.alone:
                self._leave(failed=False)
        return call.state == "ended"

    def _enter(self, opening: str, rest: str) -> None:
        """Calls may begin here."""
        self._raw, self._text, self._inside, self._called = opening, rest, True, False

    def _leave(self, *, failed: bool) -> None:
        """Calls end here; if that failed, what was read behind the last of them is content."""
        if failed:
            self._say(self._raw)
        self._raw, self._inside, self._called, self._call = "", False, False, None

    def _say(self, text: str) -> None:
        """Content; white space is held back until more of it follows."""
        said = text.rstrip()
        spaces = text[len(said) :]
        if not said:
            self._spaces += spaces
            return
        if self._behind:
            self._behind, self._spaces, said = False, "", said.lstrip()
        self._content += self._spaces, said
        self._spaces = spaces


class _Call:
    """A call's JSON object, as it arrives.

    Args:
        names: of the functions that may be called.
        name: of this one, where what arrives are its arguments alone.

    Attributes:
        state: what has to come, or that nothing more belongs to it, or that it is no call.
        name: the function's, once it is known that this is a call: with its first arguments.
        arguments: what the last `feed` brought of them.
        alone: there is no object around them.
    """

    def __init__(self, names: Set[str], name: str = "") -> None:
        self._names = names
        self._values: dict[str, str] = {}  # JSON of each
        self._key = ""
        self._value: _Value | None = None
        self.state: Literal["brace", "key", "colon", "value", "ended", "failed"] = "brace"
        self.alone = bool(name)
        if name:
            self._values["name"], self._key, self.state = json.dumps(name), _ARGUMENTS[0], "value"
        self.name = ""
        self.arguments = ""

    def feed(self, text: str) -> int:
        """Read what belongs to the object; returns how many characters that is."""
        at, self.arguments = 0, ""
        while at < len(text) and self.state not in ("ended", "failed"):
            if self._value is None and text[at].isspace():
                at += 1
            elif self.state in ("key", "value") and (self._value or text[at] not in ",}"):
                at = self._in_value(text, at)
            else:
                at += self._punctuation(text[at])
        return at

    def _in_value(self, text: str, start: int) -> int:
        """Read on in a key or a value; returns where that stopped."""
        if self._value is None:
            self._value = _Value()
            if self.state == "value" and self._key in _ARGUMENTS and text[start] == "{" and not self.name:
                self.name = self._called()
                self._value.passed_on = bool(self.name)
        value = self._value
        end = value.feed(text, start)
        if value.passed_on:
            self.arguments += text[start:end]
        if value.ended:
            self._value = None
            if self.state == "value":
                self._values[self._key], self.state = value.text, "ended" if self.alone else "key"
            elif isinstance(key := _loaded(value.text), str):
                self._key, self.state = key, "colon"
            else:
                self._fail()
        return end

    def _punctuation(self, char: str) -> int:
        """Read what stands between keys and values; returns how many characters of it: one or none."""
        match self.state, char:
            case "brace", "{":
                self.state = "key"
            case "key", ",":
                pass
            case "key", "}":
                self._end()
            case "colon", ":":
                self.state = "value"
            case _:
                self._fail()
                return 0
        return 1

    def _fail(self) -> None:
        self.state = "ended" if self.name else "failed"  # the arguments are whole: a brace was forgotten

    def _end(self) -> None:
        """The object is whole; arguments that stood before the name, or in a string, are known now."""
        self.state = "ended"
        if self.name:
            return
        raw = next((self._values[key] for key in _ARGUMENTS if key in self._values), "{}")
        value = _loaded(raw)
        if isinstance(value, str):
            raw, value = value, _loaded(value)
        if isinstance(value, dict) and (name := self._called()):
            self.name, self.arguments = name, raw
        else:
            self.state = "failed"

    def _called(self) -> str:
        """The function's name; empty if it is not known, or none that may be called."""
        name = _loaded(self._values.get("name", ""))
        return name if isinstance(name, str) and name in self._names else ""


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


def _loaded(text: str) -> Any:
    """The value of JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
