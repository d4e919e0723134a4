"""Shapes of models that `benchmarks.gpu` measures with random weights, and what a step of them must read."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.loader import Loaded

__all__ = ["SHAPES", "TINY", "Bytes", "Shape", "write_folder"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of the Llama family by its published config.

    Args:
        name: as results name it.
        values: of its config.json.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)

    def config(self, **overrides: Any) -> Any:
        """A transformers config."""
        from transformers import LlamaConfig

        values = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **self.values, **overrides}
        return LlamaConfig(**values)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "smollm2-135m",
            {
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
            },
        ),
        Shape(  # Vicuna 7B's too
            "llama-2-7b",
            {
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "max_position_embeddings": 8192,  # 4096 as published; room for the tree behind 4096 tokens
            },
        ),
        Shape(
            "llama-3.1-8b",
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
            },
        ),
    )
}

TINY = Shape(
    "tiny",
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
)


def write_folder(shape: Shape, folder: Path, *, tokenizer: Path | None = None, heads: int = 4) -> Path:
    """A model folder without weights, for `load_format: dummy`, with random heads that share its lm_head.

    Args:
        tokenizer: a model folder whose tokenizer it gets, and whose vocabulary; None: one of few words.

    Returns:
        `folder`, with `heads.safetensors` in it.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    overrides = {}
    if tokenizer is not None:
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, folder / name)
        overrides["vocab_size"] = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    else:
        _write_words(folder)
    config = shape.config(**overrides)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    size = config.hidden_size
    for head in range(heads):
        weight = torch.randn(size, size, generator=generator) * 0.02
        tensors[f"{head}.0.linear.weight"] = weight.to(torch.bfloat16)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(size, dtype=torch.bfloat16)
    save_file(tensors, folder / "heads.safetensors")
    return folder


def _write_words(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(16)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class Bytes:
    """What a decode step cannot do without reading, in bytes.

    Args:
        weights: of all layers, the final norm and the lm_head; of the embedding only rows are read.
        kv_per_token: of one token in the cache, all layers.
        drafting: the heads' layers, and the lm_head (or their own) once more.
    """

    weights: int
    kv_per_token: int
    drafting: int

    @classmethod
    def of(cls, loaded: Loaded) -> Bytes:
        """Of a model as it is loaded (quantised weights count as they are stored)."""
        decoder, pool = loaded.decoder, loaded.pool
        # The embedding is the decoder's own parameter; a tied lm_head counts as the lm_head.
        total = sum(_stored(module) for module in decoder.modules() if module is not decoder)
        layers, _, _, _, kv_heads, head_dim = pool.data.shape
        drafting = 0
        if loaded.heads is not None:
            heads = loaded.heads._heads
            drafting = heads.weights.numel() * heads.weights.element_size()
            lm_heads = list(heads.lm_heads) or [decoder.lm_head]
            drafting += sum(_stored(linear) for linear in lm_heads)
        return cls(total, 2 * layers * kv_heads * head_dim * pool.data.element_size(), drafting)

    def step(self, batch: int, context: int, *, drafting: bool) -> int:
        return self.weights + batch * context * self.kv_per_token + (self.drafting if drafting else 0)


def _stored(module: torch.nn.Module) -> int:
    """Bytes of a module's own parameters, packed or quantised ones included."""
    quantized = getattr(module, "quantized", None)
    if quantized is not None:
        return int(quantized.num_bytes)
    packed = getattr(module, "packed", None)
    if packed is not None:
        return int(packed.numel() * packed.element_size())
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
