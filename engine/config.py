"""Engine settings: the one place where an engine default is written down."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

__all__ = [
    "MAX_TREE_NODES",
    "EngineConfig",
    "LoraSource",
    "faults",
    "lora_setting",
    "lora_sources",
    "with_near",
]

MAX_TREE_NODES = 64
"""Nodes of a tree with its root: the ancestors of a node fit one 64-bit mask."""

_PREFILL_TOKENS_ON_GPU = 2048
"""A pass of 512 took the host of an H100 5 to 6 ms, though the model was small."""

_LOOKUP_NODES = 16
"""Most nodes where lookup is `on`: a copied passage runs on, and `tree: auto` cuts the chain to what pays."""


class LoraSource(NamedTuple):
    """An adapter as a setting names it: a folder or hub id, and a factor on what it adds."""

    source: str
    scale: float


class EngineConfig(BaseModel):
    """What to load and how to run it. Frozen: nothing changes a setting after construction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "smollm2-135m",
        description="Model: 'smollm2-135m' (embedded), a folder or .gguf file, or a Hugging Face hub id.",
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit) of the model.")
    lora: str | None = Field(
        None,
        description="LoRA adapters in PEFT's format, merged into the weights at load: a folder or hub id, "
        "or several with commas between them; in `PATH@0.5` half of what it adds.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto",
        description="Weights: the checkpoint's ('auto'), or random ones for a folder that may hold only the "
        "configuration and the tokenizer ('dummy'): to measure a shape of model, not to read its answers.",
    )
    chat_template: str | None = Field(
        None,
        description="Chat template in place of the tokenizer's own: a file of Jinja, or the Jinja itself.",
    )
    generation_config: str = Field(
        "auto",
        min_length=1,
        description="Sampling where a request says nothing: as the model's generation_config.json recommends "
        "('auto'), as that of another folder does, or OpenAI's defaults ('none').",
    )
    heads: str | None = Field(
        None,
        description="Medusa heads: a .safetensors, .pt or .bin file, a folder or hub id that holds one, or "
        "'none'; if unset, those inside the model (Medusa-2) or shipped for it, where there are any.",
    )
    tree: int | Literal["auto", "off"] = Field(
        "auto",
        description="Tree nodes verified per step, root included (1 to 64); 'auto' fits them to the load, "
        "'off' is plain decoding, and so is 1.",
    )
    tree_file: str | None = Field(
        None, description="JSON list of tree paths, in which every prefix is a tree; a built-in one if unset."
    )
    lookup: int | Literal["on", "off"] = Field(
        "on",
        description="Draft from what a sequence has already said: 'on' (up to 16 nodes), 'off', or the most "
        "nodes (1 to 63).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Weights and activations: 'auto' is float32 on CPU; on CUDA the checkpoint's own, or "
        "float16 for bfloat16 below compute capability 8.0.",
    )
    quantization: Literal["none", "int8", "fp8"] = Field(
        "none",
        description="Weights in 8 bits per output channel and activations in 8 bits per row: 'int8' (on the "
        "CPU with dtype float32; CUDA), 'fp8' (CUDA with dtype bfloat16). CUDA needs the extra torchao; "
        "there a mixture's experts have their weights alone in 8 bits, or stay in a checkpoint's 4.",
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'.")
    attention: Literal["auto", "sdpa", "triton"] = Field(
        "auto",
        description="Attention: 'triton' (kernels for CUDA), 'sdpa' (torch's, slow, for comparison), 'auto' "
        "for the device's own.",
    )
    max_model_len: int | None = Field(
        None, ge=8, description="Longest prompt plus output in tokens; the model's own limit if unset."
    )
    max_num_seqs: int = Field(32, ge=1, le=1024, description="Most sequences decoded together.")
    max_waiting: int = Field(
        256, ge=1, description="Most choices waiting for a slot before requests get 503."
    )
    max_step_tokens: int = Field(
        512,
        ge=64,
        description="Most tokens in one decode pass, sequences times tree nodes; and of prompts, see "
        "max_prefill_tokens.",
    )
    max_prefill_tokens: int | None = Field(
        None,
        ge=64,
        description="Most prompt tokens in one pass. Unset: max_step_tokens on the CPU, and at least 2048 "
        "on a GPU, where a pass costs much however small it is.",
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens per K/V block.")
    prefix_caching: bool = Field(
        True,
        description="Reuse the K/V of equal prompt prefixes across requests (within equal `cache_salt`).",
    )
    kv_cache_tokens: int | None = Field(
        None,
        ge=64,
        description="K/V pool size in tokens. Unset: on a GPU what gpu_memory_utilization leaves; on the CPU "
        "half of the free memory, at most 2 GiB, but room for one sequence of max_model_len.",
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="K/V pool size in bytes, instead of kv_cache_tokens."
    )
    enforce_eager: bool = Field(
        False,
        description="On a GPU, run decode steps operator by operator, not as CUDA graphs, and compile "
        "kernels when they are first needed: a faster start, slower steps and first prompts.",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0.0, le=1.0, description="Share of GPU memory for weights, activations and the K/V pool."
    )

    @field_validator("lora", mode="before")
    @classmethod
    def _are_adapters(cls, value: object) -> object:
        return lora_setting(value)

    @model_validator(mode="after")
    def _adapters_need_weights(self) -> Self:
        if self.lora is not None and self.load_format == "dummy":
            raise ValueError("lora has no effect on the random weights of load_format dummy; leave it out")
        return self

    @field_validator("tree", "lookup", mode="before")
    @classmethod
    def _number_or_word(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, bool):  # YAML 1.1 reads a bare `on` or `off` as a truth value
            value = "on" if value else "off"
        word, most = ("auto", MAX_TREE_NODES) if info.field_name == "tree" else ("on", MAX_TREE_NODES - 1)
        if value not in (word, "off") and not (type(value) is int and 1 <= value <= most):
            raise ValueError(f"must be '{word}', 'off' or a number of nodes from 1 to {most}")
        return value

    @field_validator("kv_cache_bytes")
    @classmethod
    def _one_size_of_the_pool(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("kv_cache_tokens") is not None:
            raise ValueError("give either this or kv_cache_tokens")
        return value

    def prefill_tokens(self, device_type: str) -> int:
        """Most tokens of prompts in one pass on such a device."""
        if self.max_prefill_tokens is not None:
            return self.max_prefill_tokens
        return max(self.max_step_tokens, _PREFILL_TOKENS_ON_GPU if device_type == "cuda" else 0)

    @property
    def lookup_nodes(self) -> int:
        """Most nodes of the lookup branch; 0 is off."""
        if self.tree in ("off", 1) or self.lookup == "off":
            return 0
        return _LOOKUP_NODES if self.lookup == "on" else self.lookup


def lora_setting(value: object) -> object:
    """The setting as text; YAML and `LLM` may have a list.

    Raises:
        ValueError: an adapter without a name, or a scale that is none.
    """
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        if odd := [name for name in value if "," in name]:
            raise ValueError(f"a comma goes between adapters, so that none can be in a path: {odd[0]!r}")
        value = ",".join(value)
    if isinstance(value, str):
        lora_sources(value)
    return value


def lora_sources(setting: str | None) -> tuple[LoraSource, ...]:
    """The adapters of a setting, in the order in which they are merged.

    Raises:
        ValueError: as `lora_setting`.
    """
    return () if setting is None else tuple(_lora_source(part.strip()) for part in setting.split(","))


def _lora_source(text: str) -> LoraSource:
    source, _, behind = text.rpartition("@")
    try:
        scale = float(behind)
    except ValueError:  # a path may have an @ in it
        source, scale = text, 1.0
    if not source:
        raise ValueError("must be a folder or hub id, or several with commas between them")
    if not math.isfinite(scale) or scale == 0.0:
        raise ValueError(f"what follows @ is a factor on what the adapter adds, not 0, got {text!r}")
    return LoraSource(source, scale)


def faults(error: ValidationError) -> dict[str, str]:
    """What is wrong with each setting, once (a union reports one error per member), in a user's words."""
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_input=False):
        text = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        text = text.partition(", unable to parse")[0]
        found.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(text)
    return {name: ", or ".join(texts) for name, texts in found.items()}


def with_near(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Names that there are not, each with the one that may be meant."""
    names = list(known)
    close = {name: get_close_matches(name, names, 1, 0.7) for name in unknown}
    return ", ".join(f"{name} ({near[0]}?)" if near else name for name, near in close.items())
