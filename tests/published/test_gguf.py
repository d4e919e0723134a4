"""The tokenizers of GGUF files against those of the models they came from."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from engine.errors import ModelError, UnsupportedModelError
from engine.model.gguf_header import read_header
from engine.model.gguf_tokenizer import build_tokenizer, tokenizer_config
from engine.model.weights import load_tokenizer, resolve_model
from engine.text import TextProcessor
from tests.published.sources import tokenizer_dir, vocabularies

COVERED = (
    *("deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe", "llama-spm"),
    *("phi-3", "qwen2", "qwen35", "refact"),
)
REFUSED = {
    "aquila": "pre-tokenizer '(none given)'",
    "bert-bge": "tokenizer 'bert'",
    "command-r": "pre-tokenizer 'command-r'",
    "falcon": "pre-tokenizer 'falcon'",
    "gemma-4": "tokenizer 'gemma4'",
    "gpt-neox": "pre-tokenizer '(none given)'",
    "mpt": "pre-tokenizer 'mpt'",
    "nomic-bert-moe": "tokenizer 't5'",
    "starcoder": "pre-tokenizer 'starcoder'",
}
ARCHITECTURE_REFUSED = ("baichuan",)  # whose tokenizer is of a known kind

CONVERTED = {
    "deepseek-v3": ("hunyuan-dense", "hunyuan-dense"),  # which cut text alike
    "gemma3": ("gemma3", None),
    "gpt-4o": ("phi3", "gpt-4o"),  # which Phi-4-mini has too
    "llama3.2": ("llama", "llama-bpe"),
    "mistral-nemo": ("llama", "tekken"),
    "qwen2.5": ("qwen2", "qwen2"),
    "qwen3": ("qwen3", "qwen2"),
    "yi": ("llama", None),
}
"""Published tokenizers, with llama.cpp's names of architecture and pre-tokenizer (None: sentencepiece)."""

SCRIPTS = [(0x20, 0x7F)] * 12 + [
    *[(0x00, 0x20), (0x80, 0x180), (0x300, 0x400), (0x400, 0x500), (0x590, 0x700), (0x900, 0x980)],
    *[(0xE00, 0xE80), (0x1000, 0x1200), (0x1780, 0x1800), (0x2000, 0x2070), (0x2150, 0x2190)],
    *[(0x2460, 0x25A0), (0x3000, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAE00), (0xE000, 0xE010)],
    *[(0xFB00, 0xFB50), (0xFE00, 0xFE10), (0xFF00, 0x10000), (0x10400, 0x10450), (0x1D400, 0x1D430)],
    *[(0x1F300, 0x1F650)],
]
WORDS = [
    *("the", "don't", "we'll", "I'M", "they'Ve", "it's", "\u017fs", "K", "'S", "HTTPServer", "camelCase"),
    *("foo_bar", "1234567", "3.14", "0x1F", "\uff11\uff12", "x\u00b2", "\u00fcber", "e\u0301", "a\u0308"),
    *("\u65e5\u672c\u8a9e", "\u0440\u0443\u0441", "\u0e44\u0e17\u0e22", "\u0939\u093f\u0928\u094d\u0926"),
    *("\u1100\u1161", "\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u200b", "\ufeff", "lambda:"),
    *("{}", "**", "//", "!=", "https://a.b/c?d=e&f", "[INST]", "</s>", "<unk>", "<0x0A>", "\u2581"),
    *("\u2581\u2581", "[PAD151700]", "</table>", "<|x|>", "<think>"),
]
BLANKS = ("\n", "\n\n", "\t", "\r\n", " \n ", "\r", "\u3000", "\xa0", "\x0b", "\x85", "  ")


def vectors(path: Path) -> Iterator[tuple[str, list[int]]]:
    texts = path.with_name(f"{path.name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(f"{path.name}.out").read_text(encoding="utf-8").split("\n")
    for text, line in zip(texts, lines, strict=True):
        yield text, [int(token) for token in line.split()]


@pytest.mark.parametrize("name", COVERED)
def test_texts_become_the_tokens_of_the_vectors(name: str) -> None:
    path = vocabularies()[name]
    fields = read_header(path).fields
    tokenizer = build_tokenizer(fields)
    if name == "qwen35":  # of which these are what llama.cpp makes, which composes no letters
        assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids
        tokenizer.normalizer = normalizers.Sequence([])
    for text, ids in vectors(path):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    if fields["tokenizer.ggml.model"] == "llama":  # as converted without the sentencepiece model
        unscored = fields | {"tokenizer.ggml.scores": [-1000.0] * len(fields["tokenizer.ggml.tokens"])}
        tokenizer = build_tokenizer(unscored)
        for text, ids in vectors(path):
            assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


@pytest.mark.parametrize("name", REFUSED)
def test_vocabularies_of_other_kinds_are_refused(name: str) -> None:
    fields = read_header(vocabularies()[name]).fields
    with pytest.raises(UnsupportedModelError) as refusal:
        build_tokenizer(fields)
    assert str(refusal.value).startswith(f"GGUF {REFUSED[name]} is not supported; supported: ")


def test_each_vocabulary_is_covered_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vocabularies().keys() == {*COVERED, *REFUSED, *ARCHITECTURE_REFUSED}
    source = vocabularies()[ARCHITECTURE_REFUSED[0]]
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="GGUF architecture 'baichuan' is not supported"):
        resolve_model(str(source))


