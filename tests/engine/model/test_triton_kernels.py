"""The kernels between two products, against float64, on a GPU or on Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import Rotary
from engine.model.families import RopeConfig
from engine.model.layers import HeadNorm, RotaryTable
from tests.engine.conftest import compiles

pytestmark = pytest.mark.cuda

kernels = pytest.importorskip("engine.model.triton_kernels", exc_type=ImportError)
eight_bits = pytest.importorskip("engine.model.triton_quantize", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""A relative error a few roundings of the dtype cannot reach, measured as a norm."""


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def near(got: Tensor, wanted: Tensor, factor: float = 1.0) -> None:
    """`got` is `wanted` (float64) but for roundings of its own dtype."""
    assert got.isfinite().all()
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < factor * ROUNDING[got.dtype], float(error)


def normed(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    x, weight = x.double(), weight.double() + offset
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 576, 960])
@pytest.mark.parametrize("offset", [False, True])
def test_rms_norm(size: int, dtype: torch.dtype, offset: bool) -> None:
    x, weight = random(5, size, dtype=dtype) * 3, random(size, dtype=dtype, seed=1)
    before = x.clone()
    near(kernels.rms_norm(x, weight, 1e-5, offset=offset), normed(x, weight, 1e-5, offset))
    assert torch.equal(x, before)
    # Small rows, where eps counts.
    small = x * 1e-3
    near(kernels.rms_norm(small, weight, 1e-5, offset=offset), normed(small, weight, 1e-5, offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scale", "normed_too", "offset"), [(1.0, True, False), (2.6, True, True), (0.3, False, False)]
)
def test_embed(scale: float, normed_too: bool, offset: bool, dtype: torch.dtype) -> None:
    size, table = 576, random(50, 576, dtype=dtype)
    weight = random(size, dtype=dtype, seed=1) if normed_too else None
    tokens = torch.tensor([49, 0, 7, 7], device=DEVICE)
    x, y = kernels.embed(tokens, table, scale, weight, 1e-3, offset=offset)
    near(x, table[tokens].double() * scale)
    if scale == 1.0:
        assert torch.equal(x, table[tokens])
    if weight is None:
        assert y is x
    else:
        near(y, normed(x, weight, 1e-3, offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", ["pre", "post", "both"])
@pytest.mark.parametrize(("offset", "scale"), [(False, 1.0), (True, 0.22)])
def test_add_norm(flags: str, offset: bool, scale: float, dtype: torch.dtype) -> None:
    size, eps = 576, 1e-3
    x, out = random(7, size, dtype=dtype), random(7, size, dtype=dtype, seed=1)
    after = random(size, dtype=dtype, seed=2) if flags != "pre" else None
    before = random(size, dtype=dtype, seed=3) if flags != "post" else None
    added = out.double() if after is None else normed(out, after, eps, offset)
    sum_ = x.double() + scale * added
    given = torch.empty_like(x)
    y = kernels.add_norm(
        x, out, after=after, before=before, eps=eps, offset=offset, residual_scale=scale, y=given
    )
    near(x, sum_, 2.0)
    if before is None:
        assert y is x
    else:
        assert y is given
        near(y, normed(sum_, before, eps, offset), 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 16), (3, 3, 96)])
@pytest.mark.parametrize(("share", "precise"), [(1.0, False), (1.0, True), (0.5, False)])
def test_rotate_turns_queries_and_keys_in_place(
    heads: int, kv_heads: int, head_dim: int, share: float, precise: bool, dtype: torch.dtype
) -> None:
    frequencies = int(head_dim * share) // 2
    inv_freq = 1.0 / 100.0 ** (torch.arange(frequencies) / frequencies)
    table = RotaryTable(RopeConfig(inv_freq, 1.3), 64, torch.float32).to(DEVICE)
    positions = torch.tensor([0, 5, 6, 6, 63], device=DEVICE)
    qkv = random(5, heads + 2 * kv_heads, head_dim, dtype=dtype)
    wanted = qkv.double()
    angles = positions.double()[:, None] * inv_freq.double().to(DEVICE)
    cos, sin = (1.3 * angles.cos()[:, None], 1.3 * angles.sin()[:, None])
    first, second = wanted[..., :frequencies].clone(), wanted[..., frequencies : 2 * frequencies].clone()
    turned = heads + kv_heads
    wanted[:, :turned, :frequencies] = (first * cos - second * sin)[:, :turned]
    wanted[:, :turned, frequencies : 2 * frequencies] = (second * cos + first * sin)[:, :turned]
    values = qkv[:, turned:].clone()
    rotary = Rotary(*(each if precise else each.to(dtype) for each in (table.cos, table.sin)))
    if DEVICE.type == "cuda":  # tables and positions are read before the kernel in front has ended
        torch.cuda.synchronize()
    kernels.rotate(qkv[:, :turned], positions, rotary)
    near(qkv[:, :turned], wanted[:, :turned], 1.0 if precise else 2.0)
    assert torch.equal(qkv[:, turned:], values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "after"), [(False, False), (True, False), (False, True)])
def test_rotate_norms_each_head_first_or_last(dtype: torch.dtype, offset: bool, after: bool) -> None:
    norm = HeadNorm(6, 32, 1e-4, offset=offset, dtype=dtype).to(DEVICE)
    norm.weight.data.copy_(random(6 * 32, dtype=dtype, seed=4))
    table = RotaryTable(RopeConfig(torch.rand(16), 1.0), 64, dtype).to(DEVICE)
    positions = torch.tensor([0, 1, 2, 40, 63], device=DEVICE)
    cos, sin = table(positions)
    qk = random(5, 6, 32, dtype=dtype)
    wanted, weight = qk.double(), norm.weight.view(6, 32)
    if not after:
        wanted = normed(wanted, weight, 1e-4, offset)
    wanted = wanted * cos.double() + wanted.roll(16, -1) * sin.double()
    if after:
        wanted = normed(wanted, weight, 1e-4, offset)
    kernels.rotate(qk, positions, Rotary(table.cos, table.sin, norm.weight, norm.eps, offset, after))
    near(qk, wanted, 2.0)


def test_a_norm_on_heads_rotated_in_part_is_refused() -> None:
    rotary = Rotary(random(1, 16), random(1, 16), random(64))
    with pytest.raises(ValueError, match="whole"):
        kernels.rotate(random(1, 2, 32), torch.zeros(1, dtype=torch.int64), rotary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [48, 1536])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activation(width: int, activation: str, dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * width, dtype=dtype) * 4
    gate_up[0, 0], gate_up[0, 1] = -90.0, 90.0  # exp overflows in float32
    gate, up = gate_up.double().chunk(2, -1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    near(kernels.gated_activation(gate_up, activation), act * up, 2.0)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_rows_is_the_definition(kind: torch.dtype, dtype: torch.dtype) -> None:
    x = random(6, 576, dtype=dtype)
    if kind != torch.int8 and DEVICE.type == "cpu":
        # Triton's interpreter loses the carry where rounding to fp8 reaches the next power of two, so
        # there the values are fp8's own.
        x = (x.float() * 60).to(kind).to(dtype)
        x[:, 5] = 448
    x[2] *= 1000 if kind == torch.int8 else 1024
    x[3] *= 2.0**-13
    q, scale = eight_bits.quantize_rows(x, kind, rows=32)
    assert (q.shape, q.dtype, scale.shape) == ((32, 576), kind, (32, 1))
    largest = 127.0 if kind == torch.int8 else 448.0
    torch.testing.assert_close(scale[:6], x.float().abs().amax(1, keepdim=True) / largest)
    exact = x.double() / scale[:6].double()
    got = q[:6].double()
    # Half a step of the format: 1 for int8; 2**-3 of the value for three bits of mantissa.
    step = 1.0 if kind == torch.int8 else exact.abs().clamp(min=2.0**-6) / 8
    assert ((got - exact).abs() <= 0.501 * step).all()
    assert got.abs().max() == largest


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantized_row_knows_no_other_and_shows_what_is_not_finite(kind: torch.dtype) -> None:
    x = random(5, 96)
    alone_q, alone_scale = eight_bits.quantize_rows(x[1:2], kind)
    x[0] *= 1e4
    x[2], x[3, 7], x[4, 7] = 0.0, float("nan"), float("inf")
    q, scale = eight_bits.quantize_rows(x, kind)
    assert torch.equal(q[1:2].view(torch.int8), alone_q.view(torch.int8))
    assert torch.equal(scale[1:2], alone_scale)
    assert not q[2].float().any()
    assert not scale[2].any()
    for row in (3, 4):
        assert not scale[row].isfinite().any()


def test_no_rows_are_no_launch() -> None:
    none = random(0, 32)
    assert kernels.rms_norm(none, random(32), 1e-5).shape == (0, 32)
    assert kernels.embed(none.long()[:, 0], random(9, 32), 1.0, None, 0.0)[0].shape == (0, 32)
    assert kernels.gated_activation(none, "silu").shape == (0, 16)
    kernels.rotate(none.view(0, 2, 16), none, Rotary(random(1, 16), random(1, 16)))
    assert eight_bits.quantize_rows(none, torch.int8, rows=8)[0].shape == (8, 32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_sums(bias: bool, dtype: torch.dtype) -> None:
    sums = (random(3, 1100) * 1e5).to(torch.int32)
    row, column = random(3, 1, seed=1).abs() * 1e-3, random(1, 1100, seed=2).abs() * 1e-3
    offset = random(1100, dtype=dtype, seed=3) if bias else None
    wanted = sums.double() * row.double() * column.double() + (0 if offset is None else offset.double())
    near(eight_bits.scale_sums(sums, row, column, offset, dtype), wanted)


@compiles
def test_all_compile_for_hopper_and_none_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engine.model.compile_triton", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["compiled"]["90"] > 100
