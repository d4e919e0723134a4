"""Weights that attention brings nearer while it leaves the memory idle: on Triton's interpreter, or a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from engine import triton_dependent
from engine.attention.base import AttentionInput, Rotary
from engine.attention.triton import TritonAttention
from engine.cache.pool import KVPool
from engine.model import products_tuning
from engine.model.fused_triton import Ways
from engine.model.products_tuning import ROWS, tune_products
from engine.triton_dependent import asks_in_turns, lines_of
from tests.engine.attention.triton_cases import Shape, make_step
from tests.engine.model.test_fused_triton import DEVICE, decoder

pytestmark = pytest.mark.cuda


@triton.jit
def _ask_kernel(pointer, lines, LINES: tl.constexpr):  # noqa: N803
    asks_in_turns(pointer, lines, LINES)


@triton.jit
def _counts(pointer, wanted):
    """In the place of `prefetches`: adds 1 to the first 32 bits of each line."""
    tl.atomic_add(pointer.to(tl.pointer_type(tl.int32), bitcast=True), 1, mask=wanted)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU runs what is compiled")
@pytest.mark.parametrize(
    ("grid", "lines"), [((3, 2, 2), 77), ((1, 1, 1), 20), ((4, 8, 1), 5), ((2, 1, 1), 0)]
)
def test_all_programs_together_ask_once_for_each_line(
    grid: tuple[int, int, int], lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_dependent, "prefetches", _counts)
    weight = torch.zeros(100, 64, dtype=torch.int16)
    _ask_kernel[grid](weight, lines, LINES=4)
    counts = weight.view(torch.int32)
    assert counts[:lines, 0].tolist() == [1] * lines
    assert counts.sum() == lines


def test_so_many_lines_of_a_weight() -> None:
    weight = torch.empty(64, 128, dtype=torch.bfloat16)  # 128 lines
    assert [lines_of(weight, size) for size in (0, 127, 1280, 1 << 20)] == [0, 0, 10, 128]
    assert lines_of(weight.float(), 1 << 20) == lines_of(None, 1 << 20) == 0


@torch.inference_mode()
def test_attention_is_the_same_whatever_it_asks_for() -> None:
    step = make_step(Shape((300, 17), 8, tree=True, group=3, dtype=torch.float16))
    attention = TritonAttention(3, processors=132, **step.options())
    attention.plan(step.batch, step.pool)
    weight = torch.randn(1000, 500, dtype=torch.float16, device=DEVICE)
    plain = attention.attend(1, step.q, step.k, step.v)
    for size in (1000, 1 << 30):
        assert torch.equal(attention.attend(1, step.q, step.k, step.v, None, (weight, size)), plain)


class Asked:
    """A backend that notes what it is asked to bring nearer."""

    rotates = False

    def __init__(self) -> None:
        self.ahead: list[tuple[Tensor | None, int]] = []

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        """Nothing is shared by its layers."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Rotary | None = None,
        ahead: tuple[Tensor | None, int] = (None, 0),
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert rotary is None
        self.ahead.append(ahead)
        return q.flatten(1)


@torch.inference_mode()
def test_attention_asks_for_the_product_behind_it(tmp_path: Path) -> None:
    model = decoder("llama", {"num_hidden_layers": 2}, tmp_path, torch.float32)
    model.fuse_triton()
    assert model.fused_cuda is not None
    model.fused_cuda.ways = {1: Ways(during=4096), 8: Ways()}
    for rows, size in ((1, 4096), (5, 0)):
        asked, tokens = Asked(), torch.arange(rows, device=DEVICE)
        model(tokens, tokens, asked)
        assert [bytes_ for _, bytes_ in asked.ahead] == [size, size]
        weights = [layer.o_proj.weight if size else None for layer in model.layers]
        assert all(found is wanted for (found, _), wanted in zip(asked.ahead, weights, strict=True))


@pytest.mark.parametrize("early", [True, False])
@torch.inference_mode()
def test_how_much_is_asked_for_is_measured_where_kernels_begin_early(
    early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":
        properties = SimpleNamespace(name="a GPU", multi_processor_count=4)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(products_tuning, "launched_early", lambda device: (early, {}))
    monkeypatch.setattr(products_tuning, "side_by_side", lambda ways, here: None)
    model = decoder("llama", {}, tmp_path / "model", torch.bfloat16)
    model.fuse_triton()
    layers = model.fused_cuda
    assert layers is not None
    attention = TritonAttention(layers.layers[0].num_heads // layers.layers[0].num_kv_heads, processors=4)
    asked: list[int] = []

    def clock(run: Any) -> float:
        if len(run.args) == 2:  # without attention
            return 1.0
        rows = ROWS[len(asked) // 4]
        asked.extend(run.args)
        if rows == 8:
            run()
        return {0: 3.0, 8 << 20: 2.0, 16 << 20: 1.0 if rows < 64 else 4.0, 32 << 20: 2.0}[asked[-1]]

    tune_products(layers, tmp_path / "kept", attention, clock=clock)
    found = {rows: ways.during for rows, ways in layers.ways.items()}
    if not early:
        assert set(found.values()) == {0}
        assert not asked
        return
    assert asked == [0, 8 << 20, 16 << 20, 32 << 20] * len(ROWS)
    assert found == {rows: (16 if rows < 64 else 8) << 20 for rows in ROWS}
    (file,) = (tmp_path / "kept").iterdir()
    assert json.loads(file.read_text())["attention"] == [2, 16]  # K/V heads and their channels
    kept, layers.ways = layers.ways, {}
    tune_products(layers, tmp_path / "kept", attention, clock=lambda run: pytest.fail("measured again"))
    assert layers.ways == kept
