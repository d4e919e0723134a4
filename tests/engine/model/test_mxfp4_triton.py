"""Experts in 4 bits give the very numbers of the same ones dequantised."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from engine.model import mxfp4
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.experts import Experts
from engine.model.experts_config import Clamp, ExpertsConfig
from engine.model.experts_shapes import experts_shape
from engine.model.experts_triton import experts_parts, lifted, shape_for
from engine.model.weights import Checkpoint, load_weights
from tests.engine.model.mxfp4_files import published
from tests.engine.model.test_fused_triton import Recorder
from tests.interpreter import multiply_bfloat16

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)


def some(*shape: int, low: int, high: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


@triton.jit
def lift_kernel(code_ptr, scale_ptr, y_ptr, high: tl.constexpr):
    row, column = tl.arange(0, 16), tl.arange(0, 64)
    at = row[:, None] * 64 + column[None, :]
    tl.store(
        y_ptr + at, lifted(tl.load(code_ptr + at), tl.load(scale_ptr + row), y_ptr.dtype.element_ty, high)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_code_by_each_scale_is_exact(dtype: torch.dtype) -> None:
    """Every code meets every scale from those that make it subnormal to the largest that is taken."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 8)
    lowest = 0 if dtype == torch.float32 else 2  # Triton's interpreter rounds subnormal bfloat16 to zero
    for first in range(lowest, 128, 63):
        scales = (first + torch.arange(64).view(16, 4)).clamp(max=128).to(torch.uint8)
        words = mxfp4.packed_scales(scales, "x")[0].contiguous().to(DEVICE)
        packed = mxfp4.packed_codes(codes).to(DEVICE)
        halves = [torch.empty(16, 64, dtype=dtype, device=DEVICE) for _ in range(2)]
        for high, half in enumerate(halves):
            lift_kernel[(1,)](packed, words, half, high=bool(high))
        assert torch.equal(torch.cat(halves, 1).float().cpu(), mxfp4.dequantized(codes, scales))


