"""The choice of the tree in simulated worlds, where the best choice is known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest

from engine.medusa import adaptive as adaptive_module, choice_kernels
from engine.medusa.adaptive import _CHAIN_DEPTHS, AdaptiveTree, FixedTree
from engine.medusa.choice import capped
from engine.medusa.records import LookupRecord, considered_sizes
from engine.medusa.step_times import StepTimes
from engine.types import Sequence
from tests.engine.medusa.by_hand import (
    HEADS,
    Judged,
    adaptive,
    chances,
    chances_of_chains,
    cpu_like,
    observe,
    packed,
    propose,
    sequence,
    step_times,
)


class World:
    """Sequences whose drafts come true with known chances; steps that take known times, give or take."""

    def __init__(
        self,
        chooser: AdaptiveTree,
        rank_hit: float,
        seed: int = 0,
        drafting: float = 0.004,
        outside: float = 0.0,
        step: Callable[[int, int], float] = cpu_like,
    ) -> None:
        self.step = step
        self.chooser, self.rank_hit, self.drafting, self.outside = chooser, rank_hit, drafting, outside
        self.rng = random.Random(seed)
        self.steps, self.seconds, self.tokens = 0, 0.0, 0
        self.sizes: list[int] = []

    def accepted(self, nodes: int) -> tuple[int, int]:
        """Bit mask and length: at each depth the best guess comes true, else the second, or none."""
        index = {path: i for i, path in enumerate(HEADS.paths, start=1)}
        path: tuple[int, ...] = ()
        mask = 1
        while True:
            draw = self.rng.random()
            rank = (
                0 if draw < self.rank_hit else 1 if draw < self.rank_hit + 0.3 * (1 - self.rank_hit) else 99
            )
            path = (*path, rank)
            if self.rank_hit == 0 or index.get(path, 99) > nodes:
                return mask, mask.bit_count()
            mask |= 1 << index[path]

    def run(self, batch: int, steps: int) -> None:
        sequences = [sequence(slot) for slot in range(batch)]
        for _ in range(steps):
            self.chooser.choose(sequences)
            rows = sum(made.num_nodes for made in sequences)
            nodes = max(made.head_nodes for made in sequences)
            results = [self.accepted(made.head_nodes) for made in sequences]
            seconds = (self.step(batch, rows) + (self.drafting if nodes else 0)) * self.rng.uniform(0.85, 1.2)
            observe(self.chooser, sequences, [mask for mask, _ in results], seconds)
            outside = self.outside * self.rng.uniform(0.85, 1.2)
            self.chooser.observe_outside(0.3 * outside, last=False)
            self.chooser.observe_outside(0.7 * outside, last=True)
            self.steps += 1
            self.seconds += seconds + outside
            self.tokens += sum(length for _, length in results)
            self.sizes.append(nodes)

    def best_size(self, batch: int) -> float:
        """Tokens per second of the best fixed size."""
        found = 0.0
        for nodes in considered_sizes(HEADS):
            mean = np.mean([self.accepted(nodes)[1] for _ in range(2000)])
            seconds = self.step(batch, batch * (1 + nodes)) + (self.drafting if nodes else 0) + self.outside
            found = max(found, batch * float(mean) / seconds)
        return found


@pytest.mark.parametrize(
    ("rank_hit", "outside"), [(0.0, 0.0), (0.15, 0.0), (0.8, 0.0), (0.0, 0.08), (0.5, 0.08)]
)
def test_it_is_as_fast_as_the_best_fixed_size_under_shifting_load(rank_hit: float, outside: float) -> None:
    """Also where most of a step's time is spent outside of what is measured at the start."""
    world = World(adaptive(), rank_hit, outside=outside)
    for batch in (1, 16, 1, 4):
        world.run(batch, 150)  # settle
        before = world.tokens, world.seconds
        world.run(batch, 1000)
        rate = (world.tokens - before[0]) / (world.seconds - before[1])
        # Step times are drawn with a mean of 1.025; 4 % is left for exploring, hysteresis and chance.
        assert rate * 1.025 > 0.96 * world.best_size(batch), batch


