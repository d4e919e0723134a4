"""Tensors that say they are on cuda:0, and the rules that their operators are held to."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_map

from tests.fake_cuda.queue import QUEUE, Pinned

__all__ = [
    "DEVICE",
    "Capturing",
    "Dispatch",
    "Functions",
    "Generators",
    "OnCuda",
    "as_they_are",
    "capturing",
    "computed",
    "flat",
    "mapped",
    "memory_of",
    "operator",
    "pinned",
    "plain",
    "reads",
    "refuse_in_capture",
    "tensors_of",
    "where",
]

DEVICE = torch.device("cuda", 0)

_CROSSES = {"aten::_to_copy", "aten::copy_", "aten::lift_fresh"}
"""Operators that may take tensors of two devices."""

_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Whose indices may be on the CPU: they are copied, which waits."""

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount"}
"""Operators for which the host waits."""

_ROOT = str(Path(__file__).parents[2])

_local = threading.local()
"""`on`: whether tensors that an operator makes of nothing are on CUDA; None: as its arguments are."""


class OnCuda(Tensor):
    """A tensor on the device; `memory` holds it. To torch's own code it is one of the CPU."""

    memory: Tensor

    @staticmethod
    def __new__(cls, memory: Tensor) -> OnCuda:
        made: OnCuda = Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device("cpu"),
        )
        return made

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({self.memory!r})"

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def tolist(self) -> Any:
        refuse_in_capture("tolist")
        QUEUE.waits_at(where)
        return plain(self).tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert a cuda:0 tensor to numpy{where()}")

    __array__ = numpy

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _function(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return operator(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Lets torch's functions understand the device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _function(func, args, kwargs or {})


class Dispatching(TorchDispatchMode):
    """Without torch's own wrapper, which imports Dynamo for it: seconds in each process."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Capturing(Dispatching):
    """Of what is captured."""


class Dispatch(Dispatching):
    """The same for operators whose arguments are no tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return operator(func, args, kwargs or {})


class _GeneratorType(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _Generator)


_Generator = torch.Generator


class Generators(metaclass=_GeneratorType):
    """In place of `torch.Generator`: it remembers those that are on CUDA."""

    made: list[torch.Generator] = []  # noqa: RUF012

    def __new__(cls, device: Any = "cpu") -> Any:
        generator = _Generator()
        if torch.device(device).type == "cuda":
            cls.made.append(generator)
        return generator


def plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    with as_they_are():
        return memory_of(tensor).detach().clone()


def memory_of(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.memory if isinstance(value, OnCuda) else value


def flat(value: Any) -> list[Any]:
    return [each for part in value for each in flat(part)] if isinstance(value, list | tuple) else [value]


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """In order. It is asked for at every operator, whose arguments are hardly ever lists in lists."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in flat(value) if isinstance(each, Tensor)]
    return found


def in_memory(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An operator's arguments as the CPU takes them."""
    given = {name: mapped(memory_of, value) for name, value in kwargs.items() if name != "pin_memory"}
    return mapped(memory_of, args), given


def mapped(work: Callable[[Any], Any], value: Any) -> Any:
    """As torch's `tree_map`, which takes longer than the operators that are called here."""
    if type(value) in (list, tuple):
        return type(value)([mapped(work, each) for each in value])
    return tree_map(work, value) if isinstance(value, list | tuple | dict) else work(value)


@contextmanager
def as_they_are() -> Iterator[None]:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def where() -> str:
    """The last line of ours, for messages."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename
        if name.startswith(_ROOT) and "fake_cuda" not in name and "site-packages" not in name:
            return f" ({frame.filename}:{frame.lineno})"
    return ""


def capturing() -> Any:
    """What notes a captured step; None outside of one."""
    return next((m for m in _get_current_dispatch_mode_stack() if isinstance(m, Capturing)), None)


def refuse_in_capture(what: str) -> None:
    if capturing() is not None:
        raise RuntimeError(f"{what} in a captured step{where()}")


def reads(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host waits for this operator of the device's: it is given values, or counts some."""
    name = func.overloadpacket.__name__
    return name in _READS or (
        name.startswith(("index", "_index_put"))
        and len(args) > 1
        and any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in flat(args[1]))
    )


def pinned(tensor: Tensor) -> Tensor:
    """`Tensor.pin_memory`."""
    if isinstance(tensor, OnCuda):
        raise RuntimeError("cannot pin 'torch.cuda' tensors: only dense CPU tensors can be pinned")
    if Pinned.holds(tensor):
        return tensor
    refuse_in_capture("memory is pinned")
    with as_they_are():
        return Pinned.add(tensor.detach().clone())


def _on_cuda(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


def _function(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, first = getattr(func, "__name__", ""), args[0] if args else None
    if name == "__get__":
        here, asked = isinstance(first, OnCuda), func.__self__.__name__
        answers = {"device": DEVICE if here else torch.device("cpu"), "is_cuda": here, "is_cpu": not here}
        if asked in answers:
            return answers[asked]
    if name == "__set__" and func.__self__.__name__ == "data":
        return _becomes(first, args[1])
    if name in ("to", "cpu", "cuda") and isinstance(first, Tensor):
        return _moved(name, first, args[1:], dict(kwargs))
    kwargs = dict(kwargs)
    device, pins = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
    on = None if device is None else _on_cuda(device)
    if pins:
        if on:
            raise RuntimeError("only dense CPU tensors can be pinned")
        return pinned(_function(func, args, kwargs | {"device": "cpu"}))
    if name in ("tensor", "as_tensor", "from_numpy"):
        with as_they_are():
            made = func(*args, **kwargs)
        if on:
            refuse_in_capture(name)
            QUEUE.waits_at(where)
        return OnCuda(made) if on else made
    before, generator = getattr(_local, "on", None), kwargs.get("generator")
    try:
        if on is not None:
            kwargs["device"] = "cpu"
            _local.on = on
        elif any(isinstance(value, OnCuda) for value in tensors_of(args, kwargs)):
            _local.on = True
        if generator is not None:
            of_cuda = any(generator is one for one in Generators.made)
            if of_cuda != bool(getattr(_local, "on", None)):
                raise RuntimeError(f"{name} with a generator of the other device{where()}")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    finally:
        _local.on = before


def _becomes(tensor: Tensor, data: Tensor) -> None:
    """`tensor.data = data`, after which it is where these are; torch would leave it a tensor of the CPU."""
    if isinstance(tensor, OnCuda) or isinstance(data, OnCuda):
        torch.utils.swap_tensors(tensor, torch.nn.Parameter(data, tensor.requires_grad))
    else:
        with torch._C.DisableTorchFunctionSubclass():
            Tensor.data.__set__(tensor, data)  # type: ignore[attr-defined]


def _moved(name: str, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`Tensor.to`, `cpu` and `cuda`."""
    copy = kwargs.pop("copy", False)
    device, dtype = torch.device(name) if name != "to" else None, None
    waits_not = kwargs.get("non_blocking", False)
    if name == "to" and args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    elif name == "to":
        device, dtype, waits_not, _ = torch._C._nn._parse_to(*args, **kwargs)
    here = isinstance(tensor, OnCuda)
    if device is None or (device.type == "cuda") == here:
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copy)
    refuse_in_capture(f"a copy to {device.type}")
    found = plain(tensor)
    with as_they_are():
        _cross(found, tensor, waits_not)
        found = found.to(dtype or found.dtype)
        return found if here else OnCuda(found)


def _cross(target: Tensor, source: Tensor, waits_not: bool) -> None:
    """A copy between host and device."""
    if not waits_not:
        QUEUE.waits_at(where)
        memory_of(target).copy_(memory_of(source))
        return
    host = target if isinstance(source, OnCuda) else source
    if not Pinned.holds(host):
        raise RuntimeError(f"a copy that is not waited for needs pinned memory{where()}")
    if isinstance(source, OnCuda):
        QUEUE.copy_to_host(target, source.memory)
    else:
        QUEUE.copy_to_device(memory_of(target), source, where())


def operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = tensors_of(args, kwargs)
    here = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    there = [tensor for tensor in tensors if not isinstance(tensor, OnCuda)]
    _hold_to_one_device(func, args, here, there)
    memory, given = in_memory(args, kwargs)
    on = getattr(_local, "on", None)
    target = bool(here) if here or there or on is None else on
    if here and name == "aten::_int_mm" and args[0].shape[0] <= 16:
        raise RuntimeError("self.size(0) needs to be greater than 16")
    if name == "aten::copy_":
        with as_they_are():
            if isinstance(args[0], OnCuda) != isinstance(args[1], OnCuda) and args[1].dim():
                _cross(args[0], args[1], bool(args[2]) if len(args) > 2 else given.get("non_blocking", False))
            else:
                func(*memory, **given)
        return args[0]
    if here and (reads(func, args) or (name in _INDEXES and _of_the_host(args[1]))):
        QUEUE.waits_at(where)
    with torch._C.DisableTorchFunction():
        out = computed(func, memory, given) if here else func(*memory, **given)
    known = {id(tensor.memory): tensor for tensor in here}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnCuda) or any(value is one for one in there):
            return value
        if id(value) in known:
            return known[id(value)]
        return OnCuda(value) if target else value

    return mapped(wrapped, out)


def _of_the_host(indices: Any) -> bool:
    return any(isinstance(one, Tensor) and not isinstance(one, OnCuda) for one in flat(indices))


def _hold_to_one_device(func: Any, args: tuple[Any, ...], here: list[Any], there: list[Tensor]) -> None:
    """Tensors without a dimension go with any other."""
    name, strangers = func._schema.name, [tensor for tensor in there if tensor.dim()]
    if not here or not strangers or name in _CROSSES:
        return
    values = args[2:3] if name != "aten::index" else ()
    own = (args[0], *values)
    if name in _INDEXES and all(isinstance(one, OnCuda) or not one.dim() for one in own):
        return
    shapes = [(type(tensor).__name__, tuple(tensor.shape)) for tensor in (*here, *there)]
    raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}{where()}")


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator of the device, on its memory."""
    return _scaled_mm(*args, **kwargs) if func._schema.name == "aten::_scaled_mm" else func(*args, **kwargs)


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """CUDA's with a scale for each row, which the CPU does not have, and what it asks for."""
    right = a.dtype == b.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16
    right = right and a.is_contiguous() and b.t().is_contiguous() and scale_a.is_contiguous()
    right = right and not a.shape[1] % 16 and not b.shape[1] % 16 and scale_b.t().is_contiguous()
    right = right and scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
    if not right or (bias is not None and bias.dtype != torch.bfloat16):
        raise RuntimeError(f"no such product in 8 bits: {a.shape} {b.shape}{where()}")
    y = (a.float() @ b.float()) * scale_a * scale_b
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)
