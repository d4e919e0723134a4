import torch
from hypothesis import given, strategies as st

from engine.medusa.accept import accept_exact
from engine.medusa.tree import Topology, Tree
from tests.strategies import trees

CPU = torch.device("cpu")


def walk(tree: Tree, tokens: list[int], targets: list[int], valid: list[bool]) -> tuple[list[int], list[int]]:
    """The rule as one would say it: the longest run of nodes that each repeat the draw at their parent.

    Returns its nodes and the emitted tokens.
    """
    paths: list[list[int]] = [[0]]
    for node, parent in enumerate(tree.parents[1:], start=1):
        for path in [p for p in paths if p[-1] == parent]:
            if valid[node] and tokens[node] == targets[parent]:
                paths.append([*path, node])
    best = max(paths, key=lambda path: (len(path), -path[-1]))
    return best, [*(tokens[node] for node in best[1:]), targets[best[-1]]]


@given(st.data(), st.integers(1, 4))
def test_the_walk(data: st.DataObject, batch: int) -> None:
    """Few distinct tokens, so that siblings repeat and long runs happen; rows of a batch are independent."""
    tree = data.draw(trees(max_nodes=24))
    token_rows = st.lists(
        st.lists(st.integers(0, 2), min_size=tree.size, max_size=tree.size), min_size=batch, max_size=batch
    )
    tokens, targets = data.draw(token_rows), data.draw(token_rows)
    valid = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=tree.size, max_size=tree.size), min_size=batch, max_size=batch
        )
    )
    shape = tree.topology(CPU).expand(batch)
    topology = Topology(shape.parents, shape.depths, shape.ancestors, torch.tensor(valid), shape.max_depth)
    accepted = accept_exact(torch.tensor(tokens), torch.tensor(targets), topology)
    for row in range(batch):
        path, emitted = walk(tree, tokens[row], targets[row], valid[row])
        length = int(accepted.length[row])
        assert accepted.path[row, : length + 1].tolist() == path
        assert accepted.tokens[row, : length + 1].tolist() == emitted
        assert set(accepted.path[row, length:].tolist()) == {path[-1]}
        assert accepted.last[row] == path[-1]
        assert accepted.next_root[row] == emitted[-1]


def test_where_siblings_repeat_the_deepest_node_wins() -> None:
    tree = Tree.from_paths([[0], [1], [1, 0]])
    tokens, targets = torch.tensor([[5, 7, 7, 8]]), torch.tensor([[7, 8, 8, 9]])
    accepted = accept_exact(tokens, targets, tree.topology(CPU))
    assert accepted.path.tolist() == [[0, 2, 3]]
    assert accepted.tokens.tolist() == [[7, 8, 9]]


def test_token_0_is_a_token_like_any_other() -> None:
    """Others padded paths with token 0 and accepted the padding."""
    tree = Tree.from_paths([[0], [0, 0], [1]])
    accepted = accept_exact(torch.tensor([[3, 0, 0, 4]]), torch.tensor([[4, 0, 0, 6]]), tree.topology(CPU))
    assert accepted.length.tolist() == [1]
    assert accepted.tokens[0, :2].tolist() == [4, 6]


def test_the_root_alone_is_plain_decoding() -> None:
    accepted = accept_exact(torch.tensor([[3]]), torch.tensor([[4]]), Tree(()).topology(CPU))
    assert (accepted.length.tolist(), accepted.tokens.tolist(), accepted.path.tolist()) == ([0], [[4]], [[0]])
