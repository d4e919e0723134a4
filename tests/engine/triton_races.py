"""What kernels that begin early read before they wait, held against who wrote it, on Triton's interpreter.

A kernel that is launched early may run beside those in front of it (`engine.triton_dependent` has the rule).
The interpreter runs one program after another, so nothing would show; here each byte that a program reads
before it waits is looked for in what might then still be written.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.language.extra import cuda
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from engine import triton_dependent

__all__ = ["Races"]

_PRODUCTS = ("linear", "mm", "addmm", "_scaled_mm", "_int_mm")


@dataclass
class _Kernel:
    """A kernel, and how its programs went.

    Args:
        early: it may begin before the one in front has ended.
        writes: where, (first, end) of bytes.
        reads: addresses that were read before the program had waited.
        parts: all before it had ended when it let the next one begin.
    """

    name: str
    early: bool
    writes: list[tuple[int, int]] = field(default_factory=list)
    reads: list[NDArray[np.uint64]] = field(default_factory=list)
    parts: bool = False


class Races(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, kernels are launched early where they may be.

    Args:
        operators: all of torch's run on the device, as kernels that are launched as usual. Without, only
            products are sure to, since others may be the host's own: they write, but part nobody.

    Attributes:
        found: what was wrong, in words, and how often.
        early: which arguments each kernel that begins early read before it waited, by its name.
    """

    def __init__(self, *, operators: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.early: dict[str, set[str]] = {}
        self._operators, self._patches = operators, pytest.MonkeyPatch()
        self._behind: list[_Kernel] = []  # the last one that parts, and those behind it
        self._kernel: _Kernel | None = None
        self._waited = self._let = False

    def __enter__(self) -> Self:
        self._patch(self._patches)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._patches.undo()

    def _patch(self, patches: pytest.MonkeyPatch) -> None:
        def launched_early(device: torch.device) -> tuple[bool, dict[str, Any]]:
            return True, {}

        stand_ins = {
            cuda.gdc_wait: self._waits,
            cuda.gdc_launch_dependents: self._launches_next,
            triton_dependent.prefetches: lambda pointer, wanted: None,
            triton_dependent.launched_early: launched_early,
        }
        for module in [module for name, module in sys.modules.items() if name.startswith("engine")]:
            for name, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in stand_ins:
                    patches.setattr(module, name, stand_ins[value])
        run, place = InterpretedFunction.run, interpreter_builder.set_grid_idx

        def noted_run(function: Any, *args: Any, **options: Any) -> Any:
            return self._run(run, function, *args, **options)

        def noted_place(x: int, y: int, z: int) -> None:
            self._waited = self._let = False
            place(x, y, z)

        patches.setattr(InterpretedFunction, "run", noted_run)
        patches.setattr(interpreter_builder, "set_grid_idx", noted_place)
        for name, mask_at, writes in (
            ("create_masked_load", 1, False),
            ("create_masked_store", 2, True),
            ("create_atomic_rmw", 3, True),
        ):
            real = getattr(interpreter_builder, name)
            pointers_at = 1 if name == "create_atomic_rmw" else 0
            patches.setattr(interpreter_builder, name, self._noted(real, pointers_at, mask_at, writes))

    def _noted(self, real: Any, pointers_at: int, mask_at: int, writes: bool) -> Any:
        def access(*args: Any) -> Any:
            pointers, mask = args[pointers_at], args[mask_at].data.astype(bool)
            addresses = np.broadcast_to(pointers.data, mask.shape)[mask].astype(np.uint64)
            if self._kernel is not None and addresses.size:
                self._access(addresses, pointers.get_element_ty().primitive_bitwidth // 8, writes)
            return real(*args)

        return access

    def _access(self, addresses: NDArray[np.uint64], size: int, writes: bool) -> None:
        kernel = self._kernel
        assert kernel is not None
        before = kernel.early and not self._waited
        if writes:
            kernel.writes.append((int(addresses.min()), int(addresses.max()) + size))
            if before:
                self.found[f"{kernel.name} writes before it waits"] += 1
        elif before:
            kernel.reads.append(np.unique(addresses))

    def _waits(self) -> None:
        assert self._kernel is not None
        self._waited = True
        self._kernel.parts = self._kernel.parts or not self._let

    def _launches_next(self) -> None:
        self._let = True

    def _run(self, run: Any, function: Any, *args: Any, **options: Any) -> Any:
        early = bool(options.get("EARLY", False))
        self._kernel = kernel = _Kernel(function.__name__, early, parts=not early)
        try:
            return run(function, *args, **options)
        finally:
            self._kernel = None
            if early:
                self._check(kernel, dict(zip(function.arg_names, args, strict=False)))
            self._append(kernel)

    def _check(self, kernel: _Kernel, arguments: dict[str, Any]) -> None:
        if not kernel.parts:
            self.found[f"no program of {kernel.name} waits first"] += 1
        reads = np.unique(np.concatenate(kernel.reads)) if kernel.reads else np.zeros(0, dtype=np.uint64)
        tensors = {name: _bytes(x) for name, x in arguments.items() if isinstance(x, Tensor) and x.numel()}
        read = {name for name, (first, end) in tensors.items() if _within(reads, first, end).size}
        self.early[kernel.name] = self.early.get(kernel.name, set()) | read
        for other in self._behind:
            for first, end in other.writes:
                raced = _within(reads, first, end)
                if raced.size:
                    names = {n for n, place in tensors.items() if _within(raced, *place).size}
                    self.found[f"{kernel.name} reads {sorted(names)} early, behind {other.name}"] += 1

    def _append(self, kernel: _Kernel) -> None:
        self._behind = [kernel] if kernel.parts else [*self._behind, kernel]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self._kernel is None and not func.is_view and "empty" not in name:
            written = [x for x in tree_flatten(found)[0] if isinstance(x, Tensor)]
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written += [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]
            kernel = _Kernel(name, early=False, parts=self._operators or name in _PRODUCTS)
            kernel.writes = [_bytes(x) for x in written if x.numel()]
            if kernel.writes:
                self._append(kernel)
        return found


def _bytes(x: Tensor) -> tuple[int, int]:
    """Where a tensor lies."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


def _within(addresses: NDArray[np.uint64], first: int, end: int) -> NDArray[np.uint64]:
    """Those of rising addresses that lie there."""
    return addresses[np.searchsorted(addresses, first) : np.searchsorted(addresses, end)]