@pytest.mark.parametrize("batch", [4, 8])
def test_good_heads_get_their_tree_within_seconds(batch: int) -> None:
    """Heads that are always right, where every row costs a tenth of a step, before anything is explored."""

    def sloped(batch: int, rows: int) -> float:
        return 0.018 + 0.002 * rows

    world = World(adaptive(step=sloped), 1.0, step=sloped, drafting=0.0)
    world.run(batch, 99)
    assert world.chooser.explored_steps == 0
    before = world.tokens, world.seconds
    world.run(batch, 100)
    rate = (world.tokens - before[0]) / (world.seconds - before[1])
    assert rate * 1.025 > 0.95 * world.best_size(batch)


def test_bad_heads_are_found_out_within_seconds() -> None:
    world = World(adaptive(), 0.0)
    world.run(4, 30)
    world.sizes.clear()
    world.run(4, 60)
    assert max(world.sizes) == 0


def test_what_each_size_promises_is_what_it_brings() -> None:
    """In a world that has settled, at the sizes that were verified."""
    world = World(adaptive(), 0.5)
    world.run(1, 3000)
    promised = world.chooser.promised(1, 100)
    assert list(promised) == [1 + nodes for nodes in considered_sizes(HEADS)]
    used = max(set(world.sizes), key=world.sizes.count)
    for nodes in (0, used):
        mean = np.mean([world.accepted(nodes)[1] for _ in range(3000)])
        seconds = cpu_like(1, 1 + nodes) + (world.drafting if nodes else 0)
        assert promised[1 + nodes] == pytest.approx(float(mean) / seconds, rel=0.1), nodes
    assert max(promised, key=lambda size: promised[size]) == 1 + used


def test_a_smaller_size_is_tried_now_and_then() -> None:
    world = World(adaptive(), 0.5)
    world.run(1, 1500)
    world.sizes.clear()
    world.run(1, 3000)
    used = max(set(world.sizes), key=world.sizes.count)
    before = max(size for size in considered_sizes(HEADS) if size < used)
    assert 0 < world.sizes.count(before) <= 0.01 * len(world.sizes)


def test_useless_heads_cost_at_most_one_percent_of_steps_and_time() -> None:
    world = World(adaptive(), 0.0)
    world.run(8, 300)
    world.sizes.clear()
    start = world.seconds
    world.run(8, 3000)
    tried = [size for size in world.sizes if size]
    assert len(tried) <= 0.01 * 3000 + 1
    assert len(tried) > 0
    plain = 3000 * cpu_like(8, 8) * 1.025
    assert world.seconds - start < 1.02 * plain


def test_it_does_not_lock_itself_at_plain_decoding() -> None:
    """Heads that were useless for a long time become good."""
    world = World(adaptive(), 0.0)
    world.run(4, 1500)
    assert sum(map(bool, world.sizes[-200:])) <= 4
    world.rank_hit = 0.8
    world.run(4, 2000)
    assert min(world.sizes[-50:]) > 0


def test_a_chain_is_judged_by_what_is_emitted_even_if_never_verified() -> None:
    judged, proposed = Judged(4, sequences=2), ([7, 7, 7, 7], 3)
    for _ in range(100):
        for slot, truth in ((0, 7), (1, 8)):
            judged.see(slot, proposed, [truth])
    good, bad = judged.chances(proposed)
    assert good[0] > 0.85
    assert bad[0] < 0.15
    assert list(good) == sorted(good, reverse=True)


def test_chains_get_nodes_where_they_earn_them() -> None:
    """Of four sequences one copies; it alone gets a chain, and it gets a long one."""
    chooser = adaptive(8, None)
    sequences = [sequence(slot) for slot in range(4)]
    for made in sequences:
        propose(chooser, made, [1] * 8, 8 if made.slot == 2 else 1)
    for _ in range(60):
        chooser.choose(sequences)
        emitted = [[1] * 9 if made.slot == 2 else [0] for made in sequences]
        observe(chooser, sequences, [1] * 4, cpu_like(4, sum(m.num_nodes for m in sequences)), 0.0, emitted)
    chooser.choose(sequences)
    assert sequences[2].lookup_nodes >= 4
    assert all(made.lookup_nodes == 0 for made in sequences if made.slot != 2)
    propose(chooser, sequences[2], [], 0)
    chooser.choose(sequences)
    assert all(made.num_nodes == 1 for made in sequences)


def test_what_padding_costs_keeps_one_long_chain_from_slowing_everyone() -> None:
    """One of eight sequences copies: where the grid's empty cells cost as much as nodes, it gets less."""
    sizes = []
    for cost in (0.0, 0.0004, 0.01):
        plain = step_times(cpu_like, None)
        times = StepTimes(
            {8: [(8 * n, cpu_like(8, 8 * n)) for n in (1, 2, 4, 8, 16)]}, {}, {8: cost}, context=50
        )
        assert plain.padding(8, 50) == 0.0
        chooser = AdaptiveTree(times, None, LookupRecord(16), 512)
        sequences = [sequence(slot) for slot in range(8)]
        propose(chooser, sequences[0], [1] * 16, 8)
        _come_true(chooser, sequences, 60, lambda _turn, slot: [1] * 17 if slot == 0 else [0])
        chooser.choose(sequences)
        sizes.append(sequences[0].num_nodes)
        assert all(made.num_nodes == 1 for made in sequences[1:])
    assert sizes[0] > sizes[1] > sizes[2]


def _come_true(
    chooser: AdaptiveTree,
    sequences: list[Sequence],
    steps: int,
    emitted: Callable[[int, int], list[int]],
) -> None:
    """Let the chooser see what chains came to in so many steps: what was emitted in each turn and slot. Of
    what a step takes it learns nothing."""
    proposed = [(made.lookup.chain, made.lookup.kind) for made in sequences]
    for turn in range(steps):
        slots = chooser._seats.seat(sequences)
        tokens = [emitted(turn, made.slot) for made in sequences]
        values, depth = packed([1] * len(tokens), tokens, proposed)
        chooser._lookup.observe(chooser._seats.known, slots, values, depth)


@pytest.mark.parametrize("cost", [0.0, 0.0004, 0.002, 0.01])
def test_a_long_chain_does_not_take_the_others_nodes(cost: float) -> None:
    """One of eight copies and the others often begin right: what is chosen is nearly the best there is."""
    times = StepTimes({8: [(8 * n, cpu_like(8, 8 * n)) for n in (1, 2, 4, 8, 16)]}, {}, {8: cost}, context=50)
    chooser, sequences = AdaptiveTree(times, None, LookupRecord(16), 512), [sequence(i) for i in range(8)]
    for made in sequences:
        propose(chooser, made, [1] * 16, 8 if made.slot == 0 else 2)
    _come_true(
        chooser, sequences, 200, lambda turn, slot: [1] * 17 if slot == 0 else [1] * (turn % 5 > 0) + [0]
    )
    survival = chances(chooser._lookup, chooser._seats)

    def rate(nodes: list[int]) -> float:
        rows = 8 + sum(nodes)
        tokens = 8 + sum(survival[i, :count].sum() for i, count in enumerate(nodes))
        return float(tokens) / (cpu_like(8, rows) + cost * (8 * (1 + max(nodes)) - rows))

    best = max(rate([copier, *[others] * 7]) for copier in range(17) for others in range(5))
    chooser.choose(sequences)
    assert rate([made.lookup_nodes for made in sequences]) > 0.98 * best


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_there_are(seed: int) -> None:
    """Every size with every combination of chains, by hand."""
    rng = np.random.default_rng(seed)
    B, D = 3, 4
    knots = [(B * n, 0.02 + 0.001 * B * n * rng.uniform(0.5, 1.5)) for n in (1, 2, 4, 8)]
    drafts = [0.0, 0.002, 0.003]
    costs = StepTimes({B: knots}, {B: drafts}, context=50).costs(B, 50, 16)
    sizes, reach = np.array([0, 1, 3]), np.array([[0.0, 0.0], [0.6, 0.0], [0.7, 0.3]])
    chains, beyond = chances_of_chains(rng, B, D), 0.7

    def rate(choice: int, lengths: tuple[int, ...]) -> float:
        rows, tokens = B * (1 + sizes[choice]) + sum(lengths), B * (1 + reach[choice].sum())
        if rows > 16:
            return 0.0
        for chain, length in zip(chains, lengths, strict=True):
            least = 1.0
            for d in range(length):
                missed = 1.0 - (reach[choice][d] if d < 2 else 0.0)
                least = min(least, chain[d] * missed * (beyond if choice else 1.0))
                tokens += least
        plain = 1.02 if choice == 0 and sum(lengths) == 0 else 1.0
        rows_at, seconds = costs.rows, costs.seconds
        slope = (seconds[1] - seconds[0]) / (rows_at[1] - rows_at[0])
        seconds = np.interp(rows, rows_at, seconds) - max(0.0, rows_at[0] - rows) * slope
        return float(plain * tokens / (seconds + drafts[choice]))

    combinations = list(itertools.product(range(D + 1), repeat=B))
    best = {choice: max(rate(choice, lengths) for lengths in combinations) for choice in range(len(sizes))}
    bounds = _CHAIN_DEPTHS
    arguments = costs, chains, sizes, reach, beyond, 1.02, 1.0, 0
    for current in range(len(sizes)):  # one that another must outdo by far is kept
        kept, *_, taken = choice_kernels.choose(*arguments[:-2], 9.0, current, -1, bounds)
        assert kept == current
        assert rate(kept, tuple(taken)) == pytest.approx(best[kept])
    for forced in range(len(sizes)):
        choice, *_, taken = choice_kernels.choose(*arguments, forced, bounds)
        assert choice == forced
        assert rate(choice, tuple(taken)) == pytest.approx(best[choice])
    choice, plain, _, taken = choice_kernels.choose(*arguments, -1, bounds)
    assert choice == max(best, key=lambda size: best[size])
    assert plain == pytest.approx([rate(size, (0, 0, 0)) for size in range(len(sizes))])
    assert rate(choice, tuple(taken)) == pytest.approx(best[choice])


