"""Weights in MXFP4: 4 bits each (E2M1), and for every 32 of a row a power of two (E8M0).

The format is that of the Open Compute Project's "Microscaling Formats (MX) Specification" v1.0. A code is a
sign, two bits of exponent and one of mantissa; a scale is the exponent, 127 more than it is. Their product is
exact in float32 and bfloat16.

In checkpoints a byte holds two neighbours, the first in its low bits. In GGUF a block's scale stands before
its 16 bytes, of which the low bits are its first half. For the kernels (`lifted` in `experts_triton`) the low
bits of a row's bytes are its first half and the high bits its second, so that the activations they meet lie
together; and the scales of two blocks of each half are a word, as much as 64 bytes need, the words of all
rows one behind the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import WeightsError

__all__ = [
    "BLOCK",
    "dequantized",
    "from_checkpoint",
    "from_gguf",
    "packed_codes",
    "packed_scales",
    "suits_kernels",
    "words",
]

BLOCK = 32
"""Weights that share a scale."""

_BYTES = BLOCK // 2
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS, _NAN = 127, 255  # of a scale's exponent
_LARGEST_SCALE = 128  # with which the kernels' factors on codes are finite in float32


def suits_kernels(size: int) -> bool:
    """Whether both halves of a row of so many weights are whole blocks."""
    return size % (2 * BLOCK) == 0


def words(size: int) -> int:
    """That hold a row's scales."""
    return -(-size // (4 * BLOCK))


def from_checkpoint(blocks: Tensor) -> Tensor:
    """Codes [rows, size] uint8 from a checkpoint's [rows, size / 32, 16]."""
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(1)


def from_gguf(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rows, size] and scales [rows, size / 32] from GGUF's bytes, [rows, size / 32 * 17] uint8."""
    blocks = rows.view(len(rows), -1, 1 + _BYTES)
    found = blocks[:, :, 1:]
    return torch.cat((found & 15, found >> 4), dim=-1).flatten(1), blocks[:, :, 0]


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """What they stand for, [rows, size] float32; an exponent of 255 is NaN.

    Args:
        codes: [rows, size] uint8; scales: [rows, size / 32] uint8.
    """
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    found = values.index_select(0, codes.flatten().int()).view(len(codes), -1, BLOCK)
    # A power of two by its bits; the smallest is subnormal.
    factors = (scales.int() << 23).clamp_(min=1 << 22).view(torch.float32)
    factors = factors.masked_fill_(scales == _NAN, torch.nan)
    return found.mul_(factors.unsqueeze(-1)).flatten(1)


def packed_codes(codes: Tensor) -> Tensor:
    """For the kernels: [rows, size] to [rows, size / 2], uint8."""
    low, high = codes.chunk(2, dim=1)
    return low | high << 4


def packed_scales(scales: Tensor, name: str) -> Tensor:
    """For the kernels: uint8 [rows, size / 32] to int32 [words(size), rows].

    Args:
        name: of the weight, for the error.

    Raises:
        WeightsError: a scale is not a number, or so large that no model has it.
    """
    if scales.numel() and (largest := int(scales.max())) > _LARGEST_SCALE:
        told = "NaN" if largest == _NAN else f"2 ** {largest - _BIAS}"
        raise WeightsError(
            f"a scale in {name} is {told}: the checkpoint is damaged, or has weights too large for 4-bit "
            f"kernels (2 ** {_LARGEST_SCALE - _BIAS} at most)"
        )
    rows, blocks = scales.shape
    halves = scales.new_zeros(rows, 2, -(-blocks // 4) * 2)
    halves[:, :, : blocks // 2] = scales.view(rows, 2, -1)
    pairs = halves.view(rows, 2, -1, 2).transpose(1, 2).contiguous()  # [rows, words, halves, 2]
    return pairs.view(rows, -1).view(torch.int32).t().contiguous()
