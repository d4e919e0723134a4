from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.common import Completion
from benchmarks.equality import VARIANTS, Verdict, judge, parse, passed
from benchmarks.make_heads import handmade_heads, random_heads, save_heads
from benchmarks.reference import Answer, Reference, first_difference
from tests.support import load_heads

ANSWER = Answer(
    prompt="Hi",
    prompt_ids=[1, 2, 3],
    token_ids=[10, 11, 12, 0],
    gaps=[3.0, 2.0, 5e-5, 1.0],
    prefixes=["Hello", "Hello wor", "Hello world", "Hello world"],
    finish_reason="stop",
)
SAME = Completion("Hello world", "stop", prompt_tokens=3, completion_tokens=4)


@pytest.mark.parametrize(
    ("text", "where"),
    [("Hello world", None), ("Hello world\ufffd", None), ("Hell", 0), ("Hello there", 1), ("Hello worst", 2)],
)
def test_first_difference(text: str, where: int | None) -> None:
    assert first_difference(ANSWER, text) == where


def test_going_on_past_the_end_differs_at_the_last_token() -> None:
    assert first_difference(ANSWER, "Hello world!") == 3


@pytest.mark.parametrize(
    ("got", "kind"),
    [
        (SAME, "exact"),
        (replace(SAME, text="Hello worst"), "tie"),
        (replace(SAME, text="Hello there"), "failure"),
        (replace(SAME, finish_reason="length"), "failure"),
        (replace(SAME, completion_tokens=3), "failure"),
        (replace(SAME, prompt_tokens=4), "failure"),
    ],
)
def test_judge(got: Completion, kind: str) -> None:
    verdict = judge(ANSWER, got)
    assert verdict.kind == kind
    assert (verdict == Verdict("exact")) == (kind == "exact")


def test_at_most_one_tie_in_eighty() -> None:
    row: dict[str, Any] = {"exact": 79, "tie": 1, "failure": 0, "tokenised_otherwise": 0}
    assert passed([row])
    assert not passed([row, row | {"exact": 78, "tie": 2}])
    assert not passed([row | {"exact": 78, "failure": 1}])
    assert not passed([row | {"tokenised_otherwise": 1}])
    assert not passed([])


def test_variants_cover_the_promise() -> None:
    names = {variant.name for variant in VARIANTS}
    assert names == {"off", *(f"{kind}-{n}" for kind in ("random", "handmade") for n in (2, 8, 33, 64))}
    assert parse(["--prompts", "x", "--variants", "off,random-8"]).variants == ["off", "random-8"]
    with pytest.raises(SystemExit):
        parse(["--prompts", "x", "--variants", "random-9"])


@pytest.mark.parametrize("vocab", [None, 50])
def test_random_heads_load(tmp_path: Any, vocab: int | None) -> None:
    save_heads(random_heads(16, num_heads=3, num_layers=2, vocab_size=vocab), tmp_path)
    heads = load_heads(tmp_path, hidden_size=16, vocab_size=50)
    assert heads.num_heads == 3


def test_handmade_heads_are_often_right_through_the_engine(tmp_path: Any) -> None:
    torch.manual_seed(0)
    vocab, hidden, length, count = 40, 32, 12, 10
    tokens = torch.randint(0, vocab, (count, length))
    states = torch.randn(count, length, hidden)
    answers = [replace(ANSWER, token_ids=row.tolist()) for row in tokens]
    tensors, accuracies = handmade_heads(Reference(answers, list(states)), vocab, num_heads=2)
    assert min(accuracies) > 0.9

    save_heads(tensors, tmp_path)
    heads = load_heads(tmp_path, hidden_size=hidden, vocab_size=vocab)
    # Head i at the state that chose token k guesses token k + i + 1.
    for head in range(2):
        logits = heads(states[:, : length - 1 - head].reshape(-1, hidden), F.silu, 2)[head]
        right = (logits.argmax(-1) == tokens[:, head + 1 :].reshape(-1)).float().mean()
        assert right == pytest.approx(accuracies[head], abs=0.02)
