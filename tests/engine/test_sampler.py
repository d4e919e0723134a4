from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from scipy import stats
from torch import Tensor

from engine import sampler
from engine.logprobs import token_logprobs
from engine.medusa.accept import accept
from engine.medusa.tree import Tree
from engine.sampler import SamplingRows, best_tokens, draw, exponential, verify, verify_all
from engine.types import Acceptance, MedusaParams, SamplingParams
from tests.engine.naive_sampling import CPU, TYPICAL, Step, kept, sequence, slot_ids, slots_for, steps


def rows(count: int, **values: float) -> SamplingRows:
    """`count` rows with the same parameters, seeds 0, 1, 2, …"""
    get = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "position": 0} | values

    def full(name: str, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), get[name], dtype=dtype)

    return SamplingRows(
        temperature=full("temperature", torch.float32),
        top_p=full("top_p", torch.float32),
        top_k=full("top_k", torch.int64),
        min_p=full("min_p", torch.float32),
        seed=torch.arange(count),
        choice=torch.zeros(count, dtype=torch.int64),
        position=full("position", torch.int64),
        all_greedy=get["temperature"] == 0,
        truncates=get["top_p"] < 1 or get["top_k"] > 0 or get["min_p"] > 0,
    )


@pytest.mark.parametrize("vocab", [1024 * 48, 64 * 501, 1024, 64, 61, 97 * 32])
def test_the_best_tokens_are_argmax(vocab: int) -> None:
    """The first of equals, wherever they are; infinities and NaN as argmax has them."""
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1] = 0.0
    logits[2, [3, vocab // 2, vocab - 1]] = 100.0
    logits[3, -1] = float("inf")
    logits[4] = float("-inf")
    logits[5, vocab // 2] = float("nan")
    logits[6, 0] = 100.0
    for rows in (logits, logits[:3]):
        assert best_tokens(rows).tolist() == rows.argmax(-1).tolist()


@pytest.mark.parametrize("vocab", [40, 1000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.1),
        (0.9, 30, 0.95, 0.01),
        (3.0, 0, 0.99, 0),
    ],
)
def test_draws_follow_the_filtered_distribution(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    count = 20_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    expected = kept(logits.numpy(), temperature, top_k, top_p, min_p)
    parameters = rows(count, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = draw(logits.expand(count, -1), parameters)
    counts = np.bincount(drawn.numpy(), minlength=vocab)
    assert counts[expected == 0].sum() == 0
    common = expected * count >= 5  # the chi-square approximation wants five expected a cell
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * count
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted).pvalue > 1e-4


def test_a_nucleus_wider_than_the_candidates_is_sorted_out() -> None:
    """A flat row of 2,000 tokens: its 0.9 nucleus holds about 1,800, far more than are looked at first."""
    logits = torch.linspace(0, 0.01, 2000)
    expected = kept(logits.numpy(), 1.0, 0, 0.9, 0.0) > 0
    drawn = draw(logits.expand(8_000, -1), rows(8_000, top_p=0.9))
    assert expected[drawn.numpy()].all()
    assert len(set(drawn.tolist())) > 1700


def test_temperature_0_is_argmax_also_beside_sampled_rows() -> None:
    logits = torch.randn(6, 50)
    mixed = rows(6)
    mixed.temperature[::2] = 0
    drawn = draw(logits, mixed)
    assert torch.equal(drawn[::2], logits.argmax(-1)[::2])
    assert torch.equal(draw(logits, rows(6, temperature=0)), logits.argmax(-1))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 127), st.integers(0, 2**20))
def test_a_draws_numbers_are_a_pure_function_of_its_arguments(seed: int, choice: int, position: int) -> None:
    def at(*values: int) -> Tensor:
        return exponential(*(torch.tensor([value]) for value in values), 50)

    numbers = at(seed, choice, position)
    assert numbers.min() > 0
    assert torch.equal(numbers, at(seed, choice, position))
    for others in (
        at(seed ^ 1, choice, position),
        at(seed, choice + 1, position),
        at(seed, choice, position + 1),
    ):
        assert (numbers == others).sum() <= 1


def test_numbers_are_exponential_along_each_argument_and_the_vocabulary() -> None:
    count = torch.arange(50_000)
    zero = torch.zeros_like(count)
    for arguments in ((count, zero, zero), (zero, count, zero), (zero, zero, count)):
        numbers = exponential(*arguments, 6).numpy()
        assert all(stats.kstest(of_token, "expon").pvalue > 1e-4 for of_token in numbers.T)
        ranks = np.vstack([numbers.T, np.roll(numbers[:, 0], 1)]).argsort(1).argsort(1)
        assert np.abs(np.corrcoef(ranks) - np.eye(7)).max() < 0.02
    numbers = exponential(*([torch.arange(3)] * 3), 50_000).numpy()
    assert all(stats.kstest(of_draw, "expon").pvalue > 1e-4 for of_draw in numbers)


def test_numbers_of_improbable_tokens_are_as_small_as_they_have_to_be() -> None:
    """Or they would never be drawn: of 5 million numbers as many are below a millionth as should."""
    numbers = exponential(*([torch.arange(100)] * 3), 50_000)
    assert stats.binomtest(int((numbers < 1e-6).sum()), numbers.numel(), 1e-6).pvalue > 1e-4
    assert len(numbers[numbers < 1e-4].unique()) > 400


def test_the_winner_on_a_cpu_is_the_best_by_the_numbers() -> None:
    """Vocabularies that are no whole number of blocks; nearly even chances, one that has nearly all, none."""
    for vocab in (1, 7, 512, 1300, 50_000):
        for spread in (0.01, 3.0, 300.0):
            p = (torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)) * spread).softmax(-1)
            parameters = rows(40, position=vocab)
            numbers = exponential(parameters.seed, parameters.choice, parameters.position, vocab)
            assert draw(p.log(), parameters).tolist() == (p / numbers).argmax(-1).tolist()


