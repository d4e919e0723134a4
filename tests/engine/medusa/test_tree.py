import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from engine.errors import TreeError
from engine.medusa.tree import Tree, default_tree, greedy_tree
from tests.strategies import trees

CPU = torch.device("cpu")
PUBLISHED = Path(__file__).parents[3] / "configs" / "trees"


@given(trees())
def test_every_prefix_is_a_tree(tree: Tree) -> None:
    for size in range(1, tree.size + 1):
        prefix = tree.prefix(size)
        assert prefix.size == size
        assert all(path[:-1] == () or path[:-1] in prefix.paths for path in prefix.paths)


@given(trees(min_nodes=1))
def test_topology_says_what_the_paths_say(tree: Tree) -> None:
    topology = tree.topology(CPU)
    nodes = [(), *tree.paths]
    visible = topology.visible()[0]
    for i, path in enumerate(nodes):
        assert topology.depths[0, i] == len(path)
        assert nodes[topology.parents[0, i]] == path[:-1]
        for j, other in enumerate(nodes):
            assert bool(visible[i, j]) == (path[: len(other)] == other)
    assert topology.max_depth == max(map(len, nodes))
    assert tree.width == max((max(path) for path in tree.paths), default=-1) + 1


@given(trees(), st.integers(0, 8))
def test_a_chain_stands_beside_the_tree(tree: Tree, chain: int) -> None:
    """Its nodes see the root and each other only, and the tree's nodes none of them."""
    topology = tree.topology(CPU, chain)
    alone = tree.topology(CPU)
    visible = topology.visible()[0]
    size = tree.size
    assert torch.equal(visible[:size, :size], alone.visible()[0])
    assert torch.equal(topology.parents[:, :size], alone.parents)
    assert not visible[:size, size:].any()
    assert not visible[size:, 1:size].any()
    assert visible[size:, 0].all()
    assert torch.equal(visible[size:, size:], torch.ones(chain, chain, dtype=torch.bool).tril())
    assert topology.depths[0, size:].tolist() == list(range(1, chain + 1))
    assert topology.parents[0, size:].tolist() == [0, *range(size, size + chain - 1)][:chain]
    with pytest.raises(TreeError, match="exceed the 64"):
        tree.topology(CPU, 65 - size)


def test_the_64th_node_uses_the_sign_bit() -> None:
    tree = Tree.from_paths([[0] * depth for depth in range(1, 64)])
    visible = tree.topology(CPU).visible()[0]
    assert torch.equal(visible, torch.ones(64, 64, dtype=torch.bool).tril())


@given(trees(min_nodes=1))
def test_choices_point_into_the_head_table(tree: Tree) -> None:
    for path, flat in zip(tree.paths, tree.choices(CPU).tolist(), strict=True):
        assert divmod(flat, tree.width) == (len(path) - 1, path[-1])


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        ([[]], "non-empty"),
        ([[-1]], "ranks from 0"),
        ([[0], [0]], "twice"),
        ([[0, 0], [0]], "before its parent"),
        ([[rank] for rank in range(64)], "at most 64"),
    ],
)
def test_malformed_trees_are_refused(paths: list[list[int]], reason: str) -> None:
    with pytest.raises(TreeError, match=reason):
        Tree.from_paths(paths)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1]", '[["a"]]', "[[true]]", "[[0.5]]", "[[0, 0]]"])
def test_a_bad_tree_file_is_refused(tmp_path, content) -> None:
    file = tmp_path / "tree.json"
    file.write_text(content)
    with pytest.raises(TreeError, match=r"tree\.json"):
        Tree.load(file)


def test_a_tree_file_round_trips(tmp_path) -> None:
    tree = default_tree(4)
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(tree.paths))
    assert Tree.load(file) == tree


def test_a_prefix_longer_than_the_list_is_refused() -> None:
    with pytest.raises(TreeError, match="holds 3"):
        Tree.from_paths([[0], [1]]).prefix(4)


@given(
    st.lists(st.lists(st.floats(0.01, 0.5), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 12),
)
def test_greedy_takes_the_likeliest_nodes(table: list[list[float]], size: int) -> None:
    table = [sorted(row, reverse=True) for row in table]

    def all_paths(prefix: tuple[int, ...], probability: float) -> list[float]:
        if len(prefix) == len(table):
            return []
        steps = [(rank, probability * p) for rank, p in enumerate(table[len(prefix)])]
        return [p for _, p in steps] + [q for rank, p in steps for q in all_paths((*prefix, rank), p)]

    probabilities = sorted(all_paths((), 1.0), reverse=True)
    if size - 1 > len(probabilities):
        with pytest.raises(TreeError, match="offer"):
            greedy_tree(table, size)
        return
    tree = greedy_tree(table, size)

    def probability(path: tuple[int, ...]) -> float:
        product = 1.0
        for head, rank in enumerate(path):
            product *= table[head][rank]
        return product

    assert sorted(map(probability, tree.paths), reverse=True) == pytest.approx(probabilities[: size - 1])


@pytest.mark.parametrize(("heads", "nodes"), [(1, 11), (2, 64), (5, 64)])
def test_the_default_tree_fits_the_heads(heads: int, nodes: int) -> None:
    tree = default_tree(heads)
    assert tree.size == nodes
    assert tree.depth <= heads


def test_the_published_trees_load_and_are_what_their_table_says() -> None:
    """63 distinct paths each, in the greedy order: parents and better-ranked siblings come first."""
    table = re.findall(r"^\| (\S+\.json) \| (\d+) \| (\d+) \|$", (PUBLISHED / "README.md").read_text(), re.M)
    assert {name for name, _, _ in table} == {file.name for file in PUBLISHED.glob("*.json")}
    assert len(table) == 9
    for name, size, depth in table:
        tree = Tree.load(PUBLISHED / name)
        assert (tree.size, tree.depth, tree.width) == (int(size), int(depth), 10)
        for path in tree.paths:
            if path[-1]:
                assert tree.paths.index((*path[:-1], path[-1] - 1)) < tree.paths.index(path)
