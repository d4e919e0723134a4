"""Two kernels have to agree on how many parts each row's keys came in: at edges of windows, and at random.

What no part was written to is NaN (`Step.attend`), so one that is read shows, as one does that is left out.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, Tile
from tests.engine.attention.triton_cases import Shape, check, make_step

pytestmark = pytest.mark.cuda

TILE = Tile(32, 16, 4, 2, least_keys=16)


def check_parts(shape: Shape, tile: Tile, *, processors: int = 132, seed: int = 0, more: int = 0) -> int:
    """How many parts there were room for; `more`: what the bound on lengths is above them."""
    step = make_step(shape, seed)
    step.batch = replace(step.batch, max_length=step.batch.max_length + more)
    kind = Kind.of(shape.size * shape.group, tree=shape.tree)
    attention = TritonAttention(shape.group, tiles={kind: tile}, processors=processors, **step.options())
    check(step, attention)
    assert attention._plan is not None
    return max(attention._plan.parts.values())


@pytest.mark.parametrize(
    "shape",
    [
        # Of the second tile's rows alone a window would begin later: the chunk's do, the tree's do not.
        Shape((100,), 33, tree=True, window=40, group=1),
        Shape((100,), 40, tree=False, window=50, group=2),
        Shape((100, 33), 40, tree=False, window=50, group=3, computed=(40, 17)),
        Shape((64, 100), 12, tree=True, window=60, group=8, computed=(3, 12)),
        # The window ends within the chunk, so that later tiles have no cached keys at all.
        Shape((90,), 60, tree=False, window=20, group=2),
    ],
    ids=str,
)
def test_rows_of_all_tiles_of_a_tree_and_of_one_of_a_chunk_have_the_same_parts(shape: Shape) -> None:
    for joins in (False, True):
        assert check_parts(replace(shape, head_dim=16, kv_heads=1), TILE._replace(joins=joins)) > 2


@pytest.mark.parametrize("seed", range(16))
def test_parts_at_random(seed: int) -> None:
    """Lengths around the edges of tiles, windows, ragged batches, sequences without rows."""
    draw = random.Random(seed)
    group = draw.choice((1, 2, 3, 8))
    size = draw.choice((1, 3, 9) if group == 8 else (1, 2, 5, 9, 17, 33))
    lengths = tuple(
        draw.choice((0, 1, 15, 16, 17, 31, 33, 47, 64, 65, 90, 100)) for _ in range(draw.randint(1, 3))
    )
    computed = tuple(draw.choice((0, 1, size, draw.randint(0, size))) for _ in lengths)
    shape = Shape(
        lengths,
        size,
        tree=draw.random() < 0.5,
        computed=computed if any(computed) and draw.random() < 0.5 else None,
        kv_heads=draw.choice((1, 2)),
        group=group,
        head_dim=16,
        block_size=draw.choice((4, 16)),
        window=draw.choice((None, None, 1, 5, 16, 40, 70)),
        sinks=seed % 3 == 0,
    )
    tile = TILE._replace(
        rows=draw.choice((16, 32)), joins=draw.random() < 0.2, least_keys=draw.choice((16, 32, 40))
    )
    processors, more = draw.choice((9, 40, 132)), draw.choice((0, 50, 3000))
    check_parts(shape, tile, processors=processors, seed=seed, more=more)
