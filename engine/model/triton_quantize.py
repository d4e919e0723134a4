"""Rows in 8 bits, and what products of them stand for, as Triton kernels. CUDA only.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.model.triton_kernels import warps_for

__all__ = ["quantize_rows", "scale_sums"]

_COLUMNS_PER_PROGRAM = 1024

INT8_LEVELS = 127.0
FP8_LARGEST = 448.0  # of float8_e4m3fn


@triton.jit
def _quantize_kernel(
    x_ptr, q_ptr, scale_ptr, size, LARGEST: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")
    kept = tl.where(finite, x, 0.0)
    largest = tl.max(tl.abs(kept))
    # Zeros stay zeros. What is not finite makes the scale, and so the whole row's output, not finite.
    scaled = kept * (LARGEST / tl.maximum(largest, 1e-30))
    scale = tl.where(tl.min(finite.to(tl.int32)) == 1, largest / LARGEST, float("nan"))
    if ROUND:
        # Adding 1.5 * 2**23 rounds half to even, as torch.round does.
        scaled = (scaled + 12582912.0) - 12582912.0
    tl.store(q_ptr + row * size + column, scaled.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: Tensor, dtype: torch.dtype, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Each row in 8 bits, by a scale of its own: nothing in it depends on another row.

    Args:
        x: [T, K], contiguous.
        dtype: int8 or float8_e4m3fn.
        rows: of the result, at least T, for products that need more; what is in the others is unsaid.

    Returns:
        q [rows, K] and scale [rows, 1] float32, so that q * scale is near x.
    """
    count, size = x.shape
    rows = count if rows is None else rows
    q = torch.empty(rows, size, dtype=dtype, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if count:
        block = triton.next_power_of_2(size)
        _quantize_kernel[(count,)](
            x,
            q,
            scale,
            size,
            LARGEST=INT8_LEVELS if dtype == torch.int8 else FP8_LARGEST,
            ROUND=dtype == torch.int8,
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return q, scale


@triton.jit
def _scale_kernel(
    sums_ptr, row_ptr, column_ptr, bias_ptr, y_ptr, size, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    sums = tl.load(sums_ptr + row * size + column, mask=inside, other=0).to(tl.float32)
    y = sums * tl.load(row_ptr + row) * tl.load(column_ptr + column, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * size + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def scale_sums(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What int8 products stand for.

    Args:
        sums: [T, size] int32, contiguous.
        row_scale: [T, 1] float32, contiguous.
        column_scale: [1, size] float32, contiguous.
        bias: [size], added at last; None without.

    Returns:
        sums * row_scale * column_scale + bias, [T, size] of `dtype`.
    """
    rows, size = sums.shape
    y = torch.empty(rows, size, dtype=dtype, device=sums.device)
    if rows:
        _scale_kernel[(rows, triton.cdiv(size, _COLUMNS_PER_PROGRAM))](
            sums,
            row_scale,
            column_scale,
            sums if bias is None else bias,
            y,
            size,
            BIAS=bias is not None,
            BLOCK=_COLUMNS_PER_PROGRAM,
            num_warps=4,
        )
    return y
