"""The shapes that captured passes over prompts come in, and what such a pass is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engine.scheduler import Chunk

__all__ = ["PromptBucket", "PromptBuckets"]

_FEWEST_TOKENS = 16

_ALIGNED = 2
"""Integers of 16 bytes."""

_SEVERAL = 8
"""Chunks of the bucket between one and all: what arrives in the time of a few steps."""


@dataclass(frozen=True, slots=True)
class PromptBucket:
    """Passes over C chunks of T tokens in all, filled up by sequences of a spare slot.

    Args:
        chunks: C.
        tokens: T.
        longest: most tokens of a chunk.
        fillers: sequences behind the chunks' which fill the tokens up.
    """

    chunks: int
    tokens: int
    longest: int
    fillers: int

    @property
    def sequences(self) -> int:
        """C, and those that fill it up."""
        return self.chunks + self.fillers

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Lengths of what `inputs` gives, each rounded up to where kernels may load many bytes at once."""
        sequences, tokens = (-(-count // _ALIGNED) * _ALIGNED for count in (self.sequences, self.tokens))
        return sequences, sequences, tokens, tokens

    def inputs(self, chunks: Sequence[Chunk], spare: int) -> NDArray[np.int64]:
        """What differs from pass to pass.

        Args:
            chunks: at most C, of at most T tokens in all.
            spare: slot of what fills the pass up.

        Returns:
            Slots [sequences], where their chunks begin [sequences], `AttentionInput.index` [T] and tokens
            [T], one after the other in `parts`.
        """
        slots = np.full(self.sequences, spare)
        starts, sizes = np.zeros((2, self.sequences), dtype=np.int64)
        slots[: len(chunks)] = [chunk.sequence.slot for chunk in chunks]
        starts[: len(chunks)] = [chunk.start for chunk in chunks]
        sizes[: len(chunks)] = [chunk.size for chunk in chunks]
        missing = self.tokens - int(sizes.sum())
        filled = np.arange(self.fillers) * self.longest
        sizes[self.chunks :] = (missing - filled).clip(0, self.longest)
        first = np.arange(self.sequences) * self.longest - (np.cumsum(sizes) - sizes)
        index = np.arange(self.tokens) + np.repeat(first, sizes)
        tokens = [token for chunk in chunks for token in chunk.sequence.token_ids[chunk.start : chunk.end]]
        found = np.zeros(sum(self.parts), dtype=np.int64)
        for at, values in zip(
            accumulate(self.parts, initial=0), (slots, starts, index, tokens), strict=False
        ):
            found[at : at + len(values)] = values
        return found


@dataclass(frozen=True, slots=True)
class PromptBuckets:
    """Passes over at most so many chunks with at most so many tokens.

    Args:
        chunks: the values of C, rising.
        tokens: the values of T, rising.
        longest: most tokens of a sequence.
    """

    chunks: tuple[int, ...]
    tokens: tuple[int, ...]
    longest: int

    @classmethod
    def default(cls, batches: Sequence[int], *, max_tokens: int, longest: int) -> Self:
        """One chunk, several and the most; powers of two of tokens, and halfway between from 128 on.

        Args:
            batches: of `Buckets`; a bucket of chunks has the size of one of them. Without, there are none.
            max_tokens: bound on the tokens of a pass.
            longest: most tokens of a sequence.
        """
        if not batches:
            return cls((), (), longest)
        chunks = {batches[0], next((b for b in batches if b >= _SEVERAL), batches[-1]), batches[-1]}
        sizes = {_FEWEST_TOKENS << i for i in range(max_tokens.bit_length())}
        sizes |= {size + size // 2 for size in sizes if size >= 128}
        tokens = sorted(size for size in sizes if size < max_tokens)
        return cls(tuple(sorted(chunks)), (*tokens, max_tokens), longest)

    def up_to(self, tokens: int) -> Self:
        """Those of at most so many tokens; none of any size where none are so small."""
        kept = tuple(t for t in self.tokens if t <= tokens)
        return type(self)(self.chunks if kept else (), kept, self.longest)

    def all(self) -> list[PromptBucket]:
        """Every bucket that `find` may give, the largest first: smaller graphs fit into their memory."""
        found = [
            self._bucket(i, j)
            for i in range(len(self.chunks))
            for j in range(len(self.tokens))
            if i == 0 or self.tokens[j] > self.chunks[i - 1]
        ]
        return sorted(found, key=lambda bucket: (bucket.tokens, bucket.chunks), reverse=True)

    def find(self, chunks: int, tokens: int) -> PromptBucket | None:
        """The smallest for so many chunks and tokens; None where there is none."""
        i = next((i for i, most in enumerate(self.chunks) if chunks <= most), None)
        j = next((j for j, most in enumerate(self.tokens) if tokens <= most), None)
        return None if i is None or j is None else self._bucket(i, j)

    def _bucket(self, i: int, j: int) -> PromptBucket:
        tokens = self.tokens[j]
        longest = min(tokens, self.longest)
        return PromptBucket(self.chunks[i], tokens, longest, -(-tokens // longest))
