"""What of `torch.cuda` and Triton stands in for a device, in this process."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.fake_cuda.graph import CUDAGraph, Graph
from tests.fake_cuda.kernels import stand_in_for_triton
from tests.fake_cuda.queue import QUEUE, Event, Pinned, Stream
from tests.fake_cuda.tensors import (
    Dispatch,
    Functions,
    Generators,
    OnCuda,
    pinned,
    plain,
    refuse_in_capture,
)

__all__ = ["install"]

_MEMORY = 3 << 30
_CAPABILITY = {"torch": (7, 5), "compile": (9, 0), "interpret": (9, 0)}


class Profile:
    """`torch.profiler.profile`: as if one kernel had run all the time."""

    def __init__(self, **_: object) -> None:
        """Of whatever activities."""

    def __enter__(self) -> Profile:
        self._began = time.time_ns()
        return self

    def __exit__(self, *_: object) -> None:
        began, took = self._began, time.time_ns() - self._began
        event = SimpleNamespace(
            name=lambda: "kernel",
            start_ns=lambda: began,
            duration_ns=lambda: took,
            device_type=lambda: torch.autograd.DeviceType.CUDA,
        )
        self.profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: [event]))


def install(mode: str) -> None:
    """From here on there is the device; see `tests.fake_cuda`. `mode`: torch, compile or interpret."""
    capability = _CAPABILITY[mode]
    properties = SimpleNamespace(
        name="fake", total_memory=_MEMORY, multi_processor_count=132, major=capability[0], minor=capability[1]
    )
    stream = Stream()
    stand_ins: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": Graph,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": _synchronize,
        "_sleep": lambda cycles: cycles.__index__(),
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    torch.profiler.profile = Profile  # type: ignore[assignment, misc]
    torch.Generator = Generators  # type: ignore[assignment, misc]
    # Such tensors can be no inference tensors, and parameters get theirs only where they are swapped.
    torch.inference_mode = lambda given=True: torch.no_grad()(given) if callable(given) else torch.no_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    save = torch.save
    torch.save = lambda what, *to, **how: save(tree_map(_saved, what), *to, **how)
    Tensor.pin_memory = lambda tensor, *_: pinned(tensor)
    Tensor.is_pinned = lambda tensor, *_: Pinned.holds(tensor)
    run = threading.Thread.run

    def with_modes(thread: threading.Thread) -> None:
        with Dispatch(), Functions():
            run(thread)

    threading.Thread.run = with_modes  # type: ignore[method-assign]
    if mode != "torch":
        stand_in_for_triton(interpreted=mode == "interpret")
    Dispatch().__enter__()
    Functions().__enter__()


def _saved(value: Any) -> Any:
    return plain(value) if isinstance(value, OnCuda) else value


def _synchronize(device: object = None) -> None:
    refuse_in_capture("synchronize")
    QUEUE.wait()
