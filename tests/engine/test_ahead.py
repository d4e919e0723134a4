"""Steps launched before the last one's tokens are read: who is in them, and what they hold till they end."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest

from engine import faults
from engine.engine import Engine
from engine.scheduler import Chunk
from engine.types import FinishReason, Request, SamplingParams, SequenceState
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.test_scheduler import BLOCK, Nodes, make, planned, prefill, sequence
from tests.support import greedy, greedy_reference, make_engine, run_all


@pytest.fixture(autouse=True, params=["eager", "captured"])
def _mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.MODE, "ahead", True)
    monkeypatch.setitem(support.MODE, "captured", request.param == "captured")


def running(engine: Engine) -> list[str]:
    return [sequence.request.request_id for sequence in engine._scheduler.running]


def in_flight(engine: Engine) -> list[str]:
    flight = engine._flight
    return [] if flight is None else [s.request.request_id for s in flight.batch.sequences]


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_read(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree="off")
    engine.add(greedy("r", [1, 2, 3], 30))
    assert [d.token_ids for d in engine.step()] == [greedy_reference(narrow.reference, [1, 2, 3], 1)]
    assert engine.step() == []  # the first decode step has been launched
    [made] = engine._scheduler.running
    for done in range(1, 25):
        assert (made.num_output, made.in_flight) == (done, 1)
        [delta] = engine.step()
        assert delta.token_ids == greedy_reference(narrow.reference, [1, 2, 3], done + 1)[-1:]
    while engine.has_work:
        engine.step()
    assert made.token_ids[3:] == greedy_reference(narrow.reference, [1, 2, 3], 30)
    assert sum(engine.stats.acceptance_counts) == 29, "length is known beforehand: no step in vain"


@pytest.mark.parametrize(("others", "seen_of_it"), [(0, (2, 0)), (2, (2, 1))], ids=["before", "behind"])
def test_tokens_do_not_wait_for_a_prefill_launched_behind_them(
    narrow: TinyModel, others: int, seen_of_it: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a prefill's result waits for the device, and so for the step launched just before it, if there
    is one: a step of a single sequence waits for another's prompt."""
    engine = make_engine(narrow.folder, tree="off")
    for name in ["r", *map(str, range(others))]:
        engine.add(greedy(name, [1, 2, 3], 30))
    engine.step()
    engine.step()
    made = engine._scheduler.running[0]
    prefill = engine._runner.prefill
    seen: list[tuple[int, int]] = []

    def noted(chunks: list[Chunk]) -> object:
        seen.append((made.num_output, made.in_flight))
        return prefill(chunks)

    monkeypatch.setattr(engine._runner, "prefill", noted)
    engine.add(greedy("other", [4, 5], 30))
    engine.step()
    assert seen == [seen_of_it], "the step before has been read, the next one is under way"


def test_who_ended_is_dropped_a_step_late_and_holds_its_own_till_then(narrow: TinyModel) -> None:
    """`stop` ends by a token that nobody foresees; the step after it runs in vain and is shown to nobody."""
    reference = greedy_reference(narrow.reference, [1, 2, 3], 30)
    stop = reference[6]
    end = reference.index(stop) + 1
    engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
    engine.add(greedy("stop", [1, 2, 3], 30, stop_token_ids=(stop,)))
    engine.add(greedy("on", [4, 5], 60))
    found = [delta for delta in engine.step() if delta.request_id == "stop"]
    while "stop" in running(engine):
        found += [delta for delta in engine.step() if delta.request_id == "stop"]
    assert found[-1].finish_reason is FinishReason.STOP
    assert "stop" in in_flight(engine)
    [held] = engine._scheduler._ended
    assert held.blocks
    assert held.slot not in engine._scheduler._free_slots
    engine._scheduler.check()
    later = engine.step()
    assert "stop" not in {delta.request_id for delta in later} | set(in_flight(engine))
    assert not held.blocks
    assert held.slot == -1
    assert [token for delta in found for token in delta.token_ids] == reference[:end]
    emitted = engine.stats.generation_tokens
    while engine.has_work:
        emitted += sum(len(delta.token_ids) for delta in engine.step())
    engine.check()
    assert emitted == engine.stats.generation_tokens == end + 60


def test_an_abort_waits_for_the_step_that_holds_it(narrow: TinyModel) -> None:
    engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
    engine.add(greedy("gone", [1, 2, 3], 50))
    engine.add(greedy("on", [4, 5], 50))
    for _ in range(4):
        engine.step()
    assert set(in_flight(engine)) == {"gone", "on"}
    assert [delta.finish_reason for delta in engine.abort("gone")] == [FinishReason.ABORT]
    assert [made.request.request_id for made in engine._scheduler._ended] == ["gone"]
    engine._scheduler.check()
    assert {delta.request_id for delta in engine.step()} <= {"on"}
    assert not engine._scheduler._ended
    engine.abort("on")
    assert engine._flight is None
    assert not engine.has_work
    engine.check()


