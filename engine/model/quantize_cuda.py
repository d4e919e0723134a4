"""Linear layers in 8 bits on CUDA: weights per output channel by torchao, activations per row by our kernel.

torchao makes the weights (`Float8Tensor`, `Int8Tensor`) and torch has the products. torchao's own linear is
not used: outside of torch.compile it quantises the activations by half a dozen kernels, more than a product
of few rows takes, and in int8 it copies the weight at every call, or below 17 rows computes in float32.

Each row of the activations has a scale of its own, so nothing that a neighbour in the batch does changes a
row's numbers; int8 products are exact sums.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.quantize import check_int8

__all__ = ["RowwiseWeight", "check_quantized"]

Kind = Literal["fp8", "int8"]

_CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}
"""The oldest GPUs that have the instructions: Ada, Ampere."""

_MULTIPLE = {"fp8": 16, "int8": 8}
"""What both sides of a weight must be a multiple of, for `_scaled_mm` and `_int_mm`."""

_INT8_ROWS = 32
"""`_int_mm` takes more than 16 rows; fewer are computed as so many."""

_LARGEST = {"fp8": 448.0, "int8": 127.0}


def check_quantized(kind: Kind, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError where linears of this kind cannot run; the text says what to do."""
    if device.type != "cuda":
        if kind != "int8":
            raise ConfigError(f"quantization {kind} runs on CUDA, not on {device.type}; int8 runs there")
        check_int8(device)
        if dtype != torch.float32:
            raise ConfigError("quantization int8 on the CPU takes dtype float32: its activations are 8 bits")
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"quantization {kind} on CUDA needs torchao: pip install 'medusa-serve[torchao]'")
    have, need = torch.cuda.get_device_capability(device), _CAPABILITY[kind]
    if have < need:
        raise ConfigError(
            f"quantization {kind} needs a GPU of compute capability {need[0]}.{need[1]}, and this one has "
            f"{have[0]}.{have[1]}; leave it out"
        )
    if kind == "fp8" and dtype != torch.bfloat16:
        raise ConfigError("quantization fp8 takes dtype bfloat16, the one its product writes")


class RowwiseWeight:
    """y = x W^T + b with W in 8 bits, from and to the dtype of x.

    Args:
        weight: [out_features, in_features] float.
        bias: [out_features], or None.
        kind: "fp8" (e4m3; x in bfloat16) or "int8".

    Raises:
        ConfigError: the product does not take weights of this size.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind) -> None:
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

        if any(size % _MULTIPLE[kind] for size in weight.shape):
            raise ConfigError(
                f"quantization {kind} takes weights whose sides are multiples of {_MULTIPLE[kind]}, "
                f"and one is {tuple(weight.shape)}; leave it out"
            )
        self._kind, self._bias = kind, None if bias is None else bias.detach()
        form = Float8Tensor if kind == "fp8" else Int8Tensor
        # In float32: torchao would divide bf16 by bf16, and lose half of what 8 bits hold.
        stored = form.from_hp(weight.detach().float(), granularity=PerRow())
        self._transposed: Tensor = stored.qdata.t()  # [in, out], column-major as the products want it
        self._scale: Tensor = stored.scale.float().view(1, -1)

    @property
    def num_bytes(self) -> int:
        """What a product reads of it."""
        return self._transposed.numel() + 4 * self._scale.numel()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in_features] to [..., out_features], plus `residual` of that shape where given."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = self._fp8(rows) if self._kind == "fp8" else self._int8(rows)
        y = y.view(*x.shape[:-1], -1)
        return y if residual is None else y.add_(residual)

    def _fp8(self, rows: Tensor) -> Tensor:
        quantized, scale = _quantize_rows(rows, torch.float8_e4m3fn)
        if rows.device.type == "cpu":  # torch 2.11 has no product with a scale per row there
            sums = quantized.float() @ self._transposed.float()
            return _scaled(sums, scale, self._scale, self._bias, rows.dtype)
        y: Tensor = torch._scaled_mm(
            quantized,
            self._transposed,
            scale_a=scale,
            scale_b=self._scale,
            bias=self._bias,
            out_dtype=rows.dtype,
            use_fast_accum=True,
        )
        return y

    def _int8(self, rows: Tensor) -> Tensor:
        count = len(rows)
        quantized, scale = _quantize_rows(rows, torch.int8, max(count, _INT8_ROWS))
        sums = torch._int_mm(quantized, self._transposed)[:count]
        return _scaled(sums, scale[:count], self._scale, self._bias, rows.dtype)


def _quantize_rows(rows: Tensor, dtype: torch.dtype, count: int | None = None) -> tuple[Tensor, Tensor]:
    """See `triton_quantize.quantize_rows`; in torch's operators where Triton does not run."""
    if rows.device.type == "cuda":
        from engine.model import triton_quantize

        return triton_quantize.quantize_rows(rows, dtype, count)
    largest = _LARGEST["int8" if dtype == torch.int8 else "fp8"]
    wide = rows.float()
    scale = wide.abs().amax(1, keepdim=True) / largest
    values = (wide / scale.clamp(min=1e-30)).nan_to_num_().clamp_(-largest, largest)
    values = (values.round_() if dtype == torch.int8 else values).to(dtype)
    if count is None or count == len(rows):
        return values, scale
    padded = values.new_zeros(count, rows.shape[1]), scale.new_ones(count, 1)
    padded[0][: len(rows)], padded[1][: len(rows)] = values, scale
    return padded


def _scaled(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """sums [T, out] times row_scale [T, 1] and column_scale [1, out], plus bias [out], in `dtype`."""
    if sums.device.type == "cuda":
        from engine.model import triton_quantize

        return triton_quantize.scale_sums(sums, row_scale, column_scale, bias, dtype)
    y = sums.float() * row_scale * column_scale
    return (y if bias is None else y + bias.float()).to(dtype)
