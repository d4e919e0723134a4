"""The kernels that find the heads' guesses against torch's top-k, on Triton's interpreter (or a GPU)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from engine.medusa import heads_triton
from engine.medusa.heads import _best_guesses
from engine.medusa.heads_triton import best_guesses
from engine.medusa.tree import default_tree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("vocab", "nodes"), [(40, 1), (40, 29), (1500, 63), (64, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_they_are_topks(
    vocab: int, nodes: int, dtype: torch.dtype, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_triton, "_BLOCK", 64)
    tree = default_tree(4).prefix(nodes + 1)
    generator = torch.Generator().manual_seed(nodes)
    # All different, also in 16 bits, of both signs.
    values = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(tree.depth * 3)])
    logits = ((values - vocab // 2) / 8).to(dtype).view(tree.depth, 3, vocab).to(DEVICE)
    token_map = torch.randperm(9000, generator=generator)[:vocab].to(DEVICE) if mapped else None
    choices = tree.choices(DEVICE)
    found = best_guesses(logits, tree.width, choices, token_map)
    assert torch.equal(found, _best_guesses(logits, tree.width, choices, token_map))


def test_of_equals_the_first_comes_first_and_any_value_gives_a_token() -> None:
    logits = torch.zeros(4, 9, device=DEVICE)
    logits[1] = float("-inf")
    logits[2] = float("nan")
    logits[3] = -0.5
    logits[3, 5], logits[3, 2] = float("inf"), float("-inf")
    found = best_guesses(logits.view(1, 4, 9), 4, torch.arange(4, device=DEVICE), None)
    assert found[0].tolist() == [0, 1, 2, 3]
    assert found[3].tolist() == [5, 0, 1, 3]
    assert ((found >= 0) & (found < 9)).all()
