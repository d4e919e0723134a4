"""Parts of `benchmarks.gpu` about the device itself: tests, bandwidths, rates, what a kernel saves."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import ROOT
from benchmarks.gpu_run import Run, ms
from benchmarks.gpu_shapes import SHAPES, TINY, Shape
from engine.attention.base import NoAttention
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder

__all__ = ["between_products", "ceilings", "limited", "tests"]


def tests(run: Run) -> dict[str, Any]:
    """The tests that are marked `cuda`, in processes of their own.

    They wait for compilers and captures most of the time and take little of the device, so many run at once.
    """
    at_once = ["-n", "12"] if importlib.util.find_spec("xdist") is not None else []
    some = ["--collect-only", "tests/engine/model/test_triton_kernels.py"]
    if run.tiny:
        return {"cuda": _pytest(run, some)}
    # What the engine promises comes first: the clock may stop the rest.
    engine = "tests/engine/test_engine_cuda.py"
    return {
        "engine": _pytest(run, [*at_once, engine]),
        "kernels": _pytest(run, [*at_once, "tests/engine", f"--ignore={engine}"]),
    }


def _pytest(run: Run, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *arguments]
    code, lines = limited(command, max(30.0, min(200.0, run.left() / 2)))
    print("\n".join(lines[-25:]), flush=True)
    return {"passed": code == 0, "exit_code": code, "tail": lines[-60:]}


def limited(command: list[str], seconds: float) -> tuple[int, list[str]]:
    """Exit code and lines of a command that gets so long: it is interrupted then, to say how far it came.

    What it has started ends with it, since whatever is measured next wants the device for itself.
    """
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Whoever was started in the background ignores it, and so would all it starts.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        ) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_LAST_WORDS_S)
                log.write(f"\nstopped after {seconds:.0f} s\n")
            with suppress(ProcessLookupError):  # there is nobody left
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return process.returncode, log.read().strip().splitlines()


_LAST_WORDS_S = 10.0


def ceilings(run: Run) -> dict[str, Any]:
    """What memory and matrix units give at most, on random data and sizes far beyond the caches."""
    size = 1 << 16 if run.tiny else 1 << 31
    dtype = torch.float32 if run.tiny else torch.bfloat16
    source = torch.empty(size, dtype=dtype, device=run.device).normal_()
    target = torch.empty_like(source)
    num_bytes = source.numel() * source.element_size()
    copy = 2 * num_bytes / run.timed(lambda: target.copy_(source))
    # Reading alone: a sum, and the matrix-vector product that decoding consists of.
    total = num_bytes / run.timed(lambda: source.sum(dtype=torch.float32))
    rows = source.view(-1, 1 << (8 if run.tiny else 13))
    vector = torch.empty(1, rows.shape[1], dtype=dtype, device=run.device).normal_()
    product = num_bytes / run.timed(lambda: F.linear(vector, rows))
    side = 64 if run.tiny else 8192
    a, b = (torch.empty(side, side, dtype=dtype, device=run.device).normal_() for _ in range(2))
    rate = 2 * side**3 / run.timed(lambda: a @ b)
    found: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bytes_per_s": round(copy),
        "sum_bytes_per_s": round(total),
        "matrix_vector_bytes_per_s": round(product),
        "read_bytes_per_s": round(max(total, product)),
        "matmul_flop_per_s": round(rate),
        "matmul_side": side,
    }
    if run.cuda:
        found["memory_bytes"] = torch.cuda.get_device_properties(run.device).total_memory
    print({name: f"{value:.3g}" for name, value in found.items() if not isinstance(value, str)}, flush=True)
    return found


def between_products(run: Run) -> dict[str, Any]:
    """A layer without attention: its products alone, plain, with our Triton kernels around them and with
    those products that are measured to be faster as kernels too ("as served"), by torch.compile.

    All as captured graphs, so that what differs is time on the device. Milliseconds a layer.
    """
    found: dict[str, Any] = {}
    for shape in [TINY] if run.tiny else [SHAPES["smollm2-135m"], SHAPES["llama-2-7b"]]:
        decoder = _some_layers(run, shape, layers=2 if run.tiny else 8)
        layers = len(decoder.layers)
        for rows in (1, 4) if run.tiny else (1, 16, 64):
            row: dict[str, Any] = {}
            for name, work in _variants(run, decoder, rows).items():
                if name == "torch.compile" and run.left() < 60:
                    row[name] = "skipped: no time left"
                    continue
                try:
                    row[name] = ms(run.timed(run.captured(work), repeat=50) / layers)
                except Exception as error:  # the compiler may be missing
                    row[name] = f"{type(error).__name__}: {error}"[:300]
            found[f"{shape.name} rows {rows}"] = row
            print(shape.name, rows, row, flush=True)
            run.record("between_products", found)
        del decoder
        run.free()
    return found


def _some_layers(run: Run, shape: Shape, layers: int) -> Decoder:
    config = ModelConfig.from_hf(shape.config(num_hidden_layers=layers, vocab_size=64))
    decoder = Decoder(config, torch.float32 if run.tiny else torch.bfloat16, 128)
    decoder.randomize(run.device)
    return decoder.to(run.device)


@torch.inference_mode()
def _variants(run: Run, decoder: Decoder, rows: int) -> dict[str, Callable[[], object]]:
    config, dtype = decoder.config, decoder.embed.dtype
    tokens = torch.arange(rows, device=run.device) % config.vocab_size
    hidden, wide, mixed = (
        torch.empty(rows, size, dtype=dtype, device=run.device).normal_()
        for size in (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    )

    attention = NoAttention(mixed)

    def products() -> None:
        for layer in decoder.layers:
            F.linear(hidden, layer.qkv_proj.weight)
            F.linear(mixed, layer.o_proj.weight)
            F.linear(hidden, layer.gate_up_proj.weight)
            F.linear(wide, layer.down_proj.weight)

    def forward(fused: bool, folder: Path | None = None) -> Callable[[], object]:
        layers = None
        if fused:
            decoder.fuse_triton(folder)
            layers, decoder.fused_cuda = decoder.fused_cuda, None

        @torch.inference_mode()
        def work() -> Tensor:
            decoder.fused_cuda = layers
            try:
                return decoder(tokens, tokens, attention)
            finally:
                decoder.fused_cuda = None

        return work

    variants: dict[str, Callable[[], object]] = {"products alone": products, "plain": forward(fused=False)}
    if not run.cuda:
        return variants
    compiled = torch.compile(lambda x, cos, sin: _through(decoder, x, cos, sin, attention), dynamic=False)

    @torch.inference_mode()
    def by_compiler() -> Tensor:
        cos, sin = decoder.rotary(tokens)
        return compiled(F.embedding(tokens, decoder.embed), cos, sin)

    with tempfile.TemporaryDirectory() as folder:
        served = forward(fused=True, folder=Path(folder))
    return variants | {"triton": forward(fused=True), "as served": served, "torch.compile": by_compiler}


def _through(decoder: Decoder, x: Tensor, cos: Tensor, sin: Tensor, attention: NoAttention) -> Tensor:
    for layer in decoder.layers:
        x = layer(x, cos, sin, attention)
    return decoder.norm(x)
