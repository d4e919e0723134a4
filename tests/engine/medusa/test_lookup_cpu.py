"""The lookup's kernel against its operators, to the bit: what is returned and what is kept."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from engine.medusa.lookup import Lookup
from engine.medusa.lookup_cpu import CpuLookup
from engine.types import Request, Sequence
from tests import support
from tests.engine.conftest import TinyModel

SLOTS, LONGEST, WIDEST = 5, 120, 9


def pair(size: int) -> tuple[Lookup, CpuLookup]:
    sizes = {"size": size, "max_num_seqs": SLOTS, "max_tokens": LONGEST, "device": torch.device("cpu")}
    return Lookup(**sizes), CpuLookup(**sizes)


def text(rng: random.Random, length: int) -> list[int]:
    """Few different tokens, so that there are many matches; sometimes a loop."""
    vocab = rng.randint(1, 4)
    made = [rng.randrange(vocab) for _ in range(length)]
    if length and rng.random() < 0.4:
        period = rng.randint(1, min(10, length))
        made = (made[:period] * length)[:length]
    return made


def sequence(rng: random.Random, slot: int, *, predicted: bool) -> Sequence:
    """Of any length that leaves room for a step; its prediction may be longer than the table."""
    shortest, longest = 1, LONGEST - WIDEST - 1
    length = rng.choice(
        [rng.randint(1, 9), rng.randint(shortest, longest), rng.randint(longest - 3, longest)]
    )
    tokens = text(rng, length)
    num_prompt = rng.randint(1, length)
    expected: list[int] = []
    if predicted:
        expected = text(rng, rng.choice([1, 2, rng.randint(1, 40), rng.randint(LONGEST - 4, LONGEST + 4)]))
        if rng.random() < 0.5:  # as an edit does, the output follows it for a while
            expected = [*tokens[-rng.randint(1, 12) :], *expected][: rng.randint(2, LONGEST)]
    request = Request("r", tuple(tokens[:num_prompt]), prediction_token_ids=tuple(expected))
    made = Sequence(request, 0, 0, tokens, num_prompt, 999, 0, slot=slot)
    made.num_cached = length - 1
    return made


def step(rng: random.Random, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, K] and how many of them are emitted."""
    most = rng.randint(1, WIDEST)
    tokens = torch.tensor([text(rng, most) for _ in lengths])
    return tokens, torch.tensor([rng.randint(1, most) for _ in lengths])


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**9), st.sampled_from(["nobody", "some", "all"]), st.sampled_from([1, 5, 16]))
def test_the_kernel_is_the_operators_to_the_bit(seed: int, predicted: str, size: int) -> None:
    rng = random.Random(seed)
    plain, compiled = pair(size)
    if rng.random() < 0.5:  # the slots' last owners leave something behind
        for slot in range(SLOTS):
            last = sequence(rng, slot, predicted=rng.random() < 0.7)
            plain.admit([last])
            compiled.admit([last])
    share = {"nobody": 0.0, "some": 0.5, "all": 1.0}[predicted]
    batch = [
        sequence(rng, slot, predicted=rng.random() < share)
        for slot in rng.sample(range(SLOTS), rng.randint(1, SLOTS))
    ]
    for made in batch:
        plain.admit([made])
        compiled.admit([made])
    slots = torch.tensor([made.slot for made in batch])
    lengths = torch.tensor([made.num_cached for made in batch])
    expected = {}
    for row, made in enumerate(batch):
        length = len(made.request.prediction_token_ids)
        if length and rng.random() < 0.9:  # one that is not named is not searched, nor what is past its end
            expected[row] = rng.randint(1, length) if rng.random() < 0.2 else length
    for _ in range(4):
        tokens, counts = step(rng, lengths)
        bound = int(lengths.max()) + tokens.shape[1]
        if bound >= LONGEST:
            break
        bound = rng.choice([int((lengths + counts).max()), bound, LONGEST - 1])
        arguments = slots, lengths, tokens, counts
        found = compiled.advance(*arguments, max_length=bound, predicted=expected)
        right = plain.advance(*arguments, max_length=bound, predicted=expected)
        assert found.kind.tolist() == right.kind.tolist()
        assert found.count.tolist() == right.count.tolist()
        assert found.tokens.tolist() == right.tokens.tolist()
        assert torch.equal(compiled.tokens, plain.tokens)
        assert torch.equal(compiled.history, plain.history)
        lengths = lengths + counts


