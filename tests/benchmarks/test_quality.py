"""The quality benchmark scores what transformers would score, and counts agreement honestly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.quality import Scored, Text, compare, free_running, parse, score, shared_prefix, windows
from engine.config import EngineConfig
from engine.loader import load
from tests.support import save_model, tiny_llama


@pytest.mark.parametrize("start", [1, 30, 99])
def test_scores_are_transformers_log_probabilities(tmp_path: Path, start: int) -> None:
    model = tiny_llama()
    config = EngineConfig(model=str(save_model(model, tmp_path)), max_num_seqs=8, max_step_tokens=64)
    loaded = load(config, progress=False)
    tokens = torch.randint(61, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0, start - 1 : -1].log_softmax(-1)
    found = score(loaded, Text(tokens, start))  # three chunks of at most 64 tokens
    target = torch.tensor(tokens[start:]).unsqueeze(1)
    torch.testing.assert_close(found.logprobs, wanted.gather(1, target).squeeze(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.best, wanted.argmax(-1))


def test_comparison_of_known_numbers() -> None:
    reference = [
        Scored(torch.tensor([-1.0, -2.0]), torch.tensor([4, 5])),
        Scored(torch.tensor([-3.0]), torch.tensor([6])),
    ]
    other = [
        Scored(torch.tensor([-1.5, -2.0]), torch.tensor([4, 9])),
        Scored(torch.tensor([-2.0]), torch.tensor([6])),
    ]
    result = compare([Text([0, 1, 2], 1), Text([0, 1], 1)], other, reference)
    assert result["tokens"] == 3
    assert result["perplexity"] == pytest.approx(math.exp(5.5 / 3), abs=1e-4)
    assert result["perplexity_ratio"] == pytest.approx(math.exp(-0.5 / 3), abs=1e-5)
    low, high = result["perplexity_ratio_interval"]
    assert low == pytest.approx(math.exp(-1.0), abs=1e-5)
    assert high == pytest.approx(math.exp(0.25), abs=1e-5)
    assert result["same_best_token"] == pytest.approx(2 / 3, abs=1e-5)
    assert result["mean_abs_logprob_difference"] == pytest.approx(0.5)


def test_answers_are_compared_up_to_their_first_difference() -> None:
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert shared_prefix([1, 2], [1, 2, 4]) == 2
    result = free_running([[1, 2, 3], [7]], [[1, 2, 4], [7]])
    assert result["identical"] == 1
    assert result["mean_tokens_until_difference"] == 1.5


def test_windows_cover_the_text_and_drop_a_short_rest() -> None:
    pieces = windows(list(range(1030)), 512)
    assert [len(piece.token_ids) for piece in pieces] == [512, 512]
    assert [len(piece.token_ids) for piece in windows(list(range(1056)), 512)] == [512, 512, 32]


def test_the_reference_comes_first() -> None:
    with pytest.raises(SystemExit):
        parse(["--prompts", "x.jsonl", "--variants", "int8", "float32"])
