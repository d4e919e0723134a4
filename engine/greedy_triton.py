"""The best token of each row of logits, as a Triton kernel that keeps the whole GPU busy. CUDA only.

A program looks at a part of one row and leaves its best token as a number that orders as logits do; whoever
needs the row's best takes the largest of its parts'. In whatever order programs run, the result is the same.

With TRITON_INTERPRET=1 in the environment before Triton is imported it runs on the CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LEAST_KEY", "GreedySearch", "key_of", "ordered", "token_of"]

_BLOCK = 4096
"""Logits of a part: of 16 bits, four loads of 16 bytes for each of a program's threads."""

_MOST_PARTS = 32
"""Parts of a row; the reader holds those of 64 rows in its registers."""

LEAST_KEY: tl.constexpr = tl.constexpr(-(1 << 63))
"""Below every key."""


@triton.jit
def ordered(value):
    """int32 that order as float32 values do; NaN is anywhere, and -0 below 0."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_of(order, token):
    """int64 that order as `order` (int32), and among equals as falling tokens."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - token)


@triton.jit
def token_of(key):
    """The token that a key (int64) stands for."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def _greedy_kernel(logits_ptr, key_ptr, vocab, BLOCK: tl.constexpr):
    """A program of the grid (rows, parts) writes the key of its part's best, [rows, parts] int64."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    value = tl.load(logits_ptr + row * vocab + token, mask=inside, other=float("-inf")).to(tl.float32)
    value = tl.where(value != value, float("inf"), value)  # a row with NaN has a token too
    best = tl.max(value, 0)
    first = tl.min(tl.where(value < best, 0x7FFFFFFF, token), 0)
    key = key_of(ordered(tl.where(best == 0.0, 0.0, best)), first)  # -0 is 0
    tl.store(key_ptr + row * tl.num_programs(1) + part, key)


class GreedySearch:
    """Finds the best tokens of a captured step's nodes.

    Args:
        max_rows: most nodes of a step.
        vocab_size: of the logits.
        device: where everything is.
    """

    def __init__(self, *, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._block = _BLOCK
        while triton.cdiv(vocab_size, self._block) > _MOST_PARTS:
            self._block *= 2
        parts = triton.cdiv(vocab_size, self._block)
        self._keys = torch.zeros(max_rows, parts, dtype=torch.int64, device=device)

    def search(self, logits: Tensor) -> Tensor:
        """The parts' best.

        Args:
            logits: [R, vocab] of any floating type, contiguous.

        Returns:
            [R, parts] int64, overwritten by the next call: the largest of a row is `token_of` its best token,
            the first of equals, as torch's argmax. NaN is as large as infinity.
        """
        rows, vocab = logits.shape
        keys = self._keys[:rows]
        warps = max(1, min(16, self._block // 1024))
        _greedy_kernel[rows, keys.shape[1]](logits, keys, vocab, BLOCK=self._block, num_warps=warps)
        return keys
