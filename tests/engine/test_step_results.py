from __future__ import annotations

import random

import pytest
import torch

from engine.step_results import Results, StepRow

DEPTH = 3


def results(rows: list[list[int]]) -> Results:
    return Results(torch.tensor(rows), DEPTH, started=0.0, begun=None)


def test_each_row_is_read_as_far_as_it_goes() -> None:
    # Finite, length, last, nodes; depth + 1 tokens; kind, count, chain.
    packed = [
        [1, 2, 5, 0b100111, 11, 12, 13, 99, 4, 2, 21, 22],
        [1, 0, 0, 0b1, 31, 99, 99, 99, 0, 0, 99, 99],
        [0, 1, 1, 0b11, 41, 42, 99, 99, 9, 1, 51, 99],
    ]
    assert results(packed).rows() == [
        StepRow(True, 2, 5, 0b100111, [11, 12, 13], [21, 22], 4),
        StepRow(True, 0, 0, 0b1, [31], [], 0),
        StepRow(False, 1, 1, 0b11, [41, 42], [51], 9),
    ]


@pytest.mark.parametrize("lookup", [[], [0, 0, 99, 99]])
def test_plain_decoding_without_chains(lookup: list[int]) -> None:
    packed = [[1, 0, 0, 1, token, 99, 99, 99, *lookup] for token in (7, 8)]
    assert results(packed).rows() == [StepRow(True, 0, 0, 1, [token], [], 0) for token in (7, 8)]


@pytest.mark.parametrize("lookup", [0, 4])
def test_many_rows_are_read_as_few_are(lookup: int) -> None:
    rng = random.Random(lookup)
    packed = [
        [
            *(rng.randrange(2), rng.randrange(DEPTH + 1), rng.randrange(9), rng.getrandbits(62)),
            *(rng.randrange(99) for _ in range(DEPTH + 1)),
            *((rng.randrange(9), rng.randrange(lookup + 1)) if lookup else ()),
            *(rng.randrange(99) for _ in range(lookup)),
        ]
        for _ in range(24)
    ]
    one_by_one = [row for each in packed for row in results([each]).rows()]
    assert results(packed).rows() == one_by_one
    assert {type(row) for row in results(packed).rows()} == {StepRow}
    assert {type(row.sound) for row in one_by_one + results(packed).rows()} == {bool}
    # All of one length, too, and none with a chain.
    alike = [[1, 1, *row[2:8], *([0, 0] if lookup else []), *row[10:]] for row in packed]
    assert results(alike).rows() == [row for each in alike for row in results([each]).rows()]
