"""Vector code that numba's compiler does not find by itself, spelled out: dot products of queries with keys,
and sums of values.

Arguments of the functions are int64 throughout: addresses of float32 arrays, steps from row to row in bytes,
and counts. Every sum is taken in one order, whatever the number of rows and a key's place among the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["LANES", "MOST_ROWS", "mix_keys", "score_keys"]

LANES = 16
MOST_ROWS = 4
"""Rows that `score_keys` and `mix_keys` take together."""

_KEYS = 4
_AHEAD = 16
"""Keys that are asked for before they are needed."""

_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_INT = ir.IntType(64)


def _load(builder: Any, address: Any) -> Any:
    vector = builder.load(builder.inttoptr(address, _VECTOR.as_pointer()))
    vector.align = 4
    return vector


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, builder.inttoptr(address, _VECTOR.as_pointer())).align = 4


def _spread(builder: Any, address: Any) -> Any:
    """The float at an address in all lanes."""
    empty = ir.Constant(_VECTOR, ir.Undefined)
    value = builder.load(builder.inttoptr(address, ir.FloatType().as_pointer()))
    first = builder.insert_element(empty, value, ir.IntType(32)(0))
    return builder.shuffle_vector(
        first, empty, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    )


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [x, y, z])


def _prefetch(builder: Any, address: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    word = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    builder.call(function, [builder.inttoptr(address, pointer), word(0), word(3), word(1)])


def _lanes(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def _halves(builder: Any, x: Any, y: Any, size: int) -> Any:
    """Of each run of 2 * size lanes of x and then y, the sum of its halves."""
    lanes = x.type.count + y.type.count
    first = [lane for lane in range(lanes) if lane % (2 * size) < size]
    second = [lane + size for lane in first]
    return builder.fadd(_lanes(builder, x, y, first), _lanes(builder, x, y, second))


def _sums_of_four(builder: Any, vectors: list[Any]) -> Any:
    """[4] float: the sum of the lanes of each."""
    a, b, c, d = vectors
    quarters = _halves(builder, _halves(builder, a, b, 8), _halves(builder, c, d, 8), 4)
    none = ir.Constant(_VECTOR, ir.Undefined)
    first, second = [0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]
    pairs = builder.fadd(_lanes(builder, quarters, none, first), _lanes(builder, quarters, none, second))
    none = ir.Constant(pairs.type, ir.Undefined)
    return builder.fadd(
        _lanes(builder, pairs, none, [0, 2, 4, 6]), _lanes(builder, pairs, none, [1, 3, 5, 7])
    )


def _for_each_height(builder: Any, rows: Any, emit: Callable[[int], None]) -> None:
    """The code for 1 .. MOST_ROWS rows, and a branch to the right one."""
    for height in range(1, MOST_ROWS + 1):
        with builder.if_then(builder.icmp_signed("==", rows, _INT(height))):
            emit(height)


def _places(builder: Any, start: Any, step: Any, count: int) -> list[Any]:
    return [builder.add(start, builder.mul(step, _INT(row))) for row in range(count)]


@intrinsic
def score_keys(
    _typing: Any,
    _rows: Any,
    _q: Any,
    _q_step: Any,
    _keys: Any,
    _key_step: Any,
    _count: Any,
    _out: Any,
    _out_step: Any,
    _chunks: Any,
) -> Any:
    """out[r, i] = q[r] · keys[i] for up to MOST_ROWS rows and any count of keys, of 16 * chunks numbers each.

    Up to three numbers behind the last result of a row are overwritten.
    """

    def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        rows, q, q_step, keys, key_step, count, out, out_step, chunks = values
        last = builder.sub(count, _INT(1))
        groups = builder.udiv(builder.add(count, _INT(_KEYS - 1)), _INT(_KEYS))

        def emit(height: int) -> None:
            queries = _places(builder, q, q_step, height)
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(_KEYS)] for _ in range(height)]
            with cgutils.for_range(builder, groups) as group:
                first = builder.mul(group.index, _INT(_KEYS))
                places = []
                for key in range(_KEYS):
                    index = builder.add(first, _INT(key))
                    index = builder.select(builder.icmp_signed("<", index, last), index, last)
                    places.append(builder.add(keys, builder.mul(index, key_step)))
                for total in (total for totals in sums for total in totals):
                    builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
                with cgutils.for_range(builder, chunks) as chunk:
                    offset = builder.mul(chunk.index, _INT(4 * LANES))
                    vectors = []
                    for place in places:
                        at = builder.add(place, offset)
                        vectors.append(_load(builder, at))
                        _prefetch(builder, builder.add(at, builder.mul(key_step, _INT(_AHEAD))))
                    for query, totals in zip(queries, sums, strict=True):
                        own = _load(builder, builder.add(query, offset))
                        for vector, total in zip(vectors, totals, strict=True):
                            builder.store(_multiply_add(builder, own, vector, builder.load(total)), total)
                for row, totals in enumerate(sums):
                    found = _sums_of_four(builder, [builder.load(total) for total in totals])
                    at = builder.add(out, builder.mul(out_step, _INT(row)))
                    at = builder.add(at, builder.mul(first, _INT(4)))
                    builder.store(found, builder.inttoptr(at, found.type.as_pointer())).align = 4

        _for_each_height(builder, rows, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), code


@intrinsic
def mix_keys(
    _typing: Any,
    _rows: Any,
    _p: Any,
    _p_step: Any,
    _values: Any,
    _value_step: Any,
    _count: Any,
    _out: Any,
    _out_step: Any,
    _chunks: Any,
) -> Any:
    """out[r] += Σ_i p[r, i] values[i] for up to MOST_ROWS rows, key by key, of 16 * chunks numbers each."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows, p, p_step, values, value_step, count, out, out_step, chunks = arguments

        def emit(height: int) -> None:
            weights = _places(builder, p, p_step, height)
            fours = builder.udiv(chunks, _INT(4))
            with cgutils.for_range(builder, fours) as four:
                strip(height, weights, builder.mul(four.index, _INT(16 * LANES)), 4)
            rest = builder.sub(chunks, builder.mul(fours, _INT(4)))
            with cgutils.for_range(builder, rest) as one:
                chunk = builder.add(builder.mul(fours, _INT(4)), one.index)
                strip(height, weights, builder.mul(chunk, _INT(4 * LANES)), 1)

        def strip(height: int, weights: list[Any], offset: Any, width: int) -> None:
            """So many vectors of each row, from this offset."""
            outs = [
                [builder.add(place, _INT(4 * LANES * vector)) for vector in range(width)]
                for place in _places(builder, builder.add(out, offset), out_step, height)
            ]
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in row] for row in outs]
            for row, totals in zip(outs, sums, strict=True):
                for at, total in zip(row, totals, strict=True):
                    builder.store(_load(builder, at), total)
            with cgutils.for_range(builder, count) as key:
                at = builder.add(builder.add(values, offset), builder.mul(key.index, value_step))
                vectors = [_load(builder, builder.add(at, _INT(4 * LANES * v))) for v in range(width)]
                for weight, totals in zip(weights, sums, strict=True):
                    share = _spread(builder, builder.add(weight, builder.mul(key.index, _INT(4))))
                    for vector, total in zip(vectors, totals, strict=True):
                        builder.store(_multiply_add(builder, share, vector, builder.load(total)), total)
            for row, totals in zip(outs, sums, strict=True):
                for at, total in zip(row, totals, strict=True):
                    _store(builder, builder.load(total), at)

        _for_each_height(builder, rows, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), code
