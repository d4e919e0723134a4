"""Checkpoints whose linear layers are stored in AWQ or GPTQ: dequantised as they are read.

Both store, per group of input channels and output channel, a scale and a zero point: a weight is
(q - zero) * scale. They differ in how the small integers share 32-bit words.

AWQ ("gemm"; Lin et al. 2023, arXiv 2306.00978): qweight [in, out / 8] and qzeros [groups, out / 8], eight
4-bit columns a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits; scales [groups, out].

GPTQ (Frantar et al. 2022, arXiv 2210.17323): qweight [in * bits / 32, out], consecutive rows from the lowest
bits; qzeros [groups, out * bits / 32], consecutive columns, less one in the format's first version; scales
[groups, out]; g_idx [in] the group of each row, which with act-order is not row // group_size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelError, UnsupportedModelError, WeightsError
from engine.model.files import TensorFile

__all__ = ["MXFP4", "DequantizedFile", "check_quantization", "stated_quantization"]

log = logging.getLogger(__name__)

MXFP4 = "mxfp4"
"""The `quant_method` of experts in 4 bits, which are `ExpertsFile`'s to read."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of eight, that each four bits of a word hold."""

_WORD_BITS = 32
_GPTQ_BITS = (2, 4, 8)  # 3 bits straddle words
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def stated_quantization(folder: Path) -> dict[str, Any] | None:
    """What the model folder says of its quantisation: in config.json, or in AutoGPTQ's own file.

    Raises:
        ModelError: a file is not JSON.
    """
    for name, default in (("config.json", None), ("quantize_config.json", "gptq")):
        path = folder / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read as JSON: {error}") from error
        stated = value.get("quantization_config") if default is None else {"quant_method": default, **value}
        if stated is not None:
            return dict(stated)
    return None


