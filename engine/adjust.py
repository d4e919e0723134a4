"""What changes logits before they are filtered and drawn from: penalties, bias, and tokens forbidden for now.

Each adjustment owns its slot tensors, keeps them up to date as tokens are emitted, and applies itself to
the rows whose request asked for it. A tree node is adjusted given its own path: what was emitted (the root
is part of that) and then the drafted tokens from the root's child down to the node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.devices import sent
from engine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from engine.types import SamplingParams, Sequence

__all__ = [
    "ANY_TOKEN",
    "NO_TOKEN",
    "Adjustment",
    "BadWords",
    "LogitBias",
    "MinTokens",
    "Penalties",
    "Place",
    "table_bytes",
]

_FLOAT_MAX = torch.finfo(torch.float32).max

NO_TOKEN = -1
"""In the output's tail before its first token, and in the last column of an unused bad word."""

ANY_TOKEN = -2
"""Where a bad word is shorter than the longest there may be: whatever stands before it matches."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where R draws stand.

    Args:
        slots: [R] int64.
        position: [R] int64, output position of the draw.
        path: [R, d] int64, what would be emitted between the slot's output and the draw.
        drafted: [R] int64; only so many of a row's path stand before its draw, the others mean nothing.
            None: all of them.
    """

    slots: Tensor
    position: Tensor
    path: Tensor
    drafted: Tensor | None = None

    def select(self, rows: Tensor) -> Place:
        """Rows [n] (int64) of it."""
        drafted = None if self.drafted is None else self.drafted[rows]
        return Place(self.slots[rows], self.position[rows], self.path[rows], drafted)


