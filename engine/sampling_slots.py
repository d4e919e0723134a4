"""The sampling state of every running sequence, on the device, one row per slot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Items
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.adjust import Adjustment, BadWords, LogitBias, MinTokens, Penalties
from engine.devices import sent_together, slot_rows
from engine.sampler import Adjusting, SamplingRows, TypicalRows
from engine.types import Sequence

__all__ = ["SamplingSlots"]


class SamplingSlots:
    """Every slot tensor a draw depends on, allocated once: parameters, output positions, adjustments.

    The adjustments' tables are allocated when a request first needs them, and their room is kept free
    (`engine.adjust.table_bytes`); all else is a few bytes a slot.

    Args:
        max_num_seqs: number of slots.
        vocab_size: width of the logits.
        eos_token_ids: the model's; ids outside the vocabulary are ignored.
        device: where the tensors live.
    """

    def __init__(
        self, *, max_num_seqs: int, vocab_size: int, eos_token_ids: Iterable[int], device: torch.device
    ) -> None:
        self.vocab_size = vocab_size

        self._device = device
        # A row for each parameter, so that those of an admission go there together.
        self._floats = slot_rows(5, max_num_seqs, torch.float32, device)
        self.temperature, self.top_p, self.min_p, self.epsilon, self.delta = self._floats.unbind()
        self._integers = slot_rows(4, max_num_seqs, torch.int64, device)
        self.top_k, self.seed, self.choice, self.position = self._integers.unbind()
        self.typical = torch.zeros(max_num_seqs, dtype=torch.bool, device=device)
        self._typical: set[int] = set()
        shape = (max_num_seqs, vocab_size, device)
        self.penalties, self.logit_bias = Penalties(*shape), LogitBias(*shape)
        self.min_tokens = MinTokens(*shape, eos_token_ids=eos_token_ids)
        self.bad_words = BadWords(*shape)
        # In the order in which SamplingParams promises to apply them.
        self._adjustments: tuple[Adjustment, ...] = (
            self.penalties,
            self.logit_bias,
            self.min_tokens,
            self.bad_words,
        )

    @torch.inference_mode()
    def admit(self, sequences: Items[Sequence]) -> None:
        """Make the slots the sequences': their constants, and what follows from the tokens they have.

        A sequence that returns after preemption goes on where it was: the next draw is that of output
        position `sequence.num_output`, and its output counts as emitted.
        """
        floats, integers = [], []
        for sequence in sequences:
            sampling, medusa = sequence.request.sampling, sequence.request.medusa
            floats.append(
                (sampling.temperature, sampling.top_p, sampling.min_p, medusa.epsilon, medusa.delta)
            )
            top_k = min(sampling.top_k, self.vocab_size)
            integers.append((top_k, sequence.seed, sequence.index, sequence.num_output))
            if (typical := sequence.request.typical) != (sequence.slot in self._typical):
                self.typical[sequence.slot] = typical
                (self._typical.add if typical else self._typical.discard)(sequence.slot)
            for adjustment in self._adjustments:
                adjustment.admit(sequence)
        slots, parameters, others = sent_together(
            np.array([sequence.slot for sequence in sequences]),
            np.array(floats, dtype=np.float32).T,
            np.array(integers).T,
            device=self._device,
        )
        self._floats.index_copy_(1, slots, parameters)
        self._integers.index_copy_(1, slots, others)

    @torch.inference_mode()
    def advance(self, slots: Tensor, tokens: Tensor, counts: Tensor, *, adjusted: bool | None = None) -> None:
        """Follow what was emitted. Fixed shapes, nothing is read by the host.

        Args:
            slots: [B] int64, all different but for those that nobody reads.
            tokens: [B, K] int64; past a row's count anything may stand.
            counts: [B] int64, 0 to K: the first counts[b] tokens of row b were emitted.
            adjusted: whether some of the slots use adjustments; None: whether any slot in use does decides.
        """
        self.position[slots] += counts
        for adjustment in self._adjustments:
            adjustment.advance(slots, tokens, counts, followed=adjusted)

    def allocate(self) -> None:
        """Make the adjustments' tables now, which a captured step cannot."""
        for adjustment in self._adjustments:
            adjustment.allocate()

    def all_rows(self, slots: Tensor) -> SamplingRows:
        """`rows` for any requests: whatever one may ask for is on, for a captured step."""
        return replace(
            self._parameters(slots),
            typical=self._typical_rows(slots),
            adjusting=Adjusting(slots, self._adjustments),
        )

    def rows(self, slots: Tensor, sequences: list[Sequence]) -> SamplingRows:
        """The rows of a draw.

        Args:
            slots: [B] int64, the sequences' slots.
            sequences: the B sequences; their parameters say what the draw may skip.
        """
        sampling = [sequence.request.sampling for sequence in sequences]
        typical = any(sequence.request.typical for sequence in sequences)
        adjusting = None
        if any(s.adjusts for s in sampling):
            wanted = tuple(a for a in self._adjustments if any(a.wanted(s) for s in sampling))
            adjusting = Adjusting(slots, wanted)
        return replace(
            self._parameters(slots),
            all_greedy=all(s.greedy for s in sampling),
            truncates=any(s.truncates for s in sampling),
            typical=self._typical_rows(slots) if typical else None,
            adjusting=adjusting,
        )

    def _parameters(self, slots: Tensor) -> SamplingRows:
        """The parameters alone, to be drawn with as if some row truncated and none were greedy."""
        return SamplingRows(
            temperature=self.temperature[slots],
            top_p=self.top_p[slots],
            top_k=self.top_k[slots],
            min_p=self.min_p[slots],
            seed=self.seed[slots],
            choice=self.choice[slots],
            position=self.position[slots],
            all_greedy=False,
            truncates=True,
        )

    def _typical_rows(self, slots: Tensor) -> TypicalRows:
        return TypicalRows(self.typical[slots], self.epsilon[slots], self.delta[slots])
