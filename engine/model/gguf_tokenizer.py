"""The tokenizer that a GGUF describes in its metadata, as a Hugging Face one.

A GGUF has the vocabulary, the merges or scores, and the name of the way text is split; the rest of a
tokenizer.json follows from these, as llama.cpp's `llama-vocab.cpp` has it for each name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["build_tokenizer", "tokenizer_config"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Kinds of tokens (gguf.TokenType)."""

_SPACE = "\u2581"  # how sentencepiece writes one

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
_QWEN35 = rf"{_CONTRACTION}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SEED = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+({_CONTRACTION})?|{_BEFORE}{_UPPER}+{_LOWER}*({_CONTRACTION})?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CHINESE_JAPANESE = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_DIGIT = r"\p{N}"
_CHINESE_KOREAN = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED = (  # letters that are of some case, of some blocks
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    r"\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    r"\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    r"\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    r"\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    r"\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    r"\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    r"\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    r"\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\x{10400}-\x{1044f}\x{104b0}-\x{104d3}"
    r"\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
)
_MARKS = r"!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"

_SPLITS = {
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),  # Llama 3's as first published, without whole words
    "dbrx": (_LLAMA3,),  # Phi-4 in Llama's form
    "glm4": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "hunyuan": (_QWEN2,),  # Hunyuan-A13B
    "solar-open": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "qwen35": (_QWEN35,),
    "seed-coder": (_SEED,),  # Seed-OSS too
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),  # Phi-4-mini
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_KOREAN, _DIGIT),
    "deepseek-llm": (r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_MARKS}]+", r"\s+$", _CHINESE_KOREAN, _DIGIT),
    "hunyuan-dense": (r"\p{N}{1,3}", _CHINESE_JAPANESE, _DEEPSEEK3),
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),  # OLMoE
    "exaone4": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "refact": (_DIGIT, _GPT2),  # Granite code models
}
"""For each `tokenizer.ggml.pre` of a byte-level BPE, where text is cut before merging, one after another."""

_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "tekken")

_WHOLE_WORDS = (*_BOS_BY_DEFAULT, "glm4")
"""Where a word that is in the vocabulary is taken whole, whatever the merges would make of it."""

_COMPOSED = ("qwen2", "qwen35", "deepseek-r1-qwen", "olmo")
"""Where a letter and its accent are made one character first (Unicode's NFC)."""

_PHI3_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")
"""Tokens of Phi-3 that leave white space behind them where it is; the file does not say so of any."""


class _Token(NamedTuple):
    id: int
    text: str
    kind: int


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """From a GGUF's metadata.

    Raises:
        UnsupportedModelError: the kind of tokenizer is not covered.
        LookupError, ValueError: metadata is missing or does not fit.
    """
    kind, split = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "(none given)")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"GGUF tokenizer {kind!r} is not supported; supported: gpt2, llama")
    if kind == "gpt2" and split not in _SPLITS:
        raise UnsupportedModelError(
            f"GGUF pre-tokenizer {split!r} is not supported; supported: {', '.join(_SPLITS)}"
        )
    tokens = _tokens(fields)
    if kind == "gpt2":
        tokenizer = _byte_level(fields, tokens, split)
    else:
        gemma = fields["general.architecture"].startswith("gemma")
        tokens = [_in_gemma(token) for token in tokens] if gemma else tokens
        tokenizer = _sentencepiece(fields, tokens, gemma=gemma)
    phi3 = kind == "llama" and fields["general.architecture"] == "phi3"
    _add_tokens(tokenizer, tokens, phi3=phi3, spaces=kind == "gpt2")
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
    template = _chat_template(fields)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        **special,
        **({} if template is None else {"chat_template": template}),
    }


def _chat_template(fields: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """As tokenizer_config.json has it: several by name, such as `tool_use`, beside the default one."""
    default = fields.get("tokenizer.chat_template")
    named = {
        name: template
        for name in fields.get("tokenizer.chat_templates", ())
        if (template := fields.get(f"tokenizer.chat_template.{name}")) is not None
    }
    if not named:
        return default
    if default is not None:
        named["default"] = default
    return [{"name": name, "template": template} for name, template in named.items()]


def _adds_bos(fields: Mapping[str, Any]) -> bool:
    stated = fields.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT


def _tokens(fields: Mapping[str, Any]) -> list[_Token]:
    """All but what fills the embedding's rows up, which is no text whatever its kind."""
    named = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    return [
        _Token(index, text, kind)
        for index, (text, kind) in enumerate(named)
        if kind == _NORMAL or text != f"[PAD{index}]"
    ]


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[_Token], name: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token.text: token.id for token in tokens}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    for merge in merges:  # `tokenizers` panics at one that does not fit
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise ValueError(f"the merge {' '.join(merge)!r} does not fit the vocabulary")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in _WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[name]]
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, in_bytes])
    if name in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[_Token], *, gemma: bool) -> Tokenizer:
    """Its BPE, with the merges that the vocabulary implies.

    Gemma's text is only respelled, while others put a space before it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token.text: token.id for token in tokens}
    unknown = fields["tokenizer.ggml.tokens"][fields.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges(_ranks(fields, tokens, gemma=gemma))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
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


def _ranks(fields: Mapping[str, Any], tokens: Sequence[_Token], *, gemma: bool) -> dict[str, float]:
    """How early each piece is made of two others: the higher, the sooner."""
    pieces = [token for token in tokens if token.kind not in (_UNKNOWN, _CONTROL, _BYTE)]
    if gemma:
        # Its runs of one character come before all else, though their scores in the file do not say so.
        return {token.text: 1 if token.kind == _USER_DEFINED else -token.id for token in pieces}
    scores = fields.get("tokenizer.ggml.scores")
    if scores and len({scores[token.id] for token in pieces if token.kind == _NORMAL}) > 1:
        return {token.text: scores[token.id] for token in pieces}
    # A converter that found no sentencepiece model writes one score for all. In those of Llama 2 and Mistral
    # the scores fall with the ids, and spaces join last.
    return {token.text: -token.id if token.text.strip(_SPACE) else -math.inf for token in pieces}


def _merges(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best ranked pieces first."""
    found = [
        (rank, piece[:cut], piece[cut:])
        for piece, rank in ranks.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[_Token], *, phi3: bool, spaces: bool) -> None:
    """Tokens that are found in the text before it is split, in Phi-3 most with the space behind them.

    Args:
        spaces: runs of them too, which sentencepiece's vocabularies hold as pieces.
    """
    from tokenizers import AddedToken

    def added(token: _Token, *, special: bool) -> AddedToken:
        strips = phi3 and token.text not in _PHI3_KEEP_SPACES
        return AddedToken(token.text, normalized=False, special=special, rstrip=strips)

    tokenizer.add_special_tokens(
        [added(token, special=True) for token in tokens if token.kind in (_UNKNOWN, _CONTROL)]
    )
    tokenizer.add_tokens(
        [
            added(token, special=False)
            for token in tokens
            if token.kind == _USER_DEFINED and (spaces or token.text.strip(" "))
        ]
    )


def _in_gemma(token: _Token) -> _Token:
    """As its vocabulary has it; the converter writes runs of spaces as such."""
    return token if token.text.strip(" ") else token._replace(text=_SPACE * len(token.text))
