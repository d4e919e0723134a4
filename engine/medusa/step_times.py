"""What a decode step takes: measured at start-up, corrected while serving."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.medusa.buckets import Buckets

__all__ = ["StepTimes"]

Array = NDArray[np.float64]


class StepTimes:
    """Seconds of a decode step by batch size, rows (nodes of all its sequences) and longest context.

    Measured points hold for an idle machine and a short context; what serving takes corrects them, by
    context bucket, as a whole and point by point. What a step takes besides (planning it, handing out its
    tokens) is learned while serving: it is the same for any tree, so the larger it is the larger a tree pays.

    Args:
        measured: for each batch bucket, (rows, seconds) points, rows rising.
        draft: for each batch bucket, seconds the heads take for each considered size; empty without.
        padding: for each batch bucket, seconds a cell of the grid takes that holds no node: where trees
            differ in size, attention works on as many nodes for each sequence as the largest tree has.
        context: of the measured sequences, in tokens; padding costs in proportion to it.
        buckets: of captured steps, which take what their bucket takes; None without.
    """

    _RATE = 0.05

    def __init__(
        self,
        measured: dict[int, list[tuple[int, float]]],
        draft: dict[int, list[float]],
        padding: dict[int, float] | None = None,
        context: int = 128,
        buckets: Buckets | None = None,
    ) -> None:
        self._grid = buckets
        self._padding, self._context = padding or {}, context
        self._buckets = sorted(measured)
        measured = {b: _with_a_slope(b, measured) for b in self._buckets}
        self._rows = {b: np.array([row for row, _ in measured[b]], dtype=float) for b in self._buckets}
        self._base = {b: np.log(np.maximum.accumulate([t for _, t in measured[b]])) for b in self._buckets}
        self._draft = {b: np.asarray(draft.get(b, [0.0])) for b in self._buckets}
        self._corrections: dict[tuple[int, int], tuple[float, Array]] = {}
        self._outside: dict[int, float] = {}

    def predict(self, batch: int, context: int, rows: Array) -> Array:
        """Seconds of the forward pass and all that follows, for each number of rows; without drafting."""
        bucket = self._bucket(batch)
        shift, local = self._correction(bucket, context)
        knots, values = self._rows[bucket], np.exp(self._base[bucket] + shift + local)
        values = np.maximum.accumulate(values)
        found: Array = np.interp(rows, knots, values)
        # Beyond the points as steep as beside them; below them lies a batch smaller than its bucket.
        first = (values[1] - values[0]) / (knots[1] - knots[0])
        last = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
        found += np.maximum(0.0, rows - knots[-1]) * last - np.maximum(0.0, knots[0] - rows) * first
        np.maximum(found, 0.1 * values[0], out=found)
        return found

    def rows(self, batch: int, rows: Array, largest: Array) -> Array:
        """Rows that are computed for so many nodes in all, and so many of the largest tree."""
        return rows if self._grid is None else self._grid.rows(batch, largest)

    def padding(self, batch: int, context: int) -> float:
        """Seconds for each cell of the grid that holds no node."""
        return self._padding.get(self._bucket(batch), 0.0) * max(1.0, context / self._context)

    def widens(self, batch: int, context: int) -> bool:
        """Whether one large tree costs something for every sequence of its batch."""
        return self._grid is not None or self.padding(batch, context) > 0.0

    def outside(self, batch: int) -> float:
        """Seconds of a step besides what is timed: drafting, forward pass, and all to the accepted tokens."""
        return self._outside.get(self._bucket(batch), 0.0)

    def draft(self, batch: int) -> Array:
        """[C] seconds of drafting for each considered size of the heads' branch."""
        return self._draft[self._bucket(batch)]

    def observe(self, batch: int, context: int, rows: int, seconds: float, other_s: float) -> None:
        """Learn from a step of `seconds`, of which drafting and padding are thought to be `other_s`."""
        bucket = self._bucket(batch)
        shift, local = self._correction(bucket, context)
        predicted = float(self.predict(batch, context, np.array([rows], dtype=float))[0])
        error = math.log(max(seconds - other_s, 0.1 * seconds) / predicted)
        error = min(max(error, -0.3), 0.3)  # a hiccup of the machine is not the step's time
        knots = self._rows[bucket]
        position = float(np.interp(rows, knots, np.arange(len(knots))))
        weight = np.maximum(0.0, 1.0 - np.abs(np.arange(len(knots)) - position))
        local = 0.999 * local + self._RATE * error * weight
        self._corrections[bucket, _context_bucket(context)] = (shift + self._RATE * error, local)

    def observe_outside(self, batch: int, seconds: float) -> None:
        """Learn what a step of so many sequences took besides."""
        known = self._outside.get(self._bucket(batch), 0.0)
        usual = min(seconds, 2 * known + 0.001)  # a hiccup of the machine is not
        self._outside[self._bucket(batch)] = known + self._RATE * (usual - known)

    def _bucket(self, batch: int) -> int:
        return next((b for b in self._buckets if b >= batch), self._buckets[-1])

    def _correction(self, bucket: int, context: int) -> tuple[float, Array]:
        found = self._corrections.get((bucket, _context_bucket(context)))
        if found is None:  # a new context starts from what the nearest shorter one has learned
            shorter = [c for b, c in self._corrections if b == bucket and c < _context_bucket(context)]
            found = (
                self._corrections[bucket, max(shorter)]
                if shorter
                else (0.0, np.zeros(len(self._rows[bucket])))
            )
        return found


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
