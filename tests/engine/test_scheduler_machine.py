"""The schedule in a tiny pool against a model of what every K/V row holds, by random requests."""

from __future__ import annotations

from random import Random

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.blocks import BlockManager
from engine.scheduler import Chunk, Scheduler
from engine.types import Request, SamplingParams, Sequence, SequenceState
from tests.engine.test_scheduler import choices, planned


class Serving(RuleBasedStateMachine):
    """Random requests in a tiny pool, and a model of what every K/V row was last written for.

    A row's K/V depends on its token and all tokens before it, so that is what the model writes: the
    prefix, and who may reuse it. Sequences that read a row expect exactly theirs.
    """

    LONGEST, NODES = 24, 6

    @initialize(
        block_size=st.integers(1, 4),
        spare=st.integers(0, 8),
        slots=st.integers(1, 5),
        step_tokens=st.integers(8, 30),
        caching=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def start(
        self, block_size: int, spare: int, slots: int, step_tokens: int, caching: bool, seed: int
    ) -> None:
        self.books = BlockManager(1 + -(-(self.LONGEST + self.NODES) // block_size) + spare, block_size)
        self.caching, self.step_tokens = caching, step_tokens
        self.scheduler = Scheduler(
            self.books,
            max_num_seqs=slots,
            max_step_tokens=step_tokens,
            chooser=self,
            prefix_caching=caching,
            max_tree_nodes=self.NODES,
        )
        self.random = Random(seed)
        self.rows: dict[tuple[int, int], object] = {}
        self.admitted: set[Sequence] = set()
        self.arrivals = self.queried = self.hits = 0

    def choose(self, sequences: list[Sequence], _others_wait: bool, /) -> None:
        spare = self.step_tokens - len(sequences)
        for seq in sequences:
            extra = self.random.randint(0, min(spare, self.NODES - 1))
            spare -= extra
            seq.head_nodes = self.random.randint(0, extra)
            seq.lookup_nodes = extra - seq.head_nodes

    @rule(
        common=st.integers(0, 12),
        tail=st.lists(st.integers(0, 1), max_size=3),
        output=st.integers(1, 8),
        n=st.sampled_from([1, 1, 2, 3]),
        salt=st.sampled_from([None, None, "a"]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def submit(
        self, common: int, tail: list[int], output: int, n: int, salt: str | None, prompt_logprobs: int | None
    ) -> None:
        prompt = (*([0, 1, 1] * 4)[:common], *tail) or (0,)
        sampling = SamplingParams(max_tokens=output, n=n, prompt_logprobs=prompt_logprobs)
        for seq in choices(Request("r", prompt, sampling, cache_salt=salt), self.arrivals):
            assert seq.max_total <= self.LONGEST
            self.scheduler.add(seq)
        self.arrivals += n

    @precondition(lambda self: self.scheduler.has_work)
    @rule(failing=st.sampled_from([0.0, 0.0, 0.2]))
    def step(self, failing: float) -> None:
        plan = planned(self.scheduler)
        assert plan.prefill or plan.decode
        assert sum(seq.num_nodes for seq in plan.decode) <= self.step_tokens
        assert sum(chunk.end - chunk.start for chunk in plan.prefill) <= self.step_tokens
        for chunk in plan.prefill:
            if self.random.random() < failing:
                self.fail(chunk.sequence, chunk.end)
            else:
                self.prefill(chunk)
        for seq in plan.decode:
            if self.random.random() < failing:
                self.fail(seq, seq.num_cached + seq.num_nodes)
            else:
                self.decode(seq)

    @precondition(lambda self: self.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.remove(data.draw(st.sampled_from(list(self.scheduler))))

    def prefill(self, chunk: Chunk) -> None:
        seq = chunk.sequence
        assert chunk.start == seq.num_cached < chunk.end <= seq.prefill_target
        assert chunk.last == (chunk.end == seq.prefill_target)
        if chunk.first:
            assert chunk.start % self.books.block_size == 0
            logprobs = seq.request.sampling.prompt_logprobs is not None and seq.index == 0
            assert not (chunk.start and logprobs and not seq.num_output)
            if seq not in self.admitted:
                self.admitted.add(seq)
                self.queried += 0 if logprobs else seq.num_prompt
                self.hits += chunk.start
                assert seq.num_reused == chunk.start
        self.read(seq)
        for position in range(chunk.start, chunk.end):
            self.write(seq, position, self.content(seq, seq.token_ids[: position + 1]))
        seq.num_cached = chunk.end
        if chunk.last:
            seq.state = SequenceState.DECODE
            if not seq.num_output:
                seq.token_ids.append(self.random.randint(0, 1))
        self.settle(seq)

    def decode(self, seq: Sequence) -> None:
        assert seq.num_cached == len(seq.token_ids) - 1
        self.read(seq)
        for node in range(seq.num_nodes):
            self.write(seq, seq.num_cached + node, "tree")
        drawn = [self.random.randint(0, 1) for _ in range(self.random.randint(1, seq.num_nodes))]
        tokens = [*seq.token_ids, *drawn]
        for position in range(seq.num_cached, seq.num_cached + len(drawn)):
            self.write(seq, position, self.content(seq, tokens[: position + 1]))
        seq.num_cached += len(drawn)
        emitted = drawn[: self.random.randint(1, len(drawn))] if self.random.random() < 0.1 else drawn
        seq.token_ids = [*seq.token_ids, *emitted][: seq.max_total]
        self.settle(seq, stopped=len(emitted) < len(drawn))

    def settle(self, seq: Sequence, stopped: bool = False) -> None:
        self.scheduler.publish(seq)
        if stopped or len(seq.token_ids) >= seq.max_total:
            self.scheduler.remove(seq)

    def fail(self, seq: Sequence, end: int) -> None:
        for position in range(seq.num_cached, end):
            self.write(seq, position, "nan")
        self.admitted.add(seq)
        for block in self.scheduler.forget(seq):
            for offset in range(self.books.block_size):
                self.rows.pop((block, offset), None)
        for block in seq.blocks:
            assert not self.books.published(block)
        self.scheduler.remove(seq)

    def content(self, seq: Sequence, prefix: list[int]) -> object:
        salt = seq.request.cache_salt if self.caching else id(seq.request)
        return salt, tuple(prefix)

    def read(self, seq: Sequence) -> None:
        for position in range(seq.num_cached):
            row = (seq.blocks[position // self.books.block_size], position % self.books.block_size)
            assert self.rows[row] == self.content(seq, seq.token_ids[: position + 1])

    def write(self, seq: Sequence, position: int, content: object) -> None:
        block = seq.blocks[position // self.books.block_size]
        assert not self.books.published(block)
        assert self.books.owners(block) == 1
        self.rows[block, position % self.books.block_size] = content

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check()
        assert self.books.free + self.books.cached + self.books.used == self.books.total
        assert "nan" not in self.rows.values()
        arrivals = [seq.arrival for seq in self.scheduler.waiting]
        assert arrivals == sorted(arrivals)

    def teardown(self) -> None:
        steps = 0
        while self.scheduler.has_work:
            self.step(0.0)
            steps += 1
            assert steps < 1000
        self.books_balance()
        assert self.books.used == 0


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
