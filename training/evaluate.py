"""How good heads are on text they have not seen: ranks of the right tokens, and replayed decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.medusa.bigram import Bigram, candidates
from engine.medusa.tree import Tree
from training.hidden import HiddenCache
from training.objective import CHUNK_BYTES
from training.resident import ResidentCache

__all__ = ["MISS", "NONE", "Ranks", "accepted_lengths", "rank_targets", "replay", "visits"]

MISS = 32767
"""Rank of a token that the heads' vocabulary does not hold."""

NONE = -1
"""Rank where the answer has ended."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where the tokens that came stood among each head's guesses.

    Args:
        ranks: [N, heads] int16 from 0; MISS or NONE.
        ends: [N] int64, one past the last position of each one's answer.
        losses: per head, mean cross-entropy where the token is in the vocabulary.
    """

    ranks: NDArray[np.int16]
    ends: NDArray[np.int64]
    losses: list[float]

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def num_heads(self) -> int:
        return int(self.ranks.shape[1])

    def top(self, count: int) -> list[float]:
        """Share of tokens among each head's `count` best guesses."""
        known = self.ranks != NONE
        right = known & (self.ranks < count)
        found: list[float] = (right.sum(0) / np.maximum(1, known.sum(0))).tolist()
        return found

    def part(self, answers: range, of: int) -> Ranks:
        """The answers whose number modulo `of` lies in `answers`."""
        number = np.unique(self.ends, return_inverse=True)[1]
        keep = np.isin(number % of, list(answers))
        # Ends move with what is left out before them.
        kept = np.concatenate(([0], keep.cumsum()))
        return Ranks(self.ranks[keep], kept[self.ends[keep]], self.losses)


