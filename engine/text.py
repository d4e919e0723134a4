"""Text to tokens and back: chat template, incremental detokenizer, stop strings. The engine knows but ids."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import RequestError
from engine.types import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer", "TextDelta", "TextProcessor", "TokenText"]

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a UTF-8 character
_MAX_OPEN = 3  # tokens of an open UTF-8 character: it has four bytes at most
_CONTEXT = 8  # tokens kept before the text still to come: more than a character has bytes
_WINDOW = 32  # tokens decoded together before the window slides on
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how byte-fallback vocabularies spell a byte
_SAMPLE = "Hé, wörld:  1 日本 😀\n\tx"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice.

    Args:
        text: characters ready to be sent; empty while a character or a possible stop string is open.
        num_tokens: tokens of this push that belong to the output: all, or those up to and including
            the one that completed a stop string.
        stop: the stop string that ended the output, else None. It is not part of `text`.
        num_released: of an aligned detokenizer, how many of the output's tokens, those of earlier pushes
            that were held first, have no more text to come than up to here. A token that lies in the
            stop string as a whole never counts.
    """

    text: str
    num_tokens: int
    stop: str | None
    num_released: int = 0


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token by itself.

    Args:
        text: what it decodes to, with U+FFFD for a part of a character; a special token's name.
        data: its bytes; those of all tokens joined are the output's. None for a special token, which
            never becomes text.
    """

    text: str
    data: bytes | None


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
        self._token_bytes = _TokenBytes(self._bytes_of)

    @property
    def vocab_size(self) -> int:
        """Token ids the tokenizer knows, added ones included; a model's logits may be padded beyond."""
        return len(self.tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str | None = None) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it are recognised.

        Raises:
            RequestError: the text is not valid Unicode (an unpaired surrogate), with `param`.
        """
        return self._encode(text, add_special_tokens, param)

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

    def token_text(self, token_id: int) -> TokenText:
        """A token by itself, as logprobs report it; empty for an id the vocabulary does not know."""
        if token_id in self._special_ids:
            return TokenText(self.token_strings([token_id])[0], None)
        data = self._token_bytes[token_id]
        return TokenText(data.decode("utf-8", "replace"), data)

    def encode_bad_words(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """The token sequences to keep out of an output that must not hold these words, as in vLLM.

        A word is encoded as it stands and with a space before it, since it is other tokens inside a
        text; the second counts where it is as long and begins with another token.

        Raises:
            RequestError: a word without a token or with too many, more sequences than a request may have,
                or text that is not Unicode (`param` is "bad_words").
        """
        sequences: list[tuple[int, ...]] = []
        for word in words:
            bare, spaced = (
                tuple(self._encode(prefix + word.lstrip(), add_special_tokens=False, param="bad_words"))
                for prefix in ("", " ")
            )
            if not 1 <= len(bare) <= MAX_BAD_WORD_TOKENS:
                raise RequestError(
                    f"bad_words: {word!r} has {len(bare)} tokens; it must have 1 to {MAX_BAD_WORD_TOKENS}",
                    param="bad_words",
                )
            sequences.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        if len(sequences) > MAX_BAD_WORDS:
            raise RequestError(
                f"bad_words make {len(sequences)} token sequences, with and without a space before them;"
                f" at most {MAX_BAD_WORDS} are possible",
                param="bad_words",
            )
        return sequences

    def detokenizer(
        self,
        prompt_token_ids: Sequence[int],
        *,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        aligned: bool = False,
    ) -> Detokenizer:
        """A fresh incremental detokenizer for one choice.

        Args:
            prompt_token_ids: the prompt; its end decides whether the output opens with a space where a
                tokenizer drops the first one (sentencepiece). Stop strings are not searched in it.
            stop: the output ends before the first of these to be complete in it.
            min_tokens: a stop string that is complete within so many tokens is text like any other.
            skip_special_tokens: leave special tokens out of the text.
            aligned: count the tokens whose text is out (`TextDelta.num_released`).

        Raises:
            RequestError: a stop string is empty.
        """
        if "" in stop:
            raise RequestError("a stop string must not be empty", param="stop")
        skipped = self._special_ids if skip_special_tokens else frozenset()
        source: _Source
        if self._byte_level:
            source = _ByteText(self._token_bytes, skipped)
        else:
            source = _WindowText(self, prompt_token_ids, skipped)
        return Detokenizer(source, stop, min_tokens, aligned)

    @cached_property
    def _byte_level(self) -> bool:
        """True where a text's bytes are its tokens' bytes joined, whatever their neighbours."""
        from tokenizers.decoders import ByteLevel  # late, as transformers is

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not isinstance(backend.decoder, ByteLevel):
            return False
        # The tokenizer's class may decode in a way of its own.
        sample = self.encode(_SAMPLE, add_special_tokens=False)
        return b"".join(map(_spelled_bytes, self.token_strings(sample))) == self.decode(sample).encode()

    def _bytes_of(self, token_id: int) -> bytes:
        """A token's bytes as a part of some text: what a second one of it adds to the first.

        A tokenizer may drop a text's first space, so the first one may tell less.
        """
        spelling = self.token_strings([token_id])[0]
        if self._byte_level:
            return _spelled_bytes(spelling)
        once = self.decode([token_id], skip_special_tokens=False)
        if (byte := _BYTE.fullmatch(spelling)) and once != spelling:
            return bytes([int(byte[1], 16)])
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once) :].encode()

    def _encode(self, text: str, add_special_tokens: bool, param: str | None) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("the text is not valid Unicode: an unpaired surrogate", param=param) from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))


class _TokenBytes(dict[int, bytes]):
    """Each token's bytes, found when first asked for."""

    def __init__(self, find: Callable[[int], bytes]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._find(token_id)
        return data


class Detokenizer:
    """Text of one choice, as its tokens arrive. Made by `TextProcessor.detokenizer`.

    Whatever the splits into pushes, the texts joined are `decode(prompt + output)` less
    `decode(prompt)`, cut before a stop string. Cost per token does not grow with the output.
    """

    __slots__ = (
        "_aligned",
        "_fed",
        "_held",
        "_min_tokens",
        "_num_tokens",
        "_sent",
        "_source",
        "_stop",
        "_stops",
    )

    def __init__(self, source: _Source, stop: tuple[str, ...], min_tokens: int, aligned: bool) -> None:
        self._source = source
        self._stops = _StopFinder(stop) if stop else None
        self._min_tokens = min_tokens
        self._aligned = aligned
        self._stop: str | None = None
        self._num_tokens = 0
        self._fed = 0  # characters that are certain
        self._sent = 0  # of these, those returned
        self._held: deque[tuple[int, int]] = deque()  # first and last character + 1 of tokens not released

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
        if self._stops is None and not self._aligned:
            return TextDelta(self._source.feed(token_ids, final), len(token_ids), None)
        # Token by token, so that it is known which token completed what.
        texts: list[str] = []
        released = 0
        last = max(len(token_ids) - 1, 0)
        for index in range(last + 1):
            ended = final and index == last
            text, self._stop = self._take(token_ids[index : index + 1], ended)
            texts.append(text)
            released += self._release(ended)
            if self._stop is not None:
                return TextDelta("".join(texts), index + 1, self._stop, released)
        return TextDelta("".join(texts), len(token_ids), None, released)

    def _take(self, token_ids: Sequence[int], final: bool) -> tuple[str, str | None]:
        """The text that may go out after at most one more token, and the stop string this completed."""
        start, stop = self._fed, None
        text = self._source.feed(token_ids, final)
        self._fed += len(text)
        self._num_tokens += len(token_ids)
        if self._aligned and token_ids:
            self._held.append((start, self._fed + self._source.open))
        if self._stops is not None:
            text, stop = self._stops.feed(text, final, armed=self._num_tokens > self._min_tokens)
        self._sent += len(text)
        return text, stop

    def _release(self, final: bool) -> int:
        """How many more tokens are out: those that end before the next character to be sent.

        At the output's end it is all, or, of those before a stop string, all that begin before it.
        """
        count = 0
        while self._held:
            start, end = self._held[0]
            if self._stop is not None:
                if start >= self._sent:
                    break
            elif end > self._sent and not final:
                break
            self._held.popleft()
            count += 1
        return count


class _Source(Protocol):
    """Tokens in, text out that cannot change any more."""

    def feed(self, token_ids: Sequence[int], final: bool) -> str: ...

    @property
    def open(self) -> bool:
        """True while bytes of an unfinished character wait."""


class _ByteText:
    """Text of a byte-level vocabulary: the tokens' bytes joined and read as UTF-8."""

    __slots__ = ("_decoder", "_skipped", "_token_bytes")

    def __init__(self, token_bytes: _TokenBytes, skipped: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int], final: bool) -> str:
        known, skipped = self._token_bytes, self._skipped
        data = b"".join([known[token] for token in token_ids if token not in skipped])
        return self._decoder.decode(data, final)

    @property
    def open(self) -> bool:
        return bool(self._decoder.getstate()[0])


