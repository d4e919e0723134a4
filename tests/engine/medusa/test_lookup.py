"""The lookup branch against a search written the slow way."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from engine.medusa import lookup as module
from engine.medusa.lookup import Lookup
from engine.types import Request, Sequence

CPU = torch.device("cpu")
SIZE = 5


def sequence(prompt: list[int], output: list[int], prediction: list[int] = (), slot: int = 0) -> Sequence:
    request = Request("r", tuple(prompt), prediction_token_ids=tuple(prediction))
    made = Sequence(request, 0, 0, [*prompt, *output], len(prompt), 999, 0, slot=slot)
    made.num_cached = len(made.token_ids) - 1
    return made


def lookup(slots: int = 4) -> Lookup:
    return Lookup(size=SIZE, max_num_seqs=slots, max_tokens=200, device=CPU)


def match(text: list[int], end: int, suffix: list[int]) -> int:
    """How many tokens of `suffix` (ending with the root) match `text` backwards from `end`, at most 8."""
    order = 0
    while order < min(8, len(suffix), end + 1) and text[end - order] == suffix[-1 - order]:
        order += 1
    return order


def slow(made: Sequence) -> tuple[list[int], int]:
    tokens = made.token_ids
    root = len(tokens) - 1
    order, end = max(((match(tokens, end, tokens), end) for end in range(root)), default=(0, 0))
    chain = [tokens[end + 1 + i % (root - end)] for i in range(SIZE)] if order else []
    if made.request.prediction_token_ids:
        text = [*made.request.prompt_token_ids[-2:], *made.request.prediction_token_ids]
        here = made.num_output - 1 + 2
        found, near, place = max(
            (match(text, end, tokens), -abs(end - here), end) for end in range(len(text) - 1)
        )
        rivals = [
            e for e in range(len(text) - 1) if (match(text, e, tokens), -abs(e - here)) == (found, near)
        ]
        if found >= 2 and found >= min(order, 3):
            assert len(rivals) <= 2
            return [text[e + 1 : e + 1 + SIZE] for e in (rivals[0], place)], found + 8
    return [chain], order


def proposed(search: Lookup, batch: list[Sequence]) -> list[tuple[list[int], int]]:
    for made in batch:
        search.admit([made])
    slots = torch.tensor([made.slot for made in batch])
    lengths = torch.tensor([made.num_cached for made in batch])
    predicted = {
        row: len(made.request.prediction_token_ids)
        for row, made in enumerate(batch)
        if made.request.prediction_token_ids
    }
    found = search.propose(slots, lengths, max_length=int(lengths.max()), predicted=predicted)
    assert torch.equal(search.tokens[slots], found.tokens)
    return [
        (tokens[:count], kind)
        for tokens, count, kind in zip(
            found.tokens.tolist(), found.count.tolist(), found.kind.tolist(), strict=True
        )
    ]


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_chains_are_those_of_the_slow_search(seed: int, vocab: int) -> None:
    rng = random.Random(seed)

    def text(least: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(rng.randint(least, 40))]

    batch = [
        sequence(text(1), text(1), text(1) if rng.random() < 0.5 else [], slot)
        for slot in rng.sample(range(4), 3)
    ]
    search = lookup()
    for made, (chain, kind) in zip(batch, proposed(search, batch), strict=True):
        chains, expected_kind = slow(made)
        assert kind == expected_kind
        assert chain in chains


def test_the_longest_match_wins_and_then_the_latest() -> None:
    (chain, kind) = proposed(lookup(), [sequence([1, 2, 3, 9, 9, 2, 3, 8, 8, 2, 3, 7, 7, 1, 2], [3])])[0]
    assert (chain, kind) == ([9, 9, 2, 3, 8], 3)
    (chain, kind) = proposed(lookup(), [sequence([4, 2, 3, 9, 9, 2, 3, 8, 8, 5, 2], [3])])[0]
    assert (chain, kind) == ([8, 8, 5, 2, 3], 2)


def test_a_loop_goes_on_past_its_end() -> None:
    assert proposed(lookup(), [sequence([5, 1, 2, 1], [2])])[0] == ([1, 2, 1, 2, 1], 2)
    assert proposed(lookup(), [sequence([5, 5, 5], [5])])[0] == ([5] * 5, 3)


def test_nothing_said_before_gives_no_chain() -> None:
    assert proposed(lookup(), [sequence([1, 2, 3], [4])])[0] == ([], 0)


def test_a_prediction_is_followed_from_its_first_token_on() -> None:
    made = sequence([1, 2], [7], prediction=[7, 8, 9])
    assert proposed(lookup(), [made])[0] == ([8, 9], 11)
    # A prompt that holds the same text is no better than the prediction itself.
    again = sequence([1, 2, 7, 8, 3, 1, 2], [7], prediction=[7, 8, 9, 6])
    assert proposed(lookup(), [again])[0] == ([8, 9, 6], 11)


def test_of_equal_matches_in_a_prediction_the_nearest_is_followed() -> None:
    prediction = [4, 5, 1, 9, 4, 5, 2, 9, 4, 5, 3]
    made = sequence([0], [4, 5, 1, 8, 4, 5], prediction=prediction)
    assert proposed(lookup(), [made])[0][0] == [2, 9, 4, 5, 3]


@pytest.mark.parametrize("counts", [[1, 3], [2, 1]])
def test_appended_tokens_are_history(counts: list[int]) -> None:
    tokens = [[3, 4, 1], [6, 5, 6]]
    first = [sequence([1, 2], [1], slot=2), sequence([5, 6, 7], [5], slot=0)]
    step = lookup()
    proposed(step, first)
    slots = torch.tensor([2, 0])
    lengths = torch.tensor([made.num_cached for made in first])
    found = step.advance(slots, lengths, torch.tensor(tokens), torch.tensor(counts), max_length=9)
    for i, (made, count) in enumerate(zip(first, counts, strict=True)):
        made.token_ids += tokens[i][:count]
        made.num_cached += count
        whole = proposed(lookup(), [made])[0]
        assert (found.tokens[i, : int(found.count[i])].tolist(), int(found.kind[i])) == whole


def test_a_slot_keeps_nothing_of_its_last_owner() -> None:
    search = lookup()
    proposed(search, [sequence([1, 2, 3, 1, 2], [3], prediction=[4, 5])])
    assert proposed(search, [sequence([9], [3])])[0] == ([], 0)


def test_a_prediction_is_searched_for_its_own_sequence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[tuple[int, ...]] = []

    def spy(text: torch.Tensor, suffix: torch.Tensor) -> torch.Tensor:
        searched.append(tuple(text.shape))
        return whole(text, suffix)

    whole = module._match_order
    monkeypatch.setattr(module, "_match_order", spy)
    batch = [sequence([1, 2] * 20, [3], slot=slot) for slot in range(3)]
    batch[1] = sequence([1, 2] * 20, [3], prediction=[3, 4, 5], slot=3)
    assert proposed(lookup(), batch)[1] == ([4, 5], 11)
    assert searched == [(3, 41), (1, 5)]
