"""GGUF files as models: config and tokenizer from the metadata, tensors dequantised as they are read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelError, UnsupportedModelError, WeightsError
from engine.model.embedded import cache_root, shortest, undo_rope_interleaving, write_json
from engine.model.gguf_experts import (
    expert_tensors,
    experts_config,
    mxfp4_experts,
    packed_names,
    packed_shape,
    packed_tensor,
)
from engine.model.gguf_families import OF_FAMILY
from engine.model.gguf_fields import checked_fields, same_in_all_layers
from engine.model.gguf_header import GgufHeader, GgufTensor, dequantized, read_header
from engine.model.gguf_tokenizer import build_tokenizer, tokenizer_config

__all__ = ["GGUF_INDEX", "GgufFile", "gguf_folder"]

log = logging.getLogger(__name__)

GGUF_INDEX = "gguf.json"
"""In a model folder made from a GGUF: the file's path and the place, type and shape of each tensor."""

_VERSION = 5
"""Raised with every change to what is written: older folders are then left alone."""

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),  # Mistral too; Mixtral where it has experts
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),  # Phi-3.5 and Phi-4 too
    "granite": ("GraniteForCausalLM", "granite"),  # also those of Granite 4 with attention in all layers
    "olmo2": ("Olmo2ForCausalLM", "olmo2"),  # OLMo 3 where it has windows
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),  # whose every fourth layer is not rotated in either
    "seed_oss": ("SeedOssForCausalLM", "seed_oss"),
    "exaone4": ("Exaone4ForCausalLM", "exaone4"),
    "ernie4_5": ("Ernie4_5ForCausalLM", "ernie4_5"),
    "hunyuan-dense": ("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
    "glm4": ("Glm4ForCausalLM", "glm4"),  # as of 0414; GLM-Z1 too
    "mistral3": ("MistralForCausalLM", "mistral"),  # Mistral Small 3.1; Ministral 3 where queries are scaled
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "olmoe": ("OlmoeForCausalLM", "olmoe"),
    "granitemoe": ("GraniteMoeForCausalLM", "granitemoe"),
    "gpt-oss": ("GptOssForCausalLM", "gpt_oss"),
    "ernie4_5-moe": ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),
    "glm4moe": ("Glm4MoeForCausalLM", "glm4_moe"),  # Solar Open too
    "qwen2moe": ("Qwen2MoeForCausalLM", "qwen2_moe"),
    "dots1": ("Dots1ForCausalLM", "dots1"),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe"),
}
"""For each `general.architecture` the Hugging Face architecture and model type."""

