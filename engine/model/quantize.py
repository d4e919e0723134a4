"""Linear layers in 8 bits: weights per output channel, activations per row, exact integer sums.

Each row of the activations has a scale of its own, its largest magnitude, so nothing that a neighbour
in the batch does can change a row's result: the products are summed in int32, where order does not
matter, and what is done in float32 is done row by row. (torch's dynamic quantized linears take one
scale for the whole batch.)

A few channels of a transformer's activations are far larger than the rest, and would leave little of
the 8 bits to the others. So blocks of channels are mixed by an orthogonal matrix first, and the weights
by the same, which leaves the product as it is (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.model.int8_products import BlockedWeight

__all__ = ["Int8Weight", "blocked_runs_here", "check_int8"]

_LEVELS = 127.0

_LARGE = 1 << 22
"""From so many weights on a matrix is large: of torch's kernels the packed one pays there. It takes 30 µs to
call, `_int_mm` 2: SmolLM2's 120 matrices at one row take 12 ms against 20, its lm_head at eight rows 4.3
against 2.4 (two cores, epilogues included, in a run in which float32 took 32 and 8)."""

_LARGEST_BLOCK = 128
"""Channels mixed together at most."""


def check_int8(device: torch.device) -> None:
    """Raises ConfigError where int8 linears cannot run, or would not be exact."""
    if device.type != "cpu":
        raise ConfigError(f"this form of int8 runs on the CPU, not on {device.type}")
    if not torch._C._has_mkldnn or not torch.cpu._is_vnni_supported():
        # Without VNNI the byte products are added in 16 bits, where they saturate.
        raise ConfigError("quantization int8 needs a CPU with AVX-512 VNNI; leave it out")


@cache
def blocked_runs_here() -> bool:
    """Whether products are our own kernel's (`BlockedWeight`): with AVX-512 VNNI, and without AMX, whose
    instructions only torch's kernels use."""
    if torch.cpu._is_amx_tile_supported():
        return False
    from engine.cpu_team import compiles_for  # only int8 needs the compiler

    return compiles_for("avx512vnni")


class Int8Weight:
    """y = x W^T + b with W in int8, from and to float32.

    Args:
        weight: [out_features, in_features] float, on the CPU.
        bias: [out_features] float, or None.
        rotate: mix the channels of the input; not worth it where they are alike already.

    Raises:
        ConfigError: this device cannot run it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rotate: bool) -> None:
        check_int8(weight.device)
        weight = weight.detach().float()
        self.in_features = weight.shape[1]
        self.biased = bias is not None
        self.block = _block_size(weight.shape[1]) if rotate else 1
        self._rotation = _rotation(self.block) if rotate else None
        if self._rotation is not None:
            weight = _rotate(weight, self._rotation)
        # A channel of zeros keeps a scale that can be divided by.
        scale = weight.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny) / _LEVELS
        quantized = (weight / scale.unsqueeze(1)).round_().to(torch.int8)
        scale /= _LEVELS  # so that a row's scale is just its largest magnitude
        self._levels = torch.tensor(_LEVELS)
        self._bias = None if bias is None else bias.detach().float()
        self._scale = scale
        self.large = weight.numel() >= _LARGE
        self._blocked: BlockedWeight | None = None
        self._packed: Callable[[Tensor], Tensor] | None = None
        self._transposed = quantized.new_empty(0, 0)
        if blocked_runs_here() and self.in_features % 4 == 0:
            from engine.model.int8_products import BlockedWeight  # compiled when it is imported

            self._blocked = BlockedWeight(quantized)
        elif self.large:
            self._packed = _packed_product(quantized, scale)
        else:
            self._transposed = quantized.t()  # the view that torch's kernel reads best

    @property
    def num_bytes(self) -> int:
        """What a product reads of it."""
        return int(self._scale.numel()) * (self.in_features + self._scale.element_size())

    def signs(self) -> Tensor:
        """What each channel of the input is multiplied by before the mixing, [in_features] ±1."""
        if self._rotation is None:
            return torch.ones(self.in_features)
        return _signs(self.block).repeat_interleave(self.in_features // self.block)

    def mixed_scale(self) -> Tensor:
        """[out_features]: what a product of unscaled mixing is multiplied by, besides its row's scale."""
        return self._scale / math.sqrt(self.block)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in_features] to [..., out_features], plus `residual` of that shape where given."""
        y = self.product(*self.rounded(x.reshape(-1, x.shape[-1]))).view(*x.shape[:-1], -1)
        return y if residual is None else y.add_(residual)

    def rounded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [rows, in_features] to int8, mixed, and the largest magnitude of each row, [rows, 1]."""
        if self._rotation is not None:
            rows = _rotate(rows, self._rotation)
        largest = rows.abs().amax(-1, keepdim=True)
        # A row of zeros divides by zero; what that gives is multiplied by its scale, zero, in the end.
        # A row that is not finite stays so: its scale is.
        return (rows * (self._levels / largest)).round_().to(torch.int8), largest

    def product(self, quantized: Tensor, largest: Tensor) -> Tensor:
        """What `rounded` gave, by this weight or one that mixes alike, to [rows, out_features]."""
        y = self._product(quantized, largest)
        if self._bias is not None:
            y += self._bias
        return y

    def sums(self, a: Tensor, out: Tensor) -> Callable[[], object]:
        """A call that sets `out` to the exact sums a W^T as often as it is made, from what `a` then holds.

        Not to be had of a large matrix without `blocked_runs_here()`.

        Args:
            a: int8 [rows, in_features], contiguous, each row mixed and rounded.
            out: int32 [rows, out_features], contiguous.
        """
        if self._blocked is not None:
            return self._blocked.sums(a, out)
        return partial(torch._int_mm, a, self._transposed, out=out)

    def _product(self, quantized: Tensor, largest: Tensor) -> Tensor:
        """int8 [rows, in] and float32 [rows, 1] to the scaled product in float32, whatever computes it."""
        if self._blocked is not None:
            return self._blocked.scaled(quantized, self._scale, largest)
        if self._packed is not None:
            return self._packed(quantized).mul_(largest)
        return torch.mul(torch._int_mm(quantized, self._transposed), self._scale).mul_(largest)


def _block_size(channels: int) -> int:
    """Channels mixed together: the largest power of two that divides them, at most `_LARGEST_BLOCK`."""
    # At least two blocks a row: one column would be summed in another order (BLAS's gemv).
    return max(1, min(channels & -channels, channels // 2, _LARGEST_BLOCK))


def _signs(block: int) -> Tensor:
    """Seeded ±1, [block]. Without them a constant offset of the channels would become one large channel."""
    return torch.randint(2, (block,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def _rotation(block: int) -> Tensor:
    """Sylvester's Hadamard matrix times the signs, [block, block] orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * _signs(block) / math.sqrt(block)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """[rows, channels], the matrix over the leading axis of each row seen as [block, channels / block]."""
    return torch.matmul(rotation, x.view(len(x), len(rotation), -1)).view(x.shape)


def _packed_product(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """int8 [rows, in] to (q W^T) * scale in float32, from a weight in oneDNN's blocked layout.

    Its fast kernel takes unsigned activations.
    """
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zero_points = torch.zeros(len(scale), dtype=torch.int64)
    offset = 128

    def product(quantized: Tensor) -> Tensor:
        unsigned = quantized.view(torch.uint8).bitwise_xor_(offset)  # adds 128 modulo 256
        y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            unsigned, 1.0, offset, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y

    return product
