"""The choice of the tree where the times measured at the start were wrong, in simulated worlds.

What a step truly takes and what the table says are two things here. A world tells the choice what each step
took, with noise, and counts by what it takes on the average and by what its trees bring on the average: so
a share of the best there is, is exact.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from engine.medusa.adaptive import AdaptiveTree
from engine.medusa.buckets import Buckets
from engine.medusa.records import LookupRecord, considered_sizes
from engine.medusa.step_times import StepTimes
from engine.medusa.tree import default_tree
from engine.types import Sequence
from tests.engine.medusa.by_hand import observe, sequence

HEADS = default_tree(4)
INDEX = {path: i for i, path in enumerate(HEADS.paths, start=1)}
SIZES = considered_sizes(HEADS)
NODES = (1, 2, 4, 8, 16, 32, 64)

GPU_LIKE = {
    1: (0.55, 0.56, 0.58, 0.62, 0.69, 0.85, 1.10),
    4: (0.60, 0.65, 0.72, 0.80, 0.95, 1.20, 1.60),
    16: (0.79, 0.90, 1.00, 1.29, 1.32, 1.70),
    64: (1.10, 1.30, 1.50, 1.80),
}
"""Milliseconds of captured steps of so many sequences with each number of nodes, much as an H100 takes."""


@functools.cache
def gpu_like(batch: int, rows: float) -> float:
    """Seconds of a captured step."""
    known = GPU_LIKE[batch]
    return float(np.interp(rows, [batch * nodes for nodes in NODES[: len(known)]], known)) / 1000


def cpu_like(batch: int, rows: float) -> float:
    return 0.018 + 0.0006 * batch + 0.0012 * rows


Error = Callable[[int], float]
"""Seconds measured of a step of so many nodes to each sequence, to those that it takes."""

ERRORS: dict[str, Error] = {
    "plain dear": lambda nodes: 2.0 if nodes == 1 else 1.0,
    "plain cheap": lambda nodes: 0.5 if nodes == 1 else 1.0,
    "small dear": lambda nodes: 2.0 if nodes <= 8 else 1.0,
    "small cheap": lambda nodes: 0.5 if nodes <= 8 else 1.0,
    "middle dear": lambda nodes: 2.0 if 2 <= nodes <= 8 else 1.0,
    "middle cheap": lambda nodes: 0.5 if 2 <= nodes <= 8 else 1.0,
    "large dear": lambda nodes: 2.0 if nodes > 8 else 1.0,
    "large cheap": lambda nodes: 0.5 if nodes > 8 else 1.0,
    "every other": lambda nodes: 2.0 if nodes.bit_length() % 2 else 0.5,
    "all dear": lambda _nodes: 2.0,
    "all cheap": lambda _nodes: 0.5,
}


def right(_nodes: int) -> float:
    return 1.0


class World:
    """Streams on a device, whose answers begin anew again and again.

    Args:
        captured: the device is `gpu_like`, else `cpu_like`.
        error: of the table.
        rank_hit: chance that a head's best guess comes true.
        lingers: share of its time that a step takes more after one of another size.
        hiccups: share of the steps that take ten times as long.
    """

    PROMPT, ANSWER = 60, 300

    def __init__(
        self, captured: bool, error: Error, rank_hit: float, *, lingers: float = 0.0, hiccups: float = 0.0
    ) -> None:
        self.rng, self.lingers, self.hiccups = random.Random(0), lingers, hiccups
        self.grid = Buckets(tuple(GPU_LIKE), NODES, 512) if captured else None
        self.drafting = 0.00004 if captured else 0.002
        batches = tuple(GPU_LIKE)
        points = {
            b: [(b * n, error(n) * self.step(b, b * n)) for n in NODES if b * n <= (512 if captured else 128)]
            for b in batches
        }
        drafts = {b: [0.0] + [self.drafting] * (len(SIZES) - 1) for b in batches}
        times = StepTimes(points, drafts, context=96, buckets=self.grid)
        self.chooser = AdaptiveTree(times, HEADS, LookupRecord(0), 512)
        self.paths = [self.path(rank_hit) for _ in range(2048)]
        self.counts = Counter(self.paths)
        self.brings = [self.mean_tokens(nodes) for nodes in range(64)]
        self.rates: dict[tuple[int, int], float] = {}
        self.last, self.tokens, self.best, self.lost, self.took = 0, 0.0, 0.0, 0.0, 0.0

    def step(self, batch: int, rows: float, context: int = 96) -> float:
        seconds = gpu_like(batch, rows) if self.grid is not None else cpu_like(batch, rows)
        return seconds * (1.0 + 0.0003 * (context - 96))

    def seconds(self, batch: int, nodes: int, context: int) -> float:
        rows = self.grid.rows(batch, nodes) if self.grid is not None else float(batch * nodes)
        return self.step(batch, rows, context) + (self.drafting if nodes > 1 else 0.0)

    def path(self, rank_hit: float) -> int:
        """Bit mask of the nodes that come true: at each depth the best guess, else the second, or none."""
        path: tuple[int, ...] = ()
        mask = 1
        while (draw := self.rng.random()) < rank_hit + 0.3 * min(rank_hit, 1.0 - rank_hit):
            path = (*path, int(draw >= rank_hit))
            if path not in INDEX:
                break
            mask |= 1 << INDEX[path]
        return mask

    def mean_tokens(self, nodes: int) -> float:
        tokens = (self.cut(path, nodes).bit_count() * count for path, count in self.counts.items())
        return sum(tokens) / len(self.paths)

    @staticmethod
    def cut(path: int, nodes: int) -> int:
        return path & (2 << nodes) - 1

    def run(self, batch: int, steps: int) -> float:
        """Tokens of so many steps, to those that the best choices would have brought in their time.

        And `lost`: the share of the latter that is lost in steps that were tried for their times.
        """
        self.tokens = self.best = self.lost = 0.0
        streams = [sequence(slot, cached=self.PROMPT) for slot in range(batch)]
        for stream in streams:
            stream.num_cached += stream.slot * self.ANSWER // batch
        for _ in range(steps):
            self.advance(streams)
        self.lost /= self.best
        return self.tokens / self.best

    def best_rate(self, batch: int, context: int) -> float:
        """Tokens per second."""
        if (batch, context) not in self.rates:
            fits = [size for size in SIZES if batch * (1 + size) <= 512]
            self.rates[batch, context] = max(
                batch * self.brings[size] / self.seconds(batch, 1 + size, context) for size in fits
            )
        return self.rates[batch, context]

    def advance(self, streams: list[Sequence]) -> None:
        batch, context = len(streams), max(stream.num_cached for stream in streams)
        before = self.chooser._for_times.steps, self.chooser._again
        self.chooser.choose(streams)
        tried = (self.chooser._for_times.steps, self.chooser._again) != before
        nodes = max(stream.head_nodes for stream in streams)
        seconds = self.seconds(batch, 1 + nodes, context)
        masks = [self.cut(path, nodes) for path in self.rng.choices(self.paths, k=batch)]
        took = seconds * self.rng.uniform(0.9, 1.1) * (1.0 if nodes == self.last else 1.0 + self.lingers)
        took *= 10.0 if self.rng.random() < self.hiccups else 1.0
        self.took += took
        observe(self.chooser, streams, masks, took)
        for stream, mask in zip(streams, masks, strict=True):
            stream.num_cached += mask.bit_count()
            if stream.num_cached > self.PROMPT + self.ANSWER:
                stream.num_cached = self.PROMPT
        rate = self.best_rate(batch, context)
        brought = batch * self.brings[nodes]
        self.last, self.tokens, self.best = nodes, self.tokens + brought, self.best + rate * seconds
        self.lost += rate * seconds - brought if tried else 0.0


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("error", ERRORS)
def test_a_table_that_was_wrong_is_found_out(error: str, batch: int) -> None:
    world = World(True, ERRORS[error], 0.3)
    world.run(batch, 1500)
    assert world.run(batch, 400) > 0.95


@pytest.mark.parametrize("batch", [4, 64])
@pytest.mark.parametrize("error", ["plain dear", "plain cheap", "middle dear", "large cheap"])
def test_so_it_is_where_a_step_takes_longer_after_one_of_another_size(error: str, batch: int) -> None:
    """And where the largest trees were never measured."""
    world = World(False, ERRORS[error], 0.6, lingers=0.15)
    world.run(batch, 2500)
    assert world.run(batch, 400) > 0.95


@pytest.mark.parametrize("hiccups", [0.0, 0.02])
@pytest.mark.parametrize("captured", [True, False])
def test_a_right_table_costs_next_to_nothing_to_doubt(captured: bool, hiccups: float) -> None:
    """Also with heads that are no good, which plain decoding must not pay for."""
    shares = []
    for batch, rank_hit in itertools.product((1, 16, 64), (0.0, 0.3, 0.6)):
        lingers = 0.0 if captured else 0.15
        world = World(captured, lambda _nodes: 1.0, rank_hit, lingers=lingers, hiccups=hiccups)
        shares.append(world.run(batch, 1500))
        assert world.lost < 0.004, (batch, rank_hit)
        if rank_hit == 0.0:
            assert shares[-1] > 0.98, batch
    assert np.mean(shares) > 0.965


@pytest.mark.parametrize("captured", [True, False])
def test_what_is_lost_in_tries_is_paid_for(captured: bool) -> None:
    """By a hundredth of the time, which is all that is there to be spent."""
    world = World(captured, lambda _nodes: 1.0, 0.3)
    world.run(1, 2000)
    left = world.chooser._for_times.seconds
    assert left >= 0.0
    assert world.lost > 0.0005
    assert (0.01 * world.took - left) / world.took == pytest.approx(world.lost, rel=0.6)
