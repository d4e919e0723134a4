"""The weights of experts by the same names, whatever a checkpoint calls them and however it stacks them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from engine.errors import WeightsError
from engine.model import mxfp4
from engine.model.files import TensorFile

__all__ = ["ExpertsFile", "as_published", "has_experts"]

_BLOCK = "block_sparse_moe."
_RENAMED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Of Mixtral's experts."""

_ROUTERS = (
    f"{_BLOCK}gate.weight",  # Mixtral's
    f"{_BLOCK}router.layer.weight",  # Granite's
    f"{_BLOCK}router.weight",  # and in memory
    "mlp.router.weight",  # gpt-oss's
    "mlp.gate.wg.weight",  # Hunyuan's
)

_SHARED = re.compile(r"mlp\.shared_(?:expert|mlp)\.(.+)")
"""Of the MLP beside the experts: Qwen's and Hunyuan's names of `mlp.shared_experts`."""

_CORRECTIONS = (
    "mlp.gate.e_score_correction_bias",  # GLM's
    "mlp.moe_statics.e_score_correction_bias",  # ERNIE's, [1, experts]
    "mlp.gate.moe_statics.e_score_correction_bias",  # and in memory
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

_BOTH = ("gate_proj", "up_proj")
_Form = Literal["halves", "turns", "transposed", "mxfp4", "blocks", "scales", "vector"]
_IN_TURN: dict[str, tuple[str, tuple[str, ...], _Form]] = {
    "mlp.experts.gate_up_proj": ("weight", _BOTH, "transposed"),
    "mlp.experts.gate_up_proj_bias": ("bias", _BOTH, "turns"),
    "mlp.experts.gate_up_proj_blocks": ("weight", _BOTH, "mxfp4"),
    "mlp.experts.down_proj": ("weight", ("down_proj",), "transposed"),
    "mlp.experts.down_proj_bias": ("bias", ("down_proj",), "turns"),
    "mlp.experts.down_proj_blocks": ("weight", ("down_proj",), "mxfp4"),
}
"""gpt-oss's: [experts, inputs, outputs]; a bias [experts, outputs]; in 4 bits [experts, outputs, inputs / 32,
16] and beside that scales, [experts, outputs, inputs / 32]. Outputs of gate and up come in turn."""

_OUTPUTS: dict[_Form, tuple[int, int]] = {"turns": (2, 1), "transposed": (3, 2), "mxfp4": (4, 1)}
"""Of these the dimensions, and which one is the outputs."""

_OF_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_OF_EXPERT = re.compile(rf"{re.escape(_BLOCK)}experts\.(\d+)\.(w[123])\.weight")
_NUMBER, _ANY = re.compile(r"(?<=experts\.)\d+"), "*"


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor, or of a stacked one an expert's part: `part` of `parts` of its outputs.

    `form`: how outputs of several projections lie there: one projection behind the other ("halves"), or in
    turn. Of these, "mxfp4" is to be dequantised, "blocks" and "scales" are to be as kernels take them. A
    "vector" is to have one dimension, whatever it is stored with.
    """

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    form: _Form = "halves"


def has_experts(names: Iterable[str]) -> bool:
    """Whether some of these tensors are a mixture's."""
    return any(f".{_BLOCK}" in name or ".mlp.experts." in name for name in names)


def as_published(name: str) -> str:
    """What `ExpertsFile` calls a tensor of a router, an expert or the MLP beside them; else its own name."""
    layer, own = _split(name)
    if own in _ROUTERS:
        return f"{layer}mlp.gate.weight"
    if own == "mlp.router.bias":
        return f"{layer}mlp.gate.bias"
    if own in _CORRECTIONS:
        return layer + _CORRECTIONS[0]
    if shared := _SHARED.fullmatch(own):
        return f"{layer}mlp.shared_experts.{shared[1]}"
    if expert_of := _OF_EXPERT.fullmatch(own):
        number, projection = expert_of.groups()
        return f"{layer}mlp.experts.{number}.{_RENAMED[projection]}.weight"
    return name


class ExpertsFile:
    """The checkpoint with each expert's projections as `mlp.experts.N.gate_proj.weight` and so on, and the
    router as `mlp.gate.weight` (as Qwen 3 is published). What corrects its choice is
    `mlp.gate.e_score_correction_bias` and the MLP beside the experts `mlp.shared_experts` (as GLM-4.5 is
    published), that one's gate `mlp.shared_expert_gate`.

    Args:
        files: the checkpoint's tensors, by name.
        packed: weights in MXFP4 shall be `gate_proj.blocks` and `gate_proj.scales`, for the kernels, and not
            be dequantised.

    Raises:
        WeightsError: it holds a weight in two forms, or one in MXFP4 without scales that fit it.
    """

    def __init__(self, files: Mapping[str, TensorFile], *, packed: bool = False) -> None:
        self._files, self._packed = files, packed
        self._sources: dict[str, _Source] = {}
        self._forms: dict[str, str] = {}
        # Other families' tensors have the same names in transformers' memory. They have no biases.
        biased = {_split(name)[0] for name in files if name.endswith(".mlp.experts.gate_up_proj_bias")}
        for name, file in files.items():
            layer, own = _split(name)
            if own in _CORRECTIONS or own == "mlp.shared_expert_gate.weight":
                self._add(layer, as_published(name).removeprefix(layer), own, _Source(name, form="vector"))
            elif own in _IN_TURN and (layer in biased or own.endswith(("_bias", "_blocks"))):
                self._add_in_turn(layer, own, name)
            elif own.endswith("_proj_scales") and _blocks_of(name) in files:
                continue
            elif parts := _parts(own, file.shape(name)):
                for expert in range(file.shape(name)[0]):
                    for part, projection in enumerate(parts):
                        source = _Source(name, expert, part, len(parts))
                        target = f"mlp.experts.{expert}.{projection}.weight"
                        self._add(layer, target, f"{own}[{_ANY}]", source)
            else:
                target = as_published(name).removeprefix(layer)
                self._add(layer, target, _NUMBER.sub(_ANY, own), _Source(name))

    def _add_in_turn(self, layer: str, own: str, name: str) -> None:
        kind, parts, form = _IN_TURN[own]
        shape = self._files[name].shape(name)
        if form == "mxfp4":
            self._check_scales(name)
        dimensions, outputs = _OUTPUTS[form]
        if len(shape) != dimensions or shape[outputs] % len(parts):
            self._add(layer, own, own, _Source(name))  # which no model has, so it is told
            return
        stored: list[tuple[str, str, _Form]] = [(name, kind, form)]
        if form == "mxfp4" and self._packed:
            stored = [(name, "blocks", "blocks"), (_scales_of(name), "scales", "scales")]
        for source, target, form in stored:
            for expert in range(shape[0]):
                for part, projection in enumerate(parts):
                    self._add(
                        layer,
                        f"mlp.experts.{expert}.{projection}.{target}",
                        f"{_split(source)[1]}[{_ANY}]",
                        _Source(source, expert, part, len(parts), form),
                    )

    def _check_scales(self, name: str) -> None:
        scales = _scales_of(name)
        if scales not in self._files:
            raise WeightsError(f"the checkpoint holds {name} but no {scales}")
        shape, beside = self._files[name].shape(name), self._files[scales].shape(scales)
        if len(shape) != 4 or shape[3] != mxfp4.BLOCK // 2 or beside != shape[:3]:
            raise WeightsError(
                f"{name} {list(shape)} and {scales} {list(beside)} are no weights in MXFP4: those would be "
                f"[experts, outputs, blocks, {mxfp4.BLOCK // 2}] and [experts, outputs, blocks]"
            )

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
            return tensor.flatten() if source.form == "vector" else tensor
        own = tensor[source.expert]
        if source.form == "halves":
            return own.chunk(source.parts)[source.part]
        if source.form == "transposed":
            own = own.t()
        own = own[source.part :: source.parts]
        if source.form in ("turns", "transposed"):
            return own
        if own.dtype != torch.uint8:
            raise WeightsError(f"{source.name} is {own.dtype}, and MXFP4 is bytes")
        if source.form == "scales":
            return mxfp4.packed_scales(own, self.told(name))
        if source.form == "blocks":
            return mxfp4.packed_codes(mxfp4.from_checkpoint(own))
        scales = self._files[_scales_of(source.name)].get(_scales_of(source.name))
        beside = scales[source.expert, source.part :: source.parts]
        return mxfp4.dequantized(mxfp4.from_checkpoint(own), beside)

    def shape(self, name: str) -> tuple[int, ...]:
        source = self._sources[name]
        shape = self._files[source.name].shape(source.name)
        if source.expert is None:
            return (math.prod(shape),) if source.form == "vector" else shape
        outputs = shape[2 if source.form == "transposed" else 1] // source.parts
        if source.form in ("halves", "turns"):
            return outputs, *shape[2:]
        if source.form == "transposed":
            return outputs, shape[1]
        size = shape[2] * mxfp4.BLOCK
        if source.form == "scales":
            return mxfp4.words(size), outputs
        return outputs, size if source.form == "mxfp4" else size // 2

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


def _scales_of(name: str) -> str:
    return name.removesuffix("blocks") + "scales"


def _blocks_of(name: str) -> str:
    return name.removesuffix("scales") + "blocks"


def _parts(own: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The projections of each expert in a tensor of all, if it is one that can be taken apart."""
    parts = _STACKED.get(own, ())
    return parts if parts and len(shape) == 3 and shape[1] % len(parts) == 0 else ()
