"""What is exported loads back bit for bit, under the names its reader knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ConfigError
from engine.medusa.head_files import HeadTensors, read_heads
from tests.support import save_model, save_random_heads, tiny_llama
from training.backbone import read_lm_head
from training.export import export
from training.heads import PlainHeads
from training.train import save_heads

HIDDEN, VOCAB = 32, 61


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_llama(), tmp_path_factory.mktemp("export"))


def ours(folder: Path, token_map: torch.Tensor | None) -> Path:
    folder.mkdir()
    heads = PlainHeads(3, 2, HIDDEN)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    save_heads(folder / "medusa_lm_head.safetensors", heads, token_map)
    (folder / "medusa_tree.json").write_text("[[0], [1], [0, 0]]")
    (folder / "medusa_bigram.safetensors").write_bytes(b"pairs")
    return folder


def read(source: Path) -> HeadTensors:
    return read_heads(str(source), hidden_size=HIDDEN, vocab_size=VOCAB)


def same(one: HeadTensors, other: HeadTensors) -> None:
    assert one.num_heads == other.num_heads
    assert one.biases is not None
    assert other.biases is not None
    for name in ("weights", "biases"):
        for mine, theirs in zip(getattr(one, name), getattr(other, name), strict=True):
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True))


TOKEN_MAP = torch.arange(0, VOCAB, 2)


@pytest.mark.parametrize("format", ["official", "vllm", "medusa-serve"])
@pytest.mark.parametrize("token_map", [None, TOKEN_MAP], ids=["all-tokens", "token-map"])
def test_heads_load_back_bit_for_bit(
    model: Path, tmp_path: Path, format: str, token_map: torch.Tensor | None
) -> None:
    source = ours(tmp_path / "source", token_map)
    export(str(source), tmp_path / "out", model=str(model), format=format)
    before, after = read(source), read(tmp_path / "out")
    same(before, after)
    assert (tmp_path / "out" / "medusa_tree.json").read_text() == "[[0], [1], [0, 0]]"
    assert (tmp_path / "out" / "medusa_bigram.safetensors").read_bytes() == b"pairs"
    rows = read_lm_head(str(model)).half()
    if format == "official":
        assert after.token_map is None
        assert all(torch.equal(weight, rows) for weight in after.lm_heads)
        assert len(after.lm_heads) == 3
    else:
        assert (after.token_map is None) == (token_map is None)
    if format == "vllm":
        assert torch.equal(after.lm_heads[0], rows if token_map is None else rows[token_map])
    if format == "medusa-serve":
        assert not after.lm_heads


def vllm_parameters(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of vLLM's `Medusa` module (model_executor/models/medusa.py) for a config."""
    hidden, rows = config["hidden_size"], config["truncated_vocab_size"]
    found: dict[str, tuple[int, ...]] = {}
    for head in range(config["num_heads"]):
        for layer in range(config["num_hidden_layers"]):
            found[f"blocks.{head}.layers.{layer}.weight"] = (hidden, hidden)
            if config["medusa_fc_bias"]:
                found[f"blocks.{head}.layers.{layer}.bias"] = (hidden,)
        if not config["original_lm_head"]:
            found[f"lm_heads.{head}.weight"] = (rows, hidden)
    if config["original_lm_head"]:
        found["lm_head.weight"] = (rows, hidden)
    return found


@pytest.mark.parametrize("kind", ["shared", "token-map", "own"])
def test_vllm_finds_every_parameter_and_no_other(model: Path, tmp_path: Path, kind: str) -> None:
    if kind == "own":
        (tmp_path / "source").mkdir()
        source = save_random_heads(
            tmp_path / "source" / "medusa_lm_head.safetensors", hidden=HIDDEN, vocab=VOCAB, heads=2
        )
    else:
        source = ours(tmp_path / "source", TOKEN_MAP if kind == "token-map" else None)
    file = export(str(source), tmp_path / "out", model=str(model), format="vllm")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}
    token_map = shapes.pop("token_map", None)
    assert shapes == vllm_parameters(config)
    assert config["model_type"] == "medusa"
    assert config["architectures"] == ["MedusaModel"]
    # Its loader ignores a token_map unless the vocabulary is smaller, and needs one if it is.
    assert (token_map is not None) == (config["truncated_vocab_size"] < config["vocab_size"])
    # It renames whatever has "num" and "heads", or "layers", in its name.
    assert sum("num" in key and "heads" in key for key in config) == 1
    assert sum("num" in key and "layers" in key for key in config) == 1


def test_one_lm_head_is_written_out_for_each_head(model: Path, tmp_path: Path) -> None:
    export(str(ours(tmp_path / "source", None)), tmp_path / "vllm", model=str(model), format="vllm")
    export(str(tmp_path / "vllm"), tmp_path / "official", model=str(model), format="official")
    (shared,), each = read(tmp_path / "vllm").lm_heads, read(tmp_path / "official").lm_heads
    assert [torch.equal(weight, shared) for weight in each] == [True] * 3


def test_what_cannot_be_exported_is_refused(model: Path, tmp_path: Path) -> None:
    source = ours(tmp_path / "source", TOKEN_MAP)
    with pytest.raises(ConfigError, match="must be one of official, vllm, medusa-serve"):
        export(str(source), tmp_path / "out", model=str(model), format="gguf")
    with pytest.raises(ConfigError, match="is not empty"):
        export(str(source), source, model=str(model), format="vllm")
    export(str(source), tmp_path / "vllm", model=str(model), format="vllm")
    with pytest.raises(ConfigError, match="for some tokens only"):
        export(str(tmp_path / "vllm"), tmp_path / "official", model=str(model), format="official")
