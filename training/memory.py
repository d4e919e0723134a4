"""What a training run will take, said before it starts."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine import limits
from engine.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.weights import Checkpoint
from training.hidden import logits_rows
from training.objective import CHUNK_BYTES

__all__ = ["MemoryPlan", "available_bytes", "free_disk", "plan"]

_GIB = 1 << 30
_RUNTIME = {"cpu": 400 << 20, "cuda": 900 << 20}
"""Python and torch themselves; CUDA's context, cuBLAS workspaces and fragmentation."""


@dataclass(slots=True)
class MemoryPlan:
    """Bytes by purpose, on the device that trains and on disk."""

    device: str
    parts: dict[str, int] = field(default_factory=dict)
    disk: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def describe(self, available: int) -> str:
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in self.parts.items() if size)
        disk = f"; {self.disk / _GIB:.2f} GiB on disk" if self.disk else ""
        total, free = self.total / _GIB, available / _GIB
        return f"memory on {self.device}: {total:.2f} GiB ({parts}) of {free:.2f} free{disk}"

    def check(self, available: int, advice: str) -> None:
        """Raise ConfigError where it does not fit."""
        if self.total > available:
            raise ConfigError(f"{self.describe(available)}: it does not fit. {advice}")


def plan(
    checkpoint: Checkpoint,
    model: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    bits: int,
    needs_backbone: bool,
    heads: int,
    layers: int,
    vocabulary: int,
    micro_tokens: int,
    pack_tokens: int,
    ema: bool,
    teacher_online: bool,
    cached_tokens: int,
    resident: bool,
    top_k: int,
) -> MemoryPlan:
    """An estimate from shapes: weights and optimizer exactly, activations from above.

    Args:
        needs_backbone: it runs in this process (hidden states are missing or not cached).
        vocabulary: rows of the heads' part of the lm_head.
        pack_tokens: tokens of a pass of the backbone.
        teacher_online: the whole lm_head is needed beside the heads' part.
        cached_tokens: positions that will be added to the cache.
        resident: the cache is in the device's memory and not on disk.
    """
    hidden, size = model.hidden_size, dtype.itemsize
    found = MemoryPlan(str(device))
    if needs_backbone:
        numel = {name: math.prod(checkpoint.shape(name)) for name in checkpoint.names}
        linear = sum(
            count for name, count in numel.items() if "_proj" in name and ".mlp.experts." not in name
        )
        weights = sum(numel.values()) * size
        if bits != 16:  # the linear layers alone, which experts are not; a scale for every 64 weights or so
            weights += linear * bits // 8 + linear // 16 - linear * size
        found.parts["backbone"] = weights
        widest = 2 * model.intermediate_size
        if (experts := model.experts) is not None:  # each token once for each of its experts
            widest = max(widest, experts.chosen * 2 * (experts.width + hidden))
            if experts.shared is not None:
                widest += 2 * experts.shared.width
        widest += 8 * hidden
        kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * (2 * pack_tokens + 128) * size
        logits = logits_rows(device, model.vocab_size) * model.vocab_size * (size + 4)
        found.parts["backbone's activations"] = pack_tokens * widest * size * 2 + kv + logits
    rows = vocabulary + (model.vocab_size if teacher_online or (needs_backbone and cached_tokens) else 0)
    found.parts["lm_head"] = rows * hidden * size
    parameters = heads * layers * (hidden * hidden + hidden)
    # Weights, gradients, two moments, the average, all in float32; the cast copy of each layer.
    found.parts["heads and optimizer"] = parameters * (4 * (4 + ema) + (size if size < 4 else 0))
    # Per layer: input, linear, SiLU; the gradient from the loss; loss in chunks of logits.
    activations = heads * micro_tokens * hidden * size * (3 * layers + 3)
    found.parts["heads' activations"] = activations + 3 * CHUNK_BYTES[device.type]
    found.parts["runtime"] = _RUNTIME[device.type]
    kept = cached_tokens * (2 * hidden + 16 + 6 * top_k)
    if resident:
        found.parts["hidden states"] = kept
    else:
        found.disk = kept
    return found


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return limits.available_bytes()


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
