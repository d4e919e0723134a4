"""Mistral Nemo's tekken.json is its tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.model.weights import load_tokenizer
from tests.published.sources import nemos_tekken, tokenizer_dir
from tests.published.test_tokenizers import TEXTS


def test_it_gives_the_tokens_of_the_other_file(tmp_path: Path) -> None:
    other = load_tokenizer(tokenizer_dir("mistral-nemo"))
    tekken = json.loads(nemos_tekken().read_text())
    names = other.convert_ids_to_tokens(list(range(1000)))
    tekken["special_tokens"] = [{"rank": i, "token_str": name} for i, name in enumerate(names)]
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    found = load_tokenizer(tmp_path)
    assert found.get_vocab() == other.get_vocab()
    assert set(found.all_special_ids) <= set(other.added_tokens_decoder)
    for text in (*TEXTS, "[INST]a[/INST] b</s>"):
        assert found.encode(text) == other.encode(text)
        assert found.decode(found.encode(text)) == other.decode(found.encode(text))


def test_a_tokenizer_json_that_cuts_elsewhere_gives_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Mistral Small 3.1's, made as if it were Llama 3's: marks of scripts like Hindi's were apart."""
    published = load_tokenizer(tokenizer_dir("mistral-nemo"))
    other = json.loads((tokenizer_dir("mistral-nemo") / "tokenizer.json").read_text())
    llama = json.loads((tokenizer_dir("llama3") / "tokenizer.json").read_text())
    parts, llamas = (each["pre_tokenizer"]["pretokenizers"] for each in (other, llama))
    parts[0]["pattern"] = llamas[0]["pattern"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    assert load_tokenizer(tmp_path).encode("हिन्दी") != published.encode("हिन्दी")
    (tmp_path / "tekken.json").write_bytes(nemos_tekken().read_bytes())
    assert load_tokenizer(tmp_path).encode("हिन्दी") == published.encode("हिन्दी")
    assert "tekken.json" in caplog.text
