"""From the tokens of one choice to its text, as they arrive: thought, stop strings, where tokens begin."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.thought import AnswerReader

__all__ = ["ByteText", "Decode", "Detokenizer", "StopFinder", "TextDelta", "TextSource", "WindowText"]

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a UTF-8 character
_MAX_OPEN = 3  # tokens of an open UTF-8 character: it has four bytes at most
_CONTEXT = 8  # tokens kept before the text still to come: more than a character has bytes
_WINDOW = 32  # tokens decoded together before the window slides on


class Decode(Protocol):
    """A tokenizer's decoding: `TextProcessor.decode`."""

    def __call__(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


@dataclass(slots=True)  # a frozen one takes three times as long to make
class TextDelta:
    """New text of one choice.

    Args:
        text: characters ready to be sent; empty while a character or a possible stop string is open.
        num_tokens: tokens of this push that belong to the output: all, or those up to and including
            the one that completed a stop string.
        stop: the stop string that ended the output, else None. It is part of `text` only if asked for.
        starts: of an aligned detokenizer, the tokens of the output, those of earlier pushes that were held
            first, that have no more text to come than up to here: for each the character of the output,
            a thought and its marks included, at which its text begins. A token that lies in a stop string
            that is left out never counts.
        thought: more of the thought before the text, where one is read.
        answers: where a thought is read, for each of `starts` whether the token is part of the text and not
            of a thought or its marks.
        turns: thought and text by turns, where they came otherwise than all thought before all text.
    """

    text: str
    num_tokens: int
    stop: str | None
    starts: tuple[int, ...] = ()
    thought: str = ""
    answers: tuple[bool, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()


class Detokenizer:
    """Text of one choice, as its tokens arrive. Made by `TextProcessor.detokenizer`.

    Whatever the splits into pushes, the texts joined are `decode(prompt + output)` less
    `decode(prompt)`, cut before a stop string, and without a thought, where that is read: there stop strings
    are text like any other. Cost per token does not grow with the output.
    """

    __slots__ = (
        "_aligned",
        "_fed",
        "_held",
        "_min_tokens",
        "_num_released",
        "_num_tokens",
        "_reader",
        "_sent",
        "_source",
        "_stop",
        "_stops",
        "_thought",
    )

    def __init__(
        self,
        source: TextSource,
        stops: StopFinder | None,
        min_tokens: int,
        aligned: bool,
        thought: AnswerReader | None = None,
    ) -> None:
        self._source = source
        self._stops = stops
        self._thought = self._reader = thought  # the first while there may be more of it
        self._min_tokens = min_tokens
        self._aligned = aligned
        self._stop: str | None = None
        self._num_tokens = 0
        self._fed = 0  # characters that are certain
        self._sent = 0  # of these, those returned, or known to be none of what is returned
        self._held: deque[tuple[int, int]] = deque()  # first and last character + 1 of tokens not released
        self._num_released = 0

    @property
    def thought_tokens(self) -> int:
        """Of the output, those of thoughts and their marks so far."""
        return 0 if self._reader is None else self._reader.tokens

    def push(self, token_ids: Sequence[int], *, final: bool = False) -> TextDelta:
        """Take the next tokens and return the text that is certain now.

        Args:
            token_ids: the output's next tokens, any number.
            final: nothing follows: an open character comes as U+FFFD, held text is let go.

        Returns:
            The delta; once a stop string was found, every further delta is empty and names it.
        """
        if self._stop is not None:
            return TextDelta("", 0, self._stop)
        if self._stops is None and not self._aligned and self._thought is None:
            return TextDelta(self._source.feed(token_ids, final), len(token_ids), None)
        # Token by token, so that it is known which token completed what.
        turns: list[tuple[list[str], list[str]]] = [([], [])]
        starts: list[int] = []
        answers: list[bool] = []
        count, last = len(token_ids), max(len(token_ids) - 1, 0)
        for index in range(last + 1):
            ended = final and index == last
            thought, text, self._stop = self._take(token_ids[index : index + 1], ended)
            if thought and turns[-1][1]:
                turns.append(([], []))
            if thought:
                turns[-1][0].append(thought)
            if text:
                turns[-1][1].append(text)
            starts += self._release(ended, answers)
            if self._stop is not None:
                count = index + 1
                break
        told = [("".join(thoughts), "".join(texts)) for thoughts, texts in turns]
        return TextDelta(
            told[0][1] if len(told) == 1 else "".join(text for _, text in told),
            count,
            self._stop,
            tuple(starts),
            told[0][0] if len(told) == 1 else "".join(thought for thought, _ in told),
            tuple(answers),
            tuple(told) if len(told) > 1 else (),
        )

    def _take(self, token_ids: Sequence[int], final: bool) -> tuple[str, str, str | None]:
        """What may go out after at most one more token, of thought and text; the stop string it completed."""
        start, thought, stop = self._fed, "", None
        text = self._source.feed(token_ids, final)
        self._fed += len(text)
        self._num_tokens += len(token_ids)
        if self._aligned and token_ids:
            self._held.append((start, self._fed + self._source.open))
        if self._thought is not None:
            thought, text = self._think(self._thought, text, final)
        if self._stops is not None:
            text, stop = self._stops.feed(text, final, armed=self._num_tokens > self._min_tokens)
        self._sent += len(text)
        return thought, text, stop

    def _think(self, reader: AnswerReader, text: str, final: bool) -> tuple[str, str]:
        """More of the thought, and of the text behind it."""
        read = reader.held + len(text)
        thought, text = reader.feed(text, final)
        reader.took(self._num_tokens)
        self._sent += read - reader.held - len(text)
        if reader.over:
            self._thought = None
        return thought, text

    def _release(self, final: bool, answers: list[bool]) -> list[int]:
        """Where the further tokens begin that are out: those that end before the next character to be sent.

        To `answers` goes whether each is part of the text.
        At the output's end it is all, or, of those before a stop string, all that begin before it.
        """
        starts = []
        while self._held:
            start, end = self._held[0]
            if self._stop is not None:
                if start >= self._sent:
                    break
            elif end > self._sent and not final:
                break
            self._held.popleft()
            starts.append(start)
            if self._reader is not None:
                answers.append(self._reader.answers(self._num_released))
            self._num_released += 1
        return starts


class TextSource(Protocol):
    """Tokens in, text out that cannot change any more."""

    def feed(self, token_ids: Sequence[int], final: bool) -> str: ...

    @property
    def open(self) -> bool:
        """True while bytes of an unfinished character wait."""


class ByteText:
    """Text of a vocabulary whose tokens spell bytes: these joined and read as UTF-8.

    One deviation from decoding the whole: a byte-fallback decoder (Llama 2, Gemma) turns all of a run of byte
    tokens to U+FFFD when one of them is invalid; here the characters of the run stay, as some may be sent.

    Args:
        token_bytes: of each token.
        skipped: tokens that are left out.
        errors: see `Spelling`.
        drops_space: the text's first space, where it begins with one, is left out.
    """

    __slots__ = ("_decoder", "_drops_space", "_skipped", "_token_bytes", "open")

    def __init__(
        self,
        token_bytes: Mapping[int, bytes],
        skipped: frozenset[int],
        errors: str = "replace",
        *,
        drops_space: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._drops_space = drops_space
        self.open = False

    def feed(self, token_ids: Sequence[int], final: bool) -> str:
        known, skipped = self._token_bytes, self._skipped
        data = b"".join([known[token] for token in token_ids if token not in skipped])
        if self._drops_space and data:
            data, self._drops_space = data.removeprefix(b" "), False
        if not self.open and data.isascii():  # whole characters: the decoder has nothing to remember
            return data.decode("ascii")
        text = self._decoder.decode(data, final)
        self.open = bool(self._decoder.getstate()[0])
        return text


class WindowText:
    """Text of any other vocabulary, where a token's text may depend on its neighbours.

    A window of the last tokens is decoded and what of it was sent already is left out (the idea of vLLM's
    prefix and read offsets, with characters for the second). One deviation from decoding the whole: where a
    decoder turns a whole run of byte tokens to U+FFFD when a later one is invalid, characters already sent
    stay. Tokens behind bytes that are no character may seem to begin where these do.
    """

    __slots__ = ("_decode_ids", "_sent", "_skipped", "_window", "open")

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int], skipped: frozenset[int]) -> None:
        self._decode_ids = decode
        self._skipped = skipped
        self._window = self._prompt_context(prompt_token_ids)
        self._sent = len(self._decode(self._window))  # characters of the window's text not to send again
        self.open = False

    def feed(self, token_ids: Sequence[int], final: bool) -> str:
        self._window = self._window + self._kept(token_ids)
        certain = self._certain(self._window)
        self.open = len(certain.flushed) > len(certain.text)
        text = (certain.flushed if final else certain.text)[self._sent :]
        self._sent = max(self._sent, len(certain.text))
        if len(self._window) > _WINDOW:
            self._slide(certain)
        return text

    def _certain(self, token_ids: list[int]) -> _Certain:
        """What of the text of `token_ids` stands, whatever follows: all but a character still open."""
        text = self._decode(token_ids)
        if not text.endswith(_REPLACEMENT):
            return _Certain(text, text, len(token_ids), text)
        for opened in range(1, _MAX_OPEN + 1):
            # Not a part of `text`: a byte-fallback decoder replaces the closed characters before it too.
            closed = self._decode(token_ids[:-opened])
            if not closed.endswith(_REPLACEMENT):
                return _Certain(closed, text, len(token_ids) - opened, closed)
        # Bytes that are no character, and after them perhaps an open one.
        trailing = len(text) - len(text.rstrip(_REPLACEMENT))
        return _Certain(text[: len(text) - min(trailing, _MAX_OPEN)], text, len(token_ids), text)

    def _slide(self, certain: _Certain) -> None:
        """Forget the window's beginning, where the rest decodes to the same text without it.

        It does not where the cut parts a character's bytes. A character already sent must remain, since
        a tokenizer may drop the first space and an open character must keep all its bytes (no more than
        `_MAX_OPEN` characters at the end are not sent). If every cut fails, a later push tries again.
        """
        unsent = len(certain.decoded) - self._sent
        for start in _cuts(certain.count, _CONTEXT):
            tail = self._decode(self._window[start : certain.count])
            if len(tail) > unsent and certain.decoded.endswith(tail):
                self._window, self._sent = self._window[start:], len(tail) - unsent
                return

    def _prompt_context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, enough to have some text; without them if it ends in an open character.

        The output must not be read as the rest of that character: it is to be the same after any prompt.
        """
        size = _CONTEXT
        while size < len(prompt_token_ids):
            for start in _cuts(len(prompt_token_ids), size):
                context = self._kept(prompt_token_ids[start:])
                text = self._decode(context)
                if text and not text.endswith(_REPLACEMENT):
                    return context
            size *= 2
        context = self._kept(prompt_token_ids)
        return [] if self._decode(context).endswith(_REPLACEMENT) else context

    def _kept(self, token_ids: Sequence[int]) -> list[int]:
        # Skipped tokens are dropped here already: a long run of them would never let the window slide.
        return [token for token in token_ids if token not in self._skipped]

    def _decode(self, token_ids: list[int]) -> str:
        return self._decode_ids(token_ids, skip_special_tokens=False)  # those to leave out are not here


def _cuts(length: int, size: int) -> range:
    """Where to cut the last `size` of `length` tokens off: one of these places is between characters."""
    start = max(0, length - size)
    return range(start, min(start + _MAX_OPEN, length) + 1)


@dataclass(frozen=True, slots=True)
class _Certain:
    text: str  # cannot change any more
    flushed: str  # the text if nothing follows
    count: int  # tokens of the window behind `decoded`
    decoded: str  # `text`, or that and bytes that may be an open character


class StopFinder:
    """The first stop string to be complete in a stream of characters; of two at once, the longer.

    Knuth-Morris-Pratt, one automaton per string: the result does not depend on how the text is cut, and
    the longest match in progress is exactly the text to hold back.
    """

    __slots__ = ("_borders", "_held", "_include", "_matched", "_stops")

    def __init__(self, stops: tuple[str, ...], include: bool) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._include = include
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string in progress
        self._held = ""

    def feed(self, text: str, final: bool, *, armed: bool = True) -> tuple[str, str | None]:
        """Text that may go out now, and the stop string that was completed in `text`.

        While not armed, a complete one is text like any other. Asked to include it, it ends the text.
        """
        for end, char in enumerate(text, 1):
            complete = [stop for index, stop in enumerate(self._stops) if self._advance(index, char)]
            if complete and armed:
                stop = max(complete, key=len)
                whole = self._held + text[:end]
                return whole if self._include else whole[: -len(stop)], stop
        pending = self._held + text
        hold = 0 if final else max(self._matched)
        self._held = pending[len(pending) - hold :]
        return pending[: len(pending) - hold], None

    def _advance(self, index: int, char: str) -> bool:
        stop, matched = self._stops[index], self._matched[index]
        while matched and stop[matched] != char:
            matched = self._borders[index][matched - 1]
        if stop[matched] == char:
            matched += 1
        complete = matched == len(stop)
        self._matched[index] = self._borders[index][-1] if complete else matched
        return complete


def _borders(pattern: str) -> list[int]:
    """For each prefix of `pattern`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
