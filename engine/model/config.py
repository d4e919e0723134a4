"""The decoder's own view of a Hugging Face model config: shapes, and the flags that make a family."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from engine.errors import ModelError, UnsupportedModelError
from engine.model.experts_config import ExpertsConfig
from engine.model.families import (
    FAMILIES,
    WITH_VISION,
    RopeConfig,
    check_architecture,
    head_dim_of,
    rope_of,
)
from engine.model.hf_imports import import_validators
from engine.model.mxfp4 import suits_kernels
from engine.model.prequantized import MXFP4, check_quantization

__all__ = ["ModelConfig"]

log = logging.getLogger(__name__)

_OF_NONSENSE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError)
"""What comes of a config's values that are none, in transformers' hands or here."""

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


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
        qk_norm_last: after they are rotated, not before; of heads that are rotated whole.
        fused: the checkpoint holds gate and up in one matrix ("gate_up"), q, k and v in another too ("all").
        renamed: by what others call a module of a layer, such as Gemma 3 its four norms, what this does.
        windows: for each layer, how many positions a query sees, its own counted; None is all before it.
        interleaved: the checkpoint rotates neighbouring channels of a head, not its halves.
        rope: of all layers but those in `local_rope`'s.
        local_rope: of some layers, where theirs is another.
        local_layers: for each layer, whether it is one of these; None is those with a window.
        sinks: each query head has a learned logit that takes its share of the softmax and brings no value.
        attention_scale: factor on q k^T; None is head_dim ** -0.5.
        embedding_scale: factor on the embeddings.
        residual_scale: factor on what each block adds to the residual stream.
        logits_divisor: logits are divided by it.
        experts: in place of the MLP of some layers or all; `intermediate_size` is that of the others.
        unread: what names of tensors begin with that a checkpoint may hold and nothing here reads: those of
            layers that guess tokens further ahead.
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
    qk_norm_last: bool = False
    fused: Literal["none", "gate_up", "all"] = "none"
    renamed: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    sinks: bool = False
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    experts: ExpertsConfig | None = None
    unread: tuple[str, ...] = ()

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
            ModelError: there is no readable config, or sizes in it cannot be.
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
            check_architecture(str(architectures[0]))
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, *_OF_NONSENSE, StrictDataclassError) as error:
            what = " ".join(str(error).split())  # in a line
            raise ModelError(f"cannot read the model config in {folder}: {what}") from error
        try:
            return cls.from_hf(config)
        except _OF_NONSENSE as error:
            what = f"{type(error).__name__}: {error}"
            raise ModelError(f"the model config in {folder} holds what it should not: {what}") from error

    @classmethod
    def from_hf(cls, config: Any) -> ModelConfig:
        """From a transformers config object.

        Raises:
            UnsupportedModelError: as `from_folder`.
        """
        architecture = (config.architectures or [f"(none given, model_type {config.model_type!r})"])[0]
        check_architecture(architecture)
        whole = config
        if architecture in WITH_VISION:
            config = config.text_config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"hidden_act {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
            )
        if (quantization := getattr(whole, "quantization_config", None)) is not None:
            check_quantization(quantization)
        _check_sizes(config)
        flags: dict[str, Any] = {
            "windows": (None,) * config.num_hidden_layers,
            "max_position": config.max_position_embeddings,
            **FAMILIES[architecture](config),
        }
        _check_windows(flags["windows"])
        if "rope" not in flags:
            flags["rope"] = rope_of(config, config.rope_parameters)
        mxfp4 = quantization is not None and quantization.get("quant_method") == MXFP4
        if mxfp4:
            flags["experts"] = _in_mxfp4(flags.get("experts"), config.hidden_size)
        return cls(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=_width(config),
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim_of(config),
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=whole.tie_word_embeddings,
            activation=_ACTIVATIONS[activation],
            # gpt-oss does not say what its other weights are.
            dtype=_dtype(whole, torch.bfloat16 if mxfp4 else torch.float32),
            **flags,
        )


def _width(config: Any) -> int:
    """Channels of an MLP; where every layer has experts a config may not say it."""
    stated = "intermediate_size" if hasattr(config, "intermediate_size") else "moe_intermediate_size"
    width: int = getattr(config, stated)
    return width


def _check_sizes(config: Any) -> None:
    """Raises ValueError: transformers takes any number."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(config, name) for name in (*names, "max_position_embeddings")}
    heads = config.num_attention_heads
    sizes |= {"intermediate_size": _width(config), "num_key_value_heads": config.num_key_value_heads or heads}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be 1 or more")
    if (head_dim := head_dim_of(config)) < 1:
        raise ValueError(f"head_dim is {head_dim}; it must be 1 or more")
    if heads % sizes["num_key_value_heads"]:
        raise ValueError(
            f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, "
            f"{sizes['num_key_value_heads']}"
        )


def _check_windows(windows: Sequence[int | None]) -> None:
    """Raises ValueError: a query sees itself at least."""
    for window in windows:
        if window is not None and window < 1:
            raise ValueError(f"sliding_window is {window}; it must be 1 or more")


def _in_mxfp4(experts: ExpertsConfig | None, hidden: int) -> ExpertsConfig:
    if experts is None:
        raise UnsupportedModelError("checkpoints in mxfp4 are supported of mixtures of experts only")
    return replace(experts, mxfp4=suits_kernels(hidden) and suits_kernels(experts.width))


def _dtype(config: Any, otherwise: torch.dtype) -> torch.dtype:
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else otherwise
