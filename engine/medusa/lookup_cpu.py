"""The lookup branch's part of a decode step on the CPU: one compiled pass over the slots' memory (numba).

torch's operators for it are about fifty, and each is slow to call where the model's weights have just gone
through the cache. A graph records them and nothing else, so captured steps keep to `Lookup` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numba import boolean, int32, int64, njit
from torch import Tensor

from engine.cpu_team import JIT, integers
from engine.medusa.lookup import CONTEXT, MOST_MATCHED, NOBODY, Lookup, Proposal

__all__ = ["CpuLookup"]

# The kernel takes microseconds; to get the interpreter's lock back may take as long as another thread likes.
_JIT: dict[str, Any] = {**JIT, "nogil": False}


@njit(**_JIT)
def _matched(text: Any, place: int, history: Any, length: int) -> int:
    """How many tokens of `text` backwards from `place` are those of `history` from the root at `length`."""
    order = 0
    most = min(MOST_MATCHED, place + 1, length + 1)
    while order < most and text[place - order] == history[length - order]:
        order += 1
    return order


@njit(**_JIT)
def _fits(history: Any, slots: Any, lengths: Any, counts: Any, most: int, max_length: int) -> bool:
    """Every row has a slot, tokens to write, and a place for them."""
    if slots.size > len(history) or max_length >= history.shape[1]:
        return False
    for b in range(slots.size):
        end = lengths[b] + counts[b]
        inside = 0 <= slots[b] < len(history) and 0 <= lengths[b] < end <= max_length and counts[b] <= most
        if not inside:
            return False
    return True


# The slots' tables, numbers, and addresses of what comes with each step: arrays take long to hand over.
@njit(
    boolean(
        *(int32[:, ::1], int32[:, ::1], int64[::1], int64[::1], int64[:, ::1]),
        *(int64, int64, int64, int64, int64, int64, int64),
        *(boolean[::1], int64),
        *(int64[:, ::1], int64[::1], int64[::1]),
    ),
    **_JIT,
)
def _advance(
    history: Any,
    prediction: Any,
    prediction_length: Any,
    num_prompt: Any,
    kept: Any,
    rows: int,
    slots_at: int,
    lengths_at: int,
    tokens_at: int,
    most: int,
    counts_at: int,
    max_length: int,
    searched: Any,
    width: int,
    chains: Any,
    count: Any,
    kind: Any,
) -> bool:
    """See `Lookup.advance`.

    Args:
        kept: `Lookup.tokens`; the other tables bear the names they have there.
        rows: B; at the addresses lie slots [B], lengths [B], tokens [B, most] and counts [B], int64.
        searched: [B], whether the row has a prediction; [0] where none has.
        width: tokens of `prediction` that are looked at.
        chains, count, kind: what is returned, in their first rows.

    Returns:
        False, and nothing is written, where a row would be outside of the tables.
    """
    slots, lengths = integers(slots_at, (rows,)), integers(lengths_at, (rows,))
    tokens, counts = integers(tokens_at, (rows, most)), integers(counts_at, (rows,))
    if not _fits(history, slots, lengths, counts, most, max_length):
        return False
    size = kept.shape[1]
    for b in range(rows):
        slot, length = slots[b], lengths[b] + counts[b]
        text = history[slot]
        for k in range(counts[b]):
            text[lengths[b] + 1 + k] = tokens[b, k]
        # Backwards, so that of equal matches the latest is kept.
        order, best = 0, max_length
        for place in range(length - 1, -1, -1):
            if text[place] == text[length]:
                found = _matched(text, place, text, length)
                if found > order:
                    order, best = found, place
                    if order == MOST_MATCHED:
                        break
        kind[b], count[b] = order, size if order else 0
        index = best
        for d in range(size):
            # From the match on, and round again from it where the root is reached.
            index = index + 1 if index < length else best + 1
            chains[b, d] = text[min(index, max_length)]
        if searched.size and searched[b]:
            expected, end = prediction[slot], prediction_length[slot] - 1
            # Of equally long matches the one nearest to where the output stands, then the first.
            here = length - num_prompt[slot] + CONTEXT
            order, best = 0, 0
            for place in range(min(end, width)):
                if expected[place] == text[length]:
                    found = _matched(expected, place, text, length)
                    if found > order or (found == order and abs(place - here) < abs(best - here)):
                        order, best = found, place
            if order >= 2 and order >= min(kind[b], 3):
                kind[b], count[b] = order + MOST_MATCHED, max(0, min(end - best, size))
                for d in range(size):
                    chains[b, d] = expected[min(best + 1 + d, width - 1)]
        for d in range(size):
            kept[slot, d] = chains[b, d]
    return True


class CpuLookup(Lookup):
    """`Lookup` whose `advance` is a kernel, compiled when this module is imported; the results are the same.

    Args: see `Lookup`.
    """

    def __init__(self, *, size: int, max_num_seqs: int, max_tokens: int, device: torch.device) -> None:
        super().__init__(size=size, max_num_seqs=max_num_seqs, max_tokens=max_tokens, device=device)
        self._histories = self.history.numpy()
        self._predictions = np.zeros((0, 0), dtype=np.int32)
        self._tables = self.prediction_length.numpy(), self.num_prompt.numpy(), self.tokens.numpy()
        self._nobody = np.zeros(0, dtype=np.bool_)
        chains, count, kind = torch.zeros_like(self.tokens), *torch.zeros(2, max_num_seqs, dtype=torch.int64)
        self._results = chains.numpy(), count.numpy(), kind.numpy()
        self._proposals = [Proposal(chains[:b], count[:b], kind[:b]) for b in range(max_num_seqs + 1)]
        """By the number of rows: to make tensors would take longer than to fill them."""

    def allocate_predictions(self) -> None:
        """See `Lookup.allocate_predictions`."""
        super().allocate_predictions()
        assert self.prediction is not None
        self._predictions = self.prediction.numpy()

    def advance(
        self,
        slots: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        counts: Tensor,
        *,
        max_length: int,
        predicted: Mapping[int, int] = NOBODY,
    ) -> Proposal:
        """See `Lookup.advance`. What it returns is overwritten by the next call.

        Raises:
            IndexError: a row's slot, length or tokens are outside of the history.
        """
        width, searched = 0, self._nobody
        if predicted and self.prediction is not None:
            width = min(max(predicted.values()) + CONTEXT, self._predictions.shape[1])
            searched = np.zeros(len(slots), dtype=np.bool_)
            searched[list(predicted)] = True
        slots, lengths = slots.contiguous(), lengths.contiguous()
        tokens, counts = tokens.contiguous(), counts.contiguous()
        fits = _advance(
            self._histories,
            self._predictions,
            *self._tables,
            len(slots),
            slots.data_ptr(),
            lengths.data_ptr(),
            tokens.data_ptr(),
            tokens.shape[1],
            counts.data_ptr(),
            max_length,
            searched,
            width,
            *self._results,
        )
        if not fits:
            raise IndexError("a sequence's tokens are outside of the lookup's history")
        return self._proposals[len(slots)]