@torch.inference_mode()
def rank_targets(
    logits_of: Callable[[Tensor], Tensor],
    cache: HiddenCache | ResidentCache,
    chosen: NDArray[np.bool_],
    rows: Tensor,
    *,
    num_heads: int,
    vocabulary: int,
    dtype: torch.dtype,
    limit: int | None = None,
    bigram: Bigram | None = None,
) -> Ranks:
    """Ranks of the answers of the chosen rows.

    Args:
        logits_of: the heads: hidden states [T, hidden] to logits [heads, T, vocabulary].
        cache: hidden states and tokens.
        chosen: [rows] bool.
        rows: [vocab] int64 on the heads' device, each token's column in the logits or -1.
        num_heads: heads.
        vocabulary: columns of the logits.
        dtype: of the hidden states that the heads take.
        limit: most positions; whole answers are left out beyond it.
        bigram: brings each head's `CANDIDATES` best into another order, as in serving; on the heads' device.
    """
    positions = np.flatnonzero(chosen[cache.row_of])
    if limit is not None and len(positions) > limit:
        # The last answer that ends within the limit; at least one.
        last = positions[limit]
        within = cache.ends[positions] <= last
        positions = (
            positions[within]
            if within.any()
            else positions[cache.ends[positions] == cache.ends[positions[0]]]
        )
    found, summed = [], torch.zeros(2, num_heads, device=rows.device)
    known = (rows >= 0).nonzero().squeeze(1)
    token_of = torch.zeros(vocabulary, dtype=torch.int64, device=rows.device)
    token_of[rows[known]] = known
    step = max(16, CHUNK_BYTES[rows.device.type] // (4 * vocabulary * num_heads))
    for start in range(0, len(positions), step):
        batch = cache.gather(positions[start : start + step], num_heads, teacher=False)
        targets = batch.targets.to(rows.device)
        mapped = torch.where(targets >= 0, rows[targets.clamp(min=0)], -1)
        logits = logits_of(batch.hidden.to(rows.device, dtype)).float()
        right = logits.gather(2, mapped.clamp(min=0).unsqueeze(2))
        if bigram is None:
            rank = (logits > right).sum(2).clamp(max=MISS - 1)
        else:
            rank = _reordered(logits, targets, batch.previous.to(rows.device), token_of, bigram)
        rank = torch.where(targets < 0, NONE, torch.where(mapped < 0, MISS, rank))
        found.append(rank.T.to(torch.int16).cpu())
        loss = torch.where(mapped >= 0, logits.logsumexp(2) - right.squeeze(2), 0.0)
        summed += torch.stack((loss.sum(1), (mapped >= 0).sum(1).float()))
    ranks = torch.cat(found).numpy() if found else np.zeros((0, num_heads), dtype=np.int16)
    # Ends counted within what was ranked.
    shift = np.searchsorted(positions, cache.ends[positions])
    return Ranks(ranks, shift.astype(np.int64), (summed[0] / summed[1].clamp(min=1)).tolist())


def _reordered(logits: Tensor, right: Tensor, previous: Tensor, token_of: Tensor, bigram: Bigram) -> Tensor:
    """[heads, T] int64: ranks of the tokens `right` [heads, T] behind tokens `previous` [heads, T]."""
    tokens, values = candidates(logits, token_of)
    worth = bigram(previous.reshape(-1, 1), tokens.flatten(0, 1)).view_as(values)
    scores = values + bigram.weights.view(-1, 1, 1) * worth
    own = tokens == right.unsqueeze(2)
    least = scores.masked_fill(~own, -torch.inf).amax(2, keepdim=True)
    return torch.where(own.any(2), (scores > least).sum(2), MISS)


def accepted_lengths(ranks: NDArray[np.int16], tree: Tree) -> NDArray[np.int64]:
    """[N]: nodes of `tree` below the root that come true at each position."""
    depth = np.zeros(len(ranks), dtype=np.int64)
    matched: dict[tuple[int, ...], NDArray[np.bool_]] = {(): np.ones(len(ranks), dtype=bool)}
    for path in tree.paths:
        at = len(path) - 1
        matched[path] = matched[path[:-1]] & (ranks[:, at] == path[-1])
        depth[matched[path]] = at + 1  # parents come first, and siblings exclude each other
    return depth


def replay(ranks: Ranks, trees: Sequence[Tree]) -> list[float]:
    """Acceptance length, root counted, of decoding these answers with each tree, without a server.

    As in serving, the token at an answer's first position comes from prefill; then each step emits the
    accepted nodes and one more token.
    """
    lengths = []
    for tree in trees:
        steps = _walk(ranks, accepted_lengths(ranks.ranks, tree), 0)
        # Every position but an answer's first is emitted by some step.
        tokens = len(ranks) - len(np.unique(ranks.ends))
        lengths.append(tokens / max(1, int(steps.sum())))
    return lengths


def visits(ranks: Ranks, tree: Tree, starts: int = 8) -> NDArray[np.int64]:
    """[N]: how often decoding with `tree` stands at each position, over `starts` walks of each answer.

    Decoding steps over what it guesses right, so it stands more often where text is hard to guess: the
    average over all positions promises too much. A walk from each of the first positions, since one alone
    would visit half of them.
    """
    accepted = accepted_lengths(ranks.ranks, tree)
    found = np.zeros(len(ranks), dtype=np.int64)
    for start in range(starts):
        found += _walk(ranks, accepted, start)
    return found


def _walk(ranks: Ranks, accepted: NDArray[np.int64], start: int) -> NDArray[np.int64]:
    """[N] 0 or 1: the positions where steps of decoding stand, from the start-th token of each answer on."""
    stands = np.zeros(len(ranks), dtype=np.int64)
    first = np.flatnonzero(np.diff(ranks.ends, prepend=-1))
    position, end = first + start, ranks.ends[first]  # of all answers at once
    # The state at a position chose its token, which is the root; the step emits what follows it.
    while (going := position < end - 1).any():
        position, end = position[going], end[going]
        stands[position] = 1
        position = position + 1 + accepted[position]
    return stands
