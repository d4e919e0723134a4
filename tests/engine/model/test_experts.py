"""A layer's experts: which they are, and what they give, against float64 and one row at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ModelError, UnsupportedModelError
from engine.model.config import ModelConfig
from engine.model.experts import Experts, route
from engine.model.experts_config import ExpertsConfig
from engine.model.layers import Linear
from tests.engine.model.test_quantize import needs_int8
from tests.support import tiny_model

HIDDEN, WIDTH, COUNT, CHOSEN = 32, 24, 7, 3


def config_of(family: str, **overrides: Any) -> Any:
    """transformers' own, of a model that would be saved with it."""
    model = tiny_model(family, **overrides)
    model.config.architectures = [type(model).__name__]
    return model.config


def gpt_oss() -> Experts:
    """With biases, and a clamp that many gates and ups are beyond."""
    config = config_of(
        "gpt_oss",
        num_local_experts=COUNT,
        num_experts_per_tok=CHOSEN,
        intermediate_size=WIDTH,
        swiglu_limit=1.5,
    )
    return filled(Experts(ModelConfig.from_hf(config), torch.float32, F.silu))


def experts(dtype: torch.dtype = torch.float32, *, renormalised: bool = True) -> Experts:
    config = config_of(
        "qwen3_moe",
        num_experts=COUNT,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=WIDTH,
        norm_topk_prob=renormalised,
    )
    return filled(Experts(ModelConfig.from_hf(config), dtype, F.silu))


def filled(found: Experts) -> Experts:
    generator = torch.Generator().manual_seed(3)
    for parameter in found.parameters():
        parameter.data.normal_(std=0.4, generator=generator)
    return found


def some_rows(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(5))


def by_definition(layer: Experts, x: Tensor) -> Tensor:
    """Row by row and expert by expert, in float64."""
    gate_up = layer.gate_up.double().view(COUNT, 2, WIDTH, HIDDEN)
    down = layer.down.double().view(COUNT, HIDDEN, WIDTH)
    y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    biases = [torch.zeros(size) for size in (COUNT, COUNT * 2 * WIDTH, COUNT * HIDDEN)]
    if layer.router_bias is not None:
        biases = [layer.router_bias, layer.gate_up_bias, layer.down_bias]
    router_bias, gate_up_bias, down_bias = (bias.double().view(COUNT, -1) for bias in biases)
    for row, values in enumerate(x.double()):
        shares = (layer.router.double() @ values + router_bias[:, 0]).softmax(0)
        best = shares.argsort(descending=True)[:CHOSEN]
        total = shares[best].sum() if layer.renormalised else 1.0
        for expert in best:
            gate, up = gate_up[expert] @ values + gate_up_bias[expert].view(2, WIDTH)
            inner = F.silu(gate) * up
            if layer.clamp is not None:
                gate, up = gate.clamp(max=layer.clamp.limit), up.clamp(-layer.clamp.limit, layer.clamp.limit)
                inner = (up + 1) * gate / (1 + torch.exp(-layer.clamp.alpha * gate))
            y[row] += shares[expert] / total * (down[expert] @ inner + down_bias[expert])
    return y


@pytest.mark.parametrize("kind", [True, False, "gpt_oss"])
def test_a_row_is_the_weighted_sum_of_its_experts(kind: bool | str) -> None:
    layer, x = gpt_oss() if kind == "gpt_oss" else experts(renormalised=bool(kind)), some_rows(19)
    wanted = by_definition(layer, x)
    torch.testing.assert_close(layer(x).double(), wanted, atol=1e-5, rtol=1e-5)
    given = {"renormalised": layer.renormalised, "bias": layer.router_bias}
    chosen, weights = route(x, layer.router, CHOSEN, **given)
    found = layer.everywhere(x, chosen, weights)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    layer.pack()
    torch.testing.assert_close(layer(x).double(), wanted, atol=1e-5, rtol=1e-5)


def test_in_16_bits_it_rounds_and_no_more() -> None:
    layer, x = experts(torch.bfloat16), some_rows(19).bfloat16()
    found, wanted = layer(x).double(), by_definition(layer, x)
    assert (found - wanted).norm() / wanted.norm() < 0.01


def test_experts_that_nobody_chose_do_nothing() -> None:
    """All rows to the same ones, and none of the others' weights is even looked at."""
    layer, x = experts(), some_rows(11)
    layer.router.data[:] = 0.0
    layer.router.data[:CHOSEN] = 1.0
    x = x.abs()
    wanted = by_definition(layer, x)
    layer.gate_up.data[CHOSEN * 2 * WIDTH :] = torch.nan
    torch.testing.assert_close(layer(x).double(), wanted, atol=1e-5, rtol=1e-5)
    chosen, weights = route(x, layer.router, CHOSEN, renormalised=True)
    assert layer.everywhere(x, chosen, weights).isfinite().all()


