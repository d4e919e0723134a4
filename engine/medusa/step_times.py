"""What a decode step takes: measured at start-up, corrected while serving."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from engine.config import MAX_TREE_NODES
from engine.medusa.buckets import Buckets
from engine.medusa.choice_kernels import Costs, predict
from engine.medusa.time_corrections import Corrections

__all__ = ["StepTimes"]

Array = NDArray[np.float64]


class StepTimes:
    """Seconds of a decode step by batch size, rows (nodes of all its sequences) and longest context.

    Measured points hold for a short context and for the machine as it was then, which may have been busy.
    What serving takes corrects them (`time_corrections`), each bucket of batches by itself. What a step takes
    besides (planning it, handing out its tokens) is learned while serving: it is the same for any tree, so
    the larger it is the larger a tree pays. Where steps are launched ahead, that passes while the device
    computes the step before: nodes cost nothing up to where the device takes longer than the host.

    Args:
        measured: for each batch bucket, (rows, seconds) points, rows rising.
        draft: for each batch bucket, seconds the heads take for each considered size; empty without.
        padding: for each batch bucket, seconds a cell of the grid takes that holds no node: where trees
            differ in size, attention works on as many nodes for each sequence as the largest tree has.
        uneven: for each batch bucket, seconds that a step takes more where trees differ in size, however
            little: rows are gathered, and no two such steps are alike.
        context: of the measured sequences, in tokens; padding costs in proportion to it.
        buckets: of captured steps, which take what their bucket takes; None without.
    """

    _RATE = 0.05
    _UNEVEN_RATE, _MOST_UNEVEN = 0.03, 0.3
    """The latter is a bound on log seconds: a hiccup of the machine is not a step's time."""
    _FORGET = 0.0005
    """Of what uneven trees were seen to take, in a step without them: or one hiccup might end them."""

    def __init__(
        self,
        measured: dict[int, list[tuple[int, float]]],
        draft: dict[int, list[float]],
        padding: dict[int, float] | None = None,
        uneven: dict[int, float] | None = None,
        context: int = 128,
        buckets: Buckets | None = None,
    ) -> None:
        self._grid = buckets
        self._grid_nodes = np.array(buckets.nodes if buckets is not None else (), dtype=float)
        self._padding, self._context = padding or {}, context
        self._measured_uneven = uneven or {}
        self._uneven = dict(self._measured_uneven)
        self._buckets = sorted(measured)
        measured = {b: _with_a_slope(b, measured) for b in self._buckets}
        if buckets is None:
            measured = {b: _as_far_as_trees_go(b, points) for b, points in measured.items()}
        self._rows = {b: np.array([row for row, _ in measured[b]], dtype=float) for b in self._buckets}
        self._draft = {b: np.asarray(draft.get(b, [0.0])) for b in self._buckets}
        self._corrections = {
            b: Corrections(self._rows[b], np.array([t for _, t in measured[b]]), captured=self.captured)
            for b in self._buckets
        }
        self._outside: dict[int, float] = {}
        self._host: dict[int, float] = {}
        self._host_steps: Counter[int] = Counter()
        # Compile it now, not under the first request.
        unused = Corrections(np.array([1.0, 2.0]), np.array([1.0, 1.0]), captured=False)
        unused.observe(1, 1.0, 1.0)
        unused.optimistic(1, 1.0)

    @property
    def captured(self) -> bool:
        """Whether steps are captured: each takes what its bucket takes, also after one of another size."""
        return self._grid is not None

    def check_sizes(self, count: int) -> None:
        """Raise ValueError if drafting was not measured for so many sizes."""
        if {len(drafts) for drafts in self._draft.values()} != {count}:
            raise ValueError(f"drafting must be measured for each of the {count} sizes of the heads' branch")

    def costs(self, batch: int, context: int, most_rows: int) -> Costs:
        """What steps of so many sequences cost, the longest with so many tokens.

        Args:
            most_rows: bound on the rows of a step.
        """
        bucket = self._bucket(batch)
        return Costs(
            rows=self._rows[bucket],
            seconds=self._corrections[bucket].seconds(context),
            drafts=self._draft[bucket],
            padding=self.padding(batch, context) if self._padding else 0.0,
            uneven=self._uneven.get(bucket, 0.0),
            outside=self._outside.get(bucket, 0.0),
            host=self._host.get(bucket, 0.0),
            grid_batch=float(self._grid.batch(batch)) if self._grid is not None else 0.0,
            grid_nodes=self._grid_nodes,
            most_rows=float(most_rows),
        )

    def optimistic(self, costs: Costs, batch: int, context: int, rows: float) -> Costs:
        """`costs`, if steps take as little as they plausibly may, but one of `rows` what it is thought to."""
        points, seconds = self._corrections[self._bucket(batch)].optimistic(context, rows)
        return costs._replace(rows=points, seconds=seconds)

    def predict(self, batch: int, context: int, rows: Array) -> Array:
        """Seconds of the forward pass and all that follows, for each number of rows; without drafting."""
        costs = self.costs(batch, context, 0)
        return np.array([predict(costs.rows, costs.seconds, float(count)) for count in rows])

    def rows(self, batch: int, rows: int, largest: int) -> float:
        """Rows that are computed for so many nodes in all, and so many of the largest tree."""
        return float(rows) if self._grid is None else self._grid.rows(batch, largest)

    def padding(self, batch: int, context: int) -> float:
        """Seconds for each cell of the grid that holds no node."""
        return self._padding.get(self._bucket(batch), 0.0) * max(1.0, context / self._context)

    def widens(self, batch: int, context: int) -> bool:
        """Whether one large tree costs something for every sequence of its batch."""
        return self._grid is not None or self.padding(batch, context) > 0.0

    def observe(
        self, batch: int, context: int, rows: float, seconds: float, other_s: float, cells: int = 0
    ) -> None:
        """Learn from a step.

        Args:
            batch: sequences.
            context: tokens of the longest.
            rows: that were computed.
            seconds: what it took.
            other_s: what drafting is thought to take of it.
            cells: of the grid, that hold no node.
        """
        bucket = self._bucket(batch)
        uneven = self._uneven.get(bucket, 0.0)
        if cells:
            other_s += cells * self.padding(batch, context) + uneven
        error = self._corrections[bucket].observe(context, rows, max(seconds - other_s, 0.1 * seconds))
        if self._grid is not None:
            return  # a captured step takes what its bucket takes
        if cells:
            error = min(max(error, -self._MOST_UNEVEN), self._MOST_UNEVEN)
            self._uneven[bucket] = max(0.0, uneven + self._UNEVEN_RATE * error * seconds)
        else:
            self._uneven[bucket] = uneven + self._FORGET * (self._measured_uneven.get(bucket, 0.0) - uneven)

    def observe_outside(self, batch: int, seconds: float) -> None:
        """Learn what a step of so many sequences took besides."""
        self._average(self._outside, self._bucket(batch), seconds, self._RATE)

    def observe_host(self, batch: int, seconds: float) -> None:
        """Learn what the host took for a step of so many sequences, see `Costs.host`."""
        bucket = self._bucket(batch)
        self._host_steps[bucket] += 1  # the first ones count for more
        self._average(self._host, bucket, seconds, max(self._RATE, 1.0 / self._host_steps[bucket]))

    @staticmethod
    def _average(known: dict[int, float], bucket: int, seconds: float, rate: float) -> None:
        before = known.get(bucket, 0.0)
        usual = min(seconds, 2 * before + 0.001)  # a hiccup of the machine is not
        known[bucket] = before + rate * (usual - before)

    def _bucket(self, batch: int) -> int:
        return self._buckets[min(bisect_left(self._buckets, batch), len(self._buckets) - 1)]


def _with_a_slope(bucket: int, measured: dict[int, list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """A bucket's points; of a single one, a second as far up as the next smaller bucket's slope says.

    Where nothing else was measured, twice the rows are thought to take twice as long.
    """
    points = measured[bucket]
    if len(points) > 1:
        return points
    (rows, seconds), slope = points[0], points[0][1] / points[0][0]
    smaller = [measured[b] for b in sorted(measured) if b < bucket and len(measured[b]) > 1]
    if smaller:
        (first, fast), (second, slow) = smaller[-1][-2:]
        slope = max(0.0, (slow - fast) / (second - first))
    return [*points, (2 * rows, seconds + slope * rows)]


def _as_far_as_trees_go(bucket: int, points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A bucket's points and, where its largest trees were not measured, some beyond: as steep as the last."""
    found = list(points)
    (first, fast), (last, slow) = points[-2:]
    slope = max(0.0, (slow - fast) / (last - first))
    while found[-1][0] < bucket * MAX_TREE_NODES:
        rows, seconds = found[-1]
        found.append((2 * rows, seconds + slope * rows))
    return found
