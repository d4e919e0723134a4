"""The choice of the trees where steps are captured: one bucket, which each sequence fills its own way."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from engine.medusa import records
from engine.medusa.adaptive import AdaptiveTree
from engine.medusa.buckets import Buckets
from engine.medusa.choice_captured import choose_captured, fill, worth
from engine.medusa.choice_kernels import shares
from engine.medusa.records import LookupRecord
from engine.medusa.step_times import StepTimes
from engine.medusa.tree import Tree
from engine.types import Sequence
from tests.engine.medusa.by_hand import HEADS, chances_of_chains, observe, propose, sequence
from tests.engine.medusa.test_wrong_times import GPU_LIKE, NODES, SIZES, gpu_like

GRID = Buckets(tuple(GPU_LIKE), NODES, 512)


def adaptive(heads: Tree | None = HEADS, lookup: int = 0) -> AdaptiveTree:
    points = {b: [(b * n, gpu_like(b, b * n)) for n in NODES if b * n <= 512] for b in GPU_LIKE}
    drafts = {b: [0.0] + [0.00004] * (len(SIZES) - 1) if heads else [0.0] for b in GPU_LIKE}
    times = StepTimes(points, drafts, context=96, buckets=GRID)
    return AdaptiveTree(times, heads, LookupRecord(lookup), 512)


@pytest.mark.parametrize("host_s", [0.0, 0.026])
@pytest.mark.parametrize("others_wait", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_there_are(seed: int, others_wait: bool, host_s: float) -> None:
    """Every bucket, filled in every way, by hand; also where the host takes as long as some of them."""
    rng = np.random.default_rng(seed)
    B, D = 3, 4
    grid, drafts, beyond = Buckets((1, 2, 4), (1, 2, 4, 8), 16), [0.0, 0.002, 0.003], 0.7
    knots = [(4 * n, 0.02 + 0.002 * n * rng.uniform(0.5, 1.5)) for n in (1, 2, 4, 8)]
    costs = StepTimes({4: knots}, {4: drafts}, context=50, buckets=grid).costs(B, 50, 16)
    costs = costs._replace(host=host_s)
    sizes, reach = np.array([0, 1, 3]), np.array([[0.0, 0.0], [0.6, 0.0], [0.7, 0.3]])
    chains, own, left = chances_of_chains(rng, B, D), rng.uniform(0.5, 1.5, B), rng.uniform(1.0, 256.0, B)

    def tokens(b: int, size: int, length: int) -> float:
        heads = np.minimum(np.append(own[b] * reach[size], [0.0, 0.0]), 0.99)
        gain = (chains[b] * (1.0 - heads))[:length].sum()
        return float(1.0 + heads.sum() + gain * (beyond if size else 1.0))

    def best_of(option: int) -> float:
        cells, heads = 2 ** (option // 2) - 1, option % 2
        if (heads and not cells) or 4 * (cells + 1) > 16:
            return 0.0
        most = [max(c for c in range(1 + 2 * heads) if sizes[c] <= cells - n) for n in range(cells + 1)]
        # As many nodes of the heads as the chain leaves.
        ways = [[tokens(b, most[n], n) for n in range(min(cells, D - b) + 1)] for b in range(B)]
        found = np.array([max(each) for each in ways])
        seconds = np.interp(4 * (cells + 1), costs.rows, costs.seconds)
        seconds += drafts[max(c for c in range(3) if sizes[c] <= cells)] if heads else 0.0
        value = B / (1.0 / found).sum() if others_wait else ((left / found) ** 8).mean() ** -0.125
        return float((1.02 if not cells else 1.0) * value / max(seconds, host_s))

    best = [best_of(option) for option in range(8)]
    assert best[6:] == [0.0, 0.0]  # they have more rows than a step may
    arguments = costs, chains, own, left, others_wait, sizes, reach, beyond, 1.02
    for current in (0, 3, 4):  # one that another must outdo by far is kept
        assert choose_captured(*arguments, 9.0, current, -1)[0] == current
    for forced in (-1, 0, 3, 4):
        choice, rates, _, nodes = choose_captured(*arguments, 1.0, 0, forced)
        assert choice == (forced if forced >= 0 else max(range(8), key=lambda option: best[option]))
        assert rates == pytest.approx(best)
        cells, heads = 2 ** (choice // 2) - 1, choice % 2
        assert max(nodes.sum(1)) <= cells
        for b, (of_heads, of_chain) in enumerate(nodes.tolist()):
            most = [max(c for c in range(1 + 2 * heads) if sizes[c] <= cells - n) for n in range(cells + 1)]
            ways = [tokens(b, most[n], n) for n in range(min(cells, D - b) + 1)]
            taken = tokens(b, int(np.searchsorted(sizes, of_heads)), of_chain)
            assert taken == pytest.approx(max(ways))


def test_each_fills_its_cells_with_what_it_has() -> None:
    """Who has no chain gets all its nodes of the heads, beside one that has a good one."""
    reach = np.array([[0.0, 0.0], [0.3, 0.0], [0.4, 0.1], [0.5, 0.2]])
    chains = np.zeros((3, 8))
    chains[1] = 0.9 ** np.arange(1, 9)
    chains[2] = 0.01
    sizes = np.array([0, 1, 3, 7])
    tokens, nodes = np.empty(3), np.empty((3, 2), dtype=np.int64)
    fill(7, 1, chains, np.ones(3), sizes, reach, 1.0, tokens, nodes)
    assert nodes[0].tolist() == [7, 0]
    assert nodes[1, 1] >= 6
    assert nodes[2, 0] == 7
    assert tokens[0] == pytest.approx(1.7)
    assert tokens[1] > 4.0


def test_nodes_that_cost_nothing_are_used_by_all() -> None:
    """One of sixteen copies, for whom a bucket of 16 pays: the others take theirs of the heads."""
    chooser = adaptive(lookup=16)
    sequences = [sequence(slot) for slot in range(16)]
    for made in sequences[:8]:
        propose(chooser, made, [1] * 16, 8)
        chooser._seats.known.shifts[made.slot] = 3.0
    chooser.choose(sequences, True)
    largest = max(made.num_nodes for made in sequences)
    assert largest in NODES[2:]
    assert all(made.lookup_nodes > 4 for made in sequences[:8])
    assert {made.num_nodes for made in sequences[8:]} == {largest}


def test_the_longest_counts_most_where_nobody_waits() -> None:
    """Beside one of many tokens an equal one of few hardly counts; while others wait both do."""
    both = np.array([300.0, 30.0])
    for few in (1.0, 3.0):
        assert worth(np.array([2.0, few]), both, False) == pytest.approx(
            worth(np.array([2.0, 1.0]), both, False), rel=1e-4
        )
    assert worth(np.array([2.0, 3.0]), both, True) > 1.5 * worth(np.array([2.0, 1.0]), both, True)
    # Of equally long ones, what one loses weighs more than what another gains.
    alike = np.full(2, 100.0)
    assert worth(np.array([1.0, 4.0]), alike, False) < worth(np.array([1.5, 1.5]), alike, False)
    assert worth(np.array([1.0, 4.0]), alike, True) > worth(np.array([1.5, 1.5]), alike, True)


def test_what_is_under_way_makes_nobodys_answer_shorter() -> None:
    """One of four still takes longest, and copies. At most 17 tokens are under way: seldom do all come."""
    for under_way in (0, 17):
        chooser = adaptive(None, lookup=16)
        sequences = [sequence(slot, room=20) for slot in range(3)] + [sequence(3, room=40)]
        propose(chooser, sequences[3], [1] * 16, 8)
        chooser._seats.known.shifts[3] = 1.0
        sequences[3].in_flight = under_way
        chooser.choose(sequences)
        assert sequences[3].lookup_nodes, under_way


def test_what_is_learned_of_heads_is_compiled_before_there_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    count = records.count_accepted

    def counted(*arguments: Any) -> int:
        compiled.append([count.typeof_pyval(each) for each in arguments])
        return int(count(*arguments))

    monkeypatch.setattr(records, "count_accepted", counted)
    chooser = adaptive()
    [at_first] = compiled
    made = sequence(2)
    chooser.choose([made])
    assert shares(chooser._seats.known.own, np.array([0, 2])).tolist() == [1.0, 1.0]
    observe(chooser, [made], [0b1], 0.01)
    assert compiled[1] == at_first


def test_of_a_step_that_one_was_preempted_from_nothing_is_laid_to_others() -> None:
    chooser = adaptive()
    sequences = [sequence(slot) for slot in range(3)]
    chooser.choose(sequences)
    del sequences[1]
    assert all(made.head_nodes for made in sequences)
    observe(chooser, sequences, [0b1, (2 << sequences[1].head_nodes) - 1], 0.01)  # none, and all
    behind, preempted, ahead = shares(chooser._seats.known.own, np.arange(3))
    assert behind < preempted == 1.0 < ahead


class Answers:
    """So many requests at once, on a device much as an H100, until the last has its tokens.

    Args:
        rank_hits: for each, the chance that a head's best guess comes true.
        others_wait: for slots, all the time.
    """

    TOKENS = 200

    def __init__(self, chooser: AdaptiveTree, rank_hits: list[float], others_wait: bool, seed: int) -> None:
        rng = random.Random(seed)
        index = {path: i for i, path in enumerate(HEADS.paths, start=1)}
        running = [sequence(slot, room=self.TOKENS) for slot in range(len(rank_hits))]
        for made in running:
            made.arrival = rng.randrange(1 << 40)
        self.seconds, self.ended = 0.0, dict.fromkeys(range(len(rank_hits)), 0.0)
        while running:
            chooser.choose(running, others_wait)
            masks = [self._mask(rng, index, made, rank_hits[made.slot]) for made in running]
            batch, largest = GRID.find(len(running), max(made.num_nodes for made in running)) or (0, 0)
            self.seconds += (took := gpu_like(batch, batch * largest) + 0.00004 * (largest > 1))
            observe(chooser, running, masks, took)
            for made, mask in zip(running, masks, strict=True):
                made.token_ids += [0] * mask.bit_count()
                made.num_cached += mask.bit_count()
                self.ended[made.slot] = self.seconds
            running = [made for made in running if made.max_total > len(made.token_ids)]

    @staticmethod
    def _mask(rng: random.Random, index: dict[tuple[int, ...], int], made: Sequence, chance: float) -> int:
        path: tuple[int, ...] = ()
        mask = 1
        while rng.random() < chance and index.get((*path, 0), 99) <= made.head_nodes:
            path = (*path, 0)
            mask |= 1 << index[path]
        return mask

    @property
    def mean(self) -> float:
        return sum(self.ended.values()) / len(self.ended)


def together(rank_hits: list[float], others_wait: bool) -> tuple[float, float]:
    """Seconds to plain decoding's, until the last answer ends and until each does; of rounds after some."""
    chooser, last, mean = adaptive(), 0.0, 0.0
    for seed in range(8):
        found = Answers(chooser, rank_hits, others_wait, seed)
        if seed >= 4:
            last, mean = last + found.seconds / 4, mean + found.mean / 4
    plain = Answers.TOKENS * gpu_like(len(rank_hits), len(rank_hits))
    return last / plain, mean / plain


