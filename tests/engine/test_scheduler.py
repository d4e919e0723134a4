from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from engine.cache.blocks import BlockManager
from engine.scheduler import Chunk, Plan, Scheduler
from engine.types import Request, SamplingParams, Sequence, SequenceState

BLOCK = 4


class Nodes:
    """A chooser that gives everyone the same tree."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def choose(self, sequences: list[Sequence], _others_wait: bool, /) -> None:
        for seq in sequences:
            seq.head_nodes, seq.lookup_nodes = self.nodes - 1, 0


def choices(request: Request, arrival: int = 0) -> list[Sequence]:
    prompt, sampling = request.prompt_token_ids, request.sampling
    return [
        Sequence(
            request,
            index,
            seed=0,
            token_ids=list(prompt),
            num_prompt=len(prompt),
            max_total=len(prompt) + (sampling.max_tokens or 0),
            arrival=arrival + index,
        )
        for index in range(sampling.n)
    ]


def sequence(
    arrival: int, prompt: int | list[int], output: int, salt: str | None = None, priority: int = 0
) -> Sequence:
    """A number as prompt stands for so many tokens that no other sequence has."""
    tokens = [1000 * arrival + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    sampling = SamplingParams(max_tokens=output)
    request = Request(f"r{arrival}", tuple(tokens), sampling, cache_salt=salt, priority=priority)
    return choices(request, arrival)[0]


def make(blocks: int = 100, **options: object) -> Scheduler:
    defaults = {"max_num_seqs": 8, "max_step_tokens": 64}
    return Scheduler(BlockManager(blocks + 1, BLOCK), **(defaults | options))


def prefill(scheduler: Scheduler, chunk: Chunk) -> None:
    seq = chunk.sequence
    assert chunk.start == seq.num_cached < chunk.end <= seq.prefill_target
    seq.num_cached = chunk.end
    if chunk.last:
        seq.state = SequenceState.DECODE
        if not seq.num_output:
            seq.token_ids.append(0)
    scheduler.publish(seq)


def planned(scheduler: Scheduler) -> Plan:
    """A step while nothing is under way."""
    plan = scheduler.plan()
    if not plan.prefill:
        scheduler.add_prompts(plan)
    return plan


def advance(scheduler: Scheduler, accept: int = 0) -> Plan:
    """Carry out a plan as the engine would, up to `accept` draft tokens a sequence."""
    plan = planned(scheduler)
    for chunk in plan.prefill:
        prefill(scheduler, chunk)
    for seq in plan.decode:
        assert len(seq.blocks) * BLOCK >= seq.num_cached + seq.num_nodes
        run = min(accept, seq.num_nodes - 1) + 1
        seq.num_cached += run
        seq.token_ids += [0] * run
        del seq.token_ids[seq.max_total :]
        scheduler.publish(seq)
    for seq in list(scheduler.running):
        if len(seq.token_ids) >= seq.max_total:
            scheduler.remove(seq)
    scheduler.check()
    return plan


def advance_until_preemption(scheduler: Scheduler) -> list[Plan]:
    plans = []
    while not scheduler.preemptions:
        assert scheduler.has_work, "nobody was preempted"
        plans.append(advance(scheduler))
    return plans


def finish(scheduler: Scheduler) -> None:
    for _ in range(2000):
        if not scheduler.has_work:
            return
        plan = advance(scheduler)
        assert plan.prefill or plan.decode
    raise AssertionError("it does not end")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(40, 60),
    st.integers(0, 3),
    st.integers(17, 40),
)
def test_everything_finishes_within_its_bounds(requests, slots, nodes, step_tokens, accept, blocks) -> None:
    """However small the pool (the largest request and its tree just fit), all end and no block is lost."""
    scheduler = make(
        blocks,
        max_num_seqs=slots,
        max_step_tokens=step_tokens,
        chooser=Nodes(nodes),
        max_tree_nodes=nodes,
    )
    waiting = [
        sequence(arrival, prompt, output, priority=arrival * 5 % 3)
        for arrival, (prompt, output) in enumerate(requests)
    ]
    for seq in waiting:
        scheduler.add(seq)
    for _ in range(2000):
        if not scheduler.has_work:
            break
        advance(scheduler, accept)
        assert len(scheduler.running) <= slots
    assert all(len(seq.token_ids) == seq.max_total for seq in waiting)
    assert not any(seq.blocks for seq in waiting)


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    scheduler = make(max_step_tokens=16)
    scheduler.add(sequence(0, 4, 50))
    advance(scheduler)
    scheduler.add(sequence(1, 40, 5))
    chunks, decoded = [], []
    for _ in range(3):
        plan = advance(scheduler)
        decoded.append([seq.arrival for seq in plan.decode])
        chunks += plan.prefill
    assert decoded == [[], [0], [0]], "once it waits, for what the bound has left"
    assert [chunk.end - chunk.start for chunk in chunks] == [12, 16, 12]
    assert [chunk.first for chunk in chunks] == [True, False, False]
    assert [chunk.last for chunk in chunks] == [False, False, True]


def test_the_latest_arrival_makes_room_and_keeps_its_root() -> None:
    scheduler = make(6)
    old, new = sequence(0, 8, 16), sequence(1, 8, 16)
    scheduler.add(old)
    scheduler.add(new)
    advance_until_preemption(scheduler)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [new]
    assert (new.blocks, new.slot, new.num_cached) == ([], -1, 0)
    assert new.prefill_target == len(new.token_ids) - 1


def test_priority_comes_before_arrival_in_line_and_in_whom_to_preempt() -> None:
    scheduler = make(6, max_num_seqs=2)
    low, high = sequence(0, 8, 16, priority=1), sequence(1, 8, 16, priority=-1)
    later, equal = sequence(2, 4, 4), sequence(3, 4, 4)
    for seq in (low, equal, later, high):
        scheduler.add(seq)
    assert list(scheduler.waiting) == [high, later, equal, low]
    for seq in (later, equal):
        scheduler.remove(seq)
    advance_until_preemption(scheduler)
    assert (scheduler.running, list(scheduler.waiting)) == ([high], [low])


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_the_preempted_resume_with_what_is_left_of_their_blocks(prompt_logprobs: int | None) -> None:
    scheduler = make(8)
    old = sequence(0, 8, 16)
    sampling = SamplingParams(max_tokens=16, prompt_logprobs=prompt_logprobs)
    (new,) = choices(Request("new", tuple(range(50, 58)), sampling), arrival=1)
    scheduler.add(old)
    scheduler.add(new)
    advance_until_preemption(scheduler)
    counted = (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens)
    assert counted == (16 if prompt_logprobs is None else 8, 0)
    while new not in scheduler.running:
        plan = advance(scheduler)
    (chunk,) = plan.prefill
    assert chunk.first
    assert chunk.start >= 8, "its prompt at least is still there"
    assert new.num_reused == 0
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == counted


def test_nobody_is_admitted_without_room_for_a_first_tree() -> None:
    scheduler = make(3, chooser=Nodes(5), max_tree_nodes=5)
    for arrival in range(2):
        scheduler.add(sequence(arrival, 4, 1 + arrival))  # a block for the prompt and one for a small tree
    assert [chunk.sequence.arrival for chunk in planned(scheduler).prefill] == [0]


def test_trees_are_given_up_before_anyone_is_preempted() -> None:
    scheduler = make(8, chooser=Nodes(9), max_tree_nodes=9)
    old, new = sequence(0, 4, 50), sequence(1, 4, 50)  # 1 + 2 blocks each, with the tree 4 and more
    scheduler.add(old)
    scheduler.add(new)
    seen: set[tuple[int, int]] = set()
    while not scheduler.preemptions:
        plan = advance(scheduler)
        if len(plan.decode) == 2:
            seen |= {(seq.arrival, seq.num_nodes) for seq in plan.decode}
    assert seen == {(0, 9), (1, 9), (0, 1), (1, 1)}
    # All of the 16 rows that each has are full, but for the roots: nobody was preempted a step too early.
    assert (len(old.token_ids), len(new.token_ids)) == (18, 17)
    assert scheduler.running == [old]


def test_the_chooser_may_give_each_sequence_its_own_tree() -> None:
    class Own:
        def choose(self, sequences: list[Sequence], _others_wait: bool, /) -> None:
            for seq in sequences:
                seq.head_nodes, seq.lookup_nodes = seq.arrival, 1

    scheduler = make(chooser=Own(), max_tree_nodes=8)
    for arrival in range(3):
        scheduler.add(sequence(arrival, 3, 20))
    advance(scheduler)
    plan = advance(scheduler)
    assert [seq.num_nodes for seq in plan.decode] == [2, 3, 4]
    for seq in plan.decode:
        assert len(seq.blocks) * BLOCK >= seq.num_cached + seq.num_nodes


def test_the_chooser_is_told_who_waits() -> None:
    told = []

    class Told(Nodes):
        def choose(self, sequences: list[Sequence], others_wait: bool, /) -> None:
            told.append(([seq.arrival for seq in sequences], others_wait))
            super().choose(sequences, others_wait)

    scheduler = make(chooser=Told(1), max_num_seqs=1)
    for arrival in range(2):
        scheduler.add(sequence(arrival, 3, 3))
    while scheduler.has_work:
        advance(scheduler)
    assert told == [([0], True)] * 2 + [([1], False)] * 2


@pytest.mark.parametrize(("nodes", "bound"), [(17, 64), (9, 8)])
def test_a_chooser_that_breaks_its_promise_is_found(nodes: int, bound: int) -> None:
    scheduler = make(chooser=Nodes(nodes), max_tree_nodes=bound)
    for arrival in range(4):
        scheduler.add(sequence(arrival, 2, 40))
    advance(scheduler)
    with pytest.raises(RuntimeError, match="exceed the bounds"):
        scheduler.plan()


def test_more_slots_than_rows_of_a_step_are_not_used() -> None:
    scheduler = make(max_num_seqs=100, max_step_tokens=16)
    for arrival in range(40):
        scheduler.add(sequence(arrival, 1, 9))
    for _ in range(3):
        advance(scheduler)
        assert len(scheduler.running) == 16
    finish(scheduler)


def test_a_new_request_begins_behind_the_blocks_of_an_earlier_one() -> None:
    scheduler = make()
    prompt = list(range(10))
    first = sequence(0, prompt, 4)
    scheduler.add(first)
    finish(scheduler)
    answer = first.token_ids[10:]
    second = sequence(
        1, [*prompt, *answer, 77, 78], 4
    )  # 12 of 13 rows were computed: the next turn of a chat
    scheduler.add(second)
    (chunk,) = advance(scheduler).prefill
    assert (chunk.start, chunk.end, chunk.first, chunk.last) == (12, 16, True, True)
    assert second.num_reused == 12
    assert (scheduler.prefix_query_tokens, scheduler.prefix_hit_tokens) == (26, 12)
    third = sequence(2, [*second.token_ids[:17], 5], 4)  # what the second added stands behind the first's
    scheduler.add(third)
    advance(scheduler)
    assert third.num_reused == 16
    stray = sequence(3, [*second.token_ids[12:16], 5], 4)  # the same tokens with nothing before them
    scheduler.add(stray)
    advance(scheduler)
    assert stray.num_reused == 0


@pytest.mark.parametrize(("length", "reused"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_of_a_whole_prompt_at_least_one_token_is_computed(length: int, reused: int) -> None:
    scheduler = make()
    for arrival in range(2):
        scheduler.add(sequence(arrival, list(range(length)), 12))
        chunks = advance(scheduler).prefill
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(reused, length)]


def test_tokens_that_were_accepted_but_not_emitted_are_not_published() -> None:
    scheduler = make(chooser=Nodes(8), max_tree_nodes=8)
    seq = sequence(0, 6, 4)
    scheduler.add(seq)
    advance(scheduler)
    advance(scheduler, accept=7)  # 14 rows cached, 10 tokens emitted
    assert not scheduler.has_work
    assert scheduler._blocks.cached == 2


def test_salts_separate() -> None:
    scheduler = make()
    for arrival, salt in enumerate([None, "a", "b", "a", None]):
        seq = sequence(arrival, list(range(9)), 4, salt)
        scheduler.add(seq)
        advance(scheduler)
        assert seq.num_reused == (8 if arrival > 2 else 0)


def test_without_prefix_caching_only_the_choices_of_a_request_share() -> None:
    scheduler = make(prefix_caching=False)
    for name in ("same", "same"):  # equal in everything, and yet two requests
        request = Request(name, tuple(range(9)), SamplingParams(max_tokens=2, n=2))
        one, other = choices(request)
        scheduler.add(one)
        scheduler.add(other)
        finish(scheduler)
        assert (one.num_reused, other.num_reused) == (0, 8)


def test_the_choices_of_a_request_prefill_once_and_others_pass_meanwhile() -> None:
    scheduler = make(max_step_tokens=16)
    many = choices(Request("many", tuple(range(26)), SamplingParams(max_tokens=4, n=3)))
    for seq in [*many, sequence(3, 3, 50)]:
        scheduler.add(seq)
    begun = [[(c.sequence.arrival, c.start, c.end) for c in advance(scheduler).prefill] for _ in range(3)]
    assert begun == [[(0, 0, 16)], [(0, 16, 26), (3, 0, 3)], [(1, 24, 26), (2, 24, 26)]]


def test_a_short_prompt_makes_no_choice_wait() -> None:
    scheduler = make()
    for seq in choices(Request("many", (1, 2, 3, 4), SamplingParams(max_tokens=4, n=3))):
        scheduler.add(seq)
    assert len(advance(scheduler).prefill) == 3


def test_a_choice_goes_on_alone_when_its_sibling_is_gone() -> None:
    scheduler = make(max_step_tokens=16)
    one, other = choices(Request("r", tuple(range(40)), SamplingParams(max_tokens=4, n=2)))
    scheduler.add(one)
    scheduler.add(other)
    advance(scheduler)
    assert scheduler.running == [one]
    scheduler.remove(one)
    (chunk,) = advance(scheduler).prefill
    assert (chunk.sequence, chunk.start) == (other, 16)


def test_prompt_logprobs_need_a_prefill_of_their_own() -> None:
    scheduler = make()
    scheduler.add(sequence(0, list(range(9)), 4))
    advance(scheduler)
    queried = scheduler.prefix_query_tokens
    sampling = SamplingParams(max_tokens=40, n=2, prompt_logprobs=0)
    one, other = choices(Request("r", tuple(range(9)), sampling), arrival=1)
    scheduler.add(one)
    scheduler.add(other)
    (chunk,) = advance(scheduler).prefill
    assert (chunk.sequence, chunk.start, one.num_reused) == (one, 0, 0)
    assert scheduler.prefix_query_tokens == queried
    (chunk,) = advance(scheduler).prefill
    assert (chunk.sequence, chunk.start, other.num_reused) == (other, 8, 8)


def test_waiting_stays_in_order_of_arrival() -> None:
    """Someone who passed a waiting choice and is preempted gets back behind it."""
    scheduler = make(9, max_step_tokens=16)
    many = choices(Request("many", tuple(range(26)), SamplingParams(max_tokens=4, n=2)), arrival=1)
    for seq in [sequence(0, 3, 20), *many, sequence(3, 3, 20)]:
        scheduler.add(seq)
    advance_until_preemption(scheduler)
    assert [seq.arrival for seq in scheduler.running] == [0, 1]
    assert [seq.arrival for seq in scheduler.waiting] == [2, 3]
    finish(scheduler)


def test_unsound_blocks_are_not_reused_and_are_named_for_zeroing() -> None:
    scheduler = make()
    prompt = list(range(9))
    one = sequence(0, prompt, 20)
    scheduler.add(one)
    advance(scheduler)
    other = sequence(1, prompt, 20)
    scheduler.add(other)
    advance(scheduler)
    assert other.num_reused == 8
    shared, own = other.blocks[:2], other.blocks[2:]
    assert scheduler.forget(other) == own
    scheduler.remove(other)
    third = sequence(2, prompt, 20)
    scheduler.add(third)
    advance(scheduler)
    assert third.num_reused == 0
    scheduler.remove(one)
    assert not set(shared) & {*third.blocks}
    finish(scheduler)


def test_a_block_that_nobody_runs_with_or_that_two_believe_theirs_is_found() -> None:
    scheduler = make()
    one, other = sequence(0, 4, 20), sequence(1, 4, 20)
    scheduler.add(one)
    scheduler.add(other)
    advance(scheduler)
    scheduler.check()
    kept = other.blocks
    other.blocks = [one.blocks[0], *kept[1:]]  # as many blocks, of which one is its neighbour's
    with pytest.raises(RuntimeError, match="K/V blocks are owned"):
        scheduler.check()
    other.blocks = kept[1:]
    with pytest.raises(RuntimeError, match="K/V blocks are owned, "):
        scheduler.check()
    other.blocks = kept
    scheduler.check()


def test_prompts_have_a_bound_of_their_own() -> None:
    scheduler = make(max_step_tokens=16, max_prefill_tokens=40)
    for arrival in range(3):
        scheduler.add(sequence(arrival, 25, 5))
    assert [(chunk.start, chunk.end) for chunk in planned(scheduler).prefill] == [(0, 25), (0, 15)]
