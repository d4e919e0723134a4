"""Mixtures of experts in GGUF files: what the metadata says of them, and each expert's part of a tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.errors import UnsupportedModelError
from engine.model.gguf_fields import same_in_all_layers
from engine.model.gguf_header import GgufTensor

__all__ = ["expert_tensors", "experts_config"]

_COUNT_NAMES = {
    "llama": "num_local_experts",  # Mixtral where it has some
    "granitemoe": "num_local_experts",
    "qwen3moe": "num_experts",
    "olmoe": "num_experts",
}
"""For each `general.architecture` that may have experts, what its Hugging Face config calls their number."""

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
    "ffn_gate_exps.weight": "gate_proj",
    "ffn_up_exps.weight": "up_proj",
    "ffn_down_exps.weight": "down_proj",
}
"""Tensors of all experts of a layer: [experts, outputs, inputs]."""

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
    entries = {_COUNT_NAMES[arch]: count, "num_experts_per_tok": chosen}
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
    if part not in _STACKED or len(tensor.shape) != 3 or not tensor.bytes:
        return {}
    count, *shape = tensor.shape
    size = tensor.bytes // count
    return {
        f"{layer}.mlp.experts.{expert}.{_STACKED[part]}.weight": tensor._replace(
            shape=tuple(shape), offset=tensor.offset + expert * size, bytes=size
        )
        for expert in range(count)
    }
