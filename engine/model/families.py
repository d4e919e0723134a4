"""The families of models: what each one's config says in which it differs from a plain pre-norm decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.errors import UnsupportedModelError
from engine.model.experts_config import (
    Clamp,
    Shared,
    behind_dense_layers,
    by_sigmoids,
    ernie_experts,
    every_nth_layer,
    experts_of,
    hunyuan_experts,
)

__all__ = [
    "FAMILIES",
    "WITH_VISION",
    "RopeConfig",
    "check_architecture",
    "head_dim_of",
    "rope_of",
]

log = logging.getLogger(__name__)

# Frequencies that depend on the sequence's length ("dynamic") would rotate cached keys by other
# angles than new queries, and transformers' own cache has that flaw.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: float32 inverse frequencies and a factor on cos and sin.

    `inv_freq` has head_dim / 2 entries, or fewer where only the first 2 * len(inv_freq) channels of a
    head are rotated. Where it is `precise`, cos and sin are float32 whatever the model's dtype.
    """

    inv_freq: torch.Tensor
    scale: float
    precise: bool = False


def _llama(config: Any) -> dict[str, Any]:
    bias = bool(getattr(config, "attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(getattr(config, "mlp_bias", False))}


def _mistral(config: Any) -> dict[str, Any]:
    return {"windows": (config.sliding_window,) * config.num_hidden_layers}


def _mistral3(config: Any) -> dict[str, Any]:
    if config.model_type not in ("mistral", "ministral3"):
        raise UnsupportedModelError(
            f"a text part of type {config.model_type!r} is not supported in Mistral 3"
        )
    flags = _mistral(config)
    rope = config.rope_parameters
    if config.model_type == "ministral3" and rope.get("llama_4_scaling_beta"):
        # Past this length queries are scaled by their positions. Up to it, by one.
        flags["max_position"] = min(config.max_position_embeddings, rope["original_max_position_embeddings"])
        log.warning(
            "Ministral 3 is served up to the %d positions from which queries are scaled, of the model's %d",
            flags["max_position"],
            config.max_position_embeddings,
        )
    return flags


def _qwen2(config: Any) -> dict[str, Any]:
    return {"windows": _layer_windows(config), "qkv_bias": True}


def _qwen3(config: Any) -> dict[str, Any]:
    return {**_llama(config), "windows": _layer_windows(config), "qk_norm": "head"}


def _gemma3(config: Any) -> dict[str, Any]:
    for unused in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, unused, None):
            raise UnsupportedModelError(f"{unused} is not supported in {config.model_type}")
    return {
        **_llama(config),
        **_two_kinds_of_layers(config),
        "norms": "both",
        "norm_offset": True,
        "qk_norm": "head",
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "embedding_scale": config.hidden_size**0.5,
    }


def _phi3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    flags: dict[str, Any] = {
        "windows": (config.sliding_window,) * config.num_hidden_layers,
        "fused": "all",
        "rope": rope_of(config, rope, rotated=_rotated(config)),
    }
    if rope.get("rope_type") == "longrope":
        # Past this length transformers changes the frequencies of cached keys too. Up to it, they are fixed.
        flags["max_position"] = rope.get("original_max_position_embeddings") or (
            config.original_max_position_embeddings
        )
        log.warning(
            "LongRoPE is served up to the %d positions of its short factors, of the model's %d",
            flags["max_position"],
            config.max_position_embeddings,
        )
    return flags


def _olmo2(config: Any) -> dict[str, Any]:
    return {**_llama(config), "norms": "post", "qk_norm": "projection"}


def _olmo3(config: Any) -> dict[str, Any]:
    return {
        **_olmo2(config),
        **_two_kinds_of_layers(config),
    }


def _seed_oss(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_out_bias,
        "mlp_bias": config.mlp_bias,
    }


def _smollm3(config: Any) -> dict[str, Any]:
    no_windows = (None,) * config.num_hidden_layers
    return {
        **_llama(config),
        "windows": _layer_windows(config) if config.use_sliding_window else no_windows,
        **_unrotated(config, tuple(not rotated for rotated in config.no_rope_layers)),
    }


def _exaone4(config: Any) -> dict[str, Any]:
    windows = _layer_windows(config)
    # Where there are windows, the layers that see all know no positions.
    everywhere = config.sliding_window is None
    return {
        "windows": windows,
        **({} if everywhere else _unrotated(config, tuple(window is None for window in windows))),
        "norms": "post",
        "qk_norm": "head",
    }


def _ernie4_5(config: Any) -> dict[str, Any]:
    bias = bool(config.use_bias)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "rope": replace(rope_of(config, config.rope_parameters), precise=True),
        "interleaved": True,
    }


