"""The walk of a bigram's guesses on the CPU: one compiled pass over the trees (numba).

torch's operators for it are some ten for each level of a tree, each slow to call where the model's weights
have just gone through the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import int64, njit
from torch import Tensor

from engine.cpu_team import JIT, floats, integers
from engine.medusa.bigram import FACTOR, Bigram, Walk, candidates

__all__ = ["follow"]

# The kernel takes microseconds; to get the interpreter's lock back may take as long as another thread likes.
_JIT: dict[str, Any] = {**JIT, "nogil": False}

_LEAST = np.float32(-np.inf)


@njit(int64(*(int64,) * 19), **_JIT)
def _walk(
    tokens_at: int,
    values_at: int,
    root_at: int,
    keys_at: int,
    worths_at: int,
    weights_at: int,
    table_at: int,
    starts_at: int,
    found_at: int,
    heads: int,
    batch: int,
    count: int,
    depth: int,
    parents: int,
    width: int,
    nodes: int,
    buckets: int,
    ways: int,
    vocab: int,
) -> int:
    """At the addresses lies what `follow` is given and returns, its best guesses [heads, batch, count]."""
    tokens = integers(tokens_at, (heads, batch, count))
    values, root = floats(values_at, (heads, batch, count)), integers(root_at, (batch,))
    keys, worths = integers(keys_at, (buckets, ways)), floats(worths_at, (buckets, ways))
    weights, starts = floats(weights_at, (heads,)), integers(starts_at, (depth + 1,))
    table, found = integers(table_at, (parents, 1 + width)), integers(found_at, (batch, nodes))
    scores, left = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.bool_)
    for b in range(batch):
        for head in range(depth):
            for parent in range(starts[head], starts[head + 1]):
                node = table[parent, 0]
                before = root[b] if node < 0 else found[b, node]
                for i in range(count):
                    key = before * vocab + tokens[head, b, i]
                    bucket = ((key * FACTOR) >> 32) & (buckets - 1)
                    worth = np.float32(0.0)
                    for way in range(ways):
                        if keys[bucket, way] == key:
                            worth = worths[bucket, way]
                    scores[i] = np.float32(worth * weights[head]) + values[head, b, i]
                    left[i] = True
                most = width
                while most > 0 and table[parent, most] < 0:
                    most -= 1
                for rank in range(min(most, count)):
                    best, at = _LEAST, -1
                    for i in range(count):
                        if left[i] and (at < 0 or scores[i] > best):
                            best, at = scores[i], i
                    left[at] = False
                    if table[parent, 1 + rank] >= 0:
                        found[b, table[parent, 1 + rank]] = tokens[head, b, at]
    return 0


def _run(
    tokens: Tensor,
    values: Tensor,
    root: Tensor,
    keys: Tensor,
    worths: Tensor,
    weights: Tensor,
    table: Tensor,
    starts: Tensor,
    nodes: int,
    vocab: int,
) -> Tensor:
    given = (tokens, values, root, keys, worths, weights, table, starts)
    heads, batch, count = tokens.shape
    found = root.new_empty(batch, nodes)
    _walk(
        *[tensor.data_ptr() for tensor in given], found.data_ptr(),
        heads, batch, count, len(starts) - 1, len(table), table.shape[1] - 1, nodes, *keys.shape, vocab,
    )  # fmt: skip
    return found


# An operator of torch's, so that a graph that records these holds it.
_library: Any = torch.library.Library  # which has no types
_LIBRARY = _library("medusa_serve", "FRAGMENT")
_LIBRARY.define(
    "walk(Tensor tokens, Tensor values, Tensor root, Tensor keys, Tensor worths, Tensor weights,"
    " Tensor table, Tensor starts, int nodes, int vocab) -> Tensor"
)
_LIBRARY.impl("walk", _run, "CPU")


def follow(logits: Tensor, token_map: Tensor | None, bigram: Bigram, root: Tensor, walk: Walk) -> Tensor:
    """`engine.medusa.bigram.follow`, with the first of equal scores first; all on the CPU."""
    tokens, values = candidates(logits, token_map)
    found: Tensor = torch.ops.medusa_serve.walk(
        tokens,
        values.float(),
        root.contiguous(),
        bigram.keys,
        bigram.values,
        bigram.weights,
        walk.table,
        walk.starts,
        len(walk.order),
        bigram.vocab_size,
    )
    return found