def test_the_only_token_is_drawn_though_its_number_is_the_largest_there_is() -> None:
    """Token 3 of this draw has 32 bits of ones: as an infinity it would leave the draw to forbidden ones."""
    parameters = rows(1, position=570360)
    numbers = exponential(parameters.seed, parameters.choice, parameters.position, 5)
    assert numbers[0, 3] == pytest.approx(24 * np.log(2))
    p = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    assert (p / numbers).argmax(-1).item() == 3
    assert draw(p.log(), parameters).item() == 3


def test_rounding_errors_of_logits_hardly_change_a_draw() -> None:
    """So a tree, which computes other rows together, leaves the text as it is. Of a distribution like a
    language model's one draw in 200 would be another by one number in the distribution function."""
    generator = torch.Generator().manual_seed(3)
    count, vocab = 100, 50_000
    for position in range(10):
        logits = torch.randn(vocab, generator=generator) * 3
        others = logits + 1e-5 * torch.randn(count, vocab, generator=generator)
        parameters = rows(count, position=position)
        assert torch.equal(draw(logits.expand(count, -1), parameters), draw(others, parameters))


def test_every_draw_lands_on_a_possible_token() -> None:
    """A token without a chance never wins."""
    logits = torch.full((4096, 300), float("-inf"))
    logits[:, 7], logits[:, 9] = 0.0, 0.0
    assert set(draw(logits, rows(4096)).tolist()) == {7, 9}


@settings(max_examples=60, deadline=None)
@given(steps())
def test_a_reached_node_draws_what_plain_decoding_would_draw_alone(step: Step) -> None:
    """Exact rows, every feature: the node's path is emitted by a sequence alone in other slots."""
    raw = step.logits.clone()
    rows = step.slots.rows(slot_ids(*step.sequences), step.sequences)
    targets = verify(step.logits, step.row_of, step.tokens, step.topology, rows)
    assert torch.equal(step.logits, raw)
    assert targets.log_p is None
    for b, each in enumerate(step.sequences):
        reached = [True]
        for node, parent in enumerate(step.parents):
            if node:
                follows = bool(step.tokens[b, node] == targets.tokens[b, parent])
                reached.append(bool(step.topology.valid[b, node]) and reached[parent] and follows)
            if not reached[node]:
                continue
            assert targets.matched[b, node]
            alone = sequence(
                each.request.sampling,
                prompt=each.request.prompt_token_ids,
                output=step.output(b, node),
                slot=0,
                seed=each.seed,
                index=each.index,
            )
            own = draw(step.row(b, node)[None], slots_for(alone).rows(torch.tensor([0]), [alone]))
            assert targets.tokens[b, node] == own.item()
        if not (rows.all_greedy and rows.adjusting is None):
            assert (targets.tokens[b] >= 0).tolist() == reached
            assert targets.matched[b].tolist() == reached


