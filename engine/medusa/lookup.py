"""The lookup branch: what a sequence has said, and what it is expected to say, drafts what it says next.

Summaries, edits, retrieval and loops repeat their own history. The tokens up to the root are matched
against it, and what followed the best match becomes a chain under the root, in the same tree as the
heads' nodes. It needs no training and no heads. (Prompt lookup decoding, Saxena 2023, as a tree branch.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.devices import sent, sent_together, slot_rows
from engine.types import Sequence

__all__ = ["CONTEXT", "FORCED", "MOST_MATCHED", "NOBODY", "NUM_KINDS", "Lookup", "Proposal"]

MOST_MATCHED = 8
"""Tokens of context compared; a longer match is a better guess, and past eight it no longer tells more."""

CONTEXT = 2
"""Prompt tokens put before a prediction, so that its own first tokens have something to match."""

FORCED = 2 * MOST_MATCHED + 1
"""The kind of a chain that no match gave: a grammar leaves nothing else."""

NUM_KINDS = FORCED + 1
"""Kinds: 0 matches nothing, 1 to 8 as many tokens of the history, 9 to 16 of the prediction, 17 is forced."""

NOBODY: Mapping[int, int] = {}
"""No row has a prediction."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A chain for each of B sequences: tokens [B, D] int64, count [B] int64 of them, kind [B] int64."""

    tokens: Tensor
    count: Tensor
    kind: Tensor


