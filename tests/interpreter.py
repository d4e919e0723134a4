"""Triton's interpreter, without half of its work: what it does anew at every call, and checks of overflow."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

__all__ = ["quicken"]


def quicken() -> None:
    """Have device functions called and blocks made sooner, and sums of integers not checked for overflow.

    At each call of a device function the interpreter looks through all of Triton's language for what to
    replace. The launch has done so already; what a function sees beside it is replaced at its first call and
    stays. A Triton that is built otherwise keeps its own way.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "interpreter_builder")):
        return
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, seen = interpreter._patch_lang, set[Any]()

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn not in seen:
            patch(self.fn)
            seen.add(self.fn)
        try:
            return self.rewrite()(*args, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    _remember_shapes(interpreter)
    _know_what_is_alike()
    _call_builtins_at_once(interpreter)


def _remember_shapes(interpreter: Any) -> None:
    """Work out once what all blocks of a type and shape have in common, and the numpy type of each type.

    Every operator makes a block or two, of which a kernel has few kinds; this was a third of its time.
    """
    from triton.language import core

    if not hasattr(interpreter, "_get_np_dtype"):
        return
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    np_type = interpreter._get_np_dtype
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, dict[str, Any]] = {}
    np_types: dict[Any, Any] = {}

    def type_init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        key = element_ty.name, sizes
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = {**self.__dict__, "sizes": sizes}
        self.__dict__.update(types[key], element_ty=element_ty)

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        key = getattr(type, "sizes", ())
        if key not in tensors:
            make_tensor(self, handle, type)
            own = ("handle", "type", "dtype")
            tensors[key] = {name: value for name, value in self.__dict__.items() if name not in own}
        self.__dict__.update(tensors[key], handle=handle, type=type, dtype=type.scalar)

    def np_dtype(of: Any) -> Any:
        key = isinstance(of, core.block_type), of.scalar.name
        if key not in np_types:
            np_types[key] = np_type(of)
        return np_types[key]

    core.block_type.__init__, core.tensor.__init__ = type_init, tensor_init
    interpreter._get_np_dtype = np_dtype


def _know_what_is_alike() -> None:
    """Return at once what has the type, or both of what has the shape, that it shall be given.

    Shapes are compared as constants of a kernel are, which takes longer than to add what has them.
    """
    from triton.language import core, semantic

    of = semantic.TritonSemantic
    same, cast, broadcast = core.dtype.__eq__, of.cast, of.broadcast_impl_value

    def equal(self: Any, other: Any) -> Any:
        return self is other or same(self, other)

    def cast_unless(self: Any, value: Any, wanted: Any, *rest: Any, **options: Any) -> Any:
        alike = value.type.scalar is wanted.scalar
        return value if alike else cast(self, value, wanted, *rest, **options)

    def broadcast_unless(self: Any, left: Any, right: Any) -> Any:
        alike = getattr(left.type, "sizes", ()) == getattr(right.type, "sizes", ())
        return (left, right) if alike else broadcast(self, left, right)

    core.dtype.__eq__, of.cast, of.broadcast_impl_value = equal, cast_unless, broadcast_unless


def _call_builtins_at_once(interpreter: Any) -> None:
    """Leave out the two functions between a kernel's operator and what it does, which only hand it on."""
    from triton.language import core

    if not hasattr(interpreter, "_patch_attr"):
        return
    handing_on = core.builtin(lambda: None).__code__

    def patch(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        work, meaning = member, interpreter.interpreter_semantic
        if getattr(member, "__code__", None) is handing_on:
            work = member.__wrapped__

        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = meaning
            return work(*args, **options)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch


def multiply_bfloat16(patches: Any) -> None:
    """Have products of bfloat16 summed in float32: the interpreter multiplies their bits as integers.

    Args:
        patches: pytest's, which undo it.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy as np
    from triton.runtime import interpreter

    builder, of = interpreter.interpreter_builder, interpreter.interpreter_builder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar.name != "bf16":
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def create_dot(a: Any, b: Any, *rest: Any) -> Any:
        return of(wide(a), wide(b), *rest)

    patches.setattr(builder, "create_dot", create_dot)
