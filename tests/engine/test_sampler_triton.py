"""The kernel that draws along trees against the tensor code, on Triton's interpreter (or a GPU)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

pytest.importorskip("triton")

from engine import sampler_triton
from engine.medusa.accept import Targets, accept
from engine.medusa.tree import Tree
from engine.sampler import SamplingRows, draw, verify
from engine.sampler_triton import TreeSampler
from engine.sampling_slots import SamplingSlots
from engine.types import MedusaParams, SamplingParams
from tests.engine.naive_sampling import CPU, EOS, TYPICAL, VOCAB, Step, sequence, slot_ids, slots_for, steps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.cuda


def move(slots: SamplingSlots) -> None:
    """The sampling state to where kernels can read it."""
    for owner in (slots, *slots._adjustments):
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor):
                setattr(owner, name, value.to(DEVICE))


def grid_of(step: Step) -> torch.Tensor:
    """[5, B, N], as `Drafter.grid` makes it; nobody reads the first plane here."""
    topology = step.topology
    planes = (topology.parents, topology.parents, topology.depths, topology.ancestors, topology.valid.long())
    return torch.stack([plane.expand(step.tokens.shape) for plane in planes]).contiguous()


def drawn(step: Step) -> Targets:
    batch, nodes = shape = step.tokens.shape
    step.slots.allocate()
    move(step.slots)
    logits = step.logits[step.row_of].flatten(0, 1).contiguous().to(DEVICE)
    raw = logits.clone()
    sampler = TreeSampler(
        step.slots, max_batch=batch, max_rows=batch * nodes, vocab_size=VOCAB, device=DEVICE
    )
    inputs = (slot_ids(*step.sequences), step.tokens, grid_of(step), step.topology.valid.contiguous())
    ids, tokens, grid, valid = (value.to(DEVICE) for value in inputs)
    sampler.draw(ids, logits, tokens, grid, valid)
    assert torch.equal(logits, raw)
    matched = ((sampler.matched.cpu().unsqueeze(1) >> torch.arange(nodes)) & 1).bool()
    return Targets(sampler.drawn.cpu().view(shape), matched, sampler.log_p.cpu().view(shape))


# The vocabulary in one block or in two, and few tokens in question put together or not.
@pytest.mark.parametrize(("block", "candidates"), [(8, 7), (4, 7), (4, 3), (4, 0)])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=steps(medusas=(MedusaParams(), *TYPICAL)))
def test_it_reaches_and_draws_what_the_tensor_code_does(
    block: int, candidates: int, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_triton, "_BLOCK", block)
    monkeypatch.setattr(sampler_triton, "_CANDIDATES", candidates)
    rows = step.slots.rows(slot_ids(*step.sequences), step.sequences)
    wanted = verify(step.logits, step.row_of, step.tokens, step.topology, rows)
    found = drawn(step)
    first, second = (accept(step.tokens, each, step.topology) for each in (wanted, found))
    assert torch.equal(first.length, second.length)
    alike = (first.path == second.path).all(1)
    if wanted.log_p is not None:  # which of equally likely paths it is, rounding decides
        within = torch.arange(first.path.shape[1]) <= first.length.unsqueeze(1)
        one, other = (
            torch.where(within, wanted.log_p.gather(1, each.path), 0.0).sum(1) for each in (first, second)
        )
        assert (alike | torch.isclose(one, other, atol=1e-4)).all()
    else:
        assert alike.all()
    assert torch.equal(first.tokens[alike], second.tokens[alike])
    assert torch.equal(first.nodes, second.nodes)
    if not (rows.all_greedy and rows.adjusting is None):
        assert torch.equal(wanted.tokens, found.tokens)
        assert torch.equal(wanted.matched, found.matched)
        if wanted.log_p is not None:
            assert torch.allclose(wanted.log_p, found.log_p, atol=1e-4)


@pytest.mark.parametrize(
    ("vocab", "candidates", "steepness", "dtype"),
    [
        (5008, 2048, 1.0, torch.float32),
        (5003, 2048, 6.0, torch.float32),
        (5008, 64, 6.0, torch.float32),
        (5003, 64, 1.0, torch.float32),
        (5003, 2048, 3.0, torch.bfloat16),
    ],
    ids=str,
)
def test_roots_over_many_tokens(
    vocab: int, candidates: int, steepness: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat and steep rows under every filter: what `draw` draws, which sorts."""
    monkeypatch.setattr(sampler_triton, "_CANDIDATES", candidates)
    batch = 32
    generator = torch.Generator().manual_seed(7)
    slots = SamplingSlots(max_num_seqs=batch, vocab_size=vocab, eos_token_ids=(), device=DEVICE)
    slots.allocate()

    def pick(values: list[float], out: torch.Tensor) -> None:
        out.copy_(torch.tensor(values)[torch.randint(len(values), (batch,), generator=generator)])

    pick([0.3, 1.0, 2.0], slots.temperature)
    pick([1.0, 1.0, 0.5, 0.95], slots.top_p)
    pick([0, 0, 1, 40, 3000, vocab], slots.top_k)
    pick([0.0, 0.0, 0.1, 1.0], slots.min_p)
    slots.seed.copy_(torch.arange(batch))
    logits = torch.randn(batch, vocab, generator=generator) * steepness
    logits[:, 11] = logits[:, 4000]  # equals, also at a cut
    logits[::7, 5] = float("-inf")
    logits = logits.to(DEVICE, dtype)
    ids = torch.arange(batch, device=DEVICE)
    one = torch.ones(batch, 1, dtype=torch.int64, device=DEVICE)
    rows = SamplingRows(
        slots.temperature, slots.top_p, slots.top_k, slots.min_p, slots.seed, slots.choice, slots.position,
        all_greedy=False, truncates=True,
    )  # fmt: skip
    sampler = TreeSampler(slots, max_batch=batch, max_rows=batch, vocab_size=vocab, device=DEVICE)
    planes = [one * 0, one * 0, one * 0, one, one]
    sampler.draw(ids, logits, one, torch.stack(planes), one.bool())
    assert torch.equal(sampler.drawn.cpu(), draw(logits.float(), rows).cpu())
    assert (sampler.matched == 1).all()


