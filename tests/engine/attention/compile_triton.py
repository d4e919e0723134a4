"""Compile the attention kernels for GPUs that need not be there, as the backend would call them.

    python -m tests.engine.attention.compile_triton [--all] [CAPABILITY ...]

A line of JSON per kernel: registers, bytes spilled per thread (STACK), bytes of shared memory. Status 1 where
one spills. Run without TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from engine.attention import triton as module
from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, block_channels, candidates, others
from tests.engine.attention.triton_cases import Shape, Step, make_step
from tests.engine.triton_compile import compile_only, resources, use


def cases(every: bool) -> Iterator[tuple[Shape, Kind]]:
    """A tree and a node of one sequence, which are split, a chunk whose tiles are enough, one row; sinks."""
    bf16 = {"dtype": torch.bfloat16}
    tree = Shape((3000,), 64, tree=True, group=4, kv_heads=8, head_dim=128, rotary="whole", **bf16)
    yield tree, Kind(128, False)
    yield Shape((100,), 700, tree=False, group=1, kv_heads=32, head_dim=128, **bf16), Kind(128, True)
    yield replace(tree, size=1, group=3, kv_heads=3, head_dim=64), Kind(8, False)
    # Everything as small as it gets: one block, one row, one head of fewer channels than a product takes.
    yield Shape((3,), 1, tree=True, group=1, kv_heads=1, head_dim=8, rotary="whole", **bf16), Kind(8, False)
    sinking = replace(tree, size=1, group=8, head_dim=64, sinks=True)
    yield sinking, Kind(8, False)
    if not every:
        return
    yield replace(sinking, size=64, window=128), Kind(128, False)
    yield Shape((50,), 700, tree=False, group=8, kv_heads=8, sinks=True, **bf16), Kind(128, True)
    for head_dim in (64, 80, 96, 128, 256):
        for group, nodes in ((1, 1), (3, 9), (1, 64), (4, 64)):
            kind = Kind.of(nodes * group, tree=True)
            for rotary in ("whole", "norm"):
                yield (
                    replace(tree, size=nodes, group=group, kv_heads=2, head_dim=head_dim, rotary=rotary),
                    kind,
                )
        yield Shape((50,), 700, tree=False, group=4, kv_heads=8, head_dim=head_dim, **bf16), Kind(128, True)
    ragged = {"computed": (8, 3), "window": 64, "dtype": torch.float16}
    for rotary in ("", "part", "offset", "after"):
        yield Shape((300, 20), 8, tree=True, group=4, rotary=rotary, **ragged), Kind(32, False)
    exact = Shape((300,), 64, tree=True, group=4, head_dim=128, rotary="norm", dtype=torch.float32)
    yield exact, Kind(128, False)
    yield Shape((300,), 200, tree=False, group=4, head_dim=256, dtype=torch.float32), Kind(128, True)


def with_masks_off_a_boundary(step: Step) -> Step:
    """A tree whose masks and depths lie in the middle of a buffer, as those of captured steps do."""

    def moved(values: Tensor) -> Tensor:
        return torch.cat((values.new_zeros(1), values.flatten()))[1:].view(values.shape)

    batch = step.batch
    assert batch.ancestors is not None
    assert batch.depths is not None
    return replace(step, batch=replace(batch, ancestors=moved(batch.ancestors), depths=moved(batch.depths)))


def main() -> int:
    every = "--all" in sys.argv
    capabilities = [int(word) for word in sys.argv[1:] if word.isdigit()] or [90]
    compiled = compile_only(module.attend_kernel, module.join_kernel)
    worst = 0
    for capability in capabilities:
        use(capability)
        for shape, kind in cases(every):
            channels = block_channels(shape.head_dim)
            tiles = candidates(kind, channels, shape.dtype.itemsize)
            step = make_step(shape)
            tiles = tiles if every else tiles[:1]
            for one in list(tiles):
                tiles += others(kind, one, rotary=bool(shape.rotary))
            if shape.sinks and not every:
                tiles = tiles[-1:]  # the parts joined by the last program, which has most code behind them
            for tile in tiles:
                compiled.clear()
                attention = TritonAttention(shape.group, tiles={kind: tile}, processors=132, **step.options())
                attention.plan(step.batch, step.pool)
                planned = step if attention.rotates else replace(step, rotary=None)
                planned.attend(attention)
                if shape.tree:
                    with_masks_off_a_boundary(planned).attend(attention)
                for kernel in dict.fromkeys(compiled):
                    used = resources(kernel)
                    worst = max(worst, used["spilled"])
                    about = {"kernel": kernel.name, "shape": str(shape), "tile": list(tile)}
                    print(json.dumps({"capability": capability / 10, **about, **used}), flush=True)
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
