"""Triton kernels compiled for GPUs that need not be there, by processes where Triton does not interpret."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from engine import triton_dependent

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def use(capability: int) -> None:
    """Let Triton compile for a GPU of compute capability `capability` / 10, and launch nothing."""
    fake: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(fake)
    early = capability >= 90
    launched = early, {"launch_pdl": True} if early else {}
    triton_dependent._launched_early = lambda index: launched  # type: ignore[assignment]


def compile_only(*kernels: Any) -> list[Any]:
    """From here on a launch of these kernels compiles them; the list grows by what that gives."""
    compiled: list[Any] = []

    def note(run: Any, *args: object, **options: object) -> None:
        compiled.append(run(*args, **{**options, "warmup": True}))

    for kernel in kernels:
        kernel.run = partial(note, kernel.run)
    return compiled


def resources(kernel: Any) -> dict[str, int]:
    """Registers, and bytes of them that each thread keeps in memory; bytes of shared memory."""
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
