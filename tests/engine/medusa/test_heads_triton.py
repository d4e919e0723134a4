"""The kernels that find the heads' guesses against torch's top-k, on Triton's interpreter (or a GPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from engine.medusa import heads_triton
from engine.medusa.heads import HeadDrafter, _best_guesses
from engine.medusa.heads_triton import add_silu, best_guesses
from engine.medusa.tree import default_tree
from tests.support import load_heads, save_random_heads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("vocab", "nodes"), [(40, 1), (40, 29), (1500, 63), (64, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_they_are_topks(
    vocab: int, nodes: int, dtype: torch.dtype, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_triton, "_BLOCK", 64)
    tree = default_tree(4).prefix(nodes + 1)
    generator = torch.Generator().manual_seed(nodes)
    # All different, also in 16 bits, of both signs.
    values = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(tree.depth * 3)])
    logits = (values - vocab // 2) / 8
    if dtype == torch.bfloat16:  # which tells fewer numbers apart: those are its bits themselves
        bits = torch.where(logits < 0, -8 * logits - 0x8000, 8 * logits).to(torch.int16)
        logits = (bits + 0x3F80).view(torch.bfloat16)
    logits = logits.to(dtype).view(tree.depth, 3, vocab).to(DEVICE)
    token_map = torch.randperm(9000, generator=generator)[:vocab].to(DEVICE) if mapped else None
    choices = tree.choices(DEVICE)
    found = best_guesses(logits, tree.width, choices, token_map)
    assert torch.equal(found, _best_guesses(logits, tree.width, choices, token_map))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_of_equals_the_first_comes_first_and_any_value_gives_a_token(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_triton, "_BLOCK", 4)
    logits = torch.zeros(4, 9, dtype=dtype, device=DEVICE)
    logits[1] = float("-inf")
    logits[2] = float("nan")
    logits[3] = -0.5
    logits[3, 5], logits[3, 2] = float("inf"), float("-inf")
    found = best_guesses(logits.view(1, 4, 9), 4, torch.arange(4, device=DEVICE), None)
    assert found[0].tolist() == [0, 1, 2, 3]
    assert found[3].tolist() == [5, 0, 1, 3]
    assert ((found >= 0) & (found < 9)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_residual_is_torchs(dtype: torch.dtype) -> None:
    """Also of one state for all heads, which is not copied for each."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 1100, generator=generator).to(dtype).to(DEVICE)
    y = (torch.randn(4, 3, 1100, generator=generator) * 50).to(dtype).to(DEVICE)
    shared = hidden.expand(4, -1, -1)
    silu = torch.nn.functional.silu(y)
    # What is added may cancel, so an error is one of the terms, not of their sum. exp of a GPU errs by a few
    # units in the last place of its argument: of -y exp(y) that is less than one unit in the last place of 1.
    bound = 4 * torch.finfo(dtype).eps * (1 + shared.abs() + 2 * silu.abs()).float()

    def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return bool(((found.float() - wanted.float()).abs() <= bound).all())

    assert near(add_silu(shared, y.clone()), shared + silu)
    assert near(add_silu(add_silu(shared, y.clone()), y.clone()), shared + silu + silu)
    assert not near(shared + y.sigmoid() * (y + 0.01), shared + silu)


def test_whole_heads_guess_the_same(tmp_path: Path) -> None:
    file = save_random_heads(tmp_path / "h.safetensors", hidden=16, vocab=300, heads=3, layers=2)
    heads = load_heads(file, hidden_size=16, vocab_size=300, device=DEVICE)
    drafter = HeadDrafter(heads, lambda x: x, default_tree(3), vocab_size=300, device=DEVICE)
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    root = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    wanted = drafter.guess(root, hidden, 40)
    drafter.fuse_triton()
    assert torch.equal(drafter.guess(root, hidden, 40), wanted)
