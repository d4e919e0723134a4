"""What of `torch.cuda` and Triton stands in for a device, in this process."""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.fake_cuda.tensors import DEVICE, Dispatch, Functions, Generators, OnCuda, Recorder, plain

__all__ = ["install"]

_MEMORY = 3 << 30
_CAPABILITY = {"torch": (7, 5), "compile": (9, 0)}


class Event:
    """Time on the device is the CPU's, since nothing runs beside it."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timing, self._at = enable_timing, 0.0

    def record(self, stream: object = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """All has ended."""

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing and self._at and end._at):
            raise RuntimeError("both events must be recorded, and made with enable_timing")
        return 1000 * (end._at - self._at)


class Stream:
    """The one there is."""

    def __init__(self, device: object = None) -> None:
        """Of any device."""

    def wait_stream(self, other: Stream) -> None:
        """Whatever ran on the other has ended."""


class CUDAGraph:
    """What was recorded."""

    def replay(self) -> None:
        self.recorder.replay()

    recorder: Recorder


class Graph:
    """`torch.cuda.graph`."""

    def __init__(
        self, graph: CUDAGraph, pool: object = None, stream: object = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        self._graph.recorder = Recorder()
        self._graph.recorder.__enter__()

    def __exit__(self, *error: object) -> None:
        self._graph.recorder.__exit__(*error)


def install(mode: str) -> None:
    """From here on there is the device; see `tests.fake_cuda`. `mode`: torch or compile."""
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
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: cycles.__index__(),
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generators  # type: ignore[assignment, misc]
    # Such tensors can be no inference tensors, and parameters get theirs only where they are made anew.
    torch.inference_mode = lambda given=True: torch.no_grad()(given) if callable(given) else torch.no_grad()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    save = torch.save
    torch.save = lambda what, *to, **how: save(tree_map(_saved, what), *to, **how)
    pin = Tensor.pin_memory
    Tensor.pin_memory = lambda tensor, *_: pin(tensor) if isinstance(tensor, OnCuda) else tensor
    run = threading.Thread.run

    def with_modes(thread: threading.Thread) -> None:
        with Dispatch(), Functions():
            run(thread)

    threading.Thread.run = with_modes  # type: ignore[method-assign]
    if mode == "compile":
        _compile_kernels()
    Dispatch().__enter__()
    Functions().__enter__()


def _saved(value: Any) -> Any:
    return plain(value) if isinstance(value, OnCuda) else value


def _compile_kernels() -> None:
    """A launch of a Triton kernel compiles it; what none has written is zeros."""
    import triton.testing
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(  # type: ignore[arg-type]
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
            get_active_torch_device=lambda: DEVICE,
        )
    )
    triton.testing.do_bench = triton.testing.do_bench_cudagraph = _timed_by_chance
    launch = JITFunction.run

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not all(0 < size < limit for size, limit in zip(grid, (1 << 31, 1 << 16, 1 << 16), strict=False)):
            raise ValueError(f"{kernel.fn.__qualname__} launched with a grid of {grid}")
        return launch(kernel, *map(_pointer, args), grid=grid, warmup=True, **options)

    JITFunction.run = compiled
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    # Its compilations are written down by threads that torch's modes do not reach.
    os.sched_getaffinity = lambda pid: {0}


def _timed_by_chance(run: Any, **_: object) -> float:
    run()
    return random.random()


def _pointer(value: Any) -> Any:
    if isinstance(value, OnCuda):
        return value.memory
    if isinstance(value, Tensor):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    return value
