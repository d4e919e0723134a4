"""OpenAI's harmony, in which gpt-oss writes: an answer is messages, each with a header before its text.

`<|start|>assistant<|channel|>analysis<|message|>a thought<|end|>`, then
`<|start|>assistant<|channel|>final<|message|>the answer<|return|>`, or a call of a tool:
`<|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>`, of which
the recipient may also stand before the channel. `commentary` without one is for the user, before calls.

However the text is cut into pieces, what is read of it is the same. Source: OpenAI's harmony response format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from engine.thought import Place

__all__ = ["HarmonyReader", "HarmonyThought", "Marks", "Opened", "is_harmony"]


class Marks:
    """What is around messages and in their headers; each is a special token."""

    START = "<|start|>"
    CHANNEL = "<|channel|>"
    CONSTRAIN = "<|constrain|>"
    MESSAGE = "<|message|>"
    END = "<|end|>"
    CALL = "<|call|>"
    RETURN = "<|return|>"
    ALL = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
    CLOSING = (END, CALL, RETURN)


_ROLE = "assistant"
_TO_NOBODY = ("", _ROLE, "user", "all")
_CHANNELS = ("analysis", "commentary", "final")
_FUNCTIONS = "functions."
_MARK = re.compile("|".join(map(re.escape, Marks.ALL)))
_WORD = re.compile(r"[^\s<]+")
_PART = re.compile(rf"\s*(?:(?P<mark>{_MARK.pattern})|to=(?P<to>[^\s<]+)|(?P<word>[^\s<]+))")
_NAME = re.compile(r"\s*(\w*)")
_CHANNEL_AND_TEXT = re.compile(
    rf"{_ROLE}\s*{re.escape(Marks.CHANNEL)}\s*({'|'.join(_CHANNELS)})(?!to?$|to=)(?=\w)"
)
"""What stands before a text with no mark between the two."""
_LONGEST_HEADER = 512
_AT_ONCE = 4096  # characters of a text that comes in one: each mark copies what is left of them


def is_harmony(template: str) -> bool:
    """Whether a chat template's source shows the format."""
    return all(mark in template for mark in (Marks.START, Marks.CHANNEL, Marks.MESSAGE))


class Opened(NamedTuple):
    """A message whose text follows.

    Args:
        kind: what it is: for a call, of something that need not be a function.
        to: of a call, its recipient, for a function its name.
    """

    kind: Literal["thought", "content", "call"]
    to: str = ""


@dataclass(frozen=True, slots=True)
class HarmonyThought:
    """Where an answer stands when it begins: what `engine.thought.Thought` is to models with other marks.

    Args:
        begun: what the prompt has of the message that the answer goes on with, from its role on; None where
            the prompt ends between messages.
        calls: the answer's text has calls of tools in it, as `HarmonyReader` says.
        told_apart: thoughts are no part of that text.
    """

    begun: str | None
    calls: bool = False
    told_apart: bool = True

    begin: ClassVar[str] = ""
    """Nothing that text could begin with opens a thought."""

    @property
    def place(self) -> Place:
        """In the terms of `engine.thought.Thought`."""
        opened = self.reader().opened
        if opened is None:
            return "before"
        return "within" if opened.kind == "thought" else "behind"

    def reader(self) -> HarmonyReader:
        """For one answer."""
        return HarmonyReader(self.begun, calls=self.calls, told_apart=self.told_apart)


