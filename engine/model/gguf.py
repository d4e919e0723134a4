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
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import ModelError, UnsupportedModelError, WeightsError
from engine.model.embedded import cache_root, shortest, undo_rope_interleaving, write_json
from engine.model.gguf_tokenizer import build_tokenizer, tokenizer_config

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["GGUF_INDEX", "GgufFile", "gguf_folder"]

log = logging.getLogger(__name__)

GGUF_INDEX = "gguf.json"
"""In a model folder made from a GGUF: the file's path and the place, type and shape of each tensor."""

_VERSION = 2
"""Raised with every change to what is written: older folders are then left alone."""

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),  # Mistral too
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
"""For each `general.architecture` the Hugging Face architecture and model type."""

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
}
_GEMMA_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3 divides its frequencies by; llama.cpp computes it ahead

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
)
_CONTROL, _USER_DEFINED = 3, 4  # older converters write added tokens, `<|im_end|>` too, as the latter

_GEMMA3_27B_LAYERS = 62  # whose queries alone are scaled by hidden / heads; the metadata does not say so


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

    Raises:
        WeightsError: the file is not where it was, or has changed.
    """

    def __init__(self, index: Path) -> None:
        import numpy as np

        stated = json.loads(index.read_text(encoding="utf-8"))
        source = Path(stated["path"])
        if not source.is_file() or source.stat().st_size != stated["bytes"]:
            raise WeightsError(f"{source} is not the file that {index.parent} was made from; name it anew")
        self._data = np.memmap(source, mode="r")
        self._tensors: dict[str, dict[str, Any]] = stated["tensors"]
        self._heads: dict[str, int] = stated["permuted_heads"]
        self._norm_offset: float = stated["norm_offset"]
        kinds = sorted({tensor["type"] for tensor in self._tensors.values()} - {"F32", "F16", "BF16"})
        if kinds:
            log.warning(
                "%s is dequantised at load (%s): it takes the memory of full-precision weights",
                source.name,
                ", ".join(kinds),
            )

    def names(self) -> Iterable[str]:
        return self._tensors

    def get(self, name: str) -> torch.Tensor:
        """Float32, dequantised."""
        import numpy as np
        from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

        tensor = self._tensors[name]
        kind, shape = GGMLQuantizationType[tensor["type"]], tuple(tensor["shape"])
        raw = self._data[tensor["offset"] : tensor["offset"] + tensor["bytes"]]
        plain = {"F32": np.float32, "F16": np.float16}.get(tensor["type"])
        if plain is not None:
            values = raw.view(plain).reshape(shape)
        else:
            values = dequantize(raw.reshape(quant_shape_to_byte_shape(shape, kind)), kind)
        values = values.astype(np.float32)
        module = name.rpartition(".")[0].rpartition(".")[2]
        if heads := self._heads.get(module):
            values = undo_rope_interleaving(values, heads)
        if self._norm_offset and module.endswith("norm"):
            values -= self._norm_offset
        return torch.from_numpy(np.ascontiguousarray(values))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])


def _describe(source: Path, folder: Path) -> None:
    """Write everything about `source` but its tensors."""
    from gguf import GGUFReader

    log.info("reading %s; its description is kept, so the next start is faster", source.name)
    try:
        reader = GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = _config(fields, reader)
        tokenizer = build_tokenizer(fields)
        index = _index(source, reader, config)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{source} cannot be read as a GGUF model: {reason}") from error
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": _end_tokens(fields)})
    write_json(folder / "tokenizer_config.json", tokenizer_config(fields, config["max_position_embeddings"]))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(folder / GGUF_INDEX, index)
    os.chmod(folder, 0o755)  # mkdtemp's is readable to its owner only


def _config(fields: Mapping[str, Any], reader: GGUFReader) -> dict[str, Any]:
    """The transformers config that says the same."""
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

    def value(key: str, default: Any = None) -> Any:
        return fields[f"{arch}.{key}"] if default is None else fields.get(f"{arch}.{key}", default)

    names = {tensor.name for tensor in reader.tensors}
    heads, hidden = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", hidden // heads)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_bias": arch != "qwen2" and "blk.0.attn_q.bias" in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        # Wide enough for any model's activations; the quantised weights have fewer bits anyway.
        "dtype": "bfloat16",
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "max_position_embeddings": value("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": value("block_count"),
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": shortest(value("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in names,
        "vocab_size": _vocab_size(reader),
    }
    rope = _rope(fields, arch, reader, head_dim)
    if arch != "gemma3":
        return config | {"hidden_act": "silu", "rope_parameters": rope}
    scalar = hidden // heads if config["num_hidden_layers"] == _GEMMA3_27B_LAYERS else head_dim
    local = {"rope_type": "default", "rope_theta": 10000.0}
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "sliding_window": value("attention.sliding_window"),
        "sliding_window_pattern": 6,
    }


def _vocab_size(reader: GGUFReader) -> int:
    # Rows of the embedding: some models have more than tokens.
    return next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")


def _rope(fields: Mapping[str, Any], arch: str, reader: GGUFReader, head_dim: int) -> dict[str, Any]:
    default_theta = 1e6 if arch == "gemma3" else 1e4
    theta = shortest(fields.get(f"{arch}.rope.freq_base", default_theta))
    if fields.get(f"{arch}.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError("a GGUF in which only a part of each head is rotated is not supported")
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FACTORS), None)
    if factors is not None:
        return _llama3_rope(theta, torch.tensor(factors.tolist()))
    kind = fields.get(f"{arch}.rope.scaling.type", "none")
    factor = fields.get(f"{arch}.rope.scaling.factor")
    if kind == "none" or factor is None:
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": shortest(factor)}
    if kind == "yarn":
        original = fields[f"{arch}.rope.scaling.original_context_length"]
        scaling = {"factor": shortest(factor), "original_max_position_embeddings": original}
        return {"rope_type": "yarn", "rope_theta": theta, **scaling}
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


def _index(source: Path, reader: GGUFReader, config: Mapping[str, Any]) -> dict[str, Any]:
    """Where each tensor lies; one of no known use keeps its own name, and is reported at load."""
    gemma = config["model_type"] == "gemma3_text"
    layer_names = _GEMMA_NAMES if gemma else _LAYER_NAMES
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        module, _, kind = tensor.name.rpartition(".")
        if module.startswith("blk."):
            _, layer, part = module.split(".", 2)
            module = f"model.layers.{layer}.{layer_names[part]}" if part in layer_names else module
        else:
            module = _TOP_NAMES.get(module, module)
        tensors[f"{module}.{kind}"] = {
            "offset": int(tensor.data_offset),
            "bytes": int(tensor.n_bytes),
            "type": tensor.tensor_type.name,
            "shape": [int(size) for size in reversed(tensor.shape.tolist())],
        }
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return {
        "path": str(source),
        "bytes": source.stat().st_size,
        # llama.cpp rotates neighbouring channels in this architecture, halves in the others.
        "permuted_heads": heads if config["model_type"] == "llama" else {},
        "norm_offset": 1.0 if gemma else 0.0,  # it stores 1 + weight
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
    return list(dict.fromkeys(end for end in ends if end is not None))