class Lookup:
    """The token history of every slot, [slots, max_tokens] int32, and the search in it.

    Args:
        size: D, most tokens of a chain.
        max_num_seqs: slots.
        max_tokens: longest history: of the longest sequence with its tree behind it.
        device: where the history lives.
    """

    def __init__(self, *, size: int, max_num_seqs: int, max_tokens: int, device: torch.device) -> None:
        self.size = size
        self._device = device
        self.history = torch.zeros(max_num_seqs, max_tokens, dtype=torch.int32, device=device)
        self.prediction: Tensor | None = None
        self._prompts = slot_rows(2, max_num_seqs, torch.int64, device)
        self.num_prompt, self.prediction_length = self._prompts.unbind()
        self.tokens = torch.zeros(max_num_seqs, size, dtype=torch.int64, device=device)
        """[slots, D]: the chain proposed for each slot's next step."""

    def admit(self, sequences: Items[Sequence]) -> None:
        """Write the sequences' tokens so far, and their predictions, to their slots."""
        slots = np.array([sequence.slot for sequence in sequences])
        counts = np.array([len(sequence.token_ids) for sequence in sequences])
        first = slots * self.history.shape[1] - (np.cumsum(counts) - counts)
        tokens = [token for sequence in sequences for token in sequence.token_ids]
        lengths = []
        for sequence in sequences:
            context = sequence.request.prompt_token_ids[-CONTEXT:]
            expected = sequence.request.prediction_token_ids[: self.history.shape[1] - len(context)]
            lengths.append((sequence.num_prompt, len(expected) + len(context) if expected else 0))
            if expected:
                self.allocate_predictions()
                assert self.prediction is not None
                row = sent(torch.tensor((*context, *expected), dtype=torch.int32), self._device)
                self.prediction[sequence.slot, : len(row)] = row
        place, written, index, table = sent_together(
            np.arange(counts.sum()) + np.repeat(first, counts),
            np.array(tokens, dtype=np.int32),
            slots,
            np.array(lengths).T,
            device=self._device,
        )
        self.history.view(-1).index_copy_(0, place, written)
        self._prompts.index_copy_(1, index, table)

    def allocate_predictions(self) -> None:
        """Make the table of predictions now, [slots, max_tokens] int32; it is made once."""
        if self.prediction is None:
            self.prediction = torch.zeros_like(self.history)

    @property
    def longest_prediction(self) -> int:
        """Tokens that a prediction is cut to."""
        return self.history.shape[1] - CONTEXT

    def append(self, slots: Tensor, lengths: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Write the first counts [B] of tokens [B, K] to index lengths [B] and on of their histories."""
        offset = torch.arange(tokens.shape[1], device=self._device)
        offset = torch.minimum(offset, counts.unsqueeze(1) - 1)  # past the end: the last token once more
        self.history[slots.unsqueeze(1), lengths.unsqueeze(1) + offset] = tokens.gather(1, offset).int()

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
        """`append` behind the roots at `lengths` [B], and `propose` from the last of these tokens.

        Args:
            slots, tokens, counts: as for `append`.
            max_length: host upper bound of lengths + counts.
            predicted: as for `propose`.
        """
        self.append(slots, lengths + 1, tokens, counts)
        return self.propose(slots, lengths + counts, max_length=max_length, predicted=predicted)

    def propose(
        self, slots: Tensor, lengths: Tensor, *, max_length: int, predicted: Mapping[int, int] = NOBODY
    ) -> Proposal:
        """Search what followed the tokens up to the root the last time, and keep it for the next step.

        The longest match of up to eight tokens wins, then the latest. A chain that reaches the root goes
        on as if the text repeated from the match, as it does in a loop.

        Args:
            slots: [B] int64.
            lengths: [B] int64, index of the root in the history.
            max_length: host upper bound of `lengths`.
            predicted: for each row with a prediction, how many tokens that has; no other is searched.
        """
        history = self.history[slots, : max_length + 1]
        suffix = self._suffix(history, lengths)
        order = _match_order(history, suffix)
        place = torch.arange(history.shape[1], device=self._device)
        order = torch.where(place < lengths.unsqueeze(1), order, 0)
        best = (order * (max_length + 1) + place).argmax(1, keepdim=True)
        kind = order.gather(1, best)
        step = torch.arange(self.size, device=self._device)
        # From the match on, and round again from it where the root is reached.
        index = best + 1 + step % (lengths.unsqueeze(1) - best).clamp(min=1)
        tokens = history.gather(1, index.clamp(max=max_length)).long()
        count = torch.where(kind > 0, self.size, 0)
        if len(predicted) == len(slots) and self.prediction is not None:
            expected = self.prediction[slots, : max(predicted.values()) + CONTEXT]
            found = (tokens, count, kind)
            tokens, count, kind = self._prefer_prediction(slots, lengths, expected, suffix, *found)
        elif predicted and self.prediction is not None:
            rows = torch.tensor(list(predicted), device=self._device)
            expected = self.prediction[slots[rows], : max(predicted.values()) + CONTEXT]
            found = (tokens[rows], count[rows], kind[rows])
            preferred = self._prefer_prediction(slots[rows], lengths[rows], expected, suffix[rows], *found)
            tokens[rows], count[rows], kind[rows] = preferred
        self.tokens[slots] = tokens
        return Proposal(tokens, count.squeeze(1), kind.squeeze(1))

    def _prefer_prediction(
        self,
        slots: Tensor,
        lengths: Tensor,
        expected: Tensor,
        suffix: Tensor,
        tokens: Tensor,
        count: Tensor,
        kind: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the chain from the prediction where its match is as good: it is there to be followed."""
        length = self.prediction_length[slots].unsqueeze(1)
        order = _match_order(expected, suffix)
        place = torch.arange(expected.shape[1], device=self._device)
        order = torch.where(place < length - 1, order, 0)
        # Of equally long matches the one nearest to where the output stands: an edit moves text little.
        here = lengths.unsqueeze(1) - self.num_prompt[slots].unsqueeze(1) + CONTEXT
        best = (order * 2 * expected.shape[1] - (place - here).abs()).argmax(1, keepdim=True)
        found = order.gather(1, best)
        index = best + 1 + torch.arange(self.size, device=self._device)
        follows = expected.gather(1, index.clamp(max=expected.shape[1] - 1)).long()
        take = (found >= 2) & (found >= kind.clamp(max=3))
        return (
            torch.where(take, follows, tokens),
            torch.where(take, (length - 1 - best).clamp(0, self.size), count),
            torch.where(take, found + MOST_MATCHED, kind),
        )

    def _suffix(self, history: Tensor, lengths: Tensor) -> Tensor:
        """[B, 8] int32, the tokens up to the root, root first; -1 before the history begins."""
        back = lengths.unsqueeze(1) - torch.arange(MOST_MATCHED, device=self._device)
        return torch.where(back >= 0, history.gather(1, back.clamp(min=0)), -1)


def _match_order(text: Tensor, suffix: Tensor) -> Tensor:
    """[B, W] int64: how many tokens of `suffix` [B, 8] match backwards from each place of `text` [B, W]."""
    running = text == suffix[:, :1]
    order = running.long()
    for back in range(1, MOST_MATCHED):
        shifted = torch.zeros_like(running)
        shifted[:, back:] = text[:, :-back] == suffix[:, back : back + 1]
        running = running & shifted
        order += running
    return order
