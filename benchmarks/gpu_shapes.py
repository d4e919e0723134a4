"""Shapes of models that `benchmarks.gpu` measures with random weights, and what a step of them must read."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.loader import Loaded
from engine.model.experts import Experts

__all__ = ["MIXTURES", "SHAPES", "TINY", "Bytes", "Shape", "write_folder"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by its published config.

    Args:
        name: as results name it.
        values: of its config.json.
        family: as transformers names it; architecture: its class.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    architecture: str = "LlamaForCausalLM"

    def config(self, **overrides: Any) -> Any:
        """A transformers config."""
        from transformers import AutoConfig

        values = {"architectures": [self.architecture], "dtype": "bfloat16", **self.values, **overrides}
        return AutoConfig.for_model(self.family, **values)


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
        Shape(
            "granite-1b-a400m",
            {
                "vocab_size": 49152,
                "hidden_size": 1024,
                "intermediate_size": 512,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
                "num_local_experts": 32,
                "num_experts_per_tok": 8,
            },
            "granitemoe",
            "GraniteMoeForCausalLM",
        ),
        Shape(
            "qwen3-30b-a3b",
            {
                "vocab_size": 151936,
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "max_position_embeddings": 8192,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": True,
            },
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
        ),
        Shape(
            "gpt-oss-20b",
            {
                "vocab_size": 201088,
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "num_hidden_layers": 24,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "sliding_window": 128,
                "max_position_embeddings": 131072,
                "num_local_experts": 32,
                "num_experts_per_tok": 4,
                "quantization_config": {"quant_method": "mxfp4"},
            },
            "gpt_oss",
            "GptOssForCausalLM",
        ),
    )
}

MIXTURES = ("granite-1b-a400m", "qwen3-30b-a3b", "gpt-oss-20b")
"""Of experts. Measured where they are asked for."""

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
        weights: of all layers but their experts, the final norm and the lm_head; of the embedding only rows
            are read.
        kv_per_token: of one token in the cache, all layers.
        drafting: the heads' layers, and the lm_head (or their own) once more.
        experts: of all layers, 0 without; in 4 bits with their scales.
        chosen: the share of a layer's experts that a row chooses.
    """

    weights: int
    kv_per_token: int
    drafting: int
    experts: int = 0
    chosen: float = 1.0

    @classmethod
    def of(cls, loaded: Loaded) -> Bytes:
        """Of a model as it is loaded (quantised weights count as they are stored)."""
        decoder, pool = loaded.decoder, loaded.pool
        # The embedding is the decoder's own parameter; a tied lm_head counts as the lm_head.
        total = sum(_stored(module) for module in decoder.modules() if module is not decoder)
        found, mixture = 0, decoder.config.experts
        for module in decoder.modules():
            if isinstance(module, Experts):
                router = (module.router, module.router_bias, module.correction)
                found += _stored(module) - sum(part.nbytes for part in router if part is not None)
                packed = sum(_stored(linear) for pair in module._each for linear in pair)
                found, total = found + packed, total + packed
        layers, _, _, _, kv_heads, head_dim = pool.data.shape
        drafting = 0
        if loaded.heads is not None:
            heads = loaded.heads._heads
            drafting = heads.weights.numel() * heads.weights.element_size()
            lm_heads = list(heads.lm_heads) or [decoder.lm_head]
            drafting += sum(_stored(linear) for linear in lm_heads)
        per_token = 2 * layers * kv_heads * head_dim * pool.data.element_size()
        chosen = 1.0 if mixture is None else mixture.chosen / mixture.count
        return cls(total - found, per_token, drafting, found, chosen)

    def step(self, batch: int, context: int, nodes: int, *, drafting: bool) -> int:
        """Of so many nodes each. Experts are those that so many rows choose on average, if each of a layer's
        is as likely as another."""
        experts = round(self.experts * (1.0 - (1.0 - self.chosen) ** (batch * nodes)))
        read = self.weights + experts + batch * context * self.kv_per_token
        return read + (self.drafting if drafting else 0)


def _stored(module: torch.nn.Module) -> int:
    """Bytes of a module's own parameters, packed or quantised ones included."""
    quantized = getattr(module, "quantized", None)
    if quantized is not None:
        return int(quantized.num_bytes)
    packed = getattr(module, "packed", None)
    if packed is not None:
        return int(packed.numel() * packed.element_size())
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
