"""What lies between two matrix products of a decoder layer, each as one Triton kernel. CUDA only.

On a GPU a decode step reads every weight once, and what is between the products is small: its cost is the
number of kernels. Each function here replaces three to five of torch's.

All of them compute in float32 and round where torch's operators round that they stand for. With
TRITON_INTERPRET=1 in the environment before Triton is imported they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention.base import Rotary
from engine.triton_dependent import ahead_of, asks_ahead, launched_early, launches_next, waits

__all__ = [
    "activated",
    "add_norm",
    "embed",
    "finished",
    "gated_activation",
    "programs_a_gate",
    "rms_norm",
    "rotate",
    "warps_for",
]

_HEADS_PER_PROGRAM = 4
_COLUMNS_PER_PROGRAM = 1024


@triton.jit
def _normed(value, weight_ptr, column, inside, size, eps, OFFSET: tl.constexpr):
    """RMSNorm of one row in float32; masked columns of `value` are zero."""
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / size + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        weight += 1.0
    return value * scale * weight


@triton.jit(do_not_specialize=["lines"])
def _add_norm_kernel(
    x_ptr,
    out_ptr,
    after_ptr,
    before_ptr,
    y_ptr,
    ahead_ptr,
    lines,
    size,
    residual_scale,
    eps,
    ADD: tl.constexpr,
    AFTER: tl.constexpr,
    BEFORE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    LINES: tl.constexpr,
):
    if LINES:
        asks_ahead(ahead_ptr, lines, tl.program_id(0), LINES)
    if EARLY:
        waits()
        launches_next()
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row + column, mask=inside, other=0.0)
    if ADD:
        out = tl.load(out_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        if AFTER:
            out = _normed(out, after_ptr, column, inside, size, eps, OFFSET).to(x.dtype).to(tl.float32)
        x = (x.to(tl.float32) + out * residual_scale).to(x.dtype)
        tl.store(x_ptr + row + column, x, mask=inside)
    if BEFORE:
        y = _normed(x.to(tl.float32), before_ptr, column, inside, size, eps, OFFSET)
        tl.store(y_ptr + row + column, y.to(x.dtype), mask=inside)


def add_norm(
    x: Tensor,
    out: Tensor,
    *,
    after: Tensor | None,
    before: Tensor | None,
    eps: float,
    offset: bool = False,
    residual_scale: float = 1.0,
    y: Tensor | None = None,
    ahead: tuple[Tensor | None, int] = (None, 0),
) -> Tensor:
    """x += residual_scale * norm(out), in place; then norm(x).

    Args:
        x: [T, hidden], contiguous: the residual stream.
        out: [T, hidden], contiguous: what a block adds to it.
        after: [hidden], weight of the norm on `out`; None: it is added as it is.
        before: [hidden], weight of the next block's norm; None: that block takes x itself.
        eps: added to the mean squares.
        offset: norms multiply by 1 + weight.
        y: [T, hidden], contiguous: where norm(x) goes; None is a new tensor.
        ahead: a weight of 16 bits and bytes: so much of it is asked for into L2 meanwhile, from Hopper on.

    Returns:
        [T, hidden], the next block's input; x itself without `before`.
    """
    return _launch_add_norm(x, out, after, before, eps, offset, residual_scale, y, ahead)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, offset: bool = False, y: Tensor | None = None
) -> Tensor:
    """x [T, hidden] / rms(x) * weight [hidden], or * (1 + weight), in y; a new tensor without one."""
    return _launch_add_norm(x, None, None, weight, eps, offset, 1.0, y)


def _launch_add_norm(
    x: Tensor,
    out: Tensor | None,
    after: Tensor | None,
    before: Tensor | None,
    eps: float,
    offset: bool,
    residual_scale: float,
    y: Tensor | None = None,
    ahead: tuple[Tensor | None, int] = (None, 0),
) -> Tensor:
    rows, size = x.shape
    if before is None:
        y = x
    elif y is None:
        y = torch.empty_like(x)
    if rows == 0:
        return y
    block = triton.next_power_of_2(size)
    early, options = launched_early(x.device)
    lines, each = ahead_of(*ahead, rows) if early else (0, 0)
    _add_norm_kernel[(rows,)](
        x,
        x if out is None else out,
        x if after is None else after,
        x if before is None else before,
        y,
        x if ahead[0] is None else ahead[0],
        lines,
        size,
        residual_scale,
        eps,
        ADD=out is not None,
        AFTER=after is not None,
        BEFORE=before is not None,
        OFFSET=offset,
        BLOCK=block,
        EARLY=early,
        LINES=each,
        num_warps=warps_for(block),
        **options,
    )
    return y


@triton.jit
def _embed_kernel(
    token_ptr,
    table_ptr,
    weight_ptr,
    x_ptr,
    y_ptr,
    size,
    scale,
    eps,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        waits()
        launches_next()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(table_ptr + tl.load(token_ptr + row) * size + column, mask=inside, other=0.0)
    if SCALED:
        x = (x.to(tl.float32) * scale).to(x.dtype)
    tl.store(x_ptr + row * size + column, x, mask=inside)
    if NORM:
        y = _normed(x.to(tl.float32), weight_ptr, column, inside, size, eps, OFFSET)
        tl.store(y_ptr + row * size + column, y.to(x.dtype), mask=inside)


def embed(
    tokens: Tensor, table: Tensor, scale: float, norm: Tensor | None, eps: float, *, offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Embeddings and the first block's input.

    Args:
        tokens: [T] int64.
        table: [vocab, hidden], contiguous.
        scale: factor on the embeddings.
        norm: [hidden], weight of the first block's norm; None: the block takes the embeddings.
        eps: added to the mean squares.
        offset: the norm multiplies by 1 + weight.

    Returns:
        Both [T, hidden]; the same tensor without `norm`.
    """
    rows, size = len(tokens), table.shape[1]
    x = torch.empty(rows, size, dtype=table.dtype, device=table.device)
    y = x if norm is None else torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(size)
        early, options = launched_early(table.device)
        _embed_kernel[(rows,)](
            tokens,
            table,
            x if norm is None else norm,
            x,
            y,
            size,
            scale,
            eps,
            SCALED=scale != 1.0,
            NORM=norm is not None,
            OFFSET=offset,
            BLOCK=block,
            EARLY=early,
            num_warps=warps_for(block),
            **options,
        )
    return x, y


