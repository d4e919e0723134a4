"""The method, whole: continuous batching around one Medusa step."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine import faults
from engine.errors import MedusaError
from engine.loader import Loaded
from engine.medusa.accept import Accepted, accept
from engine.medusa.adaptive import AdaptiveTree, FixedTree, LookupRecord
from engine.medusa.draft import Draft
from engine.runner import NOT_FINITE, Runner, StepRow, Verified
from engine.scheduler import Chunk, Scheduler
from engine.stats import EngineStats
from engine.types import (
    DraftSource,
    EngineInfo,
    FinishReason,
    Request,
    Sequence,
    SequenceState,
    StepTrace,
    TokenDelta,
    TokenLogprobs,
)
from engine.warmup import measure

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """Token ids in, token ids out, one `step()` at a time; one thread at a time may call it.

    A running sequence carries its root (the token drawn last, not yet in the cache), the hidden state
    it was drawn from, and its length. A step drafts a tree of candidates under each root, runs the
    model once over all nodes, draws the model's own next token at each node, accepts the longest path
    that the draws confirm, and moves that path's K/V rows behind the prefix. Plain decoding is the
    tree of one node.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.info: EngineInfo = loaded.info
        self.stats = EngineStats(kv_blocks_total=loaded.blocks.total, kv_blocks_free=loaded.blocks.total)
        self._eos = frozenset(loaded.generation_defaults.eos_token_ids)
        self._blocks = loaded.blocks
        self._runner = Runner(
            loaded.decoder,
            loaded.attention,
            loaded.pool,
            loaded.heads,
            lookup_size=loaded.info.lookup,
            eos_token_ids=self._eos,
            max_num_seqs=loaded.info.max_num_seqs,
            max_model_len=loaded.info.max_model_len,
        )
        self._lookup = LookupRecord(loaded.info.lookup)
        self._chooser = self._make_chooser(loaded)
        self._scheduler = Scheduler(
            loaded.blocks,
            max_num_seqs=loaded.info.max_num_seqs,
            max_step_tokens=loaded.max_step_tokens,
            chooser=self._chooser,
            prefix_caching=loaded.prefix_caching,
            max_tree_nodes=loaded.info.tree_size,
        )
        self._arrivals = 0
        self._uncounted: set[str] = set()  # requests of which no choice has been prefilled

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def step(self) -> list[TokenDelta]:
        """Advance every scheduled sequence and return what each one emitted.

        An error fails the sequences of the pass it happened in, with a delta that says so, and no others.
        """
        started = time.perf_counter()
        plan = self._scheduler.plan()
        self._took("schedule", started)
        deltas: list[TokenDelta] = []
        for chunk in plan.prefill:
            with self._failing([chunk.sequence], deltas):
                faults.visit("prefill")
                deltas += self._prefill(chunk)
        if plan.decode:
            started = time.perf_counter()
            with self._failing(plan.decode, deltas):
                faults.visit("decode")
                batch = self._runner.batch(plan.decode)
                draft = self._runner.draft(batch)
                verified = self._runner.forward(batch, draft)
                targets = self._runner.targets(batch, draft, verified.logits)
                accepted = accept(draft.tokens, targets, draft.topology)
                self._runner.compact(batch, draft, verified, accepted)
                rows = self._runner.report(batch, accepted)
                self._learn(plan.decode, rows, time.perf_counter() - started)
                deltas += self._emit(plan.decode, draft, verified, accepted, rows, started)
        self.stats.num_steps += 1
        self._count()
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
            )
            self._scheduler.add(sequence)
        self._count()

    def abort(self, request_id: str, index: int | None = None) -> list[TokenDelta]:
        """Drop a request, or one choice of it; returns the last delta of each sequence dropped."""
        dropped = [
            sequence
            for sequence in self._scheduler
            if sequence.request.request_id == request_id and index in (None, sequence.index)
        ]
        deltas = [self._end(sequence, FinishReason.ABORT, []) for sequence in dropped]
        self._count()
        return deltas

    def check(self) -> None:
        """Raise RuntimeError if K/V blocks are lost, or owned while nothing runs."""
        self._scheduler.check()
        if not self._scheduler.has_work and self._blocks.used:
            raise RuntimeError(f"{self._blocks.used} K/V blocks are owned while nothing runs")

    def _make_chooser(self, loaded: Loaded) -> AdaptiveTree | FixedTree | None:
        info = loaded.info
        heads = loaded.heads.tree if loaded.heads is not None else None
        if info.tree_size == 1:
            return None
        if info.tree != "auto":
            return FixedTree(info.tree_size, heads, info.lookup, loaded.max_step_tokens)
        times = measure(
            self._runner,
            loaded.blocks,
            heads,
            max_num_seqs=info.max_num_seqs,
            max_step_tokens=loaded.max_step_tokens,
            max_model_len=info.max_model_len,
        )
        return AdaptiveTree(
            times,
            heads,
            self._lookup,
            loaded.max_step_tokens,
            accepted=loaded.heads.accepted if loaded.heads is not None else None,
        )

    def _prefill(self, chunk: Chunk) -> list[TokenDelta]:
        sequence, started = chunk.sequence, time.perf_counter()
        if sequence.queue_s < 0:
            sequence.queue_s = time.monotonic() - sequence.request.arrived_s
        result = self._runner.prefill(chunk)
        self._took("prefill", started)
        sequence.num_cached = chunk.end
        self._scheduler.publish(sequence)
        if result is None:
            return []
        sequence.state = SequenceState.DECODE
        deltas = []
        if result.first is not None:
            if sequence.request.request_id in self._uncounted:  # once a request: not each choice
                self._uncounted.discard(sequence.request.request_id)
                self.stats.prompt_tokens += sequence.num_prompt
            deltas = [self._append(sequence, [result.first], result.logprobs)]
            deltas[0].cached_tokens, deltas[0].queue_s = sequence.num_reused, sequence.queue_s
            deltas[0].prompt_logprobs = sequence.prompt_logprobs or None
        self._propose([sequence])
        return deltas

    def _learn(self, sequences: list[Sequence], rows: list[StepRow], seconds: float) -> None:
        """Let the choice of the tree see what this step took and gave."""
        self.stats.step_seconds["decode"].observe(seconds)
        for sequence, row in zip(sequences, rows, strict=True):
            self._lookup.observe(sequence.lookup, row.tokens)
        if isinstance(self._chooser, AdaptiveTree):
            self._chooser.observe(sequences, [row.nodes for row in rows], seconds)
            self.stats.explored_steps = self._chooser.explored_steps
            tokens = sum(len(row.tokens) for row in rows)
            self.stats.plain_decode_seconds += self._chooser.plain_seconds * tokens / len(rows)

    def _propose(self, sequences: list[Sequence]) -> None:
        """Look up what may follow in each sequence that goes on."""
        going = [sequence for sequence in sequences if sequence.slot >= 0]
        if not going or not self.info.lookup:
            return
        for sequence, (chain, kind) in zip(going, self._runner.propose(going), strict=True):
            self._lookup.propose(sequence.lookup, chain, kind)

    def _emit(
        self,
        sequences: list[Sequence],
        draft: Draft,
        verified: Verified,
        accepted: Accepted,
        rows: list[StepRow],
        started: float,
    ) -> list[TokenDelta]:
        """Append the accepted tokens to their sequences."""
        emitting = time.perf_counter()
        traces = self._trace(sequences, draft, accepted, started)
        self.stats.tree_size = max(sequence.num_nodes for sequence in sequences)
        self.stats.head_nodes = max(sequence.head_nodes for sequence in sequences)
        deltas = []
        for i, (sequence, row, trace) in enumerate(zip(sequences, rows, traces, strict=True)):
            if not row.sound:
                deltas.append(self._fail(sequence, NOT_FINITE))
                continue
            num_top = sequence.request.sampling.logprobs
            logprobs = (
                None if num_top is None else self._runner.logprobs(draft, verified, accepted, i, num_top)
            )
            sequence.num_cached += row.length + 1
            source = _source(sequence, row.last)
            delta = self._append(sequence, row.tokens, logprobs)
            delta.num_steps, delta.trace = 1, trace
            self._count_accepted(sequence, row.length, source, delta)
            deltas.append(delta)
        self._propose(sequences)
        self._took("emit", emitting)
        return deltas

    def _count_accepted(
        self, sequence: Sequence, length: int, source: DraftSource, delta: TokenDelta
    ) -> None:
        emitted = len(delta.token_ids)
        self.stats.acceptance_counts[emitted] += 1
        if sequence.num_nodes == 1:
            return
        self.stats.num_drafts += 1
        self.stats.drafted_by_source["head"] += sequence.head_nodes
        if sequence.lookup_nodes:
            chain = _source(sequence, sequence.head_nodes + 1)
            self.stats.drafted_by_source[chain.value] += sequence.lookup_nodes
        if used := min(length, emitted):
            self.stats.accepted(source.value, used)
            if source is DraftSource.PREDICTION:
                delta.accepted_prediction_tokens = used

    def _append(
        self, sequence: Sequence, tokens: list[int], logprobs: list[TokenLogprobs] | None
    ) -> TokenDelta:
        """Append tokens up to whatever ends the sequence: a stop id inside the run, or its length."""
        sampling = sequence.request.sampling
        tokens = tokens[: sequence.remaining]
        reason, stop_id = None, None
        for count, token in enumerate(tokens, start=1):
            if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
                tokens, reason, stop_id = tokens[:count], FinishReason.STOP, token
                break
        sequence.token_ids += tokens
        self._scheduler.publish(sequence)
        self.stats.emitted(len(tokens))
        if reason is None and sequence.remaining <= 0:
            reason = FinishReason.LENGTH
        delta = self._delta(sequence, tokens) if reason is None else self._end(sequence, reason, tokens)
        delta.stop_token_id = stop_id
        delta.logprobs = logprobs[: len(tokens)] if logprobs is not None else None
        return delta

    def _fail(self, sequence: Sequence, error: str) -> TokenDelta:
        if sequence.blocks and (own := self._scheduler.forget(sequence)):
            self._runner.clear(own)
        return self._end(sequence, FinishReason.ERROR, [], error)

    def _end(
        self, sequence: Sequence, reason: FinishReason, tokens: list[int], error: str | None = None
    ) -> TokenDelta:
        """Take the sequence out and make its last delta."""
        if sequence.state is not SequenceState.FINISHED:
            self._scheduler.remove(sequence)
        if not any(other.request is sequence.request for other in self._scheduler):
            self._uncounted.discard(sequence.request.request_id)
        delta = self._delta(sequence, tokens)
        delta.finish_reason, delta.error = reason, error
        return delta

    @staticmethod
    def _delta(sequence: Sequence, tokens: list[int]) -> TokenDelta:
        return TokenDelta(sequence.request.request_id, sequence.index, tokens, time_s=time.monotonic())

    @contextmanager
    def _failing(self, sequences: list[Sequence], deltas: list[TokenDelta]) -> Iterator[None]:
        """End these sequences with the error if the body raises."""
        try:
            yield
        except torch.AcceleratorError:
            raise  # the device's context is lost: no later step can work, so the thread has to end
        except Exception as error:
            log.exception("step failed for %d sequences", len(sequences))
            text = str(error) if isinstance(error, MedusaError) else f"internal error: {type(error).__name__}"
            told = {(delta.request_id, delta.index) for delta in deltas if delta.finish_reason is not None}
            deltas += [
                self._fail(sequence, text)
                for sequence in sequences
                if (sequence.request.request_id, sequence.index) not in told
            ]

    def _trace(
        self, sequences: list[Sequence], draft: Draft, accepted: Accepted, started: float
    ) -> list[StepTrace | None]:
        if not any(sequence.request.trace for sequence in sequences):
            return [None] * len(sequences)
        duration_s = time.perf_counter() - started
        tokens, parents = draft.tokens.tolist(), draft.topology.parents.tolist()
        paths, lengths, roots = accepted.path.tolist(), accepted.length.tolist(), accepted.next_root.tolist()
        traces: list[StepTrace | None] = []
        for i, sequence in enumerate(sequences):
            size = sequence.num_nodes
            trace = StepTrace(
                tokens=tuple(tokens[i][:size]),
                parents=(-1, *parents[i][1:size]),
                sources=tuple(_source(sequence, node) for node in range(size)),
                accepted=tuple(paths[i][: lengths[i] + 1]),
                next_root=roots[i],
                batch_size=len(sequences),
                duration_s=duration_s,
            )
            traces.append(trace if sequence.request.trace else None)
        return traces

    def _took(self, phase: str, started: float) -> None:
        seconds = time.perf_counter() - started
        self.stats.step_seconds[phase].observe(seconds)
        if phase in ("schedule", "emit") and isinstance(self._chooser, AdaptiveTree):
            self._chooser.observe_outside(seconds, last=phase == "emit")

    def _count(self) -> None:
        stats, scheduler, blocks = self.stats, self._scheduler, self._blocks
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.preemptions = scheduler.preemptions
        stats.prefix_query_tokens = scheduler.prefix_query_tokens
        stats.prefix_hit_tokens = scheduler.prefix_hit_tokens
        stats.kv_blocks_free, stats.kv_blocks_cached = blocks.free, blocks.cached


def _source(sequence: Sequence, node: int) -> DraftSource:
    """What proposed a node of the sequence's tree in this step; call before the next chain is looked up."""
    if node == 0:
        return DraftSource.ROOT
    if node <= sequence.head_nodes:
        return DraftSource.HEAD
    return DraftSource.PREDICTION if sequence.lookup.from_prediction else DraftSource.LOOKUP
