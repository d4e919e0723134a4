"""A CUDA device made of the CPU, so that code for a GPU runs where there is none.

Tensors on it hold numbers and say that they are on cuda:0. What CUDA refuses is refused: operators over two
devices, numpy of its memory, pinning it, a generator of the CPU, and in a captured step whatever waits for
the device or copies from it. A graph repeats its operators and kernels, not its code; what it made and nobody
holds is garbage behind it, and what it uses has to be held. There is one stream, and time on it is the CPU's;
how much memory a GPU has left is made up.

The host knows that the device has ended something when it has waited for it, and never before: till then a
copy that is not waited for has left garbage in its pinned memory, or needs what it comes from unchanged, and
an event tells no time (`tests.fake_cuda.queue`; `QUEUE.waits` lists where the host waited for everything).

    FAKE_CUDA=torch PYTHONPATH=tests/fake_cuda/site:. python -m …

It says that it is too old for Triton (compute capability 7.5), so all is torch's operators. In an environment
with Triton it can be of 9.0: with `FAKE_CUDA=interpret` kernels are run by Triton's interpreter, so that a
GPU's steps give numbers, slowly; with `FAKE_CUDA=compile` they are compiled wherever they are launched, and
not run. Numbers mean nothing then, but a kernel that does not compile is found, and one that gets a tensor of
the CPU.
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
