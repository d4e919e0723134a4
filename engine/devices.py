"""From the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sent", "slot_rows"]


_ALIGNED = 16
"""Elements: at least 16 bytes of any dtype."""


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; what the device does meanwhile is not waited for."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def slot_rows(count: int, slots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, slots] zeros; each row is contiguous and begins where kernels may load many bytes at once."""
    width = -(-slots // _ALIGNED) * _ALIGNED
    return torch.zeros(count, width, dtype=dtype, device=device)[:, :slots]
