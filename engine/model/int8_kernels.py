"""What lies between two int8 matrix products, one pass over each row (numba; one thread, no allocation).

With torch's operators this takes about fifty calls a layer and as many passes over memory. Each row is
computed by itself and in one order, so its neighbours change no bit of it. All arrays are C-contiguous;
`acc` is a product's int32 sums [T, out] and `weight_scale` [out] float32 what its channels are multiplied
by. A row's `scale` is its largest magnitude, so that 127 levels stand for it; a row that is not finite has
a scale that is not, and stays so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from engine.cpu_team import JIT

__all__ = ["norm_quantize", "quantize", "residual", "residual_norm_quantize", "rotary", "silu_mul_quantize"]

# Sums may be taken in another order and products fused, the same for every row; NaN stays NaN.
_JIT: dict[str, Any] = {**JIT, "fastmath": {"reassoc", "contract", "nsz"}}

_F = np.float32
_LEVELS = _F(127.0)
_LOG2_E = _F(1.4426950408889634)
# 2^f on [-0.5, 0.5] to 2e-7: ln(2)^k / k!, the last two fitted.
_EXP2 = tuple(
    _F(c) for c in (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
)


@njit(**_JIT)
def _round_row(row: Any, bits: Any, out: Any) -> Any:
    """`row` [n] float32 to int8 `out` [n]; `bits` is the row's memory as int32. Returns the scale."""
    # Magnitudes of floats order as integers, where a maximum is one instruction; NaN is above infinity.
    largest = np.int32(0)
    for i in range(row.size):
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    if largest == 0 or largest >= 0x7F800000:
        out[:] = 0
        return _F(0.0) if largest == 0 else _F(np.nan)
    scale = _F(0.0)
    for i in range(row.size):
        scale = max(scale, abs(row[i]))
    level = _LEVELS / scale
    for i in range(row.size):
        out[i] = np.int8(np.int32(np.rint(row[i] * level)))
    return scale


@njit(**_JIT)
def _mix(row: Any, block: int) -> None:
    """Sylvester's matrix of ±1 over the leading axis of `row` seen as [block, n / block], in place."""
    step = row.size // block
    while step < row.size:
        for start in range(0, row.size, 2 * step):
            for i in range(start, start + step):
                a = row[i]
                b = row[i + step]
                row[i] = a + b
                row[i + step] = a - b
        step *= 2


@njit(**_JIT)
def _norm_row(x: Any, weight: Any, eps: Any, block: int, row: Any, bits: Any, out: Any) -> Any:
    total = _F(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    inverse = _F(1.0) / np.sqrt(total / _F(x.size) + eps)
    for i in range(x.size):
        row[i] = x[i] * inverse * weight[i]
    _mix(row, block)
    return _round_row(row, bits, out)


@njit(**_JIT)
def norm_quantize(
    x: Any, weight: Any, eps: Any, block: int, row: Any, bits: Any, out: Any, scale: Any
) -> None:
    """RMSNorm, mixing and rounding of x [T, hidden] to `out` int8 and `scale` [T].

    Args:
        weight: [hidden], the norm's, times the signs of the mixing.
        row, bits: scratch [hidden] as float32, and the same memory as int32.
    """
    for t in range(x.shape[0]):
        scale[t] = _norm_row(x[t], weight, eps, block, row, bits, out[t])


@njit(**_JIT)
def residual(acc: Any, weight_scale: Any, scale: Any, x: Any) -> None:
    """x [T, hidden] += the product; x in place."""
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[t, i] += _F(acc[t, i]) * weight_scale[i] * scale[t]


@njit(**_JIT)
def residual_norm_quantize(
    acc: Any,
    weight_scale: Any,
    x: Any,
    weight: Any,
    eps: Any,
    block: int,
    row: Any,
    bits: Any,
    out: Any,
    scale: Any,
) -> None:
    """`residual`, then `norm_quantize`; `scale` is the product's on entry and that of `out` on return."""
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[t, i] += _F(acc[t, i]) * weight_scale[i] * scale[t]
        scale[t] = _norm_row(x[t], weight, eps, block, row, bits, out[t])


@njit(**_JIT)
def rotary(acc: Any, weight_scale: Any, scale: Any, cos: Any, sin: Any, heads: int, out: Any) -> None:
    """The product to `out` [T, all heads, head_dim], its first `heads` rotated.

    Args:
        cos, sin: [T, head_dim], the sign of rotate_half folded into sin.
    """
    dim = out.shape[2]
    half = dim // 2
    for t in range(out.shape[0]):
        for h in range(heads):
            base = h * dim
            for i in range(half):
                a = _F(acc[t, base + i]) * weight_scale[base + i] * scale[t]
                b = _F(acc[t, base + half + i]) * weight_scale[base + half + i] * scale[t]
                out[t, h, i] = a * cos[t, i] + b * sin[t, i]
                out[t, h, half + i] = b * cos[t, half + i] + a * sin[t, half + i]
        for h in range(heads, out.shape[1]):
            base = h * dim
            for i in range(dim):
                out[t, h, i] = _F(acc[t, base + i]) * weight_scale[base + i] * scale[t]


@njit(**_JIT)
def quantize(x: Any, bits: Any, out: Any, scale: Any) -> None:
    """x [T, n], whose memory as int32 is `bits`, to `out` int8 and `scale` [T]."""
    for t in range(x.shape[0]):
        scale[t] = _round_row(x[t], bits[t], out[t])


@njit(**_JIT)
def silu_mul_quantize(
    acc: Any, weight_scale: Any, block: int, row: Any, bits: Any, power: Any, out: Any, scale: Any
) -> None:
    """silu(gate) * up of the product [T, 2 * width], mixed and rounded to `out` [T, width] and `scale`.

    `scale` is the product's on entry and that of `out` on return.

    Args:
        weight_scale: [2 * width], those of `up` times the signs of the mixing.
        row, bits: scratch [width] as float32, and the same memory as int32.
        power: scratch [width] float32.
    """
    width = row.size
    c6, c5, c4, c3, c2, c1, c0 = _EXP2
    for t in range(out.shape[0]):
        own = scale[t]
        # exp(-gate) = 2^f 2^n: 2^f into `power`, 2^n by its bits into `row`.
        for i in range(width):
            y = _F(acc[t, i]) * weight_scale[i] * own * -_LOG2_E
            y = min(max(y, _F(-126.0)), _F(126.0))
            n = np.rint(y)
            f = y - n
            power[i] = (((((c6 * f + c5) * f + c4) * f + c3) * f + c2) * f + c1) * f + c0
            bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
        for i in range(width):
            gate = _F(acc[t, i]) * weight_scale[i] * own
            up = _F(acc[t, width + i]) * weight_scale[width + i] * own
            row[i] = gate * up / (_F(1.0) + power[i] * row[i])
        _mix(row, block)
        scale[t] = _round_row(row, bits, out[t])
