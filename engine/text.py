"""Text to tokens and back: chat template, incremental detokenizer, stop strings. The engine knows but ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer", "TextDelta", "TextProcessor"]

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a UTF-8 character
_MAX_OPEN = 3  # tokens of an open UTF-8 character: it has four bytes at most
_CONTEXT = 8  # tokens kept before the text still to come: more than a character has bytes
_WINDOW = 32  # tokens decoded together before the window slides on


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice.

    Args:
        text: characters ready to be sent; empty while a character or a possible stop string is open.
        num_tokens: tokens of this push that belong to the output: all, or those up to and including
            the one that completed a stop string.
        stop: the stop string that ended the output, else None. It is not part of `text`.
    """

    text: str
    num_tokens: int
    stop: str | None


class TextProcessor:
    """A tokenizer's two directions, as a server needs them. Holds no state per request.

    Args:
        tokenizer: any transformers tokenizer; its `clean_up_tokenization_spaces` is never applied.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A first call resets truncation and padding that tokenizer.json may ask for; later calls change
        # nothing, so encoding in one thread and decoding in another is safe.
        tokenizer.encode("", verbose=False)
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._special_ids = frozenset(i for i, token in added.items() if token.special) | frozenset(
            tokenizer.all_special_ids
        )

    @property
    def vocab_size(self) -> int:
        """Token ids the tokenizer knows, added ones included; a model's logits may be padded beyond."""
        return len(self.tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it are recognised.

        Raises:
            RequestError: the text is not valid Unicode (an unpaired surrogate).
        """
        return self._encode(text, add_special_tokens, param=None)

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation as the model's own chat template writes it.

        Raises:
            RequestError: no template, or the template refuses the messages (`param` is "messages").
        """
        from jinja2 import TemplateError  # transformers' own dependency, needed only here

        if not self.tokenizer.chat_template:
            raise RequestError(
                "this model's tokenizer has no chat template; use /v1/completions", param="messages"
            )
        try:
            # Rendered and encoded apart: the template writes BOS and the like itself.
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            # The last four are what a template meets in messages it was not written for.
            reason = str(error) or type(error).__name__
            message = f"the chat template refuses the messages: {reason}"
            raise RequestError(message, param="messages") from error
        return self._encode(str(text), add_special_tokens=False, param="messages")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id (`Ġhello`); empty for an id it does not know."""
        return [token or "" for token in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def detokenizer(
        self, prompt_token_ids: Sequence[int], *, stop: tuple[str, ...] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh incremental detokenizer for one choice.

        Args:
            prompt_token_ids: the prompt; its end decides whether the output opens with a space where a
                tokenizer drops the first one (sentencepiece). Stop strings are not searched in it.
            stop: the output ends before the first of these to be complete in it.
            skip_special_tokens: leave special tokens out of the text.

        Raises:
            RequestError: a stop string is empty.
        """
        if "" in stop:
            raise RequestError("a stop string must not be empty", param="stop")
        return Detokenizer(self, prompt_token_ids, stop, skip_special_tokens)

    def skipped_ids(self, skip_special_tokens: bool) -> frozenset[int]:
        """Ids that never become text."""
        return self._special_ids if skip_special_tokens else frozenset()

    def _encode(self, text: str, add_special_tokens: bool, param: str | None) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("the text is not valid Unicode: an unpaired surrogate", param=param) from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))


class Detokenizer:
    """Text of one choice, as its tokens arrive. Made by `TextProcessor.detokenizer`.

    Whatever the splits into pushes, the texts joined are `decode(prompt + output)` less
    `decode(prompt)`, cut before a stop string. Cost per token does not grow with the output: a window
    of the last tokens is decoded and what of it was sent already is left out (the idea of vLLM's
    prefix and read offsets, with characters for the second). One deviation: a byte-fallback decoder
    (Llama 2) turns a whole run of byte tokens to U+FFFD when a later one is invalid; characters already
    sent stay.
    """

    __slots__ = ("_processor", "_sent", "_skipped", "_stop", "_stops", "_window")

    def __init__(
        self,
        processor: TextProcessor,
        prompt_token_ids: Sequence[int],
        stop: tuple[str, ...],
        skip_special_tokens: bool,
    ) -> None:
        self._processor = processor
        self._skipped = processor.skipped_ids(skip_special_tokens)
        self._stops = _StopFinder(stop)
        self._stop: str | None = None
        self._window = self._prompt_context(prompt_token_ids)
        self._sent = len(self._decode(self._window))  # characters of the window's text not to send again

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
        before = self._window
        self._window = before + self._kept(token_ids)
        certain = self._certain(self._window)
        ready, match = self._stops.feed((certain.flushed if final else certain.text)[self._sent :], final)
        if match is not None:
            self._stop = match.stop
            return TextDelta(ready, self._tokens_until(self._sent + match.end, before, token_ids), match.stop)
        self._sent = max(self._sent, len(certain.text))
        if len(self._window) > _WINDOW:
            self._slide(certain)
        return TextDelta(ready, len(token_ids), None)

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

    def _tokens_until(self, end: int, window: list[int], token_ids: Sequence[int]) -> int:
        """How many of `token_ids`, put after `window`, it takes to be certain of `end` characters."""
        for count in range(1, len(token_ids)):
            if len(self._certain(window + self._kept(token_ids[:count])).text) >= end:
                return count
        return len(token_ids)

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
        return self._processor.decode(token_ids, skip_special_tokens=bool(self._skipped))


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


@dataclass(frozen=True, slots=True)
class _Match:
    stop: str
    end: int  # characters of the text just fed up to the match's end


class _StopFinder:
    """The first stop string to be complete in a stream of characters; of two at once, the longer.

    Knuth-Morris-Pratt, one automaton per string: the result does not depend on how the text is cut, and
    the longest match in progress is exactly the text to hold back.
    """

    __slots__ = ("_borders", "_held", "_matched", "_stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string in progress
        self._held = ""

    def feed(self, text: str, final: bool) -> tuple[str, _Match | None]:
        """Text that may go out now, and the match if one was completed in `text`."""
        if not self._stops:
            return text, None
        for end, char in enumerate(text, 1):
            complete = [stop for index, stop in enumerate(self._stops) if self._advance(index, char)]
            if complete:
                stop = max(complete, key=len)
                return (self._held + text[:end])[: -len(stop)], _Match(stop, end)
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
        self._matched[index] = matched
        return matched == len(stop)


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
