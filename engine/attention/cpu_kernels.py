"""Attention over the paged pool where it lies, for trees and short chunks in float32 on the CPU.

A task is one sequence, one K/V head and a few of the rows (node, query head of the group) that look at it.
Its keys are the cached rows its queries reach, then the sequence's new rows; what a query may not see gets
weight 0. Each row's sums are taken key by key in this order, so nothing but the row's own keys and its
sequence's number of new rows changes a bit of it: neither neighbours nor where blocks lie.

Four keys and up to four rows are taken together (`cpu_vectors`); head sizes that are no multiple of its
vectors take one product a key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from engine.attention.cpu_vectors import LANES, MOST_ROWS, mix_keys, score_keys
from engine.cpu_team import JIT, SUMS, exp2, floats, integers, multiply_add, task_kernel

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
ANCESTORS, COLUMNS, DEPTHS, ROWS_TO, T, B, PARTS, WINDOW, SINKS = range(21, 30)
"""[T] masks, columns in the grid, depths and pool rows to write to; tasks a K/V head; positions in view;
[heads] logits, 0 without."""

ROWS = 32
"""Most rows of a task."""

_HIDDEN = np.float32(-3.0e38)
_LOG2_E = np.float32(1.4426950408889634)

_F = np.float32


@njit(**SUMS)
def _sum(numbers: Any) -> Any:
    total = _F(0.0)
    for i in range(numbers.size):
        total += numbers[i]
    return total


@njit(**SUMS)
def _dot(x: Any, y: Any) -> Any:
    total = _F(0.0)
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@njit(**JIT)
def _softmax(scores: Any, powers: Any, bits: Any) -> Any:
    """`scores` [n], in units of log2, to weights in place; returns their sum. Scratch [n]: one memory."""
    largest = _HIDDEN
    for i in range(scores.size):
        largest = max(largest, scores[i])
    for i in range(scores.size):
        y = scores[i] - largest
        n = np.rint(y if y > _F(-126.0) else _F(-126.0))
        power = exp2(y - n)  # NaN stays NaN: the sequence has to be noticed
        scores[i] = _F(0.0) if y < _F(-126.0) else power
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for i in range(scores.size):
        scores[i] *= powers[i]
    return _sum(scores)


@njit(**JIT)
def _score(query: Any, keys: Any, row: int, head: int, count: int, scores: Any, place: int) -> None:
    for i in range(count):
        scores[place + i] = _dot(query, keys[row + i, head])


@njit(**JIT)
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
            total = multiply_add(a, values[row + i, head, d], out[d])
            total = multiply_add(b, values[row + i + 1, head, d], total)
            total = multiply_add(c, values[row + i + 2, head, d], total)
            out[d] = multiply_add(e, values[row + i + 3, head, d], total)
        i += 4
    while i < count:
        a = weights[place + i]
        for d in range(out.size):
            out[d] = multiply_add(a, values[row + i, head, d], out[d])
        i += 1


@njit(**JIT)
def _run(table: Any, block: int, place: int, end: int) -> Any:
    """The pool's row of cached row `place`, and how many rows up to `end` follow one another from there."""
    first = place // block
    last = first
    while (last + 1) * block < end and table[last + 1] == table[last] + 1:
        last += 1
    return table[first] * block + place % block, min((last + 1) * block, end) - place


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
    vectors = dim % LANES == 0
    width = cached + new
    weights = width + (arguments[SINKS] != 0)
    step = width + 3  # `score_keys` writes so much too far; afterwards the sink's stands there
    scores = np.empty((num_rows, step), dtype=np.float32)
    queries = np.empty((num_rows, dim), dtype=np.float32)
    mixed = np.zeros((num_rows, dim), dtype=np.float32)
    bits = np.empty(weights, dtype=np.int32)
    powers = bits.view(np.float32)
    totals = np.empty(num_rows, dtype=np.float32)
    for x in range(num_rows):
        row = start_row + x
        for d in range(dim):
            queries[x, d] = q[begin + row // group, head * group + row % group, d] * scale

    if vectors:
        for x in range(0, num_rows, MOST_ROWS):
            rows, query = min(MOST_ROWS, num_rows - x), queries[x:].ctypes.data
            place = low
            while place < length:
                row, count = _run(table, block, place, length)
                at = arguments[KEYS] + (row * kv_heads + head) * dim * 4
                found = scores[x:, place - low :].ctypes.data
                score_keys(
                    rows,
                    query,
                    dim * 4,
                    at,
                    kv_heads * dim * 4,
                    count,
                    found,
                    step * 4,
                    dim // LANES,
                )
                place += count
            at = arguments[K] + (begin * arguments[K_STEP] + head * dim) * 4
            found = scores[x:, cached:].ctypes.data
            score_keys(rows, query, dim * 4, at, arguments[K_STEP] * 4, new, found, step * 4, dim // LANES)
    else:
        for x in range(num_rows):
            place = low
            while place < length:
                row, count = _run(table, block, place, length)
                _score(queries[x], keys, row, head, count, scores[x], place - low)
                place += count
            _score(queries[x], k, begin, head, new, scores[x], cached)

    for x in range(num_rows):
        t = begin + (start_row + x) // group
        reach = length + depths[t] - window + 1
        for place in range(low, min(reach, length)):
            scores[x, place - low] = _HIDDEN
        for u in range(new):
            if not (ancestors[t] >> columns[begin + u]) & 1 or length + depths[begin + u] < reach:
                scores[x, cached + u] = _HIDDEN
        if weights > width:
            sink = floats(arguments[SINKS], (heads,))[head * group + (start_row + x) % group]
            scores[x, width] = sink * _LOG2_E
        totals[x] = _softmax(scores[x, :weights], powers, bits)

    if vectors:
        for x in range(0, num_rows, MOST_ROWS):
            rows, target = min(MOST_ROWS, num_rows - x), mixed[x:].ctypes.data
            place = low
            while place < length:
                row, count = _run(table, block, place, length)
                at = arguments[VALUES] + (row * kv_heads + head) * dim * 4
                share = scores[x:, place - low :].ctypes.data
                mix_keys(rows, share, step * 4, at, kv_heads * dim * 4, count, target, dim * 4, dim // LANES)
                place += count
            at = arguments[V] + (begin * arguments[V_STEP] + head * dim) * 4
            share = scores[x:, cached:].ctypes.data
            mix_keys(rows, share, step * 4, at, arguments[V_STEP] * 4, new, target, dim * 4, dim // LANES)
    else:
        for x in range(num_rows):
            place = low
            while place < length:
                row, count = _run(table, block, place, length)
                _mix(mixed[x], values, row, head, count, scores[x], place - low)
                place += count
            _mix(mixed[x], v, begin, head, new, scores[x], cached)

    for x in range(num_rows):
        row = start_row + x
        for d in range(dim):
            out[begin + row // group, head * group + row % group, d] = mixed[x, d] / totals[x]


attend = task_kernel(_attend)
"""For `Team.run`: writes k, v into the pool and attends; B * KV_HEADS * PARTS tasks."""
