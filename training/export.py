"""`medusa-serve export`: heads and tree in the files that other servers read.

- `official`: FasterDecoding/Medusa's `medusa_lm_head.safetensors` and config. Its code needs an lm_head of
  all tokens in every head, so one that is shared is written out for each.
- `vllm`: vLLM's own (model_executor/models/medusa.py): `blocks.{i}.layers.{j}.weight|bias`, one
  `lm_head.weight` (`original_lm_head`) or `lm_heads.{i}.weight`, `token_map`, and a `config.json` of model
  type `medusa`.
- `medusa-serve`: ours: the official names without what the base model has, `token_map`, tree and table.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import ConfigError
from engine.medusa.bigram import BIGRAM_FILE
from engine.medusa.calibrated import CALIBRATION_FILE, TREE_FILE
from engine.medusa.head_files import HeadTensors, read_heads
from engine.model.config import ModelConfig
from engine.model.weights import resolve_model
from training.backbone import read_lm_head

__all__ = ["FORMATS", "export", "official_tensors", "own_tensors", "vllm_tensors"]

FORMATS = ("official", "vllm", "medusa-serve")


def export(source: str, output: Path, *, model: str, format: str, lora: str | None = None) -> Path:
    """Write the heads in `source` to the folder `output`.

    Args:
        source: head file, folder or hub id, in any format that `serve` reads.
        model: the base model they belong to; lora: adapters in it, as for `serve`.
        format: what to write.

    Returns:
        The file of the heads.

    Raises:
        ConfigError: an unknown format, or a folder that is not empty.
        HeadsError, ModelError: heads or model cannot be read.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; name a new folder")
    base = ModelConfig.from_folder(resolve_model(model))
    heads = read_heads(source, hidden_size=base.hidden_size, vocab_size=base.vocab_size)
    output.mkdir(parents=True, exist_ok=True)
    dtype = heads.weights[0][0].dtype if heads.weights else torch.float16

    def lm_head() -> Tensor:
        return read_lm_head(model, lora=lora).to(dtype)

    if format == "vllm":
        file, tensors = output / "model.safetensors", vllm_tensors(heads, lm_head)
        _write_json(output / "config.json", _vllm_config(heads, base, model))
    elif format == "official":
        file, tensors = (
            output / "medusa_lm_head.safetensors",
            official_tensors(heads, lm_head, base.vocab_size),
        )
        config = {
            "medusa_num_heads": heads.num_heads,
            "medusa_num_layers": len(heads.weights),
            "base_model_name_or_path": model,
        }
        _write_json(output / "config.json", config)
    else:
        file, tensors = output / "medusa_lm_head.safetensors", own_tensors(heads)
    save_file(_distinct(tensors), file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it readable to its owner only
    folder = Path(source).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    for name in (TREE_FILE, CALIBRATION_FILE, BIGRAM_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)
    return file


def own_tensors(heads: HeadTensors) -> dict[str, Tensor]:
    """The official names, with the lm_heads that there are, and the token map."""
    tensors = _layers(heads, "{head}.{layer}.linear")
    if len(heads.lm_heads) == 1:
        tensors["lm_head.weight"] = heads.lm_heads[0]
    elif heads.lm_heads:
        for head, weight in enumerate(heads.lm_heads):
            tensors[f"{head}.{len(heads.weights)}.weight"] = weight
    if heads.token_map is not None:
        tensors["token_map"] = heads.token_map
    return tensors


def official_tensors(heads: HeadTensors, lm_head: Callable[[], Tensor], vocab_size: int) -> dict[str, Tensor]:
    """As the reference reads them: an lm_head [vocab, hidden] per head, biases always.

    Raises:
        ConfigError: the heads have lm_heads of their own, for some tokens only.
    """
    tensors = _layers(heads, "{head}.{layer}.linear")
    if heads.lm_heads and len(heads.lm_heads[0]) < vocab_size:
        raise ConfigError(
            "these heads have their own lm_head for some tokens only; the official format needs all"
        )
    shared = None if heads.lm_heads else lm_head()
    for head in range(heads.num_heads):
        weight = shared if shared is not None else heads.lm_heads[head if len(heads.lm_heads) > 1 else 0]
        tensors[f"{head}.{len(heads.weights)}.weight"] = weight
        for layer in range(len(heads.weights)):
            name = f"{head}.{layer}.linear"
            tensors.setdefault(f"{name}.bias", torch.zeros_like(tensors[f"{name}.weight"][0]))
    return tensors


def vllm_tensors(heads: HeadTensors, lm_head: Callable[[], Tensor]) -> dict[str, Tensor]:
    """As vLLM reads them: heads that share an lm_head carry one, cut to the token map's rows."""
    tensors = _layers(heads, "blocks.{head}.layers.{layer}")
    if len(heads.lm_heads) > 1:
        for head, weight in enumerate(heads.lm_heads):
            tensors[f"lm_heads.{head}.weight"] = weight
    else:
        weight = heads.lm_heads[0] if heads.lm_heads else lm_head()
        if heads.token_map is not None and len(weight) > len(heads.token_map):
            weight = weight[heads.token_map]
        tensors["lm_head.weight"] = weight
    if heads.token_map is not None:
        tensors["token_map"] = heads.token_map
    return tensors


def _vllm_config(heads: HeadTensors, base: ModelConfig, model: str) -> dict[str, Any]:
    # vLLM renames every key with "num" and "heads" (or "layers") in it, so there must be one of each.
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": base.hidden_size,
        "vocab_size": base.vocab_size,
        "truncated_vocab_size": base.vocab_size if heads.token_map is None else len(heads.token_map),
        "num_heads": heads.num_heads,
        "num_hidden_layers": len(heads.weights),
        "medusa_fc_bias": heads.biases is not None,
        "original_lm_head": len(heads.lm_heads) < 2,
        "base_model_name_or_path": model,
    }


def _layers(heads: HeadTensors, pattern: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in range(len(heads.weights)):
        for head in range(heads.num_heads):
            name = pattern.format(head=head, layer=layer)
            tensors[f"{name}.weight"] = heads.weights[layer][head]
            if heads.biases is not None:
                tensors[f"{name}.bias"] = heads.biases[layer][head]
    return tensors


def _distinct(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own: safetensors refuses tensors that share it."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        pointer = tensor.data_ptr()
        found[name] = tensor.clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
