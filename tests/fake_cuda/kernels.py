"""Triton on the device: its kernels are compiled where they are launched, or run by its interpreter."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.fake_cuda.tensors import DEVICE, OnCuda, as_they_are, capturing

__all__ = ["stand_in_for_triton"]

_MOST_PROGRAMS = (1 << 31, 1 << 16, 1 << 16)


def stand_in_for_triton(*, interpreted: bool) -> None:
    """Compiled, a kernel writes nothing; what none has written is zeros, and steps are sound."""
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported
    import triton.testing
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.interpreter import InterpretedFunction
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
    # The interpreter runs one kernel at a time, and compilations are written down by threads that torch's
    # modes do not reach.
    os.sched_getaffinity = lambda pid: {0}
    if interpreted:
        from tests.interpreter import quicken

        quicken()
        InterpretedFunction.run = _launch(InterpretedFunction.run, _run)
    else:
        torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
        JITFunction.run = _launch(JITFunction.run, _compile)


def _launch(run: Any, work: Callable[..., Callable[..., None] | None]) -> Any:
    """`work(run, kernel, args, options)` is done at each launch; what it returns, at a graph's replays."""

    def launched(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not all(0 < size < limit for size, limit in zip(grid, _MOST_PROGRAMS, strict=False)):
            raise ValueError(f"{kernel.fn.__qualname__} launched with a grid of {grid}")
        if any(isinstance(value, Tensor) and not isinstance(value, OnCuda) for value in args):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        if not warmup and (again := work(run, kernel, args, {"grid": grid, **options})) is not None:
            if (recorder := capturing()) is not None:
                recorder.launched(again, args)  # and not run, as on CUDA
            else:
                again(*_pointers(args))

    return launched


def _pointers(args: Any) -> list[Any]:
    return [value.memory if isinstance(value, OnCuda) else value for value in args]


def _run(run: Any, kernel: Any, args: Any, options: dict[str, Any]) -> Callable[..., None]:
    def again(*args: Any) -> None:
        with as_they_are():
            run(kernel, *args, warmup=False, **options)

    return again


def _compile(run: Any, kernel: Any, args: Any, options: dict[str, Any]) -> Callable[..., None] | None:
    run(kernel, *_pointers(args), warmup=True, **options)
    return _STAND_INS.get(kernel.fn.__name__)


def _accepted(*args: Any) -> None:
    """A step accepts its roots, is sound, and draws token 0."""
    packed = args[11]
    with as_they_are():
        packed.fill_(0)
        packed[:, 0] = 1


_STAND_INS: dict[str, Callable[..., None]] = {"_accept_kernel": _accepted}


def _timed_by_chance(run: Any, **_: object) -> float:
    run()
    return random.random()
