"""Compile the kernels between two products for GPUs that need not be there, as the decoder would call them.

    python -m tests.engine.model.compile_triton [CAPABILITY ...]

A line of JSON: how many were compiled for each compute capability (times ten), and those that spill registers
(bytes a thread). Run without TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engine.model import triton_kernels as kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

KERNELS = ("_add_norm_kernel", "_rotate_kernel", "_gated_kernel", "_quantize_kernel", "_scale_kernel")


def use(capability: int) -> None:
    """Let Triton compile for a GPU of compute capability `capability` / 10, and launch nothing."""
    fake: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda _: 0,
    )
    driver.set_active(fake)


def spilled(kernel: Any) -> int:
    """Bytes of registers that each thread keeps in memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1])


def call_all(dtype: torch.dtype, hidden: int, fp8: bool) -> None:
    """Every kernel in every form that a family asks for."""

    def some(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    x, weight = some(4, hidden), some(hidden)
    kernels.rms_norm(x, weight, 1e-5)
    for after, before, offset in ((None, weight, False), (weight, None, False), (weight, weight, True)):
        kernels.add_norm(x, x, after=after, before=before, eps=1e-5, offset=offset, residual_scale=0.5)
    for head_dim, rotated in ((64, 64), (128, 128), (96, 48), (256, 256)):
        qk = some(4, 11, head_dim)
        kernels.rotate(qk, some(4, 1, rotated), some(4, 1, rotated))
        if rotated == head_dim:
            kernels.rotate(
                qk, some(4, 1, rotated), some(4, 1, rotated), norm=some(11 * head_dim), offset=True
            )
    for activation in ("silu", "gelu_tanh"):
        kernels.gated_activation(some(4, 2 * 3 * hidden), activation)
    for kind in (torch.int8, torch.float8_e4m3fn) if fp8 else (torch.int8,):
        kernels.quantize_rows(x, kind, 32)
        kernels.quantize_rows(some(4, 3 * hidden), kind)
    sums, scale = torch.empty(4, hidden, dtype=torch.int32), torch.empty(max(4, hidden))
    for bias in (None, weight):
        kernels.scale_sums(sums, scale[:4].view(4, 1), scale[:hidden].view(1, -1), bias, dtype)


def main() -> int:
    compiled: list[tuple[str, Any]] = []

    def note(name: str, run: Any, *args: object, **options: object) -> None:
        compiled.append((name, run(*args, **{**options, "warmup": True})))

    for name in KERNELS:
        kernel = getattr(kernels, name)
        kernel.run = partial(note, name, kernel.run)
    found: dict[str, Any] = {"compiled": {}, "spilled": {}}
    for capability in [int(word) for word in sys.argv[1:]] or [90]:
        use(capability)
        compiled.clear()
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for hidden in (576, 4096):
                call_all(dtype, hidden, fp8=capability >= 89)
        found["compiled"][capability] = len(compiled)
        for name, kernel in compiled:
            if num_bytes := spilled(kernel):
                found["spilled"][f"{name} {capability}"] = num_bytes
    print(json.dumps(found))
    return 1 if found["spilled"] else 0


if __name__ == "__main__":
    sys.exit(main())