class _WindowText:
    """Text of any other vocabulary, where a token's text may depend on its neighbours.

    A window of the last tokens is decoded and what of it was sent already is left out (the idea of vLLM's
    prefix and read offsets, with characters for the second). One deviation from decoding the whole: a
    byte-fallback decoder (Llama 2) turns a whole run of byte tokens to U+FFFD when a later one is invalid;
    characters already sent stay.
    """

    __slots__ = ("_processor", "_sent", "_skipped", "_window", "open")

    def __init__(
        self, processor: TextProcessor, prompt_token_ids: Sequence[int], skipped: frozenset[int]
    ) -> None:
        self._processor = processor
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

    def feed(self, text: str, final: bool, *, armed: bool = True) -> tuple[str, str | None]:
        """Text that may go out now, and the stop string that was completed in `text`.

        While not armed, a complete one is text like any other.
        """
        for end, char in enumerate(text, 1):
            complete = [stop for index, stop in enumerate(self._stops) if self._advance(index, char)]
            if complete and armed:
                stop = max(complete, key=len)
                return (self._held + text[:end])[: -len(stop)], stop
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


def _spelled_bytes(spelling: str) -> bytes:
    """The bytes of a byte-level token; one that is not spelled in that alphabet stands for itself."""
    try:
        return bytes([_BYTE_OF[char] for char in spelling])
    except KeyError:
        return spelling.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


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
