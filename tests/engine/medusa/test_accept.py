import torch
from hypothesis import given, strategies as st
from torch import Tensor

from engine.medusa.accept import Accepted, Targets, accept
from engine.medusa.tree import Topology, Tree
from tests.strategies import trees

CPU = torch.device("cpu")


def accept_draws(tokens: Tensor, draws: Tensor, topology: Topology) -> Accepted:
    """`accept` of exact rows: a node may follow where it is the draw at its parent."""
    matched = topology.valid & (tokens == draws.gather(1, topology.parents))
    matched[:, 0] = True
    return accept(tokens, Targets(tokens=draws, matched=matched), topology)


def walk(
    tree: Tree, tokens: list[int], targets: list[int], valid: list[bool]
) -> tuple[list[int], list[int], int]:
    """The rule as one would say it: the longest run of nodes that each repeat the draw at their parent.

    Returns its nodes, the emitted tokens, and a bit for each node at the end of such a run.
    """
    paths: list[list[int]] = [[0]]
    for node, parent in enumerate(tree.parents[1:], start=1):
        for path in [p for p in paths if p[-1] == parent]:
            if valid[node] and tokens[node] == targets[parent]:
                paths.append([*path, node])
    best = max(paths, key=lambda path: (len(path), -path[-1]))
    bits = sum(1 << path[-1] for path in paths)
    return best, [*(tokens[node] for node in best[1:]), targets[best[-1]]], bits


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
    accepted = accept_draws(torch.tensor(tokens), torch.tensor(targets), topology)
    for row in range(batch):
        path, emitted, bits = walk(tree, tokens[row], targets[row], valid[row])
        length = int(accepted.length[row])
        assert accepted.path[row, : length + 1].tolist() == path
        assert accepted.tokens[row, : length + 1].tolist() == emitted
        assert set(accepted.path[row, length:].tolist()) == {path[-1]}
        assert accepted.last[row] == path[-1]
        assert accepted.next_root[row] == emitted[-1]
        assert accepted.nodes[row] == bits


def test_where_siblings_repeat_the_deepest_node_wins() -> None:
    tree = Tree.from_paths([[0], [1], [1, 0]])
    tokens, targets = torch.tensor([[5, 7, 7, 8]]), torch.tensor([[7, 8, 8, 9]])
    accepted = accept_draws(tokens, targets, tree.topology(CPU))
    assert accepted.path.tolist() == [[0, 2, 3]]
    assert accepted.tokens.tolist() == [[7, 8, 9]]


def test_token_0_is_a_token_like_any_other() -> None:
    """Others padded paths with token 0 and accepted the padding."""
    tree = Tree.from_paths([[0], [0, 0], [1]])
    accepted = accept_draws(torch.tensor([[3, 0, 0, 4]]), torch.tensor([[4, 0, 0, 6]]), tree.topology(CPU))
    assert accepted.length.tolist() == [1]
    assert accepted.tokens[0, :2].tolist() == [4, 6]


def test_the_root_alone_is_plain_decoding() -> None:
    accepted = accept_draws(torch.tensor([[3]]), torch.tensor([[4]]), Tree(()).topology(CPU))
    assert (accepted.length.tolist(), accepted.tokens.tolist(), accepted.path.tolist()) == ([0], [[4]], [[0]])
    assert accepted.nodes.tolist() == [1]


def test_a_chain_of_64_is_accepted_whole_and_bit_63_is_the_sign() -> None:
    chain = Tree.from_paths([(0,) * depth for depth in range(1, 64)])
    tokens = torch.arange(64)[None]
    accepted = accept_draws(tokens, tokens + 1, chain.topology(CPU))
    assert accepted.length.item() == 63
    assert accepted.nodes.item() == -1
    assert accepted.path.tolist() == tokens.tolist()
    assert accepted.tokens.tolist() == (tokens + 1).tolist()


def test_the_64th_node_of_a_star_is_the_only_one_to_match() -> None:
    star = Tree.from_paths([(rank,) for rank in range(63)])
    tokens = torch.arange(64)[None]
    accepted = accept_draws(tokens, torch.full((1, 64), 63), star.topology(CPU))
    assert accepted.path.tolist() == [[0, 63]]
    assert accepted.nodes.item() == 1 - 2**63


def test_a_match_below_a_node_that_did_not_match_is_not_accepted() -> None:
    tree = Tree.from_paths([[0], [0, 0], [1]])
    matched = torch.tensor([[True, False, True, True]])
    targets = Targets(tokens=torch.tensor([[9, 9, 9, 7]]), matched=matched)
    accepted = accept(torch.tensor([[1, 2, 3, 4]]), targets, tree.topology(CPU))
    assert accepted.path.tolist() == [[0, 3, 3]]
    assert accepted.tokens.tolist() == [[4, 7, 7]]
    assert accepted.nodes.item() == 0b1001


def test_depth_goes_before_probability_and_probability_decides_between_equals() -> None:
    """Node 1 is likeliest and shallow; 4 and 5 are equally deep, and 5's path has the larger sum."""
    tree = Tree.from_paths([[0], [1], [2], [1, 0], [2, 0]])
    log_p = torch.tensor([[0.0, -0.1, -2.0, -1.0, -0.5, -1.0]])
    targets = Targets(torch.arange(10, 16)[None], torch.ones(1, 6, dtype=torch.bool), log_p)
    accepted = accept(torch.tensor([[0, 1, 2, 3, 4, 5]]), targets, tree.topology(CPU))
    assert accepted.path.tolist() == [[0, 3, 5]]
    assert accepted.tokens.tolist() == [[3, 5, 15]]
