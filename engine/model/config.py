"""The decoder's own view of a Hugging Face model config: shapes, and the flags that make a family."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engine.errors import ModelError, UnsupportedModelError
from engine.model.hf_imports import import_validators
from engine.model.prequantized import check_quantization

__all__ = ["ExpertsConfig", "ModelConfig", "RopeConfig"]

log = logging.getLogger(__name__)

# Frequencies that depend on the sequence's length ("dynamic") would rotate cached keys by other
# angles than new queries, and transformers' own cache has that flaw.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "longrope")

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: float32 inverse frequencies and a factor on cos and sin.

    `inv_freq` has head_dim / 2 entries, or fewer where only the first 2 * len(inv_freq) channels of a
    head are rotated.
    """

    inv_freq: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP.

    Args:
        count: experts of a layer.
        chosen: for each token.
        width: channels between the two products of each.
        renormalised: the weights of those chosen sum to one.
        layers: for each layer, whether it has them.
    """

    count: int
    chosen: int
    width: int
    renormalised: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and flags of one decoder-only model. `head_dim` is explicit: it need not be hidden / heads.

    Args:
        qkv_bias: on the projections to queries, keys and values.
        output_bias: on the projection out of attention.
        mlp_bias: on the three projections of the MLP.
        activation: of the MLP's gate.
        norms: of a layer's two blocks: before each ("pre"), on each one's output ("post"), or both.
        norm_offset: norms multiply by 1 + weight.
        qk_norm: queries and keys are normed per head ("head"), over all heads ("projection") or not.
        fused: the checkpoint holds q, k, v in one matrix, and gate, up in another.
        windows: for each layer, how many positions a query sees, its own counted; None is all before it.
        rope: of all layers but those in `local_rope`'s.
        local_rope: of some layers, where theirs is another.
        local_layers: for each layer, whether it is one of these; None is those with a window.
        attention_scale: factor on q k^T; None is head_dim ** -0.5.
        embedding_scale: factor on the embeddings.
        residual_scale: factor on what each block adds to the residual stream.
        logits_divisor: logits are divided by it.
        experts: in place of the MLP of some layers or all; `intermediate_size` is that of the others.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    rope: RopeConfig
    dtype: torch.dtype
    local_rope: RopeConfig | None = None
    local_layers: tuple[bool, ...] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Literal["pre", "post", "both"] = "pre"
    norm_offset: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    fused: bool = False
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    experts: ExpertsConfig | None = None

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts in place of its MLP."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def group(self) -> int:
        """Query heads per K/V head."""
        return self.num_heads // self.num_kv_heads

    def is_local(self, layer: int) -> bool:
        """Whether a layer's rotary embedding is `local_rope`, where there is one."""
        return self.windows[layer] is not None if self.local_layers is None else self.local_layers[layer]

    def windows_within(self, positions: int) -> tuple[int | None, ...] | None:
        """`windows` as sequences of up to `positions` feel them; None where no layer's window ever binds."""
        windows = tuple(None if window is None or window >= positions else window for window in self.windows)
        return None if all(window is None for window in windows) else windows

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` of a local model folder.

        Raises:
            UnsupportedModelError: the architecture, activation, or RoPE type is not covered.
            ModelError: there is no readable config.
        """
        import_validators()
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        # Before transformers looks: for what it does not know either, it asks for trust_remote_code.
        try:
            stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the model config in {folder}: {error}") from error
        if isinstance(stated, dict) and (architectures := stated.get("architectures")):
            _check_architecture(str(architectures[0]))
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
            raise ModelError(f"cannot read the model config in {folder}: {error}") from error
        try:
            return cls.from_hf(config)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ModelError(f"the model config in {folder} holds what it should not: {what}") from error

    @classmethod
    def from_hf(cls, config: Any) -> ModelConfig:
        """From a transformers config object.

        Raises:
            UnsupportedModelError: as `from_folder`.
        """
        architecture = (config.architectures or [f"(none given, model_type {config.model_type!r})"])[0]
        _check_architecture(architecture)
        whole = config
        if architecture in _WITH_VISION:
            config = config.text_config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"hidden_act {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
            )
        if (quantization := getattr(whole, "quantization_config", None)) is not None:
            check_quantization(quantization)
        flags: dict[str, Any] = {
            "windows": (None,) * config.num_hidden_layers,
            "max_position": config.max_position_embeddings,
            **_FAMILIES[architecture](config),
        }
        if "rope" not in flags:
            flags["rope"] = _rope(config, config.rope_parameters)
        return cls(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=_head_dim(config),
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=whole.tie_word_embeddings,
            activation=_ACTIVATIONS[activation],
            dtype=_dtype(whole),
            **flags,
        )


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
    rotated = int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    flags: dict[str, Any] = {
        "windows": (config.sliding_window,) * config.num_hidden_layers,
        "fused": True,
        "rope": _rope(config, rope, rotated=rotated),
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
    unrotated = torch.zeros(_head_dim(config) // 2)
    no_windows = (None,) * config.num_hidden_layers
    return {
        **_llama(config),
        "windows": _layer_windows(config) if config.use_sliding_window else no_windows,
        "local_rope": RopeConfig(unrotated, 1.0),
        "local_layers": tuple(not rotated for rotated in config.no_rope_layers),
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
    return {**_mistral(config), "experts": _experts(config, config.num_local_experts, renormalised=True)}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    dense, every = config.mlp_only_layers or (), config.decoder_sparse_step
    if every < 1:
        raise UnsupportedModelError(f"decoder_sparse_step is {every}; it must be 1 or more")
    mixed = tuple(
        layer not in dense and (layer + 1) % every == 0 for layer in range(config.num_hidden_layers)
    )
    return {
        **_llama(config),
        "mlp_bias": False,
        "windows": (config.sliding_window,) * config.num_hidden_layers,
        "qk_norm": "head",
        "experts": _experts(
            config,
            config.num_experts,
            renormalised=config.norm_topk_prob,
            width=config.moe_intermediate_size,
            layers=mixed,
        ),
    }


def _olmoe(config: Any) -> dict[str, Any]:
    if config.clip_qkv is not None:
        raise UnsupportedModelError("clip_qkv is not supported in olmoe")
    return {
        **_llama(config),
        "output_bias": bool(config.attention_bias),
        "qk_norm": "projection",
        "experts": _experts(config, config.num_experts, renormalised=config.norm_topk_prob),
    }


def _granite_moe(config: Any) -> dict[str, Any]:
    # The softmax of the chosen logits alone is that of all, renormalised.
    return {
        **_granite(config),
        "mlp_bias": False,
        "experts": _experts(config, config.num_local_experts, renormalised=True),
    }


def _experts(
    config: Any,
    count: int,
    *,
    renormalised: bool,
    width: int | None = None,
    layers: tuple[bool, ...] | None = None,
) -> ExpertsConfig:
    chosen = config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise UnsupportedModelError(
            f"num_experts_per_tok is {chosen} of {count} experts; it must be 1 to {count}"
        )
    return ExpertsConfig(
        count=count,
        chosen=chosen,
        width=width or config.intermediate_size,
        renormalised=bool(renormalised),
        layers=layers or (True,) * config.num_hidden_layers,
    )


_FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
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
    "SeedOssForCausalLM": _seed_oss,
    "GraniteForCausalLM": _granite,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "OlmoeForCausalLM": _olmoe,
    "GraniteMoeForCausalLM": _granite_moe,
}
"""For each architecture the fields of `ModelConfig` in which it differs from a plain pre-norm decoder."""

_WITH_VISION = {"Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"}
"""Of these the text part is served; its config is within the model's."""


def _check_architecture(architecture: str) -> None:
    if architecture not in _FAMILIES:
        raise UnsupportedModelError(
            f"architecture {architecture} is not supported; supported are {', '.join(_FAMILIES)}"
        )


def _head_dim(config: Any) -> int:
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _layer_windows(config: Any) -> tuple[int | None, ...]:
    return tuple(
        config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
    )


def _two_kinds_of_layers(config: Any) -> dict[str, Any]:
    """With a window and without, each kind with a rotary embedding of its own."""
    ropes = config.rope_parameters
    return {
        "windows": _layer_windows(config),
        "rope": _rope(config, ropes["full_attention"], layer_type="full_attention"),
        "local_rope": _rope(config, ropes["sliding_attention"], layer_type="sliding_attention"),
    }


def _rope(
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
        size = rotated or _head_dim(config)
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return RopeConfig(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
    init: Callable[..., tuple[torch.Tensor, float]] = ROPE_INIT_FUNCTIONS[kind]
    of_layers = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq, scale = init(config, device=torch.device("cpu"), **of_layers)
    return RopeConfig(inv_freq.float(), float(scale))


def _dtype(config: Any) -> torch.dtype:
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
