"""The kernel that finds each row's best token against torch's argmax, on Triton's interpreter (or a GPU)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from engine import greedy_triton
from engine.greedy_triton import GreedySearch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.cuda


def search(logits: torch.Tensor) -> torch.Tensor:
    """What whoever reads the keys makes of them: [R] tokens."""
    rows, vocab = logits.shape
    found = GreedySearch(max_rows=rows + 1, vocab_size=vocab, device=DEVICE).search(logits.to(DEVICE))
    assert len(found) == rows
    return 0x7FFFFFFF - (found.amax(1) & 0x7FFFFFFF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 61, 64, 200, 2100])
def test_it_is_torchs_argmax(vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part or many, whole or not; many equals, of both signs."""
    monkeypatch.setattr(greedy_triton, "_BLOCK", 64)
    generator = torch.Generator().manual_seed(vocab)
    rows = [
        torch.randn(5, vocab, generator=generator),
        torch.randint(-3, 1, (20, vocab), generator=generator),
        -torch.rand(5, vocab, generator=generator) - 1.0,
    ]
    logits = torch.cat(rows).to(dtype)
    assert torch.equal(search(logits).cpu(), logits.argmax(-1))


def test_zeros_of_either_sign_are_equal_and_infinity_is_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy_triton, "_BLOCK", 4)
    logits = torch.full((5, 10), -2.0)
    logits[0] = float("-inf")
    logits[1, 3], logits[1, 7] = float("inf"), float("inf")
    logits[2, 2], logits[2, 8] = -0.0, 0.0
    logits[3, 1], logits[3, 2] = 0.0, -0.0
    logits[4, :9] = float("-inf")
    assert search(logits).tolist() == [0, 3, 2, 1, 9]
    assert logits.argmax(-1).tolist() == [0, 3, 2, 1, 9]


def test_a_row_with_nan_has_a_token() -> None:
    """Whose request ends with an error; until then it needs one."""
    logits = torch.zeros(3, 10)
    logits[0, 4], logits[1, 6] = float("nan"), -float("nan")
    logits[2] = float("nan")
    assert search(logits).tolist() == [4, 6, 0]