@triton.jit
def _rotate_kernel(
    qk_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    token_stride,
    heads,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    channel = tl.arange(0, BLOCK_HALF)[None, :]
    rotated = channel < HALF
    inside = (head < heads) & rotated
    # The second half of the table: there cos is cos and sin is sin; in the first half sin has its sign.
    table = tl.load(position_ptr + token) * (2 * HALF) + HALF + channel
    cos = tl.load(cos_ptr + table, mask=rotated, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=rotated, other=0.0).to(tl.float32)
    if EARLY:  # positions are what the step was prepared with, and the tables are the model's
        waits()
        launches_next()
    at = token * token_stride + head * HEAD_DIM + channel
    first = tl.load(qk_ptr + at, mask=inside, other=0.0)
    second = tl.load(qk_ptr + at + HALF, mask=inside, other=0.0)
    kind = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM == 2:
        first, second = first * cos - second * sin, second * cos + first * sin
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = (1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, None]
        weight_at = head * HEAD_DIM + channel
        first_weight = tl.load(weight_ptr + weight_at, mask=inside, other=0.0).to(tl.float32)
        second_weight = tl.load(weight_ptr + weight_at + HALF, mask=inside, other=0.0).to(tl.float32)
        if OFFSET:
            first_weight += 1.0
            second_weight += 1.0
        first = (first * scale * first_weight).to(kind).to(tl.float32)
        second = (second * scale * second_weight).to(kind).to(tl.float32)
    if NORM != 2:
        first, second = first * cos - second * sin, second * cos + first * sin
    tl.store(qk_ptr + at, first.to(kind), mask=inside)
    tl.store(qk_ptr + at + HALF, second.to(kind), mask=inside)


def rotate(qk: Tensor, positions: Tensor, rotary: Rotary) -> None:
    """Rotary embedding of queries and keys in place, and the norm of each head where there is one.

    Args:
        qk: [T, heads, head_dim]; the last two dimensions are contiguous.
        positions: [T] int64; not of the kernel in front (`triton_dependent`), and nor are the tables.
        rotary: its tables are contiguous. With a norm, all channels must be rotated.

    Raises:
        ValueError: a norm on heads that are rotated in part.
    """
    tokens, heads, head_dim = qk.shape
    half, norm = rotary.cos.shape[1] // 2, rotary.norm
    if norm is not None and 2 * half != head_dim:
        raise ValueError("heads that are normed must be rotated whole")
    if tokens == 0:
        return
    early, options = launched_early(qk.device)
    _rotate_kernel[(tokens, triton.cdiv(heads, _HEADS_PER_PROGRAM))](
        qk,
        positions,
        rotary.cos,
        rotary.sin,
        qk if norm is None else norm,
        qk.stride(0),
        heads,
        rotary.eps,
        HEAD_DIM=head_dim,
        HALF=half,
        NORM=rotary.kind,
        OFFSET=rotary.offset,
        BLOCK_HEADS=_HEADS_PER_PROGRAM,
        BLOCK_HALF=triton.next_power_of_2(half),
        EARLY=early,
        num_warps=4,
        **options,
    )


@triton.jit
def activated(gate, GELU: tl.constexpr):
    """silu, or gelu's tanh form, of any shape, computed in float32 and rounded back."""
    kind = gate.dtype
    gate = gate.to(tl.float32)
    # tanh(z) = 2 sigmoid(2 z) - 1, so gelu's tanh form is x * sigmoid(2 z).
    argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate
    # Beyond -80 the gate is shut, and exp would overflow.
    return (gate / (1.0 + tl.exp(-tl.maximum(argument, -80.0)))).to(kind)


@triton.jit
def finished(
    sums, up, scale, bias_ptr, y_ptr, at, output, inside, width, residual_scale,
    NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """From sums to the output at `at`, each step rounded where an operator of torch's rounds."""
    kind = y_ptr.dtype.element_ty
    if NORM:
        sums *= scale
        up *= scale
    if BIAS:
        sums += tl.load(bias_ptr + output, mask=output < width, other=0.0).to(tl.float32)
    y = sums.to(kind)
    if GATE:
        if BIAS:
            up += tl.load(bias_ptr + width + output, mask=output < width, other=0.0).to(tl.float32)
        y = (activated(y, GATE == 2).to(tl.float32) * up.to(kind).to(tl.float32)).to(kind)
    if ADD:
        x = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = (x + y.to(tl.float32) * residual_scale).to(kind)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit(do_not_specialize=["lines"])
def _gated_kernel(
    gate_up_ptr,
    y_ptr,
    ahead_ptr,
    lines,
    width,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    LINES: tl.constexpr,
):
    if LINES:
        asks_ahead(ahead_ptr, lines, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), LINES)
    if EARLY:
        waits()
        launches_next()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * width + column, mask=inside, other=0.0)
    kind = gate.dtype
    active = activated(gate, GELU).to(tl.float32)
    tl.store(y_ptr + row * width + column, (active * up.to(tl.float32)).to(kind), mask=inside)


def gated_activation(
    gate_up: Tensor, activation: str, ahead: tuple[Tensor | None, int] = (None, 0)
) -> Tensor:
    """act(gate) * up.

    Args:
        gate_up: [T, 2 * width], contiguous, the gate first.
        activation: "silu" or "gelu_tanh".
        ahead: see `add_norm`.

    Returns:
        [T, width].
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    if rows:
        early, options = launched_early(y.device)
        grid = (rows, programs_a_gate(width))
        lines, each = ahead_of(*ahead, grid[0] * grid[1]) if early else (0, 0)
        _gated_kernel[grid](
            gate_up,
            y,
            gate_up if ahead[0] is None else ahead[0],
            lines,
            width,
            GELU=activation == "gelu_tanh",
            BLOCK=_COLUMNS_PER_PROGRAM,
            EARLY=early,
            LINES=each,
            num_warps=4,
            **options,
        )
    return y


def programs_a_gate(width: int) -> int:
    """Programs of `gated_activation` for each row of so many outputs."""
    found: int = triton.cdiv(width, _COLUMNS_PER_PROGRAM)
    return found


def warps_for(block: int) -> int:
    """So that a thread holds about 8 values, within what one program may have."""
    return max(1, min(16, block // 256))
