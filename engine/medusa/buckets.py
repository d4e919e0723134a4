"""The shapes that captured steps come in."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

__all__ = ["Buckets"]


@dataclass(frozen=True, slots=True)
class Buckets:
    """Steps of B sequences with N nodes each, wherever B * N is within the bound.

    Args:
        batches: the values of B, rising.
        nodes: the values of N, rising.
        max_rows: bound on B * N.
    """

    batches: tuple[int, ...]
    nodes: tuple[int, ...]
    max_rows: int

    @classmethod
    def default(cls, *, max_num_seqs: int, tree_size: int, max_rows: int) -> Self:
        """Powers of two up to the most sequences and the largest tree, and these themselves."""

        def powers(most: int) -> tuple[int, ...]:
            return (*(1 << i for i in range(most.bit_length()) if 1 << i < most), most)

        return cls(powers(max_num_seqs), powers(tree_size), max_rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every (B, N), the largest first: smaller graphs then fit into the memory of larger ones."""
        pairs = [(b, n) for b in self.batches for n in self.nodes if b * n <= self.max_rows]
        return iter(sorted(pairs, key=lambda pair: pair[0] * pair[1], reverse=True))

    def find(self, batch: int, nodes: int) -> tuple[int, int] | None:
        """The smallest that holds so many sequences and nodes; None where there is none."""
        found = self.batch(batch), _at_least(nodes, self.nodes)
        return found if found[0] and found[1] and found[0] * found[1] <= self.max_rows else None

    def batch(self, batch: int) -> int:
        """The smallest B for so many sequences; 0 where there is none."""
        return _at_least(batch, self.batches)

    def most_nodes(self, batch: int) -> int:
        """The largest tree that so many sequences can have; 1 where there is no bucket at all."""
        bound = self.max_rows // (self.batch(batch) or self.max_rows)
        return max((n for n in self.nodes if n <= bound), default=1)

    def rows(self, batch: int, largest: int) -> float:
        """B * N of the bucket for trees of up to `largest` nodes; beyond any bound where there is none."""
        return float(self.batch(batch) * _at_least(largest, self.nodes)) or 1e9


def _at_least(least: int, rising: tuple[int, ...]) -> int:
    """The first that is no less; 0 where there is none."""
    index = bisect_left(rising, least)
    return rising[index] if index < len(rising) else 0
