import pytest
import torch
from hypothesis import given, settings

from engine.adjust import Penalties, table_bytes
from engine.sampler import draw, verify
from engine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from engine.sampling_slots import SamplingSlots
from engine.types import Request, SamplingParams, Sequence
from tests.engine.naive_sampling import Step, adjusted, sequence, slot_ids, slots_for, steps


def adjust(
    sampling: SamplingParams, logits: list[float], prompt: list[int], output: list[int]
) -> list[float]:
    """What the slot's adjustments make of one row, nothing drafted."""
    each = sequence(sampling, prompt=prompt, output=output)
    row = torch.tensor([logits])
    rows = slots_for(each, vocab=len(logits)).rows(slot_ids(each), [each])
    rows.adjust_(row, torch.empty(1, 0, dtype=torch.int64))
    return row[0].tolist()


@settings(max_examples=60, deadline=None)
@given(steps(temperatures=(0.0,)))
def test_every_node_is_adjusted_given_its_own_path(step: Step) -> None:
    """Greedy, so that a draw shows the best adjusted logit; test_sampler.py has the sampled rows."""
    raw = step.logits.clone()
    rows = step.slots.rows(slot_ids(*step.sequences), step.sequences)
    targets = verify(step.logits, step.row_of, step.tokens, step.topology, rows)
    assert torch.equal(step.logits, raw)
    fast = rows.adjusting is None
    for b in range(len(step.sequences)):
        reached = [True]
        for node, parent in enumerate(step.parents):
            if node:
                follows = bool(step.tokens[b, node] == targets.tokens[b, parent])
                reached.append(bool(step.topology.valid[b, node]) and reached[parent] and follows)
            if reached[node]:
                assert targets.tokens[b, node] == step.adjusted(b, node).argmax()
                assert targets.matched[b, node]
            elif not fast or not step.topology.valid[b, node]:
                assert targets.tokens[b, node] == -1
                assert not targets.matched[b, node]


@settings(max_examples=60, deadline=None)
@given(steps())
def test_adjusted_rows_equal_the_naive_ones(step: Step) -> None:
    rows = step.slots.rows(slot_ids(*step.sequences), step.sequences)
    logits = step.logits[step.row_of[:, 0]]
    rows.adjust_(logits, torch.empty(len(logits), 0, dtype=torch.int64))
    for b in range(len(step.sequences)):
        wanted = torch.from_numpy(step.adjusted(b, 0)).float()
        torch.testing.assert_close(logits[b], wanted, rtol=1e-5, atol=1e-5)


def test_penalties_by_hand() -> None:
    """Prompt 0, output 1 1: repetition touches both, frequency and presence the output alone."""
    sampling = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    assert adjust(sampling, [4.0, -1.0, 3.0], [0], [1, 1]) == [2.0, -3.25, 3.0]


def test_repetition_looks_at_raw_logits_and_bias_comes_last() -> None:
    sampling = SamplingParams(repetition_penalty=2.0, logit_bias=((0, -5.0),))
    assert adjust(sampling, [4.0, 1.0], [0], []) == [-3.0, 1.0]


@pytest.mark.parametrize("penalty", [1e-44, 1e-38, 1e38])
def test_no_penalty_makes_nan(penalty: float) -> None:
    row = adjust(SamplingParams(repetition_penalty=penalty), [4.0, 1.0, -2.0, 0.0], [0, 2, 3], [1])
    assert torch.tensor(row).isfinite().all()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_nothing_ends_the_output_before_min_tokens(ignore_eos: bool) -> None:
    sampling = SamplingParams(min_tokens=2, stop_token_ids=(1, 500), ignore_eos=ignore_eos)
    blocked = [5.0, float("-inf"), 5.0, float("-inf"), 5.0]  # EOS is 3; 500 and 999 are no tokens
    for output, wanted in (([], blocked), ([2], blocked), ([2, 2], [5.0] * 5)):
        assert adjust(sampling, [5.0] * 5, [0], output) == wanted