class Adjustment(ABC):
    """One way of changing logits, for the slots whose request asks for it.

    Its tensors are allocated at the first such request and kept: a server that never sees one does not
    pay for it, but room for all of them is kept free (`table_bytes`). A slot's row is written whole at
    admission and read for nobody who did not ask, so what an earlier owner left needs no clearing.

    `uses` [slots] bool says who asked. What else is public are the tables, which the kernels read too.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._max_num_seqs, self._vocab_size, self._device = max_num_seqs, vocab_size, device
        self._users: set[int] = set()
        self.uses = torch.zeros(max_num_seqs, dtype=torch.bool, device=device)
        self._allocated = False

    @staticmethod
    @abstractmethod
    def wanted(sampling: SamplingParams) -> bool:
        """True where a request asks for it."""

    @staticmethod
    @abstractmethod
    def slot_bytes(vocab_size: int) -> int:
        """What its tables take for each slot."""

    def admit(self, sequence: Sequence) -> None:
        """Write the slot's row from the request and from what was emitted so far."""
        wanted = self.wanted(sequence.request.sampling)
        if wanted:
            self.allocate()
        if wanted != (sequence.slot in self._users):
            self.uses[sequence.slot] = wanted
            (self._users.add if wanted else self._users.discard)(sequence.slot)
        if wanted:
            self._write(sequence)

    def allocate(self) -> None:
        """Make its tensors now; they are made once."""
        if not self._allocated:
            self._allocate()
            self._allocated = True

    def advance(self, slots: Tensor, tokens: Tensor, counts: Tensor, *, followed: bool | None = None) -> None:
        """Of slots [B], the first counts[b] of tokens [B, K] were emitted. Slots that do not use it may be
        among them: their rows are written and never read.

        Args:
            followed: False where none of the slots uses it; None: where some slot in use does.
        """
        if self._users if followed is None else followed:
            self._emit(slots, tokens, counts)

    def apply_(self, logits: Tensor, place: Place) -> None:
        """Change logits [R, vocab] float32 in place; rows of slots that do not use it stay as they are."""
        rows = self.uses[place.slots].nonzero().squeeze(1)
        if len(rows):
            logits[rows] = self._adjust(logits[rows], place.select(rows))

    def apply_all_(self, logits: Tensor, place: Place) -> None:
        """`apply_` without a look at the device: every row is computed, those that use it are changed."""
        adjusted = self._adjust(logits.clone(), place)
        torch.where(self.uses[place.slots].unsqueeze(1), adjusted, logits, out=logits)

    def _slots(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(self._max_num_seqs, *shape, dtype=dtype, device=self._device)

    def _ids(self, tokens: Iterable[int]) -> Tensor:
        """int64, only those of the vocabulary: an EOS id of a wider tokenizer cannot be drawn anyway."""
        return self._sent([token for token in tokens if 0 <= token < self._vocab_size])

    def _sent(self, values: Items[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """On the device, which is not waited for: a pass over prompts is launched behind what it does now."""
        return sent(torch.tensor(values, dtype=dtype), self._device)

    @abstractmethod
    def _allocate(self) -> None: ...

    @abstractmethod
    def _write(self, sequence: Sequence) -> None: ...

    def _emit(self, slots: Tensor, tokens: Tensor, counts: Tensor) -> None:  # noqa: B027
        """What depends on the output follows it; nothing does by default."""

    @abstractmethod
    def _adjust(self, logits: Tensor, place: Place) -> Tensor:
        """Adjusted logits [R, vocab] of rows that use it; may write to `logits`, which are a copy."""


class Penalties(Adjustment):
    """Repetition, frequency and presence penalty, in this order and with vLLM's meaning.

    Holds int32 counts of the output's tokens (int16 would wrap in a long repetitive output) and which
    tokens the prompt holds; 16 MB for 64 slots of 49,152 tokens.
    """

    @staticmethod
    def slot_bytes(vocab_size: int) -> int:
        return 5 * vocab_size + 3 * 4

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return sampling.penalizes

    def _allocate(self) -> None:
        self.in_output = self._slots(torch.int32, self._vocab_size)
        self.in_prompt = self._slots(torch.bool, self._vocab_size)
        self.presence = self._slots(torch.float32)
        self.frequency = self._slots(torch.float32)
        self.repetition = self._slots(torch.float32)

    def _write(self, sequence: Sequence) -> None:
        slot, sampling = sequence.slot, sequence.request.sampling
        self.presence[slot] = sampling.presence_penalty
        self.frequency[slot] = sampling.frequency_penalty
        self.repetition[slot] = sampling.repetition_penalty
        tokens = self._sent(sequence.token_ids)
        self.in_prompt[slot] = False
        self.in_prompt[slot, tokens[: sequence.num_prompt]] = True
        emitted = tokens[sequence.num_prompt :]
        self.in_output[slot].zero_().index_add_(0, emitted, torch.ones_like(emitted, dtype=torch.int32))

    def _emit(self, slots: Tensor, tokens: Tensor, counts: Tensor) -> None:
        emitted = torch.arange(tokens.shape[1], device=self._device) < counts.unsqueeze(1)
        # What was not emitted adds 0 to some entry, and may be any number.
        entry = slots.unsqueeze(1) * self._vocab_size + torch.where(emitted, tokens, 0)
        self.in_output.view(-1).scatter_add_(0, entry.flatten(), emitted.flatten().to(torch.int32))

    def _adjust(self, logits: Tensor, place: Place) -> Tensor:
        in_output = self.in_output[place.slots]
        counted = torch.ones_like(place.path, dtype=torch.int32)
        if place.drafted is not None:
            column = torch.arange(place.path.shape[1], device=self._device)
            counted = (column < place.drafted.unsqueeze(1)).int()
        in_output.scatter_add_(1, place.path, counted)
        seen = self.in_prompt[place.slots] | (in_output > 0)
        repetition = self.repetition[place.slots].unsqueeze(1)
        penalized = torch.where(logits > 0, logits / repetition, logits * repetition)
        # A penalty far from 1 must not make an infinity, of which softmax makes NaN.
        logits = torch.where(seen, penalized.clamp_(-_FLOAT_MAX, _FLOAT_MAX), logits)
        logits -= self.frequency[place.slots].unsqueeze(1) * in_output
        logits -= self.presence[place.slots].unsqueeze(1) * (in_output > 0)
        return logits


class LogitBias(Adjustment):
    """A number added to some logits."""

    @staticmethod
    def slot_bytes(vocab_size: int) -> int:
        return 4 * vocab_size

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return bool(sampling.logit_bias)

    def _allocate(self) -> None:
        self.bias = self._slots(torch.float32, self._vocab_size)

    def _write(self, sequence: Sequence) -> None:
        tokens, biases = zip(*sequence.request.sampling.logit_bias, strict=True)
        row = self.bias[sequence.slot].zero_()
        row.index_add_(
            0,
            self._sent(tokens),
            self._sent(biases, torch.float32),
        )

    def _adjust(self, logits: Tensor, place: Place) -> Tensor:
        return logits.add_(self.bias[place.slots])


class MinTokens(Adjustment):
    """No token ends the output before its time: EOS ids (also with ignore_eos, as in vLLM) and the
    request's stop ids."""

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device, *, eos_token_ids: Iterable[int]
    ) -> None:
        super().__init__(max_num_seqs, vocab_size, device)
        self._eos_token_ids = tuple(eos_token_ids)

    @staticmethod
    def slot_bytes(vocab_size: int) -> int:
        return vocab_size + 8

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return sampling.min_tokens > 0

    def _allocate(self) -> None:
        self.ends = self._slots(torch.bool, self._vocab_size)
        self.min_tokens = self._slots(torch.int64)

    def _write(self, sequence: Sequence) -> None:
        slot, sampling = sequence.slot, sequence.request.sampling
        self.min_tokens[slot] = sampling.min_tokens
        self.ends[slot] = False
        self.ends[slot, self._ids((*self._eos_token_ids, *sampling.stop_token_ids))] = True

    def _adjust(self, logits: Tensor, place: Place) -> Tensor:
        early = (place.position < self.min_tokens[place.slots]).unsqueeze(1)
        return logits.masked_fill_(early & self.ends[place.slots], float("-inf"))


class BadWords(Adjustment):
    """The last token of a sequence is forbidden where the others have just been emitted. As in vLLM, the
    prompt's tokens do not count."""

    @staticmethod
    def slot_bytes(vocab_size: int) -> int:  # noqa: ARG004 - the same for any vocabulary
        return 8 * (MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS + MAX_BAD_WORD_TOKENS - 1)

    @staticmethod
    def wanted(sampling: SamplingParams) -> bool:
        return bool(sampling.bad_words)

    def _allocate(self) -> None:
        self.words = self._slots(torch.int64, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)
        self.tail = self._slots(torch.int64, MAX_BAD_WORD_TOKENS - 1)

    def _write(self, sequence: Sequence) -> None:
        slot, words = sequence.slot, sequence.request.sampling.bad_words
        rows = [[ANY_TOKEN] * (MAX_BAD_WORD_TOKENS - len(word)) + list(word) for word in words]
        unused = [NO_TOKEN] * MAX_BAD_WORD_TOKENS
        rows += [unused] * (MAX_BAD_WORDS - len(rows))
        self.words[slot] = self._sent(rows)
        width = self.tail.shape[1]
        tail = ([NO_TOKEN] * width + sequence.token_ids[sequence.num_prompt :])[-width:]
        self.tail[slot] = self._sent(tail)

    def _emit(self, slots: Tensor, tokens: Tensor, counts: Tensor) -> None:
        width = self.tail.shape[1]
        columns = counts.unsqueeze(1) + torch.arange(width, device=self._device)
        self.tail[slots] = torch.cat([self.tail[slots], tokens], dim=1).gather(1, columns)

    def _adjust(self, logits: Tensor, place: Place) -> Tensor:
        width = self.tail.shape[1]
        before = torch.cat([self.tail[place.slots], place.path], dim=1)
        if place.drafted is None:
            before = before[:, -width:]
        else:
            before = before.gather(1, place.drafted.unsqueeze(1) + torch.arange(width, device=self._device))
        before = before.unsqueeze(1)
        words = self.words[place.slots]
        begun = ((words[..., :-1] == before) | (words[..., :-1] == ANY_TOKEN)).all(-1)
        last = words[..., -1]
        forbidden = begun & (last != NO_TOKEN)
        # amin, because several words may end in one token: forbidden by one is forbidden.
        ceiling = torch.where(forbidden, float("-inf"), float("inf"))
        return logits.scatter_reduce_(1, last.clamp(min=0), ceiling, "amin")


def table_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """What the tables of all adjustments take once each has been asked for."""
    kinds: tuple[type[Adjustment], ...] = (Penalties, LogitBias, MinTokens, BadWords)
    return max_num_seqs * sum(kind.slot_bytes(vocab_size) for kind in kinds)
