"""Tokens per second of our server, over HTTP, next to transformers `generate`, in one run on one machine.

    python -m benchmarks.side_by_side --streams 1,8,16 --rounds 5

Both sides stay loaded, each in a process of its own with the same threads and dtype, and take turns in
the order A B B A, so that a slow drift of the machine hits both. Ours: tree off, so many streamed chat
completions at once at temperature 0. Theirs: one `generate` over a batch of so many. Every prompt is
exactly the same number of tokens (no padding), new in every round, the same for both sides; prefill
counts for both; tokenising and HTTP count for ours only. Options of `serve` may follow for our side, and
win: `-- --quantization int8`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from benchmarks.common import (
    ROOT,
    Server,
    add_model,
    chat,
    cpu_seconds,
    exact_prompt,
    first_model,
    hardware,
    model_folder,
    new_client,
    new_parser,
    numbers,
    open_connections,
    parse_with_engine_options,
    positive,
    print_result,
    prompt_ids,
    ratio_interval,
    thread_environment,
)
from engine.limits import cpus

IDLE_SHARE = 0.05
"""A side that uses more than this share of one core while the other is measured is reported."""


class TransformersWorker:
    """`generate` in a child process that speaks one JSON line each way and sleeps in between."""

    def __init__(self, folder: Path, dtype: str, device: str, threads: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.side_by_side", "--worker"]
        self._command += ["--model", str(folder), "--dtype", dtype, "--device", device]
        self._command += ["--threads", str(threads)]
        self._env = {**os.environ, **thread_environment(threads)}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        if self._read() != {"ready": True}:
            raise RuntimeError("the transformers worker did not start")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the worker's loop ends with its input
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds of one `generate` over these prompts, each continued by exactly `new_tokens`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the transformers worker has died; its error stands above")
        return json.loads(line)


def worker(folder: str, dtype: str, device: str, threads: int) -> None:
    """The child's side of `TransformersWorker`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    # Greedy, whatever the model's own generation settings say.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        ids = torch.tensor(order["prompts"], device=device)
        count = order["new_tokens"]
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                **greedy,
            )
        shape = tuple(found.cpu().shape)  # the copy also waits for the device
        seconds = time.perf_counter() - start
        if shape != (ids.shape[0], ids.shape[1] + count):
            raise RuntimeError(f"generate returned {shape}")
        print(json.dumps({"seconds": seconds}), flush=True)


async def ours(url: str, model: str, prompts: list[str], prompt_tokens: int, new_tokens: int) -> float:
    """Seconds until the last of these completions, all sent at once, has ended.

    The client's connections are open before, as those of a load balancer are.

    Raises:
        RuntimeError: a completion of another length than asked for.
    """
    async with new_client(url) as client:
        await open_connections(client, len(prompts))
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(
                chat(
                    client,
                    model,
                    prompt,
                    stream=True,
                    temperature=0,
                    max_tokens=new_tokens,
                    ignore_eos=True,
                )
                for prompt in prompts
            )
        )
        seconds = time.perf_counter() - start
    for answer in answers:
        if (answer.prompt_tokens, answer.completion_tokens) != (prompt_tokens, new_tokens):
            raise RuntimeError(f"asked for {prompt_tokens} + {new_tokens} tokens, got {answer}")
    return seconds


def summary(streams: int, ours_rate: list[float], theirs_rate: list[float]) -> dict[str, Any]:
    """Rates of both sides, and the ratio of each round's pair with its interval."""
    return {
        "streams": streams,
        "ours_tokens_per_s": round(statistics.median(ours_rate), 2),
        "transformers_tokens_per_s": round(statistics.median(theirs_rate), 2),
        **ratio_interval(ours_rate, theirs_rate),
    }


def measure(
    args: argparse.Namespace, folder: Path, server: Server, other: TransformersWorker
) -> tuple[list[dict[str, Any]], list[str]]:
    """One summary per number of streams, and warnings about a side that did not rest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = asyncio.run(first_model(server.url))
    rng = random.Random(args.seed)
    busy: list[str] = []

    def turn(side: str, prompts: list[str], new_tokens: int) -> float:
        """Tokens per second of one side, with an eye on the other's CPU time meanwhile."""
        idle_pid = other.pid if side == "ours" else server.pid
        before, start = cpu_seconds(idle_pid), time.monotonic()
        if side == "ours":
            seconds = asyncio.run(ours(server.url, model, prompts, args.prompt_tokens, new_tokens))
        else:
            seconds = other.generate([prompt_ids(tokenizer, prompt) for prompt in prompts], new_tokens)
        after = cpu_seconds(idle_pid)
        if before is not None and after is not None:
            share = (after - before) / (time.monotonic() - start)
            if share > IDLE_SHARE:
                busy.append(f"while {side} ran, the other side used {share:.0%} of a core")
        return len(prompts) * new_tokens / seconds

    rows: list[dict[str, Any]] = []
    for streams in args.streams:
        rates: dict[str, list[float]] = {"ours": [], "transformers": []}
        for number in range(-1, args.rounds):
            prompts = [exact_prompt(tokenizer, args.prompt_tokens, rng) for _ in range(streams)]
            order = ("ours", "transformers") if number % 2 == 0 else ("transformers", "ours")
            # Round -1 warms both up: caches, allocator, lazy imports.
            new_tokens = args.new_tokens if number >= 0 else min(8, args.new_tokens)
            for side in order:
                rate = turn(side, prompts, new_tokens)
                if number >= 0:
                    rates[side].append(rate)
        rows.append(summary(streams, rates["ours"], rates["transformers"]))
        row = rows[-1]
        print(
            f"{streams:3} streams: ours {row['ours_tokens_per_s']:8.1f} tok/s  transformers "
            f"{row['transformers_tokens_per_s']:8.1f} tok/s  ratio {row['ratio_median']:.2f} "
            f"(mean {row['ratio_mean']:.2f}, 95 % {row['ratio_interval_95']})",
            flush=True,
        )
    for line in busy:
        print(f"warning: {line}", flush=True)
    return rows, busy


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", default="none", choices=("none", "int8"), help="of ours")
    parser.add_argument("--threads", type=int, default=cpus(), help="of each side")
    parser.add_argument("--streams", type=numbers, default=[1, 8, 16])
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args, options = parse_with_engine_options(parser, argv)
    return args, options


def main() -> int:
    args, options = parse()
    if args.worker:
        worker(args.model, args.dtype, args.device, args.threads)
        return 0
    folder = model_folder(args.model)
    serve = [args.model, "--dtype", args.dtype, "--device", args.device, "--heads", "none", "--tree", "off"]
    serve += ["--max-num-seqs", str(max(args.streams)), "--quantization", args.quantization]
    serve += options  # the last one given wins
    with (
        Server(serve, threads=args.threads) as server,
        TransformersWorker(folder, args.dtype, args.device, args.threads) as other,
    ):
        rows, busy = measure(args, folder, server, other)
    print_result(
        {
            "benchmark": "side_by_side",
            "model": args.model,
            "dtype": args.dtype,
            "device": args.device,
            "threads": args.threads,
            "serve": serve,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "streamed": True,
            "order": "ABBA",
            "rows": rows,
            "warnings": busy,
            "hardware": hardware(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