def both(count: int, chosen: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[Experts, Experts]:
    """In 4 bits, and the same dequantised: of few magnitudes, so that sums with small integers are exact."""
    # Where alpha is 0 the gate's sigmoid is 1 / 2, and what goes into the second product has few bits too.
    of = ExpertsConfig(count, chosen, width, True, (True,), True, Clamp(7.0, 0.0))
    config: Any = SimpleNamespace(hidden_size=hidden, experts=of)
    four, whole = (Experts(config, dtype, F.silu, mxfp4=packed) for packed in (True, False))

    def share(name: str, values: Tensor) -> None:
        for experts in (four, whole):
            getattr(experts, name).data = values.to(dtype)

    share("router", some(count, hidden, low=-9, high=10) / 64)
    share("router_bias", some(count, low=-4, high=5) / 4)
    for name, parts, outputs, size in (("gate_up", 2, width, hidden), ("down", 1, hidden, width)):
        codes = some(count * parts * outputs, size, low=0, high=16, seed=1).to(torch.uint8)
        scales = some(len(codes), size // 32, low=126, high=129, seed=2).to(torch.uint8)
        share(f"{name}_bias", some(len(codes), low=-8, high=9, seed=3) / 4)
        getattr(whole, name).data = mxfp4.dequantized(codes, scales).to(dtype)
        getattr(four, name).data = mxfp4.packed_codes(codes)
        stacked = [mxfp4.packed_scales(own, "x") for own in scales.chunk(count * parts)]
        getattr(four, f"{name}_scales").data = torch.cat(stacked)
    return four.to(DEVICE), whole.to(DEVICE)


@pytest.mark.parametrize(
    ("rows", "hidden", "width", "dtype"),
    [
        (1, 64, 192, torch.float32),
        (1, 192, 128, torch.bfloat16),
        (13, 320, 64, torch.bfloat16),
        (40, 128, 320, torch.float32),
        (300, 64, 128, torch.bfloat16),
    ],
    ids=str,
)
def test_a_layer_is_equal_bit_for_bit(rows: int, hidden: int, width: int, dtype: torch.dtype) -> None:
    four, whole = both(3, 2, hidden, width, dtype)
    x = some(rows, hidden, low=-2, high=3, seed=4).to(dtype).to(DEVICE)
    found, wanted = (experts_parts(x, experts, "silu") for experts in (four, whole))
    assert wanted.abs().max() > 1
    assert torch.equal(found, wanted)


def test_quantised_with_the_rest_they_stay_as_they_are() -> None:
    four, _ = both(3, 2, 64, 64, torch.float32)
    before = four.gate_up.clone()
    four.quantize("fp8")
    four.pack()
    assert torch.equal(four.gate_up, before)
    assert four.scales is None


@torch.inference_mode()
def test_a_model_is_the_same_from_its_published_form(tmp_path: Path) -> None:
    """The file's 4 bits through all fused layers, against the plain path with its dequantised weights."""
    published(tmp_path)
    config, models = ModelConfig.from_folder(tmp_path), []
    assert config.experts is not None
    assert config.experts.mxfp4
    for packed in (True, False):
        model = Decoder(config, torch.float32, 512, mxfp4=packed)
        checkpoint = Checkpoint(tmp_path, mxfp4=packed)
        load_weights(checkpoint, dict(model.named_parameters()), model.weight_map())
        models.append(model.to(DEVICE))
    four, whole = models
    tokens, positions = torch.arange(7, device=DEVICE) * 5 % 61, torch.arange(7, device=DEVICE)
    four.fuse_triton()
    found, wanted = (model(tokens, positions, Recorder()) for model in (four, whole))
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=3e-5)


def test_random_weights_are_small() -> None:
    """Those of `load_format: dummy`, whatever their form."""
    folder_config = SimpleNamespace(
        hidden_size=64, experts=ExpertsConfig(2, 1, 64, True, (True,), True, Clamp(7.0, 1.702))
    )
    experts = Experts(folder_config, torch.float32, F.silu, mxfp4=True)  # type: ignore[arg-type]
    Decoder.randomize(
        SimpleNamespace(named_parameters=experts.named_parameters, config=None),  # type: ignore[arg-type]
        torch.device("cpu"),
    )
    assert int((experts.gate_up_scales >> 24).max()) == 120
    assert len(experts.gate_up.unique()) > 200


@pytest.mark.parametrize("rows", [1, 3, 16, 200, 8192])
@pytest.mark.parametrize(("processors", "kib"), [(132, 228), (128, 100), (40, 64)], ids=str)
def test_shapes_fit_the_device(rows: int, processors: int, kib: int) -> None:
    sizes = {"experts": 32, "chosen": 4, "hidden": 2880, "width": 2880}
    for itemsize in (2, 4):
        shape = experts_shape(
            rows, **sizes, itemsize=itemsize, weight_itemsize=0, processors=processors, shared=kib << 10
        )
        assert shape.rows <= (16 if itemsize == 4 else 128 if kib == 228 else 64)  # or registers spill
        for tile, gates in ((shape.gate_up, 2), (shape.down, 1)):
            stage = (gates * tile.outputs + 2 * shape.rows * itemsize) * 64
            assert tile.channels == 64  # of bytes, which have a word of scales
            assert tile.stages >= 2
            assert (tile.warps == 2) == (tile.outputs <= 32 and itemsize == 2)
            assert tile.stages * stage <= (kib - 1) << 10


def test_four_bits_have_shapes_of_their_own() -> None:
    four, whole = both(3, 2, 64, 192, torch.bfloat16)
    assert shape_for(four, 9) != shape_for(whole, 9)


def test_a_clamp_does_not_hide_what_is_not_a_number() -> None:
    _, whole = both(3, 3, 64, 64, torch.float32)
    x = some(2, 64, low=-2, high=3, seed=4).float().to(DEVICE)
    for row in (5, 64 + 5):  # of the first expert's gates, and of its ups
        kept = whole.gate_up[row].clone()
        whole.gate_up[row] = torch.nan
        assert experts_parts(x, whole, "silu").isnan().all(1).sum() == 2
        whole.gate_up[row] = kept
