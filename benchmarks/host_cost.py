"""What the host takes for a decode step: the real engine on a device that takes next to nothing (simulated).

    python -m benchmarks.host_cost
    python -m benchmarks.host_cost --streams 16 --trees auto,8 --step-ms 0.7 --rounds 9 -- --lookup off

With steps launched ahead the host works beside the device, and its time counts as soon as it is longer than
the device's. Engines of the given trees take turns at the given numbers of streams, over several rounds. In
each all streams are brought to decoding before the clock starts, and none ends before it stops. A row has the
medians of what a step took by the clock, and of the thread's CPU time, in which waits for the device do not
count; then of what the parts of a step took, each without those that it calls, in rounds of their own. Of the
device the results are simulated: tokens that are all the same, `--accepted` nodes accepted (none without
trees), and with every `--chains`-th sequence's a lookup chain. Copies to and from a GPU, its events and the
launch of its graphs come on top.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from benchmarks.common import (
    add_model,
    engine_config,
    hardware,
    new_parser,
    numbers,
    parse_with_engine_options,
    positive,
    print_result,
)
from benchmarks.simulated_device import OPTIONS, SimulatedDevice, SimulatedEngine
from engine.loader import load
from engine.step_results import Results
from engine.types import Request, SamplingParams

__all__ = ["main", "measure", "parse"]

_PROMPT = 100
"""Tokens of each prompt."""

_SAID_S = 0.5e-3, 2e-6
"""What the choice of the tree is told of a step, much as SmolLM2's on an H100: seconds, and for each row."""


@dataclass(frozen=True, slots=True)
class HostCost:
    """What the host takes for a decode step.

    Args:
        streams: numbers of sequences, rising; seconds: of a step of as many.
    """

    streams: tuple[int, ...] = (1,)
    seconds: tuple[float, ...] = (0.0,)

    @classmethod
    def read(cls, path: Path, tree: str, slower: float) -> Self:
        """What `benchmarks.host_cost` measured with such a tree, so many times.

        Raises:
            ValueError: it measured none.
        """
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        found = sorted((row["streams"], slower * row["cpu_us"] / 1e6) for row in rows if row["tree"] == tree)
        if not found:
            raise ValueError(f"{path} has no row with tree {tree}: benchmarks.host_cost --trees auto,off")
        return cls(*zip(*found, strict=True))

    def of(self, batch: int) -> float:
        """Seconds of a step of so many sequences."""
        return float(np.interp(batch, self.streams, self.seconds))


class _Watch:
    """Seconds of each call of the parts of a step, without those that it calls."""

    def __init__(self) -> None:
        self.calls: defaultdict[str, list[float]] = defaultdict(list)
        self._inside = [0.0]  # of each watched call that runs: what it has spent in others

    @contextmanager
    def of(self, engine: SimulatedEngine) -> Iterator[None]:
        """While this lasts, the engine's calls are watched."""
        runner: Any = engine._runner
        parts: list[tuple[Any, str]] = [
            (engine, "_plan"),
            (engine._scheduler, "_choose"),
            (runner, "batch"),
            (runner, "draft_forward"),
            (runner, "targets_accept_compact"),
            (engine, "_launch"),
            (Results, "rows"),
            (engine, "_learn"),
            (engine, "_emit"),
            (engine._scheduler, "count"),
        ]
        kept = [(owner, name, vars(owner).get(name)) for owner, name in parts]
        for owner, name in parts:
            setattr(
                owner, name, self._watched(getattr(owner, name), name.strip("_"), bound=owner is not Results)
            )
        try:
            yield
        finally:
            for owner, name, before in kept:
                if before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

    def medians_us(self) -> dict[str, float]:
        """Microseconds of each part's median call, falling: in the middle of some the core is taken away."""
        found = {name: round(1e6 * statistics.median(calls), 1) for name, calls in self.calls.items()}
        return dict(sorted(found.items(), key=lambda part: -part[1]))

    def _watched(self, function: Any, name: str, *, bound: bool) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                took = time.perf_counter() - started
                self.calls[name].append(took - self._inside.pop())
                self._inside[-1] += took

        return call if bound else lambda results: call(results)


