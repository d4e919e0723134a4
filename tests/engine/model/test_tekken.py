"""Mistral's tekken.json: alone, and beside a tokenizer.json that cuts text elsewhere."""

from __future__ import annotations

import base64
import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from engine.errors import ModelError
from engine.model.weights import load_tokenizer
from engine.text import TextProcessor

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
MERGED = [b"12", b"ab", b"123"]
PATTERN = r"\p{N}|[^\p{N}]+"


def write(folder: Path, **changes: Any) -> Path:
    """A tekken.json of 8 special tokens, 256 bytes and a few words."""
    words = [bytes([i]) for i in range(256)] + MERGED
    tekken = {
        "config": {"pattern": PATTERN, "default_vocab_size": 8 + len(words), "default_num_special_tokens": 8},
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for i, word in enumerate(words)
        ],
        "special_tokens": [
            {"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(SPECIAL)
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "tekken.json").write_text(json.dumps(tekken | changes))
    return folder


def test_it_is_the_tokenizer_where_there_is_no_other(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    )
    text = TextProcessor(pickle.loads(pickle.dumps(load_tokenizer(folder))))
    ab, one, two = 8 + 257, 8 + ord("1"), 8 + ord("2")
    assert text.encode("ab12") == [1, ab, one, two]  # each digit by itself, whatever the words are
    assert text.encode("[INST]", add_special_tokens=False) == [3]
    assert text.encode_chat([{"role": "user", "content": "ab"}]) == [1, 3, ab, 4]
    assert text.decode([ab, one, 2]) == "ab1"
    assert (text.tokenizer.bos_token, text.tokenizer.eos_token, text.vocab_size) == ("<s>", "</s>", 267)


@pytest.mark.parametrize("pattern", [PATTERN, r"\p{N}{1,3}|[^\p{N}]+"], ids=["right", "wrong"])
def test_a_tokenizer_json_beside_it_cuts_where_it_says(
    pattern: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer: Any = load_tokenizer(write(tmp_path))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    wrong = len(tokenizer.tokenize("123")) == 1
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    caplog.clear()
    assert load_tokenizer(tmp_path).tokenize("ab123") == ["ab", "1", "2", "3"]
    assert ("tekken.json" in caplog.text) == wrong == (pattern != PATTERN)


def test_tokenizers_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(write(tmp_path))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).tokenize("123") == ["123"]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": {}}'])
def test_what_is_none_is_named(content: str, beside: bool, tmp_path: Path) -> None:
    if beside:
        load_tokenizer(write(tmp_path)).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(ModelError, match=r"cannot read .*tekken\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(find_spec("mistral_common") is not None, reason="then it is read")
def test_the_older_form_asks_for_mistral_common(tmp_path: Path) -> None:
    folder = write(tmp_path)
    tekken = json.loads((folder / "tekken.json").read_text())
    del tekken["special_tokens"]
    (folder / "tekken.json").write_text(json.dumps(tekken))
    with pytest.raises(ModelError, match="pip install mistral-common"):
        load_tokenizer(folder)