@pytest.mark.parametrize("fault", ["decode=raise@4", "prefill=raise@2"])
def test_a_launch_that_fails_tells_first_what_was_emitted_before(narrow: TinyModel, fault: str) -> None:
    engine = make_engine(narrow.folder, tree="off")
    engine.add(greedy("first", [1, 2, 3], 20))
    found: dict[str, list[int]] = {"first": [], "second": []}
    ends: dict[str, FinishReason] = {}
    with faults.injected(fault):
        for step in count():
            if step == 3:
                engine.add(greedy("second", [4, 5], 20))
            for delta in engine.step():
                assert delta.request_id not in ends
                found[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None:
                    ends[delta.request_id] = delta.finish_reason
            if step > 3 and not engine.has_work:
                break
    assert found["first"] == greedy_reference(narrow.reference, [1, 2, 3], 20)[: len(found["first"])]
    failed = "first" if fault.startswith("decode") else "second"
    assert ends[failed] is FinishReason.ERROR
    if failed == "first":
        assert len(found["first"]) == 4, "the prefill's token and three steps'"
    else:
        assert ends["first"] is FinishReason.LENGTH
        assert len(found["first"]) == 20
    engine.check()


def test_who_ended_in_the_step_before_a_launch_that_fails_does_not_fail_too(narrow: TinyModel) -> None:
    """It was in what was to be launched: nobody knew yet."""
    reference = greedy_reference(narrow.reference, [1, 2, 3], 30)
    stop = reference[6]
    steps = reference.index(stop)  # the first token is the prefill's
    engine, deltas = make_engine(narrow.folder, tree="off"), []
    engine.add(greedy("stop", [1, 2, 3], 30, stop_token_ids=(stop,)))
    engine.add(greedy("on", [4, 5], 60))
    with faults.injected(f"decode=raise@{steps + 1}"):
        while engine.has_work:
            deltas += engine.step()
    assert steps > 1
    assert [(d.request_id, d.finish_reason, d.error) for d in deltas if d.finish_reason is not None] == [
        ("stop", FinishReason.STOP, None),
        ("on", FinishReason.ERROR, "internal error: RuntimeError"),
    ]
    found = [token for delta in deltas if delta.request_id == "stop" for token in delta.token_ids]
    assert found == reference[: steps + 1]
    engine.check()


def test_nobody_under_way_is_preempted(narrow: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(
        narrow.folder, tree=8, heads=str(narrow.heads), max_model_len=64, kv_cache_tokens=128
    )
    preempt = engine._scheduler._preempt
    states: list[int] = []

    def seen(victim) -> None:
        states.append(victim.in_flight)
        preempt(victim)

    monkeypatch.setattr(engine._scheduler, "_preempt", seen)
    asked = [greedy(f"r{i}", [i, 2, 3], 50) for i in range(6)]
    outputs = run_all(engine, asked, arrive_every=1)
    assert states
    assert not any(states)
    for i in range(6):
        assert outputs[f"r{i}", 0] == greedy_reference(narrow.reference, [i, 2, 3], 50)


def test_logprobs_and_traces_are_read_before_the_next_step_overwrites_them(narrow: TinyModel) -> None:
    for wanted in ({"trace": True}, {}):
        engine = make_engine(narrow.folder, tree=8, heads=str(narrow.heads))
        sampling = SamplingParams(temperature=0, max_tokens=30, logprobs=None if wanted else 1)
        engine.add(Request("r", (1, 2, 3), sampling, **wanted))
        engine.step()
        engine.step()
        for _ in range(5):
            assert engine._flight is not None
            assert engine._flight.lingers
            before = engine._flight
            engine.step()
            assert engine._flight is not before
            assert engine._scheduler.running[0].in_flight == max(engine._flight.most), (
                "only one step at a time is under way"
            )


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_the_books_are_right(narrow: TinyModel, seed: int) -> None:
    """Requests of all kinds come, are aborted, stop, fail, are preempted; who survives has its own text."""
    rng = Random(seed)
    settings = {"tree": 8, "heads": str(narrow.heads), "max_model_len": 64, "kv_cache_tokens": 144}
    asked = {
        f"r{i}": Request(
            f"r{i}",
            tuple(rng.randrange(12) for _ in range(rng.randint(1, 30))),
            SamplingParams(
                temperature=rng.choice([0.0, 0.9]),
                seed=i,
                max_tokens=rng.randint(1, 30),
                stop_token_ids=rng.choice([(), (3,)]),
                presence_penalty=rng.choice([0.0, 0.8]),
                logprobs=rng.choice([None, None, 2]),
            ),
            trace=rng.random() < 0.2,
        )
        for i in range(24)
    }
    support.MODE["ahead"], ahead = False, True
    plain = make_engine(narrow.folder, tree="off", max_model_len=64)
    alone = run_all(plain, list(asked.values()))
    support.MODE["ahead"] = ahead
    engine = make_engine(narrow.folder, max_num_seqs=5, **settings)
    waiting, found, ended = list(asked.values()), {name: [] for name in asked}, {}
    with faults.injected(f"decode=raise@{20 + seed}, prefill=raise@{9 + seed}"):
        while waiting or engine.has_work:
            deltas = []
            if waiting and rng.random() < 0.5:
                engine.add(waiting.pop(0))
            if rng.random() < 0.06 and (names := running(engine)):
                deltas += engine.abort(rng.choice(names))
            deltas += engine.step()
            engine._scheduler.check()
            for delta in deltas:
                assert delta.request_id not in ended, "nothing comes after the end"
                found[delta.request_id] += delta.token_ids
                if delta.finish_reason is not None:
                    ended[delta.request_id] = delta.finish_reason
    engine.check()
    assert set(ended) == set(asked)
    assert {FinishReason.ABORT, FinishReason.ERROR, FinishReason.LENGTH} <= set(ended.values())
    for name, tokens in found.items():
        whole = alone[name, 0]
        complete = ended[name] in (FinishReason.LENGTH, FinishReason.STOP)
        assert tokens == (whole if complete else whole[: len(tokens)]), name


def test_the_scheduler_reserves_for_the_most_that_may_come() -> None:
    scheduler = make(blocks=40, chooser=Nodes(4), max_tree_nodes=4)
    first, second = sequence(1, prompt=7, output=20), sequence(2, prompt=7, output=5)
    for seq in (first, second):
        scheduler.add(seq)
    for chunk in planned(scheduler).prefill:
        prefill(scheduler, chunk)
    plan = scheduler.plan()
    for seq in plan.decode:
        seq.in_flight = 4  # a chain of three and the draw at its end
    ahead = scheduler.plan_ahead()
    assert ahead is not None
    assert ahead.decode == [first], "the second may have ended: four of its five tokens are left"
    assert len(first.blocks) * BLOCK >= first.num_cached + 4 + 4


def test_the_scheduler_does_not_plan_ahead_where_somebody_may_have_to_give_way() -> None:
    scheduler = make(blocks=4, chooser=Nodes(4), max_tree_nodes=4)
    seq = sequence(1, prompt=7, output=9)
    scheduler.add(seq)
    for chunk in planned(scheduler).prefill:
        prefill(scheduler, chunk)
    [decoded] = scheduler.plan().decode
    decoded.in_flight = 4
    ahead = scheduler.plan_ahead()
    assert ahead is not None
    assert ahead.decode == [seq]
    assert len(seq.blocks) == 4  # all there are: 7 + 4 + 4 rows
    other = sequence(2, prompt=3, output=9)
    scheduler.add(other)
    decoded.num_cached, decoded.in_flight = 9, 4
    assert scheduler.plan_ahead() is None  # 9 + 4 + 4 rows are five blocks
    assert seq.state is SequenceState.DECODE
    assert seq.slot >= 0
    assert other.slot == -1


def test_what_is_removed_under_way_is_freed_when_the_step_has_ended() -> None:
    scheduler = make(blocks=20, max_num_seqs=1)
    seq, other = sequence(1, prompt=7, output=9), sequence(2, prompt=7, output=9)
    scheduler.add(seq)
    for chunk in planned(scheduler).prefill:
        prefill(scheduler, chunk)
    scheduler.plan()
    seq.in_flight = 2
    held = scheduler._blocks.used
    scheduler.remove(seq)
    scheduler.add(other)
    assert seq.state is SequenceState.FINISHED
    assert not scheduler.running
    scheduler.check()
    assert scheduler._blocks.used == held
    scheduler.release_ended()
    plan = scheduler.plan_ahead()
    assert plan is not None
    scheduler.add_prompts(plan)
    assert not plan.prefill, "its slot is the only one"
    seq.in_flight = 0
    scheduler.release_ended()
    assert seq.slot == -1
    scheduler.check()
    assert [chunk.sequence for chunk in planned(scheduler).prefill] == [other]
