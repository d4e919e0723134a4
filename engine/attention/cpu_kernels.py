"""Attention over the paged pool where it lies, for trees and short chunks in float32 on the CPU.

A task is one sequence, one K/V head and a few of the rows (node, query head of the group) that look at it.
Its keys are the cached rows its queries reach, then the sequence's new rows; what a query may not see gets
weight 0. Each row's sums are taken key by key in this order, so nothing but the row's own keys and its
sequence's number of new rows changes a bit of it: neither neighbours nor where blocks lie.

Few rows take one product of vectors a key. From `_FEW` rows on, sixteen keys at a time are transposed and
four rows take them together: then the sums stay in registers (vector code that numba's compiler does not find
by itself, so it is spelled out).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.cpu_team import JIT, floats, integers, task_kernel

__all__ = ["ROWS", "attend"]

# Places in a kernel's arguments; addresses unless said otherwise. The two before are the team's.
Q, Q_STEP, K, K_STEP, V, V_STEP, OUT = range(2, 9)
"""q [T, heads, head_dim], k and v [T, kv_heads, head_dim] with the floats from row to row; out like q."""
KEYS, VALUES, POOL_ROWS = range(9, 12)
"""A layer of the pool, [POOL_ROWS, kv_heads, head_dim] each."""
HEADS, KV_HEADS, HEAD_DIM, BLOCK, SCALE = range(12, 17)
"""Numbers; SCALE is the address of the factor on q k^T times log2(e)."""
FIRST, LENGTHS, TABLES, WIDTH = range(17, 21)
"""[B + 1] first row of each sequence; [B] cached rows; [B, WIDTH] blocks."""
ANCESTORS, COLUMNS, DEPTHS, ROWS_TO, T, B, PARTS, WINDOW = range(21, 29)
"""[T] masks, columns in the grid, depths and pool rows to write to; tasks a K/V head; positions in view."""

ROWS = 32
"""Most rows of a task."""

_FEW = 8
_HIDDEN = np.float32(-3.0e38)

_F = np.float32
# 2^f on [-0.5, 0.5] to 2e-7, as in int8_kernels.
_EXP2 = tuple(
    _F(c) for c in (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
)

_SUMS: dict[str, Any] = {**JIT, "fastmath": {"reassoc", "contract", "nsz"}}
_CHAINS: dict[str, Any] = {**JIT, "fastmath": {"contract", "nsz"}}
"""Sums over keys: in the order of the keys."""

_LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), _LANES)
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
        first, empty, ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
    )


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), [x, y, z])


def _four_rows(builder: Any, start: Any, step: Any) -> list[Any]:
    return [builder.add(start, builder.mul(step, _INT(row))) for row in range(4)]


@intrinsic
def _score_tile(
    _typing: Any, _q: Any, _q_step: Any, _keys: Any, _out: Any, _out_step: Any, _head_dim: Any
) -> Any:
    """out[r, 0:16] = Σ_d q[r, d] keys[d, 0:16] for four rows; addresses, and steps in bytes."""

    def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        q, q_step, keys, out, out_step, head_dim = values
        sums = [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * _LANES)) for _ in range(4)]
        queries = _four_rows(builder, q, q_step)
        with cgutils.for_range(builder, head_dim) as loop:
            key = _load(builder, builder.add(keys, builder.mul(loop.index, _INT(4 * _LANES))))
            offset = builder.mul(loop.index, _INT(4))
            for total, query in zip(sums, queries, strict=True):
                value = _spread(builder, builder.add(query, offset))
                builder.store(_multiply_add(builder, value, key, builder.load(total)), total)
        for total, address in zip(sums, _four_rows(builder, out, out_step), strict=True):
            _store(builder, builder.load(total), address)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), code


@intrinsic
def _mix_tile(
    _typing: Any, _p: Any, _p_step: Any, _places: Any, _values: Any, _out: Any, _out_step: Any, _count: Any
) -> Any:
    """out[r, 0:16] += Σ_i p[r, i] values[places[i]][0:16] for four rows; places and steps in bytes."""

    def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        p, p_step, places, table, out, out_step, count = values
        outs = _four_rows(builder, out, out_step)
        sums = [cgutils.alloca_once_value(builder, _load(builder, address)) for address in outs]
        weights = _four_rows(builder, p, p_step)
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(places, builder.mul(loop.index, _INT(8)))
            place = builder.load(builder.inttoptr(at, _INT.as_pointer()))
            value = _load(builder, builder.add(table, place))
            offset = builder.mul(loop.index, _INT(4))
            for total, weight in zip(sums, weights, strict=True):
                share = _spread(builder, builder.add(weight, offset))
                builder.store(_multiply_add(builder, share, value, builder.load(total)), total)
        for total, address in zip(sums, outs, strict=True):
            _store(builder, builder.load(total), address)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), code


@njit(**_SUMS)
def _softmax(scores: Any, powers: Any, bits: Any) -> Any:
    """`scores` [n], in units of log2, to weights in place; returns their sum. Scratch [n]: one memory."""
    c6, c5, c4, c3, c2, c1, c0 = _EXP2
    largest = _HIDDEN
    for i in range(scores.size):
        largest = max(largest, scores[i])
    for i in range(scores.size):
        y = scores[i] - largest
        n = np.rint(y if y > _F(-126.0) else _F(-126.0))
        f = y - n  # NaN stays NaN: the sequence has to be noticed
        power = (((((c6 * f + c5) * f + c4) * f + c3) * f + c2) * f + c1) * f + c0
        scores[i] = _F(0.0) if y < _F(-126.0) else power
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    total = _F(0.0)
    for i in range(scores.size):
        weight = scores[i] * powers[i]
        scores[i] = weight
        total += weight
    return total


@njit(**_SUMS)
def _score(query: Any, keys: Any, row: int, head: int, count: int, scores: Any, place: int) -> None:
    for i in range(count):
        total = _F(0.0)
        for d in range(query.size):
            total += query[d] * keys[row + i, head, d]
        scores[place + i] = total


@njit(**_CHAINS)
def _mix(out: Any, values: Any, row: int, head: int, count: int, weights: Any, place: int) -> None:
    i = 0
    while i + 4 <= count:
        a, b, c, e = (
            weights[place + i],
            weights[place + i + 1],
            weights[place + i + 2],
            weights[place + i + 3],
        )
        for d in range(out.size):
            total = out[d] + a * values[row + i, head, d]
            total = total + b * values[row + i + 1, head, d]
            total = total + c * values[row + i + 2, head, d]
            out[d] = total + e * values[row + i + 3, head, d]
        i += 4
    while i < count:
        a = weights[place + i]
        for d in range(out.size):
            out[d] = out[d] + a * values[row + i, head, d]
        i += 1


@njit(**JIT)
def _run(table: Any, block: int, place: int, end: int) -> Any:
    """The pool's row of cached row `place`, and how many rows before `end` its block holds from there on."""
    return table[place // block] * block + place % block, min(block - place % block, end - place)


@njit(**JIT)
def _store_rows(
    arguments: Any, begin: int, end: int, head: int, k: Any, v: Any, keys: Any, values: Any
) -> None:
    """Write the new K/V rows begin .. end - 1 of one head into the pool."""
    rows = integers(arguments[ROWS_TO], (arguments[T],))
    for t in range(begin, end):
        for d in range(k.shape[2]):
            keys[rows[t], head, d] = k[t, head, d]
            values[rows[t], head, d] = v[t, head, d]


@njit(**JIT)
def _attend(arguments: Any, number: int) -> None:
    heads, kv_heads, dim = arguments[HEADS], arguments[KV_HEADS], arguments[HEAD_DIM]
    group, parts, tokens = heads // kv_heads, arguments[PARTS], arguments[T]
    b, head, part = number // (kv_heads * parts), number // parts % kv_heads, number % parts
    first = integers(arguments[FIRST], (arguments[B] + 1,))
    begin, end = first[b], first[b + 1]
    start_row = part * ROWS
    num_rows = min(ROWS, (end - begin) * group - start_row)
    if num_rows <= 0:
        return
    q = floats(arguments[Q], (tokens, arguments[Q_STEP] // dim, dim))
    k = floats(arguments[K], (tokens, arguments[K_STEP] // dim, dim))
    v = floats(arguments[V], (tokens, arguments[V_STEP] // dim, dim))
    out = floats(arguments[OUT], (tokens, heads, dim))
    keys = floats(arguments[KEYS], (arguments[POOL_ROWS], kv_heads, dim))
    values = floats(arguments[VALUES], (arguments[POOL_ROWS], kv_heads, dim))
    if part == 0:
        _store_rows(arguments, begin, end, head, k, v, keys, values)
    length = integers(arguments[LENGTHS], (arguments[B],))[b]
    table = integers(arguments[TABLES], (arguments[B], arguments[WIDTH]))[b]
    ancestors = integers(arguments[ANCESTORS], (tokens,))
    columns = integers(arguments[COLUMNS], (tokens,))
    depths = integers(arguments[DEPTHS], (tokens,))
    scale = floats(arguments[SCALE], (1,))[0]
    block, window, new = arguments[BLOCK], arguments[WINDOW], end - begin

    low = length  # first cached row that any of the rows reaches
    for x in range(num_rows):
        low = min(low, length + depths[begin + (start_row + x) // group] - window + 1)
    low = max(low, 0)
    cached = length - low
    tiled = (end - begin) * group >= _FEW and dim % _LANES == 0
    align = _LANES if tiled else 1
    first_new = -(-cached // align) * align
    width = first_new + -(-new // align) * align
    padded = -(-num_rows // 4) * 4 if tiled else num_rows
    scores = np.empty((padded, width), dtype=np.float32)
    queries = np.empty((padded, dim), dtype=np.float32)
    mixed = np.zeros((padded, dim), dtype=np.float32)
    bits = np.empty(width, dtype=np.int32)
    powers = bits.view(np.float32)
    totals = np.empty(padded, dtype=np.float32)
    for x in range(padded):
        row = start_row + min(x, num_rows - 1)  # rows that fill up a four repeat the last
        for d in range(dim):
            queries[x, d] = q[begin + row // group, head * group + row % group, d] * scale

    if tiled:
        tile = np.empty((dim, _LANES), dtype=np.float32)
        for at in range(0, width, _LANES):
            old = at < first_new
            count = min(_LANES, cached - at if old else new - (at - first_new))
            for i in range(count):
                if old:
                    row, _ = _run(table, block, low + at + i, length)
                    for d in range(dim):
                        tile[d, i] = keys[row, head, d]
                else:
                    row = begin + at - first_new + i
                    for d in range(dim):
                        tile[d, i] = k[row, head, d]
            for x in range(0, padded, 4):
                _score_tile(
                    queries[x:].ctypes.data,
                    dim * 4,
                    tile.ctypes.data,
                    scores[x:, at:].ctypes.data,
                    width * 4,
                    dim,
                )
    else:
        for x in range(padded):
            place = low
            while place < length:
                row, count = _run(table, block, place, length)
                _score(queries[x], keys, row, head, count, scores[x], place - low)
                place += count
            _score(queries[x], k, begin, head, new, scores[x], first_new)

    for x in range(padded):
        t = begin + (start_row + min(x, num_rows - 1)) // group
        reach = length + depths[t] - window + 1
        for place in range(low, min(reach, length)):
            scores[x, place - low] = _HIDDEN
        for i in range(cached, first_new):
            scores[x, i] = _HIDDEN
        for u in range(new):
            if not (ancestors[t] >> columns[begin + u]) & 1 or length + depths[begin + u] < reach:
                scores[x, first_new + u] = _HIDDEN
        for i in range(first_new + new, width):
            scores[x, i] = _HIDDEN
        totals[x] = _softmax(scores[x], powers, bits)

    if tiled:
        places = np.empty(width, dtype=np.int64)
        for i in range(cached):
            row, _ = _run(table, block, low + i, length)
            places[i] = (row * kv_heads + head) * dim * 4
        for u in range(new):
            places[first_new + u] = ((begin + u) * arguments[V_STEP] + head * dim) * 4
        for x in range(0, padded, 4):
            for d in range(0, dim, _LANES):
                target = mixed[x:, d:].ctypes.data
                _mix_tile(
                    scores[x:].ctypes.data,
                    width * 4,
                    places.ctypes.data,
                    arguments[VALUES] + d * 4,
                    target,
                    dim * 4,
                    cached,
                )
                _mix_tile(
                    scores[x:, first_new:].ctypes.data,
                    width * 4,
                    places[first_new:].ctypes.data,
                    arguments[V] + d * 4,
                    target,
                    dim * 4,
                    new,
                )
    else:
        for x in range(padded):
            place = low
            while place < length:
                row, count = _run(table, block, place, length)
                _mix(mixed[x], values, row, head, count, scores[x], place - low)
                place += count
            _mix(mixed[x], v, begin, head, new, scores[x], first_new)

    for x in range(num_rows):
        row = start_row + x
        for d in range(dim):
            out[begin + row // group, head * group + row % group, d] = mixed[x, d] / totals[x]


attend = task_kernel(_attend)
"""For `Team.run`: writes k, v into the pool and attends; B * KV_HEADS * PARTS tasks."""
