"""Lookup chains and `tree: auto`: what is promised comes true, and what does not pay costs nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest

from engine.medusa.adaptive import AdaptiveTree
from engine.medusa.records import LookupRecord
from engine.medusa.step_times import StepTimes
from engine.types import Sequence
from tests.engine.medusa.by_hand import Judged, chances, observe, propose, sequence


@pytest.mark.parametrize(
    ("kind", "counted"), [(2, (2, 3, 4)), (7, (7, 8, 8)), (9, (9, 10, 11)), (16, (16,) * 3)]
)
def test_each_token_that_comes_true_is_one_of_a_longer_match(kind: int, counted: tuple[int, ...]) -> None:
    """Up to the first miss; what is emitted after it says nothing of the chain."""
    judged = Judged(4)
    record = judged.record
    before = record.odds.copy()
    assert list(record.grown[kind, :3]) == list(counted)
    judged.see(0, ([1, 2, 3, 4], kind), [1, 2, 9, 4])
    moved = record.odds - before
    assert set(np.flatnonzero(moved)) == set(counted)
    if len(set(counted)) == 3:
        assert moved[counted[0]] > 0
        assert moved[counted[1]] > 0
        assert moved[counted[2]] < 0

    judged.see(0, ([], 0), [1])
    assert record.odds == pytest.approx(before + moved)


class Texts:
    """Streams without heads whose chains come true as often as the length of the match says, and no more.

    Args:
        hazard: chance of the next token by the length of the match, from 0 to 8.
        uneven: seconds that a step takes more where trees differ in size, which nobody measured at the start.
        plain: seconds measured of a plain step, to those that it takes.
    """

    BATCH, ANSWER = 16, 64

    def __init__(
        self, hazard: SequenceOf[float], uneven: float = 0.0, *, plain: float = 1.0, seed: int = 0
    ) -> None:
        points = {
            b: [(b, plain * self.step(b)), *((b * n, self.step(b * n)) for n in (2, 4, 8))]
            for b in (1, self.BATCH)
        }
        self.chooser = AdaptiveTree(StepTimes(points, {}), None, LookupRecord(8), 512)
        self.hazard, self.uneven = hazard, uneven
        self.rng, self.begun = random.Random(seed), 0
        self.streams = [self.begin(slot) for slot in range(self.BATCH)]
        self.forget()

    @staticmethod
    def step(rows: int) -> float:
        """Of a machine on which a row takes a 40th of a plain step."""
        return 0.0165 + 0.00065 * rows

    def forget(self) -> None:
        self.steps = self.tokens = self.trees = 0
        self.seconds = self.promised = self.came = 0.0

    def begin(self, slot: int) -> Sequence:
        made = sequence(slot)
        made.arrival = self.begun = self.begun + 1
        propose(self.chooser, made, [1] * 8, 1)
        return made

    def emit(self, made: Sequence) -> tuple[int, list[int]]:
        """Nodes of the chain that came true, and what is emitted."""
        matched, found, hit = made.lookup.kind, 0, True
        while hit and found <= made.lookup_nodes:
            hit = self.rng.random() < self.hazard[matched]
            matched = min(matched + 1, 8) if hit else self.rng.choice((1, 1, 1, 2, 3))
            found += hit
        right = min(found, made.lookup_nodes)
        made.num_cached += 1 + right
        made.lookup.kind = matched
        return right, [1] * found + [0] * (1 + right - found)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.chooser.choose(self.streams)
            promised = chances(self.chooser._lookup, self.chooser._seats)
            nodes = [made.num_nodes for made in self.streams]
            self.promised += sum(row[: n - 1].sum() for row, n in zip(promised, nodes, strict=True))
            right, emitted = zip(*[self.emit(made) for made in self.streams], strict=True)
            seconds = self.step(sum(nodes)) + (self.uneven if len(set(nodes)) > 1 else 0.0)
            seconds *= self.rng.uniform(0.9, 1.1)
            masks = [(2 << count) - 1 for count in right]
            observe(self.chooser, self.streams, masks, seconds, 0.0, list(emitted))
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds
            self.trees += max(nodes) > 1
            self.came, self.tokens = self.came + sum(right), self.tokens + self.BATCH + sum(right)
            self.streams = [
                self.begin(i) if made.num_cached >= 50 + self.ANSWER else made
                for i, made in enumerate(self.streams)
            ]

    @property
    def to_plain(self) -> float:
        """Tokens per second, to those of plain decoding."""
        return self.tokens / self.seconds / (self.BATCH / self.step(self.BATCH))


SELDOM = (0.0, *[0.35] * 8)
HALF = (0.0, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
OFTEN = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)


@pytest.mark.parametrize("uneven", [0.0, 0.0015])
@pytest.mark.parametrize("hazard", [SELDOM, HALF])
def test_chains_that_hardly_pay_cost_next_to_nothing(hazard: SequenceOf[float], uneven: float) -> None:
    """Where nodes go where the most is promised, promises that are right on the average are not enough."""
    world = Texts(hazard, uneven)
    world.run(300)
    world.forget()
    world.run(1500)
    assert world.to_plain > 0.985


@pytest.mark.parametrize("plain", [0.5, 2.0])
def test_so_it_is_where_plain_steps_were_measured_wrongly(plain: float) -> None:
    world = Texts(HALF, 0.0015, plain=plain)
    world.run(500)
    world.forget()
    world.run(1500)
    assert world.to_plain > 0.98


def test_chains_that_often_come_true_are_found() -> None:
    world = Texts(OFTEN, 0.0015)
    world.run(300)
    world.forget()
    world.run(1500)
    assert world.to_plain > 1.2


@pytest.mark.parametrize("hazard", [HALF, OFTEN])
def test_what_is_promised_of_the_chosen_nodes_comes_true(hazard: SequenceOf[float]) -> None:
    world = Texts(hazard)
    world.run(300)
    world.forget()
    world.run(1500)
    assert world.came > 1000
    assert world.promised == pytest.approx(world.came, rel=0.1)


def test_trees_of_different_sizes_cost_what_they_cost_whatever_was_measured() -> None:
    """Learned apart from the rows, so plain decoding and even trees are not thought to take longer."""
    points = [(16 * n, Texts.step(16 * n)) for n in (1, 2, 4, 8)]
    times = StepTimes({16: points}, {}, uneven={16: 0.0002})
    assert times.costs(16, 100, 512).uneven == 0.0002
    rng = random.Random(0)
    for turn in range(2000):
        rows = (16, 20, 24, 32)[turn % 4]  # 32 are two nodes each
        cells = 16 * 3 - rows if rows in (20, 24) else 0
        seconds = Texts.step(rows) + (0.002 if cells else 0.0)
        times.observe(16, 100, rows, seconds * rng.uniform(0.95, 1.05), 0.0, cells)
    costs = times.costs(16, 100, 512)
    assert costs.uneven == pytest.approx(0.002, rel=0.25)
    plain, even = times.predict(16, 100, np.array([16.0, 32.0]))
    assert plain == pytest.approx(Texts.step(16), rel=0.02)
    assert even == pytest.approx(Texts.step(32), rel=0.02)
    for _ in range(20000):  # no such tree for long: what was measured is believed again
        times.observe(16, 100, 16, Texts.step(16), 0.0)
    assert times.costs(16, 100, 512).uneven == pytest.approx(0.0002, rel=0.1)


@pytest.mark.parametrize("comes_true", [True, False])
def test_nothing_is_ever_certain(comes_true: bool) -> None:
    judged, emitted = Judged(1), [5 if comes_true else 6]
    for _ in range(4000):
        judged.see(0, ([5], 1), emitted)
    assert abs(judged.record.odds[1]) == pytest.approx(np.log(0.995 / 0.005))
    shifts = judged.seats.known.shifts
    shifts[0] = 4.9999 if comes_true else -4.9999
    judged.record.odds[1] = -9.0 if comes_true else 9.0  # as if all others did the opposite
    judged.see(0, ([5], 1), emitted)
    assert abs(shifts[0]) == 5.0
