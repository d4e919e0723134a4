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
        self._recorded = _Recorder()

    def capture(self, run: Callable[[], None]) -> None:
        run()  # as on CUDA, where the first run fills caches
        self._recorded = _Recorder()
        with _NoHostAccess(), self._recorded:
            run()

    def replay(self) -> None:
        tensors: list[Any] = [None] * self._recorded.count
        for number, outside in self._recorded.outside:
            tensors[number] = found = outside()
            if found is None:
                raise RuntimeError("a tensor that the graph uses is gone")
        for number, view in self._recorded.views:
            tensors[number] = view
        for call in self._recorded.calls:
            args, options = call.args.copy(), call.options
            for place, which in call.places:
                args[place] = tensors[which] if type(which) is int else _value(which, tensors)
            if call.named:
                options = options | {name: _value(which, tensors) for name, which in call.named}
            out = call.operator(*args, **options)
            if isinstance(call.made, int):
                tensors[call.made] = out
            elif call.made != [None]:  # one that is written in place
                for made, result in zip(call.made, _flat(out), strict=True):
                    if made is not None:
                        tensors[made] = result


@dataclass(frozen=True, slots=True)
class _Number:
    """A tensor of the recording, in the list that an operator takes."""

    number: int


@dataclass(frozen=True, slots=True)
class _Call:
    """An operator's call.

    Args:
        args: None where a tensor or a list of them belongs, which `places` has; so `options` and `named`.
        places: (index, number of a tensor, or a list in which each is a `_Number`).
        made: the number of the tensor that it makes, or of each result, which is None if written in place.
    """

    operator: Callable[..., Any]
    args: list[Any]
    places: list[tuple[int, Any]]
    options: dict[str, Any]
    named: list[tuple[str, Any]]
    made: int | list[int | None]


def _value(which: Any, tensors: list[Any]) -> Any:
    if isinstance(which, list):
        return [tensors[each.number] if isinstance(each, _Number) else each for each in which]
    return tensors[which]


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
    """Notes the operators that run while it is entered.

    Attributes:
        calls: in their order, but for those that make `views`.
        outside: tensors that were there before, by number.
        views: of these, by number: they lie where they lay at each replay.
        count: so many tensors have numbers.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.outside: list[tuple[int, weakref.ref[Tensor]]] = []
        self.views: list[tuple[int, Tensor]] = []
        self.count = 0
        self._numbers: dict[int, int] = {}  # by a tensor's id
        self._unmoved: set[int] = set()  # the numbers of `outside` and `views`
        self._alive: list[Tensor] = []  # so that no two tensors made in the recording have one id

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._alive.clear()

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
        noted = [self._note(value) for value in args]
        named = {key: self._note(value) for key, value in kwargs.items()}
        out = func(*args, **kwargs)
        if func.is_view and _is_all_of(args[0], out):
            self._numbers[id(out)] = self._numbers[id(args[0])]
            self._alive.append(out)
            return out
        if func.is_view and self._lie_there(args[0], out):
            # Once more, since the first may keep what it is a view of.
            for number, view in zip(self._made(out), _flat(func(*args, **kwargs)), strict=True):
                if number is not None:
                    self.views.append((number, view))
                    self._unmoved.add(number)
            return out
        numbers = self._made(out)
        self.calls.append(
            _Call(
                func,
                args=[None if tensors else value for value, tensors in noted],
                places=[(place, value) for place, (value, tensors) in enumerate(noted) if tensors],
                options={name: value for name, (value, tensors) in named.items() if not tensors},
                named=[(name, value) for name, (value, tensors) in named.items() if tensors],
                made=numbers[0] if isinstance(out, Tensor) and numbers[0] is not None else numbers,
            )
        )
        return out

    def _lie_there(self, source: Tensor, out: Any) -> bool:
        """Whether the results are views of what was there before; `to`, which counts as one, may copy."""
        memory = source.untyped_storage().data_ptr()
        views = all(result.untyped_storage().data_ptr() == memory for result in _flat(out))
        return views and self._numbers[id(source)] in self._unmoved

    def _note(self, value: Any) -> tuple[Any, bool]:
        """A tensor's number, or a list with those of some; whether it is either."""
        if isinstance(value, Tensor):
            number = self._numbers.get(id(value))
            if number is None:
                number = self._number(value)
                self.outside.append((number, weakref.ref(value)))
                self._unmoved.add(number)
            return number, True
        if isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value):
            return [_Number(self._note(x)[0]) if isinstance(x, Tensor) else x for x in value], True
        return value, False

    def _made(self, out: Any) -> list[int | None]:
        """The number of each result, which is None if it was written in place or is no tensor."""
        numbers: list[int | None] = []
        for result in _flat(out):
            new = isinstance(result, Tensor) and id(result) not in self._numbers
            numbers.append(self._number(result) if new else None)
            if new:
                self._alive.append(result)
        return numbers

    def _number(self, tensor: Tensor) -> int:
        self._numbers[id(tensor)] = number = self.count
        self.count += 1
        return number


def _is_all_of(source: Tensor, out: Any) -> bool:
    """Whether a view is what it is a view of."""
    return (
        isinstance(out, Tensor)
        and out.dtype == source.dtype
        and out.shape == source.shape
        and out.stride() == source.stride()
        and out.data_ptr() == source.data_ptr()
    )
