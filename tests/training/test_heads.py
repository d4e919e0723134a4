from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.errors import HeadsError
from tests.support import load_heads
from training.heads import PlainHeads, num_parameters
from training.train import save_heads

HIDDEN, VOCAB = 12, 20


def trained(layers: int = 2) -> PlainHeads:
    heads = PlainHeads(3, layers, HIDDEN)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).half() * 0.25)
    return heads


def test_a_head_starts_as_the_base_models_own_lm_head() -> None:
    hidden = torch.randn(5, HIDDEN)
    assert torch.equal(PlainHeads(3, 2, HIDDEN)(hidden), hidden.expand(3, -1, -1))


def test_what_is_saved_is_served_as_it_was_trained(tmp_path: Path) -> None:
    heads, file = trained(), tmp_path / "medusa_lm_head.safetensors"
    save_heads(file, heads, None)
    served = load_heads(file, hidden_size=HIDDEN, vocab_size=VOCAB)
    hidden, lm_head = torch.randn(7, HIDDEN), torch.randn(VOCAB, HIDDEN)
    logits = served(hidden, lambda x: F.linear(x, lm_head), 3)
    torch.testing.assert_close(logits, heads(hidden) @ lm_head.T)


def test_tensors_round_trip_bit_for_bit() -> None:
    heads = trained()
    again = PlainHeads.from_tensors({**heads.tensors(), "token_map": torch.arange(4)})
    for one, other in zip(heads.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert num_parameters(heads) == 3 * 2 * (HIDDEN * HIDDEN + HIDDEN)


def test_heads_that_cannot_be_trained_on_are_refused() -> None:
    tensors = trained(1).tensors()
    with pytest.raises(HeadsError, match=r"lm_head of their own"):
        PlainHeads.from_tensors({**tensors, "0.1.weight": torch.zeros(VOCAB, HIDDEN)})
    del tensors["1.0.linear.weight"]
    with pytest.raises(HeadsError, match=r"1\.0\.linear\.weight is missing"):
        PlainHeads.from_tensors(tensors)
    with pytest.raises(HeadsError, match=r"no tensor"):
        PlainHeads.from_tensors({"token_map": torch.arange(4)})
