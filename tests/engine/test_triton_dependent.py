"""Wherever the Triton kernels run, they read nothing early that a kernel in front may still write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from engine import warmup_triton
from engine.attention.triton import TritonAttention
from engine.engine import Engine
from engine.graphs_triton import TritonRunner
from engine.medusa.buckets import Buckets
from engine.model import triton_kernels
from engine.model.fused_triton import Ways
from engine.model.product_shapes import Shape
from engine.model.triton_quantize import quantize_rows, scale_sums
from engine.profiling import WorstCase
from engine.runner import Runner
from engine.types import SamplingParams
from engine.warmup_triton import PromptPass
from tests.engine.attention.test_triton import SMALL
from tests.engine.attention.triton_cases import Shape as Case, make_step
from tests.engine.conftest import TinyModel, compiles
from tests.engine.model.test_fused_triton import decoder, run_both
from tests.engine.test_step_triton import Rerun
from tests.engine.test_warmup_triton import made, runner_of
from tests.engine.triton_races import Races
from tests.support import greedy, run_all, save_model, tiny_model

pytestmark = compiles

ROWS, STREAM = Shape(16, 16, 16, 4), Shape(16, 16, 32, 4, splits=2, stages=2)

WAYS: dict[str, dict[int, Ways]] = {
    "streams": {16: Ways(STREAM, STREAM, STREAM, STREAM)},
    "some": {16: Ways(STREAM, None, None, ROWS)},
}

READS = {
    "attend_kernel": {
        *("table_ptr", "length_ptr", "depths_ptr", "ancestors_ptr", "rows_ptr", "row_of_ptr", "sink_ptr")
    },
    "join_kernel": {"length_ptr", "index_ptr"},
    "_rotate_kernel": {"position_ptr", "cos_ptr", "sin_ptr"},
    "row_kernel": {"weight_ptr", "norm_ptr"},
    "rows_kernel": {"weight_ptr", "norm_ptr"},
}
"""What kernels read before they wait; others nothing."""


def check(races: Races, *kernels: str) -> None:
    """There are no races, and these kernels had reads that could have been in one."""
    assert not races.found
    for name, early in races.early.items():
        assert early <= READS.get(name, set()), name
    for name in kernels:
        assert races.early[name]


def test_who_reads_behind_the_writer_is_found() -> None:
    """Without a product between: which tokens there are is only just being written."""
    step = make_step(Case((300, 270), 2, tree=True, computed=(1, 2), kv_heads=1, group=3))
    attention = TritonAttention(3, tiles=SMALL, processors=132)
    for between in (False, True):
        with Races() as races:
            attention.plan(step.batch, step.pool)
            if between:
                torch.mm(step.q[0], step.q[0].T)
            attention.attend(1, step.q, step.k, step.v)
        named = [text for text in races.found if "['row_of_ptr'] early, behind index_put_" in text]
        assert bool(named) != between
        assert bool(races.found) != between


def test_sinks_are_read_early() -> None:
    step = make_step(Case((300, 0), 2, tree=True, kv_heads=1, group=3, sinks=True))
    attention = TritonAttention(3, tiles=SMALL, processors=132)
    with Races() as races:
        attention.plan(step.batch, step.pool)
        torch.mm(step.q[0], step.q[0].T)
        attention.attend(1, step.q, step.k, step.v, sinks=step.sinks)
    check(races, "attend_kernel", "join_kernel")
    assert "sink_ptr" in races.early["attend_kernel"]


def test_a_kernel_in_which_nobody_waits_or_one_writes_before_is_found() -> None:
    gates = torch.randn(2, 64)
    with Races() as races, pytest.MonkeyPatch.context() as patches:
        triton_kernels.gated_activation(gates, "silu")
        assert not races.found
        patches.setattr(triton_kernels, "waits", lambda: None)
        triton_kernels.gated_activation(gates, "silu")
    assert set(races.found) == {
        "_gated_kernel writes before it waits",
        "no program of _gated_kernel waits first",
    }


@pytest.mark.parametrize(("captured", "ways"), [(True, "some"), (False, "streams")])
def test_an_engines_steps_and_prompts(
    captured: bool, ways: str, narrow: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees of different sizes, by heads and lookup; prompts in chunks; who draws and who does not."""
    settings = {"heads": str(narrow.heads), "tree": 10, "lookup": 3, "block_size": 4, "max_num_seqs": 2}
    settings |= {"max_model_len": 160, "max_step_tokens": 64, "dtype": "float32"}
    loaded = made(narrow.folder, monkeypatch, joins=False, ways=WAYS[ways], **settings)
    assert loaded.heads is not None
    loaded.heads.fuse_triton()
    requests = [greedy("a", [3, 1, 2] * 25, 3), greedy("b", [5, 9, 2, 5, 9], 4)]
    sampled = SamplingParams(temperature=0.8, max_tokens=2, seed=1, top_p=0.9)
    requests += [replace(requests[1], request_id="c", sampling=sampled)]
    with Races() as races:
        if captured:
            buckets = Buckets((1, 2), (1, 10), 64)
            engine = Engine(loaded, ahead=True, graph=Rerun, buckets=buckets)
        else:
            engine = Engine(loaded, ahead=False)
        assert isinstance(engine._runner, TritonRunner) == captured
        outputs = run_all(engine, requests)
    assert len(outputs) == 3
    check(races, "attend_kernel", "join_kernel", "_rotate_kernel")
    ours = {
        "streams": {"streamed_kernel"},
        "some": {"rows_kernel", "streamed_kernel"},
    }
    assert races.early.keys() >= ours.get(ways, set())


