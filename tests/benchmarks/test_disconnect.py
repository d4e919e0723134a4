import random

from benchmarks.disconnect import is_idle, make_plans
from benchmarks.side_by_side import summary


def test_a_third_leaves() -> None:
    plans = make_plans(100, 5.0, 64, random.Random(0))
    leaving = [plan.leave_after_s for plan in plans if plan.leave_after_s is not None]
    assert len(leaving) == 33
    assert 0 <= min(leaving) < max(leaving) <= 2.5
    assert {plan.stream for plan in plans} == {True, False}
    assert all(16 <= plan.max_tokens <= 64 for plan in plans)


def test_idle_means_no_block_lost() -> None:
    page = {
        "medusa_num_requests_running": 0.0,
        "medusa_num_requests_waiting": 0.0,
        'medusa_kv_blocks{state="free"}': 90.0,
        'medusa_kv_blocks{state="cached"}': 10.0,
        'medusa_kv_blocks{state="used"}': 0.0,
    }
    assert is_idle(page, 100)
    assert not is_idle(page, 101)
    assert not is_idle(page | {"medusa_num_requests_waiting": 1.0}, 100)


def test_summary_pairs_the_rounds() -> None:
    row = summary(8, [20.0, 30.0, 44.0], [10.0, 20.0, 20.0])
    assert row["ratio_median"] == 2.0
    assert row["ratio_interval_95"] == [1.5, 2.2]
    assert row["rounds"] == 3
