"""The decoder's own view of a Hugging Face model config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelError, UnsupportedModelError

__all__ = ["SUPPORTED_ARCHITECTURES", "ModelConfig", "RopeConfig"]

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)

# Frequencies that depend on the sequence's length ("dynamic") would rotate cached keys by other
# angles than new queries, and transformers' own cache has that flaw; longrope comes with its family.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: float32 inverse frequencies [head_dim / 2] and a factor on cos and sin."""

    inv_freq: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and flags of one decoder-only model. `head_dim` is explicit: it need not be hidden / heads."""

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
    attention_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    dtype: torch.dtype

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` of a local model folder.

        Raises:
            UnsupportedModelError: the architecture, activation, or RoPE type is not covered.
            ModelError: there is no readable config.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"cannot read the model config in {folder}: {error}") from error
        return cls.from_hf(config)

    @classmethod
    def from_hf(cls, config: Any) -> ModelConfig:
        """From a transformers config object.

        Raises:
            UnsupportedModelError: as `from_folder`.
        """
        architectures = config.architectures or []
        architecture = (
            architectures[0] if architectures else f"(none given, model_type {config.model_type!r})"
        )
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModelError(
                f"architecture {architecture} is not supported; "
                f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        if config.hidden_act not in ("silu", "swish"):
            raise UnsupportedModelError(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModelError(
                "quantised checkpoints are not supported; use the full-precision weights"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=getattr(config, "attention_bias", False),
            mlp_bias=getattr(config, "mlp_bias", False),
            rope=_rope(config, head_dim),
            dtype=_dtype(config),
        )


def _rope(config: Any, head_dim: int) -> RopeConfig:
    """Inverse frequencies by transformers' own formulas, so that every scaling is the reference's."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in _STATIC_ROPE:
        raise UnsupportedModelError(
            f"RoPE type {kind!r} is not supported; supported: {', '.join(_STATIC_ROPE)}"
        )
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return RopeConfig(1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0)
    init: Callable[..., tuple[torch.Tensor, float]] = ROPE_INIT_FUNCTIONS[kind]
    inv_freq, scale = init(config, device=torch.device("cpu"))
    return RopeConfig(inv_freq.float(), float(scale))


def _dtype(config: Any) -> torch.dtype:
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
