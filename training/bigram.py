"""Counting which token follows which in the model's own answers; see `engine.medusa.bigram`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.medusa.bigram import Bigram, BigramTable
from training.data import Row
from training.evaluate import NONE, Ranks

__all__ = ["WEIGHTS", "count_pairs", "fit_weights"]

MOST_PAIRS = 1 << 18
"""Pairs that a table holds, the most frequent ones; those seen once are never in it."""

_SHRINK = 5.0
"""Times that a token has to be seen for what follows it to count as much as what follows any token."""

WEIGHTS = (0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
"""Among which each head's is chosen; 1 would take pairs for all that there is to know."""


def count_pairs(
    rows: Sequence[Row], *, vocab_size: int, num_heads: int, most: int = MOST_PAIRS
) -> BigramTable:
    """Pairs of neighbours in the rows' answers, with weights of 1.

    Args:
        rows: answers to learn from, at least one; none of them may be held out.
        vocab_size: of the model.
        num_heads: heads that the table is for.
        most: pairs to keep.
    """
    tokens = np.concatenate([row.answer for row in rows]).astype(np.int64)
    keys = np.concatenate([row.answer[:-1].astype(np.int64) * vocab_size + row.answer[1:] for row in rows])
    pairs, counts = np.unique(keys, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    order = np.sort(order[counts[order] > 1])
    pairs, counts = pairs[order], counts[order]
    # A token that was never seen is as likely as half a sight of it.
    share = (np.bincount(tokens, minlength=vocab_size) + 0.5) / (len(tokens) + 0.5 * vocab_size)
    before, behind = pairs // vocab_size, pairs % vocab_size
    values = np.log1p(counts / (_SHRINK * share[behind]))
    return BigramTable(_int32(before), _int32(behind), torch.from_numpy(values).half(), torch.ones(num_heads))


def fit_weights(bigram: Bigram, ranks_of: Callable[[], Ranks]) -> list[float]:
    """Choose each head's weight, the one by which the right tokens' ranks are best; `bigram` has them then.

    Args:
        bigram: of the table.
        ranks_of: ranks of held-out answers under the weights that `bigram` has.

    Returns:
        The weights.
    """
    scores = []
    for weight in WEIGHTS:
        bigram.weights.fill_(weight)
        scores.append(_reciprocal(ranks_of()))
    best = np.stack(scores).argmax(0)
    chosen = [WEIGHTS[index] for index in best.tolist()]
    bigram.weights.copy_(torch.tensor(chosen))
    return chosen


def _reciprocal(ranks: Ranks) -> NDArray[np.float64]:
    """[heads]: mean reciprocal rank, by which being first counts twice as much as being second."""
    known = ranks.ranks != NONE
    summed = (known / (1.0 + np.where(known, ranks.ranks, 0))).sum(0)
    found: NDArray[np.float64] = summed / np.maximum(1, known.sum(0))
    return found


def _int32(values: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
