"""Lookup chains beside the heads' tree: paid for what they add to it, in simulated steps."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from engine.medusa.adaptive import AdaptiveTree
from engine.medusa.records import LookupRecord, considered_sizes
from engine.medusa.step_times import StepTimes
from engine.medusa.tree import Tree
from tests.engine.medusa.by_hand import adaptive, chances, cpu_like, observe, propose, sequence


def test_a_chain_that_repeats_the_heads_is_not_paid_twice() -> None:
    """Where heads and chain are right together, the chain's gain beyond the heads is learned to be small."""
    gains = []
    for together in (True, False):
        chooser, made = adaptive(8), sequence()
        for _ in range(150):
            propose(chooser, made, [1] * 8, 8)
            chooser.choose([made])
            head = 0b10 if together and made.head_nodes else 0
            chain = 0 if not made.lookup_nodes else 1 << (1 + made.head_nodes)
            observe(chooser, [made], [1 | head | chain], cpu_like(1, made.num_nodes), 0.0, [[1, 0]])
        gains.append(chooser._beyond[0] / chooser._beyond[1])
    assert gains[0] < gains[1]


class OneGuess:
    """One stream with a head's node and a chain of one token; each comes true in half of the steps.

    Args:
        apart: share of the steps in which the chain does and the head does not.
        node_s: seconds of a node.
    """

    def __init__(self, apart: float, node_s: float) -> None:
        self.node_s, head = node_s, Tree.from_paths([[0]])
        times = StepTimes({1: [(n, 0.018 + node_s * n) for n in (1, 2, 4)]}, {1: [0.0, 0.0]})
        self.chooser, self.stream = AdaptiveTree(times, head, LookupRecord(1), 512), sequence()
        self.rng, self.apart = random.Random(0), apart

    @property
    def beyond(self) -> float:
        return float(self.chooser._beyond[0] / self.chooser._beyond[1])

    def run(self, steps: int) -> float:
        """The share of them in which both were tried."""
        made, both = self.stream, 0
        for _ in range(steps):
            draw = self.rng.random()
            head, chain = draw < 0.5, self.apart <= draw < 0.5 or draw >= 1.0 - self.apart
            propose(self.chooser, made, [1], 1)
            self.chooser.choose([made])
            mask = 1 | (head << 1 if made.head_nodes else 0)
            mask |= chain << 1 + made.head_nodes if made.lookup_nodes else 0
            took = 0.018 + self.node_s * made.num_nodes
            observe(self.chooser, [made], [mask], took, 0.0, [[int(chain)]])
            both += made.num_nodes == 3
        return both / steps


def test_chains_beside_heads_are_worth_the_share_that_comes_true() -> None:
    """Multiplied, the chances say a quarter of the steps; it is a tenth."""
    world, found = OneGuess(0.1, 0.0), []
    for _ in range(50):
        assert world.run(100) > 0.3
        found.append(world.beyond)
    assert np.mean(found[5:]) == pytest.approx(0.4, abs=0.08)


def test_chains_beside_heads_are_tried_again() -> None:
    """They were right only where the heads were, and rarely tried; then they are right where those fail."""
    world = OneGuess(0.0, 0.0005)
    world.run(1000)
    assert 0.0 < world.run(5000) < 0.05
    world.apart = 0.5
    world.run(2000)
    assert world.run(200) > 0.9


@pytest.mark.parametrize(("cap", "room", "left"), [(5, 1000, 1), (None, 3, 2)])
def test_what_caps_take_away_is_not_expected(cap: int | None, room: int, left: int) -> None:
    """A stream that may have few nodes, or is about to end, is as one whose chain is short."""
    times = StepTimes({2: [(2, 0.03), (4, 0.03)]}, {2: [0.0, 0.0]})
    expected = []
    for length, second in ((8, sequence(1, cap=cap, room=room)), (left, sequence(1))):
        chooser = AdaptiveTree(times, Tree.from_paths([[0]]), LookupRecord(8), 512)
        sequences = [sequence(0), second]
        for made, size in zip(sequences, (8, length), strict=True):
            propose(chooser, made, [1] * size, 1)
        chooser.choose(sequences)
        assert [(made.head_nodes, made.lookup_nodes) for made in sequences] == [(1, 8), (1, left)]
        expected.append(chooser.expected.beyond)
    assert expected[0] == pytest.approx(expected[1])


def test_what_is_expected_of_the_trees_is_what_they_hold() -> None:
    """A token each, the head's chance, and what the chain adds to it."""
    times = StepTimes({2: [(2, 0.03), (4, 0.03)]}, {2: [0.0, 1e-6]})
    chooser = AdaptiveTree(times, Tree.from_paths([[0]]), LookupRecord(4), 512)
    sequences = [sequence(0), sequence(1)]
    propose(chooser, sequences[0], [1] * 4, 1)
    slots, many = chooser._seats.seat(sequences), np.full(2, 100)
    taken = chooser._search(times.costs(2, 50, 512), 50, slots, many, many, False)
    assert taken.nodes.tolist() == [[1, 4], [1, 0]]
    head, chain = chooser._reach[1, 0], chances(chooser._lookup, chooser._seats)[0]
    added = np.minimum.accumulate(chain * np.array([1.0 - head, 1.0, 1.0, 1.0]))
    assert taken.beyond == pytest.approx(added.sum())
    assert taken.tokens == pytest.approx(2 * (1.0 + head) + added.sum())
    assert (taken.rows, taken.cells, taken.draft_s) == (8.0, 4, 1e-6)


def test_of_trees_that_caps_cut_what_is_left_is_expected() -> None:
    """Between two sizes the smaller one's tokens, and drafting as for the largest tree, whoever has it."""
    heads = Tree.from_paths([[i] for i in range(16)])
    sizes = considered_sizes(heads)
    between = next(size + 1 for size, after in pairwise(sizes) if after > size + 1)
    times = StepTimes({3: [(3, 0.03), (60, 0.03)]}, {3: [1e-6 * index for index in range(len(sizes))]})
    chooser = AdaptiveTree(times, heads, LookupRecord(0), 512)
    chooser._reach[:, 0] = np.array(sizes) / 20
    sequences = [sequence(0), sequence(1, cap=between + 1), sequence(2, cap=1)]
    slots, many = chooser._seats.seat(sequences), np.full(3, 100)
    taken = chooser._search(times.costs(3, 50, 512), 50, slots, many, many, False)
    assert taken.nodes[:, 0].tolist() == [16, between, 0]
    reached = chooser._reach[[len(sizes) - 1, sizes.index(between - 1)], 0]
    assert taken.tokens == pytest.approx(3.0 + reached.sum())
    assert taken.draft_s == times.costs(3, 50, 512).drafts[len(sizes) - 1]


def test_a_step_shorter_than_what_is_thought_to_be_drafting_is_learned_from() -> None:
    times = StepTimes({1: [(1, 0.03), (4, 0.03)]}, {1: [0.0, 0.1]})
    before = times.predict(1, 50, np.array([1.0, 4.0]))
    for _ in range(50):
        times.observe(1, 50, 4.0, 0.02, 0.1)
    after = times.predict(1, 50, np.array([1.0, 4.0]))
    assert np.isfinite(after).all()
    assert 0.0 < after[1] < before[1]