@pytest.mark.parametrize(
    ("prompt", "output", "prediction", "kind", "chain"),
    [
        ([1, 0], [9, 9, 4, 5], [8, 4, 5, 4, 5, 7], 10, [4, 5, 7]),  # two are equally near: the first
        ([4], [5], [0, 4, 5, 7], 10, [7]),  # the match ends where the history begins
        ([4, 5, 4, 5, 4], [5], [], 4, [4, 5, 4, 5]),  # and here where both do
    ],
)
def test_what_chance_rarely_brings(
    prompt: list[int], output: list[int], prediction: list[int], kind: int, chain: list[int]
) -> None:
    request = Request("r", tuple(prompt), prediction_token_ids=tuple(prediction))
    made = Sequence(request, 0, 0, [*prompt, *output[:-1]], len(prompt), 999, 0, slot=2)
    arguments = torch.tensor([2]), torch.tensor([len(made.token_ids) - 1]), torch.tensor([output[-1:]])
    for search in pair(4):
        search.admit([made])
        predicted = {0: len(prediction)} if prediction else {}
        found = search.advance(*arguments, torch.tensor([1]), max_length=20, predicted=predicted)
        assert (found.kind.item(), found.tokens[0, : found.count.item()].tolist()) == (kind, chain)


def test_rows_need_not_lie_together() -> None:
    plain, compiled = pair(4)
    rng = random.Random(3)
    for slot in (1, 3):
        made = sequence(rng, slot, predicted=False)
        plain.admit([made])
        compiled.admit([made])
    slots, lengths, counts = torch.tensor([[1, 8, 2], [3, 6, 1]]).unbind(1)
    arguments = slots, lengths, torch.tensor([[2, 1], [1, 2], [0, 0]]).T, counts
    found, right = (search.advance(*arguments, max_length=11) for search in (compiled, plain))
    assert found.tokens.tolist() == right.tokens.tolist()
    assert torch.equal(compiled.history, plain.history)


@pytest.mark.parametrize(
    ("slots", "lengths", "counts", "bound"),
    [
        ([0, SLOTS], [5, 5], [1, 1], 20),  # no such slot
        ([0, -1], [5, 5], [1, 1], 20),
        ([0, 1], [5, -1], [1, 1], 20),  # before the history
        ([0, 1], [5, 18], [1, 3], 20),  # past the bound
        ([0, 1], [5, LONGEST - 2], [1, 2], LONGEST),  # past the history
        ([0, 1], [5, 5], [1, 0], 20),  # nothing to write
        ([0, 1], [5, 5], [1, 4], 20),  # more than there is
        ([0] * (SLOTS + 1), [5] * (SLOTS + 1), [1] * (SLOTS + 1), 20),  # more rows than slots
    ],
)
def test_what_is_outside_of_the_tables_is_refused_and_nothing_written(
    slots: list[int], lengths: list[int], counts: list[int], bound: int
) -> None:
    _, compiled = pair(4)
    compiled.history.fill_(1)
    before = compiled.history.clone()
    tokens = torch.full((len(slots), 3), 7)
    with pytest.raises(IndexError):
        compiled.advance(*map(torch.tensor, (slots, lengths)), tokens, torch.tensor(counts), max_length=bound)
    assert torch.equal(compiled.history, before)
    assert not compiled.tokens.any()


@pytest.mark.parametrize(("captured", "expected"), [(False, CpuLookup), (True, Lookup)])
def test_eager_steps_take_the_kernel_and_captured_ones_the_operators(
    narrow: TinyModel, monkeypatch: pytest.MonkeyPatch, captured: bool, expected: type
) -> None:
    monkeypatch.setitem(support.MODE, "captured", captured)
    engine = support.make_engine(narrow.folder, tree=4, lookup=3)
    assert type(engine._runner._lookup) is expected