@pytest.mark.parametrize(("batch", "bound"), [(4, 1.16), (16, 1.07), (64, 1.02)])
def test_one_whose_drafts_never_come_true_is_hardly_slowed_for_the_others(batch: int, bound: float) -> None:
    """Nobody waits for a slot. It is found out in some steps, and by how far it is behind."""
    last, mean = together([0.0, *[0.6] * (batch - 1)], others_wait=False)
    assert last < bound
    assert mean < 0.9


@pytest.mark.parametrize("batch", [4, 16])
def test_while_others_wait_it_is(batch: int) -> None:
    """The others' slots are wanted."""
    hits = [0.0, *[0.6] * (batch - 1)]
    patient, busy = together(hits, others_wait=False), together(hits, others_wait=True)
    assert busy[0] > 1.01 * patient[0]
    assert busy[1] < 0.99 * patient[1]


def test_where_the_host_is_slow_nodes_are_free_up_to_its_time() -> None:
    """The largest bucket that is done by then, and what pays by the device's time alone once it is quick."""
    chooser, sequences = adaptive(), [sequence(slot) for slot in range(4)]

    def chosen_after(steps: int, host_s: float) -> int:
        sizes: list[int] = []
        for _ in range(steps):
            chooser.choose(sequences)
            nodes = max(made.num_nodes for made in sequences)
            took = gpu_like(4, 4 * nodes) + (0.00004 if nodes > 1 else 0.0)
            observe(chooser, sequences, [1 if nodes == 1 else 0b11] * 4, took, host_s)
            sizes.append(nodes)
        return max(sizes[-20:], key=sizes[-20:].count)

    quick = chosen_after(200, 0.0001)
    slow = chosen_after(400, 0.0025)
    assert quick < slow
    assert gpu_like(4, 4 * slow) + 0.00004 <= 0.0026
    assert chosen_after(400, 0.0001) == quick


def test_a_pause_of_the_host_is_not_what_it_takes() -> None:
    times = StepTimes({4: [(4, 0.001), (8, 0.002)]}, {4: [0.0]}, buckets=GRID)
    for seconds in (0.0003, 0.0005):
        times.observe_host(4, seconds)
    assert times.costs(4, 50, 16).host == pytest.approx(0.0004)
    for seconds in [0.0004] * 100 + [3.0]:
        times.observe_host(4, seconds)
    assert times.costs(4, 50, 16).host == pytest.approx(0.0004, rel=0.25)
    assert times.costs(4, 50, 16).outside == 0.0
