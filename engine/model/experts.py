"""A mixture of experts in place of a layer's MLP: a router gives each token some of many MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.layers import Linear
from engine.model.quantize import Int8Weight

__all__ = ["Experts", "route"]


class Experts(nn.Module):
    """The sum of the MLPs that the router chooses for a token, each by its weight.

    Args:
        config: of a model with `experts`.
        dtype: of weights and activations.
        activation: of the gate.

    Attributes:
        router: [experts, hidden].
        gate_up: [experts * 2 * width, hidden], each expert's gate and then its up projection; empty once
            the weights are packed or quantised.
        down: [experts * hidden, width], likewise.
        scales: where both are in 8 bits for CUDA's kernels, the factors on their rows, float32.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        assert config.experts is not None
        self.count, self.chosen = config.experts.count, config.experts.chosen
        self.renormalised = config.experts.renormalised
        self.hidden, self.width, self.activation = config.hidden_size, config.experts.width, activation

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, dtype=dtype), requires_grad=False)

        self.router = weight(self.count, self.hidden)
        self.gate_up = weight(self.count * 2 * self.width, self.hidden)
        self.down = weight(self.count * self.hidden, self.width)
        self.scales: tuple[Tensor, Tensor] | None = None
        self._each: list[tuple[Linear, Linear]] = []

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] in and out. What a row gives does not depend on which others there are."""
        experts, weights = route(x, self.router, self.chosen, renormalised=self.renormalised)
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
        pairs = zip(self.gate_up.chunk(self.count), self.down.chunk(self.count), strict=True)
        for expert, (gate_up, down) in enumerate(pairs):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            found = F.linear(self.activation(gate).mul_(up), down)
            weight = torch.where(experts == expert, weights, 0.0).sum(1, keepdim=True)
            # Not 0 times what this expert gives, which might not be finite.
            y = y + torch.where(weight != 0.0, found * weight, 0.0).to(x.dtype)
        return y

    def _sorted(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """By each expert for its own rows. The host has to know which they are."""
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=self.count).tolist()
        gate, up = self._products(0, x[order // self.chosen], counts).chunk(2, dim=-1)
        found = self._products(1, self.activation(gate).mul_(up), counts)
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
            weight = (self.gate_up, self.down)[which]
            stacked = weight.view(self.count, -1, weight.shape[1])
            return torch.cat([F.linear(rows, stacked[expert]) for expert, rows in parts])
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
        if self.gate_up.device.type == "cpu":
            self._split(Linear.pack)

    def quantize(self, kind: Literal["int8", "fp8"]) -> None:
        """On the CPU as `Linear.quantize`, each expert by itself; on CUDA see `quantize_weights`. The router
        stays as it is.

        Raises:
            ConfigError: see `Linear.quantize`.
        """
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
            for gate_up, down in zip(
                self.gate_up.chunk(self.count), self.down.chunk(self.count), strict=True
            ):
                self._each.append((_linear(gate_up), _linear(down)))
            for name in ("gate_up", "down"):  # what is not packed stays in its views
                setattr(self, name, nn.Parameter(self.router.new_empty(0), requires_grad=False))
        for pair in self._each:
            for linear in pair:
                work(linear)


def _linear(weight: Tensor) -> Linear:
    linear = Linear(weight.shape[1], 0, bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def route(x: Tensor, router: Tensor, chosen: int, *, renormalised: bool) -> tuple[Tensor, Tensor]:
    """The experts of each row and their weights: the largest of the softmax of router logits.

    The logits are summed in float64: in float32 a product rounds otherwise with more rows, and a row whose
    best experts are nearly alike would go to others in another batch.

    Args:
        x: [T, hidden].
        router: [experts, hidden].
        chosen: experts of each row.
        renormalised: their weights shall sum to one.

    Returns:
        [T, chosen] int64 and [T, chosen] float32, the largest weight first.
    """
    shares = F.linear(x.double(), router.double()).softmax(-1, dtype=torch.float32)
    weights, experts = shares.topk(chosen, dim=-1)
    if renormalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights
