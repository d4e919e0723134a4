"""Our int8 products against torch's: equal to the last bit, for any shape and on any number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model import quantize
from engine.model.quantize import Int8Weight, blocked_runs_here
from tests.support import greedy, make_engine, run_all, save_model, tiny_llama

if not blocked_runs_here():
    pytest.skip("this CPU's products are torch's", allow_module_level=True)

from engine.model.int8_products import BlockedWeight

SHAPES = [(960, 576), (576, 1536), (33, 4), (1, 8), (31, 60), (65, 12), (64, 1028)]
ROWS = [*range(1, 27), 64, 100]


def random8(*shape: int) -> Tensor:
    """Of all magnitudes; the first row and channel of the largest, so that sums reach as far as they can."""
    found = torch.randint(-127, 128, shape, dtype=torch.int8)
    found[0] = 127
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(threads: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = random8(*shape)
    blocked = BlockedWeight(weight)
    for rows in ROWS:
        a, out = random8(rows, shape[1]), torch.empty(rows, shape[0], dtype=torch.int32)
        blocked.sums(a, out)()
        assert torch.equal(out, torch._int_mm(a, weight.t())), rows
        assert torch.equal(out.double(), a.double() @ weight.double().T), rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled_products_have_torchs_bits(threads: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight, weight_scale = random8(*shape), torch.rand(shape[0])
    blocked = BlockedWeight(weight)
    for rows in ROWS:
        a, scale = random8(rows, shape[1]), torch.rand(rows, 1)
        scale[-1] = float("nan")  # as of a row that is not finite
        wanted = torch.mul(torch._int_mm(a, weight.t()), weight_scale).mul_(scale)
        assert torch.equal(blocked.scaled(a, weight_scale, scale).nan_to_num(7e9), wanted.nan_to_num(7e9)), (
            rows
        )


def test_a_prepared_call_reads_what_its_rows_hold_then() -> None:
    weight, a = random8(40, 64), random8(3, 64)
    out = torch.empty(3, 40, dtype=torch.int32)
    call = BlockedWeight(weight).sums(a, out)
    call()
    a.copy_(random8(3, 64).neg())
    call()
    assert torch.equal(out, torch._int_mm(a, weight.t()))


def test_rows_need_not_be_contiguous() -> None:
    weight, wide = random8(40, 64), random8(5, 200)
    a, scales = wide[:, 100:164], torch.rand(40)
    found = BlockedWeight(weight).scaled(a, scales, torch.ones(5))
    assert torch.equal(found, torch._int_mm(a.contiguous(), weight.t()) * scales)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("channels", [96, 97, 576])
def test_a_machine_without_the_instructions_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, channels: int, large: bool
) -> None:
    torch.manual_seed(2)
    weight, bias, x = torch.randn(130, channels), torch.randn(130), torch.randn(21, channels)
    monkeypatch.setattr(quantize, "_LARGE", 0 if large else 1 << 60)
    ours = Int8Weight(weight, bias, rotate=True)
    assert (ours._blocked is not None) == (channels % 4 == 0)
    monkeypatch.setattr(quantize, "blocked_runs_here", lambda: False)
    torchs = Int8Weight(weight, bias, rotate=True)
    assert torchs._blocked is None
    assert torch.equal(ours(x), torchs(x))


def test_a_model_answers_the_same_on_a_machine_without_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_model(tiny_llama(), tmp_path)
    texts = []
    for here in (True, False):
        monkeypatch.setattr(quantize, "blocked_runs_here", lambda here=here: here)
        engine = make_engine(folder, quantization="int8", tree="off")
        decoder = engine._runner._decoder
        assert decoder.fused is not None
        assert (decoder.lm_head.quantized._blocked is not None) == here
        texts.append(run_all(engine, [greedy(f"r{i}", [5 + i, 9, 33, 12, 7], 30) for i in range(5)]))
    assert texts[0] == texts[1]


def test_numba_compiling_for_another_cpu_means_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import cpu_team

    assert cpu_team.compiles_for("avx512vnni")
    assert not cpu_team.compiles_for("no-such-instructions")
    monkeypatch.setattr(cpu_team.config, "CPU_NAME", "generic")
    assert not cpu_team.compiles_for("avx512vnni")


def test_amx_means_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    blocked_runs_here.cache_clear()
    try:
        assert not blocked_runs_here()
    finally:
        blocked_runs_here.cache_clear()