def _glm(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": bool(config.attention_bias),
        "fused": "gate_up",
        "rope": rope_of(config, config.rope_parameters, rotated=_rotated(config)),
        "interleaved": True,
    }


def _glm4(config: Any) -> dict[str, Any]:
    renamed = {
        "post_attention_layernorm": "post_self_attn_layernorm",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "post_mlp_layernorm",
    }
    return {**_glm(config), "norms": "both", "renamed": renamed}


def _hunyuan(config: Any) -> dict[str, Any]:
    rope, size = config.rope_parameters, head_dim_of(config)
    if rope.get("rope_type") == "dynamic" and (alpha := rope.get("alpha")):  # which depends on no length
        rope = {
            "rope_type": "default",
            "rope_theta": rope["rope_theta"] * alpha ** (size / (size - 2)),
        }
    bias = bool(config.attention_bias)
    return {
        "qkv_bias": bias,
        "output_bias": bias,
        "rope": rope_of(config, rope),
        "qk_norm": "head",
        "qk_norm_last": True,
        "renamed": {
            "self_attn.q_norm": "self_attn.query_layernorm",
            "self_attn.k_norm": "self_attn.key_layernorm",
        },
    }


def _granite(config: Any) -> dict[str, Any]:
    return {
        **_llama(config),
        "attention_scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logits_divisor": float(config.logits_scaling),
    }


def _mixtral(config: Any) -> dict[str, Any]:
    return {**_mistral(config), "experts": experts_of(config, config.num_local_experts, renormalised=True)}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    return {
        **_llama(config),
        "mlp_bias": False,
        "windows": (config.sliding_window,) * config.num_hidden_layers,
        "qk_norm": "head",
        "experts": experts_of(
            config,
            config.num_experts,
            renormalised=config.norm_topk_prob,
            width=config.moe_intermediate_size,
            layers=every_nth_layer(config),
        ),
    }


def _olmoe(config: Any) -> dict[str, Any]:
    if config.clip_qkv is not None:
        raise UnsupportedModelError("clip_qkv is not supported in olmoe")
    return {
        **_llama(config),
        "output_bias": bool(config.attention_bias),
        "qk_norm": "projection",
        "experts": experts_of(config, config.num_experts, renormalised=config.norm_topk_prob),
    }


def _granite_moe(config: Any) -> dict[str, Any]:
    # The softmax of the chosen logits alone is that of all, renormalised.
    return {
        **_granite(config),
        "mlp_bias": False,
        "experts": experts_of(config, config.num_local_experts, renormalised=True),
    }


def _gpt_oss(config: Any) -> dict[str, Any]:
    # Published configs do not say the latter, and not each release of transformers has it.
    clamp = Clamp(float(getattr(config, "swiglu_limit", 7.0)), float(getattr(config, "swiglu_alpha", 1.702)))
    # The softmax of the chosen logits alone is that of all, renormalised.
    experts = experts_of(config, config.num_local_experts, renormalised=True)
    return {
        **_llama(config),
        "windows": _layer_windows(config),
        "sinks": True,
        "experts": replace(experts, bias=True, clamp=clamp),
    }


def _ernie4_5_moe(config: Any) -> dict[str, Any]:
    if config.use_bias:
        raise UnsupportedModelError("use_bias, which is of lm_head too, is not supported in ernie4_5_moe")
    return {**_ernie4_5(config), "experts": ernie_experts(config), "unread": ("model.mtp_",)}


def _glm4_moe(config: Any) -> dict[str, Any]:
    layers = config.num_hidden_layers
    behind = range(layers, layers + (getattr(config, "num_nextn_predict_layers", 0) or 0))
    return {
        "qkv_bias": bool(config.attention_bias),
        "qk_norm": "head" if config.use_qk_norm else "none",
        "rope": rope_of(config, config.rope_parameters, rotated=_rotated(config)),
        "experts": by_sigmoids(config, behind_dense_layers(config)),
        "unread": tuple(f"model.layers.{layer}." for layer in behind),
    }


def _qwen2_moe(config: Any) -> dict[str, Any]:
    return {
        "windows": _layer_windows(config),
        "qkv_bias": bool(config.qkv_bias),
        "experts": experts_of(
            config,
            config.num_experts,
            renormalised=config.norm_topk_prob,
            width=config.moe_intermediate_size,
            layers=every_nth_layer(config),
            shared=Shared(config.shared_expert_intermediate_size, gated=True),
        ),
    }


