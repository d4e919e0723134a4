"""What a model thinks before it answers, told from the answer as its text comes.

However the text is cut into pieces, thought and answer are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["AnswerReader", "Place", "Readable", "Thought", "ThoughtReader"]

Place = Literal["within", "before", "behind"]
"""Where an answer begins: within a thought, before one that may come, or behind it."""


class Readable(Protocol):
    """Where an answer stands in the thought before it, whatever its marks."""

    def reader(self) -> AnswerReader | None:
        """For one answer; None where nothing of it is thought."""


class AnswerReader(Protocol):
    """Tells thought from answer in one text, as it comes."""

    @property
    def over(self) -> bool:
        """True once all that comes is answer."""

    @property
    def held(self) -> int:
        """Characters that came, of which nothing is known yet."""

    @property
    def tokens(self) -> int:
        """Those of thoughts so far."""

    def feed(self, text: str, final: bool = False) -> tuple[str, str]:
        """Take more of the text and return what is certain now, of the thought and of the answer."""

    def took(self, count: int) -> None:
        """To be called after the text of each token: there are so many by now."""

    def answers(self, index: int) -> bool:
        """Whether the token of this number, whose text is certain, is part of the answer's text."""


@dataclass(frozen=True, slots=True)
class Thought:
    """Where an answer stands in the thought before it.

    Args:
        begin: what opens a thought; not empty.
        end: what closes it; not empty.
        place: at the answer's start, which is where its prompt ends: within a thought, before one that may
            come, or behind it, so that none is looked for.
    """

    begin: str
    end: str
    place: Place

    def reader(self) -> ThoughtReader | None:
        """For one answer; None where nothing of it is thought."""
        return None if self.place == "behind" else ThoughtReader(self.begin, self.end, self.place == "within")


class ThoughtReader:
    """Tells thought from answer in one text.

    A thought is what stands between `begin`, at the text's beginning, and the first `end` behind that. White
    space around either is part of neither side. Where nothing closes it, the rest of the text is thought;
    where nothing opens one, all of it is answer.

    Args:
        begin: what opens it; not empty.
        end: what closes it; not empty.
        within: it is open already. Models that open it once more are not taken at their word.

    Attributes:
        within: the text stands in a thought.
        closed: it has stood in one.
        held: characters that came, of which nothing is known yet.
        tokens: up to the one that closed the thought; all so far, while it is open.
    """

    def __init__(self, begin: str, end: str, within: bool) -> None:
        self._begin, self._end = begin, end
        self._step: Literal["opening", "thinking", "closed", "answering"] = "opening"
        self._spaces: list[str] = []  # that came, and are told if more of the same side follows
        self._num_spaces = 0
        self._mark = ""  # what came behind them, and may be the beginning of a mark
        self._said = False  # some of the thought
        self.held = 0
        self.within, self.closed = within, False
        self.tokens = 0
        self._counted = False  # all of the thought's

    @property
    def over(self) -> bool:
        """True once all that comes is answer."""
        return self._step == "answering"

    def feed(self, text: str, final: bool = False) -> tuple[str, str]:
        """Take more of the text and return what is certain now, of the thought and of the answer.

        Args:
            text: the next piece; may be empty.
            final: nothing follows.
        """
        text, self._mark = self._mark + text, ""
        thought = ""
        if self._step == "opening":
            text = self._opened(text, final)
        if self._step == "thinking":
            thought, text = self._thought(text, final)
        if self._step == "closed" and (text := text.lstrip()):
            self._step = "answering"
        self.held = len(self._mark) + self._num_spaces
        return thought, text

    def took(self, count: int) -> None:
        """See `AnswerReader.took`."""
        if not self._counted and (self.within or self.closed):
            self.tokens, self._counted = count, self.closed

    def answers(self, index: int) -> bool:
        """See `AnswerReader.answers`."""
        return index >= self.tokens

    def _opened(self, text: str, final: bool) -> str:
        """What is left to be read; nothing while it may be the opening."""
        start = text.lstrip()
        self._hold(text[: len(text) - len(start)])
        if start.startswith(self._begin):
            start, self.within = start.removeprefix(self._begin), True
        elif not final and self._begin.startswith(start):
            self._mark = start
            return ""
        self._step = "thinking" if self.within else "answering"
        return start if self.within else self._with_spaces(start)

    def _thought(self, text: str, final: bool) -> tuple[str, str]:
        """More of the thought, and what stands behind it."""
        thought, end, behind = text.partition(self._end)
        if end:
            self._step, self.within, self.closed = "closed", False, True
        elif not final:
            kept = len(thought) - overlap(thought, self._end)
            thought, self._mark = thought[:kept], thought[kept:]
        said = thought.rstrip()
        spaces = thought[len(said) :]
        if said:
            said = self._with_spaces(said)
            said = said if self._said else said.lstrip()
            self._said = True
        self._hold(spaces)
        if end or final:
            self._with_spaces("")  # which nobody gets
        return said, behind

    def _hold(self, spaces: str) -> None:
        self._spaces.append(spaces)
        self._num_spaces += len(spaces)

    def _with_spaces(self, text: str) -> str:
        """The text behind the spaces that are held, and from here on are not."""
        text = "".join([*self._spaces, text])
        self._spaces.clear()
        self._num_spaces = 0
        return text


def overlap(text: str, begin: str) -> int:
    """How many characters at the end of `text` may be the beginning of `begin`, and not all of it."""
    if begin[0] not in text[1 - len(begin) :]:  # as nearly always
        return 0
    sizes = range(min(len(text), len(begin) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(begin[:size])), 0)
