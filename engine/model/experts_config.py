"""What a config says of a mixture of experts, family by family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.errors import UnsupportedModelError

__all__ = [
    "PLAIN",
    "Clamp",
    "ExpertsConfig",
    "Gate",
    "Shared",
    "behind_dense_layers",
    "by_sigmoids",
    "ernie_experts",
    "every_nth_layer",
    "experts_of",
    "hunyuan_experts",
]

_TINY = 1e-20
"""Sums of sigmoids are taken to be no less, as the reference adds it to them."""


class Clamp(NamedTuple):
    """(up + 1) * gate * sigmoid(alpha * gate) in place of a gated activation, where the gate is at most
    `limit`, and up too and not less than -limit."""

    limit: float
    alpha: float


class Gate(NamedTuple):
    """How the logits of a router choose experts and weigh them.

    An expert's share is the softmax of all logits, or its own logit's sigmoid. The largest shares choose;
    with a correction the largest sums of both do, and the weights are still the shares alone.

    Args:
        sigmoid: not softmax.
        corrected: by a learned term for each expert, [experts] float32.
        groups: of neighbouring experts, of which a row has its experts in `open_groups` alone: those in which
            the best two, corrected, sum to most.
        scale: on the weights, behind renormalising.
        least: what weights are divided by at least, where they are renormalised.
    """

    sigmoid: bool = False
    corrected: bool = False
    groups: int = 1
    open_groups: int = 1
    scale: float = 1.0
    least: float = 0.0


PLAIN = Gate()
"""The largest of the softmax."""


class Shared(NamedTuple):
    """A gated MLP that each token passes through beside its experts.

    Args:
        width: channels between its two products.
        gated: what it gives is multiplied by the sigmoid of a product with its input.
    """

    width: int
    gated: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP.

    Args:
        count: experts of a layer.
        chosen: for each token.
        width: channels between the two products of each.
        renormalised: the weights of those chosen sum to one.
        layers: for each layer, whether it has them.
        bias: on the router and on both products.
        clamp: bounds on what the gate is taken of; None is none.
        mxfp4: the checkpoint's are in 4 bits (`engine.model.mxfp4`), and of a size that CUDA's kernels take.
        gate: how they are chosen.
        shared: beside them; None is nothing.
        precise: the router is in float32 whatever the model's dtype.
    """

    count: int
    chosen: int
    width: int
    renormalised: bool
    layers: tuple[bool, ...]
    bias: bool = False
    clamp: Clamp | None = None
    mxfp4: bool = False
    gate: Gate = PLAIN
    shared: Shared | None = None
    precise: bool = False


def experts_of(
    config: Any,
    count: int,
    *,
    renormalised: bool,
    width: int | None = None,
    layers: tuple[bool, ...] | None = None,
    chosen: int | None = None,
    gate: Gate = PLAIN,
    shared: Shared | None = None,
    precise: bool = False,
) -> ExpertsConfig:
    """Of a transformers config.

    Args:
        width: None is its `intermediate_size`; layers: None are all; chosen: None is `num_experts_per_tok`.

    Raises:
        UnsupportedModelError: fewer experts can be chosen than shall be, or groups are not of one size.
    """
    chosen = config.num_experts_per_tok if chosen is None else chosen
    if not 1 <= chosen <= count:
        raise UnsupportedModelError(
            f"num_experts_per_tok is {chosen} of {count} experts; it must be 1 to {count}"
        )
    if gate.groups != 1:
        _check_groups(count, chosen, gate)
    return ExpertsConfig(
        count=count,
        chosen=chosen,
        width=width or config.intermediate_size,
        renormalised=bool(renormalised),
        layers=layers or (True,) * config.num_hidden_layers,
        gate=gate,
        shared=shared,
        precise=precise,
    )


def _check_groups(count: int, chosen: int, gate: Gate) -> None:
    groups, opened = gate.groups, gate.open_groups
    if groups < 1 or count % groups or count // groups < 2:
        raise UnsupportedModelError(f"n_group is {groups} for {count} experts; a group must have two or more")
    if not 1 <= opened <= groups or opened * (count // groups) < chosen:
        raise UnsupportedModelError(
            f"topk_group is {opened} of {groups} groups with {count // groups} experts each, which must be "
            f"enough for num_experts_per_tok, {chosen}"
        )


def every_nth_layer(config: Any) -> tuple[bool, ...]:
    """By `decoder_sparse_step`, but not in `mlp_only_layers`.

    Raises:
        UnsupportedModelError: no step.
    """
    dense, every = config.mlp_only_layers or (), config.decoder_sparse_step
    if every < 1:
        raise UnsupportedModelError(f"decoder_sparse_step is {every}; it must be 1 or more")
    return tuple(layer not in dense and (layer + 1) % every == 0 for layer in range(config.num_hidden_layers))


def behind_dense_layers(config: Any) -> tuple[bool, ...]:
    """In all layers but the first `first_k_dense_replace`."""
    return tuple(layer >= config.first_k_dense_replace for layer in range(config.num_hidden_layers))


def by_sigmoids(config: Any, layers: tuple[bool, ...] | None = None) -> ExpertsConfig:
    """GLM-4.5's, dots.llm1's and Solar Open's."""
    gate = Gate(
        sigmoid=True,
        corrected=True,
        groups=config.n_group,
        open_groups=config.topk_group,
        scale=float(config.routed_scaling_factor),
        least=_TINY,
    )
    return experts_of(
        config,
        config.n_routed_experts,
        renormalised=config.norm_topk_prob,
        width=config.moe_intermediate_size,
        layers=layers,
        gate=gate,
        shared=Shared(config.moe_intermediate_size * config.n_shared_experts),
    )


def ernie_experts(config: Any) -> ExpertsConfig:
    """ERNIE 4.5's, of whose layers `moe_layer_interval` and two bounds say which have some.

    Raises:
        UnsupportedModelError: no interval.
    """
    every, last = config.moe_layer_interval, config.moe_layer_end_index
    if every < 1:
        raise UnsupportedModelError(f"moe_layer_interval is {every}; it must be 1 or more")
    width, shared = config.moe_intermediate_size, config.moe_num_shared_experts
    return experts_of(
        config,
        config.moe_num_experts,
        renormalised=True,
        width=width,
        layers=tuple(
            (layer + 1) % every == 0 and config.moe_layer_start_index <= layer <= last
            for layer in range(config.num_hidden_layers)
        ),
        chosen=config.moe_k,
        gate=Gate(corrected=True, least=float(config.moe_norm_min)),
        shared=Shared(width * shared) if shared > 0 else None,
        precise=True,
    )


def hunyuan_experts(config: Any) -> ExpertsConfig:
    """Hunyuan-A13B's, whose config may have a number for each layer.

    Raises:
        UnsupportedModelError: they differ.
    """
    return experts_of(
        config,
        _same("num_experts", config.num_experts),
        renormalised=True,
        chosen=_same("moe_topk", config.moe_topk),
        shared=Shared(config.intermediate_size),
        precise=True,
    )


def _same(name: str, stated: int | Iterable[int]) -> int:
    found = {stated} if isinstance(stated, int) else set(stated)
    if len(found) != 1:
        raise UnsupportedModelError(f"layers that differ in {name} are not supported: {sorted(found)}")
    return found.pop()
