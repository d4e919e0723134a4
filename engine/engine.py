"""The method, whole: continuous batching around one Medusa step."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from engine import faults
from engine.batch import Batch, Verified
from engine.constrain import follows, refusal, refused_param
from engine.cuda_graphs import Graph
from engine.errors import told
from engine.flight import Flight, HostTime, Pace, PromptFlight
from engine.loader import Loaded
from engine.medusa.adaptive import AdaptiveTree, Expected
from engine.medusa.buckets import Buckets
from engine.medusa.lookup import FORCED
from engine.medusa.tree import TreeShape
from engine.runners import make_chooser, make_runner
from engine.scheduler import Chunk, Plan, Scheduler
from engine.stats import EngineStats
from engine.step_results import NOT_FINITE, Prefilled, Results, StepRow
from engine.types import (
    DraftSource,
    EngineInfo,
    FinishReason,
    Request,
    Sequence,
    SequenceState,
    TokenDelta,
)

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """Token ids in, token ids out, one `step()` at a time; one thread at a time may call it.

    A running sequence carries its root (the token drawn last, not yet in the cache), the hidden state
    it was drawn from, and its length. A step drafts a tree of candidates under each root, runs the
    model once over all nodes, draws the model's own next token at each node, accepts the longest path
    that the draws confirm, and moves that path's K/V rows behind the prefix. Plain decoding is the
    tree of one node.

    Args:
        loaded: the model and its memory.
        ahead: launch the next step before the last one's tokens are read. A sequence that turns out to
            have ended is dropped a step late: it holds its slot and blocks until that step has ended too,
            and what the step made of it is shown to nobody. None: where steps are captured on CUDA.
        graph: makes the graphs of captured steps, each when it is first needed. None: CUDA's, all of them
            now, where `loaded` says so, and no graphs where not.
        buckets: shapes of captured steps; None: the default ones.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        ahead: bool | None = None,
        graph: Callable[[], Graph] | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self.info: EngineInfo = loaded.info
        self.stats = EngineStats(kv_blocks_total=loaded.blocks.total, kv_blocks_free=loaded.blocks.total)
        self._eos = frozenset(loaded.generation_defaults.eos_token_ids)
        self._blocks = loaded.blocks
        self._runner = make_runner(loaded, graph, buckets)
        self._chooser = make_chooser(loaded, self._runner)
        self._scheduler = Scheduler(
            loaded.blocks,
            max_num_seqs=loaded.info.max_num_seqs,
            max_step_tokens=loaded.max_step_tokens,
            max_prefill_tokens=loaded.max_prefill_tokens,
            chooser=self._chooser,
            prefix_caching=loaded.prefix_caching,
            max_tree_nodes=loaded.info.tree_size,
        )
        self._ahead = loaded.captured if ahead is None else ahead
        self._flight: Flight | None = None
        self._prompts: list[PromptFlight] = []
        self._pace = Pace()
        # Elsewhere what is launched has ended when the host goes on.
        self._host = HostTime(self._ahead and loaded.pool.device.type == "cuda")
        self._arrivals = 0
        self._uncounted: set[str] = set()  # requests of which no choice has been prefilled

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def patience_s(self) -> float:
        """Seconds to wait for others before the next `step`, in which the device has work anyway.

        Above 0 while prompts are computed and no decode step is under way: launched at once, one of few would
        come before the prompts of those right behind them. Half of what the pass takes at least is left for
        launching what is next.
        """
        if not self._prompts or self._flight is not None:
            return 0.0
        return self._pace.least_s(sum([flight.tokens for flight in self._prompts])) / 2

    def step(self, arrived: Callable[[], list[TokenDelta]] = list) -> list[TokenDelta]:
        """Advance every scheduled sequence and return what has been emitted.

        An error fails the sequences of the pass it happened in, with a delta that says so, and no others.

        Args:
            arrived: called when what was under way has ended, to add and abort requests: those it adds are in
                this step's pass over prompts. Returns what the aborts gave.
        """
        if self._flight is not None and self._prompts:
            return self._read_step()  # what is launched next has time until the pass behind the step ends
        started = time.perf_counter()
        deltas, plan = self._plan()
        planning_s = time.perf_counter() - started
        launched: Flight | None = None
        if plan.decode:
            with self._failing(plan.decode, deltas):
                faults.visit("decode")
                batch = self._runner.batch(plan.decode)
                verified = shown = self._runner.draft_forward(batch)
                grammars_s = 0.0
                if batch.asked.grammars:
                    shown, grammars_s = self._runner.constrain(batch, verified)
                results = self._runner.targets_accept_compact(batch, verified)
                launched = self._launch(batch, shown, results, grammars_s)
        if plan.prefill and not self._runner.launches(plan.prefill):
            deltas += self._land()  # its tokens need not wait for a pass that has to be waited for
        instead = self._launch_prompts(plan.prefill, deltas)
        deltas += self._land(leaving=instead)  # while what was just launched runs
        self._flight = launched
        deltas += arrived()
        if not plan.prefill:
            started = time.perf_counter()
            self._scheduler.add_prompts(plan)
            planning_s += time.perf_counter() - started
            self._launch_prompts(plan.prefill, deltas)
        self._took("schedule", planning_s)
        if not self._ahead or not self._scheduler.has_work:
            deltas += self._land()
        self.stats.num_steps += 1
        self._scheduler.count(self.stats)
        return deltas

    def add(self, request: Request) -> None:
        """Queue a validated request: one sequence per choice."""
        sampling = request.sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        num_prompt, limit = len(request.prompt_token_ids), self.info.max_model_len
        self._uncounted.add(request.request_id)
        max_total = limit if sampling.max_tokens is None else min(limit, num_prompt + sampling.max_tokens)
        for index in range(sampling.n):
            self._arrivals += 1
            sequence = Sequence(
                request=request,
                index=index,
                seed=seed,
                token_ids=list(request.prompt_token_ids),
                num_prompt=num_prompt,
                max_total=max_total,
                arrival=self._arrivals,
                grammar=request.grammar.start() if request.grammar is not None else None,
            )
            self._scheduler.add(sequence)
        self._scheduler.count(self.stats)

    def abort(self, request_id: str, index: int | None = None) -> list[TokenDelta]:
        """Drop a request, or one choice of it; returns the last delta of each sequence dropped."""
        dropped = [
            sequence
            for sequence in self._scheduler
            if sequence.request.request_id == request_id and index in (None, sequence.index)
        ]
        deltas = [self._end(sequence, FinishReason.ABORT, []) for sequence in dropped]
        if not self._scheduler.has_work:
            self._land()  # nobody is left in it
        self._scheduler.count(self.stats)
        return deltas

    def promised(self, batch: int, context: int) -> dict[int, float]:
        """See `AdaptiveTree.promised`; empty where the tree is not chosen."""
        return self._chooser.promised(batch, context) if isinstance(self._chooser, AdaptiveTree) else {}

    def check(self) -> None:
        """Raise RuntimeError if K/V blocks are lost, or owned while nothing runs."""
        self._scheduler.check()
        if not self._scheduler.has_work and self._blocks.used:
            raise RuntimeError(f"{self._blocks.used} K/V blocks are owned while nothing runs")

    def _read_step(self) -> list[TokenDelta]:
        """What the decode step under way gave, while the pass over prompts behind it runs."""
        deltas = self._land(leaving=len(self._prompts))
        if not self._scheduler.has_work:
            deltas += self._land()
        self._scheduler.count(self.stats)
        return deltas

    def _launch_prompts(self, chunks: list[Chunk], deltas: list[TokenDelta]) -> int:
        """Launch passes over these; how many are under way."""
        before = len(self._prompts)
        for each in self._runner.together(chunks):
            self._host.forget()
            with self._failing([chunk.sequence for chunk in each], deltas):
                faults.visit("prefill")
                deltas += self._prefill(each)
        return max(0, len(self._prompts) - before)

    def _prefill(self, chunks: list[Chunk]) -> list[TokenDelta]:
        started = time.perf_counter()
        for sequence in (chunk.sequence for chunk in chunks):
            if sequence.queue_s < 0:
                sequence.queue_s = time.monotonic() - sequence.request.arrived_s
        results = self._runner.launch(chunks) if self._ahead else self._runner.prefill(chunks)
        if isinstance(results, list):
            self._took("prefill", time.perf_counter() - started)
            for chunk, result in zip(chunks, results, strict=True):
                if result.error is None:
                    self._cached(chunk)
            return self._prefilled(chunks, results)
        for chunk in chunks:
            self._cached(chunk)
            chunk.sequence.in_flight += 1  # the first token, where this is the last chunk
        self._prompts.append(PromptFlight(chunks, results))
        return []

    def _cached(self, chunk: Chunk) -> None:
        """Whoever is launched from here on may read the chunk's rows."""
        chunk.sequence.num_cached = chunk.end
        self._scheduler.publish(chunk.sequence)
        if chunk.last:
            chunk.sequence.state = SequenceState.DECODE

    def _prefilled(self, chunks: list[Chunk], results: list[Prefilled]) -> list[TokenDelta]:
        """What is emitted of chunks whose pass has been read."""
        deltas: list[TokenDelta] = []
        for chunk, result in zip(chunks, results, strict=True):
            if chunk.sequence.state is SequenceState.FINISHED:  # while the pass was under way
                if result.error is not None:
                    self._zero(chunk.sequence)
                continue
            if result.error is not None:
                deltas.append(self._fail(chunk.sequence, result.error))
                continue
            if result.first is not None:
                deltas.append(self._first(chunk.sequence, result))
        ready = [
            (chunk.sequence, result.chain)
            for chunk, result in zip(chunks, results, strict=True)
            if chunk.last and chunk.sequence.state is SequenceState.DECODE
        ]
        if ready and self.info.lookup:
            missing = [sequence for sequence, chain in ready if chain is None]
            asked = iter(self._runner.propose(missing) if missing else ())
            for sequence, chain in ready:
                self._propose(sequence, *(next(asked) if chain is None else chain))
        return deltas

    def _first(self, sequence: Sequence, result: Prefilled) -> TokenDelta:
        """What is emitted of a prompt's last chunk."""
        assert result.first is not None
        if sequence.request.request_id in self._uncounted:  # once a request: not each choice
            self._uncounted.discard(sequence.request.request_id)
            self.stats.prompt_tokens += sequence.num_prompt
        delta = self._append(sequence, [result.first], time.monotonic(), False)
        if delta.error is None:
            delta.logprobs = result.logprobs
        self.stats.emitted(len(delta.token_ids))
        delta.cached_tokens, delta.queue_s = sequence.num_reused, sequence.queue_s
        delta.prompt_logprobs = sequence.prompt_logprobs or None
        return delta

    def _plan(self) -> tuple[list[TokenDelta], Plan]:
        """The next step; while one is under way, one that need not wait for its outcome if there is such."""
        lingers = self._flight is not None and self._flight.lingers
        if (self._flight is not None or self._prompts) and not lingers:
            plan = self._scheduler.plan_ahead()
            if plan is not None:
                return [], plan
        deltas = self._land()
        return deltas, self._scheduler.plan()

    def _launch(self, batch: Batch, verified: Verified, results: Results, grammars_s: float) -> Flight:
        """From here on the step's sequences are in it, whatever becomes of them."""
        most = self._runner.most_tokens(batch)
        for sequence, tokens in zip(batch.sequences, most, strict=True):
            sequence.in_flight += tokens
        if self._flight is None:  # the device waited for this one
            self._host.forget()
        expected = self._chooser.expected if isinstance(self._chooser, AdaptiveTree) else Expected()
        return Flight(batch, verified, results, most, expected, grammars_s)

    def _land(self, leaving: int = 0) -> list[TokenDelta]:
        """Read the results of what is under way, but for the last `leaving` passes over prompts, and let go
        of who has ended meanwhile."""
        deltas: list[TokenDelta] = []
        flight, self._flight = self._flight, None
        read = len(self._prompts) - leaving
        prompts, self._prompts = self._prompts[:read], self._prompts[read:]
        if flight is not None:
            self._land_step(flight, deltas)
        for each in prompts:
            self._land_prompts(each, deltas)
        if flight is not None or prompts:
            self._scheduler.release_ended()
        return deltas

    def _land_step(self, flight: Flight, deltas: list[TokenDelta]) -> None:
        for sequence, tokens in zip(flight.batch.sequences, flight.most, strict=True):
            sequence.in_flight -= tokens
        with self._failing(flight.batch.sequences, deltas):
            host_s = self._host.wait(flight.results)
            self._learn(flight, host_s)
            self._emit(flight, flight.results.rows(), deltas)
        self.stats.emitted(sum([len(delta.token_ids) for delta in deltas]))

    def _land_prompts(self, flight: PromptFlight, deltas: list[TokenDelta]) -> None:
        self._host.forget()
        for chunk in flight.chunks:
            chunk.sequence.in_flight -= 1
        with self._failing([chunk.sequence for chunk in flight.chunks], deltas):
            results = flight.results.read()
            seconds = flight.results.seconds
            self.stats.step_seconds["prefill"].observe(seconds)
            self._pace.prefilled(flight.tokens, seconds)
            deltas += self._prefilled(flight.chunks, results)

    def _learn(self, flight: Flight, host_s: float) -> None:
        """Let the choice of the tree see what this step took and gave, and what the host took meanwhile."""
        batch, seconds = flight.batch, flight.results.seconds
        self.stats.decoded(seconds, host_s)
        self._pace.stepped(seconds)
        if isinstance(self._chooser, AdaptiveTree):
            self._chooser.observe(
                batch.sequences,
                batch.shapes,
                flight.results.values(),
                flight.results.depth,
                seconds - flight.grammars_s,  # no tree makes them longer or shorter
                context=batch.max_length,
                expected=flight.expected,
                host_s=host_s,
            )
            self.stats.explored_steps = self._chooser.explored_steps

    def _emit(self, flight: Flight, rows: list[StepRow], deltas: list[TokenDelta]) -> None:
        """Append the accepted tokens to their sequences."""
        emitting, now = time.perf_counter(), time.monotonic()
        batch, stats, size, lookup = flight.batch, self.stats, self._blocks.block_size, self.info.lookup
        shown, tokens = batch.asked.traces or batch.asked.logprobs, flight.tokens()
        stats.tree_size, stats.head_nodes = batch.nodes, batch.head_nodes
        trees = of_heads = 0
        by_heads = [0] * (batch.nodes + 1)  # of each length, accepted paths that the heads had drafted
        decode = SequenceState.DECODE  # to look it up for each takes long
        for i, (sequence, shape, row) in enumerate(zip(batch.sequences, batch.shapes, rows, strict=True)):
            (sound, length, last, _, emitted, chain, kind), (heads, chained) = row, shape
            if sequence.state is not decode:  # it ended while the step ran
                if not sound:
                    self._zero(sequence)
                continue
            if not sound:
                deltas.append(self._fail(sequence, NOT_FINITE))
                continue
            logprobs, trace = flight.shown(i, row, tokens, self._runner) if shown else (None, None)
            sequence.num_cached += length + 1
            filled = sequence.num_cached % size <= length  # a block
            delta = self._append(sequence, emitted, now, filled)
            delta.num_steps = 1
            if delta.error is None:
                count = len(delta.token_ids)
                stats.acceptance_counts[count] += 1
                used = length if length < count else count
                if heads or chained:
                    trees += 1
                    of_heads += heads
                    if last <= heads:
                        by_heads[used] += 1
                    if chained:
                        self._count_chained(sequence, shape, used if last > heads else 0, delta)
            if shown:
                delta.trace = trace
                if logprobs is not None and delta.error is None:
                    delta.logprobs = logprobs[: len(delta.token_ids)]
            deltas.append(delta)
            # Mostly there is no chain, and was none.
            if sequence.grammar is not None:
                if lookup and sequence.slot >= 0:
                    self._propose(sequence, chain, kind)
            elif kind or sequence.lookup.kind:
                sequence.lookup.chain, sequence.lookup.kind = chain, kind
        stats.drafted(trees, of_heads, by_heads)
        stats.plain_decode_seconds += flight.expected.plain_s * (
            1 + sum([r.length for r in rows]) / len(rows)
        )
        self._took("emit", time.perf_counter() - emitting)

    def _propose(self, sequence: Sequence, chain: list[int], kind: int) -> None:
        """Note the chain of the next step: the lookup's, or what the grammar forces where it forces any."""
        if sequence.grammar is not None and (forced := sequence.grammar.forced()[: self.info.lookup]):
            self._runner.set_chain(sequence, forced)
            chain, kind = forced, FORCED
        sequence.lookup.chain, sequence.lookup.kind = chain, kind
        if isinstance(self._chooser, AdaptiveTree):
            self._chooser.propose(sequence)

    def _count_chained(self, sequence: Sequence, shape: TreeShape, used: int, delta: TokenDelta) -> None:
        """Count the nodes of a chain, of which so many were accepted."""
        source = sequence.source(shape.num_nodes - 1, shape.head_nodes)
        self.stats.drafted_by_source[source] += shape.lookup_nodes
        self.stats.accepted(source, used)
        if source is DraftSource.PREDICTION:
            delta.accepted_prediction_tokens = used

    def _append(self, sequence: Sequence, tokens: list[int], now: float, filled: bool) -> TokenDelta:
        """Append tokens up to what ends the sequence: a stop id in the run, its grammar, or its length.

        Args:
            now: `time.monotonic()`.
            filled: there are K/V of the last row of a block that had none before.
        """
        request, grammar, output = sequence.request, sequence.grammar, sequence.token_ids
        sampling, remaining = request.sampling, sequence.max_total - len(output)
        if len(tokens) > remaining:
            tokens = tokens[:remaining]
        reason, stop_id = None, None
        # Mostly nothing of it can end anything.
        if (
            grammar is not None
            or sampling.stop_token_ids
            or not (sampling.ignore_eos or self._eos.isdisjoint(tokens))
        ):
            for count, token in enumerate(tokens, start=1):
                if grammar is not None and not follows(sequence, tokens[:count]):
                    failed = self._fail(sequence, refusal(sequence))
                    failed.own_fault, failed.fault_param = True, refused_param(sequence)
                    return failed
                if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
                    tokens, reason, stop_id = tokens[:count], FinishReason.STOP, token
                    break
                if grammar is not None and grammar.ended:
                    tokens, reason = tokens[:count], FinishReason.STOP
                    break
        output += tokens
        if filled:
            self._scheduler.publish(sequence)
        if reason is None and len(output) >= sequence.max_total:
            reason = FinishReason.LENGTH
        if reason is None:
            return TokenDelta(request.request_id, sequence.index, tokens, None, None, 0, now)
        delta = self._end(sequence, reason, tokens)
        delta.stop_token_id = stop_id
        return delta

    def _fail(self, sequence: Sequence, error: str) -> TokenDelta:
        self._zero(sequence)
        return self._end(sequence, FinishReason.ERROR, [], error)

    def _zero(self, sequence: Sequence) -> None:
        """Leave nothing of K/V that may be unsound to others."""
        if sequence.blocks and (own := self._scheduler.forget(sequence)):
            self._runner.clear(own)

    def _end(
        self, sequence: Sequence, reason: FinishReason, tokens: list[int], error: str | None = None
    ) -> TokenDelta:
        """Take the sequence out and make its last delta."""
        if sequence.state is not SequenceState.FINISHED:
            self._scheduler.remove(sequence)
        request = sequence.request
        if request.request_id in self._uncounted and not any(o.request is request for o in self._scheduler):
            self._uncounted.discard(request.request_id)
        now = time.monotonic()
        return TokenDelta(request.request_id, sequence.index, tokens, reason, time_s=now, error=error)

    @contextmanager
    def _failing(self, sequences: list[Sequence], deltas: list[TokenDelta]) -> Iterator[None]:
        """End these sequences with the error if the body raises, but for those that have ended."""
        try:
            yield
        except torch.AcceleratorError:
            raise  # the device's context is lost: no later step can work, so the thread has to end
        except Exception as error:
            log.exception("step failed for %d sequences", len(sequences))
            deltas += self._land()  # what they have emitted before
            live = [sequence for sequence in sequences if sequence.state is not SequenceState.FINISHED]
            deltas += [self._fail(sequence, told(error)) for sequence in live]

    def _took(self, phase: str, seconds: float) -> None:
        self.stats.step_seconds[phase].observe(seconds)
        # Of a step launched ahead, the device knows nothing of these: they pass while it runs.
        besides = phase in ("schedule", "emit") and not self._ahead
        if besides and isinstance(self._chooser, AdaptiveTree):
            self._chooser.observe_outside(seconds, last=phase == "emit")
