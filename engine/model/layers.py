"""The building blocks of the decoder: fused linear layers, RMSNorm, rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.families import RopeConfig
from engine.model.quantize import Int8Weight
from engine.model.quantize_cuda import RowwiseWeight, check_quantized

__all__ = [
    "HeadNorm",
    "Linear",
    "OffsetNorm",
    "ProjectionNorm",
    "RMSNorm",
    "RotaryTable",
    "apply_partial_rotary",
    "apply_rotary",
]


_PACKABLE: dict[torch.dtype, Callable[[], bool]] = {
    torch.float32: lambda: True,
    torch.bfloat16: lambda: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: lambda: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}
"""Whether this CPU has the instructions oneDNN needs for the dtype."""


class Linear(nn.Module):
    """y = x W^T + b over [..., in_features].

    On the CPU `pack()` reorders the weight once into oneDNN's blocked layout. torch's own CPU linear
    repacks (or streams badly) at every call: on two cores, fp32, SmolLM2's 120 layers cost 22 ms a pass
    packed against 39 ms at one row, and 22 against 48 ms at eight. `quantize()` turns it to int8.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        )
        self.packed: Tensor | None = None
        self.quantized: Int8Weight | RowwiseWeight | None = None

    def pack(self) -> None:
        """Reorder the weight for this device; nothing happens where oneDNN cannot run its dtype."""
        weight = self.weight
        if self.quantized is not None or self.packed is not None:
            return
        if weight.device.type != "cpu" or not torch._C._has_mkldnn or not _PACKABLE[weight.dtype]():
            return
        # The hint of 8 rows picks a blocking that was as good as any at 1 to 64 rows.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)
        self._drop_weight()

    def quantize(self, kind: Literal["int8", "fp8"], *, rotate: bool) -> None:
        """From float weights to 8 bits, before `pack()`: `Int8Weight` on the CPU, `RowwiseWeight` on CUDA.

        Args:
            rotate: mix the channels of the input (`Int8Weight`).

        Raises:
            ConfigError: this device, dtype or size of weight cannot run it.
        """
        if self.weight.device.type == "cpu":
            check_quantized(kind, self.weight.device, self.weight.dtype)
            self.quantized = Int8Weight(self.weight, self.bias, rotate=rotate)
        else:
            self.quantized = RowwiseWeight(self.weight, self.bias, kind)
        self._drop_weight()

    def _drop_weight(self) -> None:
        """Nobody reads the plain copy any more (an embedding that shares it keeps its own reference)."""
        self.weight = nn.Parameter(torch.empty(0, dtype=self.weight.dtype), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., in_features] to [..., out_features]; `residual`, of that shape, is added."""
        y: Tensor
        if self.quantized is not None:
            return self.quantized(x, residual)
        if self.packed is None:
            y = F.linear(x, self.weight, self.bias)
            return y if residual is None else y.add_(residual)
        if residual is None:
            y = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        return y

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """x [T, in_features] to `out` [T, out_features], by the product itself where that is of its dtype."""
        plain = self.quantized is None and self.packed is None and self.bias is None
        if plain and out.dtype == x.dtype:
            return torch.mm(x, self.weight.t(), out=out)
        return out.copy_(self(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the mean square in float32."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps
        self.register_buffer("_eps", torch.tensor(eps), persistent=False)

    _eps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # torch's own is eight operators on the CPU and takes twice as long: 18 against 9 µs a row.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(self.weight)


class OffsetNorm(RMSNorm):
    """x / rms(x) * (1 + weight), all of it in float32 (Gemma)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return torch.addcmul(y, y, self.weight.float()).to(x.dtype)


class HeadNorm(nn.Module):
    """RMSNorm of each query and key head over its own channels.

    Args:
        heads: query heads plus K/V heads.
        head_dim: channels of each.
        eps: added to the mean square.
        offset: multiply by 1 + weight.
        dtype: of the weight [heads * head_dim], which repeats the checkpoint's for every head.
    """

    def __init__(self, heads: int, head_dim: int, eps: float, *, offset: bool, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(heads * head_dim, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.head_dim, self.eps, self.offset = head_dim, eps, offset

    def forward(self, qk: Tensor) -> Tensor:
        """qk [tokens, heads, head_dim] in and out."""
        y = F.rms_norm(qk.float(), (self.head_dim,), None, self.eps)
        weight = self.weight.view(-1, self.head_dim)
        return (torch.addcmul(y, y, weight) if self.offset else y.mul_(weight)).to(qk.dtype)


class ProjectionNorm(nn.Module):
    """RMSNorm of the queries over all their heads together, and of the keys over all of theirs (OLMo 2).

    Args:
        q_size: channels of all query heads.
        k_size: channels of all K/V heads.
        eps: added to the mean square.
        dtype: of the weight [q_size + k_size].
    """

    def __init__(self, q_size: int, k_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(q_size + k_size, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.sizes, self.eps = [q_size, k_size], eps

    def forward(self, qk: Tensor) -> Tensor:
        """qk [tokens, heads, head_dim] in and out."""
        q, k = torch.split_with_sizes(qk.flatten(1), self.sizes, 1)
        q_weight, k_weight = torch.split_with_sizes(self.weight, self.sizes)
        q = F.rms_norm(q, q.shape[1:], q_weight, self.eps)
        k = F.rms_norm(k, k.shape[1:], k_weight, self.eps)
        return torch.cat((q, k), 1).view(qk.shape)


class RotaryTable(nn.Module):
    """cos and signed sin for every position, [max_position, 2 * frequencies], computed once in float32.

    The sign of rotate_half is folded into sin, so that rotating is one roll and two multiplications.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rope: RopeConfig, max_position: int, dtype: torch.dtype) -> None:
        super().__init__()
        angles = torch.arange(max_position, dtype=torch.float32)[:, None] * rope.inv_freq[None, :].cpu()
        cos, sin = angles.cos() * rope.scale, angles.sin() * rope.scale
        dtype = torch.float32 if rope.precise else dtype
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1).to(dtype), persistent=False)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1).to(dtype), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin of shape [tokens, 1, 2 * frequencies] for positions [tokens] (int64)."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [tokens, heads, head_dim] by `RotaryTable`'s cos and sin; same shape and dtype out."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def apply_partial_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary` on the first channels of each head, as many as cos and sin have."""
    size = cos.shape[-1]
    return torch.cat((apply_rotary(x[..., :size], cos, sin), x[..., size:]), dim=-1)
