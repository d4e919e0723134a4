"""Mixtures of experts in GGUF files: what the metadata says of them, and each expert's part of a tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import UnsupportedModelError
from engine.model import mxfp4
from engine.model.gguf_fields import same_in_all_layers
from engine.model.gguf_header import GgufTensor
from engine.model.prequantized import MXFP4

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "expert_tensors",
    "experts_config",
    "mxfp4_experts",
    "packed_names",
    "packed_shape",
    "packed_tensor",
]

_COUNT_NAMES = {
    "llama": "num_local_experts",  # Mixtral where it has some
    "granitemoe": "num_local_experts",
    "qwen3moe": "num_experts",
    "olmoe": "num_experts",
    "gpt-oss": "num_local_experts",
}
"""For each `general.architecture` that may have experts, what its Hugging Face config calls their number."""

_MXFP4 = "MXFP4"  # gguf's name of the type

_ROUTER = "blk.0.ffn_gate_inp.weight"

_REFUSED = {
    "expert_shared_count": ((0,), "experts that see every token"),
    "expert_shared_feed_forward_length": ((0,), "experts that see every token"),
    "expert_group_count": ((0, 1), "groups of experts"),
    "expert_gating_func": ((0, 1), "weights of experts that are no softmax"),  # gguf.ExpertGatingFuncType
    "expert_weights_scale": ((0, 1), "a factor on the weights of experts"),
    "attention.clamp_kqv": ((0,), "a bound on queries, keys and values"),
}
"""Of a model with experts: metadata with the values that mean nothing, and what it would be else."""

_STACKED = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}
"""Tensors of all experts of a layer: weights [experts, outputs, inputs], biases [experts, outputs]."""

_DIMENSIONS = {"weight": 3, "bias": 2}

_OF_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d+)\.weight")  # Mixtral's, up to March 2024


def experts_config(own: Mapping[str, Any], arch: str, tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """The entries of a transformers config that say the same of its experts; none where there are none.

    Args:
        own: the architecture's metadata, without its prefix.

    Raises:
        UnsupportedModelError: the architecture is not served with what is stated.
        LookupError, ValueError: metadata or the router is missing or does not fit.
    """
    count = own.get("expert_count", 0)
    if not count:
        if arch != "llama" and arch in _COUNT_NAMES:
            raise UnsupportedModelError(f"a GGUF of {arch} without experts is not supported")
        return {}
    if arch not in _COUNT_NAMES:
        raise UnsupportedModelError(f"a GGUF of {arch} with experts is not supported")
    for key, (harmless, told) in _REFUSED.items():
        if own.get(key, harmless[0]) not in harmless:
            raise UnsupportedModelError(f"a GGUF of {arch} with {told} ({arch}.{key}) is not supported")
    if (rows := tensors[_ROUTER].shape[0]) != count:  # before anything is made for each of them
        raise ValueError(f"it names {count} experts, and {_ROUTER} has {rows} rows")
    chosen = same_in_all_layers(own["expert_used_count"], "experts of a token")
    entries: dict[str, Any] = {_COUNT_NAMES[arch]: count, "num_experts_per_tok": chosen}
    stacked = {tensor.type for name, tensor in tensors.items() if name.endswith("_exps.weight")}
    if stacked == {_MXFP4}:
        entries["quantization_config"] = {"quant_method": MXFP4}
    # Files seldom say it. llama.cpp's own graphs of these have it so.
    renormalised = own.get("expert_weights_norm", arch != "olmoe")
    if arch in ("qwen3moe", "olmoe"):
        entries["norm_topk_prob"] = renormalised
    elif not renormalised:
        raise UnsupportedModelError(
            f"a GGUF of {arch} whose weights of experts do not sum to one is not supported"
        )
    if arch == "qwen3moe":
        width = same_in_all_layers(own.get("expert_feed_forward_length", 0), "the width of experts")
        entries["moe_intermediate_size"] = width or own["feed_forward_length"] // max(chosen, 1)
    if arch == "llama":  # whose sliding window the converter leaves out, if it has one
        return entries | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "sliding_window": None,
        }
    return entries


def expert_tensors(layer: str, part: str, tensor: GgufTensor) -> dict[str, GgufTensor]:
    """Each expert's own of a layer's tensor, by its Hugging Face name; none of any other tensor.

    An expert's part of what is stacked can be read alone: its rows are whole blocks, one behind the other.

    Args:
        layer: as Hugging Face names it.
        part: of the tensor's own name, what follows the layer.
    """
    if found := _OF_EXPERT.fullmatch(part):
        projection, expert = found.groups()
        return {f"{layer}.mlp.experts.{expert}.{projection}_proj.weight": tensor}
    part, _, kind = part.rpartition(".")
    if part not in _STACKED or len(tensor.shape) != _DIMENSIONS.get(kind) or not tensor.bytes:
        return {}
    count, *shape = tensor.shape
    size = tensor.bytes // count
    return {
        f"{layer}.mlp.experts.{expert}.{_STACKED[part]}.{kind}": tensor._replace(
            shape=tuple(shape), offset=tensor.offset + expert * size, bytes=size
        )
        for expert in range(count)
    }


def mxfp4_experts(tensors: Mapping[str, GgufTensor]) -> set[str]:
    """The names of experts' weights, as `expert_tensors` has them, if all of them are in MXFP4; else none."""
    found = {name for name in tensors if ".mlp.experts." in name and name.endswith(".weight")}
    return found if {tensors[name].type for name in found} == {_MXFP4} else set()


def packed_names(name: str) -> tuple[str, str]:
    """Of a weight's codes and scales, as kernels take them."""
    module = name.removesuffix("weight")
    return f"{module}blocks", f"{module}scales"


def packed_tensor(data: np.memmap[Any, Any], tensor: GgufTensor, name: str) -> torch.Tensor:
    """A weight's codes or scales as kernels take them, by one of its `packed_names`.

    Raises:
        WeightsError: see `mxfp4.packed_scales`.
    """
    raw = torch.from_numpy(data[tensor.offset : tensor.offset + tensor.bytes].copy())
    codes, scales = mxfp4.from_gguf(raw.view(tensor.shape[0], -1))
    return mxfp4.packed_scales(scales, name) if name.endswith("scales") else mxfp4.packed_codes(codes)


def packed_shape(tensor: GgufTensor, name: str) -> tuple[int, ...]:
    """That of `packed_tensor`."""
    rows, size = tensor.shape
    return (mxfp4.words(size), rows) if name.endswith("scales") else (rows, size // 2)
