"""The guesses behind each other's tokens as Triton kernels; see `engine.medusa.bigram`. CUDA only.

torch's operators for it are some ten for each level of a tree. Here there are three kernels: the parts of
the vocabulary give their best, a program for each head and sequence merges them, and a program for each
sequence goes down its tree. At a node all candidates are scored at once, and each counts those that come
before it: that is its rank, so nothing is sorted, and no value, NaN either, leaves a node without a token.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.greedy_triton import LEAST_KEY, ordered, token_of
from engine.medusa.bigram import CANDIDATES, FACTOR, Bigram, Walk
from engine.medusa.heads_triton import best_of_parts

__all__ = ["follow"]

_PARENTS = 8
"""Nodes of a level that a program looks at together, a warp each."""

_SPREAD: tl.constexpr = tl.constexpr(FACTOR)

_LEAST: tl.constexpr = tl.constexpr(-(1 << 31))


@triton.jit
def _merge_kernel(
    best_ptr, logit_ptr, map_ptr, token_ptr, value_ptr, parts, vocab, count,
    MAPPED: tl.constexpr, PARTS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """A program of the grid (B, heads) writes its head's `count` best, [heads, B, count], best first."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    part, lane = tl.arange(0, PARTS), tl.arange(0, CANDIDATES)
    # Each part's are in order, so only its first that was not taken yet is compared.
    best_ptr += (row * parts + part) * count
    taken = tl.where(part < parts, 0, count)
    key = tl.load(best_ptr, mask=part < parts, other=LEAST_KEY)
    column = tl.zeros([CANDIDATES], tl.int64)
    for rank in range(count):
        most = tl.max(key, 0)
        column = tl.where(lane == rank, token_of(most), column)
        won = key == most
        taken += won.to(tl.int32)
        following = tl.load(best_ptr + taken, mask=won & (taken < count), other=LEAST_KEY)
        key = tl.where(won, following, key)
    inside = lane < count
    column = tl.minimum(tl.maximum(column, 0), vocab - 1)
    value = tl.load(logit_ptr + row * vocab + column, mask=inside, other=0.0)
    token = column
    if MAPPED:
        token = tl.load(map_ptr + column, mask=inside, other=0)
    tl.store(token_ptr + row * count + lane, token, mask=inside)
    tl.store(value_ptr + row * count + lane, value.to(tl.float32), mask=inside)


# What depends on the tree is kept out of what Triton specialises: each prefix would be another compilation.
@triton.jit(do_not_specialize=["depth", "width", "nodes"])
def _walk_kernel(
    token_ptr, value_ptr, root_ptr, key_ptr, worth_ptr, weight_ptr, table_ptr, start_ptr, out_ptr,
    depth, width, nodes, count, vocab_size, last_bucket,
    WAYS: tl.constexpr, PARENTS: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """A program of the grid (B,) writes its sequence's nodes, [B, nodes]; arguments as in `follow`."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CANDIDATES)
    out_ptr += row * nodes
    root = tl.load(root_ptr + row)
    for head in range(depth):
        at = (head * tl.num_programs(0) + row) * count + lane
        token = tl.load(token_ptr + at, mask=lane < count, other=0)
        value = tl.load(value_ptr + at, mask=lane < count, other=0.0)
        weight = tl.load(weight_ptr + head)
        first, end = tl.load(start_ptr + head), tl.load(start_ptr + head + 1)
        for start in range(first, end, PARENTS):
            parent = start + tl.arange(0, PARENTS)
            entry_ptr = table_ptr + parent * (width + 1)
            node = tl.load(entry_ptr, mask=parent < end, other=-1)
            before = tl.load(out_ptr + node, mask=node >= 0, other=0)
            before = tl.where(node < 0, root, before)

            key = before[:, None] * vocab_size + token[None, :]
            slot = ((key * _SPREAD >> 32) & last_bucket) * WAYS
            worth = tl.zeros([PARENTS, CANDIDATES], tl.float32)
            for way in tl.static_range(WAYS):
                held = tl.load(key_ptr + slot + way)
                worth += tl.where(held == key, tl.load(worth_ptr + slot + way), 0.0)
            order = ordered(worth * weight + value[None, :])
            order = tl.where(lane[None, :] < count, order, _LEAST)

            mine, other = order[:, :, None], order[:, None, :]
            earlier = lane[None, None, :] < lane[None, :, None]
            rank = tl.sum(((other > mine) | ((other == mine) & earlier)).to(tl.int32), 2)
            wanted = (parent < end)[:, None] & (rank < width)
            taker = tl.load(entry_ptr[:, None] + 1 + rank, mask=wanted, other=-1)
            chosen = tl.zeros([PARENTS, CANDIDATES], tl.int64) + token[None, :]
            tl.store(out_ptr + taker, chosen, mask=taker >= 0)
        tl.debug_barrier()  # the next level reads what other threads have written


def follow(logits: Tensor, token_map: Tensor | None, bigram: Bigram, root: Tensor, walk: Walk) -> Tensor:
    """The guesses that a tree takes, each in its order behind the token before it.

    Args:
        logits: [heads, B, draft_vocab], contiguous, of any floating type; as many heads as the tree is deep.
        token_map: [draft_vocab] int64, see `MedusaHeads`; None: each column is its token.
        root: [B] int64, contiguous, the token that the first head's guesses come behind.
        walk: of the tree.

    Returns:
        [B, nodes] int64. Of equal scores that of the larger logit comes first, of equal logits the first.
    """
    heads, batch, vocab = logits.shape
    count = min(CANDIDATES, vocab)
    best = best_of_parts(logits, count)
    parts = best.shape[1]
    tokens = torch.empty(heads, batch, count, dtype=torch.int64, device=logits.device)
    values = torch.empty(heads, batch, count, dtype=torch.float32, device=logits.device)
    lanes = triton.next_power_of_2(CANDIDATES)
    _merge_kernel[(batch, heads)](
        best, logits, tokens if token_map is None else token_map, tokens, values, parts, vocab, count,
        MAPPED=token_map is not None, PARTS=triton.next_power_of_2(parts), CANDIDATES=lanes, num_warps=1,
    )  # fmt: skip
    found = torch.empty(batch, len(walk.order), dtype=torch.int64, device=logits.device)
    _walk_kernel[(batch,)](
        tokens, values, root, bigram.keys, bigram.values, bigram.weights, walk.table, walk.starts, found,
        len(walk.starts) - 1, walk.table.shape[1] - 1, found.shape[1],
        count, bigram.vocab_size, len(bigram.keys) - 1,
        WAYS=bigram.keys.shape[1], PARENTS=_PARENTS, CANDIDATES=lanes, num_warps=_PARENTS,
    )  # fmt: skip
    return found