def steps(engine: SimulatedEngine, streams: int, count: int, salt: str) -> tuple[float, float]:
    """Seconds by the clock and of this thread, of so many decode steps of so many streams.

    Raises:
        RuntimeError: not every stream was in every step.
    """
    sampling, names = (
        SamplingParams(temperature=0.0, ignore_eos=True),
        [f"{salt}-{i}" for i in range(streams)],
    )
    for i, name in enumerate(names):
        engine.add(Request(name, tuple(range(50 + i, 50 + i + _PROMPT)), sampling))
    decoding: set[str] = set()
    while len(decoding) < streams:
        decoding.update(delta.request_id for delta in engine.step() if delta.num_steps)
    began, used, emitted = time.perf_counter(), time.thread_time(), 0
    for _ in range(count):
        emitted += len(engine.step())
    took = time.perf_counter() - began, time.thread_time() - used
    for name in names:
        engine.abort(name)
    engine.check()
    if emitted != count * streams:
        raise RuntimeError(f"{emitted} deltas of {count} steps of {streams} streams")
    return took


def measure(engines: dict[str, SimulatedEngine], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of streams and tree."""
    pairs = [(streams, tree) for streams in args.streams for tree in engines]
    found: dict[tuple[int, str], list[tuple[float, float]]] = {pair: [] for pair in pairs}
    watches, nodes = {pair: _Watch() for pair in pairs}, {}
    # As the server does: a look through all that is loaded would fall into one round or another.
    gc.collect()
    gc.freeze()
    for number in range(-1, args.rounds):
        for streams, tree in pairs if number % 2 == 0 else reversed(pairs):
            pair, engine = (streams, tree), engines[tree]
            drafted = engine.stats.draft_tokens
            took = steps(engine, streams, args.steps, f"{number}")
            drafted = engine.stats.draft_tokens - drafted
            with watches[pair].of(engine):
                steps(engine, streams, args.steps, f"{number} watched")
            if number < 0:  # code is compiled, buffers are allocated
                watches[pair] = _Watch()
                continue
            found[pair].append(took)
            nodes[pair] = round(1 + drafted / (args.steps * streams), 1)
    rows = []
    for streams, tree in pairs:
        clock, thread = (
            [1e6 * each / args.steps for each in times] for times in zip(*found[streams, tree], strict=True)
        )
        row = {"streams": streams, "tree": tree, "nodes": nodes[streams, tree]}
        row |= {"us": round(statistics.median(clock), 1), "cpu_us": round(statistics.median(thread), 1)}
        row["us_of_rounds"] = [round(each, 1) for each in clock]
        row["parts_us"] = watches[streams, tree].medians_us()
        rows.append(row)
        print(
            f"{streams:3} streams, tree {tree:>4} ({row['nodes']:4} nodes): {row['us']:7.1f} us a step, "
            f"{row['cpu_us']:7.1f} of the CPU  {row['parts_us']}",
            flush=True,
        )
    return rows


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--streams", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--trees", type=lambda text: text.split(","), default=["auto", "off"])
    parser.add_argument("--step-ms", type=float, default=0.001, help="what the simulated device takes")
    parser.add_argument("--accepted", type=int, default=1, help="nodes accepted in each step with a tree")
    parser.add_argument(
        "--chains", type=int, default=2, help="one of so many has a lookup chain; 0: none ever"
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--steps", type=positive, default=200, help="of each round")
    parser.add_argument("--output", type=Path, help="where the result goes, too")
    return parse_with_engine_options(parser, argv)


def made(args: argparse.Namespace, options: list[str]) -> dict[str, SimulatedEngine]:
    """An engine for each tree, with room for all streams."""
    most, length = max(args.streams), _PROMPT + (args.steps + 16) * (args.accepted + 1)
    settings = {"max_num_seqs": most, "max_model_len": length, "kv_cache_tokens": most * (length + 96)}
    settings |= {"dtype": "float32", "device": "cpu", "prefix_caching": False}
    engines = {}
    for tree in args.trees:
        config = engine_config([*OPTIONS, *options], model=args.model, tree=tree, **settings)
        device = SimulatedDevice(
            args.step_ms / 1e3,
            accepted=0 if tree in ("off", "1") else args.accepted,
            chains=args.chains,
            said_s=_SAID_S,
        )
        engines[tree] = SimulatedEngine(load(config, progress=False), device=device)
    return engines


def main(argv: list[str] | None = None) -> int:
    args, options = parse(argv)
    torch.set_num_threads(1)
    result = {
        "benchmark": "host_cost",
        "simulated": "the device: its results are made up, and nothing is copied to it or launched on it",
        "model": args.model,
        "serve": options,
        "step_ms": args.step_ms,
        "accepted": args.accepted,
        "chains": args.chains,
        "steps": args.steps,
        "rounds": args.rounds,
        "rows": measure(made(args, options), args),
        "hardware": hardware(),
    }
    print_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
