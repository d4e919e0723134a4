"""One step on the device: the tensors behind the words draft, forward, targets, compact."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.batch import NOTHING, Asked, Batch, Verified
from engine.constrain import forbid_, masks_at_nodes
from engine.logprobs import token_logprobs
from engine.medusa.accept import Accepted, accept
from engine.medusa.buckets import Buckets
from engine.medusa.draft import Draft
from engine.medusa.tree import SHAPES, TreeShape
from engine.prompt_runner import PromptRunner
from engine.sampler import Targets, verify
from engine.step_results import Results, device_event
from engine.types import Sequence, TokenLogprobs

__all__ = ["Runner"]


class Runner(PromptRunner):
    """Decode steps over the slots of a `PromptRunner`, whose arguments are its own."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.buckets: Buckets | None = None
        self._asked, self._nobody = NOTHING, self._lengths[:0]

    def batch(self, sequences: list[Sequence]) -> Batch:
        """The decode batch of `sequences`, their block tables brought up to date."""
        started = time.perf_counter()
        self._sync_tables(sequences)
        shapes = [SHAPES[sequence.head_nodes, sequence.lookup_nodes] for sequence in sequences]
        different, slots, size = frozenset(shapes), self._nobody, None
        nodes = 1 + max([heads + lookup for heads, lookup in different])
        if self.buckets is not None:
            size = self.buckets.find(len(shapes), nodes)
        if size is None:
            slots = self._ids([sequence.slot for sequence in sequences])
        self._asked = self._asked.again(sequences)
        return Batch(
            sequences=sequences,
            shapes=shapes,
            slots=slots,
            lengths=self._lengths[slots] if size is None else slots,
            max_length=max([sequence.num_cached + sequence.in_flight for sequence in sequences]),
            started=started,
            begun=device_event() if self._device.type == "cuda" else None,
            asked=self._asked,
            different=different,
            nodes=nodes,
            head_nodes=max(different).head_nodes,
            size=size,
        )

    def place(self, sequences: list[Sequence]) -> Batch:
        """A decode batch of sequences that were never prefilled, for measuring: their K/V mean nothing."""
        self._admit(sequences)
        return self.place_again(sequences)

    def place_again(self, sequences: list[Sequence]) -> Batch:
        """The same batch after a step: its sequences stand where they stood."""
        slots = self._ids([sequence.slot for sequence in sequences])
        self._root[slots] = self._ids([sequence.token_ids[-1] for sequence in sequences])
        self._lengths[slots] = self._ids([sequence.num_cached for sequence in sequences])
        return self.batch(sequences)

    def most_tokens(self, batch: Batch) -> list[int]:
        """The most tokens that each sequence may emit in the step."""
        most = {shape: self._drafter.depth(shape) + 1 for shape in batch.different}
        if len(most) == 1:
            return [*most.values()] * len(batch.shapes)
        return [most[shape] for shape in batch.shapes]

    def parents(self, shape: TreeShape) -> list[int]:
        """The parent of each node of such a tree; 0 for the root."""
        return self._drafter.parents(shape)

    @torch.inference_mode()
    def draft_forward(self, batch: Batch) -> Verified:
        """The step's first half. What the host has to say of its logits fits between the two."""
        batch.begin()
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
                predicted=batch.asked.predicted,
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
            predicted=Asked.by(sequences).predicted,
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