class HarmonyReader:
    """Tells thought from answer in one text, as `engine.thought.ThoughtReader` does.

    Marks and headers are part of neither. Several messages of one kind have a newline between them. What
    stands outside of messages is answer; so is what looks like a header and turns out to be none.

    Args:
        begun: see `HarmonyThought`.
        calls: calls stay in the answer, all in one form: `<|channel|>commentary to=NAME<|message|>…<|call|>`.
            Without, their text is text like any other.
        told_apart: thoughts are; else their text is, too.

    Attributes:
        opened: the message whose text comes next; None outside of one, and in a header.
        held: characters that came, of which nothing is known yet.
        tokens: how many, of those that `took` was told of, are of thoughts.
    """

    over = False

    def __init__(self, begun: str | None, *, calls: bool, told_apart: bool = True) -> None:
        self._calls, self._told_apart = calls, told_apart
        self._text = ""  # that came and is not read yet
        self._not_ours = 0  # characters at its beginning that are the prompt's, or nobody's
        self._in_header = begun is not None
        self.opened: Opened | None = None
        self._told = {"thought": False, "content": False}  # whether there was text of the kind
        self._fresh = True  # the message has no text yet
        self.tokens = 0
        self._count = self._pending = 0
        self._said = False  # the last `feed` brought some answer
        self._answers: list[list[int]] = []  # first token of some that are the answer's, and the one behind
        self._within: Opened | None = None  # what was open at the last token
        if begun:
            self._take_begun(begun)

    @property
    def held(self) -> int:
        return len(self._text) - min(self._not_ours, len(self._text))

    def _take_begun(self, text: str) -> None:
        self._text, self._not_ours = text, len(text)
        self._read_on(final=False)
        self._within = self.opened
        if self._within is not None:
            self._text, self._not_ours = "", 0

    def feed(self, text: str, final: bool = False) -> tuple[str, str]:
        """Take more of the text and return what is certain now, of thoughts and of the answer.

        Args:
            text: the next piece; may be empty.
            final: nothing follows.
        """
        thought: list[str] = []
        answer: list[str] = []
        self._said = False
        opened = self.opened
        for part in self.read(text, final):
            if isinstance(part, Opened):
                opened = part
                if self._calls and part.kind == "call":
                    answer.append(f"{Marks.CHANNEL}commentary to={part.to}{Marks.MESSAGE}")
            elif opened is not None and part is not None:
                told = part
                kind = "thought" if opened.kind == "thought" and self._told_apart else "content"
                if not (self._calls and opened.kind == "call"):
                    if self._fresh and self._told[kind]:
                        told = f"\n{part}"
                    self._fresh, self._told[kind] = False, True
                (thought if kind == "thought" else answer).append(told)
            elif self._calls and opened is not None and opened.kind == "call":
                answer.append(Marks.CALL)
            if part is None or isinstance(part, Opened):
                self._fresh = True
        self._said = bool(answer)
        return "".join(thought), "".join(answer)

    def read(self, text: str, final: bool = False) -> list[Opened | str | None]:
        """The same, message by message: how one opens, its text, which is never empty, None where it ends."""
        if self.opened is not None and not self._text and "<" not in text:  # as nearly always
            return [text] if text else []
        found: list[Opened | str | None] = []
        for start in range(0, len(text) or 1, _AT_ONCE):
            self._text += text[start : start + _AT_ONCE]
            found += self._read_on(final and start + _AT_ONCE >= len(text))
        return found

    def took(self, count: int) -> None:
        """To be called after each token's text: there are so many by now.

        Those of a header count as what it opens.
        """
        new, self._count = count - self._count, count
        before, after = self._within, self.opened
        self._within = after
        thinks = self._told_apart and "thought" in (before and before.kind, after and after.kind)
        if thinks:
            self.tokens += self._pending + new
        self._pending = self._pending + new if before is after is None else 0
        if new and (self._said or (before is not None and before is after and not thinks)):
            if self._answers and self._answers[-1][1] == count - new:
                self._answers[-1][1] = count
            else:
                self._answers.append([count - new, count])

    def answers(self, index: int) -> bool:
        """See `AnswerReader.answers`."""
        return any(start <= index < end for start, end in self._answers)

    def _read_on(self, final: bool) -> list[Opened | str | None]:
        found: list[Opened | str | None] = []
        while self._text:
            left = len(self._text), self._in_header, self.opened
            if self.opened is not None:
                self._in_message(found, final)
            elif self._in_header:
                self._header(found, final)
            else:
                self._between(found, final)
            if left == (len(self._text), self._in_header, self.opened):
                break
        if final:
            self._text, self._not_ours = "", 0
        return found

    def _in_message(self, found: list[Opened | str | None], final: bool) -> None:
        mark = _MARK.search(self._text)
        end = mark.start() if mark else len(self._text) - (0 if final else _begun_mark(self._text))
        if said := self._text[:end]:
            found.append(said)
        self._text = self._text[mark.end() if mark else end :]
        if mark and mark[0] not in (Marks.MESSAGE, Marks.CONSTRAIN):  # which mean nothing here
            found.append(None)
            self.opened = None
            self._behind(mark[0])

    def _between(self, found: list[Opened | str | None], final: bool) -> None:
        self._text = self._text.lstrip()
        if not self._text:
            return
        if (mark := _MARK.match(self._text)) is not None:
            self._text = self._text[mark.end() :]
            self._behind(mark[0])
        elif final or _begun_mark(self._text) != len(self._text):
            self._open(Opened("content"), found)

    def _behind(self, mark: str) -> None:
        """A mark outside of messages, which may open a header."""
        if mark == Marks.CHANNEL:  # a model left out what should stand before it
            left_out = _ROLE + mark
            self._text, self._not_ours = left_out + self._text, len(left_out)
        self._in_header = mark in (Marks.START, Marks.CHANNEL)

    def _header(self, found: list[Opened | str | None], final: bool) -> None:
        header = _header_of(self._text)
        if header is None and final and self._text.startswith(_ROLE):
            begun = self._text.removeprefix(_ROLE)
            if begun.strip() and "<" not in begun and not begun.lstrip().startswith("to="):  # nor was it one
                header = Opened("content"), len(self._text) - len(begun)
            elif (channel := _CHANNEL_AND_TEXT.match(self._text)) is not None:
                header = _opened(channel[1], ""), channel.end()
        if header is None:
            return
        opened, size = header
        self._text, self._not_ours, self._in_header = self._text[size:], 0, False
        if opened is not None:
            self._open(opened, found)

    def _open(self, opened: Opened, found: list[Opened | str | None]) -> None:
        self.opened = opened
        found.append(opened)


