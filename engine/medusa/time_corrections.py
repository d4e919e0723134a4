"""What serving teaches of the times that were measured at the start: a Kalman filter over their errors.

The measured times of a bucket of batches may be wrong in any way: the machine was busy, or its clock was
another one. Each point's error is a Gaussian, alike for points that are near one another, plus one that all
points share. A step that was timed corrects the points beside it, and each other one by as much as their
errors are alike: what all share is carried over to points that nobody uses, and the less is known of a point
the more a step teaches of it. What is known grows old. (R. E. Kalman, A New Approach to Linear Filtering and
Prediction Problems, 1960.)

Everything is float64. K points of a bucket, rising in rows; S numbers that the filter estimates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.cpu_team import JIT
from engine.medusa.choice_kernels import predict

__all__ = ["Corrections"]

_JIT: dict[str, Any] = {**JIT, "nogil": False}

Array = NDArray[np.float64]

_SHORTEST, _LONGEST = 7, 20
"""Contexts by powers of two: of up to 128 tokens, as measured, and of 512 thousand and more."""

_COMMON, _OWN, _ALIKE = 0.5, 0.35, 0.5
"""Standard deviations of log seconds: of what all points share, which at a busy machine is much, and of what
is a point's own, of which two make it twice as dear as measured. And the latter's correlation from one point
to the next."""

_GROWTH = 0.15
"""Standard deviation of what twice as many tokens of context add to log seconds, and of how much more they
add to the point of most rows than to that of fewest."""

_NOISE = 0.1
"""Standard deviation of a step's log seconds."""

_ALIKE_ROWS = 1.25
"""Steps differ in size where one has more than so many times as many rows."""

_NOISE_AFTER_OTHERS, _NOISE_AFTER_OTHERS_CAPTURED = 0.4, 0.2
"""The same of a step after one of another size, which takes longer than after its like. Captured, it does
not; but a hiccup must not be believed for long that falls on the only step of its size."""

_OLD = 0.0001
"""Share of what is known that a step makes old."""

_HICCUP = 0.3
"""Log seconds beyond which a step that took longer than expected is thought to say little of the next one."""

_MOST = 1.0
"""Log seconds that a step is believed at most to have taken less than expected."""

_PLAUSIBLE = 2.0
"""Standard deviations within which a time may plausibly lie."""


class Corrections:
    """Of the steps of one bucket of batches.

    Args:
        rows: [K] of the measured points, rising; two at least.
        seconds: [K], measured.
        captured: whether a step takes what it takes, also after one of another size.
    """

    def __init__(self, rows: Array, seconds: Array, *, captured: bool) -> None:
        points, contexts = len(rows), _LONGEST - _SHORTEST
        self._rows, self._base = rows, np.log(seconds)
        scale = np.log(rows)
        self._place = (scale - scale[0]) / (scale[-1] - scale[0])
        self._between = np.sort(np.append(rows, (rows[1:] + rows[:-1]) / 2))
        apart = np.abs(np.subtract.outer(np.arange(points), np.arange(points)))
        self._prior = np.diag(np.full(points + 2 * contexts, _GROWTH**2))
        self._prior[:points, :points] = _COMMON**2 + _OWN**2 * _ALIKE**apart
        # [S]: the points' errors, then what each doubling of the context adds, and how much it tilts.
        self._errors, self._variance = np.zeros(len(self._prior)), self._prior.copy()
        self._seconds: dict[int, Array] = {}
        self._noise_after_others = _NOISE_AFTER_OTHERS_CAPTURED if captured else _NOISE_AFTER_OTHERS
        self._last = 0.0

    def seconds(self, context: int) -> Array:
        """[K] seconds at the points, never falling, of steps whose longest sequence has so many tokens."""
        doublings = _doublings(context)
        if doublings not in self._seconds:
            logs = _logs(self._base, self._place, self._errors, doublings)
            self._seconds[doublings] = _rising(logs, self._variance)
        return self._seconds[doublings]

    def optimistic(self, context: int, rows: float) -> tuple[Array, Array]:
        """[2K - 1] rows of the points and those halfway between them; [2K - 1] seconds, never falling.

        As few as they plausibly are where a step of `rows` takes what it is thought to. Halfway between two
        points more may be known than of either.
        """
        doublings = _doublings(context)
        logs = _logs(self._base, self._place, self._errors, doublings)
        doubt = _doubt(self._between, self._rows, logs, self._place, self._variance, rows, doublings)
        seconds = np.interp(self._between, self._rows, self.seconds(context))
        return self._between, np.maximum.accumulate(seconds * np.exp(-_PLAUSIBLE * doubt))

    def observe(self, context: int, rows: float, seconds: float) -> float:
        """Learn from a step of so many rows.

        Returns:
            By how much its log seconds were more than expected.
        """
        alike, doublings = self._last / _ALIKE_ROWS <= rows <= self._last * _ALIKE_ROWS, _doublings(context)
        self._last = rows
        error, found = _learn(
            self._rows,
            self._base,
            self._place,
            self._errors,
            self._variance,
            self._prior,
            doublings,
            rows,
            seconds,
            (_NOISE if alike else self._noise_after_others) ** 2,
        )
        self._seconds = {doublings: found}  # the next step will ask for them
        return error


