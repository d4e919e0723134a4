"""What one optimizer step learns from, addressed by (epoch, step) so that a resumed run sees the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ConfigError
from training.backbone import Backbone, packs
from training.data import Row
from training.hidden import Batch, HiddenCache, top_tokens
from training.resident import ResidentCache

__all__ = ["CachedBatches", "OnlineBatches", "ResidentBatches", "Source"]

_Cache = TypeVar("_Cache", HiddenCache, ResidentCache)
_Order = TypeVar("_Order")


class Source(Protocol):
    """Steps of an epoch; each a few batches whose gradients add up."""

    steps_per_epoch: int

    def step(self, epoch: int, index: int) -> Iterator[Batch]: ...


def _with_a_next(
    cache: HiddenCache | ResidentCache, chosen: NDArray[np.bool_], batch_tokens: int, out_of_time: int
) -> NDArray[np.int64]:
    """Positions in the chosen rows to learn from, rising.

    Raises:
        ConfigError: fewer than one batch.
    """
    place = np.arange(len(cache))
    # The last token of an answer has no next one: not even the first head has a target.
    found = place[chosen[cache.row_of] & (cache.ends - place > 1)]
    if len(found) < batch_tokens:
        if out_of_time:
            raise ConfigError(
                "the time was too short: half of it goes to hidden states, of held-out rows first, and "
                f"{out_of_time} rows are left out; that leaves {len(found)} training positions and a batch "
                f"takes {batch_tokens}; raise --minutes" + (", or lower --batch-tokens" if len(found) else "")
            )
        raise ConfigError(
            f"the data holds {len(found)} training positions and a batch takes {batch_tokens}; "
            "distill more, or lower --batch-tokens"
        )
    return found


class _DrawnBatches(ABC, Generic[_Cache, _Order]):
    """Single positions drawn from a cache in random order, each once an epoch.

    Args:
        cache: all hidden states.
        chosen: [rows] bool, the rows to train on.
        num_heads: heads.
        batch_tokens: positions of a step.
        micro_tokens: positions that are computed together.
        seed: of the order.
        teacher: with the model's own best tokens.
        out_of_time: rows that the cache lacks because the time for hidden states was over.

    Raises:
        ConfigError: fewer positions than one batch.
    """

    def __init__(
        self,
        cache: _Cache,
        chosen: NDArray[np.bool_],
        *,
        num_heads: int,
        batch_tokens: int,
        micro_tokens: int,
        seed: int,
        teacher: bool,
        out_of_time: int = 0,
    ) -> None:
        self._cache: _Cache = cache
        self._num_heads, self._seed, self._teacher = num_heads, seed, teacher
        self._batch, self._micro = batch_tokens, micro_tokens
        self._positions = _with_a_next(cache, chosen, batch_tokens, out_of_time)
        self.steps_per_epoch = len(self._positions) // batch_tokens
        self._order = lru_cache(maxsize=1)(self._shuffled)

    @abstractmethod
    def _shuffled(self, epoch: int) -> _Order:
        """All positions in the order of an epoch."""


class CachedBatches(_DrawnBatches[HiddenCache, NDArray[np.int64]]):
    """Batches from a cache on disk."""

    def step(self, epoch: int, index: int) -> Iterator[Batch]:
        chosen = self._order(epoch)[index * self._batch : (index + 1) * self._batch]
        for start in range(0, len(chosen), self._micro):
            # Rising positions read the memory map forwards.
            part = np.sort(chosen[start : start + self._micro])
            yield self._cache.gather(part, self._num_heads, self._teacher)

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._positions)


class ResidentBatches(_DrawnBatches[ResidentCache, Tensor]):
    """Batches on the device: neither the order nor the batches pass the CPU, and nothing waits."""

    def step(self, epoch: int, index: int) -> Iterator[Batch]:
        chosen = self._order(epoch)[index * self._batch : (index + 1) * self._batch]
        for part in torch.split(chosen, self._micro):
            yield self._cache.gather_there(part, self._num_heads, self._teacher)

    def _shuffled(self, epoch: int) -> Tensor:
        seed = int(np.random.default_rng([self._seed, epoch]).integers(1 << 62))
        generator = torch.Generator(self._cache.device).manual_seed(seed)
        order = torch.randperm(len(self._positions), generator=generator, device=self._cache.device)
        return torch.from_numpy(self._positions).to(self._cache.device)[order]


class OnlineBatches:
    """Whole sequences through the backbone at every step, packed: for a GPU and a large model.

    Args:
        backbone: the frozen model.
        rows: the sequences to train on.
        lm_head: [vocab, hidden] on the backbone's device, for the teacher; None without.
        num_heads: heads.
        batch_tokens: tokens of a step, prompts counted.
        micro_tokens: tokens of a pass.
        seed: of the order.
    """

    def __init__(
        self,
        backbone: Backbone,
        rows: Sequence[Row],
        *,
        lm_head: Tensor | None,
        num_heads: int,
        batch_tokens: int,
        micro_tokens: int,
        seed: int,
    ) -> None:
        self._backbone, self._rows, self._lm_head = backbone, rows, lm_head
        self._num_heads, self._seed, self._micro = num_heads, seed, micro_tokens
        self._accumulate = max(1, batch_tokens // micro_tokens)
        self._packs = lru_cache(maxsize=1)(self._packed)
        # Packs differ in number from epoch to epoch by their order; what all epochs have is used.
        total = sum(len(row.prompt) + len(row.answer) for row in rows)
        self.steps_per_epoch = total // (self._accumulate * micro_tokens)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"the data holds {total} tokens and a batch takes {self._accumulate * micro_tokens}; "
                "distill more, or lower --batch-tokens"
            )

    def step(self, epoch: int, index: int) -> Iterator[Batch]:
        for pack in self._packs(epoch)[index * self._accumulate : (index + 1) * self._accumulate]:
            yield self._batch([self._rows[i] for i in pack])

    def _packed(self, epoch: int) -> list[list[int]]:
        """At least steps_per_epoch * accumulate packs: full ones could not be fewer."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows)).tolist()
        lengths = [len(self._rows[i].prompt) + len(self._rows[i].answer) for i in order]
        return [[order[i] for i in pack] for pack in packs(lengths, self._micro)]

    def _batch(self, rows: Sequence[Row]) -> Batch:
        device = self._backbone.device
        states = self._backbone.hidden([np.concatenate((row.prompt, row.answer)).tolist() for row in rows])
        places: list[int] = []
        tokens: list[int] = []
        ends: list[int] = []
        offset = 0
        for row in rows:
            offset += len(row.prompt)
            places += range(offset - 1, offset - 1 + len(row.answer))
            tokens += row.answer.tolist()
            ends += [len(tokens)] * len(row.answer)
            offset += len(row.answer)
        hidden = states[torch.tensor(places, device=device)]
        drawn = torch.tensor(tokens, device=device)
        position = torch.arange(len(tokens), device=device)
        ahead = position + 1 + torch.arange(self._num_heads, device=device)[:, None]
        known = ahead < torch.tensor(ends, device=device)
        ahead = torch.where(known, ahead, 0)
        targets = torch.where(known, drawn[ahead], -1)
        if self._lm_head is None:
            return Batch(hidden.clone(), drawn, targets, None, None)
        ids, log_p = top_tokens(hidden, self._lm_head)
        return Batch(hidden.clone(), drawn, targets, ids[ahead], log_p[ahead])
