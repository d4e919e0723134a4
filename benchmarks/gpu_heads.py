"""New heads for a model in one run by the clock: its answers, heads that learn from them, the tree, figures.

    python -m benchmarks.gpu_heads --prompts prompts.jsonl --minutes 8.3 --output out
    python -m benchmarks.gpu_heads --device cpu --tiny --model FOLDER --prompts prompts.jsonl --output out

Several processes answer at once, since one is busy with Python between the GPU's steps; then the heads train
with all hidden states in the GPU's memory; then they and the heads so far are calibrated on the same held-out
answers. Each stage ends by the clock and leaves what it has. `out` gets gpu-heads.json (as the stages end),
heads.tar (heads, tree, table, pictures, log), held-out.tokens.xz and as many of the other answers as fit
data-N.tar. docs/training.md says how to run it on a bare machine and what to do with the result.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, add_model, new_parser, print_result
from benchmarks.gpu_run import Run, device_name
from engine.model.config import ModelConfig
from engine.model.embedded import EMBEDDED_MODEL, shipped_heads
from engine.model.weights import resolve_model
from training.backbone import make_backbone, read_lm_head
from training.config import TrainConfig
from training.data import SHARD_SUFFIX, Row, Tokens, held_out, load_shards, write_shard
from training.hidden import TOP_K, AnswerStates
from training.measure import measure
from training.train import HEADS_FILE, train

__all__ = ["main", "parse"]

_FILE_BYTES = 15 << 20
"""Most bytes of a file of answers, and below what a lent machine gives back."""

_DATA_FILES = 3

_CALIBRATION_S = 60.0
"""Kept for what comes after training."""

_START_S = 15.0
"""From the start of a process to its first look at the clock, at most."""

_SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "streams": 256,
        "max_tokens": 256,
        "step_tokens": 8192,
        "shard_rows": 2048,
        "pack": 8192,
        "train": {
            "batch_tokens": 4096,
            "micro_tokens": 4096,
            "epochs": 100.0,
            "lr": 2e-3,
            "warmup_steps": 200,
            "ema": 0.999,
            "eval_every": 1000,
            "eval_tokens": 65536,
            "held_out": 0.01,
        },
    },
    "tiny": {
        "streams": 4,
        "max_tokens": 16,
        "step_tokens": 64,
        "shard_rows": 16,
        "pack": 64,
        "train": {
            "batch_tokens": 32,
            "micro_tokens": 32,
            "epochs": 2.0,
            "vocabulary": "full",
            "eval_every": 50,
            "held_out": 0.3,
        },
    },
}


class Stages:
    """What the stages share.

    Args:
        run: clock and results file.
        work: folder for what does not come back.
    """

    def __init__(self, run: Run, work: Path) -> None:
        self.run, self.args, self.work = run, run.args, work
        self.sizes = _SIZES["tiny" if run.tiny else "full"]
        self.heads, self.held_out = work / "heads", self.sizes["train"]["held_out"]

    @property
    def data(self) -> tuple[Path, ...]:
        """Folders of answers."""
        return tuple(sorted({file.parent for file in self.work.glob("data/*/*" + SHARD_SUFFIX)}))

    def warm(self, _run: Run) -> dict[str, Any]:
        """Unpack the model, compile and measure its kernels, once for all; time a pass over answers."""
        sizes, longest = self.sizes, 2 * self.sizes["max_tokens"]
        started = time.monotonic()
        backbone = make_backbone(
            self.args.model,
            device=self.args.device,
            dtype="float32" if self.run.tiny else "bfloat16",
            bits=16,
            pack_tokens=sizes["pack"],
            longest=longest,
        )
        loaded = time.monotonic()
        weight = read_lm_head(self.args.model).to(device=backbone.device, dtype=backbone.dtype)
        count = max(1, sizes["pack"] // longest)
        tokens = np.random.default_rng(0).integers(len(weight), size=(count, longest))
        rows = [_halved(sequence) for sequence in tokens]
        one_pass = partial(AnswerStates.of, rows, backbone, weight, min(TOP_K, len(weight)))
        seconds = self.run.timed(one_pass)
        del backbone, weight, one_pass
        self.run.free()
        rate = round(tokens.size / seconds)
        return {"load_s": round(loaded - started, 1), "hidden_state_tokens_per_s": rate}

    def distil(self, run: Run) -> dict[str, Any]:
        """Answers of several processes: each its part of the prompts, then of what the model asks itself."""
        args, sizes = self.args, self.sizes
        seconds = max(1.0, args.distil_share * run.left() - (0.0 if run.tiny else _START_S))
        options = {
            "device": args.device,
            "dtype": "float32" if run.tiny else "bfloat16",
            "prompts": self.prompts(),
            "self-prompt": args.self_prompt,
            "temperature": args.temperature,
            "max-tokens": sizes["max_tokens"],
            "max-prompt-tokens": sizes["max_tokens"],
            "max-num-seqs": sizes["streams"],
            "max-step-tokens": sizes["step_tokens"],
            # Every sequence at its longest, and no more: the processes share the memory.
            "kv-cache-tokens": sizes["streams"] * (2 * sizes["max_tokens"] + 32),
            "shard-rows": sizes["shard_rows"],
            "minutes": round(seconds / 60, 4),
        }
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        base = [sys.executable, "-m", "server.cli", "distill", args.model, *given]
        commands = [
            [*base, "--part", f"{part}/{args.workers}", "--output", str(self.work / "data" / str(part))]
            for part in range(1, args.workers + 1)
        ]
        with _processes(commands, self.work) as processes:
            until = time.monotonic() + seconds + (60.0 if run.tiny else _START_S + 20.0)
            for process in processes:
                try:
                    process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    print("a process did not end in time: what it wrote so far counts", flush=True)
        codes = [process.returncode for process in processes]
        for number, code in enumerate(codes, start=1):
            if code:
                print((self.work / f"{number}.log").read_text(errors="replace")[-3000:], flush=True)
        found = self._counted() | {"asked_for_s": round(seconds, 1), "exit_codes": codes}
        if not self.data:
            raise RuntimeError(f"no process left a single answer (exit codes {codes})")
        return found

    def _counted(self) -> dict[str, Any]:
        manifests = [json.loads(file.read_text()) for file in sorted(self.work.glob("data/*/manifest.json"))]
        sums = {
            name: sum(each["counts"][name] for each in manifests if "counts" in each)
            for name in ("rows", "prompt_tokens", "answer_tokens", "skipped")
        }
        seconds = max([each.get("seconds", 0.0) for each in manifests], default=0.0)
        rate = round(sums["answer_tokens"] / seconds) if seconds else None
        return {**sums, "seconds": seconds, "answer_tokens_per_s": rate, "processes": len(manifests)}

    def train(self, run: Run) -> dict[str, Any]:
        """Heads, to the time that is kept for calibration."""
        left = max(2.0, run.left() - (_CALIBRATION_S if not run.tiny else 0.5 * run.left()))
        config = TrainConfig(
            model=self.args.model,
            data=self.data,
            output=self.heads,
            device=self.args.device,
            minutes=left / 60,
            cache="memory",
            layers=self.args.layers,
            checkpoint_every=10**9,
            patience=10**9,
            **self.sizes["train"],
        )
        found = self._without_folders(train(config))
        lines = (self.heads / "train.jsonl").read_text(encoding="utf-8").splitlines()
        self.pack_heads()
        settings = config.model_dump(mode="json", exclude={"data", "output", "model"})
        return {**found, "asked_for_s": round(left, 1), "settings": settings, "looks": len(lines)}

    def calibrate(self, run: Run) -> dict[str, Any]:
        """The new heads' tree and table, and the same figures of the heads so far on the same answers."""
        run.free()  # what training held is most of the device's memory
        found: dict[str, Any] = {}
        sides = {"new": (str(self.heads / HEADS_FILE), self.heads)}
        if baseline := self.args.baseline or _shipped(self.args.model):
            sides["baseline"] = (str(baseline), self.work / "baseline")
        for name, (heads, folder) in sides.items():
            measured = measure(
                heads,
                self.data,
                folder,
                model=self.args.model,
                cache_dir=self.work / "held-out",
                share=self.held_out,
                size=64,
                device=self.args.device,
            )
            found[name] = self._without_folders(measured)
            run.record("calibrate", found)
            print(name, dict(zip(found[name]["nodes"], found[name]["replayed"], strict=True)), flush=True)
        self.pack_heads()
        return found

    def collect(self, run: Run) -> dict[str, Any]:
        """Answers for the way back: those held out, and as many others as fit."""
        rows = [row for row in load_shards(self.data) if held_out(row.conversation, self.held_out)]
        if rows:
            vocab_size = ModelConfig.from_folder(resolve_model(self.args.model)).vocab_size
            file = self.args.output / f"held-out{SHARD_SUFFIX}"
            write_shard(file, rows, vocab_size=vocab_size, model=self.args.model)
        shards = [shard for folder in self.data for shard in sorted(folder.glob("*" + SHARD_SUFFIX))]
        taken, number = 0, 0
        while taken < len(shards) and number < _DATA_FILES and run.left() > -10.0:
            size = 0
            with tarfile.open(self.args.output / f"data-{number}.tar", "w") as tar:
                while taken < len(shards) and size + shards[taken].stat().st_size <= _FILE_BYTES:
                    tar.add(shards[taken], f"{shards[taken].parent.name}-{shards[taken].name}")
                    size, taken = size + shards[taken].stat().st_size, taken + 1
            if not size:
                raise RuntimeError(f"{shards[taken]} alone is larger than {_FILE_BYTES} bytes")
            number += 1
        return {"held_out_rows": len(rows), "shards": len(shards), "shards_in_the_files": taken}

    def _without_folders(self, found: dict[str, Any]) -> dict[str, Any]:
        """Files in the working folder or in ours as seen from there: the rest is of this machine alone."""
        return {
            name: value.removeprefix(f"{self.work}/").removeprefix(f"{ROOT}/")
            if isinstance(value, str)
            else value
            for name, value in found.items()
        }

    def pack_heads(self) -> None:
        """What belongs beside the heads in one file: few files come back."""
        partial = self.args.output / "heads.partial"
        with tarfile.open(partial, "w") as tar:
            for file in sorted(self.heads.iterdir()):
                if file.suffix in (".safetensors", ".json", ".jsonl", ".svg"):
                    tar.add(file, file.name)
        os.replace(partial, self.args.output / "heads.tar")

    def prompts(self) -> Path:
        """The prompts as a plain file."""
        given: Path = self.args.prompts
        if given.suffix != ".xz":
            return given
        file = self.work / given.stem
        if not file.exists():
            with lzma.open(given) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
        return file


