"""The weights of experts by the same names, whatever a checkpoint calls them and however it stacks them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from engine.model.files import TensorFile

__all__ = ["ExpertsFile", "has_experts"]

_BLOCK = "block_sparse_moe."
_RENAMED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Of Mixtral's experts."""

_ROUTERS = (f"{_BLOCK}gate.weight", f"{_BLOCK}router.layer.weight")

_STACKED = {
    f"{_BLOCK}input_linear.weight": ("gate_proj", "up_proj"),  # Granite's
    f"{_BLOCK}output_linear.weight": ("down_proj",),
    f"{_BLOCK}experts.gate_up_proj": ("gate_proj", "up_proj"),  # transformers' own names in memory
    f"{_BLOCK}experts.down_proj": ("down_proj",),
    "mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.experts.down_proj": ("down_proj",),
    "mlp.experts.gate_proj.weight": ("gate_proj",),  # one by one, as GGUF has them
    "mlp.experts.up_proj.weight": ("up_proj",),
    "mlp.experts.down_proj.weight": ("down_proj",),
}
"""Tensors of all experts of a layer: [experts, outputs, inputs], of one projection or of two joined."""

_OF_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_OF_EXPERT = re.compile(rf"{re.escape(_BLOCK)}experts\.(\d+)\.(w[123])\.weight")


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor, or of a stacked one an expert's part: `part` of `parts` of its outputs."""

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def has_experts(names: Iterable[str]) -> bool:
    """Whether some of these tensors are a mixture's."""
    return any(f".{_BLOCK}" in name or ".mlp.experts." in name for name in names)


class ExpertsFile:
    """The checkpoint with each expert's projections as `mlp.experts.N.gate_proj.weight` and so on, and the
    router as `mlp.gate.weight` (as Qwen 3 is published).

    Args:
        files: the checkpoint's tensors, by name.
    """

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        self._files = files
        self._sources: dict[str, _Source] = {}
        for name, file in files.items():
            layer, own = found.groups() if (found := _OF_LAYER.fullmatch(name)) else ("", name)
            if own in _ROUTERS:
                self._sources[f"{layer}mlp.gate.weight"] = _Source(name)
            elif own in _STACKED and len(shape := file.shape(name)) == 3:
                parts = _STACKED[own]
                for expert in range(shape[0]):
                    for part, projection in enumerate(parts):
                        source = _Source(name, expert, part, len(parts))
                        self._sources[f"{layer}mlp.experts.{expert}.{projection}.weight"] = source
            elif expert_of := _OF_EXPERT.fullmatch(own):
                number, projection = expert_of.groups()
                self._sources[f"{layer}mlp.experts.{number}.{_RENAMED[projection]}.weight"] = _Source(name)
            else:
                self._sources[name] = _Source(name)

    def names(self) -> Iterable[str]:
        return self._sources

    def get(self, name: str) -> torch.Tensor:
        source = self._sources[name]
        tensor = self._files[source.name].get(source.name)
        if source.expert is None:
            return tensor
        return tensor[source.expert].chunk(source.parts)[source.part]

    def shape(self, name: str) -> tuple[int, ...]:
        source = self._sources[name]
        shape = self._files[source.name].shape(source.name)
        return shape if source.expert is None else (shape[1] // source.parts, *shape[2:])
