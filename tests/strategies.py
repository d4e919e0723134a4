"""Hypothesis strategies shared by the tests."""

from hypothesis import strategies as st

from engine.medusa.tree import Tree


@st.composite
def trees(draw: st.DrawFn, min_nodes: int = 0, max_nodes: int = 20, max_rank: int = 3) -> Tree:
    """Trees of up to `max_nodes` listed nodes, grown node by node from random parents."""
    paths: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(min_nodes, max_nodes))):
        parent = draw(st.sampled_from([(), *paths]))
        taken = {path[-1] for path in paths if path[:-1] == parent}
        free = [rank for rank in range(max_rank + 1) if rank not in taken]
        if free:
            paths.append((*parent, draw(st.sampled_from(free))))
    return Tree.from_paths(paths or [(0,)] * bool(min_nodes))
