"""Calls of tools in a model's text, as it arrives.

However the text is cut into pieces, content and calls are the same; what turns out to be no call is content.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from engine.thought import overlap
from server.calls import Call, Functions

__all__ = ["CallDelta", "CallParser", "Parsed", "ToolCallParser"]

_AT_ONCE = 4096  # characters of a text that comes in one: each call copies what is left of them
_BETWEEN_CALLS = re.compile(r"[\s\[\],;]*")


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


class CallParser(Protocol):
    """Tells content from calls in one answer."""

    calls: int

    @property
    def open(self) -> bool:
        """Whether a call, or what opens calls, may go on."""

    def begin(self, text: str) -> None:
        """Take the text that the answer goes on with, before any of the answer."""

    def feed(self, text: str, final: bool = False) -> Parsed:
        """Take more of the answer and return what is certain now."""


class ToolCallParser:
    """Tells content from calls in one answer.

    Calls stand between `begin` and `end`, one or a list of them, or are what an answer that begins with
    `bare` consists of, with semicolons between them where that is no list. One of no function that may be
    called, or whose arguments are no object, is content. White space around calls is not.

    Once the name is known, arguments are passed on as they come: they are JSON only if the model wrote what
    its form asks for.

    Args:
        begin: what opens calls; may be empty.
        end: what closes them; may be empty.
        bare: what calls without either begin with: a brace, a bracket, or empty for none of them.
        form: of each call.
        functions: that may be called.
    """

    def __init__(self, begin: str, end: str, bare: str, form: type[Call], functions: Functions) -> None:
        self._begin, self._end, self._bare, self._functions = begin, end, bare, functions
        self._form = form
        self._openings = [opening for opening in (begin, form.opening) if opening]
        self._text = ""  # that came and is not read yet
        self._raw = ""  # that was read, and is content if it is no call
        self._spaces = ""  # that were read, and are content if more of it follows
        self._behind = False  # a call, without content since
        self._inside = False  # where calls stand
        self._called = False  # there
        self._call: Call | None = None
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
            if self._call is not None and self._call.name:
                if rest := self._call.last(self._text):
                    self._places.append(len(self._content))
                    self._deltas.append(CallDelta(self.calls - 1, None, rest))
            elif not self._called or self._call is not None or not self._end.startswith(self._text):
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
            self._say(self._text[: len(self._text) - len(start)])
            self._text = start
            if not start:
                return False
            bare, self._bare = self._bare, ""
            if start.startswith(bare):
                self._enter("", start)
                return True
        found = [(at, mark) for mark in self._openings if (at := self._text.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            self._say(self._text[:at])
            opening = mark if mark == self._begin else ""
            self._enter(opening, self._text[at + len(opening) :])
            return True
        certain = len(self._text) - max((overlap(self._text, mark) for mark in self._openings), default=0)
        self._say(self._text[:certain])
        self._text = self._text[certain:]
        return False

    def _between_calls(self) -> bool:
        between = _BETWEEN_CALLS.match(self._text)
        assert between is not None  # it may be empty
        self._raw += between[0]
        text = self._text = self._text[between.end() :]
        if not text:
            return False
        ends = self._called and bool(self._end)
        form = (self._called and self._form.behind) or self._form
        begun = form.begun(text, self._functions)
        if begun is True:
            return False
        if begun:
            self._call, size = begun
            self._raw, self._text = self._raw + text[:size], text[size:]
        elif ends and text.startswith(self._end):
            self._text = text.removeprefix(self._end)
            self._leave(failed=False)
        elif ends and self._end.startswith(text):
            return False
        else:
            if not self._called and self._form.opening and text.startswith(self._form.opening):
                self._raw += self._form.opening  # which would open calls again
                self._text = text.removeprefix(self._form.opening)
            self._leave(failed=not self._called)
        return True

    def _in_call(self, call: Call) -> bool:
        known = call.name
        size = call.feed(self._text)
        self._raw += self._text[:size]
        self._text = self._text[size:]
        if call.failed:
            self._leave(failed=True)
            return True
        if call.name and call.arguments:
            if not known:
                self._called = self._behind = True
                self.calls += 1
            self._raw = ""
            self._places.append(len(self._content))
            self._deltas.append(CallDelta(self.calls - 1, None if known else call.name, call.arguments))
        if call.ended:
            self._call, self._raw = None, ""
            if call.alone:
                self._leave(failed=False)
        return call.ended

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
