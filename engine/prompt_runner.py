"""What every running sequence has on the device, and passes over prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence as Items
from dataclasses import replace
from importlib import import_module
from itertools import accumulate

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionInput, computed_rows, is_ragged
from engine.cache.pool import KVPool
from engine.config import MAX_TREE_NODES
from engine.constrain import forbid_, masks_at_roots
from engine.devices import sent
from engine.errors import told
from engine.logprobs import token_logprobs
from engine.medusa.draft import Drafter
from engine.medusa.heads import HeadDrafter
from engine.medusa.lookup import Lookup
from engine.model.decoder import Decoder
from engine.sampler import draw
from engine.sampling_slots import SamplingSlots
from engine.scheduler import Chunk
from engine.step_results import NOT_FINITE, Prefilled, PromptResults
from engine.types import Sequence

__all__ = ["PromptRunner"]

log = logging.getLogger(__name__)


class PromptRunner:
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
        self._ragged = is_ragged(attention)
        self._device, self.vocab_size = pool.device, decoder.config.vocab_size
        self.lookup_size = lookup_size
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
            vocab_size=self.vocab_size,
            eos_token_ids=eos_token_ids,
            device=self._device,
        )
        if self._device.type == "cpu":
            import_module("engine.race_cpu")  # compile it now, not under the first request that draws
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
        if self._ragged and chunks:
            return [chunks]
        return [[chunk] for chunk in chunks]

    def launches(self, chunks: list[Chunk]) -> bool:  # noqa: ARG002 - of graphs, which are not here
        """Whether `launch` need not wait for a pass over these."""
        return False

    def launch(self, chunks: list[Chunk]) -> PromptResults | list[Prefilled]:
        """`prefill`, which is not waited for where that can be."""
        return self.prefill(chunks)

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
        hidden, ends = self._computed(chunks)
        for chunk, end in zip(chunks, ends, strict=True):
            self._prompt_logprobs(chunk, hidden[end - chunk.size : end])
        return self._first_tokens(chunks, hidden, ends)

    def _computed(self, chunks: list[Chunk]) -> tuple[Tensor, list[int]]:
        """Hidden states, one chunk after the other, and where each ends."""
        self._admit([chunk.sequence for chunk in chunks if chunk.first])
        self._sync_tables(chunk.sequence for chunk in chunks)
        return self._chunks_forward(chunks), list(accumulate(chunk.size for chunk in chunks))

    def _first_tokens(self, chunks: list[Chunk], hidden: Tensor, ends: list[int]) -> list[Prefilled]:
        """What is carried of completed prompts, and the first tokens of those that have none.

        Args:
            hidden: [T, hidden], of the chunks one after the other; ends: where each ends.
        """
        last = hidden[self._ids(ends) - 1]
        sound = last.isfinite().all(1)
        self._carry(chunks, last)
        drawn = [i for i, chunk in enumerate(chunks) if chunk.draws]
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

    def _carry(self, chunks: list[Chunk], last: Tensor) -> None:
        """Write to the slots of completed prompts what a step finds there; `last` [C, hidden] is where they
        end."""
        carried = [i for i, chunk in enumerate(chunks) if chunk.last]
        if carried:
            slots = self._ids([chunks[i].sequence.slot for i in carried])
            self._root[slots] = self._ids([chunks[i].sequence.token_ids[-1] for i in carried])
            self._hidden[slots] = last[self._ids(carried)]
            self._lengths[slots] = self._ids([chunks[i].end for i in carried])

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

    def _admit(self, sequences: Items[Sequence]) -> None:
        """Write what their slots hold from here to the sequences' ends."""
        if not sequences:
            return
        self._sampling.admit(sequences)
        if self._lookup is not None:
            self._lookup.admit(sequences)
        # Entries of the slot's last owner would let a padded gather read its blocks' next owners.
        slots = [sequence.slot for sequence in sequences]
        self._tables.index_fill_(0, self._ids(slots), 0)
        for slot in slots:
            self._table_lengths[slot] = 0

    def _sync_tables(self, sequences: Iterable[Sequence]) -> None:
        """Append blocks the scheduler has added since the last step to the slots' block tables."""
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for sequence in sequences:
            slot, length = sequence.slot, len(sequence.blocks)
            known = self._table_lengths[slot]
            if length > known:
                rows += [slot] * (length - known)
                columns += range(known, length)
                blocks += sequence.blocks[known:]
                self._table_lengths[slot] = length
        if blocks:
            row, column, block = self._ids(torch.tensor((rows, columns, blocks))).unbind()
            self._tables[row, column] = block
