"""What is known of the sequence in each slot, in arrays that compiled code reads and writes.

For each of many sequences, Python's objects take longer than all that is computed of them.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import MAX_TREE_NODES
from engine.types import Sequence

__all__ = ["Seated", "Seats"]

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


class Seated(NamedTuple):
    """Of S slots; chains of up to D tokens.

    Args:
        caps: [S] int64, most nodes that the request allows, root counted.
        kinds: [S] int64, of the lookup chain's match; see `LookupState`.
        lengths: [S] int64, tokens of the chain.
        chains: [S, D] int64, the tokens.
        shifts: [S] log-odds by which the next token of this sequence's chains is right more often than the
            average of all.
        own: [S, 2] tokens of the heads' drafts that came true, and that should have.
    """

    caps: Counts
    kinds: Counts
    lengths: Counts
    chains: Counts
    shifts: Array
    own: Array


class Seats:
    """Who sits in each slot, and what is known of them.

    Args:
        chain: D, most tokens of a lookup chain.
    """

    def __init__(self, chain: int) -> None:
        self.known = Seated(
            caps=np.zeros(1, dtype=np.int64),
            kinds=np.zeros(1, dtype=np.int64),
            lengths=np.zeros(1, dtype=np.int64),
            chains=np.zeros((1, chain), dtype=np.int64),
            shifts=np.zeros(1),
            own=np.zeros((1, 2)),
        )
        """Its arrays are others when a slot is seen that is higher than all before."""
        self._whose = np.array([-1])
        self._last: tuple[list[int], list[Sequence]] = [], []
        self._slots = self._whose

    def seat(self, sequences: list[Sequence]) -> Counts:
        """[B] int64: their slots. Of one that is new in its slot, nothing is known.

        Mostly they are those of the last step, in the same slots.
        """
        where = [sequence.slot for sequence in sequences]
        if where != self._last[0] or sequences != self._last[1]:
            self._last, self._slots = (where, sequences), np.array(where)
            self._grow(max(where))
            arrivals = [sequence.arrival for sequence in sequences]
            for b in np.flatnonzero(self._whose[self._slots] != arrivals):
                self._sit(sequences[b])
        return self._slots

    def propose(self, sequence: Sequence) -> None:
        """Its chain is that of its `lookup` from here on."""
        self._grow(slot := sequence.slot)
        if self._whose[slot] != sequence.arrival:
            self._sit(sequence)
        known, lookup = self.known, sequence.lookup
        chain: SequenceOf[int] = lookup.chain[: known.chains.shape[1]]
        known.kinds[slot], known.lengths[slot] = lookup.kind, len(chain)
        known.chains[slot, : len(chain)] = chain

    def _sit(self, sequence: Sequence) -> None:
        slot, most = sequence.slot, sequence.request.medusa.max_tree_size
        self._whose[slot] = sequence.arrival
        for values in self.known:
            values[slot] = 0
        self.known.caps[slot] = MAX_TREE_NODES if most is None else most

    def _grow(self, slot: int) -> None:
        if (missing := slot + 1 - len(self._whose)) > 0:
            self._whose = np.append(self._whose, np.full(missing, -1))
            longer = (np.pad(each, [(0, missing)] + [(0, 0)] * (each.ndim - 1)) for each in self.known)
            self.known = Seated._make(longer)