def check_quantization(stated: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError, with the format's name, unless it is one that can be dequantised."""
    method = str(stated.get("quant_method") or "of no stated method")
    if method == MXFP4:
        return
    if method == "awq":
        version, bits = str(stated.get("version", "gemm")).lower(), stated.get("bits", 4)
        if version == "gemm" and bits == 4:
            return
        method = f"awq ({version}, {bits} bits)"
    elif method == "gptq":
        layout, bits = str(stated.get("checkpoint_format") or "gptq"), stated.get("bits")
        if others := sorted(_other_bits(stated) - {bits}, key=str):  # GPTQModel's, as for some experts
            bits = f"{bits} and {', '.join(map(str, others))}"
        if layout in ("gptq", "gptq_v2") and bits in _GPTQ_BITS:
            return
        method = f"gptq ({layout}, {bits} bits)"
    raise UnsupportedModelError(
        f"quantised checkpoints in {method} are not supported; supported are awq (gemm, 4 bits) and gptq "
        "(2, 4 or 8 bits), which are dequantised at load, and experts in mxfp4. Or use the full-precision "
        "weights"
    )


def _other_bits(stated: Mapping[str, Any]) -> set[Any]:
    """Bits of single modules by GPTQModel's settings; a rule that begins with "-:" is of unquantised ones."""
    rules = stated.get("dynamic")
    if not isinstance(rules, dict):
        return set()
    return {own["bits"] for rule, own in rules.items() if not rule.startswith("-:") and "bits" in (own or {})}


class DequantizedFile:
    """The tensors of a quantised checkpoint: each `x.qweight` with what belongs to it is `x.weight`.

    Args:
        files: the checkpoint's tensors, by name.
        stated: its quantisation, as `stated_quantization` gives it.

    Raises:
        UnsupportedModelError: the format is not covered.
    """

    def __init__(self, files: Mapping[str, TensorFile], stated: Mapping[str, Any]) -> None:
        check_quantization(stated)
        self._files, self._awq = files, stated["quant_method"] == "awq"
        self._bits = 4 if self._awq else int(stated["bits"])
        self._zero_offset = 0 if self._awq or stated.get("checkpoint_format") == "gptq_v2" else 1
        ending = ".qweight"
        self._modules = {name.removesuffix(ending) for name in files if name.endswith(ending)}
        self._plain = {name for name in files if not self._is_part(name)}
        log.warning(
            "%s weights of %d bits are dequantised at load: they take the memory of full-precision ones",
            str(stated["quant_method"]).upper(),
            self._bits,
        )

    def names(self) -> Iterable[str]:
        return [*self._plain, *(f"{module}.weight" for module in self._modules)]

    def get(self, name: str) -> torch.Tensor:
        """As stored, or dequantised to float32, [out_features, in_features].

        Raises:
            WeightsError: a tensor that belongs to it is missing, or they do not fit each other.
        """
        if name in self._plain:
            return self._files[name].get(name)
        module = name.removesuffix(".weight")
        qweight, qzeros, scales = (self._part(module, part) for part in _PARTS[:3])
        for part, tensor in zip(_PARTS, (qweight, qzeros, scales), strict=False):
            _of_matrix(f"{module}.{part}", tuple(tensor.shape))
        groups, out_features = scales.shape
        if self._awq:
            values, zeros = (_in_order(_unpack(packed, 4, 1)) for packed in (qweight, qzeros))
        else:
            values = _unpack(qweight, self._bits, 0)
            # Of the first version's zeros one was taken off; the largest value stands for 0 - 1.
            zeros = (_unpack(qzeros, self._bits, 1) + self._zero_offset) & ((1 << self._bits) - 1)
        in_features = len(values)
        if values.shape[1] != out_features or zeros.shape != scales.shape or in_features % groups:
            shapes = [list(part.shape) for part in (qweight, qzeros, scales)]
            raise WeightsError(f"{module}: qweight, qzeros and scales do not fit each other: {shapes}")
        group = self._groups(module, in_features, groups)
        weight = (values - zeros[group]).float() * scales.float()[group]
        return weight.t()

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._plain:
            return self._files[name].shape(name)
        qweight = f"{name.removesuffix('.weight')}.qweight"
        rows, columns = _of_matrix(qweight, self._files[qweight].shape(qweight))
        packed = _WORD_BITS // self._bits
        return (columns * packed, rows) if self._awq else (columns, rows * packed)

    def is_padding(self, name: str) -> bool:
        """Whether this is a bias of zeros, which quantisers write beside layers that have none."""
        module = name.removesuffix(".bias")
        return module != name and module in self._modules and not self.get(name).any()

    def _is_part(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return part in _PARTS and module in self._modules

    def _part(self, module: str, part: str) -> torch.Tensor:
        name = f"{module}.{part}"
        if name not in self._files:
            raise WeightsError(f"the checkpoint holds {module}.qweight but no {name}")
        return self._files[name].get(name)

    def _groups(self, module: str, in_features: int, groups: int) -> torch.Tensor:
        """[in_features] int64, the group of each input channel."""
        if f"{module}.g_idx" not in self._files:
            return torch.arange(in_features) // (in_features // groups)
        group = self._part(module, "g_idx").long()
        if len(group) != in_features or group.min() < 0 or group.max() >= groups:
            raise WeightsError(f"{module}.g_idx does not name one of {groups} groups for each input channel")
        return group


def _of_matrix(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 2:
        raise WeightsError(f"{name} is {list(shape)}, no matrix: experts have to be quantised one by one")
    return shape


def _in_order(columns: torch.Tensor) -> torch.Tensor:
    """AWQ's columns [rows, out_features] in their own order."""
    place = torch.tensor(_AWQ_ORDER).argsort()
    return columns.view(len(columns), -1, len(_AWQ_ORDER))[:, :, place].flatten(1)


def _unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The integers in int32 words [rows, columns], lowest bits first, as int32.

    Returns:
        dim 0: [rows * n, columns]. dim 1: [rows, columns * n].
    """
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    values = (packed.unsqueeze(1 + dim) >> shifts.view(-1, *[1] * (1 - dim))) & ((1 << bits) - 1)
    return values.flatten(0, 1) if dim == 0 else values.flatten(1, 2)
