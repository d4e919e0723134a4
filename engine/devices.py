"""From the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sent"]


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; what the device does meanwhile is not waited for."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
