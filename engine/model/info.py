"""What a model is and what it takes, from its config alone: no weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.adjust import table_bytes
from engine.config import MAX_TREE_NODES, EngineConfig
from engine.limits import available_bytes
from engine.model.adapter_files import Adapter
from engine.model.config import ModelConfig
from engine.model.embedded import is_conversion
from engine.model.gguf import GGUF_INDEX
from engine.model.lora import part_tied
from engine.model.mxfp4 import words
from engine.model.prequantized import stated_quantization

__all__ = [
    "CPU_POOL_BYTES",
    "AdapterInfo",
    "Memory",
    "ModelInfo",
    "blocks_of_sequence",
    "count_active_parameters",
    "count_parameters",
    "cpu_pool_blocks",
    "describe",
    "device_memory",
    "kv_bytes_per_token",
    "weight_bytes",
]

CPU_POOL_BYTES = 2 << 30
"""Most of a K/V pool on the CPU where no size is given; pages nobody writes cost nothing."""

_DTYPES = (torch.float32, torch.bfloat16)
_SHORTEST = 2048  # the first context length asked about


@dataclass(frozen=True, slots=True)
class Memory:
    """What one dtype takes, in bytes.

    Args:
        dtype: of weights, activations and K/V.
        weight_bytes: of all parameters. Experts in 4 bits stay so on CUDA.
        kv_bytes_per_token: keys and values of one token in all layers. A layer with a window keeps all.
        fits: for context lengths, how many sequences of that length fit beside the weights at once. On the
            CPU: how many the pool holds that a server of this `max_model_len` makes, all else at its default.
    """

    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    fits: dict[int, int]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that is merged: the modules that it changes, its ranks, and what it says that it is for."""

    source: str
    scale: float
    modules: int
    ranks: tuple[int, ...]
    base_model: str | None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model's shape and its needs on one device.

    Args:
        stored_as: "safetensors or bin"; "gguf", "awq" or "gptq", which are dequantised at load, and "mxfp4"
            but for experts on CUDA; or "converted gguf", the embedded model's, which was dequantised once.
        active_parameters: those that a token passes through: fewer where layers have experts.
        window: positions that layers with a window see, None without; `num_windowed` is how many have one.
        device_bytes: memory the server may use there.
        memory: for each dtype.
    """

    architecture: str
    parameters: int
    active_parameters: int
    stored_as: str
    dtype: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    window: int | None
    num_windowed: int
    device: str
    device_bytes: int
    memory: tuple[Memory, ...]
    lora: tuple[AdapterInfo, ...] = ()


def describe(folder: Path, device: torch.device, adapters: Sequence[Adapter] = ()) -> ModelInfo:
    """Of a model folder, as `resolve_model` gives it, with adapters merged into it.

    Raises:
        ModelError: there is no readable config.
        UnsupportedModelError: the model is not covered.
    """
    config = ModelConfig.from_folder(folder)
    if part_tied(adapters):
        config = replace(config, tie_word_embeddings=False)
    windows = [window for window in config.windows if window is not None]
    name, room = device_memory(device)
    if (folder / GGUF_INDEX).is_file():
        stored = "gguf"
    elif is_conversion(folder):
        stored = "converted gguf"
    else:
        stored = (stated_quantization(folder) or {}).get("quant_method", "safetensors or bin")
    return ModelInfo(
        architecture=config.architecture,
        parameters=count_parameters(config),
        active_parameters=count_active_parameters(config),
        stored_as=str(stored),
        dtype=str(config.dtype).removeprefix("torch."),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position=config.max_position,
        window=max(windows, default=None),
        num_windowed=len(windows),
        device=name,
        device_bytes=room,
        memory=tuple(_memory(config, dtype, device, room) for dtype in _DTYPES),
        lora=tuple(
            AdapterInfo(each.source, each.scale, len(each.told), each.ranks, each.base_model)
            for each in adapters
        ),
    )


def count_parameters(config: ModelConfig) -> int:
    """All weights, a tied lm_head not counted again."""
    hidden, width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    layer = hidden * (2 * q_size + 2 * kv_size)
    layer += config.qkv_bias * (q_size + 2 * kv_size) + config.output_bias * hidden
    layer += hidden * (4 if config.norms == "both" else 2)
    layer += {"none": 0, "head": 2 * head_dim, "projection": q_size + kv_size}[config.qk_norm]
    layer += config.sinks * config.num_heads
    mlp = 3 * hidden * width + config.mlp_bias * (2 * width + hidden)
    mlps = config.num_layers * mlp
    if (experts := config.experts) is not None:
        mlps += sum(experts.layers) * (experts.count * (hidden + 3 * hidden * experts.width) - mlp)
        mlps += sum(experts.layers) * experts.bias * experts.count * (1 + 2 * experts.width + hidden)
        mlps += sum(experts.layers) * experts.gate.corrected * experts.count
        if (shared := experts.shared) is not None:
            beside = 3 * hidden * shared.width + config.mlp_bias * (2 * shared.width + hidden)
            mlps += sum(experts.layers) * (beside + shared.gated * hidden)
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return config.num_layers * layer + mlps + embeddings + hidden


def count_active_parameters(config: ModelConfig) -> int:
    """Those that a token passes through: of a layer's experts only the chosen ones count."""
    found = count_parameters(config)
    if (experts := config.experts) is not None:
        idle = experts.count - experts.chosen
        hidden, width = config.hidden_size, experts.width
        found -= sum(experts.layers) * idle * (3 * hidden * width + experts.bias * (2 * width + hidden))
    return found