def test_step_times_are_measured_for_the_sizes_there_are() -> None:
    with pytest.raises(ValueError, match="each of the 1 sizes"):
        AdaptiveTree(step_times(cpu_like), None, LookupRecord(0), 512)


def test_caps_and_the_end_of_the_output_shrink_a_sequences_own_tree() -> None:
    for chooser in (adaptive(8), FixedTree(64, HEADS, 8, 512)):
        sequences = [
            sequence(0),
            sequence(1, cap=1),
            sequence(2, cap=5),
            sequence(3, room=1),
            sequence(4, room=2),
        ]
        for made in sequences:
            made.lookup.chain, made.lookup.kind = [1] * 8, 8
            if isinstance(chooser, AdaptiveTree):
                chooser.propose(made)
        chooser.choose(sequences)
        assert sequences[0].num_nodes > 5
        assert sequences[1].num_nodes == 1
        assert 1 < sequences[2].num_nodes <= 5
        assert sequences[3].num_nodes == 1
        made = sequences[4]
        assert made.lookup_nodes <= 1
        assert all(len(path) == 1 for path in HEADS.paths[: made.head_nodes])
        assert sum(made.num_nodes for made in sequences) <= 512


@pytest.mark.parametrize(
    ("size", "lookup", "batch", "expected"),
    [
        (64, 0, 1, (63, 0)),
        (16, 8, 1, (10, 5)),
        (64, 16, 1, (47, 16)),
        (64, 0, 16, (31, 0)),
        (16, 8, 512, (0, 0)),
    ],
)
def test_a_fixed_tree_is_divided_and_bounded(
    size: int, lookup: int, batch: int, expected: tuple[int, int]
) -> None:
    sequences = [sequence(slot) for slot in range(batch)]
    for made in sequences:
        made.lookup.chain = [1] * 16
    FixedTree(size, HEADS, lookup, 512).choose(sequences)
    assert {(made.head_nodes, made.lookup_nodes) for made in sequences} == {expected}


def test_caps_are_compiled_before_there_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[object]] = []

    def noted(*arguments: object) -> tuple[int, int]:
        seen.append([capped.typeof_pyval(each) for each in arguments])
        found: tuple[int, int] = capped(*arguments)
        return found

    monkeypatch.setattr(adaptive_module, "capped", noted)
    chooser = FixedTree(9, HEADS, 8, 512)
    [at_first] = seen
    chooser.choose([sequence()])
    assert seen[1] == at_first


