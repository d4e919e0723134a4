"""Linears in 8 bits with torchao's weights: on a GPU, or by the same numbers on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionInput
from engine.cache.pool import KVPool
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.loader import load
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.layers import Linear
from engine.model.quantize_cuda import RowwiseWeight, check_quantized
from tests.support import save_model, tiny_llama

pytest.importorskip("torchao")

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def levels(x: Tensor, kind: str, int8_largest: float = 127.0) -> tuple[Tensor, Tensor]:
    """Each row's values in 8 bits, and its scale, in float64: the definition."""
    largest = 448.0 if kind == "fp8" else int8_largest
    scale = x.double().abs().amax(1, keepdim=True) / largest
    values = (x.double() / scale).clamp(-448 if kind == "fp8" else -128, 448 if kind == "fp8" else 127)
    return (values.float().to(torch.float8_e4m3fn).double() if kind == "fp8" else values.round()), scale


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_definition_and_near_the_float_product(kind: str, rows: int, bias: bool) -> None:
    weight, x = random(96, 160), random(rows, 160, seed=1)
    offset = random(96, seed=2) if bias else None
    # torchao shares -128 to 127 among both signs.
    (q, q_scale), (w, w_scale) = levels(x, kind), levels(weight, kind, 127.5)
    wanted = q @ w.T * q_scale * w_scale.T + (0 if offset is None else offset.double())
    linear = RowwiseWeight(weight, offset, kind)
    y = linear(x)
    assert (y.shape, y.dtype) == ((rows, 96), torch.bfloat16)
    # A value on a rounding boundary may go the other way, and bf16 rounds what comes out.
    assert (y.double() - wanted).norm() / wanted.norm() < (5e-3 if kind == "int8" else 8e-3)
    exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    assert (y.double() - exact).norm() / exact.norm() < (0.05 if kind == "fp8" else 0.02)
    residual = random(rows, 96, seed=3)
    assert torch.equal(linear(x, residual), y + residual)
    assert torch.equal(linear(x.view(1, rows, 160))[0], y)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_neighbours_change_no_bit_of_a_row(kind: str) -> None:
    linear = RowwiseWeight(random(96, 160), None, kind)
    x = random(24, 160, seed=1)
    alone = linear(x[3:4])
    x[:3] *= 1000
    x[4:] *= 1000
    x[7, 0] = float("nan")
    together = linear(x)
    if kind == "int8":
        assert torch.equal(together[3], alone[0])
    else:  # sums of floats, whose order may depend on the number of rows; the scale does not
        torch.testing.assert_close(together[3], alone[0], atol=0.02, rtol=0.01)
    assert not together[7].isfinite().any()


def test_zeros_give_zeros() -> None:
    for kind in ("fp8", "int8"):
        assert not RowwiseWeight(random(32, 32), None, kind)(random(3, 32) * 0).any()


@pytest.mark.parametrize(("kind", "shape"), [("fp8", (61, 32)), ("fp8", (64, 24)), ("int8", (60, 32))])
def test_a_weight_of_odd_size_is_refused(kind: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"multiples of .*leave it out"):
        RowwiseWeight(random(*shape), None, kind)


class Mean:
    """Attention that mixes nothing."""

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        """Nothing is shared by its layers."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        return (q + k.mean(1, keepdim=True) - v.mean(1, keepdim=True)).flatten(1)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@torch.inference_mode()
def test_a_whole_decoder_is_converted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_folder(save_model(tiny_llama(vocab_size=64), tmp_path))
    with torch.inference_mode(False):
        decoder = Decoder(config, torch.bfloat16, 64).to(DEVICE)
        torch.manual_seed(0)
        for name, parameter in decoder.named_parameters():
            parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.3)
    wanted = run(decoder)
    plain = copy.deepcopy(decoder)
    for module in decoder.modules():
        if isinstance(module, Linear):
            # What `Decoder.quantize` does on CUDA.
            module.quantized = RowwiseWeight(module.weight, module.bias, kind)
            module._drop_weight()
    if DEVICE.type == "cuda":
        plain.quantize(kind)
        assert torch.equal(run(plain), run(decoder))
    assert not [m for m in decoder.modules() if isinstance(m, Linear) and m.weight.numel()]
    got = run(decoder)
    assert got.isfinite().all()
    error = float((got - wanted).norm() / wanted.norm())
    assert 1e-4 < error < (0.2 if kind == "fp8" else 0.1)


def run(decoder: Decoder) -> Tensor:
    tokens = torch.arange(9, device=DEVICE)
    return decoder.logits(decoder(tokens, tokens, Mean()))


def test_what_cannot_run_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="fp8 runs on CUDA"):
        check_quantized("fp8", cpu, torch.bfloat16)
    save_model(tiny_llama(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken, and not read")
    with pytest.raises(ConfigError, match="fp8 runs on CUDA"):
        load(EngineConfig(model=str(tmp_path), device="cpu", quantization="fp8"), progress=False)


@needs_cuda
def test_fp8_takes_bfloat16_only() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        check_quantized("fp8", DEVICE, torch.float16)
    check_quantized("int8", DEVICE, torch.float16)