def _header_of(text: str) -> tuple[Opened | None, int] | None:
    """What a header says, and how much of a text is the header.

    Args:
        text: from the role on.

    Returns:
        None where more text is needed to tell. The first is None where a header ends without its message.
    """
    if _ROLE.startswith(text):
        return None
    is_assistants = text.startswith(_ROLE)
    role = _WORD.match(text, 0, _LONGEST_HEADER)
    at = len(_ROLE) if is_assistants else role.end() if role else 0
    certain = at if is_assistants else 0  # where text begins if this turns out to be no header
    channel = to = ""
    may_have_type = False
    more = len(text) <= _LONGEST_HEADER  # may be waited for
    text = text[:_LONGEST_HEADER]  # so that it is the same however much came at once
    while True:
        part = _PART.match(text, at)
        if part is None:
            rest = text[at:].lstrip()
            if more and (not rest or _begun_mark(rest) == len(rest)):
                return None
            break
        spaced, at = part.start(part.lastgroup or 0) > at, part.end()
        mark, word = part["mark"], part["word"]
        if mark == Marks.MESSAGE:
            return _opened(channel, to), at
        if mark in (Marks.START, *Marks.CLOSING):
            return None, part.start("mark")
        if mark == Marks.CONSTRAIN:
            may_have_type = True
            continue
        if more and at == len(text) and (word is None or "to=".startswith(word)):
            return None
        if mark == Marks.CHANNEL:
            name = _NAME.match(text, at)
            assert name is not None  # it may be empty
            if more and name.end() == len(text):
                return None
            channel = next((known for known in _CHANNELS if name[1].startswith(known)), name[1])
            certain = at = name.start(1) + len(channel)
        elif word is None:
            to, certain = part["to"], at
        elif may_have_type and (spaced or text[part.start() - 1] == ">"):  # of its content: json, code
            if more and at == len(text):
                return None
            may_have_type = False
            continue
        else:
            break
        may_have_type = True
    return _opened(channel, to), certain


def _opened(channel: str, to: str) -> Opened:
    of_function = to.startswith(_FUNCTIONS)
    if to not in _TO_NOBODY and (of_function or channel != "analysis"):
        return Opened("call", to.removeprefix(_FUNCTIONS))
    return Opened("thought" if channel == "analysis" else "content")


def _begun_mark(text: str) -> int:
    """How many characters at the end of a text may be the beginning of a mark, and not all of it."""
    start = text.rfind("<")
    if start < 0 or not any(mark != text[start:] and mark.startswith(text[start:]) for mark in Marks.ALL):
        return 0
    return len(text) - start