@pytest.mark.parametrize(
    ("family", "overrides", "rotates"),
    [
        ("llama", {}, False),
        ("qwen3", {}, True),
        ("gemma3_text", {"sliding_window": 21}, True),
        ("olmo2", {}, False),
        ("phi3", {"partial_rotary_factor": 0.5}, True),
        ("hunyuan_v1_dense", {}, True),
        ("mixtral", {"num_local_experts": 3}, True),
    ],
    ids=str,
)
@torch.inference_mode()
def test_families(family: str, overrides: dict[str, Any], rotates: bool, tmp_path: Path) -> None:
    """Norms of heads and of projections, norms behind blocks, windows, heads rotated in part."""
    model = decoder(family, overrides, tmp_path, torch.float32)
    model.fuse_triton()
    config = model.config
    tiles = {kind: tile._replace(rotates=rotates, least_keys=16) for kind, tile in SMALL.items()}
    options: dict[str, Any] = {"scale": config.attention_scale, "windows": config.windows_within(512)}
    with Races() as races:
        run_both(model, TritonAttention(config.group, tiles=tiles, processors=32, **options))
    check(races, "attend_kernel", "_rotate_kernel", "join_kernel")


@torch.inference_mode()
def test_weights_in_8_bits(tmp_path: Path) -> None:
    """Where each product is three kernels."""
    model = decoder("llama", {}, tmp_path, torch.float32)
    model.fuse_triton()

    def by_8_bits(weight: Tensor) -> Callable[..., Tensor]:
        whole, scale = quantize_rows(weight, torch.int8)

        def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
            assert residual is None
            rows, row_scale = quantize_rows(x, torch.int8, max(32, len(x)))
            sums = torch._int_mm(rows, whole.T)[: len(x)].contiguous()
            return scale_sums(sums, row_scale[: len(x)], scale.T.contiguous(), None, x.dtype)

        return product

    for layer in model.layers:
        for linear in layer.linears:
            linear.quantized = by_8_bits(linear.weight)
    with Races() as races:
        run_both(model, TritonAttention(model.config.group, tiles=SMALL, processors=32))
    check(races, "attend_kernel", "_rotate_kernel")


@torch.inference_mode()
def test_the_largest_passes(tmp_path: Path) -> None:
    model = decoder("llama", {}, tmp_path, torch.float32)
    model.fuse_triton()
    worst = WorstCase(
        model,
        TritonAttention(model.config.group, tiles=SMALL, processors=32),
        None,
        tree_size=5,
        max_num_seqs=3,
        max_step_tokens=16,
        max_prefill_tokens=40,
        block_size=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with Races() as races:
        worst.prefill()
        for step in worst.steps:
            worst.decode(*step)
    check(races, "attend_kernel", "_rotate_kernel")


PASSES = [PromptPass((3,)), PromptPass((9, 1), 70), PromptPass((40, 2), 70), PromptPass((20,), 90)]


def test_passes_over_prompts_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model("gemma3_text"), tmp_path)
    loaded = made(tmp_path, monkeypatch, joins=False, dtype="float32", max_num_seqs=2)
    runner = runner_of(loaded)
    assert isinstance(runner, Runner)
    for each in PASSES:
        with Races() as races:
            warmup_triton._run(runner, loaded, each)
        check(races, "attend_kernel", "_rotate_kernel")
        layers = loaded.decoder.fused_cuda
        assert layers is not None
        with Races(operators=True) as races:  # attention alone, which no product comes before
            warmup_triton._attend(loaded, layers, each)
        check(races, "attend_kernel", "_rotate_kernel")
