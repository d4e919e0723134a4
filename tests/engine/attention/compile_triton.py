"""Compile the attention kernels for GPUs that need not be there, as the backend would call them.

    python -m tests.engine.attention.compile_triton [--all] [CAPABILITY ...]

A line of JSON per kernel: registers, bytes spilled per thread (STACK), bytes of shared memory. Status 1 where
one spills. Run without TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engine.attention import triton as module
from engine.attention.triton import TritonAttention
from engine.attention.triton_tiles import Kind, candidates
from tests.engine.attention.triton_cases import Shape, make_step

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def use(capability: int) -> None:
    """Let Triton compile for a GPU of compute capability `capability` / 10, and launch nothing."""
    fake: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(fake)


def resources(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "shared": kernel.metadata.shared,
    }


def cases(every: bool) -> Iterator[tuple[Shape, Kind]]:
    """A tree of one sequence, which is split, and a chunk whose tiles are enough."""
    bf16 = {"dtype": torch.bfloat16}
    yield Shape((3000,), 64, tree=True, group=4, kv_heads=8, head_dim=128, **bf16), Kind(128, False)
    yield Shape((100,), 700, tree=False, group=1, kv_heads=32, head_dim=128, **bf16), Kind(128, True)
    if not every:
        return
    for head_dim in (64, 80, 96, 128, 256):
        for group, nodes in ((1, 1), (3, 9), (1, 64), (4, 64)):
            kind = Kind.of(nodes * group, tree=True)
            yield Shape((3000,), nodes, tree=True, group=group, head_dim=head_dim, **bf16), kind
        yield Shape((50,), 700, tree=False, group=4, kv_heads=8, head_dim=head_dim, **bf16), Kind(128, True)
    ragged = {"computed": (8, 3), "window": 64, "dtype": torch.float16}
    yield Shape((300, 20), 8, tree=True, group=4, **ragged), Kind(32, False)
    yield Shape((300,), 64, tree=True, group=4, head_dim=128, dtype=torch.float32), Kind(128, False)
    yield Shape((300,), 200, tree=False, group=4, head_dim=256, dtype=torch.float32), Kind(128, True)


def main() -> int:
    every = "--all" in sys.argv
    capabilities = [int(word) for word in sys.argv[1:] if word.isdigit()] or [90]
    compiled: list[Any] = []

    def note(run: Any, *args: object, **options: object) -> None:
        compiled.append(run(*args, **{**options, "warmup": True}))

    for kernel in (module.attend_kernel, module.join_kernel):
        kernel.run = partial(note, kernel.run)
    worst = 0
    for capability in capabilities:
        use(capability)
        for shape, kind in cases(every):
            channels = triton.next_power_of_2(shape.head_dim)
            tiles = candidates(kind, channels, shape.dtype.itemsize)
            step = make_step(shape)
            for tile in tiles if every else tiles[:1]:
                compiled.clear()
                step.attend(
                    TritonAttention(shape.group, tiles={kind: tile}, processors=132, **step.options())
                )
                for kernel in compiled:
                    used = resources(kernel)
                    worst = max(worst, used["spilled"])
                    print(
                        json.dumps(
                            {
                                "capability": capability / 10,
                                "kernel": kernel.name,
                                "shape": str(shape),
                                "tile": list(tile),
                                **used,
                            }
                        ),
                        flush=True,
                    )
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
