"""A mixture of experts in place of a layer's MLP: a router gives each token some of many MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.experts_config import PLAIN, Gate
from engine.model.layers import Linear
from engine.model.mxfp4 import words
from engine.model.quantize import Int8Weight

__all__ = ["Experts", "SharedExpert", "route"]


class Experts(nn.Module):
    """The sum of the MLPs that the router chooses for a token, each by its weight.

    Args:
        config: of a model with `experts`.
        dtype: of weights and activations.
        activation: of the gate.

        mxfp4: hold the weights in 4 bits, for CUDA's kernels alone.

    Attributes:
        router: [experts, hidden], in float32 where the family has it so; router_bias: [experts], or None.
        correction: see `Gate`; [experts] float32, or None.
        gate_up: [experts * 2 * width, hidden], each expert's gate and then its up projection; empty once
            the weights are packed or quantised. In 4 bits uint8, [experts * 2 * width, hidden / 2].
        down: [experts * hidden, width], likewise.
        gate_up_bias: [experts * 2 * width], or None; down_bias: [experts * hidden], or None.
        gate_up_scales: of 4 bits, int32 [experts * 2 * words, width], see `mxfp4.packed_scales`; else None;
            down_scales: [experts * words, hidden], likewise.
        scales: where both are in 8 bits for CUDA's kernels, the factors on their rows, float32.
    """

    router_bias: Tensor | None
    correction: Tensor | None
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
        self.dtype = dtype

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

        biased, self.gate = config.experts.bias, config.experts.gate
        self.router = empty(self.count, self.hidden, dtype=torch.float32 if config.experts.precise else dtype)
        self.register_parameter("router_bias", empty(self.count) if biased else None)
        corrected = self.gate.corrected
        self.register_parameter("correction", empty(self.count, dtype=torch.float32) if corrected else None)
        self.gate_up: Tensor
        self.down: Tensor
        weight("gate_up", 2, self.width, self.hidden)
        weight("down", 1, self.hidden, self.width)
        self.scales: tuple[Tensor, Tensor] | None = None
        self._each: list[tuple[Linear, Linear]] = []

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] in and out. What a row gives does not depend on which others there are."""
        experts, weights = self.routed(x)
        if x.device.type == "cpu":
            return self._sorted(x, experts, weights)
        return self.everywhere(x, experts, weights)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `route`."""
        return route(
            x,
            self.router,
            self.chosen,
            renormalised=self.renormalised,
            bias=self.router_bias,
            gate=self.gate,
            correction=self.correction,
        )

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

    @property
    def is_quantized(self) -> bool:
        """Whether its weights are in 8 bits."""
        return self.scales is not None or bool(self._each and self._each[0][0].quantized is not None)

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


class SharedExpert(nn.Module):
    """A gated MLP that every row passes through beside its experts.

    Attributes:
        gate: [hidden], whose product with a row, as a sigmoid, is a factor on what the row gets; or None.
    """

    gate: Tensor | None

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        assert config.experts is not None
        assert config.experts.shared is not None
        width, gated = config.experts.shared
        hidden, bias = config.hidden_size, config.mlp_bias
        self.gate_up_proj = Linear(hidden, 2 * width, bias=bias, dtype=dtype)
        self.down_proj = Linear(width, hidden, bias=bias, dtype=dtype)
        gate = nn.Parameter(torch.empty(hidden, dtype=dtype), requires_grad=False)
        self.register_parameter("gate", gate if gated else None)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] in and out."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: Tensor = self.down_proj(self.activation(gate).mul_(up))
        if self.gate is None:
            return y
        share = torch.mv(x.double(), self.gate.double()).sigmoid()  # alike in any batch, as in `route`
        return y.mul_(share.to(y.dtype).unsqueeze(1))


def route(
    x: Tensor,
    router: Tensor,
    chosen: int,
    *,
    renormalised: bool,
    bias: Tensor | None = None,
    gate: Gate = PLAIN,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts of each row and their weights, by the router's logits.

    The logits are summed in float64: in float32 a product rounds otherwise with more rows, and a row whose
    best experts are nearly alike would go to others in another batch. So are sigmoids, of which torch takes
    some by other instructions than the rest.

    Args:
        x: [T, hidden].
        router: [experts, hidden]; bias: [experts], or None.
        chosen: experts of each row.
        renormalised: their weights shall sum to one, before `gate.scale`.
        gate: what makes shares of logits and experts of shares.
        correction: [experts] float32 if `gate.corrected`, else None.

    Returns:
        [T, chosen] int64 and [T, chosen] float32, the best expert first.
    """
    logits = F.linear(x.double(), router.double(), None if bias is None else bias.double())
    shares = logits.sigmoid().float() if gate.sigmoid else logits.softmax(-1, dtype=torch.float32)
    scores = shares if correction is None else shares + correction
    if gate.groups > 1:
        of_groups = scores.view(len(scores), gate.groups, -1)
        best = of_groups.topk(2, dim=-1).values.sum(-1).topk(gate.open_groups, dim=-1).indices
        shut = torch.ones_like(of_groups[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        scores = of_groups.masked_fill(shut.unsqueeze(-1), -torch.inf).flatten(1)
    weights, experts = scores.topk(chosen, dim=-1)
    if scores is not shares:
        weights = shares.gather(-1, experts)
    if renormalised:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total.clamp(min=gate.least) if gate.least else total)
    return experts, weights if gate.scale == 1.0 else weights * gate.scale
