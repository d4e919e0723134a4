"""Text to tokens and back: encoding, chat template, single tokens. The engine knows but ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from engine import faults
from engine.chat_template import check_template, check_variables, reads_tools, variables, with_reasoning
from engine.detokenizer import ByteText, Detokenizer, StopFinder, TextSource, WindowText
from engine.errors import RequestError
from engine.harmony import is_harmony
from engine.harmony_prompt import expected, with_preambles_in_thoughts
from engine.own_tokens import is_own, own_text_ids
from engine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from engine.thought import Readable
from engine.token_bytes import FALLBACK_BYTE, Spelling, spelling_of
from engine.tool_prompt import (
    A_CALL,
    WITH_A_CALL,
    has_calls,
    in_plain_messages,
    in_some_form,
    with_calls_as_text,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["ROLES", "TextProcessor", "TokenText"]

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Whom a message of a conversation may be from."""

_CHANGED = (
    "continue_final_message: the chat template does not write the last message as it is, so no answer can go "
    "on with it; of one that begins with a thought, give that as its reasoning_content"
)
_SAMPLE = "Hé, wörld:  1 日本 😀\n\tx"


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
        chat_template: Jinja source in place of the tokenizer's own template.

    Raises:
        ModelError: the chat template is not valid Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._chat_template = chat_template
        for template in (self.chat_template, self.chat_template_for(tools=True)):
            if template is not None:
                check_template(template)
        # A first call resets truncation and padding that tokenizer.json may ask for; later calls change
        # nothing, so encoding in one thread and decoding in another is safe.
        tokenizer.encode("", verbose=False)
        self._plain = _plain_backend(tokenizer)
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._special_ids = frozenset(i for i, token in added.items() if token.special) | frozenset(
            tokenizer.all_special_ids
        )
        self._token_bytes = _TokenBytes(self._bytes_of)

    def __reduce__(self) -> tuple[type[TextProcessor], tuple[PreTrainedTokenizerBase, str | None]]:
        return TextProcessor, (self.tokenizer, self._chat_template)

    @property
    def vocab_size(self) -> int:
        """Token ids the tokenizer knows, added ones included; a model's logits may be padded beyond."""
        return len(self.tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str | None = None) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it are recognised.

        Raises:
            RequestError: the text is not valid Unicode (an unpaired surrogate), with `param`.
        """
        self.check_text(text, param)
        return self.encode_checked([text], add_special_tokens=add_special_tokens)[0]

    def check_text(self, text: str, param: str | None = None) -> None:
        """Raises RequestError if the text is not valid Unicode (an unpaired surrogate), with `param`."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("the text is not valid Unicode: an unpaired surrogate", param=param) from error
        faults.visit("encode")

    def encode_checked(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, which `check_text` found right; several are spread over the cores."""
        if self._plain is None:
            options = {"add_special_tokens": add_special_tokens, "verbose": False}
            return [list(self.tokenizer.encode(text, **options)) for text in texts]
        # A third faster: no offsets, and none of transformers' options.
        return [
            list(found.ids)
            for found in self._plain.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        ]

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation as the chat template writes it.

        A role `developer` that the template does not know is written as `system`, and tools and calls that
        it does not know, or not in this form, as `tool_prompt` says.

        Args:
            messages: `{"role", "content"}` with text as content; an assistant's may have `tool_calls` with
                arguments as objects, and `reasoning_content`, its thought, which goes to the template under
                the name that it reads; one of role `tool` has what a call returned.
            tools: `{"type": "function", "function": {name, description, parameters}}`.
            add_generation_prompt: end with what opens an answer.
            continue_final_message: leave the last message open, so that the output goes on with it.
            add_special_tokens: add the tokenizer's BOS and the like to what the template writes.
            template_kwargs: further variables of the template.

        Raises:
            RequestError: as `render_chat`, and as `encode` (`param` is "messages").
        """
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode(text, add_special_tokens=add_special_tokens, param="messages")

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the chat template writes it; the arguments are `encode_chat`'s.

        Raises:
            RequestError: no template, a variable that the template does not have (`param` is
                "chat_template_kwargs"), the template refuses the messages (`param` is "messages"), or writes
                the last one so that nothing can go on with it ("continue_final_message").
        """
        template = self.chat_template_for(tools=bool(tools))
        if not template:
            raise RequestError(
                "this model's tokenizer has no chat template; use /v1/completions, or start the server with "
                "--chat-template",
                param="messages",
            )
        if "developer" not in template:
            messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
        refusals, others = _refusals(), []
        try:
            if is_harmony(template):
                messages, tools = expected(messages, tools)
                others.append(with_preambles_in_thoughts)
            elif not reads_tools(template) and (tools or has_calls(messages)):
                messages, tools = in_plain_messages(messages, tools), ()
            elif has_calls(messages) and self._leaves_out_calls(template, tools):
                messages = with_calls_as_text(messages, template)
            messages = with_reasoning(template, messages)
            if template_kwargs:
                check_variables(template, template_kwargs)
            write = partial(
                self._written,
                template,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=template_kwargs,
            )
            return in_some_form(write, messages, refusals, others) if has_calls(messages) else write(messages)
        except refusals as error:
            if str(error).startswith("continue_final_message"):  # transformers', of what it made of them
                raise RequestError(_CHANGED, param="continue_final_message") from error
            reason = str(error) or type(error).__name__
            message = f"the chat template refuses the messages: {reason}"
            raise RequestError(message, param="messages") from error
        except RecursionError as error:  # a template writes tools and arguments as JSON
            raise RequestError("the messages or tools are nested too deeply", param="messages") from error

    def _leaves_out_calls(self, template: str, tools: Sequence[Mapping[str, Any]]) -> bool:
        if "tool_calls" in template:
            return False
        try:  # it may write messages as they are
            return A_CALL not in self._written(template, WITH_A_CALL, tools=tools)
        except _refusals():
            return False

    def _written(
        self,
        template: str,
        messages: list[dict[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """What the template makes of these very messages."""
        # Rendered and encoded apart: the template writes BOS and the like itself.
        usual = not (continue_final_message or template_kwargs or tools) and _are_usual(messages)
        if usual and (compiled := self._compiled) is not None:
            # What transformers does for all others takes as long again.
            usual_text = compiled(template).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
            return str(usual_text)
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=list(tools) or None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(template_kwargs or {}),
        )
        return str(text)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the template in use; of a tokenizer's several, the default one."""
        return self.chat_template_for(tools=False)

    def chat_template_for(self, *, tools: bool) -> str | None:
        """Jinja source of the template in use, which some tokenizers have another of for tools."""
        if self._chat_template is not None:
            return self._chat_template
        own = self.tokenizer.chat_template
        if isinstance(own, dict):
            own = (tools and own.get("tool_use")) or own.get("default")
        return str(own) if own else None

    def template_variables(self, *, tools: bool) -> frozenset[str]:
        """What a request may set in the template in use."""
        template = self.chat_template_for(tools=tools)
        return variables(template) if template else frozenset()

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

    def token_text(self, token_id: int, *, special_is_text: bool = False) -> TokenText:
        """A token by itself, as logprobs report it; empty for an id the vocabulary does not know.

        Args:
            token_id: any id of the model.
            special_is_text: the output has its special tokens' names in it.
        """
        if token_id in self._special_ids:
            name = self.token_strings([token_id])[0]
            return TokenText(name, name.encode() if special_is_text else None)
        data = self._token_bytes[token_id]
        return TokenText(data.decode("utf-8", "replace"), data)

    def own_token_id(self, name: str) -> int | None:
        """The token that a grammar takes for this and for no text that is spelled so, or None."""
        token_id = self.tokenizer.get_added_vocab().get(name)
        if token_id is None:
            return None
        own = is_own(self.tokenizer, name, special=token_id in self._special_ids)
        return token_id if own else None

    @property
    def own_text_ids(self) -> list[int]:
        """Such tokens that are text all the same, as Qwen's `<think>`: a grammar of text has to name them."""
        return own_text_ids(self.tokenizer, self._special_ids)

    def encode_bad_words(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """The token sequences to keep out of an output that must not hold these words.

        A word is encoded as it stands and with a space before it, since it is other tokens inside a text;
        the second counts where it does not end with the first. vLLM leaves it out where it is not as long,
        and so lets ` Paris` pass, one token of Yi's, where `Paris` is two.

        Raises:
            RequestError: a word without a token or with too many, more sequences than a request may have,
                or text that is not Unicode (`param` is "bad_words").
        """
        sequences: list[tuple[int, ...]] = []
        for word in words:
            bare, spaced = (
                tuple(self.encode(prefix + word.lstrip(), add_special_tokens=False, param="bad_words"))
                for prefix in ("", " ")
            )
            if not 1 <= len(bare) <= MAX_BAD_WORD_TOKENS:
                raise RequestError(
                    f"bad_words: {word!r} has {len(bare)} tokens; it must have 1 to {MAX_BAD_WORD_TOKENS}",
                    param="bad_words",
                )
            sequences.append(bare)
            if len(spaced) <= MAX_BAD_WORD_TOKENS and spaced[-len(bare) :] != bare:
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
        shown: Set[int] = frozenset(),
        include_stop: bool = False,
        aligned: bool = False,
        thought: Readable | None = None,
    ) -> Detokenizer:
        """A fresh incremental detokenizer for one choice.

        Args:
            prompt_token_ids: the prompt; its end decides whether the output opens with a space where a
                tokenizer drops the first one (sentencepiece). Stop strings are not searched in it.
            stop: the output ends before the first of these to be complete in it.
            min_tokens: a stop string that is complete within so many tokens is text like any other.
            skip_special_tokens: leave special tokens out of the text.
            shown: of those, the ones that are text all the same.
            include_stop: the stop string itself is the end of the text.
            aligned: tell where the text of each token begins (`TextDelta.starts`).
            thought: tell what the output may begin with from its text (`TextDelta.thought`).

        Raises:
            RequestError: a stop string is empty.
        """
        if "" in stop:
            raise RequestError("a stop string must not be empty", param="stop")
        skipped = self._special_ids - shown if skip_special_tokens else frozenset()
        source: TextSource
        if (spelling := self._spelling) is not None:
            drops = spelling.drops_space and not any(
                self._token_bytes[token] for token in prompt_token_ids if token not in skipped
            )
            source = ByteText(self._token_bytes, skipped, spelling.errors, drops_space=drops)
        else:
            source = WindowText(self.decode, prompt_token_ids, skipped)
        stops = StopFinder(stop, include_stop) if stop else None
        reader = thought.reader() if thought is not None else None
        return Detokenizer(source, stops, min_tokens, aligned, reader)

    @cached_property
    def _spelling(self) -> Spelling | None:
        """How tokens spell bytes that, joined, are a text's; None where that is not all there is to it."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or (spelling := spelling_of(backend.decoder)) is None:
            return None
        # The tokenizer's class may decode in a way of its own.
        sample = self.encode(_SAMPLE, add_special_tokens=False)
        data = b"".join(map(spelling.bytes_of, self.token_strings(sample)))
        if spelling.drops_space:
            data = data.removeprefix(b" ")
        # Bytes that are no character too: DeepSeek Coder's has tokens for `ö` that stand for a byte.
        return spelling if data.decode("utf-8", spelling.errors) == self.decode(sample) else None

    @cached_property
    def _compiled(self) -> Callable[[str], Any] | None:
        """What compiles a template and keeps it, a private function of transformers'; None without one, or
        where the tokenizer's class has a way of its own to write a conversation."""
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils

        if type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        return getattr(chat_template_utils, "_compile_jinja_template", None)

    def _bytes_of(self, token_id: int) -> bytes:
        """A token's bytes as a part of some text: what a second one of it adds to the first.

        A tokenizer may drop a text's first space, so the first one may tell less.
        """
        spelling = self.token_strings([token_id])[0]
        if self._spelling is not None:
            return self._spelling.bytes_of(spelling)
        once = self.decode([token_id], skip_special_tokens=False)
        if (byte := FALLBACK_BYTE.fullmatch(spelling)) and once != spelling:
            return bytes([int(byte[1], 16)])
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once) :].encode()


def _refusals() -> tuple[type[Exception], ...]:
    """What a template raises: of its own, or where it meets messages that it was not written for."""
    from jinja2 import TemplateError  # transformers' own dependency, needed only here

    return (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _are_usual(messages: list[dict[str, Any]]) -> bool:
    """Whether transformers would give the template these messages as they are."""
    plain = all(
        len(message) == 2 and type(message.get("role")) is type(message.get("content")) is str
        for message in messages
    )
    return plain and bool(messages)


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What encodes for `tokenizer`, where its class adds nothing of its own to that."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    as_usual = all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, tokenizer)
        for name in ("encode", "_encode_plus")
    )
    return tokenizer.backend_tokenizer if as_usual else None


class _TokenBytes(dict[int, bytes]):
    """Each token's bytes, found when first asked for."""

    def __init__(self, find: Callable[[int], bytes]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> bytes:
        data = self[token_id] = self._find(token_id)
        return data
