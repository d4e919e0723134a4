"""Compiled kernels for the CPU, on the very threads that torch's operators run on.

torch's operators run on a team of OpenMP threads that spin for a while when an operator is done. A second
pool, numba's own or Python threads, would share the cores with those that spin, and both would be slowed
down many times over. So a kernel goes to the same team, through `GOMP_parallel` of the library that torch
has loaded (GCC's libgomp; LLVM's and Intel's libomp have it too). Its threads take the numbers of tasks
from a counter until there are none left.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, Self

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, config, njit, types
from numba.extending import intrinsic

from engine.model.embedded import cache_root

__all__ = [
    "JIT",
    "SUMS",
    "Arguments",
    "Team",
    "bytes_",
    "compiles_for",
    "exp2",
    "floats",
    "integers",
    "multiply_add",
    "task_kernel",
    "words",
]


def _sources() -> str:
    """A hash of the files that kernels are in: numba looks at a kernel's own, and not at those it calls."""
    texts = (path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    return hashlib.sha256(b"".join(text for text in texts if b"numba" in text)).hexdigest()[:16]


def _compiled_are_kept() -> bool:
    """Name the folder of the compiled kernels to numba, unless it has one; False where none can be had."""
    folder = cache_root() / "numba" / _sources()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    os.environ.setdefault("NUMBA_CACHE_DIR", str(folder))
    config.reload_config()
    return os.access(folder, os.W_OK)


_KEEP = _compiled_are_kept()

JIT: dict[str, Any] = {"nogil": True, "cache": _KEEP, "error_model": "numpy"}
"""What kernels are compiled with: each number is rounded as it is written down."""

SUMS: dict[str, Any] = {**JIT, "fastmath": {"reassoc", "contract", "nsz"}}
"""What a function is compiled with that adds up numbers, in any order, and stores none.

A loop that stores is compiled twice, with vectors and without, and where its arrays lie in memory decides
which of the two runs. If their numbers may be rounded in other ways, they are, in each of the two in its own,
and a row's last bits depend on what else the process has allocated. So what is stored is computed under
`JIT`, where a product and a sum that shall be rounded once are `multiply_add`. NaN stays NaN.
"""

# ln(2)^k / k! from k = 6 down to 0, the first two fitted.
_EXP2 = tuple(
    np.float32(c)
    for c in (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
)

_COUNTER, _TASKS = 0, 1

SIZE = 40
"""Entries of a kernel's arguments, int64; the first two are the team's."""


class Arguments(np.ndarray):
    """[SIZE] int64 zeros whose address is known: to ask for it takes 0.8 µs, as long as to start a kernel."""

    address: int

    def __new__(cls) -> Self:
        found = np.zeros(SIZE, dtype=np.int64).view(cls)
        found.address = found.ctypes.data
        return found


@intrinsic
def _next_task(_typing: Any, _arguments: Any) -> Any:
    """Add one to the int64 at this address in one indivisible operation; returns what was there."""

    def code(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        integer = ir.IntType(64)
        return builder.atomic_rmw("add", values[0], integer(1), "monotonic")

    return types.int64(types.CPointer(types.int64)), code


def _pointer_to(kind: Any) -> Any:
    """From an address to a pointer to numbers of this kind."""

    @intrinsic
    def pointer(_typing: Any, _address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), code

    return pointer


_float_pointer, _integer_pointer = _pointer_to(types.float32), _pointer_to(types.int64)
_word_pointer, _byte_pointer = _pointer_to(types.int32), _pointer_to(types.int8)


@intrinsic
def multiply_add(_typing: Any, _x: Any, _y: Any, _z: Any) -> Any:
    """x * y + z in float32, rounded once; for use in kernels."""

    def code(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.fma(*values)

    return types.float32(types.float32, types.float32, types.float32), code


@njit(**JIT)
def exp2(f: Any) -> Any:
    """2^f in float32 for f on [-0.5, 0.5], to 2e-7; for use in kernels."""
    c6, c5, c4, c3, c2, c1, c0 = _EXP2
    power = multiply_add(c6, f, c5)
    power = multiply_add(power, f, c4)
    power = multiply_add(power, f, c3)
    power = multiply_add(power, f, c2)
    power = multiply_add(power, f, c1)
    return multiply_add(power, f, c0)


@njit(**JIT)
def floats(address: int, shape: Any) -> Any:
    """The float32 array of this shape (a tuple), C-contiguous, at an address; for use in kernels."""
    return carray(_float_pointer(address), shape)


@njit(**JIT)
def integers(address: int, shape: Any) -> Any:
    """`floats` of int64."""
    return carray(_integer_pointer(address), shape)


@njit(**JIT)
def words(address: int, shape: Any) -> Any:
    """`floats` of int32."""
    return carray(_word_pointer(address), shape)


@njit(**JIT)
def bytes_(address: int, shape: Any) -> Any:
    """`floats` of int8."""
    return carray(_byte_pointer(address), shape)


def _all_tasks(pointer: Any) -> None:
    """The body of a kernel; `_task` is a global that `task_kernel` gives it."""
    arguments = carray(pointer, (SIZE,))
    number = _next_task(pointer)
    while number < arguments[_TASKS]:
        _task(arguments, number)  # type: ignore[name-defined]  # noqa: F821
        number = _next_task(pointer)


def task_kernel(task: Callable[..., None]) -> Any:
    """A kernel for `Team.run` from a compiled function of (arguments [SIZE] int64, number of the task).

    Tasks run in any order and at the same time; memory that two of them write to is a mistake.
    """
    python: Any = task.py_func  # type: ignore[attr-defined]
    # numba finds a compiled function again by its file, name, line and closure. A compiled function in a
    # closure counts as new in every process, so it is a global, and the rest is the task's own.
    code = _all_tasks.__code__.replace(
        co_filename=python.__code__.co_filename, co_firstlineno=python.__code__.co_firstlineno
    )
    body = FunctionType(code, {**globals(), "_task": task}, f"{python.__name__}_all")
    body.__module__ = python.__module__
    signature = types.void(types.CPointer(types.int64))
    return cfunc(signature, cache=_KEEP, error_model="numpy")(body)


def compiles_for(feature: str) -> bool:
    """Whether kernels may use these instructions, by LLVM's name: this CPU has them, and numba was not told
    to compile for another one."""
    if config.CPU_NAME is not None or config.CPU_FEATURES is not None or not config.ENABLE_AVX:
        return False
    return bool(binding.get_host_cpu_features().get(feature, False))


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp() -> ctypes.CDLL | None:
    """The library with torch's own OpenMP in it: torch loads it with global names."""
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # Windows has no such thing
        return None
    return library if hasattr(library, "GOMP_parallel") else None


_OPENMP = _openmp()


class Team:
    """Runs kernels on torch's threads, `torch.get_num_threads()` of them.

    Args:
        library: with `GOMP_parallel` in it; None runs all on the calling thread.
    """

    def __init__(self, library: ctypes.CDLL | None = _OPENMP) -> None:
        self._start: Any = None
        self._alone: dict[int, Any] = {}
        if library is not None:
            self._start = library.GOMP_parallel
            self._start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            self._start.restype = None

    @property
    def parallel(self) -> bool:
        """More than one thread can be had."""
        return self._start is not None

    def run(self, kernel: Any, arguments: Arguments, tasks: int) -> None:
        """Run tasks 0 .. tasks - 1 and wait for them.

        Args:
            kernel: what `task_kernel` made.
            arguments: the first two entries are overwritten.
        """
        arguments[_COUNTER], arguments[_TASKS] = 0, tasks
        threads = min(torch.get_num_threads(), tasks)
        if self._start is None or threads == 1:
            body = self._alone.get(kernel.address)
            if body is None:
                body = self._alone[kernel.address] = _BODY(kernel.address)
            body(arguments.address)
        else:
            self._start(kernel.address, arguments.address, threads, 0)
