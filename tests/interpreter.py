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
    from triton.language import semantic

    known = hasattr(semantic.TritonSemantic, "to_tensor_type")  # not in Triton 3.6
    _call_builtins_at_once(interpreter, _OPERATORS if known else {})
    if known:
        _keep_constants()


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


def _call_builtins_at_once(interpreter: Any, operators: dict[str, tuple[str, frozenset[str], bool]]) -> None:
    """Leave out the two functions between a kernel's operator and what it does, which only hand it on; these
    operators are numpy's where they can be."""
    from triton.language import core

    if not hasattr(interpreter, "_patch_attr"):
        return
    handing_on = core.builtin(lambda: None).__code__
    at_once: dict[str, Any] = {}

    def patch(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        work, meaning = member, interpreter.interpreter_semantic
        if obj is core.tensor and name in operators:
            if name not in at_once:
                at_once[name] = _at_once(interpreter, member, *operators[name])
            scope.set_attr(obj, name, at_once[name])
            return
        if getattr(member, "__code__", None) is handing_on:
            work = member.__wrapped__

        def call(*args: Any, **options: Any) -> Any:
            options["_semantic"] = meaning
            return work(*args, **options)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch


def _keep_constants() -> None:
    """Make a number's scalar once for each type, and choose between what is alike without alike shapes."""
    import numpy as np
    from triton.language import core, semantic

    of = semantic.TritonSemantic
    make, where = of.scalar_constant, of.where
    kept: dict[Any, Any] = {}

    def constant(self: Any, value: Any, dtype: Any) -> Any:
        if dtype is None or dtype.name not in _KEPT or value != value:
            return make(self, value, dtype)
        key = dtype.name, type(value), value
        if key not in kept:
            kept[key] = make(self, value, dtype)
        return kept[key]

    def typed(self: Any, value: Any, other: Any) -> Any:
        """A number as a scalar in the other's type, where it takes part in it."""
        if type(other) is not core.tensor or type(value) not in (int, float):
            return value
        own = self.to_tensor_type(value)
        takes_part = other.dtype.name == "fp32" and own in (core.float32, core.int32)
        takes_part |= other.dtype.name in _SIGNED and own is core.int32
        return constant(self, value, other.dtype) if takes_part else value

    def choose(self: Any, condition: Any, left: Any, right: Any) -> Any:
        left, right = typed(self, left, right), typed(self, right, left)
        given = condition, left, right
        alike = all(type(each) is core.tensor for each in given) and left.dtype.name == right.dtype.name
        if not alike or condition.dtype.name != "int1" or left.dtype.name == "int1":
            return where(self, *given)
        data = np.where(condition.handle.data, left.handle.data, right.handle.data)
        handle = type(left.handle)(data, right.handle.dtype.scalar)
        blocks = any(type(each.type) is core.block_type for each in given)
        return core.tensor(handle, core.block_type(left.dtype, list(data.shape)) if blocks else left.dtype)

    of.scalar_constant, of.where = constant, choose


_WHOLE = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})
_SIGNED = frozenset({"int32", "int64"})
_KEPT = _SIGNED | {"int1", "fp32"}
_COUNTED = _WHOLE | {"fp32", "fp64"}

_OPERATORS: dict[str, tuple[str, frozenset[str], bool]] = {
    **{f"__{name}__": (does, _COUNTED, False) for name, does in (("add", "add"), ("sub", "subtract"))},
    **{f"__{name}__": ("multiply", _COUNTED, False) for name in ("mul", "rmul")},
    "__radd__": ("add", _COUNTED, False),
    "__truediv__": ("divide", frozenset({"fp32", "fp64"}), False),
    "__and__": ("bitwise_and", _WHOLE | {"int1"}, False),
    "__or__": ("bitwise_or", _WHOLE | {"int1"}, False),
    "__xor__": ("bitwise_xor", _WHOLE | {"int1"}, False),
    "__lt__": ("less", _COUNTED, True),
    "__le__": ("less_equal", _COUNTED, True),
    "__gt__": ("greater", _COUNTED, True),
    "__ge__": ("greater_equal", _COUNTED, True),
    "__eq__": ("equal", _COUNTED, True),
    "__ne__": ("not_equal", _COUNTED, True),
}
"""Numpy's function for each, of which types of two operands it makes what the interpreter does, and whether
it compares them."""


def _at_once(interpreter: Any, member: Any, does: str, kinds: frozenset[str], compares: bool) -> Any:
    """An operator of two operands of one type, or one and a number that has a place in it: numpy's.

    Their shapes are made alike by numpy as by Triton, and offsets of pointers are added as it does. The rest,
    which is types that have to be made alike, or that are refused, is left to the interpreter.
    """
    import numpy as np
    from triton.language import core

    function, meaning = getattr(np, does), interpreter.interpreter_semantic
    work = getattr(member, "__wrapped__", member)
    tensor, constant, block, pointer = core.tensor, core.constexpr, core.block_type, core.pointer_type
    handle_of, new = interpreter.TensorHandle, object.__new__
    numbers: dict[Any, Any] = {}
    made: dict[Any, dict[str, Any]] = {}

    def number(of: Any, value: Any) -> Any:
        """As an array in the other operand's type, or bytes from a pointer; None where it has no place."""
        small = type(value) is int and -(2**31) <= value < 2**31
        if type(of) is pointer and does == "add":
            size = max(1, of.element_ty.primitive_bitwidth // 8)
            return size * np.array([value], np.int32).astype(np.uint64) if small else None
        if of.name not in kinds:
            return None
        if of.name in _SIGNED:
            fits = small
        else:
            fits = of.name == "fp32" and (small or meaning.to_tensor_type(value) is core.float32)
        return np.array([value or 0], interpreter._get_np_dtype(of)) if fits else None

    def call(self: Any, other: Any) -> Any:
        left, of = self.handle, self.dtype
        if type(other) is constant:
            other = other.value
        if type(other) is tensor:
            right = other.handle.data
            if of is other.dtype or of.name == other.dtype.name:
                data = function(left.data, right) if of.name in kinds else None
            elif of.name in _SIGNED and other.dtype.name in _SIGNED and kinds >= _SIGNED:
                data, of = function(left.data, right), core.int64
            elif type(of) is pointer and does == "add" and other.dtype.name in _SIGNED:
                size = max(1, of.element_ty.primitive_bitwidth // 8)
                data = left.data + size * right.astype(np.uint64)
            else:
                data = None
            blocks = type(self.type) is block or type(other.type) is block
        else:
            data, blocks = None, type(self.type) is block
            if type(other) is int or type(other) is float:
                key = of.name, type(other), other
                if key not in numbers:
                    numbers[key] = number(of, other)
                right = numbers[key]
                data = None if right is None else function(left.data, right)
        if data is None:
            return work(self, other, _semantic=meaning)
        handle = new(handle_of)
        handle.data, handle.attr = data, {}
        handle.dtype = left.dtype.scalar if of is self.dtype else of
        key = of.name, data.shape if blocks else None
        if key not in made:
            kind = core.int1 if compares else of
            shown = core.tensor(handle, block(kind, list(data.shape)) if blocks else kind)
            made[key] = {name: value for name, value in vars(shown).items() if name != "handle"}
        result = new(tensor)
        result.__dict__.update(made[key], handle=handle)
        return result

    return call


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