def weight_bytes(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Of all parameters in a dtype, but for what is in float32 in any, and experts in 4 bits on CUDA."""
    size = count_parameters(config) * dtype.itemsize
    if (experts := config.experts) is not None:
        in_full = experts.gate.corrected + experts.precise * config.hidden_size  # of an expert, in float32
        size += sum(experts.layers) * experts.count * in_full * (torch.float32.itemsize - dtype.itemsize)
    if experts is not None and experts.mxfp4 and device.type == "cuda":
        projections = sum(experts.layers) * experts.count
        of_inputs = ((config.hidden_size, 2 * experts.width), (experts.width, config.hidden_size))
        for inputs, outputs in of_inputs:
            size -= projections * outputs * (inputs * dtype.itemsize - inputs // 2 - 4 * words(inputs))
    return size


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def blocks_of_sequence(max_model_len: int, block_size: int) -> int:
    """K/V blocks of a sequence of full length with the largest tree."""
    return -(-(max_model_len + MAX_TREE_NODES) // block_size)


def cpu_pool_blocks(available: int, block_bytes: int, one_sequence: int, max_num_seqs: int) -> int:
    """K/V blocks of a pool on the CPU where no size is given: no more than all sequences can fill, no less
    than one sequence needs, which may be more than is available; between them `CPU_POOL_BYTES` or half of it.

    Args:
        available: bytes, the weights and tables taken off.
        one_sequence: blocks of the longest sequence.
    """
    wanted = min(CPU_POOL_BYTES, available // 2)
    return min(max_num_seqs * one_sequence, max(wanted // block_bytes, one_sequence))


def device_memory(device: torch.device) -> tuple[str, int]:
    """The device's name and the bytes a server may use there, weights included."""
    if device.type == "cuda":
        share = float(EngineConfig.model_fields["gpu_memory_utilization"].default)
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{device} ({torch.cuda.get_device_name(device)})", int(total * share)
    return "cpu", available_bytes()


def _memory(config: ModelConfig, dtype: torch.dtype, device: torch.device, room: int) -> Memory:
    weights = weight_bytes(config, dtype, device)
    if device.type == "cpu" and config.tie_word_embeddings:
        # Packed for the CPU, lm_head is a copy of the embedding.
        weights += config.vocab_size * config.hidden_size * dtype.itemsize
    per_token = kv_bytes_per_token(config, dtype)
    # Logits of a full step in this dtype and, for the draw, a few copies in float32.
    step_tokens = int(EngineConfig.model_fields["max_step_tokens"].default)
    transient = step_tokens * config.vocab_size * (dtype.itemsize + 4 * torch.float32.itemsize)
    tables = table_bytes(int(EngineConfig.model_fields["max_num_seqs"].default), config.vocab_size)
    available = max(0, room - weights - tables)
    lengths = [config.max_position]
    while lengths[0] // 2 >= _SHORTEST:
        lengths.insert(0, lengths[0] // 2)
    return Memory(
        dtype=str(dtype).removeprefix("torch."),
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        fits={
            length: _fits_cpu(length, available, per_token)
            if device.type == "cpu"
            else max(0, available - transient) // ((length + MAX_TREE_NODES) * per_token)
            for length in lengths
        },
    )


def _fits_cpu(max_model_len: int, available: int, per_token: int) -> int:
    defaults = EngineConfig.model_fields
    block_size, max_num_seqs = int(defaults["block_size"].default), int(defaults["max_num_seqs"].default)
    one_sequence, block_bytes = blocks_of_sequence(max_model_len, block_size), block_size * per_token
    blocks = cpu_pool_blocks(available, block_bytes, one_sequence, max_num_seqs)
    return 0 if blocks * block_bytes > available else blocks // one_sequence
