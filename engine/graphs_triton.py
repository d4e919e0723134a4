"""Captured steps in which everything but the model's own layers is Triton kernels, one program a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.attention.base import AttentionInput
from engine.graphs import Bucket, CapturedRunner
from engine.greedy_triton import GreedySearch
from engine.sampler_triton import TreeSampler
from engine.step_triton import Carried, Draws, Nodes, accept, move, prepare

__all__ = ["TritonRunner"]


class TritonRunner(CapturedRunner):
    """A `CapturedRunner` with the same halves, in four kernels where torch's operators are a hundred.

    The second half draws along the accepted path only, with whatever its requests ask for, so a sampled
    step costs little more than a greedy one.
    """

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        rows, batch = self.buckets.max_rows, max(self.buckets.batches)

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self._device)

        self._positions, self._path = buffer(rows), buffer(rows)
        self._batch_lengths, self._batch_tables = buffer(batch), buffer(batch, self._table_length)
        self._sampler = TreeSampler(
            self._sampling,
            max_batch=batch,
            max_rows=rows,
            vocab_size=self._decoder.config.vocab_size,
            device=self._device,
        )
        self._greedy = GreedySearch(
            max_rows=rows, vocab_size=self._decoder.config.vocab_size, device=self._device
        )
        self._carried = Carried(self._root, self._hidden, self._lengths, self._tables, self._spare)

    def _nodes(self, bucket: Bucket) -> Nodes:
        return Nodes(
            tokens=self._tokens,
            valid=self._valid,
            rows=self._node_rows,
            positions=self._positions,
            lengths=self._batch_lengths,
            tables=self._batch_tables,
            batch=bucket.batch,
            nodes=bucket.nodes,
            depth=bucket.depth,
        )

    def _draft_forward(self, bucket: Bucket, heads: bool) -> None:
        slots, grid = self._slots_and_grid(bucket)
        kept, nodes = self._verified(bucket), self._nodes(bucket)
        most = self._most(bucket.nodes, heads=heads).head_nodes
        guesses = None
        if most:
            root = self._root[slots] if self._drafter.needs_root else None  # it would be a kernel for nothing
            guesses = self._drafter.guess(root, self._hidden[slots], most)
        chain = self._lookup.tokens if self._lookup is not None else None
        prepare(self._inputs.tensor, self._carried, guesses, chain, self._pool.block_size, nodes)

        count = bucket.batch * bucket.nodes
        attention_input = AttentionInput(
            block_tables=self._batch_tables[: bucket.batch],
            lengths=self._batch_lengths[: bucket.batch],
            rows=kept.rows,
            max_length=self._max_length + bucket.nodes,
            ancestors=grid[3],
            depths=grid[2],
        )
        self._attention.plan(attention_input, self._pool)
        tokens, positions = self._tokens[:count], self._positions[:count]
        hidden = self._decoder(tokens, positions, self._attention, kept.hidden)
        self._decoder.logits(hidden, kept.logits)

    def _targets_accept_compact(self, bucket: Bucket, anything: bool) -> None:
        slots, grid = self._slots_and_grid(bucket)
        kept, nodes = self._verified(bucket), self._nodes(bucket)
        if anything:
            sampler = self._sampler
            sampler.draw(slots, kept.logits, kept.draft.tokens, grid, kept.draft.topology.valid)
            draws = Draws(sampler.drawn, sampler.matched, sampler.log_p)
        else:
            draws = Draws(self._greedy.search(kept.logits))
        packed = self._packed_rows(bucket)
        accept(
            self._staged(bucket),
            nodes,
            draws,
            kept.hidden,
            self._carried,
            self._sampling,
            self._lookup,
            path=self._path,
            packed=packed,
        )
        if bucket.depth:
            move(self._pool, nodes, self._path, packed)
