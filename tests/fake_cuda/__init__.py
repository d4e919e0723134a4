"""A CUDA device made of the CPU, so that code for a GPU runs where there is none.

Tensors on it hold numbers and say that they are on cuda:0. What CUDA refuses is refused: operators over two
devices, numpy of its memory, pinning it, a generator of the CPU, and in a captured step whatever waits for
the device or copies from it. A graph repeats its operators, not its code. There is one stream, and time on
it is the CPU's; how much memory a GPU has left is made up.

    FAKE_CUDA=torch PYTHONPATH=tests/fake_cuda/site:. python -m …

It says that it is too old for Triton (compute capability 7.5), so all is torch's operators. With
`FAKE_CUDA=compile` it is 9.0, in an environment with Triton, whose kernels are compiled wherever they are
launched, and not run. Numbers mean nothing then, but a kernel that does not compile is found, and one that
gets a tensor of the CPU.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["environment"]


def environment(mode: str = "torch") -> dict[str, str]:
    """Of a process in which there is such a device, and of all that it starts."""
    here = Path(__file__).parent
    paths = [str(here / "site"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "FAKE_CUDA": mode, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
