"""Graphs: the operators and launches of a captured step, to be repeated on the same memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.fake_cuda import tensors as device
from tests.fake_cuda.queue import QUEUE, garbage_
from tests.fake_cuda.tensors import Capturing, OnCuda, capturing

__all__ = ["CUDAGraph", "Graph", "Recorder"]

_HELD: Counter[int] = Counter()
"""By the address of a storage: tensors of graphs in it that they have not made."""


class Recorder(Capturing):
    """Notes what is done in a captured step, and does it again.

    What the step has made and nobody holds any more is garbage once it has been replayed: on CUDA the next
    graph of the pool gets its memory. And what it has not made has to be held by somebody still.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], list[Any], dict[str, Any], list[Any]]] = []
        self._made: dict[int, tuple[Tensor, list[weakref.ref[Tensor]]]] = {}
        self._outside: Counter[int] = Counter()
        self._gone: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = device.tensors_of(args, kwargs)
        here = any(isinstance(value, OnCuda) for value in tensors)
        there = any(not isinstance(value, OnCuda) and value.dim() for value in tensors)
        if here and (there or device.reads(func, args)):
            raise RuntimeError(f"{func} waits for the device in a captured step{device.where()}")
        with _disable_current_modes():
            out = device.operator(func, args, kwargs)

        def again(*args: Any, **kwargs: Any) -> Any:
            return device.computed(func, args, kwargs)

        self._note(again, args, kwargs, device.flat(out))
        return out

    def launched(self, run: Callable[..., None], args: Sequence[Any]) -> None:
        """A kernel with these arguments."""
        self._note(run, args, {}, [])

    def replay(self) -> None:
        with device.as_they_are():
            for storage in self._outside:
                # The storage itself counts as one, since Python has seen it.
                if torch._C._storage_Use_Count(storage) <= 1 + _HELD[storage]:
                    raise RuntimeError("a tensor that the graph uses is gone")
            for run, args, kwargs, out in self._calls:
                found = run(*args, **kwargs)
                for kept, new in zip(out, device.flat(found), strict=True) if out else ():
                    if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)
            self._let_go()
        QUEUE.tell()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        _HELD.update(self._outside)
        weakref.finalize(self, _HELD.subtract, self._outside)

    def _note(
        self, run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], out: list[Any]
    ) -> None:
        given = device.mapped(self._kept, list(args))
        named = {name: device.mapped(self._kept, value) for name, value in kwargs.items()}
        named.pop("pin_memory", None)
        made: list[Any] = []
        for value in out:
            if not isinstance(value, OnCuda):
                made.append(value)
                continue
            storage = value.memory.untyped_storage()._cdata
            if storage in self._outside:  # written in place, or a view
                made.append(None)
                continue
            self._made.setdefault(storage, (value.memory, []))[1].append(weakref.ref(value))
            made.append(value.memory)
        self._calls.append((run, given, named, made))

    def _kept(self, value: Any) -> Any:
        """An argument. What it holds changes, where it holds it does not."""
        if not isinstance(value, OnCuda):
            return device.memory_of(value)
        storage = value.memory.untyped_storage()._cdata
        if storage in self._made:
            return value.memory
        self._outside[storage] += 1
        with device.as_they_are():
            return value.memory.detach()  # another tensor, so that the storage's are told apart

    def _let_go(self) -> None:
        for storage, (memory, holders) in list(self._made.items()):
            if all(holder() is None for holder in holders):
                del self._made[storage]
                self._gone.append(memory.new_empty(0).set_(memory.untyped_storage()))
        for memory in self._gone:
            garbage_(memory)


class CUDAGraph:
    """What was recorded."""

    recorder: Recorder

    def replay(self) -> None:
        if capturing() is not None:
            raise RuntimeError("a graph is replayed in a captured step")
        self.recorder.replay()


class Graph:
    """`torch.cuda.graph`."""

    def __init__(
        self, graph: CUDAGraph, pool: object = None, stream: object = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        QUEUE.wait()  # as torch does
        self._graph.recorder = Recorder()
        self._graph.recorder.__enter__()

    def __exit__(self, *error: object) -> None:
        self._graph.recorder.__exit__(*error)
