from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training import objective
from training.objective import Targets, loss_weights, soft_cross_entropy

ROWS, HIDDEN, VOCAB = 37, 8, 23


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen rows a chunk: 37 rows are three of them."""
    monkeypatch.setitem(objective.CHUNK_BYTES, "cpu", 4 * VOCAB * 16)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, HIDDEN, generator=generator, requires_grad=True)
    return x, torch.randn(VOCAB, HIDDEN, generator=generator), torch.rand(ROWS, generator=generator)


def test_one_target_is_cross_entropy_with_the_same_gradient() -> None:
    x, lm_head, scale = inputs()
    ids = torch.arange(ROWS) % VOCAB
    loss, losses = soft_cross_entropy(x, lm_head, Targets(ids[:, None], torch.ones(ROWS, 1)), scale)
    (gradient,) = torch.autograd.grad(3.0 * loss, x)
    expected = F.cross_entropy(x @ lm_head.T, ids, reduction="none")
    (wanted,) = torch.autograd.grad(3.0 * (expected * scale).sum(), x)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(loss, (expected * scale).sum())
    torch.testing.assert_close(gradient, wanted)


def test_the_models_distribution_as_target_is_the_kl_divergence_up_to_its_entropy() -> None:
    x, lm_head, scale = inputs()
    teacher = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(4)).log_softmax(1)
    targets = Targets(torch.arange(VOCAB).expand(ROWS, -1), teacher.exp())
    loss, losses = soft_cross_entropy(x, lm_head, targets, scale)
    (gradient,) = torch.autograd.grad(loss, x)
    divergence = F.kl_div((x @ lm_head.T).log_softmax(1), teacher, reduction="none", log_target=True).sum(1)
    entropy = -(teacher.exp() * teacher).sum(1)
    (wanted,) = torch.autograd.grad((divergence * scale).sum(), x)
    torch.testing.assert_close(losses, (divergence + entropy).detach())
    torch.testing.assert_close(gradient, wanted)


def test_tokens_outside_the_vocabulary_count_for_nothing() -> None:
    x, lm_head, scale = inputs()
    ids = torch.stack((torch.arange(ROWS) % VOCAB, torch.full((ROWS,), -1)), 1)
    ids[5] = -1
    loss, losses = soft_cross_entropy(x, lm_head, Targets(ids, torch.full((ROWS, 2), 0.5)), scale)
    (gradient,) = torch.autograd.grad(loss, x)
    expected = 0.5 * F.cross_entropy(x @ lm_head.T, ids[:, 0].clamp(min=0), reduction="none")
    assert losses[5] == 0
    assert not gradient[5].any()
    torch.testing.assert_close(losses[6:], expected[6:].detach())


def test_later_heads_count_less() -> None:
    assert loss_weights(3, 0.8) == pytest.approx([1.0, 0.8, 0.64])