def _dots1(config: Any) -> dict[str, Any]:
    return {**_qwen3(config), "experts": by_sigmoids(config, behind_dense_layers(config))}


def _solar_open(config: Any) -> dict[str, Any]:
    return {
        "qkv_bias": bool(config.attention_bias),
        "rope": rope_of(config, config.rope_parameters, rotated=_rotated(config)),
        "experts": by_sigmoids(config),
    }


def _hunyuan_moe(config: Any) -> dict[str, Any]:
    return {**_hunyuan(config), "experts": hunyuan_experts(config)}


def _flex_olmo(config: Any) -> dict[str, Any]:
    experts = experts_of(config, config.num_experts, renormalised=config.norm_topk_prob)
    return {**_olmo2(config), "mlp_bias": False, "experts": experts}


FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "LLaMAForCausalLM": _llama,  # as the first conversions of Llama 1 spell it
    "MistralForCausalLM": _mistral,
    "Mistral3ForConditionalGeneration": _mistral3,
    "Ministral3ForCausalLM": _mistral3,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3,
    "Phi3ForCausalLM": _phi3,
    "Olmo2ForCausalLM": _olmo2,
    "Olmo3ForCausalLM": _olmo3,
    "SmolLM3ForCausalLM": _smollm3,
    "Exaone4ForCausalLM": _exaone4,
    "GlmForCausalLM": _glm,
    "Glm4ForCausalLM": _glm4,
    "Ernie4_5ForCausalLM": _ernie4_5,
    "Ernie4_5_ForCausalLM": _ernie4_5,  # as first published
    "SeedOssForCausalLM": _seed_oss,
    "HunYuanDenseV1ForCausalLM": _hunyuan,
    "GraniteForCausalLM": _granite,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "OlmoeForCausalLM": _olmoe,
    "GraniteMoeForCausalLM": _granite_moe,
    "GptOssForCausalLM": _gpt_oss,
    "Ernie4_5_MoeForCausalLM": _ernie4_5_moe,
    "Glm4MoeForCausalLM": _glm4_moe,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Dots1ForCausalLM": _dots1,
    "HunYuanMoEV1ForCausalLM": _hunyuan_moe,
    "SolarOpenForCausalLM": _solar_open,
    "FlexOlmoForCausalLM": _flex_olmo,
}
"""For each architecture the fields of `ModelConfig` in which it differs from a plain pre-norm decoder."""

WITH_VISION = {"Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"}
"""Of these the text part is served; its config is within the model's."""


def check_architecture(architecture: str) -> None:
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}"
        )


def head_dim_of(config: Any) -> int:
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _rotated(config: Any) -> int:
    """Channels of a head that are rotated. Raises ValueError where they are none, or more than there are."""
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    rotated = int(head_dim_of(config) * factor)
    if not 0 < rotated <= head_dim_of(config):
        raise ValueError(f"partial_rotary_factor is {factor}, of heads with {head_dim_of(config)} channels")
    return rotated


def _layer_windows(config: Any) -> tuple[int | None, ...]:
    return tuple(
        config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
    )


def _unrotated(config: Any, layers: tuple[bool, ...]) -> dict[str, Any]:
    """Without rotation where `layers` says so."""
    still = RopeConfig(torch.zeros(head_dim_of(config) // 2), 1.0)
    return {"local_rope": still, "local_layers": layers}


def _two_kinds_of_layers(config: Any) -> dict[str, Any]:
    """With a window and without, each kind with a rotary embedding of its own."""
    ropes = config.rope_parameters
    return {
        "windows": _layer_windows(config),
        "rope": rope_of(config, ropes["full_attention"], layer_type="full_attention"),
        "local_rope": rope_of(config, ropes["sliding_attention"], layer_type="sliding_attention"),
    }


def rope_of(
    config: Any, parameters: dict[str, Any], *, layer_type: str | None = None, rotated: int | None = None
) -> RopeConfig:
    """Inverse frequencies by transformers' own formulas, so that every scaling is the reference's."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        raise UnsupportedModelError(
            f"RoPE type {kind!r} is not supported; supported: {', '.join(_STATIC_ROPE)}"
        )
    if kind == "longrope" and config.model_type != "phi3":
        raise UnsupportedModelError(f"RoPE type 'longrope' is not supported in {config.model_type}")
    if kind == "default":
        size = rotated or head_dim_of(config)
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return RopeConfig(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
    init: Callable[..., tuple[torch.Tensor, float]] = ROPE_INIT_FUNCTIONS[kind]
    of_layers = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq, scale = init(config, device=torch.device("cpu"), **of_layers)
    return RopeConfig(inv_freq.float(), float(scale))
