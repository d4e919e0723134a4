"""The tokenizer that a GGUF describes in its metadata, as a Hugging Face one.

A GGUF has the vocabulary, the merges or scores, and the name of the way text is split; the rest of a
tokenizer.json follows from these, as llama.cpp's `llama-vocab.cpp` has it for each name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["build_tokenizer", "tokenizer_config"]

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Kinds of tokens (gguf.TokenType) that are not ordinary pieces."""

_SPACE = "\u2581"  # how sentencepiece writes one

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLITS: dict[str, str | None] = {
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-2": None,  # GPT-2's own pattern, which `ByteLevel` has built in
    "smollm": None,  # the same, after every digit is set apart
}
"""For each `tokenizer.ggml.pre` of a byte-level BPE, where text is cut before merging."""

_WHOLE_WORDS = ("llama-bpe", "tekken")
"""Where a word that is in the vocabulary is taken whole, whatever the merges would make of it."""

_BOS_BY_DEFAULT = ("llama-bpe", "tekken")


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """From a GGUF's metadata.

    Raises:
        UnsupportedModelError: the kind of tokenizer is not covered.
        LookupError, ValueError: metadata is missing or does not fit.
    """
    kind = fields["tokenizer.ggml.model"]
    if kind == "gpt2":
        tokenizer = _byte_level(fields)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, gemma=fields["general.architecture"].startswith("gemma"))
    else:
        raise UnsupportedModelError(f"GGUF tokenizer {kind!r} is not supported; supported: gpt2, llama")
    _add_tokens(tokenizer, fields)
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if _adds_bos(fields) and bos is not None:
        from tokenizers import processors

        token = fields["tokenizer.ggml.tokens"][bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B:1", special_tokens=[(token, bos)]
        )
    return tokenizer


def tokenizer_config(fields: Mapping[str, Any], model_max_length: int) -> dict[str, Any]:
    """What stands in tokenizer_config.json: special tokens and the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{short}_token": tokens[token]
        for name, short in names.items()
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None
    }
    template = fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        **special,
        **({} if template is None else {"chat_template": template}),
    }


def _adds_bos(fields: Mapping[str, Any]) -> bool:
    stated = fields.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT


def _byte_level(fields: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = fields.get("tokenizer.ggml.pre", "(none given)")
    if name not in _SPLITS:
        raise UnsupportedModelError(
            f"GGUF pre-tokenizer {name!r} is not supported; supported: {', '.join(_SPLITS)}"
        )
    vocab = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in _WHOLE_WORDS))
    split = _SPLITS[name]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], *, gemma: bool) -> Tokenizer:
    """Its BPE, with the merges that the vocabulary implies.

    Pieces join in the order of their scores, in Gemma in that of their ids. Gemma's runs of spaces are
    stored as spaces; its text is only respelled, while others put a space before it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    if gemma:
        tokens = [_SPACE * len(token) if _is_spaces(token) else token for token in tokens]
        ranks: Iterable[float] = (-index for index in range(len(tokens)))
    else:
        ranks = fields["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    pieces = {
        token: rank
        for token, rank, kind in zip(tokens, ranks, kinds, strict=True)
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = not gemma and fields.get("tokenizer.ggml.add_space_prefix", True)
    respell = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), respell]) if prefixed else respell
    )
    restore = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        restore.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(restore)
    return tokenizer


def _merges(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best ranked pieces first."""
    found = [
        (rank, piece[:cut], piece[cut:])
        for piece, rank in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    found.sort(key=lambda merge: (merge[0], len(merge[1])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_tokens(tokenizer: Tokenizer, fields: Mapping[str, Any]) -> None:
    """Tokens that are found in the text before it is split."""
    from tokenizers import AddedToken

    named = list(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in named if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token, kind in named
            if kind == _USER_DEFINED and not _is_spaces(token)
        ]
    )


def _is_spaces(token: str) -> bool:
    return bool(token) and not token.strip(" ")
