"""The method, whole: continuous batching around one Medusa step."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.errors import MedusaError
from engine.loader import Loaded
from engine.medusa.accept import Accepted, accept_exact
from engine.medusa.heads import Draft
from engine.runner import NOT_FINITE, Runner
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
    """

    def __init__(self, loaded: Loaded) -> None:
        self.info: EngineInfo = loaded.info
        self.stats = EngineStats(kv_blocks_total=loaded.blocks.total, kv_blocks_free=loaded.blocks.total)
        self._eos = frozenset(loaded.generation_defaults.eos_token_ids)
        self._blocks = loaded.blocks
        self._scheduler = Scheduler(
            loaded.blocks,
            max_num_seqs=loaded.info.max_num_seqs,
            max_step_tokens=loaded.max_step_tokens,
            tree_size=loaded.info.tree_size,
        )
        self._runner = Runner(
            loaded.decoder,
            loaded.attention,
            loaded.pool,
            loaded.drafter,
            max_num_seqs=loaded.info.max_num_seqs,
            max_model_len=loaded.info.max_model_len,
        )
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def step(self) -> list[TokenDelta]:
        """Advance every scheduled sequence and return what each one emitted.

        An error fails the sequences of the pass it happened in, with a delta that says so, and no others.
        """
        started = time.monotonic()
        plan = self._scheduler.plan()
        deltas: list[TokenDelta] = []
        for chunk in plan.prefill:
            with self._failing([chunk.sequence], deltas):
                deltas += self._prefill(chunk)
        if plan.decode:
            with self._failing(plan.decode, deltas):
                batch = self._runner.batch(plan.decode)
                draft = self._runner.draft(batch, plan.tree_size)
                verified = self._runner.forward(batch, draft)
                targets = self._runner.targets(batch, draft, verified.logits)
                accepted = accept_exact(draft.tokens, targets, draft.topology)
                self._runner.compact(batch, verified, accepted)
                deltas += self._emit(plan.decode, draft, accepted, self._runner.finite(batch), started)
        self.stats.num_steps += 1
        self._count()
        return deltas

    def add(self, request: Request) -> None:
        """Queue a validated request: one sequence per choice."""
        sampling = request.sampling
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        num_prompt, limit = len(request.prompt_token_ids), self.info.max_model_len
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
        self._blocks.check()
        if not self._scheduler.has_work and self._blocks.used:
            raise RuntimeError(f"{self._blocks.used} K/V blocks are owned while nothing runs")

    def _prefill(self, chunk: Chunk) -> list[TokenDelta]:
        sequence = chunk.sequence
        first = self._runner.prefill(chunk)
        if first is not None and sequence.index == 0:  # once a request: not its choices, not a recompute
            self.stats.prompt_tokens += sequence.num_prompt
        sequence.num_cached = chunk.end
        if chunk.last:
            sequence.state = SequenceState.DECODE
        return [] if first is None else [self._append(sequence, [first])]

    def _emit(
        self, sequences: list[Sequence], draft: Draft, accepted: Accepted, finite: Tensor, started: float
    ) -> list[TokenDelta]:
        """Bring the accepted tokens to the host in one copy and append them to their sequences."""
        rows = torch.column_stack((finite.long(), accepted.length, accepted.tokens)).tolist()
        traces = self._trace(sequences, draft, accepted, started)
        drafted = draft.tokens.shape[1] - 1
        deltas = []
        for sequence, (sound, length, *tokens), trace in zip(sequences, rows, traces, strict=True):
            if not sound:
                deltas.append(self._fail(sequence, NOT_FINITE))
                continue
            sequence.num_cached += length + 1
            delta = self._append(sequence, tokens[: length + 1])
            delta.num_steps, delta.trace = 1, trace
            emitted = len(delta.token_ids)
            self.stats.acceptance_counts[emitted] += 1
            if drafted:
                self.stats.num_drafts += 1
                self.stats.draft_tokens += drafted
                self.stats.accepted_tokens += min(length, emitted)
            deltas.append(delta)
        return deltas

    def _append(self, sequence: Sequence, tokens: list[int]) -> TokenDelta:
        """Append tokens up to whatever ends the sequence: a stop id inside the run, or its length."""
        sampling = sequence.request.sampling
        tokens = tokens[: sequence.max_total - len(sequence.token_ids)]
        reason, stop_id = None, None
        for count, token in enumerate(tokens, start=1):
            if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
                tokens, reason, stop_id = tokens[:count], FinishReason.STOP, token
                break
        sequence.token_ids += tokens
        self.stats.generation_tokens += len(tokens)
        if reason is None and len(sequence.token_ids) >= sequence.max_total:
            reason = FinishReason.LENGTH
        delta = self._delta(sequence, tokens) if reason is None else self._end(sequence, reason, tokens)
        delta.stop_token_id = stop_id
        return delta

    def _fail(self, sequence: Sequence, error: str) -> TokenDelta:
        if sequence.blocks:
            self._runner.clear(sequence)
        return self._end(sequence, FinishReason.ERROR, [], error)

    def _end(
        self, sequence: Sequence, reason: FinishReason, tokens: list[int], error: str | None = None
    ) -> TokenDelta:
        """Take the sequence out and make its last delta."""
        if sequence.state is not SequenceState.FINISHED:
            self._scheduler.remove(sequence)
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
        duration_s = time.monotonic() - started
        tokens, parents = draft.tokens.tolist(), draft.topology.parents.tolist()
        paths, lengths, roots = accepted.path.tolist(), accepted.length.tolist(), accepted.next_root.tolist()
        sources = (DraftSource.ROOT, *[DraftSource.HEAD] * (draft.tokens.shape[1] - 1))
        return [
            StepTrace(
                tokens=tuple(tokens[i]),
                parents=(-1, *parents[i][1:]),
                sources=sources,
                accepted=tuple(paths[i][: lengths[i] + 1]),
                next_root=roots[i],
                batch_size=len(sequences),
                duration_s=duration_s,
            )
            if sequence.request.trace
            else None
            for i, sequence in enumerate(sequences)
        ]

    def _count(self) -> None:
        stats, scheduler, blocks = self.stats, self._scheduler, self._blocks
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.preemptions = scheduler.preemptions
        stats.kv_blocks_free, stats.kv_blocks_cached = blocks.free, blocks.cached
