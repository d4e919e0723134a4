"""Pairs counted in answers, and weights that bring the right tokens forward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.medusa.bigram import Bigram, BigramTable
from training.bigram import WEIGHTS, count_pairs, fit_weights
from training.data import Row
from training.evaluate import MISS, NONE, Ranks, rank_targets
from training.hidden import HiddenCache

VOCAB = 10


def answers(*tokens: list[int]) -> list[Row]:
    return [Row(i, 0, 0, 0.0, np.array([7, 7]), np.array(answer)) for i, answer in enumerate(tokens)]


def counted(rows: list[Row], **options: int) -> dict[tuple[int, int], float]:
    table = count_pairs(rows, vocab_size=VOCAB, num_heads=2, **options)
    assert table.weights.tolist() == [1.0, 1.0]
    pairs = zip(table.tokens.tolist(), table.followers.tolist(), strict=True)
    return dict(zip(pairs, table.values.tolist(), strict=True))


def test_pairs_are_counted_within_answers_alone() -> None:
    rows = answers([1, 2, 1, 2, 3], [3, 1, 2], [4, 1, 2, 3])
    found = counted(rows)
    # 1 2 four times, 2 3 twice; 2 1, 3 1 and 4 1 once, and neither prompts nor the next answer count.
    assert set(found) == {(1, 2), (2, 3)}
    seen = 12 + 0.5 * VOCAB
    assert found[1, 2] == pytest.approx(math.log1p(4 / (5 * 4.5 / seen)), rel=1e-3)
    assert found[2, 3] == pytest.approx(math.log1p(2 / (5 * 3.5 / seen)), rel=1e-3)
    assert set(counted(rows, most=1)) == {(1, 2)}
    assert counted(answers([5], [6, 7])) == {}


def test_each_head_gets_the_weight_that_ranks_the_right_tokens_best() -> None:
    table = BigramTable(torch.zeros(1).int(), torch.ones(1).int(), torch.ones(1), torch.ones(3))
    bigram = Bigram(table, None, vocab_size=VOCAB, device=torch.device("cpu"))
    asked = []

    def ranks() -> Ranks:
        """Head 0 is right by 0.4, head 1 never better than without, head 2 better the more there is."""
        weight = bigram.weights.tolist()
        asked.append(weight[0])
        found = [0 if abs(weight[0] - 0.4) < 0.01 else 3, 1, round(5 * (1 - weight[2]))]
        # Answers that have ended say nothing, however often.
        return Ranks(np.array([found, [NONE] * 3, [NONE, 0, NONE]], dtype=np.int16), np.arange(3), [0.0] * 3)

    assert fit_weights(bigram, ranks) == [0.4, 0.0, 1.0]
    assert bigram.weights.tolist() == pytest.approx([0.4, 0.0, 1.0])
    assert asked == pytest.approx(list(WEIGHTS))


def test_ranks_are_among_the_guesses_that_serving_looks_at() -> None:
    """Forty tokens, the lower the better; pairs of 5 with 31 and 35 are worth more than all logits."""
    tokens = np.array([5, 31, 5, 35, 5, 0, 5, 1], dtype=np.int32)
    none = np.zeros((8, 0))
    cache = HiddenCache(
        hidden=np.zeros((8, 1), dtype=np.float16),
        tokens=tokens,
        ends=np.full(8, 8),
        row_of=np.zeros(8, dtype=np.int32),
        top_ids=none,
        top_log_p=none,
        keys=np.zeros(1, dtype=np.uint64),
    )
    pairs = torch.tensor([31, 35, 1]).int()
    table = BigramTable(torch.full((3,), 5).int(), pairs, torch.tensor([99.0, 99.0, 1.5]), torch.ones(1))
    bigram = Bigram(table, None, vocab_size=40, device=torch.device("cpu"))
    ranks = rank_targets(
        lambda hidden: -torch.arange(40.0).expand(1, len(hidden), -1),
        cache,
        np.ones(1, dtype=bool),
        torch.arange(40),
        num_heads=1,
        vocabulary=40,
        dtype=torch.float32,
        bigram=bigram,
    )
    # Behind 5: 31 is the last of 32 guesses and comes first, 35 is none of them, 0 comes behind 31 and 1.
    assert ranks.ranks[:, 0].tolist() == [0, 5, MISS, 5, 2, 5, 1, NONE]
