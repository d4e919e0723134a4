"""GGUF files that llama.cpp's own converter makes of tiny models, against transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from engine.model.config import ModelConfig
from engine.model.embedded import ensure_converted
from engine.model.families import RopeConfig
from engine.model.weights import load_tokenizer, resolve_model
from tests.engine.model.gguf_cases import CASES
from tests.engine.model.gguf_files import config_of
from tests.published.sources import converter, tokenizer_dir
from tests.support import greedy, greedy_reference, make_engine, run_all, tiny_model

TEXT = "Gr\u00fcn 123 words\n\n    of SmolLM2's tokenizer"
CLASSES = {"phi3": {"tokenizer_class": "GPT2Tokenizer"}}  # else a file of sentencepiece's has to be there
TOKENS = {"glm4": ["<|user|>"]}  # that the converter asks for


# What stands in for sentencepiece, which is not there: it reads pieces from JSON.
SENTENCEPIECE = """
import json

class SentencePieceProcessor:
    def LoadFromFile(self, path):
        with open(path) as file:
            self.pieces = json.load(file)

    def vocab_size(self):
        return len(self.pieces)

    def IdToPiece(self, index):
        return self.pieces[index]

    def GetScore(self, index):
        return -float(index)

    def IsUnknown(self, index):
        return index == 0

    def IsControl(self, index):
        return index in (1, 2)

    def IsUnused(self, index):
        return False

    def IsByte(self, index):
        return 3 <= index < 259
"""
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += ["\u2581", "a", "b", "c", "ab", "\u2581ab", "abc"]


def tokenizer_of(family: str) -> Path:
    """A folder with one that the converter knows, in the class that transformers has for the family."""
    return tokenizer_dir("qwen2.5") if family.startswith("qwen") else ensure_converted()


def add_tokenizer(family: str, source: Path) -> tuple[str, list[int], int]:
    """Makes the folder with one. Returns a text, its tokens, and how many tokens there are."""
    if family == "ernie4_5":
        source.mkdir()
        (source / "tokenizer.model").write_text(json.dumps(PIECES), encoding="utf-8")
        return "ab abc", [PIECES.index(piece) for piece in ("<s>", "\u2581ab", "\u2581ab", "c")], len(PIECES)
    shutil.copytree(tokenizer_of(family), source, ignore=shutil.ignore_patterns("*.safetensors"))
    published = AutoTokenizer.from_pretrained(source)
    if published.add_tokens(TOKENS.get(family, [])):
        published.save_pretrained(source)
    config_file = source / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps(config | CLASSES.get(family, {})), encoding="utf-8")
    return TEXT, published(TEXT).input_ids, len(published)


@pytest.mark.parametrize(("family", "overrides"), CASES.values(), ids=CASES)
def test_a_converted_model_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, overrides: dict[str, Any]
) -> None:
    source, path = tmp_path / "model", tmp_path / "model.gguf"
    text, tokens, vocab_size = add_tokenizer(family, source)
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": vocab_size}
    shape |= {"bos_token_id": 1, "eos_token_id": 2}
    model = tiny_model(family, **(shape | overrides))
    wanted = ModelConfig.from_hf(config_of(model))
    model.save_pretrained(source)
    command = [sys.executable, str(converter()), str(source), "--outtype", "f32", "--outfile", str(path)]
    (tmp_path / "sentencepiece.py").write_text(SENTENCEPIECE, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]

    monkeypatch.setenv("MEDUSA_CACHE", str(tmp_path / "cache"))
    folder = resolve_model(str(path))
    found = ModelConfig.from_folder(folder)
    for name in ModelConfig.__dataclass_fields__:
        value, expected = getattr(found, name), getattr(wanted, name)
        if isinstance(expected, RopeConfig):
            torch.testing.assert_close(value.inv_freq, expected.inv_freq)
            assert value.scale == pytest.approx(expected.scale)
        elif name not in ("architecture", "dtype"):  # a Mistral without vision is a Llama to the converter
            assert value == expected, name
    prompt = load_tokenizer(folder)(text).input_ids
    assert prompt == tokens
    outputs = run_all(make_engine(path), [greedy("r", prompt, 10, ignore_eos=True)])
    assert outputs["r", 0] == greedy_reference(model, prompt, 10)