@pytest.mark.parametrize("length", [1, 2, 3, MAX_BAD_WORD_TOKENS - 1, MAX_BAD_WORD_TOKENS])
def test_a_bad_word_of_any_length(length: int) -> None:
    word = [*range(20, 20 + length - 1), 5]
    sampling = SamplingParams(bad_words=(tuple(word),))

    def forbidden(output: list[int]) -> list[int]:
        row = adjust(sampling, [1.0] * 40, word[:-1] or [1], output)
        return [token for token, logit in enumerate(row) if logit == float("-inf")]

    assert forbidden(word[:-1]) == [5]
    assert forbidden([7] * 30 + word[:-1]) == [5]
    if length > 1:
        assert forbidden([]) == []  # that the prompt ends so does not count
        assert forbidden(word[1:-1]) == []
        assert forbidden([*word[:-1], 7]) == []
        assert forbidden([7, *word[1:-1]]) == []


def test_as_many_bad_words_as_there_may_be_some_with_one_end() -> None:
    words = (*((1, 30 + word // 2) for word in range(MAX_BAD_WORDS - 1)), (2, 30))
    for output, first in (([1], True), ([2], False)):
        row = adjust(SamplingParams(bad_words=words), [0.0] * 70, [0], output)
        forbidden = {token for token, logit in enumerate(row) if logit == float("-inf")}
        assert forbidden == (set(range(30, 30 + MAX_BAD_WORDS // 2)) if first else {30})


def test_a_bad_word_may_begin_in_the_output_and_go_on_in_the_tree() -> None:
    """Output 6, root 1, child 2: the word 1 2 3 is begun at the child only."""
    each = sequence(SamplingParams(temperature=0, bad_words=((1, 2, 3),)), prompt=[0], output=[6, 1])
    rows = slots_for(each).rows(slot_ids(each), [each])
    row = torch.zeros(2, 7)
    row[:, 3] = 2.0
    row[:, 4] = 1.0
    rows.adjust_(row[:1], torch.empty(1, 0, dtype=torch.int64))
    assert row[0].argmax() == 3
    rows.adjust_(row[1:], torch.tensor([[2]]))
    assert row[1].argmax() == 4


def test_only_rows_that_ask_are_copied_and_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Penalties._adjust

    def spy(self: Penalties, logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return original(self, logits, *rest)

    monkeypatch.setattr(Penalties, "_adjust", spy)
    plain = [sequence(SamplingParams(temperature=0), prompt=[1], output=[2], slot=slot) for slot in (0, 2)]
    penalized = sequence(SamplingParams(temperature=0, presence_penalty=2.0), prompt=[1], output=[2], slot=1)
    together = [plain[0], penalized, plain[1]]
    logits = torch.zeros(3, 7)
    logits[:, 2] = 1.0
    drawn = draw(logits, slots_for(*together).rows(slot_ids(*together), together))
    assert drawn.tolist() == [2, 0, 2]
    assert seen == [1]
    assert logits[1, 2] == 1.0


def test_the_naive_rule_agrees_with_the_example_in_vllm() -> None:
    """vLLM's `apply_bad_words`: a one-token word is forbidden always, a longer one where it is begun."""
    sampling = SamplingParams(bad_words=((4,), (5, 6)))
    assert adjusted([0.0] * 7, sampling, [5], []).tolist() == [0, 0, 0, 0, float("-inf"), 0, 0]
    assert adjusted([0.0] * 7, sampling, [5], [5]).tolist() == [0, 0, 0, 0, float("-inf"), 0, float("-inf")]


def test_the_tables_take_what_is_set_aside_for_them() -> None:
    """Every kind asked for once: all tensors with a row per slot are what `table_bytes` says."""
    slots = SamplingSlots(max_num_seqs=5, vocab_size=70, eos_token_ids=[1], device=torch.device("cpu"))
    sampling = SamplingParams(
        presence_penalty=1.0, logit_bias=((3, 1.0),), min_tokens=2, bad_words=((4, 5),), max_tokens=9
    )
    slots.admit([Sequence(Request("r", (0, 2), sampling), 0, 0, [0, 2], 2, 20, 0, slot=3)])
    taken = 0
    for adjustment in slots._adjustments:
        tensors = [value for value in vars(adjustment).values() if isinstance(value, torch.Tensor)]
        taken += sum(one.nbytes for one in tensors if one is not adjustment.uses)
    assert taken == table_bytes(5, 70)
