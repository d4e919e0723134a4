"""A mixture of experts in place of a layer's MLP: a router gives each token some of many MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.layers import Linear
from engine.model.mxfp4 import words
from engine.model.quantize import Int8Weight

__all__ = ["Experts", "route"]


class Experts(nn.Module):
    """The sum of the MLPs that the router chooses for a token, each by its weight.

    Args:
        config: of a model with `experts`.
        dtype: of weights and activations.
        activation: of the gate.

        mxfp4: hold the weights in 4 bits, for CUDA's kernels alone.

    Attributes:
        router: [experts, hidden]; router_bias: [experts], or None.
        gate_up: [experts * 2 * width, hidden], each expert's gate and then its up projection; empty once
            the weights are packed or quantised. In 4 bits uint8, [experts * 2 * width, hidden / 2].
        down: [experts * hidden, width], likewise.
        gate_up_bias: [experts * 2 * width], or None; down_bias: [experts * hidden], or None.
        gate_up_scales: of 4 bits, int32 [experts * 2 * words, width], see `mxfp4.packed_scales`; else None;
            down_scales: [experts * words, hidden], likewise.
        scales: where both are in 8 bits for CUDA's kernels, the factors on their rows, float32.
    """

    router_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_scales: Tensor | None
    down_scales: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        activation: Callable[[Tensor], Tensor],
        *,
        mxfp4: bool = False,
    ) -> None:
        super().__init__()
        assert config.experts is not None
        self.count, self.chosen = config.experts.count, config.experts.chosen
        self.renormalised, self.clamp = config.experts.renormalised, config.experts.clamp
        self.hidden, self.width, self.activation = config.hidden_size, config.experts.width, activation

        def empty(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        def weight(name: str, parts: int, outputs: int, size: int) -> None:
            rows, scales = self.count * parts * outputs, None
            if mxfp4:
                setattr(self, name, empty(rows, size // 2, dtype=torch.uint8))
                scales = empty(self.count * parts * words(size), outputs, dtype=torch.int32)
            else:
                setattr(self, name, empty(rows, size))
            self.register_parameter(f"{name}_scales", scales)
            self.register_parameter(f"{name}_bias", empty(rows) if biased else None)

        biased = config.experts.bias
        self.router = empty(self.count, self.hidden)
        self.register_parameter("router_bias", empty(self.count) if biased else None)
        self.gate_up: Tensor
        self.down: Tensor
        weight("gate_up", 2, self.width, self.hidden)
        weight("down", 1, self.hidden, self.width)
        self.scales: tuple[Tensor, Tensor] | None = None
        self._each: list[tuple[Linear, Linear]] = []

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] in and out. What a row gives does not depend on which others there are."""
        experts, weights = route(
            x, self.router, self.chosen, renormalised=self.renormalised, bias=self.router_bias
        )
        if x.device.type == "cpu":
            return self._sorted(x, experts, weights)
        return self.everywhere(x, experts, weights)

    def everywhere(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """By each expert for all rows, of which most count for nothing: it waits for no value, so it can be
        captured. Far slower than kernels that know which rows are whose.

        Args:
            x: [T, hidden], on the device of the weights, which are neither packed nor quantised.
            experts: [T, chosen] int64; weights: [T, chosen] float32.
        """
        y = torch.zeros_like(x)
        weights_of = zip(*(self._of_experts(name) for name in ("gate_up", "down")), strict=True)
        for expert, (gate_up, down) in enumerate(weights_of):
            found = F.linear(self._gated(F.linear(x, *gate_up)), *down)
            weight = torch.where(experts == expert, weights, 0.0).sum(1, keepdim=True)
            # Not 0 times what this expert gives, which might not be finite.
            y = y + torch.where(weight != 0.0, found * weight, 0.0).to(x.dtype)
        return y

    def _of_experts(self, name: Literal["gate_up", "down"]) -> list[tuple[Tensor, Tensor | None]]:
        """Each expert's own weight and bias."""
        weights, bias = getattr(self, name).chunk(self.count), getattr(self, f"{name}_bias")
        return list(
            zip(weights, [None] * self.count if bias is None else bias.chunk(self.count), strict=True)
        )

    def _gated(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * width], gates and then ups, to what goes into the second product."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.clamp is None:
            return self.activation(gate).mul_(up)
        limit, alpha = self.clamp
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1).mul_(gate * torch.sigmoid(gate * alpha))

    def _sorted(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """By each expert for its own rows. The host has to know which they are."""
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=self.count).tolist()
        inner = self._gated(self._products(0, x[order // self.chosen], counts))
        found = self._products(1, inner, counts)
        found *= weights.flatten()[order].unsqueeze(1)
        given = torch.empty_like(found)
        given[order] = found
        first, *others = given.view(-1, self.chosen, self.hidden).unbind(1)
        y = first.contiguous()
        for other in others:  # one after another: `sum` has an order for every shape
            y += other
        return y

    def _products(self, which: int, x: Tensor, counts: list[int]) -> Tensor:
        """The first or second product of each expert with its rows, of which `counts` follow one another."""
        parts = [(expert, rows) for expert, rows in enumerate(torch.split_with_sizes(x, counts)) if len(rows)]
        if not self._each:
            own = self._of_experts("down" if which else "gate_up")
            return torch.cat([F.linear(rows, *own[expert]) for expert, rows in parts])
        linears = [self._each[expert][which] for expert, _ in parts]
        weights = [found for linear in linears if isinstance(found := linear.quantized, Int8Weight)]
        if not weights:
            return torch.cat([linear(rows) for linear, (_, rows) in zip(linears, parts, strict=True)])
        sizes = [len(rows) for _, rows in parts]
        rounded, largest = weights[0].rounded(x)  # once for all: each mixes its input in the same way
        pieces = (torch.split_with_sizes(each, sizes) for each in (rounded, largest))
        return torch.cat([weight.product(*piece) for weight, *piece in zip(weights, *pieces, strict=True)])

    def pack(self) -> None:
        """As `Linear.pack`, each expert by itself; on the CPU only."""
        if self.gate_up.device.type == "cpu" and self.gate_up_scales is None:
            self._split(Linear.pack)

    def quantize(self, kind: Literal["int8", "fp8"]) -> None:
        """On the CPU as `Linear.quantize`, each expert by itself; on CUDA see `quantize_weights`. The router
        stays as it is, and so do weights in 4 bits.

        Raises:
            ConfigError: see `Linear.quantize`.
        """
        if self.gate_up_scales is not None:
            return
        if self.gate_up.device.type == "cuda":
            self.quantize_weights(kind)
            return
        self._split(lambda linear: linear.quantize(kind, rotate=True))

    def quantize_weights(self, kind: Literal["int8", "fp8"]) -> None:
        """Both weights in 8 bits by a scale for each of their outputs, activations as they are: what the
        kernels for CUDA take, which lift weights to the activations' dtype as they come from memory."""
        from engine.model.triton_quantize import quantize_rows  # only CUDA needs Triton

        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        gate_up, gate_up_scale = quantize_rows(self.gate_up, dtype)
        self.gate_up = nn.Parameter(gate_up, requires_grad=False)
        down, down_scale = quantize_rows(self.down, dtype)
        self.down = nn.Parameter(down, requires_grad=False)
        self.scales = gate_up_scale.flatten(), down_scale.flatten()

    def _split(self, work: Callable[[Linear], None]) -> None:
        if not self._each:
            for gate_up, down in zip(self._of_experts("gate_up"), self._of_experts("down"), strict=True):
                self._each.append((_linear(*gate_up), _linear(*down)))
            for name in ("gate_up", "down"):  # what is not packed stays in its views
                setattr(self, name, nn.Parameter(self.router.new_empty(0), requires_grad=False))
        for pair in self._each:
            for linear in pair:
                work(linear)


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    linear = Linear(weight.shape[1], 0, bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def route(
    x: Tensor, router: Tensor, chosen: int, *, renormalised: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The experts of each row and their weights: the largest of the softmax of router logits.

    The logits are summed in float64: in float32 a product rounds otherwise with more rows, and a row whose
    best experts are nearly alike would go to others in another batch.

    Args:
        x: [T, hidden].
        router: [experts, hidden]; bias: [experts], or None.
        chosen: experts of each row.
        renormalised: their weights shall sum to one.

    Returns:
        [T, chosen] int64 and [T, chosen] float32, the largest weight first.
    """
    logits = F.linear(x.double(), router.double(), None if bias is None else bias.double())
    shares = logits.softmax(-1, dtype=torch.float32)
    weights, experts = shares.topk(chosen, dim=-1)
    if renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights
