"""Engine settings: the one place where an engine default is written down."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["MAX_TREE_NODES", "EngineConfig"]

MAX_TREE_NODES = 64
"""Nodes of a tree with its root: the ancestors of a node fit one 64-bit mask."""


class EngineConfig(BaseModel):
    """What to load and how to run it. Frozen: nothing changes a setting after construction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "smollm2-135m",
        description="Model: 'smollm2-135m' (embedded), a local folder, or a Hugging Face hub id.",
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit) of the model.")
    heads: str | None = Field(
        None,
        description="Medusa heads: a .safetensors or .pt file, a folder or hub id that holds one, or 'none'.",
    )
    tree: int | Literal["off"] | None = Field(
        None,
        description="Tree nodes verified per step, root included (2 to 64), or 'off' for plain decoding; "
        "if unset, 16 with heads and off without.",
    )
    tree_file: str | None = Field(
        None, description="JSON list of tree paths, in which every prefix is a tree; a built-in one if unset."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and activations: 'auto' is float32 on CPU, the checkpoint's own on CUDA."
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'.")
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
        description="Most tokens in one forward pass: prefill chunk, or sequences times tree nodes.",
    )
    block_size: int = Field(16, ge=1, le=256, description="Tokens per K/V block.")
    kv_cache_tokens: int | None = Field(
        None, ge=64, description="K/V pool size in tokens; sized from memory if unset."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0.0, le=1.0, description="Share of GPU memory for weights, activations and the K/V pool."
    )

    @field_validator("tree", mode="before")
    @classmethod
    def _tree(cls, value: object) -> object:
        if isinstance(value, str) and value.strip().isdigit():
            value = int(value)
        if value is False:  # YAML 1.1 reads a bare `off` as false
            return "off"
        if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= MAX_TREE_NODES:
            raise ValueError(f"must be 'off' or a number of nodes from 1 to {MAX_TREE_NODES}")
        return value
