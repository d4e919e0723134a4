"""The weights of experts by the same names, whatever a checkpoint calls them and however it stacks them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from engine.errors import WeightsError
from engine.model.files import TensorFile

__all__ = ["ExpertsFile", "has_experts"]

_BLOCK = "block_sparse_moe."
_RENAMED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Of Mixtral's experts."""

_ROUTERS = (
    f"{_BLOCK}gate.weight",  # Mixtral's
    f"{_BLOCK}router.layer.weight",  # Granite's
    f"{_BLOCK}router.weight",  # and in memory
)

_STACKED = {
    f"{_BLOCK}input_linear.weight": ("gate_proj", "up_proj"),  # Granite's
    f"{_BLOCK}output_linear.weight": ("down_proj",),
    f"{_BLOCK}experts.gate_up_proj": ("gate_proj", "up_proj"),  # transformers' own names in memory
    f"{_BLOCK}experts.down_proj": ("down_proj",),
    "mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.experts.down_proj": ("down_proj",),
}
"""Tensors of all experts of a layer: [experts, outputs, inputs], of one projection or of two joined."""

_OF_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_OF_EXPERT = re.compile(rf"{re.escape(_BLOCK)}experts\.(\d+)\.(w[123])\.weight")
_NUMBER, _ANY = re.compile(r"(?<=experts\.)\d+"), "*"


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

    Raises:
        WeightsError: it holds a weight in two forms.
    """

    def __init__(self, files: Mapping[str, TensorFile]) -> None:
        self._files = files
        self._sources: dict[str, _Source] = {}
        self._forms: dict[str, str] = {}
        for name, file in files.items():
            layer, own = _split(name)
            if own in _ROUTERS:
                self._add(layer, "mlp.gate.weight", own, _Source(name))
            elif parts := _parts(own, file.shape(name)):
                for expert in range(file.shape(name)[0]):
                    for part, projection in enumerate(parts):
                        source = _Source(name, expert, part, len(parts))
                        target = f"mlp.experts.{expert}.{projection}.weight"
                        self._add(layer, target, f"{own}[{_ANY}]", source)
            elif expert_of := _OF_EXPERT.fullmatch(own):
                number, projection = expert_of.groups()
                target = f"mlp.experts.{number}.{_RENAMED[projection]}.weight"
                self._add(layer, target, _NUMBER.sub(_ANY, own), _Source(name))
            else:
                self._add(layer, own, _NUMBER.sub(_ANY, own), _Source(name))

    def _add(self, layer: str, name: str, form: str, source: _Source) -> None:
        if other := self._sources.get(layer + name):
            raise WeightsError(
                f"the checkpoint holds {layer}{name} twice, as {other.name} and as {source.name}"
            )
        self._sources[layer + name] = source
        self._forms[_NUMBER.sub(_ANY, name)] = form

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

    def told(self, name: str) -> str:
        """What the checkpoint calls a tensor, or would if it had it; `x.weight[3]` is expert 3's part."""
        if source := self._sources.get(name):
            return source.name if source.expert is None else f"{source.name}[{source.expert}]"
        layer, own = _split(name)
        form = self._forms.get(_NUMBER.sub(_ANY, own), own)
        number = _NUMBER.search(own)
        return layer + (form if number is None else form.replace(_ANY, number.group()))


def _split(name: str) -> tuple[str, str]:
    """What names the layer, and the rest."""
    found = _OF_LAYER.fullmatch(name)
    return (found[1], found[2]) if found else ("", name)


def _parts(own: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The projections of each expert in a tensor of all, if it is one that can be taken apart."""
    parts = _STACKED.get(own, ())
    return parts if parts and len(shape) == 3 and shape[1] % len(parts) == 0 else ()
