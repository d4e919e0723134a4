import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from engine.sampler import draw
from engine.sampling_slots import SamplingSlots
from engine.types import MedusaParams, SamplingParams, Sequence
from tests.engine.naive_sampling import (
    CPU,
    EOS,
    SLOTS,
    TYPICAL,
    VOCAB,
    adjusted,
    samplings,
    sequence,
    slot_ids,
    slots_for,
    tokens,
)

LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))


def state(slots: SamplingSlots, each: Sequence) -> tuple[list[object], Tensor]:
    """All of a slot that a draw can see: its parameters, and what becomes of a row of logits."""
    rows = slots.rows(slot_ids(each), [each])
    logits = LOGITS.repeat(1, 1)
    rows.adjust_(logits, torch.empty(1, 0, dtype=torch.int64))
    columns = [rows.temperature, rows.top_p, rows.top_k, rows.min_p, rows.seed, rows.choice, rows.position]
    if rows.typical is not None:
        columns += [rows.typical.asked, rows.typical.epsilon, rows.typical.delta]
    values = [column.item() for column in columns]
    return [*values, rows.all_greedy, rows.truncates, draw(LOGITS[None], rows).item()], logits


def same(left: tuple[list[object], Tensor], right: tuple[list[object], Tensor]) -> bool:
    return left[0] == right[0] and torch.equal(left[1], right[1])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_readmission_equals_having_followed_every_step(data: st.DataObject) -> None:
    """Two sequences advance in one batch by up to K tokens a step, with rubbish past what was emitted."""
    prompts = [data.draw(st.lists(tokens, min_size=1, max_size=4)) for _ in range(2)]
    outputs: list[list[int]] = [data.draw(st.lists(tokens, max_size=3)) for _ in range(2)]
    sampling = [data.draw(samplings()) for _ in range(2)]
    places = data.draw(st.permutations(range(SLOTS)))

    def at(row: int) -> Sequence:
        return sequence(sampling[row], prompt=prompts[row], output=outputs[row], slot=places[row], seed=row)

    stepped = slots_for(at(0), at(1))
    for _ in range(data.draw(st.integers(1, 6))):
        width = data.draw(st.integers(1, 20))
        emitted = [data.draw(st.lists(tokens, max_size=width)) for _ in range(2)]
        padded = [row + [-(10**9)] * (width - len(row)) for row in emitted]
        counts = torch.tensor([len(row) for row in emitted])
        stepped.advance(torch.tensor(places[:2]), torch.tensor(padded), counts)
        for row in range(2):
            outputs[row] = outputs[row] + emitted[row]
    for row in range(2):
        now = at(row)
        left = state(stepped, now)
        assert same(left, state(slots_for(now), now))
        wanted = torch.from_numpy(adjusted(LOGITS.tolist(), sampling[row], prompts[row], outputs[row]))
        torch.testing.assert_close(left[1][0], wanted.float(), rtol=1e-5, atol=1e-5)
        assert left[0][6] == len(outputs[row])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_slot_remembers_nothing_of_its_earlier_owners(data: st.DataObject) -> None:
    """Owners follow each other in one slot, an active neighbour keeps every table in use."""
    slots = SamplingSlots(max_num_seqs=SLOTS, vocab_size=VOCAB, eos_token_ids=EOS, device=CPU)
    busy = SamplingParams(
        presence_penalty=1.0, logit_bias=((0, 50.0),), min_tokens=900, bad_words=((1,), (2, 1))
    )
    neighbour = sequence(busy, prompt=[1, 2], output=[2, 2], slot=1)
    slots.admit([neighbour])
    output = [2, 2]
    for owner in range(data.draw(st.integers(2, 4))):
        each = sequence(
            data.draw(samplings()),
            prompt=data.draw(st.lists(tokens, min_size=1, max_size=4)),
            output=data.draw(st.lists(tokens, max_size=8)),
            slot=3,
            seed=owner,
            medusa=data.draw(st.sampled_from([MedusaParams(), *TYPICAL])),
        )
        slots.admit([each])
        assert same(state(slots, each), state(slots_for(each), each))
        slots.advance(torch.tensor([3, 1]), torch.tensor([[1, 2], [5, 6]]), torch.tensor([2, 1]))
        output = [*output, 5]
    follower = sequence(busy, prompt=[1, 2], output=output, slot=1)
    assert same(state(slots, follower), state(slots_for(follower), follower))


def test_a_server_without_adjustments_holds_no_tables() -> None:
    vocab = 10_000
    plain = sequence(SamplingParams(top_k=10**9), prompt=[1, 2])
    slots = slots_for(plain, vocab=vocab)
    slots.advance(slot_ids(plain), torch.tensor([[1]]), torch.tensor([1]))

    def held() -> int:
        return sum(
            value.numel()
            for adjustment in slots._adjustments
            for value in vars(adjustment).values()
            if isinstance(value, Tensor)
        )

    assert held() < vocab
    assert slots.rows(slot_ids(plain), [plain]).adjusting is None
    assert slots.rows(slot_ids(plain), [plain]).top_k.item() == vocab
    slots.admit([sequence(SamplingParams(frequency_penalty=1.0), prompt=[1], slot=1)])
    allocated = held()
    assert allocated >= 2 * SLOTS * vocab
    slots.admit([sequence(SamplingParams(frequency_penalty=1.0), prompt=[1], slot=2)])
    assert held() == allocated


def test_greedy_requests_are_never_typical() -> None:
    greedy = sequence(SamplingParams(temperature=0), prompt=[1], medusa=TYPICAL[0])
    sampled = sequence(SamplingParams(), prompt=[1], slot=1, medusa=TYPICAL[0])
    slots = slots_for(greedy, sampled)
    assert slots.rows(slot_ids(greedy), [greedy]).typical is None
    typical = slots.rows(slot_ids(greedy, sampled), [greedy, sampled]).typical
    assert typical is not None
    assert typical.asked.tolist() == [False, True]
