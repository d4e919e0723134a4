"""Work recorded once and repeated on the same memory: CUDA's graphs, and a stand-in that holds code to their
rules on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CudaGraph", "Graph", "RecordedGraph", "cuda_graphs"]


class Graph(Protocol):
    """Work recorded once and repeated on the same memory."""

    def capture(self, run: Callable[[], None]) -> None:
        """Record `run`, which may be run once or twice meanwhile."""

    def replay(self) -> None:
        """Do it again."""


class CudaGraph:
    """A graph on the device.

    Args:
        pool: memory (`torch.cuda.graph_pool_handle()`) that graphs share which never run at the same time.
        stream: on which to capture; graphs that share memory share this too.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph, self._pool, self._stream = torch.cuda.CUDAGraph(), pool, stream

    def capture(self, run: Callable[[], None]) -> None:
        """See `Graph.capture`. The first run loads kernels and makes workspaces, which a capture must not."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        # The event loop and the metrics run in other threads: what they do is no concern of the capture.
        with torch.cuda.graph(
            self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()

    def replay(self) -> None:
        self._graph.replay()


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """Makes graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return lambda: CudaGraph(pool, stream)


class RecordedGraph:
    """A graph for any device, which holds code to the rules of CUDA graphs; for tests.

    `capture` runs the code once and notes every operator with its arguments; `replay` runs the operators
    again, not the code, so what the code would decide anew stays decided, as on CUDA. Tensors made inside
    are made anew. One from outside is the same memory at each replay, and has to be there still: it is not
    kept alive.

    Raises:
        RuntimeError: on capture, the code reads a tensor from the host, makes one of the host's values, or
            has a shape that depends on values; on replay, a tensor it used is gone.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []

    def capture(self, run: Callable[[], None]) -> None:
        run()  # as on CUDA, where the first run fills caches
        recorder = _Recorder()
        with _NoHostAccess(), recorder:
            run()
        self._calls = recorder.calls

    def replay(self) -> None:
        made: dict[int, Tensor] = {}
        for call in self._calls:
            args = [_value(value, made) if type(value) in _NOTED else value for value in call.args]
            kwargs = {name: _value(value, made) for name, value in call.kwargs.items()}
            for key, result in zip(call.results, _flat(call.operator(*args, **kwargs)), strict=True):
                if key is not None:
                    made[key] = result


@dataclass(frozen=True, slots=True)
class _Made:
    """The tensor that an earlier call of the recording has made."""

    key: int


@dataclass(frozen=True, slots=True)
class _Call:
    operator: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int | None]


_NOTED = {_Made, list, weakref.ref}
"""Types of noted arguments; all others are as they were. To look is sooner than to call."""


def _value(argument: Any, made: dict[int, Tensor]) -> Any:
    """An operator's argument; lists of them are all there is beside tensors and plain values."""
    if isinstance(argument, _Made):
        return made[argument.key]
    if isinstance(argument, list):
        return [_value(each, made) for each in argument]
    if isinstance(argument, weakref.ref):
        found = argument()
        if found is None:
            raise RuntimeError("a tensor that the graph uses is gone")
        return found
    return argument


def _flat(out: Any) -> list[Any]:
    """An operator's results or arguments: one, or several, lists among them."""
    return [each for result in out for each in _flat(result)] if isinstance(out, tuple | list) else [out]


_HOST_ACCESS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "tensor",
    "as_tensor",
    "from_numpy",
}
"""Functions of torch that copy between host and device."""

_HOST_READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "bincount",
    "lift_fresh",
}
"""Operators that copy, or whose result's shape depends on values."""


class _NoHostAccess(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _HOST_ACCESS:
            raise RuntimeError(f"{func.__name__} in a captured step")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self._made: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no two tensors of the recording have one id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) for value in _flat(args[1])
        )
        if name in _HOST_READS or masked:
            raise RuntimeError(f"{func} in a captured step")
        kwargs = kwargs or {}
        noted_args = tuple([self._note(value) for value in args])
        noted_kwargs = {key: self._note(value) for key, value in kwargs.items()}
        given = {id(value) for value in _flat((args, [*kwargs.values()])) if isinstance(value, Tensor)}
        out = func(*args, **kwargs)
        results: list[int | None] = []
        for result in _flat(out):
            if not isinstance(result, Tensor) or (id(result) in given and id(result) not in self._made):
                results.append(None)  # written in place
                continue
            results.append(self._made.setdefault(id(result), len(self._made)))
            self._alive.append(result)
        self.calls.append(_Call(func, noted_args, noted_kwargs, results))
        return out

    def _note(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._note(each) for each in value]
        if not isinstance(value, Tensor):
            return value
        return _Made(self._made[id(value)]) if id(value) in self._made else weakref.ref(value)
