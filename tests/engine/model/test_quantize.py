"""int8 linears: exact sums, rows that know nothing of each other, and a model that still answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionInput
from engine.cache.pool import KVPool
from engine.errors import ConfigError
from engine.model import quantize
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.layers import Linear
from engine.model.quantize import Int8Weight, blocked_runs_here, check_int8
from tests.support import greedy, make_engine, run_all, save_model, tiny_llama


def int8_runs_here() -> bool:
    try:
        check_int8(torch.device("cpu"))
    except ConfigError:
        return False
    return True


needs_int8 = pytest.mark.skipif(not int8_runs_here(), reason="this CPU has no AVX-512 VNNI")


def choose_kernel(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """One kernel for weights of any size (but for blocked an odd number of input channels)."""
    monkeypatch.setattr(quantize, "_LARGE", 0 if kernel == "packed" else 1 << 60)
    monkeypatch.setattr(quantize, "blocked_runs_here", lambda: kernel == "blocked")


@pytest.fixture(params=["plain", "packed", "blocked"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "blocked" and not blocked_runs_here():
        pytest.skip("this CPU's products are torch's")
    choose_kernel(monkeypatch, request.param)
    return str(request.param)


def by_hand(x: Tensor, weight: Tensor) -> Tensor:
    """The definition, in float64: round both sides, multiply exactly, scale."""
    weight_scale = weight.abs().amax(1) / 127
    x_scale = x.abs().amax(-1, keepdim=True) / 127
    quantized = (weight / weight_scale[:, None]).round().double()
    return (x / x_scale).round().double() @ quantized.T * x_scale * weight_scale


@needs_int8
@pytest.mark.parametrize("shape", [(96, 64), (40, 144), (130, 33)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_definition_and_near_the_float_product(
    kernel: str, shape: tuple[int, int], rows: int, bias: bool
) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(shape), torch.randn(rows, shape[1])
    offset = torch.randn(shape[0]) if bias else None
    residual = torch.randn(rows, shape[0])
    linear = Int8Weight(weight, offset, rotate=False)
    wanted = by_hand(x, weight) + (0 if offset is None else offset)
    # A product that falls on a rounding boundary may go the other way: one step of one weight.
    torch.testing.assert_close(linear(x).double(), wanted, atol=0.03, rtol=0)
    assert (linear(x).double() - wanted).abs().mean() < 1e-3
    assert torch.equal(linear(x, residual), linear(x) + residual)
    exact = x @ weight.T + (0 if offset is None else offset)
    assert (linear(x) - exact).norm() / exact.norm() < 0.02


@needs_int8
@pytest.mark.parametrize("channels", [96, 576, 33])
def test_the_rotation_keeps_the_product_and_tames_outliers(kernel: str, channels: int) -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(80, channels), torch.randn(9, channels)
    x[:, 7] *= 60
    exact = x @ weight.T
    error = {
        rotate: (Int8Weight(weight, None, rotate=rotate)(x) - exact).norm() / exact.norm()
        for rotate in (False, True)
    }
    assert error[True] < 0.02
    if channels % 2 == 0:
        assert error[True] < error[False] / 2


@needs_int8
@pytest.mark.parametrize("rotate", [False, True])
def test_a_row_does_not_depend_on_its_neighbours_by_a_single_bit(kernel: str, rotate: bool) -> None:
    torch.manual_seed(2)
    linear = Int8Weight(torch.randn(80, 576), torch.randn(80), rotate=rotate)
    x = torch.randn(64, 576)
    alone = linear(x[5:6])
    for rows in (2, 8, 9, 16, 33, 64):
        for place in (0, 1, rows - 1):
            company = 30 * torch.randn(rows, 576)
            company[place] = x[5]
            assert torch.equal(linear(company)[place], alone[0]), (rows, place)
    loud = x.clone()
    loud[:5] *= 30
    loud[6:] *= 30
    assert torch.equal(linear(loud)[5], alone[0])
    assert torch.equal(linear(x.view(4, 16, 576)).view(64, 80), linear(x))


@needs_int8
def test_zeros_give_zeros_and_what_is_not_finite_stays_in_its_row(kernel: str) -> None:
    linear = Int8Weight(torch.randn(40, 24), None, rotate=False)
    x = torch.randn(5, 24)
    x[1], x[2, 3], x[3, 3] = 0.0, float("nan"), float("inf")
    y = linear(x)
    assert not y[1].any()
    assert not y[2].isfinite().any()
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 4]], linear(x[[0, 4]]))
    assert not Int8Weight(torch.zeros(8, 24), None, rotate=True)(x[:2]).any()


@needs_int8
def test_a_requests_text_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """Three requests in one batch; the prompts of two are replaced, and their hidden states made 30 times
    larger by an embedding that is: the third's text stays."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[40:] *= 30
    folder = save_model(model, tmp_path)
    mine = [5, 9, 33, 12, 7]
    quiet = [[1, 2, 3, 4], [8, 30, 11, 21, 6, 2]]
    loud = [[50, 60, 41, 44], [47, 58, 59, 43, 42, 55]]
    texts = []
    for others in ([], quiet, loud):
        engine = make_engine(folder, quantization="int8", tree="off", prefix_caching=False)
        assert engine.info.quantization == "int8"
        prompts = [mine, *others]
        outputs = run_all(engine, [greedy(f"r{i}", prompt, 40) for i, prompt in enumerate(prompts)])
        texts.append(outputs["r0", 0])
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 40