@settings(max_examples=60, deadline=None)
@given(steps(medusas=(MedusaParams(), *TYPICAL)))
def test_typical_acceptance_beside_exact_rows(step: Step) -> None:
    """Against the criterion in float64, and against the longest path of the largest summed log p."""
    rows = step.slots.rows(slot_ids(*step.sequences), step.sequences)
    targets = verify(step.logits, step.row_of, step.tokens, step.topology, rows)
    accepted = accept(step.tokens, targets, step.topology)
    for b, each in enumerate(step.sequences):
        request = each.request
        paths = {0: ([0], 0.0)}
        for node, parent in enumerate(step.parents):
            if not node:
                continue
            if parent not in paths or not step.topology.valid[b, node]:
                # With greedy rows alone every node is drawn at once, also below one that did not match.
                argmax_only = rows.all_greedy and rows.adjusting is None and step.topology.valid[b, node]
                assert argmax_only or not targets.matched[b, node]
                continue
            token, log_p = int(step.tokens[b, node]), 0.0
            follows = token == targets.tokens[b, parent]
            if request.typical:
                sampling, medusa = request.sampling, request.medusa
                filters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
                p = kept(step.adjusted(b, parent), *filters)
                entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
                threshold = min(medusa.epsilon, medusa.delta * np.exp(-entropy))
                assume(p[token] == 0 or abs(p[token] - threshold) > 1e-5)
                follows = p[token] > threshold
                log_p = np.log(p[token]) if follows else 0.0
            assert targets.matched[b, node] == follows
            if targets.log_p is not None:
                assert targets.log_p[b, node] == pytest.approx(log_p, abs=1e-4)
            if follows:
                before, summed = paths[parent]
                paths[node] = ([*before, node], summed + log_p)
        best = paths[int(accepted.last[b])]
        assert accepted.path[b, : accepted.length[b] + 1].tolist() == best[0]
        for path, summed in paths.values():
            assert len(path) <= len(best[0])
            assert len(path) < len(best[0]) or summed <= best[1] + 1e-4
        assert accepted.nodes[b] == sum(1 << node for node in paths)
        assert accepted.next_root[b] == targets.tokens[b, accepted.last[b]] >= 0


def in_order(step: Step) -> Tensor:
    """[B * N, vocab]: the logits of all nodes in the order of the grid."""
    return step.logits[step.row_of].flatten(0, 1)


@settings(max_examples=60, deadline=None)
@given(steps(medusas=(MedusaParams(), *TYPICAL)))
def test_all_nodes_at_once_are_accepted_as_those_that_are_reached(step: Step) -> None:
    """`verify_all` with every feature on, whoever asked, against `verify`."""
    slots = slot_ids(*step.sequences)
    step.slots.allocate()
    reached = verify(
        step.logits, step.row_of, step.tokens, step.topology, step.slots.rows(slots, step.sequences)
    )
    logits = in_order(step)
    raw = logits.clone()
    found = verify_all(logits, step.tokens, step.topology, step.slots.all_rows(slots))
    assert torch.equal(logits, raw)
    first, second = (accept(step.tokens, each, step.topology) for each in (reached, found))
    assert torch.equal(first.length, second.length)
    assert torch.equal(first.path, second.path)
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.nodes, second.nodes)


@settings(max_examples=60, deadline=None)
@given(steps(medusas=(MedusaParams(), *TYPICAL)))
def test_logits_of_16_bits_are_what_they_say_in_32(step: Step) -> None:
    """Draws, thresholds and logprobs are computed in float32, whatever holds the logits."""
    slots = slot_ids(*step.sequences)
    step.slots.allocate()
    short = step.logits.bfloat16()
    rows, all_rows = step.slots.rows(slots, step.sequences), step.slots.all_rows(slots)
    narrow, wide = (
        [
            verify(logits, step.row_of, step.tokens, step.topology, rows),
            verify_all(logits[step.row_of].flatten(0, 1), step.tokens, step.topology, all_rows),
        ]
        for logits in (short, short.float())
    )
    for first, second in zip(narrow, wide, strict=True):
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.matched, second.matched)
        assert first.log_p is second.log_p is None or torch.equal(first.log_p, second.log_p)
    best = best_tokens(short)
    assert token_logprobs(short, best, 2) == token_logprobs(short.float(), best, 2)


