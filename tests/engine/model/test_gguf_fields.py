"""Metadata of other types than it has to be, and numbers that lie: each is named and nothing made of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelError
from engine.model import gguf_header
from engine.model.gguf_fields import checked_fields
from engine.model.gguf_header import read_header
from engine.model.weights import resolve_model
from tests.engine.model.gguf_files import write
from tests.engine.model.test_gguf_header import ARRAY, TEXT, UINT, entry, header, string

PATTERN = "attention.sliding_window_pattern"
FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.attention.head_count_kv": [4, 4],
    "llama.rope.freq_base": 1e4,
    "llama.attention.sliding_window": 0,
    f"llama.{PATTERN}": [True, False],
    "qwen2.block_count": "not its own",
    "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.ggml.token_type": [1, 3],
    "tokenizer.ggml.scores": [0, -1.5],
    "tokenizer.ggml.eos_token_id": 1,
}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("general.architecture", 3, "must be a text"),
        ("llama.block_count", 0, "must be a whole number above 0"),
        ("llama.block_count", True, "must be a whole number above 0"),
        ("llama.attention.head_count_kv", [], "must be a whole number above 0, or a list of these"),
        ("llama.attention.head_count_kv", [4, 0], "must be a whole number above 0, or a list of these"),
        ("llama.rope.freq_base", float("nan"), "must be a finite number"),
        ("llama.rope.freq_base", [1.0], "must be a finite number"),
        ("llama.attention.sliding_window", -1, "must be a whole number"),
        ("tokenizer.ggml.tokens", ["a", 1], "must be a list of texts"),
        ("tokenizer.ggml.merges", "a b", "must be a list of texts"),
        ("tokenizer.ggml.token_type", [1], "is of 1 tokens, and there are 2"),
        ("tokenizer.ggml.scores", ["a", "b"], "must be a list of numbers"),
        ("tokenizer.ggml.scores", [0.0] * 3, "is of 3 tokens, and there are 2"),
        ("tokenizer.ggml.eos_token_id", 2, "is none of the 2 tokens: 2"),
        ("tokenizer.ggml.bos_token_id", "a", "is none of the 2 tokens: 'a'"),
        ("tokenizer.chat_templates", 3, "must be a list of texts"),
        ("tokenizer.ggml.add_bos_token", "false", "must be true or false"),
        ("llama.logit_scale", 0.0, "must be a finite number other than 0"),
        ("llama.rope.scaling.yarn_beta_slow", "1", "must be a finite number"),
        *(
            (f"llama.{PATTERN}", value, "must be a whole number above 0, or a list of true and false")
            for value in (0, [True, 2])
        ),
    ],
)
def test_what_is_of_another_type_is_named(key: str, value: Any, reason: str) -> None:
    assert checked_fields(FIELDS) == FIELDS
    with pytest.raises(ValueError, match=f"^{key} {reason}$"):
        checked_fields(FIELDS | {key: value})


def test_a_padding_token_that_is_none_is_left_out() -> None:
    padding = "tokenizer.ggml.padding_token_id"
    assert checked_fields(FIELDS | {padding: 0}) == FIELDS | {padding: 0}
    assert checked_fields(FIELDS | {padding: 2**32 - 1}) == FIELDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(entry("a", ARRAY, struct.pack("<IQ", 0, 9))) + bytes(99), "'a' has 9 values, and 8 are the"),
        (header(entry("a", ARRAY, struct.pack("<IQ", TEXT, 9))) + bytes(99), "'a' has 9 values, and 8 are"),
        (header(entry("a", TEXT, string(b"b" * 17))), "the string at byte 45 has 17 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0) + bytes(2**12), "has the tensor '' twice"),
    ],
)
def test_counts_that_lie_within_a_large_file_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    """Of tensors, whose bytes may look like as many values as somebody likes."""
    monkeypatch.setattr(gguf_header, "_MAX_VALUES", 8)
    monkeypatch.setattr(gguf_header, "_MAX_STRING", 16)
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(path)


@pytest.mark.parametrize(
    ("family", "stated", "reason"),
    [
        ("llama", {"block_count": 2**31 - 1}, r"it names 2147483647 layers and has \d+ tensors"),
        ("phi3", {"embedding_length": 1}, "division by zero"),
    ],
)
def test_numbers_of_which_no_model_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, stated: dict[str, int], reason: str
) -> None:
    path = tmp_path / "a.gguf"
    write(path, family, {}, stated=stated)
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=f"cannot be read as a GGUF model: {reason}"):
        resolve_model(str(path))


def test_the_types_of_a_file_are_held_against_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.gguf"
    write(path, "llama", {})
    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    whole = path.read_bytes()
    key = string(b"tokenizer.ggml.eos_token_id") + struct.pack("<I", UINT)
    place = whole.index(key) + len(key)
    path.write_bytes(whole[:place] + struct.pack("<I", 300) + whole[place + 4 :])
    with pytest.raises(ModelError, match="eos_token_id is none of the 300 tokens: 300"):
        resolve_model(str(path))
    path.write_bytes(whole.replace(b"bos_token_id", b"padding_token_id"[:12]))
    assert json.loads((resolve_model(str(path)) / "config.json").read_text())["eos_token_id"] == 2