def test_the_only_token_is_drawn_though_its_number_is_the_largest_there_is() -> None:
    """See test_sampler.py."""
    each = sequence(SamplingParams(), prompt=[4], output=[0])
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, 3] = 0.0
    topology, tokens = Tree(()).topology(CPU), torch.tensor([[0]])
    step = Step([each], slots_for(each), topology, [-1], tokens, logits, torch.tensor([[0]]))
    step.slots.position[0] = 570360
    assert drawn(step).tokens.tolist() == [[3]]


def test_a_bad_word_begun_before_the_tree_and_in_it() -> None:
    """(1, 2, 3) is forbidden, 1 was emitted and 2 is drafted, twice: below it the draw is not 3."""
    sampling = SamplingParams(temperature=0.0, bad_words=((1, 2, 3), (0, 2, 5)))
    each = sequence(sampling, prompt=[4], output=[0, 1])
    topology = Tree.from_paths([[0], [1], [0, 0]]).topology(CPU)
    tokens = torch.tensor([[1, 2, 2, 3]])
    logits = torch.full((4, VOCAB), -9.0)
    logits[0, 2], logits[1, 3], logits[1, 5], logits[2, 3], logits[2, 6] = 5.0, 5.0, 4.0, 5.0, 4.0
    step = Step([each], slots_for(each), topology, [-1, 0, 0, 1], tokens, logits, torch.arange(4).view(1, 4))
    found = drawn(step)
    assert found.tokens.tolist() == [[2, 5, 6, -1]]
    assert found.matched.tolist() == [[True, True, True, False]]


def test_the_output_may_end_where_the_tree_reaches_its_least_length() -> None:
    """Three tokens at least, of which one is out: the end waits at the root and one node below it."""
    each = sequence(SamplingParams(temperature=0.0, min_tokens=3), prompt=[4], output=[0])
    tokens = torch.tensor([[0, 2, 2, 2]])
    logits = torch.zeros(4, VOCAB)
    logits[:, EOS[0]], logits[:, 2] = 5.0, 4.0
    topology = Tree.from_paths([[0], [0, 0], [0, 0, 0]]).topology(CPU)
    step = Step([each], slots_for(each), topology, [-1, 0, 1, 2], tokens, logits, torch.arange(4).view(1, 4))
    assert drawn(step).tokens.tolist() == [[2, 2, EOS[0], -1]]
