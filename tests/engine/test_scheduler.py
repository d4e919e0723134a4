from hypothesis import given, settings, strategies as st

from engine.cache.blocks import BlockManager
from engine.scheduler import Scheduler
from engine.types import Request, SamplingParams, Sequence, SequenceState


def sequence(arrival: int, prompt: int, output: int) -> Sequence:
    request = Request(f"r{arrival}", tuple(range(prompt)), SamplingParams(max_tokens=output))
    return Sequence(
        request,
        0,
        seed=0,
        token_ids=list(range(prompt)),
        num_prompt=prompt,
        max_total=prompt + output,
        arrival=arrival,
    )


def advance(scheduler: Scheduler, accept: int) -> set[int]:
    """Carry out a plan as the engine would, `accept` draft tokens a step; returns who finished."""
    plan = scheduler.plan()
    done = set()
    for chunk in plan.prefill:
        seq = chunk.sequence
        assert chunk.start == seq.num_cached < chunk.end
        seq.num_cached = chunk.end
        if chunk.last:
            seq.state = SequenceState.DECODE
            if not seq.num_output:
                seq.token_ids.append(0)
    for seq in plan.decode:
        assert len(seq.blocks) * 4 >= seq.num_cached + plan.tree_size
        run = min(accept, plan.tree_size - 1) + 1
        seq.num_cached += run
        seq.token_ids += [0] * run
    for seq in list(scheduler.running):
        if len(seq.token_ids) >= seq.max_total:
            scheduler.remove(seq)
            done.add(seq.arrival)
    return done


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 16),
    st.integers(16, 40),
    st.integers(0, 3),
    st.integers(17, 40),
)
def test_everything_finishes_within_its_bounds(requests, slots, tree, step_tokens, accept, blocks) -> None:
    """However small the pool (the largest request and its tree just fit), all end and no block is lost."""
    books = BlockManager(blocks + 3, 4)
    scheduler = Scheduler(books, max_num_seqs=slots, max_step_tokens=step_tokens, tree_size=min(tree, 8))
    for arrival, (prompt, output) in enumerate(requests):
        scheduler.add(sequence(arrival, prompt, output))
    done: set[int] = set()
    for _ in range(2000):
        if not scheduler.has_work:
            break
        done |= advance(scheduler, accept)
        books.check()
        assert len(scheduler.running) <= slots
    assert done == set(range(len(requests)))
    assert books.used == 0


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    scheduler = Scheduler(BlockManager(100, 4), max_num_seqs=4, max_step_tokens=16, tree_size=2)
    scheduler.add(sequence(0, 4, 50))
    advance(scheduler, 0)
    scheduler.add(sequence(1, 40, 5))
    sizes = []
    for _ in range(3):
        plan = scheduler.plan()
        assert [seq.arrival for seq in plan.decode] == [0]
        sizes += [chunk.end - chunk.start for chunk in plan.prefill]
        for chunk in plan.prefill:
            chunk.sequence.num_cached = chunk.end
    assert sizes == [16, 16, 8]


def test_the_latest_arrival_makes_room_and_keeps_its_root() -> None:
    books = BlockManager(1 + 6, 4)
    scheduler = Scheduler(books, max_num_seqs=4, max_step_tokens=64, tree_size=1)
    old, new = sequence(0, 8, 16), sequence(1, 8, 16)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.preemptions:
        advance(scheduler, 0)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [new]
    assert (new.blocks, new.slot, new.num_cached) == ([], -1, 0)
    assert new.prefill_target == len(new.token_ids) - 1


def test_the_batch_never_exceeds_the_step_bound() -> None:
    scheduler = Scheduler(BlockManager(400, 4), max_num_seqs=10, max_step_tokens=64, tree_size=32)
    for arrival in range(10):
        scheduler.add(sequence(arrival, 2, 40))
    for _ in range(3):
        plan = scheduler.plan()
        assert len(plan.decode) * plan.tree_size <= 64
        for chunk in plan.prefill:
            chunk.sequence.num_cached = chunk.end
            chunk.sequence.state = SequenceState.DECODE
            chunk.sequence.token_ids.append(0)
    assert len(plan.decode) == 10
    assert plan.tree_size == 6
