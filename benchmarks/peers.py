"""Tokens per second of our server and of others on this machine, in one run.

    python -m benchmarks.peers --streams 1,4,8,16 -- --quantization int8
    python -m benchmarks.peers --peers transformers,llama.cpp,openvino --gguf model.Q4_1.gguf
    python -m benchmarks.peers --server vllm=http://10.0.0.2:8000

Every side is loaded once and stays idle while another runs; they take turns, forwards and backwards
(A B C, C B A). All get the same prompts, new in every round, and give exactly --new-tokens at temperature 0;
prefill counts. `transformers` runs here; `llama.cpp` needs `llama-server` on the PATH and --gguf; `vllm` its
command; `openvino` the package openvino-genai in the Python given by --openvino-python, and reads --gguf or
an exported folder. Whatever is not installed is named and left out. --server adds one that runs already.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import httpx

from benchmarks.common import (
    ROOT,
    Server,
    add_model,
    exact_prompt,
    first_model,
    free_port,
    hardware,
    model_folder,
    new_client,
    new_parser,
    numbers,
    parse_with_engine_options,
    positive,
    print_result,
    prompt_ids,
    ratio_interval,
    thread_environment,
)
from benchmarks.http_load import timed_chat
from benchmarks.side_by_side import TransformersWorker
from engine.limits import cpus

READY_S = 300.0


class NotInstalledError(Exception):
    """A peer that cannot run here; the text says what it needs."""


class Side(Protocol):
    """One contender, loaded and idle."""

    def run(self, prompts: list[str], new_tokens: int) -> tuple[int, float]:
        """Answer these together: tokens that came, and seconds."""


@dataclass
class OverHttp:
    """A server that speaks OpenAI's API."""

    url: str
    model: str
    notes: set[str] = field(default_factory=set)

    def run(self, prompts: list[str], new_tokens: int) -> tuple[int, float]:
        return asyncio.run(self._run(prompts, new_tokens))

    async def _run(self, prompts: list[str], new_tokens: int) -> tuple[int, float]:
        options = {"model": self.model, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        async with new_client(self.url) as client:
            start = time.perf_counter()
            samples = await asyncio.gather(
                *(
                    timed_chat(client, {**options, "messages": [{"role": "user", "content": prompt}]})
                    for prompt in prompts
                )
            )
            seconds = time.perf_counter() - start
        if failed := [sample.error for sample in samples if sample.error]:
            raise RuntimeError(f"{self.url}: {failed[0]}")
        if any(sample.completion_tokens != new_tokens for sample in samples):
            self.notes.add("answers of another length than asked for")
        return sum(sample.completion_tokens for sample in samples), seconds


@dataclass
class Transformers:
    """`generate` on a batch without padding."""

    worker: TransformersWorker
    tokenizer: Any

    def run(self, prompts: list[str], new_tokens: int) -> tuple[int, float]:
        ids = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        return len(prompts) * new_tokens, self.worker.generate(ids, new_tokens)


class Process:
    """A server of someone else's as a child process, ready on entry and stopped on exit."""

    def __init__(self, command: Sequence[str], url: str, ready: str, threads: int) -> None:
        self._command, self._ready = list(command), url + ready
        self._env = {**os.environ, **thread_environment(threads)}

    def __enter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile(prefix="peer-", suffix=".log")
        self._process = subprocess.Popen(
            self._command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self._ready, timeout=2.0, trust_env=False).status_code == 200:
                    return self
            time.sleep(0.3)
        log = "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-20:])
        self.__exit__()
        raise NotInstalledError(f"{self._command[0]} did not get ready:\n{log}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class OpenVino:
    """OpenVINO GenAI's continuous batching in a child process; one JSON line each way."""

    def __init__(self, python: str, model: Path, threads: int, streams: int) -> None:
        self._command = [python, str(ROOT / "benchmarks" / "openvino_worker.py")]
        self._command += [str(model), str(threads), str(streams)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != '{"ready": true}':
            _, error = self._process.communicate()
            raise NotInstalledError(f"openvino: {error.strip().splitlines()[-1] if error else 'it ended'}")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=20)  # closes its input, with which its loop ends
        self._process.kill()
        self._process.wait()

    def run(self, prompts: list[str], new_tokens: int) -> tuple[int, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return int(found["tokens"]), float(found["seconds"])


# -- who takes part --------------------------------------------------------------------------------


def start_transformers(args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> Side:
    from transformers import AutoTokenizer

    worker = stack.enter_context(TransformersWorker(folder, args.dtype, "cpu", args.threads))
    return Transformers(worker, AutoTokenizer.from_pretrained(folder))


def start_llama_cpp(args: argparse.Namespace, _folder: Path, stack: contextlib.ExitStack) -> Side:
    program = shutil.which("llama-server")
    if program is None:
        raise NotInstalledError("llama.cpp: there is no llama-server on the PATH")
    if args.gguf is None:
        raise NotInstalledError("llama.cpp: name a model file by --gguf")
    port, streams = free_port(), max(args.streams)
    room = streams * (args.prompt_tokens + args.new_tokens + 64)
    command = [program, "-m", str(args.gguf), "--port", str(port), "-t", str(args.threads)]
    command += ["-np", str(streams), "-c", str(room)]
    url = f"http://127.0.0.1:{port}"
    stack.enter_context(Process(command, url, "/health", args.threads))
    return OverHttp(url, "default")


def start_vllm(args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> Side:
    program = shutil.which("vllm")
    if program is None:
        raise NotInstalledError("vllm: there is no vllm command on the PATH")
    port = free_port()
    command = [program, "serve", str(folder), "--port", str(port), "--dtype", args.dtype]
    command += [
        "--max-num-seqs",
        str(max(args.streams)),
        "--max-model-len",
        "1024",
        "--served-model-name",
        "m",
    ]
    url = f"http://127.0.0.1:{port}"
    stack.enter_context(Process(command, url, "/health", args.threads))
    return OverHttp(url, "m")


def start_openvino(args: argparse.Namespace, _folder: Path, stack: contextlib.ExitStack) -> Side:
    python = args.openvino_python
    check = [python, "-c", "import openvino_genai"]
    if subprocess.run(check, capture_output=True, check=False).returncode != 0:
        raise NotInstalledError(f"openvino: {python} has no openvino-genai")
    model = args.openvino_model or args.gguf
    if model is None:
        raise NotInstalledError("openvino: name a model by --gguf or --openvino-model")
    return stack.enter_context(OpenVino(python, model, args.threads, max(args.streams)))


PEERS: dict[str, Callable[[argparse.Namespace, Path, contextlib.ExitStack], Side]] = {
    "transformers": start_transformers,
    "llama.cpp": start_llama_cpp,
    "vllm": start_vllm,
    "openvino": start_openvino,
}


def start_all(
    args: argparse.Namespace, folder: Path, serve: list[str], stack: contextlib.ExitStack
) -> tuple[dict[str, Side], dict[str, str]]:
    """Every side that can run, ours first, and why the others cannot."""
    server = stack.enter_context(Server(serve, threads=args.threads))
    sides: dict[str, Side] = {"ours": OverHttp(server.url, asyncio.run(first_model(server.url)))}
    missing: dict[str, str] = {}
    for name in args.peers:
        try:
            sides[name] = PEERS[name](args, folder, stack)
        except NotInstalledError as error:
            missing[name] = str(error)
            print(f"left out: {error}", flush=True)
    for name, url in args.server:
        sides[name] = OverHttp(url, asyncio.run(first_model(url)))
    return sides, missing


def measure(args: argparse.Namespace, sides: dict[str, Side], folder: Path) -> list[dict[str, Any]]:
    """A row per number of streams: everyone's tokens/s, and ours to each of them by rounds."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    for streams in args.streams:
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(-1, args.rounds):
            prompts = [exact_prompt(tokenizer, args.prompt_tokens, rng) for _ in range(streams)]
            for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
                tokens, seconds = sides[name].run(prompts, args.new_tokens if number >= 0 else 8)
                if number >= 0:
                    rates[name].append(tokens / seconds)
        rows.append(row := summary(streams, rates))
        print(
            f"{streams:3} streams: "
            + "  ".join(f"{name} {rate}" for name, rate in row["tokens_per_s"].items()),
            flush=True,
        )
    return rows


def summary(streams: int, rates: dict[str, list[float]]) -> dict[str, Any]:
    """One row; the first side's rate is held against each other's, round by round."""
    first, *others = rates
    return {
        "streams": streams,
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        f"{first}_to": {name: ratio_interval(rates[first], rates[name]) for name in others},
    }


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    def named_url(text: str) -> tuple[str, str]:
        name, equals, url = text.partition("=")
        if not (name and equals and url):
            raise argparse.ArgumentTypeError("must be NAME=URL")
        return name, url.rstrip("/").removesuffix("/v1")

    parser = new_parser(__doc__)
    add_model(parser)
    parser.add_argument("--peers", default=",".join(PEERS), help="by comma; those not installed are left out")
    parser.add_argument("--server", type=named_url, action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--dtype", default="float32", help="of transformers and vllm")
    parser.add_argument("--gguf", type=Path, help="model file for llama.cpp and openvino")
    parser.add_argument("--openvino-model", type=Path, help="exported folder, instead of --gguf")
    parser.add_argument("--openvino-python", default=sys.executable, help="a Python with openvino-genai")
    parser.add_argument("--threads", type=int, default=cpus(), help="of each side")
    parser.add_argument("--streams", type=numbers, default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=positive, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=60, help="by our template; a peer's may differ")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args, options = parse_with_engine_options(parser, argv)
    args.peers = [name for name in args.peers.split(",") if name]
    if unknown := sorted(set(args.peers) - set(PEERS)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PEERS)}")
    return args, options


def main() -> int:
    args, options = parse()
    folder = model_folder(args.model)
    serve = [args.model, "--max-num-seqs", str(max(args.streams)), *options]
    with contextlib.ExitStack() as stack:
        sides, missing = start_all(args, folder, serve, stack)
        rows = measure(args, sides, folder)
    print_result(
        {
            "benchmark": "peers",
            "model": args.model,
            "serve": serve,
            "peers_dtype": args.dtype,
            "gguf": args.gguf.name if args.gguf else None,
            "not_installed": missing,
            "notes": {
                name: sorted(side.notes) for name, side in sides.items() if getattr(side, "notes", None)
            },
            "threads": args.threads,
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "order": "forwards and backwards in turn",
            "rows": rows,
            "hardware": hardware(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
