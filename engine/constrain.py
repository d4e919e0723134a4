"""Logits of what a grammar forbids, at the nodes of a step's trees and where prompts end."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.medusa.tree import TreeShape
from engine.sampling_params import MAX_BAD_WORD_TOKENS
from engine.types import Sequence

__all__ = ["Masks", "follows", "forbid_", "masks_at_nodes", "masks_at_roots", "refusal"]

_ROWS = 128
"""Rows whose masks are unpacked at a time: each takes a byte a token."""


class Masks(NamedTuple):
    """What may follow where.

    Args:
        rows: [R] int64, the sequences' places in the batch; on the CPU, as all of it.
        nodes: [R] int64, of their trees.
        bits: [R, bytes] uint8: bit t % 8 of byte t // 8 says whether token t may follow.
    """

    rows: Tensor
    nodes: Tensor
    bits: Tensor


def masks_at_nodes(
    sequences: list[Sequence],
    shapes: list[TreeShape],
    tokens: list[list[int]],
    parents: Callable[[TreeShape], list[int]],
) -> Masks:
    """Of the trees of sequences that follow a grammar: all nodes that it allows.

    Args:
        sequences: of a step, B of them.
        shapes: of their trees; parents: of such a tree's nodes.
        tokens: [B, N], of the nodes; more than there are in a smaller tree.
    """
    rows, nodes, bits = [], [], []
    for row, (sequence, shape) in enumerate(zip(sequences, shapes, strict=True)):
        if sequence.grammar is None:
            continue
        found = np.empty((shape.num_nodes, sequence.grammar.words), np.int32)
        sequence.grammar.masks(tokens[row][: shape.num_nodes], parents(shape), found)
        reached = (found != -1).any(1).nonzero()[0]
        rows.append(np.full(len(reached), row))
        nodes.append(reached)
        bits.append(found[reached])
    joined = (np.concatenate(rows), np.concatenate(nodes), np.concatenate(bits).view(np.uint8))
    return Masks(*map(torch.from_numpy, joined))


def masks_at_roots(sequences: list[Sequence]) -> Masks:
    """The same where each has only the place at which it stands."""
    plain = TreeShape(0, 0)
    return masks_at_nodes(sequences, [plain] * len(sequences), [[0]] * len(sequences), lambda _: [0])


def follows(sequence: Sequence, tokens: list[int]) -> bool:
    """Take the last of these tokens, which a sequence with a grammar emits, as the next of it.

    Returns:
        False where it may not come: where bad_words leave none of those that the grammar allows, what is
        drawn means nothing.
    """
    grammar, bad_words = sequence.grammar, sequence.request.sampling.bad_words
    assert grammar is not None
    if bad_words:
        begin = max(sequence.num_prompt, len(sequence.token_ids) - MAX_BAD_WORD_TOKENS)
        output = [*sequence.token_ids[begin:], *tokens]
        if any(tuple(output[-len(word) :]) == word for word in bad_words):
            return False
    return grammar.advance(tokens[-1])


def refusal(sequence: Sequence) -> str:
    """Why what was drawn may not follow, for the user."""
    if sequence.grammar is not None and sequence.grammar.error:
        return f"the grammar asks too much of its parser: {sequence.grammar.error}"
    return "of the tokens that the grammar allows here, bad_words left none"


def refused_param(sequence: Sequence) -> str | None:
    """The field to blame for it; None where that is the grammar itself."""
    return None if sequence.grammar is not None and sequence.grammar.error else "bad_words"


def forbid_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Set what may not follow to -inf, in place.

    Args:
        logits: [T, vocab] of any floating type; the vocabulary may be padded beyond the masks'.
        rows: [R] int64, of them.
        bits: [R, bytes] uint8, see `Masks`.
    """
    if logits.device.type == "cpu":
        _forbid_in_place_(logits, rows, bits)
    else:
        _forbid_together_(logits, rows, bits)


def _forbid_in_place_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Row by row, without a copy of any: on a CPU a quarter of the time."""
    for row, data in zip(rows.tolist(), bits.numpy(), strict=True):
        forbidden = np.unpackbits(~data, bitorder="little")[: logits.shape[1]].view(np.bool_)
        logits[row, : len(forbidden)].masked_fill_(torch.from_numpy(forbidden), float("-inf"))
        logits[row, len(forbidden) :] = float("-inf")


def _forbid_together_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    bit = torch.arange(8, dtype=torch.uint8, device=bits.device)
    for some, masks in zip(torch.split(rows, _ROWS), torch.split(bits, _ROWS), strict=True):
        allowed = ((masks.unsqueeze(2) >> bit) & 1).bool().flatten(1)[:, : logits.shape[1]]
        changed, width = logits[some], allowed.shape[1]
        changed[:, :width].masked_fill_(~allowed, float("-inf"))
        changed[:, width:] = float("-inf")
        logits[some] = changed