def looks_special(token: str) -> bool:
    """Which added tokens llama.cpp's converter makes control tokens though they are not special."""
    ends = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return token == "<mask>" or any(token.startswith(a) and token.endswith(b) for a, b in ends)


def converted(name: str) -> dict[str, Any]:
    """The metadata that llama.cpp's converter makes of a published tokenizer."""
    architecture, pre = CONVERTED[name]
    published = json.loads((tokenizer_dir(name) / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((tokenizer_dir(name) / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {token["id"]: token for token in published["added_tokens"]}
    texts = {index: text for text, index in published["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    tokens, kinds, scores = [], [], []
    for index in range(max(texts) + 100):
        text, kind, score = texts.get(index, f"[PAD{index}]"), 1, -float(index)
        if index not in texts:
            kind = 5
        elif pre is None and text == "<unk>":
            kind = 2
        elif index in added:
            kind = 3 if added[index]["special"] or looks_special(text) else 4
            text, score = text.replace("\u2581", " ") if kind == 4 else text, -1000.0
        elif pre is None and text.startswith("<0x") and len(text) == 6:
            kind = 6
        tokens.append(text)
        kinds.append(kind)
        scores.append(score)
    fields: dict[str, Any] = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "gpt2" if pre else "llama",
        "tokenizer.ggml.pre": pre or "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
    }
    if pre:
        merges = published["model"]["merges"]
        fields["tokenizer.ggml.merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    else:
        fields["tokenizer.ggml.add_space_prefix"] = False
    index_of = {text: index for index, text in texts.items()}
    for key, field in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (token := config.get(f"{key}_token")) is not None:
            text = token["content"] if isinstance(token, dict) else token
            fields[f"tokenizer.ggml.{field}_token_id"] = index_of[text]
    # DeepSeek's says that a text begins so, and its tokenizer.json that none does.
    if (adds := config.get("add_bos_token")) is not None and name != "deepseek-v3":
        fields["tokenizer.ggml.add_bos_token"] = adds
    return fields


def random_texts(rng: random.Random, specials: list[str], count: int) -> Iterator[str]:
    kinds = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice([*BLANKS, " " * rng.randint(1, 70), "\n" * rng.randint(1, 40)]),
        lambda: "".join(chr(rng.randrange(*rng.choice(SCRIPTS))) for _ in range(rng.randint(1, 6))),
        lambda: "".join(rng.choices("0123456789", k=rng.randint(1, 12))),
        lambda: rng.choice(specials),
    ]
    for _ in range(count):
        parts = rng.choices(kinds, weights=(6, 4, 8, 2, 1), k=rng.randint(1, 12))
        yield rng.choice(("", " ")).join(part() for part in parts)


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_tokenizer_is_the_published_one(name: str, tmp_path: Path) -> None:
    fields = converted(name)
    built = build_tokenizer(fields)
    built.save(str(tmp_path / "tokenizer.json"))
    config = tokenizer_config(fields, 4096)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    ours, published = TextProcessor(loaded), Tokenizer.from_file(str(tokenizer_dir(name) / "tokenizer.json"))
    assert ours.vocab_size == published.get_vocab_size()
    added = published.get_added_tokens_decoder()
    # These lose in the conversion that their text is shown.
    hidden = {i for i, token in added.items() if not token.special and looks_special(token.content)}
    rng = random.Random(0)
    for text in random_texts(rng, [token.content for token in added.values()], 800):
        for special in (False, True):
            ids = published.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, add_special_tokens=special) == ids, text
            assert ours.decode(ids, skip_special_tokens=False) == published.decode(
                ids, skip_special_tokens=False
            )
        ids = [token for token in ids if token not in hidden]
        decoded = published.decode(ids)
        assert ours.decode(ids) == decoded
        detokenizer = ours.detokenizer([])
        streamed = [detokenizer.push([token]).text for token in ids]
        assert "".join(streamed) + detokenizer.push([], final=True).text == decoded