def test_a_row_that_is_not_finite_stays_alone() -> None:
    layer, x = experts(), some_rows(6)
    whole = layer(x)
    x[2, 3] = torch.nan
    found = layer(x)
    others = [0, 1, 3, 4, 5]
    assert not found[2].isfinite().all()
    torch.testing.assert_close(found[others], whole[others])


@needs_int8
@pytest.mark.parametrize("make", [experts, gpt_oss])
def test_in_int8_a_row_is_the_same_alone(make: Callable[[], Experts]) -> None:
    layer, x = make(), some_rows(40)
    plain = layer(x)
    layer.quantize("int8")
    found = layer(x)
    assert 0 < (found - plain).norm() / plain.norm() < 0.06
    for row in range(0, len(x), 7):
        assert torch.equal(layer(x[row : row + 1])[0], found[row])


@needs_int8
def test_int8_mixes_channels_of_which_one_is_far_larger() -> None:
    """Or it alone would decide how coarsely all others are rounded."""
    x, off = some_rows(40), []
    x[:, 3] *= 50.0
    for mixed in (True, False):
        layer = experts()
        plain = layer(x)
        if mixed:
            layer.quantize("int8")
        else:
            layer._split(lambda linear: linear.quantize("int8", rotate=False))
        off.append(float((layer(x) - plain).norm() / plain.norm()))
    assert off[0] < 0.7 * off[1]


@pytest.mark.parametrize("quantized", [False, pytest.param(True, marks=needs_int8)])
def test_each_weight_is_held_once(quantized: bool) -> None:
    """Reordered or in 8 bits, and no longer as it was."""
    layer = experts()
    if quantized:
        layer.quantize("int8")
    layer.pack()
    layer.pack()
    assert layer.gate_up.numel() == layer.down.numel() == 0
    assert len(layer._each) == COUNT
    for linear in (linear for pair in layer._each for linear in pair):
        assert (linear.quantized is not None) == quantized
        reordered = Linear(8, 8, bias=False, dtype=torch.float32)
        reordered.pack()  # where oneDNN can
        if quantized or reordered.packed is not None:
            assert linear.weight.numel() == 0
        assert (linear.packed is not None) == (reordered.packed is not None and not quantized)


def test_rows_go_to_the_same_experts_in_any_batch() -> None:
    """Of router rows that are nearly alike: in float32 the order of a sum would decide."""
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(1, 576, generator=generator).repeat(8, 1)
    router += torch.randn(router.shape, generator=generator) * 1e-6
    x = torch.randn(200, 576, generator=generator)
    together, shares = route(x, router, 2, renormalised=True)
    for row in range(200):
        alone, share = route(x[row : row + 1], router, 2, renormalised=True)
        assert torch.equal(alone[0], together[row])
        assert torch.equal(share[0], shares[row])


def test_more_experts_than_there_are_is_an_error() -> None:
    config = config_of("mixtral", num_local_experts=4)
    wanted = ExpertsConfig(count=4, chosen=2, width=48, renormalised=True, layers=(True, True))
    assert ModelConfig.from_hf(config).experts == wanted
    config.num_experts_per_tok = 5
    with pytest.raises(UnsupportedModelError, match="5 of 4 experts"):
        ModelConfig.from_hf(config)


def test_a_config_that_says_nothing_sensible_is_an_error(tmp_path: Path) -> None:
    config = config_of("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    config.decoder_sparse_step = 0
    with pytest.raises(UnsupportedModelError, match="decoder_sparse_step is 0"):
        ModelConfig.from_hf(config)
    stated = config.to_dict() | {"decoder_sparse_step": 1, "num_experts_per_tok": None}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ModelError, match=r"cannot read the model config(?s:.)*num_experts_per_tok"):
        ModelConfig.from_folder(tmp_path)
    stated |= {"num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": None}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ModelError, match="holds what it should not: TypeError"):
        ModelConfig.from_folder(tmp_path)


def test_what_the_reference_would_clip_is_refused() -> None:
    config = config_of("olmoe", num_experts=4, num_experts_per_tok=2, hidden_size=64)
    config.clip_qkv = 8.0
    with pytest.raises(UnsupportedModelError, match="clip_qkv"):
        ModelConfig.from_hf(config)
