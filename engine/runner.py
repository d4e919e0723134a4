"""One step on the device: the tensors behind the words draft, forward, targets, compact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionInput
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES
from engine.errors import StepError
from engine.medusa.accept import Accepted
from engine.medusa.heads import Draft, Drafter
from engine.medusa.tree import Tree
from engine.model.decoder import Decoder
from engine.sampler import SamplingRows, draw, draw_tree
from engine.scheduler import Chunk
from engine.types import Sequence

__all__ = ["NOT_FINITE", "Batch", "Runner", "Verified"]

NOT_FINITE = "the model computed values that are not finite; a wider dtype may help"


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one decode step: their slots [B] int64, lengths [B] int64, and host knowledge."""

    slots: Tensor
    lengths: Tensor
    max_length: int
    all_greedy: bool
    truncates: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """What the forward pass over the trees gave.

    Args:
        hidden: [B, N, hidden], after the final norm.
        logits: [B, N, vocab] float32.
        rows: [B, N] int64, flat pool rows of the nodes.
    """

    hidden: Tensor
    logits: Tensor
    rows: Tensor


class Runner:
    """Holds every per-request device tensor, each allocated once with a row per slot.

    Carried from step to step for each running sequence: the root (drawn, not yet in the cache), the
    hidden state it was drawn from, the number of rows in the cache, and the output position of the
    next draw.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        pool: KVPool,
        drafter: Drafter | None,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._decoder, self._attention, self._pool, self._drafter = decoder, attention, pool, drafter
        self._device = pool.device
        self._chain = Tree(()).topology(self._device)
        max_blocks = -(-(max_model_len + MAX_TREE_NODES) // pool.block_size)

        def slots(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(max_num_seqs, *shape, dtype=dtype, device=self._device)

        self._root = slots(torch.int64)
        self._hidden = slots(pool.dtype, decoder.config.hidden_size)
        self._lengths = slots(torch.int64)
        self._tables = slots(torch.int64, max_blocks)
        self._table_lengths = [0] * max_num_seqs
        self._position = slots(torch.int64)
        self._seed = slots(torch.int64)
        self._choice = slots(torch.int64)
        self._temperature = slots(torch.float32)
        self._top_p = slots(torch.float32)
        self._top_k = slots(torch.int64)
        self._min_p = slots(torch.float32)

    @torch.inference_mode()
    def prefill(self, chunk: Chunk) -> int | None:
        """Compute the K/V of a chunk; after the last chunk of a new sequence, draw its first token.

        Returns:
            The first token, or None where the chunk is not the last or the root was drawn before
            (recompute after preemption).
        """
        sequence, start, end = chunk.sequence, chunk.start, chunk.end
        if start == 0:
            self._admit(sequence)
        self._sync_table(sequence)
        size = end - start
        tokens = torch.tensor(sequence.token_ids[start:end], device=self._device)
        slot = torch.tensor([sequence.slot], device=self._device)
        lengths = torch.tensor([start], device=self._device)
        visible = torch.ones(1, size, size, dtype=torch.bool, device=self._device).tril_()
        attention_input = self._attention_input(slot, lengths, visible, max_length=end)
        self._attention.plan(attention_input, self._pool)
        positions = torch.arange(start, end, device=self._device)
        hidden = self._decoder(tokens, positions, self._attention)
        if not hidden[-1].isfinite().all():
            raise StepError(NOT_FINITE)
        if not chunk.last:
            return None
        first = None
        if sequence.num_output == 0:
            sampling = sequence.request.sampling
            rows = self._sampling(slot, all_greedy=sampling.greedy, truncates=sampling.truncates)
            root = draw(self._decoder.logits(hidden[-1:]), rows)
            first = int(root.item())
        self._root[sequence.slot] = sequence.token_ids[-1] if first is None else first
        self._hidden[sequence.slot] = hidden[-1]
        self._lengths[sequence.slot] = end
        self._position[sequence.slot] = max(1, sequence.num_output)
        return first

    def clear(self, sequence: Sequence) -> None:
        """Zero the K/V of a failed sequence: a NaN left behind would spread to the blocks' next owner."""
        self._pool.clear(torch.tensor(sequence.blocks, dtype=torch.int64, device=self._device))

    def batch(self, sequences: list[Sequence]) -> Batch:
        """The decode batch of `sequences`, their block tables brought up to date."""
        for sequence in sequences:
            self._sync_table(sequence)
        slots = torch.tensor([sequence.slot for sequence in sequences], device=self._device)
        sampling = [sequence.request.sampling for sequence in sequences]
        return Batch(
            slots=slots,
            lengths=self._lengths[slots],
            max_length=max(sequence.num_cached for sequence in sequences),
            all_greedy=all(s.greedy for s in sampling),
            truncates=any(s.truncates for s in sampling),
        )

    @torch.inference_mode()
    def draft(self, batch: Batch, size: int) -> Draft:
        """Candidates for the next tokens: trees of `size` nodes, root first; 1 is plain decoding."""
        root = self._root[batch.slots]
        if size == 1 or self._drafter is None:
            return Draft(root.unsqueeze(1), self._chain.expand(len(root)))
        return self._drafter.draft(root, self._hidden[batch.slots], size)

    @torch.inference_mode()
    def forward(self, batch: Batch, draft: Draft) -> Verified:
        """One pass over all nodes, each seeing its sequence's cache and its own ancestors."""
        topology = draft.topology
        max_length = batch.max_length + draft.tokens.shape[1]
        attention_input = self._attention_input(
            batch.slots, batch.lengths, topology.visible(), max_length=max_length
        )
        self._attention.plan(attention_input, self._pool)
        positions = (batch.lengths.unsqueeze(1) + topology.depths).flatten()
        hidden = self._decoder(draft.tokens.flatten(), positions, self._attention)
        hidden = hidden.view(*draft.tokens.shape, -1)
        return Verified(hidden=hidden, logits=self._decoder.logits(hidden), rows=attention_input.rows)

    @torch.inference_mode()
    def targets(self, batch: Batch, draft: Draft, logits: Tensor) -> Tensor:
        """[B, N] int64: the model's own draw at each node."""
        rows = self._sampling(batch.slots, all_greedy=batch.all_greedy, truncates=batch.truncates)
        return draw_tree(logits, draft.tokens, draft.topology, rows)

    def finite(self, batch: Batch) -> Tensor:
        """[B] bool: the carried hidden state has no NaN or infinity, so the last pass was sound.

        A value that is not finite spreads to all later rows of its sequence, this one included.
        """
        return self._hidden[batch.slots].isfinite().all(1)

    @torch.inference_mode()
    def compact(self, batch: Batch, verified: Verified, accepted: Accepted) -> None:
        """Move accepted K/V rows behind the prefix and carry the state over to the next step."""
        depth = torch.arange(accepted.path.shape[1], device=self._device)
        if len(depth) > 1:
            # Entries past the path's end repeat its last move. The root is in place already.
            target = torch.minimum(depth, accepted.length.unsqueeze(1))
            source_rows = verified.rows.gather(1, accepted.path)
            target_rows = verified.rows.gather(1, target)
            self._pool.move(source_rows[:, 1:].flatten(), target_rows[:, 1:].flatten())
        batch_index = torch.arange(len(batch.slots), device=self._device)
        advance = accepted.length + 1
        self._root[batch.slots] = accepted.next_root
        self._hidden[batch.slots] = verified.hidden[batch_index, accepted.last]
        self._lengths[batch.slots] = batch.lengths + advance
        self._position[batch.slots] += advance

    def _attention_input(
        self, slots: Tensor, lengths: Tensor, visible: Tensor, *, max_length: int
    ) -> AttentionInput:
        tables = self._tables[slots]
        row = lengths.unsqueeze(1) + torch.arange(visible.shape[1], device=self._device)
        block_size = self._pool.block_size
        rows = tables.gather(1, row // block_size) * block_size + row % block_size
        return AttentionInput(
            block_tables=tables, lengths=lengths, rows=rows, visible=visible, max_length=max_length
        )

    def _sampling(self, slots: Tensor, *, all_greedy: bool, truncates: bool) -> SamplingRows:
        return SamplingRows(
            temperature=self._temperature[slots],
            top_p=self._top_p[slots],
            top_k=self._top_k[slots],
            min_p=self._min_p[slots],
            seed=self._seed[slots],
            choice=self._choice[slots],
            position=self._position[slots],
            all_greedy=all_greedy,
            truncates=truncates,
        )

    def _admit(self, sequence: Sequence) -> None:
        """Write the slot's constants."""
        slot, sampling = sequence.slot, sequence.request.sampling
        self._temperature[slot] = sampling.temperature
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = min(sampling.top_k, self._decoder.config.vocab_size)
        self._min_p[slot] = sampling.min_p
        self._seed[slot] = sequence.seed
        self._choice[slot] = sequence.index
        self._position[slot] = sequence.num_output
        self._table_lengths[slot] = 0

    def _sync_table(self, sequence: Sequence) -> None:
        """Append blocks the scheduler has added since the last step to the slot's block table."""
        known = self._table_lengths[sequence.slot]
        if added := sequence.blocks[known:]:
            row = self._tables[sequence.slot]
            row[known : known + len(added)] = torch.tensor(added, device=self._device)
            self._table_lengths[sequence.slot] = len(sequence.blocks)
