"""What a step teaches of the times of others."""

from __future__ import annotations

import numpy as np
import pytest

from engine.medusa.step_times import StepTimes
from engine.medusa.time_corrections import Corrections

ROWS = np.array([4.0, 8.0, 16.0, 32.0, 64.0])
MEASURED = 0.02 + 0.001 * ROWS


def corrections(seconds: np.ndarray = MEASURED, *, captured: bool = True) -> Corrections:
    return Corrections(ROWS, seconds, captured=captured)


def test_one_step_of_another_speed_is_carried_over_to_all() -> None:
    """The machine is slower or faster as a whole, as far as is known: and more so near by than far away."""
    for factor in (0.7, 1.3):
        known = corrections()
        known.observe(100, 8.0, factor * MEASURED[1])
        moved = np.log(known.seconds(100) / MEASURED) / np.log(factor)
        assert moved[1] > 0.8
        assert min(moved) > 0.4
        assert moved[1] > moved[2] > moved[3] > moved[4]


def test_a_second_one_tells_what_is_common_from_what_is_not() -> None:
    """One point was measured twice too cheap, which at first is thought of all."""
    known = corrections()
    for _ in range(30):
        known.observe(100, 16.0, 2.0 * MEASURED[2])
    assert known.seconds(100)[4] > 1.5 * MEASURED[4]
    for _ in range(3):
        known.observe(100, 64.0, MEASURED[4])
    found = known.seconds(100) / MEASURED
    assert found[[2, 4]] == pytest.approx([2.0, 1.0], rel=0.1)
    assert found[3] < 1.4


def test_the_less_is_known_the_more_is_learned() -> None:
    known = corrections()
    for _ in range(100):
        known.observe(100, 16.0, MEASURED[2])
    known.observe(100, 16.0, 1.25 * MEASURED[2])
    assert known.seconds(100)[2] < 1.05 * MEASURED[2]
    known.observe(100, 4.0, 0.6 * MEASURED[0])
    known.observe(100, 4.0, 0.6 * MEASURED[0])
    assert known.seconds(100)[0] == pytest.approx(0.6 * MEASURED[0], rel=0.05)


def test_times_do_not_fall_with_rows_and_what_is_known_stays() -> None:
    """Fewest rows were measured dearest: steps of more that took less bound them."""
    known = corrections(np.array([0.09, 0.03, 0.036, 0.052, 0.084]))
    before = known.seconds(100)
    assert list(before) == sorted(before)
    for _ in range(50):
        known.observe(100, 16.0, 0.036)
    after = known.seconds(100)
    assert list(after) == sorted(after)
    assert after[2] == pytest.approx(0.036, rel=0.05)
    assert after[0] <= after[2]


def test_a_longer_context_starts_from_what_the_shorter_ones_teach() -> None:
    """Also from what they teach later; and what it adds itself is not held against them."""
    known = corrections()
    for _ in range(20):
        known.observe(100, 8.0, MEASURED[1])
        known.observe(1000, 8.0, 1.3 * MEASURED[1])
    assert known.seconds(100)[1] == pytest.approx(MEASURED[1], rel=0.03)
    assert known.seconds(1000)[1] == pytest.approx(1.3 * MEASURED[1], rel=0.03)
    assert known.seconds(4000)[1] == pytest.approx(1.3 * MEASURED[1], rel=0.05)
    for _ in range(5):
        known.observe(100, 64.0, 0.5 * MEASURED[4])
    # In the longer context too it is cheaper, at the rate of what the steps of few rows show of that.
    assert known.seconds(1000)[4] < 0.8 * MEASURED[4]


def test_hope_is_for_what_is_not_known() -> None:
    known = corrections()
    for _ in range(100):
        known.observe(100, 16.0, MEASURED[2])
    rows, hoped = known.optimistic(100, 16.0)
    to_expected = dict(zip(rows.tolist(), hoped / np.interp(rows, ROWS, known.seconds(100)), strict=True))
    assert to_expected[16.0] == pytest.approx(1.0)
    assert to_expected[4.0] < 0.55
    assert list(hoped) == sorted(hoped)
    for _ in range(100):
        known.observe(100, 4.0, MEASURED[0])
    rows, hoped = known.optimistic(100, 16.0)
    assert hoped[0] > 0.9 * known.seconds(100)[0]
    for _ in range(20000):
        known.observe(100, 16.0, MEASURED[2])
    _, later = known.optimistic(100, 16.0)
    assert later[0] < 0.7 * known.seconds(100)[0]  # what is known grows old


def test_halfway_between_two_points_more_may_be_known_than_of_either() -> None:
    known = corrections()
    for _ in range(100):
        known.observe(100, 4.0, MEASURED[0])
    for _ in range(100):
        known.observe(100, 24.0, np.interp(24.0, ROWS, MEASURED))
    rows, hoped = known.optimistic(100, 4.0)
    share = dict(zip(rows.tolist(), hoped / np.interp(rows, ROWS, known.seconds(100)), strict=True))
    assert share[24.0] > 0.9
    assert share[32.0] < 0.85


@pytest.mark.parametrize("captured", [True, False])
def test_a_hiccup_is_not_believed_for_long(captured: bool) -> None:
    """One that fell on the only step of its size leaves doubt enough to try it again."""
    known = corrections(captured=captured)
    for _ in range(100):
        known.observe(100, 16.0, MEASURED[2])
    known.observe(100, 4.0, 10.0 * MEASURED[0])
    assert known.seconds(100)[0] < 1.35 * MEASURED[0]
    assert known.optimistic(100, 16.0)[1][0] < 0.8 * MEASURED[0]


def test_a_step_after_one_of_another_size_says_less_unless_it_is_captured() -> None:
    moved = []
    for captured in (True, False):
        known = corrections(captured=captured)
        for _ in range(100):
            known.observe(100, 16.0, MEASURED[2])
        known.observe(100, 4.0, 1.15 * MEASURED[0])
        moved.append(known.seconds(100)[0] / MEASURED[0])
        known.observe(100, 4.0, MEASURED[0])
        assert known.seconds(100)[0] == pytest.approx(MEASURED[0], rel=0.07)
    assert moved[0] > moved[1] + 0.03


def test_steps_of_more_rows_than_were_measured_have_points_of_their_own() -> None:
    """What they take beyond what was extrapolated is not held against those that were measured."""
    times = StepTimes({16: [(16, 0.03), (32, 0.04)]}, {})
    rows = np.array([16.0, 32.0, 512.0])
    assert times.predict(16, 100, rows) == pytest.approx([0.03, 0.04, 0.34])
    for _ in range(50):
        times.observe(16, 100, 16.0, 0.03, 0.0)
        times.observe(16, 100, 32.0, 0.04, 0.0)
    for _ in range(5):
        times.observe(16, 100, 512.0, 0.7, 0.0)
    plain, second, large = times.predict(16, 100, rows)
    assert [plain, second] == pytest.approx([0.03, 0.04], rel=0.05)
    assert large == pytest.approx(0.7, rel=0.1)
