"""The sampling rules as one would say them, one row at a time, and random requests to hold them against."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from engine.medusa.tree import Topology
from engine.sampling_slots import SamplingSlots
from engine.types import Acceptance, MedusaParams, Request, SamplingParams, Sequence
from tests.strategies import trees

CPU = torch.device("cpu")
VOCAB = 7
EOS = (3, 999)
"""The second is outside the vocabulary. Bad words end in 0 to 2, stop ids are 4: 5 and 6 always remain."""
SLOTS = 5


def adjusted(
    logits: SequenceOf[float], sampling: SamplingParams, prompt: SequenceOf[int], output: SequenceOf[int]
) -> np.ndarray:
    """Logits after penalties, bias and what is forbidden, given all that stands before the draw."""
    row = np.array(logits, dtype=np.float64)
    for token in range(len(row)):
        count = list(output).count(token)
        if count or token in prompt:
            factor = sampling.repetition_penalty
            row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
        row[token] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
    for token, bias in sampling.logit_bias:
        row[token] += bias
    if len(output) < sampling.min_tokens:
        for token in (*EOS, *sampling.stop_token_ids):
            if token < len(row):
                row[token] = -np.inf
    for *before, last in sampling.bad_words:
        if len(before) <= len(output) and before == list(output)[len(output) - len(before) :]:
            row[last] = -np.inf
    return row


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution after vLLM's filters, in numpy and one row at a time."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    if top_k:
        p[p < np.sort(p)[::-1][min(top_k, len(p)) - 1]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    if top_p < 1:
        p[order[before >= top_p]] = 0
    return p / p.sum()


def sequence(
    sampling: SamplingParams,
    *,
    prompt: SequenceOf[int],
    output: SequenceOf[int] = (),
    slot: int = 0,
    seed: int = 0,
    index: int = 0,
    medusa: MedusaParams | None = None,
) -> Sequence:
    """As the engine holds it after `output` was emitted, also when it returns after preemption."""
    return Sequence(
        request=Request("r", tuple(prompt), sampling, medusa=medusa or MedusaParams()),
        index=index,
        seed=seed,
        token_ids=[*prompt, *output],
        num_prompt=len(prompt),
        max_total=1000,
        arrival=0,
        slot=slot,
    )


def slots_for(*sequences: Sequence, vocab: int = VOCAB) -> SamplingSlots:
    """Fresh slots with the sequences admitted."""
    slots = SamplingSlots(max_num_seqs=SLOTS, vocab_size=vocab, eos_token_ids=EOS, device=CPU)
    for each in sequences:
        slots.admit([each])
    return slots


def slot_ids(*sequences: Sequence) -> Tensor:
    return torch.tensor([each.slot for each in sequences])


tokens = st.integers(0, VOCAB - 1)


@st.composite
def samplings(draw: st.DrawFn, temperatures: tuple[float, ...] = (0.0, 0.8, 1.3)) -> SamplingParams:
    """Every feature is off in about half of the requests."""
    words = st.builds(lambda before, last: (*before, last), st.lists(tokens, max_size=3), st.integers(0, 2))
    bias = st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 0.5, 3.0]), max_size=3)
    return SamplingParams(
        temperature=draw(st.sampled_from(temperatures)),
        top_k=draw(st.sampled_from([0, 0, 3])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.4, -0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.4, 0.6])),
        logit_bias=tuple(draw(st.one_of(st.just({}), bias)).items()),
        min_tokens=draw(st.sampled_from([0, 0, 4, 8])),
        stop_token_ids=draw(st.sampled_from([(), (4,)])),
        ignore_eos=draw(st.booleans()),
        bad_words=tuple(draw(st.one_of(st.just([]), st.lists(words, max_size=6)))),
    )


@dataclass(frozen=True)
class Step:
    """One step's verification: sequences with trees of one shape, of which some nodes are not valid."""

    sequences: list[Sequence]
    slots: SamplingSlots
    topology: Topology
    parents: list[int]
    tokens: Tensor
    logits: Tensor
    row_of: Tensor

    def path(self, row: int, node: int) -> list[int]:
        """Tokens from the root's child down to the node."""
        path: list[int] = []
        while node:
            path.insert(0, int(self.tokens[row, node]))
            node = self.parents[node]
        return path

    def row(self, row: int, node: int) -> Tensor:
        return self.logits[self.row_of[row, node]]

    def output(self, row: int, node: int) -> list[int]:
        """What stands between the prompt and the draw at a node."""
        each = self.sequences[row]
        return [*each.token_ids[each.num_prompt :], *self.path(row, node)]

    def adjusted(self, row: int, node: int) -> np.ndarray:
        request = self.sequences[row].request
        logits = self.row(row, node).tolist()
        return adjusted(logits, request.sampling, request.prompt_token_ids, self.output(row, node))


@st.composite
def steps(
    draw: st.DrawFn,
    temperatures: tuple[float, ...] = (0.0, 0.8, 1.3),
    medusas: tuple[MedusaParams, ...] = (MedusaParams(),),
) -> Step:
    """Few tokens, a steep distribution that leans on few of them, and drafts that follow it, so that long
    runs, repeated siblings and begun bad words are common. The logits' rows are those of valid nodes only,
    in any order; an invalid node points at a valid one's."""
    tree = draw(trees(max_nodes=14))
    batch = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    chosen_slots = draw(st.permutations(range(SLOTS)))[:batch]
    sequences = [
        sequence(
            draw(samplings(temperatures)),
            prompt=draw(st.lists(tokens, min_size=1, max_size=4)),
            output=draw(st.lists(tokens, min_size=1, max_size=8)),
            slot=slot,
            seed=draw(st.integers(0, 2**40)),
            index=draw(st.integers(0, 2)),
            medusa=draw(st.sampled_from(medusas)),
        )
        for slot in chosen_slots
    ]
    valid = torch.rand(batch, tree.size, generator=generator) < draw(st.sampled_from([0.8, 1.0]))
    valid[:, 0] = True
    row_of = torch.zeros(batch, tree.size, dtype=torch.int64)
    row_of[valid] = torch.randperm(int(valid.sum()), generator=generator)
    lean = torch.randn(VOCAB, generator=generator) * draw(st.sampled_from([0.5, 3.0]))
    logits = lean + torch.randn(int(valid.sum()), VOCAB, generator=generator)
    shape = tree.topology(CPU).expand(batch)
    at_parent = logits.softmax(-1)[row_of.gather(1, shape.parents)]  # a child that may well follow
    node_tokens = at_parent.flatten(0, 1).multinomial(1, generator=generator).view(batch, -1)
    node_tokens[:, 0] = torch.tensor([each.token_ids[-1] for each in sequences])
    return Step(
        sequences=sequences,
        slots=slots_for(*sequences),
        topology=Topology(shape.parents, shape.depths, shape.ancestors, valid, shape.max_depth),
        parents=list(tree.parents),
        tokens=node_tokens,
        logits=logits,
        row_of=row_of,
    )


TYPICAL = tuple(
    MedusaParams(acceptance=Acceptance.TYPICAL, epsilon=epsilon, delta=delta)
    for epsilon, delta in ((0.09, 0.3), (0.3, 0.9), (0.0, 0.3), (0.09, 0.0), (1.0, 1e30))
)