@pytest.mark.parametrize("nodes", [1, 2])
def test_no_draw_copies_more_rows_than_what_was_measured(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a dozen copies of 512 roots over 128k tokens would take 260 MB."""
    drawn: list[int] = []
    draw_nodes = sampler._draw_nodes

    def noted(logits: Tensor, part: Tensor, *args: object, **kwargs: object) -> object:
        drawn.append(len(part))
        return draw_nodes(logits, part, *args, **kwargs)

    monkeypatch.setattr(sampler, "_draw_nodes", noted)
    batch = 300
    topology = Tree.from_paths([[0]] * (nodes - 1)).topology(CPU).expand(batch)
    logits = torch.randn(batch * nodes, 7, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(batch * nodes).view(batch, nodes) % 7
    row_of = torch.arange(batch * nodes).view(batch, nodes)
    sampling = replace(rows(batch, top_p=0.9), truncates=True)
    found = verify_all(logits, tokens, topology, sampling)
    assert drawn == [128, 128, 44] * nodes
    wanted = verify(logits, row_of, tokens, topology, sampling)
    assert torch.equal(found.matched, wanted.matched)
    assert torch.equal(found.tokens[:, 0], wanted.tokens[:, 0])


@settings(max_examples=60, deadline=None)
@given(steps(temperatures=(0.8, 1.3)))
def test_a_node_whose_nucleus_is_wider_than_the_candidates_ends_the_path(step: Step) -> None:
    """Two candidates: the accepted run may be shorter, what it holds is the same."""
    slots = slot_ids(*step.sequences)
    step.slots.allocate()
    rows = step.slots.rows(slots, step.sequences)
    reached = accept(
        step.tokens, verify(step.logits, step.row_of, step.tokens, step.topology, rows), step.topology
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_NUCLEUS_CANDIDATES", 2)
        targets = verify_all(in_order(step), step.tokens, step.topology, step.slots.all_rows(slots))
    found = accept(step.tokens, targets, step.topology)
    for b in range(len(step.sequences)):
        length = int(found.length[b])
        assert length <= reached.length[b]
        path, other = found.path[b, : length + 1], reached.path[b, : length + 1]
        if not torch.equal(path, other):
            # Siblings of one token, of which only the first is left out: here their logits are drawn apart.
            assert step.tokens[b, path].tolist() == step.tokens[b, other].tolist()
            continue
        assert found.tokens[b, : length + 1].tolist() == reached.tokens[b, : length + 1].tolist()
    assert (found.tokens >= 0).all()


def test_only_a_node_that_needs_more_candidates_ends_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, child 6, its child 6, whose row is flat in the second sequence; both sequences draw 6, 6, …"""
    monkeypatch.setattr(sampler, "_NUCLEUS_CANDIDATES", 2)
    both = [
        sequence(SamplingParams(top_p=0.9), prompt=[1], output=[0], slot=slot, seed=slot) for slot in (0, 1)
    ]
    slots = slots_for(*both)
    slots.allocate()
    topology = Tree.from_paths([[0], [0, 0]]).topology(CPU).expand(2)
    logits = torch.zeros(2, 3, 7)
    logits[..., 6] = 20.0
    logits[1, 1] = 0.0
    tokens = torch.tensor([[0, 6, 6]] * 2)
    targets = verify_all(logits.flatten(0, 1), tokens, topology, slots.all_rows(slot_ids(*both)))
    assert targets.matched.tolist() == [[True, True, True], [True, False, False]]
    assert accept(tokens, targets, topology).next_root.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("epsilon", "delta", "follows"),
    [
        (0.0, 1.0, [True, True, False]),  # whatever has any mass; nothing that top_k cut
        (1.0, 0.0, [True, True, False]),
        (1.0, 1e30, [False, False, False]),
        (0.3, 1e30, [True, False, False]),  # p is 0.75, 0.25, 0
        (1.0, 0.4, [True, True, False]),  # exp(-H) is 0.57: the threshold is 0.228
        (1.0, 0.5, [True, False, False]),
    ],
)
def test_the_typical_threshold_by_hand(epsilon: float, delta: float, follows: list[bool]) -> None:
    medusa = MedusaParams(acceptance=Acceptance.TYPICAL, epsilon=epsilon, delta=delta)
    each = sequence(SamplingParams(top_k=2), prompt=[1], output=[0], medusa=medusa)
    rows = slots_for(each, vocab=3).rows(slot_ids(each), [each])
    topology = Tree.from_paths([[0], [1], [2]]).topology(CPU)
    logits = torch.tensor([0.75, 0.25, 0.2]).log().expand(4, -1)
    targets = verify(logits, torch.arange(4)[None], torch.tensor([[0, 0, 1, 2]]), topology, rows)
    assert targets.matched.tolist() == [[True, *follows]]