@needs_int8
@torch.inference_mode()
def test_a_sequence_does_not_depend_on_its_neighbours_by_a_single_bit(tmp_path: Path) -> None:
    """The whole decoder: one new row behind contexts of many lengths, in any company."""
    with torch.inference_mode(False):
        engine = make_engine(save_model(tiny_llama(), tmp_path), quantization="int8", block_size=16)
    runner = engine._runner
    decoder, pool, attention = runner._decoder, runner._pool, runner._attention
    pool.data.normal_(generator=torch.Generator().manual_seed(4))
    lengths, blocks = [40, 150, 33, 255, 300, 16, 430, 90], 30
    tokens = torch.arange(8) + 20

    def run(chosen: list[int]) -> Tensor:
        sequences = torch.tensor(chosen)
        tables = sequences[:, None] * blocks + torch.arange(blocks) + 1
        cached = torch.tensor(lengths)[sequences]
        rows = tables.gather(1, cached[:, None] // 16) * 16 + cached[:, None] % 16
        attention.plan(AttentionInput(tables, cached, rows, int(cached.max()) + 1), pool)
        return decoder.logits(decoder(tokens[sequences], cached, attention))

    together = run(list(range(8)))
    for company in ([0], [4], [7, 1], [5, 4, 3, 2], [6, 0, 2], list(range(7, -1, -1))):
        assert torch.equal(run(company), together[company]), company


@needs_int8
def test_every_linear_is_converted_and_the_tied_embedding_stays_float(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(save_model(tiny_llama(tie_word_embeddings=True), tmp_path))
    decoder = Decoder(config, torch.float32, 64)
    torch.nn.init.normal_(decoder.embed)
    for module in decoder.modules():
        if isinstance(module, Linear) and module is not decoder.lm_head:
            torch.nn.init.normal_(module.weight)
    hidden = torch.randn(3, config.hidden_size)
    wanted = hidden @ decoder.embed.T
    decoder.quantize("int8")
    decoder.pack()
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    assert all(linear.quantized is not None and not linear.weight.numel() for linear in linears)
    assert decoder.embed.shape == (config.vocab_size, config.hidden_size)
    assert (decoder.logits(hidden) - wanted).norm() / wanted.norm() < 0.02


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda"):
        check_int8(torch.device("cuda"))
    with pytest.raises(ConfigError, match="float32"):
        Linear(4, 4, bias=False, dtype=torch.bfloat16).quantize("int8", rotate=True)


def plain_decoder(tmp_path: Path, **options: Any) -> Decoder:
    """A small Llama in int8 with random weights, an outlier channel among them."""
    config = ModelConfig.from_folder(save_model(tiny_llama(**options), tmp_path))
    decoder = Decoder(config, torch.float32, 64)
    torch.manual_seed(7)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
        elif "lm_head" not in name:
            parameter.data.normal_(std=0.2)
    decoder.embed.data[:, 3] *= 20
    decoder.quantize("int8")
    return decoder


class Recorder:
    """Attention that mixes nothing: each head's output is its query plus the keys and values it is given."""

    def plan(self, batch: AttentionInput, pool: KVPool) -> None:
        """Nothing is shared by its layers."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        return (q + k.sum(1, keepdim=True) - v.mean(1, keepdim=True)).flatten(1) / (1 + layer)


@needs_int8
@pytest.mark.parametrize("rows", [1, 3, 17])
@torch.inference_mode()
def test_the_fused_layers_compute_what_the_single_operators_do(tmp_path: Path, rows: int) -> None:
    with torch.inference_mode(False):
        decoder = plain_decoder(tmp_path)
    fused = decoder.fused
    assert fused is not None
    tokens, positions = torch.arange(rows) + 2, torch.arange(rows) + 5
    got = decoder(tokens, positions, Recorder())
    decoder.fused = None
    wanted = decoder(tokens, positions, Recorder())
    # A value on a rounding boundary may go the other way, in one of 127 levels.
    assert (got - wanted).norm() / wanted.norm() < 5e-3
    for index, parameter in enumerate(fused._layers):
        parameter.mlp_norm[0] += 0.5  # a kernel that read no norm would pass above on norms of one
        decoder.fused = fused
        changed = decoder(tokens, positions, Recorder())
        assert (changed - wanted).norm() / wanted.norm() > 1e-4, index
        parameter.mlp_norm[0] -= 0.5


@needs_int8
@torch.inference_mode()
def test_the_fused_layers_keep_rows_apart_and_what_is_not_finite_in_its_row(tmp_path: Path) -> None:
    with torch.inference_mode(False):
        decoder = plain_decoder(tmp_path)
    tokens, positions = torch.arange(9) + 2, torch.arange(9)
    whole = decoder(tokens, positions, Recorder())
    for part in ([4], [8, 0], [3, 2, 5, 7]):
        assert torch.equal(decoder(tokens[part], positions[part], Recorder()), whole[part]), part
    decoder.embed[tokens[2], 0], decoder.embed[tokens[6], 5] = float("nan"), float("inf")
    broken = decoder(tokens, positions, Recorder())
    others = [0, 1, 3, 4, 5, 7, 8]
    assert torch.equal(broken[others], whole[others])
    assert not broken[[2, 6]].isfinite().any()


@needs_int8
def test_only_the_plain_shape_is_fused(tmp_path: Path) -> None:
    assert plain_decoder(tmp_path, attention_bias=True).fused is None
