"""What measuring Triton kernels on a device takes: compiling many at once, and keeping the results."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.testing
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from engine.limits import cpus

__all__ = ["REFUSALS", "Kept", "milliseconds_in_graph", "side_by_side"]

log = logging.getLogger(__name__)

REFUSALS = (OutOfResources, PTXASError, CompilationError)
"""Of a kernel that does not fit a device."""


def side_by_side(
    ways: Iterable[Callable[[], object]], here: Callable[[], AbstractContextManager[object]]
) -> None:
    """Run each once, as many at a time as there are cores; those that the device refuses are left out.

    Nearly all of a kernel's first run is its compilation, most of which runs without Python's lock.

    Args:
        here: what each thread enters.
    """

    def once(way: Callable[[], object]) -> None:
        with here(), suppress(*REFUSALS):
            way()

    with ThreadPoolExecutor(cpus()) as pool:
        list(pool.map(once, ways))


def milliseconds_in_graph(run: Callable[[], object]) -> float:
    """Of a run on the current CUDA device, with the gaps between kernels that a captured step has.

    Triton runs it on a stream of its own, which waits for nothing that is still being made on the caller's.
    """
    torch.cuda.synchronize()
    found: float = triton.testing.do_bench_cudagraph(run, rep=10, return_mode="median")
    return found


class Kept:
    """A file of measured results, named by a hash of whatever they depend on.

    Args:
        folder: made if there is none. One that cannot be written is only logged.
        name: what was measured.
        key: beside the device, the versions and the kernels' source.
        device: of the measurement.
        modules: with the kernels.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        key: dict[str, object],
        device: torch.device,
        modules: Sequence[ModuleType],
    ) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._key = {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "kernels": hashlib.sha256(b"".join(map(_source, modules))).hexdigest(),
            **key,
        }
        digest = hashlib.sha256(json.dumps(self._key).encode()).hexdigest()[:16]
        self._name, self._file = name, folder / f"{name}-{digest}.json"

    def read(self) -> Any:
        """The results as they were written; None: there are none, or they are not ours."""
        try:
            return json.loads(self._file.read_text(encoding="utf-8"))["measured"]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, measured: Any) -> None:
        """Keep what JSON can hold; engines that start together write whole files."""
        text = json.dumps({**self._key, "measured": measured}, indent=1)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._file.parent, delete=False, encoding="utf-8"
            ) as partial:
                partial.write(text)
            os.replace(partial.name, self._file)
        except OSError as error:
            log.warning("%s is measured anew at each start: %s", self._name, error)


def _source(module: ModuleType) -> bytes:
    return Path(str(module.__file__)).read_bytes()