def _halved(tokens: Tokens) -> Row:
    """A made-up row: half a prompt, half an answer."""
    middle = len(tokens) // 2
    return Row(0, 0, 0, 0.0, tokens[:middle], tokens[middle:])


def _shipped(model: str) -> Path | None:
    return shipped_heads() if model == EMBEDDED_MODEL else None


@contextmanager
def _processes(commands: list[list[str]], work: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """All of them at once, each with a log; whatever still runs at the end is stopped."""
    threads = str(max(1, (os.cpu_count() or 1) // len(commands) // 2))
    found: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands, start=1):
            with (work / f"{number}.log").open("wb") as log:
                found.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
                    )
                )
        yield found
    finally:
        for process in found:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # an exception there: its last shard is still written
        for process in found:
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL as for `distill`, or that as .xz")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.3, help="for everything")
    parser.add_argument("--distil-share", type=float, default=0.5, help="of the time after the warm-up")
    add_model(parser)
    parser.add_argument("--baseline", default=None, help="heads to compare with; the shipped ones if unset")
    parser.add_argument("--layers", type=int, default=3, help="residual layers per head")
    parser.add_argument("--workers", type=int, default=4, help="processes that answer")
    parser.add_argument("--self-prompt", type=int, default=200_000, help="conversations after the prompts")
    parser.add_argument("--temperature", default="0,0,0,0.7", help="as of `distill`")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: to run the script itself")
    args = parser.parse_args(argv)
    if not args.prompts.is_file():
        parser.error(f"there is no {args.prompts}")
    if args.workers < 1 or not 0.0 < args.distil_share < 1.0:
        parser.error("--workers must be at least 1 and --distil-share between 0 and 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny runs the script itself")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    deadline = time.monotonic() + 60 * args.minutes
    run = Run(args, device, args.output / "gpu-heads.json", deadline)
    print(f"{device_name(device)}, torch {torch.__version__}; results in {args.output}", flush=True)
    with tempfile.TemporaryDirectory(prefix="medusa-serve-heads-") as work:
        stages = Stages(run, Path(work))
        for name in ("warm", "distil", "train", "calibrate", "collect"):
            run.measure(name, getattr(stages, name))
    result = {"device": device_name(device), "seconds": run.seconds, "failed": run.failed}
    print_result({"benchmark": "gpu_heads", **result})
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
