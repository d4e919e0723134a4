"""What a decode step takes: measured at start-up, corrected while serving."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engine.medusa.buckets import Buckets
from engine.medusa.choice_kernels import Costs, learn, predict

__all__ = ["StepTimes"]

Array = NDArray[np.float64]


@dataclass(slots=True)
class _Correction:
    """What serving has taught of steps of one bucket of batches and one of contexts.

    Args:
        shift: of all log seconds.
        local: [K], of those at each knot.
        seconds: [K], at each knot, corrected.
    """

    shift: float
    local: Array
    seconds: Array

    def copy(self) -> Self:
        return replace(self, local=self.local.copy(), seconds=self.seconds.copy())


class StepTimes:
    """Seconds of a decode step by batch size, rows (nodes of all its sequences) and longest context.

    Measured points hold for an idle machine and a short context; what serving takes corrects them, by
    context bucket, as a whole and, more slowly, point by point: how busy the machine is changes fast, and
    what one size takes more than another does not, so there noise counts for less. What a step takes besides
    (planning it, handing out its tokens) is learned while serving: it is the same for any tree, so the larger
    it is the larger a tree pays.

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
    _LOCAL_RATE = 0.03
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
        self._rows = {b: np.array([row for row, _ in measured[b]], dtype=float) for b in self._buckets}
        self._base = {b: np.log(np.maximum.accumulate([t for _, t in measured[b]])) for b in self._buckets}
        self._draft = {b: np.asarray(draft.get(b, [0.0])) for b in self._buckets}
        self._corrections: dict[tuple[int, int], _Correction] = {}
        self._outside: dict[int, float] = {}
        rows, base = self._rows[self._buckets[0]], self._base[self._buckets[0]]
        learn(rows, base, np.exp(base), 0.0, np.zeros_like(base), 1.0, 1.0, 0.0, 0.0)  # compiled now

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
            seconds=self._correction(bucket, context).seconds,
            drafts=self._draft[bucket],
            padding=self.padding(batch, context),
            uneven=self._uneven.get(bucket, 0.0),
            outside=self.outside(batch),
            grid_batch=float(self._grid.batch(batch)) if self._grid is not None else 0.0,
            grid_nodes=self._grid_nodes,
            most_rows=float(most_rows),
        )

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

    def outside(self, batch: int) -> float:
        """Seconds of a step besides what is timed: drafting, forward pass, and all to the accepted tokens."""
        return self._outside.get(self._bucket(batch), 0.0)

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
        known = self._correction(bucket, context)
        uneven = self._uneven.get(bucket, 0.0)
        if cells:
            other_s += cells * self.padding(batch, context) + uneven
        known.shift, error = learn(
            self._rows[bucket],
            self._base[bucket],
            known.seconds,
            known.shift,
            known.local,
            rows,
            max(seconds - other_s, 0.1 * seconds),
            self._RATE,
            self._LOCAL_RATE,
        )
        if self._grid is not None:
            return  # a captured step takes what its bucket takes
        if cells:
            self._uneven[bucket] = max(0.0, uneven + self._LOCAL_RATE * error * seconds)
        else:
            self._uneven[bucket] = uneven + self._FORGET * (self._measured_uneven.get(bucket, 0.0) - uneven)

    def observe_outside(self, batch: int, seconds: float) -> None:
        """Learn what a step of so many sequences took besides."""
        known = self._outside.get(self._bucket(batch), 0.0)
        usual = min(seconds, 2 * known + 0.001)  # a hiccup of the machine is not
        self._outside[self._bucket(batch)] = known + self._RATE * (usual - known)

    def _bucket(self, batch: int) -> int:
        return next((b for b in self._buckets if b >= batch), self._buckets[-1])

    def _correction(self, bucket: int, context: int) -> _Correction:
        key = bucket, _context_bucket(context)
        if key not in self._corrections:  # a new context starts from what the nearest shorter one has learned
            shorter = [c for b, c in self._corrections if b == bucket and c < key[1]]
            self._corrections[key] = (
                self._corrections[bucket, max(shorter)].copy()
                if shorter
                else _Correction(0.0, np.zeros(len(self._rows[bucket])), np.exp(self._base[bucket]))
            )
        return self._corrections[key]


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


def _context_bucket(context: int) -> int:
    """Powers of two: 7 is up to 128 tokens, 8 up to 256, …"""
    return max(7, (context - 1).bit_length())
