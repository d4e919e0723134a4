"""Mixtures of experts in GGUF files: what the metadata says of them, and each expert's part of a tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import UnsupportedModelError
from engine.model import mxfp4
from engine.model.embedded import shortest
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
    "ernie4_5-moe": "moe_num_experts",
    "glm4moe": "n_routed_experts",
    "qwen2moe": "num_experts",
    "dots1": "n_routed_experts",
    "hunyuan-moe": "num_experts",
}
"""For each `general.architecture` that may have experts, what its Hugging Face config calls their number."""

_SIGMOIDS = ("glm4moe", "dots1")
_WITH_SHARED = ("ernie4_5-moe", "qwen2moe", "hunyuan-moe", *_SIGMOIDS)
_NOT_RENORMALISED = ("olmoe", "qwen2moe", *_SIGMOIDS)
"""Where the file says nothing. It seldom does: llama.cpp's own graphs of these have it so."""
_EITHER = ("qwen3moe", *_NOT_RENORMALISED)
"""Of which a config says whether weights sum to one."""

_MXFP4 = "MXFP4"  # gguf's name of the type

_ROUTER = "blk.{}.ffn_gate_inp.weight"

_SHARED_TOLD, _GROUPS_TOLD = "experts that see every token", "groups of experts"
_REFUSED: dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]] = {
    "expert_shared_count": ((0,), _SHARED_TOLD, _WITH_SHARED),
    "expert_shared_feed_forward_length": ((0,), _SHARED_TOLD, _WITH_SHARED),
    "expert_group_count": ((0, 1), _GROUPS_TOLD, _SIGMOIDS),
    "expert_weights_scale": ((0, 1), "a factor on the weights of experts", _SIGMOIDS),
    "attention.clamp_kqv": ((0,), "a bound on queries, keys and values", ()),
}
"""Of a model with experts: metadata with the values that mean nothing, what it would be else, and of which
architectures it is read."""

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
    for key, (harmless, told, *read) in _REFUSED.items():
        if arch not in read[0] and own.get(key, harmless[0]) not in harmless:
            raise UnsupportedModelError(f"a GGUF of {arch} with {told} ({arch}.{key}) is not supported")
    if own.get("expert_gating_func", 0) not in (0, 2 if arch in _SIGMOIDS else 1):  # ExpertGatingFuncType
        told = "no sigmoids" if arch in _SIGMOIDS else "no softmax"
        raise UnsupportedModelError(
            f"a GGUF of {arch} with weights of experts that are {told} ({arch}.expert_gating_func) is not "
            "supported"
        )
    routers = (_ROUTER.format(layer) for layer in range(own["block_count"]))
    router = next((name for name in routers if name in tensors), _ROUTER.format(0))
    if (rows := tensors[router].shape[0]) != count:  # before anything is made for each of them
        raise ValueError(f"it names {count} experts, and {router} has {rows} rows")
    chosen = same_in_all_layers(own["expert_used_count"], "experts of a token")
    # Which is a name for it in every config, though some have another.
    entries: dict[str, Any] = {_COUNT_NAMES[arch]: count, "num_experts_per_tok": chosen}
    stacked = {tensor.type for name, tensor in tensors.items() if name.endswith("_exps.weight")}
    if stacked == {_MXFP4}:
        entries["quantization_config"] = {"quant_method": MXFP4}
    renormalised = own.get("expert_weights_norm", arch not in _NOT_RENORMALISED)
    if arch in _EITHER:
        entries["norm_topk_prob"] = renormalised
    elif not renormalised:
        raise UnsupportedModelError(
            f"a GGUF of {arch} whose weights of experts do not sum to one is not supported"
        )
    if arch in ("qwen3moe", *_WITH_SHARED):
        width = same_in_all_layers(own.get("expert_feed_forward_length", 0), "the width of experts")
        entries["moe_intermediate_size"] = width or own["feed_forward_length"] // max(chosen, 1)
    if arch == "llama":  # whose sliding window the converter leaves out, if it has one
        return entries | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "sliding_window": None,
        }
    return entries | _beside(own, arch, tensors, entries.get("moe_intermediate_size", 0))


def _beside(
    own: Mapping[str, Any], arch: str, tensors: Mapping[str, GgufTensor], width: int
) -> dict[str, Any]:
    """The entries of an MLP beside experts that are `width` wide, of layers without, and of the choice."""
    shared = own.get("expert_shared_feed_forward_length", 0)
    if arch == "ernie4_5-moe":
        return {
            "moe_num_shared_experts": own.get("expert_shared_count", 0),
            "moe_layer_start_index": own.get("leading_dense_block_count", 0),
            "moe_layer_interval": own.get("interleave_moe_layer_step", 1),
            "moe_layer_end_index": -1,
        }
    if arch == "qwen2moe":
        return {
            "shared_expert_intermediate_size": shared or own["feed_forward_length"],
            "qkv_bias": "blk.0.attn_q.bias" in tensors,
        }
    if arch == "hunyuan-moe":
        if shared not in (0, width):
            raise UnsupportedModelError(
                f"a GGUF of {arch} whose MLP beside the experts ({shared}) is not as wide as they are "
                f"({width}) is not supported"
            )
        return {"intermediate_size": width}
    if arch not in _SIGMOIDS:
        return {}
    entries = {
        "n_shared_experts": own["expert_shared_count"],
        "first_k_dense_replace": own.get("leading_dense_block_count", 0),
        "routed_scaling_factor": shortest(own.get("expert_weights_scale", 0.0) or 1.0),
        "n_group": own.get("expert_group_count", 0) or 1,
        "topk_group": own.get("expert_group_used_count", 0) or 1,
    }
    if arch == "dots1":
        return entries
    return entries | {"use_qk_norm": "blk.0.attn_q_norm.weight" in tensors}


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
