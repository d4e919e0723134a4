"""Captured steps: the two halves of a decode step as CUDA graphs, one pair for each bucket of shapes; and
passes over prompts, whose end is a second half too.

A graph repeats kernels on the same memory, so everything that differs from step to step is read from
buffers allocated once: slots and tree shapes are copied into one before each step; block tables, lengths,
roots and sampling parameters are in the slots' tensors anyway. The halves are the eager step's own
functions (`Runner.draft_forward`, `Runner.targets_accept_compact`) on these buffers. Between the two a host
may change the logits.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import is_ragged
from engine.batch import NOTHING, Asked, Batch, Verified
from engine.config import MAX_TREE_NODES
from engine.cuda_graphs import Graph
from engine.errors import CaptureError
from engine.host_buffers import Inputs, Landing
from engine.logprobs import token_logprobs
from engine.medusa.accept import accept
from engine.medusa.buckets import Buckets
from engine.medusa.draft import Draft
from engine.medusa.tree import Topology, TreeShape
from engine.prompt_buckets import PromptBucket, PromptBuckets
from engine.runner import Runner
from engine.sampler import verify_all, verify_greedy
from engine.scheduler import Chunk
from engine.step_results import Prefilled, PromptResults, Results, device_event

__all__ = ["Bucket", "CapturedRunner"]

log = logging.getLogger(__name__)

_HOST_BOUND = 0.8
"""Share of a pass over prompts that its launching takes, from which on it is captured: filled up to the size
of its bucket it takes the device about a fifth longer."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Steps of `batch` sequences with `nodes` nodes each, in trees of at most `depth`.

    With `prompts` it is the end of a pass over prompts, whose last tokens stand as roots: a second half draws
    what follows them.
    """

    batch: int
    nodes: int
    depth: int
    prompts: bool = False


@dataclass(frozen=True, slots=True)
class _Captured(Verified):
    """`Verified` in the graphs' buffers: the next step writes over it.

    Args:
        bucket: whose first half has run.
        landing: of what its second half gives.
    """

    bucket: Bucket
    landing: Landing


class CapturedRunner(Runner):
    """A `Runner` that replays graphs where a batch fits one of the buckets, and is eager where not.

    Every bucket has three or four graphs: the first half with the heads, where they draft, and without,
    where the lookup does or nothing; the second half for greedy batches, in which nobody asks for more,
    and for all others. All of them share buffers and memory. A batch smaller than its bucket is filled up
    with sequences of one node in a spare slot, which writes to block 0 and begins anew each step.

    Passes over prompts are captured too, where attention computes several at once: the host takes longer to
    launch a pass's kernels one by one than the device takes for them, but for large models and many tokens.
    The layers are a graph for each `PromptBucket`. What follows completed prompts is a second half.

    Args:
        graph: makes graphs.
        buckets: shapes to capture.
        max_prefill_tokens: bound on the tokens of a pass over prompts.
        arguments: those of `Runner`.
    """

    def __init__(
        self,
        *args: Any,
        graph: Callable[[], Graph],
        buckets: Buckets,
        max_prefill_tokens: int,
        **arguments: Any,
    ) -> None:
        super().__init__(*args, **arguments, spare_slots=1, captured=True)
        self.buckets: Buckets = buckets
        self.prompts = PromptBuckets.default(
            buckets.batches if is_ragged(self._attention) else (),
            max_tokens=max_prefill_tokens,
            longest=arguments["max_model_len"],
        )
        self._graph = graph
        self._spare = len(self._root) - 1
        self._max_length = arguments["max_model_len"]
        self._sampling.allocate()
        if self._lookup is not None:
            self._lookup.allocate_predictions()
        self._first: dict[tuple[Bucket, bool], Graph] = {}
        self._second: dict[tuple[Bucket, bool], Graph] = {}
        self._halfway: dict[tuple[int, int], _Captured] = {}
        # What `_fill` wrote last: mostly the next step is alike.
        self._filled: tuple[Bucket, bool, list[int], list[TreeShape]] | None = None
        self._layers: dict[PromptBucket, Graph] = {}
        self._landings: dict[Bucket, Landing] = {}  # of passes over prompts

        rows, config, width = buckets.max_rows, self._decoder.config, 4 + MAX_TREE_NODES
        width += 2 + self._lookup.size if self._lookup is not None else 0

        def buffer(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._inputs = Inputs(max(buckets.batches) + 5 * rows, self._device)
        self._tokens, self._node_rows = buffer(torch.int64, rows), buffer(torch.int64, rows)
        self._valid = buffer(torch.bool, rows)
        self._row_of = torch.arange(rows, device=self._device)
        self._states = buffer(self._pool.dtype, rows, config.hidden_size)
        self._logits = buffer(self._decoder.logits_dtype, rows, config.vocab_size)
        self._packed = buffer(torch.int64, max(buckets.batches) * width)

        # A pass over prompts has its own: the results of a step before it may still be looked at.
        batch, largest = max(buckets.batches), max((sum(b.parts) for b in self.prompts.all()), default=0)
        self._prompt_inputs = Inputs(largest, self._device)
        self._prompt_hidden = buffer(self._pool.dtype, max_prefill_tokens, config.hidden_size)
        self._end_inputs = Inputs(8 * batch, self._device)
        self._end_tokens = buffer(torch.int64, batch, 1)
        self._end_states = buffer(self._pool.dtype, batch, config.hidden_size)
        self._end_logits = buffer(self._decoder.logits_dtype, batch, config.vocab_size)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every bucket.

        Raises:
            CaptureError: one cannot be captured; the text says what to do.
        """
        started = time.perf_counter()
        for batch, nodes in self.buckets:
            bucket = self._bucket(batch, nodes)
            for heads in self.drafts(nodes):
                self._first_half(bucket, heads)
            for anything in (False, True):
                self._second_half(bucket, anything)
        count = len(self._first) + len(self._second)
        log.info("captured %d graphs of decode steps in %.1f s", count, time.perf_counter() - started)
        started = time.perf_counter()
        self.prompts = self.prompts.up_to(self._most_prompt_tokens())
        for prompts in self.prompts.all():
            self._layers_of(prompts)
        for chunks in self.prompts.chunks:
            for anything in (False, True):
                self._second_half(Bucket(chunks, 1, 0, prompts=True), anything)
        text = "captured %d graphs of passes over at most %d tokens of prompts in %.1f s"
        log.info(text, len(self._layers), max(self.prompts.tokens, default=0), time.perf_counter() - started)

    def drafts(self, nodes: int) -> list[bool]:
        """Whether trees of so many nodes may come without the heads (False), with them (True), or both."""
        heads = self._drafter.most_heads > 0 and nodes > 1
        return [False] * (nodes == 1 or self._lookup is not None) + [True] * heads

    # Not in torch.inference_mode: to enter it took a tenth of the time, and there is nothing to be noted.

    def draft_forward(self, batch: Batch) -> Verified:
        """See `Runner.draft_forward`."""
        if batch.size is None:
            return super().draft_forward(batch)
        return self.replay(batch, batch.size, heads=batch.head_nodes > 0)

    def replay(self, batch: Batch, size: tuple[int, int], *, heads: bool) -> Verified:
        """The first half in a bucket of that size, with or without drafting by the heads."""
        captured = self._halfway.get(size) or self._in_buffers(size)
        graph = self._first_half(captured.bucket, heads)
        self._fill(captured.bucket, heads, [sequence.slot for sequence in batch.sequences], batch.shapes)
        batch.begin()
        graph.replay()
        return captured

    def targets_accept_compact(self, batch: Batch, verified: Verified) -> Results:
        """See `Runner.targets_accept_compact`."""
        if not isinstance(verified, _Captured):
            return super().targets_accept_compact(batch, verified)
        self._second_half(verified.bucket, batch.asked.more_than_best).replay()
        landing, depth, count = verified.landing, verified.bucket.depth, len(batch.sequences)
        return Results(landing, depth, started=batch.started, begun=batch.begun, count=count)

    def _in_buffers(self, size: tuple[int, int]) -> _Captured:
        """The steps of a bucket of that size."""
        bucket = self._bucket(*size)
        found, landing = self._verified(bucket), Landing(self._packed_rows(bucket))
        kept = _Captured(found.draft, found.hidden, found.logits, found.rows, bucket, landing)
        self._halfway[size] = kept
        return kept

    def _bucket(self, batch: int, nodes: int) -> Bucket:
        most = self._most(nodes, heads=True)
        depth = max(self._drafter.depth(TreeShape(most.head_nodes, 0)), most.lookup_nodes)
        return Bucket(batch, nodes, depth)

    def _most(self, nodes: int, *, heads: bool) -> TreeShape:
        """What is on offer for a tree of so many nodes: nodes of the heads, and of the lookup chain."""
        return TreeShape(
            min(nodes - 1, self._drafter.most_heads) if heads else 0,
            min(nodes - 1, self._lookup.size) if self._lookup is not None else 0,
        )

    def _first_half(self, bucket: Bucket, heads: bool) -> Graph:
        key = bucket, heads
        if key not in self._first:
            self._first[key] = self._make(bucket, lambda: self._draft_forward(bucket, heads))
        return self._first[key]

    def _second_half(self, bucket: Bucket, anything: bool) -> Graph:
        key = bucket, anything
        if key not in self._second:
            half = self._end if bucket.prompts else self._targets_accept_compact
            self._second[key] = self._make(bucket, lambda: half(bucket, anything))
        return self._second[key]

    @torch.inference_mode()
    def _make(self, bucket: Bucket, run: Callable[[], None]) -> Graph:
        """A graph of `run`, captured with nobody in it."""
        before = self._staged(bucket).clone()
        if bucket.prompts:
            self._fill_end(bucket, [], [], [])
        else:
            self._fill(bucket, False, [], [])
        graph = self._captured(
            run,
            f"the decode step of {bucket.batch} sequences with {bucket.nodes} nodes",
            "max_num_seqs or max_step_tokens",
        )
        self._staged(bucket).copy_(before)
        self._filled = None
        return graph

    def _captured(self, run: Callable[[], None], what: str, lower: str) -> Graph:
        graph = self._graph()
        try:
            graph.capture(run)
        except Exception as error:
            raise CaptureError(
                f"cannot capture {what}: {error}; --enforce-eager runs without captured steps, and if memory "
                f"was short, lower gpu_memory_utilization (or kv_cache_tokens), {lower}"
            ) from error
        return graph

    def _fill(self, bucket: Bucket, heads: bool, slots: list[int], shapes: list[TreeShape]) -> None:
        """What the graphs read: slots and shapes, and of those who fill the batch up."""
        filled = bucket, heads, slots, shapes
        if filled == self._filled:
            return
        missing, size = bucket.batch - len(slots), bucket.batch * (1 + 5 * bucket.nodes)
        most = self._most(bucket.nodes, heads=heads)
        values = self._inputs.writable()
        values[: bucket.batch] = [*slots, *[self._spare] * missing]
        grid = values[bucket.batch : size].reshape(5, bucket.batch, bucket.nodes)
        self._drafter.grid([*shapes, *[TreeShape(0, 0)] * missing], most.head_nodes, bucket.nodes, grid)
        self._inputs.send(size)
        self._filled = filled

    def _staged(self, bucket: Bucket) -> Tensor:
        """Where its graphs find what `_fill` writes."""
        return (self._end_inputs if bucket.prompts else self._inputs).tensor

    def _slots_and_grid(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        staged, size = self._staged(bucket), bucket.batch * (1 + 5 * bucket.nodes)
        return staged[: bucket.batch], staged[bucket.batch : size].view(5, bucket.batch, bucket.nodes)

    def _verified(self, bucket: Bucket) -> Verified:
        """The first half's results."""
        _, grid = self._slots_and_grid(bucket)
        count, shape = bucket.batch * bucket.nodes, (bucket.batch, bucket.nodes)
        _, parents, depths, ancestors, _ = grid.unbind()
        row_of = self._row_of[:count].view(shape)
        if bucket.prompts:
            tokens = self._end_tokens[:count]  # roots: what they are matters to nobody
            topology = Topology(parents, depths, ancestors, tokens == 0, bucket.depth)
            draft = Draft(tokens, topology, None, row_of, padded=True)
            return Verified(draft, self._end_states[:count], self._end_logits[:count], tokens)
        topology = Topology(parents, depths, ancestors, self._valid[:count].view(shape), bucket.depth)
        tokens = self._tokens[:count].view(shape)
        draft = Draft(tokens, topology, None, row_of, padded=True)
        rows = self._node_rows[:count].view(shape)
        return Verified(draft, self._states[:count], self._logits[:count], rows)

    def _packed_rows(self, bucket: Bucket) -> Tensor:
        width = 5 + bucket.depth + (2 + self._lookup.size if self._lookup is not None else 0)
        return self._packed[: bucket.batch * width].view(bucket.batch, width)

    def _static_batch(self, slots: Tensor, anything: bool) -> Batch:
        asked = NOTHING
        if anything and self._lookup is not None:
            predicted = dict.fromkeys(range(len(slots)), self._lookup.longest_prediction)
            asked = replace(NOTHING, predicted=predicted)
        return Batch([], [], slots, self._lengths[slots], self._max_length, adjusted=anything, asked=asked)

    def _draft_forward(self, bucket: Bucket, heads: bool) -> None:
        """What the graph of a first half holds."""
        slots, grid = self._slots_and_grid(bucket)
        draft = self._drafter.fixed(
            root=self._root[slots],
            hidden=self._hidden[slots],
            chain=self._lookup.tokens[slots] if self._lookup is not None else None,
            most=self._most(bucket.nodes, heads=heads),
            grid=grid,
            max_depth=bucket.depth,
        )
        found, kept = self.forward(self._static_batch(slots, False), draft), self._verified(bucket)
        kept.draft.tokens.copy_(draft.tokens)
        kept.draft.topology.valid.copy_(draft.topology.valid)
        kept.rows.copy_(found.rows)
        kept.hidden.copy_(found.hidden)
        kept.logits.copy_(found.logits)

    def _targets_accept_compact(self, bucket: Bucket, anything: bool) -> None:
        """What the graph of a second half holds."""
        slots, _ = self._slots_and_grid(bucket)
        batch, verified = self._static_batch(slots, anything), self._verified(bucket)
        draft, logits = verified.draft, verified.logits
        if anything:
            targets = verify_all(logits, draft.tokens, draft.topology, self._sampling.all_rows(slots))
        else:
            best = logits.argmax(-1).view_as(draft.tokens)
            targets = verify_greedy(best, draft.tokens, draft.topology)
        accepted = accept(draft.tokens, targets, draft.topology)
        self.compact(batch, verified, accepted)
        self._packed_rows(bucket).copy_(self.report(batch, accepted))
        self._lengths[self._spare :].zero_()

    # -- prompts -----------------------------------------------------------------------------------

    def _chunks_forward(self, chunks: list[Chunk]) -> Tensor:
        """See `PromptRunner._chunks_forward`."""
        bucket = self._prompt_bucket(chunks)
        if bucket is None:
            return super()._chunks_forward(chunks)
        graph = self._layers_of(bucket)
        self._prompt_inputs.fill(bucket.inputs(chunks, self._spare))
        graph.replay()
        return self._prompt_hidden[: sum(chunk.size for chunk in chunks)]

    def launches(self, chunks: list[Chunk]) -> bool:
        """See `PromptRunner.launches`. What is wanted beside the first tokens is read at once."""
        asked = [chunk.sequence.request.sampling for chunk in chunks]
        plain = all(s.logprobs is None and s.prompt_logprobs is None for s in asked)
        return plain and self._ends_in_a_graph(chunks)

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> PromptResults | list[Prefilled]:
        """See `PromptRunner.launch`."""
        if not self.launches(chunks):
            return self.prefill(chunks)
        started, begun = time.perf_counter(), None
        try:
            if self._device.type == "cuda":
                begun = device_event()
                begun.record()
            return self._ended(chunks, *self._computed(chunks), started, begun)
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("a pass over %d prompts failed; it is made again", len(chunks))
        # What the first try has left in the slots is written anew.
        return self.prefill([replace(chunk, first=True) for chunk in chunks])

    def _first_tokens(self, chunks: list[Chunk], hidden: Tensor, ends: list[int]) -> list[Prefilled]:
        """See `PromptRunner._first_tokens`."""
        if not self._ends_in_a_graph(chunks) or not any(chunk.draws for chunk in chunks):
            return super()._first_tokens(chunks, hidden, ends)
        found = self._ended(chunks, hidden, ends, time.perf_counter(), None).read()
        for i, (chunk, result) in enumerate(zip(chunks, found, strict=True)):
            num_top = chunk.sequence.request.sampling.logprobs
            if result.first is not None and num_top is not None:
                logits, tokens = self._end_logits[i : i + 1], self._ids([result.first])
                found[i] = replace(result, logprobs=token_logprobs(logits, tokens, num_top))
        return found

    def _ends_in_a_graph(self, chunks: list[Chunk]) -> bool:
        """Not those who come back with their roots, nor grammars."""
        others = any((c.last and not c.draws) or c.sequence.grammar is not None for c in chunks)
        return not others and len(chunks) <= max(self.prompts.chunks, default=0)

    def _ended(
        self,
        chunks: list[Chunk],
        hidden: Tensor,
        ends: list[int],
        started: float,
        begun: torch.cuda.Event | None,
    ) -> PromptResults:
        """Launch what follows the layers. Slots of chunks that are not their prompts' last are left alone."""
        if self._prompt_bucket(chunks) is None:  # the graph looks for them there
            self._prompt_hidden[: len(ends)] = hidden[self._ids(ends) - 1]
            ends = list(range(1, 1 + len(ends)))
        batch = next(most for most in self.prompts.chunks if len(chunks) <= most)
        bucket = Bucket(batch, 1, 0, prompts=True)
        draws = [chunk.draws for chunk in chunks]
        drawing = [chunk.sequence for chunk in chunks if chunk.draws]
        slots = [chunk.sequence.slot if chunk.draws else self._spare for chunk in chunks]
        lengths = [chunk.end - 1 if chunk.draws else 0 for chunk in chunks]
        self._fill_end(bucket, slots, [end - 1 for end in ends], lengths)
        self._second_half(bucket, Asked.by(drawing).more_than_best).replay()
        if bucket not in self._landings:
            self._landings[bucket] = Landing(self._packed_rows(bucket))
        results = Results(self._landings[bucket], 0, started=started, begun=begun, count=len(chunks))
        return PromptResults(results, draws, self._lookup is not None)

    def _fill_end(self, bucket: Bucket, slots: list[int], rows: list[int], lengths: list[int]) -> None:
        """What the graph behind a pass reads.

        Args:
            slots: of the chunks; rows: of their last tokens; lengths: of what comes before these, cached.
        """
        batch, missing = bucket.batch, [0] * (bucket.batch - len(slots))
        # The grid of trees of one node: picks, parents and depths, then ancestors and which are valid.
        grid = [0] * (3 * batch) + [1] * (2 * batch)
        values = [*slots, *[self._spare] * len(missing), *grid, *rows, *missing, *lengths, *missing]
        self._end_inputs.fill(values)

    def _prompt_bucket(self, chunks: list[Chunk]) -> PromptBucket | None:
        return self.prompts.find(len(chunks), sum(chunk.size for chunk in chunks))

    def _layers_of(self, bucket: PromptBucket) -> Graph:
        if bucket not in self._layers:
            self._prompt_inputs.fill(bucket.inputs([], self._spare))
            self._layers[bucket] = self._captured(
                lambda: self._pass(bucket),
                f"the pass over {bucket.tokens} tokens of {bucket.chunks} prompts",
                "max_num_seqs or max_prefill_tokens",
            )
        return self._layers[bucket]

    def _pass(self, bucket: PromptBucket) -> None:
        """What the graph of a pass over prompts holds."""
        parts = torch.split(self._prompt_inputs.tensor[: sum(bucket.parts)], [*bucket.parts])
        slots, starts = (part[: bucket.sequences] for part in parts[:2])
        index, tokens = (part[: bucket.tokens] for part in parts[2:])
        # No row that is computed lies behind the longest sequence's.
        attention_input = self._attention_input(
            slots, starts, bucket.longest, max_length=self._max_length, index=index
        )
        self._attention.plan(attention_input, self._pool)
        positions = attention_input.positions().flatten()[index]
        self._decoder(tokens, positions, self._attention, self._prompt_hidden[: bucket.tokens])

    def _end(self, bucket: Bucket, anything: bool) -> None:
        """What the graph behind a pass over prompts holds: a step's second half, in which they are roots."""
        slots, _ = self._slots_and_grid(bucket)
        rows, lengths = self._end_inputs.tensor[6 * bucket.batch : 8 * bucket.batch].view(2, -1)
        verified = self._verified(bucket)
        torch.index_select(self._prompt_hidden, 0, rows, out=verified.hidden)
        self._decoder.logits(verified.hidden, verified.logits)
        self._lengths[slots] = lengths
        self._targets_accept_compact(bucket, anything)
        # Of a chunk that is not its prompt's last, too, whose slot is the spare one here.
        self._packed_rows(bucket)[:, 0] = verified.hidden.isfinite().all(1)

    def _most_prompt_tokens(self) -> int:
        """Passes of so many tokens and fewer are worth capturing: the host takes most of their time."""
        if self._device.type != "cuda":
            return max(self.prompts.tokens, default=0)
        found = 0
        for tokens in self.prompts.tokens:
            bucket = self.prompts.find(1, tokens)
            if bucket is None or self._share_of_launching(bucket) < _HOST_BOUND:
                break
            found = tokens
        return found

    def _share_of_launching(self, bucket: PromptBucket) -> float:
        """The share of an eager pass's time, 0 to 1, in which the host launches its kernels."""
        self._prompt_inputs.fill(bucket.inputs([], self._spare))
        self._pass(bucket)  # compiles its kernels
        shares = []
        for _ in range(3):
            torch.cuda.synchronize(self._device)
            started = time.perf_counter()
            self._pass(bucket)
            launched = time.perf_counter()
            torch.cuda.synchronize(self._device)
            shares.append((launched - started) / (time.perf_counter() - started))
        return statistics.median(shares)
