"""Which device a setting names, and from the host to it."""

from __future__ import annotations

import logging
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ConfigError

__all__ = ["device_named", "not_emulated", "sent", "sent_together", "slot_rows"]

log = logging.getLogger(__name__)

_ALIGNED = 16
"""Bytes, or elements, which are no fewer: where kernels may load many at once."""


def device_named(name: str) -> torch.device:
    """The device of a setting: 'cpu', 'cuda', 'cuda:N', or 'auto', which is CUDA where there is one.

    Raises:
        ConfigError: torch knows no such device, nothing here runs on its kind, or it is not in this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not one torch knows; use 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use 'cpu' or 'cuda'")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            seen = f"no such GPU here, only {count}" if count else "no GPU here"
            raise ConfigError(f"device {name!r} was asked for and torch sees {seen}")
    return device


def not_emulated(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float16 for bfloat16 on a GPU that computes it by way of float32, which is logged."""
    if dtype is not torch.bfloat16 or device.type == "cpu":
        return dtype
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return dtype
    log.warning(
        "a GPU of compute capability %d.%d computes bfloat16 by way of float32 only, so dtype is float16; "
        "if the model needs a wider range, set dtype to bfloat16 or float32",
        major,
        minor,
    )
    return torch.float16


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; what the device does meanwhile is not waited for."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def sent_together(*values: NDArray[Any], device: torch.device) -> list[Tensor]:
    """`sent` of several in one copy: each has a cost of its own, which few numbers do not reach."""
    if device.type == "cpu":
        return [torch.from_numpy(value) for value in values]
    sizes = [-(-value.nbytes // _ALIGNED) * _ALIGNED for value in values]
    begins = list(accumulate(sizes, initial=0))
    packed = np.empty(begins[-1], dtype=np.uint8)
    for value, begin in zip(values, begins, strict=False):
        packed[begin : begin + value.nbytes] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    there = sent(torch.from_numpy(packed), device)
    return [
        there[begin : begin + value.nbytes].view(torch.from_numpy(value).dtype).view(value.shape)
        for value, begin in zip(values, begins, strict=False)
    ]


def slot_rows(count: int, slots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, slots] zeros; each row is contiguous and begins where kernels may load many bytes at once."""
    width = -(-slots // _ALIGNED) * _ALIGNED
    return torch.zeros(count, width, dtype=dtype, device=device)[:, :slots]
