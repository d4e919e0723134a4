"""An engine whose device computes nothing and takes a set time, to see what the host costs beside a fast one.

    python -m benchmarks.http_cost --step-ms 7 --token-us 25 --streams 64 -- --max-num-seqs 64 --dtype float32
    python -m benchmarks.simulated_device 7 25 1 serve smollm2-135m --port 8011

The host does all it does for captured steps that are launched ahead: it schedules, fills the graphs' inputs,
reads results, makes text and events of them. What it launches ends without work at a time on the device's own
clock: a decode step after `step_s`, a pass over prompts after `token_s` for each of its tokens and not before
`step_s`, since it reads the weights too, each after what was launched before. A pass holds as many tokens as
on a GPU. Text is one token over and over, `accepted` + 1 times a step.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import engine.child
import engine.llm
import engine.loop
import engine.process
from engine.batch import Batch, Verified
from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import Bucket, CapturedRunner
from engine.loader import Loaded
from engine.process import EngineProcess
from engine.runners import make_chooser
from engine.scheduler import Chunk
from engine.step_results import PromptResults, Results, StepRow

__all__ = ["OPTIONS", "SimulatedDevice", "SimulatedEngine", "install"]

OPTIONS = ["--max-prefill-tokens", str(EngineConfig(model="").prefill_tokens("cuda"))]
"""What `serve` would choose by itself on a GPU."""

_TOKEN = 1000
"""What every step emits, where the vocabulary has it."""


@dataclass
class SimulatedDevice:
    """The clock.

    Args:
        step_s: seconds of a decode step, and the least of a pass over prompts.
        token_s: seconds of each token of a pass over prompts.
        accepted: nodes accepted in each step, the root not counted; the tree must have them.
        chains: every so many-th sequence has a lookup chain behind a step, others behind the next; 0: none
            ever has. Of each chain the first token comes true.
        said_s: of decode steps what is told to who chooses the trees: seconds of a step, and of each of its
            rows. None: what they take.
    """

    step_s: float
    token_s: float = 0.0
    accepted: int = 0
    chains: int = 0
    said_s: tuple[float, float] | None = None
    _free: float = 0.0

    def launch(self, seconds: float) -> float:
        """The `time.perf_counter()` at which work launched now ends."""
        self._free = max(self._free, time.perf_counter()) + seconds
        return self._free

    def told(self, rows: int) -> float:
        """What it is said that a step of so many rows takes."""
        return self.step_s if self.said_s is None else self.said_s[0] + self.said_s[1] * rows

    def rest(self) -> None:
        """Drop what was launched."""
        self._free = 0.0


def _wait(end: float) -> None:
    if (left := end - time.perf_counter()) > 0:
        time.sleep(left)  # as a wait for the device, it lets other threads run


class _Late(Results):
    """Results that are there when the device has made them.

    Args:
        made: these results.
        end: when they are there, see `SimulatedDevice.launch`.
        seconds: what they took, as it is told.
    """

    def __init__(self, made: Results, end: float, seconds: float) -> None:
        self._made, self._end, self._takes, self.depth = made, end, seconds, made.depth

    @property
    def seconds(self) -> float:
        return self._takes

    def wait(self) -> None:
        _wait(self._end)

    def values(self) -> NDArray[np.int64]:
        self.wait()
        return self._made.values()

    def rows(self) -> list[StepRow]:
        self.wait()
        return self._made.rows()


class _NoGraph:
    def capture(self, run: Callable[[], None]) -> None:
        """Nothing is recorded."""

    def replay(self) -> None:
        """Nothing is done."""


class SimulatedEngine(Engine):
    """An engine on a simulated device; of the model only the tokenizer and the sizes matter.

    Args:
        loaded: on the CPU.
        device: the clock.

    Raises:
        ValueError: no tree has as many nodes as shall be accepted.
    """

    def __init__(self, loaded: Loaded, *, device: SimulatedDevice) -> None:
        if device.accepted >= loaded.info.tree_size:
            raise ValueError(
                f"{device.accepted} nodes cannot be accepted of a tree of {loaded.info.tree_size}"
            )
        super().__init__(loaded, ahead=True, graph=_NoGraph)
        runner = self._runner
        assert isinstance(runner, CapturedRunner)
        token = min(_TOKEN, loaded.info.vocab_size - 1)

        second_half, turns = runner.targets_accept_compact, count()

        @cache
        def packed(rows: int, depth: int, emitted: int, turn: int) -> Tensor:
            """What a step gives; nobody writes to it."""
            width = 5 + depth + (2 + loaded.info.lookup if loaded.info.lookup else 0)
            found = torch.zeros(rows, width, dtype=torch.int64)
            found[:, 0] = 1  # finite
            found[:, 1:3] = emitted - 1
            found[:, 3] = (1 << emitted) - 1
            found[:, 4 : 4 + emitted] = token
            if device.chains and loaded.info.lookup:
                chain = [2, loaded.info.lookup, token, *[token - 1] * (loaded.info.lookup - 1)]
                found[turn :: device.chains, 5 + depth :] = torch.tensor(chain)
            return found

        left = cache(runner._packed_rows)  # where a step of a bucket leaves what it gives

        def prompts(chunks: list[Chunk]) -> PromptResults:
            runner._admit([chunk.sequence for chunk in chunks if chunk.first])
            runner._sync_tables(chunk.sequence for chunk in chunks)
            slots = torch.tensor([chunk.sequence.slot for chunk in chunks])
            runner._lengths[slots] = torch.tensor([chunk.end for chunk in chunks])
            seconds = max(device.step_s, device.token_s * sum(chunk.size for chunk in chunks))
            made = Results(packed(len(chunks), 0, 1, 0), 0, started=time.perf_counter(), begun=None)
            late = _Late(made, device.launch(seconds), seconds)
            return PromptResults(late, [chunk.draws for chunk in chunks], loaded.info.lookup > 0)

        def step(batch: Batch, verified: Verified) -> Results:
            bucket: Bucket = verified.bucket  # type: ignore[attr-defined]
            turn = next(turns) % max(1, device.chains)
            left(bucket).copy_(packed(bucket.batch, bucket.depth, device.accepted + 1, turn))
            return _Late(
                second_half(batch, verified),
                device.launch(device.step_s),
                device.told(bucket.batch * bucket.nodes),
            )

        self._host.overlaps = True
        runner.launches = lambda _: True  # type: ignore[method-assign]
        runner.launch = prompts  # type: ignore[method-assign]
        runner.together = lambda chunks: [chunks] if chunks else []  # type: ignore[method-assign]
        runner.targets_accept_compact = step  # type: ignore[method-assign]
        # Measured again, by the device's times.
        self._chooser = self._scheduler._chooser = make_chooser(loaded, runner)
        device.rest()


def install(device: SimulatedDevice) -> None:
    """From here on every engine of this process, and of those it starts, runs on the simulated device."""
    made = partial(SimulatedEngine, device=device)
    engine.llm.Engine = engine.loop.Engine = engine.child.Engine = made  # type: ignore[assignment, misc]

    class SimulatedProcess(EngineProcess):
        def __init__(
            self, config: EngineConfig, *, prepare: Sequence[Callable[[], None]] = (), **options: Any
        ) -> None:
            super().__init__(config, prepare=[partial(install, device), *prepare], **options)

    engine.process.EngineProcess = SimulatedProcess  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step_ms", type=float)
    parser.add_argument("token_us", type=float)
    parser.add_argument("accepted", type=int)
    args, command = parser.parse_known_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of a process that it starts, too
    # Not this module's own, which a process of the engine's cannot find: its name is __main__ here.
    from benchmarks import simulated_device as found
    from server.cli import main as serve

    found.install(found.SimulatedDevice(args.step_ms / 1e3, args.token_us / 1e6, args.accepted))
    sys.argv = ["medusa-serve", *command[:1], *OPTIONS, *command[1:]]
    serve()


if __name__ == "__main__":
    main()
