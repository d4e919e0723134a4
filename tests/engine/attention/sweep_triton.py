"""What test_triton.py checks on many more shapes, and the kernels' machine code; run by `make kernels`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest
import torch

from tests.engine.attention.triton_cases import DEVICE, ERROR, Shape, check, compile_kernels, make_step

pytest.importorskip("triton")

from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, candidates

DTYPES = (torch.float32, torch.float16) if DEVICE.type == "cpu" else tuple(ERROR)


def shapes() -> Iterator[Shape]:
    """Every new size with every group and head dim; the rest is drawn, the same each time."""
    draw = random.Random(0)
    for nodes in (1, 2, 8, 33, 64):
        for group in (1, 3, 4, 8):
            for head_dim in (64, 80, 96, 128, 256):
                for tree in (True, False):
                    lengths = tuple(draw.choice((0, 1, 15, 128, 129, 260, 400)) for _ in range(2))
                    size = nodes if tree else draw.choice((nodes, 70))
                    large = size * group > 100  # the interpreter takes a minute for a few thousand rows
                    lengths = lengths if tree and not large else lengths[:1]
                    counts = tuple(draw.randint(1, size) for _ in lengths)
                    yield Shape(
                        lengths,
                        size,
                        tree,
                        computed=counts if tree and draw.random() < 0.4 else None,
                        kv_heads=1 if large else draw.choice((1, 2)),
                        group=group,
                        head_dim=head_dim,
                        block_size=draw.choice((1, 8, 16, 32, 128, 256)),
                        window=draw.choice((None, None, 7, 90, 300)),
                        rotary=draw.choice(("", "whole", "part", "norm", "offset", "after")) if tree else "",
                        dtype=draw.choice(DTYPES),
                        sinks=draw.random() < 0.3,
                    )


@pytest.mark.parametrize("shape", list(shapes()), ids=str)
def test_shapes(shape: Shape) -> None:
    step = make_step(shape)
    kind = Kind.of(shape.size * shape.group, tree=shape.tree)
    for tile in candidates(kind, 128, shape.dtype.itemsize)[: None if DEVICE.type == "cuda" else 1]:
        check(
            make_step(shape),
            TritonAttention(shape.group, tiles={kind: tile}, processors=16, **step.options()),
        )


@pytest.mark.parametrize(("capability", "most"), [(80, 384), (90, 64)])
def test_every_candidate_compiles(capability: int, most: int) -> None:
    """Bytes that a thread spills at most: a few on Hopper, before and behind the loops, more on Ampere."""
    output = compile_kernels("--all", str(capability))
    kernels = [json.loads(line) for line in output.splitlines()]
    assert len(kernels) > 60
    exact = 384  # float32 is for tests
    spilling = [k for k in kernels if k["spilled"] > (most if "float16" in k["shape"] else exact)]
    assert spilling == []