def test_what_weighs_tries_is_compiled_before_there_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under the first request that a step is tried in, some hundred steps on."""
    seen: list[list[object]] = []

    def noted(*arguments: object) -> float:
        seen.append([choice_kernels.predict.typeof_pyval(each) for each in arguments])
        return float(choice_kernels.predict(*arguments))

    monkeypatch.setattr(adaptive_module, "predict", noted)
    chooser = adaptive()
    at_first = len(seen)
    World(chooser, 0.5).run(1, 300)
    assert len(seen) > at_first > 0
    assert all(each == seen[0] for each in seen)


def test_without_heads_a_fixed_tree_is_a_chain() -> None:
    made = sequence()
    made.lookup.chain = [1] * 8
    FixedTree(9, None, 8, 512).choose([made])
    assert (made.head_nodes, made.lookup_nodes) == (0, 8)


@pytest.mark.parametrize("batch", [3, 6, 12, 17, 24, 128])
def test_nodes_are_not_free_at_batches_between_the_measured_ones(batch: int) -> None:
    """A machine on which every row costs: each further node must be seen to."""

    def linear(rows: float) -> float:
        return 0.02 + 0.001 * rows

    points = {
        b: [(b * n, linear(b * n)) for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or b * n <= 128]
        for b in (1, 2, 4, 8, 16, 32, 64, 128)
    }
    rows = np.array([1.0, 1.5, 2.0, 4.0]) * batch
    assert StepTimes(points, {}).predict(batch, 100, rows) == pytest.approx([linear(r) for r in rows])


def test_a_tree_that_is_too_dear_to_try_does_not_keep_the_others_from_it() -> None:
    """Where a step takes its rows' time and nothing else, all nodes are 64 times as much."""

    def rows_alone(_batch: int, rows: int) -> float:
        return 0.001 * rows

    world = World(adaptive(step=rows_alone), 0.0, step=rows_alone, drafting=0.0)
    world.run(4, 200)
    world.sizes.clear()
    world.run(4, 3000)
    assert world.sizes.count(1) > 10
    assert world.sizes.count(63) == 0


def test_drafting_that_caps_left_out_is_not_subtracted() -> None:
    """Good heads, and a request that wants plain decoding: its steps take what they take."""
    chooser, made = adaptive(), sequence(cap=1)
    made.arrival = 1  # it comes after those
    World(chooser, 0.8).run(1, 100)
    before = chooser._times.predict(1, 50, np.array([1.0, 8.0]))
    for _ in range(200):
        chooser.choose([made])
        assert made.num_nodes == 1
        observe(chooser, [made], [1], float(before[0]))
    assert chooser._times.predict(1, 50, np.array([1.0, 8.0])) == pytest.approx(before, rel=0.02)


def test_what_exploring_may_cost_is_not_saved_up() -> None:
    """After hours at a load that leaves no room for another tree, the next one gets no run of odd trees."""
    chooser = AdaptiveTree(step_times(cpu_like), HEADS, LookupRecord(0), 16)
    world = World(chooser, 0.0)
    world.run(16, 5000)  # sixteen roots are all that fit
    assert chooser.explored_steps == 0
    world.run(1, 150)
    assert chooser.explored_steps <= 6  # for their nodes, and for their times


def test_step_times_follow_what_serving_takes() -> None:
    times = step_times(cpu_like)
    rows = np.array([1.0, 3.0, 8.0, 40.0, 500.0])
    first = times.predict(1, 100, rows)
    assert list(first) == sorted(first)
    assert first[-1] > first[-2]
    for _ in range(200):
        times.observe(1, 100, 8, 2 * cpu_like(1, 8), 0.0)
    later = times.predict(1, 100, rows)
    assert later[2] == pytest.approx(2 * cpu_like(1, 8), rel=0.05)
    assert later[3] > 1.3 * first[3]  # a slower machine is slower at every size
    assert times.predict(1, 1000, rows)[2] == pytest.approx(later[2])  # a new context starts from there
    assert times.predict(4, 100, rows)[2] == pytest.approx(cpu_like(4, 8), rel=0.01)
    times.observe(1, 100, 8, 100.0, 0.0)  # a hiccup
    assert times.predict(1, 100, rows)[2] < 1.1 * later[2]
