import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import Tensor

from engine.medusa.tree import Tree
from engine.sampler import SamplingRows, draw, draw_tree, uniform

CPU = torch.device("cpu")


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
    drawn = draw(logits.expand(20_000, -1), rows(20_000, top_p=0.9))
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
def test_uniform_is_a_pure_function_of_its_arguments(seed: int, choice: int, position: int) -> None:
    def at(*values: int) -> float:
        return uniform(*(torch.tensor([value]) for value in values)).item()

    u = at(seed, choice, position)
    assert 0 <= u < 1
    assert u == at(seed, choice, position)
    others = [at(seed ^ 1, choice, position), at(seed, choice + 1, position), at(seed, choice, position + 1)]
    assert sum(u == other for other in others) <= 1


def test_uniform_is_uniform_along_each_argument() -> None:
    count = torch.arange(50_000)
    zero = torch.zeros_like(count)
    for arguments in ((count, zero, zero), (zero, count, zero), (zero, zero, count)):
        u = uniform(*arguments).numpy()
        assert stats.kstest(u, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02


def test_every_draw_lands_on_a_possible_token() -> None:
    """The last token with mass is the largest a draw can give, however the sums round."""
    logits = torch.full((4096, 300), float("-inf"))
    logits[:, 7], logits[:, 9] = 0.0, 0.0
    assert set(draw(logits, rows(4096)).tolist()) == {7, 9}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_reached_nodes_of_a_tree_draw_as_plain_decoding_would(seed: int, truncate: bool) -> None:
    """A node's target is the draw of its row at its depth, and unreached nodes match nothing."""
    generator = torch.Generator().manual_seed(seed)
    tree = Tree.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    topology, batch, vocab = tree.topology(CPU).expand(5), 5, 4
    logits = torch.randn(batch, tree.size, vocab, generator=generator)
    tokens = torch.randint(0, vocab, (batch, tree.size), generator=generator)
    parameters = rows(batch, position=3, **({"top_k": 3, "top_p": 0.9} if truncate else {}))
    targets = draw_tree(logits, tokens, topology, parameters)
    for b in range(batch):
        for node, (parent, depth) in enumerate(zip(tree.parents, topology.depths[0].tolist(), strict=True)):
            row = parameters.select(torch.tensor([b]))
            row.position.add_(depth)
            own = draw(logits[b, node][None], row).item()
            reached = parent < 0 or (targets[b, parent] == tokens[b, node] and targets[b, parent] >= 0)
            assert targets[b, node] == (own if reached else -1)


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
