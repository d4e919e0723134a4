"""What configs of GGUF's architectures say in which these differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import UnsupportedModelError
from engine.model.embedded import shortest
from engine.model.gguf_fields import same_in_all_layers

__all__ = ["OF_FAMILY"]

# What the metadata does not say, as llama.cpp has it.
_GEMMA3_27B_LAYERS = 62  # whose queries alone are scaled by hidden / heads
_GEMMA3_PERIOD = 6  # every sixth layer sees all
_PERIOD = 4  # likewise in OLMo 3 and EXAONE 4, where the file does not name the layers
_PHI3_4K_WINDOW = 2047  # which the first converters left out


def _gemma3(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    per_head = config["hidden_size"] // config["num_attention_heads"]
    large = config["num_hidden_layers"] == _GEMMA3_27B_LAYERS
    local = {"rope_type": "default", "rope_theta": 10000.0}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if large else config["head_dim"],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "sliding_window": own["attention.sliding_window"],
        "sliding_window_pattern": _GEMMA3_PERIOD,
    }


def _phi3(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    context = config["max_position_embeddings"]
    window = own.get("attention.sliding_window", _PHI3_4K_WINDOW if context == 4096 else 0)
    return {
        "original_max_position_embeddings": own.get("rope.scaling.original_context_length", context),
        "sliding_window": window or None,  # 0 in Phi-4
    }


def _granite(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if not own.get("rope.scaling.finetuned", True):
        raise UnsupportedModelError("a GGUF of Granite without rotation is not supported")
    return {
        "attention_multiplier": shortest(own.get("attention.scale", config["head_dim"] ** -0.5)),
        "embedding_multiplier": shortest(own.get("embedding_scale", 1.0)),
        "logits_scaling": shortest(own["logit_scale"]),
        "residual_multiplier": shortest(own.get("residual_scale", 1.0)),
    }


def _windowed(own: Mapping[str, Any], config: Mapping[str, Any], period: int = _PERIOD) -> dict[str, Any]:
    """Which layers have a window, where every fourth sees all unless the file names them."""
    layers, window = config["num_hidden_layers"], own.get("attention.sliding_window")
    local = own.get("attention.sliding_window_pattern", period) if window else 1
    if isinstance(local, int):
        local = [(layer + 1) % local != 0 for layer in range(layers)]
    if len(local) != layers:
        raise ValueError(f"sliding_window_pattern names {len(local)} layers of {layers}")
    kinds = ["sliding_attention" if windowed else "full_attention" for windowed in local]
    return {"sliding_window": window or None, "layer_types": kinds}


def _olmo2(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if not own.get("attention.sliding_window"):
        return {}
    rope = config["rope_parameters"]
    theta = shortest(own.get("rope.freq_base_swa", rope["rope_theta"]))
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        **_windowed(own, config),
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


def _ernie4_5(_: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_bias": config["attention_bias"]}


def _glm4(own: Mapping[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    if "rope.dimension_sections" in own:  # for which the converter has turned queries and keys already
        raise UnsupportedModelError("a GGUF of a GLM that sees images is not supported")
    return {}


def _mistral3(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"sliding_window": own.get("attention.sliding_window")}  # else transformers takes Mistral 7B's
    beta, rope = own.get("attention.temperature_scale"), config["rope_parameters"]
    if not beta:
        return plain
    if rope["rope_type"] != "yarn":
        raise UnsupportedModelError("a GGUF of Ministral 3 without YaRN is not supported")
    return {
        **plain,
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "rope_parameters": rope | {"llama_4_scaling_beta": shortest(beta)},
    }


def _gpt_oss(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    width = same_in_all_layers(own.get("expert_feed_forward_length", 0), "the width of experts")
    return {
        **_windowed(own, config, period=2),
        "intermediate_size": width or config["intermediate_size"],
        # As published. llama.cpp rounds the bounds of YaRN's ramp, in which the metadata knows no choice.
        "rope_parameters": config["rope_parameters"] | {"truncate": False},
    }


OF_FAMILY: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _olmo2,
    "exaone4": _windowed,
    "ernie4_5": _ernie4_5,
    "glm4": _glm4,
    "mistral3": _mistral3,
    "granitemoe": _granite,
    "gpt-oss": _gpt_oss,
    "ernie4_5-moe": _ernie4_5,
    "glm4moe": _glm4,
}
"""For an architecture the entries of a config in which it differs, from its metadata and the rest."""