_NEIGHBOURS_ROTATED = ("llama", "granite", "smollm3", "mistral3", "granitemoe")
"""Those of which llama.cpp rotates neighbouring channels, where transformers rotates halves (of GLM and ERNIE
both rotate neighbours)."""

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "attn_sinks": "self_attn.sinks",
}
_WITH_SHARED = _LAYER_NAMES | {
    "exp_probs_b": "mlp.gate.e_score_correction",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_OF_HUNYUAN = {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NAMES = {
    "gemma3": _LAYER_NAMES | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"},
    "olmo2": _LAYER_NAMES | _POST_NORMS,
    "exaone4": _LAYER_NAMES | _POST_NORMS,
    "hunyuan-dense": _LAYER_NAMES | _OF_HUNYUAN,
    "ernie4_5-moe": _WITH_SHARED,
    "glm4moe": _WITH_SHARED | {"post_attention_norm": "post_attention_layernorm"},
    "qwen2moe": _WITH_SHARED,
    "dots1": _WITH_SHARED,
    "hunyuan-moe": _WITH_SHARED | _OF_HUNYUAN,
    "glm4": _LAYER_NAMES
    | {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"}
    | {"ffn_up": "mlp.gate_up_proj"},
    "seed_oss": _LAYER_NAMES | {"post_attention_norm": "post_attention_layernorm"},
    "gpt-oss": _LAYER_NAMES | {"post_attention_norm": "post_attention_layernorm"},
    "phi3": _LAYER_NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
}
"""Where an architecture's layers have others than `_LAYER_NAMES`."""

_ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3 divides its frequencies by; llama.cpp computes it ahead
_LONG_FACTORS, _SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # LongRoPE's

# What ends an answer in any model that has it as a token of its own, besides the stated end of text
# (llama.cpp does the same).
_END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
    "<|end|>",
    "<|endoftext|>",
    "<|observation|>",  # behind a call of GLM's, as its makers state
)
_HARMONY = {"<|return|>", "<|call|>", "<|end|>"}  # of which the last ends a message and not the answer
_CONTROL, _USER_DEFINED = 3, 4  # older converters write added tokens, `<|im_end|>` too, as the latter


def gguf_folder(source: Path) -> Path:
    """A folder with config, tokenizer and an index into `source`, made if it is not in the cache.

    The weights stay in the file: it must stay where it is.

    Raises:
        ModelError: it is no GGUF, damaged, or cannot be written about.
        UnsupportedModelError: its architecture or tokenizer is not covered.
    """
    source = source.resolve()
    status = source.stat()
    identity = f"{_VERSION} {source} {status.st_size} {status.st_mtime_ns}"
    folder = cache_root() / f"gguf-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".gguf-", dir=cache_root()))
    except OSError as error:
        raise ModelError(
            f"cannot write to {cache_root()}: {error.strerror or error}; name another folder in MEDUSA_CACHE"
        ) from error
    try:
        _describe(source, partial)
        try:
            partial.rename(folder)  # whole or not at all
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


class GgufFile:
    """The tensors of a GGUF under the names and in the layout of a Hugging Face checkpoint.

    Args:
        index: the folder's `GGUF_INDEX`.
        mxfp4: experts in MXFP4 are to be `x.blocks` and `x.scales`, for the kernels, in place of `x.weight`.

    Raises:
        WeightsError: the file is not where it was, or has changed.
    """

    def __init__(self, index: Path, *, mxfp4: bool = False) -> None:
        import numpy as np

        stated = json.loads(index.read_text(encoding="utf-8"))
        source = Path(stated["path"])
        if not source.is_file() or source.stat().st_size != stated["bytes"]:
            raise WeightsError(f"{source} is not the file that {index.parent} was made from; name it anew")
        self._data = np.memmap(source, mode="r")
        self._tensors = {name: GgufTensor(**tensor) for name, tensor in stated["tensors"].items()}
        self._heads: dict[str, int] = stated["permuted_heads"]
        self._norm_offset: float = stated["norm_offset"]
        kept = mxfp4_experts(self._tensors) if mxfp4 else set()
        others = (tensor.type for name, tensor in self._tensors.items() if name not in kept)
        kinds = sorted({*others} - {"F32", "F16", "BF16"})
        if kinds:
            log.warning(
                "%s is dequantised at load (%s): it takes the memory of full-precision weights",
                source.name,
                ", ".join(kinds),
            )
        self._packed = {packed: name for name in kept for packed in packed_names(name)}
        self._names = [*(self._tensors.keys() - kept), *self._packed]

    def names(self) -> Iterable[str]:
        return self._names

    def get(self, name: str) -> torch.Tensor:
        """Float32, dequantised; or what `mxfp4` asked for.

        Raises:
            UnsupportedModelError: it is of a type that is not covered.
        """
        import numpy as np

        if name in self._packed:
            return packed_tensor(self._data, self._tensors[self._packed[name]], name)
        values = dequantized(self._data, self._tensors[name])
        module = name.rpartition(".")[0].rpartition(".")[2]
        if heads := self._heads.get(module):
            values = undo_rope_interleaving(values, heads)
        if self._norm_offset and module.endswith("norm"):
            values -= self._norm_offset
        return torch.from_numpy(np.ascontiguousarray(values))

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._packed:
            return packed_shape(self._tensors[self._packed[name]], name)
        return tuple(self._tensors[name].shape)


def _describe(source: Path, folder: Path) -> None:
    """Write everything about `source` but its tensors."""
    log.info("reading %s; its description is kept, so the next start is faster", source.name)
    try:
        header = read_header(source)
        header = header._replace(fields=checked_fields(header.fields))
        config = _config(source, header)
        tokenizer = build_tokenizer(header.fields)
        index = _index(source, header, config)
        ends = _end_tokens(header.fields)
        described = tokenizer_config(header.fields, config["max_position_embeddings"])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{source} cannot be read as a GGUF model: {reason}") from error
    except OSError as error:
        raise ModelError(f"cannot read {source}: {error.strerror or error}") from error
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
    write_json(folder / "tokenizer_config.json", described)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(folder / GGUF_INDEX, index)
    os.chmod(folder, 0o755)  # mkdtemp's is readable to its owner only


def _config(source: Path, header: GgufHeader) -> dict[str, Any]:
    """The transformers config that says the same."""
    fields, tensors = header
    arch = fields["general.architecture"]
    if arch not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF architecture {arch!r} is not supported; supported: {', '.join(_ARCHITECTURES)}"
        )
    if fields.get("split.count", 1) > 1:
        raise UnsupportedModelError(
            "a GGUF in several files is not supported; join them: llama-gguf-split --merge"
        )
    architecture, model_type = _ARCHITECTURES[arch]
    own = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    heads, hidden = own["attention.head_count"], own["embedding_length"]
    head_dim = own.get("attention.key_length", hidden // heads)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_bias": arch not in ("qwen2", "qwen2moe") and "blk.0.attn_q.bias" in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        # Wide enough for any model's activations; the quantised weights have fewer bits anyway.
        "dtype": "bfloat16",
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": own["feed_forward_length"],
        "max_position_embeddings": own["context_length"],
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "num_attention_heads": heads,
        "num_hidden_layers": _layer_count(own, tensors),
        "num_key_value_heads": same_in_all_layers(own.get("attention.head_count_kv", heads), "K/V heads"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": shortest(own["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(own, arch, head_dim, _rope_factors(source, tensors)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": tensors["token_embd.weight"].shape[0],  # some models have more rows than tokens
    }
    if arch in OF_FAMILY:
        config |= OF_FAMILY[arch](own, config)
    return config | experts_config(own, arch, tensors)


def _layer_count(own: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> int:
    """Without those behind that guess tokens further ahead."""
    stated, further = own["block_count"], own.get("nextn_predict_layers", 0)
    if stated > len(tensors):  # before anything is made for each of them
        raise ValueError(f"it names {stated} layers and has {len(tensors)} tensors")
    if further >= stated:
        raise ValueError(f"it names {stated} layers, of which {further} guess further ahead")
    return int(stated - further)


def _rope_factors(source: Path, tensors: Mapping[str, GgufTensor]) -> dict[str, list[float]]:
    import numpy as np

    data = np.memmap(source, mode="r")
    held = (_ROPE_FACTORS, _LONG_FACTORS, _SHORT_FACTORS)
    return {name: dequantized(data, tensors[name]).tolist() for name in held if name in tensors}


def _rope(
    own: Mapping[str, Any], arch: str, head_dim: int, factors: Mapping[str, list[float]]
) -> dict[str, Any]:
    rotated = own.get("rope.dimension_count", head_dim)
    if rotated != head_dim and arch not in ("phi3", "glm4", "glm4moe"):
        raise UnsupportedModelError("a GGUF in which only a part of each head is rotated is not supported")
    theta = shortest(own.get("rope.freq_base", 1e6 if arch == "gemma3" else 1e4))
    if _ROPE_FACTORS in factors:
        return _llama3_rope(theta, torch.tensor(factors[_ROPE_FACTORS]))
    # Which in GLM is a half where nothing is said.
    stated = rotated != head_dim or arch in ("glm4", "glm4moe")
    part = {"partial_rotary_factor": rotated / head_dim} if stated else {}
    return {"rope_theta": theta, **part, **_rope_scaling(own, factors)}


def _rope_scaling(own: Mapping[str, Any], factors: Mapping[str, list[float]]) -> dict[str, Any]:
    scaling = {
        key.removeprefix("rope.scaling."): value
        for key, value in own.items()
        if key.startswith("rope.scaling.")
    }
    kind = scaling.get("type", "none")
    original = "original_context_length"
    if factors:  # of which the first converters told by nothing else
        return {
            "rope_type": "longrope",
            "long_factor": [shortest(factor) for factor in factors[_LONG_FACTORS]],
            "short_factor": [shortest(factor) for factor in factors[_SHORT_FACTORS]],
            "original_max_position_embeddings": scaling[original],
            **({"attention_factor": shortest(scaling["attn_factor"])} if "attn_factor" in scaling else {}),
        }
    if kind == "none" or "factor" not in scaling:
        return {"rope_type": "default"}
    factor = shortest(scaling["factor"])
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        if shortest(scaling.get("yarn_ext_factor", 1.0)) != 1.0:
            raise UnsupportedModelError(
                "GGUF RoPE scaling with a yarn_ext_factor other than 1 is not supported"
            )
        stated = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        multiplier = scaling.get("yarn_log_multiplier")  # 0 is none
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": scaling[original],
            **{
                name: shortest(scaling[f"yarn_{key}"])
                for name, key in stated.items()
                if f"yarn_{key}" in scaling
            },
            **({"mscale": 1.0, "mscale_all_dim": shortest(multiplier)} if multiplier else {}),
        }
    raise UnsupportedModelError(f"GGUF RoPE scaling {kind!r} is not supported; supported: linear, yarn")


def _llama3_rope(theta: float, factors: torch.Tensor) -> dict[str, Any]:
    """Llama 3's parameters, found again from the factors [head_dim / 2] that llama.cpp made of them."""
    low, high, original = 1.0, 4.0, 8192  # in every Llama 3; only the factor differs
    largest = float(factors.max())
    frequencies = theta ** -(torch.arange(len(factors), dtype=torch.float64) / len(factors))
    smooth = ((original * frequencies / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / largest + smooth)
    if not torch.allclose(expected, factors.double(), rtol=1e-3):
        raise UnsupportedModelError(f"{_ROPE_FACTORS} of this GGUF is not Llama 3's scaling")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": largest,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _index(source: Path, header: GgufHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    """Where each tensor lies; one of no known use keeps its own name, and is reported at load."""
    arch = header.fields["general.architecture"]
    layer_names = _NAMES.get(arch, _LAYER_NAMES)
    tensors: dict[str, Any] = {}
    layers = header.fields[f"{arch}.block_count"]
    further = tuple(f"blk.{layer}." for layer in range(config["num_hidden_layers"], layers))
    for name, tensor in header.tensors.items():
        if name.startswith(further) or name in (_ROPE_FACTORS, _LONG_FACTORS, _SHORT_FACTORS):
            continue
        module, _, kind = name.rpartition(".")
        if module.startswith("blk."):
            _, layer, part = module.split(".", 2)
            if experts := expert_tensors(f"model.layers.{layer}", f"{part}.{kind}", tensor):
                if not tensors.keys().isdisjoint(experts):
                    raise ValueError(f"experts of {name} are in another tensor too")
                tensors |= {own: each._asdict() for own, each in experts.items()}
                continue
            module = f"model.layers.{layer}.{layer_names[part]}" if part in layer_names else module
        else:
            module = _TOP_NAMES.get(module, module)
        own = module if module.endswith(".sinks") else f"{module}.{kind}"  # those are no module's
        own = own.replace("e_score_correction.bias", "e_score_correction_bias")
        tensors[own] = tensor._asdict()
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return {
        "path": str(source),
        "bytes": source.stat().st_size,
        "permuted_heads": heads if arch in _NEIGHBOURS_ROTATED else {},
        "norm_offset": 1.0 if arch == "gemma3" else 0.0,  # it stores 1 + weight
        "tensors": tensors,
    }


def _end_tokens(fields: Mapping[str, Any]) -> list[int]:
    kinds = fields["tokenizer.ggml.token_type"]
    known = {
        token: index
        for index, token in enumerate(fields["tokenizer.ggml.tokens"])
        if kinds[index] in (_CONTROL, _USER_DEFINED)
    }
    stated = [fields.get("tokenizer.ggml.eos_token_id"), fields.get("tokenizer.ggml.eot_token_id")]
    ends = [*stated, *(known.get(token) for token in _END_TOKENS)]
    if known.keys() >= _HARMONY:
        ends = [*stated, *(known[token] for token in sorted(_HARMONY))]
        ends = [end for end in ends if end != known["<|end|>"]]
    return list(dict.fromkeys(end for end in ends if end is not None))
