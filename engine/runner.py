"""One step on the device: the tensors behind the words draft, forward, targets, compact."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionInput, RaggedAttention, computed_rows
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES
from engine.constrain import forbid_, masks_at_nodes, masks_at_roots
from engine.devices import sent
from engine.errors import told
from engine.logprobs import token_logprobs
from engine.medusa.accept import Accepted, accept
from engine.medusa.draft import Draft, Drafter
from engine.medusa.heads import HeadDrafter
from engine.medusa.lookup import Lookup
from engine.medusa.tree import TreeShape
from engine.model.decoder import Decoder
from engine.sampler import Targets, draw, verify
from engine.sampling_slots import SamplingSlots
from engine.scheduler import Chunk
from engine.step_results import NOT_FINITE, Prefilled, Results, device_event
from engine.types import Sequence, TokenLogprobs

__all__ = ["Batch", "Runner", "Verified"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """The sequences of one decode step.

    Args:
        sequences: B of them.
        shapes: of their trees.
        slots, lengths: [B] int64.
        max_length: host upper bound of `lengths`.
        predicted: for each row with a prediction, how many tokens that has.
        adjusted: whether some of them use adjustments; None: as far as the host knows of any slot.
        started: `time.perf_counter()` when it was put together.
        begun: an event of that time on CUDA.
    """

    sequences: list[Sequence]
    shapes: list[TreeShape]
    slots: Tensor
    lengths: Tensor
    max_length: int
    predicted: Mapping[int, int]
    adjusted: bool | None = None
    started: float = 0.0
    begun: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True)
class Verified:
    """What the forward pass over the trees gave.

    Args:
        draft: the trees.
        hidden: [T, hidden], after the final norm, of the T valid nodes.
        logits: [T, vocab] float32, or of a dtype that holds them as exactly.
        rows: [B, N] int64, flat pool rows of the nodes.
    """

    draft: Draft
    hidden: Tensor
    logits: Tensor
    rows: Tensor


def _predicted(sequences: list[Sequence]) -> dict[int, int]:
    """For each sequence with a prediction, how many tokens that has."""
    lengths = (len(sequence.request.prediction_token_ids) for sequence in sequences)
    return {row: length for row, length in enumerate(lengths) if length}


class Runner:
    """Holds every per-request device tensor, each allocated once with a row per slot.

    Carried from step to step for each running sequence: the root (drawn, not yet in the cache), the
    hidden state it was drawn from, the number of rows in the cache, what draws depend on
    (`SamplingSlots`), and the history that the lookup branch searches.

    Args:
        decoder: the model.
        attention: its backend.
        pool: K/V memory.
        heads: the heads' branch; None without heads.
        lookup_size: most nodes of the lookup branch; 0 without.
        eos_token_ids: the model's own.
        max_num_seqs: slots; max_model_len: longest sequence.
        spare_slots: further slots, which no sequence gets.
        captured: graphs hold the steps, so that all of them is torch's operators.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        pool: KVPool,
        heads: HeadDrafter | None,
        *,
        lookup_size: int,
        eos_token_ids: frozenset[int],
        max_num_seqs: int,
        max_model_len: int,
        spare_slots: int = 0,
        captured: bool = False,
    ) -> None:
        num_slots = max_num_seqs + spare_slots
        self._decoder, self._attention, self._pool = decoder, attention, pool
        self._device = pool.device
        self._drafter = Drafter(heads, self._device)
        self._table_length = -(-(max_model_len + MAX_TREE_NODES) // pool.block_size)

        def slots(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=self._device)

        self._root = slots(torch.int64)
        self._hidden = slots(pool.dtype, decoder.config.hidden_size)
        self._lengths = slots(torch.int64)
        self._tables = slots(torch.int64, self._table_length)
        self._table_lengths = [0] * num_slots
        self._sampling = SamplingSlots(
            max_num_seqs=num_slots,
            vocab_size=decoder.config.vocab_size,
            eos_token_ids=eos_token_ids,
            device=self._device,
        )
        self._lookup: Lookup | None = None
        if lookup_size:
            made = Lookup
            if self._device.type == "cpu" and not captured:
                from engine.medusa.lookup_cpu import CpuLookup  # compiled when it is imported

                made = CpuLookup
            self._lookup = made(
                size=lookup_size,
                max_num_seqs=num_slots,
                max_tokens=max_model_len + MAX_TREE_NODES + 1,
                device=self._device,
            )

    def together(self, chunks: list[Chunk]) -> list[list[Chunk]]:
        """Chunks by the passes that compute them.

        One pass for all reads the weights once, and launches its kernels once. Where attention pays for rows
        that are not there, each is a pass of its own.
        """
        if isinstance(self._attention, RaggedAttention) and chunks:
            return [chunks]
        return [[chunk] for chunk in chunks]

    def prefill(self, chunks: list[Chunk]) -> list[Prefilled]:
        """Compute the K/V of chunks of different sequences; after a new one's last, draw its first token.

        Where a pass over several fails, each gets one of its own, so that one fails for no other's sake.

        Raises:
            Exception: the pass over a single chunk failed.
        """
        try:
            return self._prefill(chunks)
        except torch.AcceleratorError:
            raise
        except Exception:
            if len(chunks) == 1:
                raise
            log.exception("a pass over %d prompts failed; each is computed on its own", len(chunks))
        found: list[Prefilled] = []
        for chunk in chunks:
            try:
                # What the first try has left in the slot is written anew.
                found += self._prefill([replace(chunk, first=True)])
            except torch.AcceleratorError:
                raise
            except Exception as error:
                log.exception("the prompt of a sequence failed")
                found.append(Prefilled(error=told(error)))
        return found

    @torch.inference_mode()
    def _prefill(self, chunks: list[Chunk]) -> list[Prefilled]:
        for chunk in chunks:
            if chunk.first:
                self._admit(chunk.sequence)
            self._sync_table(chunk.sequence)
        hidden = self._chunks_forward(chunks)
        ends = list(accumulate(chunk.size for chunk in chunks))
        for chunk, end in zip(chunks, ends, strict=True):
            self._prompt_logprobs(chunk, hidden[end - chunk.size : end])
        last = hidden[self._ids(ends) - 1]
        sound = last.isfinite().all(1)
        carried = [i for i, chunk in enumerate(chunks) if chunk.last]
        if carried:
            slots = self._ids([chunks[i].sequence.slot for i in carried])
            self._root[slots] = self._ids([chunks[i].sequence.token_ids[-1] for i in carried])
            self._hidden[slots] = last[self._ids(carried)]
            self._lengths[slots] = self._ids([chunks[i].end for i in carried])
        drawn = [i for i in carried if chunks[i].sequence.num_output == 0]
        if not drawn:
            return [Prefilled(error=None if good else NOT_FINITE) for good in sound.tolist()]
        logits = self._decoder.logits(last[self._ids(drawn)])
        roots = self._draw_first([chunks[i].sequence for i in drawn], logits)
        values = torch.cat((sound.long(), roots)).tolist()  # waits for the pass
        found = [Prefilled(error=None if good else NOT_FINITE) for good in values[: len(chunks)]]
        for row, i in enumerate(drawn):
            logprobs, num_top = None, chunks[i].sequence.request.sampling.logprobs
            if found[i].error is None and num_top is not None:
                logprobs = token_logprobs(logits[row : row + 1], roots[row : row + 1], num_top)
            found[i] = replace(found[i], first=values[len(chunks) + row], logprobs=logprobs)
        return found

    def _chunks_forward(self, chunks: list[Chunk]) -> Tensor:
        """Final hidden states [T, hidden] of all their tokens, one chunk after the other."""
        starts, sizes = [chunk.start for chunk in chunks], [chunk.size for chunk in chunks]
        longest, index = max(sizes), computed_rows(sizes)
        attention_input = self._attention_input(
            self._ids([chunk.sequence.slot for chunk in chunks]),
            self._ids(starts),
            longest,
            max_length=max(starts) + longest,
            index=None if index is None else self._ids(index),
        )
        self._attention.plan(attention_input, self._pool)
        tokens = [token for chunk in chunks for token in chunk.sequence.token_ids[chunk.start : chunk.end]]
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks])
        hidden: Tensor = self._decoder(self._ids(tokens), self._ids(positions), self._attention)
        return hidden

    def _draw_first(self, sequences: list[Sequence], logits: Tensor) -> Tensor:
        """[S] int64, the first tokens of sequences whose prompts are cached; their slots then hold them."""
        slots = self._ids([sequence.slot for sequence in sequences])
        if any(sequence.grammar is not None for sequence in sequences):
            logits, masks = logits.clone(), masks_at_roots(sequences)
            forbid_(logits, self._ids(masks.rows), self._ids(masks.bits))
        roots = draw(logits, self._sampling.rows(slots, sequences))
        self._root[slots] = roots
        ones = torch.ones_like(slots)
        self._sampling.advance(slots, roots.unsqueeze(1), ones)
        if self._lookup is not None:
            self._lookup.append(slots, self._lengths[slots], roots.unsqueeze(1), ones)
        return roots

    def clear(self, blocks: list[int]) -> None:
        """Zero the K/V of a failed sequence: a NaN left behind would spread to the blocks' next owner."""
        self._pool.clear(self._ids(blocks))

    def batch(self, sequences: list[Sequence]) -> Batch:
        """The decode batch of `sequences`, their block tables brought up to date."""
        started, begun = time.perf_counter(), None
        if self._device.type == "cuda":
            begun = device_event()
            begun.record()
        for sequence in sequences:
            self._sync_table(sequence)
        slots = self._ids([sequence.slot for sequence in sequences])
        return Batch(
            sequences=sequences,
            shapes=[TreeShape(sequence.head_nodes, sequence.lookup_nodes) for sequence in sequences],
            slots=slots,
            lengths=self._lengths[slots],
            max_length=max(sequence.num_cached + sequence.in_flight for sequence in sequences),
            predicted=_predicted(sequences),
            started=started,
            begun=begun,
        )

    def place(self, sequences: list[Sequence]) -> Batch:
        """A decode batch of sequences that were never prefilled, for measuring: their K/V mean nothing."""
        for sequence in sequences:
            self._admit(sequence)
        return self.place_again(sequences)

    def place_again(self, sequences: list[Sequence]) -> Batch:
        """The same batch after a step: its sequences stand where they stood."""
        slots = self._ids([sequence.slot for sequence in sequences])
        self._root[slots] = self._ids([sequence.token_ids[-1] for sequence in sequences])
        self._lengths[slots] = self._ids([sequence.num_cached for sequence in sequences])
        return self.batch(sequences)

    def most_tokens(self, batch: Batch) -> list[int]:
        """The most tokens that each sequence may emit in the step."""
        return [self._drafter.depth(shape) + 1 for shape in batch.shapes]

    def parents(self, shape: TreeShape) -> list[int]:
        """The parent of each node of such a tree; 0 for the root."""
        return self._drafter.parents(shape)

    @torch.inference_mode()
    def draft_forward(self, batch: Batch) -> Verified:
        """The step's first half. What the host has to say of its logits fits between the two."""
        return self.forward(batch, self.draft(batch))

    @torch.inference_mode()
    def constrain(self, batch: Batch, verified: Verified) -> tuple[Verified, float]:
        """Between the halves: forbid at each node what its sequence's grammar does not allow behind its path.

        The logits are changed where they lie: a captured second half looks for them there.

        Returns:
            Where raw logits are, if log-probabilities are wanted; seconds in which the device does nothing.
        """
        raw = verified
        if any(s.grammar is not None and s.request.sampling.logprobs is not None for s in batch.sequences):
            raw = replace(verified, logits=verified.logits.clone())
        tokens = verified.draft.tokens.tolist()  # waits for the pass
        started = time.perf_counter()
        masks = masks_at_nodes(batch.sequences, batch.shapes, tokens, self.parents)
        rows = verified.draft.row_of[self._ids(masks.rows), self._ids(masks.nodes)]
        forbid_(verified.logits, rows, self._ids(masks.bits))
        return raw, time.perf_counter() - started

    @torch.inference_mode()
    def targets_accept_compact(self, batch: Batch, verified: Verified) -> Results:
        """The step's second half, and what the lookup proposes for the next step."""
        draft = verified.draft
        targets = self.targets(batch, draft, verified.logits)
        accepted = accept(draft.tokens, targets, draft.topology)
        self.compact(batch, verified, accepted)
        packed, depth = self.report(batch, accepted), draft.topology.max_depth
        return Results(packed, depth, started=batch.started, begun=batch.begun)

    @torch.inference_mode()
    def draft(self, batch: Batch) -> Draft:
        """Candidates for the next tokens: a tree for each sequence; one of one node is plain decoding."""
        return self._drafter.draft(
            root=self._root[batch.slots],
            hidden=self._hidden[batch.slots],
            chain=self._lookup.tokens[batch.slots] if self._lookup is not None else None,
            shapes=batch.shapes,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, draft: Draft) -> Verified:
        """One pass over all nodes, each seeing its sequence's cache and its own ancestors."""
        topology = draft.topology
        num_nodes = draft.tokens.shape[1]
        attention_input = self._attention_input(
            batch.slots,
            batch.lengths,
            num_nodes,
            max_length=batch.max_length + num_nodes,
            ancestors=topology.ancestors,
            index=draft.index,
            depths=topology.depths,
            valid=topology.valid if draft.padded else None,
        )
        self._attention.plan(attention_input, self._pool)
        positions = draft.rows(batch.lengths.unsqueeze(1) + topology.depths)
        hidden = self._decoder(draft.rows(draft.tokens), positions, self._attention)
        return Verified(draft, hidden, self._decoder.logits(hidden), attention_input.rows)

    @torch.inference_mode()
    def targets(self, batch: Batch, draft: Draft, logits: Tensor) -> Targets:
        """The model's own draw at each node, and which nodes may follow their parents."""
        rows = self._sampling.rows(batch.slots, batch.sequences)
        return verify(logits, draft.row_of, draft.tokens, draft.topology, rows)

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
        last_row = verified.draft.row_of.gather(1, accepted.last.unsqueeze(1)).squeeze(1)
        advance = accepted.length + 1
        self._root[batch.slots] = accepted.next_root
        self._hidden[batch.slots] = verified.hidden[last_row]
        self._lengths[batch.slots] = batch.lengths + advance
        self._sampling.advance(batch.slots, accepted.tokens, advance, adjusted=batch.adjusted)

    @torch.inference_mode()
    def report(self, batch: Batch, accepted: Accepted) -> Tensor:
        """What the host reads of the step, and the lookup's share of the next one; see `Results`."""
        finite = self._hidden[batch.slots].isfinite().all(1)
        columns = [finite.long(), accepted.length, accepted.last, accepted.nodes, accepted.tokens]
        if self._lookup is not None:
            proposal = self._lookup.advance(
                batch.slots,
                batch.lengths,
                accepted.tokens,
                accepted.length + 1,
                max_length=batch.max_length + accepted.path.shape[1],
                predicted=batch.predicted,
            )
            columns += [proposal.kind, proposal.count, proposal.tokens]
        return torch.column_stack(columns)

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence]) -> list[tuple[list[int], int]]:
        """For each, the lookup chain of its first decode step, and the kind of its match."""
        if self._lookup is None:
            raise ValueError("there is no lookup")
        slots = self._ids([sequence.slot for sequence in sequences])
        proposal = self._lookup.propose(
            slots,
            self._lengths[slots],
            max_length=max(sequence.num_cached for sequence in sequences),
            predicted=_predicted(sequences),
        )
        packed = torch.column_stack((proposal.kind, proposal.count, proposal.tokens)).tolist()
        return [(chain[:count], kind) for kind, count, *chain in packed]

    @torch.inference_mode()
    def set_chain(self, sequence: Sequence, tokens: list[int]) -> None:
        """Draft these in its next step, in the lookup's place."""
        assert self._lookup is not None
        self._lookup.tokens[sequence.slot, : len(tokens)] = self._ids(tokens)

    @torch.inference_mode()
    def logprobs(
        self, verified: Verified, row: int, path: list[int], tokens: list[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Raw log-probabilities of the tokens that sequence `row` of the batch emits along a path."""
        nodes = verified.draft.row_of[row][self._ids(path)]
        return token_logprobs(verified.logits[nodes], self._ids(tokens), num_top)

    def _ids(self, values: list[int] | Tensor) -> Tensor:
        """On the device, without waiting for it; lists as int64."""
        return sent(values if isinstance(values, Tensor) else torch.tensor(values), self._device)

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> None:
        """Append those of the prompt tokens that this chunk's rows predict."""
        sequence, start = chunk.sequence, chunk.start
        num_top = sequence.request.sampling.prompt_logprobs
        if num_top is None or sequence.index != 0 or sequence.num_output:
            return
        if start == 0:
            sequence.prompt_logprobs = [None]
        del sequence.prompt_logprobs[start + 1 :]  # of a pass that failed
        follows = sequence.token_ids[start + 1 : min(chunk.end + 1, sequence.num_prompt)]
        for offset in range(0, len(follows), MAX_TREE_NODES):
            part = follows[offset : offset + MAX_TREE_NODES]
            logits = self._decoder.logits(hidden[offset : offset + len(part)])
            sequence.prompt_logprobs += token_logprobs(
                logits, torch.tensor(part, device=self._device), num_top
            )

    def _attention_input(
        self,
        slots: Tensor,
        lengths: Tensor,
        num_rows: int,
        *,
        max_length: int,
        ancestors: Tensor | None = None,
        index: Tensor | None = None,
        depths: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> AttentionInput:
        tables = self._tables[slots]
        column = torch.arange(num_rows, device=self._device)
        if valid is not None:  # a node that is not repeats its root, and writes the same to the same row
            column = torch.where(valid, column, 0)
        row = lengths.unsqueeze(1) + column
        block_size = self._pool.block_size
        # A node that is not valid may lie past the sequence's last block; it is never written.
        block = (row // block_size).clamp(max=self._table_length - 1)
        rows = tables.gather(1, block) * block_size + row % block_size
        return AttentionInput(
            block_tables=tables,
            lengths=lengths,
            rows=rows,
            max_length=max_length,
            ancestors=ancestors,
            index=index,
            depths=depths,
        )

    def _admit(self, sequence: Sequence) -> None:
        """Write what the slot holds from here to the sequence's end."""
        self._sampling.admit(sequence)
        if self._lookup is not None:
            self._lookup.admit(sequence)
        # Entries of the slot's last owner would let a padded gather read its blocks' next owners.
        self._tables[sequence.slot] = 0
        self._table_lengths[sequence.slot] = 0

    def _sync_table(self, sequence: Sequence) -> None:
        """Append blocks the scheduler has added since the last step to the slot's block table."""
        known = self._table_lengths[sequence.slot]
        if added := sequence.blocks[known:]:
            row = self._tables[sequence.slot]
            row[known : known + len(added)] = self._ids(added)
            self._table_lengths[sequence.slot] = len(sequence.blocks)
