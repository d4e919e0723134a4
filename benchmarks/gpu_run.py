"""What the parts of `benchmarks.gpu` share: the clock, the results file, timing on the device."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from server.bench import hardware

__all__ = ["Run", "combine", "device_name", "ms"]


def device_name(device: torch.device) -> str:
    """As the results and their file are named."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def ms(seconds: float) -> float:
    """Milliseconds, to a microsecond's tenth."""
    return round(1000.0 * seconds, 4)


@dataclass
class Run:
    """One call of `benchmarks.gpu`: every result is in its file as soon as it is there.

    Args:
        args: the command's.
        device: what is measured.
        output: the results file.
        deadline: `time.monotonic()` after which nothing new begins.
    """

    args: argparse.Namespace
    device: torch.device
    output: Path
    deadline: float
    parts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        return bool(self.args.tiny)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def failed(self) -> list[str]:
        """Parts that ended in an error."""
        return [name for name, part in self.parts.items() if isinstance(part, dict) and "error" in part]

    def sound(self) -> bool:
        """False after an error that no kernel launch survives: CUDA then fails until the process ends."""
        try:
            self.synchronize()
        except RuntimeError:
            return False
        return True

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def measure(self, name: str, part: Callable[[Run], Any]) -> None:
        """Run one part; what goes wrong in it is a result too, and the next part runs."""
        started = time.monotonic()
        print(f"== {name} ({self.left():.0f} s left)", flush=True)
        if self.left() <= 0:
            self.record(name, {"skipped": "no time left"})
            return
        try:
            found = part(self)
        except Exception as error:  # a kernel that fails must not cost the other parts
            found = {
                "error": f"{type(error).__name__}: {error}"[:2000],
                "where": traceback.format_exc()[-1500:],
            }
            print(found["error"], flush=True)
            found = {**self.parts.get(name, {}), **found}  # what it had so far stays
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.record(name, found)

    def record(self, name: str, value: Any) -> None:
        """Put a part's result, whole or so far, into the file."""
        self.parts[name] = value
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_json(), ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, self.output)

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": "gpu",
            "device": device_name(self.device),
            "tiny": self.tiny,
            "hardware": hardware() | {"cuda": torch.version.cuda},
            "seconds": self.seconds,
            "parts": self.parts,
        }

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], object], *, repeat: int = 20, warm: int = 3) -> float:
        """Median seconds of `work` on the device: between events on CUDA, by the clock on a CPU."""
        repeat, warm = (2, 1) if self.tiny else (repeat, warm)
        for _ in range(warm):
            work()
        self.synchronize()
        found: list[float] = []
        if self.cuda:
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(repeat)
            ]
            for start, end in events:
                start.record()
                work()
                end.record()
            self.synchronize()
            found = [start.elapsed_time(end) / 1000.0 for start, end in events]
        else:
            for _ in range(repeat):
                began = time.perf_counter()
                work()
                found.append(time.perf_counter() - began)
        return statistics.median(found)

    def captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """`work` as a CUDA graph's replay, so that launches cost nothing; as it is on a CPU."""
        if not self.cuda:
            return work
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = work()

        def replay(_kept: object = kept) -> None:
            graph.replay()

        return replay

    def free(self) -> None:
        """Give back what the last part left on the device."""
        import gc

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def output_file(args: argparse.Namespace, device: torch.device, root: Path) -> Path:
    """Where the results go: what was asked for, else a file named after the device."""
    if args.output is not None:
        return Path(args.output)
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return root / "benchmarks" / "results" / f"gpu-{name}{'-tiny' if args.tiny else ''}.json"


def combine(files: list[Path]) -> dict[str, Any]:
    """Results of several calls as one: of each part the last that neither failed nor was skipped.

    Raises:
        ValueError: they are of different devices.
    """
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if len({one["device"] for one in found}) > 1:
        raise ValueError(f"the files are of different devices: {sorted({one['device'] for one in found})}")
    whole: dict[str, Any] = {**found[0], "parts": {}, "seconds": {}}
    for one in found:
        for name, part in one["parts"].items():
            poor = isinstance(part, dict) and ("error" in part or "skipped" in part)
            if name not in whole["parts"] or not poor:
                whole["parts"][name] = part
                whole["seconds"][name] = one["seconds"].get(name)
    return whole
