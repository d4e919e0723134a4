"""The sampling state of every running sequence, on the device, one row per slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from engine.adjust import Adjustment, BadWords, LogitBias, MinTokens, Penalties
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

        def slots(dtype: torch.dtype) -> Tensor:
            return torch.zeros(max_num_seqs, dtype=dtype, device=device)

        self.temperature = slots(torch.float32)
        self.top_p = slots(torch.float32)
        self.top_k = slots(torch.int64)
        self.min_p = slots(torch.float32)
        self.seed = slots(torch.int64)
        self.choice = slots(torch.int64)
        self.position = slots(torch.int64)
        self.typical = slots(torch.bool)
        self.epsilon = slots(torch.float32)
        self.delta = slots(torch.float32)
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
    def admit(self, sequence: Sequence) -> None:
        """Make the slot the sequence's: its constants, and what follows from the tokens it has.

        A sequence that returns after preemption goes on where it was: the next draw is that of output
        position `sequence.num_output`, and its output counts as emitted.
        """
        slot, sampling, medusa = sequence.slot, sequence.request.sampling, sequence.request.medusa
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = min(sampling.top_k, self.vocab_size)
        self.min_p[slot] = sampling.min_p
        self.seed[slot] = sequence.seed
        self.choice[slot] = sequence.index
        self.position[slot] = sequence.num_output
        self.typical[slot] = sequence.request.typical
        self.epsilon[slot] = medusa.epsilon
        self.delta[slot] = medusa.delta
        for adjustment in self._adjustments:
            adjustment.admit(sequence)

    @torch.inference_mode()
    def advance(self, slots: Tensor, tokens: Tensor, counts: Tensor, *, adjusted: bool | None = None) -> None:
        """Follow what was emitted. Fixed shapes, nothing is read by the host.

        Args:
            slots: [B] int64, all different but for those that nobody reads.
            tokens: [B, K] int64; past a row's count anything may stand.
            counts: [B] int64, 0 to K: the first counts[b] tokens of row b were emitted.
            adjusted: whether some of the slots use adjustments; None: as far as the host knows of any slot.
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