def _doublings(context: int) -> int:
    """Of the shortest context, up to this one."""
    return min(max((context - 1).bit_length(), _SHORTEST), _LONGEST) - _SHORTEST


@njit(**_JIT)
def _logs(base: Array, place: Array, errors: Array, doublings: int) -> Array:
    """[K] log seconds at the points."""
    K = base.size
    contexts = (errors.size - K) // 2
    shift = errors[K : K + doublings].sum()
    tilt = errors[K + contexts : K + contexts + doublings].sum()
    return base + errors[:K] + shift + tilt * place


@njit(**_JIT)
def _rising(logs: Array, variance: Array) -> Array:
    """[K] seconds: the nearest to what is known, and most so where most is, of those that never fall."""
    K = logs.size
    means, weights, ends, blocks = np.empty(K), np.empty(K), np.empty(K, dtype=np.int64), 0
    for k in range(K):  # pool adjacent violators
        mean, weight = logs[k], 1.0 / variance[k, k]
        while blocks and means[blocks - 1] > mean:
            blocks -= 1
            total = weights[blocks] + weight
            mean, weight = (weights[blocks] * means[blocks] + weight * mean) / total, total
        means[blocks], weights[blocks], ends[blocks] = mean, weight, k + 1
        blocks += 1
    found, start = np.empty(K), 0
    for b in range(blocks):
        found[start : ends[b]] = np.exp(means[b])
        start = ends[b]
    return found


@njit(**_JIT)
def _share(knots: Array, logs: Array, place: Array, size: int, rows: float, doublings: int) -> Array:
    """[S]: by how much log seconds at so many rows move with each of the errors."""
    K = knots.size
    contexts = (size - K) // 2
    i = 0
    while i < K - 2 and knots[i + 1] < rows:
        i += 1
    between = min(max((rows - knots[i]) / (knots[i + 1] - knots[i]), 0.0), 1.0)
    below, above = (1.0 - between) * np.exp(logs[i]), between * np.exp(logs[i + 1])
    found = np.zeros(size)
    found[i], found[i + 1] = below / (below + above), above / (below + above)
    found[K : K + doublings] = 1.0
    found[K + contexts : K + contexts + doublings] = found[i] * place[i] + found[i + 1] * place[i + 1]
    return found


@njit(**_JIT)
def _dot(a: Array, b: Array) -> float:
    total = 0.0
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@njit(**_JIT)
def _times(matrix: Array, vector: Array) -> Array:
    found = np.empty(vector.size)
    for i in range(vector.size):
        found[i] = _dot(matrix[i], vector)
    return found


@njit(**_JIT)
def _doubt(
    at: Array, knots: Array, logs: Array, place: Array, variance: Array, rows: float, doublings: int
) -> Array:
    """Standard deviation of the log seconds of each number of rows, less those of a step of `rows`."""
    size = len(variance)
    step = _share(knots, logs, place, size, rows, doublings)
    found = np.empty(at.size)
    for k in range(at.size):
        apart = _share(knots, logs, place, size, at[k], doublings) - step
        found[k] = np.sqrt(max(_dot(apart, _times(variance, apart)), 0.0))
    return found


@njit(**_JIT)
def _learn(
    knots: Array,
    base: Array,
    place: Array,
    errors: Array,
    variance: Array,
    prior: Array,
    doublings: int,
    rows: float,
    seconds: float,
    noise: float,
) -> tuple[float, Array]:
    """The filter's step: moves `errors` and `variance` in place.

    Args:
        noise: variance of the step's log seconds.

    Returns:
        By how much the step's log seconds were more than expected; [K] seconds at the points from then on.
    """
    logs = _logs(base, place, errors, doublings)
    step = _share(knots, logs, place, errors.size, rows, doublings)
    within = knots[0] <= rows <= knots[-1]
    error = np.log(seconds / predict(knots, np.exp(logs) if within else _rising(logs, variance), rows))
    learned = min(max(error, -_MOST), _HICCUP)
    if error > _HICCUP:
        noise *= error / _HICCUP
    for i in range(errors.size):
        for j in range(errors.size):
            variance[i, j] += _OLD * (prior[i, j] - variance[i, j])
    shared = _times(variance, step)
    gain = shared / (_dot(step, shared) + noise)
    for i in range(errors.size):
        errors[i] += gain[i] * learned
        for j in range(errors.size):
            variance[i, j] -= gain[i] * shared[j]
    return error, _rising(_logs(base, place, errors, doublings), variance)
