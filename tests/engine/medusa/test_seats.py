"""What is known of the sequence in each slot: in arrays, beside what the sequences themselves say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engine.config import MAX_TREE_NODES
from engine.medusa.adaptive import AdaptiveTree
from engine.medusa.records import HeadRecord
from engine.medusa.seats import Seats
from engine.types import Sequence, SequenceState
from tests import support
from tests.engine.conftest import TinyModel
from tests.engine.medusa.by_hand import HEADS, observe, packed, sequence
from tests.engine.medusa.test_beside import OneGuess
from tests.engine.test_constrained import regex
from tests.support import greedy, make_engine


def chain_of(seats: Seats, slot: int) -> tuple[list[int], int]:
    """The chain and the kind of its match."""
    known = seats.known
    return known.chains[slot, : known.lengths[slot]].tolist(), int(known.kinds[slot])


def test_of_one_that_is_new_in_its_slot_nothing_is_known() -> None:
    seats = Seats(4)
    first, others = sequence(0, cap=5), [sequence(3), sequence(1)]
    first.lookup.chain, first.lookup.kind = [7, 8, 9, 7, 8], 6
    seats.propose(first)
    assert seats.seat([first, *others]).tolist() == [0, 3, 1]
    assert seats.known.caps[[0, 3, 1]].tolist() == [5, MAX_TREE_NODES, MAX_TREE_NODES]
    assert (chain_of(seats, 0), chain_of(seats, 3)) == (([7, 8, 9, 7], 6), ([], 0))
    seats.known.shifts[:], seats.known.own[:] = 2.0, 3.0
    new = sequence(3)
    new.arrival = 50
    for again in range(2):  # whose slots they are already, keep what is known
        assert seats.seat([others[1], first, new]).tolist() == [1, 0, 3]
        assert seats.known.shifts[[1, 0, 3]].tolist() == [2.0, 2.0, 0.0], again
        assert seats.known.own[3].tolist() == [0.0, 0.0]
    assert chain_of(seats, 0) == ([7, 8, 9, 7], 6)
    new.lookup.chain, new.lookup.kind = [1], 9
    seats.known.shifts[3] = 1.0
    seats.propose(new)  # another chain of the same one's
    assert (chain_of(seats, 3), seats.known.shifts[3]) == (([1], 9), 1.0)


def test_a_row_that_is_not_sound_teaches_nothing() -> None:
    world = OneGuess(0.0, 0.0005)
    chooser, made = world.chooser, world.stream
    world.run(20)
    made.lookup.chain, made.lookup.kind = [1], 1
    chooser.propose(made)
    chooser.choose([made])
    assert (made.head_nodes, made.lookup_nodes) == (1, 1)
    assert chooser._heads is not None
    before = chooser._lookup.odds.copy(), chooser._heads.reach().copy()
    for sound in (0, 1):
        values, depth = packed([0b111], [[1, 5]], [([3], 2)])
        values[0, 0] = sound
        chooser._count(np.array([0]), np.array([[1, 1]]), values, depth)
        unchanged = (chooser._lookup.odds == before[0]).all(), (chooser._heads.reach() == before[1]).all()
        assert unchanged == (not sound, not sound)
    assert chain_of(chooser._seats, 0) == ([3], 2)


def test_the_last_of_64_nodes_is_a_masks_sign() -> None:
    record, seats, node = HeadRecord(HEADS), Seats(0), HEADS.size - 1
    slots, before = seats.seat([sequence()]), HeadRecord(HEADS)
    mask, at = 1, node
    while at:
        mask |= 1 << at
        at = HEADS.parents[at]
    values, depth = packed([1], [[0] * (1 + len(HEADS.paths[node - 1]))])
    values[0, 3] = mask - (1 << 64)
    assert (node, values[0, 3] < 0) == (63, True)
    record.observe(seats.known, slots, np.array([[node, 0]]), values)
    assert seats.known.own[0, 0] == depth
    assert record._hits[node - 1] > before._hits[node - 1]


@pytest.mark.parametrize("mode", ["eager", "ahead", "captured"])
def test_the_arrays_and_the_sequences_say_the_same(
    narrow: TinyModel, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through prompts, grammars' own chains, ends, slots that go from one to the next, and preemptions."""
    monkeypatch.setitem(support.MODE, "ahead", mode != "eager")
    monkeypatch.setitem(support.MODE, "captured", mode == "captured")
    engine = make_engine(
        narrow.folder, heads=str(narrow.heads), max_num_seqs=5, max_model_len=60, kv_cache_tokens=124
    )
    chooser = engine._chooser
    assert isinstance(chooser, AdaptiveTree)
    assert engine.info.lookup
    judged: list[int] = []
    count = chooser._count

    def counted(slots: np.ndarray, *rest: object) -> int:
        judged.append(int(chooser._seats.known.lengths[slots].max()))
        return count(slots, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(chooser, "_count", counted)
    for i in range(9):
        asked = greedy(f"r{i}", [i, 2, 3, i, 2], 42 + i)
        engine.add(replace(asked, grammar=regex("([a-c]hgfed){9}")) if i % 3 == 0 else asked)
    chains, grammars = 0, 0
    while engine.has_work:
        engine.step()
        for each in engine._scheduler.running:
            if each.state is not SequenceState.DECODE or each.num_output == 0:
                continue
            assert chooser._seats._whose[each.slot] == each.arrival
            assert chain_of(chooser._seats, each.slot) == (each.lookup.chain, each.lookup.kind)
            chains += bool(each.lookup.chain)
            grammars += each.lookup.forced
    assert chains > 20
    assert grammars > 2
    assert max(judged) > 2
    assert engine.stats.preemptions
    engine.check()


@pytest.mark.parametrize("known", ["caps", "arrival"])
def test_a_step_is_judged_by_what_it_was_and_whose(known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody got less behind the choice: what was not verified is not thought to have failed."""
    world = OneGuess(0.0, 0.0005)
    chooser, made = world.chooser, world.stream
    world.run(20)
    chooser.choose([made])
    assert made.head_nodes == 1
    seen: list[list[list[int]]] = []
    count: Callable[..., int] = chooser._count

    def counted(slots: np.ndarray, nodes: np.ndarray, *rest: object) -> int:
        seen.append([slots.tolist(), *nodes.tolist()])
        return count(slots, nodes, *rest)

    monkeypatch.setattr(chooser, "_count", counted)
    later: Sequence = sequence(2)
    sequences = [made] if known == "caps" else [made, later]
    for each in sequences:
        each.head_nodes = each.lookup_nodes = 0
    later.head_nodes, cells = 1, len(sequences) - 1  # the one's node is the other's empty cell
    took: list[tuple[object, ...]] = []
    monkeypatch.setattr(chooser._times, "observe", lambda *step: took.append(step))
    observe(chooser, sequences, [0b1] * len(sequences), 0.02)
    rows = float(len(sequences) + cells)
    assert took == [(len(sequences), 50, rows, 0.02, chooser.expected.draft_s, cells)]
    assert seen == [[[0], [0, 0]] if known == "caps" else [[0, 2], [0, 0], [1, 0]]]
