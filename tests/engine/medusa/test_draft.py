"""Trees of a batch: what is put together is what each sequence would have alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from engine.medusa.draft import Drafter
from engine.medusa.heads import HeadDrafter
from engine.medusa.tree import TreeShape, default_tree
from tests.support import load_heads, save_random_heads

CPU = torch.device("cpu")
HIDDEN, VOCAB, CHAIN = 16, 40, 6


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Drafter:
    file = save_random_heads(tmp_path_factory.mktemp("heads") / "h.safetensors", hidden=HIDDEN, vocab=VOCAB)
    heads = load_heads(file, hidden_size=HIDDEN, vocab_size=VOCAB)
    shared = torch.randn(VOCAB, HIDDEN)
    return Drafter(
        HeadDrafter(heads, lambda h: F.linear(h, shared), default_tree(4), vocab_size=VOCAB, device=CPU), CPU
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, CHAIN)), min_size=1, max_size=5))
def test_a_batch_is_its_sequences(drafter: Drafter, shapes: list[tuple[int, int]]) -> None:
    count = len(shapes)
    root, hidden = torch.randint(0, VOCAB, (count,)), torch.randn(count, HIDDEN)
    chain = torch.randint(0, VOCAB, (count, CHAIN))
    draft = drafter.draft(root, hidden, chain, [TreeShape(*shape) for shape in shapes])
    rows = draft.rows(draft.tokens)
    assert len(rows) == sum(1 + h + c for h, c in shapes)
    visible = draft.topology.visible()
    first = 0
    for b, (h, c) in enumerate(shapes):
        alone = drafter.draft(root[b : b + 1], hidden[b : b + 1], chain[b : b + 1], [TreeShape(h, c)])
        nodes = 1 + h + c
        assert alone.index is None
        assert torch.equal(draft.tokens[b, :nodes], alone.tokens[0])
        assert torch.equal(draft.topology.parents[b, :nodes], alone.topology.parents[0])
        assert torch.equal(draft.topology.depths[b, :nodes], alone.topology.depths[0])
        assert torch.equal(draft.topology.ancestors[b, :nodes], alone.topology.ancestors[0])
        assert torch.equal(visible[b, :nodes, :nodes], alone.topology.visible()[0])
        assert not visible[b, :nodes, nodes:].any()
        assert draft.topology.valid[b].tolist() == [True] * nodes + [False] * (draft.tokens.shape[1] - nodes)
        assert draft.row_of[b, :nodes].tolist() == list(range(first, first + nodes))
        assert torch.equal(rows[first : first + nodes], alone.tokens[0])
        assert alone.tokens[0, 1 + h :].tolist() == chain[b, :c].tolist()
        first += nodes
    assert int(draft.row_of.min()) >= 0
    assert int(draft.row_of.max()) < len(rows)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, CHAIN)), min_size=1, max_size=5))
def test_fixed_shapes_hold_the_same_trees(drafter: Drafter, shapes: list[tuple[int, int]]) -> None:
    """In a grid of 64 nodes, with more on offer than any of them takes; what is left repeats the root."""
    count, trees = len(shapes), [TreeShape(*shape) for shape in shapes]
    root, hidden = torch.randint(0, VOCAB, (count,)), torch.randn(count, HIDDEN)
    chain = torch.randint(0, VOCAB, (count, CHAIN))
    most = TreeShape(40, CHAIN)
    grid = torch.from_numpy(drafter.grid(trees, most.head_nodes, 64))
    fixed = drafter.fixed(root, hidden, chain, most, grid, 6)
    assert fixed.index is None
    assert fixed.padded
    for b, tree in enumerate(trees):
        alone = drafter.draft(root[b : b + 1], hidden[b : b + 1], chain[b : b + 1], [tree])
        nodes = tree.num_nodes
        assert torch.equal(fixed.tokens[b, :nodes], alone.tokens[0])
        for name in ("parents", "depths", "ancestors", "valid"):
            assert torch.equal(getattr(fixed.topology, name)[b, :nodes], getattr(alone.topology, name)[0])
        assert (fixed.tokens[b, nodes:] == root[b]).all()
        assert not fixed.topology.valid[b, nodes:].any()
        assert not fixed.topology.depths[b, nodes:].any()
        assert (fixed.topology.ancestors[b, nodes:] == 1).all()
        assert drafter.parents(tree) == alone.topology.parents[0].tolist()
        assert drafter.depth(tree) == alone.topology.depths.max()
    assert fixed.row_of.flatten().tolist() == list(range(64 * count))


def test_branches_that_do_not_exist_are_refused() -> None:
    root, hidden = torch.tensor([1]), torch.zeros(1, HIDDEN)
    with pytest.raises(ValueError, match="there are no heads"):
        Drafter(None, CPU).draft(root, hidden, None, [TreeShape(1, 0)])
    with pytest.raises(ValueError, match="there is no lookup"):
        Drafter(None, CPU).draft(root, hidden, None, [TreeShape(0, 1)])
