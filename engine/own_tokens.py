"""Tokens that a grammar takes for themselves, and not for the text that they are spelled with.

For llguidance these are special tokens and, whatever the tokenizer calls them, added ones in angle brackets,
such as Qwen's `<tool_call>`. Gemma's tokens for HTML (`<b>`, `<table>`) are added ones too, but text: with a
grammar that did not take them for it a model would have to spell `<b>` in a way in which it never does.
"""

from __future__ import annotations

import json
import re
from copy import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["is_own", "own_text_ids", "tokenizer_json"]

_MARKUP = re.compile(
    r"</?(a|b|bbox|blockquote|body|caption|code|div|em|footer|h[1-6]|html|i|iframe|img|li|ol|p|pre|s|span|strong"
    r"|sub|sup|table|tbody|td|tfoot|th|thead|tr|u|ul)>"
)
_UNUSED = re.compile(r"<unused\d+>")


def is_own(tokenizer: PreTrainedTokenizerBase, name: str, *, special: bool) -> bool:
    """Whether the added token of this name stands for itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return special or (_is_bracketed(name) and (backend is None or not _is_text(backend, name)))


def own_text_ids(tokenizer: PreTrainedTokenizerBase, special: frozenset[int]) -> list[int]:
    """Such tokens that are text all the same, as Qwen's `<think>`: a grammar of text has to name them.

    Gemma 3 has six thousand of which no model ever writes one; these are left out.
    """
    return sorted(
        token_id
        for name, token_id in tokenizer.get_added_vocab().items()
        if token_id not in special and not _UNUSED.fullmatch(name) and is_own(tokenizer, name, special=False)
    )


def tokenizer_json(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> str:
    """The tokenizer as llguidance reads it.

    Args:
        vocab_size: the model's. Tokens beyond it, which some tokenizer was given without its model, are left
            out: whatever a grammar named or forced of them, the model could neither draw nor read.

    Raises:
        ValueError: it is no fast one.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("only fast tokenizers are supported")
    if backend.padding is not None or backend.truncation is not None:
        backend = copy(backend)  # which takes as long as all the rest
        backend.no_padding()
        backend.no_truncation()
    text = backend.to_str()
    start = text.index(_ADDED) + len(_ADDED)
    added: list[dict[str, Any]]
    added, end = json.JSONDecoder().raw_decode(text, start)
    kept = [each for each in added if each["special"] or not _is_text(backend, each["content"])]
    largest = max((each["id"] for each in added), default=-1)
    if vocab_size is not None and max(largest, backend.get_vocab_size() - 1) >= vocab_size:
        return _without_tokens_beyond(text, kept, vocab_size)
    return text if len(kept) == len(added) else text[:start] + json.dumps(kept) + text[end:]


def _without_tokens_beyond(text: str, added: list[dict[str, Any]], vocab_size: int) -> str:
    whole = json.loads(text)
    whole["added_tokens"] = [each for each in added if each["id"] < vocab_size]
    model = whole["model"]
    if model["type"] == "BPE":
        vocab = model["vocab"] = {name: token for name, token in model["vocab"].items() if token < vocab_size}
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
    return json.dumps(whole)


_ADDED = '"added_tokens":'


def _is_bracketed(name: str) -> bool:
    return name.startswith("<") and name.endswith(">")


def _is_text(backend: Tokenizer, name: str) -> bool:
    """Only what the vocabulary has by itself, too, can be no added token and keep its place in it."""
    return bool(_MARKUP.fullmatch(name)) and backend.model.token_to_id(name) == backend.token_to_id(name)