def test_a_greedy_row_is_exact_beside_a_typical_one() -> None:
    """Both ask for typical acceptance with a threshold of 0, which would accept any child."""
    medusa = MedusaParams(acceptance=Acceptance.TYPICAL, epsilon=0.0)
    greedy = sequence(SamplingParams(temperature=0), prompt=[1], output=[0], medusa=medusa)
    sampled = sequence(SamplingParams(), prompt=[1], output=[0], slot=1, medusa=medusa)
    both = [greedy, sampled]
    topology = Tree.from_paths([[0], [1]]).topology(CPU).expand(2)
    logits = torch.zeros(6, 7)
    logits[:, 4] = 1.0
    tokens = torch.tensor([[0, 4, 5]] * 2)
    rows = slots_for(*both).rows(slot_ids(*both), both)
    targets = verify(logits, torch.arange(6).view(2, 3), tokens, topology, rows)
    assert targets.matched.tolist() == [[True, True, False], [True, True, True]]


def test_where_no_node_is_drawn_beyond_the_accepted_ones_only_their_rows_are_read() -> None:
    """Of 1 + 3 nodes the root and its draw are reached; the rows of the others may hold anything."""
    each = sequence(SamplingParams(temperature=0, presence_penalty=1.0), prompt=[1], output=[0])
    rows = slots_for(each).rows(slot_ids(each), [each])
    topology = Tree.from_paths([[0], [1], [1, 0]]).topology(CPU)
    logits = torch.full((4, 7), float("nan"))
    logits[0] = logits[1] = torch.arange(7.0)
    targets = verify(logits, torch.arange(4)[None], torch.tensor([[0, 6, 2, 2]]), topology, rows)
    assert targets.tokens.tolist() == [[6, 5, -1, -1]]  # the penalty on the drafted 6 makes 5 the next


@pytest.mark.parametrize("greedy", [True, False])
def test_invalid_nodes_match_nothing_whatever_row_they_point_at(greedy: bool) -> None:
    each = sequence(SamplingParams(temperature=0.0 if greedy else 1.0), prompt=[1], output=[0])
    rows = slots_for(each).rows(slot_ids(each), [each])
    shape = Tree.from_paths([[0], [0, 0]]).topology(CPU)
    topology = replace(shape, valid=torch.tensor([[True, False, True]]))
    logits = torch.zeros(2, 7)
    logits[:, 4] = 60.0
    tokens = torch.tensor([[0, 4, 4]])
    targets = verify(logits, torch.tensor([[0, 0, 1]]), tokens, topology, rows)
    assert targets.tokens[0, 0] == 4
    assert targets.tokens[0, 1] == -1
    assert not targets.matched[0, 1]
    assert accept(tokens, targets, topology).length.item() == 0


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-38, 1e-20, 1e-6])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "top_k": 10, "min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float, filters: dict) -> None:
    logits = torch.randn(20, 300) * 30
    drawn = draw(logits, rows(20, temperature=temperature, **filters))
    assert torch.equal(drawn, logits.argmax(-1))


def test_a_nan_row_still_draws_an_id_that_exists() -> None:
    drawn = draw(torch.full((2, 30), float("nan")), rows(2))
    assert ((drawn >= 0) & (drawn < 30)).all()


def test_a_filter_without_top_p_never_sorts_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the whole row was sorted")

    monkeypatch.setattr(Tensor, "sort", refuse)
    logits = torch.randn(16, 5000)
    for filters in ({"top_k": 50}, {"min_p": 0.01}, {"top_k": 300, "min_p": 0.001}):
        draw(logits, rows(16, **filters))
    with pytest.raises(AssertionError, match="sorted"):
        draw(logits * 0.01, rows(16, top_p=0.9))
