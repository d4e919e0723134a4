"""What the heads do beside their products, as Triton kernels: the residual, and the best guesses. CUDA only.

torch's top-k, with what picks the tree's tokens out of it, is a dozen kernels that look at each row several
times. A tree takes few of a head's guesses, so here each part of the vocabulary gives its best few, one after
the other, and they are compared once more.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.config import MAX_TREE_NODES
from engine.greedy_triton import LEAST_KEY, key_of, ordered, token_of
from engine.model.triton_kernels import activated

__all__ = ["add_silu", "best_guesses", "best_of_parts"]

_BLOCK = 512
"""Tokens that a program compares; one warp holds them, so that it need not wait for others."""

_CHANNELS = 1024

_LEAST_SHORT: tl.constexpr = tl.constexpr(-(1 << 31))


@triton.jit
def _add_silu_kernel(x_ptr, y_ptr, head_stride, row_stride, batch, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    at = (row // batch) * head_stride + (row % batch) * row_stride + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + row * size + column, mask=inside, other=0.0)
    tl.store(y_ptr + row * size + column, (x + activated(y, False).to(tl.float32)).to(y.dtype), mask=inside)


def add_silu(x: Tensor, y: Tensor) -> Tensor:
    """x + SiLU(y), written to y: both [heads, B, hidden], y contiguous and x in its last dimension."""
    heads, batch, size = y.shape
    grid = (heads * batch, triton.cdiv(size, _CHANNELS))
    _add_silu_kernel[grid](x, y, x.stride(0), x.stride(1), batch, size, BLOCK=_CHANNELS, num_warps=4)
    return y


# The sizes of a tree's prefixes are numbers like others: each would be another compilation.
@triton.jit(do_not_specialize=["width"])
def _best_kernel(logits_ptr, best_ptr, vocab, width, BLOCK: tl.constexpr):
    """A program of the grid (rows, blocks) writes its block's `width` best, [rows, blocks, width] int64."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    value = tl.load(logits_ptr + row * vocab + token, mask=inside, other=0.0)
    best_ptr += (row * tl.num_programs(1) + block) * width
    if value.dtype.primitive_bitwidth == 16:
        # Value and place fit 32 bits together, of which a warp finds the largest in few instructions.
        bits = value.to(tl.int16, bitcast=True).to(tl.int32)
        place = tl.arange(0, BLOCK)
        short = (bits ^ ((bits >> 31) & 0x7FFF)) * BLOCK + (BLOCK - 1 - place)
        short = tl.where(inside, short, _LEAST_SHORT)
        for rank in range(width):
            most = tl.max(short, 0)
            order = most & -BLOCK
            found = block * BLOCK + BLOCK - 1 - (most & (BLOCK - 1))
            best = key_of(order, found)
            tl.store(best_ptr + rank, tl.where(most == _LEAST_SHORT, LEAST_KEY, best))
            short = tl.where(short == most, _LEAST_SHORT, short)
    else:
        key = tl.where(inside, key_of(ordered(value.to(tl.float32)), token), LEAST_KEY)
        for rank in range(width):
            best = tl.max(key, 0)
            tl.store(best_ptr + rank, best)
            key = tl.where(key == best, LEAST_KEY, key)


@triton.jit(do_not_specialize=["width", "nodes", "count"])
def _choose_kernel(
    best_ptr, choice_ptr, map_ptr, token_ptr, width, nodes, vocab, count,
    MAPPED: tl.constexpr, BLOCK: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """A program of the grid (B, heads) writes the tokens of its head's nodes; `count` are the row's best."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    at = (head * tl.num_programs(0) + row) * count + lane
    key = tl.load(best_ptr + at, mask=lane < count, other=LEAST_KEY)
    node = tl.arange(0, NODES)
    choice = tl.load(choice_ptr + node, mask=node < nodes, other=-1)
    for rank in range(width):
        best = tl.max(key, 0)
        key = tl.where(key == best, LEAST_KEY, key)
        token = token_of(best)
        token = tl.minimum(tl.maximum(token, 0), vocab - 1)
        if MAPPED:
            token = tl.load(map_ptr + token)
        here = choice == head * width + rank
        tl.store(token_ptr + row * nodes + node, tl.zeros([NODES], tl.int64) + token, mask=here)


def best_of_parts(logits: Tensor, width: int) -> Tensor:
    """The best tokens of each part of the vocabulary, among which are the best of all.

    Args:
        logits: [heads, B, vocab], contiguous, of any floating type.
        width: tokens of each part.

    Returns:
        [heads * B, parts, width] int64, keys in falling order (see `engine.greedy_triton.key_of`); the least
        key where a part has fewer.
    """
    heads, batch, vocab = logits.shape
    blocks = triton.cdiv(vocab, _BLOCK)
    best = torch.empty(heads * batch, blocks, width, dtype=torch.int64, device=logits.device)
    _best_kernel[(heads * batch, blocks)](logits, best, vocab, width, BLOCK=_BLOCK, num_warps=1)
    return best


def best_guesses(logits: Tensor, width: int, choices: Tensor, token_map: Tensor | None) -> Tensor:
    """The tokens that a tree takes of the heads' best guesses.

    Args:
        logits: [heads, B, vocab], contiguous, of any floating type.
        width: guesses of each head.
        choices: [nodes] int64: which of the heads' guesses, [heads, width] flattened, each node takes.
        token_map: [vocab] int64, the token that each column stands for; None: itself.

    Returns:
        [B, nodes] int64. Of equal logits the first comes first.
    """
    heads, batch, vocab = logits.shape
    nodes = len(choices)
    best = best_of_parts(logits, width)
    tokens = torch.empty(batch, nodes, dtype=torch.int64, device=logits.device)
    count = best.shape[1] * width
    block = triton.next_power_of_2(count)
    _choose_kernel[(batch, heads)](
        best,
        choices,
        choices if token_map is None else token_map,
        tokens,
        width,
        nodes,
        vocab,
        count,
        MAPPED=token_map is not None,
        BLOCK=block,
        NODES=MAX_TREE_NODES,
        num_warps=max(1, min(8, block // 1024)),
    )
    return tokens
