"""Memory of the usual models, for the table in docs/operations.md: figures of their published configs."""

from __future__ import annotations

from typing import Any

import torch

from engine.model.config import ModelConfig
from engine.model.hf_imports import import_validators
from engine.model.info import kv_bytes_per_token, weight_bytes

__all__ = ["USUAL_MODELS", "model_config", "table"]

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}


def _model(family: str, layers: int, hidden: int, width: int, heads: int, kv_heads: int, **more: Any) -> Any:
    """A published config's figures under transformers' names."""
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        **more,
    }


def _gpt_oss(layers: int, experts: int) -> Any:
    return _model(
        "gpt_oss",
        layers,
        2880,
        2880,
        64,
        8,
        vocab_size=201_088,
        head_dim=64,
        num_local_experts=experts,
        quantization_config={"quant_method": "mxfp4"},
    )


USUAL_MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _model("llama", 30, 576, 1536, 9, 3, vocab_size=49_152, tie_word_embeddings=True),
    "Gemma 3 1B": _model(
        "gemma3_text", 26, 1152, 6912, 4, 1, vocab_size=262_144, head_dim=256, tie_word_embeddings=True
    ),
    "Llama 3.2 1B": _model("llama", 16, 2048, 8192, 32, 8, vocab_size=128_256, tie_word_embeddings=True),
    "Phi-3 mini": _model("phi3", 32, 3072, 8192, 32, 32, vocab_size=32_064),
    "Qwen2.5 7B": _model("qwen2", 28, 3584, 18_944, 28, 4, vocab_size=152_064),
    "Mistral 7B v0.3": _model("mistral", 32, 4096, 14_336, 32, 8, vocab_size=32_768),
    "Llama 3.1 8B": _model("llama", 32, 4096, 14_336, 32, 8, vocab_size=128_256),
    "Qwen3 8B": _model("qwen3", 36, 4096, 12_288, 32, 8, vocab_size=151_936, head_dim=128),
    "Llama 2 7B, Vicuna 7B": _model("llama", 32, 4096, 11_008, 32, 32, vocab_size=32_000),
    "Llama 2 13B, Vicuna 13B": _model("llama", 40, 5120, 13_824, 40, 40, vocab_size=32_000),
    "OLMoE 1B-7B": _model(
        "olmoe", 16, 2048, 1024, 16, 16, vocab_size=50_304, num_experts=64, num_experts_per_tok=8
    ),
    "Qwen1.5 MoE A2.7B": _model(
        "qwen2_moe",
        24,
        2048,
        5632,
        16,
        16,
        vocab_size=151_936,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "ERNIE 4.5 21B-A3B": _model(
        "ernie4_5_moe",
        28,
        2560,
        12_288,
        20,
        4,
        vocab_size=103_424,
        tie_word_embeddings=True,
        moe_num_experts=64,
        moe_k=6,
        moe_intermediate_size=1536,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
    ),
    "Qwen3 30B-A3B": _model(
        "qwen3_moe",
        48,
        2048,
        6144,
        32,
        4,
        vocab_size=151_936,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "gpt-oss 20B": _gpt_oss(24, 32),
    "gpt-oss 120B": _gpt_oss(36, 128),
    "Mixtral 8x7B": _model("mixtral", 32, 4096, 14_336, 32, 8, vocab_size=32_000),
    "Hunyuan A13B": _model(
        "hunyuan_v1_moe",
        32,
        4096,
        3072,
        32,
        8,
        vocab_size=128_167,
        head_dim=128,
        tie_word_embeddings=True,
        num_experts=64,
        moe_topk=8,
    ),
    "GLM-4.5-Air": _model(
        "glm4_moe",
        46,
        4096,
        10_944,
        96,
        8,
        vocab_size=151_552,
        head_dim=128,
        attention_bias=True,
        n_routed_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1408,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "Llama 3.1 70B": _model("llama", 80, 8192, 28_672, 64, 8, vocab_size=128_256),
}


def model_config(name: str) -> ModelConfig:
    """One of `USUAL_MODELS` as the engine sees it."""
    import_validators()
    from transformers import AutoConfig

    figures = dict(USUAL_MODELS[name])
    family = figures.pop("model_type")
    config = AutoConfig.for_model(family, architectures=[_ARCHITECTURES[family]], **figures)
    return ModelConfig.from_hf(config)


def table() -> str:
    """Weights in GiB, K/V bytes a token and tokens a GiB, at 16 bit on CUDA and at 32 on the CPU."""
    lines = [
        "| model | weights, bfloat16 | K/V bytes a token | tokens a GiB | weights, float32 | tokens a GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in USUAL_MODELS:
        config = model_config(name)
        short, long = (
            weight_bytes(config, torch.bfloat16, torch.device("cuda")),
            weight_bytes(config, torch.float32, torch.device("cpu")),
        )
        half, full = (kv_bytes_per_token(config, dtype) for dtype in (torch.bfloat16, torch.float32))
        lines.append(
            f"| {name} | {short / 2**30:.1f} GiB | {half:,} | {2**30 // half:,} "
            f"| {long / 2**30:.1f} GiB | {2**30 // full:,} |"
        )
    return "\n".join(lines)
